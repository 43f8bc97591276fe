// Block-sparse linear: check -> choose the ISA's kernel -> spread the work over threads.
#include "block_sparse_linear.h"

#include <atomic>
#include <new>

#include "../common/check.h"
#include "../common/parallel.h"
#include "isa.h"
#include "scratch.h"

namespace lissom {
namespace {

using KernelTable = const BlockSparseKernel& (*)();

#if defined(LISSOM_X86)
constexpr KernelTable kTable[kIsaCount] = {block_sparse_linear_scalar, block_sparse_linear_avx2,
                                           block_sparse_linear_avx512vnni};
#else
constexpr KernelTable kTable[kIsaCount] = {block_sparse_linear_scalar, nullptr, nullptr};
#endif

// Heuristics, in one place. Measured with bench/bench_block_sparse_linear.py.
//
// Multiply-adds from which a second thread brings more than the microseconds it costs.
constexpr int64_t kParallelWork = 1 << 19;
// Threads share rows, each with panels of its own, and never wait for each other, where that costs less than
// passing x and y between cores, though each reads all weights: with weights of at most so many bytes (384 x
// 384, M = 128, 90 % sparse: 17.6 -> 12.8 us; 4096 x 4096, M = 128, 50 %, 33 MB: a fifth slower) …
constexpr int64_t kShareRowsBytes = 16 << 20;
// … fewer where a thread has only one vector of rows (384 x 384, M = 32: 80 % 1.13x, 50 % 0.98x) …
constexpr int64_t kShareVectorsBytes = 192 << 10;
// … or with at least this many panels per thread.
constexpr int64_t kEnoughPanels = 4;
// Where block rows are shared out too: parts per thread, so that an uneven core does not hold the others up.
constexpr int64_t kPartsPerThread = 4;
// Columns of x that one task transposes.
constexpr int64_t kFillColumns = 512;
// x smaller than this is laid out by the calling thread, which saves a barrier.
constexpr int64_t kFillAlone = 16 << 10;
// What a block row costs apart from its blocks, in stored weights of an output.
constexpr int64_t kRowOverhead = 16;
// Rows of grad and x that grad_values transposes at once.
constexpr int64_t kGradRows = 512;

thread_local Scratch scratch;

const BlockSparseKernel& active_kernel() { return kTable[static_cast<int>(active_isa())](); }

void check_weight(const char* op, const BlockSparse& w, int64_t m, int threads) {
  LISSOM_CHECK(m >= 0 && w.n >= 0 && w.k >= 0 && w.blocks >= 0, op, ": negative size: M=", m, " N=", w.n,
               " K=", w.k, " blocks=", w.blocks);
  LISSOM_CHECK(w.height >= 1 && w.width >= 1, op, ": block shape (", w.height, ", ", w.width,
               ") must be positive");
  LISSOM_CHECK(threads >= 1, op, ": threads=", threads, " must be at least 1");
}

// The block row at which part `part` of `parts` equal shares of the work begins.
int64_t part_begin(const BlockSparse& w, int64_t part, int64_t parts) {
  const int64_t rows = w.block_rows();
  if (part == parts) return rows;
  const int64_t overhead = ceil_div(kRowOverhead, w.width);
  const auto work = [&](int64_t row) { return w.crow[row] + row * overhead; };
  const int64_t target = work(rows) / parts * part + work(rows) % parts * part / parts;
  int64_t low = 0, high = rows;  // the first row with work(row) >= target
  while (low < high) {
    const int64_t middle = low + (high - low) / 2;
    if (work(middle) < target) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

int64_t stored(const BlockSparse& w) { return w.blocks * w.height * w.width; }

int useful_threads(const BlockSparse& w, int64_t m, int threads) {
  return (m < 4 ? 4 : m) * stored(w) < kParallelWork ? 1 : threads;
}

// Rows cut into panels of nearly equal numbers of vectors; as many of them for each thread.
struct Panels {
  Panels(int64_t m, PanelShape shape, int threads) : m(m), lanes(shape.lanes), few(shape.few) {
    vectors = ceil_div(m, lanes);
    count = ceil_div(vectors, shape.most);
    const int64_t even = ceil_div(count, threads) * threads;
    if (even <= vectors) count = even;
    widest = static_cast<int>(ceil_div(vectors, count)) * lanes;
  }
  RowPanel at(int64_t i) const {
    const int64_t begin = vectors * i / count * lanes, end = vectors * (i + 1) / count * lanes;
    RowPanel panel{};
    panel.few = few;
    panel.row0 = begin;
    panel.stride = static_cast<int>(end - begin);
    panel.rows = static_cast<int>((end < m ? end : m) - begin);
    return panel;
  }
  int64_t m, vectors, count;
  int lanes, widest;
  bool few;
};

// Padding of blocks at the edges holds products with padding: 0, or NaN where a factor was not finite.
void clear_padding(const BlockSparse& w, float* values) {
  const int64_t size = w.height * w.width;
  const int64_t rows = w.n - (w.block_rows() - 1) * w.height;  // real ones of the last block row
  for (int64_t b = w.crow[w.block_rows() - 1]; b < w.crow[w.block_rows()]; ++b) {
    for (int64_t i = rows * w.width; i < size; ++i) values[b * size + i] = 0.0f;
  }
  const int64_t columns = w.k - (w.block_columns() - 1) * w.width;
  if (columns == w.width) return;
  for (int64_t row = 0; row < w.block_rows(); ++row) {
    const int64_t last = int64_t{w.crow[row + 1]} - 1;
    if (last < w.crow[row] || w.col[last] + 1 < w.block_columns()) continue;
    for (int64_t r = 0; r < w.height; ++r) {
      for (int64_t c = columns; c < w.width; ++c) values[last * size + r * w.width + c] = 0.0f;
    }
  }
}

bool rows_to_share(const BlockSparse& w, int64_t m, PanelShape shape, int threads) {
  const int64_t vectors = ceil_div(m, shape.lanes), per_thread = ceil_div(vectors, threads);
  if (shape.few || vectors < threads) return false;
  if (vectors >= kEnoughPanels * shape.most * threads) return true;
  const int64_t value = w.type == ValueType::kFloat32 ? 4 : w.type == ValueType::kInt8 ? 1 : 2;
  const int64_t most = per_thread == 1 ? kShareVectorsBytes : kShareRowsBytes;
  return 4 * per_thread * threads <= 5 * vectors && stored(w) * value <= most;  // evenly, or nearly
}

int64_t line_floats(int64_t floats) { return ceil_div(floats, 16) * 16; }

// Scratch of one panel: row scales, then columns, and what vectors may read beyond them.
int64_t panel_size(const BlockSparseKernel& kernel, const BlockSparse& weight, int stride) {
  return line_floats(stride) + line_floats(kernel.panel_floats(weight, stride)) + 64;
}
void place(RowPanel& panel, float* memory) {
  panel.row_scale = memory;
  panel.columns = memory + line_floats(panel.stride);
}

// Tasks in which a panel can be filled: ranges of columns, or for int8 of vectors of rows.
struct FillTasks {
  FillTasks(const BlockSparseLinearArgs& args, const Panels& panels)
      : int8(args.weight.type == ValueType::kInt8), columns(args.weight.padded_k()), lanes(panels.lanes) {
    per_panel = int8 ? panels.widest / lanes : columns == 0 ? 1 : ceil_div(columns, kFillColumns);
  }
  void run(const BlockSparseKernel& kernel, const BlockSparseLinearArgs& args, const RowPanel& panel,
           int64_t task) const {
    if (int8) return kernel.fill(args, panel, task, task + 1);
    const int64_t begin = task * kFillColumns, end = begin + kFillColumns;
    kernel.fill(args, panel, begin, end < columns ? end : columns);
  }
  void run_all(const BlockSparseKernel& kernel, const BlockSparseLinearArgs& args,
               const RowPanel& panel) const {
    kernel.fill(args, panel, 0, int8 ? ceil_div(panel.rows, lanes) : columns);
  }
  bool int8;
  int64_t columns;
  int lanes;
  int64_t per_panel;
};

// Runs body(), noting where memory ran out: an exception must not leave a team.
template <typename Body>
void guarded(std::atomic<bool>& out_of_memory, const Body& body) {
  try {
    body();
  } catch (const std::bad_alloc&) {
    out_of_memory = true;
  }
}

}  // namespace

void block_sparse_linear(const BlockSparseLinearArgs& args, int threads) {
  check_linear("block_sparse_linear", args, threads);
  check_weight("block_sparse_linear", args.weight, args.m, threads);
  const BlockSparse& weight = args.weight;
  LISSOM_CHECK(weight.type != ValueType::kInt8 || args.k <= INT32_MAX / (127 * 127),
               "block_sparse_linear: K=", args.k, " could overflow the int32 sum");
  if (args.m == 0 || args.n == 0) return;
  const BlockSparseKernel& kernel = active_kernel();
  threads = useful_threads(weight, args.m, threads);
  PanelShape shape = kernel.panel_shape(weight, args.m);
  const bool share_rows = threads > 1 && rows_to_share(weight, args.m, shape, threads);
  if (share_rows) {
    const int64_t vectors = ceil_div(ceil_div(args.m, shape.lanes), threads);
    if (vectors < shape.most) shape.most = static_cast<int>(vectors);
  }
  const Panels panels(args.m, shape, share_rows ? threads : 1);
  const int64_t size = panel_size(kernel, weight, panels.widest);
  const FillTasks fill(args, panels);

  if (threads == 1 || share_rows) {
    TaskQueue tasks(panels.count, threads);
    std::atomic<bool> out_of_memory{false};
    run_team(threads, [&](Team team) {
      guarded(out_of_memory, [&] {
        float* memory = reinterpret_cast<float*>(scratch.get(static_cast<size_t>(size) * 4));
        for (int64_t task = tasks.take(team); task >= 0; task = tasks.take(team)) {
          RowPanel panel = panels.at(task);
          place(panel, memory);
          fill.run_all(kernel, args, panel);
          kernel.multiply(args, panel, 0, weight.block_rows());
        }
      });
    });
    if (out_of_memory) throw std::bad_alloc();
    return;
  }

  // Few panels: all are filled together, then block rows are shared out.
  float* memory = reinterpret_cast<float*>(scratch.get(static_cast<size_t>(panels.count * size) * 4));
  const auto panel_at = [&](int64_t i) {
    RowPanel panel = panels.at(i);
    place(panel, memory + i * size);
    return panel;
  };
  const bool alone = args.m * args.k <= kFillAlone;
  if (alone) {
    for (int64_t i = 0; i < panels.count; ++i) fill.run_all(kernel, args, panel_at(i));
  }
  const int64_t fills = fill.per_panel;
  const int64_t parts =
      kPartsPerThread * threads < weight.block_rows() ? kPartsPerThread * threads : weight.block_rows();
  TaskQueue fill_tasks(panels.count * fills, threads), tasks(parts * panels.count, threads);
  run_team(threads, [&](Team team) {
    if (!alone) {
      for (int64_t task = fill_tasks.take(team); task >= 0; task = fill_tasks.take(team)) {
        fill.run(kernel, args, panel_at(task / fills), task % fills);
      }
      team.barrier();
    }
    for (int64_t task = tasks.take(team); task >= 0; task = tasks.take(team)) {
      const int64_t part = task / panels.count;
      kernel.multiply(args, panel_at(task % panels.count), part_begin(weight, part, parts),
                      part_begin(weight, part + 1, parts));
    }
  });
}

void block_sparse_grad_input(const BlockSparseGradInputArgs& args, int threads) {
  const BlockSparse& weight = args.weight;
  check_weight("block_sparse_grad_input", weight, args.m, threads);
  if (args.m == 0 || weight.k == 0) return;
  const BlockSparseKernel& kernel = active_kernel();
  threads = useful_threads(weight, args.m, threads);
  // Narrower panels where there would be fewer than threads.
  PanelShape shape = kernel.gradients;
  const int64_t vectors = ceil_div(ceil_div(args.m, shape.lanes), threads);
  if (vectors < shape.most) shape.most = static_cast<int>(vectors);
  const Panels panels(args.m, shape, threads);
  const int64_t grad_size = line_floats(weight.padded_n() * panels.widest) + 64;
  const int64_t size = grad_size + (weight.padded_k() + 16) * panels.widest + 64;
  TaskQueue tasks(panels.count, threads);
  std::atomic<bool> out_of_memory{false};
  run_team(threads, [&](Team team) {
    guarded(out_of_memory, [&] {
      float* memory = reinterpret_cast<float*>(scratch.get(static_cast<size_t>(size) * 4));
      for (int64_t task = tasks.take(team); task >= 0; task = tasks.take(team)) {
        RowPanel grad = panels.at(task), grad_x = grad;
        grad.columns = memory;
        grad_x.columns = memory + grad_size;
        kernel.transpose(args.grad, grad, weight.n, args.weight_scale, 0, weight.padded_n());
        kernel.grad_input(args, grad, grad_x);
      }
    });
  });
  if (out_of_memory) throw std::bad_alloc();
}

void block_sparse_grad_values(const BlockSparseGradValuesArgs& args, int threads) {
  const BlockSparse& weight = args.weight;
  check_weight("block_sparse_grad_values", weight, args.m, threads);
  const int64_t count = stored(weight);
  for (int64_t i = 0; i < count; ++i) args.grad_values[i] = 0.0f;
  if (args.m == 0 || weight.blocks == 0) return;
  const BlockSparseKernel& kernel = active_kernel();
  threads = useful_threads(weight, args.m, threads);

  const int64_t rounds = ceil_div(args.m, kGradRows);
  const int64_t rows_per_round =
      ceil_div(ceil_div(args.m, rounds), kernel.gradients.lanes) * kernel.gradients.lanes;
  const int64_t columns[2] = {weight.padded_n(), weight.padded_k()};
  const int64_t fills[2] = {ceil_div(columns[0], kFillColumns), ceil_div(columns[1], kFillColumns)};
  const int64_t grad_size = line_floats(columns[0] * rows_per_round) + 64;
  float* memory = reinterpret_cast<float*>(
      scratch.get(static_cast<size_t>(grad_size + columns[1] * rows_per_round + 64) * 4));
  const int64_t parts = threads == 1 ? 1 : kPartsPerThread * threads;
  for (int64_t round = 0; round < rounds; ++round) {
    RowPanel grad{};
    grad.row0 = round * rows_per_round;
    if (grad.row0 >= args.m) break;
    const int64_t left = args.m - grad.row0;
    grad.rows = static_cast<int>(left < rows_per_round ? left : rows_per_round);
    grad.stride = static_cast<int>(ceil_div(grad.rows, kernel.gradients.lanes) * kernel.gradients.lanes);
    RowPanel x = grad;
    grad.columns = memory;
    x.columns = memory + grad_size;
    TaskQueue fill_tasks(fills[0] + fills[1], threads), tasks(parts, threads);
    run_team(threads, [&](Team team) {
      for (int64_t task = fill_tasks.take(team); task >= 0; task = fill_tasks.take(team)) {
        const bool of_x = task >= fills[0];
        const int64_t begin = (task - (of_x ? fills[0] : 0)) * kFillColumns;
        const int64_t end = begin + kFillColumns < columns[of_x] ? begin + kFillColumns : columns[of_x];
        kernel.transpose(of_x ? args.x : args.grad, of_x ? x : grad, of_x ? weight.k : weight.n, nullptr,
                         begin, end);
      }
      team.barrier();
      for (int64_t task = tasks.take(team); task >= 0; task = tasks.take(team)) {
        kernel.grad_values(args, grad, x, part_begin(weight, task, parts),
                           part_begin(weight, task + 1, parts));
      }
    });
  }
  clear_padding(weight, args.grad_values);
}

BlockSparsePacked packed_layout(const BlockSparse& weight) {
  BlockSparsePacked layout{weight.block_rows(), weight.height, weight.width};
  if (layout.gathered()) {
    for (int64_t i = 0; i < layout.block_rows; ++i) {
      layout.units += ceil_div(int64_t{weight.crow[i + 1] - weight.crow[i]} * weight.width, kQuad);
    }
  } else {
    layout.units = weight.blocks * (weight.width / kQuad);
  }
  return layout;
}

int64_t block_sparse_check(const int32_t* crow, const int32_t* col, int64_t block_rows, int64_t block_columns,
                           int64_t blocks) {
  if (crow[0] != 0) return 0;
  for (int64_t i = 0; i < block_rows; ++i) {
    if (crow[i + 1] < crow[i] || crow[i + 1] > blocks) return i + 1;
  }
  if (crow[block_rows] != blocks) return block_rows;
  for (int64_t i = 0; i < block_rows; ++i) {
    int64_t last = -1;
    for (int64_t j = crow[i]; j < crow[i + 1]; ++j) {
      if (col[j] <= last || col[j] >= block_columns) return block_rows + 1 + j;
      last = col[j];
    }
  }
  return -1;
}

}  // namespace lissom
