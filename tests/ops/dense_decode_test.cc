// The CPU kernel without JAX: every instruction set that this processor has against a loop in
// double precision, and the same bits from thread pools of every kind. Built and run by
// test_dense_decode.py, also with sanitizers.
#include "cpu/dense_decode.cc"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <random>
#include <thread>
#include <vector>

namespace flashmla::cpu {
namespace {

#define CHECK(condition, ...)                                     \
  do {                                                            \
    if (!(condition)) {                                           \
      std::printf("%s:%d: %s\n", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                   \
      std::exit(1);                                               \
    }                                                             \
  } while (0)

// --- Elements --------------------------------------------------------------------------------

// An element's value.
double Value(DType dtype, const void* data, int64_t i) {
  if (dtype == DType::kF32) return static_cast<const float*>(data)[i];
  const int bits = static_cast<const uint16_t*>(data)[i];
  if (dtype == DType::kBF16) return std::bit_cast<float>(bits << 16);
  const int fraction_bits = 10, bias = 15;
  const int exponent = (bits & 0x7fff) >> fraction_bits;
  const double fraction = std::ldexp(bits & ((1 << fraction_bits) - 1), -fraction_bits);
  double value =
      exponent == 0 ? std::ldexp(fraction, 1 - bias) : std::ldexp(1 + fraction, exponent - bias);
  if (exponent == 2 * bias + 1) value = fraction == 0 ? INFINITY : NAN;
  return bits & 0x8000 ? -value : value;
}

template <DType D, int N>
void CheckConversions() {
  for (int first = 0; first < 1 << 16; first += N) {
    uint16_t bits[N], back[N];
    for (int i = 0; i < N; ++i) bits[i] = first + i;
    float values[N];
    Store<N>(LoadAs<D, N>(bits), values);
    StoreAs<D, N>(Load<N>(values), back);
    for (int i = 0; i < N; ++i) {
      const double expected = Value(D, bits, i);
      if (std::isnan(expected)) {
        CHECK(std::isnan(values[i]) && std::isnan(Value(D, back, i)), "%04x\n", bits[i]);
      } else {
        CHECK(values[i] == expected && back[i] == bits[i], "%04x: %g, %04x\n", bits[i], values[i],
              back[i]);
      }
    }
    // A float between two neighbours becomes the nearer, and the even one half way.
    for (int i = 0; i < N; ++i) {
      const uint16_t next[] = {static_cast<uint16_t>(bits[i] + 1)};
      const double a = Value(D, bits, i), b = Value(D, next, 0);
      if (!std::isfinite(a) || !std::isfinite(b) || (bits[i] & 0x7fff) == 0x7fff) continue;
      const float half = static_cast<float>((a + b) / 2);
      const float points[] = {std::nextafter(half, static_cast<float>(a)), half,
                              std::nextafter(half, static_cast<float>(b))};
      const uint16_t expected[] = {bits[i], bits[i] & 1 ? next[0] : bits[i], next[0]};
      for (int j = 0; j < 3; ++j) {
        if (std::fabs(points[j]) < std::numeric_limits<float>::min()) continue;
        StoreAs<D, N>(Broadcast<N>(points[j]), back);
        CHECK(back[0] == expected[j], "%a: %04x, not %04x\n", points[j], back[0], expected[j]);
        if (points[j] > 0 && points[j] <= 1) {
          Store<N>(RoundProbability<D, N>(Broadcast<N>(points[j])), values);
          CHECK(values[0] == Value(D, expected, j), "%a: %a\n", points[j], values[0]);
        }
      }
    }
  }
}

template <int N>
void CheckArithmetic() {
  for (float x = -90; x <= 0; x += 0.00123f) {
    const float y = Exp<N>(Broadcast<N>(x))[N - 1];
    const double expected = x < -87 ? 0 : std::exp(static_cast<double>(x));
    CHECK(std::fabs(y - expected) <= 2e-7 * expected, "exp(%g) = %g\n", x, y);
  }
  CHECK(Exp<N>(Broadcast<N>(0.0f))[0] == 1, "exp(0)\n");
  CHECK(Exp<N>(Broadcast<N>(-kInf))[0] == 0 && Exp<N>(Broadcast<N>(-1e30f))[0] == 0, "exp(-inf)\n");
  CHECK(std::isnan(Exp<N>(Broadcast<N>(kNan))[0]), "exp(nan)\n");
  Floats<N> x[N];
  for (int i = 0; i < N; ++i) {
    for (int j = 0; j < N; ++j) x[i][j] = i * i + j;
  }
  const Floats<N> sums = SumEach<N>(x);
  for (int i = 0; i < N; ++i) {
    const float expected = N * i * i + N * (N - 1) / 2;
    CHECK(sums[i] == expected && Sum<N>(x[i]) == expected, "sum of %d: %g\n", i, sums[i]);
    CHECK(Max<N>(x[i]) == i * i + N - 1, "max of %d\n", i);
  }
}

// --- The kernel ------------------------------------------------------------------------------

struct Problem {
  DenseDecodeParams p{};
  std::vector<char> q, k_cache, out;
  std::vector<int32_t> block_table, lengths;
  std::vector<float> lse;
};

template <DType D>
void Fill(std::vector<char>& data, int64_t size, std::mt19937& random) {
  data.resize(size * sizeof(Element<D>));
  auto* elements = reinterpret_cast<Element<D>*>(data.data());
  float x[4];
  for (int64_t i = 0; i < size; i += 4) {
    for (float& value : x) value = static_cast<int32_t>(random()) * 0x1p-30f;
    StoreAs<D, 4>(Load<4>(x), elements + i);
  }
}

template <DType D>
Problem MakeProblem(std::vector<int32_t> lengths, int64_t s_q, int64_t h_q, int64_t h_kv,
                    bool causal) {
  std::mt19937 random(1234);
  Problem x;
  DenseDecodeParams& p = x.p;
  p.batch = lengths.size();
  p.s_q = s_q;
  p.h_q = h_q;
  p.h_kv = h_kv;
  p.causal = causal;
  p.dtype = D;
  p.softmax_scale = 0.0416666679f;
  const int32_t longest = *std::max_element(lengths.begin(), lengths.end());
  p.max_pages_per_seq = std::max<int64_t>(1, CeilDiv(longest, kPageSize));
  p.num_pages = p.batch * p.max_pages_per_seq;
  x.lengths = std::move(lengths);
  for (int64_t i = 0; i < p.num_pages; ++i) x.block_table.push_back(i);
  std::shuffle(x.block_table.begin(), x.block_table.end(), random);
  Fill<D>(x.q, p.batch * s_q * h_q * kHeadDim, random);
  Fill<D>(x.k_cache, p.num_pages * kPageSize * h_kv * kHeadDim, random);
  // NaN wherever nothing may be read, and entries that must not be followed.
  auto* cache = reinterpret_cast<Element<D>*>(x.k_cache.data());
  for (int64_t i = 0; i < p.batch; ++i) {
    for (int64_t t = std::max(x.lengths[i], 0); t < p.max_pages_per_seq * kPageSize; ++t) {
      int32_t& page = x.block_table[i * p.max_pages_per_seq + t / kPageSize];
      if (t % kPageSize == 0) page = t % 3 ? std::numeric_limits<int32_t>::max() : -1;
      if (page < 0 || page >= p.num_pages) continue;
      std::memset(cache + (page * kPageSize + t % kPageSize) * h_kv * kHeadDim, 0xff,
                  h_kv * kHeadDim * sizeof(Element<D>));
    }
  }
  x.out.resize(p.batch * s_q * h_q * kHeadDimV * sizeof(Element<D>));
  x.lse.resize(p.batch * h_q * s_q);
  p.q = x.q.data();
  p.k_cache = x.k_cache.data();
  p.block_table = x.block_table.data();
  p.cache_seqlens = x.lengths.data();
  p.out = x.out.data();
  p.lse = x.lse.data();
  return x;
}

// Compares out and lse with the definition, for every `stride`-th row.
void CheckResult(const Problem& x, const char* what, int64_t stride) {
  const DenseDecodeParams& p = x.p;
  std::vector<float> q(p.batch * p.s_q * p.h_q * kHeadDim);
  std::vector<float> k(p.num_pages * kPageSize * p.h_kv * kHeadDim);
  for (size_t j = 0; j < q.size(); ++j) q[j] = Value(p.dtype, p.q, j);
  for (size_t j = 0; j < k.size(); ++j) k[j] = Value(p.dtype, p.k_cache, j);
  const double tolerance = p.dtype == DType::kF32 ? 1e-5 : p.dtype == DType::kF16 ? 2e-3 : 2e-2;
  for (int64_t r = 0; r < p.batch * p.s_q * p.h_q; r += stride) {
    const int64_t i = r / (p.s_q * p.h_q), s = r / p.h_q % p.s_q, h = r % p.h_q;
    const int64_t end = p.causal ? x.lengths[i] - p.s_q + s + 1 : x.lengths[i];
    std::vector<double> scores, out(kHeadDimV);
    const auto key = [&](int64_t t) {
      const int64_t page = p.block_table[i * p.max_pages_per_seq + t / kPageSize];
      return ((page * kPageSize + t % kPageSize) * p.h_kv + h / p.group()) * kHeadDim;
    };
    double max = -INFINITY, sum = 0;
    for (int64_t t = 0; t < end; ++t) {
      double score = 0;
      for (int d = 0; d < kHeadDim; ++d) {
        score += double(q[r * kHeadDim + d]) * k[key(t) + d];
      }
      scores.push_back(score * p.softmax_scale);
      max = std::max(max, scores.back());
    }
    for (int64_t t = 0; t < end; ++t) {
      const double weight = std::exp(scores[t] - max);
      sum += weight;
      for (int d = 0; d < kHeadDimV; ++d) out[d] += weight * k[key(t) + d];
    }
    const float lse = p.lse[(i * p.h_q + h) * p.s_q + s];
    if (end <= 0) {
      CHECK(lse == -kInf, "%s: row %d: lse %g\n", what, int(r), lse);
    } else {
      CHECK(std::fabs(lse - max - std::log(sum)) < 1e-5, "%s: row %d: lse %g\n", what, int(r), lse);
    }
    for (int d = 0; d < kHeadDimV; ++d) {
      const double expected = end > 0 ? out[d] / sum : 0;
      const double actual = Value(p.dtype, p.out, r * kHeadDimV + d);
      CHECK(std::fabs(actual - expected) <= tolerance * (end > 0), "%s: row %d: %g, not %g\n", what,
            int(r), actual, expected);
    }
  }
}

// --- Thread pools ----------------------------------------------------------------------------

// Runs nothing until it is destroyed, which may be after the call: a pool whose threads are busy.
struct BusyPool {
  std::deque<std::function<void()>> tasks;
  ThreadPool Get() {
    return {4, [this](std::function<void()> task) { tasks.push_back(std::move(task)); }};
  }
  ~BusyPool() {
    for (auto& task : tasks) task();
  }
};

struct RealPool {
  std::vector<std::thread> threads;
  ThreadPool Get(int num_threads) {
    return {num_threads,
            [this](std::function<void()> task) { threads.emplace_back(std::move(task)); }};
  }
  ~RealPool() {
    for (auto& thread : threads) thread.join();
  }
};

void CheckParallelFor() {
  for (int64_t size : {0, 1, 2, 7, 1000}) {
    RealPool pool;
    std::vector<int> calls(size), running(5);
    ParallelFor(pool.Get(5), size, [&](int64_t worker, int64_t index) {
      CHECK(running[worker]++ == 0, "two calls share worker %d\n", int(worker));
      ++calls[index];
      --running[worker];
    });
    for (int count : calls) CHECK(count == 1, "%d calls\n", count);
  }
}

template <DType D>
void CheckKernels(const Kernels& kernels, const char* name, bool quick) {
  const std::vector<int32_t> lengths[] = {
      {0, 1, 63, 64, 65, 129}, {700, -5, 257, 512}, {16385, 30}, {3}};
  for (const auto& some : lengths) {
    for (const auto& [s_q, h_q, h_kv] :
         {std::tuple(1, 1, 1), {1, 4, 1}, {1, 7, 1}, {3, 6, 2}, {2, 6, 3}, {1, 131, 1}}) {
      if (quick && (h_q == 131 || h_kv == 3 || some[0] > 1000)) continue;
      if (some[0] > 1000 && (h_q != 4 || D != DType::kBF16)) continue;
      for (const bool causal : {false, true}) {
        Problem x = MakeProblem<D>(some, s_q, h_q, h_kv, causal);
        const ThreadPool alone{1, nullptr};
        RunCall(kernels, x.p, alone);
        CheckResult(x, name, some[0] > 1000 || h_q > 100 || quick ? 61 : 5);
        const auto expected = x.out;
        const auto expected_lse = x.lse;
        const auto check_same = [&](const ThreadPool& pool, const char* kind) {
          std::fill(x.out.begin(), x.out.end(), 0x55);
          RunCall(kernels, x.p, pool);
          CHECK(x.out == expected, "%s: other bits from %s\n", name, kind);
          CHECK(!std::memcmp(x.lse.data(), expected_lse.data(), x.lse.size() * sizeof(float)),
                "%s: other lse bits from %s\n", name, kind);
        };
        BusyPool busy;
        check_same(busy.Get(), "a busy pool");
        check_same({3, [](const std::function<void()>& task) { task(); }}, "an immediate pool");
        for (const int num_threads : {2, 5}) {
          RealPool pool;
          check_same(pool.Get(num_threads), "threads");
        }
      }
    }
  }
}

template <DType D>
void CheckAllKernels(bool quick) {
  CheckKernels<D>(Baseline<D>::kKernels, "baseline", quick);
#if defined(__x86_64__)
  if (HasAvx2() && !quick) CheckKernels<D>(Avx2<D>::kKernels, "AVX2", quick);
  if (HasAvx512()) CheckKernels<D>(Avx512<D>::kKernels, "AVX-512", quick);
#endif
#if FLASHMLA_WITH_AMX
  if (D == DType::kBF16 && HasAvx512() && HasAmx()) CheckKernels<D>(kAmx, "AMX", quick);
#endif
}

}  // namespace
}  // namespace flashmla::cpu

int main(int argc, char** argv) {
  using namespace flashmla::cpu;
  using flashmla::DType;
  const bool quick = argc > 1 && !std::strcmp(argv[1], "quick");
  CheckParallelFor();
  CheckAllKernels<DType::kBF16>(quick);
  if (!quick) {
    CheckAllKernels<DType::kF16>(false);
    CheckAllKernels<DType::kF32>(false);
    CheckConversions<DType::kBF16, 4>();
    CheckConversions<DType::kF16, 4>();
    CheckConversions<DType::kF16, 16>();
    CheckArithmetic<4>();
    CheckArithmetic<8>();
    CheckArithmetic<16>();
  }
  std::printf("ok\n");
}
