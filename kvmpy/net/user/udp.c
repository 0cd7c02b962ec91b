/* SPDX-License-Identifier: Apache-2.0
 *
 * UDP (RFC 768): a connected socket of the host per flow, so that only the far end can answer and errors come back.
 */
#include "user.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

#define ONE_WAY (30 * NS)   /* nothing came back yet (RFC 4787 wants 2 minutes for what did) */
#define TWO_WAY (180 * NS)
#define DNS_WAIT (10 * NS)
#define HEADERS (VNET + ETHER + 40 + 8)

void udp_reply(struct stack *s, const uint8_t mac[6], const struct endpoint *from, const struct endpoint *to,
               uint8_t *data, size_t size)
{
    uint8_t *udp = data - 8;
    if (size > 65535 - 40 - 8) {
        s->counts.dropped++;
        return;
    }
    put16(udp, from->port);
    put16(udp + 2, to->port);
    put16(udp + 4, 8 + size);
    put16(udp + 6, 0);
    uint16_t sum = sum_end(sum_bytes(udp, 8 + size, ip_pseudo(&from->ip, &to->ip, IP_UDP, 8 + size)));
    put_sum(udp + 6, sum ? sum : 0xFFFF);
    ip_send(s, mac, &from->ip, &to->ip, IP_UDP, udp, 8 + size);
}

static void expired(struct stack *s, struct timer *t)
{
    struct flow *f = (struct flow *)((char *)t - offsetof(struct flow, timer));
    if (f->dns && !f->answered)
        s->resolver++; /* the next one may be better */
    flow_free(s, f);
}

static void used(struct stack *s, struct flow *f)
{
    flow_touch(s, f);
    timer_set(s, &f->timer, s->now + (f->dns ? DNS_WAIT : f->answered ? TWO_WAY : ONE_WAY));
}

static void failed(struct stack *s, struct flow *f, int error)
{
    enum unreachable what = error == ECONNREFUSED ? NO_PORT : error == ENETUNREACH ? NO_NET : NO_HOST;
    if (f->dns) {
        s->resolver++;
    } else if (error == ECONNREFUSED || error == ENETUNREACH || error == EHOSTUNREACH) {
        icmp_error_of(s, f, what);
    }
}

static void host_ready(struct stack *s, struct source *source, uint32_t events)
{
    struct flow *f = (struct flow *)source;
    uint8_t *data = s->reply + HEADERS;
    for (int n = 0; n < BATCH && !f->dead; n++) {
        ssize_t size = recv(f->source.fd, data, sizeof(s->reply) - HEADERS, MSG_TRUNC);
        if (size < 0 && errno == EINTR)
            continue;
        if (size < 0) {
            if (errno != EAGAIN) {
                failed(s, f, errno);
                flow_free(s, f);
            }
            return;
        }
        if (size > (ssize_t)(sizeof(s->reply) - HEADERS)) {
            s->counts.dropped++;
            continue;
        }
        f->answered = true;
        if (f->dns)
            dns_answer(s, data, size);
        used(s, f);
        udp_reply(s, f->mac, &f->far, &f->guest, data, size);
    }
}

static struct flow *open_flow(struct stack *s, struct packet *p, const struct endpoint *guest,
                              const struct endpoint *far)
{
    struct target to;
    bool dns;
    if (!policy_route(s, IP_UDP, guest, far, &to, &dns)) {
        icmp_error(s, p, is_ours(s, &p->dst) ? NO_PORT : on_network(s, &p->dst) ? NO_HOST : PROHIBITED);
        return NULL;
    }
    struct flow *f = flow_new(s, IP_UDP, guest, far);
    if (!f)
        return NULL;
    memcpy(f->mac, p->ether + 6, 6);
    f->timer.fire = expired;
    f->source.ready = host_ready;
    f->dns = dns;
    f->source.fd = flow_socket(s, to.family, SOCK_DGRAM, 0);
    if (f->source.fd < 0 || connect(f->source.fd, &to.any, to.size) || !stack_watch(s, &f->source, EPOLLIN, false)) {
        icmp_error(s, p, errno == ENETUNREACH ? NO_NET : NO_HOST);
        flow_free(s, f);
        return NULL;
    }
    s->counts.udp_opened++;
    return f;
}

void udp_input(struct stack *s, struct packet *p)
{
    if (p->size < 8 || get16(p->data + 4) < 8 || get16(p->data + 4) > p->size) {
        s->counts.malformed++;
        return;
    }
    const uint8_t *data = p->data + 8;
    const size_t size = get16(p->data + 4) - 8;
    struct endpoint guest = {p->src, get16(p->data)}, far = {p->dst, get16(p->data + 2)};
    if (far.port == 67 && addr_is4(&far.ip) && (p->broadcast || addr_same(&far.ip, &s->config.gateway))) {
        dhcp_input(s, p, data, size);
        return;
    }
    if (p->broadcast || p->ether[0] & 1 || !guest.port || !far.port || (addr_is4(&p->src) && !get32(p->src.b + 12))) {
        s->counts.ignored++; /* groups have no way out of here */
        return;
    }
    struct flow *f = flow_find(s, IP_UDP, &guest, &far);
    const bool question = far.port == 53 && is_ours(s, &far.ip) && (!f || f->dns);
    if (question && s->resolver_count && !dns_question(s, p, &guest, data, size))
        return;
    if (question && !s->resolver_count && dns_servfail(s, p, &guest, data, size))
        return;
    if (!f)
        f = open_flow(s, p, &guest, &far);
    if (!f)
        return;
    memcpy(f->mac, p->ether + 6, 6);
    used(s, f);
    ssize_t sent;
    if (f->listener)
        sent = sendto(f->listener->source.fd, data, size, MSG_NOSIGNAL, &f->client.any, f->client.size);
    else
        sent = send(f->source.fd, data, size, MSG_NOSIGNAL);
    if (sent >= 0)
        return;
    s->counts.dropped++;
    if (errno != EAGAIN && errno != EMSGSIZE && !f->listener) {
        failed(s, f, errno);
        flow_free(s, f);
    }
}

/* -- forwards: a datagram of a client of the host */

static struct flow *client_flow(struct stack *s, struct listener *l, const struct target *client)
{
    struct endpoint far;
    if (!endpoint_of(&client->any, &far))
        return NULL;
    /* The guest sees the client as it is, unless it is the host, or cannot be answered there. */
    if (!addr_is4(&far.ip) || (far.ip.b[12] == 127) || on_network(s, &far.ip))
        far.ip = addr_is4(&l->guest.ip) ? s->config.gateway : s->config.gateway6;
    for (int tries = 0; tries < 64; tries++) {
        struct flow *f = flow_find(s, IP_UDP, &l->guest, &far);
        if (!f)
            break;
        if (f->listener == l && f->client.size == client->size && !memcmp(&f->client.any, &client->any, client->size))
            return f;
        far.ip = addr_is4(&l->guest.ip) ? s->config.gateway : s->config.gateway6;
        far.port = s->ephemeral++ | 0xC000;
    }
    struct decision d = {.verdict = ALLOW, .protocol = IP_UDP, .reason = BY_FORWARD, .inbound = 1, .rule = -1,
                         .guest = l->guest, .far = far};
    struct flow *f = flow_find(s, IP_UDP, &l->guest, &far) ? NULL : flow_new(s, IP_UDP, &l->guest, &far);
    if (!f)
        return NULL;
    policy_log(s, &d);
    f->timer.fire = expired;
    f->listener = l;
    f->client = *client;
    s->counts.udp_opened++;
    return f;
}

void udp_listener_ready(struct stack *s, struct source *source, uint32_t events)
{
    struct listener *l = (struct listener *)source;
    uint8_t *data = s->reply + HEADERS;
    for (int n = 0; n < BATCH; n++) {
        struct target client = {.size = sizeof(client.in6)};
        ssize_t size = recvfrom(source->fd, data, sizeof(s->reply) - HEADERS, MSG_TRUNC, &client.any, &client.size);
        if (size < 0)
            return; /* nothing more, or an error of a datagram that went out before */
        if (size > (ssize_t)(sizeof(s->reply) - HEADERS)) {
            s->counts.dropped++;
            continue;
        }
        const uint8_t *mac = neighbour_mac(s, &l->guest.ip);
        struct flow *f = mac ? client_flow(s, l, &client) : NULL;
        if (!f) {
            s->counts.dropped++; /* no guest with this address, so far */
            continue;
        }
        memcpy(f->mac, mac, 6);
        f->answered = true;
        used(s, f);
        udp_reply(s, f->mac, &f->far, &f->guest, data, size);
    }
}
