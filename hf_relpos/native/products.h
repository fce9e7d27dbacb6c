// Products of small matrices: those of torch where it has them, else plain loops.
#pragma once

#include <ATen/native/CPUBlas.h>

#include "vectors.h"

namespace relpos {

#if defined(RELPOS_PLAIN_PRODUCTS)
#undef CPUBLAS_BRGEMM_F32F32F32
#undef CPUBLAS_BRGEMM_BF16BF16F32
#endif
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
constexpr bool kHasBf16Products = true;
#else
constexpr bool kHasBf16Products = false;
#endif

// C (M, N) = A (M, K) · B (K, N), or added to it; rows `lda`, `ldb`, `ldc` apart. M is a multiple of 4, N and K of 16.
// In bf16 B has two rows beside each other, and sums are taken in fp32.
inline void multiply(int64_t M, int64_t N, int64_t K, const float* A, int64_t lda, const float* B, int64_t ldb,
                     float* C, int64_t ldc, bool is_added) {
#if defined(CPUBLAS_BRGEMM_F32F32F32)
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, is_added, A, B, C, false);
#else
  for (int64_t n = 0; n < N; n += kLanes)
    for (int64_t m = 0; m < M; m += 4) {
      Vec sums[4];
      for (int i = 0; i < 4; i++) sums[i] = is_added ? load(C + (m + i) * ldc + n) : Vec{};
      for (int64_t k = 0; k < K; k++) {
        const Vec row = load(B + k * ldb + n);
        for (int i = 0; i < 4; i++) sums[i] += A[(m + i) * lda + k] * row;
      }
      for (int i = 0; i < 4; i++) store(C + (m + i) * ldc + n, sums[i]);
    }
#endif
}

inline void multiply(int64_t M, int64_t N, int64_t K, const BFloat16* A, int64_t lda, const BFloat16* B, int64_t ldb,
                     float* C, int64_t ldc, bool is_added) {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
  at::native::cpublas::brgemm(M, N, K, lda, ldb, ldc, is_added, A, B, C, true);
#endif
}

// What a thread has to give back when it is done with products.
struct ProductsOfThread {
  bool is_bf16;
  ~ProductsOfThread() {
#if defined(CPUBLAS_BRGEMM_BF16BF16F32)
    if (is_bf16) at::native::cpublas::brgemm_release(true);
#endif
  }
};

// Numbers below 2^−126 are 0 in this thread while it lives: the weights of many keys under a steep bias are such numbers,
// and processors may take a hundred times as long for them.
struct FlushedDenormals {
#if defined(__SSE__)
  unsigned before = _mm_getcsr();
  FlushedDenormals() { _mm_setcsr(before | 0x8040); }
  ~FlushedDenormals() { _mm_setcsr(before); }
#else
  FlushedDenormals() {}
  ~FlushedDenormals() {}
#endif
};

}  // namespace relpos
