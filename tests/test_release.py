# SPDX-License-Identifier: Apache-2.0
"""What `make wheel` makes can be installed and run without this folder."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
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


def make_wheel(*options: str, **environment: str) -> Path:
    """Makes the sdist, and the wheel from it; the wheel."""
    command = ["make", "wheel", *options]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (ROOT / "dist").glob("*.whl")
    assert "manylinux" in wheel.name and list((ROOT / "dist").glob("*.tar.gz"))
    return wheel


@pytest.mark.slow
def test_an_installed_wheel_runs(tmp_path):
    wheel = make_wheel()
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


@pytest.mark.slow
def test_a_wheel_with_the_cuda_library(tmp_path):
    """It loads beside any torch, here one without CUDA: of CUDA it needs the driver alone."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not installed: no CUDA library")
    from vllm_fibquant.ops.cuda import Library

    with zipfile.ZipFile(make_wheel("CUDA=1", FIBQUANT_CUDA_ARCHS="90")) as archive:
        path = Path(archive.extract("vllm_fibquant/lib/libfibquant_cuda.so", tmp_path))
    headers = subprocess.run(["readelf", "-d", path], capture_output=True, text=True).stdout
    needed = re.findall(r"NEEDED.*\[(.*)\]", headers)
    assert needed and not [name for name in needed if re.search("cuda|torch", name)]
    library = Library(path)
    assert library.support.pairs and library.why_unusable()  # no GPU, or no driver
