// Products with weights in the blocks of a GGUF file: whole numbers of 8 or 4 bits, a scale of each 32 inputs of an
// output and perhaps an offset. Nothing is rounded: bfloat16 holds every such number, and rows are bfloat16, too.
//
// A block's sum adds even inputs and odd ones apart, then both, as the matrix unit does, or, where there is none, pair
// after pair (few_rows.h); times the scale it is added to that of the blocks before, then the offset times the sum of
// the row's inputs. So vectors and tiles, and any number of rows, make the same sums on a machine.

#include <c10/util/Half.h>

namespace {

constexpr int64_t kBlockInputs = 32, kBlockPairs = kBlockInputs / 2, kBlocks = kBlock / kBlockInputs;
template <bool Pairs>
constexpr int64_t kBlockRows = Pairs ? 12 : kLanes == 16 ? 8 : 2;  // rows whose sums the registers hold

typedef at::vec::Vectorized<int32_t> Ints;

inline Vec load(const c10::Half* numbers) {
  Vec wide;
  at::vec::load_fp32_from_fp16(numbers, wide);
  return wide;
}

// While it lives, numbers below the smallest normal one count as zero, as they do in the matrix unit.
class Flushed {
#ifdef __SSE__
  const unsigned before = _mm_getcsr();

 public:
  Flushed() { _mm_setcsr(before | 0x8040); }
  ~Flushed() { _mm_setcsr(before); }
#endif
};

inline Vec widened(const int8_t* numbers) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(numbers))));
#elif defined(CPU_CAPABILITY_AVX2)
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(numbers))));
#else
  float wide[kLanes];
  std::copy_n(numbers, kLanes, wide);
  return Vec::loadu(wide);
#endif
}

// Q8_0: 32 inputs of the 16 outputs of a panel, input after input.
struct Bytes {
  static constexpr bool kOffsets = false;
  static constexpr int64_t kFew = 2;  // rows that vectors multiply faster than tiles
  struct Stored {  // of one output, in the file
    c10::Half scale;
    int8_t numbers[kBlockInputs];
  };

  c10::Half scales[kPanel];
  int8_t numbers[kBlockInputs][kPanel];

  // Numbers of inputs 2 * pair and 2 * pair + 1.
  std::array<Vec, 2> load_pair(int64_t pair, int64_t part) const {
    return {widened(numbers[2 * pair] + part * kLanes), widened(numbers[2 * pair + 1] + part * kLanes)};
  }

  void take(const Stored& stored, int64_t output) {
    scales[output] = stored.scale;
    for (int64_t k = 0; k < kBlockInputs; k++) numbers[k][output] = stored.numbers[k];
  }

#ifdef CORAL_TILES
  // Of both inputs of a pair and all outputs, as bfloat16.
  Vec load_both(int64_t pair) const {
    const auto [even, odd] = load_pair(pair, 0);
    const __m512i low = _mm512_srli_epi32(_mm512_castps_si512(even), 16), high = _mm512_castps_si512(odd);
    return _mm512_castsi512_ps(_mm512_mask_blend_epi16(0xAAAAAAAA, low, high));
  }

  // The numbers as a tile of bfloat16.
  void expand(BFloat16* tile) const {
#pragma GCC unroll 4
    for (int64_t pair = 0; pair < kBlockPairs; pair++)
      _mm512_store_ps(reinterpret_cast<float*>(tile + pair * kTileInputs), load_both(pair));
  }
#endif
};

// The bits of a whole number from -8 to 15 as bfloat16.
constexpr uint16_t narrow_bits(int number) {
  if (!number) return 0;
  const int size = number < 0 ? -number : number, exponent = size > 7 ? 3 : size > 3 ? 2 : size > 1;
  return (number < 0 ? 0x8000 : 0) | (127 + exponent) << 7 | (size << (7 - exponent) & 0x7F);
}

// Q4_1 and Q4_0: each word holds four numbers of an output, of every second input; those of 16 outputs and of even and
// odd inputs stand in turn, as in a tile. In Q4_0 8 stands for 0.
template <bool Offsets>
struct Nibbles {
  static constexpr bool kOffsets = Offsets;
  static constexpr int64_t kFew = 1;
  static constexpr int64_t kScales = Offsets ? 2 : 1, kZero = Offsets ? 0 : 8, kTogether = 4;
  struct Stored {
    c10::Half scales[kScales];
    uint8_t numbers[kBlockInputs / 2];  // the first half of the inputs in their lower bits
  };

  c10::Half scales[kPanel], offsets[Offsets ? kPanel : 0];
  uint16_t words[kBlockPairs / kTogether][kPanel][2];

#ifdef CPU_CAPABILITY_AVX512
  // Of all values, twice: the fifth bit of an index is another number's.
  alignas(64) static constexpr std::array<uint16_t, kTileInputs> kValues = [] {
    std::array<uint16_t, kTileInputs> values{};
    for (size_t i = 0; i < values.size(); i++) values[i] = narrow_bits(int(i % 16) - int(kZero));
    return values;
  }();

  // Of both inputs of a pair and all outputs, as bfloat16.
  __m512i numbers(int64_t pair) const {
    const __m512i all = _mm512_loadu_si512(words[pair / kTogether]);
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(all, 4 * (pair % kTogether)), _mm512_load_si512(&kValues));
  }

  Vec load_both(int64_t pair) const { return _mm512_castsi512_ps(numbers(pair)); }

  std::array<Vec, 2> load_pair(int64_t pair, int64_t) const {
    const __m512i both = numbers(pair), odd = _mm512_and_si512(both, _mm512_set1_epi32(0xFFFF0000));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(both, 16)), _mm512_castsi512_ps(odd)};
  }
#else
  std::array<Vec, 2> load_pair(int64_t pair, int64_t part) const {
    const Ints all = Ints::loadu(words[pair / kTogether][part * kLanes]);
    const auto number = [&](int64_t shift) {
      return at::vec::convert_to_fp_of_same_size<float>((all >> Ints(shift)) & Ints(15)) - Vec(kZero);
    };
    return {number(4 * (pair % kTogether)), number(16 + 4 * (pair % kTogether))};
  }
#endif

  void take(const Stored& stored, int64_t output) {
    scales[output] = stored.scales[0];
    if constexpr (Offsets) offsets[output] = stored.scales[1];
    for (int64_t k = 0; k < kBlockInputs; k++) {
      const int64_t half = kBlockInputs / 2, pair = k / 2;
      const uint16_t number = stored.numbers[k % half] >> (k < half ? 0 : 4) & 15;
      words[pair / kTogether][output][k % 2] |= number << 4 * (pair % kTogether);
    }
  }

#ifdef CORAL_TILES
  void expand(BFloat16* tile) const {
#pragma GCC unroll 16
    for (int64_t pair = 0; pair < kBlockPairs; pair++)
      _mm512_store_si512(tile + pair * kTileInputs, numbers(pair));
  }
#endif
};

// The sums of a row's inputs, block by block.
inline void sum_blocks(const float* row, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; k += kBlockInputs) {
    Vec sum(0);
    for (int64_t c = 0; c < kBlockInputs; c += kLanes) sum = sum + load(row + k + c);
    to[k / kBlockInputs] = total(sum);
  }
}

// Blocks on their way, as in few_rows.h.
template <typename Weights>
void fetch_block(const Weights* now, int64_t beside = 0) {
#pragma GCC unroll 16
  for (size_t byte = 0; byte < sizeof(Weights); byte += 64) {
    __builtin_prefetch(reinterpret_cast<const char*>(now + beside) + kFar + byte, 0, 2);
    __builtin_prefetch(reinterpret_cast<const char*>(now + 1) + byte);
  }
}

// As `multiply` in few_rows.h; totals [M, kBlocks]: see `sum_blocks`.
template <bool Pairs, typename Weights, int64_t M, int64_t P>
void multiply_blocks(const Weights* panels, int64_t apart, const float* rows, const float* totals, float* out,
                     int64_t stride, int64_t width, int64_t count, bool first) {
  constexpr int64_t parts = P * kParts;
  Vec sums[M][parts];
  int64_t real[parts];
#pragma GCC unroll 8
  for (int64_t p = 0; p < parts; p++) {
    real[p] = std::clamp<int64_t>(width - p * kLanes, 0, kLanes);
#pragma GCC unroll 16
    for (int64_t m = 0; m < M; m++)
      sums[m][p] = first ? Vec(0) : Vec::loadu(out + m * stride + p * kLanes, real[p]);
  }
  for (int64_t b = 0; b < count; b++, rows += (Pairs ? kBlockPairs : kBlockInputs) * abreast(M)) {
    for (int64_t p = 0; p < P; p++) fetch_block(panels + p * apart + b, (P - 1) * apart);
    Vec even[M][parts], odd[M][parts];
#pragma GCC unroll 16
    for (int64_t m = 0; m < M; m++)
#pragma GCC unroll 8
      for (int64_t p = 0; p < parts; p++) even[m][p] = odd[m][p] = Vec(0);
    for (int64_t pair = 0; pair < kBlockPairs; pair++)
#pragma GCC unroll 8
      for (int64_t p = 0; p < parts; p++) {
        const Weights& block = panels[p / kParts * apart + b];
        if constexpr (Pairs) {
          const Vec both = block.load_both(pair);
#pragma GCC unroll 16
          for (int64_t m = 0; m < M; m++)
            even[m][p] = add_product<true>(even[m][p], both, Vec(rows[pair * abreast(M) + m]));
        } else {
          const auto [first_of_two, second] = block.load_pair(pair, p % kParts);
#pragma GCC unroll 16
          for (int64_t m = 0; m < M; m++) {
            const float* pair_of_row = rows + 2 * pair * abreast(M) + m;
            even[m][p] = at::vec::fmadd(first_of_two, Vec(pair_of_row[0]), even[m][p]);
            odd[m][p] = at::vec::fmadd(second, Vec(pair_of_row[abreast(M)]), odd[m][p]);
          }
        }
      }
#pragma GCC unroll 8
    for (int64_t p = 0; p < parts; p++) {
      const Weights& block = panels[p / kParts * apart + b];
      const int64_t lane = p % kParts * kLanes;
#pragma GCC unroll 16
      for (int64_t m = 0; m < M; m++) {
        sums[m][p] = at::vec::fmadd(load(block.scales + lane), Pairs ? even[m][p] : even[m][p] + odd[m][p], sums[m][p]);
        if constexpr (Weights::kOffsets)
          sums[m][p] = at::vec::fmadd(load(block.offsets + lane), Vec(totals[m * kBlocks + b]), sums[m][p]);
      }
    }
  }
  for (int64_t p = 0; p < parts; p++)
#pragma GCC unroll 16
    for (int64_t m = 0; m < M; m++) sums[m][p].store(out + m * stride + p * kLanes, real[p]);
}

template <bool Pairs, typename Weights, int64_t M>
void multiply_block_rows(const float* rows, const float* totals, const Weights* panels, int64_t apart, int64_t count,
                         float* out, int64_t stride, int64_t width, int64_t blocks, bool first) {
  constexpr int64_t P = kLanes < 16 || M > 2 ? 1 : M > 1 ? 2 : 4;  // sums enough that none waits for itself
  alignas(64) float copy[abreast(M) * kBlock];
  stand_side_by_side<M>(rows, blocks * (Pairs ? kBlockPairs : kBlockInputs), copy);
  int64_t p = 0;
  const auto multiply = [&](auto panels_at_once) {
    constexpr int64_t together = decltype(panels_at_once)::value;
    for (; p + together <= count; p += together)
      multiply_blocks<Pairs, Weights, M, together>(panels + p * apart, apart, copy, totals, out + p * kPanel, stride,
                                            width - p * kPanel, blocks, first);
  };
  multiply(std::integral_constant<int64_t, P>());
  multiply(std::integral_constant<int64_t, 1>());
}

template <bool Pairs, typename Weights, int64_t... M>
constexpr auto each_block_count(std::integer_sequence<int64_t, M...>) {
  return std::array{multiply_block_rows<Pairs, Weights, M + 1>...};
}
template <bool Pairs, typename Weights>
constexpr auto kMultiplyBlocks =
    each_block_count<Pairs, Weights>(std::make_integer_sequence<int64_t, kBlockRows<Pairs>>{});

// As multiply_panels; `inner` and `inputs` are whole blocks.
template <bool Pairs, typename Weights, typename CopyRow>
void multiply_block_panels(const Weights* weights, Range mine, Range inner, int64_t n, int64_t inputs, int64_t width,
                           const CopyRow& copy_row, float* sums) {
  const Flushed flushed;
  const int64_t panels = (width + kPanel - 1) / kPanel;
  constexpr int64_t at_once = kBlockRows<Pairs>;
  alignas(64) float rows[at_once * kStride], totals[at_once * kBlocks];
  for (int64_t block = inner.begin / kBlock * kBlock; block < inner.end; block += kBlock) {
    const int64_t apart = std::min(kBlock, inputs - block) / kBlockInputs;
    const int64_t k = std::max(block, inner.begin), depth = std::min(block + kBlock, inner.end) - k;
    for (int64_t top = 0; top < n; top += at_once) {
      const int64_t count = std::min(at_once, n - top);
      for (int64_t i = 0; i < count; i++) {
        copy_row(top + i, k, depth, rows + i * kStride);
        sum_blocks(rows + i * kStride, depth, totals + i * kBlocks);
        if constexpr (Pairs) pair_up(rows + i * kStride, depth);
      }
      const Weights* begin = weights + panels * block / kBlockInputs + mine.begin * apart + (k - block) / kBlockInputs;
      kMultiplyBlocks<Pairs, Weights>[count - 1](rows, totals, begin, apart, mine.end - mine.begin,
                                          sums + top * width + mine.begin * kPanel, width, width - mine.begin * kPanel,
                                          depth / kBlockInputs, k == inner.begin);
    }
  }
}

// Calls f with the weights as what they are; `kind` as in packing.py.
template <typename F>
void with_blocks(int64_t kind, void* weights, const F& f) {
  if (kind == 2)
    f(static_cast<Bytes*>(weights));
  else if (kind == 3)
    f(static_cast<Nibbles<true>*>(weights));
  else
    f(static_cast<Nibbles<false>*>(weights));
}

#ifdef CORAL_TILES
constexpr int64_t kTiledRows = 64;  // rows for which numbers are expanded once

typedef BFloat16 Tiles[kBlocks][kTileWeights];    // a panel's numbers
typedef float Sums[kBlocks][kTileRows * kPanel];  // of each block, row after row

// gcc takes tiles by literals.
#define CORAL_SUM_TILE(SUMS, ROWS, NUMBERS)                              \
  _tile_zero(SUMS);                                                      \
  _tile_loadd(ROWS, rows + b * kBlockInputs, kBlock * sizeof(BFloat16)); \
  _tile_loadd(NUMBERS, tiles[b], 64);                                    \
  _tile_dpbf16ps(SUMS, ROWS, NUMBERS);                                   \
  _tile_stored(SUMS, sums[b], kPanel * sizeof(float))

// Sums of each block, of as many rows as the first shape has, or the second. Meanwhile the panel that comes next, if
// any, is expanded, since a tile is not loaded before its stores are through.
template <bool Second, typename Weights>
CORAL_USES_TILES void sum_tiles(const Tiles& tiles, const BFloat16* rows, int64_t count, Sums& sums,
                                const Weights* next, Tiles& next_tiles) {
  for (int64_t b = 0; b < count; b++) {
    if (next) {
      fetch_block(next + b);
      next[b].expand(next_tiles[b]);
    }
    if constexpr (Second) {
      if (b % 2) {
        CORAL_SUM_TILE(3, 5, 7);
      } else {
        CORAL_SUM_TILE(2, 5, 6);
      }
    } else if (b % 2) {
      CORAL_SUM_TILE(1, 4, 7);
    } else {
      CORAL_SUM_TILE(0, 4, 6);
    }
  }
}

// The sums of blocks, scaled, added to those of up to R rows in `out`, unless they are the first.
template <typename Weights, int64_t R>
void add_sums(const Weights* blocks, const Sums& block_sums, const float* totals, float* out, int64_t stride,
              __mmask16 real, int64_t rows, int64_t count, bool first) {
  __m512 sums[R];
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; r++)
    sums[r] = first || r >= rows ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(real, out + r * stride);
  for (int64_t b = 0; b < count; b++) {
    const __m512 scales = load(blocks[b].scales);
#pragma GCC unroll 16
    for (int64_t r = 0; r < R; r++)
      sums[r] = _mm512_fmadd_ps(scales, _mm512_load_ps(block_sums[b] + r * kPanel), sums[r]);
    if constexpr (Weights::kOffsets) {
      const __m512 offsets = load(blocks[b].offsets);
#pragma GCC unroll 16
      for (int64_t r = 0; r < R; r++)
        sums[r] = _mm512_fmadd_ps(offsets, _mm512_set1_ps(totals[r * kBlocks + b]), sums[r]);
    }
  }
#pragma GCC unroll 16
  for (int64_t r = 0; r < R; r++)
    if (r < rows) _mm512_mask_storeu_ps(out + r * stride, real, sums[r]);
}

template <typename Weights>
constexpr std::array kAddSums{add_sums<Weights, 1>, add_sums<Weights, 2>, add_sums<Weights, 4>, add_sums<Weights, 8>,
                              add_sums<Weights, 16>};

// As multiply_block_panels.
template <typename Weights, typename CopyRow>
CORAL_USES_TILES void multiply_block_panels_by_tiles(const Weights* weights, Range mine, Range inner, int64_t n,
                                                     int64_t inputs, int64_t width, const CopyRow& copy_row,
                                                     float* sums) {
  const Flushed flushed;
  const int64_t panels = (width + kPanel - 1) / kPanel;
  alignas(64) float row[kBlock];
  alignas(64) BFloat16 rows[kTiledRows * kBlock];
  float totals[(kTiledRows + kTileRows) * kBlocks] = {};
  alignas(64) Tiles tiles[2];
  alignas(64) Sums block_sums;
  std::memset(block_sums, 0, sizeof block_sums);
  for (int64_t block = inner.begin / kBlock * kBlock; block < inner.end; block += kBlock) {
    const int64_t apart = std::min(kBlock, inputs - block) / kBlockInputs;
    const int64_t k = std::max(block, inner.begin), depth = std::min(block + kBlock, inner.end) - k;
    const int64_t blocks = depth / kBlockInputs;
    for (int64_t top = 0; top < n; top += kTiledRows) {
      const int64_t count = std::min(kTiledRows, n - top), rest = count % kTileRows;
      for (int64_t i = 0; i < count; i++) {
        copy_row(top + i, k, depth, row);
        convert(row, depth, rows + i * kBlock);
        if constexpr (Weights::kOffsets) sum_blocks(row, depth, totals + i * kBlocks);
      }
      shape_tiles(count > rest ? kTileRows : 0, rest);
      const Weights* begin = weights + panels * block / kBlockInputs + (k - block) / kBlockInputs;
      for (int64_t p = mine.begin; p < mine.end; p++) {
        const Weights* now = begin + p * apart;
        Tiles &own = tiles[p % 2], &others = tiles[(p + 1) % 2];
        if (p == mine.begin)
          for (int64_t b = 0; b < blocks; b++) now[b].expand(own[b]);
        const __mmask16 real = (1u << std::min(kPanel, width - p * kPanel)) - 1;
        for (int64_t i = 0; i < count; i += kTileRows) {
          const int64_t some = std::min(kTileRows, count - i);
          const Weights* next = i == 0 && p + 1 < mine.end ? now + apart : nullptr;
          const auto multiply = some < kTileRows ? sum_tiles<true, Weights> : sum_tiles<false, Weights>;
          multiply(own, rows + i * kBlock, blocks, block_sums, next, others);
          const int64_t size = some > 8 ? 4 : some > 4 ? 3 : some > 2 ? 2 : some - 1;
          kAddSums<Weights>[size](now, block_sums, totals + i * kBlocks, sums + (top + i) * width + p * kPanel, width, real,
                                  some, blocks, k == inner.begin);
        }
      }
    }
  }
  _tile_release();
}
#endif

}  // namespace
