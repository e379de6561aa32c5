# SPDX-License-Identifier: Apache-2.0
"""Lets a loaded model read tokens before there are pages.

Our layers attend with what stands in for them; layers that are not ours
(--kv-cache-dtype-skip-layers) attend in plain PyTorch, since without pages vLLM's own give zeros.
Adapters of --enable-lora are taken off: the base model reads.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import ModelConfig, VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_pp_group
from vllm.forward_context import set_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.sequence import IntermediateTensors
from vllm.tokenizers import cached_get_tokenizer

if TYPE_CHECKING:
    from vllm_fibquant.engine.attention import FibQuantImpl


def language_model(model: torch.nn.Module) -> torch.nn.Module:
    """The part of a multimodal model that reads text; any other model itself."""
    find = getattr(model, "get_language_model", None)
    return find() if find is not None else model


def tokenizer_of(model_config: ModelConfig) -> Any:
    """The model's tokenizer, as vLLM loads it.

    Raises:
        ValueError: it cannot be loaded.
    """
    try:
        return cached_get_tokenizer(
            model_config.tokenizer,
            tokenizer_mode=model_config.tokenizer_mode,
            revision=model_config.tokenizer_revision,
            trust_remote_code=model_config.trust_remote_code,
        )
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


@contextmanager
def without_adapters(model: torch.nn.Module) -> Iterator[None]:
    """Within this context the layers that --enable-lora wraps are the base model's own."""
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if isinstance(getattr(child, "base_layer", None), torch.nn.Module)
    ]
    for parent, name, child in wrapped:
        setattr(parent, name, child.base_layer)
    try:
        yield
    finally:
        for parent, name, child in wrapped:
            setattr(parent, name, child)


def read(
    model: torch.nn.Module,
    vllm_config: VllmConfig,
    model_config: ModelConfig,
    tokens: torch.Tensor,
) -> torch.Tensor | None:
    """Lets the model read sequences of one length, one after the other in one step.

    A collective call of all ranks, within `attending`.

    Args:
        tokens: int64 [num_seqs, length].

    Returns:
        The last hidden states [num_seqs * length, hidden_size]; None on all pipeline stages but
        the last.
    """
    positions = torch.arange(tokens.shape[1], device=tokens.device).repeat(len(tokens))
    if model_config.uses_mrope:
        positions = positions.expand(3, -1)
    pipeline = get_pp_group()
    given: dict[str, IntermediateTensors | None] = {}
    # The part of a vision model that reads text may be without a default for it (Idefics3).
    if "intermediate_tensors" in inspect.signature(model.forward).parameters:
        given["intermediate_tensors"] = None
    if not pipeline.is_first_rank:
        given["intermediate_tensors"] = IntermediateTensors(pipeline.recv_tensor_dict())
    with set_forward_context(
        None, vllm_config, num_tokens=tokens.numel(), slot_mapping={}, skip_compiled=True
    ):
        output = model(input_ids=tokens.flatten(), positions=positions, **given)
    if pipeline.is_last_rank:
        return output
    pipeline.send_tensor_dict(output.tensors)
    return None


@contextmanager
def attending(
    model: torch.nn.Module,
    vllm_config: VllmConfig,
    stand_ins: Mapping[FibQuantImpl, Callable[..., torch.Tensor]],
    num_seqs: Callable[[], int] = lambda: 1,
) -> Iterator[None]:
    """Within this context the base model reads without a cache.

    Args:
        stand_ins: what attends in the place of our layers: called with query, key, value and
            output, which it fills and returns.
        num_seqs: how many sequences of one length a step has.
    """
    others = [
        layer.impl
        for layer in get_layers_from_vllm_config(vllm_config, Attention).values()
        if not hasattr(layer.impl, "without_cache")
    ]
    with ExitStack() as stack:
        stack.enter_context(without_adapters(model))
        for impl, stand_in in stand_ins.items():
            impl.without_cache = stand_in
            stack.callback(setattr, impl, "without_cache", None)
        for impl in others:
            impl.forward = _stock_attention(impl, num_seqs)
            stack.callback(delattr, impl, "forward")
        yield


def _stock_attention(impl: Any, num_seqs: Callable[[], int]) -> Callable[..., Any]:
    """What stands in for `forward` of a layer that is not ours, over the same sequences."""
    window = getattr(impl, "sliding_window", None) or 0
    window = window[0] + 1 if isinstance(window, tuple) else window

    def forward(
        layer: Any, query: Any, key: Any, value: Any, *args: Any, output: Any, **kwargs: Any
    ) -> torch.Tensor:
        heads = (-1, impl.num_heads, impl.head_size), (-1, impl.num_kv_heads, impl.head_size)
        shaped = query.view(heads[0]), key.view(heads[1]), value.view(heads[1])
        found = attend_dense(
            *shaped, len(query) // num_seqs(), impl.scale, max(window, 0),
            getattr(impl, "logits_soft_cap", None) or 0.0, getattr(impl, "sinks", None),
            getattr(layer, "attention_chunk_size", None) or 0,
        )  # fmt: skip
        return output.copy_(found.view(output.shape))

    return forward


def attend_dense(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    length: int,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    chunk: int = 0,
) -> torch.Tensor:
    """Causal attention of sequences of one length, one after the other, in plain PyTorch, float32.

    Args:
        query: [num_seqs * length, num_q_heads, head_dim].
        key, value: [num_seqs * length, num_kv_heads, head_dim].
        scale, window, soft_cap, sinks, chunk: as in `ops.Attend`.

    Returns:
        float32 as query.
    """
    group = query.shape[1] // key.shape[1]
    queries, keys, values = (x.float().unflatten(0, (-1, length)) for x in (query, key, value))
    keys, values = (x.repeat_interleave(group, 2) for x in (keys, values))
    scores = torch.einsum("bqhd,bshd->bhqs", queries, keys) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    at = torch.arange(length, device=query.device)
    hidden = at > at[:, None]
    if window > 0:
        hidden |= at <= at[:, None] - window
    if chunk > 0:
        hidden |= at // chunk < at[:, None] // chunk
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        extra = sinks.float()[:, None, None].expand(len(scores), -1, length, 1)
        scores = torch.cat((scores, extra), -1)
    weights = scores.softmax(-1)[..., :length]
    return torch.einsum("bhqs,bshd->bqhd", weights, values).flatten(0, 1)
