// Merges the partial results of sequences that several partitions worked on:
//
//   out = sum_i w_i out_i,   w_i = 2^(lse_i - max lse) / sum_j 2^(lse_j - max lse)
//
// A thread block has four teams of 128 threads, a thread owning four of the 512 columns. Few parts:
// a team a row. Many parts: all four teams share a row, each with every fourth part, so that no
// thread walks more than a quarter of them; eight 16-byte loads are in flight per thread. The order
// of additions depends on the number of parts alone: the same inputs give the same bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/schedule.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kTeams = 4;
constexpr int kTeamThreads = kHeadDimV / 4;
constexpr int kInFlight = 8;
constexpr int kManyParts = 8;

__device__ uint2 Pack4(__nv_bfloat16, float4 v) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(v.x, v.y),
                       high = __floats2bfloat162_rn(v.z, v.w);
  return {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
}
__device__ uint2 Pack4(__half, float4 v) {
  const __half2 low = __floats2half2_rn(v.x, v.y), high = __floats2half2_rn(v.z, v.w);
  return {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
}

// Grid: (entries of split_info, row tiles, groups of rows_per_block rows).
template <typename T>
__global__ void __launch_bounds__(kTeams* kTeamThreads)
    CombineKernel(const __grid_constant__ DenseDecodeParams p, int partitions, int rows_per_block) {
  const SplitInfo info = reinterpret_cast<const SplitInfo*>(p.split_info)[blockIdx.x];
  const int parts = info.last - info.first + 1;
  if (info.batch < 0 || parts < 2) return;

  __shared__ float weights[kTeams][kMaxPartitions];
  __shared__ float4 sums[kTeams][kTeamThreads];

  const RowTile tile(p, blockIdx.y);
  const int team = threadIdx.x / kTeamThreads, member = threadIdx.x % kTeamThreads;
  const int teams_per_row = parts > kManyParts ? kTeams : 1;
  const int first_part = team % teams_per_row;
  const int row_of_team = team / teams_per_row;
  const int last_row = min((static_cast<int>(blockIdx.z) + 1) * rows_per_block, tile.count);

  // Where part i of a row lies: the first partition may have used either of its slots.
  const auto slot = [&](int i) {
    return PartialSlot(blockIdx.y, partitions, info.first + i, i == 0 ? info.first_slot : 0) *
           p.tile_rows();
  };

  for (int first_row = blockIdx.z * rows_per_block; first_row < last_row;
       first_row += kTeams / teams_per_row) {
    const int row = first_row + row_of_team;
    const bool exists = row < last_row;

    if (exists && first_part == 0 && member < 32) {
      constexpr int kPerLane = (kMaxPartitions + 31) / 32;
      float lse[kPerLane];
      float top = -INFINITY;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        const int i = member + 32 * k;
        lse[k] = i < parts ? p.partial_lse[slot(i) + row] : -INFINITY;
        top = fmaxf(top, lse[k]);
      }
      for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      if (top == -INFINITY) top = 0;
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        lse[k] = exp2f(lse[k] - top);
        sum += lse[k];
      }
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      const float inverse = sum == 0 ? 0.f : 1.f / sum;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        const int i = member + 32 * k;
        if (i < parts) weights[row_of_team][i] = lse[k] * inverse;
      }
      if (member == 0) {
        p.lse[(info.batch * p.h_q + tile.head(p, row)) * p.s_q + tile.token(p, row)] =
            (top + log2f(sum)) * static_cast<float>(M_LN2);
      }
    }
    __syncthreads();

    float4 total{0, 0, 0, 0};
    if (exists) {
      for (int base = first_part; base < parts; base += kInFlight * teams_per_row) {
        float4 v[kInFlight];
        float w[kInFlight];
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          const int i = base + u * teams_per_row;
          w[u] = i < parts ? weights[row_of_team][i] : 0.f;
          v[u] = float4{0, 0, 0, 0};
          // A part without weight may be unwritten: it is not read.
          if (w[u] != 0.f) {
            v[u] = __ldcg(
                reinterpret_cast<const float4*>(p.partial_out + (slot(i) + row) * kHeadDimV) +
                member);
          }
        }
#pragma unroll
        for (int u = 0; u < kInFlight; ++u) {
          total.x += w[u] * v[u].x;
          total.y += w[u] * v[u].y;
          total.z += w[u] * v[u].z;
          total.w += w[u] * v[u].w;
        }
      }
    }
    if (teams_per_row > 1) {
      sums[team][member] = total;
      __syncthreads();
      if (team == 0) {
#pragma unroll
        for (int other = 1; other < kTeams; ++other) {
          const float4 v = sums[other][member];
          total.x += v.x;
          total.y += v.y;
          total.z += v.z;
          total.w += v.w;
        }
      }
    }
    if (exists && first_part == 0) {
      T* out = static_cast<T*>(p.out) +
               ((info.batch * p.s_q + tile.token(p, row)) * p.h_q + tile.head(p, row)) * kHeadDimV;
      reinterpret_cast<uint2*>(out)[member] = Pack4(T{}, total);
    }
    __syncthreads();
  }
}

}  // namespace

void LaunchCombine(const DenseDecodeParams& params, int partitions, int multiprocessors,
                   cudaStream_t stream) {
  // Rows per block such that the grid is a few blocks per multiprocessor, however many sequences.
  const int entries = static_cast<int>(std::min<int64_t>(params.batch, partitions));
  const int row_tiles = static_cast<int>(params.row_tiles());
  const int rows = static_cast<int>(params.tile_rows());
  const int groups = std::clamp(4 * multiprocessors / (entries * row_tiles), 1, rows);
  const int rows_per_block = (rows + groups - 1) / groups;
  const dim3 grid(entries, row_tiles, (rows + rows_per_block - 1) / rows_per_block);
  if (params.dtype == DType::kBF16) {
    CombineKernel<__nv_bfloat16>
        <<<grid, kTeams * kTeamThreads, 0, stream>>>(params, partitions, rows_per_block);
  } else {
    CombineKernel<__half>
        <<<grid, kTeams * kTeamThreads, 0, stream>>>(params, partitions, rows_per_block);
  }
}

}  // namespace flashmla::sm90
