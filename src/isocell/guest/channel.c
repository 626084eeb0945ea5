#include "channel.h"
#include "guest.h"
#include <errno.h>
#include <string.h>
#include <sys/epoll.h>
#include <unistd.h>

#define OUTPUT_BYTES (256u * 1024u)

static int port = -1, edges = -1;
static bool may_read, may_write;
static struct decoder decoder;
static uint8_t output[OUTPUT_BYTES];
static size_t output_start, output_end;
static uint64_t progress_us;

/* Edge-triggered: while the host is away the port is hung up all the time, and only its return is news. */
void channel_open(int fd) {
  port = fd;
  edges = epoll_create1(EPOLL_CLOEXEC);
  struct epoll_event event = {.events = EPOLLIN | EPOLLOUT | EPOLLET};
  if (edges == -1 || epoll_ctl(edges, EPOLL_CTL_ADD, port, &event) == -1) fatal("INTERNAL", "the channel: %s", strerror(errno));
  may_read = may_write = true;
}

bool channel_is_open(void) { return port != -1; }
int channel_wake_fd(void) { return edges; }

void channel_woken(void) {
  struct epoll_event event;
  if (epoll_wait(edges, &event, 1, 0) == 1) may_read = may_write = true;
}

bool channel_receive(struct frame *frame, bool *left) {
  *left = false;
  for (;;) {
    if (decoder_next(&decoder, frame)) return true;
    if (!may_read || output_end - output_start > OUTPUT_BYTES / 2) return false;
    size_t room;
    uint8_t *into = decoder_room(&decoder, &room);
    ssize_t count = read(port, into, room);
    if (count > 0) {
      decoder_filled(&decoder, (size_t)count);
      continue;
    }
    may_read = false;
    if (count == 0) { /* how this driver says that no host is connected */
      decoder_reset(&decoder);
      *left = true;
    }
    return false;
  }
}

void channel_reset_output(void) { output_start = output_end = 0; }

bool channel_has_room(void) { return output_end - output_start + FRAME_MAX < OUTPUT_BYTES / 2; }

void channel_send(uint8_t type, uint16_t stream, const void *first, size_t first_length, const void *second, size_t second_length) {
  size_t total = FRAME_HEADER_BYTES + first_length + second_length;
  if (output_end + total > OUTPUT_BYTES) {
    memmove(output, output + output_start, output_end - output_start);
    output_end -= output_start;
    output_start = 0;
  }
  if (output_end + total > OUTPUT_BYTES) return; /* a host that asks without reading loses answers, not the cell */
  uint8_t *at = output + output_end;
  frame_header(at, type, stream, first, (uint32_t)first_length, second, (uint32_t)second_length);
  memcpy(at + FRAME_HEADER_BYTES, first, first_length);
  memcpy(at + FRAME_HEADER_BYTES + first_length, second, second_length);
  output_end += total;
}

void channel_flush(void) {
  if (output_start == output_end) progress_us = boot_us();
  while (may_write && output_start < output_end) {
    ssize_t count = write(port, output + output_start, output_end - output_start);
    if (count <= 0) {
      may_write = false;
      return;
    }
    output_start += (size_t)count;
    progress_us = boot_us();
  }
}

bool channel_is_flushed(void) { return output_start == output_end; }
uint64_t channel_progress_us(void) { return progress_us; }
