// Vectors of the native width from the compiler's vector extensions: one source for every instruction set. Compiled
// once per set, so everything stands in an anonymous namespace of its own: a linker that saw an AVX copy and a baseline
// copy of one inline function would keep either.
#pragma once

#include <cstdint>
#include <utility>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#define RLHF_INLINE [[gnu::always_inline]] inline

namespace rlhf::RLHF_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int n>
struct VectorOf {
  typedef T type __attribute__((vector_size(n * sizeof(T))));
};

// T is float or double, what kernels compute in.
template <class T>
constexpr int kLanes = kVectorBytes / sizeof(T);
template <class T>
using Vec = typename VectorOf<T, kLanes<T>>::type;

template <class T>
struct BitsOf {
  using Signed = int32_t;
  using Unsigned = uint32_t;
};
template <>
struct BitsOf<double> {
  using Signed = int64_t;
  using Unsigned = uint64_t;
};
// Comparisons give a Mask: lanes of 0 or -1.
template <class T>
using Mask = typename VectorOf<typename BitsOf<T>::Signed, kLanes<T>>::type;
template <class T>
using Bits = typename VectorOf<typename BitsOf<T>::Unsigned, kLanes<T>>::type;

// Storage types of half precision; kernels compute on them in float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
template <class S>
struct ComputeOf {
  using type = float;
};
template <>
struct ComputeOf<double> {
  using type = double;
};
template <class S>
using Compute = typename ComputeOf<S>::type;

template <class T>
RLHF_INLINE Vec<T> broadcast(T x) {
  return Vec<T>{} + x;
}

// One instruction each: b where either is NaN.
template <class V>
RLHF_INLINE V max(V a, V b) {
  return a > b ? a : b;
}
template <class V>
RLHF_INLINE V min(V a, V b) {
  return a < b ? a : b;
}
template <class T>
RLHF_INLINE Vec<T> abs(Vec<T> x) {
  return (Vec<T>)((Mask<T>)x & (Mask<T>)(~(Bits<T>{} + (typename BitsOf<T>::Unsigned(1) << (8 * sizeof(T) - 1)))));
}

// In double: lanes that cancel leave no rounding behind.
template <class T>
RLHF_INLINE double sum(Vec<T> x) {
  double total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += x[i];
  return total;
}
template <class T>
RLHF_INLINE T largest(Vec<T> x) {
  T result = x[0];
  for (int i = 1; i < kLanes<T>; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

template <class V>
RLHF_INLINE V load_raw(const void* p) {
  V x;
  __builtin_memcpy(&x, p, sizeof(V));
  return x;
}

RLHF_INLINE Vec<float> load(const float* p) { return load_raw<Vec<float>>(p); }
RLHF_INLINE Vec<double> load(const double* p) { return load_raw<Vec<double>>(p); }

using Halves = VectorOf<uint16_t, kLanes<float>>::type;
using FloatBytes = VectorOf<uint8_t, kLanes<float>>::type;
using DoubleBytes = VectorOf<uint8_t, kLanes<double>>::type;
using Floats = VectorOf<float, kLanes<double>>::type;  // as many as a vector of double has

// Widening by name: GCC 12 makes up to 45 instructions of __builtin_convertvector here. Masked forms, because its
// headers warn of the plain ones.
#if defined(__AVX512F__)
RLHF_INLINE Bits<float> widen(Halves x) { return (Bits<float>)_mm512_maskz_cvtepu16_epi32(0xffff, (__m256i)x); }
RLHF_INLINE Mask<float> widen(FloatBytes x) { return (Mask<float>)_mm512_maskz_cvtepu8_epi32(0xffff, (__m128i)x); }
RLHF_INLINE Mask<double> widen(DoubleBytes x) {
  return (Mask<double>)_mm512_maskz_cvtepu8_epi64(0xff, _mm_cvtsi64_si128((long long)x));
}
RLHF_INLINE Vec<double> widen(Floats x) { return _mm512_maskz_cvtps_pd(0xff, (__m256)x); }
#elif defined(__AVX2__)
RLHF_INLINE Bits<float> widen(Halves x) { return (Bits<float>)_mm256_cvtepu16_epi32((__m128i)x); }
RLHF_INLINE Mask<float> widen(FloatBytes x) {
  return (Mask<float>)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128((long long)x));
}
RLHF_INLINE Mask<double> widen(DoubleBytes x) { return (Mask<double>)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128((int)x)); }
RLHF_INLINE Vec<double> widen(Floats x) { return _mm256_cvtps_pd((__m128)x); }
#else
RLHF_INLINE Bits<float> widen(Halves x) { return __builtin_convertvector(x, Bits<float>); }
RLHF_INLINE Mask<float> widen(FloatBytes x) { return __builtin_convertvector(x, Mask<float>); }
RLHF_INLINE Mask<double> widen(DoubleBytes x) { return __builtin_convertvector(x, Mask<double>); }
RLHF_INLINE Vec<double> widen(Floats x) { return __builtin_convertvector(x, Vec<double>); }
#endif
RLHF_INLINE Vec<double> widen(Vec<double> x) { return x; }

template <int kFirst, int... kLane>
RLHF_INLINE Vec<double> widened(Vec<float> x, std::integer_sequence<int, kLane...>) {
  return widen(__builtin_shufflevector(x, x, (kFirst + kLane)...));
}

// A sum over vectors, kept in double.
struct DoubleSum {
  Vec<double> lanes{};

  RLHF_INLINE void operator+=(Vec<float> x) {
    constexpr int kHalf = kLanes<double>;
    constexpr std::make_integer_sequence<int, kHalf> half{};
    lanes += widened<0>(x, half) + widened<kHalf>(x, half);
  }
  RLHF_INLINE void operator+=(Vec<double> x) { lanes += x; }
  RLHF_INLINE double total() const { return sum<double>(lanes); }
};

RLHF_INLINE Vec<float> load(const BFloat16* p) { return (Vec<float>)(widen(load_raw<Halves>(p)) << 16); }

RLHF_INLINE Vec<float> load(const Float16* p) {
  const Bits<float> half = widen(load_raw<Halves>(p));
  // The exponent is rebiased by a product, which is exact and normalises subnormal halves; inf and NaN keep the largest
  // exponent.
  const Bits<float> magnitude = (half & 0x7fff) << 13;
  const Bits<float> finite = (Bits<float>)((Vec<float>)magnitude * 0x1p112f);
  const Bits<float> bits = magnitude >= (0x7c00u << 13) ? magnitude | 0x7f800000u : finite;
  return (Vec<float>)(bits | ((half & 0x8000) << 16));
}

template <class V>
RLHF_INLINE void store_raw(void* p, V x) {
  __builtin_memcpy(p, &x, sizeof(V));
}

RLHF_INLINE Vec<float> narrow(Vec<float> x, const float*) { return x; }
RLHF_INLINE Vec<double> narrow(Vec<double> x, const double*) { return x; }

// Round to nearest even, as torch does.
RLHF_INLINE Halves narrow(Vec<float> x, const BFloat16*) {
  const Bits<float> bits = (Bits<float>)x;
  const Bits<float> rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  return __builtin_convertvector(x == x ? rounded : Bits<float>{} + 0x7fc0u, Halves);
}

RLHF_INLINE Halves narrow(Vec<float> x, const Float16*) {
  const Bits<float> sign = (Bits<float>)x & 0x80000000u;
  const Bits<float> magnitude = (Bits<float>)x ^ sign;
  const Bits<float> normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14 the sum with 0.5 leaves the subnormal half in the low bits, rounded by the adder.
  const Bits<float> subnormal = (Bits<float>)((Vec<float>)magnitude + 0.5f) - 0x3f000000u;
  Bits<float> half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? Bits<float>{} + 0x7c00u : half;
  half = magnitude > 0x7f800000u ? Bits<float>{} + 0x7e00u : half;
  return __builtin_convertvector(half | (sign >> 16), Halves);
}

template <class T>
RLHF_INLINE void store(T* p, Vec<Compute<T>> x) {
  store_raw(p, narrow(x, p));
}

// The first n lanes of x (all of them where n is larger); the others are `fill`.
template <class T>
RLHF_INLINE Vec<T> keep(Vec<T> x, int64_t n, T fill) {
  for (int i = 0; i < kLanes<T>; ++i) x[i] = i < n ? x[i] : fill;
  return x;
}

// As load and store, of the first n lanes only: p may end there. Lanes not loaded are `fill`.
template <class T>
RLHF_INLINE Vec<Compute<T>> load(const T* p, int64_t n, Compute<T> fill) {
  if (__builtin_expect(n >= kLanes<Compute<T>>, 1)) return load(p);
  T lanes[kLanes<Compute<T>>] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i];
  return keep(load(lanes), n, fill);
}
template <class T>
RLHF_INLINE void store(T* p, Vec<Compute<T>> x, int64_t n) {
  if (__builtin_expect(n >= kLanes<Compute<T>>, 1)) return store(p, x);
  T lanes[kLanes<Compute<T>>];
  store(lanes, x);
  for (int i = 0; i < n; ++i) p[i] = lanes[i];
}

// kLanes<double> elements as double, whatever they are stored as.
template <class T>
RLHF_INLINE Vec<double> load_wide(const T* p, int64_t n) {
  using Stored = typename VectorOf<T, kLanes<double>>::type;
  if (__builtin_expect(n >= kLanes<double>, 1)) return widen(load_raw<Stored>(p));
  Stored x{};
  for (int i = 0; i < n; ++i) x[i] = p[i];
  return widen(x);
}
template <class T>
RLHF_INLINE void store_wide(T* p, Vec<double> x, int64_t n) {
  const auto stored = __builtin_convertvector(x, typename VectorOf<T, kLanes<double>>::type);
  if (__builtin_expect(n >= kLanes<double>, 1)) return store_raw(p, stored);
  for (int i = 0; i < n; ++i) p[i] = stored[i];
}

// The counted ones of the first n lanes; a null mask counts everything.
template <class T>
RLHF_INLINE Mask<T> load_mask(const bool* p, int64_t n) {
  using Bytes = typename VectorOf<uint8_t, kLanes<T>>::type;
  Bytes counted = ~Bytes{};
  if (__builtin_expect(n < kLanes<T>, 0)) {
    for (int i = 0; i < kLanes<T>; ++i) counted[i] = i < n && (p == nullptr || p[i]);
  } else if (p != nullptr) {
    counted = load_raw<Bytes>(p);
  }
  return widen(counted) != 0;
}

}  // namespace
}  // namespace rlhf::RLHF_ISA
