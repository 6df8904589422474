// What the parts of the executor share: fibers, what each of them knows of, shared memory, and how a rule that was broken is told.
//
// Order is kept by vector clocks. An agent is whoever does something at a time of its own: each fiber of the cluster, and, made when needed,
// the products of a warp and the copies that a barrier counts. A write is remembered as (agent, time); who knows of that time of that agent
// comes after it. An agent that works asynchronously knows nothing itself: those who waited for it learn its time.
#pragma once
#include <algorithm>
#include <deque>
#include <map>
#include <string>
#include <vector>

#include "executor.h"

namespace vk {
namespace model {

constexpr uint32_t LANES = 32, GROUP = 128, BARRIERS = 16;
constexpr uint32_t CELL = 2, CHUNK_BYTES = 16;  // bytes of shared memory that are told apart, and that are mostly touched together

// ---- who knows what

struct Known {
  std::vector<uint32_t> seen;    // by agent: the time up to which it is known
  std::vector<uint32_t> fenced;  // the same, up to which asynchronous accesses see what fibers wrote; empty: nothing
  std::vector<uint32_t> over;    // the same, up to which phases of barriers have ended, for all that it does not make visible; may be empty
  void join(const Known& other);
  bool sees(uint32_t agent, uint32_t time) const { return agent < seen.size() && seen[agent] >= time; }
  bool knows_over(uint32_t agent, uint32_t time) const { return sees(agent, time) || (agent < over.size() && over[agent] >= time); }
  bool fences(uint32_t agent, uint32_t time) const { return agent < fenced.size() && fenced[agent] >= time; }
};

struct Copy {  // of cp.async
  uint32_t to, bytes, group;
  const uint8_t* from;
  Where at;
};
struct Remote {  // the last arrival at a barrier of another block
  uint32_t time = 0;
  Where at{};
};
struct Block;
struct MemoryBarrier;
struct Fiber {
  void* sp = nullptr;
  Block* block = nullptr;
  uint32_t index = 0, agent = 0;  // in the block; in the cluster, where fibers are the first agents
  bool done = false;
  const char* waits_for = nullptr;  // and at, and the barrier where it is one in shared memory
  Where at{};
  const MemoryBarrier* waits_at = nullptr;
  Known known;
  uint64_t changes = 0;  // of known
  std::vector<Copy> copies;
  uint32_t group = 0;
  std::vector<Remote> remote;  // by rank
  uint32_t time() const { return known.seen[agent]; }
};

// ---- shared memory

struct Reads {  // by agents first + l for each bit l, at a time of theirs
  uint32_t first = 0, lanes = 0, time = 0, next = 0;
};
enum class State : uint8_t { PLAIN, UNDER_WAY, BARRIER };  // an asynchronous copy into it; part of a barrier
struct Cell {
  int32_t writer = -1;  // agent; none yet
  uint32_t time = 0;
  State state = State::PLAIN;
  uint16_t at = 0, last_read = 0;  // sites; at: of the write, the copy, or the barrier's making
  Reads reads;                     // since it was written; more of them in a chain
};
struct Chunk {
  Cell whole;
  uint32_t parts = 0;  // where its cells are, once they were touched one by one
};

struct Meeting {  // of the lanes of a warp, or of a warpgroup
  const char* what = nullptr;
  Where at{};
  uint32_t arrived = 0;
  void* operand[GROUP];
};
struct Barrier {  // of the block: barrier.sync
  uint32_t expected = 0;
  Where at{};
  std::vector<uint32_t> arrived;
};
struct MemoryBarrier {  // of shared memory: mbarrier
  uint32_t byte, rank, made_for, maker, agent;
  Where made;
  uint32_t known_from = 0;  // the maker's time when it made it known; 0: not yet
  uint32_t phase = 0;       // phases that have ended
  int64_t arrivals = 0, bytes = 0;  // that this phase still waits for
  Known gathering, ended;           // by arrivals of this phase; of the last one that ended
  std::vector<uint32_t> waiting;
  uint32_t under_way = 0, last_copied = 0;  // copies; 1 + the phase of the last that ended
  Where last_copy{};
};
struct Warp {
  int64_t agent = -1;  // of its products; none yet
  uint64_t changes = ~0ull;
  Known known;  // of all lanes, at `changes`
};
struct Registers {  // of a warpgroup's threads
  int each = 0;
  std::vector<uint32_t> since;  // the threads' times when they last changed
  Where at{};
};
struct Block {
  uint32_t index = 0, rank = 0, running = 0;  // in the grid, in the cluster; fibers that have not ended
  std::vector<Chunk> chunks;
  std::vector<uint8_t> bytes;
  std::vector<Meeting> warp_meetings, group_meetings;
  std::vector<Warp> warps;
  Barrier barriers[BARRIERS];
  std::map<uint32_t, MemoryBarrier> memory_barriers;
  std::vector<Registers> registers;
  int64_t free_registers = 0;
  std::vector<uint32_t> wait_for_registers;
  uint32_t first() const;  // agent of thread 0
};
struct BoxCopy;
struct Cluster {
  uint32_t threads = 0, agents = 0;  // of a block; so far
  std::vector<Fiber> fibers;
  std::deque<Block> blocks;
  std::vector<uint32_t> ready;
  std::vector<BoxCopy*> boxes;  // under way
  Barrier barrier;
};
struct Counts {
  uint64_t products, matrix_loads, copies, barriers, boxes, warpgroup_products;
};

extern Cluster* cluster;
extern Fiber* self;  // who runs
extern Counts counts;
extern std::string failure;

inline uint32_t Block::first() const { return rank * cluster->threads; }
inline bool is_fiber(uint32_t agent) { return agent < cluster->fibers.size(); }

// ---- telling

std::string text(Where at);
uint16_t site(Where at);
Where where(uint16_t site);
void tell(const std::string& what);               // by `self`; the first is kept
[[noreturn]] void fail(const std::string& what);  // the same, and the fiber never goes on

// ---- scheduling

uint64_t draw();
void leave();  // to the scheduler
void perhaps_switch();
void wait_for(const char* what, Where at);  // until somebody releases this fiber
void release(uint32_t agent);

// ---- knowledge

uint32_t new_agent();
void tick(Fiber& f);                                    // what it does from now on is not what others learned of it
void learn(Fiber& f, const Known& known);
void learn(Fiber& f, uint32_t agent, uint32_t time);
void join(const std::vector<uint32_t>& fibers);         // a barrier: each knows what all knew
inline Warp& own_warp() { return self->block->warps[self->index / LANES]; }
const Known& known_by_warp();                           // what every lane of this fiber's warp knows
uint32_t warp_agent();                                  // the agent for the products of this fiber's warp

// ---- shared memory

// Aligned to `bytes`, at most to 16, and inside.
void check_shared(uint32_t byte, uint32_t bytes, Where at);
void check_read(const Fiber& who, uint32_t byte, Where at);
void record_read(const Fiber& who, uint32_t byte, uint32_t bytes, Where at);
void record_write(uint32_t byte, uint32_t bytes, State state, Where at);
// An asynchronous read by `agent`, finished for those who learn of `time` of it: what it reads was written, is known by `known` and, where a
// fiber wrote it, fenced.
void record_asynchronous_read(const Known& known, uint32_t agent, uint32_t time, uint32_t byte, uint32_t bytes, Where at);
// An asynchronous write asked for by this fiber into a block of the cluster begins: it comes after all reads and writes of those bytes.
// Ends: it was made by `agent` at `time`.
void begin_asynchronous_write(Block& there, uint32_t byte, uint32_t bytes, Where at);
void end_asynchronous_write(Block& there, uint32_t byte, uint32_t bytes, uint32_t agent, uint32_t time);

// ---- global memory

void check_aligned(const void* p, uint32_t bytes, Where at);
// Why `bytes` from p on may not be read now, or nothing.
std::string why_not_read(const void* p, uint64_t bytes);

// Of a launch, of a cluster's run.
void begin_launch(const uint64_t* tensors, uint32_t count);
void begin_cluster();

// ---- meetings

// All 32 lanes of the warp (LANES), or all 128 of the warpgroup (GROUP), come with an operand; the last one runs act(operands).
template <uint32_t COUNT = LANES, typename Act>
void meet(const char* what, Where at, void* operand, Act act) {
  static_assert(COUNT == LANES || COUNT == GROUP, "a warp or a warpgroup");
  const uint32_t of = self->index / COUNT, lane = self->index % COUNT;
  std::vector<Meeting>& all = COUNT == LANES ? self->block->warp_meetings : self->block->group_meetings;
  if (of >= all.size()) fail(std::string(what) + " at " + text(at) + " by a warp of an incomplete warpgroup");
  Meeting& m = all[of];
  if (m.arrived == 0) {
    m.what = what, m.at = at;
  } else if (m.what != what || m.at.line != at.line || m.at.file != at.file) {  // literals: one address each
    fail(std::string(COUNT == LANES ? "the lanes of a warp part: " : "the warps of a warpgroup part: ") + m.what + " at " + text(m.at) +
         " and " + what + " at " + text(at));
  }
  m.operand[lane] = operand;
  if (++m.arrived < COUNT) return wait_for(what, at);
  act(m.operand);
  m.arrived = 0;
  for (uint32_t l = 0; l < COUNT; ++l)
    if (l != lane) release(self->agent - lane + l);
}

// ---- products, for matrix instructions of any kind

// Every float16 pattern as float32.
const std::vector<float>& widened_halves();

// ---- barriers in shared memory: executor_async.cpp; messages say what uses one

MemoryBarrier& barrier_at(Block& there, uint32_t byte, const char* use, Where at);  // that this fiber knows to be made
void check_phase(const MemoryBarrier& b, const char* use, Where at);                // what this fiber does can only count for this phase
void end_phase_if_due(MemoryBarrier& b, const std::string& why);                    // may tell
void set_up_registers(Block& b);

// ---- copies of boxes: executor_boxes.cpp

void finish_a_box();
void check_ends();  // tells what is wrong with how the blocks ended
void drop_boxes();

// ---- products of warpgroups: executor_warpgroup.cpp

void check_products();  // by a thread that ends (the trampoline): its products were waited for
void drop_products();   // when a cluster has run

}  // namespace model
}  // namespace vk
