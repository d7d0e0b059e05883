// Merges the partial results of sequences that several partitions worked on, or of their chunks:
//
//   out = sum_i w_i out_i,   w_i = 2^(lse_i - max lse) / sum_j 2^(lse_j - max lse)
//
// A warp works on a slice of 128 columns, and its loads, eight to a thread, are in flight together
// and beside those of the weights. Few parts: the eight are several rows' parts. Many parts: the
// warps of a block share one row's slice. The order of additions depends on the number of parts
// alone: the same inputs give the same bits.
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
constexpr int kLines = kSlice * 4 / 128;  // of the cache
constexpr int kInFlight = 8;              // 16-byte loads of a thread
constexpr int kFewParts = kInFlight;

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

// Where the parts of a sequence lie in one row tile, and where its result goes. With kChunks, the
// parts are chunks (batch-invariant decoding).
template <typename T, bool kChunks>
struct Split {
  const DenseDecodeParams& p;
  const RowTile tile;
  const SplitInfo info;
  const int partitions, max_chunks;
  const int slice, lane;

  __device__ int parts() const { return info.last - info.first + 1; }
  __device__ int Row(int part, int row) const {
    if constexpr (kChunks) return tile.chunk_row(p, max_chunks, info.batch, part) + row;
    // The first partition may have used either of its slots.
    const int slot = part == 0 ? info.first_slot : 0;
    return tile.partial_row(partitions, info.first + part, slot == 0) + row;
  }
  __device__ float Lse(int part, int row) const { return p.partial_lse[Row(part, row)]; }
  __device__ float4 Load(int part, int row) const {
    const float* columns = p.partial_out + int64_t{Row(part, row)} * kHeadDimV + slice * kSlice;
    return __ldcg(reinterpret_cast<const float4*>(columns) + lane);
  }
  // A line of what the slice has there.
  __device__ void Discard(int part, int row, int line) const {
    const float* columns = p.partial_out + int64_t{Row(part, row)} * kHeadDimV + slice * kSlice;
    ptx::DiscardL2(columns + line * (kSlice / kLines));
  }
  __device__ void Store(int row, float4 total) const {
    const int64_t query = (info.batch * p.s_q + tile.token(row)) * p.h_q + tile.head(row);
    T* columns = static_cast<T*>(p.out) + query * kHeadDimV + slice * kSlice;
    reinterpret_cast<uint2*>(columns)[lane] = Pack4(T{}, total);
  }
  // `lse` is in base 2.
  __device__ void StoreLse(int row, float lse) const {
    p.lse[(info.batch * p.h_q + tile.head(row)) * p.s_q + tile.token(row)] =
        lse * static_cast<float>(M_LN2);
  }
};

// kRows rows of at most kParts parts each, by one warp.
template <int kParts, typename T, bool kChunks>
__device__ __forceinline__ void CombineFew(const Split<T, kChunks>& split, int first_row) {
  constexpr int kRows = kInFlight / kParts;
  const auto exists = [&](int i) {
    return i < kInFlight && i % kParts < split.parts() && first_row + i / kParts < split.tile.count;
  };
  float4 v[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    v[i] = exists(i) ? split.Load(i % kParts, first_row + i / kParts) : float4{0, 0, 0, 0};
  }
  // Lane i has the weight of load i.
  const int row = first_row + split.lane / kParts;
  const float lse = exists(split.lane) ? split.Lse(split.lane % kParts, row) : -INFINITY;
  float top = lse;
#pragma unroll
  for (int step = kParts / 2; step > 0; step /= 2) {
    top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
  }
  if (top == -INFINITY) top = 0;
  const float share = exp2f(lse - top);
  float sum = share;
#pragma unroll
  for (int step = kParts / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
  const float weight = sum == 0 ? 0.f : share / sum;
  if (split.slice == 0 && split.lane % kParts == 0 && exists(split.lane)) {
    split.StoreLse(row, top + log2f(sum));
  }
  // What all lanes have loaded need not be written back to memory. (Where parts are many there are
  // few sequences, and nothing displaces the parts from the cache.)
  __syncwarp();
  static_assert(kInFlight * kLines == 32);
  const int load = split.lane / kLines;
  if (exists(load)) {
    split.Discard(load % kParts, first_row + load / kParts, split.lane % kLines);
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float4 total{0, 0, 0, 0};
#pragma unroll
    for (int i = r * kParts; i < (r + 1) * kParts; ++i) {
      Accumulate(total, __shfl_sync(~0u, weight, i), v[i]);
    }
    if (first_row + r < split.tile.count) split.Store(first_row + r, total);
  }
}

static_assert(kMaxChunks <= kMaxPartitions);
struct Scratch {
  float weights[kMaxPartitions];
  float4 sums[kWarps][32];
};

// One row of any number of parts, by all warps of the block.
template <typename T, bool kChunks>
__device__ __forceinline__ void CombineMany(const Split<T, kChunks>& split, int row,
                                            Scratch& scratch) {
  const int warp = threadIdx.x / 32;
  const int parts = split.parts();
  const auto load = [&](float4(&v)[kInFlight], int base) {
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int part = base + i * kWarps;
      v[i] = part < parts ? split.Load(part, row) : float4{0, 0, 0, 0};
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
      if (part < parts) scratch.weights[part] = lse[k] * inverse;
    }
    if (split.slice == 0 && split.lane == 0) split.StoreLse(row, top + log2f(sum));
  }
  __syncthreads();
  float4 total{0, 0, 0, 0};
  for (int base = warp; base < parts; base += kInFlight * kWarps) {
    if (base != warp) load(v, base);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const int part = base + i * kWarps;
      if (part < parts) Accumulate(total, scratch.weights[part], v[i]);
    }
  }
  scratch.sums[warp][split.lane] = total;
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int other = 1; other < kWarps; ++other) {
      Accumulate(total, 1.f, scratch.sums[other][split.lane]);
    }
    split.Store(row, total);
  }
}

// A block's share of the work.
struct Share {
  SplitInfo info;    // batch -1: none
  int index, count;  // this block, of those that work on the same entry
};

// Divides the blocks among the entries that are split: one for each, and the others by their parts.
// Each warp finds its block's share on its own.
template <bool kChunks>
__device__ __forceinline__ Share FindShare(const DenseDecodeParams& p, int entries) {
  const int lane = threadIdx.x % 32, block = blockIdx.y, blocks = gridDim.y;
  const auto info_of = [&](int entry) {
    if constexpr (kChunks) {
      return SplitInfo{entry, 0, Chunks(BlocksOf(SequenceLength(p, entry))) - 1, 0};
    } else {
      return reinterpret_cast<const SplitInfo*>(p.split_info)[entry];
    }
  };
  const auto parts_of = [&](int entry) {
    if (entry >= entries) return 0;
    const SplitInfo info = info_of(entry);
    return info.batch < 0 || info.first == info.last ? 0 : info.last - info.first + 1;
  };
  int parts = parts_of(lane), all_parts = parts;
#pragma unroll 1
  for (int entry = lane + 32; entry < entries; entry += 32) all_parts += parts_of(entry);
  all_parts = __reduce_add_sync(~0u, all_parts);
  const float per_part = __fdividef(static_cast<float>(blocks - entries), all_parts) * 0.9999f;
  int first = 0;
#pragma unroll 1
  for (int base = 0; base < entries; base += 32) {
    if (base > 0) parts = parts_of(base + lane);
    const int count = parts == 0 ? 0 : 1 + static_cast<int>(parts * per_part);
    int end = count;  // inclusive scan over the warp
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int other = __shfl_up_sync(~0u, end, step);
      if (lane >= step) end += other;
    }
    end += first;
    const unsigned holder = __ballot_sync(~0u, end - count <= block && block < end);
    if (holder != 0) {
      const int source = __ffs(holder) - 1;
      return {info_of(base + source), block - __shfl_sync(~0u, end - count, source),
              __shfl_sync(~0u, count, source)};
    }
    first = __shfl_sync(~0u, end, 31);
  }
  return {{-1, 0, 0, 0}, 0, 0};
}

// Grid: (row tiles, any number of blocks above that of entries).
template <typename T, bool kChunks>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerMultiprocessor - (kChunks ? 1 : 0))
    CombineKernel(const __grid_constant__ DenseDecodeParams p, int entries, int partitions,
                  int max_chunks) {
  ptx::WaitForPreviousKernel();
  ptx::LetNextKernelStart();
  __shared__ Scratch scratch;
  const Share share = FindShare<kChunks>(p, entries);
  const SplitInfo& info = share.info;
  if (info.batch < 0) return;
  const int parts = info.last - info.first + 1;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const RowTile tile(p, blockIdx.x);
  if (parts > kFewParts) {
    for (int unit = share.index; unit < tile.count * kSlices; unit += share.count) {
      const Split<T, kChunks> split{p, tile, info, partitions, max_chunks, unit % kSlices, lane};
      CombineMany(split, unit / kSlices, scratch);
    }
    return;
  }
  const Split<T, kChunks> split{p, tile, info, partitions, max_chunks, warp % kSlices, lane};
  const int team = share.index * (kWarps / kSlices) + warp / kSlices;
  const int teams = share.count * (kWarps / kSlices);
  if (parts == 2) {
    for (int row = team * 4; row < tile.count; row += teams * 4) CombineFew<2>(split, row);
  } else if (parts <= 4) {
    for (int row = team * 2; row < tile.count; row += teams * 2) CombineFew<4>(split, row);
  } else {
    for (int row = team; row < tile.count; row += teams) CombineFew<8>(split, row);
  }
}

}  // namespace

cudaError_t LaunchCombine(const DenseDecodeParams& params, int partitions, int multiprocessors,
                          cudaStream_t stream) {
  const int entries = static_cast<int>(
      params.batch_invariant ? params.batch : std::min<int64_t>(params.batch, partitions));
  const int row_tiles = static_cast<int>(params.row_tiles());
  const int blocks = std::max(kBlocksPerMultiprocessor * multiprocessors / row_tiles, entries);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(row_tiles, blocks);
  config.blockDim = dim3(kWarps * 32);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  const auto launch = [&](auto plain, auto chunks) {
    return cudaLaunchKernelEx(&config, params.batch_invariant ? chunks : plain, params, entries,
                              partitions, static_cast<int>(params.max_chunks()));
  };
  return params.dtype == DType::kBF16
             ? launch(CombineKernel<__nv_bfloat16, false>, CombineKernel<__nv_bfloat16, true>)
             : launch(CombineKernel<__half, false>, CombineKernel<__half, true>);
}

}  // namespace flashmla::sm90
