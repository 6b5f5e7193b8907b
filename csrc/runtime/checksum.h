// A checksum of blocks of bytes, as fast as they come from the second-level cache on any x86-64. It finds
// damage, not malice.
#pragma once

#include <emmintrin.h>

#include <cstdint>
#include <cstring>

namespace lc {

// Of n bytes that are block number `index` of some data; the sums of all blocks add up to the data's.
// Every 8 bytes are mixed with a key that tells their place, and the halves multiplied; the 8 bytes
// beside them are added, so that no key makes any of them vanish.
inline uint64_t block_sum(const uint8_t* p, int64_t n, uint64_t index) {
  constexpr uint64_t kStep = 0x9e3779b97f4a7c15u, kMix = 0xbf58476d1ce4e5b9u;
  __m128i sum[4], key[4];
  for (int i = 0; i < 4; ++i) {
    sum[i] = _mm_setzero_si128();
    key[i] = _mm_set_epi64x(static_cast<int64_t>(kMix * (2u * static_cast<uint64_t>(i) + 2)),
                            static_cast<int64_t>(kMix * (2u * static_cast<uint64_t>(i) + 1)));
  }
  const __m128i step = _mm_set1_epi64x(static_cast<int64_t>(kStep));
  const auto add = [&](const uint8_t* at) {
    for (int i = 0; i < 4; ++i) {
      const __m128i v = _mm_loadu_si128(reinterpret_cast<const __m128i*>(at) + i);
      const __m128i k = _mm_xor_si128(v, key[i]);
      sum[i] = _mm_add_epi64(sum[i], _mm_mul_epu32(k, _mm_srli_epi64(k, 32)));
      sum[i] = _mm_add_epi64(sum[i], _mm_shuffle_epi32(v, _MM_SHUFFLE(1, 0, 3, 2)));
      key[i] = _mm_add_epi64(key[i], step);
    }
  };
  int64_t at = 0;
  for (; at + 64 <= n; at += 64) add(p + at);
  if (at < n) {
    alignas(16) uint8_t rest[64] = {};
    std::memcpy(rest, p + at, static_cast<size_t>(n - at));
    add(rest);
  }
  uint64_t h = (index + 1) * kStep ^ static_cast<uint64_t>(n) * kMix;
  for (int i = 0; i < 4; ++i) {
    alignas(16) uint64_t lane[2];
    _mm_store_si128(reinterpret_cast<__m128i*>(lane), sum[i]);
    for (const uint64_t v : lane) {
      h = (h ^ v) * kMix;
      h ^= h >> 29;
    }
  }
  return h * kStep ^ h >> 32;
}

}  // namespace lc
