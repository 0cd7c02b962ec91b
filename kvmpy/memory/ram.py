# SPDX-License-Identifier: Apache-2.0
"""Ram: what backs guest memory, namely host memory of four kinds."""

from __future__ import annotations

import fcntl
import mmap
import os
from typing import TYPE_CHECKING, Literal, Self

from kvmpy.memory._mapping import Mapping

if TYPE_CHECKING:
    from typing_extensions import Buffer

PAGE = 4096
MIB2 = 1 << 21
HUGE_SHIFT = {"2M": 21, "1G": 30}

MFD_HUGE_SHIFT = 26        # <linux/memfd.h>
MADV_POPULATE_WRITE = 23   # <asm-generic/mman-common.h>, Linux 5.14

# madvise(2) advices that make sense for guest memory, by the manual page's names.
ADVICE = {
    "hugepage": mmap.MADV_HUGEPAGE,
    "nohugepage": mmap.MADV_NOHUGEPAGE,
    "mergeable": mmap.MADV_MERGEABLE,
    "unmergeable": mmap.MADV_UNMERGEABLE,
    "dontdump": mmap.MADV_DONTDUMP,
    "dodump": mmap.MADV_DODUMP,
    "dontfork": mmap.MADV_DONTFORK,
    "dofork": mmap.MADV_DOFORK,
    "willneed": mmap.MADV_WILLNEED,
    "populate": MADV_POPULATE_WRITE,
}

HugePages = Literal["2M", "1G", "thp"]
Kind = Literal["anonymous", "memfd", "file"]


class Ram(Mapping):
    """Host memory that a guest can be given: `Ram.anonymous`, `.memfd`, `.file`, `.from_fd`, `.from_bytes`.

    It is a buffer: `memoryview(ram)` and `numpy.frombuffer(ram, "u1")` see it without a copy. It is unmapped
    by `close()` or when nothing refers to it any more, never while a view or a guest memory region uses it
    (`close()` then raises BufferError). Access through `kvmpy.memory.GuestMemory` is by guest address;
    the methods here take offsets.
    """

    kind: Kind
    shared: bool
    page_size: int
    fd: int

    def __init__(
        self,
        size: int,
        *,
        fd: int = -1,
        offset: int = 0,
        shared: bool = False,
        readonly: bool = False,
        hugetlb_shift: int = 0,
        align: int = PAGE,
    ) -> None:
        # The mapping itself is made by Mapping.__cinit__ from the same arguments.
        self.kind = "anonymous" if fd < 0 else "file"
        self.shared = shared
        self.page_size = 1 << hugetlb_shift if hugetlb_shift else PAGE
        self.offset = offset
        self.fd = -1 if fd < 0 else fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3)

    # -- the kinds

    @classmethod
    def anonymous(cls, size: int, huge_pages: HugePages | None = None) -> Self:
        """Zeroed memory that belongs to this process alone.

        size: bytes, a multiple of the page size. huge_pages: "2M" or "1G" takes pages of the hugetlb pool
        (reserved now: OSError ENOMEM when the pool is short); "thp" asks the kernel for transparent 2 MiB
        pages where it has some. Source: mmap(2), Documentation/admin-guide/mm/hugetlbpage.rst, transhuge.rst.
        """
        shift = _check_size(size, huge_pages)
        ram = cls(size, hugetlb_shift=shift, align=_alignment(size, shift))
        if huge_pages == "thp":
            ram.advise(mmap.MADV_HUGEPAGE)
        return ram

    @classmethod
    def memfd(cls, size: int, huge_pages: HugePages | None = None, name: str = "kvmpy-ram") -> Self:
        """Zeroed shared memory with a file descriptor (`.fd`) that other processes or mappings can use.

        Its size is sealed, so nobody can shorten the file under a running guest. Arguments and errors as
        `anonymous`; name: shown in /proc/PID/maps. Source: memfd_create(2).
        """
        shift = _check_size(size, huge_pages)
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING
        if shift:
            flags |= os.MFD_HUGETLB | shift << MFD_HUGE_SHIFT
        fd = os.memfd_create(name, flags)
        try:
            os.ftruncate(fd, size)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
            ram = cls(size, fd=fd, shared=True, hugetlb_shift=shift, align=_alignment(size, shift))
        finally:
            os.close(fd)
        ram.kind = "memfd"
        if huge_pages == "thp":
            ram.advise(mmap.MADV_HUGEPAGE)
        return ram

    @classmethod
    def file(
        cls,
        path: str | os.PathLike[str],
        size: int | None = None,
        *,
        offset: int = 0,
        shared: bool = True,
        readonly: bool = False,
        create: bool = False,
    ) -> Self:
        """Memory that is (a part of) a file.

        size: bytes, a multiple of 4096 (default: from `offset` to the end). shared: the guest's writes reach
        the file; False is copy-on-write. create: make or extend the file to `offset + size`, with its blocks
        allocated, so that a full disk is an OSError here and not a SIGBUS later. Whoever shortens the file
        while it is mapped kills this process (SIGBUS): use it on files of your own.
        Raises OSError; ValueError where the file is too short.
        """
        writes = shared and not readonly
        flags = os.O_CLOEXEC | (os.O_RDWR if writes or create else os.O_RDONLY)
        if create:
            flags |= os.O_CREAT
        fd = os.open(path, flags, 0o600)
        try:
            if create:
                if size is None:
                    raise ValueError("Ram.file(create=True) needs a size")
                _check_size(size, None)
                if os.fstat(fd).st_size < offset + size:
                    os.posix_fallocate(fd, offset, size)
            return cls.from_fd(fd, size, offset=offset, shared=shared, readonly=readonly)
        finally:
            os.close(fd)

    @classmethod
    def from_fd(
        cls, fd: int, size: int | None = None, *, offset: int = 0, shared: bool = True, readonly: bool = False
    ) -> Self:
        """Memory of an open file or memfd; `fd` is duplicated and stays the caller's. Arguments as `file`."""
        length = os.fstat(fd).st_size
        if offset < 0 or offset % PAGE:
            raise ValueError(f"file offset must be a multiple of {PAGE:#x}, not {offset:#_x}")
        if size is None:
            size = length - offset
        _check_size(size, None)
        if offset + size > length:
            raise ValueError(f"the file has {length:#_x} bytes, the memory needs {offset + size:#_x}")
        # Private pages of a file opened for reading can be written: that is the point of copy-on-write.
        return cls(size, fd=fd, offset=offset, shared=shared, readonly=readonly, align=_alignment(size, 0))

    @classmethod
    def from_bytes(cls, data: Buffer) -> Self:
        """Anonymous memory that starts with `data` and ends with zeros up to a whole page; for ROM images."""
        with memoryview(data).cast("B") as source:
            if not source.nbytes:
                raise ValueError("Ram.from_bytes() of no bytes")
            ram = cls(-(-source.nbytes // PAGE) * PAGE)
            ram.write(0, source)
        return ram

    # -- giving memory back, taking it early

    def hint(self, advice: str) -> None:
        """madvise(2) on all of it by name, one of `ADVICE`: "hugepage", "mergeable", "populate" ..."""
        if advice not in ADVICE:
            raise ValueError(f"no such advice: {advice!r} (one of {', '.join(ADVICE)})")
        self.advise(ADVICE[advice])

    def discard(self, offset: int, size: int) -> None:
        """Give the pages of [offset, offset + size) back to the host; they read as zeros afterwards.

        Both in bytes, multiples of `page_size`. In shared file memory this punches a hole in the file.
        Raises OSError; ValueError for a range that is not whole pages of it.
        """
        if offset < 0 or size <= 0 or (offset | size) % self.page_size or offset + size > self.size:
            raise ValueError(
                f"discard {size:#_x} bytes at {offset:#_x}: not whole pages of {self.page_size:#x} "
                f"in {self.size:#_x} bytes"
            )
        if self.shared:
            self.advise(mmap.MADV_REMOVE, offset, size)
        elif self.kind == "anonymous":
            self.advise(mmap.MADV_DONTNEED, offset, size)
        else:
            self.detach(offset, size)  # copy-on-write: dropping the copy would bring the file's bytes back

    def close(self) -> None:
        """Unmap it and close its descriptor; again is no error. Raises BufferError while it is in use."""
        super().close()
        if self.fd >= 0:
            fd, self.fd = self.fd, -1
            os.close(fd)

    def __del__(self) -> None:
        if getattr(self, "fd", -1) >= 0:
            os.close(self.fd)

    def __repr__(self) -> str:
        if self.closed:
            return "<Ram closed>"
        flags = (" shared" if self.shared else "") + (" read-only" if self.readonly else "")
        return f"<Ram {self.kind} {self.size:#_x} bytes{flags}>"


def _check_size(size: int, huge_pages: HugePages | None) -> int:
    if huge_pages not in (None, "thp", *HUGE_SHIFT):
        raise ValueError(f"huge_pages must be None, '2M', '1G' or 'thp', not {huge_pages!r}")
    shift = HUGE_SHIFT.get(huge_pages or "", 0)
    page = 1 << shift if shift else PAGE
    if size <= 0 or size % page:
        raise ValueError(f"memory size must be a positive multiple of {page:#_x}, not {size:#_x}")
    return shift


def _alignment(size: int, shift: int) -> int:
    # KVM maps 2 MiB pages only where guest and host address agree modulo 2 MiB.
    return 1 << shift if shift else MIB2 if size >= MIB2 else PAGE
