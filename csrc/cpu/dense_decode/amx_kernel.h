// The kernel for bfloat16 on processors with matrix units: Intel's AMX, Sapphire Rapids and later.
//
// A tile register holds 16 rows of 64 bytes; one instruction multiplies [16, 32] by [32, 16]
// numbers in bfloat16 and adds in float32, 16 times what the vector units do. The right operand is
// in pairs: its row i holds elements 2 i and 2 i + 1 of all 16 columns. A block of kAmxBlock tokens
// goes through
//
//   scores [tokens, rows] = K Q^T    K straight from the pages, Q in pairs, packed once per tile
//   p      [rows, tokens]            exp(scores - max): rows are the lanes of vectors, so that sums
//                                    need no shuffles; transposed while it is rounded to bfloat16
//   acc    [rows, 512]   += p V      V in pairs of tokens, interleaved once for all rows
//
// Memory per thread, for 128 rows: q 147 KB, v 256 KB, scores 128 KB, p 64 KB, acc 256 KB.
//
// A tile multiplies whatever is in it, and 0 x NaN is NaN. So only tokens that all rows see take
// part in p V; the others of the block, of which there are fewer than s_q, are added row by row.
#pragma once

#if defined(__x86_64__) && defined(__linux__)
#define FLASHMLA_WITH_AMX 1

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

#include "cpu/dense_decode/task.h"
#include "cpu/simd.h"

// For what uses tile registers. The rest is inlined into it, and passes it nothing in vectors:
// Clang refuses those between functions compiled for different processors, inlined or not.
#define FLASHMLA_AMX [[gnu::target(FLASHMLA_AVX512 ",amx-tile,amx-bf16")]]
#define FLASHMLA_AMX_INLINE FLASHMLA_AMX FLASHMLA_INLINE

namespace flashmla::cpu {

inline constexpr int kAmxBlock = 256;                 // tokens
inline constexpr int kAmxRows = 16;                   // of a tile register
inline constexpr int kAmxDepth = 32;                  // numbers multiplied per instruction
inline constexpr int kSteps = kAmxBlock / kAmxDepth;  // of 32 tokens, which lie in one page
inline constexpr int kKeySteps = kHeadDim / kAmxDepth;
inline constexpr int kValueTiles = kHeadDimV / 16;
inline constexpr int kTile = 512;  // bfloat16 numbers in a tile register
static_assert(kPageSize % kAmxDepth == 0 && kMaxRows % kAmxRows == 0 && kValueTiles % 4 == 0);

struct AmxWorkspace {
  alignas(64) uint16_t q[kMaxRows / kAmxRows][kKeySteps][kTile];  // [16 pairs, 16 rows, 2]
  uint16_t v[kSteps][kValueTiles][kTile];                         // [16 pairs, 16 numbers, 2]
  uint16_t p[kMaxRows / kAmxRows][kSteps][kTile];                 // [16 rows, 32 tokens]
  float scores[kMaxRows / kAmxRows][kAmxBlock][kAmxRows];
  float keep[kMaxRows];
  uint16_t cut[kAmxDepth][kHeadDim];      // the last tokens, with zeros after them
  uint16_t missing[kAmxDepth][kHeadDim];  // NaN: tokens of a page that does not exist
};
inline constexpr int64_t kAmxWorkspace = sizeof(AmxWorkspace) / sizeof(float);

// Whether the processor has the instructions, and the system lets this process use them.
inline bool HasAmx() {
  static const bool has = [] {
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
    const bool bf16 = d >> 22 & 1, tile = d >> 24 & 1;
    constexpr int kRequestPermission = 0x1023, kTileData = 18;
    return bf16 && tile && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
}

// All eight registers: 16 rows of 64 bytes.
FLASHMLA_AMX_INLINE void ConfigureTiles() {
  alignas(64) uint8_t config[64] = {1};
  for (int i = 0; i < 8; ++i) {
    config[16 + 2 * i] = 64;
    config[48 + i] = 16;
  }
  _tile_loadconfig(config);
}

// --- Layouts ---------------------------------------------------------------------------------

template <int kDistance, size_t... I>
FLASHMLA_INLINE void Exchange(Words<16>& a, Words<16>& b, std::index_sequence<I...>) {
  const Words<16> x = a, y = b;
  a = __builtin_shufflevector(x, y, (I & kDistance ? 16 + I - kDistance : I)...);
  b = __builtin_shufflevector(x, y, (I & kDistance ? 16 + I : I + kDistance)...);
}

template <int kDistance>
FLASHMLA_INLINE void ExchangeAll(Words<16>* x) {
  FLASHMLA_UNROLL
  for (int i = 0; i < 16; ++i) {
    if (!(i & kDistance))
      Exchange<kDistance>(x[i], x[i + kDistance], std::make_index_sequence<16>{});
  }
}

FLASHMLA_INLINE void Transpose(Words<16>* x) {
  ExchangeAll<8>(x);
  ExchangeAll<4>(x);
  ExchangeAll<2>(x);
  ExchangeAll<1>(x);
}

FLASHMLA_INLINE void PackQueries(const DenseDecodeParams& p, const Task& task, AmxWorkspace& w) {
  const auto* from = static_cast<const uint16_t*>(p.q);
  for (int64_t first = 0; first < task.rows; first += kAmxRows) {
    for (int step = 0; step < kKeySteps; ++step) {
      Words<16> x[16] = {};
      for (int i = 0; i < 16 && first + i < task.rows; ++i) {
        const int64_t index = IndexOfRow(p, task, task.first_row + first + i);
        std::memcpy(&x[i], from + index * kHeadDim + step * kAmxDepth, 64);
      }
      Transpose(x);
      std::memcpy(w.q[first / kAmxRows][step], x, sizeof(x));
    }
  }
}

template <size_t... I>
FLASHMLA_INLINE void Interleave(const Halves<32>& a, const Halves<32>& b, uint16_t* first,
                                uint16_t* second, std::index_sequence<I...>) {
  const Halves<32> x = __builtin_shufflevector(a, b, (I / 2 + I % 2 * 32)...);
  const Halves<32> y = __builtin_shufflevector(a, b, (16 + I / 2 + I % 2 * 32)...);
  std::memcpy(first, &x, sizeof(x));
  std::memcpy(second, &y, sizeof(y));
}

// The values of 32 tokens `stride` numbers apart, of which those from `count` on become zero.
FLASHMLA_INLINE void PackValues(const uint16_t* from, int64_t stride, int count,
                                uint16_t (*v)[kTile]) {
  for (int pair = 0; pair < 16; ++pair, from += 2 * stride) {
    for (int tile = 0; tile < kValueTiles; tile += 2) {
      Halves<32> a{}, b{};
      if (2 * pair < count) std::memcpy(&a, from + tile * 16, sizeof(a));
      if (2 * pair + 1 < count) std::memcpy(&b, from + stride + tile * 16, sizeof(b));
      Interleave(a, b, v[tile] + pair * 32, v[tile + 1] + pair * 32,
                 std::make_index_sequence<32>{});
    }
  }
}

// --- Products --------------------------------------------------------------------------------

// Scores of 32 tokens with two groups of 16 rows, or with one.
template <bool kTwo>
FLASHMLA_AMX_INLINE void AmxScores(const uint16_t* tokens, int64_t stride,
                                   const uint16_t (*q)[kTile], float (*scores)[kAmxRows]) {
  const int64_t bytes = stride * sizeof(uint16_t);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < kKeySteps; ++step) {
    _tile_loadd(4, tokens + step * kAmxDepth, bytes);
    _tile_loadd(5, tokens + 16 * stride + step * kAmxDepth, bytes);
    _tile_loadd(6, q[step], 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 5, 6);
    if constexpr (kTwo) {
      _tile_loadd(7, q[kKeySteps + step], 64);
      _tile_dpbf16ps(2, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, scores, 64);
  _tile_stored(1, scores + 16, 64);
  if constexpr (kTwo) {
    _tile_stored(2, scores + kAmxBlock, 64);
    _tile_stored(3, scores + kAmxBlock + 16, 64);
  }
}

// acc += p V, or = p V, for two groups of 16 rows and 32 numbers, or one group and 64 numbers.
template <bool kTwo>
FLASHMLA_AMX_INLINE void AmxValues(const uint16_t (*p)[kTile],
                                   const uint16_t (*v)[kValueTiles][kTile], int tile, int steps,
                                   bool add, float* acc) {
  constexpr int64_t kBytes = kHeadDimV * sizeof(float);
  float* second = acc + (kTwo ? kAmxRows * kHeadDimV : 32);
  if (add) {
    _tile_loadd(0, acc, kBytes);
    _tile_loadd(1, acc + 16, kBytes);
    _tile_loadd(2, second, kBytes);
    _tile_loadd(3, second + 16, kBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (int step = 0; step < steps; ++step) {
    _tile_loadd(4, p[step], 64);
    _tile_loadd(6, v[step][tile], 64);
    _tile_loadd(7, v[step][tile + 1], 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (kTwo) {
      _tile_loadd(5, p[kSteps + step], 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    } else {
      _tile_loadd(5, v[step][tile + 2], 64);
      _tile_loadd(6, v[step][tile + 3], 64);
      _tile_dpbf16ps(2, 4, 5);
      _tile_dpbf16ps(3, 4, 6);
    }
  }
  _tile_stored(0, acc, kBytes);
  _tile_stored(1, acc + 16, kBytes);
  _tile_stored(2, second, kBytes);
  _tile_stored(3, second + 16, kBytes);
}

// --- Softmax ---------------------------------------------------------------------------------

// Turns the scores of 16 rows, one per lane, into probabilities: all in place, and those of the
// first `common` tokens, rounded to bfloat16, in `p` too. `count` is a multiple of 32; tokens from
// `visible` on, of each row, do not count.
FLASHMLA_INLINE void AmxSoftmax(float (*scores)[kAmxRows], int count, int common,
                                const int* visible, float scale, float* max, float* sum,
                                float* keep, uint16_t (*p)[kTile]) {
  typedef int32_t Ints __attribute__((vector_size(64)));
  Ints end;
  std::memcpy(&end, visible, sizeof(end));
  const Floats<16> old_max = Load<16>(max);
  Floats<16> greatest[4] = {old_max, old_max, old_max, old_max};
  for (int token = 0; token < count; token += 4) {
    FLASHMLA_UNROLL
    for (int i = 0; i < 4; ++i) {
      Floats<16> x = Load<16>(scores[token + i]) * scale;
      if (token + i >= common) x = end > token + i ? x : Broadcast<16>(-kInf);
      Store<16>(x, scores[token + i]);
      greatest[i] = x > greatest[i] ? x : greatest[i];
    }
  }
  greatest[0] = greatest[0] > greatest[1] ? greatest[0] : greatest[1];
  greatest[2] = greatest[2] > greatest[3] ? greatest[2] : greatest[3];
  const Floats<16> new_max = greatest[0] > greatest[2] ? greatest[0] : greatest[2];
  const Floats<16> base = new_max == -kInf ? Floats<16>{} : new_max;

  Floats<16> total[2] = {};
  for (int step = 0; step < count / kAmxDepth; ++step) {
    Words<16> pairs[16];
    for (int pair = 0; pair < 16; ++pair) {
      Words<16> rounded[2];
      FLASHMLA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const int token = step * kAmxDepth + 2 * pair + i;
        const Floats<16> weight = Exp<16>(Load<16>(scores[token]) - base);
        total[i] += weight;
        rounded[i] = Bits<16>(RoundProbability<DType::kBF16, 16>(weight));
        Store<16>(FromBits<16>(rounded[i]), scores[token]);
        if (token >= common) rounded[i] = Words<16>{};
      }
      pairs[pair] = rounded[0] >> 16 | rounded[1];
    }
    Transpose(pairs);
    std::memcpy(p[step], pairs, sizeof(pairs));
  }
  const Floats<16> kept = Exp<16>(old_max - base);
  Store<16>(kept, keep);
  Store<16>(new_max, max);
  Store<16>(Load<16>(sum) * kept + (total[0] + total[1]), sum);
}

// Multiplies what was summed before the block.
FLASHMLA_INLINE void Rescale(const float* keep, int64_t rows, float* acc) {
  for (int64_t row = 0; row < rows; ++row, acc += kHeadDimV) {
    if (keep[row] == 1) continue;
    for (int d = 0; d < kHeadDimV; d += 16) Store<16>(Load<16>(acc + d) * keep[row], acc + d);
  }
}

// acc += weight * value, for one token of one row.
FLASHMLA_INLINE void AddValue(float weight, const uint16_t* value, float* acc) {
  for (int d = 0; d < kHeadDimV; d += 16) {
    Store<16>(Load<16>(acc + d) + weight * LoadAs<DType::kBF16, 16>(value + d), acc + d);
  }
}

// --- The task --------------------------------------------------------------------------------

// The task's partial result, into scratch.partial.
FLASHMLA_AMX inline void AttendWithAmx(const DenseDecodeParams& p, const Task& task,
                                       Scratch& scratch) {
  auto& w = *reinterpret_cast<AmxWorkspace*>(scratch.workspace.data());
  const int groups = static_cast<int>((task.rows + kAmxRows - 1) / kAmxRows);
  const Partial& partial = scratch.partial;
  std::fill_n(partial.max(), groups * kAmxRows, -kInf);
  std::fill_n(partial.sum(), groups * kAmxRows, 0.0f);
  if (task.first_token >= task.end_token) {
    std::fill_n(partial.acc(), groups * kAmxRows * kHeadDimV, 0.0f);
    return;
  }
  ConfigureTiles();
  if (scratch.tile != task.tile) PackQueries(p, task, w);
  scratch.tile = task.tile;

  int visible[kMaxRows];
  for (int64_t first = task.first_token; first < task.end_token; first += kAmxBlock) {
    const int count = static_cast<int>(std::min<int64_t>(kAmxBlock, task.end_token - first));
    const int steps = (count + kAmxDepth - 1) / kAmxDepth;
    for (int row = 0; row < groups * kAmxRows; ++row) {
      const int64_t r = task.first_row + std::min<int64_t>(row, task.rows - 1);
      visible[row] =
          static_cast<int>(std::clamp<int64_t>(EndOfRow(p, task.length, r) - first, 0, count));
    }
    const int common = visible[0];

    const uint16_t* tokens[kSteps];
    int64_t strides[kSteps];
    for (int step = 0; step < steps; ++step) {
      const int64_t token = first + step * kAmxDepth;
      const int here = std::min(kAmxDepth, count - step * kAmxDepth);
      const int64_t index = IndexOfToken(p, task, token);
      const auto* from =
          static_cast<const uint16_t*>(p.k_cache) + std::max<int64_t>(index, 0) * kHeadDim;
      tokens[step] = index < 0 ? w.missing[0] : here < kAmxDepth ? w.cut[0] : from;
      strides[step] = tokens[step] == from ? p.h_kv * kHeadDim : kHeadDim;
      if (index < 0) {
        std::fill_n(w.missing[0], kAmxDepth * kHeadDim, uint16_t{0x7fc0});  // NaN
      } else if (here < kAmxDepth) {
        for (int i = 0; i < here; ++i, from += p.h_kv * kHeadDim) {
          std::memcpy(w.cut[i], from, sizeof(w.cut[i]));
        }
        std::fill_n(w.cut[here], (kAmxDepth - here) * kHeadDim, uint16_t{0});
      }
      PackValues(tokens[step], strides[step], common - step * kAmxDepth, w.v[step]);
      for (int group = 0; group < groups; group += 2) {
        float (*scores)[kAmxRows] = w.scores[group] + step * kAmxDepth;
        if (group + 1 < groups) {
          AmxScores<true>(tokens[step], strides[step], w.q[group], scores);
        } else {
          AmxScores<false>(tokens[step], strides[step], w.q[group], scores);
        }
      }
    }

    for (int group = 0; group < groups; ++group) {
      const int row = group * kAmxRows;
      AmxSoftmax(w.scores[group], steps * kAmxDepth, common, visible + row, p.softmax_scale,
                 partial.max() + row, partial.sum() + row, w.keep + row, w.p[group]);
    }
    const bool add = first > task.first_token;
    if (add) Rescale(w.keep, task.rows, partial.acc());
    for (int tile = 0; tile < kValueTiles; tile += 4) {
      int group = 0;
      for (; group + 1 < groups; group += 2) {
        float* acc = partial.acc() + group * kAmxRows * kHeadDimV + tile * 16;
        AmxValues<true>(w.p[group], w.v, tile, steps, add, acc);
        AmxValues<true>(w.p[group], w.v, tile + 2, steps, add, acc + 32);
      }
      if (group < groups) {
        float* acc = partial.acc() + group * kAmxRows * kHeadDimV + tile * 16;
        AmxValues<false>(w.p[group], w.v, tile, steps, add, acc);
      }
    }
    for (int row = 0; common < count && row < task.rows; ++row) {
      float* acc = partial.acc() + row * kHeadDimV;
      for (int token = common; token < visible[row]; ++token) {
        const uint16_t* value =
            tokens[token / kAmxDepth] + token % kAmxDepth * strides[token / kAmxDepth];
        AddValue(w.scores[row / kAmxRows][token][row % kAmxRows], value, acc);
      }
    }
  }
  _tile_release();
}

}  // namespace flashmla::cpu

#else
#define FLASHMLA_WITH_AMX 0
#endif
