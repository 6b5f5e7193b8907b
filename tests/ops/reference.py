"""The ops' meaning in fp64, with each scheme's exact quantizers, and the packed layout in Python.

Where an op rounds to bf16 or int8 between two steps, so does its reference, at the same place:
what is left between the two is the order of fp32 sums, and the roundings that this order tips over.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from latentcore.ops import packing
from latentcore.quant.packed import FP8_BLOCK, HEADER_BYTES, Format, PackedWeight

F64 = torch.float64
BF16 = torch.bfloat16


def bf16(x: torch.Tensor) -> torch.Tensor:
    """x rounded to bf16, half to even, by way of fp32."""
    return x.to(torch.float32).to(BF16)


def quantize_rows(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """bf16 rows to int8 codes (as fp64) and fp32 scales [n, 1], as activations are quantized."""
    x32 = x.to(torch.float32)
    scale = x32.abs().amax(dim=1, keepdim=True) / 127.0
    divisor = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x32 / divisor).round().clamp(-127, 127).to(F64), scale


@dataclass(frozen=True)
class Matrix:
    """One stored [rows, cols] matrix: its format, codes and scales.

    scale is fp32: [rows] (INT8, INT8_WIDE) or the grid of blocks (FP8); column_scale fp32 [cols]
    (INT8_WIDE alone).
    """

    format: Format
    codes: torch.Tensor
    scale: torch.Tensor | None = None
    column_scale: torch.Tensor | None = None

    @property
    def rows(self) -> int:
        return self.codes.shape[0]

    @property
    def cols(self) -> int:
        return self.codes.shape[1]

    def exact(self) -> torch.Tensor:
        """What the stored tensors mean: fp64 [rows, cols]."""
        codes = self.codes.to(F64)
        if self.format == Format.FP8:
            assert self.scale is not None
            grid = self.scale.to(F64)
            blocks = grid.repeat_interleave(FP8_BLOCK, 0).repeat_interleave(FP8_BLOCK, 1)
            return codes * blocks[: self.rows, : self.cols]
        if self.scale is not None:
            codes = codes * self.scale.to(F64)[:, None]
        if self.column_scale is not None:
            codes = codes * self.column_scale.to(F64)[None, :]
        return codes

    def product(self, x: torch.Tensor) -> torch.Tensor:
        """x w^T for bf16 x [n, cols]: fp64 [n, rows], what the kernel has in fp32.

        INT8 has every rounding of the kernel and is exact; the others have none.
        """
        assert x.dtype == BF16
        if self.format != Format.INT8:
            return x.to(F64) @ self.exact().t()
        assert self.scale is not None
        codes, scale = quantize_rows(x)
        sums = (codes @ self.codes.to(F64).t()).to(torch.float32)
        return (sums * scale * self.scale[None, :]).to(F64)

    def magnitude(self, x: torch.Tensor) -> torch.Tensor:
        """|x| |w|^T, what the error of a sum of cols products is bounded by: fp64 [n, rows]."""
        if self.format == Format.INT8:
            return torch.zeros(x.shape[0], self.rows, dtype=F64)
        return x.to(F64).abs() @ self.exact().abs().t()

    def head_product(self, x: torch.Tensor) -> torch.Tensor:
        """Unrounded x [n, cols] scaled along K, rounded to bf16, multiplied."""
        if self.format == Format.BF16:
            return bf16(x).to(F64) @ self.codes.to(F64).t()
        assert self.scale is not None
        assert self.column_scale is not None
        scaled = bf16(x * self.column_scale.to(F64)[None, :])
        return (scaled.to(F64) @ self.codes.to(F64).t()) * self.scale.to(F64)[None, :]


def pack(parts: Sequence[Sequence[Matrix]]) -> PackedWeight:
    """Packs stacked matrices: parts[item][part], all of one format and shape."""
    first = parts[0][0]
    weight = PackedWeight.allocate(first.format, len(parts), len(parts[0]), first.rows, first.cols)
    for item, matrices in enumerate(parts):
        for part, m in enumerate(matrices):
            pack_one(weight, item, part, m)
    return weight


def pack_one(dst: PackedWeight, item: int, part: int, m: Matrix) -> None:
    """Packs one matrix by the op of its format."""
    if m.format == Format.F32:
        packing.pack_f32(dst, item, part, m.codes)
    elif m.format == Format.BF16:
        packing.pack_bf16(dst, item, part, m.codes)
    elif m.format == Format.INT8:
        assert m.scale is not None
        packing.pack_int8(dst, item, part, m.codes, m.scale)
    elif m.format == Format.FP8:
        assert m.scale is not None
        packing.pack_fp8(dst, item, part, m.codes, m.scale)
    else:
        assert m.scale is not None
        assert m.column_scale is not None
        packing.pack_int8_wide(dst, item, m.codes, m.scale, m.column_scale)


# ---- the packed layout -----------------------------------------------------------------------

_K_MULTIPLE = {
    Format.F32: 16,
    Format.BF16: 32,
    Format.INT8: 64,
    Format.FP8: 32,
    Format.INT8_WIDE: 32,
}


def header_bytes(fmt: Format, batch: int, parts: int, rows: int, cols: int) -> bytes:
    """The first 256 bytes of a packed weight, its checksum not yet written."""
    fields = struct.pack("<8sIi4q", b"LCPACKED", 1, int(fmt), batch, parts, rows, cols)
    return fields.ljust(HEADER_BYTES, b"\0")


def item_bytes(parts: Sequence[Matrix]) -> bytes:
    """One of the stacked matrices in the packed layout, written out from its description.

    Panels of 16 rows, those of the parts alternating; in a panel K runs slowest, 64 bytes a line;
    the scales of its rows behind it; for INT8_WIDE the scales of the columns behind all panels.
    """
    fmt, rows, cols = parts[0].format, parts[0].rows, parts[0].cols
    padded = -(-cols // _K_MULTIPLE[fmt]) * _K_MULTIPLE[fmt]
    out = bytearray()
    for row0 in range(0, rows, 16):
        for m in parts:
            panel = torch.zeros(16, padded, dtype=m.codes.dtype)
            live = min(16, rows - row0)
            panel[:live, :cols] = m.codes[row0 : row0 + live]
            out += _panel_lines(fmt, panel)
            out += _panel_tail(m, panel, row0, live)
    if fmt == Format.INT8_WIDE:
        assert parts[0].column_scale is not None
        scale = torch.zeros(-(-padded // 16) * 16)
        scale[:cols] = parts[0].column_scale
        out += scale.numpy().tobytes()
    return bytes(out)


def _panel_lines(fmt: Format, panel: torch.Tensor) -> bytes:
    size = panel.element_size()
    raw = panel.contiguous().view(torch.uint8).reshape(16, -1, 4)  # row, line, 4 bytes of K
    lines = raw.permute(1, 0, 2)  # line, row, 4 bytes
    if size > 1 or fmt == Format.INT8:
        return lines.contiguous().numpy().tobytes()
    # Widened byte codes: k in pairs, rows in fours, so that unpacking low and high halves of 16
    # bytes gives pairs (k 0, 1) and (k 2, 3) of four rows each.
    by_four = lines.reshape(-1, 4, 4, 2, 2)  # line, row / 4, row % 4, pair, k of the pair
    return by_four.permute(0, 1, 3, 2, 4).contiguous().numpy().tobytes()


def _panel_tail(m: Matrix, panel: torch.Tensor, row0: int, live: int) -> bytes:
    if m.format in (Format.INT8, Format.INT8_WIDE):
        assert m.scale is not None
        scale = torch.zeros(16)
        scale[:live] = m.scale[row0 : row0 + live]
        tail = scale.numpy().tobytes()
        if m.format == Format.INT8:
            sums = panel.to(torch.int64).sum(dim=1)
            tail += (-128 * sums).to(torch.int32).numpy().tobytes()
        return tail
    if m.format == Format.FP8:
        assert m.scale is not None
        grid = m.scale[row0 // FP8_BLOCK]
        scale = torch.zeros(-(-grid.numel() // 16) * 16)
        scale[: grid.numel()] = grid
        return scale.numpy().tobytes()
    return b""


# ---- elementwise -----------------------------------------------------------------------------


def silu(x: torch.Tensor) -> torch.Tensor:
    return x / (1.0 + torch.exp(-x))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """fp64 [n, k], unrounded."""
    x = x.to(F64)
    return x / (x.square().mean(dim=1, keepdim=True) + eps).sqrt() * weight.to(F64)


def rope(x: torch.Tensor, cos_sin: torch.Tensor) -> torch.Tensor:
    """Rotates pairs (2i, 2i + 1) of x [..., dim] by cos_sin, cosines then sines."""
    half = x.shape[-1] // 2
    c, s = cos_sin[..., :half].to(F64), cos_sin[..., half:].to(F64)
    a, b = x[..., 0::2].to(F64), x[..., 1::2].to(F64)
    return torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)


def mlp(x: torch.Tensor, gate: Matrix, up: Matrix, down: Matrix) -> torch.Tensor:
    """fp64 [n, hidden], unrounded; the gated row is bf16."""
    return down.product(bf16(silu(gate.product(x)) * up.product(x)))


# ---- routing ---------------------------------------------------------------------------------


def route(
    logits: torch.Tensor,
    bias: torch.Tensor | None,
    n_group: int,
    topk_group: int,
    top_k: int,
    normalize: bool,
    factor: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """ids int64, weights fp64 [n, top_k]. With a bias: sigmoid scores, groups by their two best."""
    ids, weights = [], []
    for row in logits:
        scores = torch.softmax(row, 0) if bias is None else torch.sigmoid(row)
        choice = scores.tolist() if bias is None else (scores + bias.to(F64)).tolist()
        per = len(choice) // n_group
        groups = [sorted(choice[g * per : (g + 1) * per], reverse=True) for g in range(n_group)]
        best = [g[0] if bias is None else sum(g[:2]) for g in groups]
        kept = set(sorted(range(n_group), key=lambda g: -best[g])[:topk_group])
        allowed = [e for e in range(len(choice)) if e // per in kept]
        # sorted() is stable: equals stay in order of their index.
        chosen = sorted(allowed, key=lambda e: -choice[e])[:top_k]
        w = scores[chosen]
        ids.append(chosen)
        weights.append(w / w.sum() * factor if normalize else w * factor)
    if not ids:
        return torch.empty(0, top_k, dtype=torch.int64), torch.empty(0, top_k, dtype=F64)
    return torch.tensor(ids), torch.stack(weights)


# ---- sampling --------------------------------------------------------------------------------


def uniform(seed: int, counter: int) -> float:
    """The number in [0, 1) of a seed and counter: Philox4x32-10, 53 of its first 64 bits."""
    low = 0xFFFFFFFF
    c = [counter & low, counter >> 32 & low, 0, 0]
    key = [seed & low, seed >> 32 & low]
    for _ in range(10):
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [second >> 32 ^ c[1] ^ key[0], second & low, first >> 32 ^ c[3] ^ key[1], first & low]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return ((c[1] << 32 | c[0]) >> 11) * 2.0**-53


def sample(
    logits: torch.Tensor, temperature: float, top_k: float, top_p: float, min_p: float, at: float
) -> tuple[int, float]:
    """The token of one row (fp64) and its log-probability among those kept; `at` is the draw."""
    if temperature == 0.0:
        return int((logits == logits.max()).nonzero()[0]), 0.0
    z = (logits - logits.max()) / temperature
    keep = z >= (math.log(min_p) if min_p > 0 else float("-inf"))
    if 0 < top_k < logits.numel():
        keep &= logits >= logits.sort(descending=True).values[int(top_k) - 1]
    weights = torch.exp(z) * keep
    if top_p < 1.0:
        order = weights.argsort(descending=True)
        before = weights[order].cumsum(0) - weights[order]
        last = int((before < top_p * weights.sum()).nonzero()[-1])
        weights = weights * (weights >= weights[order[last]])
    point = at * float(weights.sum())
    token = int((weights.cumsum(0) > point).nonzero()[0])
    return token, float(torch.log(weights[token] / weights.sum()))


def checksum(data: torch.Tensor) -> int:
    """The checksum of csrc/runtime/checksum.h, of uint8 [n], as a signed number."""
    block = 256 << 10
    sums = (_block_sum(data[at : at + block], at // block) for at in range(0, len(data), block))
    total = sum(sums) % 2**64
    return total - 2**64 if total >= 2**63 else total


def _block_sum(data: torch.Tensor, index: int) -> int:
    step, mix, full = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 2**64 - 1
    n = len(data)
    lines = -(-n // 64)
    values = np.zeros((lines, 8), dtype=np.uint64)
    values.view(np.uint8).reshape(-1)[:n] = data.numpy()
    first = np.array([mix * (lane + 1) & full for lane in range(8)], dtype=np.uint64)
    keys = first + np.arange(lines, dtype=np.uint64)[:, None] * np.uint64(step)
    mixed = values ^ keys
    products = (mixed & np.uint64(2**32 - 1)) * (mixed >> np.uint64(32))
    beside = values[:, [1, 0, 3, 2, 5, 4, 7, 6]]
    h = ((index + 1) * step ^ n * mix) & full
    for value in (products + beside).sum(axis=0, dtype=np.uint64).tolist():
        h = (h ^ value) * mix & full
        h ^= h >> 29
    return (h * step ^ h >> 32) & full
