// Sparse attention on the CPU: as dense decode in vectors, over blocks of tokens that are gathered.
//
// How the work is divided among threads: cpu/call.h. A set of tokens is what a query token lists;
// what it lists that is no token of a pool takes no part.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cpu/call.h"
#include "cpu/dense_decode/vector_kernel.h"
#include "cpu/instruction_sets.h"
#include "cpu/kernels.h"

namespace flashmla::cpu {

template <>
struct TokenSets<SparseAttentionParams> {
  static int64_t Sequences(const SparseAttentionParams& p) { return p.queries(); }
  static int64_t KvHeads(const SparseAttentionParams&) { return 1; }
  static int64_t Rows(const SparseAttentionParams& p) { return p.h_q; }
  static int64_t Length(const SparseAttentionParams& p, int64_t) { return p.listed(); }
  static int64_t End(const SparseAttentionParams&, int64_t length, int64_t) { return length; }
};

namespace {

// Of a place in a query token's lists, which follow each other: the pool, and the token there; -1
// if there is none.
struct Place {
  const TokenScope& scope;
  int64_t token;
};

Place PlaceOf(const SparseAttentionParams& p, int64_t query, int64_t number) {
  const bool second = number >= p.scopes[0].topk;
  const TokenScope& scope = p.scopes[second];
  if (second) number -= p.scopes[0].topk;
  if (number >= scope.length[query / p.s_q]) return {scope, -1};
  const int64_t token = scope.indices[query * scope.topk + number];
  return {scope, token < scope.num_pages * scope.page_size ? token : -1};
}

// The scale that a number in ue8m0 stands for, without arithmetic on subnormal floats.
float PowerOf(uint8_t exponent) {
  if (exponent == 255) return kNan;
  const uint32_t bits = exponent == 0 ? 0x400000 : uint32_t{exponent} << 23;
  float power;
  std::memcpy(&power, &bits, sizeof(power));
  return power;
}

// The numbers of a token, kHeadDim of them: zeros behind those that it has.
template <DType D, int N>
FLASHMLA_INLINE void LoadToken(const SparseAttentionParams& p, const Place& place, float* numbers) {
  const int64_t token = place.token;
  switch (p.format) {
    case TokenFormat::kNumbers: {
      const auto* from = static_cast<const Element<D>*>(place.scope.pool) + token * p.head_dim;
      for (int d = 0; d < p.head_dim; d += N) Store<N>(LoadAs<D, N>(from + d), numbers + d);
      break;
    }
    case TokenFormat::kFp8:
      Dequantize<D, N>(static_cast<const uint8_t*>(place.scope.pool) + token * kFp8TokenBytes,
                       numbers);
      break;
    case TokenFormat::kFp8Apart: {
      const int64_t page_size = place.scope.page_size, row = token % page_size;
      const auto* page = static_cast<const uint8_t*>(place.scope.pool) +
                         token / page_size * page_size * kFp8ApartTokenBytes;
      const uint8_t* codes = page + row * kFp8ApartDataBytes;
      const uint8_t* scales = page + page_size * kFp8ApartDataBytes + row * kFp8ApartScaleBytes;
      for (int tile = 0; tile < kFp8ApartCodes; tile += kFp8ApartTile) {
        const float scale = PowerOf(scales[tile / kFp8ApartTile]);
        for (int d = tile; d < tile + kFp8ApartTile; d += N) {
          Store<N>(Round<D, N>(LoadE4m3<N>(codes + d) * scale), numbers + d);
        }
      }
      uint16_t rope[kFp8ApartDim - kFp8ApartCodes];
      std::memcpy(rope, codes + kFp8ApartCodes, sizeof(rope));
      for (int d = 0; d < kFp8ApartDim - kFp8ApartCodes; d += N) {
        Store<N>(LoadAs<DType::kBF16, N>(rope + d), numbers + kFp8ApartCodes + d);
      }
      break;
    }
  }
  std::fill(numbers + p.head_dim, numbers + kHeadDim, 0.0f);
}

// The task's partial result, into scratch.partial.
template <DType D, int N>
FLASHMLA_INLINE void AttendWith(const SparseAttentionParams& p, const Task& task,
                                Scratch& scratch) {
  const int64_t rows = task.rows;
  float* keys = scratch.workspace.data();
  float* q = keys + kBlock * kHeadDim;
  float* scores = q + kMaxRows * kHeadDim;
  float* keep = scores + kMaxRows * kBlock;
  const Partial& partial = scratch.partial;
  std::fill_n(partial.acc(), rows * kHeadDimV, 0.0f);
  std::fill_n(partial.max(), rows, -kInf);
  std::fill_n(partial.sum(), rows, 0.0f);
  if (scratch.tile != task.tile) {
    for (int64_t row = 0; row < rows; ++row) {
      const auto* from = static_cast<const Element<D>*>(p.q) +
                         (task.sequence * p.h_q + task.first_row + row) * p.head_dim;
      float* to = q + row * kHeadDim;
      for (int d = 0; d < p.head_dim; d += N) Store<N>(LoadAs<D, N>(from + d), to + d);
      std::fill(to + p.head_dim, to + kHeadDim, 0.0f);
    }
  }
  scratch.tile = task.tile;

  int visible[kMaxRows];
  for (int64_t number = task.first_token; number < task.end_token;) {
    int count = 0;
    for (; number < task.end_token && count < kBlock; ++number) {
      const Place place = PlaceOf(p, task.sequence, number);
      if (place.token >= 0) LoadToken<D, N>(p, place, keys + count++ * kHeadDim);
    }
    if (count == 0) continue;
    const int padded = (count + 15) / 16 * 16;
    std::fill(keys + count * kHeadDim, keys + padded * kHeadDim, 0.0f);
    AllScores<N>(q, keys, rows, count, scores);
    for (int64_t row = 0; row < rows; ++row) {
      visible[row] = count;
      Softmax<D, N>(scores + row * kBlock, count, p.softmax_scale, partial.max() + row,
                    partial.sum() + row, keep + row);
    }
    AllValues<N>(scores, keys, keep, visible, rows, partial.acc());
  }
}

template <DType D, int N>
FLASHMLA_INLINE void FinishWith(const SparseAttentionParams& p, const Task& task,
                                const Partial& partial) {
  const int64_t batch = task.sequence / p.s_q, query_token = task.sequence % p.s_q;
  for (int64_t row = 0; row < task.rows; ++row) {
    const int64_t head = task.first_row + row;
    const int64_t place = (batch * p.h_q + head) * p.s_q + query_token;
    const float sum = partial.sum()[row], lse = partial.max()[row] + std::log(sum);
    p.max_logits[place] = partial.max()[row];
    p.lse[place] = lse;
    // exp(lse) / (exp(lse) + exp(sink)), of the two infinite ones too
    const float share = sum == 0 ? 0.0f : 1.0f / (1.0f + std::exp(p.attn_sink[head] - lse)) / sum;
    const float* acc = partial.acc() + row * kHeadDimV;
    auto* out = static_cast<Element<D>*>(p.out) + (task.sequence * p.h_q + head) * kHeadDimV;
    for (int d = 0; d < kHeadDimV; d += N) StoreAs<D, N>(Load<N>(acc + d) * share, out + d);
  }
}

FLASHMLA_KERNELS(SparseAttentionParams, SparseBaseline, 4, )
#if defined(__x86_64__)
FLASHMLA_KERNELS(SparseAttentionParams, SparseAvx2, 8, [[gnu::target(FLASHMLA_AVX2)]])
FLASHMLA_KERNELS(SparseAttentionParams, SparseAvx512, 16, [[gnu::target(FLASHMLA_AVX512)]])
#endif

template <DType D>
const KernelsFor<SparseAttentionParams>& BestKernels() {
#if defined(__x86_64__)
  if (HasAvx512()) return SparseAvx512<D>::kKernels;
  if (HasAvx2()) return SparseAvx2<D>::kKernels;
#endif
  return SparseBaseline<D>::kKernels;
}

}  // namespace

void SparseAttention(const SparseAttentionParams& p, const ThreadPool& pool) {
  switch (p.dtype) {
    case DType::kBF16:
      return RunCall(BestKernels<DType::kBF16>(), p, pool);
    case DType::kF16:
      return RunCall(BestKernels<DType::kF16>(), p, pool);
    case DType::kF32:
      return RunCall(BestKernels<DType::kF32>(), p, pool);
  }
}

}  // namespace flashmla::cpu
