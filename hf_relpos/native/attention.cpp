// Attention with a bias that depends on the head and the distance alone, on CPUs: the functions that Python calls.
#include <ATen/Parallel.h>

#include <cstdio>
#include <exception>

#include "backward.h"
#include "forward.h"

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
}
#pragma GCC visibility pop
