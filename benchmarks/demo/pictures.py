"""The demo's two pictures: loss against wall time, and one training step in its lanes."""

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from ..drawing import plain, save
from ..stats import SMOOTHED_OVER, trailing_mean
from ..training.breakdown import covered

DDP_COLOUR, DEAR_COLOUR = "#7f7f7f", "#1f77b4"
PHASE_COLOURS = {"forward": "#8fbcdb", "backward": "#f3b37c", "update": "#9bcf9b"}
# In the order of the lanes from top to bottom, below "compute".
LANE_COLOURS = {"all-reduce": "#8e6bb0", "reduce-scatter": "#d9822b", "all-gather": "#2b7bba"}
WAIT_COLOUR = "#c0392b"


def loss_against_time(curves: Sequence[tuple[str, dict[str, Any]]], title: str, path: Path) -> None:
    """Training loss over each strategy's own training time; `curves` are (label, strategy of a training result)."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for (label, strategy), colour in zip(curves, (DDP_COLOUR, DEAR_COLOUR), strict=False):
        seconds = [ms / 1e3 for ms in accumulate(strategy["clock_ms"])]
        losses = strategy["losses"]
        axes.plot(seconds, losses, color=colour, alpha=0.3, linewidth=1)
        axes.plot(seconds, trailing_mean(losses), color=colour, linewidth=2.4, label=label)
        axes.axvline(seconds[-1], color=colour, linewidth=1, linestyle=":")
        axes.annotate(
            f"{len(losses)} steps\nin {seconds[-1]:.1f} s",
            (seconds[-1], 0.62 if colour == DEAR_COLOUR else 0.80),
            xycoords=("data", "axes fraction"),
            xytext=(-6, 0),
            textcoords="offset points",
            ha="right",
            color=colour,
        )
    axes.set(
        xlabel="training time, each on its own clock (seconds)", ylabel="training loss (nats per byte)", title=title
    )
    axes.legend(title=f"thick: mean of {SMOOTHED_OVER} steps", frameon=False)
    plain(axes)
    save(figure, path)


def step_timeline(traces: Sequence[tuple[str, dict[str, Any]]], title: str, path: Path) -> None:
    """One step of each (label, trace), below each other on one time axis.

    A step is shown from its forward pass to the end of the next one, which receives what this step's update gathered.
    """
    heights = [1.0 + len(_lanes(trace)) for _, trace in traces]
    figure, panels = plt.subplots(
        len(traces),
        squeeze=False,
        sharex=True,
        figsize=(13, 1.0 + 0.72 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
    )
    for axes, (label, trace) in zip(panels[:, 0], traces, strict=True):
        _one_step(axes, trace, label)
    panels[-1, 0].set_xlabel("milliseconds since the step began")
    panels[0, 0].set_xlim(0, max(_extent(trace) for _, trace in traces))
    entries = [Patch(color=colour, label=phase) for phase, colour in PHASE_COLOURS.items()]
    waits = Patch(facecolor="white", edgecolor=WAIT_COLOUR, hatch="////", linewidth=0, label="training thread waits")
    figure.legend(handles=[*entries, waits], loc="outside lower center", ncols=4, frameon=False)
    figure.suptitle(title)
    save(figure, path)


def typical_step(trace: dict[str, Any]) -> int:
    """Of the steps with one before and one after them, the one of median length."""
    begins: dict[int, int] = {}
    for span in trace["compute"]:
        begins.setdefault(span["step"], span["start"])
    lengths = {step: begins[step + 1] - begin for step, begin in begins.items() if step > 0 and step + 1 in begins}
    return sorted(lengths, key=lambda step: lengths[step])[(len(lengths) - 1) // 2]


def _shown(trace: dict[str, Any]) -> list[dict[str, Any]]:
    """The compute spans of the shown step and of the forward pass after it."""
    step = typical_step(trace)
    after = [span for span in trace["compute"] if span["step"] == step + 1 and span["phase"] == "forward"]
    return [span for span in trace["compute"] if span["step"] == step] + after


def _extent(trace: dict[str, Any]) -> float:
    shown = _shown(trace)
    return (shown[-1]["end"] - shown[0]["start"]) / 1e6


def _lanes(trace: dict[str, Any]) -> list[str]:
    """The lanes in which something moves, below the one that computes."""
    named = {span["lane"] for span in trace["lanes"]}
    return ["compute", *(lane for lane in LANE_COLOURS if lane in named)]


def _one_step(axes: Axes, trace: dict[str, Any], label: str) -> None:
    shown, lanes = _shown(trace), _lanes(trace)
    begin, end = shown[0]["start"], shown[-1]["end"]
    border = next(span["start"] for span in shown if span["step"] > shown[0]["step"])
    waits = [span for span in trace["lanes"] if span["lane"] == "wait"]
    row = {lane: len(lanes) - 1 - index for index, lane in enumerate(lanes)}

    def draw(lane: str, span: dict[str, Any], colour: str, text: str = "", **style: Any) -> None:
        start, stop = (max(span["start"], begin) - begin) / 1e6, (min(span["end"], end) - begin) / 1e6
        if stop <= start:
            return
        style = {"edgecolor": "white", "linewidth": 0.6, **style}
        axes.barh(row[lane], stop - start, left=start, height=0.74, color=colour, **style)
        if stop - start > 0.006 * len(text) * (end - begin) / 1e6:
            backed = {"boxstyle": "round,pad=0.15", "facecolor": colour, "edgecolor": "none"}
            middle = (start + stop) / 2, row[lane]
            axes.text(*middle, text, ha="center", va="center", fontsize=8, zorder=6, bbox=backed)

    for span in shown:
        computes = covered(span, waits) < 0.8 * (span["end"] - span["start"])
        name = span["name"].replace("block ", "b") if computes else ""
        draw("compute", span, PHASE_COLOURS[span["phase"]], name)
    for span in trace["lanes"]:
        if span["lane"] == "wait":
            draw("compute", span, "white", hatch="////", edgecolor=WAIT_COLOUR, linewidth=0, zorder=4)
        elif span["lane"] == "update":  # of one fusion group, on the training thread
            draw("compute", span, PHASE_COLOURS["update"], zorder=5, linewidth=0)
        else:
            draw(span["lane"], span, LANE_COLOURS[span["lane"]])
    step = (border - begin) / 1e6
    axes.axvline(step, color="black", linewidth=1, linestyle="--")
    axes.text(step, len(lanes) - 0.55, f" next step, after {step:.0f} ms", fontsize=9, va="bottom")
    axes.set_yticks(list(row.values()), list(row))
    axes.set_ylim(-0.55, len(lanes) - 0.2)
    axes.set_title(label, loc="left", fontsize=11, fontweight="bold")
    plain(axes)
