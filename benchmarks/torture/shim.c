/* Counts the file operations below a folder, and lets the n-th fail or kill the process: preloaded by the harness. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { WRITE = 1, FSYNC = 2, RENAME = 4, CREATE = 8, REMOVE = 16, MKDIR = 32 };

static char folder[4096];
static int mask, code;
static long at, times, count;

/* Operations of the kinds `m` below `path` are counted; the n-th and `t` - 1 after it fail with `e`, or kill (e = 0). */
void torture_arm(const char *path, int m, long n, long t, int e) {
  strncpy(folder, path, sizeof folder - 1);
  mask = m, at = n, times = t, code = e, count = 0;
}

long torture_count(void) { return count; }

static int hit(int kind, const char *path) {
  size_t length = strlen(folder);
  if (!length || !(mask & kind) || strncmp(path, folder, length)) return 0;
  long n = __sync_add_and_fetch(&count, 1);
  if (!at || n < at || n >= at + times) return 0;
  if (!code) kill(getpid(), SIGKILL);
  errno = code;
  return 1;
}

static int hit_fd(int kind, int fd) {
  char link[64], path[4096];
  if (!folder[0] || !(mask & kind)) return 0;
  int kept = errno;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  errno = kept;
  if (n < 0) return 0;
  path[n] = 0;
  return hit(kind, path);
}

static int hit_at(int kind, int dir, const char *name) {
  char link[64], path[8192];
  if (!folder[0] || !(mask & kind)) return 0;
  if (name[0] == '/') return hit(kind, name);
  int kept = errno;
  if (dir == AT_FDCWD) strcpy(link, "/proc/self/cwd");
  else snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
  ssize_t n = readlink(link, path, 4096 - 1);
  errno = kept;
  if (n < 0) return 0;
  snprintf(path + n, sizeof path - n, "/%s", name);
  return hit(kind, path);
}

#define NEXT(name) static __typeof__(&name) next; if (!next) next = dlsym(RTLD_NEXT, #name)
#define SIMPLE(type, name, args, call, test) type name args { NEXT(name); if (test) return -1; return next call; }

SIMPLE(ssize_t, write, (int fd, const void *b, size_t n), (fd, b, n), hit_fd(WRITE, fd))
SIMPLE(ssize_t, writev, (int fd, const struct iovec *v, int n), (fd, v, n), hit_fd(WRITE, fd))
SIMPLE(ssize_t, pwrite, (int fd, const void *b, size_t n, off_t o), (fd, b, n, o), hit_fd(WRITE, fd))
SIMPLE(ssize_t, pwrite64, (int fd, const void *b, size_t n, off64_t o), (fd, b, n, o), hit_fd(WRITE, fd))
SIMPLE(ssize_t, pwritev, (int fd, const struct iovec *v, int n, off_t o), (fd, v, n, o), hit_fd(WRITE, fd))
SIMPLE(int, fsync, (int fd), (fd), hit_fd(FSYNC, fd))
SIMPLE(int, fdatasync, (int fd), (fd), hit_fd(FSYNC, fd))
SIMPLE(int, rename, (const char *a, const char *b), (a, b), hit_at(RENAME, AT_FDCWD, b))
SIMPLE(int, renameat, (int d, const char *a, int e, const char *b), (d, a, e, b), hit_at(RENAME, e, b))
SIMPLE(int, renameat2, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f), hit_at(RENAME, e, b))
SIMPLE(int, unlink, (const char *p), (p), hit_at(REMOVE, AT_FDCWD, p))
SIMPLE(int, unlinkat, (int d, const char *p, int f), (d, p, f), hit_at(REMOVE, d, p))
SIMPLE(int, rmdir, (const char *p), (p), hit_at(REMOVE, AT_FDCWD, p))
SIMPLE(int, mkdir, (const char *p, mode_t m), (p, m), hit_at(MKDIR, AT_FDCWD, p))
SIMPLE(int, mkdirat, (int d, const char *p, mode_t m), (d, p, m), hit_at(MKDIR, d, p))

#define OPEN(name, params, dir, path, call)                     \
  int name params {                                             \
    NEXT(name);                                                 \
    mode_t mode = 0;                                            \
    if (flags & (O_CREAT | __O_TMPFILE)) {                      \
      va_list list;                                             \
      va_start(list, flags);                                    \
      mode = va_arg(list, int);                                 \
      va_end(list);                                             \
    }                                                           \
    if ((flags & O_CREAT) && hit_at(CREATE, dir, path)) return -1; \
    return next call;                                           \
  }

OPEN(open, (const char *p, int flags, ...), AT_FDCWD, p, (p, flags, mode))
OPEN(open64, (const char *p, int flags, ...), AT_FDCWD, p, (p, flags, mode))
OPEN(openat, (int d, const char *p, int flags, ...), d, p, (d, p, flags, mode))
OPEN(openat64, (int d, const char *p, int flags, ...), d, p, (d, p, flags, mode))
