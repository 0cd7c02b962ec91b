# SPDX-License-Identifier: Apache-2.0
"""Images that qemu-img makes, with every option we claim, read back identical; and those we do not claim
are refused by name.
"""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from block_judges import Qemu

from kvmpy.block import Follow, open_disk
from kvmpy.errors import ImageError

SIZE = 12 * 1024 * 1024 + 5 * 512

QCOW2 = [
    "compat=1.1",
    "compat=0.10",
    "cluster_size=512",
    "cluster_size=2M",
    *(f"refcount_bits={1 << n}" for n in range(7)),
    "lazy_refcounts=on",
    "extended_l2=on",
    "extended_l2=on,cluster_size=16k",
    "preallocation=metadata",
    "preallocation=falloc",
    "preallocation=full",
    "data_file=external.data",
    "data_file=external.data,data_file_raw=on",
    "-c compat=1.1",
    "-c compat=0.10,cluster_size=4k",
    "-c cluster_size=2M",
    "-c compression_type=zstd",
    "-c compression_type=zstd,extended_l2=on",
]
OTHERS = [
    ("raw", ""),
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=monolithicSparse,zeroed_grain=on"),
    ("vmdk", "subformat=streamOptimized"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=twoGbMaxExtentFlat"),
    ("vmdk", "adapter_type=lsilogic,compat6=on"),
]


@pytest.fixture(scope="module")
def content() -> bytes:
    """Data, patterns and holes."""
    rnd = random.Random(11)
    data = bytearray(SIZE)
    for i in range(40):
        at = rnd.randrange(SIZE)
        n = min(rnd.randrange(1, 150_000), SIZE - at)
        data[at : at + n] = rnd.randbytes(n) if i % 2 else (b"pattern " * (n // 8 + 1))[:n]
    return bytes(data)


def converted(qemu: Qemu, content: bytes, format: str, options: str) -> Path:
    (qemu.folder / "source.raw").write_bytes(content)
    words = ["convert", "-f", "raw", "-O", format]
    if options.startswith("-c "):
        words.append("-c")
        options = options[3:]
    if options:
        words += ["-o", options]
    qemu.img(*words, "source.raw", f"image.{format}")
    return qemu.folder / f"image.{format}"


@pytest.mark.parametrize(("format", "options"), [*(("qcow2", one) for one in QCOW2), *OTHERS], ids=str)
def test_image_reads_back_identical(qemu: Qemu, content: bytes, format: str, options: str) -> None:
    if "zstd" in options:
        pytest.importorskip("zstandard")
    path = converted(qemu, content, format, options)
    with open_disk(path, format, readonly=True, follow=Follow(qemu.folder)) as disk:
        assert disk.size == SIZE
        assert disk.pread(0, SIZE) == content
        rnd = random.Random(3)
        for _ in range(100):
            at = rnd.randrange(SIZE)
            n = min(rnd.randrange(1, 100_000), SIZE - at)
            assert disk.pread(at, n) == content[at : at + n]
        at = 0
        while at < SIZE:
            found = disk.block_status(at, SIZE - at)
            if found.zero:
                assert not any(content[at : at + found.length])
            elif found.host_offset is not None and format in ("qcow2", "vdi", "raw") and "data_file" not in options:
                with path.open("rb") as file:
                    file.seek(found.host_offset)
                    n = min(found.length, 4096)
                    assert file.read(n) == content[at : at + n]
            at += found.length


@pytest.mark.parametrize("format", ["vhdx", "vpc", "qed", "parallels", "qcow"])
def test_other_formats_are_refused_by_name(qemu: Qemu, format: str) -> None:
    qemu.img("create", "-q", "-f", format, f"image.{format}", "16M")
    with pytest.raises(ImageError, match="not supported"):
        open_disk(qemu.folder / f"image.{format}", format, readonly=True)


@pytest.mark.parametrize("format", ["qcow2", "vdi", "vmdk", "vhdx", "vpc", "qed", "parallels", "raw"])
def test_formats_are_recognised(qemu: Qemu, format: str) -> None:
    from kvmpy.block import probe_format

    options = ["-o", "subformat=dynamic"] if format == "vpc" else []
    qemu.img("create", "-q", "-f", format, *options, f"image.{format}", "16M")
    assert probe_format(qemu.folder / f"image.{format}") == format


def test_encrypted_images_are_refused_by_name(qemu: Qemu) -> None:
    secret = "secret,id=s,data=123"
    done = 1
    for _ in range(10):  # qemu-img cannot always measure its key derivation
        try:
            qemu.img(
                "create",
                "-q",
                "--object",
                secret,
                "-f",
                "qcow2",
                "-o",
                "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10",
                "x.qcow2",
                "1M",
            )
            done = 0
            break
        except AssertionError:
            continue
    if done:
        pytest.skip("qemu-img cannot make encrypted images here")
    with pytest.raises(ImageError, match="LUKS"):
        open_disk(qemu.folder / "x.qcow2", "qcow2", readonly=True)


@pytest.mark.parametrize("format", ["vdi", "vmdk"])
def test_our_images_of_other_formats_pass_qemus_check(qemu: Qemu, driver: type, format: str) -> None:
    from kvmpy.block import create_disk

    path = qemu.folder / f"disk.{format}"
    drive = driver(4, SIZE)
    create_disk(path, format, SIZE)
    for _ in range(3):
        with open_disk(path, format) as disk:
            drive.run(disk, 80)
            drive.verify(disk)
        qemu.img("check", "-q", "-f", format, path)
    qemu.same(path, drive.expected, format)


@pytest.mark.parametrize("options", [{}, {"static": True}])
def test_vdi_static_and_dynamic(qemu: Qemu, driver: type, options: dict[str, object]) -> None:
    from kvmpy.block import create_disk

    path = qemu.folder / "disk.vdi"
    create_disk(path, "vdi", SIZE, **options)
    qemu.img("check", "-q", "-f", "vdi", path)
    drive = driver(5, SIZE)
    with open_disk(path, "vdi") as disk:
        drive.run(disk, 50)
        drive.verify(disk)
    qemu.same(path, drive.expected, "vdi")


@pytest.mark.parametrize("subformat", ["streamOptimized", "monolithicFlat", "twoGbMaxExtentSparse"])
def test_vmdk_kinds_that_cannot_be_written_say_so(qemu: Qemu, subformat: str) -> None:
    qemu.img("create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", "x.vmdk", "4M")
    with pytest.raises(ImageError, match="only be read"):
        open_disk(qemu.folder / "x.vmdk", "vmdk", follow=Follow(qemu.folder))


def test_vmdk_footer_and_extents_of_others(qemu: Qemu, content: bytes) -> None:
    """VMware writes gdOffset -1 at the start and the real header near the end."""
    path = converted(qemu, content, "vmdk", "subformat=streamOptimized")
    data = bytearray(path.read_bytes())
    footer = bytes(data[:512])
    data[56:64] = b"\xff" * 8
    marker = bytes(512)
    path.write_bytes(bytes(data) + bytes(-len(data) % 512) + marker + footer + marker)
    with open_disk(path, "vmdk", readonly=True) as disk:
        assert disk.pread(0, SIZE) == content


def test_vmdk_descriptor_cannot_name_files_elsewhere(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"root:x:0:0" * 100)
    (tmp_path / "images").mkdir()
    path = tmp_path / "images" / "x.vmdk"
    for name in ("../secret", str(tmp_path / "secret"), "/etc/passwd"):
        path.write_text(
            f'# Disk DescriptorFile\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 1 FLAT "{name}" 0\n'
        )
        with pytest.raises(ImageError, match=r"not allowed|outside"):
            open_disk(path, "vmdk", readonly=True)
        with pytest.raises(ImageError, match="outside"):
            open_disk(path, "vmdk", readonly=True, follow=Follow(tmp_path / "images"))


def test_vmdk_flat_extent_shorter_than_said_is_refused(tmp_path: Path) -> None:
    (tmp_path / "flat").write_bytes(bytes(1024))
    path = tmp_path / "x.vmdk"
    for line in ('RW 3 FLAT "flat" 0', 'RW 2 FLAT "flat" 1', f'RW {1 << 54} FLAT "flat" 0'):
        path.write_text(f'# Disk DescriptorFile\nparentCID=ffffffff\ncreateType="monolithicFlat"\n{line}\n')
        with pytest.raises(ImageError, match=r"the descriptor says|too large"):
            open_disk(path, "vmdk", readonly=True, follow=Follow(tmp_path))


@pytest.mark.parametrize(("kind", "name"), [("VMFS", "VMFS"), ("SESPARSE", "SESPARSE")])
def test_vmdk_foreign_extents_are_refused_by_name(tmp_path: Path, kind: str, name: str) -> None:
    path = tmp_path / "x.vmdk"
    path.write_text(f'# Disk DescriptorFile\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 1 {kind} "x" 0\n')
    with pytest.raises(ImageError, match=name):
        open_disk(path, "vmdk", readonly=True, follow=Follow(tmp_path))


@pytest.mark.parametrize(
    ("lines", "why"),
    [
        ("", "no extents"),
        ("RW -5 ZERO", "makes no sense"),
        ('RW 1 ZERO\nRW 1 FLAT "flat" -1', "makes no sense"),
        ('RW 1 FLAT "flat" 0x10', "makes no sense"),
        (f"RW {'9' * 30} ZERO", "makes no sense"),
        ("NOACCESS 1 ZERO\nRW 1 ZERO", "makes no sense"),
        ('RW 1 FLAT "flat\0x" 0', "makes no sense"),
        (f"RW {1 << 53} ZERO", "too large"),
        (f"RW {1 << 52} ZERO\n" * 8, "too large"),
        ("RW 1 ZERO\n" * 5000, "5000 extents"),
        ('RW 1 SPARSE "x.vmdk"', "not a sparse"),
    ],
)
def test_vmdk_extents_that_cannot_be(tmp_path: Path, lines: str, why: str) -> None:
    """A line that is left out would make a smaller disk, with its data at the wrong places."""
    (tmp_path / "flat").write_bytes(bytes(1024))
    path = tmp_path / "x.vmdk"
    path.write_text(f'# Disk DescriptorFile\nparentCID=ffffffff\ncreateType="monolithicFlat"\n{lines}\n')
    with pytest.raises(ImageError, match=why):
        open_disk(path, "vmdk", readonly=True, follow=Follow(tmp_path))


def test_vmdk_of_several_extents(qemu: Qemu) -> None:
    """Extents end at 2 GiB: reads cross the border."""
    for subformat in ("twoGbMaxExtentSparse", "twoGbMaxExtentFlat"):
        qemu.img("create", "-q", "-f", "vmdk", "-o", f"subformat={subformat}", "big.vmdk", "5G")
        qemu.io("big.vmdk", "write -P 0x41 2146435072 3M", "write -P 0x42 5368708608 512", format="vmdk")
        with open_disk(qemu.folder / "big.vmdk", "vmdk", readonly=True, follow=Follow(qemu.folder)) as disk:
            assert disk.size == 5 << 30
            assert disk.pread(2146435072 - 10, (3 << 20) + 20) == bytes(10) + b"A" * (3 << 20) + bytes(10)
            assert disk.pread((5 << 30) - 513, 513) == b"\0" + b"B" * 512
