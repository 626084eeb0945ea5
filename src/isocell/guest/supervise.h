/* The life of a cell after its start: one loop that moves bytes, reaps, and hears the host. */
#pragma once
#include "guest.h"
#include <stdint.h>

struct entrypoint {
  pid_t pid;
  int stdout_fd, stderr_fd; /* ours, non-blocking */
  uint32_t stop_signal;
};

/* `init_us`: CLOCK_BOOTTIME of init's first instruction. */
void supervise_prepare(uint64_t init_us);
_Noreturn void supervise(const struct entrypoint *entrypoint);
/* Tells the host a failure, waits a bounded time to be heard, and comes back. */
void supervise_failure(const char *code, const char *message);
