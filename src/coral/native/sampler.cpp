// The id that is written, out of many, on the CPU; sampler.py binds it and says what for.

#include "vectors.h"
#include "noise.h"

#include <vector>

namespace {

constexpr float kRough = 0.1f;  // above the error of the noise in float32
constexpr int64_t kPart = 32 * kLanes;

float highest_of(const Vec& vector) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return at::vec::maximum(a, b); }, vector);
}

// The index of the largest of `count` numbers, the first of equals.
template <typename T>
int64_t largest(const T* numbers, int64_t count) {
  float highest = kNever;
  int64_t part = 0;  // where it is
  for (int64_t begin = 0; begin < count; begin += kPart) {
    const int64_t end = std::min(begin + kPart, count);
    Vec most(highest);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) most = at::vec::maximum(most, load(numbers + i));
    float here = highest_of(most);
    for (; i < end; i++) here = std::max(here, float(numbers[i]));
    if (here > highest) highest = here, part = begin;
  }
  const T *first = numbers + part, *last = numbers + std::min(part + kPart, count);
  const T* found = std::find_if(first, last, [highest](T number) { return float(number) == highest; });
  return std::min(found - numbers, count - 1);  // of a row of NaN none is the largest
}

template <typename T>
void largest_of_rows(const T* numbers, int64_t rows, int64_t width, int64_t threads, int64_t* ids) {
#pragma omp parallel for num_threads(threads)
  for (int64_t r = 0; r < rows; r++) ids[r] = largest(numbers + r * width, width);
}

// An id that may win, with its score under noise in float32.
struct Rival {
  float rough;
  int64_t id;
};

// The best of a part of a row; rivals that are surely beaten are dropped now and then.
struct Rivals {
  float bar = kNever;  // at least so much is needed
  std::vector<Rival> kept;

  void add(float rough, int64_t id) {
    if (!(rough >= bar)) return;
    kept.push_back({rough, id});
    bar = std::max(bar, rough - 2 * kRough);
  }
};

void look(const float* scores, const Noise::Row& noise, int64_t begin, int64_t end, Rivals& rivals) {
  alignas(64) float rough[kLanes];
  for (int64_t first = begin; first < end; first += kLanes) {
    const int64_t count = std::min(kLanes, end - first);
    const Vec here = Vec::loadu(scores + first, count), distance = noise.distance(first);
    if (count == kLanes && !(highest_of(here + Noise::Row::bound(distance)) >= rivals.bar)) continue;
    (here + Noise::Row::rough(distance)).store(rough);
    for (int64_t i = 0; i < count; i++) rivals.add(rough[i], first + i);
  }
}

// The rivals' scores under the exact noise; the first of equals wins.
int64_t winner(const float* scores, const Noise::Row& noise, const std::vector<Rivals>& parts, int64_t begin,
               int64_t end) {
  float bar = kNever, highest = kNever;
  for (int64_t part = begin; part < end; part++) bar = std::max(bar, parts[part].bar);
  int64_t id = 0;
  for (int64_t part = begin; part < end; part++)
    for (const Rival& rival : parts[part].kept)
      if (rival.rough >= bar)
        if (const float score = scores[rival.id] + noise(rival.id); score > highest) highest = score, id = rival.id;
  return id;
}

}  // namespace

extern "C" void coral_largest(const void* numbers, bool narrow, int64_t rows, int64_t width, int64_t threads,
                              int64_t* ids) {
  if (narrow)
    largest_of_rows(static_cast<const BFloat16*>(numbers), rows, width, threads, ids);
  else
    largest_of_rows(static_cast<const float*>(numbers), rows, width, threads, ids);
}

// scores [rows, width]; positions, streams [rows].
extern "C" void coral_sample(const float* scores, const int64_t* positions, const uint64_t* streams, int64_t rows,
                             int64_t width, int64_t threads, int64_t* ids) {
  CORAL_ASSERT(rows > 0 && width > 0 && threads > 0);
  const int64_t each = (threads + rows - 1) / rows;  // parts of a row
  std::vector<Rivals> parts(rows * each);
#pragma omp parallel num_threads(threads)
  {
    const Range mine = share(rows * each, 1);
    for (int64_t part = mine.begin; part < mine.end; part++) {
      const int64_t r = part / each, size = (width + each - 1) / each, begin = part % each * size;
      look(scores + r * width, Noise{streams[r]}.row(positions[r]), begin, std::min(begin + size, width), parts[part]);
    }
  }
  for (int64_t r = 0; r < rows; r++)
    ids[r] = winner(scores + r * width, Noise{streams[r]}.row(positions[r]), parts, r * each, (r + 1) * each);
}
