// The order in which the drawn documents are visited.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "array_view.h"
#include "errors.h"
#include "parallel.h"
#include "permutation.h"

namespace megatron_dwm {

constexpr int64_t kVisitChunk = 1 << 15;

// Where the draws of each chunk of documents begin, and the number of draws at the end.
inline std::vector<int64_t> draw_starts(const ArrayView<int32_t>& counts, int threads) {
  const int64_t num_chunks = (counts.size() + kVisitChunk - 1) / kVisitChunk;
  std::vector<int64_t> starts(static_cast<size_t>(num_chunks) + 1);
  parallel_chunks(counts.size(), kVisitChunk, threads,
                  [&](int64_t chunk, int64_t begin, int64_t end) {
                    int64_t draws = 0;
                    for (int64_t d = begin; d < end; ++d) {
                      const int32_t count = counts[d];
                      if (count < 0) {
                        fail(entry("counts", d) + ": " + std::to_string(count) + " is negative");
                      }
                      draws += count;
                    }
                    starts[chunk + 1] = draws;
                  });
  for (int64_t chunk = 0; chunk < num_chunks; ++chunk) {
    starts[chunk + 1] = checked_add(starts[chunk], starts[chunk + 1], "counts: the sum");
  }
  return starts;
}

// Puts consecutive draws at their places in the order.
template <typename Id>
class DrawWriter {
 public:
  DrawWriter(const Permutation& order, int64_t first_draw, Id* out)
      : order_(order), draw_(static_cast<uint64_t>(first_draw)), out_(out) {}

  // The next `count` draws are of one document.
  void put(Id id, int32_t count) {
    // Counts are small and cannot be predicted: without a branch, a few places are filled of
    // which the next draws overwrite those that are too many.
    for (; count > kFew; count -= kFew) {
      append(id, kFew);
    }
    append(id, count);
  }

  void finish() {
    flush(filled_);
    write();
  }

 private:
  static constexpr int kFew = 4;

  void append(Id id, int32_t count) {
    Id* const ids = ids_[turn_] + filled_;
    for (int i = 0; i < kFew; ++i) {
      ids[i] = id;
    }
    filled_ += count;
    if (filled_ >= Permutation::kBatch) {
      flush(Permutation::kBatch);
    }
  }

  // Finds the places of the first `count` gathered draws and starts loading them, then writes
  // those of the batch before, which are loaded by now.
  void flush(int count) {
    uint64_t* const places = places_[turn_];
    for (int i = 0; i < count; ++i) {
      places[i] = draw_ + static_cast<uint64_t>(i);
    }
    order_.map_batch<true>(places, count);
    for (int i = 0; i < count; ++i) {
      __builtin_prefetch(out_ + places[i], 1);
    }
    draw_ += static_cast<uint64_t>(count);
    write();
    waiting_ = count;
    filled_ -= count;
    std::copy_n(ids_[turn_] + count, filled_, ids_[turn_ ^ 1]);
    turn_ ^= 1;
  }

  // Writes the batch that flush() left.
  void write() {
    const uint64_t* const places = places_[turn_ ^ 1];
    const Id* const ids = ids_[turn_ ^ 1];
    for (int i = 0; i < waiting_; ++i) {
      out_[places[i]] = ids[i];
    }
    waiting_ = 0;
  }

  const Permutation order_;
  uint64_t draw_;
  Id* const out_;
  int turn_ = 0;
  int filled_ = 0;
  int waiting_ = 0;
  uint64_t places_[2][Permutation::kBatch];
  Id ids_[2][Permutation::kBatch + kFew];
};

// Draw j of the epoch belongs to the document whose draws [starts, starts + count) hold j; the
// numbers from `starts.back()` on are -1, -2, ... The number at position i is that of draw
// order(i). `out` has order.size() places.
template <typename Id>
void visit_order(const ArrayView<int32_t>& counts, const std::vector<int64_t>& starts,
                 const Permutation& order, int64_t first_document, int threads, Id* out) {
  parallel_chunks(counts.size(), kVisitChunk, threads,
                  [&](int64_t chunk, int64_t begin, int64_t end) {
                    DrawWriter<Id> writer(order, starts[chunk], out);
                    for (int64_t d = begin; d < end; ++d) {
                      writer.put(static_cast<Id>(first_document + d), counts[d]);
                    }
                    writer.finish();
                  });
  const int64_t draws = starts.back();
  parallel_chunks(order.size() - draws, kVisitChunk, threads,
                  [&](int64_t, int64_t begin, int64_t end) {
                    DrawWriter<Id> writer(order, draws + begin, out);
                    for (int64_t k = begin; k < end; ++k) {
                      writer.put(static_cast<Id>(-1 - k), 1);
                    }
                    writer.finish();
                  });
}

}  // namespace megatron_dwm
