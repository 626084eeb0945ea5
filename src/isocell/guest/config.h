/* The config drive; ../config-drive.ts is the other side and holds the description. No system calls here. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#define CONFIG_MAX_BYTES (1024u * 1024u)
#define CONFIG_HEADER_BYTES 20u
#define CONFIG_MAX_WORDS 8192

struct config {
  char *cell_id, *hostname, *cwd, *user;
  char **argv, **env; /* NULL-terminated */
  size_t argc, envc;
  uint32_t stop_signal, mtu, overlay_size_mib; /* 0: not said */
  uint8_t address[16], gateway[16], gateway_mac[6];
};

/* How long the whole drive is, from its header; 0 where that is no config drive. */
size_t config_size(const uint8_t header[CONFIG_HEADER_BYTES]);
/* NULL, or what is wrong with it. What `config` points to is allocated and stays. */
const char *config_parse(const uint8_t *drive, size_t size, struct config *config);
