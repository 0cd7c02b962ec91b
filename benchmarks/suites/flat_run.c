/* SPDX-License-Identifier: Apache-2.0 */
/* Runs flat pieces of user code, each in a process of its own until its HLT, and compares registers at the end.
 *
 *     flat_run PACK
 *
 * PACK is written by fex.py, which describes its form. A traced child maps the memory, gets all its registers
 * set from outside, and runs; HLT is a fault in user mode, and then the parent reads the registers. So the same
 * program is the judge on the host, and in guests. */
#define _GNU_SOURCE
#include <asm/ldt.h>
#include <elf.h>
#include <errno.h>
#include <fcntl.h>
#include <inttypes.h>
#include <signal.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/ptrace.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <unistd.h>

enum {
    NUM_RIP, NUM_R15 = 16, NUM_XMM0, NUM_XMM15 = 32, NUM_GS, NUM_FS, NUM_MM0, NUM_MM7 = 42,
    CODE = 0x10000, SECONDS = 20,
    XSAVE_FSW = 2, XSAVE_ST = 32, XSAVE_XMM = 160, XSAVE_BV = 512, XSAVE_YMM = 576, XSAVE_ROOM = 16384,
    USER32_CS = 0x23, USER_CS = 0x33, USER_DS = 0x2b,
};

static const uint64_t STACK32 = 0xc0000000;
static const uint8_t *at, *end;

static const void *take(size_t n)
{
    if ((size_t)(end - at) < n) {
        puts("the pack is truncated");
        exit(2);
    }
    const uint8_t *p = at;
    at += n;
    return p;
}

static uint32_t take32(void) { uint32_t v; memcpy(&v, take(4), 4); return v; }
static uint64_t take64(void) { uint64_t v; memcpy(&v, take(8), 8); return v; }

struct test {
    char name[256], needs[64];
    uint32_t bits, code_size, regions, datas, expects;
    const uint8_t *code, *region, *data, *expect;
};

/* Word lists and numbers of the next test; false at the end of the pack. */
static bool next_test(struct test *t)
{
    if (at == end)
        return false;
    uint32_t n = take32();
    snprintf(t->name, sizeof t->name, "%.*s", (int)n, (const char *)take(n));
    n = take32();
    snprintf(t->needs, sizeof t->needs, "%.*s", (int)n, (const char *)take(n));
    t->bits = take32();
    t->code_size = take32();
    t->code = take(t->code_size);
    t->regions = take32();
    t->region = take(t->regions * 16);
    t->datas = take32();
    t->data = at;
    for (uint32_t i = 0; i < t->datas; i++) {
        take64();
        take(take32());
    }
    t->expects = take32();
    t->expect = at;
    for (uint32_t i = 0; i < t->expects; i++) {
        take32();
        take(8 * take32());
    }
    return true;
}

static void map(uint64_t address, uint64_t size)
{
    size = (size + 4095) & ~4095ull;
    int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE;
    if (mmap((void *)address, size, PROT_READ | PROT_WRITE | PROT_EXEC, flags, -1, 0) == MAP_FAILED) {
        printf("cannot map %#" PRIx64 ": %s\n", address, strerror(errno));
        exit(3);
    }
}

/* Descriptor 2 of the LDT (selector 0x17): all memory, which FEX's 32-bit tests load into DS and ES. */
static void make_descriptor(void)
{
    struct user_desc flat = {.entry_number = 2, .limit = 0xfffff, .seg_32bit = 1, .limit_in_pages = 1};
    if (syscall(SYS_modify_ldt, 0x11, &flat, sizeof flat)) {
        printf("no LDT: %s\n", strerror(errno));
        exit(3);
    }
}

static void child(const struct test *t)
{
    map(0xe0000000, 10 * 4096);
    map(0xe8000000 - 4096, 2 * 4096);
    map(CODE, t->code_size);
    memcpy((void *)(uintptr_t)CODE, t->code, t->code_size);
    for (uint32_t i = 0; i < t->regions; i++) {
        uint64_t region[2];
        memcpy(region, t->region + 16 * i, 16);
        map(region[0], region[1]);
    }
    if (t->bits == 32) {
        map(STACK32, 4096);
        make_descriptor();
    }
    at = t->data;
    for (uint32_t i = 0; i < t->datas; i++) {
        uint64_t address = take64();
        uint32_t n = take32();
        memcpy((void *)address, take(n), n);
    }
    ptrace(PTRACE_TRACEME, 0, 0, 0);
    raise(SIGSTOP);
    _exit(4);
}

static uint8_t xsave[XSAVE_ROOM];

static bool start(pid_t pid, const struct test *t)
{
    struct user_regs_struct r;
    if (ptrace(PTRACE_GETREGS, pid, 0, &r))
        return false;
    uint64_t cs = t->bits == 32 ? USER32_CS : USER_CS;
    uint64_t data = t->bits == 32 ? USER_DS : 0;
    r = (struct user_regs_struct){.rip = CODE, .cs = cs, .ss = USER_DS, .ds = data, .es = data, .eflags = 0x202,
                                  .orig_rax = -1, .rsp = t->bits == 32 ? STACK32 + 4096 : 0};
    if (ptrace(PTRACE_SETREGS, pid, 0, &r))
        return false;
    struct iovec v = {xsave, sizeof xsave};
    if (ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, &v))
        return false;
    uint64_t none = 0;
    memset(xsave, 0, 464);               /* the legacy area, but not what the kernel keeps behind it */
    xsave[0] = 0x7f, xsave[1] = 0x03;    /* FCW 0x37f */
    xsave[24] = 0x80, xsave[25] = 0x1f;  /* MXCSR 0x1f80 */
    memcpy(xsave + XSAVE_BV, &none, 8);  /* everything in its initial state */
    xsave[XSAVE_BV] = 3;
    return !ptrace(PTRACE_SETREGSET, pid, NT_X86_XSTATE, &v);
}

static void read_register(const struct user_regs_struct *r, uint32_t reg, uint64_t value[4])
{
    const unsigned long long general[] = {r->rip, r->rax, r->rbx, r->rcx, r->rdx, r->rsi, r->rdi, r->rbp, r->rsp,
                                          r->r8, r->r9, r->r10, r->r11, r->r12, r->r13, r->r14, r->r15};
    memset(value, 0, 32);
    if (reg <= NUM_R15) {
        value[0] = general[reg];
    } else if (reg <= NUM_XMM15) {
        memcpy(value, xsave + XSAVE_XMM + 16 * (reg - NUM_XMM0), 16);
        if (xsave[XSAVE_BV] & 4)
            memcpy(value + 2, xsave + XSAVE_YMM + 16 * (reg - NUM_XMM0), 16);
    } else if (reg == NUM_GS) {
        value[0] = r->gs_base;
    } else if (reg == NUM_FS) {
        value[0] = r->fs_base;
    } else if (reg <= NUM_MM7) {  /* by number of the physical register */
        uint32_t top = xsave[XSAVE_FSW + 1] >> 3 & 7, st = (reg - NUM_MM0 - top) & 7;
        memcpy(value, xsave + XSAVE_ST + 16 * st, 16);
    }
}

static void judge(pid_t pid, const struct test *t)
{
    struct user_regs_struct r;
    struct iovec v = {xsave, sizeof xsave};
    memset(xsave, 0, sizeof xsave);
    if (ptrace(PTRACE_GETREGS, pid, 0, &r) || ptrace(PTRACE_GETREGSET, pid, NT_X86_XSTATE, &v)) {
        printf("not ok %s: its registers cannot be read: %s\n", t->name, strerror(errno));
        return;
    }
    int wrong = 0;
    at = t->expect;
    for (uint32_t i = 0; i < t->expects; i++) {
        uint32_t reg = take32(), n = take32();
        uint64_t value[4];
        read_register(&r, reg, value);
        for (uint32_t j = 0; j < n; j++) {
            uint64_t want = take64();
            if (j >= 4 || value[j] == want)
                continue;
            if (!wrong++)
                printf("not ok %s:", t->name);
            printf(" r%" PRIu32 "[%" PRIu32 "] %016" PRIx64 " want %016" PRIx64, reg, j, value[j], want);
        }
    }
    if (wrong)
        putchar('\n');
    else
        printf("ok %s\n", t->name);
}

static bool at_hlt(pid_t pid)
{
    struct user_regs_struct r;
    if (ptrace(PTRACE_GETREGS, pid, 0, &r))
        return false;
    errno = 0;
    long word = ptrace(PTRACE_PEEKTEXT, pid, r.rip, 0);
    return !errno && (word & 0xff) == 0xf4;
}

static void nothing(int signal) { (void)signal; }

/* Wait for the child, at most SECONDS; false when that is over. */
static bool wait_for(pid_t pid, int *status)
{
    alarm(SECONDS);
    bool done = waitpid(pid, status, 0) == pid;
    alarm(0);
    return done;
}

static void run(const struct test *t)
{
    fflush(stdout);
    pid_t pid = fork();
    int status = 0;
    if (!pid)
        child(t);
    if (!wait_for(pid, &status) || !WIFSTOPPED(status)) {
        printf("not ok %s: it did not start (status %#x)\n", t->name, status);
    } else if (!start(pid, t)) {
        printf("not ok %s: its registers cannot be set: %s\n", t->name, strerror(errno));
    } else {
        ptrace(PTRACE_CONT, pid, 0, 0);
        if (!wait_for(pid, &status)) {
            printf("not ok %s: no end within %d s\n", t->name, SECONDS);
        } else if (!WIFSTOPPED(status)) {
            printf("not ok %s: it ended with status %#x\n", t->name, status);
        } else if (WSTOPSIG(status) != SIGSEGV || !at_hlt(pid)) {
            struct user_regs_struct r = {0};
            ptrace(PTRACE_GETREGS, pid, 0, &r);
            printf("not ok %s: signal %d at %#llx\n", t->name, WSTOPSIG(status), r.rip);
        } else {
            judge(pid, t);
        }
    }
    kill(pid, SIGKILL);
    waitpid(pid, &status, 0);
}

/* The first of the words in `needs` that is no flag of the processor; NULL when all are. */
static const char *lacking(char *needs, const char *flags)
{
    char word[80];
    for (char *s = strtok(needs, " "); s; s = strtok(NULL, " ")) {
        snprintf(word, sizeof word, " %s ", s);
        if (!strstr(flags, word))
            return s;
    }
    return NULL;
}

int main(int argc, char **argv)
{
    static char info[65536];
    int fd = argc == 2 ? open(argv[1], O_RDONLY) : -1;
    struct stat st;
    if (fd < 0 || fstat(fd, &st)) {
        fprintf(stderr, "usage: flat_run PACK\n");
        return 2;
    }
    at = mmap(NULL, st.st_size, PROT_READ, MAP_PRIVATE, fd, 0);
    if (at == MAP_FAILED)
        return 2;
    end = at + st.st_size;
    FILE *f = fopen("/proc/cpuinfo", "r");
    size_t n = f ? fread(info, 1, sizeof info - 1, f) : 0;
    info[n] = 0;
    for (char *p = info; *p; p++)
        if (*p == '\n' || *p == '\t')
            *p = ' ';
    struct sigaction action = {.sa_handler = nothing};
    sigaction(SIGALRM, &action, NULL);
    struct test t;
    while (next_test(&t)) {
        const uint8_t *here = at;
        const char *lacks = lacking(t.needs, info);
        if (lacks)
            printf("skip %s: %s\n", t.name, lacks);
        else
            run(&t);
        at = here;
    }
    puts("all run");
    return 0;
}
