// The arguments of a call, which pairs of queries and keys it hides, and the scratch memory of a thread.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <new>
#include <vector>

#include "products.h"

namespace relpos {

constexpr int64_t kKeys = 64;      // keys of a block
constexpr int64_t kColumns = 64;   // queries are taken in multiples of this many
constexpr int64_t kQueries = 256;  // queries of a tile, at most
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;

// (rows of the batch, heads, tokens, head size), the last one beside each other; strides in numbers.
struct Tensor {
  void* data;
  int64_t batch_stride, head_stride, row_stride;

  template <class T>
  T* at(int64_t batch, int64_t head, int64_t row = 0) const {
    return static_cast<T*>(data) + batch * batch_stride + head * head_stride + row * row_stride;
  }
};

// As Python's `ctypes` lays it out: the fields of `Call` in hf_relpos/native/__init__.py, one by one.
struct Call {
  Tensor query, key, value, out, grad_out, grad_query, grad_key, grad_value;
  float *lse, *table, *table_sums;  // (B, H, Q), (H, L), (B, H, L): what each row of the batch adds to its gradient
  const uint8_t* key_mask;          // (B, key_mask_stride) or null: 0 on padding
  const int32_t* documents;         // (B, documents_stride) or null
  int64_t key_mask_stride, documents_stride;
  int64_t batch_size, num_heads, num_groups, num_queries, num_keys, head_dim, table_length;
  int64_t offset, window;  // the slot of the first query; a query sees the keys at distances below `window`
  double scaling;

  int64_t group_size() const { return num_heads / num_groups; }
  // columns of a tile, of all tiles but that the last one may be filled in part
  int64_t tile_width() const { return std::min(kQueries, round_up(num_queries, kColumns)); }
  int64_t num_tiles() const { return (num_queries + tile_width() - 1) / tile_width(); }
  int64_t num_blocks() const { return (num_keys + kKeys - 1) / kKeys; }
  int64_t longest_distance() const { return std::min(offset + round_up(num_queries, kQueries), window) + kQueries; }
};

// A piece of memory that is aligned for vectors and not initialised.
template <class T>
struct Buffer {
  T* data = nullptr;
  explicit Buffer(int64_t count) {
    data = static_cast<T*>(std::aligned_alloc(64, round_up(std::max<int64_t>(count, 1) * sizeof(T), 64)));
    if (data == nullptr) throw std::bad_alloc();
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  operator T*() { return data; }
};

// Room for values at the distances of all pairs that are computed, those of hidden pairs too, for one head.
struct Distances {
  static constexpr int64_t kBelow = kKeys + kColumns;  // hidden pairs reach as far below 0
  int64_t length;                                      // of the table that is used
  int64_t size;
  Buffer<float> values;

  explicit Distances(const Call& call)
      : length(std::min(call.table_length, call.longest_distance())),
        size(kBelow + call.longest_distance() + kColumns),
        values(size) {}
  float* at(int64_t distance) { return values + kBelow + distance; }
  void clear() { std::fill_n(values.data, size, 0.f); }
  // The bias of a head in units of ln 2.
  void take(const Call& call, int64_t head) {
    clear();
    const float* table = call.table + head * call.table_length;
    float* to = at(0);
    for (int64_t distance = 0; distance < length; distance++) to[distance] = table[distance] * kLog2E;
  }
};

// Rows of a tensor as the products take them.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
};

// `count` rows from `first` on, as `padded` rows of `width` numbers: those of the tensor, or a copy in `scratch`.
template <class IO, class T>
Rows<T> take_rows(const Tensor& tensor, int64_t head_dim, int64_t batch, int64_t head, int64_t first, int64_t count,
                  int64_t padded, int64_t width, T* scratch) {
  const IO* from = tensor.at<IO>(batch, head, first);
  if constexpr (std::is_same_v<IO, T>)
    if (count == padded && width == head_dim) return {from, tensor.row_stride};
  copy_rows(from, tensor.row_stride, count, head_dim, scratch, padded, width);
  return {scratch, width};
}

// The width of the rows that the products take.
template <class T>
int64_t padded_width(const Call& call) {
  return round_up(call.head_dim, sizeof(T) == 2 ? 32 : 16);
}

enum class Visibility { none, some, all };

// The columns of a tile that see one key: from `first` up to `last`.
struct Columns {
  int32_t first, last;
};

// Padding and documents of one row of the batch.
class RowMask {
 public:
  explicit RowMask(const Call& call) : call_(call) {}

  void take(int64_t batch) {
    mask_ = call_.key_mask ? call_.key_mask + batch * call_.key_mask_stride : nullptr;
    const int32_t* documents = call_.documents ? call_.documents + batch * call_.documents_stride : nullptr;
    if (documents == nullptr) return;
    keys_.assign(documents, documents + call_.num_keys);
    // there may be fewer than whole tiles of queries: their columns are hidden whatever stands here
    queries_.assign(round_up(call_.num_queries, kQueries), 0);
    std::copy_n(documents + call_.offset, call_.num_queries, queries_.begin());
  }

  bool has_documents() const { return call_.documents != nullptr; }
  const int32_t* query_documents(int64_t query) const { return queries_.data() + query; }
  int32_t key_document(int64_t key) const { return key < call_.num_keys ? keys_[key] : 0; }

  // Whether the queries of a range, `last` excluded, see all, some or none of the keys of a block.
  Visibility of(int64_t first, int64_t last, int64_t key) const {
    const int64_t after = std::min(key + kKeys, call_.num_keys), end = std::min(last, call_.num_queries);
    if (first >= end || key >= call_.offset + end || call_.offset + first - after >= call_.window - 1)
      return Visibility::none;
    bool is_whole = end == last && after == key + kKeys && after - 1 <= call_.offset + first &&
                    call_.offset + end - 1 - key < call_.window;
    if (mask_) {
      const int64_t shown = after - key - std::count(mask_ + key, mask_ + after, 0);
      if (shown == 0) return Visibility::none;
      is_whole = is_whole && shown == after - key;
    }
    if (has_documents()) {
      const auto [low, high] = std::minmax_element(keys_.begin() + key, keys_.begin() + after);
      const auto [least, most] = std::minmax_element(queries_.begin() + first, queries_.begin() + end);
      if (*least > *high || *most < *low) return Visibility::none;
      is_whole = is_whole && *low == *high && *least == *most;
    }
    return is_whole ? Visibility::all : Visibility::some;
  }

  // The columns, counted from query `origin`, that see a key but for documents.
  Columns columns(int64_t key, int64_t origin) const {
    if (key >= call_.num_keys || (mask_ && !mask_[key])) return {0, 0};
    const int64_t first = key - call_.offset, last = std::min(call_.num_queries, first + call_.window);
    const int64_t bound = kQueries;
    return {static_cast<int32_t>(std::clamp<int64_t>(first - origin, 0, bound)),
            static_cast<int32_t>(std::clamp<int64_t>(last - origin, 0, bound))};
  }

 private:
  const Call& call_;
  const uint8_t* mask_ = nullptr;
  std::vector<int32_t> keys_, queries_;
};

// What a tile of queries sees of a block of keys, by `kColumns` columns.
struct BlockMask {
  Visibility seen[kQueries / kColumns];
  int64_t from = 0, to;  // columns at both ends that see nothing are left out

  BlockMask(const RowMask& mask, int64_t first_query, int64_t columns, int64_t key) : to(columns) {
    for (int64_t column = 0; column < columns; column += kColumns)
      seen[column / kColumns] = mask.of(first_query + column, first_query + column + kColumns, key);
    while (from < to && at(from) == Visibility::none) from += kColumns;
    while (from < to && at(to - kColumns) == Visibility::none) to -= kColumns;
  }
  Visibility at(int64_t column) const { return seen[column / kColumns]; }
};

// −1 in the lanes of a row that are seen, for the columns from `column` on.
struct RowLanes {
  IntVec first, last, document;
  const int32_t* documents;  // of the columns, or null

  RowLanes(const RowMask& mask, int64_t key, int64_t origin) {
    const Columns columns = mask.columns(key, origin);
    const IntVec lanes = lane_numbers();
    first = columns.first - lanes;
    last = columns.last - lanes;
    documents = mask.has_documents() ? mask.query_documents(origin) : nullptr;
    document = splat_int(mask.has_documents() ? mask.key_document(key) : 0);
  }
  IntVec at(int64_t column) const {
    const IntVec here = splat_int(static_cast<int32_t>(column));
    IntVec seen = (here >= first) & (here < last);
    if (documents) seen &= load_as<IntVec>(documents + column) == document;
    return seen;
  }
};

}  // namespace relpos
