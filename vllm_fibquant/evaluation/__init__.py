# SPDX-License-Identifier: Apache-2.0
"""How faithful a KV cache format is, ours and others, measured on a real model by one protocol.

texts      what is read: prose, code, files, short texts with pass keys; what results are kept for
retrieval  long texts with many facts among distractors
formats    what a format does to keys and values, and which tokens it leaves alone; ours
rivals     other formats
simulate   the model in plain PyTorch with attention that reads what a format returns
engine     the model in vLLM, reading codes that were written, paged and read back
watch      what the engine's attention returns beside exact attention
rows       everything that is measured, as one list
measure    metrics of one unit
suite      one model: what is missing is measured, each result kept at once
trial      any presets and options on any texts, printed
digests    what a result is filed under: the model, the code
report     one model's tables in Markdown
models     tables over several models, the worst beside the mean
plots      the frontier and the ablation; labels places what is written in them
command    `vllm-fibquant eval`

docs/evaluation.md says how each number is defined.
"""
