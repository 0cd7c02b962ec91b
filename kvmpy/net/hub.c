/* SPDX-License-Identifier: Apache-2.0
 *
 * Where a frame goes: to the port behind which its address was seen, or to all (IEEE 802.1D, 7.5 to 7.9, without
 * spanning trees).
 */
#include "hub.h"

#include <errno.h>
#include <fcntl.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <unistd.h>

#define EVENTS 64
#define AGE (300 * 1000000000ull) /* until an address is forgotten */
#define FLUSH 100                 /* ms that captured frames stay in memory */
#define WAYS 4

/* -- addresses */

static struct known *set_of(struct hub *h, const uint8_t mac[6])
{
    uint64_t v = 0;
    memcpy(&v, mac, 6);
    v = (v ^ h->key) * 0x9E3779B97F4A7C15ull; /* keyed: a guest must not choose whose place it takes */
    return &h->macs[(v >> 40) % (MACS / WAYS) * WAYS];
}

static int lookup(struct hub *h, const uint8_t mac[6])
{
    struct known *set = set_of(h, mac);
    for (int i = 0; i < WAYS; i++)
        if (set[i].seen && set[i].seen + AGE > h->now && !memcmp(set[i].mac, mac, 6))
            return set[i].port;
    return -1;
}

static void learn(struct hub *h, int port, const uint8_t mac[6])
{
    struct known *set = set_of(h, mac), *at = set;
    for (int i = 0; i < WAYS; i++) {
        if (set[i].seen && !memcmp(set[i].mac, mac, 6)) {
            at = &set[i];
            break;
        }
        if (set[i].seen < at->seen)
            at = &set[i];
    }
    const bool same = at->seen && at->port == port;
    if (!same && h->ports[port].macs >= PORT_MACS)
        return; /* one port must not push out all the others */
    if (at->seen)
        h->ports[at->port].macs--;
    h->ports[port].macs++;
    memcpy(at->mac, mac, 6);
    at->port = port;
    at->seen = h->now;
}

static bool may_flood(struct hub *h, struct port *p)
{
    p->flood += (h->now - p->flood_at) / 1e9 * h->flood_rate;
    p->flood_at = h->now;
    if (p->flood > h->flood_rate)
        p->flood = h->flood_rate;
    if (p->flood < 1)
        return false;
    p->flood--;
    return true;
}

/* -- frames */

void hub_frame(struct hub *h, struct port *from, size_t size)
{
    const uint8_t *mac = h->frame + VNET;
    const int number = from - h->ports;
    from->counts.rx_frames++;
    from->counts.rx_bytes += size;
    capture_frame(&h->capture, mac, size, h->now);
    if (h->relay) {
        struct port *to = &h->ports[number ^ 1];
        if (!to->used)
            return;
        port_send(h, number ^ 1, h->frame, size);
        if (to->fd >= 0 && port_full(to)) { /* wait instead of losing */
            from->paused = true;
            port_watch(h, from);
        }
        return;
    }
    if (mac[6] & 1 || (from->locked && memcmp(mac + 6, from->mac, 6))) {
        from->counts.rx_spoofed++;
        return;
    }
    learn(h, number, mac + 6);
    const int to = mac[0] & 1 ? -1 : lookup(h, mac);
    if (to == number)
        return;
    if (to >= 0) {
        port_send(h, to, h->frame, size);
        return;
    }
    if (!may_flood(h, from)) {
        from->counts.flood_dropped++;
        return;
    }
    for (int i = 0; i < PORTS; i++)
        if (i != number && h->ports[i].used && h->ports[i].fd >= 0)
            port_send(h, i, h->frame, size);
}

/* -- the loop */

static void step(struct hub *h, int wait)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(h->epoll, events, EVENTS, wait);
    pthread_mutex_lock(&h->lock);
    h->now = hub_clock();
    for (int i = 0; i < count; i++) {
        struct port *p = events[i].data.ptr;
        if (!p) {
            uint64_t n;
            if (read(h->wake, &n, sizeof(n)) < 0)
                continue; /* woken by another */
        } else if (p->fd >= 0) {
            if (events[i].events & EPOLLOUT)
                port_writable(h, p);
            if (p->fd >= 0 && !p->paused && events[i].events & (EPOLLIN | EPOLLHUP | EPOLLERR))
                port_readable(h, p);
        }
    }
    for (int i = 0; h->relay && i < 2; i++)
        if (h->ports[i].paused && (h->ports[i ^ 1].fd < 0 || !h->ports[i ^ 1].first)) {
            h->ports[i].paused = false;
            port_watch(h, &h->ports[i]);
            if (h->ports[i].have)
                port_parse(h, &h->ports[i]);
        }
    if (h->capture.used && h->now - h->capture.flushed_at > FLUSH * 1000000ull)
        capture_flush(&h->capture, h->now);
    pthread_mutex_unlock(&h->lock);
}

void hub_run(struct hub *h)
{
    while (!__atomic_load_n(&h->stopped, __ATOMIC_ACQUIRE)) {
        pthread_mutex_lock(&h->lock);
        const int wait = h->capture.used ? FLUSH : -1;
        pthread_mutex_unlock(&h->lock);
        step(h, wait);
    }
}

static void wake(struct hub *h)
{
    uint64_t one = 1;
    if (write(h->wake, &one, sizeof(one)) < 0)
        return; /* it is awake */
}

void hub_stop(struct hub *h)
{
    __atomic_store_n(&h->stopped, true, __ATOMIC_RELEASE);
    wake(h);
}

/* -- life, and changes by other threads */

struct hub *hub_new(bool relay, uint32_t flood_rate)
{
    struct hub *h = calloc(1, sizeof(*h));
    if (!h)
        return NULL;
    h->relay = relay;
    h->flood_rate = flood_rate;
    h->capture.fd = -1;
    h->epoll = epoll_create1(EPOLL_CLOEXEC);
    h->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    h->news = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    pthread_mutex_init(&h->lock, NULL);
    h->now = hub_clock();
    struct epoll_event e = {EPOLLIN, {.ptr = NULL}};
    if (h->epoll < 0 || h->wake < 0 || h->news < 0 || epoll_ctl(h->epoll, EPOLL_CTL_ADD, h->wake, &e)
        || getrandom(&h->key, sizeof(h->key), 0) != sizeof(h->key)) {
        int error = errno;
        hub_free(h);
        errno = error;
        return NULL;
    }
    return h;
}

void hub_free(struct hub *h)
{
    for (int i = 0; i < PORTS; i++) {
        if (h->ports[i].used && h->ports[i].fd >= 0)
            close(h->ports[i].fd);
        port_forget(&h->ports[i]);
        free(h->ports[i].stream);
    }
    if (h->capture.fd >= 0)
        capture_flush(&h->capture, h->now);
    free(h->capture.buffer);
    if (h->epoll >= 0)
        close(h->epoll);
    if (h->wake >= 0)
        close(h->wake);
    if (h->news >= 0)
        close(h->news);
    pthread_mutex_destroy(&h->lock);
    free(h);
}

static int plug(struct hub *h, struct port *p, int fd)
{
    struct epoll_event e = {EPOLLIN, {.ptr = p}};
    if (fd >= 0) {
        int ours = fcntl(fd, F_DUPFD_CLOEXEC, 0);
        if (ours < 0)
            return errno;
        if (epoll_ctl(h->epoll, EPOLL_CTL_ADD, ours, &e)) {
            int error = errno;
            close(ours);
            return error;
        }
        fd = ours;
    }
    p->fd = fd;
    p->error = 0;
    return 0;
}

int hub_add(struct hub *h, enum port_kind kind, int fd, unsigned takes, const uint8_t *mac)
{
    int number = 0, result;
    pthread_mutex_lock(&h->lock);
    while (number < PORTS && h->ports[number].used)
        number++;
    if (number == PORTS || (h->relay && number > 1)) {
        result = -ENOSPC;
    } else {
        struct port *p = &h->ports[number];
        *p = (struct port){.used = true, .kind = kind, .fd = -1, .takes = takes, .locked = mac, .flood_at = h->now,
                           .flood = h->flood_rate};
        p->last = &p->first;
        if (mac)
            memcpy(p->mac, mac, 6);
        if (kind == PORT_STREAM)
            p->stream = malloc(STREAM_BUFFER);
        result = kind == PORT_STREAM && !p->stream ? -ENOMEM : -plug(h, p, fd);
        if (result)
            free(p->stream);
        if (result)
            *p = (struct port){0};
        else
            result = number;
    }
    pthread_mutex_unlock(&h->lock);
    return result;
}

int hub_plug(struct hub *h, int port, int fd)
{
    pthread_mutex_lock(&h->lock);
    struct port *p = &h->ports[port];
    int error = p->fd >= 0 ? EBUSY : plug(h, p, fd);
    pthread_mutex_unlock(&h->lock);
    return error;
}

void hub_unplug(struct hub *h, int port)
{
    pthread_mutex_lock(&h->lock);
    port_gone(h, &h->ports[port], 0);
    pthread_mutex_unlock(&h->lock);
}

void hub_remove(struct hub *h, int port)
{
    pthread_mutex_lock(&h->lock);
    struct port *p = &h->ports[port];
    port_gone(h, p, 0);
    free(p->stream);
    p->stream = NULL;
    p->used = false;
    pthread_mutex_unlock(&h->lock);
}

void hub_takes(struct hub *h, int port, unsigned takes)
{
    pthread_mutex_lock(&h->lock);
    h->ports[port].takes = takes;
    pthread_mutex_unlock(&h->lock);
}

int hub_capture(struct hub *h, int fd, uint32_t snaplen)
{
    pthread_mutex_lock(&h->lock);
    int error = capture_open(&h->capture, fd, snaplen);
    pthread_mutex_unlock(&h->lock);
    return error;
}

bool hub_state(struct hub *h, int port, struct port_counts *counts, int *error)
{
    pthread_mutex_lock(&h->lock);
    *counts = h->ports[port].counts;
    *error = h->ports[port].error;
    bool plugged = h->ports[port].fd >= 0;
    pthread_mutex_unlock(&h->lock);
    return plugged;
}
