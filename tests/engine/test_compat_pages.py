# SPDX-License-Identifier: Apache-2.0
"""Layers of two page sizes, asked by `compat_pages` for their specifications."""

from __future__ import annotations

from types import SimpleNamespace

from vllm_fibquant.engine import compat_pages


def test_a_layer_that_asks_its_base_class(monkeypatch):
    """Some layers of vLLM change what `Attention` says, which is wrapped: it must not ask again."""

    class Attention:
        def __init__(self, name, num_bytes):
            self.layer_name, self.num_bytes = name, num_bytes

        def get_kv_cache_spec(self, vllm_config):
            return SimpleNamespace(page_size_bytes=self.num_bytes, name=self.layer_name)

    class Changed(Attention):
        def get_kv_cache_spec(self, vllm_config):
            spec = super().get_kv_cache_spec(vllm_config)
            spec.is_changed = True
            return spec

    monkeypatch.setattr("vllm.model_executor.layers.attention.Attention", Attention)
    layers = {"plain": Attention("plain", 96), "changed": Changed("changed", 64)}
    monkeypatch.setattr("vllm.config.get_layers_from_vllm_config", lambda config, kind: layers)
    compat_pages.fit_layers_pages(["fibquant"])
    config = SimpleNamespace(
        cache_config=SimpleNamespace(cache_dtype="fibquant"),
        scheduler_config=SimpleNamespace(disable_hybrid_kv_cache_manager=False),
    )
    assert layers["changed"].get_kv_cache_spec(config).is_changed
    assert layers["plain"].get_kv_cache_spec(config).name == "plain"
