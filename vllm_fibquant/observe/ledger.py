# SPDX-License-Identifier: Apache-2.0
"""What the fidelity monitor compares with, what it finds, and what it may spend (monitor.py)."""

from __future__ import annotations

import math
import time
from collections import defaultdict, deque

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.observe.counters import Counters, age_row

LEAST, RECENT = 8, 32
"""Comparisons a layer is judged by: at least so many, and of them the newest."""

UNKNOWN, HEALTHY, DEGRADED, DAMAGED = range(4)

DAMAGED_COSINE = 0.6
"""Mean cosine below which a layer's codes damage the model, whatever their rate: models that the
fidelity gate refuses for their key biases have such a layer, and none that passes has
(docs/serving.md)."""

_FIRST_COST_S = 1e-3


def exact_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, soft_cap: float
) -> torch.Tensor:
    """Attention of a group of query heads over the tokens of one KV head, in float32.

    Args:
        query: [group_size, head_dim].
        key, value: [num_tokens, head_dim].
        scale, soft_cap: as `ops.paged_attention`.

    Returns:
        float32 [group_size, head_dim].
    """
    scores = query.float() @ key.float().T * scale
    if soft_cap > 0:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    return torch.softmax(scores, -1) @ value.float()


def floor_cosine(codec: KVCodec) -> float:
    """Mean cosine below which a layer counts as degraded.

    Chosen below what the worst layer of a small model gives, whose keys are hard to code; measured
    in docs/serving.md.
    """
    return max(0.65, 1.0 - 2.0 * 0.5**codec.layout.effective_rate)


class Ledger:
    """Time and findings of all monitors of one process.

    Args:
        budget: share of step time the monitors may take.
        counters: where both are published.
        is_loss_accepted: whether the start found a loss that it would have refused: then a layer
            below its floor is what damages the model.
    """

    def __init__(self, budget: float, counters: Counters, is_loss_accepted: bool = False) -> None:
        self.budget = budget
        self._is_loss_accepted = is_loss_accepted
        self.counters = counters
        self._step_began = time.perf_counter()
        self._spent = self._steps = 0.0
        self._cost = _FIRST_COST_S
        self._recent: defaultdict[int, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))
        self._floor: dict[int, float] = {}
        self._num_changed = 0
        counters["monitor_enabled"] = 1.0
        counters["monitor_health"] = UNKNOWN
        counters["monitor_tokens"] = 0.0

    def begin_step(self, now: float, longest: float | None = None) -> None:
        """To be called when a step is planned: the one before ended with its last attention.

        Args:
            longest: seconds, for a device of which the host does not see when a step ends: then it
                ended now, or after so long.
        """
        ended = self.counters.last_attend
        if longest is not None:
            ended = min(now, self._step_began + longest)
        self._steps += max(0.0, ended - self._step_began)
        self._step_began = now
        self.counters["monitor_step_seconds"] = self._steps

    def can_afford(self, num_comparisons: int = 1) -> bool:
        """Whether so many more comparisons keep the monitors within their budget."""
        return self._spent + num_comparisons * self._cost <= self.budget * self._steps

    def spend(self, seconds: float, is_comparison: bool = False) -> None:
        self._spent += seconds
        self.counters["monitor_seconds"] = self._spent
        if is_comparison:
            self._cost += 0.1 * (seconds - self._cost)

    def compared(self, layer: int, codec: KVCodec, age: float, cosine: float, error: float) -> None:
        """Records one comparison of a layer with tokens `age` seconds old. A cosine that is no
        number, as a GPU's of a block that is none, is as bad as can be."""
        cosine = cosine if math.isfinite(cosine) else 0.0
        counters, row = self.counters, age_row(age)
        counters.observe("cosine_by_layer", layer, max(0.0, cosine))
        counters.observe("error_by_layer", layer, error)
        counters.observe("cosine_by_age", row, max(0.0, cosine))
        counters.observe("error_by_age", row, error)
        self._recent[layer].append(cosine)
        self._floor[layer] = floor_cosine(codec)
        self._judge()

    def reread(self, is_same: bool) -> None:
        """Records one sample read again with its first query."""
        self.counters["monitor_rereads"] += 1
        if not is_same:
            self.counters["monitor_changed"] += 1
            self._num_changed += 1
            self._judge()

    def _judge(self) -> None:
        means = {n: sum(r) / len(r) for n, r in self._recent.items() if len(r) >= LEAST}
        health = HEALTHY if means else UNKNOWN
        if any(mean < self._floor[layer] for layer, mean in means.items()):
            health = DAMAGED if self._is_loss_accepted else DEGRADED
        if self._num_changed or any(mean < DAMAGED_COSINE for mean in means.values()):
            health = DAMAGED
        self.counters["monitor_health"] = health
        self.counters["monitor_worst_cosine"] = min(means.values(), default=0.0)
