# SPDX-License-Identifier: Apache-2.0
"""Gives every layer the map of its keys, once the model is loaded and before there are pages.

The model is measured (`measure`) at its first start; the result is a file (`calibration`), found
again by a fingerprint of the model, and every later start reads it. Where the model cannot be
measured, or is not to be, what its key projections add as a bias is subtracted all the same
(`key_bias`): no text is needed for that.

A file that cannot be kept costs the next start another measurement, and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import ModelConfig, VllmConfig
from vllm.distributed import get_tp_group, get_world_group
from vllm.logger import init_logger

from vllm_fibquant import files
from vllm_fibquant.codec.codec import KVCodec
from vllm_fibquant.engine import key_bias, measure, reading, rotary
from vllm_fibquant.engine.support import run_options
from vllm_fibquant.keys.calibration import (
    Calibration,
    cache_name,
    check_calibration,
    pack_calibration,
    parse_calibration,
)
from vllm_fibquant.keys.key_map import KeyMap, Turns
from vllm_fibquant.ops.cuda_tables import unsupported_transform
from vllm_fibquant.options import Options

if TYPE_CHECKING:
    from vllm_fibquant.engine.attention import FibQuantImpl

logger = init_logger(f"vllm.{__name__}")

BIAS = "bias"
"""What `FibQuantImpl.calibration` is, of `ranks.NO_FILE`, where a bias alone is subtracted."""


@dataclass(frozen=True)
class _Subject:
    """One language model to be measured, and our layers in it of this process.

    Attributes:
        path: of its calibration as the user gave it, or None.
    """

    model: torch.nn.Module
    config: ModelConfig
    layers: dict[str, FibQuantImpl]
    path: str | None


def calibrate_layers(runner: Any, vllm_config: VllmConfig, layers: dict[str, FibQuantImpl]) -> None:
    """Gives layers the map of their keys; measures the model if need be.

    Args:
        runner: vLLM's model runner, with its models loaded.
        layers: our layers of this process, by name.

    Raises:
        ValueError: a calibration file is damaged or of another model, or the model cannot be
            measured although that was asked for by name.
    """
    options = run_options(vllm_config)
    if options.calibrate != "none":
        for subject in _subjects(runner, vllm_config, layers, options):
            try:
                _calibrate(subject, vllm_config)
            except _NotMeasured as error:
                if options.calibrate != "auto":
                    raise ValueError(str(error)) from error
                logger.warning("FibQuant codes keys without a calibration: %s", error)
    _subtract_biases(vllm_config, _with_pages(layers), options)
    for impl in layers.values():
        if impl.owner is not None:
            impl.key_map, impl.calibration = impl.owner.key_map, impl.owner.calibration


class _NotMeasured(ValueError):
    """The model cannot be measured; a file that is damaged or of another model is no such case."""


def _subjects(
    runner: Any, vllm_config: VllmConfig, layers: dict[str, FibQuantImpl], options: Options
) -> list[_Subject]:
    """The model, and a draft model that reads text by itself."""
    model = reading.language_model(runner.get_model())
    subjects = [
        _Subject(model, vllm_config.model_config, _layers_in(model, layers), options.calibration)
    ]
    speculation = vllm_config.speculative_config
    if speculation is not None and speculation.uses_draft_model():
        draft = runner.get_draft_model()
        # With pipeline parallelism the last stage alone has it, and ranks measure together.
        if draft is not None and vllm_config.parallel_config.pipeline_parallel_size == 1:
            draft = reading.language_model(draft)
            config = speculation.draft_model_config
            subjects.append(_Subject(draft, config, _layers_in(draft, layers), None))
    return subjects


def _with_pages(layers: dict[str, FibQuantImpl]) -> dict[str, FibQuantImpl]:
    """Those that write pages of their own."""
    return {name: impl for name, impl in layers.items() if impl.owner is None}


def _layers_in(model: torch.nn.Module, layers: dict[str, FibQuantImpl]) -> dict[str, FibQuantImpl]:
    inside = {id(getattr(module, "impl", None)) for module in model.modules()}
    return {name: impl for name, impl in layers.items() if id(impl) in inside}


def _calibrate(subject: _Subject, vllm_config: VllmConfig) -> None:
    world, tensor_parallel = get_world_group(), get_tp_group()
    fingerprint = measure.model_fingerprint(subject.model, subject.config)
    path = Path(subject.path) if subject.path else files.find(cache_name(fingerprint))
    replicas = measure.kv_replicas(subject.config)
    num_parts = tensor_parallel.world_size // replicas
    part = tensor_parallel.rank_in_group // replicas
    shapes = [
        (name, (impl.num_kv_heads * num_parts, impl.head_size))
        for name, impl in _with_pages(subject.layers).items()
    ]
    # The first rank alone looks at the file: the others may be on other machines.
    content = None
    if world.rank_in_group == 0 and path is not None and path.is_file():
        content = path.read_bytes()
    content = world.broadcast_object(content, src=0)
    known = None if content is None else parse_calibration(content, str(path))
    if known is None or (subject.path is None and not _covers(known, shapes)):
        known, path = _measure(subject, vllm_config, fingerprint, known)
    source = "this start's measurement" if path is None else str(path)
    check_calibration(known, source, fingerprint, shapes)
    for name, impl in _with_pages(subject.layers).items():
        is_transformed = _can_be_transformed(impl, vllm_config)
        impl.key_map = key_map_of(
            known, name, impl, impl.codec, is_transformed, subject.config, part
        )
        impl.calibration = known.digest
    logger.info("FibQuant codes keys by calibration %s of %s", known.digest[:8], source)


def key_map_of(
    known: Calibration, name: str, impl: FibQuantImpl, codec: KVCodec, is_transformed: bool,
    config: ModelConfig, part: int = 0,
) -> KeyMap:  # fmt: skip
    """How a layer's keys are encoded by a codec; `part` says which KV heads of it are here."""
    begin = part * impl.num_kv_heads
    return known.key_map(
        name,
        begin,
        begin + impl.num_kv_heads,
        impl.options.first_tokens,
        codec.layout.key_index_bytes if is_transformed else 0,
        _turns(impl, config.max_model_len, config.dtype),
    )


def _can_be_transformed(impl: FibQuantImpl, vllm_config: VllmConfig) -> bool:
    """Whether a layer's keys are to be transformed, and the kernels can read them so, which is as
    much as "auto" asks for."""
    if not impl.options.transforms_keys or vllm_config.device_config.device_type != "cuda":
        return impl.options.transforms_keys
    reason = unsupported_transform(impl.codec.layout.key_index_bytes, impl.head_size)
    if reason:
        logger.info_once("FibQuant subtracts keys' means alone: %s", reason)
    return reason is None


def _covers(calibration: Calibration, shapes: list[tuple[str, tuple[int, int]]]) -> bool:
    """Whether these layers were measured: a start that skipped some leaves them out."""
    return all(
        name in calibration.layers and calibration.layers[name].shape == shape
        for name, shape in shapes
    )


def _measure(
    subject: _Subject, vllm_config: VllmConfig, fingerprint: str, known: Calibration | None
) -> tuple[Calibration, Path | None]:
    """Measures the model, and keeps the result if it can. Returns it, and where it is kept.

    Raises:
        _NotMeasured: see `measure.measure`.
        ValueError: the path that the user gave cannot be written.
    """
    world = get_world_group()
    if world.rank_in_group == 0:
        path = Path(subject.path) if subject.path else files.place(cache_name(fingerprint))
        if subject.path and not files.is_writable(Path(subject.path).parent):
            raise ValueError(
                "calibrate: calibration must be a file or a path that can be written, got "
                f"{subject.path}; leave calibration out to keep the result in the cache, or give "
                "another path"
            )
        logger.info(
            "FibQuant measures this model's keys on %d texts of %d tokens, for at most %d s "
            "(%d where other processes are busy); %s",
            measure.NUM_SEQUENCES,
            measure.SEQUENCE_LEN,
            measure.MAX_SECONDS,
            measure.MAX_SECONDS * measure.MOST_BUSY,
            "nowhere to keep the result: the next start measures again"
            if path is None
            else f"the result is kept in {path}",
        )

    def turns_of(impl: FibQuantImpl, num_positions: int) -> Turns | None:
        return _turns(impl, num_positions, subject.config.dtype)

    try:
        num_tokens, layers = measure.measure(
            subject.model, subject.config, vllm_config, subject.layers, turns_of
        )
    except ValueError as error:
        raise _NotMeasured(str(error)) from error
    if known is not None and known.model == fingerprint:
        layers = {**known.layers, **layers}
    content, kept = pack_calibration(fingerprint, num_tokens, layers), None
    if world.rank_in_group == 0:
        kept = _keep(subject.path, fingerprint, content)
        logger.info("FibQuant measured %d tokens of this model", num_tokens)
    # Ranks have gathered the same statistics, and floats of theirs may still differ: one decides.
    content, kept = world.broadcast_object((content, kept), src=0)
    return parse_calibration(content, "this start's measurement"), kept


def _keep(given: str | None, fingerprint: str, content: bytes) -> Path | None:
    """Writes what was measured: where the user said, else into the cache if there is one."""
    if given is None:
        return files.keep(cache_name(fingerprint), content)
    try:
        files.write_atomically(Path(given), content)
    except OSError as error:
        logger.warning("FibQuant uses what it measured and could not keep it: %s", error)
        return None
    return Path(given)


def _subtract_biases(
    vllm_config: VllmConfig, layers: dict[str, FibQuantImpl], options: Options
) -> None:
    """The map of keys of layers that have none yet and whose key projection has a bias."""
    dtype = vllm_config.model_config.dtype
    for name, impl in layers.items():
        if impl.key_map is not None or options.retain is not None:
            continue
        turns = _turns(impl, vllm_config.model_config.max_model_len, dtype)
        try:
            statistics = key_bias.bias_statistics(impl, vllm_config, turns)
        except ValueError as error:
            logger.warning_once(
                "FibQuant codes keys together with their bias, which costs quality: %s", str(error)
            )
            continue
        if statistics is None:
            continue
        known = Calibration(BIAS, 0, key_bias.MAX_FIRST_MEANS, {name: statistics}, BIAS)
        impl.key_map = known.key_map(name, 0, impl.num_kv_heads, options.first_tokens, 0, turns)
        impl.calibration = BIAS
        logger.info_once("FibQuant subtracts the bias of key projections before keys are coded")


def _turns(impl: FibQuantImpl, num_positions: int, dtype: torch.dtype) -> Turns | None:
    """How far the layer's rotary embedding turns keys, or None where that cannot be told."""
    try:
        return rotary.turns_of(impl, num_positions, impl.head_size, dtype)
    except ValueError as error:
        logger.info_once("FibQuant subtracts means that do not turn: %s", str(error))
        return None
