# SPDX-License-Identifier: Apache-2.0
"""vLLM's multi-node launch, both nodes on this machine: each has its own command line."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest

from benchmarks.served import NAME, ServerEnded, free_port, serving

from .harness import PLAIN, Answer, largest_difference, varied_prompts
from .models import VOCAB_SIZE, make_model

pytestmark = pytest.mark.slow

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


def flags_of(node_rank: int, num_nodes: int, port: int, fibquant: dict) -> list[str]:
    flags = [
        "--kv-cache-dtype", "fibquant_2bit", "--dtype", "float32", "--enforce-eager",
        "--max-model-len", "512", "--max-num-seqs", "8", "--block-size", "32",
        "--kv-cache-memory-bytes", str(64 << 20),
        "--additional-config", json.dumps({"fibquant": {**PLAIN, **fibquant}}),
    ]  # fmt: skip
    if num_nodes > 1:
        flags += ["--tensor-parallel-size", "2", "--nnodes", "2", "--node-rank", str(node_rank)]
        flags += ["--master-addr", "127.0.0.1", "--master-port", str(port)]
    return flags if node_rank == 0 else [*flags, "--headless"]


@contextlib.contextmanager
def nodes(model: str, folder, num_nodes: int = 2, second: dict | None = None):
    """The server of a cluster of `num_nodes`, whose second node has the options `second`."""
    port = free_port()
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    command = [sys.executable, "-m", "vllm_fibquant", "serve", model]
    command += flags_of(1, num_nodes, port, second or {})
    other = None
    if num_nodes > 1:
        with (folder / "log1").open("w") as log:
            other = subprocess.Popen(
                command,
                env={**kept, **ENVIRONMENT},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
    try:
        with serving(
            model,
            *flags_of(0, num_nodes, port, {}),
            log_path=folder / "log0",
            environment=ENVIRONMENT,
        ) as server:
            yield server
    finally:
        if other is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(other.pid, signal.SIGKILL)
            other.wait()


def answers_of(server, prompts) -> list[Answer]:
    answers = []
    for prompt in prompts:
        body = {
            "model": NAME, "prompt": prompt, "max_tokens": 6, "temperature": 0, "logprobs": 1,
            "ignore_eos": True, "return_token_ids": True,
        }  # fmt: skip
        status, content = server.ask("/v1/completions", body)
        assert status == 200, content
        choice = json.loads(content)["choices"][0]
        answers.append(
            Answer(tuple(choice["token_ids"]), tuple(choice["logprobs"]["token_logprobs"]))
        )
    return answers


def test_two_nodes_answer_as_one(model_folder, tmp_path):
    prompts = varied_prompts(16, VOCAB_SIZE)
    model = make_model("llama", model_folder)
    with nodes(model, tmp_path, num_nodes=1) as server:
        one = answers_of(server, prompts)
    with nodes(model, tmp_path) as server:
        two = answers_of(server, prompts)
        assert "rank(s): 2" in server.log
    figures = largest_difference(one, two)
    print("\ntwo nodes, tensor parallel 2:", figures)
    assert figures[0] == 0
    assert figures[2] < 0.05


def test_a_node_with_another_command_line(model_folder, tmp_path):
    """Another seed of the rotation on the second node: nobody serves, both say what differs."""
    model = make_model("llama", model_folder)
    with pytest.raises(ServerEnded) as caught, nodes(model, tmp_path, second={"rotation_seed": 1}):
        pass
    told = str(caught.value)
    assert "rotation for head_dim 64: must be the same on every rank, got" in told
    assert "on rank 1" in told
    assert "give every node the same installation, codebooks and command line" in told
    assert "rotation for head_dim 64: must be" in (tmp_path / "log1").read_text()
