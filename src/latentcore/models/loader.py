"""Carries out a ModelPlan: reads the packed weights from the cache, or packs the checkpoint.

Packing maps the checkpoint, packs every weight natively on all threads and lets go of it behind
itself; memory beyond the packed weights is one weight at a time where it is converted, and none
where it is packed as it is stored. Pages of the map are page cache, which the system takes back
when it needs to.
"""

import logging
from collections.abc import Callable, Iterator

import torch

from latentcore.errors import CheckpointError, UserError
from latentcore.layers.weights import (
    AttentionWeights,
    LayerWeights,
    MlpWeights,
    ModelWeights,
    MoeWeights,
)
from latentcore.models import packed_cache
from latentcore.models.checkpoint import Checkpoint, TensorInfo
from latentcore.models.memory import require_memory
from latentcore.models.packed_cache import DamagedPackError, Pack, PackReader, PackWriter
from latentcore.models.parts import Anonymous, Part, assemble, buffers_of, parts_of
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
from latentcore.ops import packing, storage
from latentcore.quant.packed import Format, PackedWeight
from latentcore.quant.scheme import QuantScheme, StoredTensors
from latentcore.quant.schemes import convert_finite

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]
"""Called with bytes done so far and bytes in all: read, and written to the packed cache."""

_READ_AHEAD_BYTES = 256 << 20
"""How much of the checkpoint the system is asked to read before it is needed."""


def load_weights(
    plan: ModelPlan, checkpoint: Checkpoint, progress: Progress | None
) -> ModelWeights:
    """All weights of `plan`: from the packed cache, or read and packed from `checkpoint`, and then
    kept in the cache where the model is large enough.

    The plan's warnings are logged. Raises InsufficientMemoryError before anything is read when the
    memory at hand is less than the plan's peak, and CheckpointError naming a tensor whose scales
    (or norm, or router) hold NaN or infinity.
    """
    for warning in plan.warnings:
        logger.warning("%s", warning)
    require_memory(plan.peak_nbytes(), "the model's weights")
    if not packed_cache.keeps(plan):
        return assemble(_Packer(plan, checkpoint, _Count(plan.source_nbytes(), progress)).parts())
    pack = packed_cache.pack_of(plan, checkpoint)
    if pack.exists():
        try:
            return assemble(_read(plan, pack, progress))
        except DamagedPackError as error:
            logger.warning("%s: %s; the checkpoint is packed again", pack.path, error)
    return assemble(_pack_and_keep(plan, checkpoint, pack, progress))


def pack_ahead(
    plan: ModelPlan, checkpoint: Checkpoint, progress: Progress | None
) -> tuple[Pack, bool]:
    """Makes the pack of a checkpoint, whatever its size, holding one layer at a time in memory.

    Returns the pack, and whether it was there before: then it was read, and found sound. Raises
    UserError where it cannot be kept, with the reason in the log, and CheckpointError as
    `load_weights` does.
    """
    pack = packed_cache.pack_of(plan, checkpoint)
    if pack.exists():
        try:
            for _ in _read(plan, pack, progress):
                pass
            return pack, True
        except DamagedPackError as error:
            logger.warning("%s: %s; the checkpoint is packed again", pack.path, error)
    for _ in _pack_and_keep(plan, checkpoint, pack, progress):
        pass
    if not pack.exists():
        raise UserError(f"{pack.model}: its packed weights could not be kept")
    return pack, False


def _read(plan: ModelPlan, pack: Pack, progress: Progress | None) -> Iterator[tuple[str, Part]]:
    count = _Count(plan.packed_nbytes(), progress)
    with PackReader(pack) as reader:
        for name, part in parts_of(plan, Anonymous()):
            reader.read(name, part, count.add)
            yield name, part


def _pack_and_keep(
    plan: ModelPlan, checkpoint: Checkpoint, pack: Pack, progress: Progress | None
) -> Iterator[tuple[str, Part]]:
    writer = PackWriter.open(pack)
    if writer is None:
        yield from _Packer(plan, checkpoint, _Count(plan.source_nbytes(), progress)).parts()
        return
    source = plan.source_nbytes()
    count = _Count(source + plan.packed_nbytes(), progress, shown=source)
    with writer:
        for name, part in _Packer(plan, checkpoint, count).parts():
            writer.write(name, part, count.add)
            yield name, part
        writer.finish(checkpoint)


class _Count:
    """Counts bytes and passes them on, as their share of the `shown` bytes where that is not all:
    what is loaded is as large as the model, also where it is written too."""

    def __init__(self, total: int, progress: Progress | None, *, shown: int | None = None) -> None:
        self.total = total
        self.done = 0
        self._shown = total if shown is None else shown
        self._progress = progress

    def add(self, nbytes: int) -> None:
        self.done += nbytes
        if self._progress is not None:
            self._progress(self.done * self._shown // self.total, self._shown)


class _Packer:
    """Fills the parts of a model from a checkpoint."""

    def __init__(self, plan: ModelPlan, checkpoint: Checkpoint, count: _Count) -> None:
        self.plan = plan
        self.checkpoint = checkpoint
        self.count = count
        self.read_nbytes = 0
        self.ahead = 0
        self.upcoming: Iterator[TensorInfo] = plan.sources()

    def parts(self) -> Iterator[tuple[str, Part]]:
        plan = self.plan
        parts = parts_of(plan, Anonymous())
        name, embed = next(parts)
        assert isinstance(embed, torch.Tensor)
        self.plain(plan.embed, embed)
        yield name, embed
        if plan.lm_head is not None:
            del embed
        for layer in plan.layers:
            name, part = next(parts)
            assert isinstance(part, LayerWeights)
            self.layer(layer, part)
            yield name, part
            del part
        name, norm = next(parts)
        assert isinstance(norm, torch.Tensor)
        self.vector(plan.final_norm, norm)
        yield name, norm
        name, head = next(parts)
        assert isinstance(head, PackedWeight)
        if plan.lm_head is None:
            self.pack_plain(embed, head)
        else:
            self.pack_plain(self.read(plan.lm_head.info), head)
            self.finish(plan.lm_head.info)
        yield name, head

    def layer(self, plan: LayerPlan, to: LayerWeights) -> None:
        # Memory comes to lie with its owners, whoever fills it.
        for buffer in buffers_of("", to):
            storage.touch(buffer.data, buffer.groups)
        self.attention(plan.attention, to.attention)
        self.vector(plan.post_attention_norm, to.post_attention_norm)
        if isinstance(plan.ffn, MoePlan):
            assert isinstance(to.ffn, MoeWeights)
            self.moe(plan.ffn, to.ffn)
        else:
            assert isinstance(to.ffn, MlpWeights)
            self.mlp(plan.ffn, to.ffn)

    def attention(self, plan: AttentionPlan, to: AttentionWeights) -> None:
        self.vector(plan.input_norm, to.input_norm)
        self.matrix(plan.q_a, to.q_a)
        self.vector(plan.q_a_norm, to.q_a_norm)
        self.matrix(plan.q_b, to.q_b)
        self.matrix(plan.q, to.q)
        self.matrix(plan.kv_a, to.kv_a)
        self.vector(plan.kv_a_norm, to.kv_a_norm)
        self.kv_b(plan.kv_b, to)
        self.matrix(plan.o, to.o)

    def mlp(self, plan: MlpPlan, to: MlpWeights) -> None:
        self.matrix(plan.gate_up, to.gate_up)
        self.matrix(plan.down, to.down)

    def moe(self, plan: MoePlan, to: MoeWeights) -> None:
        self.pack_plain(self.read(plan.router.info), to.router)
        self.finish(plan.router.info)
        self.vector(plan.router_bias, to.router_bias)
        self.matrix(plan.experts_gate_up, to.experts_gate_up)
        self.matrix(plan.experts_down, to.experts_down)
        if plan.shared is not None and to.shared is not None:
            self.mlp(plan.shared, to.shared)

    # Single weights; where the plan has none, there is nothing to fill either.

    def matrix(self, plan: MatrixPlan | None, packed: PackedWeight | None) -> None:
        if plan is None or packed is None:
            return
        for index, piece in enumerate(plan.pieces):
            item, part = divmod(index, plan.parts)
            plan.scheme.pack(packed, item, part, self.stored(piece, plan.scheme))
            self.finish_weight(piece)

    def kv_b(self, plan: KvbPlan, to: AttentionWeights) -> None:
        scheme = plan.linear.scheme
        (piece,) = plan.linear.pieces
        tensors = self.stored(piece, scheme)
        scheme.pack(to.kv_b, 0, 0, tensors)
        scheme.pack_kv_b(to.w_kc, to.w_vc, tensors, plan.nope, plan.v)
        self.finish_weight(piece)

    def pack_plain(self, source: torch.Tensor, packed: PackedWeight) -> None:
        """Packs a matrix that is never quantized, [rows, cols], as F32 or BF16."""
        if packed.format is Format.F32:
            packing.pack_f32(packed, 0, 0, source.to(torch.float32))
        else:
            packing.pack_bf16(packed, 0, 0, source.to(torch.bfloat16))

    def vector(self, plan: PlainPlan | None, to: torch.Tensor | None) -> None:
        """A norm or a bias, as float32."""
        if plan is None or to is None:
            return
        self.plain(plan, to)
        if not bool(torch.isfinite(to).all()):
            raise CheckpointError(
                f"{plan.info.name}: expected finite numbers, found NaN or infinity",
                where=str(plan.info.file),
            )

    def plain(self, plan: PlainPlan, to: torch.Tensor) -> None:
        to.copy_(self.read(plan.info).view(to.shape))
        self.finish(plan.info)

    # Reading

    def stored(self, piece: StoredWeight, target: QuantScheme) -> StoredTensors:
        """The tensors of one weight, turned into those of `target`."""
        tensors = {suffix: self.read(info) for suffix, info in piece.tensors.items()}
        info = piece.tensors["weight"]
        name = info.name.removesuffix(".weight")
        return convert_finite(name, str(info.file), tensors, piece.scheme, target)

    def read(self, info: TensorInfo) -> torch.Tensor:
        """The mapped data of a tensor; asks for what comes after it to be read ahead."""
        while self.ahead < self.read_nbytes + _READ_AHEAD_BYTES:
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
        self.read_nbytes += info.nbytes
        self.count.add(info.nbytes)
