/* SPDX-License-Identifier: Apache-2.0
 *
 * Who may use a handle right now: a count of the calls inside, in plain C atomics so that it holds with and without
 * the GIL. KVM_RUN and close() take the gate alone: all other vCPU ioctls would sleep on the kernel's vCPU mutex
 * until the guest exits, so an error is better than a hang.
 */
#ifndef KVMPY_GATE_H
#define KVMPY_GATE_H

#include <stdatomic.h>

enum { GATE_BUSY = 1, GATE_RUNNING = 1 << 29, GATE_CLOSED = 1 << 30 };

typedef _Atomic int kvmpy_gate;

/* 0 when the caller is in (leave with gate_leave), else what keeps it out. */
static inline int gate_enter(kvmpy_gate *gate)
{
    int before = atomic_fetch_add(gate, 1);
    if (before < GATE_RUNNING)
        return 0;
    atomic_fetch_sub(gate, 1);
    return before & (GATE_RUNNING | GATE_CLOSED);
}

static inline void gate_leave(kvmpy_gate *gate)
{
    atomic_fetch_sub(gate, 1);
}

/* Take the gate alone, as GATE_RUNNING or GATE_CLOSED: 0, or the reason why not. */
static inline int gate_take(kvmpy_gate *gate, int as)
{
    int found = 0;
    if (atomic_compare_exchange_strong(gate, &found, as))
        return 0;
    return found >= GATE_RUNNING ? found & (GATE_RUNNING | GATE_CLOSED) : GATE_BUSY;
}

static inline void gate_release(kvmpy_gate *gate, int as)
{
    atomic_fetch_sub(gate, as);
}

static inline int gate_state(kvmpy_gate *gate)
{
    return atomic_load(gate) & (GATE_RUNNING | GATE_CLOSED);
}

#endif
