# SPDX-License-Identifier: Apache-2.0
"""`kvmpy image`: disk images, in qemu-img's words."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from kvmpy.cli import image_actions, status
from kvmpy.cli.text import tell

EPILOG = """\
examples:
  kvmpy image create -f qcow2 disk.qcow2 20G
  kvmpy image create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2
  kvmpy image convert -p -f raw -O qcow2 -c disk.raw disk.qcow2
  kvmpy image convert -f qcow2 -O raw --follow . overlay.qcow2 disk.raw
  kvmpy image check -f qcow2 -r all disk.qcow2
  kvmpy image snapshot -f qcow2 -c before-upgrade disk.qcow2
  kvmpy image map --output=json disk.qcow2

Files that an image names (backing files, data files, extents) are opened only in folders given by --follow.
"""
_CHECK_STATUS = """\
exit status: 0 clean, 1 the check could not be made, 2 the image is corrupt, 3 only leaks,
63 the format has no check
"""


def add_parser(commands: Any) -> None:
    """Add `image` to the command line."""
    parser = commands.add_parser(
        "image",
        help="make, convert, check and change disk images",
        description="Disk images: raw, qcow2, vdi, vmdk.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_actions(parser)
    parser.set_defaults(function=run)


def main(arguments: Sequence[str] | None = None) -> int:
    """`kvmpy image` as a command of its own; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="kvmpy image",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _add_actions(parser)
    return run(parser.parse_args(arguments))


def _add_actions(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, what: str, function: Any, epilog: str | None = None) -> argparse.ArgumentParser:
        one: argparse.ArgumentParser = actions.add_parser(
            name,
            help=what,
            description=what,
            epilog=epilog,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        one.set_defaults(act=function)
        one.add_argument("-q", dest="quiet", action="store_true", help="print nothing but errors")
        one.add_argument(
            "--follow",
            metavar="DIR",
            action="append",
            default=[],
            help="files in DIR may be opened if the image names them",
        )
        return one

    def source_format(one: argparse.ArgumentParser, writes: bool = False) -> None:
        rule = "must be given to write to the image" if writes else "recognised if left out"
        one.add_argument("-f", dest="format", metavar="FMT", help=f"format of the image; {rule}")

    def output(one: argparse.ArgumentParser) -> None:
        one.add_argument("--output", choices=("human", "json"), default="human")

    info = action("info", "say what an image is", image_actions.info)
    source_format(info)
    output(info)
    info.add_argument("--backing-chain", action="store_true", help="and its backing files, as far as --follow allows")
    info.add_argument("file")

    create = action("create", "make an image", image_actions.create)
    create.add_argument("-f", dest="format", metavar="FMT", default="raw", help="raw (default), qcow2, vdi or vmdk")
    create.add_argument("-b", dest="backing", metavar="FILE", help="backing file (relative to the new image)")
    create.add_argument("-F", dest="backing_format", metavar="FMT", help="its format; must be given with -b")
    create.add_argument("-u", dest="unchecked", action="store_true", help="do not open the backing file (needs SIZE)")
    create.add_argument(
        "-o",
        dest="options",
        metavar="NAME=VALUE,...",
        action="append",
        default=[],
        help="format options; -o help lists them",
    )
    create.add_argument("file")
    create.add_argument("size", nargs="?", help="bytes, or with k, M, G, T; default: the backing file's")

    convert = action("convert", "copy an image into another format", image_actions.convert)
    source_format(convert)
    convert.add_argument("-O", dest="target_format", metavar="FMT", default="raw", help="format of the copy (raw)")
    convert.add_argument("-c", dest="compress", action="store_true", help="compress (qcow2)")
    convert.add_argument(
        "-o",
        dest="options",
        metavar="NAME=VALUE,...",
        action="append",
        default=[],
        help="format options of the copy",
    )
    convert.add_argument("-l", dest="snapshot", metavar="SNAPSHOT", help="copy this internal snapshot (qcow2)")
    convert.add_argument("-n", dest="exists", action="store_true", help="write into an existing target")
    convert.add_argument("-p", dest="progress", action="store_true", help="show progress")
    convert.add_argument("-m", dest="workers", metavar="N", type=int, help="how many pieces to copy at a time")
    convert.add_argument(
        "-S",
        dest="sparse",
        metavar="SIZE",
        default="4k",
        help="runs of zeroes from this size on become holes (4k; 0: none)",
    )
    convert.add_argument(
        "-t",
        dest="cache",
        choices=("unsafe", "writeback"),
        default="unsafe",
        help="writeback: wait until the copy is on disk",
    )
    convert.add_argument("source")
    convert.add_argument("target")

    check = action("check", "look for damage in an image, and repair it", image_actions.check, _CHECK_STATUS)
    source_format(check, writes=True)
    output(check)
    check.add_argument("-r", dest="repair", choices=("leaks", "all"), help="repair leaks only, or all that can be")
    check.add_argument("file")

    snapshot = action("snapshot", "list, make, apply or delete internal snapshots (qcow2)", image_actions.snapshot)
    source_format(snapshot, writes=True)
    output(snapshot)
    which = snapshot.add_mutually_exclusive_group()
    which.add_argument("-l", dest="list", action="store_true", help="list (the default)")
    which.add_argument("-c", dest="create", metavar="NAME", help="make")
    which.add_argument("-a", dest="apply", metavar="NAME", help="go back to")
    which.add_argument("-d", dest="delete", metavar="NAME", help="delete")
    snapshot.add_argument("file")

    resize = action("resize", "change the size of the disk", image_actions.resize)
    source_format(resize, writes=True)
    resize.add_argument("--shrink", action="store_true", help="allow to lose what is behind the new end")
    resize.add_argument("file")
    resize.add_argument("size", help="bytes, or with k, M, G, T; +SIZE and -SIZE are relative")

    mapping = action("map", "say where the data of an image stands", image_actions.map)
    source_format(mapping)
    output(mapping)
    mapping.add_argument("-s", "--start-offset", metavar="SIZE", default="0")
    mapping.add_argument("-l", "--max-length", metavar="SIZE")
    mapping.add_argument("file")


def run(options: argparse.Namespace) -> int:
    """Do what the words say."""
    try:
        code: int = options.act(options)
        return code
    except (ValueError, KeyError) as error:
        from kvmpy.errors import KvmpyError

        if isinstance(error, KvmpyError):
            raise
        tell(str(error.args[0] if error.args else error))
        return status.USAGE


if __name__ == "__main__":
    sys.exit(main())
