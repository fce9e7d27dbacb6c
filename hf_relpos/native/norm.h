// RMSNorm over rows of `width` numbers: what follows the sum of squares, and the backward pass, each in one go.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <vector>

#include "rows.h"

namespace relpos {

constexpr int64_t kRows = 32;    // rows of a part of the gradient of the weight, at least
constexpr int64_t kParts = 256;  // how many there are, at most

// weight · (x · rstd, rounded to the dtype of x), each product rounded by itself: the numbers of operations of torch.
template <class X, class W, class Out>
void norm_forward(const X* x, const W* weight, const float* rstd, Out* out, int64_t rows, int64_t width) {
  at::parallel_for(0, rows, std::max<int64_t>(kGrain / width, 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row++) {
      const X* from = x + row * width;
      Out* to = out + row * width;
      for_columns(width, [&](int64_t column, auto count) {
        const Vec normed = rounded_to(X(), load_floats(from + column, count) * splat(rstd[row]));
        store_floats(to + column, load_floats(weight + column, count) * normed, count);
      });
    }
  });
}

// Adds a row to the gradient of the weight, and writes that of x; either may be null.
template <class X, class W, class Out>
inline void norm_backward_row(const Out* grad, const X* x, const W* weight, float rstd, X* grad_x, float* grad_weight,
                              int64_t width) {
  Vec products{};
  for_columns(width, [&](int64_t column, auto count) {
    const Vec normed = load_floats(x + column, count) * rstd;
    const Vec product = load_floats(grad + column, count) * normed;
    products += product * load_floats(weight + column, count);
    if (grad_weight) store_floats(grad_weight + column, load_floats(grad_weight + column, count) + product, count);
  });
  if (!grad_x) return;
  float mean = 0.f;
  for (int lane = 0; lane < kLanes; lane++) mean += products[lane];
  mean /= width;
  for_columns(width, [&](int64_t column, auto count) {
    const Vec normed = load_floats(x + column, count) * rstd;
    const Vec grad_normed = load_floats(grad + column, count) * load_floats(weight + column, count);
    store_floats(grad_x + column, (grad_normed - normed * mean) * rstd, count);
  });
}

// The gradients of what `norm_forward` computes, of its rstd too. Which rows are summed together, and in which order,
// depends on how many there are alone.
template <class X, class W, class Out>
void norm_backward(const Out* grad, const X* x, const W* weight, const float* rstd, X* grad_x, float* grad_weight,
                   int64_t rows, int64_t width) {
  const int64_t part = std::max(kRows, (rows + kParts - 1) / kParts), parts = (rows + part - 1) / part;
  std::vector<float> sums(grad_weight ? parts * width : 0);
  at::parallel_for(0, parts, std::max<int64_t>(kGrain / (part * width), 1), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * part; row < std::min(end * part, rows); row++) {
      const int64_t at = row * width;
      norm_backward_row(grad + at, x + at, weight, rstd[row], grad_x ? grad_x + at : nullptr,
                        grad_weight ? sums.data() + row / part * width : nullptr, width);
    }
  });
  if (!grad_weight) return;
  std::fill_n(grad_weight, width, 0.f);
  for (int64_t index = 0; index < parts; index++)
    for (int64_t column = 0; column < width; column++) grad_weight[column] += sums[index * width + column];
}

}  // namespace relpos
