# SPDX-License-Identifier: Apache-2.0
"""Which models and settings are served, and what is said about the others.

`config_problems` is asked once, when vLLM has assembled its configuration and before anything is
started; it gives every reason at once. What is known only of a single layer (attention type,
ALiBi slopes) is refused by `attention.py` when the layer is built.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.engine import support_gpu
from vllm_fibquant.engine.compat_images import images_problems
from vllm_fibquant.engine.head_dims import (
    Row,
    draft_problems,
    features_on,
    head_dim_of,
    head_dim_problem,
    problem_of,
)
from vllm_fibquant.engine.latent_support import (
    NO_COPIES,
    UNMEASURED,
    is_latent,
    latent_problems,
)
from vllm_fibquant.keys.transform import transform_problem
from vllm_fibquant.ops import cuda_tables, gpu
from vllm_fibquant.ops.checks import DTYPES
from vllm_fibquant.options import Options, Part, given_options, misplaced_options, parse_options

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

UNMEASURED_HYBRID = (
    "layers beside attention (Mamba, linear attention) have their state only once there are pages, "
    "and keys are measured before"
)

NEEDED_BY_DEFAULTS: dict[Part, str] = {"copies": "copies", "calibration": "means"}
"""The feature of kernels (`ops.features.FEATURES`) that each part of the defaults asks for."""

UNMOVED: dict[Part, str] = {
    "copies": "KV connectors and offloading move pages, not what is kept beside them",
    "calibration": "pages that move mean the same only to those who read the same file: give it as "
    "calibration",
}

OTHER_DTYPE = "use --kv-cache-dtype auto for this model"

BLOCK_MULTIPLE = 16
"""Tokens: a block has a multiple of it."""

BACKEND_NAME = "FIBQUANT"
"""vLLM's name for our attention backend."""

# Models of which every layer attends what its rotary embedding returns, with no norm in between.
# Read in vLLM 0.32.0's model files; the rotary embedding itself is probed when a layer is built.
RETAIN_ARCHITECTURES = (
    "GPTJForCausalLM",
    "GemmaForCausalLM",
    "GraniteForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "StableLmForCausalLM",
)

# These size their buffers from vLLM's dense shapes and would copy the wrong bytes of a page.
REFUSED_CONNECTORS = ("LMCache",)

# vLLM 0.32.0's offloading to host memory copies on GPU streams. On CPUs these fail late, with any
# cache dtype: "only supported on CUDA-alike and XPU GPUs", and an AttributeError.
GPU_CONNECTORS = ("OffloadingConnector", "SimpleCPUOffloadConnector")


def run_options(vllm_config: VllmConfig) -> Options:
    """The options of a run whose --kv-cache-dtype is ours: defaults are those it can have."""
    options = parse_options(
        vllm_config.cache_config.cache_dtype,
        vllm_config.additional_config,
        lacking_parts(vllm_config),
    )
    given = given_options(vllm_config.additional_config)
    if is_latent(vllm_config) and "mode" not in given and "prefill" not in given:
        return replace(options, prefill="raw")
    if options.calibrate == "auto" and _moves_pages(vllm_config):
        return replace(options, calibrate="means")  # a transform is not the same on two machines
    return options


def lacking_parts(vllm_config: VllmConfig) -> dict[Part, str]:
    """Which parts of the defaults this run goes without, and why."""
    reasons: dict[Part, str] = {}
    model, device = vllm_config.model_config, vllm_config.device_config.device_type
    given = given_options(vllm_config.additional_config)
    given = given if isinstance(given, dict) else {}
    found: list[tuple[bool, Part, str]] = []
    for part, feature in NEEDED_BY_DEFAULTS.items():
        has_it = feature in features_on(vllm_config)
        why = f"kernels of {device} devices have it not yet"
        if device == "cuda":
            why = gpu.why_no_maps(head_dim_of(vllm_config)) or why
        found.append((not has_it, part, why))
        if part == "copies" and device == "cuda":
            problem = support_gpu.copies_problem(vllm_config)
            found.append((problem is not None, part, problem or ""))
        found.append((given.get("retain") is not None, part, "retain bounds what is kept"))
        found.append((_moves_pages(vllm_config), part, UNMOVED[part]))
    if is_latent(vllm_config):
        found += [(True, "copies", NO_COPIES), (True, "calibration", UNMEASURED)]
    is_hybrid = model is not None and model.is_hybrid
    found.append((is_hybrid, "calibration", UNMEASURED_HYBRID))
    for is_lacking, part, reason in found:
        if is_lacking:
            reasons.setdefault(part, reason)
    return reasons


def told_defaults(vllm_config: VllmConfig) -> list[str]:
    """A sentence for each part of the defaults that this run goes without."""
    without_copies = 'mode is "exact"'
    if is_latent(vllm_config):
        without_copies = "no token is kept in 16 bits"
    named = {
        "copies": ("mode", without_copies, "recent_window"),
        "calibration": ("calibrate", "keys are not calibrated", "calibration"),
    }
    given = given_options(vllm_config.additional_config)
    return [
        f"{told}: {reason}"
        for part, reason in lacking_parts(vllm_config).items()
        for option, told, other in [named[part]]
        if option not in given and other not in given
    ]


def config_problems(vllm_config: VllmConfig) -> list[str]:
    """Every reason why this configuration cannot be served with its kv_cache_dtype."""
    try:
        options = run_options(vllm_config)
    except ValueError as error:
        return [str(error)]
    model, device = vllm_config.model_config, vllm_config.device_config.device_type
    rows, problems = _run_rows(vllm_config, options), []
    if misplaced := misplaced_options(vllm_config.additional_config):
        problems.append(misplaced)
    if device == "cuda":
        rows += support_gpu.gpu_rows(vllm_config, options)
    if model is not None:
        rows += _model_rows(model, vllm_config, options)
        problems += images_problems(model)
        if model.use_mla:
            problems += latent_problems(vllm_config, options)
        else:
            found = (head_dim_problem(p, model.get_head_size(), device) for p in options.presets)
            problems += [problem for problem in found if problem]
            problems += draft_problems(vllm_config, options, device)
    problems += [problem_of(row) for row in rows if not row[0]]
    if options.retain:
        problems += [f"retain: {problem}" for problem in retain_problems(vllm_config)]
    if options.layers:
        problems += [f"layers: {problem}" for problem in layers_problems(vllm_config, options)]
    if options.calibrate != "none" and not is_latent(vllm_config):
        problems += [
            f"calibrate: {problem}" for problem in calibrate_problems(vllm_config, options)
        ]
    return problems


def _model_rows(model: ModelConfig, vllm_config: VllmConfig, options: Options) -> list[Row]:
    """What is required of every model."""
    block_size = vllm_config.cache_config.block_size
    special = [*options.layers, *vllm_config.cache_config.kv_cache_dtype_skip_layers]
    chunk = getattr(model.hf_text_config, "attention_chunk_size", None)
    head_dim = model.get_head_size()
    value_dim = getattr(model.hf_text_config, "v_head_dim", None) or head_dim
    # Models of latents pad values to the length of keys where latents are switched off.
    has_latents = model.use_mla or getattr(model.hf_text_config, "kv_lora_rank", None) is not None
    return [
        (has_latents or value_dim == head_dim, "model",
         "one whose values are as long as its keys", f"{value_dim} and {head_dim}", OTHER_DTYPE),
        (not model.is_encoder_decoder, "model", "decoder-only", "an encoder-decoder model",
         OTHER_DTYPE),
        (model.runner_type != "pooling", "runner", "generate", model.runner_type,
         f"embedding models keep no KV cache worth compressing; {OTHER_DTYPE}"),
        (model.dtype in DTYPES, "dtype", "float32, bfloat16 or float16", model.dtype,
         "give --dtype bfloat16"),
        (model.rswa_window is None, "attention mask", "causal, optionally with a sliding window",
         "reference sliding-window attention", OTHER_DTYPE),
        (chunk is None or not special, "layers and --kv-cache-dtype-skip-layers",
         "empty for a model with chunked local attention, whose layers choose their cache before",
         special, "leave them out"),
        (chunk is None or chunk % (block_size or 1) == 0, "--block-size",
         f"a divisor of {chunk}, one chunk of this model's local attention", block_size,
         "leave it out"),
    ]  # fmt: skip


def _run_rows(vllm_config: VllmConfig, options: Options) -> list[Row]:
    """What is required of every run, whatever its model."""
    cache, device = vllm_config.cache_config, vllm_config.device_config.device_type
    parallel, attention = vllm_config.parallel_config, vllm_config.attention_config
    connectors = _connector_names(vllm_config.kv_transfer_config)
    refused = [c for c in connectors if any(r.lower() in c.lower() for r in REFUSED_CONNECTORS)]
    on_gpus = [c for c in connectors if c in GPU_CONNECTORS]
    stays = not (connectors or cache.kv_offloading_size)
    sizes = ("decode_context_parallel_size", "prefill_context_parallel_size")
    return [
        (device == "cpu" or (device == "cuda" and options.unproven_gpu), "device", "cpu", device,
         "run it on vLLM's CPU build, or help to prove the GPU kernels, which have been interpreted"
         ' and compiled but have not run on a GPU: give "unproven_gpu": true'),
        (not cache.user_specified_block_size or cache.block_size % BLOCK_MULTIPLE == 0,
         "--block-size", f"a multiple of {BLOCK_MULTIPLE}", cache.block_size,
         "give another or leave the flag out"),
        *((getattr(parallel, size) == 1, size, "1", getattr(parallel, size),
           "use tensor, pipeline or data parallel") for size in sizes),
        (not attention.use_non_causal, "use_non_causal", "false", "true", "leave the setting out"),
        (not cache.kv_sharing_fast_prefill, "--kv-sharing-fast-prefill", "off", "on",
         "leave the flag out; layers that share KV work without it"),
        (cache.kv_offloading_size is None or cache.kv_offloading_backend == "native",
         "--kv-offloading-backend", "native", cache.kv_offloading_backend,
         "LMCache sizes its buffers wrongly for packed pages"),
        (not refused, "KV connector", "one that copies pages as bytes", ", ".join(refused),
         "LMCache sizes its buffers wrongly for packed pages; use another connector"),
        (device != "cpu" or not on_gpus, "KV offloading",
         "off on CPUs, whose cache is in host memory already", ", ".join(on_gpus),
         "leave --kv-offloading-size out and give --kv-cache-memory-bytes more"),
        (stays or not options.recent_window, "recent_window",
         "0 with a KV connector or KV offloading, which write pages behind the copies' back",
         options.recent_window, 'give "mode": "exact" or "recent_window": 0 with it'),
        (stays or options.monitor is None, "monitor",
         "false with a KV connector or KV offloading, which write pages behind its back", "true",
         "leave it out"),
    ]  # fmt: skip


def _draft_row(vllm_config: VllmConfig, why: str) -> tuple[bool, str]:
    """Of `_said`: a draft model cannot be used; `why` is of the draft."""
    speculation = vllm_config.speculative_config
    method = "ngram" if speculation is None else speculation.method
    return (
        method != "ngram",
        f"speculative decoding must be off or ngram, got {method}, whose draft {why}; "
        "leave --speculative-config out",
    )


def _said(*found: tuple[Any, str]) -> list[str]:
    """The sentences of those that are so."""
    return [told for is_so, told in found if is_so]


def _moves_pages(vllm_config: VllmConfig) -> bool:
    """Whether pages leave this cache: KV connectors and offloading."""
    offloading_size = vllm_config.cache_config.kv_offloading_size
    return vllm_config.kv_transfer_config is not None or offloading_size is not None


def calibrate_problems(vllm_config: VllmConfig, options: Options) -> list[str]:
    """Every reason why this configuration's keys cannot be coded by a calibration."""
    model, moves_pages = vllm_config.model_config, _moves_pages(vllm_config)
    problems = []
    if model is not None and options.calibrate == "transform" and not model.use_mla:
        head_dim = model.get_head_size()
        found = [transform_problem(p.key, head_dim) for p in options.presets]
        if vllm_config.device_config.device_type == "cuda":
            sizes = (p.key.index_bytes(head_dim) for p in options.presets)
            told = (cuda_tables.unsupported_transform(size, head_dim) for size in sizes)
            found += [problem and f'{problem}; use "calibrate": "means"' for problem in told]
        problems += [problem for problem in found if problem]
    return problems + _said(
        (model is not None and model.is_hybrid,
         f"layers must all be attention, got {model and model.architecture}: {UNMEASURED_HYBRID}; "
         "leave calibrate out for this model"),
        (moves_pages and options.transforms_keys,
         f'it must be "means" with KV connectors and offloading, got "{options.calibrate}": a '
         "transform may come out with other last digits on two machines"),
        (moves_pages and not (options.calibration and Path(options.calibration).is_file()),
         "calibration must be an existing file with KV connectors and offloading, got "
         f"{options.calibration!r}: pages mean the same only to those who read the same file; "
         "run: vllm-fibquant calibrate MODEL --output FILE"),
    )  # fmt: skip


def layers_problems(vllm_config: VllmConfig, options: Options) -> list[str]:
    """Every reason why some layers of this configuration cannot have a preset of their own."""
    model, skipped = vllm_config.model_config, vllm_config.cache_config.kv_cache_dtype_skip_layers
    both = [str(number) for number, _ in options.layers if str(number) in skipped]
    problems = _said(
        (both or "sliding_window" in skipped,
         "they must not be among --kv-cache-dtype-skip-layers, got "
         f"{', '.join(both) or 'sliding_window'} there; name each layer in one of the two"),
        _draft_row(vllm_config, "model has layers of the same numbers"),
        (_moves_pages(vllm_config),
         "KV connectors and offloading must be off, got one: many take all layers' pages for "
         "equally large; leave --kv-transfer-config and --kv-offloading-size out"),
    )  # fmt: skip
    if model is None:
        return problems
    num_layers = model.get_total_num_hidden_layers()
    beyond = [str(number) for number, _ in options.layers if number >= num_layers]
    is_mixed = len(set(getattr(model.hf_text_config, "layer_types", None) or ())) > 1
    is_one_group = vllm_config.scheduler_config.disable_hybrid_kv_cache_manager
    return problems + _said(
        (beyond, f"they must be from 0 to {num_layers - 1} for this model, got "
         f"{', '.join(beyond)}; leave those out"),
        (model.is_hybrid, f"the model's layers must all be attention, got {model.architecture}; "
         "leave layers out"),
        (is_mixed and not is_one_group,
         "pages must be equally large in models that mix full and sliding-window attention, "
         "where vLLM pads every page to the largest and nothing would be saved; leave layers "
         "out, or give --disable-hybrid-kv-cache-manager, which keeps all tokens of all layers"),
    )  # fmt: skip


def retain_problems(vllm_config: VllmConfig) -> list[str]:
    """Every reason why this configuration cannot keep a request's first and newest tokens alone."""
    model, cache = vllm_config.model_config, vllm_config.cache_config
    layer_types = getattr(model.hf_text_config, "layer_types", None) if model is not None else None
    skipped = cache.kv_cache_dtype_skip_layers
    return _said(
        (model is not None and model.architecture not in RETAIN_ARCHITECTURES,
         f"model must be one of {', '.join(RETAIN_ARCHITECTURES)}, whose queries can be turned "
         f"back, got {model and model.architecture}; leave retain out for this model"),
        (cache.sliding_window is not None or "sliding_attention" in (layer_types or ()),
         "layers must all have full attention, got a sliding window, which bounds those layers' "
         "cache already; leave retain out for this model"),
        (skipped, f"--kv-cache-dtype-skip-layers must be empty, got {', '.join(skipped)}: their "
         "cache would grow without bound; leave the flag out"),
        _draft_row(vllm_config, "model's cache has not been verified with it"),
        (_moves_pages(vllm_config),
         "KV connectors and offloading must be off, got one: they move pages by position, and "
         "some are gone; leave --kv-transfer-config and --kv-offloading-size out"),
    )  # fmt: skip


def _connector_names(transfer: Any) -> list[str]:
    """The connector and, for a connector that holds several, each of those."""
    if transfer is None or not transfer.kv_connector:
        return []
    names = [transfer.kv_connector]
    for inner in transfer.kv_connector_extra_config.get("connectors", []):
        if isinstance(inner, dict):
            names.append(str(inner.get("kv_connector")))
    return names


def refusal(kv_cache_dtype: str, problems: list[str]) -> str:
    """The message of a refusal: every reason on a line of its own."""
    lines = "".join(f"\n  - {problem}" for problem in problems)
    return f"--kv-cache-dtype {kv_cache_dtype} cannot be used here:{lines}"


def is_ours(kv_cache_dtype: str | None) -> bool:
    """Whether a kv_cache_dtype is one of our presets."""
    return kv_cache_dtype in PRESETS
