/* SPDX-License-Identifier: Apache-2.0
 *
 * ICMP (RFC 792): echo, answered here for the gateway and through an ICMP socket of the host for others; and errors.
 */
#include "user.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#define IDLE (30 * NS)
#define ERRORS 100 /* per second at most (RFC 1812, 4.3.2.8) */

static bool may_complain(struct stack *s)
{
    if (s->now - s->last_error > NS) {
        s->last_error = s->now;
        s->error_tokens = ERRORS;
    }
    return s->error_tokens && s->error_tokens--;
}

static void send_error(struct stack *s, const uint8_t mac[6], const struct addr *to, enum unreachable what,
                       const uint8_t *about, size_t size, const struct addr *from)
{
    static const uint8_t type4[] = {3, 3, 3, 3, 11}, code4[] = {0, 1, 3, 13, 0};
    static const uint8_t type6[] = {1, 1, 1, 1, 3}, code6[] = {0, 3, 4, 1, 0};
    const bool four = addr_is4(to);
    uint8_t buffer[VNET + ETHER + 40 + 8 + 68] = {0}, *icmp = buffer + VNET + ETHER + 40;
    icmp[0] = four ? type4[what] : type6[what];
    icmp[1] = four ? code4[what] : code6[what];
    memcpy(icmp + 8, about, size);
    uint64_t pseudo = four ? 0 : ip_pseudo(from, to, IP_ICMP6, 8 + size);
    put_sum(icmp + 2, sum_end(sum_bytes(icmp, 8 + size, pseudo)));
    ip_send(s, mac, from, to, four ? IP_ICMP : IP_ICMP6, icmp, 8 + size);
}

void icmp_error(struct stack *s, const struct packet *p, enum unreachable what)
{
    /* Never about errors, groups, or nobody (RFC 1122, 3.2.2). */
    if (p->broadcast || p->ether[0] & 1 || (addr_is4(&p->src) && !get32(p->src.b + 12)) || !may_complain(s)
        || (p->protocol == IP_ICMP && (p->size < 8 || p->data[0] != 8))
        || (p->protocol == IP_ICMP6 && (p->size < 8 || p->data[0] != 128)))
        return;
    uint8_t about[60 + 8];
    size_t rest = p->size < 8 ? p->size : 8;
    if (p->ip_size > 60)
        return;
    memcpy(about, p->ip, p->ip_size);
    memcpy(about + p->ip_size, p->data, rest);
    const struct addr *from = addr_is4(&p->src) ? &s->config.gateway : &s->config.gateway6;
    if (what != TTL_EXCEEDED && is_ours(s, &p->dst))
        from = &p->dst;
    send_error(s, p->ether + 6, &p->src, what, about, p->ip_size + rest, from);
}

void icmp_error_of(struct stack *s, const struct flow *f, enum unreachable what)
{
    if (!may_complain(s))
        return;
    /* The packet is gone; its header is made anew from the flow, with what a receiver looks at. */
    uint8_t head[VNET + ETHER + 40 + 8] = {0};
    size_t size = ip_header(s, head, f->mac, &f->guest.ip, &f->far.ip, f->protocol, 8);
    if (f->protocol == IP_UDP) {
        put16(head + size, f->guest.port);
        put16(head + size + 2, f->far.port);
        put16(head + size + 4, 8);
    } else {
        head[size] = 8;
        put16(head + size + 4, f->far.port);
    }
    const struct addr *from = addr_is4(&f->far.ip) ? &s->config.gateway : &s->config.gateway6;
    if (what == NO_PORT)
        from = &f->far.ip; /* the host itself says so */
    send_error(s, f->mac, &f->guest.ip, what, head + VNET + ETHER, size + 8 - VNET - ETHER, from);
}

/* -- echo */

static void echo_expired(struct stack *s, struct timer *t)
{
    flow_free(s, (struct flow *)((char *)t - offsetof(struct flow, timer)));
}

static void echo_ready(struct stack *s, struct source *source, uint32_t events)
{
    struct flow *f = (struct flow *)source;
    uint8_t *data = s->reply + VNET + ETHER + 40;
    const bool four = addr_is4(&f->far.ip);
    for (int n = 0; n < BATCH; n++) {
        ssize_t size = recv(f->source.fd, data, sizeof(s->reply) - (VNET + ETHER + 40), 0);
        if (size < 0) {
            if (errno == EHOSTUNREACH || errno == ENETUNREACH || errno == ECONNREFUSED) {
                icmp_error_of(s, f, NO_HOST);
                flow_free(s, f);
            }
            return;
        }
        uint8_t *icmp = data;
        if (f->raw && four) { /* with its IP header, and everybody's */
            size_t head = size >= 20 ? (data[0] & 15) * 4u : 0;
            if (size < head + 8 || head < 20 || get16(data + head + 4) != f->far.port)
                continue;
            icmp += head;
            size -= head;
        }
        if (size < 8 || icmp[0] != (four ? 0 : 129))
            continue;
        f->answered = true;
        put16(icmp + 4, f->far.port);
        put16(icmp + 2, 0);
        uint64_t pseudo = four ? 0 : ip_pseudo(&f->far.ip, &f->guest.ip, IP_ICMP6, size);
        put_sum(icmp + 2, sum_end(sum_bytes(icmp, size, pseudo)));
        ip_send(s, f->mac, &f->far.ip, &f->guest.ip, four ? IP_ICMP : IP_ICMP6, icmp, size);
    }
}

/* A socket for echo requests: the unprivileged kind (net.ipv4.ping_group_range), else a raw one. */
static int echo_socket(struct stack *s, struct flow *f, int family)
{
    const int protocol = family == AF_INET ? IPPROTO_ICMP : IPPROTO_ICMPV6;
    int fd = flow_socket(s, family, SOCK_DGRAM, protocol);
    if (fd < 0 && (errno == EACCES || errno == EPERM || errno == EPROTONOSUPPORT) && family == AF_INET) {
        fd = flow_socket(s, family, SOCK_RAW, protocol);
        f->raw = fd >= 0;
    }
    return fd;
}

void echo_outwards(struct stack *s, struct packet *p, uint16_t id)
{
    /* The identifier takes the place of a port; what answers has the same. */
    struct endpoint guest = {p->src, id}, far = {p->dst, id};
    struct flow *f = flow_find(s, IP_ICMP, &guest, &far);
    if (!f) {
        struct target to;
        bool dns;
        if (!policy_route(s, IP_ICMP, &guest, &far, &to, &dns)) {
            icmp_error(s, p, PROHIBITED);
            return;
        }
        f = flow_new(s, IP_ICMP, &guest, &far);
        if (!f)
            return;
        memcpy(f->mac, p->ether + 6, 6);
        f->timer.fire = echo_expired;
        f->source.ready = echo_ready;
        if (to.family == AF_INET)
            to.in4.sin_port = 0;
        else
            to.in6.sin6_port = 0;
        f->source.fd = echo_socket(s, f, to.family);
        if (f->source.fd < 0 || connect(f->source.fd, &to.any, to.size)
            || !stack_watch(s, &f->source, EPOLLIN, false)) {
            icmp_error(s, p, f->source.fd < 0 ? PROHIBITED : NO_NET);
            flow_free(s, f);
            return;
        }
        s->counts.icmp_opened++;
    }
    flow_touch(s, f);
    timer_set(s, &f->timer, s->now + IDLE);
    uint8_t *copy = s->reply;
    memcpy(copy, p->data, p->size);
    put16(copy + 2, 0);
    put_sum(copy + 2, sum_end(sum_bytes(copy, p->size, 0))); /* a raw socket sends it as it is */
    if (send(f->source.fd, copy, p->size, MSG_NOSIGNAL) < 0 && errno != EAGAIN) {
        icmp_error(s, p, NO_HOST);
        flow_free(s, f);
    }
}

void icmp_input(struct stack *s, struct packet *p)
{
    if (p->size < 8 || p->size > MAX_FRAME - ETHER - 40 || sum_end(sum_bytes(p->data, p->size, 0))) {
        s->counts.malformed++;
        return;
    }
    if (p->data[0] != 8 || p->data[1] || p->broadcast) {
        s->counts.ignored++;
        return;
    }
    if (!is_ours(s, &p->dst)) {
        echo_outwards(s, p, get16(p->data + 4));
        return;
    }
    uint8_t *icmp = s->reply + VNET + ETHER + 40;
    memcpy(icmp, p->data, p->size);
    icmp[0] = 0;
    put16(icmp + 2, 0);
    put_sum(icmp + 2, sum_end(sum_bytes(icmp, p->size, 0)));
    ip_send(s, p->ether + 6, &p->dst, &p->src, IP_ICMP, icmp, p->size);
}
