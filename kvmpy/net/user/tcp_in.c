/* SPDX-License-Identifier: Apache-2.0
 *
 * TCP from the guest (RFC 9293, 3.10.7): what a segment does to a flow. The guest's peer is this stack; data that it
 * acknowledges are in the host's socket, or in `in` when that is full.
 */
#include "user.h"

#include <errno.h>
#include <sys/socket.h>
#include <unistd.h>

#define MAX_SHIFT 14         /* RFC 7323, 2.3 */
#define WAIT_TIME (2 * NS)   /* TIME-WAIT: on a wire that is memory nothing wanders about for minutes */
#define CONNECT_TIME (75 * NS)
#define SMALLEST_MSS 64

struct segment {
    uint32_t seq, ack, size;
    uint32_t wnd;
    uint8_t flags;
    const uint8_t *data;
    uint16_t mss; /* 0: no such option */
    int shift;    /* -1: no such option */
    bool sack;
    const uint8_t *blocks; /* of SACK */
    int block_count;
};

static bool parse(const struct packet *p, struct segment *g)
{
    const uint8_t *t = p->data;
    const uint32_t head = p->size >= 20 ? (t[12] >> 4) * 4u : 0;
    if (head < 20 || head > p->size)
        return false;
    *g = (struct segment){.seq = get32(t + 4), .ack = get32(t + 8), .flags = t[13] & 0x1F, .wnd = get16(t + 14),
                          .data = t + head, .size = p->size - head, .shift = -1};
    for (uint32_t at = 20; at < head && t[at];) {
        if (t[at] == 1) {
            at++;
            continue;
        }
        if (at + 2 > head || t[at + 1] < 2 || at + t[at + 1] > head)
            break; /* what stands behind nonsense is nonsense */
        if (t[at] == 2 && t[at + 1] == 4)
            g->mss = get16(t + at + 2);
        if (t[at] == 3 && t[at + 1] == 3)
            g->shift = t[at + 2] > MAX_SHIFT ? MAX_SHIFT : t[at + 2];
        if (t[at] == 4 && t[at + 1] == 2)
            g->sack = true;
        if (t[at] == 5 && t[at + 1] % 8 == 2) {
            g->blocks = t + at + 2;
            g->block_count = t[at + 1] / 8;
        }
        at += t[at + 1];
    }
    return true;
}

static void learn_options(struct stack *s, struct flow *f, const struct segment *g)
{
    struct tcp *t = &f->tcp;
    const uint16_t head = addr_is4(&f->guest.ip) ? 40 : 60, most = s->config.mtu - head;
    t->mss = g->mss ? g->mss : 536;
    t->mss = t->mss > most ? most : t->mss < SMALLEST_MSS ? SMALLEST_MSS : t->mss;
    t->scaled = g->shift >= 0;
    t->shift = t->scaled ? g->shift : 0;
    t->sack = g->sack; /* our own SYN offers it */
}

/* -- time (RFC 6298) */

static void sample(struct tcp *t, uint64_t now)
{
    const uint64_t r = now - t->timed_at + 1; /* srtt 0: there was no sample */
    if (!t->srtt) {
        t->srtt = r;
        t->rttvar = r / 2;
    } else {
        uint64_t error = r > t->srtt ? r - t->srtt : t->srtt - r;
        t->rttvar = (3 * t->rttvar + error) / 4;
        t->srtt = (7 * t->srtt + r) / 8;
    }
    t->timed_at = 0;
}

static uint64_t timeout(const struct tcp *t)
{
    const uint64_t rto = t->srtt + 4 * t->rttvar;
    return !t->srtt ? NS : rto < 250 * MS ? 250 * MS : rto > 10 * NS ? 10 * NS : rto;
}

/* -- opening */

static void refuse(struct stack *s, struct flow *f, int error)
{
    s->counts.tcp_refused++;
    if (error == ENETUNREACH || error == EHOSTUNREACH)
        icmp_error_of(s, f, error == ENETUNREACH ? NO_NET : NO_HOST);
    tcp_abort(s, f, true, false);
}

static void open_flow(struct stack *s, struct packet *p, const struct segment *g, const struct endpoint *guest,
                      const struct endpoint *far)
{
    struct target to;
    bool dns;
    if (!policy_route(s, IP_TCP, guest, far, &to, &dns)) {
        s->counts.tcp_refused++;
        tcp_reset(s, p, guest, far);
        return;
    }
    struct flow *f = flow_new(s, IP_TCP, guest, far);
    if (!f) {
        struct decision d = {.protocol = IP_TCP, .reason = BY_LIMIT, .guest = *guest, .far = *far, .rule = -1};
        policy_log(s, &d);
        s->counts.tcp_refused++;
        tcp_reset(s, p, guest, far);
        return;
    }
    struct tcp *t = &f->tcp;
    memcpy(f->mac, p->ether + 6, 6);
    f->timer.fire = tcp_timer;
    f->source.ready = tcp_host_ready;
    f->dns = dns;
    t->state = T_CONNECT;
    t->rcv = g->seq + 1;
    t->wnd = g->wnd;
    t->heard = s->now;
    learn_options(s, f, g);
    f->source.fd = flow_socket(s, to.family, SOCK_STREAM, 0);
    if (f->source.fd < 0 || (connect(f->source.fd, &to.any, to.size) && errno != EINPROGRESS)
        || !stack_watch(s, &f->source, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, false)) {
        refuse(s, f, errno);
        return;
    }
    s->counts.tcp_opened++;
    tcp_arm(s, f, s->now + CONNECT_TIME);
}

static void opened(struct stack *s, struct flow *f, const struct segment *g, uint8_t shift)
{
    struct tcp *t = &f->tcp;
    t->una = t->again = t->lost = t->recover = t->nxt;
    t->wnd = g->wnd << shift;
    t->wl1 = g->seq;
    t->wl2 = g->ack;
    t->state = T_OPEN;
    t->cwnd = RING;
    t->tries = 0;
    if (t->timed_at)
        sample(t, s->now);
    t->rto = timeout(t);
}

/* Our SYN was answered. */
static void input_syn_sent(struct stack *s, struct flow *f, const struct segment *g, struct packet *p)
{
    struct tcp *t = &f->tcp;
    const bool ours = g->flags & ACK && g->ack == t->nxt;
    if (g->flags & ACK && !ours) {
        if (!(g->flags & RST))
            tcp_reset(s, p, &f->guest, &f->far);
        return;
    }
    if (g->flags & RST) {
        if (ours) {
            s->counts.tcp_refused++;
            tcp_abort(s, f, false, true);
        }
        return;
    }
    if (!ours || !(g->flags & SYN))
        return; /* a simultaneous open cannot be: nobody in the guest knows of this port */
    learn_options(s, f, g);
    t->rcv = g->seq + 1;
    t->told = t->rcv + 65535; /* by our SYN */
    opened(s, f, g, 0);
    tcp_due(s, f);
    tcp_connected(s, f);
}

/* -- acknowledgements */

/* SND.UNA moves. */
static void advance(struct stack *s, struct flow *f, uint32_t ack)
{
    struct tcp *t = &f->tcp;
    const uint32_t count = ack - t->una, data = count < t->out.used ? count : t->out.used;
    if (count > t->out.used)
        t->fin_acked = true; /* nothing but our FIN is behind the data */
    if (data)
        ring_drop(&t->out, data);
    tcp_advance(t, ack);
    if (t->cwnd < RING && !t->fast)
        t->cwnd += t->cwnd < t->ssthresh ? data : (uint64_t)t->mss * t->mss / t->cwnd + 1;
    if (t->timed_at && seq_le(t->timed, ack))
        sample(t, s->now);
    /* The timer's doublings end here, not with the next sample as RFC 6298, 5 has it: they are to spare a network that
     * the timer may have filled, but this wire is memory, and now the guest is known to take data. */
    t->rto = timeout(t);
    t->deadline = s->now + t->rto;
}

/* False: the segment is to be dropped. */
static bool acknowledge(struct stack *s, struct flow *f, const struct segment *g)
{
    struct tcp *t = &f->tcp;
    if (seq_lt(t->nxt, g->ack)) { /* of what was never sent */
        tcp_due(s, f);
        return false;
    }
    const uint32_t wnd = g->wnd << t->shift;
    const bool advances = seq_lt(t->una, g->ack);
    if (advances)
        advance(s, f, g->ack);
    const bool news = t->sack && g->block_count && tcp_held(t, g->blocks, g->block_count);
    const bool plain = !t->sack && !g->size && wnd && wnd == t->wnd && !(g->flags & FIN); /* RFC 5681, 2 */
    if (!advances && g->ack == t->una && t->nxt != t->una && (news || plain) && t->dup < 255) {
        t->dup++;
        if (t->fast && !t->held.count && t->cwnd < RING)
            t->cwnd += t->mss; /* something has left the wire (RFC 5681, 3.2) */
    }
    tcp_suspect(s, t, tcp_largest(s, f));
    if (seq_lt(t->wl1, g->seq) || (t->wl1 == g->seq && seq_le(t->wl2, g->ack))) {
        t->wnd = wnd;
        t->wl1 = g->seq;
        t->wl2 = g->ack;
    }
    t->tries = 0; /* whatever it says, it is there */
    return true;
}

/* -- data and FIN */

static void receive(struct stack *s, struct flow *f, struct segment *g)
{
    struct tcp *t = &f->tcp;
    if (!g->size && !(g->flags & FIN))
        return;
    tcp_due(s, f);
    if (t->guest_fin)
        return;
    if (g->flags & FIN && g->seq + g->size - t->rcv <= tcp_offered(t)) {
        t->fin = g->seq + g->size;
        t->fin_known = true;
    }
    if (seq_lt(t->rcv, g->seq)) { /* after a hole */
        s->counts.tcp_out_of_order++;
        tcp_keep_early(s, f, g->seq, g->data, g->size);
        tcp_segment(s, f, ACK, t->nxt, 0, 0); /* at once, and for each (RFC 5681, 4.2); else it is due still */
        return;
    }
    const uint32_t old = t->rcv - g->seq; /* seen before */
    if (old > g->size)
        return;
    if (g->size > old)
        t->rcv += tcp_to_host(s, f, g->data + old, g->size - old);
    if (f->dead)
        return;
    tcp_take_early(s, f);
    if (f->dead)
        return;
    if (t->fin_known && t->rcv == t->fin) {
        t->rcv++;
        t->guest_fin = true;
        t->early.count = 0; /* behind a FIN is nothing */
        tcp_host_done(s, f);
    }
    t->fin_known = t->fin_known && seq_lt(t->rcv, t->fin);
}

void tcp_finished(struct stack *s, struct flow *f)
{
    struct tcp *t = &f->tcp;
    if (!t->guest_fin || !t->shut || !t->fin_acked || t->in.used)
        return;
    if (t->ack_due)
        tcp_segment(s, f, ACK, t->nxt, 0, 0);
    if (t->last_ack) {
        flow_free(s, f);
        return;
    }
    /* Who closed first waits, to say it again if the last acknowledgement is lost. */
    timer_clear(s, &f->timer);
    t->state = T_WAIT;
    epoll_ctl(s->epoll, EPOLL_CTL_DEL, f->source.fd, NULL);
    close(f->source.fd);
    f->source.fd = -1;
    ring_put(s, &t->out);
    ring_put(s, &t->in);
    tcp_arm(s, f, s->now + WAIT_TIME);
}

/* -- a segment of a known flow */

static void input_wait(struct stack *s, struct flow *f, const struct segment *g, struct packet *p)
{
    if (g->flags & RST) {
        flow_free(s, f);
    } else if (g->flags & SYN && !(g->flags & ACK) && seq_lt(f->tcp.rcv, g->seq)) {
        flow_free(s, f); /* a new connection from the same port (RFC 9293, 3.10.7.4) */
        tcp_input(s, p);
    } else if (g->size || g->flags & (FIN | SYN)) {
        tcp_segment(s, f, ACK, f->tcp.nxt, 0, 0);
    }
}

static void input_flow(struct stack *s, struct flow *f, struct segment *g, struct packet *p)
{
    struct tcp *t = &f->tcp;
    t->heard = s->now;
    memcpy(f->mac, p->ether + 6, 6);
    switch (t->state) {
    case T_CONNECT:
        if (g->flags & RST) {
            tcp_abort(s, f, false, true);
        } else if (!(g->flags & SYN) || g->seq + 1 != t->rcv) {
            tcp_abort(s, f, false, true); /* the guest has forgotten that it was connecting */
            tcp_reset(s, p, &f->guest, &f->far);
        }
        return;
    case T_SYN_SENT:
        input_syn_sent(s, f, g, p);
        return;
    case T_WAIT:
        input_wait(s, f, g, p);
        return;
    case T_SYN_RCVD:
    case T_OPEN:
        break;
    }
    /* 3.4: is any of it within the window? */
    const uint32_t window = tcp_offered(t);
    const uint32_t length = g->size + !!(g->flags & SYN) + !!(g->flags & FIN);
    const bool begins = seq_le(t->rcv, g->seq) && (window ? seq_lt(g->seq, t->rcv + window) : g->seq == t->rcv);
    const uint32_t last = g->seq + length - 1;
    const bool ends = length && seq_le(t->rcv, last) && window && seq_lt(last, t->rcv + window);
    if (!begins && !ends && !(length && g->seq == t->rcv)) {
        if (!(g->flags & RST))
            tcp_due(s, f); /* old data: our acknowledgement was lost; or a probe of the window */
        /* What it acknowledges is still true. */
        if (!(g->flags & RST) && g->flags & ACK && t->state == T_OPEN && seq_le(g->seq, t->rcv))
            acknowledge(s, f, g);
    } else if (g->flags & RST) {
        if (g->seq == t->rcv)
            tcp_abort(s, f, false, true);
        else
            tcp_due(s, f); /* RFC 5961, 3.2: the guest confirms with the exact number, if it means it */
        return;
    } else if (g->flags & SYN) {
        if (t->state == T_SYN_RCVD && g->seq + 1 == t->rcv)
            t->deadline = s->now; /* our answer was lost */
        tcp_due(s, f);            /* RFC 5961, 4.2 */
        return;
    } else if (!(g->flags & ACK)) {
        return;
    } else {
        if (t->state == T_SYN_RCVD) {
            if (g->ack != t->nxt) {
                tcp_reset(s, p, &f->guest, &f->far);
                return;
            }
            opened(s, f, g, t->shift);
            tcp_from_host(s, f);
            if (f->dead)
                return;
        } else if (!acknowledge(s, f, g)) {
            return;
        }
        receive(s, f, g);
        if (f->dead)
            return;
    }
    if (t->state == T_OPEN)
        tcp_from_host(s, f); /* there may be room now, in the buffer and in the guest's window */
    if (!f->dead && t->state == T_OPEN)
        tcp_finished(s, f);
}

void tcp_input(struct stack *s, struct packet *p)
{
    struct segment g;
    if (!parse(p, &g)) {
        s->counts.malformed++;
        return;
    }
    struct endpoint guest = {p->src, get16(p->data)}, far = {p->dst, get16(p->data + 2)};
    if (p->broadcast || p->ether[0] & 1 || !guest.port || !far.port) {
        s->counts.ignored++;
        return;
    }
    struct flow *f = flow_find(s, IP_TCP, &guest, &far);
    if (f)
        input_flow(s, f, &g, p);
    else if ((g.flags & (SYN | ACK | RST | FIN)) == SYN)
        open_flow(s, p, &g, &guest, &far);
    else if (!(g.flags & RST))
        tcp_reset(s, p, &guest, &far);
}
