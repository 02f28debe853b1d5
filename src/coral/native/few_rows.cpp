// few_rows.h as torch's operators, for compiled forwards; few_rows.py binds them.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "attention.h"

namespace {

using at::Tensor;

template <typename Row, typename Weight>
Tensor multiply_all(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias, int64_t width) {
  const Tensor rows = input.contiguous();
  const int64_t n = rows.size(0), inputs = rows.size(1), panels = (width + kPanel - 1) / kPanel;
  CORAL_ASSERT(packed.numel() == panels * kPanel * (inputs + inputs % int64_t(4 / sizeof(Weight))));
  CORAL_ASSERT(!bias || bias->numel() == width);
  constexpr bool rounds = !std::is_same_v<Row, float>;  // at the end, so that sums need memory of their own
  Tensor output = at::empty({n, width}, rows.options());
  const Tensor exact = rounds ? at::empty({n, width}, rows.options().dtype(at::kFloat)) : output;
  const Row *x = rows.const_data_ptr<Row>(), *offsets = bias ? bias->const_data_ptr<Row>() : nullptr;
  const Weight* weights = packed.const_data_ptr<Weight>();
  float* sums = exact.mutable_data_ptr<float>();
  Row* y = output.mutable_data_ptr<Row>();
  at::parallel_for(0, panels, 1, [&](int64_t begin, int64_t end) {
    const auto copy_row = [&](int64_t i, int64_t k, int64_t depth, float* to) {
      convert<Row, Row>(x + i * inputs + k, nullptr, depth, to);
    };
    multiply_panels(weights, {begin, end}, {0, inputs}, n, inputs, width, copy_row, sums);
    const int64_t first = begin * kPanel, columns = std::min(end * kPanel, width) - first;
    if (offsets || rounds)
      for (int64_t i = 0; i < n; i++)
        convert(sums + i * width + first, offsets ? offsets + first : nullptr, columns, y + i * width + first);
  });
  return output;
}

template <typename Run>
Tensor with_type(const Tensor& tensor, const Run& run) {
  return tensor.scalar_type() == at::kFloat ? run(float()) : run(BFloat16());
}

Tensor linear(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias, int64_t width) {
  return with_type(input, [&](auto row) {
    return with_type(packed, [&](auto weight) {
      return multiply_all<decltype(row), decltype(weight)>(input, packed, bias, width);
    });
  });
}

// The same numbers, with those of a row side by side.
Tensor dense(const Tensor& rows) { return rows.stride(-1) == 1 ? rows : rows.contiguous(); }

template <typename T>
Tensor attend_all(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale) {
  const Tensor queries = dense(q), allowed = dense(mask), keys = k.contiguous(), values = v.contiguous();
  const int64_t batch = q.size(0), heads = q.size(1), n = q.size(2), size = q.size(3);
  const int64_t kv_heads = k.size(1), num_keys = k.size(2), rows = heads / kv_heads * n;  // rows of a k/v head
  Tensor output = at::empty({batch, n, heads, size}, q.options());
  const int64_t share = (batch * kv_heads * rows + at::get_num_threads() - 1) / at::get_num_threads();
  const int64_t most = std::clamp<int64_t>(share, 1, kQueries), blocks = (rows + most - 1) / most;
  const T *ks = keys.const_data_ptr<T>(), *vs = values.const_data_ptr<T>();
  const auto place = [](const Tensor& tensor, int64_t b, int64_t head, int64_t i) {
    return (tensor.size(0) == 1 ? 0 : b * tensor.stride(0)) + head * tensor.stride(1) + i * tensor.stride(2);
  };
  const T* x = queries.const_data_ptr<T>();
  const bool* seen = allowed.const_data_ptr<bool>();
  T* y = output.mutable_data_ptr<T>();
  at::parallel_for(0, batch * kv_heads * blocks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> copies(kQueries * size);
    for (int64_t task = begin; task < end; task++) {
      const int64_t pair = task / blocks, b = pair / kv_heads, first = task % blocks * most;
      Block<T> block;
      for (int64_t row = first; row < std::min(first + most, rows); row++) {
        const int64_t head = pair % kv_heads * (rows / n) + row / n, i = row % n;
        float* copy = copies.data() + block.count * size;
        convert<T, T>(x + place(queries, b, head, i), nullptr, size, copy);
        block.queries[block.count] = copy;
        block.allowed[block.count] = seen + place(allowed, b, 0, i);
        block.outputs[block.count++] = y + ((b * n + i) * heads + head) * size;
      }
      kAttend<T>[block.count - 1](block, ks + pair * num_keys * size, vs + pair * num_keys * size, num_keys, size,
                                  float(scale), false);
    }
  });
  return output;
}

Tensor attend(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& mask, double scale) {
  return with_type(q, [&](auto number) { return attend_all<decltype(number)>(q, k, v, mask, scale); });
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
