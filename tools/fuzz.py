# SPDX-License-Identifier: Apache-2.0
"""Builds the fuzz targets of tests/*/fuzz and runs them.

    python tools/fuzz.py cpu --seconds 1800          # coverage-guided, needs clang with libFuzzer
    python tools/fuzz.py jit --seconds 1800          # host code against the interpreter
    python tools/fuzz.py machine --seconds 1800
    python tools/fuzz.py virtio --seconds 1800       # rings, block, network and entropy devices
    python tools/fuzz.py qcow2 --seconds 1800
    python tools/fuzz.py network --seconds 1800      # the user-mode network and the switch
    python tools/fuzz.py cpu --input crash-...       # once more, one input ($FUZZ_TRACE=1 prints each stop)
    python tools/fuzz.py cpu --runs 20000            # the plain driver, a fixed number of runs from a fixed seed

All targets run under AddressSanitizer and UBSan. Found inputs and the corpus stay in build/fuzz. Exit status 0: no
finding, 1: a finding, 77: no compiler here can build it, or no JIT can run.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TCG = ROOT / "kvmpy" / "tcg"
FUZZ = ROOT / "tests" / "tcg" / "fuzz"
BLOCK, VIRTIO, NET = (ROOT / "kvmpy" / name for name in ("block", "virtio", "net"))
QCOW2 = ("core", "cache", "refcount", "map", "io", "zero", "walk")
GUEST = ("guest.c", "state.c", "invariants.c", "end.c")
RINGS = ("queue", "queue_split", "queue_packed", "limit", "serve_blk", "serve_net", "serve_rng")
HUB = ("hub", "port", "capture", "wire")


@dataclass(frozen=True)
class Target:
    """What is fuzzed (`parts`, or the files that `lists` of the software CPU name) by which files of `folder`.

    longest: bytes of an input. flags: for the parts.
    """

    folder: Path
    own: tuple[str, ...]
    lists: tuple[str, ...] = ()
    parts: tuple[Path, ...] = ()
    longest: int = 400
    flags: tuple[str, ...] = ()

    def sources(self) -> list[Path]:
        named = [TCG / name for path in self.lists for name in (TCG / path).read_text().split()]
        return [*named, *self.parts]


TARGETS = {
    "cpu": Target(FUZZ, (*GUEST, "fuzz_cpu.c"), ("core_sources.txt",)),
    "jit": Target(FUZZ, (*GUEST, "doubt.c", "fuzz_jit.c"), ("core_sources.txt",)),
    "machine": Target(FUZZ, ("fuzz_machine.c",), ("core_sources.txt", "machine_sources.txt")),
    "virtio": Target(
        ROOT / "tests" / "virtio" / "fuzz",
        ("fuzz_virtio.c",),
        parts=(*(VIRTIO / f"{name}.c" for name in RINGS), BLOCK / "disk.c"),
        longest=6000,
    ),
    "qcow2": Target(
        ROOT / "tests" / "block" / "fuzz",
        ("fuzz_qcow2.c",),
        parts=(*(BLOCK / f"{name}.c" for name in ("disk", "file")), *(BLOCK / f"qcow2_{name}.c" for name in QCOW2)),
        longest=140_000,
    ),
    "network": Target(
        ROOT / "tests" / "net" / "fuzz",
        ("fuzz_network.c",),
        parts=(*(NET / f"{name}.c" for name in HUB), *sorted((NET / "user").glob("[!_]*.c"))),
        longest=8000,
        flags=("-Dclock_gettime=fuzz_clock",),
    ),
}
CFLAGS = ["-std=gnu11", "-g", "-O1", "-pthread", "-fno-strict-aliasing", "-fno-omit-frame-pointer", "-w"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
# Half the compile time; what it leaves out (null, alignment, types) the guided run looks at.
QUICK_SET = "address,bounds,shift,signed-integer-overflow,integer-divide-by-zero,unreachable"
QUICK = ["-g1", f"-fsanitize={QUICK_SET}", "-fno-sanitize-recover=undefined"]
COVERAGE = ["-fsanitize-coverage=inline-8bit-counters,pc-table"]
CANNOT, NO_JIT = 77, 3  # of this program, of fuzz_jit.c
PATIENCE = 300  # seconds by the clock for one input, on a busy machine too


def works(compiler: str, flags: list[str], folder: Path, main: bool) -> bool:
    """Can this compiler link a program with these flags?"""
    source = folder / "probe.c"
    body = "int main(void) { return 0; }" if main else "int LLVMFuzzerTestOneInput(const char *d, long n) { return 0; }"
    source.write_text(body + "\n")
    if shutil.which(compiler) is None:
        return False
    command = [compiler, *flags, str(source), "-o", str(folder / "probe")]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def choose(folder: Path, guided: bool) -> str | None:
    """A compiler with the sanitizers, and with libFuzzer when that is wanted."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ["clang", "clang-19", "clang-16", "clang-14"] if guided else ["cc", "gcc", "clang", "clang-14"]
    flags = [*SANITIZE, "-fsanitize=fuzzer"] if guided else QUICK
    return next((name for name in names if works(name, flags, folder, not guided)), None)


def doubtful_flags() -> str:
    """doubtful.h: by row of the optable, the flags whose undefined values the interpreter chooses itself."""
    sys.path.insert(0, str(TCG))
    optable = importlib.import_module("optable")
    # Logic takes AF from the host, as the JIT does; shifts by CL and by a number may leave different OF and AF there.
    rows = optable.in_table_order(optable.load())
    masks = [0 if row.undefined in ("", "a") else optable.flag_mask(row.undefined) for row in rows]
    return f"static const uint8_t doubtful[] = {{{', '.join(map(str, masks))}}};\n"


def build(target: str, compiler: str, folder: Path, guided: bool, jobs: int) -> Path:
    """Compile and link one target; objects are shared by the targets that have them."""
    what = TARGETS[target]
    if what.lists:
        subprocess.run([sys.executable, str(TCG / "optable.py"), str(TCG)], check=True)
    engine = what.sources()
    drivers = [] if guided else [FUZZ / "driver.c"]
    cached = ["ccache"] if shutil.which("ccache") else []
    sanitize = SANITIZE if guided else QUICK
    objects = folder / ("guided" if guided else "plain")
    objects.mkdir(parents=True, exist_ok=True)
    if target == "jit":
        (objects / "doubtful.h").write_text(doubtful_flags())

    def make(source: Path) -> str:
        extra = COVERAGE if guided and source in engine else []
        out = objects / f"{source.parent.name}-{source.stem}-{what.longest}.o"
        flags = [*CFLAGS, *sanitize, *extra, f"-I{ROOT / 'kvmpy'}", f"-I{TCG}", f"-I{FUZZ}", f"-I{objects}"]
        flags.append(f"-DLONGEST={max(what.longest, 512)}")
        flags += what.flags if source in engine else ()
        subprocess.run([*cached, compiler, *flags, "-c", str(source), "-o", str(out)], check=True)
        return str(out)

    with ThreadPoolExecutor(jobs) as pool:
        made = list(pool.map(make, [*engine, *(what.folder / name for name in what.own), *drivers]))
    program = objects / f"fuzz_{target}"
    link = [*sanitize, "-pthread", *(["-fsanitize=fuzzer"] if guided else [])]
    subprocess.run([compiler, *link, *made, "-o", str(program)], check=True)
    return program


def known(target: str, folder: Path) -> None:
    """Inputs that found something once, from regressions.txt, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    found = TARGETS[target].folder / "regressions.txt"
    for number, line in enumerate(found.read_text().splitlines() if found.exists() else ()):
        words = line.partition("#")[0].split()
        if words and words[0] == target:
            (folder / f"known-{number:03}").write_bytes(bytes.fromhex("".join(words[1:])))


def seeds(target: str, folder: Path) -> None:
    """What a run begins with: known inputs and those of seeds.py."""
    known(target, folder)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    program = TARGETS[target].folder / "seeds.py"
    subprocess.run([sys.executable, str(program), target, str(folder)], env=environment, check=True)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Build and run the fuzz targets")
    parser.add_argument("target", choices=TARGETS)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--seconds", type=int, default=60, help="guided by coverage for so long (60)")
    how.add_argument("--runs", type=int, help="the plain driver: known inputs, seeds, and so many changed ones")
    how.add_argument("--input", type=Path, help="run this input once")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "fuzz")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    args = parser.parse_args()
    guided = args.runs is None and args.input is None
    compiler = choose(args.folder, guided)
    if compiler is None:
        plain = "a C compiler with AddressSanitizer (Debian: gcc)"
        wanted = "clang with libFuzzer (Debian: clang-14 libclang-rt-14-dev)" if guided else plain
        print(f"needs {wanted}", file=sys.stderr)
        return CANNOT
    folder = args.folder.resolve()
    program = build(args.target, compiler, folder, guided, args.jobs)
    if args.input is not None:
        command = [str(program), str(args.input.resolve())]
    elif guided:
        corpus, start = folder / f"corpus-{args.target}", folder / f"seeds-{args.target}"
        corpus.mkdir(exist_ok=True)
        seeds(args.target, start)
        limits = [f"-max_total_time={args.seconds}", f"-max_len={TARGETS[args.target].longest}", f"-timeout={PATIENCE}"]
        command = [str(program), *limits, str(corpus), str(start)]
    else:
        start = folder / f"seeds-{args.target}"
        seeds(args.target, start)
        command = [str(program), str(start), str(args.runs), str(args.seed)]
    status = subprocess.run(command, cwd=folder, check=False).returncode
    return {0: 0, NO_JIT: CANNOT}.get(status, 1)


if __name__ == "__main__":
    sys.exit(main())
