# SPDX-License-Identifier: Apache-2.0
"""Wavefronts of shared memory in decode attention, counted from the addresses lanes read.

A read of 32 lanes takes as many wavefronts as there are different words in one bank, for each part
of the warp that is served at once: all lanes for 4 bytes, half for 8, a quarter for 16. Addresses
follow csrc/cuda/codes.h and attend.h; which token a lane reads, the library says.
"""

from __future__ import annotations

import random
import shutil

import pytest

from benchmarks import machine_code
from tests import emulated as emu
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.ops.cuda import Library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++")

SHOWN = ("fibquant_4bit", "fibquant_k5v3", "fibquant_3bit", "fibquant_2bit", "fibquant_1bit")


def wavefronts(addresses: list[int], num_bytes: int) -> int:
    """Of one read of num_bytes by each of 32 lanes."""
    at_once = 32 * 4 // num_bytes
    total = 0
    for begin in range(0, 32, at_once):
        banks: dict[int, set[int]] = {}
        for address in addresses[begin : begin + at_once]:
            for word in range(address // 4, (address + num_bytes) // 4):
                banks.setdefault(word % 32, set()).add(word)
        total += max(len(words) for words in banks.values())
    return total


def index_words(spec, coords: int) -> int:
    """Words a lane reads of its indices: one more where they begin or end within a word."""
    field = -(-coords // spec.subvec_dim) * spec.index_bits
    is_aligned = coords % spec.subvec_dim == 0 and field % 32 == 0
    return -(-field // 32) + (not is_aligned)


def per_token(library: Library, codec: KVCodec) -> dict[str, float]:
    """Wavefronts a token by what is read, of a warp that decodes a tile of 16."""
    order, at, head_dim = library.token_order(codec), codec.layout, codec.head_dim
    assert sorted(order) == list(range(16))
    rng, lanes, tile = random.Random(0), range(32), dict.fromkeys(("tables", "indices", "norms"), 0)
    key, value = codec.key.spec, codec.value.spec
    for row in (0, 8):
        for word in range(index_words(key, head_dim // 4)):
            tile["indices"] += wavefronts([
                order[lane // 4 + row] * at.record_bytes
                + lane % 4 * (head_dim // 4) // key.subvec_dim * key.index_bits // 32 * 4 + word * 4
                for lane in lanes
            ], 4)  # fmt: skip
        tile["norms"] += wavefronts(
            [order[lane // 4 + row] * at.record_bytes + at.key_norm_offset for lane in lanes], 4
        )
    for row in (0, 1, 8, 9):
        for word in range(index_words(value, head_dim // 8)):
            tile["indices"] += wavefronts([
                order[lane % 4 * 2 + row] * at.record_bytes + at.value_index_offset
                + lane // 4 * (head_dim // 8) // value.subvec_dim * value.index_bits // 32 * 4
                + word * 4
                for lane in lanes
            ], 4)  # fmt: skip
    for spec, coords, tokens, is_value in (
        (key, head_dim // 4, 2, False), (value, head_dim // 8, 4, True)
    ):  # fmt: skip
        copies = 128 // (2 * spec.subvec_dim)
        num_bytes = 2 * spec.subvec_dim if not is_value else min(8, 2 * spec.subvec_dim)
        for read in range(coords * 2 // num_bytes):
            tile["tables"] += tokens * wavefronts([
                rng.randrange(256) * 256 + is_value * 128 + lane % copies * 2 * spec.subvec_dim
                + (((lane // 8 + read) % 2 * 8) if num_bytes < 2 * spec.subvec_dim else 0)
                for lane in lanes
            ], num_bytes)  # fmt: skip
    return {name: n / 16 for name, n in tile.items()} | {"copies": at.record_bytes / 128}


@pytest.fixture(scope="module")
def library() -> Library:
    return emu.emulated()


@pytest.mark.parametrize("head_dim", [64, 128, 192, 256])
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "fibquant"])
def test_tables_are_read_without_conflicts(library, name: str, head_dim: int) -> None:
    """Codewords of keys and of values: 2 bytes a coordinate, 128 bytes a wavefront."""
    found = per_token(library, KVCodec.from_preset(PRESETS[name], head_dim))
    assert found["tables"] == 2 * head_dim * 2 / 128
    assert found["norms"] <= 0.25


def test_the_documents_wavefronts_are_counted(library) -> None:
    lines = []
    for name in SHOWN:
        found = per_token(library, KVCodec.from_preset(PRESETS[name], 128))
        cells = [f"{found[x]:.1f}" for x in ("tables", "indices", "norms", "copies")]
        lines.append(f"| `{name}` | {' | '.join(cells)} | {sum(found.values()):.1f} |")
    assert "\n".join(lines) in machine_code.DOCUMENT.read_text(), "\n".join(lines)


def test_the_order_of_tokens_saves_wavefronts(library) -> None:
    """Beside the order 0, 1, 2, ...: the bound that the search must keep to."""
    for name, before in (("fibquant_4bit", 3.0), ("fibquant_k5v3", 3.5), ("fibquant_2bit", 2.0)):
        found = per_token(library, KVCodec.from_preset(PRESETS[name], 128))
        assert found["indices"] <= before - 0.75, name
