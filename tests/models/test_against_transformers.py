"""Whole models against Hugging Face transformers, and against exact arithmetic where it has none.

For bf16 weights the truth is transformers in fp32 and the yardstick is transformers in bf16. For
int8 and FP8 weights the truth is the fp64 model with the scheme's exact quantizers, and the
yardstick the same model rounding to bf16 between its operations. A run passes when the median of
its errors over the positions is at most 1.5 times the yardstick's: medians, since a router that
tips over changes a token beyond all measure, in the yardstick as in ours.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from checkpoints import Config, write_checkpoint
from oracle import published
from oracle.distance import errors, gap, widest
from oracle.families import FAMILIES, FORMATS, Family, dequantized, in_format, prompt
from oracle.model import Model, Run, overreach
from oracle.quantizers import Tensors
from oracle.running import Piece, Sequences, loaded, recorded_routing, run

from latentcore.ops import runtime

SLACK = 1.5
LENGTHS = (1, 17, 63, 64, 65, 200)
CHUNKS = ([1], [17], [63], [33, 31], [64, 1], [70, 1, 64, 65])
"""How the prompts of LENGTHS are cut in prefill; step n runs chunk n of all of them together."""
DECODED = (1, 17, 65, 200)
"""Lengths of the sequences that are computed token by token."""
CONTINUED = (17, 65)
GENERATED = 16
"""Lengths of the prompts that are continued greedily, and by how many tokens."""

TIERS = [tier for tier in ("avx2", "avx512", "amx") if tier in runtime.cpu_features()]
OLDER = ("avx512-cascadelake", "avx512-icelake", "avx512-cooperlake")
"""Processors of the AVX-512 tier that lack BF16 instructions, VBMI, or both."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """The folder of a checkpoint, by family and format; written once."""

    @functools.cache
    def write(name: str, fmt: str) -> Path:
        return FAMILIES[name].write(tmp_path_factory.mktemp(f"{name}-{fmt}"), fmt)

    return write


Folder = Callable[[str, str], Path]


@dataclass(frozen=True)
class Truth:
    """What the logits of a token sequence are, and what a bf16 implementation makes of them."""

    logits: torch.Tensor
    yardstick: torch.Tensor

    @functools.cached_property
    def errors(self) -> torch.Tensor:
        """The yardstick's error at each position."""
        return errors(self.yardstick, self.logits)


class Oracle:
    """Truth and yardstick of one checkpoint."""

    def __init__(self, family: Family, fmt: str) -> None:
        config, tensors = family.config, family.stored(fmt)
        self.absorbed_differs = fmt in ("int8", "mixed")
        self._known: dict[tuple[int, int], Truth] = {}
        self._continued: dict[int, list[int]] = {}
        self._pinned: dict[bytes, tuple[Run, Run]] = {}
        self._exact: Callable[[list[int], int], torch.Tensor]
        self._rough: Callable[[list[int], int], torch.Tensor]
        self._model = Model(config, tensors)
        self._rounding = Model(config, tensors, rounding=True)
        if fmt == "bf16":
            fp32 = published.build(config, tensors, torch.float32)
            bf16 = published.build(config, tensors, torch.bfloat16)
            self._exact = lambda ids, _: published.logits(fp32, ids)
            self._rough = lambda ids, _: published.logits(bf16, ids)
        else:
            self._exact = self._model.logits
            self._rough = self._rounding.logits

    def prompt(self, length: int, *, absorbed_last: int) -> Truth:
        """For the prompt of `length` tokens, of which the last ones attend absorbed."""
        absorbed_from = length - (absorbed_last if self.absorbed_differs else 0)
        key = (length, absorbed_from)
        if key not in self._known:
            self._known[key] = self._truth(prompt(length), absorbed_from)
        return self._known[key]

    def continuation(self, length: int) -> list[int]:
        """The prompt of `length` tokens with GENERATED tokens more, each the truth's best."""
        if length not in self._continued:
            ids = prompt(length)
            for _ in range(GENERATED):
                ids = [*ids, int(self._exact(ids, length)[-1].argmax())]
            self._continued[length] = ids
        return self._continued[length]

    def pinned(self, ids: list[int], length: int, chosen: list[torch.Tensor]) -> tuple[Run, Run]:
        """Truth and yardstick of a prompt of `length` tokens and what follows it, by these experts.

        By the fp64 model in every format: transformers takes no experts from outside, and the two
        are held to each other by the oracles' own tests.
        """
        absorbed_from = length if self.absorbed_differs else len(ids)
        key = repr((length, [layer.tolist() for layer in chosen])).encode()
        if key not in self._pinned:
            self._pinned[key] = (
                self._model.run(ids, absorbed_from, chosen),
                self._rounding.run(ids, absorbed_from, chosen),
            )
        return self._pinned[key]

    def _truth(self, ids: list[int], absorbed_from: int) -> Truth:
        return Truth(self._exact(ids, absorbed_from), self._rough(ids, absorbed_from))


@functools.cache
def oracle(name: str, fmt: str) -> Oracle:
    return Oracle(FAMILIES[name], fmt)


# ---------------------------------------------------------------------------------------------
# Ours


def prefill(path: Path) -> list[torch.Tensor]:
    """Our logits of the prompts of LENGTHS, in chunks and together."""
    with loaded(path) as runner:
        return run(runner, [prompt(n) for n in LENGTHS], "prefill", CHUNKS)


def decode(path: Path) -> list[torch.Tensor]:
    """Our logits of the prompts of DECODED, token by token from the first, together."""
    with loaded(path) as runner:
        prompts = [prompt(n) for n in DECODED]
        return run(runner, prompts, "decode", [[1] * n for n in DECODED])


def medians(
    ours: Sequence[torch.Tensor], truths: Sequence[Truth]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Median error over all positions: ours, and the yardstick's."""
    found = torch.cat([errors(o, t.logits) for o, t in zip(ours, truths, strict=True)])
    allowed = torch.cat([t.errors for t in truths])
    return found.median(), allowed.median()


def prefill_medians(path: Path, name: str, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
    truths = [oracle(name, fmt).prompt(n, absorbed_last=0) for n in LENGTHS]
    return medians(prefill(path), truths)


def decode_medians(path: Path, name: str, fmt: str) -> tuple[torch.Tensor, torch.Tensor]:
    truths = [oracle(name, fmt).prompt(n, absorbed_last=n) for n in DECODED]
    return medians(decode(path), truths)


every_model = pytest.mark.parametrize(
    ("name", "fmt"), [(name, fmt) for name in FAMILIES for fmt in FORMATS]
)
every_tier = pytest.mark.parametrize("tier", TIERS)


# ---------------------------------------------------------------------------------------------
# As close to the truth as careful bf16


@every_model
def test_the_yardstick_is_a_few_hundredths(name: str, fmt: str) -> None:
    # Far more, and it would hide mistakes; far less, and it would ask for the impossible.
    typical = oracle(name, fmt).prompt(200, absorbed_last=0).errors.median()
    assert 0.01 < typical < (0.08 if fmt in ("bf16", "fp8") else 0.25)


@every_tier
@every_model
def test_prefill(name: str, fmt: str, tier: str, folder: Folder) -> None:
    with runtime.forced_tier(tier):
        ours = prefill(folder(name, fmt))
    truths = [oracle(name, fmt).prompt(n, absorbed_last=0) for n in LENGTHS]
    found, allowed = medians(ours, truths)
    assert found <= SLACK * allowed
    found, allowed = medians(ours[-1:], truths[-1:])
    assert found <= SLACK * allowed


@every_tier
@every_model
def test_decode(name: str, fmt: str, tier: str, folder: Folder) -> None:
    path = folder(name, fmt)
    with runtime.forced_tier(tier):
        found, allowed = decode_medians(path, name, fmt)
        assert found <= SLACK * allowed
        # The same tokens in one go: within the sum of both paths' bounds.
        decoded, at_once = decode(path)[-1], prefill(path)[-1]
    both = allowed + oracle(name, fmt).prompt(LENGTHS[-1], absorbed_last=0).errors.median()
    assert errors(decoded, at_once).median() <= SLACK * both


@pytest.mark.skipif("avx512" not in TIERS, reason="this CPU has no AVX-512")
@pytest.mark.parametrize("processor", OLDER)
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ["v2-lite", "v3-wide", "odd-sizes"])
def test_older_processors(name: str, fmt: str, processor: str, folder: Folder) -> None:
    path = folder(name, fmt)
    with runtime.forced_tier(processor):
        for measure in (prefill_medians, decode_medians):
            found, allowed = measure(path, name, fmt)
            assert found <= SLACK * allowed


@dataclass(frozen=True)
class Continued:
    """Our run over a prompt and the tokens that the truth continues it with.

    logits   of the last token of the prompt and those after it, without the last: [GENERATED, v]
    chosen   experts of each MoE layer at every position but the last: int64 [length, k] each
    """

    logits: torch.Tensor
    chosen: list[torch.Tensor]


def continued(path: Path, ids: list[int], length: int) -> Continued:
    """Ours, from the prompt of `length` tokens on one by one, told each next token."""
    with loaded(path, use_graph=False) as runner, recorded_routing() as steps:
        sequence = Sequences(runner, 1)
        rows = [sequence.step(Piece(0, ids[:length], "prefill"))[0][-1:]]
        rows += [sequence.step(Piece(0, [t], "decode"))[0] for t in ids[length:-1]]
    layers = len(steps) // GENERATED
    return Continued(torch.cat(rows), [torch.cat(steps[i::layers]) for i in range(layers)])


@dataclass(frozen=True)
class Verdict:
    """What became of the tokens of a continuation.

    lead        by how much the truth's best logit leads, the routing being ours: [tokens]
    error       of one of our logits that is still as good as bf16
    wrong       whether ours has another best: [tokens]
    overreach   how far our routers' choices were from the truth's, at every position and layer
    unsure      how far a router as good as bf16 may be
    """

    lead: torch.Tensor
    error: torch.Tensor
    wrong: torch.Tensor
    overreach: torch.Tensor
    unsure: torch.Tensor

    @property
    def lost(self) -> int:
        """Tokens that are not ours although the truth's lead is larger than the error."""
        return int(((self.lead > self.error) & self.wrong).sum())


def verdict(path: Path, name: str, fmt: str) -> Verdict:
    known = oracle(name, fmt)
    runs = []
    for length in CONTINUED:
        ids = known.continuation(length)
        ours = continued(path, ids, length)
        exact, rough = known.pinned(ids[:-1], length, ours.chosen)
        runs.append((length, ours, exact, rough))
    best = torch.cat([exact.logits[n - 1 :] for n, _, exact, _ in runs])
    rough_best = torch.cat([rough.logits[n - 1 :] for n, _, _, rough in runs])
    mine = torch.cat([ours.logits for _, ours, _, _ in runs])
    config, biased = FAMILIES[name].config, FAMILIES[name].biased
    over = [
        overreach(config, scores, chosen, biased)
        for _, ours, exact, _ in runs
        for scores, chosen in zip(exact.choice, ours.chosen, strict=True)
    ]
    off = [
        (a - b).abs().amax(dim=-1)
        for _, _, exact, rough in runs
        for a, b in zip(exact.choice, rough.choice, strict=True)
    ]
    none = torch.zeros(1, dtype=torch.float64)
    return Verdict(
        gap(best),
        SLACK * widest(rough_best, best).median(),
        mine.argmax(dim=-1) != best.argmax(dim=-1),
        torch.cat(over or [none]),
        2 * torch.cat(off or [none]).max(),
    )


@every_tier
@every_model
def test_greedy_continuation(name: str, fmt: str, tier: str, folder: Folder) -> None:
    """Wherever the best token leads by more than the error, it is ours too.

    A router is a step: two experts that score the same within bf16's error may change places, and
    what comes after is another function. So the truth is asked for the tokens that follow from
    *our* experts, and none of them may be lost; and our experts must be ones that the truth's own
    scores, being off by no more than bf16's error, would have chosen.
    """
    with runtime.forced_tier(tier):
        found = verdict(folder(name, fmt), name, fmt)
    assert (found.lead > found.error).sum() >= 5
    assert found.lost == 0
    assert found.overreach.max() <= found.unsure


@every_tier
@pytest.mark.parametrize("fmt", FORMATS)
def test_long_contexts(fmt: str, tier: str, folder: Folder) -> None:
    """Over a thousand tokens: attention in several splits, chunks on top of a long cache."""
    name, length, generated = "long", 1100, 40
    ids, known = prompt(length), oracle(name, fmt)
    with runtime.forced_tier(tier), loaded(folder(name, fmt), max_length=1152) as runner:
        sequence = Sequences(runner, 1)
        cuts = (0, 500, 1000, length - generated)
        ours = [
            sequence.step(Piece(0, ids[a:b], "prefill"))[0] for a, b in itertools.pairwise(cuts)
        ]
        ours += [sequence.step(Piece(0, [t], "decode"))[0] for t in ids[-generated:]]
    truth = known.prompt(length, absorbed_last=generated)
    for part in (slice(None), slice(-generated, None), slice(500, 600)):
        found = errors(torch.cat(ours)[part], truth.logits[part]).median()
        assert found <= SLACK * truth.errors[part].median()


# ---------------------------------------------------------------------------------------------
# What must change nothing at all


@every_tier
@pytest.mark.parametrize("fmt", FORMATS)
@pytest.mark.parametrize("name", ["v2-lite", "v3", "v3-wide", "odd-sizes"])
def test_chunks_company_and_threads_change_no_bit(
    name: str, fmt: str, tier: str, folder: Folder
) -> None:
    path, whole = folder(name, fmt), prompt(200)
    prompts = [whole[:n] for n in LENGTHS]
    with runtime.forced_tier(tier):
        with loaded(path) as runner:
            alone = run(runner, [whole], "prefill", [[200]])[0]
            decoded = run(runner, [whole], "decode", [[1] * 200])[0]
            at_once = run(runner, [whole], "decode", [[70, 1, 64, 65]])[0]
        with loaded(path, threads=2, use_graph=False) as runner:
            together = run(runner, prompts, "prefill", CHUNKS)
            slowly = run(runner, [whole[:17], whole[:66]], "decode", [[1] * 17, [1] * 66])
    for n, logits in zip(LENGTHS, together, strict=True):
        assert torch.equal(logits, alone[:n])
    assert torch.equal(at_once, decoded)
    for n, logits in zip((17, 66), slowly, strict=True):
        assert torch.equal(logits, decoded[:n])


@every_tier
@pytest.mark.parametrize("fmt", FORMATS)
def test_prompts_and_generated_tokens_share_a_step(fmt: str, tier: str, folder: Folder) -> None:
    """One sequence decodes while another reads its prompt: the same bits as one after the other."""
    first, second = prompt(65), prompt(63)
    with runtime.forced_tier(tier), loaded(folder("v3", fmt), threads=2) as runner:
        apart = Sequences(runner, 2)
        expected = [apart.step(Piece(0, first, "prefill"))[0]]
        expected += [apart.step(Piece(0, [token], "decode"))[0] for token in second[:3]]
        expected += apart.step(Piece(1, second, "prefill"))
        together = Sequences(runner, 2)
        found = together.step(Piece(0, first, "prefill"))
        other = []
        for number, token in enumerate(second[:3]):
            piece = second[21 * number : 21 * number + 21]
            prompted, generated = together.step(
                Piece(1, piece, "prefill"), Piece(0, [token], "decode")
            )
            found.append(generated)
            other.append(prompted)
        found.append(torch.cat(other))
    for one, another in zip(found, expected, strict=True):
        assert torch.equal(one, another)


@pytest.mark.parametrize("name", ["v2", "v3-wide", "odd-sizes", "router-fp32"])
@pytest.mark.parametrize(
    ("stored", "quantization", "same_as"),
    [
        ("bf16", "w8a8_int8", "int8"),
        ("bf16", "fp8", "fp8"),
        ("int8", "unquant", "int8 in bf16"),
        ("fp8", "unquant", "fp8 in bf16"),
        ("fp8", "w8a8_int8", "fp8 in bf16 in int8"),
        ("mixed", "unquant", "mixed in bf16"),
    ],
)
def test_quantizing_while_loading_is_exact(
    name: str, stored: str, quantization: str, same_as: str, folder: Folder, tmp_path: Path
) -> None:
    """The same bits as from a checkpoint that was stored so to begin with."""
    family = FAMILIES[name]
    first, *steps = same_as.split(" in ")
    tensors = family.stored(first)
    for step in steps:
        tensors = dequantized(tensors) if step == "bf16" else in_format(tensors, step)
    other = write_checkpoint(tmp_path / "other", family.config, tensors)
    results = []
    for path, asked in ((folder(name, stored), quantization), (other, "auto")):
        with loaded(path, quantization=asked) as runner:
            results.append(run(runner, [prompt(65)], "prefill", [[65]])[0])
            results.append(run(runner, [prompt(17)], "decode", [[1] * 17])[0])
    assert torch.equal(results[0], results[2])
    assert torch.equal(results[1], results[3])


# ---------------------------------------------------------------------------------------------
# What these tests see: a checkpoint changed as a mistake of ours would have it


def _rope_scaling(config: Config, **changes: float) -> Config:
    return {**config, "rope_scaling": {**config["rope_scaling"], **changes}}


def _wrong_mscale(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    return _rope_scaling(config, mscale=0.5, mscale_all_dim=0.5), tensors


def _wrong_cos_sin_scale(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    return _rope_scaling(config, mscale=config["rope_scaling"]["mscale_all_dim"]), tensors


def _no_router_bias(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    zeroed = {n: torch.zeros_like(t) for n, t in tensors.items() if "correction_bias" in n}
    return config, {**tensors, **zeroed}


def _no_groups(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    return {**config, "topk_group": config["n_group"]}, tensors


def _no_routed_scale(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    return {**config, "routed_scaling_factor": 1.0}, tensors


def _rope_in_halves(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    """Rows so that pair (i, i + half) is rotated where the checkpoint means (2i, 2i + 1)."""
    rope = config["qk_rope_head_dim"]
    head = config["qk_nope_head_dim"] + rope
    out = dict(tensors)
    for name, tensor in tensors.items():
        if ".q_proj." in name or ".q_b_proj." in name:
            heads = tensor.view(-1, head, tensor.shape[1])
            turned = heads.clone()
            turned[:, -rope:] = _interleave(heads[:, -rope:])
            out[name] = turned.view_as(tensor)
        elif "kv_a_proj_with_mqa" in name:
            out[name] = torch.cat([tensor[:-rope], _interleave(tensor[None, -rope:])[0]])
    return config, out


def _interleave(rows: torch.Tensor) -> torch.Tensor:
    """Rows 0 1 2 3 4 5 of [heads, rows, k] as 0 3 1 4 2 5."""
    heads, count, cols = rows.shape
    return rows.view(heads, 2, count // 2, cols).transpose(1, 2).reshape(heads, count, cols)


def _transposed_grids(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    turned = {
        name: tensor.t().contiguous()
        for name, tensor in tensors.items()
        if name.endswith("weight_scale_inv") and tensor.shape[0] == tensor.shape[1]
    }
    assert any(tensor.numel() > 1 for tensor in turned.values())
    return config, {**tensors, **turned}


def _scales_of_other_rows(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    rolled = {n: t.roll(1, 0) for n, t in tensors.items() if n.endswith("weight_scale")}
    return config, {**tensors, **rolled}


def _gate_for_up(config: Config, tensors: Tensors) -> tuple[Config, Tensors]:
    swapped = {
        name: tensors[name.replace("gate_proj", "up_proj")]
        for name in tensors
        if "gate_proj" in name
    }
    swapped |= {
        name: tensors[name.replace("up_proj", "gate_proj")] for name in tensors if "up_proj" in name
    }
    return config, {**tensors, **swapped}


Mistake = Callable[[Config, Tensors], tuple[Config, Tensors]]


def _mistaken(mistake: Mistake, name: str, fmt: str, folder: Path) -> Path:
    family = FAMILIES[name]
    config, tensors = mistake(family.config, family.stored(fmt))
    return write_checkpoint(folder / "mistaken", config, tensors)


@pytest.mark.parametrize(
    ("mistake", "name", "fmt"),
    [
        (_wrong_mscale, "v2-lite", "bf16"),
        (_wrong_mscale, "v3", "bf16"),
        (_wrong_mscale, "v3", "fp8"),
        (_wrong_mscale, "kimi-k2", "bf16"),
        (_wrong_cos_sin_scale, "unequal-mscale", "bf16"),
        (_no_router_bias, "v3", "bf16"),
        (_no_router_bias, "moonlight", "bf16"),
        (_no_router_bias, "five-experts", "int8"),
        (_no_groups, "v2", "bf16"),
        (_no_groups, "negative-bias", "fp8"),
        (_no_routed_scale, "moonlight", "bf16"),
        (_rope_in_halves, "v2-lite", "bf16"),
        (_rope_in_halves, "v3", "bf16"),
        (_rope_in_halves, "odd-sizes", "bf16"),
        (_transposed_grids, "v3-wide", "fp8"),
        (_scales_of_other_rows, "v3", "int8"),
        (_scales_of_other_rows, "dense", "int8"),
        (_gate_for_up, "every-expert", "bf16"),
    ],
)
def test_mistakes_are_seen(
    mistake: Mistake,
    name: str,
    fmt: str,
    tmp_path: Path,
) -> None:
    path = _mistaken(mistake, name, fmt, tmp_path)
    for measure in (prefill_medians, decode_medians):
        found, allowed = measure(path, name, fmt)
        assert found > SLACK * allowed, (found, allowed)


@pytest.mark.parametrize(
    ("mistake", "name", "fmt", "lost"),
    [
        (_wrong_mscale, "v3", "bf16", True),
        (_no_router_bias, "v3", "bf16", False),
        (_no_router_bias, "five-experts", "int8", False),
        (_no_groups, "v2", "bf16", False),
        (_no_routed_scale, "moonlight", "bf16", True),
        (_rope_in_halves, "v3", "bf16", True),
        (_transposed_grids, "v3-wide", "fp8", True),
        (_scales_of_other_rows, "v3", "int8", True),
        (_gate_for_up, "every-expert", "bf16", True),
    ],
)
def test_mistakes_are_seen_in_greedy_continuations(
    mistake: Mistake,
    name: str,
    fmt: str,
    lost: bool,
    tmp_path: Path,
) -> None:
    """Those in arithmetic cost tokens, those in routing choose what no rounding explains."""
    path = _mistaken(mistake, name, fmt, tmp_path)
    found = verdict(path, name, fmt)
    if lost:
        assert found.lost > 0
    else:
        assert found.overreach.max() > 2 * found.unsure
