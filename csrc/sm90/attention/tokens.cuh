// Where a block's tokens are, for the warps that bring them to shared memory themselves: in FP8
// pages, or wherever a query token's list says.
#pragma once

#include <cstdint>

#include "params.h"
#include "sm90/attention/call.cuh"
#include "sm90/attention/common.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {

// A block's tokens are divided among four warps. Some lanes of a warp share a token, and have a few
// of the warp's tokens one after the other:
//
//   FP8      4 lanes,  tokens lane / 4 and lane / 4 + 8
//   numbers  8 lanes,  tokens lane / 8 + 4 i for i = 0 .. 3
//   FP8, few query rows: 2 lanes, of which one has something to do, token lane / 2
//
// Eight lanes that write to shared memory together then write to different banks.
template <int kLanes>
struct Lanes {
  static constexpr int kTokensEach = kPageSize / 4;  // of a warp
  static constexpr int kPerToken = kLanes;
  static constexpr int kTokens = kTokensEach * kPerToken / 32;  // of a lane
  static constexpr int kStep = 32 / kPerToken;                  // from one to the next

  static __device__ __forceinline__ int Warp() { return ptx::ThreadId() / 32 % 4; }
  // A token of the block.
  static __device__ __forceinline__ int Token(int i) {
    return Warp() * kTokensEach + ptx::LaneId() / kPerToken + i * kStep;
  }
  static __device__ __forceinline__ int Part() { return ptx::LaneId() % kPerToken; }

  // Which of a warp's tokens exist is one word: of a token's lanes, the i-th says it of the lane's
  // i-th token; others are set.
  static __device__ __forceinline__ int Word() { return Warp(); }
  static __device__ __forceinline__ int Place(int i) { return i; }
  // This moves it so that of the columns column + {0, 1} of eight tokens, where column is twice a
  // lane's place among four, the first's bit is the lowest one,
  static __device__ __forceinline__ uint32_t FromColumn(uint32_t word) {
    const int lane = threadIdx.x % 4;
    return word >> (kPerToken == 4 ? lane * 8 : lane % 2 * 16 + lane / 2);
  }
  // and the second's this; or those of the warp's next eight tokens.
  static constexpr int Bit(int second, int next_eight) {
    return kPerToken == 4 ? 4 * second + next_eight : 8 * second + 2 * next_eight;
  }
};

template <TokenFormat kFormat>
using FormatLanes = Lanes<kFormat == TokenFormat::kNumbers ? 8 : 4>;

// The same where eight warps share a block: a lane has one token. The words of two warps, one after
// the other, are to be combined.
struct SplitLanes : Lanes<4> {
  static constexpr int kTokensEach = kPageSize / 8;
  static constexpr int kTokens = 1;

  static __device__ __forceinline__ int Warp() { return ptx::ThreadId() / 32 % 8; }
  static __device__ __forceinline__ int Token(int) {
    return Warp() * kTokensEach + ptx::LaneId() / kPerToken;
  }
  static __device__ __forceinline__ int Word() { return Warp() / 2 + Warp() % 2 * 4; }
  static __device__ __forceinline__ int Place(int) { return Warp() % 2; }
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

// A warp's place in its range, and in the segment that it has begun. (In shared memory: registers
// hold tokens.)
struct Walk {
  struct alignas(16) Pool {
    const uint8_t* tokens;
    uint32_t count;
    uint32_t page_size;
  } pool;                      // what the list names that is read now
  const int32_t* end_of_list;  // the end of what is read of it, or of the block table
  SharedSegments segments;
  int block, end_block;  // what is left of the segment
  union {
    int beyond;     // how many of the blocks before the end have no entry in the block table
    int counts[2];  // how many places of both lists of the query token count
  };

  // All lanes call these.
  __device__ void Begin(const Range& range) {
    if (ptx::LaneId() == 0) block = end_block = 0;
    segments.Begin(range);
  }
  // Sees to it that there is something left, if there can be. `enter` is called with a new
  // segment's sequence.
  template <typename Call, typename Enter>
  __device__ __forceinline__ bool Find(const Call& p, const RowTile& tile, Enter enter) {
    while (block == end_block) {
      if (!segments.Next(p, tile)) return false;
      const Segment& s = segments.current;
      if (ptx::LaneId() == 0) block = s.first_block, end_block = s.first_block + s.visible;
      enter(s.batch);
      __syncwarp();
    }
    return true;
  }
  // What is before `next` is no longer left.
  __device__ __forceinline__ void Leave(int next) {
    __syncwarp();  // all have read it
    if (ptx::LaneId() == 0) block = next;
    __syncwarp();
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
static __device__ const Placeholder<0x7F7F7F7F, 16> kUnscaled;  // 1, in ue8m0

// FP8 pages of a range, whose table is read a block ahead. A page that does not exist is NaN.
template <typename Lanes_ = FormatLanes<TokenFormat::kFp8>>
class Fp8Pages {
 public:
  static constexpr TokenFormat kFormat = TokenFormat::kFp8;
  using Lanes = Lanes_;
  __device__ Fp8Pages(const DenseDecodeParams& p, const RowTile& tile, Walk& walk)
      : p_(p), tile_(tile), walk_(walk) {
    Read();
  }

  // To the next block, if there is one, and where this lane's tokens of it are. They are sent for,
  // to the L2 cache: that part of them.
  __device__ __forceinline__ bool Next(TokenAddress<kFormat> (&addresses)[Lanes::kTokens],
                                       uint32_t& present, int part, int parts) {
    const bool any = left_ >= 0, exists = any && page_ >= 0 && page_ < p_.num_pages;
#pragma unroll
    for (int i = 0; i < Lanes::kTokens; ++i) {
      addresses[i].token =
          exists ? Find(Lanes::Token(i)) : reinterpret_cast<const uint8_t*>(&kNanToken);
    }
    if (exists) {
      const int tokens = Lanes::kTokensEach / parts, lane = ptx::LaneId();
      const int first = Lanes::Warp() * Lanes::kTokensEach + part * tokens;
      if (p_.h_kv == 1) {
        if (lane == 0) ptx::BulkPrefetchL2(Find(first), tokens * kFp8TokenBytes);
      } else if (lane < tokens) {
        ptx::BulkPrefetchL2(Find(first + lane), kFp8TokenBytes);
      }
    }
    present = 0;  // of no use
    if (any) Read();
    return any;
  }

 private:
  __device__ __forceinline__ const uint8_t* Find(int row) const {
    const uint32_t h_kv = ptx::Opaque(p_.h_kv);
    const int64_t place = int64_t{page_} * h_kv * kPageSize + (row * h_kv + tile_.kv_head);
    return static_cast<const uint8_t*>(p_.k_cache) + place * kFp8TokenBytes;
  }

  // Reads the next block's entry. Nothing is done with it yet.
  __device__ __forceinline__ void Read() {
    if (--left_ < 0) {
      if (!walk_.Find(p_, tile_, [](int) {})) return;
      const int block = walk_.block, end = walk_.end_block;
      left_ = end - block - 1;
      walk_.Leave(end);
      if (ptx::LaneId() == 0) {
        const int64_t row = walk_.segments.current.batch * p_.max_pages_per_seq;
        walk_.end_of_list = p_.block_table + row + end;
        walk_.beyond = end - static_cast<int>(min(p_.max_pages_per_seq, int64_t{INT_MAX}));
      }
      __syncwarp();
    }
    page_ = ptx::LoadIf(left_ >= walk_.beyond, walk_.end_of_list - 1 - left_);
  }

  const DenseDecodeParams& p_;
  const RowTile& tile_;
  Walk& walk_;
  int left_ = 0;  // blocks of the segment after the next one; or -1, and no next one
  int page_;      // of the next block
};

// The tokens that the query tokens of a range list, in blocks of 64 places. Lists are read a block
// ahead. kPrefetched: whether tokens are sent for, to the L2 cache, when a block's turn comes.
template <TokenFormat kFormat, int kDim, typename Lanes_ = FormatLanes<kFormat>,
          bool kPrefetched = true>
class ListedTokens {
 public:
  using Lanes = Lanes_;
  __device__ ListedTokens(const SparseCall& p, const RowTile& tile, Walk& walk)
      : p_(p), tile_(tile), walk_(walk) {
    Read();
  }

  // To the next block, if there is one; where this lane's tokens of it are, and which of the warp's
  // exist (see Lanes). They are sent for, to the L2 cache: that part of them.
  __device__ __forceinline__ bool Next(TokenAddress<kFormat> (&addresses)[Lanes::kTokens],
                                       uint32_t& present, int part, int parts) {
    constexpr int kLines = (kBytes + 127) / 128 + 1;
    const bool any = left_ >= 0;
    const Walk::Pool pool = walk_.pool;
    const int lane = Lanes::Part();
    bool own = true;
#pragma unroll
    for (int i = 0; i < Lanes::kTokens; ++i) {
      const bool exists = any && static_cast<uint32_t>(indices_[i]) < pool.count;
      addresses[i] = Find(pool, indices_[i], exists);
      if (lane == Lanes::Place(i)) own = exists;
      // No condition: a branch would take longer.
      if constexpr (kPrefetched) {
        const int first = part * (kLines / parts) + lane;
#pragma unroll
        for (int line = 0; line < (kLines + parts - 1) / parts; line += Lanes::kPerToken) {
          ptx::PrefetchL2(addresses[i].token + min((first + line) * 128, kBytes - 1));
        }
      }
    }
    present = __ballot_sync(~0u, own);
    if (any) Read();
    return any;
  }

 private:
  static constexpr int kBytes = kFormat == TokenFormat::kFp8        ? kFp8TokenBytes
                                : kFormat == TokenFormat::kFp8Apart ? kFp8ApartDataBytes
                                                                    : kDim * 2;
  static __device__ __forceinline__ TokenAddress<kFormat> Find(const Walk::Pool& pool, int index,
                                                               bool exists) {
    const auto* nothing = reinterpret_cast<const uint8_t*>(&kNoToken);
    const uint8_t* token = pool.tokens;
    if constexpr (kFormat == TokenFormat::kFp8Apart) {
      const uint32_t rows = pool.page_size, page = index / rows, row = index - page * rows;
      const uint8_t* scales = token + uint64_t{page} * rows * kFp8ApartTokenBytes +
                              uint64_t{rows} * kFp8ApartDataBytes +
                              uint64_t{row} * kFp8ApartScaleBytes;
      token += uint64_t{page} * rows * kFp8ApartTokenBytes + uint64_t{row} * kFp8ApartDataBytes;
      return {exists ? token : nothing,
              exists ? scales : reinterpret_cast<const uint8_t*>(&kUnscaled)};
    } else {
      token += int64_t{index} * kBytes;
      return {exists ? token : nothing};
    }
  }

  // Reads this lane's entries of the next block. Nothing is done with them yet.
  __device__ __forceinline__ void Read() {
    if (--left_ < 0) {
      if (!walk_.Find(p_, tile_, [this](int query) { Enter(query); })) return;
      int block = walk_.block, end = walk_.end_block;
      const int first_blocks = BlocksBefore(walk_.counts[0]);
      const bool second = block >= first_blocks;
      if (second) {
        block -= first_blocks, end -= first_blocks;
      } else {
        end = min(end, first_blocks);
      }
      left_ = end - block - 1;
      const int counted = walk_.counts[second];
      places_ = counted - block * kPageSize - Lanes::Token(0);
      walk_.Leave(second ? end + first_blocks : end);
      if (ptx::LaneId() == 0) {
        const int32_t* indices = second ? p_.scopes[1].indices : p_.scopes[0].indices;
        const int64_t topk = second ? p_.scopes[1].topk : p_.scopes[0].topk;
        const void* tokens = second ? p_.scopes[1].pool : p_.scopes[0].pool;
        walk_.pool = {
            static_cast<const uint8_t*>(tokens),
            static_cast<uint32_t>(second ? p_.tokens[1] : p_.tokens[0]),
            static_cast<uint32_t>(second ? p_.scopes[1].page_size : p_.scopes[0].page_size)};
        walk_.end_of_list = indices + walk_.segments.current.batch * topk + counted;
      }
      __syncwarp();
    }
    const int32_t* entry = walk_.end_of_list - places_;
#pragma unroll
    for (int i = 0; i < Lanes::kTokens; ++i) {
      indices_[i] = ptx::LoadIf(i * Lanes::kStep < places_, entry + i * Lanes::kStep);
    }
    places_ -= kPageSize;
  }
  __device__ void Enter(int query) {
    const int lane = ptx::LaneId();
    if (lane < 2) walk_.counts[lane] = p_.count(lane, query);
    // The next one's first list is on its way to the L2 cache, when it is read.
    if (query + 1 < p_.batch) {
      const auto topk = static_cast<int>(p_.scopes[0].topk);
      const int32_t* list = p_.scopes[0].indices + (query + int64_t{1}) * topk;
      for (int i = ptx::ThreadId() % 128 * 32; i < topk; i += 128 * 32) ptx::PrefetchL2(list + i);
    }
  }

  const SparseCall& p_;
  const RowTile& tile_;
  Walk& walk_;
  int left_ = 0;                 // blocks of the list after the next one; or -1, and no next one
  int places_;                   // that are left to read of the list, from this lane's first one on
  int indices_[Lanes::kTokens];  // of the next block
};

}  // namespace flashmla::sm90
