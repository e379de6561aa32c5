# SPDX-License-Identifier: Apache-2.0
"""Turning queries back by a number of positions, with the model's own rotary embedding.

A key is cached as rotated to its position. When the tokens between it and a query are gone, the
query must be scored as if it were nearer: <R_(p-g) q, k> with g tokens gone. Only R_p q reaches
attention, so we need R_(-g). Rotary modules take positions of at least 0, but mirroring every
rotated pair turns one direction into the other: R_(-g) = J R_g J, where J negates the second
coordinate of each pair. The module itself does the work, whatever its frequencies.

Where that module is, vLLM does not tell an attention layer. torch tells which module has just
become whose child, and in every model we serve the two are children of the same.
"""

from __future__ import annotations

import functools
import weakref
from typing import Any

import torch
from torch.nn.modules.module import register_module_module_registration_hook

_PROBE_POSITIONS = (1, 7, 100, 1000)

_watched: weakref.WeakSet[Any] = weakref.WeakSet()
_parents: weakref.WeakKeyDictionary[Any, weakref.ref[torch.nn.Module]] = weakref.WeakKeyDictionary()


class TurnBack:
    """Turns queries back by a distance.

    Args:
        rotary: called with int64 positions [num_tokens], queries [num_tokens, heads * head_dim],
            which it may overwrite, and no keys; returns the rotated queries first.
        rotary_dim: the leading coordinates of each head that it rotates.
        is_neox_style: coordinate i is paired with i + rotary_dim / 2; else neighbours are paired.
        head_dim: coordinates of a head.
        dtype: dtype of queries.
    """

    def __init__(
        self, rotary: Any, rotary_dim: int, is_neox_style: bool, head_dim: int, dtype: torch.dtype
    ) -> None:
        self._rotary = rotary
        mirror = torch.ones(head_dim, dtype=dtype)
        if is_neox_style:
            mirror[rotary_dim // 2 : rotary_dim] = -1
        else:
            mirror[1:rotary_dim:2] = -1
        self._mirror = mirror
        # Some embeddings also lengthen what they rotate; a query has been lengthened already.
        length = self._rotate(torch.ones(1, 1, head_dim, dtype=dtype), torch.zeros(1))[0, 0]
        self._into_mirror = mirror / length

    def _rotate(self, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        rotated = self._rotary(positions.long(), query.flatten(1).contiguous(), None)[0]
        return rotated.view(query.shape)

    def __call__(self, query: torch.Tensor, distance: torch.Tensor) -> torch.Tensor:
        """Queries as they would be `distance` positions earlier.

        Args:
            query: [num_tokens, num_q_heads, head_dim] in the module's dtype, rotated; kept as is.
            distance: int64 [num_tokens], at least 0.

        Returns:
            As query, contiguous; the same bits where distance is 0.
        """
        turned = self._rotate(query * self._into_mirror, distance) * self._mirror
        return torch.where(distance[:, None, None] > 0, turned, query)

    def error(self, num_positions: int) -> float:
        """The largest error of a turned vector's coordinate, on vectors of standard normals."""
        last = torch.tensor([min(p, num_positions - 1) for p in _PROBE_POSITIONS])
        distance = (last + 1) // 2
        shape = (len(last), 2, self._mirror.shape[0])
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(self._mirror.dtype)
        turned = self(self._rotate(x.clone(), last), distance)
        return float((turned.float() - self._rotate(x, last - distance).float()).abs().max())


def watch(impl: Any) -> None:
    """Remembers the module that the layer with this `impl` becomes a child of."""
    _install_hook()
    _watched.add(impl)


@functools.cache
def _install_hook() -> None:
    register_module_module_registration_hook(_remember_parent)


def _remember_parent(parent: torch.nn.Module, name: str, child: Any) -> None:
    impl = getattr(child, "impl", None)
    if impl is not None and impl in _watched:
        _parents[impl] = weakref.ref(parent)


def turn_back_of(impl: Any, num_positions: int, head_dim: int, dtype: torch.dtype) -> TurnBack:
    """How to turn back the queries of a watched layer, once its model is complete.

    Args:
        impl: the layer's, as it was given to `watch`.
        num_positions: positions below this one must be known to the rotary embedding.

    Raises:
        ValueError: there is no rotary embedding beside the layer, or it is of another kind.
    """

    def problem(must: str, got: str, remedy: str) -> ValueError:
        return ValueError(f"retain: rotary embedding must {must}, got {got}; {remedy}")

    reference = _parents.get(impl)
    parent = None if reference is None else reference()
    siblings = [] if parent is None else [m for m in parent.children() if m is not impl]
    found = [m for m in siblings if hasattr(m, "rotary_dim") and hasattr(m, "is_neox_style")]
    without = "leave retain out for this model"
    if len(found) != 1:
        raise problem("be the one beside each attention layer", f"{len(found)} of them", without)
    rotary = found[0]
    table = getattr(rotary, "cos_sin_cache", None)
    num_rows = 0 if table is None else table.shape[0]
    if num_rows < num_positions:
        raise problem(
            f"know all {num_positions} positions of --max-model-len",
            f"{num_rows} (in {type(rotary).__name__})",
            "give a smaller --max-model-len, or a longer table with "
            f"--hf-overrides '{{\"max_position_embeddings\": {num_positions}}}'",
        )
    try:
        turn_back = TurnBack(rotary, rotary.rotary_dim, rotary.is_neox_style, head_dim, dtype)
        error = turn_back.error(num_positions)
    except (TypeError, RuntimeError, AttributeError) as caught:
        raise problem("rotate queries alone", type(rotary).__name__, without) from caught
    # Three rotations, each rounded to dtype, of coordinates up to 4; a wrong pairing errs by units.
    if not error <= 16 * torch.finfo(dtype).eps + 1e-3:
        raise problem(
            "turn by the difference of two positions",
            f"an error of {error:.1e} (in {type(rotary).__name__})",
            without,
        )
    return turn_back
