/* SPDX-License-Identifier: Apache-2.0
 *
 * Throws frames at the user-mode network: sound ones that a guest would send, then changed ones, and its own answers back at
 * it. Fixed seed: fuzz_user SEED FRAMES. Built with ASan and UBSan by test_net_fuzz.py, which reads the last line.
 */
#include "net/user/user.h"

#include <assert.h>
#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

/* Linked with --wrap=clock_gettime: time passes as fast as wanted. */
static uint64_t later;
int __real_clock_gettime(clockid_t, struct timespec *);
int __wrap_clock_gettime(clockid_t clock, struct timespec *t)
{
    int result = __real_clock_gettime(clock, t);
    t->tv_sec += later;
    return result;
}

static uint64_t state;

static uint32_t rnd(uint32_t below)
{
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (state >> 11) % below;
}

static struct addr v4(uint8_t a, uint8_t b, uint8_t c, uint8_t d)
{
    return addr_from4((const uint8_t[]){a, b, c, d});
}

static uint8_t frame[VNET + MAX_FRAME];
static size_t size;
static uint8_t answer[VNET + MAX_FRAME]; /* the last frame that came back */
static size_t answer_size;

static void sum_of(size_t at, size_t field, size_t length, uint8_t protocol)
{
    uint8_t *f = frame + VNET;
    struct addr src = addr_from4(f + 26), dst = addr_from4(f + 30);
    put16(f + at + field, 0);
    uint64_t pseudo = protocol ? ip_pseudo(&src, &dst, protocol, length) : 0;
    put_sum(f + at + field, sum_end(sum_bytes(f + at, length, pseudo)));
}

static uint8_t *ip4(uint8_t protocol, uint32_t to, size_t length)
{
    uint8_t *f = frame + VNET;
    memset(frame, 0, VNET + ETHER + 20 + length);
    memcpy(f, (const uint8_t[]){0x52, 0x55, 10, 0, 2, 2, 0x52, 0x54, 0, 0, 0, rnd(3)}, 12);
    put16(f + 12, ETHER_IP4);
    f[14] = 0x45;
    put16(f + 16, 20 + length);
    put16(f + 18, rnd(3));
    f[22] = rnd(20) ? 64 : 1;
    f[23] = protocol;
    put32(f + 26, 0x0A00020F + rnd(2));
    put32(f + 30, to);
    size = ETHER + 20 + length;
    return f + 34;
}

static void head_sum(void)
{
    uint8_t *ip = frame + VNET + ETHER;
    put16(ip + 10, 0);
    put_sum(ip + 10, sum_end(sum_bytes(ip, 20, 0)));
}

static const uint32_t PLACES[] = {0x0A000202, 0x0A000203, 0x0A000264, 0x7F000001, 0xC0000201, 0xFFFFFFFF, 0x0A0002FF};

static void make(int listener)
{
    static uint32_t seq[8], ack[8];
    uint32_t to = PLACES[rnd(rnd(3) ? 3 : 7)];
    uint8_t *p;
    size_t n;
    switch (rnd(9)) {
    case 0: { /* ARP */
        uint8_t *f = frame + VNET;
        memset(frame, 0, VNET + 42);
        memset(f, 0xFF, 6);
        memcpy(f + 6, (const uint8_t[]){0x52, 0x54, 0, 0, 0, 1}, 6);
        put16(f + 12, ETHER_ARP);
        memcpy(f + 14, (const uint8_t[]){0, 1, 8, 0, 6, 4, 0, rnd(3)}, 8);
        memcpy(f + 22, f + 6, 6);
        put32(f + 28, 0x0A00020F);
        put32(f + 38, to);
        size = 42;
        break;
    }
    case 1: /* echo */
        n = 8 + rnd(rnd(2) ? 60 : 3000);
        p = ip4(IP_ICMP, to, n);
        p[0] = 8;
        put16(p + 4, rnd(5));
        head_sum();
        sum_of(34, 2, n, 0);
        break;
    case 2: { /* DHCP */
        n = 8 + 300;
        p = ip4(IP_UDP, rnd(2) ? 0xFFFFFFFF : 0x0A000202, n);
        put16(p, 68);
        put16(p + 2, 67);
        put16(p + 4, n);
        p[8] = p[9] = 1;
        p[10] = 6;
        memcpy(p + 36, (const uint8_t[]){0x52, 0x54, rnd(256), rnd(256), 0, 1}, 6);
        memcpy(p + 8 + 236, (const uint8_t[]){99, 130, 83, 99, 53, 1, rnd(9), 50, 4, 10, 0, 2, 15 + rnd(2), 255}, 14);
        head_sum();
        sum_of(34, 6, n, IP_UDP);
        break;
    }
    case 3: { /* DNS */
        static const char *const NAMES[] = {"\3www\4good\4test", "\3bad\4test", "\1a", "\77", "\300\14", ""};
        const char *name = NAMES[rnd(6)];
        size_t length = strlen(name);
        n = 8 + 12 + length + 1 + 4;
        p = ip4(IP_UDP, 0x0A000203, n);
        put16(p, 1024 + rnd(8));
        put16(p + 2, 53);
        put16(p + 4, n);
        p[8 + 5] = 1;
        memcpy(p + 20, name, length);
        p[20 + length + 2] = 1;
        p[20 + length + 4] = 1;
        head_sum();
        sum_of(34, 6, n, IP_UDP);
        break;
    }
    case 4: /* UDP, now and then a fragment */
        n = 8 + rnd(2000);
        p = ip4(IP_UDP, to, n);
        put16(p, 2000 + rnd(8));
        put16(p + 2, rnd(2) ? 7000 : rnd(65536));
        put16(p + 4, n);
        if (!rnd(3))
            put16(frame + VNET + 20, (rnd(2) ? 0x2000 : 0) | (rnd(2) ? 0 : rnd(300)));
        head_sum();
        sum_of(34, 6, n, IP_UDP);
        break;
    case 5: { /* IPv6: echo, solicitations */
        uint8_t *f = frame + VNET;
        n = 24 + rnd(60);
        memset(frame, 0, VNET + ETHER + 40 + n);
        memcpy(f, (const uint8_t[]){0x52, 0x55, 10, 0, 2, 2, 0x52, 0x54, 0, 0, 0, 1}, 12);
        put16(f + 12, ETHER_IP6);
        f[14] = 0x60;
        put16(f + 18, n);
        f[20] = rnd(4) ? IP_ICMP6 : rnd(256);
        f[21] = 255;
        f[22] = 0xFE;
        f[23] = 0x80;
        f[37] = 9;
        memcpy(f + 38, f + 22, 16);
        f[53] = 2;
        f[54] = (const uint8_t[]){128, 133, 135, 136}[rnd(4)];
        memcpy(f + 62, f + 38, 16);
        frame[0] = VNET_NEEDS_CSUM; /* the sum of ICMPv6 is not to be looked at, either */
        size = ETHER + 40 + n;
        break;
    }
    default: { /* TCP, to a server that is there; numbers as the last answer had them, or not */
        int k = rnd(8);
        if (answer_size >= 54 && answer[VNET + 23] == IP_TCP) {
            int port = get16(answer + VNET + 36) - 3000;
            if (port >= 0 && port < 8) {
                ack[port] = get32(answer + VNET + 38) + (answer[VNET + 47] & (SYN | FIN) ? 1 : 0) + answer_size - 54;
                seq[port] = get32(answer + VNET + 42);
            }
        }
        static const uint8_t FLAGS[] = {SYN, ACK, ACK, ACK | PSH, ACK | FIN, RST, RST | ACK, SYN | ACK, 0, 63};
        uint8_t flags = FLAGS[rnd(10)];
        int blocks = flags == ACK ? rnd(5) : 0, options = flags & SYN ? 12 : blocks ? 4 + 8 * blocks : 0;
        n = 20 + options + (rnd(2) ? 0 : rnd(rnd(4) ? 1400 : 60000));
        p = ip4(IP_TCP, rnd(6) ? 0x0A000264 : to, n);
        put16(p, 3000 + k);
        put16(p + 2, rnd(6) ? 80 : rnd(65536));
        put32(p + 4, seq[k] + (rnd(5) ? 0 : rnd(100000)));
        put32(p + 8, ack[k] - (rnd(4) ? 0 : rnd(2000)));
        p[12] = (20 + options) / 4 << 4;
        p[13] = flags;
        put16(p + 14, rnd(3) ? 65535 : rnd(2));
        if (flags & SYN)
            memcpy(p + 20, (const uint8_t[]){2, 4, rnd(16), 0xB4, 1, 3, 3, rnd(20), 1, 1, rnd(9) ? 4 : 0, 2}, 12);
        else if (blocks)
            put32(p + 20, 0x01010502 + 8 * blocks);
        for (int i = 0; i < blocks; i++) {
            put32(p + 24 + 8 * i, ack[k] - rnd(20000));
            put32(p + 28 + 8 * i, get32(p + 24 + 8 * i) + rnd(3000));
        }
        head_sum();
        sum_of(34, 16, n, IP_TCP);
        break;
    }
    }
    /* Changes. Sums that no longer fit are told not to matter, half the time. */
    for (int i = rnd(3) ? 0 : 1 + rnd(4); i; i--)
        frame[VNET + rnd(size)] = rnd(256);
    if (!rnd(20))
        size = rnd(size + 1);
    if (rnd(2))
        frame[0] |= VNET_DATA_VALID;
    if (!rnd(10) && size > 34)
        head_sum();
}

int main(int argc, char **argv)
{
    if (argc != 3)
        return 2;
    state = strtoull(argv[1], NULL, 0) * 2654435761u + 88172645463325252ull;
    long frames = strtol(argv[2], NULL, 0);
    struct config c = {.network = v4(10, 0, 2, 0), .gateway = v4(10, 0, 2, 2), .dns = v4(10, 0, 2, 3),
                       .first = v4(10, 0, 2, 15), .bits = 24, .mac = {0x52, 0x55, 10, 0, 2, 2}, .mtu = 1500, .max_tcp = 16,
                       .max_udp = 8, .max_icmp = 4, .max_rings = 12, .default_verdict = DENY, .filter_names = true,
                       .six = true, .prefix6 = {{0xFD, 0}}, .gateway6 = {{0xFD, [15] = 2}}, .dns6 = {{0xFD, [15] = 3}}};
    int port[2];
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK, 0, port))
        return 3;
    struct stack *s = stack_new(&c, port[0]);
    assert(s);
    /* The hosts that it may reach: a stream server that echoes, a datagram server, both here. */
    struct sockaddr_in here = {.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    socklen_t length = sizeof(here);
    int server = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), udp = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0);
    int incoming = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    assert(!bind(server, (void *)&here, sizeof(here)) && !listen(server, 50));
    assert(!getsockname(server, (void *)&here, &length));
    struct endpoint to, at = {v4(10, 0, 2, 100), 80};
    endpoint_of((void *)&here, &to);
    struct forward forward = {IP_TCP, at, target_of(&to)};
    assert(!stack_forward(s, &forward));
    here.sin_port = 0;
    assert(!bind(udp, (void *)&here, sizeof(here)) && !getsockname(udp, (void *)&here, &length));
    endpoint_of((void *)&here, &to);
    forward = (struct forward){IP_UDP, {v4(10, 0, 2, 2), 7000}, target_of(&to)};
    assert(!stack_forward(s, &forward));
    struct target resolver = target_of(&to);
    stack_set_resolvers(s, &resolver, 1);
    struct rule rule = {.verdict = ALLOW, .protocols = 7, .high = 65535, .name = ".good.test"};
    stack_set_rules(s, &rule, 1, DENY, true);
    here.sin_port = 0;
    assert(!bind(incoming, (void *)&here, sizeof(here)) && !listen(incoming, 50));
    assert(!getsockname(incoming, (void *)&here, &length));
    struct endpoint guest = {v4(10, 0, 2, 15), 80};
    assert(!stack_listen(s, incoming, IP_TCP, &guest));

    int peers[8];
    for (int i = 0; i < 8; i++)
        peers[i] = -1;
    uint64_t back = 0;
    static char text[100000];
    for (long n = 0; n < frames; n++) {
        make(incoming);
        __atomic_store_n(&s->takes, rnd(16), __ATOMIC_RELAXED);
        if (size >= ETHER || rnd(2)) {
            uint8_t *exact = malloc(VNET + size); /* so that ASan sees a read beyond its end */
            memcpy(exact, frame, VNET + size);
            stack_input(s, exact, size);
            free(exact);
        }
        if (!rnd(100)) /* time passes: timers */
            later += rnd(40);
        stack_step(s, 0);
        ssize_t got;
        while ((got = read(port[1], answer, sizeof(answer))) > 0) {
            answer_size = got - VNET;
            back++;
            if (!rnd(8))
                break; /* the port fills up now and then */
        }
        int k = rnd(8);
        if (peers[k] < 0) {
            peers[k] = rnd(8) ? accept(server, NULL, NULL) : socket(AF_INET, SOCK_STREAM, 0);
            if (peers[k] >= 0) {
                fcntl(peers[k], F_SETFL, O_NONBLOCK);
                if (connect(peers[k], (void *)&here, sizeof(here)) && errno != EINPROGRESS && errno != EISCONN)
                    errno = 0;
            }
        } else if (!rnd(6)) {
            struct linger now = {1, 0};
            if (rnd(2))
                setsockopt(peers[k], SOL_SOCKET, SO_LINGER, &now, sizeof(now));
            close(peers[k]);
            peers[k] = -1;
        } else if (rnd(2)) {
            if (send(peers[k], text, rnd(sizeof(text)), MSG_NOSIGNAL) < 0)
                errno = 0;
        } else if (recv(peers[k], text, sizeof(text), 0) < 0) {
            errno = 0;
        }
        struct sockaddr_in from;
        length = sizeof(from);
        got = recvfrom(udp, text, sizeof(text), 0, (void *)&from, &length);
        if (got > 0) { /* a resolver's answer, or nonsense */
            text[2] |= 0x80;
            text[7] = rnd(3);
            for (int i = rnd(4); i; i--)
                text[rnd(got + 20)] = rnd(256);
            sendto(udp, text, got + rnd(20), 0, (void *)&from, length);
        }
        assert(s->tcps <= c.max_tcp && s->udps <= c.max_udp && s->icmps <= c.max_icmp && s->rings <= c.max_rings);
        struct decision d[64];
        while (stack_decisions(s, d, 64) == 64)
            ;
    }
    printf("frames %llu back %llu tcp %llu udp %llu dns %llu malformed %llu\n", (unsigned long long)s->counts.frames_in,
           (unsigned long long)back, (unsigned long long)s->counts.tcp_opened, (unsigned long long)s->counts.udp_opened,
           (unsigned long long)s->counts.dns_queries, (unsigned long long)s->counts.malformed);
    stack_free(s);
    return 0;
}
