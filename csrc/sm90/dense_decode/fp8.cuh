// FP8 tokens to bfloat16.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "params.h"

namespace flashmla::sm90 {

// Two e4m3 codes to bfloat16, times 2^-120: a code's sign and its seven other bits are those of a
// bfloat16 whose exponent is so much too small. `codes` has them in bits 8 to 15 and 24 to 31.
__device__ __forceinline__ uint32_t PlaceCodes(uint32_t codes) {
  return (codes & 0x80008000) | (codes >> 4 & 0x07F007F0);
}

__device__ __forceinline__ uint32_t Multiply(uint32_t pair, uint32_t factors) {
  const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(pair),
                                         reinterpret_cast<const __nv_bfloat162&>(factors));
  return reinterpret_cast<const uint32_t&>(product);
}

// A factor of 2^120 times `scale`, twice, if it is a power of two and there is such a bfloat16; or
// else 0.
__device__ __forceinline__ uint32_t FactorOf(float scale) {
  const uint32_t bits = __float_as_uint(scale);
  constexpr uint32_t kLeast = 1u << 23, kMost = (254u - 120) << 23;
  const bool fits = (bits & 0x7FFFFF) == 0 && bits >= kLeast && bits <= kMost;
  return fits ? ((bits + (120u << 23)) >> 16) * 0x00010001u : 0;
}

// Sixteen codes times their scale, rounded to bfloat16.
__device__ __forceinline__ void Dequantize(uint4 codes, float scale, uint4 (&numbers)[2]) {
  const uint32_t words[4] = {codes.x, codes.y, codes.z, codes.w};
  uint32_t pairs[8];
  const uint32_t factor = FactorOf(scale);
  constexpr uint32_t kUnscaled = 0x7B807B80;  // 2^120
  uint32_t nan = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    nan |= (words[i] & 0x7F7F7F7F) + 0x01010101;
    // Codes 0 and 1, and codes 2 and 3, in the upper byte of each half.
    pairs[2 * i] = PlaceCodes(__byte_perm(words[i], 0, 0x1404));
    pairs[2 * i + 1] = PlaceCodes(__byte_perm(words[i], 0, 0x3424));
  }
  if (factor != 0) {
#pragma unroll
    for (int i = 0; i < 8; ++i) pairs[i] = Multiply(pairs[i], factor);
  } else {
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t pair = Multiply(pairs[i], kUnscaled);
      const float low = __uint_as_float(pair << 16), high = __uint_as_float(pair & 0xFFFF0000);
      const __nv_bfloat162 scaled = __floats2bfloat162_rn(low * scale, high * scale);
      pairs[i] = reinterpret_cast<const uint32_t&>(scaled);
    }
  }
  if (nan & 0x80808080) {  // 127 and 255 stand for NaN, and not for 480 and -480
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t two = words[i / 2] >> (i % 2 * 16);
      if ((two & 0x7F) == 0x7F) pairs[i] |= 0x00007FFF;
      if ((two & 0x7F00) == 0x7F00) pairs[i] |= 0x7FFF0000;
    }
  }
  numbers[0] = {pairs[0], pairs[1], pairs[2], pairs[3]};
  numbers[1] = {pairs[4], pairs[5], pairs[6], pairs[7]};
}

}  // namespace flashmla::sm90
