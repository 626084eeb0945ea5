/* Health probes: does a port of this cell answer? Asked from inside, where no policy stands between. */
#pragma once
#include "codec.h"
#include "wait.h"

void probes_prepare(const uint8_t address[16]);
void probe_start(const struct frame *frame);
void probes_forget(void);
void probes_pump(void);
void probes_wait(struct wait_set *set);
