# SPDX-License-Identifier: Apache-2.0
"""Registration with vLLM: names, version gate, and harmlessness for everybody else."""

from __future__ import annotations

import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed")

import torch

from vllm_fibquant.codec.config import PRESETS, get_preset
from vllm_fibquant.engine import compat, plugin, support
from vllm_fibquant.options import parse_options

NEEDS_ENGINE = False
pytestmark = pytest.mark.versions


def run_python(code: str) -> str:
    """Output of `code` in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_every_preset_is_a_choice_of_the_flag_and_validates():
    out = run_python(
        "from vllm.engine.arg_utils import AsyncEngineArgs\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "parser = AsyncEngineArgs.add_cli_args(FlexibleArgumentParser())\n"
        "from vllm.config import CacheConfig\n"
        "from vllm_fibquant.codec.config import PRESETS\n"
        "for name in PRESETS:\n"
        "    if parser.parse_args(['--kv-cache-dtype', name]).kv_cache_dtype == name:\n"
        "        print(name, CacheConfig(cache_dtype=name).cache_dtype)\n"
        "try:\n"
        "    CacheConfig(cache_dtype='fibquant_5bit')\n"
        "except ValueError as error:\n"
        "    print('refused', 'fibquant_4bit' in str(error))\n"
    )
    for name in PRESETS:
        assert f"{name} {name}" in out
    assert "refused True" in out


def test_registration_is_idempotent_and_changes_nothing_for_others():
    out = run_python(
        "from vllm_fibquant.engine.plugin import register\n"
        "register()\n"
        "from vllm.config import VllmConfig\n"
        "from vllm.config import cache\n"
        "from vllm.v1.attention import selector\n"
        "def touched():\n"
        "    names = getattr(cache, 'KV_CACHE_DTYPES', cache.CacheDType.__args__)\n"
        "    return VllmConfig.__post_init__, selector._cached_get_attn_backend, list(names)\n"
        "first = touched()\n"
        "register(); register()\n"
        "print(first == touched())\n"
        "print(VllmConfig().cache_config.cache_dtype)\n"
    )
    assert out.split() == ["True", "auto"]


@pytest.mark.long
@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "unknown"])
def test_other_versions_are_refused_by_name_and_only_when_asked_for(version):
    out = run_python(
        "from vllm_fibquant.engine import compat\n"
        f"compat.installed_version = lambda: ('vllm', {version!r})\n"
        "from vllm_fibquant.engine.plugin import register\n"
        "register()\n"
        "from vllm.config import CacheConfig, VllmConfig\n"
        "print('harmless', VllmConfig().cache_config.cache_dtype)\n"
        "try:\n"
        "    VllmConfig(cache_config=CacheConfig(cache_dtype='fibquant'))\n"
        "except ValueError as error:\n"
        "    print(error)\n"
    )
    assert "harmless auto" in out
    assert f"must be version {' or '.join(compat.TESTED_VERSIONS)}, got vllm {version}" in out
    assert all(f"pip install {name}=={v}" in out for name, v in compat.NEWEST_RELEASE.items())


def test_a_vllm_that_cannot_be_extended_is_left_alone():
    """A touch that fails on a tested version too must not break vLLM, nor accept a name."""
    out = run_python(
        "from vllm_fibquant.engine import compat\n"
        "def broken(*args): raise AttributeError('no such thing')\n"
        "compat.select_backend = broken\n"
        "from vllm_fibquant.engine.plugin import register\n"
        "register()\n"
        "from vllm.config import CacheConfig\n"
        "try:\n"
        "    CacheConfig(cache_dtype='fibquant')\n"
        "except ValueError:\n"
        "    print('unknown', CacheConfig().cache_dtype)\n"
    )
    assert out.split()[-2:] == ["unknown", "auto"]


def test_the_installed_version_is_a_tested_one():
    assert compat.version_problem() is None


def test_backends_have_names_vllm_can_tell_apart():
    from vllm_fibquant.codec.config import PRESETS
    from vllm_fibquant.engine import backend
    from vllm_fibquant.options import Options, parse_options

    plain = backend.backend_for(parse_options("fibquant_2bit"))
    assert plain is backend.backend_for(Options(PRESETS["fibquant_2bit"]))
    raw = backend.backend_for(parse_options("fibquant_2bit", {"fibquant": {"mode": "exact"}}))
    assert plain.full_cls_name() != raw.full_cls_name()


def test_only_our_layers_get_our_page_size():
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    from vllm_fibquant.engine import backend
    from vllm_fibquant.options import parse_options

    def spec(dtype, **changes):
        return FullAttentionSpec(
            block_size=16, num_kv_heads=2, head_size=64, dtype=dtype, **changes
        )

    ours = backend.backend_for(parse_options("fibquant_2bit"))
    assert ours.customize_spec(spec(torch.uint8)).page_size_bytes == 16 * 2 * 36
    assert ours.customize_spec(spec(torch.bfloat16)) == spec(torch.bfloat16)
    with pytest.raises(ValueError, match="head_size_v must equal head_size, got 32 and 64"):
        ours.customize_spec(spec(torch.uint8, head_size_v=32))


def test_layers_we_cannot_serve_are_refused_with_every_reason():
    from vllm_fibquant.engine import attention

    with pytest.raises(ValueError) as caught:
        attention.FibQuantImpl.__init__(
            object.__new__(attention.FibQuantImpl), 4, 64, 0.125, 2,
            alibi_slopes=[0.5] * 4, attn_type="encoder_only", chunk_lookback=3,
        )  # fmt: skip
    for part in ("ALiBi", "encoder_only", "chunk_lookback", "--kv-cache-dtype auto"):
        assert part in str(caught.value)


def test_a_layer_cannot_read_pages_that_store_something_else():
    from vllm_fibquant.engine import attention

    reader = object.__new__(attention.FibQuantImpl)
    reader.options = parse_options("fibquant_2bit", None)
    other = object.__new__(attention.FibQuantImpl)
    other.options = parse_options("fibquant_4bit", None)
    for owner, stored in ((object(), "16 bits"), (other, "fibquant_4bit")):
        layers = {"layers.3.attn": SimpleNamespace(impl=owner)}
        config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=layers))
        with pytest.raises(ValueError, match=f"cache of layers.3.attn must store .* {stored} for"):
            reader._owner_named("layers.3.attn", config)


def test_the_backend_answers_for_itself():
    from vllm_fibquant.engine import backend
    from vllm_fibquant.options import parse_options

    ours = backend.backend_for(parse_options("fibquant"))
    layer = {
        "head_size": 64, "dtype": torch.bfloat16, "kv_cache_dtype": "fibquant",
        "block_size": 16, "use_mla": False, "has_sink": True, "use_sparse": False,
        "use_mm_prefix": False, "use_per_head_quant_scales": False,
        "device_capability": None, "attn_type": "decoder", "has_sliding_window": True,
    }  # fmt: skip
    assert ours.validate_configuration(**layer) == []
    wrong = {"head_size": 62, "block_size": 12, "use_mla": True, "attn_type": "encoder"}
    assert len(ours.validate_configuration(**{**layer, **wrong})) == 4
    # vLLM's mode for it replaces PyTorch's operators by Triton kernels, which CPUs do not run.
    told = ours.validate_configuration(**layer, use_batch_invariant=True)
    assert told == ["batch invariance not supported"]
    assert plugin.BACKEND_PATH.rpartition(".")[2] == backend.FibQuantBackend.__name__
    assert ours.get_name() == support.BACKEND_NAME


def gpu_config(**fibquant):
    """A complete configuration as vLLM would assemble it on a machine with a CUDA GPU."""
    from vllm.config import CacheConfig, VllmConfig

    plugin.register()
    config = VllmConfig(
        cache_config=CacheConfig(cache_dtype="fibquant"), additional_config={"fibquant": fibquant}
    )
    config.device_config.device_type = "cuda"
    return config


@pytest.fixture
def cuda_library(monkeypatch):
    """As if the CUDA library were there, with kernels for everything."""
    for name in ("why_no_maps", "why_no_cuda_kernels"):
        monkeypatch.setattr(support.gpu, name, lambda *what: None)


def test_a_gpu_is_refused_until_its_kernels_have_run_on_one(cuda_library):
    (problem,) = support.config_problems(gpu_config())
    assert "device: must be cpu, got cuda" in problem and '"unproven_gpu": true' in problem
    assert support.config_problems(gpu_config(unproven_gpu=True)) == []


def test_what_triton_cannot_do_is_refused_at_the_start():
    problems = support.config_problems(gpu_config(unproven_gpu=True, triton=True, mode="quality"))
    assert len(problems) == 1 and problems[0].startswith("recent_window: must be left out on a GPU")
    assert '"prefill": "raw", which GPUs have' in problems[0]
    assert support.config_problems(gpu_config(unproven_gpu=True, triton=True, prefill="raw")) == []
    problems = support.config_problems(
        gpu_config(unproven_gpu=True, triton=True, retain={"recent": 64})
    )
    assert any(p.startswith("retain: must be left out on a GPU") for p in problems)
    config = gpu_config(unproven_gpu=True, triton=True, monitor=True, calibrate="means")
    (problem,) = support.config_problems(config)
    assert problem.startswith("calibrate: must be left out on a GPU")
    assert "the CUDA library is not built (`make cuda`); leave it out" in problem
    config.parallel_config.enable_dbo = True
    assert any(p.startswith("monitor: must be left out") for p in support.config_problems(config))


def test_the_cuda_library_keeps_first_tokens(cuda_library):
    assert support.config_problems(gpu_config(unproven_gpu=True, retain={"recent": 64})) == []


def test_the_cuda_library_has_a_recent_window(cuda_library):
    config = gpu_config(unproven_gpu=True, mode="quality")
    assert support.config_problems(config) == []
    config.parallel_config.enable_dbo = True
    (problem,) = support.config_problems(config)
    assert problem.startswith("recent_window: must be left out on a GPU")
    assert "with microbatches" in problem


def test_the_cuda_librarys_keys_are_calibrated(cuda_library):
    config = gpu_config(unproven_gpu=True, calibrate="means")
    assert support.config_problems(config) == []
    (problem,) = support.config_problems(gpu_config(unproven_gpu=True, first_tokens=17))
    assert problem.startswith("first_tokens: must be at most 16 on a GPU, got 17")


def test_float32_and_amd_are_refused_on_a_gpu(monkeypatch):
    from vllm.platforms import current_platform

    config = config_of_a_model(unproven_gpu=True, triton=True)
    config.model_config.dtype = torch.float32
    (problem,) = support.config_problems(config)
    assert problem.startswith("dtype: must be bfloat16 or float16 on a GPU")
    config.model_config.dtype = torch.bfloat16
    assert support.config_problems(config) == []
    monkeypatch.setattr(type(current_platform), "is_rocm", lambda self: True)
    (problem,) = support.config_problems(config)
    assert problem.startswith("device: must be an NVIDIA GPU, got an AMD GPU (ROCm)")


def config_of_a_model(head_dim=128, **fibquant):
    """`gpu_config` of a model in bfloat16."""
    config = gpu_config(**fibquant)
    model = dict.fromkeys(("use_mla", "is_encoder_decoder", "is_mm_prefix_lm", "uses_mrope"), False)
    text = SimpleNamespace(layer_types=None)
    config.model_config = SimpleNamespace(
        **model, runner_type="generate", rswa_window=None, hf_text_config=text,
        dtype=torch.bfloat16, get_head_size=lambda: head_dim, get_total_num_hidden_layers=lambda: 2,
        hf_config=text, is_hybrid=False, is_multimodal_model=False,
        multimodal_config=None, max_model_len=4096, architecture="LlamaForCausalLM",
    )  # fmt: skip
    return config


def test_that_triton_would_serve_a_gpu_is_refused_before_any_process(monkeypatch):
    """What the CUDA library lacks is known from the library, without a GPU."""
    from vllm_fibquant.ops import cuda, gpu

    def problems_of(**what):
        return support.config_problems(config_of_a_model(**what, mode="exact", calibrate="none"))

    monkeypatch.setattr(cuda, "is_built", lambda: False)
    told = r"kernels: must be the CUDA library's on a GPU, got Triton's, .* auto, because "
    (problem,) = problems_of(unproven_gpu=True)
    assert re.match(told + r"the CUDA library is not built .*; .*give .triton.: true", problem)
    assert problems_of(unproven_gpu=True, triton=True) == []
    assert len(problems_of()) == 2, "every reason at once"

    class Library:
        def __init__(self):
            self.support = cuda.Support({64: 32}, {(4, 12, True): "k4n4096f"}, frozenset())

    monkeypatch.setattr(cuda, "is_built", lambda: True)
    monkeypatch.setattr(cuda, "kernels", lambda: cuda.Cuda(Library()))
    monkeypatch.setattr(gpu, "_why_not_on", lambda device: pytest.fail("asked the device"))
    assert problems_of(unproven_gpu=True, head_dim=64) == []
    (problem,) = problems_of(unproven_gpu=True)
    assert re.match(told + "head_dim must be one of 64 for the CUDA library, got 128; ", problem)
    (problem,) = problems_of(unproven_gpu=True, head_dim=64, layers={"0": "fibquant_2bit"})
    assert re.match(told + "the key code must be one of k4n4096f .*; ", problem), problem

    def broken():
        raise RuntimeError("cuda.Library: was built from other sources; build it with `make cuda`")

    monkeypatch.setattr(cuda, "kernels", broken)
    (problem,) = problems_of(unproven_gpu=True, head_dim=64)
    assert re.match(told + "cuda.Library: was built from other sources", problem)


@pytest.mark.parametrize("found", ["a bias", "none", "no answer"])
def test_a_bias_on_keys_is_refused_on_a_gpu(found, monkeypatch):
    """Without the CUDA library; a layer that cannot be asked may have one."""
    from types import SimpleNamespace

    from vllm_fibquant.engine import calibrate, gate, key_bias, layers

    def ask(impl, config, turns):
        if found == "no answer":
            raise ValueError("bias_statistics: must have a projection, got none")
        return None if found == "none" else object()

    monkeypatch.setattr(key_bias, "bias_statistics", ask)
    monkeypatch.setattr(layers, "our_layers", lambda config: {"block.attn": None})
    monkeypatch.setattr(layers, "allocate_copies", lambda *args: 0)
    monkeypatch.setattr(layers, "release_memory", lambda *args: None)
    monkeypatch.setattr(calibrate, "calibrate_layers", lambda *args: None)
    monkeypatch.setattr(gate, "check_fidelity", lambda *args: None)
    monkeypatch.setattr(plugin, "_compare_ranks", lambda *args: {})
    runner = SimpleNamespace(get_model=lambda: None)
    worker = SimpleNamespace(vllm_config=gpu_config(unproven_gpu=True), model_runner=runner)
    if found == "none":
        assert plugin._prepare(worker, 100) == 100
    else:
        told = "one in 1" if found == "a bias" else "a bias that may be of keys .*got none.* in 1"
        with pytest.raises(ValueError, match=f"must have no bias on keys on a GPU, got {told}"):
            plugin._prepare(worker, 100)
    worker.vllm_config.device_config.device_type = "cpu"
    assert plugin._prepare(worker, 100) == 100


@pytest.mark.parametrize("asked", [False, True])
def test_triton_serves_a_gpu_only_if_it_is_asked_for(asked: bool, monkeypatch):
    """It is slower than no compression; the device stands for one that the library cannot use."""
    from types import SimpleNamespace

    from vllm_fibquant.codec.codec import KVCodec
    from vllm_fibquant.engine import self_checks
    from vllm_fibquant.ops import gpu

    codec = KVCodec.from_preset(get_preset("fibquant_2bit"), 64)
    options = parse_options("fibquant_2bit", {"fibquant": {"triton": asked, "self_check": False}})
    layers = {"layer": SimpleNamespace(options=options, codec=codec, num_kv_heads=2)}

    def check(device: str) -> None:
        self_checks.check_kernels(layers, torch.bfloat16, 16, torch.device(device))

    monkeypatch.setattr(gpu.cuda, "is_built", lambda: False)
    check("cpu")
    if asked:
        check("meta")
        return
    told = "got Triton's, .* the CUDA library is not built .*auto, or give .triton.: true"
    with pytest.raises(ValueError, match=told):
        check("meta")
    monkeypatch.setattr(gpu, "why_not_cuda", lambda codec, cache: None)
    check("meta")


def test_cuda_graphs_are_declared_for_batches_of_equal_query_lengths():
    from vllm.v1.attention.backend import AttentionCGSupport

    from vllm_fibquant.engine.metadata import FibQuantMetadataBuilder

    support_level = FibQuantMetadataBuilder.get_cudagraph_support(None, None)
    assert support_level == AttentionCGSupport.UNIFORM_BATCH


def test_a_profiled_step_takes_the_memory_of_a_real_one(monkeypatch):
    """vLLM sizes the cache by the peak of a step in which nothing is attended."""
    attention = pytest.importorskip("vllm_fibquant.kernels.attention", reason="needs Triton")
    from vllm_fibquant.ops import gpu, raw_states, splits

    monkeypatch.setattr(splits, "num_sms", lambda device: 132)
    device, taken = torch.device("cpu"), []
    real_empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda n, **kw: taken.append(n) or real_empty(n, **kw))
    query = real_empty(8192, 32, 128, dtype=torch.bfloat16)
    gpu.reserve(query, raw=True)
    row_blocks = 8192 // (attention.PREFILL_ROWS // 4)
    num_splits = attention.choose_splits(row_blocks * 8, 32768, device)
    floats = attention.workspace_floats(8192 * 32, 128, num_splits)
    assert taken == [floats + raw_states.most_floats(8192 * 32, 128)]
