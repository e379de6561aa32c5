# SPDX-License-Identifier: Apache-2.0
"""What is known of a model's keys and queries: statistics, their file, and where it is found.

A file (`<name>.fqcal`) is, little-endian and without padding:

    offset          bytes           content
    0               8               magic "FIBQCALB"
    8               4               format version, uint32
    12              4               header_bytes, uint32
    16              header_bytes    JSON object, UTF-8: model, num_tokens, num_first, layers, each
                                    with name, num_kv_heads and head_dim
    ...             statistics      float32, layer after layer: the tensors of KeyStatistics
    end - 32        32              SHA-256 of everything before it

Statistics of all heads of a layer are in one file, however many processes serve them.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from vllm_fibquant.files import seal, unseal
from vllm_fibquant.keys.key_map import FirstMeans, KeyMap, TurningMean, Turns
from vllm_fibquant.keys.transform import make_transform

MAGIC = b"FIBQCALB"
FORMAT_VERSION = 3

TURNING_SHARE = 0.25
"""Pairs of coordinates whose mean turns, over all that the rotary embedding turns: as many fast
ones, which cost time, and as many slow ones: docs/calibration.md."""


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """What was measured of one layer, apart from the first means over all tokens but the first of
    each sequence.

    Attributes:
        key_mean: float32 [num_kv_heads, head_dim], mean of k - R_p c: of keys after rotary
            embedding, without their turning part.
        turning_mean: c, float32 [num_kv_heads, head_dim], mean of keys before rotary embedding in
            the pairs of coordinates where it matters, 0 elsewhere.
        key_covariance: float32 [num_kv_heads, head_dim, head_dim], of k - R_p c.
        query_moment: float32 as key_covariance, mean of q q^T over the queries that read the head.
        first_key, first_value: float32 [num_kv_heads, num_first, head_dim], means of keys and
            values at the first positions of a sequence.
    """

    key_mean: torch.Tensor
    turning_mean: torch.Tensor
    key_covariance: torch.Tensor
    query_moment: torch.Tensor
    first_key: torch.Tensor
    first_value: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """All of them, in the order of the file."""
        return (self.key_mean, self.turning_mean, self.key_covariance, self.query_moment,
                self.first_key, self.first_value)  # fmt: skip

    @property
    def shape(self) -> tuple[int, int]:
        """(num_kv_heads, head_dim)."""
        return self.key_mean.shape[0], self.key_mean.shape[1]

    def heads(self, begin: int, end: int) -> KeyStatistics:
        """The statistics of KV heads begin to end - 1."""
        return KeyStatistics(*(x[begin:end] for x in self.tensors))


@dataclass(frozen=True, eq=False)
class Calibration:
    """The content of a calibration file.

    Attributes:
        model: fingerprint of the model it was measured on.
        num_tokens: tokens that were measured.
        num_first: first tokens of each sequence, which have means of their own.
        layers: statistics by the name of the layer.
        digest: SHA-256 of the file, hexadecimal.
    """

    model: str
    num_tokens: int
    num_first: int
    layers: Mapping[str, KeyStatistics]
    digest: str

    def key_map(
        self,
        layer: str,
        begin: int,
        end: int,
        num_plain: int,
        index_bytes: int = 0,
        turns: Turns | None = None,
    ) -> KeyMap:
        """The map of the keys of KV heads begin to end - 1 of a layer.

        Args:
            num_plain: first tokens that are encoded by the preset's own codes.
            index_bytes: those of a key, to transform keys; 0 to subtract their mean alone.
            turns: of the layer's rotary embedding; may be left out if `turning_mean` is 0.

        Raises:
            ValueError: turns are needed and left out.
        """
        part = self.layers[layer].heads(begin, end)
        transform = None
        if index_bytes:
            transform = make_transform(part.key_covariance, part.query_moment, index_bytes)
        turning = None
        if part.turning_mean.any():
            if turns is None:
                raise ValueError(
                    f"calibration: layer {layer} must have a rotary embedding whose turns are "
                    "known, as it had when it was measured, got none; delete the file"
                )
            turning = TurningMean.strongest(part.turning_mean, turns, num_turning(turns))
        first = FirstMeans(
            *(x[:, :num_plain].contiguous() for x in (part.first_key, part.first_value))
        )
        return KeyMap(
            part.key_mean.contiguous(), num_plain, transform, turning,
            first if first.num_first else None,
        )  # fmt: skip


def num_turning(turns: Turns) -> int:
    """In how many fast pairs of coordinates of each head the mean turns, and in how many slow."""
    return max(1, int(len(turns.pairs) * TURNING_SHARE))


def pack_calibration(model: str, num_tokens: int, layers: Mapping[str, KeyStatistics]) -> bytes:
    """The content of the file of these statistics."""
    num_first = next(iter(layers.values())).first_key.shape[1]
    header = {
        "model": model,
        "num_tokens": num_tokens,
        "num_first": num_first,
        "layers": [
            {"name": name, "num_kv_heads": s.shape[0], "head_dim": s.shape[1]}
            for name, s in layers.items()
        ],
    }
    data = b"".join(
        np.ascontiguousarray(x.numpy(), "<f4").tobytes() for s in layers.values() for x in s.tensors
    )
    return seal(MAGIC, FORMAT_VERSION, header, data)


def parse_calibration(content: bytes, name: str) -> Calibration:
    """Reads a calibration from the bytes of its file, checking all of them.

    Args:
        content: the whole file.
        name: what to call it in errors.

    Raises:
        ValueError: no calibration file, another format version, damaged, or inconsistent.
    """

    def refuse(what: str, advice: str = "delete the file, and it is measured again") -> ValueError:
        return ValueError(f"calibration: {name} {what}; {advice}")

    sealed = unseal(
        content, MAGIC, FORMAT_VERSION, refuse, other_file="this is no calibration file"
    )
    try:
        header = json.loads(sealed.header)
        shapes = {s["name"]: (s["num_kv_heads"], s["head_dim"]) for s in header["layers"]}
        known = header["model"], header["num_tokens"], header["num_first"]
        num_first = header["num_first"]
        sizes = [heads * dim * (2 + 2 * dim + 2 * num_first) for heads, dim in shapes.values()]
    except (ValueError, KeyError, TypeError) as error:
        raise refuse(f"must have a valid header, got {type(error).__name__}: {error}") from error
    if len(sealed.data) != 4 * sum(sizes):
        raise refuse(f"must hold {4 * sum(sizes)} bytes of statistics, got {len(sealed.data)}")
    floats = torch.from_numpy(np.frombuffer(sealed.data, "<f4").astype(np.float32))
    if not torch.isfinite(floats).all():
        raise refuse("must hold finite values, got others")
    layers = {}
    for (layer, (heads, dim)), part in zip(shapes.items(), floats.split(sizes), strict=True):
        shapes_of = 2 * [(heads, dim)] + 2 * [(heads, dim, dim)] + 2 * [(heads, num_first, dim)]
        tensors = part.split([math.prod(shape) for shape in shapes_of])
        layers[layer] = KeyStatistics(
            *(x.view(shape) for x, shape in zip(tensors, shapes_of, strict=True))
        )
    return Calibration(*known, layers, sealed.digest)


def check_calibration(
    calibration: Calibration, name: str, model: str, layers: Iterable[tuple[str, tuple[int, int]]]
) -> None:
    """Checks that a calibration is of this model.

    Args:
        calibration: what was read.
        name: what to call its file in errors.
        model: the model's fingerprint.
        layers: the name and the shape (all KV heads, head_dim) of every layer to be served.

    Raises:
        ValueError: it is of another model.
    """
    advice = "give another path as calibration, or delete the file, and it is measured again"
    for layer, shape in layers:
        statistics = calibration.layers.get(layer)
        if statistics is None or statistics.shape != shape:
            got = (
                "none" if statistics is None else f"{statistics.shape[0]} and {statistics.shape[1]}"
            )
            raise ValueError(
                f"calibration: {name} must hold layer {layer} with {shape[0]} KV heads of head_dim "
                f"{shape[1]}, got {got}: it is of another model; {advice}"
            )
    if calibration.model != model:
        raise ValueError(
            f"calibration: {name} must be of model {model}, got {calibration.model}; {advice}"
        )


def cache_name(model: str) -> str:
    """The file of a model, by its fingerprint, among those of the user's cache: see `files`."""
    return f"calibrations/{model}-{FORMAT_VERSION}.fqcal"


class StatisticsCollector:
    """Sums over the keys and queries of one layer, in float64.

    Args:
        num_kv_heads, head_dim: of the layer, in this process.
        turns: of its rotary embedding; None to measure no turning mean.
        num_first: first tokens of a sequence whose means are measured, position by position.
    """

    def __init__(
        self, num_kv_heads: int, head_dim: int, turns: Turns | None = None, num_first: int = 0
    ) -> None:
        self.num_tokens = self._num_queries = self._num_starts = 0
        self._start_sums = torch.zeros(2, num_kv_heads, num_first, head_dim, dtype=torch.float64)
        self._turns = turns
        zeros = functools.partial(torch.zeros, dtype=torch.float64)
        self._key_sum = zeros(num_kv_heads, head_dim)
        self._key_moment = zeros(num_kv_heads, head_dim, head_dim)
        self._query_moment = zeros(num_kv_heads, head_dim, head_dim)
        # What the turning part needs: R_p c is linear in the table's columns t_p, so sums of t_p,
        # t_p t_p^T and k t_p^T are enough to take R_p c out of keys once c is known.
        num_rows = 0 if turns is None else 2 * len(turns.pairs)
        self._turn_sum, self._turn_moment = zeros(num_rows), zeros(num_rows, num_rows)
        self._key_turn_moment = zeros(num_kv_heads, head_dim, num_rows)

    def add(self, query: torch.Tensor, key: torch.Tensor, positions: torch.Tensor) -> None:
        """Adds tokens.

        Args:
            query: [num_tokens, num_q_heads, head_dim] of any float dtype.
            key: [num_tokens, num_kv_heads, head_dim] of any float dtype.
            positions: int64 [num_tokens].
        """
        num_kv_heads, head_dim = self._key_sum.shape
        keys = key.double().transpose(0, 1)
        # Nothing is taken out of queries' moments, so float32 serves, as it would not for keys.
        queries = query.float().view(len(query), num_kv_heads, -1, head_dim).transpose(0, 1)
        queries = queries.flatten(1, 2)
        self.num_tokens += keys.shape[1]
        self._num_queries += queries.shape[1]
        self._key_sum += keys.sum(1)
        self._key_moment += keys.mT @ keys
        self._query_moment += queries.mT @ queries
        if self._turns is not None:
            turns = self._turns.length * self._turns.table(
                positions, stepped=True
            )  # [num_tokens, num_rows]
            self._turn_sum += turns.sum(0)
            self._turn_moment += turns.T @ turns
            self._key_turn_moment += keys.mT @ turns

    def add_start(self, key: torch.Tensor, value: torch.Tensor) -> None:
        """Adds a sequence's first tokens: [num_first, num_kv_heads, head_dim], any float dtype."""
        self._num_starts += 1
        self._start_sums += torch.stack((key, value)).double().transpose(1, 2)

    def result(self) -> KeyStatistics:
        """The statistics of what was added, at least one token."""
        mean = self._key_sum / self.num_tokens
        moment = self._key_moment / self.num_tokens
        c = torch.zeros_like(mean)
        if self._turns is not None:
            c = self._turning_mean(self._turns)
            part = self._turning_part(
                self._turns, c
            )  # [num_kv_heads, head_dim, num_rows]: R_p c = part t_p
            cross = self._key_turn_moment / self.num_tokens @ part.mT
            moment = (
                moment - cross - cross.mT + part @ (self._turn_moment / self.num_tokens) @ part.mT
            )
            mean = mean - part @ (self._turn_sum / self.num_tokens)
        covariance = moment - mean[:, :, None] * mean[:, None, :]
        queries = self._query_moment / self._num_queries
        first = (self._start_sums / max(self._num_starts, 1)).float()
        return KeyStatistics(
            mean.float(), c.float(), covariance.float(), queries.float(), first[0], first[1]
        )

    def _turning_mean(self, turns: Turns) -> torch.Tensor:
        """Mean of keys before rotary embedding, in the pairs that `TurningMean.strongest` picks."""
        num_pairs = len(turns.pairs)
        first, second = turns.pairs.long().unbind(-1)
        j = torch.arange(num_pairs)
        sums = self._key_turn_moment
        # R_p^T k, pair by pair, over the square of what the embedding lengthens keys by.
        length_sq = self._turn_moment.diagonal().view(2, num_pairs).sum(0)
        c = torch.zeros_like(self._key_sum)
        c[:, first] = (sums[:, first, j] + sums[:, second, num_pairs + j]) / length_sq
        c[:, second] = (sums[:, second, j] - sums[:, first, num_pairs + j]) / length_sq
        strongest = TurningMean.strongest(c.float(), turns, num_turning(turns))
        return c * (strongest.coefficients(c.shape[1], c.dtype) != 0)

    def _turning_part(self, turns: Turns, c: torch.Tensor) -> torch.Tensor:
        num_pairs = len(turns.pairs)
        first, second = turns.pairs.long().unbind(-1)
        j = torch.arange(num_pairs)
        part = torch.zeros_like(self._key_turn_moment)
        part[:, first, j], part[:, first, num_pairs + j] = c[:, first], -c[:, second]
        part[:, second, j], part[:, second, num_pairs + j] = c[:, second], c[:, first]
        return part


def join_heads(parts: Sequence[KeyStatistics], replicas: int) -> KeyStatistics:
    """The statistics of a whole layer from those of each tensor-parallel rank, in rank order.

    Ranks hold consecutive heads. With more ranks than heads, `replicas` consecutive ranks hold the
    same head, and different queries of it.
    """
    groups = [parts[i : i + replicas] for i in range(0, len(parts), replicas)]
    firsts = zip(*(group[0].tensors for group in groups), strict=True)
    queries = [torch.stack([part.query_moment for part in group]).mean(0) for group in groups]
    return replace(KeyStatistics(*map(torch.cat, firsts)), query_moment=torch.cat(queries))
