// Python face of permutation.h.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <string>

#include "arguments.h"
#include "bindings.h"
#include "parallel.h"
#include "permutation.h"

namespace megatron_dwm {
namespace {

constexpr int64_t kChunk = 1 << 14;

class PyPermutation {
 public:
  PyPermutation(const py::object& size, const py::object& seed, const py::object& epoch,
                const py::object& stream)
      : size_(int64_of(size, "n", 0, Permutation::kMaxSize)),
        seed_(int64_of(seed, "seed")),
        epoch_(int64_of(epoch, "epoch")),
        stream_(int64_of(stream, "stream", 0, UINT32_MAX)),
        permutation_(size_, static_cast<uint64_t>(seed_), static_cast<uint64_t>(epoch_),
                     static_cast<uint64_t>(stream_)) {}

  int64_t size() const { return size_; }

  template <bool kInverse>
  int64_t one(const py::object& index_arg) const {
    const int64_t index = int64_of(index_arg, "index");
    if (index < 0 || index >= size_) {
      throw py::index_error("index: " + std::to_string(index) + " is not in [0, " +
                            std::to_string(size_) + ")");
    }
    uint64_t value = static_cast<uint64_t>(index);
    permutation_.map_batch<kInverse>(&value, 1);
    return static_cast<int64_t>(value);
  }

  template <bool kInverse>
  py::array_t<int64_t> many(const py::object& indices_arg, const py::object& threads_arg) const {
    const auto indices = view_of<int64_t>(indices_arg, "indices", "int64");
    const int threads = threads_of(threads_arg);
    py::array_t<int64_t> result(indices.size());
    int64_t* const out = result.mutable_data();
    const py::gil_scoped_release release;
    parallel_chunks(indices.size(), kChunk, threads, [&](int64_t, int64_t begin, int64_t end) {
      uint64_t batch[Permutation::kBatch];
      for (int64_t from = begin; from < end; from += Permutation::kBatch) {
        const int count = static_cast<int>(std::min<int64_t>(Permutation::kBatch, end - from));
        for (int i = 0; i < count; ++i) {
          const int64_t index = indices[from + i];
          if (index < 0 || index >= size_) {
            fail(entry("indices", from + i) + ": " + std::to_string(index) + " is not in [0, " +
                 std::to_string(size_) + ")");
          }
          batch[i] = static_cast<uint64_t>(index);
        }
        permutation_.map_batch<kInverse>(batch, count);
        for (int i = 0; i < count; ++i) {
          out[from + i] = static_cast<int64_t>(batch[i]);
        }
      }
    });
    return result;
  }

  py::tuple state() const { return py::make_tuple(size_, seed_, epoch_, stream_); }

  static PyPermutation from_state(const py::tuple& state) {
    if (state.size() != 4) {
      fail("Permutation: the pickle has " + std::to_string(state.size()) + " numbers, expected 4");
    }
    return PyPermutation(state[0], state[1], state[2], state[3]);
  }

  std::string repr() const {
    return "Permutation(n=" + std::to_string(size_) + ", seed=" + std::to_string(seed_) +
           ", epoch=" + std::to_string(epoch_) + ", stream=" + std::to_string(stream_) + ")";
  }

 private:
  int64_t size_, seed_, epoch_, stream_;
  Permutation permutation_;
};

}  // namespace

void bind_permutation(py::module_& module) {
  module.attr("DOCUMENTS") = static_cast<int64_t>(kDocuments);
  module.attr("SAMPLES") = static_cast<int64_t>(kSamples);

  py::class_<PyPermutation>(module, "Permutation",
                            R"(A keyed bijection of [0, n) in O(1) memory, the same on any machine.

`permutation[i]` is the element at position i; `inverse` leads back. Equal arguments give equal
permutations; a change of any argument gives an unrelated one.

Args:
    n: Number of elements, 0 to 2^62.
    seed: Any signed 64-bit integer.
    epoch: Any signed 64-bit integer.
    stream: Keeps uses of one (seed, epoch) apart, 0 to 2^32 - 1. `DOCUMENTS` (0) is the one of
        `visit_order`, `SAMPLES` (1) is for the order of samples.

Raises:
    ValueError: An argument is out of range.)")
      .def(py::init<const py::object&, const py::object&, const py::object&, const py::object&>(),
           py::arg("n"), py::arg("seed"), py::arg("epoch"), py::arg("stream"))
      .def("__len__", &PyPermutation::size)
      .def("__repr__", &PyPermutation::repr)
      .def("__getitem__", &PyPermutation::one<false>, py::arg("index"),
           "Element at a position; IndexError when it is negative or not below n.")
      .def("inverse", &PyPermutation::one<true>, py::arg("index"),
           "Position of an element; IndexError when it is negative or not below n.")
      .def("many", &PyPermutation::many<false>, py::arg("indices"), py::arg("threads") = 0,
           "Elements at `[k]` int64 positions, as `[k]` int64; ValueError names the first that is "
           "not in [0, n).")
      .def("many_inverse", &PyPermutation::many<true>, py::arg("indices"), py::arg("threads") = 0,
           "Positions of `[k]` int64 elements, as `[k]` int64; ValueError names the first that is "
           "not in [0, n).")
      .def(py::pickle([](const PyPermutation& self) { return self.state(); },
                      [](const py::tuple& state) { return PyPermutation::from_state(state); }));
}

}  // namespace megatron_dwm
