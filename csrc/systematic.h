// Counts that are the expected counts rounded down or up: randomised systematic resampling.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "array_view.h"
#include "errors.h"
#include "expected.h"
#include "keyed_hash.h"
#include "parallel.h"
#include "permutation.h"

namespace megatron_dwm {

// Documents are laid end to end, each as long as its expected count, on a line that has a tick
// at every integer; the line is shifted by one random number u in [0, 1), and each document is
// drawn once per tick that falls on it. Which documents share the fate of a tick is set by the
// order in which they are laid: blocks of contiguous documents in a random order, and the
// documents of a block in a random order. Blocks keep the memory accesses local.
constexpr int64_t kBlock = 4096;
constexpr int64_t kBlocksPerTask = 16;

// Expected counts are held in fixed point, so that sums of them are exact in any order.
constexpr int kFractionBits = 52;
constexpr uint64_t kOne = uint64_t{1} << kFractionBits;

struct Expected {
  int32_t whole;
  uint64_t fraction;  // [0, kOne]: kOne where rounding carries
};

class ExpectedCounts {
 public:
  ExpectedCounts(const Weights& weights, double scale, int64_t max_repeats,
                 const std::optional<ArrayView<int32_t>>& consumed)
      : weights_(weights),
        scale_(scale),
        cap_(max_repeats > 0 ? static_cast<double>(max_repeats)
                             : std::numeric_limits<double>::infinity()),
        consumed_(consumed) {}

  int64_t size() const { return weights_.size(); }

  Expected operator[](int64_t document) const {
    const float weight = weights_[document];
    check_weight(weight, document);
    double count = std::min(scale_ * weight, cap_);
    if (consumed_) {
      const int32_t consumed = (*consumed_)[document];
      if (consumed < 0) {
        fail(entry("consumed", document) + ": " + std::to_string(consumed) + " is negative");
      }
      count -= consumed;
    }
    if (!(count > 0.0)) {
      return {0, 0};
    }
    if (count > INT32_MAX) {
      fail(entry("weights", document) + ": the document would be drawn " + number(count) +
           " times, which does not fit in 32 bits; limit max_repeats or the weights");
    }
    const int32_t whole = static_cast<int32_t>(count);
    // Truncation of x + 0.5 instead of a rounding function: no rounding mode to depend on.
    const double fraction = (count - whole) * static_cast<double>(kOne) + 0.5;
    return {whole, static_cast<uint64_t>(fraction)};
  }

 private:
  Weights weights_;
  double scale_;
  double cap_;
  std::optional<ArrayView<int32_t>> consumed_;
};

// A random order of the first `length` places of a block: Fisher and Yates' shuffle. Cheaper
// bijections of 12 bits leave patterns that show in which neighbours are drawn together.
inline void order_of_block(uint64_t key, uint64_t block, int64_t length,
                           std::array<uint16_t, kBlock>& order) {
  for (int64_t i = 0; i < length; ++i) {
    order[i] = static_cast<uint16_t>(i);
  }
  const uint64_t block_key = keyed_hash(key, block);
  uint64_t bits = keyed_hash(block_key, static_cast<uint64_t>(length));
  for (int64_t i = length - 1; i > 0; --i) {
    // One hash has 32 bits for each of two swaps; a place is off its chance by 2^-20 at most.
    bits = i % 2 != 0 ? keyed_hash(block_key, static_cast<uint64_t>(i)) : bits >> 32;
    const uint64_t j = ((bits & UINT32_MAX) * static_cast<uint64_t>(i + 1)) >> 32;
    std::swap(order[i], order[j]);
  }
}

// The random shift, out of those that draw exactly n documents when the expected counts add up
// to n but for rounding.
inline uint64_t systematic_offset(uint128 total, uint64_t seed, uint64_t epoch) {
  uint64_t low = 0, high = kOne;
  // 1e-6 of a draw, or the precision that the scale had as a double, whichever is more.
  const uint128 relative = std::min<uint128>(total >> 49, kOne / 4);
  const uint128 tolerance = std::max<uint128>(kOne / 1000000, relative);
  const uint128 nearest = ((total + kOne / 2) >> kFractionBits) << kFractionBits;
  if (nearest > total && nearest - total <= tolerance) {
    low = static_cast<uint64_t>(nearest - total);
  } else if (nearest <= total && total - nearest <= tolerance) {
    high = kOne - static_cast<uint64_t>(total - nearest);
  }
  const uint64_t hash = keyed_hash(derive_key(seed, epoch, kSystematicOffset), 0);
  return low + multiply_high(hash, high - low);
}

inline void systematic_counts(const ExpectedCounts& expected, uint64_t seed, uint64_t epoch,
                              int threads, int32_t* counts) {
  const int64_t size = expected.size();
  const int64_t num_blocks = (size + kBlock - 1) / kBlock;
  std::vector<uint128> starts(static_cast<size_t>(num_blocks));

  parallel_chunks(num_blocks, kBlocksPerTask, threads, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t end = std::min((block + 1) * kBlock, size);
      uint128 fractions = 0;
      int64_t whole = 0;
      for (int64_t d = block * kBlock; d < end; ++d) {
        const Expected count = expected[d];
        fractions += count.fraction;
        whole += count.whole;
      }
      starts[block] = (static_cast<uint128>(whole) << kFractionBits) + fractions;
    }
  });

  uint128 total = 0;
  for (const uint128 block : starts) {
    total += block;
  }
  // Only the fraction of a block's start decides where ticks fall in it.
  uint64_t position = systematic_offset(total, seed, epoch);
  const Permutation block_order(num_blocks, seed, epoch, kSystematicBlocks);
  for (int64_t rank = 0; rank < num_blocks; ++rank) {
    uint128& start = starts[block_order(static_cast<uint64_t>(rank))];
    const uint64_t length = static_cast<uint64_t>(start) & (kOne - 1);
    start = position;
    position = (position + length) & (kOne - 1);
  }

  const uint64_t within = derive_key(seed, epoch, kSystematicWithin);
  parallel_chunks(num_blocks, kBlocksPerTask, threads, [&](int64_t, int64_t first, int64_t last) {
    std::array<uint16_t, kBlock> order;
    std::array<uint64_t, kBlock> fractions;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock;
      const int64_t length = std::min(kBlock, size - begin);
      for (int64_t i = 0; i < length; ++i) {
        const Expected count = expected[begin + i];
        counts[begin + i] = count.whole;
        fractions[i] = count.fraction;
      }
      order_of_block(within, static_cast<uint64_t>(block), length, order);
      uint64_t line = static_cast<uint64_t>(starts[block]);
      for (int64_t k = 0; k < length; ++k) {
        const uint16_t i = order[k];
        line += fractions[i];
        counts[begin + i] += static_cast<int32_t>(line >> kFractionBits);
        line &= kOne - 1;
      }
    }
  });
}

}  // namespace megatron_dwm
