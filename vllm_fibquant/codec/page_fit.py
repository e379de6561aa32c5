# SPDX-License-Identifier: Apache-2.0
"""How pages of two sizes are made one size, where vLLM's own way would leave much empty."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PageFit:
    """How pages of two sizes are made one size.

    Attributes:
        page_bytes: of every page.
        num_small: small pages' content in one page: the factor of their block size.
    """

    page_bytes: int
    num_small: int


MAX_PAGE_WASTE = 1 / 8
"""Share of a page that may be left empty so that all pages are equally large."""


def fit_pages(small: int, large: int) -> PageFit | None:
    """How to make pages of `small` and of `large` bytes equally large with little left empty.

    vLLM enlarges the blocks of the small ones where `small` divides `large`, and else leaves the
    rest of each small page empty, up to half of it. So either the large page grows to a multiple
    of the small one, or several small ones are put into a large one.

    Returns:
        None where vLLM's own way is right, or nothing better is known.
    """
    if large % small == 0:
        return None
    up = PageFit(-(-large // small) * small, -(-large // small))
    down = PageFit(large, large // small)
    waste = {up: up.page_bytes / large - 1, down: 1 - down.num_small * small / large}
    best = min(waste, key=lambda fit: waste[fit])
    return best if waste[best] <= MAX_PAGE_WASTE else None
