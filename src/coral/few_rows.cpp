// Products and attention of a few float32 rows on the CPU; few_rows.py binds them and says what for.
//
// A row's sums are made in one order, whatever the number of rows beside it: in a verification the products of a
// node's row are, bit for bit, those of a plain step.

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <array>
#include <limits>
#include <utility>
#include <vector>

namespace {

using Vec = at::vec::Vectorized<float>;
using at::Tensor;

constexpr int64_t kLanes = Vec::size();
constexpr int64_t kPanel = 16;                    // outputs whose weights stand together; few_rows.py packs them
constexpr int64_t kParts = kPanel / kLanes;       // vectors that hold a panel
constexpr int64_t kBlock = 256;                   // inputs at a time: 16 KiB of a panel
constexpr int64_t kStride = kBlock + kPanel;      // between copied rows; a power of two would crowd the L1 cache
constexpr int64_t kTile = kLanes == 16 ? 16 : 4;  // rows whose sums the registers hold
constexpr int64_t kAhead = 768;                   // weights that are fetched this long before they are needed
constexpr int64_t kQueries = 4;                   // rows that attend together,
constexpr int64_t kKeys = 4;                      // and keys that they are multiplied with at a time

// Products of `M` rows with one panel [depth, kPanel], added to what `out` holds, unless they are the first.
template <int64_t M>
void multiply(const float* panel, const float* rows, float* out, int64_t stride, int64_t width, int64_t depth,
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
  for (int64_t k = 0; k < depth; k++) {
    __builtin_prefetch(panel + k * kPanel + kAhead);
    for (int64_t p = 0; p < kParts; p++) {
      const Vec weights = Vec::loadu(panel + k * kPanel + p * kLanes);
#pragma GCC unroll 16
      for (int64_t m = 0; m < M; m++)
        sums[m][p] = at::vec::fmadd(weights, Vec(rows[m * kStride + k]), sums[m][p]);
    }
  }
  for (int64_t p = 0; p < kParts; p++)
#pragma GCC unroll 16
    for (int64_t m = 0; m < M; m++) sums[m][p].store(out + m * stride + p * kLanes, real[p]);
}

template <int64_t... M>
constexpr auto each_count(std::integer_sequence<int64_t, M...>) {
  return std::array{multiply<M + 1>...};
}
constexpr auto kMultiply = each_count(std::make_integer_sequence<int64_t, kTile>{});

Tensor linear(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias, int64_t width) {
  const Tensor rows = input.contiguous();
  const int64_t n = rows.size(0), inputs = rows.size(1), panels = (width + kPanel - 1) / kPanel;
  Tensor output = at::empty({n, width}, rows.options());
  const float *x = rows.const_data_ptr<float>(), *weights = packed.const_data_ptr<float>();
  const float* offsets = bias ? bias->const_data_ptr<float>() : nullptr;
  float* y = output.mutable_data_ptr<float>();
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    alignas(64) float copy[kTile * kStride];
    for (int64_t k = 0; k < inputs; k += kBlock) {
      const int64_t depth = std::min(kBlock, inputs - k);
      for (int64_t top = 0; top < n; top += kTile) {
        const int64_t count = std::min(kTile, n - top);
        for (int64_t i = 0; i < count; i++) std::copy_n(x + (top + i) * inputs + k, depth, copy + i * kStride);
        for (int64_t p = begin; p < end; p++)
          kMultiply[count - 1](weights + kPanel * (panels * k + p * depth), copy, y + top * width + p * kPanel, width,
                               std::min(kPanel, width - p * kPanel), depth, k == 0);
      }
    }
    if (offsets)
      for (int64_t i = 0; i < n; i++)
        for (int64_t j = begin * kPanel; j < std::min(end * kPanel, width); j++) y[i * width + j] += offsets[j];
  });
  return output;
}

float total(const Vec& vector) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, vector);
}

// What one block of at most kQueries rows, all on the same key/value head, reads and writes.
struct Block {
  int64_t count = 0;
  const float* queries[kQueries];
  const bool* allowed[kQueries];
  float* outputs[kQueries];
};

// Columns c to c + C * kLanes of the outputs: values [end, size] weighed by the rows of `weights` [R, stride].
template <int64_t R, int64_t C>
void add_values(const Block& block, const float* weights, int64_t stride, const float* values, int64_t end,
                int64_t size, int64_t c, const float* shares) {
  Vec sums[R][C];
  for (int64_t key = 0; key < end; key++)
#pragma GCC unroll 2
    for (int64_t part = 0; part < C; part++) {
      const Vec value = Vec::loadu(values + key * size + c + part * kLanes);
#pragma GCC unroll 4
      for (int64_t r = 0; r < R; r++)
        sums[r][part] = at::vec::fmadd(value, Vec(weights[r * stride + key]), sums[r][part]);
    }
#pragma GCC unroll 4
  for (int64_t r = 0; r < R; r++)
#pragma GCC unroll 2
    for (int64_t part = 0; part < C; part++)
      (sums[r][part] * Vec(shares[r])).store(block.outputs[r] + c + part * kLanes);
}

// Keys and values [num_keys, size]; a row that may attend to nothing becomes 0.
template <int64_t R>
void attend_block(const Block& block, const float* keys, const float* values, int64_t num_keys, int64_t size,
                  float scale) {
  int64_t end = num_keys;  // one behind the last key that any row attends to
  const auto unseen = [&](int64_t key) {
    for (int64_t r = 0; r < R; r++)
      if (block.allowed[r][key]) return false;
    return true;
  };
  while (end > 0 && unseen(end - 1)) end--;
  const int64_t padded = (end + kLanes - 1) / kLanes * kLanes;
  std::vector<float> weights(R * padded, -std::numeric_limits<float>::infinity());
  float lanes[R][kLanes * kLanes], turned[kLanes * kLanes];
  for (int64_t first = 0; first < end; first += kLanes) {
    const int64_t count = std::min(kLanes, end - first);
    for (int64_t i = 0; i < count; i += kKeys) {
      Vec sums[kKeys][R];
      for (int64_t c = 0; c < size; c += kLanes)
#pragma GCC unroll 4
        for (int64_t j = 0; j < kKeys; j++) {
          const Vec part = Vec::loadu(keys + std::min(first + i + j, end - 1) * size + c);
#pragma GCC unroll 4
          for (int64_t r = 0; r < R; r++)
            sums[j][r] = at::vec::fmadd(part, Vec::loadu(block.queries[r] + c), sums[j][r]);
        }
#pragma GCC unroll 4
      for (int64_t j = 0; j < kKeys; j++)
#pragma GCC unroll 4
        for (int64_t r = 0; r < R; r++) sums[j][r].store(lanes[r] + (i + j) * kLanes);
    }
    for (int64_t r = 0; r < R; r++) {  // the lanes of all these keys are added at once, a key a lane
      at::vec::transpose_mxn<float, kLanes, kLanes>(lanes[r], kLanes, turned, kLanes);
      Vec score(0);
      for (int64_t lane = 0; lane < kLanes; lane++) score = score + Vec::loadu(turned + lane * kLanes);
      (score * Vec(scale)).store(turned);
      for (int64_t i = 0; i < count; i++)
        if (block.allowed[r][first + i]) weights[r * padded + first + i] = turned[i];
    }
  }
  float shares[R];
  for (int64_t r = 0; r < R; r++) {
    float* row = weights.data() + r * padded;
    Vec most(std::numeric_limits<float>::lowest()), sum(0);  // for a row that sees nothing, too
    for (int64_t key = 0; key < padded; key += kLanes) most = at::vec::maximum(most, Vec::loadu(row + key));
    most = Vec(at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, most));
    for (int64_t key = 0; key < padded; key += kLanes) {
      const Vec weight = (Vec::loadu(row + key) - most).exp();
      weight.store(row + key);
      sum = sum + weight;
    }
    const float all = total(sum);
    shares[r] = all > 0 ? 1 / all : 0;
  }
  int64_t c = 0;
  for (; c + 2 * kLanes <= size; c += 2 * kLanes)
    add_values<R, 2>(block, weights.data(), padded, values, end, size, c, shares);
  if (c < size) add_values<R, 1>(block, weights.data(), padded, values, end, size, c, shares);
}
constexpr std::array kAttend{attend_block<1>, attend_block<2>, attend_block<3>, attend_block<4>};

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale) {
  const Tensor queries = q.contiguous(), keys = k.contiguous(), values = v.contiguous();
  const int64_t batch = q.size(0), heads = q.size(1), n = q.size(2), size = q.size(3);
  const Tensor allowed = mask.expand({batch, 1, n, k.size(2)}).contiguous();
  const int64_t kv_heads = k.size(1), num_keys = k.size(2), rows = heads / kv_heads * n;  // rows of a k/v head
  Tensor output = at::empty({batch, n, heads, size}, q.options());
  const int64_t share = (batch * kv_heads * rows + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t most = std::clamp<int64_t>(share, 1, kQueries), blocks = (rows + most - 1) / most;
  const float *x = queries.const_data_ptr<float>(), *ks = keys.const_data_ptr<float>();
  const float* vs = values.const_data_ptr<float>();
  const bool* seen = allowed.const_data_ptr<bool>();
  float* y = output.mutable_data_ptr<float>();
  at::parallel_for(0, batch * kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; task++) {
      const int64_t pair = task / blocks, b = pair / kv_heads, first = task % blocks * most;
      Block block;
      for (int64_t row = first; row < std::min(first + most, rows); row++) {
        const int64_t head = pair % kv_heads * (rows / n) + row / n, i = row % n;
        block.queries[block.count] = x + ((b * heads + head) * n + i) * size;
        block.allowed[block.count] = seen + (b * n + i) * num_keys;
        block.outputs[block.count++] = y + ((b * n + i) * heads + head) * size;
      }
      kAttend[block.count - 1](block, ks + pair * num_keys * size, vs + pair * num_keys * size, num_keys, size,
                               float(scale));
    }
  });
  return output;
}

}  // namespace

TORCH_LIBRARY(coral, library) {
  library.def("linear(Tensor input, Tensor packed, Tensor? bias, int width) -> Tensor");
  library.def("attend(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor");
}

TORCH_LIBRARY_IMPL(coral, CPU, library) {
  library.impl("linear", &linear);
  library.impl("attend", &attend);
}
