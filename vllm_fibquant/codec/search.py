# SPDX-License-Identifier: Apache-2.0
"""Nearest codeword: exhaustive, or coarse to fine through lists of codewords.

A large book is divided into coarse cells. Each cell has the list of the codewords that win, or
nearly win, for some vector inside it, so a codeword stands in every cell near it. A search compares
the vector with the cells' centroids and then with the lists of the `num_lists` nearest cells only.

Source: hierarchical list decoding is FibQuant's outlook (arXiv 2605.11478); the lists are ours.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np
import torch

from vllm_fibquant.codec.codebook import Codebook
from vllm_fibquant.codec.source_law import sample_source

_SCORES_PER_CHUNK = 1 << 20  # 4 MiB of float32 scores stay in cache
_COARSE_STEPS = 12  # Lloyd steps of the centroids: more change nothing that can be measured
_PROBES = 64  # nearest cells whose rows can win in a cell, when lists are made
_MAX_SAMPLES = 1 << 19  # bounds the time to make lists of 65536 rows to seconds


@dataclass(frozen=True, eq=False)
class CodewordLists:
    """Coarse cells of a codebook's rows, and which rows each cell lists.

    Attributes:
        cells: float32 `[num_cells, subvec_dim]`, coarse centroids.
        members: bool `[num_cells, num_rows]`; every row is in at least one list.
    """

    cells: torch.Tensor
    members: torch.Tensor


def nearest_rows(subvecs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Index of the nearest row for each subvector; ties go to the lowest index.

    The nearest row c of y maximises <y, c> - |c|^2 / 2.

    Args:
        subvecs: float32 `[n, subvec_dim]`.
        rows: float32 `[num_rows, subvec_dim]`.

    Returns:
        int64 `[n]`.
    """
    half_sq = rows.square().sum(-1) / 2  # [num_rows]
    chunk = max(1, _SCORES_PER_CHUNK // rows.shape[0])
    parts = [
        torch.addmm(half_sq, part, rows.T, beta=-1).argmax(-1) for part in subvecs.split(chunk)
    ]
    return torch.cat(parts) if parts else subvecs.new_zeros(0, dtype=torch.int64)


def nearest_listed_rows(
    subvecs: torch.Tensor, rows: torch.Tensor, lists: CodewordLists, num_lists: int
) -> torch.Tensor:
    """As `nearest_rows`, among the rows listed by the `num_lists` nearest cells of each subvector.

    With num_lists = num_cells it is `nearest_rows`. This is the definition, not a fast way: it
    scores every row and hides those that are not listed.

    Args:
        subvecs: float32 `[n, subvec_dim]`.
        rows: float32 `[num_rows, subvec_dim]`, those the lists were made for.
        lists: on the device of subvecs.
        num_lists: from 1 to num_cells; of equally near cells the lowest number is searched first.

    Returns:
        int64 `[n]`.

    Raises:
        ValueError: num_lists out of range, or the lists are of another number of rows.
    """
    num_cells, num_rows = lists.members.shape
    if not 1 <= num_lists <= num_cells:
        raise ValueError(
            f"nearest_listed_rows: num_lists must be from 1 to {num_cells}, got {num_lists}; "
            "use nearest_rows for an exhaustive search"
        )
    if rows.shape[0] != num_rows:
        raise ValueError(
            f"nearest_listed_rows: rows must have the {num_rows} rows of the lists, got "
            f"{rows.shape[0]}; make the lists with codeword_lists"
        )
    half_sq, cell_half_sq = (t.square().sum(-1) / 2 for t in (rows, lists.cells))
    parts = []
    for part in subvecs.split(max(1, _SCORES_PER_CHUNK // num_rows)):
        cell_scores = torch.addmm(cell_half_sq, part, lists.cells.T, beta=-1)
        order = cell_scores.sort(dim=-1, descending=True, stable=True).indices
        listed = torch.zeros(len(part), num_rows, dtype=torch.bool, device=part.device)
        for rank in range(num_lists):
            listed |= lists.members[order[:, rank]]
        scores = torch.addmm(half_sq, part, rows.T, beta=-1)
        parts.append(scores.masked_fill_(~listed, -torch.inf).argmax(-1))
    return torch.cat(parts) if parts else subvecs.new_zeros(0, dtype=torch.int64)


@functools.lru_cache(maxsize=16)
def codeword_lists(book: Codebook) -> CodewordLists:
    """The lists of a codebook (cached), the same in every process on one machine.

    Cells: Lloyd-Max on the rows themselves. Lists: what wins or nearly wins for samples of the
    source, and each row in the cell it lies in. Fewer samples make shorter lists that miss more.

    Cost: 0.1 s for 1024 rows, seconds for 65536.
    """
    rows, spec = book.rows, book.spec
    num_rows, num_cells = spec.num_rows, spec.num_cells
    # torch's default device may be a GPU, and its default dtype the model's.
    spread = torch.linspace(0, num_rows - 1, num_cells, dtype=torch.float32, device="cpu")
    cells = rows[spread.long()].clone()
    for _ in range(_COARSE_STEPS):
        home = nearest_rows(rows, cells)  # [num_rows]
        counts = torch.bincount(home, minlength=num_cells).unsqueeze(-1)
        sums = torch.zeros_like(cells).index_add_(0, home, rows)
        cells = torch.where(counts > 0, sums / counts.clamp(min=1), cells)
    home = nearest_rows(rows, cells)
    members = torch.zeros(num_cells, num_rows, dtype=torch.bool, device="cpu")
    members[home, torch.arange(num_rows, device="cpu")] = True

    count = min(64 * num_rows, _MAX_SAMPLES)
    drawn = sample_source(book.head_dim, spec.subvec_dim, count, np.random.default_rng(0))
    samples = torch.from_numpy(np.abs(drawn) if spec.folded else drawn)
    cell_of = nearest_rows(samples, cells)
    by_distance = torch.cdist(cells, cells).sort(dim=-1, stable=True).indices
    for cell, near in enumerate(by_distance[:, :_PROBES]):
        can_win = torch.isin(home, near).nonzero().squeeze(-1)
        members[cell, can_win] |= _winners(samples[cell_of == cell], rows[can_win])
    return CodewordLists(cells.contiguous(), members)


def _winners(subvecs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Which rows win or nearly win for one of the subvectors, bool `[num_rows]`.

    A row nearly wins that is farther than the winner by at most `margin` times the winners' mean
    distance. Of more than 4 dimensions samples see too few of the rows that can win.
    """
    margin = max(0, rows.shape[1] - 4) / 100
    half_sq = rows.square().sum(-1) / 2
    wins = torch.zeros(len(rows), dtype=torch.bool, device="cpu")
    for part in subvecs.split(max(1, _SCORES_PER_CHUNK // len(rows))):
        scores = torch.addmm(half_sq, part, rows.T, beta=-1)  # |part|^2 / 2 - distance / 2
        best = scores.amax(-1, keepdim=True)
        least = (part.square().sum(-1, keepdim=True) / 2 - best).mean()
        wins |= (scores >= best - margin * least).any(0)
    return wins
