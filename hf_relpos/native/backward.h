// The backward pass: scores are computed a second time, block by block, with keys as rows and queries as columns, and
// what a row of scores adds to the gradient of the table is one addition of vectors.
#pragma once

#include "call.h"

namespace relpos {

template <class IO, class T>
class Backward {
 public:
  explicit Backward(const Call& call)
      : call_(call),
        width_(padded_width<T>(call)),
        columns_(call.tile_width()),
        num_columns_(call.num_tiles() * columns_),
        score_stride_(columns_ + 16),
        mask_(call),
        bias_(call),
        sums_(call),
        queries_(num_columns_ * width_),
        grads_(num_columns_ * width_),
        query_rows_(num_columns_ * width_),
        grad_rows_(num_columns_ * width_),
        rows_(columns_ * width_),
        more_rows_(kKeys * width_),
        keys_(kKeys * width_),
        words_(kKeys * width_ / 2),
        scores_(kKeys * score_stride_),
        grad_scores_(kKeys * score_stride_),
        weight_halves_(is_half ? kKeys * columns_ : 0),
        grad_halves_(is_half ? kKeys * columns_ : 0),
        grad_pairs_(is_half ? kKeys * columns_ : 0),
        grad_query_(num_columns_ * width_),
        grad_key_(kept_keys(call) * width_),
        grad_value_(kept_keys(call) * width_),
        turned_(columns_ * width_),
        lse_(num_columns_),
        delta_(num_columns_),
        lanes_(kKeys) {}

  // Computes the gradients of a key head, with an index over rows of the batch and key heads.
  void run(int64_t index) {
    group_ = index % call_.num_groups, batch_ = index / call_.num_groups;
    mask_.take(batch_);
    const int64_t group_size = call_.group_size();
    for (int64_t member = 0; member < group_size; member++) {
      head_ = group_ * group_size + member;
      bias_.take(call_, head_);
      sums_.clear();
      for (int64_t tile = 0; tile < call_.num_tiles(); tile++) pack_tile(tile * columns_);
      std::fill_n(grad_query_.data, num_columns_ * width_, 0.f);
      for (int64_t block = 0; block < call_.num_blocks(); block++)
        run_block(block * kKeys, member == 0, member == group_size - 1);
      for (int64_t tile = 0; tile < call_.num_tiles(); tile++) write_tile(tile * columns_);
      float* to = call_.table_sums + (batch_ * call_.num_heads + head_) * call_.table_length;
      std::fill_n(to, call_.table_length, 0.f);
      std::copy_n(sums_.at(0), sums_.length, to);
    }
  }

 private:
  static constexpr bool is_half = sizeof(T) == 2;
  static constexpr int64_t beside = is_half ? 2 : 1;  // rows of a second operand that stand beside each other

  // Heads that share a key add to its gradients one after the other.
  static int64_t kept_keys(const Call& call) { return call.group_size() > 1 ? call.num_blocks() * kKeys : kKeys; }

  // Lays the queries of a tile and the gradients of their outputs out for the products.
  void pack_tile(int64_t first) {
    const int64_t count = std::min(columns_, call_.num_queries - first), held = round_up(count, kColumns);
    pack_rows(call_.query, first, count, held, queries_, query_rows_);
    pack_rows(call_.grad_out, first, count, held, grads_, grad_rows_);
    const float* lse = call_.lse + (batch_ * call_.num_heads + head_) * call_.num_queries;
    for (int64_t query = first; query < first + held; query++) {
      const bool is_real = query < first + count;
      lse_[query] = is_real ? lse[query] * kLog2E : 0.f;
      delta_[query] = is_real ? dot(call_.grad_out.at<IO>(batch_, head_, query), call_.out.at<IO>(batch_, head_, query))
                              : 0.f;
    }
  }

  void pack_rows(const Tensor& tensor, int64_t first, int64_t count, int64_t held, T* transposed, T* rows) {
    const Rows<T> taken = take_rows<IO, T>(tensor, call_.head_dim, batch_, head_, first, count, held, width_, rows_);
    pack_transposed<T>(taken.data, taken.stride, held, width_, transposed + first * width_, columns_);
    if constexpr (is_half)
      pack_pairs(taken.data, taken.stride, held, width_, rows + first * width_);
    else
      copy_rows(taken.data, taken.stride, held, width_, rows + first * width_, held, width_);
  }

  float dot(const IO* a, const IO* b) const {
    Vec sums{};
    int64_t d = 0;
    for (; d + kLanes <= call_.head_dim; d += kLanes) sums += load_floats(a + d) * load_floats(b + d);
    float sum = 0.f;
    for (int lane = 0; lane < kLanes; lane++) sum += sums[lane];
    for (; d < call_.head_dim; d++) sum += to_float(a[d]) * to_float(b[d]);
    return sum;
  }

  Rows<T> rows_of(const Tensor& tensor, int64_t key, T* scratch) {
    const int64_t count = std::min(kKeys, call_.num_keys - key);
    return take_rows<IO, T>(tensor, call_.head_dim, batch_, group_, key, count, kKeys, width_, scratch);
  }

  // All that a block of keys has to do with the queries of the head.
  void run_block(int64_t key, bool is_first, bool is_last) {
    const int64_t kept = call_.group_size() > 1 ? key * width_ : 0;
    float *grad_key = grad_key_ + kept, *grad_value = grad_value_ + kept;
    bool is_added = !is_first;
    const Rows<T> keys = rows_of(call_.key, key, rows_), values = rows_of(call_.value, key, more_rows_);
    transpose(keys.data, keys.stride, kKeys, width_, keys_, words_);
    const int64_t begin = std::max<int64_t>(key - call_.offset, 0) / columns_;
    const int64_t end = std::min(call_.num_queries - 1, key + kKeys - 2 - call_.offset + call_.window);
    for (int64_t tile = begin; tile * columns_ <= end; tile++) {
      const int64_t first = tile * columns_;
      const int64_t held = round_up(std::min(columns_, call_.num_queries - first), kColumns);
      const BlockMask seen(mask_, first, held, key);
      if (seen.from == seen.to) continue;
      run_pair(key, first, seen, keys, values, grad_key, grad_value, is_added);
      is_added = true;
    }
    if (!is_added) {
      std::fill_n(grad_key, kKeys * width_, 0.f);
      std::fill_n(grad_value, kKeys * width_, 0.f);
    }
    if (!is_last) return;
    write_rows(call_.grad_key, group_, key, std::min(kKeys, call_.num_keys - key), grad_key,
               static_cast<float>(call_.scaling));
    write_rows(call_.grad_value, group_, key, std::min(kKeys, call_.num_keys - key), grad_value, 1.f);
  }

  // A block of keys and a tile of queries.
  void run_pair(int64_t key, int64_t first, const BlockMask& seen, const Rows<T>& keys, const Rows<T>& values,
                float* grad_key, float* grad_value, bool is_added) {
    const int64_t from = seen.from, count = seen.to - seen.from, tile = first * width_;
    multiply(kKeys, count, width_, keys.data, keys.stride, queries_ + tile + from * beside, columns_, scores_ + from,
             score_stride_, false);
    multiply(kKeys, count, width_, values.data, values.stride, grads_ + tile + from * beside, columns_,
             grad_scores_ + from, score_stride_, false);
    bool has_lanes = false;
    for (int64_t column = from; column < seen.to; column += kColumns) {
      if (seen.at(column) == Visibility::all) {
        differentiate<false>(key, first, column);
        continue;
      }
      for (int64_t row = 0; row < kKeys && !has_lanes; row++) lanes_[row] = RowLanes(mask_, key + row, first);
      has_lanes = true;
      differentiate<true>(key, first, column);
    }
    const T *grad_rows = grad_rows_ + (first + from) * width_, *query_rows = query_rows_ + (first + from) * width_;
    float* grad_query = grad_query_ + tile + from;
    if constexpr (is_half) {
      multiply(kKeys, width_, count, weight_halves_ + from, columns_, grad_rows, width_, grad_value, width_, is_added);
      multiply(kKeys, width_, count, grad_halves_ + from, columns_, query_rows, width_, grad_key, width_, is_added);
      multiply(width_, count, kKeys, keys_, kKeys, grad_pairs_ + from * 2, columns_, grad_query, columns_, true);
    } else {
      multiply(kKeys, width_, count, scores_ + from, score_stride_, grad_rows, width_, grad_value, width_, is_added);
      multiply(kKeys, width_, count, grad_scores_ + from, score_stride_, query_rows, width_, grad_key, width_,
               is_added);
      multiply(width_, count, kKeys, keys_, kKeys, grad_scores_ + from, score_stride_, grad_query, columns_, true);
    }
  }

  // Scores → weights, gradients of weights → of scores, for `kColumns` columns.
  template <bool is_masked>
  void differentiate(int64_t key, int64_t first, int64_t begin) {
    const Vec scale = splat(static_cast<float>(call_.scaling) * kLog2E);
    const float *lse = lse_ + first + begin, *delta = delta_ + first + begin;
    const int64_t distance = call_.offset + first + begin - key;
    for (int64_t row = 0; row < kKeys; row += 2) {
      const float *bias[2] = {bias_.at(distance - row), bias_.at(distance - row - 1)};
      float *sums[2] = {sums_.at(distance - row), sums_.at(distance - row - 1)};
      float* scores = scores_ + row * score_stride_ + begin;
      float* grad_scores = grad_scores_ + row * score_stride_ + begin;
      for (int64_t c = 0; c < kColumns; c += kLanes) {
        Vec weight[2], grad[2];
        for (int k = 0; k < 2; k++) {
          const int64_t here = k * score_stride_ + c;
          const Vec x = load(scores + here) * scale + (load(bias[k] + c) - load(lse + c));
          weight[k] = exp2<is_half>(x);
          if constexpr (is_masked) weight[k] = lanes_[row + k].at(begin + c) ? weight[k] : Vec{};
          grad[k] = weight[k] * (load(grad_scores + here) - load(delta + c));
          store(sums[k] + c, load(sums[k] + c) + grad[k]);
          if constexpr (!is_half) {
            store(scores + here, weight[k]);
            store(grad_scores + here, grad[k]);
          }
        }
        if constexpr (is_half) {
          const Pair weights = to_bf16(weight[0], weight[1]), grads = to_bf16(grad[0], grad[1]);
          const int64_t here = row * columns_ + begin + c;
          store(weight_halves_ + here, weights.a);
          store(weight_halves_ + here + columns_, weights.b);
          store(grad_halves_ + here, grads.a);
          store(grad_halves_ + here + columns_, grads.b);
          store(grad_pairs_ + (row / 2 * columns_ + begin + c) * 2, grads.both);
        }
      }
    }
  }

  void write_tile(int64_t first) {
    const int64_t count = std::min(columns_, call_.num_queries - first);
    transpose_words(grad_query_ + first * width_, columns_ * 4, width_, round_up(count, kColumns), turned_, width_);
    write_rows(call_.grad_query, head_, first, count, turned_, static_cast<float>(call_.scaling));
  }

  void write_rows(const Tensor& tensor, int64_t head, int64_t first, int64_t count, const float* from, float factor) {
    for (int64_t row = first; row < first + count; row++, from += width_) {
      IO* to = tensor.at<IO>(batch_, head, row);
      for (int64_t d = 0; d < call_.head_dim; d++) to[d] = from_float<IO>(from[d] * factor);
    }
  }

  const Call& call_;
  const int64_t width_, columns_, num_columns_, score_stride_;
  int64_t batch_ = 0, head_ = 0, group_ = 0;
  RowMask mask_;
  Distances bias_, sums_;
  Buffer<T> queries_, grads_, query_rows_, grad_rows_, rows_, more_rows_, keys_;
  Buffer<uint32_t> words_;
  Buffer<float> scores_, grad_scores_;
  Buffer<T> weight_halves_, grad_halves_, grad_pairs_;
  Buffer<float> grad_query_, grad_key_, grad_value_, turned_, lse_, delta_;
  Buffer<RowLanes> lanes_;
};

}  // namespace relpos
