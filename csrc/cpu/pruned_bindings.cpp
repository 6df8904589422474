// The kernels of the pruned layers as Python sees them: one at a time, or as a program of several, which costs one call.
#include "cpu/bindings.h"

#include <stdlib.h>
#include <string.h>

#include <memory>
#include <new>
#include <vector>

#include "cpu/pruned.h"

namespace vk {
namespace {

struct Tier {
  int (*gemm)(const PrunedGemm&);
  int (*slope)(const PrunedSlope&);
  int (*stat)(const PrunedNorm&, double);
  int (*norm_backward)(const PrunedNorm&);
};
#define VK_PRUNED_TABLE(t) {t::pruned_gemm, t::pruned_slope, t::pruned_stat, t::pruned_norm_backward}
const Tier tiers[ISA_COUNT] = {
    VK_PRUNED_TABLE(portable),
#ifdef VK_HAVE_AVX2
    VK_PRUNED_TABLE(avx2),
#else
    {},
#endif
#ifdef VK_HAVE_AVX512
    VK_PRUNED_TABLE(avx512),
#else
    {},
#endif
};
const Tier& tier() { return tiers[current_tier()]; }

PrunedSource read_source(Fields& f) {
  PrunedSource s;
  s.data = f.pointer<const void>(), s.ld = f.next(), s.across = static_cast<int>(f.next());
  s.rows = f.pointer<const int32_t>(), s.cols = f.pointer<const int32_t>(), s.run = 1, s.blocks = nullptr;
  s.stat = f.pointer<const float>(), s.scale = f.pointer<const float>(), s.shift = f.pointer<const float>();
  s.group = f.next(), s.width = f.next();
  require(s.data != nullptr, "operand", 0, "a non-null pointer");
  return s;
}

// A list of channels holds numbers in [least, size): what a kernel would read or write beyond is refused here.
void check_list(const char* name, const int32_t* list, int64_t count, int64_t least, int64_t size) {
  for (int64_t i = 0; list && i < count; ++i)
    if (list[i] < least || list[i] >= size) require(false, name, list[i], ("a number below " + std::to_string(size)).c_str());
}

// Whether a list is made of aligned runs of eight.
bool in_runs(const int32_t* list, int64_t count) {
  for (int64_t i = 0; list && i < count; ++i)
    if (i % 8 ? list[i] != list[i - 1] + 1 : list[i] % 8 != 0) return false;
  return list != nullptr && count % 8 == 0;
}

template <class F>
void run_kernel(const F& kernel) {
  int failed;
  {
    py::gil_scoped_release release;
    failed = kernel();
  }
  if (failed) throw std::bad_alloc();
}

void gemm(Fields f, double) {
  PrunedGemm g{};
  g.bf16 = static_cast<int>(f.next()), g.threads = static_cast<int>(f.next());
  g.m = f.next(), g.n = f.next(), g.k = f.next();
  require(g.m >= 1 && g.n >= 1 && g.k >= 1, "product size", least_of(g.m, g.n, g.k), ">= 1");
  require(g.threads >= 1, "threads", g.threads, ">= 1");
  const int64_t sizes[4] = {f.next(), f.next(), f.next(), f.next()};  // memory rows and columns of a, then of b
  g.a = read_source(f), g.b = read_source(f);
  g.partial = f.pointer<const float>(), g.partial_ld = f.next(), g.bias = f.pointer<const float>();
  g.gate = f.pointer<const float>(), g.gate_group = f.next();
  g.act = static_cast<int>(f.next()), g.half = f.next();
  g.u = f.pointer<void>(), g.u_ld = f.next();
  g.residual = f.pointer<const void>(), g.residual_ld = f.next();
  g.out = f.pointer<void>(), g.out_ld = f.next(), g.out_width = f.next(), g.out_bf16 = static_cast<int>(f.next());
  g.out_rows = f.pointer<const int32_t>(), g.out_cols = f.pointer<const int32_t>(), g.fill = static_cast<int>(f.next());
  f.done();
  require(g.out != nullptr, "out", 0, "a non-null pointer");
  PrunedSource* both[2] = {&g.a, &g.b};
  for (int i = 0; i < 2; ++i) {
    PrunedSource& s = *both[i];
    const int64_t outer = i ? g.n : g.m;
    check_list("rows", s.rows, s.across ? g.k : outer, -1, sizes[2 * i]);
    check_list("index", s.cols, s.across ? outer : g.k, 0, sizes[2 * i + 1]);
    s.run = in_runs(s.cols, s.across ? outer : g.k) ? 8 : 1;
  }
  check_list("out_index", g.out_cols, g.act == PRUNED_SWIGLU ? g.half : g.n, 0, g.out_width);
  run_kernel([&] { return tier().gemm(g); });
}

void slope(Fields f, double) {
  PrunedSlope s{};
  s.bf16 = static_cast<int>(f.next()), s.dout_bf16 = static_cast<int>(f.next()), s.threads = static_cast<int>(f.next());
  s.m = f.next(), s.n = f.next();
  s.dout = f.pointer<const void>(), s.dout_ld = f.next(), s.u = f.pointer<const void>(), s.u_ld = f.next();
  s.cols = f.pointer<const int32_t>();
  const int64_t width = f.next();
  s.gate = f.pointer<const float>(), s.gate_group = f.next(), s.act = static_cast<int>(f.next());
  s.du = f.pointer<void>(), s.du_ld = f.next(), s.dbias = f.pointer<float>(), s.dgate = f.pointer<float>();
  f.done();
  require(s.m >= 1 && s.n >= 1 && s.threads >= 1, "size", least_of(s.m, s.n, s.threads), ">= 1");
  require(s.dout != nullptr, "dout", 0, "a non-null pointer");
  check_list("out_index", s.cols, s.act == PRUNED_SWIGLU ? s.n / 2 : s.n, 0, width);
  run_kernel([&] { return tier().slope(s); });
}

PrunedNorm read_norm(Fields& f) {
  PrunedNorm p{};
  p.bf16 = static_cast<int>(f.next()), p.threads = static_cast<int>(f.next());
  p.m = f.next(), p.k = f.next(), p.width = f.next();
  p.x = f.pointer<const void>(), p.x_ld = f.next(), p.stat = f.pointer<float>();
  require(p.m >= 1 && p.width >= 1 && p.threads >= 1, "size", least_of(p.m, p.width, p.threads), ">= 1");
  require(p.x != nullptr, "x", 0, "a non-null pointer");
  return p;
}

void stat(Fields f, double eps) {
  const PrunedNorm p = read_norm(f);
  f.done();
  run_kernel([&] { return tier().stat(p, eps); });
}

void norm_backward(Fields f, double) {
  PrunedNorm p = read_norm(f);
  p.dh = f.pointer<const void>(), p.dh_ld = f.next(), p.cols = f.pointer<const int32_t>();
  p.scale = f.pointer<const float>(), p.group = f.next();
  p.dx = f.pointer<void>(), p.dx_ld = f.next(), p.dscale = f.pointer<float>(), p.dshift = f.pointer<float>();
  f.done();
  require(p.group >= 1, "group", p.group, ">= 1");
  check_list("in_index", p.cols, p.k, 0, p.width);
  run_kernel([&] { return tier().norm_backward(p); });
}

// The two things that are done to memory between kernels: zeros, and values, from float to bfloat16 and back, with a number added.
void zero(Fields f, double) {
  void* const to = f.pointer<void>();
  const int64_t bytes = f.next();
  f.done();
  memset(to, 0, static_cast<size_t>(bytes));
}

uint16_t rounded(float v) {
  uint32_t u;
  memcpy(&u, &v, 4);
  if (v != v) return 0x7fc0;
  return static_cast<uint16_t>((u + 0x7fff + (u >> 16 & 1)) >> 16);
}

float value_at(const char* from, bool bf16, int64_t i) {
  float v;
  if (!bf16) {
    memcpy(&v, from + 4 * i, 4);
    return v;
  }
  uint16_t half;
  memcpy(&half, from + 2 * i, 2);
  const uint32_t u = static_cast<uint32_t>(half) << 16;
  memcpy(&v, &u, 4);
  return v;
}

// to[r][j] = from[r][j] + number, `to` dense.
void copy(Fields f, double number) {
  char* to = f.pointer<char>();
  const bool to_bf16 = f.next();
  const char* from = f.pointer<const char>();
  const bool from_bf16 = f.next();
  const int64_t rows = f.next(), columns = f.next(), from_ld = f.next();
  f.done();
  const float plus = static_cast<float>(number);
  const int64_t to_size = to_bf16 ? 2 : 4, from_size = from_bf16 ? 2 : 4;
  for (int64_t r = 0; r < rows; ++r, to += columns * to_size, from += from_ld * from_size) {
    if (to_bf16 == from_bf16 && number == 0) {
      memcpy(to, from, static_cast<size_t>(columns * to_size));
      continue;
    }
    for (int64_t j = 0; j < columns; ++j) {
      const float v = value_at(from, from_bf16, j) + plus;
      const uint16_t half = rounded(v);
      to_bf16 ? memcpy(to + 2 * j, &half, 2) : memcpy(to + 4 * j, &v, 4);
    }
  }
}

struct Kernel {
  const char* name;
  void (*run)(Fields, double);
};
const Kernel kernels[] = {{"pruned_gemm", gemm}, {"pruned_slope", slope}, {"pruned_stat", stat}, {"pruned_norm_backward", norm_backward},
                          {"pruned_zero", zero}, {"pruned_copy", copy}};

// What a call can depend on but the values of its tensors, as one string: of tensors (or None) type, dtype, sizes, strides, device and
// whether they ask for a gradient; of lists who they are; of the rest the types. An exception where a "tensor" has none of these.
py::bytes call_facts(const py::tuple& tensors, const py::tuple& lists, const py::tuple& rest) {
  static PyObject* const names[4] = {PyUnicode_InternFromString("dtype"), PyUnicode_InternFromString("is_cpu"),
                                     PyUnicode_InternFromString("requires_grad"), PyUnicode_InternFromString("shape")};
  static PyObject* const stride = PyUnicode_InternFromString("stride");
  std::string facts;
  facts.reserve(1024);
  const auto put = [&](const void* p) { facts.append(reinterpret_cast<const char*>(&p), sizeof p); };
  const auto got = [](PyObject* object) {
    if (!object) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
  };
  const auto put_sizes = [&](const py::object& sizes) {
    if (!PyTuple_Check(sizes.ptr())) throw py::type_error("sizes: expected a tuple");
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(sizes.ptr()); ++i) {
      const int64_t n = PyLong_AsLongLong(PyTuple_GET_ITEM(sizes.ptr(), i));
      if (n == -1 && PyErr_Occurred()) throw py::error_already_set();
      facts.append(reinterpret_cast<const char*>(&n), sizeof n);
    }
    put(nullptr);
  };
  for (const auto& t : tensors) {
    put(Py_TYPE(t.ptr()));
    if (t.is_none()) continue;
    // These are singletons.
    for (int i = 0; i < 3; ++i) put(got(PyObject_GetAttr(t.ptr(), names[i])).ptr());
    put_sizes(got(PyObject_GetAttr(t.ptr(), names[3])));
    put_sizes(got(PyObject_CallMethodNoArgs(t.ptr(), stride)));
  }
  for (const auto& list : lists) put(list.ptr());
  for (const auto& value : rest) put(Py_TYPE(value.ptr()));
  if (PyObject_Hash(rest.ptr()) == -1) throw py::error_already_set();  // it is a part of the key too
  return py::bytes(facts);
}

// Kernels in their order, on tensors that are handed in and on memory of its own that lasts for a run.
class Program {
 public:
  // steps: (kernel, fields, ((field, slot, bytes into it), ...), number). Slots below `given` are handed in, the others are scratch of so
  // many bytes each.
  Program(const py::sequence& steps, size_t given, const py::sequence& scratch) : given_(given) {
    for (const auto& bytes : scratch) {
      offsets_.push_back(scratch_);
      scratch_ += (bytes.cast<size_t>() + 63) / 64 * 64;
    }
    for (const auto& item : steps) {
      const auto step = item.cast<py::tuple>();
      Step made{find(step[0].cast<std::string>()), {}, {}, step[3].cast<double>()};
      Fields f(step[1].cast<py::tuple>());
      for (size_t i = 0; i < py::len(step[1]); ++i) made.fields.push_back(f.next());
      for (const auto& place : step[2].cast<py::tuple>()) {
        const auto p = place.cast<py::tuple>();
        made.places.push_back(Place{p[0].cast<size_t>(), p[1].cast<size_t>(), p[2].cast<int64_t>()});
        const bool known = made.places.back().field < made.fields.size() && made.places.back().slot < given_ + offsets_.size();
        if (!known) throw py::value_error("places: a field or slot that does not exist, expected those of the step");
      }
      steps_.push_back(std::move(made));
    }
  }

  // False, and nothing done, where something that was handed in has no memory.
  bool run(const py::tuple& tensors) const {
    require(tensors.size() == given_, "tensors", static_cast<int64_t>(tensors.size()), std::to_string(given_).c_str());
    std::vector<int64_t> slots(given_ + offsets_.size());
    for (size_t i = 0; i < given_; ++i) {
      slots[i] = address_of(PyTuple_GET_ITEM(tensors.ptr(), static_cast<Py_ssize_t>(i)));
      if (!slots[i]) return false;
    }
    std::unique_ptr<char, decltype(&free)> memory(static_cast<char*>(scratch_ ? malloc(scratch_ + 63) : nullptr), free);
    if (scratch_ && !memory) throw std::bad_alloc();
    const int64_t start = (reinterpret_cast<int64_t>(memory.get()) + 63) / 64 * 64;
    for (size_t i = 0; i < offsets_.size(); ++i) slots[given_ + i] = start + static_cast<int64_t>(offsets_[i]);
    std::vector<int64_t> fields;
    for (const Step& step : steps_) {
      fields = step.fields;
      for (const Place& p : step.places) fields[p.field] = slots[p.slot] + p.offset;
      step.kernel(Fields(fields.data(), fields.size()), step.number);
    }
    return true;
  }

 private:
  struct Place {
    size_t field, slot;
    int64_t offset;
  };
  struct Step {
    void (*kernel)(Fields, double);
    std::vector<int64_t> fields;
    std::vector<Place> places;
    double number;
  };
  static void (*find(const std::string& name))(Fields, double) {
    for (const Kernel& k : kernels)
      if (name == k.name) return k.run;
    throw py::value_error("step: '" + name + "', expected the name of a kernel");
  }

  size_t given_, scratch_ = 0;
  std::vector<size_t> offsets_;
  std::vector<Step> steps_;
};

}  // namespace

void bind_pruned(py::module_& m) {
  for (const Kernel& k : kernels) {
    const auto run = k.run;
    m.def(k.name, [run](const py::tuple& fields, double number) { run(Fields(fields), number); }, py::arg("fields"), py::arg("number") = 0.);
  }
  m.def("call_facts", &call_facts, py::arg("tensors"), py::arg("lists"), py::arg("rest"),
        "What a call can depend on but the values of its tensors and of the rest, as bytes.");
  py::class_<Program>(m, "PrunedProgram", "Kernels in their order, run by one call.")
      .def(py::init<const py::sequence&, size_t, const py::sequence&>(), py::arg("steps"), py::arg("given"), py::arg("scratch"))
      .def("run", &Program::run, py::arg("tensors"), "Run on these tensors. False, with nothing done, if one has no memory.");
}

}  // namespace vk
