// The kernels of a decoding step of a few tokens alone, without JAX: times from replays of CUDA
// graphs. For work on the kernels: builds of two versions compare within one run. From the
// repository's root:
//
//   nvcc -std=c++20 -O3 -gencode arch=compute_90a,code=sm_90a --expt-relaxed-constexpr -Icsrc
//       benchmarks/replay_few.cu csrc/sm90/few_tokens.cu -o replay_few
//   ./replay_few
//
// Layers have DeepSeek-V2-Lite's shapes, and weights of their own, far more than L2 holds, as does
// the head, which runs as often. What they compute is checked by tests/models/test_few_tokens.py.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <vector>

#include "sm90/few_tokens.h"

namespace flashmla {
namespace {

constexpr int kLayers = 24, kHidden = 2048, kHeads = 16, kVDim = 128;
constexpr int kExperts = 64, kExpertSize = 1408, kExpertsPerToken = 6, kSharedSize = 2 * 1408;
constexpr int kDenseSize = 10944, kVocab = 102400;

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}
#define CHECK(call) Check((call), #call)

void Check(const sm90::Status& status) {
  if (status.ok()) return;
  std::printf("%s\n", status.message.c_str());
  std::exit(1);
}

// Numbers between -0.05 and 0.05.
template <typename T>
__global__ void Fill(T* numbers, size_t count, uint32_t seed) {
  const size_t step = size_t{gridDim.x} * blockDim.x;
  for (size_t i = blockIdx.x * size_t{blockDim.x} + threadIdx.x; i < count; i += step) {
    uint32_t z = static_cast<uint32_t>(i) * 2654435761u ^ seed * 40503u;
    z = (z ^ z >> 15) * 2246822519u;
    numbers[i] = static_cast<T>(((z ^ z >> 13) % 65536 / 65536.f - 0.5f) * 0.1f);
  }
}

template <typename T = __nv_bfloat16>
T* Random(size_t count) {
  static uint32_t seed = 0;
  T* numbers = nullptr;
  CHECK(cudaMalloc(&numbers, count * sizeof(T)));
  Fill<<<256, 256>>>(numbers, count, ++seed);
  return numbers;
}

template <typename T>
T* Zeros(size_t count) {
  T* numbers = nullptr;
  CHECK(cudaMalloc(&numbers, count * sizeof(T)));
  CHECK(cudaMemset(numbers, 0, count * sizeof(T)));
  return numbers;
}

// The median time of a layer, in microseconds, when `enqueue` enqueues all of them.
double Microseconds(cudaStream_t stream, const std::function<void()>& enqueue) {
  cudaGraph_t graph;
  cudaGraphExec_t replay;
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  enqueue();
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&replay, graph, 0));
  cudaEvent_t begin, end;
  CHECK(cudaEventCreate(&begin));
  CHECK(cudaEventCreate(&end));
  std::vector<float> samples(11);
  for (float& sample : samples) {
    CHECK(cudaEventRecord(begin, stream));
    for (int i = 0; i < 3; ++i) CHECK(cudaGraphLaunch(replay, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaEventSynchronize(end));
    CHECK(cudaEventElapsedTime(&sample, begin, end));
  }
  CHECK(cudaGraphExecDestroy(replay));
  CHECK(cudaGraphDestroy(graph));
  std::nth_element(samples.begin(), samples.begin() + 5, samples.end());
  return samples[5] * 1e3 / 3 / kLayers;
}

struct Layer {
  sm90::ProjectParams project{};
  sm90::OutputParams output{};
  sm90::MlpParams mlp{}, dense{};
};

std::vector<Layer> MakeLayers() {
  constexpr int kTokens = sm90::kMaxFewTokens;
  constexpr size_t kExpertWeights = size_t{kExperts} * kExpertSize * kHidden;
  Layer first;
  sm90::ProjectParams& project = first.project;
  project.dtype = first.output.dtype = first.mlp.dtype = DType::kBF16;
  project.hidden_size = first.output.hidden_size = first.mlp.hidden_size = kHidden;
  project.heads = first.output.heads = kHeads;
  project.norm_eps = project.latent_eps = first.mlp.norm_eps = 1e-6f;
  project.hidden = first.output.hidden = first.mlp.hidden = Random(kTokens * kHidden);
  project.norm = first.mlp.norm = Random(kHidden);
  project.kv_norm = Random(kHeadDimV);
  project.cos = project.sin = Random<float>(kTokens * sm90::kRopeDim / 2);
  project.q = Random(kTokens * kHeads * kHeadDim);
  project.q_expanded = Random(kTokens * kHeads * sm90::kQueryDim);
  project.kv_raw = Random(kTokens * kHeadDim);
  CacheAppendParams& kv = project.kv;
  kv.num_tokens = kv.num_pages = kv.max_pages_per_seq = 1;
  kv.token_bytes = kHeadDim * 2;
  kv.block_table = kv.start = kv.count = kv.copy_from = Zeros<int32_t>(kTokens);
  kv.k_cache = Random(kPageSize * kHeadDim);
  first.output.v_dim = kVDim;
  DenseDecodeParams& attention = first.output.attention;
  attention.s_q = attention.h_kv = 1;
  attention.h_q = kHeads;
  attention.dtype = DType::kBF16;
  attention.out = Random(kTokens * kHeads * kHeadDimV);
  attention.partial_out = Random<float>(2 * kMaxPartitions * kHeads * kHeadDimV);
  attention.partial_stats = Random<float>(2 * kMaxPartitions * kHeads * 4);
  attention.merges = Zeros<int32_t>(kMaxPartitions * kMergeWords);
  first.output.partitions = 132;
  first.output.values = Random(kTokens * kHeads * kVDim);
  first.output.out = first.mlp.out = Random(kTokens * kHidden);
  first.mlp.router = {false, false, 1, 1, 1, 1.f};
  first.mlp.logits = Random<float>(kTokens * kExperts);
  first.mlp.chosen = Zeros<int32_t>(kTokens * kExpertsPerToken);
  first.mlp.act = Random(kTokens * std::max(kDenseSize, 8 * kExpertSize));
  first.dense = first.mlp;
  first.mlp.experts = kExperts;
  first.mlp.expert_size = kExpertSize;
  first.mlp.experts_per_token = kExpertsPerToken;
  first.mlp.shared_size = kSharedSize;
  first.dense.shared_size = kDenseSize;

  std::vector<Layer> layers(kLayers, first);
  for (Layer& layer : layers) {
    layer.project.w_q = Random(size_t{kHeads} * sm90::kQueryDim * kHidden);
    layer.project.w_kv = Random(size_t{kHeadDim} * kHidden);
    layer.project.w_uk = Random(size_t{kHeads} * kHeadDimV * sm90::kNopeDim);
    layer.output.w_uv = Random(size_t{kHeads} * kVDim * kHeadDimV);
    layer.output.w_o = Random(size_t{kHidden} * kHeads * kVDim);
    layer.mlp.w_router = Random<float>(size_t{kExperts} * kHidden);
    layer.mlp.shared_gate = Random(size_t{kSharedSize} * kHidden);
    layer.mlp.shared_up = Random(size_t{kSharedSize} * kHidden);
    layer.mlp.shared_down = Random(size_t{kSharedSize} * kHidden);
    layer.dense.shared_gate = layer.mlp.gate = Random(kExpertWeights);
    layer.dense.shared_up = layer.mlp.up = Random(kExpertWeights);
    layer.dense.shared_down = layer.mlp.down = Random(kExpertWeights);
  }
  return layers;
}

// What attention over sequences of 4 K tokens leaves to merge.
void RecordMerges(const DenseDecodeParams& attention, int sequences) {
  const int parts = std::min(64, 132 / sequences), stride = 2 * kHeads;
  std::vector<int32_t> words(kMaxPartitions * kMergeWords);
  for (int i = 0; i < sequences; ++i) {
    const int row = i * parts * stride;
    const int32_t merge[] = {i, parts, row, row, stride, 0, parts};
    std::ranges::copy(merge, words.begin() + i * kMergeWords);
  }
  CHECK(cudaMemcpy(attention.merges, words.data(), words.size() * sizeof(int32_t),
                   cudaMemcpyHostToDevice));
}

void Main() {
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  std::vector<Layer> layers = MakeLayers();
  sm90::LogitsParams logits{layers[0].mlp};
  logits.vocab_size = kVocab;
  logits.hidden = layers[0].mlp.hidden;
  logits.w = Random(size_t{kVocab} * kHidden);
  logits.logits = Random<float>(sm90::kMaxFewTokens * kVocab);
  CHECK(cudaDeviceSynchronize());
  constexpr double kProject = (kHeads * sm90::kQueryDim + kHeadDim) * 2. * kHidden +
                              2. * kHeads * kHeadDimV * sm90::kNopeDim;
  constexpr double kOutput = 2. * kHeads * kVDim * (kHeadDimV + kHidden);
  std::printf("us a layer, and GB/s of its weights\n");
  for (int tokens = 1; tokens <= sm90::kMaxFewTokens; ++tokens) {
    for (Layer& layer : layers) {
      layer.project.tokens = layer.output.tokens = layer.mlp.tokens = layer.dense.tokens = tokens;
      layer.project.kv.batch = layer.output.attention.batch = tokens;
    }
    logits.tokens = tokens;
    RecordMerges(layers[0].output.attention, tokens);
    const auto print = [&](const char* name, double bytes, auto enqueue) {
      const double us = Microseconds(stream, [&] { std::ranges::for_each(layers, enqueue); });
      std::printf("%s %.2f (%.0f)  ", name, us, bytes / us / 1e3);
    };
    // Tokens that choose one expert count it twice: the second reads it from L2.
    const double mlp =
        2. * kHidden * 3 * (kSharedSize + double{kExpertSize} * kExpertsPerToken * tokens) +
        4. * kExperts * kHidden;
    const auto project = [&](const Layer& x) { Check(FewProject(x.project, false, stream)); };
    const auto output = [&](const Layer& x) { Check(FewOutput(x.output, stream)); };
    const auto experts = [&](const Layer& x) { Check(FewMlp(x.mlp, stream)); };
    std::printf("%d tokens: ", tokens);
    print("project", kProject, project);
    print("output", kOutput, output);
    print("experts", mlp, experts);
    print("all", kProject + kOutput + mlp, [&](const Layer& x) {
      project(x);
      output(x);
      experts(x);
    });
    print("dense", 6. * kHidden * kDenseSize,
          [&](const Layer& x) { Check(FewMlp(x.dense, stream)); });
    print("head", 2. * kVocab * kHidden, [&](const Layer&) { Check(FewLogits(logits, stream)); });
    std::printf("\n");
  }
}

}  // namespace
}  // namespace flashmla

int main() { flashmla::Main(); }
