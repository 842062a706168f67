// Index kernels of the data engine: everything that would otherwise be a Python loop over
// the documents or samples of a corpus.
//
// Shapes: S sequences, D documents, P visited documents, N samples.
// Megatron's .idx stores one length and one byte pointer per sequence, and D + 1 sequence
// numbers that say where each document begins; a document may have several sequences.
//
// The loops of this file are single passes that read a few bytes per step, so memory sets their
// speed and threads would not help. The bind_*.cpp files hold what weighted sampling needs.
// Input that cannot be right throws std::invalid_argument (ValueError in Python) with the name
// of the argument and of its first bad entry.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>

#include "arguments.h"
#include "bindings.h"

namespace megatron_dwm {
namespace {

// Document k holds the sequences [document_indices[k], document_indices[k + 1]).
void check_document_indices(const ArrayView<int64_t>& document_indices, int64_t num_sequences) {
  const int64_t size = document_indices.size();
  if (size == 0) {
    fail("document_indices: expected at least one entry (number of documents + 1), found none");
  }
  if (document_indices[0] != 0) {
    fail("document_indices[0]: expected 0, found " + std::to_string(document_indices[0]));
  }
  for (int64_t i = 1; i < size; ++i) {
    const int64_t value = document_indices[i];
    if (value < document_indices[i - 1]) {
      fail(entry("document_indices", i) + ": " + std::to_string(value) +
           " is less than the entry before it, " + std::to_string(document_indices[i - 1]));
    }
    if (value > num_sequences) {
      fail(entry("document_indices", i) + ": " + std::to_string(value) + " is beyond the " +
           std::to_string(num_sequences) + " sequences");
    }
  }
  if (document_indices[size - 1] != num_sequences) {
    fail(entry("document_indices", size - 1) + ": the last entry is " +
         std::to_string(document_indices[size - 1]) + ", expected the number of sequences, " +
         std::to_string(num_sequences));
  }
}

py::array_t<int64_t> document_token_prefix_sums(const py::object& sequence_lengths,
                                                const py::object& document_indices) {
  const auto lengths = view_of<int32_t>(sequence_lengths, "sequence_lengths", "int32");
  const auto documents = view_of<int64_t>(document_indices, "document_indices", "int64");
  py::array_t<int64_t> result(documents.size());
  int64_t* const sums = result.mutable_data();

  py::gil_scoped_release release;
  check_document_indices(documents, lengths.size());
  int64_t tokens = 0;
  sums[0] = 0;
  for (int64_t document = 0; document + 1 < documents.size(); ++document) {
    const int64_t end = documents[document + 1];
    for (int64_t sequence = documents[document]; sequence < end; ++sequence) {
      const int32_t length = lengths[sequence];
      check_length(length, sequence);
      tokens = checked_add(tokens, length, "sequence_lengths: the number of tokens");
    }
    sums[document + 1] = tokens;
  }
  return result;
}

void check_prefix_sums(const ArrayView<int64_t>& prefix_sums) {
  if (prefix_sums.size() == 0) {
    fail("prefix_sums: expected at least one entry (number of documents + 1), found none");
  }
  if (prefix_sums[0] != 0) {
    fail("prefix_sums[0]: expected 0, found " + std::to_string(prefix_sums[0]));
  }
  for (int64_t i = 1; i < prefix_sums.size(); ++i) {
    if (prefix_sums[i] < prefix_sums[i - 1]) {
      fail(entry("prefix_sums", i) + ": " + std::to_string(prefix_sums[i]) +
           " is less than the entry before it, " + std::to_string(prefix_sums[i - 1]));
    }
  }
}

// The documents in the order in which they are visited. Without an order, position and
// document number are the same.
class Visit {
 public:
  Visit(const ArrayView<int64_t>& prefix_sums, const std::optional<ArrayView<int64_t>>& order)
      : prefix_sums_(prefix_sums), order_(order) {}

  int64_t size() const { return order_ ? order_->size() : prefix_sums_.size() - 1; }

  int64_t tokens_at(int64_t position) const {
    const int64_t document = order_ ? (*order_)[position] : position;
    return prefix_sums_[document + 1] - prefix_sums_[document];
  }

  // Checks every entry of the order, so that tokens_at may trust them.
  int64_t total_tokens() const {
    const int64_t num_documents = prefix_sums_.size() - 1;
    if (!order_) {
      return prefix_sums_[num_documents];
    }
    int64_t total = 0;
    for (int64_t i = 0; i < order_->size(); ++i) {
      const int64_t document = (*order_)[i];
      if (document < 0 || document >= num_documents) {
        fail(entry("document_order", i) + ": " + std::to_string(document) +
             " is not one of the " + std::to_string(num_documents) + " documents");
      }
      total = checked_add(total, tokens_at(i), "document_order: the number of tokens");
    }
    return total;
  }

 private:
  ArrayView<int64_t> prefix_sums_;
  std::optional<ArrayView<int64_t>> order_;
};

py::tuple sample_to_document(const py::object& prefix_sums, const py::object& sequence_length_arg,
                             const py::object& num_samples_arg, bool add_extra_token,
                             const py::object& document_order) {
  const auto sums = view_of<int64_t>(prefix_sums, "prefix_sums", "int64");
  std::optional<ArrayView<int64_t>> order;
  if (!document_order.is_none()) {
    order = view_of<int64_t>(document_order, "document_order", "int64");
  }
  const int64_t sequence_length = int64_of(sequence_length_arg, "sequence_length");
  if (sequence_length < 1) {
    fail("sequence_length: expected at least 1, found " + std::to_string(sequence_length));
  }
  std::optional<int64_t> requested;
  if (!num_samples_arg.is_none()) {
    requested = int64_of(num_samples_arg, "num_samples");
    if (*requested < 0) {
      fail("num_samples: expected at least 0, found " + std::to_string(*requested));
    }
  }

  const Visit visit(sums, order);
  const int64_t extra = add_extra_token ? 1 : 0;
  int64_t num_samples;
  {
    py::gil_scoped_release release;
    check_prefix_sums(sums);
    const int64_t total = visit.total_tokens();
    const int64_t available = std::max<int64_t>(total - extra, 0) / sequence_length;
    num_samples = requested.value_or(available);
    if (num_samples > available) {
      fail("num_samples: " + std::to_string(num_samples) + " samples of " +
           std::to_string(sequence_length) + (add_extra_token ? " + 1" : "") +
           " tokens were asked for, but " + std::to_string(total) + " tokens make only " +
           std::to_string(available));
    }
  }

  py::array_t<int64_t> first(num_samples), last(num_samples), offset(num_samples);
  int64_t* const first_out = first.mutable_data();
  int64_t* const last_out = last.mutable_data();
  int64_t* const offset_out = offset.mutable_data();
  {
    py::gil_scoped_release release;
    // Two cursors walk the documents once: one finds each sample's first token, the other
    // its last. `begin` is the number of tokens before the document under the cursor. Every
    // token that is looked for lies below total_tokens(), so neither cursor runs off the end
    // and no sum below overflows.
    int64_t first_position = 0, first_begin = 0;
    int64_t last_position = 0, last_begin = 0;
    for (int64_t sample = 0; sample < num_samples; ++sample) {
      const int64_t first_token = sample * sequence_length;
      const int64_t last_token = first_token + (sequence_length - 1) + extra;
      while (first_token - first_begin >= visit.tokens_at(first_position)) {
        first_begin += visit.tokens_at(first_position++);
      }
      while (last_token - last_begin >= visit.tokens_at(last_position)) {
        last_begin += visit.tokens_at(last_position++);
      }
      first_out[sample] = first_position;
      last_out[sample] = last_position;
      offset_out[sample] = first_token - first_begin;
    }
  }
  return py::make_tuple(first, last, offset);
}

void check_index(const py::object& sequence_lengths, const py::object& sequence_pointers,
                 const py::object& document_indices, const py::object& itemsize_arg,
                 const py::object& bin_size_arg) {
  const auto lengths = view_of<int32_t>(sequence_lengths, "sequence_lengths", "int32");
  const auto pointers = view_of<int64_t>(sequence_pointers, "sequence_pointers", "int64");
  const auto documents = view_of<int64_t>(document_indices, "document_indices", "int64");
  const int64_t itemsize = int64_of(itemsize_arg, "itemsize");
  const int64_t bin_size = int64_of(bin_size_arg, "bin_size_bytes");
  if (itemsize < 1) {
    fail("itemsize: expected at least 1, found " + std::to_string(itemsize));
  }
  if (bin_size < 0) {
    fail("bin_size_bytes: expected at least 0, found " + std::to_string(bin_size));
  }
  if (lengths.size() != pointers.size()) {
    fail("sequence_pointers: " + std::to_string(pointers.size()) + " entries for " +
         std::to_string(lengths.size()) + " sequence lengths");
  }

  py::gil_scoped_release release;
  int64_t previous = 0;
  for (int64_t i = 0; i < lengths.size(); ++i) {
    check_length(lengths[i], i);
    const int64_t pointer = pointers[i];
    if (pointer < 0) {
      fail(entry("sequence_pointers", i) + ": " + std::to_string(pointer) + " is negative");
    }
    if (pointer < previous) {
      fail(entry("sequence_pointers", i) + ": " + std::to_string(pointer) +
           " is less than the entry before it, " + std::to_string(previous));
    }
    previous = pointer;
    const int64_t bytes = checked_multiply(lengths[i], itemsize, "itemsize");
    // Written so that pointer + bytes cannot overflow.
    if (bytes > bin_size || pointer > bin_size - bytes) {
      fail(entry("sequence_pointers", i) + ": the sequence's " + std::to_string(bytes) +
           " bytes from byte " + std::to_string(pointer) + " on lie outside the .bin's " +
           std::to_string(bin_size) + " bytes");
    }
  }
  check_document_indices(documents, lengths.size());
}

}  // namespace
}  // namespace megatron_dwm

PYBIND11_MODULE(_data_engine, module) {
  using namespace megatron_dwm;
  module.doc() = "Index kernels in C++; megatron_dwm.data is their Python face.";

  module.def("document_token_prefix_sums", &document_token_prefix_sums,
             py::arg("sequence_lengths"), py::arg("document_indices"),
             R"(Number of tokens before each document, and the total.

Args:
    sequence_lengths: `[S]` int32, tokens per sequence.
    document_indices: `[D + 1]` int64, first sequence of each document, then S.

Returns:
    `[D + 1]` int64; entry k is the number of tokens in documents 0 to k - 1.

Raises:
    ValueError: A length is negative or the document indices do not cover the sequences.)");

  module.def("sample_to_document", &sample_to_document, py::arg("prefix_sums"),
             py::arg("sequence_length"), py::arg("num_samples") = py::none(),
             py::arg("add_extra_token") = true, py::arg("document_order") = py::none(),
             R"(Which documents each packed sample takes its tokens from.

Sample k covers the tokens [k * sequence_length, (k + 1) * sequence_length + extra) of the
documents' concatenation, where extra is 1 with `add_extra_token` (the last label).

Args:
    prefix_sums: `[D + 1]` int64, see `document_token_prefix_sums`.
    sequence_length: Tokens per sample.
    num_samples: Number of samples N; None for all that fit.
    add_extra_token: Whether a sample needs one more token than it advances by.
    document_order: `[P]` int64, the documents in the order in which they are concatenated;
        may leave out and repeat documents. None for 0 to D - 1.

Returns:
    Three `[N]` int64 arrays: the position of the document with the sample's first token, that
    of the document with its last token, and the offset of the first token in its document.
    Positions count along `document_order`; without it they are document numbers.

Raises:
    ValueError: An argument is malformed, or there are too few tokens for `num_samples`.)");

  module.def("check_index", &check_index, py::arg("sequence_lengths"),
             py::arg("sequence_pointers"), py::arg("document_indices"), py::arg("itemsize"),
             py::arg("bin_size_bytes"),
             R"(Check that an index is consistent in itself and with its .bin file.

Args:
    sequence_lengths: `[S]` int32, tokens per sequence.
    sequence_pointers: `[S]` int64, first byte of each sequence in the .bin.
    document_indices: `[D + 1]` int64, first sequence of each document, then S.
    itemsize: Bytes per token.
    bin_size_bytes: Size of the .bin file.

Raises:
    ValueError: Names the first bad entry.)");

  bind_permutation(module);
  bind_counts(module);
  bind_visit(module);
  bind_pack(module);
}
