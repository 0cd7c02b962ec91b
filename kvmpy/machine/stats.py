# SPDX-License-Identifier: Apache-2.0
"""Live counters of a machine, as a dictionary and as Prometheus' text format."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kvmpy._kvm import Stats as EngineStats
from kvmpy.errors import CapabilityError, StateError
from kvmpy.machine.virtio import Virtio
from kvmpy.virtio import Blk, Net
from kvmpy.vm import Vm

# Numbers of devices that go up and down; all others only count up.
GAUGES = frozenset({"target", "actual", "open", "size"})
CUMULATIVE = "cumulative"


class Stats(dict[str, Any]):
    """Counters by part; see `Machine.stats`. Every value is an int, or seconds as a float, or a dictionary of them.

    exits: by vCPU and kind. engine: what the engine counts itself, of the "vm" and of each vCPU (for the software CPU
    instructions, blocks, TLB misses ...), empty where it counts nothing. assist: instructions run for KVM. virtio: by
    device; its "queues" are (requests, interrupts, in flight) of each. disks: what the image under a block device
    did. networks: what the back end of a card did, if it counts.
    memory: bytes of guest RAM. process: of the host's process. unclaimed: accesses that no device answered.
    """

    def __init__(self, **parts: Any) -> None:
        super().__init__(**parts)
        self.kinds: dict[str, str] = {}  # of the engine's statistics, by name: "cumulative", "instant", "peak"

    def prometheus(self, labels: Mapping[str, str] | None = None) -> str:
        """Prometheus' text exposition format, version 0.0.4. labels: for every sample, such as the machine's name."""
        metrics: dict[str, tuple[str, list[str]]] = {}
        for name, kind, own, value in self._samples():
            text = ",".join(f'{key}="{_escape(text)}"' for key, text in {**(labels or {}), **own}.items())
            sample = f"{name}{{{text}}} {value}" if text else f"{name} {value}"
            metrics.setdefault(name, (kind, []))[1].append(sample)
        lines = []
        for name, (kind, samples) in metrics.items():
            lines += [f"# TYPE {name} {kind}", *samples]
        return "".join(line + "\n" for line in lines)

    def _samples(self) -> Iterator[tuple[str, str, dict[str, str], int | float]]:
        """(metric, kind, labels, value)"""
        for vcpu, exits in self["exits"].items():
            for kind, value in exits.items():
                yield "kvmpy_vcpu_exits_total", "counter", {"vcpu": str(vcpu), "kind": kind}, value
        for owner, numbers in self["engine"].items():
            where = {} if owner == "vm" else {"vcpu": str(owner)}
            part = "vm" if owner == "vm" else "vcpu"
            for name, value in numbers.items():
                yield _metric(f"engine_{part}_{name}", self.kinds.get(name) != CUMULATIVE, where, value)
        for kind, value in self["assist"].items():
            yield "kvmpy_assist_instructions_total", "counter", {"kind": str(kind)}, value
        for device, counters in self["virtio"].items():
            for name, value in counters.items():
                if name == "queues":
                    for index, numbers in enumerate(value):
                        where = {"device": device, "queue": str(index)}
                        for part, number in zip(("requests", "interrupts", "in_flight"), numbers, strict=True):
                            yield _metric(f"virtio_queue_{part}", part == "in_flight", where, number)
                else:
                    gauge = name in GAUGES or name.startswith("guest_")
                    yield _metric(f"virtio_{name}", gauge, {"device": device}, value)
        for device, counters in self["disks"].items():
            for name, value in counters.items():
                yield _metric(f"disk_{name}", name in GAUGES, {"device": device}, value)
        for device, counters in self["networks"].items():
            for name, value in counters.items():
                yield _metric(f"network_{name}", name.endswith("_flows"), {"device": device}, value)
        for name, value in self["memory"].items():
            yield _metric(f"memory_{name}", True, {}, value)
        for name, value in self["process"].items():
            yield _metric(f"process_{name}", name != "cpu_seconds", {}, value)
        for bus, value in self["unclaimed"].items():
            yield "kvmpy_unclaimed_accesses_total", "counter", {"bus": bus}, value


class Counters:
    """The counters of a machine that has its vCPUs; those of the engine are opened here, before the vCPUs run."""

    def __init__(self, vm: Vm, virtio: Virtio) -> None:
        self._vm, self._virtio = vm, virtio
        self._engine: dict[str | int, EngineStats] = {}
        with contextlib.suppress(CapabilityError):  # this KVM may count nothing
            self._engine["vm"] = vm.stats()
            for vcpu in vm.vcpus:
                self._engine[vcpu.id] = vcpu.stats()

    def collect(self) -> Stats:
        """The counters now; from any thread, also while the machine runs."""
        vm = self._vm
        stats = Stats(
            exits={vcpu.id: vm.assist.exits(vcpu) for vcpu in vm.vcpus},
            engine={},
            assist=dict(vm.assist.counts),
            virtio=self._virtio.stats(),
            disks={},
            networks={},
            memory={"ram_bytes": sum(region.size for region in vm.memory.regions if not region.readonly)},
            process=_process(),
            unclaimed={"pio": vm.pio.unclaimed_total, "mmio": vm.mmio.unclaimed_total},
        )
        for owner, opened in self._engine.items():
            stats.kinds.update({stat.name: stat.kind for stat in opened.stats})
            # Histograms are left out: their buckets are KVM's, not Prometheus'.
            stats["engine"][owner] = {name: value for name, value in opened.read().items() if isinstance(value, int)}
        for device in self._virtio.devices:
            if isinstance(device, Blk):
                disk = device.disk
                stats["disks"][device.name] = {**disk.stats._asdict(), "size": disk.size}
            if isinstance(device, Net) and callable(counts := getattr(device.backend, "stats", None)):
                with contextlib.suppress(StateError):  # the network was closed
                    stats["networks"][device.name] = counts()
        return stats

    def close(self) -> None:
        """Close the engine's counters; to be called before the VM is closed, again is no error."""
        for opened in self._engine.values():
            opened.close()
        self._engine.clear()


def _process() -> dict[str, int | float]:
    times = os.times()
    own = Path("/proc/self")
    resident = int((own / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return {
        "cpu_seconds": times.user + times.system,
        "resident_bytes": resident,
        "open_files": sum(1 for _ in (own / "fd").iterdir()),
        "threads": sum(1 for _ in (own / "task").iterdir()),
    }


def _metric(
    name: str, gauge: bool, labels: dict[str, str], value: int | float
) -> tuple[str, str, dict[str, str], int | float]:
    name = "kvmpy_" + re.sub(r"[^a-zA-Z0-9_]", "_", name)
    return (name, "gauge", labels, value) if gauge else (f"{name}_total", "counter", labels, value)


def _escape(text: str) -> str:
    return text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
