# SPDX-License-Identifier: Apache-2.0
"""Image patches as codes: search for similar patches in generated textures.

python -m examples.image_features [--vectors 8000] [--plot docs/images/image_features.png]
"""

from __future__ import annotations

import math

import torch

from examples.compare import run

SIDE = 64  # pixels of a texture
PATCH = 8  # a vector is 8 x 8 pixels


def textures(count: int, generator: torch.Generator) -> torch.Tensor:
    """Textures of oriented waves and 1/f noise, float32 `[count, SIDE, SIDE]`."""
    frequency = torch.fft.fftfreq(SIDE)
    radius = (frequency[:, None].square() + frequency.square()).sqrt().clamp(min=1 / SIDE)
    noise = torch.fft.fft2(torch.randn(count, SIDE, SIDE, generator=generator)) / radius
    clouds = torch.fft.ifft2(noise).real
    clouds = clouds / clouds.std(dim=(1, 2), keepdim=True)
    angle, wave, phase = torch.rand(3, count, 1, 1, generator=generator) * math.pi
    at = torch.arange(SIDE).float()
    along = at[:, None] * angle.sin() + at * angle.cos()
    return clouds + torch.sin((0.3 + wave / 4) * along + 2 * phase)


def patches(count: int, seed: int = 0) -> torch.Tensor:
    """Patches in random order, less their own brightness, float32 `[count, PATCH * PATCH]`."""
    generator = torch.Generator().manual_seed(seed)
    per_image = (SIDE // PATCH) ** 2
    images = textures(-(-count // per_image), generator)
    tiles = images.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).reshape(-1, PATCH * PATCH)
    tiles = tiles[torch.randperm(len(tiles), generator=generator)[:count]]
    return tiles - tiles.mean(-1, keepdim=True)


def main(arguments: list[str] | None = None) -> None:
    run(__doc__, "image patches", f"patches of {PATCH} x {PATCH} pixels", patches, arguments)


if __name__ == "__main__":
    main()
