// Projections and experts for a few tokens: every weight that is needed is read once.
//
// There is no time to unpack weights and to multiply them one by one: at the rate of the memory a
// multiprocessor gets twenty bytes a clock. The tensor cores do both: weights are the columns of
// m16n8k16, and the tokens its rows, of which most are empty. As the order of k is free, a lane
// takes sixteen bytes of a row as they are in memory, which are its operands of two products. A
// warp loads whole lines, eight lanes each, although a column has but four lanes. So the two halves
// of a line are two columns, and the tokens are there twice, as rows 0 to 7 with the numbers that
// go with the first half, and as rows 8 to 15 with the others. Half of what the products make means
// nothing.
//
// A thread block works on a tile of eight rows, each of its warps on a part of k, in steps of 64
// numbers: whole lines of memory. A few steps' weights are on their way to registers at any time,
// as each that is multiplied makes room for another, through the ends of tiles. What else is to be
// done for a step is next to nothing: it would be time in which a warp has less on its way.
//
// What is to be hidden are the beginnings: of a kernel, and of the dependent steps in it. A call is
// a chain of two or three kernels, each launched while the one before it ends; what can be known by
// then (the first weights, the norm of the hidden states, the choice of the experts) is loaded or
// computed before it waits.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <climits>
#include <cstdint>
#include <string>
#include <type_traits>

#include "sm90/attention/schedule.cuh"
#include "sm90/few_tokens.h"
#include "sm90/page_row.cuh"
#include "sm90/ptx.cuh"
#include "sm90/swiglu.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarp;
constexpr int kPiece = 8;     // numbers in 16 bytes
constexpr int kTileRows = 8;  // rows of weights that a block multiplies at a time
constexpr int kStep = 64;     // numbers of a row that a warp multiplies at a time
constexpr int kStepPieces = kStep / kPiece;
constexpr int kHalfStep = kStepPieces / 2;
constexpr int kHalfTile = kTileRows / 2;
static_assert(kStepPieces == 8 && kTileRows == 8, "as m16n8k16 has it");
constexpr unsigned kAll = 0xffffffff;

// How many thread blocks a kernel has on a multiprocessor, and how many steps' weights a warp of it
// has on their way.
struct Linear {
  static constexpr int kBlocks = 2, kSteps = 4;
};
struct Experts {
  static constexpr int kBlocks = 2, kSteps = 4;
};
struct Down {
  static constexpr int kBlocks = 2, kSteps = 6;
};

// A warp's number in the grid; neighbours are on different multiprocessors.
__device__ __forceinline__ int WarpOfGrid() { return threadIdx.x / kWarp * gridDim.x + blockIdx.x; }

// --- Numbers ---------------------------------------------------------------------------------

__device__ __forceinline__ float2 Unpack(__nv_bfloat16, uint32_t pair) {
  return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000)};
}
__device__ __forceinline__ float2 Unpack(__half, uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <typename T>
__device__ __forceinline__ void Unpack(uint4 piece, float (&numbers)[kPiece]) {
  const uint32_t pairs[] = {piece.x, piece.y, piece.z, piece.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 pair = Unpack(T(), pairs[i]);
    numbers[2 * i] = pair.x;
    numbers[2 * i + 1] = pair.y;
  }
}

// Weights are read once.
__device__ __forceinline__ uint4 LoadWeight(const uint4* address) { return __ldcs(address); }

template <typename T>
__device__ __forceinline__ const uint4* Pieces(const void* data, int64_t numbers) {
  return reinterpret_cast<const uint4*>(static_cast<const T*>(data) + numbers);
}

__device__ __forceinline__ float WarpSum(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAll, x, lanes);
  return x;
}

__device__ __forceinline__ float WarpMax(float x) {
#pragma unroll
  for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) {
    x = fmaxf(x, __shfl_xor_sync(kAll, x, lanes));
  }
  return x;
}

// --- Products --------------------------------------------------------------------------------

__device__ __forceinline__ void Mma(__nv_bfloat16, float (&c)[4], uint32_t a0, uint32_t a1,
                                    uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void Mma(__half, float (&c)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                    uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A lane's place.
struct Lane {
  int number = threadIdx.x % kWarp;
  // It loads this piece of each step, of weights in this row of a tile and of the one kHalfTile
  // later.
  int weight_row = threadIdx.x % kWarp / kStepPieces;
  int weight_piece = threadIdx.x % kStepPieces;
  // It multiplies them with numbers of this token, this piece of each step and the one kHalfStep
  // later; and has this token's sums of this row of a tile, and of the one kHalfTile later.
  int token = threadIdx.x % kWarp / kHalfStep;
  int piece = threadIdx.x % kHalfStep;
};

// A step's weights.
struct Weights {
  uint4 first;   // of the first rows of the tile
  uint4 second;  // of the others
};

// The sums of a warp for a tile.
struct Sums {
  float first[4] = {};
  float second[4] = {};

  // Adds a step's products with the vectors that lie at `x`.
  template <typename T>
  __device__ __forceinline__ void Add(const Weights& weights, const uint4* x) {
    const uint4 low = x[0], high = x[kHalfStep];
    Mma(T(), first, low.x, high.x, low.y, high.y, weights.first.x, weights.first.y);
    Mma(T(), second, low.x, high.x, low.y, high.y, weights.second.x, weights.second.y);
    Mma(T(), first, low.z, high.z, low.w, high.w, weights.first.z, weights.first.w);
    Mma(T(), second, low.z, high.z, low.w, high.w, weights.second.z, weights.second.w);
  }

  __device__ __forceinline__ void Clear() {
#pragma unroll
    for (int i = 0; i < 4; ++i) first[i] = second[i] = 0;
  }

  // Column 2 i is the first half of row i, column 2 i + 1 the second one.
  __device__ __forceinline__ float First() const { return first[0] + first[3]; }
  __device__ __forceinline__ float Second() const { return second[0] + second[3]; }
};

// The sums of a block's warps for a tile, and the sums of them.
template <int kTokens>
struct Partial {
  float sums[kWarps][kTokens][kTileRows];

  __device__ __forceinline__ void Put(Sums& own) {
    const Lane lane;
    if (lane.token < kTokens) {
      float* to = sums[threadIdx.x / kWarp][lane.token] + lane.piece;
      to[0] = own.First();
      to[kHalfTile] = own.Second();
    }
    own.Clear();
  }

  // Sums that are all this token's.
  __device__ __forceinline__ void AddTo(int token, Sums& own) {
    const Lane lane;
    __syncwarp();
    if (lane.token == 0) {
      float* to = sums[threadIdx.x / kWarp][token] + lane.piece;
      to[0] += own.First();
      to[kHalfTile] += own.Second();
    }
    own.Clear();
  }

  __device__ __forceinline__ float Total(int token, int row) const {
    float total = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) total += sums[warp][token][row];
    return total;
  }
};

// The first kThreads of a block meet.
__device__ __forceinline__ void Meet() { ptx::NamedBarrierSync(1, kThreads); }

// Where a lane's weights of a tile begin.
struct Rows {
  const uint4* first = nullptr;
  int second = 0;  // how much later those of the second rows lie

  Rows() = default;
  // The tile that begins with row `row` of a matrix whose rows are of so many numbers.
  template <typename T>
  __device__ __forceinline__ Rows(T, const void* matrix, int64_t row, int size) {
    const Lane lane;
    first = Pieces<T>(matrix, (row + lane.weight_row) * size) + lane.weight_piece;
    second = kHalfTile * (size / kPiece);
  }

  __device__ __forceinline__ Rows At(int step) const {
    Rows rows = *this;
    rows.first += step * kStepPieces;
    return rows;
  }
};

// Some steps that follow each other, of rows of weights and of the vectors.
struct Batch {
  Rows weights;
  int begin = 0;  // the first step of the vectors
  int count = 0;
  bool ends_row = false;

  __device__ __forceinline__ Weights Load(int i) const {
    const uint4* from = weights.first + i * kStepPieces;
    return {LoadWeight(from), LoadWeight(from + weights.second)};
  }
};

// A warp's share of a row of so many steps, in batches of kSteps at most.
template <int kSteps>
struct Share {
  int begin, end;

  __device__ explicit Share(int steps) {
    const int warp = threadIdx.x / kWarp;
    begin = steps * warp / kWarps;
    end = steps * (warp + 1) / kWarps;
  }

  // The batch that begins with `step`.
  __device__ __forceinline__ Batch At(const Rows& rows, int step) const {
    return {rows.At(step), step, min(end - step, kSteps), step + kSteps >= end};
  }
};

template <int kSteps>
__device__ __forceinline__ void Load(const Batch& batch, Weights (&weights)[kSteps]) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (i < batch.count) weights[i] = batch.Load(i);
  }
}

// Multiplies a batch, of which the weights are there or on their way, and asks for those of the
// next.
template <typename T, int kSteps>
__device__ __forceinline__ void MultiplyAndLoad(const Batch& batch, const uint4* x,
                                                const Batch& next, Weights (&weights)[kSteps],
                                                Sums& sums) {
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    if (i < batch.count) sums.Add<T>(weights[i], x + (batch.begin + i) * kStepPieces);
    if (i < next.count) weights[i] = next.Load(i);
  }
}

// Begins to copy some steps of each token's vector of so many pieces to shared memory. A warp
// copies what it multiplies, and so has no other to wait for.
template <int kTokens>
__device__ __forceinline__ void CopySteps(uint4* target, const uint4* source, int pieces, int begin,
                                          int end) {
  for (int token = 0; token < kTokens; ++token) {
    for (int i = begin * kStepPieces + threadIdx.x % kWarp; i < end * kStepPieces; i += kWarp) {
      const int place = token * pieces + i;
      ptx::CpAsync16(ptx::SmemAddress(target + place), source + place, true);
    }
  }
}

// Brings the factors of an RMS norm to where its result will be, of the last token: each thread its
// own ones.
template <typename T, int kTokens>
__device__ __forceinline__ void LoadScale(const void* scale, int size, uint4* normed) {
  const int pieces = size / kPiece;
  for (int piece = threadIdx.x; piece < pieces; piece += kThreads) {
    normed[(kTokens - 1) * pieces + piece] = Pieces<T>(scale, 0)[piece];
  }
}

// x [kTokens, size] over its root mean square, times the factors that LoadScale has loaded, to
// shared memory. As the models have it, the quotient is rounded before it is multiplied. By the
// first kThreads of a block; from L2, if they have not waited for the kernel before themselves.
template <typename T, int kTokens, bool kWaited = true>
__device__ __forceinline__ void Normalize(const void* x, int size, float eps, uint4* normed) {
  __shared__ float partial[kTokens][kWarps];
  const int pieces = size / kPiece;
  const auto piece_of = [&](int token, int piece) {
    const uint4* address = Pieces<T>(x, 0) + token * pieces + piece;
    return kWaited ? *address : __ldcg(address);
  };
  float squares[kTokens] = {};
  for (int piece = threadIdx.x; piece < pieces; piece += kThreads) {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      float numbers[kPiece];
      Unpack<T>(piece_of(token, piece), numbers);
#pragma unroll
      for (int i = 0; i < kPiece; ++i) squares[token] += numbers[i] * numbers[i];
    }
  }
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    squares[token] = WarpSum(squares[token]);
    if (threadIdx.x % kWarp == 0) partial[token][threadIdx.x / kWarp] = squares[token];
  }
  Meet();
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += partial[token][warp];
    squares[token] = rsqrtf(sum / static_cast<float>(size) + eps);
  }
  for (int piece = threadIdx.x; piece < pieces; piece += kThreads) {
    float factors[kPiece];
    Unpack<T>(normed[(kTokens - 1) * pieces + piece], factors);
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      float numbers[kPiece];
      Unpack<T>(piece_of(token, piece), numbers);
      T results[kPiece];
#pragma unroll
      for (int i = 0; i < kPiece; ++i) {
        const T quotient = static_cast<T>(numbers[i] * squares[token]);
        results[i] = static_cast<T>(static_cast<float>(quotient) * factors[i]);
      }
      normed[token * pieces + piece] = *reinterpret_cast<const uint4*>(results);
    }
  }
  Meet();
}

template <typename T>
__device__ __forceinline__ float Number(const void* data, int64_t i) {
  return static_cast<float>(static_cast<const T*>(data)[i]);
}
template <typename T>
__device__ __forceinline__ void Store(void* data, int64_t i, float number) {
  static_cast<T*>(data)[i] = static_cast<T>(number);
}

// --- Linear layers ---------------------------------------------------------------------------

// One or two matrices that multiply the same vectors.
struct LinearParams {
  const void* x;         // [tokens, size]
  const void* norm;      // [size], of an RMS norm before
  const void* residual;  // [tokens, rows[0]], added to the first product, or null
  float eps;
  int size;
  int rows[2];
  const void* w[2];
  void* out[2];
};

template <typename T, int kTokens, typename Out = T>
__global__ void __launch_bounds__(kThreads, Linear::kBlocks) LinearKernel(const LinearParams p) {
  extern __shared__ uint4 x[];
  __shared__ Partial<kTokens> partials[2];
  const Lane lane;
  const int pieces = p.size / kPiece;
  const int tiles = (p.rows[0] + p.rows[1]) / kTileRows;
  const Share<Linear::kSteps> share(p.size / kStep);
  const auto weights_of = [&](int tile) {
    const int row = tile * kTileRows;
    const bool second = row >= p.rows[0];
    return Rows(T(), second ? p.w[1] : p.w[0], second ? row - p.rows[0] : row, p.size);
  };
  Weights weights[Linear::kSteps];
  Batch batch;
  int tile = blockIdx.x;
  Rows rows;
  if (tile < tiles) {
    rows = weights_of(tile);
    batch = share.At(rows, share.begin);
    Load(batch, weights);
  }
  if (p.norm != nullptr) LoadScale<T, kTokens>(p.norm, p.size, x);
  ptx::WaitForPreviousKernel();
  ptx::LetNextKernelStart();
  if (p.norm != nullptr) {
    Normalize<T, kTokens>(p.x, p.size, p.eps, x);
  } else {
    CopySteps<kTokens>(x, Pieces<T>(p.x, 0), pieces, share.begin, share.end);
    ptx::CpAsyncWaitAll();
    __syncwarp();
  }

  const uint4* own = x + min(lane.token, kTokens - 1) * pieces + lane.piece;
  Sums sums;
  int turn = 0;
  while (tile < tiles) {
    Batch next;
    if (!batch.ends_row) {
      next = share.At(rows, batch.begin + Linear::kSteps);
    } else if (tile + static_cast<int>(gridDim.x) < tiles) {
      rows = weights_of(tile + gridDim.x);
      next = share.At(rows, share.begin);
    }
    MultiplyAndLoad<T>(batch, own, next, weights, sums);
    const bool ends_row = batch.ends_row;
    batch = next;
    if (!ends_row) continue;
    Partial<kTokens>& partial = partials[turn];
    partial.Put(sums);
    Meet();
    if (threadIdx.x < kTokens * kTileRows) {
      const int token = threadIdx.x / kTileRows;
      const int place = tile * kTileRows + threadIdx.x % kTileRows;
      const bool second = place >= p.rows[0];
      const int64_t to =
          int64_t{token} * (second ? p.rows[1] : p.rows[0]) + (second ? place - p.rows[0] : place);
      float sum = partial.Total(token, threadIdx.x % kTileRows);
      if (!second && p.residual != nullptr) sum += Number<T>(p.residual, to);
      Store<Out>(second ? p.out[1] : p.out[0], to, sum);
    }
    turn ^= 1;
    tile += gridDim.x;
  }
}

// --- Queries and latents ---------------------------------------------------------------------

// Lane i of a warp turns pair i of `x` [64].
template <typename T>
__device__ __forceinline__ void Rotate(const ProjectParams& p, int token, const void* x,
                                       int64_t from, void* out, int64_t to) {
  const int pair = threadIdx.x % kWarp;
  const float cos = p.cos[token * kWarp + pair], sin = p.sin[token * kWarp + pair];
  const float even = Number<T>(x, from + 2 * pair), odd = Number<T>(x, from + 2 * pair + 1);
  Store<T>(out, to + 2 * pair, even * cos - odd * sin);
  Store<T>(out, to + 2 * pair + 1, odd * cos + even * sin);
}

// Columns of a head's latent query that a warp computes: two a load.
constexpr int kLoads = 8;
constexpr int kColumns = 2 * kLoads;
constexpr int kColumnGroups = kHeadDimV / kColumns;
static_assert(kNopeDim == kWarp / 2 * kPiece && kRopeDim == 2 * kWarp);

// A warp brings a latent into an FP8 page, as cache/layout.py does, to the bit but for NaN's sign:
// a lane has 8 numbers of tile 2 i + lane / 16 in turn i.
template <int kEach>
__device__ __forceinline__ void StoreFp8(const __nv_bfloat16 (&latent)[kEach][kPiece],
                                         void* token) {
  constexpr auto kLeast = std::bit_cast<uint32_t>(static_cast<float>(1e-4 * 448));  // of a tile
  constexpr uint32_t kInfinity = 0x7f800000, kOne = 1 << 23, kMantissaOf448 = 0x600000;
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    float numbers[kPiece];
    uint32_t largest = 0;  // of magnitudes, whose bits are in their order, and NaN's behind
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      numbers[j] = static_cast<float>(latent[i][j]);
      largest = max(largest, __float_as_uint(fabsf(numbers[j])));
    }
#pragma unroll
    for (int lanes = kFp8Tile / kPiece / 2; lanes > 0; lanes /= 2) {
      largest = max(largest, __shfl_xor_sync(kAll, largest, lanes));
    }
    // The least power of two that brings the tile to 448 or less, and its reciprocal.
    uint32_t scale = (max(largest, kLeast) + kOne - 1 - kMantissaOf448) & -kOne;
    scale -= 8 * kOne;
    uint32_t inverse = 254 * kOne - scale;
    if (largest >= kInfinity) scale = inverse = 0x7fc00000;
    const float factor = __uint_as_float(inverse);
    uint32_t codes[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* x = numbers + half * kPiece / 2;
      codes[half] = ptx::ToE4m3(x[0] * factor, x[1] * factor) |
                    ptx::ToE4m3(x[2] * factor, x[3] * factor) << 16;
    }
    static_cast<uint2*>(token)[lane + i * kWarp] = {codes[0], codes[1]};
    constexpr int kTileLanes = kFp8Tile / kPiece;
    if (lane % kTileLanes == 0) {
      constexpr int kScales = kHeadDimV / sizeof(uint32_t);
      const int tile = i * (kWarp / kTileLanes) + lane / kTileLanes;
      static_cast<uint32_t*>(token)[kScales + tile] = scale;
    }
  }
}

template <typename T, int kTokens>
__global__ void __launch_bounds__(kThreads) AbsorbKernel(const ProjectParams p) {
  const int lane = threadIdx.x % kWarp;
  const int products = p.heads * kColumnGroups;
  int unit = WarpOfGrid();
  // A warp has one unit: the grid is large enough. Its weights are on their way while it waits.
  uint4 loaded[kLoads];
  const int head = unit / kColumnGroups, column = unit % kColumnGroups * kColumns;
  if (unit < products) {
    const uint4* w = Pieces<T>(p.w_uk, (int64_t{head} * kHeadDimV + column) * kNopeDim) + lane;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) loaded[i] = LoadWeight(w + i * kWarp);
  }
  ptx::WaitForPreviousKernel();
  ptx::LetNextKernelStart();

  if (unit < products) {
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const int64_t query = (int64_t{token} * p.heads + head) * kQueryDim;
      float x[kPiece];
      Unpack<T>(Pieces<T>(p.q_expanded, query)[lane % (kWarp / 2)], x);
      const int64_t out = (int64_t{token} * p.heads + head) * kHeadDim + column + lane / 16;
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        float w[kPiece], sum = 0;
        Unpack<T>(loaded[i], w);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) sum += w[j] * x[j];
#pragma unroll
        for (int lanes = kWarp / 4; lanes > 0; lanes /= 2) {
          sum += __shfl_xor_sync(kAll, sum, lanes);
        }
        if (lane % 16 == i) Store<T>(p.q, out + 2 * i, sum);
      }
    }
    return;
  }
  unit -= products;
  if (unit < kTokens * p.heads) {
    Rotate<T>(p, unit / p.heads, p.q_expanded, int64_t{unit} * kQueryDim + kNopeDim, p.q,
              int64_t{unit} * kHeadDim + kHeadDimV);
    return;
  }
  const int token = unit - kTokens * p.heads;
  if (token >= kTokens) return;
  const PageRow place(p.kv, token / p.kv.num_tokens, token % p.kv.num_tokens);
  if (!place.exists()) return;
  place.CopyShared<8>(lane, kWarp);
  const int64_t row = int64_t{token} * kHeadDim;
  const int rope = p.fp8_cache ? kFp8RopeOffset / static_cast<int>(sizeof(T)) : kHeadDimV;
  Rotate<T>(p, token, p.kv_raw, row + kHeadDimV, place.data, rope);
  constexpr int kEach = kHeadDimV / kWarp / kPiece;
  float latent[kEach][kPiece], squares = 0;
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    Unpack<T>(Pieces<T>(p.kv_raw, row)[lane + i * kWarp], latent[i]);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) squares += latent[i][j] * latent[i][j];
  }
  const float factor = rsqrtf(WarpSum(squares) / kHeadDimV + p.latent_eps);
  alignas(uint4) T results[kEach][kPiece];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    float scale[kPiece];
    Unpack<T>(Pieces<T>(p.kv_norm, 0)[lane + i * kWarp], scale);
#pragma unroll
    for (int j = 0; j < kPiece; ++j) {
      const T quotient = static_cast<T>(latent[i][j] * factor);
      results[i][j] = static_cast<T>(static_cast<float>(quotient) * scale[j]);
    }
  }
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    if (p.fp8_cache) {
      StoreFp8(results, place.data);
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    place.data[lane + i * kWarp] = *reinterpret_cast<const uint4*>(results[i]);
  }
}

// --- Attention's results ---------------------------------------------------------------------

// A head has a cluster of thread blocks. Each merges some columns of what the partitions of a
// sequence have left, as dense decode's combine does, shares them with the others, and multiplies
// all columns with some of the head's rows of w_uv.
constexpr int kHeadBlocks = 4;
constexpr int kBlockColumns = kHeadDimV / kHeadBlocks;
constexpr int kValueRows = 4;                             // that a warp multiplies at a time
constexpr int kValuePieces = kHeadDimV / kPiece / kWarp;  // of a row in a lane
constexpr int kPartsEach = 9;                             // loads of a lane on their way

// What all blocks of a cluster write to each other, and what a block merges with.
template <int kTokens>
struct ValuesMemory {
  Merge merges[kTokens];  // of each sequence; without parts, its result is there already
  float weights[kTokens][kMaxPartitions];
  float sums[kTokens][kWarps][kBlockColumns];
  float attended[kTokens][kHeadDimV];
};

// A token's place in the partial results: those of this row of a part's.
struct PartRows {
  const Merge& merge;
  int first_row;

  __device__ PartRows(const OutputParams& p, const Merge* merges, int token, int head)
      : merge(merges[token / static_cast<uint32_t>(p.attention.s_q)]) {
    const int s_q = static_cast<int>(p.attention.s_q);
    const int row = token % static_cast<uint32_t>(s_q) * p.heads + head;
    const int rows_of_part = min(s_q * p.heads, kRowTile);
    first_row = row / kRowTile * p.partitions * kMergesEach * rows_of_part + row % kRowTile;
  }
  __device__ int64_t operator()(int part) const {
    return first_row + (part == 0 ? merge.first_row : merge.next_row + part * merge.stride);
  }
};

__device__ __forceinline__ void UnpackPart(float, uint4 part, float (&numbers)[4]) {
  numbers[0] = __uint_as_float(part.x), numbers[1] = __uint_as_float(part.y);
  numbers[2] = __uint_as_float(part.z), numbers[3] = __uint_as_float(part.w);
}
__device__ __forceinline__ void UnpackPart(__half, uint4 part, float (&numbers)[kPiece]) {
  Unpack<__half>(part, numbers);
}

// The weights of all parts for some columns, by a warp; of those that do not exist, zero.
__device__ __forceinline__ void Weigh(const float* stats, const PartRows& rows, bool upper,
                                      float (&weights)[kMaxPartitions]) {
  constexpr int kPerLane = (kMaxPartitions + kWarp - 1) / kWarp;
  const int lane = threadIdx.x % kWarp;
  float share[kPerLane], factor[kPerLane], top = -INFINITY;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int part = lane + k * kWarp;
    float4 row{-INFINITY, 0, 0, 0};
    if (part < rows.merge.parts) row = __ldcg(reinterpret_cast<const float4*>(stats) + rows(part));
    share[k] = row.x;
    factor[k] = upper ? row.z : row.y;
    top = fmaxf(top, row.x);
  }
  top = WarpMax(top);
  if (top == -INFINITY) top = 0;
  float sum = 0;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    share[k] = exp2f(share[k] - top);
    sum += share[k];
  }
  sum = WarpSum(sum);
  const float inverse = sum == 0 ? 0.f : 1.f / sum;
#pragma unroll
  for (int k = 0; k < kPerLane; ++k) {
    const int part = lane + k * kWarp;
    if (part < kMaxPartitions) weights[part] = share[k] * inverse * factor[k];
  }
}

// Partial: of the partial results.
template <typename T, typename Partial, int kTokens>
__global__ void __launch_bounds__(kThreads) ValuesKernel(const __grid_constant__ OutputParams p) {
  __shared__ ValuesMemory<kTokens> shared;
  ptx::ClusterArrive();
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int head = blockIdx.x / kHeadBlocks, block = ptx::ClusterRank();
  const int rows_each = p.v_dim / (kHeadBlocks * kWarps);
  const int first_row = (head * kHeadBlocks + block) * kWarps * rows_each + warp * rows_each;
  uint4 weights[kValueRows][kValuePieces];
  const auto load_weights = [&](int row) {
#pragma unroll
    for (int i = 0; i < kValueRows * kValuePieces; ++i) {
      const int r = row + i / kValuePieces, piece = lane + i % kValuePieces * kWarp;
      if (r >= rows_each) continue;
      const uint4* from = Pieces<T>(p.w_uv, int64_t{first_row + r} * kHeadDimV);
      weights[i / kValuePieces][i % kValuePieces] = LoadWeight(from + piece);
    }
  };
  load_weights(0);
  if (threadIdx.x < kTokens) shared.merges[threadIdx.x].parts = 0;
  __syncthreads();
  ptx::WaitForPreviousKernel();
  ptx::LetNextKernelStart();

  // The sequences with parts are in the records of the partitions.
  if (threadIdx.x < p.partitions && p.partitions > 1) {
    const auto* records = reinterpret_cast<const int4*>(p.attention.merges) +
                          threadIdx.x * (kMergeWords * sizeof(int32_t) / sizeof(int4));
    int4 words[kMergesEach][2];
#pragma unroll
    for (int i = 0; i < kMergesEach * 2; ++i) words[i / 2][i % 2] = __ldcg(records + i);
    bool exists = true;
#pragma unroll
    for (int i = 0; i < kMergesEach; ++i) {
      const Merge& merge = reinterpret_cast<const Merge&>(words[i]);
      exists = exists && merge.parts > 0;
      if (exists && merge.index == 0) shared.merges[merge.batch] = merge;
    }
  }
  __syncthreads();

  constexpr int kEach = 16 / sizeof(Partial);    // columns of a lane
  constexpr int kLanes = kBlockColumns / kEach;  // of a part
  constexpr int kAtOnce = kWarp / kLanes;        // parts of a warp's load
  constexpr int kStride = kWarps * kAtOnce;      // from a lane's part to its next
  const int own_part = warp * kAtOnce + lane / kLanes, own_column = lane % kLanes * kEach;
  uint4 parts[kPartsEach];
  const auto load_parts = [&](const PartRows& rows, int first) {
#pragma unroll
    for (int i = 0; i < kPartsEach; ++i) {
      const int part = first + own_part + i * kStride;
      const int64_t place = rows(part) * kHeadDimV + block * kBlockColumns + own_column;
      parts[i] = uint4{0, 0, 0, 0};
      if (part < rows.merge.parts) {
        parts[i] = __ldcg(Pieces<Partial>(p.attention.partial_out, place));
      }
    }
  };
  load_parts(PartRows(p, shared.merges, 0, head), 0);
  if (warp < kTokens) {
    const PartRows rows(p, shared.merges, warp, head);
    Weigh(p.attention.partial_stats, rows, block >= kHeadBlocks / 2, shared.weights[warp]);
  }
  __syncthreads();
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    const PartRows rows(p, shared.merges, token, head);
    float total[kEach] = {};
#pragma unroll 1
    for (int first = 0; first < rows.merge.parts; first += kPartsEach * kStride) {
      if (token > 0 || first > 0) load_parts(rows, first);
#pragma unroll
      for (int i = 0; i < kPartsEach; ++i) {
        const int part = min(first + own_part + i * kStride, kMaxPartitions - 1);
        const float weight = shared.weights[token][part];
        float numbers[kEach];
        UnpackPart(Partial(), parts[i], numbers);
#pragma unroll
        for (int j = 0; j < kEach; ++j) total[j] += weight * numbers[j];
      }
    }
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      if (kAtOnce > 1) total[j] += __shfl_xor_sync(kAll, total[j], kLanes);
      if (lane < kLanes) shared.sums[token][warp][own_column + j] = total[j];
    }
  }
  __syncthreads();
  ptx::ClusterWait();  // the other blocks have begun
  // DenseDecodeParams::permuted_partials
  const bool permuted = std::is_same_v<Partial, float> && p.attention.fp8_cache;
  for (int i = threadIdx.x; i < kTokens * kBlockColumns; i += kThreads) {
    const int token = i / kBlockColumns, column = block * kBlockColumns + i % kBlockColumns;
    int from = i % kBlockColumns;
    if (permuted) from = (from & ~62) | (from << 2 & 56) | (from >> 3 & 6);
    float total = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += shared.sums[token][w][from];
    if (PartRows(p, shared.merges, token, head).merge.parts == 0) {
      const int64_t row = int64_t{token} * p.heads + head;
      total = Number<T>(p.attention.out, row * kHeadDimV + column);
    }
#pragma unroll
    for (int other = 0; other < kHeadBlocks; ++other) {
      ptx::StoreCluster(&shared.attended[token][column], other, total);
    }
  }
  ptx::ClusterSync();

#pragma unroll 1
  for (int row = 0; row < rows_each; row += kValueRows) {
    if (row > 0) load_weights(row);
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      float sums[kValueRows] = {};
#pragma unroll
      for (int i = 0; i < kValuePieces; ++i) {
        const float* x = shared.attended[token] + (lane + i * kWarp) * kPiece;
#pragma unroll
        for (int r = 0; r < kValueRows; ++r) {
          float w[kPiece];
          Unpack<T>(weights[r][i], w);
#pragma unroll
          for (int j = 0; j < kPiece; ++j) sums[r] += w[j] * x[j];
        }
      }
#pragma unroll
      for (int r = 0; r < kValueRows; ++r) {
        const float sum = WarpSum(sums[r]);
        const int64_t place = int64_t{token} * p.heads * p.v_dim + first_row + row + r;
        if (lane == r && row + r < rows_each) Store<T>(p.values, place, sum);
      }
    }
  }
}

// --- Experts ---------------------------------------------------------------------------------

// The scores of the experts, in single precision, one of a block.
template <typename T, int kTokens>
__global__ void __launch_bounds__(kThreads) RouterKernel(const MlpParams p) {
  extern __shared__ uint4 normed[];
  __shared__ float partial[kTokens][kWarps];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int pieces = p.hidden_size / kPiece;
  const auto* weights =
      reinterpret_cast<const float4*>(p.w_router + int64_t{blockIdx.x} * p.hidden_size);
  constexpr int kLine = 8;  // vectors
  for (int i = threadIdx.x * kLine; i < 2 * pieces; i += kThreads * kLine) {
    ptx::PrefetchL2(weights + i);
  }
  LoadScale<T, kTokens>(p.norm, p.hidden_size, normed);
  ptx::WaitForPreviousKernel();
  ptx::LetNextKernelStart();
  Normalize<T, kTokens>(p.hidden, p.hidden_size, p.norm_eps, normed);

  float sums[kTokens] = {};
  const auto* vectors = reinterpret_cast<const uint2*>(normed);
  for (int i = threadIdx.x; i < 2 * pieces; i += kThreads) {
    const float4 w = weights[i];
#pragma unroll
    for (int token = 0; token < kTokens; ++token) {
      const uint2 x = vectors[token * 2 * pieces + i];
      const float2 low = Unpack(T(), x.x), high = Unpack(T(), x.y);
      sums[token] += w.x * low.x + w.y * low.y + w.z * high.x + w.w * high.y;
    }
  }
#pragma unroll
  for (int token = 0; token < kTokens; ++token) {
    sums[token] = WarpSum(sums[token]);
    if (lane == 0) partial[token][warp] = sums[token];
  }
  __syncthreads();
  if (threadIdx.x < kTokens) {
    float sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += partial[threadIdx.x][i];
    p.logits[threadIdx.x * p.experts + blockIdx.x] = sum;
  }
}

struct Choice {
  int experts[kMaxExpertsPerToken];
  float weights[kMaxExpertsPerToken];
};

// Larger numbers have larger keys, above 0.
__device__ __forceinline__ uint32_t OrderedKey(float x) {
  const uint32_t bits = __float_as_uint(x);
  return bits & 0x80000000 ? ~bits : bits | 0x80000000;
}

// A token's experts, in the order of their scores, equal ones in that of their numbers. By a warp.
__device__ __forceinline__ void Choose(const MlpParams& p, int token, Choice& choice) {
  constexpr int kEach = kMaxExperts / kWarp;
  __shared__ float ranked[kMaxExperts];
  const Router& router = p.router;
  const float* logits = p.logits + token * p.experts;
  const int lane = threadIdx.x % kWarp;
  float largest = 0, sum = 1;
  if (!router.sigmoid) {
    largest = -INFINITY;
    for (int i = lane; i < p.experts; i += kWarp) largest = fmaxf(largest, logits[i]);
    largest = WarpMax(largest);
    sum = 0;
    for (int i = lane; i < p.experts; i += kWarp) sum += __expf(logits[i] - largest);
    sum = WarpSum(sum);
  }
  const auto score = [&](int expert) {
    const float x = logits[expert];
    return router.sigmoid ? 1 / (1 + __expf(-x)) : __expf(x - largest) / sum;
  };
  for (int i = lane; i < p.experts; i += kWarp) {
    ranked[i] = score(i) + (p.bias != nullptr ? p.bias[i] : 0);
  }
  __syncwarp();

  if (router.groups > 1) {  // lane i has group i
    const int group_size = p.experts / router.groups;
    float best = -INFINITY, second = -INFINITY;
    if (lane < router.groups) {
      for (int i = 0; i < group_size; ++i) {
        const float x = ranked[lane * group_size + i];
        second = fmaxf(second, fminf(best, x));
        best = fmaxf(best, x);
      }
    }
    const float worth = router.group_best == 2 ? best + second : best;
    int rank = 0;
    for (int other = 0; other < router.groups; ++other) {
      const float theirs = __shfl_sync(kAll, worth, other);
      rank += theirs > worth || (theirs == worth && other < lane);
    }
    __syncwarp();
    if (lane < router.groups && rank >= router.groups_chosen) {
      for (int i = 0; i < group_size; ++i) ranked[lane * group_size + i] = -INFINITY;
    }
    __syncwarp();
  }

  uint32_t keys[kEach];
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int expert = lane + i * kWarp;
    keys[i] = expert < p.experts ? OrderedKey(ranked[expert]) : 0;
  }
  int mine = 0;  // lane i has the i-th expert
  for (int number = 0; number < p.experts_per_token; ++number) {
    uint32_t best = 0;
    int expert = lane;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (keys[i] > best) {
        best = keys[i];
        expert = lane + i * kWarp;
      }
    }
    const bool is_best = best == __reduce_max_sync(kAll, best);
    expert = __reduce_min_sync(kAll, is_best ? expert : INT_MAX);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (lane + i * kWarp == expert) keys[i] = 0;
    }
    if (lane == number) mine = expert;
  }
  const float weight = lane < p.experts_per_token ? score(mine) : 0;
  const float total = WarpSum(weight);
  if (lane < p.experts_per_token) {
    choice.experts[lane] = mine;
    choice.weights[lane] = weight * router.scale / (router.normalize ? total + 1e-20f : 1);
  }
  __syncwarp();
}

// The first half of the experts: of those that are shared, whose weights are known, and then, for
// each token, of those that a warp of its own has chosen meanwhile.
template <typename T, int kTokens>
__global__ void __launch_bounds__(kThreads + kWarp, Experts::kBlocks)
    ExpertsKernel(const MlpParams p) {
  extern __shared__ uint4 x[];
  __shared__ Partial<kTokens> partials[2][2];
  __shared__ Choice choices[kTokens];
  __shared__ uint64_t chosen;
  if (threadIdx.x == kThreads) {
    ptx::MbarrierInit(&chosen, kWarp);
    ptx::FenceMbarrierInit();
  }
  __syncthreads();
  if (threadIdx.x >= kThreads) {
    // The other warps read nothing that this kernel's predecessor writes, but for the choice.
    ptx::WaitForPreviousKernel();
    ptx::LetNextKernelStart();
    if (p.experts == 0) return;
#pragma unroll 1
    for (int token = 0; token < kTokens; ++token) Choose(p, token, choices[token]);
    ptx::MbarrierArrive(&chosen);
    if (blockIdx.x == 0) {
      for (int i = threadIdx.x % kWarp; i < kTokens * p.experts_per_token; i += kWarp) {
        p.chosen[i] = choices[i / p.experts_per_token].experts[i % p.experts_per_token];
      }
    }
    return;
  }

  const Lane lane;
  const int pieces = p.hidden_size / kPiece;
  const int shared_tiles = p.shared_size / kTileRows;
  const int tiles_of_expert = p.expert_size / kTileRows;
  const int tiles_of_token = p.experts_per_token * tiles_of_expert;
  const int tiles = shared_tiles + kTokens * tiles_of_token;
  const Share<Experts::kSteps> share(p.hidden_size / kStep);
  bool waits = true;  // for the choice
  Rows gate, up;      // of the tile whose weights are loaded
  const auto start_tile = [&](int tile) {
    const bool shared = tile < shared_tiles;
    int64_t row = tile * kTileRows;
    if (!shared) {
      if (waits) {
        ptx::MbarrierWait(&chosen, 0);
        waits = false;
      }
      const int token = kTokens > 1 ? (tile - shared_tiles) / tiles_of_token : 0;
      const int place = tile - shared_tiles - token * tiles_of_token;
      const int number = place / tiles_of_expert;
      const int64_t expert = choices[token].experts[number];
      row = expert * p.expert_size + (place - number * tiles_of_expert) * kTileRows;
    }
    gate = Rows(T(), shared ? p.shared_gate : p.gate, row, p.hidden_size);
    up = Rows(T(), shared ? p.shared_up : p.up, row, p.hidden_size);
    return share.At(gate, share.begin);
  };
  int tile = blockIdx.x;
  Weights weights[Experts::kSteps];
  Batch batch;
  const bool starts_shared = tile < shared_tiles;
  if (starts_shared) {
    batch = start_tile(tile);
    Load(batch, weights);
  }
  LoadScale<T, kTokens>(p.norm, p.hidden_size, x);
  // With experts, the router comes in between, which has waited for the hidden states before it let
  // this kernel start.
  if (p.experts == 0) ptx::WaitForPreviousKernel();
  Normalize<T, kTokens, /*kWaited=*/false>(p.hidden, p.hidden_size, p.norm_eps, x);
  if (!starts_shared && tile < tiles) {
    batch = start_tile(tile);
    Load(batch, weights);
  }

  Sums sums;
  bool is_up = false;
  int turn = 0;
  while (tile < tiles) {
    const bool shared = tile < shared_tiles;
    const int token = kTokens > 1 && !shared ? (tile - shared_tiles) / tiles_of_token : 0;
    const int own = shared ? min(lane.token, kTokens - 1) : token;
    Batch next;
    if (!batch.ends_row) {
      next = share.At(is_up ? up : gate, batch.begin + Experts::kSteps);
    } else if (!is_up) {
      next = share.At(up, share.begin);
    } else if (tile + static_cast<int>(gridDim.x) < tiles) {
      next = start_tile(tile + gridDim.x);
    }
    MultiplyAndLoad<T>(batch, x + own * pieces + lane.piece, next, weights, sums);
    const bool ends_row = batch.ends_row;
    batch = next;
    if (!ends_row) continue;
    partials[turn][is_up].Put(sums);
    is_up = !is_up;
    if (is_up) continue;
    Meet();
    const int row = threadIdx.x % kTileRows, number = threadIdx.x / kTileRows;
    if (number < (shared ? kTokens : 1)) {
      float result =
          Swiglu(partials[turn][0].Total(number, row), partials[turn][1].Total(number, row));
      int64_t place = int64_t{p.act_size()} * (token + number) + row;
      if (shared) {
        place += int64_t{tiles_of_token + tile} * kTileRows;
      } else {
        const int of_token = tile - shared_tiles - token * tiles_of_token;
        place += of_token * kTileRows;
        result *= choices[token].weights[of_token / tiles_of_expert];
      }
      Store<T>(p.act, place, result);
    }
    turn ^= 1;
    tile += gridDim.x;
  }
}

// The second half. A row of the result is the sum over rows of a token's own experts, one after the
// other, and over one of the shared ones; so lie the vectors, too. A warp first has its share of
// the shared experts' row, and then that of each token's own ones.
template <typename T, int kTokens>
__global__ void __launch_bounds__(kThreads, Down::kBlocks) DownKernel(const MlpParams p) {
  extern __shared__ uint4 act[];
  __shared__ Partial<kTokens> partials[2];
  __shared__ int32_t choices[kWarps][kTokens * kMaxExpertsPerToken];
  int32_t* const chosen = choices[threadIdx.x / kWarp];
  const Lane lane;
  const int pieces = p.act_size() / kPiece, tiles = p.hidden_size / kTileRows;
  const int expert_steps = p.expert_size / kStep;
  const int routed_steps = p.experts_per_token * expert_steps;
  const Share<Down::kSteps> shared(p.shared_size / kStep), routed(routed_steps);
  const int last_token = p.experts > 0 ? kTokens - 1 : -1;

  struct {
    int tile, token, step;  // the shared experts are token -1's
  } ahead{static_cast<int>(blockIdx.x), -1, shared.begin};
  const auto following = [&]() -> Batch {
    if (ahead.tile >= tiles) return {};
    const int64_t row = int64_t{ahead.tile} * kTileRows;
    Batch batch;
    if (ahead.token < 0) {
      batch = shared.At(Rows(T(), p.shared_down, row, p.shared_size), ahead.step);
      batch.begin += routed_steps;
    } else {
      const int number = ahead.step / expert_steps, first = number * expert_steps;
      const int64_t expert = chosen[ahead.token * p.experts_per_token + number];
      const Rows rows(T(), p.down, expert * p.hidden_size + row, p.expert_size);
      const int end = min(routed.end, first + expert_steps);
      batch.weights = rows.At(ahead.step - first);
      batch.begin = ahead.step;
      batch.count = min(end - ahead.step, Down::kSteps);
      batch.ends_row = ahead.step + batch.count == routed.end;
    }
    ahead.step += batch.count;
    if (batch.ends_row && ahead.token == last_token) {
      ahead = {ahead.tile + static_cast<int>(gridDim.x), -1, shared.begin};
    } else if (batch.ends_row) {
      ahead = {ahead.tile, ahead.token + 1, routed.begin};
    }
    return batch;
  };
  Weights weights[Down::kSteps];
  Batch batch = following();
  Load(batch, weights);
  ptx::WaitForPreviousKernel();
  ptx::LetNextKernelStart();
  const uint4* from = Pieces<T>(p.act, 0);
  CopySteps<kTokens>(act, from, pieces, routed.begin, routed.end);
  CopySteps<kTokens>(act, from, pieces, routed_steps + shared.begin, routed_steps + shared.end);
  for (int i = lane.number; i < kTokens * p.experts_per_token; i += kWarp) chosen[i] = p.chosen[i];
  ptx::CpAsyncWaitAll();
  __syncwarp();

  Sums sums;
  int turn = 0;
  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x, turn ^= 1) {
    Partial<kTokens>& partial = partials[turn];
    for (int token = -1; token <= last_token; ++token) {
      const int vector = token < 0 ? min(lane.token, kTokens - 1) : token;
      const uint4* own = act + vector * pieces + lane.piece;
      for (bool ends_row = false; !ends_row;) {
        const Batch next = following();
        MultiplyAndLoad<T>(batch, own, next, weights, sums);
        ends_row = batch.ends_row;
        batch = next;
      }
      if (token < 0) {
        partial.Put(sums);
      } else {
        partial.AddTo(token, sums);
      }
    }
    Meet();
    if (threadIdx.x < kTokens * kTileRows) {
      const int token = threadIdx.x / kTileRows, row = threadIdx.x % kTileRows;
      const int64_t place = int64_t{token} * p.hidden_size + tile * kTileRows + row;
      Store<T>(p.out, place, partial.Total(token, row) + Number<T>(p.hidden, place));
    }
  }
}

// --- Launches --------------------------------------------------------------------------------

Status Failed(const char* what, cudaError_t error) {
  cudaGetLastError();  // or the next call on this thread would find it
  return {StatusCode::kInternal, std::string(what) + ": " + cudaGetErrorString(error)};
}

// When a kernel may start: while the one before it ends, which has waited for those before; or when
// all before it have ended.
enum class Start { kEarly, kAfterAll };

struct Grid {
  int64_t blocks;
  int threads = kThreads;
  int64_t shared_bytes = 0;
  int cluster = 1;
};

// Threads that launch a kernel at the same time, for models of different sizes, all ask for so
// much, so that none lowers what another one needs. It leaves room for what kernels have of their
// own.
constexpr int64_t kAskedShared = 200 * 1024;

// Shared memory of a multiprocessor, the rest being L1, in percent of the most: for two blocks, and
// 96 KB at least, so that kernels that need little all ask for the same. It has to be said: left to
// the driver, a kernel that starts while attention ends keeps what that had, and with so little L1
// fewer loads are on their way.
int Carveout(int64_t shared_bytes) {
  constexpr int64_t kLeastCarveout = 96 * 1024, kMostCarveout = 228 * 1024;
  constexpr int64_t kOwnShared = 4 * 1024;  // at most: a block's beside what a launch asks for
  const int64_t bytes = std::max(2 * (shared_bytes + kOwnShared), kLeastCarveout);
  return static_cast<int>(std::min<int64_t>((bytes * 100 - 1) / kMostCarveout + 1, 100));
}

template <typename... Params, typename... Arguments>
Status Launch(Start start, void (*kernel)(Params...), const Grid& grid, cudaStream_t stream,
              const Arguments&... arguments) {
  cudaError_t error =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(std::max(grid.shared_bytes, kAskedShared)));
  if (error == cudaSuccess) {
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                 Carveout(grid.shared_bytes));
  }
  if (error != cudaSuccess) return Failed("shared memory", error);
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(grid.cluster), 1, 1};
  attributes[1].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(grid.threads);
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = start == Start::kEarly ? 2 : 1;
  error = cudaLaunchKernelEx(&config, kernel, arguments...);
  return error == cudaSuccess ? Status{} : Failed("launch", error);
}

// Calls `launch` with a number of the element type, the number of tokens as a type, and how many
// multiprocessors there are.
template <typename Function>
Status Dispatch(DType dtype, int tokens, Function launch) {
  int device = 0, multiprocessors = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  }
  if (error != cudaSuccess) return Failed("device", error);
  const auto with_tokens = [&](auto element) -> Status {
    switch (tokens) {
      case 1:
        return launch(element, std::integral_constant<int, 1>(), multiprocessors);
      case 2:
        return launch(element, std::integral_constant<int, 2>(), multiprocessors);
      case 3:
        return launch(element, std::integral_constant<int, 3>(), multiprocessors);
      case 4:
        return launch(element, std::integral_constant<int, 4>(), multiprocessors);
    }
    return {StatusCode::kInvalidArgument, "1 to 4 tokens, got " + std::to_string(tokens)};
  };
  return dtype == DType::kBF16 ? with_tokens(__nv_bfloat16()) : with_tokens(__half());
}

constexpr int64_t Blocks(int64_t warps) { return (warps + kWarps - 1) / kWarps; }

}  // namespace

Status FewProject(const ProjectParams& p, bool is_first, cudaStream_t stream) {
  return Dispatch(p.dtype, p.tokens, [&](auto element, auto tokens, int64_t multiprocessors) {
    using T = decltype(element);
    constexpr int kTokens = decltype(tokens)::value;
    const int64_t number = kTokens * int64_t{sizeof(T)};
    const int queries = p.heads * kQueryDim;
    const bool low = p.q_rank > 0;
    const LinearParams first{.x = p.hidden,
                             .norm = p.norm,
                             .residual = nullptr,
                             .eps = p.norm_eps,
                             .size = p.hidden_size,
                             .rows = {low ? p.q_rank : queries, kHeadDim},
                             .w = {p.w_q, p.w_kv},
                             .out = {low ? p.q_low : p.q_expanded, p.kv_raw}};
    // Weights are read before the kernels before have ended: those of a call's first one may have
    // been made by them.
    const Start start = is_first ? Start::kAfterAll : Start::kEarly;
    Status status = Launch(
        start, LinearKernel<T, kTokens>,
        {.blocks = Linear::kBlocks * multiprocessors, .shared_bytes = number * p.hidden_size},
        stream, first);
    if (status.ok() && low) {
      const LinearParams second{.x = p.q_low,
                                .norm = p.q_norm,
                                .residual = nullptr,
                                .eps = p.latent_eps,
                                .size = p.q_rank,
                                .rows = {queries, 0},
                                .w = {p.w_q_b, nullptr},
                                .out = {p.q_expanded, nullptr}};
      status =
          Launch(Start::kEarly, LinearKernel<T, kTokens>,
                 {.blocks = Linear::kBlocks * multiprocessors, .shared_bytes = number * p.q_rank},
                 stream, second);
    }
    if (!status.ok()) return status;
    const int64_t units = int64_t{p.heads} * kColumnGroups + kTokens * (p.heads + 1);
    return Launch(Start::kEarly, AbsorbKernel<T, kTokens>, {.blocks = Blocks(units)}, stream, p);
  });
}

Status FewOutput(const OutputParams& p, cudaStream_t stream) {
  return Dispatch(p.dtype, p.tokens, [&](auto element, auto tokens, int64_t multiprocessors) {
    using T = decltype(element);
    constexpr int kTokens = decltype(tokens)::value;
    const int values = p.heads * p.v_dim;
    const auto kernel = p.attention.half_partials() ? ValuesKernel<T, __half, kTokens>
                                                    : ValuesKernel<T, float, kTokens>;
    const Status status =
        Launch(Start::kEarly, kernel,
               {.blocks = int64_t{p.heads} * kHeadBlocks, .cluster = kHeadBlocks}, stream, p);
    if (!status.ok()) return status;
    const LinearParams linear{.x = p.values,
                              .norm = nullptr,
                              .residual = p.hidden,
                              .eps = 0,
                              .size = values,
                              .rows = {p.hidden_size, 0},
                              .w = {p.w_o, nullptr},
                              .out = {p.out, nullptr}};
    return Launch(Start::kEarly, LinearKernel<T, kTokens>,
                  {.blocks = Linear::kBlocks * multiprocessors,
                   .shared_bytes = kTokens * int64_t{sizeof(T)} * values},
                  stream, linear);
  });
}

Status FewMlp(const MlpParams& p, cudaStream_t stream) {
  return Dispatch(p.dtype, p.tokens, [&](auto element, auto tokens, int64_t multiprocessors) {
    using T = decltype(element);
    constexpr int kTokens = decltype(tokens)::value;
    const int64_t number = kTokens * int64_t{sizeof(T)};
    Status status;
    if (p.experts > 0) {
      status = Launch(Start::kEarly, RouterKernel<T, kTokens>,
                      {.blocks = p.experts, .shared_bytes = number * p.hidden_size}, stream, p);
    }
    if (status.ok()) {
      status = Launch(Start::kEarly, ExpertsKernel<T, kTokens>,
                      {.blocks = Experts::kBlocks * multiprocessors,
                       .threads = kThreads + kWarp,
                       .shared_bytes = number * p.hidden_size},
                      stream, p);
    }
    if (!status.ok()) return status;
    return Launch(
        Start::kEarly, DownKernel<T, kTokens>,
        {.blocks = Down::kBlocks * multiprocessors, .shared_bytes = number * p.act_size()}, stream,
        p);
  });
}

Status FewLogits(const LogitsParams& p, cudaStream_t stream) {
  return Dispatch(p.dtype, p.tokens, [&](auto element, auto tokens, int64_t multiprocessors) {
    using T = decltype(element);
    constexpr int kTokens = decltype(tokens)::value;
    const LinearParams linear{.x = p.hidden,
                              .norm = nullptr,
                              .residual = nullptr,
                              .eps = 0,
                              .size = p.hidden_size,
                              .rows = {p.vocab_size, 0},
                              .w = {p.w, nullptr},
                              .out = {p.logits, nullptr}};
    // The weights may just have been made, as those of FewProject.
    return Launch(Start::kAfterAll, LinearKernel<T, kTokens, float>,
                  {.blocks = Linear::kBlocks * multiprocessors,
                   .shared_bytes = kTokens * int64_t{sizeof(T)} * p.hidden_size},
                  stream, linear);
  });
}

}  // namespace flashmla::sm90
