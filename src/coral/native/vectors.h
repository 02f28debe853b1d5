// What the native sources share: vectors of float32, and how a team of threads divides its work.

#include <ATen/cpu/vec/functional.h>
#include <omp.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <limits>

// Python checks sizes and ids before it calls; a debug build, as the tests make one, checks that it did.
#ifdef CORAL_DEBUG
#include <cstdio>
#include <cstdlib>
#define CORAL_ASSERT(what) \
  if (!(what)) std::fprintf(stderr, "%s:%d: not so: %s\n", __func__, __LINE__, #what), std::abort()
#else
#define CORAL_ASSERT(what)
#endif

namespace {

using Vec = at::vec::Vectorized<float>;
using c10::BFloat16;

constexpr int64_t kLanes = Vec::size();
constexpr float kNever = -std::numeric_limits<float>::infinity();  // the score of what is not

inline Vec load(const float* numbers) { return Vec::loadu(numbers); }

inline Vec load(const BFloat16* numbers) {
  Vec wide;
  at::vec::load_fp32_from_bf16(numbers, wide);
  return wide;
}

inline void store(const Vec& numbers, float* to, int64_t count = kLanes) { numbers.store(to, count); }

inline void store(const Vec& numbers, BFloat16* to, int64_t count = kLanes) {
  at::vec::convert<BFloat16>(numbers).store(to, count);
}

inline float total(const Vec& vector) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, vector);
}

// The sum of each vector's lanes, in order: neighbours are added until one vector holds them all. Inlined, or loops
// that make the sums would keep them in memory.
template <size_t N>
C10_ALWAYS_INLINE Vec totals(const std::array<Vec, N>& vectors) {
  if constexpr (N == 1) {
    return vectors[0];
  } else {
    std::array<Vec, N / 2> halves;
#pragma GCC unroll 8
    for (size_t i = 0; i < N / 2; i++) {
      const auto [even, odd] = at::vec::deinterleave2(vectors[2 * i], vectors[2 * i + 1]);
      halves[i] = even + odd;
    }
    return totals(halves);
  }
}

// Sizes are multiples of kLanes, here as in `scale_of`.
template <typename A, typename B>
float dot(const A* a, const B* b, int64_t size) {
  Vec sum(0);
  for (int64_t c = 0; c < size; c += kLanes) sum = at::vec::fmadd(load(a + c), load(b + c), sum);
  return total(sum);
}

// 1 / rms(x)
inline float scale_of(const float* x, int64_t size, float eps) { return 1 / std::sqrt(dot(x, x, size) / size + eps); }

struct Range {
  int64_t begin, end;
};

// The part of `count` things, in whole multiples of `unit`, that belongs to this thread.
inline Range share(int64_t count, int64_t unit) {
  const int64_t units = (count + unit - 1) / unit, team = omp_get_num_threads(), own = omp_get_thread_num();
  return {std::min(count, units * own / team * unit), std::min(count, units * (own + 1) / team * unit)};
}

inline void wait_for_all() {
#pragma omp barrier
}

}  // namespace
