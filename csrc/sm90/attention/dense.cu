// Host side of dense decode: limits, the tensor maps, and the launches.
#include <cuda.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "sm90/attention/combine.cuh"
#include "sm90/attention/launch.cuh"
#include "sm90/attention/narrow.cuh"
#include "sm90/attention/narrow_fp8.cuh"
#include "sm90/attention/paired.cuh"
#include "sm90/attention/wide.cuh"
#include "sm90/kernels.h"
#include "sm90/tensor_map.cuh"

namespace flashmla::sm90 {
namespace {

constexpr auto kNan = CU_TENSOR_MAP_FLOAT_OOB_FILL_NAN_REQUEST_ZERO_FMA;

// The page pool as (64 columns of a panel, all tokens of the pool, 9 panels, KV heads), in boxes of
// so many tokens and panels.
Status MakePageMap(const DenseDecodeParams& p, cuuint32_t tokens, cuuint32_t panels,
                   CUtensorMap* map) {
  const cuuint64_t head = kHeadDim * 2, token = p.h_kv * head;
  const cuuint64_t num_tokens = p.num_pages * kPageSize, h_kv = p.h_kv;
  return MakeMap<4>(p.dtype, p.k_cache, {kPanel, num_tokens, kPanels, h_kv},
                    {token, kPanel * 2, head}, {kPanel, tokens, panels, 1}, kNan, map);
}

// The queries as (64 columns of a panel, heads of a KV head, all tokens, 9 panels, KV heads), in
// boxes of a panel of all rows of a sequence that read one KV head.
Status MakeQueryMap(const DenseDecodeParams& p, CUtensorMap* map) {
  const cuuint64_t head = kHeadDim * 2, token = p.h_q * head;
  const cuuint64_t group = p.group(), tokens = p.batch * p.s_q, h_kv = p.h_kv;
  return MakeMap<5>(
      p.dtype, p.q, {kPanel, group, tokens, kPanels, h_kv}, {head, token, kPanel * 2, group * head},
      {kPanel, static_cast<cuuint32_t>(group), static_cast<cuuint32_t>(p.s_q), 1, 1}, kNan, map);
}

template <typename T, int kRows>
Status LaunchNarrow(const DenseDecodeParams& p, dim3 grid, cudaStream_t stream) {
  narrow::Maps maps{};
  Status status = MakePageMap(p, kPageSize, 1, &maps.panel);
  if (status.ok()) status = MakeQueryMap(p, &maps.queries);
  if (!status.ok()) return status;
  return Launch(narrow::Kernel<T, kRows>, grid, narrow::kThreads,
                sizeof(narrow::SharedMemory<kRows>), 1, stream, p, maps);
}

template <typename T, int kCluster>
Status LaunchWide(const DenseDecodeParams& p, dim3 grid, cudaStream_t stream) {
  using Problem = wide::Problem<DenseDecodeParams, TokenFormat::kNumbers, kHeadDim>;
  wide::PageMaps maps;
  Status status = MakePageMap(p, kPageSize, kHalfPanels / 2, &maps.half_panels);
  if (status.ok()) status = MakePageMap(p, kPageSize / 2, 1, &maps.rope);
  if (!status.ok()) return status;
  return Launch(wide::Kernel<T, kCluster, Problem>, grid, Problem::kThreads,
                sizeof(wide::SharedMemory<Problem>), kCluster, stream, p, maps);
}

Status LaunchFp8Tiles(const DenseDecodeParams& p, dim3 grid, cudaStream_t stream) {
  if (p.tiles_per_head() % 2 == 0) {
    using Problem = paired::Problem<DenseDecodeParams, TokenFormat::kFp8, kHeadDim>;
    return Launch(paired::Kernel<Problem>, grid, paired::kThreads,
                  sizeof(paired::SharedMemory<Problem>), 2, stream, p);
  }
  using Problem = wide::Problem<DenseDecodeParams, TokenFormat::kFp8, kHeadDim>;
  return Launch(wide::Kernel<__nv_bfloat16, 1, Problem>, grid, Problem::kThreads,
                sizeof(wide::SharedMemory<Problem>), 1, stream, p, wide::PageMaps{});
}

// Which shape serves which call, by the query rows that read one KV head (s_q * h_q / h_kv):
//
//   up to 16, up to 32   narrow: the query rows are the short side of every product
//   more                 wide: tiles of 64 rows; an even number of tiles forms pairs that load
//                        each page once. Of FP8 pages: paired if it is even
Status LaunchFp8(const DenseDecodeParams& p, dim3 grid, cudaStream_t stream) {
  if (p.rows() <= kNarrowRows) return narrow_fp8::Launch(p, grid, stream);
  return LaunchFp8Tiles(p, grid, stream);
}
template <typename T>
Status LaunchShape(const DenseDecodeParams& p, dim3 grid, cudaStream_t stream) {
  if (p.rows() <= 16) return LaunchNarrow<T, 16>(p, grid, stream);
  if (p.rows() <= kNarrowRows) return LaunchNarrow<T, kNarrowRows>(p, grid, stream);
  if (p.tiles_per_head() % 2 != 0) return LaunchWide<T, 1>(p, grid, stream);
  return LaunchWide<T, 2>(p, grid, stream);
}

// The decode alone, by how many partitions, on how many multiprocessors.
Status Decode(const DenseDecodeParams& p, cudaStream_t stream, int* partitions,
              int* multiprocessors) {
  Status status = FindDevice(multiprocessors);
  if (!status.ok()) return status;
  if (p.num_pages >= INT32_MAX / kPageSize) {
    return {StatusCode::kInvalidArgument,
            "k_cache has too many pages: " + std::to_string(p.num_pages)};
  }
  if (p.s_q * p.h_q > INT32_MAX) {
    return {StatusCode::kInvalidArgument,
            "s_q * h_q is too large: " + std::to_string(p.s_q * p.h_q)};
  }

  // The schedule counts all blocks of all sequences and up to four more for each sequence. The
  // last partitions may lie behind the last of them; and where all sequences are of one length, up
  // to three units more for each partition count.
  constexpr int64_t kBehind = 4 * kMaxPartitions;
  if (p.batch * (p.max_pages_per_seq + p.s_q / kPageSize + 5) > INT32_MAX - kBehind) {
    return {StatusCode::kInvalidArgument, "block_table is too large: " + std::to_string(p.batch) +
                                              " x " + std::to_string(p.max_pages_per_seq)};
  }

  if (p.workspace_slots() * p.tile_rows() > INT32_MAX) {
    return {StatusCode::kInvalidArgument,
            "deterministic=\"batch_invariant\" would need a workspace of too many chunks: " +
                std::to_string(p.workspace_slots())};
  }

  // One thread block per multiprocessor, divided among the row tiles.
  *partitions = static_cast<int>(
      std::clamp<int64_t>(*multiprocessors / p.row_tiles(), 1, p.max_partitions()));
  const dim3 grid(static_cast<unsigned>(p.row_tiles()), *partitions);
  if (p.fp8_cache) return LaunchFp8(p, grid, stream);
  return p.dtype == DType::kBF16 ? LaunchShape<__nv_bfloat16>(p, grid, stream)
                                 : LaunchShape<__half>(p, grid, stream);
}

}  // namespace

Status DenseDecode(const DenseDecodeParams& p, cudaStream_t stream) {
  if (p.batch == 0) return {};
  int partitions = 0, multiprocessors = 0;
  const Status status = Decode(p, stream, &partitions, &multiprocessors);
  if (!status.ok() || (p.batch_invariant ? p.max_chunks() : partitions) == 1) return status;
  const cudaError_t error = LaunchCombine(p, partitions, multiprocessors, stream);
  return error == cudaSuccess ? Status{} : Failed("launch", error);
}

Status DenseDecodeParts(const DenseDecodeParams& p, cudaStream_t stream, int* partitions) {
  int multiprocessors = 0;
  return Decode(p, stream, partitions, &multiprocessors);
}

}  // namespace flashmla::sm90
