/* SPDX-License-Identifier: Apache-2.0
 *
 * AES-NI, PCLMULQDQ and SHA, with VAES and VPCLMULQDQ on 256 bits.
 *
 * All execute the host's instruction (data-independent time, as guests expect of them); a host that lacks one does
 * not announce it (fp_host_has). SHA256RNDS2 takes the message words from XMM0. SHA has no VEX forms.
 */
#include "vec.h"

#define AES(name) LEGACY(name, 16) VEX3(name)
AES(aesenc) AES(aesenclast) AES(aesdec) AES(aesdeclast)
LEGACY(aesimc, 16) VEX2_128(aesimc, 16)
LEGACY_IMM(aeskeygenassist, 256) VEX2_IMM_128(aeskeygenassist, 256)

/* Only bits 0 and 4 of the immediate count. */
LEGACY_IMM(pclmulqdq, 32) VEX3_IMM_128(pclmulqdq, 32) VEX3_IMM_256(pclmulqdq, 32)

LEGACY(sha1nexte, 16) LEGACY(sha1msg1, 16) LEGACY(sha1msg2, 16) LEGACY(sha256msg1, 16) LEGACY(sha256msg2, 16)
LEGACY_IMM(sha1rnds4, 4)

#define SHA256RNDS2(s2)                                                                                          \
    __asm__ volatile("movdqa %2, %%xmm0\n\tmovdqa %0, %%xmm1\n\tsha256rnds2 %%xmm0, %1, %%xmm1\n\tmovdqa %%xmm1, %0" \
                     : "+m"(*V(u->d)) : IN(s2), IN(V(0)) : "xmm0", "xmm1")
OP(sha256rnds2_rr) { SHA256RNDS2(V(u->s)); NEXT; }
OP(sha256rnds2_rm) { SHA256RNDS2(src_aligned(c, u)); NEXT; }
