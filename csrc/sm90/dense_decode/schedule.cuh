// Who works on what. Derived by every thread block from the sequence lengths alone, so that there
// is no schedule to make beforehand and none that could be stale.
//
// The work of one row tile is a line of KV blocks (pages): sequence after sequence, each with its
// blocks in order, an empty sequence counting as one block so that somebody writes its result.
// Between two sequences lie `cost` more units: what it takes to finish one and begin the next. The
// line is cut into `active` ranges of equal length, one per partition, and no more of them than
// make the longest shorter: every part costs something to write and to merge. Where all sequences
// are of one length, cuts fall between them if they can. A cut between two sequences belongs to the
// second one's first block. A sequence that lies within one range is finished there; one that is
// cut leaves a partial result in each range it touches, at most two per range (its first sequence
// and its last), so the workspace is bounded by the grid.
//
// Batch-invariantly, where a sequence is cut must not depend on the others. So it is cut into
// chunks, by its own length alone; each is computed from scratch and leaves a partial result, and
// the cuts of the line move to the nearest chunk's beginning.
#pragma once

#include <climits>
#include <cstdint>

#include "params.h"

namespace flashmla::sm90 {

struct Range {
  int batch;      // where it starts: a sequence,
  int block;      // and a block in it
  int end_batch;  // where it ends: before this block of this sequence. An idle partition's
  int end_block;  // starts and ends at the same place
  int units;      // the place on the line of the first block of `batch`
  int total;      // units on the whole line
  int active;     // ranges on the whole line
  int cost;       // units between sequences
};

__device__ __forceinline__ int SequenceLength(const DenseDecodeParams& p, int batch) {
  return EffectiveLength(p.cache_seqlens[batch], p.max_pages_per_seq, p.s_q);
}

// KV blocks that hold the first `length` tokens.
__device__ __forceinline__ int BlocksBefore(int length) {
  return length <= 0 ? 0 : (length - 1) / kPageSize + 1;
}
__device__ __forceinline__ int BlocksOf(int length) { return max(BlocksBefore(length), 1); }

// KV blocks of a chunk of a sequence of so many.
__device__ __forceinline__ int ChunkBlocks(int blocks) {
  int chunk = kChunkPages;
  while (static_cast<int64_t>(chunk) * kMaxChunks < blocks) chunk *= 2;
  return chunk;
}
__device__ __forceinline__ int Chunks(int blocks) { return (blocks - 1) / ChunkBlocks(blocks) + 1; }

// The last partition that holds a unit before `end` of the line. The quotient of numbers below
// 2^53, rounded to a double, has the same integer part: one that is no integer lies farther from
// the next than it is rounded, being at least 1 / total away.
__device__ __forceinline__ int PartitionBefore(int end, const Range& range) {
  return static_cast<int>(static_cast<double>(int64_t{end} * range.active - 1) /
                          static_cast<double>(range.total));
}

// What the combine needs to know of a sequence that lies in several ranges.
struct SplitInfo {
  int batch;  // the sequence; -1: nothing to combine
  int first;  // partitions first..last hold a part each
  int last;
  int first_slot;  // which of its two slots the first partition used; the others used slot 0
};

// The range of `partition`. Every warp finds it on its own, without waiting for another.
// `most_cost` is the cost of another sequence in blocks; less is counted where ranges are short.
// `least` blocks are no reason to divide.
// The launch has checked that the line's length is no more than 31 bits.
__device__ inline Range FindRange(const DenseDecodeParams& p, int partition, int partitions,
                                  int most_cost, int least) {
  const int lane = threadIdx.x % 32;
  const int batch = static_cast<int>(p.batch);
  const int per_lane = (batch + 31) / 32;
  const int first = min(lane * per_lane, batch), last = min(first + per_lane, batch);
  int mine = 0, shortest = INT_MAX, longest = 0;
#pragma unroll 8
  for (int b = first; b < last; ++b) {
    const int length = BlocksOf(SequenceLength(p, b));
    mine += length;
    shortest = min(shortest, length);
    longest = max(longest, length);
  }
  int before = mine;  // inclusive scan over the warp
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  const int blocks = __shfl_sync(~0u, before, 31);
  before -= mine;

  Range range;
  const int most = min(blocks, partitions);
  const auto needed = [&](int total) { return max((total - 1) / most + 1, least); };
  range.cost = 0;
  range.active = 0;
  if (batch > 1) {
    while (range.cost < most_cost && blocks >= 4 * (range.cost + 1) * most) ++range.cost;
    longest = __reduce_max_sync(~0u, longest);
    if (longest == __reduce_min_sync(~0u, shortest)) {
      // Sequences of one length: a range shall have one part of a sequence or whole sequences, and
      // may be somewhat longer for it.
      const int each = needed(blocks), enough = needed(blocks + range.cost * (batch - 1)) + 2;
      const int parts = longest / each, sequences = (each - 1) / longest + 1;
      if (parts > 0) {
        if ((longest - 1) / parts + 1 <= enough) range.active = batch * parts;
      } else if (batch % sequences == 0 && longest * sequences <= enough) {
        range.active = batch / sequences;
      }
    }
  }
  const bool even = range.active > 0;
  if (even) range.cost = 0;
  range.total = blocks + range.cost * (batch - 1);
  if (!even) range.active = (range.total - 1) / needed(range.total) + 1;
  if (partition >= range.active) {
    range.batch = range.block = range.end_batch = range.end_block = range.units = 0;
    return range;
  }
  const uint32_t active = range.active, total = range.total;
  const uint32_t each = total / active, rest = total - each * active;
  // Where a place on the line is, and the place of that sequence's first block.
  const auto locate = [&](int cut, int* sequence, int* block, int* units) {
    const int unit = each * cut + rest * cut / active;  // total * cut / active
    int position = before + range.cost * first;
    const int end = position + mine + range.cost * (last - first - 1);
    const bool here = first < last && position - range.cost <= unit && unit < end;
    int b = first;
    if (here) {
      for (int length; position + (length = BlocksOf(SequenceLength(p, b))) <= unit; ++b) {
        position += length + range.cost;
      }
    }
    const int holder = __ffs(__ballot_sync(~0u, here)) - 1;
    int place = max(unit - position, 0);
    if (p.batch_invariant && here) {
      const int all = BlocksOf(SequenceLength(p, b)), chunk = ChunkBlocks(all);
      place = (place + chunk / 2) / chunk * chunk;
      if (place >= all) ++b, place = 0;
    }
    *sequence = __shfl_sync(~0u, b, holder);
    *block = __shfl_sync(~0u, place, holder);
    *units = __shfl_sync(~0u, position, holder);
  };
  locate(partition, &range.batch, &range.block, &range.units);
  if (partition + 1 < range.active) {
    int unused;
    locate(partition + 1, &range.end_batch, &range.end_block, &unused);
  } else {
    range.end_batch = batch;
    range.end_block = 0;
  }
  return range;
}

// One sequence of a range, or one chunk of it, as one row tile sees it.
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
  int group;  // query heads that share a KV head
  int rows;   // query rows of a KV head
  int kv_head;
  int first;
  int count;
  int last_of_cluster;  // counted from `first`: the last row of the tiles that load pages together

  // The launch has checked that s_q * h_q is no more than 31 bits.
  __device__ RowTile(const DenseDecodeParams& p, int index, int cluster = 1)
      : index(index),
        group(static_cast<uint32_t>(p.h_q) / static_cast<uint32_t>(p.h_kv)),
        rows(static_cast<int>(p.s_q) * group) {
    const int per_head = (rows + kRowTile - 1) / kRowTile;
    kv_head = index / per_head;
    const int tile = index - kv_head * per_head;
    first = tile * kRowTile;
    const int left = rows - first;
    count = min(kRowTile, left);
    last_of_cluster = min((cluster - tile % cluster) * kRowTile, left) - 1;
  }
  __device__ int token(int row) const { return (first + row) / group; }
  __device__ int head(int row) const { return kv_head * group + (first + row) % group; }
  // Tokens of a sequence that the rows of a query token may see are those before this.
  __device__ int limit(const DenseDecodeParams& p, int length, int query_token) const {
    return p.causal ? length - static_cast<int>(p.s_q) + query_token + 1 : length;
  }
  // Where the workspace has the rows of a partial result: of a partition's first sequence or
  // another, or of a chunk.
  __device__ int partial_row(int partitions, int partition, bool opening) const {
    return ((index * partitions + partition) * 2 + (opening ? 0 : 1)) * min(rows, kRowTile);
  }
  __device__ int chunk_row(const DenseDecodeParams& p, int max_chunks, int batch, int chunk) const {
    const int sequence = index * static_cast<int>(p.batch) + batch;
    return (sequence * max_chunks + chunk) * min(rows, kRowTile);
  }
  __device__ int partial_row(const DenseDecodeParams& p, const Segment& s, int partitions,
                             int partition) const {
    if (!p.batch_invariant) return partial_row(partitions, partition, s.opening);
    const int chunk = s.first_block / ChunkBlocks(s.all_blocks);
    return chunk_row(p, static_cast<int>(p.max_chunks()), s.batch, chunk);
  }
};

// Walks the sequences of a range, or their chunks.
class Segments {
 public:
  __device__ Segments(const DenseDecodeParams& p, const RowTile& tile, const Range& range)
      : p_(p),
        tile_(tile),
        last_token_(tile.token(tile.last_of_cluster)),
        batch_(range.batch),
        block_(range.block),
        end_batch_(range.end_batch),
        end_block_(range.end_block) {}

  __device__ bool Next(Segment* s) {
    if (batch_ > end_batch_ || (batch_ == end_batch_ && block_ >= end_block_)) return false;
    s->batch = batch_;
    s->length = SequenceLength(p_, batch_);
    s->all_blocks = BlocksOf(s->length);
    s->first_block = block_;
    int end = batch_ == end_batch_ ? end_block_ : s->all_blocks;
    if (p_.batch_invariant) end = min(end, block_ + ChunkBlocks(s->all_blocks));
    s->blocks = end - block_;
    const int seen = BlocksBefore(tile_.limit(p_, s->length, last_token_));
    s->visible = max(0, min(seen - block_, s->blocks));
    s->opening = opening_;
    opening_ = false;
    block_ = end;
    if (end == s->all_blocks) ++batch_, block_ = 0;
    return true;
  }

 private:
  const DenseDecodeParams& p_;
  const RowTile& tile_;
  const int last_token_;
  int batch_;
  int block_;
  const int end_batch_;
  const int end_block_;
  bool opening_ = true;
};

}  // namespace flashmla::sm90
