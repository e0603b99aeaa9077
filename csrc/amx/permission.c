/* permission.c: AMX tiles belong to a process only after it has asked for them (Linux 5.16 and later). */
#include "permission.h"

#if defined(DM_BUILDS_AMX)
#define _GNU_SOURCE
#include <cpuid.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>

/* asm/prctl.h of older systems lacks the name. */
#define REQUEST_STATE_PERMISSION 0x1023
#define TILE_CONFIG 17
#define TILE_DATA 18

static int cpu_has_tiles(void) {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx)) return 0;
    const unsigned needed = 1u << 24 | 1u << 25; /* AMX-TILE, AMX-INT8 */
    return (edx & needed) == needed && (ecx & 1u << 8) != 0 /* GFNI */ && (ecx & 1u << 1) != 0 /* VBMI */;
}

static int system_saves_tiles(void) {
    unsigned eax, ebx, ecx, edx;
    if (!__get_cpuid(1, &eax, &ebx, &ecx, &edx) || (ecx & bit_OSXSAVE) == 0) return 0;
    uint32_t low, high;
    __asm__("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    const uint32_t needed = 1u << TILE_CONFIG | 1u << TILE_DATA;
    return (low & needed) == needed;
}

int dm_amx_permitted(void) {
    return cpu_has_tiles() && system_saves_tiles() && syscall(SYS_arch_prctl, REQUEST_STATE_PERMISSION, TILE_DATA) == 0;
}

#else

int dm_amx_permitted(void) { return 0; }

#endif
