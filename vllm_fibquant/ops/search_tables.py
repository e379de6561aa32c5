# SPDX-License-Identifier: Apache-2.0
"""Tables with which CPUs that multiply bytes find a nearest codeword (csrc/cpu/byte_search.h).

They narrow a search down and never decide it: what is stored is the row that a comparison of all
rows in floats would choose, whatever these tables say.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch

from vllm_fibquant.codec.codebook import Codebook

NUM_ROWS = 256
SQUARES = 64  # along each axis of a plane
CANDIDATES = 4  # rows of a square
SIDES, FINEST = 8, 128  # parts of each axis that boxes have, and that tell them apart
LISTED = 16  # rows of a box
_REACH = 1.25  # coordinates of subvectors beside the book's largest; longer ones are rare
_ROUNDING = 16  # scan units by which all roundings together may move a difference of scores
_RIVALS = 24  # rows that others are compared with


@dataclass(frozen=True, eq=False)
class Scan:
    """Rows as integers whose products with 16-bit integers y / step are scores.

    Attributes:
        table: int32 `[256, 1 + subvec_dim / 2]`: 255 - row - 256 * |c|^2 / 2, then coordinates
            times 256, two in a word. A score's low byte so says whose it is.
        step: of a subvector's coordinates.
        most: the largest integer that a coordinate may be.
        margin: two scores that differ by more are in the order of the rows' true scores.
    """

    table: torch.Tensor
    step: float
    most: int
    margin: int


@dataclass(frozen=True, eq=False)
class Squares:
    """A square piece of the plane cut into 64 x 64, and the rows that can be nearest in each.

    Attributes:
        rows: uint8 `[64 * 64, 4]`, the numbers of those rows, ascending, the last one repeated;
            255 four times where there are more. Square x + 64 * y.
        planes: uint8 `[8, 256]`: the bytes, low ones first, of both float16 coordinates and of the
            float32 -|c|^2 / 2 of each row.
        low: the smallest coordinate.
        size: of a square.
    """

    rows: torch.Tensor
    planes: torch.Tensor
    low: float
    size: float


@dataclass(frozen=True, eq=False)
class Boxes:
    """Space of four coordinates cut into 8^4 boxes, and 16 rows for each, all that can be nearest
    to some point of it among them.

    A row's score is an integer: the sum of its bytes times round(y / step - shift), less
    64 |bytes|^2; less is the same of every row.

    Attributes:
        rows: uint8 `[8^4, 16]`, the numbers of those rows, ascending; 16 times one number where
            more can be nearest. Box a + 8 b + 64 c + 512 d.
        sides: uint8 `[128]`: which of an axis' 8 parts each of its 128 finest ones belongs to.
        low: the smallest coordinate.
        fine: length of a finest part.
        step: of a subvector's coordinates, 1/128 of the book's.
        shift: what a folded book's rows, which are bytes + 1/2, take from every coordinate.
        reach: the largest magnitude of a coordinate.
        margin: two scores of a box that differ by more are in the order of the rows' true scores.
    """

    rows: torch.Tensor
    sides: torch.Tensor
    low: float
    fine: float
    step: float
    shift: float
    reach: float
    margin: int


@functools.lru_cache(maxsize=32)
def make_scan(book: Codebook) -> Scan | None:
    """The scan of a book of 256 int8 rows of 8 coordinates; None for others."""
    spec = book.spec
    if spec.num_rows != NUM_ROWS or spec.storage != "int8" or spec.subvec_dim != 8:
        return None
    # The half that folded books add to each coordinate moves all scores alike.
    words = book.table.double()  # [256, subvec_dim]
    half_sq = book.rows.double().square().sum(-1) / 2
    # |y c| + |c|^2 / 2 stays below 3/2 of its bound, and 256 times that in an int32.
    most = (2**31 - 1) // 256 // (128 * spec.subvec_dim * 3 // 2)
    step = _REACH * float(book.rows.abs().max()) / most
    bias = (half_sq / (book.scale * step)).round()
    row = torch.arange(NUM_ROWS, dtype=torch.float64, device="cpu")
    first = (NUM_ROWS - 1 - row - 256 * bias).unsqueeze(-1)
    low, high = (256 * words).unflatten(-1, (-1, 2)).unbind(-1)
    packed = high * 65536 + low % 65536
    # An integer differs from y / step by 1/2 at most: scores of two rows by half of their distance.
    spread = float(torch.cdist(words, words, p=1).max()) / 2 + _ROUNDING
    return Scan(torch.cat((first, packed), -1).to(torch.int32), step, most, int(256 * spread) + 255)


@functools.lru_cache(maxsize=32)
def make_squares(book: Codebook) -> Squares | None:
    """The squares of a book of 256 float16 rows of 2 coordinates; None for others."""
    spec = book.spec
    if spec.num_rows != NUM_ROWS or spec.storage != "float16" or spec.subvec_dim != 2:
        return None
    most = 1.1 * float(book.rows.abs().max())
    low = 0.0 if spec.folded else -most
    size = (most - low) / SQUARES
    axis = low + (torch.arange(SQUARES, dtype=torch.float64, device="cpu") + 0.5) * size
    middles = torch.cartesian_prod(axis, axis).flip(-1)
    can_win = _can_win(book.rows.double(), middles, torch.full_like(middles, size / 2))
    count = can_win.sum(-1, keepdim=True)
    order = can_win.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    slot = torch.arange(CANDIDATES, device="cpu").expand(len(order), -1)
    rows = order.gather(-1, torch.minimum(slot, count - 1))
    rows = rows.masked_fill(count > CANDIDATES, NUM_ROWS - 1)
    minus_half_sq = -(book.rows.square().sum(-1) / 2)
    planes = torch.cat(
        (book.table.view(torch.uint8), minus_half_sq.unsqueeze(-1).view(torch.uint8)), 1
    )
    return Squares(rows.to(torch.uint8), planes.T.contiguous(), low, size)


@functools.lru_cache(maxsize=32)
def make_boxes(book: Codebook) -> Boxes | None:
    """The boxes of a book of 256 int8 rows of 4 coordinates; None for others, and for one whose
    scores may not fit."""
    spec = book.spec
    if spec.num_rows != NUM_ROWS or spec.storage != "int8" or spec.subvec_dim != 4:
        return None
    words = book.table.double()
    if words.abs().max() > 127 or (spec.folded and words.min() < 0):
        return None
    rows = book.rows.double()
    reach = _REACH * float(rows.abs().max())
    low = 0.0 if spec.folded else -reach
    fine = (reach - low) / FINEST
    # Parts hold equal numbers of the rows' coordinates: there are many where subvectors are.
    part = torch.arange(1, SIDES, dtype=torch.float64, device="cpu") / SIDES
    ends = ((rows.flatten().quantile(part) - low) / fine).round().clamp(1, FINEST - 1)
    sides = torch.bucketize(torch.arange(FINEST, device="cpu").double(), ends, right=True)
    ends = torch.cat((ends.new_zeros(1), ends, ends.new_full((1,), FINEST))) * fine + low
    axes = [torch.arange(SIDES, device="cpu")] * 4
    box = torch.cartesian_prod(*axes).flip(-1)  # [8^4, 4], the first coordinate's parts innermost
    middles, reaches = (ends[box] + ends[box + 1]) / 2, (ends[box + 1] - ends[box]) / 2
    can_win = _can_win(rows, middles, reaches)
    # Rows that cannot win fill a box up: near ones, so that they are within the margin.
    near = middles @ rows.T - rows.square().sum(-1) / 2 + can_win * 1e9
    listed = near.topk(LISTED, -1).indices.sort(-1).values
    pairs = torch.cdist(words[listed], words[listed], p=1)
    listed = torch.where(can_win.sum(-1, keepdim=True) > LISTED, listed[:, :1], listed)
    # An integer differs from y / step by 1/2 at most: scores of two rows by half of their distance.
    margin = float(pairs.max()) / 2 + _ROUNDING
    shift = 64.0 if spec.folded else 0.0
    tables = listed.to(torch.uint8).contiguous(), sides.to(torch.uint8)
    step = book.scale / 128
    if _largest_score(words[listed], middles / step - shift, reaches / step, spec.folded) >= 2**23:
        return None
    # A little less than the last box's end: there a float's part would round up to the next one.
    most = reach * (1 - 1e-6)
    return Boxes(*tables, low, fine, step, shift, most, int(margin) + 1)


def _largest_score(
    words: torch.Tensor, middles: torch.Tensor, reaches: torch.Tensor, folded: bool
) -> float:
    """The largest magnitude of a score in any box, and of what it is on the way there.

    A score has 24 bits of an int32, with its sign; a row's number has the others.

    Args:
        words: `[boxes, 16, 4]`, the bytes of each box's rows.
        middles, reaches: `[boxes, 4]`, of the boxes, in the integers that words are multiplied by.
    """
    bias = 64 * words.square().sum(-1)
    middle = (words @ middles.unsqueeze(-1)).squeeze(-1) - bias
    # Roundings: of an integer by 1/2, and of floats at a box's sides by less than as much again.
    reach = (words.abs() @ (reaches + 1).unsqueeze(-1)).squeeze(-1)
    # Bytes with a sign have 128 more where low digits, from -128 to 127, are multiplied.
    digits = 128 * words.shape[-1] * (127 if folded else 255)
    return float((middle.abs() + reach).max()) + digits


def _can_win(rows: torch.Tensor, middles: torch.Tensor, reaches: torch.Tensor) -> torch.Tensor:
    """Which rows can be nearest to some point of each box, bool `[boxes, 256]`.

    A row cannot where another one is nearer to every point: the difference of their scores is
    linear, so its least value in a box is known. Boxes are taken a little larger, and rows that
    lose by next to nothing are kept: floats may choose these.

    Args:
        rows: float64 `[256, dim]`.
        middles, reaches: of the boxes, `[boxes, dim]`: a coordinate is within reach of the middle.
    """
    half_sq = rows.square().sum(-1) / 2
    margin = 1e-5 * float(rows.abs().max()) ** 2
    parts = []
    for middle, reach in zip(middles.split(256), reaches.split(256), strict=True):
        scores = middle @ rows.T - half_sq
        can_win = torch.ones_like(scores, dtype=torch.bool)
        for rival in scores.topk(_RIVALS, -1).indices.unbind(-1):
            ahead = scores.gather(-1, rival.unsqueeze(-1)) - scores
            apart = (rows[rival].unsqueeze(1) - rows).abs()  # [256 boxes, 256 rows, dim]
            can_win &= ahead <= 1.001 * (apart @ reach.unsqueeze(-1)).squeeze(-1) + margin
        parts.append(can_win)
    return torch.cat(parts)
