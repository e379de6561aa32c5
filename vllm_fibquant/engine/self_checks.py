# SPDX-License-Identifier: Apache-2.0
"""The self-checks of a process: each kernel that will serve, once for every shape of a layer."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from vllm.logger import init_logger

from vllm_fibquant.engine.head_dims import problem_of
from vllm_fibquant.engine.support_gpu import triton_row
from vllm_fibquant.observe.counters import own_counters
from vllm_fibquant.ops import gpu
from vllm_fibquant.ops.latent import run_latent_check
from vllm_fibquant.ops.selfcheck import SelfCheckResult, run_self_check

logger = init_logger(f"vllm.{__name__}")

_passed: list[SelfCheckResult] = []


def passed_self_checks() -> list[SelfCheckResult]:
    """The self-checks that have run in this process; one that fails ends it."""
    return _passed


def check_kernels(
    impls: Mapping[str, Any], dtype: torch.dtype, block_size: int, device: torch.device
) -> None:
    """Checks the kernels of a group of layers, and of the first map of keys among them.

    Raises:
        RuntimeError: the kernel of this machine disagrees with the oracle.
        ValueError: Triton would serve on a GPU, which the user has not asked for.
    """
    has_checked_map = False
    for impl in impls.values():
        if device.type != "cpu" and not impl.options.triton:
            _refuse_triton(impl, block_size, device)
        if impl.options.self_check:
            shape = dtype, impl.num_heads, impl.num_kv_heads, block_size, device
            attend = impl.attend
            new_tokens = impl.attends_raw, attend.raw_library, attend.copies is not None
            _check(impl.codec, *shape, None, *new_tokens, attend.keep_first > 0)
            if impl.key_map is not None and not has_checked_map:
                _check(impl.codec, *shape, impl.key_map, *new_tokens)
                has_checked_map = True


def check_latent_kernels(impls: Iterable[Any], dtype: torch.dtype, block_size: int) -> None:
    """As `check_kernels`, of layers with latent attention.

    Raises:
        RuntimeError: the kernel of this machine disagrees with the oracle.
    """
    for impl in impls:
        if impl.options.self_check:
            _check_latents(impl.codec, dtype, impl.num_heads, block_size)


def _refuse_triton(impl: Any, block_size: int, device: torch.device) -> None:
    """Refuses a layer that the CUDA library cannot serve on this device.

    What is known without the device has been refused before (`support_gpu`).

    Raises:
        ValueError: with the reason.
    """
    shape = 1, impl.num_kv_heads, block_size, impl.codec.layout.record_bytes
    cache = torch.empty(shape, dtype=torch.uint8, device=device)
    if reason := gpu.why_not_cuda(impl.codec, cache):
        raise ValueError(problem_of(triton_row(reason)))


@functools.cache
def _check(*what: Any) -> None:
    """One self-check, of the arguments of `run_self_check`; made once in a process."""
    result = run_self_check(*what)
    codec, dtype, num_q_heads, num_kv_heads, _, _, key_map, *_ = what
    mapped = ", mapped keys" if key_map else ""
    _passes(
        result,
        f"{dtype}{mapped}, head_dim {codec.head_dim}, {num_q_heads}/{num_kv_heads} heads",
    )


@functools.cache
def _check_latents(*what: Any) -> None:
    """As `_check`, of the arguments of `run_latent_check`."""
    codec, dtype, num_heads, _ = what
    result = run_latent_check(*what)
    _passes(result, f"{dtype}, latents of {codec.latent.head_dim}, {num_heads} heads")


def _passes(result: SelfCheckResult, what: str) -> None:
    _passed.append(result)
    own_counters()["self_checks"] = len(_passed)
    logger.info(
        "FibQuant self-check passed: kernel %s, %s, error %.1e of %.1e",
        result.kernel,
        what,
        result.error,
        result.tolerance,
    )
