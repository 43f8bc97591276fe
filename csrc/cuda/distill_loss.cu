// Distillation losses: check -> choose -> launch.
#include "distill_loss.h"

#include <algorithm>

#include "distill_loss_hopper.cuh"
#include "distill_loss_kernel.cuh"

namespace lissom::cuda {
namespace {

constexpr const char* kOp = "distill_loss";

bool has_teacher(const DistillLoss& args) { return args.divergence != DistillDivergence::kNone; }
bool has_ce(const DistillLoss& args) { return args.labels != nullptr && args.ce_weight != 0.0; }

int64_t bytes_of(DType type) { return type == DType::kFloat32 ? 4 : 2; }

void check(const DistillLoss& args) {
  constexpr int64_t kMostColumns = (int64_t{1} << 31) - 64;  // columns are counted in 32 bits
  LISSOM_CHECK(args.rows >= 0 && args.vocab >= 1, kOp, ": logits of shape [", args.rows, ", ", args.vocab,
               "]");
  LISSOM_CHECK(args.vocab <= kMostColumns, kOp, ": a vocabulary of ", args.vocab, " is larger than ",
               kMostColumns);
  const auto check_stride = [&](const char* name, int64_t stride) {
    LISSOM_CHECK(stride >= args.vocab || args.rows <= 1, kOp, ": ", name, "=", stride,
                 " is less than a row of ", args.vocab);
  };
  check_stride("student_stride", args.student.stride);
  if (has_teacher(args)) check_stride("teacher_stride", args.teacher.stride);
  if (args.grad) check_stride("grad_stride", args.grad_stride);
}

// Whether groups of all rows begin on multiples of 16 bytes, once they do so in the student's.
bool rows_begin_alike(const DistillLoss& args) {
  struct Tensor {
    const void* data;
    int64_t bytes, stride;
  };
  const int64_t student = bytes_of(args.student.type);
  const Tensor first = {args.student.data, student, args.student.stride};
  const Tensor others[] = {{args.teacher.data, bytes_of(args.teacher.type), args.teacher.stride},
                           {args.grad, student, args.grad_stride}};
  const auto begins = [](const Tensor& t) { return reinterpret_cast<uintptr_t>(t.data) % 16; };
  const auto moves = [](const Tensor& t) { return t.stride * t.bytes % 16; };
  for (const Tensor& t : others) {
    if (t.data == nullptr) continue;
    if (begins(t) != begins(first) || moves(t) != moves(first)) return false;
    if (t.bytes != first.bytes && (begins(t) != 0 || moves(t) != 0)) return false;
  }
  return begins(first) % static_cast<uintptr_t>(student) == 0;
}

DistillParams derived(const DistillLoss& args) {
  constexpr double kLog2E = 1.4426950408889634;
  const double t = args.temperature;
  const bool cap = args.softcap != 0.0;
  // What exponents are made of is logits times that, or tanh or scaled logits times that: the largest logit
  // has to be the largest exponent.
  const auto unit = [&](double scale) { return cap ? args.softcap : scale > 0.0 ? scale : 1.0; };
  DistillParams p = {};
  p.a = args;
  p.student_rate = static_cast<float>(unit(args.student.scale) * kLog2E / t);
  p.teacher_rate = static_cast<float>(unit(args.teacher.scale) * kLog2E / t);
  p.plain_rate = static_cast<float>(unit(args.student.scale) * kLog2E);
  p.student_factor = static_cast<float>(cap ? args.student.scale / args.softcap : args.student.scale);
  p.teacher_factor = static_cast<float>(cap ? args.teacher.scale / args.softcap : args.teacher.scale);
  p.cap = cap;
  p.student_scaled = !cap && args.student.scale <= 0.0;
  p.teacher_scaled = !cap && args.teacher.scale <= 0.0;
  p.entropy = args.entropy_weight != 0.0;
  p.ce = has_ce(args);
  p.plain = p.ce && t != 1.0;
  p.smooth = p.ce && args.label_smoothing != 0.0;
  p.beta = static_cast<float>(args.js_beta);
  // Reverse KL's deviations from its mean are in units of ln 2, JS's are of its student's part.
  const double of_mean = args.divergence == DistillDivergence::kReverse ? 0.6931471805599453
                         : args.divergence == DistillDivergence::kJs    ? 1.0 - args.js_beta
                                                                        : 1.0;
  p.kl_loss = args.term_scale * t * t * args.kl_weight;
  p.entropy_loss = args.term_scale * t * t * args.entropy_weight;
  p.ce_loss = args.ce_scale * args.ce_weight;
  p.kl_grad = args.term_scale * t * args.kl_weight * args.student.scale * of_mean;
  p.entropy_grad = -args.term_scale * t * args.entropy_weight * args.student.scale * 0.6931471805599453;
  p.ce_grad = args.ce_scale * args.ce_weight * args.student.scale;
  p.vector = rows_begin_alike(args);
  return p;
}

// Forward KL and nothing else, of logits of one type: what is trained with most has code of its own.
bool plain_forward(const DistillLoss& args) {
  return args.divergence == DistillDivergence::kForward && !has_ce(args) && args.entropy_weight == 0.0 &&
         args.softcap == 0.0 && args.student.scale > 0.0 && args.teacher.scale > 0.0 &&
         args.student.type == args.teacher.type;
}

// ---- choose ------------------------------------------------------------------------------------------

// Threads that a multiprocessor's registers are shared out to: 72 for each, or 128. Two groups of both
// tensors at once then are 56 and 64 KB of loads under way.
constexpr int plain_threads(int64_t bytes) { return bytes == 4 ? 512 : 896; }
constexpr int kPlainGroups = 2;
constexpr int kOptionThreads = 512, kOptionGroups = 1;

// Shared memory that the kernel has besides what it keeps of rows: four steps of 896 threads and this are all
// that a block can have on Hopper.
constexpr int kStaticBytes = 3 << 10;
template <typename F>
constexpr bool fits_static_bytes() {
  return F::kThreads / kWarp * (sizeof(Sums<double>) + sizeof(Means)) + sizeof(Means) + sizeof(Row) <=
         kStaticBytes;
}

struct Choice {
  dim3 block;
  int parts, part_groups, held, shared_bytes;
};

// By count. On an H200 only the form below was timed.
Choice choose(const DistillLoss& args) {
  constexpr int64_t kWarpRow = 1024;   // columns up to which a warp has a row: 4 groups a lane
  constexpr int64_t kLongRow = 16384;  // from here on rows are split where they leave processors idle
  constexpr int64_t kSteps = 256;      // a thread adds up so many float32 sums of a step, no more
  constexpr int kRowsOfBlock = 8;      // of a warp each: a multiprocessor's block limit leaves it full
  const bool plain = plain_forward(args);
  const int most = plain ? plain_threads(bytes_of(args.student.type)) : kOptionThreads;
  const int64_t groups = ceil_div(args.vocab + kGroup - 1, kGroup);  // a row may begin 7 columns into one
  const int64_t at_once = plain ? kPlainGroups : kOptionGroups;

  Choice choice = {};
  choice.parts = 1;
  const Device& device = current_device();
  const int64_t wanted = int64_t{2} * device.multiprocessors;
  const int64_t step = most * at_once;  // groups
  if (args.rows < wanted && args.vocab >= kLongRow) {
    choice.parts =
        static_cast<int>(std::min({int64_t{kMostParts}, ceil_div(wanted, std::max<int64_t>(args.rows, 1)),
                                   ceil_div(groups, 128 * at_once)}));
  }
  choice.parts = static_cast<int>(
      std::min<int64_t>(kMostParts, std::max<int64_t>(choice.parts, ceil_div(groups, step * kSteps))));
  choice.part_groups = static_cast<int>(ceil_div(groups, choice.parts));
  choice.parts = static_cast<int>(ceil_div(groups, choice.part_groups));

  // Half the threads for twice the blocks, of which one computes while the other one reads, for as long as a
  // thread has 9 groups at most; then as few as come with as many groups each, so that none idles at the end:
  // 448 for 32000 columns, 896 for 128256.
  int64_t limit = most;
  while (limit >= 256 && limit / 2 * 9 >= choice.part_groups) limit /= 2;
  const int64_t times = ceil_div(choice.part_groups, limit);
  const auto threads = static_cast<unsigned>(ceil_div(choice.part_groups, times * kWarp) * kWarp);
  choice.block = args.vocab <= kWarpRow ? dim3(kWarp, kRowsOfBlock) : dim3(threads, 1);

  // Shared memory is what the blocks of a multiprocessor's threads can have. Of 128256 bfloat16 columns 896
  // threads keep 8 of their 18 groups each, on an H200: the other 285 KB of each of 132 rows are 38 MB, which
  // its 60 MB of L2 hold. An A100 keeps 4, and the 43 MB of 108 rows are more than its L2's 40: some are read
  // from memory twice. So are most of 262144 columns, also on an H200.
  if (choice.parts == 1) {
    const int count = static_cast<int>(choice.block.x * choice.block.y);
    const int64_t blocks = std::max<int64_t>(1, args.vocab <= kWarpRow ? most / count : most / limit);
    const int64_t room = (device.shared_bytes + 1024) / blocks - 1024 - kStaticBytes;
    const int64_t bytes = bytes_of(args.student.type) + (has_teacher(args) ? bytes_of(args.teacher.type) : 0);
    const int64_t step_bytes = count * at_once * kGroup * bytes;
    const int64_t steps = ceil_div(choice.part_groups, choice.block.x * at_once);
    choice.held = static_cast<int>(std::max<int64_t>(0, std::min(steps, room / step_bytes)));
    choice.shared_bytes = static_cast<int>(choice.held * step_bytes);
  }
  return choice;
}

// A row a cluster, on Hopper.
constexpr int kClusterThreads = 1024;  // of a multiprocessor: 64 registers for each, 128 where options are

struct ClusterChoice {
  int cluster;  // 0: another form
  int threads, shared_bytes;
};

// By count. An H200 took 0.80 ms for 8192 rows of 32000 columns of bfloat16 and 2.88 ms for 128256, autograd
// included (bench/results/gpu-nvidia-h200.md): 1.16 and 1.12 times Triton's speed, half of the bandwidth, so
// the counts that this rests on are wrong somewhere. Rows of all tensors lie on 16 bytes, as the copy engine
// wants them. The smallest cluster of which a multiprocessor takes three blocks, one that loads while others
// compute, or as many as it takes: up to 32000 columns of bfloat16 that is 2 blocks, to 128256 8, where
// 151936 leave room for two of them and 262144 for one. Shorter rows than kShortRow are cached anyway, and
// fewer rows than fill the GPU in clusters are better split further.
ClusterChoice choose_cluster(const DistillLoss& args) {
  constexpr int64_t kShortRow = 8192;
  constexpr int64_t kBesides = 5 << 10;  // as kStaticBytes, with barriers and records
  const auto on_16_bytes = [&](const void* data, int64_t stride, DType type) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * bytes_of(type) % 16 == 0;
  };
  if (!hopper_forms() || args.vocab < kShortRow || args.vocab % kGroup != 0 ||
      !on_16_bytes(args.student.data, args.student.stride, args.student.type) ||
      !on_16_bytes(args.teacher.data, args.teacher.stride, args.teacher.type) ||
      !on_16_bytes(args.grad, args.grad_stride, args.student.type)) {
    return {};
  }
  const Device& device = current_device();
  const bool plain = plain_forward(args);
  const int64_t most = plain ? kClusterThreads : kOptionThreads,
                at_once = plain ? kPlainGroups : kOptionGroups;
  const int64_t groups = args.vocab / kGroup;
  const int64_t group_bytes =
      kGroup * (bytes_of(args.student.type) + (has_teacher(args) ? bytes_of(args.teacher.type) : 0));
  for (int cluster = 1; cluster <= kMostCluster; cluster *= 2) {
    const int64_t slice = ceil_div(groups, cluster), bytes = slice * group_bytes;
    const int64_t blocks = std::min<int64_t>(3, (device.shared_bytes + 1024) / (bytes + 1024 + kBesides));
    if (blocks < 3 && cluster < kMostCluster) continue;
    if (blocks < 1 || args.rows < ceil_div(device.multiprocessors, cluster)) return {};
    // As few threads as come with as many groups each: none idles at the end.
    const int64_t times = ceil_div(slice, most / blocks / kWarp * kWarp);
    const int64_t threads = ceil_div(slice, times * kWarp) * kWarp;
    if (ceil_div(slice, at_once * threads) > kMostChunks) return {};
    return {cluster, static_cast<int>(threads), static_cast<int>(bytes)};
  }
  return {};
}

// ---- launch ------------------------------------------------------------------------------------------

template <typename F>
void run(DistillParams p, const Choice& choice, Stream stream) {
  static_assert(fits_static_bytes<F>());
  p.parts = choice.parts;
  p.part_groups = choice.part_groups;
  p.held = choice.held;
  const dim3 grid(grid_size(kOp, ceil_div(p.a.rows, choice.block.y)), static_cast<unsigned>(choice.parts));
  const auto passes = [&](int first, int last) {
    p.first_pass = first;
    p.last_pass = last;
    launch({kOp, grid, choice.block, stream, choice.shared_bytes}, distill_kernel<F>, p);
  };
  const bool mean = F::kMean && p.a.grad != nullptr;
  if (choice.parts == 1) return passes(1, mean ? 4 : 2);
  passes(1, 1);
  passes(2, 2);
  if (mean && F::kJs) passes(3, 3);
  if (mean) passes(4, 4);
}

template <typename F>
void run_cluster(DistillParams p, const ClusterChoice& choice, Stream stream) {
  p.parts = choice.cluster;
  p.first_pass = 1;
  p.last_pass = F::kMean && p.a.grad != nullptr ? 4 : 2;
  const dim3 grid(grid_size(kOp, p.a.rows * choice.cluster));
  const dim3 block(static_cast<unsigned>(choice.threads));
  launch({kOp, grid, block, stream, choice.shared_bytes, choice.cluster}, distill_cluster_kernel<F>, p);
}

template <typename T>
using ClusterForm = DistillForm<T, DistillDivergence::kForward, false, kPlainGroups, kClusterThreads>;
template <typename T>
using PlainForm = DistillForm<T, DistillDivergence::kForward, false, kPlainGroups, plain_threads(sizeof(T))>;
template <DistillDivergence kD>
using OptionForm = DistillForm<AnyFloat, kD, true, kOptionGroups, kOptionThreads>;

}  // namespace

DistillPlan distill_plan(const DistillLoss& args) {
  check(args);
  if (const int cluster = choose_cluster(args).cluster) return {cluster, 0};
  const int parts = choose(args).parts;
  return {parts, parts > 1 ? kFields : 0};
}

void distill_loss(const DistillLoss& args, Stream stream) {
  check(args);
  if (args.rows == 0) return;
  const DistillParams p = derived(args);
  const ClusterChoice cluster = choose_cluster(args);
  const Choice choice = choose(args);
  const auto run_either = [&](auto form, auto cluster_form) {
    if (cluster.cluster != 0) return run_cluster<decltype(cluster_form)>(p, cluster, stream);
    run<decltype(form)>(p, choice, stream);
  };
  const auto run_plain = [&](auto type) {
    run_either(PlainForm<decltype(type)>(), ClusterForm<decltype(type)>());
  };
  if (plain_forward(args)) {
    switch (args.student.type) {
      case DType::kFloat32: return run_plain(float());
      case DType::kBFloat16: return run_plain(BFloat16());
      case DType::kFloat16: return run_plain(Float16());
    }
  }
  const auto run_options = [&](auto form) { run_either(form, form); };
  switch (args.divergence) {
    case DistillDivergence::kNone: return run_options(OptionForm<DistillDivergence::kNone>());
    case DistillDivergence::kForward: return run_options(OptionForm<DistillDivergence::kForward>());
    case DistillDivergence::kReverse: return run_options(OptionForm<DistillDivergence::kReverse>());
    case DistillDivergence::kJs: return run_options(OptionForm<DistillDivergence::kJs>());
  }
}

}  // namespace lissom::cuda
