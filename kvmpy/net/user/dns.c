/* SPDX-License-Identifier: Apache-2.0
 *
 * Names in DNS messages (RFC 1035): questions are judged by the policy, answers tell it which addresses a name has.
 */
#include "user.h"

#include <ctype.h>

enum { HEADER = 12, REFUSED = 5, SERVFAIL = 2, A = 1, AAAA = 28 };
#define SHORTEST 60    /* seconds that an address stays known, at least: programs keep them longer than they may */
#define LONGEST 86400

/* The name at `at` as lower-case text; the offset behind it, 0 when it is malformed. Pointers only go backwards. */
static size_t name_at(const uint8_t *data, size_t size, size_t at, char name[NAME])
{
    size_t end = 0, used = 0, limit = at;
    for (;;) {
        if (at >= size)
            return 0;
        uint8_t length = data[at];
        if (!length) {
            name[used ? used - 1 : 0] = 0; /* without the last dot */
            return end ? end : at + 1;
        }
        if (length >= 0xC0) {
            if (at + 2 > size)
                return 0;
            size_t to = get16(data + at) & 0x3FFF;
            if (!end)
                end = at + 2;
            if (to >= limit)
                return 0;
            limit = at = to;
            continue;
        }
        if (length > 63 || at + 1 + length > size || used + length + 2 > NAME)
            return 0;
        for (int i = 1; i <= length; i++) {
            uint8_t c = data[at + i];
            if (c <= ' ' || c >= 127 || c == '.')
                c = '?'; /* in no rule; and the log is text */
            name[used++] = tolower(c);
        }
        name[used++] = '.';
        at += 1 + length;
    }
}

static void answer(struct stack *s, struct packet *p, const struct endpoint *guest, const uint8_t *data, size_t size,
                   uint8_t code)
{
    uint8_t *reply = s->reply + VNET + ETHER + 40 + 8;
    memcpy(reply, data, size);
    reply[2] = 0x80 | (data[2] & 0x79); /* a response, with the question's opcode and RD */
    reply[3] = 0x80 | code;
    memset(reply + 6, 0, 6); /* nothing but the question */
    struct endpoint from = {p->dst, 53};
    udp_reply(s, p->ether + 6, &from, guest, reply, size);
}

bool dns_servfail(struct stack *s, struct packet *p, const struct endpoint *guest, const uint8_t *data, size_t size)
{
    char name[NAME];
    size_t end = size > HEADER ? name_at(data, size, HEADER, name) : 0;
    if (!end || end + 4 > size || data[2] & 0x80)
        return false;
    answer(s, p, guest, data, end + 4, SERVFAIL);
    return true;
}

bool dns_question(struct stack *s, struct packet *p, const struct endpoint *guest, const uint8_t *data, size_t size)
{
    struct decision d = {.protocol = IP_UDP, .reason = BY_RULE, .guest = *guest, .far = {p->dst, 53}, .rule = -1};
    /* One question, in a query: what the name is must be beyond doubt. */
    if (size < HEADER || data[2] & 0x80 || get16(data + 4) != 1) {
        s->counts.malformed++;
        return false;
    }
    size_t end = name_at(data, size, HEADER, d.name);
    if (!end || end + 4 > size) {
        s->counts.malformed++;
        return false;
    }
    int rule;
    s->counts.dns_queries++;
    d.verdict = policy_name(s, d.name, &rule) ? ALLOW : DENY;
    d.rule = rule;
    d.reason = rule < 0 ? BY_DEFAULT : BY_RULE;
    policy_log(s, &d);
    if (d.verdict == DENY) {
        s->counts.dns_refused++;
        answer(s, p, guest, data, end + 4, REFUSED);
        return false;
    }
    return true;
}

void dns_answer(struct stack *s, const uint8_t *data, size_t size)
{
    char asked[NAME], name[NAME];
    if (size < HEADER || !(data[2] & 0x80) || data[3] & 15 || get16(data + 4) != 1)
        return;
    size_t at = name_at(data, size, HEADER, asked);
    if (!at || at + 4 > size)
        return;
    at += 4;
    for (unsigned n = get16(data + 6); n; n--) {
        at = name_at(data, size, at, name);
        if (!at || at + 10 > size)
            return;
        uint16_t type = get16(data + at), length = get16(data + at + 8);
        uint32_t seconds = get32(data + at + 4);
        at += 10;
        if (at + length > size)
            return;
        seconds = seconds < SHORTEST ? SHORTEST : seconds > LONGEST ? LONGEST : seconds;
        /* Whatever the chain of aliases is: these are the addresses of the name that was asked for. */
        if (type == A && length == 4) {
            struct addr a = addr_from4(data + at);
            policy_pin_name(s, asked, &a, seconds);
        } else if (type == AAAA && length == 16) {
            struct addr a;
            memcpy(a.b, data + at, 16);
            policy_pin_name(s, asked, &a, seconds);
        }
        at += length;
    }
}
