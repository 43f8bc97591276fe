// Distillation losses on the CPU, from logits: loss and gradient of each row, without a softmax in memory.
// Formulas: python/lissom/reference/distill_loss.py.
#pragma once

#include <cstdint>

#include "../common/formats.h"

namespace lissom {

enum class Divergence : int { kForward = 0, kReverse = 1, kJs = 2 };

// Logits [rows, vocab], rows `stride` elements apart, times `scale`, then capped where there is a cap.
struct Logits {
  const void* data;
  DType type;
  int64_t stride;
  float scale;

  // Whether they are scaled as they are read. Otherwise the scale is a factor of what is exponentiated, which
  // rounds less; the largest logit must remain it, and the factor large enough to bring the lowest float, as
  // which -infinity is exponentiated, to 0.
  bool scaled_first(float softcap) const { return softcap != 0.0f || scale < 1e-20f; }
};

// What the teacher is known by, where only its k best tokens were kept.
struct TopK {
  const float* log_probs;  // [rows, k]; null: there are logits, or no teacher
  const int64_t* indices;  // [rows, k], in range
  int64_t k;
};

struct DistillArgs {
  Logits student, teacher;  // teacher.data is null without a teacher
  TopK topk;
  const int64_t* labels;  // [rows] or null; in range or ignore_index
  int64_t rows, vocab;
  float temperature, kl_weight, ce_weight, entropy_weight;
  Divergence divergence;
  float js_beta;
  int64_t ignore_index;
  float label_smoothing;
  float softcap;  // 0: none
  double term_scale, ce_scale;
  double* row_loss;  // [rows]
  void* grad;        // [rows, vocab] or null; may be the student's logits themselves
  DType grad_type;
  int64_t grad_stride;

  // Logits as they are read, times these, are what is exponentiated.
  double student_rate() const { return plain_rate() / temperature; }
  double teacher_rate() const { return (teacher.scaled_first(softcap) ? 1.0 : teacher.scale) / temperature; }
  double plain_rate() const { return student.scaled_first(softcap) ? 1.0 : student.scale; }  // without it

  bool has_teacher() const { return teacher.data != nullptr && kl_weight != 0.0f; }
  bool has_topk() const { return topk.log_probs != nullptr && kl_weight != 0.0f; }
  bool has_ce() const { return labels != nullptr && ce_weight != 0.0f; }
  bool has_residue() const { return has_teacher() && divergence != Divergence::kForward; }
  // Forward KL and nothing else, all of one type.
  bool plain_forward() const {
    return has_teacher() && divergence == Divergence::kForward && entropy_weight == 0.0f && !has_ce() &&
           !has_topk() && softcap == 0.0f && student.scale == 1.0f && !teacher.scaled_first(softcap) &&
           student.type == teacher.type && student.type == grad_type;
  }
  bool ignored(int64_t row) const { return labels != nullptr && labels[row] == ignore_index; }
  // Rows of one vector, and a loss that needs no more than that.
  bool short_rows() const {
    return vocab <= 16 && !second_pass() && !has_topk() && !student.scaled_first(softcap) &&
           !teacher.scaled_first(softcap);
  }
  // The gradient needs sums that only a pass of its own over the row can give.
  bool second_pass() const {
    return (has_teacher() && divergence != Divergence::kForward) || entropy_weight != 0.0f;
  }
};

// Sums over a part of a row, relative to its own maxima. z: logits, capped and scaled if there is a cap.
struct DistillSums {
  float student_max, teacher_max;
  double student, teacher;  // sum of exp((z - max) * rate)
  double plain;             // the same at temperature 1, for CE where the temperature is another
  double z;                 // sum of z, for label smoothing
};

// A row as a whole: log-sum-exps relative to the maxima.
struct DistillRow {
  float student_max, teacher_max;
  double student_sum, teacher_sum, plain_sum;
  double student_log, plain_log;  // where CE, entropy or a top-k teacher need them
  double mean_z;
  // log p_t - log p_s = (t - s) * rate + shift where rates are the same and maxima close, so that t - s is
  // the best difference to begin with; otherwise, with bases, the maxima,
  // (t - teacher_base) * teacher_rate + shift - (s - student_base) * student_rate.
  bool close;
  double shift;
  // Known after the terms: means that the gradients of reverse KL, JS and entropy subtract.
  double divergence, student_divergence, entropy;
};

// Fills in what follows from maxima and sums: logs and shift.
void complete(const DistillArgs& args, DistillRow* row);

// Sums over a part of a row.
struct DistillTerms {
  double divergence;          // as asked for
  double student_divergence;  // KL(student || mixture), for JS
  double entropy;
};

struct DistillMean {
  double sum, mass;
};

// Elements of a row that are one task, whatever the number of threads: so results do not depend on it.
constexpr int64_t kDistillPart = 16384;

// What one ISA provides; ranges of a row's elements are half open.
struct DistillKernel {
  DistillSums (*sums)(const DistillArgs& args, int64_t row, int64_t begin, int64_t end);
  // Also writes the gradient, unless that needs a second pass.
  DistillTerms (*terms)(const DistillArgs& args, int64_t row, const DistillRow& stats, int64_t begin,
                        int64_t end);
  // Sum of p (log p - log q - divergence), or for JS of p (log p - log m - student_divergence), and of p:
  // what rounding left of the mean that the gradient subtracts. At a mean of 1e4 that is 1e-4, more than the
  // gradient may be off; where p is nearly 1 somewhere, all of the gradient there.
  DistillMean (*residue)(const DistillArgs& args, int64_t row, const DistillRow& stats, int64_t begin,
                         int64_t end);
  void (*gradient)(const DistillArgs& args, int64_t row, const DistillRow& stats, int64_t begin, int64_t end);
  // Rows that are not ignored, from logits to loss and gradient, where args.short_rows().
  void (*short_rows)(const DistillArgs& args, int64_t begin, int64_t end);
  void (*exp)(const float* x, int64_t count, double rate, float* result);
};

const DistillKernel& distill_loss_scalar();
const DistillKernel& distill_loss_avx2();
const DistillKernel& distill_loss_avx512vnni();

// exp(rate * x) as the loss computes it, for x <= 0 and rate > 0. For tests.
void distill_exp(const float* x, int64_t count, double rate, float* result);

// Computes with the selected ISA on up to `threads` threads. Throws std::invalid_argument on bad sizes.
void distill_loss(const DistillArgs& args, int threads);

}  // namespace lissom
