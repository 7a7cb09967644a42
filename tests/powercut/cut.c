/*
 * Preloaded into the daemon: a journal of what reached the files of one directory and what was synced, the phase that
 * the writer is in, and calls that fail to order. The product has no hook for any of it.
 *
 * CUT_DIRECTORY  the database's directory, absolute; nothing below it, nothing else is watched
 * CUT_JOURNAL    the journal's path, if one is wanted: records in one global order (tests/powercut/journal.py reads it)
 * CUT_STATE      a file of 4 KiB shared with the rig: the phase, counters, and the rig's orders
 *
 * A record of a write or of a change of names follows the call that it tells of, under one lock, so their order is the
 * order in which they happened. A record of a sync follows its end, and carries the journal's length at its beginning:
 * only what was there by then is sure to be on the disk. A kill from outside can fall between a call and its record, and
 * the next process finds a file that the journal knows nothing of; so the rig orders the kill. For the same reason a
 * process that ends itself at once, beside a compaction, does so under that lock.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/statvfs.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define FDS_MAX 65536

enum { OPENED = 1, WRITTEN, SYNCED, RENAMED, UNLINKED, TRUNCATED, FAILED_SYNC };
enum { CREATED = 1, EMPTIED = 2 };
enum { ANY, LOG, TABLE, MANIFEST, DIRECTORY };
enum { NO_FAULT, SYNC_EIO, WRITE_ENOSPC, WRITE_EIO, STATVFS_EIO, POLL_FAILS, READER_STALLS };
enum { STARTING, GATHERING, SYNCING, REPLYING };

struct state {                  /* 64-bit words, in the order of tests/powercut/library.py */
    _Atomic uint64_t pid;           /* the process that made a MANIFEST last, so had LOCK */
    _Atomic uint64_t phase;         /* of the writer */
    _Atomic uint64_t handles;       /* given out so far, over all processes */
    _Atomic uint64_t syncs;         /* of the log that returned */
    _Atomic uint64_t swallow;       /* order: pretend to sync */
    _Atomic uint64_t fault;         /* order: the call that is to fail */
    _Atomic uint64_t fault_kind;    /* order: on which files */
    _Atomic uint64_t fault_after;   /* order: calls that still succeed */
    _Atomic uint64_t fault_sticks;  /* order: go on failing */
    _Atomic uint64_t fired;         /* calls that failed to order */
    _Atomic uint64_t free_bytes;    /* order: what statvfs tells, plus one; 0 is the truth */
    _Atomic uint64_t realtime_s;    /* order: by how much the wall clock is wrong, in two's complement */
    _Atomic uint64_t boottime_s;    /* order: the same for the clock that deadlines are told in */
    _Atomic uint64_t awaited;       /* order: eight bytes to look for in what arrives; 0 is none */
    _Atomic uint64_t arrived;       /* syncs of the log that had returned when they did, plus one */
    _Atomic uint64_t killed;        /* order: die as by kill -9, behind the next call that is noted */
};

struct record {
    uint32_t magic;
    uint16_t kind;
    uint16_t name_bytes;
    uint32_t handle;
    uint32_t data_bytes;
    uint64_t offset;            /* of a write; the size of a truncation; flags of an opening */
    uint64_t mark;              /* of a sync: the journal's length when it began */
};

static struct state spare;
static struct state *state = &spare;
static char directory[4096];
static size_t directory_bytes;
static char journal_path[4096];
static int journal = -1;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static uint32_t handles[FDS_MAX];
static uint8_t kinds[FDS_MAX];
static __thread int writer; /* this thread syncs the log, so it is the writer */
static __thread int actor;  /* this thread polls a mailbox and a bell, so it is an actor */

static void fork_prepare(void) { pthread_mutex_lock(&lock); }
static void fork_done(void) { pthread_mutex_unlock(&lock); }

__attribute__((constructor)) static void begin(void)
{
    const char *where = getenv("CUT_DIRECTORY"), *to = getenv("CUT_JOURNAL"), *shared = getenv("CUT_STATE");
    if (where && strlen(where) < sizeof directory) {
        strcpy(directory, where);
        directory_bytes = strlen(directory);
    }
    if (to && strlen(to) < sizeof journal_path)
        strcpy(journal_path, to);
    if (shared) {
        int fd = open(shared, O_RDWR | O_CLOEXEC);
        void *page = fd < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (page != MAP_FAILED)
            state = page;
        if (fd >= 0)
            close(fd);
    }
    pthread_atfork(fork_prepare, fork_done, fork_done);
}

/* Return the name inside the directory, "" for the directory itself, NULL for what is none of ours. */
static const char *inside(const char *path)
{
    if (!directory_bytes || strncmp(path, directory, directory_bytes))
        return NULL;
    path += directory_bytes;
    if (!*path)
        return path;
    if (*path++ != '/' || strchr(path, '/'))
        return NULL;
    return path;
}

static uint8_t kind_of(const char *name)
{
    const char *dot = strrchr(name, '.');
    if (!*name)
        return DIRECTORY;
    if (!strncmp(name, "MANIFEST-", 9))
        return MANIFEST;
    if (dot && !strcmp(dot, ".log"))
        return LOG;
    return dot && !strcmp(dot, ".ldb") ? TABLE : ANY;
}

static uint64_t journal_bytes(void)
{
    struct stat found;
    return journal >= 0 && !fstat(journal, &found) ? (uint64_t)found.st_size : 0;
}

/*
 * Append a record, where a journal is kept; called under the lock. One that cannot be written proves nothing: end the
 * process.
 */
static void note(uint16_t kind, uint32_t handle, uint64_t offset, uint64_t mark, const char *name, size_t name_bytes,
                 const void *data, size_t data_bytes)
{
    REAL(writev);
    struct record record = {0x4a545543, kind, (uint16_t)name_bytes, handle, (uint32_t)data_bytes, offset, mark};
    struct iovec parts[3] = {{&record, sizeof record}, {(void *)name, name_bytes}, {(void *)data, data_bytes}};
    int saved = errno;
    if (*journal_path) {
        if (journal < 0)
            journal = open(journal_path, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0600);
        if (real(journal, parts, 3) != (ssize_t)(sizeof record + name_bytes + data_bytes))
            abort();
    }
    if (atomic_load(&state->killed))
        kill(getpid(), SIGKILL);
    errno = saved;
}

void _exit(int code)
{
    REAL(_exit);
    pthread_mutex_lock(&lock);
    real(code);
}

/* Say whether this call is the one that the rig ordered to fail. */
static int fails(uint64_t fault, uint8_t kind)
{
    if (atomic_load(&state->fault) != fault)
        return 0;
    uint64_t only = atomic_load(&state->fault_kind);
    if (only != ANY && only != kind)
        return 0;
    if (atomic_load(&state->fault_after) > 0) {
        atomic_fetch_sub(&state->fault_after, 1);
        return 0;
    }
    if (!atomic_load(&state->fault_sticks))
        atomic_store(&state->fault, NO_FAULT);
    atomic_fetch_add(&state->fired, 1);
    return 1;
}

static uint32_t handle_of(int fd) { return fd >= 0 && fd < FDS_MAX ? handles[fd] : 0; }

/* --- Names --- */

static int opened(int fd, const char *name, uint64_t flags)
{
    if (fd < 0 || fd >= FDS_MAX)
        return fd;
    if (kind_of(name) == MANIFEST) { /* not at LOCK, which a daemon that is refused opens, too */
        atomic_store(&state->pid, (uint64_t)getpid());
        atomic_store(&state->phase, STARTING);
    }
    handles[fd] = (uint32_t)atomic_fetch_add(&state->handles, 1) + 1;
    kinds[fd] = kind_of(name);
    note(OPENED, handles[fd], flags, 0, name, strlen(name), NULL, 0);
    return fd;
}

/* Say whether a reader is inside LevelDB here: it opens a table when it first looks for a key there. */
static int reads(const char *name) { return actor && !writer && kind_of(name) == TABLE; }

/* A disk that hangs never answers, whatever signal comes. */
static void hang(void)
{
    for (;;)
        pause();
}

/* The mode is passed only where a file may be made. */
#define READ_MODE(mode, flags)                                                             \
    mode_t mode = 0;                                                                       \
    if (flags & (O_CREAT | __O_TMPFILE)) {                                                 \
        va_list more;                                                                      \
        va_start(more, flags);                                                             \
        mode = va_arg(more, mode_t);                                                       \
        va_end(more);                                                                      \
    }

#define OPEN(function)                                                                     \
    int function(const char *path, int flags, ...)                                         \
    {                                                                                      \
        REAL(function);                                                                    \
        READ_MODE(mode, flags)                                                             \
        const char *name = inside(path);                                                   \
        if (name && reads(name) && fails(READER_STALLS, TABLE))                            \
            hang();                                                                        \
        if (!name || ((flags & O_ACCMODE) == O_RDONLY && *name))                           \
            return real(path, flags, mode);                                                \
        pthread_mutex_lock(&lock);                                                         \
        uint64_t made = (flags & O_CREAT) && access(path, F_OK) ? CREATED : 0;             \
        int fd = real(path, flags, mode);                                                  \
        opened(fd, name, made | (flags & O_TRUNC ? EMPTIED : 0));                          \
        pthread_mutex_unlock(&lock);                                                       \
        return fd;                                                                         \
    }

OPEN(open)
OPEN(open64)

/* By the directory's descriptor: what is made longer there is the log. */
#define OPENAT(function)                                                                   \
    int function(int at, const char *path, int flags, ...)                                 \
    {                                                                                      \
        REAL(function);                                                                    \
        READ_MODE(mode, flags)                                                             \
        int ours = handle_of(at) && kinds[at] == DIRECTORY && *path && !strchr(path, '/'); \
        if (!ours || (flags & O_ACCMODE) == O_RDONLY)                                      \
            return real(at, path, flags, mode);                                            \
        pthread_mutex_lock(&lock);                                                         \
        uint64_t made = (flags & O_CREAT) && faccessat(at, path, F_OK, 0) ? CREATED : 0;   \
        int fd = real(at, path, flags, mode);                                              \
        opened(fd, path, made | (flags & O_TRUNC ? EMPTIED : 0));                          \
        pthread_mutex_unlock(&lock);                                                       \
        return fd;                                                                         \
    }

OPENAT(openat)
OPENAT(openat64)

int creat(const char *path, mode_t mode) { return open(path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

int close(int fd)
{
    REAL(close);
    if (handle_of(fd))
        handles[fd] = 0;
    return real(fd);
}

int rename(const char *from, const char *to)
{
    REAL(rename);
    const char *old = inside(from), *new = inside(to);
    if (!old || !new)
        return real(from, to);
    pthread_mutex_lock(&lock);
    int result = real(from, to);
    if (!result) {
        char both[8192];
        int bytes = snprintf(both, sizeof both, "%s%c%s", old, 0, new);
        note(RENAMED, 0, 0, 0, both, (size_t)bytes, NULL, 0);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

int unlink(const char *path)
{
    REAL(unlink);
    const char *name = inside(path);
    if (!name)
        return real(path);
    pthread_mutex_lock(&lock);
    int result = real(path);
    if (!result)
        note(UNLINKED, 0, 0, 0, name, strlen(name), NULL, 0);
    pthread_mutex_unlock(&lock);
    return result;
}

/* --- Bytes --- */

static int write_fails(int fd)
{
    uint8_t kind = kinds[fd];
    int error = fails(WRITE_ENOSPC, kind) ? ENOSPC : fails(WRITE_EIO, kind) ? EIO : 0;
    if (error)
        errno = error;
    return error;
}

static void written(int fd, const void *data, ssize_t bytes, off_t offset)
{
    if (bytes > 0)
        note(WRITTEN, handles[fd], (uint64_t)offset, 0, NULL, 0, data, (size_t)bytes);
}

ssize_t write(int fd, const void *data, size_t bytes)
{
    REAL(write);
    if (!handle_of(fd))
        return real(fd, data, bytes);
    if (writer && kinds[fd] == LOG)
        atomic_store(&state->phase, SYNCING);
    if (write_fails(fd))
        return -1;
    pthread_mutex_lock(&lock);
    ssize_t result = real(fd, data, bytes);
    written(fd, data, result, lseek(fd, 0, SEEK_CUR) - result);
    pthread_mutex_unlock(&lock);
    return result;
}

#define PWRITE(function, offset_type)                                                      \
    ssize_t function(int fd, const void *data, size_t bytes, offset_type offset)           \
    {                                                                                      \
        REAL(function);                                                                    \
        if (!handle_of(fd))                                                                \
            return real(fd, data, bytes, offset);                                          \
        if (write_fails(fd))                                                               \
            return -1;                                                                     \
        pthread_mutex_lock(&lock);                                                         \
        ssize_t result = real(fd, data, bytes, offset);                                    \
        written(fd, data, result, (off_t)offset);                                          \
        pthread_mutex_unlock(&lock);                                                       \
        return result;                                                                     \
    }

PWRITE(pwrite, off_t)
PWRITE(pwrite64, off64_t)

ssize_t writev(int fd, const struct iovec *parts, int count)
{
    REAL(writev);
    if (!handle_of(fd))
        return real(fd, parts, count);
    ssize_t total = 0;
    for (int each = 0; each < count; each++) {
        ssize_t wrote = write(fd, parts[each].iov_base, parts[each].iov_len);
        if (wrote < 0)
            return total ? total : wrote;
        total += wrote;
        if ((size_t)wrote < parts[each].iov_len)
            break;
    }
    return total;
}

#define TRUNCATE(function, offset_type)                                                    \
    int function(int fd, offset_type size)                                                 \
    {                                                                                      \
        REAL(function);                                                                    \
        if (!handle_of(fd))                                                                \
            return real(fd, size);                                                         \
        pthread_mutex_lock(&lock);                                                         \
        int result = real(fd, size);                                                       \
        if (!result)                                                                       \
            note(TRUNCATED, handles[fd], (uint64_t)size, 0, NULL, 0, NULL, 0);             \
        pthread_mutex_unlock(&lock);                                                       \
        return result;                                                                     \
    }

TRUNCATE(ftruncate, off_t)
TRUNCATE(ftruncate64, off64_t)

/* The rig knows nothing of stores through a mapping: should the engine begin to use one, say so at once. */
#define MMAP(function, offset_type)                                                        \
    void *function(void *at, size_t bytes, int protection, int flags, int fd, offset_type offset) \
    {                                                                                      \
        REAL(function);                                                                    \
        if (handle_of(fd) && (protection & PROT_WRITE) && (flags & MAP_SHARED))            \
            abort();                                                                       \
        return real(at, bytes, protection, flags, fd, offset);                             \
    }

MMAP(mmap, off_t)
MMAP(mmap64, off64_t)

/* --- Syncs --- */

static int synced(int fd, int (*real)(int))
{
    if (!handle_of(fd))
        return real(fd);
    uint8_t kind = kinds[fd];
    if (kind == LOG) {
        writer = 1;
        atomic_store(&state->phase, SYNCING);
    }
    pthread_mutex_lock(&lock);
    uint64_t mark = journal_bytes();
    pthread_mutex_unlock(&lock);
    int broken = fails(SYNC_EIO, kind), pretend = atomic_load(&state->swallow) != 0;
    int result = broken ? -1 : pretend ? 0 : real(fd);
    pthread_mutex_lock(&lock);
    if (broken)
        note(FAILED_SYNC, handles[fd], 0, mark, NULL, 0, NULL, 0);
    else if (!pretend && !result)
        note(SYNCED, handles[fd], 0, mark, NULL, 0, NULL, 0);
    pthread_mutex_unlock(&lock);
    if (kind == LOG) {
        atomic_fetch_add(&state->syncs, 1);
        atomic_store(&state->phase, REPLYING);
    }
    if (broken)
        errno = EIO;
    return result;
}

int fsync(int fd)
{
    REAL(fsync);
    return synced(fd, real);
}

int fdatasync(int fd)
{
    REAL(fdatasync);
    return synced(fd, real);
}

/* --- The writer's turn, and what it asks of the system --- */

int poll(struct pollfd *these, nfds_t count, int timeout_ms)
{
    REAL(poll);
    actor |= count == 2;
    if (writer && count == 2) /* its mailbox and its bell: a turn begins */
        atomic_store(&state->phase, GATHERING);
    if (writer && count == 1 && fails(POLL_FAILS, ANY)) { /* libzmq's own: it looks whether its other thread has word */
        errno = ENOMEM;
        return -1;
    }
    return real(these, count, timeout_ms);
}

/* libzmq's own thread takes in what a peer has sent: from here on it is at the daemon. */
ssize_t recv(int fd, void *data, size_t bytes, int flags)
{
    REAL(recv);
    ssize_t result = real(fd, data, bytes, flags);
    uint64_t awaited = atomic_load(&state->awaited);
    if (awaited && result > 0 && memmem(data, (size_t)result, &awaited, sizeof awaited)) {
        atomic_store(&state->awaited, 0);
        atomic_store(&state->arrived, atomic_load(&state->syncs) + 1);
    }
    return result;
}

#define STATVFS(function, type)                                                            \
    int function(int fd, struct type *found)                                               \
    {                                                                                      \
        REAL(function);                                                                    \
        if (!handle_of(fd))                                                                \
            return real(fd, found);                                                        \
        if (fails(STATVFS_EIO, ANY)) {                                                     \
            errno = EIO;                                                                   \
            return -1;                                                                     \
        }                                                                                  \
        int result = real(fd, found);                                                      \
        uint64_t told = atomic_load(&state->free_bytes);                                   \
        if (!result && told)                                                               \
            found->f_bavail = (told - 1) / found->f_frsize;                                \
        return result;                                                                     \
    }

STATVFS(fstatvfs, statvfs)
STATVFS(fstatvfs64, statvfs64)

/* --- Clocks --- */

int clock_gettime(clockid_t clock, struct timespec *now)
{
    REAL(clock_gettime);
    int result = real(clock, now);
    if (!result && clock == CLOCK_REALTIME)
        now->tv_sec += (int64_t)atomic_load(&state->realtime_s);
    if (!result && clock == CLOCK_BOOTTIME)
        now->tv_sec += (int64_t)atomic_load(&state->boottime_s);
    return result;
}
