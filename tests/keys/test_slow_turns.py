# SPDX-License-Identifier: Apache-2.0
"""Rotary embeddings that turn no pair fast, as where positions are scaled by a large factor."""

from __future__ import annotations

import pytest

from tests.keys import test_key_map
from tests.keys.test_key_map import make_turns, mapped
from tests.ops.test_attention import check_against_oracle
from vllm_fibquant.keys.key_map import Turns


def test_where_no_pair_turns_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = make_turns(64)
    slow = Turns(turns.pairs, turns.frequency / 100, turns.length, turns.num_positions)
    assert bool(slow.is_slow.all())
    monkeypatch.setattr(test_key_map, "make_turns", lambda head_dim: slow)
    check_against_oracle(mapped([70, 1100], [1, 3], group_size=3, turning=True))
