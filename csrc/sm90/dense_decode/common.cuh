// What the shapes of dense decode share: the panels that tiles are made of, the walk over pages,
// the bookkeeping for the combine, and the care for tokens that must not be read.
#pragma once

#include <type_traits>

#include "params.h"
#include "sm90/dense_decode/schedule.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {

inline constexpr int kPanel = 64;                           // columns of a panel
inline constexpr int kPanels = kHeadDim / kPanel;           // 9: eight of V, then the RoPE columns
inline constexpr int kPanelsV = kHeadDimV / kPanel;         // 8
inline constexpr int kPanelBytes = kPageSize * kPanel * 2;  // 8 KB
inline constexpr int kMaxSharedBytes = 232448;              // 227 KB: what a thread block can have
inline constexpr float kRescaleThreshold = 8;               // a factor of 2^8
static_assert(kPanels == kPanelsV + 1);

__device__ __forceinline__ uint32_t Pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t Pack(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// Brings to L2 what will be read after the lengths: block table and queries, as far as a line of
// each thread of the grid goes.
__device__ __forceinline__ void PrefetchInputs(const DenseDecodeParams& p) {
  constexpr int kLine = 128;
  const int64_t table_bytes = p.batch * p.max_pages_per_seq * 4;
  const int64_t query_bytes = p.batch * p.s_q * p.h_q * kHeadDim * 2;
  int64_t offset =
      ((int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * blockDim.x + threadIdx.x) * kLine;
  if (offset < table_bytes) {
    ptx::PrefetchL2(reinterpret_cast<const char*>(p.block_table) + offset);
    return;
  }
  offset -= (table_bytes + kLine - 1) / kLine * kLine;
  if (offset >= 0 && offset < query_bytes) {
    ptx::PrefetchL2(static_cast<const char*>(p.q) + offset);
  }
}

// Walks the pages of a range; the warp reads 32 table entries at once. Entries that do not exist
// count as bad pages, which read as NaN, being out of bounds.
class Pages {
 public:
  __device__ Pages(const DenseDecodeParams& p, const RowTile& tile, const Range& range)
      : p_(p), segments_(p, tile, range) {}

  // The page's first token in the pool; all lanes call it.
  __device__ bool Next(int* first_token) {
    while (next_ == visible_) {
      Segment s;
      if (!segments_.Next(&s)) return false;
      table_ = p_.block_table + s.batch * p_.max_pages_per_seq;
      next_ = s.first_block;
      visible_ = s.first_block + s.visible;
      loaded_ = next_;
    }
    const int lane = threadIdx.x % 32;
    if (next_ == loaded_) {
      const int64_t entry = int64_t{next_} + lane;
      pages_ = entry < visible_ && entry < p_.max_pages_per_seq ? table_[entry] : -1;
      loaded_ += 32;
    }
    const int page = __shfl_sync(~0u, pages_, next_ - (loaded_ - 32));
    ++next_;
    const bool bad = page < 0 || page >= p_.num_pages;
    *first_token = (bad ? static_cast<int>(p_.num_pages) : page) * kPageSize;
    return true;
  }

 private:
  const DenseDecodeParams& p_;
  Segments segments_;
  const int32_t* table_ = nullptr;
  int next_ = 0, visible_ = 0, loaded_ = 0;
  int pages_ = -1;
};

// Tells the combine which partitions share the sequences that start in this range. Entries are
// indexed by sequence or by partition, whichever are fewer; every entry is written.
__device__ inline void RecordSplits(const DenseDecodeParams& p, const RowTile& tile,
                                    const Range& range, int partition, int partitions) {
  SplitInfo* split_info = reinterpret_cast<SplitInfo*>(p.split_info);
  SplitInfo continued{-1, 0, 0, 0};
  int place = range.units;  // of the sequence's first block
  Segments segments(p, tile, range);
  for (Segment s; segments.Next(&s);) {
    const int end = place + s.all_blocks;
    place = end + range.cost;
    if (s.first_block != 0) continue;
    const int last = PartitionBefore(end, range);
    const SplitInfo info{s.batch, partition, last, s.opening ? 0 : 1};
    if (p.batch <= partitions) {
      split_info[s.batch] = info;
    } else if (last > partition) {
      continued = info;
    }
  }
  if (p.batch > partitions) split_info[partition] = continued;
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
// `panel(i)` is where panel i of the block lies. Called by all threads of a warpgroup.
template <typename T, typename Panel>
__device__ __forceinline__ void CleanValues(Panel panel, int seen_by_all, int existing) {
  const int thread = threadIdx.x % 128;
  for (int i = max(seen_by_all, 0) * 8 + thread; i < kPageSize * 8; i += 128) {
    const bool exists = i / 8 < existing;
    for (int j = 0; j < kPanelsV; ++j) {
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

}  // namespace flashmla::sm90
