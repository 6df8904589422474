// What the files that see Python share: reading the fields of a call.
#pragma once

#include <pybind11/pybind11.h>

#include <string>

#include "cpu/cpuid.h"
#include "cpu/grid_attention.h"

namespace vk {

namespace py = pybind11;

int current_tier();  // Isa in use
void bind_pruned(py::module_& m);
void bind_amf(py::module_& m);

inline void require(bool ok, const char* name, int64_t value, const char* expectation) {
  if (!ok) throw py::value_error(std::string(name) + ": " + std::to_string(value) + ", expected " + expectation);
}

inline int64_t least_of(int64_t a, int64_t b, int64_t c) { return a < b ? (a < c ? a : c) : (b < c ? b : c); }

// An address: that of a tensor's first element, or the integer that is given; 0 for None.
inline int64_t address_of(PyObject* object) {
  if (object == Py_None) return 0;
  if (!PyLong_Check(object)) {
    static PyObject* const name = PyUnicode_InternFromString("data_ptr");
    const py::object address = py::reinterpret_steal<py::object>(PyObject_CallMethodNoArgs(object, name));
    if (!address) throw py::error_already_set();
    return address_of(address.ptr());
  }
  const int64_t v = PyLong_AsLongLong(object);
  if (v == -1 && PyErr_Occurred()) throw py::error_already_set();
  return v;
}

// Reads the fields of a call one after the other: of a tuple of integers (and tensors, which stand for their addresses), or of integers.
class Fields {
 public:
  explicit Fields(const py::tuple& t) : tuple_(t.ptr()), size_(PyTuple_GET_SIZE(t.ptr())) {}
  Fields(const int64_t* values, size_t size) : values_(values), size_(static_cast<Py_ssize_t>(size)) {}
  int64_t next() {
    if (at_ >= size_) throw py::value_error("argument tuple: " + std::to_string(size_) + " fields, expected more");
    const Py_ssize_t at = at_++;
    return values_ ? values_[at] : address_of(PyTuple_GET_ITEM(tuple_, at));
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
  PyObject* tuple_ = nullptr;
  const int64_t* values_ = nullptr;
  Py_ssize_t size_, at_ = 0;
};

}  // namespace vk
