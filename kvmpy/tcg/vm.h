/* SPDX-License-Identifier: Apache-2.0
 *
 * A virtual machine of the software engine, and its vCPUs: the structures behind the handles, and who may touch what.
 *
 * Locks, in the order in which they are taken; none is held while a thread waits for a vCPU to stop, except
 * `slots_lock`, which no vCPU takes while it runs guest code:
 *
 *   vcpu.lock     one ioctl of a vCPU at a time (KVM_RUN too); protects everything in `struct vcpu` not listed below
 *   vm.lock       set-up: making vCPUs and chips, capabilities, the I/O table, irqfds, the MSR filter
 *   vm.slots_lock memory slots, dirty logs, dirty-ring reset
 *   vm.chips_lock PIC, IOAPIC, LAPICs, PIT, timers, GSI routing, and the pins of all of them
 *   coalesced.lock  writers of the coalesced ring (leaf)
 *
 * Read without a lock, by a vCPU thread inside cpu_run(): the slot table, the I/O table and the MSR filter. Whoever
 * replaces one publishes the new one, then waits in vm_quiesce() until every vCPU that was inside has come out
 * (`vcpu.epoch`), and only then frees the old one. So the readers pay nothing.
 *
 * Atomics: vcpu.epoch, vcpu.mp_state, vcpu.events, vcpu.sleeping, cpu.request, cpu.lines, dirty bitmaps.
 */
#ifndef KVMPY_TCG_VM_H
#define KVMPY_TCG_VM_H

#include "kvm_compat.h"

#include "cpu.h"

#include "clock.h"
#include "ioapic.h"
#include "lapic.h"
#include "pic.h"
#include "pit.h"
#include "stats.h"
#include "timer.h"

#define PAGE_SIZE 4096u
#define PAGE_SHIFT 12
#define MAX_SLOTS 32764u /* as many as KVM has on x86 */
#define MAX_GSI 4096u    /* KVM_MAX_IRQ_ROUTES */
#define RUN_PAGES 3u     /* kvm_run, PIO data, coalesced ring */
#define MAX_DIRTY_RING 65536u

/* Beyond the kernel's capabilities: time counted in instructions, RDRAND seeded by args[0]; one vCPU (time.c). */
#define KVMPY_CAP_TCG_DETERMINISTIC 0x6B760001
/* Of a vCPU: its next KVM_RUN is an emulation assist. It returns with KVM_EXIT_INTR after about args[0] instructions
 * (at least one, at most 2^31), or with KVM_EXIT_UNKNOWN before one that only the engine that is assisted can run. args[1],
 * once: XCR0 components of that engine's processor; those that this one lacks it carries as bytes from then on
 * (KVM_GET/SET_XSAVE, the XSAVE family), when they fit struct kvm_xsave. args[2] is of these bits:
 *   1  the guest has state that was not moved here, so the XSAVE family and XSETBV are left to the other engine
 *   2  this engine leads: the guest's processor is this one, with its CPUID, #UD, JIT and a TSC that is the host's plus
 *      args[3]; the other engine has the machine around it
 *   4  wrote() of the engine told of all writes to code since the last stretch */
#define KVMPY_CAP_TCG_ASSIST 0x6B760002

struct slot_table;
struct io_table;
struct msr_filter;
struct irqfds;
struct vcpu;

/* Where a GSI goes. */
struct gsi_route {
    uint32_t gsi, type; /* KVM_IRQ_ROUTING_IRQCHIP or _MSI */
    uint32_t chip, pin;
    uint64_t msi_address;
    uint32_t msi_data;
};

struct tcg_vm {
    struct tcg_vm_core core; /* first: the core knows the VM by it */
    _Atomic uint32_t references;

    pthread_mutex_t lock;
    struct vcpu *_Atomic vcpu[TCG_MAX_CPUS]; /* by id; made once, freed with the VM */
    uint32_t boot_cpu_id;
    uint32_t created;
    uint32_t tsc_khz;
    _Atomic uint64_t msr_exit_reasons; /* KVM_CAP_X86_USER_SPACE_MSR */
    _Atomic uint64_t hypercall_exits;  /* KVM_CAP_EXIT_HYPERCALL: numbers that go to user space */
    bool triple_fault_event, exception_payload;
    struct msr_filter *_Atomic msr_filter;
    struct io_table *_Atomic io;
    struct irqfds *irqfds;

    pthread_mutex_t slots_lock;
    struct slot_table *_Atomic slots;
    uint64_t manual_protect;    /* KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 flags */
    uint32_t ring_bytes;        /* dirty rings instead of bitmaps; 0: none */

    struct {
        pthread_mutex_t lock;
        int fd;                 /* memory of the page that every vCPU maps */
        struct kvm_coalesced_mmio_ring *ring;
    } coalesced;

    pthread_mutex_t chips_lock;
    struct clock clock;
    uint64_t wall_start;        /* deterministic mode: wall time at clock 0 */
    uint64_t skipped;           /* deterministic mode: time slept, on top of the instructions run */
    struct timers timers;
    struct apic_bus apics;
    bool has_pic, has_ioapic;   /* KVM_CREATE_IRQCHIP: both; split irqchip: neither, only LAPICs */
    bool has_lapics, has_pit;
    uint32_t split_pins;        /* split irqchip: routes below this are IOAPIC pins in user space */
    struct pic pic;
    struct ioapic ioapic;
    struct pit pit;
    struct gsi_route *routes;   /* sorted by gsi */
    uint32_t route_count;
    uint8_t pin_sources[KVM_NR_IRQCHIPS][KVM_IOAPIC_NUM_PINS]; /* which sources assert a pin, a bit each */
    uint8_t eoi_exits[32];      /* split irqchip: vectors whose EOI user space wants to know */

    struct ticker {             /* sleep.c: notices bare signals */
        pthread_t thread;
        _Atomic bool started, stopping, leading;
        _Atomic uint32_t parked;
    } ticker;
    struct vm_stats stats;
};

/* What other threads ask of a vCPU, beside the interrupt lines. */
enum {
    EVENT_INIT = 1 << 0,
    EVENT_SIPI = 1 << 1,
    EVENT_CLOCK = 1 << 2,     /* the kvm-clock page must be written anew */
    EVENT_EOI_EXIT = 1 << 3,  /* split irqchip: tell user space of vcpu.eoi_vector */
    EVENT_SET_TPR = 1 << 4,   /* no LAPIC: the guest lowered CR8 */
    EVENT_UNHALT = 1 << 5,    /* KVM_HC_KICK_CPU */
};

struct vcpu {
    struct cpu cpu;
    struct tcg_vm *vm;
    uint32_t id;
    pthread_mutex_t lock;
    _Atomic uint32_t epoch;     /* odd: inside cpu_run() */
    _Atomic uint32_t waiters;   /* somebody waits for epoch to change */

    int run_fd;                 /* memory behind kvm_run; pages 0 and 1, the dirty ring from page 64 on */
    struct kvm_run *run;
    uint32_t ring_entries;
    struct kvm_dirty_gfn *ring;
    uint32_t ring_head, ring_reset; /* next to fill (own thread), next to collect (slots_lock) */

    _Atomic uint32_t mp_state, events, sleeping;
    _Atomic uint32_t sipi_vector;
    int wake_fd;                /* eventfd: ends the sleep of a halted vCPU */
    bool has_sigmask;
    uint64_t sigmask;           /* KVM_SET_SIGNAL_MASK */
    bool pending_io;            /* kvm_run holds an access whose answer the next KVM_RUN takes */
    bool pending_hypercall;     /* likewise, its result for RAX */
    int extint_vector;          /* no PIC: KVM_INTERRUPT waiting to be taken; -1: none */
    uint8_t eoi_vector;
    uint64_t last_cr8;          /* no LAPIC: to see that it is lowered */
    bool triple_fault;          /* KVM_SET_VCPU_EVENTS */
    bool has_run;               /* CPUID is fixed from then on */
    bool guest_stopped;         /* KVM_KVMCLOCK_CTRL: the guest is to learn that it was paused */

    bool tpr_reporting, tpr_exit; /* vapic.c: accesses to the TPR leave; this one is being done */
    uint64_t vapic_address;     /* 0: none */
    struct lapic apic;          /* chips_lock; used when vm.has_lapics */
    bool has_apic;

    /* MSRs that only the machine knows (msr.c) */
    uint64_t tsc_offset; /* modulo 2^64: the guest chooses */
    bool host_tsc;       /* the TSC is the host's plus tsc_offset, as that of the kernel's KVM */
    uint64_t tsc_adjust;
    uint32_t tsc_khz;
    struct {
        uint64_t system_time, wall_clock;
        uint64_t mtrr_def_type, mtrr_fixed[11], mtrr_variable[16];
        uint64_t mcg_status, spec_ctrl;
        __u64 ucode_rev, arch_capabilities;
    } msr;
    uint32_t clock_version;
    struct vcpu_stats stats;
};

static inline struct vcpu *vcpu_of(struct cpu *c) { return (struct vcpu *)c->machine; }
static inline struct tcg_vm *vm_of_core(struct tcg_vm_core *core) { return (struct tcg_vm *)core; }

/* ---- vm.c ---- */
int vm_create(struct tcg_vm **out, unsigned long type);
void vm_get(struct tcg_vm *vm);
void vm_put(struct tcg_vm *vm);
long vm_ioctl(struct tcg_vm *vm, unsigned long request, uintptr_t arg);
/* Wait until every vCPU that is inside cpu_run() has been outside once; `flush` bits are requested of all first. */
void vm_quiesce(struct tcg_vm *vm, uint32_t requests);

/* ---- vm_caps.c ---- */
long check_extension(struct tcg_vm *vm, unsigned long capability); /* vm may be NULL: /dev/kvm */
long vm_enable_cap(struct tcg_vm *vm, const struct kvm_enable_cap *cap);

/* ---- memory.c, dirty.c ---- */
struct slot {
    uint32_t id, flags;
    uint64_t gpa, pages;
    uint8_t *host;
    _Atomic uint64_t *code;    /* one word per page */
    _Atomic uint64_t *dirty;   /* one bit per page; NULL: not logged */
};
struct slot_table {
    uint32_t count;
    struct slot slot[];        /* by gpa */
};
int memory_init(struct tcg_vm *vm);
void memory_free(struct tcg_vm *vm);
long memory_set_region(struct tcg_vm *vm, const struct kvm_userspace_memory_region *region);
long memory_get_dirty_log(struct tcg_vm *vm, const struct kvm_dirty_log *log);
long memory_clear_dirty_log(struct tcg_vm *vm, const struct kvm_clear_dirty_log *log);
long memory_reset_rings(struct tcg_vm *vm);
/* Inside cpu_run(), or with slots_lock. */
struct slot *memory_find(struct slot_table *table, uint64_t gpa);
struct slot *memory_find_id(struct slot_table *table, uint32_t id);
/* The engine writes guest memory itself, on the vCPU's thread, inside an epoch. False: no writable memory there. */
/* A host thread wrote guest memory: vCPUs forget what they translated from there. */
void memory_host_wrote(struct tcg_vm *vm, uint64_t gpa, uint64_t size);
bool memory_write(struct vcpu *vcpu, uint64_t gpa, const void *data, size_t size);
bool memory_read(struct vcpu *vcpu, uint64_t gpa, void *data, size_t size);
void memory_mark_dirty(struct vcpu *vcpu, struct slot *slot, uint64_t page);
bool ring_soft_full(const struct vcpu *vcpu);

/* ---- irq.c: from a GSI to the chips; irqchip.c: the chips of this VM ---- */
enum { SOURCE_USER, SOURCE_PIT, SOURCE_RESAMPLE }; /* who asserts a line */
int irq_init_default_routes(struct tcg_vm *vm);
long irq_set_routing(struct tcg_vm *vm, const struct kvm_irq_routing *routing, const struct kvm_irq_routing_entry *entries);
/* chips_lock held. Returns as KVM_IRQ_LINE_STATUS. */
int irq_set(struct tcg_vm *vm, uint32_t gsi, unsigned source, bool level);
int irq_send_msi(struct tcg_vm *vm, uint64_t address, uint32_t data);
/* A chip pin's interrupt is done: whoever waits for that (PIT, resampling irqfds) hears it. */
void irq_notify_eoi(struct tcg_vm *vm, uint32_t chip, uint32_t pin);
long irq_signal_msi(struct tcg_vm *vm, const struct kvm_msi *msi);
long irq_line(struct tcg_vm *vm, uint32_t gsi, bool level, int *status);
long irq_create_chip(struct tcg_vm *vm);
long irq_create_split(struct tcg_vm *vm, uint32_t pins);
long irq_create_pit(struct tcg_vm *vm, const struct kvm_pit_config *config);
long irq_get_chip(struct tcg_vm *vm, struct kvm_irqchip *chip);
long irq_set_chip(struct tcg_vm *vm, const struct kvm_irqchip *chip);
void irq_init(struct tcg_vm *vm);
bool irq_pio(struct vcpu *vcpu, uint16_t port, unsigned size, bool write, uint32_t *value);
bool irq_mmio(struct vcpu *vcpu, uint64_t gpa, unsigned size, bool write, uint64_t *value);
long irq_get_pit(struct tcg_vm *vm, struct kvm_pit_state2 *state);
long irq_set_pit(struct tcg_vm *vm, const struct kvm_pit_state2 *state);
long irq_reinject(struct tcg_vm *vm, const struct kvm_reinject_control *control);

/* ---- irqfd.c ---- */
long irqfd_ioctl(struct tcg_vm *vm, const struct kvm_irqfd *request);
void irqfd_free(struct tcg_vm *vm);
void irqfd_eoi(struct tcg_vm *vm, uint32_t gsi); /* chips_lock held: the interrupt of a resampled GSI is done */

/* ---- ioeventfd.c: ioeventfds and coalesced zones, one table ---- */
long ioeventfd_ioctl(struct tcg_vm *vm, const struct kvm_ioeventfd *request);
long coalesced_zone(struct tcg_vm *vm, const struct kvm_coalesced_mmio_zone *zone, bool add);
/* A write of the guest; true: taken. On the vCPU's thread. */
bool io_write(struct tcg_vm *vm, bool pio, uint64_t addr, unsigned size, uint64_t value);
void io_free(struct tcg_vm *vm);

/* ---- vcpu.c ---- */
int vcpu_create(struct tcg_vm *vm, uint32_t id, struct vcpu **out);
void vcpu_destroy(struct vcpu *vcpu);
long vcpu_ioctl(struct vcpu *vcpu, unsigned long request, uintptr_t arg);
void *vcpu_map(struct vcpu *vcpu, size_t size, uint64_t offset);
void vcpu_wake(struct vcpu *vcpu);                 /* any thread: out of a HLT sleep, to look around */
void vcpu_post(struct vcpu *vcpu, uint32_t event); /* any thread: sets an event, stops cpu_run(), wakes */

/* ---- vcpu_state.c, vcpu_sregs.c, vcpu_events.c ---- */
void state_get_regs(struct vcpu *vcpu, struct kvm_regs *regs);
void state_set_regs(struct vcpu *vcpu, const struct kvm_regs *regs);
void state_get_sregs(struct vcpu *vcpu, struct kvm_sregs *sregs);
long state_set_sregs(struct vcpu *vcpu, const struct kvm_sregs *sregs);
void state_get_sregs2(struct vcpu *vcpu, struct kvm_sregs2 *sregs);
long state_set_sregs2(struct vcpu *vcpu, const struct kvm_sregs2 *sregs);
void state_get_fpu(struct vcpu *vcpu, struct kvm_fpu *fpu);
void state_set_fpu(struct vcpu *vcpu, const struct kvm_fpu *fpu);
void state_get_xsave(struct vcpu *vcpu, struct kvm_xsave *xsave);
long state_set_xsave(struct vcpu *vcpu, const struct kvm_xsave *xsave);
void state_get_xcrs(struct vcpu *vcpu, struct kvm_xcrs *xcrs);
long state_set_xcrs(struct vcpu *vcpu, const struct kvm_xcrs *xcrs);
void state_get_debugregs(struct vcpu *vcpu, struct kvm_debugregs *regs);
long state_set_debugregs(struct vcpu *vcpu, const struct kvm_debugregs *regs);
void state_get_events(struct vcpu *vcpu, struct kvm_vcpu_events *events);
long state_set_events(struct vcpu *vcpu, const struct kvm_vcpu_events *events);
long state_set_guest_debug(struct vcpu *vcpu, const struct kvm_guest_debug *debug);

/* ---- cpuid_ioctl.c ---- */
long cpuid_get_supported(uintptr_t user);
long cpuid_set(struct vcpu *vcpu, uintptr_t user);
long cpuid_set_old(struct vcpu *vcpu, uintptr_t user);
long cpuid_get(struct vcpu *vcpu, uintptr_t user);

/* ---- msr.c, msr_ioctl.c, kvmclock.c ---- */
bool msr_feature(uint32_t index, __u64 *value); /* an MSR that tells what the processor is, for KVM_GET_MSRS of the system handle */
int msr_read(struct vcpu *vcpu, uint32_t index, uint64_t *value, bool host);  /* 0, or 1: no such MSR */
int msr_write(struct vcpu *vcpu, uint32_t index, uint64_t value, bool host);  /* 0, 1: #GP, -1: no such MSR */
long msr_list(uintptr_t user, bool features);
long msr_get_many(struct vcpu *vcpu, uintptr_t user);
long msr_set_many(struct vcpu *vcpu, uintptr_t user);
long msr_get_features(uintptr_t user);
void msr_reset(struct vcpu *vcpu);
long msr_set_filter(struct tcg_vm *vm, uintptr_t user);
void msr_filter_free(struct tcg_vm *vm);
bool msr_allowed(struct tcg_vm *vm, uint32_t index, bool write);
uint64_t vcpu_tsc(struct vcpu *vcpu);
uint64_t vcpu_tsc_to_clock(struct vcpu *vcpu, uint64_t tsc); /* when the guest's TSC has this value */
bool kvmclock_write_msr(struct vcpu *vcpu, bool system_time, uint64_t value); /* inside an epoch; false: #GP */
void kvmclock_update(struct vcpu *vcpu);                                   /* EVENT_CLOCK, inside an epoch */
void kvmclock_refresh(struct tcg_vm *vm);                                  /* any thread */
long kvmclock_get(struct tcg_vm *vm, struct kvm_clock_data *data);
long kvmclock_set(struct tcg_vm *vm, const struct kvm_clock_data *data);

/* ---- run.c: KVM_RUN; exit.c: kvm_run's contents ---- */
long run_vcpu(struct vcpu *vcpu);
uint32_t run_mp_state(struct vcpu *vcpu); /* as KVM_GET_MP_STATE tells it: INIT and SIPI taken in */
void run_enter_epoch(struct vcpu *vcpu);
void run_leave_epoch(struct vcpu *vcpu);
void exit_io(struct vcpu *vcpu);          /* cpu.io -> kvm_run */
void exit_complete(struct vcpu *vcpu);    /* the answer in kvm_run -> cpu.io */
void exit_hypercall(struct vcpu *vcpu);
void exit_debug(struct vcpu *vcpu);
void exit_error(struct vcpu *vcpu);
long exit_load(struct vcpu *vcpu);        /* the inputs of kvm_run, before the guest runs; 0 or -EINVAL */
void exit_save(struct vcpu *vcpu);        /* the outputs that every exit has */

/* ---- time.c: deterministic mode ---- */
void time_sync(struct vcpu *vcpu);        /* bring the clock up to the instruction being run */
void time_plan(struct vcpu *vcpu);        /* before cpu_run(): when it must come back */
bool time_skip(struct vcpu *vcpu);        /* the only vCPU sleeps: go to the next timer; false: there is none */
long time_make_deterministic(struct tcg_vm *vm, uint64_t seed);

/* ---- vapic.c ---- */
bool vapic_reports(const struct vcpu *vcpu, uint64_t gpa);
bool vapic_exit(struct vcpu *vcpu);
long vapic_set_reporting(struct vcpu *vcpu, struct kvm_tpr_access_ctl *control);
long vapic_set_address(struct vcpu *vcpu, const struct kvm_vapic_addr *address);
void vapic_load(struct vcpu *vcpu);
void vapic_store(struct vcpu *vcpu);

/* ---- sleep.c: HLT and waiting for SIPI; signals ---- */
struct signals { uint64_t outside, inside; }; /* masks as the kernel has them: outside KVM_RUN, and what may not interrupt it */
void signals_block(struct vcpu *vcpu, struct signals *signals);
void signals_restore(const struct signals *signals);
bool signals_pending(const struct signals *signals);
bool sleep_until_woken(struct vcpu *vcpu, const struct signals *signals, bool (*awake)(struct vcpu *)); /* false: a signal */
void ticker_stop(struct tcg_vm *vm);
void ticker_start(struct tcg_vm *vm);
void ticker_unpark(struct tcg_vm *vm);

#endif
