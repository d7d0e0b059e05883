// What the shapes for many query rows share: who has which numbers of S[64 x 64] and of 256 columns
// of O[64 x 512], and what is done with them.
#pragma once

#include <cmath>
#include <cstdint>

#include "sm90/attention/common.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {

// A warpgroup has 64 rows, as its wgmma leaves them: a thread those of row() and row() + 8, and of
// each group of 8 columns the two from column() on. Where registers are scarce, what follows from a
// thread's number is found out anew each time (kAnew).
template <bool kAnew>
struct ManyRows {
  static constexpr int kWarpRows = 16;
  static constexpr int kLines = kWarpRows / 4;  // of a warp's rows, a lane has part of so many

  static __device__ uint32_t thread() { return kAnew ? ptx::ThreadId() : threadIdx.x; }
  static __device__ int lane() { return thread() % 32; }
  static __device__ int warp() { return thread() / 32 % 4; }
  static __device__ int row() { return warp() * kWarpRows + lane() / 4; }
  static __device__ int column() { return lane() % 4 * 2; }
  // Eight lanes read or write 128 bytes of a row together, and a warp four rows: the i-th.
  static __device__ int line(int i) { return warp() * kWarpRows + 4 * i + lane() / 8; }
  static __device__ int line_column() { return thread() % 8 * 8; }
  static __device__ uint32_t LineOffset(int r) { return r * 128 + ((thread() ^ r) % 8 << 4); }
  // Where a lane's part of a 16 x 16 piece of the warp's rows lies in a panel, for StMatrix4.
  static __device__ uint32_t PieceOffset(int step) {
    return (warp() * kWarpRows + lane() % 16) * 128 + ((step * 2 + lane() / 16 ^ lane() % 8) << 4);
  }

  // O times a factor for each row, which seldom is anything but 1.
  static __device__ __forceinline__ void Rescale(float (&o)[128], float2 alpha) {
    if (__any_sync(~0u, alpha.x != 1.f || alpha.y != 1.f)) {
#pragma unroll
      for (int j = 0; j < 128; ++j) o[j] *= j / 2 % 2 ? alpha.y : alpha.x;
    }
  }

  // The largest numbers of each row, without their signs.
  static __device__ __forceinline__ float2 Largest(const float (&o)[128]) {
    float largest[8] = {};  // several for a row: no long chain
#pragma unroll
    for (int j = 0; j < 128; ++j) largest[j % 8] = fmaxf(largest[j % 8], fabsf(o[j]));
    float rows[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float* own = largest + 2 * h;
      rows[h] = fmaxf(fmaxf(own[0], own[1]), fmaxf(own[4], own[5]));
      rows[h] = fmaxf(rows[h], __shfl_xor_sync(~0u, rows[h], 1));
      rows[h] = fmaxf(rows[h], __shfl_xor_sync(~0u, rows[h], 2));
    }
    return {rows[0], rows[1]};
  }

  // O times a factor for each row to memory, through panels in shared memory, where each warp takes
  // its own rows' place, so that they leave as whole lines: line i to row rows[i] of `target`, of
  // those before `count`, from this column on.
  template <typename Type>
  static __device__ __forceinline__ void Store(Type type, const float (&o)[128],
                                               const float (&factor)[2], uint32_t panels,
                                               uint16_t* target, const int (&rows)[kLines],
                                               int first_column, int count) {
#pragma unroll
    for (int panel = 0; panel < kHalfPanels; ++panel) {
      const uint32_t buffer = panels + panel * kPanelBytes;
#pragma unroll
      for (int step = 0; step < kPanel / 16; ++step) {
        const float* own = o + 32 * panel + 8 * step;
        ptx::StMatrix4(buffer + PieceOffset(step),
                       Pack(type, own[0] * factor[0], own[1] * factor[0]),
                       Pack(type, own[2] * factor[1], own[3] * factor[1]),
                       Pack(type, own[4] * factor[0], own[5] * factor[0]),
                       Pack(type, own[6] * factor[1], own[7] * factor[1]));
      }
      __syncwarp();
#pragma unroll
      for (int i = 0; i < kLines; ++i) {
        if (line(i) >= count) continue;
        *reinterpret_cast<uint4*>(target + int64_t{rows[i]} * kHeadDimV + first_column +
                                  line_column() + panel * kPanel) =
            ptx::LoadShared16(buffer + LineOffset(line(i)));
      }
    }
  }
};

}  // namespace flashmla::sm90
