// Python face of layout.h and pack.h.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "bindings.h"
#include "layout.h"
#include "pack.h"

namespace megatron_dwm {
namespace {

// The four arrays that describe the entries, as the caller passed them.
struct EntryArguments {
  const py::object& documents;
  const py::object& lengths;
  const py::object& starts;
  const py::object& stops;

  template <typename Id>
  Entries<Id> entries(const char* dtype_name) const {
    return Entries<Id>(view_of<Id>(documents, "entry_documents", dtype_name),
                       view_of<int32_t>(lengths, "sequence_lengths", "int32"),
                       optional_view_of<int32_t>(starts, "starts", "int32"),
                       optional_view_of<int32_t>(stops, "stops", "int32"));
  }

  // Calls use(entries) with the type of number that the documents have.
  template <typename Use>
  auto visit(const Use& use) const {
    if (py::isinstance<py::array>(documents) && py::array_t<int32_t, 0>::check_(documents)) {
      return use(entries<int32_t>("int32 or int64"));
    }
    return use(entries<int64_t>("int32 or int64"));
  }
};

template <typename Index>
py::array sample_rows(const Layout& layout, int64_t sequence_length, bool add_extra_token,
                      int threads) {
  const int64_t samples = num_samples(layout.total(), sequence_length, add_extra_token);
  py::array_t<Index> result({samples + 1, int64_t{2}});
  Index* const rows = result.mutable_data();
  const py::gil_scoped_release release;
  fill_sample_index(layout, sequence_length, add_extra_token, samples, threads, rows);
  return std::move(result);
}

py::array py_sample_index(const py::object& documents, const py::object& lengths,
                          const py::object& sequence_length_arg, bool add_extra_token,
                          const py::object& starts, const py::object& stops,
                          const py::object& threads_arg) {
  const int64_t sequence_length = int64_of(sequence_length_arg, "sequence_length", 1, kMaxTokens);
  const int threads = threads_of(threads_arg);
  return EntryArguments{documents, lengths, starts, stops}.visit([&](const auto& entries) {
    Layout layout;
    {
      const py::gil_scoped_release release;
      layout = lay_out(entries, threads, true);
    }
    // Offsets are lengths of sequences, which fit; positions of entries may not.
    return layout.size <= INT32_MAX
               ? sample_rows<int32_t>(layout, sequence_length, add_extra_token, threads)
               : sample_rows<int64_t>(layout, sequence_length, add_extra_token, threads);
  });
}

int64_t py_epoch_tokens(const py::object& documents, const py::object& lengths,
                        const py::object& starts, const py::object& stops,
                        const py::object& threads_arg) {
  const int threads = threads_of(threads_arg);
  return EntryArguments{documents, lengths, starts, stops}.visit([&](const auto& entries) {
    const py::gil_scoped_release release;
    return lay_out(entries, threads, false).total();
  });
}

py::tuple py_remaining(const py::object& documents, const py::object& lengths,
                       const py::object& starts, const py::object& stops,
                       const py::object& first_token_arg, const py::object& sequence_length_arg,
                       const py::object& consumed_arg, const py::object& threads_arg) {
  const int64_t first_token = int64_of(first_token_arg, "first_token");
  const int64_t sequence_length = int64_of(sequence_length_arg, "sequence_length", 1, kMaxTokens);
  const Consumption consumption(first_token, sequence_length,
                                view_of<uint8_t>(consumed_arg, "consumed", "uint8"));
  const int threads = threads_of(threads_arg);
  return EntryArguments{documents, lengths, starts, stops}.visit([&](const auto& entries) {
    py::array_t<uint8_t> begun(entries.size());
    uint8_t* const begun_out = begun.mutable_data();
    std::vector<std::vector<Piece>> chunks;
    int64_t size = 0;
    {
      const py::gil_scoped_release release;
      const Layout layout = lay_out(entries, threads, true);
      chunks = remaining(entries, layout, consumption, threads, begun_out);
      for (const std::vector<Piece>& chunk : chunks) {
        size += static_cast<int64_t>(chunk.size());
      }
    }
    py::array_t<int64_t> piece_entry(size);
    py::array_t<int32_t> piece_start(size), piece_stop(size);
    int64_t* entry_out = piece_entry.mutable_data();
    int32_t* start_out = piece_start.mutable_data();
    int32_t* stop_out = piece_stop.mutable_data();
    {
      const py::gil_scoped_release release;
      for (const std::vector<Piece>& chunk : chunks) {
        for (const Piece& piece : chunk) {
          *entry_out++ = piece.entry;
          *start_out++ = piece.start;
          *stop_out++ = piece.stop;
        }
      }
    }
    return py::make_tuple(begun, piece_entry, piece_start, piece_stop);
  });
}

}  // namespace

void bind_pack(py::module_& module) {
  module.def("sample_index", &py_sample_index, py::arg("entry_documents"),
             py::arg("sequence_lengths"), py::arg("sequence_length"),
             py::arg("add_extra_token") = true, py::arg("starts") = py::none(),
             py::arg("stops") = py::none(), py::arg("threads") = 0,
             R"(Where each packed sample begins: what Megatron's `build_sample_idx` builds.

Entry p takes the tokens [starts[p], stops[p]) of sequence entry_documents[p]; the entries are
laid end to end and cut every `sequence_length` tokens. The last partial sample is dropped.

Args:
    entry_documents: `[P]` int32 or int64, the sequences in the order in which they are visited.
    sequence_lengths: `[S]` int32, tokens per sequence.
    sequence_length: Tokens per sample.
    add_extra_token: Whether a sample needs one more token than it advances by (its last label).
    starts: `[P]` int32 or None for 0.
    stops: `[P]` int32 or None for the lengths.
    threads: 0 for all cores; the result does not depend on it.

Returns:
    `[N + 1, 2]`: row k < N holds the entry in which sample k begins and the offset of its first
    token, counted from starts[entry]; row N says where the last sample ends. Without the extra
    token, a sample that begins where an entry ends is named by that end. int32, or int64 for
    2^31 entries and more.

Raises:
    ValueError: An argument is malformed; the first bad entry is named.)");

  module.def("epoch_tokens", &py_epoch_tokens, py::arg("entry_documents"),
             py::arg("sequence_lengths"), py::arg("starts") = py::none(),
             py::arg("stops") = py::none(), py::arg("threads") = 0,
             R"(Number of tokens of all entries; arguments and errors as in `sample_index`.)");

  module.def("remaining", &py_remaining, py::arg("entry_documents"), py::arg("sequence_lengths"),
             py::arg("starts"), py::arg("stops"), py::arg("first_token"),
             py::arg("sequence_length"), py::arg("consumed"), py::arg("threads") = 0,
             R"(Which entries have been begun, and what is left of them.

The entries are laid end to end from token 0 on; sample k holds the tokens
[first_token + k * sequence_length, first_token + (k + 1) * sequence_length). Tokens before the
first sample count as consumed, those after the last one as not consumed.

Args:
    entry_documents: `[P]` int32 or int64, as in `sample_index`.
    sequence_lengths: `[S]` int32, tokens per sequence.
    starts: `[P]` int32 or None for 0.
    stops: `[P]` int32 or None for the lengths.
    first_token: First token of sample 0; may be negative.
    sequence_length: Tokens per sample.
    consumed: `[N]` uint8, whether each sample has been consumed.
    threads: 0 for all cores; the result does not depend on it.

Returns:
    begun: `[P]` uint8, 1 when a token of the entry has been consumed. An entry without tokens
        counts as begun when the token that follows it has been consumed.
    piece_entry: `[K]` int64, ascending.
    piece_start: `[K]` int32.
    piece_stop: `[K]` int32; the longest ranges [piece_start, piece_stop) of tokens of begun
        entries that have not been consumed, counted from the beginning of the sequence.

Raises:
    ValueError: An argument is malformed; the first bad entry is named.)");
}

}  // namespace megatron_dwm
