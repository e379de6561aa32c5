# SPDX-License-Identifier: Apache-2.0
"""`codebook build` says what it lacks before it works."""

from __future__ import annotations

import sys

import pytest

from vllm_fibquant.cli import codebook
from vllm_fibquant.cli.main import main


def test_without_scipy_nothing_is_begun(tmp_path, monkeypatch, capsys):
    def begun(*args, **kwargs):
        pytest.fail("samples were drawn before scipy was looked for")

    monkeypatch.setitem(sys.modules, "scipy", None)
    monkeypatch.setattr(codebook, "_build", begun)
    shape = ["--head-dim", "64", "--subvec-dim", "4", "--num-codewords", "16"]
    assert main(["codebook", "build", *shape, "--out", str(tmp_path / "a.fqcb")]) != 0
    told = capsys.readouterr().err
    assert "scipy must be installed" in told and "pip install scipy" in told
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("action", ["show", "verify"])
def test_a_folder_is_no_codebook(action, tmp_path, capsys):
    assert main(["codebook", action, str(tmp_path)]) == 1
    told = "".join(capsys.readouterr())
    assert f"FILE must be a codebook that can be read, got {tmp_path} (Is a directory)" in told
    assert "give a .fqcb file" in told


@pytest.mark.parametrize(
    "arguments, told",
    [(["--head-dim", "0"], "--head-dim must be at least 1, got 0"),
     (["--head-dim", "-64"], "--head-dim must be at least 1, got -64"),
     (["--head-dim", "64", "--out", "."], "--out must be a file that can be written, got .")],
)  # fmt: skip
def test_what_cannot_be_built_is_refused_before_it_is_begun(arguments, told, monkeypatch, capsys):
    monkeypatch.setattr(codebook, "_build", lambda *_: pytest.fail("begun"))
    shape = ["--subvec-dim", "4", "--num-codewords", "16"]
    assert main(["codebook", "build", *shape, *arguments]) == 1
    assert told in capsys.readouterr().err
