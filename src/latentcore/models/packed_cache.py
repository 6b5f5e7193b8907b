"""Packed weights on disk, so that the next start reads them instead of packing again.

A pack is one file in the cache folder. Its name is a digest of everything that decides its bytes:
the checkpoint's fingerprint, where each tensor goes, the formats, and the version of the layout.
Thus another checkpoint, another `--quantization` or another version never finds it. A pack appears
under its name only when it is complete and on disk (written beside it, fsync, rename), and every
buffer has a checksum that is compared as it is read.

    [0, 8)     magic
    [8, 12)    length of the header in bytes
    [12, 44)   SHA-256 of the header
    [44, ...)  header, JSON: what it is, and name, offset, bytes and checksum of each buffer
    buffers, each at a multiple of 4,096
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentcore import envs
from latentcore.files import JsonError, parse_json_object
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.memory import available_memory, format_bytes
from latentcore.models.parts import Meta, Part, buffers_of, parts_of
from latentcore.models.resolve import ModelPlan
from latentcore.ops import control, storage

logger = logging.getLogger(__name__)

MIN_NBYTES = 512 << 20
"""Smaller models are not kept: packing them again takes less than a second."""

_CONTENT_VERSION = 1
"""Raise it whenever loading turns the same checkpoint into other bytes than before."""

_MAGIC = b"LCPACK01"
_PREFIX = len(_MAGIC) + 4 + 32
_MAX_HEADER = 64 << 20
_SUFFIX = ".pack"
_UNFINISHED = ".unfinished"
_SPARE_DISK = 1 << 30
"""Bytes of the disk that are left to others."""
_RESIDENT_SAMPLES = 256


class DamagedPackError(Exception):
    """A pack is cut off, corrupt or cannot be read."""


@dataclass(frozen=True)
class Slot:
    """The place of one buffer in a pack."""

    offset: int
    nbytes: int
    groups: int


@dataclass(frozen=True)
class Pack:
    """The pack of one checkpoint, run in one way, whether it is there or not.

    key          digest of all that decides its bytes
    model        the checkpoint's folder
    fingerprint  the checkpoint's, when it was looked at
    schemes      how its weights are stored and run, for people
    slots        by the buffers' names
    nbytes       of the whole file
    """

    key: str
    path: Path
    model: Path
    fingerprint: str
    schemes: str
    slots: dict[str, Slot]
    data_start: int
    nbytes: int

    def exists(self) -> bool:
        """Whether it is there. Whether it is sound shows as it is read."""
        return self.path.is_file()


def pack_of(plan: ModelPlan, checkpoint: Checkpoint) -> Pack:
    """Where the pack of this plan is, or would be."""
    buffers = [b for name, part in parts_of(plan, Meta()) for b in buffers_of(name, part)]
    fingerprint = checkpoint.fingerprint()
    digest = hashlib.sha256()
    for text in (
        f"latentcore pack {_CONTENT_VERSION} {control.pack_version()}",
        fingerprint,
        *(f"{b.name} {b.data.nbytes} {b.groups}" for b in buffers),
        *(
            f"{matrix.name} {matrix.format} {matrix.batch} {matrix.parts} {matrix.rows} "
            f"{matrix.cols} {piece.scheme.name} {matrix.scheme.name} {piece.name}"
            for matrix in plan.matrices()
            for piece in matrix.pieces
        ),
        *(f"{plain.info.name} {plain.info.dtype}" for plain in plan.plains()),
    ):
        digest.update(text.encode() + b"\n")
    key = digest.hexdigest()[:32]
    # The header's length must be known before the checksums are: each takes 16 digits.
    room = _up(_PREFIX + 4096 + sum(len(json.dumps(b.name)) + 64 for b in buffers))
    slots: dict[str, Slot] = {}
    offset = room
    for b in buffers:
        slots[b.name] = Slot(offset, b.data.nbytes, b.groups)
        offset = _up(offset + b.data.nbytes)
    schemes = sorted({text for i in range(len(plan.layers)) for text in plan.schemes(i).values()})
    path = packs_dir() / f"{key}{_SUFFIX}"
    model = checkpoint.path.resolve()
    return Pack(key, path, model, fingerprint, ", ".join(schemes), slots, room, offset)


def packs_dir() -> Path:
    """The folder of all packs."""
    return envs.cache_dir() / "packed"


def keeps(plan: ModelPlan) -> bool:
    """Whether packs of this model are kept: it is large enough, and the cache is not turned off."""
    return plan.packed_nbytes() >= MIN_NBYTES and envs.cache_limit() != 0


@dataclass(frozen=True)
class PackState:
    """What a start will find: for `preflight`.

    state   `ready`, `to be made`, `too little disk`, `too large` (for LATENTCORE_CACHE_LIMIT) or
            `not kept` (a small model, or the cache is turned off)
    nbytes  of the file
    free    bytes of the disk
    """

    state: str
    nbytes: int
    free: int

    def line(self) -> str:
        """One line for people."""
        if self.state == "not kept":
            return "not kept"
        if self.state == "ready":
            return f"ready, {format_bytes(self.nbytes)}"
        sizes = f"{format_bytes(self.nbytes)} of disk, {format_bytes(self.free)} free"
        return f"{self.state}: {sizes}"


def pack_state(plan: ModelPlan, checkpoint: Checkpoint) -> PackState:
    """Whether the packed weights are there, or what keeping them takes."""
    folder = packs_dir()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if not keeps(plan):
        return PackState("not kept", 0, free)
    pack = pack_of(plan, checkpoint)
    limit = envs.cache_limit()
    if pack.exists():
        state = "ready"
    elif limit is not None and pack.nbytes > limit:
        state = "too large"
    else:
        state = "to be made" if free >= pack.nbytes + _SPARE_DISK else "too little disk"
    return PackState(state, pack.nbytes, free)


# ---------------------------------------------------------------------------------------------
# Reading

Progress = Callable[[int], None]
"""Called with the bytes of each buffer, when it has been moved."""


class PackReader:
    """An open pack whose header is sound. Use it as a context manager."""

    def __init__(self, pack: Pack) -> None:
        """Raises DamagedPackError where the file is not what its name and header promise."""
        self._pack = pack
        self._stack = contextlib.ExitStack()
        # Beside the weights themselves the page cache would need as much again.
        self._tight = 2 * pack.nbytes > available_memory()
        with self._damage():
            self._checksums = _read_header(pack)
            self._file = file = os.open(pack.path, os.O_RDONLY)
            self._stack.callback(os.close, file)
            self._direct = (
                self._tight and resident_share(file, pack.nbytes) < 0.5 and _set_direct(file)
            )
            if not self._direct:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            with contextlib.suppress(OSError):
                os.utime(pack.path)  # when it was used last

    def read(self, name: str, part: Part, progress: Progress) -> None:
        """Fills a part. Raises DamagedPackError where its bytes are not those that were written."""
        for buffer in buffers_of(name, part):
            slot = self._pack.slots[buffer.name]
            with self._damage():
                found = storage.read(
                    buffer.data, slot.groups, self._file, slot.offset, direct=self._direct
                )
            if found != self._checksums[buffer.name]:
                raise DamagedPackError(f"{buffer.name}: its checksum is another")
            if self._tight and not self._direct:
                # Room for the next buffers: else the system takes pages that are still to be read.
                os.posix_fadvise(self._file, slot.offset, slot.nbytes, os.POSIX_FADV_DONTNEED)
            progress(slot.nbytes)

    def __enter__(self) -> "PackReader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _damage(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._stack.close()
            raise DamagedPackError(error.strerror or str(error)) from None
        except DamagedPackError:
            self._stack.close()
            raise


def resident_share(file: int, nbytes: int) -> float:
    """The share of an open file that the page cache holds, from single bytes all over it; 0 where
    the system would not tell without reading."""
    found = 0
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # asking must not read ahead
    for sample in range(_RESIDENT_SAMPLES):
        try:
            offset = (nbytes - 1) * sample // (_RESIDENT_SAMPLES - 1)
            found += os.preadv(file, [bytearray(1)], offset, os.RWF_NOWAIT)
        except BlockingIOError:
            continue
        except OSError:
            return 0.0
    return found / _RESIDENT_SAMPLES


def _set_direct(file: int) -> bool:
    """Lets an open file be read past the page cache. False where its file system cannot."""
    try:
        fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        return False
    return True


def _read_header(pack: Pack) -> dict[str, int]:
    """The checksums by the buffers' names, once all else is found to be as expected."""
    header = read_header(pack.path)
    size = pack.path.stat().st_size
    if size != pack.nbytes:
        raise DamagedPackError(f"expected {pack.nbytes} bytes, found {size}")
    slots: dict[str, tuple[int, int]] = {}
    checksums: dict[str, int] = {}
    try:
        for name, offset, nbytes, checksum in header["buffers"]:
            slots[name] = (offset, nbytes)
            checksums[name] = _signed(int(checksum, 16))
    except (KeyError, TypeError, ValueError):
        raise DamagedPackError("its header makes no sense") from None
    expected = {name: (slot.offset, slot.nbytes) for name, slot in pack.slots.items()}
    if header.get("key") != pack.key or slots != expected:
        raise DamagedPackError("it holds other weights than its name says")
    return checksums


def read_header(path: Path) -> dict[str, Any]:
    """The header of any pack. Raises DamagedPackError, or OSError as it comes."""
    with path.open("rb") as stream:
        prefix = stream.read(_PREFIX)
        length = int.from_bytes(prefix[8:12], "little")
        if prefix[:8] != _MAGIC or length > _MAX_HEADER:
            raise DamagedPackError("not a pack of this version of latentcore")
        text = stream.read(length)
    if hashlib.sha256(text).digest() != prefix[12:]:
        raise DamagedPackError("its header is damaged")
    try:
        return parse_json_object(text)
    except JsonError as error:
        raise DamagedPackError(f"its header is damaged: {error}") from None


# ---------------------------------------------------------------------------------------------
# Writing


class PackWriter:
    """Writes a pack part by part. Nothing stands under the pack's name before `finish`.

    Use it as a context manager. An error while writing (a full disk) is logged once, and from then
    on nothing is written: a model runs without its pack.
    """

    def __init__(self, pack: Pack, file: int, temporary: Path) -> None:
        self._pack = pack
        self._file: int | None = file
        self._temporary = temporary
        self._checksums: dict[str, int] = {}

    @classmethod
    def open(cls, pack: Pack) -> "PackWriter | None":
        """Begins a pack. None, with a line in the log that says why, where it cannot be written:
        too little disk, another process that writes it, a folder that is not ours."""
        folder = pack.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(folder)
            temporary = folder / f"{pack.key}{_UNFINISHED}"
            file = _lock(temporary)
            if file is None:
                logger.info("another process is writing the packed cache of %s", pack.model)
                return None
            try:
                os.ftruncate(file, 0)
                why = _make_room(pack)
                if why is None:
                    # Claims the disk now, so that a full one is noticed before the work.
                    _allocate(file, pack.nbytes)
            except BaseException:
                temporary.unlink(missing_ok=True)
                os.close(file)
                raise
            if why is not None:
                logger.warning("%s", why)
                temporary.unlink(missing_ok=True)
                os.close(file)
                return None
            return cls(pack, file, temporary)
        except OSError as error:
            logger.warning(
                "packed weights are not kept: %s: %s", folder, error.strerror or str(error)
            )
            return None

    def write(self, name: str, part: Part, progress: Progress) -> None:
        """Writes a part whose memory is complete."""
        for buffer in buffers_of(name, part):
            slot = self._pack.slots[buffer.name]
            if self._file is not None:
                try:
                    self._checksums[buffer.name] = storage.write(
                        buffer.data, slot.groups, self._file, slot.offset, direct=False
                    )
                    self._let_go(slot)
                except OSError as error:
                    self._give_up(error)
            progress(slot.nbytes)

    def finish(self, checkpoint: Checkpoint) -> bool:
        """Puts the pack under its name, once all of it is on disk. False where that failed, or
        where the checkpoint has changed since the pack's fingerprint was taken."""
        if self._file is None:
            return False
        try:
            if checkpoint.fingerprint() != self._pack.fingerprint:
                logger.warning("the checkpoint changed while it was read: its pack is not kept")
                return False
            os.pwrite(self._file, self._header(), 0)
            os.fsync(self._file)
            os.replace(self._temporary, self._pack.path)
            _sync_folder(self._pack.path.parent)
        except OSError as error:
            self._give_up(error)
            return False
        _remove_superseded(self._pack)
        return True

    def __enter__(self) -> "PackWriter":
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            # Unlinked while it is locked: whoever waits for the lock finds another file, or none.
            if _is_at(self._file, self._temporary):
                self._temporary.unlink(missing_ok=True)
            os.close(self._file)
            self._file = None

    def _let_go(self, slot: Slot) -> None:
        """Takes written pages out of the page cache where memory is short."""
        if self._file is not None and 2 * self._pack.nbytes > available_memory():
            os.fdatasync(self._file)
            os.posix_fadvise(self._file, slot.offset, slot.nbytes, os.POSIX_FADV_DONTNEED)

    def _header(self) -> bytes:
        pack = self._pack
        text = json.dumps(
            {
                "key": pack.key,
                "model": str(pack.model),
                "schemes": pack.schemes,
                "buffers": [
                    [name, slot.offset, slot.nbytes, f"{self._checksums[name] % 2**64:016x}"]
                    for name, slot in pack.slots.items()
                ],
            }
        ).encode()
        data = _MAGIC + len(text).to_bytes(4, "little") + hashlib.sha256(text).digest() + text
        if len(data) > pack.data_start:
            raise AssertionError("the header is longer than the room that was left for it")
        return data

    def _give_up(self, error: OSError) -> None:
        logger.warning("packed weights are not kept: %s", error.strerror or str(error))
        self.__exit__()


def _lock(path: Path) -> int | None:
    """Opens a file that one process writes at a time, or None where another does."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return None
        except BaseException:
            os.close(file)
            raise
        # Between the two calls it may have become the finished pack, or been removed.
        if _is_at(file, path):
            return file
        os.close(file)


def _is_at(file: int, path: Path) -> bool:
    try:
        here, there = os.fstat(file), path.stat()
    except FileNotFoundError:
        return False
    return (here.st_dev, here.st_ino) == (there.st_dev, there.st_ino)


def _allocate(file: int, nbytes: int) -> None:
    try:
        os.posix_fallocate(file, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
        os.ftruncate(file, nbytes)


def _make_room(pack: Pack) -> str | None:
    """Removes the packs used longest ago until the size limit allows this one, then looks for disk.

    Returns why the pack cannot be kept, or None.
    """
    limit = envs.cache_limit()
    if limit is not None:
        if pack.nbytes > limit:
            return (
                f"packed weights are not kept: they take {format_bytes(pack.nbytes)}, "
                f"LATENTCORE_CACHE_LIMIT allows {format_bytes(limit)}"
            )
        others = [entry for entry in entries() if entry.path != pack.path]
        total = sum(entry.nbytes for entry in others)
        for entry in sorted(others, key=lambda entry: entry.used):
            if total + pack.nbytes <= limit:
                break
            logger.info("the packed cache of %s makes room for another", entry.model)
            entry.path.unlink(missing_ok=True)
            total -= entry.nbytes
    free = shutil.disk_usage(pack.path.parent).free
    if free < pack.nbytes + _SPARE_DISK:
        return (
            f"packed weights are not kept: {format_bytes(pack.nbytes + _SPARE_DISK)} of disk "
            f"needed in {pack.path.parent}, {format_bytes(free)} free; make room there "
            f"(latentcore cache ls, latentcore cache rm) or set LATENTCORE_CACHE to another disk"
        )
    return None


def _remove_unfinished(folder: Path) -> None:
    """Removes what killed processes left."""
    for path in folder.glob(f"*{_UNFINISHED}"):
        with contextlib.suppress(OSError):
            file = _lock(path)
            if file is not None:
                path.unlink(missing_ok=True)
                os.close(file)


def _remove_superseded(pack: Pack) -> None:
    """Removes packs of the same folder in the same formats: the checkpoint is not that any more."""
    for entry in entries():
        if (entry.model, entry.schemes) == (str(pack.model), pack.schemes) and (
            entry.path != pack.path
        ):
            entry.path.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


# ---------------------------------------------------------------------------------------------
# All packs


@dataclass(frozen=True)
class Entry:
    """A pack in the cache folder. `used`: when last, in seconds since 1970. `model` and `schemes`
    are empty where its header is damaged."""

    path: Path
    model: str
    schemes: str
    nbytes: int
    used: float

    @property
    def name(self) -> str:
        """What `cache rm` calls it."""
        return self.path.stem[:12]


def entries() -> list[Entry]:
    """All packs, the one used last in front."""
    found: list[Entry] = []
    folder = packs_dir()
    for path in folder.glob(f"*{_SUFFIX}") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            stat = path.stat()
            try:
                header = read_header(path)
            except DamagedPackError:
                header = {}
            model, schemes = str(header.get("model", "")), str(header.get("schemes", ""))
            found.append(Entry(path, model, schemes, stat.st_size, stat.st_mtime))
    return sorted(found, key=lambda entry: -entry.used)


def _up(value: int) -> int:
    return -(-value // storage.ALIGN) * storage.ALIGN


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
