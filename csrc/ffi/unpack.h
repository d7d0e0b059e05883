// Buffers in, parameter structs out. The checks that protect memory are made here once, for every
// backend; Python has made them before, with better messages.
#pragma once

#include <optional>
#include <string>

#include "ffi/handlers.h"
#include "params.h"
#include "xla/ffi/api/ffi.h"

namespace flashmla::ffi {

namespace xffi = ::xla::ffi;

inline std::optional<DType> ToDType(xffi::DataType type) {
  switch (type) {
    case xffi::DataType::BF16:
      return DType::kBF16;
    case xffi::DataType::F16:
      return DType::kF16;
    case xffi::DataType::F32:
      return DType::kF32;
    default:
      return std::nullopt;
  }
}

inline int64_t Bytes(DType type) { return type == DType::kF32 ? 4 : 2; }

inline bool HasShape(const xffi::AnyBuffer& buffer, std::initializer_list<int64_t> shape) {
  const auto dims = buffer.dimensions();
  return dims.size() == shape.size() && std::equal(dims.begin(), dims.end(), shape.begin());
}

inline std::string Describe(const char* name, const xffi::AnyBuffer& buffer) {
  std::string text = std::string(name) + " [";
  for (size_t i = 0; i < buffer.dimensions().size(); ++i) {
    text += (i ? ", " : "") + std::to_string(buffer.dimensions()[i]);
  }
  return text + "]";
}

// Fills the tensors and sizes of a dense decode call; an error names the buffer at fault.
inline xffi::Error Unpack(xffi::AnyBuffer q, xffi::AnyBuffer k_cache,
                          xffi::Buffer<xffi::S32> block_table,
                          xffi::Buffer<xffi::S32> cache_seqlens, xffi::AnyBuffer out,
                          xffi::Buffer<xffi::F32> lse, DenseDecodeParams* p) {
  const auto bad = [](const std::string& what) {
    return xffi::Error::InvalidArgument(std::string(kDenseDecodeTarget) + ": " + what);
  };
  if (q.dimensions().size() != 4 || q.dimensions()[3] != kHeadDim) {
    return bad("expected q [batch, s_q, h_q, 576], got " + Describe("q", q));
  }
  p->fp8_cache = k_cache.element_type() == xffi::DataType::U8;
  const int64_t token = p->fp8_cache ? kFp8TokenBytes : kHeadDim;
  if (k_cache.dimensions().size() != 4 || k_cache.dimensions()[1] != kPageSize ||
      k_cache.dimensions()[3] != token) {
    return bad("expected k_cache [num_pages, 64, h_kv, " + std::to_string(token) + "], got " +
               Describe("k_cache", k_cache));
  }
  if (block_table.dimensions().size() != 2) {
    return bad("expected block_table [batch, max_pages_per_seq]");
  }
  p->batch = q.dimensions()[0];
  p->s_q = q.dimensions()[1];
  p->h_q = q.dimensions()[2];
  p->num_pages = k_cache.dimensions()[0];
  p->h_kv = k_cache.dimensions()[2];
  p->max_pages_per_seq = block_table.dimensions()[1];
  const auto dtype = ToDType(q.element_type());
  if (!dtype || (k_cache.element_type() != q.element_type() && !p->fp8_cache) ||
      out.element_type() != q.element_type()) {
    return bad("q, k_cache and out must share one of bfloat16, float16, float32");
  }
  if (p->fp8_cache && *dtype == DType::kF16) return bad("float16 is not for FP8 caches");
  if (p->s_q < 1 || p->h_q < 1) {
    return bad("q must hold a token and a head, got " + Describe("q", q));
  }
  if (p->h_kv < 1 || p->h_q % p->h_kv != 0) {
    return bad("h_q must be a multiple of h_kv, got " + Describe("q", q) + " and " +
               Describe("k_cache", k_cache));
  }
  if (p->num_pages < 1 || p->max_pages_per_seq < 1) {
    return bad("k_cache and block_table must hold at least one page");
  }
  if (block_table.dimensions()[0] != p->batch || cache_seqlens.dimensions().size() != 1 ||
      cache_seqlens.dimensions()[0] != p->batch) {
    return bad("block_table and cache_seqlens must have q's batch size");
  }
  if (!HasShape(out, {p->batch, p->s_q, p->h_q, kHeadDimV})) {
    return bad("expected out [batch, s_q, h_q, 512], got " + Describe("out", out));
  }
  const auto lse_dims = lse.dimensions();
  if (lse_dims.size() != 3 || lse_dims[0] != p->batch || lse_dims[1] != p->h_q ||
      lse_dims[2] != p->s_q) {
    return bad("expected lse [batch, h_q, s_q]");
  }
  p->dtype = *dtype;
  p->q = q.untyped_data();
  p->k_cache = k_cache.untyped_data();
  p->block_table = block_table.typed_data();
  p->cache_seqlens = cache_seqlens.typed_data();
  p->out = out.untyped_data();
  p->lse = lse.typed_data();
  return xffi::Error::Success();
}

inline xffi::Error Unpack(xffi::AnyBuffer k_cache, xffi::AnyBuffer new_kv,
                          xffi::Buffer<xffi::S32> block_table, xffi::Buffer<xffi::S32> start,
                          xffi::Buffer<xffi::S32> count, xffi::Buffer<xffi::S32> copy_from,
                          xffi::AnyBuffer result, CacheAppendParams* p) {
  const auto bad = [](const std::string& what) {
    return xffi::Error::InvalidArgument(std::string(kCacheAppendTarget) + ": " + what);
  };
  // Pools may stand in an array of pools, whose pages count through.
  const auto cache = k_cache.dimensions();
  const auto rows = new_kv.dimensions();
  const size_t rank = cache.size();
  const int64_t head_bytes =
      rank < 4 ? 0 : cache[rank - 1] * static_cast<int64_t>(ByteWidth(k_cache.element_type()));
  if (rank < 4 || cache[rank - 3] != kPageSize || head_bytes % kAppendAlignment != 0) {
    return bad("expected k_cache [..., num_pages, 64, h_kv, multiples of 16 bytes], got " +
               Describe("k_cache", k_cache));
  }
  if (rows.size() != 4 || rows[2] != cache[rank - 2] || rows[3] != cache[rank - 1]) {
    return bad("expected new_kv [batch, num_tokens, and k_cache's last two axes], got " +
               Describe("new_kv", new_kv));
  }
  if (new_kv.element_type() != k_cache.element_type() ||
      result.element_type() != k_cache.element_type() || result.dimensions() != cache) {
    return bad("k_cache, new_kv and the result must share one type");
  }
  p->batch = rows[0];
  p->num_tokens = rows[1];
  p->num_pages = 1;
  for (size_t i = 0; i + 3 < rank; ++i) p->num_pages *= cache[i];
  p->token_bytes = cache[rank - 2] * head_bytes;
  if (block_table.dimensions().size() != 2 || block_table.dimensions()[0] != p->batch ||
      start.dimensions().size() != 1 || start.dimensions()[0] != p->batch ||
      count.dimensions().size() != 1 || count.dimensions()[0] != p->batch ||
      copy_from.dimensions().size() != 1 || copy_from.dimensions()[0] != p->batch) {
    return bad("block_table, start, count and copy_from must have new_kv's batch size");
  }
  p->max_pages_per_seq = block_table.dimensions()[1];
  p->new_kv = new_kv.untyped_data();
  p->block_table = block_table.typed_data();
  p->start = start.typed_data();
  p->count = count.typed_data();
  p->copy_from = copy_from.typed_data();
  p->k_cache = result.untyped_data();
  // The result is the operand's own buffer: XLA makes the copy, where one is needed, before us.
  if (result.untyped_data() != k_cache.untyped_data()) {
    return xffi::Error::Internal(std::string(kCacheAppendTarget) +
                                 ": the cache was not aliased to the result");
  }
  return xffi::Error::Success();
}

// A pool of a sparse attention call, and what is read of it.
inline xffi::Error Unpack(xffi::AnyBuffer pool, xffi::Buffer<xffi::S32> indices,
                          xffi::Buffer<xffi::S32> length, const SparseAttentionParams& p,
                          TokenFormat* format, TokenScope* scope) {
  const auto bad = [](const std::string& what) {
    return xffi::Error::InvalidArgument(std::string(kSparseAttentionTarget) + ": " + what);
  };
  const auto dims = pool.dimensions();
  const bool is_fp8 = pool.element_type() == xffi::DataType::U8;
  const bool apart = is_fp8 && p.head_dim == kFp8ApartDim;
  const int64_t token = apart ? kFp8ApartTokenBytes : is_fp8 ? kFp8TokenBytes : p.head_dim;
  if (dims.size() != 4 || dims[1] < 1 || dims[2] != 1 || dims[3] != token) {
    return bad("expected pools [num_pages, page_size, 1, " + std::to_string(token) + "], got " +
               Describe("k_cache", pool));
  }
  if (!is_fp8 && ToDType(pool.element_type()) != p.dtype) {
    return bad("q and pools must share one of bfloat16, float16, float32");
  }
  if (is_fp8 && p.dtype == DType::kF16) return bad("float16 is not for FP8 caches");
  const auto listed = indices.dimensions();
  if (listed.size() != 3 || listed[0] != p.batch || listed[1] != p.s_q ||
      length.dimensions().size() != 1 || length.dimensions()[0] != p.batch) {
    return bad("expected indices [batch, s_q, topk] and a length [batch]");
  }
  *format = apart ? TokenFormat::kFp8Apart : is_fp8 ? TokenFormat::kFp8 : TokenFormat::kNumbers;
  *scope = {
      dims[0], dims[1], listed[2], pool.untyped_data(), indices.typed_data(), length.typed_data()};
  return xffi::Error::Success();
}

// All of such a call.
inline xffi::Error Unpack(xffi::AnyBuffer q, const xffi::AnyBuffer (&pools)[2],
                          const xffi::Buffer<xffi::S32> (&indices)[2],
                          const xffi::Buffer<xffi::S32> (&lengths)[2],
                          xffi::Buffer<xffi::F32> attn_sink, xffi::AnyBuffer out,
                          xffi::Buffer<xffi::F32> max_logits, xffi::Buffer<xffi::F32> lse,
                          SparseAttentionParams* p) {
  const auto bad = [](const std::string& what) {
    return xffi::Error::InvalidArgument(std::string(kSparseAttentionTarget) + ": " + what);
  };
  const auto dims = q.dimensions();
  const auto dtype = ToDType(q.element_type());
  if (dims.size() != 4 || (dims[3] != kHeadDim && dims[3] != kFp8ApartDim) || dims[1] < 1 ||
      dims[2] < 1 || !dtype) {
    return bad("expected q [batch, s_q, h_q, 576 or 512], got " + Describe("q", q));
  }
  p->batch = dims[0];
  p->s_q = dims[1];
  p->h_q = dims[2];
  p->head_dim = static_cast<int>(dims[3]);
  p->dtype = *dtype;
  TokenFormat formats[2];
  for (int i = 0; i < 2; ++i) {
    auto error = Unpack(pools[i], indices[i], lengths[i], *p, &formats[i], &p->scopes[i]);
    if (error.failure()) return error;
  }
  if (formats[0] != formats[1]) return bad("both pools must have one format");
  p->format = formats[0];
  const auto is_per_row = [&](const xffi::Buffer<xffi::F32>& buffer) {
    const auto d = buffer.dimensions();
    return d.size() == 3 && d[0] == p->batch && d[1] == p->h_q && d[2] == p->s_q;
  };
  if (out.element_type() != q.element_type() ||
      !HasShape(out, {p->batch, p->s_q, p->h_q, kHeadDimV}) || !is_per_row(max_logits) ||
      !is_per_row(lse)) {
    return bad("expected out [batch, s_q, h_q, 512] like q, max_logits and lse [batch, h_q, s_q]");
  }
  if (attn_sink.dimensions().size() != 1 || attn_sink.dimensions()[0] != p->h_q) {
    return bad("expected attn_sink [h_q]");
  }
  p->q = q.untyped_data();
  p->attn_sink = attn_sink.typed_data();
  p->out = out.untyped_data();
  p->max_logits = max_logits.typed_data();
  p->lse = lse.typed_data();
  return xffi::Error::Success();
}

// Of the routed experts, on a GPU.
inline xffi::Error Unpack(xffi::AnyBuffer tokens, xffi::Buffer<xffi::S32> expert_of_block,
                          xffi::AnyBuffer gate, xffi::AnyBuffer up, xffi::AnyBuffer down,
                          xffi::AnyBuffer out, xffi::AnyBuffer act, GroupedMlpParams* p) {
  const auto bad = [](const std::string& what) {
    return xffi::Error::InvalidArgument(std::string(kGroupedMlpTarget) + ": " + what);
  };
  const auto dims = tokens.dimensions();
  const auto dtype = ToDType(tokens.element_type());
  if (dims.size() != 3) {
    return bad("expected tokens [blocks, rows, hidden], got " + Describe("tokens", tokens));
  }
  if (!dtype || *dtype == DType::kF32) return bad("tokens must be bfloat16 or float16");
  if (gate.dimensions().size() != 3) {
    return bad("expected gate [experts, size, hidden], got " + Describe("gate", gate));
  }
  p->dtype = *dtype;
  p->blocks = dims[0];
  p->rows = dims[1];
  p->hidden_size = dims[2];
  p->experts = gate.dimensions()[0];
  p->expert_size = gate.dimensions()[1];
  const auto check = [&](const char* name, const xffi::AnyBuffer& buffer,
                         std::initializer_list<int64_t> shape) {
    const bool same = buffer.element_type() == tokens.element_type() && HasShape(buffer, shape);
    return same ? std::string() : Describe(name, buffer);
  };
  const int64_t experts = p->experts, size = p->expert_size, hidden = p->hidden_size;
  for (const std::string& wrong :
       {check("gate", gate, {experts, size, hidden}), check("up", up, {experts, size, hidden}),
        check("down", down, {experts, hidden, size}),
        check("out", out, {p->blocks, p->rows, hidden}),
        check("act", act, {p->blocks, p->rows, size})}) {
    if (wrong.empty()) continue;
    return bad("beside " + Describe("tokens", tokens) + " and " + Describe("gate", gate) +
               ", all of one type, unexpected " + wrong);
  }
  const auto owners = expert_of_block.dimensions();
  if (owners.size() != 1 || owners[0] != p->blocks) {
    return bad("expected expert_of_block [blocks]");
  }
  p->tokens = tokens.untyped_data();
  p->expert_of_block = expert_of_block.typed_data();
  p->gate = gate.untyped_data();
  p->up = up.untyped_data();
  p->down = down.untyped_data();
  p->out = out.untyped_data();
  p->act = act.untyped_data();
  return xffi::Error::Success();
}

// Of the kernels for an indexer, which are for a GPU.
inline xffi::Error Unpack(xffi::AnyBuffer q, xffi::Buffer<xffi::F32> weights,
                          xffi::AnyBuffer index_pages, xffi::Buffer<xffi::S32> block_table,
                          xffi::Buffer<xffi::S32> num_visible, xffi::Buffer<xffi::S32> positions,
                          IndexTopkParams* p) {
  const auto bad = [](const std::string& what) {
    return xffi::Error::InvalidArgument(std::string(kIndexTopkTarget) + ": " + what);
  };
  const auto dims = q.dimensions();
  if (dims.size() != 4 || dims[3] != kIndexHeadDim || dims[2] < 1 || dims[2] > kMaxIndexHeads) {
    return bad("expected q [batch, s, 1 to " + std::to_string(kMaxIndexHeads) +
               " heads, 128], got " + Describe("q", q));
  }
  p->batch = dims[0];
  p->s = dims[1];
  p->heads = dims[2];
  const auto dtype = ToDType(q.element_type());
  p->fp8 = index_pages.element_type() == xffi::DataType::U8;
  if (!dtype || *dtype == DType::kF32 ||
      (!p->fp8 && index_pages.element_type() != q.element_type())) {
    return bad("q must be bfloat16 or float16, and index_pages like it or FP8");
  }
  p->dtype = *dtype;
  const auto pool = index_pages.dimensions();
  const int64_t key = p->fp8 ? kIndexFp8Bytes : kIndexHeadDim;
  if (pool.size() != 4 || pool[0] < 1 || pool[1] != kPageSize || pool[2] != 1 || pool[3] != key) {
    return bad("expected index_pages [num_pages, 64, 1, " + std::to_string(key) + "], got " +
               Describe("index_pages", index_pages));
  }
  p->num_pages = pool[0];
  const auto table = block_table.dimensions();
  if (table.size() != 2 || table[0] != p->batch || table[1] < 1) {
    return bad("expected block_table [batch, max_pages_per_seq]");
  }
  p->max_pages_per_seq = table[1];
  const auto chosen = positions.dimensions();
  const auto is_rows = [&](auto rows) { return rows[0] == p->batch && rows[1] == p->s; };
  if (weights.dimensions().size() != 3 || !is_rows(weights.dimensions()) ||
      weights.dimensions()[2] != p->heads) {
    return bad("expected weights [batch, s, heads]");
  }
  if (num_visible.dimensions().size() != 2 || !is_rows(num_visible.dimensions())) {
    return bad("expected num_visible [batch, s]");
  }
  if (chosen.size() != 3 || !is_rows(chosen)) return bad("expected positions [batch, s, topk]");
  p->topk = chosen[2];
  p->q = q.untyped_data();
  p->weights = weights.typed_data();
  p->index_pages = index_pages.untyped_data();
  p->block_table = block_table.typed_data();
  p->num_visible = num_visible.typed_data();
  p->positions = positions.typed_data();
  return xffi::Error::Success();
}

}  // namespace flashmla::ffi
