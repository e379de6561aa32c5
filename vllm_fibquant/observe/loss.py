# SPDX-License-Identifier: Apache-2.0
"""What codes cost a model on one short text: how it is measured, in layers and in next tokens, and
what is said of it.

A layer's cosine is of attention outputs over codes and over keys and values as the model computed
them, for the same queries. Codes are read as decode attention reads them: in prefill mode "raw" all
but a query's newest tokens, and all but its copied ones, come from records.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch

from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.keys.key_map import KeyMap
from vllm_fibquant.ops import Attend, Batch, Copies, Fresh
from vllm_fibquant.options import Options

CHUNK = 16
"""New tokens of a step, which prefill mode "raw" reads as computed."""
BLOCK_SIZE = 16

State = Literal["passed", "warned", "refused", "accepted", "skipped", "unmeasured"]
"""Below the first threshold, between both, above the second; the same with "accept_loss"; with
"fidelity_gate": false; where nothing could be told."""

WARN_KL, REFUSE_KL = 0.1, 0.3
"""Nats. Above the first a start warns, above the second it is refused (docs/serving.md)."""

KNOWS_NOTHING = 0.25
"""Of the vocabulary's size: random weights give a perplexity of about that size or more."""

NUM_NAMED = 4
"""Worst layers that a message names."""


class Layer(Protocol):
    """What is needed of an attention layer."""

    options: Options
    codec: KVCodec
    attend: Attend
    num_kv_heads: int
    key_map: KeyMap | None


class LayerReading:
    """Attention of one layer over one text, from codes and as the model computed it.

    Args:
        layer: the layer.
        judged_from: queries from this position on count.

    Attributes:
        reads_codes: whether a call's output is of codes.
        cosines: how many, over query heads and positions, and their sum.
    """

    def __init__(self, layer: Layer, judged_from: int) -> None:
        self._layer = layer
        self._judged = slice(judged_from, None)
        self.reads_codes = False
        self.cosines = (0, 0.0)

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Attends query to key and value [num_tokens, heads, head_dim], causally, into output."""
        if self.reads_codes:
            return self.from_codes(query, key, value, output)
        self.exact(query, key, value, output)
        found = self.from_codes(query, key, value, torch.empty_like(output))
        a, b = output[self._judged].float(), found[self._judged].float()
        cosines = torch.cosine_similarity(a, b, dim=-1)
        self.cosines = cosines.numel(), float(cosines.sum())
        return output

    @property
    def _attend(self) -> Attend:
        """How the layer attends, without what it copies; one that retains few tokens reads this
        text whole: what is dropped is not measured."""
        attend = replace(self._layer.attend, copies=None)
        return replace(attend, window=0, keep_first=0) if attend.keep_first else attend

    def exact(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> None:
        """Attends to keys and values as they are."""
        num_blocks = -(-len(query) // BLOCK_SIZE)
        ends = torch.tensor([0, len(query)], dtype=torch.int32, device=query.device)
        blocks = torch.zeros(1, num_blocks, dtype=torch.int32, device=query.device)
        pages = ops.pages_of(self._new_cache(1, query.device), self._layer.codec)
        batch = Batch(ends, ends[1:], blocks)
        ops.paged_attention(query, output, pages, batch, self._attend, Fresh(key, value))

    def from_codes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Writes records of all tokens and attends to them, as this layer will serve."""
        layer, device, num_tokens = self._layer, query.device, len(query)
        cache = self._new_cache(-(-num_tokens // BLOCK_SIZE), device)
        pages = ops.pages_of(cache, layer.codec, layer.key_map)
        positions = torch.arange(num_tokens, device=device)
        ops.encode_kv(key, value, positions, pages, positions)
        is_raw = layer.options.prefill == "raw"
        # Every step of the text is a request of its own over the same blocks.
        step = CHUNK if is_raw else num_tokens
        ends = torch.tensor(
            [*range(0, num_tokens, step), num_tokens], dtype=torch.int32, device=device
        )
        blocks = torch.arange(len(cache), dtype=torch.int32, device=device)
        table, attend = None, self._attend
        if layer.options.recent_window:
            table, copies = self._copies(key, value, ends)
            attend = replace(attend, copies=copies)
        batch = Batch(ends, ends[1:].clone(), blocks.repeat(len(ends) - 1, 1), table)
        fresh = Fresh(key, value) if is_raw else None
        ops.paged_attention(query, output, pages, batch, attend, fresh)
        return output

    def _copies(
        self, key: torch.Tensor, value: torch.Tensor, ends: torch.Tensor
    ) -> tuple[torch.Tensor, Copies]:
        """Copies of the first and the newest tokens before each step, and their table; their rows
        are positions."""
        options = self._layer.options
        num_first = options.num_copied_first
        context = ends[:-1, None]
        first = torch.arange(num_first, device=key.device).expand(len(context), num_first)
        newest = torch.arange(-options.recent_window, 0, device=key.device)
        recent = context + newest
        rows = torch.cat((first, torch.where(recent >= num_first, recent, -1)), 1)
        rows = torch.where(rows < context, rows, -1).to(torch.int32).contiguous()
        dtype = torch.bfloat16 if key.dtype == torch.float32 else key.dtype
        key, value = (x.to(dtype).contiguous() for x in (key, value))
        return rows, Copies(key, value, num_first)

    def _new_cache(self, num_blocks: int, device: torch.device) -> torch.Tensor:
        layer = self._layer
        shape = (num_blocks, layer.num_kv_heads, BLOCK_SIZE, layer.codec.layout.record_bytes)
        # 0xFF bytes are NaN norms: reading a slot nobody wrote would show.
        return torch.full(shape, 0xFF, dtype=torch.uint8, device=device)


@dataclass
class NextTokens:
    """Sums over positions of what two passes say of the next token.

    Attributes:
        num_tokens: positions.
        kl_sum: of KL(exact || codes), in nats.
        exact_nll, nll: negative log-probabilities of the text's next tokens.
        vocab_size: entries of each distribution.
    """

    num_tokens: int = 0
    vocab_size: int = 0
    kl_sum: float = 0.0
    exact_nll: float = 0.0
    nll: float = 0.0

    def add(self, exact: torch.Tensor, found: torch.Tensor, targets: torch.Tensor) -> None:
        """Adds positions: logits [n, vocab_size] of both passes, and the n tokens that follow."""
        p, q = (x.float().log_softmax(-1) for x in (exact, found))
        # A vocabulary's padding has logits of -inf in both.
        terms = torch.where(p > -torch.inf, p.exp() * (p - q), 0.0)
        at = targets.view(-1, 1)
        self.num_tokens += len(targets)
        self.vocab_size = exact.shape[-1]
        self.kl_sum += float(terms.double().sum())
        self.exact_nll -= float(p.gather(1, at).double().sum())
        self.nll -= float(q.gather(1, at).double().sum())


@dataclass(frozen=True)
class RankLoss:
    """What one rank measured: `LayerReading.cosines` of its layers by number, and next tokens where
    it has the model's head."""

    layers: dict[int, tuple[int, float]]
    next_tokens: NextTokens | None


@dataclass(frozen=True)
class Loss:
    """What codes cost a model on one text.

    Attributes:
        layers: mean cosine of attention outputs, by number.
        num_tokens: positions whose next token was compared, 0 where no rank could.
        kl: mean KL(exact || codes) of next-token distributions, in nats; not finite where codes
            make the model overflow.
        perplexity: of the model with exact attention on those tokens.
        increase: of perplexity by codes, a share.
        knows_nothing: whether the model with exact attention predicts no more of the text than one
            with random weights, whose distributions mean nothing, changed or not.
    """

    layers: dict[int, float]
    num_tokens: int
    kl: float
    perplexity: float
    increase: float
    knows_nothing: bool = False

    @classmethod
    def of_ranks(cls, ranks: Iterable[RankLoss]) -> Loss:
        """What all ranks of an engine measured together."""
        sums: dict[int, tuple[int, float]] = {}
        words: list[NextTokens] = []
        for rank in ranks:
            for number, (num, cosines) in rank.layers.items():
                others = sums.get(number, (0, 0.0))
                sums[number] = others[0] + num, others[1] + cosines
            words += [rank.next_tokens] if rank.next_tokens else []
        layers = {n: cosines / max(num, 1) for n, (num, cosines) in sorted(sums.items())}
        # Ranks of one stage have the same logits; should they differ, the worst counts.
        worst = NextTokens()
        for found in words:
            if not worst.num_tokens or not found.kl_sum <= worst.kl_sum:
                worst = found
        n = max(worst.num_tokens, 1)
        perplexity = _exp(worst.exact_nll / n)
        increase = _exp((worst.nll - worst.exact_nll) / n) - 1
        knows_nothing = perplexity > KNOWS_NOTHING * max(worst.vocab_size, 1)
        return cls(layers, worst.num_tokens, worst.kl_sum / n, perplexity, increase, knows_nothing)

    @property
    def reason(self) -> str:
        """Why next tokens cannot be judged; empty where they can."""
        if not self.num_tokens:
            return "no rank has the model's next-token logits"
        if self.knows_nothing:
            return (
                f"the model predicts nothing of an English text (perplexity {self.perplexity:.3g})"
            )
        return ""

    @property
    def worst(self) -> list[int]:
        """Numbers of all layers, that with the lowest cosine first."""
        return sorted(self.layers, key=self.layers.__getitem__)

    @property
    def state(self) -> State:
        """What a start makes of it: "passed", "warned", "refused" or "unmeasured"."""
        if self.reason:
            return "unmeasured"
        if not self.kl <= REFUSE_KL:  # nor a NaN
            return "refused"
        return "warned" if self.kl > WARN_KL else "passed"

    def __str__(self) -> str:
        parts = []
        if self.num_tokens:
            parts = [f"expected KL {self.kl:.2g} nats, perplexity {self.increase:+.1%}"]
        if self.layers:
            number = self.worst[0]
            parts += [f"worst layer {number} with cosine {self.layers[number]:.4f}"]
        return ", ".join(parts)


@dataclass(frozen=True)
class Outcome:
    """What a start says of the loss of its codes.

    Attributes:
        state: as STATES.
        loss: None where nothing was measured.
        reason: why nothing or not all was.
        seconds: it took.
    """

    state: State
    loss: Loss | None = None
    reason: str = ""
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """In types that JSON has; figures are None where there are none or they are not finite."""
        loss = self.loss or Loss({}, 0, math.nan, math.nan, math.nan)
        figures = (loss.kl, loss.perplexity, loss.increase) if loss.num_tokens else 3 * (math.nan,)
        kl, perplexity, increase = map(_finite, figures)
        cosines = {number: _finite(cosine) for number, cosine in loss.layers.items()}
        worst = loss.worst[0] if loss.layers else None
        return {
            "state": self.state,
            "reason": self.reason,
            "seconds": round(self.seconds, 2),
            "warn_kl": WARN_KL,
            "refuse_kl": REFUSE_KL,
            "num_tokens": loss.num_tokens,
            "kl": kl,
            "perplexity": perplexity,
            "perplexity_increase": increase,
            "worst_layer": worst,
            "worst_layer_cosine": None if worst is None else cosines[worst],
            "layer_cosines": {str(number): cosine for number, cosine in cosines.items()},
        }


def refusal_of(loss: Loss, options: Options) -> str:
    """Why codes that lose so much are not served, and what to do."""
    named = ", ".join(
        f"{number} (cosine {loss.layers[number]:.3f})" for number in loss.worst[:NUM_NAMED]
    )
    numbers = ",".join(map(str, sorted(loss.worst[:NUM_NAMED])))
    remedies = []
    if options.calibrate == "none":
        remedies.append('have the model\'s keys measured ("calibrate": "auto")')
    if options.prefill == "codes":
        remedies.append('give "mode": "quality"')
    remedies += [
        "take a preset with more bits",
        f'give the worst layers one ("layers": {{"{numbers}": "fibquant_k5v3"}})',
        'or serve it all the same with "accept_loss": true',
    ]
    return (
        f"fidelity: expected KL must be at most {REFUSE_KL} nats per token, got {loss.kl:.3g} "
        f"(perplexity {loss.increase:+.0%} on a text of {loss.num_tokens} tokens); worst layers: "
        f"{named}; {', '.join(remedies)}"
    )


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None


def _exp(number: float) -> float:
    return math.exp(number) if number < 700 else math.inf
