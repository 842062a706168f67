// Counts that are the expected counts rounded down or up: randomised systematic resampling.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstring>
#include <limits>
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

// The expected counts of a block of documents.
struct ExpectedBlock {
  std::array<int32_t, kBlock> whole;
  std::array<uint64_t, kBlock> fraction;  // [0, kOne]: kOne where rounding carries
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

  // Computes those of documents [begin, begin + length), at most kBlock. The loops have neither
  // branches nor conversions that do not vectorise; what is bad is looked for after them.
  void get(int64_t begin, int64_t length, ExpectedBlock& block) const {
    std::array<double, kBlock> counts;
    uint32_t suspicious = 0;
    for (int64_t i = 0; i < length; ++i) {
      const float weight = weights_[begin + i];
      suspicious |= static_cast<uint32_t>(is_bad_weight(weight));
      const double count = scale_ * weight;
      counts[i] = count < cap_ ? count : cap_;
    }
    if (consumed_) {
      for (int64_t i = 0; i < length; ++i) {
        const int32_t consumed = (*consumed_)[begin + i];
        suspicious |= static_cast<uint32_t>(consumed < 0);
        counts[i] = std::max(counts[i] - consumed, 0.0);
      }
    }
    constexpr double kMost = INT32_MAX;
    constexpr double kOneAsDouble = static_cast<double>(kOne);
    const uint64_t bits_of_one = bits_of(kOneAsDouble);
    for (int64_t i = 0; i < length; ++i) {
      // Not std::min: this is kMost for NaN too.
      const double count = counts[i] < kMost ? counts[i] : kMost;
      const int32_t whole = static_cast<int32_t>(count);
      suspicious |= static_cast<uint32_t>(whole == INT32_MAX);
      block.whole[i] = whole;
      // From kOne to 2 kOne a double's unit in the last place is 1: what is added to kOne is
      // rounded to an integer, and the difference of the bits is that integer.
      const double fraction = (count - whole) * kOneAsDouble;
      block.fraction[i] = bits_of(fraction + kOneAsDouble) - bits_of_one;
    }
    if (suspicious != 0) {
      check(begin, length);
    }
  }

 private:
  static uint64_t bits_of(double value) {
    uint64_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
  }

  void check(int64_t begin, int64_t length) const {
    for (int64_t d = begin; d < begin + length; ++d) {
      check_weight(weights_[d], d);
      double count = std::min(scale_ * weights_[d], cap_);
      if (consumed_) {
        const int32_t consumed = (*consumed_)[d];
        if (consumed < 0) {
          fail(entry("consumed", d) + ": " + std::to_string(consumed) + " is negative");
        }
        count -= consumed;
      }
      if (count > INT32_MAX) {
        fail(entry("weights", d) + ": the document would be drawn " + number(count) +
             " times, which does not fit in 32 bits; limit max_repeats or the weights");
      }
    }
  }

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
    ExpectedBlock counts_of;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock;
      const int64_t length = std::min(kBlock, size - begin);
      expected.get(begin, length, counts_of);
      // The halves of the fractions one by one, whose sums fit in 64 bits.
      uint64_t low = 0, high = 0;
      int64_t whole = 0;
      for (int64_t i = 0; i < length; ++i) {
        low += counts_of.fraction[i] & UINT32_MAX;
        high += counts_of.fraction[i] >> 32;
        whole += counts_of.whole[i];
      }
      starts[block] = (static_cast<uint128>(whole) << kFractionBits) +
                      (static_cast<uint128>(high) << 32) + low;
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
    ExpectedBlock counts_of;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kBlock;
      const int64_t length = std::min(kBlock, size - begin);
      expected.get(begin, length, counts_of);
      order_of_block(within, static_cast<uint64_t>(block), length, order);
      uint64_t line = static_cast<uint64_t>(starts[block]);
      for (int64_t k = 0; k < length; ++k) {
        const uint16_t i = order[k];
        line += counts_of.fraction[i];
        counts_of.whole[i] += static_cast<int32_t>(line >> kFractionBits);
        line &= kOne - 1;
      }
      std::copy_n(counts_of.whole.begin(), length, counts + begin);
    }
  });
}

}  // namespace megatron_dwm
