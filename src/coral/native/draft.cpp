// A whole draft tree in one call on the CPU; native.py binds it and says what for.
//
// One team of threads walks through the products of all levels and meets at barriers, a microsecond each, where
// libraries start their threads anew for every product. Weights are read as the model keeps them, [outputs, inputs].
// n: rows of a level, h: hidden size, d: head size.

#include "vectors.h"
#include "noise.h"
#include "whole.h"

#include <array>
#include <numeric>
#include <vector>

namespace {

constexpr int64_t kRows = 4;  // that are multiplied together, at most

// Numbers in one of two formats; `visit` calls f with the typed pointer.
struct Numbers {
  void* data;
  bool wide;  // float32, not bfloat16
  template <typename F>
  void visit(const F& f) const {
    wide ? f(static_cast<float*>(data)) : f(static_cast<BFloat16*>(data));
  }
};

// Weights [outputs, inputs]; with scales, one of each output, they are bytes.
struct Matrix {
  Numbers weights;
  const float* scales;  // or none
};

struct Layer {
  const float *input_norm, *norm;  // nothing is normalised before the first layer
  Matrix q, k, v, o, gate, up, down;
};

// What native.py asks for, in its order; it makes the buffers of the result.
struct Job {
  int64_t threads, hidden, heads, kv_heads, head_size, inner, capacity, candidates, num_layers, num_embedded;
  const Layer* layers;
  Numbers embedding;
  Matrix embedding_fc, feature_fc, head;  // fc in its halves, since one may be far larger than the other
  const float *fc_bias, *head_bias;  // or none
  const int64_t* head_ids;           // or none: rows of the head are ids
  const float *cos, *sin;            // [positions, d]
  float eps, embedding_scale;
  bool feed_back_normalised;

  Numbers cache;             // keys and values of each layer in turn, [2 * layers, kv_heads, capacity, d]
  int64_t num_rows, length;  // accepted rows, and how many the cache holds before them
  const int64_t* ids;
  Numbers features;  // [num_rows, h]
  int64_t top_k, max_depth, num_nodes, pool;  // pool 0: no noise is added
  float min_gain, temperature;
  uint64_t stream;

  int64_t *tree_ids, *tree_parents;  // [num_nodes + 1], as scores
  float* tree_scores;
  int64_t size, depth;  // nodes and levels that there are
};

// Where products go: `to` [rows, stride], added to what is there or instead of it.
struct Sums {
  float* to;
  int64_t stride;
  bool add;
  // `product` sets these: the end of the outputs that exist; if they are whole numbers, the units of weights and rows.
  int64_t end = 0;
  const float *scales = nullptr, *units = nullptr;
  void put(int64_t row, int64_t output, const float* sums, int64_t count) const {
    float* place = to + row * stride + output;
    count = std::clamp<int64_t>(end - output, 0, count);
    Vec all = Vec::loadu(sums, count);
    if (scales) all = all * Vec(units[row]) * Vec::loadu(scales + output, count);
    if (add) all = all + Vec::loadu(place, count);
    all.store(place, count);
  }
};

// R rows of x with as many outputs as make a vector of sums.
template <int64_t R, typename X, typename T>
void multiply(const X* x, int64_t inputs, const T* weights, const Sums& sums, int64_t row, int64_t output) {
  constexpr int64_t outputs = kLanes / R, step = sizeof(Vec) / sizeof(X);
  std::conditional_t<std::is_same_v<X, float>, Vec, WholeSums> parts[kLanes] = {};
  for (int64_t c = 0; c < inputs; c += step) {
    decltype(load(x)) values[R];
#pragma GCC unroll 4
    for (int64_t r = 0; r < R; r++) values[r] = load(x + r * inputs + c);
#pragma GCC unroll 16
    for (int64_t j = 0; j < outputs; j++) {
      const auto weight = load(weights + j * inputs + c);
#pragma GCC unroll 4
      for (int64_t r = 0; r < R; r++)
        parts[r * outputs + j] = add_products(values[r], weight, parts[r * outputs + j]);
    }
  }
  std::array<Vec, kLanes> floats;
#pragma GCC unroll 16
  for (int64_t i = 0; i < kLanes; i++) floats[i] = as_floats(parts[i]);
  alignas(64) float all[kLanes];
  totals(floats).store(all);
  for (int64_t r = 0; r < R; r++) sums.put(row + r, output, all + r * outputs, outputs);
}

// Rows from r on with a vector of outputs from j on, R rows at a time, then those that are left.
template <int64_t R, typename X, typename T>
void multiply_block(const X* x, int64_t n, int64_t inputs, const T* weights, const Sums& sums, int64_t r, int64_t j) {
  for (; r + R <= n; r += R)
    for (int64_t i = 0; i < kLanes; i += kLanes / R)
      multiply<R>(x + r * inputs, inputs, weights + i * inputs, sums, r, j + i);
  if constexpr (R > 1) multiply_block<R / 2>(x, n, inputs, weights, sums, r, j);
}

template <typename X, typename T>
void multiply_all(const X* x, int64_t n, int64_t inputs, const T* weights, Range outputs, Sums sums) {
  std::vector<T> last;
  sums.end = outputs.end;
  for (int64_t j = outputs.begin; j < outputs.end; j += kLanes) {
    const T* block = weights + j * inputs;
    if (j + kLanes > outputs.end) {  // with zeros behind the last output
      last.resize(kLanes * inputs);
      std::copy_n(block, (outputs.end - j) * inputs, last.data());
      block = last.data();
    }
    multiply_block<kRows>(x, n, inputs, block, sums, 0, j);
  }
}

// n rows x [n, inputs] with some outputs of a matrix [outputs, inputs].
void product(const float* x, int64_t n, int64_t inputs, const Matrix& matrix, Range outputs, Sums sums) {
  if (!matrix.scales)
    return matrix.weights.visit([&](const auto* weights) { multiply_all(x, n, inputs, weights, outputs, sums); });
  const WholeRows rows(x, n, inputs);
  sums.scales = matrix.scales, sums.units = rows.units.data();
  multiply_all(rows.numbers.data(), n, inputs, static_cast<const int8_t*>(matrix.weights.data), outputs, sums);
}

// x / rms(x), times the weight if there is one.
void normalise(const float* x, const float* weight, float* out, int64_t size, float eps) {
  const Vec scale(scale_of(x, size, eps));
  for (int64_t c = 0; c < size; c += kLanes) {
    Vec value = load(x + c) * scale;
    if (weight) value = value * load(weight + c);
    value.store(out + c);
  }
}

struct Child {
  float score;  // log-probability, or what it is made from
  int64_t id;   // row of the head until `Draft::children` looks the id up
};
bool likelier(const Child& a, const Child& b) { return a.score > b.score; }

// The best of what comes by, likeliest first; of equals the first one stays before the others.
struct Best {
  size_t count;
  std::vector<Child> kept;

  float bar() const { return kept.size() == count ? kept.back().score : kNever; }  // that the next must exceed
  void add(float score, int64_t id) {
    if (!(score > bar())) return;
    if (kept.size() == count) kept.pop_back();
    const Child child{score, id};
    kept.insert(std::upper_bound(kept.begin(), kept.end(), child, likelier), child);
  }
};

struct Node {
  int64_t id, parent;  // an index among all nodes, of which 0 is the root
  float score;
};

// One draft tree while it grows. What threads share are the members; they change between two barriers.
struct Draft {
  const Job& job;

  // The rows of the level that is drafted now; the last `frontier.size()` have children.
  std::vector<int64_t> ids, positions;
  std::vector<std::vector<int64_t>> seen;  // rows of the cache that each attends to behind the first `known`,
  std::vector<int64_t> known;              // which it attends to as well
  std::vector<float> features;             // [n, h]
  int64_t first_slot = 0;                  // of the cache, for these rows

  std::vector<Node> nodes{{0, -1, 0}};
  std::vector<int64_t> frontier{0};
  int64_t depth = 0;
  bool done = false;

  std::vector<float> embedded, x, normed, queries, attended, gate, up, drafted, logits;
  // Of each thread, for each node of the frontier: those of its part that may become children, and so on.
  std::vector<std::vector<std::vector<Child>>> rivals;
  std::vector<std::vector<float>> most, mass;
  std::vector<std::vector<Child>> found;  // children of each node of the frontier

  void start() {
    ids.assign(job.ids, job.ids + job.num_rows);
    job.features.visit([&](const auto* given) { features.assign(given, given + job.num_rows * job.hidden); });
    first_slot = job.length;
    seen.resize(job.num_rows);
    for (int64_t slot = job.length; slot < job.length + job.num_rows; slot++)
      positions.push_back(slot), known.push_back(slot + 1);
  }

  void make_room() {
    const int64_t n = ids.size(), h = job.hidden, team = omp_get_num_threads();
    embedded.resize(n * h), x.resize(n * h), normed.resize(n * h), drafted.resize(n * h);
    queries.resize(n * job.heads * job.head_size), attended.resize(queries.size());
    gate.resize(n * job.inner), up.resize(gate.size()), logits.resize(frontier.size() * job.candidates);
    rivals.assign(team, std::vector<std::vector<Child>>(frontier.size()));
    most.assign(team, std::vector<float>(frontier.size(), kNever));
    mass.assign(team, std::vector<float>(frontier.size(), 0));
    found.assign(frontier.size(), {});
  }

  void grow() {
#pragma omp parallel num_threads(job.threads)
    while (!done) {
#pragma omp single
      make_room();
      forward();
      score();
#pragma omp single
      add();
    }
  }

  void forward() {
    const int64_t n = ids.size(), h = job.hidden, own = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t r = own; r < n; r += team) {
      job.embedding.visit([&](const auto* rows) {
        for (int64_t c = 0; c < h; c++) embedded[r * h + c] = float(rows[ids[r] * h + c]) * job.embedding_scale;
      });
    }
    wait_for_all();
    const Range columns = share(h, kLanes);
    set(x.data(), n, h, job.fc_bias, columns);
    product(embedded.data(), n, h, job.embedding_fc, columns, {x.data(), h, true});
    product(features.data(), n, h, job.feature_fc, columns, {x.data(), h, true});
    for (int64_t l = 0; l < job.num_layers; l++) {
      const Layer& layer = job.layers[l];
      // Of the last layer only the frontier's rows are wanted; the others leave their keys and values.
      const int64_t from = l + 1 < job.num_layers ? 0 : n - int64_t(frontier.size());
      wait_for_all();
      const float* input = x.data();
      if (layer.input_norm) {
        for (int64_t r = own; r < n; r += team) normalise(&x[r * h], layer.input_norm, &normed[r * h], h, job.eps);
        wait_for_all();
        input = normed.data();
      }
      project(l, input, n, from);
      wait_for_all();
      attend(l, n, from);
      wait_for_all();
      const int64_t width = job.heads * job.head_size;
      product(&attended[from * width], n - from, width, layer.o, columns, {&x[from * h], h, true});
      wait_for_all();
      for (int64_t r = from + own; r < n; r += team) normalise(&x[r * h], layer.norm, &normed[r * h], h, job.eps);
      wait_for_all();
      const Range mine = share(job.inner, kLanes);
      product(&normed[from * h], n - from, h, layer.gate, mine, {gate.data(), job.inner, false});
      product(&normed[from * h], n - from, h, layer.up, mine, {up.data(), job.inner, false});
      for (int64_t r = 0; r < n - from; r++)
        for (int64_t j = r * job.inner + mine.begin; j < r * job.inner + mine.end; j += kLanes) {
          const Vec value = load(&gate[j]);  // SiLU
          (value / (Vec(1) + value.neg().exp_u20()) * load(&up[j])).store(&gate[j]);
        }
      wait_for_all();
      product(gate.data(), n - from, job.inner, layer.down, columns, {&x[from * h], h, true});
    }
    wait_for_all();
    const int64_t count = frontier.size();
    for (int64_t r = own; r < count; r += team) {
      const float* row = &x[(n - count + r) * h];
      if (job.feed_back_normalised)
        normalise(row, nullptr, &drafted[r * h], h, job.eps);
      else
        std::copy_n(row, h, &drafted[r * h]);
    }
    wait_for_all();
  }

  // Sums start from a bias, or from nothing.
  static void set(float* sums, int64_t n, int64_t stride, const float* bias, Range outputs) {
    for (int64_t r = 0; r < n; r++)
      for (int64_t j = outputs.begin; j < outputs.end; j++) sums[r * stride + j] = bias ? bias[j] : 0;
  }

  // Queries of rows `from` on, and all rows' keys and values, which go to the cache; a head is one thread's.
  void project(int64_t l, const float* input, int64_t n, int64_t from) {
    const Layer& layer = job.layers[l];
    const int64_t h = job.hidden, d = job.head_size, heads = job.heads, kv_heads = job.kv_heads;
    std::vector<float> rows(n * d);
    const Range mine = share(heads + 2 * kv_heads, 1);
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const bool query = i < heads, key = !query && i < heads + kv_heads;
      const int64_t head = query ? i : (i - heads) % kv_heads, first = query ? from : 0;
      product(input + first * h, n - first, h, query ? layer.q : key ? layer.k : layer.v, {head * d, head * d + d},
              {rows.data() - head * d, d, false});
      for (int64_t r = first; r < n; r++) {
        float* row = &rows[(r - first) * d];
        if (query || key) rotate(row, positions[r]);
        if (query)
          std::copy_n(row, d, &queries[(r * heads + head) * d]);
        else
          job.cache.visit([&](auto* cache) {
            std::copy_n(row, d, cache + stored(key ? 2 * l : 2 * l + 1, head) + (first_slot + r) * d);
          });
      }
    }
  }

  void rotate(float* row, int64_t position) const {
    const int64_t d = job.head_size, half = d / 2;
    const float *c = job.cos + position * d, *s = job.sin + position * d;
    for (int64_t i = 0; i < half; i++) {
      const float a = row[i], b = row[i + half];
      row[i] = a * c[i] - b * s[i];
      row[i + half] = b * c[i + half] + a * s[i + half];
    }
  }

  // Where the keys or values of a head begin in the cache.
  int64_t stored(int64_t part, int64_t kv_head) const {
    return (part * job.kv_heads + kv_head) * job.capacity * job.head_size;
  }

  void attend(int64_t l, int64_t n, int64_t from) {
    const Range mine = share((n - from) * job.heads, 1);
    job.cache.visit([&](const auto* cache) {
      for (int64_t task = mine.begin; task < mine.end; task++) {
        const int64_t head = task % job.heads, kv_head = head / (job.heads / job.kv_heads);
        attend(cache + stored(2 * l, kv_head), cache + stored(2 * l + 1, kv_head), from + task / job.heads, head);
      }
    });
  }

  template <typename T>
  void attend(const T* keys, const T* values, int64_t r, int64_t head) {
    const int64_t d = job.head_size;
    const int64_t count = known[r] + seen[r].size(), padded = (count + kLanes - 1) / kLanes * kLanes;
    const auto offset = [&](int64_t i) { return (i < known[r] ? i : seen[r][i - known[r]]) * d; };
    const float *query = &queries[(r * job.heads + head) * d], scale = 1 / std::sqrt(float(d));
    std::vector<float> weights(padded, kNever);
    for (int64_t i = 0; i < count; i++) weights[i] = dot(query, keys + offset(i), d) * scale;
    const float highest = *std::max_element(weights.begin(), weights.end());
    Vec sum(0);
    for (int64_t i = 0; i < padded; i += kLanes) {
      const Vec weight = (Vec::loadu(&weights[i]) - Vec(highest)).exp_u20();
      weight.store(&weights[i]);
      sum = sum + weight;
    }
    const Vec norm(1 / total(sum));
    for (int64_t c = 0; c < d; c += kLanes) {
      Vec out(0);
      for (int64_t i = 0; i < count; i++) out = at::vec::fmadd(Vec(weights[i]), load(values + offset(i) + c), out);
      (out * norm).store(&attended[(r * job.heads + head) * d + c]);
    }
  }

  // The children of each node of the frontier: this thread's part of the head, then what all threads found.
  void score() {
    const int64_t h = job.hidden, count = frontier.size(), all = job.candidates, own = omp_get_thread_num();
    const Range mine = share(all, kLanes);
    set(logits.data(), count, all, job.head_bias, mine);
    product(drafted.data(), count, h, job.head, mine, {logits.data(), all, true});
    for (int64_t r = 0; r < count && mine.begin < mine.end; r++) {
      const float *begin = &logits[r * all] + mine.begin, *end = &logits[r * all] + mine.end;
      const float highest = at::vec::reduce_all<float>(
          [](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, begin, end - begin);
      mass[own][r] = at::vec::map_reduce_all<float>([highest](Vec v) { return (v - Vec(highest)).exp_u20(); },
                                                    [](Vec a, Vec b) { return a + b; }, begin, end - begin);
      most[own][r] = highest;
      if (job.pool > 0) {
        rivals[own][r] = likeliest(&logits[r * all], mine, highest);
        continue;
      }
      Best found_here = none();
      float bar = kNever;
      for (const float* score = begin; score < end; score++)
        if (*score > bar) {
          found_here.add(*score, score - &logits[r * all]);
          bar = found_here.bar();
        }
      rivals[own][r] = std::move(found_here.kept);
    }
    wait_for_all();
    for (int64_t r = own; r < count; r += omp_get_num_threads()) found[r] = children(r);
    wait_for_all();
  }

  Best none() const { return {size_t(std::min(job.top_k, job.candidates)), {}}; }

  std::vector<Child> children(int64_t r) const {
    float highest = kNever, sum = 0;
    for (const auto& part : most) highest = std::max(highest, part[r]);
    for (size_t t = 0; t < mass.size(); t++) sum += mass[t][r] * std::exp(most[t][r] - highest);
    const float all = highest + std::log(sum);
    Best chosen = none();
    if (job.pool == 0) {
      for (const auto& part : rivals)
        for (const Child& child : part[r]) chosen.add(child.score - all, child.id);
    } else {
      couple(r, all, chosen);
    }
    for (Child& child : chosen.kept) child.id = job.head_ids ? job.head_ids[child.id] : child.id;
    return chosen.kept;
  }

  // Of the head's rows in a range, as many of the likeliest as may compete where noise is added, and a few more: sorted
  // by how far below the highest score they are, in eighths.
  std::vector<Child> likeliest(const float* scores, Range range, float highest) const {
    std::array<int64_t, 512> counts{};
    const auto below = [&](float score) {
      const float eighths = 8 * (highest - score);
      return eighths < counts.size() - 1 ? size_t(eighths) : counts.size() - 1;
    };
    for (int64_t row = range.begin; row < range.end; row++) counts[below(scores[row])]++;
    size_t last = 0;
    for (int64_t count = counts[0]; count < job.pool && last + 1 < counts.size();) count += counts[++last];
    std::vector<Child> found;
    for (int64_t row = range.begin; row < range.end; row++)
      if (below(scores[row]) <= last) found.push_back({scores[row], row});
    return found;
  }

  // Ranked with the noise that the sampler will add; the scores are log-probabilities of being sampled.
  void couple(int64_t r, float all, Best& chosen) const {
    std::vector<Child> pool;
    for (const auto& part : rivals) pool.insert(pool.end(), part[r].begin(), part[r].end());
    if (pool.empty()) return;  // of scores that are no numbers
    const int64_t count = std::min<int64_t>(job.pool, pool.size());
    std::nth_element(pool.begin(), pool.begin() + count - 1, pool.end(), likelier);
    pool.resize(count);
    std::sort(pool.begin(), pool.end(), [](const Child& a, const Child& b) { return a.id < b.id; });
    const auto noise = Noise{job.stream}.row(positions.back() + 2);  // the child's, which its parent's row predicts
    float highest = kNever, sum = 0;
    std::vector<float> noisy;
    for (const auto& [score, row] : pool) {
      const float drawn = noise(job.head_ids ? job.head_ids[row] : row);
      noisy.push_back(((score - all) / job.temperature + drawn) * job.temperature);
      highest = std::max(highest, noisy.back());
    }
    for (float score : noisy) sum += std::exp(score - highest);
    for (int64_t i = 0; i < count; i++) chosen.add(noisy[i] - highest - std::log(sum), pool[i].id);
  }

  // As decoding/growth.py: the frontier's children become nodes, and the best top_k of them the next frontier.
  void add() {
    const int64_t h = job.hidden, n = ids.size(), old = nodes.size();
    std::vector<int64_t> order, parents;  // rows of the frontier
    for (size_t r = 0; r < frontier.size(); r++)
      for (const Child& child : found[r]) {
        nodes.push_back({child.id, frontier[r], nodes[frontier[r]].score + std::min(child.score, 0.f)});
        parents.push_back(r), order.push_back(order.size());
      }
    const int64_t count = std::min<int64_t>(job.top_k, order.size());
    const auto better = [&](int64_t a, int64_t b) { return nodes[old + a].score > nodes[old + b].score; };
    std::stable_sort(order.begin(), order.end(), better);
    order.resize(count);
    std::sort(order.begin(), order.end());
    double reached = 0;
    for (int64_t i : order) reached += std::exp(nodes[old + i].score);
    done = ++depth >= job.max_depth || count == 0 || (job.min_gain > 0 && reached < job.min_gain);
    if (done) return;
    const int64_t before = n - frontier.size();  // rows in front of the frontier's
    std::vector<int64_t> next_ids, next_frontier, next_known;
    std::vector<std::vector<int64_t>> next_seen;
    std::vector<float> next_features;
    first_slot += n;
    for (int64_t i : order) {
      const int64_t parent = parents[i];
      next_ids.push_back(nodes[old + i].id), next_frontier.push_back(old + i);
      next_known.push_back(known[before + parent]);
      next_seen.push_back(seen[before + parent]);
      next_seen.back().push_back(first_slot + next_ids.size() - 1);
      next_features.insert(next_features.end(), &drafted[parent * h], &drafted[parent * h] + h);
    }
    positions.assign(count, positions.back() + 1);
    ids.swap(next_ids), frontier.swap(next_frontier), known.swap(next_known), seen.swap(next_seen);
    features.swap(next_features);
  }
};

// The best nodes in the total order of decoding/tree.py, none too unlikely, renumbered, parents first.
void rerank(const std::vector<Node>& nodes, Job& job) {
  std::vector<int64_t> order(nodes.size() - 1), place(nodes.size(), 0);
  std::iota(order.begin(), order.end(), 1);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return nodes[a].score > nodes[b].score; });
  order.resize(std::min<int64_t>(job.num_nodes, order.size()));
  while (!order.empty() && nodes[order.back()].score < std::log(job.min_gain)) order.pop_back();
  std::sort(order.begin(), order.end());
  job.size = order.size() + 1;
  job.tree_ids[0] = job.ids[job.num_rows - 1], job.tree_parents[0] = -1, job.tree_scores[0] = 0;
  for (int64_t i = 1; i < job.size; i++) {
    const Node& node = nodes[order[i - 1]];
    place[order[i - 1]] = i;
    job.tree_ids[i] = node.id, job.tree_parents[i] = place[node.parent], job.tree_scores[i] = node.score;
  }
}

}  // namespace

extern "C" void coral_grow(Job* job) {
  CORAL_ASSERT(job->threads > 0 && job->num_layers > 0 && job->kv_heads > 0 && job->heads % job->kv_heads == 0);
  CORAL_ASSERT(job->hidden % kLanes == 0 && job->head_size % kLanes == 0 && job->inner % kLanes == 0);
  CORAL_ASSERT(job->candidates > 0 && job->top_k > 0 && job->max_depth > 0 && job->num_nodes > 0);
  CORAL_ASSERT(job->num_rows > 0 && job->length >= 0);
  CORAL_ASSERT(job->length + job->num_rows + (job->max_depth - 1) * job->top_k <= job->capacity);
  for (int64_t i = 0; i < job->num_rows; i++) CORAL_ASSERT(job->ids[i] >= 0 && job->ids[i] < job->num_embedded);
  Draft draft{*job};
  draft.start();
  draft.grow();
  for (const Node& node : draft.nodes) CORAL_ASSERT(node.id >= 0 && node.id < job->num_embedded);
  rerank(draft.nodes, *job);
  job->depth = draft.depth;
}
