// Instructions of csrc/cuda/hopper.cuh, in C++, for kernels that ask for them: clusters, mbarriers, the copy
// engine, wgmma (PTX ISA, "Matrix descriptor", "Register fragments for wgmma", "Swizzling modes").
//
// What is asynchronous comes as late as it may: a copy's target is NaN until somebody waits for its barrier,
// wgmma reads shared memory and writes registers when it is waited for. What is given free too early shows.
#pragma once

#include <deque>
#include <map>
#include <vector>

#include "launch.h"
#include "primitives.h"

namespace lissom::cuda {

namespace emulated {

// In the 8 bytes of a barrier.
struct Barrier {
  int32_t bytes;
  int16_t pending;
  uint8_t arrivals, phase;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t), "in place of the hardware's");

// In the place of a CUtensorMap.
struct Map {
  const unsigned char* data;
  int64_t rows, columns, stride;
  int box_rows, box_columns;
};
static_assert(sizeof(Map) <= sizeof(TensorMap), "in place of the driver's");

struct Product {  // of a warp: its 16 rows of a wgmma
  void* d[32];
  uint64_t a, b;
  void (*run)(const Product&, int warp);
  const uint32_t* registers[32] = {};  // instead of a
  bool accumulate = true;
};

struct State {  // of the running cluster
  std::map<const void*, std::vector<std::function<void()>>> copies;  // by barrier
  std::map<int, std::vector<Product>> issued;                        // by warp
  std::map<int, std::deque<std::vector<Product>>> groups;
};

inline State& state() {
  static State now;
  static uint64_t run = 0;
  if (run != emulator::machine().runs) now = State();
  run = emulator::machine().runs;
  return now;
}

inline int warp_of_cluster() { return emulator::self().block->first / 32 + emulator::self().warp(); }

inline Barrier& barrier_at(uint64_t* p) { return *reinterpret_cast<Barrier*>(p); }

inline void complete(Barrier& b) {
  emulator::machine().spins = 0;
  if (b.pending < 0) emulator::error("an mbarrier has more arrivals than it counts");
  if (b.pending > 0 || b.bytes != 0) return;
  b.pending = b.arrivals;
  b.phase ^= 1;
}

// Address bits 4 … are exclusive-ored with those from 7 on: three of them for rows of 128 bytes, two for 64.
inline int64_t swizzled(int64_t address, int row_bytes) {
  return address ^ (address >> 3 & (row_bytes - 16));
}

}  // namespace emulated

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulator::dynamic_shared());
}

inline TensorMap tensor_map(const char*, const void* matrix, int64_t rows, int64_t columns, int64_t stride,
                            int box_rows, int box_columns) {
  TensorMap map;
  new (&map) emulated::Map{
      static_cast<const unsigned char*>(matrix), rows, columns, stride, box_rows, box_columns};
  return map;
}

inline void mbarrier_init(uint64_t* barrier, int arrivals) {
  emulated::barrier_at(barrier) = {0, static_cast<int16_t>(arrivals), static_cast<uint8_t>(arrivals), 0};
}
inline void mbarrier_init_fence() {}
inline void mbarrier_arrive(uint64_t* barrier) {
  --emulated::barrier_at(barrier).pending;
  emulated::complete(emulated::barrier_at(barrier));
}
inline void mbarrier_arrive_cluster(uint64_t* barrier, int rank) {
  mbarrier_arrive(emulator::in_block(barrier, rank));
}
inline void mbarrier_expect(uint64_t* barrier, int bytes) {
  emulated::barrier_at(barrier).bytes += bytes;
  --emulated::barrier_at(barrier).pending;
  emulated::complete(emulated::barrier_at(barrier));
}
inline void mbarrier_wait(uint64_t* barrier, int phase, LISSOM_SITE) {
  emulated::Barrier& b = emulated::barrier_at(barrier);
  while (b.phase == phase) {
    auto& copies = emulated::state().copies[barrier];
    if (copies.empty()) {
      emulator::spin("mbarrier_wait", site);
    } else {
      for (const auto& copy : std::exchange(copies, {})) copy();
    }
  }
}

inline void copy_bulk(void* shared, const void* global, int bytes, uint64_t* barrier, LISSOM_SITE) {
  emulator::check_aligned("copy_bulk", site, shared, 16);
  emulator::check_aligned("copy_bulk", site, global, 16);
  emulator::check_shared("copy_bulk", site, shared, bytes);
  emulator::poison(shared, bytes);
  emulated::state().copies[barrier].push_back([=] {
    std::memcpy(shared, global, bytes);
    emulated::barrier_at(barrier).bytes -= bytes;
    emulated::complete(emulated::barrier_at(barrier));
  });
}

// `blocks`: a bit for every block of the cluster that gets the tile.
inline void copy_tile_multicast(void* shared, const void* map, int column, int row, uint64_t* barrier,
                                uint16_t blocks, LISSOM_SITE) {
  const emulated::Map m = *static_cast<const emulated::Map*>(map);
  const int bytes = m.box_rows * m.box_columns;
  emulator::check_aligned("copy_tile", site, shared, 8 * m.box_columns);
  emulator::check_shared("copy_tile", site, shared, bytes);
  const int64_t from = shared_address(shared);
  for (int rank = 0; blocks >> rank; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    unsigned char* to = emulator::in_block(emulator::dynamic_shared(), rank);
    uint64_t* its_barrier = emulator::in_block(barrier, rank);
    emulator::poison(to + from, bytes);
    emulated::state().copies[its_barrier].push_back([=] {
      for (int r = 0; r < m.box_rows; ++r) {
        for (int c = 0; c < m.box_columns; ++c) {
          const bool there =
              row + r >= 0 && row + r < m.rows && column + c >= 0 && column + c < m.columns;
          to[emulated::swizzled(from + r * m.box_columns + c, m.box_columns)] =
              there ? m.data[(row + r) * m.stride + column + c] : 0;
        }
      }
      emulated::barrier_at(its_barrier).bytes -= bytes;
      emulated::complete(emulated::barrier_at(its_barrier));
    });
  }
}
inline void copy_tile(void* shared, const void* map, int column, int row, uint64_t* barrier, LISSOM_SITE) {
  copy_tile_multicast(shared, map, column, row, barrier,
                      static_cast<uint16_t>(1 << emulator::self().block->rank), site);
}

inline void fence_async_proxy() {}
inline void wgmma_fence() {}
inline void wgmma_commit(LISSOM_SITE) {
  int nothing = 0;
  emulator::meet_warp("wgmma_commit", site, 0xffffffffu, nothing, [](int* const*) {
    const int warp = emulated::warp_of_cluster();
    emulated::State& s = emulated::state();
    s.groups[warp].push_back(std::exchange(s.issued[warp], {}));
  });
}
template <int kPending>
void wgmma_wait(LISSOM_SITE) {
  int nothing = 0;
  emulator::meet_warp("wgmma_wait", site, 0xffffffffu, nothing, [](int* const*) {
    const int warp = emulated::warp_of_cluster();
    auto& groups = emulated::state().groups[warp];
    for (; groups.size() > kPending; groups.pop_front()) {
      for (const emulated::Product& product : groups.front()) product.run(product, emulator::self().warp());
    }
  });
}

// D [64, kOutputs] += A · Bᵀ over 32 bytes of both.
template <int kOutputs, typename Sum, typename Element>
void run_product(const emulated::Product& product, int warp) {
  constexpr int kDepth = 32 / sizeof(Element);
  using Wide = std::conditional_t<std::is_same_v<Sum, float>, double, int64_t>;
  const auto value = [](uint64_t descriptor, int row, int k) -> Wide {
    const int row_bytes = descriptor >> 62 == 1 ? 128 : 64;
    const int64_t start = (descriptor & 0x3fff) << 4, apart = (descriptor >> 32 & 0x3fff) << 4;
    const int64_t at = start + row / 8 * apart + row % 8 * row_bytes + k * static_cast<int>(sizeof(Element));
    Element e;
    std::memcpy(&e, emulator::dynamic_shared() + emulated::swizzled(at, row_bytes), sizeof e);
    if constexpr (std::is_same_v<Sum, float>) {
      return to_float(e);
    } else {
      return e;
    }
  };
  Wide a[16][kDepth], b[kOutputs][kDepth];
  for (int k = 0; k < kDepth; ++k) {
    for (int r = 0; r < 16; ++r) a[r][k] = value(product.a, warp % 4 * 16 + r, k);
    for (int n = 0; n < kOutputs; ++n) b[n][k] = value(product.b, n, k);
  }
  for (int lane = 0; lane < 32; ++lane) {
    Sum* d = static_cast<Sum*>(product.d[lane]);
    for (int i = 0; i < kOutputs / 2; ++i) {
      const int row = lane / 4 + i % 4 / 2 * 8, output = i / 4 * 8 + lane % 4 * 2 + i % 2;
      Wide sum = d[i];
      for (int k = 0; k < kDepth; ++k) sum += a[row][k] * b[output][k];
      d[i] = static_cast<Sum>(sum);
    }
  }
}

template <int kOutputs, typename Element, typename Sum>
void issue_product(const char* what, emulator::Site site, Sum (&d)[kOutputs / 2], uint64_t a, uint64_t b) {
  emulated::Product mine = {{d}, a, b, nullptr};
  emulator::meet_warp(what, site, 0xffffffffu, mine, [&](emulated::Product* const* lanes) {
    emulated::Product all = {{}, a, b, run_product<kOutputs, Sum, Element>};
    for (int i = 0; i < 32; ++i) {
      all.d[i] = lanes[i]->d[0];
      if (lanes[i]->a != a || lanes[i]->b != b) emulator::error(what, ": lanes have different descriptors");
    }
    emulated::state().issued[emulated::warp_of_cluster()].push_back(all);
  });
}
template <typename T>
void wgmma_m64n64(SumOf<T> (&d)[32], uint64_t a, uint64_t b, LISSOM_SITE) {
  issue_product<64, T>("wgmma_m64n64", site, d, a, b);
}
template <typename T>
void wgmma_m64n128(SumOf<T> (&d)[64], uint64_t a, uint64_t b, LISSOM_SITE) {
  issue_product<128, T>("wgmma_m64n128", site, d, a, b);
}
inline void wgmma_m64n256(int32_t (&d)[128], uint64_t a, uint64_t b, LISSOM_SITE) {
  issue_product<256, int8_t>("wgmma_m64n256", site, d, a, b);
}

// D [64, 128] = A · Bᵀ or D += A · Bᵀ, A in registers, which are read as late as shared memory is.
template <typename T>
void run_product_of_registers(const emulated::Product& product, int) {
  using Sum = SumOf<T>;
  constexpr int kEach = 4 / sizeof(T), kDepth = 8 * kEach, kOutputs = 128;
  T a[16][kDepth];
  const auto value = [](T v) {
    if constexpr (sizeof(T) == 1) {
      return int64_t{v};
    } else {
      return static_cast<double>(to_float(v));
    }
  };
  for (int lane = 0; lane < 32; ++lane) {
    for (int i = 0; i < 4 * kEach; ++i) {
      const int r = i / kEach, column = (lane % 4 + r / 2 * 4) * kEach + i % kEach;
      const uint32_t bits = product.registers[lane][r];
      std::memcpy(&a[lane / 4 + r % 2 * 8][column],
                  reinterpret_cast<const unsigned char*>(&bits) + i % kEach * sizeof(T), sizeof(T));
    }
  }
  const int64_t start = (product.b & 0x3fff) << 4, apart = (product.b >> 32 & 0x3fff) << 4;
  const int row_bytes = product.b >> 62 == 1 ? 128 : 64;
  for (int output = 0; output < kOutputs; ++output) {
    T b[kDepth];
    for (int k = 0; k < kDepth; ++k) {
      const int64_t at =
          start + output / 8 * apart + output % 8 * row_bytes + k * static_cast<int>(sizeof(T));
      std::memcpy(&b[k], emulator::dynamic_shared() + emulated::swizzled(at, row_bytes), sizeof(T));
    }
    for (int row = 0; row < 16; ++row) {
      Sum& d = static_cast<Sum*>(
          product.d[row % 8 * 4 + output % 8 / 2])[output / 8 * 4 + row / 8 * 2 + output % 2];
      auto sum = value(T{});
      for (int k = 0; k < kDepth; ++k) sum += value(a[row][k]) * value(b[k]);
      d = static_cast<Sum>(sum + (product.accumulate ? d : Sum{}));
    }
  }
}

template <typename T>
void wgmma_m64n128_of_registers(SumOf<T> (&d)[64], const uint32_t (&a)[4], uint64_t b,
                                int accumulate, LISSOM_SITE) {
  emulated::Product mine = {{d}, 0, b, nullptr, {a}, accumulate != 0};
  emulator::meet_warp("wgmma_m64n128", site, 0xffffffffu, mine, [&](emulated::Product* const* lanes) {
    emulated::Product all = {{}, 0, b, run_product_of_registers<T>, {}, accumulate != 0};
    for (int i = 0; i < 32; ++i) {
      all.d[i] = lanes[i]->d[0];
      all.registers[i] = lanes[i]->registers[0];
      if (lanes[i]->b != b) emulator::error("wgmma_m64n128: lanes have different descriptors");
    }
    emulated::state().issued[emulated::warp_of_cluster()].push_back(all);
  });
}

template <int kRegisters>
void registers_up() {}
template <int kRegisters>
void registers_down() {}

inline int cluster_rank() { return emulator::self().block->rank; }
inline void cluster_sync(LISSOM_SITE) {
  emulator::meet_block("cluster_sync", site, emulator::kClusterBarrier, 0, true);
}
// Whoever arrives is counted when it waits.
inline void cluster_arrive() {}
inline void cluster_wait(LISSOM_SITE) {
  emulator::meet_block("cluster_wait", site, emulator::kClusterBarrier, 0, true);
}
template <typename T>
T load_cluster(const T* mine, int rank) {
  return *emulator::in_block(mine, rank);
}

}  // namespace lissom::cuda
