# SPDX-License-Identifier: Apache-2.0
"""Codebook files: what they hold, what is refused, what ships, and the command that shows them."""

import hashlib
import json
import os
import pickle
import struct
from dataclasses import replace

import numpy as np
import pytest
import torch

from vllm_fibquant import files
from vllm_fibquant.cli.main import main
from vllm_fibquant.codec.codebook import (
    MAGIC,
    SHIPPED_DIR,
    codebook_filename,
    load_codebook,
    make_codebook,
    parse_codebook,
    read_codebook,
    shipped_codes,
)
from vllm_fibquant.codec.codebook_build import (
    BuildOptions,
    build_codebook,
    measure_mse,
)
from vllm_fibquant.codec.config import PRESETS, CodeSpec
from vllm_fibquant.codec.source_law import (
    distortion_bound,
    scalar_mse,
)
from vllm_fibquant.files import write_atomically

QUICK = BuildOptions(restarts=1, samples=4096, iterations=3)

# ---- files -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> tuple[CodeSpec, bytes]:
    spec = CodeSpec(4, 32)
    return spec, build_codebook(spec, 64, QUICK)[1]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FIBQUANT_CACHE_DIR", str(tmp_path))
    return tmp_path / "codebooks"


def reseal(body: bytes) -> bytes:
    """A file whose digest is right whatever else is wrong."""
    return body + hashlib.sha256(body).digest()


def test_file_is_what_the_docs_say(small):
    spec, content = small
    book = parse_codebook(content, "it")
    magic, version, header_bytes = struct.unpack_from("<8sII", content)
    header = json.loads(content[16 : 16 + header_bytes])
    table = content[16 + header_bytes : -32]
    assert (magic, version, len(table)) == (b"FIBQBOOK", 1, 32 * 4)
    assert content[-32:] == hashlib.sha256(content[:-32]).digest()
    assert book.digest == content[-32:].hex()
    expected = np.frombuffer(table, "i1").reshape(32, 4).astype(np.float32)
    assert np.array_equal(book.rows.numpy(), expected * np.float32(header["scale"]))
    assert book.spec == spec and book.head_dim == 64
    assert header["provenance"].keys() >= {"seed", "restarts", "samples", "iterations"}


def test_every_flipped_byte_is_refused(small):
    _, content = small
    for at in range(len(content)):
        damaged = bytearray(content)
        damaged[at] ^= 0x10
        with pytest.raises(ValueError, match="load_codebook: it must"):
            parse_codebook(bytes(damaged), "it")


def test_every_truncation_is_refused(small):
    _, content = small
    for size in range(len(content)):
        with pytest.raises(ValueError, match="load_codebook: it must"):
            parse_codebook(content[:size], "it")
    with pytest.raises(ValueError, match="SHA-256"):
        parse_codebook(content + b"\0", "it")


def test_other_files_are_refused_by_name(small):
    spec, content = small
    for wrong, message in (
        (b"", "at least 48 bytes, got 0"),
        (pickle.dumps({"rows": torch.zeros(4096)}), "must begin with b'FIBQBOOK'"),
        (MAGIC + struct.pack("<I", 2) + content[12:], "format version 1, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_codebook(wrong, "it")


def test_inconsistent_files_are_refused_though_their_digest_holds(small):
    spec, content = small
    header_bytes = struct.unpack_from("<I", content, 12)[0]
    header = json.loads(content[16 : 16 + header_bytes])
    table = content[16 + header_bytes : -32]

    def sealed(table=table, **changes) -> bytes:
        encoded = json.dumps({**header, **changes}).encode()
        return reseal(MAGIC + struct.pack("<II", 1, len(encoded)) + encoded + table)

    assert parse_codebook(sealed(), "it").spec == spec
    missing = dict(header)
    del missing["folded"]
    encoded = json.dumps(missing).encode()
    half = np.full(128, np.nan, "<f2").tobytes()
    for wrong, message in (
        (sealed(table[:-1]), "a table of 128 bytes, got 127"),
        (sealed(num_codewords=64), "a table of 256 bytes, got 128"),
        (sealed(num_codewords=33), "valid header.*power of two"),
        (sealed(subvec_dim="4"), "valid header"),
        (sealed(head_dim=66), "valid header.*must divide"),
        (sealed(head_dim=None), "valid header"),
        (sealed(storage="pickle"), "valid header"),
        (sealed(provenance=7), "valid header"),
        (sealed(scale=float("nan")), "finite values and a positive scale"),
        (sealed(scale=-1.0), "finite values and a positive scale"),
        (sealed(half, storage="float16"), "finite values"),
        (sealed(bytes([255] * 8), folded=True), "positive magnitudes"),
        (reseal(MAGIC + struct.pack("<II", 1, len(encoded)) + encoded + table), "KeyError"),
        (reseal(MAGIC + struct.pack("<II", 1, 1 << 31) + table), "header of 2147483648 bytes"),
        (reseal(MAGIC + struct.pack("<II", 1, 4) + b"[1]]" + table), "valid header"),
        (reseal(MAGIC + struct.pack("<II", 1, 3) + b"[1]" + table), "valid header"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_codebook(wrong, "it")


def test_missing_codebook_names_the_command(cache, capsys):
    spec = CodeSpec(4, 32, gain="mse")
    with pytest.raises(ValueError, match="python -m vllm_fibquant codebook build") as error:
        load_codebook(spec, 64)
    command = str(error.value).rpartition("python -m vllm_fibquant ")[2].split()
    assert main([*command, "--restarts", "1", "--samples", "4096", "--iterations", "2"]) == 0
    book = load_codebook(spec, 64)
    assert book.serves(spec) and book.head_dim == 64
    assert [path.name for path in cache.iterdir()] == ["d64-k4n32-int8.fqcb"]
    assert "rate      1.25 bits per coordinate, effective 1.5" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--folded --storage float16"):
        load_codebook(CodeSpec(4, 32, folded=True, storage="float16"), 64)
    with pytest.raises(ValueError, match="must divide head_dim"):
        load_codebook(CodeSpec(3, 32), 64)


def test_a_file_under_another_name_is_refused(cache, small):
    spec, content = small
    for wanted, head_dim in ((spec, 80), (replace(spec, num_codewords=64), 64)):
        write_atomically(cache / codebook_filename(wanted, head_dim), content)
        with pytest.raises(
            ValueError, match="got k4n32 in int8 for head_dim 64; delete it and run"
        ):
            load_codebook(wanted, head_dim)


def test_a_damaged_file_is_named(cache, small):
    spec, content = small
    path = cache / codebook_filename(spec, 64)
    write_atomically(path, content[:-1] + b"?")
    with pytest.raises(ValueError, match=f"{path} must have SHA-256"):
        load_codebook(spec, 64)


def test_writes_are_atomic(tmp_path, monkeypatch):
    path = tmp_path / "new" / "book"
    write_atomically(path, b"old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(path.parent) == ["book"]


def test_build_options_are_checked():
    for name, number in (("restarts", 0), ("samples", 0), ("seed", -1), ("iterations", -1)):
        with pytest.raises(ValueError, match=f"{name} must be at least"):
            BuildOptions(**{name: number})


# ---- what ships --------------------------------------------------------------------------------


def test_shipped_files_are_exactly_the_presets():
    names = {codebook_filename(spec, head_dim) for spec, head_dim in shipped_codes()}
    assert {path.name for path in SHIPPED_DIR.iterdir()} == names


def test_shipped_books_are_as_recorded_and_beat_the_scalar_quantiser():
    for spec, head_dim in shipped_codes():
        book = read_codebook(SHIPPED_DIR / codebook_filename(spec, head_dim))
        recorded = book.provenance["mse_rounded"]
        assert book.serves(spec) and book.head_dim == head_dim
        assert measure_mse(book, 1 << 15) == pytest.approx(recorded, rel=0.02)
        assert distortion_bound(head_dim, spec.rate) < recorded
        assert recorded < 0.9 * scalar_mse(head_dim, 1 << int(spec.rate))
        assert recorded < 1.001 * book.provenance["mse_refined"]


def test_cli_shows_and_verifies(cache, small, capsys):
    spec, content = small
    path = cache / "it.fqcb"
    # Its MSE was recorded on few samples: record that of many.
    book = parse_codebook(content, "it")
    provenance = {**book.provenance, "mse_rounded": measure_mse(book)}
    _, content = make_codebook(spec, 64, book.table.numpy(), book.scale, provenance)
    write_atomically(path, content)
    assert main(["codebook", "show", str(path)]) == 0
    assert "digest    " + content[-32:].hex() in capsys.readouterr().out
    assert main(["codebook", "verify", str(path)]) == 0
    assert "1 of 1 codebooks are as recorded" in capsys.readouterr().out

    provenance["mse_rounded"] *= 1.05
    _, lying = make_codebook(spec, 64, book.table.numpy(), book.scale, provenance)
    write_atomically(cache / "lying.fqcb", lying)
    write_atomically(cache / "damaged.fqcb", content[:-1])
    wrong = [str(cache / name) for name in ("lying.fqcb", "damaged.fqcb", "absent.fqcb")]
    assert main(["codebook", "verify", *wrong, str(path)]) == 1
    out = capsys.readouterr().out
    assert "1 of 4 codebooks are as recorded" in out and out.count("BAD") == 3
    assert "lying.fqcb must have MSE" in out and "absent.fqcb" in out
    assert main(["codebook", "show", str(cache / "damaged.fqcb")]) == 1


def test_cli_shows_every_shipped_book(capsys):
    assert main(["codebook", "show"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 1 + len(shipped_codes()) and out[1].startswith("d32-k2n256-float16.fqcb")


def test_one_file_is_one_book():
    """Layers share it, and with it the tables that kernels search."""
    spec = PRESETS["fibquant_4bit"].key
    assert load_codebook(spec, 64) is load_codebook(spec, 64)
    assert load_codebook(spec, 64) is not load_codebook(spec, 128)
