/* SPDX-License-Identifier: Apache-2.0
 *
 * Requests of a vCPU beyond KVM's: what its translator made, for a profiler.
 */
#ifndef KVMPY_TCG_PROFILE_H
#define KVMPY_TCG_PROFILE_H

#include <linux/kvm.h>

/* Of a vCPU, args[0]: 1 from now on host code counts its calls of the interpreter's handlers, and remembers which guest
 * instruction each piece is of; 0 no longer. Both forget all code. */
#define KVMPY_CAP_TCG_PROFILE 0x6B760003

/* The host code of the block of guest code at a linear address, in the present mode and address space. ENOENT: there is
 * none. `at`: where the code of each instruction begins, in the order of the guest's, `insns` of them. */
struct kvmpy_host_code {
    __u64 address;      /* in */
    __u64 buffer;       /* in: where the code goes, `size` bytes at most; what is out of line is left out */
    __u32 size;         /* out: how many there are */
    __u32 out_of_line;  /* bytes besides */
    __u64 host;         /* where it runs */
    __u32 guest_bytes, insns;
    __u16 at[64];
};
#define KVMPY_GET_HOST_CODE _IOWR(KVMIO, 0xf0, struct kvmpy_host_code)

/* What an address in host code means: a field of the vCPU, a thunk, a micro-op, a place out of line. ENOENT: nothing known. */
struct kvmpy_host_name {
    __u64 address;
    char name[56];
};
#define KVMPY_GET_HOST_NAME _IOWR(KVMIO, 0xf1, struct kvmpy_host_name)

/* How often host code called handlers since KVMPY_CAP_TCG_PROFILE, by line of the instruction table. `all`: because the
 * instruction has no host code; `slow`: out of line, mostly as memory was not in the softTLB.
 * E2BIG: `count` is too little, and then what is needed. */
struct kvmpy_handler_calls {
    __u32 count, padding;
    struct kvmpy_handler_call { char name[24]; __u64 all, slow; } call[];
};
#define KVMPY_GET_HANDLER_CALLS _IOWR(KVMIO, 0xf2, struct kvmpy_handler_calls)

#endif
