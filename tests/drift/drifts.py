"""Ways in which kernel, schema, wrapper, weights and call sites come apart."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Edit:
    """One place of one file: `old` must stand there exactly once."""

    file: str
    old: str
    new: str


@dataclass(frozen=True)
class Drift:
    """A mistake that somebody could make and not see."""

    name: str
    edits: tuple[Edit, ...]

    @property
    def native(self) -> bool:
        """Whether the library has to be rebuilt."""
        return any(edit.file.startswith("csrc/") for edit in self.edits)


def drift(name: str, *edits: tuple[str, str, str]) -> Drift:
    """A drift of (file, old, new)."""
    return Drift(name, tuple(Edit(*edit) for edit in edits))


def registered(op: str, meta: str | None = None, code: str = "") -> tuple[str, str, str]:
    """An op of csrc/ops/dense.cpp, registered by hand: CPU as it is, `meta` for the other."""
    schema = "(Tensor x, Tensor w, int[] w_desc, Tensor(a!) out) -> ()"
    lines = [
        code,
        f'STABLE_TORCH_LIBRARY_FRAGMENT(latentcore, m) {{ m.def("{op}{schema}"); }}',
    ]
    for key, function in (("CPU", f"&{op}<true>"), ("Meta", meta)):
        if function is not None:
            boxed = f'm.impl("{op}", TORCH_BOX({function}));'
            lines.append(f"STABLE_TORCH_LIBRARY_IMPL(latentcore, {key}, m) {{ {boxed} }}")
    return "csrc/ops/dense.cpp", f'LC_OP({op}, "{schema}")', "\n".join(lines)


DENSE = "src/latentcore/ops/dense.py"
MLA = "src/latentcore/ops/mla.py"
MOE = "src/latentcore/ops/moe.py"
ATTENTION = "src/latentcore/layers/attention.py"
FFN = "src/latentcore/layers/ffn.py"
STEP = "src/latentcore/layers/step.py"
DECODER = "src/latentcore/models/deepseek.py"
RUNNER = "src/latentcore/models/runner.py"
PARTS = "src/latentcore/models/parts.py"
SAMPLER = "src/latentcore/engine/native_sampler.py"
PACKED = "src/latentcore/quant/packed.py"

DRIFTS = (
    # Call sites
    drift(
        "a layer reaches the library by itself",
        (FFN, "dense.mlp(b.normed[:n], self", "torch.ops.latentcore.mlp(b.normed[:n], self"),
    ),
    drift(
        "a call swaps two tensors of one shape and type",
        (
            ATTENTION,
            "                b.positions[:rows],\n                b.row_seq[:rows],\n",
            "                b.row_seq[:rows],\n                b.positions[:rows],\n",
        ),
    ),
    drift(
        "a call swaps residual and delta",
        (
            DECODER,
            "add_rms_norm(residual, delta, next_norm",
            "add_rms_norm(delta, residual, next_norm",
        ),
    ),
    drift(
        "a call swaps two numbers",
        (
            ATTENTION,
            "self.config.qk_rope_head_dim,\n                self.config.v_head_dim,",
            "self.config.v_head_dim,\n                self.config.qk_rope_head_dim,",
        ),
    ),
    drift(
        "a call swaps two weights",
        (FFN, "w.experts_gate_up, w.experts_down, out)", "w.experts_down, w.experts_gate_up, out)"),
        (
            FFN,
            "                w.experts_gate_up,\n                w.experts_down,\n",
            "                w.experts_down,\n                w.experts_gate_up,\n",
        ),
    ),
    drift(
        "a call passes a scale for bf16",
        (
            ATTENTION,
            "dense.linear(b.attended[:n], self.weights.o, b.delta[:n])",
            "dense.linear(b.attended[:n], self.weights.o, 1.0, b.delta[:n])",
        ),
    ),
    drift(
        "a call passes the bytes of a weight without its description",
        (
            ATTENTION,
            "dense.linear(b.attended[:n], self.weights.o, b.delta[:n])",
            "dense.linear(b.attended[:n], self.weights.o.data, b.delta[:n])",
        ),
    ),
    drift(
        "the graph path hands over what the eager path no longer takes",
        (
            DECODER,
            "def logits(self, hidden: torch.Tensor, out: StepLogits) -> None:",
            "def logits(self, hidden: torch.Tensor, out: StepLogits, rows: int) -> None:",
        ),
        (
            RUNNER,
            "self._decoder.logits(gathered, logits)",
            "self._decoder.logits(gathered, logits, count)",
        ),
    ),
    drift(
        "the graph path captures what only runs eagerly",
        (RUNNER, "step = Step(rows, rows, _NO_SEGMENTS)", "step = Step(rows, 0, _NO_SEGMENTS)"),
    ),
    drift(
        "the graph path gives more logits than it has rows",
        (
            RUNNER,
            "self._decoder.forward(step), self._logits.first(rows))",
            "self._decoder.forward(step), self._logits)",
        ),
    ),
    drift(
        "a buffer's rows are not padded as the cache's are",
        (
            STEP,
            "self.q_latent = bf16(n, heads, latent_row(config))",
            "self.q_latent = bf16(n, heads, config.latent_dim)",
        ),
    ),
    drift(
        "a buffer is of another type",
        (
            STEP,
            "self.expert_ids = torch.zeros((n, top_k), dtype=torch.int32, device=device)",
            "self.expert_ids = torch.zeros((n, top_k), dtype=torch.int64, device=device)",
        ),
    ),
    drift(
        "the sampler swaps top_p and min_p",
        (
            SAMPLER,
            "[row.params.top_p for row in rows]),\n            _float32([row.params.min_p",
            "[row.params.min_p for row in rows]),\n            _float32([row.params.top_p",
        ),
    ),
    drift(
        "the sampler's top_k grows to 64 bits",
        (
            SAMPLER,
            "_int32([row.params.top_k for row in rows])",
            "torch.tensor([row.params.top_k for row in rows])",
        ),
    ),
    # Weights
    drift(
        "w_kc is laid out the other way round",
        (
            PARTS,
            "kv_b.heads, 1, kv_b.rank, kv_b.nope)",
            "kv_b.heads, 1, kv_b.nope, kv_b.rank)",
        ),
    ),
    drift(
        "int8 scales are expected flat",
        ("src/latentcore/quant/w8a8_int8.py", "    return (rows, 1)\n", "    return (rows,)\n"),
    ),
    drift(
        "the last, partial FP8 block row is forgotten",
        (
            "src/latentcore/quant/fp8_block.py",
            "return (-(-rows // BLOCK), ",
            "return (rows // BLOCK, ",
        ),
    ),
    drift(
        "the packed size in Python is not the native one",
        (
            PACKED,
            "    if fmt == Format.INT8:\n        return 128\n",
            "    if fmt == Format.INT8:\n        return 64\n",
        ),
    ),
    drift(
        "a descriptor's numbers change places",
        (
            PACKED,
            "[int(self.format), self.batch, self.parts, self.rows, self.cols]",
            "[int(self.format), self.parts, self.batch, self.rows, self.cols]",
        ),
    ),
    # Wrappers
    drift(
        "a wrapper has lost a parameter",
        (
            DENSE,
            'weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:\n    """out = x /',
            'weight: torch.Tensor, out: torch.Tensor) -> None:\n    """out = x /',
        ),
        (DENSE, "_rms_norm(x, weight, eps, out)", "_rms_norm(x, weight, 1e-6, out)"),
        (
            DECODER,
            "dense.rms_norm(residual, self.layers[0].input_norm, eps, normed)",
            "dense.rms_norm(residual, self.layers[0].input_norm, normed)",
        ),
    ),
    drift(
        "a wrapper has a default that the schema has not",
        (
            MLA,
            '    scale: float,\n    out: torch.Tensor,\n) -> None:\n    """Attention in latent',
            (
                "    scale: float = 0.1,\n    out: torch.Tensor = None,\n"
                ') -> None:\n    """Attention in latent'
            ),
        ),
    ),
    drift(
        "a wrapper is annotated with another type",
        (
            DENSE,
            "def linear(x: torch.Tensor, w: PackedWeight, out",
            "def linear(x: torch.Tensor, w: torch.Tensor, out",
        ),
    ),
    drift(
        "a wrapper hands arguments on in another order",
        (
            MOE,
            'weights, *unpack("moe", "gate_up", gate_up), *unpack("moe", "down", down), out)',
            'weights, *unpack("moe", "down", down), *unpack("moe", "gate_up", gate_up), out)',
        ),
    ),
    drift(
        "a wrapper returns what its op does not",
        (
            DENSE,
            "    _embedding(table, token_ids, out)\n",
            "    return _embedding(table, token_ids, out)\n",
        ),
        (
            DENSE,
            'token_ids: torch.Tensor, out: torch.Tensor) -> None:\n    """out[i]',
            'token_ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:\n    """out[i]',
        ),
    ),
    # Schemas, Meta implementations and entry checks
    drift(
        "a schema leaves a mutation unmarked",
        (
            "csrc/ops/dense.cpp",
            '"(Tensor(a!) residual, Tensor delta,',
            '"(Tensor residual, Tensor delta,',
        ),
    ),
    drift(
        "a schema's default changes",
        (
            "csrc/ops/dense.cpp",
            '"(Tensor x, Tensor weight, float eps, Tensor(a!) out)',
            '"(Tensor x, Tensor weight, float eps=1e-5, *, Tensor(a!) out)',
        ),
    ),
    drift(
        "a schema's arguments change places",
        (
            "csrc/ops/dense.cpp",
            "Tensor gate_up, int[] gate_up_desc, Tensor down, int[] down_desc, Tensor(a!) out",
            "Tensor down, int[] down_desc, Tensor gate_up, int[] gate_up_desc, Tensor(a!) out",
        ),
    ),
    drift("an op has no Meta implementation", registered("heads")),
    drift(
        "a Meta implementation of its own has a parameter fewer",
        registered("heads", "&heads_meta", "void heads_meta(Tensor, Tensor, Desc) {}"),
    ),
    drift("an op's Meta implementation is another's", registered("logits", "&linear<false>")),
    drift(
        "a kernel expects its norm's weight in bf16",
        (
            "csrc/ops/dense.cpp",
            'nullptr,\n               c.vector("weight", weight, hidden),',
            'nullptr,\n c.data<const float>("weight", weight, DType::BFloat16, {hidden}),',
        ),
    ),
    drift(
        "an entry takes every format",
        (
            "csrc/ops/dense.cpp",
            'c.weight("w", w, w_desc, kLinearFormats, {.batch = 1});',
            'c.weight("w", w, w_desc, kAllFormats, {.batch = 1});',
        ),
    ),
    drift(
        "an entry does not compare two sizes",
        (
            "csrc/ops/dense.cpp",
            "{.batch = 1, .rows = g.layout.cols, .cols = g.layout.rows}",
            "{.batch = 1, .rows = g.layout.cols}",
        ),
    ),
    drift(
        "an op can be captured though it runs at once",
        ("csrc/ops/mla.cpp", '    c.refuse_capture("segments");\n', ""),
    ),
    drift(
        "block numbers are copied unchecked",
        (
            "csrc/ops/mla.cpp",
            "if (row[b] < 0 || row[b] >= num_blocks) bad(",
            "if (row[b] < 0) bad(",
        ),
    ),
    drift(
        "expert numbers are not checked",
        (
            "csrc/ops/moe.cpp",
            '  c.contents("ids", a.ids, a.n * a.top_k, a.top_k, 0, g.batch - 1);\n',
            "",
        ),
    ),
)
