/* SPDX-License-Identifier: Apache-2.0
 *
 * One port: frames out of its descriptor and into it, and those that wait because it is full.
 */
#include "hub.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define BATCH 64

uint64_t hub_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

void port_watch(struct hub *h, struct port *p)
{
    struct epoll_event e = {(p->paused ? 0 : EPOLLIN) | (p->waits ? EPOLLOUT : 0), {.ptr = p}};
    if (p->fd >= 0 && epoll_ctl(h->epoll, EPOLL_CTL_MOD, p->fd, &e))
        port_gone(h, p, errno);
}

void port_forget(struct port *p)
{
    while (p->first) {
        struct queued *q = p->first;
        p->first = q->next;
        free(q);
    }
    p->last = &p->first;
    p->frames = p->bytes = p->have = 0;
}

void port_gone(struct hub *h, struct port *p, int error)
{
    if (p->fd < 0)
        return;
    uint64_t one = 1;
    epoll_ctl(h->epoll, EPOLL_CTL_DEL, p->fd, NULL);
    close(p->fd);
    p->fd = -1;
    p->error = error;
    p->waits = p->paused = false;
    port_forget(p);
    for (int i = 0; i < MACS; i++)
        if (h->macs[i].seen && &h->ports[h->macs[i].port] == p)
            h->macs[i].seen = 0;
    p->macs = 0;
    if (write(h->news, &one, sizeof(one)) < 0)
        return; /* it is readable already */
}

bool port_full(const struct port *p)
{
    return p->frames >= QUEUE_FRAMES || p->bytes >= QUEUE_BYTES;
}

/* How many bytes the descriptor took; -1: none now, or for ever. */
static ssize_t put(struct hub *h, struct port *p, const struct iovec *iov, int count)
{
    ssize_t wrote;
    do
        wrote = writev(p->fd, iov, count);
    while (wrote < 0 && errno == EINTR);
    if (wrote >= 0)
        return wrote;
    if (errno == EAGAIN || errno == ENOBUFS)
        return 0;
    if (errno == EPIPE || errno == ECONNRESET || errno == ECONNREFUSED || errno == ENOTCONN || errno == EBADFD)
        port_gone(h, p, errno);
    else
        p->counts.tx_dropped++; /* a tap that is down: this frame, not the port */
    return -1;
}

static bool keep(struct hub *h, struct port *p, const struct iovec *iov, int count, size_t done)
{
    size_t size = 0;
    for (int i = 0; i < count; i++)
        size += iov[i].iov_len;
    /* What was begun in a stream must be ended. */
    struct queued *q = !done && port_full(p) ? NULL : malloc(sizeof(*q) + size);
    if (!q) {
        p->counts.tx_dropped++;
        if (done)
            port_gone(h, p, ENOMEM);
        return false;
    }
    q->next = NULL;
    q->size = size;
    q->done = done;
    uint8_t *at = q->data;
    for (int i = 0; i < count; at += iov[i++].iov_len)
        memcpy(at, iov[i].iov_base, iov[i].iov_len);
    *p->last = q;
    p->last = &q->next;
    p->frames++;
    p->bytes += size;
    if (!p->waits) {
        p->waits = true;
        port_watch(h, p);
    }
    return true;
}

struct outlet {
    struct hub *hub;
    struct port *port;
};

static bool emit(void *to, uint8_t *frame, size_t size)
{
    struct outlet *o = to;
    struct port *p = o->port;
    uint8_t length[4];
    struct iovec iov[2];
    int count = 0;
    size_t whole = size;
    if (p->kind == PORT_VNET) {
        frame[10] = 1; /* num_buffers */
        frame[11] = 0;
        iov[count++] = (struct iovec){frame, VNET + size};
        whole += VNET;
    } else {
        if (p->kind == PORT_STREAM) {
            put32(length, size);
            iov[count++] = (struct iovec){length, 4};
            whole += 4;
        }
        iov[count++] = (struct iovec){frame + VNET, size};
    }
    ssize_t wrote = p->first ? 0 : put(o->hub, p, iov, count);
    if (wrote == (ssize_t)whole || (wrote >= 0 && keep(o->hub, p, iov, count, wrote))) {
        p->counts.tx_frames++;
        p->counts.tx_bytes += size;
    }
    return p->fd >= 0;
}

void port_send(struct hub *h, int to, uint8_t *frame, size_t size)
{
    struct outlet o = {h, &h->ports[to]};
    if (o.port->fd < 0) {
        o.port->counts.tx_dropped++;
        return;
    }
    const unsigned takes = o.port->kind == PORT_VNET ? o.port->takes : 0;
    if (!finish_frame(frame, size, takes, h->room, emit, &o))
        o.port->counts.tx_dropped++; /* its header does not fit it */
}

void port_writable(struct hub *h, struct port *p)
{
    while (p->first) {
        struct queued *q = p->first;
        ssize_t wrote = put(h, p, &(struct iovec){q->data + q->done, q->size - q->done}, 1);
        if (p->fd < 0 || !wrote)
            return;
        if (wrote > 0 && (q->done += wrote) < q->size)
            return;
        p->first = q->next;
        if (!p->first)
            p->last = &p->first;
        p->frames--;
        p->bytes -= q->size;
        free(q);
    }
    if (p->waits) {
        p->waits = false;
        port_watch(h, p);
    }
}

static void read_frames(struct hub *h, struct port *p)
{
    for (int n = 0; n < BATCH && p->fd >= 0 && !p->paused; n++) {
        const size_t skip = p->kind == PORT_VNET ? 0 : VNET;
        ssize_t size = read(p->fd, h->frame + skip, sizeof(h->frame) - skip);
        if (size < 0 && (errno == EINTR || errno == EAGAIN))
            return;
        if (size <= 0) {
            port_gone(h, p, size ? errno : 0);
            return;
        }
        if (skip)
            memset(h->frame, 0, VNET);
        if (size + skip < VNET + ETHER) {
            p->counts.rx_malformed++;
            continue;
        }
        hub_frame(h, p, size + skip - VNET);
    }
}

/* Frames with their length before them, four bytes, big endian; however the stream is cut. */
void port_parse(struct hub *h, struct port *p)
{
    uint32_t at = 0;
    while (p->fd >= 0 && p->have - at >= 4 && !p->paused) {
        uint32_t size = get32(p->stream + at);
        if (size > MAX_FRAME) { /* no way to find the next one */
            port_gone(h, p, EBADMSG);
            return;
        }
        if (p->have - at - 4 < size)
            break;
        if (size < ETHER) {
            p->counts.rx_malformed++;
        } else {
            memset(h->frame, 0, VNET);
            memcpy(h->frame + VNET, p->stream + at + 4, size);
            hub_frame(h, p, size);
        }
        at += 4 + size;
    }
    if (p->fd < 0)
        return;
    p->have -= at;
    memmove(p->stream, p->stream + at, p->have);
}

static void read_stream(struct hub *h, struct port *p)
{
    ssize_t got = read(p->fd, p->stream + p->have, STREAM_BUFFER - p->have);
    if (got < 0 && (errno == EINTR || errno == EAGAIN))
        return;
    if (got <= 0) {
        port_gone(h, p, got ? errno : 0);
        return;
    }
    p->have += got;
    port_parse(h, p);
}

void port_readable(struct hub *h, struct port *p)
{
    if (p->kind == PORT_STREAM)
        read_stream(h, p);
    else
        read_frames(h, p);
}
