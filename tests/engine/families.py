# SPDX-License-Identifier: Apache-2.0
"""README's table of models: families, their architectures, and the test that shows each.

python -m tests.engine.families   writes it between its marks in README.md
"""

from __future__ import annotations

from pathlib import Path

from .architectures import FAMILIES, HYBRIDS, LATENTS, SHAPES

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- families: begin -->", "<!-- families: end -->"

SERVED = {
    "Qwen": ("qwen2", "qwen2-moe", "qwen3", "qwen3-moe", "qwen3-next"),
    "Gemma": ("gemma", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4-shared"),
    "gpt-oss": ("gpt-oss",),
    "Llama, SmolLM, Arcee": ("llama", "smollm3", "arcee"),
    "Llama 4": ("llama4",),
    "Mistral": ("mistral", "mixtral", "ministral3"),
    "GLM": ("glm4", "glm4-moe"),
    "Granite": ("granite", "granite-moe", "granite-hybrid"),
    "OLMo": ("olmo", "olmo2", "olmo3", "olmoe"),
    "Cohere": ("cohere", "cohere2"),
    "Phi": ("phi", "phi3"),
    "Nemotron": ("nemotron", "nemotron-h"),
    "LFM2, Falcon-H1": ("lfm2", "falcon-h1"),
    "Exaone, Ernie, Hunyuan, Seed-OSS, Apertus": (
        "exaone4", "ernie45", "hunyuan", "seed-oss", "apertus",
    ),
    "GPT-NeoX, OPT, StableLM, StarCoder2": ("gpt-neox", "opt", "stablelm", "starcoder2"),
}  # fmt: skip
"""Shapes of `architectures.py` by family: each is a case of TEST."""
TEST = "test_models.py::test_raw_prefill_is_stock_attention"

LATENT_SERVED = tuple(LATENTS)
LATENT_TEST = "test_latent.py::test_a_fresh_prompt_is_stock_attention"

REFUSED = {
    "DeepSeek V3.2, GLM-5": ("sparse attention to latents", "test_latent.py::test_what_is_refused"),
    "MiMo-V2": (
        "values shorter than keys",
        "test_refusals.py::test_values_shorter_than_keys",
    ),
    "images in Gemma 3 and 4, PaliGemma, Molmo 2": (
        "request by request (tokens of an image see each other both ways); the models' texts are "
        "served (`test_text_alone.py`)",
        "test_images.py::test_images_are_limited_to_none",
    ),
    "Falcon": (
        "its layers ignore the cache's dtype",
        "test_refusals.py::test_layers_that_take_no_notice_of_the_cache_dtype",
    ),
    "Bloom, MPT": ("ALiBi", "test_refusals.py::test_alibi_is_refused_when_the_layer_is_built"),
    "BERT and other pooling models": ("no generation", "test_refusals.py::test_embedding_model"),
}
"""Families that are refused: why, and the test that shows it."""

NOT_RUN = {"minimax-m2", "phimoe"}
"""vLLM's CPU build 0.32.0 does not run these as transformers writes them, with any cache."""


def architecture(shape: str) -> str:
    """transformers' class of a shape, which is vLLM's name as well."""
    return SHAPES[shape]()[0].__name__


def table() -> str:
    """The rows of README's table."""
    lines = [
        f"| family | architectures | cases of `{TEST}`, or another test |",
        "| --- | --- | --- |",
    ]
    served = [(family, shapes, TEST) for family, shapes in SERVED.items()]
    served.append(("DeepSeek V2 and V3, by latents", LATENT_SERVED, LATENT_TEST))
    for family, shapes, test in served:
        names = ", ".join(dict.fromkeys(f"`{architecture(shape)}`" for shape in shapes))
        cases = ", ".join(f"`[{shape}]`" for shape in shapes)
        other = "" if test == TEST else f"`{test}` "
        lines.append(f"| {family} | {names} | {other}{cases} |")
    for family, (why, test) in REFUSED.items():
        lines.append(f"| {family} | refused: {why} | `{test}` |")
    return "\n".join(lines)


def missing() -> set[str]:
    """Shapes that tests serve and the table lacks, or the other way round."""
    listed = {shape for shapes in SERVED.values() for shape in shapes}
    return listed ^ ({*FAMILIES, *HYBRIDS} - NOT_RUN)


if __name__ == "__main__":
    before, rest = README.read_text().split(BEGIN)
    README.write_text(f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}")
