# SPDX-License-Identifier: Apache-2.0
"""The examination of a host: its shape, its findings on hosts that are not this one, its printed form."""

import dataclasses
import io
import json
import re
from pathlib import Path

import pytest
from commands import kvmpy

from kvmpy import doctor
from kvmpy.cli import doctor as command
from kvmpy.cli import status
from kvmpy.cli.text import fill, paint
from kvmpy.doctor import capabilities, examination, host, kvm, network, probe
from kvmpy.doctor.report import Check, Report, Section, Status, info, lacking, limited, ok

STATUSES = {"ok", "limited", "lacking", "info"}


@pytest.fixture(scope="module")
def report():
    return doctor.examine()


def test_json_has_the_documented_shape():
    done = kvmpy("doctor", "--json")
    found = json.loads(done.stdout)
    assert done.stderr == ""
    assert done.returncode == (status.OK if found["usable"] else status.UNAVAILABLE)
    assert found["format"] == 1
    assert set(found) == {"format", "kvmpy", "usable", "backend", "reason", "sections"}
    assert {"kvm", "tcg", "host", "network"} <= set(found["sections"])
    for section in found["sections"].values():
        assert section
        for check in section.values():
            assert set(check) == {"status", "text", "advice", "data"}
            assert check["status"] in STATUSES
            assert check["text"]
            if check["status"] == "lacking" and check["data"].get("works") is not False:
                assert check["advice"]


def test_examine_finds_everything_it_is_for(report):
    names = {section.name: {check.name for check in section.checks} for section in report.sections}
    assert {"device", "module", "open"} <= names["kvm"]
    assert "open" in names["tcg"]
    assert {"system", "processors", "memory", "memlock", "thp", "huge-pages-2M", "huge-pages-1G"} <= names["host"]
    assert {"memfd", "userfaultfd", "io_uring"} <= names["host"]
    assert names["network"] == {"tap", "links", "namespaces", "vhost"}


def test_examine_usable_means_a_guest_ran(report):
    ran = {
        name: all(
            (check := report.section(name).find(guest)) is not None and check.data["works"]
            for guest in ("real-mode", "long-mode")
        )
        for name in ("kvm", "tcg")
    }
    assert report.usable == any(ran.values())
    if report.backend and ran[report.backend]:
        speed = report.section(report.backend).find("speed")
        assert speed.data["ring0"] > 0 and speed.data["ring3"] > 0


def test_examine_leaves_no_links_and_no_open_files():
    def state():
        return [sorted(path.name for path in Path(place).iterdir()) for place in ("/sys/class/net", "/proc/self/fd")]

    before = state()
    doctor.examine()
    assert state() == before


def test_examine_without_any_engine_is_a_finding(monkeypatch):
    def refuse(*_):
        raise RuntimeError("half built")

    monkeypatch.setattr(kvm, "open_kernel", lambda: (None, lacking("open", "no", "", works=False)))
    monkeypatch.setattr(examination, "open_kvm", refuse)
    found = doctor.examine()
    assert (found.usable, found.backend, found.reason) == (False, "", "half built")
    assert "half built" in found.section("tcg").find("open").text
    with pytest.raises(KeyError):
        found.section("capabilities")


def test_probes_run_on_every_engine(backend):
    from kvmpy.engines import open_kvm

    with open_kvm(backend) as handle:
        assert probe.real_mode(handle).worked
        assert probe.long_mode(handle).worked
        checks = {check.name: check for check in kvm.guests(handle, backend)}
    assert checks["speed"].data["ring0"] > 0


def test_ring0_emulation_is_a_matter_of_measured_speed():
    assert probe.Speed(ring0=3e6, ring3=2e9).ring0_emulated
    assert not probe.Speed(ring0=1.5e9, ring3=2e9).ring0_emulated


# -- what it says on other hosts ---------------------------------------------------------------------


def test_device_absent_says_why(tmp_path, monkeypatch):
    monkeypatch.setattr(kvm, "in_container", lambda: "docker")
    assert "--device /dev/kvm" in kvm.device(tmp_path / "kvm").advice
    monkeypatch.setattr(kvm, "in_container", lambda: "")
    for flags, word in (({"svm"}, "modprobe kvm_amd"), ({"vmx"}, "modprobe kvm_intel"),
                        ({"hypervisor"}, "nested virtualisation"), (set(), "no vmx or svm")):  # fmt: skip
        monkeypatch.setattr(kvm, "cpu_flags", lambda flags=flags: frozenset(flags))
        check = kvm.device(tmp_path / "kvm")
        assert check.status is Status.LACKING and word in check.advice


def test_device_without_permission_says_which_group(monkeypatch, tmp_path):
    monkeypatch.setattr(kvm, "in_container", lambda: "")
    monkeypatch.setattr(kvm, "_group_name", lambda gid: "kvm")
    monkeypatch.setattr(kvm.os, "access", lambda path, mode: False)
    node = tmp_path / "kvm"
    node.touch(mode=0o600)
    check = kvm.device(node)
    assert check.status is Status.LACKING and check.data["accessible"] is False
    assert "chmod 660" in check.advice
    node.chmod(0o660)
    assert "usermod -aG kvm" in kvm.device(node).advice


@pytest.mark.parametrize("code", ["EACCES", "ENODEV", "EBUSY"])
def test_kernel_that_does_not_open_is_a_finding(monkeypatch, code):
    import errno

    from kvmpy.errors import KvmError

    def refuse():
        raise KvmError(getattr(errno, code), "open")

    monkeypatch.setattr(kvm, "Kvm", refuse)
    handle, check = kvm.open_kernel()
    assert handle is None and check.status is Status.LACKING and check.data["works"] is False


def test_guest_that_gives_the_wrong_answer_is_a_lack(monkeypatch, backend):
    from kvmpy.engines import open_kvm

    monkeypatch.setattr(probe, "ANSWER", 43)
    with open_kvm(backend) as handle:
        checks = kvm.guests(handle, backend)
    assert [(check.name, check.status) for check in checks] == [
        ("real-mode", Status.LACKING),
        ("long-mode", Status.LACKING),
    ]


def test_capabilities_are_grouped_and_needed_ones_missed():
    offered = dict.fromkeys(capabilities.NEEDED, 1) | {"NR_VCPUS": 8, "BRAND_NEW": 1, "SREGS2": 0}
    section = capabilities.examine(offered)
    assert all(check.status is not Status.LACKING for check in section.checks)
    assert section.find("others").data["offered"] == ["BRAND_NEW"]
    assert section.find("limits").data == {"NR_VCPUS": 8}
    assert "SREGS2" in section.find("vcpu-state").data["absent"]
    check = capabilities.examine(offered | {"IRQFD": 0}).find("interrupts")
    assert check.status is Status.LACKING and "IRQFD" in check.advice


def test_capability_names_are_the_kernels():
    from kvmpy._constants import Cap

    names = {name for group in capabilities.GROUPS.values() for name in group}
    assert {*names, *capabilities.LIMITS, *capabilities.NEEDED} <= set(Cap.__members__)


def test_tap_without_the_device_or_the_right_is_a_lack(monkeypatch, tmp_path):
    monkeypatch.setattr(network, "in_container", lambda: "")
    monkeypatch.setattr(network, "TUN", str(tmp_path / "tun"))
    assert "modprobe tun" in network._tap().advice
    (tmp_path / "tun").touch()  # a plain file answers the ioctl with ENOTTY, as a kernel without tun
    check = network._tap()
    assert check.status is Status.LACKING and check.data["works"] is False


def test_host_reads_what_the_kernel_says(monkeypatch, tmp_path):
    pages = {
        "/sys/fs/cgroup/cpu.max": "50000 100000\n",
        "/sys/kernel/mm/transparent_hugepage/enabled": "a [never]\n",
    }
    monkeypatch.setattr(host, "read", lambda path: pages.get(str(path), ""))
    assert host._cpu_quota() == 0.5
    assert host._processors().status is Status.LIMITED
    assert host._thp().status is Status.LIMITED
    pages["/sys/fs/cgroup/cpu.max"] = "max 100000\n"
    assert host._cpu_quota() is None
    assert host.meminfo() == {}


def test_host_missing_system_calls_are_findings(monkeypatch):
    import errno

    monkeypatch.setattr(host, "_syscall", lambda number, *_: -errno.ENOSYS)
    monkeypatch.setattr(host.os, "access", lambda *_: False)
    assert host._io_uring().data == {"available": False}
    assert host._userfaultfd().status is Status.LACKING


# -- printed -----------------------------------------------------------------------------------------

CHECKS = (
    ok("good", "fine"),
    limited("slow", "so so", "do this"),
    lacking("bad", "no", "do that"),
    info("note", "x"),
)
SMALL = Report("1.0", True, "kvm", "/dev/kvm works", (Section("kvm", "KVM", CHECKS),))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_render_is_aligned_and_plain_without_a_terminal(monkeypatch):
    monkeypatch.setattr(command.sys, "stdout", io.StringIO())
    lines = command.render(SMALL).splitlines()
    assert lines[0] == "KVM"
    assert lines[1] == "  good  ok       fine"
    assert lines[2] == "  slow  limited  so so"
    assert lines[3] == "                 -> do this"
    assert lines[-1] == "Guests run here. --backend auto takes kvm: /dev/kvm works"
    assert "\x1b" not in "".join(lines)
    unusable = dataclasses.replace(SMALL, usable=False, backend="", reason="nothing works")
    assert command.render(unusable).endswith("Guests cannot run here: nothing works")


def test_render_has_colours_on_a_terminal_but_honours_no_color(monkeypatch):
    monkeypatch.setattr(command.sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = command.render(SMALL)
    assert "\x1b[32mok" in coloured and "\x1b[31mlacking" in coloured
    monkeypatch.setenv("NO_COLOR", "1")
    plain = command.render(SMALL)
    assert "\x1b" not in plain
    assert re.sub(r"\x1b\[\d*m", "", coloured) == plain


def test_text_is_plain_on_dumb_terminals_and_wraps(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "dumb")
    assert paint("x", "red", Terminal()) == "x"
    assert fill("aaa bbb ccc " * 4, 10, 40) == "aaa bbb ccc aaa bbb ccc aaa\n          bbb ccc aaa bbb ccc"


def test_exit_status_tells_an_unusable_host(monkeypatch, capsys):
    from kvmpy.cli import main

    unusable = dataclasses.replace(SMALL, usable=False)
    monkeypatch.setattr(doctor, "examine", lambda: unusable)
    assert main(["doctor"]) == status.UNAVAILABLE
    assert main(["doctor", "--json"]) == status.UNAVAILABLE
    monkeypatch.setattr(doctor, "examine", lambda: SMALL)
    assert main(["doctor"]) == status.OK
    assert "Guests run here" in capsys.readouterr().out


def test_check_data_is_json(report):
    assert json.loads(json.dumps(report.as_dict())) == report.as_dict()
    assert isinstance(report.sections[0].checks[0], Check)
