/* SPDX-License-Identifier: Apache-2.0
 *
 * Several threads at once (run under ThreadSanitizer): slots and dirty logs that change under running vCPUs, kicks,
 * signals, IPIs, timers.
 */
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include "machine.h"

static void lapics(int vm)
{
    CHECK_EQ(call_int(vm, KVM_CREATE_IRQCHIP, 0), 0);
}

static void on_signal(int number) { (void)number; }

static void nap(long ns) { nanosleep(&(struct timespec){.tv_nsec = ns}, NULL); }

struct runner {
    pthread_t thread;
    int vcpu;
    struct kvm_run *run;
    _Atomic bool stop;
    _Atomic int tid;
    long result;
    _Atomic unsigned mmio;
};

/* Runs until `stop`; answers MMIO reads with 0. */
static void *runner_thread(void *opaque)
{
    struct runner *r = opaque;
    r->tid = syscall(SYS_gettid);
    while (!r->stop) {
        r->result = run(r->vcpu);
        if (r->result == 0 && r->run->exit_reason == KVM_EXIT_MMIO) {
            memset(r->run->mmio.data, 0, 8);
            r->mmio++;
        } else if (r->result != -EINTR) {
            break;
        }
    }
    return NULL;
}

static void start(struct runner *r, int vcpu, struct kvm_run *run_area)
{
    memset(r, 0, sizeof *r);
    r->vcpu = vcpu;
    r->run = run_area;
    CHECK_EQ(pthread_create(&r->thread, NULL, runner_thread, r), 0);
}

static void stop(struct runner *r)
{
    r->stop = true;
    __atomic_store_n(&r->run->immediate_exit, 1, __ATOMIC_SEQ_CST);
    while (!r->tid)
        nap(100000);
    syscall(SYS_tgkill, getpid(), r->tid, SIGUSR1); /* immediate_exit alone does not end a HLT, with KVM neither */
    pthread_join(r->thread, NULL);
    r->run->immediate_exit = 0;
}

/* A vCPU that stores to a slot for ever, while the slot comes and goes and its memory is unmapped each time. */
static void test_slots_change_under_a_running_vcpu(void)
{
    struct machine m = machine_new(NULL);
    LOAD(&m, 0, {TOY_STORE, 8, .value = 0x100000}, {TOY_LOAD, 8, .value = 0x101000}, {TOY_JUMP, .value = 0});
    struct runner r;
    start(&r, m.vcpu, m.run);
    for (unsigned i = 0; i < 200 || !r.mmio; i++) {
        void *memory = mmap(NULL, 0x2000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
        CHECK_EQ(set_slot(m.vm, 1, 0x100000, 0x2000, memory, 0), 0);
        CHECK_EQ(set_slot(m.vm, 1, 0x100000, 0x2000, memory, KVM_MEM_LOG_DIRTY_PAGES), 0);
        CHECK_EQ(set_slot(m.vm, 1, 0x100000, 0, memory, 0), 0);
        munmap(memory, 0x2000); /* a vCPU that still knew it would crash */
    }
    stop(&r);
    machine_free(&m);
}

/* Every value stored before the log is taken is in a page that the log names (or was named before). */
static void test_dirty_log_misses_nothing(void)
{
    struct machine m = machine_new(NULL);
    volatile uint64_t *counter = (volatile uint64_t *)(m.ram + 0x20000);
    CHECK_EQ(set_slot(m.vm, 0, 0, RAM_SIZE, m.ram, KVM_MEM_LOG_DIRTY_PAGES), 0);
    LOAD(&m, 0, {TOY_ADD, .value = 1}, {TOY_STORE, 8, .value = 0x20000}, {TOY_JUMP, .value = 0});
    struct runner r;
    start(&r, m.vcpu, m.run);
    uint64_t bits[1], copy = 0;
    struct kvm_dirty_log log = {.slot = 0, .dirty_bitmap = bits};
    for (unsigned i = 0; i < 500 || !copy; i++) {
        CHECK_EQ(call(m.vm, KVM_GET_DIRTY_LOG, &log), 0);
        if (bits[0] & (1ull << 0x20))
            copy = __atomic_load_n(counter, __ATOMIC_RELAXED);
    }
    stop(&r);
    CHECK_EQ(call(m.vm, KVM_GET_DIRTY_LOG, &log), 0);
    if (bits[0] & (1ull << 0x20))
        copy = *counter;
    CHECK_EQ(copy, *counter);
    machine_free(&m);
}

/* A signal alone, without immediate_exit: out of a loop, and out of HLT. */
struct one_run { int vcpu; long result; _Atomic int tid; };
static void *one_run(void *opaque)
{
    struct one_run *o = opaque;
    o->tid = syscall(SYS_gettid);
    o->result = run(o->vcpu);
    return NULL;
}

static void test_bare_signal(bool halted)
{
    struct machine m = machine_new(lapics);
    LOAD(&m, 0, {TOY_JUMP, .value = halted ? 16 : 0}, {TOY_HLT});
    struct one_run o = {.vcpu = m.vcpu};
    pthread_t thread;
    CHECK_EQ(pthread_create(&thread, NULL, one_run, &o), 0);
    while (!o.tid)
        nap(100000);
    nap(30000000); /* well inside by now */
    syscall(SYS_tgkill, getpid(), o.tid, SIGUSR1);
    pthread_join(thread, NULL);
    CHECK_EQ(o.result, -EINTR);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_INTR);
    machine_free(&m);
}

/* INIT and SIPI start the second vCPU; then both send each other interrupts through HLT, many times: none is lost. */
static void test_ipi_ping_pong(void)
{
    enum { ROUNDS = 2000 };
    struct machine m = machine_new(lapics);
    struct kvm_run *other_run;
    int other = add_vcpu(&m, 1, 0, &other_run);
    uint64_t icr = 0xFEE00300, icr2 = 0xFEE00310, eoi = 0xFEE000B0, svr = 0xFEE000F0, handler = VECTORS + 0x50 * 16;
    LOAD(&m, 0, {TOY_SET, .value = 0x1FF}, {TOY_STORE, 4, .value = svr}, {TOY_SET, .value = 1u << 24}, {TOY_STORE, 4, .value = icr2},
         {TOY_SET, .value = 0x4500}, {TOY_STORE, 4, .value = icr}, {TOY_SET, .value = 0x4608}, {TOY_STORE, 4, .value = icr},
         {TOY_STI}, {TOY_HLT}, {TOY_JUMP, .value = 0x90});
    /* SIPI vector 8: vCPU 1 begins at 0x8000 */
    LOAD(&m, 0x8000, {TOY_SET, .value = 0x1FF}, {TOY_STORE, 4, .value = svr}, {TOY_STI}, {TOY_SET, .value = 0}, {TOY_STORE, 4, .value = icr2},
         {TOY_SET, .value = 0x4050}, {TOY_STORE, 4, .value = icr}, {TOY_HLT}, {TOY_JUMP, .value = 0x8070});
    LOAD(&m, handler, {TOY_JUMP, .value = 0x9000});
    /* handler: EOI, count, send to the APIC that ICR2 names, back */
    LOAD(&m, 0x9000, {TOY_STORE, 4, .value = eoi}, {TOY_LOAD, 8, .value = 0xD0000000}, {TOY_SET, .value = 0x4050},
         {TOY_STORE, 4, .value = icr}, {TOY_IRET});
    struct runner a, b;
    struct kvm_mp_state mp;
    CHECK_EQ(call(other, KVM_GET_MP_STATE, &mp), 0);
    CHECK_EQ(mp.mp_state, KVM_MP_STATE_UNINITIALIZED);
    start(&b, other, other_run);
    start(&a, m.vcpu, m.run);
    for (unsigned i = 0; i < 20000 && (a.mmio < ROUNDS || b.mmio < ROUNDS); i++)
        nap(1000000);
    stop(&a);
    stop(&b);
    CHECK(a.mmio >= ROUNDS && b.mmio >= ROUNDS);
    ENGINE->unmap(other_run, 3 * 4096);
    CHECK_EQ(ENGINE->close(other), 0);
    machine_free(&m);
}

/* MSIs from outside wake a halted vCPU; periodic ticks of its timer too. */
static void test_wakeups_from_outside(void)
{
    struct machine m = machine_new(lapics);
    LOAD(&m, 0, {TOY_SET, .value = 0x1FF}, {TOY_STORE, 4, .value = 0xFEE000F0}, {TOY_SET, .value = 0x20051},
         {TOY_STORE, 4, .value = 0xFEE00320}, {TOY_SET, .value = 0xB}, {TOY_STORE, 4, .value = 0xFEE003E0},
         {TOY_SET, .value = 300000}, {TOY_STORE, 4, .value = 0xFEE00380}, {TOY_STI}, {TOY_HLT}, {TOY_JUMP, .value = 0x90});
    for (unsigned vector = 0x50; vector <= 0x51; vector++)
        LOAD(&m, VECTORS + vector * 16, {TOY_JUMP, .value = vector * 0x100});
    LOAD(&m, 0x5000, {TOY_STORE, 4, .value = 0xFEE000B0}, {TOY_LOAD, 8, .value = 0xD0000000}, {TOY_IRET});
    LOAD(&m, 0x5100, {TOY_STORE, 4, .value = 0xFEE000B0}, {TOY_LOAD, 8, .value = 0xD0000008}, {TOY_IRET});
    struct runner r;
    start(&r, m.vcpu, m.run);
    struct kvm_msi msi = {.address_lo = 0xFEE00000, .data = 0x50};
    for (unsigned i = 0; i < 2000 || r.mmio < 100; i++) {
        CHECK(call(m.vm, KVM_SIGNAL_MSI, &msi) >= -1); /* -1 until the guest has enabled its APIC */
        nap(10000);
    }
    stop(&r);
    CHECK(r.mmio >= 100);
    machine_free(&m);
}

/* VMs made and torn down while vCPUs are just leaving. */
static void test_close_while_others_run(void)
{
    for (unsigned i = 0; i < 50; i++) {
        struct machine m = machine_new(lapics), other = machine_new(lapics);
        LOAD(&m, 0, {TOY_JUMP, .value = 0});
        struct runner r;
        start(&r, m.vcpu, m.run);
        machine_free(&other);
        stop(&r);
        machine_free(&m);
    }
}

int main(void)
{
    struct sigaction action = {.sa_handler = on_signal};
    sigaction(SIGUSR1, &action, NULL);
    test_slots_change_under_a_running_vcpu();
    test_dirty_log_misses_nothing();
    test_bare_signal(false);
    test_bare_signal(true);
    test_ipi_ping_pong();
    test_wakeups_from_outside();
    test_close_while_others_run();
    return 0;
}
