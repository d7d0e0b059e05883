// Short vectors of floats, in the vector extension that GCC and Clang share: no intrinsics, so the
// same source is SSE2, AVX2, AVX-512 or NEON, as the function it is inlined into is compiled for.
// A width that the target lacks is legal and split by the compiler.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>
#include <utility>

#include "params.h"

#if !defined(__GNUC__) || (!defined(__clang__) && __GNUC__ < 12)
#error "flashmla_jax needs GCC 12 or newer, or Clang"
#endif

// Everything here is inlined into functions compiled for one instruction set; an out-of-line copy
// would be compiled for the baseline.
#define FLASHMLA_INLINE [[gnu::always_inline]] inline

#if defined(__x86_64__)
#define FLASHMLA_AVX2 "avx2,fma"
#define FLASHMLA_AVX512 FLASHMLA_AVX2 ",avx512f,avx512bw,avx512dq,avx512vl"
#endif

#if defined(__clang__)
#define FLASHMLA_UNROLL _Pragma("clang loop unroll(full)")
#else
#define FLASHMLA_UNROLL _Pragma("GCC unroll 16")
// "The ABI for passing vectors changes with the target": nothing is passed, all is inlined.
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace flashmla::cpu {

inline constexpr float kInf = std::numeric_limits<float>::infinity();
inline constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

template <typename T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <int N>
using Floats = typename VectorOf<float, N>::type;
template <int N>
using Words = typename VectorOf<uint32_t, N>::type;
template <int N>
using Halves = typename VectorOf<uint16_t, N>::type;
template <int N>
using Octets = typename VectorOf<uint8_t, N>::type;

// An element in memory.
template <DType D>
struct ElementOf {
  using type = uint16_t;
};
template <>
struct ElementOf<DType::kF32> {
  using type = float;
};
template <DType D>
using Element = typename ElementOf<D>::type;

template <size_t... I>
FLASHMLA_INLINE Floats<sizeof...(I)> Broadcast(float x, std::index_sequence<I...>) {
  const Floats<4> first{x};
  return __builtin_shufflevector(first, first, (I * 0)...);
}

// GCC makes of other ways to write this, a number less a vector of zeros say, one load per lane.
template <int N>
FLASHMLA_INLINE Floats<N> Broadcast(float x) {
  return Broadcast(x, std::make_index_sequence<N>{});
}

template <int N>
FLASHMLA_INLINE Words<N> Bits(const Floats<N>& x) {
  return __builtin_bit_cast(Words<N>, x);
}

template <int N>
FLASHMLA_INLINE Floats<N> FromBits(const Words<N>& x) {
  return __builtin_bit_cast(Floats<N>, x);
}

// --- Memory ----------------------------------------------------------------------------------

template <int N>
FLASHMLA_INLINE Floats<N> Load(const float* from) {
  Floats<N> x;
  std::memcpy(&x, from, sizeof(x));
  return x;
}

template <int N>
FLASHMLA_INLINE void Store(const Floats<N>& x, float* to) {
  std::memcpy(to, &x, sizeof(x));
}

template <DType D, int N>
FLASHMLA_INLINE Floats<N> LoadAs(const Element<D>* from) {
  if constexpr (D == DType::kF32) {
    return Load<N>(from);
  } else {
    Halves<N> halves;
    std::memcpy(&halves, from, sizeof(halves));
    const Words<N> bits = __builtin_convertvector(halves, Words<N>);
    if constexpr (D == DType::kBF16) return FromBits<N>(bits << 16);
    // Half precision, without arithmetic on subnormal floats, which XLA's threads flush to zero.
    constexpr uint32_t kRebias = (127 - 15) << 23;
    constexpr uint32_t kMinNormal = (127 - 14) << 23;
    const Words<N> magnitude = bits & 0x7fff;
    const Words<N> normal = (magnitude << 13) + kRebias;
    const Words<N> special = normal + kRebias;  // infinity and NaN
    const Words<N> subnormal =
        Bits<N>(FromBits<N>((magnitude << 13) + kMinNormal) - std::bit_cast<float>(kMinNormal));
    Words<N> x = magnitude < 0x400 ? subnormal : normal;
    x = magnitude < 0x7c00 ? x : special;
    return FromBits<N>(x | ((bits & 0x8000) << 16));
  }
}

// FP8 codes, without arithmetic on subnormal floats.
template <int N>
FLASHMLA_INLINE Floats<N> LoadE4m3(const uint8_t* from) {
  Octets<N> codes;
  std::memcpy(&codes, from, sizeof(codes));
  const Words<N> bits = __builtin_convertvector(codes, Words<N>);
  constexpr uint32_t kRebias = (127 - 7) << 23;
  constexpr uint32_t kMinNormal = (127 - 6) << 23;
  const Words<N> magnitude = bits & 0x7f;
  const Words<N> normal = (magnitude << 20) + kRebias;
  const Words<N> subnormal =
      Bits<N>(FromBits<N>((magnitude << 20) + kMinNormal) - std::bit_cast<float>(kMinNormal));
  Words<N> x = magnitude < 8 ? subnormal : normal;
  x = magnitude < 0x7f ? x : Bits<N>(Broadcast<N>(kNan));
  return FromBits<N>(x | ((bits & 0x80) << 24));
}

template <DType D, int N>
FLASHMLA_INLINE void StoreAs(const Floats<N>& x, Element<D>* to) {
  if constexpr (D == DType::kF32) {
    Store<N>(x, to);
  } else {
    const Words<N> bits = Bits<N>(x);
    const Words<N> magnitude = bits & 0x7fffffff;
    Words<N> rounded;
    if constexpr (D == DType::kBF16) {
      rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
      rounded = magnitude > 0x7f800000 ? (bits >> 16) | 0x40 : rounded;
    } else {
      constexpr uint32_t kRebias = (127 - 15) << 23;
      constexpr uint32_t kMinNormal = (127 - 14) << 23;
      // Adding 0.5 leaves the multiple of 2^-24, as half precision has them below 2^-14, in the
      // last bits of the significand.
      const Words<N> subnormal = Bits<N>(FromBits<N>(magnitude) + 0.5f) - 0x3f000000;
      rounded = (magnitude - kRebias + 0xfff + ((magnitude >> 13) & 1)) >> 13;
      rounded = magnitude < kMinNormal ? subnormal : rounded;
      rounded = magnitude < 0x477ff000 ? rounded : Words<N>{} + 0x7c00;  // 65520 and more
      rounded = magnitude > 0x7f800000 ? Words<N>{} + 0x7e00 : rounded;
      rounded |= (bits >> 16) & 0x8000;
    }
    const Halves<N> halves = __builtin_convertvector(rounded, Halves<N>);
    std::memcpy(to, &halves, sizeof(halves));
  }
}

// A probability, rounded to the input dtype; of NaN, anything.
template <DType D, int N>
FLASHMLA_INLINE Floats<N> RoundProbability(const Floats<N>& p) {
  if constexpr (D == DType::kF32) return p;
  constexpr int kDropped = D == DType::kBF16 ? 16 : 13;
  constexpr uint32_t kUlp = 1u << kDropped;
  const Words<N> bits = Bits<N>(p);
  const Floats<N> rounded =
      FromBits<N>((bits + (kUlp / 2 - 1) + ((bits >> kDropped) & 1)) & ~(kUlp - 1));
  if constexpr (D == DType::kBF16) return rounded;
  return p < 0x1p-14f ? (p + 0.5f) - 0.5f : rounded;  // half precision is coarser there
}

// A number, rounded to bfloat16 if D is that; NaN stays NaN.
template <DType D, int N>
FLASHMLA_INLINE Floats<N> Round(const Floats<N>& x) {
  const Floats<N> rounded = RoundProbability<D == DType::kBF16 ? D : DType::kF32, N>(x);
  return x == x ? rounded : x;
}

// --- Arithmetic ------------------------------------------------------------------------------

// exp(x) for x <= 0 to about an ulp; 0 where that is below the normal floats; NaN of NaN.
template <int N>
FLASHMLA_INLINE Floats<N> Exp(const Floats<N>& x) {
  constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, in the lowest bits
  const Floats<N> shifted = x * 0x1.715476p+0f + kRound;
  const Floats<N> n = shifted - kRound;
  const Floats<N> f = (x - n * 0.693359375f) - n * -2.12194440e-4f;  // x - n log(2)
  Floats<N> y = f * 1.9875691500e-4f + 1.3981999507e-3f;             // the polynomial of Cephes
  y = y * f + 8.3334519073e-3f;
  y = y * f + 4.1665795894e-2f;
  y = y * f + 1.6666665459e-1f;
  y = y * f + 5.0000001201e-1f;
  y = (y * f) * f + f + 1.0f;
  const Floats<N> power = FromBits<N>((Bits<N>(shifted) << 23) + 0x3f800000u);  // 2^n
  return x < -87.0f ? Floats<N>{} : y * power;
}

FLASHMLA_INLINE float Exp(float x) { return Exp<4>(Broadcast<4>(x))[0]; }

template <int N, size_t... I>
FLASHMLA_INLINE Floats<N / 2> LowerHalf(const Floats<N>& x, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, x, I...);
}

template <int N, size_t... I>
FLASHMLA_INLINE Floats<N / 2> UpperHalf(const Floats<N>& x, std::index_sequence<I...>) {
  return __builtin_shufflevector(x, x, (I + N / 2)...);
}

// The greatest lane, NaN aside.
template <int N>
FLASHMLA_INLINE float Max(const Floats<N>& x) {
  if constexpr (N == 2) {
    return x[0] > x[1] ? x[0] : x[1];
  } else {
    const Floats<N / 2> a = LowerHalf<N>(x, std::make_index_sequence<N / 2>{});
    const Floats<N / 2> b = UpperHalf<N>(x, std::make_index_sequence<N / 2>{});
    return Max<N / 2>(a > b ? a : b);
  }
}

template <int N>
FLASHMLA_INLINE float Sum(const Floats<N>& x) {
  if constexpr (N == 2) {
    return x[0] + x[1];
  } else {
    return Sum<N / 2>(LowerHalf<N>(x, std::make_index_sequence<N / 2>{}) +
                      UpperHalf<N>(x, std::make_index_sequence<N / 2>{}));
  }
}

// The sums of N vectors: lane i is the sum of x[i]. Transposes while it adds, which takes two
// shuffles per vector instead of two per vector and halving.
template <int N>
FLASHMLA_INLINE Floats<N> SumEach(const Floats<N>* x) {
  if constexpr (N == 4) {
    const auto ab = __builtin_shufflevector(x[0], x[1], 0, 1, 4, 5) +
                    __builtin_shufflevector(x[0], x[1], 2, 3, 6, 7);
    const auto cd = __builtin_shufflevector(x[2], x[3], 0, 1, 4, 5) +
                    __builtin_shufflevector(x[2], x[3], 2, 3, 6, 7);
    return __builtin_shufflevector(ab, cd, 0, 2, 4, 6) +
           __builtin_shufflevector(ab, cd, 1, 3, 5, 7);
  } else if constexpr (N == 8) {
    Floats<8> y[4];  // y[i] holds what is left of x[i] and x[i + 4], four lanes each
    FLASHMLA_UNROLL
    for (int i = 0; i < 4; ++i) {
      y[i] = __builtin_shufflevector(x[i], x[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) +
             __builtin_shufflevector(x[i], x[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
    const auto ab = __builtin_shufflevector(y[0], y[1], 0, 1, 8, 9, 4, 5, 12, 13) +
                    __builtin_shufflevector(y[0], y[1], 2, 3, 10, 11, 6, 7, 14, 15);
    const auto cd = __builtin_shufflevector(y[2], y[3], 0, 1, 8, 9, 4, 5, 12, 13) +
                    __builtin_shufflevector(y[2], y[3], 2, 3, 10, 11, 6, 7, 14, 15);
    return __builtin_shufflevector(ab, cd, 0, 2, 8, 10, 4, 6, 12, 14) +
           __builtin_shufflevector(ab, cd, 1, 3, 9, 11, 5, 7, 13, 15);
  } else {
    static_assert(N == 16);
    Floats<16> y[8], z[4];
    FLASHMLA_UNROLL
    for (int i = 0; i < 8; ++i) {  // x[0] with x[4], ..., x[8] with x[12], ...: eight lanes each
      const int j = i / 4 * 8 + i % 4;
      y[i] = __builtin_shufflevector(x[j], x[j + 4], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21,
                                     22, 23) +
             __builtin_shufflevector(x[j], x[j + 4], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27,
                                     28, 29, 30, 31);
    }
    FLASHMLA_UNROLL
    for (int i = 0; i < 4; ++i) {  // x[i], x[i + 4], x[i + 8], x[i + 12]: four lanes each
      z[i] = __builtin_shufflevector(y[i], y[i + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24,
                                     25, 26, 27) +
             __builtin_shufflevector(y[i], y[i + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28,
                                     29, 30, 31);
    }
    const auto ab = __builtin_shufflevector(z[0], z[1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25,
                                            12, 13, 28, 29) +
                    __builtin_shufflevector(z[0], z[1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27,
                                            14, 15, 30, 31);
    const auto cd = __builtin_shufflevector(z[2], z[3], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25,
                                            12, 13, 28, 29) +
                    __builtin_shufflevector(z[2], z[3], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27,
                                            14, 15, 30, 31);
    return __builtin_shufflevector(ab, cd, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28,
                                   30) +
           __builtin_shufflevector(ab, cd, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29,
                                   31);
  }
}

}  // namespace flashmla::cpu
