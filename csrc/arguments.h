// Argument checks that all bindings share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>

#include "array_view.h"
#include "errors.h"

namespace megatron_dwm {

namespace py = pybind11;

// The view stays valid for as long as `object` is alive: keep the argument in scope.
template <typename T>
ArrayView<T> view_of(const py::handle& object, const char* name, const char* dtype_name) {
  if (!py::isinstance<py::array>(object)) {
    fail(std::string(name) + ": expected a NumPy array of " + dtype_name + ", found " +
         Py_TYPE(object.ptr())->tp_name);
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  // array_t's own check compares the kind, size and byte order of the element type.
  if (array.ndim() != 1 || !py::array_t<T, 0>::check_(object)) {
    fail(std::string(name) + ": expected a one-dimensional array of " + dtype_name + ", found " +
         std::to_string(array.ndim()) + " dimension(s) of " + std::string(py::str(array.dtype())));
  }
  return ArrayView<T>(static_cast<const char*>(array.data()), array.shape(0), array.strides(0));
}

// As view_of, for an argument that may be None.
template <typename T>
std::optional<ArrayView<T>> optional_view_of(const py::handle& object, const char* name,
                                             const char* dtype_name) {
  if (object.is_none()) {
    return std::nullopt;
  }
  return view_of<T>(object, name, dtype_name);
}

inline int64_t int64_of(const py::handle& object, const char* name) {
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!number) {
    PyErr_Clear();
    fail(std::string(name) + ": expected an integer, found " + Py_TYPE(object.ptr())->tp_name);
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0) {
    fail(std::string(name) + ": " + std::string(py::str(number)) +
         " does not fit in a signed 64-bit integer");
  }
  return value;
}

// An integer in [low, high].
inline int64_t int64_of(const py::handle& object, const char* name, int64_t low,
                        int64_t high = INT64_MAX) {
  const int64_t value = int64_of(object, name);
  if (value < low) {
    fail(std::string(name) + ": expected at least " + std::to_string(low) + ", found " +
         std::to_string(value));
  }
  if (value > high) {
    fail(std::string(name) + ": expected at most " + std::to_string(high) + ", found " +
         std::to_string(value));
  }
  return value;
}

inline int threads_of(const py::handle& object) {
  return static_cast<int>(int64_of(object, "threads", 0, 4096));
}

}  // namespace megatron_dwm
