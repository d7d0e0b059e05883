// Host side of sparse attention. Every query token is a sequence of its own (call.cuh). Which shape
// serves which call:
//
//   up to 16, up to 32 heads, FP8 tokens of 576 numbers   narrow_fp8
//   an even number of tiles of 64 heads, FP8 tokens       paired
//   others                                                wide: tiles of 64 heads
#include <cuda_runtime.h>

#include <algorithm>
#include <climits>
#include <string>

#include "sm90/attention/combine.cuh"
#include "sm90/attention/launch.cuh"
#include "sm90/attention/narrow_fp8.cuh"
#include "sm90/attention/paired.cuh"
#include "sm90/attention/wide.cuh"
#include "sm90/kernels.h"

namespace flashmla::sm90 {
namespace {

template <typename T, TokenFormat kFormat, int kDim>
Status LaunchTiles(const SparseCall& p, dim3 grid, cudaStream_t stream) {
  if constexpr (kFormat != TokenFormat::kNumbers) {
    using Problem = paired::Problem<SparseCall, kFormat, kDim>;
    if (p.tiles_per_head() % 2 == 0)
      return Launch(paired::Kernel<Problem>, grid, paired::kThreads,
                    sizeof(paired::SharedMemory<Problem>), 2, stream, p);
  }
  using Problem = wide::Problem<SparseCall, kFormat, kDim>;
  return Launch(wide::Kernel<T, 1, Problem>, grid, Problem::kThreads,
                sizeof(wide::SharedMemory<Problem>), 1, stream, p, wide::PageMaps{});
}

template <typename T>
Status LaunchNumbers(const SparseCall& p, dim3 grid, cudaStream_t stream) {
  if (p.head_dim == kHeadDim)
    return LaunchTiles<T, TokenFormat::kNumbers, kHeadDim>(p, grid, stream);
  return LaunchTiles<T, TokenFormat::kNumbers, kHeadDimV>(p, grid, stream);
}

Status LaunchFormat(const SparseCall& p, TokenFormat format, dim3 grid, cudaStream_t stream) {
  switch (format) {
    case TokenFormat::kNumbers:
      return p.dtype == DType::kBF16 ? LaunchNumbers<__nv_bfloat16>(p, grid, stream)
                                     : LaunchNumbers<__half>(p, grid, stream);
    case TokenFormat::kFp8:
      if (p.rows() <= kNarrowRows) return narrow_fp8::Launch(p, grid, stream);
      return LaunchTiles<__nv_bfloat16, TokenFormat::kFp8, kHeadDim>(p, grid, stream);
    case TokenFormat::kFp8Apart:
      break;
  }
  return LaunchTiles<__nv_bfloat16, TokenFormat::kFp8Apart, kFp8ApartDim>(p, grid, stream);
}

}  // namespace

Status SparseAttention(const SparseAttentionParams& params, cudaStream_t stream) {
  if (params.queries() == 0) return {};
  int multiprocessors = 0;
  Status status = FindDevice(&multiprocessors);
  if (!status.ok()) return status;
  // The schedule counts all blocks of all query tokens, up to four more for each, and what the
  // last partitions may lie behind the last of them.
  const int64_t blocks = params.scopes[0].topk / kPageSize + params.scopes[1].topk / kPageSize + 2;
  constexpr int64_t kBehind = 4 * kMaxPartitions;
  if (params.queries() > (INT32_MAX - kBehind) / (blocks + 4)) {
    return {StatusCode::kInvalidArgument,
            "batch * s_q = " + std::to_string(params.queries()) + " query tokens with " +
                std::to_string(params.listed()) + " indices each are too many"};
  }
  if (params.listed() > INT32_MAX / 4) {
    return {StatusCode::kInvalidArgument,
            "indices has too many for a query token: " + std::to_string(params.listed())};
  }
  if (params.h_q > INT32_MAX / kRowTile) {
    return {StatusCode::kInvalidArgument, "h_q is too large: " + std::to_string(params.h_q)};
  }
  const SparseCall call(params);
  const auto partitions = static_cast<int>(
      std::clamp<int64_t>(multiprocessors / call.row_tiles(), 1, call.max_partitions()));
  const dim3 grid(static_cast<unsigned>(call.row_tiles()), partitions);
  status = LaunchFormat(call, params.format, grid, stream);
  if (!status.ok() || partitions == 1) return status;
  const cudaError_t error = LaunchCombine(call, partitions, multiprocessors, stream);
  return error == cudaSuccess ? Status{} : Failed("launch", error);
}

}  // namespace flashmla::sm90
