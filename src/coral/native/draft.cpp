// The draft trees of some texts in one call on the CPU; native_drafting.py binds it and says what for.
//
// One team of threads walks through the products of all levels and meets at barriers, a microsecond each, where
// libraries start their threads anew for every product. Texts share the products of a level, so that weights are read
// once for all of them. Weights are read as the model keeps them, [outputs, inputs].
// n: rows of a level, of all texts, h: hidden size, d: head size.

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

// Rows of which each may be a child's.
struct Head {
  Matrix rows;         // [candidates, h]
  const float* bias;   // or none
  const int64_t* ids;  // or none: rows are ids
  int64_t candidates;
};

// A text, and its tree, for which native_drafting.py makes the buffers.
struct Text {
  Numbers cache;  // keys and values of each layer in turn, [2 * layers, kv_heads, capacity, d]
  int64_t capacity, length, num_rows;  // length: rows that the cache holds; num_rows: accepted ones behind them
  const int64_t* ids;
  Numbers features;  // [num_rows, h]
  int64_t head, max_depth, num_nodes, pool;  // head: which of the job's; pool 0: no noise is added
  float temperature;
  uint64_t stream;

  int64_t *tree_ids, *tree_parents;  // [num_nodes + 1], as scores
  float* tree_scores;
  int64_t size, depth;  // nodes and levels that there are
};

// What native_drafting.py asks for, in its order.
struct Job {
  int64_t threads, hidden, heads, kv_heads, head_size, inner, num_layers, num_embedded;
  const Layer* layers;
  Numbers embedding;
  Matrix embedding_fc, feature_fc;  // fc in its halves, since one may be far larger than the other
  const float* fc_bias;             // or none
  const float *cos, *sin;           // [positions, d]
  float eps, embedding_scale;
  bool feed_back_normalised;

  const Head* tables;
  int64_t num_tables, top_k;
  float min_gain;
  int64_t num_texts;
  Text* texts;
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

// A row of a level. It attends to the first `known` rows of its text's cache, and to those in `seen`.
struct Row {
  const Text* text;
  int64_t id, position, slot, known;
  std::vector<int64_t> seen{};
};

// The tree of one text while it grows, as in drafters/feature/growth.py.
struct Growth {
  const Job& job;
  Text& text;
  std::vector<Node> nodes{{0, -1, 0}};
  std::vector<int64_t> frontier{0};
  std::vector<Row> rows{};                   // the frontier's
  std::vector<std::vector<Child>> found{1};  // its children
  std::vector<int64_t> parents{};            // of its rows, in the frontier before
  int64_t place = 0;                         // of it among those of all texts
  int64_t next_slot = 0, depth = 0;
  bool done = false;

  // Whether a node is too unlikely to be kept; so is then all that could grow from it.
  bool too_unlikely(int64_t node) const { return nodes[node].score < std::log(job.min_gain); }

  // The frontier's children become nodes, and the best top_k of them the next frontier, as far as they are kept.
  void add() {
    const int64_t old = nodes.size();
    std::vector<int64_t> order, above;  // above: rows of the frontier
    for (size_t r = 0; r < frontier.size(); r++)
      for (const Child& child : found[r]) {
        nodes.push_back({child.id, frontier[r], nodes[frontier[r]].score + std::min(child.score, 0.f)});
        above.push_back(r), order.push_back(order.size());
      }
    const int64_t count = std::min<int64_t>(job.top_k, order.size());
    const auto better = [&](int64_t a, int64_t b) { return nodes[old + a].score > nodes[old + b].score; };
    std::stable_sort(order.begin(), order.end(), better);
    order.resize(count);
    while (!order.empty() && too_unlikely(old + order.back())) order.pop_back();
    std::sort(order.begin(), order.end());
    done = ++depth >= text.max_depth || order.empty();
    if (done) return;
    std::vector<Row> next;
    frontier.clear(), parents.clear();
    for (int64_t i : order) {
      const Row& parent = rows[above[i]];
      next.push_back({&text, nodes[old + i].id, parent.position + 1, next_slot++, parent.known, parent.seen});
      next.back().seen.push_back(next.back().slot);
      frontier.push_back(old + i), parents.push_back(above[i]);
    }
    rows.swap(next), found.assign(order.size(), {});
  }

  // The best nodes in the total order of tree.py, none too unlikely, renumbered, parents first.
  void finish() {
    std::vector<int64_t> order(nodes.size() - 1), places(nodes.size(), 0);
    std::iota(order.begin(), order.end(), 1);
    const auto better = [&](int64_t a, int64_t b) { return nodes[a].score > nodes[b].score; };
    std::stable_sort(order.begin(), order.end(), better);
    order.resize(std::min<int64_t>(text.num_nodes, order.size()));
    while (!order.empty() && too_unlikely(order.back())) order.pop_back();
    std::sort(order.begin(), order.end());
    text.size = order.size() + 1, text.depth = depth;
    text.tree_ids[0] = text.ids[text.num_rows - 1], text.tree_parents[0] = -1, text.tree_scores[0] = 0;
    for (int64_t i = 1; i < text.size; i++) {
      const Node& node = nodes[order[i - 1]];
      CORAL_ASSERT(node.id >= 0 && node.id < job.num_embedded);
      places[order[i - 1]] = i;
      text.tree_ids[i] = node.id, text.tree_parents[i] = places[node.parent], text.tree_scores[i] = node.score;
    }
  }
};

// All trees while they grow. What threads share are the members; they change between two barriers.
struct Draft {
  const Job& job;
  std::vector<Growth> growths{};
  std::vector<Growth*> live{};  // that grow on

  // The level that is drafted now: rows of all texts, the last `count` of which are the frontiers.
  std::vector<Row> rows{};
  std::vector<float> features{};  // [n, h]
  int64_t count = 0;
  std::vector<std::pair<Growth*, int64_t>> nodes{};  // of the frontiers: whose, and which

  std::vector<float> embedded{}, x{}, normed{}, queries{}, attended{}, gate{}, up{}, drafted{}, logits{};
  int64_t stride = 0;  // of logits, as many as the largest head has
  // Of each thread, for each node of the frontiers: those of its part that may become children, and so on.
  std::vector<std::vector<std::vector<Child>>> rivals{};
  std::vector<std::vector<float>> most{}, mass{};

  // The first level reads what is unread; the last row of each text is the root.
  void start() {
    for (int64_t i = 0; i < job.num_tables; i++) stride = std::max(stride, job.tables[i].candidates);
    for (int64_t i = 0; i < job.num_texts; i++) {
      Text& text = job.texts[i];
      growths.push_back({job, text});
      for (int64_t r = 0; r < text.num_rows; r++) {
        const int64_t slot = text.length + r;
        (r + 1 < text.num_rows ? rows : growths.back().rows).push_back({&text, text.ids[r], slot, slot, slot + 1});
      }
      growths.back().next_slot = text.length + text.num_rows;
      read(text, 0, text.num_rows - 1);
    }
    for (Growth& growth : growths) {
      live.push_back(&growth);
      read(growth.text, growth.text.num_rows - 1, growth.text.num_rows);
    }
    gather();
  }

  void read(const Text& text, int64_t begin, int64_t end) {
    text.features.visit([&](const auto* given) {
      features.insert(features.end(), given + begin * job.hidden, given + end * job.hidden);
    });
  }

  // Put the frontiers of what grows behind the level's other rows.
  void gather() {
    nodes.clear();
    for (Growth* growth : live) {
      growth->place = nodes.size();
      for (size_t r = 0; r < growth->rows.size(); r++) nodes.push_back({growth, r});
      rows.insert(rows.end(), growth->rows.begin(), growth->rows.end());
    }
    count = nodes.size();
  }

  // The next level reads what the last one predicted.
  void descend() {
    const int64_t h = job.hidden;
    live.erase(std::remove_if(live.begin(), live.end(), [](Growth* growth) { return growth->done; }), live.end());
    rows.clear(), features.clear();
    for (Growth* growth : live)
      for (int64_t parent : growth->parents) {
        const float* row = &drafted[(growth->place + parent) * h];
        features.insert(features.end(), row, row + h);
      }
    gather();
  }

  void make_room() {
    const int64_t n = rows.size(), h = job.hidden, team = omp_get_num_threads();
    embedded.resize(n * h), x.resize(n * h), normed.resize(n * h), drafted.resize(n * h);
    queries.resize(n * job.heads * job.head_size), attended.resize(queries.size());
    gate.resize(n * job.inner), up.resize(gate.size()), logits.resize(count * stride);
    rivals.assign(team, std::vector<std::vector<Child>>(count));
    most.assign(team, std::vector<float>(count, kNever));
    mass.assign(team, std::vector<float>(count, 0));
  }

  void grow() {
#pragma omp parallel num_threads(job.threads)
    while (!live.empty()) {
#pragma omp single
      make_room();
      forward();
      score();
      for (size_t i = omp_get_thread_num(); i < live.size(); i += omp_get_num_threads()) live[i]->add();
      wait_for_all();
#pragma omp single
      descend();
    }
  }

  void forward() {
    const int64_t n = rows.size(), h = job.hidden, own = omp_get_thread_num(), team = omp_get_num_threads();
    for (int64_t r = own; r < n; r += team) {
      job.embedding.visit([&](const auto* table) {
        for (int64_t c = 0; c < h; c++) embedded[r * h + c] = float(table[rows[r].id * h + c]) * job.embedding_scale;
      });
    }
    wait_for_all();
    const Range columns = share(h, kLanes);
    set(x.data(), n, h, job.fc_bias, columns);
    product(embedded.data(), n, h, job.embedding_fc, columns, {x.data(), h, true});
    product(features.data(), n, h, job.feature_fc, columns, {x.data(), h, true});
    for (int64_t l = 0; l < job.num_layers; l++) {
      const Layer& layer = job.layers[l];
      // Of the last layer only the frontiers' rows are wanted; the others leave their keys and values.
      const int64_t from = l + 1 < job.num_layers ? 0 : n - count;
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

  // Queries of rows `from` on, and all rows' keys and values, which go to the caches; a head is one thread's.
  void project(int64_t l, const float* input, int64_t n, int64_t from) {
    const Layer& layer = job.layers[l];
    const int64_t h = job.hidden, d = job.head_size, heads = job.heads, kv_heads = job.kv_heads;
    std::vector<float> projected(n * d);
    const Range mine = share(heads + 2 * kv_heads, 1);
    for (int64_t i = mine.begin; i < mine.end; i++) {
      const bool query = i < heads, key = !query && i < heads + kv_heads;
      const int64_t head = query ? i : (i - heads) % kv_heads, first = query ? from : 0;
      product(input + first * h, n - first, h, query ? layer.q : key ? layer.k : layer.v, {head * d, head * d + d},
              {projected.data() - head * d, d, false});
      for (int64_t r = first; r < n; r++) {
        float* row = &projected[(r - first) * d];
        if (query || key) rotate(row, rows[r].position);
        if (query)
          std::copy_n(row, d, &queries[(r * heads + head) * d]);
        else
          rows[r].text->cache.visit([&](auto* cache) {
            const int64_t part = key ? 2 * l : 2 * l + 1;
            std::copy_n(row, d, cache + stored(*rows[r].text, part, head) + rows[r].slot * d);
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

  // Where the keys or values of a head begin in a text's cache.
  int64_t stored(const Text& text, int64_t part, int64_t kv_head) const {
    return (part * job.kv_heads + kv_head) * text.capacity * job.head_size;
  }

  void attend(int64_t l, int64_t n, int64_t from) {
    const Range mine = share((n - from) * job.heads, 1);
    for (int64_t task = mine.begin; task < mine.end; task++) {
      const int64_t r = from + task / job.heads, head = task % job.heads, kv_head = head / (job.heads / job.kv_heads);
      const Text& text = *rows[r].text;
      text.cache.visit([&](const auto* cache) {
        attend(cache + stored(text, 2 * l, kv_head), cache + stored(text, 2 * l + 1, kv_head), r, head);
      });
    }
  }

  template <typename T>
  void attend(const T* keys, const T* values, int64_t r, int64_t head) {
    const int64_t d = job.head_size, known = rows[r].known;
    const std::vector<int64_t>& seen = rows[r].seen;
    const int64_t all = known + seen.size(), padded = (all + kLanes - 1) / kLanes * kLanes;
    const auto offset = [&](int64_t i) { return (i < known ? i : seen[i - known]) * d; };
    const float *query = &queries[(r * job.heads + head) * d], scale = 1 / std::sqrt(float(d));
    std::vector<float> weights(padded, kNever);
    for (int64_t i = 0; i < all; i++) weights[i] = dot(query, keys + offset(i), d) * scale;
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
      for (int64_t i = 0; i < all; i++) out = at::vec::fmadd(Vec(weights[i]), load(values + offset(i) + c), out);
      (out * norm).store(&attended[(r * job.heads + head) * d + c]);
    }
  }

  const Head& head_of(int64_t node) const { return job.tables[nodes[node].first->text.head]; }

  // The children of each node of the frontiers: this thread's part of the heads, then what all threads found.
  void score() {
    for (int64_t begin = 0, end; begin < count; begin = end) {  // texts in a row that have one head
      const Head& head = head_of(begin);
      for (end = begin; end < count && &head_of(end) == &head;) end++;
      const Range mine = share(head.candidates, kLanes);
      float* sums = &logits[begin * stride];
      set(sums, end - begin, stride, head.bias, mine);
      product(&drafted[begin * job.hidden], end - begin, job.hidden, head.rows, mine, {sums, stride, true});
      for (int64_t r = begin; r < end && mine.begin < mine.end; r++) look(r, mine);
    }
    wait_for_all();
    for (int64_t r = omp_get_thread_num(); r < count; r += omp_get_num_threads())
      nodes[r].first->found[nodes[r].second] = children(r);
    wait_for_all();
  }

  // What this thread's part of the head holds for a node.
  void look(int64_t r, Range mine) {
    const int64_t own = omp_get_thread_num();
    const float *scores = &logits[r * stride], *begin = scores + mine.begin, *end = scores + mine.end;
    const float highest = at::vec::reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, begin,
                                                     end - begin);
    mass[own][r] = mass_of(begin, end - begin, highest);
    most[own][r] = highest;
    const Text& text = nodes[r].first->text;
    if (text.pool > 0) {
      rivals[own][r] = likeliest(scores, mine, highest, text.pool);
      return;
    }
    Best found = none(r);
    float bar = kNever;
    for (const float* score = begin; score < end; score++)
      if (*score > bar) {
        found.add(*score, score - scores);
        bar = found.bar();
      }
    rivals[own][r] = std::move(found.kept);
  }

  // The sum of exp(score - highest), in vectors: a loop that the compiler makes them of sums by where numbers lie.
  static float mass_of(const float* scores, int64_t size, float highest) {
    return at::vec::map_reduce_all<float>([highest](Vec v) { return (v - Vec(highest)).exp_u20(); },
                                          [](Vec a, Vec b) { return a + b; }, scores, size);
  }

  Best none(int64_t r) const { return {size_t(std::min(job.top_k, head_of(r).candidates)), {}}; }

  std::vector<Child> children(int64_t r) const {
    float highest = kNever, sum = 0;
    for (const auto& part : most) highest = std::max(highest, part[r]);
    for (size_t t = 0; t < mass.size(); t++) sum += mass[t][r] * std::exp(most[t][r] - highest);
    const float all = highest + std::log(sum);
    Best chosen = none(r);
    if (nodes[r].first->text.pool == 0) {
      for (const auto& part : rivals)
        for (const Child& child : part[r]) chosen.add(child.score - all, child.id);
    } else {
      couple(r, all, chosen);
    }
    const int64_t* ids = head_of(r).ids;
    for (Child& child : chosen.kept) child.id = ids ? ids[child.id] : child.id;
    return chosen.kept;
  }

  // Of the head's rows in a range, as many of the likeliest as may compete where noise is added, and a few more: sorted
  // by how far below the highest score they are, in eighths.
  static std::vector<Child> likeliest(const float* scores, Range range, float highest, int64_t pool) {
    std::array<int64_t, 512> counts{};
    const auto below = [&](float score) {
      const float eighths = 8 * (highest - score);
      return eighths < counts.size() - 1 ? size_t(eighths) : counts.size() - 1;
    };
    for (int64_t row = range.begin; row < range.end; row++) counts[below(scores[row])]++;
    size_t last = 0;
    for (int64_t count = counts[0]; count < pool && last + 1 < counts.size();) count += counts[++last];
    std::vector<Child> found;
    for (int64_t row = range.begin; row < range.end; row++)
      if (below(scores[row]) <= last) found.push_back({scores[row], row});
    return found;
  }

  // Ranked with the noise that the sampler will add; the scores are log-probabilities of being sampled.
  void couple(int64_t r, float all, Best& chosen) const {
    const auto& [growth, row_of] = nodes[r];
    const Text& text = growth->text;
    const int64_t* ids = head_of(r).ids;
    std::vector<Child> pool;
    for (const auto& part : rivals) pool.insert(pool.end(), part[r].begin(), part[r].end());
    if (pool.empty()) return;  // of scores that are no numbers
    const int64_t count = std::min<int64_t>(text.pool, pool.size());
    std::nth_element(pool.begin(), pool.begin() + count - 1, pool.end(), likelier);
    pool.resize(count);
    std::sort(pool.begin(), pool.end(), [](const Child& a, const Child& b) { return a.id < b.id; });
    const int64_t position = growth->rows[row_of].position + 2;  // the child's, which its parent's row predicts
    const auto noise = Noise{text.stream}.row(position);
    float highest = kNever;
    std::vector<float> noisy;
    for (const auto& [score, row] : pool) {
      noisy.push_back(((score - all) / text.temperature + noise(ids ? ids[row] : row)) * text.temperature);
      highest = std::max(highest, noisy.back());
    }
    const float sum = mass_of(noisy.data(), count, highest);
    for (int64_t i = 0; i < count; i++) chosen.add(noisy[i] - highest - std::log(sum), pool[i].id);
  }
};

}  // namespace

extern "C" void coral_grow(Job* job) {
  CORAL_ASSERT(job->threads > 0 && job->num_layers > 0 && job->kv_heads > 0 && job->heads % job->kv_heads == 0);
  CORAL_ASSERT(job->hidden % kLanes == 0 && job->head_size % kLanes == 0 && job->inner % kLanes == 0);
  for (int64_t i = 0; i < job->num_texts; i++) {
    const Text& text = job->texts[i];
    CORAL_ASSERT(text.head >= 0 && text.head < job->num_tables && job->tables[text.head].candidates > 0);
    CORAL_ASSERT(job->top_k > 0 && text.max_depth > 0 && text.num_nodes > 0);
    CORAL_ASSERT(text.num_rows > 0 && text.length >= 0);
    CORAL_ASSERT(text.length + text.num_rows + (text.max_depth - 1) * job->top_k <= text.capacity);
    for (int64_t r = 0; r < text.num_rows; r++) CORAL_ASSERT(text.ids[r] >= 0 && text.ids[r] < job->num_embedded);
  }
  Draft draft{*job};
  draft.start();
  draft.grow();
  for (Growth& growth : draft.growths) growth.finish();
}
