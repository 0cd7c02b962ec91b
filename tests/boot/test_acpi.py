# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from boot_images import guest_memory

from kvmpy.arch import layout
from kvmpy.boot import aml
from kvmpy.boot.acpi import (
    AcpiConfig,
    Override,
    PciHost,
    SerialPort,
    VirtioMmio,
    build_acpi,
    fadt,
    madt,
    write_acpi,
)
from kvmpy.boot.dsdt import dsdt
from kvmpy.errors import BootError

EVERYTHING = AcpiConfig(
    apic_ids=range(3),
    serial=(SerialPort(0x3F8, 4), SerialPort(0x2F8, 3)),
    keyboard=True,
    virtio_mmio=(VirtioMmio(0xD000_0000, 0x1000, 5), VirtioMmio(0xD000_1000, 0x1000, 16, edge=False)),
    pci=PciHost(mmio64=(1 << 36, 1 << 34)),
    events=(0x604, 9),
    overrides=(Override(0, 2), Override(9, 9, 0xD)),
)
CONFIGS = {
    "default": AcpiConfig(),
    "everything": EVERYTHING,
    "bare": AcpiConfig(serial=(), rtc=False),
    "many": AcpiConfig(apic_ids=range(0, 600, 2), virtio_mmio=[VirtioMmio(0xD000_0000, 0x1000, 5)] * 30),
}


def tables_in(memory, root: int) -> dict[bytes, bytes]:
    """All tables by signature, found as an operating system does, each with its checksum checked."""
    rsdp = memory.read(root, 36)
    assert rsdp[:8] == b"RSD PTR "
    assert sum(rsdp[:20]) % 256 == sum(rsdp) % 256 == 0
    rsdt, length, xsdt = struct.unpack_from("<IIQ", rsdp, 16)
    assert (rsdp[15], length) == (2, 36)

    def table(at: int) -> bytes:
        raw = memory.read(at, memory.u32(at + 4))
        assert sum(raw) % 256 == 0
        return raw

    found = {b"RSDT": table(rsdt), b"XSDT": table(xsdt)}
    addresses = [a for (a,) in struct.iter_unpack("<Q", found[b"XSDT"][36:])]
    assert [a for (a,) in struct.iter_unpack("<I", found[b"RSDT"][36:])] == addresses
    for at in addresses:
        raw = table(at)
        found[raw[:4]] = raw
    (dsdt_at,) = struct.unpack_from("<Q", found[b"FACP"], 140)
    found[b"DSDT"] = table(dsdt_at)
    return found


@pytest.mark.parametrize("name", CONFIGS)
def test_tables_are_found_from_the_root_pointer(name: str) -> None:
    memory = guest_memory()
    root = write_acpi(memory, CONFIGS[name])
    assert root == layout.ACPI_TABLES
    assert memory.find(b"RSD PTR ", 0xE_0000, 0x10_0000) == root
    expected = {b"RSDT", b"XSDT", b"FACP", b"APIC", b"DSDT"} | ({b"MCFG"} if CONFIGS[name].pci else set())
    assert tables_in(memory, root).keys() == expected


def test_extra_tables_are_linked() -> None:
    memory = guest_memory()
    extra = struct.pack("<4sIBB6s8sI4sI", b"TEST", 36, 1, 0, b"OEM   ", b"TABLE   ", 1, b"ABCD", 1)
    extra = extra[:9] + bytes([-sum(extra) & 0xFF]) + extra[10:]
    assert tables_in(memory, write_acpi(memory, AcpiConfig(extra=[extra])))[b"TEST"] == extra


def test_fadt_is_hardware_reduced_with_sleep_and_reset_registers() -> None:
    raw = fadt(AcpiConfig(), 0xE_0040)
    assert (len(raw), raw[8], raw[131]) == (276, 6, 5)
    (flags,) = struct.unpack_from("<I", raw, 112)
    assert flags & (1 << 20)
    assert flags & (1 << 10)
    assert struct.unpack_from("<BBBBQB", raw, 116) == (1, 8, 0, 1, 0xCF9, 6)
    assert struct.unpack_from("<BBBBQ", raw, 244) == (1, 8, 0, 1, 0x600)
    assert struct.unpack_from("<BBBBQ", raw, 256) == (1, 8, 0, 1, 0x601)
    # No fixed hardware: all PM and GPE blocks are zero (4.1).
    assert raw[46:109].strip(b"\0") == b""
    assert raw[148:244].strip(b"\0") == b""
    assert (raw[40:44], raw[140:148]) == (struct.pack("<I", 0xE_0040), struct.pack("<Q", 0xE_0040))


def test_madt_byte_by_byte() -> None:
    config = AcpiConfig(apic_ids=(0, 2, 300), overrides=[Override(0, 2), Override(9, 9, 0xD)], ioapic_id=4)
    body = struct.pack("<II", 0xFEE0_0000, 1)
    body += bytes.fromhex("00 08 00 00 01000000  00 08 01 02 01000000")
    body += bytes.fromhex("09 10 0000 2c010000 01000000 02000000")
    body += bytes.fromhex("01 0c 04 00 0000c0fe 00000000")
    body += bytes.fromhex("02 0a 00 00 02000000 0000  02 0a 00 09 09000000 0d00")
    body += bytes.fromhex("04 06 ff 0000 01  0a 0c 0000 ffffffff 01 000000")
    assert madt(config)[36:] == body


def test_mcfg_byte_by_byte() -> None:
    memory = guest_memory()
    raw = tables_in(memory, write_acpi(memory, AcpiConfig(pci=PciHost(buses=4))))[b"MCFG"]
    assert raw[36:] == bytes(8) + bytes.fromhex("000000e000000000 0000 00 03 00000000")


def test_tables_that_do_not_fit_say_so() -> None:
    with pytest.raises(BootError, match=r"do not fit into 0x1000 from 0xe_f000"):
        write_acpi(guest_memory(), CONFIGS["many"], address=0xE_F000)
    with pytest.raises(ValueError, match="16-byte boundary"):
        build_acpi(AcpiConfig(), 0xE_0008)


@pytest.mark.parametrize("name", CONFIGS)
def test_dsdt_is_what_intels_compiler_makes_of_its_own_disassembly(name: str, tmp_path: Path) -> None:
    if shutil.which("iasl") is None:
        pytest.skip("needs iasl (Debian: acpica-tools)")
    raw = dsdt(CONFIGS[name])
    (tmp_path / "a.aml").write_bytes(raw)

    def iasl(*arguments: str) -> str:
        done = subprocess.run(
            ["iasl", *arguments], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    said = iasl("-d", "a.aml")
    assert "Error" not in said
    assert "Warning" not in said
    said = iasl("-oa", "-p", "b", "a.dsl")
    assert "0 Errors, 0 Warnings" in said
    assert (tmp_path / "b.aml").read_bytes()[36:] == raw[36:]


@pytest.mark.parametrize("name", ["default", "everything", "many"])
def test_data_tables_are_understood_by_iasl(name: str, tmp_path: Path) -> None:
    if shutil.which("iasl") is None:
        pytest.skip("needs iasl (Debian: acpica-tools)")
    for raw in (fadt(CONFIGS[name], 0xE_0040), madt(CONFIGS[name])):
        (tmp_path / "t.aml").write_bytes(raw)
        done = subprocess.run(
            ["iasl", "-d", "t.aml"], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
        )
        text = done.stdout + done.stderr + (tmp_path / "t.dsl").read_text()
        assert done.returncode == 0
        assert not [word for word in ("Error", "Warning", "Invalid", "Incorrect", "Unknown") if word in text]


# The encoder, against examples worked out from ACPI 6.5 chapter 20.


@pytest.mark.parametrize(
    ("path", "raw"),
    [
        ("_HID", b"_HID"),
        ("C0", b"C0__"),
        ("\\", b"\\\0"),
        ("\\_SB_", b"\\_SB_"),
        ("^^A", b"^^A___"),
        ("\\_SB.PCI0", b"\\\x2e_SB_PCI0"),
        ("A.B.C", b"\x2f\x03A___B___C___"),
    ],
)
def test_aml_names(path: str, raw: bytes) -> None:
    assert aml.name_string(path) == raw


@pytest.mark.parametrize("path", ["toolong", "1ABC", "a", "\\^A", "A B"])
def test_aml_refuses_what_is_no_name(path: str) -> None:
    with pytest.raises(ValueError):
        aml.name_string(path)


@pytest.mark.parametrize(
    ("number", "raw"),
    [
        (0, "00"),
        (1, "01"),
        (2, "0a02"),
        (0xFF, "0aff"),
        (0x100, "0b0001"),
        (0x1_0000, "0c00000100"),
        (1 << 32, "0e0000000001000000"),
        ((1 << 64) - 1, "0effffffffffffffff"),
    ],
)
def test_aml_integers_are_as_short_as_can_be(number: int, raw: str) -> None:
    assert aml.integer(number) == bytes.fromhex(raw)


def test_aml_refuses_numbers_of_more_than_64_bits() -> None:
    for number in (-1, 1 << 64):
        with pytest.raises(ValueError):
            aml.integer(number)


@pytest.mark.parametrize(
    ("size", "length"),
    [
        (0, "01"),
        (62, "3f"),
        (63, "4104"),
        (0xFFD, "4fff"),
        (0xFFE, "810001"),
        (0xFFFFC, "8fffff"),
        (0xFFFFD, "c1000001"),
    ],
)
def test_aml_package_length_counts_itself(size: int, length: str) -> None:
    assert aml._package_length(bytes(size)) == bytes.fromhex(length)


def test_aml_ids() -> None:
    assert aml.EisaId("PNP0A08") == bytes.fromhex("0c41d00a08")
    assert aml.EisaId("PNP0501") == bytes.fromhex("0c41d00501")
    uuid = "33DB4D5B-1FF7-401C-9657-7441C03DD766"
    assert aml.ToUUID(uuid)[-16:] == bytes.fromhex("5b4ddb33f71f1c4096577441c03dd766")
    with pytest.raises(ValueError):
        aml.EisaId("pnp0501")


def test_aml_resources() -> None:
    assert aml.IO(0x3F8, 8) == bytes.fromhex("47 01 f803 f803 01 08")
    assert aml.Memory32Fixed(0xD000_0000, 0x1000) == bytes.fromhex("86 0900 01 000000d0 00100000")
    assert aml.Interrupt(4, edge=True) == bytes.fromhex("89 0600 03 01 04000000")
    assert aml.Interrupt(16, edge=False, shared=True) == bytes.fromhex("89 0600 09 01 10000000")
    assert aml.WordBusNumber(0, 255) == bytes.fromhex("88 0d00 02 0c 00 0000 0000 ff00 0000 0001")
    assert aml.ResourceTemplate() == bytes.fromhex("11 05 0a02 7900")
