/* SPDX-License-Identifier: Apache-2.0
 *
 * The user-mode network and the switch under frames, answers of hosts, and time, in any order.
 *
 * The input is a list of steps: what, argument, length (16 bits, little endian), bytes. Whatever a frame lacks that chance
 * would not find (checksums, the numbers of a TCP connection) is filled in when the argument asks for it.
 */
#define _GNU_SOURCE
#include "net/hub.h"
#include "net/user/user.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#define MUST(what) do { if (!(what)) { fprintf(stderr, "broken: %s\n", #what); abort(); } } while (0)

enum { FRAME, WAIT, HOST_SENDS, HOST_CLOSES, HOST_ANSWERS, TAKES, HOST_CONNECTS, SWITCH, WHAT };
enum { FIX_IP = 1, FIX_TCP = 2, FIX_GAP = 4, FIX_OLD = 8, FIX_FAR = 16, FIX_SACK = 32 };
enum { PEERS = 4 };

/* The network's clock: what was built with -Dclock_gettime=fuzz_clock. Its seconds pass as fast as wanted. */
static uint64_t later;
int fuzz_clock(clockid_t clock, struct timespec *t)
{
    int result = clock_gettime(clock, t);
    t->tv_sec += later;
    return result;
}

static int port[2], server, udp, incoming, incoming_udp, peers[PEERS];
static struct sockaddr_in server_at, udp_at, incoming_at, incoming_udp_at;
static uint8_t answer[VNET + MAX_FRAME], tcp_answer[VNET + ETHER + 60];
static size_t answer_size, tcp_data; /* tcp_data: bytes that the last segment to the guest carried */

static int listening(int type, struct sockaddr_in *at)
{
    socklen_t length = sizeof(*at);
    int fd = socket(AF_INET, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
    *at = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr = {htonl(INADDR_LOOPBACK)}};
    if (bind(fd, (void *)at, sizeof(*at)) || (type == SOCK_STREAM && listen(fd, 16)) || getsockname(fd, (void *)at, &length))
        exit(2);
    return fd;
}

int LLVMFuzzerInitialize(int *argc, char ***argv)
{
    server = listening(SOCK_STREAM, &server_at);
    udp = listening(SOCK_DGRAM, &udp_at);
    incoming = listening(SOCK_STREAM, &incoming_at);
    incoming_udp = listening(SOCK_DGRAM, &incoming_udp_at);
    for (int i = 0; i < PEERS; i++)
        peers[i] = -1;
    return 0;
}

static struct addr v4(uint8_t a, uint8_t b, uint8_t c, uint8_t d)
{
    return addr_from4((const uint8_t[]){a, b, c, d});
}

static struct stack *network(void)
{
    struct config c = {.network = v4(10, 0, 2, 0), .gateway = v4(10, 0, 2, 2), .dns = v4(10, 0, 2, 3),
                       .first = v4(10, 0, 2, 15), .bits = 24, .mac = {0x52, 0x55, 10, 0, 2, 2}, .mtu = 1500, .max_tcp = 4,
                       .max_udp = 4, .max_icmp = 2, .max_rings = 5, .default_verdict = DENY, .filter_names = true,
                       .domain = "lab.test", .hostname = "guest", .six = true, .prefix6 = {{0xFD}},
                       .gateway6 = {{0xFD, [15] = 2}}, .dns6 = {{0xFD, [15] = 3}}};
    if (socketpair(AF_UNIX, SOCK_SEQPACKET | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, port))
        exit(2);
    int room = MAX_FRAME; /* for one large frame or some dozens of small ones */
    setsockopt(port[0], SOL_SOCKET, SO_SNDBUF, &room, sizeof(room));
    struct stack *s = stack_new(&c, port[0]);
    struct endpoint to;
    MUST(s);
    endpoint_of((void *)&server_at, &to);
    struct forward forwards[] = {{IP_TCP, {v4(10, 0, 2, 100), 80}, target_of(&to)},
                                 {IP_TCP, {{{0xFD, [15] = 100}}, 80}, target_of(&to)}};
    MUST(!stack_forward(s, &forwards[0]) && !stack_forward(s, &forwards[1]));
    endpoint_of((void *)&udp_at, &to);
    struct target resolver = target_of(&to);
    struct forward datagrams[] = {{IP_UDP, {v4(10, 0, 2, 2), 7000}, resolver}, {IP_UDP, {{{0xFD, [15] = 2}}, 7000}, resolver}};
    MUST(!stack_forward(s, &datagrams[0]) && !stack_forward(s, &datagrams[1]) && !stack_set_resolvers(s, &resolver, 1));
    to = (struct endpoint){v4(127, 0, 0, 1), 1};
    struct forward nobody[] = {{IP_TCP, {v4(10, 0, 2, 100), 81}, target_of(&to)},
                               {IP_UDP, {v4(10, 0, 2, 2), 7001}, target_of(&to)}};
    MUST(!stack_forward(s, &nobody[0]) && !stack_forward(s, &nobody[1]));
    struct rule rule = {.verdict = ALLOW, .protocols = 7, .high = 65535, .name = ".good.test"};
    MUST(!stack_set_rules(s, &rule, 1, DENY, true));
    struct endpoint guest = {v4(10, 0, 2, 15), 80};
    MUST(!stack_listen(s, fcntl(incoming, F_DUPFD_CLOEXEC, 0), IP_TCP, &guest));
    MUST(!stack_listen(s, fcntl(incoming_udp, F_DUPFD_CLOEXEC, 0), IP_UDP, &guest));
    return s;
}

/* What a guest hears is sound. */
static void look(void)
{
    const uint8_t *f = answer + VNET, *ip = f + ETHER;
    MUST(answer_size >= ETHER && answer_size <= MAX_FRAME);
    if (get16(f + 12) == ETHER_IP4) {
        MUST(answer_size >= ETHER + 20 && ip[0] == 0x45 && get16(ip + 2) + ETHER == answer_size);
        MUST(sum_end(sum_bytes(ip, 20, 0)) == 0);
        if (ip[9] == IP_TCP) {
            MUST(get16(ip + 2) >= 40 && ip[32] >> 4 >= 5 && get16(ip + 2) >= 20 + (ip[32] >> 4) * 4);
            memcpy(tcp_answer, answer, VNET + ETHER + 40);
            tcp_data = get16(ip + 2) - 20 - (ip[32] >> 4) * 4;
        }
    } else if (get16(f + 12) == ETHER_IP6) {
        MUST(answer_size >= ETHER + 40 && ip[0] >> 4 == 6 && get16(ip + 4) + ETHER + 40 == answer_size);
    } else {
        MUST(get16(f + 12) == ETHER_ARP);
    }
}

/* The guest goes on with the connection of the last segment that it was sent; or after a gap, or as if it had lost this. */
static void connection(uint8_t *tcp, size_t room, unsigned how)
{
    const uint8_t *last = tcp_answer + VNET + ETHER + 20;
    memcpy(tcp, last + 2, 2);
    memcpy(tcp + 2, last, 2);
    const uint32_t acked = get32(last + 4) + (how & FIX_OLD ? 0 : tcp_data + (last[13] & (SYN | FIN) ? 1 : 0));
    put32(tcp + 4, get32(last + 8) + (how & FIX_GAP ? 100 : 0) + (how & FIX_FAR ? 400 : 0));
    /* Less than all that it was sent, and blocks of the rest, in numbers that count from its end. */
    put32(tcp + 8, acked + (how & FIX_SACK ? (int16_t)get32(tcp + 8) : 0));
    for (uint8_t *at = tcp + 24; how & FIX_SACK && at + 8 <= tcp + 20 + room && at < tcp + 56; at += 4)
        put32(at, acked + (int16_t)get32(at));
}

/* What a connection knows of itself is sound. */
static void sound_ranges(const struct ranges *r, uint32_t base, uint32_t last)
{
    MUST(r->count <= RANGES);
    for (int i = 0; i < r->count; i++) {
        const struct range a = r->of[i];
        MUST(seq_lt(base, a.at) && seq_lt(a.at, a.end) && seq_le(a.end, last));
        for (int k = 0; k < i; k++)
            MUST(seq_lt(a.end, r->of[k].at) || seq_lt(r->of[k].end, a.at));
    }
}

static void sound(const struct stack *s)
{
    for (int i = 0; i < HASH; i++)
        for (const struct flow *f = s->table[i]; f; f = f->chain) {
            const struct tcp *t = &f->tcp;
            if (f->protocol != IP_TCP || t->state != T_OPEN)
                continue;
            MUST(t->out.used <= RING && t->in.used <= RING && t->nxt - t->una <= t->out.used + 1);
            MUST(seq_le(t->una, t->again) && seq_le(t->again, t->lost) && seq_le(t->lost, t->nxt));
            MUST(seq_le(t->una, t->recover) && seq_le(t->recover, t->nxt) && tcp_flight(t) <= t->nxt - t->una);
            sound_ranges(&t->held, t->una, t->nxt);
            sound_ranges(&t->early, t->rcv, t->told);
            MUST(!t->early.count || (t->in.data && tcp_offered(t) <= tcp_window(f)));
        }
}

static void frame(struct stack *s, unsigned how, const uint8_t *data, size_t size)
{
    if (size < VNET)
        return;
    uint8_t *copy = malloc(size); /* to the byte, so that a read beyond it is seen */
    memcpy(copy, data, size);
    uint8_t *ip = copy + VNET + ETHER;
    size_t left = size < VNET + ETHER + 20 ? 0 : size - VNET - ETHER;
    if (left && get16(ip - 2) == ETHER_IP4) {
        if (how & FIX_TCP && ip[9] == IP_TCP && left >= 40)
            connection(ip + 20, left - 40, how);
        if (how & FIX_IP) {
            put16(ip + 10, 0);
            put_sum(ip + 10, sum_end(sum_bytes(ip, 20, 0)));
        }
    }
    stack_input(s, copy, size - VNET);
    free(copy);
}

static void host(struct stack *s, unsigned what, unsigned how, const uint8_t *data, size_t size)
{
    static uint8_t room[1 << 16];
    int *peer = &peers[how % PEERS];
    struct sockaddr_in from;
    socklen_t length = sizeof(from);
    switch (what) {
    case HOST_SENDS:
        if (*peer < 0)
            *peer = accept4(server, NULL, NULL, SOCK_NONBLOCK | SOCK_CLOEXEC);
        else if (how & 128 && recv(*peer, room, sizeof(room), 0) < 0)
            errno = 0;
        else if (send(*peer, room, (how >> 2) * 1000, MSG_NOSIGNAL) < 0)
            errno = 0;
        break;
    case HOST_CLOSES:
        if (*peer >= 0 && how & 128) {
            shutdown(*peer, SHUT_WR);
        } else if (*peer >= 0) {
            struct linger now = {how & 64, 0};
            setsockopt(*peer, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
            close(*peer);
            *peer = -1;
        }
        break;
    case HOST_ANSWERS: /* a datagram; to a question of the DNS with its number */
        if (recvfrom(udp, room, 2, 0, (void *)&from, &length) >= 0) {
            memcpy(room + 2, data + 2, size < 2 ? 0 : size - 2);
            sendto(udp, room, size, 0, (void *)&from, length);
        }
        break;
    default: /* HOST_CONNECTS */
        if (how & 128) {
            sendto(udp, data, size, 0, (void *)&incoming_udp_at, sizeof(incoming_udp_at));
        } else if (*peer < 0) {
            *peer = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
            if (connect(*peer, (void *)&incoming_at, sizeof(incoming_at)) && errno != EINPROGRESS)
                errno = 0;
        }
    }
}

static void drain(void)
{
    ssize_t got;
    while ((got = read(port[1], answer, sizeof(answer))) > 0) {
        MUST(got > VNET);
        answer_size = got - VNET;
        look();
    }
}

/* -- the switch: a guest with and one without offloads, and a stream */

struct plugs {
    struct hub *hub;
    int ends[3][2];
};

static void plug(struct plugs *p)
{
    static const enum port_kind KINDS[] = {PORT_VNET, PORT_PLAIN, PORT_STREAM};
    p->hub = hub_new(false, 100);
    MUST(p->hub);
    for (int i = 0; i < 3; i++) {
        int type = KINDS[i] == PORT_STREAM ? SOCK_STREAM : SOCK_SEQPACKET;
        if (socketpair(AF_UNIX, type | SOCK_NONBLOCK | SOCK_CLOEXEC, 0, p->ends[i]))
            exit(2);
        MUST(hub_add(p->hub, KINDS[i], p->ends[i][0], 0, NULL) == i);
    }
}

static void exchange(struct plugs *p, unsigned how, const uint8_t *data, size_t size)
{
    static uint8_t room[VNET + MAX_FRAME];
    unsigned from = how % 3;
    hub_takes(p->hub, 0, how >> 4);
    if (size && send(p->ends[from][1], data, size, MSG_NOSIGNAL) < 0)
        errno = 0;
    for (int i = 0; i < 3; i++) {
        struct port *one = &p->hub->ports[i];
        if (one->fd >= 0 && (unsigned)i == from)
            port_readable(p->hub, one);
        if (one->fd >= 0 && one->waits)
            port_writable(p->hub, one);
        while (!(how & 8) && recv(p->ends[i][1], room, sizeof(room), 0) > 0)
            ;
        MUST(one->frames <= QUEUE_FRAMES + 1 && one->have <= STREAM_BUFFER);
    }
}

static void unplug(struct plugs *p)
{
    hub_free(p->hub);
    for (int i = 0; i < 3; i++) {
        close(p->ends[i][0]);
        close(p->ends[i][1]);
    }
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct stack *s = network();
    struct plugs plugs = {NULL};
    struct decision decisions[16];
    bool waits = false;
    later = tcp_data = answer_size = 0;
    memset(tcp_answer, 0, sizeof(tcp_answer));
    while (size >= 4) {
        unsigned what = data[0] % WHAT, how = data[1];
        size_t length = data[2] | data[3] << 8;
        data += 4;
        size -= 4;
        length = length > size ? size : length;
        switch (what) {
        case FRAME:
            frame(s, how, data, length);
            break;
        case WAIT:
            later += how % 64;
            break;
        case TAKES:
            __atomic_store_n(&s->takes, how & 15, __ATOMIC_RELAXED);
            waits = how & 16; /* the guest reads nothing for a while */
            break;
        case SWITCH:
            if (!plugs.hub)
                plug(&plugs);
            exchange(&plugs, how, data, length);
            break;
        default:
            host(s, what, how, data, length);
        }
        stack_step(s, 0);
        if (!waits)
            drain();
        MUST(s->tcps <= s->config.max_tcp && s->udps <= s->config.max_udp && s->icmps <= s->config.max_icmp);
        MUST(s->rings <= s->config.max_rings);
        sound(s);
        while (stack_decisions(s, decisions, 16) == 16)
            ;
        data += length;
        size -= length;
    }
    stack_free(s);
    close(port[0]);
    close(port[1]);
    if (plugs.hub)
        unplug(&plugs);
    struct linger now = {1, 0};
    for (int i = 0; i <= PEERS; i++) { /* what nobody accepted, too: the next input begins with nothing */
        int fd = i < PEERS ? peers[i] : accept(server, NULL, NULL);
        if (fd >= 0) {
            setsockopt(fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now));
            close(fd);
        }
        if (i < PEERS)
            peers[i] = -1;
        else if (fd >= 0)
            i--;
    }
    for (int fd; (fd = accept(incoming, NULL, NULL)) >= 0; close(fd))
        ;
    while (recv(udp, answer, 1, 0) >= 0 || recv(incoming_udp, answer, 1, 0) >= 0)
        ;
    return 0;
}
