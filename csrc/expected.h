// Expected number of draws of every document, from its weight.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "array_view.h"
#include "errors.h"
#include "keyed_hash.h"
#include "parallel.h"

namespace megatron_dwm {

using Weights = ArrayView<float>;

// By the bits: neither NaN nor infinite nor negative (-0 is 0). In loops over many weights a
// comparison of integers leaves no branch.
inline bool is_bad_weight(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof(bits));
  constexpr uint32_t kLargest = 0x7F7FFFFF, kMinusZero = 0x80000000;
  return (bits > kLargest) & (bits != kMinusZero);
}

inline void check_weight(float weight, int64_t document) {
  if (is_bad_weight(weight)) {
    fail(entry("weights", document) + ": " + number(weight) +
         " is not a finite number >= 0");
  }
}

// A sum with the rounding errors of its additions kept apart (Knuth's TwoSum), so that its own
// error stays near half a unit in the last place however many terms it has.
class CompensatedSum {
 public:
  void add(double term) {
    const double sum = sum_ + term;
    const double rest = sum - sum_;
    error_ += (sum_ - (sum - rest)) + (term - rest);
    sum_ = sum;
  }
  // The two parts one by one: block sums keep their precision.
  void add(const CompensatedSum& other) {
    add(other.sum_);
    add(other.error_);
  }
  double value() const { return sum_ + error_; }

 private:
  double sum_ = 0.0;
  double error_ = 0.0;
};

// Sums over documents are taken within fixed blocks, then over the blocks in order: floating
// point sums depend on the order, and must not depend on the number of threads.
constexpr int64_t kSumBlock = 1 << 16;

struct WeightSummary {
  CompensatedSum sum;
  int64_t positive = 0;
  float smallest_positive = std::numeric_limits<float>::max();
};

// Checks every weight.
inline WeightSummary summarise(const Weights& weights, int threads) {
  std::vector<WeightSummary> blocks((weights.size() + kSumBlock - 1) / kSumBlock);
  parallel_chunks(weights.size(), kSumBlock, threads,
                  [&](int64_t block, int64_t begin, int64_t end) {
                    WeightSummary summary;
                    for (int64_t d = begin; d < end; ++d) {
                      const float weight = weights[d];
                      check_weight(weight, d);
                      summary.sum.add(weight);
                      if (weight > 0.0F) {
                        ++summary.positive;
                        summary.smallest_positive = std::min(summary.smallest_positive, weight);
                      }
                    }
                    blocks[block] = summary;
                  });
  WeightSummary total;
  for (const WeightSummary& block : blocks) {
    total.sum.add(block.sum);
    total.positive += block.positive;
    total.smallest_positive = std::min(total.smallest_positive, block.smallest_positive);
  }
  return total;
}

// The documents that reach the cap, and the weight of the others.
struct CapSummary {
  int64_t capped = 0;
  CompensatedSum rest;
};

inline CapSummary summarise_cap(const Weights& weights, double scale, double cap, int threads) {
  std::vector<CapSummary> blocks((weights.size() + kSumBlock - 1) / kSumBlock);
  parallel_chunks(weights.size(), kSumBlock, threads,
                  [&](int64_t block, int64_t begin, int64_t end) {
                    CapSummary summary;
                    for (int64_t d = begin; d < end; ++d) {
                      const double weight = weights[d];
                      const bool capped = scale * weight >= cap;
                      summary.capped += capped ? 1 : 0;
                      // Adding 0 changes nothing, and needs no branch that is hard to predict.
                      summary.rest.add(capped ? 0.0 : weight);
                    }
                    blocks[block] = summary;
                  });
  CapSummary total;
  for (const CapSummary& block : blocks) {
    total.capped += block.capped;
    total.rest.add(block.rest);
  }
  return total;
}

// The scale with sum over d of min(scale * weights[d], cap) = num_draws; no cap for 0.
//
// The left side is concave and increasing in the scale. Newton's method started below the root
// stays below it and never turns back, so it ends: each step but the last caps more documents.
inline double expected_scale(const Weights& weights, int64_t num_draws, int64_t max_repeats,
                             int threads) {
  const WeightSummary summary = summarise(weights, threads);
  if (num_draws == 0) {
    return 0.0;
  }
  if (summary.positive == 0) {
    fail("weights: all " + std::to_string(weights.size()) + " weights are 0, and " +
         std::to_string(num_draws) + " draws are wanted");
  }
  const double draws = static_cast<double>(num_draws);
  double scale = draws / summary.sum.value();
  if (max_repeats == 0) {
    return scale;
  }
  const double cap = static_cast<double>(max_repeats);
  const uint128 most = static_cast<uint128>(max_repeats) * static_cast<uint64_t>(summary.positive);
  if (most < static_cast<uint128>(num_draws)) {
    fail("max_repeats: " + std::to_string(summary.positive) + " documents of positive weight, " +
         std::to_string(max_repeats) + " times each, are fewer than the " +
         std::to_string(num_draws) + " draws that are wanted");
  }
  if (most == static_cast<uint128>(num_draws)) {
    const double smallest = summary.smallest_positive;
    scale = cap / smallest;
    while (scale * smallest < cap) {
      scale = std::nextafter(scale, std::numeric_limits<double>::infinity());
    }
    return scale;
  }
  for (int64_t capped = 0;;) {
    const CapSummary now = summarise_cap(weights, scale, cap, threads);
    const double rest = now.rest.value();
    if (now.capped <= capped || rest <= 0.0) {
      return scale;
    }
    capped = now.capped;
    // Rounding may take a document for capped that is just at the cap: never turn back for it.
    scale = std::max(scale, (draws - cap * static_cast<double>(capped)) / rest);
  }
}

}  // namespace megatron_dwm
