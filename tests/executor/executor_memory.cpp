// Global memory, shared memory and who touched it, and cp.async.
#include <unordered_map>

#include "executor_state.h"

namespace vk {
namespace model {
namespace {

struct Span {
  uint64_t begin, bytes, writable;
};
const Span* spans;
uint32_t span_count;
std::unordered_map<uint64_t, uint64_t> writers;  // of global memory: two-byte address -> thread of the launch
std::vector<Reads> more_reads(1);                // chains, from `next` on; 0 ends one
std::vector<uint32_t> free_reads;
struct Parts {
  Cell cells[CHUNK_BYTES / CELL];
};
std::deque<Parts> parts(1);  // of chunks
std::vector<uint32_t> free_parts;

uint64_t launch_thread() { return uint64_t(self->block->index) * cluster->threads + self->index; }

// Which tensor holds the bytes, or span_count.
uint32_t tensor_of(const void* p, uint64_t bytes) {
  const uint64_t a = reinterpret_cast<uint64_t>(p);
  for (uint32_t i = 0; i < span_count; ++i)
    if (a >= spans[i].begin && a + bytes <= spans[i].begin + spans[i].bytes) return i;
  return span_count;
}

void check_global(const void* p, uint32_t bytes, bool writing, Where at) {
  const uint32_t tensor = tensor_of(p, bytes);
  if (tensor == span_count)
    fail(std::string(writing ? "write" : "read") + " of " + std::to_string(bytes) + " global bytes outside every tensor, at " + text(at));
  if (writing && !spans[tensor].writable) fail("write to an input, tensor " + std::to_string(tensor) + ", at " + text(at));
}

std::string agent_name(uint32_t agent) {
  if (!is_fiber(agent)) return "a copy";
  return "thread " + std::to_string(agent % cluster->threads) +
         (cluster->blocks.size() > 1 ? " of block " + std::to_string(agent / cluster->threads) + " of the cluster" : "");
}

// Who reads or writes shared memory: whether asynchronously, and what it knows.
struct Access {
  const Known& known;
  bool writing, asynchronous;
};

[[noreturn]] void fail_order(const Access& a, const Cell& c, uint32_t byte, Where at) {
  const std::string access = std::string(a.asynchronous ? "asynchronous " : "") + (a.writing ? "write" : "read") + " of shared byte " +
                             std::to_string(byte) + " at " + text(at);
  if (c.state == State::UNDER_WAY) fail(access + " while the copy asked for at " + text(where(c.at)) + " is under way");
  if (c.state == State::BARRIER) fail(access + ", which belongs to the barrier made at " + text(where(c.at)));
  if (c.writer >= 0) {
    const std::string write = " and write by " + agent_name(uint32_t(c.writer)) + " at " + text(where(c.at));
    if (!a.known.sees(uint32_t(c.writer), c.time)) fail("race: " + access + write + ", no barrier between");
    if (a.asynchronous && is_fiber(uint32_t(c.writer)) && !a.known.fences(uint32_t(c.writer), c.time))
      fail("race: " + access + write + ", no async_fence between");
  }
  fail("race: " + access + " and a read, no barrier between (last read at " + text(where(c.last_read)) + ")");
}

bool ordered(const Known& known, const Reads& r) {
  if (r.lanes == ~0u && r.first + LANES <= known.seen.size()) {
    const uint32_t* seen = known.seen.data() + r.first;
    uint32_t unordered = 0;
    for (uint32_t l = 0; l < LANES; ++l) unordered |= uint32_t(seen[l] < r.time);
    return !unordered;
  }
  for (uint32_t lanes = r.lanes; lanes; lanes &= lanes - 1)
    if (!known.sees(r.first + uint32_t(__builtin_ctz(lanes)), r.time)) return false;
  return true;
}

inline void check_order(const Access& a, const Cell& c, uint32_t byte, Where at) {
  if (c.state != State::PLAIN) fail_order(a, c, byte, at);
  if (c.writer >= 0) {
    if (!a.known.sees(uint32_t(c.writer), c.time)) fail_order(a, c, byte, at);
    if (a.asynchronous && is_fiber(uint32_t(c.writer)) && !a.known.fences(uint32_t(c.writer), c.time)) fail_order(a, c, byte, at);
  }
  if (!a.writing) return;
  for (const Reads* r = &c.reads;; r = &more_reads[r->next]) {
    if (r->lanes && !ordered(a.known, *r)) fail_order(a, c, byte, at);
    if (!r->next) return;
  }
}

void note_read(Cell& c, uint32_t first, uint32_t lanes, uint32_t time) {
  Reads* r = &c.reads;
  for (;;) {
    if (r->first == first) {
      if (r->time == time) {
        r->lanes |= lanes;
        return;
      }
      r->lanes &= ~lanes;  // read again, later
    }
    if (!r->lanes) {
      r->first = first, r->lanes = lanes, r->time = time;
      return;
    }
    if (!r->next) break;
    r = &more_reads[r->next];
  }
  uint32_t next;
  if (free_reads.empty()) {
    next = uint32_t(more_reads.size());
    const size_t last = r == &c.reads ? 0 : size_t(r - more_reads.data());
    more_reads.emplace_back();
    if (last) r = &more_reads[last];
  } else {
    next = free_reads.back(), free_reads.pop_back();
  }
  more_reads[next] = {first, lanes, time, 0};
  r->next = next;
}

void forget_reads(Cell& c) {
  for (uint32_t n = c.reads.next; n; n = more_reads[n].next) free_reads.push_back(n);
  c.reads = {};
}

void split(Chunk& chunk) {
  if (free_parts.empty()) {
    chunk.parts = uint32_t(parts.size());
    parts.emplace_back();
  } else {
    chunk.parts = free_parts.back(), free_parts.pop_back();
  }
  for (Cell& c : parts[chunk.parts].cells) {
    c = chunk.whole;
    c.reads = {};
    for (Reads r = chunk.whole.reads;; r = more_reads[r.next]) {
      if (r.lanes) note_read(c, r.first, r.lanes, r.time);
      if (!r.next) break;
    }
  }
  forget_reads(chunk.whole);
}

// act(cell, its first byte) on all that the bytes touch; written: that makes them alike.
template <typename Act>
inline void each(Block& b, uint32_t byte, uint32_t bytes, bool written, Act act) {
  const uint32_t end = byte + bytes;
  for (uint32_t n = byte / CHUNK_BYTES, from = byte; from < end; ++n, from = n * CHUNK_BYTES) {
    Chunk& chunk = b.chunks[n];
    const uint32_t to = std::min(end, (n + 1) * CHUNK_BYTES);
    const bool all = to - from == CHUNK_BYTES;
    if (all && !chunk.parts) {
      act(chunk.whole, from);
      continue;
    }
    if (!chunk.parts) split(chunk);
    Cell* cells = parts[chunk.parts].cells;
    for (uint32_t i = from / CELL; i < (to + CELL - 1) / CELL; ++i) act(cells[i % (CHUNK_BYTES / CELL)], i * CELL);
    if (all && written) {
      chunk.whole = cells[0];
      free_parts.push_back(chunk.parts);
      chunk.parts = 0;
    }
  }
}

inline void read(const Access& a, uint32_t first, uint32_t lanes, uint32_t time, uint32_t byte, uint32_t bytes, Where at) {
  const uint16_t at_site = site(at);
  each(*self->block, byte, bytes, false, [&](Cell& c, uint32_t here) {
    check_order(a, c, here, at);
    if (c.writer < 0) fail("read of shared byte " + std::to_string(here) + " at " + text(at) + ", which nothing was written to");
    note_read(c, first, lanes, time);
    c.last_read = at_site;
  });
}

}  // namespace

void begin_launch(const uint64_t* tensors, uint32_t count) {
  spans = reinterpret_cast<const Span*>(tensors), span_count = count;
  writers.clear();
}
void begin_cluster() { more_reads.resize(1), free_reads.clear(), parts.resize(1), free_parts.clear(); }

void check_shared(uint32_t byte, uint32_t bytes, Where at) {
  if (byte % (bytes < 16 ? bytes : 16))
    fail("shared byte " + std::to_string(byte) + " at " + text(at) + " is not aligned to " + std::to_string(bytes));
  const size_t there = self->block->bytes.size();
  if (uint64_t(byte) + bytes > there)
    fail("shared byte " + std::to_string(byte + bytes - 1) + " at " + text(at) + ", only " + std::to_string(there) + " are there");
}

void check_aligned(const void* p, uint32_t bytes, Where at) {
  if (reinterpret_cast<uint64_t>(p) % bytes)
    fail("global address at " + text(at) + " is not aligned to " + std::to_string(bytes) + " bytes");
}

std::string why_not_read(const void* p, uint64_t bytes) {
  const uint32_t tensor = tensor_of(p, bytes);
  if (tensor == span_count) return "outside every tensor";
  if (!spans[tensor].writable || writers.empty()) return "";
  for (uint64_t a = reinterpret_cast<uint64_t>(p) / 2; a <= (reinterpret_cast<uint64_t>(p) + bytes - 1) / 2; ++a)
    if (writers.count(a)) return "that a thread of this launch wrote";
  return "";
}

void check_read(const Fiber& who, uint32_t byte, Where at) {
  const Chunk& chunk = self->block->chunks[byte / CHUNK_BYTES];
  check_order({who.known, false, false}, chunk.parts ? parts[chunk.parts].cells[byte % CHUNK_BYTES / CELL] : chunk.whole, byte, at);
}

void record_read(const Fiber& who, uint32_t byte, uint32_t bytes, Where at) {
  const uint32_t lane = who.agent % LANES;
  read({who.known, false, false}, who.agent - lane, 1u << lane, who.time(), byte, bytes, at);
}

void record_asynchronous_read(const Known& known, uint32_t agent, uint32_t time, uint32_t byte, uint32_t bytes, Where at) {
  read({known, false, true}, agent, 1, time, byte, bytes, at);
}

void record_write(uint32_t byte, uint32_t bytes, State state, Where at) {
  const uint16_t at_site = site(at);
  const uint32_t time = self->time();
  each(*self->block, byte, bytes, true, [&](Cell& c, uint32_t here) {
    check_order({self->known, true, false}, c, here, at);
    forget_reads(c);
    c.writer = int32_t(self->agent), c.time = time, c.at = at_site, c.state = state;
  });
}

void begin_asynchronous_write(Block& there, uint32_t byte, uint32_t bytes, Where at) {
  const uint16_t at_site = site(at);
  each(there, byte, bytes, true, [&](Cell& c, uint32_t here) {
    check_order({self->known, true, true}, c, here, at);
    forget_reads(c);
    c.writer = -1, c.at = at_site, c.state = State::UNDER_WAY;
  });
}

void end_asynchronous_write(Block& there, uint32_t byte, uint32_t bytes, uint32_t agent, uint32_t time) {
  each(there, byte, bytes, true, [&](Cell& c, uint32_t) { c.writer = int32_t(agent), c.time = time, c.state = State::PLAIN; });
}

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
  std::memcpy(to, self->block->bytes.data() + from, bytes);
}

void write_shared(uint32_t to, const void* from, uint32_t bytes, Where at) {
  perhaps_switch();
  check_shared(to, bytes, at);
  record_write(to, bytes, State::PLAIN, at);
  std::memcpy(self->block->bytes.data() + to, from, bytes);
}

// cp.async.bulk.prefetch.L2: "Data Movement and Conversion Instructions"; address and size are multiples of 16.
void prefetch(const void* from, uint32_t bytes, Where at) {
  perhaps_switch();
  if (bytes % 16) fail("fetch of " + std::to_string(bytes) + " bytes at " + text(at) + ", expected a multiple of 16");
  check_aligned(from, 16, at);
  check_global(from, bytes, false, at);
}

void copy_async(uint32_t to, const void* from, uint32_t bytes, Where at) {
  perhaps_switch();
  check_shared(to, 16, at);
  if (bytes > 16) fail("copy of " + std::to_string(bytes) + " bytes at " + text(at) + ", expected 0 to 16");
  if (bytes) {
    check_aligned(from, 16, at);
    check_global(from, bytes, false, at);
  }
  record_write(to, 16, State::UNDER_WAY, at);
  std::memset(self->block->bytes.data() + to, 0xff, 16);
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
    uint8_t* to = self->block->bytes.data() + c.to;
    std::memcpy(to, c.from, c.bytes);
    std::memset(to + c.bytes, 0, 16 - c.bytes);
    end_asynchronous_write(*self->block, c.to, 16, self->agent, self->time());
  }
  self->copies.swap(rest);
}

}  // namespace model
}  // namespace vk
