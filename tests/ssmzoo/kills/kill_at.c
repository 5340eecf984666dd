// A library to preload: counts the calls by which a process changes files in one folder, and kills it at a given one.
//
// The process asks for it by kill_at_start(). A write at which it is killed has written half of its bytes.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long count, moment;

// Starts to count calls in `path`, an absolute path without links. Call `at` is the last; none is where it is 0.
void kill_at_start(const char *path, long at) {
    snprintf(folder, sizeof folder, "%s", path);
    count = 0;
    moment = at;
}

// The calls so far; counts no more.
long kill_at_stop(void) {
    folder[0] = 0;
    return count;
}

static int below(const char *path) {
    size_t length = strlen(folder);
    return strncmp(path, folder, length) == 0 && (path[length] == 0 || path[length] == '/');
}

static int descriptor_below(int descriptor) {
    char link[64], path[PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, path, sizeof path - 1);
    if (length < 0) return 0;
    path[length] = 0;
    return below(path);
}

// Whether this is the call to die at.
static int last(int inside) {
    return inside && ++count == moment;
}

static int on_path(int directory, const char *path) {
    if (!folder[0]) return 0;
    if (path[0] == '/') return last(below(path));
    return last(directory != AT_FDCWD && descriptor_below(directory));
}

static int on_descriptor(int descriptor) {
    return folder[0] && last(descriptor_below(descriptor));
}

static void die(void) {
    kill(getpid(), SIGKILL);
}

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name, directory, parameters, arguments)                                                        \
    int name parameters {                                                                                   \
        va_list list;                                                                                       \
        va_start(list, flags);                                                                              \
        mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0;                             \
        va_end(list);                                                                                       \
        if (flags & (O_CREAT | O_WRONLY | O_RDWR | O_TRUNC) && on_path(directory, path)) die();             \
        return NEXT(name) arguments;                                                                        \
    }
OPEN(open, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(open64, AT_FDCWD, (const char *path, int flags, ...), (path, flags, mode))
OPEN(openat, directory, (int directory, const char *path, int flags, ...), (directory, path, flags, mode))
OPEN(openat64, directory, (int directory, const char *path, int flags, ...), (directory, path, flags, mode))

#define ON_PATH(type, name, directory, path, parameters, arguments) \
    type name parameters {                                          \
        if (on_path(directory, path)) die();                        \
        return NEXT(name) arguments;                                \
    }
ON_PATH(int, rename, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(int, renameat, b, to, (int a, const char *from, int b, const char *to), (a, from, b, to))
ON_PATH(int, link, AT_FDCWD, to, (const char *from, const char *to), (from, to))
ON_PATH(int, linkat, b, to, (int a, const char *from, int b, const char *to, int flags), (a, from, b, to, flags))
ON_PATH(int, unlink, AT_FDCWD, path, (const char *path), (path))
ON_PATH(int, unlinkat, directory, path, (int directory, const char *path, int flags), (directory, path, flags))
ON_PATH(int, rmdir, AT_FDCWD, path, (const char *path), (path))
ON_PATH(int, mkdir, AT_FDCWD, path, (const char *path, mode_t mode), (path, mode))
ON_PATH(int, mkdirat, directory, path, (int directory, const char *path, mode_t mode), (directory, path, mode))
ON_PATH(int, truncate, AT_FDCWD, path, (const char *path, off_t size), (path, size))

#define ON_DESCRIPTOR(type, name, descriptor, parameters, arguments) \
    type name parameters {                                           \
        if (on_descriptor(descriptor)) die();                        \
        return NEXT(name) arguments;                                 \
    }
ON_DESCRIPTOR(int, fsync, file, (int file), (file))
ON_DESCRIPTOR(int, fdatasync, file, (int file), (file))
ON_DESCRIPTOR(int, ftruncate, file, (int file, off_t size), (file, size))
ON_DESCRIPTOR(int, ftruncate64, file, (int file, off64_t size), (file, size))
ON_DESCRIPTOR(ssize_t, writev, file, (int file, const struct iovec *parts, int n), (file, parts, n))

#define WRITE(type, name, parameters, half, arguments) \
    type name parameters {                             \
        if (on_descriptor(file)) {                     \
            (void)!NEXT(name) half;                    \
            die();                                     \
        }                                              \
        return NEXT(name) arguments;                   \
    }
WRITE(ssize_t, write, (int file, const void *data, size_t size), (file, data, size / 2), (file, data, size))
WRITE(ssize_t, pwrite, (int file, const void *data, size_t size, off_t start), (file, data, size / 2, start),
      (file, data, size, start))
WRITE(ssize_t, pwrite64, (int file, const void *data, size_t size, off64_t start), (file, data, size / 2, start),
      (file, data, size, start))
WRITE(ssize_t, sendfile, (int file, int from, off_t *start, size_t size), (file, from, start, size / 2),
      (file, from, start, size))
WRITE(ssize_t, sendfile64, (int file, int from, off64_t *start, size_t size), (file, from, start, size / 2),
      (file, from, start, size))
WRITE(ssize_t, copy_file_range, (int from, off64_t *a, int file, off64_t *b, size_t size, unsigned flags),
      (from, a, file, b, size / 2, flags), (from, a, file, b, size, flags))
