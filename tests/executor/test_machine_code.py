"""What the other tests take from machine code is really found there: instructions of compute capability 9.0, spills, and complaints of ptxas."""

import pytest
from harness import machine_code, nvcc

SOURCE = """
#include "hopper.h"
using namespace vk;
using namespace vk::hopper;
struct Given { TensorMap map; float* c; i32 k; };

template <bool LATE>
VK_DEVICE void multiply(const Given& p) {
  const Panels<128, 64> a{shared_at<u8>(1024)};
  const Ring<2> ring{shared_at<u64>(0)};
  registers_up<240>();
  if (thread_index() == 0) ring.make(1, 4), mbarrier_expect(ring.full(0), a.BYTES), copy_box_to(3, a.base, p.map, 0, 0, ring.full(0));
  cluster_barrier();
  ring.wait_full(0);
  Accumulator c[16] = {};
  for (i32 i = 0; i < p.k; ++i) {
    products_begin();
    VK_UNROLL for (i32 k = 0; k < 4; ++k) warpgroup_product<bf16, 128>(c, a.depth_along(0, k), a.depth_along(64, k), true);
    products_commit();
    if (LATE) products_wait<0>();
    for (i32 n = 0; n < 16; ++n) c[n].v[0] *= 1.5f;  // not LATE: while the product still adds to it
    if (!LATE) products_wait<0>();
  }
  for (i32 n = 0; n < 16; ++n)
    for (i32 i = 0; i < 4; ++i) store(p.c + n * 4 + i, c[n].v[i]);
}
VK_KERNEL_ALONE(384) VK_CLUSTER(2) seen_well(const VK_PARAMETER Given p) { multiply<true>(p); }
VK_KERNEL_ALONE(384) VK_CLUSTER(2) seen_early(const VK_PARAMETER Given p) { multiply<false>(p); }
extern "C" __global__ void __launch_bounds__(1024) seen_spilled(float* p) {
  float v[200];
  VK_UNROLL for (i32 i = 0; i < 200; ++i) v[i] = p[i * 1024 + thread_index()];
  VK_UNROLL for (i32 i = 0; i < 200; ++i) p[i * 7 + 3 * thread_index()] = v[i] * v[199 - i];
}
"""


@pytest.mark.skipif(nvcc() is None, reason="no nvcc")
def test_what_is_counted_is_there(tmp_path):
    (tmp_path / "seen_hopper.cu").write_text(SOURCE)
    found = machine_code(tmp_path / "seen_hopper.cu", "90a")
    assert set(found) == {"seen_well", "seen_early", "seen_spilled"}
    well, early, spilled = (found[f"seen_{name}"] for name in ("well", "early", "spilled"))
    assert well["serialized"] == 0 and well["spilled"] == 0 and well["HGMMA"] % 4 == 0 < well["HGMMA"], well
    assert well["UTMALDG"] == well["UTMALDG.MULTICAST"] == 1 and well["USETMAXREG"] == 1 and well["SYNCS"] >= 4, well
    assert early["serialized"] > 0, early
    assert spilled["spilled"] > 0 and spilled["STL"] and spilled["LDL"] and spilled["serialized"] == 0, spilled
    assert machine_code(tmp_path / "seen_hopper.cu", "90a") == found, "what ptxas said is kept with what it made"
