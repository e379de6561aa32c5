# SPDX-License-Identifier: Apache-2.0
"""Audio frames as codes: search for similar spectra in generated, speech-like sound.

python -m examples.audio_frames [--vectors 8000] [--plot docs/images/audio_frames.png]
"""

from __future__ import annotations

import math

import torch

from examples.compare import run

RATE = 16000  # samples per second
FRAME, HOP = 512, 160  # samples
BANDS = 64  # a vector is the logarithm of this many mel bands
SECONDS_PER_VOWEL = 0.15


def speech(seconds: float, generator: torch.Generator) -> torch.Tensor:
    """A voice that glides through vowels: harmonics of a pitch under three formants, and breath.

    Returns:
        float32 `[seconds * RATE]`.
    """
    count = int(seconds * RATE)
    num_vowels = math.ceil(seconds / SECONDS_PER_VOWEL) + 1

    def glide(low: float, high: float) -> torch.Tensor:
        targets = low + (high - low) * torch.rand(1, 1, num_vowels, generator=generator)
        return torch.nn.functional.interpolate(targets, count, mode="linear").flatten()

    pitch = glide(90, 220)
    phase = 2 * math.pi * torch.cumsum(pitch / RATE, 0)
    formants = [(glide(250, 900), 90), (glide(800, 2500), 130), (glide(2200, 3600), 200)]
    loudness = glide(0.1, 1.0)
    sound = torch.zeros(count)
    for harmonic in range(1, 40):
        hertz = harmonic * pitch
        gain = sum(1 / (1 + ((hertz - centre) / width).square()) for centre, width in formants)
        sound += torch.sin(harmonic * phase) * gain * (hertz < RATE / 2) / harmonic**0.5
    return loudness * sound + 0.01 * torch.randn(count, generator=generator)


def frames(count: int, seed: int = 0) -> torch.Tensor:
    """Log-mel spectra in random order, float32 `[count, BANDS]`."""
    generator = torch.Generator().manual_seed(seed)
    sound = speech((count * HOP + FRAME) / RATE, generator)
    windowed = sound.unfold(0, FRAME, HOP)[:count] * torch.hann_window(FRAME)
    power = torch.fft.rfft(windowed).abs().square()  # [count, FRAME / 2 + 1]

    def mel(hertz: torch.Tensor) -> torch.Tensor:
        return 2595 * torch.log10(1 + hertz / 700)

    at = mel(torch.linspace(0, RATE / 2, power.shape[-1]))
    step = at[-1] / (BANDS + 1)
    centres = step * torch.arange(1, BANDS + 1)
    # Low bands are narrower than a bin of the spectrum: each takes at least its neighbours.
    width = step.clamp(min=(at[1] - at[0]).item())
    weights = (1 - (at[:, None] - centres).abs() / width).clamp(min=0)
    order = torch.randperm(count, generator=generator)
    return torch.log(power @ weights + 1e-4)[order]


def main(arguments: list[str] | None = None) -> None:
    run(__doc__, "audio frames", f"frames of {BANDS} log-mel bands", frames, arguments)


if __name__ == "__main__":
    main()
