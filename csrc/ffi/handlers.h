// The handlers that the module registers.
#pragma once

#include "xla/ffi/api/c_api.h"

namespace flashmla::ffi {

extern "C" {
XLA_FFI_Error* DenseDecodeCpu(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CacheAppendCpu(XLA_FFI_CallFrame* call_frame);
#if FLASHMLA_WITH_CUDA
XLA_FFI_Error* DenseDecodeCuda(XLA_FFI_CallFrame* call_frame);
XLA_FFI_Error* CacheAppendCuda(XLA_FFI_CallFrame* call_frame);
#endif
}

}  // namespace flashmla::ffi
