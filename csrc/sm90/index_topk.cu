// The lightning indexer over paged keys: scores of all cached tokens, and the tokens of the
// highest.
//
// Scores are bound by reading keys. A warp has 16 tokens of a page: its lanes read their part of
// the keys right into the registers that wgmma takes its first operand from, a page ahead; Q, the
// index heads, is the second one, in shared memory:
//
//   S[64 tokens x 64 heads] = K[64 x 128] Q[64 x 128]^T     8 steps of m64n64k16
//   score[64 tokens]        = sum over heads of weight * max(S, 0)
//
// The four lanes that have a row of K have two pairs of numbers each of every sixteen; a lane reads
// 16 bytes in one piece, so Q's columns are permuted likewise when they are written to shared
// memory. FP8 keys become half precision, which takes one instruction for two of them; Q then is
// half precision, too, each head in a unit in which it fits, and weights take the units out.
//
// The pages of all sequences are one line, of which all thread blocks have pieces of the same
// length.
//
// The choice is by radix: four passes over a query's scores find the lowest one that is chosen,
// and how many of those that are equal to it are, then positions are written in their order. A
// cluster has a query: its blocks have parts of the scores, which are in the L2 cache, and add up
// what they count.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <type_traits>

#include "sm90/attention/common.cuh"
#include "sm90/attention/launch.cuh"
#include "sm90/kernels.h"
#include "sm90/ptx.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kDim = kIndexHeadDim;
constexpr int kHeads = 64;  // at once
constexpr int kSteps = kDim / 16;
constexpr int kPanel = 64;  // columns of Q that lie together
constexpr int kPanelBytes = kHeads * kPanel * 2;
constexpr int kGroupBytes = kDim / kPanel * kPanelBytes;  // of 64 heads of a query token
constexpr int kScoreThreads = 128;
constexpr int kScoreWarps = kScoreThreads / 32;
constexpr int kMostTokens = 4;  // query tokens of a thread block: a key is read once for all
constexpr int kGroupShared = kGroupBytes + kHeads * 4;  // with the weights
template <bool kFp8>
constexpr int kBlocks = kFp8 ? 4 : 3;  // on a multiprocessor, by their registers

static_assert(kPageSize == 64 && kDim == 128);
static_assert(kMaxIndexHeads <= kMostTokens * kHeads);  // a token's groups have room, too

struct ScoreShape {
  int tokens;  // query tokens of a tile, which are scored together
  int tiles;   // in a sequence
  int groups;  // of 64 heads
};

// 0 and -0 are the same, and NaN, to which the GPU gives a positive sign, is higher than all. 0 is
// no score: it fills the end.
__device__ __forceinline__ uint32_t Ordered(float x) {
  const uint32_t bits = x == 0 ? 0 : __float_as_uint(x);
  return max(bits ^ (bits >> 31 != 0 ? ~0u : 1u << 31), 1u);
}

// Not fmaxf, to which NaN is nothing.
__device__ __forceinline__ float Positive(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

// A lane's part of the keys of a page: of two tokens, so many pieces of 16 bytes.
template <bool kFp8>
struct Keys {
  static constexpr int kBytes = kFp8 ? kIndexFp8Bytes : kDim * 2;  // of a token
  static constexpr int kPieces = kDim * (kFp8 ? 1 : 2) / 64;

  uint4 pieces[2][kPieces];
  float scales[2];

  __device__ __forceinline__ void Load(const uint8_t* page) {
    const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint8_t* token = page + (row + 8 * i) * kBytes;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        pieces[i][p] = ptx::Load16(token + 64 * p + lane % 4 * 16);
      }
      scales[i] = kFp8 ? __uint_as_float(ptx::Load4(token + kDim)) : 1.f;
    }
  }

  // wgmma's first operand.
  __device__ __forceinline__ void ToFragments(uint32_t (&a)[kSteps][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 piece = pieces[i][step * kPieces / kSteps];
        const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
        if constexpr (kFp8) {
          ptx::FromE4m3(words[step % 4], a[step][i], a[step][i + 2]);
        } else {
          a[step][i] = words[step % 2 * 2];
          a[step][i + 2] = words[step % 2 * 2 + 1];
        }
      }
    }
  }

  // Shared memory has pieces of four pairs of Q's columns, one for each of the lanes that have a
  // row of K: the first and the second pairs of step 0, those of step 1 and so on. Of which pair of
  // columns a lane's are:
  static __device__ __forceinline__ int Pair(int piece, int lane) {
    return kFp8 ? piece / 8 * 32 + lane * 8 + piece % 8 : piece / 4 * 16 + lane * 4 + piece % 4;
  }
};

// Two of Q's numbers, as wgmma takes them with keys of this kind.
template <bool kFp8>
__device__ __forceinline__ uint32_t Converted(__half, uint32_t pair, float) {
  return pair;
}
template <bool kFp8>
__device__ __forceinline__ uint32_t Converted(__nv_bfloat16, uint32_t pair, float factor) {
  if constexpr (!kFp8) return pair;
  const __half2 x = __floats2half2_rn(__uint_as_float(pair << 16) * factor,
                                      __uint_as_float(pair & 0xFFFF0000) * factor);
  return reinterpret_cast<const uint32_t&>(x);
}

// The exponent of a unit in which the pairs of four lanes together fit half precision, by the
// largest finite number of them.
__device__ __forceinline__ int UnitOf(const uint32_t (&pairs)[16]) {
  int top = 0;  // biased
#pragma unroll
  for (const uint32_t pair : pairs) {
    const int low = pair >> 7 & 0xFF, high = pair >> 23 & 0xFF;
    top = max(top, max(low < 0xFF ? low : 0, high < 0xFF ? high : 0));
  }
  top = max(top, __shfl_xor_sync(~0u, top, 1));
  top = max(top, __shfl_xor_sync(~0u, top, 2));
  return max(top - 127 - 14, -60);
}

// The pages that a tile's query tokens see.
__device__ __forceinline__ int PagesOf(const IndexTopkParams& p, const ScoreShape& shape,
                                       int tile) {
  const int64_t sequence = tile / shape.tiles;
  const int first = tile % shape.tiles * shape.tokens;
  const int end = min(first + shape.tokens, static_cast<int>(p.s));
  int most = 0;
  for (int i = first; i < end; ++i) most = max(most, p.num_visible[sequence * p.s + i]);
  // If all visible tokens are chosen, no scores are needed.
  if (most <= p.topk) return 0;
  const int width = static_cast<int>(p.max_pages_per_seq);
  return (min(most, width * kPageSize) + kPageSize - 1) / kPageSize;
}

// Grid: any number of blocks.
template <typename T, bool kFp8>
__global__ void __launch_bounds__(kScoreThreads, kBlocks<kFp8>)
    ScoreKernel(const __grid_constant__ IndexTopkParams p, const ScoreShape shape) {
  extern __shared__ __align__(1024) uint8_t q_shared[];
  __shared__ int sums[kScoreWarps];
  __shared__ int begin[2];  // of the block's piece: a tile and a page
  using Own = Keys<kFp8>;
  using Operand = std::conditional_t<kFp8, __half, T>;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int heads = static_cast<int>(p.heads), padded = shape.groups * kHeads;
  const int64_t width = p.max_pages_per_seq, stride = width * kPageSize;
  ptx::WaitForPreviousKernel();

  // Where the block's piece is in the line of all tiles' pages.
  const int tiles = static_cast<int>(p.batch) * shape.tiles;
  const int each = (tiles + kScoreThreads - 1) / kScoreThreads;
  int own = 0;
  for (int i = 0; i < each; ++i) {
    const int tile = thread * each + i;
    if (tile < tiles) own += PagesOf(p, shape, tile);
  }
  int before = own;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, before, step);
    if (lane >= step) before += other;
  }
  if (lane == 31) sums[warp] = before;
  __syncthreads();
  int all = 0;
#pragma unroll
  for (int i = 0; i < kScoreWarps; ++i) {
    if (i < warp) before += sums[i];
    all += sums[i];
  }
  before -= own;
  const int block = blockIdx.x, blocks = gridDim.x, share = all / blocks, rest = all % blocks;
  const int first = block * share + min(block, rest);
  int left = share + (block < rest);
  if (left == 0) return;
  if (before <= first && first < before + own) {
    int tile = thread * each, page = first - before;
    for (int pages; page >= (pages = PagesOf(p, shape, tile)); page -= pages) ++tile;
    begin[0] = tile, begin[1] = page;
  }
  __syncthreads();

  float* weights = reinterpret_cast<float*>(q_shared + shape.tokens * shape.groups * kGroupBytes);
  const uint64_t operand = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(q_shared));
#pragma unroll 1
  for (int tile = begin[0], first_page = begin[1]; left > 0; ++tile, first_page = 0) {
    const int pages = min(left, PagesOf(p, shape, tile) - first_page);
    if (pages <= 0) continue;
    left -= pages;
    const int64_t sequence = tile / shape.tiles;
    const int first_token = tile % shape.tiles * shape.tokens;
    const int tokens = min(shape.tokens, static_cast<int>(p.s) - first_token);
    const int64_t first_row = sequence * p.s + first_token;
    const int32_t* entries = p.block_table + sequence * width + first_page;
    // Entries outside the pool are those of its first or last page.
    const auto page = [&](int entry) {
      return static_cast<const uint8_t*>(p.index_pages) +
             int64_t{max(0, min(entry, static_cast<int>(p.num_pages) - 1))} *
                 (kPageSize * Own::kBytes);
    };
    Own next;
    next.Load(page(entries[0]));
    int entry = entries[min(1, pages - 1)];  // of the page after that

    // Heads that do not exist are zeros, and their weights. Four lanes have a head.
#pragma unroll 1
    for (int i = thread / 4; i < tokens * padded; i += kScoreThreads / 4) {
      const int token = i / padded, head = i % padded;
      const int64_t row = (first_row + token) * heads + head;
      uint32_t pairs[16];
#pragma unroll
      for (int j = 0; j < 16; ++j) {
        const int pair = Own::Pair(j / 4 * 4 + lane % 4, j % 4);
        pairs[j] = head < heads
                       ? ptx::Load4(static_cast<const uint32_t*>(p.q) + row * (kDim / 2) + pair)
                       : 0;
      }
      const bool scaled = kFp8 && std::is_same_v<T, __nv_bfloat16>;
      const int unit = scaled ? UnitOf(pairs) : 0;
      const uint32_t to = ptx::SmemAddress(q_shared) +
                          (token * shape.groups + head / kHeads) * kGroupBytes +
                          head % kHeads * 128;
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        uint32_t x[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          x[k] = Converted<kFp8>(T{}, pairs[4 * j + k], ptx::PowerOfTwo(-unit));
        }
        const int piece = 4 * j + lane % 4;
        ptx::StoreShared16(to + piece / 8 * kPanelBytes + ((piece % 8 ^ head % 8) << 4),
                           {x[0], x[1], x[2], x[3]});
      }
      if (lane % 4 == 0) {
        weights[i] = head < heads ? p.weights[row] * ptx::PowerOfTwo(unit) : 0.f;
      }
    }
    ptx::FenceProxyAsync();
    __syncthreads();

    uint32_t* scores =
        p.scores + first_row * stride + int64_t{first_page} * kPageSize + warp * 16 + lane / 4;
#pragma unroll 1
    for (int i = 0; i < pages; ++i) {
      uint32_t a[kSteps][4];
      next.ToFragments(a);
      const float scales[2] = {next.scales[0], next.scales[1]};
      if (i + 1 < pages) {
        next.Load(page(entry));
        entry = entries[min(i + 2, pages - 1)];
      }
#pragma unroll 1
      for (int token = 0; token < tokens; ++token) {
        float score[2] = {0, 0};
#pragma unroll 1
        for (int group = 0; group < shape.groups; ++group) {
          const int at = token * shape.groups + group;
          const uint64_t heads_of = ptx::Advance(operand, ptx::Uniform(at) * kGroupBytes);
          float s[kHeads / 2];
          ptx::WgmmaFence();
#pragma unroll
          for (int step = 0; step < kSteps; ++step) {
            const uint32_t offset = step / 4 * kPanelBytes + step % 4 * 32;
            ptx::WgmmaM64N64<Operand>(s, a[step], ptx::Advance(heads_of, offset), step > 0);
          }
          ptx::WgmmaCommit();
          ptx::WgmmaWait<0>();
          const float* of_lane = weights + at * kHeads + lane % 4 * 2;
#pragma unroll
          for (int j = 0; j < kHeads / 8; ++j) {
            const float2 weight = *reinterpret_cast<const float2*>(of_lane + 8 * j);
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              score[r] += Positive(s[4 * j + 2 * r]) * weight.x;
              score[r] += Positive(s[4 * j + 2 * r + 1]) * weight.y;
            }
          }
        }
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          score[r] += __shfl_xor_sync(~0u, score[r], 1);
          score[r] += __shfl_xor_sync(~0u, score[r], 2);
          if (kFp8) score[r] *= scales[r];
          if (lane % 4 == r) scores[token * stride + i * kPageSize + 8 * r] = Ordered(score[r]);
        }
      }
    }
    __syncthreads();  // before Q is another one's
  }
}

constexpr int kChoiceThreads = 1024;
constexpr int kChoiceWarps = kChoiceThreads / 32;
constexpr int kMostParts = 8;  // blocks of a cluster
constexpr int kPasses = 4;     // each for a byte of a score
constexpr int kBins = 256;
constexpr int kTurn = 128;  // scores that a warp reads with one instruction
constexpr int kTurnBytes = kChoiceWarps * kTurn * 4;
constexpr int kMostTurns = 12;  // so many of them are kept in shared memory

// Turns that each warp makes for `n` scores.
__host__ __device__ constexpr int TurnsOf(int64_t n, int parts) {
  const int64_t at_once = parts * kChoiceWarps * kTurn;
  return static_cast<int>((n + at_once - 1) / at_once);
}

// The sum of `counts`, up to 4, of the lanes before this one; and of all lanes.
__device__ __forceinline__ int BeforeInWarp(int count, int* all) {
  const uint32_t before = (1u << threadIdx.x % 32) - 1;
  int sum = 0;
#pragma unroll
  for (int bit = 0; bit < 3; ++bit) {
    sum += __popc(__ballot_sync(~0u, count >> bit & 1) & before) << bit;
  }
  *all = __shfl_sync(~0u, sum + count, 31);
  return sum;
}

// Grid: clusters of `parts` blocks, for the query tokens of all sequences.
__global__ void __launch_bounds__(kChoiceThreads)
    ChooseKernel(const __grid_constant__ IndexTopkParams p, const int parts) {
  extern __shared__ uint4 kept[];  // [turns][kChoiceThreads], each thread's own
  __shared__ int bins[kPasses][kBins];
  __shared__ int sums[kBins / 32];
  __shared__ int found[2];                 // a bin, and how many of it are chosen
  __shared__ int2 of_warps[kChoiceWarps];  // scores that are higher, and that are equal
  __shared__ int2 of_parts[kMostParts];
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t query = blockIdx.x / parts;
  const int part = static_cast<int>(blockIdx.x % parts);
  ptx::WaitForPreviousKernel();
  const int64_t stride = p.max_pages_per_seq * kPageSize;
  const int topk = static_cast<int>(p.topk);
  const int n = static_cast<int>(min(int64_t{max(p.num_visible[query], 0)}, stride));
  int32_t* out = p.positions + query * topk;
  if (n <= topk) {
    for (int i = part * kChoiceThreads + thread; i < topk; i += parts * kChoiceThreads) {
      out[i] = i < n ? i : -1;
    }
    return;
  }

  // A warp has a piece of the scores. Those behind the last one are 0, and never chosen.
  const int turns = ptx::Uniform(TurnsOf(n, parts));
  const int begin = (part * kChoiceWarps + warp) * turns * kTurn + lane * 4;
  const uint32_t* scores = p.scores + query * stride + begin;
  const int own = n - begin;  // may be less than none
  const auto exist = [&](int turn) { return max(0, min(own - turn * kTurn, 4)); };
  const auto address = [&](int turn) { return exist(turn) > 0 ? scores + turn * kTurn : p.scores; };
  const int known = min(turns, kMostTurns);
#pragma unroll 1
  for (int turn = 0; turn < known; ++turn) {
    ptx::CpAsyncUpTo16(ptx::SmemAddress(&kept[turn * kChoiceThreads + thread]), address(turn),
                       4 * exist(turn));
  }
  // All threads of the cluster.
  const auto sync = [&] {
    if (parts == 1) {
      __syncthreads();
    } else {
      ptx::ClusterSync();
    }
  };
  // Calls `take` with four scores, and the position of the first one.
  const auto each = [&](auto&& take) {
#pragma unroll 1
    for (int turn = 0; turn < turns; ++turn) {
      uint4 v;
      if (turn < known) {
        v = kept[turn * kChoiceThreads + thread];
      } else {
        v = __ldcg(reinterpret_cast<const uint4*>(address(turn)));
        const int e = exist(turn);
        v = {e > 0 ? v.x : 0, e > 1 ? v.y : 0, e > 2 ? v.z : 0, e > 3 ? v.w : 0};
      }
      take({v.x, v.y, v.z, v.w}, begin + turn * kTurn);
    }
  };

  // The lowest score that is chosen, byte by byte: its leading bits, `mask`, are known, and
  // `wanted` are to be found among those that begin so.
  static_assert(kPasses * kBins == kChoiceThreads && kChoiceWarps == 32);
  bins[0][thread] = 0;
  ptx::CpAsyncWaitAll();
  __syncthreads();
  uint32_t lowest = 0, mask = 0;
  int wanted = topk;
#pragma unroll 1
  for (int pass = 0; pass < kPasses; ++pass) {
    const int byte = kPasses - 1 - pass;
    const uint32_t own_bins = ptx::SmemAddress(bins[pass]);
    each([&](const uint32_t (&x)[4], int) {
#pragma unroll
      for (const uint32_t score : x) {
        ptx::CountIf(((score ^ lowest) & mask) == 0,
                     own_bins + 4 * __byte_perm(score, 0, 0x4440 | byte));
      }
    });
    sync();
    // From the highest bin down.
    int count = 0, up_to = 0;
    if (thread < kBins) {
      const int* bin = &bins[pass][kBins - 1 - thread];
#pragma unroll
      for (int i = 0; i < kMostParts; ++i) {
        if (i < parts) count += ptx::LoadCluster(bin, i);
      }
      up_to = count;
#pragma unroll
      for (int step = 1; step < 32; step *= 2) {
        const int other = __shfl_up_sync(~0u, up_to, step);
        if (lane >= step) up_to += other;
      }
      if (lane == 31) sums[warp] = up_to;
    }
    __syncthreads();
    if (thread < kBins) {
#pragma unroll
      for (int i = 0; i < kBins / 32; ++i) {
        if (i < warp) up_to += sums[i];
      }
      if (up_to - count < wanted && wanted <= up_to) {
        found[0] = kBins - 1 - thread;
        found[1] = wanted - (up_to - count);
      }
    }
    __syncthreads();
    lowest |= static_cast<uint32_t>(found[0]) << 8 * byte;
    mask |= 0xFFu << 8 * byte;
    wanted = found[1];
  }

  // All that are higher, and the first of those that are as high. Of either, how many are before
  // those of this warp:
  int2 count{};
  each([&](const uint32_t (&x)[4], int) {
#pragma unroll
    for (const uint32_t score : x) {
      count.x += score > lowest;
      count.y += score == lowest;
    }
  });
  count = {__reduce_add_sync(~0u, count.x), __reduce_add_sync(~0u, count.y)};
  if (lane == 0) of_warps[warp] = count;
  __syncthreads();
  if (warp == 0) {
    const int2 of_warp = of_warps[lane];
    const int higher = __reduce_add_sync(~0u, of_warp.x), equal = __reduce_add_sync(~0u, of_warp.y);
    if (lane < parts) {
      ptx::StoreCluster(&of_parts[part].x, lane, higher);
      ptx::StoreCluster(&of_parts[part].y, lane, equal);
    }
  }
  sync();
  const int2 of_warp = lane < warp ? of_warps[lane] : int2{};
  const int2 of_part = lane < part ? of_parts[lane] : int2{};
  int higher = __reduce_add_sync(~0u, of_warp.x + of_part.x);
  int equal = __reduce_add_sync(~0u, of_warp.y + of_part.y);

  each([&](const uint32_t (&x)[4], int position) {
    int own_higher = 0, own_equal = 0, all;
#pragma unroll
    for (const uint32_t score : x) {
      own_higher += score > lowest;
      own_equal += score == lowest;
    }
    int32_t* to = out + higher + BeforeInWarp(own_higher, &all);
    higher += all;
    int e = equal;
    if (__any_sync(~0u, own_equal)) {
      e += BeforeInWarp(own_equal, &all);
      equal += all;
    }
    to += min(e, wanted);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (x[i] > lowest || (x[i] == lowest && e++ < wanted)) *to++ = position + i;
    }
  });
}

template <typename T, bool kFp8>
Status LaunchScores(const IndexTopkParams& p, int multiprocessors, cudaStream_t stream) {
  ScoreShape shape{};
  shape.groups = static_cast<int>((p.heads + kHeads - 1) / kHeads);
  const int64_t room = std::max<int64_t>(kMostTokens / shape.groups, 1);
  shape.tokens = static_cast<int>(std::min(room, p.s));
  shape.tiles = static_cast<int>((p.s + shape.tokens - 1) / shape.tokens);
  const int64_t pages = p.batch * shape.tiles * p.max_pages_per_seq;
  if (pages > INT32_MAX) return {StatusCode::kInvalidArgument, "block_table is too large"};
  const int bytes = shape.tokens * shape.groups * kGroupShared;
  const int64_t blocks = std::min(kBlocks<kFp8>, kMaxSharedBytes / (bytes + 1024 + 32));
  const dim3 grid(static_cast<unsigned>(std::min(blocks * multiprocessors, pages)));
  return Launch(ScoreKernel<T, kFp8>, grid, kScoreThreads, {bytes, kMostTokens * kGroupShared}, 1,
                stream, p, shape);
}

Status LaunchChoice(const IndexTopkParams& p, int multiprocessors, cudaStream_t stream) {
  const int64_t queries = p.batch * p.s;
  const int64_t scores = p.max_pages_per_seq * kPageSize;  // of a query
  // As many blocks for a query as there is room for; but each has to have something to do.
  int parts = 1;
  while (parts < kMostParts && queries * parts * 2 <= multiprocessors &&
         scores > parts * kChoiceThreads * 8) {
    parts *= 2;
  }
  const dim3 grid(static_cast<unsigned>(queries * parts));
  const int bytes = std::min(TurnsOf(scores, parts), kMostTurns) * kTurnBytes;
  return Launch(ChooseKernel, grid, kChoiceThreads, {bytes, kMostTurns * kTurnBytes}, parts, stream,
                p, parts);
}

}  // namespace

Status IndexTopk(const IndexTopkParams& p, cudaStream_t stream) {
  const int64_t queries = p.batch * p.s;
  if (queries == 0 || p.topk == 0) return {};
  int multiprocessors = 0;
  Status status = FindDevice(&multiprocessors);
  if (!status.ok()) return status;
  if (queries > INT32_MAX || p.max_pages_per_seq > (1 << 30) / kPageSize ||
      p.num_pages > INT32_MAX) {
    return {StatusCode::kInvalidArgument, "too many query tokens or pages"};
  }
  if (p.max_pages_per_seq * kPageSize > p.topk) {
    if (p.dtype == DType::kBF16) {
      status = p.fp8 ? LaunchScores<__nv_bfloat16, true>(p, multiprocessors, stream)
                     : LaunchScores<__nv_bfloat16, false>(p, multiprocessors, stream);
    } else {
      status = p.fp8 ? LaunchScores<__half, true>(p, multiprocessors, stream)
                     : LaunchScores<__half, false>(p, multiprocessors, stream);
    }
    if (!status.ok()) return status;
  }
  return LaunchChoice(p, multiprocessors, stream);
}

}  // namespace flashmla::sm90
