# SPDX-License-Identifier: Apache-2.0
"""The CPU kernels under AddressSanitizer: they stay inside scratch memory, pages and arguments."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.ops.test_lanes import ROOT, build_portable, find_compiler

RUN = """
import sys
from pathlib import Path
import pytest
from vllm_fibquant.ops import cpu_library
cpu_library.LIBRARY_PATH = Path(sys.argv[1])
cpu_library.select_isa("portable")
options = ["-q", "-x", "-p", "no:cacheprovider", "-k", "not avx2 and not avx512"]
sys.exit(pytest.main([*options, *sys.argv[2:]]))
"""
# The last ones choose instruction sets, and leave what the library chooses itself.
TESTS = [
    "tests/engine/test_copy_pool.py",
    "tests/ops/test_copies.py::test_sizes",
    "tests/keys/test_key_map.py::test_every_number_of_queries",
    "tests/keys/test_key_map.py::test_every_transformed_code",
    "tests/keys/test_key_map.py::test_records_of_transformed_keys",
    "tests/ops/test_encode.py::test_records_equal_the_oracles",
    "tests/keys/test_key_map.py::test_one_token_alone_is_stored_as_among_others",
    "tests/codec/test_search.py::test_a_vector_has_one_code_whatever_is_encoded_with_it",
    "tests/ops/test_latent.py::test_every_number_of_heads",
    "tests/ops/test_latent.py::test_vectors_that_are_not_finite_are_zeros_and_counted",
    "tests/ops/test_latent.py::test_models_in_16_bits",
]
BYTE_TESTS = [
    "tests/ops/test_byte_attention.py::test_every_group_size",
    "tests/ops/test_byte_attention.py::test_mapped_keys",
    "tests/ops/test_attention.py::test_lengths_around_a_block",
    "tests/ops/test_encode.py::test_records_equal_the_oracles",
    "tests/keys/test_key_map.py::test_records_of_transformed_keys",
    "tests/keys/test_key_map.py::test_one_token_alone_is_stored_as_among_others",
]


@pytest.mark.slow  # compiling takes a minute
@pytest.mark.parametrize(
    ("lanes", "flags", "tests"),
    [(8, [], TESTS), (16, ["-DFQ_BYTE_MODEL"], BYTE_TESTS)],
    ids=["floats", "bytes"],
)
def test_kernels_stay_inside_their_memory(
    lanes: int, flags: list[str], tests: list[str], tmp_path: Path
) -> None:
    query = [*find_compiler(), "-print-file-name=libasan.so"]
    runtime = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    if not os.path.isabs(runtime):
        pytest.skip("the compiler has no AddressSanitizer to preload")
    library = build_portable(tmp_path, lanes, "-g", "-fsanitize=address", *flags)
    run = subprocess.run(
        [sys.executable, "-c", RUN, str(library), *tests], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0"},
    )  # fmt: skip
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[:4000]
    assert " passed" in run.stdout
