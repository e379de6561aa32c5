# SPDX-License-Identifier: Apache-2.0
"""What `make wheel` makes can be installed and run without this folder."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest

from vllm_fibquant.demo_model import ensure_demo_model

ROOT = Path(__file__).parent.parent
PROGRAM = """
import json, vllm_fibquant
from vllm_fibquant.cli import info
from vllm_fibquant.codec.codebook import shipped_codes, load_codebook
[load_codebook(spec, head_dim) for spec, head_dim in shipped_codes()]
print(json.dumps([vllm_fibquant.__file__, info.kernel()]))
"""


SERVING = """
import sys
import vllm_fibquant
from vllm import LLM, SamplingParams
assert vllm_fibquant.__file__.startswith(sys.prefix), vllm_fibquant.__file__
llm = LLM(sys.argv[1], kv_cache_dtype="fibquant", max_model_len=512, max_num_seqs=1,
          kv_cache_memory_bytes=64 << 20, enforce_eager=True,
          additional_config={"fibquant": {"calibrate": "none", "fidelity_gate": False}})
(answer,) = llm.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=8))
print("ANSWER", answer.outputs[0].text)
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
    environment = dict(os.environ, VLLM_ENABLE_V1_MULTIPROCESSING="0", OMP_NUM_THREADS="1")
    environment.pop("PYTHONPATH", None)
    model = ensure_demo_model(ROOT / ".models" / "SmolLM2-135M-Instruct")
    served = subprocess.run(
        [python, "-c", SERVING, model], cwd=tmp_path, capture_output=True, text=True,
        timeout=1800, env=environment,
    )  # fmt: skip
    assert served.returncode == 0, served.stderr[-3000:]
    assert "Paris" in served.stdout.split("ANSWER ")[1]


STAND_IN = """#!/bin/sh
# Instead of a compiler: writes what it was asked for.
case "$*" in *--list-gpu-code*) echo sm_90; exit;; esac
while [ $# -gt 1 ]; do [ "$1" = -o ] && echo compiled > "$2"; shift; done
"""


@pytest.mark.parametrize("cuda", ["", "1"])
def test_a_wheel_holds_the_cuda_library_if_asked(cuda: str, tmp_path) -> None:
    """Built without compilers; a library left in the tree gets into neither sdist nor wheel."""
    compiler, tree = tmp_path / "compiler", tmp_path / "tree"
    compiler.write_text(STAND_IN)
    compiler.chmod(0o755)
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout: the list of files is not known")
    for name in listed.stdout.splitlines():
        if name.startswith(("csrc", "kernels", "server", "vllm_fibquant")) or "/" not in name:
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name, follow_symlinks=False)
    (tree / "vllm_fibquant" / "lib").mkdir()
    (tree / "vllm_fibquant" / "lib" / "libfibquant_cuda.so").write_text("left here")
    environment = dict(os.environ, CXX=str(compiler), CUDACXX=str(compiler), FIBQUANT_CUDA=cuda)
    pack = [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path]
    subprocess.run(pack, cwd=tree, check=True, env=environment, capture_output=True)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as packed:
        assert not [name for name in packed.getnames() if name.endswith(".so")]
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    build += ["--wheel-dir", tmp_path, sdist]
    subprocess.run(build, cwd=tmp_path, check=True, env=environment, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        libraries = {name for name in packed.namelist() if name.endswith(".so")}
        assert b"left here" not in [packed.read(name) for name in libraries]
    expected = {"cpu", "cuda"} if cuda else {"cpu"}
    assert libraries == {f"vllm_fibquant/lib/libfibquant_{kind}.so" for kind in expected}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_the_cuda_library_needs_no_torch_and_no_cuda_library() -> None:
    """So it loads beside any torch: what it has of CUDA is linked in, and asks the driver alone."""
    command = [sys.executable, "setup.py", "--quiet", "build_cuda"]
    environment = dict(os.environ, FIBQUANT_CUDA_ARCHS="90")
    library = ROOT / "vllm_fibquant" / "lib" / "libfibquant_cuda.so"
    was_there = library.exists()
    try:
        if not was_there:
            subprocess.run(command, cwd=ROOT, check=True, env=environment, capture_output=True)
        read = subprocess.run(
            ["readelf", "-d", library], capture_output=True, text=True, check=True
        )
        needed = {line.split("[")[1].split(".so")[0] for line in read.stdout.splitlines()
                  if "(NEEDED)" in line}  # fmt: skip
        system = {"libc", "libm", "libstdc++", "libgcc_s", "libpthread", "librt", "libdl"}
        assert needed <= system | {"ld-linux-x86-64"}, needed
        loaded = ctypes.CDLL(str(library))
        loaded.fq_cuda_error.restype = ctypes.c_char_p
        assert loaded.fq_cuda_error(35).decode().startswith("CUDA driver version is insufficient")
    finally:
        if not was_there:
            library.unlink(missing_ok=True)
