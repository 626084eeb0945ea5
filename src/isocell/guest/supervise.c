#include "supervise.h"
#include "channel.h"
#include "log.h"
#include "probe.h"
#include "session.h"
#include <errno.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/random.h>
#include <sys/signalfd.h>
#include <sys/wait.h>
#include <unistd.h>

#define PROTOCOL_VERSION 1u
/* With no host there is nobody to tell the end to: an agent that restarts is back by then. */
#define LAST_WORD_WAIT_US 60000000u
/* A host that is there but takes nothing for so long no longer holds back the entrypoint's output. */
#define STALL_US 5000000u
#define LOG_HEADROOM (4 * LOG_CHUNK_MAX)
#define READS_A_TURN 16

static struct {
  uint64_t init_us, started_us, exited_us, kill_at_us, power_off_at_us;
  uint8_t boot_id[16], nonce[NONCE_BYTES];
  bool host_known, host_had_time, exited, failed, last_word_sent, last_word_heard;
  int status, signals, uevents;
  struct entrypoint entrypoint;
  const char *failure_code, *failure_message;
} self = {.kill_at_us = UINT64_MAX, .power_off_at_us = UINT64_MAX, .signals = -1, .uevents = -1,
          .entrypoint = {.stdout_fd = -1, .stderr_fd = -1}};

static void turn(void);
static void hear_host(void);
static void meet_host(const struct frame *frame);
static void tell_started(void);
static void begin_stop(uint32_t grace_ms);
static void reap(void);
static bool collect_logs(int *fd, uint32_t stream);
static bool may_collect(void);
static bool tell_logs(void);
static void tell_last_word(void);
static void sleep_until_something(void);

void supervise_prepare(uint64_t init_us) {
  sigset_t child;
  sigemptyset(&child);
  sigaddset(&child, SIGCHLD);
  sigprocmask(SIG_BLOCK, &child, NULL);
  signal(SIGPIPE, SIG_IGN);
  self.init_us = init_us;
  self.signals = signalfd(-1, &child, SFD_CLOEXEC | SFD_NONBLOCK);
  getrandom(self.boot_id, sizeof self.boot_id, GRND_INSECURE);
}

void supervise(const struct entrypoint *entrypoint) {
  self.entrypoint = *entrypoint;
  self.started_us = boot_us();
  self.uevents = open_uevents();
  while (!self.last_word_heard && boot_us() < self.power_off_at_us) turn();
  power_off();
}

void supervise_failure(const char *code, const char *message) {
  if (!channel_is_open()) return;
  self.failed = true;
  self.failure_code = code;
  self.failure_message = message;
  self.power_off_at_us = boot_us() + LAST_WORD_WAIT_US;
  kill(-1, SIGKILL);
  while (!self.last_word_heard && boot_us() < self.power_off_at_us) turn();
}

static void turn(void) {
  channel_woken();
  hear_host();
  reap();
  if (self.uevents != -1 && !self.failed && uevents_tell_corruption(self.uevents))
    fatal("ROOT_TAMPERED", "a block of the root file system is not what its root hash says: it was altered after the image was prepared");
  if (boot_us() >= self.kill_at_us) {
    kill(-1, SIGKILL);
    self.kill_at_us = UINT64_MAX;
  }
  bool more = collect_logs(&self.entrypoint.stdout_fd, 1);
  more |= collect_logs(&self.entrypoint.stderr_fd, 2);
  probes_pump();
  if (self.host_known) {
    bool moved;
    do {
      moved = tell_logs();
      moved |= sessions_pump();
      channel_flush();
    } while (moved && channel_has_room());
    if (!more) tell_last_word();
    channel_flush();
  } else {
    sessions_pump(); /* what was hung up still has to end */
  }
  if (!more) sleep_until_something();
}

static void hear_host(void) {
  if (!channel_is_open()) return;
  struct frame frame;
  bool left;
  while (channel_receive(&frame, &left)) {
    if (frame.type == FRAME_HELLO) meet_host(&frame);
    if (!self.host_known) continue; /* the rest of what a dead host said */
    switch (frame.type) {
      case FRAME_TIME:
        if (frame.length == 8) set_wall_clock(get64(frame.payload), !self.host_had_time);
        self.host_had_time = true;
        break;
      case FRAME_EXEC: session_open(&frame); break;
      case FRAME_PROBE: probe_start(&frame); break;
      case FRAME_STOP:
        if (frame.length == 4) begin_stop(get32(frame.payload));
        break;
      case FRAME_POWER_OFF: self.last_word_heard = self.last_word_sent; break;
      case FRAME_SIGNAL:
        if (frame.stream == 0) {
          if (frame.length == 4 && self.started_us != 0 && !self.exited) kill(self.entrypoint.pid, (int)get32(frame.payload));
          break;
        }
        session_frame(&frame);
        break;
      default: session_frame(&frame);
    }
  }
  if (!left) return;
  self.host_known = false;
  self.last_word_sent = false;
  channel_reset_output();
  sessions_hang_up();
  probes_forget();
}

/* A new nonce is a new host: nothing of what was on its way to the last one matters. */
static void meet_host(const struct frame *frame) {
  if (frame->length != NONCE_BYTES + 12) return;
  bool again = self.host_known && memcmp(self.nonce, frame->payload, NONCE_BYTES) == 0;
  if (!again) {
    memcpy(self.nonce, frame->payload, NONCE_BYTES);
    channel_reset_output();
    sessions_hang_up();
    probes_forget();
    log_seek(get64(frame->payload + NONCE_BYTES + 4));
    self.last_word_sent = false;
  }
  self.host_known = true;
  uint8_t reply[NONCE_BYTES + 52];
  memcpy(reply, self.nonce, NONCE_BYTES);
  uint8_t *at = reply + NONCE_BYTES;
  put32(at, PROTOCOL_VERSION);
  memcpy(at + 4, self.boot_id, 16);
  put64(at + 20, self.init_us);
  put64(at + 28, boot_us());
  put64(at + 36, log_oldest());
  put64(at + 44, log_next());
  channel_send(FRAME_HELLO_REPLY, 0, reply, sizeof reply, NULL, 0);
  if (!again && self.started_us != 0) tell_started();
}

static void tell_started(void) {
  uint8_t payload[12];
  put64(payload, self.started_us);
  put32(payload + 8, (uint32_t)self.entrypoint.pid);
  channel_send(FRAME_STARTED, 0, payload, sizeof payload, NULL, 0);
}

static void begin_stop(uint32_t grace_ms) {
  if (self.exited || self.started_us == 0) return;
  uint64_t kill_at_us = boot_us() + grace_ms * 1000ull;
  if (kill_at_us < self.kill_at_us) self.kill_at_us = kill_at_us;
  kill(self.entrypoint.pid, (int)self.entrypoint.stop_signal);
}

static void reap(void) {
  struct signalfd_siginfo info;
  while (read(self.signals, &info, sizeof info) > 0) continue;
  int status;
  for (pid_t pid; (pid = waitpid(-1, &status, WNOHANG)) > 0;) {
    if (sessions_reaped(pid, status) || pid != self.entrypoint.pid || self.exited) continue;
    self.exited = true;
    self.exited_us = boot_us();
    self.status = status;
    self.power_off_at_us = boot_us() + LAST_WORD_WAIT_US;
    self.kill_at_us = UINT64_MAX;
    kill(-1, SIGKILL); /* the cell is its entrypoint: nothing outlives it */
  }
}

/* True when there may be more at once. */
static bool collect_logs(int *fd, uint32_t stream) {
  static uint8_t chunk[LOG_CHUNK_MAX];
  for (int reads = 0; *fd != -1 && may_collect(); reads++) {
    if (reads == READS_A_TURN) return true;
    ssize_t count = read(*fd, chunk, sizeof chunk);
    if (count == -1 && (errno == EAGAIN || errno == EINTR)) {
      if (!self.exited) return false;
      count = 0; /* all writers were killed: what is not here will never come */
    }
    if (count > 0) {
      log_append(stream, wall_us(), chunk, (uint32_t)count);
      continue;
    }
    close(*fd);
    *fd = -1;
  }
  return false;
}

/* While a host listens its pace is the entrypoint's; without one the oldest logs give way instead. */
static bool may_collect(void) {
  if (!self.host_known || log_untaken_bytes() < LOG_RING_BYTES - LOG_HEADROOM) return true;
  return boot_us() - channel_progress_us() > STALL_US;
}

static bool tell_logs(void) {
  static uint8_t chunk[LOG_CHUNK_MAX];
  struct log_entry entry;
  uint64_t from, to;
  uint8_t head[17];
  if (!channel_has_room()) return false;
  if (log_take_gap(&from, &to)) {
    put64(head, from);
    put64(head + 8, to);
    channel_send(FRAME_DROPPED, 0, head, 16, NULL, 0);
  }
  if (!log_take(&entry, chunk)) return false;
  put64(head, entry.sequence);
  put64(head + 8, entry.time_us);
  head[16] = (uint8_t)entry.stream;
  channel_send(FRAME_LOG, 0, head, sizeof head, chunk, entry.length);
  return true;
}

/* The end, after everything that came before it. */
static void tell_last_word(void) {
  bool pipes_closed = self.entrypoint.stdout_fd == -1 && self.entrypoint.stderr_fd == -1;
  if (self.last_word_sent || log_untaken_bytes() > 0 || !channel_has_room()) return;
  if (self.failed) {
    channel_send(FRAME_FATAL, 0, self.failure_code, strlen(self.failure_code) + 1, self.failure_message, strlen(self.failure_message));
  } else if (self.exited && pipes_closed) {
    uint8_t payload[13];
    put64(payload, self.exited_us);
    put_exit_status(payload + 8, self.status);
    channel_send(FRAME_EXITED, 0, payload, sizeof payload, NULL, 0);
  } else {
    return;
  }
  self.last_word_sent = true;
}

static void sleep_until_something(void) {
  struct wait_set set = {.deadline_us = UINT64_MAX};
  if (self.signals != -1) wait_for(&set, self.signals, POLLIN);
  if (self.uevents != -1 && !self.failed) wait_for(&set, self.uevents, POLLIN);
  if (channel_is_open()) wait_for(&set, channel_wake_fd(), POLLIN);
  if (self.entrypoint.stdout_fd != -1 && may_collect()) wait_for(&set, self.entrypoint.stdout_fd, POLLIN);
  if (self.entrypoint.stderr_fd != -1 && may_collect()) wait_for(&set, self.entrypoint.stderr_fd, POLLIN);
  sessions_wait(&set);
  probes_wait(&set);
  wake_at(&set, self.kill_at_us);
  wake_at(&set, self.power_off_at_us);
  uint64_t now = boot_us(), stalled_us = channel_progress_us() + STALL_US;
  if (self.host_known && !channel_is_flushed() && stalled_us > now) wake_at(&set, stalled_us);
  int timeout_ms = -1;
  if (set.deadline_us != UINT64_MAX) timeout_ms = set.deadline_us <= now ? 0 : (int)((set.deadline_us - now) / 1000 + 1);
  if (self.last_word_heard) return;
  poll(set.fds, set.count, timeout_ms);
}
