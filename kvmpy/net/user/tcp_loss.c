/* SPDX-License-Identifier: Apache-2.0
 *
 * TCP: what came behind holes, as sets of sequence numbers.
 */
#include "user.h"

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
