# SPDX-License-Identifier: Apache-2.0
"""The peers' table: sizes as their formats say, weights in llama.cpp's order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from benchmarks.peers import __main__ as peers
from benchmarks.peers import gguf_model, report


@pytest.mark.parametrize(
    ("kind", "bits"),
    [
        ("q8_0", 8.5),
        ("u8", 9.0),
        ("turbo3", 3.5),
        ('fibquant_2bit {"mode": "exact"}', 2.25),
        ("fibquant_2bit", 2.25 + 16 * 132 / 8192),  # the newest 128 and first 4 in 16 bits as well
    ],
)
def test_everything_that_is_stored_is_counted(kind, bits):
    assert report.bits_of(kind, 64) == bits


def test_the_table_has_the_newest_result_of_each_cache():
    row = {"engine": "llama.cpp", "kind": "q4_0", "head_dim": 64, "vectors_per_token": 180}
    quality = {"bench": "quality", "against": "f16", "delta_ppl": 0.1, "kl": 0.05, "kl_999": 1.5}
    speed = {"bench": "speed", "context": 1024, "tokens_per_second": 12.34}
    rows = [row | quality | {"kl": 9.0}, row | quality, row | speed]
    lines = report.table(rows).splitlines()
    assert lines[2] == "| llama.cpp | `q4_0` | 4.50 | 6,480 | +10.0% | 0.0500 | 1.50 | 12.3 |"
    assert len(lines) == 3


def test_rotated_pairs_lie_beside_each_other_in_gguf():
    """In transformers coordinate i is turned together with i + head_dim / 2."""
    rows = np.arange(2 * 6, dtype=np.float32)[:, None]  # two heads of 6
    got = gguf_model.pairs_beside(rows, 2)[:, 0].tolist()
    assert got == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]


def test_tensors_have_ggufs_names():
    names = ("model.layers.7.self_attn.o_proj", "model.embed_tokens", "model.norm")
    got = [gguf_model.gguf_name(f"{name}.weight") for name in names]
    assert got == ["blk.7.attn_output.weight", "token_embd.weight", "output_norm.weight"]


def test_a_peer_that_is_not_installed_is_left_out_with_a_sentence(capsys):
    assert peers.python_of("OpenVINO", Path("/nowhere/bin/python")) is None
    assert capsys.readouterr().out == (
        "OpenVINO: left out, /nowhere/bin/python cannot import openvino_genai; run: make peers\n"
    )
    assert peers.python_of("vLLM", Path("/nowhere/bin/python")) is not None
