# SPDX-License-Identifier: Apache-2.0
"""Typed views of guest memory, and the layout of the boot structures against the compiler's."""

import re
import shutil
import subprocess

import pytest

from kvmpy.errors import GuestMemoryError
from kvmpy.memory import GuestMemory, Ram, bootstructs, cstructs
from kvmpy.memory.cstructs import BOOT, Definitions

PAGE = 4096

POINTS = Definitions(
    """
    struct point { uint16_t x; uint32_t y; };
    struct line { struct point ends[2]; uint8_t name[5]; uint64_t bits : 3, more : 5; char *where; };
    union word { uint32_t whole; uint8_t bytes[4]; };
    """
)


@pytest.fixture
def memory():
    memory = GuestMemory(lambda *slot: None)
    memory.add(0, Ram.anonymous(4 * PAGE))
    memory.add(4 * PAGE, Ram.anonymous(PAGE))
    memory.add(0x8000, Ram.from_bytes(b"\x01\0\2\0\0\0"), readonly=True)
    return memory


def test_fields_are_the_bytes_in_memory(memory):
    point = memory.view(0x100, "struct point", POINTS)
    point.x = 0x1122
    point.y = 0x33445566
    assert memory.read(0x100, 7) == bytes.fromhex("2211 66554433 00")
    memory.put_u16(0x100, 7)
    assert (point.x, len(point), bytes(point)) == (7, 6, bytes.fromhex("0700 66554433"))
    assert point.fields() == {"x": 7, "y": 0x33445566}
    assert "x=0x7, y=0x33445566" in repr(point)


def test_nested_structures_arrays_and_bytes(memory):
    line = memory.view(0, "struct line", POINTS)
    line.ends[1].y = 9
    line.ends[0] = line.ends[1]
    line.name = b"abc"
    line.bits = 5
    assert line.fields() == {
        "ends": [{"x": 0, "y": 9}] * 2, "name": b"abc\0\0", "bits": 5, "more": 0, "where": 0,
    }  # fmt: skip
    assert (len(line.ends), [end.y for end in line.ends], bytes(line.name)) == (2, [9, 9], b"abc\0\0")
    assert line.ends[0] == line.ends[1]
    assert dir(line) == sorted(["ends", "name", "bits", "more", "where"])
    line.name[4] = 0x7F
    assert line.name[-1] == 0x7F
    line.name = b"z"
    assert bytes(line.name) == b"z\0\0\0\0"
    line.ends = [(1, 2), (3, 4)]
    assert [end.fields() for end in line.ends] == [{"x": 1, "y": 2}, {"x": 3, "y": 4}]


def test_pointers_are_numbers_and_cannot_be_followed(memory):
    line = memory.view(0, "struct line", POINTS)
    line.where = 0xFFFF_8000_0000_1234
    assert line.where == 0xFFFF_8000_0000_1234


def test_unions(memory):
    word = memory.view(0, "union word", POINTS)
    word.whole = 0x04030201
    assert bytes(word.bytes) == b"\1\2\3\4"


def test_an_array_type(memory):
    table = memory.view(0x2D0, "struct boot_e820_entry[3]")
    table[2].addr = 0x10_0000
    table[2].type = 1
    assert memory.read(0x2D0 + 40, 20) == bytes.fromhex("0000100000000000 0000000000000000 01000000")
    with pytest.raises(IndexError, match="index 3 of 3"):
        table[3]
    with pytest.raises(IndexError, match="index -4 of 3"):
        table[-4]


@pytest.mark.parametrize(
    ("name", "why"),
    [("struct nothing", "unknown size"), ("foo", "unknown identifier"), ("struct point[]", "unknown size"),
     ("struct point *", "pointer"), ("uint32_t", "primitive"), ("struct point; int", "not a declared")],
)  # fmt: skip
def test_names_that_are_no_structure_are_refused(memory, name, why):
    with pytest.raises(ValueError, match=why):
        memory.view(0, name, POINTS)


def test_unknown_fields_and_bad_values_are_refused(memory):
    point = memory.view(0, "struct point", POINTS)
    with pytest.raises(AttributeError):
        point.z  # noqa: B018
    with pytest.raises(AttributeError):
        point.z = 1
    with pytest.raises(OverflowError):
        point.x = 0x10000
    line = memory.view(0, "struct line", POINTS)
    with pytest.raises(ValueError, match="6 bytes do not fit"):
        line.name = b"abcdef"
    with pytest.raises(ValueError, match="has no field 'z'"):
        POINTS.offsetof("struct point", "z")
    assert memory.read(0, 64) == bytes(64)


def test_a_view_of_a_hole_or_two_regions_is_refused(memory):
    with pytest.raises(GuestMemoryError, match="no memory"):
        memory.view(5 * PAGE - 2, "struct point", POINTS)
    with pytest.raises(GuestMemoryError, match="spans regions"):
        memory.view(4 * PAGE - 2, "struct point", POINTS)


def test_read_only_memory_gives_a_read_only_view(memory):
    line = memory.view(0x8000, "struct line", POINTS)
    assert line.ends[0].fields() == {"x": 1, "y": 2}
    for change in (
        lambda: setattr(line.ends[0], "x", 1),
        lambda: line.name.__setitem__(0, 1),
        lambda: setattr(line, "bits", 1),
    ):
        with pytest.raises(TypeError, match="read-only"):
            change()


def test_writes_are_noted_where_they_happen():
    writes = []
    memory = GuestMemory(lambda *slot: None, lambda gpa, size: writes.append((gpa, size)))
    memory.add(0x1000, Ram.anonymous(PAGE))
    line = memory.view(0x1010, "struct line", POINTS)
    line.ends[1].x = 1
    line.name[0] = 1
    assert writes == [(0x1016, 6), (0x101C, 5)]


def test_the_smallest_piece_of_a_view_keeps_the_memory_mapped(memory):
    region = memory.region_at(4 * PAGE)
    end = memory.view(4 * PAGE, "struct line", POINTS).ends[1]
    memory.remove(region)
    with pytest.raises(BufferError):
        region.ram.close()
    end.x = 5
    assert end.x == 5
    del end
    region.ram.close()


def test_a_structure_of_its_own():
    point = POINTS.new("struct point", b"\x05")
    point.y = 1
    assert bytes(point) == bytes.fromhex("0500 01000000")
    with pytest.raises(ValueError, match="7 bytes do not fit in struct point of 6 bytes"):
        POINTS.new("struct point", bytes(7))
    with pytest.raises(ValueError, match="has 6 bytes, the buffer only 5"):
        POINTS.view("struct point", bytes(5))


def test_unpacked_definitions_have_the_padding_of_c():
    assert Definitions("struct p { uint8_t a; uint32_t b; };", packed=False).sizeof("struct p") == 8
    assert Definitions("struct p { uint8_t a; uint32_t b; };").sizeof("struct p") == 5


# -- the boot structures


@pytest.mark.parametrize(
    ("name", "field", "offset"),
    [
        # Linux Documentation/arch/x86/zero-page.rst and boot.rst
        ("struct boot_params", "screen_info", 0x000),
        ("struct boot_params", "apm_bios_info", 0x040),
        ("struct boot_params", "tboot_addr", 0x058),
        ("struct boot_params", "ist_info", 0x060),
        ("struct boot_params", "acpi_rsdp_addr", 0x070),
        ("struct boot_params", "hd0_info", 0x080),
        ("struct boot_params", "ext_ramdisk_image", 0x0C0),
        ("struct boot_params", "cc_blob_address", 0x13C),
        ("struct boot_params", "edid_info", 0x140),
        ("struct boot_params", "efi_info", 0x1C0),
        ("struct boot_params", "alt_mem_k", 0x1E0),
        ("struct boot_params", "e820_entries", 0x1E8),
        ("struct boot_params", "sentinel", 0x1EF),
        ("struct boot_params", "hdr", 0x1F1),
        ("struct boot_params", "edd_mbr_sig_buffer", 0x290),
        ("struct boot_params", "e820_table", 0x2D0),
        ("struct boot_params", "eddbuf", 0xD00),
        ("struct setup_header", "boot_flag", 0x1FE - 0x1F1),
        ("struct setup_header", "header", 0x202 - 0x1F1),
        ("struct setup_header", "loadflags", 0x211 - 0x1F1),
        ("struct setup_header", "cmd_line_ptr", 0x228 - 0x1F1),
        ("struct setup_header", "xloadflags", 0x236 - 0x1F1),
        ("struct setup_header", "pref_address", 0x258 - 0x1F1),
        ("struct setup_header", "kernel_info_offset", 0x268 - 0x1F1),
        # Xen hvm/start_info.h
        ("struct hvm_start_info", "cmdline_paddr", 24),
        ("struct hvm_start_info", "rsdp_paddr", 32),
        ("struct hvm_start_info", "memmap_paddr", 40),
        ("struct hvm_start_info", "memmap_entries", 48),
        # Multiboot 0.6.96, section 3.3
        ("struct multiboot_info", "mods_count", 20),
        ("struct multiboot_info", "mmap_length", 44),
        ("struct multiboot_info", "boot_loader_name", 64),
        ("struct multiboot_info", "vbe_control_info", 72),
        ("struct multiboot_info", "framebuffer_addr", 88),
        ("struct multiboot_info", "color_info", 110),
        ("struct multiboot_mmap_entry", "type", 20),
    ],
)
def test_offsets_in_the_specifications(name, field, offset):
    assert BOOT.offsetof(name, field) == offset


@pytest.mark.parametrize(
    ("name", "size"),
    [("struct boot_params", 4096), ("struct boot_e820_entry", 20), ("struct hvm_start_info", 56),
     ("struct hvm_modlist_entry", 32), ("struct hvm_memmap_table_entry", 24), ("struct multiboot_info", 116),
     ("struct multiboot_mod_list", 16), ("struct multiboot_header", 48)],
)  # fmt: skip
def test_sizes_in_the_specifications(name, size):
    assert BOOT.sizeof(name) == size


def test_linux_structures_equal_the_kernel_headers(tmp_path):
    """Every field that we name and <asm/bootparam.h> names too lies where the compiler puts it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    ours = {
        (struct, field): None
        for struct, body in re.findall(r"struct (\w+) \{(.*?)\n\};", bootstructs.LINUX, re.S)
        for field in re.findall(r"(\w+)(?:\[\d+\])?;", body)
        if not field.startswith("_")
    }
    assert len(ours) > 100
    lines = [f'printf("%s %s %zu\\n", "{s}", "{f}", offsetof(struct {s}, {f}));' for s, f in ours]
    source = tmp_path / "offsets.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <linux/types.h>\n"
        "#include <linux/screen_info.h>\n#include <asm/bootparam.h>\n"
        "int main(void) {" + "\n".join(lines) + "}"
    )
    program = tmp_path / "offsets"
    built = subprocess.run(
        [compiler, "-o", program, source], capture_output=True, text=True, timeout=60, check=False
    )
    if "asm/bootparam.h: No such file" in built.stderr:
        pytest.skip("no kernel headers")
    assert built.returncode == 0, built.stderr
    output = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout
    theirs = {(s, f): int(offset) for s, f, offset in (line.split() for line in output.splitlines())}
    assert {key: BOOT.offsetof(f"struct {key[0]}", key[1]) for key in ours} == theirs


def test_importing_the_module_does_not_import_cffi():
    import sys

    code = "import sys, kvmpy.memory.cstructs; assert 'cffi' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert cstructs.BOOT is BOOT
