// Runs the CUDA sources on a CPU. Each CUDA thread is a fiber; a seeded scheduler switches between them at every primitive that waits and at
// random between memory accesses. What it checks, and where the rules come from (PTX ISA 8.x; section names in quotes):
//
// * Accesses to shared memory by two threads, one of them a write, are ordered by a barrier, or they race ("Memory Consistency Model",
//   causality order). Barriers join the vector clocks of those who take part; shuffles, ldmatrix and mma order nothing.
// * cp.async is finished only by cp.async.wait_group in the thread that asked, and seen by others only after a barrier that follows
//   ("Data Movement and Conversion Instructions: Asynchronous copy"). The copy is made at the wait: what is touched earlier is an error.
// * .sync.aligned instructions are executed by all 32 lanes alike ("warp-level matrix instructions"); barriers by as many as they name.
// * 16-byte accesses are aligned; global accesses stay inside the tensors that the launch names; nothing is read before it is written;
//   no two threads write one global address, or read what another wrote, in one launch.
#include "executor.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <string>
#include <unordered_map>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__)
#error "the executor's context switch is written for x86-64 and AArch64"
#endif

// vk_switch(&save, to): keep this stack's pointer and go on where `to` was kept.
#if defined(__x86_64__)
asm(R"(
.text
.globl vk_switch
.type vk_switch, @function
vk_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size vk_switch, .-vk_switch
)");
#else
asm(R"(
.text
.globl vk_switch
.type vk_switch, %function
vk_switch:
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x2, sp
  str x2, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size vk_switch, .-vk_switch
)");
#endif
extern "C" void vk_switch(void** save, void* to);

namespace vk {
namespace model {
namespace {

constexpr uint32_t LANES = 32, BARRIERS = 16, CELL = 2;  // bytes per cell of shared memory
constexpr size_t STACK = 64 << 10;
constexpr int SWITCH_ONE_IN = 16;  // memory accesses

struct Cell {
  int32_t writer = -1;  // none yet
  uint32_t clock = 0;
  bool under_way = false;  // an asynchronous copy into it
  bool read = false;       // since it was written
  Where at{}, last_read{};  // at: of the write, or of the copy
};
struct Copy {
  uint32_t to, bytes, group;
  const uint8_t* from;
  Where at;
};
struct Fiber {
  void* sp = nullptr;
  uint32_t index = 0;
  bool done = false;
  const char* waits_for = nullptr;
  Where at{};
  std::vector<uint32_t> clock;
  std::vector<Copy> copies;
  uint32_t group = 0;
};
struct Meeting {  // of the lanes of a warp
  const char* what = nullptr;
  Where at{};
  uint32_t arrived = 0;
  void* operand[LANES];
};
struct Barrier {
  uint32_t expected = 0;
  Where at{};
  std::vector<uint32_t> arrived;
};
struct Span {
  uint64_t begin, bytes, writable;
};
struct Counts {
  uint64_t products, matrix_loads, copies, barriers;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Cell> cells;
  std::vector<uint8_t> shared;
  std::vector<Meeting> meetings;
  Barrier barriers[BARRIERS];
  std::vector<uint32_t> ready;
  uint32_t index = 0;
};

Block* block;
std::vector<uint32_t> read_clocks;  // [cells, threads]: when a thread last read a cell that says it was read; 0: not since it was written
Fiber* self;
void* scheduler_sp;
uint8_t* stacks;
uint32_t stacks_for;
void (*kernel)(const void*);
const void* parameters;
const Span* spans;
uint32_t span_count;
std::unordered_map<uint64_t, uint64_t> writers;  // of global memory: two-byte address -> thread of the launch
uint64_t random_state;
std::string failure;
Counts counts;

uint64_t draw() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state;
}

std::string text(Where at) {
  const char* name = std::strrchr(at.file, '/');
  return std::string(name ? name + 1 : at.file) + ":" + std::to_string(at.line);
}

void leave() { vk_switch(&self->sp, scheduler_sp); }

[[noreturn]] void fail(const std::string& what) {
  if (failure.empty()) failure = "block " + std::to_string(block->index) + ", thread " + std::to_string(self->index) + ": " + what;
  for (;;) leave();  // never chosen again
}

void perhaps_switch() {
  if (draw() % SWITCH_ONE_IN == 0) {
    block->ready.push_back(self->index);
    leave();
  }
}

void wait_for(const char* what, Where at) {
  self->waits_for = what, self->at = at;
  leave();
  self->waits_for = nullptr;
}

void release(uint32_t thread) { block->ready.push_back(thread); }

void join(const std::vector<uint32_t>& threads) {
  std::vector<uint32_t> all(block->fibers.size(), 0);
  for (uint32_t t : threads)
    for (size_t i = 0; i < all.size(); ++i)
      if (block->fibers[t].clock[i] > all[i]) all[i] = block->fibers[t].clock[i];
  for (uint32_t t : threads) {
    block->fibers[t].clock = all;
    block->fibers[t].clock[t] += 1;
  }
}

// All lanes of the warp come with an operand; the last one runs `act` on them.
template <typename Act>
void meet(const char* what, Where at, void* operand, Act act) {
  const uint32_t warp = self->index / LANES, lane = self->index % LANES;
  Meeting& m = block->meetings[warp];
  if (m.arrived == 0) {
    m.what = what, m.at = at;
  } else if (m.what != what || m.at.line != at.line || m.at.file != at.file) {  // literals: one address each
    fail(std::string("the lanes of a warp part: ") + m.what + " at " + text(m.at) + " and " + what + " at " + text(at));
  }
  m.operand[lane] = operand;
  if (++m.arrived < LANES) return wait_for(what, at);
  act(m.operand);
  m.arrived = 0;
  for (uint32_t l = 0; l < LANES; ++l)
    if (l != lane) release(warp * LANES + l);
}

[[noreturn]] void fail_order(const Fiber& who, const Cell& c, bool writing, uint32_t byte, Where at) {
  const std::string access = (writing ? "write of shared byte " : "read of shared byte ") + std::to_string(byte) + " at " + text(at);
  if (c.under_way) fail(access + " while the copy asked for at " + text(c.at) + " is under way");
  if (c.writer >= 0 && who.clock[c.writer] < c.clock)
    fail("race: " + access + " and write by thread " + std::to_string(c.writer) + " at " + text(c.at) + ", no barrier between");
  fail("race: " + access + " and a read, no barrier between (last read at " + text(c.last_read) + ")");
}

void check_order(const Fiber& who, const Cell& c, bool writing, uint32_t byte, Where at) {
  if (c.under_way || (c.writer >= 0 && who.clock[c.writer] < c.clock)) fail_order(who, c, writing, byte, at);
  if (!writing || !c.read) return;
  const uint32_t threads = uint32_t(block->fibers.size());
  const uint32_t* reads = read_clocks.data() + size_t(byte / CELL) * threads;
  const uint32_t* known = who.clock.data();
  uint32_t unordered = 0;
  for (uint32_t t = 0; t < threads; ++t) unordered |= uint32_t(reads[t] > known[t]);
  if (unordered) fail_order(who, c, writing, byte, at);
}

void check_shared(uint32_t byte, uint32_t bytes, Where at) {
  if (byte % (bytes < 16 ? bytes : 16)) fail("shared byte " + std::to_string(byte) + " at " + text(at) + " is not aligned to " + std::to_string(bytes));
  if (uint64_t(byte) + bytes > block->shared.size())
    fail("shared byte " + std::to_string(byte + bytes - 1) + " at " + text(at) + ", only " + std::to_string(block->shared.size()) + " are there");
}

void check_aligned(const void* p, uint32_t bytes, Where at) {
  if (reinterpret_cast<uint64_t>(p) % bytes) fail("global address at " + text(at) + " is not aligned to " + std::to_string(bytes) + " bytes");
}

void check_global(const void* p, uint32_t bytes, bool writing, Where at) {
  const uint64_t a = reinterpret_cast<uint64_t>(p);
  for (uint32_t i = 0; i < span_count; ++i)
    if (a >= spans[i].begin && a + bytes <= spans[i].begin + spans[i].bytes) {
      if (writing && !spans[i].writable) fail("write to an input, tensor " + std::to_string(i) + ", at " + text(at));
      return;
    }
  fail(std::string(writing ? "write" : "read") + " of " + std::to_string(bytes) + " global bytes outside every tensor, at " + text(at));
}

void check_read(const Fiber& who, uint32_t byte, Where at) { check_order(who, block->cells[byte / CELL], false, byte, at); }

void record_read(const Fiber& who, uint32_t byte, uint32_t bytes, Where at) {
  for (uint32_t i = byte / CELL; i < (byte + bytes + CELL - 1) / CELL; ++i) {
    Cell& c = block->cells[i];
    check_order(who, c, false, i * CELL, at);
    if (c.writer < 0) fail("read of shared byte " + std::to_string(i * CELL) + " at " + text(at) + ", which nothing was written to");
    uint32_t* reads = read_clocks.data() + size_t(i) * block->fibers.size();
    if (!c.read) std::fill(reads, reads + block->fibers.size(), 0u);
    reads[who.index] = who.clock[who.index];
    c.read = true, c.last_read = at;
  }
}

void record_write(uint32_t byte, uint32_t bytes, bool under_way, Where at) {
  for (uint32_t i = byte / CELL; i < (byte + bytes + CELL - 1) / CELL; ++i) {
    Cell& c = block->cells[i];
    check_order(*self, c, true, i * CELL, at);
    c.writer = int32_t(self->index), c.clock = self->clock[self->index], c.at = at, c.under_way = under_way;
    c.read = false;
  }
}

uint64_t launch_thread() { return uint64_t(block->index) * block->fibers.size() + self->index; }

void trampoline() {
  kernel(parameters);
  if (!self->copies.empty()) fail("ends while the copy asked for at " + text(self->copies[0].at) + " is under way");
  self->done = true;
  for (;;) leave();
}

void start(Fiber& f, uint8_t* stack) {
  uint64_t* top = reinterpret_cast<uint64_t*>(stack + STACK);
#if defined(__x86_64__)
  *--top = 0;                                               // keeps the stack aligned as a call would
  *--top = reinterpret_cast<uint64_t>(&trampoline);
  for (int i = 0; i < 6; ++i) *--top = 0;
#else
  top -= 20;
  std::memset(top, 0, 160);
  top[11] = reinterpret_cast<uint64_t>(&trampoline);        // x30
#endif
  f.sp = top;
}

void run_block() {
  Block& b = *block;
  while (failure.empty()) {
    if (b.ready.empty()) break;
    const size_t pick = draw() % b.ready.size();
    const uint32_t t = b.ready[pick];
    b.ready[pick] = b.ready.back(), b.ready.pop_back();
    self = &b.fibers[t];
    vk_switch(&scheduler_sp, self->sp);
  }
  if (!failure.empty()) return;
  for (Fiber& f : b.fibers)
    if (!f.done) {
      self = &f;
      failure = "block " + std::to_string(b.index) + ": thread " + std::to_string(f.index) + " waits for ever for " +
                (f.waits_for ? f.waits_for : "nothing") + " at " + text(f.at);
      return;
    }
}

}  // namespace

uint32_t thread_index() { return self->index; }
uint32_t thread_count() { return uint32_t(block->fibers.size()); }
uint32_t block_index() { return block->index; }

void read_global(void* to, const void* from, uint32_t bytes, Where at) {
  check_aligned(from, bytes, at);
  check_global(from, bytes, false, at);
  for (uint64_t a = reinterpret_cast<uint64_t>(from) / 2; a <= (reinterpret_cast<uint64_t>(from) + bytes - 1) / 2; ++a) {
    const auto w = writers.find(a);
    if (w != writers.end() && w->second != launch_thread()) fail("read of global memory that another thread wrote, at " + text(at));
  }
  std::memcpy(to, from, bytes);
}

void write_global(void* to, const void* from, uint32_t bytes, Where at) {
  check_aligned(to, bytes, at);
  check_global(to, bytes, true, at);
  for (uint64_t a = reinterpret_cast<uint64_t>(to) / 2; a <= (reinterpret_cast<uint64_t>(to) + bytes - 1) / 2; ++a) {
    const auto w = writers.emplace(a, launch_thread());
    if (!w.second && w.first->second != launch_thread()) fail("two threads write one global address, at " + text(at));
  }
  std::memcpy(to, from, bytes);
}

void read_shared(void* to, uint32_t from, uint32_t bytes, Where at) {
  perhaps_switch();
  check_shared(from, bytes, at);
  record_read(*self, from, bytes, at);
  std::memcpy(to, block->shared.data() + from, bytes);
}

void write_shared(uint32_t to, const void* from, uint32_t bytes, Where at) {
  perhaps_switch();
  check_shared(to, bytes, at);
  record_write(to, bytes, false, at);
  std::memcpy(block->shared.data() + to, from, bytes);
}

void copy_async(uint32_t to, const void* from, uint32_t bytes, Where at) {
  perhaps_switch();
  check_shared(to, 16, at);
  if (bytes > 16) fail("copy of " + std::to_string(bytes) + " bytes at " + text(at) + ", expected 0 to 16");
  if (bytes) {
    check_aligned(from, 16, at);
    check_global(from, bytes, false, at);
  }
  record_write(to, 16, true, at);
  std::memset(block->shared.data() + to, 0xff, 16);
  self->copies.push_back({to, bytes, self->group, static_cast<const uint8_t*>(from), at});
  ++counts.copies;
}

void copies_commit() { ++self->group; }

void copies_wait(int still) {
  std::vector<Copy> rest;
  for (const Copy& c : self->copies) {
    if (int64_t(c.group) >= int64_t(self->group) - still) {
      rest.push_back(c);
      continue;
    }
    uint8_t* to = block->shared.data() + c.to;
    std::memcpy(to, c.from, c.bytes);
    std::memset(to + c.bytes, 0, 16 - c.bytes);
    for (uint32_t i = c.to / CELL; i < (c.to + 16) / CELL; ++i) {
      Cell& cell = block->cells[i];
      cell.under_way = false, cell.writer = int32_t(self->index), cell.clock = self->clock[self->index], cell.at = c.at;
    }
  }
  self->copies.swap(rest);
}

float shuffle_xor(float value, uint32_t mask, Where at) {
  struct Lane {
    float in, out;
    uint32_t mask;
  } mine{value, 0, mask};
  meet("shfl.sync.bfly", at, &mine, [](void** lanes) {
    for (uint32_t l = 0; l < LANES; ++l) {
      Lane& lane = *static_cast<Lane*>(lanes[l]);
      lane.out = static_cast<Lane*>(lanes[(l ^ lane.mask) % LANES])->in;
    }
  });
  return mine.out;
}

uint32_t ballot(bool value, Where at) {
  struct Lane {
    bool in;
    uint32_t out;
  } mine{value, 0};
  meet("vote.sync.ballot", at, &mine, [](void** lanes) {
    uint32_t bits = 0;
    for (uint32_t l = 0; l < LANES; ++l) bits |= uint32_t(static_cast<Lane*>(lanes[l])->in) << l;
    for (uint32_t l = 0; l < LANES; ++l) static_cast<Lane*>(lanes[l])->out = bits;
  });
  return mine.out;
}

void warp_barrier(Where at) {
  meet("bar.warp.sync", at, nullptr, [](void**) {
    std::vector<uint32_t> lanes;
    for (uint32_t l = 0; l < LANES; ++l) lanes.push_back(self->index / LANES * LANES + l);
    join(lanes);
  });
}

void barrier(uint32_t id, uint32_t threads, Where at) {
  if (id >= BARRIERS) fail("barrier " + std::to_string(id) + " at " + text(at) + ", expected 0 to 15");
  if (threads % LANES || threads == 0 || threads > block->fibers.size())
    fail("barrier for " + std::to_string(threads) + " threads at " + text(at) + ", expected a multiple of 32 up to the block");
  Barrier& b = block->barriers[id];
  if (b.arrived.empty()) {
    b.expected = threads, b.at = at;
  } else if (b.expected != threads) {
    fail("barrier " + std::to_string(id) + " named for " + std::to_string(b.expected) + " threads at " + text(b.at) + " and for " +
         std::to_string(threads) + " at " + text(at));
  }
  b.arrived.push_back(self->index);
  if (b.arrived.size() < threads) return wait_for("barrier.sync", at);
  join(b.arrived);
  for (uint32_t t : b.arrived)
    if (t != self->index) release(t);
  b.arrived.clear();
  ++counts.barriers;
}

void load_matrices(uint32_t (&w)[4], uint32_t row, bool transposed, Where at) {
  check_shared(row, 16, at);
  struct Lane {
    uint32_t* w;
    uint32_t row;
    bool transposed;
  } mine{w, row, transposed};
  meet(transposed ? "ldmatrix.trans" : "ldmatrix", at, &mine, [at](void** lanes) {
    for (uint32_t m = 0; m < 4; ++m) {
      uint16_t matrix[8][8];
      for (uint32_t r = 0; r < 8; ++r) {
        const uint32_t from = static_cast<Lane*>(lanes[8 * m + r])->row;
        record_read(block->fibers[self->index / LANES * LANES + 8 * m + r], from, 16, at);
        std::memcpy(matrix[r], block->shared.data() + from, 16);
      }
      for (uint32_t l = 0; l < LANES; ++l) {
        const uint32_t r = l / 4, c = l % 4 * 2;
        const Lane& lane = *static_cast<Lane*>(lanes[l]);
        // The manual does not say who reads, whoever gives an address or whoever receives: what is read must have been written before
        // either, and, kept for the former, has to be read before it is written anew.
        const Fiber& who = block->fibers[self->index / LANES * LANES + l];
        const auto address = [&](uint32_t row) { return static_cast<Lane*>(lanes[8 * m + row])->row; };
        if (lane.transposed) {
          check_read(who, address(c) + 2 * r, at), check_read(who, address(c + 1) + 2 * r, at);
        } else {
          check_read(who, address(r) + 2 * c, at), check_read(who, address(r) + 2 * c + 2, at);
        }
        const uint16_t low = lane.transposed ? matrix[c][r] : matrix[r][c], high = lane.transposed ? matrix[c + 1][r] : matrix[r][c + 1];
        lane.w[m] = low | uint32_t(high) << 16;
      }
    }
    ++counts.matrix_loads;
  });
}

void multiply_add(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], bool bfloat, Where at) {
  struct Lane {
    float* c;
    const uint32_t *a, *b;
    bool bfloat;
  } mine{c, a, b, bfloat};
  meet("mma.sync", at, &mine, [](void** lanes) {
    const bool bf = static_cast<Lane*>(lanes[0])->bfloat;
    static const std::vector<float> halves = [] {
      std::vector<float> table(65536);
      for (uint32_t h = 0; h < 65536; ++h) table[h] = widen_f16(uint16_t(h));
      return table;
    }();
    const auto widen = [bf](uint32_t half) { return bf ? float_of(half << 16) : halves[half]; };
    float A[16][16], B[16][8];
    double D[16][8] = {};
    for (uint32_t l = 0; l < LANES; ++l) {
      const Lane& lane = *static_cast<Lane*>(lanes[l]);
      const uint32_t g = l / 4, t = l % 4;
      for (uint32_t i = 0; i < 4; ++i)
        for (uint32_t h = 0; h < 2; ++h) A[g + (i & 1) * 8][2 * t + h + (i >> 1) * 8] = widen(lane.a[i] >> (16 * h) & 0xffff);
      for (uint32_t i = 0; i < 2; ++i)
        for (uint32_t h = 0; h < 2; ++h) B[2 * t + h + i * 8][g] = widen(lane.b[i] >> (16 * h) & 0xffff);
    }
    for (uint32_t row = 0; row < 16; ++row)
      for (uint32_t k = 0; k < 16; ++k)
        for (uint32_t column = 0; column < 8; ++column) D[row][column] += double(A[row][k]) * double(B[k][column]);
    for (uint32_t l = 0; l < LANES; ++l) {
      const Lane& lane = *static_cast<Lane*>(lanes[l]);
      for (uint32_t i = 0; i < 4; ++i) {
        const uint32_t row = l / 4 + (i >> 1) * 8, column = l % 4 * 2 + (i & 1);
        lane.c[i] = float(lane.c[i] + D[row][column]);
      }
    }
    ++counts.products;
  });
}

uint16_t round_bf16(float f) {
  const uint32_t u = bits_of(f);
  if (f != f) return 0x7fff;
  return uint16_t((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

uint16_t round_f16(float f) {
  const uint32_t u = bits_of(f), sign = u >> 16 & 0x8000, magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7fff;
  if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x33000001) return uint16_t(sign);            // rounds to zero
  const int exponent = int(magnitude >> 23) - 127;
  const uint32_t mantissa = (magnitude & 0x7fffff) | 0x800000;
  const int shift = exponent < -14 ? 13 + (-14 - exponent) : 13;
  const uint32_t kept = mantissa >> shift, rest = mantissa & ((1u << shift) - 1), half = 1u << (shift - 1);
  const uint32_t rounded = kept + (rest > half || (rest == half && (kept & 1)));
  // Normal numbers: the hidden bit adds one to the exponent field; a carry does the right thing in both cases.
  return uint16_t(sign | (exponent < -14 ? rounded : rounded + (uint32_t(exponent + 14) << 10)));
}

float widen_f16(uint16_t h) {
  const uint32_t sign = uint32_t(h & 0x8000) << 16, exponent = h >> 10 & 0x1f, mantissa = h & 0x3ff;
  if (exponent == 31) return float_of(sign | 0x7f800000 | mantissa << 13);
  if (exponent) return float_of(sign | (exponent + 112) << 23 | mantissa << 13);
  return (sign ? -1.0f : 1.0f) * float(mantissa) * 0x1p-24f;
}

}  // namespace model
}  // namespace vk

// Run `blocks` blocks of `threads` fibers of a kernel. spans: the tensors, as (begin, bytes, writable). Returns 0, or 1 with the first
// error's text in `message`. counted: products, matrix loads, copies, barriers.
extern "C" int vk_run(void (*thread)(const void*), const void* given, uint32_t blocks, uint32_t threads, uint32_t shared_bytes,
                      const uint64_t* tensors, uint32_t tensor_count, uint64_t seed, char* message, uint64_t length, uint64_t* counted) {
  using namespace vk::model;
  if (stacks_for < threads) {
    if (stacks) munmap(stacks, STACK * stacks_for);
    stacks = static_cast<uint8_t*>(mmap(nullptr, STACK * threads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    stacks_for = threads;
  }
  kernel = thread, parameters = given, random_state = seed * 2 + 0x9E3779B97F4A7C15ull;
  spans = reinterpret_cast<const Span*>(tensors), span_count = tensor_count;
  failure.clear(), writers.clear(), counts = {};
  for (uint32_t n = 0; n < blocks && failure.empty(); ++n) {
    Block b;
    b.index = n;
    b.fibers.resize(threads), b.meetings.resize(threads / LANES);
    b.cells.resize((shared_bytes + CELL - 1) / CELL), b.shared.assign(shared_bytes, 0xff), read_clocks.resize(std::max(read_clocks.size(), b.cells.size() * threads));
    for (uint32_t t = 0; t < threads; ++t) {
      b.fibers[t].index = t;
      b.fibers[t].clock.assign(threads, 0);
      b.fibers[t].clock[t] = 1;
      start(b.fibers[t], stacks + STACK * t);
      b.ready.push_back(t);
    }
    block = &b;
    run_block();
  }
  std::snprintf(message, length, "%s", failure.c_str());
  std::memcpy(counted, &counts, sizeof counts);
  return failure.empty() ? 0 : 1;
}
