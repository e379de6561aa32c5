# SPDX-License-Identifier: Apache-2.0
"""Lets a loaded model read a text through its attention layers, and keeps statistics of its keys.

While it reads (`reading`), our layers attend to keys and values as the model computed them and add
them to their statistics. With tensor parallelism every rank measures the heads it has, with
pipeline parallelism the layers it has; all ranks then hold all of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_tp_group, get_world_group

from vllm_fibquant import ops
from vllm_fibquant.engine import compat
from vllm_fibquant.engine.reading import attend_dense, attending, read, tokenizer_of
from vllm_fibquant.files import PACKAGE_DIR
from vllm_fibquant.keys.calibration import (
    KeyStatistics,
    StatisticsCollector,
    join_heads,
)
from vllm_fibquant.keys.key_map import Turns
from vllm_fibquant.ops import Batch, Fresh, Pages
from vllm_fibquant.options import DEFAULT_FIRST

if TYPE_CHECKING:
    from vllm_fibquant.engine.attention import FibQuantImpl

TEXTS = tuple(PACKAGE_DIR / "data" / name for name in ("calibration.txt", "calibration_code.txt"))
"""Prose and code, read in turn: statistics of prose alone cost code a third of its fidelity."""
NUM_SEQUENCES = 4
SEQUENCE_LEN = 1024
MIN_TOKENS = 256
"""Tokens that a tokenizer must make of the text for its statistics to mean anything."""
MAX_SECONDS = 60.0
"""Of a core's time: no text is begun that would end later, as far as the ones before tell; one is
always read. What is not read may cost fidelity at every later start, so time in which other
processes had the core hardly counts."""
MOST_BUSY = 3
"""How many times as long it may take on a busy machine."""
NUM_STARTS = 64
"""Places of the text that a request could begin at: what first tokens have in common."""
HORIZON = 8192
"""Positions that texts are taken to stand at: what hardly turns in one may in a longer one."""
BLOCK_SIZE = 16
RANKS_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Texts:
    """What a model reads: token ids of sequences of one length, and of beginnings."""

    sequences: list[list[int]]
    starts: list[list[int]]


class _Clock:
    """Seconds of a core since it was made: this thread's, which computes or waits for a GPU."""

    def __init__(self) -> None:
        self._began = time.thread_time(), time.perf_counter()

    def seconds(self) -> float:
        own, passed = self._began
        return max(time.thread_time() - own, (time.perf_counter() - passed) / MOST_BUSY)


def measure(
    model: torch.nn.Module,
    model_config: ModelConfig,
    vllm_config: VllmConfig,
    layers: dict[str, FibQuantImpl],
    turns_of: Callable[[FibQuantImpl, int], Turns | None],
) -> tuple[int, dict[str, KeyStatistics]]:
    """Lets the model read the text.

    Args:
        model: a language model whose attention layers are all known to vLLM's configuration.
        layers: our layers in it, of this process, by name; one that reads another's pages adds
            its queries to the statistics of that layer, whose keys it reads.
        turns_of: how far a layer's rotary embedding turns keys over so many positions.

    Returns:
        How many tokens were measured, and the statistics of all ranks' layers.

    Raises:
        ValueError: the model has no tokenizer, or one that makes nothing of the text.
    """
    from tqdm import tqdm

    world = get_world_group()
    texts = _texts_of_first_rank(model_config)
    passes = [texts.starts, *([tokens] for tokens in texts.sequences)]
    clock, num_read = _Clock(), 0
    num_positions = min(_known_positions(model_config), HORIZON)
    collectors = {
        name: LayerCollector(impl, turns_of(impl, num_positions))
        for name, impl in layers.items()
        if impl.owner is None
    }
    of_impl = {layers[name]: collector for name, collector in collectors.items()}
    stand_ins = {impl: of_impl[impl.owner or impl] for impl in layers.values()}
    num_seqs, device = 1, next(model.parameters()).device
    with (
        attending(model, vllm_config, stand_ins, lambda: num_seqs),
        torch.inference_mode(),
        tqdm(
            total=sum(len(batch) * len(batch[0]) for batch in passes),
            desc="FibQuant measures keys",
            unit="token",
            disable=True if world.rank_in_group else None,  # None: shown on a terminal
        ) as progress,
    ):
        for number, batch in enumerate(passes):
            num_seqs = len(batch)
            for collector in collectors.values():
                collector.num_seqs = num_seqs
            read(model, vllm_config, model_config, torch.tensor(batch, device=device))
            progress.update(len(batch) * len(batch[0]))
            num_read = number
            spent = clock.seconds()
            each = spent / max(number, 1)
            # All ranks stop together, by the clock of one.
            if world.broadcast_object(number > 0 and spent + each > MAX_SECONDS, src=0):
                break
    num_tokens = sum(len(tokens) - DEFAULT_FIRST for tokens in texts.sequences[:num_read])
    return num_tokens, _of_all_ranks(collectors, model_config)


def model_fingerprint(model: torch.nn.Module, model_config: ModelConfig) -> str:
    """A short digest of what decides a model's keys: its shape and the weights of its norms.

    Norm weights are few, and training moves them. They are compared in bfloat16, so that --dtype
    does not matter, and those of all pipeline stages, so that their number does not.
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
    own = {
        name: hashlib.sha256(
            weight.detach().to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes()
        ).hexdigest()
        for name, weight in model.named_parameters()
        if weight.dim() == 1 and re.search(r"norm|ln_", name)
    }
    norms: dict[str, str] = {}
    for ranks in reversed(compat.gather_from_ranks(own, RANKS_TIMEOUT_S)):
        norms |= ranks
    content = json.dumps([shape, sorted(norms.items())], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def text_sequences(model_config: ModelConfig) -> Texts:
    """What the model reads, every sequence beginning as its tokenizer begins a text.

    Raises:
        ValueError: the tokenizer cannot be loaded, or makes nothing of the text.
    """
    try:
        tokenizer = tokenizer_of(model_config)
        prose, code = (
            tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False)
            for path in TEXTS
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            "calibrate: the model must have a tokenizer to be measured on text, got "
            f"{error}; give a file as calibration"
        ) from error
    unknown = getattr(tokenizer, "unk_token_id", None)
    num_known = sum(token != unknown for token in prose)
    if num_known < max(MIN_TOKENS, len(prose) // 2):
        raise ValueError(
            f"calibrate: the model's tokenizer must make at least {MIN_TOKENS} tokens of English "
            f"text, most of them known, got {len(prose)}, {num_known} known; give a file as "
            "calibration, measured with another tokenizer"
        )
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    length = min(SEQUENCE_LEN, _known_positions(model_config), len(prose)) - len(first)
    parts = [
        [first + tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
        for tokens in (prose, code)
    ]
    in_turn = [part for pair in zip(*parts, strict=False) for part in pair]
    rest = parts[0][len(in_turn) // 2 :]  # where there is less code, prose alone
    begins = range(0, len(prose) - DEFAULT_FIRST, max(1, len(prose) // NUM_STARTS))
    after = DEFAULT_FIRST - len(first)
    starts = [first + prose[i : i + after] for i in begins[:NUM_STARTS]]
    return Texts((in_turn + rest)[:NUM_SEQUENCES], starts)


def _texts_of_first_rank(model_config: ModelConfig) -> Texts:
    """All ranks read what the first rank's tokenizer makes, or raise what it raises."""
    world = get_world_group()
    texts: Texts | ValueError | None = None
    if world.rank_in_group == 0:
        try:
            texts = text_sequences(model_config)
        except ValueError as error:
            texts = ValueError(str(error))
    texts = world.broadcast_object(texts, src=0)
    if not isinstance(texts, Texts):
        raise texts or ValueError("calibrate: the first rank must send a text, got none")
    return texts


def _known_positions(model_config: ModelConfig) -> int:
    """Not --max-model-len: another one must not give another calibration."""
    return getattr(model_config.hf_text_config, "max_position_embeddings", SEQUENCE_LEN)


def _of_all_ranks(
    collectors: dict[str, LayerCollector], model_config: ModelConfig
) -> dict[str, KeyStatistics]:
    """The statistics of every layer, of all its heads."""
    parts = {name: collector.statistics.result() for name, collector in collectors.items()}
    num_parts = get_tp_group().world_size
    replicas = kv_replicas(model_config)
    joined: dict[str, list[KeyStatistics]] = {}
    for rank in compat.gather_from_ranks(parts, RANKS_TIMEOUT_S):
        for name, statistics in rank.items():
            joined.setdefault(name, []).append(statistics)
    # Data-parallel ranks of one world have measured the same heads.
    return {name: join_heads(ranks[:num_parts], replicas) for name, ranks in joined.items()}


def kv_replicas(model_config: ModelConfig) -> int:
    """How many tensor-parallel ranks hold the same KV head."""
    return max(1, get_tp_group().world_size // model_config.get_total_num_kv_heads())


class LayerCollector:
    """Attention of one layer over `num_seqs` sequences of one length, whose tokens follow each
    other, as the model computed it; remembers what it saw."""

    num_seqs = 1

    def __init__(self, impl: FibQuantImpl, turns: Turns | None) -> None:
        self._impl, self._turns = impl, turns
        self._num_read = 0
        self.statistics = StatisticsCollector(
            impl.num_kv_heads, impl.head_size, turns, DEFAULT_FIRST
        )
        self._pages: Pages | None = None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Attends query to key and value [num_tokens, heads, head_dim], causally, into output."""
        length = len(query) // self.num_seqs
        lens = torch.full((self.num_seqs,), length, dtype=torch.int32)
        bounds = torch.arange(self.num_seqs + 1, dtype=torch.int32) * length
        rest = slice(DEFAULT_FIRST, None)
        on_host = (x.cpu().split(length) for x in (query, key, value))
        for q, k, v in zip(*on_host, strict=True):
            self.statistics.add_start(k[:DEFAULT_FIRST], v[:DEFAULT_FIRST])
            if length > DEFAULT_FIRST:
                self._add(q[rest].float(), k[rest].float(), torch.arange(length)[rest])
        if not query.is_cpu:  # raw attention of few tokens needs no kernel
            how = self._impl.attend
            of = how.scale, how.window, how.soft_cap, how.sinks, how.chunk
            return output.copy_(attend_dense(query, key, value, length, *of))
        if self._pages is None:
            shape = (1, self._impl.num_kv_heads, BLOCK_SIZE, self._impl.codec.layout.record_bytes)
            cache = torch.zeros(shape, dtype=torch.uint8)
            self._pages = ops.pages_of(cache, self._impl.codec)
        table = torch.zeros(self.num_seqs, length // BLOCK_SIZE + 1, dtype=torch.int32)
        batch, attend = Batch(bounds, lens, table), replace(self._impl.attend, keep_first=0)
        ops.paged_attention(query, output, self._pages, batch, attend, Fresh(key, value))
        return output

    def _add(self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor) -> None:
        """Adds tokens, as where they stand so where else they could."""
        for distance in distances(self._num_read) if self._turns is not None else (0,):
            q, k = query, key
            if self._turns is not None and distance:
                q, k = self._turns.shift(query, distance), self._turns.shift(key, distance)
            self.statistics.add(q, k, positions + distance)
        self._num_read += 1


def distances(number: int) -> tuple[int, ...]:
    """How far the text of this number is moved: not at all, a little, and within the horizon.

    A text that stands elsewhere has the same scores and other keys and queries, turned together.
    A few thousand tokens, each at several positions, tell as much of keys as many more would, and
    of positions that no text of theirs reaches.
    """
    share = (number + 0.5) * 0.6180339887 % 1.0  # evenly spread, however many there are
    return 0, int(share * SEQUENCE_LEN), int(share * (HORIZON - SEQUENCE_LEN))
