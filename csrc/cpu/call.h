// How the attention of a call is divided into tasks.
//
// The query rows that read the same tokens (of dense decode those of a sequence and KV head, row r
// being query token r / group and head r % group; of sparse attention the heads of a query token)
// are cut into tiles of at most kMaxRows, the tokens into chunks. A task is one tile over one
// chunk, and gives a partial result: for each row the greatest score, the sum of exp(score -
// greatest), and the so weighted sum of the values.
//
//            chunk 0        chunk 1        chunk 2
//   tile 0   task 0 ------> task 2 ------> task 4 ----> out, lse       a tile's partial results are
//   tile 1   task 1 ------> task 3 ------> task 5 ----> out, lse       merged in the order of
//   chunks
//
// Tasks run on XLA's threads, in any order and at any speed. The boundaries of chunks follow from
// the sequence's length alone, and a partial result that is early waits until those before it are
// merged: so the bits of a row depend neither on the threads nor on the rest of the batch. Scratch
// memory is a constant per thread; results that wait are few, and never more than kMaxChunks - 1
// per tile.
//
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/dense_decode/task.h"
#include "cpu/parallel_for.h"

namespace flashmla::cpu {

inline constexpr int64_t kMinChunkTokens = 256;  // shorter chunks cost more than they give
inline constexpr int64_t kMaxChunks = 64;        // and more of them too

static_assert(kMinChunkTokens % kPageSize == 0);

// What a call wants to know of its parameters; specialised for each kind of them.
template <typename Params>
struct TokenSets;

// Of dense decode, a set is the tokens of a sequence and KV head.
template <>
struct TokenSets<DenseDecodeParams> {
  static int64_t Sequences(const DenseDecodeParams& p) { return p.batch; }
  static int64_t KvHeads(const DenseDecodeParams& p) { return p.h_kv; }
  // Query rows of each set.
  static int64_t Rows(const DenseDecodeParams& p) { return p.rows(); }
  // Tokens.
  static int64_t Length(const DenseDecodeParams& p, int64_t sequence) {
    return EffectiveLength(p.cache_seqlens[sequence], p.max_pages_per_seq, p.s_q);
  }
  // The end of those that a row sees.
  static int64_t End(const DenseDecodeParams& p, int64_t length, int64_t row) {
    return EndOfRow(p, length, row);
  }
};

// What does a task.
template <typename Params>
struct KernelsFor {
  int64_t workspace;  // floats
  void (*attend)(const Params&, const Task&, Scratch&);
  void (*merge)(int64_t rows, const Partial& into, const Partial& from);
  void (*finish)(const Params&, const Task&, const Partial&);
};

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline int64_t ChunkTokens(int64_t length) {
  return std::max(kMinChunkTokens, CeilDiv(length, kMaxChunks * kPageSize) * kPageSize);
}

template <typename Params>
class Call {
  using Sets = TokenSets<Params>;

 public:
  Call(const Params& p, const KernelsFor<Params>& kernels) : p_(p), kernels_(kernels) {
    const int64_t max_tiles = CeilDiv(Sets::Rows(p), kMaxRows);
    tile_rows_ = CeilDiv(Sets::Rows(p), max_tiles);
    tiles_ = CeilDiv(Sets::Rows(p), tile_rows_);
    first_task_.reserve(Sets::Sequences(p) + 1);
    first_task_.push_back(0);
    for (int64_t i = 0; i < Sets::Sequences(p); ++i) {
      first_task_.push_back(first_task_.back() + Sets::KvHeads(p) * tiles_ * Chunks(Length(i)));
    }
    results_ = std::make_unique<Result[]>(Sets::Sequences(p) * Sets::KvHeads(p) * tiles_);
  }

  int64_t num_tasks() const { return first_task_.back(); }

  void Run(int64_t index, Scratch& scratch) {
    // Tasks are numbered by sequence, KV head, chunk and tile, so that the tiles of a chunk, which
    // read the same pages, run at about the same time.
    const int64_t sequence =
        std::upper_bound(first_task_.begin(), first_task_.end(), index) - first_task_.begin() - 1;
    const int64_t length = Length(sequence), chunks = Chunks(length);
    index -= first_task_[sequence];
    const int64_t tile = index % tiles_, chunk = index / tiles_ % chunks;
    Task task;
    task.sequence = sequence;
    task.head = index / tiles_ / chunks;
    task.first_row = tile * tile_rows_;
    task.rows = std::min(tile_rows_, Sets::Rows(p_) - task.first_row);
    task.length = length;
    task.first_token = chunk * ChunkTokens(length);
    task.end_token = std::min(task.first_token + ChunkTokens(length),
                              Sets::End(p_, length, task.first_row + task.rows - 1));
    task.tile = (sequence * Sets::KvHeads(p_) + task.head) * tiles_ + tile;

    if (!scratch.workspace.data()) scratch.workspace = Buffer(kernels_.workspace);
    if (!scratch.partial) scratch.partial = Partial(tile_rows_);
    kernels_.attend(p_, task, scratch);
    if (chunks == 1) {
      kernels_.finish(p_, task, scratch.partial);
    } else {
      Collect(task, chunk, chunks, scratch.partial);
    }
  }

 private:
  // A tile's result so far: of the chunks before `next`, and those that came early.
  struct Result {
    std::mutex mutex;
    int64_t next = 0;
    Partial merged;
    std::vector<Partial> early;
  };

  int64_t Length(int64_t sequence) const { return Sets::Length(p_, sequence); }

  static int64_t Chunks(int64_t length) {
    return std::max<int64_t>(1, CeilDiv(length, ChunkTokens(length)));
  }

  void Collect(const Task& task, int64_t chunk, int64_t chunks, Partial& partial) {
    Result& result = results_[task.tile];
    const std::lock_guard lock(result.mutex);
    if (chunk != result.next) {
      result.early.resize(chunks);
      result.early[chunk] = std::move(partial);
      return;
    }
    if (chunk == 0) {
      std::swap(result.merged, partial);
    } else {
      kernels_.merge(task.rows, result.merged, partial);
    }
    ++result.next;
    for (; result.next < chunks && !result.early.empty() && result.early[result.next];
         ++result.next) {
      kernels_.merge(task.rows, result.merged, result.early[result.next]);
      result.early[result.next] = Partial();
    }
    if (result.next == chunks) {
      kernels_.finish(p_, task, result.merged);
      result.merged = Partial();
      result.early.clear();
    }
  }

  const Params& p_;
  const KernelsFor<Params>& kernels_;
  int64_t tile_rows_, tiles_;
  std::vector<int64_t> first_task_;    // [batch + 1]
  std::unique_ptr<Result[]> results_;  // [batch, h_kv, tiles]
};

// All of a call's work.
template <typename Params>
void RunCall(const KernelsFor<Params>& kernels, const Params& p, const ThreadPool& pool) {
  Call<Params> call(p, kernels);
  std::vector<Scratch> scratch(NumWorkers(pool, call.num_tasks()));
  ParallelFor(pool, call.num_tasks(),
              [&](int64_t worker, int64_t index) { call.Run(index, scratch[worker]); });
}

}  // namespace flashmla::cpu
