# SPDX-License-Identifier: Apache-2.0
"""What ranks compare, and what is said when they differ."""

from __future__ import annotations

import pytest

from vllm_fibquant.codec.codebook import make_codebook
from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.engine.ranks import differences, digest_of, facts_of
from vllm_fibquant.options import parse_options

NEEDS_ENGINE = False

HEAD_DIM = 64


def rank(preset="fibquant_2bit", head_dim=HEAD_DIM, calibrated="none", **given):
    """The facts of a rank whose layers have one codec."""
    options = parse_options(preset, {"fibquant": {"mode": "exact", **given}})
    return facts_of([(options, KVCodec.from_preset(options.preset, head_dim), calibrated)])


def rank_with_another_codebook():
    """As `rank()`, but a value of the keys' codebook is another."""
    options = parse_options("fibquant_2bit", {"fibquant": {"mode": "exact"}})
    codec = KVCodec.from_preset(options.preset, HEAD_DIM)
    book = codec.key.codebook
    table = book.table.numpy().copy()
    table[7, 1] ^= 1
    other, _ = make_codebook(book.spec, HEAD_DIM, table, book.scale, book.provenance)
    key = VectorCodec(codec.key.spec, HEAD_DIM, other, codec.key.rotation)
    return facts_of([(options, KVCodec(key, codec.value), "none")])


def test_ranks_compare_what_their_keys_are_coded_by_and_not_where_it_is():
    first, second = 64 * "a", 64 * "b"
    here = rank(calibrated=first, calibrate="means", calibration="/here/a.fqcal")
    there = rank(calibrated=first, calibrate="means", calibration="/there/b.fqcal")
    assert differences([here, there]) == []
    assert digest_of(here) == digest_of(there)
    other = rank(calibrated=second, calibrate="means", calibration="/here/a.fqcal")
    assert [line.split(":")[0] for line in differences([here, other])] == [
        "digest of the calibration"
    ]
    assert digest_of(here) != digest_of(other)


def test_equal_ranks_agree():
    assert differences([rank(), rank(), rank()]) == []
    assert digest_of(rank()) == digest_of(rank())


def test_ranks_without_our_layers_agree_with_everybody():
    assert facts_of([]) == {}
    assert differences([rank(), {}, rank()]) == []
    assert differences([{}]) == []


def test_other_layers_are_compared_in_what_they_share():
    assert differences([rank(), rank(head_dim=128)]) == []
    lines = differences([rank(), rank(head_dim=128, recent_window=8, mode="quality")])
    assert [line.split(":")[0] for line in lines] == ["prefill", "recent_window"]


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"rotation_seed": 1}, "rotation for head_dim 64"),
        ({"mode": "quality"}, "recent_window"),
        ({"key": {"gain": "norm"}}, "preset"),
        ({"retain": {"recent": 8}}, "retain"),
        ({"layers": {"0": "fibquant"}}, "layers"),
    ],
)
def test_every_option_is_compared(change, name):
    lines = differences([rank(), rank(), rank(**change), rank()])
    (line,) = [line for line in lines if line.startswith(f"{name}: ")]
    assert "must be the same on every rank" in line
    assert "on rank 0, 1, 3; " in line
    assert line.endswith("on rank 2")
    assert digest_of(rank()) != digest_of(rank(**change))


def test_another_codebook_is_named_with_its_ranks():
    same, other = rank(), rank_with_another_codebook()
    name = "keys' codebook k4n256 in int8 for head_dim 64"
    (line,) = differences([same, other])
    assert line == (
        f"{name}: must be the same on every rank, got {same[name]} on rank 0; "
        f"{other[name]} on rank 1"
    )
    assert same[name] != other[name]
