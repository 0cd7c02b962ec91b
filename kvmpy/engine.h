/* SPDX-License-Identifier: Apache-2.0
 *
 * The door to a processor. Both engines, the kernel's KVM and the software CPU, are seen through these
 * eight calls, and what goes through them is the KVM ABI itself (Documentation/virt/kvm/api.rst): the same
 * request numbers, the same structures, the same struct kvm_run. So everything above exists once.
 *
 * A handle is what a file descriptor is to KVM: /dev/kvm, a VM, a vCPU, a device, a stats file. For the
 * kernel engine it is one. Every call returns -errno on failure and never touches errno or the Python GIL.
 * Where the ABI passes a real file descriptor in a structure (irqfd, ioeventfd, guest_memfd) it stays one.
 */
#ifndef KVMPY_ENGINE_H
#define KVMPY_ENGINE_H

#include <stddef.h>
#include <stdint.h>

#define KVMPY_ENGINE_CAPSULE "kvmpy.engine"
#define KVMPY_ENGINE_VERSION 2

struct kvmpy_engine {
    uint32_t version;     /* KVMPY_ENGINE_VERSION */
    const char *name;     /* "kvm", "tcg" */

    /* open(2) on /dev/kvm; `path` may be NULL for the usual one. Returns a system handle. */
    int (*open)(const char *path);
    int (*close)(int handle);

    /* ioctl(2). `arg` is the pointer or the integer that api.rst names for the request.
     * KVM_RUN returns -EINTR when it was kicked: a signal, or run->immediate_exit. */
    long (*ioctl)(int handle, unsigned long request, uintptr_t arg);

    /* mmap(2) of a vCPU handle: the kvm_run area, the coalesced ring, the dirty ring (offset in bytes). */
    void *(*map)(int handle, size_t size, uint64_t offset); /* NULL-safe: returns (void *)-errno on failure */
    int (*unmap)(void *address, size_t size);

    /* pread(2) of a stats handle. */
    long (*pread)(int handle, void *buffer, size_t size, uint64_t offset);

    /* The host wrote guest memory behind the processor's back (loader, device, debugger): forget what was
     * translated from [gpa, gpa + size). May be NULL: hardware keeps its caches coherent by itself. */
    void (*wrote)(int vm, uint64_t gpa, uint64_t size);

    /* run->immediate_exit of a vCPU that may be running was set: look at it now. May be NULL: a signal does it. */
    void (*kick)(int vcpu);
};

/* open(2), ioctl(2), mmap(2) on /dev/kvm (engine_kernel.c). */
extern const struct kvmpy_engine kvmpy_kernel_engine;

#endif
