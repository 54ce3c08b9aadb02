"""The machine that a figure comes from: processor, memory, GPU, versions."""

import os
import platform
import shutil
import subprocess
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch


def describe() -> dict:
    """Processor, memory, threads, GPU, versions and date."""
    cpuinfo = Path("/proc/cpuinfo")
    names = (
        [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")] if cpuinfo.exists() else []
    )
    packages = ("cachemoe", "torch", "triton", "transformers", "safetensors", "numpy", "matplotlib")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": names[0].partition(":")[2].strip() if names else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in packages},
        "gpu": describe_gpu() if torch.cuda.is_available() else None,
    }


def describe_gpu() -> dict:
    """The current CUDA device; what only nvidia-smi knows is None without it.

    Raises:
        RuntimeError: without a CUDA device.
    """
    device = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": device.name,
        "capability": f"{device.major}.{device.minor}",
        "memory_bytes": device.total_memory,
        "multiprocessors": device.multi_processor_count,
        "l2_bytes": device.L2_cache_size,
        "cuda": torch.version.cuda,
    } | _nvidia_smi(device.uuid)


def _nvidia_smi(uuid) -> dict[str, str | None]:
    """Driver, clocks and power limit, in nvidia-smi's own words and units."""
    fields = ("driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit")
    if shutil.which("nvidia-smi") is None:
        return dict.fromkeys(fields)
    command = ["nvidia-smi", f"--id=GPU-{uuid}", f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=30)
    if answer.returncode != 0:  # a part of a GPU has a name that this query does not take
        return dict.fromkeys(fields) | {"nvidia_smi": (answer.stdout + answer.stderr).strip()}
    return dict(zip(fields, (value.strip() for value in answer.stdout.split(",")), strict=True))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
