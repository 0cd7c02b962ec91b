# SPDX-License-Identifier: Apache-2.0
"""Virtual processors: modes, the run loop, exit handlers, threads, failure reports."""

from kvmpy.vcpu.assist import Assist
from kvmpy.vcpu.handlers import Handlers
from kvmpy.vcpu.loop import Loop, Outcome
from kvmpy.vcpu.runner import Runner
from kvmpy.vcpu.thread import State, VcpuThread
from kvmpy.vcpu.vcpu import Vcpu

__all__ = ["Assist", "Handlers", "Loop", "Outcome", "Runner", "State", "Vcpu", "VcpuThread"]
