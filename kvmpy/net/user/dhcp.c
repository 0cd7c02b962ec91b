/* SPDX-License-Identifier: Apache-2.0
 *
 * DHCP server (RFC 2131, options of RFC 2132): a lease per card, kept as long as there is room.
 */
#include "user.h"

enum { DISCOVER = 1, OFFER, REQUEST, DECLINE, ACKNOWLEDGE, NAK, RELEASE, INFORM };
enum {
    SUBNET = 1, ROUTER = 3, DNS = 6, HOST_NAME = 12, DOMAIN = 15, MTU = 26, ADDRESS = 50, LEASE = 51, TYPE = 53,
    SERVER = 54,
};
#define FIXED 240 /* bytes before the options, with the magic number */
#define LEASE_SECONDS 86400
#define SMALLEST 300 /* BOOTP's; some clients drop less */

static const uint8_t MAGIC[4] = {99, 130, 83, 99};

/* The data of an option of `size` bytes at least, or NULL. */
static const uint8_t *find(const uint8_t *options, size_t size, uint8_t wanted, uint8_t least)
{
    for (size_t at = 0; at < size && options[at] != 255;) {
        if (!options[at]) {
            at++;
            continue;
        }
        if (at + 2 > size || at + 2 + options[at + 1] > size)
            return NULL;
        if (options[at] == wanted)
            return options[at + 1] >= least ? options + at + 2 : NULL;
        at += 2 + options[at + 1];
    }
    return NULL;
}

static struct addr address_of(const struct stack *s, int lease)
{
    struct addr a = s->config.first;
    put32(a.b + 12, get32(a.b + 12) + lease);
    return a;
}

static bool usable(const struct stack *s, int lease)
{
    struct addr a = address_of(s, lease);
    uint32_t host = get32(a.b + 12) & ~(s->config.bits ? ~0u << (32 - s->config.bits) : 0);
    uint32_t all = s->config.bits ? ~(~0u << (32 - s->config.bits)) : ~0u;
    return on_network(s, &a) && !is_ours(s, &a) && host && host != all;
}

/* The lease of a card, an old one or a new one; -1: none to give. */
static int lease_of(struct stack *s, const uint8_t mac[6])
{
    int best = -1;
    for (int i = 0; i < NEIGHBOURS; i++) {
        if (s->leases[i].seen && !memcmp(s->leases[i].mac, mac, 6)) {
            best = i;
            break;
        }
        if (usable(s, i) && (best < 0 || s->leases[i].seen < s->leases[best].seen))
            best = i;
    }
    if (best >= 0) {
        memcpy(s->leases[best].mac, mac, 6);
        s->leases[best].seen = s->now;
    }
    return best;
}

static uint8_t *option(uint8_t *at, uint8_t code, const void *data, uint8_t size)
{
    *at++ = code;
    *at++ = size;
    memcpy(at, data, size);
    return at + size;
}

static uint8_t *number(uint8_t *at, uint8_t code, uint32_t value)
{
    uint8_t bytes[4];
    put32(bytes, value);
    return option(at, code, bytes, 4);
}

void dhcp_input(struct stack *s, struct packet *p, const uint8_t *data, size_t size)
{
    if (size < FIXED || data[0] != 1 || data[1] != 1 || data[2] != 6 || memcmp(data + FIXED - 4, MAGIC, 4)) {
        s->counts.malformed++;
        return;
    }
    const uint8_t *options = data + FIXED, *mac = data + 28;
    const uint8_t *type = find(options, size - FIXED, TYPE, 1);
    const uint8_t *server = find(options, size - FIXED, SERVER, 4);
    const uint8_t *wanted = find(options, size - FIXED, ADDRESS, 4);
    const uint8_t *gateway = s->config.gateway.b + 12;
    if (!type || mac[0] & 1 || (server && memcmp(server, gateway, 4)))
        return; /* none of ours, or for another server */
    uint8_t answer;
    switch (*type) {
    case DISCOVER:
        answer = OFFER;
        break;
    case REQUEST:
    case INFORM:
        answer = ACKNOWLEDGE;
        break;
    default: /* leases are kept anyway */
        return;
    }
    const int lease = lease_of(s, mac);
    if (lease < 0)
        return;
    const struct addr given = address_of(s, lease);
    if (*type == REQUEST && memcmp(wanted ? wanted : data + 12, given.b + 12, 4))
        answer = NAK;

    uint8_t *reply = s->reply + VNET + ETHER + 40 + 8, *at = reply + FIXED;
    memset(reply, 0, FIXED + SMALLEST);
    reply[0] = 2;
    reply[1] = 1;
    reply[2] = 6;
    memcpy(reply + 4, data + 4, 4);   /* xid */
    memcpy(reply + 10, data + 10, 2); /* flags */
    if (*type == INFORM)
        memcpy(reply + 12, data + 12, 4);
    else if (answer != NAK)
        memcpy(reply + 16, given.b + 12, 4);
    memcpy(reply + 20, gateway, 4);
    memcpy(reply + 28, mac, 6);
    memcpy(reply + FIXED - 4, MAGIC, 4);
    at = option(at, TYPE, &answer, 1);
    at = option(at, SERVER, gateway, 4);
    if (answer != NAK) {
        if (*type != INFORM)
            at = number(at, LEASE, LEASE_SECONDS);
        at = number(at, SUBNET, s->config.bits ? ~0u << (32 - s->config.bits) : 0);
        at = option(at, ROUTER, gateway, 4);
        at = option(at, DNS, s->config.dns.b + 12, 4);
        uint8_t mtu[2];
        put16(mtu, s->config.mtu);
        at = option(at, MTU, mtu, 2);
        if (s->config.domain[0])
            at = option(at, DOMAIN, s->config.domain, strlen(s->config.domain));
        if (s->config.hostname[0])
            at = option(at, HOST_NAME, s->config.hostname, strlen(s->config.hostname));
    }
    *at++ = 255;
    size_t length = at - reply < SMALLEST ? SMALLEST : at - reply;

    /* To everybody, when the client cannot be addressed yet (RFC 2131, 4.1). */
    static const uint8_t ALL[6] = {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};
    const bool known = get32(data + 12) && answer != NAK;
    const bool broadcast = !known && (answer == NAK || data[10] & 0x80);
    struct endpoint from = {s->config.gateway, 67}, to = {given, 68};
    if (known)
        to.ip = addr_from4(data + 12);
    else if (broadcast)
        to.ip = addr_from4(ALL);
    udp_reply(s, broadcast ? ALL : mac, &from, &to, reply, length);
}
