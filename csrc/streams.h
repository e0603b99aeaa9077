/* streams.h: how streams of packed tiles are cut and begun. */
#ifndef DM_STREAMS_H
#define DM_STREAMS_H
#include <stddef.h>
#include <stdint.h>

/* Waking a thread and meeting it again takes less than half a microsecond; reading this much takes two. */
#define DM_LEAST_SHARE_BYTES 32768
#define DM_STREAM_START_BYTES 2048

/* Units of so many bytes, read for T tokens, that are worth a share of their own. */
static inline size_t dm_least_units(size_t unit_bytes, size_t T) { return DM_LEAST_SHARE_BYTES / (unit_bytes * T) + 1; }

/* A new stream's first bytes, asked for while the one before it is read: the hardware's own prefetch starts late. */
static inline void dm_prefetch_stream(const void *first, size_t bytes) {
    bytes = bytes < DM_STREAM_START_BYTES ? bytes : DM_STREAM_START_BYTES;
    for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch((const uint8_t *)first + i, 0, 2);
}

#endif
