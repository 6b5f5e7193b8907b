"""Schema, wrapper, Meta implementation and samples of every op agree; nothing can drift unseen."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from latentcore.ops import control, runtime
from latentcore.quant.packed import Format, PackedWeight, packed_nbytes
from tests.ops import schemas
from tests.ops.samples import EAGER_ONLY, PLAIN_SAMPLES, SAMPLES, Sample, bits

TENSOR_OPS, PLAIN_OPS, ALL_OPS = schemas.TENSOR_OPS, schemas.PLAIN_OPS, schemas.ALL_OPS


def test_there_are_ops() -> None:
    assert len(TENSOR_OPS) >= 20
    assert len(PLAIN_OPS) >= 15


@pytest.mark.parametrize("name", ALL_OPS)
def test_has_samples(name: str) -> None:
    samples = SAMPLES if name in TENSOR_OPS else PLAIN_SAMPLES
    assert samples.get(name), f"latentcore::{name} has no samples in tests/ops/samples.py"


def test_has_no_samples_of_other_ops() -> None:
    assert set(SAMPLES) <= set(TENSOR_OPS)
    assert set(PLAIN_SAMPLES) <= set(PLAIN_OPS)


@pytest.mark.parametrize("key", ["CPU", "Meta"])
def test_tensor_ops_have_kernels(key: str) -> None:
    assert schemas.registered(key) == set(TENSOR_OPS)


def test_other_ops_have_one_kernel_for_all_devices() -> None:
    assert schemas.registered("CompositeExplicitAutograd") == set(PLAIN_OPS)


# ---- wrapper and schema ------------------------------------------------------------------------

ANNOTATIONS: Mapping[str, object] = {
    "Tensor": torch.Tensor,
    "int": int,
    "float": float,
    "bool": bool,
    "str": str,
    "List[int]": list[int],
}


def folded(name: str) -> list[tuple[str, object, object]]:
    """Names, annotations and defaults that a wrapper must have: `Tensor w, int[] w_desc` is one
    packed weight."""
    arguments = list(schemas.schema(name).arguments)
    out: list[tuple[str, object, object]] = []
    for at, argument in enumerate(arguments):
        follows = arguments[at + 1].name if at + 1 < len(arguments) else ""
        before = arguments[at - 1].name if at else ""
        if argument.name == before + "_desc" and out[-1][1] is PackedWeight:
            continue
        default = (
            argument.default_value if argument.has_default_value() else inspect.Parameter.empty
        )
        packed = follows == argument.name + "_desc"
        annotation = PackedWeight if packed else ANNOTATIONS[str(argument.type)]
        out.append((argument.name, annotation, default))
    return out


@pytest.mark.parametrize("name", ALL_OPS)
def test_wrapper_is_the_schema(name: str) -> None:
    signature = inspect.signature(schemas.wrapper(name))
    found = [(p.name, p.annotation, p.default) for p in signature.parameters.values()]
    assert found == folded(name)
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in signature.parameters.values())
    returns = [ANNOTATIONS[str(r.type)] for r in schemas.schema(name).returns]
    assert returns == ([] if signature.return_annotation is None else [signature.return_annotation])


@pytest.mark.parametrize("name", TENSOR_OPS)
def test_an_op_on_tensors_returns_nothing(name: str) -> None:
    """Results stand in arguments: none can be forgotten on fake tensors, or alias another."""
    assert list(schemas.schema(name).returns) == []


@pytest.mark.parametrize("name", ALL_OPS)
def test_wrapper_hands_arguments_on_in_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    result = object()

    def note(*args: Any) -> object:
        calls.append(args)
        return result

    monkeypatch.setattr(schemas.home(name), "_" + name, note)
    arguments = SAMPLES[name][0].case().arguments if name in SAMPLES else PLAIN_SAMPLES[name][0]
    returned = schemas.wrapper(name)(**arguments)
    assert returned is (result if schemas.schema(name).returns else None)
    (found,) = calls
    expected = schemas.expanded(name, arguments)
    assert len(found) == len(expected)
    wrong = [
        key for got, (key, want) in zip(found, expected.items(), strict=True) if got is not want
    ]
    assert wrong == []


@pytest.mark.parametrize("name", TENSOR_OPS)
def test_sample_calls_the_wrapper(name: str) -> None:
    assert {sample.case().call for sample in SAMPLES[name]} == {schemas.wrapper(name)}


# ---- mutation ----------------------------------------------------------------------------------


def marked(name: str) -> set[str]:
    """Arguments that the schema marks as written."""
    aliases = {a.name: a.alias_info for a in schemas.schema(name).arguments}
    return {key for key, alias in aliases.items() if alias is not None and alias.is_write}


def tensors(arguments: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in arguments.items() if isinstance(value, torch.Tensor)}


WRITES_WHAT_IS_THERE = {"touch_memory": {"dst"}}


@pytest.mark.parametrize("name", TENSOR_OPS)
def test_what_is_marked_is_written_and_nothing_else(name: str) -> None:
    changed: set[str] = set()
    for sample in SAMPLES[name]:
        case = sample.case()
        assert marked(name) == set(case.expected)
        arguments = schemas.expanded(name, case.fresh())
        before = {key: bits(value).clone() for key, value in tensors(arguments).items()}
        schemas.op(name)(*arguments.values())
        for key, value in tensors(arguments).items():
            if not torch.equal(bits(value), before[key]):
                changed.add(key)
    assert changed == marked(name) - WRITES_WHAT_IS_THERE.get(name, set())


# ---- capture ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EAGER_ONLY)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_an_op_that_runs_at_once_refuses_a_capture(name: str, device: str) -> None:
    """With data and without, so that `preflight` sees it too."""
    arguments = schemas.expanded(name, SAMPLES[name][0].case().fresh())
    moved = [v.to(device) if isinstance(v, torch.Tensor) else v for v in arguments.values()]
    expected = f"latentcore::{name}: argument '{EAGER_ONLY[name]}': expected eager execution"
    with pytest.raises(RuntimeError, match=expected), runtime.Graph.capture():
        schemas.op(name)(*moved)


# ---- opcheck and Meta --------------------------------------------------------------------------


def one_a_scheme() -> list[Sample]:
    """The first sample of each op and scheme, and of several rows where there is one."""
    first: dict[tuple[str, str], Sample] = {}
    for name in TENSOR_OPS:
        for sample in SAMPLES.get(name, ()):
            first.setdefault((sample.op, sample.scheme), sample)
    return list(first.values())


def id_of(sample: Sample) -> str:
    return f"{sample.op}-{sample.scheme}"


def same(a: torch.Tensor, b: torch.Tensor, equal_nan: bool) -> bool:
    """In place of `allclose`, which PyTorch's checker asks about all arguments and float8 lacks."""
    assert equal_nan
    return torch.equal(bits(a), bits(b))


@pytest.mark.parametrize("sample", one_a_scheme(), ids=id_of)
def test_opcheck(sample: Sample, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = (
        "test_schema",
        "test_autograd_registration",
        "test_faketensor",
        "test_aot_dispatch_dynamic",
    )
    arguments = tuple(schemas.expanded(sample.op, sample.case().fresh()).values())
    op = schemas.op(sample.op)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "allclose", same)
        result = torch.library.opcheck(op, arguments, test_utils=tests[:1])
    result |= torch.library.opcheck(op, arguments, test_utils=tests[1:])
    assert result == dict.fromkeys(tests, "SUCCESS")


def test_opcheck_sees_a_byte_of_float8_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """The comparison above is no weaker than PyTorch's own."""
    library = torch.library.Library("latentcore_test", "FRAGMENT")
    library.define("writes(Tensor x, Tensor(a!) out) -> ()")

    def writes(x: torch.Tensor, out: torch.Tensor) -> None:
        x.view(torch.uint8)[1] += 1
        out += 1

    library.impl("writes", writes, "CPU")
    monkeypatch.setattr(torch, "allclose", same)
    x = torch.ones(3).to(torch.float8_e4m3fn)
    with pytest.raises(torch.testing._internal.optests.generate_tests.OpCheckError, match="mutat"):
        torch.library.opcheck(
            torch.ops.latentcore_test.writes.default,
            (x, torch.zeros(2)),
            test_utils="test_schema",
        )


def on(convert: Callable[[torch.Tensor], torch.Tensor], arguments: Mapping[str, Any]) -> list[Any]:
    return [convert(v) if isinstance(v, torch.Tensor) else v for v in arguments.values()]


@pytest.mark.parametrize("sample", one_a_scheme(), ids=id_of)
def test_meta_is_cpu(sample: Sample) -> None:
    """Ops return nothing, on either device, and leave shapes, dtypes and strides as they are."""
    arguments = schemas.expanded(sample.op, sample.case().fresh())
    for device in ("cpu", "meta"):
        moved = on(lambda t, d=device: t.to(d), arguments)  # type: ignore[misc]
        looks = [(t.shape, t.stride(), t.dtype) for t in moved if isinstance(t, torch.Tensor)]
        assert schemas.op(sample.op)(*moved) is None
        assert looks == [
            (t.shape, t.stride(), t.dtype) for t in moved if isinstance(t, torch.Tensor)
        ]


@pytest.mark.parametrize("sample", one_a_scheme(), ids=id_of)
def test_fake_tensors_of_static_shape_pass(sample: Sample) -> None:
    mode = FakeTensorMode()
    arguments = schemas.expanded(sample.op, sample.case().fresh())
    with mode:
        assert schemas.op(sample.op)(*on(mode.from_tensor, arguments)) is None


@pytest.mark.parametrize("sample", one_a_scheme(), ids=id_of)
def test_symbolic_shapes_pass_quietly(sample: Sample, capfd: pytest.CaptureFixture[str]) -> None:
    """Each tensor in turn with symbolic sizes, and all of them together."""
    arguments = schemas.expanded(sample.op, sample.case().fresh())
    names = list(tensors(arguments))

    def symbolic(mode: FakeTensorMode, name: str, tensor: torch.Tensor) -> torch.Tensor:
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * tensor.dim())
        fake = mode.from_tensor(tensor, symbolic_context=context, source=ConstantSource(name))
        assert any(isinstance(size, torch.SymInt) for size in fake.shape)
        return fake

    def convert(mode: FakeTensorMode, symbols: Sequence[str], name: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        if name in symbols and max(value.shape) > 1:
            return symbolic(mode, name, value)
        return mode.from_tensor(value, static_shapes=True)

    for symbols in [*([name] for name in names), names]:
        mode = FakeTensorMode(shape_env=ShapeEnv())
        fakes = [convert(mode, symbols, name, value) for name, value in arguments.items()]
        with mode:
            assert schemas.op(sample.op)(*fakes) is None
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


# ---- packed weights ----------------------------------------------------------------------------

SHAPES: Sequence[tuple[int, int, int, int]] = (
    (1, 1, 1, 1),
    (1, 2, 16, 32),
    (3, 1, 17, 33),
    (2, 2, 255, 64),
    (5, 1, 576, 129),
    (256, 2, 2048, 7168),
    (1, 1, 129280, 7168),
)


@pytest.mark.parametrize("fmt", Format, ids=lambda f: f.name)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_packed_size_is_the_native_one(fmt: Format, shape: tuple[int, int, int, int]) -> None:
    assert packed_nbytes(fmt, *shape) == control.packed_bytes([int(fmt), *shape])


def test_fake_packed_weight_has_the_shape_of_a_real_one() -> None:
    fake = PackedWeight.fake(Format.FP8, 2, 2, 40, 70)
    real = PackedWeight.allocate(Format.FP8, 2, 2, 40, 70)
    assert fake.desc == real.desc == [4, 2, 2, 40, 70]
    assert (fake.data.shape, fake.data.dtype) == (real.data.shape, real.data.dtype)
    assert fake.data.is_meta
