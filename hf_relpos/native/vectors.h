// Vectors of the width that the compiler's target has, and what is done with blocks of numbers in them.
#pragma once

#include <c10/util/BFloat16.h>

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__SSE__)
#include <immintrin.h>
#endif

namespace relpos {

using c10::BFloat16;

#if defined(__AVX512F__)
constexpr int kWidth = 64;
#elif defined(__AVX__)
constexpr int kWidth = 32;
#else
constexpr int kWidth = 16;
#endif
constexpr int kLanes = kWidth / 4;

typedef float Vec __attribute__((vector_size(kWidth)));
typedef int32_t IntVec __attribute__((vector_size(kWidth)));
typedef uint32_t WordVec __attribute__((vector_size(kWidth)));
typedef uint16_t HalfVec __attribute__((vector_size(kWidth / 2)));

template <class V, class P>
inline V load_as(const P* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}
inline Vec load(const float* from) { return load_as<Vec>(from); }
template <class V, class P>
inline void store(P* to, V value) {
  std::memcpy(to, &value, sizeof(V));
}
inline Vec splat(float value) { return Vec{} + value; }
inline IntVec splat_int(int32_t value) { return IntVec{} + value; }
inline Vec larger(Vec a, Vec b) { return a > b ? a : b; }
inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

inline IntVec lane_numbers() {
  IntVec lanes;
  for (int lane = 0; lane < kLanes; lane++) lanes[lane] = lane;
  return lanes;
}

// 2^x, exactly 0 from −126.5 down, NaN for NaN; relative error 8e-8, or 3e-6 for what is rounded to bf16 next.
template <bool is_rough>
inline Vec exp2(Vec x) {
  const Vec lowest = splat(-127.f), magic = splat(12582912.f);  // adding 1.5 · 2^23 rounds to an integer
  x = lowest > x ? lowest : x;
  const Vec shifted = x + magic, f = x - (shifted - magic);
  const WordVec scale = ((WordVec)shifted << 23) + (127u << 23);
  Vec p;
  if constexpr (is_rough) {
    p = splat(9.570101911e-3f);
    p = p * f + 5.591786032e-2f;
    p = p * f + 2.402474483e-1f;
    p = p * f + 6.931218147e-1f;
    p = p * f + 9.999992614e-1f;
  } else {
    p = splat(1.327647199e-3f);
    p = p * f + 9.675541334e-3f;
    p = p * f + 5.550713273e-2f;
    p = p * f + 2.402211972e-1f;
    p = p * f + 6.931469671e-1f;
    p = p * f + 1.000000072f;
  }
  return p * (Vec)scale;
}

// --- bf16

// The bits of the nearest bf16 in the upper half of each word.
inline WordVec rounded_words(Vec x) {
  const WordVec bits = (WordVec)x;
  return bits + 0x7fffu + ((bits >> 16) & 1u);
}

// a and b in bf16: each by itself, and their lanes in turn, a0 b0 a1 b1 ...
struct Pair {
  HalfVec a, b;
  WordVec both;
};
inline Pair to_bf16(Vec a, Vec b) {
  Pair pair;
#if defined(__AVX512BF16__) && defined(__AVX512BW__)
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a);
  pair.a = (HalfVec)_mm512_castsi512_si256(halves);
  pair.b = (HalfVec)_mm512_extracti64x4_epi64(halves, 1);
  const WordVec first = (WordVec)lane_numbers();
  pair.both = (WordVec)_mm512_permutexvar_epi16((__m512i)(first | ((first + 16u) << 16)), halves);
#else
  const WordVec of_a = rounded_words(a) >> 16, of_b = rounded_words(b);
  pair.a = __builtin_convertvector(of_a, HalfVec);
  pair.b = __builtin_convertvector(of_b >> 16, HalfVec);
  pair.both = of_a | (of_b & 0xffff0000u);
#endif
  return pair;
}

inline float to_float(float x) { return x; }
inline float to_float(BFloat16 x) {
  const uint32_t bits = uint32_t{x.x} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline BFloat16 from_float<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  bits += 0x7fffu + ((bits >> 16) & 1u);
  return BFloat16(static_cast<unsigned short>(bits >> 16), BFloat16::from_bits());
}

inline Vec load_floats(const float* from) { return load(from); }
inline Vec load_floats(const BFloat16* from) {
  return (Vec)(__builtin_convertvector(load_as<HalfVec>(from), WordVec) << 16);
}

// --- layouts

// Rows of `width` numbers → rows of `padded_width`, zero where there are none, `padded` rows in all.
template <class From, class To>
void copy_rows(const From* from, int64_t stride, int64_t rows, int64_t width, To* to, int64_t padded,
               int64_t padded_width) {
  for (int64_t row = 0; row < rows; row++, to += padded_width) {
    const From* source = from + row * stride;
    if constexpr (std::is_same_v<From, To>) {
      std::memcpy(to, source, width * sizeof(To));
    } else {
      for (int64_t d = 0; d < width; d++) to[d] = from_float<To>(to_float(source[d]));
    }
    std::memset(static_cast<void*>(to + width), 0, (padded_width - width) * sizeof(To));
  }
  std::memset(static_cast<void*>(to), 0, (padded - rows) * padded_width * sizeof(To));
}

#if defined(__clang__)
template <int step, bool is_upper, int... lane>
inline WordVec exchange(WordVec a, WordVec b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (is_upper ? (lane & step ? kLanes + lane : lane + step)
                                                 : (lane & step ? kLanes + lane - step : lane))...);
}
#else
template <int step, bool is_upper, int... lane>
inline WordVec exchange(WordVec a, WordVec b, std::integer_sequence<int, lane...>) {
  constexpr WordVec from = {(is_upper ? (lane & step ? kLanes + lane : lane + step)
                                      : (lane & step ? kLanes + lane - step : lane))...};
  return __builtin_shuffle(a, b, from);
}
#endif

template <int step>
inline void exchange_all(WordVec (&rows)[kLanes]) {
  if constexpr (step < kLanes) {
    constexpr auto lanes = std::make_integer_sequence<int, kLanes>();
    for (int row = 0; row < kLanes; row++) {
      if (row & step) continue;
      const WordVec a = rows[row], b = rows[row + step];
      rows[row] = exchange<step, false>(a, b, lanes);
      rows[row + step] = exchange<step, true>(a, b, lanes);
    }
    exchange_all<2 * step>(rows);
  }
}

// (rows, width) words → (width, rows); both are multiples of 16. `from_stride` counts bytes, `to_stride` words.
inline void transpose_words(const void* from, int64_t from_stride, int64_t rows, int64_t width, void* to,
                            int64_t to_stride) {
  const char* source = static_cast<const char*>(from);
  uint32_t* target = static_cast<uint32_t*>(to);
  for (int64_t row = 0; row < rows; row += kLanes)
    for (int64_t column = 0; column < width; column += kLanes) {
      WordVec block[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; k++) block[k] = load_as<WordVec>(source + (row + k) * from_stride + column * 4);
      exchange_all<1>(block);
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; k++) store(target + (column + k) * to_stride + row, block[k]);
    }
}

// (rows, width) numbers → what a product takes as its second operand in place of the (width, rows) transpose: itself
// in fp32; in bf16 two numbers of a column beside each other. `to_stride` counts columns.
template <class T>
void pack_transposed(const T* from, int64_t stride, int64_t rows, int64_t width, T* to, int64_t to_stride) {
  transpose_words(from, stride * sizeof(T), rows, width * sizeof(T) / 4, to, to_stride);
}

// (rows, width) → the same as the second operand of a product, in bf16 with two rows beside each other.
inline void pack_pairs(const BFloat16* from, int64_t stride, int64_t rows, int64_t width, BFloat16* to) {
  for (int64_t row = 0; row < rows; row += 2, from += 2 * stride, to += 2 * width) {
    const uint16_t* a = reinterpret_cast<const uint16_t*>(from);
    const uint16_t* b = a + stride;
    for (int64_t d = 0; d < width; d++) {
      const uint32_t word = uint32_t{a[d]} | uint32_t{b[d]} << 16;
      std::memcpy(reinterpret_cast<char*>(to) + 4 * d, &word, 4);
    }
  }
}

// (rows, width) → (width, rows), as the first operand of a product. `words` has room for both.
inline void transpose(const float* from, int64_t stride, int64_t rows, int64_t width, float* to, uint32_t*) {
  transpose_words(from, stride * 4, rows, width, to, rows);
}
inline void transpose(const BFloat16* from, int64_t stride, int64_t rows, int64_t width, BFloat16* to,
                      uint32_t* words) {
  transpose_words(from, stride * 2, rows, width / 2, words, rows);
  for (int64_t d = 0; d < width; d += 2, words += rows) {
    uint16_t* first = reinterpret_cast<uint16_t*>(to + d * rows);
    uint16_t* second = first + rows;
    for (int64_t row = 0; row < rows; row++) {
      first[row] = static_cast<uint16_t>(words[row]);
      second[row] = static_cast<uint16_t>(words[row] >> 16);
    }
  }
}

}  // namespace relpos
