# SPDX-License-Identifier: Apache-2.0
"""A library is loaded only if its structs have our fields, by name, place and size."""

from __future__ import annotations

from ctypes import Structure

import pytest

from vllm_fibquant.ops import cpu_library, cuda
from vllm_fibquant.ops.abi import load_library

STRUCTS = tuple(
    getattr(cpu_library, f"Fq{name}")
    for name in (
        "Code", "Codec", "Pages", "Encode", "Batch", "CopyPool", "Attend", "KeyMap",
        "EncodeLatents", "AttendLatents",
    )
)  # fmt: skip


def load(structs):
    return load_library("test", cpu_library.LIBRARY_PATH, "fq_abi", structs, "build it again")


def changed(struct, change):
    """Structs of which `struct` has other fields."""
    fields = list(struct._fields_)
    change(fields)
    other = type("Other", (Structure,), {"_fields_": fields})
    return [other if s is struct else s for s in STRUCTS]


def test_our_structs_are_the_librarys():
    load(STRUCTS)


def exchange(fields):
    fields[0], fields[1] = fields[1], fields[0]


def rename(fields):
    fields[-1] = ("other", fields[-1][1])


@pytest.mark.parametrize("change", [exchange, rename, list.pop])
@pytest.mark.parametrize("struct", STRUCTS, ids=lambda s: s.__name__)
def test_other_fields_are_refused(struct, change):
    """Exchanged fields leave a struct's size as it was."""
    with pytest.raises(RuntimeError, match="must be built from this version's sources.*got"):
        load(changed(struct, change))


def test_a_library_that_describes_nothing_is_refused():
    with pytest.raises(RuntimeError, match="got 'nothing'"):
        load_library(
            "test", cpu_library.LIBRARY_PATH, "no_such_function", STRUCTS, "build it again"
        )


def test_a_library_that_is_missing_or_none_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="is missing; build it with `make cuda`"):
        cuda.Library(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(RuntimeError, match="does not load"):
        cuda.Library(tmp_path / "text.so")
