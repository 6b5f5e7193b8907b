// Under AddressSanitizer: scratch with a gap that may not be touched behind every buffer, and NaN where a
// kernel has not written yet; and a look at what masked instructions touch, which the compiler does not
// check. Nothing of it is left in other builds.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>

#include <cstring>

extern "C" {
void __asan_loadN(const void* p, size_t bytes);
void __asan_storeN(void* p, size_t bytes);
}

namespace lc {
constexpr int64_t kScratchGap = 64;
static inline void sees_read(const void* p, size_t bytes) {
  if (bytes != 0) __asan_loadN(p, bytes);
}
static inline void sees_write(void* p, size_t bytes) {
  if (bytes != 0) __asan_storeN(p, bytes);
}
static inline void close_memory(const void* p, size_t bytes) { __asan_poison_memory_region(p, bytes); }
static inline void open_memory(const void* p, size_t bytes) { __asan_unpoison_memory_region(p, bytes); }
// For a kernel that uses the first `need` of `bytes`.
static inline void renew_scratch(uint8_t* p, size_t need, size_t bytes) {
  if (p == nullptr) return;
  open_memory(p, bytes);
  std::memset(p, 0xff, need);
  close_memory(p + need, bytes - need);
}
}  // namespace lc

#else

namespace lc {
constexpr int64_t kScratchGap = 0;
static inline void sees_read(const void*, size_t) {}
static inline void sees_write(void*, size_t) {}
static inline void close_memory(const void*, size_t) {}
static inline void open_memory(const void*, size_t) {}
static inline void renew_scratch(uint8_t*, size_t, size_t) {}
}  // namespace lc

#endif
