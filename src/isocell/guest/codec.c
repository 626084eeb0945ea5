#include "codec.h"
#include <string.h>

void decoder_reset(struct decoder *decoder) { decoder->start = decoder->end = 0; }

uint8_t *decoder_room(struct decoder *decoder, size_t *room) {
  if (decoder->start > 0) {
    memmove(decoder->bytes, decoder->bytes + decoder->start, decoder->end - decoder->start);
    decoder->end -= decoder->start;
    decoder->start = 0;
  }
  *room = sizeof decoder->bytes - decoder->end;
  return decoder->bytes + decoder->end;
}

void decoder_filled(struct decoder *decoder, size_t count) { decoder->end += count; }

bool decoder_next(struct decoder *decoder, struct frame *frame) {
  for (;; decoder->start++) {
    const uint8_t *found = memchr(decoder->bytes + decoder->start, FRAME_MAGIC & 0xff, decoder->end - decoder->start);
    decoder->start = found == NULL ? decoder->end : (size_t)(found - decoder->bytes);
    size_t have = decoder->end - decoder->start;
    if (have < FRAME_HEADER_BYTES) return false;
    const uint8_t *at = decoder->bytes + decoder->start;
    uint32_t length = get32(at + 8);
    if (get32(at) != FRAME_MAGIC || length > FRAME_PAYLOAD_MAX || get32(at + 16) != crc32_of(0, at, 16)) continue;
    if (have < FRAME_HEADER_BYTES + length) return false;
    if (get32(at + 12) != crc32_of(0, at + FRAME_HEADER_BYTES, length)) continue;
    *frame = (struct frame){.type = at[4], .stream = get16(at + 6), .length = length, .payload = at + FRAME_HEADER_BYTES};
    decoder->start += FRAME_HEADER_BYTES + length;
    return true;
  }
}

void frame_header(uint8_t out[FRAME_HEADER_BYTES], uint8_t type, uint16_t stream, const void *first, uint32_t first_length,
                  const void *second, uint32_t second_length) {
  put32(out, FRAME_MAGIC);
  out[4] = type;
  out[5] = 0;
  put16(out + 6, stream);
  put32(out + 8, first_length + second_length);
  put32(out + 12, crc32_of(crc32_of(0, first, first_length), second, second_length));
  put32(out + 16, crc32_of(0, out, 16));
}

/* IEEE 802.3, reflected; eight bytes a step (slicing-by-8), for an emulated CPU feels every instruction. */
uint32_t crc32_of(uint32_t crc, const void *data, size_t length) {
  static uint32_t table[8][256];
  if (table[0][1] == 0) {
    for (uint32_t i = 0; i < 256; i++) {
      uint32_t value = i;
      for (int bit = 0; bit < 8; bit++) value = value & 1 ? value >> 1 ^ 0xedb88320u : value >> 1;
      table[0][i] = value;
    }
    for (uint32_t i = 0; i < 256; i++)
      for (int slice = 1; slice < 8; slice++) table[slice][i] = table[slice - 1][i] >> 8 ^ table[0][table[slice - 1][i] & 0xff];
  }
  const uint8_t *p = data;
  crc = ~crc;
  for (; length >= 8; length -= 8, p += 8) {
    uint32_t low = get32(p) ^ crc, high = get32(p + 4);
    crc = table[7][low & 0xff] ^ table[6][low >> 8 & 0xff] ^ table[5][low >> 16 & 0xff] ^ table[4][low >> 24] ^
          table[3][high & 0xff] ^ table[2][high >> 8 & 0xff] ^ table[1][high >> 16 & 0xff] ^ table[0][high >> 24];
  }
  for (; length > 0; length--, p++) crc = table[0][(crc ^ *p) & 0xff] ^ crc >> 8;
  return ~crc;
}
