// The kernel for vectors of any width: every dtype, every processor.
//
// Blocks of kBlock tokens, which lie in one page, are converted to floats once for all rows of the
// tile:
//
//   keys    [kBlock, 576]     147 KB    from the page
//   q       [rows, 576]       2.3 KB    per row, converted once per tile
//   scores  [rows, kBlock]              = q keys^T: vectors along the 576, then summed lane by lane
//   p       [rows, kBlock]              = exp(scores - max), in place, rounded to the input dtype
//   acc     [rows, 512]       2 KB      per row; = acc * exp(old max - max) + p keys[:, :512]
//
// Both products are blocked in registers (see Shape), and each element is summed in one order,
// whatever block it falls into.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/dense_decode/task.h"
#include "cpu/simd.h"

namespace flashmla::cpu {

inline constexpr int kBlock = 64;  // tokens converted and multiplied at a time
static_assert(kPageSize % kBlock == 0);

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

// The numbers of an FP8 token, rounded to the input dtype.
template <DType D, int N>
FLASHMLA_INLINE void Dequantize(const uint8_t* token, float* numbers) {
  for (int tile = 0; tile < kHeadDimV; tile += kFp8Tile) {
    float scale;
    std::memcpy(&scale, token + kHeadDimV + tile / kFp8Tile * sizeof(scale), sizeof(scale));
    for (int d = tile; d < tile + kFp8Tile; d += N) {
      Store<N>(Round<D, N>(LoadE4m3<N>(token + d) * scale), numbers + d);
    }
  }
  uint16_t rope[kHeadDim - kHeadDimV];
  std::memcpy(rope, token + kFp8RopeOffset, sizeof(rope));
  for (int d = 0; d < kHeadDim - kHeadDimV; d += N) {
    Store<N>(LoadAs<DType::kBF16, N>(rope + d), numbers + kHeadDimV + d);
  }
}

// Tokens [first, first + count) of the task's sequence, which lie in one page. The rest of the
// block becomes zero, up to where the products in registers read it.
template <DType D, int N>
FLASHMLA_INLINE void LoadKeys(const DenseDecodeParams& p, const Task& task, int64_t first,
                              int count, float* keys) {
  const int64_t index = IndexOfToken(p, task, first);
  if (index < 0) {
    std::fill_n(keys, count * kHeadDim, kNan);
  } else if (p.fp8_cache) {
    const auto* from = static_cast<const uint8_t*>(p.k_cache) + index * kFp8TokenBytes;
    for (int token = 0; token < count; ++token, from += p.h_kv * kFp8TokenBytes) {
      Dequantize<D, N>(from, keys + token * kHeadDim);
    }
  } else {
    const auto* from = static_cast<const Element<D>*>(p.k_cache) + index * kHeadDim;
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
//
// A sum rounds by how large it has become: short sums, and a sum of these, are the more exact, and
// vectors of 4 and 8 lanes, whose sums are the longest, come close to those of 16.
template <int N, int kRows, int kTokens>
FLASHMLA_INLINE void Scores(const float* q, const float* keys, float* scores) {
  constexpr int kShort = 9 * N;
  static_assert(kRows * kTokens % N == 0 && 16 % kTokens == 0 && kHeadDim % kShort == 0);
  Floats<N> total[kRows * kTokens] = {};
  for (int first = 0; first < kHeadDim; first += kShort) {
    Floats<N> acc[kRows * kTokens] = {};
    for (int d = first; d < first + kShort; d += N) {
      FLASHMLA_UNROLL
      for (int token = 0; token < kTokens; ++token) {
        const Floats<N> key = Load<N>(keys + token * kHeadDim + d);
        FLASHMLA_UNROLL
        for (int row = 0; row < kRows; ++row) {
          acc[row * kTokens + token] += Load<N>(q + row * kHeadDim + d) * key;
        }
      }
    }
    FLASHMLA_UNROLL
    for (int i = 0; i < kRows * kTokens; ++i) total[i] += acc[i];
  }
  alignas(64) float sums[kRows * kTokens];
  FLASHMLA_UNROLL
  for (int i = 0; i < kRows * kTokens; i += N) Store<N>(SumEach<N>(total + i), sums + i);
  FLASHMLA_UNROLL
  for (int row = 0; row < kRows; ++row) {
    std::memcpy(scores + row * kBlock, sums + row * kTokens, kTokens * sizeof(float));
  }
}

// scores[rows, count] = q keys^T, and something finite or NaN up to the next multiple of 16 tokens.
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
      const float weight = p[row * kBlock + token];
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

inline constexpr int64_t kVectorWorkspace =
    kBlock * kHeadDim + kMaxRows * (kHeadDim + kBlock + 1);  // floats

// The task's partial result, into scratch.partial.
template <DType D, int N>
FLASHMLA_INLINE void AttendWith(const DenseDecodeParams& p, const Task& task, Scratch& scratch) {
  const int64_t rows = task.rows;
  float* keys = scratch.workspace.data();
  float* q = keys + kBlock * kHeadDim;
  float* scores = q + kMaxRows * kHeadDim;
  float* keep = scores + kMaxRows * kBlock;
  const Partial& partial = scratch.partial;
  std::fill_n(partial.acc(), rows * kHeadDimV, 0.0f);
  std::fill_n(partial.max(), rows, -kInf);
  std::fill_n(partial.sum(), rows, 0.0f);
  if (task.first_token >= task.end_token) return;
  if (scratch.tile != task.tile) LoadQueries<D, N>(p, task, q);
  scratch.tile = task.tile;

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
FLASHMLA_INLINE void MergeWith(int64_t rows, const Partial& into, const Partial& from) {
  for (int64_t row = 0; row < rows; ++row) {
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

}  // namespace flashmla::cpu
