// Read access to arrays of any stride and alignment, without Python.
#pragma once

#include <cstdint>
#include <cstring>

namespace megatron_dwm {

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

  // Starts loading an element that will be read soon. The index must be in range.
  void prefetch(int64_t index) const { __builtin_prefetch(data_ + index * stride_); }

 private:
  const char* data_;
  int64_t size_;
  int64_t stride_;
};

}  // namespace megatron_dwm
