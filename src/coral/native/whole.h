// Whole numbers, 16 bits of rows with 8 bits of weights: products of more numbers at a time than floating point has.

#include <cstring>
#include <vector>

namespace {

// Twice as many whole numbers as a vector has lanes; the products of neighbours make one sum.
typedef int16_t Whole __attribute__((vector_size(sizeof(Vec))));
typedef int32_t WholeSums __attribute__((vector_size(sizeof(Vec))));

inline Whole load(const int16_t* numbers) {
  Whole loaded;
  std::memcpy(&loaded, numbers, sizeof loaded);
  return loaded;
}

inline Whole load(const int8_t* numbers) {
#if defined(CPU_CAPABILITY_AVX512)
  return Whole(_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(numbers))));
#elif defined(CPU_CAPABILITY_AVX2)
  return Whole(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers))));
#else
  typedef int8_t Bytes __attribute__((vector_size(sizeof(Vec) / 2)));
  Bytes loaded;
  std::memcpy(&loaded, numbers, sizeof loaded);
  return __builtin_convertvector(loaded, Whole);
#endif
}

// For floating point, too, so that one loop is written for both.
inline Vec add_products(const Vec& a, const Vec& b, const Vec& sums) { return at::vec::fmadd(a, b, sums); }

inline WholeSums add_products(Whole a, Whole b, WholeSums sums) {
#if defined(CPU_CAPABILITY_AVX512)
#ifdef __AVX512VNNI__
  return WholeSums(_mm512_dpwssd_epi32(__m512i(sums), __m512i(a), __m512i(b)));
#else
  return sums + WholeSums(_mm512_madd_epi16(__m512i(a), __m512i(b)));
#endif
#elif defined(CPU_CAPABILITY_AVX2)
  return sums + WholeSums(_mm256_madd_epi16(__m256i(a), __m256i(b)));
#else
  const auto first = [](Whole pairs) { return WholeSums(pairs) << 16 >> 16; };
  const auto second = [](Whole pairs) { return WholeSums(pairs) >> 16; };
  return sums + first(a) * first(b) + second(a) * second(b);
#endif
}

inline const Vec& as_floats(const Vec& sums) { return sums; }

inline Vec as_floats(WholeSums sums) {
  typedef float Floats __attribute__((vector_size(sizeof(Vec))));
  const Floats floats = __builtin_convertvector(sums, Floats);
  return Vec::loadu(&floats);
}

inline void store_rounded(const Vec& numbers, int16_t* to) {
  typedef int16_t Shorts __attribute__((vector_size(sizeof(Vec) / 2)));
  WholeSums ints;
  at::vec::convert_to_int_of_same_size(numbers).store(&ints);
  const Shorts shorts = __builtin_convertvector(ints, Shorts);
  std::memcpy(to, &shorts, sizeof shorts);
}

// Rows [n, inputs] as whole numbers of 16 bits, so small that a sum over all inputs stays below 2^31, and each one's
// unit.
struct WholeRows {
  std::vector<int16_t> numbers;
  std::vector<float> units;

  WholeRows(const float* x, int64_t n, int64_t inputs) : numbers(n * inputs), units(n) {
    const float most = std::min<int64_t>(INT16_MAX, INT32_MAX / (INT8_MAX * inputs));
    for (int64_t r = 0; r < n; r++, x += inputs) {
      Vec highest(1e-30f);  // of a row of zeros, too
      for (int64_t c = 0; c < inputs; c += kLanes) highest = at::vec::maximum(highest, load(x + c).abs());
      const auto higher = [](const Vec& a, const Vec& b) { return at::vec::maximum(a, b); };
      units[r] = at::vec::vec_reduce_all<float>(higher, highest) / most;
      const Vec scale(1 / units[r]);
      for (int64_t c = 0; c < inputs; c += kLanes) store_rounded(load(x + c) * scale, &numbers[r * inputs + c]);
    }
  }
};

}  // namespace
