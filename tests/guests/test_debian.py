# SPDX-License-Identifier: Apache-2.0
"""Debian's own kernels, unmodified: to a shell on every engine, by its processor or by a software CPU that leads."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvmpy import EmulationFailure, Machine, guests

ROOT = Path(__file__).resolve().parent.parent.parent
KERNELS = ("debian-6.1", "debian-6.12")
LONG = 240  # seconds; only a failure waits so long

pytestmark = pytest.mark.guest


@pytest.fixture(params=KERNELS)
def linux(request):
    """A stock kernel with its busybox initramfs."""
    guest = guests.find(request.param)
    if guest is None:
        pytest.skip(f"no {request.param} here; `kvmpy guest get {request.param}` fetches it")
    return guest


def boot(linux, backend, *, cpus=1, words="", assist=None):
    return Machine(
        kernel=linux.kernel,
        initrd=linux.initrd,
        cmdline=f"{linux.cmdline} {words}",
        cpus=cpus,
        backend=backend,
        # Ring 0 emulated by KVM alone would take minutes for it; otherwise both ways are tested.
        decompress=True if assist is False else cpus == 1 and None,
        assist=assist,
    )


@pytest.mark.parametrize("cpus", [1, 2])
def test_linux_boots_to_a_shell_and_powers_off(linux, backend, cpus):
    with boot(linux, backend, cpus=cpus) as machine:
        console = machine.console
        software = backend == "tcg" or machine.vm.assist.leads
        if software:
            assert (machine.entry.rip & 0xFFF == 0x200) == (cpus == 2)  # where a bzImage starts
        console.expect(guests.READY, timeout=LONG)
        console.expect("# ", timeout=LONG)
        console.send_line("grep -c ^processor /proc/cpuinfo; echo sum $((6 * 7))")
        assert console.expect("sum 42", timeout=LONG).before.split()[-1] == str(cpus)
        console.send_line("cat /proc/interrupts /proc/self/status > /tmp/x; wc -l < /tmp/x; poweroff -f")
        assert machine.wait(LONG).reason == "poweroff"
        log = console.transcript
    assert "Kernel panic" not in log
    assert "Oops" not in log
    # A processor that does not speculate needs none of these, and they are slow: loops and detours at every call.
    for mitigation in ("Retpoline", "SW BHB clearing", "thunks", "page tables isolation: enabled"):
        assert not software or mitigation not in log


def test_the_kernel_log_appears(linux, backend):
    with boot(linux, backend, words="earlyprintk=ttyS0") as machine:
        machine.console.expect(f"Linux version {linux.version.split('-')[0].rpartition('.')[0]}", timeout=LONG)
        machine.stop()
        assert machine.wait(LONG).reason == "stopped"


@pytest.mark.slow
def test_a_kernel_that_kvm_cannot_emulate_is_explained(linux, backend):
    if backend != "kvm":
        pytest.skip("about KVM's instruction emulator")
    with boot(linux, backend, assist=False) as machine:
        try:
            machine.console.expect(guests.READY, timeout=LONG)
        except TimeoutError:
            pass
        else:
            pytest.skip("this KVM runs Linux")
        with pytest.raises(EmulationFailure) as caught:
            machine.wait(LONG)
    assert "instruction that could not be emulated" in caught.value.report


def test_the_example_boots_linux():
    if guests.find("debian-6.1") is None:
        pytest.skip("no debian-6.1 here; `kvmpy guest get debian-6.1` fetches it")
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "boot_linux.py", "debian-6.1", "echo from the guest: $((40 + 2))"],
        env=os.environ | {"KVMPY_BACKEND": "tcg"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LONG, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "from the guest: 42" in done.stdout
    assert "the run ended: poweroff" in done.stdout
