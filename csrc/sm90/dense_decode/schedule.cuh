// Who works on what. Derived by every thread block from the sequence lengths alone, so that there
// is no schedule to make beforehand and none that could be stale.
//
// The work of one row tile is a line of KV blocks (pages): sequence after sequence, each with its
// blocks in order, an empty sequence counting as one block so that somebody writes its result. The
// line is cut into `active` ranges of equal length, one per partition. A sequence that lies within
// one range is finished there; one that is cut leaves a partial result in each range it touches, at
// most two per range (its first sequence and its last), so the workspace is bounded by the grid.
#pragma once

#include <cstdint>

#include "params.h"

namespace flashmla::sm90 {

struct Range {
  int batch;       // where it starts: a sequence,
  int block;       // a block in it,
  int64_t start;   // and the same as a position on the line
  int64_t blocks;  // how many blocks it holds; 0 for an idle partition
  int64_t total;   // blocks on the whole line
  int64_t active;  // ranges on the whole line
};

__device__ __forceinline__ int SequenceLength(const DenseDecodeParams& p, int batch) {
  return static_cast<int>(EffectiveLength(p.cache_seqlens[batch], p.max_pages_per_seq, p.s_q));
}

// KV blocks that hold the first `length` tokens.
__device__ __forceinline__ int BlocksBefore(int length) {
  return length <= 0 ? 0 : (length - 1) / kPageSize + 1;
}
__device__ __forceinline__ int BlocksOf(int length) { return max(BlocksBefore(length), 1); }

// The last partition that holds a block before position `end` of the line. The quotient of numbers
// below 2^53, rounded to a double, has the same integer part; integer division takes many
// registers.
__device__ __forceinline__ int PartitionBefore(int64_t end, const Range& range) {
  return static_cast<int>(static_cast<double>(end * range.active - 1) /
                          static_cast<double>(range.total));
}

// What the combine needs to know of a sequence that lies in several ranges.
struct SplitInfo {
  int batch;  // the sequence; -1: nothing to combine
  int first;  // partitions first..last hold a part each
  int last;
  int first_slot;  // which of its two slots the first partition used; the others used slot 0
};

inline __device__ int64_t PartialSlot(int64_t row_tile, int64_t partitions, int64_t partition,
                                      int slot) {
  return (row_tile * partitions + partition) * 2 + slot;
}

struct ScheduleScratch {
  int64_t warp_total[32];
  Range range;
};

// The range of `partition`. All threads of the block call this; `scratch` is shared memory.
__device__ inline const Range& FindRange(const DenseDecodeParams& p, int partition, int partitions,
                                         ScheduleScratch* scratch) {
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int threads = blockDim.x, warps = threads / 32;
  const int64_t per_thread = (p.batch + threads - 1) / threads;
  const int64_t first = min(thread * per_thread, p.batch);
  const int64_t last = min(first + per_thread, p.batch);

  int64_t mine = 0;
  for (int64_t b = first; b < last; ++b) mine += BlocksOf(SequenceLength(p, b));
  int64_t before = mine;  // inclusive scan over the warp
  for (int step = 1; step < 32; step *= 2) {
    const int64_t other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) scratch->warp_total[warp] = before;
  before -= mine;
  __syncthreads();
  int64_t total = 0;
  for (int w = 0; w < warps; ++w) {
    if (w == warp) before += total;
    total += scratch->warp_total[w];
  }

  const int64_t active = min(total, int64_t{partitions});
  const int64_t start = total * partition / active;
  const int64_t end = total * (partition + 1) / active;
  if (partition >= active) {
    if (thread == 0) scratch->range = Range{0, 0, total, 0, total, active};
  } else if (before <= start && start < before + mine) {
    int64_t b = first;
    int64_t position = before;
    for (int blocks; position + (blocks = BlocksOf(SequenceLength(p, b))) <= start; ++b) {
      position += blocks;
    }
    scratch->range = Range{
        static_cast<int>(b), static_cast<int>(start - position), start, end - start, total, active};
  }
  __syncthreads();
  return scratch->range;
}

// One sequence of a range, as one row tile sees it.
struct Segment {
  int batch;
  int length;       // tokens of the sequence
  int first_block;  // blocks first_block .. first_block + blocks are this range's
  int blocks;
  int all_blocks;  // blocks of the sequence, whoever has them
  int visible;     // how many of this range's blocks some row of the cluster may see
  bool opening;    // the first segment of its range

  __device__ bool complete() const { return first_block == 0 && blocks == all_blocks; }
};

// The tile of query rows a thread block works on: rows first .. first + count of the s_q * group
// rows that read KV head `kv_head`, ordered by token and then head.
struct RowTile {
  int index;
  int kv_head;
  int first;
  int count;
  int last_of_cluster;  // counted from `first`: the last row of the tiles that load pages together

  __device__ RowTile(const DenseDecodeParams& p, int index, int cluster = 1) : index(index) {
    const int per_head = static_cast<int>(p.tiles_per_head());
    const int tile = index % per_head;
    kv_head = index / per_head;
    first = tile * kRowTile;
    const int left = static_cast<int>(p.rows()) - first;
    count = min(kRowTile, left);
    last_of_cluster = min((cluster - tile % cluster) * kRowTile, left) - 1;
  }
  __device__ int token(const DenseDecodeParams& p, int row) const {
    return (first + row) / static_cast<int>(p.group());
  }
  __device__ int head(const DenseDecodeParams& p, int row) const {
    const int group = static_cast<int>(p.group());
    return kv_head * group + (first + row) % group;
  }
  // Tokens of a sequence that the rows of a query token may see are those before this.
  __device__ int limit(const DenseDecodeParams& p, int length, int query_token) const {
    return p.causal ? length - static_cast<int>(p.s_q) + query_token + 1 : length;
  }
};

// Walks the sequences of a range.
class Segments {
 public:
  __device__ Segments(const DenseDecodeParams& p, const RowTile& tile, const Range& range)
      : p_(p),
        tile_(tile),
        last_token_(tile.token(p, tile.last_of_cluster)),
        batch_(range.batch),
        block_(range.block),
        left_(range.blocks) {}

  __device__ bool Next(Segment* s) {
    if (left_ <= 0) return false;
    s->batch = batch_;
    s->length = SequenceLength(p_, batch_);
    s->all_blocks = BlocksOf(s->length);
    s->first_block = block_;
    s->blocks = static_cast<int>(min(left_, int64_t{s->all_blocks - block_}));
    const int seen = BlocksBefore(tile_.limit(p_, s->length, last_token_));
    s->visible = max(0, min(seen - block_, s->blocks));
    s->opening = opening_;
    left_ -= s->blocks;
    opening_ = false;
    block_ = 0;
    ++batch_;
    return true;
  }

 private:
  const DenseDecodeParams& p_;
  const RowTile& tile_;
  const int last_token_;
  int batch_;
  int block_;
  int64_t left_;
  bool opening_ = true;
};

}  // namespace flashmla::sm90
