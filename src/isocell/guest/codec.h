/* Frames of the channel; ../channel-codec.ts is the other side and holds the description. No system calls here. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define FRAME_MAGIC 0x31474346u
#define FRAME_HEADER_BYTES 20u
#define FRAME_PAYLOAD_MAX (64u * 1024u)
#define FRAME_MAX (FRAME_HEADER_BYTES + FRAME_PAYLOAD_MAX)
#define NONCE_BYTES 16u

enum frame_type {
  FRAME_HELLO = 1, FRAME_TIME, FRAME_EXEC, FRAME_STDIN, FRAME_STDIN_END, FRAME_RESIZE, FRAME_SIGNAL, FRAME_OUTPUT_CREDIT,
  FRAME_EXEC_CLOSE, FRAME_PROBE, FRAME_STOP, FRAME_POWER_OFF,
  FRAME_HELLO_REPLY = 64, FRAME_STARTED, FRAME_LOG, FRAME_DROPPED, FRAME_FATAL, FRAME_EXITED, FRAME_EXEC_STARTED, FRAME_OUTPUT,
  FRAME_EXEC_EXITED, FRAME_EXEC_ERROR, FRAME_STDIN_CREDIT, FRAME_PROBE_RESULT,
};

struct frame {
  uint8_t type;
  uint16_t stream;
  uint32_t length;
  const uint8_t *payload; /* valid until the decoder is next touched */
};

/* Twice a frame: an unfinished one never takes the room a read needs. */
struct decoder {
  size_t start, end;
  uint8_t bytes[2 * FRAME_MAX];
};

void decoder_reset(struct decoder *decoder);
/* Where to read into, and how much; never nothing once decoder_next has said false. Say what came with decoder_filled. */
uint8_t *decoder_room(struct decoder *decoder, size_t *room);
void decoder_filled(struct decoder *decoder, size_t count);
/* The next whole frame. What is not a frame is skipped a byte at a time: after garbage it finds its feet again. */
bool decoder_next(struct decoder *decoder, struct frame *frame);

/* Writes the header of a frame whose payload (of two parts) follows it. */
void frame_header(uint8_t out[FRAME_HEADER_BYTES], uint8_t type, uint16_t stream, const void *first, uint32_t first_length,
                  const void *second, uint32_t second_length);

uint32_t crc32_of(uint32_t crc, const void *data, size_t length);

static inline uint16_t get16(const uint8_t *p) { return (uint16_t)(p[0] | p[1] << 8); }
static inline uint32_t get32(const uint8_t *p) { return (uint32_t)get16(p) | (uint32_t)get16(p + 2) << 16; }
static inline uint64_t get64(const uint8_t *p) { return (uint64_t)get32(p) | (uint64_t)get32(p + 4) << 32; }
static inline void put16(uint8_t *p, uint16_t v) { p[0] = (uint8_t)v; p[1] = (uint8_t)(v >> 8); }
static inline void put32(uint8_t *p, uint32_t v) { put16(p, (uint16_t)v); put16(p + 2, (uint16_t)(v >> 16)); }
static inline void put64(uint8_t *p, uint64_t v) { put32(p, (uint32_t)v); put32(p + 4, (uint32_t)(v >> 32)); }
