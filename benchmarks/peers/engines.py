# SPDX-License-Identifier: Apache-2.0
"""One language model in each of three engines, behind the same verbs.

An engine is made with `(folder, kind, room, threads, quality)` and has

    read(tokens) -> float32 [len(tokens), vocabulary]   goes on with the sequence
    forget()                                            begins another
    hold(tokens)                                        begins one that has them in its cache
    about() -> dict                                     versions and settings, for the results

`hold` is for timing: where an engine reads long prompts slowly, what the cache holds may be another
text's keys and values, as a step takes as long with any. vLLM has `steps` in its place.

`kind` names how keys and values are kept, as the engine names it. What is imported is imported when
an engine is made: each runs where its own packages are.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np


class LlamaCpp:
    """llama.cpp through llama-cpp-python: kinds are those of --cache-type-k and --cache-type-v."""

    KINDS = ("f32", "f16", "q8_0", "q5_1", "q4_0")

    def __init__(self, folder: Path, kind: str, room: int, threads: int, quality: bool) -> None:
        import llama_cpp

        self._lib = llama_cpp
        llama_cpp.llama_backend_init()
        silent = llama_cpp.llama_log_callback(lambda *_: None)
        self._keep = silent
        llama_cpp.llama_log_set(silent, None)
        params = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(
            str(folder / "model.gguf").encode(), params
        )
        context = llama_cpp.llama_context_default_params()
        context.n_ctx, context.n_batch, context.n_ubatch = room, BATCH, BATCH
        context.n_threads = context.n_threads_batch = threads
        context.type_k = context.type_v = getattr(llama_cpp, f"GGML_TYPE_{kind.upper()}")
        # Values below 16 bits need flash attention, which reads 32 bits as 16 and sums in 16.
        context.flash_attn_type = int(kind != "f32")
        context.n_seq_max, context.kv_unified = 2, True
        self._context = llama_cpp.llama_init_from_model(self._model, context)
        if not self._context:
            raise RuntimeError(f"llama.cpp: no context with a cache of {kind}")
        vocabulary = llama_cpp.llama_model_get_vocab(self._model)
        self._num_words = llama_cpp.llama_vocab_n_tokens(vocabulary)
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self._length = 0

    def read(self, tokens: list[int], last_only: bool = False, sequence: int = 0) -> np.ndarray:
        batch, lib = self._batch, self._lib
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i], batch.pos[i] = token, self._length + i
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = not last_only or i == len(tokens) - 1
        if status := lib.llama_decode(self._context, batch):
            raise RuntimeError(f"llama.cpp: llama_decode returned {status}")
        self._length += len(tokens)
        rows = 1 if last_only else len(tokens)
        logits = lib.llama_get_logits(self._context)
        return np.ctypeslib.as_array(logits, (rows, self._num_words)).copy()

    def forget(self) -> None:
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        self._length = 0

    def hold(self, tokens: list[int]) -> None:
        """Pieces that do not see each other, at their places of one sequence: of a cache below 16
        bits every piece would read all before it slowly."""
        self.forget()
        memory = self._lib.llama_get_memory(self._context)
        for begin in range(0, len(tokens), BATCH):
            self.read(tokens[begin : begin + BATCH], last_only=True, sequence=1)
            self._lib.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            self._lib.llama_memory_seq_rm(memory, 1, -1, -1)

    def about(self) -> dict[str, Any]:
        info = self._lib.llama_print_system_info().decode()
        flags = [part.strip() for part in info.replace("CPU :", "|").split("|")]
        return {
            "version": f"llama-cpp-python {self._lib.__version__}",
            "computes": "float16 weights",
            "isa": " ".join(f.split(" = ")[0] for f in flags if f.endswith("= 1")),
        }


class OpenVino:
    """OpenVINO's CPU plugin; the model is that of the GGUF file, as OpenVINO GenAI writes it."""

    KINDS = ("f32", "bf16", "u8", "u4", "turbo4", "turbo3")
    WRITABLE = ("f32", "bf16", "u8")

    def __init__(self, folder: Path, kind: str, room: int, threads: int, quality: bool) -> None:
        import openvino

        self._openvino, self._kind = openvino, kind
        settings = {"INFERENCE_NUM_THREADS": threads}
        if quality:  # else products are computed in bfloat16 and of activations of 8 bits
            settings |= {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0}
        if kind.startswith("turbo"):
            settings |= {"KEY_CACHE_QUANT_ALG": "TURBO", "VALUE_CACHE_QUANT_ALG": "TURBO"}
            settings |= dict.fromkeys(
                ("KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION"), f"u{kind[-1]}"
            )
        else:
            settings["KV_CACHE_PRECISION"] = kind
        path = ensure_ir(folder)
        self._compiled = openvino.Core().compile_model(str(path), "CPU", settings)
        self._request = self._compiled.create_infer_request()
        self.forget()

    def read(self, tokens: list[int], last_only: bool = False) -> np.ndarray:
        begin, end = self._length, self._length + len(tokens)
        given = {
            "input_ids": np.array([tokens], np.int64),
            "attention_mask": np.ones((1, end), np.int64),
            "position_ids": np.arange(begin, end, dtype=np.int64)[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        asked = {name for port in self._compiled.inputs for name in port.names}
        self._request.infer({name: value for name, value in given.items() if name in asked})
        self._length = end
        logits = self._request.get_output_tensor(0).data[0]
        return logits[-1:].copy() if last_only else logits.copy()

    def forget(self) -> None:
        self._request.reset_state()
        self._length = 0

    def hold(self, tokens: list[int]) -> None:
        """Read in one call, which is fast where nothing is held yet and takes memory as its square;
        more than AT_ONCE tokens are the first ones' states again, where a state can be written."""
        self.forget()
        self.read(tokens[:AT_ONCE], last_only=True)
        times, rest = divmod(len(tokens), AT_ONCE)
        if times and (times, rest) != (1, 0):
            if rest or self._kind not in self.WRITABLE:
                raise LeftOut(
                    f"OpenVINO reads {AT_ONCE:,} tokens at once, and more than these too slowly; "
                    f"states of {self._kind} cannot be written"
                )
            for state in self._request.query_state():
                held = np.tile(state.state.data, (1, 1, times, 1))
                state.state = self._openvino.Tensor(held)
        self._length = len(tokens)

    def about(self) -> dict[str, Any]:
        names = ("INFERENCE_PRECISION_HINT", "KEY_CACHE_PRECISION", "VALUE_CACHE_PRECISION")
        settings = {n.lower(): self._compiled.get_property(n).get_type_name() for n in names}
        return {
            "version": f"openvino {self._openvino.__version__}",
            "computes": settings["inference_precision_hint"],
            "isa": "chosen by oneDNN",
            "settings": settings,
        }


def ensure_ir(folder: Path) -> Path:
    """OpenVINO's own file of the model, written once: by OpenVINO GenAI's reader of GGUF, or, of an
    architecture that it does not know, by optimum-intel from transformers' files.

    Raises:
        RuntimeError: optimum-intel is not installed.
    """
    path = folder / "openvino_model.xml"
    if path.exists():
        return path
    if json.loads((folder / "config.json").read_text())["model_type"] in ("llama", "qwen2"):
        import openvino_genai

        openvino_genai.LLMPipeline(str(folder / "model.gguf"), "CPU", enable_save_ov_model=True)
        return path
    try:
        from optimum.exporters.openvino import main_export
        from optimum.intel import OVConfig
    except ImportError as missing:
        raise RuntimeError(
            "OpenVINO GenAI's reader of GGUF does not know this architecture, and optimum-intel, "
            f"which exports it, cannot be imported: {missing}"
        ) from missing
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        main_export(
            str(folder), scratch, task="text-generation-with-past",
            ov_config=OVConfig(dtype="fp32"), convert_tokenizer=False,
        )  # fmt: skip
        for file in Path(scratch).glob("openvino_model.*"):
            file.rename(folder / file.name)
    return path


class Vllm:
    """vLLM on CPUs: kinds are those of --kv-cache-dtype, ours with options behind them."""

    KINDS = (
        "auto", "fp8_e4m3", "fp8_e5m2",
        "fibquant_4bit", "fibquant_3bit", "fibquant_2bit", "fibquant_1bit",
        'fibquant_3bit {"mode": "exact"}', 'fibquant_2bit {"mode": "exact"}',
    )  # fmt: skip

    def __init__(self, folder: Path, kind: str, room: int, threads: int, quality: bool) -> None:
        preset, _, options = kind.partition(" ")
        self._dtype = "float32" if quality else "bfloat16"
        self._options = json.loads(options) if options else {}
        if quality:
            self._open_hidden(folder, preset, room)
        else:
            self._open(folder, preset, room)

    def _open_hidden(self, folder: Path, preset: str, room: int) -> None:
        from vllm_fibquant.evaluation.engine import Engine

        self._engine = Engine(str(folder), preset, self._options, STEP, room, 1, self._dtype)

    def read_all(self, tokens: list[int]) -> Iterator[np.ndarray]:
        """Logits of a whole text, of which STEP tokens are prefilled at once, some rows at a
        time."""
        (states,) = self._engine.hidden([tokens])
        for piece in states.split(128):  # 134 MB of 262,144 words
            yield self._engine.logits(piece).numpy()

    def _open(self, folder: Path, preset: str, room: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
        from vllm import LLM

        from vllm_fibquant.codec.config import is_fibquant

        ours = {"fibquant": {**self._options, "fidelity_gate": False}}
        self._llm = LLM(
            str(folder), dtype=self._dtype, enforce_eager=True, kv_cache_dtype=preset,
            hf_overrides={"max_position_embeddings": room},  # its table of rotary angles
            additional_config=ours if is_fibquant(preset) else {}, max_model_len=room,
            max_num_batched_tokens=BATCH, max_num_seqs=1, kv_cache_memory_bytes=2 << 30,
            enable_prefix_caching=True, skip_tokenizer_init=True, seed=0,
        )  # fmt: skip

    def steps(self, context: list[int], count: int) -> list[float]:
        """Seconds of each decode step after those tokens."""
        import time

        from vllm import SamplingParams

        engine = self._llm.llm_engine
        params = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True, detokenize=False)
        engine.add_request("decode", {"prompt_token_ids": context}, params)
        seconds = []
        while engine.has_unfinished_requests():
            begin = time.perf_counter()
            engine.step()
            seconds.append(time.perf_counter() - begin)
        return seconds[-(count - 2) :]

    def about(self) -> dict[str, Any]:
        import vllm

        from vllm_fibquant import __version__
        from vllm_fibquant.ops.cpu_library import isa

        return {
            "version": f"vllm {vllm.__version__}, vllm-fibquant {__version__}",
            "computes": self._dtype,
            "isa": isa(),
        }


STEP = 16
"""Tokens of a text that are read at once."""
BATCH = 512
"""Tokens of a context that are read at once where speed is measured."""
AT_ONCE = 8192
"""The same for OpenVINO: 1.6 GB of scores; twice as many would need four times that."""


class LeftOut(Exception):
    """A cache whose speed after a context is not measured, and why."""


def random_tokens(count: int, folder: Path) -> list[int]:
    """Of the model's vocabulary, without its first hundred."""
    num_words = json.loads((folder / "config.json").read_text())["vocab_size"]
    return np.random.default_rng(0).integers(100, num_words, count).tolist()


ENGINES: dict[str, Any] = {"llama.cpp": LlamaCpp, "OpenVINO": OpenVino, "vLLM": Vllm}
