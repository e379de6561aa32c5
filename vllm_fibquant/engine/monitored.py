# SPDX-License-Identifier: Apache-2.0
"""The fidelity monitor of a group of layers, given vLLM's batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_fibquant.engine.gate import number_of, outcome_of
from vllm_fibquant.observe.counters import own_counters
from vllm_fibquant.observe.ledger import Ledger
from vllm_fibquant.observe.monitor import Monitor, Step


def waits(device_type: str) -> bool:
    """Whether the host may look at tensors of such a device at once."""
    return device_type == "cpu"


def planner_of_probes(
    vllm_config: VllmConfig, impls: dict[str, Any], block_size: int, device: torch.device
) -> Callable[[CommonAttentionMetadata], Any] | None:
    """What plans the comparison of each step, or finds none to make; None without a monitor.

    Args:
        impls: the group's layers by name, with their options.
        device: of pages and batches.
    """
    global _latest
    options = next(iter(impls.values())).options.monitor if impls else None
    if options is None:
        return None
    # The monitors of one run have one ledger.
    if _latest is None or _latest[0] is not vllm_config:
        is_loss_accepted = outcome_of(vllm_config).state == "accepted"
        _latest = vllm_config, Ledger(options.budget, own_counters(), is_loss_accepted)
    numbers, speculative = list(map(number_of, impls)), vllm_config.speculative_config
    monitor = Monitor(
        options, list(impls.values()), numbers, block_size, _latest[1], device, waits(device.type),
        speculative.num_speculative_tokens if speculative else 0,
    )  # fmt: skip

    def plan(common: CommonAttentionMetadata) -> Any:
        tensors = common.query_start_loc, common.seq_lens, common.block_table_tensor
        lens = common.seq_lens if common.seq_lens.is_cpu else common.seq_lens_cpu_upper_bound
        step = Step(*tensors, common.slot_mapping, None if lens is None else lens.numpy())
        return monitor.plan(common.query_start_loc_cpu.numpy(), step)

    return plan


_latest: tuple[VllmConfig, Ledger] | None = None
