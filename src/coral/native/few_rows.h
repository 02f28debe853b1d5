// Products of a few rows, float32 or bfloat16, on the CPU; packing.py says what for.
//
// All arithmetic is float32, and results are rounded once: bfloat16 numbers are widened when they are read or, where
// the processor can and rows are bfloat16, too, multiplied two by two.
// A row's sums are made in one order, whatever rows stand beside it or between those it attends to: in a
// verification a node's row is, bit for bit, that of a plain step.

#include "vectors.h"

#include <array>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__AVX512BF16__) && defined(CPU_CAPABILITY_AVX512)
#define CORAL_PAIRS 1
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kPanel = 16;                      // outputs whose weights stand together; packing.h packs them
constexpr int64_t kParts = kPanel / kLanes;         // vectors that hold a panel
constexpr int64_t kBlock = 256;                     // inputs at a time: at most 16 KiB of a panel
constexpr int64_t kStride = kBlock + kPanel;        // between rows; a power of two would crowd the L1 cache
constexpr int64_t kTile = kLanes == 16 ? 16 : 4;    // rows whose sums the registers hold

constexpr int64_t kFar = 16384, kNear = 512;  // bytes between weights that are fetched and those in use

// Weights on their way: from memory into the L2 cache, and later into the L1.
template <typename Weight>
void fetch(const Weight* now, int64_t beside = 0) {
  __builtin_prefetch(now + kFar / sizeof(Weight) + beside, 0, 2);
  __builtin_prefetch(now + kNear / sizeof(Weight));
}

// A bfloat16 weight for rows that hold bfloat16 numbers, too: those of two inputs are multiplied at once.
struct Paired {
  BFloat16 number;
};
template <typename Weight>
constexpr bool kInPairs = std::is_same_v<Weight, Paired>;

template <typename Weight>
constexpr int64_t kTogether = sizeof(float) / sizeof(Weight);  // inputs of one read

// What one read of weights brings, input by input unless they come in pairs.
std::array<Vec, 1> load_weights(const float* weights) { return {Vec::loadu(weights)}; }

std::array<Vec, 1> load_weights(const Paired* weights) { return {Vec::loadu(weights)}; }

std::array<Vec, 2> load_weights(const BFloat16* weights) {
  using Bits = at::vec::Vectorized<int32_t>;
  const Bits both = Bits::loadu(weights);
  return {at::vec::cast<float>(both << Bits(16)), at::vec::cast<float>(both & Bits(int32_t(0xFFFF0000)))};
}

template <bool Pairs>
Vec add_product(const Vec& sum, const Vec& weights, const Vec& values) {
#ifdef CORAL_PAIRS
  if constexpr (Pairs) {
    const __m512 both = weights, two = values;
    return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(both), reinterpret_cast<__m512bh>(two));
  }
#endif
  return at::vec::fmadd(weights, values, sum);
}

// Numbers of a row become pairs of bfloat16 numbers, in place; there are zeros up to whole vectors of them.
inline void pair_up(float* row, int64_t depth) {
#ifdef CORAL_PAIRS
  for (int64_t k = 0; k < depth; k += 2 * kLanes) {
    const __m512 low = _mm512_loadu_ps(row + k), high = _mm512_loadu_ps(row + k + kLanes);
    _mm512_storeu_si512(row + k / 2, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high, low)));
  }
#endif
}

// Rows that stand side by side: for M of them, so many numbers of an input.
constexpr int64_t abreast(int64_t M) { return M > 1 ? 2 * abreast((M + 1) / 2) : 1; }

// Products of M rows, side by side, with P panels that stand `apart`, `depth` inputs of them, added to what `out`
// holds, unless they are the first; `width` of their outputs exist.
template <typename Weight, int64_t M, int64_t P>
void multiply(const Weight* panels, int64_t apart, const float* rows, float* out, int64_t stride, int64_t width,
              int64_t depth, bool first) {
  constexpr int64_t parts = P * kParts;
  Vec sums[M][parts];
  int64_t real[parts];  // outputs of each vector that exist
#pragma GCC unroll 8
  for (int64_t p = 0; p < parts; p++) {
    real[p] = std::clamp<int64_t>(width - p * kLanes, 0, kLanes);
#pragma GCC unroll 16
    for (int64_t m = 0; m < M; m++)
      sums[m][p] = first ? Vec(0) : Vec::loadu(out + m * stride + p * kLanes, real[p]);
  }
  constexpr int64_t values = kInPairs<Weight> ? 1 : kTogether<Weight>;  // of a row, for one read of weights
  for (int64_t k = 0; k < depth; k += kTogether<Weight>, rows += values * abreast(M)) {
    decltype(load_weights(panels)) weights[parts];
#pragma GCC unroll 8
    for (int64_t p = 0; p < parts; p++) {
      const Weight* panel = panels + p / kParts * apart + k * kPanel;
      if (p % kParts == 0) fetch(panel, (P - 1) * apart);
      weights[p] = load_weights(panel + p % kParts * kLanes * kTogether<Weight>);
    }
#pragma GCC unroll 2
    for (int64_t i = 0; i < values; i++)
#pragma GCC unroll 16
      for (int64_t m = 0; m < M; m++) {
        const Vec value(rows[i * abreast(M) + m]);
#pragma GCC unroll 8
        for (int64_t p = 0; p < parts; p++) sums[m][p] = add_product<kInPairs<Weight>>(sums[m][p], weights[p][i], value);
      }
  }
  for (int64_t p = 0; p < parts; p++)
#pragma GCC unroll 16
    for (int64_t m = 0; m < M; m++) sums[m][p].store(out + m * stride + p * kLanes, real[p]);
}

// Rows that are multiplied together. Pairs are done sooner than their numbers are fetched, so that with two panels
// fewer rows are faster.
template <typename Weight>
constexpr int64_t kAtOnce = kInPairs<Weight> ? 12 : kTile;

// Panels that are multiplied together with M rows: enough sums that none waits for itself, as many as registers hold.
template <typename Weight>
constexpr int64_t panels_at_once(int64_t M) {
  return kLanes < 16 || M > (kInPairs<Weight> ? 12 : 8) ? 1 : M > 3 ? 2 : 4;
}

// The first vectors of M rows and N - M of zeros, side by side: the first number of each, then the second, and so on.
template <int64_t M, int64_t N>
std::array<Vec, N> side_by_side(const float* rows, int64_t stride) {
  if constexpr (N == 1) {
    return {M ? Vec::loadu(rows) : Vec(0)};
  } else {
    const auto even = side_by_side<(M + 1) / 2, N / 2>(rows, 2 * stride);
    const auto odd = side_by_side<M / 2, N / 2>(rows + stride, 2 * stride);
    std::array<Vec, N> both;
#pragma GCC unroll 8
    for (int64_t i = 0; i < N / 2; i++) {
      const auto [low, high] = at::vec::interleave2(even[i], odd[i]);
      both[2 * i] = low, both[2 * i + 1] = high;
    }
    return both;
  }
}

// `depth` numbers of M rows, or pairs of numbers, side by side.
template <int64_t M>
void stand_side_by_side(const float* rows, int64_t depth, float* to) {
  constexpr int64_t count = abreast(M);
  for (int64_t k = 0; k < depth; k += kLanes) {
    const auto vectors = side_by_side<M, count>(rows + k, kStride);
#pragma GCC unroll 16
    for (int64_t i = 0; i < count; i++) vectors[i].store(to + k * count + i * kLanes);
  }
}

// M rows with `depth` inputs of `count` panels.
template <typename Weight, int64_t M>
void multiply_rows(const float* rows, const Weight* panels, int64_t apart, int64_t count, float* out, int64_t stride,
                   int64_t width, int64_t depth, bool first) {
  constexpr int64_t P = panels_at_once<Weight>(M);
  alignas(64) float copy[kTile * kBlock];
  stand_side_by_side<M>(rows, kInPairs<Weight> ? depth / 2 : depth, copy);
  int64_t p = 0;
  for (; p + P <= count; p += P)
    multiply<Weight, M, P>(panels + p * apart, apart, copy, out + p * kPanel, stride, width - p * kPanel, depth, first);
  for (; p < count; p++)
    multiply<Weight, M, 1>(panels + p * apart, apart, copy, out + p * kPanel, stride, width - p * kPanel, depth, first);
}

template <typename Weight, int64_t... M>
constexpr auto each_count(std::integer_sequence<int64_t, M...>) {
  return std::array{multiply_rows<Weight, M + 1>...};
}
template <typename Weight>
constexpr auto kMultiply = each_count<Weight>(std::make_integer_sequence<int64_t, kAtOnce<Weight>>{});

// Rows times some inputs of some panels of packed weights, into `sums` [n, width]. `inner` begins at an even input.
// copy_row(i, k, depth, to) brings inputs k to k + depth of row i.
template <typename Weight, typename CopyRow>
void multiply_panels(const Weight* weights, Range mine, Range inner, int64_t n, int64_t inputs, int64_t width,
                     const CopyRow& copy_row, float* sums) {
  const auto up_to = [](int64_t count, int64_t unit) { return (count + unit - 1) / unit * unit; };
  const auto even = [&](int64_t count) { return up_to(count, kTogether<Weight>); };
  const int64_t panels = (width + kPanel - 1) / kPanel;
  alignas(64) float rows[kTile * kStride];
  for (int64_t block = inner.begin / kBlock * kBlock; block < inner.end; block += kBlock) {
    const int64_t stored = even(std::min(kBlock, inputs - block));  // inputs of this block of each panel
    const int64_t k = std::max(block, inner.begin), depth = std::min(block + kBlock, inner.end) - k;
    for (int64_t top = 0; top < n; top += kAtOnce<Weight>) {
      const int64_t count = std::min(kAtOnce<Weight>, n - top);
      for (int64_t i = 0; i < count; i++) {
        copy_row(top + i, k, depth, rows + i * kStride);
        std::fill_n(rows + i * kStride + depth, up_to(depth, 2 * kLanes) - depth, 0.f);
        if constexpr (kInPairs<Weight>) pair_up(rows + i * kStride, depth);
      }
      kMultiply<Weight>[count - 1](rows, weights + kPanel * (panels * block + mine.begin * stored + k - block),
                                   kPanel * stored, mine.end - mine.begin, sums + top * width + mine.begin * kPanel,
                                   width, width - mine.begin * kPanel, even(depth), k == inner.begin);
    }
  }
}

// to[i] = from[i]; the flags that torch builds with let no compiler vectorize this.
template <typename From, typename To>
void convert(const From* from, int64_t count, To* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(load(from + i), to + i);
  for (; i < count; i++) to[i] = To(float(from[i]));
}

}  // namespace
