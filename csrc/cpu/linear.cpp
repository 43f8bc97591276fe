// How a linear op's work is spread over threads.
#include "linear.h"

#include <atomic>
#include <new>

#include "../common/check.h"
#include "../common/parallel.h"
#include "scratch.h"

namespace lissom {
namespace {

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

// Rows [begin, end) with buffers in the calling thread's scratch memory.
RowBatch batch_of(const LinearKernel& kernel, const LinearArgs& args, int64_t begin, int64_t end) {
  RowBatch rows;
  rows.m = end - begin;
  rows.x = static_cast<const char*>(args.x) + begin * args.x_stride * type_bytes(args.x_type);
  rows.y = static_cast<char*>(args.y) + begin * args.n * type_bytes(args.y_type);
  const int64_t scale_bytes = ceil_div(rows.m * 4, 64) * 64;
  uint8_t* memory = scratch.get(static_cast<size_t>(scale_bytes + rows.m * kernel.row_bytes(args) + 64));
  rows.row_scale = reinterpret_cast<float*>(memory);
  rows.activations = memory + scale_bytes;
  // Tiles of even height: 8 rows are 4 + 4 rather than 6 + 2.
  const int64_t tiles = rows.m <= kernel.most_rows ? 1 : ceil_div(rows.m, kernel.row_tile);
  rows.row_tile = static_cast<int>(ceil_div(rows.m, tiles));
  return rows;
}

// Rows are shared out; each task quantizes and multiplies its own.
void share_rows(const LinearKernel& kernel, const LinearArgs& args, int64_t count, int threads) {
  const int64_t tiles_of_all = ceil_div(args.m, kernel.row_tile);
  const auto boundary = [&](int64_t task) {
    const int64_t row = tiles_of_all * task / count * kernel.row_tile;
    return row < args.m ? row : args.m;
  };
  TaskQueue tasks(count, threads);
  std::atomic<bool> out_of_memory{false};
  run_team(threads, [&](Team team) {
    for (int64_t task = tasks.take(team); task >= 0; task = tasks.take(team)) {
      const int64_t begin = boundary(task), end = boundary(task + 1);
      if (begin == end) continue;
      try {
        const RowBatch rows = batch_of(kernel, args, begin, end);
        const int64_t tiles = ceil_div(rows.m, rows.row_tile);
        kernel.quantize(args, rows, 0, tiles);
        kernel.multiply(args, rows, 0, tiles, 0, panel_count(args.n));
      } catch (const std::bad_alloc&) {  // must not leave the team
        out_of_memory = true;
      }
    }
  });
  if (out_of_memory) throw std::bad_alloc();
}

// Few rows: outputs are shared out as well, over activations that all threads quantized together.
void share_outputs(const LinearKernel& kernel, const LinearArgs& args, int threads) {
  const RowBatch rows = batch_of(kernel, args, 0, args.m);
  const int64_t tiles = ceil_div(args.m, rows.row_tile), panels = panel_count(args.n);
  const int64_t row_tasks = ceil_div(tiles, kSlabRows / rows.row_tile);
  const int64_t tiles_per_task = ceil_div(tiles, row_tasks);  // even them out
  const int64_t groups = ceil_div(panels, kernel.panel_tile);
  const int64_t wanted = ceil_div(kTasksPerThread * threads, row_tasks);
  const int64_t panels_per_task = ceil_div(groups, wanted < groups ? wanted : groups) * kernel.panel_tile;
  const int64_t panel_tasks = ceil_div(panels, panels_per_task);

  const bool alone = args.m * args.k <= kQuantizeAlone;
  if (alone) kernel.quantize(args, rows, 0, tiles);
  TaskQueue quantize_tasks(tiles, threads), multiply_tasks(row_tasks * panel_tasks, threads);
  run_team(threads, [&](Team team) {
    if (!alone) {
      for (int64_t tile = quantize_tasks.take(team); tile >= 0; tile = quantize_tasks.take(team)) {
        kernel.quantize(args, rows, tile, tile + 1);
      }
      team.barrier();
    }
    for (int64_t task = multiply_tasks.take(team); task >= 0; task = multiply_tasks.take(team)) {
      const int64_t tile = task % row_tasks * tiles_per_task, tile_end = tile + tiles_per_task;
      const int64_t panel = task / row_tasks * panels_per_task, panel_end = panel + panels_per_task;
      kernel.multiply(args, rows, tile, tile_end < tiles ? tile_end : tiles, panel,
                      panel_end < panels ? panel_end : panels);
    }
  });
}

}  // namespace

void check_linear(const char* op, const LinearArgs& args, int threads) {
  LISSOM_CHECK(args.m >= 0 && args.n >= 0 && args.k >= 0, op, ": negative size: M=", args.m, " N=", args.n,
               " K=", args.k);
  LISSOM_CHECK(threads >= 1, op, ": threads=", threads, " must be at least 1");
}

void run_linear(const LinearKernel& kernel, const LinearArgs& args, int threads) {
  if (args.m == 0 || args.n == 0) return;
  // Counted for at least 4 rows: fewer are bound by the weights' bytes.
  if ((args.m < 4 ? 4 : args.m) * args.n * args.k < kernel.parallel_work) threads = 1;
  const int64_t slabs = ceil_div(ceil_div(args.m, kSlabRows), threads) * threads;
  if (threads == 1 || args.m >= slabs * kEnoughRows) {
    share_rows(kernel, args, slabs, threads);
  } else {
    share_outputs(kernel, args, threads);
  }
}

}  // namespace lissom
