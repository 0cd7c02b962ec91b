/* SPDX-License-Identifier: Apache-2.0
 *
 * Random values that are rich in NaNs, infinities, denormals and boundaries. Whoever includes this has rnd().
 */
#include <stdint.h>
#include <string.h>

static unsigned pick(unsigned n) { return (unsigned)(rnd() >> 33) % n; }
static uint32_t float_bits(void)
{
    static const uint32_t pool[] = {0, 0x80000000, 0x3f800000, 0xbf800000, 0x7f800000, 0xff800000, 0x7fc00000, 0xffc00001, 0x7f800001, 0xffbfffff, 1, 0x807fffff,
                                    0x00800000, 0x80800000, 0x7f7fffff, 0xff7fffff, 0x3f000000, 0x4f000000, 0x4effffff, 0xcf000000, 0x5f000000, 0x33800000, 0x40490fdb};
    unsigned k = pick(4);
    return k == 0 ? pool[pick(sizeof pool / 4)] : k == 1 ? (uint32_t)rnd() : k == 2 ? ((uint32_t)rnd() & 0x80ffffff) | (0x3c + pick(8)) << 24 : (uint32_t)rnd() & 0x80ffffff;
}
static uint64_t double_bits(void)
{
    static const uint64_t pool[] = {0, 1ull << 63, 0x3ff0000000000000, 0xbff0000000000000, 0x7ff0000000000000, 0xfff0000000000000, 0x7ff8000000000000, 0xfff8000000000001,
                                    0x7ff0000000000001, 0xfff7ffffffffffff, 1, 0x800fffffffffffff, 0x0010000000000000, 0x7fefffffffffffff, 0x41e0000000000000, 0xc1e0000000200000,
                                    0x43e0000000000000, 0xc3e0000000000000, 0x3fe0000000000000, 0x47efffffe0000000, 0x3690000000000000, 0x380fffffffffffff, 0x400921fb54442d18};
    unsigned k = pick(4);
    return k == 0 ? pool[pick(sizeof pool / 8)] : k == 1 ? rnd() : k == 2 ? (rnd() & 0x800fffffffffffff) | (uint64_t)(0x3f0 + pick(64)) << 52 : rnd() & 0x801fffffffffffff;
}
static void fill(uint8_t *p, unsigned n)
{
    for (unsigned i = 0; i < n; i += 16) {
        unsigned style = pick(4);
        for (unsigned j = 0; j < 16; j += 4) {
            uint32_t f = float_bits();
            uint64_t d = style == 2 ? rnd() : double_bits();
            if (style == 0)
                memcpy(p + i + j, &f, 4);
            else if (!(j & 4))
                memcpy(p + i + j, &d, 8);
        }
        if (style == 3 && pick(2))
            for (unsigned j = 0; j < 16; j++)
                p[i + j] = "\0\1\x7f\x80\xff\xfe\x81 a"[pick(9)];
    }
}
static void x87_value(uint8_t *p)
{
    static const uint16_t exps[] = {0, 1, 0x3fff, 0x3ffe, 0x4000, 0x403e, 0x403f, 0x7ffe, 0x7fff, 0x3f80, 0x407e, 0x3c00, 0x43fe, 0x3fc0, 0x3f6a, 0x401e, 0x4005};
    static const uint64_t mants[] = {0, 1, 1ull << 63, ~0ull, 0xc000000000000000, 0x8000000000000001, 0x7fffffffffffffff, 0xa000000000000000, 0xffffff0000000000, 0xfffffffffffff800};
    uint64_t m = pick(2) ? mants[pick(10)] : rnd();
    unsigned near = pick(3);
    uint16_t e = near == 0 ? exps[pick(17)] : near == 1 ? (uint16_t)(0x3fe0 + pick(64)) : (uint16_t)rnd();
    if (pick(8) && e & 0x7fff)
        m |= 1ull << 63;
    e = (uint16_t)((e & 0x7fff) | (pick(2) ? 0x8000 : 0));
    memcpy(p, &m, 8);
    memcpy(p + 8, &e, 2);
}
