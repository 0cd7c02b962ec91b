/* SPDX-License-Identifier: Apache-2.0 */
#ifndef FUZZ_DOUBT_H
#define FUZZ_DOUBT_H

#include "end.h"

/*
 * Flags that the manual leaves undefined are the handler's choice in the interpreter and the host's in its own code. This
 * walks through the interpreter's run of an input once more, one instruction at a time, and knows which flags are in
 * doubt. Where they end in RFLAGS and in the frames of exceptions, both ends get zeros. False: something else has seen
 * one, so the ends say nothing.
 */
bool doubt_remove(const uint8_t *data, size_t size, unsigned instructions, struct end *a, struct end *b);

#endif
