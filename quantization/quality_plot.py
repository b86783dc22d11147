"""Quality against speed as a picture: one disc a package, as large as its files."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime.errors import RequestError

SUFFIXES = (".svg", ".png")

AXES = {
    "kl": "KL divergence from the reference, nats a token (lower is better)",
    "perplexity": "perplexity (lower is better)",
    "accuracy": "accuracy (higher is better)",
}
"""What is drawn upwards: the first of these that was measured."""

SMALLEST_AREA, LARGEST_AREA = 40.0, 900.0  # of a disc, in points squared


def check_plot_file(path: Path) -> None:
    """Tell before any work that a plot cannot be drawn.

    Raises:
        RequestError: the file's name is of no kind that is drawn, its folder is not there, or matplotlib is not.
    """
    if path.suffix not in SUFFIXES:
        raise RequestError(f"--plot {path}: expected a file name that ends with {' or '.join(SUFFIXES)}")
    if not path.parent.is_dir():
        raise RequestError(f"--plot {path}: there is no folder {path.parent}; make it first")
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise RequestError(
            f"--plot needs matplotlib, which does not import ({error}): pip install 'gpt2-edge[plot]'"
        ) from error


def write_plot(
    path: Path, rows: Sequence[dict[str, Any]], *, title: str, speed: str = "tokens/s while scoring"
) -> None:
    """Draw packages by speed and quality and write the picture.

    Args:
        path: ends with one of `SUFFIXES`.
        rows: what `quantization.evaluate` or `export.tune` measured.
        title: what they were judged on.
        speed: what their `tokens_per_s` is.
    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415

    metric = next(name for name in AXES if rows[0].get(name) is not None)
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.add_subplot()
    largest = max(row["bytes"] for row in rows)
    for row in rows:
        label = f"{Path(row['package']).name}\n{row['bytes'] / 1e6:,.1f} MB"
        area = max(SMALLEST_AREA, LARGEST_AREA * row["bytes"] / largest)
        disc = axes.scatter(row["tokens_per_s"], row[metric], s=area, alpha=0.6)
        axes.scatter([], [], s=SMALLEST_AREA, color=disc.get_facecolor(), label=label)
    figure.legend(loc="outside right upper")  # names beside the discs would cover each other
    axes.margins(0.2)
    axes.grid(alpha=0.3)
    axes.set(title=title, xlabel=f"{speed} (higher is better)", ylabel=AXES[metric])
    figure.savefig(path, dpi=150)
