// Attention motion flow on the CPU: entry points of one instruction-set tier.
#include "cpu/amf.h"

#include "cpu/amf_bwd.h"
#include "cpu/amf_fwd.h"
#include "cpu/amf_vote.h"

namespace vk {
namespace VK_ISA {
namespace {

template <class Op>
int64_t work(const AmfArgs& a, bool measure) {
  Op op(a);
  const int64_t bytes = op.layout(measure ? nullptr : a.workspace);
  if (!measure) op.run();
  return bytes;
}

template <class T>
int64_t of_kind(const AmfArgs& a, int kind, bool measure) {
  if (kind == AMF_FORWARD) return work<AmfForward<T>>(a, measure);
  if (kind == AMF_VOTE) return work<AmfVote<T>>(a, measure);
  return work<AmfBackward<T>>(a, measure);
}

}  // namespace

void amf_run(const AmfArgs& a, int kind) { a.bf16 ? of_kind<bf16>(a, kind, false) : of_kind<float>(a, kind, false); }

int64_t amf_workspace(const AmfArgs& a, int kind) {
  return a.bf16 ? of_kind<bf16>(a, kind, true) : of_kind<float>(a, kind, true);
}

}  // namespace VK_ISA
}  // namespace vk
