// What the kernels for compute capability 9.0a share: operands in panels of 64 values, and the ring of stages through which a producer
// warpgroup hands them to the warpgroups that multiply.
#pragma once
#include "device/async.h"
#include "device/tensor_map.h"
#include "device/warp.h"
#include "device/warpgroup.h"

namespace vk {
namespace hopper {

constexpr i32 GROUP = 128;   // threads of a warpgroup
constexpr i32 PANEL = 64;    // 16-bit values of a panel's row: 128 bytes, what is swizzled together
constexpr i32 CHUNK = 8;     // 16-bit values of 16 bytes
constexpr u32 ALIGN = 1024;  // bytes on which panels begin

VK_DEVICE i32 group_index() { return i32(warp_index() / 4); }
// Whether this is the thread that acts for its warp.
VK_DEVICE bool leads() { return lane_index() == 0; }

// A tile of ROWS rows of DIM 16-bit values, panel after panel of [ROWS, 64]; ROWS is a multiple of 8. A box of 64 by ROWS with the 128-byte
// swizzle fills a panel.
template <i32 ROWS, i32 DIM>
struct Panels {
  static constexpr i32 COUNT = (DIM + PANEL - 1) / PANEL;
  static constexpr i32 PANEL_BYTES = ROWS * PANEL * 2, BYTES = COUNT * PANEL_BYTES;
  static_assert(ROWS % 8 == 0, "panels begin on 1024 bytes");
  Shared<u8> base;
  VK_DEVICE Shared<u8> panel(i32 n) const { return base + n * PANEL_BYTES; }
  // The 16 bytes of a row that hold values 8 c on.
  VK_DEVICE Shared<u8> chunk(i32 row, i32 c) const { return panel(c / 8) + row * (PANEL * 2) + ((c ^ row) & 7) * 16; }
  // Rows from `row` on, a multiple of 8, values 16 k to 16 k + 15 of each as depth: operand X of X M^T or M X^T.
  VK_DEVICE Described depth_along(i32 row, i32 k) const { return along(panel(k / 4) + row * (PANEL * 2) + k % 4 * 32); }
  // Rows 16 k to 16 k + 15 as depth, values from 64 n on as rows of the operand: operand X of M X or X^T M.
  VK_DEVICE Described depth_across(i32 k, i32 n = 0) const { return across(panel(n) + k * 16 * (PANEL * 2), PANEL_BYTES); }
};

// STAGES stages, filled and emptied in turn; two barriers for each, 16 STAGES bytes from `at` on.
template <i32 STAGES>
struct Ring {
  Shared<u64> at;
  static constexpr u32 BYTES = 16 * STAGES;
  VK_DEVICE Shared<u64> full(i32 i) const { return at + i % STAGES; }
  VK_DEVICE Shared<u64> empty(i32 i) const { return at + STAGES + i % STAGES; }
  // By one thread, before a barrier of the block. A stage is full after `fills` arrivals and empty after `releases`.
  VK_DEVICE void make(u32 fills, u32 releases) const {
    for (i32 i = 0; i < STAGES; ++i) mbarrier_make(full(i), fills), mbarrier_make(empty(i), releases);
    mbarriers_made();
  }
  // Until the i-th use of the ring may be filled; until it is there. Every thread that touches the stage waits itself.
  VK_DEVICE void wait_empty(i32 i) const {
    if (i >= STAGES) mbarrier_wait(empty(i), u32(i / STAGES + 1) & 1);
  }
  VK_DEVICE void wait_full(i32 i) const { mbarrier_wait(full(i), u32(i / STAGES) & 1); }
  // This warp no longer reads the i-th use: its lanes have come here, and its products that read it were waited for.
  VK_DEVICE void release(i32 i) const {
    warp_barrier();
    if (leads()) mbarrier_arrive(empty(i));
  }
};

}  // namespace hopper
}  // namespace vk
