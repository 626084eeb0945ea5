/*
 * Process 1 of every cell: makes the verified image the root, starts its entrypoint, and is the host's ear and hand.
 * Reads nothing from the image before the kernel can verify every block of it. Failures end the cell with a reason.
 */
#include "channel.h"
#include "guest.h"
#include "probe.h"
#include "session.h"
#include "supervise.h"
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/reboot.h>
#include <sys/stat.h>
#include <sys/timex.h>
#include <time.h>
#include <unistd.h>

static void mount_early(void);
static void start_entrypoint(const struct config *config, struct entrypoint *entrypoint);
static char **cell_env(const struct config *config, const struct identity *identity);
static int open_output(const struct identity *identity, int *ours);

int main(void) {
  static struct config config;
  struct entrypoint entrypoint;
  supervise_prepare(boot_us());
  mount_early();
  load_modules("/modules/list");
  channel_open(open_channel_port("forge.0"));
  wait_for_device("/dev/vda");
  wait_for_device("/dev/vdb");
  read_config_drive("/dev/vdb", &config);
  open_verified_root();
  enter_root(&config);
  write_identity_files(&config);
  configure_network(&config);
  probes_prepare(config.address);
  start_entrypoint(&config, &entrypoint);
  supervise(&entrypoint);
}

static void mount_early(void) {
  mkdir("/dev", 0755);
  mkdir("/proc", 0555);
  mkdir("/sys", 0555);
  if (mount("dev", "/dev", "devtmpfs", MS_NOSUID, "mode=0755") == -1 ||
      mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "") == -1 ||
      mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "") == -1)
    fatal("MOUNT_FAILED", "the kernel's own file systems: %s", strerror(errno));
}

static void start_entrypoint(const struct config *config, struct entrypoint *entrypoint) {
  static struct identity identity;
  const char *problem = resolve_user(config->user, &identity);
  if (problem != NULL) fatal("USER_UNKNOWN", "the image cannot run as \"%s\": %s", config->user, problem);
  const char *cwd = *config->cwd == 0 ? "/" : config->cwd, *what;
  struct program program = {.argv = config->argv, .env = cell_env(config, &identity), .cwd = cwd, .identity = &identity};
  program.stdin_fd = open("/dev/null", O_RDONLY | O_CLOEXEC);
  program.stdout_fd = open_output(&identity, &entrypoint->stdout_fd);
  program.stderr_fd = open_output(&identity, &entrypoint->stderr_fd);
  entrypoint->stop_signal = config->stop_signal;
  entrypoint->pid = start_program(&program, &what);
  if (entrypoint->pid < 0) {
    int error = -entrypoint->pid;
    const char *code = error == ENOENT ? "COMMAND_NOT_FOUND" : error == EACCES ? "COMMAND_NOT_EXECUTABLE" : "COMMAND_FAILED";
    if (root_is_corrupt())
      fatal("ROOT_TAMPERED", "the root file system is not what its root hash says: \"%s\" cannot be read", config->argv[0]);
    fatal(code, "the command \"%s\" cannot be started: %s: %s", config->argv[0], what, strerror(error));
  }
  close(program.stdin_fd);
  close(program.stdout_fd);
  close(program.stderr_fd);
  sessions_prepare(&identity, program.env, cwd);
}

/* What every OCI runtime adds where image and manifest are silent. */
static char **cell_env(const struct config *config, const struct identity *identity) {
  static char path[] = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", home[300], host[300];
  snprintf(home, sizeof home, "HOME=%s", identity->home);
  snprintf(host, sizeof host, "HOSTNAME=%s", config->hostname);
  static char *defaults[] = {path, home, host, NULL};
  char **env = merge_env(defaults, config->env, config->envc);
  if (env == NULL) fatal("INTERNAL", "no memory for the environment");
  return env;
}

/* A pipe whose writing end belongs to the cell's user: /dev/stdout can be opened by an ordinary user too. */
static int open_output(const struct identity *identity, int *ours) {
  int ends[2];
  if (pipe2(ends, O_CLOEXEC) == -1) fatal("INTERNAL", "pipe: %s", strerror(errno));
  fcntl(ends[0], F_SETFL, O_NONBLOCK);
  (void)!fchown(ends[1], identity->uid, identity->gid);
  *ours = ends[0];
  return ends[1];
}

void fatal(const char *code, const char *format, ...) {
  static bool failing;
  static char message[1024];
  if (failing) power_off();
  failing = true;
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(message, sizeof message, format, arguments);
  va_end(arguments);
  dprintf(2, "forge-init: fatal: %s: %s\n", code, message);
  supervise_failure(code, message);
  power_off();
}

/* The command line says `reboot=t`: a triple fault, on which a VMM that must not reboot ends at once. */
void power_off(void) {
  sync();
  reboot(RB_AUTOBOOT);
  for (;;) pause();
}

static uint64_t clock_us(clockid_t clock) {
  struct timespec now;
  clock_gettime(clock, &now);
  return (uint64_t)now.tv_sec * 1000000u + (uint64_t)now.tv_nsec / 1000u;
}

uint64_t boot_us(void) { return clock_us(CLOCK_BOOTTIME); }
uint64_t wall_us(void) { return clock_us(CLOCK_REALTIME); }

/* At first the clock is set; afterwards a small difference is slewed, for programs that rely on time going forward. */
void set_wall_clock(uint64_t us, bool first) {
  int64_t difference = (int64_t)(us - wall_us());
  if (!first && difference > -500000 && difference < 500000) {
    struct timeval delta = {.tv_sec = difference / 1000000, .tv_usec = difference % 1000000};
    if (delta.tv_usec < 0) {
      delta.tv_sec--;
      delta.tv_usec += 1000000;
    }
    adjtime(&delta, NULL);
    return;
  }
  struct timespec now = {.tv_sec = (time_t)(us / 1000000u), .tv_nsec = (long)(us % 1000000u * 1000u)};
  clock_settime(CLOCK_REALTIME, &now);
}
