#include "log.h"
#include <string.h>

static uint8_t ring[LOG_RING_BYTES];
/* Offsets grow for ever and are taken modulo the size. */
static uint64_t head, tail, cursor;
static uint64_t oldest = 1, next = 1, wanted = 1;

static void copy_in(uint64_t offset, const void *data, size_t length) {
  size_t at = offset % LOG_RING_BYTES, first = LOG_RING_BYTES - at < length ? LOG_RING_BYTES - at : length;
  memcpy(ring + at, data, first);
  memcpy(ring, (const uint8_t *)data + first, length - first);
}

static void copy_out(uint64_t offset, void *data, size_t length) {
  size_t at = offset % LOG_RING_BYTES, first = LOG_RING_BYTES - at < length ? LOG_RING_BYTES - at : length;
  memcpy(data, ring + at, first);
  memcpy((uint8_t *)data + first, ring, length - first);
}

static uint64_t entry_end(uint64_t offset) {
  struct log_entry entry;
  copy_out(offset, &entry, sizeof entry);
  return offset + sizeof entry + entry.length;
}

void log_append(uint32_t stream, uint64_t time_us, const void *data, uint32_t length) {
  struct log_entry entry = {.sequence = next, .time_us = time_us, .length = length, .stream = stream};
  while (tail - head + sizeof entry + length > LOG_RING_BYTES) {
    head = entry_end(head);
    oldest++;
  }
  if (cursor < head) cursor = head;
  copy_in(tail, &entry, sizeof entry);
  copy_in(tail + sizeof entry, data, length);
  tail += sizeof entry + length;
  next++;
}

uint64_t log_oldest(void) { return oldest; }
uint64_t log_next(void) { return next; }

void log_seek(uint64_t last_held) {
  wanted = last_held + 1 > next ? next : last_held + 1; /* a host that claims the future is told all that comes */
  cursor = head;
  for (uint64_t sequence = oldest; sequence < wanted; sequence++) cursor = entry_end(cursor);
}

bool log_take_gap(uint64_t *from, uint64_t *to) {
  if (wanted >= oldest) return false;
  *from = wanted;
  *to = oldest - 1;
  wanted = oldest;
  return true;
}

bool log_take(struct log_entry *entry, uint8_t data[LOG_CHUNK_MAX]) {
  if (cursor == tail) return false;
  copy_out(cursor, entry, sizeof *entry);
  copy_out(cursor + sizeof *entry, data, entry->length);
  cursor += sizeof *entry + entry->length;
  wanted = entry->sequence + 1;
  return true;
}

size_t log_untaken_bytes(void) { return tail - cursor; }
