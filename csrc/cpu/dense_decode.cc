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
// memory is a constant per thread; results that wait are few, and never more than kMaxChunks - 1.
//
// A task. Blocks of kBlock tokens, which lie in one page, are converted to floats once for all rows
// of the tile:
//
//   keys    [kBlock, 576]     147 KB    from the page
//   q       [rows, 576]       2.3 KB    per row, converted once per tile
//   scores  [rows, kBlock]              = q keys^T: vectors along the 576, summed lane by lane
//   p       [rows, kBlock]              = exp(scores - max), in place, rounded to the input dtype
//   acc     [rows, 512]       2 KB      = acc * exp(old max - max) + p keys[:, :512]
//
// Both products are blocked in registers (4 x 4 vectors, see Shape), and each element is summed in
// one order whatever block it falls into. A token that a row must not see is not multiplied by zero
// but left out: its key may be NaN.
//
// Vectors. The kernel is written once, for vectors of any width, and compiled for the baseline of
// the platform (SSE2, NEON), AVX2 and AVX-512; the processor decides which runs.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "cpu/kernels.h"
#include "cpu/parallel_for.h"
#include "cpu/simd.h"

namespace flashmla::cpu {
namespace {

constexpr int64_t kMaxRows = 128;         // query rows of a task
constexpr int64_t kMinChunkTokens = 256;  // shorter chunks cost more than they give
constexpr int64_t kMaxChunks = 64;        // and more of them too
constexpr int kBlock = 64;                // tokens converted and multiplied at a time

static_assert(kPageSize % kBlock == 0 && kMinChunkTokens % kPageSize == 0);

// --- Memory of a task ------------------------------------------------------------------------

class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t size)
      : data_(static_cast<float*>(::operator new(size * sizeof(float), kAlignment))) {}
  float* data() const { return data_.get(); }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Delete {
    void operator()(float* data) const { ::operator delete(data, kAlignment); }
  };
  std::unique_ptr<float[], Delete> data_;
};

// What `rows` query rows know of the tokens they have seen.
struct Partial {
  Partial() = default;
  explicit Partial(int64_t rows) : buffer(rows * (kHeadDimV + 2)), rows(rows) {}
  explicit operator bool() const { return buffer.data() != nullptr; }
  float* acc() const { return buffer.data(); }                           // [rows, kHeadDimV]
  float* max() const { return buffer.data() + rows * kHeadDimV; }        // [rows]
  float* sum() const { return buffer.data() + rows * (kHeadDimV + 1); }  // [rows]

  Buffer buffer;
  int64_t rows = 0;
};

struct Scratch {
  Buffer keys, q, scores, keep;
  Partial partial;
  int64_t tile = -1;  // whose queries `q` holds
};

struct Task {
  int64_t sequence, head;          // of the KV heads
  int64_t first_row, rows;         // query rows
  int64_t first_token, end_token;  // those that the last row sees
  int64_t length;                  // of the sequence
  int64_t tile;                    // identifies sequence, head and first_row
};

// Where query row `row` of a KV head lies in [batch, s_q, h_q].
int64_t IndexOfRow(const DenseDecodeParams& p, const Task& task, int64_t row) {
  return (task.sequence * p.s_q + row / p.group()) * p.h_q + task.head * p.group() +
         row % p.group();
}

// The end of the tokens that query row `row` sees.
int64_t EndOfRow(const DenseDecodeParams& p, int64_t length, int64_t row) {
  return p.causal ? length - p.s_q + row / p.group() + 1 : length;
}

// --- The kernel ------------------------------------------------------------------------------

// A block of registers: `kAccumulators` vectors, as many rows high as possible. Sixteen vector
// registers, as SSE and AVX have, hold eight accumulators and their operands.
template <int N>
struct Shape {
#if defined(__x86_64__) || defined(__i386__)
  static constexpr int kAccumulators = N == 16 ? 16 : 8;
#else
  static constexpr int kAccumulators = 16;
#endif
  static constexpr int kRows = kAccumulators / 4;
};
constexpr int kSlab = 8;  // vectors of the values that all rows are multiplied with in turn

template <DType D, int N>
FLASHMLA_INLINE void LoadQueries(const DenseDecodeParams& p, const Task& task, float* q) {
  const auto* from = static_cast<const Element<D>*>(p.q);
  for (int64_t row = 0; row < task.rows; ++row) {
    const auto* query = from + IndexOfRow(p, task, task.first_row + row) * kHeadDim;
    for (int d = 0; d < kHeadDim; d += N) {
      Store<N>(LoadAs<D, N>(query + d), q + row * kHeadDim + d);
    }
  }
}

// Tokens [first, first + count) of the task's sequence, which lie in one page. The rest of the
// block becomes zero, up to where the products in registers read it.
template <DType D, int N>
FLASHMLA_INLINE void LoadKeys(const DenseDecodeParams& p, const Task& task, int64_t first,
                              int count, float* keys) {
  const int64_t slot = first / kPageSize;
  const int64_t page =
      slot < p.max_pages_per_seq ? p.block_table[task.sequence * p.max_pages_per_seq + slot] : -1;
  if (page < 0 || page >= p.num_pages) {
    std::fill_n(keys, count * kHeadDim, kNan);
  } else {
    const auto* from = static_cast<const Element<D>*>(p.k_cache) +
                       ((page * kPageSize + first % kPageSize) * p.h_kv + task.head) * kHeadDim;
    for (int token = 0; token < count; ++token, from += p.h_kv * kHeadDim) {
      FLASHMLA_UNROLL
      for (int d = 0; d < kHeadDim; d += N) {
        Store<N>(LoadAs<D, N>(from + d), keys + token * kHeadDim + d);
      }
    }
  }
  const int padded = (count + 15) / 16 * 16;
  std::fill(keys + count * kHeadDim, keys + padded * kHeadDim, 0.0f);
}

// scores[kRows, kTokens] = q keys^T
template <int N, int kRows, int kTokens>
FLASHMLA_INLINE void Scores(const float* q, const float* keys, float* scores) {
  static_assert(kRows * kTokens % N == 0 && 16 % kTokens == 0);
  Floats<N> acc[kRows * kTokens] = {};
  for (int d = 0; d < kHeadDim; d += N) {
    FLASHMLA_UNROLL
    for (int token = 0; token < kTokens; ++token) {
      const Floats<N> key = Load<N>(keys + token * kHeadDim + d);
      FLASHMLA_UNROLL
      for (int row = 0; row < kRows; ++row) {
        acc[row * kTokens + token] += Load<N>(q + row * kHeadDim + d) * key;
      }
    }
  }
  alignas(64) float sums[kRows * kTokens];
  FLASHMLA_UNROLL
  for (int i = 0; i < kRows * kTokens; i += N) Store<N>(SumEach<N>(acc + i), sums + i);
  FLASHMLA_UNROLL
  for (int row = 0; row < kRows; ++row) {
    std::memcpy(scores + row * kBlock, sums + row * kTokens, kTokens * sizeof(float));
  }
}

// scores[rows, count] = q keys^T, and something finite or NaN up to the next multiple of 16 tokens
template <int N>
FLASHMLA_INLINE void AllScores(const float* q, const float* keys, int64_t rows, int count,
                               float* scores) {
  constexpr int kRows = Shape<N>::kRows, kAccumulators = Shape<N>::kAccumulators;
  const int64_t blocked = rows / kRows * kRows;
  for (int token = 0; token < count && blocked > 0; token += 4) {
    for (int64_t row = 0; row < blocked; row += kRows) {
      Scores<N, kRows, 4>(q + row * kHeadDim, keys + token * kHeadDim,
                          scores + row * kBlock + token);
    }
  }
  int64_t row = blocked;
  if constexpr (kRows == 4) {
    if (rows - row >= 2) {
      constexpr int kTokens = kAccumulators / 2;
      for (int token = 0; token < count; token += kTokens) {
        Scores<N, 2, kTokens>(q + row * kHeadDim, keys + token * kHeadDim,
                              scores + row * kBlock + token);
      }
      row += 2;
    }
  }
  if (row < rows) {
    constexpr int kTokens = kAccumulators;
    for (int token = 0; token < count; token += kTokens) {
      Scores<N, 1, kTokens>(q + row * kHeadDim, keys + token * kHeadDim,
                            scores + row * kBlock + token);
    }
  }
}

// Turns a row's scores, of which the first `visible` count, into probabilities rounded to the input
// dtype. `keep` is the factor of what was summed before.
template <DType D, int N>
FLASHMLA_INLINE void Softmax(float* scores, int64_t visible, float scale, float* max, float* sum,
                             float* keep) {
  for (int i = 0; i < kBlock; i += N) Store<N>(Load<N>(scores + i) * scale, scores + i);
  std::fill(scores + visible, scores + kBlock, -kInf);
  Floats<N> greatest = Broadcast<N>(*max);
  for (int i = 0; i < kBlock; i += N) {
    const Floats<N> x = Load<N>(scores + i);
    greatest = x > greatest ? x : greatest;  // never NaN: those show in the sum
  }
  const float new_max = Max<N>(greatest);
  const float base = new_max == -kInf ? 0.0f : new_max;
  Floats<N> total{};
  for (int i = 0; i < kBlock; i += N) {
    const Floats<N> p = Exp<N>(Load<N>(scores + i) - base);
    total += p;
    Store<N>(RoundProbability<D, N>(p), scores + i);
  }
  *keep = Exp(*max - base);
  *max = new_max;
  *sum = *sum * *keep + Sum<N>(total);
}

// acc[kRows, kVectors * N] = keep * acc + p[kRows, count] values[count, kVectors * N]
template <int N, int kRows, int kVectors>
FLASHMLA_INLINE void Values(const float* p, const float* values, const float* keep, int64_t count,
                            float* acc) {
  Floats<N> sum[kRows * kVectors];
  FLASHMLA_UNROLL
  for (int row = 0; row < kRows; ++row) {
    FLASHMLA_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      sum[row * kVectors + i] = Load<N>(acc + row * kHeadDimV + i * N) * keep[row];
    }
  }
  for (int64_t token = 0; token < count; ++token) {
    Floats<N> value[kVectors];
    FLASHMLA_UNROLL
    for (int i = 0; i < kVectors; ++i) value[i] = Load<N>(values + token * kHeadDim + i * N);
    FLASHMLA_UNROLL
    for (int row = 0; row < kRows; ++row) {
      const Floats<N> weight = Broadcast<N>(p[row * kBlock + token]);
      FLASHMLA_UNROLL
      for (int i = 0; i < kVectors; ++i) sum[row * kVectors + i] += weight * value[i];
    }
  }
  FLASHMLA_UNROLL
  for (int row = 0; row < kRows; ++row) {
    FLASHMLA_UNROLL
    for (int i = 0; i < kVectors; ++i) {
      Store<N>(sum[row * kVectors + i], acc + row * kHeadDimV + i * N);
    }
  }
}

// One slab of the values for `kRows` rows, which see `count` tokens of the block.
template <int N, int kRows>
FLASHMLA_INLINE void SlabValues(const float* p, const float* values, const float* keep,
                                int64_t count, float* acc) {
  constexpr int kVectors = std::min(kSlab, Shape<N>::kAccumulators / kRows);
  for (int i = 0; i < kSlab; i += kVectors) {
    Values<N, kRows, kVectors>(p, values + i * N, keep, count, acc + i * N);
  }
}

// acc[rows, kHeadDimV] = keep * acc + p values, each row over the `visible` tokens that it sees.
template <int N>
FLASHMLA_INLINE void AllValues(const float* p, const float* keys, const float* keep,
                               const int* visible, int64_t rows, float* acc) {
  constexpr int kRows = Shape<N>::kRows;
  for (int d = 0; d < kHeadDimV; d += kSlab * N) {
    for (int64_t row = 0; row < rows;) {
      int64_t alike = 1;
      while (alike < kRows && row + alike < rows && visible[row + alike] == visible[row]) ++alike;
      const float* row_p = p + row * kBlock;
      float* row_acc = acc + row * kHeadDimV + d;
      if (alike == kRows) {
        SlabValues<N, kRows>(row_p, keys + d, keep + row, visible[row], row_acc);
        row += kRows;
      } else if (kRows > 2 && alike >= 2) {
        SlabValues<N, 2>(row_p, keys + d, keep + row, visible[row], row_acc);
        row += 2;
      } else {
        SlabValues<N, 1>(row_p, keys + d, keep + row, visible[row], row_acc);
        row += 1;
      }
    }
  }
}

// The task's partial result, into scratch.partial.
template <DType D, int N>
FLASHMLA_INLINE void AttendWith(const DenseDecodeParams& p, const Task& task,
                                const Scratch& scratch) {
  const int64_t rows = task.rows;
  float *keys = scratch.keys.data(), *q = scratch.q.data();
  float *scores = scratch.scores.data(), *keep = scratch.keep.data();
  const Partial& partial = scratch.partial;
  std::fill_n(partial.acc(), rows * kHeadDimV, 0.0f);
  std::fill_n(partial.max(), rows, -kInf);
  std::fill_n(partial.sum(), rows, 0.0f);
  if (task.first_token >= task.end_token) return;
  if (scratch.tile != task.tile) LoadQueries<D, N>(p, task, q);

  int visible[kMaxRows];
  for (int64_t first = task.first_token; first < task.end_token; first += kBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kBlock, task.end_token - first));
    LoadKeys<D, N>(p, task, first, count, keys);
    AllScores<N>(q, keys, rows, count, scores);
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t end = EndOfRow(p, task.length, task.first_row + row);
      visible[row] = static_cast<int>(std::clamp<int64_t>(end - first, 0, count));
      Softmax<D, N>(scores + row * kBlock, visible[row], p.softmax_scale, partial.max() + row,
                    partial.sum() + row, keep + row);
    }
    AllValues<N>(scores, keys, keep, visible, rows, partial.acc());
  }
}

// Adds the partial result of later tokens to that of earlier ones.
template <int N>
FLASHMLA_INLINE void MergeWith(const Partial& into, const Partial& from) {
  for (int64_t row = 0; row < into.rows; ++row) {
    const float a_max = into.max()[row], b_max = from.max()[row];
    const float max = a_max > b_max ? a_max : b_max;
    const float base = max == -kInf ? 0.0f : max;
    const float a = Exp(a_max - base), b = Exp(b_max - base);
    into.max()[row] = max;
    into.sum()[row] = into.sum()[row] * a + from.sum()[row] * b;
    float* acc = into.acc() + row * kHeadDimV;
    for (int d = 0; d < kHeadDimV; d += N) {
      Store<N>(Load<N>(acc + d) * a + Load<N>(from.acc() + row * kHeadDimV + d) * b, acc + d);
    }
  }
}

// The result of a tile whose tokens have all been seen.
template <DType D, int N>
FLASHMLA_INLINE void FinishWith(const DenseDecodeParams& p, const Task& task,
                                const Partial& partial) {
  for (int64_t row = 0; row < task.rows; ++row) {
    const int64_t r = task.first_row + row;
    const float sum = partial.sum()[row];
    const float divisor = sum == 0 ? 1.0f : sum;  // no token, or scores of -inf only: zeros
    const float* acc = partial.acc() + row * kHeadDimV;
    auto* out = static_cast<Element<D>*>(p.out) + IndexOfRow(p, task, r) * kHeadDimV;
    for (int d = 0; d < kHeadDimV; d += N) StoreAs<D, N>(Load<N>(acc + d) / divisor, out + d);
    const int64_t head = task.head * p.group() + r % p.group();
    p.lse[(task.sequence * p.h_q + head) * p.s_q + r / p.group()] =
        partial.max()[row] + std::log(sum);
  }
}

// --- One kernel per instruction set ----------------------------------------------------------

struct Kernels {
  void (*attend)(const DenseDecodeParams&, const Task&, const Scratch&);
  void (*merge)(const Partial&, const Partial&);
  void (*finish)(const DenseDecodeParams&, const Task&, const Partial&);
};

#define FLASHMLA_KERNELS(NAME, WIDTH, TARGET)                                                   \
  template <DType D>                                                                            \
  struct NAME {                                                                                 \
    TARGET static void Attend(const DenseDecodeParams& p, const Task& task, const Scratch& s) { \
      AttendWith<D, WIDTH>(p, task, s);                                                         \
    }                                                                                           \
    TARGET static void Merge(const Partial& into, const Partial& from) {                        \
      MergeWith<WIDTH>(into, from);                                                             \
    }                                                                                           \
    TARGET static void Finish(const DenseDecodeParams& p, const Task& task, const Partial& r) { \
      FinishWith<D, WIDTH>(p, task, r);                                                         \
    }                                                                                           \
    static constexpr Kernels kKernels{Attend, Merge, Finish};                                   \
  };

FLASHMLA_KERNELS(Baseline, 4, )
#if defined(__x86_64__)
#define FLASHMLA_AVX2 "avx2,fma"
#define FLASHMLA_AVX512 FLASHMLA_AVX2 ",avx512f,avx512bw,avx512dq,avx512vl"
FLASHMLA_KERNELS(Avx2, 8, __attribute__((target(FLASHMLA_AVX2))))
FLASHMLA_KERNELS(Avx512, 16, __attribute__((target(FLASHMLA_AVX512))))
#endif

template <DType D>
const Kernels& BestKernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return Avx512<D>::kKernels;
    }
    return Avx2<D>::kKernels;
  }
#endif
  return Baseline<D>::kKernels;
}

const Kernels& BestKernels(DType dtype) {
  switch (dtype) {
    case DType::kBF16:
      return BestKernels<DType::kBF16>();
    case DType::kF16:
      return BestKernels<DType::kF16>();
    default:
      return BestKernels<DType::kF32>();
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

    if (!scratch.keys.data()) {
      scratch.keys = Buffer(kBlock * kHeadDim);
      scratch.q = Buffer(tile_rows_ * kHeadDim);
      scratch.scores = Buffer(tile_rows_ * kBlock);
      scratch.keep = Buffer(tile_rows_);
    }
    if (!scratch.partial) scratch.partial = Partial(tile_rows_);
    scratch.partial.rows = task.rows;
    kernels_.attend(p_, task, scratch);
    scratch.tile = task.tile;
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
      kernels_.merge(result.merged, partial);
    }
    ++result.next;
    for (; result.next < chunks && !result.early.empty() && result.early[result.next];
         ++result.next) {
      kernels_.merge(result.merged, result.early[result.next]);
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
  DecodeWith(BestKernels(p.dtype), p, pool);
}

}  // namespace flashmla::cpu
