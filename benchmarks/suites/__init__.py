# SPDX-License-Identifier: Apache-2.0
"""Test suites of other projects, run on the software CPU and beside it on QEMU's TCG; docs/conformance.md tells how.

The suites themselves are not part of kvmpy: each module here takes a directory where somebody built one.
"""
