# SPDX-License-Identifier: Apache-2.0
"""Kernel modules: what they say of themselves, their order, the tables for modprobe."""

import lzma
import struct

import pytest

from kvmpy.guests import PackageError, modules


def elf(info: bytes) -> bytes:
    """A 64-bit relocatable file with nothing but .modinfo and the section names."""
    names = b"\0.shstrtab\0.modinfo\0"
    body = names + info
    table = 64 + len(body)
    header = b"\x7fELF\x02\x01\x01" + bytes(9)
    header += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, table, 0, 64, 0, 0, 64, 3, 1)
    null = bytes(64)
    strings = struct.pack("<IIQQQQIIQQ", 1, 3, 0, 0, 64, len(names), 0, 0, 1, 0)
    section = struct.pack("<IIQQQQIIQQ", 11, 1, 0, 0, 64 + len(names), len(info), 0, 0, 1, 0)
    return header + body + null + strings + section


def module(root, path, depends="", aliases=(), pack=False):
    info = b"\0".join(
        [b"license=GPL", b"depends=" + depends.encode(), *(b"alias=" + a.encode() for a in aliases)]
    )
    data = elf(info + b"\0")
    target = root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(lzma.compress(data, check=lzma.CHECK_CRC32) if pack else data)


def test_load_gives_modules_after_what_they_need(tmp_path):
    module(
        tmp_path,
        "kernel/virtio/virtio_pci.ko",
        "virtio_pci_modern_dev,virtio,virtio_ring",
        ["pci:v00001AF4d*"],
    )
    module(tmp_path, "kernel/virtio/virtio_ring.ko")
    module(tmp_path, "kernel/virtio/virtio.ko", "virtio_ring")
    module(tmp_path, "kernel/virtio/virtio_pci_modern_dev.ko.xz", pack=True)
    module(tmp_path, "kernel/char/virtio-rng.ko.xz", "virtio", ["virtio:d00000004v*"], pack=True)
    module(tmp_path, "kernel/other.ko", "nothing_there")
    found = modules.load(tmp_path, ["virtio_pci", "virtio_rng", "built_in"])
    names = [m.name for m in found]
    assert sorted(names) == ["virtio", "virtio_pci", "virtio_pci_modern_dev", "virtio_ring", "virtio_rng"]
    for needed, by in (("virtio_ring", "virtio"), ("virtio", "virtio_pci"), ("virtio", "virtio_rng")):
        assert names.index(needed) < names.index(by)

    files = modules.files(found)
    assert files["kernel/char/virtio-rng.ko"].startswith(b"\x7fELF")
    dep = dict(line.split(":", 1) for line in files["modules.dep"].decode().splitlines())
    assert dep["kernel/virtio/virtio_ring.ko"] == ""
    # modprobe loads from the right: what is needed by all must be last.
    order = dep["kernel/virtio/virtio_pci.ko"].split()
    assert order.index("kernel/virtio/virtio.ko") < order.index("kernel/virtio/virtio_ring.ko")
    assert len(order) == 3
    alias = files["modules.alias"].decode().splitlines()
    assert alias == ["alias pci:v00001AF4d* virtio_pci", "alias virtio:d00000004v* virtio_rng"]


def test_load_lacking_dependency_is_an_error(tmp_path):
    module(tmp_path, "a.ko", "b")
    with pytest.raises(PackageError, match="a needs b"):
        modules.load(tmp_path, ["a"])


def test_load_circle_is_an_error(tmp_path):
    module(tmp_path, "a.ko", "b")
    module(tmp_path, "b.ko", "a")
    with pytest.raises(PackageError, match="a -> b -> a"):
        modules.load(tmp_path, ["a"])


def test_load_deep_chain_is_bounded(tmp_path):
    for number in range(2000):
        module(tmp_path, f"m{number}.ko", f"m{number + 1}")
    with pytest.raises(PackageError, match="too deeply"):
        modules.load(tmp_path, ["m0"])


GOOD = elf(b"depends=\0")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x7fELF",
        GOOD[:70],
        GOOD[:0x28] + struct.pack("<Q", 1 << 60) + GOOD[0x30:],
        GOOD[:0x3C] + struct.pack("<H", 60000) + GOOD[0x3E:],
        GOOD[:0x3E] + struct.pack("<H", 3) + GOOD[0x40:],
        GOOD[:4] + b"\x01" + GOOD[5:],
        GOOD[:-40] + struct.pack("<Q", 1 << 40) + GOOD[-32:],
        GOOD.replace(b".modinfo", b".nothing"),
    ],
)
def test_load_damaged_module_is_an_error(tmp_path, data):
    (tmp_path / "a.ko").write_bytes(data)
    with pytest.raises(PackageError):
        modules.load(tmp_path, ["a"])


def test_load_damaged_or_huge_packing_is_an_error(tmp_path, monkeypatch):
    packed = lzma.compress(GOOD + bytes(1 << 20), check=lzma.CHECK_CRC32)
    path = tmp_path / "a.ko.xz"
    path.write_bytes(packed[:-20])
    with pytest.raises(PackageError, match="cut short"):
        modules.load(tmp_path, ["a"])
    path.write_bytes(b"not xz")
    with pytest.raises(PackageError):
        modules.load(tmp_path, ["a"])
    path.write_bytes(packed)
    assert modules.load(tmp_path, ["a"])[0].name == "a"
    path.rename(tmp_path / "a.ko.lz4")
    with pytest.raises(PackageError, match=r"\.lz4"):
        modules.load(tmp_path, ["a"])
