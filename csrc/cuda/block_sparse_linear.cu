// Block-sparse linear: check -> choose -> launch.
#include "block_sparse_linear.h"

#include <algorithm>

#include "block_sparse_linear_hopper.cuh"
#include "block_sparse_linear_kernel.cuh"

namespace lissom::cuda {
namespace {

constexpr const char* kOp = "block_sparse_linear";

// rows x outputs            warps  of a warp  bytes of a row, stages, resident. Rows of values are 256 bytes
// where blocks are 128 x 128: memory likes to be read in whole ones (16 rows came to half of an H200's
// bandwidth with 64 bytes at a time).
using FewRows = BlockSparseTile<1, 4, 16, 16, 256, 3, 3>;  // 16 x 64, 60 KB
using Small = BlockSparseTile<2, 2, 32, 32, 128, 4, 3>;    // 64 x 64, 64 KB
using Tall = BlockSparseTile<4, 1, 64, 64, 64, 4, 2>;      // 256 x 64, 80 KB
using Square = BlockSparseTile<2, 2, 64, 64, 64, 5, 2>;    // 128 x 128, 80 KB

// 64 rows, outputs, bytes of inputs a stage, stages: 6 x 32 KB or 5 x 40 KB of 227, and as many with half the
// bytes
template <int kStep>
using HopperSquare = BlockSparseHopperTile<2, 128, kStep, 6 * 128 / kStep>;
template <int kStep>
using HopperTall = BlockSparseHopperTile<4, 64, kStep, 5 * 128 / kStep>;

int item_bytes(ValueType type) { return type == ValueType::kInt8 ? 1 : 2; }

void check(const BlockSparseLinear& args) {
  LISSOM_CHECK(args.value_type == ValueType::kBFloat16 || args.value_type == ValueType::kFloat16 ||
                   args.value_type == ValueType::kInt8,
               kOp, ": value_type=", static_cast<int>(args.value_type), " is not bfloat16, float16 or int8");
  const int item = item_bytes(args.value_type);
  LISSOM_CHECK(args.m >= 0 && args.n >= 0 && args.columns >= 0 && args.blocks >= 0 && args.piece_count >= 0,
               kOp, ": negative size");
  LISSOM_CHECK(args.height > 0 && args.width > 0 && args.width % (kChunkBytes / item) == 0, kOp,
               ": blocks of ", args.height, " x ", args.width, ": rows must be multiples of 16 bytes");
  LISSOM_CHECK(args.columns % (kChunkBytes / item) == 0, kOp, ": columns=", args.columns,
               " must be a multiple of 16 bytes");
  LISSOM_CHECK(args.x_stride >= args.columns || args.m <= 1, kOp, ": x_stride=", args.x_stride,
               " is less than a row of ", args.columns);
  LISSOM_CHECK(args.x_stride % (kChunkBytes / item) == 0 && reinterpret_cast<uintptr_t>(args.x) % 16 == 0,
               kOp, ": rows of x must lie on multiples of 16 bytes (x_stride=", args.x_stride, ")");
  LISSOM_CHECK(reinterpret_cast<uintptr_t>(args.values) % 16 == 0, kOp,
               ": values must lie on a multiple of 16 bytes");
  LISSOM_CHECK(args.value_type != ValueType::kInt8 || (args.x_scale && args.weight_scale), kOp,
               ": int8 values need the scales of x and of the weight");
}

// What every form is, for choosing and launching.
struct Sizes {
  int rows, outputs, shared_bytes, resident;
  int most_cluster = 1;  // blocks that may share the outputs of a tile
};
template <typename Tile>
constexpr Sizes sizes_of() {
  return {Tile::kRows, Tile::kOutputs, Tile::kShared, Tile::kResident};
}
template <typename Tile>
constexpr Sizes hopper_sizes_of() {
  return {Tile::kRows, Tile::kOutputs, Tile::kShared, Tile::kResident, Tile::kMostCluster};
}
Sizes sizes_of(BlockSparseForm form) {
  switch (form) {
    case BlockSparseForm::kFewRows: return sizes_of<FewRows>();
    case BlockSparseForm::kSmall: return sizes_of<Small>();
    case BlockSparseForm::kTall: return sizes_of<Tall>();
    case BlockSparseForm::kSquare: return sizes_of<Square>();
    case BlockSparseForm::kHopperTall: return hopper_sizes_of<HopperTall<128>>();
    case BlockSparseForm::kHopperSquare: return hopper_sizes_of<HopperSquare<128>>();
  }
  LISSOM_CHECK(false, kOp, ": form=", static_cast<int>(form), " is none");
  return {};
}

// The more blocks, the fewer bytes from L2; but not where more than an eighth of them would have no rows.
int cluster_of(const Sizes& sizes, int64_t m) {
  const int64_t tile_rows = ceil_div(m, sizes.rows);
  int cluster = sizes.most_cluster;
  while (8 * (ceil_div(tile_rows, cluster) * cluster - tile_rows) > tile_rows) cluster /= 2;
  return cluster;
}

int64_t tiles_of(const Sizes& sizes, int64_t m, int height) {
  const int64_t cluster = cluster_of(sizes, m);
  return ceil_div(m, sizes.rows * cluster) * cluster * ceil_div(height, sizes.outputs);
}

// Hopper's forms take steps of 64 or 128 bytes within a block, and 32-bit coordinates of rows.
int hopper_step(int width_bytes) { return width_bytes % 128 == 0 ? 128 : width_bytes % 64 == 0 ? 64 : 0; }
bool hopper_serves(int64_t m, int64_t blocks, int height, int width_bytes, ValueType type) {
  constexpr int64_t kMost = 0x7fffffff - 512;  // and a tile
  const int step = hopper_step(width_bytes);
  return (step == 128 || (step == 64 && type == ValueType::kInt8)) && blocks > 0 && m <= kMost &&
         blocks * height <= kMost;
}

// The emulator has twins of Hopper's instructions, and runs these forms for whoever names them.
#if defined(LISSOM_CUDA_EMULATOR)
bool hopper_runs() { return true; }
#else
bool hopper_runs() { return hopper_forms(); }
#endif

constexpr int kPieceColumns = 512;  // least of a piece of large tiles

// By count; on an H200 every form was slower than Triton's (bench/results/gpu-nvidia-h200.md), since when
// Hopper's, and how all of them end, have changed. Up to 64 rows a product is bound by the bytes of the
// values: narrow tiles, so that many blocks read them, and many stages. Then by multiply-adds per byte that
// the L2 cache delivers: 32 of a 128 x 128 tile (Hopper's clusters: 43 and 51), 26 of 256 x 64 (for blocks of
// 64 outputs, where 128 would be half empty), 16 of 64 x 64, which is taken where there are not large tiles
// enough for all multiprocessors. Hopper's form is taken from where each multiprocessor has 512 columns of a
// tile: pieces of so many are worth their sums.
BlockSparseForm choose_form(ValueType type, int64_t m, int64_t lines, int64_t blocks, int height, int width) {
  if (m <= FewRows::kRows) return BlockSparseForm::kFewRows;
  if (m <= Small::kRows) return BlockSparseForm::kSmall;
  const bool square = height % Square::kOutputs == 0 || height % Square::kOutputs > Square::kOutputs / 2;
  const auto enough = [&](BlockSparseForm form) {
    return lines * tiles_of(sizes_of(form), m, height) >= current_device().multiprocessors;
  };
  const BlockSparseForm hopper = square ? BlockSparseForm::kHopperSquare : BlockSparseForm::kHopperTall;
  if (hopper_forms() && hopper_serves(m, blocks, height, width * item_bytes(type), type) &&
      blocks * width * tiles_of(sizes_of(hopper), m, height) >=
          int64_t{kPieceColumns} * current_device().multiprocessors) {
    return hopper;
  }
  const BlockSparseForm large = square ? BlockSparseForm::kSquare : BlockSparseForm::kTall;
  return enough(large) ? large : BlockSparseForm::kSmall;
}

// Where there are more tiles than can be at work at a time, a piece is at most about half of what a block of
// threads has to do on average, so that none ends much later than the others; a power of two, since pieces
// are kept for later calls. Where there are fewer, lines are cut into as many pieces as there is room for,
// all of which begin at once: a second round would pay for a beginning and an end again (on an H200 16 rows x
// 8192 x 8192, 80 % sparse, took 18.1 us in two rounds and 14.4 with longer pieces, Triton's 15.7; at 50 %
// 31.7 and 30.9, Triton's 22.6, for another reason). A quarter more than a line's average is left for those
// that are longer. But no piece is so short that its sums cost more than it does: a tile's go to the L2 cache
// and back in the time of about 256 columns.
int64_t choose_most_blocks(const Sizes& sizes, int64_t tiles, int64_t lines, int64_t blocks, int width) {
  const int64_t room = current_device().shared_bytes + 1024;  // every block takes 1 KB more than it asks for
  const int64_t resident =
      std::min<int64_t>(sizes.resident, std::max<int64_t>(1, room / (sizes.shared_bytes + 1024)));
  const int64_t slots = resident * current_device().multiprocessors;
  const int64_t least = ceil_div(sizes.rows > Small::kRows ? kPieceColumns : kPieceColumns / 2, width);
  if (lines > 0 && lines * tiles <= slots) {
    const int64_t parts = slots / (lines * tiles);
    return std::max(least, ceil_div(5 * blocks, 4 * lines * parts));
  }
  const int64_t share = ceil_div(blocks * tiles, slots);
  int64_t most = 1;
  while (most < least || 2 * most < share) most *= 2;
  return most;
}

Outputs outputs_of(const BlockSparseLinear& args) {
  return outputs_of(args, args.x_scale, args.weight_scale, args.y_type, args.height);
}

template <typename T, typename Tile>
void run_tile(const BlockSparseLinear& args, Stream stream) {
  const int64_t subs = ceil_div(args.height, Tile::kOutputs), tile_rows = ceil_div(args.m, Tile::kRows);
  const int64_t across = args.piece_count * subs;
  LISSOM_CHECK(across < (int64_t{1} << 28), kOp, ": ", across,
               " tiles across are more than a launch can have; split the layer");
  const dim3 grid = grid_size(kOp, across * tile_rows);
  launch({kOp, grid, Tile::kThreads, stream, Tile::kShared}, block_sparse_kernel<T, Tile>, args,
         outputs_of(args), static_cast<unsigned>(subs), static_cast<unsigned>(tile_rows));
}

template <typename T, typename Tile>
void run_hopper(const BlockSparseLinear& args, Stream stream) {
  constexpr int64_t kItem = sizeof(T);
  const int64_t subs = ceil_div(args.height, Tile::kOutputs);
  const int cluster = cluster_of(hopper_sizes_of<Tile>(), args.m);
  const int64_t cluster_rows = ceil_div(args.m, Tile::kRows * cluster);
  const int64_t tiles = args.piece_count * subs * cluster_rows;  // of clusters
  LISSOM_CHECK(args.piece_count * subs < (int64_t{1} << 28) && tiles < int64_t{1} << 31, kOp, ": ", tiles,
               " tiles are more than are counted; split the input");
  LISSOM_CHECK(args.columns * kItem < 0x7fffffff, kOp, ": rows of ", args.columns, " columns are too long");
  const TensorMap x =
      tensor_map(kOp, args.x, args.m, args.columns * kItem, args.x_stride * kItem, Tile::kRows, Tile::kStep);
  const int64_t width = int64_t{args.width} * kItem;
  const TensorMap values = tensor_map(kOp, args.values, args.blocks * args.height, width, width,
                                      Tile::kOutputs / cluster, Tile::kStep);
  const auto kernel = block_sparse_hopper_kernel<T, Tile>;
  Launch how = {kOp, static_cast<unsigned>(cluster), Tile::kThreads, stream, Tile::kShared, cluster};
  const int64_t clusters = std::min<int64_t>(tiles, std::max(1, clusters_at_a_time(how, kernel)));
  how.grid = static_cast<unsigned>(clusters * cluster);
  launch(how, kernel, args, outputs_of(args), x, values, static_cast<unsigned>(subs),
         static_cast<unsigned>(cluster_rows), cluster);
}

template <typename T, template <int> typename Tile>
void run_hopper_step(const BlockSparseLinear& args, Stream stream) {
  const int width_bytes = args.width * static_cast<int>(sizeof(T));
  LISSOM_CHECK(hopper_runs() && hopper_serves(args.m, args.blocks, args.height, width_bytes, args.value_type),
               kOp, ": form=", static_cast<int>(args.form), " does not serve blocks of ", args.height, " x ",
               args.width, " here");
  if (hopper_step(width_bytes) == 128) return run_hopper<T, Tile<128>>(args, stream);
  if constexpr (sizeof(T) == 1) return run_hopper<T, Tile<64>>(args, stream);
}

template <typename T>
void run(const BlockSparseLinear& args, Stream stream) {
  switch (args.form) {
    case BlockSparseForm::kFewRows: return run_tile<T, FewRows>(args, stream);
    case BlockSparseForm::kSmall: return run_tile<T, Small>(args, stream);
    case BlockSparseForm::kTall: return run_tile<T, Tall>(args, stream);
    case BlockSparseForm::kSquare: return run_tile<T, Square>(args, stream);
    case BlockSparseForm::kHopperTall: return run_hopper_step<T, HopperTall>(args, stream);
    case BlockSparseForm::kHopperSquare: return run_hopper_step<T, HopperSquare>(args, stream);
  }
}

}  // namespace

BlockSparsePlan block_sparse_plan(ValueType value_type, int64_t m, int64_t lines, int64_t blocks, int height,
                                  int width) {
  LISSOM_CHECK(m > 0 && lines >= 0 && blocks >= 0 && height > 0 && width > 0, kOp, ": no plan for m=", m,
               ", lines=", lines, ", blocks=", blocks, " of ", height, " x ", width);
  const BlockSparseForm form = choose_form(value_type, m, lines, blocks, height, width);
  const Sizes sizes = sizes_of(form);
  const int64_t tiles = tiles_of(sizes, m, height);
  return {form, choose_most_blocks(sizes, tiles, lines, blocks, width), tiles,
          static_cast<int64_t>(sizes.rows) * sizes.outputs};
}

void block_sparse_linear(const BlockSparseLinear& args, Stream stream) {
  check(args);
  sizes_of(args.form);
  if (args.m == 0 || args.n == 0 || args.piece_count == 0) return;
  if (args.value_type == ValueType::kInt8) return run<int8_t>(args, stream);
  if (args.value_type == ValueType::kFloat16) return run<Float16>(args, stream);
  return run<BFloat16>(args, stream);
}

}  // namespace lissom::cuda
