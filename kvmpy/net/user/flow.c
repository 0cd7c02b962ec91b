/* SPDX-License-Identifier: Apache-2.0
 *
 * Flows by their two endpoints, bounded in number; the buffers of TCP, bounded in sum.
 */
#include "user.h"

#include <errno.h>
#include <stdlib.h>
#include <sys/socket.h>
#include <unistd.h>

static unsigned hash(const struct stack *s, uint8_t protocol, const struct endpoint *guest, const struct endpoint *far)
{
    uint64_t w[4], h = s->key ^ protocol; /* the key: a guest must not choose its buckets */
    memcpy(w, guest->ip.b, 16);
    memcpy(w + 2, far->ip.b, 16);
    for (int i = 0; i < 4; i++) {
        h = (h ^ w[i]) * 0x9E3779B97F4A7C15ull;
        h ^= h >> 32;
    }
    h = (h ^ ((uint64_t)guest->port << 16 | far->port)) * 0x9E3779B97F4A7C15ull;
    return (h ^ h >> 29) >> 20 & (HASH - 1);
}

static bool same(const struct endpoint *a, const struct endpoint *b)
{
    return a->port == b->port && addr_same(&a->ip, &b->ip);
}

struct flow *flow_find(struct stack *s, uint8_t protocol, const struct endpoint *guest, const struct endpoint *far)
{
    struct flow *f = s->table[hash(s, protocol, guest, far)];
    while (f && (f->protocol != protocol || !same(&f->guest, guest) || !same(&f->far, far)))
        f = f->chain;
    return f;
}

static uint32_t *count_of(struct stack *s, uint8_t protocol)
{
    return protocol == IP_TCP ? &s->tcps : protocol == IP_UDP ? &s->udps : &s->icmps;
}

static void unlink_use(struct stack *s, struct flow *f)
{
    if (f->older)
        f->older->newer = f->newer;
    else if (s->oldest == f)
        s->oldest = f->newer;
    if (f->newer)
        f->newer->older = f->older;
    else if (s->newest == f)
        s->newest = f->older;
    f->older = f->newer = NULL;
}

void flow_touch(struct stack *s, struct flow *f)
{
    unlink_use(s, f);
    f->older = s->newest;
    if (s->newest)
        s->newest->newer = f;
    else
        s->oldest = f;
    s->newest = f;
}

/* Room for one more: a datagram flow may push out the one that was not used for longest. */
static bool make_room(struct stack *s, uint8_t protocol)
{
    uint32_t most = protocol == IP_TCP   ? s->config.max_tcp
                    : protocol == IP_UDP ? s->config.max_udp
                                         : s->config.max_icmp;
    if (*count_of(s, protocol) < most)
        return true;
    if (protocol == IP_TCP)
        return false;
    for (struct flow *f = s->oldest; f; f = f->newer)
        if (f->protocol == protocol || (protocol != IP_UDP && f->protocol != IP_UDP)) {
            s->counts.udp_evicted++;
            flow_free(s, f);
            return true;
        }
    return false;
}

struct flow *flow_new(struct stack *s, uint8_t protocol, const struct endpoint *guest, const struct endpoint *far)
{
    if (!make_room(s, protocol))
        return NULL;
    struct flow *f = calloc(1, sizeof(*f));
    if (!f)
        return NULL;
    f->source.fd = -1;
    f->timer.at = -1;
    f->protocol = protocol;
    f->guest = *guest;
    f->far = *far;
    unsigned h = hash(s, protocol, guest, far);
    f->chain = s->table[h];
    s->table[h] = f;
    ++*count_of(s, protocol);
    if (protocol != IP_TCP)
        flow_touch(s, f);
    return f;
}

static void unlist(struct flow **head, struct flow *f, size_t link)
{
    for (struct flow **at = head; *at; at = (struct flow **)((char *)*at + link))
        if (*at == f) {
            *at = *(struct flow **)((char *)f + link);
            return;
        }
}

void flow_free(struct stack *s, struct flow *f)
{
    if (f->dead)
        return;
    f->dead = true;
    struct flow **at = &s->table[hash(s, f->protocol, &f->guest, &f->far)];
    while (*at != f)
        at = &(*at)->chain;
    *at = f->chain;
    --*count_of(s, f->protocol);
    if (f->protocol != IP_TCP)
        unlink_use(s, f);
    timer_clear(s, &f->timer);
    if (f->source.fd >= 0)
        close(f->source.fd); /* which takes it out of epoll */
    f->source.fd = -1;
    ring_put(s, &f->tcp.out);
    ring_put(s, &f->tcp.in);
    if (f->tcp.listed)
        unlist(&s->due, f, offsetof(struct flow, next_due));
    if (f->tcp.blocked)
        unlist(&s->blocked, f, offsetof(struct flow, next_blocked));
    f->next_dead = s->dead;
    s->dead = f;
}

int flow_socket(struct stack *s, int family, int type, int protocol)
{
    int fd = socket(family, type | SOCK_NONBLOCK | SOCK_CLOEXEC, protocol);
    if (fd < 0 && (errno == EMFILE || errno == ENFILE || errno == ENOBUFS || errno == ENOMEM))
        s->counts.no_descriptors++;
    return fd;
}

/* -- buffers */

bool ring_get(struct stack *s, struct ring *r)
{
    if (r->data)
        return true;
    if (s->rings >= s->config.max_rings) {
        s->counts.no_buffers++;
        return false;
    }
    r->data = s->spares ? s->spare[--s->spares].data : malloc(RING);
    r->head = r->used = 0;
    s->rings += r->data != NULL;
    return r->data != NULL;
}

void ring_put(struct stack *s, struct ring *r)
{
    if (!r->data)
        return;
    s->rings--;
    if (s->spares < sizeof(s->spare) / sizeof(*s->spare))
        s->spare[s->spares++].data = r->data; /* a page fault per 4 KiB costs more than the copying */
    else
        free(r->data);
    r->data = NULL;
    r->head = r->used = 0;
}

static int pieces(const struct ring *r, uint32_t from, uint32_t size, struct iovec iov[2])
{
    from &= RING - 1;
    uint32_t first = size < RING - from ? size : RING - from;
    int count = 0;
    if (first)
        iov[count++] = (struct iovec){r->data + from, first};
    if (size > first)
        iov[count++] = (struct iovec){r->data, size - first};
    return count;
}

int ring_free_iov(const struct ring *r, struct iovec iov[2])
{
    return pieces(r, r->head + r->used, RING - r->used, iov);
}

int ring_used_iov(const struct ring *r, uint32_t skip, uint32_t size, struct iovec iov[2])
{
    return pieces(r, r->head + skip, size, iov);
}

void ring_put_at(struct ring *r, uint32_t offset, const uint8_t *data, uint32_t size)
{
    struct iovec iov[2];
    int count = pieces(r, r->head + r->used + offset, size, iov);
    for (int i = 0; i < count; i++) {
        memcpy(iov[i].iov_base, data, iov[i].iov_len);
        data += iov[i].iov_len;
    }
}

bool ring_append(struct ring *r, const uint8_t *data, uint32_t size)
{
    if (size > RING - r->used)
        return false;
    ring_put_at(r, 0, data, size);
    r->used += size;
    return true;
}

void ring_drop(struct ring *r, uint32_t size)
{
    r->head = (r->head + size) & (RING - 1);
    r->used -= size;
}
