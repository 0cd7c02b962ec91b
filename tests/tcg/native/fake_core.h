/* SPDX-License-Identifier: Apache-2.0
 *
 * A toy processor behind cpu.h, so that the machine half is tested without the real core: slots, exits and their
 * completion, interrupts, stopping vCPUs. It keeps the contract of cpu.h: memory only through tcg_phys_to_host() and a
 * small TLB that CPU_REQ_TLB flushes, writes of logged pages reported once, accesses for user space run again.
 *
 * Its instructions are 16 bytes at RIP (flat, physical). A takes and gives RAX. Vector n is taken by going to
 * 16 * n + VECTORS with IF cleared; RBX keeps the old RIP, IRET goes back there and sets IF.
 */
#ifndef FAKE_CORE_H
#define FAKE_CORE_H

#include <stdint.h>

enum { VECTORS = 0x1000 };
enum toy_op {
    TOY_HLT, TOY_IN, TOY_OUT, TOY_LOAD, TOY_STORE, TOY_SET, TOY_ADD, TOY_JUMP, TOY_RDMSR, TOY_WRMSR, TOY_STI, TOY_CLI,
    TOY_IRET, TOY_TRIPLE, TOY_HYPERCALL, TOY_TSC, TOY_BAD,
};
struct toy {
    uint8_t op, size;
    uint16_t port;
    uint32_t unused;
    uint64_t value; /* address, MSR number, operand or target */
};

#endif
