/* SPDX-License-Identifier: Apache-2.0
 *
 * Frames as bytes: big-endian numbers, the virtio header before a frame, Internet checksums.
 */
#ifndef KVMPY_NET_WIRE_H
#define KVMPY_NET_WIRE_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#define VNET 12         /* struct virtio_net_hdr with num_buffers (virtio 1.2, 5.1.6) */
#define ETHER 14
#define MAX_FRAME 65562 /* 65535 bytes of IP, Ethernet and VLAN headers, and room; as virtio/serve.h has it */

enum { ETHER_IP4 = 0x0800, ETHER_ARP = 0x0806, ETHER_IP6 = 0x86DD };
enum { IP_ICMP = 1, IP_TCP = 6, IP_UDP = 17, IP_ICMP6 = 58 };

/* TUN_F_* of <linux/if_tun.h>: what a receiver takes. */
enum { TAKES_CSUM = 1, TAKES_TSO4 = 2, TAKES_TSO6 = 4, TAKES_ECN = 8 };

enum { VNET_NEEDS_CSUM = 1, VNET_DATA_VALID = 2 };
enum { GSO_NONE = 0, GSO_TCP4 = 1, GSO_TCP6 = 4, GSO_ECN = 0x80 };

struct vnet { /* little endian, as the host */
    uint8_t flags, gso_type;
    uint16_t hdr_len, gso_size, csum_start, csum_offset, num_buffers;
};

static inline uint16_t get16(const void *p)
{
    uint16_t v;
    memcpy(&v, p, 2);
    return __builtin_bswap16(v);
}

static inline uint32_t get32(const void *p)
{
    uint32_t v;
    memcpy(&v, p, 4);
    return __builtin_bswap32(v);
}

static inline void put16(void *p, uint16_t v)
{
    v = __builtin_bswap16(v);
    memcpy(p, &v, 2);
}

static inline void put32(void *p, uint32_t v)
{
    v = __builtin_bswap32(v);
    memcpy(p, &v, 4);
}

/* Internet checksum (RFC 1071), in the host's byte order: a sum is added up with `sum_bytes` and ends in `sum_end`,
 * whose two bytes are stored as they are (memcpy). Sums of pieces may be added if all pieces but the last are even. */
uint64_t sum_bytes(const void *data, size_t size, uint64_t sum);
uint64_t sum_iov(const struct iovec *iov, int count, uint64_t sum);

static inline uint16_t sum_fold(uint64_t sum)
{
    sum = (sum & 0xFFFFFFFF) + (sum >> 32);
    sum = (sum & 0xFFFFFFFF) + (sum >> 32);
    sum = (sum & 0xFFFF) + (sum >> 16);
    sum = (sum & 0xFFFF) + (sum >> 16);
    return sum;
}

static inline uint16_t sum_end(uint64_t sum)
{
    return ~sum_fold(sum);
}

static inline void put_sum(void *at, uint16_t sum)
{
    memcpy(at, &sum, 2);
}

/* A frame whose checksum or segmentation was left to the receiver (virtio 1.2, 5.1.6.2), for a receiver that takes
 * only `takes`: gives `emit` one or more complete frames, each with VNET bytes before it, in `room` (VNET + MAX_FRAME
 * bytes) or in place, which changes `frame`. frame: VNET bytes and `size` bytes of frame. False when the header does
 * not fit the frame; stops when emit says false. */
typedef bool (*emit_fn)(void *to, uint8_t *frame, size_t size);
bool finish_frame(uint8_t *frame, size_t size, unsigned takes, uint8_t *room, emit_fn emit, void *to);

#endif
