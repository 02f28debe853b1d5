// Products by the matrix unit of the processor (AMX): rows and weights are bfloat16, sums float32.
//
// A tile holds 16 rows of 64 bytes. The weights of a panel stand in memory as such tiles do: two inputs of each of
// its 16 outputs in a row. A sum adds its inputs in one order, two by two, whatever rows stand beside it; so a single
// row goes through here, too, and a node's logits are those of a plain step.

#pragma once

#include "few_rows.h"

#if defined(__x86_64__) && defined(__AVX512F__)
#define CORAL_TILES 1
#include <immintrin.h>
#endif

namespace {

#ifdef CORAL_TILES
#define CORAL_USES_TILES __attribute__((target("amx-tile,amx-bf16")))

constexpr int64_t kTileRows = 16, kTileInputs = 32, kTileWeights = kPanel * kTileInputs;  // a tile of each kind
constexpr int64_t kHalves = 2;  // row tiles whose sums are held at once, with two panels

// Gives each tile so many rows of so many bytes; one without rows is not used.
CORAL_USES_TILES inline void configure_tiles(const int64_t (&rows)[8], const int64_t (&bytes)[8]) {
  struct alignas(64) {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t bytes[16] = {};
    uint8_t rows[16] = {};
  } shapes;
  for (int64_t i = 0; i < 8; i++)
    if (rows[i]) shapes.rows[i] = rows[i], shapes.bytes[i] = bytes[i];
  _tile_loadconfig(&shapes);
}

// Tiles 0 to 3 hold sums (of the first rows with both panels, then of the second), 4 and 5 rows, 6 and 7 weights.
CORAL_USES_TILES inline void shape_tiles(int64_t first, int64_t second) {
  configure_tiles({first, first, second, second, first, second, kTileRows, kTileRows},
                  {64, 64, 64, 64, 64, 64, 64, 64});
}

// Rows [A * 16, kBlock] with P panels that stand `apart`, added to what `out` holds, unless they are the first.
template <int64_t A, int64_t P>
CORAL_USES_TILES void multiply_tiles(const BFloat16* panels, int64_t apart, const BFloat16* rows, float* out,
                                     int64_t stride, int64_t depth, bool first) {
  const int64_t row_bytes = kBlock * sizeof(BFloat16), out_bytes = stride * sizeof(float);
  float* below = out + kTileRows * stride;
  if (first) {
    _tile_zero(0);
    if constexpr (P > 1) _tile_zero(1);
    if constexpr (A > 1) _tile_zero(2);
    if constexpr (A > 1 && P > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, out, out_bytes);
    if constexpr (P > 1) _tile_loadd(1, out + kPanel, out_bytes);
    if constexpr (A > 1) _tile_loadd(2, below, out_bytes);
    if constexpr (A > 1 && P > 1) _tile_loadd(3, below + kPanel, out_bytes);
  }
  alignas(64) BFloat16 last[P][kTileWeights];
  for (int64_t k = 0; k < depth; k += kTileInputs) {
    const BFloat16* weights = panels + k * kPanel;
    int64_t beside = apart;
    if (depth - k < kTileInputs) {  // behind a panel's last inputs stands another panel
      for (int64_t p = 0; p < P; p++) {
        std::fill_n(last[p], kTileWeights, BFloat16(0));
        std::copy_n(weights + p * apart, (depth - k) * kPanel, last[p]);
      }
      weights = last[0], beside = kTileWeights;
    } else {
#pragma GCC unroll 2
      for (int64_t p = 0; p < P; p++)
#pragma GCC unroll 16
        for (int64_t line = 0; line < kTileRows; line++)
          __builtin_prefetch(weights + p * apart + kFar / sizeof(BFloat16) + line * kTileInputs, 0, 2);
    }
    _tile_loadd(4, rows + k, row_bytes);
    _tile_loadd(6, weights, 64);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (P > 1) {
      _tile_loadd(7, weights + beside, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (A > 1) {
      _tile_loadd(5, rows + kTileRows * kBlock + k, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (P > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, out, out_bytes);
  if constexpr (P > 1) _tile_stored(1, out + kPanel, out_bytes);
  if constexpr (A > 1) _tile_stored(2, below, out_bytes);
  if constexpr (A > 1 && P > 1) _tile_stored(3, below + kPanel, out_bytes);
}

// As multiply_tiles with one panel, of whose outputs only `width` exist.
template <int64_t A>
CORAL_USES_TILES void multiply_last_panel(const BFloat16* panel, const BFloat16* rows, int64_t count, float* out,
                                          int64_t stride, int64_t width, int64_t depth, bool first) {
  alignas(64) float sums[kHalves * kTileRows * kPanel];
  for (int64_t i = 0; i < count && !first; i++) std::copy_n(out + i * stride, width, sums + i * kPanel);
  multiply_tiles<A, 1>(panel, 0, rows, sums, kPanel, depth, first);
  for (int64_t i = 0; i < count; i++) std::copy_n(sums + i * kPanel, width, out + i * stride);
}

// As multiply_panels; rows are rounded to bfloat16, which they hold exactly if they come from bfloat16 numbers.
template <typename CopyRow>
CORAL_USES_TILES void multiply_panels_by_tiles(const BFloat16* weights, Range mine, Range inner, int64_t n,
                                               int64_t inputs, int64_t width, const CopyRow& copy_row, float* sums) {
  const int64_t panels = (width + kPanel - 1) / kPanel, whole = std::min(mine.end, width / kPanel);
  alignas(64) float row[kBlock];
  alignas(64) BFloat16 rows[kHalves * kTileRows * kBlock];
  for (int64_t block = inner.begin / kBlock * kBlock; block < inner.end; block += kBlock) {
    const int64_t stored = std::min(kBlock, inputs - block), apart = kPanel * stored;
    const int64_t k = std::max(block, inner.begin), depth = std::min(block + kBlock, inner.end) - k;
    const int64_t filled = (depth + kTileInputs - 1) / kTileInputs * kTileInputs;
    for (int64_t top = 0; top < n; top += kHalves * kTileRows) {
      const int64_t count = std::min(kHalves * kTileRows, n - top), first_half = std::min(count, kTileRows);
      for (int64_t i = 0; i < count; i++) {
        copy_row(top + i, k, depth, row);
        std::fill_n(row + depth, filled - depth, 0.f);
        convert(row, filled, rows + i * kBlock);
      }
      shape_tiles(first_half, count - first_half);
      const BFloat16* begin = weights + kPanel * panels * block + kPanel * (k - block);
      float* out = sums + top * width;
      const bool first = k == inner.begin, both = count > kTileRows;
      int64_t p = mine.begin;
      for (; p + 2 <= whole; p += 2) {
        const auto multiply = both ? multiply_tiles<2, 2> : multiply_tiles<1, 2>;
        multiply(begin + p * apart, apart, rows, out + p * kPanel, width, depth, first);
      }
      for (; p < whole; p++) {
        const auto multiply = both ? multiply_tiles<2, 1> : multiply_tiles<1, 1>;
        multiply(begin + p * apart, apart, rows, out + p * kPanel, width, depth, first);
      }
      for (; p < mine.end; p++) {
        const auto multiply = both ? multiply_last_panel<2> : multiply_last_panel<1>;
        multiply(begin + p * apart, rows, count, out + p * kPanel, width, width - p * kPanel, depth, first);
      }
    }
  }
  _tile_release();
}
#endif

}  // namespace
