// Products of warpgroups (PTX ISA, "Asynchronous Warpgroup Level Matrix Instructions"), finished as late as that chapter allows:
//
// * All 32 lanes of a warp, and the four warps of a warpgroup, ask for the same products in the same order ("wgmma.mma_async").
// * A product is made when its group is waited for ("wgmma.wait_group"), of what shared memory then holds. Until then its sums hold a
//   signalling NaN: read early it spreads, and whatever touches it leaves other bits, which the wait tells. Left operands in registers are
//   copied when asked for, so that what touches them before the wait is not seen.
// * What a product reads has to be there when it is asked for, known to every lane of the warp, and fenced where threads wrote it ("Async
//   Proxy"). Each warp reads all rows of both operands, from then until its own wait: who writes there has to know of that wait.
// * wgmma.fence orders what was done to registers before it: one is asked for in every group, which is more than the manual does for sums that
//   only products of one shape touch. Such products may follow each other on the same sums without a wait.
// * No product is left out of a group when a warp waits, and none is under way when a thread ends.
#include <list>

#include "executor_operand.h"

namespace vk {
namespace model {
namespace {

constexpr uint32_t POISON = 0x7fa5a5a5;  // signalling: arithmetic makes a quiet NaN of it

struct Asked {  // what all lanes of a warpgroup ask for alike
  Where at;
  uint32_t n, group;
  uint64_t a_bits, b_bits;
  bool own, a_across, b_across, keep, bfloat;
};
struct Sums {  // of products under way
  float* at[LANES] = {};
  uint32_t n, under_way = 0;
  Where last{};
  std::vector<float> values;  // [16, n]
};
struct Product {
  Asked asked;
  Operand a, b;
  Sums* sums;
  uint32_t lanes = 0;         // that have asked for it
  std::vector<uint32_t> own;  // [lanes, 4]: the left operand in registers
};
struct Lane {
  uint32_t asked = 0, groups = 0, since = 0;  // products, commits, products since the last commit
  bool begun = false;
  Where last{};
};
struct WarpProducts {
  Lane lanes[LANES];
  std::deque<Product> under_way;
  uint32_t done = 0;
  std::list<Sums> sums;
};
struct Group {
  std::vector<Asked> asked;
  WarpProducts warps[GROUP / LANES];
};
std::map<std::pair<uint32_t, uint32_t>, Group> groups;  // by rank in the cluster and index in the block

uint32_t warp_of_group() { return self->index % GROUP / LANES; }
Group& own_group() { return groups[{self->block->rank, self->index / GROUP}]; }
// Place of value i of a lane in a warp's sums.
uint32_t place(uint32_t lane, uint32_t i, uint32_t n) { return (lane / 4 + (i & 2) * 4) * n + i / 4 * 8 + lane % 4 * 2 + (i & 1); }

std::string difference(const Asked& one, const Asked& other) {
  if (one.at.line != other.at.line || std::strcmp(one.at.file, other.at.file)) return "another place";
  if (one.group != other.group) return "another group";
  if (one.n != other.n || one.own != other.own || one.bfloat != other.bfloat || one.a_across != other.a_across || one.b_across != other.b_across)
    return "another form";
  if (one.a_bits != other.a_bits || one.b_bits != other.b_bits) return "other descriptors";
  return one.keep != other.keep ? "other scale-d" : "";
}

void compare(const char* who, const Asked& first, const Asked& now) {
  const std::string what = difference(first, now);
  if (!what.empty()) fail(std::string(who) + " part: wgmma.mma_async at " + text(first.at) + " and at " + text(now.at) + ", " + what);
}

void check_untouched(const Sums& s, uint32_t lane, Where now) {
  for (uint32_t i = 0; i < s.n / 2; ++i)
    if (bits_of(s.at[lane][i]) != POISON)
      fail("sums of thread " + std::to_string(self->index / LANES * LANES + lane) + " touched while the product asked for at " + text(s.last) +
           " was under way, seen at " + text(now) + " (value " + std::to_string(i) + ")");
}

Operand decoded(uint64_t bits, bool across, uint32_t rows, const char* which, Where at) {
  Operand o;
  const std::string why = decode(o, bits, across, rows);
  if (!why.empty()) fail(std::string("the descriptor of ") + which + " at " + text(at) + " " + why);
  return o;
}

// The sums that this lane's c belongs to; a product before this one may be under way on them.
Sums& sums_of(WarpProducts& warp, uint32_t lane, float* c, uint32_t n, Where at) {
  for (Sums& s : warp.sums) {
    float* there = s.at[lane];
    if (!there || c + n / 2 <= there || there + s.n / 2 <= c) continue;
    if (there == c && s.n == n) return s;
    fail("wgmma.mma_async at " + text(at) + " on sums of another shape than those of " + text(s.last) + ", which is under way");
  }
  warp.sums.emplace_back();
  warp.sums.back().n = n, warp.sums.back().values.resize(WARP_ROWS * n);
  return warp.sums.back();
}

void begin_product(Group& group, WarpProducts& warp, const Asked& asked, float* c) {
  const uint32_t lane = self->index % LANES, number = warp.done + uint32_t(warp.under_way.size());
  if (number < group.asked.size()) {
    compare("the warps of a warpgroup", group.asked[number], asked);
  } else {
    for (uint32_t t = 0; t < GROUP; ++t)
      if (cluster->fibers[self->agent - self->index % GROUP + t].done)
        fail("the warps of a warpgroup part: wgmma.mma_async at " + text(asked.at) + " after another of its threads has ended");
    group.asked.push_back(asked);
  }
  Product p;
  p.asked = asked;
  if (!asked.own) p.a = decoded(asked.a_bits, asked.a_across, GROUP_ROWS, "the left operand", asked.at);
  p.b = decoded(asked.b_bits, asked.b_across, asked.n, "the right operand", asked.at);
  p.sums = &sums_of(warp, lane, c, asked.n, asked.at);
  p.sums->last = asked.at, ++p.sums->under_way;
  if (asked.own) p.own.resize(LANES * 4);
  warp.under_way.push_back(std::move(p));
}

void record(const Operand& o, uint32_t rows, uint32_t time, Where at) {
  const Known& known = known_by_warp();
  const uint32_t agent = warp_agent(), chunks = chunks_of(rows);
  for (uint32_t i = 0; i < chunks; ++i) {
    const uint32_t byte = o.chunk(i);
    check_shared(byte, 16, at);
    record_asynchronous_read(known, agent, time, byte, 16, at);
  }
}

// This warp's 16 rows.
void make(const Product& p) {
  static thread_local float a[DEPTH * WARP_ROWS], b[DEPTH * MOST_COLUMNS];
  const uint8_t* shared = self->block->bytes.data();
  const Asked& asked = p.asked;
  if (asked.own) {
    for (uint32_t l = 0; l < LANES; ++l)
      for (uint32_t i = 0; i < 8; ++i) {  // as of mma.m16n8k16: register i / 2
        const uint16_t half = uint16_t(p.own[l * 4 + i / 2] >> 16 * (i & 1));
        widen(a + (l % 4 * 2 + (i & 1) + i / 4 * 8) * WARP_ROWS + l / 4 + (i & 2) * 4, &half, 1, asked.bfloat);
      }
  } else {
    gather(a, p.a, shared, warp_of_group() * WARP_ROWS, WARP_ROWS, asked.bfloat);
  }
  gather(b, p.b, shared, 0, asked.n, asked.bfloat);
  if (!asked.keep) std::fill(p.sums->values.begin(), p.sums->values.end(), 0.0f);
  accumulate(p.sums->values.data(), a, b, asked.n);
}

// All lanes of a warp wait until `still` groups are under way.
void finish(WarpProducts& warp, uint32_t still, Where at) {
  const Lane& first = warp.lanes[0];
  for (const Lane& lane : warp.lanes)
    if (lane.asked != first.asked || lane.groups != first.groups)
      fail("the lanes of a warp part: one asked for " + std::to_string(first.asked) + " products in " + std::to_string(first.groups) +
           " groups, another for " + std::to_string(lane.asked) + " in " + std::to_string(lane.groups) + " until wgmma.wait_group at " + text(at));
  const uint32_t ended = first.groups > still ? first.groups - still : 0;
  for (const Sums& s : warp.sums)
    for (uint32_t l = 0; l < LANES; ++l) check_untouched(s, l, at);
  for (; !warp.under_way.empty() && warp.under_way.front().asked.group < ended; ++warp.done) {
    make(warp.under_way.front());
    --warp.under_way.front().sums->under_way;
    warp.under_way.pop_front();
  }
  for (auto s = warp.sums.begin(); s != warp.sums.end();) {
    if (s->under_way) {
      ++s;
      continue;
    }
    for (uint32_t l = 0; l < LANES; ++l)
      for (uint32_t i = 0; i < s->n / 2; ++i) s->at[l][i] = s->values[place(l, i, s->n)];
    s = warp.sums.erase(s);
  }
  if (ended)
    for (uint32_t l = 0; l < LANES; ++l) learn(cluster->fibers[self->agent - self->index % LANES + l], warp_agent(), ended);
}

Lane& own_lane(const char* what, Where at) {
  if ((self->index / GROUP + 1) * GROUP > cluster->threads) fail(std::string(what) + " at " + text(at) + " by a warp of an incomplete warpgroup");
  return own_group().warps[warp_of_group()].lanes[self->index % LANES];
}

}  // namespace

void products_begin(Where at) { own_lane("wgmma.fence", at).begun = true; }

void products_commit(Where at) {
  Lane& lane = own_lane("wgmma.commit_group", at);
  ++lane.groups, lane.since = 0, lane.begun = false;
}

void products_wait(int still, Where at) {
  const Lane& lane = own_lane("wgmma.wait_group", at);
  if (lane.since)
    fail("wgmma.wait_group at " + text(at) + " while the product asked for at " + text(lane.last) + " is in no group: no wgmma.commit_group");
  meet("wgmma.wait_group", at, nullptr, [still, at](void**) { finish(own_group().warps[warp_of_group()], uint32_t(still), at); });
}

void warpgroup_product(float* c, int columns, const uint32_t* a, unsigned long long a_bits, bool a_across, unsigned long long b_bits,
                       bool b_across, bool keep, bool bfloat, Where at) {
  perhaps_switch();
  Lane& lane = own_lane("wgmma.mma_async", at);
  const uint32_t n = uint32_t(columns), l = self->index % LANES;
  if (n % 8 || n == 0 || n > MOST_COLUMNS) fail("wgmma.mma_async at " + text(at) + " for " + std::to_string(n) + " columns, expected 8 to 256 by 8");
  if (!lane.begun) fail("wgmma.mma_async at " + text(at) + " in a group without wgmma.fence");
  Group& group = own_group();
  WarpProducts& warp = group.warps[warp_of_group()];
  const Asked asked{at, n, lane.groups, a_bits, b_bits, a != nullptr, a_across, b_across, keep, bfloat};
  if (lane.asked == warp.done + warp.under_way.size()) begin_product(group, warp, asked, c);
  Product& p = warp.under_way[lane.asked - warp.done];
  compare("the lanes of a warp", p.asked, asked);
  float*& mine = p.sums->at[l];
  if (!mine) {
    mine = c;
    if (keep)
      for (uint32_t i = 0; i < n / 2; ++i) p.sums->values[place(l, i, n)] = c[i];
    for (uint32_t i = 0; i < n / 2; ++i) std::memcpy(c + i, &POISON, 4);
  } else if (mine != c) {
    fail("the lanes of a warp part: wgmma.mma_async at " + text(at) + " on other sums");
  } else {
    check_untouched(*p.sums, l, at);
  }
  if (a) std::copy(a, a + 4, p.own.begin() + l * 4);
  ++lane.asked, ++lane.since, lane.last = at;
  if (++p.lanes < LANES) return;
  const uint32_t time = p.asked.group + 1;  // how many groups have ended when this one has
  if (!p.asked.own) record(p.a, GROUP_ROWS, time, at);
  record(p.b, n, time, at);
  counts.warpgroup_products += warp_of_group() == 0;
}

void check_products() {
  const auto found = groups.find({self->block->rank, self->index / GROUP});
  if (found == groups.end()) return;
  const WarpProducts& warp = found->second.warps[warp_of_group()];
  const Lane& lane = warp.lanes[self->index % LANES];
  if (lane.asked > warp.done) fail("ends while the product asked for at " + text(lane.last) + " is under way");
  if (lane.asked < found->second.asked.size())
    fail("the warps of a warpgroup part: ends without the product asked for at " + text(found->second.asked[lane.asked].at));
}

void drop_products() { groups.clear(); }

}  // namespace model
}  // namespace vk
