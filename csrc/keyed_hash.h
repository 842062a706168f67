// Counter-based random numbers: every value is a pure function of (seed, epoch, stream, counter).
#pragma once

#include <cstdint>

namespace megatron_dwm {

using uint128 = unsigned __int128;

// Uses of one (seed, epoch) that must not share random numbers. Permutation takes any stream
// below 2^32 from its caller; the ones above are the kernels' own.
enum Stream : uint64_t {
  kDocuments = 0,
  kSamples = 1,
  kSystematicOffset = uint64_t{1} << 32,
  kSystematicBlocks,
  kSystematicWithin,
  kIndependentBlocks,
  kIndependentWithin,
};

constexpr uint64_t kGolden = 0x9e3779b97f4a7c15;  // 2^64 / golden ratio, made odd

// The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijection of 64 bits.
inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// Each step is a bijection of what it takes in, given the rest: keys that differ in one of the
// three numbers only are never equal.
inline uint64_t derive_key(uint64_t seed, uint64_t epoch, uint64_t stream) {
  uint64_t key = mix64(seed + kGolden);
  key = mix64((key ^ epoch) + kGolden);
  return mix64((key ^ stream) + kGolden);
}

// Independent 64-bit values for the counters 0, 1, 2, ... (SplitMix64 with random access).
inline uint64_t keyed_hash(uint64_t key, uint64_t counter) {
  return mix64(key + (counter + 1) * kGolden);
}

inline uint64_t multiply_high(uint64_t a, uint64_t b) {
  return static_cast<uint64_t>((static_cast<uint128>(a) * b) >> 64);
}

}  // namespace megatron_dwm
