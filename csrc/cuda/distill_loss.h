// Distillation losses on the GPU, from logits: loss and gradient of each row, without a softmax in memory.
// Formulas: python/lissom/reference/distill_loss.py.
#pragma once

#include <cstdint>

#include "../common/formats.h"
#include "launch.h"

namespace lissom::cuda {

enum class DistillDivergence : int { kNone = 0, kForward = 1, kReverse = 2, kJs = 3 };

struct DistillLogits {
  const void* data;  // [rows, vocab] of type; null: none
  DType type;
  int64_t stride;  // of rows, in elements; columns are neighbours
  double scale;
};

struct DistillLoss {
  DistillLogits student, teacher;  // a teacher where there is a divergence
  const void* labels;              // [rows], int64 or int32, or null
  bool wide_labels;                // int64
  int64_t rows, vocab, ignore_index;
  DistillDivergence divergence;
  double temperature, kl_weight, ce_weight, entropy_weight, js_beta, label_smoothing;
  double softcap;               // 0: none
  double term_scale, ce_scale;  // the reduction's factors
  const double* scales;         // two factors more of the same, on the device; null: none
  double* loss;                 // [rows, parts]: a row's loss is their sum
  void* grad;                   // [rows, vocab] of the student's type, or null; may be the student's logits
  int64_t grad_stride;
  double* partials;  // [rows, parts, fields] of workspace
};

// What a launch needs besides: found out before it, so that PyTorch allocates it.
struct DistillPlan {
  int parts;   // of a row, side by side
  int fields;  // numbers of workspace for each of them
};

// Reads what the launch will depend on: all but pointers' targets and factors. `loss` and `partials` may be
// null.
DistillPlan distill_plan(const DistillLoss& args);

// A row whose label is neither ignore_index nor in [0, vocab) is NaN: nobody waits for a GPU to raise.
void distill_loss(const DistillLoss& args, Stream stream);

}  // namespace lissom::cuda
