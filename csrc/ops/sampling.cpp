// restrict, add_bias, penalize, sample, greedy, logprobs
#include "ops/check.h"

namespace lc {
namespace {

// Counts of tokens are summed in fp32, exactly up to here.
constexpr int64_t kMaxVocab = 1 << 24;
// Alternatives that a row's logprobs may list.
constexpr int64_t kMaxTop = 1024;

struct Rows {
  float* data;
  int64_t n, vocab;
};
Rows rows_of(const Call& c, const Tensor& logits, bool written) {
  const auto v = written ? c.target("logits", logits, DType::Float, {kAny, kAny})
                         : c.tensor("logits", logits, DType::Float, {kAny, kAny});
  c.range("logits columns", v.size(1), 1, kMaxVocab);
  return {static_cast<float*>(v.data), v.size(0), v.size(1)};
}

std::string at_row(const char* expected, int64_t row) { return expected + (" at row " + std::to_string(row)); }

// A float parameter of each row.
template <class Ok>
const float* parameter(const Call& c, const char* name, const Tensor& t, int64_t n, const char* expected,
                       const Ok& ok) {
  const float* v = c.vector(name, t, n);
  for (int64_t i = 0; c.runs() && i < n; ++i)
    if (!ok(v[i])) c.fail(name, at_row(expected, i), std::to_string(v[i]));
  return v;
}
bool is_finite(float v) { return v - v == 0.0f; }
bool is_share(float v) { return v >= 0.0f && v <= 1.0f; }

// Where each row's entries stand among `count`.
const int32_t* offsets_of(const Call& c, const Tensor& offsets, int64_t n, int64_t count) {
  const auto* v = c.data<const int32_t>("offsets", offsets, DType::Int, {n + 1});
  if (!c.runs()) return v;
  if (v[0] != 0) c.fail("offsets", at_row("0", 0), std::to_string(v[0]));
  for (int64_t i = 0; i < n; ++i)
    if (v[i + 1] < v[i]) c.fail("offsets", at_row("no fewer than before", i + 1), std::to_string(v[i + 1]));
  if (v[n] != count)
    c.fail("offsets", at_row(("the number of token_ids, " + std::to_string(count) + ",").c_str(), n),
           std::to_string(v[n]));
  return v;
}

template <bool Run>
void restrict(Tensor logits, Tensor rows, Tensor allowed) {
  checked("restrict", Run, [&](const Call& c) {
    const Rows l = rows_of(c, logits, true);
    const auto r = c.tensor("rows", rows, DType::Int, {kAny});
    const int64_t m = r.size(0);
    RestrictArgs a{l.data, l.vocab, m, static_cast<const int32_t*>(r.data),
                   c.data<const int32_t>("allowed", allowed, DType::Int, {m, ceil_div(l.vocab, 32)})};
    c.refuse_capture("logits");
    c.contents("rows", a.rows, m, 1, 0, l.n - 1);
    if (m > 0) c.launch(kernels().restrict_tokens, a);
  });
}
LC_OP(restrict, "(Tensor(a!) logits, Tensor rows, Tensor allowed) -> ()")

template <bool Run>
void add_bias(Tensor logits, Tensor offsets, Tensor token_ids, Tensor bias) {
  checked("add_bias", Run, [&](const Call& c) {
    const Rows l = rows_of(c, logits, true);
    const auto ids = c.tensor("token_ids", token_ids, DType::Int, {kAny});
    const int64_t m = ids.size(0);
    c.refuse_capture("logits");
    BiasArgs a{
        l.data,
        l.n,
        l.vocab,
        offsets_of(c, offsets, l.n, m),
        static_cast<const int32_t*>(ids.data),
        parameter(c, "bias", bias, m, "a finite number or -inf", [](float v) { return v < __builtin_inff(); })};
    c.contents("token_ids", a.token_ids, m, 1, 0, l.vocab - 1);
    if (m > 0) c.launch(kernels().add_bias, a);
  });
}
LC_OP(add_bias, "(Tensor(a!) logits, Tensor offsets, Tensor token_ids, Tensor bias) -> ()")

template <bool Run>
void penalize(Tensor logits, Tensor offsets, Tensor output_offsets, Tensor token_ids, Tensor repetition,
              Tensor presence, Tensor frequency) {
  checked("penalize", Run, [&](const Call& c) {
    const Rows l = rows_of(c, logits, true);
    const auto ids = c.tensor("token_ids", token_ids, DType::Int, {kAny});
    const int64_t m = ids.size(0);
    c.refuse_capture("logits");
    PenalizeArgs a{l.data,
                   l.n,
                   l.vocab,
                   offsets_of(c, offsets, l.n, m),
                   c.data<const int32_t>("output_offsets", output_offsets, DType::Int, {l.n}),
                   static_cast<const int32_t*>(ids.data),
                   parameter(c, "repetition", repetition, l.n, "a finite number above 0",
                             [](float v) { return is_finite(v) && v > 0.0f; }),
                   parameter(c, "presence", presence, l.n, "a finite number", is_finite),
                   parameter(c, "frequency", frequency, l.n, "a finite number", is_finite)};
    c.contents("token_ids", a.token_ids, m, 1, 0, l.vocab - 1);
    for (int64_t i = 0; c.runs() && i < l.n; ++i)
      if (a.output_offsets[i] < a.offsets[i] || a.output_offsets[i] > a.offsets[i + 1])
        c.fail("output_offsets",
               std::to_string(a.offsets[i]) + ".." + std::to_string(a.offsets[i + 1]) + " at row " +
                   std::to_string(i),
               std::to_string(a.output_offsets[i]));
    if (m > 0) c.launch(kernels().penalize, a);
  });
}
LC_OP(penalize,
      "(Tensor(a!) logits, Tensor offsets, Tensor output_offsets, Tensor token_ids, Tensor repetition, "
      "Tensor presence, Tensor frequency) -> ()")

template <bool Run>
void sample(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds,
            Tensor counters, Tensor token_ids, Tensor logprobs) {
  checked("sample", Run, [&](const Call& c) {
    const Rows l = rows_of(c, logits, false);
    c.refuse_capture("logits");
    SampleArgs a{l.data,
                 l.n,
                 l.vocab,
                 parameter(c, "temperature", temperature, l.n, "a finite number of at least 0",
                           [](float v) { return is_finite(v) && v >= 0.0f; }),
                 c.data<const int32_t>("top_k", top_k, DType::Int, {l.n}),
                 parameter(c, "top_p", top_p, l.n, "a number in 0..1", is_share),
                 parameter(c, "min_p", min_p, l.n, "a number in 0..1", is_share),
                 c.data<const int64_t>("seeds", seeds, DType::Long, {l.n}),
                 c.data<const int64_t>("counters", counters, DType::Long, {l.n}),
                 c.output<int32_t>("token_ids", token_ids, DType::Int, {l.n}),
                 c.output<float>("logprobs", logprobs, DType::Float, {l.n})};
    if (l.n > 0) c.launch(kernels().sample, a);
  });
}
LC_OP(
    sample,
    "(Tensor logits, Tensor temperature, Tensor top_k, Tensor top_p, Tensor min_p, Tensor seeds, Tensor counters, "
    "Tensor(a!) token_ids, Tensor(b!) logprobs) -> ()")

template <bool Run>
void greedy(Tensor logits, Tensor token_ids) {
  checked("greedy", Run, [&](const Call& c) {
    const Rows l = rows_of(c, logits, false);
    GreedyArgs a{l.data, l.n, l.vocab, c.output<int32_t>("token_ids", token_ids, DType::Int, {l.n})};
    if (l.n > 0) c.launch(kernels().greedy, a);
  });
}
LC_OP(greedy, "(Tensor logits, Tensor(a!) token_ids) -> ()")

template <bool Run>
void logprobs(Tensor logits, Tensor token_ids, Tensor values, Tensor ranks, Tensor top_ids, Tensor top_values) {
  checked("logprobs", Run, [&](const Call& c) {
    const Rows l = rows_of(c, logits, false);
    const auto ids = c.tensor("token_ids", token_ids, DType::Int, {l.n, kAny});
    const int64_t m = ids.size(1);
    const auto top = c.target("top_ids", top_ids, DType::Int, {l.n, kAny});
    const int64_t k = top.size(1);
    c.range("top_ids columns", k, 0, l.vocab < kMaxTop ? l.vocab : kMaxTop);
    LogprobsArgs a{l.data,
                   l.n,
                   l.vocab,
                   m,
                   k,
                   static_cast<const int32_t*>(ids.data),
                   c.output<float>("values", values, DType::Float, {l.n, m}),
                   c.output<int32_t>("ranks", ranks, DType::Int, {l.n, m}),
                   static_cast<int32_t*>(top.data),
                   c.output<float>("top_values", top_values, DType::Float, {l.n, k})};
    c.refuse_capture("logits");
    c.contents("token_ids", a.token_ids, l.n * m, m, 0, l.vocab - 1);
    if (l.n > 0) c.launch(kernels().logprobs, a);
  });
}
LC_OP(logprobs,
      "(Tensor logits, Tensor token_ids, Tensor(a!) values, Tensor(b!) ranks, Tensor(c!) top_ids, "
      "Tensor(d!) top_values) -> ()")

}  // namespace
}  // namespace lc
