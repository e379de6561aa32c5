# SPDX-License-Identifier: Apache-2.0
"""The metrics of one unit; docs/evaluation.md defines them in words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from vllm_fibquant.evaluation.formats import Format
from vllm_fibquant.evaluation.simulate import Simulator

if TYPE_CHECKING:
    from vllm_fibquant.evaluation.texts import Unit

_ROWS = 64  # positions whose whole vocabulary is held at once: 67 MB of 262,144 words, a few times
NUM_WORST = 32
"""Greatest divergences that are kept of a text: enough for the 99.9 % quantile over several."""

Logits = Callable[[torch.Tensor], torch.Tensor]
"""The model's head: float32 `[n, hidden_size]` to `[n, vocabulary]`."""


def measure_text(
    logits: Logits, tokens: Sequence[int], truth: torch.Tensor, states: torch.Tensor, far: int
) -> dict[str, Any]:
    """Next-token distributions against the truth's, over all positions and over the far ones.

    Args:
        tokens: of the text.
        truth, states: last hidden states of the uncompressed model and of the format, float32
            `[num_tokens, hidden_size]`; both pass through the same head, some rows at a time.
        far: the first far position.

    Returns:
        For all positions, and with the prefix far_ for those from `far` on: num, and means of
        loss (nats), loss_increase (over the truth's), kl (truth from format, nats), same (likeliest
        tokens equal); worst: the NUM_WORST greatest kl, in descending order.
    """
    columns = []
    last = len(tokens) - 1
    after = torch.tensor(list(tokens[1:]))
    for begin in range(0, last, _ROWS):
        rows = slice(begin, min(begin + _ROWS, last))
        want = logits(truth[rows]).log_softmax(-1)
        got = logits(states[rows]).log_softmax(-1)
        index = after[rows].unsqueeze(-1)
        loss = -got.gather(1, index).squeeze(1)
        increase = loss + want.gather(1, index).squeeze(1)
        same = (want.argmax(-1) == got.argmax(-1)).float()
        kl = want.exp().mul_(want.sub_(got)).sum(-1)
        columns.append(torch.stack([loss, increase, kl, same]))
    all_positions = torch.cat(columns, 1).double()
    result: dict[str, Any] = {}
    for prefix, part in (("", all_positions), ("far_", all_positions[:, far:])):
        result[f"{prefix}num"] = part.shape[1]
        names = ("loss", "loss_increase", "kl", "same")
        result |= {f"{prefix}{n}": float(x) for n, x in zip(names, part.mean(1), strict=True)}
    worst = all_positions[2].sort(descending=True).values[:NUM_WORST]
    return result | {"worst": [float(f"{x:.4g}") for x in worst.tolist()]}


def quantile_of_worst(texts: Sequence[dict[str, Any]], share: float = 0.001) -> float:
    """The divergence that a share of all positions of the texts exceeds.

    Args:
        texts: results of `measure_text`.

    Raises:
        ValueError: too few of the greatest divergences were kept for so many positions.
    """
    rank = int(share * sum(text["num"] for text in texts))
    if rank >= NUM_WORST:
        raise ValueError(
            f"quantile_of_worst: texts must have fewer than {NUM_WORST / share:.0f} positions, "
            f"got {sum(text['num'] for text in texts)}; take fewer texts"
        )
    return sorted((x for text in texts for x in text["worst"]), reverse=True)[rank]


def measure_spans(logits: Logits, unit: Unit, states: torch.Tensor) -> dict[str, Any]:
    """Which answers greedy generation would have given.

    Args:
        states: last hidden states of the format, float32 `[num_tokens, hidden_size]`.

    Returns:
        right: per span, whether all its tokens are the likeliest; equal: tokens of each span
        before the first that is not.
    """
    right, equal = [], []
    for begin, end in unit.spans:
        likeliest = logits(states[begin - 1 : end - 1]).argmax(-1)
        wrong = likeliest != torch.tensor(unit.tokens[begin:end])
        equal.append(int(wrong.int().argmax()) if wrong.any() else end - begin)
        right.append(equal[-1] == end - begin)
    return {"right": right, "equal": equal}


def measure_fidelity(simulator: Simulator, unit: Unit, cache_format: Format) -> dict[str, Any]:
    """What a format does to captured keys, values and attention outputs of the uncompressed model.

    Returns:
        key_error, value_error: squared error over squared length, of codes alone, mean over layers;
        cosine: of attention outputs with and without the format, mean over layers, heads and
        queries; the tokens the format leaves alone are read uncompressed.
    """
    errors = torch.zeros(3, dtype=torch.float64)
    layers = simulator.capture(unit.tokens)
    for index, (query, key, value) in enumerate(layers):
        coded = cache_format.roundtrip(index, key, value, simulator.rotations[index])
        want = simulator.attend(index, query, (key, value), (key, value))
        got = simulator.attend(index, query, (key, value), coded, cache_format)
        relative = [
            (x - y).square().sum() / x.square().sum()
            for x, y in zip((key, value), coded, strict=True)
        ]
        cosine = torch.cosine_similarity(want, got, dim=-1).mean()
        errors += torch.stack([*relative, cosine]).double()
    return dict(zip(("key_error", "value_error", "cosine"), (errors / len(layers)).tolist(),
                    strict=True))  # fmt: skip
