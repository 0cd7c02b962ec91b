# SPDX-License-Identifier: Apache-2.0
"""`kvmpy run`: boot a guest with its serial console on this terminal."""

from __future__ import annotations

import argparse
import contextlib
import logging
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, Any

from kvmpy.cli import inputs, status
from kvmpy.cli.inputs import UsageError
from kvmpy.cli.result import Result
from kvmpy.cli.text import tell, uncollected

if TYPE_CHECKING:
    from kvmpy.machine import Config, Machine

    Watch = Callable[[Machine], contextlib.AbstractContextManager[object]]

log = logging.getLogger("kvmpy.cli")

STOP_SECONDS = 10.0  # for the vCPUs to come out of the guest; they need milliseconds

FORMATS = ("auto", "bzImage", "vmlinux", "PVH", "multiboot", "ELF", "flat", "firmware")

EPILOG = f"""\
examples:
  kvmpy run vmlinuz --initrd initrd.gz --append console=ttyS0 --memory 512M --cpus 2
  kvmpy run debian-6.1                          a stock guest (kvmpy guest get debian-6.1) with a shell
  kvmpy run debian-6.1 --run 'uname -a'         run a command in it; its status becomes ours
  kvmpy run debian-6.12 --disk disk.qcow2,format=qcow2 --net tap:tap0 --run 'mount /dev/vda /mnt && ls /mnt'
  kvmpy run vmlinuz --disk root.img,format=raw --append 'console=ttyS0 root=/dev/vda'
  kvmpy run --bios seabios --floppy grub-floppy --debugcon bios.log
  kvmpy run test.bin --load 0x1000 --timeout 5 --serial none --json

The serial console is on standard input and output. On a terminal every key goes to the guest; Ctrl-A X quits
and Ctrl-A H helps. With a pipe or a file nothing is translated, and Ctrl-C stops the guest.

--json writes one line with one JSON object when the run is over: to standard output if the serial console is
elsewhere (--serial none, FILE, pty, unix:PATH), else to standard error, where kvmpy then writes nothing else.
Its fields: outcome ("poweroff", "reset", "debug-exit", "halted", "stopped", "timeout", "interrupted",
"terminated", "guest-error", "error"), status (the exit status), code, backend, backend_reason, image,
image_format, seconds, exits (by vCPU: "total" that came to kvmpy, and the engine's own counters), unclaimed
(accesses that no device answered, by bus), error (type, message, report).

{status.TEXT}"""


def add_parser(commands: Any) -> None:
    """Add `run` to the command line."""
    parser = commands.add_parser(
        "run",
        help="boot a kernel or a firmware",
        description="Boot a kernel, a flat image or a firmware, with the serial console on this terminal.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.set_defaults(function=run)
    add_arguments(parser)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is booted, on which machine: also for commands that look at a guest while it runs."""
    image = parser.add_argument_group("what to boot (a FILE may be a stock guest's: NAME or NAME:FILE)")
    image.add_argument(
        "kernel", nargs="?", metavar="KERNEL", help="bzImage, ELF, PVH, multiboot or flat image"
    )
    image.add_argument("--initrd", metavar="FILE", help="initial RAM disk")
    image.add_argument("--append", metavar="STR", default="", help="kernel command line")
    image.add_argument("--run", metavar="CMD", help="stock Linux guests: run a command, then power off")
    image.add_argument("--module", metavar="'FILE [ARGS]'", action="append", default=[],
                       help="multiboot or PVH module; may be repeated")  # fmt: skip
    image.add_argument("--format", choices=FORMATS, default="auto", help="how to load KERNEL (default: look)")
    image.add_argument("--load", metavar="ADDR", type=inputs.number, help="flat image: where to load it")
    image.add_argument("--entry", metavar="ADDR", type=inputs.number, help="flat image: where to start")
    image.add_argument("--mode", choices=("real", "protected", "long"), help="flat image: processor mode")
    image.add_argument("--decompress", action=argparse.BooleanOptionalAction,
                       help="unpack the kernel on the host (default: on the software CPU)")  # fmt: skip
    image.add_argument("--bios", metavar="FILE", help="firmware at the reset vector, instead of KERNEL")
    image.add_argument("--floppy", metavar="FILE", help="floppy image for the firmware to boot")
    image.add_argument("--fw-cfg", metavar="NAME=FILE", action="append", default=[],
                       help="a file for the guest through fw_cfg; may be repeated")  # fmt: skip

    machine = parser.add_argument_group("the machine")
    machine.add_argument("--memory", metavar="SIZE", default="512M", help="guest RAM (default 512M)")
    machine.add_argument("--huge-pages", choices=("thp", "2M", "1G"), help="back guest RAM with huge pages")
    machine.add_argument("--cpus", metavar="N", type=inputs.number, default=1, help="processors (default 1)")
    machine.add_argument("--cpu", metavar="SPEC", default="host", help="processor features, e.g. host,-avx2")
    machine.add_argument("--backend", choices=("auto", "kvm", "tcg"), default="auto",
                         help="processor engine (default auto, see kvmpy doctor)")  # fmt: skip
    machine.add_argument("--no-assist", action="store_true",
                         help="stop at what KVM cannot emulate, instead of asking the software CPU")  # fmt: skip
    machine.add_argument("--deterministic", metavar="SEED", type=inputs.number,
                         help="count time in instructions: two runs are the same (tcg, one processor)")  # fmt: skip
    machine.add_argument("--no-acpi", action="store_true", help="no ACPI tables")
    machine.add_argument("--rng", action="store_true", help="a source of entropy for the guest")
    machine.add_argument("--triple-fault", choices=("error", "reset"), default="error",
                         help="a triple fault is a failure (default) or a reset")  # fmt: skip
    machine.add_argument("--testdev", action="store_true",
                         help="the device that hypervisor test programs expect (kvm-unit-tests)")  # fmt: skip

    disks = parser.add_argument_group("disks, networks, folders (each may be repeated; a comma in a path is doubled)")
    disks.add_argument("--disk", metavar="PATH[,KEY=VALUE...]", action="append", default=[],
                       help="a disk: format=raw|qcow2|vdi|vmdk|nbd (needed unless the image stays as it is), "
                       "readonly=on, overlay=memory|FOLDER (writes go there and are forgotten), serial=S, "
                       "follow=FOLDER (files there may be backing files), cache=writeback|writethrough|unsafe, "
                       "discard=off, queues=N, bps=BYTES and iops=N (per second), bps_burst=, iops_burst=")  # fmt: skip
    disks.add_argument("--transport", choices=("mmio", "pci"),
                       help="how the guest finds devices (default mmio; pci with --bios)")  # fmt: skip
    disks.add_argument("--net", metavar="KIND[:NAME][,KEY=VALUE...]", action="append", default=[],
                       help="a network card: none, user (hostfwd=tcp::8080-:80, guestfwd=, allow=, deny=), tap:NAME "
                       "(address=, bridge=, netns=, masquerade, queues=), stream:PATH (listen, reconnect=S), "
                       "switch:NAME; all: mac=M, mtu=BYTES, pcap=FILE, bps=, iops= (bytes, frames per second in each "
                       "direction); see docs/networks.md")  # fmt: skip
    disks.add_argument("--share", metavar="FOLDER[,KEY=VALUE...]", action="append", default=[],
                       help="a folder of the host: tag=TAG, readonly=on")  # fmt: skip

    io = parser.add_argument_group("input and output")
    io.add_argument("--serial", metavar="WHERE", default="stdio",
                    help="stdio (default), none, pty, unix:PATH, file:PATH or a file's path")  # fmt: skip
    io.add_argument("--hvc", metavar="WHERE", help="a virtio console, hvc0 in the guest; WHERE as for --serial")
    io.add_argument("--debugcon", metavar="FILE", help="write the debug ports 0xe9 and 0x402 to a file")
    io.add_argument("--timeout", metavar="S", type=inputs.seconds, help="stop the guest after S seconds")
    io.add_argument("--json", action="store_true", help="write the outcome as one JSON object")
    io.add_argument("--metrics", metavar="FILE", help="write counters there as Prometheus text, every five seconds")
    io.add_argument("-q", "--quiet", action="store_true", help="no messages but errors")


def run(options: argparse.Namespace, watch: Watch = contextlib.nullcontext) -> int:
    """Boot, wait, tell. Returns the exit status. `watch(machine)` is entered while the guest runs."""
    from kvmpy.cli.command import describe, status_of

    result = Result()
    try:
        _boot(options, result, watch)
    except UsageError as error:
        result.failed(error, status.USAGE)
    except Exception as error:
        # Also what a device raised: the traceback is for whoever wrote it, and shown with -vv.
        log.debug("the run failed", exc_info=error)
        result.failed(error, status_of(error))
    _tell(options, result, describe)
    return result.status


def _boot(options: argparse.Namespace, result: Result, watch: Watch) -> None:
    from kvmpy.errors import KvmpyError

    previous = signal.signal(signal.SIGTERM, _terminate)
    try:
        with uncollected():
            from kvmpy.machine import Machine

            config = _config(options)
        result.image = str(config.kernel if config.kernel is not None else config.firmware)
        try:
            with uncollected():
                machine = Machine(config)
        except KvmpyError:
            raise
        except ValueError as error:  # what only the machine can check, such as --cpu
            raise UsageError(str(error)) from error
        _introduce(options, machine)
        _wait(options, machine, result, watch)
    except _Terminated:
        result.ended("terminated")
    except KeyboardInterrupt:
        result.ended("interrupted")
    finally:
        signal.signal(signal.SIGTERM, previous)


def _config(options: argparse.Namespace) -> Config:
    from kvmpy.chardev import File
    from kvmpy.guests import parameters
    from kvmpy.machine import Config

    if options.kernel is None and options.bios is None:
        raise UsageError("give a KERNEL, or --bios; see kvmpy run --help")
    words = [options.append]
    initrd = inputs.file(options.initrd, "initrd") if options.initrd else None
    kernel = options.kernel
    found = inputs.stock(kernel, "kernel") if kernel else None
    decompress = options.decompress
    if found is not None:
        guest, kernel = found
        # Where ring 0 is slow, a kernel that unpacks itself takes minutes.
        decompress = "initrd" in guest.files or None if decompress is None else decompress
        words.insert(0, guest.cmdline)
        # The small one has no modules, and stock kernels need theirs for virtio.
        plain = not (options.disk or options.net or options.share or options.hvc or options.rng)
        initrd = initrd or guest.files.get("initrd" if plain else "initrd-modules", guest.files.get("initrd"))
    if options.run is not None:
        if found is None or initrd is None:
            raise UsageError("--run is for stock Linux guests such as debian-6.1")
        words.append(parameters(options.run, exit_port=_exit_port()))
    serial = debugcon = hvc = None
    try:
        if options.hvc == options.serial == "stdio":
            raise UsageError("--hvc stdio needs --serial none or another place: standard input has one reader")
        serial = inputs.serial(options.serial)
        debugcon = File(options.debugcon) if options.debugcon else None
        hvc = inputs.serial(options.hvc) if options.hvc else None
        return Config(
            memory=options.memory,
            cpus=options.cpus,
            backend=options.backend,
            assist=False if options.no_assist else None,
            deterministic=options.deterministic,
            cpu=options.cpu,
            kernel=kernel,
            initrd=initrd,
            cmdline=" ".join(filter(None, words)),
            modules=[inputs.module(word) for word in options.module],
            firmware=inputs.file(options.bios, "bios") if options.bios else None,
            floppy=inputs.file(options.floppy, "floppy") if options.floppy else None,
            image_format=options.format,
            load_address=options.load,
            entry=options.entry,
            mode=options.mode,
            decompress=decompress,
            acpi=not options.no_acpi,
            huge_pages=options.huge_pages,
            console=serial,
            debugcon=debugcon,
            fw_cfg=inputs.fw_cfg(options.fw_cfg),
            triple_fault=options.triple_fault,
            testdev=options.testdev,
            disks=options.disk,
            nets=[word for word in options.net if word != "none"],
            shares=options.share,
            hvc=hvc,
            rng=options.rng,
            transport=options.transport,
        )
    except BaseException as error:
        for backend in (serial, debugcon, hvc):
            if backend is not None:
                backend.close()  # a terminal must not stay raw
        if isinstance(error, ValueError):
            raise UsageError(str(error)) from error
        raise


def _wait(options: argparse.Namespace, machine: Machine, result: Result, watch: Watch) -> None:
    from kvmpy.cli.metrics import MetricsFile

    result.backend, result.backend_reason = machine.backend, machine.backend_reason
    result.image_format = machine.entry.format
    start = time.monotonic()
    try:
        with machine, MetricsFile(machine, options.metrics), watch(machine):
            try:
                outcome = machine.wait(options.timeout)
            except TimeoutError:
                machine.stop()
                machine.wait(STOP_SECONDS)
                result.ended("timeout")
            else:
                code = outcome.code if outcome.reason == "debug-exit" else None
                if code is not None and options.run is not None:
                    code >>= 1  # the device gave (value << 1) | 1, the command's status was the value
                result.ended(outcome.reason, code)
            finally:
                result.seconds = time.monotonic() - start
                result.count(machine)
    finally:
        if (debugcon := machine.config.debugcon) is not None:
            debugcon.close()


def _introduce(options: argparse.Namespace, machine: Machine) -> None:
    from kvmpy.chardev import Pty, Stdio

    serial = machine.config.console
    if isinstance(serial, Pty):
        tell(f"the serial console is {serial.path}")  # without it nobody could use it, so also with -q
    elif options.serial.startswith("unix:") and not options.quiet:
        tell(f"the serial console is the socket {options.serial.removeprefix('unix:')}")
    if isinstance(serial, Stdio) and serial.raw and not (options.quiet or options.json):
        tell(f"{machine.backend} engine ({machine.backend_reason}); Ctrl-A X quits")


def _tell(options: argparse.Namespace, result: Result, describe: Any) -> None:
    sys.stdout.flush()
    if options.json:
        stream = sys.stderr if options.serial == "stdio" else sys.stdout
        print(result.as_json(describe), file=stream, flush=True)
        if stream is sys.stderr:
            return
    if result.error is not None:
        tell(describe(result.error))
        if report := getattr(result.error, "report", ""):
            print(report, file=sys.stderr, flush=True)
    elif (sentence := result.sentence()) and not options.quiet:
        tell(sentence)


def _exit_port() -> int:
    from kvmpy.arch import layout

    return layout.PORT_DEBUG_EXIT


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a run as Ctrl-C does: the terminal restored, the files closed."""


def _terminate(signal_number: int, frame: FrameType | None) -> None:
    raise _Terminated
