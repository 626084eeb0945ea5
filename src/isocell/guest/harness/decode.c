/*
 * For tests: init's two parsers of foreign bytes, on the host, under the sanitisers. Both read stdin.
 *   decode frames <chunk bytes>   prints "<type> <stream> <length> <crc of payload>" a frame
 *   decode config                 prints what init would use, or "refused: <why>"
 *   decode fuzz <seconds> <seed>  mutates stdin's bytes and feeds them to both; silence is success
 */
#include "codec.h"
#include "config.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

static struct decoder decoder;

static void decode_frames(const uint8_t *bytes, size_t length, size_t chunk, bool print) {
  decoder_reset(&decoder);
  while (length > 0) {
    size_t room;
    uint8_t *into = decoder_room(&decoder, &room);
    size_t part = chunk < room ? chunk : room;
    if (part > length) part = length;
    if (part == 0) abort(); /* it must always take more */
    memcpy(into, bytes, part);
    decoder_filled(&decoder, part);
    bytes += part;
    length -= part;
    for (struct frame frame; decoder_next(&decoder, &frame);) {
      uint32_t crc = crc32_of(0, frame.payload, frame.length);
      if (print) printf("%u %u %u %u\n", frame.type, frame.stream, frame.length, crc);
    }
  }
}

static void free_config(struct config *config) {
  for (size_t i = 0; i < config->argc; i++) free(config->argv[i]);
  for (size_t i = 0; i < config->envc; i++) free(config->env[i]);
  free(config->argv);
  free(config->env);
  free(config->cell_id);
  free(config->hostname);
  free(config->cwd);
  free(config->user);
}

static void decode_config(const uint8_t *bytes, size_t length, bool print) {
  struct config config = {0};
  const char *problem = config_parse(bytes, length, &config);
  if (print && problem != NULL) printf("refused: %s\n", problem);
  if (print && problem == NULL) {
    printf("%s\n%s\n%s\n%s\n", config.cell_id, config.hostname, config.cwd, config.user);
    printf("%u %u %u\n", config.stop_signal, config.mtu, config.overlay_size_mib);
    for (size_t i = 0; i < 16; i++) printf("%02x", config.address[i]);
    for (size_t i = 0; i < 16; i++) printf("%02x", config.gateway[i]);
    for (size_t i = 0; i < 6; i++) printf("%02x", config.gateway_mac[i]);
    printf("\n%zu %zu\n", config.argc, config.envc);
    for (size_t i = 0; i < config.argc; i++) printf("%s%c", config.argv[i], 0);
    for (size_t i = 0; i < config.envc; i++) printf("%s%c", config.env[i], 0);
  }
  free_config(&config);
}

static void fuzz(const uint8_t *seed, size_t length, double seconds) {
  uint8_t *bytes = malloc(length + 1);
  clock_t end = clock() + (clock_t)(seconds * CLOCKS_PER_SEC);
  while (clock() < end) {
    memcpy(bytes, seed, length);
    size_t used = rand() % 4 == 0 ? (size_t)rand() % (length + 1) : length;
    for (int i = rand() % 8; i > 0 && used > 0; i--) bytes[(size_t)rand() % used] = (uint8_t)rand();
    /* A buffer of exactly this size: the sanitiser sees every byte read beyond it. */
    uint8_t *exact = malloc(used == 0 ? 1 : used);
    memcpy(exact, bytes, used);
    decode_frames(exact, used, 1 + (size_t)rand() % 5000, false);
    if (used >= CONFIG_HEADER_BYTES) { /* with a right checksum, so that the entries are reached */
      size_t size = config_size(exact);
      if (size >= CONFIG_HEADER_BYTES && size <= used)
        put32(exact + 16, crc32_of(0, exact + CONFIG_HEADER_BYTES, size - CONFIG_HEADER_BYTES));
    }
    decode_config(exact, used, false);
    free(exact);
  }
  free(bytes);
}

int main(int argc, char **argv) {
  static uint8_t bytes[8 * 1024 * 1024];
  size_t length = fread(bytes, 1, sizeof bytes, stdin);
  if (argc == 3 && strcmp(argv[1], "frames") == 0) decode_frames(bytes, length, strtoul(argv[2], NULL, 10), true);
  else if (argc == 2 && strcmp(argv[1], "config") == 0) decode_config(bytes, length, true);
  else if (argc == 4 && strcmp(argv[1], "fuzz") == 0) {
    srand((unsigned)strtoul(argv[3], NULL, 10));
    fuzz(bytes, length, strtod(argv[2], NULL));
  } else return 2;
  return 0;
}
