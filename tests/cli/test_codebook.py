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
