// Counts of independent draws with replacement: a multinomial sample, by the alias method.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "array_view.h"
#include "errors.h"
#include "expected.h"
#include "keyed_hash.h"
#include "parallel.h"

namespace megatron_dwm {

// Walker's alias table of m outcomes (Vose 1991): an outcome per hash, in O(1). An outcome of
// weight 0 is never drawn, whatever is rounded.
template <typename Index>
class AliasTable {
 public:
  // `weights` is used as scratch space. At least one of them must be positive.
  void build(double* weights, int64_t size, double sum) {
    const auto places = static_cast<size_t>(size);
    size_ = size;
    threshold_.resize(places);
    alias_.resize(places);
    small_.resize(places + 1);
    large_.resize(places + 1);
    const double factor = static_cast<double>(size) / sum;
    int64_t largest = 0, num_small = 0, num_large = 0;
    for (int64_t i = 0; i < size; ++i) {
      weights[i] *= factor;
      largest = weights[i] > weights[largest] ? i : largest;
      // Both lists take it, one of them keeps it: which one is hard to predict.
      const bool below = weights[i] < 1.0;
      small_[num_small] = large_[num_large] = static_cast<Index>(i);
      num_small += below ? 1 : 0;
      num_large += below ? 0 : 1;
    }
    // Slots that rounding leaves without a partner keep these.
    for (int64_t i = 0; i < size; ++i) {
      threshold_[i] = weights[i] > 0.0 ? UINT64_MAX : 0;
      alias_[i] = static_cast<Index>(largest);
    }
    if (num_small > 0 && num_large > 0) {
      pair(weights, num_small, num_large);
    }
  }

  int64_t draw(uint64_t hash) const {
    const uint128 product = static_cast<uint128>(hash) * static_cast<uint64_t>(size_);
    const auto slot = static_cast<int64_t>(product >> 64);
    // Arithmetic instead of a branch that goes either way at random.
    const auto alias = static_cast<int64_t>(alias_[slot]);
    const auto own = static_cast<int64_t>(static_cast<uint64_t>(product) < threshold_[slot]);
    return alias + (slot - alias) * own;
  }

 private:
  // Fills the slot of one outcome after the other that has less than a slot, from one that has
  // more; that one is next if it has less than a slot itself by then.
  void pair(const double* weights, int64_t num_small, int64_t num_large) {
    int64_t s = 0, l = 0;
    int64_t to = small_[0], from = large_[0];
    double to_weight = weights[to], from_weight = weights[from];
    for (;;) {
      threshold_[to] = to_threshold(to_weight);
      alias_[to] = static_cast<Index>(from);
      const double rest = from_weight - (1.0 - to_weight);
      const bool below = rest < 1.0;
      l += below ? 1 : 0;
      s += below ? 0 : 1;
      if (s == num_small || l == num_large) {
        return;
      }
      const int64_t next = below ? large_[l] : small_[s];
      const double next_weight = weights[next];
      to = below ? from : next;
      to_weight = below ? rest : next_weight;
      from = below ? next : from;
      from_weight = below ? next_weight : rest;
    }
  }

  // 2^64 times a number below 1, in two steps because signed conversions have no branch.
  static uint64_t to_threshold(double probability) {
    constexpr double kTwo63 = 9223372036854775808.0;
    return static_cast<uint64_t>(static_cast<int64_t>(std::max(probability, 0.0) * kTwo63)) << 1;
  }

  int64_t size_ = 0;
  std::vector<uint64_t> threshold_;
  std::vector<Index> alias_;
  std::vector<Index> small_;
  std::vector<Index> large_;
};

// Draw t takes a block by a hash of t, and the k-th draw of a block takes a document of it by a
// hash of (block, k). Both are independent draws, so their product is one over all documents;
// and tables of a block stay in the cache where a table of all documents would not.
constexpr int64_t kAliasBlock = 4096;
constexpr int64_t kDrawsPerTask = 1 << 18;

inline void independent_counts(const Weights& weights, int64_t num_draws, uint64_t seed,
                               uint64_t epoch, int threads, int32_t* counts) {
  const int64_t size = weights.size();
  const int64_t num_blocks = (size + kAliasBlock - 1) / kAliasBlock;
  std::vector<double> block_weights(static_cast<size_t>(num_blocks));
  constexpr int64_t kBlocksPerTask = 16;
  parallel_chunks(num_blocks, kBlocksPerTask, threads, [&](int64_t, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      CompensatedSum sum;
      const int64_t end = std::min((block + 1) * kAliasBlock, size);
      for (int64_t d = block * kAliasBlock; d < end; ++d) {
        const float weight = weights[d];
        check_weight(weight, d);
        sum.add(weight);
      }
      block_weights[block] = sum.value();
    }
  });
  CompensatedSum total;
  for (const double weight : block_weights) {
    total.add(weight);
  }
  if (num_draws > 0 && !(total.value() > 0.0)) {
    fail("weights: all " + std::to_string(size) + " weights are 0, and " +
         std::to_string(num_draws) + " draws are wanted");
  }

  // One histogram per worker, whatever the number of tasks.
  std::vector<int64_t> block_draws(static_cast<size_t>(num_blocks));
  if (num_draws > 0) {
    std::vector<double> scratch = block_weights;
    AliasTable<uint32_t> table;
    table.build(scratch.data(), num_blocks, total.value());
    const uint64_t key = derive_key(seed, epoch, kIndependentBlocks);
    const int64_t num_tasks = (num_draws + kDrawsPerTask - 1) / kDrawsPerTask;
    const int64_t workers = std::min<int64_t>(thread_count(threads), num_tasks);
    std::vector<std::vector<int64_t>> partial(static_cast<size_t>(workers));
    parallel_for(workers, threads, [&](int64_t worker) {
      std::vector<int64_t>& histogram = partial[worker];
      histogram.resize(static_cast<size_t>(num_blocks));
      const int64_t begin = worker * (num_draws / workers) + std::min(worker, num_draws % workers);
      const int64_t length = num_draws / workers + (worker < num_draws % workers ? 1 : 0);
      for (int64_t t = begin; t < begin + length; ++t) {
        ++histogram[table.draw(keyed_hash(key, static_cast<uint64_t>(t)))];
      }
    });
    for (const std::vector<int64_t>& histogram : partial) {
      for (int64_t block = 0; block < num_blocks; ++block) {
        block_draws[block] += histogram[block];
      }
    }
  }

  const uint64_t key = derive_key(seed, epoch, kIndependentWithin);
  parallel_chunks(num_blocks, kBlocksPerTask, threads, [&](int64_t, int64_t first, int64_t last) {
    AliasTable<uint16_t> table;
    std::array<double, kAliasBlock> scratch;
    std::array<int64_t, kAliasBlock> drawn;
    for (int64_t block = first; block < last; ++block) {
      const int64_t begin = block * kAliasBlock;
      const int64_t length = std::min(kAliasBlock, size - begin);
      std::fill_n(drawn.begin(), length, 0);
      if (block_draws[block] > 0) {
        for (int64_t i = 0; i < length; ++i) {
          scratch[i] = weights[begin + i];
        }
        table.build(scratch.data(), length, block_weights[block]);
        const uint64_t block_key = keyed_hash(key, static_cast<uint64_t>(block));
        for (int64_t k = 0; k < block_draws[block]; ++k) {
          ++drawn[table.draw(keyed_hash(block_key, static_cast<uint64_t>(k)))];
        }
      }
      for (int64_t i = 0; i < length; ++i) {
        if (drawn[i] > INT32_MAX) {
          fail(entry("weights", begin + i) + ": the document was drawn " +
               std::to_string(drawn[i]) + " times, which does not fit in 32 bits");
        }
        counts[begin + i] = static_cast<int32_t>(drawn[i]);
      }
    }
  });
}

}  // namespace megatron_dwm
