# SPDX-License-Identifier: Apache-2.0
"""A configuration becomes a wired machine with a life cycle."""

from kvmpy.machine.config import Config as Config
from kvmpy.machine.config import parse_size as parse_size
from kvmpy.machine.drives import Drive as Drive
from kvmpy.machine.machine import Machine as Machine
from kvmpy.machine.nics import Nic as Nic
from kvmpy.machine.shares import Share as Share
