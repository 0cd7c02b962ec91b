# SPDX-License-Identifier: Apache-2.0
"""Images made to hurt: impossible headers, loops, bombs, names of files that are none of theirs; and seeded
fuzzing.
"""

from __future__ import annotations

import os
import random
import resource
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

import fuzzing
import pytest

from kvmpy.block import Follow, Qcow2Disk, create_disk, open_disk
from kvmpy.block.hostfile import HostFile
from kvmpy.block.qcow2 import check
from kvmpy.errors import ImageError

SIZE = 1 << 20


def patched(path: Path, *patches: tuple[int, bytes]) -> Path:
    with path.open("r+b") as file:
        for offset, data in patches:
            file.seek(offset)
            file.write(data)
    return path


def u16(value: int) -> bytes:
    return struct.pack(">H", value)


def u32(value: int) -> bytes:
    return struct.pack(">I", value)


def u64(value: int) -> bytes:
    return struct.pack(">Q", value)


QCOW2 = {
    "magic": [(0, b"QFI\xfa")],
    "version 1": [(4, u32(1))],
    "version 4": [(4, u32(4))],
    "cluster_bits 8": [(20, u32(8))],
    "cluster_bits 22": [(20, u32(22))],
    "cluster_bits huge": [(20, u32(0xFFFFFFFF))],
    "size huge": [(24, u64(1 << 63))],
    "size beyond L1": [(24, u64(1 << 40))],
    "size needs too large L1": [(24, u64(1 << 62))],
    "AES": [(32, u32(1))],
    "LUKS": [(32, u32(2))],
    "L1 too long": [(36, u32(0xFFFFFFFF))],
    "L1 beyond the end": [(40, u64(1 << 50))],
    "L1 unaligned": [(40, u64(0x30001))],
    "L1 over the header": [(40, u64(0))],
    "no refcount table": [(56, u32(0))],
    "refcount table too long": [(56, u32(0xFFFFFFFF))],
    "refcount table unaligned": [(48, u64(0x10200))],
    "refcount table beyond the end": [(48, u64(1 << 55))],
    "too many snapshots": [(60, u32(65537))],
    "snapshots unaligned": [(60, u32(1)), (64, u64(0x1001))],
    "snapshots beyond the end": [(60, u32(1)), (64, u64(1 << 40))],
    "snapshot table is the refcount table": [(60, u32(1000)), (64, u64(0x10000))],
    "unknown incompatible bit": [(72, u64(1 << 40))],
    "data file without a name": [(72, u64(4))],
    "compression bit without type": [(72, u64(8))],
    "compression type without bit": [(104, b"\1")],
    "unknown compression type": [(72, u64(8)), (104, b"\7")],
    "extended L2 with small L1": [(72, u64(16)), (20, u32(13))],
    "refcount_order 7": [(96, u32(7))],
    "header_length 103": [(100, u32(103))],
    "header_length 105": [(100, u32(105))],
    "header_length huge": [(100, u32(0xFFFFFFF8))],
    "extension too long": [(112, u32(0x12345678) + u32(0xFFFFFFFF))],
    "extension out of the cluster": [(112, u32(0x12345678) + u32(65536 - 112))],
    "backing name too long": [(8, u64(0x1000)), (16, u32(1024))],
    "backing name out of the cluster": [(8, u64(65535)), (16, u32(2))],
    "backing name in the fields": [(8, u64(8)), (16, u32(8))],
    "backing name beyond the end": [(8, u64(1 << 60)), (16, u32(8))],
}


@pytest.mark.parametrize("patches", QCOW2.values(), ids=QCOW2)
@pytest.mark.parametrize("readonly", [True, False])
def test_impossible_qcow2_header_is_refused(tmp_path: Path, patches: list[tuple[int, bytes]], readonly: bool) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    before = patched(path, *patches).read_bytes()
    with pytest.raises(ImageError):
        open_disk(path, "qcow2", readonly=readonly, follow=Follow(tmp_path))
    assert path.read_bytes() == before


def test_unknown_feature_is_named_from_the_images_own_table(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    data = path.read_bytes()
    at = data.index(b"dirty bit") - 2
    patched(path, (at, b"\0\x28time travel\0"), (72, u64(1 << 40)))
    with pytest.raises(ImageError, match="time travel"):
        open_disk(path, "qcow2", readonly=True)


def test_unknown_extension_is_ignored_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE, cluster_size=4096)
    patched(path, (112, u32(0x12345678) + u32(3) + b"abc\0\0\0\0\0" + u64(0)))
    with open_disk(path, "qcow2") as disk:
        assert isinstance(disk, Qcow2Disk)
        disk.set_backing("x", "raw")
        assert disk.header.extension(0x12345678) == b"abc"


def l2_entries(path: Path) -> int:
    """File offset of the first L2 table, after the first cluster was written."""
    with open_disk(path, "qcow2") as disk:
        disk.pwrite(0, b"data")
    with HostFile.open(path, readonly=True) as file:
        (table,) = struct.unpack(">Q", file.pread(40, 8))
        (l2,) = struct.unpack(">Q", file.pread(table, 8))
    return int(l2) & ~(1 << 63)


ENTRIES = {
    "unaligned": 0x50200 | 1 << 63,
    "beyond the end": 1 << 50 | 1 << 63,
    "compressed beyond the end": 1 << 62 | (1 << 50),
    "compressed junk": 1 << 62 | 5 << 54 | 0x10000,
    "compressed and as long as can be": 1 << 62 | 0xFF << 54 | 0x10000,
}


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_impossible_l2_entry_is_an_image_error(tmp_path: Path, entry: int) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    patched(path, (l2_entries(path), u64(entry)))
    with open_disk(path, "qcow2", readonly=True) as disk, pytest.raises(ImageError) as caught:
        disk.pread(0, 4096)
    assert caught.value.offset is not None


def test_both_bits_of_a_subcluster_are_an_image_error(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE, extended_l2=True)
    patched(path, (l2_entries(path) + 8, u64(1 << 32 | 1)))
    with open_disk(path, "qcow2", readonly=True) as disk, pytest.raises(ImageError, match="contradicts"):
        disk.pread(0, 4096)


def test_l2_table_that_is_its_own_l1_table_ends(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    l2_entries(path)
    with HostFile.open(path, readonly=True) as file:
        (table,) = struct.unpack(">Q", file.pread(40, 8))
    patched(path, (table, u64(table)))
    for readonly in (True, False):
        with (
            open_disk(path, "qcow2", readonly=readonly) as disk,
            pytest.raises(ImageError, match="another table"),
        ):
            disk.pread(0, 1)
    with HostFile.open(path, readonly=True) as file:
        assert not check(file).clean


@pytest.mark.parametrize("compression", ["zlib", "zstd"])
def test_decompression_bomb_gives_one_cluster_and_no_more(tmp_path: Path, compression: str) -> None:
    if compression == "zstd":
        pytest.importorskip("zstandard")
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE, compression_type=compression, cluster_size=2 << 20)
    if compression == "zlib":
        packer = zlib.compressobj(9, zlib.DEFLATED, -12)
        bomb = packer.compress(bytes(1 << 28)) + packer.flush()
    else:
        import zstandard

        bomb = zstandard.ZstdCompressor().compress(bytes(1 << 30))
    with open_disk(path, "qcow2") as disk:
        assert isinstance(disk, Qcow2Disk)
        disk._write_compressed(0, bomb[: (2 << 20) - 1])
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        assert disk.pread(0, SIZE) == bytes(SIZE)
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 64 << 10  # KiB


def test_compressed_half_cluster_is_an_image_error(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create_disk(path, "qcow2", SIZE)
    packer = zlib.compressobj(9, zlib.DEFLATED, -12)
    packed = packer.compress(b"half" * 8192) + packer.flush()
    with open_disk(path, "qcow2") as disk:
        assert isinstance(disk, Qcow2Disk)
        disk._write_compressed(0, packed)
        with pytest.raises(ImageError, match="decompress"):
            disk.pread(0, 1)


# --- fuzzing, with fixed seeds


def walk(path: Path, format: str, folder: Path) -> None:
    """Use all of an image; anything may be refused, nothing may crash, hang or run away."""
    try:
        with open_disk(path, format, readonly=True, follow=Follow(folder)) as disk:
            at, steps = 0, 0
            while at < min(disk.size, 8 << 20) and steps < 200:
                at += disk.block_status(at, disk.size - at).length
                steps += 1
            for at in range(0, min(disk.size, 4 << 20), 150_000):
                disk.pread(at, min(200_000, disk.size - at))
    except (ImageError, OSError):
        pass
    if format == "qcow2":
        try:
            with HostFile.open(path) as file:
                check(file, repair="all")
        except (ImageError, OSError):
            pass
    try:
        with open_disk(path, format, follow=Follow(folder)) as disk:
            size = min(disk.size, 4 << 20)
            for at in range(0, size, 100_000):
                disk.pwrite(at, b"w" * min(150_000, size - at))
            if size:
                disk.write_zeroes(0, size // 2)
                disk.discard(size // 2, size - size // 2)
            if isinstance(disk, Qcow2Disk):
                disk.snapshots.create("fuzz")
                for one in list(disk.snapshots):
                    disk.snapshots.delete(one.id)
    except (ImageError, OSError, ValueError):
        pass


def qcow2_sample(path: Path) -> None:
    create_disk(path, "qcow2", 2 << 20, cluster_size=4096)
    with open_disk(path, "qcow2") as disk:
        assert isinstance(disk, Qcow2Disk)
        disk.pwrite(0, os.urandom(1000) * 200)
        disk.write_compressed(1 << 20, b"c" * 4096)
        disk.snapshots.create("one")
        disk.pwrite(50_000, b"x" * 100_000)
        disk.write_zeroes(300_000, 100_000)


def extended_sample(path: Path) -> None:
    create_disk(path, "qcow2", 2 << 20, cluster_size=16384, extended_l2=True)
    with open_disk(path, "qcow2") as disk:
        for at in range(0, 2 << 20, 70_000):
            disk.pwrite(at, b"x" * 3000)


def vdi_sample(path: Path) -> None:
    create_disk(path, "vdi", 4 << 20)
    with open_disk(path, "vdi") as disk:
        disk.pwrite(1 << 20, b"x" * 100_000)


def vmdk_sample(path: Path) -> None:
    create_disk(path, "vmdk", 4 << 20)
    with open_disk(path, "vmdk") as disk:
        disk.pwrite(1 << 20, b"x" * 100_000)


def vmdk_descriptor_sample(path: Path) -> None:
    """Text that names its parts."""
    vmdk_sample(path.parent / "part")
    (path.parent / "flat").write_bytes(b"f" * (1 << 20))
    path.write_text(
        '# Disk DescriptorFile\nversion=1\nCID=fffffffe\nparentCID=ffffffff\ncreateType="twoGbMaxExtentSparse"\n\n'
        '# Extent description\nRW 8192 SPARSE "part"\nRW 2000 FLAT "flat" 16\nRW 128 ZERO\n\n'
        '# The Disk Data Base\n#DDB\nddb.adapterType = "ide"\n'
    )


def vmdk_stream_sample(path: Path) -> None:
    """Compressed grains behind markers, as qemu-img writes them."""
    if shutil.which("qemu-img") is None:
        pytest.skip("qemu-img is not installed (Debian package qemu-utils)")
    vmdk_sample(path.parent / "part")
    words = ["qemu-img", "convert", "-f", "vmdk", "-O", "vmdk", "-o", "subformat=streamOptimized"]
    subprocess.run([*words, path.parent / "part", path], check=True)


SAMPLES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "qcow2": ("qcow2", qcow2_sample),
    "extended L2": ("qcow2", extended_sample),
    "vdi": ("vdi", vdi_sample),
    "vmdk": ("vmdk", vmdk_sample),
    "vmdk descriptor": ("vmdk", vmdk_descriptor_sample),
    "vmdk stream": ("vmdk", vmdk_stream_sample),
}
@pytest.mark.parametrize("sample", SAMPLES.values(), ids=SAMPLES)
def test_fuzzed_image_never_crashes(tmp_path: Path, sample: tuple[str, Callable[[Path], None]]) -> None:
    format, make = sample
    make(tmp_path / "sample")
    good = (tmp_path / "sample").read_bytes()
    path = tmp_path / "fuzzed"
    interesting = [0, 1, 0x7F, 0x80, 0xFF]
    for seed in fuzzing.seeds(60):
        rnd = random.Random(seed)
        data = bytearray(good)
        for _ in range(rnd.choice([1, 2, 8, 64])):
            # Metadata is in the first clusters; most of the rest is the guest's own.
            at = rnd.randrange(rnd.choice([128, 512, 65536, len(data)])) % len(data)
            width = rnd.choice([1, 2, 4, 8])
            value = rnd.choice([rnd.randbytes(width), bytes([rnd.choice(interesting)]) * width])
            data[at : at + width] = value[: len(data) - at]
        if rnd.random() < 0.2:
            del data[rnd.randrange(len(data)) :]
        path.write_bytes(data)
        try:
            walk(path, format, tmp_path)
        except BaseException as e:
            e.add_note(f"seed {seed}")
            raise
        assert path.stat().st_blocks * 512 < 64 << 20, f"seed {seed}: the image ran away"
