"""Memory as such: moved from and to files by the threads that own it, and where it lies."""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from latentcore.ops.native import flag, op

_read_memory = op("read_memory")
_write_memory = op("write_memory")
_touch_memory = op("touch_memory")
_memory_placement = op("memory_placement")

_ENDED = -1

ALIGN = 4096
"""Addresses, and offsets in files that are read or written directly, are multiples of this."""


@dataclass(frozen=True)
class Placement:
    """Where memory lies, from one page of every 256 KiB.

    pages    looked at and there
    unknown  not there, or the system would not tell
    own      in the memory node of the thread that owns them
    """

    pages: int = 0
    unknown: int = 0
    own: int = 0

    def line(self) -> str:
        """One line for people."""
        if self.pages == 0:
            return "the system does not tell where memory lies"
        return f"{self.own / self.pages:.1%} of the pages looked at lie with their threads"

    def __add__(self, other: "Placement") -> "Placement":
        return Placement(
            self.pages + other.pages, self.unknown + other.unknown, self.own + other.own
        )


def read_memory(
    dst: torch.Tensor, groups: int, file: int, offset: int, direct: bool, result: torch.Tensor
) -> None:
    """Fills `dst` (uint8 [n]) from an open file; each thread reads what it owns.

    `dst` is made of `groups` equal pieces, each owned by all threads. `direct` says that the file
    was opened with O_DIRECT: address and offset are then multiples of ALIGN, and the memory goes on
    to the next multiple behind its end. `result`, int64 [2], becomes a checksum of the bytes, and
    0, an errno, or -1 where the file ends too soon.
    """
    _read_memory(dst, groups, file, offset, flag("read_memory", "direct", direct), result)


def write_memory(
    src: torch.Tensor, groups: int, file: int, offset: int, direct: bool, result: torch.Tensor
) -> None:
    """Writes `src` (uint8 [n]) to an open file, otherwise as `read_memory`."""
    _write_memory(src, groups, file, offset, flag("write_memory", "direct", direct), result)


def touch_memory(dst: torch.Tensor, groups: int) -> None:
    """Makes fresh memory (uint8 [n]) lie with the threads that own it; bytes stay."""
    _touch_memory(dst, groups)


def memory_placement(memory: torch.Tensor, groups: int, counts: torch.Tensor) -> None:
    """Where memory (uint8 [n]) lies, beside the threads that own it as the team is now: `counts`,
    int64 [3], becomes the numbers of a Placement."""
    _memory_placement(memory, groups, counts)


Move = Callable[[torch.Tensor, int, int, int, bool, torch.Tensor], None]


def read(dst: torch.Tensor, groups: int, file: int, offset: int, *, direct: bool) -> int:
    """`read_memory` into a contiguous tensor of any dtype and shape. Returns the checksum; raises
    OSError where the file cannot be read or ends too soon."""
    return _moved(read_memory, dst, groups, file, offset, direct)


def write(src: torch.Tensor, groups: int, file: int, offset: int, *, direct: bool) -> int:
    """`write_memory` of a contiguous tensor of any dtype and shape, otherwise as `read`."""
    return _moved(write_memory, src, groups, file, offset, direct)


def touch(dst: torch.Tensor, groups: int) -> None:
    """`touch_memory` of a contiguous tensor of any dtype and shape."""
    touch_memory(_bytes(dst), groups)


def placement(memory: torch.Tensor, groups: int) -> Placement:
    """`memory_placement` of a contiguous tensor of any dtype and shape."""
    counts = torch.empty(3, dtype=torch.int64)
    memory_placement(_bytes(memory), groups, counts)
    return Placement(*counts.tolist())


def _moved(
    move: Move, memory: torch.Tensor, groups: int, file: int, offset: int, direct: bool
) -> int:
    result = torch.empty(2, dtype=torch.int64)
    move(_bytes(memory), groups, file, offset, direct, result)
    checksum, error = result.tolist()
    if error == _ENDED:
        raise OSError("the file ends too soon")
    if error:
        raise OSError(error, os.strerror(error))
    return int(checksum)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory as uint8 [n]."""
    return tensor.view(-1).view(torch.uint8)
