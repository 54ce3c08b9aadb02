"""Available memory: the machine's, and what control groups of both versions leave."""

import pytest

from cachemoe.offload.memory import available_memory

GIB = 2**30


@pytest.fixture
def system(tmp_path):
    """A function that makes a file of the system."""

    def make(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    make("proc/meminfo", f"MemTotal: {9 * GIB // 1024} kB\nMemAvailable: {8 * GIB // 1024} kB\nHugePages: 0\n")
    return make


def test_the_machines(system, tmp_path):
    assert available_memory(tmp_path) == 8 * GIB


def test_a_system_that_does_not_say(tmp_path):
    assert available_memory(tmp_path) == float("inf")


@pytest.mark.parametrize("inside", ["/", "/user/one", "/elsewhere/that/is/not/mounted"])
def test_a_groups_limit_less_what_it_uses_and_cannot_give_back(system, tmp_path, inside):
    system("proc/self/cgroup", f"0::{inside}\n")
    system("sys/fs/cgroup/memory.max", f"{4 * GIB}\n")
    system("sys/fs/cgroup/memory.current", f"{3 * GIB}\n")
    system("sys/fs/cgroup/memory.stat", f"anon 5\ninactive_file {GIB}\n")
    assert available_memory(tmp_path) == 2 * GIB


def test_the_tightest_of_all_groups_above(system, tmp_path):
    system("proc/self/cgroup", "0::/a/b\n")
    for group, most in (("a", 1), ("a/b", 2)):
        system(f"sys/fs/cgroup/{group}/memory.max", f"{most * GIB}")
        system(f"sys/fs/cgroup/{group}/memory.current", "0")
    system("sys/fs/cgroup/memory.max", "max")
    assert available_memory(tmp_path) == GIB


def test_version_1(system, tmp_path):
    system("proc/self/cgroup", "11:cpu,cpuacct:/x\n4:memory:/docker/1\n0::/y\n")
    system("sys/fs/cgroup/memory/memory.limit_in_bytes", f"{3 * GIB}")
    system("sys/fs/cgroup/memory/memory.usage_in_bytes", f"{2 * GIB}")
    system("sys/fs/cgroup/memory/memory.stat", f"inactive_file 7\ntotal_inactive_file {GIB // 2}\n")
    assert available_memory(tmp_path) == 1.5 * GIB


def test_a_group_that_is_full_has_nothing(system, tmp_path):
    system("proc/self/cgroup", "0::/\n")
    system("sys/fs/cgroup/memory.max", "100")
    system("sys/fs/cgroup/memory.current", "200")
    assert available_memory(tmp_path) == 0
