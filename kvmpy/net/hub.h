/* SPDX-License-Identifier: Apache-2.0
 *
 * Ports that frames go between: a switch of many, or a relay of two (what comes in at one goes out at the other, and
 * nothing
 * is lost). A port is a descriptor of frames, with or without the virtio header, or a byte stream of frames with
 * their length.
 */
#ifndef KVMPY_NET_HUB_H
#define KVMPY_NET_HUB_H

#include "wire.h"

#include <pthread.h>
#include <sys/epoll.h>

#define PORTS 64
#define MACS 4096           /* addresses that a switch knows, in sets of 4 */
#define PORT_MACS 256       /* of them behind one port */
#define QUEUE_FRAMES 1024   /* that wait for a port ... */
#define QUEUE_BYTES (4u << 20) /* ... and their bytes */
#define STREAM_BUFFER (4 * (4 + MAX_FRAME))

enum port_kind { PORT_VNET, PORT_PLAIN, PORT_STREAM };

struct queued {
    struct queued *next;
    uint32_t size, done; /* done: of a stream, what was written already */
    uint8_t data[];      /* as it is written */
};

struct port_counts {
    uint64_t rx_frames, rx_bytes, rx_malformed, rx_spoofed, tx_frames, tx_bytes, tx_dropped, flood_dropped;
};

struct port {
    bool used, waits, paused; /* waits: for EPOLLOUT; paused: not read, its opposite is full */
    enum port_kind kind;
    int fd;                   /* -1: unplugged, frames to it are lost */
    int error;                /* why it was unplugged: an errno, 0 for end of file, EBADMSG for a broken stream */
    unsigned takes;
    bool locked;
    uint8_t mac[6];           /* locked: the only sender behind it */
    uint32_t macs;
    struct queued *first, **last;
    uint32_t frames, bytes;
    uint8_t *stream;          /* PORT_STREAM: bytes that came */
    uint32_t have;
    double flood;             /* tokens */
    uint64_t flood_at;
    struct port_counts counts;
};

struct known {
    uint8_t mac[6];
    uint16_t port;
    uint64_t seen; /* 0: free */
};

struct capture {
    int fd; /* -1: none */
    uint32_t snaplen, used;
    int error;
    uint64_t frames, lost, flushed_at;
    uint8_t *buffer;
};

struct hub {
    int epoll, wake, news; /* eventfds; news: a port was unplugged */
    bool relay, stopped;
    uint32_t flood_rate;   /* broadcasts per second and port */
    pthread_mutex_t lock;
    uint64_t now, key;
    struct port ports[PORTS];
    struct known macs[MACS];
    struct capture capture;
    uint8_t frame[VNET + MAX_FRAME];
    uint8_t room[VNET + MAX_FRAME];
};

struct hub *hub_new(bool relay, uint32_t flood_rate);
/* A port has a duplicate of the descriptor it is given, which stays the caller's. */
void hub_free(struct hub *);
void hub_run(struct hub *);
void hub_stop(struct hub *);
int hub_add(struct hub *, enum port_kind, int fd, unsigned takes, const uint8_t *mac); /* a number, or -errno */
int hub_plug(struct hub *, int port, int fd); /* 0 or an errno */
void hub_unplug(struct hub *, int port);
void hub_remove(struct hub *, int port);
void hub_takes(struct hub *, int port, unsigned takes);
int hub_capture(struct hub *, int fd, uint32_t snaplen);
bool hub_state(struct hub *, int port, struct port_counts *, int *error); /* is it plugged in? */

/* -- port.c */
uint64_t hub_clock(void);
void port_send(struct hub *, int to, uint8_t *frame, size_t size); /* VNET bytes before it */
void port_writable(struct hub *, struct port *);
void port_readable(struct hub *, struct port *);
void port_parse(struct hub *, struct port *); /* the frames of a stream that have come */
void port_gone(struct hub *, struct port *, int error);
void port_forget(struct port *);
void port_watch(struct hub *, struct port *);
bool port_full(const struct port *);

/* -- hub.c */
void hub_frame(struct hub *, struct port *from, size_t size); /* in hub->frame */

/* -- capture.c */
int capture_open(struct capture *, int fd, uint32_t snaplen);
void capture_frame(struct capture *, const uint8_t *frame, size_t size, uint64_t now);
void capture_flush(struct capture *, uint64_t now);

#endif
