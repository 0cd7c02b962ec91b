/* SPDX-License-Identifier: Apache-2.0
 *
 * The devices whose data path is C: each `serve` works off a bounded batch of one queue, without the GIL, and stages the
 * used elements; the caller tells the engine what was written, publishes, and decides about the interrupt.
 */
#ifndef KVMPY_VIRTIO_SERVE_H
#define KVMPY_VIRTIO_SERVE_H

#include "../block/disk.h"
#include "limit.h"
#include "queue.h"

#define SERVE_REQUESTS 64         /* a batch ends after so many requests ... */
#define SERVE_NANOSECONDS 500000  /* ... or so much time: the driver waits for the first of them */

enum serve_result {
    SERVE_IDLE,    /* the queue is empty */
    SERVE_MORE,    /* the batch is full, there may be more */
    SERVE_BLOCKED, /* the back end takes or gives nothing now */
    SERVE_GONE,    /* the back end ended: `error` says how */
    SERVE_FAULT,   /* the driver broke the rules: vq.fault */
    SERVE_LIMITED, /* the rate limit lets nothing through for vq.wait nanoseconds */
};

uint64_t serve_clock(void);

/* virtio 1.2, 5.2 */
struct blk_counts {
    uint64_t reads, read_bytes, writes, written_bytes, flushes, discards, zeroes, errors, unsupported;
};

struct blk_server {
    struct disk *disk;
    bool readonly, flush, discard, write_zeroes; /* what was negotiated */
    int writeback;                               /* 0: every write is flushed before it completes; atomic */
    struct rate_limit *limit;                    /* NULL: none */
    char serial[20];
    int last_error;                              /* errno of the last failed request; atomic */
    struct blk_counts counts;
};

enum serve_result blk_serve(struct vq *, struct blk_server *);

/* virtio 1.2, 5.1 */
#define NET_HEADER 12             /* struct virtio_net_hdr with num_buffers, 5.1.6 */
#define NET_MAX_BUFFERS 1024      /* of one frame */
#define NET_MAX_FRAME 65562       /* 65535 bytes of IP, Ethernet and VLAN headers, and room */

struct net_counts {
    uint64_t rx_frames, rx_bytes, rx_dropped, tx_frames, tx_bytes, tx_dropped, malformed;
};

struct net_server {
    int fd;             /* one frame per read and write; non-blocking */
    bool vnet_header;   /* frames on fd carry the header */
    bool mergeable, csum, tso4, tso6, ecn, ufo; /* what was negotiated for the driver's packets */
    struct rate_limit *transmit_limit, *receive_limit; /* NULL: none */
    int error;          /* errno, when SERVE_GONE */
    size_t pending;     /* a received frame that found no buffers: its bytes with header, 0: none */
    bool admitted;      /* ... and the rate limit let it through */
    struct net_counts counts;
    unsigned char frame[NET_HEADER + NET_MAX_FRAME];
    uint16_t heads[NET_MAX_BUFFERS]; /* of a frame that goes into several buffers */
    uint32_t written[NET_MAX_BUFFERS];
};

enum serve_result net_transmit(struct vq *, struct net_server *);
enum serve_result net_receive(struct vq *, struct net_server *);
/* Shared with tests: may a driver send this header with these features? */
bool net_header_valid(const struct net_server *, const unsigned char header[NET_HEADER], uint64_t frame);

/* virtio 1.2, 5.4: fill buffers from getrandom(2). */
enum serve_result rng_serve(struct vq *, uint64_t *bytes);

#endif
