// Where a block's tokens are, for the warps that bring them to shared memory themselves: in FP8
// pages, or wherever a query token's list says.
#pragma once

#include <cstdint>
#include <type_traits>

#include "params.h"
#include "sm90/attention/call.cuh"
#include "sm90/attention/common.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {

// Of a block each of four warps has so many tokens. Some lanes of a warp share a token, and have a
// few of the warp's tokens one after the other:
//
//   FP8      4 lanes,  tokens lane / 4 and lane / 4 + 8
//   numbers  8 lanes,  tokens lane / 8 + 4 i for i = 0 .. 3
//
// Eight lanes that write to shared memory together then write to different banks.
inline constexpr int kTokensEach = kPageSize / 4;
template <bool kFp8>
struct Lanes {
  static constexpr int kPerToken = kFp8 ? 4 : 8;
  static constexpr int kTokens = kTokensEach * kPerToken / 32;  // of a lane
  static constexpr int kStep = 32 / kPerToken;                  // from one to the next

  static __device__ __forceinline__ int Token(int i) {
    return threadIdx.x % 32 / kPerToken + i * kStep;
  }
  static __device__ __forceinline__ int Part() { return threadIdx.x % kPerToken; }

  // Which of a warp's tokens exist is one word: of a token's lanes, the i-th says it of the lane's
  // i-th token; others are set. This moves it so that of the columns column + {0, 1} and
  // column + 8 + {0, 1}, where column is twice a lane's place among four, the first's bit is the
  // lowest one,
  static __device__ __forceinline__ uint32_t FromColumn(uint32_t word) {
    const int lane = threadIdx.x % 4;
    return word >> (kFp8 ? lane * 8 : lane % 2 * 16 + lane / 2);
  }
  // and these are the others'.
  static constexpr int Bit(int second, int next_eight) {
    return kFp8 ? 4 * second + next_eight : 8 * second + 2 * next_eight;
  }

  // A token's bytes to the L2 cache, by its lanes.
  static __device__ __forceinline__ void Prefetch(const uint8_t* token, int bytes) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      ptx::PrefetchL2(token + min((Part() + i * kPerToken) * 128, bytes - 1));
    }
  }
};

// Where a token is, and its scales if they are elsewhere.
template <TokenFormat kFormat>
struct TokenAddress {
  const uint8_t* token;
};
template <>
struct TokenAddress<TokenFormat::kFp8Apart> {
  const uint8_t* token;
  const uint8_t* scales;
};

// What such a warp seldom needs to know, kept in shared memory: its registers hold tokens.
template <TokenFormat kFormat>
struct Walk {
  Range rest;                                 // of the warp's range
  int counts[2];                              // of the places in both lists of a query token
  TokenAddress<kFormat> tokens[kTokensEach];  // of a block

  // By all lanes.
  __device__ void Begin(const Range& range) {
    if (threadIdx.x % 32 == 0) rest = range;
    __syncwarp();
  }
  template <typename Call>
  __device__ __forceinline__ bool Next(const Call& p, const RowTile& tile, Segment* s) {
    const Range range = rest;
    Segments segments(p, tile, range);
    const bool found = segments.Next(s);
    __syncwarp();
    if (threadIdx.x % 32 == 0) rest.batch = segments.batch(), rest.block = segments.block();
    __syncwarp();
    return found;
  }
};

// What is read in place of a token that does not exist: NaN in FP8 pages, and zeros where a mask
// tells. (So that there is always something to read, and nothing to ask.)
template <uint32_t kWord, int kBytes>
struct Placeholder {
  uint4 pieces[kBytes / 16];
  constexpr Placeholder() : pieces{} {
    for (uint4& piece : pieces) piece.x = piece.y = piece.z = piece.w = kWord;
  }
};
static __device__ const Placeholder<0x7FFF7FFF, kFp8TokenBytes> kNanToken;
static __device__ const Placeholder<0, kHeadDim * 2> kNoToken;

// FP8 pages of a range. The block table is read two blocks ahead, and tokens are on their way to
// the L2 cache one block ahead. A page that does not exist is NaN.
class Fp8Pages {
 public:
  static constexpr TokenFormat kFormat = TokenFormat::kFp8;
  using Lanes = sm90::Lanes<true>;
  __device__ Fp8Pages(const DenseDecodeParams& p, const RowTile& tile, Walk<kFormat>& walk)
      : p_(p), tile_(tile), walk_(walk) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) Move();
  }

  // To the next block, if there is one, and where this lane's tokens of it are.
  __device__ __forceinline__ bool Next(TokenAddress<kFormat> (&addresses)[Lanes::kTokens]) {
    if (next_page_ == kNone) return false;
#pragma unroll
    for (int i = 0; i < Lanes::kTokens; ++i) {
      addresses[i].token = Exists(next_page_) ? Find(next_page_, Lanes::Token(i))
                                              : reinterpret_cast<const uint8_t*>(&kNanToken);
    }
    Move();
    return true;
  }
  // Which of a block's tokens exist is known from its sequence's length.
  static __device__ __forceinline__ uint32_t present() { return 0; }

 private:
  static constexpr int kNone = -2, kBad = -1;

  __device__ __forceinline__ bool Exists(int page) const {
    return page >= 0 && page < p_.num_pages;
  }
  // A token of this warp's.
  __device__ __forceinline__ const uint8_t* Find(int page, int token) const {
    const int row = threadIdx.x / 32 % 4 * kTokensEach + token;
    const int64_t place = (page * int64_t{kPageSize} + row) * p_.h_kv + tile_.kv_head;
    return static_cast<const uint8_t*>(p_.k_cache) + place * kFp8TokenBytes;
  }

  // Sends for the tokens of the page that was read last, and reads the table's next entry.
  __device__ __forceinline__ void Move() {
    next_page_ = page_;
    if (Exists(page_)) {
      if (p_.h_kv > 1) {
#pragma unroll
        for (int i = 0; i < Lanes::kTokens; ++i) {
          Lanes::Prefetch(Find(page_, Lanes::Token(i)), kFp8TokenBytes);
        }
      } else if (threadIdx.x % 32 == 0) {
        ptx::BulkPrefetchL2(Find(page_, 0), kTokensEach * kFp8TokenBytes);
      }
    }
    page_ = kNone;
    while (block_ == end_block_) {
      Segment s;
      if (!walk_.Next(p_, tile_, &s)) return;
      batch_ = s.batch;
      block_ = s.first_block;
      end_block_ = s.first_block + s.visible;
    }
    page_ = kBad;
    if (block_ < p_.max_pages_per_seq) {
      page_ = max(__ldg(p_.block_table + batch_ * p_.max_pages_per_seq + block_), kBad);
    }
    ++block_;
  }

  const DenseDecodeParams& p_;
  const RowTile& tile_;
  Walk<kFormat>& walk_;
  int batch_ = 0, block_ = 0, end_block_ = 0;  // what is read next
  int page_ = kNone;                           // read last
  int next_page_ = kNone;                      // read before that
};

// The tokens that the query tokens of a range list, in blocks of 64 places. Indices are read two
// blocks ahead, and tokens are on their way to the L2 cache one block ahead.
template <TokenFormat kFormat, int kDim>
class ListedTokens {
 public:
  using Lanes = sm90::Lanes<kFormat != TokenFormat::kNumbers>;
  __device__ ListedTokens(const SparseCall& p, const RowTile& tile, Walk<kFormat>& walk)
      : p_(p), tile_(tile), walk_(walk) {
#pragma unroll 1
    for (int i = 0; i < 2; ++i) Move();
  }

  // To the next block, if there is one, and where this lane's tokens of it are.
  __device__ __forceinline__ bool Next(TokenAddress<kFormat> (&addresses)[Lanes::kTokens]) {
    if (next_.list < 0) return false;
    bool own = true;
#pragma unroll
    for (int i = 0; i < Lanes::kTokens; ++i) {
      const bool exists = Exists(next_, i);
      addresses[i] = exists ? Find(next_, i) : None();
      if (Lanes::Part() == i) own = exists;
    }
    present_ = __ballot_sync(~0u, own);
    Move();
    return true;
  }
  // Which of the block's tokens exist, as Lanes knows it.
  __device__ __forceinline__ uint32_t present() const { return present_; }

 private:
  static constexpr int kBytes = kFormat == TokenFormat::kFp8        ? kFp8TokenBytes
                                : kFormat == TokenFormat::kFp8Apart ? kFp8ApartDataBytes
                                                                    : kDim * 2;
  static __device__ __forceinline__ TokenAddress<kFormat> None() {
    const auto* nothing = reinterpret_cast<const uint8_t*>(&kNoToken);
    if constexpr (kFormat == TokenFormat::kFp8Apart) {
      return {nothing, nothing};
    } else {
      return {nothing};
    }
  }
  // A block's entries of this lane, of one of the two lists.
  struct Entries {
    int list = -1;  // which of both, or none
    int index[Lanes::kTokens] = {};
  };

  __device__ __forceinline__ bool Exists(const Entries& entries, int i) const {
    const int64_t num_pages = entries.list == 1 ? p_.scopes[1].num_pages : p_.scopes[0].num_pages;
    const int64_t page_size = entries.list == 1 ? p_.scopes[1].page_size : p_.scopes[0].page_size;
    return entries.index[i] >= 0 && entries.index[i] < num_pages * page_size;
  }
  __device__ __forceinline__ TokenAddress<kFormat> Find(const Entries& entries, int i) const {
    const int64_t page_size = entries.list == 1 ? p_.scopes[1].page_size : p_.scopes[0].page_size;
    const void* pool = entries.list == 1 ? p_.scopes[1].pool : p_.scopes[0].pool;
    const auto* bytes = static_cast<const uint8_t*>(pool);
    if constexpr (kFormat == TokenFormat::kFp8Apart) {
      const uint32_t index = entries.index[i], rows = page_size;
      const uint32_t page = index / rows, row = index - page * rows;
      bytes += int64_t{page} * rows * kFp8ApartTokenBytes;
      return {bytes + int64_t{row} * kFp8ApartDataBytes,
              bytes + int64_t{rows} * kFp8ApartDataBytes + int64_t{row} * kFp8ApartScaleBytes};
    } else {
      return {bytes + int64_t{entries.index[i]} * kBytes};
    }
  }

  // Sends for the tokens that were read last, and reads this lane's entries of the next block.
  __device__ __forceinline__ void Move() {
    next_ = entries_;
    if (entries_.list >= 0) {
#pragma unroll
      for (int i = 0; i < Lanes::kTokens; ++i) {
        if (!Exists(entries_, i)) continue;
        const TokenAddress<kFormat> address = Find(entries_, i);
        Lanes::Prefetch(address.token, kBytes);
        if constexpr (kFormat == TokenFormat::kFp8Apart) {
          if (Lanes::Part() == 0) ptx::PrefetchL2(address.scales);
        }
      }
    }
    entries_.list = -1;
    while (block_ == end_block_) {
      Segment s;
      if (!walk_.Next(p_, tile_, &s)) return;
      query_ = s.batch;
      block_ = s.first_block;
      end_block_ = s.first_block + s.visible;
      if (threadIdx.x % 32 < 2) walk_.counts[threadIdx.x % 32] = p_.count(threadIdx.x % 2, query_);
      __syncwarp();
    }
    const int first_blocks = BlocksBefore(walk_.counts[0]);
    entries_.list = block_ >= first_blocks;
    const int count = walk_.counts[entries_.list];
    const int block = block_ - (entries_.list == 1 ? first_blocks : 0);
    const int32_t* indices = entries_.list == 1 ? p_.scopes[1].indices : p_.scopes[0].indices;
    const int64_t topk = entries_.list == 1 ? p_.scopes[1].topk : p_.scopes[0].topk;
#pragma unroll
    for (int i = 0; i < Lanes::kTokens; ++i) {
      const int place = block * kPageSize + threadIdx.x / 32 % 4 * kTokensEach + Lanes::Token(i);
      entries_.index[i] = -1;
      if (place < count) entries_.index[i] = __ldg(indices + query_ * topk + place);
    }
    ++block_;
  }

  const SparseCall& p_;
  const RowTile& tile_;
  Walk<kFormat>& walk_;
  int query_ = 0, block_ = 0, end_block_ = 0;  // what is read next
  Entries entries_;                            // read last
  Entries next_;                               // read before that
  uint32_t present_ = 0;
};

}  // namespace flashmla::sm90
