"""What several tests of models share."""

from contextlib import contextmanager

import pytest
import torch


@contextmanager
def silent(description, total):
    yield lambda: None


@pytest.fixture(scope="session")
def quiet():
    """A progress that shows nothing."""
    return silent


@pytest.fixture(scope="session")
def tiny_windows():
    """``[3, 24]`` random bytes."""
    return torch.randint(0, 256, (3, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tiny_calibration(tiny_checkpoint, tiny_windows, stores, tmp_path_factory):
    """The file of a calibration of ``tiny_checkpoint``, made on ``tiny_windows``."""
    from tiny_models import calibration_of_model

    from cachemoe.moe.checkpoint import Checkpoint
    from cachemoe.moe.fingerprint import fingerprint
    from cachemoe.moe.models import load_model

    source, model = Checkpoint(tiny_checkpoint), load_model(tiny_checkpoint, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CACHEMOE_CACHE", str(stores))
        made = calibration_of_model(model, source, tiny_windows, fingerprint(source, silent), "tiny")
    path = tmp_path_factory.mktemp("calibration") / "tiny.safetensors"
    made.save(path)
    return path


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """(name of ``MODELS``, dtype) -> the folder of a random model, made when first asked for."""
    from tiny_models import save_random

    made = {}

    def folder(name, dtype=torch.float32):
        if (name, dtype) not in made:
            made[name, dtype] = tmp_path_factory.mktemp("random") / "model"
            save_random(name, made[name, dtype], dtype)
        return made[name, dtype]

    return folder


@pytest.fixture(scope="session")
def stores(tmp_path_factory):
    """A cache directory, whose stores need not be packed again."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def opened(stores, tiny_checkpoint, quiet, monkeypatch):
    """``load`` of a model, ``tiny_checkpoint`` if none is said; closed after the test."""
    from cachemoe.moe.load import load

    monkeypatch.setenv("CACHEMOE_CACHE", str(stores))
    models = []

    def opened(path=tiny_checkpoint, **options):
        models.append(load(path, **{"pool": 4, "device": "cpu", "progress": quiet} | options)[0])
        return models[-1]

    yield opened
    for model in models:
        model.cachemoe.close()
