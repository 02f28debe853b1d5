// Attention of a few rows, float32 or bfloat16, on the CPU. A row's sums are made in one order, whatever rows stand
// beside it or between those it attends to; see few_rows.h.

#pragma once

#include "tiles.h"

#include <cstring>
#include <limits>
#include <vector>

namespace {

constexpr int64_t kQueries = kLanes == 16 ? 8 : 4;  // rows that attend together

// What one block of at most kQueries rows, all on the same key/value head, reads and writes.
template <typename T>
struct Block {
  int64_t count = 0;
  const float* queries[kQueries];
  const bool* allowed[kQueries];
  T* outputs[kQueries];
};

// Columns c to c + C * kLanes of the outputs: values [end, size] weighed by `weights` [end, abreast(R)], over the sum
// of these. Key after key: keys between those that a row sees, other branches of a tree, add zeros.
template <int64_t R, int64_t C, typename T>
void add_values(const Block<T>& block, const float* weights, const T* values, int64_t end, int64_t size, int64_t c) {
  Vec sums[R][C], all(0);
  for (int64_t key = 0; key < end; key++) {
    all = all + Vec::loadu(weights + key * abreast(R));  // the first R count
#pragma GCC unroll 4
    for (int64_t part = 0; part < C; part++) {
      const Vec value = load(values + key * size + c + part * kLanes);
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; r++)
        sums[r][part] = at::vec::fmadd(value, Vec(weights[key * abreast(R) + r]), sums[r][part]);
    }
  }
  float whole[kLanes];
  all.store(whole);
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int64_t part = 0; part < C; part++)
      store(sums[r][part] * Vec(whole[r] > 0 ? 1 / whole[r] : 0), block.outputs[r] + c + part * kLanes);
}

// The scores of keys, not yet scaled, [end, abreast(R)].
template <typename T, int64_t R>
void score_keys(const Block<T>& block, const T* keys, int64_t end, int64_t size, float* scores) {
  constexpr int64_t rows = abreast(R), together = kLanes / rows;  // keys of a vector
  for (int64_t first = 0; first < end; first += together) {
    std::array<Vec, kLanes> sums;
#pragma GCC unroll 16
    for (auto& sum : sums) sum = Vec(0);
    for (int64_t c = 0; c < size; c += kLanes)
#pragma GCC unroll 16
      for (int64_t j = 0; j < together; j++) {
        const Vec part = load(keys + std::min(first + j, end - 1) * size + c);
#pragma GCC unroll 8
        for (int64_t r = 0; r < R; r++)
          sums[j * rows + r] = at::vec::fmadd(part, Vec::loadu(block.queries[r] + c), sums[j * rows + r]);
      }
    totals(sums).store(scores + first * rows);
  }
}

#ifdef CORAL_TILES
// The same by the matrix unit, which adds a key's numbers two by two: a score depends on its row and key only. (Not
// so a row's sum over values, in which two keys would share a step: which two depends on the tree.)
template <int64_t R>
CORAL_USES_TILES void score_keys_by_tiles(const Block<BFloat16>& block, const BFloat16* keys, int64_t end,
                                          int64_t size, float* scores) {
  constexpr int64_t rows = abreast(R), row_bytes = rows * sizeof(float);
  std::vector<BFloat16> queries(size * rows), row(size);  // two numbers of each row side by side
  for (int64_t r = 0; r < R; r++) {
    convert(block.queries[r], size, row.data());
    for (int64_t c = 0; c < size; c += 2) std::memcpy(&queries[c * rows + 2 * r], &row[c], 2 * sizeof(BFloat16));
  }
  // Tiles 0 and 1 hold scores, 2 and 3 keys: of 16 keys, and of those that are left; 4 holds queries.
  const int64_t left = end % kTileRows, whole = end - left, key_bytes = size * sizeof(BFloat16);
  configure_tiles({kTileRows, left, kTileRows, left, kTileRows, 0, 0, 0},
                  {row_bytes, row_bytes, 64, 64, row_bytes, 0, 0, 0});
  for (int64_t first = 0; first < whole; first += kTileRows) {
    _tile_zero(0);
    for (int64_t c = 0; c < size; c += kTileInputs) {
      _tile_loadd(2, keys + first * size + c, key_bytes);
      _tile_loadd(4, &queries[c * rows], row_bytes);
      _tile_dpbf16ps(0, 2, 4);
    }
    _tile_stored(0, scores + first * rows, row_bytes);
  }
  if (left) {
    _tile_zero(1);
    for (int64_t c = 0; c < size; c += kTileInputs) {
      _tile_loadd(3, keys + whole * size + c, key_bytes);
      _tile_loadd(4, &queries[c * rows], row_bytes);
      _tile_dpbf16ps(1, 3, 4);
    }
    _tile_stored(1, scores + whole * rows, row_bytes);
  }
  _tile_release();
}
#endif

// Keys and values [num_keys, size]; a row that may attend to nothing becomes 0. The scores of a key stand side by
// side, row after row, so that a vector holds those of a few keys.
template <typename T, int64_t R>
void attend_block(const Block<T>& block, const T* keys, const T* values, int64_t num_keys, int64_t size,
                  float scale, [[maybe_unused]] bool tiles) {
  constexpr int64_t rows = abreast(R), together = kLanes / rows;  // keys of a vector
  int64_t end = 0, known = num_keys;  // one behind the last key that any row attends to; the first that one does not
  for (int64_t r = 0; r < R; r++) {
    const bool *begin = block.allowed[r], *last = begin + num_keys;
    while (last > begin + end && !last[-1]) last--;
    end = last - begin;
    const void* unseen = std::memchr(begin, 0, num_keys);
    if (unseen) known = std::min<int64_t>(known, static_cast<const bool*>(unseen) - begin);
  }
  std::vector<float> weights((end + together) * rows);
  const auto score = [&] {
#ifdef CORAL_TILES
    if constexpr (std::is_same_v<T, BFloat16>)
      if (tiles && size % kTileInputs == 0) return score_keys_by_tiles<R>(block, keys, end, size, weights.data());
#endif
    score_keys<T, R>(block, keys, end, size, weights.data());
  };
  score();
  Vec most(std::numeric_limits<float>::lowest());  // for a row that sees nothing, too
  for (int64_t first = 0; first < end; first += together) {
    float* some = weights.data() + first * rows;
    Vec scores = Vec::loadu(some) * Vec(scale);
    if (first + together > known) {
      scores.store(some);
      for (int64_t j = 0; j < together; j++)
        for (int64_t r = 0; r < R; r++)
          if (first + j >= end || !block.allowed[r][first + j]) some[j * rows + r] = kNever;
      scores = Vec::loadu(some);
    }
    scores.store(some);
    most = at::vec::maximum(most, scores);
  }
  float highest[kLanes];
  most.store(highest);
  for (int64_t j = 1; j < together; j++)
    for (int64_t r = 0; r < rows; r++) highest[r] = std::max(highest[r], highest[j * rows + r]);
  for (int64_t j = 1; j < together; j++) std::copy_n(highest, rows, highest + j * rows);
  for (int64_t first = 0; first < end; first += together) {
    float* some = weights.data() + first * rows;
    (Vec::loadu(some) - Vec::loadu(highest)).exp_u20().store(some);
  }
  constexpr int64_t most_parts = 4 * R <= kLanes ? 4 : 2;
  int64_t c = 0;
  for (; c + most_parts * kLanes <= size; c += most_parts * kLanes)
    add_values<R, most_parts>(block, weights.data(), values, end, size, c);
  for (; c < size; c += kLanes) add_values<R, 1>(block, weights.data(), values, end, size, c);
}

template <typename T, int64_t... R>
constexpr auto attend_each_count(std::integer_sequence<int64_t, R...>) {
  return std::array{attend_block<T, R + 1>...};
}
template <typename T>
constexpr auto kAttend = attend_each_count<T>(std::make_integer_sequence<int64_t, kQueries>{});

}  // namespace
