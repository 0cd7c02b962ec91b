/* SPDX-License-Identifier: Apache-2.0
 *
 * Memory, devices and MSRs of the fuzzed processor; see guest.h.
 */
#define _GNU_SOURCE
#include "guest.h"

#include <linux/kvm.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <unistd.h>

struct guest guest;

static void *must_map(void *at, size_t size, int protection, int flags, int fd, off_t offset)
{
    void *p = mmap(at, size, protection, flags, fd, offset);
    if (p == MAP_FAILED) {
        perror("mmap");
        exit(2);
    }
    return p;
}

void guest_open(void)
{
    size_t total = (PAGES + HIGH_PAGES) * 4096ul;
    int fd = memfd_create("fuzz", MFD_CLOEXEC);
    if (fd < 0 || ftruncate(fd, (off_t)total)) {
        perror("memfd");
        exit(2);
    }
    guest.ram = must_map(NULL, total, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    guest.arena = must_map(NULL, 2 * total + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    for (int page = 0; page < PAGES + HIGH_PAGES; page++)
        must_map(guest_host(page), 4096, guest_is_rom(page) ? PROT_READ : PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 4096 * page);
    close(fd);
    pthread_mutex_init(&guest.vm.lock, NULL);
    guest.vm.deterministic = true;
    guest.cpu = aligned_alloc(64, (sizeof *guest.cpu + 63) & ~63ul);
    if (!guest.cpu || cpu_init(guest.cpu, &guest.vm, 0))
        abort();
}

int guest_page(uint64_t gpa)
{
    uint64_t page = gpa >> 12;
    if (page < PAGES)
        return page >= HOLE_FIRST && page <= HOLE_LAST ? -1 : (int)page;
    page -= HIGH_BASE >> 12;
    return page < HIGH_PAGES ? (int)(PAGES + page) : -1;
}

uint8_t *guest_host(int page) { return guest.arena + 4096 + (size_t)page * 2 * 4096; }
bool guest_is_rom(int page) { return page >= ROM_FIRST && page <= ROM_LAST; }
bool guest_is_logged(int page) { return page >= LOGGED_FIRST && page <= LOGGED_LAST; }

/* ---- what the core asks of the machine ---- */

void tcg_phys_to_host(struct tcg_vm_core *vm, uint64_t gpa, struct page_info *page)
{
    (void)vm;
    int n = guest_page(gpa);
    memset(page, 0, sizeof *page);
    if (n < 0)
        return;
    page->host = guest_host(n);
    page->code = &guest.code[n];
    page->flags = PAGE_RAM | (guest_is_rom(n) ? PAGE_READONLY : 0) | (guest_is_logged(n) ? PAGE_LOG : 0);
}

void tcg_mark_dirty(struct cpu *c, uint64_t gpa)
{
    (void)c;
    int page = guest_page(gpa);
    if (page < 0 || !guest_is_logged(page))
        abort(); /* only logged pages are to be reported */
    guest.reported[page] = true;
}

/* Half of the addresses answer at once, the others through user space. */
static bool at_once(uint64_t addr) { return guest.h.control >> 7 & 1 || chosen(addr >> 3) & 1; }

bool tcg_pio(struct cpu *c, uint16_t port, unsigned size, bool write, uint32_t *value)
{
    (void)c;
    if (size != 1 && size != 2 && size != 4)
        abort();
    if (!at_once(port))
        return false;
    if (!write)
        *value = (uint32_t)chosen(port);
    return true;
}

bool tcg_mmio(struct cpu *c, uint64_t gpa, unsigned size, bool write, uint64_t *value)
{
    (void)c;
    if (!size || size > 8)
        abort();
    if (!at_once(gpa))
        return false;
    if (!write)
        *value = chosen(gpa);
    return true;
}

void guest_answer(struct cpu *c)
{
    struct cpu_io *io = &c->io;
    size_t items = io->count ? io->count : 1;
    if (io->state != IO_WANT || !io->size || io->size > 8 || items * io->size > sizeof io->data)
        abort();
    uint64_t value = chosen(io->addr + io->kind);
    if (io->kind == IO_PIO_IN || io->kind == IO_MMIO_READ || io->kind == IO_RDMSR)
        for (size_t i = 0; i < items; i++)
            memcpy(io->data + i * io->size, &value, io->size);
    io->error = io->kind >= IO_RDMSR && value >> 60 == 0;
    io->state = IO_DONE;
}

/* The MSRs that have their place in struct cpu; the others are there, are not, or go to user space. */
static uint64_t *msr(struct cpu *c, uint32_t index)
{
    switch (index) {
    case 0xC0000081: return &c->star;
    case 0xC0000082: return &c->lstar;
    case 0xC0000083: return &c->cstar;
    case 0xC0000084: return &c->fmask;
    case 0xC0000102: return &c->kernel_gs_base;
    case 0xC0000103: return &c->tsc_aux;
    case 0x174: return &c->sysenter_cs;
    case 0x175: return &c->sysenter_esp;
    case 0x176: return &c->sysenter_eip;
    case 0x277: return &c->pat;
    }
    return NULL;
}

static int other_msr(struct cpu *c, uint32_t index)
{
    c->msr_reason = KVM_MSR_EXIT_REASON_UNKNOWN;
    return chosen(index) % 3;
}

int tcg_rdmsr(struct cpu *c, uint32_t index, uint64_t *value)
{
    uint64_t *place = msr(c, index);
    *value = place ? *place : index == 0xC0000080 ? c->efer : index == 0xC0000100 ? c->seg[SEG_FS].base
           : index == 0xC0000101 ? c->seg[SEG_GS].base : chosen(index);
    return place || (index >= 0xC0000080 && index <= 0xC0000101) ? 0 : other_msr(c, index);
}

int tcg_wrmsr(struct cpu *c, uint32_t index, uint64_t value)
{
    uint64_t *place = msr(c, index);
    bool address = index == 0xC0000082 || index == 0xC0000083 || index == 0xC0000102 || index == 0x175 || index == 0x176
                || index == 0xC0000100 || index == 0xC0000101;
    if (address && !canonical(c, value))
        return 1;
    if (place)
        *place = value;
    else if (index == 0xC0000080)
        return cpu_set_efer(c, value);
    else if (index == 0xC0000100 || index == 0xC0000101)
        cpu_set_segbase(c, index == 0xC0000100 ? SEG_FS : SEG_GS, value);
    else
        return other_msr(c, index);
    return 0;
}

int tcg_ack_interrupt(struct cpu *c)
{
    cpu_lower(c, LINE_INTR);
    uint64_t v = chosen(0x1000 + guest.interrupts++);
    return v & 7 ? (int)(v >> 8 & 0xff) : -1;
}

void tcg_cr8_changed(struct cpu *c) { (void)c; }
uint64_t tcg_read_cr8(struct cpu *c) { return c->cr8; }
uint64_t tcg_rdtsc(struct cpu *c)
{
    (void)c;
    return chosen(0x2000) + 1000ull * guest.asked++;
}
bool tcg_hypercall(struct cpu *c)
{
    c->gpr[RAX] = chosen(c->gpr[RAX]);
    return true;
}
void tcg_wake(struct cpu *c) { (void)c; }

/* ---- kicks ---- */

static int most_kicks;

static void kick(int signal)
{
    (void)signal;
    if (++guest.kicks > most_kicks) {
        static const char text[] = "kicked for a minute, still running\n";
        ssize_t n = write(2, text, sizeof text - 1);
        (void)n;
        abort();
    }
    cpu_request(guest.cpu, CPU_REQ_EXIT);
}

void guest_kick_every(unsigned ms)
{
    most_kicks = (int)(60000 / ms);
    struct sigaction action = {.sa_handler = kick, .sa_flags = SA_RESTART};
    sigaction(SIGVTALRM, &action, NULL);
    struct itimerval every = {{0, ms * 1000}, {0, ms * 1000}};
    if (setitimer(ITIMER_VIRTUAL, &every, NULL)) {
        perror("setitimer");
        exit(2);
    }
}
