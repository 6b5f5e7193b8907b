"""Carries out a ModelPlan: maps the checkpoint, packs every weight, lets go of it behind itself.

The packing itself is native and uses all threads; this module only walks the plan. Memory beyond
the packed weights is one weight at a time where it is converted, and none where it is packed as it
is stored. Pages of the map are page cache, which the system takes back when it needs to.
"""

import logging
from collections.abc import Callable, Iterator

import torch

from latentcore.errors import CheckpointError
from latentcore.layers.weights import (
    AttentionWeights,
    LayerWeights,
    MlpWeights,
    ModelWeights,
    MoeWeights,
)
from latentcore.models.checkpoint import Checkpoint, TensorInfo
from latentcore.models.memory import require_memory
from latentcore.models.resolve import (
    AttentionPlan,
    KvbPlan,
    LayerPlan,
    MatrixPlan,
    MlpPlan,
    ModelPlan,
    MoePlan,
    PlainPlan,
    StoredWeight,
)
from latentcore.ops import packing
from latentcore.quant.packed import Format, PackedWeight
from latentcore.quant.scheme import QuantScheme, StoredTensors
from latentcore.quant.schemes import convert

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with bytes read so far and bytes in all, after each tensor."""

_READ_AHEAD_BYTES = 256 << 20
"""How much of the checkpoint the system is asked to read before it is needed."""


def load_weights(
    plan: ModelPlan, checkpoint: Checkpoint, progress: Progress | None
) -> ModelWeights:
    """Reads and packs all weights of `plan` from `checkpoint`.

    The plan's warnings are logged. Raises InsufficientMemoryError before anything is read when the
    memory at hand is less than the plan's peak, and CheckpointError naming a tensor whose scales
    (or norm, or router) hold NaN or infinity.
    """
    for warning in plan.warnings:
        logger.warning("%s", warning)
    require_memory(plan.peak_nbytes(), "the model's weights")
    return _Loader(plan, checkpoint, progress).run()


class _Loader:
    def __init__(self, plan: ModelPlan, checkpoint: Checkpoint, progress: Progress | None) -> None:
        self.plan = plan
        self.checkpoint = checkpoint
        self.progress = progress
        self.total = plan.source_nbytes()
        self.done = 0
        self.ahead = 0
        self.upcoming: Iterator[TensorInfo] = plan.sources()

    def run(self) -> ModelWeights:
        plan = self.plan
        embed = self.embedding(plan.embed)
        layers = [self.layer(layer) for layer in plan.layers]
        final_norm = self.vector(plan.final_norm)
        if plan.lm_head is None:
            lm_head = self.pack_plain(plan.embed.info, embed, Format.BF16)
        else:
            source = self.read(plan.lm_head.info)
            lm_head = self.pack_plain(plan.lm_head.info, source, Format.BF16)
            self.finish(plan.lm_head.info)
        return ModelWeights(embed=embed, layers=layers, final_norm=final_norm, lm_head=lm_head)

    def layer(self, plan: LayerPlan) -> LayerWeights:
        return LayerWeights(
            attention=self.attention(plan.attention),
            post_attention_norm=self.vector(plan.post_attention_norm),
            ffn=self.moe(plan.ffn) if isinstance(plan.ffn, MoePlan) else self.mlp(plan.ffn),
        )

    def attention(self, plan: AttentionPlan) -> AttentionWeights:
        kv_b, w_kc, w_vc = self.kv_b(plan.kv_b)
        return AttentionWeights(
            input_norm=self.vector(plan.input_norm),
            q_a=self.matrix(plan.q_a) if plan.q_a else None,
            q_a_norm=self.vector(plan.q_a_norm) if plan.q_a_norm else None,
            q_b=self.matrix(plan.q_b) if plan.q_b else None,
            q=self.matrix(plan.q) if plan.q else None,
            kv_a=self.matrix(plan.kv_a),
            kv_a_norm=self.vector(plan.kv_a_norm),
            kv_b=kv_b,
            w_kc=w_kc,
            w_vc=w_vc,
            o=self.matrix(plan.o),
        )

    def mlp(self, plan: MlpPlan) -> MlpWeights:
        return MlpWeights(gate_up=self.matrix(plan.gate_up), down=self.matrix(plan.down))

    def moe(self, plan: MoePlan) -> MoeWeights:
        router = self.pack_plain(plan.router.info, self.read(plan.router.info), plan.router_format)
        self.finish(plan.router.info)
        return MoeWeights(
            router=router,
            router_bias=self.vector(plan.router_bias) if plan.router_bias else None,
            experts_gate_up=self.matrix(plan.experts_gate_up),
            experts_down=self.matrix(plan.experts_down),
            shared=self.mlp(plan.shared) if plan.shared else None,
        )

    # Single weights

    def matrix(self, plan: MatrixPlan) -> PackedWeight:
        packed = PackedWeight.allocate(plan.format, plan.batch, plan.parts, plan.rows, plan.cols)
        for index, piece in enumerate(plan.pieces):
            item, part = divmod(index, plan.parts)
            plan.scheme.pack(packed, item, part, self.stored(piece, plan.scheme))
            self.finish_weight(piece)
        return packed

    def kv_b(self, plan: KvbPlan) -> tuple[PackedWeight, PackedWeight, PackedWeight]:
        linear, scheme = plan.linear, plan.linear.scheme
        packed = PackedWeight.allocate(scheme.format, 1, 1, linear.rows, linear.cols)
        w_kc = PackedWeight.allocate(plan.format, plan.heads, 1, plan.rank, plan.nope)
        w_vc = PackedWeight.allocate(plan.format, plan.heads, 1, plan.v, plan.rank)
        (piece,) = linear.pieces
        tensors = self.stored(piece, scheme)
        scheme.pack(packed, 0, 0, tensors)
        scheme.pack_kv_b(w_kc, w_vc, tensors, plan.nope, plan.v)
        self.finish_weight(piece)
        return packed, w_kc, w_vc

    def pack_plain(self, info: TensorInfo, source: torch.Tensor, form: Format) -> PackedWeight:
        """Packs a matrix that is never quantized, [rows, cols], as F32 or BF16."""
        rows, cols = info.shape
        packed = PackedWeight.allocate(form, 1, 1, rows, cols)
        if form is Format.F32:
            packing.pack_f32(packed, 0, 0, source.to(torch.float32))
        else:
            packing.pack_bf16(packed, 0, 0, source.to(torch.bfloat16))
        return packed

    def vector(self, plan: PlainPlan) -> torch.Tensor:
        """A norm or a bias as float32."""
        values = self.read(plan.info).to(torch.float32, copy=True)
        if not bool(torch.isfinite(values).all()):
            raise CheckpointError(
                f"{plan.info.name}: expected finite numbers, found NaN or infinity",
                where=str(plan.info.file),
            )
        self.finish(plan.info)
        return values

    def embedding(self, plan: PlainPlan) -> torch.Tensor:
        values = self.read(plan.info).to(torch.bfloat16, copy=True)
        self.finish(plan.info)
        return values

    # Reading

    def stored(self, piece: StoredWeight, target: QuantScheme) -> StoredTensors:
        """The tensors of one weight, turned into those of `target`."""
        tensors = {suffix: self.read(info) for suffix, info in piece.tensors.items()}
        bad = piece.scheme.bad_companion(tensors)
        if bad is not None:
            info = piece.tensors[bad]
            raise CheckpointError(
                f"{info.name}: expected finite scales, found NaN or infinity; the file is damaged",
                where=str(info.file),
            )
        return convert(tensors, piece.scheme, target)

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The mapped data of a tensor; asks for what comes after it to be read ahead."""
        while self.ahead < min(self.done + _READ_AHEAD_BYTES, self.total):
            following = next(self.upcoming, None)
            if following is None:
                break
            self.checkpoint.prefetch(following.name)
            self.ahead += following.nbytes
        return self.checkpoint.tensor(info.name)

    def finish_weight(self, piece: StoredWeight) -> None:
        for info in piece.tensors.values():
            self.finish(info)

    def finish(self, info: TensorInfo) -> None:
        """Lets go of a tensor's mapped pages and reports it."""
        self.checkpoint.release(info.name)
        self.done += info.nbytes
        if self.progress is not None:
            self.progress(self.done, self.total)
