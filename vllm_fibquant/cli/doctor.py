# SPDX-License-Identifier: Apache-2.0
"""``vllm-fibquant doctor MODEL``: what this machine and a model will get, before it is loaded."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict
from typing import Any

from vllm_fibquant import files
from vllm_fibquant.cli import info, plan, serve
from vllm_fibquant.cli.plan_states import reasons
from vllm_fibquant.cli.shape import has_latents, read_config, refusals

SHOWN = ("bf16", "fp8")
"""What capacity is shown beside the preset."""

OPTIONS = ("prefill", "recent_window", "num_copies", "calibrate")
"""What of a run's options is shown."""

CALIBRATED = {
    None: "",
    True: ", from what an earlier start measured",
    False: ", for which no measurement of this model is kept",
}


def examine(
    model: str, kv_cache_dtype: str, memory_bytes: int | None = None, context: int | None = None
) -> dict[str, Any]:
    """Everything known of a model on this machine, JSON-serialisable. Loads no weights.

    Args:
        model: directory with a config.json, or a Hugging Face name.
        kv_cache_dtype: as for vLLM, one of ours.
        memory_bytes: of the KV cache; None for what ``serve`` takes on this machine.
        context: tokens of one request; None for the model's maximum.

    Returns:
        versions, machine, kernel, cache: of the installation.
        refused: every reason why the model is not served; [] if it is.
        without: defaults that this run goes without, and why.
        options: those it gets.
        calibrated: whether a calibration of it is in the cache; None if it was never started.
        last_fidelity: what codes cost it at its last start with these, as measured then, or None.
        capacity: what fits beside bf16 and fp8; None with the reason in "no_capacity".
    """
    machine = serve.this_machine()
    cache = files.cache_dir()
    report: dict[str, Any] = {
        "model": model,
        "kv_cache_dtype": kv_cache_dtype,
        "versions": info.versions(),
        "machine": {
            "system": platform.platform(),
            "processors": os.cpu_count(),
            "instruction_sets": sorted(
                flag for flag in machine.cpu_flags if re.match(r"avx|amx|asimd|sve", flag)
            ),
            "free_memory_bytes": machine.free_memory,
        },
        "kernel": info.kernel(),
        "cache": str(cache) if cache else None,
    }
    report |= _asked_of_vllm(model, kv_cache_dtype)
    report["calibrated"] = _is_calibrated(report["last_fidelity"])
    memory_bytes = memory_bytes or serve.default_cache_bytes(machine)
    report["memory_bytes"] = memory_bytes
    report["capacity"], report["no_capacity"] = None, None
    try:
        config = read_config(model)
        # What a start refuses when it builds the layers.
        report["refused"] = report["refused"] or refusals(config)
        copies = (report["options"] or {}).get("num_copies") or has_latents(config)
        _, report["context"], capacities = plan.plan_model(
            model, memory_bytes, context, options={} if copies else {"mode": "exact"}
        )
        report["capacity"] = [
            {**asdict(c), "num_users": c.num_users}
            for c in capacities
            if c.kv_cache_dtype in (*SHOWN, kv_cache_dtype)
        ]
    except ValueError as error:
        report["no_capacity"] = str(error)
    return report


def _is_calibrated(last: dict[str, Any] | None) -> bool | None:
    """Whether what the last start measured of the model's keys is kept; None where nothing is known
    of a last start."""
    if last is None:
        return None
    folders = [folder / "calibrations" for folder in files.cache_candidates()]
    kept = {files.digest_of(path) for folder in folders for path in folder.glob("*.fqcal")}
    return bool(last["calibrations"]) and set(last["calibrations"]) <= kept


def _asked_of_vllm(model: str, kv_cache_dtype: str) -> dict[str, Any]:
    """What our part of vLLM's configuration says of the model, once vLLM has read its config."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    from vllm.engine.arg_utils import EngineArgs

    from vllm_fibquant.engine import last_fidelity, support

    try:
        config = EngineArgs(
            model=model, kv_cache_dtype=kv_cache_dtype, skip_tokenizer_init=True
        ).create_engine_config()
    except (ValueError, OSError, RuntimeError) as error:
        return {"refused": reasons(str(error)), "without": [], "options": None,
                "last_fidelity": None}  # fmt: skip
    return {
        "refused": [],
        "without": list(support.told_defaults(config)),
        "options": {name: getattr(support.run_options(config), name) for name in OPTIONS},
        "last_fidelity": last_fidelity.read(config),
    }


def _loss(found: dict[str, Any] | None) -> str:
    """What codes cost the model, in words."""
    if found is None:
        return (
            "not known before the first start, which measures it (GET /fibquant/info); "
            "of models measured: docs/evaluation.md"
        )
    return (
        f"{found['state']} at its last start ({found['date']}): KL {found['kl']:.4f}, perplexity "
        f"{found['perplexity_increase']:+.1%} on {found['num_tokens']} tokens; worst layer "
        f"{found['worst_layer']} with cosine {found['worst_layer_cosine']:.4f}"
    )


def render(report: dict[str, Any]) -> str:
    """The report for people."""
    versions, machine = report["versions"], report["machine"]
    names = [f"{name} {version}" for name, version in versions.items() if version]
    lines = [
        f"{report['model']} with --kv-cache-dtype {report['kv_cache_dtype']}",
        "",
        f"installed    {', '.join(names)}",
        f"machine      {machine['system']}, {machine['processors']} processors, "
        f"{machine['free_memory_bytes'] / 2**30:.1f} GiB free",
        f"kernel       {report['kernel']}",
        f"cache        {report['cache'] or 'none that can be written: nothing is kept'}",
        "",
    ]
    if report["refused"]:
        lines += ["refused:", *(f"  - {reason}" for reason in report["refused"])]
        return "\n".join(lines)
    options = report["options"]
    calibrated = CALIBRATED[report["calibrated"]] if options["calibrate"] != "none" else ""
    copies = f"newest {options['recent_window']} tokens also in 16 bits"
    lines += [
        f"served       prefill {options['prefill']}, "
        f"{copies if options['recent_window'] else 'no copies in 16 bits'}, "
        f"calibrate {options['calibrate']}{calibrated}",
        *(f"without      {told}" for told in report["without"]),
        f"loss         {_loss(report['last_fidelity'])}",
        "",
    ]
    if report["capacity"] is None:
        return "\n".join([*lines, f"capacity     {report['no_capacity']}"])
    lines.append(
        f"{report['memory_bytes'] / 2**30:.2f} GiB of KV cache, "
        f"requests of {report['context']:,} tokens:"
    )
    for row in report["capacity"]:
        lines.append(
            f"  {row['kv_cache_dtype']:<16}{row['num_tokens']:>14,} tokens"
            f"{row['num_users']:>10,} users{row['bytes_per_token']:>12,} bytes per token"
        )
    return "\n".join(lines)
