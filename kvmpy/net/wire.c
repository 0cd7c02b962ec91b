/* SPDX-License-Identifier: Apache-2.0 */
#include "wire.h"

#define SMALLEST 48 /* bytes per segment, as Linux has it: else a frame becomes a flood of tiny ones */

uint64_t sum_bytes(const void *data, size_t size, uint64_t sum)
{
    const uint8_t *p = data;
    uint64_t a = 0, b = 0, c = 0, d = 0; /* four chains of 32-bit words: no carries to wait for */
    for (; size >= 16; size -= 16, p += 16) {
        uint32_t w[4];
        memcpy(w, p, 16);
        a += w[0];
        b += w[1];
        c += w[2];
        d += w[3];
    }
    for (; size >= 2; size -= 2, p += 2) {
        uint16_t w;
        memcpy(&w, p, 2);
        a += w;
    }
    if (size)
        b += *p; /* the missing byte is 0 */
    sum += sum_fold(a);
    return sum + sum_fold(b) + sum_fold(c) + sum_fold(d);
}

uint64_t sum_iov(const struct iovec *iov, int count, uint64_t sum)
{
    size_t before = 0;
    for (int i = 0; i < count; i++) {
        uint16_t part = sum_fold(sum_bytes(iov[i].iov_base, iov[i].iov_len, 0));
        sum += before & 1 ? __builtin_bswap16(part) : part; /* at an odd place its bytes change sides */
        before += iov[i].iov_len;
    }
    return sum;
}

/* Finish the checksum at its place: the field holds the sum of the pseudo header. */
static bool finish_sum(uint8_t *frame, size_t size, const struct vnet *h)
{
    size_t start = h->csum_start, at = start + h->csum_offset;
    if (at + 2 > size)
        return false;
    uint16_t sum = sum_end(sum_bytes(frame + VNET + start, size - start, 0));
    put_sum(frame + VNET + at, sum ? sum : 0xFFFF); /* 0 would mean "none" in UDP */
    return true;
}

static bool segment(uint8_t *frame, size_t size, const struct vnet *h, uint8_t *room, emit_fn emit, void *to)
{
    uint8_t *f = frame + VNET;
    const bool six = (h->gso_type & ~GSO_ECN) == GSO_TCP6;
    /* Nothing of the header is believed: offsets come from the frame, which is plain IP and TCP or is refused. */
    const size_t ip = ETHER;
    if (size < ip + (six ? 40 : 20) || get16(f + 12) != (six ? ETHER_IP6 : ETHER_IP4))
        return false;
    const size_t tcp = six ? ip + 40 : ip + (f[ip] & 15) * 4;
    if ((!six && (f[ip] >> 4 != 4 || tcp < ip + 20 || f[ip + 9] != IP_TCP)) || (six && f[ip + 6] != IP_TCP)
        || tcp != h->csum_start || h->csum_offset != 16 || size < tcp + 20)
        return false;
    const size_t head = tcp + (f[tcp + 12] >> 4) * 4;
    if (head < tcp + 20 || head > size || h->gso_size < SMALLEST)
        return false;
    const uint32_t seq = get32(f + tcp + 4);
    const uint16_t id = get16(f + ip + 4);
    size_t done = 0, left = size - head;
    for (unsigned n = 0; left || !n; n++) {
        size_t part = left < h->gso_size ? left : h->gso_size;
        uint8_t *g = room + VNET;
        memset(room, 0, VNET);
        memcpy(g, f, head);
        memcpy(g + head, f + head + done, part);
        put32(g + tcp + 4, seq + done);
        if (part < left)
            g[tcp + 13] &= ~0x09; /* FIN and PSH are the last one's ... */
        if (n)
            g[tcp + 13] &= ~0x80; /* ... CWR the first one's */
        uint64_t pseudo;
        if (six) {
            put16(g + ip + 4, head - tcp + part);
            pseudo = sum_bytes(g + ip + 8, 32, 0);
        } else {
            put16(g + ip + 2, head - ip + part);
            put16(g + ip + 4, id + n);
            put16(g + ip + 10, 0);
            put_sum(g + ip + 10, sum_end(sum_bytes(g + ip, tcp - ip, 0)));
            pseudo = sum_bytes(g + ip + 12, 8, 0);
        }
        pseudo += (uint64_t)__builtin_bswap16(IP_TCP) + __builtin_bswap16(head - tcp + part);
        put16(g + tcp + 16, 0);
        put_sum(g + tcp + 16, sum_end(sum_bytes(g + tcp, head - tcp + part, pseudo)));
        if (!emit(to, room, head + part))
            return true;
        done += part;
        left -= part;
    }
    return true;
}

bool finish_frame(uint8_t *frame, size_t size, unsigned takes, uint8_t *room, emit_fn emit, void *to)
{
    struct vnet h;
    memcpy(&h, frame, VNET);
    uint8_t gso = h.gso_type & ~GSO_ECN;
    bool whole = gso == GSO_NONE || (gso == GSO_TCP4 && takes & TAKES_TSO4) || (gso == GSO_TCP6 && takes & TAKES_TSO6);
    if (h.gso_type & GSO_ECN && !(takes & TAKES_ECN))
        whole = false;
    if (!whole)
        return (gso == GSO_TCP4 || gso == GSO_TCP6) && segment(frame, size, &h, room, emit, to);
    if (h.flags & VNET_NEEDS_CSUM && !(takes & TAKES_CSUM)) {
        if (!finish_sum(frame, size, &h))
            return false;
        memset(frame, 0, VNET);
    }
    emit(to, frame, size);
    return true;
}
