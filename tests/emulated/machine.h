/* What a translated kernel is made of: its thread, and PTX's instructions as functions of raw bits.

   A kernel that uses an instruction which is not here does not compile: gcc names the function that is missing. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint8_t pred;
typedef uint16_t b16;
typedef uint32_t b32;
typedef uint64_t b64;

#define SHARED (1ull << 62) /* where the shared memory of every block begins */

/* What memory holds before it is first written: a signalling NaN that no arithmetic returns. */
#define UNWRITTEN32 0x7fa5deadu
#define UNWRITTEN64 0x7fa5dead7fa5deadull

typedef struct Thread Thread;
struct Thread {
    b32 tid, ntid, ctaid, nctaid;
    b32 barrier; /* the number of the one that the thread waits at; 0 before it has begun */
    b32 vote;    /* what the thread brings to a barrier, and then whether any thread brought something */
    const uint8_t *arguments;
    void *registers;
    uint8_t *(*reach)(const Thread *, b64 address, b32 size, int writes, b32 site); /* memory that was checked */
    void (*unwritten)(const Thread *, b32 site);
};

typedef struct {
    b32 (*body)(Thread *); /* runs a thread to its next barrier, whose number it returns, or to its end: 0 */
    b32 registers, shared; /* bytes of a thread, and of a block */
    b32 unit;              /* bytes of the smallest access */
    b32 arguments;         /* how many */
    const b32 *offsets, *sizes;
    const char *const *sites; /* the instructions that reach memory, as text */
} Kernel;

/* --- memory --- */

static inline b64 load64(const Thread *thread, const uint8_t *at, b32 site) {
    b64 x;
    memcpy(&x, at, 8);
    if (x == UNWRITTEN64) thread->unwritten(thread, site);
    return x;
}
static inline b32 load32(const Thread *thread, const uint8_t *at, b32 site) {
    b32 x;
    memcpy(&x, at, 4);
    if (x == UNWRITTEN32) thread->unwritten(thread, site);
    return x;
}
/* Of 16 and 8 bits no pattern is free to tell what was not written. */
static inline b16 load16(const Thread *thread, const uint8_t *at, b32 site) {
    b16 x;
    memcpy(&x, at, 2);
    (void)thread, (void)site;
    return x;
}
static inline b32 load8(const Thread *thread, const uint8_t *at, b32 site) {
    (void)thread, (void)site;
    return *at;
}
static inline b32 load8_signed(const Thread *thread, const uint8_t *at, b32 site) {
    (void)thread, (void)site;
    return (int8_t)*at;
}
static inline void store8(uint8_t *at, b32 x) { *at = (uint8_t)x; }
static inline void store16(uint8_t *at, b16 x) { memcpy(at, &x, 2); }
static inline void store64(uint8_t *at, b64 x) { memcpy(at, &x, 8); }
static inline void store32(uint8_t *at, b32 x) { memcpy(at, &x, 4); }

/* --- barriers: a return, and a jump back to here when all threads have come --- */

#define WAIT(number, brought) thread->vote = (brought); return number; resume_##number:;

/* --- numbers --- */

static inline float real32(b32 x) { float y; memcpy(&y, &x, 4); return y; }
static inline double real64(b64 x) { double y; memcpy(&y, &x, 8); return y; }
static inline b32 bits32(float x) { b32 y; memcpy(&y, &x, 4); return y; }
static inline b64 bits64(double x) { b64 y; memcpy(&y, &x, 8); return y; }

#define FUNCTION1(NAME, WORD, EXPRESSION) static inline WORD NAME(WORD a) { return EXPRESSION; }
#define FUNCTION2(NAME, WORD, EXPRESSION) static inline WORD NAME(WORD a, WORD b) { return EXPRESSION; }
#define CONVERSION(NAME, TO, FROM, EXPRESSION) static inline TO cvt_##NAME(FROM a) { return EXPRESSION; }
#define COMPARISON(NAME, WORD, EXPRESSION) static inline pred setp_##NAME(WORD a, WORD b) { return EXPRESSION; }

#define FLOATS(N, FMA, SQRT, SIGN)                                                            \
    FUNCTION2(add_f##N, b##N, bits##N(real##N(a) + real##N(b)))                               \
    FUNCTION2(sub_f##N, b##N, bits##N(real##N(a) - real##N(b)))                               \
    FUNCTION2(mul_f##N, b##N, bits##N(real##N(a) * real##N(b)))                               \
    FUNCTION2(div_f##N, b##N, bits##N(real##N(a) / real##N(b)))                               \
    FUNCTION1(sqrt_f##N, b##N, bits##N(SQRT(real##N(a))))                                     \
    FUNCTION1(rcp_f##N, b##N, bits##N(1 / real##N(a)))                                        \
    FUNCTION1(abs_f##N, b##N, a & ~SIGN)                                                      \
    FUNCTION1(neg_f##N, b##N, a ^ SIGN)                                                       \
    static inline b##N fma_f##N(b##N a, b##N b, b##N c) {                                     \
        return bits##N(FMA(real##N(a), real##N(b), real##N(c)));                              \
    }                                                                                         \
    COMPARISON(eq_f##N, b##N, real##N(a) == real##N(b))                                       \
    COMPARISON(ne_f##N, b##N, islessgreater(real##N(a), real##N(b)))                          \
    COMPARISON(lt_f##N, b##N, real##N(a) < real##N(b))                                        \
    COMPARISON(le_f##N, b##N, real##N(a) <= real##N(b))                                       \
    COMPARISON(gt_f##N, b##N, real##N(a) > real##N(b))                                        \
    COMPARISON(ge_f##N, b##N, real##N(a) >= real##N(b))                                       \
    COMPARISON(nan_f##N, b##N, isunordered(real##N(a), real##N(b)))                           \
    COMPARISON(num_f##N, b##N, !isunordered(real##N(a), real##N(b)))                          \
    COMPARISON(equ_f##N, b##N, !islessgreater(real##N(a), real##N(b)))                        \
    COMPARISON(neu_f##N, b##N, real##N(a) != real##N(b))                                      \
    COMPARISON(ltu_f##N, b##N, !(real##N(a) >= real##N(b)))                                   \
    COMPARISON(leu_f##N, b##N, !(real##N(a) > real##N(b)))                                    \
    COMPARISON(gtu_f##N, b##N, !(real##N(a) <= real##N(b)))                                   \
    COMPARISON(geu_f##N, b##N, !(real##N(a) < real##N(b)))                                    \
    FUNCTION2(min_f##N, b##N, setp_nan_f##N(a, a) ? b : setp_nan_f##N(b, b) ? a :             \
              real##N(a) < real##N(b) || (real##N(a) == real##N(b) && a & SIGN) ? a : b)      \
    FUNCTION2(max_f##N, b##N, setp_nan_f##N(a, a) ? b : setp_nan_f##N(b, b) ? a :             \
              real##N(a) > real##N(b) || (real##N(a) == real##N(b) && b & SIGN) ? a : b)

FLOATS(32, fmaf, sqrtf, 0x80000000u)
FLOATS(64, fma, sqrt, 0x8000000000000000ull)

/* What a division by 0 gives is not defined; it shall not end the process. */
#define INTEGERS(KIND, N, TYPE, OF_MINUS_1)                                                   \
    FUNCTION2(add_##KIND, b##N, a + b)                                                        \
    FUNCTION2(sub_##KIND, b##N, a - b)                                                        \
    FUNCTION2(mul_lo_##KIND, b##N, a * b)                                                     \
    FUNCTION2(div_##KIND, b##N, b == 0 ? ~b : OF_MINUS_1 && b == (b##N)-1 ? -a : (b##N)((TYPE)a / (TYPE)b)) \
    FUNCTION2(rem_##KIND, b##N, b == 0 ? ~b : OF_MINUS_1 && b == (b##N)-1 ? 0 : (b##N)((TYPE)a % (TYPE)b))  \
    FUNCTION2(min_##KIND, b##N, (TYPE)a < (TYPE)b ? a : b)                                    \
    FUNCTION2(max_##KIND, b##N, (TYPE)a > (TYPE)b ? a : b)                                    \
    static inline b##N mad_lo_##KIND(b##N a, b##N b, b##N c) { return a * b + c; }            \
    static inline b##N shr_##KIND(b##N a, b32 n) { return n < N ? (TYPE)a >> n : (TYPE)a >> (N - 1) >> 1; } \
    COMPARISON(eq_##KIND, b##N, a == b)                                                       \
    COMPARISON(ne_##KIND, b##N, a != b)                                                       \
    COMPARISON(lt_##KIND, b##N, (TYPE)a < (TYPE)b)                                            \
    COMPARISON(le_##KIND, b##N, (TYPE)a <= (TYPE)b)                                           \
    COMPARISON(gt_##KIND, b##N, (TYPE)a > (TYPE)b)                                            \
    COMPARISON(ge_##KIND, b##N, (TYPE)a >= (TYPE)b)

INTEGERS(s32, 32, int32_t, 1)
INTEGERS(u32, 32, uint32_t, 0)
INTEGERS(s64, 64, int64_t, 1)
INTEGERS(u64, 64, uint64_t, 0)
FUNCTION1(neg_s32, b32, -a)
FUNCTION1(neg_s64, b64, -a)
FUNCTION1(abs_s32, b32, (int32_t)a < 0 ? -a : a)
FUNCTION1(abs_s64, b64, (int64_t)a < 0 ? -a : a)
static inline b64 mul_wide_s32(b32 a, b32 b) { return (int64_t)(int32_t)a * (int32_t)b; }
static inline b64 mul_wide_u32(b32 a, b32 b) { return (b64)a * b; }
static inline b64 mad_wide_s32(b32 a, b32 b, b64 c) { return mul_wide_s32(a, b) + c; }
static inline b64 mad_wide_u32(b32 a, b32 b, b64 c) { return mul_wide_u32(a, b) + c; }

#define LOGICAL(SUFFIX, WORD, NOT)                                                            \
    FUNCTION2(and_##SUFFIX, WORD, a & b)                                                      \
    FUNCTION2(or_##SUFFIX, WORD, a | b)                                                       \
    FUNCTION2(xor_##SUFFIX, WORD, a ^ b)                                                      \
    FUNCTION1(not_##SUFFIX, WORD, NOT a)                                                      \
    FUNCTION1(mov_##SUFFIX, WORD, a)                                                          \
    static inline WORD selp_##SUFFIX(WORD a, WORD b, pred chosen) { return chosen ? a : b; }

LOGICAL(pred, pred, !)
LOGICAL(b16, b16, (b16)~)
LOGICAL(b32, b32, ~)
LOGICAL(b64, b64, ~)
static inline b32 shl_b32(b32 a, b32 n) { return n < 32 ? a << n : 0; }
static inline b64 shl_b64(b64 a, b32 n) { return n < 64 ? a << n : 0; }

/* --- 16 bits --- */

static inline float of_half(b16 x) {
    int e = x >> 10 & 31, m = x & 1023;
    float size = e == 31 ? (m ? NAN : INFINITY) : e ? ldexpf(1024 + m, e - 25) : ldexpf(m, -24);
    return x & 0x8000 ? -size : size;
}
static inline b16 to_half(float x) { /* to the nearest, ties to even */
    b16 sign = bits32(x) >> 16 & 0x8000;
    float size = fabsf(x);
    int e;
    if (isnan(x)) return 0x7fff;
    if (size >= 65520) return sign | 0x7c00;
    frexpf(size, &e);
    if (e < -13) return sign | (b16)nearbyintf(ldexpf(size, 24));
    return sign | (b16)(((e + 14) << 10) + (int)nearbyintf(ldexpf(size, 11 - e)) - 1024);
}
CONVERSION(f32_f16, b32, b16, bits32(of_half(a)))
CONVERSION(f16_f32, b16, b32, to_half(real32(a)))
COMPARISON(eq_s16, b16, a == b)
COMPARISON(ne_s16, b16, a != b)
CONVERSION(u32_u16, b32, b16, a)
CONVERSION(s32_s16, b32, b16, (int16_t)a)
CONVERSION(f32_s16, b32, b16, bits32((int16_t)a))
CONVERSION(f32_u16, b32, b16, bits32(a))
CONVERSION(u16_u32, b16, b32, a)
CONVERSION(s64_s32, b64, b32, (int64_t)(int32_t)a)
CONVERSION(u64_u32, b64, b32, a)
CONVERSION(s64_u32, b64, b32, a)
CONVERSION(u32_u64, b32, b64, a)
CONVERSION(s32_s64, b32, b64, a)
CONVERSION(f64_f32, b64, b32, bits64(real32(a)))
CONVERSION(f32_f64, b32, b64, bits32(real64(a)))
CONVERSION(f64_s64, b64, b64, bits64((int64_t)a))
CONVERSION(f64_u64, b64, b64, bits64(a))
CONVERSION(f64_s32, b64, b32, bits64((int32_t)a))
CONVERSION(f64_u32, b64, b32, bits64(a))
CONVERSION(f32_s64, b32, b64, bits32((int64_t)a))
CONVERSION(f32_s32, b32, b32, bits32((int32_t)a))
CONVERSION(f32_u32, b32, b32, bits32(a))
/* What is out of range becomes the nearest that is not, and NaN 0. */
CONVERSION(rzi_s32_f32, b32, b32, isnan(real32(a)) ? 0 : real32(a) >= 0x1p31f ? 0x7fffffffu : real32(a) <= -0x1p31f ? 0x80000000u : (b32)(int32_t)real32(a))
CONVERSION(rzi_u32_f32, b32, b32, !(real32(a) > 0) ? 0 : real32(a) >= 0x1p32f ? ~0u : (b32)real32(a))
