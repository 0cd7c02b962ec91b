// SPDX-License-Identifier: Apache-2.0
// The kernel engine: each door call is one system call.
#include "engine.h"

#include <errno.h>
#include <fcntl.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <unistd.h>

static int kernel_open(const char *path)
{
    int fd = open(path ? path : "/dev/kvm", O_RDWR | O_CLOEXEC);
    return fd < 0 ? -errno : fd;
}

static int kernel_close(int handle)
{
    return close(handle) < 0 ? -errno : 0;
}

static long kernel_ioctl(int handle, unsigned long request, uintptr_t arg)
{
    int value = ioctl(handle, request, arg);
    return value < 0 ? -errno : value;
}

static void *kernel_map(int handle, size_t size, uint64_t offset)
{
    void *address = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, handle, (off_t)offset);
    return address == MAP_FAILED ? (void *)(intptr_t)-errno : address;
}

static int kernel_unmap(void *address, size_t size)
{
    return munmap(address, size) < 0 ? -errno : 0;
}

static long kernel_pread(int handle, void *buffer, size_t size, uint64_t offset)
{
    ssize_t count = pread(handle, buffer, size, (off_t)offset);
    return count < 0 ? -errno : count;
}

const struct kvmpy_engine kvmpy_kernel_engine = {
    .version = KVMPY_ENGINE_VERSION,
    .name = "kvm",
    .open = kernel_open,
    .close = kernel_close,
    .ioctl = kernel_ioctl,
    .map = kernel_map,
    .unmap = kernel_unmap,
    .pread = kernel_pread,
    .wrote = NULL, /* the hardware keeps its caches coherent */
    .kick = NULL,  /* a signal ends KVM_RUN */
};
