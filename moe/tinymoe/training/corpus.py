"""Build tinymoe's training corpus: one file of bytes, documents shuffled and separated by a zero byte.

    python corpus.py --out /tmp/tinymoe            # writes corpus.bin and corpus.json (what came from where)

Three sources, mostly English technical prose: the running Python's standard library, the docstrings of some
PyPI wheels (fetched by pip, never installed), and Debian documentation packages (left out where apt is missing).

The held-out text is the Python language reference as `pydoc_data.topics` holds it. No paragraph that shares a run
of eight words with it reaches the corpus.
"""

import argparse
import ast
import hashlib
import html
import inspect
import io
import json
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import tokenize
import warnings
import zipfile
from pathlib import Path
from pydoc_data.topics import topics

# fmt: off
WHEELS = [
    "numpy==2.4.6", "scipy==1.17.1", "sympy==1.14.0", "pandas==3.1.1", "scikit-learn==1.9.1",
    "matplotlib==3.11.2", "networkx==3.6.1", "statsmodels==0.15.0", "scikit-image==0.26.0", "astropy==8.0.2",
    "mne==1.13.2", "biopython==1.88", "nltk==3.10.4", "xarray==2026.9.0", "sqlalchemy==2.1.9", "sphinx==9.0.4",
    "django==5.2.19", "hypothesis==6.170.15", "dask==2026.8.0", "setuptools==84.2.1", "pytest==9.2.0",
    "keras==3.15.1", "jax==0.10.2", "twisted==26.10.0",
]
# fmt: on

# package: (file suffix, folders to leave out, at most this many MB); python's reference/ is the held-out text itself
DEBIAN = {
    "python3.11-doc": (".rst.txt", ("reference",), 12),
    "linux-doc-6.1": (".rst.txt", ("translations",), 9),
    "postgresql-doc-15": (".html", (), 6),
    "vim-runtime": (".txt", (), 4),
    "perl-doc": (".pod", (), 4),
    "git-doc": (".txt", ("RelNotes",), 3),
    "cmake-doc": (".rst.txt", (), 3),
}
RUN = 8  # words: a shared run this long counts as contamination
SEED = 20


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", text.lower())


def held_out_text() -> str:
    return "\n\n".join(topics[name].strip() for name in sorted(topics))


def runs(tokens: list[str]) -> list[str]:
    return [" ".join(tokens[i : i + RUN]) for i in range(len(tokens) - RUN + 1)]


def clean(paragraphs: list[str], held_out: set[str]) -> list[str]:
    """Drop every paragraph touched by a run of words that the held-out text has, runs across paragraphs included."""
    while True:
        tokens, owner = [], []
        for i, paragraph in enumerate(paragraphs):
            found = words(paragraph)
            tokens += found
            owner += [i] * len(found)
        tainted = set()
        for start, run in enumerate(runs(tokens)):
            if run in held_out:
                tainted.update(owner[start : start + RUN])
        if not tainted:
            return paragraphs
        paragraphs = [p for i, p in enumerate(paragraphs) if i not in tainted]  # neighbours may now form a run: again


def docstrings(source: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # other people's invalid escapes
        tree = ast.parse(source)
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return "\n\n".join(text for text in found if text and len(text) > 80)


def comments(source: str) -> str:
    lines, last = [], 0
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            lines += [""] * (token.start[0] > last + 1) + [token.string.lstrip("#! ")]
            last = token.start[0]
    return "\n".join(lines)


def plain_rst(text: str) -> str:
    """Roughly what Sphinx's text writer makes of reStructuredText, which is the form the held-out text has."""
    text = re.sub(r"(?m)^\.\. (index|highlight|_|module|sectionauthor|kernel-doc).*\n(?:[ \t]+\S.*\n)*", "", text)
    text = re.sub(r"(?m)^(\s*)\.\. (note|warning|seealso|tip|important)::", lambda m: m[1] + m[2].title() + ":", text)
    text = re.sub(r"\.\. versionadded:: *(\S+)", r"New in version \1:", text)
    text = re.sub(r"\.\. versionchanged:: *(\S+)", r"Changed in version \1:", text)
    text = re.sub(r"\.\. deprecated:: *(\S+)", r"Deprecated since version \1:", text)
    text = re.sub(r"(?m)^(\s*)\.\. (?:[a-z]+:)?(?:function|class|method|attribute|data|exception|c:\w+)::", r"\1", text)
    text = re.sub(r":(?:doc|ref|term):`([^`<]+?)\s*(?:<[^`]*>)?`", r"\1", text)
    text = re.sub(r":[a-z:]+:`[!~]?([^`<]+?)\s*(?:<[^`]*>)?`", r'"\1"', text)
    text = re.sub(r"``([^`\n]+)``", r'"\1"', text)
    return re.sub(r"`([^`<\n]+?)\s*<[^`]*>`_+", r"\1", text)


def plain_html(text: str) -> str:
    text = re.sub(r"(?s)<(script|style|head|nav).*?</\1>|<!--.*?-->|<div class=\"nav.*?</div>", "", text)
    text = re.sub(r"</?code[^>]*>", '"', text)
    text = re.sub(r"</(p|div|pre|h\d|li|dt|dd|tr|table)>", "\n\n", text)
    return html.unescape(re.sub(r"<[^>]+>", "", text))


def plain_pod(text: str) -> str:
    text = re.sub(r"\b[CF]<([^<>]+)>", r'"\1"', text)
    return re.sub(r"^=\w+ ?|\b[BILSX]<([^<>]+)>", lambda m: m[1] or "", text, flags=re.M)


def standard_library() -> list[str]:
    """Whole sources of every eighth module, docstrings and comments of the others."""
    root, texts = Path(sysconfig.get_path("stdlib")), []
    skipped = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "lib2to3", "__pycache__"}
    files = (f for f in sorted(root.rglob("*.py")) if not skipped & set(f.relative_to(root).parts))
    for n, file in enumerate(files):
        try:
            source = file.read_text()
            texts.append(source if n % 8 == 0 else docstrings(source) + "\n\n" + comments(source))
        except (SyntaxError, ValueError, tokenize.TokenError):
            continue
    return texts


def wheel(requirement: str, cache: Path) -> list[str]:
    folder = cache / requirement
    if not list(folder.glob("*.whl")):
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d"]
        subprocess.run([*command, str(folder), requirement], check=True)
    texts = []
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        for name in sorted(archive.namelist()):
            if not name.endswith(".py") or re.search(r"(^|/)(tests?|_vendor|vendored|externals?)/", name):
                continue
            try:
                texts.append(plain_rst(docstrings(archive.read(name).decode())))
            except (SyntaxError, ValueError):
                continue
    return texts


def debian(package: str, cache: Path) -> tuple[str, list[str]]:
    suffix, skipped, megabytes = DEBIAN[package]
    folder = cache / package
    if not list(folder.glob("*.deb")):
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["apt-get", "download", "-qq", package], cwd=folder, check=True)
    archive = next(folder.glob("*.deb"))
    if not (folder / "usr").exists():
        subprocess.run(["dpkg", "-x", archive, folder], check=True)
    plain = {".html": plain_html, ".pod": plain_pod, ".rst.txt": plain_rst}
    files = [f for f in sorted((folder / "usr").rglob("*" + suffix)) if f.is_file() and not f.is_symlink()]
    files = [f for f in files if not set(skipped) & set(f.parts)]
    random.Random(SEED).shuffle(files)
    texts, size = [], 0
    for file in files:
        text = plain.get(suffix, str)(file.read_text(errors="replace"))
        if "Generated" not in text[:200] and size < megabytes * 1e6:
            texts.append(text)
            size += len(text)
    version = subprocess.run(["dpkg-deb", "-f", archive, "Version"], capture_output=True, text=True, check=True).stdout
    return f"{package}={version.strip()}", texts


def main() -> None:
    parser = argparse.ArgumentParser(description=inspect.getdoc(sys.modules[__name__]).splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for corpus.bin, corpus.json and the downloads")
    out = parser.parse_args().out
    sources = {f"standard library of Python {sys.version.split()[0]}": standard_library()}
    for requirement in WHEELS:
        sources[requirement] = wheel(requirement, out / "wheels")
    if shutil.which("apt-get"):
        sources.update(debian(package, out / "debian") for package in DEBIAN)
    else:
        print("apt-get is missing: the Debian documentation is left out, so the corpus is smaller than the original")

    held_out = set(runs(words(held_out_text())))
    seen, documents, report, contaminated = set(), [], {}, 0
    for name, texts in sources.items():
        size = 0
        for text in texts:
            text = re.sub(r"[ \t]+\n", "\n", text.expandtabs(4).replace("\0", ""))
            if sum(c > "~" for c in text) > 0.02 * len(text):  # another language, or tables of symbols
                continue
            fresh = []
            for paragraph in re.split(r"\n\s*\n", text):
                digest = hashlib.blake2b(" ".join(words(paragraph)).encode(), digest_size=8).digest()
                if digest not in seen and paragraph.strip():
                    fresh.append(paragraph.strip("\n"))
                    seen.add(digest)
            kept = clean(fresh, held_out)
            contaminated += len(fresh) - len(kept)
            document = "\n\n".join(kept).encode()
            if len(document) > 400:
                documents.append(document)
                size += len(document)
        report[name] = size
        print(f"{size / 1e6:7.2f} MB  {name}", flush=True)
    random.Random(SEED).shuffle(documents)
    data = b"\0".join(documents)
    (out / "corpus.bin").write_bytes(data)
    manifest = {"bytes": len(data), "documents": len(documents), "paragraphs_dropped_as_held_out": contaminated}
    manifest |= {"blake2b": hashlib.blake2b(data, digest_size=16).hexdigest(), "bytes_by_source": report}
    (out / "corpus.json").write_text(json.dumps(manifest, indent=1) + "\n")
    print(f"{len(data) / 1e6:7.2f} MB  in {len(documents)} documents, {contaminated} paragraphs dropped as held out")


if __name__ == "__main__":
    main()
