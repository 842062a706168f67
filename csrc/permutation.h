// A keyed bijection of [0, n) that needs no memory: the order in which things are visited.
#pragma once

#include <array>
#include <cstdint>

#include "keyed_hash.h"

namespace megatron_dwm {

// A Feistel network on the smallest power of two >= n, with cycle walking (Black and Rogaway
// 2002): a value that leaves [0, n) is sent through the network again until it is back. Fewer
// than two passes are needed on average.
class Permutation {
 public:
  static constexpr int64_t kMaxSize = int64_t{1} << 62;
  // Values per call of the batch functions: enough to overlap their latencies.
  static constexpr int kBatch = 64;

  Permutation(int64_t size, uint64_t seed, uint64_t epoch, uint64_t stream)
      : size_(static_cast<uint64_t>(size)) {
    int bits = 0;
    while ((uint64_t{1} << bits) < size_) {
      ++bits;
    }
    low_bits_ = bits / 2;
    low_mask_ = (uint64_t{1} << low_bits_) - 1;
    high_mask_ = (uint64_t{1} << (bits - low_bits_)) - 1;
    full_ = (uint64_t{1} << bits) == size_;
    // A round mixes as many bits as half the index has: small indices need more rounds, and
    // there are few of them.
    small_ = bits < 16;
    // With the size, because neighbouring sizes have the same network but for their keys.
    const uint64_t key = mix64(derive_key(seed, epoch, stream) ^ size_);
    for (int i = 0; i < kSmallRounds; ++i) {
      keys_[i].add = keyed_hash(key, 2 * i);
      keys_[i].multiply = keyed_hash(key, 2 * i + 1) | 1;
    }
  }

  int64_t size() const { return static_cast<int64_t>(size_); }

  // The element at a position in [0, size).
  uint64_t operator()(uint64_t position) const {
    map_batch<false>(&position, 1);
    return position;
  }

  // The position of an element in [0, size).
  uint64_t inverse(uint64_t element) const {
    map_batch<true>(&element, 1);
    return element;
  }

  // Replaces each of `count` <= kBatch values in place, by operator() or by inverse().
  template <bool kInverse>
  void map_batch(uint64_t* values, int count) const {
    if (small_) {
      walk<kInverse, kSmallRounds>(values, count);
    } else {
      walk<kInverse, kRounds>(values, count);
    }
  }

 private:
  static constexpr int kRounds = 6;
  static constexpr int kSmallRounds = 12;

  struct RoundKey {
    uint64_t add;
    uint64_t multiply;
  };

  static uint64_t round(uint64_t half, const RoundKey& key) {
    const uint128 product = static_cast<uint128>(half ^ key.add) * key.multiply;
    return static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64);
  }

  template <bool kInverse, int kCount>
  uint64_t network(uint64_t value) const {
    uint64_t high = value >> low_bits_;
    uint64_t low = value & low_mask_;
    for (int i = 0; i < kCount; i += 2) {
      if (kInverse) {
        low ^= round(high, keys_[kCount - 1 - i]) & low_mask_;
        high ^= round(low, keys_[kCount - 2 - i]) & high_mask_;
      } else {
        high ^= round(low, keys_[i]) & high_mask_;
        low ^= round(high, keys_[i + 1]) & low_mask_;
      }
    }
    return (high << low_bits_) | low;
  }

  template <bool kInverse, int kCount>
  void walk(uint64_t* values, int count) const {
    for (int i = 0; i < count; ++i) {
      values[i] = network<kInverse, kCount>(values[i]);
    }
    if (full_) {
      return;
    }
    // The list of values to send through again is made without branches: whether a value is
    // out of range cannot be predicted.
    std::array<uint8_t, kBatch> outside;
    int left = 0;
    for (int i = 0; i < count; ++i) {
      outside[left] = static_cast<uint8_t>(i);
      left += values[i] >= size_;
    }
    while (left > 0) {
      int still = 0;
      for (int j = 0; j < left; ++j) {
        const uint8_t i = outside[j];
        values[i] = network<kInverse, kCount>(values[i]);
        outside[still] = i;
        still += values[i] >= size_;
      }
      left = still;
    }
  }

  uint64_t size_;
  int low_bits_;
  uint64_t low_mask_;
  uint64_t high_mask_;
  bool full_;
  bool small_;
  std::array<RoundKey, kSmallRounds> keys_;
};

}  // namespace megatron_dwm
