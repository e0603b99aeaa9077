/* dispatch.c: the ladder of ISA levels. Each level computes the same bits; a later one is faster. */
#include "dispatch.h"

#include <string.h>
#if defined(__aarch64__)
#include <sys/auxv.h>
#endif

#include "amx/permission.h"

typedef struct level {
    const dm_kernels *kernels;
    int (*runs_here)(void);
} level;

static int always(void) { return 1; }

#if defined(__x86_64__)

#include <cpuid.h>

/* __builtin_cpu_supports covers the operating system's part (XCR0) too. */
static int has_avx2(void) {
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
}

/* Leaf 7.1, EAX bit 4 (Intel SDM): not all compilers' __builtin_cpu_supports know it. */
static int has_avxvnni(void) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return has_avx2() && __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

static int has_avx512(void) {
    return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}

static int has_avx512vnni(void) { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }

#if defined(DM_BUILDS_AMX)
static int has_amx(void) { return has_avx512vnni() && dm_amx_permitted(); }
#endif

static const level LADDER[] = {
    {&dm_kernels_portable, always},
    {&dm_kernels_avx2, has_avx2},
    {&dm_kernels_avxvnni, has_avxvnni},
    {&dm_kernels_avx512, has_avx512},
    {&dm_kernels_avx512vnni, has_avx512vnni},
#if defined(DM_BUILDS_AMX)
    {&dm_kernels_amx, has_amx},
#endif
};
static const char *const NAMES[] = {
    "portable", "avx2", "avxvnni", "avx512", "avx512vnni",
#if defined(DM_BUILDS_AMX)
    "amx",
#endif
    NULL,
};

#else

/* Bits of Linux's AT_HWCAP and AT_HWCAP2: what the kernel knows of all cores. Source: arch/arm64, uapi/asm/hwcap.h. */
static int has_dotprod(void) { return (getauxval(AT_HWCAP) >> 20 & 1) != 0; }

static int has_i8mm(void) { return has_dotprod() && (getauxval(AT_HWCAP2) >> 13 & 1) != 0; }

static const level LADDER[] = {
    {&dm_kernels_portable, always},
    {&dm_kernels_neon, always},
    {&dm_kernels_neondot, has_dotprod},
    {&dm_kernels_neoni8mm, has_i8mm},
};
static const char *const NAMES[] = {"portable", "neon", "neondot", "neoni8mm", NULL};

#endif

#define LEVEL_COUNT (sizeof LADDER / sizeof LADDER[0])

const char *const *dm_isa_levels(void) { return NAMES; }

const dm_kernels *dm_find_kernels(const char *isa) {
    for (size_t i = LEVEL_COUNT; i-- > 0;) {
        const level *candidate = &LADDER[i];
        if (isa != NULL && strcmp(isa, candidate->kernels->name) != 0) continue;
        if (candidate->runs_here()) return candidate->kernels;
    }
    return NULL;
}

int dm_isa_available(const char *isa) { return isa != NULL && dm_find_kernels(isa) != NULL; }
