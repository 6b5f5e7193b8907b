// mla_input_lora, mla_input_direct, mla_decode_attention, mla_prefill_attention
#include <algorithm>

#include "ops/check.h"

namespace lc {
namespace {

constexpr int64_t kMaxRope = 1024;

// What both input ops share: everything behind the query's own projections.
void finish_input(const Call& c, MlaInputArgs& a, const Tensor& kv_a, const Desc& kv_a_desc, const Tensor& kv_norm,
                  const Tensor& w_kc, const Desc& w_kc_desc, double eps, const Tensor& rope_table,
                  const Tensor& positions, const Tensor& row_seq, const Tensor& block_tables, const Tensor& cache,
                  int64_t absorbed, const Tensor& q, const Tensor& q_latent) {
  a.w_kc = c.weight("w_kc", w_kc, w_kc_desc, kHeadFormats, {});
  const Layout& l = a.w_kc.layout;
  const auto table = c.tensor("rope_table", rope_table, DType::Float, {kAny, kAny});
  MlaShape s{l.batch, l.cols, table.size(1), 0, l.rows};
  c.range("rope_table[1]", s.rope, 2, kMaxRope);
  if (s.rope % 2 != 0) c.fail("rope_table", "an even rope dimension", std::to_string(s.rope));
  a.shape = s;
  a.kv_a = c.weight("kv_a", kv_a, kv_a_desc, kLinearFormats,
                    {.batch = 1, .rows = s.latent + s.rope, .cols = a.hidden});
  a.kv_norm = c.vector("kv_a_norm", kv_norm, s.latent);
  c.positive("eps", eps);
  a.eps = static_cast<float>(eps);
  a.rope_table = static_cast<const float*>(table.data);
  a.cache = c.cache("cache", cache, true);
  if (a.cache.dim < s.latent + s.rope)
    c.fail("cache", "rows of at least " + std::to_string(s.latent + s.rope), std::to_string(a.cache.dim));
  a.places = c.places(positions, row_seq, block_tables, a.n, a.cache, table.size(0), Call::Blocks::Last);
  c.range("absorbed", absorbed, 0, a.n);
  a.absorbed = absorbed;
  a.q = c.output<uint16_t>("q", q, DType::BFloat16, {a.n, s.heads, s.nope + s.rope});
  a.q_latent = c.output<uint16_t>("q_latent", q_latent, DType::BFloat16, {a.n, s.heads, a.cache.dim});
}

template <bool Run>
void mla_input_lora(Tensor x, Tensor q_a, Desc q_a_desc, Tensor q_a_norm, Tensor q_b, Desc q_b_desc, Tensor kv_a,
                    Desc kv_a_desc, Tensor kv_a_norm, Tensor w_kc, Desc w_kc_desc, double eps, Tensor rope_table,
                    Tensor positions, Tensor row_seq, Tensor block_tables, Tensor cache, int64_t absorbed,
                    Tensor q, Tensor q_latent) {
  checked("mla_input_lora", Run, [&](const Call& c) {
    const auto v = c.tensor("x", x, DType::BFloat16, {kAny, kAny});
    MlaInputArgs a{};
    a.x = static_cast<const uint16_t*>(v.data);
    a.n = v.size(0);
    a.hidden = v.size(1);
    a.lora = true;
    a.q_a = c.weight("q_a", q_a, q_a_desc, kLinearFormats, {.batch = 1, .cols = a.hidden});
    a.q_norm = c.vector("q_a_norm", q_a_norm, a.q_a.layout.rows);
    finish_input(c, a, kv_a, kv_a_desc, kv_a_norm, w_kc, w_kc_desc, eps, rope_table, positions, row_seq,
                 block_tables, cache, absorbed, q, q_latent);
    a.q_b = c.weight(
        "q_b", q_b, q_b_desc, kLinearFormats,
        {.batch = 1, .rows = a.shape.heads * (a.shape.nope + a.shape.rope), .cols = a.q_a.layout.rows});
    c.launch(kernels().mla_input, a);
  });
}
LC_OP(mla_input_lora,
      "(Tensor x, Tensor q_a, int[] q_a_desc, Tensor q_a_norm, Tensor q_b, int[] q_b_desc, Tensor kv_a, "
      "int[] kv_a_desc, Tensor kv_a_norm, Tensor w_kc, int[] w_kc_desc, float eps, Tensor rope_table, "
      "Tensor positions, Tensor row_seq, Tensor block_tables, Tensor(a!) cache, int absorbed, Tensor(b!) q, "
      "Tensor(c!) q_latent) -> ()")

template <bool Run>
void mla_input_direct(Tensor x, Tensor q_proj, Desc q_proj_desc, Tensor kv_a, Desc kv_a_desc, Tensor kv_a_norm,
                      Tensor w_kc, Desc w_kc_desc, double eps, Tensor rope_table, Tensor positions, Tensor row_seq,
                      Tensor block_tables, Tensor cache, int64_t absorbed, Tensor q, Tensor q_latent) {
  checked("mla_input_direct", Run, [&](const Call& c) {
    const auto v = c.tensor("x", x, DType::BFloat16, {kAny, kAny});
    MlaInputArgs a{};
    a.x = static_cast<const uint16_t*>(v.data);
    a.n = v.size(0);
    a.hidden = v.size(1);
    finish_input(c, a, kv_a, kv_a_desc, kv_a_norm, w_kc, w_kc_desc, eps, rope_table, positions, row_seq,
                 block_tables, cache, absorbed, q, q_latent);
    a.q_b = c.weight("q_proj", q_proj, q_proj_desc, kLinearFormats,
                     {.batch = 1, .rows = a.shape.heads * (a.shape.nope + a.shape.rope), .cols = a.hidden});
    c.launch(kernels().mla_input, a);
  });
}
LC_OP(mla_input_direct,
      "(Tensor x, Tensor q_proj, int[] q_proj_desc, Tensor kv_a, int[] kv_a_desc, Tensor kv_a_norm, Tensor w_kc, "
      "int[] w_kc_desc, float eps, Tensor rope_table, Tensor positions, Tensor row_seq, Tensor block_tables, "
      "Tensor(a!) cache, int absorbed, Tensor(b!) q, Tensor(c!) q_latent) -> ()")

template <bool Run>
void mla_decode_attention(Tensor q_latent, Tensor w_vc, Desc w_vc_desc, Tensor positions, Tensor row_seq,
                          Tensor block_tables, Tensor cache, double scale, Tensor out) {
  checked("mla_decode_attention", Run, [&](const Call& c) {
    MlaDecodeArgs a{};
    a.w_vc = c.weight("w_vc", w_vc, w_vc_desc, kHeadFormats, {});
    const Layout& l = a.w_vc.layout;
    a.cache = c.cache("cache", cache, false);
    if (a.cache.dim < l.cols)
      c.fail("cache", "rows of at least " + std::to_string(l.cols), std::to_string(a.cache.dim));
    const auto v = c.tensor("q_latent", q_latent, DType::BFloat16, {kAny, l.batch, a.cache.dim});
    a.q_latent = static_cast<const uint16_t*>(v.data);
    a.n = v.size(0);
    a.places = c.places(positions, row_seq, block_tables, a.n, a.cache, INT64_MAX, Call::Blocks::All);
    a.shape = {l.batch, 0, 0, l.rows, l.cols};
    c.positive("scale", scale);
    a.scale = static_cast<float>(scale);
    a.out = c.output<uint16_t>("out", out, DType::BFloat16, {a.n, l.batch * l.rows});
    if (a.n > 0) c.launch(kernels().mla_decode, a);
  });
}
LC_OP(mla_decode_attention,
      "(Tensor q_latent, Tensor w_vc, int[] w_vc_desc, Tensor positions, Tensor row_seq, Tensor block_tables, "
      "Tensor cache, float scale, Tensor(a!) out) -> ()")

template <bool Run>
void mla_prefill_attention(Tensor q, Tensor kv_b, Desc kv_b_desc, Tensor segments, Tensor block_tables,
                           Tensor cache, int64_t kv_lora_rank, int64_t qk_rope_head_dim, int64_t v_head_dim,
                           double scale, Tensor out) {
  checked("mla_prefill_attention", Run, [&](const Call& c) {
    const auto v = c.tensor("q", q, DType::BFloat16, {kAny, kAny, kAny});
    MlaPrefillArgs a{};
    a.q = static_cast<const uint16_t*>(v.data);
    a.n = v.size(0);
    const int64_t heads = v.size(1), nope = v.size(2) - qk_rope_head_dim;
    c.range("qk_rope_head_dim", qk_rope_head_dim, 2, v.size(2) - 1);
    c.range("v_head_dim", v_head_dim, 1, 4096);
    c.range("kv_lora_rank", kv_lora_rank, 1, 1 << 20);
    a.shape = {heads, nope, qk_rope_head_dim, v_head_dim, kv_lora_rank};
    a.kv_b = c.weight("kv_b", kv_b, kv_b_desc, kLinearFormats,
                      {.batch = 1, .rows = heads * (nope + v_head_dim), .cols = kv_lora_rank});
    a.cache = c.cache("cache", cache, false);
    if (a.cache.dim < kv_lora_rank + qk_rope_head_dim)
      c.fail("cache", "rows of at least " + std::to_string(kv_lora_rank + qk_rope_head_dim),
             std::to_string(a.cache.dim));
    const auto t = c.tensor("block_tables", block_tables, DType::Int, {kAny, kAny});
    a.places = {nullptr, nullptr, static_cast<const int32_t*>(t.data), t.size(1)};
    const auto s = c.tensor("segments", segments, DType::Int, {kAny, 4});
    a.segments = static_cast<const int32_t*>(s.data);
    a.segment_count = s.size(0);
    c.positive("scale", scale);
    a.scale = static_cast<float>(scale);
    a.out = c.output<uint16_t>("out", out, DType::BFloat16, {a.n, heads * v_head_dim});
    c.refuse_capture("segments");
    if (!c.runs()) return;
    for (int64_t i = 0; i < a.segment_count; ++i) {
      const int32_t* g = a.segments + i * 4;
      if (g[0] < 0 || g[1] < 1 || int64_t{g[0]} + g[1] > a.n || g[2] < 0 || g[2] >= t.size(0) || g[3] < 0)
        c.fail("segments",
               "[row, rows, sequence, position] within " + std::to_string(a.n) + " rows and " +
                   std::to_string(t.size(0)) + " sequences",
               "[" + std::to_string(g[0]) + ", " + std::to_string(g[1]) + ", " + std::to_string(g[2]) + ", " +
                   std::to_string(g[3]) + "]");
      const int64_t context = int64_t{g[3]} + g[1];
      if (context > t.size(1) * a.cache.block_size)
        c.fail("segments",
               "a context within the block table's " + std::to_string(t.size(1) * a.cache.block_size) + " tokens",
               std::to_string(context));
      const int32_t* row = a.places.block_tables + g[2] * t.size(1);
      for (int64_t b = 0; b < ceil_div(context, a.cache.block_size); ++b)
        if (row[b] < 0 || row[b] >= a.cache.blocks)
          c.fail("block_tables", "blocks in 0.." + std::to_string(a.cache.blocks - 1), std::to_string(row[b]));
      a.max_context = a.max_context > context ? a.max_context : context;
      a.max_rows = a.max_rows > g[1] ? a.max_rows : g[1];
    }
    if (a.segment_count > 0) c.launch(kernels().mla_prefill, a);
  });
}
LC_OP(mla_prefill_attention,
      "(Tensor q, Tensor kv_b, int[] kv_b_desc, Tensor segments, Tensor block_tables, Tensor cache, int "
      "kv_lora_rank, "
      "int qk_rope_head_dim, int v_head_dim, float scale, Tensor(a!) out) -> ()")

// Copies a step's inputs into its fixed buffers, checking every value on the way.
template <bool Run>
void load_step(Tensor token_ids, Tensor positions, Tensor row_seq, Tensor block_tables, int64_t vocab_size,
               int64_t num_blocks, int64_t block_size, int64_t max_position, Tensor token_ids_to,
               Tensor positions_to, Tensor row_seq_to, Tensor block_tables_to) {
  checked("load_step", Run, [&](const Call& c) {
    const auto ids = c.tensor("token_ids", token_ids, DType::Int, {kAny});
    const int64_t n = ids.size(0);
    const auto* id = static_cast<const int32_t*>(ids.data);
    const auto* pos = c.data<const int32_t>("positions", positions, DType::Int, {n});
    const auto* seq = c.data<const int32_t>("row_seq", row_seq, DType::Int, {n});
    const auto tables = c.tensor("block_tables", block_tables, DType::Int, {kAny, kAny});
    const auto* table = static_cast<const int32_t*>(tables.data);
    const auto to_ids = c.target("token_ids_to", token_ids_to, DType::Int, {kAny});
    const auto to_pos = c.target("positions_to", positions_to, DType::Int, {kAny});
    const auto to_seq = c.target("row_seq_to", row_seq_to, DType::Int, {kAny});
    const auto to_tables = c.target("block_tables_to", block_tables_to, DType::Int, {kAny, kAny});
    c.range("token_ids rows", n, 1, to_ids.size(0));
    c.range("positions rows", n, 1, to_pos.size(0));
    c.range("row_seq rows", n, 1, to_seq.size(0));
    c.range("block_tables rows", tables.size(0), 1, to_tables.size(0));
    c.range("block_tables width", tables.size(1), 1, to_tables.size(1));
    constexpr int64_t kMax = int64_t{1} << 31;
    c.range("vocab_size", vocab_size, 1, kMax);
    c.range("num_blocks", num_blocks, 1, kMax);
    c.range("block_size", block_size, 1, 1 << 20);
    c.range("max_position", max_position, 1, kMax);
    c.refuse_capture("token_ids_to");
    if (!c.runs()) return;
    c.apart();
    const auto bad = [&](const char* name, int64_t row, int64_t low, int64_t high, int64_t found) {
      c.fail(name, std::to_string(low) + ".." + std::to_string(high) + " at row " + std::to_string(row),
             std::to_string(found));
    };
    for (int64_t i = 0; i < n; ++i) {
      if (id[i] < 0 || id[i] >= vocab_size) bad("token_ids", i, 0, vocab_size - 1, id[i]);
      if (seq[i] < 0 || seq[i] >= tables.size(0)) bad("row_seq", i, 0, tables.size(0) - 1, seq[i]);
      const int64_t top = std::min(max_position, tables.size(1) * block_size) - 1;
      if (pos[i] < 0 || pos[i] > top) bad("positions", i, 0, top, pos[i]);
      const int32_t* row = table + seq[i] * tables.size(1);
      for (int64_t b = 0; b <= pos[i] / block_size; ++b)
        if (row[b] < 0 || row[b] >= num_blocks) bad("block_tables", seq[i], 0, num_blocks - 1, row[b]);
    }
    std::memcpy(to_ids.data, id, 4 * static_cast<size_t>(n));
    std::memcpy(to_pos.data, pos, 4 * static_cast<size_t>(n));
    std::memcpy(to_seq.data, seq, 4 * static_cast<size_t>(n));
    for (int64_t s = 0; s < tables.size(0); ++s)
      std::memcpy(static_cast<int32_t*>(to_tables.data) + s * to_tables.size(1), table + s * tables.size(1),
                  4 * static_cast<size_t>(tables.size(1)));
  });
}
LC_OP(load_step,
      "(Tensor token_ids, Tensor positions, Tensor row_seq, Tensor block_tables, int vocab_size, int num_blocks, "
      "int block_size, int max_position, Tensor(a!) token_ids_to, Tensor(b!) positions_to, Tensor(c!) row_seq_to, "
      "Tensor(d!) block_tables_to) -> ()")

}  // namespace
}  // namespace lc
