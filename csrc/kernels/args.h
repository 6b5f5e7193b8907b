// Arguments of the kernels: plain data, fixed when an op is checked (or captured). What changes from
// step to step (token ids, positions, block tables) is read through pointers.
#pragma once

#include <cstdint>

#include "formats/format.h"
#include "runtime/team.h"

namespace lc {

struct Weight {
  const uint8_t* data;  // header first
  Layout layout;
};

// Paged latent cache of one layer: [blocks, block_size, dim] bf16. A token's row holds its normed
// latent (kv_lora_rank), its roped key (rope) and zeros up to `dim`.
struct Cache {
  uint16_t* data;
  int64_t blocks, block_size, dim;
};
// Where each row of a batch stands: positions [n], row_seq [n] (row of block_tables), block_tables
// [sequences, table_width].
struct Places {
  const int32_t* positions;
  const int32_t* row_seq;
  const int32_t* block_tables;
  int64_t table_width;
};

struct LinearArgs {
  const uint16_t* x;  // [n, cols] bf16
  int64_t n;
  Weight w;
  void* out;  // [n, rows] bf16 or fp32
  bool out_f32;
};
struct EmbeddingArgs {
  const uint16_t* table;  // [vocab, hidden]
  const int32_t* ids;
  int64_t vocab, hidden, n;
  uint16_t* out;
};
struct NormArgs {
  uint16_t* residual;  // [n, hidden]; updated by delta where there is one
  const uint16_t* delta;
  const float* weight;
  int64_t n, hidden;
  float eps;
  uint16_t* out;
};
struct MlaShape {
  int64_t heads, nope, rope, v, latent;  // latent: kv_lora_rank
};
struct MlaInputArgs {
  const uint16_t* x;  // [n, hidden]
  int64_t n, hidden, absorbed;
  bool lora;
  Weight q_a, q_b, kv_a, w_kc;  // without lora, q_b is q_proj and q_a is unused
  const float *q_norm, *kv_norm;
  float eps;
  const float* rope_table;  // [positions, rope]: cos of rope/2 pairs, then sin
  Places places;
  Cache cache;
  MlaShape shape;
  uint16_t* q;         // [n, heads, nope + rope]; rows >= absorbed are written
  uint16_t* q_latent;  // [n, heads, cache.dim]; rows < absorbed are written
};
struct MlaDecodeArgs {
  const uint16_t* q_latent;
  int64_t n;
  Weight w_vc;
  Places places;
  Cache cache;
  MlaShape shape;
  float scale;
  uint16_t* out;  // [n, heads * v]
};
// segments [count, 4] int32, host memory: first row, rows, sequence (row of block_tables), position of
// the first row.
struct MlaPrefillArgs {
  const uint16_t* q;
  int64_t n;
  Weight kv_b;
  const int32_t* segments;
  int64_t segment_count;
  int64_t max_context;  // longest context of a segment
  int64_t max_rows;     // most rows of a segment
  Places places;
  Cache cache;
  MlaShape shape;
  float scale;
  uint16_t* out;
};
struct MlpArgs {
  const uint16_t* x;
  int64_t n;
  Weight gate_up, down;
  uint16_t* out;
};
struct RouteArgs {
  const uint16_t* x;
  int64_t n;
  Weight w;
  const float* bias;  // added for choice only; null: softmax scores
  int64_t n_group, topk_group, top_k;
  bool top2_groups;  // a group's score: sum of its two best, else its best
  bool normalize;
  float factor;
  int32_t* ids;    // [n, top_k]
  float* weights;  // [n, top_k]
};
struct MoeArgs {
  const uint16_t* x;
  int64_t n, top_k;
  const int32_t* ids;
  const float* weights;
  Weight gate_up, down;
  bool shared;
  Weight shared_gate_up, shared_down;
  uint16_t* out;
};
// Packs one part of one matrix from row-major source rows.
struct PackArgs {
  const uint8_t* src;   // [rows, cols] of the format's element
  const float* scale;   // INT8, INT8_WIDE: [rows]; FP8: [ceil(rows/128), ceil(cols/128)]; else null
  const float* column_scale;  // INT8_WIDE: [cols]
  uint8_t* dst;         // header first
  Layout layout;
  int64_t item, part;
};
// Turns stored weights into those of another format, row-major on both sides. INT8: scale [rows]; FP8:
// scale [ceil(rows/128), ceil(cols/128)].
struct QuantizeArgs {
  const uint16_t* w;  // [rows, cols] bf16
  int64_t rows, cols;
  uint8_t* codes;  // [rows, cols]
  float* scale;
};
struct DequantizeArgs {
  const uint8_t* codes;
  const float* scale;
  int64_t rows, cols;
  uint16_t* out;  // [rows, cols] bf16
};
struct PeakArgs {
  Format format;
  int64_t iters;
  int64_t* ops;  // operations done, one line a thread
};
struct HeadsArgs {  // batched product a head: out[n, h, rows] = x[n, h, cols] * w[h]
  const uint16_t* x;
  int64_t n;
  Weight w;
  uint16_t* out;
};
// Sampling. Rows of float logits, `vocab` wide.
struct RestrictArgs {
  float* logits;
  int64_t vocab, m;
  const int32_t* rows;     // [m]
  const int32_t* allowed;  // [m, ceil(vocab / 32)]
};
// Row i's entries stand at offsets[i]..offsets[i + 1].
struct BiasArgs {
  float* logits;
  int64_t n, vocab;
  const int32_t *offsets, *token_ids;
  const float* bias;
};
struct PenalizeArgs {
  float* logits;
  int64_t n, vocab;
  const int32_t *offsets, *output_offsets, *token_ids;
  const float *repetition, *presence, *frequency;
};
struct SampleArgs {
  const float* logits;
  int64_t n, vocab;
  const float* temperature;
  const int32_t* top_k;
  const float *top_p, *min_p;
  const int64_t *seeds, *counters;
  int32_t* token_ids;
  float* logprobs;
};
struct GreedyArgs {
  const float* logits;
  int64_t n, vocab;
  int32_t* token_ids;
};
struct LogprobsArgs {
  const float* logits;
  int64_t n, vocab, m, k;
  const int32_t* token_ids;  // [n, m]
  float* values;
  int32_t* ranks;
  int32_t* top_ids;  // [n, k]
  float* top_values;
};

}  // namespace lc
