# SPDX-License-Identifier: Apache-2.0
"""The cache of guests, with a stand-in for apt: what is fetched, checked, kept, and said on a lack."""

import hashlib
import json
import os
import subprocess
import sys
import textwrap
import threading

import pytest
from handmade import file

from kvmpy import guests
from kvmpy.guests import GuestUnavailableError, PackageError, store

BUSYBOX = [
    file("./bin/busybox", b"\x7fELF busybox", 0o755),
    file("./usr/share/doc/busybox-static/copyright", b"GPL"),
]
RELEASE = "6.1.0-9-cloud-amd64"
LINUX = [
    file(f"./boot/vmlinuz-{RELEASE}", b"kernel" * 100),
    file(f"./boot/config-{RELEASE}", b"CONFIG_X=y\n"),
    file(f"./lib/modules/{RELEASE}/modules.builtin", b""),
    file(f"./usr/share/doc/linux-image-{RELEASE}/copyright", b"GPL-2"),
]

APT = """\
#!{python}
import json, pathlib, shutil, sys
home = pathlib.Path({home!r})
state = json.loads((home / "state.json").read_text())
with (home / "log").open("a") as log: log.write(" ".join(sys.argv[3:]) + "\\n")
assert sys.argv[1] == "-c" and pathlib.Path(sys.argv[2]).is_file()
words = [w for w in sys.argv[3:] if not w.startswith("-")]
if words[0] == "update":
    if state["unreachable"]:
        sys.exit("E: Failed to fetch http://mirror.example/InRelease  Could not resolve 'mirror.example'")
elif words[0] == "show":
    if words[1] not in state["packages"]:
        sys.exit("E: No packages found")
    entry = state["packages"][words[1]]
    print("".join(f"{{k}}: {{v}}\\n" for k, v in entry["fields"].items()))
elif words[0] == "download":
    name = words[1].partition("=")[0]
    if state["no_download"]:
        sys.exit("E: 404 Not Found")
    shutil.copy(state["packages"][name]["path"], ".")
"""


class FakeApt:
    """apt-get and apt-cache on PATH that serve package files by hand."""

    def __init__(self, home, monkeypatch):
        self.home = home
        self.state = {"unreachable": False, "no_download": False, "packages": {}}
        programs = home / "bin"
        programs.mkdir()
        for name in ("apt-get", "apt-cache"):
            path = programs / name
            path.write_text(APT.format(python=sys.executable, home=str(home)))
            path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
        self.save()

    def save(self):
        (self.home / "state.json").write_text(json.dumps(self.state))

    def offer(self, path, name, version="1.0-1", depends="", **changed):
        data = path.read_bytes() if path else b""
        fields = {
            "Package": name,
            "Version": version,
            "Architecture": "amd64",
            "Size": len(data),
            "Depends": depends,
        }
        fields["SHA256"] = hashlib.sha256(data).hexdigest()
        self.state["packages"][name] = {"path": str(path), "fields": fields | changed}
        self.save()

    def set(self, **values):
        self.state |= values
        self.save()

    @property
    def log(self):
        path = self.home / "log"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def apt(tmp_path, monkeypatch):
    home = tmp_path / "apt"
    home.mkdir()
    return FakeApt(home, monkeypatch)


@pytest.fixture
def busybox(apt, make_deb):
    path = make_deb(BUSYBOX, name="busybox-static")
    apt.offer(path, "busybox-static")
    return path


def test_get_builds_the_guest_once(apt, busybox, cache):
    lines = []
    assert guests.find("busybox") is None
    guest = guests.get("busybox", progress=lines.append)
    assert guest.file("program").read_bytes() == b"\x7fELF busybox"
    assert guest.file("program").stat().st_mode & 0o111
    assert guest.directory.is_relative_to(cache)
    assert any("downloading busybox-static 1.0-1" in line for line in lines)
    asked = len(apt.log)
    assert guests.get("busybox") == guests.find("busybox") == guest
    assert len(apt.log) == asked  # no second question


def test_get_says_where_it_came_from(apt, busybox, cache):
    guest = guests.get("busybox")
    content = json.loads((guest.directory / "guest.json").read_text())
    (package,) = content["packages"]
    assert package["licence"] == "GPL-2.0-only"
    assert package["verified"] is True
    assert package["sha256"] == hashlib.sha256(busybox.read_bytes()).hexdigest()
    assert (guest.directory / package["copyright"]).read_bytes() == b"GPL"
    assert guests.verify(guest) == []


def test_get_resolves_a_metapackage(apt, busybox, make_deb, cache):
    name = f"linux-image-{RELEASE}"
    apt.offer(make_deb(LINUX, name=name, version="6.1.9-1"), name, "6.1.9-1")
    apt.offer(None, "linux-image-cloud-amd64", "6.1.9-1", depends=f"other (>= 1), {name} (= 6.1.9-1)")
    guest = guests.get("debian-6.1")
    assert guest.version == "6.1.9-1"
    assert guest.kernel.read_bytes() == b"kernel" * 100
    assert guest.initrd.read_bytes()[:2] == guest.initrd_modules.read_bytes()[:2] == b"\x1f\x8b"
    assert "console=ttyS0" in guest.cmdline
    with pytest.raises(LookupError, match="has no bios; it has kernel"):
        _ = guest.bios


def test_get_metapackage_of_another_version_is_an_error(apt, busybox, cache):
    apt.offer(None, "linux-image-cloud-amd64", "7.0-1", depends="linux-image-7.0.0-1-cloud-amd64")
    with pytest.raises(GuestUnavailableError, match="needs linux-image-7"):
        guests.get("debian-6.1")


def test_get_unknown_name_is_a_value_error(cache):
    for function in (guests.get, guests.find, guests.remove):
        with pytest.raises(ValueError, match="seabios"):
            function("debian-99")


def test_get_unreachable_mirror_says_what_to_do(apt, busybox, cache):
    apt.set(unreachable=True)
    with pytest.raises(GuestUnavailableError) as caught:
        guests.get("busybox")
    text = str(caught.value)
    assert "busybox-static" in text and "Could not resolve" in text
    assert "kvmpy guest get busybox --deb" in text and "--mirror" in text
    assert guests.find("busybox") is None


def test_get_without_apt_says_what_to_do(cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(GuestUnavailableError, match="no apt") as caught:
        guests.get("seabios")
    assert "--deb seabios.deb" in str(caught.value)


def test_get_failed_download_says_so(apt, busybox, cache):
    apt.set(no_download=True)
    with pytest.raises(GuestUnavailableError, match="404"):
        guests.get("busybox")


@pytest.mark.parametrize("changed", [{"SHA256": "0" * 64}, {"Size": 7}])
def test_get_package_that_is_not_what_the_index_says_is_refused(apt, busybox, cache, changed):
    apt.offer(busybox, "busybox-static", **changed)
    with pytest.raises(PackageError, match="the index says"):
        guests.get("busybox")
    assert list((cache / "packages").glob("*.deb")) == []
    assert guests.find("busybox") is None


def test_get_package_with_another_name_inside_is_refused(apt, make_deb, cache):
    apt.offer(make_deb(BUSYBOX, name="trojan-horse"), "busybox-static")
    with pytest.raises(PackageError, match="trojan-horse"):
        guests.get("busybox")


def test_get_package_without_the_wanted_file_is_refused(apt, make_deb, cache):
    apt.offer(make_deb([file("./readme", b"")], name="busybox-static"), "busybox-static")
    with pytest.raises(PackageError, match="busybox"):
        guests.get("busybox")
    assert guests.find("busybox") is None
    assert [path.name for path in (cache / "guests/busybox").iterdir()] == []


def test_get_given_packages_need_no_apt(make_deb, cache, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    guest = guests.get("busybox", debs=[make_deb(BUSYBOX, name="busybox-static", version="2")])
    assert guest.version == "2"
    assert guest.packages[0].verified is False
    assert "busybox-static_2_amd64.deb" in guest.packages[0].came_from


def test_get_given_package_that_is_not_part_is_an_error(make_deb, cache):
    with pytest.raises(PackageError, match=r"thing is not part of busybox.*busybox-static"):
        guests.get("busybox", debs=[make_deb(BUSYBOX, name="thing")])


def test_get_update_takes_the_newer_version_and_keeps_the_one_before(apt, busybox, make_deb, cache):
    versions = [guests.get("busybox")]
    for version in ("2.0-1", "3.0-1"):
        apt.offer(make_deb(BUSYBOX, name="busybox-static", version=version), "busybox-static", version)
        assert guests.get("busybox") == versions[-1]
        versions.append(guests.get("busybox", update=True))
    assert [guest.version for guest in versions] == ["1.0-1", "2.0-1", "3.0-1"]
    assert [guest.directory.exists() for guest in versions] == [False, True, True]
    assert guests.find("busybox") == versions[-1]


def test_get_after_a_change_of_kvmpy_builds_anew_without_network(apt, busybox, cache, monkeypatch):
    before = guests.get("busybox")
    from kvmpy.guests import recipes

    monkeypatch.setattr(recipes, "REVISION", recipes.REVISION + 1)
    apt.set(unreachable=True, no_download=True)
    assert guests.find("busybox") is None
    after = guests.get("busybox")
    assert after.version == before.version and after.recipe != before.recipe


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest", "escape", "format", "list"])
def test_find_damaged_guest_is_none_and_get_repairs_it(apt, busybox, cache, damage):
    guest = guests.get("busybox")
    manifest = guest.directory / "guest.json"
    content = json.loads(manifest.read_text())
    match damage:
        case "truncate":
            guest.file("program").write_bytes(b"x")
        case "delete":
            guest.file("program").unlink()
        case "manifest":
            manifest.write_text("{")
        case "escape":
            content["files"]["program"]["path"] = "../../../../etc/passwd"
            manifest.write_text(json.dumps(content))
        case "format":
            content["format"] = 999
            manifest.write_text(json.dumps(content))
        case "list":
            manifest.write_text("[1, 2]")
    assert guests.find("busybox") is None
    assert guests.get("busybox").file("program").read_bytes() == b"\x7fELF busybox"


def test_verify_finds_a_changed_file(apt, busybox, cache):
    guest = guests.get("busybox")
    guest.file("program").write_bytes(b"\x7fELF busyb0x")
    assert guests.verify(guest) == ["program"]


def test_remove_forgets_guest_and_packages(apt, busybox, cache):
    guests.get("busybox")
    assert guests.remove("busybox") is True
    assert guests.find("busybox") is None
    assert list((cache / "packages").iterdir()) == []
    assert guests.remove("busybox") is False


def test_left_overs_of_a_killed_process_are_cleared(apt, busybox, cache):
    left = cache / "guests/busybox/.new-dead"
    left.mkdir(parents=True)
    (left / "half").write_bytes(b"x")
    guests.get("busybox")
    assert not left.exists()


def test_two_processes_get_one_guest(apt, busybox, cache):
    program = "from kvmpy import guests; print(guests.get('busybox').directory)"
    command = [sys.executable, "-c", program]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    said = {process.communicate(timeout=120)[0] for process in running}
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(said) == 1
    assert sum(line.startswith("-q download") for line in apt.log) == 1


def test_waiting_for_the_lock_is_told(apt, busybox, cache):
    told = threading.Event()
    with store._locked(cache, lambda line: None):
        thread = threading.Thread(target=lambda: guests.get("busybox", progress=lambda line: told.set()))
        thread.start()
        assert told.wait(30)
    thread.join(30)
    assert guests.find("busybox") is not None


def test_cache_directory_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("KVMPY_CACHE", str(tmp_path / "k"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.setenv("HOME", str(tmp_path / "h"))
    assert guests.cache_directory() == tmp_path / "k"
    monkeypatch.delenv("KVMPY_CACHE")
    assert guests.cache_directory() == tmp_path / "x/kvmpy"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert guests.cache_directory() == tmp_path / "h/.cache/kvmpy"


def test_private_configuration_of_apt_switches_off_hooks_and_unsigned_packages(apt, busybox, cache):
    guests.get("busybox")
    text = (cache / "apt/bookworm/apt.conf").read_text()
    for line in (
        "#clear APT::Update;",
        'APT::Get::AllowUnauthenticated "false";',
        'Acquire::AllowInsecureRepositories "false";',
        'Dir::State::status "/dev/null";',
    ):
        assert line in text


def test_importing_guests_loads_nothing_heavy():
    program = textwrap.dedent("""
        import sys
        import kvmpy.guests
        assert not {'cffi', 'iced_x86', 'pyroute2'} & set(sys.modules)
    """)
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
