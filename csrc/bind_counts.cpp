// Python face of expected.h, systematic.h and independent.h.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cmath>
#include <cstdint>
#include <optional>
#include <string>

#include "arguments.h"
#include "bindings.h"
#include "expected.h"
#include "independent.h"
#include "systematic.h"

namespace megatron_dwm {
namespace {

double py_expected_scale(const py::object& weights_arg, const py::object& num_draws_arg,
                         const py::object& max_repeats_arg, const py::object& threads_arg) {
  const auto weights = view_of<float>(weights_arg, "weights", "float32");
  const int64_t num_draws = int64_of(num_draws_arg, "num_draws", 0);
  const int64_t max_repeats = int64_of(max_repeats_arg, "max_repeats", 0, INT32_MAX);
  const int threads = threads_of(threads_arg);
  const py::gil_scoped_release release;
  return expected_scale(weights, num_draws, max_repeats, threads);
}

py::array_t<int32_t> py_systematic_counts(const py::object& weights_arg, double scale,
                                          const py::object& seed_arg, const py::object& epoch_arg,
                                          const py::object& max_repeats_arg,
                                          const py::object& consumed_arg,
                                          const py::object& threads_arg) {
  const auto weights = view_of<float>(weights_arg, "weights", "float32");
  if (!(scale >= 0.0 && std::isfinite(scale))) {
    fail("scale: expected a finite number >= 0, found " + number(scale));
  }
  const int64_t seed = int64_of(seed_arg, "seed");
  const int64_t epoch = int64_of(epoch_arg, "epoch");
  const int64_t max_repeats = int64_of(max_repeats_arg, "max_repeats", 0, INT32_MAX);
  const auto consumed = optional_view_of<int32_t>(consumed_arg, "consumed", "int32");
  if (consumed && consumed->size() != weights.size()) {
    fail("consumed: " + std::to_string(consumed->size()) + " entries for " +
         std::to_string(weights.size()) + " weights");
  }
  const int threads = threads_of(threads_arg);
  py::array_t<int32_t> result(weights.size());
  int32_t* const counts = result.mutable_data();
  const py::gil_scoped_release release;
  systematic_counts(ExpectedCounts(weights, scale, max_repeats, consumed),
                    static_cast<uint64_t>(seed), static_cast<uint64_t>(epoch), threads, counts);
  return result;
}

py::array_t<int32_t> py_independent_counts(const py::object& weights_arg,
                                           const py::object& num_draws_arg,
                                           const py::object& seed_arg, const py::object& epoch_arg,
                                           const py::object& threads_arg) {
  const auto weights = view_of<float>(weights_arg, "weights", "float32");
  const int64_t num_draws = int64_of(num_draws_arg, "num_draws", 0);
  const int64_t seed = int64_of(seed_arg, "seed");
  const int64_t epoch = int64_of(epoch_arg, "epoch");
  const int threads = threads_of(threads_arg);
  py::array_t<int32_t> result(weights.size());
  int32_t* const counts = result.mutable_data();
  const py::gil_scoped_release release;
  independent_counts(weights, num_draws, static_cast<uint64_t>(seed), static_cast<uint64_t>(epoch),
                     threads, counts);
  return result;
}

}  // namespace

void bind_counts(py::module_& module) {
  module.def("expected_scale", &py_expected_scale, py::arg("weights"), py::arg("num_draws"),
             py::arg("max_repeats") = 0, py::arg("threads") = 0,
             R"(The scale that makes the expected counts add up.

Args:
    weights: `[D]` float32, finite and >= 0.
    num_draws: Number of draws of an epoch.
    max_repeats: Cap on the expected count of a document; what it cuts off goes to the others in
        proportion to their weights. 0 for no cap.
    threads: 0 for all cores.

Returns:
    The scale with sum over d of min(scale * weights[d], max_repeats) = num_draws.

Raises:
    ValueError: A weight is not finite or negative (the first one is named), all are 0, or the
        cap leaves fewer draws than num_draws.)");

  module.def("systematic_counts", &py_systematic_counts, py::arg("weights"), py::arg("scale"),
             py::arg("seed"), py::arg("epoch"), py::arg("max_repeats") = 0,
             py::arg("consumed") = py::none(), py::arg("threads") = 0,
             R"(How often each document is drawn: its expected count, rounded down or up.

The expected count is e = max(0, min(scale * weight, max_repeats) - consumed); the count is
ceil(e) with the probability of e's fraction, and floor(e) otherwise. All counts together differ
by less than 1 from the sum of the expected counts, and not at all when that is an integer (but
for rounding).

Args:
    weights: `[D]` float32, finite and >= 0.
    scale: See `expected_scale`.
    seed: Any signed 64-bit integer.
    epoch: Any signed 64-bit integer.
    max_repeats: Cap on the expected count, 0 for none.
    consumed: `[D]` int32 >= 0, draws that have been used up, or None.
    threads: 0 for all cores; the result does not depend on it.

Returns:
    `[D]` int32.

Raises:
    ValueError: An argument is malformed (the first bad entry is named), or a count does not
        fit.)");

  module.def("independent_counts", &py_independent_counts, py::arg("weights"),
             py::arg("num_draws"), py::arg("seed"), py::arg("epoch"), py::arg("threads") = 0,
             R"(How often each document comes up in independent draws with replacement.

Args:
    weights: `[D]` float32, finite and >= 0.
    num_draws: Number of draws.
    seed: Any signed 64-bit integer.
    epoch: Any signed 64-bit integer.
    threads: 0 for all cores; the result does not depend on it.

Returns:
    `[D]` int32 with the sum num_draws.

Raises:
    ValueError: An argument is malformed (the first bad entry is named), or a count does not
        fit.)");
}

}  // namespace megatron_dwm
