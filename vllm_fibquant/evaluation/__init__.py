# SPDX-License-Identifier: Apache-2.0
"""How faithful a KV cache format is, ours and others, measured on a real model by one protocol.

texts     what is read: bundled texts, passkey prompts, and the units that results are kept for
formats   what a format does to keys and values, and which tokens it leaves alone; ours
rivals    other formats
simulate  the model in plain PyTorch with attention that reads what a format returns
engine    the model in vLLM, reading codes that were written, paged and read back
rows      everything that is measured, as one list
measure   metrics of one unit
suite     the command: what is missing is measured, each result kept at once
report    table and findings in Markdown
plots     the frontier and the ablation

docs/evaluation.md says how each number is defined.
"""
