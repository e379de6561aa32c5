# SPDX-License-Identifier: Apache-2.0
"""The model's own rotary embedding: how far it turns what, and turning queries back.

A key is cached as rotated to its position. When the tokens between it and a query are gone, the
query must be scored as if it were nearer: <R_(p-g) q, k> with g tokens gone. Only R_p q reaches
attention; R_(-g) turns it back, by the cosines and sines that the module keeps for position g.

Where that module is, vLLM does not tell an attention layer. torch tells which module has just
become whose child, and in every model we serve the two are children of the same.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

from vllm_fibquant.keys.key_map import Turns

_PROBE_POSITIONS = (1, 7, 100, 1000)

_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_parents: weakref.WeakKeyDictionary[Any, weakref.ref[torch.nn.Module]] = weakref.WeakKeyDictionary()


class TurnBack:
    """Turns queries back by a distance.

    Args:
        rotary: the embedding, whose table has cosines and sines of every position.
        length: what it lengthens vectors by; a query has been lengthened already.
    """

    def __init__(self, rotary: Any, length: float) -> None:
        self._rotary, self._length = rotary, length
        half, end = rotary.rotary_dim // 2, rotary.rotary_dim
        # The first and the second coordinates of all pairs.
        self._first, self._second = slice(0, end, 2), slice(1, end, 2)
        if rotary.is_neox_style:
            self._first, self._second = slice(0, half), slice(half, end)

    def __call__(self, query: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Queries as they would be `distance` positions earlier.

        Args:
            query: [num_tokens, num_q_heads, head_dim] in the model's dtype, rotated; kept as is.
            distance: int64 [num_tokens], at least 0.

        Returns:
            As query, contiguous; the same bits where distance is 0.
        """
        table = self._rotary.cos_sin_cache[distance].float() / self._length
        cos, sin = table.unsqueeze(1).chunk(2, -1)
        a, b = query[..., self._first], query[..., self._second]
        turned = query.clone(memory_format=torch.contiguous_format)
        turned[..., self._first] = a * cos + b * sin
        turned[..., self._second] = b * cos - a * sin
        return torch.where(distance[:, None, None] > 0, turned, query)


def watch(impl: Any) -> None:
    """Remembers the module that the layer with this `impl` becomes a child of."""
    _install_hook()
    _watched.add(impl)


def parent_of(impl: Any) -> torch.nn.Module | None:
    """The module that the layer with this `impl` is a child of, once `watch` was told of it."""
    reference = _parents.get(impl)
    return None if reference is None else reference()


@functools.cache
def _install_hook() -> None:
    register_module_module_registration_hook(_remember_parent)


def _remember_parent(parent: torch.nn.Module, name: str, child: Any) -> None:
    impl = getattr(child, "impl", None)
    if impl is not None and impl in _watched:
        _parents[impl] = weakref.ref(parent)


def _rotate(rotary: Any, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """What the module makes of queries [num_tokens, heads, head_dim] in its dtype, on the device of
    its table."""
    device = rotary.cos_sin_cache.device
    flat = query.flatten(1).contiguous().to(device)
    key = flat[:, : query.shape[-1]].clone()  # M-RoPE and LongRoPE take no query without a key
    rotated = rotary(positions.long().to(device), flat, key)[0]
    return rotated.view(query.shape).to(query.device)


def _probes(num_positions: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Positions, and random vectors [num, 2, head_dim] to be rotated to them."""
    positions = torch.tensor([min(p, num_positions - 1) for p in _PROBE_POSITIONS], device="cpu")
    shape = (len(positions), 2, head_dim)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return positions, x.to(dtype)


def _rotary_of(impl: Any, num_positions: int) -> Any:
    """The rotary embedding beside a watched layer.

    Raises:
        ValueError: there is none, or it knows fewer positions.
    """
    parent = parent_of(impl)
    siblings = [] if parent is None else [m for m in parent.children() if m is not impl]
    found = [m for m in siblings if hasattr(m, "rotary_dim") and hasattr(m, "is_neox_style")]
    if len(found) != 1:
        raise ValueError(
            "rotary embedding must be the one beside each attention layer, got "
            f"{len(found)} of them"
        )
    rotary = found[0]
    table = getattr(rotary, "cos_sin_cache", None)
    num_rows = 0 if table is None else table.shape[0]
    if num_rows < num_positions:
        raise ValueError(
            f"rotary embedding must know all {num_positions} positions of --max-model-len, got "
            f"{num_rows} (in {type(rotary).__name__}); give a smaller --max-model-len, or a longer "
            f"table with --hf-overrides '{{\"max_position_embeddings\": {num_positions}}}'"
        )
    return rotary


def turn_back_of(impl: Any, num_positions: int, head_dim: int, dtype: torch.dtype) -> TurnBack:
    """How to turn back the queries of a watched layer: see `turns_of`, which checks that its table
    says what the embedding does."""
    turns = turns_of(impl, num_positions, head_dim, dtype)
    return TurnBack(_rotary_of(impl, num_positions), turns.length)


def turns_of(impl: Any, num_positions: int, head_dim: int, dtype: torch.dtype) -> Turns:
    """How far a watched layer's rotary embedding turns what, once its model is complete.

    Args:
        impl: the layer's, as it was given to `watch`.
        num_positions: positions below this one must be known to the rotary embedding.
        dtype: the model's.

    Raises:
        ValueError: there is no rotary embedding beside the layer, or it is of another kind.
    """
    rotary = _rotary_of(impl, num_positions)
    known = _turns.setdefault(rotary, {})
    if num_positions not in known:
        turns = _read_turns(rotary, num_positions)
        positions, x = _probes(num_positions, head_dim, dtype)
        try:
            want = _rotate(rotary, x.clone(), positions)[..., : rotary.rotary_dim].float()
        except (TypeError, RuntimeError, AttributeError) as caught:
            raise ValueError(
                f"rotary embedding must rotate queries alone, got {type(rotary).__name__}"
            ) from caught
        got = turns.turn(x.float(), positions)[..., : rotary.rotary_dim]
        error = float((got - want).abs().max())
        # Rotations rounded to dtype, of coordinates up to 4; a wrong pairing errs by units.
        if not error <= 16 * torch.finfo(dtype).eps + 1e-3:
            raise ValueError(
                "rotary embedding must turn in proportion to the position, got an error of "
                f"{error:.1e} (in {type(rotary).__name__})"
            )
        known[num_positions] = turns
    return known[num_positions]


_turns: weakref.WeakKeyDictionary[Any, dict[int, Turns]] = weakref.WeakKeyDictionary()


def _read_turns(rotary: Any, num_positions: int) -> Turns:
    """From the module's table [positions, cosines and sines], which may be rounded to 8 bits."""
    table = rotary.cos_sin_cache.cpu().double()
    cos, sin = table.chunk(2, -1)
    length = float((cos.square() + sin.square()).mean().sqrt())
    # An angle is known up to whole turns. Position 1 turns by less than half of one; from there on
    # the frequency known so far tells how many, and each farther position makes it more precise.
    frequency, position = torch.atan2(sin[1], cos[1]), 2
    while position < len(table):
        expected = frequency * position
        rest = torch.atan2(sin[position], cos[position]) - expected
        frequency = frequency + torch.remainder(rest + torch.pi, 2 * torch.pi) / position
        frequency = frequency - torch.pi / position
        position *= 2
    pairs = torch.arange(rotary.rotary_dim, dtype=torch.int32, device="cpu")
    pairs = pairs.view(2, -1).T if rotary.is_neox_style else pairs.view(-1, 2)
    return Turns(pairs.contiguous(), frequency, length, num_positions)
