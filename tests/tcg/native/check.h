/* SPDX-License-Identifier: Apache-2.0
 *
 * CHECK(condition) and CHECK_EQ(actual, expected): a test program ends with status 1 at the first that fails.
 */
#ifndef CHECK_H
#define CHECK_H

#include <stdio.h>
#include <stdlib.h>

#define CHECK(condition)                                                                        \
    do {                                                                                        \
        if (!(condition)) {                                                                     \
            fprintf(stderr, "%s:%d: %s: not %s\n", __FILE__, __LINE__, __func__, #condition);   \
            exit(1);                                                                            \
        }                                                                                       \
    } while (0)

#define CHECK_EQ(actual, expected)                                                              \
    do {                                                                                        \
        long long actual_ = (long long)(actual), expected_ = (long long)(expected);             \
        if (actual_ != expected_) {                                                             \
            fprintf(stderr, "%s:%d: %s: %s is %lld (%#llx), not %lld (%#llx)\n", __FILE__,      \
                    __LINE__, __func__, #actual, actual_, actual_, expected_, expected_);       \
            exit(1);                                                                            \
        }                                                                                       \
    } while (0)

#endif
