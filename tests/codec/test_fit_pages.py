# SPDX-License-Identifier: Apache-2.0
"""Pages of two sizes made one size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_fibquant.codec.page_fit import MAX_PAGE_WASTE, PageFit, fit_pages


@pytest.mark.parametrize(
    ("small", "large", "fit"),
    [
        (128, 256, None),  # vLLM's own way: blocks twice as large
        (68, 132, PageFit(136, 2)),  # 2 bits of head_dim 128 and 256
        (60, 132, PageFit(132, 2)),  # of 112 and 256
        (
            36,
            132,
            PageFit(144, 4),
        ),  # of 64 and 256: an eleventh of the larger, not a fifth of others
        (52, 132, None),  # a fifth of every page would be empty, whichever way
    ],
)
def test_known_sizes(small, large, fit):
    assert fit_pages(small, large) == fit


@given(st.integers(1, 5000), st.integers(1, 5000))
def test_waste_is_bounded(small, more):
    large = small + more
    fit = fit_pages(small, large)
    if fit is None:
        return
    assert large % small
    assert fit.page_bytes >= large and fit.num_small * small <= fit.page_bytes
    assert fit.page_bytes == large or fit.page_bytes == fit.num_small * small
    assert fit.page_bytes - large <= MAX_PAGE_WASTE * large
    assert fit.page_bytes - fit.num_small * small <= MAX_PAGE_WASTE * fit.page_bytes
