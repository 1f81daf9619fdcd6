// Atomics, cached loads and stores, bit and arithmetic functions of the CUDA language.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simt_machine.h"

#define MEGAPT_INLINE __attribute__((always_inline)) inline  // so that an address in the library is the kernel's line

namespace megapt {
namespace emulator __attribute__((visibility("hidden"))) {

template <class T>
struct Same {  // keeps a parameter out of deduction, so that atomicAdd(float*, 1) compiles as with CUDA's overloads
    using type = T;
};
template <class T>
using same_t = typename Same<T>::type;

template <class T, class... Allowed>
constexpr bool one_of = (std::is_same_v<T, Allowed> || ...);

template <class T>
constexpr bool half_number = one_of<T, __half, __nv_bfloat16>;

template <class To, class From>
To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(static_cast<void*>(&to), &from, sizeof to);
    return to;
}

// No thread runs between the read and the write.
template <class T, class Function>
MEGAPT_INLINE T exchange(T* address, Function function) {
    machine().begin_atomic(address, sizeof(T));
    const T old = *address;
    *address = function(old);
    machine().end_atomic();
    return old;
}

template <class T>
T add(T a, T b) {
    if constexpr (half_number<T>)
        return T(static_cast<float>(a) + static_cast<float>(b));
    else if constexpr (one_of<T, __half2, __nv_bfloat162>)
        return T(add(a.x, b.x), add(a.y, b.y));
    else if constexpr (std::is_same_v<T, int>)
        return static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b));
    else
        return a + b;
}

}  // namespace emulator
}  // namespace megapt

// The types are CUDA's: a kernel that needs another does not compile here either.
template <class T>
MEGAPT_INLINE T atomicAdd(T* address, megapt::emulator::same_t<T> value) {
    static_assert(megapt::emulator::one_of<T, int, unsigned, unsigned long long, float, double, __half, __half2,
                                           __nv_bfloat16, __nv_bfloat162>);
    return megapt::emulator::exchange(address, [=](T old) { return megapt::emulator::add(old, value); });
}
template <class T>
MEGAPT_INLINE T atomicSub(T* address, megapt::emulator::same_t<T> value) {
    static_assert(megapt::emulator::one_of<T, int, unsigned>);
    return megapt::emulator::exchange(address, [=](T old) { return static_cast<T>(old - value); });
}
template <class T>
MEGAPT_INLINE T atomicMax(T* address, megapt::emulator::same_t<T> value) {
    static_assert(megapt::emulator::one_of<T, int, unsigned, long long, unsigned long long>);
    return megapt::emulator::exchange(address, [=](T old) { return old > value ? old : value; });
}
template <class T>
MEGAPT_INLINE T atomicMin(T* address, megapt::emulator::same_t<T> value) {
    static_assert(megapt::emulator::one_of<T, int, unsigned, long long, unsigned long long>);
    return megapt::emulator::exchange(address, [=](T old) { return old < value ? old : value; });
}
template <class T>
MEGAPT_INLINE T atomicExch(T* address, megapt::emulator::same_t<T> value) {
    static_assert(megapt::emulator::one_of<T, int, unsigned, unsigned long long, float>);
    return megapt::emulator::exchange(address, [=](T) { return value; });
}
template <class T>
MEGAPT_INLINE T atomicCAS(T* address, megapt::emulator::same_t<T> compare, megapt::emulator::same_t<T> value) {
    static_assert(megapt::emulator::one_of<T, int, unsigned, unsigned long long, unsigned short>);
    return megapt::emulator::exchange(address, [=](T old) { return old == compare ? value : old; });
}
template <class T>
MEGAPT_INLINE T atomicAnd(T* address, megapt::emulator::same_t<T> value) {
    static_assert(megapt::emulator::one_of<T, int, unsigned, unsigned long long>);
    return megapt::emulator::exchange(address, [=](T old) { return old & value; });
}
template <class T>
MEGAPT_INLINE T atomicOr(T* address, megapt::emulator::same_t<T> value) {
    static_assert(megapt::emulator::one_of<T, int, unsigned, unsigned long long>);
    return megapt::emulator::exchange(address, [=](T old) { return old | value; });
}
template <class T>
MEGAPT_INLINE T atomicXor(T* address, megapt::emulator::same_t<T> value) {
    static_assert(megapt::emulator::one_of<T, int, unsigned, unsigned long long>);
    return megapt::emulator::exchange(address, [=](T old) { return old ^ value; });
}
MEGAPT_INLINE unsigned atomicInc(unsigned* address, unsigned limit) {
    return megapt::emulator::exchange(address, [=](unsigned old) { return old >= limit ? 0 : old + 1; });
}
MEGAPT_INLINE unsigned atomicDec(unsigned* address, unsigned limit) {
    return megapt::emulator::exchange(address, [=](unsigned old) { return old == 0 || old > limit ? limit : old - 1; });
}

// One OS thread runs every fiber: memory is always in order. Only a thread that waits must let the others run.
inline void __threadfence() { megapt::emulator::races::fence(); }
inline void __threadfence_block() {}
inline void __threadfence_system() { megapt::emulator::races::fence(); }
inline void __nanosleep(unsigned) { megapt::emulator::machine().let_others_run(); }
[[noreturn]] inline void __trap() { megapt::emulator::machine().fail(megapt::emulator::kLaunchFailure, "__trap"); }

#define MEGAPT_LOAD(name)     \
    template <class T>        \
    T name(const T* address) { \
        return *address;      \
    }
MEGAPT_LOAD(__ldg)
MEGAPT_LOAD(__ldca)
MEGAPT_LOAD(__ldcg)
MEGAPT_LOAD(__ldcs)
MEGAPT_LOAD(__ldcv)
MEGAPT_LOAD(__ldlu)
#undef MEGAPT_LOAD

#define MEGAPT_STORE(name)                                            \
    template <class T>                                                \
    void name(T* address, megapt::emulator::same_t<T> value) { \
        *address = value;                                             \
    }
MEGAPT_STORE(__stcg)
MEGAPT_STORE(__stcs)
MEGAPT_STORE(__stwb)
MEGAPT_STORE(__stwt)
#undef MEGAPT_STORE

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(static_cast<unsigned long long>(x)) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
    unsigned reversed = 0;
    for (int bit = 0; bit < 32; ++bit) reversed |= (x >> bit & 1u) << (31 - bit);
    return reversed;
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
    const uint64_t bytes = static_cast<uint64_t>(y) << 32 | x;
    unsigned result = 0;
    for (int i = 0; i < 4; ++i) {
        const unsigned pick = selector >> (4 * i) & 0xf;
        unsigned byte = static_cast<unsigned>(bytes >> (8 * (pick & 7))) & 0xff;
        if (pick & 8) byte = byte & 0x80 ? 0xff : 0;
        result |= byte << (8 * i);
    }
    return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) << (shift & 31) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
    return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (shift & 31));
}
inline int __mulhi(int a, int b) { return static_cast<int>((static_cast<int64_t>(a) * b) >> 32); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>((static_cast<uint64_t>(a) * b) >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return static_cast<unsigned long long>((static_cast<unsigned __int128>(a) * b) >> 64);
}

inline int __float_as_int(float x) { return megapt::emulator::bit_cast<int>(x); }
inline unsigned __float_as_uint(float x) { return megapt::emulator::bit_cast<unsigned>(x); }
inline float __int_as_float(int x) { return megapt::emulator::bit_cast<float>(x); }
inline float __uint_as_float(unsigned x) { return megapt::emulator::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return megapt::emulator::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return megapt::emulator::bit_cast<double>(x); }

inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rz(float x) { return static_cast<int>(x); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }
inline int __float2int_ru(float x) { return static_cast<int>(std::ceil(x)); }
inline float __int2float_rn(int x) { return static_cast<float>(x); }
inline float __uint2float_rn(unsigned x) { return static_cast<float>(x); }
inline float __double2float_rn(double x) { return static_cast<float>(x); }

// The fast functions are computed well here: their errors on a GPU (a few ulp) do not show.
inline float rsqrtf(float x) { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(x))); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
inline float __frsqrt_rn(float x) { return rsqrtf(x); }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float __expf(float x) { return std::exp(x); }
inline float __exp10f(float x) { return std::pow(10.0f, x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __log10f(float x) { return std::log10(x); }
inline float __sinf(float x) { return std::sin(x); }
inline float __cosf(float x) { return std::cos(x); }
inline float __tanhf(float x) { return std::tanh(x); }
inline float __powf(float x, float y) { return std::pow(x, y); }
inline void __sincosf(float x, float* s, float* c) { *s = std::sin(x), *c = std::cos(x); }
inline float __saturatef(float x) { return x > 0.f ? (x < 1.f ? x : 1.f) : 0.f; }  // NaN becomes 0

// CUDA's global min and max: of floats they are fminf and fmaxf, which drop a NaN; of mixed signs, unsigned.
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr auto max(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return static_cast<T>(std::fmax(static_cast<T>(a), static_cast<T>(b)));
    else
        return static_cast<T>(a) > static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
template <class A, class B, class = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B>>>
constexpr auto min(A a, B b) {
    using T = std::common_type_t<A, B>;
    if constexpr (std::is_floating_point_v<T>)
        return static_cast<T>(std::fmin(static_cast<T>(a), static_cast<T>(b)));
    else
        return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(a) : static_cast<T>(b);
}
