# SPDX-License-Identifier: Apache-2.0
"""Captures, read by our own eyes and by tcpdump and tshark."""

import os
import select
import shutil
import struct
import subprocess
import sys
import time

import pytest

from kvmpy.errors import NetworkError
from kvmpy.net import PacketSocket, Pcap, Switch

ARP = bytes.fromhex("ffffffffffff 525400000001 0806 0001080006040001 525400000001 0a000002 000000000000 0a000001")


def frames_of(path):
    data = path.read_bytes()
    magic, major, minor, _, _, snaplen, link = struct.unpack_from("<IHHIIII", data)
    assert (magic, major, minor, link) == (0xA1B23C4D, 2, 4, 1)
    at, found = 24, []
    while at < len(data):
        seconds, nano, kept, size = struct.unpack_from("<IIII", data, at)
        assert abs(seconds - time.time()) < 60 and nano < 10**9 and kept == min(size, snaplen)
        found.append((size, data[at + 16 : at + 16 + kept]))
        at += 16 + kept
    return found


def read(fd):
    assert select.select([fd], [], [], 5)[0]
    return os.read(fd, 70000)


def test_both_directions_of_a_plain_back_end(tmp_path):
    backend, peer = PacketSocket.pair()
    with Pcap(backend, tmp_path / "file", snaplen=60) as tap, peer:
        assert not tap.vnet_header and (tmp_path / "file").stat().st_mode & 0o777 == 0o600
        os.write(tap.fd, ARP)
        assert peer.recv(100) == ARP
        peer.send(ARP + bytes(1000))
        assert read(tap.fd) == ARP + bytes(1000)
        assert tap.stats() == {"captured": 2, "lost": 0, "error": 0}
        deadline = time.monotonic() + 60
        while (tmp_path / "file").stat().st_size < 24 + 2 * 16 and time.monotonic() < deadline:
            time.sleep(0.05)  # it is written soon, not only at the end
    assert frames_of(tmp_path / "file") == [(42, ARP), (1042, (ARP + bytes(1000))[:60])]


def test_tcpdump_and_tshark_read_it(tmp_path):
    with Switch() as switch:
        other = switch.port()
        with Pcap(switch.port(), tmp_path / "file") as tap:
            assert tap.vnet_header and tap.offloads
            os.write(tap.fd, bytes(12) + ARP)
            assert read(other.fd)[12:] == ARP
    seen = 0
    for tool, *words in (["tcpdump", "-n", "-r"], ["tshark", "-n", "-r"]):
        if shutil.which(tool) is not None:
            done = subprocess.run([tool, *words, tmp_path / "file"], capture_output=True, text=True, check=True)
            assert "who-has 10.0.0.1 tell 10.0.0.2" in done.stdout.replace("Who", "who").replace(
                " has ", "-has "
            ).replace("Tell", "tell").replace("?", "")
            seen += 1
    if not seen:
        pytest.skip("neither tcpdump nor tshark: install the package tcpdump")


def test_the_other_end_hangs_up(tmp_path):
    backend, peer = PacketSocket.pair()
    with Pcap(backend, tmp_path / "file") as tap:
        peer.close()
        assert read(tap.fd) == b""


def test_a_full_disk_ends_the_capture_and_not_the_network(tmp_path):
    """The size of files is limited in a process of its own; SIGXFSZ is ignored by Python, so write(2) fails."""
    code = """
import os, resource, sys
from kvmpy.net import PacketSocket, Pcap
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
backend, peer = PacketSocket.pair()
with Pcap(backend, sys.argv[1]) as tap:
    for _ in range(500):
        peer.send(bytes(60000))
        while True:
            try: os.read(tap.fd, 70000); break
            except BlockingIOError: pass
    stats = tap.stats()
    assert stats["lost"] > 0 and stats["error"] == 27, stats
peer.close()
"""
    subprocess.run([sys.executable, "-c", code, tmp_path / "file"], check=True, timeout=60)


@pytest.mark.parametrize("place", ["missing/file", ".", "link"])
def test_files_that_cannot_be_made(tmp_path, place):
    (tmp_path / "link").symlink_to("/etc/passwd")
    backend, peer = PacketSocket.pair()
    with peer:
        with pytest.raises(NetworkError, match="no capture"):
            Pcap(backend, tmp_path / place)
        assert peer.recv(1) == b"", "the back end is closed"


def test_wrong_snaplen(tmp_path):
    backend, peer = PacketSocket.pair()
    with peer, pytest.raises(ValueError, match="captured"):
        Pcap(backend, tmp_path / "x", snaplen=5)
