// The routed experts of a mixture: blocks of rows, each through the gated MLP of its own expert.
//
// Two products, in which weights are the long side and rows the short one: in wgmma's terms 64 rows
// of weights times 16 to 128 tokens, both as they lie in memory. With few tokens for each expert
// the time is that of reading the weights, once for each block. So one warp does nothing but ask
// for them: a ring of stages, a line or two of all of a tile's rows, that goes on from one tile to
// the next, while one or two warpgroups multiply what has come and write results from their
// registers.
//
// Every multiprocessor has one thread block, which walks over tiles: a block of rows and some of
// its features. All features of a block follow each other, and then those of the next block, often
// of the same expert: what tiles have in common is in the L2 cache. The second product's thread
// blocks begin where the first one's have ended, and have their first weights on the way when the
// last of those end.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <type_traits>

#include "sm90/attention/common.cuh"
#include "sm90/attention/launch.cuh"
#include "sm90/kernels.h"
#include "sm90/ptx.cuh"
#include "sm90/swiglu.cuh"
#include "sm90/tensor_map.cuh"

namespace flashmla::sm90 {
namespace {

constexpr int kWarp = 32;
constexpr int kGroupThreads = 128;
constexpr int kPartRows = 64;           // of weights, in one wgmma
constexpr int kStep = 16;               // numbers of a row that one wgmma multiplies
constexpr int kBarrierBytes = 1024;     // at most
constexpr int kLineBytes = kPanel * 2;  // of a row: a line, swizzled

// A tile: of each warpgroup kParts times kPartRows rows of weights. Of the gated product the first
// part belongs to the gate, and the other one to what it multiplies.
template <int kBlockRows, bool kIsGated>
struct Tile {
  static constexpr int kRows = kBlockRows;
  static constexpr bool kGated = kIsGated;
  // 128 rows are a matter of products, not of reading weights.
  static constexpr int kGroups = kRows > 64 ? 2 : 1;
  // Where there is little to read besides weights, small tiles end together.
  static constexpr int kParts = kGated || kRows > 32 ? 2 : 1;
  // Where weights are what there is to read, two lines of a row follow each other, as memory has
  // it.
  static constexpr int kLines = kRows > 64 ? 1 : 2;
  // An expert with many rows has several blocks, which read the same weights.
  static constexpr uint64_t kPolicy = kRows > 64 ? ptx::kEvictNormal : ptx::kEvictFirst;
  static constexpr int kWeightRows = kGroups * kParts * kPartRows;
  static constexpr int kFeatures = kGated ? kWeightRows / 2 : kWeightRows;
  static constexpr int kThreads = kGroups * kGroupThreads + kWarp;
  static constexpr int kStageBytes = kLines * (kWeightRows + kRows) * kLineBytes;
  static constexpr int kStages = (kMaxSharedBytes - kBarrierBytes) / kStageBytes;
  static_assert(kStages >= 3, "two for products that are under way, and one that is loaded");
};

template <typename Shape>
struct SharedMemory {
  struct Stage {
    uint8_t weights[Shape::kLines][Shape::kWeightRows * kLineBytes];
    uint8_t rows[Shape::kLines][Shape::kRows * kLineBytes];
  };
  Stage stages[Shape::kStages];
  uint64_t full[Shape::kStages];
  uint64_t empty[Shape::kStages];
  static_assert(2 * sizeof(full) <= kBarrierBytes);
};

struct Product {
  int size;      // numbers of a row
  int features;  // of a result
  int blocks, experts;
  const int32_t* expert_of_block;
  void* out;  // [blocks, rows, features]
};

struct Maps {
  CUtensorMap weights[2];  // [experts, features, size], the gate first
  CUtensorMap rows;        // [blocks * rows, size]
};

// Sums are read by nothing that comes before this.
template <int kParts, int kEach>
__device__ __forceinline__ void KeepAfter(float (&sums)[kParts][kEach]) {
#pragma unroll
  for (int part = 0; part < kParts; ++part) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) asm volatile("" : "+f"(sums[part][i])::"memory");
  }
}

// A warpgroup's part of a product, 64 features of all rows, from a thread's accumulators: of
// features lane / 4 and 8 more, and in turn j of rows 8 j + 2 (lane % 4) and the next.
template <typename T, int kRows>
__device__ __forceinline__ void Store(const float (&d)[kRows / 2], const Product& p, int64_t row,
                                      int feature) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x % kGroupThreads / kWarp;
  feature += warp * 16 + 2 * (lane % 4);
  auto* out = static_cast<T*>(p.out) + (row + lane / 4) * p.features + feature;
#pragma unroll
  for (int j = 0; j < kRows / 8; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float* x = d + 4 * j + 2 * half;
      const uint32_t pair = ptx::Transpose(Pack(T{}, x[0], x[1]));
      if (feature + 8 * half < p.features) {
        *reinterpret_cast<uint32_t*>(out + int64_t{8} * j * p.features + 8 * half) = pair;
      }
    }
  }
}

// Of the first product, the gated one, nothing may be read before the kernel before has ended; of
// the second one only the rows come from there.
template <typename T, typename Shape>
__global__ void __launch_bounds__(Shape::kThreads, 1)
    Kernel(const Product p, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) uint8_t raw[];
  constexpr int kStages = Shape::kStages, kLines = Shape::kLines, kParts = Shape::kParts;
  auto& shared = *reinterpret_cast<SharedMemory<Shape>*>(raw);
  if (threadIdx.x == 0) {
    if (ptx::SmemAddress(raw) % 1024 != 0) __trap();  // swizzled lines need it
#pragma unroll 1
    for (int i = 0; i < kStages; ++i) {
      ptx::MbarrierInit(&shared.full[i], 1);
      ptx::MbarrierInit(&shared.empty[i], Shape::kGroups * kGroupThreads);
    }
    ptx::FenceMbarrierInit();
  }
  if constexpr (Shape::kGated) {
    ptx::WaitForPreviousKernel();
    ptx::LetNextKernelStart();
  }
  // Blocks without rows come last.
  int used = 0;
  for (int first = 0; first < p.blocks; first += Shape::kThreads) {
    const int block = first + static_cast<int>(threadIdx.x);
    used += __syncthreads_count(block < p.blocks && p.expert_of_block[block] < p.experts);
  }
  const int tiles_each = (p.features + Shape::kFeatures - 1) / Shape::kFeatures;
  const int tiles = used * tiles_each;
  const int steps = (p.size + kLines * kPanel - 1) / (kLines * kPanel);
  const int group = static_cast<int>(ptx::Uniform(threadIdx.x / kGroupThreads));
  Ring<kStages> ring;

  if (group == Shape::kGroups) {  // the warp that asks for lines
    if (!ptx::ElectOne()) return;
    int tile = blockIdx.x;
    if (tile >= tiles) {  // this grid may not end before the one that it depends on
      if constexpr (!Shape::kGated) ptx::WaitForPreviousKernel();
      return;
    }
    int row, feature, expert;
    const auto find = [&] {
      const int block = tile / tiles_each;
      row = block * Shape::kRows;
      feature = tile % tiles_each * Shape::kFeatures;
      expert = p.expert_of_block[block];
    };
    const auto load_weights = [&](int step) {
      auto& stage = shared.stages[ring.slot];
      uint64_t* full = &shared.full[ring.slot];
      ptx::MbarrierArriveExpectTx(full, Shape::kStageBytes);
      constexpr int kMaps = Shape::kGated ? 2 : 1;
#pragma unroll
      for (int i = 0; i < kMaps; ++i) {
#pragma unroll
        for (int line = 0; line < kLines; ++line) {
          ptx::TmaLoad4D(stage.weights[line] + i * Shape::kFeatures * kLineBytes, &maps.weights[i],
                         full, (step * kLines + line) * kPanel, feature, expert, 0, Shape::kPolicy);
        }
      }
    };
    const auto load_rows = [&](int step) {
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
        ptx::TmaLoad5D(shared.stages[ring.slot].rows[line], &maps.rows, &shared.full[ring.slot],
                       (step * kLines + line) * kPanel, row, 0, 0, 0);
      }
    };
    find();
    const int ahead = min(kStages, steps);
    for (int step = 0; step < ahead; ++step) {
      load_weights(step);
      ring.Advance();
    }
    if constexpr (!Shape::kGated) ptx::WaitForPreviousKernel();
    ring = {};
    for (int step = 0; step < ahead; ++step) {
      load_rows(step);
      ring.Advance();
    }
    for (int step = ahead;; step = 0) {
      for (; step < steps; ++step) {
        ptx::MbarrierWait(&shared.empty[ring.slot], ring.parity ^ 1);
        load_weights(step);
        load_rows(step);
        ring.Advance();
      }
      tile += gridDim.x;
      if (tile >= tiles) return;
      find();
    }
  }

  for (int tile = blockIdx.x; tile < tiles; tile += gridDim.x) {
    float sums[kParts][Shape::kRows / 2];
    const auto multiply = [&](int accumulate) {
      ptx::MbarrierWait(&shared.full[ring.slot], ring.parity);
      const auto& stage = shared.stages[ring.slot];
      ptx::WgmmaFence();
#pragma unroll
      for (int line = 0; line < kLines; ++line) {
        const uint64_t rows = ptx::Descriptor<ptx::KMajor>(ptx::SmemAddress(stage.rows[line]));
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          // Of the gated product all groups' first parts come first.
          const int place = Shape::kGated ? part * Shape::kGroups + group : group * kParts + part;
          const uint64_t weights = ptx::Descriptor<ptx::KMajor>(
              ptx::SmemAddress(stage.weights[line]) + place * kPartRows * kLineBytes);
#pragma unroll
          for (int i = 0; i < kPanel / kStep; ++i) {
            ptx::WgmmaM64<T, 0>(sums[part], ptx::Advance(weights, i * kStep * 2),
                                ptx::Advance(rows, i * kStep * 2), line + i > 0 ? 1 : accumulate);
          }
        }
      }
      ptx::WgmmaCommit();
    };
    multiply(0);
    int before = ring.slot;
    ring.Advance();
    for (int step = 1; step < steps; ++step) {
      multiply(1);
      ptx::WgmmaWait<1>();
      ptx::MbarrierArrive(&shared.empty[before]);
      before = ring.slot;
      ring.Advance();
    }
    ptx::WgmmaWait<0>();
    KeepAfter(sums);
    ptx::MbarrierArrive(&shared.empty[before]);

    const int64_t row = int64_t{tile / tiles_each} * Shape::kRows;
    const int feature =
        tile % tiles_each * Shape::kFeatures + group * (Shape::kFeatures / Shape::kGroups);
    if constexpr (Shape::kGated) {
#pragma unroll
      for (int i = 0; i < Shape::kRows / 2; ++i) sums[0][i] = Swiglu(sums[0][i], sums[1][i]);
      Store<T, Shape::kRows>(sums[0], p, row, feature);
    } else {
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        Store<T, Shape::kRows>(sums[part], p, row, feature + part * kPartRows);
      }
    }
  }
}

Status MakeWeightMap(const GroupedMlpParams& p, const void* data, int64_t features, int64_t size,
                     int box, CUtensorMap* map) {
  const cuuint64_t line = size * 2, expert = features * line;
  return MakeMap<4>(p.dtype, data,
                    {static_cast<cuuint64_t>(size), static_cast<cuuint64_t>(features),
                     static_cast<cuuint64_t>(p.experts), 1},
                    {line, expert, expert}, {kPanel, static_cast<cuuint32_t>(box), 1, 1},
                    CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE, map);
}

template <typename T, typename Shape>
Status LaunchProduct(const GroupedMlpParams& p, int multiprocessors, cudaStream_t stream) {
  constexpr bool kGated = Shape::kGated;
  const int64_t size = kGated ? p.hidden_size : p.expert_size;
  const int64_t features = kGated ? p.expert_size : p.hidden_size;
  const Product product{.size = static_cast<int>(size),
                        .features = static_cast<int>(features),
                        .blocks = static_cast<int>(p.blocks),
                        .experts = static_cast<int>(p.experts),
                        .expert_of_block = p.expert_of_block,
                        .out = kGated ? p.act : p.out};
  Maps maps{};
  const void* weights[] = {kGated ? p.gate : p.down, p.up};
  Status status;
  for (int i = 0; i < (kGated ? 2 : 1) && status.ok(); ++i) {
    status = MakeWeightMap(p, weights[i], features, size, Shape::kFeatures, &maps.weights[i]);
  }
  if (status.ok()) {
    const cuuint64_t line = size * 2, all = p.blocks * p.rows * line;
    status = MakeMap<5>(
        p.dtype, kGated ? p.tokens : p.act,
        {static_cast<cuuint64_t>(size), static_cast<cuuint64_t>(p.blocks * p.rows), 1, 1, 1},
        {line, all, all, all}, {kPanel, Shape::kRows, 1, 1, 1}, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        &maps.rows);
  }
  if (!status.ok()) return status;
  const int64_t tiles = p.blocks * ((features + Shape::kFeatures - 1) / Shape::kFeatures);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(multiprocessors, tiles));
  return Launch(Kernel<T, Shape>, dim3(blocks), Shape::kThreads,
                static_cast<int>(sizeof(SharedMemory<Shape>)), 1, stream, product, maps);
}

template <typename T, int kRows>
Status LaunchBoth(const GroupedMlpParams& p, int multiprocessors, cudaStream_t stream) {
  const Status status = LaunchProduct<T, Tile<kRows, true>>(p, multiprocessors, stream);
  return status.ok() ? LaunchProduct<T, Tile<kRows, false>>(p, multiprocessors, stream) : status;
}

template <typename T>
Status LaunchFor(const GroupedMlpParams& p, int multiprocessors, cudaStream_t stream) {
  switch (p.rows) {
    case 16:
      return LaunchBoth<T, 16>(p, multiprocessors, stream);
    case 32:
      return LaunchBoth<T, 32>(p, multiprocessors, stream);
    case 64:
      return LaunchBoth<T, 64>(p, multiprocessors, stream);
    case 128:
      return LaunchBoth<T, 128>(p, multiprocessors, stream);
  }
  return {StatusCode::kInvalidArgument,
          "blocks must be of 16, 32, 64 or 128 rows, got " + std::to_string(p.rows)};
}

}  // namespace

Status GroupedMlp(const GroupedMlpParams& p, cudaStream_t stream) {
  if (p.blocks == 0 || p.experts == 0) return {};
  for (const int64_t size : {p.hidden_size, p.expert_size}) {
    if (size > 0 && size % kGroupedAlignment == 0 && size <= kMaxGroupedSize) continue;
    return {StatusCode::kInvalidArgument,
            "sizes must be multiples of " + std::to_string(kGroupedAlignment) + " and at most " +
                std::to_string(kMaxGroupedSize) + ", got " + std::to_string(size)};
  }
  // Tiles are counted, and rows.
  const int64_t largest = std::max(p.hidden_size, p.expert_size);
  if (p.blocks * std::max<int64_t>(p.rows, largest / kPartRows + 1) > INT32_MAX / 2 ||
      p.experts > INT32_MAX) {
    return {StatusCode::kInvalidArgument, "too many blocks: " + std::to_string(p.blocks)};
  }
  for (const void* data : {p.tokens, p.gate, p.up, p.down, static_cast<const void*>(p.act)}) {
    if (reinterpret_cast<uintptr_t>(data) % 16 == 0) continue;
    return {StatusCode::kInvalidArgument, "rows and weights must be aligned to 16 bytes"};
  }
  int multiprocessors = 0;
  const Status status = FindDevice(&multiprocessors);
  if (!status.ok()) return status;
  return p.dtype == DType::kBF16 ? LaunchFor<__nv_bfloat16>(p, multiprocessors, stream)
                                 : LaunchFor<__half>(p, multiprocessors, stream);
}

}  // namespace flashmla::sm90
