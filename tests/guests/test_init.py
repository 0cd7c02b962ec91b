# SPDX-License-Identifier: Apache-2.0
"""The guests' init: its words on the kernel command line, read back by a real shell."""

import shutil
import subprocess

import pytest

from kvmpy.guests import READY, init, parameters


def read_back(cmdline: str, tmp_path) -> dict[str, str]:
    """Run the part of the script that reads the command line, with /proc/cmdline replaced."""
    shell = shutil.which("dash") or shutil.which("sh")
    if shell is None:
        pytest.skip("no shell")
    (tmp_path / "cmdline").write_text(cmdline + "\n")
    start, end = init.SCRIPT.index("command= run="), init.SCRIPT.index("# Drivers")
    part = init.SCRIPT[start:end].replace("/proc/cmdline", str(tmp_path / "cmdline"))
    part += (
        'for v in command run exit_port modules reboot; do eval "printf \'%s=%s\\0\' $v \\"\\$$v\\""; done\n'
    )
    done = subprocess.run([shell, "-c", part], capture_output=True, text=True, check=True, timeout=60)
    return dict(item.split("=", 1) for item in done.stdout.split("\0") if item)


COMMANDS = [
    "uname -a",
    "true",
    "echo \"quoted\"; echo 'single'",
    "echo $HOME `id` \\ | wc -c > /run/x",
    "echo a  b",
    "printf 'two\nlines'",
    "echo kvmpy.exit=0x1",
    "echo grüße",
    "a=" + "x" * 500,
]


@pytest.mark.parametrize("command", COMMANDS)
def test_parameters_run_comes_back_as_it_was(command, tmp_path):
    words = read_back(f"console=ttyS0 panic=-1 {parameters(command, exit_port=0xF4)} quiet", tmp_path)
    assert words["command"] == command
    assert words["run"] == "yes"
    assert int(words["exit_port"], 0) == 0xF4


def test_parameters_modules_and_reboot(tmp_path):
    words = read_back(parameters(modules=("virtio_blk", "9p"), reboot=True), tmp_path)
    assert words == {"command": "", "run": "", "exit_port": "", "modules": "virtio_blk,9p", "reboot": "yes"}


def test_parameters_nothing_is_nothing(tmp_path):
    assert parameters() == ""
    assert read_back("console=ttyS0 xkvmpy.run=evil", tmp_path)["run"] == ""


def test_the_kernel_may_put_the_quote_before_the_name(tmp_path):
    assert read_back('a "kvmpy.run=echo hi" b', tmp_path)["command"] == "echo hi"


@pytest.mark.parametrize(
    "arguments",
    [
        {"run": "a\0b"},
        {"exit_port": -1},
        {"exit_port": 1 << 16},
        {"modules": ("a b",)},
        {"modules": ("$(x)",)},
    ],
)
def test_parameters_impossible_is_an_error(arguments):
    with pytest.raises(ValueError):
        parameters(**arguments)


def test_script_is_a_valid_shell_script_that_announces_itself_first():
    shell = shutil.which("dash") or shutil.which("sh")
    subprocess.run([shell, "-n", "-c", init.SCRIPT], check=True, timeout=60)
    commands = [line for line in init.SCRIPT.splitlines() if line and not line.startswith("#")]
    assert commands[0] == f'echo "{READY}"'
