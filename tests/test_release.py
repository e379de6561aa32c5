# SPDX-License-Identifier: Apache-2.0
"""What `make wheel` makes can be installed and run without this folder."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, vllm_fibquant
from vllm_fibquant.cli import info
from vllm_fibquant.codec.codebook import shipped_codes, load_codebook
[load_codebook(spec, head_dim) for spec, head_dim in shipped_codes()]
print(json.dumps([vllm_fibquant.__file__, info.kernel()]))
"""


@pytest.fixture(scope="module")
def dist() -> Path:
    """The sdist, and the wheel made from it."""
    subprocess.run(["make", "wheel"], cwd=ROOT, check=True, capture_output=True, timeout=1800)
    return ROOT / "dist"


@pytest.mark.slow
def test_an_installed_wheel_runs(dist, tmp_path):
    (wheel,) = dist.glob("*.whl")
    assert "manylinux" in wheel.name and list(dist.glob("*.tar.gz"))
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "env"], check=True)
    python = tmp_path / "env/bin/python"
    # Dependencies from the environment of this test: only directories that are named are read, so
    # this folder's own installation is not among them.
    (site,) = (tmp_path / "env").glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join({*here, sysconfig.get_paths()["purelib"]}))
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True)
    done = subprocess.run(
        [python, "-c", PROGRAM], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert str(site) in done.stdout and "cpu-" in done.stdout
    command = [tmp_path / "env/bin/vllm-fibquant", "--version"]
    assert "vllm-fibquant" in subprocess.run(command, capture_output=True, text=True).stdout
