// int8 linear: check -> choose -> launch.
#include "int8_linear.h"

#include <algorithm>

#include "int8_linear_hopper.cuh"
#include "int8_linear_kernel.cuh"
#include "quantize_rows.h"

namespace lissom::cuda {
namespace {

constexpr const char* kOp = "int8_linear";

void check(const Int8Linear& args) {
  LISSOM_CHECK(args.m >= 0 && args.n >= 0 && args.k >= 0, kOp, ": negative size");
  LISSOM_CHECK(args.x_stride >= args.k || args.m <= 1, kOp, ": x_stride=", args.x_stride,
               " is less than k=", args.k);
  LISSOM_CHECK(args.weight_stride >= args.k || args.n <= 1, kOp, ": weight_stride=", args.weight_stride,
               " is less than k=", args.k);
  LISSOM_CHECK((args.mode == InputMode::kStatic) == (args.input_scale != nullptr), kOp,
               ": input_scale is what static mode needs, and no other");
}

// ---- choosing
// -----------------------------------------------------------------------------------------------

enum class Quantizing { kNone, kBefore, kFused };

struct Plan {
  Int8Form form;
  Quantizing quantizing;
  bool aligned;
  RowsShape rows;  // kRows, kFloatRows
  int64_t tiles_m, tiles_n, steps;
  int splits;
  // The workspace, in bytes from its start.
  int64_t q_stride, q_at, scale_at, partial_at, counters_at, bytes;
};

struct Shape {
  Int8Form form;
  int m, n;
  int per_multiprocessor;  // blocks that the splits of K fill one with
  int time;                // of a product
};

// By count: 64 x 64 where the weight's bytes are what costs (up to 64 rows), the others for products: the
// larger the tile, the fewer bytes from L2 for each of them. On Hopper mma.sync is said to reach some 60 % of
// wgmma's rate. On an H200 (bench/results/gpu-nvidia-h200.md) Hopper's form was the fastest there is from
// 1024 rows on, but at 256 rows of 4096 x 4096 and 8192 x 8192 the costs below chose mma.sync, which took
// more than twice Triton's time; up to 64 rows Triton's are faster too.
constexpr Shape kShapes[] = {{Int8Form::kTile64, 64, 64, 2, 8},
                             {Int8Form::kTile128, 128, 128, 2, 8},
                             {Int8Form::kTile256, 128, 256, 1, 8},
                             {Int8Form::kHopper, HopperTile::kCluster * 128, 256, 0, 5}};
constexpr int64_t kHopperMost = 1 << 30;  // rows: the copy engine's coordinates are int32

// Hopper's form waits for hopper_forms(), but for the emulator's tests, which name it.
bool hopper_runs(const Int8Linear& args) {
#if defined(LISSOM_CUDA_EMULATOR)
  return args.form == Int8Form::kHopper;
#else
  (void)args;
  return hopper_forms();
#endif
}

// Whether a form was compiled for what is to be multiplied.
bool serves(const Shape& shape, const Int8Linear& args, bool aligned) {
  if (shape.form == Int8Form::kTile64) return true;
  if (!aligned) return false;
  const bool quantized = args.mode != InputMode::kWeightOnly;
  if (shape.form == Int8Form::kTile256) return quantized;
  if (shape.form == Int8Form::kHopper) {
    return quantized && hopper_runs(args) && args.k > 0 && args.m <= kHopperMost && args.n <= kHopperMost &&
           args.weight_stride >= args.k && args.weight_stride % 16 == 0;
  }
  return true;
}

int64_t tiles_of(const Shape& shape, const Int8Linear& args) {
  return ceil_div(args.m, shape.m) * ceil_div(args.n, shape.n);
}

// Rounds that the blocks take over all multiprocessors, times the work of one: its products; weighed as 64 of
// them, every byte that it loads; and so every byte of sums that splits write and read again.
int64_t cost_of(const Shape& shape, const Int8Linear& args, int64_t splits) {
  const int across = shape.form == Int8Form::kHopper ? HopperTile::kCluster : 1;  // multiprocessors of a tile
  const int64_t rounds = ceil_div(tiles_of(shape, args) * splits * across, current_device().multiprocessors);
  const int64_t products = shape.m * shape.n, bytes = shape.m + shape.n;
  const int64_t work =
      ceil_div(args.k, splits) * (products + 64 * bytes) + (splits > 1 ? 64 * 8 * products : 0);
  return rounds * work * shape.time / across;
}

// Parts of K. Up to 64 rows the weight's bytes are what costs: so many that blocks fill the GPU. Up to 256
// what costs least. From then on tiles are enough. No part is shorter than what its loads run ahead.
constexpr int kFewRows = 64, kMostSplitRows = 256, kLeastSteps = 8;

// Rows from which wgmma is taken wherever it serves. On an H200 it took 0.3 to 0.75 of mma.sync's time there
// (4096 x 4096, 8192 x 8192, 8192 x 28672), but at 128 rows of 4096 x 4096, 1.07.
constexpr int kHopperLeast = 128;

int splits_of(const Shape& shape, const Int8Linear& args) {
  if (shape.per_multiprocessor == 0) return 1;
  if (args.splits > 0) return args.splits;
  if (args.m > kMostSplitRows) return 1;
  const int64_t room = int64_t{shape.per_multiprocessor} * current_device().multiprocessors;
  int64_t most = room / tiles_of(shape, args);
  const int64_t steps = ceil_div(args.k, kUnit);
  if (most > steps / kLeastSteps) most = steps / kLeastSteps;
  int best = most < 1 ? 1 : static_cast<int>(most);
  if (args.m > kFewRows) {
    for (int splits = best - 1; splits >= 1; --splits) {
      if (cost_of(shape, args, splits) < cost_of(shape, args, best)) best = splits;
    }
  }
  return best;
}

int value_bytes(DType type) { return type == DType::kFloat32 ? 4 : 2; }

bool is_aligned(const void* p, int64_t stride_bytes, int64_t rows) {
  return reinterpret_cast<uintptr_t>(p) % 16 == 0 && (rows <= 1 || stride_bytes % 16 == 0);
}

int64_t rows_shared_bytes(int64_t rows, int64_t pitch, int bytes) {
  return 2 * kRowsSums * 4 + rows * pitch * bytes;
}

// Elements of x, `bytes` each, that a block of the few-rows form keeps in shared memory at a time, so that
// two blocks fit a multiprocessor.
int64_t rows_room(int bytes) {
  constexpr int kReserved = 1024, kPadding = 16 * 64;  // of every block, by the system; of rows_pitch()
  return (current_device().shared_bytes / 2 - rows_shared_bytes(0, 0, 0) - kReserved - kPadding) / bytes;
}

bool rows_fit(int64_t rows, int64_t k, int bytes) {
  return rows * ceil_div(k, kRowsColumns * kRowsWarps) * kRowsColumns * kRowsWarps <= rows_room(bytes);
}

// bytes: of an element of x as it is multiplied, and as blocks read it.
RowsShape choose_rows(const Int8Linear& args, bool floats, int bytes, int read_bytes) {
  const int64_t rows = floats && args.m > kFloatRowsMost ? kFloatRowsMost : args.m;
  // All 8 warps share the K of 8 outputs, unless it is too short for a batch of loads in every warp. Where x
  // does not fit, it is read again for every 32 outputs.
  int slices = rows_fit(rows, args.k, bytes) ? kRowsWarps : 2;
  while (slices > 1 && args.k <= slices / 2 * kRowsColumns) slices /= 2;
  const int64_t round = int64_t{slices} * kRowsColumns, needed = ceil_div(args.k, round) * round;
  const int64_t room = rows_room(bytes) / rows / round * round, columns = needed < room ? needed : room;
  RowsShape shape = {slices, static_cast<int>(columns < round ? round : columns), 0};

  // As many blocks as reside, by registers two and by shared memory; one where what they read of x comes near
  // a quarter of the weight; and of those so many that all have equally much to do.
  const Device& device = current_device();
  int resident = 2;
  const int64_t shared = rows_shared_bytes(rows, shape.columns, bytes) + 2048;
  while (resident > 1 && (resident * shared > device.shared_bytes ||
                          4 * resident * device.multiprocessors * rows * read_bytes > args.n)) {
    --resident;
  }
  const int64_t pieces = ceil_div(args.n, kRowsWarps / slices * kRowsOutputs);
  const int64_t turns = ceil_div(pieces, int64_t{resident} * device.multiprocessors);
  shape.blocks = static_cast<int>(ceil_div(pieces, turns));
  return shape;
}

Plan choose(const Int8Linear& args) {
  Plan plan = {};
  const bool quantized = args.mode != InputMode::kWeightOnly;
  const bool floats = !quantized && args.x_type == DType::kFloat32;
  plan.aligned = args.k % 16 == 0 && is_aligned(args.weight, args.weight_stride, args.n) &&
                 (quantized || floats || is_aligned(args.x, args.x_stride * 2, args.m));

  Int8Form form = args.form;
  if (form == Int8Form::kChoose) {
    // Few rows, but for more than some of them whose x does not fit shared memory.
    const bool fits = args.m <= kFusedRowsMost || floats || rows_fit(args.m, args.k, quantized ? 1 : 2);
    if (plan.aligned && args.m <= kRowsMost && args.k <= kRowsMostColumns && fits) {
      form = floats ? Int8Form::kFloatRows : Int8Form::kRows;
    } else if (floats) {
      form = Int8Form::kFloatTile64;
    } else {
      form = Int8Form::kTile64;
      int64_t least = 0;
      for (const Shape& shape : kShapes) {
        if (args.m <= kFewRows || !serves(shape, args, plan.aligned)) continue;
        if (shape.form == Int8Form::kHopper && args.m >= kHopperLeast) {
          form = shape.form;
          break;
        }
        const int64_t cost = cost_of(shape, args, splits_of(shape, args));
        if (least == 0 || cost < least) form = shape.form, least = cost;
      }
    }
  }
  plan.form = form;
  const bool rows_form = form == Int8Form::kRows || form == Int8Form::kFloatRows;
  LISSOM_CHECK(plan.aligned || form == Int8Form::kTile64 || form == Int8Form::kFloatTile64, kOp, ": form ",
               static_cast<int>(form), " needs rows on multiples of 16 bytes");
  LISSOM_CHECK(!rows_form || (args.m <= kRowsMost && args.k <= kRowsMostColumns), kOp, ": form ",
               static_cast<int>(form), " serves up to ", kRowsMost, " rows, not ", args.m);
  for (const Shape& shape : kShapes) {
    LISSOM_CHECK(shape.form != form || serves(shape, args, plan.aligned), kOp, ": form ",
                 static_cast<int>(form), " is not compiled for these arguments, or not for this GPU");
  }
  LISSOM_CHECK(floats == (form == Int8Form::kFloatRows || form == Int8Form::kFloatTile64), kOp, ": form ",
               static_cast<int>(form), " is for other activations");

  const bool fused = rows_form && args.m <= kFusedRowsMost &&
                     is_aligned(args.x, args.x_stride * value_bytes(args.x_type), args.m);
  plan.quantizing = !quantized ? Quantizing::kNone : fused ? Quantizing::kFused : Quantizing::kBefore;
  if (rows_form) {
    const int x_bytes = value_bytes(args.x_type);
    plan.rows = choose_rows(args, floats, quantized ? 1 : x_bytes,
                            plan.quantizing == Quantizing::kBefore ? 1 : x_bytes);
  }
  plan.splits = 1;
  int64_t tile_sums = 0;
  for (const Shape& shape : kShapes) {
    if (shape.form != (floats ? Int8Form::kTile64 : form)) continue;
    plan.tiles_m = ceil_div(args.m, shape.m), plan.tiles_n = ceil_div(args.n, shape.n);
    const int64_t steps = ceil_div(args.k, kUnit);
    if (!floats) plan.splits = splits_of(shape, args);
    plan.steps = ceil_div(steps, plan.splits);
    if (plan.steps > 0) plan.splits = static_cast<int>(ceil_div(steps, plan.steps));  // none is empty
    tile_sums = int64_t{shape.m} * shape.n;
  }

  const auto take = [&plan](int64_t bytes) {
    const int64_t at = plan.bytes;
    plan.bytes += ceil_div(bytes, 256) * 256;
    return at;
  };
  if (plan.quantizing == Quantizing::kBefore) {
    plan.q_stride = ceil_div(args.k > 0 ? args.k : 1, 16) * 16;
    plan.q_at = take(args.m * plan.q_stride);
    plan.scale_at = take(args.m * 4);
  }
  if (plan.splits > 1) {
    plan.partial_at = take(plan.tiles_m * plan.tiles_n * plan.splits * tile_sums * 4);
    plan.counters_at = take(plan.tiles_m * plan.tiles_n * 4);
  }
  return plan;
}

// ---- launching
// ----------------------------------------------------------------------------------------------

template <typename T>
T* workspace_at(const Int8Linear& args, int64_t bytes) {
  return reinterpret_cast<T*>(static_cast<unsigned char*>(args.workspace) + bytes);
}

Outputs outputs_of(const Int8Linear& args, const Plan& plan) {
  const bool quantized = plan.quantizing == Quantizing::kBefore;
  return outputs_of(args, quantized ? workspace_at<const float>(args, plan.scale_at) : nullptr,
                    args.weight_scale, args.x_type, args.n);
}

template <typename X, typename Source, int kHalves>
void run_rows(const Int8Linear& args, const Plan& plan, Stream stream) {
  const bool floats = sizeof(X) == 4;
  const int64_t rows = floats && args.m > kFloatRowsMost ? kFloatRowsMost : args.m;
  const int64_t shared = rows_shared_bytes(rows, rows_pitch<X>(plan.rows.columns), sizeof(X));
  const dim3 grid(static_cast<unsigned>(plan.rows.blocks),
                  floats ? static_cast<unsigned>(ceil_div(args.m, kFloatRowsMost)) : 1);
  Int8Linear seen = args;
  if (sizeof(X) == 1 && sizeof(Source) == 1) {  // quantized before
    seen.x = workspace_at<const int8_t>(args, plan.q_at);
    seen.x_stride = plan.q_stride;
  }
  launch({kOp, grid, kRowsThreads, stream, static_cast<int>(shared), 0, true},
         rows_kernel<X, Source, kHalves>, seen, outputs_of(args, plan), plan.rows);
}

template <typename X, typename T, bool kAligned>
void run_tiles(const Int8Linear& args, const Plan& plan, Stream stream) {
  const bool bytes = sizeof(X) == 1;
  int* counters = plan.splits > 1 ? workspace_at<int>(args, plan.counters_at) : nullptr;
  const int64_t tiles = plan.tiles_m * plan.tiles_n;
  if (plan.splits > 1 && !bytes) {
    launch({kOp, grid_size(kOp, ceil_div(tiles, 256)), 256, stream}, zero_kernel, counters, tiles);
  }
  const TileCall call = {bytes ? workspace_at<const void>(args, plan.q_at) : args.x,
                         bytes ? plan.q_stride : args.x_stride,
                         bytes ? plan.q_stride : args.k,
                         args.weight,
                         args.weight_stride,
                         args.k,
                         plan.tiles_m,
                         plan.tiles_n,
                         plan.splits,
                         plan.steps,
                         plan.splits > 1 ? workspace_at<void>(args, plan.partial_at) : nullptr,
                         counters,
                         outputs_of(args, plan)};
  const dim3 grid(grid_size(kOp, tiles), static_cast<unsigned>(plan.splits));
  launch({kOp, grid, T::kThreads, stream, T::kSharedBytes, 0, true}, tile_kernel<X, T, kAligned>, call);
}

void run_hopper(const Int8Linear& args, const Plan& plan, Stream stream) {
  using T = HopperTile;
  const TensorMap x = tensor_map(kOp, workspace_at<const int8_t>(args, plan.q_at), args.m, args.k,
                                 plan.q_stride, T::kM, T::kDepth);
  const TensorMap weight =
      tensor_map(kOp, args.weight, args.n, args.k, args.weight_stride, T::kN / T::kCluster, T::kDepth);
  Launch how = {kOp, T::kCluster, T::kThreads, stream, T::kSharedBytes, T::kCluster, true};
  const int64_t clusters = std::min<int64_t>(plan.tiles_m * plan.tiles_n,
                                             std::max(1, clusters_at_a_time(how, hopper_tile_kernel)));
  how.grid = static_cast<unsigned>(clusters * T::kCluster);
  launch(how, hopper_tile_kernel, x, weight, outputs_of(args, plan), plan.tiles_m, plan.tiles_n,
         static_cast<int>(ceil_div(args.k, T::kDepth)));
}

template <typename X>
void run_form(const Int8Linear& args, const Plan& plan, Stream stream) {
  switch (plan.form) {
    case Int8Form::kRows:
      return args.m <= 8 ? run_rows<X, X, 1>(args, plan, stream) : run_rows<X, X, 2>(args, plan, stream);
    case Int8Form::kTile128:  // fragments of 16-bit x leave registers for 64 x 32 outputs of a warp
      return run_tiles<X, Tile<X, 128, 128, 2, sizeof(X) == 1 ? 2 : 4>, true>(args, plan, stream);
    case Int8Form::kTile256:
      if constexpr (sizeof(X) == 1) return run_tiles<X, Tile<X, 128, 256, 2, 4>, true>(args, plan, stream);
      break;
    default: break;
  }
  using Small = Tile<X, 64, 64, 2, 2>;
  return plan.aligned ? run_tiles<X, Small, true>(args, plan, stream)
                      : run_tiles<X, Small, false>(args, plan, stream);
}

void run_floats(const Int8Linear& args, const Plan& plan, Stream stream) {
  if (plan.form == Int8Form::kFloatRows) return run_rows<float, float, 1>(args, plan, stream);
  const TileCall call = {args.x,
                         args.x_stride,
                         args.k,
                         args.weight,
                         args.weight_stride,
                         args.k,
                         plan.tiles_m,
                         plan.tiles_n,
                         1,
                         0,
                         nullptr,
                         nullptr,
                         outputs_of(args, plan)};
  launch({kOp, grid_size(kOp, plan.tiles_m * plan.tiles_n), kFloatThreads, stream}, float_tile_kernel, call);
}

}  // namespace

int64_t int8_linear_workspace(const Int8Linear& args) {
  check(args);
  return args.m == 0 || args.n == 0 ? 0 : choose(args).bytes;
}

void int8_linear(const Int8Linear& args, Stream stream) {
  check(args);
  if (args.m == 0 || args.n == 0) return;
  const Plan plan = choose(args);
  if (plan.quantizing == Quantizing::kFused) {
    switch (args.x_type) {
      case DType::kFloat32: return run_rows<int8_t, float, 1>(args, plan, stream);
      case DType::kBFloat16: return run_rows<int8_t, BFloat16, 1>(args, plan, stream);
      case DType::kFloat16: return run_rows<int8_t, Float16, 1>(args, plan, stream);
    }
  }
  if (plan.quantizing == Quantizing::kBefore) {
    quantize_rows(
        {args.x, args.x_type, args.x_stride, args.m, args.k, args.input_scale, args.rotated,
         workspace_at<int8_t>(args, plan.q_at), plan.q_stride, workspace_at<float>(args, plan.scale_at),
         plan.splits > 1 ? workspace_at<int>(args, plan.counters_at) : nullptr,
         plan.splits > 1 ? plan.tiles_m * plan.tiles_n : 0},
        stream);
    if (plan.form == Int8Form::kHopper) return run_hopper(args, plan, stream);
    return run_form<int8_t>(args, plan, stream);
  }
  switch (args.x_type) {
    case DType::kFloat32: return run_floats(args, plan, stream);
    case DType::kBFloat16: return run_form<BFloat16>(args, plan, stream);
    case DType::kFloat16: return run_form<Float16>(args, plan, stream);
  }
}

}  // namespace lissom::cuda
