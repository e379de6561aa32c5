# SPDX-License-Identifier: Apache-2.0
"""How many tokens and users fit: vLLM's own arithmetic, from a model's configuration alone.

vLLM divides the cache's memory into blocks and, in a model that mixes full and sliding-window
attention, its layers into groups that draw blocks from one pool. The numbers here are those it
logs ("KV cache size: N tokens, Maximum concurrency for L tokens per request: Cx");
tests/cli/test_plan.py compares the two.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.engine.copies import num_copy_rows

DENSE_BYTES = {"bf16": 2, "fp8": 1}
"""Bytes of one stored coordinate of the uncompressed caches."""

DEFAULT_BLOCK_SIZE = 128
DEFAULT_BATCHED_TOKENS = 2048
"""What vLLM's server takes on CPUs when nothing is given."""

DEFAULT_NUM_SEQS = 128
"""Requests of a step that vLLM's server takes on CPUs when nothing is given."""

BLOCK_MULTIPLE = 32
"""What vLLM's CPU attention demands of a block."""

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12}
_BINARY_UNITS = {"ki": 2**10, "mi": 2**20, "gi": 2**30, "ti": 2**40}


@dataclass(frozen=True)
class ModelShape:
    """What a KV cache's size depends on.

    Attributes:
        windows: per layer, its sliding window, or 0 for full attention.
    """

    name: str
    head_dim: int
    num_kv_heads: int
    windows: tuple[int, ...]
    max_context: int


@dataclass(frozen=True)
class LayerSpec:
    """The cache of one layer, as vLLM's allocator sees it."""

    window: int
    token_bytes: int
    block_size: int
    page_bytes: int


@dataclass(frozen=True)
class Capacity:
    """What fits with one cache dtype.

    Attributes:
        bytes_per_token: of the pages.
        effective_rate: stored bits per coordinate of a request, copies in 16 bits included.
        copy_bytes: memory that copies take from the pages, of a worker.
    """

    kv_cache_dtype: str
    bytes_per_token: int
    effective_rate: float
    num_blocks: int
    num_tokens: int
    max_concurrency: float
    copy_bytes: int = 0

    @property
    def num_users(self) -> int:
        return int(self.max_concurrency)


def parse_size(text: str) -> int:
    """Bytes of a size such as ``8GiB``, ``500 MB`` or ``1073741824``.

    Raises:
        ValueError: not a size.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?)?(b?)\s*", text, re.IGNORECASE)
    if not match or (not match[2] and "." in match[1]):
        raise ValueError(f"--memory must be a size such as 8GiB or 500MB, got {text!r}")
    unit = (match[2] or "").lower()
    return int(float(match[1]) * (_BINARY_UNITS.get(unit) or _UNITS[unit]))


def parse_tokens(text: str) -> int:
    """A number of tokens such as ``4096``, ``32k`` (32 x 1024) or ``1m``.

    Raises:
        ValueError: not a positive number of tokens.
    """
    match = re.fullmatch(r"\s*(\d+)\s*([km]?)\s*", text, re.IGNORECASE)
    num_tokens = int(match[1]) * {"": 1, "k": 2**10, "m": 2**20}[match[2].lower()] if match else 0
    if num_tokens < 1:
        raise ValueError(f"--context must be a number of tokens such as 4096 or 32k, got {text!r}")
    return num_tokens


def load_shape(model: str) -> ModelShape:
    """The shape of a model, from its directory or Hugging Face name.

    Raises:
        ValueError: it cannot be read, or its cache is of a kind that is not served.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise ValueError(f"plan: needs the package transformers ({error}); install it") from error
    try:
        config = AutoConfig.from_pretrained(model).to_dict()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"plan: model must be a directory with a config.json or a name that can be fetched, "
            f"got {model!r}; transformers says: {error}"
        ) from error
    return shape_of(model, config)


def shape_of(name: str, config: dict[str, Any]) -> ModelShape:
    """The shape a Hugging Face configuration describes.

    Raises:
        ValueError: naming what is missing or not served.
    """
    config = config.get("text_config") or config
    other = "vllm-fibquant serves standard attention only; use --kv-cache-dtype auto"
    if config.get("kv_lora_rank"):
        raise ValueError(
            f"plan: {name} must not use multi-head latent attention (MLA), "
            f"got kv_lora_rank {config['kv_lora_rank']}; {other}"
        )
    needed = ("num_hidden_layers", "num_attention_heads", "hidden_size")
    missing = [field for field in needed if not config.get(field)]
    if missing:
        raise ValueError(
            f"plan: config of {name} must have {', '.join(missing)}, got none; {other}"
        )
    num_layers = config["num_hidden_layers"]
    num_q_heads = config["num_attention_heads"]

    window = config.get("sliding_window") or 0
    if not config.get("use_sliding_window", True):
        window = 0
    layer_types = config.get("layer_types")
    if layer_types:
        unknown = set(layer_types) - {"full_attention", "sliding_attention", "attention"}
        if unknown:
            raise ValueError(
                f"plan: layers of {name} must be full_attention or sliding_attention, "
                f"got {', '.join(sorted(unknown))}; {other}"
            )
        windows = [window if kind == "sliding_attention" else 0 for kind in layer_types]
    else:
        windows = [window] * num_layers
    return ModelShape(
        name=name,
        head_dim=config.get("head_dim") or config["hidden_size"] // num_q_heads,
        num_kv_heads=config.get("num_key_value_heads") or num_q_heads,
        windows=tuple(windows[:num_layers]),
        max_context=config.get("max_position_embeddings") or DEFAULT_BATCHED_TOKENS,
    )


def plan_capacities(
    shape: ModelShape,
    memory_bytes: int,
    context: int,
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    tensor_parallel_size: int = 1,
    skip_layers: tuple[str, ...] = (),
    batched_tokens: int = DEFAULT_BATCHED_TOKENS,
    num_copies: int = 0,
    max_num_seqs: int = DEFAULT_NUM_SEQS,
    layer_presets: tuple[tuple[int, str], ...] = (),
) -> list[Capacity]:
    """What fits into `memory_bytes` of every worker's cache, for bf16, fp8 and every preset.

    Args:
        shape: the model.
        memory_bytes: of the KV cache, as in VLLM_CPU_KVCACHE_SPACE; per tensor-parallel worker.
        context: tokens of one user's request, prompt and answer.
        block_size: tokens of a block.
        tensor_parallel_size: workers that share the KV heads.
        skip_layers: as --kv-cache-dtype-skip-layers: layer numbers, or ``sliding_window``;
            these stay in 16 bits.
        batched_tokens: vLLM's --max-num-batched-tokens, which bounds what a sliding-window
            layer holds of one request.
        num_copies: tokens of a request that our layers also keep in 16 bits (mode quality).
        max_num_seqs: vLLM's --max-num-seqs: requests that have copies.
        layer_presets: numbers of layers that have another preset than the rest, and its name.

    Returns:
        One entry for every cache dtype that the head_dim allows.
    """
    known = {"sliding_window", *map(str, range(len(shape.windows)))}
    unknown = [name for name in skip_layers if name not in known]
    if unknown:
        raise ValueError(
            f"plan: --kv-cache-dtype-skip-layers must be layer numbers below "
            f"{len(shape.windows)} or sliding_window, got {', '.join(unknown)}"
        )
    if block_size < 1 or block_size % BLOCK_MULTIPLE:
        raise ValueError(
            f"plan: --block-size must be a positive multiple of {BLOCK_MULTIPLE}, got {block_size}"
        )
    if tensor_parallel_size < 1:
        raise ValueError(
            f"plan: --tensor-parallel-size must be at least 1, got {tensor_parallel_size}"
        )
    if max_num_seqs < 1:
        raise ValueError(f"plan: --max-num-seqs must be at least 1, got {max_num_seqs}")
    num_kv_heads = max(1, shape.num_kv_heads // tensor_parallel_size)
    sizes = token_bytes(shape.head_dim)
    _check_layer_presets(shape, layer_presets, skip_layers, sizes)

    capacities = []
    for name, head_bytes in sizes.items():
        named = {n: sizes[p] for n, p in layer_presets} if name in PRESETS else {}
        layers = layer_specs(shape, head_bytes, num_kv_heads, block_size, skip_layers, named)
        groups = group_layers(layers)
        bytes_per_block = max(sum(layer.page_bytes for layer in group) for group in groups)
        # Only layers that store codes have copies, of keys and values in 16 bits.
        dense_bytes = 2 * shape.head_dim * DENSE_BYTES["bf16"]
        coded = [layer for layer in layers if layer.token_bytes < num_kv_heads * dense_bytes]
        stored = sum(layer.token_bytes for layer in coded or layers) / len(coded or layers)
        row_bytes = len(coded) * num_kv_heads * dense_bytes
        copied = num_copies if name in PRESETS and coded else 0
        copy_bytes = 0
        if copied:
            copy_bytes = row_bytes * num_copy_rows(max_num_seqs * copied, row_bytes, memory_bytes)
        num_blocks = (memory_bytes - copy_bytes) // bytes_per_block
        blocks_per_user = sum(request_blocks(group, context, batched_tokens) for group in groups)
        max_concurrency = num_blocks / blocks_per_user
        capacities.append(
            Capacity(
                kv_cache_dtype=name,
                bytes_per_token=sum(layer.token_bytes for layer in layers),
                effective_rate=8 * stored / (num_kv_heads * 2 * shape.head_dim)
                + 8 * DENSE_BYTES["bf16"] * min(copied, context) / context,
                num_blocks=num_blocks,
                num_tokens=int(max_concurrency * context),
                max_concurrency=max_concurrency,
                copy_bytes=copy_bytes,
            )
        )
    return capacities


def _check_layer_presets(
    shape: ModelShape,
    layer_presets: tuple[tuple[int, str], ...],
    skip_layers: tuple[str, ...],
    sizes: dict[str, int],
) -> None:
    """Refuses what the engine refuses.

    Raises:
        ValueError: naming the layers or the preset.
    """
    num_layers = len(shape.windows)
    beyond = [str(number) for number, _ in layer_presets if number >= num_layers]
    if beyond:
        raise ValueError(f"plan: --layers must be below {num_layers}, got {', '.join(beyond)}")
    both = [str(number) for number, _ in layer_presets if str(number) in skip_layers]
    if both:
        raise ValueError(
            "plan: --layers must not be among --kv-cache-dtype-skip-layers, got "
            f"{', '.join(both)}; name each layer in one of the two"
        )
    for _, name in layer_presets:
        if name not in sizes:
            raise ValueError(
                f"plan: --layers must have presets for head_dim {shape.head_dim}, got {name}"
            )
    if layer_presets and len(set(shape.windows)) > 1:
        raise ValueError(
            "plan: --layers must be left out for models that mix full and sliding-window "
            f"attention, got {shape.name}: vLLM pads every page to the largest"
        )


def token_bytes(head_dim: int) -> dict[str, int]:
    """Bytes of one token's key and value in one KV head, for every cache dtype that takes it."""
    sizes = {name: 2 * head_dim * size for name, size in DENSE_BYTES.items()}
    for preset in PRESETS.values():
        try:
            sizes[preset.name] = preset_layout(preset, head_dim).record_bytes
        except ValueError:  # a subvec_dim that does not divide this head_dim
            continue
    return sizes


def layer_specs(
    shape: ModelShape,
    head_bytes: int,
    num_kv_heads: int,
    block_size: int,
    skip_layers: tuple[str, ...],
    named: Mapping[int, int] | None = None,
) -> list[LayerSpec]:
    """The spec of every layer; those skipped have 16 bits.

    Args:
        named: bytes of a token and KV head of layers that have others than `head_bytes`.
    """
    dense_bytes = 2 * shape.head_dim * DENSE_BYTES["bf16"]
    layers = []
    for index, window in enumerate(shape.windows):
        is_skipped = str(index) in skip_layers or (window > 0 and "sliding_window" in skip_layers)
        own_bytes = (named or {}).get(index, head_bytes)
        token_bytes = num_kv_heads * (dense_bytes if is_skipped else own_bytes)
        layers.append(LayerSpec(window, token_bytes, block_size, block_size * token_bytes))
    return layers


def group_layers(layers: list[LayerSpec]) -> list[list[LayerSpec]]:
    """The layers that share a block table; every group draws blocks from one pool."""
    if len({(layer.window, layer.block_size) for layer in layers}) == 1:
        return [layers]

    page_bytes = max(layer.page_bytes for layer in layers)
    kinds: defaultdict[LayerSpec, list[LayerSpec]] = defaultdict(list)
    for layer in layers:
        ratio, rest = divmod(page_bytes, layer.page_bytes)
        block_size = layer.block_size * (1 if rest else ratio)
        unified = replace(layer, block_size=block_size, page_bytes=page_bytes)
        kinds[unified].append(unified)

    sizes = [len(kind) for kind in kinds.values()]
    group_size = max(sizes) if max(sizes) < 1.5 * min(sizes) else min(sizes)
    groups = []
    for kind in kinds.values():
        num_groups = -(-len(kind) // group_size)
        groups += [kind[start::num_groups] for start in range(num_groups)]
    return groups


def request_blocks(group: list[LayerSpec], context: int, batched_tokens: int) -> int:
    """Blocks one request of `context` tokens may hold in a group."""
    first = group[0]
    if not first.window:
        return -(-context // first.block_size)
    # The window need not start at a block's edge, hence one more.
    held = min(first.window - 1 + batched_tokens, context)
    return -(-held // first.block_size) + 1


def as_json(
    shape: ModelShape, memory_bytes: int, context: int, capacities: list[Capacity]
) -> dict[str, Any]:
    """Everything `render` shows, as one JSON-serialisable object."""
    return {
        "model": asdict(shape),
        "memory_bytes": memory_bytes,
        "context": context,
        "capacities": [{**asdict(c), "num_users": c.num_users} for c in capacities],
    }


def render(shape: ModelShape, memory_bytes: int, context: int, capacities: list[Capacity]) -> str:
    """The plan as a table for people."""
    num_sliding = sum(window > 0 for window in shape.windows)
    sliding = f", {num_sliding} of them sliding-window" if num_sliding else ""
    lines = [
        f"{shape.name}: {len(shape.windows)} layers{sliding}, "
        f"{shape.num_kv_heads} KV heads of {shape.head_dim}",
        f"{memory_bytes / 2**30:.2f} GiB of KV cache, requests of {context:,} tokens",
        "",
        f"{'--kv-cache-dtype':<18}{'bits/value':>10}{'bytes/token':>13}{'tokens':>14}"
        f"{'users':>9}{'x bf16':>9}",
    ]
    dense = next(c for c in capacities if c.kv_cache_dtype == "bf16")
    for c in capacities:
        name = "auto (bf16)" if c is dense else c.kv_cache_dtype
        ratio = c.max_concurrency / dense.max_concurrency if dense.num_blocks else 0.0
        users = f"{c.num_users:,}" if c.num_users else "none"
        lines.append(
            f"{name:<18}{c.effective_rate:>10.2f}{c.bytes_per_token:>13,}{c.num_tokens:>14,}"
            f"{users:>9}{ratio:>8.2f}x"
        )
    if copy_bytes := max(c.copy_bytes for c in capacities):
        lines += ["", f"Up to {copy_bytes / 2**20:.0f} MiB of it are for copies in 16 bits."]
    if context > shape.max_context:
        lines += ["", f"The model's own maximum context is {shape.max_context:,} tokens."]
    if not all(c.num_users for c in capacities):
        lines += ["", "none: not even one such request fits; give more memory or less context."]
    return "\n".join(lines)
