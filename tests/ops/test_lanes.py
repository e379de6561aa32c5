# SPDX-License-Identifier: Apache-2.0
"""The kernels' 8- and 16-lane code paths, compiled without intrinsics so that any CPU runs them.

What AVX-512 adds to these is five intrinsics of csrc/cpu/simd.h and codec.h; the start-up
self-check covers those on machines that have it. The 16 lanes are compiled with the model of
csrc/cpu/bytes.h, so that tests of models in 16 bits (test_byte_attention.py) run anywhere.
"""

from __future__ import annotations

import itertools
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests.keys.test_key_map import KINDS, mapped
from tests.ops.test_attention import check_against_oracle, codec_of
from tests.paged import make_paged
from vllm_fibquant.headers import header_digest
from vllm_fibquant.ops import cpu_library

ROOT = Path(__file__).parents[2]
NO_OTHER_ISA = """
#include "cpu/dispatch.h"
namespace fq::avx2 { extern const Kernels kernels; const Kernels kernels = {}; }
namespace fq::avx512 { extern const Kernels kernels; const Kernels kernels = {}; }
namespace fq::avx512_vnni { extern const Kernels kernels; const Kernels kernels = {}; }
"""


def find_compiler() -> list[str]:
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    if not shutil.which(compiler[0]):
        pytest.skip("no C++ compiler")
    return compiler


def build_portable(folder: Path, lanes: int, *flags: str) -> Path:
    """A library in `folder` with portable kernels alone, that many lanes wide, whose scratch memory
    begins as NaN."""
    (folder / "others.cpp").write_text(NO_OTHER_ISA)
    library = folder / "libfibquant_cpu.so"
    subprocess.run(
        [*find_compiler(), "-std=c++17", "-O1", "-fPIC", "-shared", "-fopenmp", "-ffp-contract=off",
         "-fno-math-errno", "-fno-trapping-math", "-w", "-I", str(ROOT / "csrc"), *flags,
         "-DFQ_POISON", "-DFQ_ISA=portable", f"-DFQ_LANES={lanes}",
         f"-DFQ_ABI={header_digest('cpu')}",
         str(ROOT / "csrc/cpu/kernels.cpp"), str(ROOT / "csrc/cpu/library.cpp"),
         str(folder / "others.cpp"), "-o", str(library)],
        check=True,
    )  # fmt: skip
    return library


@pytest.fixture(scope="module", params=[8, 16])
def lanes(request, tmp_path_factory):
    """Loads a library whose portable kernels are that many lanes wide."""
    flags = ["-DFQ_BYTE_MODEL"] if request.param == 16 else []
    folder = tmp_path_factory.mktemp(f"lanes{request.param}")
    library = build_portable(folder, request.param, *flags)
    patch = pytest.MonkeyPatch()
    patch.setattr(cpu_library, "LIBRARY_PATH", library)
    cpu_library.library.cache_clear()
    cpu_library.select_isa("portable")
    yield request.param
    patch.undo()
    cpu_library.library.cache_clear()


@pytest.mark.long  # compiles the library twice
@pytest.mark.parametrize("head_dim", [64, 80, 256])
@pytest.mark.parametrize(
    "name", ["fibquant_k5v3", "fibquant_4bit", "fibquant_3bit", "fibquant_2bit", "fibquant_1bit"]
)
def test_wide_kernels(lanes: int, name: str, head_dim: int) -> None:
    for dtype in (torch.float32, torch.float16):
        codec, settings = codec_of(name, head_dim), {"dtype": dtype}
        for group_size in (1, 2, 3, 4, 7):
            check_against_oracle(
                make_paged(codec, [70, 530], [1, 3], group_size=group_size, **settings)
            )
        sinks = torch.linspace(-2, 2, 6)
        paged = make_paged(codec, [100, 41], [50, 41], group_size=3, **settings)
        check_against_oracle(paged, window=30, soft_cap=4.0, sinks=sinks, **paged.raw)


@pytest.mark.long
@pytest.mark.parametrize("head_dim", [64, 256])
@pytest.mark.parametrize("kind", KINDS)
def test_wide_kernels_of_mapped_keys(lanes: int, kind: str, head_dim: int) -> None:
    for group_size, dtype in itertools.product((1, 3, 4, 7), (torch.float32, torch.float16)):
        settings = {"head_dim": head_dim, "group_size": group_size, "dtype": dtype, **KINDS[kind]}
        check_against_oracle(mapped([70, 530], [1, 3], **settings))
