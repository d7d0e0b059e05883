// FFI handlers of the CPU kernels.
#include "cpu/kernels.h"
#include "ffi/handlers.h"
#include "ffi/unpack.h"

namespace flashmla::ffi {
namespace {

ThreadPool Wrap(xffi::ThreadPool& pool) {
  return {pool.num_threads(),
          [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); }};
}

xffi::Error DenseDecode(xffi::ThreadPool pool, xffi::AnyBuffer q, xffi::AnyBuffer k_cache,
                        xffi::Buffer<xffi::S32> block_table, xffi::Buffer<xffi::S32> cache_seqlens,
                        xffi::Result<xffi::AnyBuffer> out, xffi::ResultBuffer<xffi::F32> lse,
                        float softmax_scale, bool causal) {
  DenseDecodeParams params{};
  params.softmax_scale = softmax_scale;
  params.causal = causal;
  auto error = Unpack(q, k_cache, block_table, cache_seqlens, *out, *lse, &params);
  if (error.failure()) return error;
  cpu::DenseDecode(params, Wrap(pool));
  return xffi::Error::Success();
}

xffi::Error CacheAppend(xffi::ThreadPool pool, xffi::AnyBuffer k_cache, xffi::AnyBuffer new_kv,
                        xffi::Buffer<xffi::S32> block_table, xffi::Buffer<xffi::S32> start,
                        xffi::Buffer<xffi::S32> count, xffi::Buffer<xffi::S32> copy_from,
                        xffi::Result<xffi::AnyBuffer> result) {
  CacheAppendParams params{};
  auto error = Unpack(k_cache, new_kv, block_table, start, count, copy_from, *result, &params);
  if (error.failure()) return error;
  cpu::CacheAppend(params, Wrap(pool));
  return xffi::Error::Success();
}

xffi::Error SparseAttention(xffi::ThreadPool pool, xffi::AnyBuffer q, xffi::AnyBuffer k_cache,
                            xffi::Buffer<xffi::S32> indices, xffi::Buffer<xffi::S32> length,
                            xffi::AnyBuffer extra_k_cache, xffi::Buffer<xffi::S32> extra_indices,
                            xffi::Buffer<xffi::S32> extra_length, xffi::Buffer<xffi::F32> attn_sink,
                            xffi::Result<xffi::AnyBuffer> out,
                            xffi::ResultBuffer<xffi::F32> max_logits,
                            xffi::ResultBuffer<xffi::F32> lse, float softmax_scale) {
  SparseAttentionParams params{};
  params.softmax_scale = softmax_scale;
  auto error = Unpack(q, {k_cache, extra_k_cache}, {indices, extra_indices}, {length, extra_length},
                      attn_sink, *out, *max_logits, *lse, &params);
  if (error.failure()) return error;
  cpu::SparseAttention(params, Wrap(pool));
  return xffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(DenseDecodeCpu, DenseDecode,
                              xffi::Ffi::Bind()
                                  .Ctx<xffi::ThreadPool>()
                                  .Arg<xffi::AnyBuffer>()
                                  .Arg<xffi::AnyBuffer>()
                                  .Arg<xffi::Buffer<xffi::S32>>()
                                  .Arg<xffi::Buffer<xffi::S32>>()
                                  .Ret<xffi::AnyBuffer>()
                                  .Ret<xffi::Buffer<xffi::F32>>()
                                  .Attr<float>("softmax_scale")
                                  .Attr<bool>("causal"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(CacheAppendCpu, CacheAppend,
                              xffi::Ffi::Bind()
                                  .Ctx<xffi::ThreadPool>()
                                  .Arg<xffi::AnyBuffer>()
                                  .Arg<xffi::AnyBuffer>()
                                  .Arg<xffi::Buffer<xffi::S32>>()
                                  .Arg<xffi::Buffer<xffi::S32>>()
                                  .Arg<xffi::Buffer<xffi::S32>>()
                                  .Arg<xffi::Buffer<xffi::S32>>()
                                  .Ret<xffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(SparseAttentionCpu, SparseAttention,
                              xffi::Ffi::Bind()
                                  .Ctx<xffi::ThreadPool>()
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
                                  .Attr<float>("softmax_scale"));

}  // namespace flashmla::ffi
