// Copies of boxes of a tensor (cp.async.bulk.tensor), which the scheduler finishes when it likes, and what is left when blocks end.
//
// A tensor map is what harness.tensor_map makes: MAGIC, address, dimensions, then five sizes in elements, four strides in bytes (of dimensions
// 1 on), five sides of the box; elements are 16 bits. Rows of a box are 128 bytes, which the swizzle of 128 bytes scatters by absolute address:
// bits 4 to 6 of it become their exclusive or with bits 7 to 9 (PTX ISA, "Tensor Swizzling Modes"). So a box may begin on any multiple of
// 128 bytes ("cp.async.bulk.tensor": dstMem), and only on 1024 does its row r lie as row r of a panel.
#include "executor_state.h"

namespace vk {
namespace model {

namespace {

constexpr uint64_t MAGIC = 0x70614d726f736e54ull;
constexpr uint32_t DIMENSIONS = 5, ROW = 128, ELEMENT = 2;

struct Map {
  uint64_t address = 0, rank = 0, sizes[DIMENSIONS]{}, strides[DIMENSIONS]{}, box[DIMENSIONS]{};
  uint64_t rows() const {
    uint64_t n = 1;
    for (uint32_t d = 1; d < rank; ++d) n *= box[d];
    return n;
  }
};

Map read_map(const unsigned long long* words, size_t coordinates, Where at) {
  if (words[0] != MAGIC) fail("copy of a box at " + text(at) + " by something that is not a tensor map");
  Map m;
  m.address = words[1], m.rank = words[2];
  for (uint32_t d = 0; d < DIMENSIONS; ++d) {
    const uint64_t side = words[12 + d / 4] >> d % 4 * 16 & 0xffff;
    m.sizes[d] = words[3 + d], m.strides[d] = d ? words[7 + d] : ELEMENT, m.box[d] = side;
  }
  if (m.rank != coordinates)
    fail("copy of a box at " + text(at) + " by " + std::to_string(coordinates) + " coordinates, where the tensor map has " +
         std::to_string(m.rank) + " dimensions");
  uint64_t extent = ELEMENT;
  for (uint32_t d = 0; d < m.rank; ++d) extent += (m.sizes[d] - 1) * m.strides[d];
  const std::string wrong = why_not_read(reinterpret_cast<const void*>(m.address), extent);
  if (wrong == "outside every tensor") fail("copy of a box at " + text(at) + ": the tensor that the map describes reaches " + wrong);
  return m;
}

}  // namespace

struct BoxCopy {
  Fiber* by;
  Block* there;
  MemoryBarrier* done;
  Map map;
  int64_t first[DIMENSIONS];
  uint32_t to, bytes;
  Where at;
  std::vector<uint32_t> over;  // in clusters: what had ended when it was asked for, and so has when it ends
};

void copy_box(uint16_t blocks, uint32_t to, const unsigned long long* words, std::initializer_list<int> first, uint32_t done, Where at) {
  perhaps_switch();
  const Map map = read_map(words, first.size(), at);
  const uint32_t mask = blocks ? blocks : 1u << self->block->rank, bytes = uint32_t(map.rows() * ROW);
  if (mask >> cluster->blocks.size())
    fail("copy of a box at " + text(at) + " to blocks " + std::to_string(mask) + " (bits) of a cluster of " +
         std::to_string(cluster->blocks.size()));
  if (map.box[0] * ELEMENT != ROW)
    fail("copy of a box at " + text(at) + " with rows of " + std::to_string(map.box[0]) + " elements, expected 64");
  if (to % ROW) fail("copy of a box to shared byte " + std::to_string(to) + " at " + text(at) + ", expected a multiple of 128");
  if (uint64_t(to) + bytes > self->block->bytes.size())
    fail("shared byte " + std::to_string(to + bytes - 1) + " at " + text(at) + ", only " + std::to_string(self->block->bytes.size()) +
         " are there");
  for (uint32_t rank = 0; rank < cluster->blocks.size(); ++rank) {
    if (!(mask >> rank & 1)) continue;
    Block& there = cluster->blocks[rank];
    MemoryBarrier& b = barrier_at(there, done, "copy of a box", at);
    check_phase(b, "copy of a box", at);
    begin_asynchronous_write(there, to, bytes, at);
    std::memset(there.bytes.data() + to, 0xff, bytes);
    BoxCopy* copy = new BoxCopy{self, &there, &b, map, {}, to, bytes, at, {}};
    if (cluster->blocks.size() > 1) {
      Known known{{}, {}, self->known.over};
      known.join({{}, {}, self->known.seen});
      copy->over = std::move(known.over);
    }
    std::copy(first.begin(), first.end(), copy->first);
    cluster->boxes.push_back(copy);
    b.under_way += 1;
  }
  ++counts.boxes;
}

void finish_a_box() {
  std::vector<BoxCopy*>& all = cluster->boxes;
  const size_t pick = draw() % all.size();
  BoxCopy* copy = all[pick];
  all[pick] = all.back(), all.pop_back();
  self = copy->by;
  const Map& m = copy->map;
  uint8_t* shared = copy->there->bytes.data();
  for (uint32_t row = 0; row < copy->bytes / ROW && failure.empty(); ++row) {
    const uint8_t* from = reinterpret_cast<const uint8_t*>(m.address);
    bool inside = true;
    for (uint32_t d = 1, rest = row; d < m.rank; rest /= uint32_t(m.box[d]), ++d) {
      const int64_t at = copy->first[d] + int64_t(rest % m.box[d]);
      inside = inside && at >= 0 && at < int64_t(m.sizes[d]);
      from += at * int64_t(m.strides[d]);
    }
    const int64_t x = copy->first[0], begin = std::max<int64_t>(x, 0), end = std::min<int64_t>(x + ROW / ELEMENT, int64_t(m.sizes[0]));
    uint8_t line[ROW] = {};
    if (inside && begin < end) {
      const std::string wrong = why_not_read(from + begin * ELEMENT, uint64_t(end - begin) * ELEMENT);
      if (!wrong.empty()) tell("copy of a box asked for at " + text(copy->at) + " reads global memory " + wrong);
      else std::memcpy(line + (begin - x) * ELEMENT, from + begin * ELEMENT, size_t(end - begin) * ELEMENT);
    }
    for (uint32_t c = 0; c < ROW; c += 16) {
      const uint32_t plain = copy->to + row * ROW + c;
      std::memcpy(shared + (plain ^ (plain >> 7 & 7) << 4), line + c, 16);
    }
  }
  MemoryBarrier& b = *copy->done;
  end_asynchronous_write(*copy->there, copy->to, copy->bytes, b.agent, b.phase + 1);
  if (!copy->over.empty()) b.gathering.join({{}, {}, std::move(copy->over)});
  b.under_way -= 1, b.bytes -= copy->bytes, b.last_copied = b.phase + 1, b.last_copy = copy->at;
  if (failure.empty() && !copy->there->running) tell("the block ends while the copy asked for at " + text(copy->at) + " is under way");
  if (failure.empty()) end_phase_if_due(b, "the end of the copy asked for at " + text(copy->at));
  delete copy;
}

void drop_boxes() {
  for (BoxCopy* copy : cluster->boxes) delete copy;
  cluster->boxes.clear();
}

void check_ends() {
  const auto some_thread = [](const Block& b, auto knows) {
    const Fiber* first = cluster->fibers.data() + b.first();
    return std::any_of(first, first + cluster->threads, knows);
  };
  for (const Block& b : cluster->blocks)
    for (const auto& entry : b.memory_barriers) {
      const MemoryBarrier& m = entry.second;
      self = &cluster->fibers[b.first()];
      if (m.last_copied && !some_thread(b, [&](const Fiber& f) { return f.known.sees(m.agent, m.last_copied); }))
        tell("the block may end while the copy asked for at " + text(m.last_copy) + " is under way: nobody waits for it");
    }
  for (const Fiber& f : cluster->fibers)
    for (const Block& b : cluster->blocks) {
      const Remote& r = f.remote[b.rank];
      self = &cluster->fibers[b.first()];
      if (r.time && !some_thread(b, [&](const Fiber& g) { return g.known.sees(f.agent, r.time); }))
        tell("the block may end before block " + std::to_string(f.block->rank) + " of its cluster arrives at its barrier at " + text(r.at) +
             ": no cluster_barrier between");
    }
}

}  // namespace model
}  // namespace vk
