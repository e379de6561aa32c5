# SPDX-License-Identifier: Apache-2.0
"""The worked examples, in a quick setting: they run, and codes beat scalars at equal bytes."""

from __future__ import annotations

import pytest
import torch

from examples import audio_frames, image_features
from examples.compare import compare
from vllm_fibquant.codec.codebook import load_codebook
from vllm_fibquant.codec.codec import VectorCodec
from vllm_fibquant.codec.config import CodeSpec
from vllm_fibquant.codec.rotation import make_rotation

VECTORS = {"image": image_features.patches, "audio": audio_frames.frames}


@pytest.mark.parametrize("name", VECTORS)
def test_codes_beat_scalars_of_the_same_bytes(name: str) -> None:
    x = VECTORS[name](1200)
    assert x.shape == (1200, 64) and x.isfinite().all()
    rows = {r["name"]: r for r in compare(x, 100)}
    for code, scalar in (("k4n256", "int2"), ("k4n4096f", "int3"), ("k2n256", "int4")):
        assert rows[code]["bytes"] == rows[scalar]["bytes"]
        assert rows[code]["snr_db"] > rows[scalar]["snr_db"] + 1
    by_size = sorted((r for n, r in rows.items() if n[0] == "k"), key=lambda r: r["bytes"])
    for field in ("snr_db", "recall"):
        values = [r[field] for r in by_size]
        assert values == sorted(values) and values[-1] > values[0]
    assert rows["int8"]["recall"] > 0.97


@pytest.mark.parametrize("example", [image_features, audio_frames])
def test_examples_print_and_plot(example, tmp_path, capsys) -> None:
    path = tmp_path / "plot.png"
    example.main(["--vectors", "300", "--queries", "20", "--plot", str(path)])
    assert "| k4n256 | 18 | 2.25 |" in capsys.readouterr().out
    assert path.stat().st_size > 10_000


@pytest.mark.parametrize("option, value", [("--vectors", 9), ("--queries", 0), ("--queries", -5)])
def test_too_few_vectors_are_refused(option, value, capsys) -> None:
    with pytest.raises(SystemExit):
        image_features.main(["--vectors", "10", "--queries", "1", option, str(value)])
    assert "--vectors must be at least 10, --queries at least 1" in capsys.readouterr().err


def test_codec_from_spec() -> None:
    spec = CodeSpec(4, 256, gain="mse")
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(0))
    made = VectorCodec.from_spec(spec, 64, rotation_seed=3)
    expected = VectorCodec(spec, 64, load_codebook(spec, 64), make_rotation(64, 3))
    for got, want in zip(made.encode(x), expected.encode(x), strict=True):
        assert torch.equal(got, want)
    with pytest.raises(ValueError, match="codebook build"):
        VectorCodec.from_spec(CodeSpec(4, 64), 40)
