"""Preflight: every problem of a checkpoint, and its figures, without reading a weight."""

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoints import (
    CONFIGS,
    FP8_SECTION,
    PREFLIGHT_STEPS,
    Config,
    Entry,
    Sparse,
    random_tensors,
    tensor_list,
    tiny_config,
    write_checkpoint,
    write_config,
)

from latentcore.config import EngineConfig
from latentcore.engine import preflight as module
from latentcore.engine.loading import load_model
from latentcore.engine.preflight import Report, preflight
from latentcore.errors import CheckpointError, ConfigError, NotReadyError, UnsupportedModelError
from latentcore.models import memory
from latentcore.models.checkpoint import Checkpoint
from latentcore.models.deepseek import DeepseekDecoder
from latentcore.models.logits import StepLogits
from latentcore.ops import dense, runtime, sampling

TINY = tiny_config()
ENGINE = EngineConfig(max_model_len=128, max_num_seqs=4)


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 4 TB, and no weight may be read."""
    monkeypatch.setattr(memory, "available_memory", lambda: 4 * 10**12)
    monkeypatch.setattr(Checkpoint, "tensor", lambda *_: pytest.fail("a weight was read"))


def _sparse(folder: Path, config: Config, fmt: str, count: int = 1) -> Path:
    return Sparse.plan(config, tensor_list(config, fmt), count).write(folder)


def _wordlevel(folder: Path, tokens: int) -> None:
    vocab = {f"t{i}": i for i in range(tokens)}
    model = {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "model": model}))


# ---------------------------------------------------------------------------------------------
# Ready


def test_stale_or_missing_quantization_section_is_a_warning(tmp_path: Path) -> None:
    stale = preflight(
        _sparse(tmp_path / "stale", {**TINY, "quantization_config": FP8_SECTION}, "int8"), ENGINE
    )
    assert stale.ready
    assert any("is stale" in warning for warning in stale.warnings)
    silent = preflight(_sparse(tmp_path / "silent", TINY, "int8"), ENGINE)
    assert silent.ready
    assert any("no quantization_config" in warning for warning in silent.warnings)


def test_schemes_are_given_by_runs_of_layers(tmp_path: Path) -> None:
    config = tiny_config(num_hidden_layers=5, first_k_dense_replace=2)
    tensors = tensor_list(config, "int8")
    bf16 = tensor_list(config, "bf16")
    for name in list(tensors):
        if ".layers.4." in name:
            del tensors[name]
    tensors |= {name: entry for name, entry in bf16.items() if ".layers.4." in name}
    report = preflight(Sparse.plan(config, tensors, 1).write(tmp_path), ENGINE)
    assert list(report.schemes) == ["0-1", "2-3", "4"]
    assert report.schemes["0-1"]["gate_up"] == "w8a8_int8"
    assert report.schemes["4"]["experts.down"] == "bf16"


# ---------------------------------------------------------------------------------------------
# Not ready


def test_every_problem_of_every_kind_is_listed(tmp_path: Path) -> None:
    tensors = tensor_list(TINY, "int8")
    del tensors["model.layers.1.self_attn.o_proj.weight_scale"]
    tensors["model.layers.2.mlp.experts.6.up_proj.weight"] = Entry("BF16", (36, 72))
    Sparse.plan(TINY, tensors, 1).write(tmp_path)
    _wordlevel(tmp_path, 301)
    report = preflight(tmp_path, ENGINE)
    assert not report.ready
    assert [problem.split(":")[0] for problem in report.problems] == [
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.2.mlp.experts.6.up_proj.weight",
        "vocab_size",
    ]


def test_problems_of_config_and_headers_are_listed_together(tmp_path: Path) -> None:
    _sparse(tmp_path, TINY, "bf16", 2)
    write_config(tmp_path, {**TINY, "n_group": 4, "num_experts_per_tok": 7})
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    os.truncate(shard, shard.stat().st_size - 1)
    problems = preflight(tmp_path, ENGINE).problems
    assert any(problem.startswith("n_group:") for problem in problems)
    assert any(problem.startswith("num_experts_per_tok:") for problem in problems)
    assert any("the file is cut off" in problem for problem in problems)


def test_quantization_that_cannot_be_met(tmp_path: Path) -> None:
    _sparse(tmp_path, TINY, "int8")
    report = preflight(tmp_path, EngineConfig(quantization="fp8", max_model_len=128))
    (problem,) = report.problems
    assert "--quantization fp8 cannot be met" in problem


def test_too_little_memory_for_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _sparse(tmp_path, CONFIGS["v3"], "int8", 163)
    monkeypatch.setattr(memory, "available_memory", lambda: 24 * 10**9)
    report = preflight(tmp_path, EngineConfig())
    (problem,) = report.problems
    assert problem.startswith("not enough memory for the model's weights: needed 67")
    assert problem.endswith(" GB, available 24.0 GB")
    assert report.memory is not None
    assert report.memory.cache is None
    assert report.weight_bytes_per_token[1] > 37e9


def test_too_little_memory_for_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _sparse(tmp_path, TINY, "bf16")
    engine = EngineConfig(max_model_len=512, kv_cache_memory_bytes=1000)
    (problem,) = preflight(tmp_path, engine).problems
    assert "latent cache" in problem


def test_tokenizer_larger_than_the_vocabulary(tmp_path: Path) -> None:
    _sparse(tmp_path, TINY, "bf16")
    _wordlevel(tmp_path, 301)
    (problem,) = preflight(tmp_path, ENGINE).problems
    assert problem == "vocab_size: expected at least the tokenizer's 301 tokens, found 300"


def test_tokenizer_much_smaller_or_absent_is_a_warning(tmp_path: Path) -> None:
    _sparse(tmp_path, TINY, "bf16")
    report = preflight(tmp_path, ENGINE)
    assert report.ready
    assert report.warnings == ["no tokenizer: the model takes and gives token ids alone"]
    _wordlevel(tmp_path, 100)
    report = preflight(tmp_path, ENGINE)
    assert report.ready
    assert report.warnings[0].startswith("the tokenizer knows 100 tokens of the model's 300")
    _wordlevel(tmp_path, 290)
    assert preflight(tmp_path, ENGINE).warnings == []


def test_damaged_tokenizer_is_a_problem(tmp_path: Path) -> None:
    _sparse(tmp_path, TINY, "bf16")
    (tmp_path / "tokenizer.json").write_text("{")
    assert not preflight(tmp_path, ENGINE).ready


def test_processor_below_the_forced_tier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from latentcore.errors import UnsupportedCpuError

    def refuse() -> str:
        raise UnsupportedCpuError("this CPU lacks AVX2")

    _sparse(tmp_path, TINY, "bf16")
    monkeypatch.setattr(module.runtime, "isa_tier", refuse)
    assert preflight(tmp_path, ENGINE).problems == ["this CPU lacks AVX2"]


def test_op_that_refuses_what_the_model_hands_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("latentcore::rms_norm: argument 'x': expected bfloat16, found float32")

    _sparse(tmp_path, TINY, "bf16")
    monkeypatch.setattr("latentcore.models.deepseek.DeepseekDecoder.forward", broken)
    (problem,) = preflight(tmp_path, ENGINE).problems
    assert "the model's code and an op disagree" in problem
    assert "latentcore::rms_norm: argument 'x'" in problem


def test_a_sampler_that_an_op_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def doubles(values: list[float]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.float64)

    _sparse(tmp_path, TINY, "bf16")
    monkeypatch.setattr("latentcore.engine.native_sampler._float32", doubles)
    (problem,) = preflight(tmp_path, ENGINE).problems
    assert problem.startswith("the sampler and an op disagree: latentcore::penalize: argument 'rep")


CORNERS = [
    EngineConfig(max_model_len=1, max_num_seqs=1),
    EngineConfig(max_model_len=2, max_num_seqs=2, max_num_batched_tokens=2),
    EngineConfig(max_model_len=65, max_num_seqs=3, max_num_batched_tokens=3),
    EngineConfig(max_model_len=512, max_num_seqs=300, max_num_batched_tokens=300),
    EngineConfig(max_model_len=64, max_num_seqs=5, use_graph=False),
]


@pytest.mark.parametrize("fmt", ["bf16", "int8", "fp8"])
@pytest.mark.parametrize("engine", CORNERS, ids=lambda e: f"{e.max_model_len}x{e.max_num_seqs}")
def test_small_limits_are_walked_too(tmp_path: Path, fmt: str, engine: EngineConfig) -> None:
    report = preflight(_sparse(tmp_path, TINY, fmt), engine)
    assert report.problems == []
    assert report.steps[-1] == f"decode of 1 to {engine.max_num_seqs} sequences"
    assert set(report.steps) <= {*PREFLIGHT_STEPS, report.steps[-1]}


def test_a_call_that_only_a_capture_makes_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The op is right about its arguments, and cannot be recorded."""

    def eager_only(decoder: DeepseekDecoder, hidden: torch.Tensor, out: StepLogits) -> None:
        dense.logits(hidden, decoder.weights.lm_head, out.values)
        ids = out.best.view(-1, 1)
        sampling.logprobs(out.values, ids, out.values[:, :1].clone(), ids, ids, out.values[:, :1])

    _sparse(tmp_path, TINY, "bf16")
    monkeypatch.setattr(DeepseekDecoder, "logits", eager_only)
    (problem,) = preflight(tmp_path, ENGINE).problems
    assert problem.startswith("the model's code and an op disagree: capture of the decode graphs:")
    assert "latentcore::logprobs: argument 'logits': expected eager execution" in problem


def test_model_code_is_checked_on_a_machine_that_is_too_small(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sparse(tmp_path, TINY, "bf16")
    monkeypatch.setattr(memory, "available_memory", lambda: 1000)
    report = preflight(tmp_path, ENGINE)
    assert len(report.problems) == 1
    assert report.steps


def test_loading_runs_the_same_checks(tmp_path: Path) -> None:
    """Everything is raised before a weight is read (the fixture fails where one is)."""
    _sparse(tmp_path, TINY, "bf16")
    _wordlevel(tmp_path, 301)
    with pytest.raises(ConfigError, match="expected at least the tokenizer's 301 tokens"):
        load_model(tmp_path, ENGINE)
    shard = next(tmp_path.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(NotReadyError) as caught:
        load_model(tmp_path, ENGINE)
    assert caught.value.problems == preflight(tmp_path, ENGINE).problems
    assert len(caught.value.problems) == 2
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="the file is cut off"):
        load_model(tmp_path, ENGINE)


CODE = "import pathlib; pathlib.Path(__file__).with_name('has-run').touch()\n"


def test_code_beside_the_weights_is_never_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Published checkpoints carry `auto_map` and modules: they are left alone, loading included."""
    monkeypatch.undo()
    names = {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
        "AutoTokenizer": ["tokenization_deepseek.Tokenizer", None],
    }
    config = {**TINY, "auto_map": names}
    write_checkpoint(tmp_path, config, random_tensors(tensor_list(config, "bf16")))
    _wordlevel(tmp_path, 300)
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"auto_map": names, "tokenizer_class": "Tokenizer"})
    )
    modules = ("configuration_deepseek", "modeling_deepseek", "tokenization_deepseek", "__init__")
    for module_name in (*modules, "sitecustomize", "torch", "tokenizers"):
        (tmp_path / f"{module_name}.py").write_text(CODE)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    monkeypatch.chdir(tmp_path)
    assert preflight(tmp_path, ENGINE).problems == []
    load_model(tmp_path, ENGINE).runner.close()
    assert not (tmp_path / "has-run").exists()
    assert not (tmp_path / "__pycache__").exists()


def test_generation_defaults_and_templates_are_checked(tmp_path: Path) -> None:
    _sparse(tmp_path, TINY, "bf16")
    (tmp_path / "generation_config.json").write_text('{"temperature": -1}')
    _wordlevel(tmp_path, 300)
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    temperature, template = preflight(tmp_path, ENGINE).problems
    assert temperature.startswith("temperature: ")
    assert template.startswith("chat template 'default' does not compile")


def test_nothing_to_check(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="no such model folder"):
        preflight(tmp_path / "absent", ENGINE)
    with pytest.raises(UnsupportedModelError, match=r"no config\.json"):
        preflight(tmp_path, ENGINE)
    write_config(tmp_path, {"model_type": "llama"})
    with pytest.raises(UnsupportedModelError, match="not a DeepSeek architecture"):
        preflight(tmp_path, ENGINE)


def test_pickles_are_named(tmp_path: Path) -> None:
    write_config(tmp_path, TINY)
    (tmp_path / "pytorch_model.bin").touch()
    (problem,) = preflight(tmp_path, ENGINE).problems
    assert "pytorch_model.bin" in problem


def test_speed_is_bandwidth_over_bytes() -> None:
    report = Report(Path(), weight_bytes_per_token={1: 4e9, 8: 1e9})
    assert report.tokens_per_second() == {}
    report.machine = module.MachineFigures("amx", 2, 40e9)
    assert report.tokens_per_second() == {1: 10.0, 8: 40.0}


def test_threads_are_as_before_after_measuring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LATENTCORE_CACHE", str(tmp_path))
    before = module.runtime.num_threads()
    figures = module.measure_machine(EngineConfig(threads=2))
    assert figures.threads == 2
    assert figures.read_bandwidth > 1e8
    assert module.runtime.num_threads() == before


def test_more_threads_than_cores_are_warned_of(tmp_path: Path) -> None:
    cores = len(runtime.topology().cores)
    folder = _sparse(tmp_path, TINY, "bf16")
    report = preflight(folder, replace(ENGINE, threads=cores + 1))
    assert report.ready
    (told,) = [text for text in report.warnings if "wait for each other" in text]
    assert told.startswith(f"{cores + 1} threads on ")
