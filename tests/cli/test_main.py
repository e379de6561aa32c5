# SPDX-License-Identifier: Apache-2.0
"""The command: what it prints, what it refuses, and which defaults `serve` adds."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_fibquant import __version__
from vllm_fibquant.cli import info
from vllm_fibquant.cli import main as cli
from vllm_fibquant.cli import serve as launcher
from vllm_fibquant.codec.config import HEAD_DIMS, PRESETS
from vllm_fibquant.evaluation.command import _model_folder

README = Path(__file__).parents[2] / "README.md"
GIB = 1 << 30

AVX2 = launcher.Machine(True, frozenset({"avx2"}), 20 * GIB)
AVX512 = launcher.Machine(True, frozenset({"avx2", "avx512f"}), 20 * GIB)
ARM = launcher.Machine(True, frozenset(), 20 * GIB)
GPU = launcher.Machine(False, frozenset({"avx2"}), 20 * GIB)


def test_help_is_light():
    """--help names every command and imports nothing heavy."""
    code = (
        "import sys; from vllm_fibquant.cli.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.endswith("[]\n"), result.stdout
    for command in ("serve", "info", "plan", "demo-model", "calibrate", "codebook"):
        assert command in result.stdout


def test_module_is_the_command():
    result = subprocess.run(
        [sys.executable, "-m", "vllm_fibquant", "--version"], capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (0, f"vllm-fibquant {__version__}\n")


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["sreve"])
    assert error.value.code == 2
    assert "invalid choice: 'sreve'" in capsys.readouterr().err


def test_info_json(capsys):
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [preset["name"] for preset in report["presets"]] == list(PRESETS)
    two = next(p for p in report["presets"] if p["name"] == "fibquant_2bit")
    assert two["bytes_per_token_and_kv_head"]["64"] == 36
    assert two["effective_rate"]["64"] == 2.25
    assert report["kernel"].split("-")[0] in ("cpu", "reference")
    assert all(len(digest) == 64 for digest in report["codebooks"].values())
    assert {name.split("-")[0] for name in report["codebooks"]} == {f"d{d}" for d in HEAD_DIMS}


def test_info_text(capsys):
    assert cli.main(["info"]) == 0
    text = capsys.readouterr().out
    assert "kernel" in text and "effective rate" in text
    for name in PRESETS:
        assert name in text


def test_info_without_a_kernel(monkeypatch):
    from vllm_fibquant import ops

    def broken():
        raise RuntimeError("not built")

    monkeypatch.setattr(ops, "kernel_name", broken)
    assert info.kernel() == "none: not built"


def test_readme_table_is_the_presets():
    begin, end = "<!-- presets: begin -->\n", "<!-- presets: end -->"
    text = README.read_text()
    assert text.count(begin) == text.count(end) == 1
    table = text[text.index(begin) + len(begin) : text.index(end)]
    assert table.strip() == info.presets_markdown(), (
        "README.md must show the table that `vllm-fibquant info --markdown` prints"
    )


def decide(args, machine=AVX512, environ=None, demo_model=None):
    return launcher.decide(args, machine, environ or {}, demo_model).args


def test_serve_adds_the_cache_dtype():
    assert decide(["org/model"], GPU) == ["org/model", "--kv-cache-dtype", "fibquant"]


@pytest.mark.parametrize(
    "flags",
    [
        ["--kv-cache-dtype", "fibquant_2bit"],
        ["--kv-cache-dtype=fp8"],
        ["--kv_cache_dtype", "auto"],
    ],
)
def test_serve_leaves_a_given_cache_dtype(flags):
    assert decide(["org/model", *flags], GPU) == ["org/model", *flags]


def test_serve_passes_everything_through():
    flags = ["--port", "9", "--host", "0.0.0.0", "--tensor-parallel-size=2", "--api-key", "x"]
    assert decide(["org/model", *flags])[: len(flags) + 1] == ["org/model", *flags]


def test_serve_names_a_local_model_by_its_directory(tmp_path):
    model = tmp_path / "my-model"
    model.mkdir()
    args = decide([str(model)])
    assert args[args.index("--served-model-name") + 1] == "my-model"
    assert decide([str(model), "--served-model-name", "x"]).count("--served-model-name") == 1
    assert "--served-model-name" not in decide(["org/model"])


@pytest.mark.parametrize("flags", [[], ["--port", "9"]])
@pytest.mark.parametrize("machine", [AVX2, AVX512, ARM])
def test_serve_without_a_model_takes_the_demo_model(machine, flags, tmp_path):
    args = decide(flags, machine, demo_model=tmp_path)
    assert args[: 1 + len(flags)] == [str(tmp_path), *flags]
    assert args[args.index("--dtype") + 1] == "float32"
    assert "--enforce-eager" in args
    args = decide(["--dtype", "bfloat16", "-O2"], machine, demo_model=tmp_path)
    assert args.count("--dtype") == 1 and "--enforce-eager" not in args


def test_serve_leaves_the_demo_model_alone_on_gpus(tmp_path):
    args = decide(["--port", "9"], GPU, demo_model=tmp_path)
    assert "--dtype" not in args and "--enforce-eager" not in args


def test_serve_takes_a_model_by_its_flag():
    assert decide(["--model", "org/model"])[:2] == ["--model", "org/model"]


@pytest.mark.parametrize("machine", [AVX512, ARM, GPU])
def test_serve_compiles_where_that_is_right(machine):
    assert "--enforce-eager" not in decide(["org/model"], machine)
    assert "--dtype" not in decide(["org/model"], machine)


@pytest.mark.parametrize(
    "flags, is_eager",
    [
        ([], True),
        (["--dtype", "auto"], True),
        (["--dtype", "bfloat16"], True),
        (["--dtype", "float32"], False),
        (["--no-enforce-eager"], False),
        (["-O2"], False),
        (["-O", "2"], False),
        (["--compilation-config", "{}"], False),
        (["--compilation-config.mode", "0"], False),
        (["-cc.mode=0"], False),
    ],
)
def test_serve_is_eager_without_avx512(flags, is_eager):
    assert ("--enforce-eager" in decide(["org/model", *flags], AVX2)) == is_eager


def test_serve_says_why():
    decision = launcher.decide(["org/model"], AVX2, {})
    assert any("no AVX-512" in note for note in decision.notes)


def test_serve_bounds_the_cache_on_cpus():
    def size(machine, *flags, **environ):
        args = decide(["org/model", *flags], machine, environ)
        flag = "--kv-cache-memory-bytes"
        return int(args[args.index(flag) + 1]) if flag in args else None

    assert size(AVX512) == 4 * GIB
    assert size(launcher.Machine(True, frozenset(), 8 * GIB)) == 2 * GIB
    assert size(GPU) is None
    assert size(AVX512, VLLM_CPU_KVCACHE_SPACE="1") is None
    assert size(AVX512, "--gpu-memory-utilization", "0.5") is None


def test_serve_respects_a_config_file(tmp_path):
    pytest.importorskip("yaml", reason="reads vLLM's --config file")
    path = tmp_path / "serve.yaml"
    path.write_text("kv-cache-dtype: auto\nkv_cache_memory_bytes: 1\nmodel: org/model\n")
    args = ["--config", str(path)]
    assert decide(args) == args


def test_serve_refuses_an_empty_model(capsys, monkeypatch):
    """What a shell makes of "$MODEL" when it is not set."""
    monkeypatch.setattr(launcher, "this_machine", lambda: AVX512)
    monkeypatch.setattr(launcher, "_run_vllm", None)
    assert cli.main(["serve", "", "--port", "9000"]) == 1
    assert "MODEL must be a directory or a Hugging Face name" in capsys.readouterr().err


def test_serve_refuses_an_unknown_preset_at_once(capsys, monkeypatch):
    monkeypatch.setattr(launcher, "this_machine", lambda: AVX512)
    monkeypatch.setattr(launcher, "_run_vllm", None)
    assert cli.main(["serve", "org/model", "--kv-cache-dtype", "fibquant_9bit"]) == 1
    assert "must be one of fibquant_4bit" in capsys.readouterr().err


def test_serve_needs_vllm(monkeypatch, capsys):
    from importlib import metadata

    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    assert cli.main(["serve", "org/model"]) == 1
    assert "vLLM must be installed" in capsys.readouterr().err


def test_this_machine():
    pytest.importorskip("vllm", reason="describes the installed vLLM")
    machine = launcher.this_machine()
    assert machine.free_memory > 0


def test_serve_ends_on_sigterm_before_vllm_handles_it():
    """As process 1 of a container it would ignore the signal without a handler of its own."""
    code = (
        "import sys, time, types\n"
        "def sleep():\n"
        "    print('importing', flush=True)\n"
        "    time.sleep(60)\n"
        "for name in ('vllm', 'vllm.entrypoints', 'vllm.entrypoints.cli'):\n"
        "    sys.modules[name] = types.ModuleType(name)\n"
        "sys.modules['vllm.entrypoints.cli'].main = types.SimpleNamespace(main=sleep)\n"
        "from vllm_fibquant.cli import serve as launcher\n"
        "sys.exit(launcher.serve(['a-model']))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"importing\n"
        process.terminate()
        assert process.wait(20) == 128 + signal.SIGTERM


def test_eval_refuses_what_is_no_model(tmp_path, capsys):
    assert cli.main(["eval", str(tmp_path), "--out", str(tmp_path)]) == 1
    assert "model must be a folder with a config.json" in capsys.readouterr().err


@pytest.mark.parametrize("given", [".", "tokens/.."])
def test_eval_names_results_after_the_folder(given, tmp_path, monkeypatch):
    model = tmp_path / "model"
    (model / "tokens").mkdir(parents=True)
    (model / "config.json").write_text("{}")
    monkeypatch.chdir(model)
    assert _model_folder(given).name == "model"


@pytest.mark.parametrize(
    "row, told",
    [("fibquant_9bit", "must be one of fibquant_4bit"),
     ("nope", "--row must begin with one of our presets or with a --kv-cache-dtype of vLLM's, "
      "got 'nope'")],
)  # fmt: skip
def test_eval_refuses_a_misspelt_row_before_a_model_is_loaded(row, told, tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    assert cli.main(["eval", str(tmp_path), "--row", row]) == 1
    assert told in capsys.readouterr().err


def served(monkeypatch, *args):
    """What `serve` passes on to vLLM, in order."""
    passed = []
    monkeypatch.setattr(launcher, "this_machine", lambda: GPU)
    monkeypatch.setattr(launcher, "_run_vllm", lambda given: passed.append(given) or 0)
    monkeypatch.setenv("VLLM_PLUGINS", "fibquant")
    assert cli.main(["serve", *args]) == 0
    return passed[0]


@pytest.mark.parametrize(
    "args, rest",
    [
        (["--port", "9000", "org/model"], ["--port", "9000"]),
        (["--port=9000", "org/model", "--enforce-eager"], ["--port=9000", "--enforce-eager"]),
        (["--enforce-eager", "org/model", "-tp", "2"], ["--enforce-eager", "-tp", "2"]),
        (
            ["--tokenizer", "org/model", "--port", "9000", "org/model"],
            ["--tokenizer", "org/model", "--port", "9000"],
        ),
    ],
)
def test_the_model_may_be_anywhere(monkeypatch, args, rest):
    pytest.importorskip("vllm", reason="asks vLLM's parser which word is the model")
    expected = ["org/model", *rest, "--kv-cache-dtype", "fibquant"]
    assert served(monkeypatch, *args) == expected


def test_arrange_asks_the_parser_only_where_words_are_loose():
    assert launcher.arrange(["org/model", "--port", "9"], None) == ["org/model", "--port", "9"]
    assert launcher.arrange(["--port=9", "--enforce-eager"], None) == [
        "--port=9",
        "--enforce-eager",
    ]
    assert launcher.arrange(["--port", "9"], lambda args: None) == ["--port", "9"]


@pytest.mark.parametrize("spelling", [["--config", "{}"], ["--config={}"]])
def test_a_config_file_is_read_however_it_is_given(monkeypatch, tmp_path, spelling):
    pytest.importorskip("vllm", reason="asks vLLM's parser which word is the model")
    path = tmp_path / "serve.yaml"
    path.write_text("model: org/other\nkv-cache-dtype: auto\n")
    config = [word.format(path) for word in spelling]
    assert served(monkeypatch, *config) == ["--config", str(path)]
    # As in vLLM, the model of the command line goes before the file's.
    args = served(monkeypatch, "--port", "9000", *config, "org/model")
    assert args == ["org/model", "--config", str(path), "--port", "9000"]


@pytest.mark.parametrize(
    "args, told",
    [
        (["--config=missing.yaml"], "must be a YAML file (.yaml or .yml) of flags and values, got"),
        (["org/model", "--config", "missing.yaml"], "got missing.yaml; give the path of one"),
        (["org/model", "--config"], "got nothing"),
        (["org/model", "--config=a.yaml", "--config", "b.yaml"], "--config must be given once"),
    ],
)
def test_a_bad_config_is_refused(monkeypatch, capsys, args, told):
    monkeypatch.setattr(launcher, "this_machine", lambda: GPU)
    monkeypatch.setattr(launcher, "_run_vllm", None)
    monkeypatch.setattr(launcher, "_vllms_positional", lambda args: None)
    monkeypatch.setenv("VLLM_PLUGINS", "fibquant")
    assert cli.main(["serve", *args]) == 1
    assert told in capsys.readouterr().err


def test_a_config_that_holds_no_flags_is_refused(tmp_path):
    path = tmp_path / "a.yml"
    path.write_text("- model\n")
    with pytest.raises(ValueError, match="got list in"):
        launcher.GivenFlags(["--config", str(path)])
    path.write_text("{")
    with pytest.raises(ValueError, match="got .*a.yml: while parsing"):
        launcher.GivenFlags(["--config", str(path)])
