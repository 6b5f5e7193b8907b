"""The kept read bandwidth: the most that was measured, by machine and number of threads."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from latentcore.engine import bandwidth
from latentcore.ops import runtime


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """What the next measurements will find."""
    found: list[float] = []
    monkeypatch.setenv("LATENTCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(runtime, "read_bandwidth", lambda _seconds, _most: found.pop(0))
    yield found
    runtime.set_threads(1)


def test_is_measured_once_for_each_number_of_threads(measured: list[float]) -> None:
    measured += [20e9, 40e9]
    runtime.set_threads(1)
    assert [bandwidth.machine_read_bandwidth() for _ in range(2)] == [20e9, 20e9]
    runtime.set_threads(2)
    assert [bandwidth.machine_read_bandwidth() for _ in range(2)] == [40e9, 40e9]
    runtime.set_threads(1)
    assert bandwidth.machine_read_bandwidth() == 20e9
    assert measured == []


def test_the_most_is_kept(measured: list[float]) -> None:
    """A busy moment at first does no lasting harm; one later does none at all."""
    measured.append(11e9)
    assert bandwidth.machine_read_bandwidth() == 11e9
    assert bandwidth.keep_read_bandwidth(30e9) == 30e9
    assert bandwidth.keep_read_bandwidth(17e9) == 30e9
    assert bandwidth.machine_read_bandwidth() == 30e9


@pytest.mark.parametrize("text", ["", "[1]", "{", "null"])
def test_a_damaged_file_is_measured_over(text: str, measured: list[float], tmp_path: Path) -> None:
    path = tmp_path / "cache" / "bandwidth.json"
    path.parent.mkdir()
    path.write_text(text)
    measured.append(25e9)
    assert bandwidth.machine_read_bandwidth() == 25e9
    assert list(json.loads(path.read_text()).values()) == [25e9]


@pytest.mark.parametrize("value", [0, -1.0, "fast", None])
def test_a_kept_value_that_is_no_bandwidth_is_measured_over(
    value: object, measured: list[float], tmp_path: Path
) -> None:
    measured += [9e9, 25e9]
    bandwidth.machine_read_bandwidth()
    path = tmp_path / "cache" / "bandwidth.json"
    path.write_text(json.dumps(dict.fromkeys(json.loads(path.read_text()), value)))
    assert bandwidth.machine_read_bandwidth() == 25e9


def test_a_cache_folder_that_cannot_be_written_is_no_error(
    measured: list[float], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file stands here")
    measured += [20e9, 30e9]
    assert bandwidth.machine_read_bandwidth() == 20e9
    assert bandwidth.machine_read_bandwidth() == 30e9
