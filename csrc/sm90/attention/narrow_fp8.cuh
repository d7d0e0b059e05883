// MLA decoding over FP8 tokens on Hopper for few query rows: at most 32 that share a KV head.
// Dense, or sparse: a query token is a sequence then (call.cuh), and its list says where tokens
// are.
//
// What is computed is what narrow.cuh computes. But wgmma takes its first operand from registers as
// well, and that is where codes become numbers: so K as such is never in shared memory, only its
// first 512 columns are, as V.
//
//   S^T[64 x N]   = K[64 x 576] Q[N x 576]^T         K in registers
//   P^T           = exp2(S^T - m)
//   O^T[512 x N]  = O^T * alpha + V^T[512 x 64] P^T  V in shared memory
//
//   warps 0-7    scorers  two warpgroups, which take blocks in turns: convert tokens, S and P. Each
//                         warp has 16 of a block's tokens
//   warps 8-11   values   O; writes the result of a sequence
//   warps 12-15  loaders  bring tokens as they are, each those of one warp of either group
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
#include "sm90/attention/few_rows.cuh"
#include "sm90/attention/launch.cuh"
#include "sm90/attention/tokens.cuh"

namespace flashmla::sm90::narrow_fp8 {

inline constexpr int kGroups = 2;  // of scorers
inline constexpr int kWarps = 4;   // in a group
inline constexpr int kGroupThreads = kWarps * 32;
inline constexpr int kScorerThreads = kGroups * kGroupThreads;
inline constexpr int kThreads = kScorerThreads + 2 * kGroupThreads;
inline constexpr int kTokensEach = kPageSize / kWarps;  // of a block, a warp's

inline constexpr int kSequenceCost = 4;  // blocks: the time to finish a sequence and begin another
inline constexpr int kLeastBlocks = 1;

// Weights are multiplied with 2^kLift, which the sum of the weights takes out again: the more of
// half precision's range is below a row's largest weight, next to which it may be 2^8 times larger.
inline constexpr float kLift = 15 - kRescaleThreshold;

// Named barriers.
enum Barrier : int { kScorers = 1, kOneGroup };  // and those after it

template <typename Call, int kRows>
struct SharedMemory {
  static constexpr bool kSparse = std::is_same_v<Call, SparseCall>;
  static constexpr int kPanelBytesQ = kRows * kPanel * 2;
  static constexpr int kStages = 2;
  // A warp's tokens come in slots of so many, as many as there is room for.
  static constexpr int kSlotTokens = kRows == 16 ? 8 : 16;
  static constexpr int kSlots = kRows == 16 ? 3 : 1;
  static constexpr int kSlotsEach = kTokensEach / kSlotTokens;  // of a block
  // Registers of a thread. All start with 128.
  static constexpr int kScorerRegisters = kRows == 16 ? 168 : 160;
  static constexpr int kValueRegisters = kRows == 16 ? 104 : 160;
  static constexpr int kLoaderRegisters = kRows == 16 ? 72 : 32;
  static_assert(2 * kScorerRegisters + kValueRegisters + kLoaderRegisters <= 4 * 128);

  alignas(1024) uint8_t q[kPanels * kPanelBytesQ];
  alignas(1024) uint8_t v[kStages][kPanelsV * kPanelBytes];
  alignas(1024) uint8_t p[kStages][kRows * kPageSize * 2];
  alignas(128)
      uint8_t tokens[kWarps][kSlots][kSlotTokens * kFp8TokenBytes];  // as they are in the cache
  uint32_t present[kWarps][kGroups];  // which of a block's exist, as Source says it
  float alpha[kStages][kRows];        // with each P: what O has to be multiplied with before
  float reference[kGroups][kRows];    // after the group's last block
  alignas(16) float peaks[kGroups][kRows][kWarps];
  float last_reference[kGroups][kRows];    // of a sequence, when all of its blocks are done,
  float warp_sum[kGroups][kWarps][kRows];  // its weights' sums
  float warp_most[2][kGroups][kWarps][kSparse ? kRows : 1];  // largest scores, of alternate ones
  uint32_t query_top[2];  // the queries' largest finite number, sequence by sequence, in bfloat16
  uint64_t tokens_ready[kWarps][kGroups];  // of alternate blocks
  uint64_t tokens_read[kWarps][kSlots];
  uint64_t full[kStages], empty[kStages];
  uint64_t turn[kGroups];  // the group's reference is there
  uint64_t sums_ready, sums_free;
  SharedSegments segments[kGroups * kWarps];
  Walk walks[kSparse ? kWarps : 1];
  RowTile tile;
  Range range;
  int query_row[kRows];    // per row of the tile, its place among a sequence's query rows,
  int query_token[kRows];  // and its token
};

// Where the tokens of a range are, of which each warp has 16 of every block. Those of a page that
// does not exist are NaN.
template <typename Call>
class Source {
 public:
  __device__ Source(const DenseDecodeParams& p, const RowTile& tile, const Range& range, Walk*)
      : p_(p), tile_(tile), pages_(p, tile, range) {}

  // To the next block, if there is one.
  __device__ __forceinline__ bool Next() {
    int page;
    if (!pages_.Next(&page)) return false;
    whole_ = page >= 0 && p_.h_kv == 1;
    from_ = reinterpret_cast<const uint8_t*>(&kNanToken);
    if (page >= 0) {
      const int first = ptx::ThreadId() / 32 % kWarps * kTokensEach + (whole_ ? 0 : ptx::LaneId());
      from_ = static_cast<const uint8_t*>(p_.k_cache) + tile_.kv_head * kFp8TokenBytes +
              (int64_t{page} * kPageSize + first) * (p_.h_kv * kFp8TokenBytes);
    }
    return true;
  }
  // The i-th so many of the warp's tokens. All of the warp's are on their way to `ready` with them.
  template <int kCount>
  __device__ __forceinline__ void Copy(int i, uint32_t to, uint64_t* ready) const {
    if (whole_) {
      if (ptx::ElectOne()) {
        if (i == 0) ptx::MbarrierArriveExpectTx(ready, kTokensEach * kFp8TokenBytes);
        constexpr int kBytes = kCount * kFp8TokenBytes;
        ptx::BulkCopy(to, from_ + i * kBytes, kBytes, ready);
      }
      return;
    }
    const int lane = ptx::LaneId();
    if (i == 0 && lane == 0) ptx::MbarrierArriveExpectTx(ready, kTokensEach * kFp8TokenBytes);
    __syncwarp();
    if (lane / kCount == i) {
      ptx::BulkCopy(to + lane % kCount * kFp8TokenBytes, from_, kFp8TokenBytes, ready);
    }
  }
  static constexpr __device__ bool Exists(uint32_t, int) { return true; }

 private:
  const DenseDecodeParams& p_;
  const RowTile& tile_;
  Pages pages_;
  bool whole_;           // the warp's tokens follow each other
  const uint8_t* from_;  // then the first; or this lane's
};

template <>
class Source<SparseCall> {
  using Lanes = sm90::Lanes<32 / kTokensEach>;
  using Tokens = ListedTokens<TokenFormat::kFp8, kHeadDim, Lanes, false>;

 public:
  __device__ Source(const SparseCall& p, const RowTile& tile, const Range& range, Walk* walks)
      : tokens_(p, tile, Begun(walks[ptx::ThreadId() / 32 % kWarps], range)) {}

  __device__ __forceinline__ bool Next() { return tokens_.Next(address_, present_, 0, 1); }
  template <int kCount>
  __device__ __forceinline__ void Copy(int i, uint32_t to, uint64_t* ready) const {
    const int token = ptx::LaneId() / Lanes::kPerToken;
    if (i == 0 && ptx::LaneId() == 0) {
      ptx::MbarrierArriveExpectTx(ready, kTokensEach * kFp8TokenBytes);
    }
    __syncwarp();
    if (Lanes::Part() == 0 && token / kCount == i) {
      ptx::BulkCopy(to + token % kCount * kFp8TokenBytes, address_[0].token, kFp8TokenBytes, ready);
    }
  }
  __device__ uint32_t present() const { return present_; }
  // Whether the warp's token exists.
  static __device__ __forceinline__ bool Exists(uint32_t present, int token) {
    return present >> token * Lanes::kPerToken & 1;
  }

 private:
  static __device__ Walk& Begun(Walk& walk, const Range& range) {
    walk.Begin(range);
    return walk;
  }

  Tokens tokens_;
  TokenAddress<TokenFormat::kFp8> address_[1];  // of this lane's token
  uint32_t present_;
};

// Brings tokens to shared memory, as far ahead as there are slots.
template <typename Call, int kRows>
__device__ __forceinline__ void LoadTokens(const Call& p, SharedMemory<Call, kRows>& shared) {
  using Shared = SharedMemory<Call, kRows>;
  const int warp = ptx::ThreadId() / 32 % kWarps;
  int slot = 0;
  uint32_t parity = 1;
  Source<Call> source(p, shared.tile, shared.range, shared.walks);
  for (int group = 0; source.Next(); group ^= 1) {
#pragma unroll
    for (int i = 0; i < Shared::kSlotsEach; ++i) {
      ptx::MbarrierWait(&shared.tokens_read[warp][slot], parity);
      if constexpr (Shared::kSparse) {
        if (i == 0 && ptx::LaneId() == 0) shared.present[warp][group] = source.present();
      }
      source.template Copy<Shared::kSlotTokens>(i, ptx::SmemAddress(shared.tokens[warp][slot]),
                                                &shared.tokens_ready[warp][group]);
      if (++slot == Shared::kSlots) slot = 0, parity ^= 1;
    }
  }
}

template <typename Call, int kRows>
class Scorer : FewRows<kRows> {
 public:
  using Shared = SharedMemory<Call, kRows>;
  static constexpr bool kSparse = Shared::kSparse;
  // A lane's loads of a block: two of RoPE columns, and one of each panel of codes.
  static constexpr int kUnits = 2 + kPanelsV;
  static constexpr int kUnderWay = 3;  // wgmmas

  __device__ Scorer(const Call& p, Shared& shared) : p_(p), shared_(shared) {}

  __device__ __forceinline__ void Run() {
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
  using Rows = FewRows<kRows>;
  using Rows::column, Rows::element, Rows::kColumns, Rows::lane, Rows::own_column, Rows::row,
      Rows::warp;

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
    const float inverse = ptx::PowerOfTwo(-min(max(biased - 127 - 6, -60), 120));
#pragma unroll
    for (int i = 0; i < 4; ++i) halves[i] = Pack(__half{}, all[i] * inverse, all[i] * inverse);
    return inverse;
  }

  static __device__ __forceinline__ int UnitExponent(float inverse) {
    return 127 - static_cast<int>(__float_as_uint(inverse) >> 23);
  }

  // Takes in the query rows of a sequence; rows that do not exist become zero. They are in half
  // precision, except for the RoPE columns, and in a unit that makes them fit.
  __device__ __forceinline__ void BeginSequence(const Segment& s, int number) {
    if constexpr (kSparse) {
      most_ = shared_.warp_most[number % 2][group()][warp()];
      if (lane() < kRows) most_[lane()] = -INFINITY;
      __syncwarp();
    }
    length_ = s.length;
    lowest_limit_ = shared_.tile.limit(p_, s.length, shared_.query_token[0]);
#pragma unroll
    for (float& sum : sum_) sum = 0;
    ptx::NamedBarrierSync(kScorers, kScorerThreads);  // all have done with the last one's
    uint32_t& top = shared_.query_top[number % 2];
    const int thread = ptx::ThreadId();
    if (thread == 0) shared_.query_top[1 - number % 2] = 0;
    if (thread < kRows) {
#pragma unroll
      for (auto& reference : shared_.reference) reference[thread] = -INFINITY;
    }
    int unit = 0;
#pragma unroll 1
    for (bool again = false;;) {
      const uint32_t own = LoadQueries(s.batch, ptx::PowerOfTwo(-unit));
      if (again) break;
      const uint32_t tops = __reduce_max_sync(~0u, own);
      if (lane() == 0) atomicMax(&top, tops);
      ptx::NamedBarrierSync(kScorers, kScorerThreads);
      const int exponent = static_cast<int>(top >> 7) - 127;
      if ((exponent >= -4 && exponent <= 14) || top == 0) break;
      unit = max(exponent - 14, -60);
      again = true;
    }
    scale_ = p_.softmax_scale * static_cast<float>(M_LOG2E) * ptx::PowerOfTwo(unit);
    ptx::FenceProxyAsync();
    ptx::NamedBarrierSync(kScorers, kScorerThreads);
  }

  // Columns permuted, numbers multiplied by `inverse`. Returns a thread's largest finite number in
  // bfloat16, without its sign.
  __device__ __forceinline__ uint32_t LoadQueries(int batch, float inverse) {
    constexpr int kAtOnce = kScorerThreads / 8;  // eight threads have a panel of a row
    constexpr int kEach = (kRows * kPanels + kAtOnce - 1) / kAtOnce;
    const auto* q =
        static_cast<const uint8_t*>(p_.q) + int64_t{batch} * p_.s_q * p_.h_q * (kHeadDim * 2);
    const int thread = ptx::ThreadId(), eighth = thread % 8, first = thread / 8;
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
        // The largest finite number: what is not finite becomes NaN, and is passed over.
        top = __hmax2(top, __habs2(__hfma2(pair, __float2bfloat162_rn(0), pair)));
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
    const int first_slot = block * Shared::kSlotsEach;
    uint32_t tokens[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int token = TokenOf(lane() / 4) + 8 * i,
                slot = first_slot + token / Shared::kSlotTokens;
      tokens[i] = ptx::SmemAddress(shared_.tokens[warp()][slot % Shared::kSlots]) +
                  token % Shared::kSlotTokens * kFp8TokenBytes;
    }
    ptx::MbarrierWait(&shared_.tokens_ready[warp()][group()], turns_ % 2);
    const uint32_t present = kSparse ? shared_.present[warp()][group()] : 0;
#pragma unroll
    for (int i = 0; i < 2; ++i) scales[i] = ptx::LoadShared16(tokens[i] + kHeadDimV);
#pragma unroll
    for (int unit = 0; unit < kUnits; ++unit) {
      const int to = unit < 2 ? kFp8RopeOffset + unit * 64 : (unit - 2) * kPanel;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 v = ptx::LoadShared16(tokens[i] + to + lane() % 4 * 16);
        words[unit][4 * i] = v.x, words[unit][4 * i + 1] = v.y;
        words[unit][4 * i + 2] = v.z, words[unit][4 * i + 3] = v.w;
      }
    }
    ptx::FenceProxyAsync();  // all that this thread has loaded is there, before copies overwrite it
#pragma unroll
    for (int i = 0; i < Shared::kSlotsEach; ++i) {
      ptx::MbarrierArrive(&shared_.tokens_read[warp()][(first_slot + i) % Shared::kSlots]);
    }
    float inverse[2];
    uint32_t scale[2][4];
#pragma unroll
    for (int i = 0; i < 2; ++i) inverse[i] = Normalize(scales[i], scale[i]);
    const uint32_t v = ptx::SmemAddress(shared_.v[stage]) + (warp() * 16 + lane() % 16) * 128 +
                       ((lane() / 16 ^ lane() % 8) << 4);
    const uint64_t q = ptx::Descriptor<ptx::KMajor>(ptx::Uniform(ptx::SmemAddress(shared_.q)));
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
      if (step == 4) {
        ptx::MbarrierWait(&shared_.empty[stage], block / Shared::kStages % 2 ^ 1);
      }
      if (!rope) {
        ptx::StMatrix4((v ^ j << 5) + panel * kPanelBytes, a[0], a[1], a[2], a[3]);
      }
      ptx::WgmmaFence();
      const uint64_t operand = ptx::Advance(q, panel * Shared::kPanelBytesQ + j * 32);
      if (rope) {
        ptx::WgmmaM64<__nv_bfloat16>(x, a, operand, step > 0);
      } else {
        ptx::WgmmaM64<__half>(x, a, operand, 1);
      }
      ptx::WgmmaCommit();
    }
    ptx::WgmmaWait<0>();

    // x becomes scores in base 2, and more by the exponent of the token's unit.
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int exponent = UnitExponent(inverse[i]);
      const float factor = scale_ * ptx::PowerOfTwo(exponent);
      const bool exists = Source<Call>::Exists(present, TokenOf(lane() / 4) + 8 * i);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        float& score = x[element(c, i)];
        if constexpr (kSparse) {
          score = exists ? score * factor : -INFINITY;
        } else {
          score = score * factor + static_cast<float>(exponent);
        }
      }
    }
    if constexpr (kSparse) {
      const float highest = Rows::Highest(x);
      if (Rows::is_first_of_column()) {
        float& most = most_[own_column()];
        most = fmaxf(most, highest);
      }
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        x[element(c, 0)] += static_cast<float>(UnitExponent(inverse[0]));
        x[element(c, 1)] += static_cast<float>(UnitExponent(inverse[1]));
      }
    }
    if (!kSparse && lowest_limit_ - first_token < kPageSize) {
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
    float last[kColumns];  // this group's reference
#pragma unroll
    for (int c = 0; c < kColumns; ++c) last[c] = shared_.reference[group()][column(c)];
    // Each row's maximum: over the lanes of a warp that hold it, then over the warps.
    shared_.peaks[group()][own_column()][warp()] = Rows::Highest(x);
    ptx::NamedBarrierSync(kOneGroup + group(), kGroupThreads);
    float4 peaks[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      peaks[c] = *reinterpret_cast<const float4*>(shared_.peaks[group()][column(c)]);
    }
    const int previous = group() == 0 ? kGroups - 1 : group() - 1;  // the group of the last block
    ptx::MbarrierWait(&shared_.turn[previous], group() == 0 ? turns_ % 2 ^ 1 : turns_ % 2);
    float before[kColumns], reference[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) before[c] = shared_.reference[previous][column(c)];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float highest = fmaxf(fmaxf(peaks[c].x, peaks[c].y), fmaxf(peaks[c].z, peaks[c].w));
      // The reference never falls: of two the later one is the higher one.
      before[c] = fmaxf(last[c], before[c]);
      reference[c] = highest > before[c] + kRescaleThreshold ? highest : before[c];
    }
    if (threadIdx.x % kGroupThreads < 4) {
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        shared_.alpha[stage][column(c)] = Factor(before[c], reference[c]);
        shared_.reference[group()][column(c)] = reference[c];
      }
    }
    ptx::MbarrierArrive(&shared_.turn[group()]);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float subtrahend = reference[c] == -INFINITY ? 0.f : reference[c] - kLift;
      float& low = x[element(c, 0)];
      float& high = x[element(c, 1)];
      low = ptx::Exp2(low - subtrahend);
      high = ptx::Exp2(high - subtrahend);
      sum_[c] = sum_[c] * Factor(last[c], reference[c]) + (low * inverse[0] + high * inverse[1]);
    }
    Rows::template StoreWeights<__half>(ptx::SmemAddress(shared_.p[stage]), x);
    ptx::FenceProxyAsync();  // P, and V
    ptx::MbarrierArrive(&shared_.full[stage]);
  }

  __device__ __forceinline__ void Finish(int number) {
    ptx::MbarrierWait(&shared_.sums_free, number % 2 ^ 1);
    // Found out anew: registers are for the blocks.
    const int thread = ptx::ThreadId(), group = thread / kGroupThreads;
    const int warp = thread / 32 % kWarps, lane = thread % 32;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum_[c] += __shfl_xor_sync(~0u, sum_[c], step);
      if (lane >= 4) continue;
      const int row = column(c, lane);
      shared_.warp_sum[group][warp][row] = sum_[c];
      if (warp == 0) shared_.last_reference[group][row] = shared_.reference[group][row];
    }
    ptx::MbarrierArrive(&shared_.sums_ready);
  }

  static __device__ __forceinline__ float Factor(float before, float after) {
    return before == after ? 1.f : ptx::Exp2(before - after);
  }
  static __device__ int group() { return threadIdx.x / kGroupThreads; }

  const Call& p_;
  Shared& shared_;
  uint32_t turns_ = 0;  // how many blocks this group has had
  // Of the current sequence.
  int length_;
  int lowest_limit_;     // the least of the tile
  float scale_;          // of its scores
  float sum_[kColumns];  // over this thread's tokens
  float* most_;          // the warp's
};

// Panel j of O^T: the thread holds the places 64 j + row and + 8, of the query rows that Scorer
// numbers alike.
template <typename Call, int kRows>
class Values : FewRows<kRows> {
 public:
  using Shared = SharedMemory<Call, kRows>;
  static constexpr bool kSparse = Shared::kSparse;
  __device__ Values(const Call& p, Shared& shared) : p_(p), shared_(shared) {}

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
      Finish(s, number);
      ptx::MbarrierArrive(&shared_.sums_free);
    }
  }

 private:
  using Rows = FewRows<kRows>;
  using Rows::column, Rows::kColumns, Rows::lane, Rows::warp;

  __device__ __forceinline__ void Block(uint32_t count) {
    const int stage = count % Shared::kStages;
    ptx::MbarrierWait(&shared_.full[stage], count / Shared::kStages % 2);
    Rows::Rescale(o_, shared_.alpha[stage]);
    const uint64_t p =
        ptx::Descriptor<ptx::KMajor>(ptx::Uniform(ptx::SmemAddress(shared_.p[stage])));
    const uint64_t v = ptx::Descriptor<ptx::MnMajor<kPanelBytes>>(
        ptx::Uniform(ptx::SmemAddress(shared_.v[stage])));
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
  __device__ __forceinline__ void Finish(const Segment& s, int number) {
    const RowTile& tile = shared_.tile;
    const int partial_row = tile.partial_row(p_, s, ptx::GridY(), blockIdx.y);
    const int thread = ptx::ThreadId();  // found out anew: registers hold O
    float inverse[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int r = column(c, thread % 32);
      const float2 total = Total(r);
      inverse[c] = total.x == 0 ? 0.f : ptx::Reciprocal(total.x);
      if (kSparse && s.complete() && r < tile.count && total.x != 0) {
        inverse[c] *= SinkShare(p_, tile.head(r), total.y + ptx::Log2(total.x));
      }
    }
    const int r = thread % kGroupThreads;
    if (r < tile.count) {
      const float2 total = Total(r);
      const float lse = total.x == 0 ? -INFINITY : total.y + ptx::Log2(total.x);
      float most = 0;
      if constexpr (kSparse) most = Most(r, number);
      if (s.complete()) {
        const int token = shared_.query_token[r];
        const int64_t head = shared_.query_row[r] - token * p_.h_q;
        const int64_t place = RowPlace(p_, s.batch, static_cast<int>(head), token);
        p_.lse[place] = lse * static_cast<float>(M_LN2);
        if constexpr (kSparse) p_.max_logits[place] = most * static_cast<float>(M_LN2);
      } else {
        reinterpret_cast<float4*>(p_.partial_stats)[partial_row + r] = {lse, 1, 1, most};
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
      Rows::WritePartial(p_, partial_row, tile.count, o_, inverse);
    }
  }

  // The sum of a row's weights over all tokens, the same whichever group began; and what was
  // subtracted from their logarithms.
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
    return {__fadd_rn(sums[0], sums[1]), last - kLift};
  }

  __device__ __forceinline__ float Most(int r, int number) const {
    float most = -INFINITY;
#pragma unroll
    for (const auto& group : shared_.warp_most[number % 2]) {
#pragma unroll
      for (const auto& warp : group) most = fmaxf(most, warp[r]);
    }
    return most;
  }

  const Call& p_;
  Shared& shared_;
  float o_[kPanelsV][kRows / 2];
};

// Grid: (row tiles, partitions).
template <typename Call, int kRows>
__global__ void __launch_bounds__(kThreads, 1) Kernel(const __grid_constant__ Call p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Shared = SharedMemory<Call, kRows>;
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    if (ptx::SmemAddress(raw) % 1024 != 0) __trap();  // swizzled tiles need it
    for (auto& barriers : shared.tokens_ready) {
      for (uint64_t& barrier : barriers) ptx::MbarrierInit(&barrier, 1);
    }
    for (auto& barriers : shared.tokens_read) {
      for (uint64_t& barrier : barriers) ptx::MbarrierInit(&barrier, 32);
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
  ptx::WaitForPreviousKernel();
  const Range range = FindRange(p, blockIdx.y, ptx::GridY(), kSequenceCost, kLeastBlocks);
  if (ptx::ThreadId() == 0) shared.range = range;
  __syncthreads();  // and barriers and row numbers are there
  const int role = ptx::Uniform(ptx::ThreadId() / kGroupThreads);
  if (role < kGroups) {
    ptx::IncreaseRegisters<Shared::kScorerRegisters>();
    Scorer<Call, kRows>(p, shared).Run();
    if (ptx::ThreadId() == 0 && blockIdx.x == 0 && ptx::GridY() > 1 && !p.batch_invariant) {
      RecordMerges(p, shared.tile, shared.range, blockIdx.y, ptx::GridY());
    }
  } else if (role == kGroups) {
    if constexpr (Shared::kValueRegisters < 128) {
      ptx::DecreaseRegisters<Shared::kValueRegisters>();
    } else {
      ptx::IncreaseRegisters<Shared::kValueRegisters>();
    }
    Values<Call, kRows>(p, shared).Run();
  } else {
    ptx::DecreaseRegisters<Shared::kLoaderRegisters>();
    LoadTokens<Call, kRows>(p, shared);
  }
}

// Of at most kNarrowRows rows.
template <typename Call>
Status Launch(const Call& p, dim3 grid, cudaStream_t stream) {
  const auto launch = [&]<int kRows>(std::integral_constant<int, kRows>) {
    return sm90::Launch(Kernel<Call, kRows>, grid, kThreads, sizeof(SharedMemory<Call, kRows>), 1,
                        stream, p);
  };
  if (p.rows() <= 16) return launch(std::integral_constant<int, 16>{});
  return launch(std::integral_constant<int, kNarrowRows>{});
}

}  // namespace flashmla::sm90::narrow_fp8
