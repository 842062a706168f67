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
  // Values per call of map_batch: enough to fill vectors when few are left to walk.
  static constexpr int kBatch = 256;

  Permutation(int64_t size, uint64_t seed, uint64_t epoch, uint64_t stream)
      : size_(static_cast<uint64_t>(size)) {
    int bits = 0;
    while ((uint64_t{1} << bits) < size_) {
      ++bits;
    }
    low_bits_ = bits / 2;
    low_mask_ = static_cast<uint32_t>((uint64_t{1} << low_bits_) - 1);
    high_mask_ = static_cast<uint32_t>((uint64_t{1} << (bits - low_bits_)) - 1);
    full_ = (uint64_t{1} << bits) == size_;
    // A round mixes as many bits as half the index has: small indices need more rounds, and
    // there are few of them.
    rounds_ = bits < 16 ? kMaxRounds : kMinRounds;
    // With the size, because neighbouring sizes have the same network but for their keys.
    const uint64_t key = mix64(derive_key(seed, epoch, stream) ^ size_);
    for (int i = 0; i < kMaxRounds; ++i) {
      const uint64_t hash = keyed_hash(key, static_cast<uint64_t>(i));
      keys_[i].mask = static_cast<uint32_t>(hash);
      // Odd and large, so that all bits of a product depend on the factor.
      keys_[i].factor = static_cast<uint32_t>(hash >> 32) | 0x80000001;
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
    // Copies, because what is stored below could be members for all that the compiler knows.
    const uint64_t size = size_;
    const int low_bits = low_bits_;
    const uint32_t low_mask = low_mask_;
    Halves halves;
    for (int i = 0; i < count; ++i) {
      halves.set(i, values[i], low_bits, low_mask);
    }
    network<kInverse>(halves, count);
    for (int i = 0; i < count; ++i) {
      values[i] = halves.get(i, low_bits);
    }
    if (full_) {
      return;
    }
    // The list of values to send through again is made without branches: whether a value is
    // out of range cannot be predicted.
    std::array<uint32_t, kBatch> outside;
    int left = 0;
    for (int i = 0; i < count; ++i) {
      outside[left] = static_cast<uint32_t>(i);
      left += values[i] >= size;
    }
    while (left > 0) {
      for (int j = 0; j < left; ++j) {
        halves.set(j, values[outside[j]], low_bits, low_mask);
      }
      network<kInverse>(halves, left);
      int still = 0;
      for (int j = 0; j < left; ++j) {
        const uint32_t i = outside[j];
        const uint64_t value = halves.get(j, low_bits);
        values[i] = value;
        outside[still] = i;
        still += value >= size;
      }
      left = still;
    }
  }

 private:
  static constexpr int kMinRounds = 6;
  static constexpr int kMaxRounds = 24;
  static constexpr int kLanes = 8;

  struct RoundKey {
    uint32_t mask;
    uint32_t factor;
  };

  // The two halves of the values of a batch, apart from each other so that rounds vectorise.
  struct Halves {
    alignas(32) uint32_t high[kBatch];
    alignas(32) uint32_t low[kBatch];

    void set(int i, uint64_t value, int low_bits, uint32_t low_mask) {
      high[i] = static_cast<uint32_t>(value >> low_bits);
      low[i] = static_cast<uint32_t>(value) & low_mask;
    }
    uint64_t get(int i, int low_bits) const {
      return (static_cast<uint64_t>(high[i]) << low_bits) | low[i];
    }
  };

  // One round on the first `count` values, a multiple of kLanes.
  static void mix(const uint32_t* __restrict from, uint32_t* __restrict into, RoundKey key,
                  uint32_t into_mask, int count) {
    for (int i = 0; i < count; ++i) {
      const uint64_t product = static_cast<uint64_t>(from[i] ^ key.mask) * key.factor;
      // The low bits are those that count, and take the middle of the product to be random: its
      // own low bits are linear, and its high bits ignore small changes.
      uint32_t hash = static_cast<uint32_t>(product) ^ static_cast<uint32_t>(product >> 32);
      hash ^= hash >> 15;
      into[i] ^= hash & into_mask;
    }
  }

  template <bool kInverse>
  void network(Halves& halves, int count) const {
    // Whole vectors: values past the end are computed with and not used.
    const int padded = (count + kLanes - 1) / kLanes * kLanes;
    for (int i = count; i < padded; ++i) {
      halves.high[i] = halves.low[i] = 0;
    }
    for (int i = 0; i < rounds_; i += 2) {
      if (kInverse) {
        mix(halves.high, halves.low, keys_[rounds_ - 1 - i], low_mask_, padded);
        mix(halves.low, halves.high, keys_[rounds_ - 2 - i], high_mask_, padded);
      } else {
        mix(halves.low, halves.high, keys_[i], high_mask_, padded);
        mix(halves.high, halves.low, keys_[i + 1], low_mask_, padded);
      }
    }
  }

  uint64_t size_;
  int low_bits_;
  uint32_t low_mask_;
  uint32_t high_mask_;
  bool full_;
  int rounds_;
  std::array<RoundKey, kMaxRounds> keys_;
};

}  // namespace megatron_dwm
