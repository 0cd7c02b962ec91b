# SPDX-License-Identifier: Apache-2.0
"""Writes inputs for fuzz_qcow2.c that are nearly right: images that kvmpy made, with the words of their headers."""

import random
import struct
import sys
import tempfile
from pathlib import Path

from kvmpy.block import create_disk, open_disk

VARIANTS = {
    "512": {"cluster_size": 512},
    "1k-v2": {"cluster_size": 1024, "compat": "0.10"},
    "4k-lazy": {"cluster_size": 4096, "lazy_refcounts": True},
    "2k-64bit": {"cluster_size": 2048, "refcount_bits": 64},
    "512-1bit": {"cluster_size": 512, "refcount_bits": 1},
    "extended": {"cluster_size": 16384, "extended_l2": True},
}
SIZE = 65536 - 1


def parameters(image, options):
    """The 32 bytes that fuzz_qcow2.c turns into what the header says."""
    bits = image[20:24]
    _, l1_offset, rt_offset, rt_clusters = struct.unpack(">IQQI", image[36:60])
    cluster = 1 << int.from_bytes(bits, "big")
    version = image[7]
    order = int.from_bytes(image[96:100], "big") if version == 3 else 4
    flags = (1 if options.get("lazy_refcounts") else 0) | 4 | (16 if options.get("extended_l2") else 0)
    numbers = [version - 2, int.from_bytes(bits, "big") - 9, order, flags, SIZE & 0xFF, SIZE >> 8 & 0xFF, SIZE >> 16, 0]
    numbers += [l1_offset // cluster - 1, 0, rt_offset // cluster - 1, rt_clusters - 1]
    return bytes(number & 0xFF for number in numbers).ljust(32, b"\x0f")


def main(folder):
    rng = random.Random(7)
    with tempfile.TemporaryDirectory() as temporary:
        for name, options in VARIANTS.items():
            path = Path(temporary) / name
            create_disk(path, "qcow2", SIZE + 1, **options)
            with open_disk(path, "qcow2") as disk:
                for _ in range(6):
                    disk.pwrite(rng.randrange(SIZE - 3000), rng.randbytes(2000))
            image = path.read_bytes()
            for number in range(3):
                requests = bytes(rng.randrange(256) for _ in range(64))
                (folder / f"{name}-{number}").write_bytes(parameters(image, options) + requests + image)


if __name__ == "__main__":
    main(Path(sys.argv[2]))  # the first word is the target: this is for one only
