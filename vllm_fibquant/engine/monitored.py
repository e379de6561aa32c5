# SPDX-License-Identifier: Apache-2.0
"""The fidelity monitor of a group of layers, given vLLM's batches."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import CommonAttentionMetadata

from vllm_fibquant.engine.gate import outcome_of
from vllm_fibquant.observe import device_monitor
from vllm_fibquant.observe.monitor import Monitor, monitor_of


def planner_of_probes(
    vllm_config: VllmConfig, impls: dict[str, Any], block_size: int, device: torch.device
) -> Callable[[CommonAttentionMetadata], Any] | None:
    """What plans the comparison of each step, or finds none to make; None without a monitor.

    Args:
        impls: the group's layers by name.
        device: of pages and batches.
    """
    on_device = device_monitor.serves(device.type)
    make: Any = Monitor
    if on_device:
        speculative = vllm_config.speculative_config
        make = functools.partial(
            device_monitor.DeviceMonitor, device=device,
            num_speculative=speculative.num_speculative_tokens if speculative else 0,
        )  # fmt: skip
    is_loss_accepted = outcome_of(vllm_config).state == "accepted"
    monitor = monitor_of(vllm_config, impls, block_size, is_loss_accepted, make)
    if monitor is None:
        return None
    return functools.partial(_plan_on_device if on_device else _plan, monitor)


def _plan(monitor: Monitor, common: CommonAttentionMetadata) -> Any:
    tensors = common.query_start_loc, common.seq_lens, common.block_table_tensor
    return monitor.plan(*(tensor.numpy() for tensor in (*tensors, common.slot_mapping)))


def _plan_on_device(monitor: device_monitor.DeviceMonitor, common: CommonAttentionMetadata) -> Any:
    step = device_monitor.Step(
        common.query_start_loc, common.seq_lens, common.block_table_tensor, common.slot_mapping
    )
    return monitor.plan(common.query_start_loc_cpu.numpy(), step)
