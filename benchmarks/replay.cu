// The Hopper kernels alone, without JAX: times from replays of CUDA graphs, and a check against
// plain loops. For work on the kernels: builds of two versions compare within one run. From the
// repository's root:
//
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -Icsrc
//       benchmarks/replay.cu csrc/sm90/attention/*.cu -o replay
//   ./replay check                          random calls, each three times: correct, the same bits
//   ./replay time 128 1 128 4096 varlen     batch, s_q, h_q, tokens each: uniform or varlen
//   ./replay table                          small batches, 16 and 128 heads
//
// Options, in front: --batch-invariant; --nested: each call is a graph of its own in the graph, as
// XLA nests them; --cool: a pause before each replay, so that the GPU's power does not limit it.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "params.h"
#include "sm90/kernels.h"

namespace flashmla {
namespace {

struct Options {
  bool batch_invariant = false, nested = false, cool = false;
} options;

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) Check((call), #call)

struct Case {
  int batch, s_q, h_q, length;
  bool varlen = false;
  int h_kv = 1;
};

std::vector<int> Lengths(const Case& c, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<double> normal(c.length, c.length / 2.);
  std::vector<int> lengths(c.batch, c.length);
  for (int& length : lengths) {
    if (c.varlen) length = std::clamp(static_cast<int>(normal(random)), c.s_q, 4 * c.length);
  }
  return lengths;
}

int PagesOf(int tokens) { return (tokens + kPageSize - 1) / kPageSize; }

__global__ void FillRandom(__nv_bfloat16* numbers, size_t count, uint64_t seed) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    uint64_t z = (i + 1) * 0x9E3779B97F4A7C15 + seed * 0xD1B54A32D192ED03;
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9;
    z = (z ^ z >> 27) * 0x94D049BB133111EB;
    float sum = -2;  // of four uniform numbers: nearly normal
    for (int k = 0; k < 4; ++k) sum += (z >> 16 * k & 0xFFFF) / 65536.f;
    numbers[i] = __float2bfloat16(sum * 1.732f);
  }
}

// A thread block for each query row; scores in shared memory.
__global__ void PlainLoops(DenseDecodeParams p, float* out, float* lse) {
  extern __shared__ float scores[];
  __shared__ double highest, total;
  const int head = blockIdx.x % p.h_q, token = blockIdx.x / p.h_q % p.s_q;
  const int batch = blockIdx.x / p.h_q / p.s_q, kv_head = head / p.group();
  const int64_t row = (batch * p.s_q + token) * p.h_q + head;
  const auto* q = static_cast<const __nv_bfloat16*>(p.q) + row * kHeadDim;
  const auto key = [&](int t) {
    const int64_t page = p.block_table[batch * p.max_pages_per_seq + t / kPageSize];
    const int64_t place = (page * kPageSize + t % kPageSize) * p.h_kv + kv_head;
    return static_cast<const __nv_bfloat16*>(p.k_cache) + place * kHeadDim;
  };
  const int length = p.cache_seqlens[batch];
  const int visible = max(0, static_cast<int>(p.causal ? length - p.s_q + token + 1 : length));
  for (int t = threadIdx.x; t < visible; t += blockDim.x) {
    double score = 0;
    for (int d = 0; d < kHeadDim; ++d)
      score += __bfloat162float(q[d]) * __bfloat162float(key(t)[d]);
    scores[t] = score * p.softmax_scale;
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    highest = -INFINITY, total = 0;
    for (int t = 0; t < visible; ++t) highest = fmax(highest, scores[t]);
    for (int t = 0; t < visible; ++t) total += exp(scores[t] - highest);
    lse[(batch * p.h_q + head) * p.s_q + token] = visible > 0 ? highest + log(total) : -INFINITY;
  }
  __syncthreads();
  for (int d = threadIdx.x; d < kHeadDimV; d += blockDim.x) {
    double sum = 0;
    for (int t = 0; t < visible; ++t) {
      sum += exp(scores[t] - highest) * __bfloat162float(key(t)[d]);
    }
    out[row * kHeadDimV + d] = visible > 0 ? sum / total : 0;
  }
}

// Several calls of one shape, on pages and results of their own.
class Problem {
 public:
  Problem(const Case& c, int calls, uint32_t seed) : lengths(Lengths(c, seed)) {
    int64_t pages = 0, most = 1;
    for (int length : lengths) {
      pages += PagesOf(length);
      most = std::max<int64_t>(most, PagesOf(length));
    }
    DenseDecodeParams p{};
    p.batch = c.batch, p.s_q = c.s_q, p.h_q = c.h_q, p.h_kv = c.h_kv;
    p.num_pages = pages * calls + 1, p.max_pages_per_seq = most;
    p.softmax_scale = 1 / std::sqrt(768.f);
    p.causal = c.s_q > 1;
    p.batch_invariant = options.batch_invariant;
    p.dtype = DType::kBF16;
    p.k_cache = Random(p.num_pages * kPageSize * c.h_kv * kHeadDim, seed);
    const int64_t rows = p.workspace_slots() * p.tile_rows();
    p.partial_out = Poison(rows * p.partial_row_bytes());
    p.partial_stats = static_cast<float*>(Poison(rows * 16));
    p.merges = static_cast<int32_t*>(Poison(p.max_partitions() * kMergeWords * 4));

    std::vector<int> order(p.num_pages);
    std::iota(order.begin(), order.end(), 0);
    std::shuffle(order.begin(), order.end(), std::mt19937(seed));
    auto next = order.begin();
    const int64_t queries = int64_t{c.batch} * c.s_q * c.h_q;
    for (int call = 0; call < calls; ++call) {
      std::vector<int> table(c.batch * most, -1);
      for (int b = 0; b < c.batch; ++b) {
        for (int i = 0; i < PagesOf(lengths[b]); ++i) table[b * most + i] = *next++;
      }
      p.block_table = Copy(table);
      p.cache_seqlens = Copy(lengths);
      p.q = Random(queries * kHeadDim, seed + 1 + call);
      p.out = Poison(queries * kHeadDimV * 2);
      p.lse = static_cast<float*>(Poison(queries * 4));
      this->calls.push_back(p);
    }
    CHECK(cudaDeviceSynchronize());
  }
  ~Problem() {
    for (void* memory : memory_) cudaFree(memory);
  }

  // Memory of NaN.
  void* Poison(int64_t bytes) {
    void* memory;
    CHECK(cudaMalloc(&memory, std::max<int64_t>(bytes, 256)));
    CHECK(cudaMemset(memory, 0xFF, bytes));
    memory_.push_back(memory);
    return memory;
  }

  const std::vector<int> lengths;
  std::vector<DenseDecodeParams> calls;

 private:
  void* Random(int64_t numbers, uint64_t seed) {
    void* memory = Poison(numbers * 2);
    FillRandom<<<2048, 256>>>(static_cast<__nv_bfloat16*>(memory), numbers, seed);
    return memory;
  }
  int* Copy(const std::vector<int>& numbers) {
    void* memory = Poison(numbers.size() * 4);
    CHECK(cudaMemcpy(memory, numbers.data(), numbers.size() * 4, cudaMemcpyHostToDevice));
    return static_cast<int*>(memory);
  }
  std::vector<void*> memory_;
};

void Run(const DenseDecodeParams& p, cudaStream_t stream) {
  const sm90::Status status = sm90::DenseDecode(p, stream);
  if (status.ok()) return;
  std::printf("%s\n", status.message.c_str());
  std::exit(1);
}

template <typename T>
std::vector<T> ToHost(const void* memory, int64_t count) {
  std::vector<T> numbers(count);
  CHECK(cudaMemcpy(numbers.data(), memory, count * sizeof(T), cudaMemcpyDeviceToHost));
  return numbers;
}

bool IsCorrect(const Case& c, uint32_t seed) {
  Problem problem(c, 1, seed);
  const DenseDecodeParams& p = problem.calls[0];
  const int64_t rows = p.batch * p.s_q * p.h_q;
  float* out = static_cast<float*>(problem.Poison(rows * kHeadDimV * 4));
  float* lse = static_cast<float*>(problem.Poison(rows * 4));
  const int longest = *std::max_element(problem.lengths.begin(), problem.lengths.end());
  CHECK(cudaFuncSetAttribute(PlainLoops, cudaFuncAttributeMaxDynamicSharedMemorySize, 200 << 10));
  PlainLoops<<<rows, 128, longest * 4 + 4>>>(p, out, lse);
  CHECK(cudaDeviceSynchronize());
  const auto expected = ToHost<float>(out, rows * kHeadDimV),
             expected_lse = ToHost<float>(lse, rows);
  std::vector<__nv_bfloat16> first;
  bool correct = true;
  for (int run = 0; run < 3; ++run) {
    CHECK(cudaMemset(p.out, 0xFF, rows * kHeadDimV * 2));
    Run(p, nullptr);
    CHECK(cudaDeviceSynchronize());
    const auto actual = ToHost<__nv_bfloat16>(p.out, rows * kHeadDimV);
    const auto actual_lse = ToHost<float>(p.lse, rows);
    for (size_t i = 0; i < actual.size(); ++i) {
      const float error = std::abs(__bfloat162float(actual[i]) - expected[i]);
      correct &= error <= 0.04f * (0.2f + std::abs(expected[i]));
    }
    for (int64_t i = 0; i < rows; ++i) {
      correct &=
          actual_lse[i] == expected_lse[i] || std::abs(actual_lse[i] - expected_lse[i]) < 2e-3f;
    }
    if (run == 0) first = actual;
    correct &= std::memcmp(first.data(), actual.data(), first.size() * 2) == 0;
  }
  if (!correct) {
    std::printf("WRONG: batch %d s_q %d h_q %d h_kv %d length %d %s\n", c.batch, c.s_q, c.h_q,
                c.h_kv, c.length, c.varlen ? "varlen" : "uniform");
  }
  return correct;
}

int CheckAll() {
  std::vector<Case> cases = {{1, 1, 16, 8192},  {1, 1, 128, 8192},  {16, 1, 128, 1024},
                             {1, 1, 16, 32768}, {200, 1, 128, 200}, {40, 1, 128, 64}};
  std::mt19937 random(0);
  const int heads[] = {1, 8, 16, 24, 32, 48, 64, 96, 128};
  for (int i = 0; i < 40; ++i) {
    const int batch = 1 + random() % (random() % 2 ? 6 : 40), h_q = heads[random() % 9];
    const int length = 1 + random() % (batch > 6 ? 600 : 4000), s_q = 1 + random() % 4;
    cases.push_back(
        {batch, s_q, h_q, length, random() % 2 == 0, h_q % 2 == 0 && i % 4 == 0 ? 2 : 1});
  }
  int wrong = 0;
  for (size_t i = 0; i < cases.size(); ++i) wrong += !IsCorrect(cases[i], i);
  std::printf("%zu calls, %d wrong\n", cases.size(), wrong);
  return wrong > 0;
}

void Time(const Case& c) {
  constexpr double kBeyondL2 = 256e6, kReadRate = 4e12, kWorkRate = 6e14;
  double tokens = 0;
  for (int length : Lengths(c, 0)) tokens += length;
  const double bytes = tokens * kHeadDim * 2;
  const double flop = 2 * tokens * c.s_q * c.h_q * (kHeadDim + kHeadDimV);
  const int sets = std::clamp(static_cast<int>(std::ceil(kBeyondL2 / bytes)), 2, 64);
  Problem problem(c, sets, 0);
  const double expected = std::max({8e-6, bytes / kReadRate, flop / kWorkRate});
  const int rounds = std::max(1, static_cast<int>(6e-3 / expected / sets));

  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CHECK(cudaStreamCreate(&stream));
  for (const DenseDecodeParams& p : problem.calls) Run(p, stream);
  CHECK(cudaStreamSynchronize(stream));
  if (options.nested) {
    CHECK(cudaGraphCreate(&graph, 0));
    cudaGraphNode_t last;
    for (int i = 0; i < rounds * sets; ++i) {
      cudaGraph_t one;
      CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
      Run(problem.calls[i % sets], stream);
      CHECK(cudaStreamEndCapture(stream, &one));
      const cudaGraphNode_t before = i > 0 ? last : nullptr;
      CHECK(cudaGraphAddChildGraphNode(&last, graph, &before, i > 0, one));
      CHECK(cudaGraphDestroy(one));
    }
  } else {
    CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
    for (int i = 0; i < rounds * sets; ++i) Run(problem.calls[i % sets], stream);
    CHECK(cudaStreamEndCapture(stream, &graph));
  }
  CHECK(cudaGraphInstantiate(&replay, graph, 0));

  cudaEvent_t start, end;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = -5; i < 15; ++i) {  // the first ones warm up
    CHECK(cudaStreamSynchronize(stream));
    if (options.cool) std::this_thread::sleep_for(std::chrono::milliseconds(30));
    CHECK(cudaEventRecord(start, stream));
    CHECK(cudaGraphLaunch(replay, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaStreamSynchronize(stream));
    float ms;
    CHECK(cudaEventElapsedTime(&ms, start, end));
    if (i >= 0) times.push_back(ms * 1e-3f / (rounds * sets));
  }
  std::nth_element(times.begin(), times.begin() + times.size() / 2, times.end());
  const double seconds = times[times.size() / 2];
  std::printf("b%d s%d h%d %d %s  %.2f us  %.2f TB/s  %.0f TFLOP/s\n", c.batch, c.s_q, c.h_q,
              c.length, c.varlen ? "varlen" : "uniform", seconds * 1e6, bytes / seconds * 1e-12,
              flop / seconds * 1e-12);
  std::fflush(stdout);
  CHECK(cudaGraphExecDestroy(replay));
  CHECK(cudaGraphDestroy(graph));
  CHECK(cudaStreamDestroy(stream));
}

int Main(std::vector<std::string> words) {
  while (!words.empty() && words[0].starts_with("--")) {
    options.batch_invariant |= words[0] == "--batch-invariant";
    options.nested |= words[0] == "--nested";
    options.cool |= words[0] == "--cool";
    words.erase(words.begin());
  }
  if (words.size() == 1 && words[0] == "check") return CheckAll();
  if (words.size() == 1 && words[0] == "table") {
    for (int h_q : {16, 128}) {
      for (int batch : {1, 4, 16, 32}) {
        for (int length : {1024, 8192, 65536}) Time({batch, 1, h_q, length});
      }
    }
    return 0;
  }
  if (words.size() == 6 && words[0] == "time") {
    const auto number = [&](int i) { return std::stoi(words[i]); };
    Time({number(1), number(2), number(3), number(4), words[5] == "varlen"});
    return 0;
  }
  std::printf("see the beginning of benchmarks/replay.cu\n");
  return 2;
}

}  // namespace
}  // namespace flashmla

int main(int count, char** words) { return flashmla::Main({words + 1, words + count}); }
