/* SPDX-License-Identifier: Apache-2.0
 *
 * TCP: what came behind holes, and what was lost. Both are sets of sequence numbers: of data that the guest sent behind
 * a hole, and of data that it says it has behind one (SACK, RFC 2018).
 *
 * Loss is found as in RFC 6675, and as in RFC 6582 when the guest says nothing of holes. The wire keeps the order, which
 * makes it simple: what did not arrive is lost as soon as something that was sent later has.
 */
#include "user.h"

#define DUPLICATES 3 /* acknowledgements that say nothing of holes (RFC 5681, 3.2) */
#define LEAST 10u    /* segments on their way, whatever was lost: what any network is trusted with (RFC 6928) */

/* -- sets of numbers: apart from each other, what was added last first (RFC 2018, 4) */

bool ranges_add(struct ranges *r, uint32_t at, uint32_t end)
{
    struct range one = {at, end};
    int kept = 0;
    for (int i = 0; i < r->count; i++) {
        const struct range o = r->of[i];
        if (seq_lt(end, o.at) || seq_lt(o.end, at)) {
            r->of[kept++] = o;
            continue;
        }
        one.at = seq_lt(o.at, one.at) ? o.at : one.at;
        one.end = seq_lt(one.end, o.end) ? o.end : one.end;
    }
    if (kept == RANGES)
        return false;
    memmove(r->of + 1, r->of, kept * sizeof(*r->of));
    r->of[0] = one;
    r->count = kept + 1;
    return true;
}

uint32_t ranges_reach(struct ranges *r, uint32_t seq)
{
    uint32_t beyond = 0;
    int kept = 0;
    for (int i = 0; i < r->count; i++) {
        const struct range o = r->of[i];
        if (seq_lt(seq, o.at))
            r->of[kept++] = o;
        else if (seq_lt(seq, o.end))
            beyond = o.end - seq;
    }
    r->count = kept;
    return beyond;
}

/* How many of them are below `seq`. */
static uint32_t below(const struct ranges *r, uint32_t seq)
{
    uint32_t sum = 0;
    for (int i = 0; i < r->count; i++)
        if (seq_lt(r->of[i].at, seq))
            sum += (seq_lt(r->of[i].end, seq) ? r->of[i].end : seq) - r->of[i].at;
    return sum;
}

static uint32_t highest(const struct ranges *r)
{
    uint32_t end = r->of[0].end;
    for (int i = 1; i < r->count; i++)
        end = seq_lt(end, r->of[i].end) ? r->of[i].end : end;
    return end;
}

/* -- what the guest has */

bool tcp_held(struct tcp *t, const uint8_t *blocks, int count)
{
    const uint32_t before = below(&t->held, t->nxt);
    while (count--) { /* the first is the newest, and so it is in the set */
        const uint32_t at = get32(blocks + 8 * count), end = get32(blocks + 8 * count + 4);
        if (seq_lt(t->una, at) && seq_lt(at, end) && seq_le(end, t->nxt)) /* else duplicates (RFC 2883), or lies */
            ranges_add(&t->held, at, end);
    }
    return below(&t->held, t->nxt) != before;
}

void tcp_advance(struct tcp *t, uint32_t ack)
{
    t->una = ack;
    t->dup = 0;
    ranges_reach(&t->held, ack);
    if (seq_lt(t->again, ack))
        t->again = ack;
    if (seq_lt(t->lost, ack))
        t->lost = ack;
    if (seq_lt(t->recover, ack))
        t->recover = ack;
    if (t->fast && t->recover == ack) { /* all that was on its way at the loss (RFC 6582, 3.2) */
        t->fast = false;
        t->cwnd = t->cwnd < t->ssthresh ? t->cwnd : t->ssthresh;
    }
}

/* -- what is lost: all from `again` to `lost` but what the guest has. What is before `again` was sent again. */

static void shrink(struct tcp *t)
{
    const uint32_t half = (t->nxt - t->una) / 2;
    t->ssthresh = half > LEAST * t->mss ? half : LEAST * t->mss;
    t->recover = t->nxt;
    t->again = t->una;
    t->timed_at = 0; /* Karn: an answer would not say to which of both */
}

void tcp_suspect(struct stack *s, struct tcp *t, uint32_t most)
{
    if (t->recover == t->una) {
        if (t->una == t->nxt || (t->dup < DUPLICATES && !t->held.count))
            return;
        shrink(t);
        t->fast = true;
        t->cwnd = t->ssthresh;
        t->deadline = s->now + t->rto;
    }
    uint32_t edge = t->lost;
    if (t->held.count) {
        edge = highest(&t->held);
        if (t->again != t->una && seq_lt(t->resent, edge))
            t->again = t->una; /* what was sent after the last of what was sent again is there: that was lost, too */
    } else if (t->again == t->una) { /* one at each loss, and one when only part of the rest arrives (RFC 6582, 3.2) */
        const uint32_t rest = t->recover - t->una;
        edge = t->una + (rest < most ? rest : most);
    }
    if (seq_lt(t->lost, edge))
        t->lost = edge;
}

void tcp_all_lost(struct tcp *t)
{
    shrink(t);
    t->fast = false;
    t->cwnd = LEAST * t->mss;
    t->lost = t->nxt;
    t->held.count = 0; /* the guest may have thought better of it (RFC 2018, 8) */
}

uint32_t tcp_flight(const struct tcp *t)
{
    return t->nxt - t->lost + (t->again - t->una) - below(&t->held, t->again); /* RFC 6675, 4: SetPipe */
}

uint32_t tcp_hole(struct tcp *t)
{
    uint32_t end = t->lost;
    for (int i = 0; i < t->held.count; i++) {
        const struct range o = t->held.of[i];
        if (seq_le(o.at, t->again) && seq_lt(t->again, o.end))
            t->again = o.end;
    }
    for (int i = 0; i < t->held.count; i++) {
        const struct range o = t->held.of[i];
        if (seq_lt(t->again, o.at) && seq_lt(o.at, end))
            end = o.at;
    }
    return seq_lt(t->again, end) ? end - t->again : 0;
}
