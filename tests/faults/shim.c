/* Faults on purpose, for LD_PRELOAD.

   FAULTS: call:errno:path:skip:count, several of them after semicolons. Calls named `call` (open for writing, write, fsync, rename,
   mkdir) on files whose path (of a renaming: FROM>TO) has `path` in it fail with `errno`, after `skip` of them and for `count` of them (-1: for ever).
   FAULTY_RANK: only where RANK is this one.
   FAULTY_CLOCK: seconds by which the wall clock is ahead, and a second later behind, and so on. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define PLAIN(type, name, ...) \
    static type (*plain)(__VA_ARGS__); \
    if (!plain) plain = (type(*)(__VA_ARGS__))dlsym(RTLD_NEXT, #name)

struct fault {
    char call[16], path[200];
    int error;
    long skip, count, seen;
};

static struct fault faults[16];
static int known;
static char parsed[2048];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

static void parse(const char *text)
{
    char copy[sizeof parsed], *rest = copy, *one;
    strncpy(parsed, text, sizeof parsed - 1);
    memcpy(copy, parsed, sizeof copy);
    known = 0;
    while ((one = strsep(&rest, ";")) && known < 16) {
        struct fault *fault = &faults[known];
        fault->seen = 0;
        if (sscanf(one, "%15[^:]:%d:%199[^:]:%ld:%ld", fault->call, &fault->error, fault->path, &fault->skip, &fault->count) == 5) known++;
    }
}

/* The error with which this call has to fail; 0: none. */
static int due(const char *call, const char *path)
{
    const char *text = getenv("FAULTS"), *wanted = getenv("FAULTY_RANK"), *rank = getenv("RANK");
    int error = 0;
    if (!text || !*text || (wanted && *wanted && (!rank || strcmp(wanted, rank)))) return 0;
    pthread_mutex_lock(&lock);
    if (strcmp(text, parsed)) parse(text);
    for (int i = 0; i < known; i++) {
        struct fault *fault = &faults[i];
        if (strcmp(call, fault->call) || !strstr(path, fault->path)) continue;
        long number = fault->seen++;
        if (number >= fault->skip && (fault->count < 0 || number < fault->skip + fault->count)) error = fault->error;
    }
    pthread_mutex_unlock(&lock);
    return error;
}

static int due_on(const char *call, int file)
{
    char link[64], path[4096];
    const char *text = getenv("FAULTS");
    if (!text || !*text) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", file);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return due(call, path);
}

#define FAIL_IF(condition) \
    do { \
        int error = condition; \
        if (error) { \
            errno = error; \
            return -1; \
        } \
    } while (0)

#define OPEN(name) \
    int name(const char *path, int flags, ...) \
    { \
        PLAIN(int, name, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; \
        va_end(rest); \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT)) FAIL_IF(due("open", path)); \
        return plain(path, flags, mode); \
    }
#define OPENAT(name) \
    int name(int folder, const char *path, int flags, ...) \
    { \
        PLAIN(int, name, int, const char *, int, ...); \
        va_list rest; \
        va_start(rest, flags); \
        int mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, int) : 0; \
        va_end(rest); \
        if (flags & (O_WRONLY | O_RDWR | O_CREAT)) FAIL_IF(due("open", path)); \
        return plain(folder, path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int file, const void *data, size_t size)
{
    PLAIN(ssize_t, write, int, const void *, size_t);
    FAIL_IF(due_on("write", file));
    return plain(file, data, size);
}

ssize_t writev(int file, const struct iovec *data, int count)
{
    PLAIN(ssize_t, writev, int, const struct iovec *, int);
    FAIL_IF(due_on("write", file));
    return plain(file, data, count);
}

ssize_t pwrite64(int file, const void *data, size_t size, off64_t place)
{
    PLAIN(ssize_t, pwrite64, int, const void *, size_t, off64_t);
    FAIL_IF(due_on("write", file));
    return plain(file, data, size, place);
}

int fsync(int file)
{
    PLAIN(int, fsync, int);
    FAIL_IF(due_on("fsync", file));
    return plain(file);
}

int fdatasync(int file)
{
    PLAIN(int, fdatasync, int);
    FAIL_IF(due_on("fsync", file));
    return plain(file);
}

static int due_on_both(const char *from, const char *to)
{
    char both[8192];
    snprintf(both, sizeof both, "%s>%s", from, to);
    return due("rename", both);
}

int rename(const char *from, const char *to)
{
    PLAIN(int, rename, const char *, const char *);
    FAIL_IF(due_on_both(from, to));
    return plain(from, to);
}

int renameat(int before, const char *from, int after, const char *to)
{
    PLAIN(int, renameat, int, const char *, int, const char *);
    FAIL_IF(due_on_both(from, to));
    return plain(before, from, after, to);
}

int mkdir(const char *path, mode_t mode)
{
    PLAIN(int, mkdir, const char *, mode_t);
    FAIL_IF(due("mkdir", path));
    return plain(path, mode);
}

/* Seconds by which the wall clock is wrong now. */
static long astray(void)
{
    PLAIN(int, clock_gettime, clockid_t, struct timespec *);
    const char *text = getenv("FAULTY_CLOCK");
    struct timespec since;
    if (!text || !*text) return 0;
    plain(CLOCK_MONOTONIC, &since);
    return since.tv_sec % 2 ? atol(text) : -atol(text);
}

int clock_gettime(clockid_t which, struct timespec *now)
{
    PLAIN(int, clock_gettime, clockid_t, struct timespec *);
    int code = plain(which, now);
    if (!code && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) now->tv_sec += astray();
    return code;
}

int gettimeofday(struct timeval *restrict now, void *restrict zone)
{
    PLAIN(int, gettimeofday, struct timeval *, void *);
    int code = plain(now, zone);
    if (!code) now->tv_sec += astray();
    return code;
}

time_t time(time_t *where)
{
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (where) *where = now.tv_sec;
    return now.tv_sec;
}
