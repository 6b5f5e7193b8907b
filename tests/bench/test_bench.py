"""Measurements of models and kernels: what is counted and said. No time is asserted."""

import json
import time
from pathlib import Path

import pytest
from checkpoints import random_tensors, tensor_list, tiny_config, write_checkpoint

from latentcore.bench import kernels
from latentcore.bench.kernels import bench_kernels
from latentcore.bench.machine import Ceilings, Disturbance, watched
from latentcore.bench.model import DecodeCase, PrefillCase, bench_model, engine_config
from latentcore.cli.app import main
from latentcore.config import ModelConfig
from latentcore.errors import ConfigError
from latentcore.models.cost import Cost
from latentcore.models.runner import ModelRunner
from latentcore.ops import runtime
from latentcore.quant.packed import Format
from latentcore.quant.schemes import SCHEMES
from tests.ops.schemas import TENSOR_OPS

CONFIG = tiny_config(max_position_embeddings=512)


@pytest.fixture(autouse=True)
def _quick_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings have tests of their own (tests/ops/test_runtime.py) and take seconds."""
    monkeypatch.setattr(runtime, "read_bandwidth", lambda seconds, most_bytes: 1e10)
    monkeypatch.setattr(runtime, "peak_ops", lambda fmt, seconds: 1e12 * int(fmt))
    monkeypatch.setattr(runtime, "last_level_cache", lambda: 100_000)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    return write_checkpoint(path, CONFIG, random_tensors(tensor_list(CONFIG, "int8")))


def test_the_least_time_is_the_larger_bound() -> None:
    ceilings = Ceilings(100.0, {Format.INT8: 1000.0, Format.BF16: 500.0, Format.F32: 10.0})
    cost = Cost(50.0)
    cost.operations[Format.INT8] += 200.0
    assert ceilings.least_seconds(cost) == 0.5
    cost.operations[Format.FP8] += 100.0
    cost.operations[Format.INT8_WIDE] += 100.0
    assert ceilings.least_seconds(cost) == pytest.approx(0.2 + 0.2 + 0.2)
    higher = ceilings.best(Ceilings(50.0, {f: p + 1 for f, p in ceilings.peaks.items()}))
    assert higher.read_bandwidth == 100.0
    assert higher.peaks[Format.F32] == 11.0


def test_others_at_work_are_noticed() -> None:
    with watched() as found:
        end = time.monotonic() + 0.3
        while time.monotonic() < end:
            pass
    assert found.others >= 0, "our own work is not others'"
    assert Disturbance().warning() is None
    assert "other programs took 40%" in str(Disturbance(others=0.4).warning())
    assert "guests of the host 9%" in str(Disturbance(stolen=0.09).warning())


@pytest.fixture
def brief_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ceilings that are measured in a moment, and are as rough."""
    monkeypatch.setattr("latentcore.bench.machine._BANDWIDTH_SECONDS", 0.1)
    monkeypatch.setattr("latentcore.bench.machine._PEAK_SECONDS", 0.02)


@pytest.mark.usefixtures("brief_ceilings")
@pytest.mark.parametrize("use_graph", [True, False])
def test_a_model_is_measured_case_by_case(folder: Path, *, use_graph: bool) -> None:
    cases = [DecodeCase(3, 70), DecodeCase(1, 5), PrefillCase(300)]
    engine = engine_config(cases, "auto", 2, use_graph=use_graph)
    runner = ModelRunner.load(folder, engine)
    notes: list[str] = []
    result = bench_model(runner, "tiny", cases, 3, lambda what, done, total: notes.append(what))
    runner.close()
    assert (result.format, result.repeats, result.machine.threads) == ("INT8", 3, 2)
    assert [r.case for r in result.results] == ["decode 3 x 70", "decode 1 x 5", "prefill 300"]
    assert {case.case for case in result.results} <= set(notes)
    top_k = CONFIG["num_experts_per_tok"]
    for r in result.results:
        assert 0 < r.seconds.low <= r.seconds.median <= r.seconds.high
        assert r.tokens_per_second == pytest.approx(r.tokens / r.seconds.median)
        assert r.share > 0
        assert r.experts is not None
        assert top_k <= r.experts <= CONFIG["n_routed_experts"]
        assert r.fabric.imbalance >= 0.999
        assert r.fabric.overhead < 1
        assert result.ceilings == result.ceilings.best(r.ceilings)
        assert {"mla_input", "moe", "mlp", "route"} <= {k.kernel for k in r.fabric.kernels}
        shares = {k.kernel: k.share for k in r.fabric.kernels}
        assert shares["moe"] is not None
        assert shares["embedding"] is None
    assert result.results[1].experts == top_k
    one, many = result.results[1], result.results[2]
    assert many.nbytes > one.nbytes, "a prompt touches more experts and latents"


@pytest.mark.usefixtures("brief_ceilings")
def test_each_repeat_of_decoding_counts_with_the_bandwidth_beside_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = DecodeCase(1, 5)
    measured = iter([1e9, 4e9, 2e9, 3e9])
    monkeypatch.setattr("latentcore.bench.model.measure_bandwidth", lambda: next(measured))
    runner = ModelRunner.load(folder, engine_config([case], "unquant", 1, use_graph=True))
    result = bench_model(runner, "tiny", [case], 3, lambda *_: None)
    runner.close()
    found = result.results[0]
    assert found.ceilings.read_bandwidth == 4e9  # of 4, 4 and 3
    assert found.limit == "memory"
    least = [found.nbytes / bandwidth for bandwidth in (4e9, 3e9)]
    assert least[0] / found.seconds.high <= found.share <= least[1] / found.seconds.low
    assert result.ceilings.read_bandwidth >= 4e9
    assert next(measured, None) is None


@pytest.mark.usefixtures("brief_ceilings")
def test_a_prompt_longer_than_a_step_is_read_in_chunks(folder: Path) -> None:
    engine = engine_config([PrefillCase(100)], "auto", 1, use_graph=True)
    runner = ModelRunner.load(folder, engine)
    whole = bench_model(runner, "tiny", [PrefillCase(100)], 1, lambda *_: None).results[0]
    runner.close()
    limited = ModelRunner.load(
        folder, type(engine)(threads=1, max_model_len=100, max_num_batched_tokens=64)
    )
    chunked = bench_model(limited, "tiny", [PrefillCase(100)], 1, lambda *_: None).results[0]
    limited.close()
    runs = {k.kernel: k.runs for k in whole.fabric.kernels}
    assert {k.kernel: k.runs for k in chunked.fabric.kernels}["moe"] == 2 * runs["moe"]
    assert chunked.nbytes > whole.nbytes, "weights are read once a chunk"


@pytest.mark.parametrize(
    ("case", "message"),
    [
        (DecodeCase(9, 10), "decode 9 x 10: 9 sequences at once, this model's limit here is 2"),
        (DecodeCase(1, 400), "decode 1 x 400: 401 tokens in a sequence"),
        (PrefillCase(513), "prefill 513: 513 tokens in a sequence"),
    ],
)
def test_what_the_model_cannot_hold_is_said_first(
    folder: Path, case: DecodeCase | PrefillCase, message: str
) -> None:
    engine = engine_config([DecodeCase(2, 99)], "auto", 1, use_graph=True)
    runner = ModelRunner.load(folder, engine)
    notes: list[str] = []
    with pytest.raises(ConfigError, match=message):
        bench_model(runner, "tiny", [case], 1, lambda what, done, total: notes.append(what))
    assert notes == []
    runner.close()


def test_every_op_is_measured_or_has_a_reason_not_to_be() -> None:
    measured = {op for op, _ in (*kernels.COMMON_OPS, *kernels.SCHEME_OPS)}
    assert measured.isdisjoint(kernels.NOT_MEASURED)
    assert measured | set(kernels.NOT_MEASURED) == set(TENSOR_OPS)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_kernels(monkeypatch: pytest.MonkeyPatch, scheme: str) -> None:
    monkeypatch.setattr(kernels, "DECODE_ROWS", (1, 3))
    monkeypatch.setattr(kernels, "PREFILL_ROWS", (70,))
    monkeypatch.setattr(kernels, "CONTEXT", 100)
    monkeypatch.setattr(kernels, "LONG_CONTEXT", 300)
    monkeypatch.setattr(kernels, "_MOST_COPIES", 3)
    monkeypatch.setattr(kernels, "_LEAST_SECONDS", 0.0)
    notes: list[tuple[int, int]] = []
    runtime.set_threads(2)
    try:
        found = bench_kernels(
            ModelConfig.from_dict(CONFIG),
            [scheme],
            ["avx2"],
            2,
            lambda what, done, total: notes.append((done, total)),
        )
    finally:
        runtime.set_threads(1)
    results = found.results
    for ops, name in ((kernels.COMMON_OPS, kernels.ANY_SCHEME), (kernels.SCHEME_OPS, scheme)):
        assert {r.op for r in results if r.scheme == name} == {op for op, _ in ops}
    cases = {(r.op, r.rows, r.shape) for r in results}
    assert len(cases) == len(results)
    assert ("moe", 70, "") in cases
    assert ("mla_decode_attention", 1, "context 300, 128 heads") in cases
    assert all(done < total for done, total in notes), "progress never runs over"
    for r in results:
        assert r.tier == "avx2"
        assert r.share > 0 < r.bytes_per_second
        assert 0 < r.seconds.low <= r.seconds.median <= r.seconds.high
    multiplying = [r for r in results if r.scheme == scheme]
    assert all(r.operations_per_second > 0 for r in multiplying)


def test_command_on_a_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", str(folder), "--decode", "2x30", "--prefill", "40", "--repeats", "2"]
    assert main([*arguments, "--threads", "1", "--profile"]) == 0
    shown = capsys.readouterr()
    assert "1 threads, tier" in shown.out
    assert "decode 2 x 30" in shown.out
    assert "mla_prefill" in shown.out
    assert "measuring prefill 40" in shown.err
    assert main([*arguments, "--threads", "1", "--json", "--tier", "avx2", "--enforce-eager"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"]["tier"] == "avx2"
    assert found["ceilings"]["read_bandwidth"] == 1e10
    assert found["ceilings"]["peaks"]["int8"] == 3e12
    decode, prefill = found["results"]
    assert decode["case"] == "decode 2 x 30"
    assert prefill["tokens_per_second"] == pytest.approx(40 / prefill["seconds"]["median"])
    assert decode["fabric"]["kernels"][0]["imbalance"] > 0
    assert runtime.num_threads() == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--decode", "8"], "--decode: expected BATCHxCONTEXT such as 8x128, found '8'"),
        (["--decode", "0x5"], "found '0x5'"),
        (["--prefill", "0"], "--prefill: expected at least 1 token, found 0"),
        (["--kernels", "--decode", "1x1"], "--decode measures a model"),
        (["--kernels", "--profile"], "--profile measures a model"),
        (["--kernels", "--enforce-eager"], "--enforce-eager measures a model"),
        (["--repeats", "0"], "--repeats"),
        (["/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
