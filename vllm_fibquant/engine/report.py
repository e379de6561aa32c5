# SPDX-License-Identifier: Apache-2.0
"""What a worker can say of itself: its layers, its kernel and where its counters are."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_fibquant import ops
from vllm_fibquant.codec.codec import KVCodec, VectorCodec
from vllm_fibquant.engine.attention import FibQuantImpl
from vllm_fibquant.engine.capacity import what_fits
from vllm_fibquant.engine.gate import outcome_of
from vllm_fibquant.engine.latent_support import latent_layers
from vllm_fibquant.engine.ranks import NO_FILE
from vllm_fibquant.engine.self_checks import passed_self_checks
from vllm_fibquant.observe.counters import own_counters


def worker_report(vllm_config: VllmConfig) -> dict[str, Any]:
    """Facts about this worker that do not change while it serves, in types that JSON has.

    Returns:
        counters: path of its counters.
        kernel: name of the kernel.
        num_layers, num_coded_layers: attention layers, and those of them that store codes.
        token_bytes: bytes of one token in all layers of this worker: as they are, with 16 bits
            per coordinate, and with --kv-cache-dtype auto, the model's own dtype.
        cache_bytes: memory of all pages.
        fits: tokens that fit into it, and the share of padding, as `capacity.what_fits` gives them.
        codes: of keys and of values: code, rate, codebook digest; one entry per head_dim and
            preset.
        calibration: how keys of how many layers are coded: "measured", of these "transformed",
            "bias" where the model's weights alone say what is subtracted, "none"; and the digests
            of the calibrations.
        self_checks: those passed.
        fidelity: what codes cost this model, measured at start (`loss.Outcome.facts`).
    """
    layers = get_layers_from_vllm_config(vllm_config, Attention)
    itemsize = vllm_config.model_config.dtype.itemsize
    coded: dict[tuple[int, str], KVCodec] = {}
    stored_bytes = num_coordinates = num_coded_layers = 0
    for layer in layers.values():
        impl = layer.impl
        if layer.kv_sharing_target_layer_name is not None:
            num_coded_layers += isinstance(impl, FibQuantImpl)
            continue  # its tokens are another layer's
        layer_coordinates = 2 * layer.num_kv_heads * layer.head_size
        num_coordinates += layer_coordinates
        if isinstance(impl, FibQuantImpl):
            stored_bytes += impl.num_kv_heads * impl.codec.layout.record_bytes
            coded[impl.head_size, impl.options.preset.name] = impl.codec
            num_coded_layers += 1
        else:
            stored_bytes += layer_coordinates * itemsize
    latents, every = latent_layers(vllm_config), list(layers.values())
    for name, impl in latents.items():
        layer = vllm_config.compilation_config.static_forward_context[name]
        num_coordinates += layer.head_size  # one vector, key and value at once
        stored_bytes += impl.codec.record_bytes
        num_coded_layers += 1
        every.append(layer)
    storages = {
        layer.kv_cache.untyped_storage().data_ptr(): layer.kv_cache.untyped_storage().nbytes()
        for layer in every
        if layer.kv_cache.numel()
    }
    return {
        "counters": own_counters().path,
        "kernel": ops.CPU.name if latents else _kernel(layers.values()),
        "num_layers": len(every),
        "num_coded_layers": num_coded_layers,
        "token_bytes": {
            "stored": stored_bytes,
            "16bit": 2 * num_coordinates,
            "auto": itemsize * num_coordinates,
        },
        "cache_bytes": sum(storages.values()),
        "fits": {n: asdict(f) for n, f in what_fits(vllm_config, sum(storages.values())).items()},
        "codes": [
            _codes(preset, codec.key, codec.value, codec.layout)
            for (_, preset), codec in sorted(coded.items())
        ]
        # A latent is key and value at once.
        + [
            _codes(impl.options.preset.name, *2 * (impl.codec.latent,), impl.codec)
            for impl in list(latents.values())[:1]
        ],
        "calibration": _calibration(
            [layer.impl for layer in layers.values() if isinstance(layer.impl, FibQuantImpl)]
        ),
        "self_checks": [asdict(result) for result in passed_self_checks()],
        "fidelity": outcome_of(vllm_config).facts(),
    }


def _codes(preset: str, key: VectorCodec, value: VectorCodec, record: Any) -> dict[str, Any]:
    """An entry of "codes"; `record` knows its bytes and rate."""
    return {
        "head_dim": key.head_dim,
        "preset": preset,
        "record_bytes": record.record_bytes,
        "rate": (key.spec.rate + value.spec.rate) / 2,
        "effective_rate": record.effective_rate,
        "key": _code(key),
        "value": _code(value),
    }


def _calibration(impls: list[FibQuantImpl]) -> dict[str, Any]:
    kinds = [impl.calibration if impl.calibration in NO_FILE else "measured" for impl in impls]
    maps = [impl.key_map for impl in impls if impl.key_map is not None]
    return {
        **{kind: kinds.count(kind) for kind in ("measured", *reversed(NO_FILE))},
        "transformed": sum(key_map.transform is not None for key_map in maps),
        "digests": sorted({impl.calibration for impl in impls} - set(NO_FILE)),
    }


def _kernel(layers: Iterable[Any]) -> str:
    """The kernel of the first of our layers."""
    ours = (layer for layer in layers if isinstance(layer.impl, FibQuantImpl))
    return next((ops.choose(x.impl.codec, x.kv_cache).name for x in ours), "none")


def _code(codec: VectorCodec) -> dict[str, Any]:
    spec = codec.spec
    return {
        "name": spec.name,
        **asdict(spec),
        "num_lists": codec.num_lists,
        "codebook_digest": codec.codebook.digest,
    }
