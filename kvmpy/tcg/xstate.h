/* SPDX-License-Identifier: Apache-2.0
 *
 * XSAVE components that this processor does not have but carries, as bytes, for the one that it assists: AVX-512's
 * opmask and upper halves. They lie where the host's CPUID leaf 0xD says, since the assisted guest's XSAVE areas do.
 */
#ifndef KVMPY_TCG_XSTATE_H
#define KVMPY_TCG_XSTATE_H

#include "decode.h"

#define XSTATE_X87 1u
#define XSTATE_SSE 2u
#define XSTATE_AVX 4u
#define XSTATE_AVX512 0xe0u
#define XSTATE_ZMM_HI256 0x40u
#define XSTATE_PKRU 0x200u
#define XSTATE_AREA 4096u /* of KVM_GET_XSAVE: components that end beyond it are not carried */

struct xcomponent { uint32_t offset, size; bool aligned; }; /* standard format; aligned: to 64 in the compacted one */
struct xcomponent xstate_component(unsigned bit);
/* Where a component lies in an area: compacted as XCOMP_BV says, or in the standard format when that is 0. */
uint32_t xstate_offset(uint64_t xcomp_bv, unsigned bit);

/* The components of `xcr0` that can be carried, which c does from now on. */
uint64_t xstate_carry(struct cpu *c, uint64_t xcr0);
void xstate_free(struct cpu *c);
/* Standard format, for KVM_GET_XSAVE and KVM_SET_XSAVE. `present`: XSTATE_BV. */
void xstate_store_carried(const struct cpu *c, uint8_t *area);
void xstate_load_carried(struct cpu *c, const uint8_t *area, uint64_t present);
/* VEX instructions zero the upper halves of their destination: a micro-op before each does. */
void xstate_zero_upper(const struct cpu *c, struct decoded *d);

#endif
