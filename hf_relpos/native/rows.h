// Numbers of any dtype as floats, a vector or less at a time, and how many a thread takes.
#pragma once

#include "vectors.h"

namespace relpos {

constexpr int64_t kGrain = 32768;  // numbers that a thread takes at least, as in torch

// How many numbers of a row are taken at a time: as many as a vector has, or those at its end.
struct Whole {};
struct Part {
  int64_t count;
};

template <class T>
inline Vec load_floats(const T* from, Whole) {
  return load_floats(from);
}
template <class T>
inline Vec load_floats(const T* from, Part part) {
  T values[kLanes] = {};
  std::memcpy(static_cast<void*>(values), from, part.count * sizeof(T));
  return load_floats(values);
}
template <class T, class V>
inline void store_part(T* to, V values, Whole) {
  store(to, values);
}
template <class T, class V>
inline void store_part(T* to, V values, Part part) {
  std::memcpy(static_cast<void*>(to), &values, part.count * sizeof(T));
}

// The nearest bf16 in the upper half of each word, as torch rounds: a number of any size, and NaN stays NaN.
inline WordVec bf16_words(Vec x) {
  return x == x ? rounded_words(x) & 0xffff0000u : (WordVec)x | 0x400000u;
}
template <class Count>
inline void store_floats(float* to, Vec values, Count count) {
  store_part(to, values, count);
}
template <class Count>
inline void store_floats(BFloat16* to, Vec values, Count count) {
  store_part(to, __builtin_convertvector(bf16_words(values) >> 16, HalfVec), count);
}
inline Vec rounded_to(float, Vec x) { return x; }
inline Vec rounded_to(BFloat16, Vec x) { return (Vec)bf16_words(x); }

// Calls `function` with each column where a vector begins, and how many numbers of the row are there.
template <class Function>
inline void for_columns(int64_t width, Function function) {
  int64_t column = 0;
  for (; column + kLanes <= width; column += kLanes) function(column, Whole());
  if (column < width) function(column, Part{width - column});
}

}  // namespace relpos
