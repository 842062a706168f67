// Visited entries laid end to end: how many tokens each has and where it lies.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "array_view.h"
#include "errors.h"
#include "parallel.h"

namespace megatron_dwm {

constexpr int64_t kEntryChunk = 1 << 15;
// Lengths are read in random order, so many are asked for before the first is used.
constexpr int kEntryBatch = 64;
// Token positions stay so far from the ends of int64 that differences of two cannot overflow.
constexpr int64_t kMaxTokens = int64_t{1} << 62;

// Entry p takes the tokens [starts[p], stops[p]) of document documents[p]; without starts and
// stops, all of them.
template <typename Id>
class Entries {
 public:
  Entries(const ArrayView<Id>& documents, const ArrayView<int32_t>& lengths,
          const std::optional<ArrayView<int32_t>>& starts,
          const std::optional<ArrayView<int32_t>>& stops)
      : documents_(documents), lengths_(lengths), starts_(starts), stops_(stops) {
    check_size("starts", starts);
    check_size("stops", stops);
  }

  int64_t size() const { return documents_.size(); }

  // Number of tokens of `count` <= kEntryBatch entries from `first` on; checks all that it reads.
  void tokens(int64_t first, int count, int32_t* out) const {
    std::array<uint64_t, kEntryBatch> documents;
    const auto sequences = static_cast<uint64_t>(lengths_.size());
    bool bad = false;
    for (int i = 0; i < count; ++i) {
      documents[i] = static_cast<uint64_t>(static_cast<int64_t>(documents_[first + i]));
      bad |= documents[i] >= sequences;  // negative ones too
    }
    if (!bad) {
      for (int i = 0; i < count; ++i) {
        lengths_.prefetch(static_cast<int64_t>(documents[i]));
      }
      for (int i = 0; i < count; ++i) {
        const int32_t length = lengths_[static_cast<int64_t>(documents[i])];
        const int32_t begin = start(first + i);
        const int32_t end = stops_ ? (*stops_)[first + i] : length;
        bad |= length < 0 || begin < 0 || begin > end || end > length;
        out[i] = bad ? 0 : end - begin;
      }
    }
    for (int i = 0; bad && i < count; ++i) {
      check(first + i);
    }
  }

  int32_t start(int64_t position) const { return starts_ ? (*starts_)[position] : 0; }

 private:
  void check_size(const char* name, const std::optional<ArrayView<int32_t>>& view) const {
    if (view && view->size() != documents_.size()) {
      fail(std::string(name) + ": " + std::to_string(view->size()) + " entries for " +
           std::to_string(documents_.size()) + " entries of entry_documents");
    }
  }

  // Throws when there is something wrong with an entry.
  void check(int64_t position) const {
    const int64_t document = documents_[position];
    if (document < 0 || document >= lengths_.size()) {
      fail(entry("entry_documents", position) + ": " + std::to_string(document) +
           " is not one of the " + std::to_string(lengths_.size()) + " sequences");
    }
    const int32_t length = lengths_[document];
    check_length(length, document);
    const int32_t begin = start(position);
    const int32_t end = stops_ ? (*stops_)[position] : length;
    if (begin < 0 || begin > end || end > length) {
      fail(entry(starts_ ? "starts" : "stops", position) + ": the tokens [" +
           std::to_string(begin) + ", " + std::to_string(end) + ") are no part of the " +
           std::to_string(length) + " tokens of sequence " + std::to_string(document));
    }
  }

  ArrayView<Id> documents_;
  ArrayView<int32_t> lengths_;
  std::optional<ArrayView<int32_t>> starts_;
  std::optional<ArrayView<int32_t>> stops_;
};

// The tokens of all entries, gathered once (a random access each) for passes that stream.
struct Layout {
  int64_t size = 0;
  std::unique_ptr<int32_t[]> tokens;  // [size], absent when only the sums were asked for
  std::vector<int64_t> chunk_begin;   // first token of each chunk of kEntryChunk, then the total

  int64_t total() const { return chunk_begin.back(); }
};

template <typename Id>
Layout lay_out(const Entries<Id>& entries, int threads, bool keep_tokens) {
  Layout layout;
  layout.size = entries.size();
  if (keep_tokens) {
    // Not make_unique: the memory needs no zeros.
    layout.tokens.reset(new int32_t[static_cast<size_t>(layout.size)]);
  }
  const int64_t num_chunks = (layout.size + kEntryChunk - 1) / kEntryChunk;
  layout.chunk_begin.resize(static_cast<size_t>(num_chunks) + 1);
  parallel_chunks(layout.size, kEntryChunk, threads,
                  [&](int64_t chunk, int64_t begin, int64_t end) {
                    int64_t sum = 0;
                    std::array<int32_t, kEntryBatch> scratch;
                    for (int64_t p = begin; p < end; p += kEntryBatch) {
                      const int count = static_cast<int>(std::min<int64_t>(kEntryBatch, end - p));
                      int32_t* const tokens = keep_tokens ? &layout.tokens[p] : scratch.data();
                      entries.tokens(p, count, tokens);
                      for (int i = 0; i < count; ++i) {
                        sum += tokens[i];
                      }
                    }
                    layout.chunk_begin[chunk + 1] = sum;
                  });
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    layout.chunk_begin[chunk + 1] = checked_add(
        layout.chunk_begin[chunk], layout.chunk_begin[chunk + 1], "entry_documents: the tokens");
  }
  if (layout.total() > kMaxTokens) {
    fail("entry_documents: " + std::to_string(layout.total()) + " tokens are more than 2^62");
  }
  return layout;
}

}  // namespace megatron_dwm
