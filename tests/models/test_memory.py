"""What counts as available memory, on made-up /proc and /sys/fs/cgroup trees."""

from pathlib import Path

import pytest

from latentcore.errors import InsufficientMemoryError
from latentcore.models.memory import available_memory, format_bytes, require_memory

GIB = 1 << 30


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def machine(tmp_path: Path) -> tuple[Path, Path]:
    proc, cgroup = tmp_path / "proc", tmp_path / "cgroup"
    _write(proc / "meminfo", f"MemTotal: {64 << 20} kB\nMemAvailable: {40 << 20} kB\n")
    cgroup.mkdir()
    return proc, cgroup


def test_machine_without_control_groups(machine: tuple[Path, Path]) -> None:
    assert available_memory(*machine) == 40 * GIB


def test_old_kernel_without_an_estimate(machine: tuple[Path, Path]) -> None:
    _write(machine[0] / "meminfo", f"MemTotal: {64 << 20} kB\nMemFree: {3 << 20} kB\n")
    assert available_memory(*machine) == 3 * GIB


def test_tightest_enclosing_group_counts(machine: tuple[Path, Path]) -> None:
    proc, cgroup = machine
    _write(proc / "self" / "cgroup", "0::/outer/inner\n")
    inner, outer = cgroup / "outer" / "inner", cgroup / "outer"
    _write(inner / "memory.max", "max\n")
    _write(inner / "memory.current", f"{GIB}\n")
    _write(outer / "memory.max", f"{16 * GIB}\n")
    _write(outer / "memory.current", f"{10 * GIB}\n")
    assert available_memory(*machine) == 6 * GIB
    _write(outer / "memory.stat", f"anon 5\ninactive_file {2 * GIB}\nactive_file {GIB}\nx y\n")
    assert available_memory(*machine) == 9 * GIB
    _write(inner / "memory.max", f"{3 * GIB}\n")
    assert available_memory(*machine) == 2 * GIB


def test_group_mounted_as_root_in_a_container(machine: tuple[Path, Path]) -> None:
    proc, cgroup = machine
    _write(proc / "self" / "cgroup", "0::/docker/0123\n")
    _write(cgroup / "memory.max", f"{8 * GIB}")
    _write(cgroup / "memory.current", f"{3 * GIB}")
    assert available_memory(*machine) == 5 * GIB


def test_first_version_of_control_groups(machine: tuple[Path, Path]) -> None:
    proc, cgroup = machine
    _write(proc / "self" / "cgroup", "11:cpu,cpuacct:/a\n4:memory:/a\n1:name=systemd:/a\n0::/\n")
    group = cgroup / "memory" / "a"
    _write(group / "memory.limit_in_bytes", f"{4 * GIB}")
    _write(group / "memory.usage_in_bytes", f"{GIB}")
    _write(cgroup / "memory" / "memory.limit_in_bytes", "9223372036854771712")
    _write(cgroup / "memory" / "memory.usage_in_bytes", f"{GIB}")
    assert available_memory(*machine) == 3 * GIB


def test_overdrawn_group_leaves_nothing(machine: tuple[Path, Path]) -> None:
    proc, cgroup = machine
    _write(proc / "self" / "cgroup", "0::/\n")
    _write(cgroup / "memory.max", f"{GIB}")
    _write(cgroup / "memory.current", f"{2 * GIB}")
    assert available_memory(*machine) == 0


def test_this_machine_has_some_and_not_everything() -> None:
    assert 1 << 20 < available_memory() < 1 << 50
    require_memory(1 << 20, "a test")
    with pytest.raises(InsufficientMemoryError) as caught:
        require_memory(1 << 50, "the model's weights")
    assert "not enough memory for the model's weights: needed 1125.9 TB, available" in str(
        caught.value
    )


def test_sizes_as_people_read_them() -> None:
    assert format_bytes(999) == "999 bytes"
    assert format_bytes(1000) == "1.0 KB"
    assert format_bytes(674.01e9) == "674.0 GB"
    assert format_bytes(1.3441e12) == "1.3 TB"
