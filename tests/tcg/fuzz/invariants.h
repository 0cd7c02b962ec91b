/* SPDX-License-Identifier: Apache-2.0 */
#ifndef FUZZ_INVARIANTS_H
#define FUZZ_INVARIANTS_H

#include "guest.h"

/* These end the process when the state of a stopped processor contradicts itself or the memory behind it. */
void check_registers(const struct cpu *c);
void check_translations(const struct cpu *c); /* the softTLBs: slower */
void remember_memory(void);
void check_dirty_log(void); /* since then */

#endif
