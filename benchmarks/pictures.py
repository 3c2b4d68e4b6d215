"""The demo's two pictures: loss against wall time, and one DeAR step in its lanes."""

import statistics
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none may be there

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch

DDP_COLOUR, DEAR_COLOUR = "#7f7f7f", "#1f77b4"
PHASE_COLOURS = {"forward": "#8fbcdb", "backward": "#f3b37c", "update": "#9bcf9b"}
LANE_COLOURS = {"reduce-scatter": "#d9822b", "all-gather": "#2b7bba", "update": "#5aa35a"}
WAIT_COLOUR = "#c0392b"
SMOOTHED_OVER = 9  # steps: single batches of a few hundred bytes are noisy


def loss_against_time(curves: Sequence[tuple[str, dict[str, Any]]], title: str, path: Path) -> None:
    """Training loss over each strategy's own training time; `curves` are (label, strategy of a training result)."""
    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for (label, strategy), colour in zip(curves, (DDP_COLOUR, DEAR_COLOUR), strict=False):
        seconds = [ms / 1e3 for ms in accumulate(strategy["clock_ms"])]
        losses = strategy["losses"]
        axes.plot(seconds, losses, color=colour, alpha=0.3, linewidth=1)
        axes.plot(seconds, smoothed(losses), color=colour, linewidth=2.4, label=label)
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
    _plain(axes)
    _save(figure, path)


def smoothed(values: Sequence[float]) -> list[float]:
    """Trailing mean, over fewer values at the beginning."""
    return [statistics.mean(values[max(0, i + 1 - SMOOTHED_OVER) : i + 1]) for i in range(len(values))]


def step_timeline(trace: dict[str, Any], title: str, path: Path) -> None:
    """One step, from its forward pass to the end of the next one, which receives what this step's update gathered."""
    compute = [span for span in trace["compute"] if span["step"] in (1, 2)]
    shown = [span for span in compute if span["step"] == 1 or span["phase"] == "forward"]
    begin, end = shown[0]["start"], shown[-1]["end"]
    border = next(span["start"] for span in shown if span["step"] == 2)
    moving = [span for span in trace["lanes"] if span["end"] > begin and span["start"] < end]
    extra = ["update"] if any(span["lane"] == "update" for span in moving) else []
    lanes = ["compute", *extra, "reduce-scatter", "all-gather"]
    row = {lane: len(lanes) - 1 - index for index, lane in enumerate(lanes)}
    figure, axes = plt.subplots(figsize=(13, 1.3 + 0.85 * len(lanes)), layout="constrained")

    def draw(lane: str, span: dict[str, Any], colour: str, label: str = "", **style: Any) -> None:
        start, stop = (max(span["start"], begin) - begin) / 1e6, (min(span["end"], end) - begin) / 1e6
        style = {"edgecolor": "white", "linewidth": 0.6, **style}
        axes.barh(row[lane], stop - start, left=start, height=0.72, color=colour, **style)
        if stop - start > 0.0085 * len(label) * (end - begin) / 1e6:
            axes.text((start + stop) / 2, row[lane], label, ha="center", va="center", fontsize=8)

    for span in shown:
        draw("compute", span, PHASE_COLOURS[span["phase"]], span["name"].replace("block ", "b"))
    for span in moving:
        if span["lane"] == "wait":
            draw("compute", span, "none", hatch="////", edgecolor=WAIT_COLOUR, linewidth=0)
        else:
            draw(span["lane"], span, LANE_COLOURS[span["lane"]])
    axes.axvline((border - begin) / 1e6, color="black", linewidth=1, linestyle="--")
    axes.text((border - begin) / 1e6, len(lanes) - 0.56, " next step", fontsize=9, va="bottom")
    axes.set_yticks(list(row.values()), list(row))
    axes.set(xlabel="milliseconds since the step began", xlim=(0, (end - begin) / 1e6), ylim=(-0.55, len(lanes) - 0.3))
    axes.set_title(title, pad=10)
    entries = [Patch(color=colour, label=phase) for phase, colour in PHASE_COLOURS.items()]
    waits = Patch(facecolor="none", edgecolor=WAIT_COLOUR, hatch="////", linewidth=0, label="training thread waits")
    figure.legend(handles=[*entries, waits], loc="outside lower center", ncols=4, frameon=False)
    _plain(axes)
    _save(figure, path)


def _plain(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25)
    axes.set_axisbelow(True)


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
