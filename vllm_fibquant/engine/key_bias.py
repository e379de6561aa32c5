# SPDX-License-Identifier: Apache-2.0
"""What a key projection adds to every key, taken from the model's weights without any text.

A layer's attention module, given hidden states of zeros, makes keys of its projection's bias alone,
after whatever norm and rotary embedding the model applies: R_p b. Biases may be hundreds of times
longer than what tells keys apart (Qwen2), and a code would spend its bits on them.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig
from vllm.forward_context import set_forward_context

from vllm_fibquant.engine import reading, rotary
from vllm_fibquant.keys.calibration import KeyStatistics, num_turning
from vllm_fibquant.keys.key_map import MAX_FIRST_MEANS, TurningMean, Turns

if TYPE_CHECKING:
    from vllm_fibquant.engine.attention import FibQuantImpl

NUM_POSITIONS = 1024
"""Positions over which what does not turn, or is not taken to turn, is averaged."""
_STEP = 16
"""Between positions that are looked at, behind the first ones, where no turns are known."""


def has_bias(impl: FibQuantImpl) -> bool:
    """Whether a module beside the layer, such as its projection of keys, has a bias."""
    parent = rotary.parent_of(impl)
    children = [] if parent is None else list(parent.modules())[1:]
    biases = (getattr(child, "bias", None) for child in children)
    return any(isinstance(bias, torch.Tensor) and bool(bias.any()) for bias in biases)


def found_bias(impl: FibQuantImpl, vllm_config: VllmConfig) -> str | None:
    """What a refusal calls the bias of a layer's keys, or what may be one, as the layer's module
    has a bias and cannot be asked whose; None where there is none.

    A collective call, as `bias_statistics`.
    """
    try:
        return None if bias_statistics(impl, vllm_config, None) is None else "one"
    except ValueError as error:
        return f"a bias that may be of keys ({error})"


def bias_statistics(
    impl: FibQuantImpl, vllm_config: VllmConfig, turns: Turns | None
) -> KeyStatistics | None:
    """The bias of a layer's keys in the form of a measurement, or None where there is none.

    All tensor-parallel ranks must call this together: the module's output projection adds up.

    Args:
        turns: how far the layer's rotary embedding turns keys, if that is known.

    Raises:
        ValueError: the attention module cannot be asked for it.
    """
    if not has_bias(impl):
        return None
    dtype = vllm_config.model_config.dtype
    first = torch.arange(MAX_FIRST_MEANS)
    rest = torch.arange(MAX_FIRST_MEANS, NUM_POSITIONS, _STEP)
    key = _keys_of_nothing(impl, vllm_config, torch.cat((first, rest)), dtype)
    key = key.float().transpose(0, 1)  # [num_kv_heads, num_positions, head_dim]
    if not key.any():
        return None
    mean, c = key.mean(1), torch.zeros_like(key[:, 0])
    if turns is not None:
        # R_0 turns nothing; what it lengthens keys by is taken back.
        at_zero = key[:, 0]
        turned = turns.pairs.long().flatten()
        c[:, turned] = at_zero[:, turned] / turns.length
        strongest = TurningMean.strongest(c, turns, num_turning(turns))
        kept = strongest.coefficients(c.shape[1], c.dtype)
        mean = turns.turn(c - kept, torch.arange(NUM_POSITIONS)).mean(0)
        others = torch.ones_like(mean, dtype=torch.bool)
        others[:, turned] = False
        mean = torch.where(others, at_zero, mean)
        c = kept
    moment = torch.zeros(*c.shape, c.shape[1])
    begin = key[:, : len(first)].contiguous()
    return KeyStatistics(mean, c, moment, moment, begin, torch.zeros_like(begin))


def _keys_of_nothing(
    impl: FibQuantImpl,
    vllm_config: VllmConfig,
    positions: torch.Tensor,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Keys [num_positions, num_kv_heads, head_dim] that the module makes of hidden states 0."""
    parent: Any = rotary.parent_of(impl)
    parameters = inspect.signature(parent.forward).parameters
    # What the first projection takes: a draft model's is not the model's own hidden size.
    size = next((m.input_size for m in parent.modules() if hasattr(m, "input_size")), None)
    if size is None:
        raise ValueError(
            f"bias_statistics: {type(parent).__name__} must have a projection, got none"
        )
    device = next(parent.parameters()).device
    positions = positions.to(device)
    given: dict[str, torch.Tensor] = {
        "hidden_states": torch.zeros(len(positions), size, dtype=dtype, device=device)
    }
    if "positions" in parameters:
        three_axes = vllm_config.model_config.uses_mrope
        given["positions"] = positions.expand(3, -1) if three_axes else positions
    seen: list[torch.Tensor] = []

    def attend(query: Any, key: torch.Tensor, value: Any, output: torch.Tensor) -> torch.Tensor:
        seen.append(key.view(len(positions), impl.num_kv_heads, impl.head_size).clone().cpu())
        return output.zero_()

    try:
        with (
            reading.attending(parent, vllm_config, {impl: attend}),
            torch.inference_mode(),
            set_forward_context(
                None, vllm_config, num_tokens=len(positions), slot_mapping={}, skip_compiled=True
            ),
        ):
            parent(**given)
    except (TypeError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"bias_statistics: {type(parent).__name__} must make keys of hidden states, got "
            f"{type(error).__name__}: {error}"
        ) from error
    if not seen:
        raise ValueError(f"bias_statistics: {type(parent).__name__} must attend, got no call")
    return seen[0]
