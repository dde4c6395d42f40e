// Vectors of floats at the width of the ISA level that is being compiled, and loads and stores of each dtype.
// Included by the kernels inside their level's compilation only, in that level's namespace.
#pragma once

#include <cstdint>

#include "dtype.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace rellax::RELLAX_LEVEL {
namespace {

#if defined(__AVX512F__)
constexpr int kWidth = 16;
#elif defined(__AVX2__)
constexpr int kWidth = 8;
#else
constexpr int kWidth = 4;
#endif

using Floats = float __attribute__((vector_size(kWidth * sizeof(float))));
using Words = uint32_t __attribute__((vector_size(kWidth * sizeof(uint32_t))));
using Integers = int32_t __attribute__((vector_size(kWidth * sizeof(int32_t))));
using Halves = uint16_t __attribute__((vector_size(kWidth * sizeof(uint16_t))));

struct BFloat16 {
    uint16_t bits;
};
struct Float16 {
    uint16_t bits;
};

// Calls use(T{}) with the type of the dtype's elements.
template <class Use>
inline void with_type(Dtype dtype, const Use& use) {
    switch (dtype) {
        case Dtype::float32: return use(float{});
        case Dtype::bfloat16: return use(BFloat16{});
        case Dtype::float16: return use(Float16{});
    }
}

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

inline Words load_halves(const void* source) {
    Halves halves;
    __builtin_memcpy(&halves, source, sizeof halves);
    return __builtin_convertvector(halves, Words);
}

inline Floats load(const float* source) {
    Floats floats;
    __builtin_memcpy(&floats, source, sizeof floats);
    return floats;
}

inline Floats load(const BFloat16* source) { return (Floats)(load_halves(source) << 16); }

// Exponent and mantissa move into fp32's places, and a sum corrects the exponent's bias. What is subnormal in fp16 gets
// the smallest normal number's exponent, which is then taken off. Infinity and NaN keep a full exponent. No step meets a
// number that is subnormal in fp32: a program may have told its processors to take those for zero.
inline Floats load(const Float16* source) {
    const Words halves = load_halves(source);
    const Words magnitude = (halves & 0x7fffu) << 13;
    const Words subnormal = (Words)((Floats)(magnitude + 0x38800000u) - 0x1p-14f);
    const Words finite = magnitude < (0x0400u << 13) ? subnormal : magnitude + 0x38000000u;
    const Words special = (Words)(magnitude >= (0x7c00u << 13)) & 0x7f800000u;
    return (Floats)(finite | special | (halves & 0x8000u) << 16);
}

inline void store(float* target, Floats values) { __builtin_memcpy(target, &values, sizeof values); }

// Rounds to nearest, ties to even; NaN stays NaN.
inline void store(BFloat16* target, Floats values) {
#if defined(__AVX512BF16__)
    const __m256bh halves = _mm512_cvtneps_pbh((__m512)values);
#else
    const Words bits = (Words)values;
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words nan = (Words)(values != values);
    const Halves halves = __builtin_convertvector((rounded & ~nan) | (0x7fc0u & nan), Halves);
#endif
    __builtin_memcpy(target, &halves, sizeof halves);
}

// Rounds to nearest, ties to even; infinite from 65520 on. What is subnormal in fp16 is rounded by a sum with 0.5,
// whose last place is fp16's smallest number.
inline void store(Float16* target, Floats values) {
    const Words sign = (Words)values & 0x80000000u, magnitude = (Words)values ^ sign;
    const Words subnormal = (Words)((Floats)magnitude + 0.5f) - 0x3f000000u;
    const Words normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
    const Integers order = (Integers)magnitude;
    const Words large = order > 0x7f800000 ? Words{} + 0x7e00u : Words{} + 0x7c00u;
    const Words finite = order < 0x38800000 ? subnormal : normal;
    const Words bits = (order < 0x47800000 ? finite : large) | sign >> 16;
    const Halves halves = __builtin_convertvector(bits, Halves);
    __builtin_memcpy(target, &halves, sizeof halves);
}

// The first `count` < kWidth elements alone; the others load as zero.
template <class T>
inline Floats load_some(const T* source, int64_t count) {
    T padded[kWidth] = {};
    __builtin_memcpy(padded, source, count * sizeof(T));
    return load(padded);
}

template <class T>
inline void store_some(T* target, Floats values, int64_t count) {
    T padded[kWidth];
    store(padded, values);
    __builtin_memcpy(target, padded, count * sizeof(T));
}

// The same for any `count`, negative ones included to load: no more than kWidth elements are taken.
template <class T>
inline Floats load_most(const T* source, int64_t count) {
    return count >= kWidth ? load(source) : count > 0 ? load_some(source, count) : Floats{};
}

template <class T>
inline void store_most(T* target, Floats values, int64_t count) {
    count >= kWidth ? store(target, values) : store_some(target, values, count);
}

// What one multiplication takes of a row: kGroup neighbours in each of kWidth places, whose products are added up.
// float32 goes one by one; bfloat16 goes in pairs, as words.
template <class T>
struct Operand;

template <>
struct Operand<float> {
    using Vector = Floats;
    static constexpr int kGroup = 1;
    static Vector broadcast(const float* source) { return Vector{} + *source; }
};

template <>
struct Operand<BFloat16> {
    using Vector = Words;
    static constexpr int kGroup = 2;
    static Vector broadcast(const BFloat16* source) {
        uint32_t pair;
        __builtin_memcpy(&pair, source, sizeof pair);
        return Vector{} + pair;
    }
};

template <class T>
inline typename Operand<T>::Vector load_operand(const T* source) {
    typename Operand<T>::Vector vector;
    __builtin_memcpy(&vector, source, sizeof vector);
    return vector;
}

inline Floats magnitude(Floats values) { return (Floats)((Words)values & 0x7fffffffu); }

inline Floats multiply_add(Floats a, Floats b, Floats sum) { return sum + a * b; }

inline Floats multiply_add(Words a, Words b, Floats sum) {
#if defined(__AVX512BF16__)
    return (Floats)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
    sum += (Floats)(a << 16) * (Floats)(b << 16);
    return sum + (Floats)(a & 0xffff0000u) * (Floats)(b & 0xffff0000u);
#endif
}

// 2^x for -126 <= x <= 0: 2^f by a polynomial for the rest f after rounding, relative error 2e-9.
inline Floats exp2(Floats x) {
    constexpr float kRound = 0x1.8p23f;  // what is added to it is rounded to a whole number, in its lowest bits
    const Floats shifted = x + kRound, f = x - (shifted - kRound);
    Floats power = 0.00015345812f * f + 0.00133999313f;
    power = power * f + 0.00961848896f;
    power = power * f + 0.0555032878f;
    power = power * f + 0.240226469f;
    power = power * f + 0.693147206f;
    power = power * f + 1.0f;
    return (Floats)((Integers)power + ((Integers)shifted << 23));
}

using Four = float __attribute__((vector_size(4 * sizeof(float))));

// The vector folded to four elements: sums of those whose places differ by multiples of four.
inline Four fold(Floats v) {
#if defined(__AVX512F__)
    const auto half = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
#elif defined(__AVX2__)
    return __builtin_shufflevector(v, v, 0, 1, 2, 3) + __builtin_shufflevector(v, v, 4, 5, 6, 7);
#else
    return v;
#endif
}

// Each of four vectors added up: elements that are half of them apart, over and over.
inline Four sums(const Floats (&v)[4]) {
#if defined(__AVX512F__)
    const auto halves = [](Floats a, Floats b) {
        return __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    };
    const Floats ab = halves(v[0], v[1]), cd = halves(v[2], v[3]);
    Floats fours = __builtin_shufflevector(ab, cd, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
                   __builtin_shufflevector(ab, cd, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    fours += __builtin_shufflevector(fours, fours, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
    fours += __builtin_shufflevector(fours, fours, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14);
    return __builtin_shufflevector(fours, fours, 0, 4, 8, 12);
#else
    const Four a = fold(v[0]), b = fold(v[1]), c = fold(v[2]), d = fold(v[3]);
    const Four ab = __builtin_shufflevector(a, b, 0, 4, 1, 5) + __builtin_shufflevector(a, b, 2, 6, 3, 7);
    const Four cd = __builtin_shufflevector(c, d, 0, 4, 1, 5) + __builtin_shufflevector(c, d, 2, 6, 3, 7);
    return __builtin_shufflevector(ab, cd, 0, 1, 4, 5) + __builtin_shufflevector(ab, cd, 2, 3, 6, 7);
#endif
}

template <int... kLane>
struct Lanes {};
#if defined(__AVX512F__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>;
#elif defined(__AVX2__)
using AllLanes = Lanes<0, 1, 2, 3, 4, 5, 6, 7>;
#else
using AllLanes = Lanes<0, 1, 2, 3>;
#endif

// In every 2 * kHalf lanes: a takes the lower halves of both, b the upper halves.
template <int kHalf, class Vector, int... kLane>
inline void swap_halves(Vector& a, Vector& b, Lanes<kLane...>) {
    const Vector lower =
        __builtin_shufflevector(a, b, (kLane % (2 * kHalf) < kHalf ? kLane : kLane - kHalf + kWidth)...);
    b = __builtin_shufflevector(a, b, (kLane % (2 * kHalf) < kHalf ? kLane + kHalf : kLane + kWidth)...);
    a = lower;
}

// Transposes a square of kWidth rows of floats or words: squares of kHalf change sides, then what is inside them.
template <int kHalf = kWidth / 2, class Vector, int... kRow>
inline void transpose(Vector (&rows)[kWidth], Lanes<kRow...> all) {
    ((kRow & kHalf ? void() : swap_halves<kHalf>(rows[kRow], rows[kRow + kHalf], all)), ...);
    if constexpr (kHalf > 1) transpose<kHalf / 2>(rows, all);
}

// Asks for memory that is read, or written, soon. Functions that do nothing else have to be inlined: GCC takes them for
// ones without effects, and drops calls of them.
template <int kWrite = 0, int kLocality = kWrite ? 3 : 2>
[[gnu::always_inline]] inline void prefetch_bytes(const void* row, int64_t size) {
    constexpr int64_t kLine = 64;
    const char* const begin = static_cast<const char*>(row);
    const char* const first = begin - reinterpret_cast<uintptr_t>(begin) % kLine;
    for (const char* line = first; line < begin + size; line += kLine) __builtin_prefetch(line, kWrite, kLocality);
}

}  // namespace
}  // namespace rellax::RELLAX_LEVEL
