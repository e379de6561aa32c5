# SPDX-License-Identifier: Apache-2.0
"""The fidelity gate: what codes cost this model, measured once it is loaded and before it serves.

A self-check compares kernels with an oracle. It cannot see that a model's keys do not suit a code:
its kernels are right, and its text is wrong. So the model reads a short text twice through our own
layers. In the first pass every layer attends to keys and values as the model computed them, and
beside it to their codes, in the mode and preset to be served (`loss`). In the second pass layers
attend to codes alone. What the two passes say of the next token tells what codes cost.

Every rank measures its layers and all ranks know all results, so that all refuse or none does.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.logger import init_logger

from vllm_fibquant.engine import last_fidelity, reading, support
from vllm_fibquant.engine.ranks import NO_FILE
from vllm_fibquant.files import PACKAGE_DIR
from vllm_fibquant.observe.loss import LayerReading, Loss, NextTokens, Outcome, RankLoss, refusal_of
from vllm_fibquant.options import Options

if TYPE_CHECKING:
    from vllm_fibquant.engine.attention import FibQuantImpl

logger = init_logger(f"vllm.{__name__}")

TEXT = PACKAGE_DIR / "data" / "gate.txt"
NUM_TOKENS = 384
MIN_TOKENS = 64
MIN_DISTINCT = 16
"""A tokenizer that makes fewer different tokens of the text has understood nothing of it."""
LOGITS_ROWS = 32
"""Positions whose logits are held at once: vocabularies are large."""


def check_fidelity(
    model: torch.nn.Module,
    vllm_config: VllmConfig,
    layers: dict[str, FibQuantImpl],
    options: Options,
    gather: Callable[[Any], list[Any]],
) -> None:
    """Measures what codes cost and remembers it (`outcome_of`); a collective call.

    Args:
        model: the model, loaded.
        layers: our layers of this process by name, with the maps of their keys.
        options: of the run.
        gather: gives a value of every rank of the engine, in order of rank; a collective call.

    Raises:
        ValueError: codes cost more than is served without "accept_loss".
    """
    global _latest
    began = time.monotonic()
    if not options.fidelity_gate:
        _latest = vllm_config, Outcome("skipped", reason='"fidelity_gate" is false')
        return
    # A rank that cannot take part stops all: passes of the model are collective calls, too.
    texts = gather(_or_reason(lambda: text_tokens(vllm_config.model_config)))
    ranks = texts
    if not _reasons(texts):
        # Every rank's layers read what rank 0 reads: the others may have other files.
        text = texts[0]
        ranks = gather(
            _or_reason(lambda: _measure(model, vllm_config, layers, text, len(text) // 2))
        )
    seconds = time.monotonic() - began
    if reasons := _reasons(ranks):
        _latest = vllm_config, Outcome("unmeasured", reason=reasons[0], seconds=seconds)
        logger.warning("FibQuant cannot tell what codes cost this model: %s", reasons[0])
        return
    loss = Loss.of_ranks(ranks)
    state = loss.state
    if torch.distributed.get_rank() == 0:
        digests = {impl.calibration for impl in layers.values()} - set(NO_FILE)
        last_fidelity.keep(vllm_config, Outcome(state, loss), digests)
    if state == "refused":
        if not options.accept_loss:
            cache_dtype = vllm_config.cache_config.cache_dtype
            raise ValueError(support.refusal(cache_dtype, [refusal_of(loss, options)]))
        state = "accepted"
    _latest = vllm_config, Outcome(state, loss, loss.reason, seconds)
    say = logger.info if state in ("passed", "unmeasured") else logger.warning
    say(
        "FibQuant fidelity on %d tokens: %s; %s in %.1f s",
        loss.num_tokens,
        loss,
        {"warned": "much: calibrate, or take a preset with more bits"}.get(
            state, loss.reason or state
        ),
        seconds,
    )


def leave_unmeasured(vllm_config: VllmConfig, reason: str) -> None:
    """Remembers why this start does not measure."""
    global _latest
    _latest = vllm_config, Outcome("unmeasured", reason=reason)


def outcome_of(vllm_config: VllmConfig) -> Outcome:
    """What this process's start of an engine found."""
    if _latest is None or _latest[0] is not vllm_config:
        return Outcome("unmeasured", reason="this process has not measured")
    return _latest[1]


_latest: tuple[VllmConfig, Outcome] | None = None


class _Unmeasured(Exception):
    """Why a model cannot be measured, in words for its user."""


def _or_reason(ask: Callable[[], Any]) -> Any:
    """What `ask` returns, or why it cannot: such a model can still be served."""
    try:
        return ask()
    except _Unmeasured as error:
        return str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def _reasons(ranks: list[Any]) -> list[str]:
    return [rank for rank in ranks if isinstance(rank, str)]


def text_tokens(model_config: ModelConfig) -> list[int]:
    """What the model reads: token ids, beginning as its tokenizer begins a text.

    Raises:
        _Unmeasured: there is no tokenizer, or it makes nothing of the text.
    """
    if model_config.is_hybrid:
        raise _Unmeasured("some of its layers keep a state, which needs a cache to be read with")
    try:
        tokenizer = reading.tokenizer_of(model_config)
    except ValueError as error:
        raise _Unmeasured(f"its tokenizer cannot be loaded: {error}") from error
    first = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    text = tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False)
    if len(set(text)) < MIN_DISTINCT or len(text) < MIN_TOKENS:
        raise _Unmeasured(
            f"its tokenizer makes {len(text)} tokens, {len(set(text))} different ones, of an "
            f"English text of {len(TEXT.read_text(encoding='utf-8').split())} words"
        )
    tokens = (first + text)[: min(NUM_TOKENS, model_config.max_model_len)]
    if len(tokens) < MIN_TOKENS:
        raise _Unmeasured(f"--max-model-len leaves {len(tokens)} of {MIN_TOKENS} tokens to read")
    return tokens


def _measure(
    model: torch.nn.Module,
    vllm_config: VllmConfig,
    layers: dict[str, FibQuantImpl],
    text: list[int],
    judged_from: int,
) -> RankLoss:
    """Reads the text twice; positions from `judged_from` on count. Raises what the model raises."""
    tokens = torch.tensor(text, device=next(model.parameters()).device)
    readings = {name: LayerReading(impl, judged_from) for name, impl in layers.items()}
    stand_ins = {impl: readings[name] for name, impl in layers.items()}
    reader = reading.language_model(model)
    asked = reader, vllm_config, vllm_config.model_config, tokens[None]
    with reading.attending(model, vllm_config, stand_ins), torch.inference_mode():
        exact = reading.read(*asked)
        for of_layer in readings.values():
            of_layer.reads_codes = True
        found = reading.read(*asked)
        next_tokens = None
        if exact is not None and found is not None:
            next_tokens = compare(model, exact, found, tokens, NextTokens(), judged_from)
            if next_tokens is not None and not abs(next_tokens.exact_nll) < float("inf"):
                raise _Unmeasured(
                    "its own logits are not finite on a short text; try another --dtype"
                )
    sums = {}
    for name, of_layer in readings.items():
        if of_layer.cosines[0]:  # a draft model's layers have not been read
            sums[number_of(name)] = of_layer.cosines
    return RankLoss(sums, next_tokens)


def compare(
    model: Any, exact: torch.Tensor, found: torch.Tensor, tokens: torch.Tensor,
    result: NextTokens, begin: int = 0,
) -> NextTokens | None:  # fmt: skip
    """Adds what both passes' last hidden states say of the tokens that follow, from `begin` on."""
    for start in range(begin, len(tokens) - 1, LOGITS_ROWS):
        rows = slice(start, min(start + LOGITS_ROWS, len(tokens) - 1))
        both = [model.compute_logits(states[rows]) for states in (exact, found)]
        if both[0] is None or both[1] is None:
            return None  # another rank of this stage has them
        result.add(both[0], both[1], tokens[rows.start + 1 : rows.stop + 1])
    return result


def number_of(name: str) -> int:
    """A layer's number in its model, by its name."""
    numbers = re.findall(r"\d+", name)
    return int(numbers[0]) if numbers else 0
