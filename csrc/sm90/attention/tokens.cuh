// Where a block's tokens are, for the warps that bring them to shared memory themselves: in FP8
// pages, or wherever a query token's list says.
#pragma once

#include <cstdint>

#include "params.h"
#include "sm90/attention/call.cuh"
#include "sm90/attention/common.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {

// A block's tokens are divided among the four warps of each thread block of the cluster. Some lanes
// of a warp share a token, and have a few of the warp's tokens one after the other:
//
//   FP8      4 lanes,  tokens lane / 4 and, without a cluster, lane / 4 + 8
//   numbers  8 lanes,  tokens lane / 8 + 4 i for i = 0 .. 3
//
// Eight lanes that write to shared memory together then write to different banks.
template <bool kFp8, int kCluster>
struct Lanes {
  static constexpr int kTokensEach = kPageSize / (4 * kCluster);  // of a warp
  static constexpr int kPerToken = kFp8 ? 4 : 8;
  static constexpr int kTokens = kTokensEach * kPerToken / 32;  // of a lane
  static constexpr int kStep = 32 / kPerToken;                  // from one to the next

  // Among all that bring this block's tokens, this warp.
  static __device__ __forceinline__ int Warp() {
    const int warp = threadIdx.x / 32 % 4;
    return kCluster == 1 ? warp : ptx::ClusterRank() * 4 + warp;
  }
  // A token of the block.
  static __device__ __forceinline__ int Token(int i) {
    return Warp() * kTokensEach + threadIdx.x % 32 / kPerToken + i * kStep;
  }
  static __device__ __forceinline__ int Part() { return threadIdx.x % kPerToken; }

  // Which of a warp's tokens exist is one word: of a token's lanes, the i-th says it of the lane's
  // i-th token; others are set. Words of all tokens, one for each warp:
  static constexpr int kWords = 4 * kCluster;
  // This moves a word so that of the columns column + {0, 1} of eight tokens, where column is twice
  // a lane's place among four, the first's bit is the lowest one,
  static __device__ __forceinline__ uint32_t FromColumn(uint32_t word) {
    const int lane = threadIdx.x % 4;
    return word >> (kFp8 ? lane * 8 : lane % 2 * 16 + lane / 2);
  }
  // and the second's this; or those of the warp's next eight tokens.
  static constexpr int Bit(int second, int next_eight) {
    return kFp8 ? 4 * second + next_eight : 8 * second + 2 * next_eight;
  }
  static constexpr int Next(int eight) { return eight * 8 % kTokensEach / 8; }

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
  Range rest;                        // of the warp's range
  int batch, block, end_block;       // what is next in a sequence
  int counts[2];                     // of the places in both lists of a query token
  int list;                          // which of them the next block is of, or -1
  int counted;                       // its entries that count are the first so many
  uint32_t present, next_present;    // which of the warp's tokens of a block exist, and of the next
  TokenAddress<kFormat> tokens[16];  // of a block

  // All lanes call these.
  __device__ void Begin(const Range& range) {
    if (threadIdx.x % 32 == 0) rest = range, block = end_block = 0;
    __syncwarp();
  }
  // To the next block, if there is one. `enter` is called with a new sequence's number.
  template <typename Call, typename Enter>
  __device__ __forceinline__ bool Next(const Call& p, const RowTile& tile, int* number,
                                       Enter enter) {
    __syncwarp();
    int next = block;
    while (next == end_block) {
      const Range range = rest;
      Segments segments(p, tile, range);
      Segment s;
      if (!segments.Next(&s)) return false;
      __syncwarp();
      if (threadIdx.x % 32 == 0) {
        rest.batch = segments.batch(), rest.block = segments.block();
        batch = s.batch, end_block = s.first_block + s.visible;
      }
      next = s.first_block;
      enter(s.batch);
      __syncwarp();
    }
    __syncwarp();  // all have read it
    if (threadIdx.x % 32 == 0) block = next + 1;
    *number = next;
    return true;
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

// FP8 pages of a range, whose table is read a block ahead. A page that does not exist is NaN.
template <int kCluster>
class Fp8Pages {
 public:
  static constexpr TokenFormat kFormat = TokenFormat::kFp8;
  using Lanes = sm90::Lanes<true, kCluster>;
  __device__ Fp8Pages(const DenseDecodeParams& p, const RowTile& tile, Walk<kFormat>& walk)
      : p_(p), tile_(tile), walk_(walk) {
    Read();
  }

  // To the next block, if there is one, and where this lane's tokens of it are. They are sent for,
  // to the L2 cache.
  __device__ __forceinline__ bool Next(TokenAddress<kFormat> (&addresses)[Lanes::kTokens]) {
    if (!has_page_) return false;
    const bool exists = page_ >= 0 && page_ < p_.num_pages;
#pragma unroll
    for (int i = 0; i < Lanes::kTokens; ++i) {
      addresses[i].token =
          exists ? Find(Lanes::Token(i)) : reinterpret_cast<const uint8_t*>(&kNanToken);
    }
    if (exists && p_.h_kv > 1) {
#pragma unroll
      for (int i = 0; i < Lanes::kTokens; ++i) {
        Lanes::Prefetch(addresses[i].token, kFp8TokenBytes);
      }
    } else if (exists && threadIdx.x % 32 == 0) {
      ptx::BulkPrefetchL2(Find(Lanes::Warp() * Lanes::kTokensEach),
                          Lanes::kTokensEach * kFp8TokenBytes);
    }
    Read();
    return true;
  }

 private:
  __device__ __forceinline__ const uint8_t* Find(int row) const {
    const int64_t place = (page_ * int64_t{kPageSize} + row) * p_.h_kv + tile_.kv_head;
    return static_cast<const uint8_t*>(p_.k_cache) + place * kFp8TokenBytes;
  }

  // Nothing is done with the entry yet.
  __device__ __forceinline__ void Read() {
    int block;
    has_page_ = walk_.Next(p_, tile_, &block, [](int) {});
    page_ = -1;
    if (has_page_ && block < p_.max_pages_per_seq) {
      page_ = __ldg(p_.block_table + walk_.batch * p_.max_pages_per_seq + block);
    }
  }

  const DenseDecodeParams& p_;
  const RowTile& tile_;
  Walk<kFormat>& walk_;
  bool has_page_;
  int page_;  // of the next block
};

// The tokens that the query tokens of a range list, in blocks of 64 places. Lists are read a block
// ahead.
template <TokenFormat kFormat, int kDim, int kCluster>
class ListedTokens {
 public:
  using Lanes = sm90::Lanes<kFormat != TokenFormat::kNumbers, kCluster>;
  __device__ ListedTokens(const SparseCall& p, const RowTile& tile, Walk<kFormat>& walk)
      : p_(p), tile_(tile), walk_(walk) {
    Read();
  }

  // To the next block, if there is one, and where this lane's tokens of it are. They are sent for,
  // to the L2 cache.
  __device__ __forceinline__ bool Next(TokenAddress<kFormat> (&addresses)[Lanes::kTokens]) {
    const int list = walk_.list, counted = walk_.counted;
    if (list < 0) return false;
    const bool second = list == 1;
    const int64_t num_pages = second ? p_.scopes[1].num_pages : p_.scopes[0].num_pages;
    const int64_t page_size = second ? p_.scopes[1].page_size : p_.scopes[0].page_size;
    const int64_t tokens = num_pages * page_size;
    bool own = true;
#pragma unroll
    for (int i = 0; i < Lanes::kTokens; ++i) {
      const bool exists = Lanes::Token(i) < counted && indices_[i] >= 0 && indices_[i] < tokens;
      addresses[i] = exists ? Find(second, indices_[i]) : None();
      if (Lanes::Part() == i) own = exists;
      if (!exists) continue;
      Lanes::Prefetch(addresses[i].token, kBytes);
      if constexpr (kFormat == TokenFormat::kFp8Apart) {
        if (Lanes::Part() == 0) ptx::PrefetchL2(addresses[i].scales);
      }
    }
    const uint32_t present = __ballot_sync(~0u, own);
    if (threadIdx.x % 32 == 0) walk_.next_present = present;
    Read();
    return true;
  }

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
  __device__ __forceinline__ TokenAddress<kFormat> Find(bool second, int index) const {
    const void* pool = second ? p_.scopes[1].pool : p_.scopes[0].pool;
    const auto* bytes = static_cast<const uint8_t*>(pool);
    if constexpr (kFormat == TokenFormat::kFp8Apart) {
      const int64_t page_size = second ? p_.scopes[1].page_size : p_.scopes[0].page_size;
      const uint32_t rows = page_size, page = index / rows, row = index - page * rows;
      bytes += int64_t{page} * rows * kFp8ApartTokenBytes;
      return {bytes + int64_t{row} * kFp8ApartDataBytes,
              bytes + int64_t{rows} * kFp8ApartDataBytes + int64_t{row} * kFp8ApartScaleBytes};
    } else {
      return {bytes + int64_t{index} * kBytes};
    }
  }

  // Reads this lane's entries of the next block.
  __device__ __forceinline__ void Read() {
    int block;
    const auto enter = [&](int query) {
      if (threadIdx.x % 32 < 2) walk_.counts[threadIdx.x % 32] = p_.count(threadIdx.x % 2, query);
      // The next one's first list is on its way to the L2 cache, when it is read.
      if (query + 1 < p_.batch) {
        const auto topk = static_cast<int>(p_.scopes[0].topk);
        const int32_t* list = p_.scopes[0].indices + (query + int64_t{1}) * topk;
        for (int i = threadIdx.x % 128 * 32; i < topk; i += 128 * 32) ptx::PrefetchL2(list + i);
      }
    };
    if (!walk_.Next(p_, tile_, &block, enter)) {
      if (threadIdx.x % 32 == 0) walk_.list = -1;
      __syncwarp();
      return;
    }
    const int first_blocks = BlocksBefore(walk_.counts[0]);
    const bool second = block >= first_blocks;
    if (second) block -= first_blocks;
    const int counted = walk_.counts[second] - block * kPageSize;
    if (threadIdx.x % 32 == 0) walk_.list = second, walk_.counted = counted;
    __syncwarp();
    const int32_t* indices = second ? p_.scopes[1].indices : p_.scopes[0].indices;
    const int64_t topk = second ? p_.scopes[1].topk : p_.scopes[0].topk;
    indices += walk_.batch * topk + block * kPageSize;
#pragma unroll
    for (int i = 0; i < Lanes::kTokens; ++i) {  // nothing is done with them yet
      indices_[i] = __ldg(indices + min(Lanes::Token(i), counted - 1));
    }
  }

  const SparseCall& p_;
  const RowTile& tile_;
  Walk<kFormat>& walk_;
  int indices_[Lanes::kTokens];  // of the next block
};

}  // namespace flashmla::sm90
