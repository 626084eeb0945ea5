#include "probe.h"
#include "channel.h"
#include "guest.h"
#include <errno.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_PROBES 16
#define MAX_PATH_BYTES 1024u
#define MAX_TIMEOUT_MS 60000u
#define ADDRESSES 3 /* the cell's own, ::1, 127.0.0.1: a program may listen on any one of them */

struct probe {
  bool active, connected;
  uint16_t stream, port;
  int fd, tried; /* tried: addresses begun */
  uint64_t deadline_us;
  size_t answer_length;
  char path[MAX_PATH_BYTES + 1], answer[16]; /* "HTTP/1.1 200" */
  char last_error[64];
};

static struct probe probes[MAX_PROBES];
static uint8_t own_address[16];

static void pump(struct probe *probe);
static bool connect_next(struct probe *probe);
static void ask(struct probe *probe);
static void read_answer(struct probe *probe);
static void answer(struct probe *probe, bool ok, const char *detail);

void probes_prepare(const uint8_t address[16]) { memcpy(own_address, address, sizeof own_address); }

/* u16 port, u32 timeout in ms, then the path of an HTTP GET, or nothing for a bare connect. */
void probe_start(const struct frame *frame) {
  struct probe *probe = probes, *end = probes + MAX_PROBES;
  while (probe < end && probe->active) probe++;
  if (probe == end || frame->length < 6 || frame->length - 6 > MAX_PATH_BYTES) {
    struct probe refused = {.stream = frame->stream, .fd = -1};
    return answer(&refused, false, "the probe is malformed, or too many are under way");
  }
  uint32_t timeout_ms = get32(frame->payload + 2);
  *probe = (struct probe){.active = true, .stream = frame->stream, .port = get16(frame->payload), .fd = -1};
  probe->deadline_us = boot_us() + (timeout_ms > MAX_TIMEOUT_MS ? MAX_TIMEOUT_MS : timeout_ms) * 1000ull;
  memcpy(probe->path, frame->payload + 6, frame->length - 6);
  if (!connect_next(probe)) answer(probe, false, probe->last_error);
}

void probes_forget(void) {
  for (struct probe *probe = probes; probe < probes + MAX_PROBES; probe++) {
    if (probe->active) close(probe->fd);
    *probe = (struct probe){.fd = -1};
  }
}

void probes_pump(void) {
  for (struct probe *probe = probes; probe < probes + MAX_PROBES; probe++)
    if (probe->active) pump(probe);
}

void probes_wait(struct wait_set *set) {
  for (struct probe *probe = probes; probe < probes + MAX_PROBES; probe++) {
    if (!probe->active) continue;
    wait_for(set, probe->fd, probe->connected ? POLLIN : POLLOUT);
    wake_at(set, probe->deadline_us);
  }
}

static void pump(struct probe *probe) {
  if (boot_us() >= probe->deadline_us)
    return answer(probe, false, probe->connected ? "connected, but no answer in time" : "no connection in time");
  if (probe->connected) return read_answer(probe);
  struct pollfd writable = {.fd = probe->fd, .events = POLLOUT};
  if (poll(&writable, 1, 0) != 1) return;
  int error = 0;
  socklen_t length = sizeof error;
  getsockopt(probe->fd, SOL_SOCKET, SO_ERROR, &error, &length);
  if (error == 0) return ask(probe);
  snprintf(probe->last_error, sizeof probe->last_error, "%s", strerror(error));
  if (!connect_next(probe)) answer(probe, false, probe->last_error);
}

/* Begins with the next address; false when none is left. */
static bool connect_next(struct probe *probe) {
  while (probe->tried < ADDRESSES) {
    struct sockaddr_in6 six = {.sin6_family = AF_INET6, .sin6_port = htons(probe->port), .sin6_addr = in6addr_loopback};
    struct sockaddr_in four = {.sin_family = AF_INET, .sin_port = htons(probe->port), .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    if (probe->tried == 0) memcpy(&six.sin6_addr, own_address, 16);
    bool is_six = probe->tried++ < 2;
    if (probe->fd != -1) close(probe->fd);
    probe->fd = socket(is_six ? AF_INET6 : AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    int result = is_six ? connect(probe->fd, (struct sockaddr *)&six, sizeof six)
                        : connect(probe->fd, (struct sockaddr *)&four, sizeof four);
    if (result == 0 || errno == EINPROGRESS) return true;
    snprintf(probe->last_error, sizeof probe->last_error, "%s", strerror(errno));
  }
  return false;
}

static void ask(struct probe *probe) {
  if (probe->path[0] == 0) return answer(probe, true, "connected");
  char request[MAX_PATH_BYTES + 128];
  const char *form = "GET %s HTTP/1.1\r\nHost: localhost\r\nUser-Agent: forge-probe\r\nConnection: close\r\n\r\n";
  int length = snprintf(request, sizeof request, form, probe->path);
  if (send(probe->fd, request, (size_t)length, MSG_NOSIGNAL) != length) return answer(probe, false, "the request could not be sent");
  probe->connected = true;
}

static void read_answer(struct probe *probe) {
  ssize_t count = recv(probe->fd, probe->answer + probe->answer_length, sizeof probe->answer - 1 - probe->answer_length, 0);
  if (count == -1 && errno == EAGAIN) return;
  if (count <= 0) return answer(probe, false, "the connection closed without an HTTP answer");
  probe->answer_length += (size_t)count;
  if (probe->answer_length < sizeof "HTTP/1.1 200" - 1) return;
  if (strncmp(probe->answer, "HTTP/1.", 7) != 0) return answer(probe, false, "the answer is not HTTP");
  int status = atoi(probe->answer + 9);
  char detail[32];
  snprintf(detail, sizeof detail, "HTTP %d", status);
  answer(probe, status >= 200 && status < 400, detail);
}

static void answer(struct probe *probe, bool ok, const char *detail) {
  uint8_t flag = ok;
  channel_send(FRAME_PROBE_RESULT, probe->stream, &flag, 1, detail, strlen(detail));
  if (probe->fd != -1) close(probe->fd);
  probe->fd = -1;
  probe->active = false;
}
