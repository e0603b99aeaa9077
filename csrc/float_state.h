/* float_state.h: round to nearest, denormals kept, no traps, whatever the caller's thread had set (rule 1). */
#ifndef DM_FLOAT_STATE_H
#define DM_FLOAT_STATE_H
#include <stdint.h>

#if defined(__x86_64__)
#include <xmmintrin.h>

static inline uint64_t dm_float_state(void) { return _mm_getcsr(); }
static inline void dm_set_float_state(uint64_t state) { _mm_setcsr((unsigned)state); }
#define DM_FLOAT_STATE 0x1f80

#elif defined(__aarch64__)

static inline uint64_t dm_float_state(void) {
    uint64_t state;
    __asm__ volatile("mrs %0, fpcr" : "=r"(state));
    return state;
}
static inline void dm_set_float_state(uint64_t state) { __asm__ volatile("msr fpcr, %0" : : "r"(state) : "memory"); }
#define DM_FLOAT_STATE 0

#else
#error "dist-moe runs on x86-64 and AArch64"
#endif

/* Called first in every entry point; dm_set_float_state(saved) last. */
static inline uint64_t dm_enter(void) {
    uint64_t saved = dm_float_state();
    dm_set_float_state(DM_FLOAT_STATE);
    return saved;
}

#endif
