# SPDX-License-Identifier: Apache-2.0
"""Statistics of keys and queries, and the file that holds them."""

from __future__ import annotations

import hashlib

import pytest
import torch

from tests.keys.test_key_map import make_turns
from vllm_fibquant.keys.calibration import (
    KeyStatistics,
    StatisticsCollector,
    check_calibration,
    join_heads,
    pack_calibration,
    parse_calibration,
)
from vllm_fibquant.keys.key_map import Turns

HEADS, DIM = 2, 16
NAMES = ("key_mean", "turning_mean", "key_covariance", "query_moment", "first_key", "first_value")
NUM_FIRST = 4


def tokens(count: int = 300, num_q_heads: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    mix = torch.randn(DIM, DIM, generator=generator)
    query = torch.randn(count, num_q_heads, DIM, generator=generator) @ mix + 1
    key = torch.randn(count, HEADS, DIM, generator=generator) @ mix - 5
    return query, key


def measured(turns: Turns | None = None, key: torch.Tensor | None = None) -> KeyStatistics:
    query, given = tokens()
    key = given if key is None else key
    collector = StatisticsCollector(HEADS, DIM, turns, NUM_FIRST)
    for i in (100, 200):
        collector.add_start(key[i : i + NUM_FIRST], -key[i : i + NUM_FIRST])
    for begin, end in ((0, 100), (100, 101), (101, 300)):
        collector.add(query[begin:end], key[begin:end], torch.arange(begin, end))
    assert collector.num_tokens == 300
    return collector.result()


def content(**changes) -> bytes:
    given = {"model": "abc", "num_tokens": 300, "layers": {"layer.0": measured()}}
    return pack_calibration(**{**given, **changes})


def test_statistics_are_those_of_all_tokens() -> None:
    query, key = (x.double() for x in tokens())
    found = measured()
    for head in range(HEADS):
        k, q = key[:, head], query[:, 3 * head : 3 * head + 3].reshape(-1, DIM)
        assert torch.allclose(found.key_mean[head].double(), k.mean(0), rtol=1e-5)
        covariance = torch.cov(k.T, correction=0)
        assert torch.allclose(found.key_covariance[head].double(), covariance, rtol=1e-4, atol=1e-4)
        first = (k[100 : 100 + NUM_FIRST] + k[200 : 200 + NUM_FIRST]) / 2
        assert torch.allclose(found.first_key[head].double(), first, rtol=1e-5, atol=1e-5)
        assert torch.equal(found.first_value, -found.first_key)
        moment = q.T @ q / len(q)
        assert torch.allclose(found.query_moment[head].double(), moment, rtol=1e-5, atol=1e-5)


def test_a_mean_that_turns_is_found_and_taken_out() -> None:
    """Of six pairs that turn a fast and a slow one are kept; what is left has the covariance of the
    noise."""
    turns = make_turns(DIM)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(300, HEADS, DIM, generator=generator)
    c = torch.zeros(HEADS, DIM)
    c[:, [0, 1, 8, 9]] = torch.tensor([9.0, -7, 5, 6])
    constant = torch.linspace(-1, 1, DIM)
    key = noise + constant + turns.turn(c, torch.arange(300), stepped=True)
    found = measured(turns, key)
    assert (found.turning_mean - c).abs().max() < 0.3
    assert torch.equal(found.turning_mean != 0, c != 0)
    assert (found.key_mean - constant).abs().max() < 0.3
    for head in range(HEADS):
        left = key - turns.turn(found.turning_mean, torch.arange(300), stepped=True)
        covariance = torch.cov(left[:, head].T.double(), correction=0)
        assert torch.allclose(found.key_covariance[head].double(), covariance, atol=1e-4)
        assert torch.allclose(found.key_mean, left.mean(0), atol=1e-4)
    layers = {"layer.0": found}
    calibration = parse_calibration(pack_calibration("abc", 300, layers), "file")
    key_map = calibration.key_map("layer.0", 0, HEADS, 0, turns=turns)
    positions = torch.arange(300)
    expected = found.key_mean + turns.turn(found.turning_mean, positions, stepped=True)
    assert torch.allclose(key_map.mean_at(positions, torch.float32), expected, atol=1e-5)
    with pytest.raises(ValueError, match="layer layer.0 must have a rotary embedding"):
        calibration.key_map("layer.0", 0, HEADS, 0)


@pytest.mark.parametrize("replicas", [1, 2])
def test_heads_of_several_ranks_are_joined(replicas: int) -> None:
    query, key = tokens(num_q_heads=4)
    parts = []
    for rank in range(2 * replicas):
        per_rank = 2 // replicas
        collector = StatisticsCollector(1, DIM, num_first=NUM_FIRST)
        head = rank // replicas
        mine = query[:, rank * per_rank : (rank + 1) * per_rank]
        collector.add(mine, key[:, head : head + 1], torch.arange(300))
        collector.add_start(key[:NUM_FIRST, head : head + 1], key[4:8, head : head + 1])
        parts.append(collector.result())
    whole = StatisticsCollector(HEADS, DIM, num_first=NUM_FIRST)
    whole.add(query, key, torch.arange(300))
    whole.add_start(key[:NUM_FIRST], key[4:8])
    joined, expected = join_heads(parts, replicas), whole.result()
    for name in NAMES:
        # Moments of queries, up to 30 here, are summed in float32.
        a, b = getattr(joined, name), getattr(expected, name)
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5), name


def test_a_file_is_read_as_it_was_written() -> None:
    calibration, statistics = parse_calibration(content(), "file"), measured()
    assert (calibration.model, calibration.num_tokens, calibration.num_first) == ("abc", 300, 4)
    for name in NAMES:
        read = getattr(calibration.layers["layer.0"], name)
        assert torch.equal(read, getattr(statistics, name)), name
    second = calibration.key_map("layer.0", 1, 2, num_plain=3)
    assert torch.equal(second.mean, statistics.key_mean[1:])
    assert second.num_plain == second.first.num_first == 3
    assert torch.equal(second.first.value, statistics.first_value[1:, :3])
    assert calibration.key_map("layer.0", 0, 2, num_plain=0).first is None


def test_the_digest_tells_files_apart() -> None:
    first, second = content(), content(num_tokens=301)
    assert parse_calibration(first, "a").digest == parse_calibration(first, "b").digest
    assert parse_calibration(first, "a").digest != parse_calibration(second, "a").digest


def with_digest(body: bytes) -> bytes:
    return body + hashlib.sha256(body).digest()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:20], "must be at least 48 bytes, got 20"),
        (lambda c: b"GGUF" + c[4:], "this is no calibration file"),
        (lambda c: c[:8] + b"\x09" + c[9:], "must have format version 3, got 9"),
        (lambda c: c[:-90] + b"\x00" + c[-89:], "it is damaged"),
        (lambda c: c[:-40] + c[-32:], "it is damaged"),
        (lambda c: with_digest(c[:-36]), "bytes of statistics"),
        (lambda c: with_digest(c[:16] + b"}" + c[17:-32]), "must have a valid header"),
        (lambda c: with_digest(c[:-36] + b"\xff\xff\xff\x7f"), "must hold finite values"),
    ],
)
def test_a_bad_file_is_refused(change, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_calibration(change(content()), "file")


@pytest.mark.parametrize(
    ("model", "layer", "shape", "message"),
    [
        ("xyz", "layer.0", (2, 16), "must be of model xyz, got abc"),
        ("abc", "layer.1", (2, 16), "must hold layer layer.1 with 2 KV heads .* got none"),
        ("abc", "layer.0", (4, 16), "4 KV heads of head_dim 16, got 2 and 16"),
    ],
)
def test_another_model_is_refused(model: str, layer: str, shape, message: str) -> None:
    calibration = parse_calibration(content(), "file")
    check_calibration(calibration, "file", "abc", [("layer.0", (2, 16))])
    with pytest.raises(ValueError, match=message):
        check_calibration(calibration, "file", model, [(layer, shape)])


def test_a_text_further_on_has_the_same_scores_and_the_keys_of_its_positions():
    frequency = 1e4 ** -(torch.arange(8).double() / 8)
    turns = Turns(torch.arange(16).view(2, -1).T, frequency, 1.0, 4096)
    torch.manual_seed(0)
    plain = torch.randn(5, 2, 20, dtype=torch.float64)  # the last 4 coordinates do not turn
    at = torch.arange(5)

    def keys(positions):
        turned = turns.turn(plain, positions)
        turned[..., 16:] = plain[..., 16:]
        return turned

    shifted = turns.shift(keys(at), 700)
    assert torch.allclose(shifted, keys(at + 700))
    scores = torch.einsum("qhd,khd->hqk", keys(at), keys(at))
    assert torch.allclose(torch.einsum("qhd,khd->hqk", shifted, shifted), scores)
