/* SPDX-License-Identifier: Apache-2.0
 *
 * Entropy, virtio 1.2 section 5.4: buffers are filled from getrandom(2).
 */
#include "serve.h"

#include <errno.h>
#include <sys/random.h>

#define MOST 65536 /* bytes per request: a guest may not keep a host processor busy with one buffer of gigabytes */

enum serve_result rng_serve(struct vq *q, uint64_t *bytes)
{
    struct vq_chain *chain = &q->scratch;
    for (int n = 0; n < 16 && !vq_journal_full(q); n++) {
        unsigned char random[256]; /* getrandom(2) gives so many without being interrupted */
        int got = vq_pop(q, chain);
        if (got <= 0)
            return got ? SERVE_FAULT : SERVE_IDLE;
        if (chain->reads || !chain->writes) {
            vq_fault(q, "an entropy request with device-readable buffers", chain->read_size); /* 5.4.6.1 */
            return SERVE_FAULT;
        }
        uint64_t size = chain->write_size < MOST ? chain->write_size : MOST;
        for (uint64_t at = 0; at < size;) {
            size_t want = size - at < sizeof(random) ? size - at : sizeof(random);
            ssize_t had = getrandom(random, want, 0);
            if (had < 0 && errno != EINTR)
                break;
            if (had > 0)
                at += vq_write(q, chain, at, random, had);
        }
        *bytes += chain->written;
        vq_push(q, chain->head, chain->written);
    }
    return SERVE_MORE;
}
