# SPDX-License-Identifier: Apache-2.0
"""What an implementation of the two operations is.

There are four: the oracle (`reference`), the C++ library (`cpu`), the CUDA library (`cuda`) and the
Triton kernels (`triton`). One is chosen for a layer when its pages are known (`ops.pages_of`), and
the layer calls it from then on. What each can do is `features.FEATURES`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

import torch

from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.ops.features import features_of

if TYPE_CHECKING:
    from vllm_fibquant.keys.key_map import KeyMap
    from vllm_fibquant.ops.call import Attend, Batch, Copied, Fresh, Pages


@functools.cache
def device_counters(device: torch.device) -> torch.Tensor:
    """int32 [2] on a GPU, since the process began: vectors stored as zeros because they held a NaN
    or infinity, and vectors not stored because their slot lay outside the cache."""
    with torch.inference_mode(False):  # whoever asks first, all may write
        return torch.zeros(2, dtype=torch.int32, device=device)


class Kernels(ABC):
    """One implementation of the two operations, on the devices it runs on.

    The operations take arguments that `call` has checked; who is not `ops` checks them first.
    """

    implementation: str
    """Its column of FEATURES."""

    max_group_size: int | None = None
    """Query heads per KV head, at most; None for any number."""

    copies_while: tuple[str, ...] = ("attending",)
    """When new tokens are copied: while they are encoded or attended (`call.Copied`)."""

    copy_dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    """Those of copies of tokens."""

    @property
    def name(self) -> str:
        """As reports name it: ``cpu-avx512``, ``triton``."""
        return self.implementation

    @functools.cached_property
    def features(self) -> frozenset[str]:
        return features_of(self.implementation)

    @abstractmethod
    def refuses(self, codec: KVCodec, cache: torch.Tensor | None = None) -> str | None:
        """Why it cannot serve a codec, or a codec in these pages; None when it can."""

    def refuses_key_map(self, key_map: KeyMap) -> str | None:
        """Why it cannot code keys through a map, although it has maps; None when it can."""
        return None

    @abstractmethod
    def encode_kv(
        self,
        key: torch.Tensor,
        value: torch.Tensor,
        slot_mapping: torch.Tensor,
        pages: Pages,
        positions: torch.Tensor | None = None,
        copied: Copied | None = None,
    ) -> int:
        """See `ops.encode_kv`."""

    @abstractmethod
    def paged_attention(
        self,
        query: torch.Tensor,
        out: torch.Tensor,
        pages: Pages,
        batch: Batch,
        attend: Attend,
        fresh: Fresh | None = None,
    ) -> None:
        """See `ops.paged_attention`."""


class GpuKernels(Kernels):
    """What both implementations for GPUs have in common."""

    max_group_size = 64

    def refuses(self, codec: KVCodec, cache: torch.Tensor | None = None) -> str | None:
        if codec.key.num_lists or codec.value.num_lists:
            return "num_lists must be 0 on a GPU, whose search is exhaustive; give num_lists 0"
        if not torch.equal(codec.key.rotation.matrix, codec.value.rotation.matrix):
            return "key and value must share one rotation on a GPU, got two"
        if cache is not None and (cache.data_ptr() | cache.stride(0) | cache.stride(1)) % 2:
            return f"cache must be at even addresses, got strides {cache.stride()}"
        return None
