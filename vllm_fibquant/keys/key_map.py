# SPDX-License-Identifier: Apache-2.0
"""What a layer's keys are made into before they are encoded, so that the code fits them better.

Keys of one head have much in common: most of a key's length is often a mean that all keys share. A
code spends its bits on the direction of a vector, so what is common is subtracted first, and the
bits describe what tells keys apart. Scores lose nothing: <q, k> = <q, k - m> + <q, m>, and the last
term is one number per query. What is left may also be transformed (`key_transform`).

Most of what keys have in common is the same before the rotary embedding R, and turns with the
position p: the mean is then m + R_p c. A score's last term becomes <q, m> + <q, R_p c>, which for
every pair of coordinates that turn together is a multiple of cos(f p) plus one of sin(f p). Pairs
that turn slowly are taken to turn in steps, so that a tile of tokens has one such term.

A request's first tokens are not like its others (attention sinks), but much like other requests'
first tokens: they are encoded as they are or, where it is known, without what keys and values at
their position have in common. A weighted sum of values gets back its weights' share of that.

Source: ours; for first tokens StreamingLLM (arXiv 2309.17453).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from vllm_fibquant.codec.codec import KVCodec, pack_norms, unpack_norms
from vllm_fibquant.codec.layout import NORM_BYTES
from vllm_fibquant.keys.transform import KeyTransform

STEP = 32
"""Positions of one step of slow pairs; tiles of the kernels lie within one."""
MAX_STEP_ERROR = 0.2
"""Slow pairs turn by at most as many radians within half a step: what steps miss of their mean is
1 % of its squared length or less."""


@dataclass(frozen=True, eq=False)
class Turns:
    """How far a rotary embedding turns its pairs of coordinates: by position times frequency.

    Attributes:
        pairs: int32 [num_pairs, 2], the two coordinates of each pair.
        frequency: float64 [num_pairs], radians per position.
        length: what the embedding lengthens vectors by.
        num_positions: positions below this one are asked for.
    """

    pairs: torch.Tensor
    frequency: torch.Tensor
    length: float
    num_positions: int

    @property
    def is_slow(self) -> torch.Tensor:
        """bool [num_pairs]."""
        return self.frequency.abs() * (STEP / 2) <= MAX_STEP_ERROR

    def table(self, positions: torch.Tensor, stepped: bool = False) -> torch.Tensor:
        """Cosines and then sines of all pairs: float64 [..., 2 * num_pairs].

        Args:
            stepped: slow pairs stand, over each step, as in its middle.
        """
        position = positions.double().unsqueeze(-1)
        if stepped:
            middle = position // STEP * STEP + STEP / 2
            position = torch.where(self.is_slow, middle, position)
        angle = position * self.frequency
        return torch.cat((angle.cos(), angle.sin()), -1)

    def shift(self, x: torch.Tensor, distance: int) -> torch.Tensor:
        """Rotated vectors as they would be `distance` positions further: float [..., head_dim]."""
        angle = distance * self.frequency
        cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
        first, second = self.pairs.long().unbind(-1)
        a, b = x[..., first], x[..., second]
        shifted = x.clone()
        shifted[..., first] = a * cos - b * sin
        shifted[..., second] = b * cos + a * sin
        return shifted

    def turn(
        self, x: torch.Tensor, positions: torch.Tensor, back: bool = False, stepped: bool = False
    ) -> torch.Tensor:
        """R_p x, or its transpose R_p^T x: 0 in coordinates that do not turn.

        Args:
            x: float [..., num_kv_heads, head_dim], in the order of `positions` or the same for all.
            positions: int64 [...].
            back: transpose, which turns back what was turned.
            stepped: as in `table`.
        """
        table = (self.length * self.table(positions, stepped)).to(x.dtype).unsqueeze(-2)
        cos, sin = table.chunk(2, -1)
        first, second = self.pairs.long().unbind(-1)
        a, b = x[..., first], x[..., second]
        if back:
            sin = -sin
        shape = torch.broadcast_shapes(x.shape[:-1], cos.shape[:-1])
        turned = x.new_zeros(*shape, x.shape[-1])
        turned[..., first] = a * cos - b * sin
        turned[..., second] = b * cos + a * sin
        return turned


@dataclass(frozen=True, eq=False)
class TurningMean:
    """The part R_p c of a mean that turns with the position, in each head's strongest pairs, slow
    ones in steps.

    Attributes:
        turns: of the layer's rotary embedding.
        chosen: int32 [num_kv_heads, num_chosen], pairs of `turns`: as many fast ones for every
            head, and then slow ones.
        mean: float32 [num_kv_heads, num_chosen, 2], c in the coordinates of those pairs.
    """

    turns: Turns
    chosen: torch.Tensor
    mean: torch.Tensor

    @property
    def num_fast(self) -> int:
        """How many pairs of each head are not slow."""
        return int((~self.turns.is_slow[self.chosen[0].long()]).sum())

    @classmethod
    def strongest(cls, c: torch.Tensor, turns: Turns, num_each: int) -> TurningMean:
        """The pairs of c, float32 [num_kv_heads, head_dim], of which a mean that does not turn
        would miss most: `num_each` fast and as many slow ones, or all of a kind that has fewer."""
        pairs = c[:, turns.pairs.long()]  # [num_kv_heads, num_pairs, 2]
        positions = torch.arange(turns.num_positions)
        missed = sum(turns.table(positions).var(0, correction=0).float().chunk(2))
        score, is_slow = pairs.square().sum(-1) * missed, turns.is_slow
        kinds = []
        for kind in (~is_slow, is_slow):
            order = torch.argsort(score.masked_fill(~kind, -1), descending=True, stable=True)
            kinds.append(order[:, : min(num_each, int(kind.sum()))].sort(-1).values)
        chosen = torch.cat(kinds, -1)
        mean = pairs.gather(1, chosen.unsqueeze(-1).expand(-1, -1, 2))
        return cls(turns, chosen.to(torch.int32).contiguous(), mean.contiguous())

    def coefficients(self, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """c, 0 in coordinates of other pairs: dtype [num_kv_heads, head_dim]."""
        c = torch.zeros(len(self.chosen), head_dim, dtype=dtype)
        coordinates = self.turns.pairs.long()[self.chosen.long()].flatten(1)
        return c.scatter_(1, coordinates, self.mean.flatten(1).to(dtype))

    def at(self, positions: torch.Tensor, head_dim: int, dtype: torch.dtype) -> torch.Tensor:
        """R_p c: int64 [...] positions to dtype [..., num_kv_heads, head_dim]."""
        return self.turns.turn(self.coefficients(head_dim, dtype), positions, stepped=True)

    def first_heads(self, num_kv_heads: int) -> TurningMean:
        """Of the first `num_kv_heads` heads."""
        chosen, mean = (x[:num_kv_heads].contiguous() for x in (self.chosen, self.mean))
        return TurningMean(self.turns, chosen, mean)


@dataclass(frozen=True, eq=False)
class FirstMeans:
    """Means of keys and values at a request's first positions.

    Attributes:
        key, value: float32 [num_kv_heads, num_first, head_dim], contiguous, num_first at most
            MAX_FIRST_MEANS.
    """

    key: torch.Tensor
    value: torch.Tensor

    @property
    def num_first(self) -> int:
        return self.key.shape[1]


MAX_FIRST_MEANS = 16  # one tile of the kernels holds them


@dataclass(frozen=True, eq=False)
class KeyMap:
    """How one layer's keys are encoded: k - mean of its head, as it is or transformed.

    Attributes:
        mean: float32 [num_kv_heads, head_dim], contiguous, finite.
        num_plain: first tokens of a request whose keys are encoded as they are or without `first`,
            at least 0.
        transform: of k - mean, or None; its codes take the place of the codec's.
        turning: what is added to `mean` at each position, or None.
        first: means of tokens at the first positions, of num_plain at most, or None.

    Raises:
        ValueError: another shape, dtype or value.
    """

    mean: torch.Tensor
    num_plain: int
    transform: KeyTransform | None = None
    turning: TurningMean | None = None
    first: FirstMeans | None = None

    def __post_init__(self) -> None:
        mean = self.mean
        if mean.dtype != torch.float32 or mean.dim() != 2 or not mean.is_contiguous():
            raise ValueError(
                "KeyMap: mean must be contiguous float32 [num_kv_heads, head_dim], got "
                f"{mean.dtype} {list(mean.shape)}"
            )
        if not torch.isfinite(mean).all():
            raise ValueError("KeyMap: mean must be finite, got NaN or infinity; calibrate again")
        if self.num_plain < 0:
            raise ValueError(f"KeyMap: num_plain must be at least 0, got {self.num_plain}")
        if self.first is not None:
            most = min(self.num_plain, MAX_FIRST_MEANS)
            shape = (len(mean), min(self.first.num_first, most), mean.shape[1])
            for x in (self.first.key, self.first.value):
                if x.shape != shape or x.dtype != torch.float32 or not torch.isfinite(x).all():
                    raise ValueError(
                        f"KeyMap: first must hold finite float32 [{len(mean)}, at most {most}, "
                        f"{mean.shape[1]}], got {x.dtype} {list(x.shape)}"
                    )

    def mean_at(self, positions: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
        """The mean of keys at int64 [...] positions: dtype [..., num_kv_heads, head_dim].

        Without a turning part it is one for all, [num_kv_heads, head_dim].
        """
        mean = self.mean.to(dtype)
        if self.turning is None:
            return mean
        if positions is None:
            raise ValueError("mean_at: positions must be given with a turning mean, got None")
        return mean + self.turning.at(positions, mean.shape[1], dtype)

    def _without_first(
        self, key: torch.Tensor, value: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of first tokens as the preset's own codes encode them.

        Args:
            key, value: float [num_tokens, num_kv_heads, head_dim].
            positions: int64 [num_tokens], each below `num_plain`.
        """
        if self.first is None:
            return key, value
        known = (positions < self.first.num_first).view(-1, 1, 1)
        at = positions.clamp(max=self.first.num_first - 1)
        key_mean, value_mean = (
            x[:, at].transpose(0, 1) for x in (self.first.key, self.first.value)
        )
        return key - known * key_mean, value - known * value_mean

    def _is_first(self, positions: torch.Tensor | None, num_tokens: int) -> torch.Tensor:
        """bool [num_tokens]: which tokens are among the first of their requests."""
        if positions is None and self.num_plain:
            raise ValueError("KeyMap: positions must be given where first tokens differ, got None")
        if positions is None:
            return torch.zeros(num_tokens, dtype=torch.bool)
        return positions < self.num_plain

    def encode_records(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        codec: KVCodec,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As `KVCodec.encode_records`, for float32 [num_tokens, num_kv_heads, head_dim].

        Args:
            positions: int64 [num_tokens], where tokens stand in their requests; None if neither
                first tokens nor means differ by it.
        """
        without = key - self.mean_at(positions, key.dtype)
        records = codec.encode_records(without, value)
        if self.transform is not None:
            at = codec.layout
            indices, norms = self.transform.encode(without)
            records[..., at.key_index_offset : at.key_index_offset + indices.shape[-1]] = indices
            norm_end = at.key_norm_offset + NORM_BYTES
            records[..., at.key_norm_offset : norm_end] = pack_norms(norms)
        is_first = self._is_first(positions, len(key))
        if positions is not None and is_first.any():
            first = self._without_first(key[is_first], value[is_first], positions[is_first])
            records[is_first] = codec.encode_records(*first)
        return records

    def decode_records(
        self,
        records: torch.Tensor,
        codec: KVCodec,
        dtype: torch.dtype,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of records uint8 [num_tokens, num_kv_heads, record_bytes], in the
        model's basis: dtype [num_tokens, num_kv_heads, head_dim].

        Args:
            positions: as in `encode_records`.
        """
        keys, values = (x.to(dtype) for x in codec.decode_records(records))
        is_later = ~self._is_first(positions, len(records))
        mean = self.mean_at(positions, dtype).expand_as(keys)[is_later]
        if self.transform is None:
            keys[is_later] += mean
        else:
            at = codec.layout
            index_end = at.key_index_offset + self.transform.index_bytes
            indices = records[is_later, :, at.key_index_offset : index_end]
            norms = records[is_later, :, at.key_norm_offset : at.key_norm_offset + NORM_BYTES]
            decoded = self.transform.decode(indices, unpack_norms(norms), dtype)
            keys[is_later] = decoded + mean
        if self.first is not None and positions is not None:
            known = (positions < self.first.num_first).nonzero().squeeze(-1)
            for x, means in ((keys, self.first.key), (values, self.first.value)):
                x[known] += means.transpose(0, 1)[positions[known]].to(dtype)
        return keys, values

    def first_heads(self, num_kv_heads: int) -> KeyMap:
        """The map of the first `num_kv_heads` heads."""
        transform = self.transform and self.transform.first_heads(num_kv_heads)
        turning = self.turning and self.turning.first_heads(num_kv_heads)
        first = self.first and FirstMeans(
            *(x[:num_kv_heads].contiguous() for x in (self.first.key, self.first.value))
        )
        mean = self.mean[:num_kv_heads].contiguous()
        return KeyMap(mean, self.num_plain, transform, turning, first)
