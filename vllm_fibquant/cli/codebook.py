# SPDX-License-Identifier: Apache-2.0
"""``codebook build | show | verify | rebuild``."""

from __future__ import annotations

import argparse
from pathlib import Path

from vllm_fibquant import files
from vllm_fibquant.codec.codebook import (
    SHIPPED_DIR,
    Codebook,
    cache_name,
    codebook_filename,
    read_codebook,
    shipped_codes,
)
from vllm_fibquant.codec.codebook_build import (
    SHIPPED_OPTIONS,
    BuildOptions,
    build_codebook,
    measure_mse,
)
from vllm_fibquant.codec.config import CodeSpec
from vllm_fibquant.codec.layout import NORM_BYTES
from vllm_fibquant.codec.source_law import distortion_bound, scalar_mse, scipy_special

MSE_TOLERANCE = 0.01
"""Relative; two measurements on 2^18 samples differ by about 0.002."""


def add_parser(commands: argparse._SubParsersAction) -> None:
    """Add the ``codebook`` command to a command line's subparsers."""
    parser = commands.add_parser("codebook", help="build, show or verify codebook files")
    actions = parser.add_subparsers(title="actions", required=True, metavar="ACTION")

    build = actions.add_parser("build", help="build a codebook into the user's cache")
    build.add_argument("--head-dim", type=int, required=True)
    build.add_argument("--subvec-dim", type=int, required=True)
    build.add_argument("--num-codewords", type=int, required=True)
    build.add_argument("--folded", action="store_true", help="magnitudes times sign patterns")
    build.add_argument("--storage", choices=("int8", "float16"), default="int8")
    defaults = BuildOptions()
    build.add_argument("--seed", type=int, default=defaults.seed)
    build.add_argument("--restarts", type=int, default=defaults.restarts, help="default: 4")
    build.add_argument("--samples", type=int, help="training subvectors; default: by code")
    build.add_argument(
        "--iterations", type=int, default=defaults.iterations, help="most per restart; default: 100"
    )
    build.add_argument("--out", type=Path, metavar="FILE", help="default: the user's cache")
    build.set_defaults(run=run_build)

    show = actions.add_parser(
        "show", help="rates and MSE beside the scalar quantiser and the bound"
    )
    show.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all shipped")
    show.set_defaults(run=run_show)

    verify = actions.add_parser("verify", help="check digests and measure the MSE again")
    verify.add_argument("files", nargs="*", type=Path, metavar="FILE", help="default: all shipped")
    verify.set_defaults(run=run_verify)

    rebuild = actions.add_parser("rebuild", help="build every shipped codebook again")
    rebuild.add_argument("--out", type=Path, default=SHIPPED_DIR, metavar="DIR")
    rebuild.set_defaults(run=run_rebuild)


def run_build(args: argparse.Namespace) -> int:
    spec = CodeSpec(args.subvec_dim, args.num_codewords, args.folded, storage=args.storage)
    if args.head_dim < 1:
        raise ValueError(
            f"codebook build: --head-dim must be at least 1, got {args.head_dim}; give the model's"
        )
    spec.num_subvecs(args.head_dim)
    options = BuildOptions(args.seed, args.restarts, args.samples, args.iterations)
    scipy_special()  # refused now if it is missing, not after the samples
    path = args.out or files.place(cache_name(spec, args.head_dim))
    if path is None or path.is_dir() or not files.is_writable(path.parent):
        raise ValueError(
            f"codebook build: --out must be a file that can be written, got {path or 'no cache'}; "
            f"give another, or set {files.CACHE_VARIABLE} to a folder that can be written"
        )
    book = _build(spec, args.head_dim, options, path)
    print(f"{path}\n{describe(book)}")
    return 0


def run_show(args: argparse.Namespace) -> int:
    if args.files:
        print("\n\n".join(f"{path}\n{describe(_read(path))}" for path in args.files))
        return 0
    print(f"{'file':28}{'rate':>6}{'effective':>11}{'MSE':>9}{'scalar':>9}{'bound':>9}")
    for path in shipped_paths():
        book = read_codebook(path)
        spec, d = book.spec, book.head_dim
        print(
            f"{path.name:28}{spec.rate:6.3g}{effective_rate(spec, d):11.3f}"
            f"{book.provenance['mse_rounded']:9.5f}{_scalar_text(d, spec.rate):>9}"
            f"{distortion_bound(d, spec.rate):9.5f}"
        )
    return 0


def run_verify(args: argparse.Namespace) -> int:
    num_bad = 0
    paths = args.files or shipped_paths()
    for path in paths:
        try:
            book = _read(path)
            expected = book.provenance["mse_rounded"]
            measured = measure_mse(book)
            if abs(measured / expected - 1) > MSE_TOLERANCE:
                raise ValueError(
                    f"verify: {path} must have MSE {expected:.5f} within {MSE_TOLERANCE:.0%}, "
                    f"got {measured:.5f}; build it again"
                )
            if not args.files and path.name != codebook_filename(book.spec, book.head_dim):
                raise ValueError(
                    f"verify: {path} must hold the code its name says, got "
                    f"{codebook_filename(book.spec, book.head_dim)}; build it again"
                )
            print(f"ok   {path.name}  MSE {measured:.5f} (recorded {expected:.5f})")
        except ValueError as error:
            num_bad += 1
            print(f"BAD  {error}")
    print(f"{len(paths) - num_bad} of {len(paths)} codebooks are as recorded")
    return 1 if num_bad else 0


def _read(path: Path) -> Codebook:
    """`read_codebook`, with what to give where the file cannot be read."""
    try:
        return read_codebook(path)
    except OSError as error:
        raise ValueError(
            f"codebook: FILE must be a codebook that can be read, got {path} ({error.strerror}); "
            "give a .fqcb file, or none for all that ship"
        ) from error


def run_rebuild(args: argparse.Namespace) -> int:
    scipy_special()  # refused now if it is missing, not after the samples
    for spec, head_dim in shipped_codes():
        _build(spec, head_dim, SHIPPED_OPTIONS, args.out / codebook_filename(spec, head_dim))
    return 0


def shipped_paths() -> list[Path]:
    """The file of every shipped codebook, whether it exists or not."""
    return [SHIPPED_DIR / codebook_filename(spec, d) for spec, d in shipped_codes()]


def effective_rate(spec: CodeSpec, head_dim: int) -> float:
    """Stored bits per coordinate of one vector, its norm included."""
    return 8 * (spec.index_bytes(head_dim) + NORM_BYTES) / head_dim


def describe(book: Codebook) -> str:
    """Everything worth knowing about a codebook, a few lines."""
    spec, d, made = book.spec, book.head_dim, book.provenance
    folded = f", {spec.num_rows} magnitudes x {1 << spec.subvec_dim} signs" if spec.folded else ""
    return (
        f"  code      head_dim {d}, subvec_dim {spec.subvec_dim}, "
        f"num_codewords {spec.num_codewords}{folded}, {spec.storage}\n"
        f"  rate      {spec.rate:.4g} bits per coordinate, "
        f"effective {effective_rate(spec, d):.4g}\n"
        f"  MSE       {made['mse_rounded']:.5f} rounded, {made['mse_refined']:.5f} refined, "
        f"{made['mse_initial']:.5f} initial\n"
        f"  beside    {_scalar_text(d, spec.rate)} scalar Lloyd-Max at the same rate, "
        f"{distortion_bound(d, spec.rate):.5f} rate-distortion bound\n"
        f"  made by   seed {made['seed']}, restarts {made['restarts']}, samples {made['samples']}, "
        f"iterations {made['iterations']}\n"
        f"  digest    {book.digest}"
    )


def _scalar_text(head_dim: int, rate: float) -> str:
    """MSE of the scalar quantiser, which exists at whole rates only."""
    return f"{scalar_mse(head_dim, 1 << int(rate)):.5f}" if rate in range(1, 17) else "-"


def _build(spec: CodeSpec, head_dim: int, options: BuildOptions, path: Path) -> Codebook:
    from tqdm import tqdm

    name = codebook_filename(spec, head_dim).removesuffix(".fqcb")
    with tqdm(total=options.restarts * options.iterations, desc=name, unit="step") as bar:

        def progress(done: int, total: int, mse: float) -> None:
            bar.set_postfix_str(f"MSE {mse:.5f}", refresh=False)
            bar.update(done - bar.n)

        book, content = build_codebook(spec, head_dim, options, progress)
        bar.update(bar.total - bar.n)
    files.write_atomically(path, content)
    return book
