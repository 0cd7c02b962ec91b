/* SPDX-License-Identifier: Apache-2.0
 * The same work as the Python benchmarks, in plain C on /dev/kvm: what the machine gives without kvmpy.
 *   kvm_peer exits N     one guest that writes a port N times, each exit served here
 *   kvm_peer vms N       N times: create a VM with one page and a vCPU, run it to HLT, destroy it
 * Prints the seconds that took.
 */
#include <fcntl.h>
#include <linux/kvm.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#define CHECK(what) ({ long r_ = (what); if (r_ < 0) { perror(#what); exit(1); } r_; })

struct guest { int vm, vcpu; uint8_t *ram; struct kvm_run *run; size_t run_size; };

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static struct guest create(int kvm, const void *code, size_t size)
{
    struct guest g;
    g.vm = CHECK(ioctl(kvm, KVM_CREATE_VM, 0));
    g.ram = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memcpy(g.ram, code, size);
    struct kvm_userspace_memory_region region = { .guest_phys_addr = 0x1000, .memory_size = 4096,
                                                  .userspace_addr = (uintptr_t)g.ram };
    CHECK(ioctl(g.vm, KVM_SET_USER_MEMORY_REGION, &region));
    g.vcpu = CHECK(ioctl(g.vm, KVM_CREATE_VCPU, 0));
    g.run_size = CHECK(ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0));
    g.run = mmap(NULL, g.run_size, PROT_READ | PROT_WRITE, MAP_SHARED, g.vcpu, 0);
    struct kvm_sregs sregs;
    CHECK(ioctl(g.vcpu, KVM_GET_SREGS, &sregs));
    sregs.cs.base = sregs.cs.selector = 0;
    CHECK(ioctl(g.vcpu, KVM_SET_SREGS, &sregs));
    struct kvm_regs regs = { .rip = 0x1000, .rflags = 2 };
    CHECK(ioctl(g.vcpu, KVM_SET_REGS, &regs));
    return g;
}

static void destroy(struct guest *g)
{
    munmap(g->run, g->run_size);
    munmap(g->ram, 4096);
    close(g->vcpu);
    close(g->vm);
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    long n = atol(argv[2]);
    int kvm = CHECK(open("/dev/kvm", O_RDWR | O_CLOEXEC));
    volatile unsigned long sum = 0;
    double start;
    if (!strcmp(argv[1], "exits")) {
        struct guest g = create(kvm, "\xe6\x80\xeb\xfc", 4); /* again: out 0x80,al  jmp again */
        start = now();
        for (long i = 0; i < n; i++) {
            CHECK(ioctl(g.vcpu, KVM_RUN, 0));
            if (g.run->exit_reason != KVM_EXIT_IO)
                return 1;
            sum += *((uint8_t *)g.run + g.run->io.data_offset);
        }
        printf("%.9f\n", now() - start);
        destroy(&g);
    } else {
        start = now();
        for (long i = 0; i < n; i++) {
            struct guest g = create(kvm, "\xf4", 1);
            CHECK(ioctl(g.vcpu, KVM_RUN, 0));
            if (g.run->exit_reason != KVM_EXIT_HLT)
                return 1;
            destroy(&g);
        }
        printf("%.9f\n", now() - start);
    }
    return 0;
}
