// Frame-sparse attention on the CPU: entry points of one instruction-set tier.
#include "cpu/grid_attention.h"

#include "cpu/grid_attention_bwd.h"
#include "cpu/grid_attention_fwd.h"

namespace vk {
namespace VK_ISA {
namespace {

template <class Op>
VK_INLINE void run(const GridArgs& a) {
  Op op(a);
  op.layout(a.workspace);
  op.run();
}

template <class Op>
VK_INLINE int64_t bytes(const GridArgs& a) {
  return Op(a).layout(nullptr);
}

}  // namespace

void grid_attention_forward(const GridArgs& a) { a.bf16 ? run<Forward<bf16>>(a) : run<Forward<float>>(a); }

void grid_attention_backward(const GridArgs& a) { a.bf16 ? run<Backward<bf16>>(a) : run<Backward<float>>(a); }

int64_t grid_attention_workspace(const GridArgs& a, bool backward) {
  if (backward) return a.bf16 ? bytes<Backward<bf16>>(a) : bytes<Backward<float>>(a);
  return a.bf16 ? bytes<Forward<bf16>>(a) : bytes<Forward<float>>(a);
}

}  // namespace VK_ISA
}  // namespace vk
