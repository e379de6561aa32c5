# SPDX-License-Identifier: Apache-2.0
"""The PTX of the CUDA kernels against the oracle, and what happens when it is changed.

The emulator's tests, all of them, also run on PTX: tests/ptx/test_every_case.py, which is slow.
"""

from __future__ import annotations

import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from tests import emulated as emu
from tests.engine.test_device_pool import Run
from tests.ops import test_cuda_copies as copied
from tests.ops.test_copies import make_copies
from tests.ops.test_cuda_banks import per_token
from tests.ops.test_cuda_emulated import check, codec_of, encode_both, paged_of
from tests.ops.test_retention import other_query
from tests.paged import check_records
from tests.ptx import device
from tests.ptx.memory import Shared
from tests.ptx.parse import Fault
from vllm_fibquant.ops import cuda

pytestmark = [
    pytest.mark.skipif(not device.has_nvcc(), reason="nvcc is not installed: no PTX to run"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the launchers need g++"),
]
TWO_WARPS = (72 << 10, 73 << 10)
"""Shared memory in which decode of 3 bits and head_dim 64 has two warps."""


@pytest.fixture
def library(request):
    """The emulated library, whose launches run as PTX."""
    with device.running(emu.emulated(), getattr(request, "param", "90")) as ran:
        yield emu.emulated()
    assert ran.ran, "no kernel ran"


@pytest.mark.parametrize(
    ("library", "name", "head_dim", "group_size", "launch"),
    [
        ("90", "fibquant_3bit", 64, 1, {}),
        ("80", "fibquant_3bit", 64, 3, {"wide": True}),
        ("80", "fibquant_4bit", 64, 8, {"num_splits": 1}),
        ("90", "fibquant_k5v3", 64, 4, {"num_splits": 35}),
        ("90", "fibquant_2bit", 64, 4, {"wide": True, "num_splits": 1}),
        ("90", "fibquant_1bit", 64, 3, {"wide": True}),
        ("80", "fibquant_1bit", 96, 3, {}),
        ("90", "fibquant_k5v3", 128, 4, {"num_splits": 1}),
        ("90", "fibquant_k5v4", 80, 3, {}),
        ("90", "fibquant_1bit", 80, 3, {"wide": True}),
    ],
    indirect=["library"],
)
def test_attention(library, name: str, head_dim: int, group_size: int, launch: dict) -> None:
    lens, queries = [70, 1, 33], [1, 1, 9 if launch.get("wide") else 2]
    paged = paged_of(codec_of(name, head_dim), lens, queries, group_size=group_size)
    check(library, paged, **launch)


@pytest.mark.parametrize("seen", [{"window": 20}, {"chunk": 21}], ids=str)
def test_window_or_chunk_and_cap_and_sinks(library, seen: dict) -> None:
    paged = paged_of(codec_of("fibquant_3bit", 64), [50, 101, 5], [9, 2, 5], group_size=3)
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(1)) * 3
    for wide in (False, True):
        check(library, paged, num_splits=2, wide=wide, soft_cap=5.0, sinks=sinks, **seen)


@pytest.mark.parametrize("library", ["80", "90", "120"], indirect=True)
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_copies(library, kind: str) -> None:
    """Read in the place of codes, also of first tokens that have means of their own, of which
    chunks leave some out."""
    lens, queries = [90, 1, 33], [1, 1, 7]
    if kind == "plain":
        paged = paged_of(codec_of("fibquant_3bit", 64), lens, queries, group_size=3)
    else:
        paged = copied.mapped_of("fibquant_3bit", 64, lens, queries, group_size=3)
    copies = make_copies(paged, 4, 40, torch.float16, 0.7)
    for options in ({"window": 60}, {"chunk": 30}):
        copied.check(library, paged, copies=copies, **options)


@pytest.mark.parametrize("num_splits", [1, 3])
def test_kept_first_tokens(library, num_splits: int) -> None:
    paged = paged_of(codec_of("fibquant_3bit", 64), [90, 1, 33], [1, 1, 7], group_size=3)
    options = {"keep_first": 20, "window": 30, "first_query": other_query(paged)}
    check(library, paged, num_splits=num_splits, **options)


@pytest.mark.parametrize("library", ["80", "90", "120"], indirect=True)
def test_plans_of_copies(library) -> None:
    """A batch of several requests, chunks and decodes, blocks that change hands, and few rows."""
    run = Run(num_rows=90, num_first=2, num_recent=20)
    found = []
    for batch in (
        [([1, 2, 3], 0, 40), ([4], 0, 9), ([], 0, 0)],
        [([1, 2, 3], 40, 1), ([4, 5], 9, 1), ([6, 7], 0, 30)],
        [([3, 1], 0, 17), ([6, 7], 30, 2)],
    ):
        found += run.step(batch)
    assert sum(map(len, found)) > 40


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_encode_copies(library, dtype: torch.dtype) -> None:
    copied.test_new_tokens_are_copied_as_they_are(library, dtype, 64, "plain")


@pytest.mark.parametrize(
    ("library", "name", "head_dim"),
    [
        ("80", "fibquant_k5v3", 64),
        ("90", "fibquant_3bit", 64),
        ("90", "fibquant_1bit", 64),
        ("90", "fibquant_k5v4", 80),
    ],
    indirect=["library"],
)
def test_encode(library, name: str, head_dim: int) -> None:
    codec = codec_of(name, head_dim)
    key, value = torch.randn(2, 21, 2, head_dim, generator=torch.Generator().manual_seed(2)) * 3
    key[3, 1, 7], value[4, 0, 8] = float("nan"), -float("inf")
    key[5], value[6], key[7, 0, 1] = 0.0, 1e-41, 3e38
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:20]
    slots[9], slots[11] = -1, 64
    got, expected, counters = encode_both(library, codec, key, value, slots)
    assert counters == [2, 2]
    check_records(codec, got, expected)


# ---- wavefronts ---------------------------------------------------------------------------------


def wavefronts(lanes: np.ndarray, at: np.ndarray, size: int) -> int:
    """Of one read by whole warps: the most different words in a bank, for each part of a warp that
    is served at once."""
    part = lanes // (128 // size)
    words = (at[:, None] + np.arange(0, size, 4)) // 4
    pairs = np.stack([np.broadcast_to(part[:, None], words.shape), words], -1).reshape(-1, 2)
    read = np.unique(pairs, axis=0)
    read[:, 1] %= 32
    banks, counts = np.unique(read, axis=0, return_counts=True)
    most = np.zeros(part.max() + 1, np.int64)
    np.maximum.at(most, banks[:, 0], counts)
    return int(most.sum())


@pytest.mark.parametrize("name", ["fibquant_k5v3", "fibquant_1bit"])
def test_the_documents_wavefronts_are_those_of_the_ptx(monkeypatch, name: str) -> None:
    """What tests/ops/test_cuda_banks.py counts by formulas, counted from every address read."""
    codec, total, load = codec_of(name, 128), [0], Shared.load

    def counted(self, where, lanes, at, size: int, count: int):
        total[0] += wavefronts(lanes, at, max(4, size * count))
        return load(self, where, lanes, at, size, count)

    monkeypatch.setattr(Shared, "load", counted)
    found = {}
    for tokens in (256, 512):
        total[0] = 0
        with device.running(emu.emulated()):
            paged = paged_of(codec, [tokens], [1], num_kv_heads=1, group_size=4)
            emu.attend(emu.emulated(), paged, num_splits=1)
        found[tokens] = total[0]
    expected = per_token(emu.emulated(), codec)
    assert (found[512] - found[256]) / 256 == pytest.approx(
        expected["tables"] + expected["indices"] + expected["norms"]
    )


# ---- changes of the PTX -------------------------------------------------------------------------

NARROW, WIDE = "attendILi64ELi3ELi3ELi1E", "attendILi64ELi5ELi5ELi4E"
MERGE, ENCODE, COPIES = "merge", "encode", "attend_copies"
SYNC = re.compile(
    r"\n\s*(bar\.sync\s+0|bar\.warp\.sync\s+\S+|cp\.async\.(?:commit_group|wait_group \d+));"
)


def run(kernel: str, monkeypatch, change=str) -> None:
    """A case that executes all of a kernel; `change` is made in that kernel alone."""

    def only(text: str) -> str:
        # What stands before a kernel is of all of them, and may name others.
        name = text.split(".entry ")[1].split("(")[0]
        return change(text) if kernel in name else text

    monkeypatch.setattr(cuda, "ENCODE_CTAS_PER_SM", 1)  # so that a warp encodes several vectors
    library, codec = emu.emulated(), codec_of("fibquant_3bit", 64)
    try:
        emu.options(library, shared=TWO_WARPS)
        with device.running(library, change=only) as ran:
            if kernel == ENCODE:
                key, value = torch.randn(2, 16, 2, 64, generator=torch.Generator().manual_seed(2))
                got, expected, _ = encode_both(library, codec, key, value, torch.arange(16) + 20)
                check_records(codec, got, expected)
            elif kernel == COPIES:
                paged = paged_of(codec, [200, 40], [1, 9], num_kv_heads=1, group_size=3)
                copies = make_copies(paged, 4, 70, torch.float16, 0.8)
                copied.check(library, paged, copies=copies, num_splits=1)
            else:
                wide = kernel == WIDE
                lens, queries = [200, 40], [1, 9 if wide else 2]
                paged = paged_of(codec, lens, queries, num_kv_heads=1, group_size=3)
                check(library, paged, wide=wide, num_splits=40 if kernel == MERGE else 1)
    finally:
        emu.options(library)
    assert kernel.split("I")[0] in ran.ran


def without(number: int, syncs: list[str]):
    """A change that drops barrier or wait `number`, and notes what all of them are."""

    def change(text: str) -> str:
        found = list(SYNC.finditer(text))
        syncs[:] = [" ".join(m[1].split()) for m in found]
        return text[: found[number].start()] + text[found[number].end() :]

    return change


@pytest.mark.parametrize(
    ("kernel", "spare"),
    [
        (ENCODE, Counter()),
        (MERGE, Counter()),
        # One for each row: they order global memory, which is not watched.
        (COPIES, Counter({"bar.warp.sync -1": 4})),
        pytest.param(NARROW, Counter(), marks=pytest.mark.long),
        pytest.param(WIDE, Counter(), marks=pytest.mark.slow),
    ],
)
def test_no_barrier_and_no_wait_can_be_dropped(monkeypatch, kernel: str, spare: Counter) -> None:
    syncs: list[str] = []
    number, unseen = 0, Counter()
    while number == 0 or number < len(syncs):
        try:
            run(kernel, monkeypatch, without(number, syncs))
            unseen[syncs[number]] += 1
        except (Fault, AssertionError):
            pass
        number += 1
    assert unseen <= spare, f"not noticed of {syncs}: {unseen}"


@pytest.mark.parametrize(
    ("kernel", "old", "new"),
    [
        (NARROW, r"(mma\.sync\S+ \{[^}]*\}, \{%r\d+), (%r\d+), (%r\d+)", r"\1, \3, \2"),
        (NARROW, r"(mma\.sync.*\}, \{)(%r\d+), (%r\d+)(\}, \{%f)", r"\1\3, \2\4"),
        (NARROW, r"wait_group 2", "wait_group 3"),
        (WIDE, r"movmatrix\S+ (%r\d+)", r"mov.b32 \1"),
    ],
)
def test_a_change_of_the_products_is_noticed(monkeypatch, kernel: str, old: str, new: str) -> None:
    def change(text: str) -> str:
        changed, count = re.subn(old, new, text, count=1)
        assert count, f"PTX must hold {old}"
        return changed

    with pytest.raises((Fault, AssertionError)):
        run(kernel, monkeypatch, change)
