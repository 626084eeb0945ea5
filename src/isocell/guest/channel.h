/* The port to the host: frames in, frames out, never blocking. A host may go and another come at any moment. */
#pragma once
#include "codec.h"

void channel_open(int port);
bool channel_is_open(void);
/* Becomes readable when the port may have become readable or writable, or the host came or went. */
int channel_wake_fd(void);
/* Takes note of what woke us. */
void channel_woken(void);

/* The next frame of the host, of any host; false when there is none now. A host that left is told by `left`. */
bool channel_receive(struct frame *frame, bool *left);

/* Forgets what was on its way to a host that is gone. */
void channel_reset_output(void);
/* Room for a frame of whole size, with enough left for every answer that may have to follow. */
bool channel_has_room(void);
/* Queues a frame. Control frames always fit: see channel_has_room and channel_receive. */
void channel_send(uint8_t type, uint16_t stream, const void *first, size_t first_length, const void *second, size_t second_length);
/* Writes what the host takes now. */
void channel_flush(void);
bool channel_is_flushed(void);
/* When the host last took something, or the output was last empty (CLOCK_BOOTTIME). */
uint64_t channel_progress_us(void);
