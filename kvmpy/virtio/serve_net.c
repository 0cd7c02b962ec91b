/* SPDX-License-Identifier: Apache-2.0
 *
 * Packets between a virtqueue and a descriptor that moves one frame per read and write (tap, packet socket);
 * virtio 1.2 section 5.1.6.
 */
#include "serve.h"

#include <errno.h>
#include <string.h>
#include <unistd.h>

#define NEEDS_CSUM 1u
enum { GSO_NONE = 0, GSO_TCPV4 = 1, GSO_UDP = 3, GSO_TCPV6 = 4, GSO_ECN = 0x80 };
#define ETHERNET 14
#define MAX_PIECES 1024 /* IOV_MAX of Linux */

#define ADD(counter, n) __atomic_fetch_add(&net->counts.counter, (n), __ATOMIC_RELAXED)

struct header { /* 5.1.6: struct virtio_net_hdr, little endian */
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};

bool net_header_valid(const struct net_server *net, const unsigned char bytes[NET_HEADER], uint64_t frame)
{
    struct header h;
    memcpy(&h, bytes, sizeof(h));
    if (h.flags & ~NEEDS_CSUM || h.hdr_len > frame)
        return false;
    if (h.flags & NEEDS_CSUM && (!net->csum || (uint32_t)h.csum_start + h.csum_offset + 2 > frame))
        return false;
    bool ecn = h.gso_type & GSO_ECN;
    switch (h.gso_type & ~GSO_ECN) {
    case GSO_NONE:
        return !ecn;
    case GSO_TCPV4:
    case GSO_TCPV6:
        break;
    case GSO_UDP:
        if (ecn)
            return false;
        break;
    default:
        return false;
    }
    uint8_t kind = h.gso_type & ~GSO_ECN;
    bool offered = kind == GSO_TCPV4 ? net->tso4 : kind == GSO_TCPV6 ? net->tso6 : net->ufo;
    /* 5.1.6.2.1: segmentation needs the checksum flag and a size. */
    return offered && (!ecn || net->ecn) && h.flags & NEEDS_CSUM && h.gso_size;
}

enum serve_result net_transmit(struct vq *q, struct net_server *net)
{
    struct vq_chain *chain = &q->scratch;
    uint64_t end = serve_clock() + SERVE_NANOSECONDS;
    struct iovec iov[MAX_PIECES];
    for (int n = 0; n < SERVE_REQUESTS; n++) {
        unsigned char header[NET_HEADER];
        int got = vq_pop(q, chain);
        if (got <= 0)
            return got ? SERVE_FAULT : SERVE_IDLE;
        uint64_t frame = chain->read_size - NET_HEADER;
        if (chain->read_size < NET_HEADER + ETHERNET || frame > NET_MAX_FRAME || chain->reads >= MAX_PIECES
            || vq_read(chain, 0, header, NET_HEADER) != NET_HEADER || !net_header_valid(net, header, frame)) {
            ADD(malformed, 1);
            vq_push(q, chain->head, 0);
            continue;
        }
        q->wait = limit_take(net->transmit_limit, frame);
        if (q->wait) {
            vq_unpop(q, chain->head);
            return SERVE_LIMITED;
        }
        /* The header from our copy: it is what was checked. */
        int count = 0;
        uint64_t skip = NET_HEADER;
        if (net->vnet_header)
            iov[count++] = (struct iovec){header, NET_HEADER};
        for (uint32_t i = 0; i < chain->reads; i++) {
            if (skip >= chain->iov[i].iov_len) {
                skip -= chain->iov[i].iov_len;
                continue;
            }
            iov[count++] = (struct iovec){(char *)chain->iov[i].iov_base + skip, chain->iov[i].iov_len - skip};
            skip = 0;
        }
        ssize_t sent;
        do
            sent = writev(net->fd, iov, count);
        while (sent < 0 && errno == EINTR);
        if (sent < 0 && (errno == EAGAIN || errno == ENOBUFS)) {
            vq_unpop(q, chain->head);
            return SERVE_BLOCKED; /* the limit has counted it: it is sent a little late */
        }
        if (sent < 0 && (errno == EPIPE || errno == ECONNRESET || errno == ECONNREFUSED || errno == ENOTCONN
                         || errno == EBADFD)) {
            vq_unpop(q, chain->head);
            net->error = errno;
            return SERVE_GONE;
        }
        if (sent < 0) { /* EINVAL, EMSGSIZE, EIO of a tap that is down: this frame, not the device */
            ADD(tx_dropped, 1);
        } else {
            ADD(tx_frames, 1);
            ADD(tx_bytes, frame);
        }
        vq_push(q, chain->head, 0);
        if (serve_clock() > end)
            break;
    }
    return SERVE_MORE;
}

/* Where the bytes of num_buffers are in the first buffer of a frame. */
static void find_count(const struct vq_chain *chain, unsigned char *count_at[2])
{
    uint64_t at = 10;
    for (uint32_t i = 0, found = 0; i < chain->writes && found < 2; i++) {
        for (; found < 2 && at < chain->iov[i].iov_len; at++)
            count_at[found++] = (unsigned char *)chain->iov[i].iov_base + at;
        at -= chain->iov[i].iov_len;
    }
}

/* Put the pending frame into buffers. 1: done, 0: not enough buffers now, -1: fault. */
static int deliver(struct vq *q, struct net_server *net)
{
    struct vq_chain *chain = &q->scratch;
    unsigned char *count_at[2] = {NULL, NULL};
    uint16_t taken = 0;
    size_t done = 0;
    const uint32_t most = !net->mergeable ? 1 : q->size < NET_MAX_BUFFERS ? q->size : NET_MAX_BUFFERS;
    while (done < net->pending) {
        int got = taken == most ? 0 : vq_pop(q, chain);
        if (got < 0)
            return -1;
        if (!got) {
            /* Not enough: give the buffers back, last first. If these are all there can be, it will never fit. */
            bool never = taken == most;
            while (taken)
                vq_unpop(q, net->heads[--taken]);
            if (!never)
                return 0;
            ADD(rx_dropped, 1);
            net->pending = 0;
            return 1;
        }
        if (chain->reads || chain->write_size < (taken ? 1 : NET_HEADER)) {
            vq_fault(q, "a receive buffer that cannot hold a packet header", chain->write_size);
            return -1;
        }
        if (!taken)
            find_count(chain, count_at);
        done += vq_write(q, chain, 0, net->frame + done, net->pending - done);
        net->heads[taken] = chain->head;
        net->written[taken++] = chain->written;
    }
    for (uint16_t i = 0; i < taken; i++)
        vq_push(q, net->heads[i], net->written[i]);
    if (count_at[0])
        *count_at[0] = net->mergeable ? taken & 0xFF : 1;
    if (count_at[1])
        *count_at[1] = net->mergeable ? taken >> 8 : 0;
    ADD(rx_frames, 1);
    ADD(rx_bytes, net->pending - NET_HEADER);
    net->pending = 0;
    return 1;
}

enum serve_result net_receive(struct vq *q, struct net_server *net)
{
    uint64_t end = serve_clock() + SERVE_NANOSECONDS;
    for (int n = 0; n < SERVE_REQUESTS && !vq_journal_full(q); n++) {
        if (!net->pending) {
            /* Take a frame only when there is a buffer: what waits, waits in the host's queue, which is bounded. */
            int got = vq_pop(q, &q->scratch);
            if (got <= 0)
                return got ? SERVE_FAULT : SERVE_IDLE;
            vq_unpop(q, q->scratch.head);
            size_t skip = net->vnet_header ? 0 : NET_HEADER;
            ssize_t size = read(net->fd, net->frame + skip, sizeof(net->frame) - skip);
            if (size < 0 && errno == EINTR)
                continue;
            if (size < 0 && errno == EAGAIN)
                return SERVE_BLOCKED;
            if (size <= 0) {
                net->error = size ? errno : 0;
                return SERVE_GONE;
            }
            if (skip)
                memset(net->frame, 0, NET_HEADER);
            if ((size_t)size + skip < NET_HEADER + ETHERNET) {
                ADD(rx_dropped, 1);
                continue;
            }
            net->pending = size + skip;
            net->admitted = false;
        }
        if (!net->admitted) {
            q->wait = limit_take(net->receive_limit, net->pending - NET_HEADER);
            if (q->wait)
                return SERVE_LIMITED;
            net->admitted = true; /* once, though it may have to wait for buffers */
        }
        int done = deliver(q, net);
        if (done < 0)
            return SERVE_FAULT;
        if (!done)
            return SERVE_IDLE;
        if (serve_clock() > end)
            break;
    }
    return SERVE_MORE;
}
