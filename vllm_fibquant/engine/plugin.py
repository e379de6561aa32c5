# SPDX-License-Identifier: Apache-2.0
"""The entry point vLLM calls in every process: API server, engine core and workers."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.engine import (
    compat,
    compat_images,
    compat_pages,
    latent_support,
    ranks,
    support,
)
from vllm_fibquant.options import SECTION

if TYPE_CHECKING:
    from vllm.config import VllmConfig

REPORT_METHOD = "fibquant_report"
"""The method of vLLM's workers that returns `report.worker_report`."""

BACKEND_PATH = "vllm_fibquant.engine.backend.FibQuantBackend"

RANKS_TIMEOUT_S = 600.0
"""How long ranks wait for each other before they compare: others may still be compiling."""


def register() -> None:
    """Adds our presets to vLLM. May be called any number of times; never raises.

    vLLM does not catch what a plugin raises, and a user who does not want our cache must not be
    stopped by it. So a problem is kept and told when one of our dtypes is asked for. The guard
    goes in first: without it no name is accepted.
    """
    from vllm.logger import init_logger

    logger = init_logger(f"vllm.{__name__}")
    problem = compat.version_problem()
    try:
        compat.install_guard(functools.partial(_check, problem))
        if problem is None:
            _register_backend()
            compat.store_as_bytes(list(PRESETS))
            compat.select_backend(list(PRESETS), support.BACKEND_NAME, _choose_backend)
            compat.give_layers_dtypes(list(PRESETS), _layer_dtypes)
            compat_pages.fit_layers_pages(list(PRESETS))
            compat.attend_chunks(_is_our_backend, _chunked)
            compat.before_pages_are_allocated(_prepare)
            compat.add_worker_method(REPORT_METHOD, _report)
        compat.accept_names(list(PRESETS))
    except Exception as error:
        logger.warning(
            "FibQuant is not available: %s", problem or f"{type(error).__name__}: {error}"
        )


def _register_backend() -> None:
    """Registers the backend under its name, which vLLM asks every attention layer for."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    if support.BACKEND_NAME not in AttentionBackendEnum.__members__:
        register_backend(support.BACKEND_NAME, BACKEND_PATH)


def _check(problem: str | None, vllm_config: VllmConfig) -> None:
    """Refuses a configuration that asks for one of our dtypes and cannot have it.

    Raises:
        ValueError: with every reason.
    """
    from vllm.logger import init_logger

    cache_config = vllm_config.cache_config
    if cache_config is None or not support.is_ours(cache_config.cache_dtype):
        options = vllm_config.additional_config
        if isinstance(options, dict) and SECTION in options:
            init_logger(f"vllm.{__name__}").warning_once(
                'additional_config["%s"] has no effect without --kv-cache-dtype fibquant', SECTION
            )
        return
    problems = [problem] if problem else support.config_problems(vllm_config)
    if problems:
        raise ValueError(support.refusal(cache_config.cache_dtype, problems))
    if vllm_config.model_config is not None:
        _tell_refused_images(*compat_images.refuse_images(vllm_config.model_config))
    for told in support.told_defaults(vllm_config):
        init_logger(f"vllm.{__name__}").warning_once("FibQuant goes without a default: %s", told)


def _tell_refused_images(modalities: list[str], why: str) -> None:
    if modalities:
        from vllm.logger import init_logger

        init_logger(f"vllm.{__name__}").warning_once(
            "FibQuant: requests with %s are refused, texts are served: %s",
            " or ".join(modalities),
            why,
        )


def _choose_backend(vllm_config: VllmConfig, layer: dict[str, Any]) -> type:
    """The backend class of one layer.

    Raises:
        ValueError: the layer cannot be served.
    """
    from vllm_fibquant.engine.backend import backend_for

    name = layer["kv_cache_dtype"]
    options = support.run_options(vllm_config).for_layer(name)
    backend: Any
    if layer["use_mla"]:
        from vllm_fibquant.engine.latent import latent_backend_for

        backend = latent_backend_for(options, *latent_support.latent_dims(vllm_config))
    else:
        backend = backend_for(options)
    problems = backend.validate_configuration(device_capability=None, **layer)
    if problems:
        raise ValueError(
            support.refusal(
                name,
                [
                    f"layer: must be supported, got {problem}; use --kv-cache-dtype auto"
                    for problem in problems
                ],
            )
        )
    return backend


def _is_our_backend(backend: type) -> bool:
    from vllm_fibquant.engine.backend import FibQuantBackend

    return issubclass(backend, FibQuantBackend)


def _chunked(backend: Any, chunk: int) -> type:
    from vllm_fibquant.engine.backend import chunked

    return chunked(backend, chunk)


def _layer_dtypes(vllm_config: VllmConfig) -> dict[int, str]:
    """The cache dtypes of layers that have another than --kv-cache-dtype, by number."""
    return dict(support.run_options(vllm_config).layers)


def _prepare(worker: Any, available_bytes: int) -> int:
    """What is done in a worker once its model is loaded. Returns the bytes left for pages.

    Raises:
        ValueError: layers take no notice of our dtype, ranks of this engine would encode or read
            pages differently, codes cost this model too much, or a GPU would lose its keys.
        RuntimeError: a rank does not use our cache.
    """
    vllm_config = worker.vllm_config
    if not support.is_ours(vllm_config.cache_config.cache_dtype):
        return available_bytes
    from vllm.logger import init_logger

    from vllm_fibquant.engine import calibrate, capacity, gate, head_dims, key_bias, support_gpu
    from vllm_fibquant.engine import layers as loaded
    from vllm_fibquant.ops import gpu

    if latent_support.is_latent(vllm_config):
        _prepare_latent(vllm_config)
        return available_bytes
    loaded.check_layers(vllm_config)
    loaded.tell_unused_scales(vllm_config)
    layers = loaded.our_layers(vllm_config)
    has_maps = "means" in head_dims.features_on(vllm_config)
    if not has_maps:
        found = {name: key_bias.found_bias(impl, vllm_config) for name, impl in layers.items()}
        if biased := {name: told for name, told in found.items() if told}:
            name = vllm_config.cache_config.cache_dtype
            why = gpu.why_no_maps(head_dims.head_dim_of(vllm_config))
            raise ValueError(support.refusal(name, [support_gpu.key_bias_problem(biased, why)]))
    # Settings first: ranks calibrate together, or not at all.
    _compare_ranks(vllm_config, list(layers.values()))
    if has_maps:
        calibrate.calibrate_layers(worker.model_runner, vllm_config, layers)
    gather = functools.partial(compat.gather_from_ranks, timeout_s=RANKS_TIMEOUT_S)
    model, options = worker.model_runner.get_model(), support.run_options(vllm_config)
    gate.check_fidelity(model, vllm_config, layers, options, gather)
    facts = _compare_ranks(vllm_config, list(layers.values()))
    init_logger(f"vllm.{__name__}").info(
        "FibQuant settings, codebooks and calibration have digest %s", ranks.digest_of(facts)
    )
    loaded.release_memory(vllm_config)
    left = available_bytes - loaded.allocate_copies(vllm_config, available_bytes)
    fits = capacity.what_fits(vllm_config, left)
    if told := capacity.padding_advice(fits, support.run_options(vllm_config).preset.name):
        init_logger(f"vllm.{__name__}").warning("FibQuant: %s", told)
    return left


def _prepare_latent(vllm_config: VllmConfig) -> None:
    """`_prepare` for a model with latent attention, of which nothing is measured.

    Raises:
        ValueError: layers take no notice of our dtype, or ranks would encode or read differently.
        RuntimeError: the kernels of this machine disagree with the oracle.
    """
    from vllm_fibquant.engine import gate
    from vllm_fibquant.engine.self_checks import check_latent_kernels

    layers = list(latent_support.latent_layers(vllm_config).values())
    if not layers:
        problem = "model: layers must take their cache's dtype from --kv-cache-dtype, got none"
        raise ValueError(support.refusal(vllm_config.cache_config.cache_dtype, [problem]))
    _compare_ranks(vllm_config, layers)
    block_size = vllm_config.cache_config.block_size
    check_latent_kernels(layers, vllm_config.model_config.dtype, block_size)
    gate.leave_unmeasured(vllm_config, latent_support.UNMEASURED)


def _compare_ranks(vllm_config: VllmConfig, layers: list[Any]) -> dict[str, str]:
    """Refuses to serve with ranks that differ. Returns what they have in common.

    Raises:
        ValueError: naming what differs, and the ranks.
        RuntimeError: naming the ranks that say nothing.
    """
    # Not each layer's own options: other pipeline stages have layers with other presets.
    options = support.run_options(vllm_config)
    facts = ranks.facts_of((options, layer.codec, layer.calibration) for layer in layers)
    # Every rank takes part, also one of whose layers none is ours.
    problems = ranks.differences(compat.gather_from_ranks(facts, RANKS_TIMEOUT_S))
    if problems:
        problems[-1] += "; give every node the same installation, codebooks and command line"
        raise ValueError(support.refusal(vllm_config.cache_config.cache_dtype, problems))
    return facts


def _report(worker: Any) -> dict[str, Any]:
    from vllm_fibquant.engine.report import worker_report

    return worker_report(worker.vllm_config)
