# SPDX-License-Identifier: Apache-2.0
"""`kvmpy image`, beside qemu-img doing the same."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
from block_judges import Driver, Qemu

from kvmpy.block import Qcow2Disk, create_disk, open_disk
from kvmpy.cli.image import main
from kvmpy.cli.image_actions import parse_options, parse_size
from kvmpy.errors import ImageError

SIZE = 4 << 20


@pytest.fixture
def image(tmp_path: Path, driver: type[Driver], monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    create_disk("base.raw", "raw", SIZE)
    create_disk("disk.qcow2", "qcow2", SIZE, backing_file="base.raw", backing_fmt="raw")
    with open_disk("base.raw", "raw") as disk:
        driver(1, SIZE).run(disk, 30)
    with open_disk("disk.qcow2", "qcow2", backing=False) as disk:
        assert isinstance(disk, Qcow2Disk)
        disk.pwrite(100_000, b"x" * 300_000)
        disk.write_zeroes(1 << 20, 1 << 20)
        disk.write_compressed(3 << 20, b"c" * 65536)
        disk.snapshots.create("one", when_ns=1_700_000_000_000_000_000)
    return tmp_path / "disk.qcow2"


def command(*words: str | Path, status: int = 0) -> None:
    assert main([str(one) for one in words]) == status


def answer(capsys: pytest.CaptureFixture[str], *words: str | Path, status: int = 0) -> str:
    capsys.readouterr()
    command(*words, status=status)
    return capsys.readouterr().out


def test_info_says_what_qemu_img_says(qemu: Qemu, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    theirs = json.loads(qemu.img("info", "--output=json", image))
    ours = json.loads(answer(capsys, "info", "--output=json", image))
    for key in (
        "virtual-size",
        "format",
        "cluster-size",
        "actual-size",
        "backing-filename",
        "backing-filename-format",
        "full-backing-filename",
        "format-specific",
        "dirty-flag",
    ):
        assert ours[key] == theirs[key], key
    for key in ("id", "name", "date-sec", "date-nsec", "vm-state-size"):
        assert ours["snapshots"][0][key] == theirs["snapshots"][0][key]
    text = answer(capsys, "info", image)
    assert "file format: qcow2" in text and "virtual size: 4 MiB (4194304 bytes)" in text
    chain = json.loads(answer(capsys, "info", "--output=json", "--backing-chain", "--follow", ".", image))
    assert [one["format"] for one in chain] == ["qcow2", "raw"]


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("raw", ""),
        ("vdi", ""),
        ("vdi", "static=on"),
        ("vmdk", ""),
        ("vmdk", "subformat=streamOptimized"),
        ("vmdk", "subformat=monolithicFlat"),
        ("vmdk", "subformat=twoGbMaxExtentFlat"),
        ("vmdk", "subformat=twoGbMaxExtentSparse"),
        ("qcow2", "compat=0.10"),
        ("qcow2", "data_file=ext.data"),
    ],
)
def test_info_of_every_format(
    qemu: Qemu, image: Path, capsys: pytest.CaptureFixture[str], format: str, options: str
) -> None:
    qemu.img("convert", "-f", "qcow2", "-O", format, *(["-o", options] if options else []), image, "one.image")
    theirs = json.loads(qemu.img("info", "--output=json", "-f", format, "one.image"))
    ours = json.loads(answer(capsys, "info", "--output=json", "-f", format, "--follow", ".", "one.image"))
    assert ours == theirs
    theirs_text = qemu.img("info", "-f", format, "one.image").splitlines()
    ours_text = answer(capsys, "info", "-f", format, "--follow", ".", "one.image").splitlines()
    assert {one.strip() for one in ours_text if "disk size" not in one} == {
        one.strip() for one in theirs_text if "disk size" not in one
    }


@pytest.mark.parametrize("options", ["", "-c", "extended_l2=on"])
def test_map_says_what_qemu_img_says(qemu: Qemu, image: Path, capsys: pytest.CaptureFixture[str], options: str) -> None:
    if options:
        words = ["-c"] if options == "-c" else ["-o", options]
        qemu.img("convert", "-f", "qcow2", "-O", "qcow2", *words, image, "other.qcow2")
        image = image.parent / "other.qcow2"
    theirs = json.loads(qemu.img("map", "--output=json", "-f", "qcow2", image))
    ours = json.loads(answer(capsys, "map", "--output=json", "-f", "qcow2", "--follow", ".", image))

    def points(entries: list[dict[str, object]]) -> list[tuple[object, ...]]:
        """By the block, as the two may cut runs differently; qemu-img also looks for holes in the file
        itself.
        """
        found: list[tuple[object, ...]] = []
        for one in entries:
            for at in range(0, int(str(one["length"])), 512):
                offset = one.get("offset")
                place = int(str(offset)) + at if offset is not None and one["data"] else None
                found.append((one["data"], place, one["depth"] if one["data"] else None))
        return found

    assert points(ours) == points(theirs)
    assert "Mapped to" in answer(capsys, "map", "--follow", ".", image)


def test_create_convert_check_resize(qemu: Qemu, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(
        "create",
        "-q",
        "-f",
        "qcow2",
        "-o",
        "cluster_size=4k,lazy_refcounts=on,refcount_bits=8",
        "new.qcow2",
        "1.5G",
    )
    about = json.loads(qemu.img("info", "--output=json", "new.qcow2"))
    assert (about["virtual-size"], about["cluster-size"]) == (1_610_612_736, 4096)
    assert about["format-specific"]["data"]["lazy-refcounts"] and about["format-specific"]["data"]["refcount-bits"] == 8
    command("create", "-q", "-f", "raw", "-o", "size=3M", "sized.raw")
    command("create", "-q", "-f", "raw", "-o", "size=3M", "both.raw", "5M")
    assert (Path("sized.raw").stat().st_size, Path("both.raw").stat().st_size) == (3 << 20, 5 << 20)
    command("create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "over.qcow2")
    assert json.loads(qemu.img("info", "--output=json", "over.qcow2"))["virtual-size"] == SIZE
    for format in ("raw", "qcow2", "vdi", "vmdk"):
        command("convert", "-q", "-f", "qcow2", "-O", format, "--follow", ".", image, f"copy.{format}")
        qemu.img("compare", "-f", "qcow2", "-F", format, image, f"copy.{format}")
    command(
        "convert",
        "-q",
        "-c",
        "-f",
        "qcow2",
        "-O",
        "qcow2",
        "-o",
        "compat=0.10",
        "--follow",
        ".",
        image,
        "small.qcow2",
    )
    qemu.img("compare", image, "small.qcow2")
    qemu.check("small.qcow2")
    qemu.io(image, "write -P 9 0 1M")
    command("convert", "-q", "-l", "one", "-f", "qcow2", "-O", "raw", "--follow", ".", image, "then.raw")
    qemu.img("convert", "-l", "one", "-O", "raw", image, "theirs.raw")
    assert Path("then.raw").read_bytes() == Path("theirs.raw").read_bytes()
    assert "(100.00/100%)" in answer(capsys, "convert", "-p", "-O", "raw", "--follow", ".", image, "p.raw")
    command("resize", "-q", "-f", "qcow2", "small.qcow2", "+1M")
    assert json.loads(qemu.img("info", "--output=json", "small.qcow2"))["virtual-size"] == SIZE + (1 << 20)
    command("resize", "-f", "qcow2", "small.qcow2", "1M", status=2)
    command("resize", "-q", "--shrink", "-f", "qcow2", "small.qcow2", "1M")
    qemu.check("small.qcow2")
    assert "No errors" in answer(capsys, "check", image)


def test_convert_into_an_existing_target(qemu: Qemu, image: Path) -> None:
    Path("t.raw").write_bytes(b"old" * (SIZE // 3 + 1))
    command("convert", "-q", "-n", "-O", "raw", "--follow", ".", image, "t.raw")
    qemu.img("convert", "-O", "raw", image, "theirs.raw")
    assert Path("t.raw").read_bytes()[:SIZE] == Path("theirs.raw").read_bytes()


def test_source_is_not_overwritten_by_itself(image: Path) -> None:
    before = image.read_bytes()
    with pytest.raises(BlockingIOError):
        main(["convert", "-f", "qcow2", "-O", "qcow2", "--follow", ".", str(image), str(image)])
    assert image.read_bytes() == before


def test_snapshot_words(qemu: Qemu, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("snapshot", "-f", "qcow2", "-c", "two", image)
    assert "two" in qemu.img("snapshot", "-l", image)
    text = answer(capsys, "snapshot", image)
    assert "one" in text and "two" in text
    command("snapshot", "-f", "qcow2", "-a", "one", image)
    command("snapshot", "-f", "qcow2", "-d", "two", image)
    assert [one["name"] for one in json.loads(answer(capsys, "snapshot", "-l", "--output=json", image))] == ["one"]
    command("snapshot", "-f", "qcow2", "-a", "none", image, status=2)
    command("snapshot", "-c", "unnamed format", image, status=2)
    qemu.check(image)


def test_check_statuses_are_qemu_imgs(qemu: Qemu, image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("check", "-q", image)
    command("check", "-q", "base.raw", status=63)
    with image.open("r+b") as file:
        file.seek(48)
        (table,) = struct.unpack(">Q", file.read(8))
        file.seek(table)
        (block,) = struct.unpack(">Q", file.read(8))
        file.seek(block + 2 * 40)
        file.write(struct.pack(">H", 1))  # a cluster nobody uses
    command("check", "-q", image, status=3)
    assert json.loads(answer(capsys, "check", "--output=json", image, status=3))["leaks"] == 1
    command("check", "-q", "-r", "leaks", image, status=2)  # the format must be named
    command("check", "-q", "-r", "leaks", "-f", "qcow2", image)
    qemu.check(image)
    with image.open("r+b") as file:
        file.seek(block)
        file.write(bytes(8))
    command("check", "-q", image, status=2)
    command("check", "-q", "-r", "all", "-f", "qcow2", image)
    qemu.check(image)


def test_wrong_words(image: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command("create", "-f", "qcow2", "-o", "colour=red", "x.qcow2", "1G", status=2)
    assert "no option 'colour'" in capsys.readouterr().err
    command("create", "-f", "qcow2", "-b", "base.raw", "x.qcow2", status=2)
    command("create", "-f", "vhdx", "x", "1G", status=2)
    command("create", "-f", "qcow2", "x.qcow2", status=2)
    command("create", "-f", "qcow2", "-o", "cluster_size=3000", "x.qcow2", "1G", status=2)
    command("resize", "-f", "qcow2", "--follow", ".", image, "many", status=2)
    with pytest.raises(ImageError, match="not allowed"):
        main(["convert", "-f", "qcow2", "-O", "raw", str(image), "y.raw"])
    with pytest.raises(SystemExit):
        main(["explode"])
    assert "cluster_size" in answer(capsys, "create", "-f", "qcow2", "-o", "help", "x")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("1k", 1024),
        ("10M", 10 << 20),
        ("1.5G", 3 << 29),
        ("2T", 2 << 40),
        ("0x100", 256),
        ("7b", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "x", "-1", "1kk", "1 G", "nan", "G"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_options() -> None:
    known = {"size": 1, "flag": False, "name": None}
    assert parse_options(["size=4k,flag=on", "name=x"], known) == {"size": 4096, "flag": True, "name": "x"}
    for bad in ("other=1", "flag=maybe", "size=x"):
        with pytest.raises(ValueError):
            parse_options([bad], known)
