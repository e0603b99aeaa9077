/* permission.h: may this process use AMX tiles? */
#ifndef DM_AMX_PERMISSION_H
#define DM_AMX_PERMISSION_H

/* Compilers that know AMX. Others build the ladder without that level. */
#if defined(__x86_64__) && defined(__linux__)
#if defined(__clang__) ? __clang_major__ >= 12 : __GNUC__ >= 11
#define DM_BUILDS_AMX
#endif
#endif

/* Whether CPU and kernel have AMX-INT8 tiles and let this process use them. Asks the kernel for the permission, which
 * then holds for all threads of the process. A kernel or a sandbox that refuses is a CPU without AMX. */
int dm_amx_permitted(void);

#endif
