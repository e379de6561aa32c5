# SPDX-License-Identifier: Apache-2.0
"""docs/page-layout.md, layout.py and csrc/page_layout.h say the same of every byte."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from tests.paged import record_layout
from vllm_fibquant.codec.codec import KVCodec, unpack_indices
from vllm_fibquant.codec.config import PRESETS

DOCUMENT = Path(__file__).parents[2] / "docs" / "page-layout.md"
ROW = re.compile(r"^\| `(\w+)` \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", re.M)


def test_document_python_and_library_agree() -> None:
    rows = ROW.findall(DOCUMENT.read_text())
    assert {row[0] for row in rows} == set(PRESETS) - {"fibquant"}
    for name, head_dim, *offsets in rows:
        codec = KVCodec.from_preset(PRESETS[name], int(head_dim))
        layout = codec.layout
        expected = [
            layout.key_index_offset,
            layout.value_index_offset,
            layout.key_norm_offset,
            layout.value_norm_offset,
            layout.record_bytes,
        ]
        assert [int(x) for x in offsets] == expected == record_layout(codec)


def test_record_read_by_hand() -> None:
    """A record written by the library, taken apart with nothing but the document's offsets."""
    from vllm_fibquant import ops

    codec = KVCodec.from_preset(PRESETS["fibquant_3bit"], 64)  # 24 + 24 index bytes, norms at 48
    key, value = torch.randn(2, 1, 1, 64, generator=torch.Generator().manual_seed(0))
    cache = torch.full((1, 1, 16, 52), 0xFF, dtype=torch.uint8)
    ops.encode_kv(key, value, torch.tensor([5]), ops.pages_of(cache, codec))
    record = cache[0, 0, 5]
    for side, x, begin, norm_offset in ((codec.key, key, 0, 48), (codec.value, value, 24, 50)):
        field = record[begin : begin + 24].tolist()
        number = int.from_bytes(bytes(field), "little")
        indices = [number >> (12 * i) & 0xFFF for i in range(16)]
        assert indices == unpack_indices(record[begin : begin + 24], 16, 12).tolist()
        assert indices == side.encode(x)[0].flatten().tolist()
        norm = record[norm_offset : norm_offset + 2].view(torch.float16)
        assert norm.item() == side.encode(x)[1].item()
