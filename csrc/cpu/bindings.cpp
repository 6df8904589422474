// vidkern._cpu: raw pointers, strides and sizes in, nothing out. The GIL is released while a kernel runs.
//
// A call passes one flat tuple of integers (the scale, a float, apart): reading it with the C API costs a tenth of forty pybind11
// conversions, and a launch has to stay cheap beside problems of a few microseconds. The launchers in vidkern/ops/*/cpu.py build the
// tuples; the order of the fields is the order of the reads below.
#include <pybind11/pybind11.h>

#include <stdlib.h>

#include <string>

#include "cpu/cpuid.h"
#include "cpu/grid_attention.h"
#include "cpu/merge_attention.h"
#include "cpu/peak.h"

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
};

#define VK_TIER_TABLE(t)                                                                                                      \
  {                                                                                                                           \
    t::grid_attention_forward, t::grid_attention_backward, t::grid_attention_workspace, t::merge_attention_forward,           \
        t::merge_attention_backward, t::peak_fp32, t::peak_bf16                                                               \
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

// Reads the fields of an argument tuple one after the other.
class Fields {
 public:
  explicit Fields(const py::tuple& t) : tuple_(t.ptr()), size_(PyTuple_GET_SIZE(t.ptr())) {}
  int64_t next() {
    if (at_ >= size_) throw py::value_error("argument tuple: " + std::to_string(size_) + " fields, expected more");
    const int64_t v = PyLong_AsLongLong(PyTuple_GET_ITEM(tuple_, at_++));
    if (v == -1 && PyErr_Occurred()) throw py::error_already_set();
    return v;
  }
  template <class T>
  T* pointer() {
    return reinterpret_cast<T*>(static_cast<uintptr_t>(next()));
  }
  Strided strided() {
    Strided s;
    s.data = pointer<void>();
    s.b = next(), s.h = next(), s.l = next();
    return s;
  }
  void done() const {
    if (at_ != size_) throw py::value_error("argument tuple: " + std::to_string(size_) + " fields, expected " + std::to_string(at_));
  }

 private:
  PyObject* tuple_;
  Py_ssize_t size_, at_ = 0;
};

void require(bool ok, const char* name, int64_t value, const char* expectation) {
  if (!ok) throw py::value_error(std::string(name) + ": " + std::to_string(value) + ", expected " + expectation);
}

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
}
