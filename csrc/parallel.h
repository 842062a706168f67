// Loops over independent tasks on several threads, with results that do not depend on how many.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

namespace megatron_dwm {

// 0 means all cores that this process may run on.
inline int thread_count(int threads) {
  return threads > 0 ? threads : std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

// Calls run(task) for every task in [0, num_tasks), in no particular order. When tasks throw,
// the exception of the lowest of them is rethrown, so that an error names the first bad entry
// for any number of threads.
template <typename Run>
void parallel_for(int64_t num_tasks, int threads, const Run& run) {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> failed{INT64_MAX};
  std::exception_ptr error;
  std::mutex mutex;

  const auto work = [&]() {
    for (;;) {
      const int64_t task = next.fetch_add(1, std::memory_order_relaxed);
      // Tasks are handed out in ascending order: all below `failed` have been handed out.
      if (task >= num_tasks || task > failed.load(std::memory_order_relaxed)) {
        return;
      }
      try {
        run(task);
      } catch (...) {
        const std::lock_guard<std::mutex> lock(mutex);
        if (task < failed.load(std::memory_order_relaxed)) {
          failed.store(task, std::memory_order_relaxed);
          error = std::current_exception();
        }
      }
    }
  };

  const int64_t helpers = std::min<int64_t>(thread_count(threads), num_tasks) - 1;
  std::vector<std::thread> pool;
  pool.reserve(static_cast<size_t>(std::max<int64_t>(helpers, 0)));
  for (int64_t i = 0; i < helpers; ++i) {
    try {
      pool.emplace_back(work);
    } catch (const std::system_error&) {
      // The system has no more threads to give: those that there are do all the work.
      break;
    }
  }
  work();
  for (std::thread& thread : pool) {
    thread.join();
  }
  if (error) {
    std::rethrow_exception(error);
  }
}

// Calls run(chunk, begin, end) for every chunk of at most `chunk_size` items of [0, size).
template <typename Run>
void parallel_chunks(int64_t size, int64_t chunk_size, int threads, const Run& run) {
  parallel_for((size + chunk_size - 1) / chunk_size, threads, [&](int64_t chunk) {
    const int64_t begin = chunk * chunk_size;
    run(chunk, begin, std::min(begin + chunk_size, size));
  });
}

}  // namespace megatron_dwm
