// Dense MLA decoding over FP8 pages on Hopper for few query rows: at most 32 that share a KV head.
//
// What is computed is what narrow.cuh computes. But wgmma takes its first operand from registers as
// well, and that is where codes become numbers: so K as such is never in shared memory, only its
// first 512 columns are, as V.
//
//   S^T[64 x N]   = K[64 x 576] Q[N x 576]^T         K in registers
//   P^T           = exp2(S^T - m)
//   O^T[512 x N]  = O^T * alpha + V^T[512 x 64] P^T  V in shared memory
//
//   warps 0-7   scorers  two warpgroups, which take blocks in turns: convert tokens, S and P.
//                        Each warp has 16 of a block's tokens. When it has read them, it sends for
//                        those of the next block, which is the other group's
//   warps 8-11  values   O; writes the result of a sequence
//
// A block has a stage of its own: V and P in shared memory, handed over together.
//
// Numbers are in half precision, which holds all codes: two instructions for a pair of numbers, one
// that converts and one that multiplies with the scale; by way of bfloat16 it would be six. Its
// range is small, so each token has a unit, a power of two, in which its largest scale is 64 to
// 128. What a token's numbers are multiplied with in the end, weight times unit, is what is
// exponentiated: so V needs no unit any more, and the sum of the weights takes it out. RoPE columns
// stay bfloat16.
//
// The four lanes that have a row of wgmma's first operand have four columns each of every sixteen.
// A lane reads 16 codes in one piece, so Q's columns are permuted in shared memory likewise, in
// each panel of 64: what wgmma takes for column 16 j + 8 i + 2 lane + e is column
// 16 lane + 4 j + 2 i + e. V's columns then are permuted too, and O's, until they are written. RoPE
// columns are twice as wide, and read in two pieces of eight: there it is column
// 32 (j / 2) + 8 lane + 4 (j % 2) + 2 i + e.
#pragma once

#include <cmath>
#include <type_traits>

#include "sm90/attention/common.cuh"
#include "sm90/attention/tokens.cuh"

namespace flashmla::sm90::narrow_fp8 {

inline constexpr int kGroups = 2;  // of scorers
inline constexpr int kWarps = 4;   // in a group
inline constexpr int kGroupThreads = kWarps * 32;
inline constexpr int kScorerThreads = kGroups * kGroupThreads;
inline constexpr int kThreads = kScorerThreads + kGroupThreads;
inline constexpr int kTokensEach = kPageSize / kWarps;  // of a block, a scorer warp's

inline constexpr int kSequenceCost = 4;  // blocks: the time to finish a sequence and begin another
inline constexpr int kLeastBlocks = 1;

// Named barriers.
enum Barrier : int { kScorers = 1, kOneGroup };  // and those after it

template <int kRows>
struct SharedMemory {
  static constexpr int kPanelBytesQ = kRows * kPanel * 2;
  static constexpr int kStages = 2;

  alignas(1024) uint8_t q[kPanels * kPanelBytesQ];
  alignas(1024) uint8_t v[kStages][kPanelsV * kPanelBytes];
  alignas(1024) uint8_t p[kStages][kRows * kPageSize * 2];
  alignas(128) uint8_t tokens[kWarps][kTokensEach * kFp8TokenBytes];  // as they are in the cache
  float alpha[kStages][kRows];      // with each P: what O has to be multiplied with before
  float reference[kGroups][kRows];  // after the group's last block
  alignas(16) float peaks[kGroups][kRows][kWarps];
  float last_reference[kGroups][kRows];    // of a sequence, when all of its blocks are done,
  float warp_sum[kGroups][kWarps][kRows];  // and its weights' sums
  uint32_t unused;
  uint32_t query_top[2];  // the largest number of the queries, sequence by sequence, in bfloat16
  uint64_t tokens_ready[kGroups][kWarps];
  uint64_t full[kStages], empty[kStages];
  uint64_t turn[kGroups];  // the group's reference is there
  uint64_t sums_ready, sums_free;
  SharedSegments segments[kGroups * kWarps];
  RowTile tile;
  Range range;
  int query_row[kRows];    // per row of the tile, its place among a sequence's query rows,
  int query_token[kRows];  // and its token
};

__device__ __forceinline__ float PowerOfTwo(int exponent) {
  return __uint_as_float((127 + exponent) << 23);
}

// The columns of S^T that a thread holds: 8 i + column + {0, 1} for i < kRows / 8, numbered
// 2 i + {0, 1}. Its rows are the tokens row and row + 8 of a block.
struct Place {
  static __device__ int lane() { return threadIdx.x % 32; }
  static __device__ int warp() { return threadIdx.x / 32 % kWarps; }
  static __device__ int row() { return warp() * 16 + lane() / 4; }
  static __device__ int column(int c) { return c / 2 * 8 + lane() % 4 * 2 + c % 2; }
  // Of a column, the accumulator's element in the thread's first or second row.
  static constexpr __device__ int element(int c, int second) {
    return c / 2 * 4 + second * 2 + c % 2;
  }
};

template <int kRows>
class Scorer : Place {
 public:
  using Shared = SharedMemory<kRows>;
  static constexpr int kColumns = kRows / 4;
  // A lane's loads of a block: two of RoPE columns, and one of each panel of codes.
  static constexpr int kUnits = 2 + kPanelsV;
  static constexpr int kUnderWay = 3;  // wgmmas

  __device__ Scorer(const DenseDecodeParams& p, Shared& shared)
      : p_(p),
        shared_(shared),
        scale_(p.softmax_scale * static_cast<float>(M_LOG2E)),
        pages_(p, shared.tile, shared.range) {}

  __device__ __forceinline__ void Run() {
    // Each group sends for the blocks after its own; the first group for the first one, too.
    int page;
    bool any = pages_.Next(&page);
    if (group() == 0) {
      Send(any, page, 0);
    } else {
      pages_.Next(&page);
    }
    SharedSegments& segments = shared_.segments[threadIdx.x / 32];
    segments.Begin(shared_.range);
    int skip = group();  // blocks before this group's next one
    while (segments.Next(p_, shared_.tile)) {
      BeginSequence(segments.current, segments.number);
      int left = segments.current.visible - skip;
      int token = (segments.current.first_block + skip) * kPageSize;
      for (; left > 0; left -= kGroups) {
        Turn(token);
        ++turns_;
        token += kGroups * kPageSize;
      }
      skip = -left;
      Finish(segments.number);
    }
  }

 private:
  // This warp's share of a page's tokens, for that group. A page that does not exist is NaN.
  __device__ __forceinline__ void Send(bool any, int page, int group) {
    if (!any) return;
    uint64_t* ready = &shared_.tokens_ready[group][warp()];
    const uint32_t to = ptx::SmemAddress(shared_.tokens[warp()]);
    constexpr int kBytes = kTokensEach * kFp8TokenBytes;
    const int64_t token_bytes = p_.h_kv * kFp8TokenBytes;
    const auto* from = reinterpret_cast<const uint8_t*>(&kNanToken);
    if (page >= 0) {
      from = static_cast<const uint8_t*>(p_.k_cache) + shared_.tile.kv_head * kFp8TokenBytes +
             (int64_t{page} * kPageSize + warp() * kTokensEach) * token_bytes;
    }
    if (lane() == 0) ptx::MbarrierArriveExpectTx(ready, kBytes);
    __syncwarp();
    if (page >= 0 && p_.h_kv == 1) {
      if (lane() == 0) ptx::BulkCopy(to, from, kBytes, ready);
    } else if (lane() < kTokensEach) {
      ptx::BulkCopy(to + lane() * kFp8TokenBytes, page < 0 ? from : from + lane() * token_bytes,
                    kFp8TokenBytes, ready);
    }
  }

  // The token that a row of S^T, K and V is of: two that are read together are not from the same
  // banks.
  static __device__ __forceinline__ int TokenOf(int row) {
    return row / 8 * 8 + row % 8 / 2 + row % 2 * 4;
  }

  // A token's unit is 2^exponent. Its scales become half precision, in these units; returns
  // 1 / unit.
  static __device__ __forceinline__ float Normalize(uint4 scales, uint32_t (&halves)[4]) {
    const float all[4] = {__uint_as_float(scales.x), __uint_as_float(scales.y),
                          __uint_as_float(scales.z), __uint_as_float(scales.w)};
    const float top =
        fmaxf(fmaxf(fabsf(all[0]), fabsf(all[1])), fmaxf(fabsf(all[2]), fabsf(all[3])));
    const int biased = __float_as_uint(top) >> 23;
    const float inverse = PowerOfTwo(-min(max(biased - 127 - 6, -60), 120));
#pragma unroll
    for (int i = 0; i < 4; ++i) halves[i] = Pack(__half{}, all[i] * inverse, all[i] * inverse);
    return inverse;
  }

  // Takes in the query rows of a sequence; rows that do not exist become zero. They are in half
  // precision, except for the RoPE columns, and in a unit that makes them fit.
  __device__ __forceinline__ void BeginSequence(const Segment& s, int number) {
    length_ = s.length;
    lowest_limit_ = shared_.tile.limit(p_, s.length, shared_.query_token[0]);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      reference_[c] = -INFINITY;
      sum_[c] = 0;
    }
    ptx::NamedBarrierSync(kScorers, kScorerThreads);  // all have done with the last one's
    uint32_t& top = shared_.query_top[number % 2];
    if (threadIdx.x == 0) shared_.query_top[1 - number % 2] = 0;
    if (threadIdx.x < kRows) {
#pragma unroll
      for (auto& reference : shared_.reference) reference[threadIdx.x] = -INFINITY;
    }
    int unit = 0;
#pragma unroll 1
    for (bool again = false;;) {
      const uint32_t own = LoadQueries(s.batch, PowerOfTwo(-unit));
      if (again) break;
      const uint32_t tops = __reduce_max_sync(~0u, own);
      if (lane() == 0) atomicMax(&top, tops);
      ptx::NamedBarrierSync(kScorers, kScorerThreads);
      const int exponent = static_cast<int>(top >> 7) - 127;
      if ((exponent >= -4 && exponent <= 14) || exponent == 128 || top == 0) break;
      unit = max(exponent - 14, -60);
      again = true;
    }
    query_unit_ = PowerOfTwo(unit);
    ptx::FenceProxyAsync();
    ptx::NamedBarrierSync(kScorers, kScorerThreads);
  }

  // Columns permuted, numbers multiplied by `inverse`. Returns a thread's largest number in
  // bfloat16, without its sign.
  __device__ __forceinline__ uint32_t LoadQueries(int batch, float inverse) {
    constexpr int kAtOnce = kScorerThreads / 8;  // eight threads have a panel of a row
    constexpr int kEach = (kRows * kPanels + kAtOnce - 1) / kAtOnce;
    const auto* q =
        static_cast<const uint8_t*>(p_.q) + int64_t{batch} * p_.s_q * p_.h_q * (kHeadDim * 2);
    const int eighth = threadIdx.x % 8, first = threadIdx.x / 8;
    uint4 v[kEach];
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int item = first + i * kAtOnce, row = item % kRows, panel = item / kRows;
      v[i] = {};
      if (panel < kPanels && row < shared_.tile.count) {
        v[i] = ptx::Load16(q + int64_t{shared_.query_row[row]} * (kHeadDim * 2) + panel * 128 +
                           eighth * 16);
      }
    }
    __nv_bfloat162 top = __float2bfloat162_rn(0);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int item = first + i * kAtOnce, row = item % kRows, panel = item / kRows;
      if (panel >= kPanels) break;
      const bool rope = panel == kPanelsV;
      const uint32_t at = ptx::SmemAddress(shared_.q) + panel * Shared::kPanelBytesQ + row * 128 +
                          (rope ? eighth % 4 : eighth / 2) * 4;
      const uint32_t words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        const auto pair = reinterpret_cast<const __nv_bfloat162&>(words[k]);
        top = __hmax2(top, __habs2(pair));
        const float2 two = __bfloat1622float2(pair);
        const uint32_t scaled = rope ? Pack(__nv_bfloat16{}, two.x * inverse, two.y * inverse)
                                     : Pack(__half{}, two.x * inverse, two.y * inverse);
        const int chunk = (rope ? eighth / 4 : eighth % 2) * 4 + k;
        ptx::StoreShared4(at + ((chunk ^ row % 8) << 4), scaled);
      }
    }
    const uint32_t tops = reinterpret_cast<const uint32_t&>(top);
    return max(tops & 0xFFFF, tops >> 16);
  }

  // This group's next block.
  __device__ __forceinline__ void Turn(int first_token) {
    const uint32_t block = turns_ * kGroups + group(), stage = block % Shared::kStages;
    uint32_t words[kUnits][8];
    uint4 scales[2];
    int next_page, page_after;
    const bool any = pages_.Next(&next_page);
    pages_.Next(&page_after);  // the other group sends for it
    ptx::MbarrierWait(&shared_.tokens_ready[group()][warp()], turns_ % 2);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t own =
          ptx::SmemAddress(shared_.tokens[warp()]) + (TokenOf(lane() / 4) + 8 * i) * kFp8TokenBytes;
      scales[i] = ptx::LoadShared16(own + kHeadDimV);
#pragma unroll
      for (int unit = 0; unit < kUnits; ++unit) {
        const int to = unit < 2 ? kFp8RopeOffset + unit * 64 : (unit - 2) * kPanel;
        const uint4 v = ptx::LoadShared16(own + to + lane() % 4 * 16);
        words[unit][4 * i] = v.x, words[unit][4 * i + 1] = v.y;
        words[unit][4 * i + 2] = v.z, words[unit][4 * i + 3] = v.w;
      }
    }
    __syncwarp();  // all have read theirs
    Send(any, next_page, 1 - group());
    float inverse[2];
    uint32_t scale[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) inverse[i] = Normalize(scales[i], scale[i]);
    const uint32_t v = ptx::SmemAddress(shared_.v[stage]) + (warp() * 16 + lane() % 16) * 128 +
                       ((lane() / 16 ^ lane() % 8) << 4);
    const uint64_t q = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared_.q));
    float x[kRows / 2];
#pragma unroll
    for (int step = 0; step < 4 * kPanels; ++step) {
      const bool rope = step < 4;
      const int panel = rope ? kPanelsV : step / 4 - 1;
      const int j = step % 4, unit = rope ? j / 2 : panel + 2;
      if (step >= kUnderWay) ptx::WgmmaWait<kUnderWay - 1>();
      uint32_t a[4];
      if (rope) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[i] = ptx::Multiply(__nv_bfloat16{}, words[unit][i % 2 * 4 + j % 2 * 2 + i / 2],
                               Pack(__nv_bfloat16{}, inverse[i % 2], inverse[i % 2]));
        }
      } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          uint32_t low, high;
          ptx::FromE4m3(words[unit][4 * i + j], low, high);
          a[i] = ptx::Multiply(__half{}, low, scale[i][panel / 2]);
          a[i + 2] = ptx::Multiply(__half{}, high, scale[i][panel / 2]);
        }
      }
      ptx::WgmmaFence();
      const uint64_t operand = ptx::Advance(q, panel * Shared::kPanelBytesQ + j * 32);
      if (rope) {
        ptx::WgmmaM64<__nv_bfloat16>(x, a, operand, step > 0);
      } else {
        ptx::WgmmaM64<__half>(x, a, operand, 1);
      }
      ptx::WgmmaCommit();
      if (step == 4) {
        ptx::MbarrierWait(&shared_.empty[stage], block / Shared::kStages % 2 ^ 1);
      }
      if (!rope) {
        ptx::StMatrix4((v ^ j << 5) + panel * kPanelBytes, a[0], a[1], a[2], a[3]);
      }
    }
    ptx::WgmmaWait<0>();

    // x becomes scores in base 2, and more by the exponent of the token's unit.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int exponent = 127 - static_cast<int>(__float_as_uint(inverse[i]) >> 23);
      const float factor = scale_ * query_unit_ * PowerOfTwo(exponent);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float& score = x[element(c, i)];
        score = score * factor + static_cast<float>(exponent);
      }
    }
    if (lowest_limit_ - first_token < kPageSize) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        const int limit = shared_.tile.limit(p_, length_, shared_.query_token[column(c)]);
        const int token = first_token + TokenOf(row());
        if (token >= limit) x[element(c, 0)] = -INFINITY;
        if (token + 8 >= limit) x[element(c, 1)] = -INFINITY;
      }
      ptx::NamedBarrierSync(kOneGroup + group(), kGroupThreads);  // V is there
      uint8_t* values = shared_.v[stage];
      CleanValues<__half>([&](int panel) { return values + panel * kPanelBytes; }, TokenOf,
                          lowest_limit_ - first_token, length_ - first_token);
    }
    Softmax(x, inverse, stage);
  }

  // x becomes P in shared memory.
  __device__ __forceinline__ void Softmax(float (&x)[kRows / 2], const float (&inverse)[2],
                                          uint32_t stage) {
    // Each row's maximum: over the lanes of a warp that hold it, then over the warps.
    float highest[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) highest[c] = fmaxf(x[element(c, 0)], x[element(c, 1)]);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        highest[c] = fmaxf(highest[c], __shfl_xor_sync(~0u, highest[c], step));
      }
    }
    if (lane() < 4) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) shared_.peaks[group()][column(c)][warp()] = highest[c];
    }
    ptx::NamedBarrierSync(kOneGroup + group(), kGroupThreads);
    float4 peaks[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      peaks[c] = *reinterpret_cast<const float4*>(shared_.peaks[group()][column(c)]);
    }
    const int previous = group() == 0 ? kGroups - 1 : group() - 1;  // the group of the last block
    ptx::MbarrierWait(&shared_.turn[previous], group() == 0 ? turns_ % 2 ^ 1 : turns_ % 2);
    float before[kColumns], last[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) before[c] = shared_.reference[previous][column(c)];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      highest[c] = fmaxf(fmaxf(peaks[c].x, peaks[c].y), fmaxf(peaks[c].z, peaks[c].w));
      // The reference never falls: of two the later one is the higher one.
      last[c] = reference_[c];
      before[c] = fmaxf(last[c], before[c]);
      reference_[c] = highest[c] > before[c] + kRescaleThreshold ? highest[c] : before[c];
    }
    if (threadIdx.x % kGroupThreads < 4) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        shared_.alpha[stage][column(c)] = Factor(before[c], reference_[c]);
        shared_.reference[group()][column(c)] = reference_[c];
      }
    }
    ptx::MbarrierArrive(&shared_.turn[group()]);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float subtrahend = reference_[c] == -INFINITY ? 0.f : reference_[c];
      float& low = x[element(c, 0)];
      float& high = x[element(c, 1)];
      low = ptx::Exp2(low - subtrahend);
      high = ptx::Exp2(high - subtrahend);
      sum_[c] = sum_[c] * Factor(last[c], reference_[c]) + (low * inverse[0] + high * inverse[1]);
    }
    // As wgmma reads its second operand: a row of P for each query row.
    const uint32_t p = ptx::SmemAddress(shared_.p[stage]);
#pragma unroll
    for (int i = 0; i < kRows / 8; i += 2) {
      const float* e = x + 4 * i;
      const int r = 8 * i + lane() / 16 * 8 + lane() % 8;
      const int chunk = warp() * 2 + lane() / 8 % 2;
      ptx::StMatrix4Transposed(p + r * 128 + ((chunk ^ r % 8) << 4), Pack(__half{}, e[0], e[1]),
                               Pack(__half{}, e[2], e[3]), Pack(__half{}, e[4], e[5]),
                               Pack(__half{}, e[6], e[7]));
    }
    ptx::FenceProxyAsync();  // P, and V
    ptx::MbarrierArrive(&shared_.full[stage]);
  }

  __device__ __forceinline__ void Finish(int number) {
    ptx::MbarrierWait(&shared_.sums_free, number % 2 ^ 1);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum_[c] += __shfl_xor_sync(~0u, sum_[c], step);
      if (lane() < 4) {
        shared_.warp_sum[group()][warp()][column(c)] = sum_[c];
        if (warp() == 0) shared_.last_reference[group()][column(c)] = reference_[c];
      }
    }
    ptx::MbarrierArrive(&shared_.sums_ready);
  }

  static __device__ __forceinline__ float Factor(float before, float after) {
    return before == after ? 1.f : ptx::Exp2(before - after);
  }
  static __device__ int group() { return threadIdx.x / kGroupThreads; }

  const DenseDecodeParams& p_;
  Shared& shared_;
  const float scale_;
  Pages pages_;
  uint32_t turns_ = 0;  // how many blocks this group has had
  // Of the current sequence.
  int length_;
  int lowest_limit_;  // the least of the tile
  float query_unit_;
  float reference_[kColumns];
  float sum_[kColumns];  // over this thread's tokens
};

// Panel j of O^T: the thread holds the places 64 j + row and + 8, of the query rows that Scorer
// numbers alike.
template <int kRows>
class Values : Place {
 public:
  using Shared = SharedMemory<kRows>;
  __device__ Values(const DenseDecodeParams& p, Shared& shared) : p_(p), shared_(shared) {}

  __device__ __forceinline__ void Run() {
    uint32_t count = 0;  // blocks
    int number = 0;
    Segments segments(p_, shared_.tile, shared_.range);
    if (segments.done()) ptx::LetNextKernelStart();
    for (Segment s; segments.Next(&s); ++number) {
#pragma unroll
      for (int j = 0; j < kPanelsV; ++j) {
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) o_[j][i] = 0;
      }
      for (int i = 0; i < s.visible; ++i) Block(count++);
      ptx::MbarrierWait(&shared_.sums_ready, number % 2);
      if (segments.done()) ptx::LetNextKernelStart();
      Finish(s);
      ptx::MbarrierArrive(&shared_.sums_free);
    }
  }

 private:
  static constexpr int kColumns = kRows / 4;

  __device__ __forceinline__ void Block(uint32_t count) {
    const int stage = count % Shared::kStages;
    ptx::MbarrierWait(&shared_.full[stage], count / Shared::kStages % 2);
    float alpha[kColumns];
    bool rescale = false;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      alpha[c] = shared_.alpha[stage][column(c)];
      rescale |= alpha[c] != 1.f;
    }
    if (__any_sync(~0u, rescale)) {
#pragma unroll
      for (int j = 0; j < kPanelsV; ++j) {
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) o_[j][i] *= alpha[i / 4 * 2 + i % 2];
      }
    }
    const uint64_t p = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared_.p[stage]));
    const uint64_t v =
        ptx::Descriptor<ptx::MnMajor<kPanelBytes>>(ptx::SmemAddress(shared_.v[stage]));
    ptx::WgmmaFence();
#pragma unroll
    for (int j = 0; j < kPanelsV; ++j) {
#pragma unroll
      for (int step = 0; step < kPageSize / 16; ++step) {
        ptx::WgmmaM64<__half, 1>(o_[j], ptx::Advance(v, j * kPanelBytes + step * 2048),
                                 ptx::Advance(p, step * 32), 1);
      }
    }
    ptx::WgmmaCommit();
    ptx::WgmmaWait<0>();
    __syncwarp();
    if (lane() == 0) ptx::MbarrierArrive(&shared_.empty[stage]);
  }

  // Writes the result of a sequence, or of the part of it that this range holds.
  __device__ __forceinline__ void Finish(const Segment& s) {
    const RowTile& tile = shared_.tile;
    const int partial_row = tile.partial_row(p_, s, ptx::GridY(), blockIdx.y);
    float inverse[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float total = Total(column(c)).x;
      inverse[c] = total == 0 ? 0.f : 1.f / total;
    }
    const int r = threadIdx.x % kGroupThreads;
    if (r < tile.count) {
      const float2 total = Total(r);
      const float lse = total.x == 0 ? -INFINITY : total.y + log2f(total.x);
      if (s.complete()) {
        const int token = shared_.query_token[r];
        const int64_t head = shared_.query_row[r] - token * p_.h_q;
        p_.lse[RowPlace(p_, s.batch, static_cast<int>(head), token)] =
            lse * static_cast<float>(M_LN2);
      } else {
        reinterpret_cast<float4*>(p_.partial_stats)[partial_row + r] = {lse, 1, 1, 0};
      }
    }
    if (s.complete()) {
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
        // Transposed in registers: the thread then holds this query row. Of both places of a panel,
        // two numbers each, four columns next to each other.
        const int r = 8 * i + lane() / 4;
        const int64_t query = s.batch * p_.s_q * p_.h_q + shared_.query_row[r];
        uint16_t* out =
            static_cast<uint16_t*>(p_.out) + query * kHeadDimV + lane() % 4 * 16 + warp() * 4;
#pragma unroll
        for (int j = 0; j < kPanelsV; ++j) {
          uint32_t pairs[2];
#pragma unroll
          for (int second = 0; second < 2; ++second) {
            const float* o = o_[j] + 4 * i + 2 * second;
            pairs[second] = ptx::Transpose(
                Pack(__nv_bfloat16{}, o[0] * inverse[2 * i], o[1] * inverse[2 * i + 1]));
          }
          if (r < tile.count) {
            *reinterpret_cast<uint2*>(out + kPanel * j) = {pairs[0], pairs[1]};
          }
        }
      }
    } else {
      // In the order of places (DenseDecodeParams::permuted_partials).
      float* out = static_cast<float*>(p_.partial_out) + int64_t{partial_row} * kHeadDimV + row();
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (column(c) >= tile.count) continue;
        float* mine = out + column(c) * kHeadDimV;
#pragma unroll
        for (int j = 0; j < kPanelsV; ++j) {
          mine[kPanel * j] = o_[j][element(c, 0)] * inverse[c];
          mine[kPanel * j + 8] = o_[j][element(c, 1)] * inverse[c];
        }
      }
    }
  }

  // The sum of a row's weights over all tokens, the same whichever group began; and the reference.
  __device__ __forceinline__ float2 Total(int r) const {
    static_assert(kGroups == 2, "a sum of more would depend on which is first");
    const float a = shared_.last_reference[0][r], b = shared_.last_reference[1][r];
    const float last = fmaxf(a, b);
    float sums[kGroups];
#pragma unroll
    for (int g = 0; g < kGroups; ++g) {
      const auto& sum = shared_.warp_sum[g];
      const float own = g == 0 ? a : b;
      sums[g] = __fmul_rn((sum[0][r] + sum[1][r]) + (sum[2][r] + sum[3][r]),
                          own == last ? 1.f : ptx::Exp2(own - last));
    }
    return {__fadd_rn(sums[0], sums[1]), last};
  }

  const DenseDecodeParams& p_;
  Shared& shared_;
  float o_[kPanelsV][kRows / 2];
};

// Grid: (row tiles, partitions).
template <int kRows>
__global__ void __launch_bounds__(kThreads, 1) Kernel(const __grid_constant__ DenseDecodeParams p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Shared = SharedMemory<kRows>;
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    if (ptx::SmemAddress(raw) % 1024 != 0) __trap();  // swizzled tiles need it
    for (auto& barriers : shared.tokens_ready) {
      for (uint64_t& barrier : barriers) ptx::MbarrierInit(&barrier, 1);
    }
    for (uint64_t& barrier : shared.full) ptx::MbarrierInit(&barrier, kGroupThreads);
    for (uint64_t& barrier : shared.empty) ptx::MbarrierInit(&barrier, kWarps);
    for (uint64_t& barrier : shared.turn) ptx::MbarrierInit(&barrier, kGroupThreads);
    ptx::MbarrierInit(&shared.sums_ready, kScorerThreads);
    ptx::MbarrierInit(&shared.sums_free, kGroupThreads);
    ptx::FenceMbarrierInit();
    shared.query_top[0] = 0;
  }
  const RowTile tile(p, blockIdx.x);
  if (threadIdx.x == 96) shared.tile = tile;
  if (threadIdx.x >= kThreads - kRows) {
    const int i = threadIdx.x - (kThreads - kRows);
    const int r = min(i, tile.count - 1);
    shared.query_token[i] = tile.token(r);
    shared.query_row[i] = tile.token(r) * static_cast<int>(p.h_q) + tile.head(r);
  }
  FetchParams(p);
  PrefetchInputs(p);
  __syncthreads();  // barriers and row numbers are there
  ptx::WaitForPreviousKernel();
  const Range range = FindRange(p, blockIdx.y, ptx::GridY(), kSequenceCost, kLeastBlocks);
  if (threadIdx.x == 0) shared.range = range;
  __syncthreads();
  if (threadIdx.x < kScorerThreads) {
    Scorer<kRows>(p, shared).Run();
    if (threadIdx.x == 0 && blockIdx.x == 0 && ptx::GridY() > 1 && !p.batch_invariant) {
      RecordMerges(p, shared.tile, shared.range, blockIdx.y, ptx::GridY());
    }
  } else {
    Values<kRows>(p, shared).Run();
  }
}

}  // namespace flashmla::sm90::narrow_fp8
