# SPDX-License-Identifier: Apache-2.0
"""The PTX of attention over mapped keys against the oracle."""

from __future__ import annotations

import shutil

import pytest

from tests import emulated as emu
from tests.ops.test_cuda_emulated import check
from tests.ops.test_cuda_mapped import mapped_of
from tests.ptx import device
from tests.ptx.parse import Fault

pytestmark = [
    pytest.mark.skipif(not device.has_nvcc(), reason="nvcc is not installed: no PTX to run"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the launchers need g++"),
]


@pytest.mark.parametrize("wide", [False, True])
def test_means_that_turn_and_a_transform(wide: bool) -> None:
    with device.running(emu.emulated(), "90"):
        check(emu.emulated(), mapped_of("fibquant_3bit", 64, [40, 3], [1, 2]), wide=wide)


@pytest.mark.long
def test_what_is_read_of_coordinates_that_are_not_coded_has_no_effect() -> None:
    """Of keys of 1 bit half of the transformed coordinates are coded. The kernel for any pair loads
    all of a row's query into registers, the other half from memory that nobody wrote, which here
    is NaN; the product of a transform's code takes its operands anew and never uses those."""
    paged = mapped_of("fibquant_1bit", 128, [40], [1], num_kv_heads=1)
    coded = paged.key_map.transform.num_coded
    assert coded == 64
    first_unwritten = (64 << 10) + 8 * coded * 2  # behind the tables and 8 rows of what is coded
    with pytest.raises(Fault, match=f"{first_unwritten}"), device.running(emu.emulated(), "90"):
        check(emu.emulated(), paged)
    with device.running(emu.emulated(), "90", allow_unwritten=True):
        check(emu.emulated(), paged)
