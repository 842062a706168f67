// Runs the kernels of csrc/ through their edge cases; built with sanitizers by run_sanitized.sh.
//
// What the results should be is tested from Python; here it counts that memory is read and
// written where it should be, at the ends of chunks and arrays above all, and that the result
// is the same on any number of threads.

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <vector>

#include "expected.h"
#include "independent.h"
#include "layout.h"
#include "pack.h"
#include "permutation.h"
#include "systematic.h"
#include "visit.h"

using namespace megatron_dwm;

namespace {

#define CHECK(condition)                                                              \
  do {                                                                                \
    if (!(condition)) {                                                               \
      std::fprintf(stderr, "%s:%d: failed: %s\n", __FILE__, __LINE__, #condition);    \
      std::exit(1);                                                                   \
    }                                                                                 \
  } while (0)

template <typename Call>
void check_fails(const Call& call, const std::string& part) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    if (std::string(error.what()).find(part) == std::string::npos) {
      std::fprintf(stderr, "expected an error with '%s', found '%s'\n", part.c_str(), error.what());
      std::exit(1);
    }
    return;
  }
  std::fprintf(stderr, "no error; expected one with '%s'\n", part.c_str());
  std::exit(1);
}

// The bytes of an array at an odd address, in a block of exactly their size.
template <typename T>
class Misaligned {
 public:
  explicit Misaligned(const std::vector<T>& values)
      : bytes_(1 + values.size() * sizeof(T)), size_(static_cast<int64_t>(values.size())) {
    if (!values.empty()) {
      std::memcpy(bytes_.data() + 1, values.data(), values.size() * sizeof(T));
    }
  }
  ArrayView<T> view() const { return ArrayView<T>(bytes_.data() + 1, size_, sizeof(T)); }

 private:
  std::vector<char> bytes_;
  int64_t size_;
};

const std::vector<int> kThreads = {1, 2, 3, 7};
const auto kNone = std::optional<ArrayView<int32_t>>();

void test_parallel() {
  for (const int threads : {0, 1, 2, 5, 64}) {
    for (const int64_t size : {0, 1, 2, 9, 10, 11, 1000}) {
      std::vector<int> seen(static_cast<size_t>(size));
      parallel_chunks(size, 10, threads, [&](int64_t chunk, int64_t begin, int64_t end) {
        CHECK(begin == chunk * 10 && begin < end && end <= size);
        for (int64_t i = begin; i < end; ++i) {
          ++seen[i];
        }
      });
      CHECK(std::count(seen.begin(), seen.end(), 1) == size);
    }
    for (int run = 0; run < 50; ++run) {
      check_fails(
          [&] {
            parallel_for(200, threads, [](int64_t task) {
              if (task >= 23 && task % 2 == 1) {
                fail("task " + std::to_string(task) + "!");
              }
            });
          },
          "task 23!");
    }
  }
}

void test_permutation() {
  std::vector<int64_t> sizes = {0, 1, 2, 3, 5, 97, 997, 65537};
  for (int bits = 2; bits <= 17; ++bits) {
    for (const int64_t difference : {-1, 0, 1}) {
      sizes.push_back((int64_t{1} << bits) + difference);
    }
  }
  for (const int64_t size : sizes) {
    const Permutation permutation(size, 1, 2, 3);
    std::vector<bool> seen(static_cast<size_t>(size));
    for (int64_t i = 0; i < size; ++i) {
      const uint64_t element = permutation(static_cast<uint64_t>(i));
      CHECK(element < static_cast<uint64_t>(size) && !seen[element]);
      seen[element] = true;
      CHECK(permutation.inverse(element) == static_cast<uint64_t>(i));
    }
  }
  for (const int64_t size : {(int64_t{1} << 32) + 15, int64_t{1} << 61, Permutation::kMaxSize - 1,
                             Permutation::kMaxSize}) {
    const Permutation permutation(size, UINT64_MAX, UINT64_MAX, kSamples);
    for (const int64_t i : {int64_t{0}, int64_t{1}, size / 3, size - 1}) {
      const uint64_t element = permutation(static_cast<uint64_t>(i));
      CHECK(element < static_cast<uint64_t>(size));
      CHECK(permutation.inverse(element) == static_cast<uint64_t>(i));
    }
  }
}

std::vector<float> some_weights(int64_t size) {
  std::vector<float> weights(static_cast<size_t>(size));
  for (int64_t d = 0; d < size; ++d) {
    const uint64_t hash = keyed_hash(99, static_cast<uint64_t>(d));
    weights[d] = hash % 7 == 0 ? 0.0F : static_cast<float>(hash >> 40) / (1 << 20);
  }
  if (size > 0) {
    weights[0] = 1.0F;
  }
  return weights;
}

int64_t sum(const std::vector<int32_t>& values) {
  int64_t total = 0;
  for (const int32_t value : values) {
    total += value;
  }
  return total;
}

void test_counts() {
  for (const int64_t size : {1, 2, 4095, 4096, 4097, 65536, 65537, 200'001}) {
    const Misaligned<float> weights(some_weights(size));
    std::vector<int32_t> first_systematic, first_independent;
    double first_scale = 0.0;
    for (const int threads : kThreads) {
      const double scale = expected_scale(weights.view(), size, 3 * size, threads);
      std::vector<int32_t> systematic(static_cast<size_t>(size)), independent(systematic);
      systematic_counts(ExpectedCounts(weights.view(), scale, 3 * size, kNone), 1, 2, threads,
                        systematic.data());
      independent_counts(weights.view(), size, 1, 2, threads, independent.data());
      CHECK(sum(systematic) == size);
      CHECK(sum(independent) == size);
      if (threads == 1) {
        first_scale = scale;
        first_systematic = systematic;
        first_independent = independent;
      }
      CHECK(scale == first_scale);
      CHECK(systematic == first_systematic);
      CHECK(independent == first_independent);
    }
  }
  const Misaligned<float> none(std::vector<float>{});
  CHECK(expected_scale(none.view(), 0, 0, 2) == 0.0);
  systematic_counts(ExpectedCounts(none.view(), 1.0, 0, kNone), 1, 2, 2, nullptr);
  independent_counts(none.view(), 0, 1, 2, 2, nullptr);
}

// Sums that are an integer but for rounding draw that many, even when the shift is so close to
// 0 or 1 that it is less than what was rounded. So many seeds find such shifts.
void test_offset_near_integers() {
  constexpr uint128 kDraws = static_cast<uint128>(1000) << kFractionBits;
  constexpr uint64_t kSlip = kOne / 1250000;
  uint64_t smallest = kOne, largest = 0;
  for (uint64_t seed = 0; seed < (1 << 23); ++seed) {
    const uint64_t exact = systematic_offset(kDraws, seed, 0);
    smallest = std::min(smallest, exact);
    largest = std::max(largest, exact);
    CHECK(exact < kOne);
    CHECK((kDraws - kSlip + systematic_offset(kDraws - kSlip, seed, 0)) >> kFractionBits == 1000);
    CHECK((kDraws + kSlip + systematic_offset(kDraws + kSlip, seed, 0)) >> kFractionBits == 1000);
  }
  CHECK(smallest < kSlip && kOne - largest < kSlip);
}

void test_extreme_weights() {
  constexpr float kSmall = std::numeric_limits<float>::denorm_min();
  constexpr float kLarge = std::numeric_limits<float>::max();
  const Misaligned<float> weights({kSmall, kLarge, 0.0F, kSmall, kLarge});
  std::vector<int32_t> counts(5);
  for (const int64_t cap : {0, 1, 2, 1000}) {
    for (const int64_t draws : {1, 2, 4, 100}) {
      if (cap > 0 && cap * 4 < draws) {
        check_fails([&] { expected_scale(weights.view(), draws, cap, 2); }, "max_repeats");
        continue;
      }
      const double scale = expected_scale(weights.view(), draws, cap, 2);
      systematic_counts(ExpectedCounts(weights.view(), scale, cap, kNone), 1, 2, 2, counts.data());
      CHECK(sum(counts) == draws);
      independent_counts(weights.view(), draws, 1, 2, 2, counts.data());
      CHECK(sum(counts) == draws && counts[2] == 0);
    }
  }
  const Misaligned<int32_t> consumed({0, INT32_MAX, 5, 0, 1});
  systematic_counts(ExpectedCounts(weights.view(), 10.0 / kLarge, 0, consumed.view()), 1, 2, 2,
                    counts.data());
  CHECK(counts[1] == 0 && counts[4] == 9);

  for (const double scale : {2147483647.0, 2147483646.5, 2147483646.9999999}) {
    const Misaligned<float> one(std::vector<float>{1.0F});
    systematic_counts(ExpectedCounts(one.view(), scale, 0, kNone), 1, 2, 1, counts.data());
    CHECK(counts[0] >= INT32_MAX - 1);
  }
  check_fails(
      [&] {
        systematic_counts(ExpectedCounts(weights.view(), 1e300, 0, kNone), 1, 2, 1, counts.data());
      },
      "weights[0]: the document would be drawn 1.40129846e+255 times");
  for (const float bad : {-1.0F, std::numeric_limits<float>::quiet_NaN(),
                          std::numeric_limits<float>::infinity()}) {
    std::vector<float> values(300'000, 1.0F);
    values[70'000] = values[70'001] = values[299'999] = bad;
    const Misaligned<float> wrong(values);
    counts.resize(300'000);
    for (const int threads : kThreads) {
      check_fails([&] { expected_scale(wrong.view(), 5, 0, threads); }, "weights[70000]");
      check_fails([&] { independent_counts(wrong.view(), 5, 1, 2, threads, counts.data()); },
                  "weights[70000]");
      check_fails(
          [&] {
            systematic_counts(ExpectedCounts(wrong.view(), 1.0, 0, kNone), 1, 2, threads,
                              counts.data());
          },
          "weights[70000]");
    }
  }
}

void test_visit_order() {
  for (const int64_t size : {0, 1, 63, 64, 65, 32767, 32768, 32769, 100'000}) {
    std::vector<int32_t> values(static_cast<size_t>(size));
    for (int64_t d = 0; d < size; ++d) {
      values[d] = static_cast<int32_t>(keyed_hash(5, static_cast<uint64_t>(d)) % 3);
    }
    const Misaligned<int32_t> counts(values);
    for (const int64_t extra : {0, 1, 40'000}) {
      std::vector<int32_t> first;
      for (const int threads : kThreads) {
        const std::vector<int64_t> starts = draw_starts(counts.view(), threads);
        const Permutation order(starts.back() + extra, 1, 2, kDocuments);
        std::vector<int32_t> out(static_cast<size_t>(order.size()), INT32_MIN);
        visit_order(counts.view(), starts, order, 7, threads, out.data());
        CHECK(std::count(out.begin(), out.end(), INT32_MIN) == 0);
        if (threads == 1) {
          first = out;
        }
        CHECK(out == first);
      }
      std::sort(first.begin(), first.end());
      size_t place = static_cast<size_t>(extra);
      for (int64_t d = 0; d < size; ++d) {
        for (int32_t i = 0; i < values[d]; ++i) {
          CHECK(first[place++] == d + 7);
        }
      }
      CHECK(place == first.size());
    }
  }
  check_fails([] { draw_starts(Misaligned<int32_t>({1, -2}).view(), 2); }, "counts[1]: -2");
}

template <typename Id>
void test_packing(int64_t size, int64_t sequence_length, bool extra, bool parts) {
  constexpr int64_t kSequences = 1000;
  std::vector<int32_t> lengths(kSequences);
  for (int64_t s = 0; s < kSequences; ++s) {
    lengths[s] = static_cast<int32_t>(keyed_hash(1, static_cast<uint64_t>(s)) % 40);
  }
  std::vector<Id> documents(static_cast<size_t>(size));
  std::vector<int32_t> starts(static_cast<size_t>(size)), stops(starts);
  std::vector<int64_t> entry_of_token, place_of_token;
  for (int64_t p = 0; p < size; ++p) {
    const uint64_t hash = keyed_hash(2, static_cast<uint64_t>(p));
    documents[p] = static_cast<Id>(hash % kSequences);
    const int32_t length = lengths[documents[p]];
    starts[p] = parts ? static_cast<int32_t>((hash >> 20) % (length + 1)) : 0;
    stops[p] = parts ? starts[p] + static_cast<int32_t>((hash >> 40) % (length - starts[p] + 1))
                     : length;
    for (int32_t t = starts[p]; t < stops[p]; ++t) {
      entry_of_token.push_back(p);
      place_of_token.push_back(t);
    }
  }
  const auto total = static_cast<int64_t>(entry_of_token.size());
  const Misaligned<Id> documents_bytes(documents);
  const Misaligned<int32_t> lengths_bytes(lengths), starts_bytes(starts), stops_bytes(stops);
  const Entries<Id> entries(documents_bytes.view(), lengths_bytes.view(),
                            parts ? std::make_optional(starts_bytes.view()) : std::nullopt,
                            parts ? std::make_optional(stops_bytes.view()) : std::nullopt);
  const int64_t samples = num_samples(total, sequence_length, extra);
  std::vector<uint8_t> consumed(static_cast<size_t>(samples));
  for (int64_t k = 0; k < samples; ++k) {
    consumed[k] = keyed_hash(3, static_cast<uint64_t>(k)) % 3 == 0;
  }
  const Misaligned<uint8_t> consumed_bytes(consumed);

  for (const int threads : kThreads) {
    CHECK(lay_out(entries, threads, false).total() == total);
    const Layout layout = lay_out(entries, threads, true);
    CHECK(layout.total() == total);

    std::vector<int32_t> rows(static_cast<size_t>(2 * (samples + 1)), -1);
    fill_sample_index(layout, sequence_length, extra, samples, threads, rows.data());
    CHECK(rows[0] == 0 && rows[1] == 0);
    for (int64_t k = 1; k <= samples; ++k) {
      const int64_t token = k * sequence_length + (extra ? 1 : 0) - 1;
      const int64_t p = entry_of_token[token];
      CHECK(rows[2 * k] == p);
      CHECK(rows[2 * k + 1] == place_of_token[token] - starts[p] + (extra ? 0 : 1));
    }

    for (const int64_t first_token : {int64_t{-5}, int64_t{0}, int64_t{7}, total, total + 9}) {
      const Consumption consumption(first_token, sequence_length, consumed_bytes.view());
      std::vector<uint8_t> begun(static_cast<size_t>(size), 2);
      const auto chunks = remaining(entries, layout, consumption, threads, begun.data());
      std::vector<bool> left(static_cast<size_t>(total));
      for (const std::vector<Piece>& chunk : chunks) {
        for (const Piece& piece : chunk) {
          CHECK(begun[piece.entry] == 1 && piece.start < piece.stop);
          const auto from = std::lower_bound(entry_of_token.begin(), entry_of_token.end(),
                                             piece.entry) -
                            entry_of_token.begin();
          for (int32_t t = piece.start; t < piece.stop; ++t) {
            CHECK(place_of_token[from + t - starts[piece.entry]] == t);
            left[from + t - starts[piece.entry]] = true;
          }
        }
      }
      for (int64_t t = 0; t < total; ++t) {
        if (begun[entry_of_token[t]] == 1) {
          CHECK(left[t] != consumption.at(t).consumed);
        } else {
          CHECK(!consumption.at(t).consumed);
        }
      }
      CHECK(std::count(begun.begin(), begun.end(), 2) == 0);
    }
  }
}

void test_packing_errors() {
  std::vector<int32_t> documents(100'000, 0);
  documents[40'000] = documents[90'000] = 2;
  const Misaligned<int32_t> documents_bytes(documents), lengths({3, 4}), negative({3, -4});
  for (const int threads : kThreads) {
    const Entries<int32_t> entries(documents_bytes.view(), lengths.view(), kNone, kNone);
    check_fails([&] { lay_out(entries, threads, true); }, "entry_documents[40000]: 2");
  }
  const Misaligned<int32_t> one({1}), two({1, 1}), far({INT32_MAX});
  check_fails([&] { Entries<int32_t>(one.view(), lengths.view(), two.view(), kNone); },
              "starts: 2");
  check_fails(
      [&] { lay_out(Entries<int32_t>(one.view(), negative.view(), kNone, kNone), 1, true); },
      "sequence_lengths[1]: -4");
  check_fails(
      [&] { lay_out(Entries<int32_t>(one.view(), lengths.view(), far.view(), kNone), 1, true); },
      "starts[0]");
  const Misaligned<uint8_t> consumed({1, 1});
  check_fails([&] { Consumption(INT64_MIN, 1, consumed.view()); }, "first_token");
  check_fails([&] { Consumption(0, INT64_MAX, consumed.view()); }, "does not fit");
}

}  // namespace

int main() {
  test_parallel();
  test_permutation();
  test_counts();
  test_offset_near_integers();
  test_extreme_weights();
  test_visit_order();
  for (const int64_t size : {0, 1, 2, 100, 32768, 32769}) {
    for (const int64_t sequence_length : {1, 3, 100, 1'000'000}) {
      test_packing<int32_t>(size, sequence_length, true, false);
      test_packing<int64_t>(size, sequence_length, false, true);
    }
  }
  test_packing_errors();
  std::puts("all kernels passed");
}
