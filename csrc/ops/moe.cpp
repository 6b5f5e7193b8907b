// route_softmax, route_sigmoid, moe, moe_shared
#include "ops/check.h"

namespace lc {
namespace {

void check_groups(const Call& c, int64_t experts, int64_t n_group, int64_t topk_group, int64_t top_k) {
  c.range("n_group", n_group, 1, 1024);
  if (experts % n_group != 0)
    c.fail("n_group", "a divisor of " + std::to_string(experts) + " experts", std::to_string(n_group));
  c.range("topk_group", topk_group, 1, n_group);
  c.range("top_k", top_k, 1, topk_group * (experts / n_group));
}

template <bool Run>
void route_softmax(Tensor x, Tensor w, Desc w_desc, int64_t n_group, int64_t topk_group, int64_t top_k,
                   bool normalize, double factor, Tensor ids, Tensor weights) {
  checked("route_softmax", Run, [&](const Call& c) {
    const Weight weight = c.weight("w", w, w_desc, kRouterFormats, {.batch = 1});
    const auto v = c.tensor("x", x, DType::BFloat16, {kAny, weight.layout.cols});
    const int64_t n = v.size(0);
    check_groups(c, weight.layout.rows, n_group, topk_group, top_k);
    c.positive("factor", factor);
    RouteArgs a{static_cast<const uint16_t*>(v.data),
                n,
                weight,
                nullptr,
                n_group,
                topk_group,
                top_k,
                false,
                normalize,
                static_cast<float>(factor),
                c.output<int32_t>("ids", ids, DType::Int, {n, top_k}),
                c.output<float>("weights", weights, DType::Float, {n, top_k})};
    c.launch(kernels().route, a);
  });
}
LC_OP(route_softmax,
      "(Tensor x, Tensor w, int[] w_desc, int n_group, int topk_group, int top_k, bool normalize, "
      "float factor, Tensor(a!) ids, Tensor(b!) weights) -> ()")

template <bool Run>
void route_sigmoid(Tensor x, Tensor w, Desc w_desc, Tensor bias, int64_t n_group, int64_t topk_group,
                   int64_t top_k, bool normalize, double factor, Tensor ids, Tensor weights) {
  checked("route_sigmoid", Run, [&](const Call& c) {
    const Weight weight = c.weight("w", w, w_desc, kRouterFormats, {.batch = 1});
    const auto v = c.tensor("x", x, DType::BFloat16, {kAny, weight.layout.cols});
    const int64_t n = v.size(0);
    check_groups(c, weight.layout.rows, n_group, topk_group, top_k);
    c.positive("factor", factor);
    RouteArgs a{static_cast<const uint16_t*>(v.data),
                n,
                weight,
                c.vector("bias", bias, weight.layout.rows),
                n_group,
                topk_group,
                top_k,
                true,
                normalize,
                static_cast<float>(factor),
                c.output<int32_t>("ids", ids, DType::Int, {n, top_k}),
                c.output<float>("weights", weights, DType::Float, {n, top_k})};
    c.launch(kernels().route, a);
  });
}
LC_OP(route_sigmoid,
      "(Tensor x, Tensor w, int[] w_desc, Tensor bias, int n_group, int topk_group, int top_k, "
      "bool normalize, float factor, Tensor(a!) ids, Tensor(b!) weights) -> ()")

MoeArgs moe_args(const Call& c, const Tensor& x, const Tensor& ids, const Tensor& weights, const Tensor& gate_up,
                 const Desc& gate_up_desc, const Tensor& down, const Desc& down_desc, const Tensor& out) {
  MoeArgs a{};
  a.gate_up = c.weight("gate_up", gate_up, gate_up_desc, kLinearFormats, {.parts = 2});
  const Layout& g = a.gate_up.layout;
  a.down = c.weight("down", down, down_desc, kLinearFormats, {.batch = g.batch, .rows = g.cols, .cols = g.rows});
  const auto v = c.tensor("x", x, DType::BFloat16, {kAny, g.cols});
  const auto i = c.tensor("ids", ids, DType::Int, {v.size(0), kAny});
  a.x = static_cast<const uint16_t*>(v.data);
  a.n = v.size(0);
  a.top_k = i.size(1);
  a.ids = static_cast<const int32_t*>(i.data);
  c.contents("ids", a.ids, a.n * a.top_k, a.top_k, 0, g.batch - 1);
  a.weights = c.data<const float>("weights", weights, DType::Float, {a.n, a.top_k});
  a.out = c.output<uint16_t>("out", out, DType::BFloat16, {a.n, g.cols});
  return a;
}

template <bool Run>
void moe(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Desc gate_up_desc, Tensor down, Desc down_desc,
         Tensor out) {
  checked("moe", Run, [&](const Call& c) {
    const MoeArgs a = moe_args(c, x, ids, weights, gate_up, gate_up_desc, down, down_desc, out);
    c.launch(kernels().moe, a);
  });
}
LC_OP(moe,
      "(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, int[] gate_up_desc, Tensor down, int[] down_desc, "
      "Tensor(a!) out) -> ()")

template <bool Run>
void moe_shared(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, Desc gate_up_desc, Tensor down,
                Desc down_desc, Tensor shared_gate_up, Desc shared_gate_up_desc, Tensor shared_down,
                Desc shared_down_desc, Tensor out) {
  checked("moe_shared", Run, [&](const Call& c) {
    MoeArgs a = moe_args(c, x, ids, weights, gate_up, gate_up_desc, down, down_desc, out);
    a.shared = true;
    a.shared_gate_up = c.weight("shared_gate_up", shared_gate_up, shared_gate_up_desc, kLinearFormats,
                                {.batch = 1, .parts = 2, .cols = a.gate_up.layout.cols});
    a.shared_down = c.weight("shared_down", shared_down, shared_down_desc, kLinearFormats,
                             {.batch = 1, .rows = a.gate_up.layout.cols, .cols = a.shared_gate_up.layout.rows});
    c.launch(kernels().moe, a);
  });
}
LC_OP(moe_shared,
      "(Tensor x, Tensor ids, Tensor weights, Tensor gate_up, int[] gate_up_desc, Tensor down, int[] down_desc, "
      "Tensor shared_gate_up, int[] shared_gate_up_desc, Tensor shared_down, int[] shared_down_desc, "
      "Tensor(a!) out) -> ()")

}  // namespace
}  // namespace lc
