// What the shapes for few query rows share: who has which numbers of S^T[64 x kRows] and
// O^T[512 x kRows], and what is done with them.
#pragma once

#include <cmath>

#include "sm90/attention/common.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {

// Four warps have 64 rows of S^T, or of a panel of O^T: tokens or latent columns. A thread has the
// rows row() and row() + 8, and of each the columns column(c), which are query rows.
template <int kRows>
struct FewRows {
  static constexpr int kColumns = kRows / 4;

  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ int warp() { return threadIdx.x / 32 % 4; }
  static __device__ int row() { return warp() * 16 + lane() / 4; }
  static __device__ int column(int c) { return column(c, lane()); }
  static __device__ int column(int c, int lane) { return c / 2 * 8 + lane % 4 * 2 + c % 2; }
  // Of a column, the accumulator's element in the thread's first or second row.
  static constexpr __device__ int element(int c, int second) {
    return c / 2 * 4 + second * 2 + c % 2;
  }

  // Over a warp's tokens, the largest x of each column: this lane has that of own_column(). In
  // every step, of two lanes that hold the same columns each takes half of them, if there are
  // several.
  static __device__ __forceinline__ float Highest(const float (&x)[kRows / 2]) {
    float highest[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) highest[c] = fmaxf(x[element(c, 0)], x[element(c, 1)]);
    int count = kColumns;
#pragma unroll
    for (int step = 16; step >= 4; step /= 2) {
      if (count == 1) {
        highest[0] = fmaxf(highest[0], __shfl_xor_sync(~0u, highest[0], step));
        continue;
      }
      const bool upper = lane() & step;
      count /= 2;
#pragma unroll
      for (int c = 0; c < kColumns / 2; ++c) {
        if (c >= count) break;
        const float low = highest[c], high = highest[c + count];
        const float other = __shfl_xor_sync(~0u, upper ? low : high, step);
        highest[c] = fmaxf(upper ? high : low, other);
      }
    }
    return highest[0];
  }
  static __device__ int own_column() { return column(lane() / (32 / kColumns)); }
  // Of the lanes that have the same one, a single one.
  static __device__ bool is_first_of_column() { return lane() % (32 / kColumns) < 4; }

  // Weights to `p` in shared memory, as wgmma reads its second operand: a row of 64 tokens for each
  // query row.
  template <typename T>
  static __device__ __forceinline__ void StoreWeights(uint32_t p, const float (&x)[kRows / 2]) {
#pragma unroll
    for (int i = 0; i < kRows / 8; i += 2) {
      const float* e = x + 4 * i;
      const int r = 8 * i + lane() / 16 * 8 + lane() % 8;
      const int chunk = warp() * 2 + lane() / 8 % 2;
      ptx::StMatrix4Transposed(p + r * 128 + ((chunk ^ r % 8) << 4), Pack(T{}, e[0], e[1]),
                               Pack(T{}, e[2], e[3]), Pack(T{}, e[4], e[5]), Pack(T{}, e[6], e[7]));
    }
  }

  // Multiplies O with what a block's P came with, which seldom is anything but 1.
  static __device__ __forceinline__ void Rescale(float (&o)[kPanelsV][kRows / 2],
                                                 const float* alphas) {
    float alpha[kColumns];
    bool rescale = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      alpha[c] = alphas[column(c)];
      rescale |= alpha[c] != 1.f;
    }
    if (!__any_sync(~0u, rescale)) return;
#pragma unroll
    for (int j = 0; j < kPanelsV; ++j) {
#pragma unroll
      for (int i = 0; i < kRows / 2; ++i) o[j][i] *= alpha[i / 4 * 2 + i % 2];
    }
  }

  // O, times a factor for each column, to the partial result that begins with that row.
  static __device__ __forceinline__ void WritePartial(const DenseDecodeParams& p, int partial_row,
                                                      int count,
                                                      const float (&o)[kPanelsV][kRows / 2],
                                                      const float (&factor)[kColumns]) {
    float* out = static_cast<float*>(p.partial_out) + int64_t{partial_row} * kHeadDimV + row();
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      if (column(c) >= count) continue;
      float* mine = out + column(c) * kHeadDimV;
#pragma unroll
      for (int j = 0; j < kPanelsV; ++j) {
        mine[kPanel * j] = o[j][element(c, 0)] * factor[c];
        mine[kPanel * j + 8] = o[j][element(c, 1)] * factor[c];
      }
    }
  }
};

}  // namespace flashmla::sm90
