// Attention over FP8 tokens, in pages or listed, for an even number of row tiles.
//
// Two row tiles that read the same tokens are worked on by a cluster of two thread blocks. Either
// has all 128 rows, but half of the columns: of Q, K and V, and so of O. Nobody brings, or
// converts, what the other has.
//
//   S[128 x 64]   = Q[128 x 288] K[64 x 288]^T of either block, added up
//   P             = exp2(S - m)
//   O[128 x 256] += P[128 x 64] V[64 x 256]         V is the first 256 columns of K
//
// A warpgroup has 64 rows. In each block one is the owner of its rows, those of the block's own row
// tile: it gets the other block's part of their scores, and makes P of them for both. The other one
// helps: it sends its part of the scores of its rows there, and gets their P.
//
//   owner   | S n+1 | P n sent | O += P V n | the other's S | softmax n+1 | S n+2
//   helper  | S n+1, sent | P n comes | O += P V n | S n+2, sent
//
// So while an owner finds weights its last product is computed, and a helper's scores are there
// before they are needed. Scores and P travel by distributed shared memory, 24 KB a block each way
// where the tokens themselves would be 36.
//
//   warps 0-3   owner
//   warps 4-7   helper     200 registers a thread, of which O takes 128
//   warps 8-15  producers  convert tokens (ConvertColumns), eight each; 56 registers a thread
//
// References, sums, partial results and the schedule are those of wide.cuh.
//
// Shared memory: Q 72 KB, three stages of K 36 KB each, P 3 x 8 KB, scores 16 KB.
#pragma once

#include <cmath>
#include <type_traits>

#include "sm90/attention/common.cuh"
#include "sm90/attention/fp8.cuh"
#include "sm90/attention/many_rows.cuh"
#include "sm90/attention/tokens.cuh"

namespace flashmla::sm90::paired {

inline constexpr int kStages = 3;
inline constexpr int kGroups = 2;
inline constexpr int kWarpsEach = 4;
inline constexpr int kGroupThreads = kWarpsEach * 32;
inline constexpr int kConsumerThreads = kGroups * kGroupThreads;
inline constexpr int kProducerWarps = 8;
inline constexpr int kThreads = kConsumerThreads + kProducerWarps * 32;
inline constexpr int kConsumerRegisters = 200;
inline constexpr int kProducerRegisters = 56;
// How often a stage is handed over: by each producer warp and, as something is copied, by each of
// its threads.
inline constexpr int kHandOvers = kProducerWarps * (1 + 32);
inline constexpr int kColumns = kHeadDimV / 2;          // of V and O, of a thread block
inline constexpr int kOwnRows = kRowTile / kWarpsEach;  // of a consumer warp
inline constexpr int kRopeColumns = kPanel / 2;         // of a thread block
inline constexpr int kRopeBytes = kRowTile * kRopeColumns * 2;
inline constexpr int kScoreBytes = kRowTile * kPageSize * 4;
inline constexpr int kLeastBlocks = 1;
inline constexpr int kSequenceCost = 3;  // blocks: the time to finish a sequence and begin another
static_assert(kRowTile == 64 && kPageSize == 64, "S is one accumulator of m64n64k16");

enum Role : int { kOwner, kHelper };

template <typename CallType, TokenFormat kTokenFormat, int kTokenDim>
struct Problem {
  using Call = CallType;
  static_assert(kTokenFormat != TokenFormat::kNumbers);
  static constexpr TokenFormat kFormat = kTokenFormat;
  static constexpr int kDim = kTokenDim;
  static constexpr bool kSparse = std::is_same_v<Call, SparseCall>;
  static constexpr bool kRopeApart = kDim > kHeadDimV;
};

template <bool kExists>
struct RopeColumns {
  alignas(1024) uint8_t q_rope[kGroups][kRopeBytes];
  alignas(1024) uint8_t k_rope[kStages][kRopeBytes];
};
template <>
struct RopeColumns<false> {};

template <typename Problem>
struct SharedMemory : RopeColumns<Problem::kRopeApart> {
  alignas(1024) uint8_t q[kGroups][kHalfPanels * kPanelBytes];
  alignas(1024) uint8_t k[kStages][kHalfPanels * kPanelBytes];
  alignas(1024) uint8_t p[2][kPanelBytes];    // the owner's, of a block and the next
  alignas(1024) uint8_t p_sent[kPanelBytes];  // from the other block, of the helper's rows
  float4 scores[8][kGroupThreads];            // from the other block, of the owner's rows
  float references[2][kRowTile];              // the owner's, of a block and the next
  // From the other block, of the helper's rows:
  alignas(16) float reference[kRowTile];
  float total[2][kRowTile];  // of one sequence and the next
  alignas(16) uint32_t present[kStages][kProducerWarps];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  uint64_t scores_full;   // the other block's helper has sent them,
  uint64_t scores_empty;  // and its owner has taken those of this block's helper
  uint64_t p_full;        // the other block's owner has sent P and references,
  uint64_t p_empty;       // and its helper has done with those of this block's owner
  uint64_t totals_full[2];
  uint64_t scored;   // of a block with values to be cleaned: both warpgroups have its scores,
  uint64_t cleaned;  // and its values are as they may be read
  SharedSegments segments[kGroups * kWarpsEach];
  RowTile tiles[kGroups];
  Walk walks[kProducerWarps];
  Range range;
  // Per row, its place among a sequence's query rows, and its token: divisions are slow. But of
  // sparse attention they are the heads of one token.
  int query_rows[kGroups][Problem::kSparse ? 1 : kRowTile];
  int query_tokens[kGroups][Problem::kSparse ? 1 : kRowTile];

  __device__ int query_row(int group, int row) const {
    if (!Problem::kSparse) return query_rows[group][row];
    return tiles[group].first + min(row, tiles[group].count - 1);
  }
  __device__ int query_token(int group, int row) const {
    return Problem::kSparse ? 0 : query_tokens[group][row];
  }
};

// A place in the ring of stages.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
};
__device__ __forceinline__ RingPosition Next(RingPosition ring) {
  const bool wraps = ring.stage == kStages - 1;
  return {wraps ? 0 : ring.stage + 1, ring.parity ^ wraps};
}

// Rows of 64 bytes of RoPE columns: where 16 of them lie, as wgmma reads them (KMajor64).
__device__ __forceinline__ uint32_t RopePlace(int row, int chunk) {
  return row * 64 + ((chunk ^ row / 2 % 4) << 4);
}

// --- Producers ------------------------------------------------------------------------------

// Where the warps that bring tokens put this block's columns of them.
template <typename Problem>
class Stage {
 public:
  using Shared = SharedMemory<Problem>;
  __device__ explicit Stage(Shared& shared) : base_(ptx::SmemAddress(&shared)) {}

  static __device__ __forceinline__ int Half() { return ptx::ClusterRank(); }
  __device__ __forceinline__ void Wait() const {
    ptx::MbarrierWait(&shared().empty[ring_.stage], ring_.parity ^ 1);
  }
  __device__ __forceinline__ uint32_t Panel(int panel) const {
    return ptx::SmemAddress(shared().k[ring_.stage]) + panel * kPanelBytes;
  }
  __device__ __forceinline__ uint32_t Rope() const {
    if constexpr (!Problem::kRopeApart)
      return 0;
    else
      return ptx::SmemAddress(shared().k_rope[ring_.stage]);
  }
  __device__ __forceinline__ void Describe(int word, uint32_t present) const {
    if (Problem::kSparse && ptx::LaneId() == 0) shared().present[ring_.stage][word] = present;
  }
  __device__ __forceinline__ void TrackCopies() const {
    ptx::CpAsyncArrive(&shared().full[ring_.stage]);
  }
  __device__ __forceinline__ void HandOver() const {
    __syncwarp();
    if (ptx::LaneId() == 0) ptx::MbarrierArrive(&shared().full[ring_.stage]);
  }
  __device__ __forceinline__ void Advance() {
    ring_ = Next(ring_);
    base_ = ptx::Opaque(base_);  // or all addresses would be kept, and there are no registers
  }

 private:
  __device__ __forceinline__ Shared& shared() const {
    return *static_cast<Shared*>(__cvta_shared_to_generic(base_));
  }

  uint32_t base_;  // of shared memory
  RingPosition ring_;
};

// Converts this block's columns of FP8 tokens, of which a warp has eight: four lanes for each, 16
// codes of a panel for a lane. When a panel's codes are converted, the next block's are sent for,
// from the L2 cache.
//
// What is written so has to be made visible to the tensor cores by a fence, which waits for all
// that its thread has begun to load. There is always something here: consumers do it.
template <TokenFormat kFormat, typename Source, typename Target>
__device__ __forceinline__ void ConvertColumns(Source& source, Target& target) {
  using Lanes = SplitLanes;
  constexpr bool kApart = kFormat == TokenFormat::kFp8Apart;
  constexpr int kAhead = kApart ? kHalfPanels - 2 : kHalfPanels;  // panels; registers are few
  struct Block {
    TokenAddress<kFormat> address[1];
    uint32_t present;
  };
  struct Loaded {
    uint4 codes[kHalfPanels];
    uint2 scales;
  } own;
  const auto load = [&](const Block& block, int tile) {
    const int part = Lanes::Part(), half = target.Half();
    const uint8_t* token = block.address[0].token;
    const uint8_t* from = token + half * kColumns + tile * kPanel + part * 16;
    if constexpr (kApart) {  // where nothing is aligned to more
      const uint2 low = ptx::Load8(from), high = ptx::Load8(from + 8);
      own.codes[tile] = {low.x, low.y, high.x, high.y};
    } else {
      own.codes[tile] = ptx::Load16(from);
    }
  };
  const auto load_scales = [&](const Block& block) {
    const int half = target.Half();
    if constexpr (kApart) {
      own.scales.x = ptx::Load4(block.address[0].scales + half * 4);
    } else {
      own.scales = ptx::Load8(block.address[0].token + kHeadDimV + half * 8);
    }
  };

  Block block;
  if (!source.Next(block.address, block.present, target.Half(), 2)) return;
  load_scales(block);
#pragma unroll
  for (int tile = 0; tile < kAhead; ++tile) load(block, tile);
  for (bool more = true; more;) {
#pragma unroll
    for (int tile = kAhead; tile < kHalfPanels; ++tile) load(block, tile);
    Block next;
    more = source.Next(next.address, next.present, target.Half(), 2);
    const int half = target.Half(), part = Lanes::Part(), row = Lanes::Token(0);
    const auto place = [&](int chunk) -> uint32_t { return row * 128 + ((chunk ^ row % 8) << 4); };
    target.Wait();
    target.Describe(Lanes::Word(), block.present);
    if constexpr (!kApart) {
      ptx::CpAsync16(target.Rope() + RopePlace(row, part),
                     block.address[0].token + kFp8RopeOffset + half * kRopeColumns * 2 + part * 16,
                     true);
    } else if (half == 1) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        ptx::CpAsync8(target.Panel(kHalfPanels - 1) + place(part * 2 + i / 2) + i % 2 * 8,
                      block.address[0].token + kFp8ApartCodes + part * 32 + i * 8);
      }
    }
    target.TrackCopies();
#pragma unroll
    for (int tile = 0; tile < kHalfPanels; ++tile) {
      float scale;
      if constexpr (kApart) {
        scale = PowerOf(own.scales.x >> tile * 8 & 0xFF);
      } else {
        scale = __uint_as_float(tile < 2 ? own.scales.x : own.scales.y);
      }
      const uint4 v = own.codes[tile];
      const uint4 low = Dequantize(v.x, v.y, scale), high = Dequantize(v.z, v.w, scale);
      if (!kApart || tile < kHalfPanels - 1 || half == 0) {
        ptx::StoreShared16(target.Panel(tile) + place(part * 2), low);
        ptx::StoreShared16(target.Panel(tile) + place(part * 2 + 1), high);
      }
      if (tile < kAhead) load(next, tile);
    }
    load_scales(next);
    target.HandOver();
    target.Advance();
    block = next;
  }
}

// --- Consumers ------------------------------------------------------------------------------

// A warpgroup, whose accumulators are as ManyRows has it. Registers are scarce: neither addresses
// are kept nor what follows from a thread's number.
template <typename Problem>
class Consumer : ManyRows</*kAnew=*/true> {
 public:
  using T = __nv_bfloat16;
  using Call = typename Problem::Call;
  using Shared = SharedMemory<Problem>;
  __device__ Consumer(const Call& p, Shared& shared) : p_(p), shared_(shared) {}

  __device__ __forceinline__ void Run(const Range& range) {
    segments().Begin(range);
    if (segments().done()) {
      Leave();
      ptx::ClusterArrive();
    }
    RingPosition ring;
    while (segments().Next(p_, tile())) {
      Begin();
      // What comes before and after is the same code for both: what runs once is paid in
      // instruction fetches.
      if (group() == kOwner) {
        Own(ring);
      } else {
        Help(ring);
      }
      const bool last = segments().done();
      if (last) Leave();
      Finish(last);
    }
  }

 private:
  using Rows = ManyRows</*kAnew=*/true>;
  using Rows::column, Rows::lane, Rows::line, Rows::line_column, Rows::row, Rows::thread,
      Rows::warp, Rows::LineOffset, Rows::PieceOffset;

  static constexpr bool kSparse = Problem::kSparse;

  // All tokens are read: the next kernel's blocks may come when this one's have ended.
  __device__ __forceinline__ void Leave() { ptx::LetNextKernelStart(); }

  // Takes in the query rows of a sequence; rows that do not exist become zero.
  __device__ __forceinline__ void Begin() {
    const Segment& s = current();
    const T* q = static_cast<const T*>(p_.q) + s.batch * p_.s_q * p_.h_q * Problem::kDim;
    const int rank = ptx::ClusterRank(), count = tile().count;
    // A warp writes where it had its part of the last result: nobody else may have to wait.
#pragma unroll
    for (int i = 0; i < Rows::kLines; ++i) {
      const int r = line(i);
      const T* source = q + int64_t{query_row(r)} * Problem::kDim + rank * kColumns + line_column();
#pragma unroll
      for (int panel = 0; panel < kHalfPanels; ++panel) {
        ptx::CpAsync16(own_panels() + panel * kPanelBytes + LineOffset(r), source + panel * kPanel,
                       r < count);
      }
    }
    if constexpr (Problem::kRopeApart) {
      constexpr int kChunks = kRopeColumns / 8;
#pragma unroll
      for (int i = 0; i < kRowTile * kChunks / kGroupThreads; ++i) {
        const int r = thread() % kGroupThreads / kChunks + i * (kGroupThreads / kChunks);
        const int chunk = thread() % kChunks;
        const T* source = q + int64_t{query_row(r)} * Problem::kDim + kHeadDimV;
        ptx::CpAsync16(ptx::SmemAddress(shared().q_rope[group()]) + RopePlace(r, chunk),
                       source + rank * kRopeColumns + chunk * 8, r < count);
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      reference_[h] = -INFINITY;
      sum_[h] = 0;
      most_[h] = -INFINITY;
    }
#pragma unroll
    for (int i = 0; i < 128; ++i) o_[i] = 0;
    ptx::CpAsyncWaitAll();
    ptx::FenceProxyAsync();
    GroupSync();
  }

  // The owner's blocks of a sequence. `left` are those from the one at `ring` on.
  __device__ __forceinline__ void Own(RingPosition& ring) {
    int left = ptx::Uniform(current().visible);
    if (left == 0) return;
    BeginScores<kOwner>(ring);
    ptx::WgmmaWait<0>();
    Weights(ring.stage, left);
#pragma unroll 1
    for (; left > 1; --left) {
      const RingPosition next = Next(ring);
      const uint32_t turn = ptx::Uniform(turns_ / kWeights % 2);
      BeginScores<kOwner>(next);  // its fence is for the weights, too
      SendWeights(turn);
      Clean(ring.stage, left);
      BeginValues<kOwner>(ring, turn);
      ptx::WgmmaWait<1>();  // the next scores are there
      const float2 alpha = Weights(next.stage, left - 1);
      ptx::WgmmaWait<0>();
      Release(ring.stage);
      Rescale(alpha);
      ring = next;
    }
    const uint32_t turn = ptx::Uniform(turns_ / kWeights % 2);
    ptx::FenceProxyAsync();
    SendWeights(turn);
    Clean(ring.stage, left);
    BeginValues<kOwner>(ring, turn);
    ptx::WgmmaWait<0>();
    Release(ring.stage);
    ring = Next(ring);
  }

  // The helper's.
  __device__ __forceinline__ void Help(RingPosition& ring) {
    int left = ptx::Uniform(current().visible);
    if (left == 0) return;
    BeginScores<kHelper>(ring);
    ptx::WgmmaWait<0>();
    SendScores();
#pragma unroll 1
    for (; left > 0; --left) {
      const RingPosition next = Next(ring);
      if (left > 1) {
        BeginScores<kHelper>(next);
        // Weights may come. (Said earlier, the fence would wait until the other block knows it.)
        ptx::MbarrierArriveAtIf(lane() == 0, &shared().p_empty, other());
        ptx::WgmmaWait<0>();
        SendScores();
      } else {
        ptx::MbarrierArriveAtIf(lane() == 0, &shared().p_empty, other());
      }
      Rescale(TakeWeights());
      Clean(ring.stage, left);
      BeginValues<kHelper>(ring, 0);
      ptx::WgmmaWait<0>();
      Release(ring.stage);
      ring = next;
    }
  }
  // The first token of a block.
  __device__ __forceinline__ int FirstToken(int left) const {
    const Segment& s = current();
    return (s.first_block + s.visible - left) * kPageSize;
  }
  // The block is multiplied.
  __device__ __forceinline__ void Release(int stage) {
    __syncwarp();
    if (lane() == 0) ptx::MbarrierArrive(&shared().empty[stage]);
  }

  // x_ = this block's part of the scores of the rows.
  template <Role kRole>
  __device__ __forceinline__ void BeginScores(RingPosition ring) {
    ptx::MbarrierWait(&shared().full[ring.stage], ring.parity);
    ptx::FenceProxyAsync();  // what threads have written, or copied, becomes visible
    MultiplyKeys<kRole>(ring);
  }
  template <Role kRole>
  __device__ __forceinline__ void MultiplyKeys(RingPosition ring) {
    const uint32_t stage = ptx::Uniform(ring.stage);
    const uint64_t q = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared().q[kRole]));
    const uint64_t k = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared().k[stage]));
    ptx::WgmmaFence();
#pragma unroll
    for (int panel = 0; panel < kHalfPanels; ++panel) {
#pragma unroll
      for (int step = 0; step < kPanel / 16; ++step) {
        const uint32_t offset = panel * kPanelBytes + step * 32;
        if (panel == 0 && step == 0) {
          ptx::WgmmaM64N64New<T>(x_, q, k);
        } else {
          ptx::WgmmaM64N64<T>(x_, ptx::Advance(q, offset), ptx::Advance(k, offset), 1);
        }
      }
    }
    if constexpr (Problem::kRopeApart) {
      const uint64_t q_rope =
          ptx::Descriptor<ptx::KMajor64>(ptx::SmemAddress(shared().q_rope[kRole]));
      const uint64_t k_rope =
          ptx::Descriptor<ptx::KMajor64>(ptx::SmemAddress(shared().k_rope[stage]));
#pragma unroll
      for (int step = 0; step < kRopeColumns / 16; ++step) {
        ptx::WgmmaM64N64<T>(x_, ptx::Advance(q_rope, step * 32), ptx::Advance(k_rope, step * 32),
                            1);
      }
    }
    ptx::WgmmaCommit();
  }

  // O += P V for this block's columns.
  template <Role kRole>
  __device__ __forceinline__ void BeginValues(RingPosition ring, uint32_t turn) {
    const uint32_t stage = ptx::Uniform(ring.stage);
    const uint8_t* weights = kRole == kOwner ? shared().p[turn] : shared().p_sent;
    const uint64_t p = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(weights));
    const uint64_t v =
        ptx::Descriptor<ptx::MnMajor<kPanelBytes>>(ptx::SmemAddress(shared().k[stage]));
    ptx::WgmmaFence();
#pragma unroll
    for (int step = 0; step < kPageSize / 16; ++step) {
      const uint64_t a = ptx::Advance(p, step * 32), b = ptx::Advance(v, step * 2048);
      // Not one of 256 columns: the compiler has no registers for it where 512 threads start with
      // 128 each.
      ptx::WgmmaM64N128(o_, a, b);
      ptx::WgmmaM64N128(o_ + 64, a, ptx::Advance(b, 2 * kPanelBytes));
    }
    ptx::WgmmaCommit();
  }

  // The helper's scores go to the owner of the rows, thread to thread.
  __device__ __forceinline__ void SendScores() {
    ptx::MbarrierWait(&shared().scores_empty, Turn(kScores) ^ 1);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      ptx::StoreClusterAsync16(&shared().scores[i][thread() % kGroupThreads], other(), x_ + 4 * i,
                               &shared().scores_full);
    }
  }
  __device__ __forceinline__ void TakeScores() {
    if (thread() % kGroupThreads == 0) {
      ptx::MbarrierArriveExpectTx(&shared().scores_full, kScoreBytes);
    }
    ptx::MbarrierWait(&shared().scores_full, Turn(kScores));
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float4 v = shared().scores[i][thread() % kGroupThreads];
      x_[4 * i] += v.x, x_[4 * i + 1] += v.y, x_[4 * i + 2] += v.z, x_[4 * i + 3] += v.w;
    }
    __syncwarp();
    if (lane() == 0) ptx::MbarrierArriveAt(&shared().scores_empty, other());
  }

  // x_ = scaled and masked scores of the block, in base 2; highest_ = the highest of each row.
  __device__ __forceinline__ void ScaleAndMask(int stage, int left) {
    const float scale = p_.softmax_scale * static_cast<float>(M_LOG2E);
#pragma unroll
    for (float& x : x_) x *= scale;
    if constexpr (kSparse) {
      using Lanes = SplitLanes;
      uint4 words{};  // of one lane, the one that arrives for its warp when it has done
      if (lane() == 0) {
        const uint4* present = reinterpret_cast<const uint4*>(shared().present[stage]);
        const uint4 a = present[0], b = present[1];
        words = {a.x & b.x, a.y & b.y, a.z & b.z, a.w & b.w};
      }
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
    } else if (const int first_token = FirstToken(left); lowest_limit() - first_token < kPageSize) {
      int limit[2];  // per row, the tokens it may see are those before this
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        limit[h] = tile().limit(p_, current().length, query_token(row() + 8 * h));
        limit[h] -= first_token + column();
      }
#pragma unroll
      for (int j = 0; j < 32; ++j) {
        if (j / 4 * 8 + j % 2 >= limit[j / 2 % 2]) x_[j] = -INFINITY;
      }
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
  // The least of both row tiles.
  __device__ __forceinline__ int lowest_limit() const {
    const int group = ptx::ClusterRank();  // whose rows are those of the first tile
    return shared().tiles[group].limit(p_, current().length, shared().query_token(group, 0));
  }

  // x_, this block's part of the scores, becomes the weights, in shared memory: there they are
  // before the product that is under way is waited for. Returns what O has to be multiplied with.
  __device__ __forceinline__ float2 Weights(int stage, int left) {
    TakeScores();
    ScaleAndMask(stage, left);
    float alpha[2], subtrahend[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const bool grown = highest_[h] > reference_[h] + kRescaleThreshold;
      const float updated = grown ? highest_[h] : reference_[h];
      alpha[h] = grown ? ptx::Exp2(reference_[h] - updated) : 1.f;
      reference_[h] = updated;
      subtrahend[h] = updated == -INFINITY ? 0.f : updated;
      sum_[h] *= alpha[h];
      if (lane() % 4 == 0) shared().references[turns_ / kWeights % 2][row() + 8 * h] = updated;
    }
    const uint32_t p = ptx::SmemAddress(shared().p[turns_ / kWeights % 2]);
#pragma unroll
    for (int step = 0; step < kPageSize / 16; ++step) {
      uint32_t piece[4];  // 16 x 16, as wgmma reads its first operand
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // Rounded as the reference was: fused, the highest score would not be exactly 2^0.
        const float* pair = x_ + 8 * step + 2 * i;
        const float low = ptx::Exp2(pair[0] - subtrahend[i % 2]);
        const float high = ptx::Exp2(pair[1] - subtrahend[i % 2]);
        sum_[i % 2] += low + high;
        piece[i] = Pack(T{}, low, high);
      }
      ptx::StMatrix4(p + PieceOffset(step), piece[0], piece[1], piece[2], piece[3]);
    }
    return {alpha[0], alpha[1]};
  }

  // They go to the other block. A fence is before this: what was written is visible to the copy
  // engine and the tensor cores.
  __device__ __forceinline__ void SendWeights(uint32_t turn) {
    constexpr int kBytes = kOwnRows * 128;
    const uint32_t warp = ptx::Uniform(this->warp());
    turns_ ^= kWeights;
    ptx::MbarrierWait(&shared().p_empty, turn);
    __syncwarp();
    const bool first = lane() == 0;
    ptx::BulkCopyToClusterIf(first, ptx::SmemAddress(shared().p_sent) + warp * kBytes,
                             ptx::SmemAddress(shared().p[turn]) + warp * kBytes, kBytes,
                             &shared().p_full, other());
    ptx::BulkCopyToClusterIf(first, ptx::SmemAddress(shared().reference) + warp * kOwnRows * 4,
                             ptx::SmemAddress(shared().references[turn]) + warp * kOwnRows * 4,
                             kOwnRows * 4, &shared().p_full, other());
    GroupSync();
  }
  __device__ __forceinline__ float2 TakeWeights() {
    if (thread() % kGroupThreads == 0) {
      ptx::MbarrierArriveExpectTx(&shared().p_full, kPanelBytes + kRowTile * 4);
    }
    ptx::MbarrierWait(&shared().p_full, Turn(kWeights));
    float alpha[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float updated = shared().reference[row() + 8 * h];
      alpha[h] = updated == reference_[h] ? 1.f : ptx::Exp2(reference_[h] - updated);
      reference_[h] = updated;
    }
    return {alpha[0], alpha[1]};
  }

  __device__ __forceinline__ void Rescale(float2 alpha) { Rows::Rescale(o_, alpha); }

  // Of pages, the last ones of a sequence. Both warpgroups have their scores of the block, and its
  // values are read by both.
  __device__ __forceinline__ void Clean(int stage, int left) {
    if constexpr (!kSparse) {
      const int first_token = FirstToken(left);
      const int seen_by_all = lowest_limit() - first_token;
      if (seen_by_all >= kPageSize) return;
      const uint32_t turn = Turn(kCleanings);
      ptx::MbarrierArrive(&shared().scored);
      if (group() == kOwner) {
        ptx::MbarrierWait(&shared().scored, turn);
        CleanValues<T, kHalfPanels>(
            [&](int panel) { return shared().k[stage] + panel * kPanelBytes; }, seen_by_all,
            current().length - first_token);
        ptx::FenceProxyAsync();
        ptx::MbarrierArrive(&shared().cleaned);
      }
      ptx::MbarrierWait(&shared().cleaned, turn);
    }
  }

  // Writes this block's columns of the result of a sequence, or of the part of it that this range
  // holds. Each warp takes its rows through their place in Q, so that they leave as whole lines.
  __device__ __forceinline__ void Finish(bool last) {
    const Segment s = current();
    const bool owner = group() == kOwner, any = s.visible > 0;
    const int rank = ptx::ClusterRank(), turn = turns_ / kSums % 2;
    float inverse[2], total[2];
    if (owner) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        sum_[h] += __shfl_xor_sync(~0u, sum_[h], 1);
        sum_[h] += __shfl_xor_sync(~0u, sum_[h], 2);
        total[h] = sum_[h];
        if (any && lane() % 4 == 0) {
          ptx::StoreClusterAsync4(&shared().total[turn][row() + 8 * h], other(), total[h],
                                  &shared().totals_full[turn]);
        }
      }
    } else {
      total[0] = total[1] = 0;
      if (any) {
        if (thread() % kGroupThreads == 0) {
          ptx::MbarrierArriveExpectTx(&shared().totals_full[turn], kRowTile * 4);
        }
        ptx::MbarrierWait(&shared().totals_full[turn], turns_ / kSums / 2 % 2);
        total[0] = shared().total[turn][row()];
        total[1] = shared().total[turn][row() + 8];
      }
    }
    if (any) turns_ += kSums;
    // Nothing more goes from this block to the other, or comes from it.
    if (last) ptx::ClusterArrive();
    GroupSync();  // all have done with Q
    const bool complete = s.complete();
    const int partial_row = tile().partial_row(p_, s, ptx::GridY(), blockIdx.y);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row() + 8 * h;
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
      const float most = h == 0 ? most_[0] : most_[1];
      if (!complete) {
        float* stats = p_.partial_stats + (int64_t{partial_row} + own) * 4;
        if (owner) stats[0] = lse;
        if (kSparse && owner) stats[3] = most;
        stats[1 + rank] = PowerReciprocal(h == 0 ? scale[0] : scale[1]);
      } else if (owner) {
        const int token = query_token(own);
        const int64_t head = query_row(own) - token * p_.h_q;
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
      rows[i] = first + (complete ? query_row(line(i)) : line(i));
    }
    const auto store = [&](auto type) {
      Rows::Store(type, o_, inverse, own_panels(), target, rows, rank * kColumns, tile().count);
    };
    if (!complete) {
      store(__half{});
    } else {
      store(T{});
    }
    __syncwarp();
  }

  __device__ __forceinline__ void GroupSync() const {
    ptx::NamedBarrierSync(1 + group(), kGroupThreads);
  }
  __device__ __forceinline__ Shared& shared() const {
    return *static_cast<Shared*>(__cvta_shared_to_generic(ptx::Opaque(ptx::SmemAddress(&shared_))));
  }
  __device__ static int group() { return ptx::ThreadId() / kGroupThreads; }
  __device__ static uint32_t other() { return ptx::ClusterRank() ^ 1; }
  __device__ __forceinline__ const RowTile& tile() const { return shared().tiles[group()]; }
  __device__ __forceinline__ SharedSegments& segments() const {
    return shared().segments[ptx::ThreadId() / 32];
  }
  __device__ __forceinline__ const Segment& current() const { return segments().current; }
  __device__ __forceinline__ int query_row(int row) const {
    return shared().query_row(group(), row);
  }
  __device__ __forceinline__ int query_token(int row) const {
    return shared().query_token(group(), row);
  }
  __device__ __forceinline__ uint32_t own_panels() const {
    return ptx::SmemAddress(shared().q[group()]);
  }

  const Call& p_;
  Shared& shared_;

  // Whose turn it is of what is exchanged: the parity of an mbarrier, and then it is the next
  // one's. Of scores and weights it changes with every block; sums of sequences are counted.
  enum Exchange : uint32_t { kScores = 1, kWeights = 2, kCleanings = 4, kSums = 8 };
  __device__ __forceinline__ uint32_t Turn(Exchange exchange) {
    const uint32_t turn = turns_ / exchange % 2;
    turns_ ^= exchange;
    return turn;
  }

  uint32_t turns_ = 0;
  // Of the current sequence.
  float reference_[2];
  float most_[2];  // of an owner: the largest score, and the sum of the weights
  float sum_[2];
  float o_[128];
  // Of the current block.
  float x_[32];
  float highest_[2];
};

// --- The kernel -----------------------------------------------------------------------------

// Grid: (row tiles, partitions), in clusters of two row tiles of the same KV head.
template <typename Problem>
__global__ void __launch_bounds__(kThreads, 1)
    Kernel(const __grid_constant__ typename Problem::Call p) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Shared = SharedMemory<Problem>;
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  if (threadIdx.x == 0) {
    if (ptx::SmemAddress(raw) % alignof(Shared) != 0) __trap();  // swizzled tiles need it
    for (int i = 0; i < kStages; ++i) {
      ptx::MbarrierInit(&shared.full[i], kHandOvers);
      ptx::MbarrierInit(&shared.empty[i], kGroups * kWarpsEach);
    }
    ptx::MbarrierInit(&shared.scores_full, 1);
    ptx::MbarrierInit(&shared.scores_empty, kWarpsEach);
    ptx::MbarrierInit(&shared.p_full, 1);
    ptx::MbarrierInit(&shared.p_empty, kWarpsEach);
    for (uint64_t& barrier : shared.totals_full) ptx::MbarrierInit(&barrier, 1);
    // Those that hand over numbers count the threads that wrote them: racecheck follows that.
    ptx::MbarrierInit(&shared.scored, kConsumerThreads);
    ptx::MbarrierInit(&shared.cleaned, kGroupThreads);
    ptx::FenceMbarrierInit();
  }
  const RowTile tile(p, blockIdx.x ^ threadIdx.x / kGroupThreads % kGroups, 2);
  if (threadIdx.x < kConsumerThreads) {
    const int group = threadIdx.x / kGroupThreads, row = threadIdx.x % kGroupThreads;
    if (row == 0) shared.tiles[group] = tile;
    if (!Problem::kSparse && row < kRowTile) {
      const int r = min(row, tile.count - 1);
      shared.query_tokens[group][row] = tile.token(r);
      shared.query_rows[group][row] = tile.token(r) * static_cast<int>(p.h_q) + tile.head(r);
    }
  }
  FetchParams(p);
  PrefetchInputs(p);
  ptx::ClusterArriveRelaxed();  // barriers are initialised
  ptx::WaitForPreviousKernel();
  const Range range = FindRange(p, blockIdx.y, ptx::GridY(), kSequenceCost, kLeastBlocks);
  __syncthreads();  // barriers and row numbers are there; those who made them were the last
  ptx::ClusterWait();
  const int role = __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0);
  Shared& kept = ptx::KeepAddress(shared);
  if (role >= kGroups) {
    ptx::DecreaseRegisters<kProducerRegisters>();
    const int warp = threadIdx.x / 32 - kConsumerThreads / 32;
    if (threadIdx.x == kConsumerThreads + 32) shared.range = range;
    auto& walk = kept.walks[warp];
    walk.Begin(range);
    Stage<Problem> stage(kept);
    if constexpr (Problem::kSparse) {
      ListedTokens<Problem::kFormat, Problem::kDim, SplitLanes> source(p, kept.tiles[kOwner], walk);
      ConvertColumns<Problem::kFormat>(source, stage);
    } else {
      Fp8Pages<SplitLanes> source(p, kept.tiles[kOwner], walk);
      ConvertColumns<Problem::kFormat>(source, stage);
    }
    const int partitions = ptx::GridY();
    if (ptx::ThreadId() == kConsumerThreads + 32 && blockIdx.x == 0 && partitions > 1 &&
        !p.batch_invariant) {
      RecordMerges(p, shared.tiles[kOwner], shared.range, blockIdx.y, partitions);
    }
    __syncwarp();
    ptx::ClusterArrive();
  } else {
    ptx::IncreaseRegisters<kConsumerRegisters>();
    Consumer<Problem>(p, kept).Run(range);
  }
  ptx::ClusterWait();  // the other no longer sends to this block, or reads from it
}

}  // namespace flashmla::sm90::paired
