// The second kernel of an attention call.
#pragma once

#include <cuda_runtime_api.h>

#include "sm90/attention/call.cuh"

namespace flashmla::sm90 {

// Enqueues the combine after an attention kernel launched with this many partitions.
template <typename Call>
cudaError_t LaunchCombine(const Call& params, int partitions, int multiprocessors,
                          cudaStream_t stream);

}  // namespace flashmla::sm90
