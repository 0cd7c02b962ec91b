/* SPDX-License-Identifier: Apache-2.0
 *
 * IPv4 (RFC 791): packets of the guest are checked and taken apart, fragments collected; and headers for ours.
 */
#include "user.h"

#include <stdlib.h>

#define MAX_DATAGRAM (65535 - 20)
#define WAIT (15 * NS) /* for missing fragments */

bool on_network(const struct stack *s, const struct addr *a)
{
    if (addr_is4(a)) {
        uint32_t mask = s->config.bits ? ~0u << (32 - s->config.bits) : 0;
        return !((get32(a->b + 12) ^ get32(s->config.network.b + 12)) & mask);
    }
    return s->config.six && (!memcmp(a->b, s->config.prefix6.b, 8) || (a->b[0] == 0xFE && (a->b[1] & 0xC0) == 0x80));
}

bool is_ours(const struct stack *s, const struct addr *a)
{
    if (addr_same(a, &s->config.gateway) || addr_same(a, &s->config.dns))
        return true;
    if (s->config.six && (addr_same(a, &s->config.gateway6) || addr_same(a, &s->config.dns6)))
        return true;
    for (int i = 0; i < s->forward_count; i++)
        if (addr_same(a, &s->forwards[i].at.ip) && on_network(s, a))
            return true;
    return false;
}

/* -- neighbours: which guest has which address */

void neighbour_learn(struct stack *s, const struct addr *ip, const uint8_t mac[6])
{
    struct neighbour *n = &s->neighbours[0];
    for (int i = 0; i < NEIGHBOURS; i++) {
        struct neighbour *at = &s->neighbours[i];
        if (at->seen && addr_same(&at->ip, ip)) {
            memcpy(at->mac, mac, 6);
            at->seen = s->now;
            return;
        }
        if (at->seen < n->seen)
            n = at;
    }
    n->ip = *ip;
    memcpy(n->mac, mac, 6);
    n->seen = s->now;
}

const uint8_t *neighbour_mac(struct stack *s, const struct addr *ip)
{
    for (int i = 0; i < NEIGHBOURS; i++)
        if (s->neighbours[i].seen && addr_same(&s->neighbours[i].ip, ip))
            return s->neighbours[i].mac;
    if (addr_is4(ip))
        arp_ask(s, ip);
    else
        ip6_ask(s, ip);
    return NULL;
}

/* -- fragments */

static void forget(struct reassembly *r)
{
    free(r->data);
    *r = (struct reassembly){0};
}

/* A fragment; the whole datagram when it is complete, in r->data, to be forgotten by the caller. Fragments must come
 * in order, as every sender sends them: what overlaps, repeats or leaves a hole ends the datagram. */
static struct reassembly *collect(struct stack *s, const uint8_t *ip, const uint8_t *data, uint32_t size)
{
    const uint32_t offset = (get16(ip + 6) & 0x1FFF) * 8;
    const bool more = get16(ip + 6) & 0x2000;
    struct reassembly *r = NULL, *victim = &s->reassemblies[0];
    for (int i = 0; i < REASSEMBLIES; i++) {
        struct reassembly *at = &s->reassemblies[i];
        if (at->data && at->until < s->now)
            forget(at);
        if (at->data && at->id == get16(ip + 4) && at->protocol == ip[9] && !memcmp(at->src, ip + 12, 4)
            && !memcmp(at->dst, ip + 16, 4))
            r = at;
        if (!at->data || (victim->data && at->until < victim->until))
            victim = at;
    }
    if (offset + size > MAX_DATAGRAM || (more && (size % 8 || !size)) || offset != (r ? r->got : 0)) {
        s->counts.malformed++;
        if (r)
            forget(r);
        return NULL;
    }
    if (!r) {
        forget(victim);
        r = victim;
        r->data = malloc(MAX_DATAGRAM);
        if (!r->data)
            return NULL;
        r->until = s->now + WAIT;
        r->id = get16(ip + 4);
        r->protocol = ip[9];
        memcpy(r->src, ip + 12, 4);
        memcpy(r->dst, ip + 16, 4);
    }
    memcpy(r->data + offset, data, size);
    r->got = offset + size;
    return more ? NULL : r;
}

/* -- from the guest */

void ip4_input(struct stack *s, const uint8_t *frame, size_t size, bool summed)
{
    const uint8_t *ip = frame + ETHER;
    size -= ETHER;
    uint32_t head = size >= 20 ? (ip[0] & 15) * 4u : 0, total = size >= 20 ? get16(ip + 2) : 0;
    if (size < 20 || ip[0] >> 4 != 4 || head < 20 || total < head || total > size || sum_end(sum_bytes(ip, head, 0))) {
        s->counts.malformed++;
        return;
    }
    struct packet p = {
        .ether = frame, .data = ip + head, .size = total - head, .src = addr_from4(ip + 12), .dst = addr_from4(ip + 16),
        .protocol = ip[9], .ttl = ip[8], .summed = summed, .ip = ip, .ip_size = head,
    };
    const uint32_t all = on_network(s, &p.dst) && s->config.bits < 31 ? get32(p.dst.b + 12) << s->config.bits : 0;
    p.broadcast = get32(ip + 16) == 0xFFFFFFFF || (all && all == ~0u << s->config.bits);
    const bool nobody = !get32(ip + 12);
    if (nobody ? ip[9] != IP_UDP : !on_network(s, &p.src) || is_ours(s, &p.src)) {
        s->counts.ignored++; /* an address that no guest can have here */
        return;
    }
    if (!nobody)
        neighbour_learn(s, &p.src, frame + 6);
    if (!(get16(ip + 6) & 0x3FFF)) {
        ip_dispatch(s, &p);
        return;
    }
    struct reassembly *r = collect(s, ip, p.data, p.size);
    if (r) {
        p.data = r->data;
        p.size = r->got;
        p.summed = false;
        ip_dispatch(s, &p);
        forget(r);
    }
}

void ip_dispatch(struct stack *s, struct packet *p)
{
    if ((p->protocol == IP_TCP || p->protocol == IP_UDP) && p->size >= 8 && !p->summed) {
        bool none = p->protocol == IP_UDP && addr_is4(&p->src) && !get16(p->data + 6); /* RFC 768: no checksum */
        uint64_t sum = ip_pseudo(&p->src, &p->dst, p->protocol, p->size);
        if (!none && sum_end(sum_bytes(p->data, p->size, sum))) {
            s->counts.malformed++;
            return;
        }
    }
    if (p->ttl <= 1 && !p->broadcast && !on_network(s, &p->dst)) {
        icmp_error(s, p, TTL_EXCEEDED);
        return;
    }
    switch (p->protocol) {
    case IP_TCP:
        tcp_input(s, p);
        break;
    case IP_UDP:
        udp_input(s, p);
        break;
    case IP_ICMP:
        if (addr_is4(&p->src)) {
            icmp_input(s, p);
            break;
        }
        s->counts.ignored++;
        break;
    case IP_ICMP6:
        if (!addr_is4(&p->src)) {
            icmp6_input(s, p);
            break;
        }
        /* fall through */
    default:
        s->counts.ignored++;
    }
}

/* -- to the guest */

uint64_t ip_pseudo(const struct addr *src, const struct addr *dst, uint8_t protocol, size_t size)
{
    const bool four = addr_is4(src);
    uint64_t sum = sum_bytes(src->b + (four ? 12 : 0), four ? 4 : 16, 0);
    sum = sum_bytes(dst->b + (four ? 12 : 0), four ? 4 : 16, sum);
    return sum + __builtin_bswap16(protocol) + __builtin_bswap16(size & 0xFFFF);
}

static size_t ether_header(struct stack *s, uint8_t *at, const uint8_t mac[6], bool four)
{
    memset(at, 0, VNET);
    memcpy(at + VNET, mac, 6);
    memcpy(at + VNET + 6, s->config.mac, 6);
    put16(at + VNET + 12, four ? ETHER_IP4 : ETHER_IP6);
    return VNET + ETHER;
}

static void ip4_header(struct stack *s, uint8_t *ip, const struct addr *src, const struct addr *dst, uint8_t protocol,
                       size_t size, uint16_t id, uint16_t fragment)
{
    ip[0] = 0x45;
    ip[1] = 0;
    put16(ip + 2, 20 + size);
    put16(ip + 4, id);
    put16(ip + 6, fragment);
    ip[8] = 64;
    ip[9] = protocol;
    put16(ip + 10, 0);
    memcpy(ip + 12, src->b + 12, 4);
    memcpy(ip + 16, dst->b + 12, 4);
    put_sum(ip + 10, sum_end(sum_bytes(ip, 20, 0)));
}

size_t ip_header(struct stack *s, uint8_t *at, const uint8_t mac[6], const struct addr *src, const struct addr *dst,
                 uint8_t protocol, size_t size)
{
    const bool four = addr_is4(src);
    uint8_t *ip = at + ether_header(s, at, mac, four);
    if (four) {
        ip4_header(s, ip, src, dst, protocol, size, s->ip_id++, 0x4000); /* do not fragment */
        return VNET + ETHER + 20;
    }
    put32(ip, 6u << 28);
    put16(ip + 4, size);
    ip[6] = protocol;
    ip[7] = protocol == IP_ICMP6 ? 255 : 64; /* what neighbour discovery asks for (RFC 4861, 7.1) */
    memcpy(ip + 8, src->b, 16);
    memcpy(ip + 24, dst->b, 16);
    return VNET + ETHER + 40;
}

void ip_send(struct stack *s, const uint8_t mac[6], const struct addr *src, const struct addr *dst, uint8_t protocol,
             uint8_t *data, size_t size)
{
    const bool four = addr_is4(src);
    const size_t head = VNET + ETHER + (four ? 20 : 40), room = s->config.mtu - (four ? 20 : 40);
    if (size <= room) {
        uint8_t *at = data - head;
        ip_header(s, at, mac, src, dst, protocol, size);
        if (!stack_send(s, &(struct iovec){at, head + size}, 1))
            s->counts.dropped++;
        return;
    }
    if (!four) { /* fragments of IPv6 would need an extension header; nothing that we send needs them */
        s->counts.dropped++;
        return;
    }
    uint8_t header[VNET + ETHER + 20];
    ether_header(s, header, mac, true);
    const size_t most = room & ~(size_t)7;
    const uint16_t id = s->ip_id++;
    for (size_t done = 0; done < size;) {
        size_t part = size - done < most ? size - done : most;
        bool more = done + part < size;
        ip4_header(s, header + VNET + ETHER, src, dst, protocol, part, id, done / 8 | (more ? 0x2000 : 0));
        struct iovec iov[2] = {{header, sizeof(header)}, {data + done, part}};
        if (!stack_send(s, iov, 2)) {
            s->counts.dropped++;
            return; /* without this one the others are of no use */
        }
        done += part;
    }
}
