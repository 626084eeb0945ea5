/* What the main loop sleeps on. */
#pragma once
#include <poll.h>
#include <stdint.h>

#define WAIT_MAX 128

struct wait_set {
  struct pollfd fds[WAIT_MAX];
  nfds_t count;
  uint64_t deadline_us; /* CLOCK_BOOTTIME */
};

static inline void wait_for(struct wait_set *set, int fd, short events) {
  if (set->count < WAIT_MAX) set->fds[set->count++] = (struct pollfd){.fd = fd, .events = events};
}

static inline void wake_at(struct wait_set *set, uint64_t deadline_us) {
  if (deadline_us < set->deadline_us) set->deadline_us = deadline_us;
}
