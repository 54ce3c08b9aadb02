"""How much memory the machine, and the group of processes that this one is in, have to give."""

from pathlib import Path


def available_memory(root: Path = Path("/")) -> float:
    """Bytes that can be had without swapping; infinite where the system does not say.

    An allocation that is too large would succeed and the process be killed when it fills it. In a container the
    machine's memory says nothing: the least of that and of what each control group above this process has left.

    Args:
        root: of the file system that ``proc`` and ``sys`` are looked up in.
    """
    fields = _numbers(root / "proc/meminfo")
    left = [fields["MemAvailable:"] * 1024] if "MemAvailable:" in fields else []
    groups = _text(root / "proc/self/cgroup").splitlines()
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            names = ("memory.max", "memory.current", "inactive_file")
            left += _left_in_groups(root / "sys/fs/cgroup", path, *names)
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            left += _left_in_groups(root / "sys/fs/cgroup/memory", path, *names)
    return max(0, min(left, default=float("inf")))


def _left_in_groups(mounted: Path, path: str, limit: str, usage: str, cached: str) -> list[int]:
    """What each group from this one up to the mounted one has left; its page cache that nobody uses can be had too.

    In a container that sees only its own group, the path is not found below, and the mounted one is its own.
    """
    inside = mounted / path.lstrip("/")
    left = []
    for group in (inside, *inside.parents):
        if not group.is_relative_to(mounted):
            break
        most, used = _text(group / limit).strip(), _text(group / usage).strip()
        if most.isdecimal() and used.isdecimal():
            left.append(int(most) - int(used) + _numbers(group / "memory.stat").get(cached, 0))
    return left


def _numbers(file: Path) -> dict[str, int]:
    """The first two words of each line."""
    words = (line.split() for line in _text(file).splitlines())
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}


def _text(file: Path) -> str:
    """What is in a file of the system; nothing where it has no such file."""
    try:
        return file.read_text()
    except OSError:
        return ""
