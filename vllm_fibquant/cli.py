# SPDX-License-Identifier: Apache-2.0
"""The ``vllm-fibquant`` command."""


def main() -> int:
    return 0
