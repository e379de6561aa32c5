# SPDX-License-Identifier: Apache-2.0
"""Keys encoded through a map: the kernel against the oracle, and what the map is worth."""

from __future__ import annotations

import pytest
import torch

from tests.ops.test_attention import HEAD_DIMS, attend_in_chunks, check_against_oracle, codec_of
from tests.paged import Paged, make_paged
from vllm_fibquant import ops
from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.keys.key_map import FirstMeans, KeyMap, TurningMean, Turns
from vllm_fibquant.keys.transform import make_transform, transform_problem
from vllm_fibquant.ops import Attend, Batch, Copies, Pages
from vllm_fibquant.ops.selfcheck import run_self_check

NUM_PLAIN = 4


def make_turns(head_dim: int, num_positions: int = 1152) -> Turns:
    """Neighbours are paired, three quarters of them turn, a third of these slowly, and keys are
    lengthened by a tenth."""
    pairs = torch.arange(head_dim // 4 * 3).view(-1, 2).to(torch.int32)
    frequency = 1000 ** -(torch.arange(len(pairs)).double() / len(pairs))
    return Turns(pairs, frequency, 1.1, num_positions)


def make_map(
    head_dim: int,
    num_kv_heads: int = 2,
    length: float = 3.0,
    index_bytes: int = 0,
    turning: bool = False,
    num_first: int = 0,
) -> KeyMap:
    """A map of long means; with index_bytes also a transform, of keys whose variances fall; with
    num_first also means of first tokens."""
    generator = torch.Generator().manual_seed(7)
    mean = torch.randn(num_kv_heads, head_dim, generator=generator) * length
    transform = None
    if index_bytes:
        shape = (num_kv_heads, head_dim, head_dim)
        skew = torch.randn(shape, generator=generator) * torch.linspace(2, 0.1, head_dim)
        queries = torch.randn(shape, generator=generator)
        transform = make_transform(skew @ skew.mT, queries @ queries.mT / head_dim, index_bytes)
    turns = None
    if turning:
        c = torch.randn(num_kv_heads, head_dim, generator=generator) * length
        turns = TurningMean.strongest(c, make_turns(head_dim), 9)
    first = None
    if num_first:
        shape = (2, num_kv_heads, num_first, head_dim)
        first = FirstMeans(*torch.randn(shape, generator=generator))
    return KeyMap(mean, NUM_PLAIN, transform, turns, first)


def mapped(
    seq_lens: list[int],
    query_lens: list[int],
    *,
    head_dim: int = 64,
    preset: str = "fibquant_2bit",
    transform: bool = False,
    turning: bool = False,
    num_first: int = 0,
    **settings,
) -> Paged:
    codec = codec_of(preset, head_dim)
    index_bytes = transform * codec.layout.key_index_bytes
    key_map = make_map(head_dim, index_bytes=index_bytes, turning=turning, num_first=num_first)
    return make_paged(codec, seq_lens, query_lens, key_map=key_map, **settings)


KINDS = {
    "means": {},
    "transform": {"transform": True},
    "turning": {"turning": True},
    "first": {"num_first": 3},
    "all": {"transform": True, "turning": True, "num_first": NUM_PLAIN},
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> dict[str, bool]:
    return KINDS[request.param]


@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
@pytest.mark.parametrize("preset", ["fibquant_k5v3", "fibquant_4bit", "fibquant_1bit"])
@pytest.mark.parametrize("turning", [False, True], ids=["means", "turning"])
def test_every_code(preset: str, head_dim: int, turning: bool) -> None:
    settings = {"head_dim": head_dim, "preset": preset, "turning": turning}
    check_against_oracle(mapped([70, 1, 33, 5], [1, 1, 4, 5], group_size=3, **settings))


@pytest.mark.parametrize("group_size", [1, 2, 3, 4, 5, 7, 8])
def test_every_number_of_queries(group_size: int) -> None:
    check_against_oracle(mapped([70, 33], [1, 3], group_size=group_size, turning=True))


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize(
    "preset", ["fibquant_4bit", "fibquant_3bit", "fibquant_2bit", "fibquant_1bit"]
)
def test_every_transformed_code(preset: str, head_dim: int) -> None:
    settings = {"head_dim": head_dim, "preset": preset, "transform": True}
    check_against_oracle(mapped([70, 1, 33, 5], [1, 1, 4, 5], group_size=3, **settings))


@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize("turning", [False, True], ids=["mean", "turning"])
def test_records_of_transformed_keys(head_dim: int, turning: bool) -> None:
    """The same bytes as the oracle's, but for ties; and NaN, infinite, huge and zero keys."""
    codec = codec_of("fibquant_2bit", head_dim)
    key_map = make_map(head_dim, index_bytes=codec.layout.key_index_bytes, turning=turning)
    generator = torch.Generator().manual_seed(1)
    key, value = torch.randn(2, 400, 2, head_dim, generator=generator)
    positions = torch.arange(400).flip(0)
    mean = key_map.mean_at(positions, torch.float32).expand(400, 2, head_dim)
    key += mean
    key[0, 0, 3], key[1, 0, 5], key[2] = torch.nan, torch.inf, 1e38
    key[3], key[4] = mean[3], 0.0
    caches = torch.zeros(2, 25, 2, 16, codec.layout.record_bytes, dtype=torch.uint8)
    slots = torch.arange(400)
    counts = [
        kernels.encode_kv(key, value, slots, Pages(cache, codec, key_map, kernels), positions)
        for kernels, cache in zip((ops.CPU, ops.REFERENCE), caches, strict=True)
    ]
    assert counts == [2, 2]
    differs = (caches[0] != caches[1]).any(-1)
    assert differs.float().mean() < 0.01
    records = caches[0].transpose(1, 2).flatten(0, 1)
    decoded, _ = key_map.decode_records(records, codec, torch.float32, positions)
    assert torch.isfinite(decoded).all()
    assert torch.allclose(decoded[3], mean[3], atol=1e-5)  # zero is coded as zero
    assert torch.equal(decoded[0, 0], mean[0, 0])


@pytest.mark.parametrize("raw", [False, True], ids=["codes", "raw"])
@pytest.mark.parametrize(
    "options",
    [{"window": 2}, {"window": 7}, {"window": 66}, {"soft_cap": 2.0}, {"sinks": True}],
    ids=str,
)
def test_options(options: dict, raw: bool, kind: dict) -> None:
    paged = mapped([66, 640, 5, 3], [60, 2, 5, 1], group_size=3, **kind)
    options = dict(options)
    if options.pop("sinks", False):
        options["sinks"] = torch.linspace(-2, 2, 6)
    if raw:
        options |= paged.raw
    check_against_oracle(paged, **options)


def test_copies_of_first_and_recent_tokens(kind: dict) -> None:
    """Copies are in the model's basis, beside codes that are not."""
    paged = mapped([66, 30, 6], [3, 1, 1], group_size=3, **kind)
    num_first, num_recent = 2, 8
    starts = torch.tensor([0, 66, 96])
    contexts = [63, 29, 5]
    table = torch.full((3, num_first + num_recent), -1, dtype=torch.int32)
    for req, context in enumerate(contexts):
        columns = torch.cat((torch.arange(num_first), context - num_recent + torch.arange(8)))
        is_copied = (columns >= 0) & (columns < context)
        is_copied[num_first:] &= columns[num_first:] >= num_first
        is_copied[-3] = False  # one was taken
        table[req, is_copied] = (starts[req] + columns[is_copied]).to(torch.int32)
    copies = Copies(paged.key, paged.value, num_first), table
    check_against_oracle(paged, copies=copies, **paged.raw)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_model_dtypes(dtype: torch.dtype) -> None:
    check_against_oracle(mapped([200, 77], [1, 50], group_size=4, dtype=dtype))


def test_every_instruction_set(isa: str, kind: dict) -> None:
    for query_lens in ([1, 1], [9, 20]):
        paged = mapped([70, 530], query_lens, group_size=3, **kind)
        check_against_oracle(paged, window=300, soft_cap=4.0)


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"soft_cap": 3.0}], ids=str)
def test_bit_equal_however_the_prompt_is_cut(options: dict, kind: dict) -> None:
    paged = mapped([1100], [1100], group_size=3, **kind)
    whole = attend_in_chunks(paged, [1100], **options)
    for chunks in ([512, 588], [1, 2, 1, 1096], [3, 1049, 48], [1073] + [1] * 27):
        cut = attend_in_chunks(paged, chunks, **options)
        assert torch.equal(whole, cut)


def test_bit_equal_for_any_number_of_threads(kind: dict) -> None:
    paged = mapped([1100], [1], group_size=3, **kind)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(paged.attend())
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], other) for other in results)


def test_an_empty_map_changes_nothing_but_the_order_of_sums() -> None:
    codec = codec_of("fibquant_2bit", 64)
    plain = make_paged(codec, [70, 5], [1, 5], group_size=3)
    nothing = KeyMap(torch.zeros(2, 64), 0)
    paged = make_paged(codec, [70, 5], [1, 5], group_size=3, key_map=nothing)
    assert torch.equal(plain.cache, paged.cache)
    assert torch.equal(plain.attend(), paged.attend())


def test_first_means_are_worth_it() -> None:
    """First tokens that are much like other requests' are read with a tenth of the error."""
    generator = torch.Generator().manual_seed(3)
    mean = torch.randn(2, 2, 4, 64, generator=generator)
    key, value = (
        m.transpose(0, 1) + 0.1 * torch.randn(4, 2, 64, generator=generator) for m in mean
    )
    codec = codec_of("fibquant_2bit", 64)
    errors = []
    for first in (None, FirstMeans(*mean)):
        key_map = KeyMap(torch.zeros(2, 64), NUM_PLAIN, first=first)
        cache = torch.zeros(1, 2, 16, codec.layout.record_bytes, dtype=torch.uint8)
        pages = ops.pages_of(cache, codec, key_map)
        ops.encode_kv(key, value, torch.arange(4), pages, torch.arange(4))
        query, out, exact = torch.randn(3, 1, 2, 64, generator=torch.Generator().manual_seed(4))
        batch = (torch.tensor([0, 1]), torch.tensor([4]), torch.tensor([[0]]))
        batch = Batch(*(x.to(torch.int32) for x in batch))
        ops.paged_attention(query, out, pages, batch, Attend(0.125))
        weights = (torch.einsum("qhd,khd->hqk", query, key) * 0.125).softmax(-1)
        exact = torch.einsum("hqk,khd->qhd", weights, value)
        errors.append(float((out - exact).norm()))
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("turning", [False, True], ids=["mean", "turning"])
def test_a_mean_is_worth_a_bit(turning: bool) -> None:
    """Keys with a common part: at the same bytes scores err less than half as much."""
    key_map = make_map(64, turning=turning)
    codec, positions = codec_of("fibquant_2bit", 64), torch.arange(300) + NUM_PLAIN
    generator = torch.Generator().manual_seed(4)
    noise, query = torch.randn(2, 300, 2, 64, generator=generator)
    key = noise + key_map.mean_at(positions, torch.float32)
    records = key_map.encode_records(key, key, codec, positions)
    mapped, _ = key_map.decode_records(records, codec, torch.float32, positions)
    plain = codec.decode_records(codec.encode_records(key, key))[0]

    def error(decoded: torch.Tensor) -> float:
        scores = torch.einsum("qhd,khd->hqk", query, key - decoded)
        scores = scores - scores.mean(-1, keepdim=True)  # what all keys share changes no softmax
        return float(scores.square().mean().sqrt())

    assert error(mapped) < 0.5 * error(plain)


def test_the_self_check_covers_maps(kind: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    codec = codec_of("fibquant_2bit", 64)
    key_map = make_map(
        64, num_kv_heads=3, length=1.0, index_bytes=16 * kind.get("transform", False),
        turning=kind.get("turning", False), num_first=kind.get("num_first", 0),
    )  # fmt: skip
    result = run_self_check(codec, torch.float32, 9, 3, 16, key_map=key_map)
    assert 0 < result.error <= result.tolerance
    attend = ops.CPU.paged_attention

    def without_map(query, out, pages, *rest):
        return attend(query, out, ops.pages_of(pages.cache, pages.codec), *rest)

    monkeypatch.setattr(ops.CPU, "paged_attention", without_map)
    with pytest.raises(RuntimeError, match="refusing to serve"):
        run_self_check(codec, torch.float32, 9, 3, 16, key_map=key_map)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [3.0, 350.0])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("preset", [name for name in PRESETS if name != "fibquant"])
def test_the_self_check_allows_what_long_keys_make_of_rounding(
    preset: str, head_dim: int, length: float, dtype: torch.dtype, kind: dict
) -> None:
    """Means of the length that Qwen2's key biases have, and what a wrong one makes of them."""
    codec = codec_of(preset, head_dim)
    index_bytes = codec.layout.key_index_bytes if kind.get("transform") else 0
    if index_bytes and transform_problem(codec.key.spec, head_dim):
        pytest.skip("this preset's keys have no transform")
    key_map = make_map(
        head_dim, length=length * head_dim**-0.5, index_bytes=index_bytes,
        turning=kind.get("turning", False), num_first=kind.get("num_first", 0),
    )  # fmt: skip
    result = run_self_check(codec, dtype, 6, 2, 16, key_map=key_map)
    assert 0 < result.error <= result.tolerance
    # Still far below what outputs are: they are of the length of a few.
    assert result.tolerance < (2e-3 if dtype == torch.float32 else 0.2)


@pytest.mark.parametrize(
    ("key_map", "message"),
    [
        (lambda: make_map(64, num_kv_heads=3), r"key_map.mean must be .*\[2, 64\]"),
        (lambda: make_map(128), r"key_map.mean must be .*\[2, 64\]"),
        (lambda: make_map(64, index_bytes=8), "a transform to 16 index bytes.* got one to 8"),
        (lambda: KeyMap(torch.zeros(2, 64, dtype=torch.float64), 4), "contiguous float32"),
        (lambda: KeyMap(torch.full((2, 64), torch.nan), 4), "must be finite"),
        (lambda: KeyMap(torch.zeros(2, 64), -1), "num_plain must be at least 0"),
        (lambda: make_map(64, num_first=NUM_PLAIN + 1), "at most 4, 64.*, got .*2, 5, 64"),
    ],
)
def test_bad_maps_are_refused(key_map, message: str) -> None:
    paged = make_paged(codec_of("fibquant_2bit", 64), [30, 9], [1, 1])
    with pytest.raises(ValueError, match=message):
        paged.key_map = key_map()
        paged.attend()


def test_positions_are_needed_and_known() -> None:
    paged = mapped([30, 9], [1, 1], turning=True)
    encode = (paged.key, paged.value, paged.slots, paged.pages)
    with pytest.raises(ValueError, match="positions must be .*at least 39.* got None"):
        ops.encode_kv(*encode)
    for wrong in (-1, 1152):
        paged.positions[3] = wrong
        with pytest.raises(ValueError, match=f"positions must be .* got .*{wrong}"):
            ops.encode_kv(*encode, paged.positions)
    paged = mapped([1153], [1], turning=False)
    paged.key_map = make_map(64, turning=True)
    with pytest.raises(ValueError, match="seq_lens must not exceed the positions"):
        paged.attend()


def test_turning_back_undoes_turning() -> None:
    """And the mean at a position is what the embedding makes of it, pair by pair."""
    turns = make_turns(64)
    x = torch.randn(5, 2, 64, generator=torch.Generator().manual_seed(3)).double()
    positions = torch.tensor([0, 1, 17, 400, 1151])
    back = turns.turn(turns.turn(x, positions), positions, back=True)
    assert torch.allclose(back[..., :48], 1.21 * x[..., :48])
    assert not back[..., 48:].any()
    chosen = TurningMean.strongest(x[0].float(), turns, 24).at(positions, 64, torch.float64)
    assert torch.allclose(chosen, turns.turn(x[0].float().double(), positions, stepped=True))
    few = TurningMean.strongest(x[0].float(), turns, 3)
    assert int((few.at(positions, 64, torch.float32)[1] != 0).sum()) == 2 * 2 * 6


def test_slow_pairs_turn_in_steps() -> None:
    """Of 32 positions, by what half a step turns at most."""
    turns = make_turns(64)
    assert 6 < int(turns.is_slow.sum()) < 10
    positions = torch.arange(1152)
    exact, stepped = (turns.table(positions, stepped).unflatten(-1, (2, -1)) for stepped in (0, 1))
    steps = stepped[..., turns.is_slow].unflatten(0, (-1, 32))
    assert torch.equal(steps, steps[:, 16:17].expand_as(steps))
    assert torch.equal(exact[..., ~turns.is_slow], stepped[..., ~turns.is_slow])
    missed = (exact - stepped).square().sum(1).mean(0)
    assert 1e-6 < missed[turns.is_slow].min() < missed.max() <= 0.014


def test_not_with_keep_first() -> None:
    with pytest.raises(ValueError, match="keep_first must be 0 with key_map"):
        mapped([30], [1]).attend(keep_first=2)


def test_the_transform_is_worth_half_of_the_error() -> None:
    """Keys and queries as the statistics say: scores err less than half as much as with means."""
    generator = torch.Generator().manual_seed(2)
    fall = torch.linspace(0, -4, 64).exp()
    mix = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0] * fall
    key = torch.randn(2000, 1, 64, generator=generator) @ mix.T
    query = torch.randn(500, 64, generator=generator)
    codec, mean = codec_of("fibquant_2bit", 64), torch.zeros(1, 64)
    transform = make_transform((mix @ mix.T)[None], torch.eye(64)[None], 16)
    error = []
    for key_map in (KeyMap(mean, 0), KeyMap(mean, 0, transform)):
        records = key_map.encode_records(key, key, codec)
        decoded, _ = key_map.decode_records(records, codec, key.dtype)
        error.append(((key - decoded).squeeze(1) @ query.T).square().mean())
    assert error[1] < 0.5 * error[0]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_transform_loses_nothing_but_what_is_not_coded(head_dim: int, bits: int) -> None:
    """<w, z> = <q, k> exactly where every coordinate is coded."""
    key_map = make_map(head_dim, index_bytes=bits * head_dim // 8)
    transform = key_map.transform
    identity = transform.query_matrix.mT.double() @ transform.key_matrix.double()
    assert torch.allclose(identity, torch.eye(head_dim).double(), atol=1e-5)
    assert torch.equal(transform.key_matrix.bfloat16().float(), transform.key_matrix)
    assert transform.num_coded == head_dim
    assert sum(transform.lengths) == bits * head_dim // 8


@pytest.mark.parametrize("name", ["fibquant_1bit", "fibquant_3bit"])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_one_token_alone_is_stored_as_among_others(isa: str, head_dim: int, name: str) -> None:
    """It reads its matrices as 16-bit halves, and tokens together as floats."""
    codec = codec_of(name, head_dim)
    key_map = make_map(head_dim, index_bytes=codec.layout.key_index_bytes, turning=True)
    key, value = torch.randn(2, 40, 2, head_dim, generator=torch.Generator().manual_seed(4))
    cache = torch.zeros(2, 2, 40, codec.layout.record_bytes, dtype=torch.uint8)
    pages, slots = ops.pages_of(cache, codec, key_map), torch.arange(80)
    positions = torch.arange(40)
    ops.encode_kv(key, value, slots[:40], pages, positions)
    for i in range(40):
        one = slice(i, i + 1)
        ops.encode_kv(key[one], value[one], slots[40:][one], pages, positions[one])
    assert torch.equal(cache[0], cache[1])


def test_places_behind_an_image_keep_keys_up_to_a_distance():
    """A mean as long and as slow as Qwen2's biases (docs/calibration.md), turned by the place of a
    key in the place of its position: codes bear a thousand between them, keep something of a key at
    16,384 and nothing at four times as much, which `compat_images` refuses."""
    from vllm_fibquant.engine.compat_images import MAX_SHIFT

    pairs = torch.arange(128, dtype=torch.int32).view(2, -1).T.contiguous()
    turns = Turns(pairs, 1e6 ** -(torch.arange(64).double() / 64), 1.0, MAX_SHIFT)
    c = torch.zeros(1, 128)
    c[0, pairs[[61, 60, 59, 55]].long()[:, 0]] = torch.tensor([386.0, 331.0, 304.0, 135.0])
    turning = TurningMean.strongest(c, turns, 16)
    key_map = KeyMap(torch.zeros(1, 128), 0, None, turning)
    codec = codec_of("fibquant_3bit", 128)
    position = torch.arange(64)
    key = torch.randn(64, 1, 128, generator=torch.Generator().manual_seed(0))
    key += key_map.mean_at(position, torch.float32)

    def error(shift: int) -> float:
        at = key, codec, position + shift
        found = key_map.decode_records(
            key_map.encode_records(at[0], torch.zeros_like(key), *at[1:]), codec, torch.float32,
            at[2],
        )[0]  # fmt: skip
        return float((found - key).square().mean())

    assert error(MAX_SHIFT // 16) < 1.1 * error(0)
    assert error(MAX_SHIFT) < 0.5  # of the key without its mean, which is as long
    assert error(4 * MAX_SHIFT) > 2
