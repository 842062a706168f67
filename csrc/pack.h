// Samples of equal length cut from the laid-out entries: where they begin, and what is left of
// the entries when some of them have been consumed.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "array_view.h"
#include "errors.h"
#include "layout.h"
#include "parallel.h"

namespace megatron_dwm {

inline int64_t num_samples(int64_t tokens, int64_t sequence_length, bool add_extra_token) {
  return std::max<int64_t>(tokens - (add_extra_token ? 1 : 0), 0) / sequence_length;
}

// Fills `rows` with the samples + 1 pairs (entry, offset) of Megatron's build_sample_idx.
//
// Row 0 is (0, 0). Row k > 0 is found from the last token of sample k - 1, its label included:
// it names the entry of that token, and the token's offset plus 1 without an extra token. So
// row k is where sample k begins, except that without the extra token an entry that ends with
// sample k - 1 is named with its end.
template <typename Index>
void fill_sample_index(const Layout& layout, int64_t sequence_length, bool add_extra_token,
                       int64_t samples, int threads, Index* rows) {
  const int64_t extra = add_extra_token ? 1 : 0;
  rows[0] = 0;
  rows[1] = 0;
  if (samples == 0) {
    return;
  }
  parallel_chunks(
      layout.size, kEntryChunk, threads, [&](int64_t chunk, int64_t first, int64_t last) {
        int64_t begin = layout.chunk_begin[chunk];
        // The first row k > 0 whose token k * sequence_length + extra - 1 is at `begin` or after.
        const int64_t distance = begin - extra + 1;
        int64_t row = std::max<int64_t>(
            distance / sequence_length + (distance % sequence_length > 0 ? 1 : 0), 1);
        if (row > samples) {
          return;
        }
        int64_t token = row * sequence_length + extra - 1;
        for (int64_t p = first; p < last; ++p) {
          const int64_t end = begin + layout.tokens[p];
          while (token < end) {
            rows[2 * row] = static_cast<Index>(p);
            rows[2 * row + 1] = static_cast<Index>(token - begin + 1 - extra);
            if (++row > samples) {
              return;
            }
            token += sequence_length;
          }
          begin = end;
        }
      });
}

// A range of tokens of an entry's document that has not been consumed.
struct Piece {
  int64_t entry;
  int32_t start;
  int32_t stop;
};

// Which tokens of the stream have been consumed: sample k holds [first_token + k * L,
// first_token + (k + 1) * L).
class Consumption {
 public:
  Consumption(int64_t first_token, int64_t sequence_length, const ArrayView<uint8_t>& consumed)
      : first_token_(first_token), sequence_length_(sequence_length), consumed_(consumed) {
    if (first_token <= -kMaxTokens || first_token >= kMaxTokens) {
      fail("first_token: " + std::to_string(first_token) + " is not between -2^62 and 2^62");
    }
    end_ = checked_add(first_token,
                       checked_multiply(consumed.size(), sequence_length, "sequence_length"),
                       "first_token");
  }

  struct Run {
    bool consumed;
    int64_t end;
  };

  // Whether a token has been consumed, and a later token up to which the same holds for all.
  Run at(int64_t token) const {
    if (token < first_token_) {
      return {true, first_token_};
    }
    if (token >= end_) {
      return {false, INT64_MAX};
    }
    const int64_t sample = (token - first_token_) / sequence_length_;
    return {consumed_[sample] != 0, first_token_ + (sample + 1) * sequence_length_};
  }

 private:
  int64_t first_token_;
  int64_t sequence_length_;
  ArrayView<uint8_t> consumed_;
  int64_t end_;
};

// Sets begun[p] for every entry of which a token has been consumed, and returns what is left of
// those, in order. An entry without tokens counts as begun when the token that follows it has
// been consumed.
template <typename Id>
std::vector<std::vector<Piece>> remaining(const Entries<Id>& entries, const Layout& layout,
                                          const Consumption& consumption, int threads,
                                          uint8_t* begun) {
  std::vector<std::vector<Piece>> chunks(layout.chunk_begin.size() - 1);
  parallel_chunks(
      layout.size, kEntryChunk, threads, [&](int64_t chunk, int64_t first, int64_t last) {
        std::vector<Piece>& pieces = chunks[chunk];
        int64_t begin = layout.chunk_begin[chunk];
        Consumption::Run run = consumption.at(begin);
        for (int64_t p = first; p < last; ++p) {
          const int64_t end = begin + layout.tokens[p];
          if (begin >= run.end) {
            run = consumption.at(begin);
          }
          bool any = run.consumed;
          if (run.end < end) {
            const int32_t start = entries.start(p);
            const size_t before = pieces.size();
            int64_t left_from = begin;  // of the unconsumed tokens since the last consumed one
            for (int64_t token = begin; token < end; token = run.end) {
              run = consumption.at(token);
              if (run.consumed) {
                any = true;
                if (left_from < token) {
                  pieces.push_back({p, static_cast<int32_t>(start + (left_from - begin)),
                                    static_cast<int32_t>(start + (token - begin))});
                }
                left_from = run.end;
              }
            }
            if (left_from < end) {
              pieces.push_back({p, static_cast<int32_t>(start + (left_from - begin)),
                                static_cast<int32_t>(start + (end - begin))});
            }
            if (!any) {
              pieces.resize(before);
            }
          }
          begun[p] = any ? 1 : 0;
          begin = end;
        }
      });
  return chunks;
}

}  // namespace megatron_dwm
