// FP8 tokens to the bfloat16 panels that the tensor cores read.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "params.h"
#include "sm90/attention/common.cuh"
#include "sm90/attention/tokens.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {

// The scale that a number in ue8m0 stands for.
__device__ __forceinline__ float PowerOf(uint32_t exponent) {
  if (exponent == 255) return __uint_as_float(0x7FFFFFFF);
  return __uint_as_float(exponent == 0 ? 0x400000 : exponent << 23);
}

// Eight codes times a scale in single precision, rounded to bfloat16. The hardware brings codes
// there by way of half precision: a bit more than three instructions for a number, most of them at
// half the rate of others, whatever the scale is, and NaN stays NaN.
__device__ __forceinline__ uint4 Dequantize(uint32_t low, uint32_t high, float scale) {
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t four = i < 2 ? low : high;
    const float2 two = ptx::FromE4m3(i % 2 == 0 ? four & 0xFFFF : four >> 16);
    pairs[i] = Pack(__nv_bfloat16{}, two.x * scale, two.y * scale);
  }
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// A warp's tokens of block after block, and of those a half of the columns. Four warps have all
// tokens (see Lanes). Of each token and panel a lane has 16 codes, one after the other: that is a
// step. RoPE columns are copied.
//
// Codes pass through registers, of which there are few: what kAhead steps need. When a step's fall
// free, those of the step that comes so much later are sent for, of the next block in the end (its
// first kBefore steps: see below); and when a block begins, the next one's tokens are sent to the
// L2 cache. Nothing may be in local memory: next to nothing is left of the L1 cache, and each
// access would be a trip to L2. So what is needed seldom is in shared memory (Walk), and what is
// quickly found out again is not kept (ptx::ThreadId, ptx::Opaque).
//
// What is on its way from one part of the loop to another is counted by the hardware as one: to
// wait for the first is to wait for all. So the last loads ahead are left to the next block's
// beginning, when that wait is over.
//
// `Source` (tokens.cuh) walks over blocks and knows where this warp's tokens are. `Target` is where
// the panels of a block are:
//
//   int Half()                        of the columns: 0 or 1
//   void Wait(Unit)                   until it is free, to be called before
//   uint32_t Panel(int)               address of a panel
//   void Describe(int, uint32_t)      of the left half, when it is free: which tokens exist, one of
//                                     the words of Lanes
//   void TrackCopies(Unit)            to be handed over when what this thread copies there has come
//   void HandOver(Unit)
//   void Advance()                    to the next block
//
// What is written so has to be made visible to the tensor cores by a fence, which waits for all
// that its thread has begun to load. There is always something here: others have to do it.
template <TokenFormat kFormat, int kAhead, int kBefore, typename Source, typename Target>
__device__ __forceinline__ void ConvertTokens(Source& source, Target& target) {
  using Lanes = typename Source::Lanes;
  constexpr bool kApart = kFormat == TokenFormat::kFp8Apart;
  constexpr int kTokens = Lanes::kTokens, kSteps = kHalfPanels * kTokens;
  static_assert(kBefore <= kAhead && kAhead <= kSteps);
  struct Block {
    TokenAddress<kFormat> address[kTokens];
    uint2 scales[kTokens];
    uint32_t present;
  };
  const auto find = [&](Block& block) {
    const int part = Lanes::Part(), half = target.Half();
    const bool any = source.Next(block.address, block.present, half, 2);
#pragma unroll
    for (TokenAddress<kFormat>& a : block.address) {
      a.token += half * kHalfPanels * kPanel + part * 16;  // the first codes for this lane
    }
    return any;
  };
  const auto load_scales = [&](Block& block) {
    const int part = Lanes::Part(), half = target.Half();
#pragma unroll
    for (int i = 0; i < kTokens; ++i) {
      const TokenAddress<kFormat>& a = block.address[i];
      if constexpr (kApart) {
        block.scales[i].x = ptx::Load4(a.scales + half * 4);
      } else {
        const int to = kHeadDimV - half * (kHalfPanels * kPanel - 8) - part * 16;
        block.scales[i] = ptx::Load8(a.token + to);
      }
    }
  };
  const auto load = [](const Block& block, int step) {
    const uint8_t* from = block.address[step % kTokens].token + step / kTokens * kPanel;
    if constexpr (!kApart) return ptx::Load16(from);
    const uint2 low = ptx::Load8(from), high = ptx::Load8(from + 8);
    return uint4{low.x, low.y, high.x, high.y};
  };

  uint4 first_codes[kBefore];
  Block block;
  if (!find(block)) return;
  load_scales(block);
#pragma unroll
  for (int step = 0; step < kBefore; ++step) first_codes[step] = load(block, step);
  for (bool more = true; more;) {
    Block next;
    more = find(next);
    const int row = Lanes::Token(0), part = Lanes::Part(), half = target.Half();
    const Unit unit = half == 0 ? kLeftHalf : kRightHalf;
    const auto place = [&](int token, int chunk) -> uint32_t {
      return (row + token * Lanes::kStep) * 128 + ((chunk ^ row % 8) << 4);
    };
    target.Wait(unit);
    if (half == 0) target.Describe(Lanes::Word(), block.present);
    uint4 codes[kSteps];
#pragma unroll
    for (int step = 0; step < kAhead; ++step) {
      codes[step] = step < kBefore ? first_codes[step] : load(block, step);
    }
    // The RoPE columns are for those who have the right half: the ninth panel or, where they are
    // part of the value, its last.
    const bool right = half == 1;
    const auto copy_rope = [&](Unit unit, int panel) {
#pragma unroll
      for (int i = 0; i < 2 * kTokens; ++i) {
        const int token = i % kTokens, chunk = i / kTokens * 4 + part;
        const int to = (kApart ? kFp8ApartCodes : kFp8RopeOffset) + i / kTokens * 64 -
                       half * kHalfPanels * kPanel;
        const uint32_t at = target.Panel(panel) + place(token, chunk);
        const uint8_t* from = block.address[token].token + to;
        if constexpr (kApart) {  // where nothing is aligned to more
          ptx::CpAsync8(at, from);
          ptx::CpAsync8(at + 8, from + 8);
        } else {
          ptx::CpAsync16(at, from, true);
        }
      }
      target.TrackCopies(unit);
    };
    if (kApart && right) copy_rope(kRightHalf, kPanelsV - 1);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int token = step % kTokens, tile = step / kTokens;
      const int panel = half * kHalfPanels + tile;
      const uint2 own = block.scales[token];
      float scale;
      if constexpr (kApart) {
        scale = PowerOf(own.x >> tile * 8 & 0xFF);
      } else {
        scale = __uint_as_float(tile < 2 ? own.x : own.y);
      }
      const uint4 v = codes[step];
      const uint4 low = Dequantize(v.x, v.y, scale), high = Dequantize(v.z, v.w, scale);
      if (tile < kHalfPanels - 1 || !kApart || !right) {
        ptx::StoreShared16(target.Panel(panel) + place(token, part * 2), low);
        ptx::StoreShared16(target.Panel(panel) + place(token, part * 2 + 1), high);
      }
      const int later = step + kAhead;
      if (later == kSteps) load_scales(next);
      if (later < kSteps) {
        codes[later] = load(block, later);
      } else if (later - kSteps < kBefore) {
        first_codes[later - kSteps] = load(next, later - kSteps);
      }
    }
    target.HandOver(unit);
    if (!kApart && right) {
      target.Wait(kRope);
      copy_rope(kRope, kPanelsV);
      target.HandOver(kRope);
    }
    target.Advance();
    block = next;
  }
}

}  // namespace flashmla::sm90
