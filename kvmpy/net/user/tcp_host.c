/* SPDX-License-Identifier: Apache-2.0
 *
 * The host's side of TCP: a socket per flow, edge-triggered, and back pressure both ways. What the guest sends goes
 * straight
 * from its frame into the socket; only what the socket does not take now is kept, and the guest's window shrinks by it.
 * What the host sends is read when `out` has room, so that a slow guest slows the far end down.
 */
#define _GNU_SOURCE /* accept4 */
#include "user.h"

#include <errno.h>
#include <netinet/tcp.h>
#include <sys/socket.h>
#include <unistd.h>

#define PAUSE (100 * MS) /* without descriptors or buffers, until the next try */

/* -- from the guest */

static void broken(struct stack *s, struct flow *f)
{
    tcp_abort(s, f, true, true);
}

/* Into the socket; how many bytes it took. The flow is dead after an error. */
static uint32_t push(struct stack *s, struct flow *f, struct iovec *iov, int count)
{
    struct msghdr m = {.msg_iov = iov, .msg_iovlen = count};
    ssize_t sent;
    do
        sent = sendmsg(f->source.fd, &m, MSG_NOSIGNAL);
    while (sent < 0 && errno == EINTR);
    if (sent < 0 && errno == EAGAIN) {
        f->tcp.can_write = false;
        return 0;
    }
    if (sent < 0) {
        broken(s, f);
        return 0;
    }
    return sent;
}

static void drain(struct stack *s, struct flow *f)
{
    struct tcp *t = &f->tcp;
    const uint32_t before = t->told - t->rcv;
    while (t->in.used && t->can_write) {
        struct iovec iov[2];
        int count = ring_used_iov(&t->in, 0, t->in.used, iov);
        uint32_t took = push(s, f, iov, count);
        if (f->dead)
            return;
        ring_drop(&t->in, took);
    }
    if (!t->in.used && t->in.data) {
        if (!t->early.count)
            ring_put(s, &t->in);
        tcp_host_done(s, f);
    }
    if (!t->guest_fin && tcp_window(f) >= before + RING / 4)
        tcp_due(s, f); /* a new window, worth a segment (RFC 9293, 3.8.6.2.2) */
}

uint32_t tcp_to_host(struct stack *s, struct flow *f, const uint8_t *data, uint32_t size)
{
    struct tcp *t = &f->tcp;
    uint32_t took = 0;
    if (!t->in.used && t->can_write) {
        struct iovec iov = {(void *)data, size};
        took = push(s, f, &iov, 1);
        if (f->dead)
            return took;
        t->in.head = (t->in.head + took) & (RING - 1); /* places in the ring are those of the sequence */
        if (took == size)
            return took;
    }
    uint32_t rest = size - took, room = tcp_window(f);
    rest = rest < room ? rest : room;
    if (rest && ring_get(s, &t->in) && ring_append(&t->in, data + took, rest))
        took += rest; /* without a buffer it is not acknowledged, and comes again */
    if (t->in.used && t->can_write)
        drain(s, f); /* a short count of send(2) need not mean that it is full */
    return took;
}

void tcp_keep_early(struct stack *s, struct flow *f, uint32_t seq, const uint8_t *data, uint32_t size)
{
    struct tcp *t = &f->tcp;
    const uint32_t offset = seq - t->rcv, offered = tcp_offered(t);
    const uint32_t room = offered < tcp_window(f) ? offered : tcp_window(f);
    if (!size || offset >= room || !ring_get(s, &t->in))
        return;
    size = size < room - offset ? size : room - offset;
    if (ranges_add(&t->early, seq, seq + size)) /* else one hole too many: that comes again */
        ring_put_at(&t->in, offset, data, size);
}

void tcp_take_early(struct stack *s, struct flow *f)
{
    struct tcp *t = &f->tcp;
    const uint8_t before = t->early.count;
    const uint32_t count = ranges_reach(&t->early, t->rcv);
    if (t->early.count == before)
        return;
    t->rcv += count;
    t->in.used += count;
    if (t->can_write)
        drain(s, f);
}

void tcp_host_done(struct stack *s, struct flow *f)
{
    struct tcp *t = &f->tcp;
    if (!t->guest_fin || t->in.used || t->shut)
        return;
    t->shut = true;
    shutdown(f->source.fd, SHUT_WR); /* it fails only when the far end has reset, which reading will tell */
}

/* -- from the host */

void tcp_from_host(struct stack *s, struct flow *f)
{
    struct tcp *t = &f->tcp;
    if (t->state != T_OPEN)
        return;
    while ((t->can_read || t->hangup) && !t->eof && RING - t->out.used >= (t->out.used ? RING / 8 : 1)) {
        if (!ring_get(s, &t->out)) {
            if (f->timer.at < 0 || f->timer.due > s->now + PAUSE) {
                t->deadline = s->now + PAUSE;
                timer_set(s, &f->timer, t->deadline);
            }
            break;
        }
        struct iovec iov[2];
        int count = ring_free_iov(&t->out, iov);
        const uint32_t room = RING - t->out.used;
        ssize_t got = readv(f->source.fd, iov, count);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0 && errno == EAGAIN) {
            t->can_read = false;
            break;
        }
        if (got < 0) {
            broken(s, f);
            return;
        }
        if (!got) {
            t->eof = true;
            break;
        }
        t->out.used += got;
        if (got < room)
            t->can_read = false; /* all of it; more makes a new edge, and a hang-up is known */
        if (!t->blocked)
            tcp_output(s, f);
    }
    if (!t->blocked)
        tcp_output(s, f);
    if (!t->out.used)
        ring_put(s, &t->out);
}

static void connected(struct stack *s, struct flow *f)
{
    int error = 0, one = 1;
    socklen_t size = sizeof(error);
    getsockopt(f->source.fd, SOL_SOCKET, SO_ERROR, &error, &size);
    if (error) {
        s->counts.tcp_refused++;
        if (error == ENETUNREACH || error == EHOSTUNREACH)
            icmp_error_of(s, f, error == ENETUNREACH ? NO_NET : NO_HOST);
        tcp_abort(s, f, true, false);
        return;
    }
    /* The guest has decided how much goes into a segment. Other families than TCP know neither. */
    setsockopt(f->source.fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    setsockopt(f->source.fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
    tcp_connected(s, f);
}

void tcp_host_ready(struct stack *s, struct source *source, uint32_t events)
{
    struct flow *f = (struct flow *)source;
    struct tcp *t = &f->tcp;
    if (events & EPOLLIN)
        t->can_read = true;
    if (events & EPOLLOUT)
        t->can_write = true;
    if (events & (EPOLLRDHUP | EPOLLHUP | EPOLLERR))
        t->hangup = true;
    if (t->state == T_CONNECT && events & (EPOLLOUT | EPOLLERR | EPOLLHUP))
        connected(s, f);
    if (f->dead || t->state != T_OPEN)
        return;
    if (t->can_write)
        drain(s, f);
    if (!f->dead)
        tcp_from_host(s, f);
    if (!f->dead)
        tcp_finished(s, f);
}

/* -- forwards */

void tcp_listener_again(struct stack *s, struct timer *timer)
{
    struct listener *l = (struct listener *)((char *)timer - offsetof(struct listener, timer));
    stack_watch(s, &l->source, EPOLLIN, true);
}

static bool far_of(struct stack *s, const struct listener *l, const struct sockaddr *client, struct endpoint *far)
{
    const struct addr *here = addr_is4(&l->guest.ip) ? &s->config.gateway : &s->config.gateway6;
    if (!endpoint_of(client, far) || addr_is4(&far->ip) != addr_is4(&l->guest.ip) || far->ip.b[12] == 127
        || on_network(s, &far->ip)) {
        far->ip = *here; /* what the guest could not answer to, and a client on a Unix socket */
        if (client->sa_family == AF_UNIX)
            far->port = s->ephemeral++ | 0xC000;
    }
    for (int tries = 0; tries < 64 && flow_find(s, IP_TCP, &l->guest, far); tries++)
        *far = (struct endpoint){*here, s->ephemeral++ | 0xC000};
    return !flow_find(s, IP_TCP, &l->guest, far);
}

static void accepted(struct stack *s, struct listener *l, int fd, const struct sockaddr *client)
{
    struct endpoint far;
    struct flow *f = far_of(s, l, client, &far) ? flow_new(s, IP_TCP, &l->guest, &far) : NULL;
    struct decision d = {.verdict = f ? ALLOW : DENY, .protocol = IP_TCP, .reason = f ? BY_FORWARD : BY_LIMIT,
                         .inbound = 1, .rule = -1, .guest = l->guest, .far = far};
    policy_log(s, &d);
    if (!f) {
        close(fd);
        return;
    }
    struct tcp *t = &f->tcp;
    int one = 1;
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    f->source = (struct source){fd, tcp_host_ready};
    f->timer.fire = tcp_timer;
    t->state = T_SYN_SENT;
    t->can_write = true;
    tcp_begin(s, f);
    t->rto = 125 * MS;
    t->heard = s->now;
    s->counts.tcp_opened++;
    if (!stack_watch(s, &f->source, EPOLLIN | EPOLLOUT | EPOLLRDHUP | EPOLLET, false)) {
        tcp_abort(s, f, false, true);
        return;
    }
    tcp_arm(s, f, s->now); /* the timer sends SYN, as often as needed */
}

void tcp_listener_ready(struct stack *s, struct source *source, uint32_t events)
{
    struct listener *l = (struct listener *)source;
    for (int n = 0; n < BATCH; n++) {
        struct sockaddr_storage client;
        socklen_t size = sizeof(client);
        memset(&client, 0, sizeof(client));
        /* With no room for more the backlog of the host is the queue. */
        if (s->tcps >= s->config.max_tcp) {
            errno = EMFILE;
        } else {
            int fd = accept4(source->fd, (struct sockaddr *)&client, &size, SOCK_NONBLOCK | SOCK_CLOEXEC);
            if (fd >= 0) {
                accepted(s, l, fd, (struct sockaddr *)&client);
                continue;
            }
        }
        if (errno == EMFILE || errno == ENFILE || errno == ENOMEM || errno == ENOBUFS) {
            s->counts.no_descriptors++;
            stack_watch(s, source, 0, true); /* else it would be ready again at once */
            timer_set(s, &l->timer, s->now + PAUSE);
            return;
        }
        if (errno == EAGAIN)
            return;
        /* EINTR, ECONNABORTED and errors of the network: the next one (accept(2)) */
    }
}
