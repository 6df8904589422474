// vidkern._cpu: raw pointers, strides and sizes in, nothing out. The GIL is released while a kernel runs.
//
// A call passes one flat tuple of integers (the scale, a float, apart): reading it with the C API costs a tenth of forty pybind11
// conversions, and a launch has to stay cheap beside problems of a few microseconds. The launchers in vidkern/ops/*/cpu.py build the
// tuples; the order of the fields is the order of the reads below.
#include <pybind11/pybind11.h>

#include <stdlib.h>

#include <new>
#include <string>

#include "cpu/bindings.h"
#include "cpu/cpuid.h"
#include "cpu/grid_attention.h"
#include "cpu/merge_attention.h"
#include "cpu/peak.h"
#include "cpu/pyramid.h"

namespace py = pybind11;
using namespace vk;

namespace {

struct Tier {
  void (*grid_forward)(const GridArgs&);
  void (*grid_backward)(const GridArgs&);
  int64_t (*grid_workspace)(const GridArgs&, bool);
  void (*merge_forward)(const MergeArgs&);
  void (*merge_backward)(const MergeArgs&);
  double (*peak_fp32)(int, double);
  double (*peak_bf16)(int, double);
  int (*pyramid[15])(const PyramidArgs&);
};
// Names of Tier::pyramid, which become functions of the module.
const char* const pyramid_names[] = {
    "pyramid_analysis", "pyramid_analysis_adjoint", "pyramid_synthesis", "pyramid_synthesis_adjoint", "pyramid_mix",
    "pyramid_mix_adjoint", "pyramid_step", "pyramid_step_adjoint", "pyramid_loss", "pyramid_loss_backward", "pyramid_stage",
    "pyramid_stage_adjoint", "pyramid_transition", "pyramid_transition_adjoint", "pyramid_normals"};

#define VK_TIER_TABLE(t)                                                                                                      \
  {                                                                                                                           \
    t::grid_attention_forward, t::grid_attention_backward, t::grid_attention_workspace, t::merge_attention_forward,           \
        t::merge_attention_backward, t::peak_fp32, t::peak_bf16, {                                                            \
      t::pyramid_analysis, t::pyramid_analysis_adjoint, t::pyramid_synthesis, t::pyramid_synthesis_adjoint, t::pyramid_mix,   \
          t::pyramid_mix_adjoint, t::pyramid_step, t::pyramid_step_adjoint, t::pyramid_loss, t::pyramid_loss_backward,        \
          t::pyramid_stage, t::pyramid_stage_adjoint, t::pyramid_transition, t::pyramid_transition_adjoint,                   \
          t::pyramid_normals                                                                                                  \
    }                                                                                                                         \
  }
const Tier tiers[ISA_COUNT] = {
    VK_TIER_TABLE(portable),
#ifdef VK_HAVE_AVX2
    VK_TIER_TABLE(avx2),
#else
    {},
#endif
#ifdef VK_HAVE_AVX512
    VK_TIER_TABLE(avx512),
#else
    {},
#endif
};

Isa best_isa() {
  for (int i = ISA_COUNT - 1; i > 0; --i)
    if (isa_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
  return PORTABLE;
}

std::string supported_names() {
  std::string names;
  for (int i = 0; i < ISA_COUNT; ++i)
    if (isa_supported(static_cast<Isa>(i))) names += (names.empty() ? "" : ", ") + std::string(isa_names[i]);
  return names;
}

Isa parse_isa(const char* what, const std::string& name) {
  for (int i = 0; i < ISA_COUNT; ++i)
    if (name == isa_names[i] && isa_supported(static_cast<Isa>(i))) return static_cast<Isa>(i);
  throw py::value_error(std::string(what) + ": '" + name + "', expected a tier that is built and runs here: " + supported_names());
}

Isa current = PORTABLE;
const Tier& tier() { return tiers[current]; }

GridArgs read_shape(Fields& f) {
  GridArgs a{};
  a.bf16 = static_cast<int>(f.next());
  a.threads = static_cast<int>(f.next());
  a.batch = f.next(), a.heads = f.next(), a.kv_heads = f.next(), a.length = f.next(), a.dim = f.next();
  a.n_frames = f.next(), a.frame_len = f.next(), a.n_text = f.next();
  require(a.bf16 == 0 || a.bf16 == 1, "bf16", a.bf16, "0 or 1");
  require(a.threads >= 1, "threads", a.threads, ">= 1");
  require(a.batch >= 1 && a.heads >= 1, "batch * heads", a.batch * a.heads, ">= 1");
  require(a.kv_heads >= 1 && a.heads % a.kv_heads == 0, "kv_heads", a.kv_heads, "a divisor of heads");
  require(a.dim >= 8 && a.dim <= 256 && a.dim % 8 == 0, "dim", a.dim, "a multiple of 8 up to 256");
  require(a.n_frames >= 1, "n_frames", a.n_frames, ">= 1");
  require(a.frame_len >= 1, "frame_len", a.frame_len, ">= 1");
  require(a.n_text >= 0, "n_text", a.n_text, ">= 0");
  require(a.length == a.n_text + a.n_frames * a.frame_len, "length", a.length, "n_text + n_frames * frame_len");
  return a;
}

int64_t grid_workspace(bool backward, const py::tuple& shape) {
  Fields f(shape);
  const GridArgs a = read_shape(f);
  f.done();
  return tier().grid_workspace(a, backward);
}

GridArgs read_grid(Fields& f, double scale) {
  GridArgs a = read_shape(f);
  a.text_front = static_cast<int>(f.next()), a.text_visible = static_cast<int>(f.next());
  a.q_ptr = f.pointer<const int32_t>(), a.q_runs = f.pointer<const int32_t>();
  a.k_ptr = f.pointer<const int32_t>(), a.k_runs = f.pointer<const int32_t>();
  a.valid = f.pointer<const uint8_t>(), a.valid_stride = f.next();
  a.kv_len = f.pointer<const int32_t>(), a.kv_stride = f.next();
  a.text_len = f.pointer<const int32_t>(), a.text_stride = f.next();
  a.workspace = f.pointer<void>(), a.workspace_bytes = f.next();
  a.work = f.pointer<int64_t>();
  a.q = f.strided(), a.k = f.strided(), a.v = f.strided(), a.out = f.strided(), a.lse = f.strided();
  a.scale = static_cast<float>(scale);
  require(a.q_ptr && a.k_ptr, "segment lists", 0, "non-null pointers");
  require(a.q.data && a.k.data && a.v.data && a.out.data && a.lse.data, "q, k, v, out, lse", 0, "non-null pointers");
  return a;
}

void check_workspace(const GridArgs& a, bool backward) {
  const int64_t need = tier().grid_workspace(a, backward);
  require(a.workspace && a.workspace_bytes >= need, "workspace_bytes", a.workspace_bytes,
          ("at least " + std::to_string(need)).c_str());
}

void grid_forward(const py::tuple& args, double scale) {
  Fields f(args);
  const GridArgs a = read_grid(f, scale);
  f.done();
  check_workspace(a, false);
  py::gil_scoped_release release;
  tier().grid_forward(a);
}

void grid_backward(const py::tuple& args, double scale) {
  Fields f(args);
  GridArgs a = read_grid(f, scale);
  a.dout = f.strided(), a.dlse = f.strided(), a.dq = f.strided(), a.dk = f.strided(), a.dv = f.strided();
  f.done();
  require(a.dq.data && a.dk.data && a.dv.data, "dq, dk, dv", 0, "non-null pointers");
  check_workspace(a, true);
  py::gil_scoped_release release;
  tier().grid_backward(a);
}

constexpr int MAX_PARTS = 64;

void merge(bool backward, const py::tuple& args) {
  Fields f(args);
  MergeArgs a{};
  MergePart parts[MAX_PARTS];
  a.bf16 = static_cast<int>(f.next()), a.threads = static_cast<int>(f.next()), a.n_parts = static_cast<int>(f.next());
  a.batch = f.next(), a.heads = f.next(), a.length = f.next(), a.dim = f.next();
  require(a.n_parts >= 1 && a.n_parts <= MAX_PARTS, "outs", a.n_parts, "between 1 and 64 parts");
  require(a.dim >= 8 && a.dim % 8 == 0, "dim", a.dim, "a multiple of 8");
  (backward ? a.dout : a.out) = f.strided();
  (backward ? a.dlse : a.lse) = f.strided();
  for (int i = 0; i < a.n_parts; ++i) {
    MergePart& p = parts[i];
    p.sign = static_cast<int>(f.next());
    require(p.sign == 1 || p.sign == -1, "signs", p.sign, "1 or -1");
    p.out = f.strided(), p.lse = f.strided();
    p.dout = p.dlse = Strided{};
    if (backward) p.dout = f.strided(), p.dlse = f.strided();
  }
  f.done();
  a.parts = parts;
  py::gil_scoped_release release;
  (backward ? tier().merge_backward : tier().merge_forward)(a);
}

LevelView read_view(Fields& f) {
  LevelView v;
  v.data = f.pointer<void>(), v.bf16 = static_cast<int>(f.next());
  v.b = f.next(), v.c = f.next(), v.t = f.next(), v.y = f.next(), v.x = f.next(), v.ti = f.next(), v.yi = f.next();
  v.pt = f.next(), v.ph = f.next(), v.pw = f.next();
  require(v.pt >= 1 && v.ph >= 1 && v.pw >= 1, "patch", least_of(v.pt, v.ph, v.pw), ">= 1");
  return v;
}

// The fields of every pyramid kernel. `present` has a bit for volume, then in[0..2], then out[0..2].
PyramidArgs read_pyramid(const py::tuple& fields, const py::tuple& scales) {
  Fields f(fields);
  PyramidArgs a{};
  a.threads = static_cast<int>(f.next()), a.stream = static_cast<int>(f.next());
  a.kind = static_cast<int>(f.next()), a.ft = static_cast<int>(f.next());
  a.levels = static_cast<int>(f.next()), a.active = static_cast<int>(f.next());
  a.batch = f.next(), a.channels = f.next();
  require(a.threads >= 1, "threads", a.threads, ">= 1");
  require(a.kind >= 0 && a.kind <= 2, "kind", a.kind, "0, 1 or 2");
  require(a.ft == 1 || a.ft == 2, "ft", a.ft, "1 or 2");
  require(a.levels >= 1 && a.levels <= PYRAMID_LEVELS, "levels", a.levels, "between 1 and 4");
  require(a.active >= 0 && a.active <= a.levels, "active", a.active, "between 0 and levels");
  require(a.batch >= 1 && a.channels >= 1, "batch * channels", a.batch * a.channels, ">= 1");
  require(static_cast<int>(scales.size()) == a.levels, "scales", static_cast<int64_t>(scales.size()), "one per level");
  for (int s = 0; s < a.levels; ++s) {
    LevelSize& z = a.size[s];
    z.t = f.next(), z.h = f.next(), z.w = f.next();
    require(z.t >= 1 && z.h >= 1 && z.w >= 1, "level size", least_of(z.t, z.h, z.w), ">= 1");
    a.scale[s] = scales[s].cast<float>();
  }
  a.tile_t = f.next(), a.tile_y = f.next();
  const int64_t present = f.next();
  if (present & 1) a.volume = read_view(f);
  for (int k = 0; k < 3; ++k)
    for (int s = 0; s < a.levels && (present >> (k + 1) & 1); ++s) a.in[k][s] = read_view(f);
  for (int k = 0; k < 3; ++k)
    for (int s = 0; s < a.levels && (present >> (k + 4) & 1); ++s) a.out[k][s] = read_view(f);
  a.table = f.pointer<const float>(), a.table_b = f.next(), a.table_s = f.next();
  a.mask = f.pointer<const uint8_t>(), a.mask_b = f.next();
  a.loss = f.pointer<float>();
  a.philox = static_cast<int>(f.next());
  a.key0 = static_cast<uint32_t>(f.next()), a.key1 = static_cast<uint32_t>(f.next());
  a.offset = static_cast<uint32_t>(f.next()), a.first_sample = static_cast<uint32_t>(f.next());
  f.done();
  return a;
}

void run_pyramid(int which, const py::tuple& fields, const py::tuple& scales) {
  const PyramidArgs a = read_pyramid(fields, scales);
  int failed;
  {
    py::gil_scoped_release release;
    failed = tier().pyramid[which](a);
  }
  if (failed) throw std::bad_alloc();
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#elif defined(_MSC_VER)
  return "msvc " + std::to_string(_MSC_VER);
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::dict info;
  py::list built;
  for (int i = 0; i < ISA_COUNT; ++i)
    if (tiers[i].grid_forward) built.append(isa_names[i]);
  info["isas"] = built;
  info["compiler"] = compiler();
#ifdef _OPENMP
  info["openmp"] = _OPENMP;
#else
  info["openmp"] = 0;
#endif
  return info;
}

}  // namespace

int vk::current_tier() { return current; }

PYBIND11_MODULE(_cpu, m) {
  m.doc() = "Compiled CPU kernels of vidkern; internal: call the public functions of vidkern instead.";
  const char* forced = getenv("VIDKERN_CPU_ISA");
  current = forced && *forced ? parse_isa("VIDKERN_CPU_ISA", forced) : best_isa();

  m.def("isa", [] { return isa_names[current]; }, "Name of the instruction-set tier in use.");
  m.def("set_isa", [](const std::string& name) { current = parse_isa("isa", name); }, py::arg("name"),
        "Use this tier from now on. ValueError if it is not built or cannot run here.");
  m.def(
      "isas",
      [] {
        py::list names;
        for (int i = 0; i < ISA_COUNT; ++i)
          if (isa_supported(static_cast<Isa>(i))) names.append(isa_names[i]);
        return names;
      },
      "Tiers that are built and run here, slowest first.");
  m.def("build_info", &build_info, "Compiler, OpenMP version and tiers of this build.");
  m.def("peak_fp32", [](int threads, double seconds) { return tier().peak_fp32(threads, seconds); },
        py::call_guard<py::gil_scoped_release>(), py::arg("threads"), py::arg("seconds"),
        "FLOP/s of fp32 multiply-adds on registers alone; 0 if unknown.");
  m.def("peak_bf16", [](int threads, double seconds) { return tier().peak_bf16(threads, seconds); },
        py::call_guard<py::gil_scoped_release>(), py::arg("threads"), py::arg("seconds"),
        "FLOP/s of the bf16 dot product on registers alone; 0 if the tier has none.");
  m.def("grid_attention_workspace", &grid_workspace, "Bytes of workspace for these sizes.");
  m.def("grid_attention_forward", &grid_forward);
  m.def("grid_attention_backward", &grid_backward);
  m.def("merge_attention_forward", [](const py::tuple& t) { merge(false, t); });
  m.def("merge_attention_backward", [](const py::tuple& t) { merge(true, t); });
  bind_pruned(m);
  bind_amf(m);
  for (int i = 0; i < 15; ++i)
    m.def(pyramid_names[i], [i](const py::tuple& fields, const py::tuple& scales) { run_pyramid(i, fields, scales); });
}
