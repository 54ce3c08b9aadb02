"""The machine's description."""

import pytest
import torch

from cachemoe.moe import machine


def test_a_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.describe()["gpu"] is None


def test_without_nvidia_smi_the_driver_is_unknown(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    assert set(machine._nvidia_smi("").values()) == {None}


def test_nvidia_smis_refusal_is_kept(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'No devices were found'; exit 6\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine._nvidia_smi("0")
    assert found["nvidia_smi"] == "No devices were found"
    assert found["driver_version"] is None


def test_nvidia_smis_answer_is_read(monkeypatch, tmp_path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho '580.1, 1980 MHz, 2619 MHz, 1980 MHz, 2619 MHz, 700.00 W'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    found = machine._nvidia_smi("0")
    assert (found["driver_version"], found["clocks.mem"], found["power.limit"]) == ("580.1", "2619 MHz", "700.00 W")


@pytest.mark.gpu
@pytest.mark.gpu_only("its driver")
def test_the_gpu_is_described():
    gpu = machine.describe()["gpu"]
    assert gpu["name"] == torch.cuda.get_device_name()
    assert gpu["l2_bytes"] > 0
    assert gpu["driver_version"]
