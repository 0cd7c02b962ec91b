# SPDX-License-Identifier: Apache-2.0
"""`kvmpy run` with tiny guests: what it prints, what it exits with, what its JSON says, how it is stopped."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest
from commands import (
    DEBUG_EXIT,
    ECHO,
    POWER_OFF,
    PRINT_FOUR,
    PRINT_FOUR_32,
    RESET,
    SPIN,
    TRIPLE_FAULT_32,
    kvmpy,
)

from kvmpy.cli import status

FIELDS = {
    "format", "outcome", "status", "code", "backend", "backend_reason", "image", "image_format", "seconds",
    "exits", "unclaimed", "error",
}  # fmt: skip


@pytest.fixture
def guest(tmp_path, backend):
    """Writes a flat image; the words that run it on this engine."""

    def words(code: bytes, *more: str) -> list[str]:
        image = tmp_path / "guest.bin"
        image.write_bytes(code)
        fixed = ["--load", "0x1000", "--memory", "2M", "--backend", backend]
        return ["run", str(image), *fixed, "--timeout", "60", *more]

    return words


@pytest.fixture
def running(guest):
    """Starts a guest that was given and kills it if the test does not end it."""
    with contextlib.ExitStack() as stack:

        def start(code: bytes, *more: str, **options) -> subprocess.Popen:
            command = [sys.executable, "-m", "kvmpy", *guest(code, *more)]
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            process = stack.enter_context(subprocess.Popen(command, **(pipes | options)))
            stack.callback(process.kill)
            return process

        yield start


# -- outcomes ----------------------------------------------------------------------------------------


def test_run_prints_what_the_guest_sends_and_nothing_else(guest):
    done = kvmpy(*guest(PRINT_FOUR + POWER_OFF))
    assert (done.returncode, done.stdout, done.stderr) == (0, "4\n", "")


@pytest.mark.parametrize(
    ("code", "outcome", "expected", "said"),
    [
        (POWER_OFF, "poweroff", status.OK, ""),
        (DEBUG_EXIT, "debug-exit", 43, ""),
        (RESET, "reset", status.RESET, "kvmpy: the guest asked for a reset\n"),
    ],
)
def test_run_outcomes_have_their_statuses(guest, code, outcome, expected, said):
    done = kvmpy(*guest(code))
    assert (done.returncode, done.stdout, done.stderr) == (expected, "", said)
    done = kvmpy(*guest(code, "-q", "--serial", "none", "--json"))
    found = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (expected, "")
    assert (found["outcome"], found["status"], found["error"]) == (outcome, expected, None)
    assert found["code"] == (43 if outcome == "debug-exit" else None)


def test_run_timeout_stops_the_guest(guest):
    done = kvmpy(*guest(SPIN, "--timeout", "0.3"))
    assert (done.returncode, done.stdout, done.stderr) == (status.TIMEOUT, "", "kvmpy: the time is over\n")


def test_run_triple_fault_is_explained(guest):
    done = kvmpy(*guest(PRINT_FOUR_32 + TRIPLE_FAULT_32, "--mode", "protected"))
    assert done.returncode == status.GUEST_FAILED
    assert done.stdout == "4\n"
    assert done.stderr.startswith("kvmpy: ")
    for part in ("triple fault", "Shutdown", "rip ", "cr0 ", "gdt ", "ud2", "IoOut(port=0x3f8"):
        assert part.lower() in done.stderr.lower(), part
    assert "Traceback" not in done.stderr


def test_run_triple_fault_can_mean_reset(guest):
    done = kvmpy(*guest(TRIPLE_FAULT_32, "--mode", "protected", "--triple-fault", "reset"))
    assert done.returncode == status.RESET


# -- JSON --------------------------------------------------------------------------------------------


def test_json_goes_to_stdout_when_the_console_is_elsewhere(guest, tmp_path, backend):
    out = tmp_path / "console"
    done = kvmpy(*guest(PRINT_FOUR + POWER_OFF, "--json", "--serial", f"file:{out}"))
    found = json.loads(done.stdout)
    assert done.stderr == "" and done.stdout.count("\n") == 1
    assert out.read_bytes() == b"4\n"
    assert set(found) == FIELDS
    assert (found["backend"], found["image_format"]) == (backend, "flat")
    assert found["image"].endswith("guest.bin") and found["backend_reason"]
    assert 0 < found["seconds"] < 60
    assert found["exits"]["0"]["total"] >= 3
    assert all(isinstance(count, int) for count in found["exits"]["0"].values())
    assert found["unclaimed"] == {"pio": 0, "mmio": 0}


def test_metrics_are_in_a_file_at_the_end(guest, tmp_path):
    path = tmp_path / "kvmpy.prom"
    done = kvmpy(*guest(PRINT_FOUR + POWER_OFF, "--metrics", str(path)))
    assert done.returncode == 0, done.stderr
    lines = path.read_text().splitlines()
    assert f"kvmpy_memory_ram_bytes {2 << 20}" in lines and "# TYPE kvmpy_vcpu_exits_total counter" in lines
    assert sorted(one.name for one in tmp_path.iterdir()) == ["guest.bin", "kvmpy.prom"]
    nowhere = kvmpy(*guest(PRINT_FOUR + POWER_OFF, "--metrics", str(tmp_path / "none" / "file")))
    assert nowhere.returncode != 0 and "none" in nowhere.stderr


def test_json_goes_to_stderr_when_the_console_is_on_stdout(guest):
    done = kvmpy(*guest(PRINT_FOUR_32 + TRIPLE_FAULT_32, "--mode", "protected", "--json"))
    assert done.stdout == "4\n"
    found = json.loads(done.stderr)
    assert done.stderr.count("\n") == 1
    assert found["outcome"] == "guest-error"
    assert found["error"]["type"] == "GuestShutdown"
    assert "registers:" in found["error"]["report"]


def test_json_tells_of_errors_before_the_guest_ran(tmp_path):
    done = kvmpy("run", tmp_path / "absent", "--json", "--serial", "none")
    found = json.loads(done.stdout)
    assert found["outcome"] == "error" and found["status"] == done.returncode != 0
    assert "absent" in found["error"]["message"]
    assert found["exits"] == {} and found["seconds"] is None


# -- the console -------------------------------------------------------------------------------------


def test_input_reaches_the_guest_through_a_pipe(guest):
    done = kvmpy(*guest(ECHO), stdin=None, input="hello\x01x\nq")
    assert (done.returncode, done.stdout, done.stderr) == (0, "hello\x01x\n", "")


def test_end_of_input_does_not_stop_the_guest(guest):
    done = kvmpy(*guest(ECHO, "--timeout", "1"), stdin=None, input="abc")
    assert (done.returncode, done.stdout) == (status.TIMEOUT, "abc")


def test_console_on_a_socket(running, tmp_path):
    path = tmp_path / "s"
    process = running(ECHO, "--serial", f"unix:{path}")
    client = socket.socket(socket.AF_UNIX)
    with client:
        for _ in range(600):
            if path.exists():
                break
            time.sleep(0.05)
        client.connect(str(path))
        client.settimeout(60)
        client.sendall(b"xyz")
        got = b""
        while got != b"xyz":
            got += client.recv(10)
        client.sendall(b"q")
        assert process.wait(60) == 0


def test_console_on_a_pty_is_announced(running):
    process = running(ECHO, "--serial", "pty", "-q")
    line = process.stderr.readline().decode()
    assert line.startswith("kvmpy: the serial console is /dev/pts/")
    terminal = os.open(line.split()[-1], os.O_RDWR | os.O_NOCTTY)
    try:
        os.write(terminal, b"q")
        assert process.wait(60) == 0
    finally:
        os.close(terminal)


def test_terminal_is_raw_and_ctrl_a_x_quits(guest, backend):
    """On a terminal Ctrl-C is for the guest; afterwards the terminal is as it was."""
    setsid = shutil.which("setsid")
    if setsid is None:
        pytest.skip("no setsid program to give a process a terminal")

    master, slave = os.openpty()
    before = termios.tcgetattr(slave)
    command = [setsid, "--ctty", "--wait", sys.executable, "-m", "kvmpy", *guest(ECHO)]
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave)
    try:
        seen = read_until(master, b"Ctrl-A X quits")
        assert f"{backend} engine".encode() in seen
        os.write(master, b"a\x03b")
        assert read_until(master, b"a\x03b")
        os.write(master, b"\x01x")
        assert process.wait(60) == status.INTERRUPTED, rest(master)
        assert termios.tcgetattr(slave) == before
    finally:
        process.kill()
        process.wait()
        os.close(master)
        os.close(slave)


def rest(fd: int) -> bytes:
    """What has come and was not read."""
    seen = b""
    while select.select([fd], [], [], 1)[0]:
        seen += os.read(fd, 1000)
    return seen


def read_until(fd: int, wanted: bytes) -> bytes:

    seen = b""
    while wanted not in seen:
        ready, _, _ = select.select([fd], [], [], 60)
        assert ready, f"{wanted!r} did not come, only {seen!r}"
        seen += os.read(fd, 1000)
    return seen


@pytest.mark.parametrize(
    ("number", "outcome", "expected"),
    [(signal.SIGINT, "interrupted", status.INTERRUPTED), (signal.SIGTERM, "terminated", status.TERMINATED)],
)
def test_signals_stop_the_guest_cleanly(running, number, outcome, expected):
    process = running(PRINT_FOUR + SPIN, "--json")
    assert process.stdout.read(2) == b"4\n"  # it runs
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == expected
    assert json.loads(errors)["outcome"] == outcome


def test_reader_that_goes_away_ends_the_run(running):
    process = running(PRINT_FOUR + bytes.fromhex("ebf5"))  # print for ever
    process.stdout.close()
    assert process.stderr.read() != b""
    assert process.wait(60) == status.HOST_ERROR


# -- mistakes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "give a KERNEL"),
        (["{image}", "--bios", "{image}"], "exactly one"),
        (["{image}", "--memory", "12 parsec"], "parsec"),
        (["{image}", "--memory", "100K"], "at least 1 MiB"),
        (["{image}", "--cpus", "0"], "cpus"),
        (["{image}", "--floppy", "{image}"], "floppy"),
        (["--bios", "{image}", "--append", "x"], "cmdline"),
        (["{image}", "--fw-cfg", "justaname"], "NAME=FILE"),
        (["{image}", "--fw-cfg", "a={image}", "--fw-cfg", "a={image}"], "twice"),
        (["{image}", "--run", "true"], "stock Linux guests"),
        (["{image}", "--load", "0x1000", "--disk", "d.img"], "needs its format named"),
        (["{image}", "--load", "0x1000", "--net", "tap:t,mac=1"], "not the MAC address"),
        (["{image}", "--load", "0x1000", "--hvc", "stdio"], "--hvc stdio needs --serial none"),
    ],
)
def test_contradictions_are_usage_errors(tmp_path, words, part):
    image = tmp_path / "image"
    image.write_bytes(b"x")
    done = kvmpy("run", *(word.replace("{image}", str(image)) for word in words))
    assert done.returncode == status.USAGE
    assert part in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""


def test_files_that_are_not_there_are_named(tmp_path, guest):
    for words in (
        ("run", tmp_path / "absent"),
        ("run", "--bios", tmp_path / "absent"),
        guest(SPIN, "--fw-cfg", f"a={tmp_path}/absent"),
        guest(SPIN, "--debugcon", f"{tmp_path}/absent/log"),
        guest(SPIN, "--serial", f"unix:{tmp_path}/absent/socket"),
    ):
        done = kvmpy(*words)
        assert done.returncode in (status.HOST_ERROR, status.BAD_IMAGE), words
        assert "absent" in done.stderr and "Traceback" not in done.stderr


def test_image_that_is_no_kernel_is_an_error_with_its_name(tmp_path, backend):
    image = tmp_path / "letter.txt"
    image.write_text("dear kernel")
    done = kvmpy("run", image, "--backend", backend)
    assert done.returncode == status.BAD_IMAGE
    assert "letter.txt" in done.stderr and "Traceback" not in done.stderr


def test_stock_guest_that_is_not_there_says_how_to_get_it(tmp_path):
    environment = os.environ | {"KVMPY_CACHE": str(tmp_path)}
    for words in (("debian-6.1",), ("--bios", "seabios"), ("--bios", "seabios:bios-256k")):
        done = kvmpy("run", *words, env=environment)
        assert done.returncode == status.UNAVAILABLE
        assert f"kvmpy guest get {words[-1].partition(':')[0]}" in done.stderr


def test_backend_that_cannot_be_used_is_unavailable(guest):
    words = guest(SPIN)
    words[words.index("--backend") + 1] = "auto"
    done = kvmpy(*words, env=os.environ | {"KVMPY_BACKEND": "xen"})
    assert done.returncode in (status.USAGE, status.UNAVAILABLE)
    assert "xen" in done.stderr and "Traceback" not in done.stderr


# -- real guests -------------------------------------------------------------------------------------


def stock(name: str):
    from kvmpy import guests

    try:
        return guests.get(name)
    except guests.GuestUnavailableError as error:
        pytest.skip(str(error).splitlines()[0])


def boot_grub(backend: str, log: Path, wanted: tuple[bytes, ...], seconds: float) -> None:
    """Boot GRUB's floppy through SeaBIOS until it prints one of `wanted`, then end the run."""
    stock("seabios"), stock("grub-floppy")
    words = ("--bios", "seabios", "--floppy", "grub-floppy", "--debugcon", str(log), "--backend", backend)
    command = [sys.executable, "-m", "kvmpy", "run", *words, "--timeout", str(seconds)]
    with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        seen = b""
        while not any(text in seen for text in wanted) and (more := process.stdout.read1()):
            seen += more
        process.terminate()
        _, errors = process.communicate(timeout=60)
    assert any(text in seen for text in wanted), (seen[-500:], errors[-2000:])
    assert process.returncode == status.TERMINATED
    assert log.read_text().startswith("SeaBIOS (version ")


@pytest.mark.guest
def test_seabios_starts_grub_from_a_floppy(tmp_path, backend):
    # The greeting, or on a fast processor, where the screen is cleared before it was sent, already the menu.
    greeting = (b"Welcome to GRUB", b"GNU GRUB", b"highlighted entry")
    boot_grub(backend, tmp_path / "bios.log", greeting, 600)  # a minute or more where ring 0 is emulated


@pytest.mark.guest
@pytest.mark.slow
def test_grub_reaches_its_menu(tmp_path, backend):
    boot_grub(backend, tmp_path / "bios.log", (b"GNU GRUB  version",), 1200)  # minutes where ring 0 is emulated


@pytest.mark.guest
@pytest.mark.slow
def test_debian_says_something_or_its_failure_is_explained(backend):
    stock("debian-6.1")
    words = ("debian-6.1", "--run", "exit 7", "--timeout", "600")
    done = kvmpy("run", *words, "--backend", backend, timeout=700)
    assert "Linux version 6.1" in done.stdout
    if done.returncode == status.GUEST_FAILED:  # a KVM that emulates ring 0
        assert "emulat" in done.stderr and "registers:" in done.stderr
    else:
        assert done.returncode == 7
        assert "kvmpy: exit status 7" in done.stdout
