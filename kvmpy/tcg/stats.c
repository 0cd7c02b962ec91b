/* SPDX-License-Identifier: Apache-2.0
 *
 * A stats handle reads as: header, id string, descriptors, data (api.rst 4.133). All values are cumulative counts.
 * A counter is written by one thread; a reader may see it a moment late, never torn.
 */
#include "stats.h"

#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "vm.h"

#define NAME_SIZE 48u

static const char *const vm_names[] = {
#define STAT_NAME(name) #name,
    VM_STATS(STAT_NAME)
};
static const char *const vcpu_names[] = {
    VCPU_STATS(STAT_NAME)
};

struct layout {
    struct kvm_stats_header header;
    char id[NAME_SIZE];
};

static void put_descriptor(uint8_t *at, const char *name, uint32_t index)
{
    struct kvm_stats_desc desc = {
        .flags = KVM_STATS_TYPE_CUMULATIVE | KVM_STATS_UNIT_NONE | KVM_STATS_BASE_POW10,
        .size = 1, .offset = index * sizeof(uint64_t),
    };
    memcpy(at, &desc, sizeof desc);
    strncpy((char *)at + sizeof desc, name, NAME_SIZE - 1);
}

/* The core keeps its own counters in struct cpu. */
static void collect(struct vcpu *vcpu, struct vcpu_stats *out)
{
    *out = vcpu->stats;
    const struct cpu *c = &vcpu->cpu;
    out->insns = cpu_insns(c);
    out->blocks = c->stat.blocks;
    out->lookups = c->stat.lookups;
    out->tlb_misses = c->stat.tlb_miss;
    out->page_walks = c->stat.walks;
    out->tlb_flushes = c->stat.flushes;
    out->code_invalidations = c->stat.smc;
    out->faults = c->stat.faults;
    out->slow_path = c->stat.slow;
    out->jit_blocks = c->stat.jit_blocks;
    out->jit_insns = c->stat.jit_insns;
    out->jit_helpers = c->stat.jit_helpers;
    out->jit_links = c->stat.jit_links;
    out->jit_joined = c->stat.jit_joined;
}

long stats_pread(struct tcg_vm *vm, struct vcpu *vcpu, void *buffer, size_t size, uint64_t offset)
{
    const char *const *names = vcpu ? vcpu_names : vm_names;
    uint32_t count = vcpu ? sizeof vcpu_names / sizeof *vcpu_names : sizeof vm_names / sizeof *vm_names;
    const uint32_t desc_size = sizeof(struct kvm_stats_desc) + NAME_SIZE;
    struct layout layout = {.header = {
        .name_size = NAME_SIZE, .num_desc = count, .id_offset = sizeof(struct kvm_stats_header),
        .desc_offset = sizeof layout, .data_offset = sizeof layout + count * desc_size,
    }};
    if (vcpu)
        snprintf(layout.id, sizeof layout.id, "kvm-%d/vcpu-%u", (int)getpid(), vcpu->id); /* the kernel's form */
    else
        snprintf(layout.id, sizeof layout.id, "kvm-%d", (int)getpid());

    size_t total = layout.header.data_offset + count * sizeof(uint64_t);
    if (offset >= total)
        return 0;
    uint8_t *file = calloc(1, total);
    if (!file)
        return -ENOMEM;
    memcpy(file, &layout, sizeof layout);
    for (uint32_t i = 0; i < count; i++)
        put_descriptor(file + layout.header.desc_offset + i * desc_size, names[i], i);
    struct vcpu_stats of_vcpu;
    const void *data = &vm->stats;
    if (vcpu) {
        collect(vcpu, &of_vcpu);
        data = &of_vcpu;
    }
    memcpy(file + layout.header.data_offset, data, count * sizeof(uint64_t));
    if (size > total - offset)
        size = total - offset;
    memcpy(buffer, file + offset, size);
    free(file);
    return size;
}
