"""A picture of a report: latency over context, its distribution, and what a batch brings. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import RequestError
from .report import receipt_line
from .rounds import Contender, Measured

KINDS = (".svg", ".png")
INCHES, DPI = (5.2, 4.2), 130
"""Of one panel."""

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Told apart by colour-blind readers too. Source: Okabe and Ito, Color Universal Design (2008)."""
MARKERS = "osD^vP"


def check_plot_file(path: Path) -> None:
    """Refuse what could not be written once the runs are done.

    Raises:
        RequestError: another kind of file than .svg or .png, no such folder, or matplotlib is not installed.
    """
    if path.suffix not in KINDS:
        raise RequestError(f"--plot {path}: expected a name that ends in {' or '.join(KINDS)}")
    if not path.absolute().parent.is_dir():
        raise RequestError(f"--plot {path}: there is no folder {path.parent}")
    if find_spec("matplotlib") is None:
        raise RequestError("--plot needs matplotlib, which is not installed: pip install 'gpt2-edge[plot]'")


def write_plot(path: Path, contenders: Sequence[Contender], measured: Measured) -> None:
    """Draw a report; panels that the runs say nothing about are left out."""
    matplotlib = import_module("matplotlib")
    matplotlib.use("Agg")
    pyplot = import_module("matplotlib.pyplot")
    panels = [_draw_context, _draw_distribution] if measured.rows[0][0].itl_ms else []
    if not panels or len({row.prompt_tokens for row in measured.rows[0]}) > 1:
        panels.append(_draw_first_token)
    if panels[0] is _draw_context and len({row.batch for row in measured.rows[0]}) > 1:
        panels.append(_draw_batches)
    columns = min(len(panels), 2)
    lines = -(-len(panels) // columns)
    figure, axes = pyplot.subplots(
        lines, columns, figsize=(INCHES[0] * columns, INCHES[1] * lines), layout="constrained", squeeze=False
    )
    for panel in axes.flat[len(panels) :]:
        panel.set_axis_off()
    for draw, panel in zip(panels, axes.flat, strict=False):
        draw(panel, contenders, measured)
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(receipt_line(measured.receipt), fontsize=6, wrap=True)
    figure.savefig(path, dpi=DPI)
    pyplot.close(figure)


def _draw_context(panel: Any, contenders: Sequence[Contender], measured: Measured) -> None:
    """Each step's median over the runs, and the fitted line as far as it was run."""
    panel.set(
        title="Decode step over context", xlabel="tokens in the cache, of each prompt", ylabel="ms a step (median)"
    )
    style = _Styles()
    for index, (contender, rows) in enumerate(zip(contenders, measured.rows, strict=True)):
        for batch in dict.fromkeys(row.batch for row in rows):
            look = style.next(_label(contender, f"batch {batch}"))
            own = [row for row in rows if row.batch == batch and row.itl_ms]
            past = [row.prompt_tokens + np.arange(row.new_tokens - 1) for row in own]
            times = [np.median(row.raw["itl_ms"], axis=0) for row in own]
            panel.plot(np.concatenate(past), np.concatenate(times), linestyle="", markersize=3, alpha=0.6, **look)
            ends = np.array([np.concatenate(past).min(), np.concatenate(past).max()])
            try:
                model = measured.step_model(index)
            except RequestError:  # too few lengths to fit
                continue
            line = [model.predict(int(end), batch).itl_ms for end in ends]
            panel.plot(ends, line, color=look["color"], linewidth=1)
    panel.legend(fontsize=7, loc="lower right")


def _draw_distribution(panel: Any, contenders: Sequence[Contender], measured: Measured) -> None:
    """Which share of the gaps between tokens is at most so long, for the first and the last workload."""
    panel.set(title="Gaps between tokens", xlabel="ms", ylabel="share of gaps at most so long")
    style = _Styles()
    for contender, rows in zip(contenders, measured.rows, strict=True):
        for row in rows[:1] + rows[1:][-1:]:
            look = style.next(_label(contender, f"batch {row.batch}, prompt {row.prompt_tokens}"))
            gaps = np.sort(np.concatenate(row.raw["itl_ms"]))
            panel.step(
                gaps, np.arange(1, len(gaps) + 1) / len(gaps), where="post", color=look["color"], label=look["label"]
            )
    panel.set_xlim(left=0)
    panel.legend(fontsize=7, loc="lower right")


def _draw_first_token(panel: Any, contenders: Sequence[Contender], measured: Measured) -> None:
    panel.set(title="Time to first token", xlabel="tokens of the prompt", ylabel="ms (median, range)")
    style = _Styles()
    for contender, rows in zip(contenders, measured.rows, strict=True):
        for batch in dict.fromkeys(row.batch for row in rows):
            own = sorted((row for row in rows if row.batch == batch), key=lambda row: row.prompt_tokens)
            middle = np.array([row.ttft_ms.p50 for row in own])
            reach = [middle - [row.ttft_ms.min for row in own], np.array([row.ttft_ms.max for row in own]) - middle]
            look = style.next(_label(contender, f"batch {batch}"))
            panel.errorbar([row.prompt_tokens for row in own], middle, yerr=reach, capsize=3, linewidth=1, **look)
    panel.set_xlim(left=0)
    panel.legend(fontsize=7, loc="upper left")


def _draw_batches(panel: Any, contenders: Sequence[Contender], measured: Measured) -> None:
    panel.set(title="Throughput of a batch", xlabel="prompts that run together", ylabel="tokens/s, all prompts")
    style = _Styles()
    for contender, rows in zip(contenders, measured.rows, strict=True):
        for length in dict.fromkeys(row.prompt_tokens for row in rows):
            own = sorted((row for row in rows if row.prompt_tokens == length), key=lambda row: row.batch)
            look = style.next(_label(contender, f"prompt {length}"))
            panel.plot([row.batch for row in own], [row.decode_tokens_per_s for row in own], linewidth=1, **look)
    panel.set_xlim(left=0)
    panel.set_xticks(sorted({row.batch for rows in measured.rows for row in rows}))
    panel.legend(fontsize=7, loc="upper left")


class _Styles:
    """Another colour and marker for each label."""

    def __init__(self) -> None:
        self._used = 0

    def next(self, label: str) -> dict[str, str]:
        place = self._used
        self._used += 1
        return {"color": COLOURS[place % len(COLOURS)], "marker": MARKERS[place % len(MARKERS)], "label": label}


def _label(contender: Contender, what: str) -> str:
    return f"{contender.name}, {what}, {contender.placement.threads} threads"
