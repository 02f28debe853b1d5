// A forward of the target over a few rows in one call on the CPU; forward.py binds it and says what for.
//
// One team of threads walks through the products of all layers and meets at barriers, a microsecond each. Numbers
// between operations are float32; with bfloat16 rows each operation rounds its results as the model does.
// n: rows of all sequences, h: hidden size, d: head size.

#include "attention.h"
#include "blocks.h"
#include "packing.h"

#include <memory>

namespace {

// A packed weight [outputs, inputs], as packing.py writes it.
struct Matrix {
  void* panels;
  const float* bias;  // or none
  int64_t inputs, outputs;
  int64_t kind;  // 0: float32, 1: bfloat16, others: blocks of a GGUF file, which rows of bfloat16 are multiplied with
};

struct Layer {
  const float *input_norm, *norm;           // or none
  const float *query_norm, *key_norm;       // or none: of each head, or of all of them together
  const float *attended_norm, *fed_norm;    // or none: of what attention and the MLP add
  Matrix qkv, o, gate_up, down;             // gate_up: a panel of one, a panel of the other, and so on
  int64_t rotation;                         // which of the job's
  bool windowed;                            // rows see the last `window` positions only
};

// Of the first `size` numbers of each head; the others stay as they are.
struct Rotation {
  const float *cos, *sin;  // [positions, size]
  int64_t size;
};

struct Sequence {
  int64_t length, count, capacity;  // rows in the cache, rows behind them now, rows that it has room for
  const int64_t *ids, *parents;     // [count], a tree
  void* storage;                    // keys and values of each layer in turn, [2 * layers, kv_heads, capacity, d]
};

// What multiplies rows that hold bfloat16 numbers, or any: `kPairs` and `kTiles` as few_rows.h and tiles.h say.
enum Unit : int64_t { kVectors, kPairs, kTiles };

// What forward.py asks for, in its order; it makes the buffers of the result.
struct Job {
  int64_t threads, hidden, heads, kv_heads, head_size, num_layers;
  const Layer* layers;
  const void* embedding;
  const float* norm;
  Matrix head;
  const Rotation* rotations;
  int64_t window;
  float eps, scale, embedding_scale;
  bool gelu;            // the MLP's activation, by tanh; else SiLU
  bool normed_at_once;  // a norm rounds once; else before its weights, too
  bool normed_together;  // queries of all heads are normalised together, and so are keys
  bool rotated_at_once;  // a rotation rounds once; else its products, too
  bool narrow;  // rows are bfloat16, as the embedding, keys, values, and what is returned
  Unit unit;    // that multiplies them

  int64_t num_sequences;
  const Sequence* sequences;
  void *features, *logits;  // [n, h]; [n, V] or none
  int64_t num_taps;
  const int64_t* taps;  // layers, each as often as it is wanted
  void* entering;       // what enters these layers, [n, num_taps * h]
};

// Rows times some inputs of some panels, into `to` [n, outputs].
template <typename CopyRow>
void multiply(const Matrix& matrix, Unit unit, Range panels, Range inner, int64_t n, const CopyRow& copy_row,
              float* to) {
  const auto with = [&](const auto* weights) {
    multiply_panels(weights, panels, inner, n, matrix.inputs, matrix.outputs, copy_row, to);
  };
  const auto* narrow = static_cast<const BFloat16*>(matrix.panels);
  if (matrix.kind > 1)
    return with_blocks(matrix.kind, matrix.panels, [&](const auto* weights) {
#ifdef CORAL_TILES
      if (unit == kTiles && n > std::remove_pointer_t<decltype(weights)>::kFew)
        return multiply_block_panels_by_tiles(weights, panels, inner, n, matrix.inputs, matrix.outputs, copy_row, to);
#endif
#ifdef CORAL_PAIRS
      if (unit == kPairs)
        return multiply_block_panels<true>(weights, panels, inner, n, matrix.inputs, matrix.outputs, copy_row, to);
#endif
      multiply_block_panels<false>(weights, panels, inner, n, matrix.inputs, matrix.outputs, copy_row, to);
    });
#ifdef CORAL_TILES
  if (unit == kTiles) return multiply_panels_by_tiles(narrow, panels, inner, n, matrix.inputs, matrix.outputs, copy_row, to);
#endif
#ifdef CORAL_PAIRS
  if (unit == kPairs && matrix.kind) return with(static_cast<const Paired*>(matrix.panels));
#endif
  matrix.kind ? with(narrow) : with(static_cast<const float*>(matrix.panels));
}

// To the nearest number that T holds, of two as near to the even one.
template <typename T>
Vec rounded(const Vec& numbers) {
  if constexpr (std::is_same_v<T, float>) return numbers;
  using Bits = at::vec::Vectorized<int32_t>;
  const Bits bits = at::vec::cast<int32_t>(numbers), odd = (bits >> Bits(16)) & Bits(1);
  return at::vec::cast<float>((bits + Bits(0x7FFF) + odd) & Bits(int32_t(0xFFFF0000)));
}

template <typename T>
using Buffer = std::unique_ptr<T[]>;

template <typename T>
Buffer<T> buffer(int64_t count) {
  return Buffer<T>(new T[count]);  // not set to zero
}

struct Place {
  const Sequence* sequence;
  int64_t node;
};

// Rows of one sequence that attend together: `begin` to `end` of a key/value head's, head after head.
struct Task {
  const Sequence* sequence;
  int64_t first, kv_head, begin, end;  // first: the sequence's first row
};

template <typename T>
struct Forward {
  const Job& job;
  const int64_t h = job.hidden, d = job.head_size, attended_width = job.heads * d,
                width = attended_width + 2 * job.kv_heads * d;

  static constexpr bool wide = std::is_same_v<T, float>;  // logits are then made where they will stand

  int64_t n = 0;
  std::vector<Place> place;  // of each row; so are the next two
  std::vector<int64_t> position;
  std::vector<Buffer<bool>> seen;  // rows of the cache that it attends to
  std::vector<Buffer<bool>> near;  // those within the window; none: all of them
  std::vector<Task> tasks;

  Buffer<float> x, qkv, sums, inner, parts;  // parts: each thread's of the last product of a layer, [threads, n, h]
  Buffer<float> together;                    // scales of all queries and of all keys, [n, 2]
  Buffer<T> attended;

  void start() {
    const Sequence* end = job.sequences + job.num_sequences;
    for (const Sequence* s = job.sequences; s < end; s++) n += s->count;
    const int64_t group = job.heads / job.kv_heads;
    const int64_t most = std::clamp<int64_t>((n * job.heads + job.threads - 1) / job.threads, 1, kQueries);
    for (const Sequence* s = job.sequences; s < end; s++) {
      const int64_t first = place.size(), all = s->length + s->count;
      for (int64_t i = 0; i < s->count; i++) {
        auto allowed = buffer<bool>(all);
        std::fill_n(allowed.get(), all, false);
        if (i > 0) std::copy_n(seen[first + s->parents[i]].get(), all, allowed.get());
        std::fill_n(allowed.get(), s->length, true);
        allowed[s->length + i] = true;
        position.push_back(i > 0 ? position[first + s->parents[i]] + 1 : s->length);
        place.push_back({s, i}), seen.push_back(std::move(allowed));
      }
      for (int64_t i = 0; i < s->count; i++) near.push_back(within_window(*s, first, first + i));
      for (int64_t head = 0; head < job.kv_heads; head++)
        for (int64_t row = 0; row < group * s->count; row += most)
          tasks.push_back({s, first, head, row, std::min(row + most, group * s->count)});
    }
    int64_t widest = 0;
    for (int64_t l = 0; l < job.num_layers; l++) widest = std::max(widest, job.layers[l].gate_up.outputs);
    x = buffer<float>(n * h), together = buffer<float>(2 * n), qkv = buffer<float>(n * width), attended = buffer<T>(n * attended_width);
    inner = buffer<float>(n * widest / 2);
    sums = buffer<float>(n * std::max(widest, job.logits && !wide ? job.head.outputs : 0));
    parts = buffer<float>(job.threads * n * h);
  }

  // The position of the first row of the cache that a row sees through a window.
  int64_t horizon(int64_t row) const { return std::max<int64_t>(position[row] - job.window + 1, 0); }

  // What a row sees through the window; `first`: the sequence's first row.
  Buffer<bool> within_window(const Sequence& s, int64_t first, int64_t row) const {
    const int64_t from = job.window ? horizon(row) : 0, all = s.length + s.count;
    if (!from) return nullptr;
    auto near = buffer<bool>(all);
    std::copy_n(seen[row].get(), all, near.get());
    std::fill_n(near.get(), std::min(from, s.length), false);
    for (int64_t i = 0; i < s.count; i++)
      if (position[first + i] < from) near[s.length + i] = false;
    return near;
  }

  void run() {
    start();
#pragma omp parallel num_threads(job.threads)
    {
      const Range rows = share(n, 1);
      for (int64_t r = rows.begin; r < rows.end; r++) {
        const int64_t id = place[r].sequence->ids[place[r].node];
        for (int64_t c = 0; c < h; c += kLanes) {
          const Vec numbers = load(static_cast<const T*>(job.embedding) + id * h + c);
          store(rounded<T>(numbers * Vec(job.embedding_scale)), &x[r * h + c]);
        }
      }
      wait_for_all();
      for (int64_t l = 0; l < job.num_layers; l++) {
        const Layer& layer = job.layers[l];
        keep_entering(l, rows);
        normalised_product(layer.input_norm, layer.qkv, qkv.get(), 1, [&](int64_t r, int64_t j, int64_t count) {
          store(result(layer.qkv, &qkv[r * width], j, count), &qkv[r * width + j], count);
        });
        wait_for_all();
        if (job.normed_together) {
          scale_together();
          wait_for_all();
        }
        rotate(layer, l);
        wait_for_all();
        attend(layer, l);
        wait_for_all();
        add_product(layer.o, layer.attended_norm, [&](int64_t r, int64_t k, int64_t depth, float* to) {
          convert(&attended[r * attended_width + k], depth, to);
        });
        wait_for_all();
        feed_forward(layer);
        wait_for_all();
        add_parts(layer.down, layer.fed_norm);
        wait_for_all();
      }
      T *features = static_cast<T*>(job.features), *logits = static_cast<T*>(job.logits);
      const int64_t ids = job.head.outputs;
      if (logits) {
        float* scores = wide ? static_cast<float*>(job.logits) : sums.get();
        normalised_product(job.norm, job.head, scores, 1, [&](int64_t r, int64_t j, int64_t count) {
          store(result(job.head, scores + r * ids, j, count), logits + r * ids + j, count);
        });
      }
      for (int64_t r = rows.begin; r < rows.end; r++)
        for (int64_t c = 0; c < h; c += kLanes)
          store(normalised(&x[r * h + c], job.norm + c, scale_of(&x[r * h], h, job.eps)), features + r * h + c);
    }
  }

  // The rows before a layer, where they are wanted; they change behind the next barrier.
  void keep_entering(int64_t l, Range rows) const {
    for (int64_t tap = 0; tap < job.num_taps; tap++) {
      if (job.taps[tap] != l) continue;
      for (int64_t r = rows.begin; r < rows.end; r++)
        for (int64_t c = 0; c < h; c += kLanes)
          store(load(&x[r * h + c]), static_cast<T*>(job.entering) + (r * job.num_taps + tap) * h + c);
    }
  }

  Vec normalised(const float* numbers, const float* weights, float scale) const {
    const Vec unit = load(numbers) * Vec(scale);
    return rounded<T>((job.normed_at_once ? unit : rounded<T>(unit)) * load(weights));
  }

  // A product's sum with its bias, for `count` outputs.
  static Vec result(const Matrix& matrix, const float* row, int64_t output, int64_t count) {
    const Vec sum = Vec::loadu(row + output, count);
    return rounded<T>(matrix.bias ? sum + Vec::loadu(matrix.bias + output, count) : sum);
  }

  // This thread's part of a product; finish(row, output, count) is called for all of its sums, a vector at a time.
  template <typename CopyRow, typename Finish>
  void product(const Matrix& matrix, const CopyRow& copy_row, float* to, int64_t unit, const Finish& finish) {
    const Range mine = share((matrix.outputs + kPanel - 1) / kPanel, unit);
    multiply(matrix, job.unit, mine, {0, matrix.inputs}, n, copy_row, to);
    const int64_t end = std::min(mine.end * kPanel, matrix.outputs);
    for (int64_t r = 0; r < n; r++)
      for (int64_t j = mine.begin * kPanel; j < end; j += kLanes) finish(r, j, std::min(kLanes, end - j));
  }

  template <typename Finish>
  void normalised_product(const float* norm, const Matrix& matrix, float* to, int64_t unit, const Finish& finish) {
    std::vector<float> scales(n);
    if (norm)
      for (int64_t r = 0; r < n; r++) scales[r] = scale_of(&x[r * h], h, job.eps);
    const auto copy_row = [&](int64_t r, int64_t k, int64_t depth, float* copy) {
      if (!norm) return void(std::copy_n(&x[r * h + k], depth, copy));
      for (int64_t c = 0; c < depth; c += kLanes)
        normalised(&x[r * h + k + c], norm + k + c, scales[r]).store(copy + c);
    };
    product(matrix, copy_row, to, unit, finish);
  }

  template <typename CopyRow>
  void add_product(const Matrix& matrix, const float* norm, const CopyRow& copy_row) {
    product(matrix, copy_row, sums.get(), 1, [&](int64_t r, int64_t j, int64_t count) {
      add_or_keep(r, j, count, result(matrix, &sums[r * h], j, count), norm, sums.get());
    });
    if (norm) add_normalised(norm, sums.get());
  }

  // A change is added at once, or kept where all of its row is to be normalised first.
  void add_or_keep(int64_t r, int64_t j, int64_t count, const Vec& change, const float* norm, float* kept) {
    norm ? store(change, kept + r * h + j, count) : add(r, j, count, change);
  }

  void add_normalised(const float* norm, const float* changes) {
    wait_for_all();
    const Range mine = share(h, kLanes);
    for (int64_t r = 0; r < n; r++) {
      const float scale = scale_of(changes + r * h, h, job.eps);
      for (int64_t j = mine.begin; j < mine.end; j += kLanes)
        add(r, j, kLanes, normalised(changes + r * h + j, norm + j, scale));
    }
  }

  void add(int64_t row, int64_t column, int64_t count, const Vec& change) {
    float* place = &x[row * h + column];
    store(rounded<T>(Vec::loadu(place, count) + change), place, count);
  }

  // SiLU(gate) * up, or GELU by tanh: gate / (1 + exp(-2 u)) is gate / 2 * (1 + tanh(u)); both panels
  // of a pair are this thread's.
  // Then this thread's part of `down`: what it has just made, whole blocks, with all outputs, so that no thread waits
  // for another's numbers, or fetches them.
  void feed_forward(const Layer& layer) {
    const Matrix &both = layer.gate_up, &down = layer.down;
    normalised_product(layer.norm, both, sums.get(), 4, [&](int64_t r, int64_t j, int64_t count) {
      if (j / kPanel % 2) return;
      const float* row = &sums[r * both.outputs];
      const Vec gate = result(both, row, j, count), up = result(both, row, j + kPanel, count);
      const Vec power = job.gelu ? gate * (Vec(1.5957691f) + Vec(0.07135482f) * gate * gate) : gate;
      const Vec active = rounded<T>(gate / (Vec(1) + power.neg().exp_u20()));
      const int64_t output = j / (2 * kPanel) * kPanel + j % kPanel;
      store(rounded<T>(active * up), &inner[r * down.inputs + output]);
    });
    const Range pairs = share(both.outputs / (2 * kPanel), 2), made{pairs.begin * kPanel, pairs.end * kPanel};
    float* part = &parts[omp_get_thread_num() * n * h];
    if (made.begin == made.end) std::fill_n(part, n * h, 0.f);
    const auto copy_row = [&](int64_t r, int64_t k, int64_t depth, float* to) {
      std::copy_n(&inner[r * down.inputs + k], depth, to);
    };
    multiply(down, job.unit, {0, h / kPanel}, made, n, copy_row, part);
  }

  void add_parts(const Matrix& down, const float* norm) {
    const Range mine = share(h, kLanes);
    for (int64_t r = 0; r < n; r++)
      for (int64_t j = mine.begin; j < mine.end; j += kLanes) {
        Vec sum = load(&parts[r * h + j]);
        for (int64_t t = 1; t < omp_get_num_threads(); t++) sum = sum + load(&parts[(t * n + r) * h + j]);
        store(sum, &parts[r * h + j]);
        add_or_keep(r, j, kLanes, result(down, &parts[r * h], j, kLanes), norm, parts.get());
      }
    if (norm) add_normalised(norm, parts.get());
  }

  T* stored(const Sequence& s, int64_t part, int64_t kv_head) const {
    return static_cast<T*>(s.storage) + (part * job.kv_heads + kv_head) * s.capacity * d;
  }

  void scale_together() {
    const Range mine = share(2 * n, 1);
    for (int64_t task = mine.begin; task < mine.end; task++) {
      const bool keys = task % 2;
      const float* row = &qkv[task / 2 * width + keys * attended_width];
      together[task] = scale_of(row, (keys ? job.kv_heads : job.heads) * d, job.eps);
    }
  }

  // Queries are turned in place; keys, and values, go to the cache. A task is a head of a row.
  void rotate(const Layer& layer, int64_t l) {
    const int64_t heads = job.heads + job.kv_heads;
    const Range mine = share(n * heads, 1);
    for (int64_t task = mine.begin; task < mine.end; task++) {
      const int64_t r = task / heads, head = task % heads, kv_head = head - job.heads;
      float* row = &qkv[r * width + head * d];
      const bool key = kv_head >= 0;
      if (const float* norm = key ? layer.key_norm : layer.query_norm) {
        if (job.normed_together) norm += (key ? kv_head : head) * d;
        const float scale = job.normed_together ? together[2 * r + key] : scale_of(row, d, job.eps);
        for (int64_t c = 0; c < d; c += kLanes) store(normalised(row + c, norm + c, scale), row + c);
      }
      turn(row, job.rotations[layer.rotation], position[r]);
      if (!key) continue;
      const Sequence& s = *place[r].sequence;
      const int64_t slot = (s.length + place[r].node) * d;
      for (int64_t c = 0; c < d; c += kLanes) {
        store(load(row + c), stored(s, 2 * l, kv_head) + slot + c);
        store(load(row + job.kv_heads * d + c), stored(s, 2 * l + 1, kv_head) + slot + c);
      }
    }
  }

  void turn(float* head, const Rotation& rotation, int64_t at_position) const {
    const int64_t size = rotation.size, half = size / 2;
    const float *cos = rotation.cos + at_position * size, *sin = rotation.sin + at_position * size;
    for (int64_t c = 0; c < half; c += kLanes) {
      const int64_t count = std::min(kLanes, half - c), other = half + c;
      const auto at = [count](const float* numbers) { return Vec::loadu(numbers, count); };
      const auto sum = [&](const Vec& a, const Vec& b) {
        return rounded<T>(job.rotated_at_once ? a + b : rounded<T>(a) + rounded<T>(b));
      };
      const Vec low = at(head + c), high = at(head + other);
      store(sum(low * at(cos + c), high.neg() * at(sin + c)), head + c, count);
      store(sum(high * at(cos + other), low * at(sin + other)), head + other, count);
    }
  }

  void attend(const Layer& layer, int64_t l) {
    const Range mine = share(tasks.size(), 1);
    for (int64_t t = mine.begin; t < mine.end; t++) {
      const Task& task = tasks[t];
      const Sequence& s = *task.sequence;
      Block<T> block;
      int64_t from = layer.windowed ? s.length : 0;  // rows of the cache before it are none of these rows' business
      for (int64_t i = task.begin; i < task.end; i++) {
        const int64_t head = task.kv_head * (job.heads / job.kv_heads) + i / s.count, r = task.first + i % s.count;
        block.queries[block.count] = &qkv[r * width + head * d];
        block.allowed[block.count] = layer.windowed && near[r] ? near[r].get() : seen[r].get();
        block.outputs[block.count++] = &attended[r * attended_width + head * d];
        if (layer.windowed) from = std::min(from, horizon(r));
      }
      for (int64_t i = 0; i < block.count; i++) block.allowed[i] += from;
      kAttend<T>[block.count - 1](block, stored(s, 2 * l, task.kv_head) + from * d,
                                  stored(s, 2 * l + 1, task.kv_head) + from * d, s.length + s.count - from, d,
                                  job.scale, job.unit == kTiles);
    }
  }
};

}  // namespace

// Rows [n, inputs] with a matrix, without its bias, into `sums` [n, outputs].
extern "C" void coral_multiply(const Matrix* matrix, const float* rows, int64_t n, Unit unit, int64_t threads,
                               float* sums) {
  const auto copy_row = [&](int64_t r, int64_t k, int64_t depth, float* to) {
    std::copy_n(rows + r * matrix->inputs + k, depth, to);
  };
#pragma omp parallel num_threads(threads)
  multiply(*matrix, unit, share((matrix->outputs + kPanel - 1) / kPanel, 1), {0, matrix->inputs}, n, copy_row, sums);
}

extern "C" void coral_forward(const Job* job) {
  CORAL_ASSERT(job->threads > 0 && job->num_layers > 0 && job->kv_heads > 0 && job->heads % job->kv_heads == 0);
  CORAL_ASSERT(job->hidden % kLanes == 0 && job->head_size % kLanes == 0 && job->head.inputs == job->hidden);
  for (int64_t l = 0; l < job->num_layers; l++) {
    const Layer& layer = job->layers[l];
    CORAL_ASSERT(layer.qkv.outputs == (job->heads + 2 * job->kv_heads) * job->head_size);
    CORAL_ASSERT(layer.qkv.inputs == job->hidden && layer.gate_up.inputs == job->hidden);
    CORAL_ASSERT(layer.o.inputs == job->heads * job->head_size && layer.o.outputs == job->hidden);
    CORAL_ASSERT(2 * layer.down.inputs == layer.gate_up.outputs && layer.down.outputs == job->hidden);
  }
  for (int64_t i = 0; i < job->num_sequences; i++) {
    const Sequence& s = job->sequences[i];
    CORAL_ASSERT(s.count > 0 && s.length >= 0 && s.length + s.count <= s.capacity);
    for (int64_t n = 0; n < s.count; n++) {
      CORAL_ASSERT(s.ids[n] >= 0 && s.ids[n] < job->head.outputs);
      CORAL_ASSERT(n == 0 || (s.parents[n] >= 0 && s.parents[n] < n));
    }
  }
  if (job->narrow)
    Forward<BFloat16>{*job}.run();
  else
    Forward<float>{*job}.run();
}
