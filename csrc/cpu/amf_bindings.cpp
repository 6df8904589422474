// The kernels of attention motion flow as Python sees them.
#include "cpu/bindings.h"

#include "cpu/amf.h"

namespace vk {
namespace {

struct Tier {
  void (*run)(const AmfArgs&, int);
  int64_t (*workspace)(const AmfArgs&, int);
};
const Tier tiers[ISA_COUNT] = {
    {portable::amf_run, portable::amf_workspace},
#ifdef VK_HAVE_AVX2
    {avx2::amf_run, avx2::amf_workspace},
#else
    {},
#endif
#ifdef VK_HAVE_AVX512
    {avx512::amf_run, avx512::amf_workspace},
#else
    {},
#endif
};
const Tier& tier() { return tiers[current_tier()]; }

AmfArgs read(Fields& f, double scale) {
  AmfArgs a{};
  a.bf16 = static_cast<int>(f.next()), a.threads = static_cast<int>(f.next());
  a.batch = f.next(), a.groups = f.next(), a.heads = f.next(), a.dim = f.next();
  a.frames = f.next(), a.height = f.next(), a.width = f.next(), a.pairs = f.next();
  require(a.bf16 == 0 || a.bf16 == 1, "bf16", a.bf16, "0 or 1");
  require(a.threads >= 1, "threads", a.threads, ">= 1");
  require(a.batch >= 1 && a.groups >= 1 && a.heads >= 1, "batch * groups * heads", least_of(a.batch, a.groups, a.heads), ">= 1");
  require(a.dim >= 8 && a.dim % 8 == 0, "dim", a.dim, "a multiple of 8");
  require(a.frames >= 1 && a.height >= 1 && a.width >= 1, "grid", least_of(a.frames, a.height, a.width), ">= 1");
  require(a.pairs >= 1, "pairs", a.pairs, ">= 1");
  a.first = f.pointer<const int32_t>(), a.seen = f.pointer<const int32_t>();
  require(a.first && a.seen, "pairs", 0, "non-null lists");
  a.scale = static_cast<float>(scale);
  return a;
}

int64_t workspace(int kind, const py::tuple& shape) {
  Fields f(shape);
  const AmfArgs a = read(f, 1.0);
  f.done();
  return tier().workspace(a, kind);
}

void launch(int kind, const py::tuple& args, double scale) {
  Fields f(args);
  AmfArgs a = read(f, scale);
  a.workspace = f.pointer<void>(), a.workspace_bytes = f.next();
  AmfView* const views[] = {&a.q, &a.k, &a.dq, &a.dk};
  for (int i = 0; i < (kind == AMF_BACKWARD ? 4 : 2); ++i) {
    AmfView& v = *views[i];
    v.data = f.pointer<void>(), v.b = f.next(), v.g = f.next(), v.h = f.next(), v.l = f.next();
    require(v.data != nullptr, "q, k, dq, dk", 0, "non-null pointers");
  }
  a.mean = f.pointer<float>(), a.index = f.pointer<int32_t>(), a.lse = f.pointer<float>(), a.top = f.pointer<float>();
  a.entropy = f.pointer<float>(), a.dmean = f.pointer<const float>(), a.dlse = f.pointer<const float>();
  f.done();
  require(kind == AMF_FORWARD || a.lse, "lse", 0, "a non-null pointer");
  const int64_t need = tier().workspace(a, kind);
  require(a.workspace && a.workspace_bytes >= need, "workspace_bytes", a.workspace_bytes,
          ("at least " + std::to_string(need)).c_str());
  py::gil_scoped_release release;
  tier().run(a, kind);
}

}  // namespace

void bind_amf(py::module_& m) {
  m.def("amf_workspace", &workspace, "Bytes of workspace for these sizes.");
  m.def("amf_forward", [](const py::tuple& t, double scale) { launch(AMF_FORWARD, t, scale); });
  m.def("amf_vote", [](const py::tuple& t, double scale) { launch(AMF_VOTE, t, scale); });
  m.def("amf_backward", [](const py::tuple& t, double scale) { launch(AMF_BACKWARD, t, scale); });
}

}  // namespace vk
