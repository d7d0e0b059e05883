// What the shapes of attention share: the panels that tiles are made of, the walk over pages,
// the bookkeeping for the combine, and the care for tokens that must not be read.
#pragma once

#include <type_traits>

#include "params.h"
#include "sm90/attention/call.cuh"
#include "sm90/attention/schedule.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {

inline constexpr int kPanel = 64;                           // columns of a panel
inline constexpr int kPanels = kHeadDim / kPanel;           // 9: eight of V, then the RoPE columns
inline constexpr int kPanelsV = kHeadDimV / kPanel;         // 8
inline constexpr int kPanelBytes = kPageSize * kPanel * 2;  // 8 KB
inline constexpr int kMaxSharedBytes = 232448;              // 227 KB: what a thread block can have
inline constexpr float kRescaleThreshold = 8;               // a factor of 2^8
static_assert(kPanels == kPanelsV + 1);

// Units of a block, which are waited for and handed over on their own. Where RoPE columns are part
// of the value there is no third.
enum Unit : int { kLeftHalf, kRightHalf, kRope, kUnits };
inline constexpr int kHalfPanels = kPanelsV / 2;

// A place in a ring of kSize, and the parity of the round.
template <int kSize>
struct Ring {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Advance(int by = 1) {
    slot += by;
    if (slot >= kSize) {
      slot -= kSize;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ uint32_t Pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t Pack(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Brings all parameters to the constant cache, side by side and not one after the other when they
// are needed.
__device__ __forceinline__ void FetchParams(const DenseDecodeParams& p) {
  asm volatile("" ::"l"(p.batch), "l"(p.num_pages), "l"(p.q), "l"(p.out), "l"(p.merges));
}

// Brings to L2 what will be read first, as far as a line of each thread of the grid goes: lengths,
// block table and queries. It may be called before the previous kernel has ended: what that writes
// goes to L2 too.
template <typename Call>
__device__ __forceinline__ void PrefetchInputs(const Call& p) {
  constexpr int kLine = 128;
  int64_t offset =
      ((int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x) * kLine;
  const auto prefetch = [&](const void* data, int64_t bytes) {
    if (offset >= 0 && offset < bytes) ptx::PrefetchL2(static_cast<const char*>(data) + offset);
    offset -= (bytes + kLine - 1) / kLine * kLine;
  };
  if constexpr (std::is_same_v<Call, SparseCall>) {
    for (const TokenScope& scope : p.scopes) {
      prefetch(scope.length, p.sequences() * 4);
      prefetch(scope.indices, p.batch * scope.topk * 4);
    }
    prefetch(p.q, p.batch * p.h_q * p.head_dim * 2);
  } else {
    prefetch(p.cache_seqlens, p.batch * 4);
    prefetch(p.block_table, p.batch * p.max_pages_per_seq * 4);
    prefetch(p.q, p.batch * p.s_q * p.h_q * kHeadDim * 2);
  }
}

// Walks the pages of a range; the warp reads 32 table entries at once. Entries that do not exist
// count as bad pages.
class Pages {
 public:
  __device__ Pages(const DenseDecodeParams& p, const RowTile& tile, const Range& range)
      : p_(p), segments_(p, tile, range) {
    // The first entries are on their way while the rest is found out.
    if (range.batch < p.batch) Load(range.batch, range.block);
  }

  // The page, negative if it is a bad one; all lanes call it.
  __device__ bool Next(int* page) {
    while (next_ == visible_) {
      Segment s;
      if (!segments_.Next(&s)) return false;
      next_ = s.first_block;
      visible_ = s.first_block + s.visible;
      if (!s.opening) Load(s.batch, next_);
      batch_ = s.batch;
    }
    if (next_ == loaded_ + 32) Load(batch_, next_);
    *page = __shfl_sync(~0u, pages_, next_ - loaded_);
    ++next_;
    return true;
  }

 private:
  __device__ void Load(int batch, int first) {
    const int64_t entry = int64_t{first} + threadIdx.x % 32;
    pages_ = -1;
    if (entry < p_.max_pages_per_seq) {
      const int page = p_.block_table[batch * p_.max_pages_per_seq + entry];
      if (page < p_.num_pages) pages_ = page;
    }
    loaded_ = first;
  }

  const DenseDecodeParams& p_;
  Segments<DenseDecodeParams> segments_;
  int batch_ = 0, next_ = 0, visible_ = 0;
  int loaded_ = 0;  // the first of 32 entries, of which each lane has one
  int pages_ = -1;  // negative: bad
};

// A page's first token in the pool, for the copy engine, to which a bad page is one behind the
// last: out of bounds, it reads as NaN.
__device__ __forceinline__ int FirstToken(const DenseDecodeParams& p, int page) {
  return (page < 0 ? static_cast<int>(p.num_pages) : page) * kPageSize;
}

// Tells the combine which parts it has to merge: each partition has a share in those of its own
// sequences, and those that have no range help the others. Every entry that is used is written.
template <typename Call>
__device__ inline void RecordMerges(const Call& p, const RowTile& tile, const Range& range,
                                    int partition, int partitions) {
  Merge* merges = reinterpret_cast<Merge*>(p.merges);
  const int active = range.PartitionBefore(range.total) + 1;
  const int members = partitions / active, helpers = members - 1;
  const auto write = [&](int partition, int i, const Merge& merge) {
    merges[partition * kMergesEach + i] = merge;
  };
  if (partition >= active + active * helpers) write(partition, 0, {});
  if (partition >= active) return;
  const auto write_all = [&](int i, Merge merge) {
    write(partition, i, merge);
#pragma unroll 1
    for (int helper = 0; helper < helpers; ++helper) {
      ++merge.index;
      write(active + partition * helpers + helper, i, merge);
    }
  };
  int count = 0;
  int place = range.units;  // of the sequence's first block
  Segments segments(p, tile, range);
  for (Segment s; segments.Next(&s);) {
    const int end = place + s.all_blocks;
    if (!s.complete()) {
      const int first = range.PartitionBefore(place + 1), last = range.PartitionBefore(end);
      const bool opening = first * range.each >= place - range.cost;  // the first of that partition
      const int row = tile.partial_row(partitions, first, true);
      const int next = tile.partial_row(partitions, first + 1, true);
      write_all(count++,
                {s.batch, last - first + 1, tile.partial_row(partitions, first, opening), row,
                 next - row, (partition - first) * members, (last - first + 1) * members, 0});
    }
    place = end + range.cost;
  }
  if (count < kMergesEach) write_all(count, {});
}

// What a row of a partial result is multiplied with before it becomes 16-bit floating point: a
// power of two that brings its largest number next to the top of what half precision holds, so that
// those down to 2^-28 of it keep all of their 11 bits. (Not quite, if it is below 2^-86. And next
// to an infinity numbers stay as they are: those beyond half precision are lost.)
__device__ __forceinline__ float PartialScale(float largest) {
  constexpr int kBias = 127, kTop = 14, kMost = 100;
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23) - kBias;
  return exponent > kBias ? 1.f : __uint_as_float((min(kTop - exponent, kMost) + kBias) << 23);
}

// The reciprocal of a power of two that is not next to the ends of the range.
__device__ __forceinline__ float PowerReciprocal(float power) {
  return __uint_as_float((2 * 127u << 23) - __float_as_uint(power));
}

// Two 16-bit numbers, of which those that are not finite become zero.
template <typename T>
__device__ __forceinline__ uint32_t FiniteOnly(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7C00 : 0x7F80;
  if ((pair & kExponent) == kExponent) pair &= 0xFFFF0000;
  if ((pair >> 16 & kExponent) == kExponent) pair &= 0x0000FFFF;
  return pair;
}

// A weight of zero does not undo a NaN: 0 x NaN is NaN. So among a block's tokens, those that do
// not exist lose their values, whatever the page holds there; and those that only some rows of the
// tile may see lose what is not finite in them, which reaches the rows that see it by way of their
// scores. Every row sees the tokens before `seen_by_all`; those from `existing` on do not exist.
// `panel(i)` is where panel i of the block lies, and `token(i)` is what its row i has: of each
// eight tokens, eight rows in some order. Called by all threads of a warpgroup.
template <typename T, int kCount = kPanelsV, typename Panel, typename Token>
__device__ __forceinline__ void CleanValues(Panel panel, Token token, int seen_by_all,
                                            int existing) {
  const int first = max(seen_by_all, 0) / 8 * 8;
#pragma unroll 1
  for (int i = first * 8 + threadIdx.x % 128; i < kPageSize * 8; i += 128) {
    if (token(i / 8) < seen_by_all) continue;
    const bool exists = token(i / 8) < existing;
    for (int j = 0; j < kCount; ++j) {
      uint4& eight = *reinterpret_cast<uint4*>(panel(j) + i * 16);
      uint4 v{0, 0, 0, 0};
      if (exists) {
        v = eight;
        v = {FiniteOnly<T>(v.x), FiniteOnly<T>(v.y), FiniteOnly<T>(v.z), FiniteOnly<T>(v.w)};
      }
      eight = v;
    }
  }
}

// The same where rows are in the order of tokens.
template <typename T, int kCount = kPanelsV, typename Panel>
__device__ __forceinline__ void CleanValues(Panel panel, int seen_by_all, int existing) {
  CleanValues<T, kCount>(panel, [](int row) { return row; }, seen_by_all, existing);
}

}  // namespace flashmla::sm90
