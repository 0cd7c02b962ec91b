# SPDX-License-Identifier: Apache-2.0
def engine() -> object:
    """The engine, as the capsule that Kvm() takes."""
