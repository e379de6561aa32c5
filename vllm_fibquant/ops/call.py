# SPDX-License-Identifier: Apache-2.0
"""What the two operations are given, and what is required of it on every device.

Made once for a layer: `Pages`, its cache and how it is coded, and `Attend`, how it attends. Made
once a step: `Batch`, its requests. Made in every call: `Fresh`, what new tokens bring beside their
queries. Each checks what it can when it is made. What remains for a call, its own tensors, is
checked once for each combination of their shapes, layouts and types: every layer of a step has the
same.

All tensors must be on the cache's device. What is refused raises ValueError, with the argument,
what it must be and what it is.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.keys.key_map import KeyMap
from vllm_fibquant.ops.checks import at_least, check_tensor, require_features
from vllm_fibquant.ops.kernels import Kernels

if TYPE_CHECKING:
    from vllm_fibquant.ops.raw_states import RawLibrary


@dataclass(eq=False)
class Pages:
    """The cache of one layer, how its records are coded, and the kernels that read and write them.

    Attributes:
        cache: uint8 [num_blocks, num_kv_heads, block_size, record_bytes], last two axes contiguous.
        codec: the codec of its records.
        key_map: how tokens are encoded; None for as they are.
        kernels: chosen by `ops.pages_of`.
        kept: what the kernels keep here from call to call.
        encoded: shapes, layouts and types of the last tensors that passed `checks.check_encode`;
            the same object as long as they stay the same.

    Raises:
        ValueError: shape, dtype or layout of the cache, a map of other shapes, or a map or codec
            that the kernels do not have.
    """

    cache: torch.Tensor
    codec: KVCodec
    key_map: KeyMap | None
    kernels: Kernels
    kept: Any = field(default=None, init=False, repr=False)
    encoded: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        layout, kernels = self.codec.layout, self.kernels
        shape = "num_blocks", "num_kv_heads", "block_size", layout.record_bytes
        check_tensor("pages_of", "cache", self.cache, shape, torch.uint8, num_packed=2)
        self.num_kv_heads, self.block_size = self.cache.shape[1:3]
        at = self.num_kv_heads, self.codec.head_dim
        asked = ["lists"] if self.codec.key.num_lists or self.codec.value.num_lists else []
        if (key_map := self.key_map) is not None:
            check_tensor("pages_of", "key_map.mean", key_map.mean, at, torch.float32)
            if (transform := key_map.transform) and transform.index_bytes != layout.key_index_bytes:
                raise ValueError(
                    f"pages_of: key_map must have a transform to {layout.key_index_bytes} index "
                    f"bytes, as the codec's keys, got one to {transform.index_bytes}"
                )
            asked += ["means"] if transform is None else ["means", "transform"]
        require_features("pages_of", kernels, asked)
        if key_map is not None and (reason := kernels.refuses_key_map(key_map)):
            raise ValueError(f'pages_of: {reason}; give "calibrate": "means" or "none"')
        self.kind = (*at, self.cache.device, kernels, key_map is None)
        """What the checks of a call's tensors depend on."""


@dataclass(eq=False)
class Batch:
    """The requests of one step, the same for all layers that share block tables.

    Attributes:
        query_start_loc: int32 [num_reqs + 1]; a request's new tokens are rows loc[r]:loc[r + 1].
        seq_lens: int32 [num_reqs]; tokens of each request, its new ones included.
        block_table: int32 [at least num_reqs, max_blocks], last axis contiguous.
        copy_table: int32 [num_reqs, num_first + num_recent], contiguous: the row of a layer's
            `Copies` that holds a request's token at position 0, 1, ... num_first - 1, then at the
            num_recent positions before its first new token; -1 where there is no copy, or no such
            token. None without copies.
        new_tokens: int64 [n] or None: new tokens that are copied once a layer has attended
            everything, so that a row may change hands within a step. On a GPU None: there `Copied`
            says what is copied, before anything is attended.
        new_rows: int64 [n] or None: distinct rows they are copied to.
        query_starts, contexts: query_start_loc, and each request's tokens before its new ones, for
            a library that attends raw new tokens; each None where the host does not know it.
        kept: what kernels keep here from layer to layer.

    Raises:
        ValueError: shape, dtype, layout or device.
    """

    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    copy_table: torch.Tensor | None = None
    new_tokens: torch.Tensor | None = None
    new_rows: torch.Tensor | None = None
    query_starts: list[int] | None = field(default=None, kw_only=True)
    contexts: list[int] | None = field(default=None, kw_only=True)
    kept: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        check = functools.partial(check_tensor, "Batch", device=self.seq_lens.device)
        check("seq_lens", self.seq_lens, ("num_reqs",), torch.int32)
        loc, n = self.query_start_loc, self.seq_lens.shape[0]
        self.device, self.num_reqs = self.seq_lens.device, n
        check("query_start_loc", loc, (n + 1,), torch.int32)
        check("block_table", self.block_table, (at_least(n), "max_blocks"), torch.int32)
        # A GPU's bounds are not read back: there this is the caller's to keep.
        self.num_rows = int(loc[-1]) if loc.is_cpu else 0
        for name, count in (("query_starts", n + 1), ("contexts", n)):
            if (known := getattr(self, name)) is not None and len(known) != count:
                raise ValueError(f"Batch: {name} must have {count} entries, got {len(known)}")
        if self.query_starts is not None:
            self.num_rows = self.query_starts[-1]
        if self.copy_table is not None:
            check("copy_table", self.copy_table, (n, "columns"), torch.int32, num_packed=2)
        if self.new_tokens is not None or self.new_rows is not None:
            tokens = check("new_tokens", self.new_tokens, ("num_new",), torch.int64)
            check("new_rows", self.new_rows, tokens.shape, torch.int64)
            if self.copy_table is None:
                raise ValueError("Batch: copy_table must be given with new_tokens, got None")
        columns = None if self.copy_table is None else self.copy_table.shape[1]
        self.kind = self.device, columns, self.new_rows is None
        """What the checks of a call's tensors depend on."""

    @property
    def host_starts(self) -> list[int] | None:
        """query_start_loc on the host, or None where reading it would wait for a GPU."""
        if self.query_starts is None and self.query_start_loc.is_cpu:
            self.query_starts = self.query_start_loc.tolist()
        return self.query_starts


class Copies(NamedTuple):
    """One layer's copies of some cached tokens, read in the place of their codes where a batch's
    `copy_table` says so.

    Attributes:
        key: float32, bfloat16 or float16 [num_rows, num_kv_heads, head_dim], contiguous.
        value: as key.
        num_first: columns of the table that belong to a request's first tokens.
    """

    key: torch.Tensor
    value: torch.Tensor
    num_first: int


class Copied(NamedTuple):
    """New tokens that are copied while they are encoded, as on GPUs; on CPUs `Batch.new_rows` says
    what is copied once everything has been attended.

    Attributes:
        copies: the layer's copies.
        rows: int32 [at least num_slots]: the row to which a new token is copied, -1 for none; no
            two tokens share one.
    """

    copies: Copies
    rows: torch.Tensor


@dataclass(eq=False)
class Attend:
    """How one layer attends.

    Attributes:
        scale: factor of the scores.
        window: a query at position p sees positions p - window + 1 to p; 0 means all.
        soft_cap: scores become soft_cap * tanh(score / soft_cap); 0 means none.
        sinks: float32 [num_q_heads], contiguous, or None; one extra logit per head that has no
            value.
        keep_first: a query sees positions below this one whatever the window, in a split of their
            own; not together with raw new tokens or a map of keys.
        copies: the layer's copies of tokens, or None.
        raw_library: what attends raw new tokens on a GPU where it takes them; None for our own
            kernel always.
        chunk: a query at position p sees positions p - p % chunk to p; 0 means all.
        kept: what the kernels keep here from call to call.
        attended: as `Pages.encoded`, of `checks.check_attention`.

    Raises:
        ValueError: a negative number, or shape, dtype or layout of sinks.
    """

    scale: float
    window: int = 0
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None
    keep_first: int = 0
    copies: Copies | None = None
    raw_library: RawLibrary | None = None
    chunk: int = 0
    kept: Any = field(default=None, init=False, repr=False)
    attended: Any = field(default=None, init=False, repr=False)

    def __post_init__(self) -> None:
        given = self.window, self.soft_cap, self.keep_first, self.chunk
        if min(given) < 0 or (self.chunk and (self.window or self.keep_first)):
            raise ValueError(
                "Attend: window, soft_cap, keep_first and chunk must be at least 0, and chunk 0 "
                f"with a window or keep_first, got {given}"
            )
        if self.sinks is not None:
            check_tensor("Attend", "sinks", self.sinks, ("num_q_heads",), torch.float32)
        self.reach = self.window or -self.chunk
        """Both as kernels take them; 0 for all."""
        numbers, objects = ("window", "chunk", "soft_cap", "keep_first"), ("sinks", "copies")
        self.asked = [name for name in numbers if getattr(self, name)]
        self.asked += [name for name in objects if getattr(self, name) is not None]
        """Names of the features that this layer needs."""
        num_sinks = 0 if self.sinks is None else self.sinks.shape[0]
        num_first = None if self.copies is None else self.copies.num_first
        self.kind = num_sinks, self.keep_first > 0, num_first
        """What the checks of a call's tensors depend on."""


class Fresh(NamedTuple):
    """What a step's new tokens bring beside their queries.

    Attributes:
        raw_key, raw_value: as query with num_kv_heads heads, or None. When given, a request's new
            tokens are attended from these instead of from their codes.
        first_query: as query, or None for query itself. What positions below keep_first are scored
            with: the query as it would be nearer to them.
    """

    raw_key: torch.Tensor | None = None
    raw_value: torch.Tensor | None = None
    first_query: torch.Tensor | None = None
