// Dense MLA decoding on Hopper.
//
// A thread block owns one tile of 64 query rows (tokens times heads that share a KV head) and a
// range of KV blocks (see schedule.cuh). Per KV block of 64 tokens, one page:
//
//   S[64 x 64]  = Q[64 x 576] K[64 x 576]^T       each consumer takes 32 of the 64 tokens
//   P           = exp2(S - m)                     halves exchanged through shared memory
//   O[64 x 512] = O * alpha + P[64 x 64] V        each consumer takes 256 of the 512 columns
//
// V is the first 512 columns of K, read from the same shared-memory tile.
//
//   warp 8     producer     TMA: one box a page (9 panels of 64 columns, 72 KB) into a ring of 2,
//                           running ahead across sequences
//   warp 9     bookkeeper   tells the combine which sequences are split (warps 10 and 11 only
//                           complete the warpgroup that gives its registers away)
//   warps 0-3  consumer 0   S of tokens  0..31, O columns   0..255
//   warps 4-7  consumer 1   S of tokens 32..63, O columns 256..511
//
//   producer   | load 0 | load 1 |............| load 2 |...
//   consumers           | S 0 | max | P | O += P V 0 | S 1 | max | P | O += P V 1 |
//                              ^named barriers^       ^ stage released
//
// The running maximum m is one per row, agreed between the consumers at every block; it moves only
// when a row's maximum has grown by more than 2^8, so that O is rarely rescaled. Exact after the
// final division; P stays below 2^8, within half precision's range.
//
// Shared memory: Q 72 KB, K 2 x 72 KB, P 8 KB, statistics 1 KB. Registers: 232 a consumer thread,
// of which O takes 128; 40 a producer thread.
#pragma once

#include <cmath>
#include <type_traits>

#include "params.h"
#include "sm90/dense_decode/schedule.cuh"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {

inline constexpr int kPanel = 64;                           // columns of a panel
inline constexpr int kPanels = kHeadDim / kPanel;           // 9
inline constexpr int kPanelBytes = kPageSize * kPanel * 2;  // 8 KB
inline constexpr int kTileBytes = kPanels * kPanelBytes;    // 72 KB
inline constexpr int kStages = 2;
inline constexpr int kConsumers = 2;  // warpgroups
inline constexpr int kConsumerThreads = kConsumers * 128;
inline constexpr int kThreads = kConsumerThreads + 128;  // and the producer's
inline constexpr int kConsumerRegisters = 232;
inline constexpr int kProducerRegisters = 40;
inline constexpr int kTokensEach = kPageSize / kConsumers;   // of S, per consumer
inline constexpr int kColumnsEach = kHeadDimV / kConsumers;  // of O, per consumer
inline constexpr float kRescaleThreshold = 8;                // a factor of 2^8
static_assert(kRowTile == 64, "wgmma works on 64 rows");
static_assert(kPanels * kPanel == kHeadDim && kColumnsEach == 256 && kTokensEach == 32);

struct SharedMemory {
  alignas(1024) uint8_t q[kTileBytes];
  alignas(1024) uint8_t k[kStages][kTileBytes];
  alignas(1024) uint8_t p[kPanelBytes];
  float row_max[kConsumers][kRowTile];
  float row_sum[kConsumers][kRowTile];
  uint64_t full[kStages];
  uint64_t empty[kStages];
  int bad_page[kStages];
  ScheduleScratch schedule;
};
// The runtime aligns dynamic shared memory less strictly than swizzled tiles need.
inline constexpr int kSharedBytes = sizeof(SharedMemory) + 1024;
static_assert(kSharedBytes <= 232448, "a thread block can have 227 KB of shared memory");

enum NamedBarrier : int { kQueryReady = 1, kMaximaReady = 2, kProbabilitiesReady = 3, kSums = 4 };

// Position in the ring of stages.
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void Advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

__device__ __forceinline__ uint32_t Pack(__nv_bfloat16, float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}
__device__ __forceinline__ uint32_t Pack(__half, float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  return reinterpret_cast<const uint32_t&>(pair);
}

// --- Producer -------------------------------------------------------------------------------

__device__ inline void Produce(const DenseDecodeParams& p, const CUtensorMap& k_map,
                               const RowTile& tile, const Range& range, SharedMemory& shared) {
  const int lane = threadIdx.x % 32;
  RingPosition ring;
  Segments segments(p, tile, range);
  for (Segment s; segments.Next(&s);) {
    const int32_t* table = p.block_table + s.batch * p.max_pages_per_seq + s.first_block;
    const int64_t entries = p.max_pages_per_seq - s.first_block;
    for (int base = 0; base < s.visible; base += 32) {
      // The warp reads 32 table entries at once; entries that do not exist count as bad pages.
      const int count = min(32, s.visible - base);
      int page = -1;
      if (lane < count && base + lane < entries) page = table[base + lane];
      for (int i = 0; i < count; ++i) {
        const int current = __shfl_sync(~0u, page, i);
        if (lane == 0) {
          ptx::MbarrierWait(&shared.empty[ring.stage], ring.parity ^ 1);
          const bool bad = current < 0 || current >= p.num_pages;
          shared.bad_page[ring.stage] = bad;
          ptx::MbarrierArriveExpectTx(&shared.full[ring.stage], kTileBytes);
          // Out of bounds reads as zero without touching memory.
          const int row = (bad ? static_cast<int>(p.num_pages) : current) * kPageSize;
          ptx::TmaLoad4D(shared.k[ring.stage], &k_map, &shared.full[ring.stage], 0, row, 0,
                         tile.kv_head);
        }
        ring.Advance();
      }
    }
  }
}

// --- Bookkeeper -----------------------------------------------------------------------------

// Tells the combine which partitions share the sequences that start in this range. Entries are
// indexed by sequence or by partition, whichever are fewer; every entry is written.
__device__ inline void RecordSplits(const DenseDecodeParams& p, const RowTile& tile,
                                    const Range& range, int partitions) {
  const int partition = static_cast<int>(blockIdx.x);
  SplitInfo* split_info = reinterpret_cast<SplitInfo*>(p.split_info);
  SplitInfo continued{-1, 0, 0, 0};
  int64_t end = range.start - range.block;
  Segments segments(p, tile, range);
  for (Segment s; segments.Next(&s);) {
    end += s.all_blocks;
    if (s.first_block != 0) continue;
    const int last = static_cast<int>(PartitionBefore(end, range));
    const SplitInfo info{s.batch, partition, last, s.opening ? 0 : 1};
    if (p.batch <= partitions) {
      split_info[s.batch] = info;
    } else if (last > partition) {
      continued = info;
    }
  }
  if (p.batch > partitions) split_info[partition] = continued;
}

// --- Consumers ------------------------------------------------------------------------------

// Copies the tile's query rows to shared memory, 128-byte swizzled; missing rows become zero.
template <typename T>
__device__ __forceinline__ void LoadQuery(const DenseDecodeParams& p, const RowTile& tile,
                                          int batch, uint8_t* destination) {
  constexpr int kChunks = kHeadDim / 8;  // of 16 bytes, per row
  const T* q = static_cast<const T*>(p.q) + batch * p.s_q * p.h_q * kHeadDim;
  const uint32_t base = ptx::SmemAddress(destination);
#pragma unroll 6
  for (int i = threadIdx.x; i < kRowTile * kChunks; i += kConsumerThreads) {
    const int row = i / kChunks, chunk = i % kChunks;
    const bool valid = row < tile.count;
    const int64_t source = valid ? tile.token(p, row) * p.h_q + tile.head(p, row) : 0;
    const uint32_t offset = chunk / 8 * kPanelBytes + row * 128 + (((chunk % 8) ^ (row % 8)) << 4);
    ptx::CpAsync16(base + offset, q + source * kHeadDim + chunk * 8, valid);
  }
}

// Two 16-bit numbers, of which those that are not finite become zero.
template <typename T>
__device__ __forceinline__ uint32_t FiniteOnly(uint32_t pair) {
  constexpr uint32_t kExponent = std::is_same_v<T, __half> ? 0x7C00 : 0x7F80;
  if ((pair & kExponent) == kExponent) pair &= 0xFFFF0000;
  if ((pair >> 16 & kExponent) == kExponent) pair &= 0x0000FFFF;
  return pair;
}

// A weight of zero does not undo a NaN: 0 x NaN is NaN. So among a consumer's 32 tokens, those that
// do not exist lose their values, whatever the page holds there; and those that only some rows of
// the tile may see lose what is not finite in them, which reaches the rows that see it by way of
// their scores. Every row sees the tokens before `seen_by_all`; those from `existing` on do not
// exist.
template <typename T>
__device__ __forceinline__ void CleanValues(uint8_t* tokens, int seen_by_all, int existing) {
  const int thread = threadIdx.x % 128;
  for (int i = max(seen_by_all, 0) * 8 + thread; i < kTokensEach * 8; i += 128) {
    const bool exists = i / 8 < existing;
    for (int panel = 0; panel < kHeadDimV / kPanel; ++panel) {
      uint4& eight = *reinterpret_cast<uint4*>(tokens + panel * kPanelBytes + i * 16);
      uint4 v{0, 0, 0, 0};
      if (exists) {
        v = eight;
        v = {FiniteOnly<T>(v.x), FiniteOnly<T>(v.y), FiniteOnly<T>(v.z), FiniteOnly<T>(v.w)};
      }
      eight = v;
    }
  }
}

template <typename T>
__device__ inline void Consume(const DenseDecodeParams& p, const RowTile& tile, const Range& range,
                               int partitions, SharedMemory& shared) {
  // Said to be uniform, so that addresses stay in uniform registers, where wgmma wants them.
  const int consumer = __shfl_sync(~0u, threadIdx.x / 128, 0);
  const int warp = threadIdx.x / 32 % 4;
  const int lane = threadIdx.x % 32;
  // This thread's accumulator elements: rows row and row + 8, columns 8 j + 2 (lane % 4) + {0, 1}.
  const int row = warp * 16 + lane / 4;
  const int column = lane % 4 * 2;
  const float scale = p.softmax_scale * static_cast<float>(M_LOG2E);

  const uint64_t q_operand = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared.q));
  const uint64_t p_operand = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared.p));
  const uint64_t k_operand =
      ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(shared.k[0]) + consumer * kTokensEach * 128);
  const uint64_t v_operand = ptx::Descriptor<ptx::MnMajor<kPanelBytes>>(
      ptx::SmemAddress(shared.k[0]) + consumer * (kColumnsEach / kPanel) * kPanelBytes);
  const uint32_t p_store = ptx::SmemAddress(shared.p) + (warp * 16 + lane % 16) * 128;

  RingPosition ring;
  Segments segments(p, tile, range);
  for (Segment s; segments.Next(&s);) {
    LoadQuery<T>(p, tile, s.batch, shared.q);

    float o[128];
#pragma unroll
    for (int i = 0; i < 128; ++i) o[i] = 0;
    float running_max[2] = {-INFINITY, -INFINITY};
    float sum[2] = {0, 0};
    const int limit[2] = {tile.limit(p, s.length, row), tile.limit(p, s.length, row + 8)};
    const int lowest_limit = tile.limit(p, s.length, 0);

    ptx::CpAsyncWaitAll();
    ptx::FenceProxyAsync();
    ptx::NamedBarrierSync(kQueryReady, kConsumerThreads);

    for (int i = 0; i < s.visible; ++i) {
      const int first_token = (s.first_block + i) * kPageSize;
      const uint64_t k = ptx::Advance(k_operand, ring.stage * kTileBytes);
      const uint64_t v = ptx::Advance(v_operand, ring.stage * kTileBytes);
      ptx::MbarrierWait(&shared.full[ring.stage], ring.parity);

      // S = Q K^T for this consumer's 32 tokens.
      float x[16];
      ptx::WgmmaFence();
#pragma unroll
      for (int step = 0; step < kHeadDim / 16; ++step) {
        const uint32_t offset = step / 4 * kPanelBytes + step % 4 * 32;
        ptx::WgmmaM64N32<T>(x, ptx::Advance(q_operand, offset), ptx::Advance(k, offset), step > 0);
      }
      ptx::WgmmaCommit();
      ptx::WgmmaWait<0>();

#pragma unroll
      for (int j = 0; j < 16; ++j) x[j] *= scale;
      if (shared.bad_page[ring.stage]) {
#pragma unroll
        for (int j = 0; j < 16; ++j) x[j] = NAN;
      }
      if (first_token + kPageSize > lowest_limit) {
        const int token = first_token + consumer * kTokensEach + column;
#pragma unroll
        for (int j = 0; j < 16; ++j) {
          if (token + j / 4 * 8 + j % 2 >= limit[j / 2 % 2]) x[j] = -INFINITY;
        }
        CleanValues<T>(shared.k[ring.stage] + consumer * kTokensEach * 128,
                       lowest_limit - first_token - consumer * kTokensEach,
                       s.length - first_token - consumer * kTokensEach);
      }

      // The maximum of each row over all 64 tokens.
      float block_max[2] = {-INFINITY, -INFINITY};
#pragma unroll
      for (int j = 0; j < 16; ++j) block_max[j / 2 % 2] = fmaxf(block_max[j / 2 % 2], x[j]);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        block_max[h] = fmaxf(block_max[h], __shfl_xor_sync(~0u, block_max[h], 1));
        block_max[h] = fmaxf(block_max[h], __shfl_xor_sync(~0u, block_max[h], 2));
        if (lane % 4 == 0) shared.row_max[consumer][row + 8 * h] = block_max[h];
      }
      ptx::NamedBarrierSync(kMaximaReady, kConsumerThreads);

      float alpha[2], reference[2];
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float both = fmaxf(block_max[h], shared.row_max[consumer ^ 1][row + 8 * h]);
        const bool grown = both > running_max[h] + kRescaleThreshold;
        const float updated = grown ? both : running_max[h];
        alpha[h] = grown ? ptx::Exp2(running_max[h] - updated) : 1.f;
        running_max[h] = updated;
        reference[h] = updated == -INFINITY ? 0.f : updated;
        sum[h] *= alpha[h];
      }
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        x[j] = ptx::Exp2(x[j] - reference[j / 2 % 2]);
        sum[j / 2 % 2] += x[j];
      }

      // P to shared memory: two 16 x 16 pieces a warp, as wgmma reads its first operand.
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int chunk = consumer * 4 + half * 2 + lane / 16;
        const float* piece = x + half * 8;
        ptx::StMatrix4(p_store + ((chunk ^ (lane % 8)) << 4), Pack(T{}, piece[0], piece[1]),
                       Pack(T{}, piece[2], piece[3]), Pack(T{}, piece[4], piece[5]),
                       Pack(T{}, piece[6], piece[7]));
      }
      ptx::FenceProxyAsync();
      ptx::NamedBarrierSync(kProbabilitiesReady, kConsumerThreads);

      if (__any_sync(~0u, alpha[0] != 1.f || alpha[1] != 1.f)) {
#pragma unroll
        for (int j = 0; j < 128; ++j) o[j] *= alpha[j / 2 % 2];
      }

      // O += P V for this consumer's 256 columns.
      ptx::WgmmaFence();
#pragma unroll
      for (int step = 0; step < kPageSize / 16; ++step) {
        ptx::WgmmaM64N256<T>(o, ptx::Advance(p_operand, step * 32), ptx::Advance(v, step * 2048),
                             1);
      }
      ptx::WgmmaCommit();
      ptx::WgmmaWait<0>();
      if (lane == 0) ptx::MbarrierArrive(&shared.empty[ring.stage]);
      ring.Advance();
    }

    // The sum of each row over all tokens: four lanes, then the other consumer.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
      if (lane % 4 == 0) shared.row_sum[consumer][row + 8 * h] = sum[h];
    }
    ptx::NamedBarrierSync(kSums, kConsumerThreads);
    float inverse[2], lse[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      // In the same order for both consumers, so that both find the same bits.
      const float total = shared.row_sum[0][row + 8 * h] + shared.row_sum[1][row + 8 * h];
      inverse[h] = total == 0 ? 0.f : 1.f / total;
      lse[h] = total == 0 ? -INFINITY : running_max[h] + log2f(total);
    }

    const bool complete = s.complete();
    const int64_t slot =
        PartialSlot(blockIdx.y, partitions, blockIdx.x, s.opening ? 0 : 1) * p.tile_rows();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row + 8 * h;
      if (r >= tile.count) continue;
      if (complete) {
        const int token = tile.token(p, r), head = tile.head(p, r);
        T* out = static_cast<T*>(p.out) + ((s.batch * p.s_q + token) * p.h_q + head) * kHeadDimV +
                 consumer * kColumnsEach;
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          *reinterpret_cast<uint32_t*>(out + 8 * j + column) =
              Pack(T{}, o[4 * j + 2 * h] * inverse[h], o[4 * j + 2 * h + 1] * inverse[h]);
        }
        if (consumer == 0 && lane % 4 == 0) {
          p.lse[(s.batch * p.h_q + head) * p.s_q + token] = lse[h] * static_cast<float>(M_LN2);
        }
      } else {
        float* out = p.partial_out + (slot + r) * kHeadDimV + consumer * kColumnsEach;
#pragma unroll
        for (int j = 0; j < 32; ++j) {
          *reinterpret_cast<float2*>(out + 8 * j + column) =
              float2{o[4 * j + 2 * h] * inverse[h], o[4 * j + 2 * h + 1] * inverse[h]};
        }
        if (consumer == 0 && lane % 4 == 0) p.partial_lse[slot + r] = lse[h];
      }
    }
  }
}

// --- The kernel -----------------------------------------------------------------------------

// Grid: (partitions, row tiles).
template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    DenseDecodeKernel(const __grid_constant__ DenseDecodeParams p,
                      const __grid_constant__ CUtensorMap k_map) {
  extern __shared__ uint8_t raw[];
  SharedMemory& shared = *reinterpret_cast<SharedMemory*>(
      raw + (-ptx::SmemAddress(raw) & (alignof(SharedMemory) - 1)));
  if (threadIdx.x == 0) {
    ptx::PrefetchTensorMap(&k_map);
    for (int i = 0; i < kStages; ++i) {
      ptx::MbarrierInit(&shared.full[i], 1);
      ptx::MbarrierInit(&shared.empty[i], kConsumerThreads / 32);
    }
    ptx::FenceMbarrierInit();
  }
  const RowTile tile(p, blockIdx.y);
  const int partitions = gridDim.x;
  const Range range = FindRange(p, blockIdx.x, partitions, &shared.schedule);
  if (threadIdx.x >= kConsumerThreads) {
    ptx::DecreaseRegisters<kProducerRegisters>();
    const int warp = threadIdx.x / 32 - kConsumerThreads / 32;
    if (warp == 0) {
      Produce(p, k_map, tile, range, shared);
    } else if (warp == 1 && threadIdx.x % 32 == 0 && blockIdx.y == 0 && partitions > 1) {
      RecordSplits(p, tile, range, partitions);
    }
  } else {
    ptx::IncreaseRegisters<kConsumerRegisters>();
    Consume<T>(p, tile, range, partitions, shared);
  }
}

}  // namespace flashmla::sm90
