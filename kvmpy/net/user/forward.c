/* SPDX-License-Identifier: Apache-2.0
 *
 * What other threads change while the network runs: forwards, rules, resolvers; and what they read.
 */
#include "user.h"

#include <errno.h>
#include <stdlib.h>
#include <unistd.h>

static void wake(struct stack *s)
{
    uint64_t one = 1;
    if (write(s->wake, &one, sizeof(one)) < 0)
        return; /* it is awake */
}

int stack_listen(struct stack *s, int fd, uint8_t protocol, const struct endpoint *guest)
{
    int error = 0, count = 0;
    struct listener *l = calloc(1, sizeof(*l));
    if (!l)
        return ENOMEM;
    l->source = (struct source){fd, protocol == IP_TCP ? tcp_listener_ready : udp_listener_ready};
    l->timer = (struct timer){0, -1, tcp_listener_again};
    l->protocol = protocol;
    l->guest = *guest;
    pthread_mutex_lock(&s->lock);
    for (struct listener *at = s->listeners; at; at = at->next)
        count++;
    if (count >= FORWARDS) {
        error = ENOSPC;
    } else if (!stack_watch(s, &l->source, EPOLLIN, false)) {
        error = errno;
    } else {
        l->next = s->listeners;
        s->listeners = l;
    }
    pthread_mutex_unlock(&s->lock);
    if (error)
        free(l);
    return error;
}

int stack_unlisten(struct stack *s, int fd)
{
    int error = ENOENT;
    pthread_mutex_lock(&s->lock);
    for (struct listener **at = &s->listeners; *at; at = &(*at)->next) {
        struct listener *l = *at;
        if (l->source.fd != fd)
            continue;
        *at = l->next;
        /* Datagram flows answer through its socket; connections have sockets of their own and go on. */
        for (struct flow *f = s->oldest, *next; f; f = next) {
            next = f->newer;
            if (f->listener == l)
                flow_free(s, f);
        }
        timer_clear(s, &l->timer);
        close(fd);
        l->source.fd = -1;
        l->next_dead = s->dead_listeners; /* the worker may hold an event of it */
        s->dead_listeners = l;
        error = 0;
        break;
    }
    pthread_mutex_unlock(&s->lock);
    wake(s);
    return error;
}

int stack_forward(struct stack *s, const struct forward *forward)
{
    int error = 0;
    pthread_mutex_lock(&s->lock);
    if (s->forward_count == FORWARDS)
        error = ENOSPC;
    else
        s->forwards[s->forward_count++] = *forward;
    pthread_mutex_unlock(&s->lock);
    return error;
}

int stack_set_rules(struct stack *s, const struct rule *rules, int count, uint8_t default_verdict, bool filter_names)
{
    if (count > RULES)
        return ENOSPC;
    pthread_mutex_lock(&s->lock);
    memcpy(s->rules, rules, count * sizeof(*rules));
    s->rule_count = count;
    s->pin_count = 0;
    s->config.default_verdict = default_verdict;
    s->config.filter_names = filter_names;
    pthread_mutex_unlock(&s->lock);
    return 0;
}

int stack_pin(struct stack *s, int rule, const struct addr *ip)
{
    pthread_mutex_lock(&s->lock);
    int error = rule < s->rule_count ? 0 : EINVAL;
    if (!error)
        policy_pin(s, rule, ip, 0);
    pthread_mutex_unlock(&s->lock);
    return error;
}

int stack_set_resolvers(struct stack *s, const struct target *resolvers, int count)
{
    pthread_mutex_lock(&s->lock);
    s->resolver_count = count < RESOLVERS ? count : RESOLVERS;
    memcpy(s->resolvers, resolvers, s->resolver_count * sizeof(*resolvers));
    s->resolver = 0;
    pthread_mutex_unlock(&s->lock);
    return 0;
}

int stack_decisions(struct stack *s, struct decision *to, int most)
{
    int count = 0;
    pthread_mutex_lock(&s->log_lock);
    for (; s->log_used && count < most; s->log_used--) {
        to[count++] = s->log[s->log_head];
        s->log_head = (s->log_head + 1) % DECISIONS;
    }
    pthread_mutex_unlock(&s->log_lock);
    return count;
}

void stack_counts(struct stack *s, struct counts *counts, uint32_t flows[3])
{
    pthread_mutex_lock(&s->lock);
    *counts = s->counts;
    flows[0] = s->tcps;
    flows[1] = s->udps;
    flows[2] = s->icmps;
    pthread_mutex_unlock(&s->lock);
}
