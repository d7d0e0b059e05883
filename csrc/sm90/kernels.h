// The Hopper kernels. Each enqueues its work on the stream and returns: no allocation, no
// synchronisation, the same launches every time, so that a CUDA graph can capture it.
#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "params.h"

namespace flashmla::sm90 {

enum class StatusCode { kOk, kInvalidArgument, kFailedPrecondition, kInternal };

struct Status {
  StatusCode code = StatusCode::kOk;
  std::string message;

  bool ok() const { return code == StatusCode::kOk; }
};

Status DenseDecode(const DenseDecodeParams& params, cudaStream_t stream);
// The same for a batch that is not empty, without merging: sequences that were divided among the
// partitions are partial results (attention/schedule.cuh).
Status DenseDecodeParts(const DenseDecodeParams& params, cudaStream_t stream, int* partitions);
Status SparseAttention(const SparseAttentionParams& params, cudaStream_t stream);
Status CacheAppend(const CacheAppendParams& params, cudaStream_t stream);
Status IndexTopk(const IndexTopkParams& params, cudaStream_t stream);
Status GroupedMlp(const GroupedMlpParams& params, cudaStream_t stream);

}  // namespace flashmla::sm90
