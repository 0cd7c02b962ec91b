# SPDX-License-Identifier: Apache-2.0
"""Facts about x86 and about kvmpy's guests: registers, control bits, CPUID and MSR names, the address map.

    layout   the address map of a machine        cpuid   CPUID features by name
    x86      control bits, descriptors, paging   msr     model-specific registers by name
    entry    the state in which the first vCPU starts an image
"""
