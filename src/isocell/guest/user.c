/* Who runs: an OCI image's user, looked up in the image's own files. */
#include "guest.h"
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define FIELDS 7

static bool find_line(const char *path, int key_field, const char *key, char line[1024], char *fields[FIELDS]);
static size_t split(char *line, char *fields[FIELDS]);
static bool parse_id(const char *text, unsigned *id);
static void add_memberships(const char *name, struct identity *identity);

const char *resolve_user(const char *spec, struct identity *identity) {
  char user[256], line[1024], *fields[FIELDS];
  if (strlen(spec) >= sizeof user) return "the user is too long a word";
  strcpy(user, *spec == 0 ? "0" : spec);
  char *group = strchr(user, ':');
  if (group != NULL) *group++ = 0;
  *identity = (struct identity){.home = "/"};

  unsigned id;
  bool named = find_line("/etc/passwd", 0, user, line, fields);
  if (!named && !parse_id(user, &id)) return "its /etc/passwd has no such user";
  if (named || find_line("/etc/passwd", 2, user, line, fields)) {
    if (!parse_id(fields[2], &id)) return "its /etc/passwd gives this user no number";
    unsigned gid = 0;
    if (!parse_id(fields[3], &gid)) return "its /etc/passwd gives this user no group";
    identity->gid = gid;
    if (*fields[5] != 0) snprintf(identity->home, sizeof identity->home, "%s", fields[5]);
    if (group == NULL) add_memberships(fields[0], identity);
  } else if (id == 0) {
    strcpy(identity->home, "/root");
  }
  identity->uid = id;

  if (group == NULL || *group == 0) return NULL;
  if (find_line("/etc/group", 0, group, line, fields)) group = fields[2];
  if (!parse_id(group, &id)) return "its /etc/group has no such group";
  identity->gid = id;
  return NULL;
}

/* The first line whose field is the key. */
static bool find_line(const char *path, int key_field, const char *key, char line[1024], char *fields[FIELDS]) {
  FILE *file = fopen(path, "re");
  if (file == NULL) return false;
  bool found = false;
  while (!found && fgets(line, 1024, file) != NULL) found = split(line, fields) > (size_t)key_field && strcmp(fields[key_field], key) == 0;
  fclose(file);
  return found;
}

/* Fields that are not there are empty. */
static size_t split(char *line, char *fields[FIELDS]) {
  static char none[] = "";
  size_t count = 0;
  line[strcspn(line, "\r\n")] = 0;
  for (char *rest = line; count < FIELDS && rest != NULL;) fields[count++] = strsep(&rest, ":");
  for (size_t i = count; i < FIELDS; i++) fields[i] = none;
  return count;
}

static bool parse_id(const char *text, unsigned *id) {
  char *end;
  errno = 0;
  unsigned long value = strtoul(text, &end, 10);
  if (*text < '0' || *text > '9' || *end != 0 || errno != 0 || value >= 0xffffffffu) return false;
  *id = (unsigned)value;
  return true;
}

static void add_memberships(const char *name, struct identity *identity) {
  char line[16384], *fields[FIELDS], *member;
  FILE *file = fopen("/etc/group", "re");
  if (file == NULL) return;
  while (fgets(line, sizeof line, file) != NULL) {
    unsigned gid;
    if (split(line, fields) < 4 || !parse_id(fields[2], &gid)) continue;
    for (char *rest = fields[3]; (member = strsep(&rest, ",")) != NULL;)
      if (strcmp(member, name) == 0 && identity->group_count < MAX_GROUPS) identity->groups[identity->group_count++] = gid;
  }
  fclose(file);
}
