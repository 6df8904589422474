// Barriers in shared memory, the fence between generic and asynchronous accesses, clusters, and how warpgroups share registers (PTX ISA 8.x):
//
// * mbarrier ("Parallel Synchronization and Communication Instructions: mbarrier"): a phase ends when its arrivals have come and its count of
//   bytes is zero. Whoever waits for a phase sees what was done before the arrivals of that phase, and the bytes that it counted. A wait for a
//   parity returns when the current phase has the other one ("test_wait / try_wait": the phase before the current one has ended).
// * Here a barrier is used only by those who are ordered behind its making and mbarriers_made(). Who arrives, or asks for a copy, knows that
//   the phase before has ended: else it could count for that one, which is what too many arrivals do. Within a cluster a copy that ends tells
//   as much as the one that asked for it knew: what had ended then has ended now, though nothing else is made visible.
// * fence.proxy.async ("Memory Consistency Model: Proxies"): without one on the way, asynchronous accesses do not see what threads wrote.
// * setmaxnreg: a block begins with the registers per thread that 65,536 of them give, in steps of 8 and at most 255 (what
//   __launch_bounds__(threads) leaves the compiler; 168 for 384 threads). What a warpgroup gives back goes to the block's pool, from which
//   others take, waiting until there is enough.
#include "executor_state.h"

namespace vk {
namespace model {
namespace {

constexpr int64_t MOST_BYTES = (1 << 20) - 1;  // "mbarrier: Contents": the range of a phase's count
constexpr int REGISTERS = 65536, FEWEST = 24, MOST = 256;

std::string made(const MemoryBarrier& b) {
  return "the barrier at shared byte " + std::to_string(b.byte) + ", made at " + text(b.made) + " for " + std::to_string(b.made_for) +
         (b.made_for == 1 ? " arrival" : " arrivals");
}

void check_barrier_address(uint32_t byte, Where at) {
  if (byte % 8) fail("barrier at shared byte " + std::to_string(byte) + " at " + text(at) + ", expected a multiple of 8");
  check_shared(byte, 8, at);
}

}  // namespace

MemoryBarrier& barrier_at(Block& there, uint32_t byte, const char* use, Where at) {
  check_barrier_address(byte, at);
  const auto found = there.memory_barriers.find(byte);
  const std::string here = std::string(use) + " at " + text(at) + " of the barrier at shared byte " + std::to_string(byte);
  if (found == there.memory_barriers.end()) fail(here + " of block " + std::to_string(there.rank) + ", where none was made");
  MemoryBarrier& b = found->second;
  if (!b.known_from) fail(here + ", made at " + text(b.made) + ": mbarriers_made() has not been called");
  if (!self->known.sees(b.maker, b.known_from))
    fail(here + ", made at " + text(b.made) + ": no barrier of the block or the cluster between mbarriers_made() and this");
  return b;
}

void check_phase(const MemoryBarrier& b, const char* use, Where at) {
  if (b.phase && !self->known.knows_over(b.agent, b.phase))
    fail(std::string(use) + " at " + text(at) + " may count for the phase before, of which this thread does not know that it has ended (" +
         std::to_string(b.phase) + " have): " + made(b));
}

void end_phase_if_due(MemoryBarrier& b, const std::string& why) {
  if (b.arrivals || b.bytes > 0) return;
  if (b.bytes < 0) return tell(why + ": " + std::to_string(-b.bytes) + " bytes more than it was told to expect came to " + made(b));
  if (b.under_way)
    return tell(why + ": a phase ends while a copy asked for in it is under way, whose bytes it was not told to expect: " + made(b));
  b.phase += 1, b.arrivals = b.made_for;
  std::swap(b.ended, b.gathering);
  b.gathering = {};
  if (b.ended.seen.size() <= b.agent) b.ended.seen.resize(b.agent + 1, 0);
  b.ended.seen[b.agent] = b.phase;
  for (uint32_t t : b.waiting) release(t);
  b.waiting.clear();
}

void mbarrier_make(uint32_t byte, uint32_t arrivals, Where at) {
  perhaps_switch();
  check_barrier_address(byte, at);
  if (arrivals == 0 || arrivals > MOST_BYTES)
    fail("barrier for " + std::to_string(arrivals) + " arrivals at " + text(at) + ", expected 1 to " + std::to_string(MOST_BYTES));
  record_write(byte, 8, State::BARRIER, at);
  MemoryBarrier b{};
  b.byte = byte, b.rank = self->block->rank, b.made_for = arrivals, b.maker = self->agent, b.agent = new_agent(), b.made = at;
  b.arrivals = arrivals;
  self->block->memory_barriers.emplace(byte, std::move(b));
}

void mbarriers_made(Where) {
  for (auto& b : self->block->memory_barriers)
    if (b.second.maker == self->agent && !b.second.known_from) b.second.known_from = self->time();
  self->known.fenced = self->known.seen;
  tick(*self);
}

void mbarrier_arrive(uint32_t byte, uint32_t rank, uint32_t expected, Where at) {
  perhaps_switch();
  if (rank >= cluster->blocks.size())
    fail("arrival at " + text(at) + " in block " + std::to_string(rank) + " of a cluster of " + std::to_string(cluster->blocks.size()));
  MemoryBarrier& b = barrier_at(cluster->blocks[rank], byte, "arrival", at);
  check_phase(b, "arrival", at);
  if (b.arrivals == 0) fail("arrival at " + text(at) + ", one more than the phase waits for: " + made(b) + ", which still waits for bytes");
  b.bytes += expected;
  if (b.bytes > MOST_BYTES)
    fail("arrival at " + text(at) + ": " + std::to_string(b.bytes) + " bytes expected by " + made(b) + ", at most " +
         std::to_string(MOST_BYTES));
  b.arrivals -= 1;
  b.gathering.join(self->known);
  if (rank != self->block->rank) self->remote[rank] = {self->time(), at};
  tick(*self);
  end_phase_if_due(b, "arrival at " + text(at));
  if (!failure.empty()) fail(failure);
}

void mbarrier_wait(uint32_t byte, uint32_t parity, Where at) {
  perhaps_switch();
  if (parity > 1) fail("wait for parity " + std::to_string(parity) + " at " + text(at) + ", expected 0 or 1");
  MemoryBarrier& b = barrier_at(*self->block, byte, "wait", at);
  while ((b.phase & 1) == parity) {
    b.waiting.push_back(self->agent);
    self->waits_at = &b;
    wait_for(parity ? "the phase of parity 1 of a barrier" : "the phase of parity 0 of a barrier", at);
    self->waits_at = nullptr;
  }
  learn(*self, b.ended);
}

void async_fence(Where) {
  self->known.fenced = self->known.seen;
  tick(*self);
}

void cluster_barrier(Where at) {
  Barrier& b = cluster->barrier;
  if (b.arrived.empty()) b.at = at;
  b.arrived.push_back(self->agent);
  if (b.arrived.size() < cluster->fibers.size()) return wait_for("barrier.cluster", at);
  join(b.arrived);
  for (uint32_t t : b.arrived)
    if (t != self->agent) release(t);
  b.arrived.clear();
  ++counts.barriers;
}

void set_up_registers(Block& b) {
  const int each = std::min(255, REGISTERS / int(cluster->threads) / 8 * 8);
  b.registers.resize(cluster->threads / GROUP);
  for (Registers& r : b.registers) r.each = each;
}

void registers(int count, bool more, Where at) {
  const char* name = more ? "setmaxnreg.inc" : "setmaxnreg.dec";
  if (count < FEWEST || count > MOST || count % 8)
    fail(std::string(name) + " to " + std::to_string(count) + " at " + text(at) + ", expected a multiple of 8 from 24 to 256");
  meet<GROUP>(name, at, &count, [=](void** counts_of) {
    Registers& r = self->block->registers[self->index / GROUP];
    const Fiber* group = self - self->index % GROUP;
    for (uint32_t t = 0; t < GROUP; ++t)
      if (*static_cast<int*>(counts_of[t]) != count) fail(std::string(name) + " at " + text(at) + " to different counts in one warpgroup");
    for (uint32_t other = 0; other < r.since.size(); ++other)
      for (uint32_t t = 0; t < GROUP; ++t)
        if (!group[t].known.sees(group[other].agent, r.since[other]))
          fail(std::string(name) + " at " + text(at) + " after the one at " + text(r.at) + ", the warpgroup did not meet at a barrier between");
    if (more ? count < r.each : count > r.each)
      fail(std::string(name) + " to " + std::to_string(count) + " at " + text(at) + ", where each thread has " + std::to_string(r.each));
    r.at = at;
    r.since.clear();
    for (uint32_t t = 0; t < GROUP; ++t) {
      r.since.push_back(group[t].time());
      tick(cluster->fibers[group[t].agent]);
    }
    if (!more) {
      self->block->free_registers += int64_t(r.each - count) * GROUP, r.each = count;
      for (uint32_t t : self->block->wait_for_registers) release(t);
      self->block->wait_for_registers.clear();
    }
  });
  if (!more) return;
  // Whoever comes first of the warpgroup takes them for all of it.
  Registers& r = self->block->registers[self->index / GROUP];
  while (r.each < count && int64_t(count - r.each) * GROUP > self->block->free_registers) {
    self->block->wait_for_registers.push_back(self->agent);
    wait_for("enough registers, setmaxnreg.inc,", at);
  }
  if (r.each < count) self->block->free_registers -= int64_t(count - r.each) * GROUP, r.each = count;
}

}  // namespace model
}  // namespace vk
