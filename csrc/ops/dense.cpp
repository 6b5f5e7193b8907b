// embedding, rms_norm, add_rms_norm, linear, heads, mlp
#include "ops/check.h"

namespace lc {
namespace {

template <bool Run>
void embedding(Tensor table, Tensor token_ids, Tensor out) {
  checked("embedding", Run, [&](const Call& c) {
    const auto t = c.tensor("table", table, DType::BFloat16, {kAny, kAny});
    const auto ids = c.tensor("token_ids", token_ids, DType::Int, {kAny});
    const int64_t n = ids.size(0), hidden = t.size(1);
    EmbeddingArgs a{static_cast<const uint16_t*>(t.data),
                    static_cast<const int32_t*>(ids.data),
                    t.size(0),
                    hidden,
                    n,
                    c.output<uint16_t>("out", out, DType::BFloat16, {n, hidden})};
    c.contents("token_ids", a.ids, n, 1, 0, a.vocab - 1);
    c.launch(kernels().embedding, a);
  });
}
LC_OP(embedding, "(Tensor table, Tensor token_ids, Tensor(a!) out) -> ()")

template <bool Run>
void rms_norm(Tensor x, Tensor weight, double eps, Tensor out) {
  checked("rms_norm", Run, [&](const Call& c) {
    const auto v = c.tensor("x", x, DType::BFloat16, {kAny, kAny});
    const int64_t n = v.size(0), hidden = v.size(1);
    c.positive("eps", eps);
    NormArgs a{static_cast<uint16_t*>(v.data),
               nullptr,
               c.vector("weight", weight, hidden),
               n,
               hidden,
               static_cast<float>(eps),
               c.output<uint16_t>("out", out, DType::BFloat16, {n, hidden})};
    c.launch(kernels().rms_norm, a);
  });
}
LC_OP(rms_norm, "(Tensor x, Tensor weight, float eps, Tensor(a!) out) -> ()")

template <bool Run>
void add_rms_norm(Tensor residual, Tensor delta, Tensor weight, double eps, Tensor out) {
  checked("add_rms_norm", Run, [&](const Call& c) {
    const auto v = c.target("residual", residual, DType::BFloat16, {kAny, kAny});
    const int64_t n = v.size(0), hidden = v.size(1);
    c.positive("eps", eps);
    NormArgs a{static_cast<uint16_t*>(v.data),
               c.data<const uint16_t>("delta", delta, DType::BFloat16, {n, hidden}),
               c.vector("weight", weight, hidden),
               n,
               hidden,
               static_cast<float>(eps),
               c.output<uint16_t>("out", out, DType::BFloat16, {n, hidden})};
    c.launch(kernels().add_rms_norm, a);
  });
}
LC_OP(add_rms_norm, "(Tensor(a!) residual, Tensor delta, Tensor weight, float eps, Tensor(b!) out) -> ()")

template <bool F32, bool Run>
void linear_to(const char* op, const Tensor& x, const Tensor& w, const Desc& w_desc, const Tensor& out) {
  checked(op, Run, [&](const Call& c) {
    const Weight weight = c.weight("w", w, w_desc, kLinearFormats, {.batch = 1});
    const auto v = c.tensor("x", x, DType::BFloat16, {kAny, weight.layout.cols});
    const int64_t n = v.size(0);
    const auto o = c.target("out", out, F32 ? DType::Float : DType::BFloat16, {n, weight.layout.rows});
    LinearArgs a{static_cast<const uint16_t*>(v.data), n, weight, o.data, F32};
    c.launch(kernels().linear, a);
  });
}
template <bool Run>
void linear(Tensor x, Tensor w, Desc w_desc, Tensor out) {
  linear_to<false, Run>("linear", x, w, w_desc, out);
}
LC_OP(linear, "(Tensor x, Tensor w, int[] w_desc, Tensor(a!) out) -> ()")
template <bool Run>
void logits(Tensor x, Tensor w, Desc w_desc, Tensor out) {
  linear_to<true, Run>("logits", x, w, w_desc, out);
}
LC_OP(logits, "(Tensor x, Tensor w, int[] w_desc, Tensor(a!) out) -> ()")

template <bool Run>
void heads(Tensor x, Tensor w, Desc w_desc, Tensor out) {
  checked("heads", Run, [&](const Call& c) {
    const Weight weight = c.weight("w", w, w_desc, kHeadFormats, {});
    const Layout& l = weight.layout;
    c.range("w_desc[cols]", l.cols, 1, 4096);
    const auto v = c.tensor("x", x, DType::BFloat16, {kAny, l.batch, l.cols});
    HeadsArgs a{static_cast<const uint16_t*>(v.data), v.size(0), weight,
                c.output<uint16_t>("out", out, DType::BFloat16, {v.size(0), l.batch, l.rows})};
    c.launch(kernels().heads, a);
  });
}
LC_OP(heads, "(Tensor x, Tensor w, int[] w_desc, Tensor(a!) out) -> ()")

template <bool Run>
void mlp(Tensor x, Tensor gate_up, Desc gate_up_desc, Tensor down, Desc down_desc, Tensor out) {
  checked("mlp", Run, [&](const Call& c) {
    const Weight g = c.weight("gate_up", gate_up, gate_up_desc, kLinearFormats, {.batch = 1, .parts = 2});
    const Weight d = c.weight("down", down, down_desc, kLinearFormats,
                              {.batch = 1, .rows = g.layout.cols, .cols = g.layout.rows});
    const auto v = c.tensor("x", x, DType::BFloat16, {kAny, g.layout.cols});
    MlpArgs a{static_cast<const uint16_t*>(v.data), v.size(0), g, d,
              c.output<uint16_t>("out", out, DType::BFloat16, {v.size(0), d.layout.rows})};
    c.launch(kernels().mlp, a);
  });
}
LC_OP(mlp, "(Tensor x, Tensor gate_up, int[] gate_up_desc, Tensor down, int[] down_desc, Tensor(a!) out) -> ()")

}  // namespace
}  // namespace lc
