# SPDX-License-Identifier: Apache-2.0
"""``vllm-fibquant calibrate``: measures a model's keys without serving it."""

from __future__ import annotations

from pathlib import Path

from vllm_fibquant import files

CACHE_BYTES = 64 << 20
"""Enough for one short request: nothing is generated."""


def calibrate(model: str, output: str | None, dtype: str) -> str:
    """Measures a model in a vLLM engine that is started for it alone.

    Args:
        model: directory of a model, or a Hugging Face name.
        output: file to be written; None for the one that later starts look for.
        dtype: as vLLM's --dtype.

    Returns:
        What has been done, for the user.

    Raises:
        ValueError: output exists, or the model cannot be measured.
    """
    if output is not None and Path(output).exists():
        raise ValueError(
            f"calibrate: --output must be a new file, got {output}, which exists; delete it to "
            "measure the model again"
        )
    if not files.is_writable(Path(output).absolute().parent) if output else not files.cache_dir():
        raise ValueError(
            f"calibrate: --output must be a file that can be written, got {output or 'no cache'}; "
            f"give another, or set {files.CACHE_VARIABLE} to a folder that can be written"
        )
    from vllm import LLM

    options = {"calibrate": "means", "fidelity_gate": False}
    options |= {"calibration": output} if output else {}
    llm = LLM(
        model, dtype=dtype, kv_cache_dtype="fibquant", enforce_eager=True, max_model_len=512,
        max_num_seqs=1, kv_cache_memory_bytes=CACHE_BYTES, additional_config={"fibquant": options},
    )  # fmt: skip
    llm.llm_engine.engine_core.shutdown()
    if output is None:
        return 'the result is in the cache: starts with "calibrate" find it by themselves'
    return f'{output}: give it as "calibration" among the fibquant options'
