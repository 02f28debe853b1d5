// Products and attention of a few rows, float32 or bfloat16, on the CPU; few_rows.py says what for.
//
// All arithmetic is float32: bfloat16 numbers are widened when they are read, and results are rounded once.
// A row's sums are made in one order, whatever rows stand beside it or between those it attends to: in a
// verification a node's row is, bit for bit, that of a plain step.

#include "vectors.h"

#include <array>
#include <limits>
#include <type_traits>
#include <utility>
#include <vector>

namespace {

constexpr int64_t kPanel = 16;                      // outputs whose weights stand together; few_rows.py packs them
constexpr int64_t kParts = kPanel / kLanes;         // vectors that hold a panel
constexpr int64_t kBlock = 256;                     // inputs at a time: at most 16 KiB of a panel
constexpr int64_t kStride = kBlock + kPanel;        // between copied rows; a power of two would crowd the L1 cache
constexpr int64_t kTile = kLanes == 16 ? 16 : 4;    // rows whose sums the registers hold
constexpr int64_t kAhead = 3072;                    // bytes of weights between what is fetched and what is needed
constexpr int64_t kQueries = kLanes == 16 ? 8 : 4;  // rows that attend together

// What one read of weights brings, input by input: bfloat16 weights of two inputs share 32 bits.
std::array<Vec, 1> load_weights(const float* weights) { return {Vec::loadu(weights)}; }

std::array<Vec, 2> load_weights(const BFloat16* weights) {
  using Bits = at::vec::Vectorized<int32_t>;
  const Bits both = Bits::loadu(weights);
  return {at::vec::cast<float>(both << Bits(16)), at::vec::cast<float>(both & Bits(int32_t(0xFFFF0000)))};
}

template <typename Weight>
constexpr int64_t kTogether = sizeof(float) / sizeof(Weight);  // inputs of one read

// Products of `M` rows with one panel, `depth` inputs of it, added to what `out` holds, unless they are the first.
template <typename Weight, int64_t M>
void multiply(const Weight* panel, const float* rows, float* out, int64_t stride, int64_t width, int64_t depth,
              bool first) {
  Vec sums[M][kParts];
  int64_t real[kParts];  // outputs of the panel that exist
#pragma GCC unroll 4
  for (int64_t p = 0; p < kParts; p++) {
    real[p] = std::clamp<int64_t>(width - p * kLanes, 0, kLanes);
#pragma GCC unroll 16
    for (int64_t m = 0; m < M; m++)
      sums[m][p] = first ? Vec(0) : Vec::loadu(out + m * stride + p * kLanes, real[p]);
  }
  for (int64_t k = 0; k < depth; k += kTogether<Weight>) {
    __builtin_prefetch(panel + k * kPanel + kAhead / sizeof(Weight));
    for (int64_t p = 0; p < kParts; p++) {
      const auto weights = load_weights(panel + k * kPanel + p * kLanes * kTogether<Weight>);
#pragma GCC unroll 2
      for (int64_t i = 0; i < kTogether<Weight>; i++)
#pragma GCC unroll 16
        for (int64_t m = 0; m < M; m++)
          sums[m][p] = at::vec::fmadd(weights[i], Vec(rows[m * kStride + k + i]), sums[m][p]);
    }
  }
  for (int64_t p = 0; p < kParts; p++)
#pragma GCC unroll 16
    for (int64_t m = 0; m < M; m++) sums[m][p].store(out + m * stride + p * kLanes, real[p]);
}

template <typename Weight, int64_t... M>
constexpr auto each_count(std::integer_sequence<int64_t, M...>) {
  return std::array{multiply<Weight, M + 1>...};
}
template <typename Weight>
constexpr auto kMultiply = each_count<Weight>(std::make_integer_sequence<int64_t, kTile>{});

// Rows times some panels of packed weights, into `sums` [n, width].
// copy_row(i, k, depth, to) brings inputs k to k + depth of row i.
template <typename Weight, typename CopyRow>
void multiply_panels(const Weight* weights, Range mine, int64_t n, int64_t inputs, int64_t width,
                     const CopyRow& copy_row, float* sums) {
  constexpr int64_t together = kTogether<Weight>;
  const int64_t panels = (width + kPanel - 1) / kPanel;
  alignas(64) float copy[kTile * kStride];
  for (int64_t k = 0; k < inputs; k += kBlock) {
    const int64_t depth = std::min(kBlock, inputs - k), stored = (depth + together - 1) / together * together;
    for (int64_t top = 0; top < n; top += kTile) {
      const int64_t count = std::min(kTile, n - top);
      for (int64_t i = 0; i < count; i++) {
        copy_row(top + i, k, depth, copy + i * kStride);
        std::fill(copy + i * kStride + depth, copy + i * kStride + stored, 0.f);
      }
      for (int64_t p = mine.begin; p < mine.end; p++)
        kMultiply<Weight>[count - 1](weights + kPanel * (panels * k + p * stored), copy,
                                     sums + top * width + p * kPanel, width, std::min(kPanel, width - p * kPanel),
                                     stored, k == 0);
    }
  }
}

// to[i] = from[i] + offsets[i], or from[i] where `offsets` is null; inductor's flags let no compiler vectorize this.
template <typename From, typename Offset, typename To>
void convert(const From* from, const Offset* offsets, int64_t count, To* to) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes)
    store(offsets ? load(from + i) + load(offsets + i) : load(from + i), to + i);
  for (; i < count; i++) to[i] = To(float(from[i]) + (offsets ? float(offsets[i]) : 0));
}

// What one block of at most kQueries rows, all on the same key/value head, reads and writes.
template <typename T>
struct Block {
  int64_t count = 0;
  const float* queries[kQueries];
  const bool* allowed[kQueries];
  T* outputs[kQueries];
};

// Columns c to c + C * kLanes of the outputs: values [end, size] weighed by the rows of `weights` [R, stride].
template <int64_t R, int64_t C, typename T>
void add_values(const Block<T>& block, const float* weights, int64_t stride, const T* values, int64_t end,
                int64_t size, int64_t c, const float* shares) {
  Vec sums[R][C];
  for (int64_t key = 0; key < end; key++)
#pragma GCC unroll 2
    for (int64_t part = 0; part < C; part++) {
      const Vec value = load(values + key * size + c + part * kLanes);
#pragma GCC unroll 8
      for (int64_t r = 0; r < R; r++)
        sums[r][part] = at::vec::fmadd(value, Vec(weights[r * stride + key]), sums[r][part]);
    }
#pragma GCC unroll 8
  for (int64_t r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int64_t part = 0; part < C; part++)
      store(sums[r][part] * Vec(shares[r]), block.outputs[r] + c + part * kLanes);
}

// Keys and values [num_keys, size]; a row that may attend to nothing becomes 0.
template <typename T, int64_t R>
void attend_block(const Block<T>& block, const T* keys, const T* values, int64_t num_keys, int64_t size,
                  float scale) {
  constexpr int64_t kKeys = R > 4 ? 2 : 4;  // multiplied at a time: as many sums as registers hold
  int64_t end = num_keys;                   // one behind the last key that any row attends to
  const auto unseen = [&](int64_t key) {
    for (int64_t r = 0; r < R; r++)
      if (block.allowed[r][key]) return false;
    return true;
  };
  while (end > 0 && unseen(end - 1)) end--;
  const int64_t padded = (end + kLanes - 1) / kLanes * kLanes;
  std::vector<float> weights(R * padded, -std::numeric_limits<float>::infinity());
  float lanes[R][kLanes * kLanes];
  for (int64_t first = 0; first < end; first += kLanes) {
    const int64_t count = std::min(kLanes, end - first);
    for (int64_t i = 0; i < count; i += kKeys) {
      Vec sums[kKeys][R];
      for (int64_t c = 0; c < size; c += kLanes)
#pragma GCC unroll 8
        for (int64_t j = 0; j < kKeys; j++) {
          const Vec part = load(keys + std::min(first + i + j, end - 1) * size + c);
#pragma GCC unroll 8
          for (int64_t r = 0; r < R; r++)
            sums[j][r] = at::vec::fmadd(part, Vec::loadu(block.queries[r] + c), sums[j][r]);
        }
#pragma GCC unroll 8
      for (int64_t j = 0; j < kKeys; j++)
#pragma GCC unroll 8
        for (int64_t r = 0; r < R; r++) sums[j][r].store(lanes[r] + (i + j) * kLanes);
    }
    for (int64_t r = 0; r < R; r++) {  // the lanes of all these keys are added at once, a key a lane
      std::array<Vec, kLanes> sums;
      for (int64_t i = 0; i < kLanes; i++) sums[i] = Vec::loadu(lanes[r] + i * kLanes);
      float scores[kLanes];
      (totals(sums) * Vec(scale)).store(scores);
      for (int64_t i = 0; i < count; i++)
        if (block.allowed[r][first + i]) weights[r * padded + first + i] = scores[i];
    }
  }
  float all[R] = {}, shares[R];
  for (int64_t r = 0; r < R; r++) {
    float* row = weights.data() + r * padded;
    Vec most(std::numeric_limits<float>::lowest());  // for a row that sees nothing, too
    for (int64_t key = 0; key < padded; key += kLanes) most = at::vec::maximum(most, Vec::loadu(row + key));
    most = Vec(at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, most));
    for (int64_t key = 0; key < padded; key += kLanes) (Vec::loadu(row + key) - most).exp().store(row + key);
  }
  // Key after key, as the values below: keys between those that a row sees, other branches of a tree, add zeros.
  for (int64_t key = 0; key < end; key++)
#pragma GCC unroll 8
    for (int64_t r = 0; r < R; r++) all[r] += weights[r * padded + key];
  for (int64_t r = 0; r < R; r++) shares[r] = all[r] > 0 ? 1 / all[r] : 0;
  int64_t c = 0;
  for (; c + 2 * kLanes <= size; c += 2 * kLanes)
    add_values<R, 2>(block, weights.data(), padded, values, end, size, c, shares);
  if (c < size) add_values<R, 1>(block, weights.data(), padded, values, end, size, c, shares);
}

template <typename T, int64_t... R>
constexpr auto attend_each_count(std::integer_sequence<int64_t, R...>) {
  return std::array{attend_block<T, R + 1>...};
}
template <typename T>
constexpr auto kAttend = attend_each_count<T>(std::make_integer_sequence<int64_t, kQueries>{});

}  // namespace
