# SPDX-License-Identifier: Apache-2.0
"""The command as a new user meets it: help, versions, wrong words, errors of the host."""

import errno
import json
import re
import shlex
import subprocess
import sys

import pytest
from commands import kvmpy

from kvmpy import _version
from kvmpy.cli import main as cli
from kvmpy.cli import status
from kvmpy.cli.command import describe, main, parser, status_of
from kvmpy.errors import BackendError, BootError, EmulationFailure, GuestMemoryError, KvmError

COMMANDS = [(), ("run",), ("doctor",), ("guest",), ("image",), ("debug",), ("debug", "profile"), ("version",)]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_usage_and_examples(command):
    done = kvmpy(*command, "--help")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: kvmpy")
    if command != ("version",):
        assert "examples:\n  kvmpy" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_help_examples_are_understood(capsys):
    for command in COMMANDS:
        with pytest.raises(SystemExit):
            main([*command, "--help"])
    text = capsys.readouterr().out
    examples = re.findall(r"^  (?:.*\| )?kvmpy (.+?)(?:   .*| \| .*)?$", text, re.M)
    assert len(examples) >= 10
    for example in examples:
        parser().parse_args(shlex.split(example))


def test_run_help_documents_every_exit_status():
    text = kvmpy("run", "--help").stdout
    for name, value in vars(status).items():
        if name.isupper() and isinstance(value, int) and name != "FAILED":
            assert re.search(rf"\b{value}\b", text), name


def test_version_option_and_command():
    assert kvmpy("--version").stdout == f"kvmpy {_version.__version__}\n"
    done = kvmpy("version")
    assert done.stdout.splitlines()[0].split() == ["kvmpy", _version.__version__]
    versions = json.loads(kvmpy("version", "--json").stdout)
    assert versions["kvmpy"] == _version.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    "words",
    [
        (),
        ("fly",),
        ("run", "--cpus", "two", "x"),
        ("run", "--timeout", "-1", "x"),
        ("run", "--timeout", "nan", "x"),
        ("run", "--load", "-5", "x"),
        ("run", "--backend", "xen", "x"),
        ("run", "--mem", "1G", "x"),
        ("guest",),
        ("guest", "get"),
        ("guest", "get", "debian-99"),
        ("doctor", "now"),
    ],
)
def test_wrong_words_are_a_usage_error(words):
    done = kvmpy(*words)
    assert done.returncode == status.USAGE
    assert done.stdout == ""
    assert "usage: kvmpy" in done.stderr and "Traceback" not in done.stderr


def test_output_to_a_closed_pipe_is_no_traceback():
    command = [sys.executable, "-m", "kvmpy", "guest", "list", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == status.HOST_ERROR


def test_errors_have_their_statuses():
    assert status_of(EmulationFailure("x")) == status.GUEST_FAILED
    assert status_of(BootError("x")) == status.BAD_IMAGE
    assert status_of(BackendError("x")) == status.UNAVAILABLE
    assert status_of(KvmError(errno.ENOMEM, "KVM_CREATE_VM")) == status.HOST_ERROR
    assert status_of(FileNotFoundError(errno.ENOENT, "x")) == status.HOST_ERROR
    assert status_of(GuestMemoryError("x", 0, 1, 0)) == status.FAILED


def test_errors_are_described_in_a_line():
    assert (
        describe(FileNotFoundError(errno.ENOENT, "No such file or directory", "a/b"))
        == "a/b: No such file or directory"
    )
    assert describe(KvmError(errno.EBUSY, "KVM_RUN")) == "[Errno 16] KVM_RUN: Device or resource busy"
    assert describe(BootError("too long")) == "too long"
    assert describe(RuntimeError()) == "RuntimeError"


def test_main_can_be_called_from_python(capsys):
    assert cli(["version", "--json"]) == status.OK
    assert json.loads(capsys.readouterr().out)["kvmpy"] == _version.__version__
