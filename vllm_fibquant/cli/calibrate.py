# SPDX-License-Identifier: Apache-2.0
"""``vllm-fibquant calibrate``: measures a model's keys, and what codes of its layers cost, without
serving it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vllm_fibquant import files

CACHE_BYTES = 256 << 20
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


def choose_layers(model: str, like: str, dtype: str) -> str:
    """Finds presets for single layers, of as many bytes together as one preset for all of them.

    Args:
        model, dtype: as for `calibrate`.
        like: the preset whose bytes are to be shared out.

    Returns:
        The options to serve with, and what they and `like` cost the model, for the user.

    Raises:
        ValueError: there is no such preset, or the model's layers cannot have presets of their own.
    """
    from vllm_fibquant.codec.config import get_preset

    get_preset(like)
    like = "fibquant_3bit" if like == "fibquant" else like  # the default by its other name
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0")  # the model must be in this process
    from vllm import LLM

    from vllm_fibquant.engine import layer_presets

    # Refused here and now where layers cannot have presets of their own.
    options = {"fidelity_gate": False, "layers": {"0": layer_presets.UNEVEN}}
    llm = LLM(
        model, dtype=dtype, kv_cache_dtype=layer_presets.EVEN, enforce_eager=True,
        max_model_len=layer_presets.NUM_TOKENS, max_num_seqs=1,
        kv_cache_memory_bytes=CACHE_BYTES, additional_config={"fibquant": options},
    )  # fmt: skip
    config = llm.llm_engine.vllm_config

    def choose(loaded: Any) -> str:
        found = layer_presets.LayerCosts(loaded, config)
        sizes = layer_presets.record_sizes(config.model_config.get_head_size())
        budget = sizes[like] * found.num_layers
        chosen = found.choose(sizes, budget)
        base, layers = layer_presets.as_options(chosen)
        mixed, uniform = (
            found(dict(enumerate(chosen))),
            found(dict.fromkeys(range(len(chosen)), like)),
        )
        share = sum(sizes[name] for name in chosen) / len(chosen)
        given = json.dumps({"fibquant": {"layers": layers}})
        return (
            f"--kv-cache-dtype {base} --additional-config '{given}'\n"
            f"KL {mixed:.4f} with {share:.1f} bytes a token and KV head; {like} for every layer: "
            f"{uniform:.4f} with {sizes[like]} (on {found.num_tokens} tokens of text)"
        )

    try:
        return llm.apply_model(choose)[0]
    finally:
        llm.llm_engine.engine_core.shutdown()
