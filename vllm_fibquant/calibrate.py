# SPDX-License-Identifier: Apache-2.0
"""Measures a model's keys once it is loaded, and gives every layer the map of its keys.

The model reads a text that ships with the package, through our own layers: while one measures, it
attends to keys and values as the model computed them, and adds them to its statistics. The result
is a file (`calibration`), found again by a fingerprint of the model; every later start reads it.

With tensor parallelism every rank measures the heads it has; all ranks then hold the same file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_tp_group
from vllm.forward_context import set_forward_context
from vllm.logger import init_logger
from vllm.tokenizers import cached_get_tokenizer

from vllm_fibquant import files, ops, rotary
from vllm_fibquant.calibration import (
    KeyStatistics,
    StatisticsCollector,
    cache_name,
    check_calibration,
    join_heads,
    pack_calibration,
    parse_calibration,
)
from vllm_fibquant.key_map import Turns
from vllm_fibquant.options import DEFAULT_FIRST

if TYPE_CHECKING:
    from vllm_fibquant.attention import FibQuantImpl

logger = init_logger(f"vllm.{__name__}")

TEXT = Path(__file__).parent / "data" / "calibration.txt"
NUM_SEQUENCES = 8
SEQUENCE_LEN = 1024
NUM_STARTS = 64
"""Places of the text that a request could begin at: what first tokens have in common."""
HORIZON = 8192
"""Positions over which a mean is judged to turn: what hardly turns in a text may in a long one."""
BLOCK_SIZE = 16


def calibrate_layers(
    model: torch.nn.Module, vllm_config: VllmConfig, layers: dict[str, FibQuantImpl]
) -> None:
    """Gives layers that ask for it the map of their keys; measures the model if need be.

    Args:
        model: the model, loaded.
        layers: our layers of this process, by name.

    Raises:
        ValueError: a calibration file is damaged or of another model, or the model cannot be
            measured.
    """
    options = next((impl.options for impl in layers.values()), None)
    if options is None or options.calibrate == "none":
        return
    group = get_tp_group()
    fingerprint = group.broadcast_object(model_fingerprint(model, vllm_config.model_config), src=0)
    path = Path(options.calibration) if options.calibration else files.find(cache_name(fingerprint))
    replicas = max(1, group.world_size // vllm_config.model_config.get_total_num_kv_heads())
    # Rank 0 alone looks at the file: the others may be on other machines.
    content = None
    if group.rank_in_group == 0 and path is not None and path.is_file():
        content = path.read_bytes()
    content = group.broadcast_object(content, src=0)
    if content is None:
        if path is not None and group.rank_in_group == 0:
            _require_writable(path)
        content = _measure(model, vllm_config, layers, fingerprint, replicas)
        if group.rank_in_group == 0:
            path = _keep(path, fingerprint, content)
    source = "this start's measurement" if path is None else str(path)
    calibration = parse_calibration(content, source)
    is_transformed = options.calibrate == "transform"
    num_parts, part = group.world_size // replicas, group.rank_in_group // replicas
    shapes = [(n, (i.num_kv_heads * num_parts, i.head_size)) for n, i in layers.items()]
    check_calibration(calibration, source, fingerprint, shapes)
    num_positions = vllm_config.model_config.max_model_len
    for name, impl in layers.items():
        begin = part * impl.num_kv_heads
        impl.key_map = calibration.key_map(
            name,
            begin,
            begin + impl.num_kv_heads,
            options.first_tokens,
            impl.codec.layout.key_index_bytes if is_transformed else 0,
            _turns(impl, num_positions, vllm_config.model_config.dtype),
        )
    logger.info("FibQuant keys are coded by calibration %s of %s", calibration.digest[:8], source)


def _require_writable(path: Path) -> None:
    """Refuses, before a minute of measuring, to measure what could not be written.

    Raises:
        ValueError: a file cannot be created at the path the user gave.
    """
    if not files.is_writable(path.parent):
        raise ValueError(
            f"calibrate: calibration must be a file or a path that can be written, got {path}; "
            "leave calibration out to keep the result in the cache, or give another path"
        )


def _keep(path: Path | None, fingerprint: str, content: bytes) -> Path | None:
    """Writes what was measured: where the user said, else into the cache if there is one."""
    if path is not None:
        files.write_atomically(path, content)
    else:
        path = files.keep(cache_name(fingerprint), content)
    if path is not None:
        logger.info("FibQuant measured this model's keys and keeps the result in %s", path)
    return path


def _turns(impl: FibQuantImpl, num_positions: int, dtype: torch.dtype) -> Turns | None:
    """How far the layer's rotary embedding turns keys, or None where that cannot be told."""
    try:
        return rotary.turns_of(impl, num_positions, impl.head_size, dtype)
    except ValueError as error:
        logger.info_once("FibQuant subtracts means that do not turn: %s", str(error))
        return None


def model_fingerprint(model: torch.nn.Module, model_config: ModelConfig) -> str:
    """A short digest of what decides a model's keys: its shape and the weights of its norms.

    Norm weights are few, and any training moves them. They are compared in bfloat16, so that
    --dtype does not matter.
    """
    config = model_config.hf_text_config
    shape = {
        "architecture": model_config.architecture,
        "vocab_size": model_config.get_vocab_size(),
        "hidden_size": model_config.get_hidden_size(),
        "num_layers": model_config.get_total_num_hidden_layers(),
        "num_kv_heads": model_config.get_total_num_kv_heads(),
        "head_dim": model_config.get_head_size(),
        "rope": getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None),
    }
    digest = hashlib.sha256(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, weight in model.named_parameters():
        if weight.dim() == 1 and re.search(r"norm|ln_", name):
            digest.update(name.encode())
            digest.update(weight.detach().to(torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def text_sequences(model_config: ModelConfig) -> tuple[list[list[int]], list[list[int]]]:
    """What the model reads: token ids of sequences, beginning as its tokenizer begins a text, and
    of NUM_STARTS that end after their first tokens.

    Raises:
        ValueError: the tokenizer cannot be loaded.
    """
    try:
        tokenizer: Any = cached_get_tokenizer(
            model_config.tokenizer,
            tokenizer_mode=model_config.tokenizer_mode,
            revision=model_config.tokenizer_revision,
            trust_remote_code=model_config.trust_remote_code,
        )
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(
            "calibrate: the model must have a tokenizer to be measured on text, got "
            f"{type(error).__name__}: {error}; give a file as calibration"
        ) from error
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    tokens = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    length = min(SEQUENCE_LEN, _known_positions(model_config)) - len(first)
    starts = range(0, min(len(tokens), NUM_SEQUENCES * length), length)
    sequences = [first + tokens[start : start + length] for start in starts]
    begins = range(0, len(tokens) - DEFAULT_FIRST, max(1, len(tokens) // NUM_STARTS))
    rest = DEFAULT_FIRST - len(first)
    return sequences, [first + tokens[i : i + rest] for i in begins[:NUM_STARTS]]


def _known_positions(model_config: ModelConfig) -> int:
    """Not --max-model-len: another one must not give another calibration."""
    return getattr(model_config.hf_text_config, "max_position_embeddings", SEQUENCE_LEN)


def _measure(
    model: torch.nn.Module,
    vllm_config: VllmConfig,
    layers: dict[str, FibQuantImpl],
    fingerprint: str,
    replicas: int,
) -> bytes:
    """Lets the model read the text. Returns the content of the calibration's file."""
    if vllm_config.lora_config is not None:
        raise ValueError(
            "calibrate: the model must be measured without --enable-lora, got a start with it; "
            "run: vllm-fibquant calibrate MODEL"
        )
    from tqdm import tqdm

    group = get_tp_group()
    sequences, starts = text_sequences(vllm_config.model_config)
    quiet = True if group.rank_in_group else None  # None: shown on a terminal
    with _collecting(layers, vllm_config.model_config) as collectors, torch.inference_mode():
        passes = [starts, *([tokens] for tokens in sequences)]
        for batch in tqdm(passes, desc="FibQuant calibration", unit="text", disable=quiet):
            tokens = torch.tensor(batch)  # [num_seqs, length]
            positions = torch.arange(tokens.shape[1]).repeat(len(tokens))
            for collector in collectors.values():
                collector.num_seqs = len(tokens)
            with set_forward_context(
                None, vllm_config, num_tokens=tokens.numel(), slot_mapping={}, skip_compiled=True
            ):
                model(input_ids=tokens.flatten(), positions=positions)
    parts = {name: collector.statistics.result() for name, collector in collectors.items()}
    every: list[dict[str, KeyStatistics]] = [parts]
    if group.world_size > 1:
        every = [{}] * group.world_size
        torch.distributed.all_gather_object(every, parts, group=group.cpu_group)
    joined = {name: join_heads([rank[name] for rank in every], replicas) for name in parts}
    num_tokens = next(iter(collectors.values())).statistics.num_tokens
    return pack_calibration(fingerprint, num_tokens, joined)


@contextmanager
def _collecting(
    layers: dict[str, FibQuantImpl], model_config: ModelConfig
) -> Iterator[dict[str, LayerCollector]]:
    """Within this context layers attend without a cache and collect statistics."""
    num_positions = min(_known_positions(model_config), HORIZON)
    collectors = {
        name: LayerCollector(impl, _turns(impl, num_positions, model_config.dtype))
        for name, impl in layers.items()
    }
    for name, impl in layers.items():
        impl.without_cache = collectors[name]
    try:
        yield collectors
    finally:
        for impl in layers.values():
            impl.without_cache = None


class LayerCollector:
    """Attention of one layer over `num_seqs` sequences of one length, whose tokens follow each
    other, as the model computed it; remembers what it saw."""

    num_seqs = 1

    def __init__(self, impl: FibQuantImpl, turns: Turns | None) -> None:
        self._impl = impl
        self.statistics = StatisticsCollector(
            impl.num_kv_heads, impl.head_size, turns, DEFAULT_FIRST
        )
        shape = (1, impl.num_kv_heads, BLOCK_SIZE, impl.codec.layout.record_bytes)
        self._no_cache = torch.zeros(shape, dtype=torch.uint8)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Attends query to key and value [num_tokens, heads, head_dim], causally, into output."""
        length = len(query) // self.num_seqs
        lens = torch.full((self.num_seqs,), length, dtype=torch.int32)
        bounds = torch.arange(self.num_seqs + 1, dtype=torch.int32) * length
        rest = slice(DEFAULT_FIRST, None)
        for q, k, v in zip(*(x.split(length) for x in (query, key, value)), strict=True):
            self.statistics.add_start(k[:DEFAULT_FIRST], v[:DEFAULT_FIRST])
            if length > DEFAULT_FIRST:
                self.statistics.add(q[rest], k[rest], torch.arange(length)[rest])
        ops.paged_attention(
            query,
            self._no_cache,
            self._impl.codec,
            bounds,
            lens,
            torch.zeros(self.num_seqs, length // BLOCK_SIZE + 1, dtype=torch.int32),
            output,
            scale=self._impl.scale,
            window=self._impl.window,
            soft_cap=self._impl.soft_cap,
            sinks=self._impl.sinks,
            raw_key=key,
            raw_value=value,
        )
        return output
