/* SPDX-License-Identifier: Apache-2.0
 *
 * Features that the table knows but the processor must not announce yet, because some of their instructions are
 * missing. Whoever writes the last instruction of a feature removes it here. Included by cpuid.c only.
 */
#define NOT(f) (f / 64 == W ? 1ull << (f % 64) : 0)
static const uint64_t not_announced[2] = {
#define W 0
    NOT(FEAT_MWAITX),
#undef W
#define W 1
    0,
#undef W
};
