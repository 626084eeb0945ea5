/* What the parts of init share. */
#pragma once
#include "config.h"
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/types.h>

/* init.c: the end with a reason. Tells the console and, where it is open, the channel; then powers off. */
_Noreturn void fatal(const char *code, const char *format, ...) __attribute__((format(printf, 2, 3)));
_Noreturn void power_off(void);

/* init.c: clocks */
uint64_t boot_us(void); /* CLOCK_BOOTTIME */
uint64_t wall_us(void); /* CLOCK_REALTIME */
void set_wall_clock(uint64_t us, bool first);

/* devices.c */
void load_modules(const char *list_path);
void wait_for_device(const char *path);
int open_channel_port(const char *name);
void read_config_drive(const char *path, struct config *config);
/* Kernel events; readable when there is one. */
int open_uevents(void);
/* Reads what is there; true when dm-verity told of a block that is not what it should be. */
bool uevents_tell_corruption(int fd);

/* root.c */
void open_verified_root(void); /* becomes /dev/dm-0 */
bool root_is_corrupt(void);
void enter_root(const struct config *config);
void write_identity_files(const struct config *config);

/* network.c */
void configure_network(const struct config *config);

/* user.c */
#define MAX_GROUPS 64
struct identity {
  uid_t uid;
  gid_t gid, groups[MAX_GROUPS];
  size_t group_count;
  char home[256];
};
/* NULL, or what is wrong. Looks at the image's /etc/passwd and /etc/group. */
const char *resolve_user(const char *spec, struct identity *identity);

/* process.c */
struct program {
  char **argv, **env;
  const char *cwd;
  const struct identity *identity;
  int stdin_fd, stdout_fd, stderr_fd; /* the child's; with a terminal all the same */
  bool tty;
};
/* The child's pid, or -errno with `what` saying which step failed. Returns when the program was exec'd. */
pid_t start_program(const struct program *program, const char **what);
/* The environment of the cell's processes, with `extra` over it; NULL-terminated, freed by the caller (not its strings). */
char **merge_env(char **base, char **extra, size_t extra_count);
