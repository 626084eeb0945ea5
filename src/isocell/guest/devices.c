/* Modules, devices, and the config drive: everything before the image's root. */
#include "guest.h"
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/netlink.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#define DEVICE_WAIT_MS 10000u

static int find_port(const char *name);
static void wait_until(int (*found)(const char *), const char *name, int *result);

/* The list holds one path a line, in an order that satisfies every dependency; it is made at build time. */
void load_modules(const char *list_path) {
  FILE *list = fopen(list_path, "re");
  if (list == NULL) fatal("MODULE_FAILED", "%s: %s", list_path, strerror(errno));
  char path[256];
  while (fgets(path, sizeof path, list) != NULL) {
    path[strcspn(path, "\n")] = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd == -1) fatal("MODULE_FAILED", "%s: %s", path, strerror(errno));
    if (syscall(SYS_finit_module, fd, "", 0) == -1 && errno != EEXIST) fatal("MODULE_FAILED", "%s: %s", path, strerror(errno));
    close(fd);
    unlink(path); /* the memory is the cell's */
  }
  fclose(list);
  int seal = open("/proc/sys/kernel/modules_disabled", O_WRONLY | O_CLOEXEC); /* from here on the kernel is what it is */
  if (seal == -1 || write(seal, "1", 1) != 1) fatal("MODULE_FAILED", "the kernel cannot be sealed: %s", strerror(errno));
  close(seal);
}

static int device_exists(const char *path) { return access(path, F_OK) == 0 ? 0 : -1; }

void wait_for_device(const char *path) {
  int found;
  wait_until(device_exists, path, &found);
  if (found == -1) fatal("DEVICE_MISSING", "%s did not appear", path);
}

int open_channel_port(const char *name) {
  int fd;
  wait_until(find_port, name, &fd);
  return fd;
}

/* Looks again after each kernel event, for a bounded time. */
static void wait_until(int (*found)(const char *), const char *name, int *result) {
  if ((*result = found(name)) != -1) return;
  int events = open_uevents();
  uint64_t deadline = boot_us() + DEVICE_WAIT_MS * 1000u;
  while ((*result = found(name)) == -1 && boot_us() < deadline) {
    char event[4096];
    struct pollfd poll_events = {.fd = events, .events = POLLIN};
    if (poll(&poll_events, 1, 100) == 1) (void)!read(events, event, sizeof event);
  }
  close(events);
}

/* The port's node, by the name the VMM gave it. */
static int find_port(const char *name) {
  DIR *ports = opendir("/sys/class/virtio-ports");
  if (ports == NULL) return -1;
  int fd = -1;
  for (struct dirent *entry; fd == -1 && (entry = readdir(ports)) != NULL;) {
    char path[512], found[64] = "";
    snprintf(path, sizeof path, "/sys/class/virtio-ports/%s/name", entry->d_name);
    int name_fd = open(path, O_RDONLY | O_CLOEXEC);
    if (name_fd == -1) continue;
    if (read(name_fd, found, sizeof found - 1) < 0) found[0] = 0;
    close(name_fd);
    found[strcspn(found, "\n")] = 0;
    if (strcmp(found, name) != 0) continue;
    snprintf(path, sizeof path, "/dev/%s", entry->d_name);
    fd = open(path, O_RDWR | O_NONBLOCK | O_CLOEXEC);
  }
  closedir(ports);
  return fd;
}

void read_config_drive(const char *path, struct config *config) {
  uint8_t header[512];
  int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd == -1 || read(fd, header, sizeof header) != (ssize_t)sizeof header) fatal("CONFIG_INVALID", "%s: %s", path, strerror(errno));
  size_t size = config_size(header), have = 0;
  if (size == 0) fatal("CONFIG_INVALID", "%s is no config drive of a version this init knows", path);
  uint8_t *drive = malloc(size);
  if (drive == NULL) fatal("CONFIG_INVALID", "no memory for a config drive of %zu bytes", size);
  while (have < size) {
    ssize_t count = pread(fd, drive + have, size - have, (off_t)have);
    if (count <= 0) fatal("CONFIG_INVALID", "%s ends after %zu of %zu bytes", path, have, size);
    have += (size_t)count;
  }
  close(fd);
  const char *problem = config_parse(drive, size, config);
  if (problem != NULL) fatal("CONFIG_INVALID", "the config drive cannot be used: %s", problem);
  free(drive);
}

int open_uevents(void) {
  int fd = socket(AF_NETLINK, SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK, NETLINK_KOBJECT_UEVENT);
  struct sockaddr_nl address = {.nl_family = AF_NETLINK, .nl_groups = 1};
  if (fd == -1 || bind(fd, (struct sockaddr *)&address, sizeof address) == -1) fatal("INTERNAL", "kernel events: %s", strerror(errno));
  return fd;
}

bool uevents_tell_corruption(int fd) {
  char event[8192];
  for (;;) {
    struct sockaddr_nl from = {0};
    socklen_t from_length = sizeof from;
    ssize_t length = recvfrom(fd, event, sizeof event, 0, (struct sockaddr *)&from, &from_length);
    if (length == -1 && errno == ENOBUFS) return root_is_corrupt(); /* events were lost: look for ourselves */
    if (length <= 0) return false;
    if (from.nl_pid != 0) continue; /* a process, not the kernel */
    if (memmem(event, (size_t)length, "DM_VERITY_ERR_BLOCK_NR=", 23) != NULL) return true;
  }
}
