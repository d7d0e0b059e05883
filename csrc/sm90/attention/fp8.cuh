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

// A factor of 2^120 times `scale`, if `scale` is a power of two and there is such a bfloat16; or
// else 0.
__device__ __forceinline__ uint32_t FactorOf(float scale) {
  const uint32_t bits = __float_as_uint(scale);
  constexpr uint32_t kLeast = 1u << 23, kMost = (254u - 120) << 23;
  const bool fits = (bits & 0x7FFFFF) == 0 && bits - kLeast <= kMost - kLeast;
  return fits ? (bits + (120u << 23)) >> 16 : 0;
}

// The scale that a number in ue8m0 stands for.
__device__ __forceinline__ float PowerOf(uint32_t exponent) {
  if (exponent == 255) return __uint_as_float(0x7FFFFFFF);
  return __uint_as_float(exponent == 0 ? 0x400000 : exponent << 23);
}

// Not zero if one of four codes stands for NaN.
__device__ __forceinline__ uint32_t NanCodes(uint32_t codes) {
  return ((codes & 0x7F7F7F7F) + 0x01010101) & 0x80808080;
}

// Eight codes, none of them NaN, times a power of two, given by its factor, in bfloat16.
__device__ __forceinline__ uint4 Dequantize(uint32_t low, uint32_t high, uint32_t factor) {
  return {Multiply(PlaceCodes(__byte_perm(low, 0, 0x4140)), factor),
          Multiply(PlaceCodes(__byte_perm(low, 0, 0x4342)), factor),
          Multiply(PlaceCodes(__byte_perm(high, 0, 0x4140)), factor),
          Multiply(PlaceCodes(__byte_perm(high, 0, 0x4342)), factor)};
}

// Eight codes times any scale, rounded to bfloat16.
__device__ __forceinline__ uint4 DequantizeAny(uint32_t low, uint32_t high, float scale) {
  constexpr uint32_t kUnscaled = 0x7B807B80;  // 2^120
  const uint4 codes = Dequantize(low, high, kUnscaled);
  uint32_t pairs[4] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t two = (i < 2 ? low : high) >> (i % 2 * 16);  // 127 and 255 are no numbers
    if ((two & 0x7F) == 0x7F) pairs[i] |= 0x00007FFF;
    if ((two & 0x7F00) == 0x7F00) pairs[i] |= 0x7FFF0000;
    const float first = __uint_as_float(pairs[i] << 16);
    const float second = __uint_as_float(pairs[i] & 0xFFFF0000);
    pairs[i] = Pack(__nv_bfloat16{}, first * scale, second * scale);
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// --- Tokens ---------------------------------------------------------------------------------

// Of a panel, a lane has 16 codes of each of its tokens, one after the other; of RoPE columns, 16
// bytes at two places. Each is a step: the left half of the columns, the right one, and RoPE. Four
// or less are converted together: one vote tells whether all of their scales are powers of two and
// none of their codes is NaN.
//
// What is on its way to registers from one part of the loop to another is counted by the hardware
// as one: to wait for the first is to wait for all. So there is as little of that as can be. Where
// there are registers for all steps of a block (kWhole), it is waited for once, and those of the
// next one are loaded as they fall free. Or else they are for half of the codes, which are waited
// for, then the other half, then RoPE. And before the first wait, what is after the next block is
// found out.
//
// `Source` (tokens.cuh) walks over blocks and knows where this warp's tokens are. `Target` is where
// the panels of a block are:
//
//   void Wait(Unit)                   until it is free, to be called before
//   void Store(int, uint32_t, uint4)  into a panel, at an offset
//   void Describe(uint32_t)           which of this warp's tokens exist, when the left half is free
//   void HandOver(Unit)
//   void Advance()                    to the next block
//
// What is written so has to be made visible to the tensor cores by a fence, which waits for all
// that its thread has begun to load. There is always something here: others have to do it.
template <TokenFormat kFormat, bool kWhole, typename Source, typename Target>
__device__ __forceinline__ void ConvertTokens(Source& source, Walk<kFormat>& walk, Target& target) {
  using Lanes = typename Source::Lanes;
  constexpr bool kApart = kFormat == TokenFormat::kFp8Apart;
  constexpr int kTokens = Lanes::kTokens;
  constexpr int kCodePanels = kApart ? kPanelsV - 1 : kPanelsV;
  constexpr int kRopeOffset = kApart ? kFp8ApartCodes : kFp8RopeOffset;
  constexpr int kRopePanel = kCodePanels;
  constexpr int kHalfSteps = kHalfPanels * kTokens, kCodeSteps = kCodePanels * kTokens;
  constexpr int kSteps = kCodeSteps + 2 * kTokens;
  constexpr int kBatch = 4;
  const auto slot = [](int step) { return kWhole ? step : step % kHalfSteps; };
  static_assert(kHalfSteps % kBatch == 0 && (kWhole || 2 * kHalfSteps >= kCodeSteps));
  static_assert(kPanel == 16 * Lanes::kPerToken && kFp8ApartTile == kPanel);

  // Row r of a panel has its 16-byte chunk c at r * 128 + (c ^ r % 8) * 16. A lane's rows are equal
  // modulo 8, and it writes chunks 2 c and 2 c + 1.
  static_assert(Lanes::kStep == 8);
  const int row = Lanes::Token(0);
  const uint32_t place = row * 128 + ((Lanes::Part() * 2 ^ row % 8) << 4);
  const uint32_t places[2] = {place, place ^ 16};

  TokenAddress<kFormat> address[kTokens];  // of the block that is loaded
  uint4 steps[kWhole ? kSteps : kHalfSteps];
  // Its scales; and those of the block that is converted, as factors, two of them together.
  constexpr int kTiles = kApart ? kCodePanels : kHeadDimV / kFp8Tile;
  uint4 scales[kTokens];
  uint32_t factors[kTokens][(kTiles + 1) / 2];

  const auto load_scales = [&] {
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      if constexpr (kApart) {
        const uint2 eight = ptx::Load8(address[i].scales);
        scales[i].x = eight.x, scales[i].y = eight.y;
      } else {
        scales[i] = ptx::Load16(address[i].token + kHeadDimV);
      }
    }
  };
  const auto scale_of = [](const uint4& scales, int tile) {
    if constexpr (kApart) {
      return PowerOf((tile < 4 ? scales.x : scales.y) >> (tile % 4 * 8) & 0xFF);
    } else {
      return __uint_as_float(tile < 2 ? (tile == 0 ? scales.x : scales.y)
                                      : (tile == 2 ? scales.z : scales.w));
    }
  };
  // Pages of an odd number of such tokens begin at odd multiples of 8 bytes.
  const auto load16 = [](const uint8_t* from) {
    if constexpr (!kApart) return ptx::Load16(from);
    const uint2 low = ptx::Load8(from), high = ptx::Load8(from + 8);
    return uint4{low.x, low.y, high.x, high.y};
  };
  const auto token_of = [](int step) {
    return step < kCodeSteps ? step % kTokens : (step - kCodeSteps) / 2;
  };
  const auto load_from = [&](const uint8_t* token, int step) {
    const int offset = step < kCodeSteps
                           ? step / kTokens * kPanel + Lanes::Part() * 16
                           : kRopeOffset + (Lanes::Part() * 2 + (step - kCodeSteps) % 2) * 16;
    steps[slot(step)] = load16(token + offset);
  };
  const auto load = [&](int step) { load_from(address[token_of(step)].token, step); };

  // A batch with a scale that is no power of two, or with a NaN. Of what is seldom as little code
  // as will do: it reads once more.
  const auto convert_any = [&](int first, int end) {
#pragma unroll 1
    for (int step = first; step < end; ++step) {
      const int panel = step / kTokens, i = step % kTokens;
      const TokenAddress<kFormat> from = walk.tokens[Lanes::Token(i) % Lanes::kTokensEach];
      const uint4 v = load16(from.token + panel * kPanel + Lanes::Part() * 16);
      float scale;
      if constexpr (kApart) {
        scale = PowerOf(__ldg(from.scales + panel));
      } else {
        scale = __ldg(reinterpret_cast<const float*>(from.token + kHeadDimV) + panel / 2);
      }
      const uint32_t more = i * Lanes::kStep * 128;
      target.Store(panel, places[0] + more, DequantizeAny(v.x, v.y, scale));
      target.Store(panel, places[1] + more, DequantizeAny(v.z, v.w, scale));
    }
  };
  const auto load_steps = [&](int first, int end) {
#pragma unroll
    for (int step = first; step < end; ++step) load(step);
  };

  // Of the block that is converted, when `address` is already the next one's.
  const auto load_again = [&](int first, int end) {
#pragma unroll
    for (int step = first; step < end; ++step) {
      load_from(walk.tokens[Lanes::Token(token_of(step)) % Lanes::kTokensEach].token, step);
    }
  };

  // The block that is converted, or loaded, and the one after it, at `address`.
  const auto turn = [&] {
    __syncwarp();
    if (threadIdx.x % 32 == 0) walk.present = walk.next_present;
    if (Lanes::Part() == 0) {
#pragma unroll
      for (int i = 0; i < kTokens; ++i) {
        walk.tokens[Lanes::Token(i) % Lanes::kTokensEach] = address[i];
      }
    }
    __syncwarp();
    return source.Next(address);
  };
  bool more = source.Next(address), next = false;
  if (more) {
    load_scales();
    load_steps(0, kWhole ? kSteps : kHalfSteps);
    next = turn();
  }
  while (more) {
    uint32_t no_factor = 0;  // for some scale
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        const uint32_t factor = FactorOf(scale_of(scales[i], tile));
        no_factor |= factor == 0;
        factors[i][tile / 2] = tile % 2 == 0 ? factor : factors[i][tile / 2] | factor << 16;
      }
    }
#pragma unroll
    for (int first = 0; first < kCodeSteps; first += kBatch) {
      const int end = min(first + kBatch, kCodeSteps);
      if (first == 0) {
        target.Wait(kLeftHalf);
        target.Describe(walk.present);
      }
      if (first == kHalfSteps) target.Wait(kRightHalf);
      uint32_t other = no_factor;
#pragma unroll
      for (int step = first; step < end; ++step) {
        const uint4 v = steps[slot(step)];
        other |= NanCodes(v.x) | NanCodes(v.y) | NanCodes(v.z) | NanCodes(v.w);
      }
      if (!__any_sync(~0u, other != 0)) {
#pragma unroll
        for (int step = first; step < end; ++step) {
          const int panel = step / kTokens, i = step % kTokens;
          const uint4 v = steps[slot(step)];
          const int tile = kApart ? panel : panel / 2;
          const uint32_t factor =
              __byte_perm(factors[i][tile / 2], 0, tile % 2 == 0 ? 0x1010 : 0x3232);
          const uint32_t more = i * Lanes::kStep * 128;
          target.Store(panel, places[0] + more, Dequantize(v.x, v.y, factor));
          target.Store(panel, places[1] + more, Dequantize(v.z, v.w, factor));
        }
      } else {
        convert_any(first, end);
      }
      // These registers are free.
      if constexpr (kWhole) {
        if (next) {
          if (first == 0) load_scales();
          load_steps(first, end);
        }
      } else if (first < kHalfSteps) {
        load_again(first + kHalfSteps, min(end + kHalfSteps, kCodeSteps));
      } else if (first == kHalfSteps) {
        load_again(kCodeSteps, kSteps);
      }
      if (end == kHalfSteps) target.HandOver(kLeftHalf);
      if (end == kCodeSteps && !kApart) target.HandOver(kRightHalf);
    }
    if (!kApart) target.Wait(kRope);
#pragma unroll
    for (int step = kCodeSteps; step < kSteps; ++step) {
      const int i = (step - kCodeSteps) / 2, chunk = (step - kCodeSteps) % 2;
      target.Store(kRopePanel, places[chunk] + i * Lanes::kStep * 128, steps[slot(step)]);
    }
    if (next) {
      if (!kWhole) load_scales();
      if (kWhole) {
        load_steps(kCodeSteps, kSteps);
      } else {
        load_steps(0, kHalfSteps);
      }
    }
    target.HandOver(kApart ? kRightHalf : kRope);
    target.Advance();
    more = next;
    if (more) next = turn();
  }
}

}  // namespace flashmla::sm90
