/* SPDX-License-Identifier: Apache-2.0
 *
 * Registers of a local APIC: interrupt acceptance and priority, EOI, ICR, LVTs, mode and base.
 * The way of a fixed interrupt: lapic_accept() sets IRR; when its class beats PPR, INTR goes up; the core
 * calls lapic_ack(), which moves it to ISR; the guest's EOI clears ISR and tells the IOAPIC.
 */
#include "lapic.h"

#include <string.h>

#define APIC_VERSION 0x50014u /* integrated, LVT entries 0..5 (what KVM shows) */
#define SVR_ENABLE (1u << 8)
#define LVT_MODE_SHIFT 8
enum { ESR_SEND_ILLEGAL = 1 << 5, ESR_RECEIVE_ILLEGAL = 1 << 6, ESR_ILLEGAL_REGISTER = 1 << 7 };

/* Bits of each LVT that software may write (SDM vol. 3A, figure 11-8). */
static const struct { uint16_t offset; uint32_t writable; } lvt_table[] = {
    {REG_LVT_TIMER, 0x710FF}, {REG_LVT_THERMAL, 0x117FF}, {REG_LVT_PMC, 0x117FF},
    {REG_LVT_LINT0, 0x1F7FF}, {REG_LVT_LINT1, 0x1F7FF}, {REG_LVT_ERROR, 0x110FF},
};
enum { LVT_COUNT = sizeof lvt_table / sizeof lvt_table[0] };

static bool test_bit(const struct lapic *apic, uint32_t base, uint8_t vector)
{
    return lapic_reg(apic, base + (vector >> 5) * 16) & (1u << (vector & 31));
}

static void set_bit(struct lapic *apic, uint32_t base, uint8_t vector, bool value)
{
    uint32_t offset = base + (vector >> 5) * 16, bit = 1u << (vector & 31), word = lapic_reg(apic, offset);
    lapic_put(apic, offset, value ? word | bit : word & ~bit);
}

static int highest(const struct lapic *apic, uint32_t base)
{
    for (int word = 7; word >= 0; word--) {
        uint32_t bits = lapic_reg(apic, base + word * 16);
        if (bits)
            return word * 32 + 31 - __builtin_clz(bits);
    }
    return -1;
}

static bool software_enabled(const struct lapic *apic)
{
    return lapic_reg(apic, REG_SVR) & SVR_ENABLE;
}

uint32_t lapic_id(const struct lapic *apic)
{
    return lapic_x2(apic) ? lapic_reg(apic, REG_ID) : lapic_reg(apic, REG_ID) >> 24;
}

/* ---- acceptance and priority ---- */

uint32_t lapic_ppr(const struct lapic *apic)
{
    int in_service = highest(apic, REG_ISR);
    uint32_t tpr = lapic_reg(apic, REG_TPR), isr = in_service < 0 ? 0 : in_service;
    return (tpr & 0xF0) >= (isr & 0xF0) ? tpr & 0xFF : isr & 0xF0;
}

uint32_t lapic_summary(const struct lapic *apic)
{
    int requested = highest(apic, REG_IRR), in_service = highest(apic, REG_ISR);
    uint32_t word = lapic_reg(apic, REG_TPR) & 0xFF;
    word |= in_service < 0 ? 0 : (uint32_t)(in_service & 0xF0) << 8;
    return word | (requested < 0 ? 0 : (uint32_t)requested << 24);
}

int lapic_pending(const struct lapic *apic)
{
    if (!lapic_enabled(apic) || !software_enabled(apic))
        return -1;
    int vector = highest(apic, REG_IRR);
    return vector >= 0 && (vector & 0xF0) > (int)(lapic_ppr(apic) & 0xF0) ? vector : -1;
}

bool lapic_accepts_pic(const struct lapic *apic)
{
    if (!lapic_enabled(apic))
        return true; /* a disabled APIC passes INTR through */
    uint32_t lvt = lapic_reg(apic, REG_LVT_LINT0);
    return !(lvt & LVT_MASKED) && ((lvt >> LVT_MODE_SHIFT) & 7) == APIC_EXTINT;
}

void lapic_update(struct lapic *apic)
{
    bool external = (apic->bus->pic_intr || apic->extint) && lapic_accepts_pic(apic);
    bool level = external || lapic_pending(apic) >= 0;
    if (level != apic->intr) {
        apic->intr = level;
        apic->bus->ops->intr(apic->bus->opaque, apic->cpu, level);
    }
}

static void report_error(struct lapic *apic, uint32_t bit)
{
    bool repeated = apic->esr_pending & bit;
    apic->esr_pending |= bit;
    if (!repeated) /* so that an illegal vector in the error LVT itself cannot recurse */
        lapic_local_interrupt(apic, REG_LVT_ERROR);
}

int lapic_accept(struct lapic *apic, uint8_t mode, uint8_t vector, bool level_triggered)
{
    struct apic_bus *bus = apic->bus;
    switch (mode) {
    case APIC_FIXED:
    case APIC_LOWEST: {
        if (!lapic_enabled(apic) || !software_enabled(apic))
            return -1;
        if (vector < 16) {
            report_error(apic, ESR_RECEIVE_ILLEGAL);
            return -1;
        }
        bool coalesced = test_bit(apic, REG_IRR, vector);
        set_bit(apic, REG_TMR, vector, level_triggered);
        set_bit(apic, REG_IRR, vector, true);
        lapic_update(apic);
        return !coalesced;
    }
    case APIC_NMI:
        bus->ops->nmi(bus->opaque, apic->cpu);
        return 1;
    case APIC_INIT:
        bus->ops->init(bus->opaque, apic->cpu);
        return 1;
    case APIC_SIPI:
        bus->ops->sipi(bus->opaque, apic->cpu, vector);
        return 1;
    default: /* SMI: no SMM here; ExtINT comes over LINT0 only */
        return -1;
    }
}

int lapic_ack(struct lapic *apic)
{
    int vector = lapic_pending(apic);
    if (vector >= 0) {
        set_bit(apic, REG_IRR, vector, false);
        set_bit(apic, REG_ISR, vector, true);
    }
    lapic_update(apic);
    return vector;
}

static void end_of_interrupt(struct lapic *apic)
{
    int vector = highest(apic, REG_ISR);
    if (vector < 0)
        return;
    set_bit(apic, REG_ISR, vector, false);
    bool level_triggered = test_bit(apic, REG_TMR, vector);
    lapic_update(apic);
    apic->bus->ops->eoi(apic->bus->opaque, apic->cpu, vector, level_triggered);
}

void lapic_local_interrupt(struct lapic *apic, uint32_t lvt_offset)
{
    uint32_t lvt = lapic_reg(apic, lvt_offset);
    if ((lvt & LVT_MASKED) || !lapic_enabled(apic))
        return;
    uint8_t mode = (lvt >> LVT_MODE_SHIFT) & 7;
    if (lvt_offset == REG_LVT_TIMER || lvt_offset == REG_LVT_ERROR)
        mode = APIC_FIXED; /* those two have no delivery mode */
    if (mode == APIC_FIXED || mode == APIC_NMI)
        lapic_accept(apic, mode, lvt, false);
}

uint8_t lapic_get_tpr(const struct lapic *apic)
{
    return lapic_reg(apic, REG_TPR);
}

void lapic_set_tpr(struct lapic *apic, uint8_t tpr)
{
    lapic_put(apic, REG_TPR, tpr);
    lapic_update(apic);
}

/* ---- interrupts sent ---- */

static void send_ipi(struct lapic *apic, uint32_t icr, uint32_t dest)
{
    enum { SHORTHAND_NONE, SHORTHAND_SELF, SHORTHAND_ALL, SHORTHAND_OTHERS };
    struct apic_message message = {
        .dest = dest, .logical = icr & (1 << 11), .mode = (icr >> 8) & 7, .vector = icr, .ipi = true,
    };
    bool asserted = icr & (1 << 14), level = icr & (1 << 15);
    if (message.mode == APIC_INIT && level && !asserted)
        return; /* INIT level de-assert: arbitration ids only */
    if (message.mode <= APIC_LOWEST && message.vector < 16) {
        report_error(apic, ESR_SEND_ILLEGAL);
        return;
    }
    unsigned shorthand = (icr >> 18) & 3;
    if (shorthand == SHORTHAND_NONE) {
        apic_bus_send(apic->bus, &message);
    } else if (shorthand == SHORTHAND_SELF) {
        lapic_accept(apic, message.mode, message.vector, false);
    } else {
        for (unsigned i = 0; i < apic->bus->count; i++) {
            struct lapic *other = apic->bus->cpu[i];
            if (other && (other != apic || shorthand == SHORTHAND_ALL))
                lapic_accept(other, message.mode, message.vector, false);
        }
    }
}

/* ---- registers ---- */

static void write_lvt(struct lapic *apic, unsigned index, uint32_t value)
{
    uint32_t offset = lvt_table[index].offset, old = lapic_reg(apic, offset);
    value &= lvt_table[index].writable;
    if (!software_enabled(apic))
        value |= LVT_MASKED; /* SDM 11.4.7.2 */
    lapic_put(apic, offset, value);
    if (offset == REG_LVT_TIMER)
        lapic_timer_mode_changed(apic, old);
}

static void write_svr(struct lapic *apic, uint32_t value)
{
    bool was_enabled = software_enabled(apic);
    lapic_put(apic, REG_SVR, value & 0x3FF);
    if (was_enabled && !software_enabled(apic))
        for (unsigned i = 0; i < LVT_COUNT; i++)
            lapic_put(apic, lvt_table[i].offset, lapic_reg(apic, lvt_table[i].offset) | LVT_MASKED);
}

static uint32_t read_register(struct lapic *apic, uint32_t offset)
{
    switch (offset) {
    case REG_TMCCT:
        return lapic_timer_count(apic);
    case REG_PPR:
        return lapic_ppr(apic);
    default:
        return lapic_reg(apic, offset);
    }
}

/* Returns false where there is no writable register. */
static bool write_register(struct lapic *apic, uint32_t offset, uint32_t value)
{
    for (unsigned i = 0; i < LVT_COUNT; i++) {
        if (lvt_table[i].offset == offset) {
            write_lvt(apic, i, value);
            lapic_update(apic);
            return true;
        }
    }
    switch (offset) {
    case REG_TPR:
        lapic_put(apic, REG_TPR, value & 0xFF);
        break;
    case REG_EOI:
        end_of_interrupt(apic);
        return true;
    case REG_SVR:
        write_svr(apic, value);
        break;
    case REG_ESR:
        lapic_put(apic, REG_ESR, apic->esr_pending);
        apic->esr_pending = 0;
        return true;
    case REG_TMICT:
        if ((lapic_reg(apic, REG_LVT_TIMER) & LVT_TIMER_MODE) != LVT_DEADLINE) {
            lapic_put(apic, REG_TMICT, value);
            lapic_timer_start(apic, value);
        }
        return true;
    case REG_TDCR:
        lapic_timer_divide(apic, value);
        return true;
    default:
        return false;
    }
    lapic_update(apic);
    return true;
}

uint64_t lapic_read(struct lapic *apic, uint32_t offset, unsigned size)
{
    if (offset >= KVM_APIC_REG_SIZE || (offset & 15) + size > 4)
        return 0;
    uint32_t value = read_register(apic, offset & ~15u) >> ((offset & 3) * 8);
    return size < 4 ? value & ((1u << size * 8) - 1) : value;
}

void lapic_write(struct lapic *apic, uint32_t offset, unsigned size, uint64_t value)
{
    if (offset >= KVM_APIC_REG_SIZE || size != 4 || (offset & 15))
        return;
    switch (offset) {
    case REG_ID:
        lapic_put(apic, REG_ID, value & 0xFF000000);
        break;
    case REG_LDR:
        lapic_put(apic, REG_LDR, value & 0xFF000000);
        break;
    case REG_DFR:
        lapic_put(apic, REG_DFR, value | 0x0FFFFFFF);
        break;
    case REG_ICR2:
        lapic_put(apic, REG_ICR2, value & 0xFF000000);
        break;
    case REG_ICR:
        value &= 0xFFFFEFFF; /* delivery status: always idle */
        lapic_put(apic, REG_ICR, value);
        send_ipi(apic, value, lapic_reg(apic, REG_ICR2) >> 24);
        break;
    default:
        if (!write_register(apic, offset, value))
            report_error(apic, ESR_ILLEGAL_REGISTER);
    }
}

/* Which x2APIC MSRs exist: SDM vol. 3A, table 11-6. */
static bool x2_readable(uint32_t offset)
{
    if (offset >= REG_ISR && offset < REG_ESR)
        return true;
    switch (offset) {
    case REG_ID: case REG_VERSION: case REG_TPR: case REG_PPR: case REG_LDR: case REG_SVR: case REG_ESR: case REG_ICR:
    case REG_LVT_TIMER: case REG_LVT_THERMAL: case REG_LVT_PMC: case REG_LVT_LINT0: case REG_LVT_LINT1:
    case REG_LVT_ERROR: case REG_TMICT: case REG_TMCCT: case REG_TDCR:
        return true;
    default:
        return false;
    }
}

bool lapic_read_msr(struct lapic *apic, uint32_t msr, uint64_t *value)
{
    uint32_t offset = (msr - 0x800) << 4;
    if (!lapic_x2(apic) || offset >= KVM_APIC_REG_SIZE || !x2_readable(offset))
        return false;
    *value = read_register(apic, offset);
    if (offset == REG_ICR)
        *value |= (uint64_t)lapic_reg(apic, REG_ICR2) << 32;
    return true;
}

bool lapic_write_msr(struct lapic *apic, uint32_t msr, uint64_t value)
{
    uint32_t offset = (msr - 0x800) << 4;
    if (!lapic_x2(apic) || offset >= KVM_APIC_REG_SIZE)
        return false;
    if (offset == REG_ICR) {
        if (value & 0xFFF32000) /* reserved bits */
            return false;
        value &= ~(1ull << 12); /* delivery status: always idle */
        lapic_put(apic, REG_ICR, value);
        lapic_put(apic, REG_ICR2, value >> 32);
        send_ipi(apic, value, value >> 32);
        return true;
    }
    if (value >> 32)
        return false;
    switch (offset) {
    case REG_SELF_IPI:
        if (value > 0xFF)
            return false;
        if (value < 16)
            report_error(apic, ESR_SEND_ILLEGAL);
        else
            lapic_accept(apic, APIC_FIXED, value, false);
        return true;
    case REG_EOI:
    case REG_ESR:
        return value == 0 && write_register(apic, offset, 0);
    case REG_TPR:
        return value <= 0xFF && write_register(apic, offset, value);
    default:
        return write_register(apic, offset, value);
    }
}

/* ---- life, base, state ---- */

static void set_x2_ids(struct lapic *apic)
{
    lapic_put(apic, REG_ID, apic->cpu);
    lapic_put(apic, REG_LDR, (apic->cpu >> 4) << 16 | 1u << (apic->cpu & 15)); /* SDM 11.12.10.2 */
}

void lapic_reset(struct lapic *apic)
{
    lapic_timer_stop(apic);
    uint32_t id = lapic_reg(apic, REG_ID);
    memset(apic->regs, 0, sizeof apic->regs);
    lapic_put(apic, REG_ID, id);
    lapic_put(apic, REG_VERSION, APIC_VERSION);
    lapic_put(apic, REG_DFR, 0xFFFFFFFF);
    lapic_put(apic, REG_SVR, 0xFF);
    for (unsigned i = 0; i < LVT_COUNT; i++)
        lapic_put(apic, lvt_table[i].offset, LVT_MASKED);
    if ((apic->base & APIC_BASE_BSP) && !apic->bus->lint0_stays_masked) /* KVM_X86_QUIRK_LINT0_REENABLED: firmware finds virtual wire mode ready */
        lapic_put(apic, REG_LVT_LINT0, APIC_EXTINT << LVT_MODE_SHIFT);
    if (lapic_x2(apic))
        set_x2_ids(apic);
    apic->esr_pending = 0;
    lapic_update(apic);
}

void lapic_init(struct lapic *apic, struct apic_bus *bus, unsigned cpu, bool bsp)
{
    memset(apic, 0, sizeof *apic);
    apic->bus = bus;
    apic->cpu = cpu;
    apic->base = APIC_DEFAULT_BASE | APIC_BASE_ENABLE | (bsp ? APIC_BASE_BSP : 0);
    lapic_put(apic, REG_ID, cpu << 24);
    lapic_timer_init(apic);
    bus->cpu[cpu] = apic;
    if (cpu >= bus->count)
        bus->count = cpu + 1;
    lapic_reset(apic);
}

void lapic_free(struct lapic *apic)
{
    timer_remove(apic->bus->timers, &apic->timer);
    apic->bus->cpu[apic->cpu] = NULL;
}

bool lapic_set_base(struct lapic *apic, uint64_t base, bool host, uint64_t reserved)
{
    const uint64_t modes = APIC_BASE_ENABLE | APIC_BASE_X2APIC;
    uint64_t from = apic->base & modes, to = base & modes;
    if ((base & reserved) || to == APIC_BASE_X2APIC)
        return false;
    if (!host && from != to) { /* SDM vol. 3A, figure 11-27 */
        if (to == modes && from == 0)
            return false;
        if (from == modes && to == APIC_BASE_ENABLE)
            return false;
    }
    apic->base = base;
    if (from != to) {
        if (to == modes)
            set_x2_ids(apic);
        else if (from == modes)
            lapic_put(apic, REG_ID, apic->cpu << 24);
        else if (!from) /* disabling has lost what the guest made of the id */
            lapic_put(apic, REG_ID, apic->cpu << 24);
        if (!to) /* disabling loses all state (SDM 11.4.3); KVM keeps it in sync with a reset */
            lapic_reset(apic);
    }
    lapic_update(apic);
    return true;
}

void lapic_get_state(struct lapic *apic, struct kvm_lapic_state *state)
{
    lapic_put(apic, REG_TMCCT, lapic_timer_count(apic));
    lapic_put(apic, REG_PPR, lapic_ppr(apic));
    memcpy(state->regs, apic->regs, sizeof state->regs);
    if (lapic_x2(apic) && !apic->bus->ids_32bit) { /* the old format has the id where xAPIC has it */
        uint32_t id = lapic_reg(apic, REG_ID) << 24;
        memcpy(state->regs + REG_ID, &id, sizeof id);
    }
}

bool lapic_set_state(struct lapic *apic, const struct kvm_lapic_state *state)
{
    uint32_t id;
    memcpy(&id, state->regs + REG_ID, sizeof id);
    if (lapic_x2(apic)) {
        if (!apic->bus->ids_32bit)
            id >>= 24;
        if (id != apic->cpu)
            return false; /* in x2APIC mode the id is read only */
    }
    lapic_timer_stop(apic);
    memcpy(apic->regs, state->regs, sizeof apic->regs);
    lapic_put(apic, REG_ID, id);
    lapic_put(apic, REG_VERSION, APIC_VERSION);
    for (unsigned i = 0; i < LVT_COUNT; i++)
        lapic_put(apic, lvt_table[i].offset, lapic_reg(apic, lvt_table[i].offset) & lvt_table[i].writable);
    lapic_put(apic, REG_SVR, lapic_reg(apic, REG_SVR) & 0x3FF);
    lapic_put(apic, REG_TDCR, lapic_reg(apic, REG_TDCR) & 0xB);
    lapic_put(apic, REG_TPR, lapic_reg(apic, REG_TPR) & 0xFF);
    if (lapic_x2(apic))
        set_x2_ids(apic);
    uint32_t count = lapic_reg(apic, REG_TMCCT);
    if (count || (lapic_reg(apic, REG_LVT_TIMER) & LVT_TIMER_MODE) == LVT_PERIODIC)
        lapic_timer_start(apic, count);
    lapic_update(apic);
    return true;
}
