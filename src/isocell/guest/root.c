/* The image's root: verified on every read, covered by a bounded layer in memory. */
#include "guest.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/dm-ioctl.h>
#include <net/if.h>
#include <arpa/inet.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#define DISK "/dev/vda"
#define BLOCK_BYTES 4096u

struct verity {
  char root_hash[129], salt[513];
  unsigned long long data_blocks, hash_start_block;
};

struct dm_request {
  struct dm_ioctl head;
  struct dm_target_spec target;
  char parameters[1536];
};

static struct verity read_command_line(void);
static int device_mapper(unsigned long command, struct dm_request *request, uint32_t flags);
static void make_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *options);
static void write_file(const char *path, const char *format, ...) __attribute__((format(printf, 2, 3)));

/*
 * Without a corruption option dm-verity answers a read of an altered block with EIO, so no altered byte is ever served,
 * and tells of it in a kernel event, on which init ends the cell with a reason: better evidence than a panic.
 */
void open_verified_root(void) {
  struct verity verity = read_command_line();
  struct dm_request request = {0};
  if (device_mapper(DM_DEV_CREATE, &request, DM_READONLY_FLAG) == -1)
    fatal("ROOT_UNREADABLE", "device mapper: %s", strerror(errno));
  request = (struct dm_request){.head.target_count = 1};
  request.target.length = verity.data_blocks * (BLOCK_BYTES / 512);
  strcpy(request.target.target_type, "verity");
  snprintf(request.parameters, sizeof request.parameters,
           "1 " DISK " " DISK " %u %u %llu %llu sha256 %s %s", BLOCK_BYTES, BLOCK_BYTES,
           verity.data_blocks, verity.hash_start_block, verity.root_hash, verity.salt);
  if (device_mapper(DM_TABLE_LOAD, &request, DM_READONLY_FLAG) == -1)
    fatal("ROOT_UNREADABLE", "the verity table is refused: %s", strerror(errno));
  request = (struct dm_request){0};
  if (device_mapper(DM_DEV_SUSPEND, &request, 0) == -1) fatal("ROOT_UNREADABLE", "the verified device does not start: %s", strerror(errno));
  wait_for_device("/dev/dm-0");
}

/* The target's status is one letter: V as long as everything read was right, C from the first block that was not. */
bool root_is_corrupt(void) {
  struct dm_request request = {0};
  if (device_mapper(DM_TABLE_STATUS, &request, 0) == -1) return false;
  const char *status = (const char *)&request + request.head.data_start + sizeof(struct dm_target_spec);
  return *status == 'C';
}

void enter_root(const struct config *config) {
  char options[96] = "mode=0755,size=50%", overlay[] = "lowerdir=/lower,upperdir=/upper/files,workdir=/upper/work";
  if (config->overlay_size_mib != 0) snprintf(options, sizeof options, "mode=0755,size=%um", config->overlay_size_mib);
  mkdir("/lower", 0755);
  mkdir("/upper", 0755);
  mkdir("/cell", 0755);
  if (mount("/dev/dm-0", "/lower", "erofs", MS_RDONLY, "") == -1) {
    int error = errno;
    if (root_is_corrupt()) fatal("ROOT_TAMPERED", "the root file system is not what its root hash says");
    fatal("ROOT_UNREADABLE", "the root file system cannot be mounted: %s", strerror(error));
  }
  make_mount("upper", "/upper", "tmpfs", MS_NOSUID, options);
  struct stat root;
  if (stat("/lower", &root) == -1) fatal("ROOT_UNREADABLE", "the root folder cannot be read: %s", strerror(errno));
  mkdir("/upper/files", 0755);
  mkdir("/upper/work", 0755);
  chmod("/upper/files", root.st_mode & 07777);
  (void)!chown("/upper/files", root.st_uid, root.st_gid);
  make_mount("cell", "/cell", "overlay", 0, overlay);
  umount2("/sys", MNT_DETACH);
  umount2("/proc", MNT_DETACH);
  umount2("/dev", MNT_DETACH);
  if (chdir("/cell") == -1 || mount(".", "/", NULL, MS_MOVE, NULL) == -1 || chroot(".") == -1 || chdir("/") == -1)
    fatal("MOUNT_FAILED", "entering the root: %s", strerror(errno));
  make_mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  make_mount("sysfs", "/sys", "sysfs", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  make_mount("dev", "/dev", "devtmpfs", MS_NOSUID, "mode=0755");
  make_mount("devpts", "/dev/pts", "devpts", MS_NOSUID | MS_NOEXEC, "gid=5,mode=0620,ptmxmode=0666");
  make_mount("shm", "/dev/shm", "tmpfs", MS_NOSUID | MS_NODEV, "mode=1777,size=50%");
  make_mount("mqueue", "/dev/mqueue", "mqueue", MS_NOSUID | MS_NODEV | MS_NOEXEC, "");
  unlink("/dev/ptmx");
  (void)!symlink("pts/ptmx", "/dev/ptmx");
  (void)!symlink("/proc/self/fd", "/dev/fd");
  (void)!symlink("/proc/self/fd/0", "/dev/stdin");
  (void)!symlink("/proc/self/fd/1", "/dev/stdout");
  (void)!symlink("/proc/self/fd/2", "/dev/stderr");
  mkdir("/run", 0755); /* what the image holds in /run and /tmp stays, as under Docker: programs rely on it */
  if (mkdir("/tmp", 01777) == 0) chmod("/tmp", 01777);
}

void write_identity_files(const struct config *config) {
  char address[INET6_ADDRSTRLEN];
  inet_ntop(AF_INET6, config->address, address, sizeof address);
  mkdir("/etc", 0755);
  if (sethostname(config->hostname, strlen(config->hostname)) == -1) fatal("CONFIG_INVALID", "host name: %s", strerror(errno));
  write_file("/etc/hostname", "%s\n", config->hostname);
  write_file("/etc/hosts", "127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n%s\t%s\n", address, config->hostname);
  write_file("/etc/resolv.conf", "# No name server is reachable from this cell.\n");
}

static struct verity read_command_line(void) {
  char line[4096] = "";
  struct verity verity;
  int fd = open("/proc/cmdline", O_RDONLY | O_CLOEXEC);
  if (fd == -1 || read(fd, line, sizeof line - 1) <= 0) fatal("ROOT_UNREADABLE", "/proc/cmdline: %s", strerror(errno));
  close(fd);
  const char *found = strstr(line, "forge.verity=");
  if (found == NULL || sscanf(found, "forge.verity=%128[0-9a-f],%512[0-9a-f-],%llu,%llu", verity.root_hash, verity.salt,
                              &verity.data_blocks, &verity.hash_start_block) != 4)
    fatal("ROOT_UNREADABLE", "the kernel command line carries no forge.verity");
  return verity;
}

static int device_mapper(unsigned long command, struct dm_request *request, uint32_t flags) {
  static int control = -1;
  if (control == -1) control = open("/dev/mapper/control", O_RDWR | O_CLOEXEC);
  request->head.version[0] = DM_VERSION_MAJOR;
  request->head.data_size = sizeof *request;
  request->head.data_start = offsetof(struct dm_request, target);
  request->head.flags |= flags;
  strcpy(request->head.name, "root");
  return ioctl(control, command, request);
}

static void make_mount(const char *source, const char *target, const char *type, unsigned long flags, const char *options) {
  mkdir(target, 0755);
  if (mount(source, target, type, flags, options) == -1) fatal("MOUNT_FAILED", "%s on %s: %s", type, target, strerror(errno));
}

/* Replaces a link or a file of the image by ours. */
static void write_file(const char *path, const char *format, ...) {
  unlink(path);
  FILE *file = fopen(path, "we");
  if (file == NULL) fatal("MOUNT_FAILED", "%s: %s", path, strerror(errno));
  va_list arguments;
  va_start(arguments, format);
  vfprintf(file, format, arguments);
  va_end(arguments);
  if (fclose(file) != 0) fatal("MOUNT_FAILED", "%s: %s", path, strerror(errno));
  chmod(path, 0644);
}
