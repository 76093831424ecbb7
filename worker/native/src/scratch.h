// Memory that a kernel uses during a call and keeps for the next one: no call allocates once the largest step was seen.

#pragma once

#include <cstdlib>

namespace spanwise {

// One thread's buffer. Untouched parts of a large one take no memory.
class Scratch {
 public:
  ~Scratch() { std::free(data_); }

  // Returns at least so many bytes, aligned to a cache line, with any content.
  char* take(size_t bytes) {
    if (bytes > size_) {
      std::free(data_);
      size_ = (bytes + 4095) / 4096 * 4096;
      data_ = static_cast<char*>(std::aligned_alloc(64, size_));
      if (!data_) std::abort();
    }
    return data_;
  }

 private:
  char* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace spanwise
