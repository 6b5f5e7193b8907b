// Router and experts.
#pragma once

#include <new>

#include "kernels/dense.inl.h"

namespace {

template <class Isa>
struct RoutePlan {
  ActSlot<Isa> x;
  float* logits;
  float* work;  // a thread's scores and scores for choice
  RoutePlan(Bump& b, const RouteArgs& a, int nt) : x(b, nt, a.w.layout.format, a.n, a.w.layout.cols) {
    const int64_t e = round_up(a.w.layout.rows, 16);
    logits = b.take<float>(a.n * e);
    work = b.take<float>(nt * 2 * e);
  }
};

// Index of the largest of v[0..n); the lowest index among equals. NaN never wins.
LC_INLINE int64_t argmax(const float* v, int64_t n) {
  int64_t best = 0;
  float top = -__builtin_inff();
  for (int64_t i = 0; i < n; ++i)
    if (v[i] > top) {
      top = v[i];
      best = i;
    }
  return best;
}

// Chooses top_k experts of one row (DeepSeek-V2 and V3 technical reports). `choice` is overwritten.
LC_INLINE void choose_experts(const RouteArgs& a, const float* scores, float* choice, int32_t* ids,
                              float* weights) {
  const int64_t experts = a.w.layout.rows, per = experts / a.n_group;
  const float kOut = -__builtin_inff();
  if (a.n_group > 1 && a.topk_group < a.n_group) {
    float group[1024];
    for (int64_t g = 0; g < a.n_group; ++g) {
      float first = kOut, second = kOut;
      for (int64_t i = g * per; i < (g + 1) * per; ++i) {
        if (choice[i] > first) {
          second = first;
          first = choice[i];
        } else if (choice[i] > second) {
          second = choice[i];
        }
      }
      group[g] = a.top2_groups && per > 1 ? first + second : first;
    }
    bool keep[1024] = {};
    for (int64_t j = 0; j < a.topk_group; ++j) {
      const int64_t g = argmax(group, a.n_group);
      keep[g] = true;
      group[g] = kOut;
    }
    // Excluded, not zeroed: a bias may make every kept score negative.
    for (int64_t g = 0; g < a.n_group; ++g)
      if (!keep[g])
        for (int64_t i = g * per; i < (g + 1) * per; ++i) choice[i] = kOut;
  }
  float sum = 0.0f;
  for (int64_t j = 0; j < a.top_k; ++j) {
    const int64_t e = argmax(choice, experts);
    choice[e] = kOut;
    ids[j] = static_cast<int32_t>(e);
    weights[j] = scores[e];
    sum += scores[e];
  }
  const float factor = a.normalize ? a.factor / (sum + 1e-20f) : a.factor;
  for (int64_t j = 0; j < a.top_k; ++j) weights[j] *= factor;
}

template <class Isa>
void route(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const RouteArgs*>(p);
  Bump b{ctx.scratch};
  RoutePlan<Isa> plan(b, a, ctx.nt);
  const int64_t experts = a.w.layout.rows, e = round_up(experts, 16);
  const Act x = plan.x.fill(ctx, a.x, a.w.layout.cols);
  auto store = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
    store_tile_f32(plan.logits, e, e, m0, m, panel, np, c);
  };
  shared_gemm<Isa>(ctx, a.w, x, a.n, 1, 0, sink_of(store));
  ctx.barrier();
  float* scores = plan.work + ctx.tid * 2 * e;
  float* choice = scores + e;
  const Range rows = owned(a.n, ctx.tid, ctx.nt, 0);
  for (int64_t i = rows.begin; i < rows.end; ++i) {
    const float* logits = plan.logits + i * e;
    if (a.bias != nullptr) {
      for (int64_t k = 0; k < e; k += 16) vstore(scores + k, vsigmoid(vload(logits + k)));
      for (int64_t k = 0; k < experts; ++k) choice[k] = scores[k] + a.bias[k];
    } else {
      float top = logits[0];
      for (int64_t k = 1; k < experts; ++k) top = tmax(top, logits[k]);
      for (int64_t k = 0; k < e; k += 16) vstore(scores + k, vexp(vsub(vload(logits + k), vset1(top))));
      float sum = 0.0f;
      for (int64_t k = 0; k < experts; ++k) sum += scores[k];
      for (int64_t k = 0; k < experts; ++k) choice[k] = scores[k] = scores[k] / sum;
    }
    choose_experts(a, scores, choice, a.ids + i * a.top_k, a.weights + i * a.top_k);
  }
}

// Grouped rows [first, first + count) of an expert.
struct RowBlock {
  int64_t expert, first, count;
};

// Which rows of the grouped activations belong to which expert. Every thread computes it alike.
struct Grouping {
  static constexpr int64_t kBlockRows = 256;  // whose activations stay in the second-level cache
  int64_t* first;    // [experts + 1] first grouped row of an expert, a multiple of 16
  int32_t* count;    // [experts] its rows
  int32_t* live;     // [experts] rows of the experts before it
  int32_t* active;   // [min(experts, pairs)] experts that have rows
  int32_t* token;    // [rows] token of a grouped row; -1 in the padding
  int32_t* place;    // [n, top_k] a token's grouped rows in their order; then -1 for experts that do not exist
  int32_t* before;   // [rows] of a row that is no padding: such rows before it
  float* weight;     // [rows]
  RowBlock* blocks;  // the rows of all experts in blocks, where tokens are many
  int64_t* cost;     // [blocks + 1] of the blocks before it, for a pair of panels
  int64_t experts, rows, active_count = 0, block_count = 0;

  static int64_t capacity(int64_t n, int64_t top_k, int64_t experts) {
    return round_up(n * top_k, 16) + 16 * tmin(n * top_k, experts);
  }
  static int64_t most_blocks(const MoeArgs& a) {
    const int64_t pairs = a.n * a.top_k;
    return a.n > kPartRows ? tmin(a.gate_up.layout.batch, pairs) + pairs / kBlockRows : 0;
  }
  Grouping(Bump& b, const MoeArgs& a) : experts(a.gate_up.layout.batch) {
    rows = capacity(a.n, a.top_k, experts);
    first = b.take<int64_t>(experts + 1);
    count = b.take<int32_t>(experts);
    live = b.take<int32_t>(experts);
    active = b.take<int32_t>(tmin(experts, a.n * a.top_k));
    token = b.take<int32_t>(rows);
    place = b.take<int32_t>(a.n * a.top_k);
    before = b.take<int32_t>(rows);
    weight = b.take<float>(rows);
    blocks = b.take<RowBlock>(most_blocks(a));
    cost = b.take<int64_t>(most_blocks(a) + 1);
  }
  RowBlock all_of(int64_t expert) const { return {expert, first[expert], count[expert]}; }
  void build(const MoeArgs& a) {
    for (int64_t e = 0; e < experts; ++e) count[e] = 0;
    const int64_t pairs = a.n * a.top_k;
    const auto valid = [&](int32_t id) { return id >= 0 && id < experts; };
    for (int64_t i = 0; i < pairs; ++i)
      if (valid(a.ids[i])) ++count[a.ids[i]];
    first[0] = 0;
    int32_t so_far = 0;
    for (int64_t e = 0; e < experts; ++e) {
      live[e] = so_far;
      so_far += count[e];
      first[e + 1] = first[e] + round_up(count[e], 16);
      if (count[e] != 0) active[active_count++] = static_cast<int32_t>(e);
      count[e] = 0;
    }
    for (int64_t r = 0; r < first[experts]; ++r) token[r] = -1;
    for (int64_t i = 0; i < pairs; ++i) {
      const int32_t id = a.ids[i];
      place[i] = -1;
      if (!valid(id)) continue;
      const int64_t r = first[id] + count[id];
      before[r] = live[id] + count[id]++;
      token[r] = static_cast<int32_t>(i / a.top_k);
      weight[r] = a.weights[i];
    }
    for (int64_t r = 0; r < first[experts]; ++r) {
      if (token[r] < 0) continue;
      int32_t* to = place + token[r] * a.top_k;
      while (*to >= 0) ++to;
      *to = static_cast<int32_t>(r);
    }
    if (most_blocks(a) > 0) cut();
  }
  void cut() {
    cost[0] = 0;
    for (int64_t i = 0; i < active_count; ++i) {
      const RowBlock all = all_of(active[i]);
      // Of equal size, in whole tiles of rows.
      const int64_t size = round_up(ceil_div(all.count, ceil_div(all.count, kBlockRows)), 32);
      for (int64_t r = 0; r < all.count; r += size) {
        blocks[block_count] = {all.expert, all.first + r, tmin(size, all.count - r)};
        // Reading the weights costs about as much as 16 rows.
        cost[block_count + 1] = cost[block_count] + round_up(blocks[block_count].count, 16) + 16;
        ++block_count;
      }
    }
  }
};

// Who multiplies which pairs of panels of which blocks. A thread takes neighbouring pairs of neighbouring blocks,
// at equal cost, so that few threads read the same rows; of every matrix, a memory node takes what lies in it.
struct BlockShares {
  const int64_t* cost;
  Range node, here;  // threads of the node; the pairs that they own
  int64_t total;
  BlockShares(const Ctx& ctx, const Grouping& groups, int64_t pairs)
      : cost(groups.cost),
        node(ctx.node),
        here{owned(pairs, node.begin, ctx.nt, 0).begin, owned(pairs, node.end - 1, ctx.nt, 0).end},
        total(groups.cost[groups.block_count] * here.size()) {}
  Range operator()(int64_t block, int t) const {
    const int64_t each = cost[block + 1] - cost[block], before = cost[block] * here.size();
    const auto at = [&](int64_t thread) {
      const int64_t bound = total * thread / node.size() - before;
      return here.begin + (bound <= 0 ? 0 : tmin(here.size(), ceil_div(bound, each)));
    };
    return {at(t - node.begin), at(t - node.begin + 1)};
  }
};

template <class Isa>
struct MoePlan {
  int64_t grouping_bytes, x_bytes, h_bytes;
  uint8_t *grouping, *x, *h;
  bf16* gated;  // [rows, intermediate]
  float* sum;   // of a prompt, [panels of hidden, n, 16]
  int64_t n;
  bool single;  // one token: every expert reads the same prepared row
  bf16* shared_gated;
  float* parted;   // of parted_gate_up, the shared expert's rows first; none where pairs share out evenly
  float* results;  // of parted_down, [n + pairs, hidden] by expert, the shared one first; none for a prompt
  int64_t rows;

  MoePlan(Bump& b, const MoeArgs& a, int nt) {
    Bump count{nullptr};
    Grouping g(count, a);
    grouping_bytes = count.used;
    rows = g.rows;
    n = a.n;
    single = n == 1;
    const Layout &gl = a.gate_up.layout, &dl = a.down.layout;
    grouping = b.take<uint8_t>(nt * grouping_bytes);
    x_bytes = act_size<Isa>(gl.format, single ? 1 : rows, gl.cols);
    x = b.take<uint8_t>(single ? nt * x_bytes : x_bytes);
    gated = b.take<bf16>(rows * gl.rows);
    h_bytes = act_size<Isa>(dl.format, rows, dl.cols);
    h = b.take<uint8_t>(h_bytes);
    shared_gated = a.shared ? b.take<bf16>(a.n * a.shared_gate_up.layout.rows) : nullptr;
    const int64_t live = a.n * (a.top_k + (a.shared ? 1 : 0));
    const bool few = a.n <= kPartRows;
    parted = few ? b.take<float>(live * nt * 32) : nullptr;
    results = few ? b.take<float>(live * dl.rows) : nullptr;
    sum = few ? nullptr : b.take<float>(dl.panels() * a.n * kPanelRows);
  }
  // A panel's sums of one token: a cache line, and those of all tokens side by side. In rows of `hidden` a
  // thread's few columns would fall on few sets of its cache.
  float* sum_of(int64_t panel, int64_t token) const { return sum + (panel * n + token) * kPanelRows; }
};

template <class Isa>
struct SharedPlan {
  ActSlot<Isa> x, h;
  SharedPlan(Bump& b, const MoeArgs& a, int nt)
      : x(b, nt, a.shared_gate_up.layout.format, a.n, a.shared_gate_up.layout.cols),
        h(b, nt, a.shared_down.layout.format, a.n, a.shared_down.layout.cols) {}
};

template <class Isa>
size_t moe_scratch(const void* p, int nt) {
  const auto& a = *static_cast<const MoeArgs*>(p);
  Bump b{nullptr};
  MoePlan<Isa> plan(b, a, nt);
  if (a.shared) SharedPlan<Isa> shared(b, a, nt);
  return static_cast<size_t>(b.used);
}

// `down` of few rows: each product by itself, where columns do not share out evenly those that a thread owns
// moving from expert to expert; then the sums, in the order that they always have. A few columns of all experts
// together, as prompts take them, are too much at once for threads that help each other: 1.2 MB at batch 8.
template <class Isa>
void parted_down(const Ctx& ctx, const MoeArgs& a, const MoePlan<Isa>& plan, const Grouping& groups, const Act& h,
                 const Act& shared_h) {
  const Layout& dl = a.down.layout;
  const int64_t top = dl.rows, panels = dl.row_panels(), others = a.shared ? 1 : 0;
  const int64_t lists = others + groups.active_count;
  const auto own = [&](int64_t list, int t) { return owned_columns(panels, list, lists, t, ctx.nt); };
  const auto weights = [&](int64_t list) {
    return list < others ? panels_of(a.shared_down, 0) : panels_of(a.down, groups.active[list - others]);
  };
  each_share(ctx, lists, Take{kPanelsAtOnce}, own, [&](int of, int64_t list, int64_t p0, int64_t p1) {
    const bool is_shared = list < others;
    const int64_t e = is_shared ? 0 : groups.active[list - others];
    float* to = plan.results + (is_shared ? 0 : others * a.n + groups.live[e]) * top;
    auto store = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
      store_tile_f32(to, top, top, m0, m, panel, np, c);
    };
    const Panels w = weights(list);
    const uint8_t* next = w.base + p1 * w.stride;
    if (p1 == own(list, of).end && list + 1 < lists) {
      const Panels then = weights(list + 1);
      next = then.base + own(list + 1, of).begin * then.stride;
    }
    gemm<Isa>(w, p0, p1, next, is_shared ? shared_h : h.from(groups.first[e]), is_shared ? a.n : groups.count[e],
              1, sink_of(store));
  });
  ctx.barrier();
  const Range mine = owned(a.n * panels, ctx.tid, ctx.nt, 0);
  for (int64_t u = mine.begin; u < mine.end; ++u) {
    const int64_t i = u / panels, col = u % panels * 16;
    const int n = static_cast<int>(tmin<int64_t>(16, top - col));
    vf sum = a.shared ? vload_n(plan.results + i * top + col, n) : vset1(0.0f);
    for (int64_t j = 0; j < a.top_k && groups.place[i * a.top_k + j] >= 0; ++j) {
      const int64_t row = groups.place[i * a.top_k + j];
      const float* from = plan.results + (others * a.n + groups.before[row]) * top;
      sum = vfma(vset1(groups.weight[row]), vload_n(from + col, n), sum);
    }
    vstore_bf16_n(a.out + i * top + col, sum, n);
  }
}

// Tokens are grouped by expert; one pass over an expert's panels serves all of them. The shared
// experts run with them, on every token. A token's sum runs over the shared expert first, then over
// its experts by index, whatever the batch.
template <class Isa>
void moe(const Ctx& ctx, const void* p) {
  const auto& a = *static_cast<const MoeArgs*>(p);
  Bump b{ctx.scratch};
  MoePlan<Isa> plan(b, a, ctx.nt);
  const Layout &gl = a.gate_up.layout, &dl = a.down.layout;
  const int64_t hidden = gl.cols, inter = gl.rows, top = dl.rows;

  Bump own{plan.grouping + ctx.tid * plan.grouping_bytes};
  Grouping groups(own, a);
  groups.build(a);

  // Activations, grouped by expert.
  Act x;
  if (plan.single) {
    x = act_at<Isa>(gl.format, plan.x + ctx.tid * plan.x_bytes, 1, hidden);
    act_prepare_row<Isa>(gl.format, x, 0, a.x, hidden);
  } else {
    x = act_at<Isa>(gl.format, plan.x, plan.rows, hidden);
    // A token is prepared once and copied to the rows of its other experts.
    const Range r = owned(a.n, ctx.tid, ctx.nt, 0);
    for (int64_t i = r.begin; i < r.end; ++i) {
      int64_t from = -1;
      for (int64_t j = 0; j < a.top_k; ++j) {
        const int64_t row = groups.place[i * a.top_k + j];
        if (row < 0) break;
        if (from < 0) {
          from = row;
          act_prepare_row<Isa>(gl.format, x, row, a.x + i * hidden, hidden);
        } else {
          act_copy_row<Isa>(gl.format, x, from, row, hidden);
        }
      }
    }
    ctx.barrier();
  }
  SharedPlan<Isa>* shared = nullptr;
  alignas(SharedPlan<Isa>) uint8_t shared_mem[sizeof(SharedPlan<Isa>)];
  const int64_t others = a.shared ? 1 : 0, lists = others + groups.active_count;
  Act sx{};
  if (a.shared) {
    shared = new (static_cast<void*>(shared_mem)) SharedPlan<Isa>(b, a, ctx.nt);
    sx = shared->x.fill(ctx, a.x, hidden);
  }
  if (plan.parted != nullptr && lists > 0 && pairs_part(gl.row_panels(), lists, ctx.nt)) {
    const Layout& sl = a.shared_gate_up.layout;
    const auto pairs_of = [&](int64_t list) { return (list < others ? sl : gl).row_panels(); };
    parted_gate_up<Isa>(ctx, lists, pairs_of, [&](int64_t list) {
      if (list < others)
        return GateUp{panels_of(a.shared_gate_up, 0), sx, a.n, plan.shared_gated, sl.rows, plan.parted};
      const int64_t e = groups.active[list - others], row0 = groups.first[e];
      float* parted = plan.parted + (others * a.n + groups.live[e]) * ctx.nt * 32;
      return GateUp{panels_of(a.gate_up, e),
                    plan.single ? x : x.from(row0),
                    groups.count[e],
                    plan.gated + row0 * inter,
                    inter,
                    parted};
    });
  } else {
    if (a.shared) {
      const Layout& sl = a.shared_gate_up.layout;
      auto gate = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
        store_gated(plan.shared_gated, sl.rows, sl.rows, m0, m, panel, np, c);
      };
      shared_gemm<Isa>(ctx, a.shared_gate_up, sx, a.n, 2, 0, sink_of(gate));
    }
    const Units pairs(gl, a.n, 2);
    const auto gate_up = [&](const RowBlock& rows, int64_t begin, int64_t end, const RowBlock* then,
                             int64_t first) {
      auto gate = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
        store_gated(plan.gated, inter, inter, rows.first + m0, m, panel, np, c);
      };
      const Panels w = panels_of(a.gate_up, rows.expert);
      const int64_t p0 = pairs.first(begin), p1 = pairs.first(end);
      const uint8_t* next = w.base + p1 * w.stride;
      if (then != nullptr) next = panels_of(a.gate_up, then->expert).base + pairs.first(first) * w.stride;
      gemm<Isa>(w, p0, p1, next, plan.single ? x : x.from(rows.first), rows.count, 2, sink_of(gate));
    };
    const auto each = [&](int64_t blocks, const auto& block, const auto& own) {
      each_share(ctx, blocks, take_panels(pairs.most(), a.n), own,
                 [&](int of, int64_t list, int64_t begin, int64_t end) {
                   const RowBlock rows = block(list);
                   if (end < own(list, of).end || list + 1 == blocks) return gate_up(rows, begin, end, nullptr, 0);
                   const RowBlock then = block(list + 1);
                   gate_up(rows, begin, end, &then, own(list + 1, of).begin);
                 });
    };
    if (groups.block_count > 0) {
      const BlockShares shares(ctx, groups, pairs.count());
      each(groups.block_count, [&](int64_t list) { return groups.blocks[list]; }, shares);
    } else {
      each(
          groups.active_count, [&](int64_t list) { return groups.all_of(groups.active[list]); },
          [&](int64_t list, int t) { return owned_in_turn(pairs.count(), others + list, lists, t, ctx.nt); });
    }
    ctx.barrier();
  }

  // The gated rows, in the form that `down` multiplies.
  const Act h = act_at<Isa>(dl.format, plan.h, plan.rows, inter);
  {
    // Only rows that exist count towards a thread's share.
    int64_t live = 0, seen = 0;
    for (int64_t e = 0; e < groups.experts; ++e) live += groups.count[e];
    const Range r = owned(live, ctx.tid, ctx.nt, 0);
    for (int64_t e = 0; e < groups.experts && seen < r.end; ++e) {
      for (int64_t j = 0; j < groups.count[e]; ++j, ++seen)
        if (seen >= r.begin && seen < r.end) {
          const int64_t row = groups.first[e] + j;
          act_prepare_row<Isa>(dl.format, h, row, plan.gated + row * inter, inter);
        }
    }
  }
  Act sh{};
  if (a.shared) sh = shared->h.fill(ctx, plan.shared_gated, a.shared_down.layout.cols);
  if (!a.shared || shared->h.own) ctx.barrier();
  if (plan.results != nullptr) return parted_down<Isa>(ctx, a, plan, groups, h, sh);
  // All experts for a few columns, the shared one first, then those columns as bf16.
  const Units columns(dl, a.n, 1);
  const auto own_columns = [&](int64_t, int t) { return owned(columns.count(), t, ctx.nt, 0); };
  // Columns that are computed together read the rows once.
  each_share(ctx, 1, Take{8, 4}, own_columns, [&](int, int64_t, int64_t begin, int64_t end) {
    const int64_t p0 = columns.first(begin), p1 = columns.first(end);
    const auto weights = [&](int64_t list) {
      return list < groups.active_count ? panels_of(a.down, groups.active[list]) : Panels{};
    };
    const auto after = [&](const Panels& w, int64_t list) {
      const Panels then = weights(list);
      return then.base == nullptr ? w.base + p1 * w.stride : then.base + p0 * then.stride;
    };
    if (a.shared) {
      auto first = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
        for (int i = 0; i < m; ++i)
          for (int q = 0; q < np; ++q) vstore(plan.sum_of(panel + q, m0 + i), vload(c + i * kTileCols + q * 16));
      };
      const Panels w = panels_of(a.shared_down, 0);
      gemm<Isa>(w, p0, p1, after(w, 0), sh, a.n, 1, sink_of(first));
    } else {
      std::memset(plan.sum_of(p0, 0), 0, 4 * static_cast<size_t>((p1 - p0) * a.n * kPanelRows));
    }
    for (int64_t list = 0; list < groups.active_count; ++list) {
      const int64_t e = groups.active[list], row0 = groups.first[e];
      auto add = [&](int64_t m0, int m, int64_t panel, int np, float* c) {
        const int64_t row = row0 + m0, rest = groups.count[e] - m0 - m;
        for (int64_t i = 0; i < tmin<int64_t>(rest, 32); ++i)
          for (int q = 0; q < np; ++q) vprefetch(plan.sum_of(panel + q, groups.token[row + m + i]));
        for (int i = 0; i < m; ++i) {
          const vf w = vset1(groups.weight[row + i]);
          for (int q = 0; q < np; ++q) {
            float* to = plan.sum_of(panel + q, groups.token[row + i]);
            vstore(to, vfma(w, vload(c + i * kTileCols + q * 16), vload(to)));
          }
        }
      };
      const Panels w = weights(list);
      gemm<Isa>(w, p0, p1, after(w, list + 1), h.from(row0), groups.count[e], 1, sink_of(add));
    }
    for (int64_t i = 0; i < a.n; ++i)
      for (int64_t panel = p0; panel < p1; ++panel) {
        const int n = static_cast<int>(tmin<int64_t>(16, top - panel * 16));
        vstore_bf16_n(a.out + i * top + panel * 16, vload(plan.sum_of(panel, i)), n);
      }
  });
}

}  // namespace
