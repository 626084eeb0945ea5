#include "config.h"
#include "codec.h"
#include <stdlib.h>
#include <string.h>

enum tag { CELL_ID = 1, HOSTNAME, ARGUMENT, VARIABLE, CWD, USER, STOP_SIGNAL, ADDRESS, GATEWAY, GATEWAY_MAC, MTU, OVERLAY_SIZE_MIB };

static const char *take_entry(struct config *config, uint16_t tag, const uint8_t *value, uint32_t length);
static const char *take_text(char **into, const uint8_t *value, uint32_t length);
static const char *take_word(char **words, size_t *count, const uint8_t *value, uint32_t length);
static const char *take_bytes(void *into, uint32_t wanted, const uint8_t *value, uint32_t length);
static const char *take_number(uint32_t *into, const uint8_t *value, uint32_t length);

size_t config_size(const uint8_t header[CONFIG_HEADER_BYTES]) {
  if (memcmp(header, "FORGECFG", 8) != 0 || get32(header + 8) != 1) return 0;
  uint32_t length = get32(header + 12);
  return length > CONFIG_MAX_BYTES - CONFIG_HEADER_BYTES ? 0 : CONFIG_HEADER_BYTES + length;
}

const char *config_parse(const uint8_t *drive, size_t size, struct config *config) {
  if (size < CONFIG_HEADER_BYTES || config_size(drive) == 0 || config_size(drive) > size)
    return "no config drive of a version this init knows";
  const uint8_t *at = drive + CONFIG_HEADER_BYTES, *end = drive + config_size(drive);
  if (get32(drive + 16) != crc32_of(0, at, (size_t)(end - at))) return "its checksum is wrong";
  *config = (struct config){.stop_signal = 15, .mtu = 1500};
  config->argv = calloc(CONFIG_MAX_WORDS + 1, sizeof(char *));
  config->env = calloc(CONFIG_MAX_WORDS + 1, sizeof(char *));
  if (config->argv == NULL || config->env == NULL) return "no memory";
  while (at < end) {
    if (end - at < 6 || (size_t)(end - at - 6) < get32(at + 2)) return "an entry is cut off";
    uint32_t length = get32(at + 2);
    const char *problem = take_entry(config, get16(at), at + 6, length);
    if (problem != NULL) return problem;
    at += 6 + length;
  }
  if (config->argc == 0) return "it names no command";
  if (config->cell_id == NULL || config->hostname == NULL || config->cwd == NULL || config->user == NULL) return "an entry is missing";
  return NULL;
}

static const char *take_entry(struct config *config, uint16_t tag, const uint8_t *value, uint32_t length) {
  switch (tag) {
    case CELL_ID: return take_text(&config->cell_id, value, length);
    case HOSTNAME: return take_text(&config->hostname, value, length);
    case ARGUMENT: return take_word(config->argv, &config->argc, value, length);
    case VARIABLE: return take_word(config->env, &config->envc, value, length);
    case CWD: return take_text(&config->cwd, value, length);
    case USER: return take_text(&config->user, value, length);
    case STOP_SIGNAL: return take_number(&config->stop_signal, value, length);
    case ADDRESS: return take_bytes(config->address, 16, value, length);
    case GATEWAY: return take_bytes(config->gateway, 16, value, length);
    case GATEWAY_MAC: return take_bytes(config->gateway_mac, 6, value, length);
    case MTU: return take_number(&config->mtu, value, length);
    case OVERLAY_SIZE_MIB: return take_number(&config->overlay_size_mib, value, length);
    default: return "it holds an entry this init does not know";
  }
}

static const char *take_text(char **into, const uint8_t *value, uint32_t length) {
  if (*into != NULL) return "an entry is there twice";
  if (memchr(value, 0, length) != NULL) return "a string holds a NUL";
  *into = malloc(length + 1);
  if (*into == NULL) return "no memory";
  memcpy(*into, value, length);
  (*into)[length] = 0;
  return NULL;
}

static const char *take_word(char **words, size_t *count, const uint8_t *value, uint32_t length) {
  if (*count >= CONFIG_MAX_WORDS) return "too many arguments or variables";
  const char *problem = take_text(&words[*count], value, length);
  if (problem == NULL) (*count)++;
  return problem;
}

static const char *take_bytes(void *into, uint32_t wanted, const uint8_t *value, uint32_t length) {
  if (length != wanted) return "an address has the wrong length";
  memcpy(into, value, wanted);
  return NULL;
}

static const char *take_number(uint32_t *into, const uint8_t *value, uint32_t length) {
  if (length != 4) return "a number has the wrong length";
  *into = get32(value);
  return NULL;
}
