// Weights on their way into the panels of few_rows.h and blocks.h; packing.py binds it, and says how they lie there.

#include <cstring>

namespace {

// Matrices [rows[i], inputs] of one dtype, one below another or, interleaved, a panel of each in turn.
struct Parts {
  int64_t count, inputs;
  const void* const* weights;
  const int64_t* rows;
  bool interleaved;
};

// The row of all parts together; null behind the last one.
template <typename Weight>
const Weight* row_of(const Parts& parts, int64_t row) {
  int64_t i = 0;
  if (parts.interleaved) {
    const int64_t panel = row / kPanel;
    i = panel % parts.count, row = panel / parts.count * kPanel + row % kPanel;
  } else {
    while (i < parts.count && row >= parts.rows[i]) row -= parts.rows[i++];
  }
  if (i == parts.count || row >= parts.rows[i]) return nullptr;
  return static_cast<const Weight*>(parts.weights[i]) + row * parts.inputs;
}

// Of a number that bfloat16 can hold.
BFloat16 narrowed(float weight) {
  uint32_t bits;
  std::memcpy(&bits, &weight, sizeof bits);
  return BFloat16(uint16_t(bits >> 16), BFloat16::from_bits());
}

template <typename Packed, typename Weight>
void pack(const Parts& parts, int64_t threads, Packed* to) {
  constexpr int64_t together = kTogether<Packed>;
  int64_t outputs = 0;
  for (int64_t i = 0; i < parts.count; i++) outputs += parts.rows[i];
  const int64_t panels = (outputs + kPanel - 1) / kPanel, blocks = (parts.inputs + kBlock - 1) / kBlock;
#pragma omp parallel for num_threads(threads) collapse(2)
  for (int64_t b = 0; b < blocks; b++)
    for (int64_t p = 0; p < panels; p++) {
      const int64_t start = b * kBlock, depth = std::min(kBlock, parts.inputs - start);
      Packed* panel = to + panels * kPanel * start + p * kPanel * depth;
      for (int64_t j = 0; j < kPanel; j++) {
        const Weight* row = row_of<Weight>(parts, p * kPanel + j);
        for (int64_t k = 0; k < depth; k += together) {
          std::array<Packed, together> both{};
          if constexpr (std::is_same_v<Packed, Weight>) {  // 32 bits at a time
            if (row) std::memcpy(&both, row + start + k, sizeof both);
          } else if (row) {
            for (int64_t i = 0; i < together; i++) both[i] = narrowed(row[start + k + i]);
          }
          std::memcpy(panel + k * kPanel + j * together, &both, sizeof both);
        }
      }
    }
}

// Blocks of a GGUF file's rows; `parts.inputs` are bytes.
template <typename Weights>
void pack_blocks(const Parts& parts, int64_t threads, Weights* to) {
  using Stored = typename Weights::Stored;
  int64_t outputs = 0;
  for (int64_t i = 0; i < parts.count; i++) outputs += parts.rows[i];
  const int64_t panels = (outputs + kPanel - 1) / kPanel, blocks = parts.inputs / sizeof(Stored);
#pragma omp parallel for num_threads(threads)
  for (int64_t p = 0; p < panels; p++)
    for (int64_t start = 0; start < blocks; start += kBlocks) {
      const int64_t depth = std::min(kBlocks, blocks - start);
      Weights* panel = to + panels * start + p * depth;
      std::memset(static_cast<void*>(panel), 0, depth * sizeof(Weights));
      for (int64_t j = 0; j < kPanel; j++)
        if (const char* row = row_of<char>(parts, p * kPanel + j))
          for (int64_t b = 0; b < depth; b++)
            panel[b].take(reinterpret_cast<const Stored*>(row)[start + b], j);
    }
}

// Whether bfloat16 can hold all of so many float32 numbers.
bool are_narrow(const uint32_t* numbers, int64_t count, int64_t threads) {
  uint32_t lost = 0;
#pragma omp parallel for num_threads(threads) reduction(| : lost)
  for (int64_t begin = 0; begin < count; begin += 4096) {
    uint32_t here = 0;
    for (int64_t i = begin, end = std::min(begin + 4096, count); i < end; i++) here |= numbers[i];
    lost |= here & 0xFFFF;
  }
  return !lost;
}

}  // namespace

extern "C" bool coral_are_narrow(const uint32_t* numbers, int64_t count, int64_t threads) {
  return are_narrow(numbers, count, threads);
}

// To `to`, in bfloat16 if `narrow`, weights that are bfloat16 if `from_narrow`, else float32. Inputs are an even number.
extern "C" void coral_pack(const Parts* parts, bool from_narrow, bool narrow, int64_t threads, void* to) {
  if (from_narrow)
    pack<BFloat16, BFloat16>(*parts, threads, static_cast<BFloat16*>(to));
  else if (narrow)
    pack<BFloat16, float>(*parts, threads, static_cast<BFloat16*>(to));
  else
    pack<float, float>(*parts, threads, static_cast<float*>(to));
}

// To `to`, blocks of this kind.
extern "C" void coral_pack_blocks(const Parts* parts, int64_t kind, int64_t threads, void* to) {
  with_blocks(kind, to, [&](auto* blocks) { pack_blocks(*parts, threads, blocks); });
}

// A number that equal contents share, and others do not unless by an accident of one in 2^64.
extern "C" uint64_t coral_digest(const uint64_t* words, int64_t count, int64_t threads) {
  constexpr int64_t kPiece = 1 << 14, kAbreast = 8;
  const auto mix = [](uint64_t state, uint64_t word) {
    state = (state ^ word) * 0x9E3779B97F4A7C15;
    return state ^ state >> 32;
  };
  const int64_t pieces = (count + kPiece - 1) / kPiece;
  std::vector<uint64_t> digests(pieces);
#pragma omp parallel for num_threads(threads)
  for (int64_t p = 0; p < pieces; p++) {
    uint64_t states[kAbreast];
    for (int64_t i = 0; i < kAbreast; i++) states[i] = i + 1;
    const int64_t end = std::min(count, (p + 1) * kPiece);
    for (int64_t w = p * kPiece; w < end; w += kAbreast)
      for (int64_t i = 0; i < std::min(kAbreast, end - w); i++) states[i] = mix(states[i], words[w + i]);
    for (int64_t i = 0; i < kAbreast; i++) digests[p] = mix(digests[p], states[i]);
  }
  uint64_t all = count;
  for (const uint64_t digest : digests) all = mix(all, digest);
  return all;
}
