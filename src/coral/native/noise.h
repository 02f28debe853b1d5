// The sampler's noise; decoding/sampling.py says how it is made. Used after vectors.h.

namespace {

struct Noise {
  using Ints = at::vec::Vectorized<int32_t>;
  uint64_t stream;

  static uint32_t mix(uint32_t x) {
    x = (x ^ (x >> 16)) * 0x7FEB352Du;
    x = (x ^ (x >> 15)) * 0x846CA68Bu;
    return x ^ (x >> 16);
  }

  // Of all ids at one position.
  struct Row {
    uint32_t hash;
    static constexpr uint32_t kIds = 0x3C6EF372u;

    float operator()(int64_t id) const {
      const uint32_t bits = mix(mix(uint32_t(id) + kIds) ^ hash) >> 8;
      const double gumbel = -std::log(-std::log((bits + 0.5) * 0x1p-24));
      return float(std::nearbyint(gumbel * 65536) * 0x1p-16);
    }

    // How far the 24 bits of kLanes ids, as a share, are from 1: small where the noise is large, and then exact.
    Vec distance(int64_t first_id) const {
      const auto shift = [](const Ints& x, int by) { return (x >> Ints(by)) & Ints(int32_t(0xFFFFFFFFu >> by)); };
      const auto mixed = [&](Ints x) {
        x = (x ^ shift(x, 16)) * Ints(0x7FEB352D);
        x = (x ^ shift(x, 15)) * Ints(int32_t(0x846CA68Bu));
        return x ^ shift(x, 16);
      };
      const Ints ids = Ints::arange(int32_t(uint32_t(first_id) + kIds), 1);
      const Ints bits = shift(mixed(mixed(ids) ^ Ints(int32_t(hash))), 8);
      return (at::vec::convert<float>(Ints(0xFFFFFF) - bits) + Vec(0.5f)) * Vec(0x1p-24f);
    }

    // The noise at such distances in float32, and what it is never above: -log(-log(1 - x)) <= -log(x), of which
    // the exponent of x is enough.
    static Vec rough(const Vec& distance) {
      return at::vec::minimum(distance, Vec(1 - 0x1p-24f)).neg().log1p().neg().log().neg();
    }
    static Vec bound(const Vec& distance) {
      const Ints exponent = at::vec::cast<int32_t>(distance) >> Ints(23);
      return at::vec::convert<float>(Ints(127) - exponent) * Vec(0.6931472f);
    }
  };

  Row row(int64_t position) const {
    return {mix(mix(uint32_t(position) ^ uint32_t(stream)) ^ uint32_t(stream >> 32))};
  }
};

}  // namespace
