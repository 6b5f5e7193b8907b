"""Every tensor of a checkpoint gets its place in the model, or is named: by headers alone.

`resolve` compares what a ModelConfig calls for with what a checkpoint's headers offer, and returns
a `ModelPlan`: for each weight where its data lies, as what it is stored, and as what it will be
packed. The plan mirrors `models/weights.py`; the loader walks it, and all sizes follow from it.
"""

import itertools
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from latentcore.config import ModelConfig
from latentcore.errors import CheckpointError, QuantizationError
from latentcore.files import shorten
from latentcore.models.checkpoint import Checkpoint, TensorInfo
from latentcore.quant.bf16 import BF16
from latentcore.quant.packed import Format, packed_nbytes
from latentcore.quant.scheme import QuantScheme
from latentcore.quant.schemes import (
    COMPANION_SUFFIXES,
    WIDER_DTYPES,
    dtype_name,
    scheme_of,
    target_scheme,
)

PLAIN_DTYPES = (torch.bfloat16, torch.float32, torch.float16)
"""Dtypes of tensors that are never quantized: norms, router, embedding, output head."""

_IGNORED = re.compile(r"(^|\.)rotary_emb\.inv_freq$")
_LAYER = re.compile(r"^model\.layers\.(0|[1-9][0-9]{0,8})\.(.+)$")


# ---------------------------------------------------------------------------------------------
# The plan


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """One linear weight as it lies in the checkpoint: `name`.weight and companions.

    `tensors` maps each suffix (`weight`, `weight_scale`...) to its TensorInfo.
    """

    name: str
    rows: int
    cols: int
    scheme: QuantScheme
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Bytes stored, companions included."""
        return sum(info.nbytes for info in self.tensors.values())


@dataclass(frozen=True, slots=True)
class MatrixPlan:
    """One PackedWeight to be: `batch` x `parts` stored weights of [rows, cols], packed alike.

    `pieces` holds them item by item, the parts of an item side by side. `scheme` is what they are
    turned into before packing; where a piece is stored as something else, it is converted first.
    """

    pieces: tuple[StoredWeight, ...]
    batch: int
    parts: int
    rows: int
    cols: int
    scheme: QuantScheme

    @property
    def name(self) -> str:
        """The first piece's name, for messages."""
        return self.pieces[0].name

    @property
    def format(self) -> Format:
        """The packed format."""
        return self.scheme.format

    @property
    def packed_nbytes(self) -> int:
        """Bytes of the PackedWeight."""
        return packed_nbytes(self.format, self.batch, self.parts, self.rows, self.cols)

    @property
    def parameters(self) -> int:
        """Weights in all pieces, scales not counted."""
        return self.batch * self.parts * self.rows * self.cols


@dataclass(frozen=True, slots=True)
class KvbPlan:
    """`kv_b_proj`, packed three times: as a linear, and per head as w_kc and w_vc.

    w_kc is [heads][rank, nope] and w_vc is [heads][v, rank], in the scheme's `kv_b_format`.
    """

    linear: MatrixPlan
    heads: int
    nope: int
    v: int

    @property
    def rank(self) -> int:
        """Width of the latent."""
        return self.linear.cols

    @property
    def format(self) -> Format:
        """Packed format of w_kc and w_vc."""
        return self.linear.scheme.kv_b_format

    @property
    def heads_nbytes(self) -> int:
        """Bytes of w_kc and w_vc together."""
        return packed_nbytes(self.format, self.heads, 1, self.rank, self.nope) + packed_nbytes(
            self.format, self.heads, 1, self.v, self.rank
        )


@dataclass(frozen=True, slots=True)
class PlainPlan:
    """A tensor that is never quantized, stored in one of PLAIN_DTYPES."""

    info: TensorInfo

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.info.shape)


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    """One layer's attention. `q` is None where the query has a latent, else the other three are."""

    input_norm: PlainPlan
    q_a: MatrixPlan | None
    q_a_norm: PlainPlan | None
    q_b: MatrixPlan | None
    q: MatrixPlan | None
    kv_a: MatrixPlan
    kv_a_norm: PlainPlan
    kv_b: KvbPlan
    o: MatrixPlan


@dataclass(frozen=True, slots=True)
class MlpPlan:
    """A dense MLP, or a layer's shared experts."""

    gate_up: MatrixPlan
    down: MatrixPlan


@dataclass(frozen=True, slots=True)
class MoePlan:
    """A mixture of experts. `router_bias` is None for softmax routers."""

    router: PlainPlan
    router_bias: PlainPlan | None
    experts_gate_up: MatrixPlan
    experts_down: MatrixPlan
    shared: MlpPlan | None

    @property
    def router_format(self) -> Format:
        """BF16 where the router is stored so, else F32."""
        return Format.BF16 if self.router.info.dtype is torch.bfloat16 else Format.F32


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One decoder layer."""

    attention: AttentionPlan
    post_attention_norm: PlainPlan
    ffn: MlpPlan | MoePlan


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """Where every weight comes from and what becomes of it.

    `lm_head` is None where the output head is tied to the embedding. `warnings` are texts for the
    user about what was accepted although it is odd. `mtp_layers` counts the multi-token-prediction
    layers that the checkpoint holds and that are skipped on purpose.
    """

    config: ModelConfig
    embed: PlainPlan
    layers: tuple[LayerPlan, ...]
    final_norm: PlainPlan
    lm_head: PlainPlan | None
    warnings: tuple[str, ...]
    mtp_layers: int

    def matrices(self) -> Iterator[MatrixPlan]:
        """All packed linear weights, layer by layer, in the order in which they are packed."""
        for layer in self.layers:
            yield from _layer_matrices(layer)

    def plains(self) -> Iterator[PlainPlan]:
        """All tensors that are never quantized."""
        yield self.embed
        for layer in self.layers:
            yield from _layer_plains(layer)
        yield self.final_norm
        if self.lm_head is not None:
            yield self.lm_head

    def source_nbytes(self) -> int:
        """Bytes that will be read from the checkpoint."""
        return sum(info.nbytes for info in self.sources())

    def sources(self) -> Iterator[TensorInfo]:
        """Every tensor that will be read, in about the order in which that is best done."""
        yield self.embed.info
        for layer in self.layers:
            for matrix in _layer_matrices(layer):
                for piece in matrix.pieces:
                    yield from piece.tensors.values()
            for plain in _layer_plains(layer):
                yield plain.info
        yield self.final_norm.info
        if self.lm_head is not None:
            yield self.lm_head.info

    def packed_nbytes(self) -> int:
        """Bytes of all weights in memory, once packed."""
        config = self.config
        total = sum(matrix.packed_nbytes for matrix in self.matrices())
        total += sum(layer.attention.kv_b.heads_nbytes for layer in self.layers)
        for layer in self.layers:
            total += 4 * _vector_elements(layer)
            if isinstance(layer.ffn, MoePlan):
                total += self._router_nbytes(layer.ffn)
        total += 4 * self.final_norm.size
        total += 2 * self.embed.size
        return total + packed_nbytes(Format.BF16, 1, 1, config.vocab_size, config.hidden_size)

    def peak_nbytes(self) -> int:
        """Estimated peak of anonymous memory while loading: the packed weights, and the largest
        weight on its way through bfloat16 into another scheme."""
        return self.packed_nbytes() + max(
            (
                _conversion_nbytes(piece, matrix.scheme)
                for matrix in self.matrices()
                for piece in matrix.pieces
            ),
            default=0,
        )

    def parameters(self) -> int:
        """Weights of the whole model, MTP layers and scales not counted."""
        return sum(matrix.parameters for matrix in self.matrices()) + sum(
            plain.size for plain in self.plains()
        )

    def active_parameters(self) -> int:
        """Weights that one token meets: its `num_experts_per_tok` of the routed experts, and one
        row of the embedding."""
        total = self.parameters() - self.embed.size + self.config.hidden_size
        if self.lm_head is None:
            total += self.embed.size
        for layer in self.layers:
            if isinstance(layer.ffn, MoePlan):
                for matrix in (layer.ffn.experts_gate_up, layer.ffn.experts_down):
                    each = matrix.parameters // matrix.batch
                    total -= each * (matrix.batch - self.config.num_experts_per_tok)
        return total

    def weight_bytes_per_token(self, batch: int) -> float:
        """Packed bytes read in one decode step of `batch` tokens, divided by `batch`.

        Experts are taken to be chosen evenly and independently: of E, with k a token,
        E x (1 - (1 - k / E)^batch) are touched.
        """
        config = self.config
        total = float(packed_nbytes(Format.BF16, 1, 1, config.vocab_size, config.hidden_size))
        total += 4 * self.final_norm.size + 2 * config.hidden_size * batch
        for layer in self.layers:
            attention = layer.attention
            total += 4 * _vector_elements(layer) + attention.kv_b.heads_nbytes
            for matrix in (attention.q, attention.q_a, attention.q_b, attention.kv_a, attention.o):
                if matrix is not None:
                    total += matrix.packed_nbytes
            ffn = layer.ffn
            if isinstance(ffn, MlpPlan):
                total += ffn.gate_up.packed_nbytes + ffn.down.packed_nbytes
                continue
            experts = ffn.experts_gate_up.batch
            touched = 1.0 - (1.0 - config.num_experts_per_tok / experts) ** batch
            total += touched * (ffn.experts_gate_up.packed_nbytes + ffn.experts_down.packed_nbytes)
            total += self._router_nbytes(ffn)
            if ffn.shared is not None:
                total += ffn.shared.gate_up.packed_nbytes + ffn.shared.down.packed_nbytes
        return total / batch

    def schemes(self, layer: int) -> dict[str, str]:
        """How each weight of a layer is stored and run: its role to `name` or `stored -> run`."""
        plan = self.layers[layer]
        attention = plan.attention
        roles: dict[str, MatrixPlan | None] = {
            "q": attention.q,
            "q_a": attention.q_a,
            "q_b": attention.q_b,
            "kv_a": attention.kv_a,
            "kv_b": attention.kv_b.linear,
            "o": attention.o,
        }
        if isinstance(plan.ffn, MlpPlan):
            roles |= {"gate_up": plan.ffn.gate_up, "down": plan.ffn.down}
        else:
            roles |= {
                "experts.gate_up": plan.ffn.experts_gate_up,
                "experts.down": plan.ffn.experts_down,
            }
            if plan.ffn.shared is not None:
                roles |= {
                    "shared.gate_up": plan.ffn.shared.gate_up,
                    "shared.down": plan.ffn.shared.down,
                }
        return {role: _scheme_text(matrix) for role, matrix in roles.items() if matrix is not None}

    def _router_nbytes(self, moe: MoePlan) -> int:
        config = self.config
        return packed_nbytes(moe.router_format, 1, 1, config.n_routed_experts, config.hidden_size)


def _scheme_text(matrix: MatrixPlan) -> str:
    stored = sorted({piece.scheme.name for piece in matrix.pieces})
    if stored == [matrix.scheme.name]:
        return matrix.scheme.name
    return f"{'/'.join(stored)} -> {matrix.scheme.name}"


def _layer_matrices(layer: LayerPlan) -> Iterator[MatrixPlan]:
    attention = layer.attention
    for matrix in (attention.q, attention.q_a, attention.q_b):
        if matrix is not None:
            yield matrix
    yield attention.kv_a
    yield attention.kv_b.linear
    yield attention.o
    yield from _ffn_matrices(layer.ffn)


def _layer_plains(layer: LayerPlan) -> Iterator[PlainPlan]:
    yield from _layer_vectors(layer)
    if isinstance(layer.ffn, MoePlan):
        yield layer.ffn.router


def _ffn_matrices(ffn: MlpPlan | MoePlan) -> Iterator[MatrixPlan]:
    if isinstance(ffn, MlpPlan):
        yield ffn.gate_up
        yield ffn.down
        return
    yield ffn.experts_gate_up
    yield ffn.experts_down
    if ffn.shared is not None:
        yield from _ffn_matrices(ffn.shared)


def _layer_vectors(layer: LayerPlan) -> Iterator[PlainPlan]:
    attention = layer.attention
    yield attention.input_norm
    if attention.q_a_norm is not None:
        yield attention.q_a_norm
    yield attention.kv_a_norm
    yield layer.post_attention_norm
    if isinstance(layer.ffn, MoePlan) and layer.ffn.router_bias is not None:
        yield layer.ffn.router_bias


def _vector_elements(layer: LayerPlan) -> int:
    return sum(vector.size for vector in _layer_vectors(layer))


def _conversion_nbytes(piece: StoredWeight, target: QuantScheme) -> int:
    """Bytes of the bfloat16 copy and of the quantized tensors, where a piece is converted."""
    if piece.scheme is target and piece.tensors["weight"].dtype not in WIDER_DTYPES:
        return 0
    elements = piece.rows * piece.cols
    return 2 * elements + (0 if target is BF16 else target.stored_nbytes(piece.rows, piece.cols))


# ---------------------------------------------------------------------------------------------
# Resolving


def resolve(config: ModelConfig, checkpoint: Checkpoint, quantization: str) -> ModelPlan:
    """Gives every tensor of `checkpoint` its place in a model of `config`.

    Raises CheckpointError listing every tensor that is missing, left over, of the wrong shape or of
    a dtype (with its companions) that fits no scheme; QuantizationError where the checkpoint is
    sound but `quantization` (one of QUANTIZATIONS) cannot be met. No weight is read.
    """
    return _Resolver(config, checkpoint, quantization).run()


class _Resolver:
    """Takes tensors out of the checkpoint one by one and notes every problem on the way."""

    def __init__(self, config: ModelConfig, checkpoint: Checkpoint, quantization: str) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.quantization = quantization
        self.unused = dict(checkpoint.tensors)
        self.problems: list[str] = []
        self.refused: list[str] = []
        self.warnings: list[str] = []
        self.rounded: list[str] = []
        self.mixed: list[str] = []
        self.stored: Counter[str] = Counter()
        self.companions = self._companions_by_weight()

    def run(self) -> ModelPlan:
        config = self.config
        self.refuse_absurd()
        h, vocab = config.hidden_size, config.vocab_size
        embed = self.plain("model.embed_tokens.weight", (vocab, h))
        layers = tuple(self.layer(i) for i in range(config.num_hidden_layers))
        final_norm = self.plain("model.norm.weight", (h,))
        lm_head: PlainPlan | None = None
        if config.tie_word_embeddings:
            if "lm_head.weight" in self.unused:
                self.plain("lm_head.weight", (vocab, h))
        else:
            lm_head = self.plain("lm_head.weight", (vocab, h))
        mtp_layers = self.skip_mtp()
        self.left_over()
        if self.problems:
            raise CheckpointError(self.problems, where=str(self.checkpoint.path))
        if self.refused:
            raise QuantizationError(self.refusal())
        self.compare_with_config()
        if self.rounded:
            self.warnings.append(_several(self.rounded, "rounded to bfloat16"))
        self.warnings += self.mixed
        return ModelPlan(
            config=config,
            embed=embed,
            layers=layers,
            final_norm=final_norm,
            lm_head=lm_head,
            warnings=tuple(self.warnings),
            mtp_layers=mtp_layers,
        )

    def refuse_absurd(self) -> None:
        """Stops early where the config calls for many times the tensors that there are."""
        config = self.config
        layers = config.num_hidden_layers
        moe_layers = sum(config.is_moe_layer(i) for i in range(layers))
        expected = layers * 8 + moe_layers * config.n_routed_experts * 3
        found = len(self.unused)
        if expected > 4 * found + 10_000:
            raise CheckpointError(
                f"config.json calls for at least {expected} tensors ({layers} layers, "
                f"{config.n_routed_experts} experts), found {found}",
                where=str(self.checkpoint.path),
            )

    # One layer

    def layer(self, index: int) -> LayerPlan:
        prefix = f"model.layers.{index}"
        return self.decoder_layer(prefix, moe=self.config.is_moe_layer(index))

    def decoder_layer(self, prefix: str, *, moe: bool) -> LayerPlan:
        h = self.config.hidden_size
        return LayerPlan(
            attention=self.attention(prefix),
            post_attention_norm=self.plain(f"{prefix}.post_attention_layernorm.weight", (h,)),
            ffn=(
                self.moe(f"{prefix}.mlp")
                if moe
                else self.mlp(f"{prefix}.mlp", self.config.intermediate_size)
            ),
        )

    def attention(self, prefix: str) -> AttentionPlan:
        config = self.config
        h, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
        attn = f"{prefix}.self_attn"
        q_rows = heads * config.qk_head_dim
        q_rank = config.q_lora_rank
        v = config.v_head_dim
        kv_b_rows = heads * (config.qk_nope_head_dim + v)
        return AttentionPlan(
            input_norm=self.plain(f"{prefix}.input_layernorm.weight", (h,)),
            q_a=self.single(f"{attn}.q_a_proj", q_rank, h) if q_rank else None,
            q_a_norm=self.plain(f"{attn}.q_a_layernorm.weight", (q_rank,)) if q_rank else None,
            q_b=self.single(f"{attn}.q_b_proj", q_rows, q_rank) if q_rank else None,
            q=None if q_rank else self.single(f"{attn}.q_proj", q_rows, h),
            kv_a=self.single(f"{attn}.kv_a_proj_with_mqa", config.latent_dim, h),
            kv_a_norm=self.plain(f"{attn}.kv_a_layernorm.weight", (rank,)),
            kv_b=KvbPlan(
                linear=self.single(f"{attn}.kv_b_proj", kv_b_rows, rank),
                heads=heads,
                nope=config.qk_nope_head_dim,
                v=v,
            ),
            o=self.single(f"{attn}.o_proj", h, heads * v),
        )

    def mlp(self, prefix: str, width: int) -> MlpPlan:
        h = self.config.hidden_size
        gate_up = [self.weight(f"{prefix}.{p}_proj", width, h) for p in ("gate", "up")]
        return MlpPlan(
            gate_up=self.matrix(gate_up, batch=1, parts=2),
            down=self.single(f"{prefix}.down_proj", h, width),
        )

    def moe(self, prefix: str) -> MoePlan:
        config = self.config
        h, width, experts = (
            config.hidden_size,
            config.moe_intermediate_size,
            config.n_routed_experts,
        )
        gate_up: list[StoredWeight] = []
        down: list[StoredWeight] = []
        for expert in range(experts):
            name = f"{prefix}.experts.{expert}"
            gate_up.append(self.weight(f"{name}.gate_proj", width, h))
            gate_up.append(self.weight(f"{name}.up_proj", width, h))
            down.append(self.weight(f"{name}.down_proj", h, width))
        bias = f"{prefix}.gate.e_score_correction_bias"
        shared = config.n_shared_experts * width
        return MoePlan(
            router=self.plain(f"{prefix}.gate.weight", (experts, h)),
            router_bias=self.plain(bias, (experts,)) if config.router.has_bias else None,
            experts_gate_up=self.matrix(gate_up, batch=experts, parts=2),
            experts_down=self.matrix(down, batch=experts, parts=1),
            shared=self.mlp(f"{prefix}.shared_experts", shared) if shared else None,
        )

    # One tensor

    def take(self, name: str, shape: tuple[int, ...], dtypes: str) -> TensorInfo:
        """Removes tensor `name` from the unused ones; a stand-in where it is missing."""
        info = self.unused.pop(name, None)
        if info is None:
            self.problems.append(f"{name}: missing; expected {dtypes} {list(shape)}")
            return TensorInfo(name, torch.bfloat16, shape, self.checkpoint.path, 0, 0)
        if info.shape != shape:
            self.problems.append(f"{name}: expected shape {list(shape)}, found {list(info.shape)}")
        return info

    def plain(self, name: str, shape: tuple[int, ...]) -> PlainPlan:
        """A tensor that is never quantized."""
        info = self.take(name, shape, "BF16 or F32")
        if info.dtype not in PLAIN_DTYPES:
            self.problems.append(
                f"{name}: expected dtype BF16, F32 or F16 (this tensor is never quantized), "
                f"found {dtype_name(info.dtype)}"
            )
        elif info.dtype in WIDER_DTYPES and len(shape) == 2 and ".mlp.gate." not in name:
            self.rounded.append(name)
        return PlainPlan(info)

    def weight(self, name: str, rows: int, cols: int) -> StoredWeight:
        """A linear weight, as whatever scheme its tensors say."""
        weight_name = f"{name}.weight"
        if weight_name not in self.unused:
            for suffix in self.companions.get(name, ()):
                self.unused.pop(f"{name}.{suffix}", None)
            self.problems.append(f"{weight_name}: missing; expected shape [{rows}, {cols}]")
            return StoredWeight(name, rows, cols, BF16, {})
        info = self.take(weight_name, (rows, cols), "")
        found = self.companions.get(name, ())
        scheme = scheme_of(info.dtype, found)
        if isinstance(scheme, str):
            for suffix in found:
                self.unused.pop(f"{name}.{suffix}", None)
            self.problems.append(f"{weight_name}: {scheme}")
            return StoredWeight(name, rows, cols, BF16, {"weight": info})
        tensors = {"weight": info}
        for companion in scheme.companions:
            shape = companion.shape(rows, cols)
            other = self.take(f"{name}.{companion.suffix}", shape, dtype_name(companion.dtype))
            if other.dtype is not companion.dtype:
                self.problems.append(
                    f"{other.name}: expected dtype {dtype_name(companion.dtype)} beside a weight "
                    f"of {dtype_name(info.dtype)} ({scheme.name}), found {dtype_name(other.dtype)}"
                )
            tensors[companion.suffix] = other
        self.stored[scheme.name] += 1
        if info.dtype in WIDER_DTYPES:
            self.rounded.append(weight_name)
        return StoredWeight(name, rows, cols, scheme, tensors)

    def single(self, name: str, rows: int, cols: int) -> MatrixPlan:
        return self.matrix([self.weight(name, rows, cols)], batch=1, parts=1)

    def matrix(self, pieces: list[StoredWeight], *, batch: int, parts: int) -> MatrixPlan:
        """Joins weights into one packed matrix; where their schemes differ, in bfloat16."""
        first = pieces[0]
        targets: list[QuantScheme] = []
        for piece in pieces:
            target = target_scheme(piece.scheme, self.quantization)
            if target is None:
                self.refused.append(f"{piece.name}.weight ({piece.scheme.name})")
            else:
                targets.append(target)
        scheme = targets[0] if targets else BF16
        if any(target is not scheme for target in targets):
            names = sorted({target.name for target in targets})
            last = pieces[-1]
            self.mixed.append(
                f"{first.name} to {last.name} are packed together but stored as "
                f"{' and '.join(names)}: they run in bf16"
            )
            scheme = BF16
        return MatrixPlan(tuple(pieces), batch, parts, first.rows, first.cols, scheme)

    # The rest

    def skip_mtp(self) -> int:
        """Checks and drops the multi-token-prediction layers, all or none of each being there."""
        config = self.config
        first = config.num_hidden_layers
        count = max(1, config.num_nextn_predict_layers) if config.n_routed_experts else 0
        groups: dict[int, list[str]] = {}
        for name in self.unused:
            match = _LAYER.match(name)
            if match and first <= int(match[1]) < first + count:
                groups.setdefault(int(match[1]), []).append(name)
        h, vocab = config.hidden_size, config.vocab_size
        for index in sorted(groups):
            prefix = f"model.layers.{index}"
            problems_before, refused, stored = self.problems, self.refused, self.stored
            rounded, mixed = self.rounded, self.mixed
            self.problems, self.refused, self.stored = [], [], Counter()
            self.rounded, self.mixed = [], []
            self.decoder_layer(prefix, moe=True)
            self.plain(f"{prefix}.enorm.weight", (h,))
            self.plain(f"{prefix}.hnorm.weight", (h,))
            self.weight(f"{prefix}.eh_proj", h, 2 * h)
            self.plain(f"{prefix}.shared_head.norm.weight", (h,))
            for shared in ("embed_tokens.weight", "shared_head.head.weight"):
                if f"{prefix}.{shared}" in self.unused:  # else those of the model itself
                    self.plain(f"{prefix}.{shared}", (vocab, h))
            found, self.problems = self.problems, problems_before
            self.refused, self.stored = refused, stored
            self.rounded, self.mixed = rounded, mixed
            self.problems += [f"{problem} (multi-token-prediction layer)" for problem in found]
        return len(groups)

    def left_over(self) -> None:
        for name, info in self.unused.items():
            if not _IGNORED.search(name):
                self.problems.append(
                    f"{shorten(name, 120)}: left over; a {self.config.model_type} model of this "
                    f"config has no such tensor (found {dtype_name(info.dtype)} "
                    f"{list(info.shape)} in {info.file.name})"
                )

    def refusal(self) -> str:
        return (
            f"--quantization {self.quantization} cannot be met: "
            f"{_several(self.refused, 'cannot be turned into it')}; use auto or unquant"
        )

    def compare_with_config(self) -> None:
        """Warns where `quantization_config` does not say what the tensors are."""
        section = self.config.quantization_config
        claimed: str | None = None
        if section is not None:
            method = section.get("quant_method")
            claimed = _CLAIMS.get(method, "another format") if isinstance(method, str) else None
        quantized = sorted(name for name in self.stored if name != BF16.name)
        tensors = " and ".join(quantized) or BF16.name
        if section is None and quantized:
            self.warnings.append(
                f"config.json has no quantization_config, but weights are stored as {tensors}: "
                f"the tensors decide"
            )
        elif section is not None and claimed not in quantized:
            found = shorten(str(section.get("quant_method")))
            self.warnings.append(
                f"config.json's quantization_config ({found}) is stale: weights are stored as "
                f"{tensors}, and the tensors decide"
            )

    def _companions_by_weight(self) -> dict[str, tuple[str, ...]]:
        """The suffixes of all known companions that stand beside each weight."""
        table: dict[str, tuple[str, ...]] = {}
        suffixes = frozenset(COMPANION_SUFFIXES)
        for name in self.unused:
            base, _, suffix = name.rpartition(".")
            if suffix in suffixes:
                table[base] = (*table.get(base, ()), suffix)
        return table


_CLAIMS: Mapping[str, str] = {
    "fp8": "fp8",
    "compressed-tensors": "w8a8_int8",
    "w8a8_int8": "w8a8_int8",
}
"""What each known `quant_method` says the weights are, by scheme name."""


def _several(names: Iterable[str], what: str) -> str:
    names = list(names)
    shown = ", ".join(itertools.islice(names, 2))
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return f"{shown}{more}: {what}"
