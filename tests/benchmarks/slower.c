/*
 * Preloaded into every process of a benchmark: each sync takes SLOWER_US microseconds longer, as on a slower disk.
 *
 * LMDB's second sync of a commit, a write through O_DSYNC, is not made longer.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)

static int later(int result)
{
	const char *asked = getenv("SLOWER_US");
	long us = asked ? atol(asked) : 0;
	struct timespec left = { us / 1000000, us % 1000000 * 1000 };
	int error = errno;

	while (nanosleep(&left, &left) && errno == EINTR)
		;
	errno = error;
	return result;
}

int fdatasync(int descriptor)
{
	REAL(fdatasync);
	return later(real(descriptor));
}

int fsync(int descriptor)
{
	REAL(fsync);
	return later(real(descriptor));
}
