# SPDX-License-Identifier: Apache-2.0
"""The judge judged: the emulated kernels with one index, wait or transpose changed are found wrong.

Operands of keys and of values, the wait for copies, the transpose and the mask, for narrow and for
wide row blocks; and what encode stores.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests import emulated as emu
from tests.ops import test_cuda_copies, test_cuda_mapped
from tests.ops.test_copies import make_copies
from tests.ops.test_cuda_emulated import check, codec_of, encode_both, paged_of
from tests.ops.test_retention import other_query
from tests.paged import check_records
from vllm_fibquant.headers import header_digest
from vllm_fibquant.ops import cuda

pytestmark = [
    pytest.mark.long,  # each compiles the kernels
    pytest.mark.skipif(shutil.which("g++") is None, reason="the emulator needs g++"),
]

NARROW, WIDE, WINDOW, ENCODE = "narrow", "wide", "window", "encode"
CHUNK, MAPPED_CHUNK = "chunk", "mapped chunk"
DIRECT = "direct"
MAPPED, MAPPED_WIDE, MAPPED_ENCODE = "mapped", "mapped wide", "mapped encode"
COPIES, COPIES_WIDE, COPIES_MAPPED = "copies", "copies wide", "copies mapped"
COPIES_WINDOW, COPIES_ENCODE = "copies window", "copies encode"
FIRST = "first"
BOTH = (NARROW, WIDE)
BOTH_MAPPED = (MAPPED, MAPPED_WIDE)
ALL_COPIES = (COPIES, COPIES_WIDE, COPIES_MAPPED)
MUTATIONS = {
    "a key register": (
        "attend.h", "a[j].x, b[j].x, a[j].y, b[j].y", "a[j].x, a[j].y, b[j].x, b[j].y", BOTH,
    ),  # fmt: skip
    "a key's token": ("attend.h", "own + bytes_8, high", "own, high", BOTH),
    "a query fragment": ("attend.h", "row % 8 * 4 + part", "part * 8 + row % 8", BOTH),
    "a query tile": ("attend.h", "(i * kSteps + step)", "(step * kTiles + i)", (WIDE,)),
    "a value register": ("attend.h", "x0, x1, x2, x3, p[i]", "x0, x2, x1, x3, p[i]", BOTH),
    "a value's half": ("attend.h", "y1 = permute_bytes(e[0].y, e[1].y, 0x7632)",
                       "y1 = permute_bytes(e[0].y, e[1].y, 0x3276)", BOTH),
    "a value's token": ("attend.h", "(i & 2) / 2 * bytes_8, words[i]",
                        "(i & 2) / 2 * bytes_1, words[i]", BOTH),
    "a value's lane": ("codes.h", "coord / C::kDim * C::kBits", "coord / C::kDim * 8", BOTH),
    "a sign bit": ("codes.h", "(22 - first)", "(21 - first)", BOTH),
    "no transpose": ("attend_kernel.h", "transpose(to_half2(weight[0]",
                     "(to_half2(weight[0]", BOTH),
    "no second transpose": ("attend_kernel.h", "transpose(to_half2(weight[2]",
                            "(to_half2(weight[2]", BOTH),
    "no wait": ("attend_kernel.h", "wait_copies<kStages - 1>()", "wait_copies<kStages>()", BOTH),
    "an output row": ("attend_kernel.h", "to[1] = s.o[tile][i][c + 2]", "to[1] = s.o[tile][i][c]",
                      BOTH),
    "a tile without a mask": ("attend_kernel.h", "oldest + 1 : end", "oldest + 2 : end", BOTH),
    "a window's first tile": ("attend_kernel.h", "first_seen(a.reach, newest);",
                              "first_seen(a.reach, newest) - 15;", (WINDOW,)),
    "a chunk's first token": ("attend.h", "position % -reach", "(position + 1) % -reach",
                              (CHUNK, MAPPED_CHUNK)),
    "a row's own chunk": ("attend_kernel.h", "token < first_seen(only_here(a.reach), row)", "false",
                          (WINDOW, CHUNK)),
    "a first token before the chunk": ("prepare.h", "kMapped ? first_seen(a.reach, position) : 0",
                                       "0", (MAPPED_CHUNK,)),
    "a split's state": ("merge.h", "(begin + at + j) * kHeadDim", "begin * kHeadDim", BOTH),
    "a split's weight": ("merge.h", "weights[lane_idx()] = weight", "weights[lane_idx()] = 1",
                         BOTH),
    "a row written directly": ("attend_kernel.h", "load_own<kHeadDim>(merged, o)",
                               "load_own<kHeadDim>(scratch, o)", (DIRECT,)),
    "a rotation's shuffle": ("rotation.h", "mask ? other - x[i]", "mask ? x[i] - other",
                             (*BOTH, ENCODE)),
    "a stored sign": ("encode.h", "pattern << 8", "pattern << 7", (ENCODE,)),
    "a stored word": ("encode.h", "index[i] >> -shift", "index[i] >> 1 - shift", (ENCODE,)),
    "a stored lane": ("encode.h", "subvec < num_subvecs; subvec += kWarp",
                      "subvec < num_subvecs - 1; subvec += kWarp", (ENCODE,)),
    "no wait in encode": ("encode.h", "sync_warp();  // y is written", "// y is written",
                          (ENCODE,)),
    "a turned cosine": ("mapped.h", "w[1] * x.cosine - w[0] * x.sine",
                        "w[1] * x.cosine + w[0] * x.sine", BOTH_MAPPED),
    "a turned pair": ("mapped.h", "row + columns[8 * step + 4 + t]", "row + columns[8 * step + t]",
                      BOTH_MAPPED),
    "a tile's angle": ("mapped.h", "lane / 4 + r % 2 * 8", "lane / 4", BOTH_MAPPED),
    "a pair's place": ("mapped.h", "to[j / 4 % 2 * 2]", "to[0]", BOTH_MAPPED),
    "a score's scale": ("mapped.h", "unit * kLog2e * inverse", "unit * kLog2e", BOTH_MAPPED),
    "a mean's score": ("prepare.h", "bias += x[i]", "bias -= x[i]", BOTH_MAPPED),
    "a product's second codeword": ("key_map.h", "permute_bytes(y, copy_2, 0x5514)",
                                    "permute_bytes(y, copy_2, 0x5504)", BOTH_MAPPED),
    "a product's step": ("key_map.h", "step < p.end_4; ++step, field += 4",
                         "step < p.end_4; ++step, field += 3", BOTH_MAPPED),
    "a product's table": ("key_map.h", "p.at_2 = bytes_8 + bytes_4", "p.at_2 = bytes_8",
                          BOTH_MAPPED),
    "a first token's value": ("prepare.h", "weight * value[i]", "value[i]", BOTH_MAPPED),
    "a first token's mean": ("prepare.h", "o[i] += means[i]", "o[i] += 0", BOTH_MAPPED),
    "first tokens twice": ("attend_kernel.h", "least = args.num_apart", "least = 0",
                           (*BOTH_MAPPED, FIRST)),
    "a first token of a later block": ("prepare.h", "token / args.pages.block_size", "0", (FIRST,)),
    "a first token in the window alone": ("prepare.h",
                                          "kMapped ? first_seen(a.reach, position) : 0",
                                          "first_seen(a.reach, position)", (FIRST,)),
    "a first token's query": ("prepare.h", "kMapped ? a.query : a.first_query", "a.query",
                              (FIRST,)),
    "a key's turning mean": ("encode.h", "pair.c1 * angle.cosine + pair.c0",
                             "pair.c1 * angle.cosine - pair.c0", (MAPPED_ENCODE,)),
    "a first value's mean": ("encode.h", "is_value ? map.first_value : map.first_key",
                             "map.first_key", (MAPPED_ENCODE,)),
    "a weighted gain": ("encode.h", "weight + 2 * n2, y", "weight, y", (MAPPED_ENCODE,)),
    "codes beside their copies": ("attend_kernel.h",
                                  "copy_row(a, only_here(b.req), end, token) >= 0", "false",
                                  ALL_COPIES),
    "whole tiles with copies": ("attend_kernel.h", "if (all_end > recent) all_end = recent;", "",
                                ALL_COPIES),
    "whole tiles with first copies": ("attend_kernel.h",
                                      "if (all_begin < a.num_copied_first) all_begin = "
                                      "a.num_copied_first;", "", (COPIES, COPIES_WIDE)),
    "a copy's column": ("attend.h", "a.num_copy_columns - (context - token)",
                        "a.num_copy_columns - 1 - (context - token)", ALL_COPIES),
    "a copy's position": ("copies.h", "b.context - (a.num_copy_columns - column)",
                          "b.context - (a.num_copy_columns - column) - 1", ALL_COPIES),
    "a copy counted twice": ("copies.h", "at.position < a.num_copied_first) at.row = -1",
                             "at.position < 0) at.row = -1", ALL_COPIES),
    "a copy's KV head": ("copies.h", "(row * args.pages.num_kv_heads + kv_head)",
                         "(row * args.pages.num_kv_heads)", ALL_COPIES),
    "a copy's half": ("copies.h", "words[i] >> 16", "words[i]", ALL_COPIES),
    "a chunk of copies": ("copies.h", "o[r][i] *= old", "o[r][i] *= 1", ALL_COPIES),
    "a joined weight": ("copies.h", "x += a.raw_o[at + i] * raw_weight", "x += a.raw_o[at + i]",
                        ALL_COPIES),
    "a copy beyond the window": ("copies.h", "own.position >= seen[r]", "true", (COPIES_WINDOW,)),
    "a first token beside its copy": ("prepare.h", "if (copy_row(a, req, context, token) >= 0)"
                                      " continue;", "", (COPIES_MAPPED,)),
    "a copied lane": ("encode.h", "head) * kHeadDim + first;",
                      "head) * kHeadDim + first / 2;", (COPIES_ENCODE,)),
    "a copied infinity": ("encode.h", "bad ? 0.0f : v[i]", "v[i]", (COPIES_ENCODE,)),
    "a run's place": ("encode.h", "n4, index + n2", "n4, index + n4", (MAPPED_ENCODE,)),
}  # fmt: skip
IN_THE_GATE = {
    "a key register", "no transpose", "a stored sign", "a turned cosine",
    "codes beside their copies",
}  # fmt: skip
"""One of keys, one of values, one of encode, one of mapped keys, one of copies; the others are
slow."""


def build_mutant(folder: Path, header: str, old: str, new: str) -> cuda.Library:
    """The emulated kernels of head_dim 64 and the pair of 3 bits, with one change."""
    shutil.copytree(emu.ROOT / "csrc", folder / "csrc")

    def change(name: str, old: str, new: str) -> None:
        path = folder / "csrc" / "cuda" / name
        text = path.read_text()
        assert text.count(old) == 1, f"{name} must hold once: {old}"
        path.write_text(text.replace(old, new))

    change(header, old, new)
    supported = (folder / "csrc" / "cuda" / "supported.h").read_text()
    for macro, entry in (("FQ_HEAD_DIMS", "X(64, 32)"), ("FQ_PAIRS", "X(kK4Folded, kK4Folded)")):
        whole = re.search(rf"#define {macro}\(X\).*?[^\\]\n", supported, re.DOTALL)[0]
        change("supported.h", whole, f"#define {macro}(X) {entry}\n")
    change("library.cu", "Kernels<128>", "Kernels<64>")
    sources = [str(folder / "csrc" / "cuda" / s) for s in ("kernels.cu", "library.cu")]
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-w", "-DFQ_HEAD_DIM=64", "-x", "c++"]
    flags.append(f"-DFQ_ABI={header_digest('cuda')}")
    target = folder / "mutant.so"
    command = ["g++", *flags, "-I", str(folder / "csrc"), *sources, "-o", str(target)]
    subprocess.run(command, check=True)
    mutant = cuda.Library(target)
    emu.options(mutant)
    return mutant


def check_case(library, case: str) -> None:
    codec = codec_of("fibquant_3bit", 64)
    if case in (MAPPED, MAPPED_WIDE, MAPPED_CHUNK):
        paged = test_cuda_mapped.mapped_of("fibquant_3bit", 64, [70, 32], [1, 2], group_size=3)
        check(library, paged, wide=case == MAPPED_WIDE, chunk=31 * (case == MAPPED_CHUNK))
        return
    if case == COPIES_ENCODE:
        test_cuda_copies.test_new_tokens_are_copied_as_they_are(library, torch.float16, 64, "all")
        return
    if case.startswith(COPIES):
        args = [90, 33, 9], [1, 2, 5]
        paged = paged_of(codec, *args, group_size=3)
        if case == COPIES_MAPPED:
            paged = test_cuda_mapped.mapped_of("fibquant_3bit", 64, *args, group_size=3)
        copies = make_copies(paged, 4, 40, torch.float16, 0.7)
        options = {"window": 30} if case == COPIES_WINDOW else {"wide": case == COPIES_WIDE}
        test_cuda_copies.check(library, paged, copies=copies, **options)
        return
    if case == FIRST:
        paged = paged_of(codec, [90, 33], [1, 2], group_size=3)
        check(library, paged, keep_first=20, window=30, first_query=other_query(paged))
        return
    if case == MAPPED_ENCODE:
        test_cuda_mapped.test_records_equal_the_oracles(library, "fibquant_3bit", 64, "all")
        return
    if case == ENCODE:
        key, value = torch.randn(2, 16, 2, 64, generator=torch.Generator().manual_seed(2))
        got, expected, _ = encode_both(library, codec, key, value, torch.arange(16) + 20)
        check_records(codec, got, expected)
        return
    paged = paged_of(codec, [70, 32], [1, 2], group_size=3)
    options = {WINDOW: {"window": 30}, CHUNK: {"chunk": 31}, DIRECT: {"num_splits": 1}}.get(
        case, {}
    )
    check(library, paged, wide=case == WIDE, **options)


def test_every_change_has_its_line() -> None:
    for name, (header, old, *_) in MUTATIONS.items():
        text = (emu.ROOT / "csrc" / "cuda" / header).read_text()
        assert text.count(old) == 1, f"{name}: {header} must hold once: {old}"


@pytest.mark.parametrize(
    "name", [n if n in IN_THE_GATE else pytest.param(n, marks=pytest.mark.slow) for n in MUTATIONS]
)
def test_a_change_of_the_kernels_is_noticed(name: str, tmp_path) -> None:
    """Wrong in every case that has the changed line, where the kernels as they are pass."""
    header, old, new, cases = MUTATIONS[name]
    library, mutant = emu.emulated(), build_mutant(tmp_path, header, old, new)
    for case in cases:
        check_case(library, case)
        with pytest.raises(AssertionError):
            check_case(mutant, case)
