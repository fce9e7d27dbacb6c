// Dropout whose mask is a function of a seed and of the place of a number alone: Philox 4x32-10, of Salmon et al.,
// "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

#include "rows.h"

namespace relpos {

constexpr int64_t kCounters = 16;          // that are taken together, on every CPU
constexpr int64_t kBlock = 4 * kCounters;  // numbers that they serve: the first word of each, then the second of each ...
constexpr int kRounds = 10;

typedef uint64_t LongVec __attribute__((vector_size(kWidth)));

// The products of the lower halves of the lanes with a number.
inline LongVec products(LongVec a, uint32_t b) {
#if defined(__AVX512F__)
  return (LongVec)_mm512_mul_epu32((__m512i)a, _mm512_set1_epi64(b));
#elif defined(__AVX2__)
  return (LongVec)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(b));
#elif defined(__SSE2__) && !defined(__AVX__)
  return (LongVec)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(b));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// The keys of the rounds.
struct Keys {
  uint64_t first[kRounds], second[kRounds];

  explicit Keys(uint64_t seed) {
    uint32_t a = static_cast<uint32_t>(seed), b = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < kRounds; round++, a += 0x9e3779b9u, b += 0xbb67ae85u) {
      first[round] = a;
      second[round] = b;
    }
  }
};

// Four words of each counter, in the lower halves of the lanes; anything stands in the upper ones.
struct Words {
  LongVec of[4];

  Words(LongVec counters, const Keys& keys) : of{counters, counters >> 32, {}, {}} {
#pragma GCC unroll 10
    for (int round = 0; round < kRounds; round++) {
      const LongVec a = products(of[0], 0xd2511f53u), b = products(of[2], 0xcd9e8d57u);
      of[0] = (b >> 32) ^ of[1] ^ keys.first[round];
      of[1] = b;
      of[2] = (a >> 32) ^ of[3] ^ keys.second[round];
      of[3] = a;
    }
  }
};

// A block of numbers, each times `scale`, or times 0 where its word is below `threshold`.
template <class T>
inline void drop_block(const T* x, T* out, uint64_t block, const Keys& keys, uint32_t threshold, float scale) {
  LongVec even;
  for (int lane = 0; lane < kLanes / 2; lane++) even[lane] = 2 * lane;
  for (int64_t counter = 0; counter < kCounters; counter += kLanes) {
    const LongVec counters = even + (block * kCounters + counter);
    const Words of_even(counters, keys), of_odd(counters + 1, keys);
    for (int word = 0; word < 4; word++) {
      const WordVec words = (WordVec)((of_even.of[word] & 0xffffffffu) | (of_odd.of[word] << 32));
      const Vec factors = words < threshold ? Vec{} : splat(scale);
      const int64_t at = word * kCounters + counter;
      store_floats(out + at, load_floats(x + at, Whole()) * factors, Whole());
    }
  }
}

template <class T>
void dropout(const T* x, T* out, int64_t size, uint64_t seed, uint32_t threshold, float scale) {
  const Keys keys(seed);
  at::parallel_for(0, (size + kBlock - 1) / kBlock, kGrain / kBlock, [&](int64_t begin, int64_t end) {
    const int64_t whole = std::min(end, size / kBlock);
    for (int64_t block = begin; block < whole; block++)
      drop_block(x + block * kBlock, out + block * kBlock, block, keys, threshold, scale);
    if (whole == end) return;
    T values[kBlock] = {};
    const int64_t bytes = (size - whole * kBlock) * sizeof(T);
    std::memcpy(static_cast<void*>(values), x + whole * kBlock, bytes);
    drop_block(values, values, whole, keys, threshold, scale);
    std::memcpy(static_cast<void*>(out + whole * kBlock), values, bytes);
  });
}

}  // namespace relpos
