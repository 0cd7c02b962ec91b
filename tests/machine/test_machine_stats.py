# SPDX-License-Identifier: Apache-2.0
"""Live counters of a machine, and their text for Prometheus."""

import re

import pytest

from kvmpy import Machine
from kvmpy.block import create_disk
from kvmpy.machine import Drive, Nic
from kvmpy.virtio import RateLimit
from kvmpy.virtio.testing import Driver

HLT = bytes.fromhex("e680 e681 f4")  # out 0x80, al; out 0x81, al; hlt
LABEL = r'[a-z]+="(?:[^"\\]|\\.)*"'
SAMPLE = re.compile(rf'[a-z][a-z0-9_]*(?:\{{{LABEL}(?:,{LABEL})*\}})? -?[0-9.e+-]+')


@pytest.fixture
def machine(backend, tmp_path):
    image = tmp_path / "hlt"
    image.write_bytes(HLT)
    create_disk(tmp_path / "disk", "qcow2", 1 << 20)
    made = Machine(
        kernel=image, image_format="flat", load_address=0x1000, entry=0x1000, mode="real", memory="8M", cpus=1,
        backend=backend, disks=[f"{tmp_path / 'disk'},format=qcow2,queues=2,iops=1000"], balloon=True,
    )  # fmt: skip
    yield made
    made.close()


def test_everything_is_counted(machine, backend):
    driver = Driver(machine.virtio.slots.transports[0], machine.vm.memory, 0x20_0000)
    driver.start()
    header = (1).to_bytes(4, "little") + bytes(4) + (1).to_bytes(8, "little")
    driver.queues[1].request([header, bytes(512)], [1])
    machine.start()
    stats = machine.stats()
    assert stats["memory"] == {"ram_bytes": 8 << 20}
    assert stats["disks"]["blk0"]["writes"] == 1 and stats["disks"]["blk0"]["size"] == 1 << 20
    assert stats["virtio"]["blk0"]["written_bytes"] == 512
    assert stats["virtio"]["blk0"]["queues"] == [(0, 0, 0), (1, 1, 0)]
    assert set(stats["engine"]) <= {"vm", 0}
    if backend == "tcg":
        assert {"insns", "blocks", "tlb_misses"} <= set(stats["engine"][0])
    assert stats["process"]["resident_bytes"] > 1 << 20 and stats["process"]["threads"] > 1


def test_prometheus_text(machine, backend):
    text = machine.stats().prometheus({"machine": 'a "b"\\'})
    lines = text.splitlines()
    assert text.endswith("\n") and len(lines) > 40
    types = {}
    for line in lines:
        if line.startswith("# TYPE "):
            _, _, name, kind = line.split()
            assert name not in types, "one group for each name"
            types[name] = kind
        else:
            assert SAMPLE.fullmatch(line), line
            name = line.split("{")[0]
            assert list(types)[-1] == name, "samples stand under their type"
            assert types[name] == ("counter" if name.endswith("_total") else "gauge")
            assert r'machine="a \"b\"\\"' in line
    assert {"kvmpy_virtio_reads_total", "kvmpy_disk_size", "kvmpy_virtio_target", "kvmpy_process_threads"} <= set(types)
    if backend == "tcg":
        assert types["kvmpy_engine_vcpu_insns_total"] == "counter"
    plain = machine.stats().prometheus()
    assert 'kvmpy_virtio_queue_in_flight{device="blk0",queue="1"} 0' in plain.splitlines()
    assert f"kvmpy_memory_ram_bytes {8 << 20}" in plain.splitlines()


def test_limits_as_words():
    limit = RateLimit(bytes_per_second=10 << 20, operations_per_second=500, burst_bytes=1 << 20)
    assert Drive.parse("a.raw,format=raw,bps=10M,iops=500,bps_burst=1M").limit == limit
    assert Nic.parse("tap:t0,iops=7").limit == RateLimit(operations_per_second=7)
    assert Drive.parse("a.raw,format=raw").limit == RateLimit()
    for wrong in ("a.raw,format=raw,bps=fast", "a.raw,format=raw,bps_burst=1"):
        with pytest.raises(ValueError):
            Drive.parse(wrong)
