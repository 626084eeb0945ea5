/* Starting a program, and hearing why it could not be started. */
#include "guest.h"
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

enum step { STEP_FORK, STEP_TERMINAL, STEP_IDENTITY, STEP_CWD, STEP_PROGRAM };
static const char *const step_names[] = {"fork", "its terminal", "its user", "its working folder", "its program"};

struct failure {
  enum step step;
  int error;
};

static _Noreturn void become(const struct program *program, int report);
static _Noreturn void give_up(int report, enum step step);
static void make_folders(const char *path);

pid_t start_program(const struct program *program, const char **what) {
  int report[2];
  *what = step_names[STEP_FORK];
  if (pipe2(report, O_CLOEXEC) == -1) return -errno;
  make_folders(program->cwd);
  pid_t pid = fork();
  if (pid == 0) become(program, report[1]);
  int fork_error = errno;
  close(report[1]);
  struct failure failure = {.step = STEP_FORK, .error = fork_error};
  ssize_t count = pid == -1 ? (ssize_t)sizeof failure : read(report[0], &failure, sizeof failure);
  close(report[0]);
  if (count != (ssize_t)sizeof failure) return pid; /* the pipe closed with exec */
  if (pid != -1) waitpid(pid, NULL, 0);
  *what = step_names[failure.step];
  return -failure.error;
}

static _Noreturn void become(const struct program *program, int report) {
  sigset_t none;
  sigemptyset(&none);
  sigprocmask(SIG_SETMASK, &none, NULL);
  setsid();
  if (program->tty && ioctl(program->stdin_fd, TIOCSCTTY, 0) == -1) give_up(report, STEP_TERMINAL);
  if (dup2(program->stdin_fd, 0) == -1 || dup2(program->stdout_fd, 1) == -1 || dup2(program->stderr_fd, 2) == -1)
    give_up(report, STEP_TERMINAL);
  struct rlimit files = {1048576, 1048576}, core = {0, RLIM_INFINITY};
  setrlimit(RLIMIT_NOFILE, &files);
  setrlimit(RLIMIT_CORE, &core);
  umask(022);
  const struct identity *identity = program->identity;
  if (setgroups(identity->group_count, identity->groups) == -1 || setresgid(identity->gid, identity->gid, identity->gid) == -1 ||
      setresuid(identity->uid, identity->uid, identity->uid) == -1)
    give_up(report, STEP_IDENTITY);
  if (chdir(program->cwd) == -1) give_up(report, STEP_CWD);
  environ = program->env; /* execvp looks for the program in the PATH of the new environment */
  execvp(program->argv[0], program->argv);
  give_up(report, STEP_PROGRAM);
}

static _Noreturn void give_up(int report, enum step step) {
  struct failure failure = {.step = step, .error = errno};
  (void)!write(report, &failure, sizeof failure);
  _exit(127);
}

/* A working folder that the image does not hold is made, as OCI runtimes do. */
static void make_folders(const char *path) {
  char part[4096];
  if (strlen(path) >= sizeof part || access(path, F_OK) == 0) return;
  strcpy(part, path);
  for (char *slash = strchr(part + 1, '/'); slash != NULL; slash = strchr(slash + 1, '/')) {
    *slash = 0;
    mkdir(part, 0755);
    *slash = '/';
  }
  mkdir(part, 0755);
}

static size_t count_words(char **words) {
  size_t count = 0;
  while (words[count] != NULL) count++;
  return count;
}

char **merge_env(char **base, char **extra, size_t extra_count) {
  size_t count = count_words(base);
  char **merged = calloc(count + extra_count + 1, sizeof(char *));
  if (merged == NULL) return NULL;
  memcpy(merged, base, count * sizeof(char *));
  for (size_t i = 0; i < extra_count; i++) {
    size_t name = strcspn(extra[i], "=") + 1, at = 0;
    while (at < count && strncmp(merged[at], extra[i], name) != 0) at++;
    merged[at] = extra[i];
    if (at == count) count++;
  }
  return merged;
}
