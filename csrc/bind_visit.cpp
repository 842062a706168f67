// Python face of visit.h.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "arguments.h"
#include "bindings.h"
#include "permutation.h"
#include "visit.h"

namespace megatron_dwm {
namespace {

template <typename Id>
py::array fill(const ArrayView<int32_t>& counts, const std::vector<int64_t>& starts,
               const Permutation& order, int64_t first_document, int threads) {
  py::array_t<Id> result(order.size());
  Id* const out = result.mutable_data();
  const py::gil_scoped_release release;
  visit_order(counts, starts, order, first_document, threads, out);
  return std::move(result);
}

py::array py_visit_order(const py::object& counts_arg, const py::object& seed_arg,
                         const py::object& epoch_arg, const py::object& threads_arg,
                         const py::object& first_document_arg, const py::object& extra_arg) {
  const auto counts = view_of<int32_t>(counts_arg, "counts", "int32");
  const int64_t seed = int64_of(seed_arg, "seed");
  const int64_t epoch = int64_of(epoch_arg, "epoch");
  const int threads = threads_of(threads_arg);
  const int64_t first_document =
      int64_of(first_document_arg, "first_document", 0, Permutation::kMaxSize);
  const int64_t extra = int64_of(extra_arg, "extra", 0, Permutation::kMaxSize);
  std::vector<int64_t> starts;
  {
    const py::gil_scoped_release release;
    starts = draw_starts(counts, threads);
  }
  const int64_t size = checked_add(starts.back(), extra, "counts: the sum, with extra");
  if (size > Permutation::kMaxSize) {
    fail("counts: " + std::to_string(size) + " draws are more than 2^62");
  }
  const Permutation order(size, static_cast<uint64_t>(seed), static_cast<uint64_t>(epoch),
                          kDocuments);
  const int64_t end = checked_add(first_document, counts.size(), "first_document");
  if (end <= INT32_MAX && extra <= INT32_MAX) {
    return fill<int32_t>(counts, starts, order, first_document, threads);
  }
  return fill<int64_t>(counts, starts, order, first_document, threads);
}

}  // namespace

void bind_visit(py::module_& module) {
  module.def("visit_order", &py_visit_order, py::arg("counts"), py::arg("seed"), py::arg("epoch"),
             py::arg("threads") = 0, py::arg("first_document") = 0, py::arg("extra") = 0,
             R"(The drawn documents in the order in which they are visited.

Args:
    counts: `[D]` int32 >= 0, how often each document is visited.
    seed: Any signed 64-bit integer.
    epoch: Any signed 64-bit integer.
    threads: 0 for all cores; the result does not depend on it.
    first_document: Number of the document that counts[0] is about.
    extra: How many left-over pieces to mix in: the numbers -1, -2, ..., -extra.

Returns:
    `[n]` with n = sum(counts) + extra, every document as often as its count says, in the order
    of `Permutation(n, seed, epoch, DOCUMENTS)` over the draws sorted by document, with the
    left-over pieces last. int32, or int64 when a number does not fit.

Raises:
    ValueError: An argument is malformed; the first bad entry is named.)");
}

}  // namespace megatron_dwm
