# SPDX-License-Identifier: Apache-2.0
"""Speed of kvmpy beside its peers, as ratios measured in one run. `python -m benchmarks --help`."""
