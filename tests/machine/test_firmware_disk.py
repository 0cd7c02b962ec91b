# SPDX-License-Identifier: Apache-2.0
"""SeaBIOS finds a disk on PCI, places its BAR, drives it through virtio-pci, and boots from it.

On the software CPU: where KVM emulates ring 0, firmware that changes processor modes for each sector takes minutes.
"""

import pytest

from kvmpy import Drive, Machine, guests
from kvmpy.chardev import Console

pytestmark = pytest.mark.guest


def test_seabios_boots_grub_from_a_disk():
    bios, grub = guests.find("seabios"), guests.find("grub-floppy")
    if bios is None or grub is None:
        pytest.skip("seabios or grub-floppy is not in the cache: kvmpy guest get seabios; kvmpy guest get grub-floppy")
    log = Console()
    with Machine(
        firmware=bios.bios,
        memory="64M",
        backend="tcg",
        debugcon=log,
        disks=[Drive(grub.floppy, readonly=True)],
    ) as machine:
        machine.console.expect("GNU GRUB", timeout=300)
        stats = machine.stats()["virtio"]["blk0"]
        bar = machine.virtio.slots.transports[0].function.bars[0]
        assert bar.base is not None, "the firmware has placed it"
        assert stats["reads"] > 10 and stats["errors"] == 0
    assert "using modern (1.0) virtio mode" in log.transcript
    assert "Booting from Hard Disk" in log.transcript
