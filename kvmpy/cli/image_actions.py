# SPDX-License-Identifier: Apache-2.0
"""What `kvmpy image` does; the grammar is in image.py. Each function takes the parsed words and returns the
exit status.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvmpy.cli import status
from kvmpy.cli.text import tell

_SIZE = re.compile(r"(0x[0-9a-fA-F]{1,16}|[0-9]{1,19}(?:\.[0-9]{1,9})?)([bBkKmMgGtTpPeE]?)")
_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50, "e": 1 << 60}


def parse_size(text: str) -> int:
    """Bytes from "10G" and the like; ValueError otherwise."""
    found = _SIZE.fullmatch(text)
    if not found:
        raise ValueError(f"size {text!r} is not a number with an optional k, M, G, T, P or E")
    number, unit = found.groups()
    value = float(number) if "." in number else int(number, 0 if number[:2] == "0x" else 10)
    return int(value * _UNITS[unit.lower()])


def parse_options(texts: Sequence[str], known: dict[str, Any]) -> dict[str, Any]:
    """`name=value,...` as the options of a format; `known` has their names and defaults."""
    found: dict[str, Any] = {}
    for item in ",".join(texts).split(",") if texts else ():
        name, _, value = item.partition("=")
        if name not in known:
            raise ValueError(f"no option {name!r} (there are: {', '.join(known) or 'none'})")
        default = known[name]
        if isinstance(default, bool):
            if value not in ("on", "off", ""):
                raise ValueError(f"option {name} is on or off, not {value!r}")
            found[name] = value != "off"
        elif isinstance(default, int):
            found[name] = parse_size(value)
        else:
            found[name] = value
    return found


def human(size: int) -> str:
    """A size for people."""
    value, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if value < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{value:.3g} {unit}"


def _follow(options: argparse.Namespace) -> Any:
    from kvmpy.block import Follow

    return Follow(*options.follow)


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=4))


def info(options: argparse.Namespace) -> int:
    from kvmpy.block.describe import describe_image

    follow, path, format = _follow(options), Path(options.file), options.format
    chain = [describe_image(path, format, follow=follow)]
    while options.backing_chain and "backing-filename" in chain[-1]:
        follow = follow.deeper()
        file = follow.open(chain[-1]["backing-filename"], path.absolute().parent, True, "backing file")
        file.close()
        path = Path(file.path)
        chain.append(describe_image(path, chain[-1].get("backing-filename-format"), follow=follow))
    if options.output == "json":
        _print_json(chain if options.backing_chain else chain[0])
    else:
        print("\n\n".join(_info_text(one) for one in chain))
    return status.OK


def _info_text(about: dict[str, Any]) -> str:
    size = about["virtual-size"]
    lines = [
        f"image: {about['filename']}",
        f"file format: {about['format']}",
        f"virtual size: {human(size)} ({size} bytes)",
    ]
    if "actual-size" in about:
        lines.append(f"disk size: {human(about['actual-size'])}")
    if "cluster-size" in about:
        lines.append(f"cluster_size: {about['cluster-size']}")
    if "backing-filename" in about:
        lines.append(f"backing file: {about['backing-filename']}")
        lines.append(f"backing file format: {about.get('backing-filename-format', '(not named)')}")
    if "snapshots" in about:
        lines += ["Snapshot list:", _snapshot_table(about["snapshots"])]
    if "format-specific" in about:
        lines.append("Format specific information:")
        lines += _details(about["format-specific"]["data"], "    ")
    return "\n".join(lines)


def _details(value: dict[str, Any] | list[Any], indent: str) -> list[str]:
    """Nested values, a level per indentation, items of a list by number."""
    lines = []
    pairs = value.items() if isinstance(value, dict) else ((f"[{i}]", one) for i, one in enumerate(value))
    for key, one in pairs:
        name = f"{indent}{key.replace('-', ' ')}:"
        if isinstance(one, dict | list):
            lines += [name, *_details(one, indent + "    ")]
        else:
            lines.append(f"{name} {str(one).lower() if isinstance(one, bool) else one}")
    return lines


def _snapshot_table(snapshots: list[dict[str, Any]]) -> str:
    lines = [f"{'ID':<10}{'TAG':<24}{'VM SIZE':>10}  {'DATE':<20}{'VM CLOCK':>13}"]
    for one in snapshots:
        date = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["date-sec"]))
        seconds = one["vm-clock-sec"]
        minutes, millis = seconds // 60, one["vm-clock-nsec"] // 10**6
        clock = f"{minutes // 60:02}:{minutes % 60:02}:{seconds % 60:02}.{millis:03}"
        lines.append(f"{one['id']:<10}{one['name']:<24}{human(one['vm-state-size']):>10}  {date:<20}{clock:>13}")
    return "\n".join(lines)


def _show_options(format: str) -> int:
    from kvmpy.block.formats import creation_options

    print(f"Options of {format}:")
    for name, default in creation_options(format).items():
        text = {True: "on", False: "off"}.get(default, default) if isinstance(default, bool) else default
        print(f"  {name:<18} default: {'none' if text is None else text}")
    return status.OK


def create(options: argparse.Namespace) -> int:
    from kvmpy.block import create_disk, open_disk
    from kvmpy.block.formats import creation_options

    if options.options == ["help"]:
        return _show_options(options.format)
    known = creation_options(options.format)
    chosen = parse_options(options.options, {**known, "size": 0})
    size = chosen.pop("size", None)
    if options.size is not None:
        size = parse_size(options.size)
    for name, value in (("backing_file", options.backing), ("backing_fmt", options.backing_format)):
        if value is not None:
            if name not in known:
                raise ValueError(f"format {options.format} has no backing files")
            chosen[name] = value
    backing = chosen.get("backing_file")
    if backing is not None and chosen.get("backing_fmt") is None:
        raise ValueError("a backing file needs its format named (-F)")
    if backing is not None and not options.unchecked:
        # Named by the user here, not by an image: it may be anywhere.
        path = Path(options.file).absolute().parent / backing
        with open_disk(path, chosen["backing_fmt"], readonly=True, backing=False, follow=_follow(options)) as disk:
            size = disk.size if size is None else size
    if size is None:
        raise ValueError("the size is missing")
    create_disk(options.file, options.format, size, **chosen)
    if not options.quiet:
        print(f"Formatting '{options.file}', fmt={options.format} size={size}")
    return status.OK


def convert(options: argparse.Namespace) -> int:
    from kvmpy.block import Qcow2Disk, create_disk, open_disk
    from kvmpy.block import convert as copy
    from kvmpy.block.formats import creation_options

    if options.options == ["help"]:
        return _show_options(options.target_format)
    known = {} if options.exists else creation_options(options.target_format)
    chosen = parse_options(options.options, known)
    if "backing_file" in chosen:
        raise ValueError("convert copies all data, so the copy has no backing file; use create -b for an overlay")
    follow = _follow(options)
    sparse = parse_size(options.sparse)
    with open_disk(options.source, options.format, readonly=True, follow=follow) as source:
        if options.snapshot is not None:
            if not isinstance(source, Qcow2Disk):
                raise ValueError("only qcow2 images have internal snapshots")
            source.view_snapshot(options.snapshot)
        if not options.exists:
            create_disk(options.target, options.target_format, source.size, **chosen)
            if chosen.get("data_file") is not None:
                follow = type(follow)(*follow.folders, Path(options.target).absolute().parent)
        unsafe = options.cache == "unsafe"
        with open_disk(options.target, options.target_format, follow=follow, unsafe=unsafe) as target:
            copy(
                source,
                target,
                compress=options.compress,
                target_is_zero=not options.exists and sparse > 0 and _is_blank(target),
                sparse_size=sparse,
                workers=options.workers,
                progress=_progress if options.progress and not options.quiet else None,
            )
            target.flush()
    if options.progress and not options.quiet:
        print("\r    (100.00/100%)")
    return status.OK


def _is_blank(target: Any) -> bool:
    """A new file reads as zeroes; a block device has whatever it had."""
    import stat

    return not stat.S_ISBLK(Path(target.path).stat().st_mode)


def _progress(done: int, size: int) -> None:
    print(f"\r    ({100 * done / max(size, 1):.2f}/100%)", end="", flush=True)


def _named(options: argparse.Namespace) -> None:
    if options.format is None:
        raise ValueError(f"{options.file} is written to, so its format must be named (-f)")


def check(options: argparse.Namespace) -> int:
    from kvmpy.block.formats import probe_format
    from kvmpy.block.hostfile import HostFile
    from kvmpy.block.qcow2 import check as check_image

    if options.repair:
        _named(options)
    format = options.format or probe_format(options.file)
    if format != "qcow2":
        tell(f"format {format} has no check")
        return 63
    with HostFile.open(options.file, readonly=options.repair is None) as file:
        result = check_image(file, repair=options.repair)
    about = {
        "filename": options.file,
        "format": format,
        "check-errors": result.check_errors,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "corruptions-fixed": result.corruptions_fixed,
        "leaks-fixed": result.leaks_fixed,
        "stale-flags": result.stale_flags,
        "image-end-offset": result.image_end_offset,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
    }
    if options.output == "json":
        _print_json(about)
    elif not options.quiet:
        for text in result.messages:
            print(text)
        if result.corruptions_fixed or result.leaks_fixed:
            print(f"Repaired: {result.leaks_fixed} leaked clusters, {result.corruptions_fixed} corruptions.")
        if result.clean:
            print("No errors were found on the image.")
        else:
            print(f"{result.corruptions} errors, {result.leaks} leaks, {result.stale_flags} stale flags.")
        used, total = result.allocated_clusters, result.total_clusters
        percent = 100 * used / max(1, total)
        print(f"{used}/{total} = {percent:.2f}% allocated, {result.compressed_clusters} compressed clusters")
        print(f"Image end offset: {result.image_end_offset}")
    return 1 if result.check_errors else 2 if result.corruptions else 0 if result.clean else 3


def snapshot(options: argparse.Namespace) -> int:
    from kvmpy.block import Qcow2Disk, open_disk
    from kvmpy.block.describe import describe_image

    writes = options.create or options.apply or options.delete
    if not writes:
        found = describe_image(options.file, options.format).get("snapshots", [])
        if options.output == "json":
            _print_json(found)
        elif found:
            print("Snapshot list:")
            print(_snapshot_table(found))
        return status.OK
    _named(options)
    # Snapshots are of this layer alone; its backing file need not be there.
    with open_disk(options.file, options.format, follow=_follow(options), backing=False) as disk:
        if not isinstance(disk, Qcow2Disk):
            raise ValueError("only qcow2 images have internal snapshots")
        if options.create:
            disk.snapshots.create(options.create)
        elif options.apply:
            disk.snapshots.apply(options.apply)
        else:
            disk.snapshots.delete(options.delete)
    return status.OK


def resize(options: argparse.Namespace) -> int:
    from kvmpy.block import Qcow2Disk, open_disk
    from kvmpy.block.raw import RawDisk

    _named(options)
    with open_disk(options.file, options.format, follow=_follow(options)) as disk:
        text = options.size
        size = parse_size(text.lstrip("+-"))
        if text.startswith("+"):
            size = disk.size + size
        elif text.startswith("-"):
            size = disk.size - size
        if size < 0:
            raise ValueError(f"the disk has only {disk.size} bytes")
        if not isinstance(disk, Qcow2Disk | RawDisk):
            raise ValueError(f"images of format {options.format} cannot be resized")
        if size < disk.size and not options.shrink:
            raise ValueError(f"{size} bytes are fewer than {disk.size}: --shrink if the rest may be lost")
        disk.resize(size, shrink=options.shrink)
    if not options.quiet:
        print("Image resized.")
    return status.OK


def map(options: argparse.Namespace) -> int:
    from kvmpy.block import open_disk
    from kvmpy.block.describe import map_disk

    start = parse_size(options.start_offset)
    length = None if options.max_length is None else parse_size(options.max_length)
    with open_disk(options.file, options.format, readonly=True, follow=_follow(options)) as disk:
        entries = map_disk(disk, start, length)
        if options.output == "json":
            print("[" + ",\n".join(json.dumps(one.as_dict()) for one in entries) + "]")
            return status.OK
        print(f"{'Offset':<16}{'Length':<16}{'Mapped to':<16}File")
        for one in entries:
            if one.data and one.compressed:
                tell(f"{one.start:#x}: compressed data has no place of its own (use --output=json)")
            elif one.data and one.offset is not None:
                print(f"{one.start:<#16x}{one.length:<#16x}{one.offset:<#16x}{one.filename}")
    return status.OK
