# SPDX-License-Identifier: Apache-2.0
"""The evaluation's formats: what they lose, what they store, and that none sees the future."""

from __future__ import annotations

import math

import pytest
import torch

from vllm_fibquant.codec.config import PRESETS
from vllm_fibquant.evaluation import digests, measure, report, retrieval, rivals, texts, trial
from vllm_fibquant.evaluation.formats import FibQuant, Format, Rounded
from vllm_fibquant.evaluation.rows import all_rows
from vllm_fibquant.evaluation.simulate import attend, rotary
from vllm_fibquant.options import parse_options

HEADS, TOKENS, DIM = 2, 160, 64
BASE = 10_000.0


def rotate(x, inverse):
    return rotary(x, BASE, inverse)


def layer(seed=0, num_tokens=TOKENS):
    """Queries, keys with a few strong channels, values."""
    generator = torch.Generator().manual_seed(seed)

    def draw(heads):
        return torch.randn(heads, num_tokens, DIM, generator=generator)

    query, key, value = draw(3 * HEADS), draw(HEADS), draw(HEADS)
    key[..., :4] *= 4
    return query, key, value


def fitted(cache_format):
    cache_format.fit([layer(seed=1)], [rotate])
    return cache_format


FORMATS = [
    Format(),
    Rounded("bfloat16"),
    Rounded("float8_e4m3fn"),
    rivals.Int4PerToken(),
    rivals.GgmlQ4(),
    rivals.GgmlQ4(rotated=True),
    rivals.TurboQuant(3),
    rivals.TurboQuant(2, corrected=True),
    *(rivals.Kivi(bits, residual) for bits in (4, 2) for residual in (0, 32, 128)),
    rivals.KVQuant(3),
    FibQuant(PRESETS["fibquant_2bit"]),
    FibQuant(PRESETS["fibquant_2bit"], window=32, first=4, step=16),
]


def read(cache_format, query, key, value):
    coded = cache_format.roundtrip(0, key, value, rotate)
    return attend(query, (key, value), coded, DIM**-0.5, cache_format)


@pytest.mark.parametrize("cache_format", FORMATS, ids=repr)
def test_no_format_sees_the_future(cache_format):
    """Other tokens from some position on must not change what earlier queries read."""
    fitted(cache_format)
    query, key, value = layer()
    before = read(cache_format, query, key, value)
    for cut in (1, 31, 33, 100, 159):
        changed_key, changed_value = key.clone(), value.clone()
        changed_key[:, cut:] *= -7
        changed_value[:, cut:] += 5
        after = read(cache_format, query, changed_key, changed_value)
        torch.testing.assert_close(after[:, :cut], before[:, :cut], rtol=1e-5, atol=1e-5)
        assert not torch.allclose(after[:, cut:], before[:, cut:], atol=1e-2)


def test_a_leak_would_be_seen():
    """KIVI with no regard for unfinished groups fails the test above."""

    class Leaky(rivals.Kivi):
        def key_start(self, positions):
            return positions + 1

    with pytest.raises(AssertionError):
        test_no_format_sees_the_future(Leaky(2, 0))


@pytest.mark.parametrize("cache_format", FORMATS, ids=repr)
def test_roundtrip_keeps_shapes(cache_format):
    _, key, value = layer()
    coded = fitted(cache_format).roundtrip(0, key, value, rotate)
    assert [x.shape for x in coded] == [key.shape, value.shape]
    assert all(torch.isfinite(x).all() for x in coded)


@pytest.mark.parametrize("bits, mse", [(1, 0.3583), (2, 0.1151), (3, 0.0334), (4, 0.00913)])
def test_turboquant_distortion(bits, mse):
    """Squared error of a unit vector of 64 coordinates: the scalar Lloyd-Max optimum."""
    x = torch.randn(4096, DIM, generator=torch.Generator().manual_seed(2))
    x /= x.norm(dim=-1, keepdim=True)
    error = (rivals.TurboQuant(bits).vectors(x) - x).square().sum(-1).mean()
    assert float(error) == pytest.approx(mse, rel=0.02)


def test_norm_correction_keeps_the_norm():
    x = 3 * torch.randn(64, DIM, generator=torch.Generator().manual_seed(3))
    norms = rivals.TurboQuant(2, corrected=True).vectors(x).norm(dim=-1)
    torch.testing.assert_close(norms, x.norm(dim=-1), rtol=2e-3, atol=0)
    plain = rivals.TurboQuant(2).vectors(x).norm(dim=-1)
    assert plain.mean() < 0.97 * x.norm(dim=-1).mean()


@pytest.mark.parametrize(
    "cache_format, context, bits",
    [
        (Rounded("bfloat16"), 4096, 16),
        (Rounded("float8_e4m3fn"), 4096, 8),
        (rivals.Int4PerToken(), 4096, 4.5),
        (rivals.GgmlQ4(), 4096, 4.5),
        (rivals.TurboQuant(2), 4096, 2.25),
        (rivals.Kivi(2, 0), 1 << 40, 3.0),
        (rivals.Kivi(2, 32), 4096, 3 + 13 * (16.5 + 33) / 8192),
        (rivals.KVQuant(3), 1 << 40, 3.32),
        (FibQuant(PRESETS["fibquant_2bit"]), 4096, 2.25),
        (FibQuant(PRESETS["fibquant_2bit"], 64, 4, 16), 4096, 2.25 + 16 * 68 / 4096),
    ],
    ids=repr,
)
def test_bits(cache_format, context, bits):
    assert cache_format.bits(64, context) == pytest.approx(bits, abs=1e-4)


def test_affine_hits_both_ends_and_halves_its_step():
    x = torch.linspace(-1, 2, 31).unsqueeze(0)
    coded = rivals.affine(x, 2, -1)
    assert set(coded.flatten().tolist()) == {-1.0, 0.0, 1.0, 2.0}
    assert (coded - x).abs().max() <= 0.5001


def test_q4_0_levels():
    x = torch.zeros(32)
    x[0], x[1], x[2] = -8.0, 7.0, 2.4
    decoded = rivals.GgmlQ4().runs(x)
    assert decoded[:3].tolist() == [-8.0, 7.0, 2.0]
    assert not decoded[3:].any()


@pytest.mark.parametrize("residual", [0, 32, 128])
def test_kivi_residuals(residual):
    """Which keys and values a query reads uncompressed."""
    kivi = rivals.Kivi(2, residual)
    positions = torch.tensor([0, 31, 32, 127, 128, 159])
    keys = {0: [0, 0, 32, 96, 128, 128], 32: [0, 0, 32, 96, 128, 128], 128: [0, 0, 0, 0, 128, 128]}
    values = {0: [1, 32, 33, 128, 129, 160], 32: [0, 0, 0, 95, 96, 127], 128: [0, 0, 0, 0, 0, 31]}
    assert kivi.key_start(positions).tolist() == keys[residual]
    assert kivi.value_start(positions).tolist() == values[residual]


def test_kvquant_keeps_outliers_and_refuses_to_run_unfitted():
    _, key, value = layer(num_tokens=400)
    value[0, 200, 5] = 100.0
    kvquant = rivals.KVQuant(3)
    with pytest.raises(ValueError, match="must be fitted first"):
        kvquant.roundtrip(0, key, value, rotate)
    kvquant.fit([layer(seed=1, num_tokens=400)], [rotate])
    coded_key, coded_value = kvquant.roundtrip(0, key, value, rotate)
    assert coded_value[0, 200, 5] == 100.0
    exact = ((rotate(coded_key, True) - rotate(key, True)).abs() < 1e-5).float().mean()
    assert 0.003 < float(exact) < 0.04  # about 1 % by the ranges of another text


def test_our_window_lies_before_the_step():
    options = parse_options("fibquant_2bit", {"fibquant": {"mode": "quality"}})
    ours = FibQuant.from_options(options, step=16)
    assert ours.key_start(torch.tensor([0, 127, 144, 159, 160])).tolist() == [0, 0, 16, 16, 32]
    assert ours.num_first == 4
    options = parse_options("fibquant_2bit", {"fibquant": {"mode": "exact"}})
    exact = FibQuant.from_options(options, step=16)
    assert exact.key_start(torch.tensor([0, 95])).tolist() == [1, 96]


@pytest.mark.parametrize("cache_format", FORMATS, ids=repr)
def test_attend_equals_one_query_at_a_time(cache_format):
    fitted(cache_format)
    query, key, value = layer()
    coded_key, coded_value = cache_format.roundtrip(0, key, value, rotate)
    got = read(cache_format, query, key, value)
    for p in (0, 5, 64, 159):
        j, at = torch.arange(p + 1), torch.tensor([p])
        first = j < cache_format.num_first
        raw_key = ((j >= cache_format.key_start(at)) | first).unsqueeze(-1)
        raw_value = ((j >= cache_format.value_start(at)) | first).unsqueeze(-1)
        keys = torch.where(raw_key, key[:, : p + 1], coded_key[:, : p + 1])
        values = torch.where(raw_value, value[:, : p + 1], coded_value[:, : p + 1])
        q = query[:, p].unflatten(0, (HEADS, -1))
        weights = (q @ keys.mT * DIM**-0.5).softmax(-1)
        want = (weights @ values).flatten(0, 1)
        torch.testing.assert_close(got[:, p], want, rtol=1e-4, atol=1e-5)


def test_rotary_turns_by_position_and_back():
    _, key, _ = layer()
    turned = rotate(key, False)
    torch.testing.assert_close(turned[:, 0], key[:, 0])
    assert not torch.allclose(turned[:, 1], key[:, 1], atol=0.1)
    torch.testing.assert_close(rotate(turned, True), key, rtol=1e-4, atol=1e-4)


def test_rows_are_unique_and_quick_ones_few():
    rows = all_rows(16)
    assert len({row.name for row in rows}) == len(rows)
    assert len({row.identity for row in rows if row.group != "check"}) == len(
        [row for row in rows if row.group != "check"]
    )
    assert 5 <= sum(row.quick for row in rows) <= 16


def characters(text):
    return [ord(letter) for letter in text]


class Letters:
    """A tokenizer whose tokens are letters, and whose texts begin with a token of their own."""

    begin = (1,)
    encode = staticmethod(characters)


def test_passkeys_are_hidden_and_asked_for():
    sizes = texts.Sizes(passkeys=((1, 2), (4, 2)), passkey_length=500)
    units = list(texts.passkey_units(Letters, sizes))
    assert [len(unit.spans) for unit in units] == [1, 1, 4, 4]
    assert {unit.tokens[0] for unit in units} == {1}
    for unit in units:
        read_back = "".join(map(chr, unit.tokens))
        for begin, end in unit.spans:
            assert read_back.count(read_back[begin:end]) == 2, "once hidden, once answered"
    assert units[0].depths != units[1].depths
    assert max(units[2].depths) > 0.75


def test_more_pass_keys_are_spread_as_twenty_are():
    assert texts.spread_keys(0) == texts.spread_keys(20) == texts.Sizes.passkeys
    assert sum(n * count for n, count in texts.spread_keys(200)) == 200


def test_keys_found_by_one_alone():
    """McNemar's exact test: of 5 answers that one row alone gets right, none is the other's in 2 of
    2^5 cases; as many on both sides say nothing."""
    first, other = [True] * 6 + [False], [True] + [False] * 6
    assert trial.only_one_found(first, other) == (5, 0, 2 / 2**5)
    assert trial.only_one_found(other, first) == (0, 5, 2 / 2**5)
    assert trial.only_one_found(first, first) == (0, 0, 1)
    assert trial.only_one_found([True, False, True], [False, True, True]) == (1, 1, 1)


def test_many_facts_are_hidden_in_a_long_text_and_some_asked_for():
    unit, other, longer = retrieval.retrieval_units(Letters, (6000,), 3)
    assert other.name != unit.name and other.tokens[-600:] != unit.tokens[-600:]
    assert not set(map(len, (other.tokens, longer.tokens))) - {6000}
    assert len(unit.tokens) == 6000 and unit.tokens[0] == 1
    assert len(unit.spans) == len(unit.depths) == retrieval.NUM_ASKED + retrieval.NUM_VALUES
    read_back = "".join(map(chr, unit.tokens))
    hay, _, questions = read_back.partition(retrieval.QUESTION)
    facts = hay.count("One of the special magic numbers")
    assert facts == retrieval.NUM_KEYS + retrieval.NUM_VALUES
    for begin, end in unit.spans:
        number = read_back[begin:end]
        assert hay.count(f"is:{number}.") == questions.count(number) == 1
        assert hay.index(number) < len(hay) - retrieval.NEAREST
    of_several = [int(read_back[a:b]) for a, b in unit.spans[-retrieval.NUM_VALUES :]]
    assert [hay.index(str(n)) for n in of_several] == sorted(hay.index(str(n)) for n in of_several)
    with pytest.raises(ValueError, match="give a longer text"):
        list(retrieval.retrieval_units(Letters, (10_000_000,), 1))
    with pytest.raises(ValueError, match="length must leave 384 tokens"):
        list(retrieval.retrieval_units(Letters, (2000,), 1))


def test_paragraphs_of_question_files(tmp_path):
    squad, hotpot = tmp_path / "squad.json", tmp_path / "hotpot.json"
    squad.write_text('{"data": [{"paragraphs": [{"context": "One\\n two"}, {"context": "3"}]}]}')
    assert retrieval.paragraphs(squad) == ["One two", "3"]
    hotpot.write_text('[{"context": [["A", ["One.", " Two."]], ["B", ["3."]]]}]')
    assert retrieval.paragraphs(hotpot) == ["A: One. Two.", "B: 3."]
    hotpot.write_text("[]")
    with pytest.raises(ValueError, match="format of SQuAD or HotpotQA"):
        retrieval.paragraphs(hotpot)


def test_texts_of_all_sources_begin_as_the_model_expects(tmp_path):
    own = tmp_path / "own.txt"
    own.write_text("x" * 400)
    units = texts.text_units(Letters, ["prose", "code", str(own)], 100, 2)
    assert [len(unit.tokens) for unit in units] == [100] * 6
    assert {unit.tokens[0] for unit in units} == {1}
    assert len({unit.name for unit in units}) == 6
    with pytest.raises(ValueError, match=r"must be prose, code or the path of a file, got 'poem'"):
        texts.text_units(Letters, ["poem"], 100, 2)


def test_texts_of_one_name_are_refused(tmp_path):
    """Results are kept by the names of texts."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "own.txt").write_text(folder * 200)
    same = [str(tmp_path / folder / "own.txt") for folder in ("a", "b")]
    with pytest.raises(ValueError, match=r"a name of its own, got own.txt more than once"):
        texts.text_units(Letters, same, 100, 1)


def test_divergence_and_its_quantile():
    """Pieces of the vocabulary's distributions give what whole ones give."""
    generator = torch.Generator().manual_seed(5)
    truth, states = torch.randn(2, 300, 8, generator=generator)
    head = torch.randn(50, 8, generator=generator)
    tokens = torch.randint(50, (300,), generator=generator).tolist()
    result = measure.measure_text(lambda x: x @ head.T, tokens, truth, states, far=200)
    want, got = (truth @ head.T).log_softmax(-1)[:-1], (states @ head.T).log_softmax(-1)[:-1]
    kl = (want.exp() * (want - got)).sum(-1)
    loss = [-got[i, tokens[i + 1]] for i in range(299)]
    assert result["num"] == 299 and result["far_num"] == 99
    assert result["kl"] == pytest.approx(float(kl.mean()), rel=1e-5)
    assert result["far_kl"] == pytest.approx(float(kl[200:].mean()), rel=1e-5)
    assert result["loss"] == pytest.approx(float(torch.stack(loss).mean()), rel=1e-5)
    greatest = kl.sort(descending=True).values
    assert result["worst"] == pytest.approx(greatest[: measure.NUM_WORST].tolist(), rel=1e-3)
    four = [result] * 4  # 1,196 positions: one of them may be greater
    assert measure.quantile_of_worst(four) == result["worst"][0]
    assert measure.quantile_of_worst(four, 0.01) == pytest.approx(float(greatest[2]), rel=1e-3)
    with pytest.raises(ValueError, match="take fewer texts"):
        measure.quantile_of_worst([result] * 200)


def test_sliding_windows_hide_what_lies_before():
    query, key, value = layer()
    got = attend(query, (key, value), (key, value), DIM**-0.5, None, window=40)
    for p in (0, 39, 40, 159):
        begin = max(0, p - 39)
        q = query[:, p].unflatten(0, (HEADS, -1))
        weights = (q @ key[:, begin : p + 1].mT * DIM**-0.5).softmax(-1)
        want = (weights @ value[:, begin : p + 1]).flatten(0, 1)
        torch.testing.assert_close(got[:, p], want, rtol=1e-4, atol=1e-5)


def test_rotation_helps_q4_0_against_outliers():
    """Keys with a few strong channels: the case it was made for."""
    _, key, value = layer()
    key[..., 8] *= 40
    plain, turned = (
        rivals.GgmlQ4(rotated=r).roundtrip(0, key, value, rotate) for r in (False, True)
    )
    errors = [float((x[0] - key).square().mean()) for x in (plain, turned)]
    assert errors[1] < 0.8 * errors[0]
    matrix = rivals.hadamard(64)
    torch.testing.assert_close(matrix @ matrix, torch.eye(64), rtol=0, atol=1e-5)


def test_texts_that_are_too_short_are_refused():
    with pytest.raises(ValueError, match=r"must have 10000000 tokens"):
        texts.chunks_of(texts.EVALUATION, characters, 1_000_000, 10)


def test_summary_of_known_numbers():
    row = next(row for row in all_rows(16) if row.name == "2bit, quality")
    lines = [
        {"kind": "text", "num": 10, "loss": math.log(4), "loss_increase": math.log(2), "kl": 0.5,
         "same": 1.0, "far_num": 5, "far_loss": 1.0, "far_loss_increase": 0.0, "far_kl": 0.1,
         "far_same": 1.0},
        {"kind": "text", "num": 10, "loss": math.log(4), "loss_increase": math.log(2), "kl": 0.7,
         "same": 0.5, "far_num": 5, "far_loss": 1.0, "far_loss_increase": 0.0, "far_kl": 0.3,
         "far_same": 1.0},
        {"kind": "passkey", "right": [True, False], "equal": [5, 0]},
        {"kind": "greedy", "right": [False], "equal": [7]},
    ]  # fmt: skip
    lines = [{"worst": [0.9, 0.8], "unit": str(i), **line} for i, line in enumerate(lines)]
    summary = report.summarise(row, 64, lines)
    assert summary.get("kl_worst") == 0.9
    assert summary.get("perplexity") == pytest.approx(4)
    assert summary.get("delta") == pytest.approx(1)
    assert summary.get("kl") == pytest.approx(0.6)
    assert summary.get("kl_error") == pytest.approx(0.1)
    assert summary.passkey == {2: (1, 2)}
    assert summary.get("greedy") == 7
    assert summary.num_tokens == 20


def test_digest_of_code(tmp_path, monkeypatch):
    """It follows statements, not their place: what moves is current, what changes is not."""

    def digest(**modules):
        for path in tmp_path.rglob("*.py"):
            path.unlink()
        for name, text in modules.items():
            path = tmp_path / f"{name.replace('__', '/')}.py"
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
        digests.code_digest.cache_clear()
        return digests.code_digest(False)

    monkeypatch.setattr(digests, "PACKAGE_DIR", tmp_path)
    monkeypatch.setattr(digests, "_MEASURING", ("codec", "one.py"))
    try:
        here = digest(one="import a\ndef f():\n    return 1\nX = 2\n", codec__x="Y = 3\n")
        text = '"""Words."""\nY = 3\ndef f():\n    """Say."""\n    from b import c\n    return 1\n'
        assert digest(one="from c import d\nX = 2\n", codec__y=text) == here
        assert digest(one="X = 2\n", codec__y=text.replace("1", "2")) != here
        assert digest(one="X = 2\n", codec__y=text, other="Z = 4\n") == here
        assert digest(one="X = 2\n", codec__y=text, codec__z="Z = 4\n") != here
        used = "from vllm_fibquant.two import x\nX = 2\n"
        assert digest(one=used, codec__y=text, two="") == here
        assert digest(one=used, codec__y=text, two="Z = 4\n") != here
        assert digest(one=used.replace("two", "ops.two"), codec__y=text, ops__two="Z = 4\n") == here
    finally:
        digests.code_digest.cache_clear()
