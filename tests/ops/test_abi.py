# SPDX-License-Identifier: Apache-2.0
"""Structs are read from the headers as a compiler reads them, and a library that was built from
other headers is not loaded."""

from __future__ import annotations

import ctypes
import subprocess
from ctypes import Structure

import pytest

from tests.ops.test_lanes import ROOT, find_compiler
from vllm_fibquant import headers
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.ops import abi, cpu_library, cpu_tables, cuda, cuda_tables

STRUCTS = {
    name: struct
    for module in (abi, cpu_library, cpu_tables, cuda_tables)
    for name, struct in vars(module).items()
    if name.startswith("Fq")
}


def test_every_struct_of_a_header_is_known():
    declared = [line.split()[1] for line in abi._code().splitlines() if line.startswith("struct ")]
    assert sorted(set(declared)) == sorted(STRUCTS)


def claims(struct):
    """What we take a struct's fields for, for a compiler to contradict."""
    name = struct.__name__
    yield f"sizeof({name}) == {ctypes.sizeof(struct)}"
    for field, kind in struct._fields_:
        at = getattr(struct, field)
        yield f"offsetof({name}, {field}) == {at.offset}"
        yield f"sizeof({name}::{field}) == {at.size}"
        same = {ctypes.c_float: "float", ctypes.c_int32: "int32_t", ctypes.c_int64: "int64_t"}
        if kind in same:
            yield f"std::is_same<decltype({name}::{field}), {same[kind]}>::value"


def compiles(text, folder):
    source = folder / "claims.cpp"
    includes = [f'#include "{name}"' for name in ("cpu/latent_params.h", "cpu/params.h")]
    includes += ['#include "cuda/params.h"', "#include <cstddef>", "#include <type_traits>"]
    source.write_text("\n".join([*includes, *(f'static_assert({c}, "");' for c in text)]))
    command = [*find_compiler(), "-std=c++17", "-fsyntax-only", "-w", "-I", ROOT / "csrc", source]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_compiler_sees_the_same_fields(tmp_path):
    found = [claim for struct in STRUCTS.values() for claim in claims(struct)]
    assert len(found) > 400
    assert compiles(found, tmp_path)
    assert not compiles([found[1].replace("== 0", "== 8")], tmp_path)


def test_a_struct_of_no_header_is_refused():
    with pytest.raises(RuntimeError, match="struct FqNone must be in a header, got none"):
        abi.from_header(type("FqNone", (Structure,), {}))


def load(function):
    return abi.load_library("test", cpu_library.LIBRARY_PATH, "cpu", function, "build it again")


def test_a_library_of_other_headers_is_refused(monkeypatch):
    load("fq_abi")
    known = headers.header_digest("cpu")
    monkeypatch.setattr(abi, "header_digest", lambda library: "others")
    with pytest.raises(RuntimeError, match=f"digest others, got {known}; build it again"):
        load("fq_abi")


def test_a_library_that_says_nothing_is_refused():
    with pytest.raises(RuntimeError, match="must be built from this version's sources.*got none"):
        load("no_such_function")


def test_a_library_that_is_missing_or_none_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="is missing; build it with `make cuda`"):
        cuda.Library(tmp_path / "none.so")
    (tmp_path / "text.so").write_text("no library")
    with pytest.raises(RuntimeError, match="does not load"):
        cuda.Library(tmp_path / "text.so")


def test_tables_begin_where_the_headers_say():
    """At multiples of 64 bytes, as torch allocates."""
    for name in ("fibquant_4bit", "fibquant_3bit", "fibquant_2bit"):
        for tensor in cpu_tables.codec_struct(KVCodec.from_preset(name, 128)).tables:
            assert tensor.data_ptr() % 64 == 0 and tensor.is_contiguous()
