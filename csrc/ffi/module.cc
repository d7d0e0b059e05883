// The Python module: which handlers exist, and what was built.
#include <nanobind/nanobind.h>

#include "ffi/handlers.h"
#include "params.h"

#if FLASHMLA_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace nb = nanobind;

namespace flashmla {
namespace {

nb::capsule Capsule(XLA_FFI_Error* (*handler)(XLA_FFI_CallFrame*)) {
  return nb::capsule(reinterpret_cast<void*>(handler));
}

// {platform: {target name: handler}}
nb::dict Registrations() {
  nb::dict cpu;
  cpu[ffi::kDenseDecodeTarget] = Capsule(ffi::DenseDecodeCpu);
  cpu[ffi::kCacheAppendTarget] = Capsule(ffi::CacheAppendCpu);
  cpu[ffi::kSparseAttentionTarget] = Capsule(ffi::SparseAttentionCpu);
  nb::dict all;
  all["cpu"] = cpu;
#if FLASHMLA_WITH_CUDA
  nb::dict cuda;
  cuda[ffi::kDenseDecodeTarget] = Capsule(ffi::DenseDecodeCuda);
  cuda[ffi::kCacheAppendTarget] = Capsule(ffi::CacheAppendCuda);
  cuda[ffi::kSparseAttentionTarget] = Capsule(ffi::SparseAttentionCuda);
  cuda[ffi::kDenseDecodeNoGraphTarget] = Capsule(ffi::DenseDecodeCudaNoGraph);
  cuda[ffi::kCacheAppendNoGraphTarget] = Capsule(ffi::CacheAppendCudaNoGraph);
  cuda[ffi::kIndexTopkTarget] = Capsule(ffi::IndexTopkCuda);
  cuda[ffi::kFewTokensTarget] = Capsule(ffi::FewTokensCuda);
  cuda[ffi::kFewLogitsTarget] = Capsule(ffi::FewLogitsCuda);
  cuda[ffi::kGroupedMlpTarget] = Capsule(ffi::GroupedMlpCuda);
  all["CUDA"] = cuda;
#endif
  return all;
}

nb::dict BuildInfo() {
  nb::dict info;
  info["page_size"] = kPageSize;
  info["head_dim"] = kHeadDim;
  info["head_dim_v"] = kHeadDimV;
  info["fp8_tile"] = kFp8Tile;
  info["fp8_token_bytes"] = kFp8TokenBytes;
  info["fp8_512_tile"] = kFp8ApartTile;
  info["fp8_512_token_bytes"] = kFp8ApartTokenBytes;
  info["narrow_rows"] = kNarrowRows;
  info["row_tile"] = kRowTile;
  info["max_partitions"] = kMaxPartitions;
  info["merge_words"] = kMergeWords;
  info["index_head_dim"] = kIndexHeadDim;
  info["max_index_heads"] = kMaxIndexHeads;
  info["chunk_pages"] = kChunkPages;
  info["max_chunks"] = kMaxChunks;
  info["ffi_api_version"] = nb::make_tuple(XLA_FFI_API_MAJOR, XLA_FFI_API_MINOR);
  info["compiler"] = __VERSION__;
#if FLASHMLA_WITH_CUDA
  info["cuda_version"] = CUDART_VERSION;
  info["cuda_architectures"] = nb::make_tuple("sm_90a");
#else
  info["cuda_version"] = nb::none();
  info["cuda_architectures"] = nb::make_tuple();
#endif
  return info;
}

}  // namespace

NB_MODULE(_flashmla, m) {
  m.doc() = "XLA FFI handlers of flashmla_jax";
  m.def("registrations", &Registrations, "The FFI targets: {platform: {name: capsule}}");
  m.def("build_info", &BuildInfo, "What this module was built with, and the sizes it assumes");
}

}  // namespace flashmla
