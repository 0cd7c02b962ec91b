# SPDX-License-Identifier: Apache-2.0
"""`kvmpy guest` with a cache of its own and no network."""

import io
import json
import lzma
import os
import tarfile
from pathlib import Path

import pytest
from commands import kvmpy

from kvmpy import guests
from kvmpy.cli import status


@pytest.fixture
def environment(tmp_path):
    """No apt on PATH, an empty cache."""
    empty = tmp_path / "bin"
    empty.mkdir()
    return os.environ | {"KVMPY_CACHE": str(tmp_path / "cache"), "PATH": str(empty)}


@pytest.fixture
def package(tmp_path):
    """busybox-static, made by hand."""

    def tar(name, data):
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        return lzma.compress(out.getvalue())

    control = b"Package: busybox-static\nVersion: 1:9-1\nArchitecture: amd64\n"
    members = {"debian-binary": b"2.0\n", "control.tar.xz": tar("control", control)}
    members["data.tar.xz"] = tar("bin/busybox", b"program")
    content = b"!<arch>\n"
    for name, data in members.items():
        content += f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{len(data):<10}`\n".encode() + data + b"\n" * (len(data) % 2)
    path = tmp_path / "busybox.deb"
    path.write_bytes(content)
    return path


def test_list_of_an_empty_cache(environment):
    done = kvmpy("guest", "list", env=environment)
    assert done.returncode == 0 and done.stderr == ""
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == list(guests.NAMES)
    assert all(" (not here)  " in line for line in lines)
    assert "\x1b" not in done.stdout


def test_get_path_list_remove(environment, package):
    done = kvmpy("guest", "get", "busybox", "--deb", package, env=environment)
    assert done.returncode == 0
    assert "kvmpy: unpacking busybox-static 1:9-1" in done.stderr
    name, version, directory = done.stdout.split()
    assert (name, version) == ("busybox", "1:9-1")
    again = kvmpy("guest", "get", "-q", "busybox", env=environment)
    assert (again.returncode, again.stdout, again.stderr) == (0, done.stdout, "")
    assert kvmpy("guest", "path", "busybox", env=environment).stdout.strip() == directory
    path = kvmpy("guest", "path", "busybox", "program", env=environment).stdout.strip()
    assert Path(path).read_bytes() == b"program"
    wrong = kvmpy("guest", "path", "busybox", "kernel", env=environment)
    assert wrong.returncode == status.USAGE and "it has program" in wrong.stderr
    listed = json.loads(kvmpy("guest", "list", "--json", env=environment).stdout)
    assert listed["busybox"]["files"] == {"program": path}
    assert listed["busybox"]["licences"] == {"busybox-static": "GPL-2.0-only"}
    assert listed["seabios"] == {"summary": guests.RECIPES["seabios"].summary, "cached": False}
    assert kvmpy("guest", "remove", "busybox", "seabios", env=environment).stdout.splitlines() == [
        "busybox removed",
        "seabios was not there",
    ]
    gone = kvmpy("guest", "path", "busybox", env=environment)
    assert gone.returncode == status.UNAVAILABLE and "kvmpy guest get busybox" in gone.stderr


def test_get_without_apt_says_how_to_supply_the_packages(environment):
    done = kvmpy("guest", "get", "debian-6.1", env=environment)
    assert done.returncode == status.UNAVAILABLE and done.stdout == ""
    assert "no apt" in done.stderr and "Traceback" not in done.stderr
    assert "--deb linux-image-cloud-amd64.deb --deb busybox-static.deb" in done.stderr


def test_get_bad_package_is_an_error(environment, tmp_path):
    bad = tmp_path / "bad.deb"
    bad.write_bytes(b"no package")
    done = kvmpy("guest", "get", "busybox", "--deb", bad, env=environment)
    assert done.returncode == status.BAD_IMAGE and "bad.deb" in done.stderr
    done = kvmpy("guest", "get", "busybox", "--deb", tmp_path / "absent.deb", env=environment)
    assert done.returncode == status.USAGE and "absent.deb" in done.stderr
    done = kvmpy("guest", "get", "busybox", "seabios", "--deb", bad, env=environment)
    assert done.returncode == status.USAGE and "one guest" in done.stderr


def test_get_into_a_cache_that_cannot_be_made_is_an_error(environment, tmp_path, package):
    (tmp_path / "cache").write_bytes(b"a file")
    done = kvmpy("guest", "get", "busybox", "--deb", package, env=environment)
    assert done.returncode == status.UNAVAILABLE
    assert "set KVMPY_CACHE" in done.stderr and "Traceback" not in done.stderr
