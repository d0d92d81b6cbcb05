// The vector type of the instruction set that this translation unit is compiled for, in a namespace of its own, and the
// functions that are made of its operations alone. avx2.h and avx512.h have the operations; no intrinsic is called
// outside this folder.
//
// Sources that include this are compiled once for each instruction set. They keep to plain C++ inside FIAK_ISA: no
// inline function or template of a library, which the linker could hand to code for lesser machines.
#pragma once

// GCC's own AVX-512 intrinsics trip this warning when inlined (GCC bug 105593).
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif

#include <cstdint>

#if defined(FIAK_ISA_AMX_BF16)
#define FIAK_ISA amx_bf16
#define FIAK_ISA_AVX512_BF16
#define FIAK_ISA_AVX512
#elif defined(FIAK_ISA_AVX512_BF16)
#define FIAK_ISA avx512_bf16
#define FIAK_ISA_AVX512
#elif defined(FIAK_ISA_AVX512)
#define FIAK_ISA avx512
#elif defined(FIAK_ISA_AVX2)
#define FIAK_ISA avx2
#else
#error "compile this file with FIAK_ISA_AVX2, FIAK_ISA_AVX512, FIAK_ISA_AVX512_BF16 or FIAK_ISA_AMX_BF16"
#endif

#define FIAK_INLINE static inline __attribute__((always_inline))

#include "kernels/dtypes.h"

#if defined(FIAK_ISA_AVX512)
#include "kernels/cpu/isa/avx512.h"
#else
#include "kernels/cpu/isa/avx2.h"
#endif

namespace fiak::cpu::FIAK_ISA {

/// 2^x for x <= 128 to about one unit in the last place, by the polynomial of Cephes' exp2f; infinite from 127.5 on.
/// What a subnormal number would stand for is 0, but for x within half of -126: a result that is subnormal, or too
/// small for one, takes processors of Intel 150 cycles. NaN stays NaN.
FIAK_INLINE Vec exp2_below_128(Vec x) {
  x = max(broadcast(-127.0f), x);
  // A sum this large has whole numbers for its last bits: those of n, the nearest to x, as an exponent has them.
  const Vec large = broadcast(0x1.8p23f + 127.0f);
  const Vec sum = add(x, large), r = sub(x, sub(sum, large));
  Vec p = broadcast(1.535336188319500e-4f);
  p = fmadd(p, r, broadcast(1.339887440266574e-3f));
  p = fmadd(p, r, broadcast(9.618437357674640e-3f));
  p = fmadd(p, r, broadcast(5.550332471162809e-2f));
  p = fmadd(p, r, broadcast(2.402264791363012e-1f));
  p = fmadd(p, r, broadcast(6.931472028550421e-1f));
  p = fmadd(p, r, broadcast(1.0f));
  return mul(p, shift_to_exponent(sum));
}
/// 2^x for any x; infinite from 127.5 on.
FIAK_INLINE Vec exp2(Vec x) { return exp2_below_128(min(broadcast(128.0f), x)); }
#if defined(FIAK_ISA_AMX_BF16)
/// 2^x to about one unit in the last place, 2^-125 for all that would be less; infinite from 128 on, NaN for NaN. By
/// the minimax polynomial of 2^r on [0, 1] and two instructions that are slow on processors of AMD.
FIAK_INLINE Vec exp2_above_125(Vec x) {
  x = max(broadcast(-125.0f), x);
  const Vec r = above_whole(x);
  Vec p = broadcast(0x1.ec320ap-10f);
  p = fmadd(p, r, broadcast(0x1.26900cp-7f));
  p = fmadd(p, r, broadcast(0x1.c95446p-5f));
  p = fmadd(p, r, broadcast(0x1.ebd5a8p-3f));
  p = fmadd(p, r, broadcast(0x1.62e4f6p-1f));
  p = fmadd(p, r, broadcast(0x1.fffffep-1f));
  return scale_by_exp2(p, x);
}
#endif
constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945309f;
constexpr float kInfinity = __builtin_inff();
constexpr float kNaN = __builtin_nanf("");

// Weights join the scores in the exponent, as powers of two, before anything is rounded away: only their ratios within
// a row matter then, however large or small they are.

/// A weight w > 0 as factor * 2^exponent, exactly. Exponents lie in -64..126, so that 2^-exponent is a number too, and
/// so do those of any other w, which has some finite exponent.
struct WeightParts {
  Vec weight, power;
  explicit __attribute__((always_inline)) WeightParts(Vec w)
      : weight(w), power(both(min(broadcast(0x1p126f), max(w, broadcast(0x1p-64f))), broadcast(kInfinity))) {}
  __attribute__((always_inline)) Vec exponent_minus(Vec shift) const {
    return fmsub(bits_as_numbers(subtract_bits(power, broadcast(1.0f))), broadcast(0x1p-23f), shift);
  }
  /// 2^-exponent
  __attribute__((always_inline)) Vec inverse() const { return subtract_bits(broadcast(0x1p127f), power); }
  __attribute__((always_inline)) Vec factor() const { return mul(weight, inverse()); }
};
#if defined(FIAK_ISA_AVX512)
/// s + log2(w) or up to 1 less, for w > 0.
FIAK_INLINE Vec add_log2(Vec s, Vec w) { return add(s, exponent_of(w)); }
/// The exponent of w > 0, minus `shift`, where the weight's factor is that below.
FIAK_INLINE Vec exponent_minus(Vec w, Vec shift) { return sub(exponent_of(w), shift); }
FIAK_INLINE Vec weight_factor(Vec w) { return mantissa_of(w); }
#else
/// s + log2(w) or about .1 more, for w > 0; up to 23 more where w is subnormal.
FIAK_INLINE Vec add_log2(Vec s, Vec w) {
  return fmadd(bits_as_numbers(subtract_bits(w, broadcast(1.0f))), broadcast(0x1p-23f), s);
}
/// The exponent of w > 0, minus `shift`, where the weight's factor is that below.
FIAK_INLINE Vec exponent_minus(Vec w, Vec shift) { return WeightParts(w).exponent_minus(shift); }
FIAK_INLINE Vec weight_factor(Vec w) { return WeightParts(w).factor(); }
#endif
/// The exponent of a weight whose logarithm is given, rounded. What is finite stays so, unless above 2e38.
FIAK_INLINE Vec exponent_of_log(Vec log_weight) {
  return max(broadcast(-3.4028234663852886e38f), mul(log_weight, broadcast(kLog2E)));
}

/// log(x) for finite x > 0 that are not subnormal, to about one unit in the last place: Cephes' logf.
FIAK_INLINE Vec log_of_normal(Vec x) {
  Vec m, n;
  split(x, m, n);
  const Vec f = sub(m, broadcast(1.0f)), square = mul(f, f);
  Vec p = broadcast(7.0376836292e-2f);
  p = fmadd(p, f, broadcast(-1.1514610310e-1f));
  p = fmadd(p, f, broadcast(1.1676998740e-1f));
  p = fmadd(p, f, broadcast(-1.2420140846e-1f));
  p = fmadd(p, f, broadcast(1.4249322787e-1f));
  p = fmadd(p, f, broadcast(-1.6668057665e-1f));
  p = fmadd(p, f, broadcast(2.0000714765e-1f));
  p = fmadd(p, f, broadcast(-2.4999993993e-1f));
  p = fmadd(p, f, broadcast(3.3333331174e-1f));
  p = mul(mul(p, f), square);
  p = fmadd(n, broadcast(-2.12194440e-4f), p);
  p = fmadd(square, broadcast(-0.5f), p);
  return fmadd(n, broadcast(0.693359375f), add(f, p));
}

FIAK_INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }
FIAK_INLINE int64_t larger(int64_t a, int64_t b) { return a > b ? a : b; }
/// The next multiple of the vector length.
FIAK_INLINE int64_t padded(int64_t size) { return (size + kLanes - 1) / kLanes * kLanes; }

/// A number as a type.
template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

#if defined(FIAK_ISA_AVX512_BF16)
constexpr bool kHasVnni = true;
#else
constexpr bool kHasVnni = false;
#endif

}  // namespace fiak::cpu::FIAK_ISA
