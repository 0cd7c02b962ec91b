/* SPDX-License-Identifier: Apache-2.0
 *
 * A VM of toy instructions through the engine's door, for the test programs.
 */
#ifndef MACHINE_H
#define MACHINE_H

#include <errno.h>
#include <stdbool.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>

#include "engine.h"
#include "kvm_compat.h"

#include "check.h"
#include "fake_core.h"

extern const struct kvmpy_engine kvmpy_tcg_engine;
#define ENGINE (&kvmpy_tcg_engine)
#define RAM_SIZE 0x40000u

struct machine {
    int kvm, vm, vcpu;
    uint8_t *ram;
    struct kvm_run *run;
};

static inline long call(int handle, unsigned long request, const void *arg)
{
    return ENGINE->ioctl(handle, request, (uintptr_t)arg);
}

static inline long call_int(int handle, unsigned long request, uintptr_t arg)
{
    return ENGINE->ioctl(handle, request, arg);
}

static inline long set_slot(int vm, uint32_t id, uint64_t gpa, uint64_t size, void *host, uint32_t flags)
{
    struct kvm_userspace_memory_region r = {
        .slot = id, .flags = flags, .guest_phys_addr = gpa, .memory_size = size, .userspace_addr = (uintptr_t)host,
    };
    return call(vm, KVM_SET_USER_MEMORY_REGION, &r);
}

static inline int add_vcpu(struct machine *m, unsigned id, uint64_t rip, struct kvm_run **run)
{
    int vcpu = call_int(m->vm, KVM_CREATE_VCPU, id);
    CHECK(vcpu >= 0);
    long size = call_int(m->kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
    *run = ENGINE->map(vcpu, size, 0);
    CHECK((intptr_t)*run > 0);
    struct kvm_regs regs;
    CHECK_EQ(call(vcpu, KVM_GET_REGS, &regs), 0);
    regs.rip = rip;
    CHECK_EQ(call(vcpu, KVM_SET_REGS, &regs), 0);
    return vcpu;
}

/* `setup` may make chips and enable capabilities before the first vCPU. */
static inline struct machine machine_new(void (*setup)(int vm))
{
    struct machine m;
    m.kvm = ENGINE->open(NULL);
    m.vm = call_int(m.kvm, KVM_CREATE_VM, 0);
    CHECK(m.vm >= 0);
    m.ram = mmap(NULL, RAM_SIZE, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    if (setup)
        setup(m.vm);
    CHECK_EQ(set_slot(m.vm, 0, 0, RAM_SIZE, m.ram, 0), 0);
    m.vcpu = add_vcpu(&m, 0, 0, &m.run);
    return m;
}

static inline void machine_free(struct machine *m)
{
    ENGINE->unmap(m->run, 3 * 4096);
    CHECK_EQ(ENGINE->close(m->vcpu), 0);
    CHECK_EQ(ENGINE->close(m->vm), 0);
    CHECK_EQ(ENGINE->close(m->kvm), 0);
    munmap(m->ram, RAM_SIZE);
}

static inline void load(struct machine *m, uint64_t at, const struct toy *code, size_t bytes)
{
    memcpy(m->ram + at, code, bytes);
}
#define LOAD(m, at, ...)                                     \
    do {                                                     \
        const struct toy code_[] = {__VA_ARGS__};            \
        load(m, at, code_, sizeof code_);                    \
    } while (0)

static inline long run(int vcpu)
{
    return ENGINE->ioctl(vcpu, KVM_RUN, 0);
}

static inline uint64_t rax(int vcpu)
{
    struct kvm_regs regs;
    CHECK_EQ(call(vcpu, KVM_GET_REGS, &regs), 0);
    return regs.rax;
}

#endif
