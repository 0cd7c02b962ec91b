# SPDX-License-Identifier: Apache-2.0
"""The network of a stock guest."""

from __future__ import annotations

# Shell commands for `parameters(run=DHCP + ...)`; the guest needs virtio_net and the module of its transport.
DHCP = """cat > /tmp/lease <<'END'
#!/bin/sh
[ "$1" = bound ] || exit 0
ip addr add $ip/$mask dev $interface; ip link set $interface mtu ${mtu:-1500}
ip route add default via $router; echo "nameserver $dns" > /etc/resolv.conf
END
chmod +x /tmp/lease; ip link set eth0 up; udhcpc -i eth0 -n -q -s /tmp/lease > /dev/null
"""
