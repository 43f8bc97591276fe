// int8 linear: check -> choose the ISA's kernel -> spread the work over threads.
#include "int8_linear.h"

#include <cstring>

#include "../common/check.h"
#include "../common/parallel.h"
#include "isa.h"
#include "scratch.h"

namespace lissom {
namespace {

using KernelTable = const Int8LinearKernel* (*)();

#if defined(LISSOM_X86)
constexpr KernelTable kTable[kIsaCount] = {int8_linear_scalar, int8_linear_avx2, int8_linear_avx512vnni};
#else
constexpr KernelTable kTable[kIsaCount] = {int8_linear_scalar, nullptr, nullptr};
#endif

// Heuristics, in one place. Measured with bench/bench_int8_linear.py (see bench/README.md).
//
// Rows are taken in chunks whose stored activations stay in the L2/L3 caches and bound the scratch memory.
constexpr int64_t kChunkBytes = 4 << 20;
// Rows of one task: a slab of the kernels.
constexpr int64_t kTaskRows = 96;
// Below this many multiply-adds (weights touched count double at few rows) a second thread costs more than
// it brings: waking a team takes 1 to 3 microseconds.
constexpr int64_t kParallelWork = 1 << 20;
// Tasks per thread: enough that an uneven core does not hold the others up.
constexpr int64_t kTasksPerThread = 6;
// Activations smaller than this are quantized by the calling thread, which saves a barrier.
constexpr int64_t kQuantizeAlone = 8 << 10;

thread_local Scratch scratch;

struct Plan {
  int64_t tiles, panels;  // of the chunk
  int64_t tiles_per_task, panels_per_task;
  int64_t row_tasks, panel_tasks;
};

Plan plan_chunk(const Int8LinearKernel& kernel, int row_tile, int64_t m, int64_t n, int threads) {
  Plan plan;
  plan.tiles = ceil_div(m, row_tile);
  plan.panels = int8_panels(n);
  plan.row_tasks = ceil_div(plan.tiles, kTaskRows / row_tile);
  plan.tiles_per_task = ceil_div(plan.tiles, plan.row_tasks);  // even them out

  const int64_t groups = ceil_div(plan.panels, kernel.panel_tile);
  const int64_t wanted = threads == 1 ? 1 : ceil_div(kTasksPerThread * threads, plan.row_tasks);
  const int64_t groups_per_task = ceil_div(groups, wanted < groups ? wanted : groups);
  plan.panels_per_task = groups_per_task * kernel.panel_tile;
  plan.panel_tasks = ceil_div(plan.panels, plan.panels_per_task);
  return plan;
}

void run_chunk(const Int8LinearKernel& kernel, const Int8LinearArgs& args, const Int8LinearWork& work,
               int threads) {
  const Plan plan = plan_chunk(kernel, work.row_tile, args.m, args.n, threads);
  const bool alone = threads == 1 || args.m * args.k <= kQuantizeAlone;
  if (alone) kernel.quantize(args, work, 0, plan.tiles);
  TaskQueue quantize_tasks(plan.tiles), multiply_tasks(plan.row_tasks * plan.panel_tasks);
  run_team(threads, [&](Team team) {
    if (!alone) {
      for (int64_t tile = quantize_tasks.take(); tile >= 0; tile = quantize_tasks.take()) {
        kernel.quantize(args, work, tile, tile + 1);
      }
      team.barrier();
    }
    for (int64_t task = multiply_tasks.take(); task >= 0; task = multiply_tasks.take()) {
      const int64_t tile = task / plan.panel_tasks * plan.tiles_per_task;
      const int64_t panel = task % plan.panel_tasks * plan.panels_per_task;
      const int64_t tile_end = tile + plan.tiles_per_task, panel_end = panel + plan.panels_per_task;
      kernel.multiply(args, work, tile, tile_end < plan.tiles ? tile_end : plan.tiles, panel,
                      panel_end < plan.panels ? panel_end : plan.panels);
    }
  });
}

int64_t type_bytes(DType type) { return type == DType::kFloat32 ? 4 : 2; }

}  // namespace

void int8_linear(const Int8LinearArgs& args, int threads) {
  LISSOM_CHECK(args.m >= 0 && args.n >= 0 && args.k >= 0, "int8_linear: negative size: M=", args.m,
               " N=", args.n, " K=", args.k);
  LISSOM_CHECK(threads >= 1, "int8_linear: threads=", threads, " must be at least 1");
  LISSOM_CHECK(args.mode == InputMode::kWeightOnly || args.k <= INT32_MAX / (127 * 127),
               "int8_linear: K=", args.k, " could overflow the int32 sum");
  if (args.m == 0 || args.n == 0) return;

  const Int8LinearKernel& kernel =
      kTable[static_cast<int>(active_isa())]()[args.mode == InputMode::kWeightOnly];
  const int64_t row_bytes = int8_quads(args.k) * kInt8Quad * kernel.activation_bytes;
  int64_t chunk = kChunkBytes / (row_bytes + 1) / kernel.row_tile * kernel.row_tile;
  if (chunk < kernel.row_tile) chunk = kernel.row_tile;
  if (chunk > args.m) chunk = args.m;

  const int64_t scale_bytes = ceil_div(chunk * 4, 64) * 64;
  uint8_t* memory = scratch.get(static_cast<size_t>(scale_bytes + chunk * row_bytes + 64));

  for (int64_t row = 0; row < args.m; row += chunk) {
    Int8LinearArgs part = args;
    part.m = args.m - row < chunk ? args.m - row : chunk;
    part.x = static_cast<const char*>(args.x) + row * args.x_stride * type_bytes(args.x_type);
    part.y = static_cast<char*>(args.y) + row * args.n * type_bytes(args.y_type);
    const int64_t work_size = (part.m < 4 ? 4 : part.m) * args.n * args.k;
    // Tiles of even height: 8 rows are 4 + 4 rather than 6 + 2.
    const int row_tile = static_cast<int>(ceil_div(part.m, ceil_div(part.m, kernel.row_tile)));
    const Int8LinearWork work{memory + scale_bytes, reinterpret_cast<float*>(memory), row_tile};
    run_chunk(kernel, part, work, work_size < kParallelWork ? 1 : threads);
  }
}

void int8_pack(const int8_t* qweight, int64_t n, int64_t k, int8_t* packed) {
  LISSOM_CHECK(n >= 0 && k >= 0, "int8_pack: negative size: N=", n, " K=", k);
  const int64_t panel_bytes = int8_panel_bytes(k);
  for (int64_t panel = 0; panel < int8_panels(n); ++panel) {
    int8_t* head = packed + panel * panel_bytes;
    std::memset(head, 0, static_cast<size_t>(panel_bytes));
    for (int i = 0; i < kInt8Panel && panel * kInt8Panel + i < n; ++i) {
      const int8_t* row = qweight + (panel * kInt8Panel + i) * k;
      int8_t* to = head + kInt8Line + i * kInt8Quad;
      uint32_t sum = 0;  // wraps as int32 does
      for (int64_t j = 0; j < k; ++j) {
        to[j / kInt8Quad * kInt8Line + j % kInt8Quad] = row[j];
        sum += static_cast<uint32_t>(static_cast<int32_t>(row[j]));
      }
      const uint32_t offset = sum * static_cast<uint32_t>(-kInt8ActivationOffset);
      std::memcpy(head + i * 4, &offset, 4);
    }
  }
}

}  // namespace lissom
