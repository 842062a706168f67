// Read access to NumPy arrays, and the argument checks that all kernels share.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>

namespace megatron_dwm {

namespace py = pybind11;

// A one-dimensional view that needs no Python object, so that it is safe without the GIL.
//
// Elements are loaded with memcpy because Megatron's .idx header is 34 bytes long: the
// arrays behind it are misaligned, and dereferencing a misaligned pointer is undefined.
template <typename T>
class ArrayView {
 public:
  ArrayView(const char* data, int64_t size, int64_t stride)
      : data_(data), size_(size), stride_(stride) {}

  int64_t size() const { return size_; }

  T operator[](int64_t index) const {
    T value;
    std::memcpy(&value, data_ + index * stride_, sizeof(T));
    return value;
  }

 private:
  const char* data_;
  int64_t size_;
  int64_t stride_;
};

// The view stays valid for as long as `object` is alive: keep the argument in scope.
template <typename T>
ArrayView<T> view_of(const py::handle& object, const char* name, const char* dtype_name) {
  if (!py::isinstance<py::array>(object)) {
    throw std::invalid_argument(std::string(name) + ": expected a NumPy array of " + dtype_name +
                                ", found " + Py_TYPE(object.ptr())->tp_name);
  }
  const auto array = py::reinterpret_borrow<py::array>(object);
  // array_t's own check compares the kind, size and byte order of the element type.
  if (array.ndim() != 1 || !py::array_t<T, 0>::check_(object)) {
    throw std::invalid_argument(std::string(name) + ": expected a one-dimensional array of " +
                                dtype_name + ", found " + std::to_string(array.ndim()) +
                                " dimension(s) of " + std::string(py::str(array.dtype())));
  }
  return ArrayView<T>(static_cast<const char*>(array.data()), array.shape(0), array.strides(0));
}

inline int64_t int64_of(const py::handle& object, const char* name) {
  const auto number = py::reinterpret_steal<py::object>(PyNumber_Index(object.ptr()));
  if (!number) {
    PyErr_Clear();
    throw std::invalid_argument(std::string(name) + ": expected an integer, found " +
                                Py_TYPE(object.ptr())->tp_name);
  }
  int overflow = 0;
  const long long value = PyLong_AsLongLongAndOverflow(number.ptr(), &overflow);
  if (overflow != 0) {
    throw std::invalid_argument(std::string(name) + ": " + std::string(py::str(number)) +
                                " does not fit in a signed 64-bit integer");
  }
  return value;
}

// "name[index]" for error messages.
inline std::string entry(const char* name, int64_t index) {
  return std::string(name) + "[" + std::to_string(index) + "]";
}

}  // namespace megatron_dwm
