#include "session.h"
#include "channel.h"
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/wait.h>
#include <unistd.h>

#define OUTPUT_WINDOW (256u * 1024u)
#define STDIN_WINDOW (64u * 1024u)
#define OUTPUT_CHUNK (16u * 1024u)
#define STDIN_GRANT (16u * 1024u)
#define HANG_UP_GRACE_US 2000000u
#define MAX_WORDS 1024

struct session {
  uint16_t stream; /* 0: a free slot */
  pid_t pid;       /* 0 once reaped */
  int status;
  bool tty, stdin_ended, silent; /* silent: nobody listens any more */
  int input, outputs[2];         /* ours; with a terminal all are its master */
  uint32_t credit[2], owed;      /* owed: stdin bytes passed on that the host may send again */
  size_t stdin_start, stdin_end;
  uint64_t kill_at_us;
  uint8_t stdin_bytes[STDIN_WINDOW];
};

static struct session sessions[MAX_SESSIONS];
static const struct identity *identity;
static char **base_env;
static const char *base_cwd;

static void start(struct session *session, char **words, size_t argc, size_t envc);
static int open_streams(struct session *session, int child[3]);
static int open_terminal(int *master, int *slave);
static void refuse(uint16_t stream, int error, const char *what);
static void accept_stdin(struct session *session, const struct frame *frame);
static void hang_up(struct session *session);
static bool pump_stdin(struct session *session);
static bool pump_output(struct session *session, int which);
static void finish(struct session *session);
static void close_fd(int *fd);

void sessions_prepare(const struct identity *who, char **env, const char *cwd) {
  identity = who;
  base_env = env;
  base_cwd = cwd;
}

static struct session *find(uint16_t stream) {
  for (size_t i = 0; i < MAX_SESSIONS; i++)
    if (sessions[i].stream == stream) return &sessions[i];
  return NULL;
}

/* u8 terminal, u8 zero, u16 rows, columns, arguments, variables; then folder, arguments, variables, each with a NUL. */
void session_open(const struct frame *frame) {
  if (frame->stream == 0 || find(frame->stream) != NULL) return;
  if (identity == NULL) return refuse(frame->stream, EAGAIN, "the cell has not started yet");
  struct session *session = find(0);
  if (session == NULL) return refuse(frame->stream, EAGAIN, "too many sessions are open in this cell");
  const char *text = (const char *)frame->payload + 10, *end = (const char *)frame->payload + frame->length;
  char *words[MAX_WORDS + 1] = {NULL};
  size_t count = 0, argc = frame->length < 10 ? 0 : get16(frame->payload + 6), envc = argc == 0 ? 0 : get16(frame->payload + 8);
  if (argc == 0 || 1 + argc + envc > MAX_WORDS || end[-1] != 0)
    return refuse(frame->stream, EINVAL, "the request is malformed or too long");
  while (text < end && count < 1 + argc + envc) {
    words[count++] = (char *)text;
    text += strlen(text) + 1;
  }
  if (count != 1 + argc + envc) return refuse(frame->stream, EINVAL, "the request is malformed");
  memset(session, 0, offsetof(struct session, stdin_bytes));
  session->stream = frame->stream;
  session->tty = frame->payload[0] & 1;
  session->credit[0] = session->credit[1] = OUTPUT_WINDOW;
  session->input = session->outputs[0] = session->outputs[1] = -1;
  start(session, words, argc, envc);
  if (session->stream != 0 && session->tty) {
    struct winsize size = {.ws_row = get16(frame->payload + 2), .ws_col = get16(frame->payload + 4)};
    ioctl(session->input, TIOCSWINSZ, &size);
  }
}

static void start(struct session *session, char **words, size_t argc, size_t envc) {
  int child[3] = {-1, -1, -1};
  char *arguments[MAX_WORDS + 1], term[] = "TERM=xterm-256color", *extra[MAX_WORDS + 1];
  memcpy(arguments, words + 1, argc * sizeof(char *));
  arguments[argc] = NULL;
  extra[0] = term;
  memcpy(extra + 1, words + 1 + argc, envc * sizeof(char *));
  char **env = merge_env(base_env, session->tty ? extra : extra + 1, session->tty ? envc + 1 : envc);
  const char *what = "its streams";
  pid_t pid = env == NULL ? -ENOMEM : open_streams(session, child);
  if (pid == 0) {
    struct program program = {.argv = arguments, .env = env, .cwd = *words[0] == 0 ? base_cwd : words[0], .identity = identity,
                              .stdin_fd = child[0], .stdout_fd = child[1], .stderr_fd = child[2], .tty = session->tty};
    pid = start_program(&program, &what);
  }
  free(env);
  for (int i = 0; i < (session->tty ? 1 : 3); i++) close_fd(&child[i]);
  if (pid < 0) {
    char message[512];
    snprintf(message, sizeof message, "%.300s: %s: %s", arguments[0], what, strerror(-pid));
    refuse(session->stream, -pid, message);
    finish(session);
    return;
  }
  session->pid = pid;
  uint8_t payload[4];
  put32(payload, (uint32_t)pid);
  channel_send(FRAME_EXEC_STARTED, session->stream, payload, sizeof payload, NULL, 0);
}

static int open_streams(struct session *session, int child[3]) {
  if (session->tty) {
    int error = open_terminal(&session->input, &child[0]);
    session->outputs[0] = session->input;
    child[1] = child[2] = child[0];
    return error;
  }
  int pipes[3][2];
  for (int i = 0; i < 3; i++) {
    if (pipe2(pipes[i], O_CLOEXEC) == -1) return -errno;
    int theirs = i == 0 ? 0 : 1;
    child[i] = pipes[i][theirs];
    *(i == 0 ? &session->input : &session->outputs[i - 1]) = pipes[i][1 - theirs];
    fcntl(pipes[i][1 - theirs], F_SETFL, O_NONBLOCK);
    (void)!fchown(child[i], identity->uid, identity->gid); /* so that /dev/stdout opens for an ordinary user too */
  }
  return 0;
}

static int open_terminal(int *master, int *slave) {
  *master = open("/dev/pts/ptmx", O_RDWR | O_NOCTTY | O_CLOEXEC | O_NONBLOCK);
  if (*master == -1) return -errno;
  int unlock = 0;
  if (ioctl(*master, TIOCSPTLCK, &unlock) == -1) return -errno;
  *slave = ioctl(*master, TIOCGPTPEER, O_RDWR | O_NOCTTY | O_CLOEXEC);
  if (*slave == -1) return -errno;
  (void)!fchown(*slave, identity->uid, 5);
  return 0;
}

static void refuse(uint16_t stream, int error, const char *what) {
  uint8_t number[4];
  put32(number, (uint32_t)error);
  channel_send(FRAME_EXEC_ERROR, stream, number, sizeof number, what, strlen(what));
}

void session_frame(const struct frame *frame) {
  struct session *session = frame->stream == 0 ? NULL : find(frame->stream);
  if (session == NULL) return;
  const uint8_t *payload = frame->payload;
  if (frame->type == FRAME_STDIN) {
    accept_stdin(session, frame);
  } else if (frame->type == FRAME_STDIN_END) {
    session->stdin_ended = true;
  } else if (frame->type == FRAME_EXEC_CLOSE) {
    hang_up(session);
  } else if (frame->type == FRAME_OUTPUT_CREDIT && frame->length == 5 && (payload[0] == 1 || payload[0] == 2)) {
    uint32_t *credit = &session->credit[payload[0] - 1], granted = get32(payload + 1);
    *credit = granted > OUTPUT_WINDOW - *credit ? OUTPUT_WINDOW : *credit + granted;
  } else if (frame->type == FRAME_RESIZE && frame->length == 4 && session->tty && session->input != -1) {
    struct winsize size = {.ws_row = get16(payload), .ws_col = get16(payload + 2)};
    ioctl(session->input, TIOCSWINSZ, &size); /* the kernel tells the foreground group by SIGWINCH */
  } else if (frame->type == FRAME_SIGNAL && frame->length == 4 && session->pid != 0) {
    kill(-session->pid, (int)get32(payload));
  }
}

static void accept_stdin(struct session *session, const struct frame *frame) {
  if (session->input == -1 || session->stdin_ended) { /* nobody reads it: the host may go on */
    session->owed += frame->length;
    return;
  }
  if (session->stdin_start > 0) {
    memmove(session->stdin_bytes, session->stdin_bytes + session->stdin_start, session->stdin_end - session->stdin_start);
    session->stdin_end -= session->stdin_start;
    session->stdin_start = 0;
  }
  if (frame->length > STDIN_WINDOW - session->stdin_end) return hang_up(session); /* beyond what it was given room for */
  memcpy(session->stdin_bytes + session->stdin_end, frame->payload, frame->length);
  session->stdin_end += frame->length;
}

bool sessions_reaped(pid_t pid, int status) {
  for (size_t i = 0; i < MAX_SESSIONS; i++) {
    struct session *session = &sessions[i];
    if (session->stream == 0 || session->pid != pid) continue;
    session->pid = 0;
    session->status = status;
    if (!session->tty) close_fd(&session->input);
    if (session->silent) finish(session);
    return true;
  }
  return false;
}

void sessions_hang_up(void) {
  for (size_t i = 0; i < MAX_SESSIONS; i++)
    if (sessions[i].stream != 0) hang_up(&sessions[i]);
}

static void hang_up(struct session *session) {
  if (session->silent) return;
  session->silent = true;
  if (session->tty) session->outputs[0] = -1; /* the same descriptor */
  close_fd(&session->input);
  close_fd(&session->outputs[0]);
  close_fd(&session->outputs[1]);
  if (session->pid == 0) return finish(session);
  kill(-session->pid, SIGHUP);
  session->kill_at_us = boot_us() + HANG_UP_GRACE_US;
}

bool sessions_pump(void) {
  bool moved = false;
  for (size_t i = 0; i < MAX_SESSIONS; i++) {
    struct session *session = &sessions[i];
    if (session->stream == 0) continue;
    if (session->silent) {
      if (boot_us() < session->kill_at_us) continue;
      kill(-session->pid, SIGKILL);
      session->kill_at_us = UINT64_MAX;
      continue;
    }
    bool busy = pump_stdin(session);
    busy |= pump_output(session, 0);
    busy |= pump_output(session, 1);
    moved |= busy;
    /* Dead, and what its pipes held was sent: descendants that keep them open are not waited for. */
    bool drained = (session->outputs[0] == -1 || session->credit[0] > 0) && (session->outputs[1] == -1 || session->credit[1] > 0);
    if (session->pid != 0 || busy || !drained || !channel_has_room()) continue;
    uint8_t payload[5];
    put_exit_status(payload, session->status);
    channel_send(FRAME_EXEC_EXITED, session->stream, payload, sizeof payload, NULL, 0);
    finish(session);
  }
  return moved;
}

static bool pump_stdin(struct session *session) {
  bool moved = false;
  while (session->input != -1 && session->stdin_start < session->stdin_end) {
    ssize_t count = write(session->input, session->stdin_bytes + session->stdin_start, session->stdin_end - session->stdin_start);
    if (count == -1 && (errno == EAGAIN || errno == EINTR)) break;
    if (count == -1) count = (ssize_t)(session->stdin_end - session->stdin_start); /* nobody will read it */
    session->stdin_start += (size_t)count;
    session->owed += (uint32_t)count;
    moved = true;
  }
  bool passed_on = session->stdin_start == session->stdin_end;
  if (passed_on && session->stdin_ended && session->input != -1) {
    if (session->tty) {
      (void)!write(session->input, "\004", 1); /* a terminal's end of input; it stays open for output */
      session->stdin_ended = false;
    } else {
      close_fd(&session->input);
    }
  }
  if (session->owed >= STDIN_GRANT || (session->owed > 0 && passed_on)) {
    uint8_t payload[4];
    put32(payload, session->owed);
    channel_send(FRAME_STDIN_CREDIT, session->stream, payload, sizeof payload, NULL, 0);
    session->owed = 0;
  }
  return moved;
}

/* One chunk at most: every session and the logs get their turn. */
static bool pump_output(struct session *session, int which) {
  static uint8_t chunk[OUTPUT_CHUNK];
  uint32_t *credit = &session->credit[which];
  int *fd = &session->outputs[which];
  if (*fd == -1 || *credit == 0 || !channel_has_room()) return false;
  ssize_t count = read(*fd, chunk, *credit < sizeof chunk ? *credit : sizeof chunk);
  if (count == -1 && (errno == EAGAIN || errno == EINTR)) return false;
  if (count <= 0) { /* EOF; EIO from a terminal that nobody holds any more */
    if (session->tty) *fd = -1; /* the master stays open as `input` */
    else close_fd(fd);
    return false;
  }
  *credit -= (uint32_t)count;
  uint8_t number = (uint8_t)(which + 1);
  channel_send(FRAME_OUTPUT, session->stream, &number, 1, chunk, (size_t)count);
  return true;
}

void sessions_wait(struct wait_set *set) {
  for (size_t i = 0; i < MAX_SESSIONS; i++) {
    struct session *session = &sessions[i];
    if (session->stream == 0) continue;
    if (session->silent) {
      wake_at(set, session->kill_at_us);
      continue;
    }
    if (session->input != -1 && session->stdin_start < session->stdin_end) wait_for(set, session->input, POLLOUT);
    for (int which = 0; which < 2; which++)
      if (session->outputs[which] != -1 && session->credit[which] > 0 && channel_has_room()) wait_for(set, session->outputs[which], POLLIN);
  }
}

static void finish(struct session *session) {
  if (session->tty) session->outputs[0] = -1;
  close_fd(&session->input);
  close_fd(&session->outputs[0]);
  close_fd(&session->outputs[1]);
  session->stream = 0;
}

void put_exit_status(uint8_t out[5], int status) {
  out[0] = WIFSIGNALED(status) ? 1 : 0;
  put32(out + 1, (uint32_t)(WIFSIGNALED(status) ? WTERMSIG(status) : WEXITSTATUS(status)));
}

static void close_fd(int *fd) {
  if (*fd != -1) close(*fd);
  *fd = -1;
}
