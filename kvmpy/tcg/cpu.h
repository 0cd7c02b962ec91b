/* SPDX-License-Identifier: Apache-2.0
 *
 * The contract of the software CPU: the state of one virtual processor, what its core offers to the machine
 * around it, and what it asks of that machine. Everybody in this directory includes this file.
 *
 *   machine half   vm.c vcpu state, run.c, slots, chips, clock: they see `struct cpu`, cpu_*() and implement tcg_*()
 *   core           decode, block, interp, ops_*, mmu, seg, excp: they see the same and implement cpu_*()
 *   handlers       include op.h (which includes this file, uop.h and mem.h) and define OP(name) functions
 *
 * Rules that all sides keep:
 *  - One host thread runs a cpu at a time (cpu_run). Others may touch only the fields marked "atomic" and call the
 *    functions marked "any thread".
 *  - While cpu_run() is not active the state is exact: `rip` and rflags (cpu_rflags) name the next instruction.
 *    Inside a handler RIP is c->bip + u->off; c->rip is stale there.
 *  - Faults leave a handler by longjmp (cpu_fault and every memory access may do that). So a handler reads all it
 *    needs and checks all it must before it changes anything the guest can see; it owns no locks and no heap then.
 *  - Input and output that the engine cannot answer leaves by longjmp too (cpu_run returns TCG_STOP_IO); when the
 *    answer is there the instruction runs again from its start and finds it in c->io ("replay", see struct cpu_io).
 */
#ifndef KVMPY_TCG_CPU_H
#define KVMPY_TCG_CPU_H

#include <pthread.h>
#include <setjmp.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the software CPU keeps guest registers in host byte order and needs a little-endian host"
#endif

#define likely(x) __builtin_expect(!!(x), 1)
#define unlikely(x) __builtin_expect(!!(x), 0)

enum { RAX, RCX, RDX, RBX, RSP, RBP, RSI, RDI, R8, R9, R10, R11, R12, R13, R14, R15 };
enum { SEG_ES, SEG_CS, SEG_SS, SEG_DS, SEG_FS, SEG_GS, SEG_TR, SEG_LDT, SEG_COUNT };

/* Exceptions, SDM vol. 3A table 6-1. */
enum { EXC_DE, EXC_DB, EXC_NMI, EXC_BP, EXC_OF, EXC_BR, EXC_UD, EXC_NM, EXC_DF, EXC_TS = 10, EXC_NP, EXC_SS, EXC_GP,
       EXC_PF, EXC_MF = 16, EXC_AC, EXC_MC, EXC_XM, EXC_VE, EXC_CP };

enum {
    FL_CF = 1 << 0, FL_PF = 1 << 2, FL_AF = 1 << 4, FL_ZF = 1 << 6, FL_SF = 1 << 7, FL_TF = 1 << 8, FL_IF = 1 << 9,
    FL_DF = 1 << 10, FL_OF = 1 << 11, FL_IOPL = 3 << 12, FL_NT = 1 << 14, FL_RF = 1 << 16, FL_VM = 1 << 17,
    FL_AC = 1 << 18, FL_VIF = 1 << 19, FL_VIP = 1 << 20, FL_ID = 1 << 21,
    FL_ARITH = FL_CF | FL_PF | FL_AF | FL_ZF | FL_SF | FL_OF,
};
#define CR0_PE (1u << 0)
#define CR0_MP (1u << 1)
#define CR0_EM (1u << 2)
#define CR0_TS (1u << 3)
#define CR0_ET (1u << 4)
#define CR0_NE (1u << 5)
#define CR0_WP (1u << 16)
#define CR0_AM (1u << 18)
#define CR0_NW (1u << 29)
#define CR0_CD (1u << 30)
#define CR0_PG (1u << 31)
#define CR4_VME (1u << 0)
#define CR4_PVI (1u << 1)
#define CR4_TSD (1u << 2)
#define CR4_DE (1u << 3)
#define CR4_PSE (1u << 4)
#define CR4_PAE (1u << 5)
#define CR4_MCE (1u << 6)
#define CR4_PGE (1u << 7)
#define CR4_PCE (1u << 8)
#define CR4_OSFXSR (1u << 9)
#define CR4_OSXMMEXCPT (1u << 10)
#define CR4_UMIP (1u << 11)
#define CR4_LA57 (1u << 12)
#define CR4_FSGSBASE (1u << 16)
#define CR4_PCIDE (1u << 17)
#define CR4_OSXSAVE (1u << 18)
#define CR4_SMEP (1u << 20)
#define CR4_SMAP (1u << 21)
#define CR4_PKE (1u << 22)
#define EFER_SCE (1u << 0)
#define EFER_LME (1u << 8)
#define EFER_LMA (1u << 10)
#define EFER_NXE (1u << 11)
#define EFER_FFXSR (1u << 14)

/* A segment register with its hidden part. `attr` is descriptor bits 40..55 shifted down to bit 0 (SDM vol. 3A 3.4.5),
 * the same layout as VMX access rights: type 0-3, S 4, DPL 5-6, P 7, AVL 12, L 13, D/B 14, G 15, and unusable at 16. */
struct segment {
    uint64_t base;
    uint32_t limit; /* in bytes, G already applied */
    uint32_t attr;
    uint16_t sel;
};
#define ATTR_TYPE 0xfu
#define ATTR_S (1u << 4)
#define ATTR_DPL_SHIFT 5
#define ATTR_P (1u << 7)
#define ATTR_L (1u << 13)
#define ATTR_DB (1u << 14)
#define ATTR_G (1u << 15)
#define ATTR_UNUSABLE (1u << 16)

struct dtable { uint64_t base; uint16_t limit; };

union vec { /* a vector register; bits above MAXVL are kept but never announced */
    uint8_t b[64]; uint16_t w[32]; uint32_t d[16]; uint64_t q[8]; float f[16]; double df[8];
};

/* x87: physical registers, ST(i) is r[(top + i) & 7]; MMi is the low 64 bits of r[i]. `sw` holds no TOP, it is in `top`. */
struct x87 {
    union { struct { uint64_t mant; uint16_t exp; }; uint8_t raw[16]; } r[8];
    uint16_t cw, sw, fop;
    uint8_t top;
    uint8_t valid; /* bit i set: physical register i is not empty */
    uint64_t fip, fdp;
    uint16_t fcs, fds;
};

/* ---- softTLB: see tlb.c. Offsets and sizes here are known to the JIT. ---- */
#define TLB_BITS 13 /* direct-mapped: with 2048 entries two thirds of a shell's misses were pages that met */
#define TLB_SIZE (1u << TLB_BITS)
/* In a tag: never equal to a page address, nor to one with some of the lowest five bits, which the JIT leaves in to see a
 * misaligned vector; so the access takes the slow path. */
#define TLB_INVALID 0x800ull
struct tlb_entry {
    uint64_t rd, wr, ex;  /* linear page address that may be accessed so, or one with low bits set */
    uintptr_t addend;     /* host address = linear address + addend */
};
/* guest page, size of the mapping as a power of two, 1 + protection key or 0 where PKRU does not count */
struct tlb_info { uint64_t gpa; uint8_t shift, key; };
enum { MMU_USER, MMU_KERNEL, MMU_KERNEL_AC, MMU_USER_AC, MMU_COUNT }; /* KERNEL: SMAP holds; _AC: EFLAGS.AC is set */
struct tlb {
    struct tlb_entry e[TLB_SIZE];
    struct tlb_info info[TLB_SIZE];
    uint64_t used[TLB_SIZE / 64], local[TLB_SIZE / 64]; /* filled entries; those of them that a MOV CR3 drops */
    uint64_t large[TLB_SIZE / 64];  /* entries that are parts of large pages: INVLPG drops all parts */
    uint64_t large_lo, large_hi;    /* linear range that they cover */
};
/* Where a page walk may begin: for 2 MiB of linear addresses, the page table, or the large page (paging.c). */
#define WALK_CACHE 128
struct walk_start {
    uint64_t tag;    /* linear address >> 21 */
    uint64_t stamp;  /* valid while it is c->walk_stamp[global] */
    uint64_t rights; /* of all levels above, and of the large page */
    uint64_t entry;  /* large page: its entry; else the page table's guest address */
    uint8_t *host;   /* of the page table; NULL: this is a large page */
    uint8_t shift;   /* of the large page */
    bool global;
};

struct block;
struct uop;
struct link;
struct block_cache;
struct tcg_vm_core;
struct jit;

/* ---- why cpu_run() came back ---- */
enum tcg_stop {
    TCG_STOP_CANCEL,   /* CPU_REQ_EXIT was set: look at whatever made you set it and call cpu_run() again */
    TCG_STOP_IO,       /* c->io describes a port or memory access, or an MSR access, for user space */
    TCG_STOP_HLT,      /* HLT completed (RIP is behind it): wait for a line, then cpu_run() again */
    TCG_STOP_SHUTDOWN, /* triple fault */
    TCG_STOP_DEBUG,    /* c->debug_exit is filled; guest debug wanted this #DB or #BP */
    TCG_STOP_WINDOW,   /* c->want_window and the guest can take an interrupt now */
    TCG_STOP_HYPERCALL,/* VMCALL/VMMCALL with a number that tcg_hypercall() passed on */
    TCG_STOP_HANDBACK, /* emulation assist: c->assist_left is 0, it ran out; else the next instruction is the machine's */
    TCG_STOP_MWAIT,    /* MWAIT (RIP is behind it): wait until `monitor` is 0 or an interrupt comes; any wake-up will do */
    TCG_STOP_ERROR,    /* the core cannot go on; c->error_text says why. -> KVM_EXIT_INTERNAL_ERROR */
};

/* One access for user space. Life: the core fills it and stops with state WANT; run.c fills kvm_run, and on the next
 * KVM_RUN copies the answer into data[] (reads), sets `error` (MSRs) and state DONE, then calls cpu_run(). The core
 * runs the instruction again, alone, and takes up to CPU_IO_MAX answers in order. cpu_io_forget() drops them, for
 * when user space moved RIP meanwhile. */
enum cpu_io_kind { IO_PIO_IN, IO_PIO_OUT, IO_MMIO_READ, IO_MMIO_WRITE, IO_RDMSR, IO_WRMSR };
enum cpu_io_state { IO_IDLE, IO_WANT, IO_DONE };
#define CPU_IO_MAX 8
struct cpu_io {
    uint8_t kind, state, size; /* size: bytes per item (1, 2, 4; MMIO 1..8) */
    uint8_t error;             /* answer to an MSR access: nonzero raises #GP */
    uint32_t count;            /* items; > 1 only for string I/O */
    uint64_t addr;             /* port, GPA or MSR number */
    uint32_t reason;           /* MSR: KVM_MSR_EXIT_REASON_*, as tcg_rdmsr()/tcg_wrmsr() left it in msr_reason */
    uint8_t data[4096];        /* items; a value in host byte order */
    uint32_t answered;         /* answers below that the running instruction may still take */
    uint32_t taken;
    struct { uint8_t kind, size, error; uint32_t count; uint64_t addr, data; } past[CPU_IO_MAX];
};

/* ---- requests: bits of cpu.request, set by any thread, looked at between blocks ---- */
enum {
    CPU_REQ_EXIT = 1 << 0,   /* leave cpu_run() with TCG_STOP_CANCEL */
    CPU_REQ_LINES = 1 << 1,  /* cpu.lines changed or became deliverable */
    CPU_REQ_TLB = 1 << 2,    /* flush the softTLB (slots or dirty logging changed) */
    CPU_REQ_CODE = 1 << 3,   /* guest code was written: drain cpu.inval */
    CPU_REQ_STEP = 1 << 4,   /* TF, guest debug, interrupt shadow: run instruction by instruction (core only) */
};
/* ---- lines: level of the interrupt inputs, any thread ---- */
/* LINE_NMI2: one more NMI, which came before the first was taken. On a processor the first would be running by then. */
enum { LINE_INTR = 1 << 0, LINE_NMI = 1 << 1, LINE_NMI2 = 1 << 2 };

/* Writes to guest code by others, drained at the next block boundary; overflow forgets all code. */
#define INVAL_MAX 64
struct inval { uint64_t gpa, size; };

struct cpu {
    /* -- reached by byte offset from micro-ops: uop.d/s/x/base/index. Keep below 256, keep the order. -- */
    uint64_t gpr[16];    /* 0 */
    uint64_t zero;       /* 128: base or index of an address that has none */
    uint64_t bip;        /* 136: RIP of the first byte of the running block; base of RIP-relative addresses */
    uint64_t scratch[3]; /* 144: values between the micro-ops of one instruction */
    uint64_t segbase[6]; /* 168: what to add to an offset; 0 for ES CS SS DS in 64-bit mode */
    uint16_t cc;         /* 216: arithmetic flags as LAHF/SETO give them: bits 8..15 SF ZF 0 AF 0 PF 1 CF, bit 0 OF */
    _Atomic uint32_t request; /* 220 */
    uint64_t ipmask;     /* 224: ~0, 0xffffffff or 0xffff by code size */
    struct tlb *tlb;     /* 232: data accesses at the present CPL and AC */
    int64_t budget;      /* 240: instructions until the loop gets a look; counted down per block */
    struct block *block; /* 248: running block, NULL outside */

    struct tlb *xtlb;      /* 256: code fetches: by CPL only */

    uint64_t rip;      /* exact outside cpu_run */
    uint32_t sysflags; /* RFLAGS without the arithmetic flags, bit 1 set; DF is here */
    uint32_t mode;     /* MODE_*: what a decoded block depends on (uop.h) */
    uint8_t cpl;
    uint8_t shadow;    /* interrupt shadow: SHADOW_* for the next instruction */
    bool nmi_masked, halted;
    uint64_t stack_mask; /* 0xffff, 0xffffffff, ~0 by SS.B and mode */

    struct segment seg[SEG_COUNT];
    struct dtable gdt, idt;
    uint64_t cr0, cr2, cr3, cr4, cr8, efer;
    uint64_t pdpte[4]; /* PAE paging loads them at MOV CR3 */
    uint64_t dr[8];
    uint64_t xcr0, xss;
    uint32_t mxcsr, pkru;

    struct x87 fpu;
    union vec v[32] __attribute__((aligned(64))); /* xmm/ymm/zmm */

    /* MSRs that the core itself reads or writes; all others belong to the machine (msr.c) */
    uint64_t star, lstar, cstar, fmask, kernel_gs_base, tsc_aux;
    uint64_t sysenter_cs, sysenter_esp, sysenter_eip;
    uint64_t pat, apic_base, misc_enable;

    /* Events of KVM_SET_VCPU_EVENTS: delivered first thing in cpu_run(). */
    struct {
        bool exc, has_error; uint8_t vector; uint32_t error; /* exception */
        bool intr, soft; uint8_t intr_vector;                /* interrupt that was acknowledged but not delivered */
        bool nmi;
    } inject;
    bool in_delivery;      /* an event is being delivered: faults now combine into #DF */
    uint8_t delivery_vector;
    bool want_window;      /* run.c: stop when an interrupt can be taken */

    struct { uint32_t flags; uint64_t dr[8]; } guest_debug; /* KVM_SET_GUEST_DEBUG: KVM_GUESTDBG_* and DR0-7 */
    struct { uint32_t exception; uint64_t pc, dr6, dr7; } debug_exit;
    struct cpu_io io;
    uint32_t msr_reason;
    const char *error_text;

    _Atomic uint32_t lines;
    _Atomic uint64_t monitor; /* MONITOR: physical address of the line, bit 0 set; 0: not armed, or written since */
    bool mwait_break;      /* MWAIT with ECX[0]: an interrupt ends it although IF is 0 */
    uint32_t assist_left;  /* emulation assist: instructions to run before TCG_STOP_HANDBACK; 0: no limit */
    bool assist_partial;   /* XCR0 of the assisted guest has components that are not even carried: no XSAVE family */
    bool assist_leads;     /* ... and this processor is the guest's: CPUID, RDTSC and #UD are its own business */
    uint64_t carried, carried_inuse; /* XSAVE components kept as bytes for the assisted processor (xstate.h), by XCR0 bit */
    uint8_t *carried_area; /* standard format */
    uint64_t insns_end;    /* cpu_insns() when budget reaches 0 */
    uint64_t deadline;     /* deterministic mode: TCG_STOP_CANCEL when cpu_insns() reaches this; ~0: never */
    const volatile uint8_t *immediate_exit; /* &run->immediate_exit, polled every 2^16 instructions; may be NULL */

    struct tlb tlbs[MMU_COUNT];
    struct block_cache *cache;
    pthread_mutex_t inval_lock; /* protects inval, inval_count */
    struct inval inval[INVAL_MAX];
    uint32_t inval_count;       /* > INVAL_MAX: overflow */

    struct link *link;     /* the exit that the loop may connect to the next block */
    enum tcg_stop stop;    /* what an escape with ESCAPE_STOP returns */
    struct { uint8_t vector; bool has_error, soft, trap; uint32_t error; } exc; /* what an escape with ESCAPE_FAULT delivers */
    bool step_trap;        /* TF was set when the instruction began */
    bool event_taken;      /* the instruction delivered an event: no single-step trap after it */
    bool watching;         /* data breakpoints are armed: all data accesses take the slow path */
    bool btf;              /* IA32_DEBUGCTL.BTF: TF traps after taken branches only */
    uint8_t watch_hit;     /* DR6 bits of data breakpoints that the running instruction hit */
    struct { uint64_t gpa; uint8_t *host; } pt_cache[64]; /* page-table pages: the walker's way to host memory */
    struct walk_start walks[WALK_CACHE];
    uint64_t walk_stamp[2], walk_stamps; /* of local and global walk starts; how many stamps were given out */
    bool walks_huge;       /* a 1 GiB page may have several walk starts */
    jmp_buf escape;        /* out of a handler, to cpu_run's loop */
    const struct uop *cur; /* the instruction that faulted */
    struct {               /* jit.h */
        struct jit *state;      /* NULL: there is none */
        uint64_t page;          /* linear address of the page that host code runs in */
        uint64_t context, serial; /* what the present mode and address translations are called */
        struct tlb *gs;         /* the host's GS base; NULL: it is not ours yet */
        bool stop;              /* the running code has been forgotten */
        bool once;              /* the next block is the interpreter's */
        struct {                /* jit_x87.c */
            bool live;          /* registers, tags and status are in the host's unit, not in fpu */
            bool fip_written;   /* since then: fpu.fcs shall be CS */
            uint8_t fdp_segment; /* fpu.fds shall be segment n - 1 */
        } x87;
    } jit;

    struct { const struct uop *u; uint8_t mmu; } edge; /* ea.c: who came near a segment's limit; c->tlb before that */
    struct pcid_bags *pcid_bags; /* pcid.c: TLB entries of other address spaces */

    struct kvm_cpuid_entry2 *cpuid; /* table of KVM_SET_CPUID2, owned by the machine half */
    uint32_t cpuid_count;
    uint64_t features[2];  /* FEAT_* that the table announces: gates of the decoder (cpu_update_features) */
    uint8_t phys_bits, linear_bits;
    uint32_t index;        /* vcpu id */
    struct tcg_vm_core *vm;
    void *machine;         /* the machine half's own vCPU */
    struct { uint64_t tlb_miss, walks, blocks, flushes, smc, lookups, faults, irqs, slow, jit_blocks, jit_insns, jit_helpers, jit_links, jit_joined; } stat;
};

/* ---- what the core needs of a VM; the machine half embeds this first in its own struct tcg_vm ---- */
#define TCG_MAX_CPUS 256
struct tcg_vm_core {
    pthread_mutex_t lock;               /* protects cpu[], ncpu */
    struct cpu *cpu[TCG_MAX_CPUS];
    _Atomic uint32_t ncpu;
    bool deterministic;                 /* time from instruction counts, RDRAND from `seed` */
    uint64_t seed;
};

/* A page of guest memory as the slots know it. */
enum { PAGE_RAM = 1, PAGE_READONLY = 2, PAGE_LOG = 4 /* dirty logging: tell tcg_mark_dirty() */ };
struct page_info {
    uint8_t *host;         /* of the 4 KiB page; NULL: nothing there, accesses are MMIO */
    _Atomic uint64_t *code;/* bit n: bytes 64n..64n+63 of the page were decoded by some vCPU (slot array, zero at first) */
    uint32_t flags;
};

/* ==== implemented by the machine half; called on the vCPU's thread ==== */
void tcg_phys_to_host(struct tcg_vm_core *vm, uint64_t gpa, struct page_info *page); /* gpa: page aligned */
void tcg_mark_dirty(struct cpu *c, uint64_t gpa);        /* first write to this page of a PAGE_LOG slot since the last call of
                                                            cpu_flush_tlb(); later writes to it are not reported again */
/* In-engine chips. true: answered. false: user space must (the core stops with TCG_STOP_IO). */
bool tcg_pio(struct cpu *c, uint16_t port, unsigned size, bool write, uint32_t *value);
bool tcg_mmio(struct cpu *c, uint64_t gpa, unsigned size, bool write, uint64_t *value);
/* 0: done; 1: #GP; 2: user space (c->msr_reason says why). They call cpu_set_efer() etc. for what the core owns. */
int tcg_rdmsr(struct cpu *c, uint32_t index, uint64_t *value);
int tcg_wrmsr(struct cpu *c, uint32_t index, uint64_t value);
int tcg_ack_interrupt(struct cpu *c);                    /* vector of the interrupt to take now, -1: none after all */
void tcg_cr8_changed(struct cpu *c);                     /* c->cr8 was written by the guest (TPR) */
uint64_t tcg_read_cr8(struct cpu *c);
uint64_t tcg_rdtsc(struct cpu *c);
bool tcg_hypercall(struct cpu *c);                       /* false: TCG_STOP_HYPERCALL */
void tcg_wake(struct cpu *c);                            /* any thread: the line that it may wait for in MWAIT was written */

/* ==== implemented by the core ==== */
int cpu_init(struct cpu *c, struct tcg_vm_core *vm, uint32_t index); /* power-on state; 0 or -errno */
void cpu_free(struct cpu *c);
void cpu_reset(struct cpu *c, bool init);  /* init: INIT# keeps what SDM vol. 3A table 9-1 keeps */
enum tcg_stop cpu_run(struct cpu *c);      /* until there is a reason to stop */
void cpu_io_forget(struct cpu *c);
/* The next cpu_run() is an emulation assist of about `count` instructions. */
enum {
    ASSIST_PARTIAL = 1, /* c->assist_partial */
    ASSIST_LEADS = 2,   /* c->assist_leads */
    ASSIST_KEEP = 4,    /* all writes to code since the last stretch were told: what is decoded stays */
};
void cpu_assist(struct cpu *c, uint32_t count, uint32_t flags);
/* Whether the assisted processor is to run what this one does not know or need not know. */
static inline bool cpu_only_helps(const struct cpu *c) { return c->assist_left && !c->assist_leads; }
/* No other vCPU can see its memory in the middle of an access. Beside an assisted processor there may be more of those. */
static inline bool cpu_is_alone(const struct cpu *c)
{
    return !c->assist_left && (!c->vm || atomic_load_explicit(&c->vm->ncpu, memory_order_relaxed) < 2);
}

/* Instructions executed so far; exact where a block ends (RDTSC ends one). */
static inline uint64_t cpu_insns(const struct cpu *c) { return c->insns_end - (uint64_t)c->budget; }
uint64_t cpu_rflags(const struct cpu *c);  /* outside handlers, or inside those that end a block */
void cpu_set_rflags(struct cpu *c, uint64_t rflags);
/* After writing state from outside (KVM_SET_SREGS...): recompute what is derived (mode, segbase, tlb, masks). */
void cpu_update(struct cpu *c);
void cpu_update_features(struct cpu *c);   /* after c->cpuid changed */
void cpu_cpuid(struct cpu *c, uint32_t leaf, uint32_t subleaf, uint32_t out[4]);
/* KVM_GET_SUPPORTED_CPUID: fills up to `max` entries, returns how many there are. */
uint32_t cpu_supported_cpuid(struct kvm_cpuid_entry2 *entries, uint32_t max);

/* Writes by the guest or user space; checks as the instruction does. 0 or a nonzero "raise #GP(0)". */
int cpu_set_cr0(struct cpu *c, uint64_t v);
int cpu_set_cr3(struct cpu *c, uint64_t v);
int cpu_set_cr4(struct cpu *c, uint64_t v);
int cpu_set_efer(struct cpu *c, uint64_t v);
int cpu_set_xcr0(struct cpu *c, uint64_t v);
void cpu_set_segbase(struct cpu *c, int seg, uint64_t base); /* MSR_FS_BASE, MSR_GS_BASE */

/* Bases in MSRs, descriptor tables and hidden parts of segments may be as wide as the processor can do, whatever CR4.LA57
 * says at the moment (SDM vol. 1 3.3.7.1 leaves that to the processor; Intel's do so, and Linux' KVM too). */
static inline bool cpu_canonical_base(const struct cpu *c, uint64_t a)
{
    unsigned s = 64 - c->linear_bits;
    return (uint64_t)((int64_t)(a << s) >> s) == a;
}
/* KVM_TRANSLATE: no side effects. Returns false when not mapped. */
bool cpu_translate(struct cpu *c, uint64_t linear, uint64_t *gpa, bool *writable, bool *user);

/* For a profiler (profile.h): on or off; the requests beyond KVM's, ENOTTY for others. */
long cpu_profile(struct cpu *c, bool on);
long cpu_profile_ioctl(struct cpu *c, unsigned long request, void *p);

void cpu_flush_tlb(struct cpu *c);         /* own thread or not running */
void cpu_set_pkru(struct cpu *c, uint32_t value); /* likewise */
void cpu_flush_code(struct cpu *c);
/* any thread: */
static inline void cpu_request(struct cpu *c, uint32_t bits) { atomic_fetch_or(&c->request, bits); }
void cpu_raise(struct cpu *c, uint32_t line);
void cpu_lower(struct cpu *c, uint32_t line);
void cpu_nmi(struct cpu *c); /* an NMI arrives; two can wait (see LINE_NMI2) */
/* [gpa, gpa+size) was written; all vCPUs forget code decoded from it. `self` may be NULL (writer is not a vCPU). */
void cpu_code_written(struct tcg_vm_core *vm, struct cpu *self, uint64_t gpa, uint64_t size);

/* True when INTR could be taken at the next instruction boundary (kvm_run.ready_for_interrupt_injection). */
static inline bool cpu_interruptible(const struct cpu *c) { return (c->sysflags & FL_IF) && !c->shadow && !c->inject.intr; }

/* XSAVE area in the standard format (SDM vol. 1, 13.4); T: `size` >= 832 for AVX. For KVM_GET/SET_XSAVE and the ops. */
void cpu_xsave_store(const struct cpu *c, uint8_t *area, uint64_t rfbm);
int cpu_xsave_load(struct cpu *c, const uint8_t *area, uint64_t rfbm); /* 0 or "raise #GP" */

/* ---- for handlers: leave by exception (never return) ---- */
struct uop;
_Noreturn void cpu_fault(struct cpu *c, const struct uop *u, unsigned vector);                    /* no error code */
_Noreturn void cpu_fault_code(struct cpu *c, const struct uop *u, unsigned vector, uint32_t code);
enum { SHADOW_STI = 1, SHADOW_MOVSS = 2 };

_Static_assert(offsetof(struct cpu, zero) == 128 && offsetof(struct cpu, bip) == 136, "micro-ops hold these offsets");
_Static_assert(offsetof(struct cpu, block) == 248, "hot state must stay within reach of a byte offset");

#endif
