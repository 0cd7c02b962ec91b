# SPDX-License-Identifier: Apache-2.0
"""What each stock guest is made of: packages of Debian's archive, and what is taken from them."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from kvmpy.guests import init, initramfs, modules
from kvmpy.guests.errors import PackageError

# Raise it when a recipe makes other files from the same packages; caches are then made anew.
REVISION = 3

STABLE = ("bookworm", "bookworm-updates", "bookworm-security")
BACKPORTS = ("bookworm-backports",)

# Those that a kernel lacks are left out, so one list serves every kernel.
MODULES = (
    "virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "virtio_balloon",
    "virtio_scsi", "virtio_input", "virtio_mem", "virtio_pmem", "virtio_iommu", "virtiofs",
    "vmw_vsock_virtio_transport", "vsock_loopback", "9p", "9pnet_virtio", "nvme", "ahci", "sd_mod", "sr_mod",
    "overlay", "erofs", "squashfs", "isofs", "vfat", "nls_ascii", "nls_cp437", "fuse", "loop", "tun", "veth",
    "bridge", "dm_mod", "button", "failover", "net_failover",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Ingredient:
    """A package that a guest needs.

    `key` is how the recipe calls it; `ask` is the name to look up in `suites`. If that is a metapackage, the
    package is the dependency whose name matches `pattern`. `licence` is SPDX.
    """

    key: str
    ask: str
    pattern: str
    licence: str
    suites: tuple[str, ...] = STABLE

    def fits(self, package: str) -> bool:
        return re.fullmatch(self.pattern, package) is not None


@dataclass(frozen=True, slots=True)
class Recipe:
    """A guest: what it needs, what it takes from the packages, how files are made of that.

    `take` filters the paths to unpack; `build(unpacked, out)` gets a directory of unpacked files per
    ingredient and an empty directory to fill; it returns role -> file.
    """

    name: str
    summary: str
    ingredients: tuple[Ingredient, ...]
    take: Callable[[str], bool]
    build: Callable[[Mapping[str, Path], Path], dict[str, Path]]
    cmdline: str = ""

    @property
    def identity(self) -> str:
        """Changes whenever the same packages would give other files."""
        parts = (REVISION, self.name, self.cmdline, [i.key for i in self.ingredients], init.SCRIPT, MODULES)
        import hashlib  # libcrypto is large, and most guests are made already

        return hashlib.sha256(repr(parts).encode()).hexdigest()[:10]


# earlyprintk: a kernel that dies early, as on a KVM that emulates ring 0, has said nothing otherwise.
LINUX_CMDLINE = "earlyprintk=ttyS0 console=ttyS0 panic=-1"

BUSYBOX = Ingredient("busybox", "busybox-static", r"busybox-static", "GPL-2.0-only")


def _kernel(pattern: str, suites: tuple[str, ...]) -> Ingredient:
    licence = "GPL-2.0-only WITH Linux-syscall-note"
    return Ingredient("linux", "linux-image-cloud-amd64", pattern, licence, suites)


def _take_linux(path: str) -> bool:
    return path.startswith(("boot/vmlinuz-", "boot/config-", "lib/modules/", "usr/lib/modules/")) or (
        path == "bin/busybox" or path == "usr/bin/busybox"
    )


def _build_linux(unpacked: Mapping[str, Path], out: Path) -> dict[str, Path]:
    linux = unpacked["linux"]
    kernel = _one(linux, "boot/vmlinuz-*")
    release = kernel.name.removeprefix("vmlinuz-")
    shutil.copyfile(kernel, out / "vmlinuz")
    shutil.copyfile(_one(linux, "boot/config-*"), out / "config")
    entries = _base(_one(unpacked["busybox"], "**/bin/busybox"))
    (out / "initrd.gz").write_bytes(initramfs.build(entries))

    tree = _one(linux, f"**/lib/modules/{release}")
    found = modules.load(tree, MODULES)
    entries |= {f"lib/modules/{release}/{path}": data for path, data in modules.files(found).items()}
    (out / "initrd-modules.gz").write_bytes(initramfs.build(entries))
    return {
        "kernel": out / "vmlinuz",
        "initrd": out / "initrd.gz",
        "initrd-modules": out / "initrd-modules.gz",
        "config": out / "config",
    }


def _base(busybox: Path) -> dict[str, initramfs.Source]:
    """The smallest root file system that kvmpy's init needs."""
    entries: dict[str, initramfs.Source] = {
        "init": initramfs.File(init.SCRIPT.encode(), 0o755),
        "bin/busybox": initramfs.File(busybox.read_bytes(), 0o755),
        # The kernel opens it for init before anything is mounted.
        "dev/console": initramfs.Device(5, 1),
        "dev/null": initramfs.Device(1, 3, 0o666),
        "etc/passwd": b"root:x:0:0:root:/root:/bin/sh\n",
        "etc/group": b"root:x:0:\n",
        "root": initramfs.Directory(0o700),
        "tmp": initramfs.Directory(0o1777),
    }
    for name in ("proc", "sys", "run", "sbin", "usr/bin", "usr/sbin", "mnt", "var"):
        entries[name] = initramfs.Directory()
    return entries


# mke2fs and e2fsck with the libraries that they load, for behind another initramfs.
E2FSPROGS = (
    Ingredient("e2fsprogs", "e2fsprogs", "e2fsprogs", "GPL-2.0-only"),
    Ingredient("libext2fs", "libext2fs2", "libext2fs2", "GPL-2.0-only AND LGPL-2.0-only"),
    Ingredient("libcom-err", "libcom-err2", "libcom-err2", "MIT"),
    Ingredient("libblkid", "libblkid1", "libblkid1", "LGPL-2.1-or-later"),
    Ingredient("libuuid", "libuuid1", "libuuid1", "BSD-3-Clause"),
    Ingredient("libc", "libc6", "libc6", "LGPL-2.1-or-later"),
)
E2FS_PROGRAMS = {"mke2fs": ("mkfs.ext4",), "e2fsck": ("fsck.ext4",), "resize2fs": (), "tune2fs": ()}
E2FS_LIBRARIES = ("libext2fs.so.2", "libe2p.so.2", "libcom_err.so.2", "libblkid.so.1", "libuuid.so.1", "libc.so.6")
LOADER = "ld-linux-x86-64.so.2"


def _take_e2fsprogs(path: str) -> bool:
    name = Path(path).name
    return name in E2FS_PROGRAMS or name == "mke2fs.conf" or (name.startswith(("ld-linux", "lib")) and ".so" in name)


def _build_e2fsprogs(unpacked: Mapping[str, Path], out: Path) -> dict[str, Path]:
    def find(name: str) -> bytes:
        # A library is a link to the file with its full version; the C library and the loader are files.
        found = sorted(path for tree in unpacked.values() for path in tree.rglob(name) if path.is_file())
        if not found:
            raise PackageError(f"no package has {name}")
        return found[0].read_bytes()

    entries: dict[str, initramfs.Source] = {"etc/mke2fs.conf": find("mke2fs.conf")}
    for program, others in E2FS_PROGRAMS.items():
        entries[f"usr/sbin/{program}"] = initramfs.File(find(program), 0o755)
        entries |= {f"usr/sbin/{other}": initramfs.Link(program) for other in others}
    for library in E2FS_LIBRARIES:
        entries[f"lib/x86_64-linux-gnu/{library}"] = initramfs.File(find(library), 0o755)
    entries[f"lib64/{LOADER}"] = initramfs.File(find(LOADER), 0o755)
    (out / "e2fsprogs.gz").write_bytes(initramfs.build(entries))
    return {"initrd": out / "e2fsprogs.gz"}


# libkrunfw is a library that holds a kernel as an image in memory; its function says where it belongs. It is called in
# a process of its own, which ends with it. The kernel becomes an ELF file, which says the same.
KRUN_SCRIPT = """\
import ctypes, struct, sys
function = ctypes.CDLL(sys.argv[1]).krunfw_get_kernel
function.restype = ctypes.c_void_p
load, entry, size = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_size_t()
data = ctypes.string_at(function(*map(ctypes.byref, (load, entry, size))), size.value)
magic = bytes.fromhex("7f454c46020101")
header = struct.pack("<16sHHIQQQIHHHHHH", magic, 2, 62, 1, entry.value, 64, 0, 0, 64, 56, 1, 0, 0, 0)
segment = struct.pack("<IIQQQQQQ", 1, 7, 4096, load.value, load.value, size.value, size.value, 4096)
open(sys.argv[2], "wb").write((header + segment).ljust(4096, b"\\0") + data)
"""


def _build_libkrunfw(unpacked: Mapping[str, Path], out: Path) -> dict[str, Path]:
    library = _one(unpacked["libkrunfw"], "**/libkrunfw.so.*.*.*")
    command = [sys.executable, "-I", "-c", KRUN_SCRIPT, str(library), str(out / "vmlinux")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        raise PackageError(f"{library.name} does not give its kernel: {done.stderr.strip()[-500:]}")
    return {"kernel": out / "vmlinux"}


def _take_seabios(path: str) -> bool:
    return path.startswith("usr/share/seabios/") and path.endswith(".bin")


def _build_seabios(unpacked: Mapping[str, Path], out: Path) -> dict[str, Path]:
    source = unpacked["seabios"] / "usr/share/seabios"
    # The one of 256 KiB moves its lower half down through a PCI host bridge; without one it fails.
    roles = {"bios": "bios.bin", "bios-256k": "bios-256k.bin", "bios-microvm": "bios-microvm.bin"}
    roles |= {path.stem: path.name for path in source.glob("vgabios-*.bin")}
    return {role: _copy(source / name, out) for role, name in sorted(roles.items())}


def _build_grub(unpacked: Mapping[str, Path], out: Path) -> dict[str, Path]:
    source = unpacked["grub"] / "usr/lib/grub-rescue"
    return {
        "floppy": _copy(source / "grub-rescue-floppy.img", out),
        "cdrom": _copy(source / "grub-rescue-cdrom.iso", out),
    }


def _build_memtest(unpacked: Mapping[str, Path], out: Path) -> dict[str, Path]:
    return {"kernel": _copy(_one(unpacked["memtest86+"], "boot/memtest86+x64.bin"), out)}


def _build_busybox(unpacked: Mapping[str, Path], out: Path) -> dict[str, Path]:
    program = _copy(_one(unpacked["busybox"], "**/bin/busybox"), out)
    program.chmod(0o755)
    return {"program": program}


def _one(root: Path, pattern: str) -> Path:
    found = sorted(root.glob(pattern))
    if len(found) != 1:
        raise PackageError(f"the package has {len(found)} files {pattern!r}, one is needed")
    return found[0]


def _copy(source: Path, out: Path) -> Path:
    if not source.is_file():
        raise PackageError(f"the package lacks {source.name}")
    return Path(shutil.copyfile(source, out / source.name))


RECIPES: Mapping[str, Recipe] = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "debian-6.1",
            "Debian 12's cloud kernel 6.1 with a busybox initramfs",
            (_kernel(r"linux-image-6\.1\.0-\d+-cloud-amd64", STABLE), BUSYBOX),
            _take_linux,
            _build_linux,
            LINUX_CMDLINE,
        ),
        Recipe(
            "debian-6.12",
            "the cloud kernel 6.12 of Debian 12's backports with a busybox initramfs",
            (_kernel(r"linux-image-6\.12\.[0-9.]+\+deb1\d-cloud-amd64", BACKPORTS), BUSYBOX),
            _take_linux,
            _build_linux,
            LINUX_CMDLINE,
        ),
        Recipe(
            "seabios",
            "SeaBIOS, a PC BIOS, and its video BIOSes",
            (Ingredient("seabios", "seabios", "seabios", "LGPL-3.0-only"),),
            _take_seabios,
            _build_seabios,
        ),
        Recipe(
            "grub-floppy",
            "GRUB's rescue floppy (and CD-ROM); needs a BIOS, see seabios",
            (Ingredient("grub", "grub-rescue-pc", "grub-rescue-pc", "GPL-3.0-or-later"),),
            lambda path: path.startswith("usr/lib/grub-rescue/"),
            _build_grub,
        ),
        Recipe(
            "memtest86+",
            "memtest86+, a memory test that boots as a Linux kernel does",
            (Ingredient("memtest86+", "memtest86+", r"memtest86\+", "GPL-2.0-only"),),
            lambda path: path.startswith("boot/"),
            _build_memtest,
            "console=ttyS0,115200",
        ),
        Recipe(
            "e2fsprogs",
            "mkfs.ext4 and fsck.ext4, for behind another guest's initramfs",
            E2FSPROGS,
            _take_e2fsprogs,
            _build_e2fsprogs,
        ),
        Recipe(
            "libkrunfw",
            "libkrun's kernel: no modules, no ACPI, console hvc0",
            (Ingredient("libkrunfw", "libkrunfw5", "libkrunfw5", "GPL-2.0-only AND LGPL-2.1-only", ("sid",)),),
            lambda path: "/libkrunfw.so." in path,
            _build_libkrunfw,
            "console=hvc0 panic=-1 reboot=k",
        ),
        Recipe(
            "busybox",
            "the static busybox, for initramfs images of your own",
            (BUSYBOX,),
            lambda path: path.endswith("bin/busybox"),
            _build_busybox,
        ),
    )
}
