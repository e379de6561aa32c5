# SPDX-License-Identifier: Apache-2.0
"""FibQuant: a vector-quantised KV cache for unmodified vLLM."""

__version__ = "0.1.0"
