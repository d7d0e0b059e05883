// Dense MLA decoding on Hopper for few query rows: at most 32 that share a KV head.
//
// The tensor cores' instructions have 64 rows. Here those are the cached tokens and the latent
// columns, and the query rows are the narrow side:
//
//   S^T[64 x N]   = K[64 x 576] Q[N x 576]^T
//   P^T           = exp2(S^T - m)                     m: one number per query row
//   O^T[512 x N]  = O^T * alpha + V^T[512 x 64] P^T   V is the first 512 columns of K
//
// with N = 16 or 32: a quarter or half of what the wide shape (wide.cuh) would compute, and time is
// that of reading the pages, once. What matters is that reading never stops:
//
//   warps 0-3  scores   S and P, block after block; its four warps hold 16 tokens each
//   warps 4-7  values   O, one or two blocks behind; writes the result of a sequence while the next
//                       one's blocks are computed
//   warp 8     loader   TMA: pages, panel by panel, through a ring of panels; runs ahead across
//                       sequences
//   warp 9     queries  a sequence's Q, ahead of its blocks
//   warp 10    bookkeeper: tells the combine what to merge
//
// Every hand-over is an mbarrier with one that gives back. The reference m moves only where a row's
// maximum has grown by more than a factor of 2^8, so that O is rarely rescaled. Exact after the
// final division.
#pragma once

#include <cmath>

#include "sm90/attention/common.cuh"
#include "sm90/attention/few_rows.cuh"

namespace flashmla::sm90::narrow {

inline constexpr int kGroupThreads = 128;  // of the warps that do scores, or values
inline constexpr int kThreads = 3 * kGroupThreads;
// Registers of a thread. All start with 168, and those that do scores stay there.
inline constexpr int kValueRegisters = 240, kLoaderRegisters = 96;

inline constexpr int kSequenceCost = 1;  // blocks
inline constexpr int kLeastBlocks = 1;

template <int kRows>
struct SharedMemory {
  static constexpr int kQueries = kRows == 16 ? 2 : 1;  // buffers for Q
  static constexpr int kSlots = kRows == 16 ? 18 : 22;  // panels in the ring
  static constexpr int kPanelBytesQ = kRows * kPanel * 2;

  alignas(1024) uint8_t k[kSlots][kPanelBytes];
  alignas(1024) uint8_t q[kQueries][kPanels * kPanelBytesQ];
  alignas(1024) uint8_t p[2][kRows * kPageSize * 2];
  float alpha[2][kRows];                 // with each P: what O has to be multiplied with before
  alignas(16) float peaks[2][kRows][4];  // of alternate blocks, each warp's
  float reference[2][kRows];    // of alternate sequences, when all of their blocks are done,
  float warp_sum[2][4][kRows];  // and their weights' sums
  uint64_t full[kSlots], empty[kSlots];
  uint64_t query_ready[kQueries], query_free[kQueries];
  uint64_t p_ready[2], p_free[2];
  uint64_t sums_ready[2], sums_free[2];
  int query_row[kRows];    // per row of the tile, its place among a sequence's query rows,
  int query_token[kRows];  // and its token
};

struct Maps {
  CUtensorMap panel;    // the page pool in boxes of a panel of a page
  CUtensorMap queries;  // the queries in boxes of a panel of a tile
};

// The panels of a block follow each other in the ring: those of V, then RoPE.
template <int kRows>
__device__ inline void LoadPages(const DenseDecodeParams& p, const CUtensorMap& map,
                                 const RowTile& tile, const Range& range,
                                 SharedMemory<kRows>& shared) {
  Ring<SharedMemory<kRows>::kSlots> ring;
  Pages pages(p, tile, range);
  for (int page; pages.Next(&page);) {
    if (threadIdx.x % 32 != 0) continue;
    const int first_token = FirstToken(p, page);
#pragma unroll 1
    for (int panel = 0; panel < kPanels; ++panel) {
      uint64_t* full = &shared.full[ring.slot];
      ptx::MbarrierWait(&shared.empty[ring.slot], ring.parity ^ 1);
      ptx::MbarrierArriveExpectTx(full, kPanelBytes);
      ptx::TmaLoad4D(shared.k[ring.slot], &map, full, 0, first_token, panel, tile.kv_head);
      ring.Advance();
    }
  }
}

// The query rows of a sequence, panel by panel; those that do not exist stay as they are.
template <int kRows>
__device__ inline void LoadQueries(const DenseDecodeParams& p, const CUtensorMap& map,
                                   const RowTile& tile, const Range& range,
                                   SharedMemory<kRows>& shared) {
  Ring<SharedMemory<kRows>::kQueries> ring;
  Segments segments(p, tile, range);
  for (Segment s; segments.Next(&s);) {
    uint64_t* ready = &shared.query_ready[ring.slot];
    ptx::MbarrierWait(&shared.query_free[ring.slot], ring.parity ^ 1);
    ptx::MbarrierArriveExpectTx(ready, tile.count * kHeadDim * 2);
#pragma unroll 1
    for (int panel = 0; panel < kPanels; ++panel) {
      ptx::TmaLoad5D(shared.q[ring.slot] + panel * SharedMemory<kRows>::kPanelBytesQ, &map, ready,
                     0, 0, s.batch * static_cast<int>(p.s_q), panel, tile.kv_head);
    }
    ring.Advance();
  }
}

// S and P of block after block.
template <typename T, int kRows>
class Scores : FewRows<kRows> {
 public:
  __device__ Scores(const DenseDecodeParams& p, const RowTile& tile, SharedMemory<kRows>& shared)
      : p_(p),
        tile_(tile),
        shared_(shared),
        scale_(p.softmax_scale * static_cast<float>(M_LOG2E)),
        k_operand_(ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared.k))),
        q_operand_(ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared.q))) {}

  __device__ __forceinline__ void Run(const Range& range) {
    Ring<SharedMemory<kRows>::kQueries> query;
    Ring<2> sums;
    Segments segments(p_, tile_, range);
    for (Segment s; segments.Next(&s);) {
      length_ = s.length;
      lowest_limit_ = tile_.limit(p_, s.length, shared_.query_token[0]);
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        limit_[c] = tile_.limit(p_, s.length, shared_.query_token[column(c)]);
        reference_[c] = -INFINITY;
        sum_[c] = 0;
      }
      ptx::MbarrierWait(&shared_.query_ready[query.slot], query.parity);
      for (int i = 0; i < s.visible; ++i) Block(query.slot, (s.first_block + i) * kPageSize);
      ptx::MbarrierArrive(&shared_.query_free[query.slot]);
      query.Advance();
      Finish(sums);
      sums.Advance();
    }
  }

 private:
  using Rows = FewRows<kRows>;
  using Rows::column, Rows::element, Rows::kColumns, Rows::lane, Rows::own_column, Rows::row,
      Rows::warp;

  __device__ __forceinline__ void Block(int query, int first_token) {
    const Ring<SharedMemory<kRows>::kSlots> block = ring_;
    const uint64_t q = ptx::Advance(q_operand_, query * sizeof(shared_.q[0]));
    int rope = 0;
    ptx::MbarrierWait(&shared_.full[ring_.slot], ring_.parity);
    ptx::WgmmaFence();
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      if (panel > 0) ptx::MbarrierWait(&shared_.full[ring_.slot], ring_.parity);
      const uint64_t k = ptx::Advance(k_operand_, ring_.slot * kPanelBytes);
#pragma unroll
      for (int step = 0; step < kPanel / 16; ++step) {
        const uint32_t offset = panel * SharedMemory<kRows>::kPanelBytesQ + step * 32;
        ptx::WgmmaM64<T, 0>(x_, ptx::Advance(k, step * 32), ptx::Advance(q, offset),
                            panel > 0 || step > 0);
      }
      rope = ring_.slot;  // at last
      ring_.Advance();
    }
    ptx::WgmmaCommit();
    ptx::WgmmaWait<0>();
    __syncwarp();
    if (lane() == 0) ptx::MbarrierArrive(&shared_.empty[rope]);

#pragma unroll
    for (int j = 0; j < kRows / 2; ++j) x_[j] *= scale_;
    const bool partly = lowest_limit_ - first_token < kPageSize;
    if (partly) {
      const int token = first_token + row();
#pragma unroll
      for (int c = 0; c < kColumns; ++c) {
        if (token >= limit_[c]) x_[element(c, 0)] = -INFINITY;
        if (token + 8 >= limit_[c]) x_[element(c, 1)] = -INFINITY;
      }
    }

    // Each row's maximum: over the lanes of a warp that hold it, then over the warps.
    shared_.peaks[p_ring_.slot][own_column()][warp()] = Rows::Highest(x_);
    ptx::NamedBarrierSync(1, kGroupThreads);  // all have their S, too
    if (partly) {
      CleanValues<T>(
          [&](int panel) {
            Ring<SharedMemory<kRows>::kSlots> place = block;
            place.Advance(panel);
            return shared_.k[place.slot];
          },
          lowest_limit_ - first_token, length_ - first_token);
    }
    ptx::MbarrierWait(&shared_.p_free[p_ring_.slot], p_ring_.parity ^ 1);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float4 peaks = *reinterpret_cast<const float4*>(shared_.peaks[p_ring_.slot][column(c)]);
      const float highest = fmaxf(fmaxf(peaks.x, peaks.y), fmaxf(peaks.z, peaks.w));
      const bool grown = highest > reference_[c] + kRescaleThreshold;
      const float updated = grown ? highest : reference_[c];
      const float alpha = grown ? ptx::Exp2(reference_[c] - updated) : 1.f;
      reference_[c] = updated;
      const float subtrahend = updated == -INFINITY ? 0.f : updated;
      float& low = x_[element(c, 0)];
      float& high = x_[element(c, 1)];
      low = ptx::Exp2(low - subtrahend);
      high = ptx::Exp2(high - subtrahend);
      sum_[c] = sum_[c] * alpha + (low + high);
      if (threadIdx.x < 4) shared_.alpha[p_ring_.slot][column(c)] = alpha;
    }
    Rows::template StoreWeights<T>(ptx::SmemAddress(shared_.p[p_ring_.slot]), x_);
    ptx::FenceProxyAsync();
    ptx::MbarrierArrive(&shared_.p_ready[p_ring_.slot]);
    p_ring_.Advance();
  }

  __device__ __forceinline__ void Finish(Ring<2> sums) {
    ptx::MbarrierWait(&shared_.sums_free[sums.slot], sums.parity ^ 1);
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) sum_[c] += __shfl_xor_sync(~0u, sum_[c], step);
      if (lane() < 4) {
        shared_.warp_sum[sums.slot][warp()][column(c)] = sum_[c];
        if (warp() == 0) shared_.reference[sums.slot][column(c)] = reference_[c];
      }
    }
    ptx::MbarrierArrive(&shared_.sums_ready[sums.slot]);
  }

  const DenseDecodeParams& p_;
  const RowTile& tile_;
  SharedMemory<kRows>& shared_;
  const float scale_;
  const uint64_t k_operand_, q_operand_;

  Ring<SharedMemory<kRows>::kSlots> ring_;
  Ring<2> p_ring_;
  // Of the current sequence.
  int length_;
  int limit_[kColumns];  // per query row, the tokens it may see are those before this
  int lowest_limit_;     // the least of the tile
  float reference_[kColumns];
  float sum_[kColumns];  // over this thread's tokens
  // Of the current block.
  float x_[kRows / 2];
};

// O, whose panel j has the latent columns from 64 j on.
template <typename T, int kRows>
class Values : FewRows<kRows> {
 public:
  __device__ Values(const DenseDecodeParams& p, const RowTile& tile, SharedMemory<kRows>& shared)
      : p_(p),
        tile_(tile),
        shared_(shared),
        v_operand_(ptx::Descriptor<ptx::MnMajor<kPanelBytes>>(ptx::SmemAddress(shared.k))),
        p_operand_(ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared.p))) {}

  __device__ __forceinline__ void Run(const Range& range, int partition, int partitions) {
    Ring<2> sums;
    Segments segments(p_, tile_, range);
    for (Segment s; segments.Next(&s);) {
#pragma unroll
      for (int j = 0; j < kPanelsV; ++j) {
#pragma unroll
        for (int i = 0; i < kRows / 2; ++i) o_[j][i] = 0;
      }
      for (int i = 0; i < s.visible; ++i) Block();
      ptx::MbarrierWait(&shared_.sums_ready[sums.slot], sums.parity);
      if (segments.done()) ptx::LetNextKernelStart();
      Finish(s, sums.slot, partition, partitions);
      ptx::MbarrierArrive(&shared_.sums_free[sums.slot]);
      sums.Advance();
    }
  }

 private:
  using Rows = FewRows<kRows>;
  using Rows::column, Rows::kColumns, Rows::lane, Rows::warp;

  __device__ __forceinline__ void Block() {
    ptx::MbarrierWait(&shared_.p_ready[p_ring_.slot], p_ring_.parity);
    Rows::Rescale(o_, shared_.alpha[p_ring_.slot]);
    const uint64_t p = ptx::Advance(p_operand_, p_ring_.slot * sizeof(shared_.p[0]));
    int slots[kPanelsV];
    ptx::WgmmaFence();
#pragma unroll
    for (int j = 0; j < kPanelsV; ++j) {
      slots[j] = ring_.slot;
      const uint64_t v = ptx::Advance(v_operand_, ring_.slot * kPanelBytes);
#pragma unroll
      for (int step = 0; step < kPageSize / 16; ++step) {
        ptx::WgmmaM64<T, 1>(o_[j], ptx::Advance(v, step * 2048), ptx::Advance(p, step * 32), 1);
      }
      if (j % (kPanelsV / 2) == kPanelsV / 2 - 1) ptx::WgmmaCommit();
      ring_.Advance();
    }
    ring_.Advance();  // past the RoPE columns
    ptx::WgmmaWait<1>();
    Release(slots);
    ptx::WgmmaWait<0>();
    Release(slots + kPanelsV / 2);
    if (lane() == 0) ptx::MbarrierArrive(&shared_.p_free[p_ring_.slot]);
    p_ring_.Advance();
  }

  // This warp no longer reads these panels.
  __device__ __forceinline__ void Release(const int* slots) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < kPanelsV / 2; ++i) {
      if (lane() == i) ptx::MbarrierArrive(&shared_.empty[slots[i]]);
    }
  }

  // Writes the result of a sequence, or of the part of it that this range holds.
  __device__ __forceinline__ void Finish(const Segment& s, int sums, int partition,
                                         int partitions) {
    const int partial_row = tile_.partial_row(p_, s, partitions, partition);
    const int64_t first_query = s.batch * p_.s_q * p_.h_q;
    float inverse[kColumns];
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const float total = Total(sums, column(c));
      inverse[c] = total == 0 ? 0.f : ptx::Reciprocal(total);
    }
    const int r = threadIdx.x % kGroupThreads;
    if (r < tile_.count) {
      const float total = Total(sums, r);
      const float lse = total == 0 ? -INFINITY : shared_.reference[sums][r] + ptx::Log2(total);
      if (s.complete()) {
        const int token = shared_.query_token[r];
        const int64_t head = shared_.query_row[r] - token * p_.h_q;
        p_.lse[(s.batch * p_.h_q + head) * p_.s_q + token] = lse * static_cast<float>(M_LN2);
      } else {
        reinterpret_cast<float4*>(p_.partial_stats)[partial_row + r] = {lse, 1, 1, 0};
      }
    }
    if (s.complete()) {
      // Transposed in registers: the thread then holds query row 8 i + lane / 4.
      T* out[kRows / 8];
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
        const int64_t query = first_query + shared_.query_row[8 * i + lane() / 4];
        out[i] = static_cast<T*>(p_.out) + query * kHeadDimV + warp() * 16 + lane() % 4 * 2;
      }
#pragma unroll
      for (int j = 0; j < kPanelsV; ++j) {
#pragma unroll
        for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
          for (int second = 0; second < 2; ++second) {
            const float* o = o_[j] + 4 * i + 2 * second;
            const uint32_t pair =
                ptx::Transpose(Pack(T{}, o[0] * inverse[2 * i], o[1] * inverse[2 * i + 1]));
            if (8 * i + lane() / 4 < tile_.count) {
              *reinterpret_cast<uint32_t*>(out[i] + kPanel * j + 8 * second) = pair;
            }
          }
        }
      }
    } else {
      Rows::WritePartial(p_, partial_row, tile_.count, o_, inverse);
    }
  }

  // The sum of a row's weights over all tokens, always in the same order.
  __device__ __forceinline__ float Total(int sums, int r) const {
    const auto& sum = shared_.warp_sum[sums];
    return (sum[0][r] + sum[1][r]) + (sum[2][r] + sum[3][r]);
  }

  const DenseDecodeParams& p_;
  const RowTile& tile_;
  SharedMemory<kRows>& shared_;
  const uint64_t v_operand_, p_operand_;

  Ring<SharedMemory<kRows>::kSlots> ring_;
  Ring<2> p_ring_;
  float o_[kPanelsV][kRows / 2];
};

// Grid: (row tiles, partitions).
template <typename T, int kRows>
__global__ void __launch_bounds__(kThreads, 1)
    Kernel(const __grid_constant__ DenseDecodeParams p, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) uint8_t raw[];
  using Shared = SharedMemory<kRows>;
  static_assert(sizeof(Shared) <= kMaxSharedBytes);
  Shared& shared = *reinterpret_cast<Shared*>(raw);
  // One thread of a warp for some of the barriers: of many, it would be one after the other, too,
  // but with a fence for each.
  if (threadIdx.x == 0) {
    if (ptx::SmemAddress(raw) % 1024 != 0) __trap();  // swizzled tiles need it
    for (uint64_t& barrier : shared.full) {
      ptx::MbarrierInit(&barrier, 1);
    }
    ptx::FenceMbarrierInit();
  } else if (threadIdx.x == 32) {
    for (uint64_t& barrier : shared.empty) ptx::MbarrierInit(&barrier, kGroupThreads / 32);
    ptx::FenceMbarrierInit();
  } else if (threadIdx.x == 64) {
    ptx::PrefetchTensorMap(&maps.panel);
    ptx::PrefetchTensorMap(&maps.queries);
    // Those that hand over numbers count the threads that wrote them: racecheck follows that.
    for (int i = 0; i < Shared::kQueries; ++i) {
      ptx::MbarrierInit(&shared.query_ready[i], 1);
      ptx::MbarrierInit(&shared.query_free[i], kGroupThreads);
    }
    for (int i = 0; i < 2; ++i) {
      ptx::MbarrierInit(&shared.p_ready[i], kGroupThreads);
      ptx::MbarrierInit(&shared.p_free[i], kGroupThreads / 32);
      ptx::MbarrierInit(&shared.sums_ready[i], kGroupThreads);
      ptx::MbarrierInit(&shared.sums_free[i], kGroupThreads);
    }
    ptx::FenceMbarrierInit();
  }
  const RowTile tile(p, blockIdx.x);
  if (threadIdx.x >= kThreads - kRows) {
    const int i = threadIdx.x - (kThreads - kRows);
    const int r = min(i, tile.count - 1);
    shared.query_token[i] = tile.token(r);
    shared.query_row[i] = tile.token(r) * static_cast<int>(p.h_q) + tile.head(r);
  }
  // Query rows that do not exist.
  const int missing = kRows - tile.count;
  for (int i = threadIdx.x; i < Shared::kQueries * kPanels * missing * 8; i += kThreads) {
    const int panel = i / 8 / missing, r = tile.count + i / 8 % missing;
    reinterpret_cast<uint4*>(shared.q)[(panel * kRows + r) * 8 + i % 8] = uint4{0, 0, 0, 0};
  }
  if (missing > 0) ptx::FenceProxyAsync();
  FetchParams(p);
  PrefetchInputs(p);
  ptx::WaitForPreviousKernel();
  const Range range = FindRange(p, blockIdx.y, ptx::GridY(), kSequenceCost, kLeastBlocks);
  __syncthreads();  // barriers and row numbers are there; those who made them were the last
  const int role = __shfl_sync(~0u, threadIdx.x / kGroupThreads, 0);
  if (role == 0) {
    Scores<T, kRows>(p, tile, shared).Run(range);
  } else if (role == 1) {
    ptx::IncreaseRegisters<kValueRegisters>();
    Values<T, kRows>(p, tile, shared).Run(range, blockIdx.y, ptx::GridY());
  } else {
    ptx::DecreaseRegisters<kLoaderRegisters>();
    const int warp = threadIdx.x / 32 - 2 * kGroupThreads / 32;
    if (warp == 0) {
      LoadPages<kRows>(p, maps.panel, tile, range, shared);
    } else if (warp == 1 && threadIdx.x % 32 == 0) {
      LoadQueries<kRows>(p, maps.queries, tile, range, shared);
    } else if (warp == 2 && threadIdx.x % 32 == 0 && blockIdx.x == 0 && ptx::GridY() > 1 &&
               !p.batch_invariant) {
      RecordMerges(p, tile, range, blockIdx.y, ptx::GridY());
    }
  }
}

}  // namespace flashmla::sm90::narrow
