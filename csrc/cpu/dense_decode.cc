// Dense decode on the CPU: attention of each query row over the cached tokens of its sequence.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/kernels.h"

namespace flashmla::cpu {
namespace {

float Load(DType type, const void* data, int64_t i) {
  if (type == DType::kF32) return static_cast<const float*>(data)[i];
  const uint32_t bits = static_cast<const uint16_t*>(data)[i];
  if (type == DType::kBF16) return std::bit_cast<float>(bits << 16);
  const uint32_t sign = (bits & 0x8000) << 16, exponent = (bits >> 10) & 31,
                 fraction = bits & 0x3ff;
  if (exponent == 0) {
    const float magnitude = std::ldexp(static_cast<float>(fraction), -24);
    return sign ? -magnitude : magnitude;
  }
  const uint32_t biased = exponent == 31 ? 255 : exponent + 112;
  return std::bit_cast<float>(sign | (biased << 23) | (fraction << 13));
}

uint16_t ToBf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if (x != x) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

uint16_t ToF16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint16_t sign = (bits >> 16) & 0x8000;
  if (x != x) return sign | 0x7e00;
  const float magnitude = std::fabs(x);
  if (magnitude >= 65520.0f) return sign | 0x7c00;
  if (magnitude < 0x1p-14f) {
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(magnitude + 0.5f) - 0x3f000000u);
  }
  const uint32_t rounded = (bits & 0x7fffffff) + 0xfff + ((bits >> 13) & 1);
  return sign | static_cast<uint16_t>((rounded - (112u << 23)) >> 13);
}

void Store(DType type, float x, void* data, int64_t i) {
  switch (type) {
    case DType::kF32:
      static_cast<float*>(data)[i] = x;
      break;
    case DType::kBF16:
      static_cast<uint16_t*>(data)[i] = ToBf16(x);
      break;
    case DType::kF16:
      static_cast<uint16_t*>(data)[i] = ToF16(x);
      break;
  }
}

float Round(DType type, float x) {
  uint16_t bits = 0;
  if (type == DType::kF32) return x;
  Store(type, x, &bits, 0);
  return Load(type, &bits, 0);
}

}  // namespace

void DenseDecode(const DenseDecodeParams& p, const ThreadPool&) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const int64_t group = p.group(), rows = p.rows();
  std::vector<float> q(rows * kHeadDim), acc(rows * kHeadDimV), max(rows), sum(rows), key(kHeadDim);
  for (int64_t b = 0; b < p.batch; ++b) {
    const int64_t length = EffectiveLength(p.cache_seqlens[b], p.max_pages_per_seq, p.s_q);
    for (int64_t head = 0; head < p.h_kv; ++head) {
      const auto q_row = [&](int64_t row) {
        return (b * p.s_q + row / group) * p.h_q + head * group + row % group;
      };
      for (int64_t row = 0; row < rows; ++row) {
        for (int d = 0; d < kHeadDim; ++d) {
          q[row * kHeadDim + d] = Load(p.dtype, p.q, q_row(row) * kHeadDim + d);
        }
      }
      std::fill(acc.begin(), acc.end(), 0.0f);
      std::fill(max.begin(), max.end(), -kInf);
      std::fill(sum.begin(), sum.end(), 0.0f);
      for (int64_t t = 0; t < length; ++t) {
        const int64_t slot = t / kPageSize;
        const int64_t page =
            slot < p.max_pages_per_seq ? p.block_table[b * p.max_pages_per_seq + slot] : -1;
        if (page < 0 || page >= p.num_pages) {
          std::fill(key.begin(), key.end(), std::numeric_limits<float>::quiet_NaN());
        } else {
          const int64_t base = ((page * kPageSize + t % kPageSize) * p.h_kv + head) * kHeadDim;
          for (int d = 0; d < kHeadDim; ++d) key[d] = Load(p.dtype, p.k_cache, base + d);
        }
        for (int64_t row = 0; row < rows; ++row) {
          if (p.causal && t >= length - p.s_q + row / group + 1) continue;
          float dot = 0;
          for (int d = 0; d < kHeadDim; ++d) dot += q[row * kHeadDim + d] * key[d];
          const float score = dot * p.softmax_scale;
          const float new_max = score > max[row] ? score : max[row];
          const float base = new_max == -kInf ? 0.0f : new_max;
          const float keep = std::exp(max[row] - base), prob = std::exp(score - base);
          const float rounded = Round(p.dtype, prob);
          max[row] = new_max;
          sum[row] = sum[row] * keep + prob;
          float* row_acc = &acc[row * kHeadDimV];
          for (int d = 0; d < kHeadDimV; ++d) row_acc[d] = row_acc[d] * keep + rounded * key[d];
        }
      }
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t visible = p.causal ? length - p.s_q + row / group + 1 : length;
        const int64_t h = head * group + row % group, s = row / group;
        for (int d = 0; d < kHeadDimV; ++d) {
          const float x = visible > 0 ? acc[row * kHeadDimV + d] / sum[row] : 0.0f;
          Store(p.dtype, x, p.out, q_row(row) * kHeadDimV + d);
        }
        p.lse[(b * p.h_q + h) * p.s_q + s] = visible > 0 ? max[row] + std::log(sum[row]) : -kInf;
      }
    }
  }
}

}  // namespace flashmla::cpu
