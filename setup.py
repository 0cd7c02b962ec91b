# SPDX-License-Identifier: Apache-2.0
"""Build of the compiled parts; everything else about the package stands in pyproject.toml.

Each extension is one `.pyx` plus the C files it wraps. `KVMPY_BUILD=debug` turns on assertions and
Cython's bounds checks, `KVMPY_BUILD=asan` compiles the C code under ASan and UBSan.
"""

import os
import subprocess
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup

FLAVOURS = {
    "release": ["-O2", "-g1"],
    "debug": ["-O0", "-g3", "-UNDEBUG"],
    "asan": ["-O1", "-g3", "-UNDEBUG", "-fsanitize=address,undefined", "-fno-omit-frame-pointer"],
}
FLAVOUR = os.environ.get("KVMPY_BUILD", "release")
CFLAGS = ["-std=gnu11", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-missing-field-initializers"]
CFLAGS += ["-Wno-sign-compare", "-fno-strict-aliasing", *FLAVOURS[FLAVOUR]]
LINK = ["-fsanitize=address,undefined"] if FLAVOUR == "asan" else []


def extension(name: str, *c_sources: str, depends: tuple[str, ...] = ()) -> Extension:
    pyx = name.replace(".", "/") + ".pyx"
    headers = [str(p) for p in Path(pyx).parent.glob("*.h")]
    return Extension(
        name,
        [pyx, *c_sources],
        include_dirs=["kvmpy"],
        depends=[*headers, *depends],
        extra_compile_args=CFLAGS,
        extra_link_args=["-pthread", *LINK],
    )


def software_cpu() -> Extension:
    """kvmpy.tcg: the processor core and the machine around it; the table of instructions is made into C first."""
    room = Path("kvmpy/tcg")
    subprocess.run([sys.executable, str(room / "optable.py"), str(room)], check=True)
    lists = [room / "core_sources.txt", room / "machine_sources.txt"]
    names = [name for path in lists for name in path.read_text().split()]
    depends = [*lists, *room.glob("table/*.tab")]
    return extension("kvmpy.tcg._tcg", *(str(room / name) for name in names), depends=tuple(map(str, depends)))


EXTENSIONS = [
    extension("kvmpy._constants"),
    extension("kvmpy._structs"),
    extension("kvmpy._exit"),
    extension("kvmpy._exits_pv"),
    extension("kvmpy._exits"),
    extension("kvmpy._decode"),
    extension("kvmpy._handle"),
    extension("kvmpy._lists"),
    extension("kvmpy._stats"),
    extension("kvmpy._device"),
    extension("kvmpy._vcpu_state"),
    extension("kvmpy._vcpu"),
    extension("kvmpy._vm_irq"),
    extension("kvmpy._vm"),
    extension("kvmpy._kvm", "kvmpy/engine_kernel.c"),
    extension("kvmpy.memory._mapping"),
    extension("kvmpy.boot._relocate"),
    extension(
        "kvmpy.block._disk",
        *(f"kvmpy/block/{name}.c" for name in ("copy", "disk", "file", "raw")),
    ),
    extension("kvmpy.block._python", depends=("kvmpy/block/_disk.pxd",)),
    extension(
        "kvmpy.block._qcow2",
        *(f"kvmpy/block/{name}.c" for name in ("disk", "file", "qcow2_core", "qcow2_cache", "qcow2_refcount")),
        *(f"kvmpy/block/{name}.c" for name in ("qcow2_map", "qcow2_io", "qcow2_zero", "qcow2_walk")),
        depends=("kvmpy/block/_disk.pxd",),
    ),
    extension("kvmpy.net._hub", *(f"kvmpy/net/{name}.c" for name in ("hub", "port", "capture", "wire"))),
    extension(
        "kvmpy.net.user._user",
        *sorted(map(str, Path("kvmpy/net/user").glob("[!_]*.c"))),
        "kvmpy/net/wire.c",
        depends=("kvmpy/net/wire.h",),
    ),
    software_cpu(),
    extension("kvmpy.virtio._host"),
    extension(
        "kvmpy.virtio._queue",
        *(f"kvmpy/virtio/{name}.c" for name in ("queue", "queue_split", "queue_packed", "limit")),
        *(f"kvmpy/virtio/{name}.c" for name in ("serve_blk", "serve_net", "serve_rng")),
        "kvmpy/block/disk.c",
        depends=("kvmpy/block/disk.h", "kvmpy/block/_disk.pxd"),
    ),
]

setup(
    ext_modules=cythonize(
        EXTENSIONS,
        build_dir="build/cython",  # generated C stays out of the source tree
        language_level=3,
        nthreads=os.cpu_count() or 1,
        compiler_directives={
            "binding": True,
            "embedsignature": False,
            "boundscheck": FLAVOUR != "release",
            "wraparound": False,
            "freethreading_compatible": True,
        },
    ),
)
