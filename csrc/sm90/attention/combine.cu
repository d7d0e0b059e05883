// Merges the partial results of sequences that several partitions worked on, or of their chunks:
//
//   out = sum_i w_i out_i,   w_i = 2^(lse_i - max lse) / sum_j 2^(lse_j - max lse)
//
// One block or several stand for each partition, and share what its sequences have to merge with
// those of the other partitions that worked on them (RecordMerges). A unit of work is a slice of a
// row, as much as a warp loads at once; the loads of its parts are in flight together, and beside
// those of the weights. Few parts: a warp takes several slices at once. Many: the warps of a block
// share a slice. The order of additions depends on the number of parts alone: the same inputs give
// the same bits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <type_traits>

#include "sm90/attention/combine.cuh"
#include "sm90/attention/common.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {
namespace {

// Code that runs once is paid in instruction fetches: there is as little of it as will do.
constexpr int kFewParts = 8;   // loads of a thread in flight, where a warp has all parts of a slice
constexpr int kPartsEach = 9;  // and where warps share a slice
static_assert(kMaxChunks <= kMaxPartitions);

// Partitions have about as much to merge as each other, but sequences have not: more blocks than
// fit at once, so that those with a short one make room.
constexpr uint32_t kSequenceTeam = 8;

// Float partial results are few, and of few rows: many warps share a slice.
template <typename Partial>
constexpr int kWarps = std::is_same_v<Partial, float> ? 8 : 4;
template <typename Partial, typename Call>
constexpr int kBlocksPerMultiprocessor = !std::is_same_v<Partial, float>    ? 5
                                         : std::is_same_v<Call, SparseCall> ? 2
                                                                            : 3;

template <int kCount>
struct Scratch {
  float weights[kMaxPartitions];
  float sums[2][kCount][8][32];
};

// Volatile: in this order, or the compiler would have all addresses before the first.
__device__ __forceinline__ uint4 Load(const uint4* address) {
  uint4 v;
  asm volatile("ld.global.cg.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address));
  return v;
}

__device__ __forceinline__ void Unpack(float, uint4 v, float (&x)[4]) {
  x[0] = __uint_as_float(v.x), x[1] = __uint_as_float(v.y);
  x[2] = __uint_as_float(v.z), x[3] = __uint_as_float(v.w);
}
__device__ __forceinline__ void Unpack(__half, uint4 v, float (&x)[8]) {
  const uint32_t pairs[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = __half22float2(reinterpret_cast<const __half2&>(pairs[i]));
    x[2 * i] = pair.x, x[2 * i + 1] = pair.y;
  }
}

// T: of the result, Partial: of the partial results; kPermuted: whether those have their columns in
// another order (DenseDecodeParams::permuted_partials).
template <typename T, typename Partial, bool kPermuted, typename Call>
class Merger {
 public:
  __device__ Merger(const Call& p, const RowTile& tile, const Merge& merge, int first_row,
                    int member, int team, Scratch<sm90::kWarps<Partial>>& scratch)
      : p_(p),
        tile_(tile),
        merge_(merge),
        first_unit_(merge.index + merge.count * member),
        step_(merge.count * team),
        units_(kSlices * tile.count),
        first_row_(first_row),
        scratch_(scratch) {}

  __device__ __forceinline__ void Run() {
    if (merge_.parts > kFewParts) {
      Many();
    } else if (merge_.parts == 2) {
      Few<2>();
    } else if (merge_.parts <= 4) {
      Few<4>();
    } else {
      Few<8>();
    }
  }

 private:
  static constexpr bool kSparse = std::is_same_v<Call, SparseCall>;
  static constexpr int kWarps = sm90::kWarps<Partial>;
  static constexpr int kEach = 16 / sizeof(Partial);  // numbers of a lane
  static constexpr int kSlice = 32 * kEach;
  static constexpr int kSlices = kHeadDimV / kSlice;

  // Slices of rows are numbered kSlices row + slice; those of this thread block are unit(0),
  // unit(1) ...
  __device__ __forceinline__ int unit(int i) const { return first_unit_ + step_ * i; }

  // The row of the workspace that has a part of a unit.
  __device__ __forceinline__ int Row(int part, int unit) const {
    const int row = part == 0 ? merge_.first_row : merge_.next_row + part * merge_.stride;
    return first_row_ + row + unit / kSlices;
  }
  // This lane's numbers of it.
  __device__ __forceinline__ const uint4* Part(int part, int unit) const {
    const int slice = Row(part, unit) * kSlices + unit % kSlices;
    return static_cast<const uint4*>(p_.partial_out) + (int64_t{slice} * 32 + lane());
  }
  // Its logarithm, its weight's factor and, of sparse attention, its largest score.
  struct PartStats {
    float lse = -INFINITY, factor = 0, most = -INFINITY;
  };
  __device__ __forceinline__ PartStats Stats(int part, int unit) const {
    const float4 stats =
        __ldcg(reinterpret_cast<const float4*>(p_.partial_stats) + Row(part, unit));
    return {stats.x, unit % kSlices * kSlice < kHeadDimV / 2 ? stats.y : stats.z, stats.w};
  }

  static __device__ __forceinline__ void Accumulate(float (&total)[kEach], float weight, uint4 v) {
    float x[kEach];
    Unpack(Partial{}, v, x);
#pragma unroll
    for (int i = 0; i < kEach; ++i) total[i] += weight * x[i];
  }
  __device__ __forceinline__ void Store(int unit, const float (&total)[kEach]) const {
    const int row = unit / kSlices;
    const int64_t query = (merge_.batch * p_.s_q + tile_.token(row)) * p_.h_q + tile_.head(row);
    uint32_t pairs[kEach / 2];
#pragma unroll
    for (int i = 0; i < kEach / 2; ++i) pairs[i] = Pack(T{}, total[2 * i], total[2 * i + 1]);
    const int64_t place = (query * kSlices + unit % kSlices) * 32 + lane();
    if constexpr (kPermuted) {
      constexpr int kPanel = 64;
      auto* out = static_cast<uint32_t*>(p_.out) + place * kEach / kPanel * (kPanel / 2);
      const int i = lane() % 16 / 2, j = lane() % 2 * 2;
      out[8 * j + i] = pairs[0];
      out[8 * (j + 1) + i] = pairs[1];
    } else if constexpr (kEach == 8) {
      static_cast<uint4*>(p_.out)[place] = {pairs[0], pairs[1], pairs[2], pairs[3]};
    } else {
      static_cast<uint2*>(p_.out)[place] = {pairs[0], pairs[1]};
    }
  }
  // Both are in base 2.
  __device__ __forceinline__ void StoreStats(int unit, float lse, float most) const {
    const int row = unit / kSlices;
    const int64_t place = RowPlace(p_, merge_.batch, tile_.head(row), tile_.token(row));
    p_.lse[place] = lse * static_cast<float>(M_LN2);
    if constexpr (kSparse) p_.max_logits[place] = most * static_cast<float>(M_LN2);
  }

  // Each warp on its own: as many slices at once as there is room for, each of at most kParts
  // parts.
  template <int kParts>
  __device__ __forceinline__ void Few() {
    constexpr int kGroup = kFewParts / kParts;
#pragma unroll 1
    for (int first = warp(); unit(first) < units_; first += kWarps * kGroup) {
      const auto unit_of = [&](int i) { return unit(first + i / kParts * kWarps); };
      const auto exists = [&](int i) {
        return i < kFewParts && i % kParts < merge_.parts && unit_of(i) < units_;
      };
      uint4 v[kFewParts];
#pragma unroll
      for (int i = 0; i < kFewParts; ++i) {
        v[i] = uint4{0, 0, 0, 0};
        if (exists(i)) v[i] = Load(Part(i % kParts, unit_of(i)));
      }
      // Lane i has the weight of load i.
      const int own = unit_of(lane());
      PartStats stats;
      if (exists(lane())) stats = Stats(lane() % kParts, own);
      float top = stats.lse;
#pragma unroll
      for (int step = kParts / 2; step > 0; step /= 2) {
        top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      }
      if (top == -INFINITY) top = 0;
      const float share = ptx::Exp2(stats.lse - top);
      float sum = share;
#pragma unroll
      for (int step = kParts / 2; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if constexpr (kSparse) {
#pragma unroll
        for (int step = kParts / 2; step > 0; step /= 2) {
          stats.most = fmaxf(stats.most, __shfl_xor_sync(~0u, stats.most, step));
        }
      }
      const float lse = top + ptx::Log2(sum);
      float weight = sum == 0 ? 0.f : share * ptx::Reciprocal(sum) * stats.factor;
      if (exists(lane()) && sum != 0) weight *= SinkShare(p_, tile_.head(own / kSlices), lse);
      if (own % kSlices == 0 && lane() % kParts == 0 && exists(lane())) {
        StoreStats(own, lse, stats.most);
      }
      // What all lanes have loaded need not be written back to memory. (Where parts are many there
      // are few sequences, and nothing displaces the parts from the cache.)
      __syncwarp();
      constexpr int kLines = 32 * 16 / 128;
      static_assert(kFewParts * kLines == 32);
      const int load = lane() / kLines;
      if (exists(load)) {
        ptx::DiscardL2(Part(load % kParts, unit_of(load)) - lane() + lane() % kLines * 8);
      }
      float total[kEach] = {};
#pragma unroll
      for (int i = 0; i < kFewParts; ++i) {
        Accumulate(total, __shfl_sync(~0u, weight, i), v[i]);
        if (i % kParts == kParts - 1) {
          if (unit_of(i) < units_) Store(unit_of(i), total);
#pragma unroll
          for (float& x : total) x = 0;
        }
      }
    }
  }

  // All warps for a slice, each with every so many-th part.
  __device__ __forceinline__ void Many() {
    int buffer = 0;
#pragma unroll 1
    for (int i = 0; unit(i) < units_; ++i, buffer ^= 1) {
      const int own = unit(i);
      uint4 v[kPartsEach];
      const auto load = [&](int first) {
#pragma unroll
        for (int j = 0; j < kPartsEach; ++j) {
          const int part = first + kWarps * j;
          v[j] = uint4{0, 0, 0, 0};
          if (part < merge_.parts) v[j] = Load(Part(part, own));
        }
      };
      AllStats stats;
      if (warp() == 0) LoadStats(own, stats);  // first: the longer way is theirs
      load(warp());
      if (warp() == 0) Weigh(own, stats);
      __syncthreads();
      float total[kEach] = {};
#pragma unroll 1
      for (int first = warp(); first < merge_.parts; first += kWarps * kPartsEach) {
        if (first != warp()) load(first);
#pragma unroll
        for (int j = 0; j < kPartsEach; ++j) {
          const int part = min(first + kWarps * j, kMaxPartitions - 1);
          Accumulate(total, scratch_.weights[part], v[j]);
        }
      }
      auto& sums = scratch_.sums[buffer];
#pragma unroll
      for (int j = 0; j < kEach; ++j) sums[warp()][j][lane()] = total[j];
      __syncthreads();
      if (warp() == 0) {
#pragma unroll
        for (int other = 1; other < kWarps; ++other) {
#pragma unroll
          for (int j = 0; j < kEach; ++j) total[j] += sums[other][j][lane()];
        }
        Store(own, total);
      }
    }
    __syncthreads();  // the buffers are free again
  }

  // Of all parts of a slice, a lane's.
  static constexpr int kPerLane = (kMaxPartitions + 31) / 32;
  using AllStats = PartStats[kPerLane];
  __device__ __forceinline__ void LoadStats(int unit, AllStats& stats) const {
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int part = lane() + 32 * k;
      if (part < merge_.parts) stats[k] = Stats(part, unit);
    }
  }
  // Their weights, by one warp; those of parts that do not exist are zero.
  __device__ __forceinline__ void Weigh(int unit, const AllStats& stats) {
    float share[kPerLane];
    float top = -INFINITY, most = -INFINITY;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      top = fmaxf(top, stats[k].lse);
      most = fmaxf(most, stats[k].most);
    }
    if constexpr (kSparse) {
#pragma unroll
      for (int step = 16; step > 0; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
    if (top == -INFINITY) top = 0;
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      share[k] = ptx::Exp2(stats[k].lse - top);
      sum += share[k];
    }
#pragma unroll
    for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
    const float all = top + ptx::Log2(sum);
    float inverse = sum == 0 ? 0.f : ptx::Reciprocal(sum);
    if (sum != 0) inverse *= SinkShare(p_, tile_.head(unit / kSlices), all);
#pragma unroll
    for (int k = 0; k < kPerLane; ++k) {
      const int part = lane() + 32 * k;
      if (part < kMaxPartitions) scratch_.weights[part] = share[k] * inverse * stats[k].factor;
    }
    if (unit % kSlices == 0 && lane() == 0) StoreStats(unit, all, most);
  }

  __device__ static int lane() { return threadIdx.x % 32; }
  __device__ static int warp() { return threadIdx.x / 32; }

  const Call& p_;
  const RowTile& tile_;
  const Merge& merge_;
  const int first_unit_, step_, units_;
  const int first_row_;  // of the workspace, for this row tile
  Scratch<kWarps>& scratch_;
};

// Grid: row tiles x subjects x team. Each partition or, batch-invariantly, sequence is the subject
// of `team` blocks.
template <typename T, typename Partial, bool kPermuted, typename Call>
__global__ void __launch_bounds__(kWarps<Partial> * 32, kBlocksPerMultiprocessor<Partial, Call>)
    CombineKernel(const __grid_constant__ Call p, uint32_t row_tiles, int partitions,
                  uint32_t team) {
  __shared__ Scratch<kWarps<Partial>> scratch;
  const uint32_t block = blockIdx.x / row_tiles, subject = block / team;
  const int member = block - subject * team;
  const RowTile tile(p, blockIdx.x - block * row_tiles);
  FetchParams(p);
  ptx::WaitForPreviousKernel();
  ptx::LetNextKernelStart();
  __shared__ Merge merges[kMergesEach];
  if (!p.batch_invariant) {
    constexpr int kPieces = sizeof(merges) / sizeof(int4);
    const int4* pieces = reinterpret_cast<const int4*>(p.merges) + subject * kPieces;
    if (threadIdx.x < kPieces) {
      reinterpret_cast<int4*>(merges)[threadIdx.x] = __ldcg(pieces + threadIdx.x);
    }
  } else if (threadIdx.x == 0) {
    const int max_chunks = static_cast<int>(p.max_chunks());
    const int chunks = Chunks(BlocksOf(SequenceLength(p, subject)));
    const int row = tile.chunk_row(p, max_chunks, subject, 0);
    const int next = tile.chunk_row(p, max_chunks, subject, 1);
    const int batch = subject;
    merges[0] = {batch, chunks > 1 ? chunks : 0, row, row, next - row, 0, 1, 0};
    merges[1].parts = 0;
  }
  __syncthreads();
  // Chunks are counted from all row tiles' beginning, other parts from their own's.
  const int first_row = p.batch_invariant ? 0 : tile.partial_row(partitions, 0, true);
#pragma unroll 1
  for (int i = 0; i < kMergesEach && merges[i].parts > 0; ++i) {
    Merger<T, Partial, kPermuted, Call>(p, tile, merges[i], first_row, member, team, scratch).Run();
  }
}

template <typename T, typename Partial, bool kPermuted, typename Call>
cudaError_t Launch(const Call& params, int partitions, int multiprocessors, cudaStream_t stream) {
  const uint32_t row_tiles = params.row_tiles();
  const uint32_t subjects = params.batch_invariant ? params.batch : partitions;
  const uint32_t blocks = kBlocksPerMultiprocessor<Partial, Call> * multiprocessors;
  const uint32_t least = params.batch_invariant ? kSequenceTeam : 1;
  const uint32_t team = std::max(blocks / (row_tiles * subjects), least);
  cudaLaunchAttribute early{};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(row_tiles * subjects * team);
  config.blockDim = dim3(kWarps<Partial> * 32);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, CombineKernel<T, Partial, kPermuted, Call>, params, row_tiles,
                            partitions, team);
}

template <typename T, typename Call>
cudaError_t LaunchFor(const Call& params, int partitions, int multiprocessors,
                      cudaStream_t stream) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (params.permuted_partials()) {
      return Launch<T, float, true>(params, partitions, multiprocessors, stream);
    }
  }
  if constexpr (!std::is_same_v<Call, SparseCall>) {
    if (!params.half_partials()) {
      return Launch<T, float, false>(params, partitions, multiprocessors, stream);
    }
  }
  return Launch<T, __half, false>(params, partitions, multiprocessors, stream);
}

}  // namespace

template <typename Call>
cudaError_t LaunchCombine(const Call& params, int partitions, int multiprocessors,
                          cudaStream_t stream) {
  return params.dtype == DType::kBF16
             ? LaunchFor<__nv_bfloat16>(params, partitions, multiprocessors, stream)
             : LaunchFor<__half>(params, partitions, multiprocessors, stream);
}
template cudaError_t LaunchCombine(const DenseDecodeParams&, int, int, cudaStream_t);
template cudaError_t LaunchCombine(const SparseCall&, int, int, cudaStream_t);

}  // namespace flashmla::sm90
