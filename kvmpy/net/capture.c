/* SPDX-License-Identifier: Apache-2.0
 *
 * Frames into a file as tcpdump and Wireshark read them: pcap with nanoseconds, link type Ethernet.
 */
#include "hub.h"

#include <errno.h>
#include <stdlib.h>
#include <time.h>
#include <unistd.h>

#define BUFFER (1u << 18)

struct file_header {
    uint32_t magic;
    uint16_t major, minor;
    uint32_t zone, accuracy, snaplen, link;
};

struct record {
    uint32_t seconds, nanoseconds, kept, size;
};

void capture_flush(struct capture *c, uint64_t now)
{
    for (uint32_t done = 0; done < c->used && !c->error;) {
        ssize_t wrote = write(c->fd, c->buffer + done, c->used - done);
        if (wrote < 0 && errno != EINTR)
            c->error = errno; /* a full disk ends the capture, not the network */
        else if (wrote > 0)
            done += wrote;
    }
    c->used = 0;
    c->flushed_at = now;
}

int capture_open(struct capture *c, int fd, uint32_t snaplen)
{
    struct file_header h = {0xA1B23C4D, 2, 4, 0, 0, snaplen, 1};
    c->buffer = malloc(BUFFER);
    if (!c->buffer)
        return ENOMEM;
    memcpy(c->buffer, &h, sizeof(h));
    c->fd = fd;
    c->snaplen = snaplen;
    c->used = sizeof(h);
    capture_flush(c, 0);
    return c->error;
}

void capture_frame(struct capture *c, const uint8_t *frame, size_t size, uint64_t now)
{
    if (c->fd < 0)
        return;
    if (c->error) {
        c->lost++;
        return;
    }
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    struct record r = {t.tv_sec, t.tv_nsec, size < c->snaplen ? size : c->snaplen, size};
    if (c->used + sizeof(r) + r.kept > BUFFER)
        capture_flush(c, now);
    memcpy(c->buffer + c->used, &r, sizeof(r));
    memcpy(c->buffer + c->used + sizeof(r), frame, r.kept);
    c->used += sizeof(r) + r.kept;
    c->frames++;
}
