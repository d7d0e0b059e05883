// Merges the partial results of sequences that several partitions worked on:
//
//   out = sum_i w_i out_i,   w_i = 2^(lse_i - max lse) / sum_j 2^(lse_j - max lse)
//
// A warp works on a slice of 128 columns, and its loads, eight to a thread, are in flight together
// and beside those of the weights. Two parts: the eight are four rows'. More: one, two, four or
// eight warps share a row's slice. (One piece of code for these: what runs once is paid in
// instruction fetches.) The order of additions depends on the number of parts alone: the same
// inputs give the same bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>

#include "sm90/dense_decode/combine.cuh"
#include "sm90/dense_decode/schedule.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kWarps = 8;
constexpr int kBlocksPerMultiprocessor = 4;
constexpr int kSlice = 128;  // columns: four a lane
constexpr int kSlices = kHeadDimV / kSlice;
constexpr int kInFlight = 8;  // 16-byte loads of a thread

__device__ uint2 Pack4(__nv_bfloat16, float4 v) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(v.x, v.y),
                       high = __floats2bfloat162_rn(v.z, v.w);
  return {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
}
__device__ uint2 Pack4(__half, float4 v) {
  const __half2 low = __floats2half2_rn(v.x, v.y), high = __floats2half2_rn(v.z, v.w);
  return {reinterpret_cast<const uint32_t&>(low), reinterpret_cast<const uint32_t&>(high)};
}

__device__ __forceinline__ void Accumulate(float4& total, float weight, float4 v) {
  total.x += weight * v.x;
  total.y += weight * v.y;
  total.z += weight * v.z;
  total.w += weight * v.w;
}

// Where the parts of a sequence lie in one row tile, and where its result goes.
template <typename T>
struct Split {
  const DenseDecodeParams& p;
  const RowTile& tile;
  const int batch, parts, lane;
  const int start, stride, skip;  // rows of the workspace: see Row

  __device__ Split(const DenseDecodeParams& p, const RowTile& tile, const SplitInfo& info,
                   int partitions)
      : p(p),
        tile(tile),
        batch(info.batch),
        parts(info.last - info.first + 1),
        lane(threadIdx.x % 32),
        start(tile.partial_row(partitions, info.first, 0)),
        stride(tile.partial_row(partitions, info.first + 1, 0) - start),
        // The first partition may have used either of its slots.
        skip(tile.partial_row(partitions, info.first, info.first_slot) - start) {}

  __device__ int Row(int part, int row) const {
    return start + part * stride + (part == 0 ? skip : 0) + row;
  }
  __device__ float Lse(int part, int row) const { return p.partial_lse[Row(part, row)]; }
  __device__ float4 Load(int part, int row, int slice) const {
    const float* columns = p.partial_out + int64_t{Row(part, row)} * kHeadDimV + slice * kSlice;
    return __ldcg(reinterpret_cast<const float4*>(columns) + lane);
  }
  __device__ void Store(int row, int slice, float4 total) const {
    const int64_t query = (batch * p.s_q + tile.token(row)) * p.h_q + tile.head(row);
    T* columns = static_cast<T*>(p.out) + query * kHeadDimV + slice * kSlice;
    reinterpret_cast<uint2*>(columns)[lane] = Pack4(T{}, total);
  }
  // `lse` is in base 2.
  __device__ void StoreLse(int row, float lse) const {
    p.lse[(batch * p.h_q + tile.head(row)) * p.s_q + tile.token(row)] =
        lse * static_cast<float>(M_LN2);
  }
};

// The rows of two parts, four at a time by one warp.
template <typename T>
__device__ __forceinline__ void CombineTwo(const Split<T>& split) {
  constexpr int kRows = kInFlight / 2;
  const int warp = threadIdx.x / 32, slice = warp % kSlices, lane = split.lane;
  const int team = blockIdx.z * (kWarps / kSlices) + warp / kSlices;
  const int teams = gridDim.z * (kWarps / kSlices);
  for (int first_row = team * kRows; first_row < split.tile.count; first_row += teams * kRows) {
    float4 v[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int row = first_row + i / 2;
      v[i] = row < split.tile.count ? split.Load(i % 2, row, slice) : float4{0, 0, 0, 0};
    }
    // Lane i has the weight of load i.
    const int row = first_row + lane / 2;
    const bool exists = lane < kInFlight && row < split.tile.count;
    const float lse = exists ? split.Lse(lane % 2, row) : -INFINITY;
    float top = fmaxf(lse, __shfl_xor_sync(~0u, lse, 1));
    if (top == -INFINITY) top = 0;
    const float share = exp2f(lse - top);
    const float sum = share + __shfl_xor_sync(~0u, share, 1);
    const float weight = sum == 0 ? 0.f : share / sum;
    if (slice == 0 && lane % 2 == 0 && exists) split.StoreLse(row, top + log2f(sum));
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      float4 total{0, 0, 0, 0};
      Accumulate(total, __shfl_sync(~0u, weight, 2 * r), v[2 * r]);
      Accumulate(total, __shfl_sync(~0u, weight, 2 * r + 1), v[2 * r + 1]);
      if (first_row + r < split.tile.count) split.Store(first_row + r, slice, total);
    }
  }
}

struct Scratch {
  float weights[kMaxPartitions];
  float4 sums[kWarps][32];
};

// The rows of any number of parts. `team_size` warps, a power of two, share a row's slice, and have
// all loads in flight at once if there are no more than team_size * kInFlight parts.
template <typename T>
__device__ __forceinline__ void CombineMany(const Split<T>& split, int team_size,
                                            Scratch& scratch) {
  const int teams = kWarps / team_size;
  const int warp = threadIdx.x / 32 & (team_size - 1), team = threadIdx.x / 32 / team_size;
  const int parts = split.parts;
  float* weights = scratch.weights + team * team_size * kInFlight;
  float4(*sums)[32] = scratch.sums + team * team_size;
  const int units = split.tile.count * kSlices;
  for (int base = blockIdx.z * teams; base < units; base += gridDim.z * teams) {
    const bool exists = base + team < units;
    const int unit = min(base + team, units - 1), row = unit / kSlices, slice = unit % kSlices;
    const auto load = [&](float4(&v)[kInFlight], int first) {
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int part = first + i * team_size;
        v[i] = part < parts ? split.Load(part, row, slice) : float4{0, 0, 0, 0};
      }
    };
    float4 v[kInFlight];
    load(v, warp);
    if (warp == 0) {
      constexpr int kPerLane = (kMaxPartitions + 31) / 32;
      float lse[kPerLane];
      float top = -INFINITY;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        const int part = split.lane + 32 * k;
        lse[k] = part < parts ? split.Lse(part, row) : -INFINITY;
        top = fmaxf(top, lse[k]);
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      if (top == -INFINITY) top = 0;
      float sum = 0;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        lse[k] = exp2f(lse[k] - top);
        sum += lse[k];
      }
#pragma unroll
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      const float inverse = sum == 0 ? 0.f : 1.f / sum;
#pragma unroll
      for (int k = 0; k < kPerLane; ++k) {
        const int part = split.lane + 32 * k;
        if (part < parts) weights[part] = lse[k] * inverse;
      }
      if (exists && slice == 0 && split.lane == 0) split.StoreLse(row, top + log2f(sum));
    }
    __syncthreads();
    float4 total{0, 0, 0, 0};
    for (int first = warp; first < parts; first += kInFlight * team_size) {
      if (first != warp) load(v, first);
#pragma unroll
      for (int i = 0; i < kInFlight; ++i) {
        const int part = first + i * team_size;
        if (part < parts) Accumulate(total, weights[part], v[i]);
      }
    }
    sums[warp][split.lane] = total;
    __syncthreads();
    if (warp == 0) {
      for (int other = 1; other < team_size; ++other) {
        Accumulate(total, 1.f, sums[other][split.lane]);
      }
      if (exists) split.Store(row, slice, total);
    }
  }
}

// Grid: (row tiles, entries of split_info, any number of blocks to share the work of a tile).
template <typename T>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerMultiprocessor)
    CombineKernel(const __grid_constant__ DenseDecodeParams p, int partitions) {
  ptx::WaitForPreviousKernel();
  ptx::LetNextKernelStart();
  const SplitInfo info = reinterpret_cast<const SplitInfo*>(p.split_info)[blockIdx.y];
  if (info.batch < 0 || info.first == info.last) return;
  __shared__ Scratch scratch;

  const RowTile tile(p, blockIdx.x);
  const Split<T> split(p, tile, info, partitions);
  if (split.parts > 2) {
    int team_size = 1;
    while (team_size < kWarps && split.parts > team_size * kInFlight) team_size *= 2;
    CombineMany(split, team_size, scratch);
  } else {
    CombineTwo(split);
  }
}

}  // namespace

cudaError_t LaunchCombine(const DenseDecodeParams& params, int partitions, int multiprocessors,
                          cudaStream_t stream) {
  const int entries = static_cast<int>(std::min<int64_t>(params.batch, partitions));
  const int row_tiles = static_cast<int>(params.row_tiles());
  const int rows = static_cast<int>(params.tile_rows());
  const int sharing = std::clamp(kBlocksPerMultiprocessor * multiprocessors / (entries * row_tiles),
                                 1, rows * kSlices);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(row_tiles, entries, sharing);
  config.blockDim = dim3(kWarps * 32);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  const auto kernel =
      params.dtype == DType::kBF16 ? CombineKernel<__nv_bfloat16> : CombineKernel<__half>;
  return cudaLaunchKernelEx(&config, kernel, params, partitions);
}

}  // namespace flashmla::sm90
