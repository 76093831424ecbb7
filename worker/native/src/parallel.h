// Threads for the kernels: those of torch's own OpenMP, which are awake already between two operators.
//
// The kernels are compiled without OpenMP and link no runtime of it: a second one in the process would bring threads of
// its own that spin against torch's. The functions below are found in the runtime that torch has loaded; where there is
// none, kernels run on the calling thread.

#pragma once

#include <algorithm>

extern "C" {
void GOMP_parallel(void (*body)(void*), void* data, unsigned num_threads, unsigned flags) __attribute__((weak));
int omp_get_thread_num() __attribute__((weak));
int omp_get_num_threads() __attribute__((weak));
}

namespace spanwise {

// Calls `body(thread, num_threads)` on so many threads, or fewer, and waits for all of them.
template <class Body>
void on_threads(long num_threads, const Body& body) {
  if (num_threads <= 1 || !GOMP_parallel || !omp_get_thread_num || !omp_get_num_threads) {
    body(0L, 1L);
    return;
  }
  auto call = [](void* data) {
    (*static_cast<const Body*>(data))(static_cast<long>(omp_get_thread_num()),
                                      static_cast<long>(omp_get_num_threads()));
  };
  GOMP_parallel(call, const_cast<Body*>(&body), static_cast<unsigned>(num_threads), 0);
}

// Calls `body(first, stop)` for even shares of `[0, count)`, each a multiple of `step` but for the last one.
template <class Body>
void in_shares(long num_threads, long count, long step, const Body& body) {
  const long num_steps = (count + step - 1) / step;
  on_threads(std::min(num_threads, num_steps), [&](long thread, long threads) {
    const long first = num_steps * thread / threads * step;
    const long stop = std::min(count, num_steps * (thread + 1) / threads * step);
    if (first < stop) body(first, stop);
  });
}

}  // namespace spanwise
