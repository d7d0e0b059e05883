// FP8 tokens to the bfloat16 panels that the tensor cores read, by a warpgroup.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "params.h"
#include "sm90/attention/common.cuh"
#include "sm90/attention/tokens.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {

// --- Numbers --------------------------------------------------------------------------------

// Two e4m3 codes, the lower bytes of both halves, to bfloat16 times 2^-120: a code's sign and its
// seven other bits are those of a bfloat16 whose exponent is so much too small. Both go to their
// places by multiplication: the units for shifts and logic have enough to do.
__device__ __forceinline__ uint32_t PlaceCodes(uint32_t codes) {
  return codes * 0x10 + (codes & 0x00800080) * 0xF0;
}

__device__ __forceinline__ uint32_t Multiply(uint32_t pair, uint32_t factors) {
  const __nv_bfloat162 product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(pair),
                                         reinterpret_cast<const __nv_bfloat162&>(factors));
  return reinterpret_cast<const uint32_t&>(product);
}

// A factor of 2^120 times `scale`, twice, if `scale` is a power of two and there is such a
// bfloat16; or else 0.
__device__ __forceinline__ uint32_t FactorOf(float scale) {
  const uint32_t bits = __float_as_uint(scale);
  constexpr uint32_t kLeast = 1u << 23, kMost = (254u - 120) << 23;
  const bool fits = (bits & 0x7FFFFF) == 0 && bits - kLeast <= kMost - kLeast;
  return fits ? ((bits + (120u << 23)) >> 16) * 0x00010001u : 0;
}

// The scale that a number in ue8m0 stands for.
__device__ __forceinline__ float PowerOf(uint32_t exponent) {
  if (exponent == 255) return __uint_as_float(0x7FFFFFFF);
  return __uint_as_float(exponent == 0 ? 0x400000 : exponent << 23);
}

// Eight codes times a power of two, given by its factor, in bfloat16. Sets a bit of *other where
// that is wrong: for codes 127 and 255, which stand for NaN, and not for 480 and -480.
__device__ __forceinline__ uint4 Dequantize(uint32_t low, uint32_t high, uint32_t factor,
                                            uint32_t* other) {
  *other |= (((low & 0x7F7F7F7F) + 0x01010101) | ((high & 0x7F7F7F7F) + 0x01010101)) & 0x80808080;
  return {Multiply(PlaceCodes(__byte_perm(low, 0, 0x4140)), factor),
          Multiply(PlaceCodes(__byte_perm(low, 0, 0x4342)), factor),
          Multiply(PlaceCodes(__byte_perm(high, 0, 0x4140)), factor),
          Multiply(PlaceCodes(__byte_perm(high, 0, 0x4342)), factor)};
}

// Eight codes times any scale, rounded to bfloat16.
__device__ __forceinline__ uint4 DequantizeAny(uint32_t low, uint32_t high, float scale) {
  constexpr uint32_t kUnscaled = 0x7B807B80;  // 2^120
  uint32_t other = 0;
  const uint4 codes = Dequantize(low, high, kUnscaled, &other);
  uint32_t pairs[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = (i < 2 ? low : high) >> (i % 2 * 16);
    if ((two & 0x7F) == 0x7F) pairs[i] |= 0x00007FFF;
    if ((two & 0x7F00) == 0x7F00) pairs[i] |= 0x7FFF0000;
    const float first = __uint_as_float(pairs[i] << 16);
    const float second = __uint_as_float(pairs[i] & 0xFFFF0000);
    pairs[i] = Pack(__nv_bfloat16{}, first * scale, second * scale);
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// --- Tokens ---------------------------------------------------------------------------------

// Of a panel, a lane has 16 codes of two tokens, one after the other; of RoPE columns, 16 bytes at
// two places of both. Each is a step: the left half of the columns, the right one, and RoPE. kAhead
// steps are on their way to registers.
//
// `Source` (tokens.cuh) walks over blocks and knows where this warp's tokens are. `Target` is where
// the panels of a block are:
//
//   void Wait(Unit)               until it is free, to be called before
//   uint32_t Panel(int)           its address in shared memory
//   void Describe(uint32_t)       which of this warp's tokens exist, once the left half is free
//   void HandOver(Unit)
//   void Advance()                to the next block
//   kFences                       whether the last HandOver waits for all that this thread has begun
//                                 to load: then those loads come after it that can
template <TokenFormat kFormat, int kAhead, typename Source, typename Target>
__device__ __forceinline__ void ConvertTokens(Source& source, Walk<kFormat>& walk, Target& target) {
  using Lanes = sm90::Lanes<true>;
  constexpr bool kApart = kFormat == TokenFormat::kFp8Apart;
  constexpr int kTokens = Lanes::kTokens;
  constexpr int kCodePanels = kApart ? kPanelsV - 1 : kPanelsV;
  constexpr int kRopeOffset = kApart ? kFp8ApartCodes : kFp8RopeOffset;
  constexpr int kRopePanel = kCodePanels;
  constexpr int kHalfSteps = kHalfPanels * kTokens, kCodeSteps = kCodePanels * kTokens;
  constexpr int kSteps = kCodeSteps + 2 * kTokens;
  static_assert(kSteps - kAhead >= kHalfSteps, "scales have no other place");
  static_assert(kSteps - kCodeSteps <= kAhead);
  static_assert(kPanel == 16 * Lanes::kPerToken && kFp8ApartTile == kPanel);

  // Row r of a panel has its 16-byte chunk c at r * 128 + (c ^ r % 8) * 16. A lane's rows are equal
  // modulo 8, and it writes chunks 2 c and 2 c + 1.
  static_assert(Lanes::kStep == 8);
  const int row = threadIdx.x / 32 % 4 * kTokensEach + Lanes::Token(0);
  const uint32_t place = row * 128 + ((Lanes::Part() * 2 ^ row % 8) << 4);
  const uint32_t places[2] = {place, place ^ 16};

  TokenAddress<kFormat> address[kTokens];  // of the block that is loaded
  uint4 ring[kAhead];
  // The scales of half a block: of the one that is loaded and, as factors, of the one that is
  // converted.
  uint2 scales[kTokens];
  uint32_t factors[kTokens][kApart ? kHalfPanels : 2];

  const auto load_scales = [&](int half) {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if constexpr (kApart) {
        scales[i].x = __ldg(reinterpret_cast<const uint32_t*>(address[i].scales) + half);
      } else {
        scales[i] = __ldg(reinterpret_cast<const uint2*>(address[i].token + kHeadDimV) + half);
      }
    }
  };
  const auto scale_of = [](uint2 scales, int panel) {
    if constexpr (kApart) return PowerOf(scales.x >> (panel % kHalfPanels * 8) & 0xFF);
    return __uint_as_float(panel % kHalfPanels < 2 ? scales.x : scales.y);
  };
  // Pages of an odd number of such tokens begin at odd multiples of 8 bytes.
  const auto load16 = [](const uint8_t* from) {
    if constexpr (!kApart) return ptx::Load16(from);
    const uint2 low = ptx::Load8(from), high = ptx::Load8(from + 8);
    return uint4{low.x, low.y, high.x, high.y};
  };
  const auto load = [&](int step, uint4& v) {
    if (step >= kCodeSteps) {
      const int i = (step - kCodeSteps) / 2, chunk = Lanes::Part() * 2 + step % 2;
      v = load16(address[i].token + kRopeOffset + chunk * 16);
    } else {
      const int panel = step / kTokens;
      v = load16(address[step % kTokens].token + panel * kPanel + Lanes::Part() * 16);
    }
  };

  // Where there is a scale that is no power of two, or a NaN: half of the codes once more. Of what
  // is seldom as little code as will do.
  const auto convert_again = [&](int half) {
#pragma unroll 1
    for (int step = half * kHalfSteps; step < min((half + 1) * kHalfSteps, kCodeSteps); ++step) {
      const int panel = step / kTokens, i = step % kTokens;
      const TokenAddress<kFormat> from = walk.tokens[Lanes::Token(i)];
      const uint4 v = load16(from.token + panel * kPanel + Lanes::Part() * 16);
      float scale;
      if constexpr (kApart) {
        scale = PowerOf(__ldg(from.scales + panel));
      } else {
        scale = __ldg(reinterpret_cast<const float*>(from.token + kHeadDimV) + panel / 2);
      }
      const uint32_t to = target.Panel(panel) + i * Lanes::kStep * 128;
      ptx::StoreShared16(to + places[0], DequantizeAny(v.x, v.y, scale));
      ptx::StoreShared16(to + places[1], DequantizeAny(v.z, v.w, scale));
    }
  };
  bool more = source.Next(address);
  if (more) {
    load_scales(kLeftHalf);
#pragma unroll
    for (int step = 0; step < kAhead; ++step) load(step, ring[step]);
  }
  while (more) {
    const uint32_t present = source.present();
    __syncwarp();
    if (Lanes::Part() == 0) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) walk.tokens[Lanes::Token(i)] = address[i];
    }
    __syncwarp();
    uint32_t other = 0;  // what factors cannot express
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      if (step == 0) {
        target.Wait(kLeftHalf);
        target.Describe(present);
      }
      if (step == kHalfSteps) target.Wait(kRightHalf);
      if (!kApart && step == kCodeSteps) target.Wait(kRope);
      if (step == 0 || step == kHalfSteps) {
#pragma unroll
        for (int i = 0; i < kTokens; ++i) {
#pragma unroll
          for (int j = 0; j < (kApart ? kHalfPanels : 2); ++j) {
            factors[i][j] = FactorOf(scale_of(scales[i], kApart ? j : 2 * j));
            const bool used = !kApart || step == 0 || j < kHalfPanels - 1;
            if (used && factors[i][j] == 0) other = 1;
          }
        }
        if (step == 0) load_scales(kRightHalf);
      }
      const uint4 v = ring[step % kAhead];
      if (step >= kCodeSteps) {
        const int i = (step - kCodeSteps) / 2;
        const uint32_t panel = target.Panel(kRopePanel) + i * Lanes::kStep * 128;
        ptx::StoreShared16(panel + places[step % 2], v);
      } else {
        const int panel = step / kTokens, i = step % kTokens;
        const uint32_t factor = factors[i][kApart ? panel % kHalfPanels : panel % kHalfPanels / 2];
        const uint32_t to = target.Panel(panel) + i * Lanes::kStep * 128;
        ptx::StoreShared16(to + places[0], Dequantize(v.x, v.y, factor, &other));
        ptx::StoreShared16(to + places[1], Dequantize(v.z, v.w, factor, &other));
      }
      if (step + 1 == kHalfSteps || step + 1 == kCodeSteps) {
        const Unit half = step + 1 == kHalfSteps ? kLeftHalf : kRightHalf;
        if (__any_sync(~0u, other != 0)) convert_again(half);
        other = 0;
        if (!kApart || half == kLeftHalf) target.HandOver(half);
      }
      if (step + kAhead == kSteps) {
        more = source.Next(address);
        if (more) load_scales(kLeftHalf);
      }
      if (step + kAhead < kSteps) {
        load(step + kAhead, ring[step % kAhead]);
      } else if (more && !(Target::kFences && step >= kCodeSteps)) {
        load(step + kAhead - kSteps, ring[step % kAhead]);
      }
    }
    target.HandOver(kApart ? kRightHalf : kRope);
    target.Advance();
    if (Target::kFences && more) {
#pragma unroll
      for (int step = kCodeSteps; step < kSteps; ++step) {
        load(step + kAhead - kSteps, ring[step % kAhead]);
      }
    }
    if constexpr (kSteps % kAhead != 0) {  // the next block's first step is in the first place
      uint4 own[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) own[i] = ring[(i + kSteps) % kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) ring[i] = own[i];
    }
  }
}

}  // namespace flashmla::sm90
