// FFI handlers of the Hopper kernels. They only enqueue, so XLA may record them in CUDA graphs.
#include <cuda_runtime_api.h>

#include "ffi/handlers.h"
#include "ffi/unpack.h"
#include "sm90/kernels.h"

namespace flashmla::ffi {
namespace {

xffi::Error ToError(const char* target, const sm90::Status& status) {
  const std::string message = std::string(target) + ": " + status.message;
  switch (status.code) {
    case sm90::StatusCode::kOk:
      return xffi::Error::Success();
    case sm90::StatusCode::kInvalidArgument:
      return xffi::Error::InvalidArgument(message);
    case sm90::StatusCode::kFailedPrecondition:
      return xffi::Error(xffi::ErrorCode::kFailedPrecondition, message);
    case sm90::StatusCode::kInternal:
      break;
  }
  return xffi::Error::Internal(message);
}

// Whether a call's workspace is as large as it needs.
bool HasWorkspace(const DenseDecodeParams& params, int64_t row_bytes,
                  xffi::Result<xffi::AnyBuffer>& partial_out,
                  xffi::ResultBuffer<xffi::F32>& partial_stats,
                  xffi::ResultBuffer<xffi::S32>& merges) {
  const int64_t rows = params.workspace_slots() * params.tile_rows();
  const auto has = [](size_t elements, int64_t needed) {
    return static_cast<int64_t>(elements) >= needed;
  };
  return has(partial_out->size_bytes(), rows * row_bytes) &&
         has(partial_stats->element_count(), rows * 4) &&
         has(merges->element_count(), params.max_partitions() * kMergeWords);
}

xffi::Error DenseDecode(cudaStream_t stream, xffi::AnyBuffer q, xffi::AnyBuffer k_cache,
                        xffi::Buffer<xffi::S32> block_table, xffi::Buffer<xffi::S32> cache_seqlens,
                        xffi::Result<xffi::AnyBuffer> out, xffi::ResultBuffer<xffi::F32> lse,
                        xffi::Result<xffi::AnyBuffer> partial_out,
                        xffi::ResultBuffer<xffi::F32> partial_stats,
                        xffi::ResultBuffer<xffi::S32> merges, float softmax_scale, bool causal,
                        bool batch_invariant) {
  DenseDecodeParams params{};
  params.softmax_scale = softmax_scale;
  params.causal = causal;
  params.batch_invariant = batch_invariant;
  auto error = Unpack(q, k_cache, block_table, cache_seqlens, *out, *lse, &params);
  if (error.failure()) return error;
  if (params.dtype == DType::kF32) {
    return xffi::Error(xffi::ErrorCode::kUnimplemented,
                       std::string(kDenseDecodeTarget) + ": float32 runs on the CPU only");
  }
  if (!HasWorkspace(params, params.partial_row_bytes(), partial_out, partial_stats, merges)) {
    return xffi::Error::InvalidArgument(std::string(kDenseDecodeTarget) +
                                        ": the workspace is too small");
  }
  params.partial_out = partial_out->untyped_data();
  params.partial_stats = partial_stats->typed_data();
  params.merges = merges->typed_data();
  return ToError(kDenseDecodeTarget, sm90::DenseDecode(params, stream));
}

xffi::Error SparseAttention(cudaStream_t stream, xffi::AnyBuffer q, xffi::AnyBuffer k_cache,
                            xffi::Buffer<xffi::S32> indices, xffi::Buffer<xffi::S32> length,
                            xffi::AnyBuffer extra_k_cache, xffi::Buffer<xffi::S32> extra_indices,
                            xffi::Buffer<xffi::S32> extra_length, xffi::Buffer<xffi::F32> attn_sink,
                            xffi::Result<xffi::AnyBuffer> out,
                            xffi::ResultBuffer<xffi::F32> max_logits,
                            xffi::ResultBuffer<xffi::F32> lse,
                            xffi::Result<xffi::AnyBuffer> partial_out,
                            xffi::ResultBuffer<xffi::F32> partial_stats,
                            xffi::ResultBuffer<xffi::S32> merges, float softmax_scale) {
  SparseAttentionParams params{};
  params.softmax_scale = softmax_scale;
  auto error = Unpack(q, {k_cache, extra_k_cache}, {indices, extra_indices}, {length, extra_length},
                      attn_sink, *out, *max_logits, *lse, &params);
  if (error.failure()) return error;
  if (params.dtype == DType::kF32) {
    return xffi::Error(xffi::ErrorCode::kUnimplemented,
                       std::string(kSparseAttentionTarget) + ": float32 runs on the CPU only");
  }
  if (!HasWorkspace(params.like_dense(), params.partial_row_bytes(), partial_out, partial_stats,
                    merges)) {
    return xffi::Error::InvalidArgument(std::string(kSparseAttentionTarget) +
                                        ": the workspace is too small");
  }
  params.partial_out = partial_out->untyped_data();
  params.partial_stats = partial_stats->typed_data();
  params.merges = merges->typed_data();
  return ToError(kSparseAttentionTarget, sm90::SparseAttention(params, stream));
}

xffi::Error CacheAppend(cudaStream_t stream, xffi::AnyBuffer k_cache, xffi::AnyBuffer new_kv,
                        xffi::Buffer<xffi::S32> block_table, xffi::Buffer<xffi::S32> start,
                        xffi::Buffer<xffi::S32> count, xffi::Buffer<xffi::S32> copy_from,
                        xffi::Result<xffi::AnyBuffer> result) {
  CacheAppendParams params{};
  auto error = Unpack(k_cache, new_kv, block_table, start, count, copy_from, *result, &params);
  if (error.failure()) return error;
  return ToError(kCacheAppendTarget, sm90::CacheAppend(params, stream));
}

xffi::Error IndexTopk(cudaStream_t stream, xffi::AnyBuffer q, xffi::Buffer<xffi::F32> weights,
                      xffi::AnyBuffer index_pages, xffi::Buffer<xffi::S32> block_table,
                      xffi::Buffer<xffi::S32> num_visible, xffi::ResultBuffer<xffi::S32> positions,
                      xffi::ResultBuffer<xffi::U32> scores) {
  IndexTopkParams params{};
  auto error = Unpack(q, weights, index_pages, block_table, num_visible, *positions, &params);
  if (error.failure()) return error;
  const int64_t needed =
      params.batch * params.s * params.max_pages_per_seq * static_cast<int64_t>(kPageSize);
  if (static_cast<int64_t>(scores->element_count()) < needed) {
    return xffi::Error::InvalidArgument(std::string(kIndexTopkTarget) +
                                        ": the workspace is too small");
  }
  params.scores = scores->typed_data();
  return ToError(kIndexTopkTarget, sm90::IndexTopk(params, stream));
}

xffi::Error GroupedMlp(cudaStream_t stream, xffi::AnyBuffer tokens,
                       xffi::Buffer<xffi::S32> expert_of_block, xffi::AnyBuffer gate,
                       xffi::AnyBuffer up, xffi::AnyBuffer down, xffi::Result<xffi::AnyBuffer> out,
                       xffi::Result<xffi::AnyBuffer> act) {
  GroupedMlpParams params{};
  auto error = Unpack(tokens, expert_of_block, gate, up, down, *out, *act, &params);
  if (error.failure()) return error;
  return ToError(kGroupedMlpTarget, sm90::GroupedMlp(params, stream));
}

auto DenseDecodeBinding() {
  return xffi::Ffi::Bind()
      .Ctx<xffi::PlatformStream<cudaStream_t>>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Ret<xffi::AnyBuffer>()
      .Ret<xffi::Buffer<xffi::F32>>()
      .Ret<xffi::AnyBuffer>()
      .Ret<xffi::Buffer<xffi::F32>>()
      .Ret<xffi::Buffer<xffi::S32>>()
      .Attr<float>("softmax_scale")
      .Attr<bool>("causal")
      .Attr<bool>("batch_invariant");
}

auto SparseAttentionBinding() {
  return xffi::Ffi::Bind()
      .Ctx<xffi::PlatformStream<cudaStream_t>>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Arg<xffi::Buffer<xffi::F32>>()
      .Ret<xffi::AnyBuffer>()
      .Ret<xffi::Buffer<xffi::F32>>()
      .Ret<xffi::Buffer<xffi::F32>>()
      .Ret<xffi::AnyBuffer>()
      .Ret<xffi::Buffer<xffi::F32>>()
      .Ret<xffi::Buffer<xffi::S32>>()
      .Attr<float>("softmax_scale");
}

auto CacheAppendBinding() {
  return xffi::Ffi::Bind()
      .Ctx<xffi::PlatformStream<cudaStream_t>>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Ret<xffi::AnyBuffer>();
}

auto GroupedMlpBinding() {
  return xffi::Ffi::Bind()
      .Ctx<xffi::PlatformStream<cudaStream_t>>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::AnyBuffer>()
      .Ret<xffi::AnyBuffer>()
      .Ret<xffi::AnyBuffer>();
}

auto IndexTopkBinding() {
  return xffi::Ffi::Bind()
      .Ctx<xffi::PlatformStream<cudaStream_t>>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::Buffer<xffi::F32>>()
      .Arg<xffi::AnyBuffer>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Arg<xffi::Buffer<xffi::S32>>()
      .Ret<xffi::Buffer<xffi::S32>>()
      .Ret<xffi::Buffer<xffi::U32>>();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DenseDecodeCuda, DenseDecode, DenseDecodeBinding(),
                              {xffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(CacheAppendCuda, CacheAppend, CacheAppendBinding(),
                              {xffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(SparseAttentionCuda, SparseAttention, SparseAttentionBinding(),
                              {xffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(IndexTopkCuda, IndexTopk, IndexTopkBinding(),
                              {xffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(GroupedMlpCuda, GroupedMlp, GroupedMlpBinding(),
                              {xffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(DenseDecodeCudaNoGraph, DenseDecode, DenseDecodeBinding());
XLA_FFI_DEFINE_HANDLER_SYMBOL(CacheAppendCudaNoGraph, CacheAppend, CacheAppendBinding());

}  // namespace flashmla::ffi
