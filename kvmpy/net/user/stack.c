/* SPDX-License-Identifier: Apache-2.0
 *
 * The loop: events, timers, the guest's frames in batches, and what waits for the end of a batch.
 */
#include "user.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <sys/random.h>
#include <time.h>
#include <unistd.h>

#define EVENTS 64

uint64_t stack_clock(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * NS + t.tv_nsec;
}

/* -- timers: a binary heap */

static void place(struct stack *s, struct timer *t, int at)
{
    s->heap[at] = t;
    t->at = at;
}

static void settle(struct stack *s, struct timer *t, int at)
{
    while (at && s->heap[(at - 1) / 2]->due > t->due) {
        place(s, s->heap[(at - 1) / 2], at);
        at = (at - 1) / 2;
    }
    for (;;) {
        int child = 2 * at + 1;
        if (child + 1 < s->timers && s->heap[child + 1]->due < s->heap[child]->due)
            child++;
        if (child >= s->timers || s->heap[child]->due >= t->due)
            break;
        place(s, s->heap[child], at);
        at = child;
    }
    place(s, t, at);
}

void timer_clear(struct stack *s, struct timer *t)
{
    if (t->at < 0)
        return;
    int at = t->at;
    struct timer *last = s->heap[--s->timers];
    t->at = -1;
    if (last != t)
        settle(s, last, at);
}

void timer_set(struct stack *s, struct timer *t, uint64_t due)
{
    t->due = due;
    if (t->at < 0)
        t->at = s->timers++; /* there is room for every object that has a timer */
    settle(s, t, t->at);
}

static void run_timers(struct stack *s)
{
    /* At most one round: a timer that sets itself anew in the past must not hold the loop. */
    for (int n = s->timers; n && s->timers && s->heap[0]->due <= s->now; n--) {
        struct timer *t = s->heap[0];
        timer_clear(s, t);
        t->fire(s, t);
    }
}

/* -- the port */

bool stack_watch(struct stack *s, struct source *source, uint32_t events, bool again)
{
    struct epoll_event e = {.events = events, .data.ptr = source};
    return !epoll_ctl(s->epoll, again ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, source->fd, &e);
}

bool stack_send(struct stack *s, struct iovec *iov, int count)
{
    ssize_t sent;
    do
        sent = writev(s->port.fd, iov, count);
    while (sent < 0 && errno == EINTR);
    if (sent >= 0) {
        s->counts.frames_out++;
        s->counts.bytes_out += sent - VNET;
        return true;
    }
    if (errno == EAGAIN || errno == ENOBUFS) {
        s->counts.blocked++;
        if (!s->port_waits)
            s->port_waits = stack_watch(s, &s->port, EPOLLIN | EPOLLOUT, true);
        return false;
    }
    /* The other end is gone, or does not take this frame: nobody will miss it. */
    s->counts.dropped++;
    return true;
}

static void port_ready(struct stack *s, struct source *source, uint32_t events)
{
    if (events & EPOLLOUT) {
        s->port_waits = !stack_watch(s, &s->port, EPOLLIN, true);
        tcp_unblocked(s);
    }
    if (!(events & ~(uint32_t)EPOLLOUT))
        return;
    for (int n = 0; n < BATCH; n++) {
        ssize_t size = read(s->port.fd, s->frame, sizeof(s->frame));
        if (size < 0 && errno == EINTR)
            continue;
        if (size < 0 && errno == EAGAIN)
            break;
        if (size <= 0) { /* the card is gone */
            epoll_ctl(s->epoll, EPOLL_CTL_DEL, s->port.fd, NULL);
            s->gone = true;
            break;
        }
        if (size < VNET + ETHER) {
            s->counts.malformed++;
            continue;
        }
        stack_input(s, s->frame, size - VNET);
    }
    tcp_flush(s);
}

void stack_input(struct stack *s, uint8_t *frame, size_t size)
{
    struct vnet h;
    memcpy(&h, frame, VNET);
    const uint8_t *f = frame + VNET;
    s->counts.frames_in++;
    s->counts.bytes_in += size;
    if (size < ETHER) {
        s->counts.malformed++;
        return;
    }
    if (!(f[0] & 1) && memcmp(f, s->config.mac, 6)) {
        s->counts.ignored++; /* flooded by a switch, for somebody else */
        return;
    }
    bool summed = h.flags & (VNET_NEEDS_CSUM | VNET_DATA_VALID);
    switch (get16(f + 12)) {
    case ETHER_IP4:
        ip4_input(s, f, size, summed);
        break;
    case ETHER_ARP:
        arp_input(s, f, size);
        break;
    case ETHER_IP6:
        if (s->config.six) {
            ip6_input(s, f, size, summed);
            break;
        }
        /* fall through */
    default:
        s->counts.ignored++;
    }
}

/* -- life */

static void woken(struct stack *s, struct source *source, uint32_t events)
{
    uint64_t n;
    if (read(source->fd, &n, sizeof(n)) < 0)
        return; /* somebody else was faster */
}

struct stack *stack_new(const struct config *config, int port)
{
    struct stack *s = calloc(1, sizeof(*s));
    if (!s)
        return NULL;
    s->config = *config;
    s->epoll = epoll_create1(EPOLL_CLOEXEC);
    s->wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->news = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    s->port = (struct source){port, port_ready};
    s->waker = (struct source){s->wake, woken};
    pthread_mutex_init(&s->lock, NULL);
    pthread_mutex_init(&s->log_lock, NULL);
    s->heap_size = config->max_tcp + config->max_udp + config->max_icmp + FORWARDS + 1;
    s->heap = calloc(s->heap_size, sizeof(*s->heap));
    s->now = stack_clock();
    s->ephemeral = 49152;
    s->advertiser = (struct timer){0, -1, ip6_advertise};
    uint64_t random[2];
    if (s->epoll < 0 || s->wake < 0 || s->news < 0 || !s->heap
        || getrandom(random, sizeof(random), 0) != sizeof(random)
        || !stack_watch(s, &s->port, EPOLLIN, false) || !stack_watch(s, &s->waker, EPOLLIN, false)) {
        int error = errno;
        stack_free(s);
        errno = error;
        return NULL;
    }
    s->key = random[0];
    s->ip_id = random[1];
    if (config->six)
        timer_set(s, &s->advertiser, s->now + NS);
    return s;
}

static void reap(struct stack *s)
{
    while (s->dead) {
        struct flow *f = s->dead;
        s->dead = f->next_dead;
        free(f);
    }
    while (s->dead_listeners) {
        struct listener *l = s->dead_listeners;
        s->dead_listeners = l->next_dead;
        free(l);
    }
}

void stack_free(struct stack *s)
{
    for (int i = 0; i < HASH; i++)
        while (s->table[i])
            flow_free(s, s->table[i]);
    while (s->listeners) {
        struct listener *l = s->listeners;
        s->listeners = l->next;
        close(l->source.fd);
        free(l);
    }
    reap(s);
    for (int i = 0; i < REASSEMBLIES; i++)
        free(s->reassemblies[i].data);
    while (s->spares)
        free(s->spare[--s->spares].data);
    if (s->epoll >= 0)
        close(s->epoll);
    if (s->wake >= 0)
        close(s->wake);
    if (s->news >= 0)
        close(s->news);
    pthread_mutex_destroy(&s->lock);
    pthread_mutex_destroy(&s->log_lock);
    free(s->heap);
    free(s);
}

void stack_step(struct stack *s, int milliseconds)
{
    struct epoll_event events[EVENTS];
    int count = epoll_wait(s->epoll, events, EVENTS, milliseconds);
    pthread_mutex_lock(&s->lock);
    s->now = stack_clock();
    for (int i = 0; i < count; i++) {
        struct source *source = events[i].data.ptr;
        if (source->fd >= 0) /* it may have died by an event before this one */
            source->ready(s, source, events[i].events);
    }
    run_timers(s);
    tcp_flush(s);
    reap(s);
    pthread_mutex_unlock(&s->lock);
}

void stack_run(struct stack *s)
{
    while (!__atomic_load_n(&s->stopped, __ATOMIC_ACQUIRE)) {
        int64_t wait = -1;
        pthread_mutex_lock(&s->lock);
        if (s->timers) {
            wait = (int64_t)(s->heap[0]->due - stack_clock());
            wait = wait < 0 ? 0 : (wait + MS - 1) / MS; /* rounded up: not in vain */
            wait = wait > 60000 ? 60000 : wait;
        }
        pthread_mutex_unlock(&s->lock);
        stack_step(s, wait);
    }
}

void stack_stop(struct stack *s)
{
    uint64_t one = 1;
    __atomic_store_n(&s->stopped, true, __ATOMIC_RELEASE);
    if (write(s->wake, &one, sizeof(one)) < 0)
        return; /* it is full of wake-ups already */
}
