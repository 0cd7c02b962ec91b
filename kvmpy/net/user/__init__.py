# SPDX-License-Identifier: Apache-2.0
"""User-mode network: docs/networks.md."""

from kvmpy.net.user.forward import GuestForward as GuestForward
from kvmpy.net.user.forward import HostForward as HostForward
from kvmpy.net.user.network import Decision as Decision
from kvmpy.net.user.network import UserNet as UserNet
from kvmpy.net.user.policy import Policy as Policy
from kvmpy.net.user.policy import Rule as Rule
