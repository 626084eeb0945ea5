/* Programs that the host runs beside the entrypoint. ../channel-exec.ts is the other side. */
#pragma once
#include "codec.h"
#include "guest.h"
#include "wait.h"

#define MAX_SESSIONS 16

/* Who sessions run as, where, and with which environment. */
void sessions_prepare(const struct identity *identity, char **env, const char *cwd);
void session_open(const struct frame *frame);
/* A frame for a session that is no more is ignored: it crossed our word of the end. */
void session_frame(const struct frame *frame);
/* True when the process was one of ours. */
bool sessions_reaped(pid_t pid, int status);
/* The host is gone: hang up on all. */
void sessions_hang_up(void);
/* Moves what can be moved now; true when anything did. */
bool sessions_pump(void);
void sessions_wait(struct wait_set *set);

/* `kind` and value of an exit as the channel carries it. */
void put_exit_status(uint8_t out[5], int status);
