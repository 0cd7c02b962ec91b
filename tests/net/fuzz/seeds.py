# SPDX-License-Identifier: Apache-2.0
"""Writes inputs for fuzz_network.c: what guests, hosts and peers say when they mean it."""

import struct
import sys
from pathlib import Path

FRAME, WAIT, HOST_SENDS, HOST_CLOSES, HOST_ANSWERS, TAKES, HOST_CONNECTS, SWITCH = range(8)
FIX_IP, FIX_TCP, FIX_GAP, FIX_OLD, FIX_FAR, FIX_SACK = 1, 2, 4, 8, 16, 32
FIN, SYN, RST, PSH, ACK = 1, 2, 4, 8, 16
PLAIN, UNSUMMED = bytes(12), b"\x02" + bytes(11)  # VIRTIO_NET_HDR_F_DATA_VALID: the sums count as right
GUEST, GATEWAY = bytes.fromhex("525400000001"), bytes.fromhex("52550a000202")
ME, SERVER, DNS = bytes([10, 0, 2, 15]), bytes([10, 0, 2, 100]), bytes([10, 0, 2, 3])
LINK = b"\xfe\x80" + bytes(13) + b"\x09"


def step(what, how=0, data=b""):
    return struct.pack("<BBH", what, how, len(data)) + data


def ether(kind, data, to=GATEWAY):
    return UNSUMMED + to + GUEST + kind.to_bytes(2, "big") + data


def ip4(protocol, to, data, how=FIX_TCP, source=ME, fragment=0):
    head = struct.pack(">BBHHHBBH4s4s", 0x45, 0, 20 + len(data), 7, fragment, 64, protocol, 0, source, to)
    return step(FRAME, FIX_IP | how, ether(0x800, head + data))


def first4(protocol, to, data, source=ME, fragment=0):
    """The same, but with numbers of its own: the begin of a connection."""
    return ip4(protocol, to, data, 0, source, fragment)


def ip6(protocol, to, data, source=LINK):
    head = struct.pack(">IHBB", 0x60000000, len(data), protocol, 255)
    return step(FRAME, 0, ether(0x86DD, head + source + to + data))


def tcp(flags, data=b"", options=b"", port=3000, ack=0):
    size = (5 + len(options) // 4) << 4
    return struct.pack(">HHIIBBHHH", port, 80, 1, ack % (1 << 32), size, flags, 65535, 0, 0) + options + data


def sack(ack, *blocks):
    """All numbers count from the end of what the guest was sent."""
    words = [word % (1 << 32) for block in blocks for word in block]
    options = bytes([1, 1, 5, 2 + 4 * len(words)]) + struct.pack(f">{len(words)}I", *words)
    return ip4(6, SERVER, tcp(ACK, options=options, ack=ack), FIX_TCP | FIX_SACK)


def datagram(source, to, data):
    return struct.pack(">HHHH", source, to, 8 + len(data), 0) + data


def question(name):
    words = b"".join(bytes([len(word)]) + word for word in name.split(b".")) + b"\0"
    return struct.pack(">HHHHHH", 7, 0x100, 1, 0, 0, 0) + words + b"\0\1\0\1"


def dhcp(kind):
    body = bytes([1, 1, 6, 0]) + bytes(24) + GUEST + bytes(202) + bytes([99, 130, 83, 99, 53, 1, kind, 255])
    return first4(17, b"\xff" * 4, datagram(68, 67, body), bytes(4))


OPTIONS = bytes([2, 4, 5, 180, 1, 3, 3, 7, 1, 1, 4, 2])
OPEN = first4(6, SERVER, tcp(SYN, options=OPTIONS)) + ip4(6, SERVER, tcp(ACK)) + step(HOST_SENDS)
ARP = step(FRAME, 0, ether(0x806, b"\0\1\x08\0\6\4\0\1" + GUEST + ME + bytes(6) + bytes([10, 0, 2, 2])))
GOOD = question(b"www.good.test")
REPLY = GOOD[:2] + b"\x81\x80\0\1\0\1" + GOOD[8:] + b"\xc0\x0c\0\1\0\1\0\0\0\x3c\0\4" + bytes([192, 0, 2, 1])
GROUP = b"\xff\x02" + bytes(13)
SIX = b"\xfd" + bytes(14)
BROADCAST = b"\xff" * 6 + GUEST + b"\x08\x06" + bytes(46)
LONG = b"\x01\x01\x42\0\x90\5\x22\0\x10\0\0\0"  # needs a checksum, TCP over IPv4 in segments of 1424 bytes

INPUTS = {
    "arp": ARP,
    "dhcp": dhcp(1) + dhcp(3),
    "echo": first4(1, bytes([10, 0, 2, 2]), struct.pack(">BBHHH", 8, 0, 0xF7FE, 1, 0)),
    "fragments": first4(17, bytes([10, 0, 2, 2]), datagram(9, 7000, bytes(32))[:24], fragment=0x2000)
    + first4(17, bytes([10, 0, 2, 2]), bytes(16), fragment=3) + step(HOST_ANSWERS, 0, b"yes"),
    "dns": first4(17, DNS, datagram(1024, 53, GOOD)) + step(HOST_ANSWERS, 0, REPLY)
    + first4(17, DNS, datagram(1025, 53, question(b"bad.test"))),
    "tcp": OPEN + ip4(6, SERVER, tcp(ACK | PSH, b"GET /")) + step(HOST_SENDS, 128) + step(HOST_SENDS, 40)
    + ip4(6, SERVER, tcp(ACK)) + ip4(6, SERVER, tcp(ACK | FIN)) + step(HOST_CLOSES) + ip4(6, SERVER, tcp(ACK)),
    "tcp-host-first": OPEN + step(HOST_SENDS, 120) + step(HOST_CLOSES, 128) + ip4(6, SERVER, tcp(ACK))
    + step(WAIT, 60) + ip4(6, SERVER, tcp(ACK | FIN)) + step(WAIT, 60),
    "tcp-lost": OPEN + step(TAKES, 16) + step(HOST_SENDS, 124) + step(WAIT, 3) + step(TAKES, 15) + step(WAIT, 30)
    + ip4(6, SERVER, tcp(ACK)) * 4 + step(HOST_CLOSES, 64),
    "tcp-gap": OPEN + ip4(6, SERVER, tcp(ACK, bytes(200)), FIX_TCP | FIX_GAP) + ip4(6, SERVER, tcp(ACK, bytes(100)))
    + step(HOST_SENDS, 124) + ip4(6, SERVER, tcp(ACK), FIX_TCP | FIX_OLD) * 5 + ip4(6, SERVER, tcp(ACK)),
    "tcp-holes": OPEN + ip4(6, SERVER, tcp(ACK, bytes(100)), FIX_TCP | FIX_FAR)
    + ip4(6, SERVER, tcp(ACK | FIN, bytes(100)), FIX_TCP | FIX_FAR | FIX_GAP)
    + ip4(6, SERVER, tcp(ACK, bytes(100)), FIX_TCP | FIX_GAP) + ip4(6, SERVER, tcp(ACK, bytes(400))) * 2,
    "tcp-sack": OPEN + step(HOST_SENDS, 124) + sack(-20000, (-9000, -6000), (-3000, -1500)) + step(HOST_SENDS, 124)
    + sack(-20000, (-1460, 0), (-9000, -8000)) + step(WAIT, 3) + sack(-9000, (9, 4), (1, 2)) + ip4(6, SERVER, tcp(ACK)),
    "tcp-full": OPEN + step(TAKES, 16) + step(HOST_SENDS, 124) * 9 + step(TAKES) + ip4(6, SERVER, tcp(ACK)) * 3,
    "tcp-refused": first4(6, SERVER, struct.pack(">HH", 3000, 81) + tcp(SYN, options=OPTIONS)[4:]),
    "udp-refused": first4(17, bytes([10, 0, 2, 2]), datagram(9, 7001, b"x")) * 2,
    "udp-forward": ARP + step(HOST_CONNECTS, 128, b"hello") + first4(17, bytes([10, 0, 2, 2]), datagram(80, 9, b"x")),
    "tcp-reset": OPEN + ip4(6, SERVER, tcp(RST | ACK)),
    "forward": ARP + step(HOST_CONNECTS) + ip4(6, bytes([10, 0, 2, 2]), tcp(SYN | ACK, options=OPTIONS))
    + ip4(6, bytes([10, 0, 2, 2]), tcp(ACK | FIN)),
    "ip6": ip6(58, GROUP + b"\2", struct.pack(">BBHI", 133, 0, 0, 0))
    + ip6(58, GROUP + b"\2", struct.pack(">BBHI", 135, 0, 0, 0) + SIX + b"\2" + b"\1\1" + GUEST)
    + ip6(58, SIX + b"\2", struct.pack(">BBHHH", 128, 0, 0, 1, 1))
    + ip6(17, SIX + b"\2", datagram(9, 7000, b"hello"), SIX + b"\x0f") + step(HOST_ANSWERS, 0, b"yes")
    + ip6(17, SIX + b"\3", datagram(1024, 53, GOOD), SIX + b"\x0f") + step(HOST_ANSWERS, 0, REPLY)
    + ip6(6, SIX + b"\x64", tcp(SYN, options=OPTIONS), SIX + b"\x0f") + step(HOST_SENDS),
    "switch": step(SWITCH, 0, PLAIN + BROADCAST) + step(SWITCH, 1, BROADCAST)
    + step(SWITCH, 2, struct.pack(">I", len(BROADCAST)) + BROADCAST)
    + step(SWITCH, 0, LONG + ether(0x800, struct.pack(
        ">BBHHHBBH4s4s", 0x45, 0, 3040, 7, 0, 64, 6, 0, ME, SERVER) + tcp(ACK, bytes(3000)))[12:]),
}  # fmt: skip


def main(folder):
    for name, data in INPUTS.items():
        (folder / name).write_bytes(data)


if __name__ == "__main__":
    main(Path(sys.argv[2]))  # the first word is the target: this is for one only
