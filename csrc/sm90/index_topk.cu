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
// memory.
//
// The choice is by radix: three passes over a query's scores find the lowest one that is chosen,
// and how many of those that are equal to it are, then one more writes positions in their order. A
// thread block has a query, and the scores are in the L2 cache.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <climits>
#include <cstdint>
#include <string>

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
constexpr int kMostPages = 32;  // of a thread block
constexpr int kMostTokens = 4;  // query tokens of a thread block: a key is read once for all

static_assert(kPageSize == 64 && kDim == 128);

struct ScoreShape {
  int tokens;  // query tokens of a thread block
  int tiles;   // of so many, in a sequence
  int groups;  // of 64 heads
  int pages;   // of a thread block
};

// 0 and -0 are the same; what is no number is higher than all, or lower.
__device__ __forceinline__ uint32_t Ordered(float x) {
  const uint32_t bits = x == 0 ? 0 : __float_as_uint(x);
  return bits ^ (bits >> 31 != 0 ? ~0u : 1u << 31);
}

// Not fmaxf, to which NaN is nothing.
__device__ __forceinline__ float Positive(float x) {
  float y;
  asm("max.NaN.f32 %0, %1, 0f00000000;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ uint32_t FromHalf(__half, uint32_t pair) { return pair; }
__device__ __forceinline__ uint32_t FromHalf(__nv_bfloat16, uint32_t pair) {
  const float2 x = __half22float2(reinterpret_cast<const __half2&>(pair));
  const __nv_bfloat162 y = __floats2bfloat162_rn(x.x, x.y);
  return reinterpret_cast<const uint32_t&>(y);
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
  template <typename T>
  __device__ __forceinline__ void ToFragments(uint32_t (&a)[kSteps][4]) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint4 piece = pieces[i][step * kPieces / kSteps];
        const uint32_t words[4] = {piece.x, piece.y, piece.z, piece.w};
        if constexpr (kFp8) {
          uint32_t low, high;
          ptx::FromE4m3(words[step % 4], low, high);
          a[step][i] = FromHalf(T{}, low);
          a[step][i + 2] = FromHalf(T{}, high);
        } else {
          a[step][i] = words[step % 2 * 2];
          a[step][i + 2] = words[step % 2 * 2 + 1];
        }
      }
    }
  }

  // Where shared memory has a pair of Q's columns, 8 piece + 2 word + {0, 1} of a head: the step in
  // which they are multiplied, whether it is the lanes' second pair, and the lane's place.
  static __device__ __forceinline__ uint32_t Place(int head, int piece, int word) {
    const int step = kFp8 ? piece / 8 * 4 + piece % 2 * 2 + word / 2 : piece / 4 * 2 + word / 2;
    const int lane = kFp8 ? piece % 8 / 2 : piece % 4;
    const int chunk = step % 4 * 2 + word % 2;
    return step / 4 * kPanelBytes + head * 128 + ((chunk ^ head % 8) << 4) + lane * 4;
  }
};

// Grid: (sequences x tiles of query tokens, pages).
template <typename T, bool kFp8>
__global__ void __launch_bounds__(kScoreThreads, 3)
    ScoreKernel(const __grid_constant__ IndexTopkParams p, const ScoreShape shape) {
  extern __shared__ __align__(1024) uint8_t q_shared[];
  using Own = Keys<kFp8>;
  const int sequence = blockIdx.x / shape.tiles, tile = blockIdx.x % shape.tiles;
  const int first_token = tile * shape.tokens;
  const int tokens = min(shape.tokens, static_cast<int>(p.s) - first_token);
  const int heads = static_cast<int>(p.heads), padded = shape.groups * kHeads;
  const int64_t first_row = int64_t{sequence} * p.s + first_token;
  const int width = static_cast<int>(p.max_pages_per_seq);
  ptx::WaitForPreviousKernel();

  int most = 0;
  for (int i = 0; i < tokens; ++i) most = max(most, p.num_visible[first_row + i]);
  const int first_page = blockIdx.y * shape.pages;
  // Nothing is chosen where all is.
  const int end_page = most <= p.topk ? 0 : min((min(most, width * kPageSize) + 63) / 64, width);
  const int pages = min(shape.pages, end_page - first_page);
  if (pages <= 0) return;

  // Entries outside the pool are those of its first or last page.
  const int lane = threadIdx.x % 32;
  int entry = 0;
  if (lane < pages) entry = p.block_table[int64_t{sequence} * width + first_page + lane];
  entry = max(0, min(entry, static_cast<int>(p.num_pages) - 1));
  const auto page = [&](int i) {
    return static_cast<const uint8_t*>(p.index_pages) +
           int64_t{__shfl_sync(~0u, entry, i)} * (kPageSize * Own::kBytes);
  };
  Own next;
  next.Load(page(0));

  // Heads that do not exist are zeros, and their weights.
  float* weights = reinterpret_cast<float*>(q_shared + tokens * shape.groups * kGroupBytes);
  const uint4* q = static_cast<const uint4*>(p.q) + first_row * heads * (kDim / 8);
  constexpr int kPiecesQ = kDim / 8;
  for (int i = threadIdx.x; i < tokens * padded * kPiecesQ; i += kScoreThreads) {
    const int piece = i % kPiecesQ, head = i / kPiecesQ % padded, token = i / kPiecesQ / padded;
    uint4 v{};
    if (head < heads) v = q[(token * heads + head) * kPiecesQ + piece];
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    const uint32_t group =
        ptx::SmemAddress(q_shared) + (token * shape.groups + head / kHeads) * kGroupBytes;
#pragma unroll
    for (int word = 0; word < 4; ++word) {
      ptx::StoreShared4(group + Own::Place(head % kHeads, piece, word), words[word]);
    }
  }
  for (int i = threadIdx.x; i < tokens * padded; i += kScoreThreads) {
    const int head = i % padded;
    weights[i] = head < heads ? p.weights[(first_row + i / padded) * heads + head] : 0.f;
  }
  ptx::FenceProxyAsync();
  __syncthreads();

  const int64_t stride = int64_t{width} * kPageSize;
  uint32_t* scores = p.scores + first_row * stride + int64_t{first_page} * kPageSize +
                     threadIdx.x / 32 * 16 + lane / 4;
  const uint64_t operand = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(q_shared));
  for (int i = 0; i < pages; ++i) {
    uint32_t a[kSteps][4];
    next.template ToFragments<T>(a);
    const float scales[2] = {next.scales[0], next.scales[1]};
    if (i + 1 < pages) next.Load(page(i + 1));
#pragma unroll 1
    for (int token = 0; token < tokens; ++token) {
      float sums[2] = {0, 0};
#pragma unroll 1
      for (int group = 0; group < shape.groups; ++group) {
        const int at = token * shape.groups + group;
        const uint64_t heads_of = ptx::Advance(operand, ptx::Uniform(at) * kGroupBytes);
        float s[kHeads / 2];
        ptx::WgmmaFence();
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          const uint32_t offset = step / 4 * kPanelBytes + step % 4 * 32;
          ptx::WgmmaM64N64<T>(s, a[step], ptx::Advance(heads_of, offset), step > 0);
        }
        ptx::WgmmaCommit();
        ptx::WgmmaWait<0>();
        const float* own = weights + at * kHeads + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kHeads / 8; ++j) {
          const float2 weight = *reinterpret_cast<const float2*>(own + 8 * j);
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            sums[r] += Positive(s[4 * j + 2 * r]) * weight.x;
            sums[r] += Positive(s[4 * j + 2 * r + 1]) * weight.y;
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        sums[r] += __shfl_xor_sync(~0u, sums[r], 1);
        sums[r] += __shfl_xor_sync(~0u, sums[r], 2);
        if (kFp8) sums[r] *= scales[r];
        if (lane % 4 == r) scores[token * stride + i * kPageSize + 8 * r] = Ordered(sums[r]);
      }
    }
  }
}

constexpr int kChoiceThreads = 1024;
constexpr int kChoiceWarps = kChoiceThreads / 32;
constexpr int kEach = 4;     // scores that a thread reads at once
constexpr int kBins = 2048;  // of a pass
static_assert(kBins == 2 * kChoiceThreads);

// The sum of those of the threads before this one, and of all.
__device__ __forceinline__ int Before(int value, int* sums, int* all) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int inclusive = value;
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, inclusive, step);
    if (lane >= step) inclusive += other;
  }
  if (lane == 31) sums[warp] = inclusive;
  __syncthreads();
  int of_warps = sums[lane];
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const int other = __shfl_up_sync(~0u, of_warps, step);
    if (lane >= step) of_warps += other;
  }
  *all = __shfl_sync(~0u, of_warps, 31);
  const int before = __shfl_sync(~0u, of_warps, max(warp - 1, 0));
  return (warp == 0 ? 0 : before) + inclusive - value;
}

// Grid: query tokens of all sequences.
__global__ void __launch_bounds__(kChoiceThreads)
    ChooseKernel(const __grid_constant__ IndexTopkParams p) {
  __shared__ int bins[kBins];
  __shared__ int sums[2][kChoiceWarps];
  __shared__ uint32_t found[2];  // the bin, and how many of it are chosen
  ptx::WaitForPreviousKernel();
  const int64_t stride = p.max_pages_per_seq * kPageSize;
  const int topk = static_cast<int>(p.topk);
  const int n = static_cast<int>(min(int64_t{max(p.num_visible[blockIdx.x], 0)}, stride));
  int32_t* out = p.positions + int64_t{blockIdx.x} * topk;
  if (n <= topk) {
    for (int i = threadIdx.x; i < topk; i += kChoiceThreads) out[i] = i < n ? i : -1;
    return;
  }
  const auto* scores = reinterpret_cast<const uint4*>(p.scores + blockIdx.x * stride);
  // Calls `take` with the scores and the first one's position, `first` of all threads' below n.
  const auto read = [&](int first, uint32_t (&x)[kEach]) {
    const uint4 v = first < n ? __ldcg(scores + first / kEach) : uint4{};
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
  };

  // The lowest score that is chosen, bin by bin: `prefix` are its leading bits, and `wanted` are
  // to be found among those that begin so.
  uint32_t prefix = 0;
  int wanted = topk;
#pragma unroll
  for (int pass = 0; pass < 3; ++pass) {
    const int shift = pass == 0 ? 21 : pass == 1 ? 10 : 0;  // 11 bits, 11 bits, 10 bits
    const int width = pass == 2 ? 10 : 11;
    bins[threadIdx.x] = bins[threadIdx.x + kChoiceThreads] = 0;
    __syncthreads();
    for (int first = threadIdx.x * kEach; first < n; first += kChoiceThreads * kEach) {
      uint32_t x[kEach];
      read(first, x);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const bool counts = pass == 0 || x[i] >> (shift + width) == prefix;
        if (counts && first + i < n) atomicAdd(&bins[x[i] >> shift & ((1 << width) - 1)], 1);
      }
    }
    __syncthreads();
    // From the highest bin down.
    const int high = kBins - 1 - 2 * threadIdx.x;
    const int counts[2] = {bins[high], bins[high - 1]};
    int all;
    int before = Before(counts[0] + counts[1], sums[pass % 2], &all);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (before < wanted && wanted <= before + counts[i]) {
        found[0] = high - i;
        found[1] = wanted - before;
      }
      before += counts[i];
    }
    __syncthreads();
    prefix = prefix << width | found[0];
    wanted = static_cast<int>(found[1]);
  }

  // All that are higher, and the first of those that are as high.
  const uint32_t lowest = prefix;
  int higher = 0, equal = 0;  // so far
  int turn = 1;
  for (int begin = 0; begin < n; begin += kChoiceThreads * kEach, turn ^= 1) {
    const int first = begin + threadIdx.x * kEach;
    uint32_t x[kEach];
    read(first, x);
    int own = 0;  // higher ones, and equal ones above them
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (first + i < n) own += x[i] > lowest ? 1 : x[i] == lowest ? 1 << 16 : 0;
    }
    int all;
    const int before = Before(own, sums[turn], &all);
    int h = higher + (before & 0xFFFF), e = equal + (before >> 16);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (first + i >= n) break;
      if (x[i] > lowest) {
        out[h + min(e, wanted)] = first + i;
        ++h;
      } else if (x[i] == lowest) {
        if (e < wanted) out[h + e] = first + i;
        ++e;
      }
    }
    higher += all & 0xFFFF;
    equal += all >> 16;
  }
}

template <typename T, bool kFp8>
Status LaunchScores(const IndexTopkParams& p, int multiprocessors, cudaStream_t stream) {
  ScoreShape shape{};
  shape.groups = static_cast<int>((p.heads + kHeads - 1) / kHeads);
  const int64_t room = std::max<int64_t>(kMostTokens / shape.groups, 1);
  shape.tokens = static_cast<int>(std::min(room, p.s));
  shape.tiles = static_cast<int>((p.s + shape.tokens - 1) / shape.tokens);
  // Two rounds of four thread blocks on each multiprocessor; but Q has to be worth its way.
  const int64_t tiles = p.batch * shape.tiles, all = tiles * p.max_pages_per_seq;
  shape.pages = static_cast<int>(std::clamp<int64_t>(all / (multiprocessors * 8), 4, kMostPages));
  const int64_t parts = (p.max_pages_per_seq + shape.pages - 1) / shape.pages;
  if (tiles > INT32_MAX || parts > 65535) {
    return {StatusCode::kInvalidArgument, "block_table is too large"};
  }
  const int bytes = shape.tokens * shape.groups * (kGroupBytes + kHeads * 4);
  const dim3 grid(static_cast<unsigned>(tiles), static_cast<unsigned>(parts));
  return Launch(ScoreKernel<T, kFp8>, grid, kScoreThreads, bytes, 1, stream, p, shape);
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
  return Launch(ChooseKernel, dim3(static_cast<unsigned>(queries)), kChoiceThreads, 0, 1, stream,
                p);
}

}  // namespace flashmla::sm90
