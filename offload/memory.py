"""How much memory the machine has to give."""

from pathlib import Path


def available_memory() -> float:
    """Bytes that can be had without swapping; infinite where the system does not say.

    An allocation that is too large would succeed and the process be killed when it fills it.
    """
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return float("inf")
    (line,) = (line for line in meminfo.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024
