"""One wrong argument, on every op: always an error that names op, argument, expected and found, the
same for fake tensors of static shape, with nothing written. Never a crash."""

import errno
import logging
import math
import mmap
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from latentcore.ops import dense, mla
from latentcore.quant.packed import Format, PackedWeight, huge_buffer
from tests.ops import samples, schemas
from tests.ops.reference import Matrix
from tests.ops.samples import PLAIN_SAMPLES, SAMPLES, Case, bits

EXAMPLES = settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@dataclass(frozen=True)
class Break:
    """A wrong value for one argument.

    make    makes the value
    blames  the error names this argument; where a size is wrong it may also name one that disagrees
    fake    what the same call does on fake tensors: `same` error, or `passes`, because contents and
            addresses are not there; `none` where there is no such call
    """

    make: Callable[[], Any]
    blames: bool = True
    fake: str = "same"


# Sizes that nothing else fixes: (op or *, argument, dimension). Growing them breaks nothing.
FREE = {
    ("embedding", "table", 0),
    ("*", "rope_table", 0),
    ("*", "block_tables", 0),
    ("*", "block_tables", 1),
    ("*", "cache", 0),
    ("*", "cache", 1),
    ("load_step", "token_ids_to", 0),
    ("load_step", "positions_to", 0),
    ("load_step", "row_seq_to", 0),
    ("load_step", "block_tables_to", 0),
    ("load_step", "block_tables_to", 1),
    ("mla_prefill_attention", "segments", 0),
    ("restrict", "logits", 0),
    ("restrict", "logits", 1),
    *((op, "logits", 1) for op in ("add_bias", "penalize", "sample", "greedy", "logprobs")),
    ("route_softmax", "w", "rows"),
    ("mla_decode_attention", "w_vc", "cols"),
    *((op, "dst", side) for op in SAMPLES if op.startswith("pack_") for side in ("batch", "parts")),
    ("read_memory", "dst", 0),
    ("write_memory", "src", 0),
    ("touch_memory", "dst", 0),
    ("memory_placement", "memory", 0),
}
# Ops with one tensor: there is no other that a meta tensor disagrees with, and without any tensor
# PyTorch itself refuses the call.
ALONE = ("touch_memory",)
# Sizes that contents contradict: on fake tensors the call passes, or another argument is blamed.
HIDDEN = {("penalize", "token_ids", 0): "passes", ("add_bias", "token_ids", 0): "none"}


def resized(t: torch.Tensor, dim: int, by: int) -> torch.Tensor:
    """t with one dimension longer (filled with zeros) or shorter."""
    if by < 0:
        return t.narrow(dim, 0, t.shape[dim] + by).contiguous()
    more = torch.zeros(*t.shape[:dim], by, *t.shape[dim + 1 :], dtype=t.dtype)
    return (
        torch.cat((t.view(torch.uint8), more.view(torch.uint8)), dim).view(t.dtype)
        if (t.element_size() == 1)
        else torch.cat((t, more), dim)
    )


def spread(t: torch.Tensor) -> torch.Tensor:
    """The same values, not contiguous."""
    room = torch.zeros(*t.shape, 2, dtype=t.dtype)
    room[..., 0] = t
    return room[..., 0]


OTHER_DTYPES = (torch.float16, torch.float64, torch.int16, torch.bool, torch.float32, torch.uint8)


def wrong(
    function: Callable[..., Any], *args: Any, blames: bool = True, fake: str = "same"
) -> Break:
    """A break whose value is function(*args), computed when it is wanted."""
    return Break(partial(function, *args), blames, fake)


def the(value: Any) -> Any:
    return value


def wrong_tensors(op: str, name: str, t: torch.Tensor) -> Iterator[Break]:
    yield wrong(lambda: t[None].contiguous())
    if t.dim() > 1:
        yield wrong(t.flatten)
    for dim in range(t.dim()):
        if (op, name, dim) in FREE or ("*", name, dim) in FREE:
            continue
        fake = HIDDEN.get((op, name, dim), "same")
        yield wrong(resized, t, dim, 1, blames=False, fake=fake)
        if t.shape[dim] > 1:
            yield wrong(resized, t, dim, -1, blames=False, fake=fake)
    for dtype in OTHER_DTYPES:
        if dtype != t.dtype:
            yield wrong(t.to, dtype)
    if t.numel() > 1:
        yield wrong(spread, t)
    if op not in ALONE:
        yield wrong(t.to, "meta", blames=False, fake="none")
    for value in (
        *(() if op in ALONE else (None,)),
        1.0,
        "x",
        [t],
        samples.one(Matrix(Format.F32, torch.zeros(1, 1))),
    ):
        yield wrong(the, value, fake="none")


WRONG_FORMAT = {
    **dict.fromkeys(("heads", "mla_decode_attention"), Format.INT8),
    **dict.fromkeys(("route_softmax", "route_sigmoid"), Format.FP8),
    "pack_f32": Format.BF16,
}


def changed(w: PackedWeight, at: int) -> PackedWeight:
    """A copy with another byte in its header."""
    out = samples.copied(w)
    assert isinstance(out, PackedWeight)
    out.data[at] ^= 0x41
    return out


def misaligned(w: PackedWeight) -> PackedWeight:
    data = torch.zeros(w.nbytes + 64, dtype=torch.uint8)[1 : w.nbytes + 1]
    data.copy_(w.data)
    return PackedWeight(data, w.format, w.batch, w.parts, w.rows, w.cols)


def wrong_weights(op: str, name: str, w: PackedWeight) -> Iterator[Break]:
    sides = {"batch": w.batch, "parts": w.parts, "rows": w.rows, "cols": w.cols}
    if op != "init_packed":
        fmt = Format.INT8 if name == "w_kc" else WRONG_FORMAT.get(op, Format.F32)
        yield wrong(PackedWeight.allocate, fmt, *sides.values())
    for side, size in sides.items():
        if op == "init_packed" or (op, name, side) in FREE:
            continue
        for other in (size + 1, size - 1):
            if other > 0 and not (side == "parts" and other > 2):
                shape = (sides | {side: other}).values()
                yield wrong(PackedWeight.allocate, w.format, *shape, blames=False)
    # Descriptors that the bytes do not bear out.
    for other_format in Format:
        if other_format != w.format:
            yield wrong(PackedWeight, w.data, other_format, *sides.values())
    if w.rows != w.cols and op != "init_packed":
        swapped = (w.batch, w.parts, w.cols, w.rows)
        yield wrong(PackedWeight, w.data, w.format, *swapped, blames=False, fake="none")
    for size in (0, -1, 2**31 + 1, 2**62):
        for side in sides:
            yield wrong(PackedWeight, w.data, w.format, *(sides | {side: size}).values())
    yield wrong(PackedWeight, w.data, w.format, w.batch, 3, w.rows, w.cols)
    yield wrong(PackedWeight, w.data, 0, *sides.values())
    yield wrong(PackedWeight, w.data, 6, *sides.values())
    yield wrong(PackedWeight, w.data[:-64], w.format, *sides.values())
    yield wrong(PackedWeight, w.data.view(torch.int8), w.format, *sides.values())
    if op != "init_packed":
        yield wrong(
            lambda: PackedWeight(w.data.to("meta"), w.format, *sides.values()),
            blames=False,
            fake="none",
        )
        yield wrong(misaligned, w, fake="passes")
        for at in (0, 8, 12, 16, 40):  # magic, version, format, batch, cols
            yield wrong(changed, w, at, fake="passes")
    # The seed bug: a float, a scale, or bare codes where a weight belongs.
    for value in (None, 1.0, 7, w.data, torch.ones(w.rows), torch.ones(w.rows, 1), "w"):
        yield wrong(the, value, fake="none")


def wrong_numbers(name: str, value: Any, case: Case) -> Iterator[Break]:
    if isinstance(value, float):
        for number in (0.0, -1.0, math.nan, math.inf, -math.inf):
            yield wrong(the, number)
    elif not isinstance(value, bool):
        for number in (-1, 2**62, -(2**40), *(() if name == "offset" else (2**40,))):
            yield wrong(the, number, blames=False)
        if name not in ("absorbed", "item", "part", "file", "offset"):
            yield wrong(the, 0, blames=False)
        if name == "absorbed":
            yield wrong(the, case.arguments["x"].shape[0] + 1)
        if name in ("item", "part"):
            dst = case.arguments["dst"]
            yield wrong(the, dst.batch if name == "item" else dst.parts)
        if name in ("kv_lora_rank", "v_head_dim", "qk_rope_head_dim", "top_k", "topk_group"):
            yield wrong(the, value + 1000, blames=False)
        if name == "n_group":
            yield wrong(the, case.arguments["w"].rows + 1)
        yield wrong(the, 1.5, fake="none")
    for bad in (None, "x", torch.zeros(2), [1.5]):
        yield wrong(the, bad, fake="none")


def planted(t: torch.Tensor, at: tuple[int, ...], value: float) -> torch.Tensor:
    out = t.clone()
    out[at] = value
    return out


HUGE = 2**31 - 1


def wrong_contents(op: str, name: str, case: Case, row: int) -> Iterator[Break]:
    """Values out of range, in a place that the op reads."""
    a = case.arguments
    t = a[name]
    bounds: dict[str, Callable[[], int]] = {
        "token_ids": lambda: _vocabulary(op, a),
        "row_seq": lambda: int(a["block_tables"].shape[0]),
        "positions": lambda: _positions(op, a),
        "ids": lambda: int(a["gate_up"].batch),
        "rows": lambda: int(a["logits"].shape[0]),
    }
    if name in bounds and name not in case.expected and t.numel():
        place = (row % t.shape[0], *(0 for _ in t.shape[1:]))
        for bad in (-1, -(2**31), bounds[name](), HUGE):
            yield wrong(planted, t, place, bad, fake="passes")
    if name == "block_tables" and "segments" in a:
        _first, count, seq, start = a["segments"][row % a["segments"].shape[0]].tolist()
        block = (start + count - 1) // a["cache"].shape[1]
        for bad in (-1, a["cache"].shape[0], HUGE):
            yield wrong(planted, t, (seq, block), bad, fake="passes")
    elif name == "block_tables":
        i = row % a["positions"].shape[0]
        size, blocks = (
            (a["block_size"], a["num_blocks"])
            if op == "load_step"
            else reversed(a["cache"].shape[:2])
        )
        place = (int(a["row_seq"][i]), int(a["positions"][i]) // size)
        for bad in (-1, blocks, HUGE):
            yield wrong(planted, t, place, bad, fake="passes")
    if name == "segments":
        i, n = row % t.shape[0], a["q"].shape[0]
        reach = a["block_tables"].shape[1] * a["cache"].shape[1]
        bad_values = ((-1, n, HUGE), (0, -1, n + 1, HUGE), (-1, a["block_tables"].shape[0], HUGE))
        for column, values in enumerate((*bad_values, (-1, reach, HUGE))):
            for bad in values:
                yield wrong(planted, t, (i, column), bad, fake="passes")
    if name in ("offsets", "output_offsets"):
        for at in {0, t.numel() - 1, row % t.numel()}:
            for bad in (-1, HUGE):
                yield wrong(planted, t, (at,), bad, fake="passes")
    floats = {
        "bias": (math.nan, math.inf) if op == "add_bias" else (),
        "repetition": (0.0, -1.0, math.nan, math.inf),
        "presence": (math.nan, math.inf),
        "frequency": (math.nan, -math.inf),
        "temperature": (-1.0, math.nan, math.inf),
        "top_p": (-0.1, 1.1, math.nan),
        "min_p": (-0.1, 1.1, math.nan),
    }
    for number in floats.get(name, ()):
        yield wrong(planted, t, (row % t.numel(),), number, fake="passes")


def _vocabulary(op: str, a: Mapping[str, Any]) -> int:
    if op == "embedding":
        return int(a["table"].shape[0])
    return int(a["vocab_size"] if op == "load_step" else a["logits"].shape[1])


def _positions(op: str, a: Mapping[str, Any]) -> int:
    size = a["block_size"] if op == "load_step" else a["cache"].shape[1]
    reach = int(a["block_tables"].shape[1] * size)
    if "rope_table" in a:
        return min(reach, int(a["rope_table"].shape[0]))
    return min(reach, int(a["max_position"])) if op == "load_step" else reach


def breaks(op: str, name: str, case: Case, row: int) -> list[Break]:
    """Everything that can be wrong with one argument."""
    value = case.arguments[name]
    if isinstance(value, PackedWeight):
        return list(wrong_weights(op, name, value))
    if isinstance(value, torch.Tensor):
        return [*wrong_tensors(op, name, value), *wrong_contents(op, name, case, row)]
    return list(wrong_numbers(name, value, case))


# ---- the property --------------------------------------------------------------------------------

SITES = [(op, name) for op in SAMPLES for name in SAMPLES[op][0].case().arguments]


def fits(case: Case) -> bool:
    """Cases with rows, small enough to be broken often."""
    sizes = [v.numel() for v in case.arguments.values() if isinstance(v, torch.Tensor)]
    return min(sizes, default=1) > 0 and max(sizes, default=1) < 200_000


def message(call: Callable[[], object]) -> str | None:
    """The first line of the error that a call raises."""
    try:
        call()
    except (RuntimeError, TypeError, NotImplementedError) as error:
        return str(error).splitlines()[0]
    return None


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    """PyTorch logs every error of a fake call."""
    caplog.set_level(logging.CRITICAL, "torch._subclasses.fake_tensor")


def faked(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, PackedWeight):
        data = mode.from_tensor(value.data)
        return PackedWeight(data, value.format, value.batch, value.parts, value.rows, value.cols)
    return mode.from_tensor(value) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize(("op", "name"), SITES)
@EXAMPLES
@given(data=st.data())
def test_one_wrong_argument_is_an_error(op: str, name: str, data: st.DataObject) -> None:
    choices = [s for s in SAMPLES[op] if fits(s.case())]
    case = data.draw(st.sampled_from(choices)).case()
    row = data.draw(st.integers(0, 7))
    options = breaks(op, name, case, row)
    chosen = options[data.draw(st.integers(0, len(options) - 1))]
    value = chosen.make()
    arguments = case.fresh() | {name: value}
    before = {key: bits(t).clone() for key, t in tensors_of(arguments).items()}

    found = message(lambda: case.call(**arguments))

    assert found is not None, f"{name} = {value!r} passed"
    check_names(op, name, case, chosen, found)
    for key, t in tensors_of(arguments).items():
        assert torch.equal(bits(t), before[key]), f"{key} was written"
    if chosen.fake != "none":
        mode = FakeTensorMode()
        with mode:
            fakes = {key: faked(mode, value) for key, value in arguments.items()}
            on_fakes = message(lambda: case.call(**fakes))
        assert on_fakes == (found if chosen.fake == "same" else None)


def tensors_of(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Tensors, and those of packed weights, that have contents."""
    values = {k: v for k, v in arguments.items() if isinstance(v, torch.Tensor | PackedWeight)}
    return {k: v.data for k, v in values.items() if v.data.device.type == "cpu"}


def check_names(op: str, name: str, case: Case, chosen: Break, found: str) -> None:
    assert found.startswith(f"latentcore::{op}"), found
    assert "expected" in found.lower(), found
    assert "found" in found.lower(), found
    blamed = re.search(r"argument '(\w+)", found)
    assert blamed is not None, found
    assert blamed[1] in schemas.expanded(op, case.arguments), found
    if chosen.blames:
        assert blamed[1].removesuffix("_desc") == name.removesuffix("_desc"), found


# ---- the seed bug, spelled out -------------------------------------------------------------------

WEIGHTS = [
    (op, name)
    for op, name in SITES
    if isinstance(SAMPLES[op][0].case().arguments[name], PackedWeight)
]


@pytest.mark.parametrize(("op", "name"), WEIGHTS)
def test_a_float_or_a_scale_is_no_weight(op: str, name: str) -> None:
    case = SAMPLES[op][0].case()
    for value, kind in ((0.017, "float"), (None, "NoneType"), (torch.ones(7, 1), "Tensor")):
        expected = f"latentcore::{op}: argument '{name}': expected a PackedWeight, found {kind}"
        assert message(lambda v=value: case.call(**case.fresh() | {name: v})) == expected  # type: ignore[misc]


@pytest.mark.parametrize(("op", "name"), WEIGHTS)
def test_every_size_of_a_weight_is_compared(op: str, name: str) -> None:
    """Each on its own, on the first sample: the random search above may miss one."""
    case = SAMPLES[op][0].case()
    w = case.arguments[name]
    sides = {"batch": w.batch, "parts": w.parts, "rows": w.rows, "cols": w.cols}
    for side, size in sides.items():
        if op == "init_packed" or (op, name, side) in FREE or (side == "parts" and size == 2):
            continue
        other = PackedWeight.allocate(w.format, *(sides | {side: size + 1}).values())
        found = message(lambda v=other: case.call(**case.fresh() | {name: v}))  # type: ignore[misc]
        assert found is not None, f"{side} {size + 1} passed"
        assert found.startswith(f"latentcore::{op}: argument '"), found


@pytest.mark.parametrize(("op", "name"), WEIGHTS)
def test_a_float_is_no_tensor_below_the_wrapper_either(op: str, name: str) -> None:
    arguments = schemas.expanded(op, SAMPLES[op][0].case().fresh())
    for key in (name, name + "_desc"):
        found = message(lambda k=key: schemas.op(op)(*(arguments | {k: 0.017}).values()))  # type: ignore[misc]
        assert found is not None
        assert f"argument '{key}' but instead found type 'float'" in found


# ---- ops without tensors -------------------------------------------------------------------------

WRONG_PLAIN: Mapping[str, Sequence[object]] = {
    "n": (-1, 2**41, -(2**62)),
    "threads": (0, -1, 1025),
    "turn": (-1, 2**40),
    "panels": (-1, 2**25),
    "pieces": (0, -1, 2**21),
    "what": ("", "up", "down "),
    "at": (-1, 2**20),
    "lists": (0, -1, 2**21),
    "root": (),
    "allowed": ([], [-1], [2**40], [0, -3]),
    "name": ("avx9", "AVX2", "avx2 ", "avx2\0"),
    "desc": ([], [1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1], [6, 1, 1, 1, 1], [1, 1, 3, 1, 1]),
    "handle": (0, -1, 2**62),
    "fmt": (0, 6, -1, 2**40),
    "most_bytes": (0, -1, 2**20 - 1),
    "seconds": (0.0, -1.0, math.nan, math.inf, 61.0),
}
PLAIN_SITES = [(op, name) for op, samples_of in PLAIN_SAMPLES.items() for name in samples_of[0]]


@pytest.mark.parametrize(("op", "name"), PLAIN_SITES)
def test_one_wrong_argument_of_an_op_without_tensors_is_an_error(op: str, name: str) -> None:
    for arguments in PLAIN_SAMPLES[op]:
        for value in WRONG_PLAIN[name]:
            found = message(lambda a=arguments, v=value: schemas.wrapper(op)(**{**a, name: v}))  # type: ignore[misc]
            assert found is not None, f"{name} = {value!r} passed"
            assert found.startswith(f"latentcore::{op}: argument '{name}': expected "), found
            assert ", found " in found, found
        for value in (None, torch.zeros(2), [1.5], {}):
            found = message(lambda a=arguments, v=value: schemas.wrapper(op)(**{**a, name: v}))  # type: ignore[misc]
            assert found is not None, f"{name} = {value!r} passed"
            assert found.startswith(f"latentcore::{op}() Expected a value of type "), found
            assert f"for argument '{name}' but instead found type" in found, found


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "name"), [("read_memory", "dst"), ("write_memory", "src")])
def test_moving_directly_needs_whole_pages(op: str, name: str) -> None:
    """What lies behind the end is moved too: it must belong to the tensor."""
    result = torch.zeros(2, dtype=torch.int64)

    def direct(memory: torch.Tensor, offset: int = 0) -> str | None:
        return message(lambda: schemas.wrapper(op)(memory, 1, 1 << 30, offset, True, result))

    start = f"latentcore::{op}: argument '{name}': expected memory "
    assert str(direct(huge_buffer(9000)[1:])).startswith(f"{start}aligned to 4096 bytes, found 1")
    short = torch.frombuffer(mmap.mmap(-1, 8192), dtype=torch.uint8, count=5000)
    assert direct(short) == f"{start}to the end of its last 4096 bytes, found 5000 bytes"
    assert str(direct(huge_buffer(9000), 5)).endswith("expected a multiple of 4096, found 5")
    assert direct(huge_buffer(9000)) is None
    assert result.tolist()[1] == errno.EBADF


# ---- memory that overlaps ------------------------------------------------------------------------


@pytest.mark.parametrize("by", [0, 3])
def test_output_may_not_overlap_an_input(by: int) -> None:
    room = torch.zeros(8, 64, dtype=torch.bfloat16)
    message_of = "latentcore::rms_norm: argument 'out': expected memory apart from 'x'"
    with pytest.raises(RuntimeError, match=message_of):
        dense.rms_norm(room[:4], torch.ones(64), 1e-6, room[by : by + 4])
    dense.rms_norm(room[:4], torch.ones(64), 1e-6, room[4:])


def test_input_buffers_must_hold_the_step() -> None:
    def ints(*shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=torch.int32)

    source = (ints(3), ints(3), ints(3), ints(2, 5))
    room = [(3,), (3,), (3,), (2, 5)]
    limits = (10, 10, 16, 80)
    mla.load_step(*source, *limits, *(ints(*shape) for shape in room))
    for at, small in ((0, (2,)), (1, (2,)), (2, (2,)), (3, (1, 5)), (3, (2, 4))):
        shapes = [*room[:at], small, *room[at + 1 :]]
        with pytest.raises(
            RuntimeError, match=r"latentcore::load_step: argument '.*expected 1\.\."
        ):
            mla.load_step(*source, *limits, *(ints(*shape) for shape in shapes))
