# SPDX-License-Identifier: Apache-2.0
"""`make bench`: kernels and engine beside vLLM's own attention, tables and plots.

    python -m benchmarks                attention, its options, encode, lists, engine: 35 minutes
    python -m benchmarks --plot-only    tables and plots again from the results there are

Results are appended to docs/results/*.jsonl, which the plots in docs/images are drawn from.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

RESULTS = Path("docs/results")
IMAGES = Path("docs/images")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks")
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    names = [] if args.plot_only else ["attention", "repairs", "encode", "list", "engine"]
    RESULTS.mkdir(parents=True, exist_ok=True)
    for name in names:
        out = RESULTS / f"{name}.jsonl"
        out.unlink(missing_ok=True)
        print(f"\n## {name}\n", flush=True)
        subprocess.run(
            [sys.executable, "-m", f"benchmarks.bench_{name}", "--out", str(out)], check=True
        )
    from benchmarks.plot import draw_all

    for path in draw_all(RESULTS, IMAGES):
        print(f"drew {path}")


if __name__ == "__main__":
    main()
