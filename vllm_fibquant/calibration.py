# SPDX-License-Identifier: Apache-2.0
"""What is known of a model's keys and queries: statistics, their file, and where it is found.

A file (`<name>.fqcal`) is, little-endian and without padding:

    offset          bytes           content
    0               8               magic "FIBQCALB"
    8               4               format version, uint32
    12              4               header_bytes, uint32
    16              header_bytes    JSON object, UTF-8: model, num_tokens, num_first, layers, each
                                    with name, num_kv_heads and head_dim
    ...             statistics      float32, layer after layer: key_mean, key_covariance,
                                    query_moment
    end - 32        32              SHA-256 of everything before it

Statistics of all heads of a layer are in one file, however many processes serve them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from vllm_fibquant.codebook import cache_dir
from vllm_fibquant.key_map import KeyMap
from vllm_fibquant.key_transform import make_transform
from vllm_fibquant.sealed import seal, unseal

MAGIC = b"FIBQCALB"
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class KeyStatistics:
    """What was measured of one layer, over all tokens but the first of each sequence.

    Attributes:
        key_mean: float32 [num_kv_heads, head_dim], mean of keys after rotary embedding.
        key_covariance: float32 [num_kv_heads, head_dim, head_dim].
        query_moment: float32 as key_covariance, mean of q q^T over the queries that read the head.
    """

    key_mean: torch.Tensor
    key_covariance: torch.Tensor
    query_moment: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(num_kv_heads, head_dim)."""
        return self.key_mean.shape[0], self.key_mean.shape[1]

    def heads(self, begin: int, end: int) -> KeyStatistics:
        """The statistics of KV heads begin to end - 1."""
        return KeyStatistics(
            *(x[begin:end] for x in (self.key_mean, self.key_covariance, self.query_moment))
        )


@dataclass(frozen=True, eq=False)
class Calibration:
    """The content of a calibration file.

    Attributes:
        model: fingerprint of the model it was measured on.
        num_tokens: tokens that were measured.
        num_first: first tokens of each sequence that were left out.
        layers: statistics by the name of the layer.
        digest: SHA-256 of the file, hexadecimal.
    """

    model: str
    num_tokens: int
    num_first: int
    layers: Mapping[str, KeyStatistics]
    digest: str

    def key_map(
        self, layer: str, begin: int, end: int, num_plain: int, index_bytes: int = 0
    ) -> KeyMap:
        """The map of the keys of KV heads begin to end - 1 of a layer.

        Args:
            num_plain: first tokens whose keys are encoded as they are.
            index_bytes: those of a key, to transform keys; 0 to subtract their mean alone.
        """
        part = self.layers[layer].heads(begin, end)
        transform = None
        if index_bytes:
            transform = make_transform(part.key_covariance, part.query_moment, index_bytes)
        return KeyMap(part.key_mean.contiguous(), num_plain, transform)


def pack_calibration(
    model: str, num_tokens: int, num_first: int, layers: Mapping[str, KeyStatistics]
) -> bytes:
    """The content of the file of these statistics."""
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
        np.ascontiguousarray(x.numpy(), "<f4").tobytes()
        for s in layers.values()
        for x in (s.key_mean, s.key_covariance, s.query_moment)
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
        sizes = [heads * dim * (1 + 2 * dim) for heads, dim in shapes.values()]
        known = header["model"], header["num_tokens"], header["num_first"]
    except (ValueError, KeyError, TypeError) as error:
        raise refuse(f"must have a valid header, got {type(error).__name__}: {error}") from error
    if len(sealed.data) != 4 * sum(sizes):
        raise refuse(f"must hold {4 * sum(sizes)} bytes of statistics, got {len(sealed.data)}")
    floats = torch.from_numpy(np.frombuffer(sealed.data, "<f4").astype(np.float32))
    if not torch.isfinite(floats).all():
        raise refuse("must hold finite values, got others")
    layers = {}
    for (layer, (heads, dim)), part in zip(shapes.items(), floats.split(sizes), strict=True):
        mean, covariance, moment = part.split([heads * dim] + 2 * [heads * dim * dim])
        square = (heads, dim, dim)
        layers[layer] = KeyStatistics(
            mean.view(heads, dim), covariance.view(square), moment.view(square)
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


def default_path(model: str) -> Path:
    """Where the calibration of a model is, unless another path is given."""
    return cache_dir().parent / "calibrations" / f"{model}.fqcal"


class StatisticsCollector:
    """Sums over the keys and queries of one layer, in float64.

    Args:
        num_kv_heads, head_dim: of the layer, in this process.
    """

    def __init__(self, num_kv_heads: int, head_dim: int) -> None:
        self.num_tokens = self._num_queries = 0
        self._key_sum = torch.zeros(num_kv_heads, head_dim, dtype=torch.float64)
        self._key_moment = torch.zeros(num_kv_heads, head_dim, head_dim, dtype=torch.float64)
        self._query_moment = torch.zeros_like(self._key_moment)

    def add(self, query: torch.Tensor, key: torch.Tensor) -> None:
        """Adds tokens: query [num_tokens, num_q_heads, head_dim], key [num_tokens, num_kv_heads,
        head_dim], both of any float dtype."""
        num_kv_heads, head_dim = self._key_sum.shape
        keys = key.double().transpose(0, 1)
        queries = query.double().view(len(query), num_kv_heads, -1, head_dim).transpose(0, 1)
        queries = queries.flatten(1, 2)
        self.num_tokens += keys.shape[1]
        self._num_queries += queries.shape[1]
        self._key_sum += keys.sum(1)
        self._key_moment += keys.transpose(1, 2) @ keys
        self._query_moment += queries.transpose(1, 2) @ queries

    def result(self) -> KeyStatistics:
        """The statistics of what was added, at least one token."""
        mean = self._key_sum / self.num_tokens
        covariance = self._key_moment / self.num_tokens - mean[:, :, None] * mean[:, None, :]
        moment = self._query_moment / self._num_queries
        return KeyStatistics(mean.float(), covariance.float(), moment.float())


def join_heads(parts: Sequence[KeyStatistics], replicas: int) -> KeyStatistics:
    """The statistics of a whole layer from those of each tensor-parallel rank, in rank order.

    Ranks hold consecutive heads. With more ranks than heads, `replicas` consecutive ranks hold the
    same head, and different queries of it.
    """
    groups = [parts[i : i + replicas] for i in range(0, len(parts), replicas)]
    return KeyStatistics(
        torch.cat([group[0].key_mean for group in groups]),
        torch.cat([group[0].key_covariance for group in groups]),
        torch.cat([torch.stack([p.query_moment for p in g]).mean(0) for g in groups]),
    )
