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
//
// This file holds the scheduler and what is known by whom; executor_memory.cpp memory, executor_warp.cpp what warps do together,
// executor_async.cpp barriers in shared memory, clusters and registers, executor_boxes.cpp copies of boxes, executor_warpgroup.cpp the
// products of warpgroups. The blocks of a cluster run together.
#include "executor_state.h"

#include <sys/mman.h>

#include <cstdio>

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

Cluster* cluster;
Fiber* self;
Counts counts;
std::string failure;

namespace {

constexpr size_t STACK = 256 << 10;
constexpr int SWITCH_ONE_IN = 16;  // memory accesses

void* scheduler_sp;
uint8_t* stacks;
uint32_t stacks_for;
void (*kernel)(const void*);
const void* parameters;
uint64_t random_state;
uint64_t box_one_in;  // how eagerly copies of boxes end while threads can run

void trampoline() {
  kernel(parameters);
  if (!self->copies.empty()) fail("ends while the copy asked for at " + text(self->copies[0].at) + " is under way");
  check_products();
  self->done = true;
  self->block->running -= 1;
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

std::string waiting(const Fiber& f) {
  std::string what = std::string(f.waits_for ? f.waits_for : "nothing") + " at " + text(f.at);
  if (const MemoryBarrier* b = f.waits_at)
    what += " (shared byte " + std::to_string(b->byte) + " of block " + std::to_string(b->rank) + " of the cluster, made at " +
            text(b->made) + " for " + std::to_string(b->made_for) + "; " + std::to_string(b->phase) + " phases have ended, this one lacks " +
            std::to_string(b->arrivals) + " arrivals and " + std::to_string(b->bytes) + " bytes)";
  return what;
}

// Nobody can go on: who waits for what, each thing once.
void tell_deadlock() {
  std::string all;
  std::vector<std::string> told;
  for (Fiber& f : cluster->fibers) {
    if (f.done) continue;
    const std::string what = waiting(f);
    if (std::find(told.begin(), told.end(), what) != told.end()) continue;
    if (told.empty()) self = &f;
    all += (told.empty() ? "waits for ever for " : "; thread " + std::to_string(f.index) + " for ") + what;
    told.push_back(what);
    if (told.size() == 6) break;
  }
  if (!told.empty()) tell(all);
}

void run_cluster() {
  Cluster& c = *cluster;
  while (failure.empty()) {
    if (!c.boxes.empty() && (c.ready.empty() || draw() % box_one_in == 0)) {
      finish_a_box();
      continue;
    }
    if (c.ready.empty()) break;
    const size_t pick = draw() % c.ready.size();
    const uint32_t t = c.ready[pick];
    c.ready[pick] = c.ready.back(), c.ready.pop_back();
    self = &c.fibers[t];
    vk_switch(&scheduler_sp, self->sp);
  }
  if (failure.empty()) tell_deadlock();
  if (failure.empty()) check_ends();
  drop_boxes();
  drop_products();
}

// What kernels that wait much spend most of their time on.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target_clones("arch=haswell", "default")))
#endif
void take_greatest(uint32_t* mine, const uint32_t* other, size_t n) {
  for (size_t i = 0; i < n; ++i) mine[i] = mine[i] < other[i] ? other[i] : mine[i];
}

void raise(std::vector<uint32_t>& mine, const std::vector<uint32_t>& other) {
  if (mine.size() < other.size()) mine.resize(other.size(), 0);
  take_greatest(mine.data(), other.data(), other.size());
}

// Of what `mine` and `other` have in common, the least.
void lower(std::vector<uint32_t>& mine, const std::vector<uint32_t>& other) {
  if (mine.size() > other.size()) mine.resize(other.size());
  for (size_t i = 0; i < mine.size(); ++i) mine[i] = std::min(mine[i], other[i]);
}

}  // namespace

// ---- telling

std::string text(Where at) {
  const char* name = std::strrchr(at.file, '/');
  return std::string(name ? name + 1 : at.file) + ":" + std::to_string(at.line);
}

namespace {
std::vector<Where> sites(1, Where{"nowhere", 0});
}
Where where(uint16_t site) { return sites[site]; }
uint16_t site(Where at) {
  static struct {
    Where at{};
    uint16_t site = 0;
  } last[256];
  auto& slot = last[(reinterpret_cast<uint64_t>(at.file) / 8 + uint32_t(at.line)) % 256];
  if (slot.at.file != at.file || slot.at.line != at.line) {
    size_t i = 1;
    while (i < sites.size() && (sites[i].file != at.file || sites[i].line != at.line)) ++i;
    if (i == sites.size()) sites.push_back(at);
    slot.at = at, slot.site = uint16_t(i);
  }
  return slot.site;
}

void tell(const std::string& what) {
  if (!failure.empty()) return;
  failure = "block " + std::to_string(self->block->index) + ", thread " + std::to_string(self->index) + ": " + what;
}
void fail(const std::string& what) {
  tell(what);
  for (;;) leave();  // never chosen again
}

// ---- scheduling

uint64_t draw() {
  random_state ^= random_state << 13, random_state ^= random_state >> 7, random_state ^= random_state << 17;
  return random_state;
}
void leave() { vk_switch(&self->sp, scheduler_sp); }
void perhaps_switch() {
  if (draw() % SWITCH_ONE_IN == 0) {
    cluster->ready.push_back(self->agent);
    leave();
  }
}
void wait_for(const char* what, Where at) {
  self->waits_for = what, self->at = at;
  leave();
  self->waits_for = nullptr;
}
void release(uint32_t agent) { cluster->ready.push_back(agent); }

// ---- knowledge

void Known::join(const Known& other) {
  raise(seen, other.seen);
  if (!other.fenced.empty()) raise(fenced, other.fenced);
  if (!other.over.empty()) raise(over, other.over);
}
uint32_t new_agent() { return cluster->agents++; }
void tick(Fiber& f) { f.known.seen[f.agent] += 1, f.changes += 1; }
void learn(Fiber& f, const Known& known) { f.known.join(known), f.changes += 1; }
void learn(Fiber& f, uint32_t agent, uint32_t time) {
  if (f.known.seen.size() <= agent) f.known.seen.resize(agent + 1, 0);
  f.known.seen[agent] = std::max(f.known.seen[agent], time), f.changes += 1;
}
void join(const std::vector<uint32_t>& fibers) {
  Known all;
  for (uint32_t t : fibers) all.join(cluster->fibers[t].known);
  for (uint32_t t : fibers) {
    Fiber& f = cluster->fibers[t];
    f.known = all;
    tick(f);
  }
}
const Known& known_by_warp() {
  Warp& warp = own_warp();
  const Fiber* lanes = self - self->index % LANES;
  uint64_t changes = 0;  // of each lane, which only grow
  for (uint32_t l = 0; l < LANES; ++l) changes += lanes[l].changes;
  if (changes != warp.changes) {
    warp.changes = changes, warp.known = lanes[0].known;
    for (uint32_t l = 1; l < LANES; ++l) lower(warp.known.seen, lanes[l].known.seen), lower(warp.known.fenced, lanes[l].known.fenced);
  }
  return warp.known;
}
uint32_t warp_agent() {
  Warp& warp = own_warp();
  if (warp.agent < 0) warp.agent = new_agent();
  return uint32_t(warp.agent);
}

uint32_t thread_index() { return self->index; }
uint32_t thread_count() { return cluster->threads; }
uint32_t block_index() { return self->block->index; }
uint32_t cluster_rank() { return self->block->rank; }

void barrier(uint32_t id, uint32_t threads, Where at) {
  if (id >= BARRIERS) fail("barrier " + std::to_string(id) + " at " + text(at) + ", expected 0 to 15");
  if (threads % LANES || threads == 0 || threads > cluster->threads)
    fail("barrier for " + std::to_string(threads) + " threads at " + text(at) + ", expected a multiple of 32 up to the block");
  Barrier& b = self->block->barriers[id];
  if (b.arrived.empty()) {
    b.expected = threads, b.at = at;
  } else if (b.expected != threads) {
    fail("barrier " + std::to_string(id) + " named for " + std::to_string(b.expected) + " threads at " + text(b.at) + " and for " +
         std::to_string(threads) + " at " + text(at));
  }
  b.arrived.push_back(self->agent);
  if (b.arrived.size() < threads) return wait_for("barrier.sync", at);
  join(b.arrived);
  for (uint32_t t : b.arrived)
    if (t != self->agent) release(t);
  b.arrived.clear();
  ++counts.barriers;
}

}  // namespace model
}  // namespace vk

// Run `blocks` blocks of `threads` fibers of a kernel, in clusters of `per_cluster`. tensors: those it may touch, as (begin, bytes, writable).
// Returns 0, or 1 with the first error's text in `message`. counted: a Counts.
extern "C" int vk_run(void (*thread)(const void*), const void* given, uint32_t blocks, uint32_t threads, uint32_t per_cluster,
                      uint32_t shared_bytes, const uint64_t* tensors, uint32_t tensor_count, uint64_t seed, char* message,
                      uint64_t length, uint64_t* counted) {
  using namespace vk::model;
  const uint32_t fibers = threads * per_cluster;
  if (stacks_for < fibers) {
    if (stacks) munmap(stacks, STACK * stacks_for);
    constexpr int HOW = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    stacks = static_cast<uint8_t*>(mmap(nullptr, STACK * fibers, PROT_READ | PROT_WRITE, HOW, -1, 0));
    stacks_for = fibers;
  }
  kernel = thread, parameters = given, random_state = seed * 2 + 0x9E3779B97F4A7C15ull;
  constexpr uint64_t ONE_IN[] = {3, 40, 1000, 1ull << 62};  // the last: only when no thread can go on
  box_one_in = ONE_IN[seed * 0x9E3779B97F4A7C15ull >> 62];
  failure.clear(), counts = {};
  begin_launch(tensors, tensor_count);
  for (uint32_t n = 0; n < blocks && failure.empty(); n += per_cluster) {
    Cluster c;
    cluster = &c;
    begin_cluster();
    c.threads = threads, c.agents = fibers;
    c.fibers.resize(fibers), c.blocks.resize(per_cluster);
    for (uint32_t rank = 0; rank < per_cluster; ++rank) {
      Block& b = c.blocks[rank];
      b.index = n + rank, b.rank = rank, b.running = threads;
      b.warp_meetings.resize(threads / LANES), b.group_meetings.resize(threads / GROUP), b.warps.resize(threads / LANES);
      b.chunks.resize((shared_bytes + CHUNK_BYTES - 1) / CHUNK_BYTES), b.bytes.assign(shared_bytes, 0xff);
      set_up_registers(b);
      for (uint32_t t = 0; t < threads; ++t) {
        Fiber& f = c.fibers[rank * threads + t];
        f.block = &b, f.index = t, f.agent = rank * threads + t;
        f.known.seen.assign(fibers, 0);
        f.known.seen[f.agent] = 1;
        f.remote.resize(per_cluster);
        start(f, stacks + STACK * f.agent);
        c.ready.push_back(f.agent);
      }
    }
    run_cluster();
  }
  std::snprintf(message, length, "%s", failure.c_str());
  std::memcpy(counted, &counts, sizeof counts);
  return failure.empty() ? 0 : 1;
}
