/* SPDX-License-Identifier: Apache-2.0
 *
 * The machine half through the engine's door, with the toy processor: slots, exits, state, interrupts.
 */
#include <fcntl.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "machine.h"

static void test_handles(void)
{
    int kvm = ENGINE->open("/dev/kvm");
    CHECK_EQ(call_int(kvm, KVM_GET_API_VERSION, 0), 12);
    CHECK_EQ(call_int(kvm, KVM_CREATE_VM, 77), -EINVAL);
    CHECK_EQ(call_int(kvm, 0xAE7F, 0), -ENOTTY);
    int vm = call_int(kvm, KVM_CREATE_VM, 0);
    CHECK_EQ(call_int(vm, KVM_CREATE_VCPU, 100000), -EINVAL);
    int vcpu = call_int(vm, KVM_CREATE_VCPU, 3);
    CHECK_EQ(call_int(vm, KVM_CREATE_VCPU, 3), -EEXIST);
    CHECK_EQ(ENGINE->close(vm), 0);
    struct kvm_regs regs; /* a vCPU keeps its VM alive */
    CHECK_EQ(call(vcpu, KVM_GET_REGS, &regs), 0);
    CHECK_EQ(regs.rip, 0xFFF0);
    CHECK_EQ(call(vcpu, KVM_GET_REGS, NULL), -EFAULT);
    CHECK_EQ(ENGINE->close(vcpu), 0);
    CHECK_EQ(ENGINE->close(vcpu), -EBADF);
    CHECK_EQ(call(vcpu, KVM_GET_REGS, &regs), -EBADF);
    CHECK_EQ(ENGINE->close(kvm), 0);
    CHECK_EQ(call_int(-1, KVM_RUN, 0), -EBADF);
}

static void test_slot_errors(void)
{
    struct machine m = machine_new(NULL);
    void *more = mmap(NULL, 0x4000, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK_EQ(set_slot(m.vm, 1, 0x3F000, 0x2000, more, 0), -EEXIST);
    CHECK_EQ(set_slot(m.vm, 1, 0x100001, 0x1000, more, 0), -EINVAL);
    CHECK_EQ(set_slot(m.vm, 1, 0x100000, 0x1001, more, 0), -EINVAL);
    CHECK_EQ(set_slot(m.vm, 1, 0x100000, 0x1000, (char *)more + 1, 0), -EINVAL);
    CHECK_EQ(set_slot(m.vm, 1, 0x100000, 0x1000, more, 0x80), -EINVAL);
    CHECK_EQ(set_slot(m.vm, 1, UINT64_MAX & ~0xFFFull, 0x1000, more, 0), -EINVAL);
    CHECK_EQ(set_slot(m.vm, 40000, 0x100000, 0x1000, more, 0), -EINVAL);
    CHECK_EQ(set_slot(m.vm, 1, 0x100000, 0, more, 0), -EINVAL); /* nothing to delete */
    CHECK_EQ(set_slot(m.vm, 1, 0x100000, 0x4000, more, 0), 0);
    CHECK_EQ(set_slot(m.vm, 1, 0x100000, 0x2000, more, 0), -EINVAL); /* size cannot change */
    CHECK_EQ(set_slot(m.vm, 1, 0x100000, 0x4000, more, KVM_MEM_READONLY), -EINVAL);
    CHECK_EQ(set_slot(m.vm, 1, 0x3E000, 0x4000, more, 0), -EEXIST);
    CHECK_EQ(set_slot(m.vm, 1, 0x200000, 0x4000, more, 0), 0); /* moved */
    *(uint64_t *)more = 0x1234;
    LOAD(&m, 0, {TOY_LOAD, 8, .value = 0x200000}, {TOY_HLT});
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_HLT);
    CHECK_EQ(rax(m.vcpu), 0x1234);
    CHECK_EQ(set_slot(m.vm, 1, 0x200000, 0, more, 0), 0);
    LOAD(&m, 32, {TOY_LOAD, 8, .value = 0x200000}, {TOY_HLT});
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_MMIO); /* the cached translation is gone */
    munmap(more, 0x4000);
    machine_free(&m);
}

static void test_exits_and_completion(void)
{
    struct machine m = machine_new(NULL);
    LOAD(&m, 0, {TOY_IN, 2, 0x1234}, {TOY_ADD, .value = 1}, {TOY_OUT, 1, 0x80}, {TOY_LOAD, 4, .value = 0xD0000000},
         {TOY_STORE, 8, .value = 0xD0000008}, {TOY_TRIPLE});
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_IO);
    CHECK_EQ(m.run->io.direction, KVM_EXIT_IO_IN);
    CHECK_EQ(m.run->io.port, 0x1234);
    CHECK_EQ(m.run->io.size, 2);
    CHECK_EQ(m.run->io.count, 1);
    *(uint16_t *)((char *)m.run + m.run->io.data_offset) = 0xBEEF;
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(rax(m.vcpu), 0xBEF0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_IO);
    CHECK_EQ(m.run->io.direction, KVM_EXIT_IO_OUT);
    CHECK_EQ(*((uint8_t *)m.run + m.run->io.data_offset), 0xF0);
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_MMIO);
    CHECK_EQ(m.run->mmio.phys_addr, 0xD0000000);
    CHECK_EQ(m.run->mmio.len, 4);
    CHECK_EQ(m.run->mmio.is_write, 0);
    memcpy(m.run->mmio.data, "\x78\x56\x34\x12\xFF\xFF\xFF\xFF", 8);
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(rax(m.vcpu), 0x12345678);
    CHECK_EQ(m.run->mmio.is_write, 1);
    CHECK_EQ(m.run->mmio.len, 8);
    CHECK_EQ(*(uint64_t *)m.run->mmio.data, 0x12345678);
    m.run->immediate_exit = 1; /* completes the store, and only that */
    CHECK_EQ(run(m.vcpu), -EINTR);
    struct kvm_regs regs;
    call(m.vcpu, KVM_GET_REGS, &regs);
    CHECK_EQ(regs.rip, 5 * 16);
    CHECK_EQ(run(m.vcpu), -EINTR);
    m.run->immediate_exit = 0;
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_SHUTDOWN);
    regs.rip = 0x8000;
    LOAD(&m, 0x8000, {TOY_BAD});
    CHECK_EQ(call(m.vcpu, KVM_SET_REGS, &regs), 0);
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_INTERNAL_ERROR);
    CHECK_EQ(m.run->internal.suberror, KVM_INTERNAL_ERROR_EMULATION);
    machine_free(&m);
}

static void test_answer_of_a_left_instruction_is_dropped(void)
{
    struct machine m = machine_new(NULL);
    struct kvm_regs regs;
    LOAD(&m, 0, {TOY_IN, 1, 0x10}, {TOY_HLT});
    LOAD(&m, 0x100, {TOY_IN, 1, 0x20}, {TOY_HLT});
    CHECK_EQ(run(m.vcpu), 0);
    call(m.vcpu, KVM_GET_REGS, &regs);
    regs.rip = 0x100;
    call(m.vcpu, KVM_SET_REGS, &regs);
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_IO);
    CHECK_EQ(m.run->io.port, 0x20);
    machine_free(&m);
}

static void test_dirty_log(void)
{
    struct machine m = machine_new(NULL);
    uint64_t bits[1];
    struct kvm_dirty_log log = {.slot = 0, .dirty_bitmap = bits};
    CHECK_EQ(call(m.vm, KVM_GET_DIRTY_LOG, &log), -ENOENT);
    CHECK_EQ(set_slot(m.vm, 0, 0, RAM_SIZE, m.ram, KVM_MEM_LOG_DIRTY_PAGES), 0);
    LOAD(&m, 0, {TOY_STORE, 1, .value = 0x5000}, {TOY_STORE, 1, .value = 0x9FFF}, {TOY_HLT}, {TOY_STORE, 1, .value = 0x5008}, {TOY_HLT});
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(call(m.vm, KVM_GET_DIRTY_LOG, &log), 0);
    CHECK_EQ(bits[0], 1 << 5 | 1 << 9);
    CHECK_EQ(call(m.vm, KVM_GET_DIRTY_LOG, &log), 0);
    CHECK_EQ(bits[0], 0);
    CHECK_EQ(run(m.vcpu), 0); /* the same page again: reported again */
    CHECK_EQ(call(m.vm, KVM_GET_DIRTY_LOG, &log), 0);
    CHECK_EQ(bits[0], 1 << 5);
    log.slot = 9;
    CHECK_EQ(call(m.vm, KVM_GET_DIRTY_LOG, &log), -ENOENT);
    machine_free(&m);
}

static void manual_protect(int vm)
{
    struct kvm_enable_cap cap = {.cap = KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, .args = {3}};
    CHECK_EQ(call(vm, KVM_ENABLE_CAP, &cap), 0);
}

static void test_clear_dirty_log(void)
{
    struct machine m = machine_new(manual_protect);
    uint64_t bits[1];
    struct kvm_dirty_log log = {.slot = 0, .dirty_bitmap = bits};
    struct kvm_clear_dirty_log clear = {.slot = 0, .num_pages = 64, .dirty_bitmap = bits};
    CHECK_EQ(set_slot(m.vm, 0, 0, RAM_SIZE, m.ram, KVM_MEM_LOG_DIRTY_PAGES), 0);
    CHECK_EQ(call(m.vm, KVM_GET_DIRTY_LOG, &log), 0);
    CHECK_EQ(bits[0], ~0ull); /* initially all set */
    CHECK_EQ(call(m.vm, KVM_CLEAR_DIRTY_LOG, &clear), 0);
    LOAD(&m, 0, {TOY_STORE, 1, .value = 0x7000}, {TOY_HLT});
    CHECK_EQ(run(m.vcpu), 0);
    for (unsigned i = 0; i < 2; i++) { /* reading clears nothing */
        CHECK_EQ(call(m.vm, KVM_GET_DIRTY_LOG, &log), 0);
        CHECK_EQ(bits[0], 1 << 7);
    }
    clear.first_page = 1;
    CHECK_EQ(call(m.vm, KVM_CLEAR_DIRTY_LOG, &clear), -EINVAL);
    clear.first_page = 0;
    clear.num_pages = 63;
    CHECK_EQ(call(m.vm, KVM_CLEAR_DIRTY_LOG, &clear), -EINVAL);
    clear.num_pages = 64;
    CHECK_EQ(call(m.vm, KVM_CLEAR_DIRTY_LOG, &clear), 0);
    CHECK_EQ(call(m.vm, KVM_GET_DIRTY_LOG, &log), 0);
    CHECK_EQ(bits[0], 0);
    machine_free(&m);
}

static void ring_cap(int vm)
{
    struct kvm_enable_cap cap = {.cap = KVM_CAP_DIRTY_LOG_RING_ACQ_REL, .args = {4096}};
    CHECK_EQ(call(vm, KVM_ENABLE_CAP, &cap), 0);
    CHECK_EQ(call(vm, KVM_ENABLE_CAP, &cap), -EINVAL);
}

static void test_dirty_ring(void)
{
    struct machine m = machine_new(ring_cap);
    size_t size = 2048 * 4096;
    uint8_t *big = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK_EQ(set_slot(m.vm, 5, 0x10000000, size, big, KVM_MEM_LOG_DIRTY_PAGES), 0);
    struct kvm_dirty_gfn *ring = ENGINE->map(m.vcpu, 4096, KVM_DIRTY_LOG_PAGE_OFFSET * 4096);
    CHECK((intptr_t)ring > 0);
    uint64_t bits[64];
    struct kvm_dirty_log log = {.slot = 5, .dirty_bitmap = bits};
    CHECK_EQ(call(m.vm, KVM_GET_DIRTY_LOG, &log), -ENXIO);
    enum { STORES = 200 }; /* more than the 128 after which it is full */
    for (unsigned i = 0; i < STORES; i++)
        LOAD(&m, i * 16, {TOY_STORE, 1, .value = 0x10000000 + i * 4096ull});
    LOAD(&m, STORES * 16, {TOY_HLT});
    unsigned seen = 0, at = 0;
    for (;;) {
        CHECK_EQ(run(m.vcpu), 0);
        bool full = m.run->exit_reason == KVM_EXIT_DIRTY_RING_FULL;
        long before = seen;
        for (; ring[at].flags & KVM_DIRTY_GFN_F_DIRTY; at = (at + 1) % 256) {
            CHECK_EQ(ring[at].slot, 5);
            CHECK_EQ(ring[at].offset, seen);
            ring[at].flags = KVM_DIRTY_GFN_F_RESET;
            seen++;
        }
        CHECK_EQ(call_int(m.vm, KVM_RESET_DIRTY_RINGS, 0), seen - before);
        if (!full)
            break;
    }
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_HLT);
    CHECK_EQ(seen, STORES);
    ENGINE->unmap(ring, 4096);
    machine_free(&m);
    munmap(big, size);
}

static void test_read_only_slot(void)
{
    struct machine m = machine_new(NULL);
    uint8_t *rom = mmap(NULL, 0x1000, PROT_READ, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    CHECK_EQ(set_slot(m.vm, 1, 0xF0000, 0x1000, rom, KVM_MEM_READONLY), 0);
    LOAD(&m, 0, {TOY_LOAD, 4, .value = 0xF0000}, {TOY_STORE, 4, .value = 0xF0010}, {TOY_HLT});
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_MMIO);
    CHECK_EQ(m.run->mmio.phys_addr, 0xF0010);
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_HLT);
    machine_free(&m);
    munmap(rom, 0x1000);
}

/* ---- interrupts without chips ---- */

static void test_interrupt_window(void)
{
    struct machine m = machine_new(NULL);
    struct kvm_interrupt irq = {.irq = 0x20};
    LOAD(&m, 0, {TOY_SET, .value = 1}, {TOY_STI}, {TOY_JUMP, .value = 32});
    LOAD(&m, VECTORS + 0x200, {TOY_HLT});
    m.run->request_interrupt_window = 1;
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_IRQ_WINDOW_OPEN);
    CHECK_EQ(m.run->ready_for_interrupt_injection, 1);
    CHECK_EQ(m.run->if_flag, 1);
    m.run->request_interrupt_window = 0;
    CHECK_EQ(call(m.vcpu, KVM_INTERRUPT, &irq), 0);
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_HLT);
    CHECK_EQ(m.run->if_flag, 0);
    irq.irq = 256;
    CHECK_EQ(call(m.vcpu, KVM_INTERRUPT, &irq), -EINVAL);
    struct kvm_irq_level line = {.irq = 4, .level = 1};
    CHECK_EQ(call(m.vm, KVM_IRQ_LINE, &line), -ENXIO);
    m.run->cr8 = 99;
    CHECK_EQ(run(m.vcpu), -EINVAL);
    machine_free(&m);
}

/* ---- interrupts with chips ---- */

static void run_pic_setup(struct machine *m)
{
    CHECK_EQ(run(m->vcpu), 0);
    CHECK_EQ(m->run->exit_reason, KVM_EXIT_IO);
    CHECK_EQ(m->run->io.port, 0x99);
}

static void chips(int vm)
{
    CHECK_EQ(call_int(vm, KVM_CREATE_IRQCHIP, 0), 0);
    CHECK_EQ(call_int(vm, KVM_CREATE_IRQCHIP, 0), -EEXIST);
    struct kvm_pit_config pit = {.flags = KVM_PIT_SPEAKER_DUMMY};
    CHECK_EQ(call(vm, KVM_CREATE_PIT2, &pit), 0);
    CHECK_EQ(call(vm, KVM_CREATE_PIT2, &pit), -EEXIST);
}

/* ICW1..4 of the master with base 0x20 as guest code, all pins open, then an exit: it forgets edges that came before.
 * Returns where the code ends. */
static uint64_t load_pic_setup(struct machine *m)
{
    LOAD(m, 0, {TOY_SET, .value = 0x11}, {TOY_OUT, 1, 0x20}, {TOY_SET, .value = 0x20}, {TOY_OUT, 1, 0x21},
         {TOY_SET, .value = 4}, {TOY_OUT, 1, 0x21}, {TOY_SET, .value = 1}, {TOY_OUT, 1, 0x21}, {TOY_OUT, 1, 0x99}, {TOY_STI});
    return 10 * 16;
}

static void test_pic_wakes_hlt(void)
{
    struct machine m = machine_new(chips);
    uint64_t at = load_pic_setup(&m);
    LOAD(&m, at, {TOY_HLT}, {TOY_JUMP, .value = at});
    LOAD(&m, VECTORS + 0x24 * 16, {TOY_OUT, 1, 0x55}, {TOY_IRET});
    run_pic_setup(&m);
    struct kvm_irq_level line = {.irq = 4, .level = 1};
    CHECK_EQ(call(m.vm, KVM_IRQ_LINE_STATUS, &line), 0);
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_IO); /* the interrupt came while or after it halted */
    CHECK(m.run->io.port == 0x55);
    struct kvm_irqchip chip = {.chip_id = KVM_IRQCHIP_PIC_MASTER};
    CHECK_EQ(call(m.vm, KVM_GET_IRQCHIP, &chip), 0);
    CHECK_EQ(chip.chip.pic.irq_base, 0x20);
    CHECK_EQ(chip.chip.pic.isr, 1 << 4);
    CHECK_EQ(call(m.vm, KVM_SET_IRQCHIP, &chip), 0);
    chip.chip_id = 3;
    CHECK_EQ(call(m.vm, KVM_GET_IRQCHIP, &chip), -EINVAL);
    machine_free(&m);
}

static void test_pit_ticks(void)
{
    struct machine m = machine_new(chips);
    uint64_t at = load_pic_setup(&m);
    LOAD(&m, at, {TOY_SET, .value = 0x34}, {TOY_OUT, 1, 0x43}, {TOY_SET, .value = 0}, {TOY_OUT, 1, 0x40},
         {TOY_SET, .value = 0x10}, {TOY_OUT, 1, 0x40}, {TOY_HLT});
    LOAD(&m, VECTORS + 0x20 * 16, {TOY_OUT, 1, 0x55});
    run_pic_setup(&m);
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_IO);
    CHECK_EQ(m.run->io.port, 0x55);
    struct kvm_pit_state2 state;
    CHECK_EQ(call(m.vm, KVM_GET_PIT2, &state), 0);
    CHECK_EQ(state.channels[0].count, 0x1000);
    machine_free(&m);
}

static void deterministic(int vm)
{
    struct kvm_enable_cap cap = {.cap = 0x6B760001, .args = {42}};
    CHECK_EQ(call(vm, KVM_ENABLE_CAP, &cap), 0);
    chips(vm);
}

static void test_deterministic_time(void)
{
    uint64_t first[2];
    for (unsigned i = 0; i < 2; i++) {
        struct machine m = machine_new(deterministic);
        CHECK_EQ(call_int(m.vm, KVM_CREATE_VCPU, 1), -EINVAL);
        uint64_t at = load_pic_setup(&m);
        LOAD(&m, at, {TOY_SET, .value = 0x34}, {TOY_OUT, 1, 0x43}, {TOY_SET, .value = 0}, {TOY_OUT, 1, 0x40},
             {TOY_SET, .value = 0x10}, {TOY_OUT, 1, 0x40}, {TOY_ADD, .value = 1}, {TOY_JUMP, .value = at + 6 * 16});
        LOAD(&m, VECTORS + 0x20 * 16, {TOY_OUT, 1, 0x55});
        run_pic_setup(&m);
        CHECK_EQ(run(m.vcpu), 0);
        CHECK_EQ(m.run->io.port, 0x55);
        first[i] = rax(m.vcpu); /* how far it had counted when the timer came */
        CHECK(first[i] > 1000000);
        machine_free(&m);
    }
    CHECK_EQ(first[0], first[1]);
}

static void test_irqfd(void)
{
    struct machine m = machine_new(chips);
    uint64_t at = load_pic_setup(&m);
    int fd = eventfd(0, EFD_CLOEXEC), resample = eventfd(0, EFD_NONBLOCK);
    LOAD(&m, at, {TOY_HLT}, {TOY_JUMP, .value = at});
    LOAD(&m, VECTORS + 0x25 * 16, {TOY_OUT, 1, 0x55}, {TOY_SET, .value = 0x20}, {TOY_OUT, 1, 0x20}, {TOY_OUT, 1, 0x56});
    struct kvm_irqfd request = {.fd = fd, .gsi = 5, .flags = KVM_IRQFD_FLAG_RESAMPLE, .resamplefd = resample};
    CHECK_EQ(call(m.vm, KVM_IRQFD, &request), 0);
    CHECK_EQ(call(m.vm, KVM_IRQFD, &request), -EBUSY);
    run_pic_setup(&m);
    uint64_t one = 1;
    CHECK_EQ(write(fd, &one, 8), 8);
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->io.port, 0x55);
    CHECK(read(resample, &one, 8) < 0); /* not before the EOI */
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->io.port, 0x56);
    CHECK_EQ(read(resample, &one, 8), 8);
    request.flags = KVM_IRQFD_FLAG_DEASSIGN;
    CHECK_EQ(call(m.vm, KVM_IRQFD, &request), 0);
    request.flags = 0;
    request.fd = 0x7FFFFF;
    CHECK_EQ(call(m.vm, KVM_IRQFD, &request), -EBADF);
    int plain = open("/dev/null", O_RDONLY);
    request.fd = plain;
    CHECK_EQ(call(m.vm, KVM_IRQFD, &request), -EINVAL);
    close(plain);
    close(fd);
    close(resample);
    machine_free(&m);
}

static void test_ioeventfd_and_coalesced(void)
{
    struct machine m = machine_new(NULL);
    int fd = eventfd(0, EFD_NONBLOCK);
    uint64_t count;
    struct kvm_ioeventfd request = {.addr = 0xD0000050, .len = 4, .fd = fd, .datamatch = 7, .flags = KVM_IOEVENTFD_FLAG_DATAMATCH};
    CHECK_EQ(call(m.vm, KVM_IOEVENTFD, &request), 0);
    CHECK_EQ(call(m.vm, KVM_IOEVENTFD, &request), -EEXIST);
    struct kvm_ioeventfd wrong = {.addr = 1, .len = 3, .fd = fd};
    CHECK_EQ(call(m.vm, KVM_IOEVENTFD, &wrong), -EINVAL);
    struct kvm_coalesced_mmio_zone zone = {.addr = 0xD0001000, .size = 0x100};
    CHECK_EQ(call(m.vm, KVM_REGISTER_COALESCED_MMIO, &zone), 0);
    zone = (struct kvm_coalesced_mmio_zone){.addr = 0xCF8, .size = 4, .pio = 1};
    CHECK_EQ(call(m.vm, KVM_REGISTER_COALESCED_MMIO, &zone), 0);
    LOAD(&m, 0, {TOY_SET, .value = 7}, {TOY_STORE, 4, .value = 0xD0000050}, {TOY_STORE, 2, .value = 0xD0001010},
         {TOY_OUT, 4, 0xCF8}, {TOY_SET, .value = 8}, {TOY_STORE, 4, .value = 0xD0000050});
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_MMIO); /* only the store of 8 */
    CHECK_EQ(m.run->mmio.data[0], 8);
    CHECK_EQ(read(fd, &count, 8), 8);
    CHECK_EQ(count, 1);
    struct kvm_coalesced_mmio_ring *ring = (void *)((char *)m.run + KVM_COALESCED_MMIO_PAGE_OFFSET * 4096);
    CHECK_EQ(ring->last, 2);
    CHECK_EQ(ring->coalesced_mmio[0].phys_addr, 0xD0001010);
    CHECK_EQ(ring->coalesced_mmio[0].len, 2);
    CHECK_EQ(ring->coalesced_mmio[0].data[0], 7);
    CHECK_EQ(ring->coalesced_mmio[1].pio, 1);
    CHECK_EQ(ring->coalesced_mmio[1].phys_addr, 0xCF8);
    request.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN;
    CHECK_EQ(call(m.vm, KVM_IOEVENTFD, &request), 0);
    CHECK_EQ(call(m.vm, KVM_IOEVENTFD, &request), -ENOENT);
    close(fd);
    machine_free(&m);
}

/* ---- state ---- */

static void test_state_round_trips(void)
{
    struct machine m = machine_new(chips);
    struct kvm_sregs sregs, again;
    CHECK_EQ(call(m.vcpu, KVM_GET_SREGS, &sregs), 0);
    CHECK_EQ(sregs.cs.base, 0xFFFF0000);
    CHECK_EQ(sregs.apic_base, 0xFEE00900);
    sregs.ds = (struct kvm_segment){.base = 0x10, .limit = 0xFFFFFFFF, .selector = 0x18, .type = 3, .present = 1, .db = 1, .s = 1, .g = 1};
    sregs.cr3 = 0x5000;
    sregs.cr8 = 9;
    CHECK_EQ(call(m.vcpu, KVM_SET_SREGS, &sregs), 0);
    CHECK_EQ(call(m.vcpu, KVM_GET_SREGS, &again), 0);
    CHECK(memcmp(&sregs, &again, sizeof sregs) == 0);
    sregs.efer = 0x400;
    CHECK_EQ(call(m.vcpu, KVM_SET_SREGS, &sregs), -EINVAL); /* LMA without paging */

    struct { struct kvm_msrs head; struct kvm_msr_entry entry[3]; } msrs = {.head.nmsrs = 3};
    msrs.entry[0] = (struct kvm_msr_entry){.index = 0xC0000082, .data = 0xFFFFFFFF81000000};
    msrs.entry[1] = (struct kvm_msr_entry){.index = 0xC0000082, .data = 0x0100000000000000};
    msrs.entry[2] = (struct kvm_msr_entry){.index = 0x277, .data = 0};
    CHECK_EQ(call(m.vcpu, KVM_SET_MSRS, &msrs), 1); /* the second is not canonical */
    msrs.entry[1].index = 0x12345678;
    CHECK_EQ(call(m.vcpu, KVM_GET_MSRS, &msrs), 1);
    CHECK_EQ(msrs.entry[0].data, 0xFFFFFFFF81000000);

    struct kvm_vcpu_events events;
    CHECK_EQ(call(m.vcpu, KVM_GET_VCPU_EVENTS, &events), 0);
    events.exception.injected = 1;
    events.exception.nr = 2;
    CHECK_EQ(call(m.vcpu, KVM_SET_VCPU_EVENTS, &events), -EINVAL);
    struct kvm_mp_state mp;
    CHECK_EQ(call(m.vcpu, KVM_GET_MP_STATE, &mp), 0);
    CHECK_EQ(mp.mp_state, KVM_MP_STATE_RUNNABLE);
    CHECK_EQ(call_int(m.vcpu, KVM_SET_TSC_KHZ, 2500000), 0);
    CHECK_EQ(call_int(m.vcpu, KVM_GET_TSC_KHZ, 0), 2500000);
    CHECK_EQ(call_int(m.vcpu, KVM_SET_TSC_KHZ, 10), -EINVAL);
    machine_free(&m);
}

static void test_msr_list_can_be_saved_and_loaded(void)
{
    struct machine m = machine_new(chips);
    struct { struct kvm_msr_list head; uint32_t index[256]; } list = {.head.nmsrs = 1};
    CHECK_EQ(call(m.kvm, KVM_GET_MSR_INDEX_LIST, &list), -E2BIG);
    CHECK_EQ(call(m.kvm, KVM_GET_MSR_INDEX_LIST, &list), 0);
    struct { struct kvm_msrs head; struct kvm_msr_entry entry[256]; } msrs = {.head.nmsrs = list.head.nmsrs};
    for (unsigned i = 0; i < list.head.nmsrs; i++)
        msrs.entry[i].index = list.index[i];
    CHECK_EQ(call(m.vcpu, KVM_GET_MSRS, &msrs), list.head.nmsrs);
    CHECK_EQ(call(m.vcpu, KVM_SET_MSRS, &msrs), list.head.nmsrs);
    machine_free(&m);
}

static void test_msr_filter_exits(void)
{
    struct machine m = machine_new(NULL);
    uint8_t none = 0;
    struct kvm_msr_filter filter = {.ranges[0] = {.flags = KVM_MSR_FILTER_READ | KVM_MSR_FILTER_WRITE, .nmsrs = 1, .base = 0x174, .bitmap = &none}};
    CHECK_EQ(call(m.vm, KVM_X86_SET_MSR_FILTER, &filter), 0);
    LOAD(&m, 0, {TOY_RDMSR, .value = 0x174}, {TOY_OUT, 1, 1}, {TOY_RDMSR, .value = 0x174}, {TOY_SET, .value = 5},
         {TOY_WRMSR, .value = 0x174}, {TOY_HLT});
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(rax(m.vcpu), 0xDEAD); /* #GP while user space has not asked for exits */
    struct kvm_enable_cap cap = {.cap = KVM_CAP_X86_USER_SPACE_MSR, .args = {KVM_MSR_EXIT_REASON_FILTER}};
    CHECK_EQ(call(m.vm, KVM_ENABLE_CAP, &cap), 0);
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_X86_RDMSR);
    CHECK_EQ(m.run->msr.index, 0x174);
    CHECK_EQ(m.run->msr.reason, KVM_MSR_EXIT_REASON_FILTER);
    m.run->msr.data = 0x77;
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_X86_WRMSR);
    CHECK_EQ(m.run->msr.data, 5);
    m.run->msr.error = 1;
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->exit_reason, KVM_EXIT_HLT);
    CHECK_EQ(rax(m.vcpu), 0xDEAD);
    machine_free(&m);
}

static void test_kvm_clock_page(void)
{
    struct machine m = machine_new(chips);
    LOAD(&m, 0, {TOY_SET, .value = 0x8001}, {TOY_WRMSR, .value = 0x4B564D01}, {TOY_TSC}, {TOY_OUT, 1, 1});
    CHECK_EQ(run(m.vcpu), 0);
    struct { uint32_t version, pad; uint64_t tsc, system; uint32_t mul; int8_t shift; uint8_t flags; } *page = (void *)(m.ram + 0x8000);
    CHECK(page->version && !(page->version & 1));
    CHECK_EQ(page->flags, 1);
    uint64_t delta = (rax(m.vcpu) - page->tsc) << page->shift;
    uint64_t guest = page->system + (uint64_t)(((unsigned __int128)delta * page->mul) >> 32);
    struct kvm_clock_data data;
    CHECK_EQ(call(m.vm, KVM_GET_CLOCK, &data), 0);
    CHECK(guest <= data.clock && data.clock - guest < 10000000000ull);
    data = (struct kvm_clock_data){.clock = 1ull << 50};
    CHECK_EQ(call(m.vm, KVM_SET_CLOCK, &data), 0);
    LOAD(&m, 64, {TOY_TSC}, {TOY_OUT, 1, 1});
    CHECK_EQ(run(m.vcpu), 0);
    delta = (rax(m.vcpu) - page->tsc) << page->shift;
    guest = page->system + (uint64_t)(((unsigned __int128)delta * page->mul) >> 32);
    CHECK(guest > 1ull << 50);
    data.flags = 1u << 30;
    CHECK_EQ(call(m.vm, KVM_SET_CLOCK, &data), -EINVAL);
    machine_free(&m);
}

static void test_sync_regs(void)
{
    struct machine m = machine_new(NULL);
    LOAD(&m, 0x100, {TOY_ADD, .value = 2}, {TOY_HLT});
    m.run->kvm_valid_regs = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS;
    m.run->s.regs.regs = (struct kvm_regs){.rax = 40, .rip = 0x100, .rflags = 2};
    m.run->kvm_dirty_regs = KVM_SYNC_X86_REGS;
    CHECK_EQ(run(m.vcpu), 0);
    CHECK_EQ(m.run->kvm_dirty_regs, 0);
    CHECK_EQ(m.run->s.regs.regs.rax, 42);
    CHECK_EQ(m.run->s.regs.sregs.cs.base, 0xFFFF0000);
    m.run->kvm_valid_regs = 1 << 9;
    CHECK_EQ(run(m.vcpu), -EINVAL);
    machine_free(&m);
}

static void test_stats_file(void)
{
    struct machine m = machine_new(NULL);
    LOAD(&m, 0, {TOY_OUT, 1, 1});
    CHECK_EQ(run(m.vcpu), 0);
    int stats = call_int(m.vcpu, KVM_GET_STATS_FD, 0);
    CHECK(stats >= 0);
    struct kvm_stats_header header;
    CHECK_EQ(ENGINE->pread(stats, &header, sizeof header, 0), sizeof header);
    uint64_t io_exits = 0;
    for (unsigned i = 0; i < header.num_desc; i++) {
        struct { struct kvm_stats_desc desc; char name[48]; } entry;
        size_t size = sizeof(struct kvm_stats_desc) + header.name_size;
        CHECK_EQ(ENGINE->pread(stats, &entry, size, header.desc_offset + i * size), size);
        if (!strcmp(entry.desc.name, "io_exits"))
            CHECK_EQ(ENGINE->pread(stats, &io_exits, 8, header.data_offset + entry.desc.offset), 8);
    }
    CHECK_EQ(io_exits, 1);
    CHECK_EQ(ENGINE->pread(stats, &header, 8, 1 << 20), 0);
    CHECK_EQ(ENGINE->close(stats), 0);
    machine_free(&m);
}

int main(void)
{
    test_handles();
    test_slot_errors();
    test_exits_and_completion();
    test_answer_of_a_left_instruction_is_dropped();
    test_dirty_log();
    test_clear_dirty_log();
    test_dirty_ring();
    test_read_only_slot();
    test_interrupt_window();
    test_pic_wakes_hlt();
    test_pit_ticks();
    test_deterministic_time();
    test_irqfd();
    test_ioeventfd_and_coalesced();
    test_state_round_trips();
    test_msr_list_can_be_saved_and_loaded();
    test_msr_filter_exits();
    test_kvm_clock_page();
    test_sync_regs();
    test_stats_file();
    return 0;
}
