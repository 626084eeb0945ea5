/* What the entrypoint wrote, the last 1 MiB of it, numbered: kept for a host that is away. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define LOG_RING_BYTES (1024u * 1024u)
#define LOG_CHUNK_MAX (16u * 1024u)

struct log_entry {
  uint64_t sequence, time_us;
  uint32_t length;
  uint32_t stream; /* 1 stdout, 2 stderr */
};

/* Never fails: the oldest make room. */
void log_append(uint32_t stream, uint64_t time_us, const void *data, uint32_t length);
uint64_t log_oldest(void); /* equals log_next() while empty */
uint64_t log_next(void);
/* What the next log_take gives starts after this one. */
void log_seek(uint64_t last_held);
/* True once, with the range, where what should come next was lost. */
bool log_take_gap(uint64_t *from, uint64_t *to);
/* The next entry and its bytes; false when there is none. */
bool log_take(struct log_entry *entry, uint8_t data[LOG_CHUNK_MAX]);
/* Bytes kept that were not taken yet. */
size_t log_untaken_bytes(void);
