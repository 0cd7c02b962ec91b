/* SPDX-License-Identifier: Apache-2.0
 *
 * TCP to the guest (RFC 9293, 3.8): segments of what waits in `out`, acknowledgements after a batch, and the timer.
 *
 * The wire is memory and loses only what a switch has no room for. What is lost, tcp_loss.c knows.
 */
#include "user.h"

#include <sys/random.h>
#include <sys/socket.h>

#define TRIES 15           /* retransmissions before the guest counts as gone */
#define SYN_TIME (75 * NS) /* a guest that boots may take a minute to listen */
#define ASK (200 * MS)     /* between questions who has an address */
#define LONGEST (10 * NS)  /* between retransmissions */
#define IDLE (120 * NS)    /* then a look whether the guest is there */
#define ALIVE_TRIES 5

uint32_t tcp_window(const struct flow *f)
{
    return RING - f->tcp.in.used;
}

uint32_t tcp_offered(const struct tcp *t)
{
    return seq_lt(t->rcv, t->told) ? t->told - t->rcv : 0;
}

void tcp_due(struct stack *s, struct flow *f)
{
    f->tcp.ack_due = true;
    if (f->tcp.listed || f->dead)
        return;
    f->tcp.listed = true;
    f->next_due = s->due;
    s->due = f;
}

void tcp_block(struct stack *s, struct flow *f)
{
    if (f->tcp.blocked || f->dead)
        return;
    f->tcp.blocked = true;
    f->next_blocked = s->blocked;
    s->blocked = f;
}

void tcp_unblocked(struct stack *s)
{
    struct flow *list = s->blocked;
    s->blocked = NULL;
    /* Those that find no room again put themselves on the new list. A flow on the old one must not be freed by
     * another's turn: only its own turn frees a flow. */
    while (list) {
        struct flow *f = list;
        list = f->next_blocked;
        f->tcp.blocked = false;
        tcp_from_host(s, f);
        if (!f->dead && f->tcp.ack_due)
            tcp_due(s, f);
    }
}

void tcp_flush(struct stack *s)
{
    struct flow *list = s->due;
    s->due = NULL;
    while (list) {
        struct flow *f = list;
        list = f->next_due;
        f->tcp.listed = false;
        if (!f->tcp.ack_due)
            continue; /* data took it along */
        if (!tcp_segment(s, f, ACK, f->tcp.nxt, 0, 0))
            tcp_block(s, f);
    }
}

/* Options of TCP behind the header; how long they are. */
static size_t put_options(struct stack *s, const struct flow *f, uint8_t *at, bool syn, bool blocks)
{
    const struct tcp *t = &f->tcp;
    const bool ours = t->state == T_SYN_SENT; /* the first SYN: it offers all */
    size_t size = 0;
    if (syn) {
        put32(at, 2u << 24 | 4u << 16 | (s->config.mtu - (addr_is4(&f->guest.ip) ? 40 : 60)));
        size = 4;
        if (ours || t->scaled) {
            put32(at + size, 1u << 24 | 3u << 16 | 3u << 8 | SCALE);
            size += 4;
        }
        if (ours || t->sack) {
            put32(at + size, 1u << 24 | 1u << 16 | 4u << 8 | 2);
            size += 4;
        }
    } else if (blocks) { /* RFC 2018, 3 */
        const int count = t->early.count < BLOCKS ? t->early.count : BLOCKS;
        put32(at, 1u << 24 | 1u << 16 | 5u << 8 | (2 + 8 * count));
        size = 4;
        for (int i = 0; i < count; i++, size += 8) {
            put32(at + size, t->early.of[i].at);
            put32(at + size + 4, t->early.of[i].end);
        }
    }
    return size;
}

/* One segment: `size` bytes of `out` from `offset`. False: the port takes nothing now. */
bool tcp_segment(struct stack *s, struct flow *f, uint8_t flags, uint32_t seq, uint32_t offset, uint32_t size)
{
    struct tcp *t = &f->tcp;
    const bool four = addr_is4(&f->guest.ip), syn = flags & SYN;
    const bool holes = t->sack && t->early.count;
    uint8_t head[VNET + ETHER + 40 + 60], options[40];
    /* Data fill a segment: what is behind holes an acknowledgement of its own tells. */
    const size_t length = 20 + put_options(s, f, options, syn, holes && !size && flags == ACK);
    size_t at = ip_header(s, head, f->mac, &f->far.ip, &f->guest.ip, IP_TCP, length + size);
    uint8_t *tcp = head + at;
    /* The right edge never moves back (RFC 9293, 3.8.6), and what does not fit 16 bits is rounded down. */
    const uint8_t scale = syn || !t->scaled ? 0 : SCALE;
    uint32_t window = tcp_window(f) >> scale;
    window = window > 65535 ? 65535 : window;
    put16(tcp, f->far.port);
    put16(tcp + 2, f->guest.port);
    put32(tcp + 4, seq);
    put32(tcp + 8, flags & ACK ? t->rcv : 0);
    tcp[12] = length / 4 << 4;
    tcp[13] = flags;
    put16(tcp + 14, window);
    put32(tcp + 16, 0);
    memcpy(tcp + 20, options, length - 20);
    struct iovec iov[3] = {{head, at + length}};
    int count = 1 + (size ? ring_used_iov(&t->out, offset, size, iov + 1) : 0);
    uint64_t sum = ip_pseudo(&f->far.ip, &f->guest.ip, IP_TCP, length + size);
    const unsigned takes = __atomic_load_n(&s->takes, __ATOMIC_RELAXED);
    if (takes & TAKES_CSUM) {
        struct vnet h = {.flags = VNET_NEEDS_CSUM, .csum_start = at - VNET, .csum_offset = 16};
        if (size > t->mss) {
            h.gso_type = four ? GSO_TCP4 : GSO_TCP6;
            h.gso_size = t->mss;
            h.hdr_len = at - VNET + length;
        }
        memcpy(head, &h, sizeof(h));
        put_sum(tcp + 16, sum_fold(sum));
    } else {
        sum = sum_bytes(tcp, length, sum);
        put_sum(tcp + 16, sum_end(sum_iov(iov + 1, count - 1, sum)));
    }
    if (!stack_send(s, iov, count))
        return false;
    if (flags & ACK) {
        t->ack_due = t->ack_due && holes && size;
        uint32_t edge = t->rcv + (window << scale);
        if (seq_lt(t->told, edge) || syn)
            t->told = edge;
    }
    return true;
}

uint32_t tcp_largest(struct stack *s, const struct flow *f)
{
    const struct tcp *t = &f->tcp;
    const bool four = addr_is4(&f->guest.ip);
    const unsigned takes = __atomic_load_n(&s->takes, __ATOMIC_RELAXED), tso = four ? TAKES_TSO4 : TAKES_TSO6;
    if ((takes & (TAKES_CSUM | tso)) != (TAKES_CSUM | tso))
        return t->mss;
    /* Many MSS when the guest takes such, but not all that may be on its way: a frame that is alone there and gets lost
     * leaves nobody to tell, only the timer. */
    uint32_t part = (t->wnd < t->cwnd ? t->wnd : t->cwnd) / 4;
    part = part < 65535 - 60 ? part : 65535 - 60;
    return part < t->mss ? t->mss : part / t->mss * t->mss;
}

/* Sends the next of what is lost, `hole` bytes at `again`, with our FIN if that is part of them. False: not now. */
static bool resend(struct stack *s, struct flow *f, uint32_t hole, uint32_t room, uint32_t most)
{
    struct tcp *t = &f->tcp;
    const uint32_t offset = t->again - t->una, left = offset < t->out.used ? t->out.used - offset : 0;
    const uint32_t first = offset ? 0 : t->fast ? most : t->mss; /* that one always (RFC 6675, 5: 4.3) */
    room = room < first ? first : room;
    uint32_t size = t->wnd > offset ? t->wnd - offset : 0;
    size = size < room ? size : room;
    size = size < most ? size : most;
    size = size < left ? size : left;
    size = size < hole ? size : hole;
    const bool last = size == left && t->nxt - t->una > t->out.used;
    if ((!size && !last) || (size < hole && size < left && size < t->mss && offset))
        return false;
    if (!tcp_segment(s, f, ACK | (size == left ? PSH : 0) | (last ? FIN : 0), t->again, offset, size)) {
        tcp_block(s, f);
        return false;
    }
    s->counts.tcp_retransmitted++;
    t->resent = t->nxt;
    t->again += size + last;
    if (seq_lt(t->lost, t->again))
        t->lost = t->again;
    return true;
}

void tcp_output(struct stack *s, struct flow *f)
{
    struct tcp *t = &f->tcp;
    const uint32_t most = tcp_largest(s, f);
    while (t->state == T_OPEN) {
        const uint32_t flight = t->nxt - t->una, hole = tcp_hole(t), busy = tcp_flight(t);
        const uint32_t unsent = flight < t->out.used ? t->out.used - flight : 0;
        const bool fin = t->eof && flight <= t->out.used && !t->fin_acked;
        const uint32_t room = t->cwnd > busy ? t->cwnd - busy : 0;
        if (hole) {
            if (!resend(s, f, hole, room, most))
                break;
            continue;
        }
        uint32_t size = t->wnd > flight ? t->wnd - flight : 0;
        size = size < room ? size : room;
        size = size < unsent ? size : unsent;
        size = size < most ? size : most;
        const bool last = fin && size == unsent;
        if (!size && !last)
            break;
        if (size < unsent && size < t->mss && flight)
            break; /* silly window (RFC 9293, 3.8.6.2.1): wait for more of it */
        uint8_t flags = ACK | (size == unsent ? PSH : 0) | (last ? FIN : 0);
        if (!tcp_segment(s, f, flags, t->nxt, flight, size)) {
            tcp_block(s, f);
            break;
        }
        t->nxt += size + last;
        if (last)
            t->last_ack = t->guest_fin;
        if (!t->timed_at) {
            t->timed = t->nxt;
            t->timed_at = s->now;
        }
        if (!flight)
            t->deadline = s->now + t->rto;
    }
    if (t->nxt != t->una || t->out.used) {
        if (t->nxt == t->una && t->deadline <= s->now)
            t->deadline = s->now + t->rto; /* the window is closed: ask now and then */
        if (f->timer.at < 0 || f->timer.due > t->deadline)
            timer_set(s, &f->timer, t->deadline);
    } else if (f->timer.at < 0) {
        timer_set(s, &f->timer, s->now + IDLE);
    }
}

void tcp_reset(struct stack *s, struct packet *p, const struct endpoint *guest, const struct endpoint *far)
{
    const uint8_t *in = p->data;
    const uint8_t flags = in[13];
    const uint32_t length = p->size - (in[12] >> 4) * 4 + !!(flags & SYN) + !!(flags & FIN);
    uint8_t head[VNET + ETHER + 40 + 20];
    size_t at = ip_header(s, head, p->ether + 6, &far->ip, &guest->ip, IP_TCP, 20);
    uint8_t *tcp = head + at;
    memset(tcp, 0, 20);
    put16(tcp, far->port);
    put16(tcp + 2, guest->port);
    if (flags & ACK) { /* RFC 9293, 3.10.7.1 */
        memcpy(tcp + 4, in + 8, 4);
        tcp[13] = RST;
    } else {
        put32(tcp + 8, get32(in + 4) + length);
        tcp[13] = RST | ACK;
    }
    tcp[12] = 5 << 4;
    put_sum(tcp + 16, sum_end(sum_bytes(tcp, 20, ip_pseudo(&far->ip, &guest->ip, IP_TCP, 20))));
    if (!stack_send(s, &(struct iovec){head, at + 20}, 1))
        s->counts.dropped++; /* the guest asks again */
}

void tcp_abort(struct stack *s, struct flow *f, bool guest, bool host)
{
    struct tcp *t = &f->tcp;
    if (guest && t->state != T_WAIT && !tcp_segment(s, f, RST | ACK, t->nxt, 0, 0))
        s->counts.dropped++;
    if (host && f->source.fd >= 0) {
        struct linger now = {1, 0};
        setsockopt(f->source.fd, SOL_SOCKET, SO_LINGER, &now, sizeof(now)); /* close(2) sends RST; else FIN, no worse */
    }
    flow_free(s, f);
}

/* -- time */

void tcp_arm(struct stack *s, struct flow *f, uint64_t due)
{
    f->tcp.deadline = due;
    timer_set(s, &f->timer, due);
}

static void syn_timer(struct stack *s, struct flow *f)
{
    struct tcp *t = &f->tcp;
    if (t->heard + SYN_TIME < s->now) {
        tcp_abort(s, f, true, true);
        return;
    }
    bool known = t->state == T_SYN_RCVD;
    if (!known) {
        const uint8_t *mac = neighbour_mac(s, &f->guest.ip);
        if ((known = mac))
            memcpy(f->mac, mac, 6);
    }
    if (known) {
        tcp_segment(s, f, t->state == T_SYN_RCVD ? SYN | ACK : SYN, t->una, 0, 0);
        t->timed_at = t->tries++ ? 0 : s->now; /* Karn: an answer would not say to which */
        t->rto = t->rto * 2 > 2 * NS ? 2 * NS : t->rto * 2;
    }
    tcp_arm(s, f, s->now + (known ? t->rto : ASK));
}

void tcp_timer(struct stack *s, struct timer *timer)
{
    struct flow *f = (struct flow *)((char *)timer - offsetof(struct flow, timer));
    struct tcp *t = &f->tcp;
    switch (t->state) {
    case T_CONNECT:
        s->counts.tcp_refused++;
        tcp_abort(s, f, true, true);
        return;
    case T_WAIT:
        flow_free(s, f);
        return;
    case T_SYN_SENT:
    case T_SYN_RCVD:
        syn_timer(s, f);
        return;
    case T_OPEN:
        break;
    }
    if ((t->can_read || t->hangup) && !t->eof && !t->out.used)
        tcp_from_host(s, f); /* there was no buffer */
    if (f->dead)
        return;
    const bool flight = t->nxt != t->una;
    if ((flight || t->out.used) && t->deadline > s->now) {
        timer_set(s, timer, t->deadline); /* it was put off by an acknowledgement meanwhile */
        return;
    }
    if (flight || t->out.used) {
        if (t->tries++ >= TRIES) {
            tcp_abort(s, f, true, true);
            return;
        }
        t->rto = t->rto * 2 > LONGEST ? LONGEST : t->rto * 2;
        t->deadline = s->now + t->rto;
        if (!t->wnd && t->out.used) { /* one byte beyond the window: the answer tells it (RFC 9293, 3.8.6.1) */
            tcp_segment(s, f, ACK, t->una, 0, 1);
            if (!flight)
                t->nxt++;
            t->again = t->una; /* with a window of 0 nobody keeps what was sent */
            t->lost = t->nxt;
            t->timed_at = 0;
        } else if (flight) {
            tcp_all_lost(t);
        }
        tcp_output(s, f);
        timer_set(s, timer, t->deadline);
        return;
    }
    if (t->heard + IDLE > s->now) {
        t->tries = 0;
        timer_set(s, timer, t->heard + IDLE);
        return;
    }
    if (t->tries++ >= ALIVE_TRIES) {
        tcp_abort(s, f, true, true);
        return;
    }
    tcp_segment(s, f, ACK, t->una - 1, 0, 0); /* an old number makes the guest answer */
    timer_set(s, timer, s->now + 10 * NS);
}

void tcp_begin(struct stack *s, struct flow *f)
{
    struct tcp *t = &f->tcp;
    uint32_t first;
    if (getrandom(&first, sizeof(first), GRND_NONBLOCK) != sizeof(first))
        first = s->now / 4000; /* the clock of RFC 9293, 3.4.1, while the host has no entropy yet */
    t->una = first;
    t->nxt = t->timed = first + 1; /* behind our SYN */
}

void tcp_connected(struct stack *s, struct flow *f)
{
    struct tcp *t = &f->tcp;
    t->tries = 0;
    if (t->state != T_CONNECT) {
        tcp_from_host(s, f);
        return;
    }
    t->state = T_SYN_RCVD;
    tcp_begin(s, f);
    t->rto = NS;
    if (tcp_segment(s, f, SYN | ACK, t->una, 0, 0)) {
        t->timed_at = s->now;
        t->tries = 1;
    } else {
        t->rto = 50 * MS;
    }
    tcp_arm(s, f, s->now + t->rto);
}
