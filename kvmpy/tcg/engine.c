/* SPDX-License-Identifier: Apache-2.0
 *
 * The door of the software engine (engine.h): handles, and which object an ioctl is for.
 *
 * A handle is a number of a table of this process, never a file descriptor; the numbers start high, so that one
 * of them given to close(2) by mistake fails. As with KVM a vCPU outlives its handle: it dies with its VM, and the VM
 * lives as long as any handle of it, its vCPUs or its statistics. `table_lock` protects the table only.
 */
#include "engine.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "vm.h"

#define FIRST_HANDLE (1 << 20)
#define MAX_HANDLES (1u << 16)

enum kind { FREE, SYSTEM, VM, VCPU, VM_STATS_FILE, VCPU_STATS_FILE };

struct handle {
    enum kind kind;
    struct tcg_vm *vm; /* a reference; NULL for SYSTEM */
    struct vcpu *vcpu;
};

static pthread_mutex_t table_lock = PTHREAD_MUTEX_INITIALIZER;
static struct handle *table;
static uint32_t table_size;

/* Takes over the caller's reference of the VM, also on failure. */
static int open_handle(enum kind kind, struct tcg_vm *vm, struct vcpu *vcpu)
{
    int result = -EMFILE;
    pthread_mutex_lock(&table_lock);
    uint32_t index = 0;
    while (index < table_size && table[index].kind != FREE)
        index++;
    if (index == table_size && table_size < MAX_HANDLES) {
        uint32_t size = table_size ? table_size * 2 : 64;
        struct handle *grown = realloc(table, size * sizeof *grown);
        if (grown) {
            memset(grown + table_size, 0, (size - table_size) * sizeof *grown);
            table = grown;
            table_size = size;
        }
    }
    if (index < table_size) {
        table[index] = (struct handle){kind, vm, vcpu};
        result = FIRST_HANDLE + (int)index;
    }
    pthread_mutex_unlock(&table_lock);
    if (result < 0 && vm)
        vm_put(vm);
    return result;
}

/* What a handle stands for; holds the VM until done(). */
static int use(int number, struct handle *out)
{
    int result = -EBADF;
    pthread_mutex_lock(&table_lock);
    uint32_t index = (uint32_t)number - FIRST_HANDLE;
    if (index < table_size && table[index].kind != FREE) {
        *out = table[index];
        if (out->vm)
            vm_get(out->vm);
        result = 0;
    }
    pthread_mutex_unlock(&table_lock);
    return result;
}

static void done(const struct handle *handle)
{
    if (handle->vm)
        vm_put(handle->vm);
}

static int tcg_open(const char *path)
{
    (void)path; /* there is one software CPU, wherever it is said to be */
    return open_handle(SYSTEM, NULL, NULL);
}

static int tcg_close(int number)
{
    struct handle gone = {FREE, NULL, NULL};
    pthread_mutex_lock(&table_lock);
    uint32_t index = (uint32_t)number - FIRST_HANDLE;
    if (index < table_size) {
        gone = table[index];
        table[index] = (struct handle){FREE, NULL, NULL};
    }
    pthread_mutex_unlock(&table_lock);
    if (gone.kind == FREE)
        return -EBADF;
    done(&gone);
    return 0;
}

static long system_ioctl(unsigned long request, uintptr_t arg)
{
    switch (request) {
    case KVM_GET_API_VERSION:
        return arg ? -EINVAL : KVM_API_VERSION;
    case KVM_CHECK_EXTENSION:
        return check_extension(NULL, arg);
    case KVM_GET_VCPU_MMAP_SIZE:
        return arg ? -EINVAL : (long)(RUN_PAGES * PAGE_SIZE);
    case KVM_GET_SUPPORTED_CPUID:
        return cpuid_get_supported(arg);
    case KVM_GET_MSR_INDEX_LIST:
        return msr_list(arg, false);
    case KVM_GET_MSR_FEATURE_INDEX_LIST:
        return msr_list(arg, true);
    case KVM_GET_MSRS:
        return msr_get_features(arg);
    case KVM_CREATE_VM: {
        struct tcg_vm *vm;
        int error = vm_create(&vm, arg);
        return error ? error : open_handle(VM, vm, NULL);
    }
    default:
        return -ENOTTY;
    }
}

static long create_vcpu(struct tcg_vm *vm, uintptr_t id)
{
    struct vcpu *vcpu;
    if (id >= TCG_MAX_CPUS)
        return -EINVAL;
    pthread_mutex_lock(&vm->lock);
    int error = vcpu_create(vm, id, &vcpu);
    pthread_mutex_unlock(&vm->lock);
    if (error)
        return error;
    vm_get(vm);
    return open_handle(VCPU, vm, vcpu);
}

static long open_stats(struct tcg_vm *vm, struct vcpu *vcpu)
{
    vm_get(vm);
    return open_handle(vcpu ? VCPU_STATS_FILE : VM_STATS_FILE, vm, vcpu);
}

static long dispatch(const struct handle *handle, unsigned long request, uintptr_t arg)
{
    switch (handle->kind) {
    case SYSTEM:
        return system_ioctl(request, arg);
    case VM:
        if (request == KVM_CREATE_VCPU)
            return create_vcpu(handle->vm, arg);
        if (request == KVM_GET_STATS_FD)
            return open_stats(handle->vm, NULL);
        return vm_ioctl(handle->vm, request, arg);
    case VCPU:
        if (request == KVM_GET_STATS_FD)
            return open_stats(handle->vm, handle->vcpu);
        return vcpu_ioctl(handle->vcpu, request, arg);
    default:
        return -ENOTTY;
    }
}

static long tcg_ioctl(int number, unsigned long request, uintptr_t arg)
{
    struct handle handle;
    int error = use(number, &handle);
    if (error)
        return error;
    long result = dispatch(&handle, request, arg);
    done(&handle);
    return result;
}

static void *tcg_map(int number, size_t size, uint64_t offset)
{
    struct handle handle;
    int error = use(number, &handle);
    if (error)
        return (void *)(intptr_t)error;
    void *address = handle.kind == VCPU ? vcpu_map(handle.vcpu, size, offset) : (void *)(intptr_t)-ENODEV;
    done(&handle);
    return address;
}

static int tcg_unmap(void *address, size_t size)
{
    return munmap(address, size) < 0 ? -errno : 0;
}

static long tcg_pread(int number, void *buffer, size_t size, uint64_t offset)
{
    struct handle handle;
    long result = use(number, &handle);
    if (result)
        return result;
    if (handle.kind == VM_STATS_FILE || handle.kind == VCPU_STATS_FILE)
        result = stats_pread(handle.vm, handle.vcpu, buffer, size, offset);
    else
        result = -EINVAL;
    done(&handle);
    return result;
}

static void tcg_wrote(int number, uint64_t gpa, uint64_t size)
{
    struct handle handle;
    if (use(number, &handle))
        return;
    if (handle.kind == VM)
        memory_host_wrote(handle.vm, gpa, size);
    done(&handle);
}

static void tcg_kick(int number)
{
    struct handle handle;
    if (use(number, &handle))
        return;
    if (handle.kind == VCPU)
        cpu_request(&handle.vcpu->cpu, CPU_REQ_EXIT);
    done(&handle);
}

const struct kvmpy_engine kvmpy_tcg_engine = {
    .version = KVMPY_ENGINE_VERSION,
    .name = "tcg",
    .open = tcg_open,
    .close = tcg_close,
    .ioctl = tcg_ioctl,
    .map = tcg_map,
    .unmap = tcg_unmap,
    .pread = tcg_pread,
    .wrote = tcg_wrote,
    .kick = tcg_kick,
};
