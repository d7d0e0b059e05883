// The FFI handlers of a decoding step of a few tokens: all layers, and the logits.
#include "sm90/few_tokens.h"

#include <cuda_runtime_api.h>

#include <initializer_list>
#include <string>

#include "ffi/handlers.h"
#include "ffi/unpack.h"

namespace flashmla::ffi {
namespace {

// As flashmla_jax/models/few_tokens.py passes them: these, and then those of each layer.
enum Operand {
  kHidden,  // [batch, s, hidden_size]
  kRope,    // [2, batch, s, 32]: cosines and sines
  kBlockTable,
  kCacheSeqlens,
  kNew,  // [3, batch]: where the new tokens start, how many they are, and the page to copy from
  kOperands,
};
// What a layer lacks is empty.
enum LayerOperand {
  kCache,  // of the model's numbers, or FP8 pages of bytes
  kNorm,
  kWQ,
  kQNorm,
  kWQB,
  kWKv,
  kKvNorm,
  kWUk,
  kWUv,
  kWO,
  kMlpNorm,
  kRouter,
  kBias,
  kGate,
  kUp,
  kDown,
  kSharedGate,
  kSharedUp,
  kSharedDown,
  kLayerOperands,
};
// Each layer's cache comes behind these. All but the first are workspace, of all layers.
enum Result {
  kNextHidden,
  kMiddle,
  kQLow,
  kQExpanded,
  kKvRaw,
  kQueries,
  kAttended,
  kLse,
  kPartialOut,
  kPartialStats,
  kMerges,
  kValues,
  kLogits,
  kChosen,
  kAct,
  kResults,
};

// The buffers of a call. The first one at fault is remembered.
class Buffers {
 public:
  Buffers(const char* target, xffi::RemainingArgs operands, xffi::RemainingRets results)
      : target_(target), operands_(operands), results_(results) {}

  // An operand, or an empty one, of any type.
  xffi::AnyBuffer Operand(int i) {
    const auto buffer = operands_.get<xffi::AnyBuffer>(i);
    if (buffer.has_value()) return *buffer;
    Fail("operand " + std::to_string(i) + " is missing");
    static XLA_FFI_Buffer none{};
    return xffi::AnyBuffer(&none);
  }
  int64_t Size(int i) { return Operand(i).element_count(); }
  int64_t Dimension(int i, size_t axis) {
    const auto dimensions = Operand(i).dimensions();
    if (axis < dimensions.size()) return dimensions[axis];
    Fail("operand " + std::to_string(i) + " has too few axes");
    return 0;
  }

  template <typename T = void>
  const T* In(int i, xffi::DataType type, int64_t size) {
    const auto buffer = Operand(i);
    Check("operand ", i, buffer, type, size);
    return static_cast<const T*>(buffer.untyped_data());
  }
  template <typename T = void>
  T* Out(int i, xffi::DataType type, int64_t size) {
    auto result = results_.get<xffi::AnyBuffer>(i);
    if (!result.has_value()) {
      Fail("result " + std::to_string(i) + " is missing");
      return nullptr;
    }
    const xffi::AnyBuffer buffer = **result;
    Check("result ", i, buffer, type, size, /*at_least=*/true);
    return static_cast<T*>(buffer.untyped_data());
  }

  // Numbers of rows and steps fit into 31 bits.
  void CheckSizes(std::initializer_list<int64_t> sizes) {
    for (const int64_t n : sizes) {
      if (n > 0 && n <= sm90::kMaxFewSize && n % sm90::kFewAlignment == 0) continue;
      Fail("sizes must be multiples of 64 and at most 2^20, got " + std::to_string(n));
    }
  }
  // The first operand: hidden states of so many tokens, of so many numbers each.
  sm90::FewTokens Hidden(int64_t tokens, int64_t size) {
    const auto dtype = ToDType(Operand(0).element_type());
    if (!dtype || *dtype == DType::kF32) Fail("hidden must be bfloat16 or float16");
    if (tokens < 1 || tokens > sm90::kMaxFewTokens) Fail("too many tokens, or none");
    CheckSizes({size});
    return {dtype.value_or(DType::kF32), static_cast<int>(tokens), static_cast<int>(size)};
  }

  void Fail(const std::string& what) {
    if (error_.empty()) error_ = target_ + ": " + what;
  }
  xffi::Error error() const {
    return error_.empty() ? xffi::Error::Success() : xffi::Error::InvalidArgument(error_);
  }

 private:
  void Check(const char* kind, int i, const xffi::AnyBuffer& buffer, xffi::DataType type,
             int64_t size, bool at_least = false) {
    const auto actual = static_cast<int64_t>(buffer.element_count());
    if (buffer.element_type() != type || actual < size || (actual > size && !at_least)) {
      Fail(kind + std::to_string(i) + " must hold " + std::to_string(size) +
           " numbers of the right type, got " + Describe("", buffer));
    }
    if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16 != 0) {
      Fail(kind + std::to_string(i) + " must be aligned to 16 bytes");
    }
  }

  std::string target_;
  xffi::RemainingArgs operands_;
  xffi::RemainingRets results_;
  std::string error_;
};

xffi::Error FewTokens(cudaStream_t stream, xffi::RemainingArgs operands,
                      xffi::RemainingRets results, int32_t num_layers, int32_t heads, int32_t v_dim,
                      float softmax_scale, float norm_eps, float latent_eps,
                      int32_t experts_per_token, bool sigmoid, bool normalize, int32_t groups,
                      int32_t groups_chosen, int32_t group_best, float scale) {
  Buffers buffers(kFewTokensTarget, operands, results);
  constexpr auto kF32 = xffi::DataType::F32;
  constexpr auto kS32 = xffi::DataType::S32;
  const auto type = buffers.Operand(kHidden).element_type();
  const int64_t batch = buffers.Dimension(kHidden, 0), s = buffers.Dimension(kHidden, 1);
  const int64_t size = buffers.Dimension(kHidden, 2), tokens = batch * s;
  // What is the same in all layers
  const sm90::FewTokens step = buffers.Hidden(tokens, size);
  buffers.CheckSizes({v_dim});
  if (heads < 1 || heads > sm90::kMaxFewHeads) {
    buffers.Fail("heads must be 1 to " + std::to_string(sm90::kMaxFewHeads));
  }
  if (num_layers < 1) buffers.Fail("no layers");
  if (buffers.error().failure()) return buffers.error();

  sm90::ProjectParams project{step};
  project.heads = heads;
  project.norm_eps = norm_eps;
  project.latent_eps = latent_eps;
  project.cos = buffers.In<float>(kRope, kF32, tokens * sm90::kRopeDim);
  project.sin = project.cos + tokens * sm90::kRopeDim / 2;
  project.q = buffers.Out(kQueries, type, tokens * heads * kHeadDim);
  project.q_expanded = buffers.Out(kQExpanded, type, tokens * heads * sm90::kQueryDim);
  project.kv_raw = buffers.Out(kKvRaw, type, tokens * kHeadDim);
  CacheAppendParams& kv = project.kv;
  kv.batch = batch;
  kv.num_tokens = s;
  kv.max_pages_per_seq = buffers.Dimension(kBlockTable, 1);
  const auto cache_type = buffers.Operand(kOperands + kCache).element_type();
  project.fp8_cache = cache_type == xffi::DataType::U8;
  if (project.fp8_cache && step.dtype != DType::kBF16) {
    buffers.Fail("FP8 pages are for bfloat16");
  }
  kv.token_bytes = project.fp8_cache ? kFp8TokenBytes : kHeadDim * Bytes(step.dtype);
  kv.block_table = buffers.In<int32_t>(kBlockTable, kS32, batch * kv.max_pages_per_seq);
  kv.start = buffers.In<int32_t>(kNew, kS32, 3 * batch);
  kv.count = kv.start + batch;
  kv.copy_from = kv.count + batch;

  DenseDecodeParams attention{};
  attention.batch = batch;
  attention.s_q = s;
  attention.h_q = heads;
  attention.h_kv = 1;
  attention.max_pages_per_seq = kv.max_pages_per_seq;
  attention.softmax_scale = softmax_scale;
  attention.causal = true;
  attention.fp8_cache = project.fp8_cache;
  attention.dtype = step.dtype;
  attention.q = project.q;
  attention.block_table = kv.block_table;
  attention.cache_seqlens = buffers.In<int32_t>(kCacheSeqlens, kS32, batch);
  attention.out = buffers.Out(kAttended, type, tokens * heads * kHeadDimV);
  attention.lse = buffers.Out<float>(kLse, kF32, tokens * heads);
  const int64_t partial_rows = attention.workspace_slots() * attention.tile_rows();
  attention.partial_out =
      buffers.Out(kPartialOut, attention.half_partials() ? xffi::DataType::F16 : kF32,
                  partial_rows * kHeadDimV);
  attention.partial_stats = buffers.Out<float>(kPartialStats, kF32, partial_rows * 4);
  attention.merges = buffers.Out<int32_t>(kMerges, kS32, attention.max_partitions() * kMergeWords);

  sm90::OutputParams output{step};
  output.heads = heads;
  output.v_dim = v_dim;
  output.values = buffers.Out(kValues, type, tokens * heads * v_dim);
  output.out = buffers.Out(kMiddle, type, tokens * size);

  sm90::MlpParams mlp{step};
  mlp.norm_eps = norm_eps;
  mlp.router = {sigmoid, normalize, groups, groups_chosen, group_best, scale};
  mlp.hidden = output.out;
  mlp.out = buffers.Out(kNextHidden, type, tokens * size);

  const void* hidden = buffers.In(kHidden, type, tokens * size);
  // Nothing is launched before all layers have been checked.
  for (const bool launch : {false, true}) {
    for (int layer = 0; layer < num_layers; ++layer) {
      const int at = kOperands + layer * kLayerOperands;

      const int64_t q_rank = buffers.Size(at + kQNorm);
      const int64_t queries = int64_t{heads} * sm90::kQueryDim;
      if (q_rank > 0) buffers.CheckSizes({q_rank});
      project.q_rank = static_cast<int>(q_rank);
      project.hidden = layer == 0 ? hidden : mlp.out;
      project.norm = buffers.In(at + kNorm, type, size);
      project.w_q = buffers.In(at + kWQ, type, (q_rank > 0 ? q_rank : queries) * size);
      project.q_norm = buffers.In(at + kQNorm, type, q_rank);
      project.w_q_b = buffers.In(at + kWQB, type, q_rank > 0 ? queries * q_rank : 0);
      project.w_kv = buffers.In(at + kWKv, type, kHeadDim * size);
      project.kv_norm = buffers.In(at + kKvNorm, type, kHeadDimV);
      project.w_uk = buffers.In(at + kWUk, type, int64_t{heads} * kHeadDimV * sm90::kNopeDim);
      project.q_low = buffers.Out(kQLow, type, tokens * q_rank);
      kv.num_pages = buffers.Dimension(at + kCache, 0);
      const auto pool_type = project.fp8_cache ? xffi::DataType::U8 : type;
      const int64_t pool =
          kv.num_pages * kPageSize * (project.fp8_cache ? kFp8TokenBytes : kHeadDim);
      kv.k_cache = buffers.Out(kResults + layer, pool_type, pool);
      if (buffers.In(at + kCache, pool_type, pool) != kv.k_cache) {
        buffers.Fail("the cache was not aliased to the result");
      }
      attention.num_pages = kv.num_pages;
      attention.k_cache = kv.k_cache;
      output.attention = attention;

      output.w_uv = buffers.In(at + kWUv, type, int64_t{heads} * v_dim * kHeadDimV);
      output.w_o = buffers.In(at + kWO, type, size * heads * v_dim);
      output.hidden = project.hidden;

      const int64_t experts = buffers.Size(at + kRouter) / size;
      const int64_t expert_size = experts > 0 ? buffers.Dimension(at + kGate, 1) : 0;
      const int64_t shared_size = buffers.Size(at + kSharedGate) / size;
      const int64_t chosen = experts > 0 ? experts_per_token : 0;
      if (experts > 0) buffers.CheckSizes({expert_size});
      if (shared_size > 0) buffers.CheckSizes({shared_size});
      if (experts > sm90::kMaxExperts || chosen > sm90::kMaxExpertsPerToken || chosen > experts ||
          (experts > 0 && (chosen < 1 || groups < 1 || groups > sm90::kMaxExpertGroups ||
                           experts % groups != 0))) {
        buffers.Fail("too many experts, or groups that do not divide them");
      }
      mlp.experts = static_cast<int>(experts);
      mlp.expert_size = static_cast<int>(expert_size);
      mlp.experts_per_token = static_cast<int>(chosen);
      mlp.shared_size = static_cast<int>(shared_size);
      mlp.norm = buffers.In(at + kMlpNorm, type, size);
      mlp.w_router = buffers.In<float>(at + kRouter, kF32, experts * size);
      const bool biased = buffers.Size(at + kBias) > 0;
      mlp.bias = biased ? buffers.In<float>(at + kBias, kF32, experts) : nullptr;
      mlp.gate = buffers.In(at + kGate, type, experts * expert_size * size);
      mlp.up = buffers.In(at + kUp, type, experts * expert_size * size);
      mlp.down = buffers.In(at + kDown, type, experts * size * expert_size);
      mlp.shared_gate = buffers.In(at + kSharedGate, type, shared_size * size);
      mlp.shared_up = buffers.In(at + kSharedUp, type, shared_size * size);
      mlp.shared_down = buffers.In(at + kSharedDown, type, size * shared_size);
      mlp.logits = buffers.Out<float>(kLogits, kF32, tokens * experts);
      mlp.chosen = buffers.Out<int32_t>(kChosen, kS32, tokens * chosen);
      mlp.act = buffers.Out(kAct, type, tokens * mlp.act_size());

      if (buffers.error().failure()) return buffers.error();
      if (!launch) continue;
      sm90::Status status = sm90::FewProject(project, layer == 0, stream);
      if (status.ok()) status = sm90::DenseDecodeParts(attention, stream, &output.partitions);
      if (status.ok()) status = sm90::FewOutput(output, stream);
      if (status.ok()) status = sm90::FewMlp(mlp, stream);
      if (status.ok()) continue;
      return xffi::Error::Internal(std::string(kFewTokensTarget) + ": " + status.message);
    }
  }
  return xffi::Error::Success();
}

// Of hidden [..., hidden_size] and weights [vocab_size, hidden_size], logits [..., vocab_size].
xffi::Error FewLogits(cudaStream_t stream, xffi::RemainingArgs operands,
                      xffi::RemainingRets results) {
  Buffers buffers(kFewLogitsTarget, operands, results);
  const auto type = buffers.Operand(0).element_type();
  const int64_t vocab_size = buffers.Dimension(1, 0), size = buffers.Dimension(1, 1);
  const auto hidden = buffers.Operand(0).dimensions();
  if (hidden.size() == 0 || hidden.back() != size) {
    buffers.Fail("hidden must have the weights' " + std::to_string(size) + " columns");
  }
  const int64_t tokens = size > 0 ? buffers.Size(0) / size : 0;
  const sm90::FewTokens step = buffers.Hidden(tokens, size);
  buffers.CheckSizes({vocab_size});
  if (buffers.error().failure()) return buffers.error();
  const sm90::LogitsParams logits{
      step,
      static_cast<int>(vocab_size),
      buffers.In(0, type, tokens * size),
      buffers.In(1, type, vocab_size * size),
      buffers.Out<float>(0, xffi::DataType::F32, tokens * vocab_size),
  };
  if (buffers.error().failure()) return buffers.error();
  const sm90::Status status = sm90::FewLogits(logits, stream);
  if (status.ok()) return xffi::Error::Success();
  return xffi::Error::Internal(std::string(kFewLogitsTarget) + ": " + status.message);
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(FewTokensCuda, FewTokens,
                              xffi::Ffi::Bind()
                                  .Ctx<xffi::PlatformStream<cudaStream_t>>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int32_t>("num_layers")
                                  .Attr<int32_t>("heads")
                                  .Attr<int32_t>("v_dim")
                                  .Attr<float>("softmax_scale")
                                  .Attr<float>("norm_eps")
                                  .Attr<float>("latent_eps")
                                  .Attr<int32_t>("experts_per_token")
                                  .Attr<bool>("sigmoid")
                                  .Attr<bool>("normalize")
                                  .Attr<int32_t>("groups")
                                  .Attr<int32_t>("groups_chosen")
                                  .Attr<int32_t>("group_best")
                                  .Attr<float>("scale"),
                              {xffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    FewLogitsCuda, FewLogits,
    xffi::Ffi::Bind().Ctx<xffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets(),
    {xffi::Traits::kCmdBufferCompatible});

}  // namespace flashmla::ffi
