// Who works on what. Derived by every thread block from the sequence lengths alone, so that there
// is no schedule to make beforehand and none that could be stale.
//
// The work of one row tile is a line of KV blocks (pages): sequence after sequence, each with its
// blocks in order, an empty sequence counting as one block so that somebody writes its result.
// Between two sequences lie `cost` more units: what it takes to finish one and begin the next. The
// line is cut into ranges of `each` units, one per partition; the last ones may find nothing left,
// and that is well: every part costs something to write and to merge. Where all sequences are of
// one length, `each` and `cost` are such that cuts fall between sequences, if they can. A cut
// between two sequences belongs to the second one's first block. A sequence that lies within one
// range is finished there; one that is cut leaves a partial result in each range it touches, at
// most two per range (its first sequence and its last), so the workspace is bounded by the grid.
//
// Batch-invariantly, where a sequence is cut must not depend on the others. So it is cut into
// chunks, by its own length alone; each is computed from scratch and leaves a partial result, and
// the cuts of the line move to the nearest chunk's beginning.
#pragma once

#include <climits>
#include <cstdint>

#include "params.h"
#include "sm90/attention/call.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {

struct Range {
  int batch;      // where it starts: a sequence,
  int block;      // and a block in it
  int end_batch;  // where it ends: before this block of this sequence. An idle partition's
  int end_block;  // starts and ends at the same place
  int units;      // the place on the line of the first block of `batch`
  int total;      // units on the whole line
  int each;       // units of a range
  int cost;       // units between sequences

  // The partition that has the last unit before `end` of the line.
  __device__ int PartitionBefore(int end) const {
    return static_cast<uint32_t>(end - 1) / static_cast<uint32_t>(each);
  }
};

// KV blocks that hold the first `length` tokens.
__device__ __forceinline__ int BlocksBefore(int length) {
  return (static_cast<uint32_t>(max(length, 0)) + (kPageSize - 1)) / kPageSize;
}
__device__ __forceinline__ int BlocksOf(int length) { return max(BlocksBefore(length), 1); }

__device__ __forceinline__ int SequenceLength(const DenseDecodeParams& p, int batch) {
  return EffectiveLength(p.cache_seqlens[batch], p.max_pages_per_seq, p.s_q);
}
__device__ __forceinline__ int SequenceLength(const SparseCall& p, int query) {
  return (BlocksBefore(p.count(0, query)) + BlocksBefore(p.count(1, query))) * kPageSize;
}

// KV blocks of a chunk of a sequence of so many.
__device__ __forceinline__ int ChunkBlocks(int blocks) {
  int chunk = kChunkPages;
  while (static_cast<int64_t>(chunk) * kMaxChunks < blocks) chunk *= 2;
  return chunk;
}
__device__ __forceinline__ int Chunks(int blocks) { return (blocks - 1) / ChunkBlocks(blocks) + 1; }

// A sequence that lies in several ranges, and a share in merging its parts.
struct alignas(16) Merge {
  int batch;
  int parts;      // 0: nothing to merge
  int first_row;  // where the workspace has the first part, in the first row tile;
  int next_row;   // part i is at next_row + i stride
  int stride;
  int index, count;  // this share, and how many there are
  int unused;
};
inline constexpr int kMergesEach = 2;  // of a partition: its first sequence and its last
static_assert(kMergesEach * sizeof(Merge) == kMergeWords * 4);

// The range of `partition`. Every warp finds it on its own, without waiting for another.
// `most_cost` is the cost of another sequence in blocks; less is counted where ranges are short.
// `least` blocks are no reason to divide.
// The launch has checked that the line's length is no more than 31 bits.
template <typename Call>
__device__ inline Range FindRange(const Call& p, int partition, int partitions, int most_cost,
                                  int least) {
  const int lane = ptx::LaneId();
  const int batch = static_cast<int>(p.batch);
  const int per_lane = (batch + 31) / 32;
  const int first = min(lane * per_lane, batch), last = min(first + per_lane, batch);
  int mine = 0, shortest = INT_MAX, longest = 0;
#pragma unroll 4
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

  Range range{};
  const auto share = [&](int units) {
    const uint32_t all = units, ranges = partitions;
    return max(static_cast<int>((all - 1) / ranges) + 1, least);
  };
  range.cost = 0;
  int even = 0;
  if (batch > 1) {
    while (range.cost < most_cost && blocks >= 4 * (range.cost + 1) * partitions) ++range.cost;
    longest = __reduce_max_sync(~0u, longest);
    if (longest == __reduce_min_sync(~0u, shortest)) {
      // Sequences of one length: a range shall have one part of a sequence or whole sequences, and
      // may be somewhat longer for it.
      const uint32_t length = longest, each = share(blocks);
      const uint32_t parts = length / each, sequences = (each - 1) / length + 1;
      const int most = share(blocks + range.cost * (batch - 1)) + 2;
      even = parts > 0 ? (length - 1) / parts + 1 : sequences * length;
      if (even > most) {
        even = 0;
      } else {
        range.cost = parts > 0 ? parts * even - length : 0;
      }
    }
  }
  range.total = blocks + range.cost * (batch - 1);
  range.each = even > 0 ? even : share(range.total);
  // Where the line is cut: before a block of a sequence. Twice the same code: once, it is fetched.
#pragma unroll 1
  for (int i = 0; i < 2; ++i) {
    const int unit = (partition + i) * range.each;
    int position = before + range.cost * first;
    const int end = position + mine + range.cost * (last - first - 1);
    const bool here = first < last && position - range.cost <= unit && unit < end;
    int b = first;
    if (here && per_lane > 1) {
      for (int length; position + (length = BlocksOf(SequenceLength(p, b))) <= unit; ++b) {
        position += length + range.cost;
      }
    }
    int block = max(unit - position, 0);
    if (p.batch_invariant && here) {
      const int all = BlocksOf(SequenceLength(p, b)), chunk = ChunkBlocks(all);
      block = (block + chunk / 2) / chunk * chunk;
      if (block >= all) ++b, block = 0;
    }
    const unsigned holders = __ballot_sync(~0u, here);
    const int holder = __ffs(holders) - 1;
    const bool behind = holders == 0;  // the line's end
    range.batch = range.end_batch, range.block = range.end_block;
    range.end_batch = behind ? batch : __shfl_sync(~0u, b, holder);
    range.end_block = behind ? 0 : __shfl_sync(~0u, block, holder);
    if (i == 0) range.units = behind ? range.total : __shfl_sync(~0u, position, holder);
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
  int opening;     // not 0: the first segment of its range

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
  int last_token;  // of the tiles that load pages together

  RowTile() = default;

  // The launch has checked that s_q * h_q is no more than 31 bits.
  __device__ RowTile(const DenseDecodeParams& p, int index, int cluster = 1)
      : index(index),
        group(static_cast<uint32_t>(p.h_q) / static_cast<uint32_t>(p.h_kv)),
        rows(static_cast<int>(p.s_q) * group) {
    const int per_head = (rows + kRowTile - 1) / kRowTile;
    kv_head = static_cast<uint32_t>(index) / static_cast<uint32_t>(per_head);
    const int tile = index - kv_head * per_head;
    first = tile * kRowTile;
    const int left = rows - first;
    count = min(kRowTile, left);
    last_token = token(min((cluster - tile % cluster) * kRowTile, left) - 1);
  }
  __device__ int token(int row) const { return static_cast<uint32_t>(first + row) / group; }
  __device__ int head(int row) const {
    return kv_head * group + static_cast<uint32_t>(first + row) % group;
  }
  // Tokens of a sequence that the rows of a query token may see are those before this.
  template <typename Call>
  __device__ int limit(const Call& p, int length, int query_token) const {
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
  template <typename Call>
  __device__ int partial_row(const Call& p, const Segment& s, int partitions, int partition) const {
    if (!p.batch_invariant) return partial_row(partitions, partition, s.opening);
    const int chunk = s.first_block / ChunkBlocks(s.all_blocks);
    return chunk_row(p, static_cast<int>(p.max_chunks()), s.batch, chunk);
  }
};

// What is left of a range.
struct Rest {
  int batch, block;
  int end_batch, end_block;
  int opening;  // not 0: all of it

  Rest() = default;
  __device__ explicit Rest(const Range& range)
      : batch(range.batch),
        block(range.block),
        end_batch(range.end_batch),
        end_block(range.end_block),
        opening(1) {}

  __device__ bool done() const {
    return batch > end_batch || (batch == end_batch && block >= end_block);
  }
  // Takes the first sequence, or a chunk of it, from what is left: something has to be.
  template <typename Call>
  __device__ __forceinline__ void Take(const Call& p, const RowTile& tile, Segment* s) {
    s->batch = batch;
    s->opening = opening;
    opening = 0;
    const int first = block;
    s->first_block = first;
    const int length = SequenceLength(p, batch), all = BlocksOf(length);
    s->length = length;
    s->all_blocks = all;
    int end = batch == end_batch ? end_block : all;
    if (p.batch_invariant) end = min(end, first + ChunkBlocks(all));
    s->blocks = end - first;
    const int seen = BlocksBefore(tile.limit(p, length, tile.last_token));
    s->visible = max(0, min(seen, end) - first);
    block = end;
    if (end == all) ++batch, block = 0;
  }
};

// Walks the sequences of a range, or their chunks.
template <typename Call>
class Segments {
 public:
  __device__ Segments(const Call& p, const RowTile& tile, const Range& range)
      : p_(p), tile_(tile), rest_(range) {}

  __device__ bool done() const { return rest_.done(); }
  __device__ bool Next(Segment* s) {
    if (done()) return false;
    rest_.Take(p_, tile_, s);
    return true;
  }

 private:
  const Call& p_;
  const RowTile& tile_;
  Rest rest_;
};

// The same by a warp that keeps in shared memory where it is, as its registers are scarce. All of
// its lanes call these.
struct SharedSegments {
  Rest rest;
  Segment current;
  int number;  // of those before it

  __device__ void Begin(const Range& range) {
    if (ptx::LaneId() == 0) rest = Rest(range), number = -1;
    __syncwarp();
  }
  __device__ bool done() const { return rest.done(); }
  template <typename Call>
  __device__ __forceinline__ bool Next(const Call& p, const RowTile& tile) {
    if (done()) return false;
    __syncwarp();  // all have read it
    if (ptx::LaneId() == 0) rest.Take(p, tile, &current), ++number;
    __syncwarp();
    return true;
  }
};

}  // namespace flashmla::sm90
