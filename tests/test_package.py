"""The wheel: what is in it, what is not, and that it imports away from the checkout."""

import configparser
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("kernels", "moe", "offload", "benchmarks")
MODELS = ("tinymoe", "steepmoe", "coarsemoe")
DATA_SUFFIXES = {".json", ".safetensors", ".csv"}
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")


def run(*command, cwd):
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build from a copy, so that no build/ or egg-info is left in the repository."""
    tmp = tmp_path_factory.mktemp("wheel")
    tree = tmp / "tree"
    for folder in (*PACKAGES, "tests"):
        shutil.copytree(ROOT / folder, tree / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, tree)
    run(*PIP, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "-w", str(tmp), ".", cwd=tree)
    (path,) = tmp.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def members(wheel):
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_top_level_is_cachemoe_alone(members):
    assert {name.split("/")[0] for name in members} == {"cachemoe", "cachemoe-0.1.0.dist-info"}
    inside = {name.split("/")[1] for name in members if name.startswith("cachemoe/")}
    assert inside == {*PACKAGES, "__init__.py"}


def test_every_source_and_data_file_is_in_and_nothing_else(members):
    every = [path for package in PACKAGES for path in (ROOT / package).rglob("*")]
    sources = [path for path in every if path.suffix in (".py", ".c", ".h")]
    models = (ROOT / "moe" / name for name in MODELS)
    data = [path for folder in models for path in folder.glob("*") if path.suffix in DATA_SUFFIXES]
    training = ROOT / "moe" / "tinymoe" / "training"
    elsewhere = (training, ROOT / "moe" / "public")
    expected = {f"cachemoe/{p.relative_to(ROOT).as_posix()}" for p in sources + data if p.parent not in elsewhere}
    expected.add("cachemoe/__init__.py")
    assert {name for name in members if name.startswith("cachemoe/")} == expected


def test_metadata(members):
    info = "cachemoe-0.1.0.dist-info"
    scripts = configparser.ConfigParser()
    scripts.read_string(members[f"{info}/entry_points.txt"].decode())
    assert dict(scripts["console_scripts"]) == {"cachemoe": "cachemoe.benchmarks.cli:main"}
    metadata = members[f"{info}/METADATA"].decode()
    assert "License-Expression: Apache-2.0\n" in metadata
    assert "Requires-Python: >=3.11\n" in metadata
    assert members[f"{info}/licenses/LICENSE"] == (ROOT / "LICENSE").read_bytes()


def test_installed_wheel_imports_away_from_the_checkout(wheel, tmp_path):
    target = tmp_path / "target"
    run(*PIP, "install", "--no-deps", "--no-index", "--target", str(target), str(wheel), cwd=tmp_path)
    libraries = [path for path in sys.path if Path(path).name in ("site-packages", "dist-packages")]
    # Without `site` no .pth file is read, so an editable install of this checkout cannot answer for the wheel.
    code = (
        "import importlib, json, sys\n"
        f"sys.path[:0] = {[str(target)]!r}\n"
        f"sys.path += {libraries!r}\n"
        f"modules = [importlib.import_module('cachemoe.' + name) for name in {PACKAGES!r}]\n"
        "print(json.dumps([module.__file__ for module in modules]))\n"
    )
    files = json.loads(run(sys.executable, "-I", "-S", "-c", code, cwd=tmp_path))
    assert files == [str(target / "cachemoe" / name / "__init__.py") for name in PACKAGES]


@pytest.mark.parametrize("package", ["kernels", "offload", "moe"])
def test_dependencies_point_one_way(package):
    order = ("kernels", "offload", "moe", "benchmarks")
    above = "|".join(order[order.index(package) + 1 :])
    imports = re.compile(rf"(?:from|import) cachemoe\.(?:{above})\b")
    assert [str(path) for path in (ROOT / package).rglob("*.py") if imports.search(path.read_text())] == []


def test_help_waits_for_no_torch():
    code = "import sys, cachemoe.benchmarks.cli; print([name for name in ('torch', 'numpy') if name in sys.modules])"
    assert run(sys.executable, "-c", code, cwd=ROOT) == "[]\n"
