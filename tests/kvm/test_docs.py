# SPDX-License-Identifier: Apache-2.0
"""docs/ioctls.md is complete and true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from kvmpy import _kvm
from kvmpy._constants import IOCTLS, Cap

HERE = Path(__file__).parent
DOCUMENT = HERE.parent.parent / "docs" / "ioctls.md"
HEADER = Path("/usr/include/linux/kvm.h")

ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.read_text().splitlines()
    if line.startswith("| `KVM_")
]
WRAPPED = {row[0].strip("`"): row[1:] for row in ROWS if len(row) == 5}
LEFT_OUT = {row[0].strip("`") for row in ROWS if len(row) == 2}


def test_every_ioctl_stands_in_the_table_once():
    assert sorted(WRAPPED) == sorted(IOCTLS)
    assert len(ROWS) == len(WRAPPED) + len(LEFT_OUT)


@pytest.mark.parametrize("name", sorted(IOCTLS))
def test_a_row_is_true(name):
    methods, capabilities, section, test = WRAPPED[name]
    documented = []
    for method in methods.split(", "):
        owner, attribute = method.strip("`").split(".")
        documented.append(getattr(getattr(_kvm, owner), attribute).__doc__)
    assert all(documented)
    if capabilities not in ("basic", "the same"):
        for capability in capabilities.removesuffix(" (system)").split(", "):
            assert capability in Cap.__members__
    assert re.fullmatch(r"[47]\.\d+|-", section)
    file, function = test.strip("`").split("::")
    assert f"def {function}(" in (HERE / file).read_text()


def test_methods_name_their_ioctl():
    """A docstring says which ioctl it is, but for the plain pairs where the property says it for both."""
    for name, (methods, *_) in WRAPPED.items():
        texts = [
            getattr(getattr(_kvm, m.strip("`").split(".")[0]), m.strip("`").split(".")[1]).__doc__
            for m in methods.split(", ")
        ]
        assert any(name in text for text in texts) or name.removeprefix("KVM_").lower() in methods, name


@pytest.mark.skipif(not HEADER.exists(), reason="no kernel headers")
def test_every_ioctl_of_the_header_is_wrapped_or_left_out_for_a_reason():
    defined = set(re.findall(r"#define\s+(KVM_\w+)\s+(?:\\\n\s*)?_IO[WR]*\(KVMIO", HEADER.read_text()))
    assert len(defined) > 100
    assert defined - set(WRAPPED) - LEFT_OUT == set()
