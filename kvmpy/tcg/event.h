/* SPDX-License-Identifier: Apache-2.0
 *
 * eventfds of user space, held like the kernel holds them: by a descriptor of our own, so that closing theirs
 * changes nothing.
 */
#ifndef KVMPY_TCG_EVENT_H
#define KVMPY_TCG_EVENT_H

#include <stdbool.h>
#include <stdint.h>

struct event {
    int fd;      /* ours */
    uint64_t id; /* which eventfd it is: equal for duplicates */
};

int event_hold(struct event *event, int fd);             /* 0, -EBADF, or -EINVAL when it is no eventfd */
bool event_same(const struct event *event, int fd);
void event_release(struct event *event);
void event_signal(const struct event *event);            /* adds one */
bool event_take(const struct event *event);              /* never blocks; true if it was signalled */

#endif
