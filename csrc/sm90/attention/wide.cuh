// MLA decoding on Hopper for more than 32 query rows that share a KV head, and sparse attention.
//
// A thread block owns one tile of 64 query rows (tokens times heads that share a KV head) and a
// range of KV blocks (see schedule.cuh). Per KV block of 64 tokens, one page:
//
//   S[64 x 64]  = Q[64 x 576] K[64 x 576]^T
//   P           = exp2(S - m)
//   O[64 x 512] = O * alpha + P[64 x 64] V        V is the first 512 columns of K
//
// Blocks are taken in pairs. Two consumer warpgroups, called sides, compute S and P of one block
// each; each multiplies both blocks' P with its own half of the columns of V. The right side works
// half a pair behind the left one, so that one side's softmax and waiting hide behind the other's
// tensor work:
//
//   left   | S a          | softmax a | O += Pa Va |     wait     | O += Pb Vb | S a' ...
//   right  |     wait     | S b           | softmax b | O += Pa Va | O += Pb Vb | wait
//                      ^gate          ^Pa ready        ^Pb ready
//
//   warps 0-3  left        S of even blocks, O columns   0..255
//   warps 4-7  right       S of odd blocks,  O columns 256..511
//   warp 8     producer    TMA: a page in three units, as they fall free: the RoPE columns after S,
//                          the left and the right half of V when its side has multiplied it; runs
//                          ahead across sequences
//   warp 9     bookkeeper  tells the combine what to merge (warps 10 and 11 only complete
//                          the warpgroup that gives its registers away)
//
// P stays in registers for its own side and goes through shared memory to the other. So does the
// reference m, one per row: it moves only where a row's maximum has grown by more than a factor of
// 2^8, so that O is rarely rescaled and the sides seldom depend on each other. Exact after the
// final division; P is at most 2^8, within half precision's range.
//
// Where an even number of row tiles reads the same KV head, their blocks form clusters of two. Each
// loads half of every unit, and multicasts it to both.
//
// Shared memory: Q's 512 latent columns 64 KB, K 2 x 72 KB, P 2 x 8 KB, statistics 1 KB. Q's 64
// RoPE columns are in registers. Registers: 224 a consumer thread, of which O takes 128; 56 a
// producer thread.
//
// FP8 pages, and tokens that a query token lists (sparse attention), are brought by warps that read
// them on their own. They need more registers than the producer:
//
//   copied     warps 8-11: four warps, each a quarter of the tokens (CopyTokens). 208 registers a
//              consumer thread, 88 for those
//   converted  warps 8-15: four have the left half of the columns, four the right one (fp8.cuh).
//              192 registers a consumer thread, and 64. So P goes through shared memory to its own
//              side as well, and O += P V takes two instructions, as the compiler has no registers
//              for one of 256 columns where 512 threads start with 128 each
//
// Q's RoPE columns are then in shared memory, and K's have one place there instead of one in each
// stage. These form no clusters: what one of two blocks would save by converting half of the
// tokens, it would lose by waiting for the network between them to take its stores. (An even number
// of row tiles over FP8 tokens is for paired.cuh.)
#pragma once

#include <cmath>
#include <type_traits>

#include "sm90/attention/common.cuh"
#include "sm90/attention/fp8.cuh"
#include "sm90/attention/many_rows.cuh"
#include "sm90/attention/tokens.cuh"

namespace flashmla::sm90::wide {

inline constexpr int kStages = 2;
inline constexpr int kSides = 2;
inline constexpr int kWarpsPerSide = 4;
inline constexpr int kConsumerThreads = kSides * kWarpsPerSide * 32;
inline constexpr int kColumnsEach = kHeadDimV / kSides;  // of O, per side
inline constexpr int kLeastBlocks = 2;                   // one for each side
inline constexpr int kSequenceCost = 3;  // blocks: the time to finish a sequence and begin another
static_assert(kRowTile == 64 && kPageSize == 64, "S is one accumulator of m64n64k16");
static_assert(kStages == kSides, "Softmax relies on a side's blocks having a stage to themselves");
static_assert(kColumnsEach == 256);

// What is computed of what. Where tokens have RoPE columns of their own, those are K's alone.
template <typename CallType, TokenFormat kTokenFormat, int kTokenDim>
struct Problem {
  using Call = CallType;
  static constexpr TokenFormat kFormat = kTokenFormat;
  static constexpr int kDim = kTokenDim;
  static constexpr bool kSparse = std::is_same_v<Call, SparseCall>;
  static constexpr bool kRopeApart = kDim > kHeadDimV;
  static constexpr bool kTma = !kSparse && kFormat == TokenFormat::kNumbers;
  static constexpr bool kConverted = kFormat != TokenFormat::kNumbers;
  // One warp gives orders to the copy engine. Four that copy tokens, or eight that convert them,
  // need registers; then Q's RoPE columns are in shared memory, and K's have one place there, not
  // one in each stage.
  static constexpr bool kRopeShared = kRopeApart && !kTma;
  static constexpr int kProducerGroups = kConverted ? 2 : 1;
  static constexpr int kThreads = kConsumerThreads + kProducerGroups * 128;
  static constexpr int kConsumerRegisters = kTma ? 224 : kConverted ? 192 : 208;
  static constexpr int kProducerRegisters = kTma ? 56 : kConverted ? 64 : 88;
  static constexpr int kQueryPanels = kRopeShared ? kPanels : kPanelsV;
  static constexpr int kStagePanels = kTma ? kPanels : kPanelsV;
  // How often a unit's barrier is arrived on: by each of four warps that hand it over and, where
  // something is copied there, by each of their threads.
  static constexpr int HandOvers(int unit) {
    if (kTma) return 1;
    const bool copied = !kConverted || unit == (kRopeApart ? kRope : kRightHalf);
    return copied ? 4 * 32 + 4 : 4;
  }
};

enum Side : int { kLeft, kRight };

template <bool kExists>
struct RopePanel {
  alignas(1024) uint8_t rope[kPanelBytes];
};
template <>
struct RopePanel<false> {
  static constexpr const uint8_t* rope = nullptr;
};

template <typename Problem>
struct SharedMemory : RopePanel<Problem::kRopeShared> {
  alignas(1024) uint8_t q[Problem::kQueryPanels * kPanelBytes];
  alignas(1024) uint8_t k[kStages][Problem::kStagePanels * kPanelBytes];
  alignas(1024) uint8_t p[kSides][kPanelBytes];
  float reference[kSides][kRowTile];
  float sum[kSides][kRowTile];
  float most[kSides][Problem::kSparse ? kRowTile : 1];  // the largest score
  alignas(16) uint32_t present[kStages][4];  // sparse: which tokens exist, as Lanes knows it
  uint64_t full[kStages][kUnits];            // of RoPE columns with one place, the first
  uint64_t empty[kStages][kUnits];
  uint64_t query_ready;      // both sides: Q is in shared memory
  uint64_t gate;             // the right side may start its S: the left side's is nearly done
  uint64_t p_ready[kSides];  // the side's P and reference are in shared memory
  uint64_t sums_ready;       // both sides
  SharedSegments segments[kSides * kWarpsPerSide];  // of a consumer warp's range
  RowTile tile;
  // For those who move tokens, and for the bookkeeper when it has done so.
  Walk walks[Problem::kTma ? 1 : 4 * Problem::kProducerGroups];
  Range range;
  // Per row of the tile, its place among a sequence's query rows, and its token: divisions are
  // slow. But of sparse attention they are the heads of one token.
  int query_rows[Problem::kSparse ? 1 : kRowTile];
  int query_tokens[Problem::kSparse ? 1 : kRowTile];

  __device__ int query_row(int row) const {
    return Problem::kSparse ? tile.first + min(row, tile.count - 1) : query_rows[row];
  }
  __device__ int query_token(int row) const { return Problem::kSparse ? 0 : query_tokens[row]; }
};

// The page pool as the copy engine sees it, in boxes of half a unit.
struct PageMaps {
  CUtensorMap half_panels;  // kHalfPanels / 2 panels, all tokens of a page
  CUtensorMap rope;         // one panel, half the tokens of a page
};

// How many blocks of K this thread block has taken, as a place in the ring of stages.
struct RingPosition {
  uint32_t count = 0;
  __device__ int stage() const { return count % kStages; }
  __device__ uint32_t parity() const { return count / kStages % 2; }
  // Of the only place for RoPE columns.
  __device__ uint32_t rope_parity() const { return count % 2; }
};
__device__ __forceinline__ RingPosition Next(RingPosition ring) { return {ring.count + 1}; }

// --- Producer -------------------------------------------------------------------------------

// Loads one unit of a page, all of it or, in a cluster, this block's half for both.
template <int kCluster, typename Shared>
__device__ __forceinline__ void LoadUnit(const PageMaps& maps, Shared& shared, int stage, Unit unit,
                                         int first_token, int kv_head) {
  constexpr int kBoxBytes = kHalfPanels / 2 * kPanelBytes;
  constexpr int kRopeBytes = kPanelBytes / 2;
  uint64_t* full = &shared.full[stage][unit];
  ptx::MbarrierArriveExpectTx(full, 2 * (unit == kRope ? kRopeBytes : kBoxBytes));
#pragma unroll
  for (int i = 0; i < 2 / kCluster; ++i) {
    const int half = kCluster == 1 ? i : ptx::ClusterRank();
    const int panel = unit == kRope ? kPanelsV : unit * kHalfPanels + half * (kHalfPanels / 2);
    const int token = unit == kRope ? half * (kPageSize / 2) : 0;
    uint8_t* target = shared.k[stage] + panel * kPanelBytes + token * kPanel * 2;
    const CUtensorMap* map = unit == kRope ? &maps.rope : &maps.half_panels;
    if constexpr (kCluster == 1) {
      ptx::TmaLoad4D(target, map, full, 0, first_token + token, panel, kv_head);
    } else {
      ptx::TmaLoad4DMulticast(target, map, full, 0, first_token + token, panel, kv_head, 0b11);
    }
  }
}

template <int kCluster, typename Shared>
__device__ inline void Produce(const DenseDecodeParams& p, const PageMaps& maps,
                               const RowTile& tile, const Range& range, Shared& shared) {
  RingPosition ring;
  Pages pages(p, tile, range);
  for (int page; pages.Next(&page); ring = Next(ring)) {
    if (threadIdx.x % 32 != 0) continue;
    const int first_token = FirstToken(p, page);
    const int stage = ring.stage();
    const auto load = [&](Unit unit) {
      ptx::MbarrierWait(&shared.empty[stage][unit], ring.parity() ^ 1);
      LoadUnit<kCluster>(maps, shared, stage, unit, first_token, tile.kv_head);
    };
    load(kRope);
    load(kLeftHalf);
    load(kRightHalf);
  }
}

// Where the warps that move tokens themselves bring those of a block.
template <typename Problem>
class Stage {
 public:
  using Shared = SharedMemory<Problem>;
  __device__ explicit Stage(Shared& shared) : base_(ptx::SmemAddress(&shared)) {}

  static __device__ __forceinline__ int Half() { return ptx::ThreadId() / 128 - kSides; }
  __device__ __forceinline__ void Wait(Unit unit) const {
    if (unit == kRope) {
      ptx::MbarrierWait(&shared().empty[0][kRope], ring_.rope_parity() ^ 1);
    } else {
      ptx::MbarrierWait(&shared().empty[ring_.stage()][unit], ring_.parity() ^ 1);
    }
  }
  __device__ __forceinline__ uint32_t Panel(int panel) const {
    if (panel == kPanelsV) return ptx::SmemAddress(shared().rope);
    return ptx::SmemAddress(shared().k[ring_.stage()]) + panel * kPanelBytes;
  }
  __device__ __forceinline__ void Describe(int word, uint32_t present) const {
    if (Problem::kSparse && ptx::LaneId() == 0) shared().present[ring_.stage()][word] = present;
  }
  __device__ __forceinline__ void TrackCopies(Unit unit) const { ptx::CpAsyncArrive(Full(unit)); }
  __device__ __forceinline__ void HandOver(Unit unit) const {
    __syncwarp();
    if (ptx::LaneId() == 0) ptx::MbarrierArrive(Full(unit));
  }
  __device__ __forceinline__ void Advance() {
    ring_ = Next(ring_);
    base_ = ptx::Opaque(base_);  // or all addresses would be kept, and there are no registers
  }

 private:
  __device__ __forceinline__ Shared& shared() const {
    return *static_cast<Shared*>(__cvta_shared_to_generic(base_));
  }
  __device__ __forceinline__ uint64_t* Full(Unit unit) const {
    return &shared().full[unit == kRope ? 0 : ring_.stage()][unit];
  }

  uint32_t base_;  // of shared memory
  RingPosition ring_;
};

// Copies listed tokens as they are.
template <int kDim, typename Target>
__device__ __forceinline__ void CopyTokens(ListedTokens<TokenFormat::kNumbers, kDim>& source,
                                           Target& target) {
  using Lanes = FormatLanes<TokenFormat::kNumbers>;
  static_assert(kPanel * 2 == Lanes::kPerToken * 16);
  TokenAddress<TokenFormat::kNumbers> address[Lanes::kTokens];
  uint32_t present;
  while (source.Next(address, present, 0, 1)) {
    const int row = Lanes::Token(0), part = Lanes::Part();
    const auto copy = [&](int panel) {
#pragma unroll
      for (int i = 0; i < Lanes::kTokens; ++i) {
        const int r = row + i * Lanes::kStep;
        ptx::CpAsync16(target.Panel(panel) + r * 128 + ((part ^ r % 8) << 4),
                       address[i].token + panel * kPanel * 2 + part * 16, true);
      }
    };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Unit unit = half == 0 ? kLeftHalf : kRightHalf;
      target.Wait(unit);
      if (half == 0) target.Describe(Lanes::Warp(), present);
#pragma unroll 1
      for (int panel = 0; panel < kHalfPanels; ++panel) copy(half * kHalfPanels + panel);
      target.TrackCopies(unit);
      target.HandOver(unit);
    }
    if constexpr (kDim > kHeadDimV) {
      target.Wait(kRope);
      copy(kPanelsV);
      target.TrackCopies(kRope);
      target.HandOver(kRope);
    }
    target.Advance();
  }
}

// --- Consumers ------------------------------------------------------------------------------

// One side, whose accumulators are as ManyRows has it.
template <typename T, int kCluster, typename Problem>
class Consumer : ManyRows<Problem::kConverted> {
 public:
  using Call = typename Problem::Call;
  using Shared = SharedMemory<Problem>;
  __device__ Consumer(const Call& p, const RowTile& tile, Shared& shared, int side)
      : p_(p), tile_(tile), shared_(shared), side_(side) {}

  __device__ __forceinline__ void Run(const Range& range) {
    RingPosition ring;
    if constexpr (kKeeps) {
      Segments segments(p_, tile(), range);
      if (segments.done()) Leave();
      int number = 0;
      for (Segment s; segments.Next(&s); ++number) {
        Begin(s, number);
        if (threadIdx.x % 128 == 0) current() = s;  // registers are scarce until Finish
        ring = Blocks(ring, s);
        if (segments.done()) Leave();
        Finish(number);
      }
    } else {
      segments().Begin(range);
      if (segments().done()) Leave();
      while (segments().Next(p_, tile())) {
        Begin(current(), segments().number);
        ring = Blocks(ring, current());
        if (segments().done()) Leave();
        Finish(segments().number);
      }
    }
  }

 private:
  using Rows = ManyRows<Problem::kConverted>;
  using Rows::column, Rows::lane, Rows::line, Rows::line_column, Rows::row, Rows::thread,
      Rows::warp, Rows::LineOffset, Rows::PieceOffset;

  // Whether there are registers for where it is: or it is found out anew, from shared memory.
  static constexpr bool kKeeps = !Problem::kConverted;

  // All pages are read: nothing more goes from this block to the other of the cluster, and the next
  // kernel's blocks may come when this one's have ended.
  __device__ __forceinline__ void Leave() {
    if constexpr (kCluster > 1) ptx::ClusterArrive();
    ptx::LetNextKernelStart();
  }

  static constexpr bool kSparse = Problem::kSparse;

  // Takes in the query rows of a sequence; rows that do not exist become zero.
  __device__ __forceinline__ void Begin(const Segment& s, int number) {
    const T* q = static_cast<const T*>(p_.q) + s.batch * p_.s_q * p_.h_q * Problem::kDim;
    // A warp writes where it had its part of the last result: nobody else may have to wait.
#pragma unroll
    for (int i = 0; i < Rows::kLines; ++i) {
      const int r = line(i);
      const T* source = q + int64_t{shared().query_row(r)} * Problem::kDim + side() * kColumnsEach +
                        line_column();
#pragma unroll
      for (int panel = 0; panel < kHalfPanels; ++panel) {
        ptx::CpAsync16(own_panels() + panel * kPanelBytes + LineOffset(r), source + panel * kPanel,
                       r < tile().count);
      }
    }
    if constexpr (Problem::kRopeShared) {
      constexpr int kRopeChunks = kPanel / 8;
#pragma unroll
      for (int i = 0; i < kRowTile * kRopeChunks / kConsumerThreads; ++i) {
        const int r = threadIdx.x / kRopeChunks + i * (kConsumerThreads / kRopeChunks);
        const int64_t source = shared().query_row(r);
        const int rope = threadIdx.x % kRopeChunks;
        ptx::CpAsync16(
            ptx::SmemAddress(shared().q) + kPanelsV * kPanelBytes + r * 128 + ((rope ^ r % 8) << 4),
            q + source * Problem::kDim + kHeadDimV + rope * 8, r < tile().count);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row() + 8 * h;
      if constexpr (Problem::kTma) {
        const int64_t source = shared().query_row(r);
        const T* rope = q + source * Problem::kDim + kHeadDimV + column();
#pragma unroll
        for (int j = 0; j < kPanel / 8; ++j) {
          q_rope_[2 * j + h] =
              r < tile().count ? *reinterpret_cast<const uint32_t*>(rope + 8 * j) : 0u;
        }
      }
      reference_[h] = -INFINITY;
      sum_[h] = 0;
      most_[h] = -INFINITY;
    }
    length_ = s.length;
    lowest_limit_ = tile().limit(p_, s.length, shared().query_token(0));
#pragma unroll
    for (int i = 0; i < 128; ++i) o_[i] = 0;
    ptx::CpAsyncWaitAll();
    ptx::FenceProxyAsync();
    ptx::MbarrierArrive(&shared().query_ready);
    ptx::MbarrierWait(&shared().query_ready, number % 2);
  }

  // What comes before and after is the same code for both: what runs once is paid in instruction
  // fetches.
  __device__ __forceinline__ RingPosition Blocks(RingPosition ring, const Segment& s) {
    return side() == kLeft ? Blocks<kLeft>(ring, s) : Blocks<kRight>(ring, s);
  }
  template <Side kSide>
  __device__ __forceinline__ RingPosition Blocks(RingPosition ring, const Segment& s) {
    const int first = s.first_block, count = s.visible;
    int i = 0;
    for (; i + 1 < count; i += 2) {
      Pair<kSide>(ring, (first + i) * kPageSize);
      ring = Next(Next(ring));
    }
    if (i < count) {
      Single<kSide>(ring, (first + i) * kPageSize);
      ring = Next(ring);
    }
    return ring;
  }

  // The blocks at `ring`, the left side's, and after it, the right side's.
  template <Side kSide>
  __device__ __forceinline__ void Pair(RingPosition ring, int first_token) {
    if constexpr (kSide == kLeft) {
      Scores<kSide>(ring, first_token);
      Rescale(Softmax<kSide>());
      MultiplyOwn<kSide>(ring);
      FinishMultiply<kSide>(ring);
      Rescale(AdoptReference<kSide>());
      MultiplyOther<kSide>(Next(ring));
      FinishMultiply<kSide>(Next(ring));
    } else {
      ptx::MbarrierWait(&shared().gate, pair_parity_);
      Scores<kSide>(Next(ring), first_token + kPageSize);
      const float2 before = AdoptReference<kSide>();
      const float2 alpha = Softmax<kSide>();
      Rescale(before);
      MultiplyOther<kSide>(ring);
      FinishMultiply<kSide>(ring);
      Rescale(alpha);
      MultiplyOwn<kSide>(Next(ring));
      FinishMultiply<kSide>(Next(ring));
    }
  }

  // The last block of an odd number. (Not a condition in Pair: the compiler would then wait after
  // every wgmma.)
  template <Side kSide>
  __device__ __forceinline__ void Single(RingPosition ring, int first_token) {
    if constexpr (kSide == kLeft) {
      Scores<kSide>(ring, first_token);
      Rescale(Softmax<kSide>());
      MultiplyOwn<kSide>(ring);
    } else {
      // No use, but a phase wants to be waited for.
      ptx::MbarrierWait(&shared().gate, pair_parity_);
      Rescale(AdoptReference<kSide>());
      MultiplyOther<kSide>(ring);
    }
    FinishMultiply<kSide>(ring);
  }

  // x_ = scaled and masked scores of the block, in base 2; highest_ = the highest of each row.
  template <Side kSide>
  __device__ __forceinline__ void Scores(RingPosition ring, int first_token) {
    const int stage = ring.stage();
    uint64_t* full = shared().full[stage];
    const uint64_t q_operand = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared().q));
    const uint64_t k = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared().k[stage]));
    // What threads have written, or copied, has to be made visible to the tensor cores.
    const auto wait = [](uint64_t* barrier, uint32_t parity) {
      ptx::MbarrierWait(barrier, parity);
      if (!Problem::kTma) ptx::FenceProxyAsync();
    };
    wait(&full[Problem::kTma ? kRope : kLeftHalf], ring.parity());
    ptx::WgmmaFence();
    if constexpr (Problem::kTma) {
#pragma unroll
      for (int step = 0; step < kPanel / 16; ++step) {
        const uint32_t offset = kPanelsV * kPanelBytes + step * 32;
        ptx::WgmmaM64N64<T>(x_, q_rope_ + 4 * step, ptx::Advance(k, offset), step > 0);
      }
    }
#pragma unroll
    for (int panel = 0; panel < kPanelsV; ++panel) {
      if (panel == kHalfPanels || (panel == 0 && Problem::kTma)) {
        wait(&full[panel / kHalfPanels], ring.parity());
      }
      if (kSide == kLeft && !Problem::kRopeShared && panel == kPanelsV - 1) ptx::WgmmaCommit();
#pragma unroll
      for (int step = 0; step < kPanel / 16; ++step) {
        const uint32_t offset = panel * kPanelBytes + step * 32;
        ptx::WgmmaM64N64<T>(x_, ptx::Advance(q_operand, offset), ptx::Advance(k, offset),
                            Problem::kTma || panel > 0 || step > 0);
      }
    }
    if constexpr (Problem::kRopeShared) {
      if (kSide == kLeft) ptx::WgmmaCommit();
      wait(&shared().full[0][kRope], ring.rope_parity());
      const uint64_t rope = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared().rope));
#pragma unroll
      for (int step = 0; step < kPanel / 16; ++step) {
        const uint32_t offset = kPanelsV * kPanelBytes + step * 32;
        ptx::WgmmaM64N64<T>(x_, ptx::Advance(q_operand, offset), ptx::Advance(rope, step * 32), 1);
      }
    }
    ptx::WgmmaCommit();
    if constexpr (kSide == kLeft) {
      ptx::WgmmaWait<1>();
      if (lane() == 0) ptx::MbarrierArrive(&shared().gate);
    }
    ptx::WgmmaWait<0>();
    if constexpr (Problem::kRopeApart) Release(Problem::kRopeShared ? 0 : stage, kRope);
    const float scale = p_.softmax_scale * static_cast<float>(M_LOG2E);

#pragma unroll
    for (float& x : x_) x *= scale;
    if constexpr (kSparse) {
      // The left half of the block is not released before its P is there: so this is still its.
      using Lanes = FormatLanes<Problem::kFormat>;
      uint4 words{};  // of one lane, the one that arrives for its warp when it has done
      if (lane() == 0) words = *reinterpret_cast<const uint4*>(shared().present[stage]);
      if (__shfl_sync(~0u, words.x & words.y & words.z & words.w, 0) != ~0u) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const uint32_t own = i == 0 ? words.x : i == 1 ? words.y : i == 2 ? words.z : words.w;
          const uint32_t word = Lanes::FromColumn(__shfl_sync(~0u, own, 0));
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            if (!(word >> Lanes::Bit(j % 2, j / 4) & 1)) x_[8 * i + j] = -INFINITY;
          }
        }
      }
    } else if (lowest_limit_ - first_token < kPageSize) {
      int limit[2];  // per row, the tokens it may see are those before this
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        limit[h] = tile().limit(p_, length_, shared().query_token(row() + 8 * h));
        limit[h] -= first_token + column();
      }
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        if (j / 4 * 8 + j % 2 >= limit[j / 2 % 2]) x_[j] = -INFINITY;
      }
      ptx::NamedBarrierSync(1 + kSide, kWarpsPerSide * 32);  // all warps of the side have their S
      CleanValues<T>([&](int panel) { return shared().k[stage] + panel * kPanelBytes; },
                     lowest_limit_ - first_token, length_ - first_token);
      // Every warp of this side reads in its own O += P V what all of them have cleaned.
      ptx::FenceProxyAsync();
      ptx::NamedBarrierSync(1 + kSide, kWarpsPerSide * 32);
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float top[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        top[i] = fmaxf(fmaxf(x_[8 * i + 2 * h], x_[8 * i + 2 * h + 1]),
                       fmaxf(x_[8 * i + 2 * h + 4], x_[8 * i + 2 * h + 5]));
      }
      highest_[h] = fmaxf(fmaxf(top[0], top[1]), fmaxf(top[2], top[3]));
      highest_[h] = fmaxf(highest_[h], __shfl_xor_sync(~0u, highest_[h], 1));
      highest_[h] = fmaxf(highest_[h], __shfl_xor_sync(~0u, highest_[h], 2));
      if constexpr (kSparse) most_[h] = fmaxf(most_[h], highest_[h]);
    }
  }

  // x_ becomes P, in p_registers_ and in shared memory, with the reference it was computed with.
  // The other side has read this buffer's previous P: it released its half of that block's V after
  // that, and this block, in the same stage, could not have been loaded before.
  // Returns what O has to be multiplied with.
  template <Side kSide>
  __device__ __forceinline__ float2 Softmax() {
    float alpha[2], subtrahend[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool grown = highest_[h] > reference_[h] + kRescaleThreshold;
      const float updated = grown ? highest_[h] : reference_[h];
      alpha[h] = grown ? ptx::Exp2(reference_[h] - updated) : 1.f;
      reference_[h] = updated;
      subtrahend[h] = updated == -INFINITY ? 0.f : updated;
      sum_[h] *= alpha[h];
      if (lane() % 4 == 0) shared().reference[kSide][row() + 8 * h] = updated;
    }
    const uint32_t p = ptx::SmemAddress(shared().p[kSide]);
#pragma unroll
    for (int step = 0; step < kPageSize / 16; ++step) {
      uint32_t piece[4];  // 16 x 16, as wgmma reads its first operand
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Rounded as the reference was: fused, the highest score would not be exactly 2^0.
        float* pair = x_ + 8 * step + 2 * i;
        pair[0] = ptx::Exp2(pair[0] - subtrahend[i % 2]);
        pair[1] = ptx::Exp2(pair[1] - subtrahend[i % 2]);
        sum_[i % 2] += pair[0] + pair[1];
        piece[i] = Pack(T{}, pair[0], pair[1]);
        if constexpr (!Problem::kConverted) p_registers_[4 * step + i] = piece[i];
      }
      ptx::StMatrix4(p + PieceOffset(step), piece[0], piece[1], piece[2], piece[3]);
    }
    // Before any wgmma of this side's is under way: the fence would wait for its end.
    ptx::FenceProxyAsync();
    __syncwarp();
    if (lane() % 4 == 0) ptx::MbarrierArrive(&shared().p_ready[kSide]);
    return {alpha[0], alpha[1]};
  }

  // Waits for the other side's P, and takes over its reference.
  template <Side kSide>
  __device__ __forceinline__ float2 AdoptReference() {
    constexpr Side kOther = kSide == kLeft ? kRight : kLeft;
    ptx::MbarrierWait(&shared().p_ready[kOther], pair_parity_);
    pair_parity_ ^= 1;
    float alpha[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float updated = 0;
      if (lane() % 4 == 0) updated = shared().reference[kOther][row() + 8 * h];
      updated = __shfl_sync(~0u, updated, lane() & ~3);
      alpha[h] = updated == reference_[h] ? 1.f : ptx::Exp2(reference_[h] - updated);
      reference_[h] = updated;
      sum_[h] *= alpha[h];
    }
    return {alpha[0], alpha[1]};
  }

  __device__ __forceinline__ void Rescale(float2 alpha) { Rows::Rescale(o_, alpha); }

  // In two steps where threads start with too few registers for one.
  template <typename A>
  __device__ __forceinline__ void Multiply(A a, uint64_t v) {
    if constexpr (Problem::kConverted) {
      ptx::WgmmaM64N128(o_, a, v);
      ptx::WgmmaM64N128(o_ + 64, a, ptx::Advance(v, 2 * kPanelBytes));
    } else {
      ptx::WgmmaM64N256<T>(o_, a, v);
    }
  }
  // This side's columns of a block's V.
  template <Side kSide>
  __device__ __forceinline__ uint64_t ValuesOf(RingPosition ring) const {
    return ptx::Descriptor<ptx::MnMajor<kPanelBytes>>(ptx::SmemAddress(shared().k[ring.stage()]) +
                                                      kSide * kHalfPanels * kPanelBytes);
  }
  // O += P V for this side's columns: of the block whose P this side has computed, or the other's.
  template <Side kSide>
  __device__ __forceinline__ void MultiplyOwn(RingPosition ring) {
    const uint64_t p = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared().p[kSide]));
    if constexpr (Problem::kConverted) {  // there is no room for it in registers
      ptx::NamedBarrierSync(1 + kSide, kWarpsPerSide * 32);
    }
    const uint64_t v = ValuesOf<kSide>(ring);
    ptx::WgmmaFence();
#pragma unroll
    for (int step = 0; step < kPageSize / 16; ++step) {
      if constexpr (Problem::kConverted) {
        Multiply(ptx::Advance(p, step * 32), ptx::Advance(v, step * 2048));
      } else {
        Multiply(p_registers_ + 4 * step, ptx::Advance(v, step * 2048));
      }
    }
    ptx::WgmmaCommit();
  }
  template <Side kSide>
  __device__ __forceinline__ void MultiplyOther(RingPosition ring) {
    const uint64_t p = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared().p[1 - kSide]));
    const uint64_t v = ValuesOf<kSide>(ring);
    ptx::WgmmaFence();
#pragma unroll
    for (int step = 0; step < kPageSize / 16; ++step) {
      Multiply(ptx::Advance(p, step * 32), ptx::Advance(v, step * 2048));
    }
    ptx::WgmmaCommit();
  }
  template <Side kSide>
  __device__ __forceinline__ void FinishMultiply(RingPosition ring) {
    ptx::WgmmaWait<0>();
    Release(ring.stage(), kSide == kLeft ? kLeftHalf : kRightHalf);
  }

  // This warp no longer reads the unit. In a cluster, both blocks load into it.
  __device__ __forceinline__ void Release(int stage, Unit unit) {
    __syncwarp();
    if constexpr (kCluster == 1) {
      if (lane() == 0) ptx::MbarrierArrive(&shared().empty[stage][unit]);
    } else {
      if (lane() < kCluster) ptx::MbarrierArriveAt(&shared().empty[stage][unit], lane());
    }
  }

  // Writes the result of a sequence, or of the part of it that this range holds. Each warp takes
  // its rows and columns through their place in Q, so that they leave as whole lines.
  __device__ __forceinline__ void Finish(int number) {
    // The sum of each row over all tokens: four lanes, then both sides, which from then on have
    // done with Q.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum_[h] += __shfl_xor_sync(~0u, sum_[h], 1);
      sum_[h] += __shfl_xor_sync(~0u, sum_[h], 2);
      if (lane() % 4 == 0) shared().sum[side()][row() + 8 * h] = sum_[h];
      if (kSparse && lane() % 4 == 0) shared().most[side()][row() + 8 * h] = most_[h];
    }
    ptx::MbarrierArrive(&shared().sums_ready);
    ptx::MbarrierWait(&shared().sums_ready, number % 2);
    const Segment s = current();
    const int partial_row = tile().partial_row(p_, s, ptx::GridY(), blockIdx.y);
    const bool complete = s.complete();
    float inverse[2], total[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row() + 8 * h;
      // In the same order on both sides, so that both find the same bits.
      total[h] = shared().sum[kLeft][r] + shared().sum[kRight][r];
      inverse[h] = total[h] == 0 ? 0.f : ptx::Reciprocal(total[h]);
      if (kSparse && complete && r < tile().count && total[h] != 0) {
        inverse[h] *= SinkShare(p_, tile().head(r), reference_[h] + ptx::Log2(total[h]));
      }
    }
    float scale[2] = {1, 1};
    if (!complete) {
      const float2 largest = Rows::Largest(o_);
      scale[0] = PartialScale(largest.x * inverse[0]);
      scale[1] = PartialScale(largest.y * inverse[1]);
    }
    // Of the four lanes that share two rows, one writes for each.
    const int h = lane() % 4, own = row() + 8 * h;
    if (h < 2 && own < tile().count) {
      const float all = h == 0 ? total[0] : total[1];
      const float lse =
          all == 0 ? -INFINITY : (h == 0 ? reference_[0] : reference_[1]) + ptx::Log2(all);
      const float most =
          kSparse ? fmaxf(shared().most[kLeft][own], shared().most[kRight][own]) : 0.f;
      if (!complete) {
        float* stats = p_.partial_stats + (int64_t{partial_row} + own) * 4;
        if (side() == kLeft) stats[0] = lse;
        if (kSparse && side() == kLeft) stats[3] = most;
        stats[1 + side()] = PowerReciprocal(h == 0 ? scale[0] : scale[1]);
      } else if (side() == kLeft) {
        const int token = shared().query_token(own);
        const int64_t head = shared().query_row(own) - token * p_.h_q;
        const int64_t place = RowPlace(p_, s.batch, static_cast<int>(head), token);
        p_.lse[place] = lse * static_cast<float>(M_LN2);
        if constexpr (kSparse) p_.max_logits[place] = most * static_cast<float>(M_LN2);
      }
    }
    inverse[0] *= scale[0];
    inverse[1] *= scale[1];
    uint16_t* target = static_cast<uint16_t*>(complete ? p_.out : p_.partial_out);
    const int first = complete ? static_cast<int>(s.batch * p_.s_q * p_.h_q) : partial_row;
    int rows[Rows::kLines];  // of a kilobyte: their numbers are small
#pragma unroll
    for (int i = 0; i < Rows::kLines; ++i) {
      rows[i] = first + (complete ? shared().query_row(line(i)) : line(i));
    }
    const auto store = [&](auto type) {
      Rows::Store(type, o_, inverse, own_panels(), target, rows, side() * kColumnsEach,
                  tile().count);
    };
    if (!complete || std::is_same_v<T, __half>) {
      store(__half{});
    } else {
      store(T{});
    }
    __syncwarp();
  }

  __device__ __forceinline__ Shared& shared() const {
    if constexpr (!Problem::kConverted) return shared_;
    // Or all addresses would be kept, and registers are scarce.
    return *static_cast<Shared*>(__cvta_shared_to_generic(ptx::Opaque(ptx::SmemAddress(&shared_))));
  }
  __device__ __forceinline__ const RowTile& tile() const { return kKeeps ? tile_ : shared().tile; }
  __device__ __forceinline__ SharedSegments& segments() const {
    return shared().segments[ptx::ThreadId() / 32];
  }
  // A side's, or a warp's. (What comes from a place that differs between warps the compiler takes
  // for different between lanes, too, and has code twice.)
  __device__ __forceinline__ Segment& current() const {
    return kKeeps ? shared().segments[side_].current : segments().current;
  }
  __device__ int side() const { return kKeeps ? side_ : ptx::ThreadId() / 128; }
  // Where Q's panels lie that have this side's columns of O.
  __device__ __forceinline__ uint32_t own_panels() const {
    return ptx::SmemAddress(shared().q) + side() * (kHalfPanels * kPanelBytes);
  }

  const Call& p_;
  const RowTile& tile_;
  Shared& shared_;
  const int side_;

  // Of the mbarriers that complete once for each P of the other side.
  uint32_t pair_parity_ = 0;
  // Of the current sequence.
  int length_;
  int lowest_limit_;     // the least of the tile
  uint32_t q_rope_[16];  // unless they are in shared memory
  float reference_[2];
  // Over the blocks whose P this side has computed: of sparse attention the largest score, and the
  // sum of the weights.
  float most_[2];
  float sum_[2];
  float o_[128];
  // Of the current block.
  float x_[32];
  float highest_[2];
  uint32_t p_registers_[Problem::kConverted ? 1 : 16];
};

// --- The kernel -----------------------------------------------------------------------------

// Grid: (row tiles, partitions), in clusters of kCluster row tiles of the same KV head.
template <typename T, int kCluster, typename Problem>
__global__ void __launch_bounds__(Problem::kThreads, 1)
    Kernel(const __grid_constant__ typename Problem::Call p,
           const __grid_constant__ PageMaps maps) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Shared = SharedMemory<Problem>;
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    if (ptx::SmemAddress(raw) % alignof(Shared) != 0) __trap();  // swizzled tiles need it
    if constexpr (Problem::kTma) {
      ptx::PrefetchTensorMap(&maps.half_panels);
      ptx::PrefetchTensorMap(&maps.rope);
    }
    for (int i = 0; i < kStages; ++i) {
      for (int unit = 0; unit < kUnits; ++unit) {
        ptx::MbarrierInit(&shared.full[i][unit], Problem::HandOvers(unit));
        ptx::MbarrierInit(&shared.empty[i][unit], kCluster * kWarpsPerSide);
      }
    }
    // Those that hand over numbers count the threads that wrote them: racecheck follows that.
    ptx::MbarrierInit(&shared.query_ready, kConsumerThreads);
    ptx::MbarrierInit(&shared.gate, kWarpsPerSide);
    for (uint64_t& barrier : shared.p_ready) ptx::MbarrierInit(&barrier, kWarpsPerSide * 8);
    ptx::MbarrierInit(&shared.sums_ready, kConsumerThreads);
    ptx::FenceMbarrierInit();
  }
  const RowTile tile(p, blockIdx.x, kCluster);
  if (threadIdx.x == 32) shared.tile = tile;
  const int row = threadIdx.x - kRowTile;
  if (!Problem::kSparse && 0 <= row && row < kRowTile) {
    const int r = min(row, tile.count - 1);
    shared.query_tokens[row] = tile.token(r);
    shared.query_rows[row] = tile.token(r) * static_cast<int>(p.h_q) + tile.head(r);
  }
  FetchParams(p);
  PrefetchInputs(p);
  if constexpr (kCluster > 1) ptx::ClusterArriveRelaxed();  // barriers are initialised
  ptx::WaitForPreviousKernel();
  const Range range = FindRange(p, blockIdx.y, ptx::GridY(), kSequenceCost, kLeastBlocks);
  __syncthreads();  // barriers and row numbers are there; those who made them were the last
  if constexpr (kCluster > 1) ptx::ClusterWait();
  const int role = __shfl_sync(~0u, threadIdx.x / 128, 0);
  if (role >= kSides) {
    ptx::DecreaseRegisters<Problem::kProducerRegisters>();
    const int warp = threadIdx.x / 32 - kConsumerThreads / 32;
    if (threadIdx.x == kConsumerThreads + 32) shared.range = range;
    if constexpr (Problem::kTma) {
      if (warp == 0) Produce<kCluster>(p, maps, shared.tile, range, shared);
    } else {
      Shared& kept = ptx::KeepAddress(shared);
      auto& walk = kept.walks[warp];
      walk.Begin(range);
      Stage<Problem> stage(kept);
      if constexpr (!Problem::kSparse) {
        Fp8Pages<> source(p, kept.tile, walk);
        ConvertTokens<TokenFormat::kFp8, 4, 3>(source, stage);
      } else {
        ListedTokens<Problem::kFormat, Problem::kDim> source(p, kept.tile, walk);
        if constexpr (Problem::kConverted) {
          ConvertTokens<Problem::kFormat, 4, 3>(source, stage);
        } else {
          CopyTokens(source, stage);
        }
      }
    }
    const int partitions = ptx::GridY();
    if (ptx::ThreadId() == kConsumerThreads + 32 && blockIdx.x == 0 && partitions > 1 &&
        !p.batch_invariant) {
      RecordMerges(p, shared.tile, shared.range, blockIdx.y, partitions);
    }
    __syncwarp();
    if constexpr (kCluster > 1) ptx::ClusterArrive();
  } else {
    ptx::IncreaseRegisters<Problem::kConsumerRegisters>();
    Consumer<T, kCluster, Problem>(p, tile, shared, role).Run(range);
  }
  if constexpr (kCluster > 1) ptx::ClusterWait();  // the other no longer copies into this block
}

}  // namespace flashmla::sm90::wide
