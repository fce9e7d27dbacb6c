// The functions that Python calls: on CPUs, attention with a bias that depends on the head and the distance alone,
// RMSNorm and dropout.
#include <ATen/Parallel.h>

#include <cstdio>
#include <exception>

#include "backward.h"
#include "dropout.h"
#include "forward.h"
#include "norm.h"

namespace relpos {

template <class Pass>
void run_in_parallel(const Call& call, int64_t count, bool is_bf16) {
  at::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    const FlushedDenormals flushed;
    const ProductsOfThread products{is_bf16};
    Pass pass(call);
    for (int64_t index = begin; index < end; index++) pass.run(index);
  });
}

template <template <class, class> class Pass>
void run(const Call& call, int64_t count, bool is_bf16, bool multiplies_bf16) {
  if (!is_bf16)
    run_in_parallel<Pass<float, float>>(call, count, false);
  else if (multiplies_bf16)
    run_in_parallel<Pass<BFloat16, BFloat16>>(call, count, true);
  else
    run_in_parallel<Pass<BFloat16, float>>(call, count, false);
}

// Calls `function` with a number of the dtype of each: input, weight and output.
template <class Function>
void with_dtypes(bool x_is_bf16, bool weight_is_bf16, Function function) {
  if (x_is_bf16 && weight_is_bf16)
    function(BFloat16(), BFloat16(), BFloat16());
  else if (x_is_bf16)
    function(BFloat16(), float(), float());
  else if (weight_is_bf16)
    function(float(), BFloat16(), float());
  else
    function(float(), float(), float());
}

template <class T>
const T* as(T, const void* data) {
  return static_cast<const T*>(data);
}
template <class T>
T* as(T, void* data) {
  return static_cast<T*>(data);
}

// 0, or 1 with a message in `error`.
template <class Function>
int guarded(char* error, int64_t length, Function function) {
  try {
    function();
    return 0;
  } catch (const std::exception& raised) {
    std::snprintf(error, length, "%s", raised.what());
    return 1;
  }
}

}  // namespace relpos

#pragma GCC visibility push(default)
extern "C" {

int64_t relpos_call_size() { return sizeof(relpos::Call); }

int relpos_has_bf16_products() { return relpos::kHasBf16Products; }

int relpos_forward(const relpos::Call* call, int is_bf16, int multiplies_bf16, char* error, int64_t length) {
  return relpos::guarded(error, length, [&] {
    const int64_t count = call->batch_size * call->num_heads * call->num_tiles();
    relpos::run<relpos::Forward>(*call, count, is_bf16, multiplies_bf16);
  });
}

int relpos_backward(const relpos::Call* call, int is_bf16, int multiplies_bf16, char* error, int64_t length) {
  return relpos::guarded(error, length, [&] {
    relpos::run<relpos::Backward>(*call, call->batch_size * call->num_groups, is_bf16, multiplies_bf16);
  });
}

int relpos_norm_forward(const void* x, const void* weight, const float* rstd, void* out, int64_t rows, int64_t width,
                        int x_is_bf16, int weight_is_bf16, char* error, int64_t length) {
  return relpos::guarded(error, length, [&] {
    relpos::with_dtypes(x_is_bf16, weight_is_bf16, [&](auto of_x, auto of_weight, auto of_out) {
      using relpos::as;
      relpos::norm_forward(as(of_x, x), as(of_weight, weight), rstd, as(of_out, out), rows, width);
    });
  });
}

// `grad_x` or `grad_weight`, which is fp32, may be null.
int relpos_norm_backward(const void* grad, const void* x, const void* weight, const float* rstd, void* grad_x,
                         float* grad_weight, int64_t rows, int64_t width, int x_is_bf16, int weight_is_bf16,
                         char* error, int64_t length) {
  return relpos::guarded(error, length, [&] {
    relpos::with_dtypes(x_is_bf16, weight_is_bf16, [&](auto of_x, auto of_weight, auto of_out) {
      using relpos::as;
      relpos::norm_backward(as(of_out, grad), as(of_x, x), as(of_weight, weight), rstd, as(of_x, grad_x), grad_weight,
                            rows, width);
    });
  });
}

int relpos_dropout(const void* x, void* out, int64_t size, uint64_t seed, uint32_t threshold, float scale, int is_bf16,
                   char* error, int64_t length) {
  return relpos::guarded(error, length, [&] {
    const auto run = [&](auto of_x) {
      relpos::dropout(relpos::as(of_x, x), relpos::as(of_x, out), size, seed, threshold, scale);
    };
    is_bf16 ? run(relpos::BFloat16()) : run(float());
  });
}
}
#pragma GCC visibility pop
