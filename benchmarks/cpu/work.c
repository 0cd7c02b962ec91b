/* SPDX-License-Identifier: Apache-2.0
 * The guest workloads: as the first program of a guest, or on the host to compare.
 *   work off                      power off at once (what a boot costs)
 *   work scale REPEATS            one worker, then two on two processors: bench: workers COUNT SECONDS
 *   work run REPEATS BUSYBOX [NAME...]  each workload REPEATS times, or only those named; then, as process 1, power off
 * For each time that a workload runs there are two lines; RESULT must be the same everywhere:
 *   bench: ready NAME             then it waits for a line, so that the host can look at its own clocks
 *   bench: NAME SECONDS RESULT
 * All are between two lines that tell the guest's clock, so that the host can check it; then it waits once more:
 *   bench: begin SECONDS          bench: end SECONDS
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <immintrin.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/reboot.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define ARRAY(x) (sizeof(x) / sizeof((x)[0]))
#define MIB ((size_t)1 << 20)
/* The compiler must take `x` for read and changed here. */
#define OPAQUE(x) __asm__ volatile("" : "+r"(x) : : "memory")

static const char *busybox;

static void check(int good, const char *what)
{
    if (!good) {
        perror(what);
        fflush(NULL);
        exit(1);
    }
}

static double now(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec + t.tv_nsec / 1e9;
}

static void wait_for_line(void)
{
    char byte = 0;
    while (byte != '\n')
        check(read(STDIN_FILENO, &byte, 1) == 1, "standard input");
}

static uint64_t xorshift(uint64_t *state)
{
    uint64_t x = *state;
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    return *state = x;
}

static uint64_t bits(double x)
{
    uint64_t u;
    memcpy(&u, &x, sizeof u);
    return u;
}

/* What it costs to start a workload and to tell of it; the host subtracts it. */
static uint64_t nothing(void)
{
    return 0;
}

/* Integer registers only. */
static uint64_t integer(void)
{
    uint64_t x = 88172645463325252u, sum = 0;
    for (int i = 0; i < 4000000; i++)
        sum += xorshift(&x);
    return sum;
}

/* Byte loads and stores over more than a level-1 cache. */
static uint64_t sieve(void)
{
    enum { N = 2000000 };
    static uint8_t composite[N + 1];
    uint8_t *c = composite;
    uint64_t count = 0;
    memset(c, 0, N + 1);
    OPAQUE(c);
    for (uint32_t i = 2; i <= N; i++) {
        if (c[i])
            continue;
        count++;
        for (uint64_t j = (uint64_t)i * i; j <= N; j += i)
            c[j] = 1;
    }
    return count;
}

/* Loads that wait for one another and touch a new page nearly every time. */
static uint64_t chase(void)
{
    enum { N = 1 << 19 };
    static uint32_t next[N];
    static int ready;
    if (!ready) {
        uint64_t seed = 1;
        for (uint32_t i = 0; i < N; i++)
            next[i] = i;
        for (uint32_t i = N - 1; i > 0; i--) {  /* Sattolo: one cycle through all */
            uint32_t j = xorshift(&seed) % i, t = next[i];
            next[i] = next[j], next[j] = t;
        }
        ready = 1;
    }
    uint32_t at = 0;
    for (int i = 0; i < 500000; i++)
        at = next[at];
    return at;
}

/* What libc's memcpy does for blocks of all sizes. */
static uint64_t copy(void)
{
    static uint8_t from[4 * MIB], to[4 * MIB];
    uint8_t *f = from, *t = to;
    uint64_t sum = 0;
    for (size_t i = 0; i < sizeof from; i += 64)
        from[i] = (uint8_t)(i >> 6);
    for (int round = 0; round < 4; round++) {
        OPAQUE(f);
        memcpy(t, f, sizeof to);
        OPAQUE(t);
        for (size_t size = 1; size <= 4096; size += 61) {
            memcpy(t + size * 64, f + size * 32, size);
            OPAQUE(t);
        }
        sum += to[(size_t)round * 4096];
    }
    return sum + to[61 * 64 * 3];
}

static __attribute__((noinline, optimize("no-optimize-sibling-calls"))) uint64_t fibonacci(unsigned n)
{
    OPAQUE(n);  /* keeps the compiler from unrolling the recursion */
    return n < 2 ? n : fibonacci(n - 1) + fibonacci(n - 2);
}

static uint64_t calls(void)
{
    return fibonacci(29);
}

static int ascending(const void *a, const void *b)
{
    uint32_t x = *(const uint32_t *)a, y = *(const uint32_t *)b;
    return (x > y) - (x < y);
}

/* An indirect call for each comparison. */
static uint64_t sort(void)
{
    enum { N = 100000 };
    static uint32_t v[N];
    uint64_t seed = 7, sum = 0;
    for (int i = 0; i < N; i++)
        v[i] = (uint32_t)xorshift(&seed);
    qsort(v, N, sizeof v[0], ascending);
    for (int i = 0; i < N; i += 1000)
        sum = sum * 31 + v[i];
    return sum;
}

/* An interpreter: an indirect jump for each of its instructions. */
static uint64_t dispatch(void)
{
    static const void *const label[] = { &&add, &&xor, &&shift, &&mul, &&skip, &&loop };
    static uint8_t program[256];
    uint64_t seed = 3, a = 1, left = 12000;
    for (size_t i = 0; i + 1 < sizeof program; i++)
        program[i] = xorshift(&seed) % 5;
    program[sizeof program - 1] = 5;
    const uint8_t *p = program;
#define NEXT goto *label[*p++]
    NEXT;
add:   a += left; NEXT;
xor:   a ^= a >> 9; NEXT;
shift: a = a << 7 | a >> 57; NEXT;
mul:   a *= 0x9E3779B97F4A7C15u; NEXT;
skip:  a -= 3; NEXT;
loop:
    p = program;
    if (--left)
        NEXT;
#undef NEXT
    return a;
}

/* REP MOVS, STOS, CMPS and SCAS. */
static uint64_t rep(void)
{
    static uint8_t a[8192], b[8192];
    uint64_t sum = 0;
    for (int i = 0; i < 400; i++) {
        void *to = a, *from = a;
        size_t n = sizeof a;
        __asm__ volatile("rep stosb" : "+D"(to), "+c"(n) : "a"(i | 1) : "memory");
        a[sizeof a - 1 - i] = 0;
        to = b, n = sizeof a / 8;
        __asm__ volatile("rep movsq" : "+D"(to), "+S"(from), "+c"(n) : : "memory");
        to = b, from = a, n = 2048;
        __asm__ volatile("repe cmpsb" : "+D"(to), "+S"(from), "+c"(n) : : "memory", "cc");
        sum += n;
        to = b, n = sizeof b;
        __asm__ volatile("repne scasb" : "+D"(to), "+c"(n) : "a"(0) : "memory", "cc");
        sum = sum * 3 + n;
    }
    return sum;
}

/* libc's string functions on short strings. */
static uint64_t strings(void)
{
    static char text[64][100];
    uint64_t sum = 0;
    for (int i = 0; i < 64; i++) {
        memset(text[i], 'a' + i % 3, 20 + i);
        text[i][20 + i] = 0;
    }
    for (int round = 0; round < 1500; round++)
        for (int i = 0; i < 63; i++) {
            const char *s = text[i];
            OPAQUE(s);
            sum += strlen(s) + (strcmp(s, text[i + 1]) > 0) + (strchr(s, 'c') != NULL);
        }
    return sum;
}

static uint64_t print(void)
{
    char line[160];
    uint64_t sum = 0;
    for (int i = 0; i < 8000; i++) {
        int n = snprintf(line, sizeof line, "%d %08x %s %.3f %-10lu|", i, i * 77, "words", i * 0.37, (unsigned long)i);
        sum = sum * 31 + (uint64_t)n + (uint8_t)line[n / 2];
    }
    return sum;
}

/* Four floats at a time. */
static uint64_t sse(void)
{
    enum { N = 96 };
    static float a[N][N] __attribute__((aligned(16))), b[N][N] __attribute__((aligned(16)));
    static float c[N][N] __attribute__((aligned(16)));
    for (int i = 0; i < N * N; i++) {
        a[i / N][i % N] = (float)(i % 13) * 0.5f;
        b[i / N][i % N] = (float)(i % 7) - 3.0f;
        c[i / N][i % N] = 0;
    }
    for (int round = 0; round < 4; round++)
        for (int i = 0; i < N; i++)
            for (int j = 0; j < N; j += 4) {
                __m128 sum = _mm_load_ps(&c[i][j]);
                for (int k = 0; k < N; k++)
                    sum = _mm_add_ps(sum, _mm_mul_ps(_mm_set1_ps(a[i][k]), _mm_load_ps(&b[k][j])));
                _mm_store_ps(&c[i][j], sum);
            }
    uint64_t hash = 0;
    for (int i = 0; i < N * N; i += 5)
        hash = hash * 31 + bits(c[i / N][i % N]);
    return hash;
}

static uint64_t matrix(void)
{
    enum { N = 96 };
    static double a[N][N], b[N][N];
    double trace = 0;
    for (int i = 0; i < N * N; i++) {
        a[i / N][i % N] = i % 17 * 0.25;
        b[i / N][i % N] = i % 11 / 3.0;
    }
    for (int i = 0; i < N; i++)
        for (int j = 0; j < N; j++) {
            double sum = 0;
            for (int k = 0; k < N; k++)
                sum += a[i][k] * b[k][j];
            trace += i == j ? sum : sum * 1e-3;
        }
    return bits(trace);
}

/* Doubles with division and square root. */
static uint64_t nbody(void)
{
    enum { N = 5 };
    double at[N][3], speed[N][3], mass[N];
    for (int i = 0; i < N; i++) {
        mass[i] = 1.0 / (i + 1);
        for (int k = 0; k < 3; k++) {
            at[i][k] = i * 2.5 + k * 1.25 * (i % 2 ? 1 : -1);
            speed[i][k] = 0.01 * (i - k);
        }
    }
    for (int step = 0; step < 20000; step++) {
        for (int i = 0; i < N; i++)
            for (int j = i + 1; j < N; j++) {
                double d[3], square = 0.01;
                for (int k = 0; k < 3; k++) {
                    d[k] = at[i][k] - at[j][k];
                    square += d[k] * d[k];
                }
                double root = _mm_cvtsd_f64(_mm_sqrt_sd(_mm_setzero_pd(), _mm_set_sd(square)));
                double pull = 0.001 / (square * root);
                for (int k = 0; k < 3; k++) {
                    speed[i][k] -= d[k] * mass[j] * pull;
                    speed[j][k] += d[k] * mass[i] * pull;
                }
            }
        for (int i = 0; i < N; i++)
            for (int k = 0; k < 3; k++)
                at[i][k] += 0.001 * speed[i][k];
    }
    return bits(at[0][0]) ^ bits(at[4][2]);
}

/* Eight floats at a time; the target attribute makes it VEX code. */
static __attribute__((target("avx"))) uint64_t avx(void)
{
    enum { N = 4096 };
    static float x[N] __attribute__((aligned(32))), y[N] __attribute__((aligned(32)));
    for (int i = 0; i < N; i++) {
        x[i] = (float)(i % 19);
        y[i] = 1.0f;
    }
    for (int round = 0; round < 2000; round++) {
        __m256 factor = _mm256_set1_ps(0.001f * (float)round);
        for (int i = 0; i < N; i += 8) {
            __m256 product = _mm256_mul_ps(factor, _mm256_load_ps(x + i));
            _mm256_store_ps(y + i, _mm256_max_ps(_mm256_add_ps(product, _mm256_load_ps(y + i)), factor));
        }
    }
    uint64_t hash = 0;
    for (int i = 0; i < N; i += 7)
        hash = hash * 31 + bits(y[i]);
    return hash;
}

/* long double is what the x87 computes. */
static uint64_t x87(void)
{
    long double sum = 0, power = 1;
    for (int i = 1; i < 300000; i++) {
        power = power * 0.99999L + 1e-9L;
        sum += power / (i * (long double)i);
    }
    return bits((double)sum);
}

static uint64_t syscalls(void)
{
    for (int i = 0; i < 50000; i++)
        syscall(SYS_getppid);
    return 0;
}

static uint64_t faults(void)
{
    size_t size = 16 * MIB;
    uint8_t *at = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(at != MAP_FAILED, "mmap");
    madvise(at, size, MADV_NOHUGEPAGE);  /* fails where there are none to be had */
    for (size_t i = 0; i < size; i += 4096)
        at[i] = 1;
    munmap(at, size);
    return 0;
}

/* Two processes that wait for each other: two context switches and four system calls per turn. */
static uint64_t pingpong(void)
{
    enum { TURNS = 1500 };
    int there[2], back[2];
    char byte = 0;
    check(pipe(there) == 0 && pipe(back) == 0, "pipe");
    pid_t child = fork();
    check(child >= 0, "fork");
    if (child == 0) {
        for (int i = 0; i < TURNS; i++)
            if (read(there[0], &byte, 1) != 1 || write(back[1], &byte, 1) != 1)
                _exit(1);
        _exit(0);
    }
    for (int i = 0; i < TURNS; i++)
        check(write(there[1], &byte, 1) == 1 && read(back[0], &byte, 1) == 1, "pipe");
    int status;
    check(waitpid(child, &status, 0) == child, "waitpid");
    for (int i = 0; i < 2; i++)
        close(there[i]), close(back[i]);
    return (uint64_t)status;
}

static uint64_t forks(void)
{
    uint64_t sum = 0;
    for (int i = 0; i < 60; i++) {
        pid_t child = fork();
        check(child >= 0, "fork");
        if (child == 0)
            _exit(i & 127);
        int status;
        check(waitpid(child, &status, 0) == child, "waitpid");
        sum += (uint64_t)WEXITSTATUS(status);
    }
    return sum;
}

/* Only what is built into the shell; a command substitution is a fork. */
static const char script[] =
    "i=0 t=0 w=\n"
    "while [ $i -lt 1500 ]; do\n"
    "    case $i in *7) t=$((t + i)) ;; *[13]) w=${i%?}x ;; esac\n"
    "    i=$((i + 1))\n"
    "done\n"
    "for n in 1 2 3 4 5 6 7 8 9 10; do t=$(echo $((t + n))); done\n"
    "exit $((t % 251))\n";

static uint64_t shell(void)
{
    pid_t child = fork();
    check(child >= 0, "fork");
    if (child == 0) {
        execl(busybox, "busybox", "sh", "-c", script, (char *)NULL);
        _exit(127);
    }
    int status;
    check(waitpid(child, &status, 0) == child, "waitpid");
    if (WEXITSTATUS(status) == 127) {
        fprintf(stderr, "%s cannot be run\n", busybox);
        exit(1);
    }
    return (uint64_t)WEXITSTATUS(status);
}

static int always(void) { return 1; }
static int has_avx(void) { return __builtin_cpu_supports("avx"); }

static const struct { const char *name; uint64_t (*run)(void); int (*can_run)(void); } workloads[] = {
    { "nothing", nothing, always },
    { "integer", integer, always },   { "sieve", sieve, always },       { "chase", chase, always },
    { "memcpy", copy, always },       { "calls", calls, always },       { "qsort", sort, always },
    { "dispatch", dispatch, always }, { "rep", rep, always },           { "strings", strings, always },
    { "snprintf", print, always },    { "sse", sse, always },           { "matrix", matrix, always },
    { "nbody", nbody, always },       { "avx", avx, has_avx },          { "x87", x87, always },
    { "syscalls", syscalls, always }, { "faults", faults, always },     { "pipe", pingpong, always },
    { "fork", forks, always },        { "shell", shell, always },
};

/* Is it among those that were asked for? The first is: it is what the others are measured by. */
static int wanted(const char *name, int count, char **names)
{
    for (int i = 0; i < count; i++)
        if (strcmp(names[i], name) == 0)
            return 1;
    return count == 0 || strcmp(name, workloads[0].name) == 0;
}

/* One processor, as in the guest: otherwise two processes that talk run on two. */
static void pin(void)
{
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((size_t)sched_getcpu(), &set);
    check(sched_setaffinity(0, sizeof set, &set) == 0, "sched_setaffinity");
}

static void power_off(void)
{
    fflush(NULL);
    tcdrain(STDOUT_FILENO);  /* the serial port's driver still holds the last lines */
    reboot(RB_POWER_OFF);
    perror("reboot");
}

/* One worker, then two on a processor each: how much slower is a worker for the company? */
static void scale(int repeats)
{
    for (; repeats > 0; repeats--)
        for (int workers = 1; workers <= 2; workers++) {
            double started = now();
            for (int i = 0; i < workers; i++) {
                pid_t child = fork();
                check(child >= 0, "fork");
                if (child == 0) {
                    cpu_set_t one;
                    CPU_ZERO(&one);
                    CPU_SET(i, &one);
                    check(sched_setaffinity(0, sizeof one, &one) == 0, "sched_setaffinity");
                    for (int runs = 0; runs < 8; runs++)
                        integer();
                    _exit(0);
                }
            }
            for (int i = 0; i < workers; i++) {
                int status;
                check(wait(&status) > 0 && status == 0, "worker");
            }
            printf("bench: workers %d %.6f\n", workers, now() - started);
        }
}

int main(int argc, char **argv)
{
    setvbuf(stdout, NULL, _IOLBF, 0);
    if (argc >= 4 && strcmp(argv[1], "run") == 0) {
        busybox = argv[3];
        pin();
        struct termios terminal;
        if (tcgetattr(STDIN_FILENO, &terminal) == 0) {
            terminal.c_lflag &= ~(tcflag_t)ECHO;
            tcsetattr(STDIN_FILENO, TCSANOW, &terminal);
        }
        printf("bench: begin %.6f\n", now());
        for (size_t i = 0; i < ARRAY(workloads); i++) {
            int chosen = wanted(workloads[i].name, argc - 4, argv + 4) && workloads[i].can_run();
            for (int left = atoi(argv[2]); left > 0 && chosen; left--) {
                printf("bench: ready %s\n", workloads[i].name);
                wait_for_line();
                double started = now();
                uint64_t result = workloads[i].run();
                double seconds = now() - started;
                printf("bench: %s %.6f %016lx\n", workloads[i].name, seconds, (unsigned long)result);
            }
        }
        printf("bench: end %.6f\n", now());
        wait_for_line();
    } else if (argc == 3 && strcmp(argv[1], "scale") == 0) {
        scale(atoi(argv[2]));
    } else if (argc != 2 || strcmp(argv[1], "off") != 0 || getpid() != 1) {
        fprintf(stderr, "usage: work off | scale REPEATS | run REPEATS BUSYBOX [NAME...] (off: only as process 1)\n");
        return 2;
    }
    if (getpid() == 1)
        power_off();
    return 0;
}
