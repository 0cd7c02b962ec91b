/* SPDX-License-Identifier: Apache-2.0
 *
 * What a guest may reach: rules in order, the first that fits decides. Names fit through the addresses they resolved
 * to.
 */
#include "user.h"

#include <stddef.h>
#include <time.h>
#include <unistd.h>

static const uint8_t MAPPED[12] = {[10] = 0xFF, [11] = 0xFF};

bool addr_is4(const struct addr *a)
{
    return !memcmp(a->b, MAPPED, 12);
}

bool addr_same(const struct addr *a, const struct addr *b)
{
    return !memcmp(a->b, b->b, 16);
}

struct addr addr_from4(const uint8_t bytes[4])
{
    struct addr a;
    memcpy(a.b, MAPPED, 12);
    memcpy(a.b + 12, bytes, 4);
    return a;
}

struct target target_of(const struct endpoint *e)
{
    struct target t = {0};
    if (addr_is4(&e->ip)) {
        t.family = AF_INET;
        t.size = sizeof(t.in4);
        t.in4.sin_family = AF_INET;
        t.in4.sin_port = htons(e->port);
        memcpy(&t.in4.sin_addr, e->ip.b + 12, 4);
    } else {
        t.family = AF_INET6;
        t.size = sizeof(t.in6);
        t.in6.sin6_family = AF_INET6;
        t.in6.sin6_port = htons(e->port);
        memcpy(&t.in6.sin6_addr, e->ip.b, 16);
    }
    return t;
}

bool endpoint_of(const struct sockaddr *any, struct endpoint *e)
{
    if (any->sa_family == AF_INET) {
        const struct sockaddr_in *in = (const struct sockaddr_in *)any;
        e->ip = addr_from4((const uint8_t *)&in->sin_addr);
        e->port = ntohs(in->sin_port);
        return true;
    }
    if (any->sa_family == AF_INET6) {
        const struct sockaddr_in6 *in = (const struct sockaddr_in6 *)any;
        memcpy(e->ip.b, &in->sin6_addr, 16);
        e->port = ntohs(in->sin6_port);
        return true;
    }
    return false;
}

static bool inside(const struct addr *ip, const uint8_t *net, unsigned bits)
{
    unsigned bytes = bits / 8, rest = bits % 8;
    return !memcmp(ip->b, net, bytes) && (!rest || !((ip->b[bytes] ^ net[bytes]) >> (8 - rest)));
}

/* Addresses that are the host itself, its link, or nobody: reached only by a rule that names them. */
static const struct {
    uint8_t net[16];
    uint8_t bits;
} CLOSED[] = {
    {{[10] = 0xFF, 0xFF, 0}, 104},         /* 0.0.0.0/8: connect(2) takes it as this host */
    {{[10] = 0xFF, 0xFF, 127}, 104},       /* loopback */
    {{[10] = 0xFF, 0xFF, 169, 254}, 112},  /* link-local, where clouds keep credentials */
    {{[10] = 0xFF, 0xFF, 224}, 99},        /* 224.0.0.0/3: multicast, reserved, broadcast */
    {{0}, 96},                             /* ::, ::1 and IPv4-compatible ones */
    {{0xFE, 0x80}, 9},                     /* fe80::/9: link-local and site-local */
    {{0xFF}, 8},                           /* multicast */
    {{0x00, 0x64, 0xFF, 0x9B}, 96},        /* 64:ff9b::/96, another way to write IPv4 addresses */
    {{0x20, 0x02}, 16},                    /* 6to4, and another */
};

static int closed(const struct addr *ip)
{
    for (size_t i = 0; i < sizeof(CLOSED) / sizeof(*CLOSED); i++)
        if (inside(ip, CLOSED[i].net, CLOSED[i].bits))
            return i;
    return -1;
}

static uint8_t protocol_bit(uint8_t protocol)
{
    return protocol == IP_TCP ? 1 : protocol == IP_UDP ? 2 : 4;
}

static bool fits(struct stack *s, int index, uint8_t protocol, const struct endpoint *far)
{
    const struct rule *r = &s->rules[index];
    if (!(r->protocols & protocol_bit(protocol)))
        return false;
    if (protocol != IP_ICMP && (far->port < r->low || far->port > r->high))
        return false;
    if (!r->name[0])
        return inside(&far->ip, r->net.b, r->bits);
    for (int i = 0; i < s->pin_count; i++)
        if (s->pins[i].rule == index && addr_same(&s->pins[i].ip, &far->ip)
            && (!s->pins[i].until || s->pins[i].until > s->now))
            return true;
    return false;
}

/* The verdict of the rules; `d` gets its reason. */
static bool judge(struct stack *s, uint8_t protocol, const struct endpoint *far, struct decision *d)
{
    const int special = closed(&far->ip);
    for (int i = 0; i < s->rule_count; i++) {
        const struct rule *r = &s->rules[i];
        /* "Any" and names do not open special addresses: a DNS answer could name them. */
        if (special >= 0 && r->verdict == ALLOW
            && (r->name[0] || r->bits < CLOSED[special].bits || closed(&r->net) != special))
            continue;
        if (fits(s, i, protocol, far)) {
            d->reason = BY_RULE;
            d->rule = i;
            d->verdict = r->verdict;
            return d->verdict == ALLOW;
        }
    }
    d->reason = special >= 0 ? BY_KIND : BY_DEFAULT;
    d->verdict = special >= 0 ? DENY : s->config.default_verdict;
    return d->verdict == ALLOW;
}

bool policy_route(struct stack *s, uint8_t protocol, const struct endpoint *guest, const struct endpoint *far,
                  struct target *to, bool *dns)
{
    struct decision d = {.protocol = protocol, .rule = -1, .guest = *guest, .far = *far, .verdict = DENY};
    *dns = false;
    for (int i = 0; i < s->forward_count; i++) {
        const struct forward *f = &s->forwards[i];
        if (f->protocol == protocol && f->at.port == far->port && addr_same(&f->at.ip, &far->ip)) {
            *to = f->to;
            d.verdict = ALLOW;
            d.reason = BY_FORWARD;
            policy_log(s, &d);
            return true;
        }
    }
    if (is_ours(s, &far->ip)) {
        const bool resolver = addr_same(&far->ip, &s->config.dns) || addr_same(&far->ip, &s->config.dns6);
        if (resolver && far->port == 53 && protocol != IP_ICMP && s->resolver_count) {
            /* Names cannot be looked at in a stream: with a filter of names, only datagrams. */
            if (protocol == IP_UDP || !s->config.filter_names) {
                *to = s->resolvers[s->resolver % s->resolver_count];
                *dns = true;
                return true; /* each question is logged */
            }
            d.reason = BY_KIND;
        } else if (!resolver && s->config.loopback) {
            struct endpoint here = {addr_from4((const uint8_t[]){127, 0, 0, 1}), far->port};
            *to = target_of(&here);
            d.verdict = ALLOW;
            d.reason = BY_FORWARD;
        } else {
            d.reason = BY_KIND;
        }
    } else if (on_network(s, &far->ip)) {
        d.reason = BY_KIND;
    } else if (judge(s, protocol, far, &d)) {
        *to = target_of(far);
    }
    policy_log(s, &d);
    return d.verdict == ALLOW;
}

/* -- names */

static bool name_fits(const char *pattern, const char *name)
{
    if (pattern[0] != '.')
        return !strcmp(pattern, name);
    size_t p = strlen(pattern), n = strlen(name);
    return n > p && !strcmp(name + n - p, pattern);
}

bool policy_name(struct stack *s, const char *name, int *rule)
{
    *rule = -1;
    for (int i = 0; i < s->rule_count; i++) {
        const struct rule *r = &s->rules[i];
        if (!r->name[0] || !name_fits(r->name, name))
            continue;
        if (*rule < 0)
            *rule = i;
        /* A rule for some ports only does not hide the name. */
        if (r->verdict == ALLOW || (r->low == 0 && r->high == 65535 && r->protocols == 7))
            return r->verdict == ALLOW;
    }
    return s->config.default_verdict == ALLOW || !s->config.filter_names || *rule >= 0;
}

void policy_pin(struct stack *s, int rule, const struct addr *ip, uint64_t seconds)
{
    uint64_t until = seconds ? s->now + seconds * NS : 0;
    struct pin *oldest = NULL;
    for (int i = 0; i < s->pin_count; i++) {
        struct pin *p = &s->pins[i];
        if (p->rule == rule && addr_same(&p->ip, ip)) {
            if (p->until && (!until || until > p->until))
                p->until = until;
            return;
        }
        if (p->until && (!oldest || p->until < oldest->until))
            oldest = p;
    }
    if (s->pin_count < PINS)
        oldest = &s->pins[s->pin_count++];
    if (oldest)
        *oldest = (struct pin){*ip, rule, until};
}

void policy_pin_name(struct stack *s, const char *name, const struct addr *ip, uint64_t seconds)
{
    for (int i = 0; i < s->rule_count; i++)
        if (s->rules[i].name[0] && name_fits(s->rules[i].name, name))
            policy_pin(s, i, ip, seconds);
}

/* -- the log */

void policy_log(struct stack *s, const struct decision *d)
{
    if (d->verdict == ALLOW)
        s->counts.allowed++;
    else
        s->counts.denied++;
    struct timespec t;
    clock_gettime(CLOCK_REALTIME, &t);
    pthread_mutex_lock(&s->log_lock);
    if (s->log_used < DECISIONS) {
        struct decision *at = &s->log[(s->log_head + s->log_used++) % DECISIONS];
        *at = *d;
        at->time = t.tv_sec * NS + t.tv_nsec;
    } else {
        s->counts.unlogged++;
    }
    bool first = s->log_used == 1;
    pthread_mutex_unlock(&s->log_lock);
    uint64_t one = 1;
    if (first && write(s->news, &one, sizeof(one)) < 0)
        return; /* cannot be: the counter is far from full */
}
