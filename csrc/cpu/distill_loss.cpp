// Distillation losses: check -> choose the ISA's kernel -> spread rows, or parts of long rows, over threads.
#include "distill_loss.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "../common/check.h"
#include "../common/pages.h"
#include "../common/parallel.h"
#include "isa.h"

namespace lissom {
namespace {

using KernelTable = const DistillKernel& (*)();

#if defined(LISSOM_X86)
constexpr KernelTable kTable[kIsaCount] = {distill_loss_scalar, distill_loss_avx2, distill_loss_avx512vnni};
#else
constexpr KernelTable kTable[kIsaCount] = {distill_loss_scalar, nullptr, nullptr};
#endif

// Elements that one task takes at least; below two of them a second thread costs more than it brings.
constexpr int64_t kTask = 16 << 10;
// With so many rows per thread rows are shared out whole: no barriers.
constexpr int64_t kEnoughRows = 8;

// See DistillRow: of logits no farther apart than this, the difference loses no more than rounding does.
constexpr float kCloseMaxima = 4.0f;

double element(const Logits& logits, float softcap, int64_t row, int64_t j) {
  const int64_t at = row * logits.stride + j;
  float value = 0.0f;
  if (logits.type == DType::kFloat32) {
    value = static_cast<const float*>(logits.data)[at];
  } else {
    const uint16_t bits = static_cast<const uint16_t*>(logits.data)[at];
    if (logits.type == DType::kBFloat16) {
      const uint32_t wide = uint32_t{bits} << 16;
      static_assert(sizeof(wide) == sizeof(value), "bits");
      __builtin_memcpy(&value, &wide, 4);
    } else {
      const int exponent = bits >> 10 & 31, mantissa = bits & 1023;
      const double sign = bits >> 15 ? -1.0 : 1.0;
      if (exponent == 31) {
        value = mantissa ? std::numeric_limits<float>::quiet_NaN()
                         : static_cast<float>(sign * std::numeric_limits<double>::infinity());
      } else {
        value = static_cast<float>(
            sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24)));
      }
    }
  }
  const double z = static_cast<double>(value) * logits.scale;
  return softcap != 0.0f ? softcap * std::tanh(z / softcap) : z;
}

// Sums of two parts of a row as those of both.
void merge(double* sum, float* largest, double other, float other_largest, double rate) {
  const double m = *largest;
  if (other_largest > *largest || (other_largest != other_largest)) *largest = other_largest;
  const auto lowered = [&](double value, double from) {
    return value == 0.0 ? 0.0 : value * std::exp((from - static_cast<double>(*largest)) * rate);
  };
  *sum = lowered(*sum, m) + lowered(other, other_largest);
}

DistillRow combine(const DistillArgs& args, const DistillSums* parts, int64_t count) {
  DistillSums total = parts[0];
  for (int64_t i = 1; i < count; ++i) {
    float plain_max = total.student_max;
    merge(&total.plain, &plain_max, parts[i].plain, parts[i].student_max, args.plain_rate());
    merge(&total.student, &total.student_max, parts[i].student, parts[i].student_max, args.student_rate());
    merge(&total.teacher, &total.teacher_max, parts[i].teacher, parts[i].teacher_max, args.teacher_rate());
    total.z += parts[i].z;
  }
  DistillRow row{};
  row.student_max = total.student_max;
  row.teacher_max = total.teacher_max;
  row.student_sum = total.student;
  row.teacher_sum = args.has_teacher() ? total.teacher : 1.0;
  row.plain_sum = args.temperature != 1.0f && args.has_ce() ? total.plain : total.student;
  row.mean_z = total.z * args.plain_rate() / static_cast<double>(args.vocab);
  complete(args, &row);
  return row;
}

// KL(kept teacher || student) from the k log-probabilities that were kept.
double topk_divergence(const DistillArgs& args, int64_t row, const DistillRow& stats) {
  double sum = 0.0;
  for (int64_t i = row * args.topk.k; i < (row + 1) * args.topk.k; ++i) {
    const double log_q = args.topk.log_probs[i], q = std::exp(log_q);
    const double z = element(args.student, args.softcap, row, args.topk.indices[i]);
    const double a = (z - stats.student_max * args.plain_rate()) / args.temperature;
    if (q != 0.0) sum += q * (log_q - (a - stats.student_log));
  }
  return sum;
}

// What does not need a pass: CE and top-k. Read before the gradient is written, maybe over the logits.
double extra_loss(const DistillArgs& args, int64_t row, const DistillRow& stats) {
  // NaN where a logit is, though terms of probability 0 are left out.
  double loss = std::isnan(stats.student_sum + stats.teacher_sum) || stats.student_sum == 0.0 ||
                        stats.teacher_sum == 0.0
                    ? std::numeric_limits<double>::quiet_NaN()
                    : 0.0;
  const double square = static_cast<double>(args.temperature) * args.temperature;
  if (args.has_topk()) loss += args.term_scale * square * args.kl_weight * topk_divergence(args, row, stats);
  if (args.has_ce()) {
    const double z = element(args.student, args.softcap, row, args.labels[row]);
    const double smoothing = args.label_smoothing;
    double ce = stats.plain_log + stats.student_max * args.plain_rate() - (1.0 - smoothing) * z;
    if (smoothing != 0.0) ce -= smoothing * stats.mean_z;
    loss += args.ce_scale * args.ce_weight * ce;
  }
  return loss;
}

double term_loss(const DistillArgs& args, const DistillTerms& terms) {
  const double square = static_cast<double>(args.temperature) * args.temperature;
  double loss = 0.0;
  if (args.has_teacher()) loss += args.kl_weight * terms.divergence;
  if (args.entropy_weight != 0.0f) loss += args.entropy_weight * terms.entropy;
  return loss * args.term_scale * square;
}

void clear_grad(const DistillArgs& args, int64_t row) {
  if (args.grad == nullptr) return;
  const int64_t size = args.grad_type == DType::kFloat32 ? 4 : 2;
  __builtin_memset(static_cast<char*>(args.grad) + row * args.grad_stride * size, 0,
                   static_cast<size_t>(args.vocab * size));
}

int64_t part_end(const DistillArgs& args, int64_t part) {
  const int64_t end = (part + 1) * kDistillPart;
  return end < args.vocab ? end : args.vocab;
}

void add(DistillTerms* total, const DistillTerms& part) {
  total->divergence += part.divergence;
  total->student_divergence += part.student_divergence;
  total->entropy += part.entropy;
}

void add(DistillMean* total, const DistillMean& part) {
  total->sum += part.sum;
  total->mass += part.mass;
}

void correct(const DistillArgs& args, DistillRow* row, const DistillMean& residue) {
  (args.divergence == Divergence::kJs ? row->student_divergence : row->divergence) +=
      residue.sum / residue.mass;
}

void keep(DistillRow* row, const DistillTerms& terms) {
  row->divergence = terms.divergence;
  row->student_divergence = terms.student_divergence;
  row->entropy = terms.entropy;
}

void short_rows(const DistillKernel& kernel, const DistillArgs& args, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    if (!args.ignored(row)) continue;
    args.row_loss[row] = 0.0;
    clear_grad(args, row);
  }
  kernel.short_rows(args, begin, end);
}

void whole_row(const DistillKernel& kernel, const DistillArgs& args, int64_t row, DistillSums* sums,
               int64_t parts) {
  if (args.ignored(row)) {
    args.row_loss[row] = 0.0;
    return clear_grad(args, row);
  }
  for (int64_t i = 0; i < parts; ++i) sums[i] = kernel.sums(args, row, i * kDistillPart, part_end(args, i));
  DistillRow stats = combine(args, sums, parts);
  const double loss = extra_loss(args, row, stats);
  DistillTerms total{0.0, 0.0, 0.0};
  for (int64_t i = 0; i < parts; ++i) {
    add(&total, kernel.terms(args, row, stats, i * kDistillPart, part_end(args, i)));
  }
  args.row_loss[row] = loss + term_loss(args, total);
  if (args.grad == nullptr || !args.second_pass()) return;
  keep(&stats, total);
  if (args.has_residue()) {
    DistillMean mean{0.0, 0.0};
    for (int64_t i = 0; i < parts; ++i) {
      add(&mean, kernel.residue(args, row, stats, i * kDistillPart, part_end(args, i)));
    }
    correct(args, &stats, mean);
  }
  for (int64_t i = 0; i < parts; ++i) kernel.gradient(args, row, stats, i * kDistillPart, part_end(args, i));
}

}  // namespace

void complete(const DistillArgs& args, DistillRow* row) {
  if (args.has_ce() || args.has_topk() || args.entropy_weight != 0.0f) {
    row->student_log = std::log(row->student_sum);
    row->plain_log = args.temperature != 1.0f ? std::log(row->plain_sum) : row->student_log;
  }
  row->shift = args.has_teacher() ? std::log(row->student_sum / row->teacher_sum) : 0.0;
  row->close = args.student_rate() == args.teacher_rate() &&
               std::fabs(row->student_max - row->teacher_max) <= kCloseMaxima;
  if (row->close) {
    row->shift += row->student_max * args.student_rate() - row->teacher_max * args.teacher_rate();
  }
}

void distill_exp(const float* x, int64_t count, double rate, float* result) {
  kTable[static_cast<int>(active_isa())]().exp(x, count, rate, result);
}

void distill_loss(const DistillArgs& args, int threads) {
  LISSOM_CHECK(args.rows >= 0 && args.vocab >= 0, "distill_loss: negative size: rows=", args.rows,
               " vocab=", args.vocab);
  LISSOM_CHECK(threads >= 1, "distill_loss: threads=", threads, " must be at least 1");
  LISSOM_CHECK(args.temperature > 0.0f, "distill_loss: temperature=", args.temperature, " must be positive");
  if (args.rows == 0) return;
  if (args.vocab == 0) {
    for (int64_t row = 0; row < args.rows; ++row) {
      args.row_loss[row] = args.ignored(row) ? 0.0 : std::numeric_limits<double>::quiet_NaN();
    }
    return;
  }
  const DistillKernel& kernel = kTable[static_cast<int>(active_isa())]();
  if (args.grad != nullptr && args.grad != args.student.data && args.grad_stride == args.vocab) {
    const size_t size = args.grad_type == DType::kFloat32 ? 4 : 2;
    prefer_huge_pages(args.grad, static_cast<size_t>(args.rows * args.vocab) * size);
  }
  const int64_t parts = ceil_div(args.vocab, kDistillPart);
  if (args.rows * args.vocab < 2 * kTask) threads = 1;

  if (threads == 1 || parts == 1 || args.rows >= kEnoughRows * threads) {
    const int64_t rows_per_task = args.vocab < kTask ? ceil_div(kTask, args.vocab) : 1;
    TaskQueue tasks(ceil_div(args.rows, rows_per_task), threads);
    std::vector<DistillSums> memory(static_cast<size_t>(parts) * threads);
    run_team(threads, [&](Team team) {
      DistillSums* sums = memory.data() + parts * team.thread();
      for (int64_t task = tasks.take(team); task >= 0; task = tasks.take(team)) {
        const int64_t begin = task * rows_per_task, end = std::min(begin + rows_per_task, args.rows);
        if (args.short_rows()) {
          short_rows(kernel, args, begin, end);
          continue;
        }
        for (int64_t row = begin; row < end; ++row) whole_row(kernel, args, row, sums, parts);
      }
    });
    return;
  }

  // Few long rows: their parts are shared out, pass by pass.
  std::vector<DistillSums> sums(static_cast<size_t>(args.rows * parts));
  std::vector<DistillTerms> terms(static_cast<size_t>(args.rows * parts));
  std::vector<DistillRow> stats(static_cast<size_t>(args.rows));
  TaskQueue first(args.rows * parts, threads), rows(args.rows, threads), second(args.rows * parts, threads),
      again(args.rows, threads), third(args.rows * parts, threads), fourth(args.rows * parts, threads),
      last(args.rows, threads);
  std::vector<DistillMean> means(args.has_residue() ? static_cast<size_t>(args.rows * parts) : 0);
  const auto each_part = [&](TaskQueue& queue, const Team& team, const auto& body) {
    for (int64_t task = queue.take(team); task >= 0; task = queue.take(team)) {
      const int64_t row = task / parts, part = task % parts;
      if (!args.ignored(row)) body(row, part, task);
    }
  };
  run_team(threads, [&](Team team) {
    each_part(first, team, [&](int64_t row, int64_t part, int64_t task) {
      sums[task] = kernel.sums(args, row, part * kDistillPart, part_end(args, part));
    });
    team.barrier();
    for (int64_t row = rows.take(team); row >= 0; row = rows.take(team)) {
      args.row_loss[row] = 0.0;
      if (args.ignored(row)) {
        clear_grad(args, row);
        continue;
      }
      stats[row] = combine(args, sums.data() + row * parts, parts);
      args.row_loss[row] = extra_loss(args, row, stats[row]);
    }
    team.barrier();
    each_part(second, team, [&](int64_t row, int64_t part, int64_t task) {
      terms[task] = kernel.terms(args, row, stats[row], part * kDistillPart, part_end(args, part));
    });
    team.barrier();
    for (int64_t row = again.take(team); row >= 0; row = again.take(team)) {
      if (args.ignored(row)) continue;
      DistillTerms total{0.0, 0.0, 0.0};
      for (int64_t i = 0; i < parts; ++i) add(&total, terms[row * parts + i]);
      args.row_loss[row] += term_loss(args, total);
      keep(&stats[row], total);
    }
    if (args.grad == nullptr || !args.second_pass()) return;
    team.barrier();
    if (args.has_residue()) {
      each_part(fourth, team, [&](int64_t row, int64_t part, int64_t task) {
        means[task] = kernel.residue(args, row, stats[row], part * kDistillPart, part_end(args, part));
      });
      team.barrier();
      for (int64_t row = last.take(team); row >= 0; row = last.take(team)) {
        DistillMean mean{0.0, 0.0};
        for (int64_t i = 0; i < parts; ++i) add(&mean, means[row * parts + i]);
        correct(args, &stats[row], mean);
      }
      team.barrier();
    }
    each_part(third, team, [&](int64_t row, int64_t part, int64_t) {
      kernel.gradient(args, row, stats[row], part * kDistillPart, part_end(args, part));
    });
  });
}

}  // namespace lissom
