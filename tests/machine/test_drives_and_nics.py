# SPDX-License-Identifier: Apache-2.0
"""Disks, networks and folders of a configuration: words of the command line, what is refused and why."""

import pytest

from kvmpy import Config, Drive, Nic, Share
from kvmpy.block import create_disk, open_disk
from kvmpy.machine import words
from kvmpy.net import PacketSocket


def test_a_word_is_split_at_single_commas():
    assert words.split("a,,b.qcow2,format=qcow2,readonly") == ("a,b.qcow2", {"format": "qcow2", "readonly": "on"})
    assert words.split("plain") == ("plain", {})
    assert words.split("x,k=1,,2") == ("x", {"k": "1,2"})
    assert words.split("x,k=a=b") == ("x", {"k": "a=b"})


@pytest.mark.parametrize("text", ["x,=1", "x,a=1,a=2", "x,"])
def test_words_that_make_no_sense(text):
    with pytest.raises(ValueError, match="x,"):
        words.split(text)


def test_a_drive_from_its_word():
    drive = Drive.parse("d.img,format=raw,readonly=on,serial=s1,cache=unsafe,follow=/images,discard=off,queues=4")
    assert drive == Drive("d.img", "raw", True, None, "s1", "unsafe", ("/images",), False, 4)
    assert Drive.parse("d.img,overlay=memory").overlay == "memory"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("d.img", "needs its format named"),
        ("d.img,readonly=off", "needs its format named"),
        ("d.img,format=vhdx", "one of raw, qcow2"),
        ("d.img,format=raw,cache=none", "cache is one of"),
        ("d.img,format=raw,serial=123456789012345678901", "up to 20"),
        ("d.img,format=raw,readonly=yes", "readonly: it is on or off"),
        ("d.img,format=raw,queues=many", "queues: "),
        ("d.img,format=raw,colour=red", "no option colour; there are format,"),
        (",format=raw", "names no image"),
    ],
)
def test_drives_that_are_refused(text, why):
    with pytest.raises(ValueError, match=why):
        Config(kernel="k", disks=[text])


def test_an_open_disk_says_nothing_about_opening(tmp_path):
    create_disk(tmp_path / "d", "raw", 1 << 20)
    with open_disk(tmp_path / "d", "raw") as disk:
        assert Drive(disk).open() is disk and not Drive(disk).owned
        assert Config(kernel="k", disks=[disk]).drives == [Drive(disk)]
        with pytest.raises(ValueError, match="when the disk is opened"):
            Drive(disk, format="raw")


def test_an_overlay_keeps_the_image_as_it_is(tmp_path):
    create_disk(tmp_path / "d", "qcow2", 1 << 20)
    before = (tmp_path / "d").read_bytes()
    for where in ("memory", tmp_path):
        with Drive(tmp_path / "d", overlay=where).open() as disk:
            disk.pwrite(0, b"scratch")
            assert disk.pread(0, 7) == b"scratch"
    assert (tmp_path / "d").read_bytes() == before
    with pytest.raises(FileNotFoundError):
        Drive(tmp_path / "d", overlay=tmp_path / "absent").open()
    open_disk(tmp_path / "d", "qcow2").close()  # nobody holds its lock


def test_a_card_from_its_word():
    assert Nic.parse("tap:tap0,mac=52:54:00:12:34:56,mtu=9000") == Nic("tap:tap0", "52:54:00:12:34:56", 9000)
    assert Nic.parse("user,host=no").options == {"host": "no"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("bridge:br0", "one of user, tap"),
        ("tap:x,mac=01:00:00:00:00:00", "not the MAC address of a card"),
        ("tap:x,mtu=big", "mtu: "),
    ],
)
def test_cards_that_are_refused(text, why):
    with pytest.raises(ValueError, match=why):
        Config(kernel="k", nets=[text])


def test_options_that_a_network_does_not_have():
    with pytest.raises(ValueError, match="no option speed"):
        Nic.parse("tap:tap0,speed=10").open()
    backend, peer = PacketSocket.pair()
    with pytest.raises(ValueError, match="go with a back end that is given by name"):
        Nic(backend, options={"speed": "10"})
    backend.close()
    peer.close()


def test_a_shared_folder(tmp_path):
    share = Share.parse(f"{tmp_path},tag=data,readonly=on")
    assert share == Share(str(tmp_path), "data", readonly=True)
    device = share.device("share0")
    assert (device.name, device.tag, device.folder.readonly) == ("share0", "data", True)
    device.close()
    with pytest.raises(FileNotFoundError):
        Share(tmp_path / "none").device("share0")


def test_one_word_is_no_list():
    with pytest.raises(ValueError, match="disks is a list"):
        Config(kernel="k", disks="d.img,format=raw")
