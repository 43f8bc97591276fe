// int4 linear: check -> choose -> launch.
#include "int4_linear.h"

#include <algorithm>
#include <type_traits>

#include "int4_linear_few.cuh"
#include "int4_linear_hopper.cuh"
#include "int4_linear_kernel.cuh"
#include "quantize_rows.h"

namespace lissom::cuda {
namespace {

constexpr const char* kOp = "int4_linear";

void check(const Int4Linear& args) {
  const Int4Fragments& layout = args.layout;
  LISSOM_CHECK(args.m >= 0 && args.n >= 0 && layout.k >= 0, kOp, ": negative size");
  LISSOM_CHECK(layout.segment == 32 || layout.segment == 64 || layout.segment == kInt4Chunk, kOp,
               ": segment=", layout.segment, " must be 32, 64 or ", kInt4Chunk);
  LISSOM_CHECK(!layout.one_group || layout.segment == kInt4Chunk, kOp, ": segments of one group have ",
               kInt4Chunk, " columns, not ", layout.segment);
  const int zeros = static_cast<int>(args.zeros);
  LISSOM_CHECK(zeros == 0 || (zeros > 0 && zeros <= 2 && layout.entry_bytes == 0), kOp, ": zeros=", zeros,
               " must be 0, 1 or 2, and 0 with tables");
  LISSOM_CHECK(layout.panel_bytes() <= INT32_MAX, kOp, ": k=", layout.k, " is too large");
  LISSOM_CHECK(args.x_stride >= layout.k || args.m <= 1, kOp, ": x_stride=", args.x_stride,
               " is less than k=", layout.k);
  LISSOM_CHECK(!args.weight_only || args.x_type != DType::kFloat32, kOp,
               ": weight-only x must be bfloat16 or float16");
  LISSOM_CHECK(reinterpret_cast<uintptr_t>(args.packed) % 16 == 0, kOp,
               ": packed must lie on a multiple of 16 bytes");
}

Int4Form form_of(const Int4Linear& args) {
  if (args.layout.entry_bytes) return Int4Form::kTable;
  const bool sums = args.weight_only ? args.zeros == Int4Zeros::kFloat : args.zeros != Int4Zeros::kNone;
  return sums ? Int4Form::kSums : Int4Form::kPlain;
}

// ---- choosing. Measured where it says so; else by count, for an H200 (132 multiprocessors at 1.7 GHz and
// 4.8 TB/s, which is 21 bytes, 42 codes, a cycle and multiprocessor) where no other GPU is named.

// Tiles of rows. A tile needs 0.16 mma per cycle and 8 rows where 0.65 can be had: 32 rows are near the limit
// of the weight's bytes, 64 beyond it. Above that the chunks of two warps are not worth adding up: two sets
// of rows share the codes instead.
struct Tiling {
  int tiles;  // of 8 rows, of a warp
  bool deep;
  bool hopper = false;  // wgmma, 128 rows
  int along = 0;        // few rows: pairs of panels of a block
};

Tiling choose_tiling(int64_t m, Int4Form form) {
  if (form == Int4Form::kTable && m <= 16) return {2, true};
  if (form != Int4Form::kPlain) return {4, false};  // registers
  if (m <= 32) return {4, true};
  if (m <= 64) return {8, true};
  return {8, false};
}

// Latency times bandwidth is some 30 KB a multiprocessor; three stages of 17 KB (codes of 256 k-values) are
// under way in each of two blocks. With less shared memory (99 KB: sm_86, sm_89) one block has it all.
struct Pipeline {
  int stages, shared_bytes, blocks;  // blocks: of a multiprocessor
};

Pipeline choose_pipeline(int fixed, int stage, int least, int most_blocks) {
  constexpr int kMostStages = 4, kReserved = 1 << 10;  // of every block, for the system
  const int available = current_device().shared_bytes;
  for (int blocks = most_blocks; blocks >= 1; --blocks) {
    const int stages = std::min(kMostStages, (available / blocks - kReserved - fixed) / stage);
    if (stages >= 3 || (blocks == 1 && stages >= 2)) {
      return {stages, fixed + std::max(stages * stage, least), blocks};
    }
  }
  return {0, 0, 0};
}

// Splits of K: the number for which the blocks that come last end soonest. A block costs its chunks, and
// besides what it takes to start and to add up, some 4 chunks' time.
int64_t choose_splits(int64_t tiles, int64_t chunks, int64_t slots) {
  constexpr int64_t kMost = 64, kOverhead = 4;
  if (chunks == 0) return 1;
  int64_t best = 1, best_cost = INT64_MAX;
  for (int64_t splits = 1; splits <= std::min(kMost, std::max<int64_t>(1, chunks / 2)); ++splits) {
    const int64_t each = ceil_div(chunks, splits);
    if (ceil_div(chunks, each) != splits) continue;  // some would be empty
    const int64_t cost = ceil_div(tiles * splits, slots) * (each + (splits > 1 ? kOverhead : 0));
    if (cost < best_cost) best = splits, best_cost = cost;
  }
  return best;
}

struct Plan {
  Tiling tiling;
  Pipeline pipeline;
  int64_t tiles, splits, chunks;  // chunks: of a split
  int64_t tile_sums;
};

template <typename T, int kTiles, bool kDeep>
Plan plan_tile(const Int4Linear& args, Int4Form form) {
  using Tile = Int4Tile<T, kTiles, kDeep>;
  Plan plan;
  plan.tiling = {kTiles, kDeep};
  plan.pipeline = choose_pipeline(Tile::fixed_bytes(args.layout, form), Tile::stage_bytes(args.layout),
                                  Tile::kSumBytes, kTiles <= 2 ? 2 : 1);
  plan.tiles = ceil_div(args.m, Tile::kRows) * ceil_div(args.n, kInt4Outputs);
  plan.tile_sums = int64_t{Tile::kRows} * kInt4Outputs;
  const int64_t chunks = args.layout.chunks();
  const int64_t slots = int64_t{current_device().multiprocessors} * std::max(1, plan.pipeline.blocks);
  plan.splits = choose_splits(plan.tiles, chunks, slots);
  plan.chunks = ceil_div(chunks, plan.splits);
  return plan;
}

template <typename T>
Plan choose_typed(const Int4Linear& args) {
  const Int4Form form = form_of(args);
  const Tiling tiling = choose_tiling(args.m, form);
  if (!tiling.deep)
    return tiling.tiles == 8 ? plan_tile<T, 8, false>(args, form) : plan_tile<T, 4, false>(args, form);
  switch (tiling.tiles) {
    case 2: return plan_tile<T, 2, true>(args, form);
    case 4: return plan_tile<T, 4, true>(args, form);
    default: {
      const Plan plan = plan_tile<T, 8, true>(args, form);  // two stages may be more than 99 KB
      return plan.pipeline.stages ? plan : plan_tile<T, 8, false>(args, form);
    }
  }
}

// Up to 16 rows, but for tables: the number of pairs of panels, and of splits, for which the blocks that come
// last end soonest. In units of a chunk of all warps: a block costs 4 to start and to end, and 3 to meet
// others, and half of one for each of them; 35 KB of x, which come from L2, cost one. Of 16 choices timed on
// an H200 (bench/results/gpu-nvidia-h200-int4.md) that is the fastest at 11 of 12 points, and within 7 % at
// one.
constexpr int64_t kFewRows = 16;

template <typename T>
Plan plan_few(const Int4Linear& args) {
  constexpr int64_t kMostSplits = 64, kReserved = 2 << 10, kStart = 4, kMeet = 3, kXBytes = 35 << 10;
  Plan best = {};
  const int tiles = args.m <= 8 ? 1 : 2, rows = 8 * tiles;
  const int resident = int4_few_blocks(tiles, args.layout.segments());
  const int64_t chunks = args.layout.chunks(), slots = int64_t{resident} * current_device().multiprocessors;
  const int64_t room = current_device().shared_bytes / resident - kReserved;
  const int64_t fit = room / int4_few_chunk_bytes<T>(args.layout, args.m, rows);  // chunks of x
  const int64_t least = std::max<int64_t>(1, ceil_div(chunks, fit));
  int64_t best_cost = INT64_MAX;
  for (const int along : {4, 1}) {
    const int64_t blocks = ceil_div(args.n, int64_t{along} * kFewOutputs), ways = kInt4Warps / along;
    for (int64_t splits = least; splits < least + kMostSplits; ++splits) {
      const int64_t each = std::max<int64_t>(1, ceil_div(chunks, splits));
      const int64_t bytes = int4_few_shared_bytes<T>(args.layout, args.m, rows, along, each);
      if (splits > 1 && ceil_div(chunks, each) != splits) continue;  // some would be empty
      const int64_t once = kStart + ceil_div(each, ways) + (splits > 1 ? kMeet + splits / 2 : 0);
      const int64_t x_bytes = args.m * each * kInt4Chunk * static_cast<int64_t>(sizeof(T));
      const int64_t cost = ceil_div(blocks * splits, slots) * (once * kXBytes + x_bytes);
      if (cost >= best_cost) continue;
      best_cost = cost;
      best.tiling = {tiles, true, false, along};
      best.pipeline = {1, static_cast<int>(bytes), resident};  // x is all there at once
      best.tiles = blocks;
      best.tile_sums = int64_t{rows} * along * kFewOutputs;
      best.splits = splits;
      best.chunks = each;
    }
  }
  return best;
}

// From 65 rows on, where Hopper's own instructions may be used: wgmma has up to twice mma.sync's products a
// cycle. A stage is multiplied in 512 cycles (int8: 256); four of them are 160 KB (100 KB).
template <typename T>
Plan plan_hopper(const Int4Linear& args) {
  constexpr int kMostStages = 4, kLeastStages = 3, kReserved = 1 << 10;
  Plan plan;
  plan.tiling = {kInt4HopperRows / 8, false, true};
  const int available = current_device().shared_bytes - kReserved;
  int stages = kMostStages;
  while (stages > kLeastStages && int4_hopper_shared_bytes<T>(args.layout, stages) > available) --stages;
  plan.pipeline = {stages, int4_hopper_shared_bytes<T>(args.layout, stages), 1};
  plan.tiles = ceil_div(args.m, kInt4HopperRows) * ceil_div(args.n, kInt4Outputs);
  plan.tile_sums = int64_t{kInt4HopperRows} * kInt4Outputs;
  const int64_t chunks = args.layout.chunks();
  plan.splits = choose_splits(plan.tiles, chunks, current_device().multiprocessors);
  plan.chunks = ceil_div(chunks, plan.splits);
  return plan;
}

Plan choose(const Int4Linear& args) {
  if (args.m <= kFewRows && form_of(args) != Int4Form::kTable) {
    return args.weight_only ? plan_few<BFloat16>(args) : plan_few<int8_t>(args);
  }
  if (args.m > 64 && form_of(args) == Int4Form::kPlain && hopper_forms()) {
    return args.weight_only ? plan_hopper<BFloat16>(args) : plan_hopper<int8_t>(args);
  }
  if (!args.weight_only) return choose_typed<int8_t>(args);
  return choose_typed<BFloat16>(args);  // float16 is as large
}

// ---- launching

template <typename T, int kTiles, bool kDeep, Int4Form kForm>
void run(const Int4Call& call, const Plan& plan, Stream stream) {
  const dim3 grid(grid_size(kOp, plan.tiles), static_cast<unsigned>(plan.splits));
  launch({kOp, grid, kInt4Threads, stream, plan.pipeline.shared_bytes},
         int4_linear_kernel<T, kTiles, kDeep, kForm>, call);
}

template <typename T>
void run_hopper(const Int4Call& call, const Plan& plan, Stream stream) {
  const dim3 grid(grid_size(kOp, plan.tiles), static_cast<unsigned>(plan.splits));
  const Launch how = {kOp, grid, kInt4HopperThreads, stream, plan.pipeline.shared_bytes};
  switch (call.layout.segment) {
    case 32: return launch(how, int4_linear_hopper_kernel<T, 1>, call);
    case 64: return launch(how, int4_linear_hopper_kernel<T, 2>, call);
    default: return launch(how, int4_linear_hopper_kernel<T, 4>, call);
  }
}

template <typename T, bool kSums>
void run_few(const Int4Call& call, const Plan& plan, Stream stream) {
  const dim3 grid(grid_size(kOp, plan.tiles), static_cast<unsigned>(plan.splits));
  const Launch how = {kOp, grid, kInt4Threads, stream, plan.pipeline.shared_bytes, 0, true};
  const auto run_tiles = [&](auto tiles) {
    switch (call.layout.segments()) {
      case 1: return launch(how, int4_few_kernel<T, tiles, 1, kSums>, call);
      case 2: return launch(how, int4_few_kernel<T, tiles, 2, kSums>, call);
      default: return launch(how, int4_few_kernel<T, tiles, 4, kSums>, call);
    }
  };
  plan.tiling.tiles == 1 ? run_tiles(std::integral_constant<int, 1>())
                         : run_tiles(std::integral_constant<int, 2>());
}

template <typename T>
void run_typed(const Int4Call& call, const Plan& plan, Int4Form form, Stream stream) {
  if (plan.tiling.hopper) return run_hopper<T>(call, plan, stream);
  if (plan.tiling.along) {
    constexpr bool kHalf = !std::is_same<T, int8_t>::value;  // whose offsets are taken off with sums
    if (form == Int4Form::kSums) return run_few<T, true>(call, plan, stream);
    return run_few<T, kHalf>(call, plan, stream);
  }
  const int tiles = plan.tiling.tiles;
  const bool deep = plan.tiling.deep;
  if (form == Int4Form::kSums) return run<T, 4, false, Int4Form::kSums>(call, plan, stream);
  if (form == Int4Form::kTable) {
    return deep ? run<T, 2, true, Int4Form::kTable>(call, plan, stream)
                : run<T, 4, false, Int4Form::kTable>(call, plan, stream);
  }
  if (!deep) return run<T, 8, false, Int4Form::kPlain>(call, plan, stream);
  return tiles == 4 ? run<T, 4, true, Int4Form::kPlain>(call, plan, stream)
                    : run<T, 8, true, Int4Form::kPlain>(call, plan, stream);
}

}  // namespace

Int4Workspace int4_linear_workspace(const Int4Linear& args) {
  if (args.m <= 0 || args.n <= 0) return {0, 0};
  const Plan plan = choose(args);
  if (plan.splits == 1) return {0, 0};
  return {plan.tiles * plan.splits * plan.tile_sums, plan.tiles};
}

void int4_linear(const Int4Linear& args, Stream stream) {
  check(args);
  if (args.m == 0 || args.n == 0) return;
  const Plan plan = choose(args);
  LISSOM_CHECK(plan.pipeline.stages, kOp, ": ", current_device().shared_bytes,
               " bytes of shared memory are too few");
  LISSOM_CHECK(plan.splits == 1 || (args.partial != nullptr && args.counters != nullptr), kOp,
               ": K is split ", plan.splits, " times, which needs the workspace");
  const Int4Fragments& layout = args.layout;
  Int4Call call = {args.x,
                   args.x_stride,
                   layout.k,
                   false,
                   outputs_of(args, args.weight_only ? nullptr : args.x_scale, nullptr, args.x_type, args.n),
                   layout,
                   args.zeros,
                   args.packed,
                   args.partial,
                   args.counters,
                   static_cast<int>(plan.splits),
                   plan.chunks,
                   plan.pipeline.stages,
                   plan.tiling.along};
  if (!args.weight_only) {
    quantize_rows({args.x, args.x_type, args.x_stride, args.m, layout.k, nullptr, args.rotated, args.q,
                   args.q_stride, args.x_scale},
                  stream);
    call.x = args.q;
    call.x_stride = call.x_columns = args.q_stride;
    call.x_vector = true;
    return run_typed<int8_t>(call, plan, form_of(args), stream);
  }
  call.x_vector = reinterpret_cast<uintptr_t>(args.x) % 16 == 0 && (args.x_stride % 8 == 0 || args.m == 1);
  if (args.x_type == DType::kBFloat16) return run_typed<BFloat16>(call, plan, form_of(args), stream);
  return run_typed<Float16>(call, plan, form_of(args), stream);
}

}  // namespace lissom::cuda
