# SPDX-License-Identifier: Apache-2.0
"""Attention as it is served beside exact attention over the same keys and values.

What a layer of the engine returns for a query is compared with softmax(q K^T s) V over the keys and
values that the model gave to the cache: windows, first tokens, codes and maps of keys all count, as
they do for a user. Layers with learnt sinks, whose softmax is another one, are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch

EVERY = 16
"""One query in so many is compared: the last of a step of mode quality, which reads most codes."""


def attention_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """A vLLM model's attention layers with a cache of keys and values, by name."""
    from vllm.model_executor.layers.attention import Attention

    for name, module in model.named_modules():
        if isinstance(module, Attention):
            yield name, module


class AttentionWatch:
    """Cosines of one text's attention outputs, mean over heads and queries of each layer.

    Attributes:
        piece: the rows of the running step that belong to the text; None: it has none.
    """

    def __init__(self) -> None:
        self.piece: slice | None = None
        self._past: defaultdict[str, list[tuple[torch.Tensor, torch.Tensor]]] = defaultdict(list)
        self._sums: defaultdict[str, list[float]] = defaultdict(list)

    def attended(
        self, name: str, layer: Any, args: tuple[Any, ...], given: dict[str, Any],
        output: torch.Tensor,
    ) -> None:  # fmt: skip
        """One layer's step.

        Args:
            args, given: query, key and value, `[num_tokens, heads * head_dim]` or with the heads
                apart.
            output: `[num_tokens, num_q_heads * head_dim]`.
        """
        impl = getattr(layer.impl, "attend", layer.impl)  # ours keeps how it attends apart
        if self.piece is None or getattr(impl, "sinks", None) is not None:
            return
        inputs = (*args, *(given[n] for n in ("query", "key", "value") if n in given))
        head_dim, num_kv_heads = layer.head_size, layer.num_kv_heads
        query, key, value = (
            x[self.piece].reshape(self.piece.stop - self.piece.start, -1, head_dim).float()
            for x in inputs[:3]
        )
        past = self._past[name]
        begin = sum(len(k) for k, _ in past)
        past.append((key.clone(), value.clone()))
        rows = [i for i in range(len(query)) if (begin + i) % EVERY == EVERY - 1]
        if not rows:
            return
        keys, values = (torch.cat(x).transpose(0, 1) for x in zip(*past, strict=True))
        past[:] = [(keys.transpose(0, 1), values.transpose(0, 1))]
        q = query[rows].transpose(0, 1).unflatten(0, (num_kv_heads, -1))
        scores = q @ keys.unsqueeze(1).mT * layer.impl.scale  # [kv heads, group, rows, tokens]
        cap = getattr(impl, "soft_cap", 0) or getattr(impl, "logits_soft_cap", 0)
        if cap:
            scores = cap * torch.tanh(scores / cap)
        at = torch.tensor(rows).unsqueeze(-1) + begin
        seen = torch.arange(keys.shape[1])
        hidden = (seen > at) | (seen <= at - (layer.sliding_window or len(seen)))
        exact = scores.masked_fill(hidden, -torch.inf).softmax(-1) @ values.unsqueeze(1)
        got = output[self.piece][rows].reshape(len(rows), -1, head_dim).float().transpose(0, 1)
        cosines = torch.cosine_similarity(exact.flatten(0, 1), got, dim=-1)
        self._sums[name].append(float(cosines.mean(0).sum()))
        self._sums[f"{name} count"].append(len(rows))

    def summary(self) -> dict[str, float]:
        """cosine: mean over layers; worst_cosine: of the worst layer. Empty if nothing was seen."""
        means = [
            sum(self._sums[name]) / sum(self._sums[f"{name} count"])
            for name in self._past
            if self._sums[name]
        ]
        if not means:
            return {}
        return {"cosine": sum(means) / len(means), "worst_cosine": min(means)}
