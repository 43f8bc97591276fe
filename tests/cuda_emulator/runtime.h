// A CUDA grid on one CPU thread, for tests: the device source of csrc/cuda, compiled by g++.
//
// Each thread of a block is a fiber; blocks run one after the other, those of a cluster together. Threads take
// turns only where they meet:
// at a barrier or at an instruction of the whole warp ("rendezvous"). The last one to come does the work for
// all. The order of blocks and of threads follows from a seed, so that other seeds find other orders: a
// missing barrier shows as a wrong result with one of them.
//
// What a GPU leaves undefined is an error here, or shows: shared memory and the targets of unfinished copies
// hold NaN, threads that can never meet are named with the lines at which they wait.
//
// Not emulated: timing, caches, memory order, blocks that wait for one another outside of a cluster. Hopper's
// instructions are in hopper_primitives.h.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <exception>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  dim3() = default;
  dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}  // as in CUDA, from a number too
};

namespace lissom::emulator {

constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;
constexpr int kMaxFibers = 2048;
constexpr int kBarriers = 16;               // named barriers of a block; 0 is __syncthreads
constexpr int kClusterBarrier = kBarriers;  // of all threads of a cluster
constexpr size_t kStackBytes = size_t{256} << 10;
constexpr uint16_t kPoison = 0x7fcb;  // NaN as bfloat16, float16 and float32; far from 0 as bytes
constexpr int kPatience = 100000;     // turns of a thread that spins before it counts as stuck

// Where a thread called what; the default arguments of the functions below make one at the caller's line.
struct Site {
  const char* file;
  int line;
  bool operator==(const Site& o) const { return line == o.line && same(file, o.file); }
  static bool same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
};
#define LISSOM_SITE ::lissom::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

inline void poison(void* at, size_t bytes) {
  for (size_t i = 0; i < bytes; ++i) {
    static_cast<unsigned char*>(at)[i] = static_cast<unsigned char>(i % 2 ? kPoison >> 8 : kPoison);
  }
}

// A block of memory that ends where ASan's red zone begins.
struct Arena {
  explicit Arena(size_t size) : bytes(size) {
    void* p = nullptr;
    if (posix_memalign(&p, 1024, size ? size : 1)) throw std::bad_alloc();
    data.reset(static_cast<unsigned char*>(p));
  }
  bool holds(const void* p, size_t size) const {
    const auto* q = static_cast<const unsigned char*>(p);
    return q >= data.get() && q + size <= data.get() + bytes;
  }
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  size_t bytes;
  std::unique_ptr<unsigned char, Free> data;
};

struct Copy {  // of a cp.async
  void* to;
  const void* from;
  int bytes, given;  // given < bytes: the rest is zeros
};

struct Block;

struct Thread {
  enum State { kReady, kWaits, kDone };
  dim3 index;
  int number = 0;  // in the block
  Block* block = nullptr;
  State state = kReady;
  bool started = false;
  jmp_buf context;
  ucontext_t start;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;
  // While it waits:
  const char* what = "";
  Site site{"", 0};
  uint32_t mask = 0;  // of lanes to meet; 0 at a barrier of the block
  int barrier = -1;
  void* data = nullptr;  // what it brings to the meeting
  // Copies that were started: groups that were committed, then what was not yet.
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> copies;

  int warp() const { return number / kWarp; }
  int lane() const { return number % kWarp; }
};

struct Barrier {
  int arrived = 0;  // those that wait, and those that only arrived
  int expected = 0;
  Thread* first = nullptr;
};

struct Block {
  dim3 index;
  int rank = 0;  // in the cluster
  int first = 0, count = 0;  // of its threads among those of the cluster
  int live = 0;
  std::unique_ptr<Arena> dynamic_shared;
  std::map<const void*, std::unique_ptr<Arena>> static_shared;
  Barrier barriers[kBarriers];
};

struct Machine {
  std::mutex busy;  // one grid at a time
  uint64_t seed = 0;
  // The running grid.
  const char* name = "";
  dim3 grid, block;
  const std::function<void()>* kernel = nullptr;
  size_t shared_bytes = 0;
  // The running cluster, of one block where nothing else was asked for.
  uint64_t runs = 0;  // clusters so far
  std::vector<std::unique_ptr<Block>> blocks;
  std::vector<Thread> threads;
  std::deque<Thread*> ready;
  Barrier cluster_barrier;
  Thread* current = nullptr;
  int live = 0;
  int spins = 0;
  std::exception_ptr error;
  jmp_buf home;
  unsigned char* stacks = nullptr;
  uint64_t random = 1;
  const void* home_stack = nullptr;
  size_t home_stack_bytes = 0;
  void* home_fake_stack = nullptr;

  uint64_t next_random() {
    random ^= random << 13;
    random ^= random >> 7;
    return random ^= random << 17;
  }
};

inline Machine& machine() {
  static Machine one;
  return one;
}

// The order in which things are done: as they are for seed 0, shuffled otherwise.
template <typename T>
void order(std::vector<T>& all) {
  Machine& m = machine();
  if (m.seed == 0) return;
  for (size_t i = all.size(); i > 1; --i) std::swap(all[i - 1], all[m.next_random() % i]);
}

inline std::string where(const Thread& t) {
  std::ostringstream text;
  text << "thread " << t.number << " (warp " << t.warp() << ", lane " << t.lane() << ")";
  if (t.state == Thread::kDone) {
    text << " has returned";
  } else if (t.state == Thread::kWaits) {
    text << " waits at " << t.what << ", " << t.site.file << ':' << t.site.line;
    if (t.mask && t.mask != 0xffffffffu) text << ", mask 0x" << std::hex << t.mask << std::dec;
    if (t.barrier > 0) text << ", barrier " << t.barrier;
  }
  return text.str();
}

template <typename... Parts>
[[noreturn]] void error(const Parts&... parts) {
  const Machine& m = machine();
  std::ostringstream text;
  const dim3 index = m.current ? m.current->block->index : dim3(0, 0, 0);
  text << m.name << ": block (" << index.x << ", " << index.y << ", " << index.z << "): ";
  (text << ... << parts);
  throw std::runtime_error(text.str());
}

// ---- fibers ----------------------------------------------------------------------------------------------

// setjmp and longjmp between stacks that makecontext started: no system call, no assembly.
inline void leave_to(const void* stack, size_t bytes, void** fake_stack) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, bytes);
#else
  (void)stack, (void)bytes, (void)fake_stack;
#endif
}

inline void arrived_from(void* fake_stack, const void** stack, size_t* bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, stack, bytes);
#else
  (void)fake_stack, (void)stack, (void)bytes;
#endif
}

[[noreturn]] inline void go_home() {
  Machine& m = machine();
  leave_to(m.home_stack, m.home_stack_bytes, nullptr);
  _longjmp(m.home, 1);
}

[[noreturn]] inline void go_to_next(void** fake_stack) {
  Machine& m = machine();
  if (m.ready.empty()) {
    if (m.live > 0 && !m.error) {
      std::ostringstream text;
      int told = 0;
      for (const Thread& t : m.threads) {
        if (t.state == Thread::kWaits && told++ < 8) text << "\n  " << where(t);
      }
      if (told > 8) text << "\n  and " << told - 8 << " more";
      try {
        error("deadlock", text.str());
      } catch (...) {
        m.error = std::current_exception();
      }
    }
    go_home();
  }
  const size_t pick = m.seed ? m.next_random() % m.ready.size() : 0;
  Thread* t = m.ready[pick];
  if (m.seed) {
    m.ready[pick] = m.ready.back();
    m.ready.pop_back();
  } else {
    m.ready.pop_front();
  }
  m.current = t;
  leave_to(t->stack, kStackBytes, fake_stack);
  if (t->started) _longjmp(t->context, 1);
  t->started = true;
#if defined(__SANITIZE_ADDRESS__)
  __asan_handle_no_return();  // as longjmp does: this call's frame is gone for whoever comes back
#endif
  setcontext(&t->start);
  std::abort();
}

// Another thread's turn, until somebody makes this one ready.
inline void pause() {
  Thread* self = machine().current;
  if (_setjmp(self->context) == 0) go_to_next(&self->fake_stack);
  arrived_from(self->fake_stack, nullptr, nullptr);
}

inline void wake(Thread& t) {
  t.state = Thread::kReady;
  t.mask = 0;
  t.barrier = -1;
  machine().ready.push_back(&t);
}

// For loops that wait for what another thread of the block writes.
inline void spin(const char* what, Site site) {
  Machine& m = machine();
  if (++m.spins > kPatience) {
    error(where(*m.current), " spins for ever at ", what, ", ", site.file, ':', site.line,
          " (blocks run one after the other and cannot wait for each other)");
  }
  m.ready.push_back(m.current);
  pause();
}

inline Thread& self() { return *machine().current; }

// ---- rendezvous ------------------------------------------------------------------------------------------

// Meets the lanes of `mask`; the last to come runs act(T* lanes[32]), with null for lanes outside of it.
template <typename T, typename Act>
void meet_warp(const char* what, Site site, uint32_t mask, T& data, Act act) {
  Machine& m = machine();
  Thread& me = *m.current;
  if (!(mask >> me.lane() & 1))
    error(where(me), " is not in its own mask at ", what, ", ", site.file, ':', site.line);
  m.spins = 0;
  me.what = what;
  me.site = site;
  me.mask = mask;
  me.data = &data;
  me.state = Thread::kWaits;
  const int first = me.block->first + me.warp() * kWarp;
  bool all = true;
  for (int lane = 0; lane < kWarp; ++lane) {
    if (!(mask >> lane & 1)) continue;
    if (first + lane >= me.block->first + me.block->count) {
      error(where(me), "; lane ", lane, " of that warp does not exist");
    }
    const Thread& other = m.threads[first + lane];
    if (other.state == Thread::kDone) error(where(me), ", but ", where(other));
    if (other.state == Thread::kReady || !(other.mask >> me.lane() & 1)) {
      // Not there yet. (At a barrier of the block it waits for this lane: the deadlock is told when
      // complete.)
      all = false;
    } else if (other.mask != mask || !(other.site == site) || !Site::same(other.what, what)) {
      error("divergence: ", where(me), ", but ", where(other));
    }
  }
  if (!all) return pause();
  T* lanes[kWarp];
  for (int lane = 0; lane < kWarp; ++lane) {
    lanes[lane] = mask >> lane & 1 ? static_cast<T*>(m.threads[first + lane].data) : nullptr;
  }
  act(lanes);
  for (int lane = 0; lane < kWarp; ++lane) {
    if ((mask >> lane & 1) && lane != me.lane()) wake(m.threads[first + lane]);
  }
  me.state = Thread::kReady;
  me.mask = 0;
}

inline Barrier& barrier(Block& block, int id) {
  return id == kClusterBarrier ? machine().cluster_barrier : block.barriers[id];
}

inline void open_if_complete(Block& block, int id) {
  Machine& m = machine();
  Barrier& b = barrier(block, id);
  const int everybody = id == kClusterBarrier ? m.live : block.live;
  const int expected = b.expected == 0 ? everybody : b.expected;
  if (b.arrived == 0 || b.arrived < expected) return;
  b = Barrier();
  for (Thread& t : m.threads) {
    if (t.state == Thread::kWaits && t.barrier == id && (t.block == &block || id == kClusterBarrier)) wake(t);
  }
}

// A barrier of the block: `threads` of them have to come, 0 for all that have not returned.
inline void meet_block(const char* what, Site site, int id, int threads, bool waits) {
  Machine& m = machine();
  Thread& me = *m.current;
  if (id < 0 || id > kClusterBarrier)
    error(what, ": barrier ", id, " does not exist, ", site.file, ':', site.line);
  if (threads % kWarp) error(what, ": ", threads, " threads are no whole warps, ", site.file, ':', site.line);
  m.spins = 0;
  Barrier& b = barrier(*me.block, id);
  if (b.arrived && b.expected != threads) {
    error("divergence: ", where(me), " comes to barrier ", id, " for ", threads, " threads, others for ",
          b.expected, ", ", site.file, ':', site.line);
  }
  if (threads == 0 && b.first && !(b.first->site == site)) {
    error("divergence: ", where(me), " comes to ", what, ", ", site.file, ':', site.line, ", but ",
          where(*b.first));
  }
  if (!b.first) b.first = &me;
  b.expected = threads;
  ++b.arrived;
  if (waits) {
    me.what = what;
    me.site = site;
    me.barrier = id;
    me.state = Thread::kWaits;
  }
  open_if_complete(*me.block, id);
  if (waits) pause();  // also the last one: whoever is ready may be first behind the barrier
}

// ---- shared memory, copies -------------------------------------------------------------------------------

inline unsigned char* dynamic_shared() { return self().block->dynamic_shared->data.get(); }

inline Arena& static_arena(Block& block, const void* key, size_t bytes) {
  auto& arena = block.static_shared[key];
  if (!arena) {
    arena = std::make_unique<Arena>(bytes);
    poison(arena->data.get(), bytes);
  }
  return *arena;
}

template <typename T>
T& static_shared(const void* key) {
  return *reinterpret_cast<T*>(static_arena(*self().block, key, sizeof(T)).data.get());
}

// The place in the shared memory of block `rank` of the cluster where p is in this block's.
template <typename T>
T* in_block(T* p, int rank) {
  Machine& m = machine();
  Block& mine = *self().block;
  const auto* at = reinterpret_cast<const unsigned char*>(p);
  if (rank < 0 || rank >= static_cast<int>(m.blocks.size())) error("there is no block ", rank, " in the cluster");
  Block& other = *m.blocks[rank];
  if (mine.dynamic_shared->holds(at, 1)) {
    return reinterpret_cast<T*>(other.dynamic_shared->data.get() + (at - mine.dynamic_shared->data.get()));
  }
  for (const auto& [key, arena] : mine.static_shared) {
    if (!arena->holds(at, 1)) continue;
    return reinterpret_cast<T*>(static_arena(other, key, arena->bytes).data.get() + (at - arena->data.get()));
  }
  error(where(self()), ": outside of shared memory");
}

inline void check_shared(const char* what, Site site, const void* p, size_t bytes) {
  const Block& block = *self().block;
  bool inside = block.dynamic_shared->holds(p, bytes);
  for (const auto& entry : block.static_shared) inside = inside || entry.second->holds(p, bytes);
  if (!inside) error(where(self()), ": ", what, " outside of shared memory, ", site.file, ':', site.line);
}

inline void check_aligned(const char* what, Site site, const void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes) {
    error(where(self()), ": ", what, " at an address that is no multiple of ", bytes, ", ", site.file, ':',
          site.line);
  }
}

inline void start_copy(Site site, void* to, const void* from, int bytes, int given) {
  check_aligned("cp.async", site, to, bytes);
  check_aligned("cp.async", site, from, bytes);
  check_shared("cp.async", site, to, bytes);
  poison(to, bytes);
  self().copies.push_back({to, from, bytes, given});
}

inline void commit_copies() {
  self().groups.push_back(std::move(self().copies));
  self().copies.clear();
}

// Until at most `pending` groups of this thread's copies are unfinished.
inline void finish_copies(size_t pending) {
  auto& groups = self().groups;
  for (; groups.size() > pending; groups.pop_front()) {
    for (const Copy& c : groups.front()) {
      std::memset(c.to, 0, c.bytes);
      if (c.given) std::memcpy(c.to, c.from, c.given);
    }
  }
}

// ---- blocks and grids ------------------------------------------------------------------------------------

inline void enter_fiber() {
  Machine& m = machine();
  const void* stack = nullptr;
  size_t bytes = 0;
  arrived_from(nullptr, &stack, &bytes);
  if (!m.home_stack) m.home_stack = stack, m.home_stack_bytes = bytes;  // the first fiber comes from there
  try {
    (*m.kernel)();
    m.current->state = Thread::kDone;
    --m.live;
    --m.current->block->live;
    open_if_complete(*m.current->block, 0);
    open_if_complete(*m.current->block, kClusterBarrier);
  } catch (...) {
    m.error = std::current_exception();
  }
  if (m.error) go_home();
  go_to_next(nullptr);
}

inline void start_cluster() { go_to_next(&machine().home_fake_stack); }

inline void run_cluster(const dim3* indices, int size) {
  Machine& m = machine();
  const int count = static_cast<int>(m.block.x * m.block.y * m.block.z);
  ++m.runs;
  m.blocks.clear();
  m.threads = std::vector<Thread>(static_cast<size_t>(size * count));
  m.ready.clear();
  m.cluster_barrier = Barrier();
  m.live = size * count;
  m.spins = 0;
  for (int rank = 0; rank < size; ++rank) {
    m.blocks.push_back(std::make_unique<Block>());
    Block& block = *m.blocks.back();
    block.index = indices[rank];
    block.rank = rank;
    block.first = rank * count;
    block.count = block.live = count;
    block.dynamic_shared = std::make_unique<Arena>(m.shared_bytes);
    poison(block.dynamic_shared->data.get(), m.shared_bytes);
  }
  for (int i = 0; i < size * count; ++i) {
    Thread& t = m.threads[i];
    t.number = i % count;
    t.block = m.blocks[i / count].get();
    const unsigned n = static_cast<unsigned>(t.number);
    t.index = dim3(n % m.block.x, n / m.block.x % m.block.y, n / m.block.x / m.block.y);
    t.stack = m.stacks + i * kStackBytes;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(t.stack, kStackBytes);
#endif
    getcontext(&t.start);
    t.start.uc_stack.ss_sp = t.stack;
    t.start.uc_stack.ss_size = kStackBytes;
    t.start.uc_link = nullptr;
    makecontext(&t.start, enter_fiber, 0);
    m.ready.push_back(&t);
  }
  m.home_stack = nullptr;
  if (_setjmp(m.home) == 0) start_cluster();
  arrived_from(m.home_fake_stack, nullptr, nullptr);
  m.current = nullptr;
}

// Runs `kernel` for every thread of every block; `cluster` blocks along x at a time.
inline void run_grid(const char* name, dim3 grid, dim3 block, size_t shared_bytes, unsigned cluster,
                     const std::function<void()>& kernel) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.busy);
  const uint64_t threads = uint64_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > kMaxThreads || !grid.x || !grid.y || !grid.z || grid.x % cluster ||
      threads * cluster > kMaxFibers) {
    throw std::runtime_error(std::string(name) + ": invalid configuration");
  }
  if (!m.stacks) {
    void* p = mmap(nullptr, kMaxFibers * kStackBytes, PROT_READ | PROT_WRITE,
                   MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    m.stacks = static_cast<unsigned char*>(p);
  }
  m.name = name;
  m.grid = grid;
  m.block = block;
  m.kernel = &kernel;
  m.error = nullptr;
  m.random = m.seed * 0x9e3779b97f4a7c15u + 1;
  m.shared_bytes = shared_bytes;
  std::vector<std::vector<dim3>> clusters;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        if (x % cluster == 0) clusters.emplace_back();
        clusters.back().push_back(dim3(x, y, z));
      }
    }
  }
  order(clusters);
  for (const std::vector<dim3>& indices : clusters) {
    run_cluster(indices.data(), static_cast<int>(indices.size()));
    m.blocks.clear();
    if (m.error) std::rethrow_exception(m.error);
  }
}

}  // namespace lissom::emulator
