/* dispatch.h: from an ISA level's name to its table. */
#ifndef DM_DISPATCH_H
#define DM_DISPATCH_H
#include "kernels.h"

/* isa = NULL takes the best level that runs here. NULL if the level is unknown or cannot run. */
const dm_kernels *dm_find_kernels(const char *isa);

#endif
