# SPDX-License-Identifier: Apache-2.0
"""Names that vLLM and transformers import where a model's class has images; none does anything.

Image processors of models that are given texts alone are imported, not called. torchvision itself
is made for CUDA on the package index, and does not load beside a torch for CPUs.
"""

__version__ = "0.28.0"
