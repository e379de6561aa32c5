# SPDX-License-Identifier: Apache-2.0
"""`vllm-fibquant doctor` says before anything is loaded what a start would say."""

from __future__ import annotations

import json

from vllm_fibquant.cli import info
from vllm_fibquant.cli.main import main

from .models import make_model


def test_a_model_that_is_served(model_folder, capsys):
    model = make_model("llama", model_folder)
    arguments = ["doctor", model, "--memory", "64MiB", "--context", "512"]
    assert main([*arguments, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["refused"] == [] and report["kernel"] == info.kernel()
    assert report["options"]["prefill"] in ("codes", "raw")
    rows = {row["kv_cache_dtype"]: row for row in report["capacity"]}
    assert list(rows) == ["bf16", "fp8", "fibquant"]
    assert rows["fibquant"]["num_users"] > 3 * rows["bf16"]["num_users"] > 0
    assert main(arguments) == 0
    text = capsys.readouterr().out
    assert info.kernel() in text and f"{rows['fibquant']['num_tokens']:,} tokens" in text


def test_a_model_that_is_refused(model_folder, capsys):
    model = make_model("llama-d62", model_folder)
    assert main(["doctor", model, "--kv-cache-dtype", "fibquant_2bit"]) == 1
    text = capsys.readouterr().out
    assert "refused:\n  - " in text and "must divide head_dim" in text
    assert "pydantic" not in text
