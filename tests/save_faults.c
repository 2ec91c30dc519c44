/* Counts the calls into the C library that change a disk, and makes the n-th end the process or fail; preloaded.
 *
 * arm(n, mode) begins to count. Modes: 0 counts only; 1 kills before the call; 2 lets half of a write through and kills;
 * 3 fails the call with EIO; 4 finds the disk full from the call on, for whatever needs room. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

enum { KILL = 1, HALF = 2, ERROR = 3, FULL = 4, KILLED = 77 };

static int armed, calls, target, mode;

void arm(int n, int kind) {
    armed = 1, calls = 0, target = n, mode = kind;
}

int disarm(void) {
    armed = 0;
    return calls;
}

/* Whether this call fails; errno says how. Does not come back where it kills. */
static int fails(int needs_room) {
    if (!armed) return 0;
    int number = ++calls;
    if (mode == FULL && number >= target && needs_room) {
        errno = ENOSPC;
        return 1;
    }
    if (number != target) return 0;
    if (mode == KILL || mode == HALF) _exit(KILLED);
    if (mode == ERROR) {
        errno = EIO;
        return 1;
    }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define GUARD(needs_room, failure) \
    if (fails(needs_room)) return failure

ssize_t write(int fd, const void *data, size_t size) {
    if (armed && fd > 2) {
        if (mode == HALF && calls + 1 == target) REAL(write)(fd, data, size / 2);
        GUARD(1, -1);
    }
    return REAL(write)(fd, data, size);
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    if (armed && fd > 2) {
        if (mode == HALF && calls + 1 == target) REAL(writev)(fd, parts, count / 2);
        GUARD(1, -1);
    }
    return REAL(writev)(fd, parts, count);
}

int fsync(int fd) {
    GUARD(0, -1);
    return REAL(fsync)(fd);
}

int ftruncate(int fd, off_t size) {
    GUARD(1, -1);
    return REAL(ftruncate)(fd, size);
}

int ftruncate64(int fd, off64_t size) {
    GUARD(1, -1);
    return REAL(ftruncate64)(fd, size);
}

int posix_fallocate64(int fd, off64_t offset, off64_t size) {
    GUARD(1, errno);
    return REAL(posix_fallocate64)(fd, offset, size);
}

int rename(const char *from, const char *to) {
    GUARD(0, -1);
    return REAL(rename)(from, to);
}

int mkdir(const char *path, mode_t permissions) {
    GUARD(1, -1);
    return REAL(mkdir)(path, permissions);
}

int unlink(const char *path) {
    GUARD(0, -1);
    return REAL(unlink)(path);
}

int unlinkat(int folder, const char *path, int flags) {
    GUARD(0, -1);
    return REAL(unlinkat)(folder, path, flags);
}

int rmdir(const char *path) {
    GUARD(0, -1);
    return REAL(rmdir)(path);
}

static mode_t permissions_of(int flags, va_list rest) {
    return flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;
}

#define OPEN(name)                                              \
    int name(const char *path, int flags, ...) {                \
        va_list rest;                                           \
        va_start(rest, flags);                                  \
        mode_t permissions = permissions_of(flags, rest);       \
        va_end(rest);                                           \
        if (flags & O_CREAT) GUARD(1, -1);                      \
        return REAL(name)(path, flags, permissions);            \
    }

OPEN(open)
OPEN(open64)
