// The forward pass. A block holds its scores with keys as rows and queries as columns, so that the largest score and the
// sum of the weights of each query are taken down the columns, and the bias of a row is a piece of the table.
#pragma once

#include "call.h"

namespace relpos {

template <class IO, class T>
class Forward {
 public:
  explicit Forward(const Call& call)
      : call_(call),
        width_(padded_width<T>(call)),
        columns_(call.tile_width()),
        score_stride_(columns_ + 16),
        mask_(call),
        bias_(call),
        values_(call.num_blocks() * kKeys * width_),
        rows_(std::max(columns_, kKeys) * width_),
        queries_(columns_ * width_),
        words_(kKeys * width_ / 2),
        scores_(kKeys * score_stride_),
        weights_(is_half ? kKeys * columns_ : 0),
        out_(width_ * columns_),
        turned_(columns_ * width_),
        largest_(columns_),
        sums_(columns_),
        lanes_(kKeys) {}

  // Computes the tile with an index over rows of the batch, heads and tiles.
  void run(int64_t index) {
    const int64_t tile = index % call_.num_tiles(), pair = index / call_.num_tiles();
    const int64_t head = pair % call_.num_heads, batch = pair / call_.num_heads;
    take(batch, head);
    first_ = tile * columns_;
    const int64_t count = std::min(columns_, call_.num_queries - first_);
    held_ = round_up(count, kColumns);
    const Rows<T> queries =
        take_rows<IO, T>(call_.query, call_.head_dim, batch, head, first_, count, held_, width_, rows_);
    pack_transposed<T>(queries.data, queries.stride, held_, width_, queries_, columns_);
    std::fill_n(largest_.data, columns_, -INFINITY);
    std::fill_n(sums_.data, columns_, 0.f);
    std::fill_n(out_.data, width_ * columns_, 0.f);
    const int64_t begin = std::max<int64_t>(call_.offset + first_ - call_.window + 1, 0) / kKeys;
    const int64_t end = std::min((call_.offset + first_ + count + kKeys - 1) / kKeys, call_.num_blocks());
    for (int64_t block = begin; block < end; block++) run_block(block * kKeys);
    finish(count);
  }

 private:
  static constexpr bool is_half = sizeof(T) == 2;

  // Keeps what the tile before had of the same head and row of the batch.
  void take(int64_t batch, int64_t head) {
    const int64_t group = head / call_.group_size();
    if (batch != batch_) mask_.take(batch);
    if (head != head_) bias_.take(call_, head);
    if (batch != batch_ || group != group_) num_values_ = 0;
    batch_ = batch, head_ = head, group_ = group;
  }

  // The values of a block, (width, keys), packed when they are first needed.
  const T* values(int64_t key) {
    for (; num_values_ <= key; num_values_ += kKeys) {
      const Rows<T> rows = rows_of(call_.value, num_values_);
      transpose(rows.data, rows.stride, kKeys, width_, values_ + num_values_ * width_, words_);
    }
    return values_ + key * width_;
  }

  Rows<T> rows_of(const Tensor& tensor, int64_t key) {
    const int64_t count = std::min(kKeys, call_.num_keys - key);
    return take_rows<IO, T>(tensor, call_.head_dim, batch_, group_, key, count, kKeys, width_, rows_);
  }

  void run_block(int64_t key) {
    const BlockMask seen(mask_, first_, held_, key);
    const int64_t from = seen.from, to = seen.to;
    if (from == to) return;
    const T* values_of_block = values(key);
    const Rows<T> keys = rows_of(call_.key, key);
    // in bf16 two rows of the second operand stand beside each other
    constexpr int64_t beside = is_half ? 2 : 1;
    multiply(kKeys, to - from, width_, keys.data, keys.stride, queries_ + from * beside, columns_, scores_ + from,
             score_stride_, false);
    bool has_lanes = false;
    for (int64_t column = from; column < to; column += kColumns) {
      if (seen.at(column) == Visibility::all) {
        weigh<false>(key, column);
        continue;
      }
      for (int64_t row = 0; row < kKeys && !has_lanes; row++) lanes_[row] = RowLanes(mask_, key + row, first_);
      has_lanes = true;
      weigh<true>(key, column);
    }
    if constexpr (is_half)
      multiply(width_, to - from, kKeys, values_of_block, kKeys, weights_ + from * 2, columns_, out_ + from, columns_,
               true);
    else
      multiply(width_, to - from, kKeys, values_of_block, kKeys, scores_ + from, score_stride_, out_ + from, columns_,
               true);
  }

  // Scores → weights for `kColumns` columns, two vectors at a time.
  template <bool is_masked>
  void weigh(int64_t key, int64_t begin) {
    const Vec scale = splat(static_cast<float>(call_.scaling) * kLog2E), nothing = splat(-INFINITY);
    for (int64_t column = begin; column < begin + kColumns; column += 2 * kLanes) {
      Vec top[2] = {load(largest_ + column), load(largest_ + column + kLanes)};
      const Vec before[2] = {top[0], top[1]};
      const float* bias = bias_.at(call_.offset + first_ + column - key);
      float* scores = scores_ + column;
      for (int64_t row = 0; row < kKeys; row++, bias--, scores += score_stride_)
        for (int half = 0; half < 2; half++) {
          Vec x = load(scores + half * kLanes) * scale + load(bias + half * kLanes);
          if constexpr (is_masked) x = lanes_[row].at(column + half * kLanes) ? x : nothing;
          store(scores + half * kLanes, x);
          top[half] = larger(top[half], x);
        }
      for (int half = 0; half < 2; half++) store(largest_ + column + half * kLanes, top[half]);
      exponentiate(column, before, top);
    }
  }

  void exponentiate(int64_t column, const Vec (&before)[2], Vec (&top)[2]) {
    Vec factor[2], sum[2] = {Vec{}, Vec{}};
    const bool is_same = std::memcmp(before, top, sizeof(before)) == 0;
    for (int half = 0; half < 2; half++) {
      top[half] = top[half] == splat(-INFINITY) ? Vec{} : top[half];
      factor[half] = exp2<is_half>(before[half] - top[half]);
    }
    float* scores = scores_ + column;
    for (int64_t row = 0; row < kKeys; row += 2, scores += 2 * score_stride_)
      for (int half = 0; half < 2; half++) {
        float *first = scores + half * kLanes, *second = first + score_stride_;
        const Vec a = exp2<is_half>(load(first) - top[half]), b = exp2<is_half>(load(second) - top[half]);
        sum[half] += a + b;
        if constexpr (is_half) {
          store(weights_ + (row / 2 * columns_ + column + half * kLanes) * 2, to_bf16(a, b).both);
        } else {
          store(first, a);
          store(second, b);
        }
      }
    for (int half = 0; half < 2; half++) {
      const int64_t here = column + half * kLanes;
      store(sums_ + here, load(sums_ + here) * factor[half] + sum[half]);
      for (int64_t d = 0; d < width_ && !is_same; d++)
        store(out_ + d * columns_ + here, load(out_ + d * columns_ + here) * factor[half]);
    }
  }

  // Divides by the sums and writes the rows of the tile.
  void finish(int64_t count) {
    for (int64_t column = 0; column < held_; column += kLanes) {
      const Vec sum = load(sums_ + column);
      const Vec factor = sum == Vec{} ? Vec{} : 1.f / sum;
      for (int64_t d = 0; d < width_; d++)
        store(out_ + d * columns_ + column, load(out_ + d * columns_ + column) * factor);
    }
    transpose_words(out_, columns_ * 4, width_, held_, turned_, width_);
    float* lse = call_.lse + (batch_ * call_.num_heads + head_) * call_.num_queries + first_;
    for (int64_t query = 0; query < count; query++) {
      IO* to = call_.out.at<IO>(batch_, head_, first_ + query);
      const float* from = turned_ + query * width_;
      for (int64_t d = 0; d < call_.head_dim; d++) to[d] = from_float<IO>(from[d]);
      lse[query] = sums_[query] == 0.f ? 0.f : largest_[query] * kLn2 + std::log(sums_[query]);
    }
  }

  const Call& call_;
  const int64_t width_, columns_, score_stride_;
  int64_t batch_ = -1, head_ = -1, group_ = -1;
  int64_t num_values_ = 0;         // keys whose values are packed
  int64_t first_ = 0, held_ = 0;  // the first query of the tile, and how many columns it has
  RowMask mask_;
  Distances bias_;
  Buffer<T> values_, rows_, queries_;
  Buffer<uint32_t> words_;
  Buffer<float> scores_;
  Buffer<T> weights_;
  Buffer<float> out_, turned_, largest_, sums_;
  Buffer<RowLanes> lanes_;
};

}  // namespace relpos
