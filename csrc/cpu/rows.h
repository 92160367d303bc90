// A tile of raw logits, columns [col0, col0 + cols) of the vocabulary, and the instruction sets that row
// kernels are compiled for.
#pragma once

#include <stdint.h>

#include "core/number.h"

namespace prefcore::cpu {

// "acc" is float, or double where the tile is double. Strides count elements; null pointers are absent
// options.
struct LogitRows {
  const void* tile;  // [rows, cols] of `type`
  int64_t tile_stride;
  Type type;
  void* out;  // [rows, cols] of `out_type`; may be the tile itself
  int64_t out_stride;
  Type out_type;
  int64_t rows, cols, col0;
  const int64_t* targets;    // [rows]
  const void* temperatures;  // [rows] acc
  const void* bias;          // [cols] acc
  void* state;               // [7, rows] acc, in the order of prefcore.ops._spec.Row
  int64_t state_stride;
  int64_t vocab, ignore_index;
  double logit_scale, temperature;
  double softcap;  // 0: none
  Type round_to;   // `type`: no rounding
  bool entropy, mean, squares, top1;

  void* acc = nullptr;  // [rows, acc_cols] acc: follows the peaks in weigh
  int64_t acc_cols = 0, acc_stride = 0;
  const void* entropies = nullptr;  // [rows] acc, for grad
  const void* coef = nullptr;       // [3, rows] acc, for grad; [6, rows] in a pair
  int64_t coef_stride = 0;
};

// The instruction sets that this machine runs, slowest first; each is a valid `level` of a kernel.
int isa_count();
const char* isa_name(int level);

}  // namespace prefcore::cpu
