# SPDX-License-Identifier: Apache-2.0
"""Prints what vLLM makes of our configuration where its CUDA platform is the current one.

    python -m tests.engine.cuda_start MODEL

In a process of its own: vLLM's modules remember the platform. There is no GPU, so what a driver is
asked has answers here, and what a CUDA build alone has compiled has stand-ins that nobody calls.
The CUDA library is the emulated one.
"""

from __future__ import annotations

import json
import sys
from types import ModuleType
from typing import Any

import torch

from tests import emulated as emu

_no_op, _register_fake = torch._ops._OpNamespace.__getattr__, torch.library.register_fake


def _op(namespace: Any, name: str) -> Any:
    try:
        return _no_op(namespace, name)
    except AttributeError:
        if name.startswith("__") or not namespace.name.startswith("_C"):
            raise
        return lambda *args, **kwargs: False


def _stand_in(name: str) -> Any:
    """A module's attribute that it lacks: a function that says yes."""
    if name.startswith("__"):
        raise AttributeError(name)
    return lambda *args, **kwargs: True


def _fake(op: Any, *args: Any, **kwargs: Any) -> Any:
    def register(function: Any) -> Any:
        try:
            return _register_fake(op, function, *args, **kwargs)
        except RuntimeError:  # the operator does not exist
            return function

    return register


def become_cuda() -> None:
    """Makes vLLM's CUDA platform the current one, on an H100."""
    torch._ops._OpNamespace.__getattr__ = _op
    torch.library.register_fake = _fake
    sys.modules["vllm._C_stable_libtorch"] = ModuleType("stand-in")
    flash: Any = ModuleType("vllm.vllm_flash_attn")
    flash.__getattr__, flash.__path__ = _stand_in, []
    sys.modules["vllm.vllm_flash_attn"] = flash
    worker: Any = ModuleType("vllm.v1.worker.gpu_worker")  # it needs Triton with a driver
    worker.Worker = type("Worker", (), {"determine_available_memory": lambda self: 0})
    sys.modules["vllm.v1.worker.gpu_worker"] = worker

    import vllm.platforms
    from vllm.platforms.cuda import NonNvmlCudaPlatform
    from vllm.platforms.interface import DeviceCapability

    answers = {
        "get_device_capability": DeviceCapability(9, 0),
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "get_device_total_memory": 80 << 30,
        "num_compute_units": 132,
        "device_count": 1,
    }
    for name, answer in answers.items():
        method = classmethod(lambda cls, *args, _answer=answer, **kwargs: _answer)
        setattr(NonNvmlCudaPlatform, name, method)
    vllm.platforms._current_platform = NonNvmlCudaPlatform()


def main(model: str) -> None:
    become_cuda()
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.attention.selector import get_attn_backend

    from vllm_fibquant.engine import support
    from vllm_fibquant.ops import cuda

    def configure() -> Any:
        return EngineArgs(
            model=model, kv_cache_dtype="fibquant", max_model_len=512, skip_tokenizer_init=True,
            additional_config={"fibquant": {"unproven_gpu": True}},
        ).create_engine_config()  # fmt: skip

    cuda.is_built = lambda: False
    try:
        refusal = f"none: {configure()}"
    except ValueError as error:
        refusal = str(error)
    cuda.is_built, cuda.library = lambda: True, emu.emulated
    config = configure()
    options = support.run_options(config)
    with set_current_vllm_config(config):
        backends = [get_attn_backend(64, torch.bfloat16, name) for name in ("fibquant", "auto")]
    found = {
        "refusal": refusal,
        "device": config.device_config.device_type,
        "block_size": config.cache_config.block_size,
        "graphs": config.compilation_config.cudagraph_mode.name,
        "mode": [options.prefill, options.recent_window, options.calibrate],
        "told": support.told_defaults(config),
        "backends": [backend.get_name() for backend in backends],
        "forward_encodes": backends[0].forward_includes_kv_cache_update,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
