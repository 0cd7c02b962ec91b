/* SPDX-License-Identifier: Apache-2.0
 *
 * IPv6 (RFC 8200) on the guest's link: router advertisements with the prefix and the DNS server (RFC 4861, 8106),
 * neighbour discovery, echo. Extension headers are not taken: nothing that is carried over sockets has them.
 */
#include "user.h"

#define HOPS 255
#define LIFETIME 9000           /* seconds that the router is to be used; the most there is (RFC 4861, 6.2.1) */
#define INTERVAL (600 * NS)     /* between advertisements that nobody asked for */
#define MAX_BODY 256

enum { ECHO = 128, ECHO_REPLY, SOLICIT_ROUTER = 133, ADVERTISE_ROUTER, SOLICIT = 135, ADVERTISE = 136 };

static const struct addr ALL_NODES = {{0xFF, 0x02, [15] = 1}};
static const struct addr LINK_LOCAL = {{0xFE, 0x80, [15] = 2}};

static bool is_ours6(const struct stack *s, const struct addr *a)
{
    return addr_same(a, &LINK_LOCAL) || is_ours(s, a);
}

static void group_mac(const struct addr *group, uint8_t mac[6])
{
    mac[0] = mac[1] = 0x33;
    memcpy(mac + 2, group->b + 12, 4);
}

static void send6(struct stack *s, const uint8_t mac[6], const struct addr *from, const struct addr *to, uint8_t type,
                  uint8_t code, const void *body, size_t size)
{
    uint8_t buffer[VNET + ETHER + 40 + 4 + MAX_BODY], *icmp = buffer + VNET + ETHER + 40;
    icmp[0] = type;
    icmp[1] = code;
    put16(icmp + 2, 0);
    memcpy(icmp + 4, body, size);
    put_sum(icmp + 2, sum_end(sum_bytes(icmp, 4 + size, ip_pseudo(from, to, IP_ICMP6, 4 + size))));
    ip_send(s, mac, from, to, IP_ICMP6, icmp, 4 + size);
}

void ip6_advertise(struct stack *s, struct timer *timer)
{
    uint8_t body[12 + 8 + 32 + 8 + 24] = {64}, *at = body + 12, mac[6]; /* hop limit; addresses are made by the guest */
    put16(body + 2, LIFETIME);
    at[0] = 1; /* source link-layer address */
    at[1] = 1;
    memcpy(at + 2, s->config.mac, 6);
    at += 8;
    at[0] = 3; /* prefix: on-link, autonomous, for ever */
    at[1] = 4;
    at[2] = 64;
    at[3] = 0xC0;
    memset(at + 4, 0xFF, 8);
    memcpy(at + 16, s->config.prefix6.b, 8);
    at += 32;
    at[0] = 5; /* MTU */
    at[1] = 1;
    put32(at + 4, s->config.mtu);
    at += 8;
    at[0] = 25; /* DNS server */
    at[1] = 3;
    put32(at + 4, LIFETIME);
    memcpy(at + 8, s->config.dns6.b, 16);
    group_mac(&ALL_NODES, mac);
    send6(s, mac, &LINK_LOCAL, &ALL_NODES, ADVERTISE_ROUTER, 0, body, sizeof(body));
    timer_set(s, timer, s->now + INTERVAL);
}

static void neighbour_message(struct stack *s, const uint8_t mac[6], const struct addr *from, const struct addr *to,
                              uint8_t type, uint32_t flags, const struct addr *target)
{
    uint8_t body[4 + 16 + 8] = {0};
    put32(body, flags);
    memcpy(body + 4, target->b, 16);
    body[20] = type == ADVERTISE ? 2 : 1; /* our link-layer address */
    body[21] = 1;
    memcpy(body + 22, s->config.mac, 6);
    send6(s, mac, from, to, type, 0, body, sizeof(body));
}

void ip6_ask(struct stack *s, const struct addr *ip)
{
    struct addr group = {{0xFF, 0x02, [11] = 1, [12] = 0xFF}}; /* solicited-node (RFC 4291, 2.7.1) */
    uint8_t mac[6];
    memcpy(group.b + 13, ip->b + 13, 3);
    group_mac(&group, mac);
    neighbour_message(s, mac, &s->config.gateway6, &group, SOLICIT, 0, ip);
}

void icmp6_input(struct stack *s, struct packet *p)
{
    const uint8_t *icmp = p->data;
    if (p->size < 8 || p->size > MAX_FRAME - ETHER - 40
        || (!p->summed && sum_end(sum_bytes(icmp, p->size, ip_pseudo(&p->src, &p->dst, IP_ICMP6, p->size))))) {
        s->counts.malformed++;
        return;
    }
    const bool nobody = !p->src.b[0];
    switch (icmp[0]) {
    case SOLICIT_ROUTER:
        if (p->ttl == HOPS)
            ip6_advertise(s, &s->advertiser);
        return;
    case SOLICIT: {
        struct addr target;
        if (p->ttl != HOPS || p->size < 24)
            return;
        memcpy(target.b, icmp + 8, 16);
        if (!is_ours6(s, &target) || nobody) /* nobody: a guest that looks whether its own address is free */
            return;
        neighbour_message(s, p->ether + 6, &target, &p->src, ADVERTISE, 0xE0000000, &target);
        return;
    }
    case ECHO:
        if (p->dst.b[0] == 0xFF || nobody || icmp[1])
            break;
        if (is_ours6(s, &p->dst)) {
            uint8_t *reply = s->reply + VNET + ETHER + 40;
            memcpy(reply, icmp, p->size);
            reply[0] = ECHO_REPLY;
            put16(reply + 2, 0);
            put_sum(reply + 2, sum_end(sum_bytes(reply, p->size, ip_pseudo(&p->dst, &p->src, IP_ICMP6, p->size))));
            ip_send(s, p->ether + 6, &p->dst, &p->src, IP_ICMP6, reply, p->size);
        } else {
            echo_outwards(s, p, get16(icmp + 4));
        }
        return;
    default:
        break;
    }
    s->counts.ignored++;
}

void ip6_input(struct stack *s, const uint8_t *frame, size_t size, bool summed)
{
    const uint8_t *ip = frame + ETHER;
    size -= ETHER;
    if (size < 40 || ip[0] >> 4 != 6 || get16(ip + 4) + 40u > size) {
        s->counts.malformed++;
        return;
    }
    struct packet p = {.ether = frame, .data = ip + 40, .size = get16(ip + 4), .protocol = ip[6], .ttl = ip[7],
                       .summed = summed, .ip = ip, .ip_size = 40};
    memcpy(p.src.b, ip + 8, 16);
    memcpy(p.dst.b, ip + 24, 16);
    static const struct addr NOBODY;
    const bool nobody = addr_same(&p.src, &NOBODY);
    if (addr_is4(&p.src) || addr_is4(&p.dst)
        || (nobody ? ip[6] != IP_ICMP6 : !on_network(s, &p.src) || is_ours6(s, &p.src))) {
        s->counts.ignored++; /* an address that no guest can have here; IPv4 has no business in this header */
        return;
    }
    p.broadcast = p.dst.b[0] == 0xFF;
    if (!nobody)
        neighbour_learn(s, &p.src, frame + 6);
    if (p.broadcast && p.protocol != IP_ICMP6) {
        s->counts.ignored++;
        return;
    }
    ip_dispatch(s, &p);
}
