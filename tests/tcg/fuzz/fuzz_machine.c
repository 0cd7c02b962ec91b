/* SPDX-License-Identifier: Apache-2.0
 *
 * Fuzz target: the software engine through its door (engine.h), as a hostile or confused program uses it. An input is a
 * sequence of requests with their structures; guest code from the input runs between them and is kicked after a
 * millisecond. Each structure stands in memory of exactly its size, so the sanitizers see every byte too far.
 *
 * Pointers are the one thing that a request may not choose: like any library the engine uses those that it is given.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include "engine.h"
#include "kvm_compat.h"

extern const struct kvmpy_engine kvmpy_tcg_engine;
#define ENGINE (&kvmpy_tcg_engine)

enum { RAM_PAGES = 64, VCPUS = 3, EVENTS = 4, REQUESTS = 48, RUN_BYTES = 3 * 4096, KICK_US = 300, HANG_S = 10 };

/* ---- the input ---- */

static const uint8_t *input, *input_end;

static bool more(void) { return input < input_end; }
static uint8_t byte(void) { return more() ? *input++ : 0; }
static uint64_t number(unsigned bytes)
{
    uint64_t v = 0;
    for (unsigned i = 0; i < bytes; i++)
        v |= (uint64_t)byte() << 8 * i;
    return v;
}
static void fill(void *buffer, size_t size)
{
    size_t n = (size_t)(input_end - input) < size ? (size_t)(input_end - input) : size;
    memcpy(buffer, input, n);
    memset((uint8_t *)buffer + n, 0, size - n);
    input += n;
}
/* Addresses that mean something, now and then any. */
static uint64_t address(void)
{
    static const uint64_t known[] = {0, 0x1000, 0xa0000, 0xfec00000, 0xfee00000, 0xfee000b0, 0xfffff000, 1ull << 32, 1ull << 45,
                                     (1ull << 52) - 0x1000, 1ull << 52, ~0xfffull, 0x5000, 0x10000, 0x3f000};
    uint8_t kind = byte();
    if (kind < sizeof known / sizeof known[0] * 8)
        return known[kind / 8] + (kind & 7 ? number(1) << 4 * (kind & 3) : 0);
    return number(8);
}

/* ---- the machine ---- */

static struct {
    int system, vm, vcpu[VCPUS], stats;
    struct kvm_run *run[VCPUS];
    uint8_t *ram;
    int events[EVENTS];
    uint64_t slot_pages[8];
} m;

static long call(int handle, unsigned long request, void *arg) { return ENGINE->ioctl(handle, request, (uintptr_t)arg); }

/* ---- kicking ---- */

static sem_t armed, disarmed;
static pthread_t runner;
static struct kvm_run *_Atomic running;

static void *kicker(void *unused)
{
    (void)unused;
    for (;;) {
        while (sem_wait(&armed))
            ;
        usleep(KICK_US);
        for (unsigned n = 0; atomic_load(&running); n++) {
            struct kvm_run *run = atomic_load(&running);
            if (!run)
                break;
            run->immediate_exit = 1;
            pthread_kill(runner, SIGUSR1);
            usleep(KICK_US);
            if (n > HANG_S * 1000000u / KICK_US) {
                fprintf(stderr, "kicked for %d seconds, still in KVM_RUN\n", HANG_S);
                abort();
            }
        }
        sem_post(&disarmed);
    }
    return NULL;
}

static void nothing(int signal) { (void)signal; }

static void run_vcpu(unsigned i)
{
    if (m.vcpu[i] < 0)
        return;
    m.run[i]->immediate_exit = 0;
    atomic_store(&running, m.run[i]);
    sem_post(&armed);
    long result = ENGINE->ioctl(m.vcpu[i], KVM_RUN, 0);
    atomic_store(&running, NULL);
    while (sem_wait(&disarmed))
        ;
    if (result && result != -EINTR && result != -EINVAL && result != -EAGAIN) {
        fprintf(stderr, "KVM_RUN returned %ld\n", result);
        abort();
    }
    if (!result && m.run[i]->exit_reason > KVM_EXIT_NOTIFY + 8) {
        fprintf(stderr, "exit reason %u\n", m.run[i]->exit_reason);
        abort();
    }
}

/* ---- requests ---- */

enum target { SYSTEM, VM, VCPU };
/* Structures without pointers: `get` fills one, `set` takes one; either may be 0. */
static const struct plain {
    enum target target;
    unsigned long get, set;
    uint32_t size;
} plain[] = {
    {VCPU, KVM_GET_REGS, KVM_SET_REGS, sizeof(struct kvm_regs)},
    {VCPU, KVM_GET_SREGS, KVM_SET_SREGS, sizeof(struct kvm_sregs)},
    {VCPU, KVM_GET_SREGS2, KVM_SET_SREGS2, sizeof(struct kvm_sregs2)},
    {VCPU, KVM_GET_FPU, KVM_SET_FPU, sizeof(struct kvm_fpu)},
    {VCPU, KVM_GET_XSAVE, KVM_SET_XSAVE, sizeof(struct kvm_xsave)},
    {VCPU, KVM_GET_XCRS, KVM_SET_XCRS, sizeof(struct kvm_xcrs)},
    {VCPU, KVM_GET_DEBUGREGS, KVM_SET_DEBUGREGS, sizeof(struct kvm_debugregs)},
    {VCPU, KVM_GET_VCPU_EVENTS, KVM_SET_VCPU_EVENTS, sizeof(struct kvm_vcpu_events)},
    {VCPU, KVM_GET_LAPIC, KVM_SET_LAPIC, sizeof(struct kvm_lapic_state)},
    {VCPU, KVM_GET_MP_STATE, KVM_SET_MP_STATE, sizeof(struct kvm_mp_state)},
    {VCPU, 0, KVM_SET_GUEST_DEBUG, sizeof(struct kvm_guest_debug)},
    {VCPU, 0, KVM_INTERRUPT, sizeof(struct kvm_interrupt)},
    {VCPU, 0, KVM_TRANSLATE, sizeof(struct kvm_translation)},
    {VCPU, 0, KVM_TPR_ACCESS_REPORTING, sizeof(struct kvm_tpr_access_ctl)},
    {VCPU, 0, KVM_SET_VAPIC_ADDR, sizeof(struct kvm_vapic_addr)},
    {VCPU, 0, KVM_ENABLE_CAP, sizeof(struct kvm_enable_cap)},
    {VM, KVM_GET_IRQCHIP, KVM_SET_IRQCHIP, sizeof(struct kvm_irqchip)},
    {VM, KVM_GET_PIT2, KVM_SET_PIT2, sizeof(struct kvm_pit_state2)},
    {VM, KVM_GET_PIT, KVM_SET_PIT, sizeof(struct kvm_pit_state)},
    {VM, KVM_GET_CLOCK, KVM_SET_CLOCK, sizeof(struct kvm_clock_data)},
    {VM, 0, KVM_IRQ_LINE_STATUS, sizeof(struct kvm_irq_level)},
    {VM, 0, KVM_SIGNAL_MSI, sizeof(struct kvm_msi)},
    {VM, 0, KVM_REINJECT_CONTROL, sizeof(struct kvm_reinject_control)},
    {VM, 0, KVM_ENABLE_CAP, sizeof(struct kvm_enable_cap)},
    {VM, 0, KVM_CREATE_PIT2, sizeof(struct kvm_pit_config)},
    {VM, 0, KVM_REGISTER_COALESCED_MMIO, sizeof(struct kvm_coalesced_mmio_zone)},
    {VM, 0, KVM_UNREGISTER_COALESCED_MMIO, sizeof(struct kvm_coalesced_mmio_zone)},
};

static int handle_of(enum target target, unsigned i) { return target == SYSTEM ? m.system : target == VM ? m.vm : m.vcpu[i]; }

/* GET, change a few bytes, SET: what passes most checks and still is nothing a processor was ever in. */
static void structure(unsigned i, bool raw)
{
    const struct plain *p = &plain[byte() % (sizeof plain / sizeof plain[0])];
    uint8_t *data = calloc(1, p->size);
    if (!raw && p->get) {
        if (p->get == KVM_GET_IRQCHIP)
            ((struct kvm_irqchip *)data)->chip_id = byte() % 4;
        call(handle_of(p->target, i), p->get, data);
        for (unsigned n = byte() & 7; n; n--) {
            uint32_t at = number(2) % p->size;
            uint8_t how = byte();
            data[at] = how & 1 ? byte() : data[at] ^ 1 << (how >> 5);
        }
    } else {
        fill(data, p->size);
    }
    if (p->set)
        call(handle_of(p->target, i), p->set, data);
    free(data);
}

static void memory(void)
{
    struct kvm_userspace_memory_region r = {.slot = byte() & 7, .flags = byte() & (byte() & 3 ? 3 : 0xff)};
    unsigned first = byte() % RAM_PAGES, pages = byte() % (RAM_PAGES - first + 1);
    r.guest_phys_addr = address();
    if (byte() & 7)
        r.guest_phys_addr &= ~0xfffull;
    r.memory_size = pages * 4096ull;
    r.userspace_addr = (uintptr_t)m.ram + first * 4096ull;
    if (!call(m.vm, KVM_SET_USER_MEMORY_REGION, &r))
        m.slot_pages[r.slot] = pages;
}

static void dirty(void)
{
    unsigned slot = byte() & 7;
    uint64_t pages = m.slot_pages[slot];
    void *bitmap = calloc(1, (pages + 63) / 64 * 8);
    if (byte() & 1) {
        struct kvm_dirty_log log = {.slot = slot, .dirty_bitmap = bitmap};
        call(m.vm, KVM_GET_DIRTY_LOG, &log);
    } else {
        struct kvm_clear_dirty_log log = {.slot = slot, .dirty_bitmap = bitmap, .first_page = byte() & 0xc0, .num_pages = byte()};
        fill(bitmap, (pages + 63) / 64 * 8);
        if (log.num_pages <= pages)
            call(m.vm, KVM_CLEAR_DIRTY_LOG, &log);
    }
    free(bitmap);
    call(m.vm, KVM_RESET_DIRTY_RINGS, NULL);
}

static void msrs(unsigned i)
{
    static const uint32_t known[] = {0x10, 0x1b, 0x3a, 0x3b, 0x6e0, 0x174, 0x277, 0x2ff, 0x200, 0x250, 0x4b564d00, 0x4b564d01, 0x11, 0x12,
                                     0xc0000080, 0xc0000081, 0xc0000100, 0xc0000103, 0x800, 0x830, 0x832, 0x838, 0x83f, 0x1a0, 0x1d9, 0x48};
    unsigned count = 1 + byte() % 4;
    size_t size = sizeof(struct kvm_msrs) + count * sizeof(struct kvm_msr_entry);
    struct kvm_msrs *list = calloc(1, size);
    list->nmsrs = count;
    for (unsigned n = 0; n < count; n++) {
        uint8_t kind = byte();
        list->entries[n].index = kind < 0xe0 ? known[kind % (sizeof known / sizeof known[0])] : number(4);
        list->entries[n].data = address();
    }
    call(m.vcpu[i], byte() & 3 ? KVM_SET_MSRS : KVM_GET_MSRS, list);
    free(list);
}

static void cpuid(unsigned i)
{
    unsigned room = byte() & 1 ? 256 : byte();
    struct kvm_cpuid2 *list = calloc(1, sizeof *list + room * sizeof(struct kvm_cpuid_entry2));
    list->nent = room;
    if (!call(m.system, KVM_GET_SUPPORTED_CPUID, list) && list->nent) {
        for (unsigned n = byte() & 7; n; n--)
            ((uint8_t *)list->entries)[number(2) % (list->nent * sizeof list->entries[0])] ^= byte();
        call(m.vcpu[i], KVM_SET_CPUID2, list);
        list->nent = room;
        call(m.vcpu[i], KVM_GET_CPUID2, list);
    }
    free(list);
}

static void routing(void)
{
    unsigned count = byte() % 6;
    struct kvm_irq_routing *list = calloc(1, sizeof *list + count * sizeof(struct kvm_irq_routing_entry));
    list->nr = count;
    list->flags = byte() == 0xff;
    for (unsigned n = 0; n < count; n++) {
        fill(&list->entries[n], 12);
        fill(&list->entries[n].u, 16);
        list->entries[n].gsi %= 4200;
        list->entries[n].type = byte() & 3 ? list->entries[n].type & 3 : list->entries[n].type;
    }
    call(m.vm, KVM_SET_GSI_ROUTING, list);
    free(list);
}

static void events(void)
{
    uint8_t kind = byte();
    if (kind & 1) {
        struct kvm_irqfd fd = {.fd = m.events[byte() % EVENTS], .gsi = byte() % 40, .flags = byte() & 3, .resamplefd = m.events[byte() % EVENTS]};
        call(m.vm, KVM_IRQFD, &fd);
    } else {
        struct kvm_ioeventfd fd = {.datamatch = number(2), .addr = address(), .len = byte() % 10, .fd = m.events[byte() % EVENTS], .flags = byte() & 7};
        call(m.vm, KVM_IOEVENTFD, &fd);
    }
    if (kind & 2)
        eventfd_write(m.events[kind >> 2 & 3], 1);
}

static void msr_filter(void)
{
    struct kvm_msr_filter filter = {.flags = byte() & 1};
    uint8_t *bitmaps[KVM_MSR_FILTER_MAX_RANGES] = {NULL};
    unsigned count = byte() % 5;
    for (unsigned n = 0; n < count; n++) {
        uint32_t nmsrs = byte();
        bitmaps[n] = calloc(1, (nmsrs + 7) / 8 + 1);
        fill(bitmaps[n], (nmsrs + 7) / 8);
        filter.ranges[n] = (struct kvm_msr_filter_range){.flags = byte() & 3, .nmsrs = nmsrs, .base = number(4), .bitmap = bitmaps[n]};
    }
    call(m.vm, KVM_X86_SET_MSR_FILTER, &filter);
    for (unsigned n = 0; n < count; n++)
        free(bitmaps[n]);
}

static void small_things(unsigned i)
{
    uint8_t kind = byte();
    char text[300];
    switch (kind & 15) {
    case 0: call(m.vm, KVM_CREATE_IRQCHIP, NULL); break;
    case 1: ENGINE->ioctl(m.vcpu[i], KVM_NMI, 0); break;
    case 2: ENGINE->ioctl(m.vcpu[i], KVM_SET_TSC_KHZ, number(4)); break;
    case 3: ENGINE->ioctl(m.vcpu[i], KVM_KVMCLOCK_CTRL, 0); break;
    case 4: ENGINE->pread(m.stats, text, byte(), number(2)); break;
    case 5: ENGINE->wrote(m.vm, address(), number(3)); break;
    case 6: ENGINE->ioctl(m.vm, KVM_SET_BOOT_CPU_ID, byte()); break;
    case 7: ENGINE->ioctl(m.vm, KVM_CHECK_EXTENSION, number(2)); break;
    case 8: ENGINE->ioctl(m.vcpu[i], number(2) | KVMIO << 8, 0); break;
    case 9: {
        size_t size = number(2);
        void *at = ENGINE->map(m.vcpu[i], size, number(3));
        if ((intptr_t)at > 0 || (intptr_t)at < -4095)
            ENGINE->unmap(at, (size + 4095) & ~(size_t)4095);
        break;
    }
    case 10: { /* kvm_run is user space's: anything may stand there */
        uint32_t at = number(2) % 2304;
        fill((uint8_t *)m.run[i] + at, byte() & 15);
        break;
    }
    case 11: m.ram[number(2) % (RAM_PAGES * 4096u)] = byte(); break;
    case 12: fill(m.ram + number(3) % (RAM_PAGES * 4096u - 64), byte() & 63); break;
    case 13: ENGINE->ioctl(m.vm, KVM_SET_TSS_ADDR, address()); break;
    case 14: eventfd_write(m.events[kind >> 4 & 3], 1); break;
    default: {
        struct kvm_mp_state runnable = {KVM_MP_STATE_RUNNABLE};
        call(m.vcpu[i], KVM_SET_MP_STATE, &runnable);
    }
    }
}

/* ---- one input ---- */

static void add_vcpu(unsigned i, unsigned id)
{
    if (m.vcpu[i] >= 0)
        return;
    m.vcpu[i] = (int)ENGINE->ioctl(m.vm, KVM_CREATE_VCPU, id);
    if (m.vcpu[i] < 0)
        return;
    m.run[i] = ENGINE->map(m.vcpu[i], RUN_BYTES, 0);
    if ((intptr_t)m.run[i] < 0 && (intptr_t)m.run[i] > -4096)
        abort();
}

static void make_machine(void)
{
    m.system = ENGINE->open(NULL);
    m.vm = (int)ENGINE->ioctl(m.system, KVM_CREATE_VM, 0);
    if (m.vm < 0)
        abort();
    memset(m.slot_pages, 0, sizeof m.slot_pages);
    memset(m.ram, 0, RAM_PAGES * 4096ul);
    for (unsigned i = 0; i < VCPUS; i++)
        m.vcpu[i] = -1;
    uint8_t kind = byte();
    if (kind & 4) {
        struct kvm_enable_cap cap = {.cap = kind & 8 ? KVM_CAP_DIRTY_LOG_RING : KVM_CAP_SPLIT_IRQCHIP, .args = {kind & 8 ? 4096 : 24}};
        call(m.vm, KVM_ENABLE_CAP, &cap);
    }
    if (kind & 1)
        call(m.vm, KVM_CREATE_IRQCHIP, NULL);
    if (kind & 2) {
        struct kvm_pit_config pit = {0};
        call(m.vm, KVM_CREATE_PIT2, &pit);
    }
    struct kvm_userspace_memory_region all = {
        .slot = 0, .flags = kind >> 4 & KVM_MEM_LOG_DIRTY_PAGES, .memory_size = RAM_PAGES * 4096ull, .userspace_addr = (uintptr_t)m.ram,
    };
    if (kind & 64 && !call(m.vm, KVM_SET_USER_MEMORY_REGION, &all))
        m.slot_pages[0] = RAM_PAGES;
    add_vcpu(0, kind >> 7);
    m.stats = (int)ENGINE->ioctl(kind & 32 && m.vcpu[0] >= 0 ? m.vcpu[0] : m.vm, KVM_GET_STATS_FD, 0);
    /* Code at 0x5000 in flat real mode. */
    fill(m.ram + 0x5000, byte() & 31);
    struct kvm_sregs sregs;
    struct kvm_regs regs;
    if (m.vcpu[0] >= 0 && !call(m.vcpu[0], KVM_GET_SREGS, &sregs) && !call(m.vcpu[0], KVM_GET_REGS, &regs)) {
        sregs.cs.base = sregs.cs.selector = 0;
        call(m.vcpu[0], KVM_SET_SREGS, &sregs);
        regs.rip = 0x5000;
        regs.rsp = 0x8000;
        call(m.vcpu[0], KVM_SET_REGS, &regs);
    }
}

static void free_machine(void)
{
    if (m.stats >= 0)
        ENGINE->close(m.stats);
    for (unsigned i = 0; i < VCPUS; i++)
        if (m.vcpu[i] >= 0) {
            ENGINE->unmap(m.run[i], RUN_BYTES);
            ENGINE->close(m.vcpu[i]);
        }
    ENGINE->close(m.vm);
    ENGINE->close(m.system);
    uint64_t drained;
    for (unsigned i = 0; i < EVENTS; i++)
        eventfd_read(m.events[i], &drained);
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    (void)argc, (void)argv;
    m.ram = mmap(NULL, RAM_PAGES * 4096ul, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (unsigned i = 0; i < EVENTS; i++)
        m.events[i] = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
    runner = pthread_self();
    struct sigaction action = {.sa_handler = nothing};
    sigaction(SIGUSR1, &action, NULL);
    sem_init(&armed, 0, 0);
    sem_init(&disarmed, 0, 0);
    pthread_t thread;
    return m.ram == MAP_FAILED || pthread_create(&thread, NULL, kicker, NULL);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    input = data;
    input_end = data + size;
    make_machine();
    for (unsigned n = 0; more() && n < REQUESTS; n++) {
        uint8_t op = byte();
        unsigned i = op >> 6 & 1;
        if (m.vcpu[i] < 0)
            i = 0;
        if (m.vcpu[i] < 0)
            break;
        switch (op & 15) {
        case 0: case 1: case 2: structure(i, false); break;
        case 3: structure(i, true); break;
        case 4: memory(); break;
        case 5: dirty(); break;
        case 6: msrs(i); break;
        case 7: cpuid(i); break;
        case 8: routing(); break;
        case 9: events(); break;
        case 10: msr_filter(); break;
        case 11: add_vcpu(1 + (op >> 7), op >> 4 & 3); break;
        case 12: small_things(i); break;
        default: run_vcpu(i); break;
        }
    }
    free_machine();
    return 0;
}
