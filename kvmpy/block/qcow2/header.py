# SPDX-License-Identifier: Apache-2.0
"""The qcow2 header: parsing with every limit enforced, and writing it back (QEMU docs/interop/qcow2.txt,
"Header").
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

from kvmpy.block.hostfile import HostFile
from kvmpy.errors import ImageError

MAGIC = 0x514649FB
_V2 = struct.Struct(">IIQIIQIIQQIIQ")  # 72 bytes
_V3 = struct.Struct(">QQQII")  # 72..104
V3_LENGTH = 112  # with compression_type and padding

MIN_CLUSTER_BITS, MAX_CLUSTER_BITS = 9, 21
MAX_L1 = 32 << 20  # bytes
MAX_REFCOUNT_TABLE = 8 << 20  # bytes
MAX_SNAPSHOTS = 65536
MAX_OFFSET = 1 << 56

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << n for n in range(5))
KNOWN_INCOMPATIBLE = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2
LAZY_REFCOUNTS = 1
BITMAPS, RAW_EXTERNAL = 1, 2  # autoclear

EXT_END, EXT_BACKING_FORMAT, EXT_FEATURES = 0, 0xE2792ACA, 0x6803F857
EXT_BITMAPS, EXT_LUKS, EXT_DATA_FILE = 0x23852875, 0x0537BE77, 0x44415441

ZLIB, ZSTD = 0, 1
COMPRESSION_NAMES = {ZLIB: "zlib", ZSTD: "zstd"}

# (0 incompatible, 1 compatible, 2 autoclear; bit; name), written so that others can name what they miss
_FEATURES = (
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
)


@dataclass
class Header:
    """The fields, under the specification's names, and the header extensions in their order."""

    version: int = 3
    cluster_bits: int = 16
    size: int = 0
    crypt_method: int = 0
    l1_size: int = 0
    l1_table_offset: int = 0
    refcount_table_offset: int = 0
    refcount_table_clusters: int = 0
    nb_snapshots: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression_type: int = ZLIB
    backing_file: str | None = None
    extensions: list[tuple[int, bytes]] = field(default_factory=list)
    tail: bytes = b""  # header fields of later versions, kept as they are

    @property
    def cluster_size(self) -> int:
        return 1 << self.cluster_bits

    @property
    def lazy_refcounts(self) -> bool:
        return bool(self.compatible & LAZY_REFCOUNTS)

    @property
    def raw_external(self) -> bool:
        return bool(self.incompatible & DATA_FILE and self.autoclear & RAW_EXTERNAL)

    @property
    def extended_l2(self) -> bool:
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def backing_format(self) -> str | None:
        return self._text(EXT_BACKING_FORMAT)

    @property
    def data_file(self) -> str | None:
        return self._text(EXT_DATA_FILE)

    @property
    def l2_span(self) -> int:
        """Bytes of the disk that one L2 table maps."""
        return self.cluster_size * (self.cluster_size // (16 if self.extended_l2 else 8))

    def l1_entries(self, size: int) -> int:
        """L1 entries that a disk of `size` bytes needs; ValueError beyond the limit."""
        entries = -(-size // self.l2_span)
        if entries * 8 > MAX_L1:
            limit = MAX_L1 // 8 * self.l2_span
            raise ValueError(
                f"{size} bytes are too many for clusters of {self.cluster_size} bytes, whose limit is {limit}"
            )
        return entries

    def extension(self, kind: int) -> bytes | None:
        return next((data for found, data in self.extensions if found == kind), None)

    def set_extension(self, kind: int, data: bytes | None) -> None:
        """Replace, add or (None) remove an extension."""
        self.extensions = [one for one in self.extensions if one[0] != kind]
        if data is not None:
            self.extensions.append((kind, data))

    def _text(self, kind: int) -> str | None:
        data = self.extension(kind)
        return None if data is None else data.decode("utf-8", "surrogateescape")

    def pack(self) -> bytes:
        """The first cluster of the image; ValueError if it does not fit."""
        name = (self.backing_file or "").encode("utf-8", "surrogateescape")
        if len(name) > 1023:
            raise ValueError(f"the backing file's name has {len(name)} bytes, the limit is 1023")
        body = b""
        if self.version >= 3:
            length = V3_LENGTH + len(self.tail)
            body = _V3.pack(self.incompatible, self.compatible, self.autoclear, self.refcount_order, length)
            body += bytes((self.compression_type,)) + bytes(7) + self.tail
        for kind, data in self.extensions:
            body += struct.pack(">II", kind, len(data)) + data + bytes(-len(data) % 8)
        body += struct.pack(">II", EXT_END, 0)
        offset = _V2.size + len(body) if name else 0
        fixed = _V2.pack(
            MAGIC,
            self.version,
            offset,
            len(name),
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_table_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.nb_snapshots,
            self.snapshots_offset,
        )
        whole = fixed + body + name
        if len(whole) > self.cluster_size:
            raise ValueError(f"the header needs {len(whole)} bytes, a cluster has {self.cluster_size}")
        return whole + bytes(self.cluster_size - len(whole))

    @classmethod
    def parse(cls, file: HostFile) -> Header:
        """Read and check the header of an image; ImageError with the offset of what is wrong."""
        raw = file.pread(0, _V2.size)
        (
            magic,
            version,
            backing_offset,
            backing_length,
            bits,
            size,
            crypt,
            l1_size,
            l1_offset,
            rt_offset,
            rt_clusters,
            snapshots,
            snapshots_offset,
        ) = _V2.unpack(raw)
        if magic != MAGIC:
            raise ImageError("not a qcow2 image: wrong magic", 0)
        if version not in (2, 3):
            raise ImageError(f"qcow2 version {version} is not supported (2 and 3 are)", 4)
        if not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
            raise ImageError(f"cluster_bits {bits} is not within {MIN_CLUSTER_BITS}..{MAX_CLUSTER_BITS}", 20)
        header = cls(
            version,
            bits,
            size,
            crypt,
            l1_size,
            l1_offset,
            rt_offset,
            rt_clusters,
            snapshots,
            snapshots_offset,
        )
        length = _V2.size
        if version >= 3:
            length = header._parse_v3(file)
        header._parse_extensions(file, length, backing_offset)
        if backing_offset:
            room = min(1023, header.cluster_size - backing_offset)
            if backing_offset < length or backing_length > room:
                raise ImageError(f"the backing file's name ({backing_length} bytes) is not inside the header", 8)
            header.backing_file = file.pread(backing_offset, backing_length).decode("utf-8", "surrogateescape")
        header._check()
        return header

    def _parse_v3(self, file: HostFile) -> int:
        raw = file.pread(72, _V3.size)
        self.incompatible, self.compatible, self.autoclear, self.refcount_order, header_length = _V3.unpack(raw)
        length = int(header_length)
        if length < 104 or length % 8 or length > self.cluster_size:
            raise ImageError(f"header_length {length} is not a multiple of 8 within 104..{self.cluster_size}", 100)
        if self.refcount_order > 6:
            raise ImageError(f"refcount_order {self.refcount_order} is more than 6 (64 bits)", 96)
        if length > 104:
            self.compression_type = file.pread(104, 1)[0]
        if length > V3_LENGTH:
            self.tail = file.pread(V3_LENGTH, length - V3_LENGTH)
        return length

    def _parse_extensions(self, file: HostFile, at: int, backing_offset: int) -> None:
        end = min(self.cluster_size, backing_offset or self.cluster_size)
        raw = file.pread_some(0, end)
        while at + 8 <= end and at + 8 <= len(raw):
            kind, length = struct.unpack_from(">II", raw, at)
            if kind == EXT_END:
                return
            at += 8
            if length > end - at or at + length > len(raw):
                raise ImageError(f"header extension {kind:#x} of {length} bytes runs out of the header", at - 8)
            self.extensions.append((kind, raw[at : at + length]))
            at += length + -length % 8

    def _check(self) -> None:
        unknown = self.incompatible & ~KNOWN_INCOMPATIBLE
        if unknown:
            names = ", ".join(self._feature_names(unknown))
            raise ImageError(f"the image needs features that are not supported: {names}", 72)
        if self.crypt_method or self.extension(EXT_LUKS) is not None:
            name = {1: "AES", 2: "LUKS"}.get(self.crypt_method, f"method {self.crypt_method}")
            raise ImageError(f"encrypted images ({name}) are not supported; qemu-nbd can serve them", 32)
        if bool(self.incompatible & COMPRESSION) != (self.compression_type != ZLIB):
            raise ImageError("compression type and its feature bit contradict each other", 104)
        if self.compression_type not in COMPRESSION_NAMES:
            raise ImageError(f"compression type {self.compression_type} is not supported", 104)
        if self.extended_l2 and self.cluster_bits < 14:
            raise ImageError(f"extended L2 entries need clusters of 16 KiB and more, not {self.cluster_size} bytes", 20)
        if self.incompatible & DATA_FILE and self.nb_snapshots:
            raise ImageError("an image with an external data file cannot have internal snapshots", 60)
        mask = self.cluster_size - 1
        self._check_table("L1 table", self.l1_table_offset, self.l1_size * 8, MAX_L1, 40)
        self._check_table(
            "refcount table",
            self.refcount_table_offset,
            self.refcount_table_clusters << self.cluster_bits,
            MAX_REFCOUNT_TABLE,
            48,
        )
        if not self.refcount_table_clusters or not self.refcount_table_offset:
            raise ImageError("the image has no refcount table", 48)
        if self.nb_snapshots > MAX_SNAPSHOTS:
            raise ImageError(f"{self.nb_snapshots} snapshots are more than {MAX_SNAPSHOTS}", 60)
        if self.nb_snapshots and (self.snapshots_offset & mask or self.snapshots_offset >= MAX_OFFSET):
            raise ImageError(f"the snapshot table's offset {self.snapshots_offset:#x} is not possible", 64)
        if self.size >= 1 << 63:
            raise ImageError(f"a disk of {self.size} bytes is too large", 24)
        try:
            needed = self.l1_entries(self.size)
        except ValueError as error:
            raise ImageError(str(error), 24) from None
        if self.l1_size < needed:
            raise ImageError(f"the L1 table has {self.l1_size} entries, the disk needs {needed}", 36)

    def _check_table(self, name: str, offset: int, length: int, limit: int, where: int) -> None:
        if length > limit:
            raise ImageError(f"the {name} has {length} bytes, the limit is {limit}", where)
        if offset & (self.cluster_size - 1) or offset >= MAX_OFFSET or (length and offset < self.cluster_size):
            raise ImageError(f"the {name}'s offset {offset:#x} is not possible", where)

    def _feature_names(self, bits: int) -> list[str]:
        table = self.extension(EXT_FEATURES) or b""
        known = {}
        for at in range(0, len(table) - 47, 48):
            if table[at] == 0:
                known[table[at + 1]] = table[at + 2 : at + 48].rstrip(b"\0").decode("ascii", "replace")
        return [known.get(n, f"incompatible bit {n}") for n in range(64) if bits >> n & 1]


def feature_table() -> bytes:
    """The feature name table extension."""
    return b"".join(bytes((kind, bit)) + name.encode().ljust(46, b"\0") for kind, bit, name in _FEATURES)
