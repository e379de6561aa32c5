# SPDX-License-Identifier: Apache-2.0
"""How many tokens and users fit: vLLM's own arithmetic, from a model's configuration alone.

vLLM divides the cache's memory into blocks and, in a model that mixes full and sliding-window
attention, its layers into groups that draw blocks from one pool. The numbers here are those it
logs ("KV cache size: N tokens, Maximum concurrency for L tokens per request: Cx");
tests/cli/test_plan.py compares the two.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from vllm_fibquant.cli.shape import ModelShape, max_context, needs_vllm, read_config, shape_of
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.codec.layout import preset_layout
from vllm_fibquant.engine import device_pool
from vllm_fibquant.engine.compat_pages import fitted
from vllm_fibquant.engine.copies import num_copy_rows
from vllm_fibquant.engine.head_dims import refused_presets
from vllm_fibquant.options import SECTION, parse_layers, parse_options

DENSE_BYTES = {"bf16": 2, "fp8": 1}
"""Bytes of one stored coordinate of the uncompressed caches."""

DEFAULT_DEVICE = "cpu"
DEFAULT_BLOCK_SIZES = {"cpu": 128, "cuda": 16}
DEFAULT_BLOCK_SIZE = DEFAULT_BLOCK_SIZES[DEFAULT_DEVICE]
"""Tokens of a block in vLLM's server when nothing is given."""
DEFAULT_BATCHED_TOKENS = 2048
"""What vLLM's server takes on CPUs when nothing is given."""

DEFAULT_NUM_SEQS = {"cpu": 128, "cuda": 256}
"""Requests of a step that vLLM's server takes when nothing is given, by device: on GPUs the fewest;
on those of much memory it takes 1,024."""

BLOCK_MULTIPLE = {"cpu": 32, "cuda": 16}
"""What is demanded of a block, by device: on CPUs by vLLM's attention."""


@dataclass(frozen=True)
class Settings:
    """What decides what fits, beside the model, the memory and the length of requests.

    Attributes:
        block_size: tokens of a block.
        tensor_parallel_size: workers that share the KV heads.
        skip_layers: as --kv-cache-dtype-skip-layers: layer numbers, or ``sliding_window``; these
            stay in 16 bits.
        batched_tokens: vLLM's --max-num-batched-tokens, which bounds what a sliding-window layer
            holds of one request.
        num_copies: tokens of a request that our layers also keep in 16 bits (mode quality).
        num_copied_first: of them, first ones.
        max_num_seqs: vLLM's --max-num-seqs: requests that have copies; None for DEFAULT_NUM_SEQS.
        layer_presets: numbers of layers that have another preset than the rest, and its name.
        device: "cpu" or "cuda", whose pools of copies differ.
    """

    block_size: int = DEFAULT_BLOCK_SIZE
    tensor_parallel_size: int = 1
    skip_layers: tuple[str, ...] = ()
    batched_tokens: int = DEFAULT_BATCHED_TOKENS
    num_copies: int = 0
    num_copied_first: int = 0
    max_num_seqs: int | None = None
    layer_presets: tuple[tuple[int, str], ...] = ()
    device: str = DEFAULT_DEVICE

    @property
    def num_seqs(self) -> int:
        if self.max_num_seqs is None:
            return DEFAULT_NUM_SEQS.get(self.device, 1)
        return self.max_num_seqs


@dataclass(frozen=True)
class LayerSpec:
    """The cache of one layer, as vLLM's allocator sees it, and in its words."""

    sliding_window: int
    token_bytes: int
    block_size: int
    page_size_padded: int | None = None
    num_coordinates: int = field(default=0, compare=False)

    @property
    def page_size_bytes(self) -> int:
        return self.page_size_padded or self.block_size * self.token_bytes


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


def plan_model(
    model: str,
    memory_bytes: int,
    context: int | None = None,
    *,
    options: dict[str, Any] | None = None,
    **settings: Any,
) -> tuple[ModelShape, int, list[Capacity]]:
    """A model's shape, tokens of a request, and what fits: see `plan_capacities`.

    Args:
        model: directory with a config.json, or a Hugging Face name.
        context: None for the model's maximum.
        options: as under additional_config["fibquant"]: mode and layers decide what fits.
        settings: fields of `Settings` but those that follow from options.

    Raises:
        ValueError: the model cannot be read, or is refused.
    """
    options, given = options or {}, Settings(**settings)
    config = read_config(model)
    context = context or max_context(config)
    # Where vLLM is asked it says which blocks it can have: CPU_MLA has blocks of 16 tokens.
    _check_settings(given, 1 if needs_vllm(config) else None)
    if needs_vllm(config):
        from vllm_fibquant.cli.plan_states import plan_states

        if given.device != DEFAULT_DEVICE:
            raise ValueError(
                "plan: --device must be left out for models whose cache vLLM alone knows, got "
                f"{given.device}: vLLM is asked, for the device of this machine"
            )
        if given.tensor_parallel_size != 1:
            raise ValueError(
                "plan: --tensor-parallel-size must be 1 for models whose cache vLLM alone knows, "
                f"got {given.tensor_parallel_size}; a start's own log has the numbers"
            )
        shape, capacities = plan_states(
            model,
            max_context(config),
            memory_bytes,
            context,
            options,
            block_size=given.block_size,
            kv_cache_dtype_skip_layers=list(given.skip_layers),
            max_num_batched_tokens=given.batched_tokens,
            max_num_seqs=given.num_seqs,
        )
        return shape, context, capacities
    shape = shape_of(model, config)
    modes = {name: value for name, value in options.items() if name != "layers"}
    parsed = parse_options("fibquant", {SECTION: modes})
    capacities = plan_capacities(
        shape,
        memory_bytes,
        context,
        **settings,
        num_copies=parsed.num_copies,
        num_copied_first=parsed.num_copied_first,
        layer_presets=parse_layers(options.get("layers")),
    )
    coded = {
        shape.layer_heads(index)[1]
        for index, window in enumerate(shape.windows)
        if not _is_skipped(index, window, given)
    }
    refused = refused_presets(coded, given.device)
    if refused.keys() == PRESETS.keys():
        told, other = refused["fibquant"], "use --kv-cache-dtype auto"
        told += "" if other in told else f"; or {other}"
        raise ValueError(f"plan: {model} must be a model that is served; {told}")
    return shape, context, [c for c in capacities if c.kv_cache_dtype not in refused]


def plan_capacities(
    shape: ModelShape, memory_bytes: int, context: int, **settings: Any
) -> list[Capacity]:
    """What fits into `memory_bytes` of every worker's cache, for bf16, fp8 and every preset.

    Args:
        shape: the model.
        memory_bytes: of the KV cache, as in VLLM_CPU_KVCACHE_SPACE; per tensor-parallel worker.
        context: tokens of one user's request, prompt and answer.
        settings: fields of `Settings`.

    Returns:
        One entry for every cache dtype that the head_dim allows.
    """
    given = Settings(**settings)
    _check_settings(given)
    _check_skipped(shape, given)
    sizes = token_bytes(shape.head_dim)
    others = [token_bytes(head_dim) for head_dim in shape.head_dims]
    _check_layer_presets(shape, given, sizes)

    num_first, num_recent = given.num_copied_first, given.num_copies - given.num_copied_first
    rows = device_pool.rows_of_a_request(given.device, num_first, num_recent)
    # Layers that read another's pages read its copies, too, where encoding makes them.
    readers = () if device_pool.serves(given.device) else shape.readers
    capacities = []
    for name in [n for n in sizes if all(n in other for other in others)]:
        layers = layer_specs(shape, name, given)
        groups = group_layers(fit_layers(layers) if name in PRESETS else layers)
        bytes_per_block = max(sum(layer.page_size_bytes for layer in group) for group in groups)
        # Only layers that store codes have copies, of keys and values in 16 bits.
        dense_bytes = DENSE_BYTES["bf16"]
        coded = [x for x in layers if x.token_bytes < x.num_coordinates * dense_bytes]
        stored = sum(layer.token_bytes for layer in coded or layers)
        copying = coded + [layers[i] for i in readers if layers[i] in coded]
        row_bytes = sum(layer.num_coordinates for layer in copying) * dense_bytes
        copied = given.num_copies if name in PRESETS and coded else 0
        copy_bytes = 0
        if copied:
            wanted = given.num_seqs * rows
            copy_bytes = row_bytes * num_copy_rows(wanted, row_bytes, memory_bytes)
        num_blocks = max(0, memory_bytes - copy_bytes) // bytes_per_block
        blocks_per_user = sum(
            request_blocks(group, context, given.batched_tokens) for group in groups
        )
        max_concurrency = num_blocks / blocks_per_user
        capacities.append(
            Capacity(
                kv_cache_dtype=name,
                bytes_per_token=sum(layer.token_bytes for layer in layers),
                effective_rate=effective_rate(
                    stored, sum(x.num_coordinates for x in coded or layers), copied, context
                ),
                num_blocks=num_blocks,
                num_tokens=int(max_concurrency * context),
                max_concurrency=max_concurrency,
                copy_bytes=copy_bytes,
            )
        )
    return capacities


def effective_rate(stored_bytes: int, num_coordinates: int, num_copies: int, context: int) -> float:
    """Stored bits per coordinate of a request, copies in 16 bits included.

    Args:
        stored_bytes: of one token.
        num_coordinates: of one token's keys and values.
        num_copies: tokens of a request that are also kept in 16 bits, at most.
        context: tokens of the request.
    """
    copied = min(num_copies, context) / context
    return 8 * stored_bytes / num_coordinates + 8 * DENSE_BYTES["bf16"] * copied


def _check_skipped(shape: ModelShape, given: Settings) -> None:
    num_layers = len(shape.windows)
    known = {"sliding_window", *map(str, range(num_layers))}
    unknown = ", ".join(name for name in given.skip_layers if name not in known)
    if unknown:
        raise ValueError(
            "plan: --kv-cache-dtype-skip-layers must be layer numbers below "
            f"{num_layers} or sliding_window, got {unknown}; name layers of this model"
        )


def _check_settings(given: Settings, multiple: int | None = None) -> None:
    """Refuses numbers that no model can have; blocks are `multiple` tokens or the device's."""
    multiple = multiple or BLOCK_MULTIPLE.get(given.device, 1)
    for is_met, flag, must, got in (
        (given.device in BLOCK_MULTIPLE, "device", " or ".join(BLOCK_MULTIPLE), given.device),
        (given.block_size > 0 and given.block_size % multiple == 0, "block-size",
         f"a positive multiple of {multiple}", given.block_size),
        (given.tensor_parallel_size > 0, "tensor-parallel-size", "at least 1",
         given.tensor_parallel_size),
        (given.num_seqs > 0, "max-num-seqs", "at least 1", given.num_seqs),
        (given.batched_tokens > 0, "max-num-batched-tokens", "at least 1",
         given.batched_tokens),
    ):  # fmt: skip
        if not is_met:
            raise ValueError(f"plan: --{flag} must be {must}, got {got}; leave it out")


def _check_layer_presets(shape: ModelShape, given: Settings, sizes: dict[str, int]) -> None:
    """Refuses what the engine refuses.

    Raises:
        ValueError: naming the layers or the preset.
    """
    num_layers, layer_presets = len(shape.windows), given.layer_presets
    beyond = [str(number) for number, _ in layer_presets if number >= num_layers]
    if beyond:
        raise ValueError(f"plan: --layers must be below {num_layers}, got {', '.join(beyond)}")
    both = [str(number) for number, _ in layer_presets if str(number) in given.skip_layers]
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


def _is_skipped(index: int, window: int, given: Settings) -> bool:
    skipped = given.skip_layers
    return str(index) in skipped or (window > 0 and "sliding_window" in skipped)


def layer_specs(shape: ModelShape, name: str, given: Settings) -> list[LayerSpec]:
    """The spec of every layer that has a cache of its own.

    Args:
        name: the cache dtype of layers that are not skipped, which have 16 bits, and have no
            preset of their own.
    """
    own = dict(given.layer_presets) if name in PRESETS else {}
    layers = []
    for index, window in enumerate(shape.windows):
        num_heads, head_dim = shape.layer_heads(index)
        num_heads = max(1, num_heads // given.tensor_parallel_size)
        cache = "bf16" if _is_skipped(index, window, given) else own.get(index, name)
        head_bytes = token_bytes(head_dim)[cache]
        num_coordinates = 2 * num_heads * head_dim
        layers.append(
            LayerSpec(window, num_heads * head_bytes, given.block_size, None, num_coordinates)
        )
    return layers


def fit_layers(layers: list[LayerSpec]) -> list[LayerSpec]:
    """The layers with pages of two sizes made one size, as our backend asks of vLLM."""
    return list(fitted(dict(enumerate(layers))).values())


def group_layers(layers: list[LayerSpec]) -> list[list[LayerSpec]]:
    """The layers that share a block table; every group draws blocks from one pool."""
    if len({(layer.sliding_window, layer.block_size) for layer in layers}) == 1:
        return [layers]

    page_bytes = max(layer.page_size_bytes for layer in layers)
    kinds: defaultdict[LayerSpec, list[LayerSpec]] = defaultdict(list)
    for layer in layers:
        ratio, rest = divmod(page_bytes, layer.page_size_bytes)
        block_size = layer.block_size * (1 if rest else ratio)
        unified = replace(layer, block_size=block_size, page_size_padded=page_bytes)
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
    if not first.sliding_window:
        return -(-context // first.block_size)
    # The window need not start at a block's edge, hence one more.
    held = min(first.sliding_window - 1 + batched_tokens, context)
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
    if shape.num_states:
        sliding += f", beside {shape.num_states} that keep a state"
    others = " and ".join(map(str, shape.head_dims))
    lines = [
        f"{shape.name}: {len(shape.windows)} layers{sliding}, "
        f"{shape.num_kv_heads} KV heads of {others}",
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
