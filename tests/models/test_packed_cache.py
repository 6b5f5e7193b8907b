"""The packed cache: the bytes of fresh packing or none, whatever happens to files and processes."""

import hashlib
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import random_tensors, tensor_list, tiny_config, write_checkpoint

from latentcore.cli.app import main
from latentcore.config import EngineConfig, ModelConfig
from latentcore.engine.preflight import preflight
from latentcore.errors import UserError
from latentcore.layers.weights import ModelWeights
from latentcore.models import loader, packed_cache
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.loader import load_weights, pack_ahead
from latentcore.models.packed_cache import Pack, entries, pack_of
from latentcore.models.parts import buffers_of_model
from latentcore.models.resolve import resolve
from latentcore.ops import control, runtime, storage
from latentcore.quant.packed import huge_buffer

CONFIG = tiny_config(hidden_size=200, kv_lora_rank=136, vocab_size=3001)


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LATENTCORE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("LATENTCORE_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(packed_cache, "MIN_NBYTES", 0)
    monkeypatch.setattr(packed_cache, "_SPARE_DISK", 0)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    return write_checkpoint(path, CONFIG, random_tensors(tensor_list(CONFIG, "int8")), shards=2)


def load(folder: Path, quantization: str = "auto") -> ModelWeights:
    with Checkpoint.open(folder) as checkpoint:
        plan = resolve(ModelConfig.from_dir(folder), checkpoint, quantization)
        return load_weights(plan, checkpoint, None)


def pack_at(folder: Path, quantization: str = "auto") -> Pack:
    with Checkpoint.open(folder) as checkpoint:
        return pack_of(resolve(ModelConfig.from_dir(folder), checkpoint, quantization), checkpoint)


def contents(weights: ModelWeights) -> dict[str, bytes]:
    found = {}
    for b in buffers_of_model(weights):
        found[b.name] = b.data.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    return found


def no_packing(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on the checkpoint's data may not be read."""
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("the checkpoint was read"))


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize(
    ("fmt", "quantization"),
    [("bf16", "auto"), ("int8", "auto"), ("fp8", "auto"), ("fp8", "w8a8_int8"), ("bf16", "fp8")],
)
def test_second_start_has_the_bytes_of_fresh_packing(
    tmp_path: Path, fmt: str, quantization: str, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    write_checkpoint(folder, CONFIG, random_tensors(tensor_list(CONFIG, fmt)))
    with monkeypatch.context() as off:
        off.setenv("LATENTCORE_CACHE_LIMIT", "0")
        fresh = contents(load(folder, quantization))
        assert entries() == []
    runtime.set_threads(threads)
    try:
        assert contents(load(folder, quantization)) == fresh
        runtime.set_threads(1)
        no_packing(monkeypatch)
        assert contents(load(folder, quantization)) == fresh
    finally:
        runtime.set_threads(1)
    (entry,) = entries()
    assert entry.model == str(folder.resolve())


@pytest.mark.parametrize(
    ("memory", "cached", "direct"),
    [(1 << 50, False, False), (1 << 50, True, False), (0, True, False), (0, False, True)],
)
def test_only_what_fits_nowhere_is_read_past_the_page_cache(
    folder: Path, memory: int, cached: bool, direct: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = contents(load(folder))
    seen: set[bool] = set()
    read = storage.read

    def note(*args: Any, direct: bool) -> int:
        seen.add(direct)
        return read(*args, direct=direct)

    monkeypatch.setattr(packed_cache, "available_memory", lambda: memory)
    monkeypatch.setattr(packed_cache, "resident_share", lambda *_: float(cached))
    monkeypatch.setattr(storage, "read", note)
    no_packing(monkeypatch)
    assert contents(load(folder)) == fresh
    assert seen == {direct}


def test_what_the_page_cache_holds_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(8 << 20))
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
        assert packed_cache.resident_share(stream.fileno(), 8 << 20) in (0.0, 1.0)
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        cold = packed_cache.resident_share(stream.fileno(), 8 << 20)
        if cold == 1.0:
            pytest.skip("this file system has no disk below it")
        assert cold < 0.5
        stream.read()
        assert packed_cache.resident_share(stream.fileno(), 8 << 20) in (0.0, 1.0)


def test_another_file_or_format_finds_another_pack(folder: Path, tmp_path: Path) -> None:
    keys = {pack_at(folder).key, pack_at(folder, "unquant").key}
    shard = next(folder.glob("*.safetensors"))
    stat = shard.stat()
    # A byte in the middle, with the old time put back: the time of the last change tells it.
    with shard.open("r+b") as stream:
        stream.seek(stat.st_size // 2 + 5000)
        byte = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte[0] ^ 1]))
    os.utime(shard, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    keys.add(pack_at(folder).key)
    shutil.copytree(folder, tmp_path / "copy")
    keys.add(pack_at(tmp_path / "copy").key)
    assert len(keys) == 4


def test_changed_checkpoint_is_packed_again_and_its_old_pack_removed(folder: Path) -> None:
    load(folder)
    (before,) = entries()
    write_checkpoint(folder, CONFIG, random_tensors(tensor_list(CONFIG, "int8")), shards=2)
    weights = load(folder)
    (after,) = entries()
    assert before.path != after.path
    with Checkpoint.open(folder) as checkpoint:
        expected = checkpoint.tensor("model.embed_tokens.weight").clone()
    assert torch.equal(weights.embed, expected)


def test_checkpoint_that_changes_while_it_is_packed_is_not_kept(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpoint.open(folder) as checkpoint:
        plan = resolve(ModelConfig.from_dir(folder), checkpoint, "auto")

        def touch(done: int, total: int) -> None:
            os.utime(checkpoint.shards[0], ns=(1, done))

        load_weights(plan, checkpoint, touch)
    assert entries() == []
    assert "changed while it was read" in caplog.text


def cut(data: bytearray) -> None:
    del data[-5000:]


def lengthen(data: bytearray) -> None:
    data += bytes(4096)


def flip(at: Callable[[int], int]) -> Callable[[bytearray], None]:
    def apply(data: bytearray) -> None:
        data[at(len(data))] ^= 0x10

    return apply


def swap(data: bytearray) -> None:
    """Two equal stretches of a buffer change places."""
    middle = len(data) // 2
    data[middle : middle + 64], data[middle + 640 : middle + 704] = (
        data[middle + 640 : middle + 704],
        data[middle : middle + 64],
    )


def empty(data: bytearray) -> None:
    data.clear()


@pytest.mark.parametrize(
    "spoil",
    [
        cut,
        lengthen,
        empty,
        swap,
        flip(lambda n: 3),
        flip(lambda n: 9),
        flip(lambda n: 20),
        flip(lambda n: 300),
        flip(lambda n: n // 2),
        flip(lambda n: n // 5),
    ],
    ids=["cut", "long", "empty", "swap", "magic", "length", "digest", "header", "middle", "fifth"],
)
def test_damage_is_noticed_and_the_pack_made_again(
    folder: Path, spoil: Callable[[bytearray], None], caplog: pytest.LogCaptureFixture
) -> None:
    fresh = contents(load(folder))
    path = pack_at(folder).path
    sound = path.read_bytes()
    data = bytearray(sound)
    spoil(data)
    assert bytes(data) != sound
    path.write_bytes(data)
    assert contents(load(folder)) == fresh
    assert "packed again" in caplog.text
    assert path.read_bytes() == sound


def test_a_pack_under_another_name_is_refused(folder: Path, tmp_path: Path) -> None:
    load(folder)
    other = write_checkpoint(
        tmp_path / "other", CONFIG, random_tensors(tensor_list(CONFIG, "int8")), shards=2
    )
    fresh = contents(load(other))
    shutil.copy(pack_at(folder).path, pack_at(other).path)
    assert contents(load(other)) == fresh


def in_child(work: Callable[[], None]) -> int:
    """A forked process that does some work and exits with 0, or with 1 after an error."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.filterwarnings("ignore:.*fork")
def test_killed_at_twenty_random_points(folder: Path) -> None:
    """Nothing but a sound pack, or none, ever stands under the name."""
    fresh = contents(load(folder))
    path = pack_at(folder).path
    sound = path.read_bytes()
    begun = time.monotonic()
    path.unlink()
    os.waitpid(in_child(lambda: load(folder) and None), 0)
    takes = time.monotonic() - begun
    assert path.read_bytes() == sound
    survived = 0
    for _ in range(20):
        path.unlink(missing_ok=True)
        child = in_child(lambda: load(folder) and None)
        time.sleep(random.uniform(0, takes))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        if path.exists():
            survived += 1
            assert path.read_bytes() == sound
    assert survived < 20
    assert contents(load(folder)) == fresh
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.filterwarnings("ignore:.*fork")
def test_killed_after_each_step_of_the_end(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load(folder)
    path = pack_at(folder).path
    sound = path.read_bytes()
    for name in ("pwrite", "fsync", "replace"):
        path.unlink()
        original = getattr(os, name)

        def dying(*args: object, call: Callable[..., object] = original) -> None:
            call(*args)
            os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            patch.setattr(packed_cache.os, name, dying)
            os.waitpid(in_child(lambda: load(folder) and None), 0)
        assert path.exists() == (name == "replace")
        load(folder)
        assert path.read_bytes() == sound


@pytest.mark.filterwarnings("ignore:.*fork")
def test_two_starts_at_once(folder: Path) -> None:
    with_pack = contents(load(folder))
    path = pack_at(folder).path
    sound = path.read_bytes()
    for _ in range(3):
        path.unlink()

        def start() -> None:
            assert contents(load(folder)) == with_pack

        children = [in_child(start) for _ in range(3)]
        assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]
        assert path.read_bytes() == sound
        assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_too_little_disk_is_said_and_the_model_runs(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(packed_cache.shutil, "disk_usage", lambda _: usage._replace(free=100_000))
    load(folder)
    assert entries() == []
    assert list(packed_cache.packs_dir().iterdir()) == []
    assert "of disk needed in" in caplog.text
    assert "100.0 KB free" in caplog.text


def test_a_disk_that_fills_up_meanwhile(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **kwargs: object) -> int:
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", full)
        load(folder)
    assert caplog.text.count("No space left on device") == 1
    assert list(packed_cache.packs_dir().iterdir()) == []


def test_an_interrupt_while_disk_is_claimed_leaves_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(file: int, nbytes: int) -> None:
        os.truncate(file, nbytes)
        raise KeyboardInterrupt

    monkeypatch.setattr(packed_cache, "_allocate", interrupt)
    with pytest.raises(KeyboardInterrupt):
        load(folder)
    assert list(packed_cache.packs_dir().iterdir()) == []


def test_a_cache_folder_that_cannot_be_written(
    folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    load(folder)
    assert "packed weights are not kept" in caplog.text


def test_the_pack_used_longest_ago_makes_room(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load(folder)
    load(folder, "unquant")
    old, new = pack_at(folder), pack_at(folder, "unquant")
    os.utime(old.path, (1, 1))
    load(folder)  # used again: now the other is the older one
    os.utime(new.path, (2, 2))
    other = write_checkpoint(
        tmp_path / "other", CONFIG, random_tensors(tensor_list(CONFIG, "int8"))
    )
    third = pack_at(other)
    monkeypatch.setenv("LATENTCORE_CACHE_LIMIT", str(old.nbytes + third.nbytes))
    load(other)
    assert [pack.exists() for pack in (old, new, third)] == [True, False, True]
    monkeypatch.setenv("LATENTCORE_CACHE_LIMIT", "100KB")
    third.path.unlink()
    load(other)
    assert [pack.exists() for pack in (old, new, third)] == [True, False, False]


def test_progress_is_of_the_models_bytes(folder: Path) -> None:
    """Also where they are written besides being read."""
    with Checkpoint.open(folder) as checkpoint:
        plan = resolve(ModelConfig.from_dir(folder), checkpoint, "auto")
        for nbytes in (plan.source_nbytes(), plan.packed_nbytes()):  # packed, then read
            seen: list[tuple[int, int]] = []
            load_weights(plan, checkpoint, lambda *found, to=seen: to.append(found))
            assert seen == sorted(seen)
            assert seen[-1] == (nbytes, nbytes)


def test_small_models_are_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed_cache, "MIN_NBYTES", 1 << 40)
    load(folder)
    assert not packed_cache.packs_dir().exists()


def test_pack_ahead_holds_a_layer_at_a_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpoint.open(folder) as checkpoint:
        plan = resolve(ModelConfig.from_dir(folder), checkpoint, "auto")
        seen: list[tuple[int, int]] = []
        pack, before = pack_ahead(plan, checkpoint, lambda *at: seen.append(at))
        assert not before
        assert seen[-1] == (plan.source_nbytes(),) * 2
        assert pack_ahead(plan, checkpoint, None) == (pack, True)
        pack.path.write_bytes(b"x")
        assert pack_ahead(plan, checkpoint, None) == (pack, False)
        monkeypatch.setattr(loader.PackWriter, "open", lambda _: None)
        pack.path.unlink()
        with pytest.raises(UserError, match="could not be kept"):
            pack_ahead(plan, checkpoint, None)


def test_preflight_tells_what_a_start_will_find(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def state() -> str:
        report = preflight(folder, EngineConfig(max_model_len=64, max_num_seqs=2))
        assert report.packed is not None
        return report.packed.line()

    assert state().startswith("to be made: 3.7 MB of disk, ")
    monkeypatch.setenv("LATENTCORE_CACHE_LIMIT", "1MB")
    assert state().startswith("too large: 3.7 MB of disk, ")
    monkeypatch.setenv("LATENTCORE_CACHE_LIMIT", "0")
    assert state() == "not kept"
    monkeypatch.delenv("LATENTCORE_CACHE_LIMIT")
    monkeypatch.setattr(packed_cache, "_SPARE_DISK", 1 << 60)
    assert state().startswith("too little disk: 3.7 MB of disk, ")
    monkeypatch.setattr(packed_cache, "_SPARE_DISK", 0)
    load(folder)
    assert state() == "ready, 3.7 MB"


def test_command_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "ls"]) == 0
    assert capsys.readouterr().out.startswith("0 packed models, 0 bytes, in ")
    assert main(["pack", str(folder), "--threads", "1"]) == 0
    assert capsys.readouterr().out.endswith("made\n")
    assert main(["pack", str(folder), "--threads", "1"]) == 0
    assert capsys.readouterr().out.endswith("was there, and is sound\n")
    assert main(["cache", "ls"]) == 0
    (entry,) = entries()
    shown = capsys.readouterr().out
    assert entry.name in shown
    assert "w8a8_int8" in shown
    assert str(folder) in shown
    assert main(["cache", "rm"]) == 2
    assert main(["cache", "rm", "nothing"]) == 2
    assert main(["cache", "rm", entry.name]) == 0
    assert entries() == []
    load(folder)
    assert main(["cache", "rm", "--all"]) == 0
    assert entries() == []


@pytest.mark.parametrize("nbytes", [1, 4095, 262144, 1_000_003])
@pytest.mark.parametrize("groups", [1, 5])
def test_checksum_is_of_the_bytes_alone(tmp_path: Path, nbytes: int, groups: int) -> None:
    memory = huge_buffer(nbytes)
    memory.copy_(torch.randint(0, 256, (nbytes,), dtype=torch.uint8))
    with (tmp_path / "file").open("w+b") as stream:
        sums = set()
        for threads in (1, 2, 5):
            runtime.set_threads(threads)
            each = min(groups, nbytes)
            sums.add(storage.write(memory, each, stream.fileno(), 0, direct=False))
            back = huge_buffer(nbytes)
            sums.add(storage.read(back, 1, stream.fileno(), 0, direct=False))
            assert torch.equal(memory, back)
        runtime.set_threads(1)
        assert len(sums) == 1
        for _ in range(20):
            changed = memory.clone()
            at = random.randrange(nbytes)
            changed[at] ^= 1 << random.randrange(8)
            back.copy_(changed)
            assert storage.write(back, 1, stream.fileno(), 0, direct=False) not in sums
        stream.truncate(nbytes - 1)
        with pytest.raises(OSError, match="ends too soon"):
            storage.read(back, 1, stream.fileno(), 0, direct=False)


GOLDEN = {
    "bf16 auto 1 1": "ae06ca994eca26e1",
    "int8 auto 1 1": "b3a16a10a9533961",
    "fp8 auto 1 1": "66f856471bb2c5c3",
    "fp8 w8a8_int8 1 1": "a25279f45eb90b42",
}


def pattern(t: torch.Tensor) -> torch.Tensor:
    """The same numbers on every machine, exact in every dtype; scales and norms above zero."""
    steps = torch.arange(t.numel()) * 7919 % 241
    if t.element_size() == 1:
        codes = (steps % 120).to(torch.uint8)
        return codes.view(t.dtype).view(t.shape)
    return ((steps + 1).float() / 64).to(t.dtype).view(t.shape)


@pytest.mark.parametrize("version", GOLDEN)
def test_bytes_change_only_with_the_version(tmp_path: Path, version: str) -> None:
    """If this fails, the layout or the loading has changed: raise kPackVersion (or the cache's
    content version), or packs on disk would be read as what they are not."""
    fmt, quantization, *versions = version.split()
    tensors = random_tensors(tensor_list(CONFIG, fmt))
    write_checkpoint(tmp_path, CONFIG, {name: pattern(t) for name, t in tensors.items()})
    digest = hashlib.sha256()
    for data in contents(load(tmp_path, quantization)).values():
        digest.update(data)
    assert digest.hexdigest()[:16] == GOLDEN[version]
    assert versions == [str(packed_cache._CONTENT_VERSION), str(control.pack_version())]
