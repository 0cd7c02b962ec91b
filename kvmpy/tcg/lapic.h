/* SPDX-License-Identifier: Apache-2.0
 *
 * The local APIC of one vCPU (SDM vol. 3A, chapter 11), in xAPIC mode (a page of registers) or x2APIC mode
 * (MSRs 0x800..0x83F), with its timer, and the bus between all of them. Registers are kept where
 * struct kvm_lapic_state has them, so that save and load are a copy.
 *
 * Everything here runs under the chips lock (vm.h). What leaves a LAPIC (the INTR line, NMI, INIT, SIPI, the
 * end of an interrupt) goes out by `struct apic_bus_ops`, called with that lock held.
 */
#ifndef KVMPY_TCG_LAPIC_H
#define KVMPY_TCG_LAPIC_H

#include <stdbool.h>
#include <stdint.h>

#include <linux/kvm.h>

#include "timer.h"

#define APIC_DEFAULT_BASE 0xFEE00000ull
#define APIC_BASE_BSP (1u << 8)
#define APIC_BASE_X2APIC (1u << 10)
#define APIC_BASE_ENABLE (1u << 11)
#define APIC_BUS_MAX 256

enum apic_delivery {
    APIC_FIXED, APIC_LOWEST, APIC_SMI, APIC_NMI = 4, APIC_INIT, APIC_SIPI, APIC_EXTINT,
};

/* An interrupt on its way: from an IOAPIC pin, an MSI or another LAPIC's ICR. */
struct apic_message {
    uint32_t dest;
    bool logical;         /* destination mode */
    bool level_triggered; /* sets the TMR bit, so that its EOI is told to the IOAPIC */
    bool ipi;             /* dest is as wide as the sender's APIC mode makes it */
    uint8_t mode, vector;
};

struct apic_bus_ops {
    void (*intr)(void *opaque, unsigned cpu, bool level);
    void (*nmi)(void *opaque, unsigned cpu);
    void (*init)(void *opaque, unsigned cpu);
    void (*sipi)(void *opaque, unsigned cpu, uint8_t vector);
    void (*eoi)(void *opaque, unsigned cpu, uint8_t vector, bool level_triggered);
};

struct lapic {
    struct apic_bus *bus;
    unsigned cpu;           /* vCPU id = initial APIC id */
    uint64_t base;          /* IA32_APIC_BASE */
    uint8_t regs[KVM_APIC_REG_SIZE] __attribute__((aligned(16)));
    uint32_t esr_pending;
    bool intr;              /* level of INTR as last told */
    bool extint;            /* no PIC in the engine: user space has an ExtINT for this vCPU (KVM_INTERRUPT) */
    struct timer timer;
    uint64_t timer_start;   /* when the count began at TMICT */
    uint64_t period;        /* ns; of the running count */
    uint64_t tsc_deadline;  /* MSR 0x6E0; 0: not armed */
};

struct apic_bus {
    struct lapic *cpu[APIC_BUS_MAX];
    unsigned count;     /* highest index in use + 1 */
    unsigned round;     /* who was last chosen by lowest priority */
    bool pic_intr;      /* INTR of the PIC: the LINT0 input of all */
    bool ids_32bit;     /* KVM_X2APIC_API_USE_32BIT_IDS */
    bool no_broadcast_quirk;
    bool lint0_stays_masked; /* KVM_X86_QUIRK_LINT0_REENABLED is disabled */
    const struct apic_bus_ops *ops;
    void *opaque;
    struct timers *timers;
};

void apic_bus_init(struct apic_bus *bus, const struct apic_bus_ops *ops, void *opaque, struct timers *timers);
/* How many accepted it: > 0; 0: coalesced with one still pending; -1: nobody. */
int apic_bus_send(struct apic_bus *bus, const struct apic_message *message);
/* An MSI's address and data (SDM vol. 3A, 11.11; bits 32..63 of the address extend the destination id). */
void apic_decode_msi(uint64_t address, uint32_t data, struct apic_message *message);
void apic_bus_set_pic(struct apic_bus *bus, bool level);

void lapic_init(struct lapic *apic, struct apic_bus *bus, unsigned cpu, bool bsp);
void lapic_free(struct lapic *apic);
void lapic_reset(struct lapic *apic); /* INIT: all but the base and the id */

/* Would it take this message? (destination match only) */
bool lapic_matches(const struct lapic *apic, const struct apic_message *message);
int lapic_accept(struct lapic *apic, uint8_t mode, uint8_t vector, bool level_triggered);
/* The vector that may interrupt now, -1: none. _ack moves it from IRR to ISR. */
int lapic_pending(const struct lapic *apic);
int lapic_ack(struct lapic *apic);
bool lapic_accepts_pic(const struct lapic *apic);
uint32_t lapic_ppr(const struct lapic *apic);
/* TPR, class in service, highest request: bytes 0, 1 and 3, as the virtual APIC page has them. */
uint32_t lapic_summary(const struct lapic *apic);
/* Recomputes INTR; after anything that may change it. */
void lapic_update(struct lapic *apic);

static inline bool lapic_enabled(const struct lapic *apic) { return apic->base & APIC_BASE_ENABLE; }
static inline bool lapic_x2(const struct lapic *apic) { return (apic->base & APIC_BASE_X2APIC) && lapic_enabled(apic); }
uint32_t lapic_id(const struct lapic *apic);

/* MMIO at offset 0..0xFFF of the page. Wrong sizes read 0 and write nothing, as KVM does. */
uint64_t lapic_read(struct lapic *apic, uint32_t offset, unsigned size);
void lapic_write(struct lapic *apic, uint32_t offset, unsigned size, uint64_t value);
/* MSRs 0x800..0x8FF in x2APIC mode; false: #GP. */
bool lapic_read_msr(struct lapic *apic, uint32_t msr, uint64_t *value);
bool lapic_write_msr(struct lapic *apic, uint32_t msr, uint64_t value);
/* IA32_APIC_BASE; `host`: by KVM_SET_MSRS or KVM_SET_SREGS, which may move between any two modes. false: #GP. */
bool lapic_set_base(struct lapic *apic, uint64_t base, bool host, uint64_t reserved);
uint8_t lapic_get_tpr(const struct lapic *apic);
void lapic_set_tpr(struct lapic *apic, uint8_t tpr);
/* IA32_TSC_DEADLINE; `when` is the deadline on the VM's clock. */
void lapic_set_tsc_deadline(struct lapic *apic, uint64_t tsc, uint64_t when);
uint64_t lapic_get_tsc_deadline(const struct lapic *apic);

void lapic_get_state(struct lapic *apic, struct kvm_lapic_state *state);
bool lapic_set_state(struct lapic *apic, const struct kvm_lapic_state *state); /* false: not a valid state */

/* Between lapic.c and lapic_timer.c. */
enum {
    REG_ID = 0x20, REG_VERSION = 0x30, REG_TPR = 0x80, REG_APR = 0x90, REG_PPR = 0xA0, REG_EOI = 0xB0, REG_RRD = 0xC0,
    REG_LDR = 0xD0, REG_DFR = 0xE0, REG_SVR = 0xF0, REG_ISR = 0x100, REG_TMR = 0x180, REG_IRR = 0x200, REG_ESR = 0x280,
    REG_ICR = 0x300, REG_ICR2 = 0x310, REG_LVT_TIMER = 0x320, REG_LVT_THERMAL = 0x330, REG_LVT_PMC = 0x340,
    REG_LVT_LINT0 = 0x350, REG_LVT_LINT1 = 0x360, REG_LVT_ERROR = 0x370, REG_TMICT = 0x380, REG_TMCCT = 0x390,
    REG_TDCR = 0x3E0, REG_SELF_IPI = 0x3F0,
};
enum { LVT_MASKED = 1 << 16, LVT_TIMER_MODE = 3 << 17, LVT_ONESHOT = 0, LVT_PERIODIC = 1 << 17, LVT_DEADLINE = 2 << 17 };
static inline uint32_t lapic_reg(const struct lapic *apic, uint32_t offset) { return *(const uint32_t *)(apic->regs + offset); }
static inline void lapic_put(struct lapic *apic, uint32_t offset, uint32_t value) { *(uint32_t *)(apic->regs + offset) = value; }
void lapic_local_interrupt(struct lapic *apic, uint32_t lvt_offset); /* an LVT's event happened */
void lapic_timer_init(struct lapic *apic);
void lapic_timer_stop(struct lapic *apic);
void lapic_timer_mode_changed(struct lapic *apic, uint32_t old_lvt);
void lapic_timer_start(struct lapic *apic, uint32_t count);  /* counts down from `count`, later from TMICT */
void lapic_timer_divide(struct lapic *apic, uint32_t tdcr);
uint32_t lapic_timer_count(const struct lapic *apic);        /* TMCCT */

#endif
