// What crosses from the FFI door to the backends: plain C++, no JAX and no CUDA.
#pragma once

#include <cstdint>
#include <functional>

namespace flashmla {

// The page format. The same numbers stand in flashmla_jax/cache/layout.py; a test compares them.
inline constexpr int kPageSize = 64;   // tokens in a page
inline constexpr int kHeadDim = 576;   // numbers per token, latent and RoPE part: a key
inline constexpr int kHeadDimV = 512;  // of which the first are the latent: a value

// A token in an FP8 page, of one KV head: kHeadDimV e4m3 codes, a float scale for each kFp8Tile of
// them, and the RoPE part in bfloat16.
inline constexpr int kFp8Tile = 128;
inline constexpr int kFp8RopeOffset = kHeadDimV + kHeadDimV / kFp8Tile * 4;
inline constexpr int kFp8TokenBytes = kFp8RopeOffset + (kHeadDim - kHeadDimV) * 2;

// The GPU workspace: bounded by how many thread blocks a Hopper die can hold at once, so that it
// does not grow with the batch. A full GH100 has 144 multiprocessors (132 are enabled on an H100).
inline constexpr int kNarrowRows = 32;      // up to so many query rows, one block does all of them
inline constexpr int kRowTile = 64;         // and of more, so many
inline constexpr int kMaxPartitions = 144;  // KV partitions over the whole grid, at most
inline constexpr int kMergeWords = 16;      // what a partition has to merge

// Batch-invariant decoding cuts every sequence into chunks of so many pages, and longer ones where
// that would be more than kMaxChunks.
inline constexpr int kChunkPages = 32;
inline constexpr int kMaxChunks = 128;

enum class DType { kBF16, kF16, kF32 };

// How many ways the KV tokens are divided when `row_tiles` tiles of query rows read all of them.
constexpr int64_t MaxPartitions(int64_t row_tiles) {
  return row_tiles > 0 && row_tiles <= kMaxPartitions ? kMaxPartitions / row_tiles : 1;
}

struct DenseDecodeParams {
  int64_t batch;
  int64_t s_q;
  int64_t h_q;
  int64_t h_kv;
  int64_t num_pages;
  int64_t max_pages_per_seq;
  float softmax_scale;
  bool causal;
  bool batch_invariant;  // a sequence's result does not depend on the others, to the bit
  bool fp8_cache;        // k_cache has FP8 pages
  DType dtype;

  const void* q;                 // [batch, s_q, h_q, kHeadDim]
  const void* k_cache;           // [num_pages, kPageSize, h_kv, kHeadDim or kFp8TokenBytes]
  const int32_t* block_table;    // [batch, max_pages_per_seq]
  const int32_t* cache_seqlens;  // [batch]
  void* out;                     // [batch, s_q, h_q, kHeadDimV]
  float* lse;                    // [batch, h_q, s_q], natural logarithm

  // GPU workspace: what is used is written before.
  void* partial_out;     // [workspace_slots, tile_rows, kHeadDimV], in single or half precision
  float* partial_stats;  // [workspace_slots, tile_rows, 4]: the lse in base 2, what the columns
                         // below 256 are to be multiplied with, what the others are, and nothing
  int32_t* merges;       // [max_partitions, kMergeWords]

  constexpr int64_t group() const { return h_q / h_kv; }  // query heads that share a KV head
  // Query rows of one sequence and KV head.
  constexpr int64_t rows() const { return s_q * group(); }
  constexpr int64_t tiles_per_head() const { return (rows() + kRowTile - 1) / kRowTile; }
  constexpr int64_t tile_rows() const { return rows() < kRowTile ? rows() : kRowTile; }
  // Partial results of many rows are in half precision, scaled: there is much to write and to read.
  constexpr bool half_partials() const { return rows() > kNarrowRows; }
  // Of few rows over FP8 tokens, a partial result has its columns in another order: in each panel
  // of 64 column 16 j + 2 i + e, for j < 4 and i < 8, is at place 8 i + 2 j + e.
  constexpr bool permuted_partials() const { return fp8_cache && !half_partials(); }
  constexpr int64_t partial_row_bytes() const { return kHeadDimV * (half_partials() ? 2 : 4); }
  constexpr int64_t row_tiles() const { return h_kv * tiles_per_head(); }
  constexpr int64_t max_partitions() const { return MaxPartitions(row_tiles()); }
  // How many chunks a sequence can have, batch-invariantly.
  constexpr int64_t max_chunks() const {
    const int64_t pages = max_pages_per_seq + (s_q - 1) / kPageSize + 1;
    const int64_t chunks = (pages - 1) / kChunkPages + 1;
    return chunks < kMaxChunks ? chunks : kMaxChunks;
  }
  // Partial results: two for each partition of each row tile; batch-invariantly, one for each
  // chunk. None when nothing is divided.
  constexpr int64_t workspace_slots() const {
    const int64_t slots = batch_invariant ? batch * max_chunks() : max_partitions() * 2;
    const bool divided = (batch_invariant ? max_chunks() : max_partitions()) > 1;
    return divided ? row_tiles() * slots : 1;
  }
};

// Tokens of 512 numbers in FP8 pages (sparse attention only): kFp8ApartCodes codes and the RoPE
// part, token after token; behind those of all tokens of the page, kFp8ApartScaleBytes for each, a
// scale in ue8m0 for each kFp8ApartTile codes. A token's value is all of it.
inline constexpr int kFp8ApartDim = 512;
inline constexpr int kFp8ApartTile = 64;
inline constexpr int kFp8ApartScaleBytes = 8;
inline constexpr int kFp8ApartCodes = kFp8ApartDim - (kHeadDim - kHeadDimV);
inline constexpr int kFp8ApartDataBytes = kFp8ApartCodes + (kHeadDim - kHeadDimV) * 2;
inline constexpr int kFp8ApartTokenBytes = kFp8ApartDataBytes + kFp8ApartScaleBytes;

enum class TokenFormat { kNumbers, kFp8, kFp8Apart };

// Tokens of a pool that query tokens name by their places, page * page_size + row.
struct TokenScope {
  int64_t num_pages;
  int64_t page_size;
  int64_t topk;

  const void* pool;        // [num_pages, page_size, head_dim] in the call's format
  const int32_t* indices;  // [batch, s_q, topk]; those outside the pool count as none
  const int32_t* length;   // [batch]: how many of the leftmost count
};

// Attention of each query token to tokens that it names.
struct SparseAttentionParams {
  int64_t batch;
  int64_t s_q;
  int64_t h_q;
  int head_dim;  // kHeadDim or kFp8ApartDim
  float softmax_scale;
  DType dtype;
  TokenFormat format;

  const void* q;           // [batch, s_q, h_q, head_dim]
  TokenScope scopes[2];    // the second one may have no tokens
  const float* attn_sink;  // [h_q]
  void* out;               // [batch, s_q, h_q, kHeadDimV]
  float* max_logits;       // [batch, h_q, s_q]
  float* lse;              // [batch, h_q, s_q], natural logarithm

  // GPU workspace, as that of dense decode. Partial results are in half precision, but for those of
  // few rows over FP8 tokens.
  void* partial_out;
  float* partial_stats;  // in the fourth place the largest score
  int32_t* merges;

  constexpr int64_t queries() const { return batch * s_q; }
  constexpr int64_t listed() const { return scopes[0].topk + scopes[1].topk; }
  // To the Hopper kernels each query token is a sequence.
  constexpr DenseDecodeParams like_dense() const {
    DenseDecodeParams dense{};
    dense.batch = queries();
    dense.s_q = dense.h_kv = 1;
    dense.h_q = h_q;
    dense.softmax_scale = softmax_scale;
    dense.fp8_cache = format == TokenFormat::kFp8;
    dense.dtype = dtype;
    dense.q = q;
    dense.out = out;
    dense.lse = lse;
    dense.partial_out = partial_out;
    dense.partial_stats = partial_stats;
    dense.merges = merges;
    return dense;
  }
  constexpr int64_t partial_row_bytes() const {
    return kHeadDimV * (like_dense().permuted_partials() ? 4 : 2);
  }
};

// Of an indexer's keys, the only size that kernels have; in FP8, a code each, and a float32 scale
// at the beginning of the rest.
inline constexpr int kIndexHeadDim = 128;
inline constexpr int kIndexFp8Bytes = kIndexHeadDim + 16;
inline constexpr int kMaxIndexHeads = 256;

// The cached tokens of the highest scores, for each query token.
struct IndexTopkParams {
  int64_t batch;
  int64_t s;
  int64_t heads;
  int64_t num_pages;
  int64_t max_pages_per_seq;
  int64_t topk;
  DType dtype;
  bool fp8;  // keys are

  const void* q;               // [batch, s, heads, kIndexHeadDim]
  const float* weights;        // [batch, s, heads]
  const void* index_pages;     // [num_pages, kPageSize, kIndexHeadDim or kIndexFp8Bytes]
  const int32_t* block_table;  // [batch, max_pages_per_seq]
  const int32_t* num_visible;  // [batch, s]: of each sequence, the first so many count
  int32_t* positions;          // [batch, s, topk], in their order, and then -1
  uint32_t* scores;            // workspace [batch, s, max_pages_per_seq * kPageSize]
};

// Blocks of rows, each through the gated MLP of its own expert.
struct GroupedMlpParams {
  int64_t blocks;
  int64_t rows;  // of a block: 16, 32, 64 or 128
  int64_t experts;
  int64_t hidden_size;
  int64_t expert_size;
  DType dtype;

  const void* tokens;              // [blocks, rows, hidden_size]
  const int32_t* expert_of_block;  // [blocks]; of those without rows, which come last, no expert's
  const void* gate;                // [experts, expert_size, hidden_size]
  const void* up;
  const void* down;  // [experts, hidden_size, expert_size]
  void* out;         // [blocks, rows, hidden_size]; nothing is written for no expert
  void* act;         // workspace [blocks, rows, expert_size]
};
inline constexpr int kGroupedAlignment = 8;  // of both sizes
inline constexpr int kMaxGroupedSize = 1048576;

inline constexpr int kAppendAlignment = 16;  // bytes

struct CacheAppendParams {
  int64_t batch;
  int64_t num_tokens;  // rows of new_kv per sequence
  int64_t num_pages;
  int64_t max_pages_per_seq;
  int64_t token_bytes;  // of all KV heads; a multiple of kAppendAlignment

  const void* new_kv;          // [batch, num_tokens, token_bytes]
  const int32_t* block_table;  // [batch, max_pages_per_seq]
  const int32_t* start;        // [batch]: position of a sequence's first new token
  const int32_t* count;        // [batch]: how many of its rows are written
  const int32_t* copy_from;    // [batch]: page whose rows before start's come first, or -1
  void* k_cache;               // [num_pages, kPageSize, token_bytes], updated in place
};

// The thread pool a CPU kernel may use. `schedule` runs its argument on some thread, at some time.
struct ThreadPool {
  int64_t num_threads = 1;
  std::function<void(std::function<void()>)> schedule;
};

// How many tokens of a sequence exist, as every backend reads it. A length may exceed what the
// table can hold; the tokens beyond are then read from pages that do not exist, which give NaN:
// loud, safe, and bounded in work.
constexpr int32_t EffectiveLength(int32_t cache_seqlen, int64_t max_pages_per_seq, int64_t s_q) {
  const int64_t tokens = max_pages_per_seq * kPageSize + s_q;
  const int32_t most = tokens < INT32_MAX ? static_cast<int32_t>(tokens) : INT32_MAX;
  return cache_seqlen < 0 ? 0 : (cache_seqlen < most ? cache_seqlen : most);
}

}  // namespace flashmla
