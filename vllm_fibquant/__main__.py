# SPDX-License-Identifier: Apache-2.0
"""``python -m vllm_fibquant``: the same as the ``vllm-fibquant`` command."""

from vllm_fibquant.cli.main import main

if __name__ == "__main__":
    raise SystemExit(main())
