// Dense decode on the CPU.
//
// The work. The query rows that read one KV head (s_q * h_q / h_kv of them per sequence, row r
// being query token r / group and head r % group) are cut into tiles of at most kMaxRows, the
// tokens of a sequence into chunks. A task is one tile over one chunk, and gives a partial result:
// for each row the greatest score, the sum of exp(score - greatest), and the so weighted sum of the
// values.
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
// A task is computed by the best of these kernels that the processor can run, all of them in one
// binary:
//
//   dense_decode/vector_kernel.h   float32 arithmetic in vectors, written once and compiled for the
//                                  baseline of the platform (SSE2, NEON), AVX2 and AVX-512
//   dense_decode/amx_kernel.h      bfloat16 on the matrix units of AMX
//
// A token that a row must not see is never multiplied by zero, but left out: its key may be NaN.
#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

#include "cpu/dense_decode/amx_kernel.h"
#include "cpu/dense_decode/task.h"
#include "cpu/dense_decode/vector_kernel.h"
#include "cpu/kernels.h"
#include "cpu/parallel_for.h"

namespace flashmla::cpu {
namespace {

constexpr int64_t kMinChunkTokens = 256;  // shorter chunks cost more than they give
constexpr int64_t kMaxChunks = 64;        // and more of them too

static_assert(kMinChunkTokens % kPageSize == 0);

// --- One kernel per instruction set ----------------------------------------------------------

struct Kernels {
  int64_t workspace;  // floats
  void (*attend)(const DenseDecodeParams&, const Task&, Scratch&);
  void (*merge)(int64_t rows, const Partial& into, const Partial& from);
  void (*finish)(const DenseDecodeParams&, const Task&, const Partial&);
};

#define FLASHMLA_KERNELS(NAME, WIDTH, TARGET)                                                   \
  template <DType D>                                                                            \
  struct NAME {                                                                                 \
    TARGET static void Attend(const DenseDecodeParams& p, const Task& task, Scratch& s) {       \
      AttendWith<D, WIDTH>(p, task, s);                                                         \
    }                                                                                           \
    TARGET static void Merge(int64_t rows, const Partial& into, const Partial& from) {          \
      MergeWith<WIDTH>(rows, into, from);                                                       \
    }                                                                                           \
    TARGET static void Finish(const DenseDecodeParams& p, const Task& task, const Partial& r) { \
      FinishWith<D, WIDTH>(p, task, r);                                                         \
    }                                                                                           \
    static constexpr Kernels kKernels{kVectorWorkspace, Attend, Merge, Finish};                 \
  };

FLASHMLA_KERNELS(Baseline, 4, )

#if defined(__x86_64__)
FLASHMLA_KERNELS(Avx2, 8, [[gnu::target(FLASHMLA_AVX2)]])
FLASHMLA_KERNELS(Avx512, 16, [[gnu::target(FLASHMLA_AVX512)]])

bool HasAvx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool HasAvx512() {
  return HasAvx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
#endif

#if FLASHMLA_WITH_AMX
constexpr Kernels kAmx{kAmxWorkspace, AttendWithAmx, Avx512<DType::kBF16>::Merge,
                       Avx512<DType::kBF16>::Finish};
#endif

template <DType D>
const Kernels& BestKernels(bool fp8_cache) {
#if FLASHMLA_WITH_AMX
  if (D == DType::kBF16 && !fp8_cache && HasAvx512() && HasAmx()) return kAmx;
#endif
#if defined(__x86_64__)
  if (HasAvx512()) return Avx512<D>::kKernels;
  if (HasAvx2()) return Avx2<D>::kKernels;
#endif
  return Baseline<D>::kKernels;
}

const Kernels& BestKernels(const DenseDecodeParams& p) {
  switch (p.dtype) {
    case DType::kBF16:
      return BestKernels<DType::kBF16>(p.fp8_cache);
    case DType::kF16:
      return BestKernels<DType::kF16>(p.fp8_cache);
    default:
      return BestKernels<DType::kF32>(p.fp8_cache);
  }
}

// --- The tasks of a call ---------------------------------------------------------------------

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

int64_t ChunkTokens(int64_t length) {
  return std::max(kMinChunkTokens, CeilDiv(length, kMaxChunks * kPageSize) * kPageSize);
}

class Call {
 public:
  Call(const DenseDecodeParams& p, const Kernels& kernels) : p_(p), kernels_(kernels) {
    const int64_t max_tiles = CeilDiv(p.rows(), kMaxRows);
    tile_rows_ = CeilDiv(p.rows(), max_tiles);
    tiles_ = CeilDiv(p.rows(), tile_rows_);
    first_task_.reserve(p.batch + 1);
    first_task_.push_back(0);
    for (int64_t i = 0; i < p.batch; ++i) {
      first_task_.push_back(first_task_.back() + p.h_kv * tiles_ * Chunks(Length(i)));
    }
    results_ = std::make_unique<Result[]>(p.batch * p.h_kv * tiles_);
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
    task.rows = std::min(tile_rows_, p_.rows() - task.first_row);
    task.length = length;
    task.first_token = chunk * ChunkTokens(length);
    task.end_token = std::min(task.first_token + ChunkTokens(length),
                              EndOfRow(p_, length, task.first_row + task.rows - 1));
    task.tile = (sequence * p_.h_kv + task.head) * tiles_ + tile;

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

  int64_t Length(int64_t sequence) const {
    return EffectiveLength(p_.cache_seqlens[sequence], p_.max_pages_per_seq, p_.s_q);
  }

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

  const DenseDecodeParams& p_;
  const Kernels& kernels_;
  int64_t tile_rows_, tiles_;
  std::vector<int64_t> first_task_;    // [batch + 1]
  std::unique_ptr<Result[]> results_;  // [batch, h_kv, tiles]
};

void DecodeWith(const Kernels& kernels, const DenseDecodeParams& p, const ThreadPool& pool) {
  if (p.batch == 0 || p.rows() == 0) return;
  Call call(p, kernels);
  std::vector<Scratch> scratch(NumWorkers(pool, call.num_tasks()));
  ParallelFor(pool, call.num_tasks(),
              [&](int64_t worker, int64_t index) { call.Run(index, scratch[worker]); });
}

}  // namespace

void DenseDecode(const DenseDecodeParams& p, const ThreadPool& pool) {
  DecodeWith(BestKernels(p), p, pool);
}

}  // namespace flashmla::cpu
