# SPDX-License-Identifier: Apache-2.0
"""Programs in a stock Debian guest and on the host talk over the socket device, more than its buffers hold."""

import hashlib
import random
import socket
import subprocess
import threading
from pathlib import Path

import pytest

from kvmpy import Machine, guests
from kvmpy.chardev import Console
from kvmpy.guests import initramfs
from kvmpy.guests.init import parameters

pytestmark = pytest.mark.guest
ENGINES = pytest.mark.parametrize("backend", ["tcg", pytest.param("kvm", marks=pytest.mark.slow)], indirect=True)

COMMANDS = """dd if=/dev/urandom of=/tmp/data bs=4096 count=300 2> /dev/null
vsock connect 1024 < /tmp/data > /tmp/back; md5sum < /tmp/data; md5sum < /tmp/back
vsock connect 1025 < /dev/null || echo "nobody there: $?"
vsock listen 99; echo listened"""


@pytest.fixture
def program(tmp_path):
    """The guest's end, static."""
    source = Path(__file__).with_name("vsock_peer.c")
    command = ["cc", "-O1", "-static", "-o", tmp_path / "vsock", source]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("vsock_peer.c does not compile: it needs cc and a static libc (Debian: gcc libc6-dev)")
    return (tmp_path / "vsock").read_bytes()


def mirror(server):
    """Give the guest back what it sends, when all of it is there."""
    client, _ = server.accept()
    with client:
        data = b""
        while part := client.recv(65536):
            data += part
        client.sendall(data)


@ENGINES
@pytest.mark.parametrize("transport", ["mmio", pytest.param("pci", marks=pytest.mark.slow)])
def test_both_ways(program, transport, backend, tmp_path):
    guest = guests.find("debian-6.1")
    if guest is None:
        pytest.skip("debian-6.1 is not in the cache: kvmpy guest get debian-6.1")
    more = initramfs.build({"usr/bin/vsock": initramfs.File(program, 0o755)})
    (tmp_path / "initrd").write_bytes(guest.initrd_modules.read_bytes() + more)
    console = Console()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "v_1024"))
        server.listen(1)
        host = threading.Thread(target=mirror, args=(server,), daemon=True)
        host.start()
        with Machine(
            kernel=guest.kernel,
            initrd=tmp_path / "initrd",
            memory="256M",
            backend=backend,
            decompress=True,
            console=console,
            cmdline="console=ttyS0 nokaslr quiet "
            + parameters(COMMANDS, modules=("virtio_mmio", "virtio_pci", "vmw_vsock_virtio_transport")),
            transport=transport,
            vsock=(5, tmp_path / "v"),
        ) as machine:
            console.expect("guest listens", timeout=200)
            data = random.Random(4).randbytes(1_000_000)
            with socket.socket(socket.AF_UNIX) as client:
                client.settimeout(60)
                client.connect(str(tmp_path / "v"))
                client.sendall(b"CONNECT 99\n")
                reply = client.makefile("rb")
                assert reply.readline().startswith(b"OK ")
                sender = threading.Thread(target=client.sendall, args=(data,))
                sender.start()
                back = reply.read(len(data))
                sender.join()
                reply.close()
            outcome = machine.wait(timeout=100)
            stats = machine.stats()["virtio"]["vsock"]
        host.join(60)
    text = console.transcript.replace("\r", "")
    assert outcome.reason == "poweroff" and "listened" in text, text[-2000:]
    assert hashlib.md5(back).digest() == hashlib.md5(data).digest()
    digests = [line[:32] for line in text.splitlines() if line.endswith("  -")]
    assert len(digests) == 2 and digests[0] == digests[1] and "nobody there: 4" in text
    assert stats["to_guest"] == 300 * 4096 + 1_000_000 and stats["from_guest"] >= 300 * 4096 + 1_000_000
