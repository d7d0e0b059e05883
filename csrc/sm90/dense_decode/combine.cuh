// The second kernel of dense decode.
#pragma once

#include <cuda_runtime_api.h>

#include "params.h"

namespace flashmla::sm90 {

// Enqueues the combine after a decode launched with this many partitions.
cudaError_t LaunchCombine(const DenseDecodeParams& params, int partitions, int multiprocessors,
                          cudaStream_t stream);

}  // namespace flashmla::sm90
