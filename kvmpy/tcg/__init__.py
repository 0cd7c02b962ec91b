# SPDX-License-Identifier: Apache-2.0
"""The software CPU: a KVM without KVM, behind the same engine door as the kernel's (see engine.h).

    kvm = Kvm(kvmpy.tcg.engine())
"""

from __future__ import annotations


def engine() -> object:
    """The software engine as a capsule for `Kvm`; raises ImportError where it was not built."""
    from kvmpy.tcg._tcg import engine as capsule

    return capsule()


__all__ = ["engine"]
