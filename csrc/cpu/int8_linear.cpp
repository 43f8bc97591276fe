// int8 linear: check -> choose the ISA's kernel -> spread the work over threads.
#include "int8_linear.h"

#include <atomic>
#include <cstring>
#include <new>

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
// With at least this many rows per thread and task, threads share rows only and never wait for each other: no
// barrier between quantizing and multiplying, which costs little on an idle machine and milliseconds on a
// busy one.
constexpr int64_t kEnoughRows = 48;
// Tasks per thread where outputs are shared out too: enough that an uneven core does not hold the others up.
constexpr int64_t kTasksPerThread = 6;
// Activations smaller than this are quantized by the calling thread, which saves a barrier.
constexpr int64_t kQuantizeAlone = 16 << 10;

thread_local Scratch scratch;

int64_t type_bytes(DType type) { return type == DType::kFloat32 ? 4 : 2; }

// The same problem for rows [begin, end) only.
Int8LinearArgs rows_of(const Int8LinearArgs& args, int64_t begin, int64_t end) {
  Int8LinearArgs part = args;
  part.m = end - begin;
  part.x = static_cast<const char*>(args.x) + begin * args.x_stride * type_bytes(args.x_type);
  part.y = static_cast<char*>(args.y) + begin * args.n * type_bytes(args.y_type);
  return part;
}

// Buffers for all rows of `args`, in the calling thread's scratch memory.
Int8LinearWork allocate(const Int8LinearKernel& kernel, const Int8LinearArgs& args) {
  const int64_t scale_bytes = ceil_div(args.m * 4, 64) * 64;
  const int64_t row_bytes = int8_quads(args.k) * kInt8Quad * kernel.activation_bytes;
  uint8_t* memory = scratch.get(static_cast<size_t>(scale_bytes + args.m * row_bytes + 64));
  // Tiles of even height: 8 rows are 4 + 4 rather than 6 + 2.
  const int row_tile = static_cast<int>(ceil_div(args.m, ceil_div(args.m, kernel.row_tile)));
  return {memory + scale_bytes, reinterpret_cast<float*>(memory), row_tile};
}

// Rows are shared out; each task quantizes and multiplies its own.
void share_rows(const Int8LinearKernel& kernel, const Int8LinearArgs& args, int64_t count, int threads) {
  const int64_t tiles_of_all = ceil_div(args.m, kernel.row_tile);
  const auto boundary = [&](int64_t task) {
    const int64_t row = tiles_of_all * task / count * kernel.row_tile;
    return row < args.m ? row : args.m;
  };
  TaskQueue tasks(count);
  std::atomic<bool> out_of_memory{false};
  run_team(threads, [&](Team) {
    for (int64_t task = tasks.take(); task >= 0; task = tasks.take()) {
      const Int8LinearArgs part = rows_of(args, boundary(task), boundary(task + 1));
      if (part.m == 0) continue;
      try {
        const Int8LinearWork work = allocate(kernel, part);
        const int64_t tiles = ceil_div(part.m, work.row_tile);
        kernel.quantize(part, work, 0, tiles);
        kernel.multiply(part, work, 0, tiles, 0, int8_panels(part.n));
      } catch (const std::bad_alloc&) {  // must not leave the team
        out_of_memory = true;
      }
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

// Few rows: outputs are shared out as well, over activations that all threads quantized together.
void share_outputs(const Int8LinearKernel& kernel, const Int8LinearArgs& args, int threads) {
  const Int8LinearWork work = allocate(kernel, args);
  const int64_t tiles = ceil_div(args.m, work.row_tile), panels = int8_panels(args.n);
  const int64_t row_tasks = ceil_div(tiles, kInt8SlabRows / work.row_tile);
  const int64_t tiles_per_task = ceil_div(tiles, row_tasks);  // even them out
  const int64_t groups = ceil_div(panels, kernel.panel_tile);
  const int64_t wanted = ceil_div(kTasksPerThread * threads, row_tasks);
  const int64_t panels_per_task = ceil_div(groups, wanted < groups ? wanted : groups) * kernel.panel_tile;
  const int64_t panel_tasks = ceil_div(panels, panels_per_task);

  const bool alone = args.m * args.k <= kQuantizeAlone;
  if (alone) kernel.quantize(args, work, 0, tiles);
  TaskQueue quantize_tasks(tiles), multiply_tasks(row_tasks * panel_tasks);
  run_team(threads, [&](Team team) {
    if (!alone) {
      for (int64_t tile = quantize_tasks.take(); tile >= 0; tile = quantize_tasks.take()) {
        kernel.quantize(args, work, tile, tile + 1);
      }
      team.barrier();
    }
    for (int64_t task = multiply_tasks.take(); task >= 0; task = multiply_tasks.take()) {
      const int64_t tile = task / panel_tasks * tiles_per_task, tile_end = tile + tiles_per_task;
      const int64_t panel = task % panel_tasks * panels_per_task, panel_end = panel + panels_per_task;
      kernel.multiply(args, work, tile, tile_end < tiles ? tile_end : tiles, panel,
                      panel_end < panels ? panel_end : panels);
    }
  });
}

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
  // Counted for at least 4 rows: fewer are bound by the weights' bytes.
  if ((args.m < 4 ? 4 : args.m) * args.n * args.k < kernel.parallel_work) threads = 1;
  const int64_t slabs = ceil_div(ceil_div(args.m, kInt8SlabRows), threads) * threads;
  if (threads == 1 || args.m >= slabs * kEnoughRows) {
    share_rows(kernel, args, slabs, threads);
  } else {
    share_outputs(kernel, args, threads);
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
