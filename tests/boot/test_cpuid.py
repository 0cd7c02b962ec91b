# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from kvmpy.arch.cpuid import ALIASES, FEATURES, LEVELS, NEEDS, feature_name, without_orphans
from kvmpy.boot.cpuid import CpuidPolicy
from kvmpy.boot.topology import CpuidEntry, Topology

INTEL = (0x756E_6547, 0x6C65_746E, 0x4965_6E69)  # EBX, ECX, EDX of leaf 0
AMD = (0x6874_7541, 0x444D_4163, 0x6974_6E65)


def leaf(function: int, index: int = 0, eax: int = 0, ebx: int = 0, ecx: int = 0, edx: int = 0) -> CpuidEntry:
    return CpuidEntry(
        function, index, 1 if function in (4, 7, 0xB, 0xD, 0x1F, 0x8000_001D) else 0, eax, ebx, ecx, edx
    )


def engine(vendor: tuple[int, int, int] = INTEL) -> list[CpuidEntry]:
    """What a big engine supports: every feature bit set but those of the x86 that no guest sees."""
    ebx, ecx, edx = vendor
    everything = 0xFFFF_FFFF
    return [
        leaf(0, eax=0x1F, ebx=ebx, ecx=ecx, edx=edx),
        leaf(1, eax=0x000A_0F10, ebx=0x7777_0800, ecx=everything, edx=everything),
        leaf(4, 0, eax=0xFC00_4121, ebx=0x02C0_003F, ecx=0x3F),
        leaf(4, 1, eax=0xFC00_4122, ebx=0x01C0_003F, ecx=0x3F),
        leaf(4, 2, eax=0xFC01_C143, ebx=0x03C0_003F, ecx=0x3FF),
        leaf(4, 3, eax=0xFC1F_C163, ebx=0x03C0_003F, ecx=0x7FFF),
        leaf(4, 4),
        leaf(5, eax=0x40, ebx=0x40),
        leaf(6, eax=everything),
        leaf(7, 0, eax=2, ebx=everything, ecx=everything, edx=everything),
        leaf(7, 1, eax=everything, edx=everything),
        leaf(0xB, 0, eax=1, ebx=2, ecx=0x100, edx=77),
        leaf(0xB, 1, eax=6, ebx=40, ecx=0x201, edx=77),
        leaf(0xD, 0, eax=0x2FF | 0x6_0000, ebx=0xA88, ecx=0x2B00),
        leaf(0xD, 1, eax=0x1F, ebx=0x3C8, ecx=0x1800),
        leaf(0xD, 2, eax=256, ebx=576),
        leaf(0xD, 5, eax=64, ebx=1088),
        leaf(0xD, 6, eax=512, ebx=1152),
        leaf(0xD, 7, eax=1024, ebx=1664),
        leaf(0xD, 9, eax=8, ebx=2688),
        leaf(0xD, 11, eax=16, ecx=1),
        leaf(0xD, 17, eax=64, ebx=2752, ecx=2),
        leaf(0xD, 18, eax=8192, ebx=2816, ecx=6),
        leaf(0x14, eax=1),
        leaf(0x15, eax=2, ebx=216, ecx=24_000_000),
        leaf(0x16, eax=2600),
        leaf(0x1F, 0, eax=1, ebx=2, ecx=0x100),
        leaf(0x4000_0000, eax=0x4000_0001),
        leaf(0x4000_0001, eax=0x0100_7EFB),
        leaf(0x8000_0000, eax=0x8000_0021),
        leaf(0x8000_0001, ecx=everything, edx=everything),
        leaf(0x8000_0002, eax=0x4141_4141),
        leaf(0x8000_0007, edx=0x100),
        leaf(0x8000_0008, eax=0x3030, ebx=everything, ecx=0x7_7077),
        leaf(0x8000_001D, 0, eax=0x121),
        leaf(0x8000_001D, 3, eax=0x4163),
        leaf(0x8000_001E),
    ]


def table(policy: CpuidPolicy, index: int = 0) -> dict[tuple[int, int], CpuidEntry]:
    return {(e.function, e.index): e for e in policy.entries(index)}


# -- names


def test_features_are_where_the_manuals_have_them() -> None:
    known = {
        "sse3": (1, 0, "ecx", 0),
        "cx16": (1, 0, "ecx", 13),
        "x2apic": (1, 0, "ecx", 21),
        "avx": (1, 0, "ecx", 28),
        "hypervisor": (1, 0, "ecx", 31),
        "tsc-deadline": (1, 0, "ecx", 24),
        "xsave": (1, 0, "ecx", 26),
        "fpu": (1, 0, "edx", 0),
        "clflush": (1, 0, "edx", 19),
        "sse2": (1, 0, "edx", 26),
        "htt": (1, 0, "edx", 28),
        "arat": (6, 0, "eax", 2),
        "fsgsbase": (7, 0, "ebx", 0),
        "avx2": (7, 0, "ebx", 5),
        "avx512f": (7, 0, "ebx", 16),
        "smap": (7, 0, "ebx", 20),
        "sha": (7, 0, "ebx", 29),
        "avx512vl": (7, 0, "ebx", 31),
        "umip": (7, 0, "ecx", 2),
        "la57": (7, 0, "ecx", 16),
        "rdpid": (7, 0, "ecx", 22),
        "pks": (7, 0, "ecx", 31),
        "fsrm": (7, 0, "edx", 4),
        "serialize": (7, 0, "edx", 14),
        "amx-tile": (7, 0, "edx", 24),
        "arch-capabilities": (7, 0, "edx", 29),
        "ssbd": (7, 0, "edx", 31),
        "avx-vnni": (7, 1, "eax", 4),
        "lam": (7, 1, "eax", 26),
        "avx10": (7, 1, "edx", 19),
        "xsaves": (0xD, 1, "eax", 3),
        "kvmclock_stable": (0x4000_0001, 0, "eax", 24),
        "lahf_lm": (0x8000_0001, 0, "ecx", 0),
        "topoext": (0x8000_0001, 0, "ecx", 22),
        "nx": (0x8000_0001, 0, "edx", 20),
        "lm": (0x8000_0001, 0, "edx", 29),
        "rdtscp": (0x8000_0001, 0, "edx", 27),
        "invtsc": (0x8000_0007, 0, "edx", 8),
        "wbnoinvd": (0x8000_0008, 0, "ebx", 9),
        "btc_no": (0x8000_0008, 0, "ebx", 29),
        "autoibrs": (0x8000_0021, 0, "eax", 8),
    }
    found = {name: FEATURES[feature_name(name)] for name in known}
    assert {n: (f.function, f.index, f.register, f.bit) for n, f in found.items()} == known


def test_tables_name_only_features_that_exist() -> None:
    assert max(f.bit for f in FEATURES.values()) <= 31
    assert set(ALIASES.values()) <= FEATURES.keys()
    assert NEEDS.keys() <= FEATURES.keys()
    assert frozenset().union(*NEEDS.values(), *LEVELS.values()) <= FEATURES.keys()
    for level in LEVELS.values():
        assert without_orphans(level) == level


def test_unknown_feature_says_what_is_close() -> None:
    with pytest.raises(ValueError, match=r"'avx521f'; close to it are avx512f"):
        feature_name("avx521f")
    with pytest.raises(ValueError, match=r"no CPU feature is called 'qqqqqq'$"):
        feature_name("qqqqqq")


# -- the choice


def test_removed_features_take_along_what_needs_them() -> None:
    policy = CpuidPolicy(engine(), "host,-avx,-cx16")
    assert policy.features.isdisjoint({"avx", "avx2", "fma", "f16c", "avx512f", "avx512vl", "vaes", "cx16"})
    assert {"sse4_2", "aes", "xsave"} <= policy.features
    t = table(policy)
    assert not t[1, 0].ecx >> 28 & 1
    assert not t[1, 0].ecx >> 13 & 1
    assert not t[7, 0].ebx >> 16 & 1


def test_named_models_have_their_level_and_nothing_more() -> None:
    for name, level in LEVELS.items():
        features = CpuidPolicy(engine(), name).features
        assert level <= features
        assert not features & {"aes", "smap", "pcid", "la57", "rdrand", "svm", "vmx"}
    t = table(CpuidPolicy(engine(), "x86-64-v1"))
    assert t[7, 0].ebx == t[7, 0].ecx == t[7, 0].edx == 0
    assert t[1, 0].ecx == 1 << 31 | 1 << 24 | 1 << 21


def test_an_added_feature_brings_what_it_needs() -> None:
    features = CpuidPolicy(engine(), "x86-64-v2,+avx2,rdrand=on,lahf_lm=off").features
    assert {"avx2", "avx", "xsave", "rdrand"} <= features
    assert features.isdisjoint({"fma", "lahf_lm"})


def test_the_last_word_on_a_feature_counts() -> None:
    assert "aes" in CpuidPolicy(engine(), "host,-aes,+aes").features
    assert "aes" not in CpuidPolicy(engine(), "host,+aes,-aes").features


@pytest.mark.parametrize(
    ("cpu", "words"),
    [
        ("hots", "no CPU model is called 'hots'; there are host"),
        ("x86-64-v5", "x86-64-v4"),
        ("host,+sse4.3", "no CPU feature is called 'sse4.3'"),
        ("host,aes", "write +feature, -feature"),
        ("host,aes=maybe", "write +feature, -feature"),
        ("host,+avx,-xsave", "avx cannot be had without xsave"),
    ],
)
def test_a_bad_choice_is_a_value_error(cpu: str, words: str) -> None:
    with pytest.raises(ValueError) as caught:
        CpuidPolicy(engine(), cpu)
    assert words in str(caught.value)


def test_what_the_engine_lacks_is_named() -> None:
    weak = [leaf(0, 0, 1, *INTEL), leaf(1, edx=0x0789_FBFF), leaf(0x8000_0001, edx=0x2010_0800)]
    with pytest.raises(ValueError, match="cpu x86-64-v2: the engine does not support cx16, lahf_lm, pni"):
        CpuidPolicy(weak, "x86-64-v2")
    with pytest.raises(ValueError, match=r"cpu \+aes: the engine does not support aes"):
        CpuidPolicy(weak, "host,+aes")
    assert "aes" in CpuidPolicy(weak, "host", allow=["aes"]).features
    with pytest.raises(ValueError, match="leaf 0 or 1"):
        CpuidPolicy(weak[1:])


# -- topology


@pytest.mark.parametrize(
    ("topology", "ids"),
    [
        (Topology(4), [0, 1, 2, 3]),
        (Topology(8, threads=2), list(range(8))),
        (Topology(6, threads=1, sockets=2), [0, 1, 2, 4, 5, 6]),
        (Topology(12, threads=2, sockets=2), [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]),
    ],
)
def test_apic_ids_have_a_field_per_level(topology: Topology, ids: list[int]) -> None:
    assert [topology.apic_id(i) for i in range(topology.cpus)] == ids


@pytest.mark.parametrize(("cpus", "threads", "sockets"), [(3, 2, 1), (4, 1, 3), (0, 1, 1), (1, 0, 1)])
def test_processors_must_fill_the_sockets(cpus: int, threads: int, sockets: int) -> None:
    with pytest.raises(ValueError):
        Topology(cpus, threads, sockets)


@pytest.mark.parametrize("vendor", [INTEL, AMD])
def test_the_apic_id_is_the_same_in_every_leaf(vendor: tuple[int, int, int]) -> None:
    policy = CpuidPolicy(engine(vendor), cpus=12, threads=2, sockets=2)
    for index in range(12):
        t = table(policy, index)
        apic = policy.apic_id(index)
        assert t[1, 0].ebx >> 24 == apic
        assert {t[0xB, i].edx for i in range(3)} == {t[0x1F, i].edx for i in range(3)} == {apic}
        if vendor == AMD:
            assert t[0x8000_001E, 0].eax == apic


def test_leaf_b_describes_threads_and_cores() -> None:
    t = table(CpuidPolicy(engine(), cpus=12, threads=2, sockets=2), 7)
    rows = [(e.eax, e.ebx, e.ecx) for key, e in sorted(t.items()) if key[0] == 0xB]
    assert rows == [(1, 2, 0x100), (3, 6, 0x201), (0, 0, 2)]


def test_intel_caches_are_shared_within_core_and_package() -> None:
    t = table(CpuidPolicy(engine(), cpus=8, threads=2))
    assert [(t[4, i].eax >> 14 & 0xFFF, t[4, i].eax >> 26) for i in range(4)] == [
        (1, 3),
        (1, 3),
        (1, 3),
        (7, 3),
    ]
    assert [t[4, i].eax & 0x3FFF for i in range(5)] == [0x121, 0x122, 0x143, 0x163, 0]
    assert t[1, 0].ebx >> 16 & 0xFF == 8
    assert t[1, 0].edx >> 28 & 1


def test_amd_topology_leaves() -> None:
    t = table(CpuidPolicy(engine(AMD), cpus=6, threads=2), 5)
    assert t[0x8000_0008, 0].ecx == 0x7_0000 | 3 << 12 | 5
    assert (t[0x8000_001E, 0].ebx, t[0x8000_001E, 0].ecx) == (0x102, 0)
    assert [t[0x8000_001D, i].eax >> 14 for i in (0, 3)] == [1, 5]
    assert t[1, 0].ebx >> 16 & 0xFF == 6
    assert t[0x8000_0001, 0].ecx & 2


def test_one_processor_is_not_hyperthreaded() -> None:
    t = table(CpuidPolicy(engine(AMD)))
    assert not t[1, 0].edx >> 28 & 1
    assert not t[0x8000_0001, 0].ecx & 2
    assert [(t[0xB, i].eax, t[0xB, i].ebx) for i in range(3)] == [(0, 1), (0, 1), (0, 0)]


# -- coherence


def test_xsave_leaf_offers_the_state_of_the_features() -> None:
    t = table(CpuidPolicy(engine(), "host,-amx-tile,-mpx"))
    assert (t[0xD, 0].eax, t[0xD, 0].ebx, t[0xD, 0].ecx, t[0xD, 0].edx) == (0x2E7, 576, 2696, 0)
    assert (t[0xD, 1].ecx, t[0xD, 17].eax) == (0x1800, 0)
    t = table(CpuidPolicy(engine(), "host,-avx512f,-pku,-amx-tile,-mpx"))
    assert (t[0xD, 0].eax, t[0xD, 0].ecx, t[0xD, 5].eax) == (7, 832, 0)
    t = table(CpuidPolicy(engine(), "host,-avx,-pku,-amx-tile,-mpx,-xsaves"))
    assert (t[0xD, 0].eax, t[0xD, 0].ecx, t[0xD, 1].ecx) == (3, 576, 0)


def test_without_xsave_its_leaf_is_empty() -> None:
    t = table(CpuidPolicy(engine(), "host,-xsave"))
    assert all(
        (e.eax, e.ebx, e.ecx, e.edx) == (0, 0, 0, 0) for key, e in t.items() if key[0] == 0xD and key[1] != 1
    )
    assert t[0xD, 1].eax == 0


def test_bits_that_follow_cr4_start_clear() -> None:
    t = table(CpuidPolicy(engine()))
    assert not t[1, 0].ecx >> 27 & 1
    assert not t[7, 0].ecx >> 4 & 1


def test_amd_repeats_leaf_1_in_its_own() -> None:
    t = table(CpuidPolicy(engine(AMD), "host,-mtrr"))
    assert not t[0x8000_0001, 0].edx >> 12 & 1
    assert t[0x8000_0001, 0].edx & 1


def test_leaves_of_absent_features_and_clock_rates_are_blank() -> None:
    t = table(CpuidPolicy(engine(), "host,-monitor,-intel_pt"))
    for function in (5, 0x14, 0x15, 0x16):
        assert (t[function, 0].eax, t[function, 0].ebx, t[function, 0].ecx) == (0, 0, 0)


def test_hypervisor_leaves_have_the_kvm_signature() -> None:
    t = table(CpuidPolicy(engine(), tsc_khz=2_600_000))
    signature = b"".join(
        x.to_bytes(4, "little") for x in (t[0x4000_0000, 0].ebx, t[0x4000_0000, 0].ecx, t[0x4000_0000, 0].edx)
    )
    assert signature == b"KVMKVMKVM\0\0\0"
    assert t[0x4000_0000, 0].eax == 0x4000_0010
    assert (t[0x4000_0010, 0].eax, t[0x4000_0010, 0].ebx) == (2_600_000, 1_000_000)
    assert t[0x4000_0001, 0].eax == 0x0100_7EFB
    assert t[1, 0].ecx >> 31 == 1


def test_hypervisor_can_hide() -> None:
    t = table(CpuidPolicy(engine(), "host,-hypervisor"))
    assert not [key for key in t if 0x4000_0000 <= key[0] < 0x5000_0000]
    assert not t[1, 0].ecx >> 31


def test_brand_is_the_engines_or_the_models() -> None:
    assert table(CpuidPolicy(engine()))[0x8000_0002, 0].eax == 0x4141_4141
    t = table(CpuidPolicy(engine(), "x86-64-v3"))
    text = b"".join(
        getattr(t[0x8000_0002 + i, 0], r).to_bytes(4, "little")
        for i in range(3)
        for r in ("eax", "ebx", "ecx", "edx")
    )
    assert text.rstrip(b"\0") == b"kvmpy x86-64-v3"


def test_policy_is_taken_by_the_engine(vm) -> None:
    policy = CpuidPolicy(vm.kvm.get_supported_cpuid(), "host,-cx16", cpus=2)
    for index in range(2):
        vcpu = vm.create_vcpu(policy.apic_id(index))
        vcpu.cpuid = policy.kvm_entries(index)
        got = {(e.function, e.index): e for e in vcpu.cpuid}
        assert got[1, 0].ebx >> 24 == index
        assert got[0xB, 0].edx == index
        assert not got[1, 0].ecx >> 13 & 1
