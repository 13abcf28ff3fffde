"""The pictures of a run, made with matplotlib from the run's history alone, and the picture of a sweep."""

import io
import itertools
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

os.environ["MPLBACKEND"] = "agg"  # no window is opened, whatever else the user has set
# Read by matplotlib for the date of a PDF, which here has none; a value that is no number would end the run.
os.environ.pop("SOURCE_DATE_EPOCH", None)
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter

from experiments.history import History
from experiments.report import PICTURES
from metrics import NetworkCount
from src.channels import ChannelState

PADDING = 3  # a cell beyond the last channel of its layer; the other cells are a ChannelState, 0 to 2
# Colours that the colour-blind tell apart too: Okabe & Ito 2008, "Color Universal Design".
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE = (
    *("#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7"),
)
SHADE = "#e4e4e4"  # behind the penalty's warm-up
ABOVE, BELOW, LINE = 5, -13, 11  # points from a curve's end to its number; from one number to the next
STATE_COLOURS = {
    ChannelState.NULL: BLACK,
    ChannelState.CONSTANT: ORANGE,
    ChannelState.ALIVE: SKY,
    PADDING: "#dddddd",
}
STATE_NAMES = {
    ChannelState.ALIVE: "alive",
    ChannelState.CONSTANT: "dead, leaves a constant",
    ChannelState.NULL: "dead, leaves nothing",
    PADDING: "padding (no such channel)",
}


def figures(history: History, title: str) -> dict[str, Figure]:
    """The pictures of a run with at least one finished epoch, by the names of their files."""
    assert history.final
    count = history.final.count
    drawn = (
        accuracy_figure(history, f"Accuracy: {title}"),
        sparsity_figure(history, f"Sparsity and bits: {title}"),
        channel_liveness_figure(count, f"Channels: {title}"),
        per_layer_figure(count, f"Channels and bits a layer: {title}"),
        channels_over_time_figure(history, f"Channels alive: {title}"),
    )
    return dict(zip(PICTURES, drawn, strict=True))


def rendered(figure: Figure, kind: str = "png") -> bytes:
    """The figure as the content of a file of this kind, png or pdf; the same figure gives the same bytes."""
    content = io.BytesIO()
    figure.savefig(content, format=kind, dpi=120, metadata={"CreationDate": None} if kind == "pdf" else None)
    return content.getvalue()


def _set_title(axes: Axes, title: str) -> None:
    """Set the title, broken into lines that fit into the narrowest picture."""
    # A title holds flags of the command line. Do not break one at its hyphens, and do not parse formulas: the
    # patterns of --exclude-layers may hold dollar signs, between which matplotlib would read one.
    lines = [textwrap.fill(line, 90, break_on_hyphens=False) for line in title.splitlines()]
    axes.set_title("\n".join(lines), fontsize=10, parse_math=False)


def accuracy_figure(history: History, title: str) -> Figure:
    """Test accuracy and training cross-entropy over the epochs."""
    figure, axes = _over_epochs(history, title)
    records, epochs = history.epochs, [r.epoch for r in history.epochs]
    accuracies, losses = [100 * r.accuracy for r in records], [r.cross_entropy for r in records]
    axes.plot(epochs, accuracies, "o-", color=BLUE, label="test accuracy")
    axes.axhline(100 * history.data.chance, color="grey", linestyle=":", label="chance")
    axes.set(ylabel="test accuracy (%)", ylim=(0, 100))
    right = axes.twinx()
    right.plot(epochs, losses, "s--", color=VERMILION, label="training cross-entropy")
    right.set(ylabel="training cross-entropy (nats)")
    right.set_ylim(bottom=0)
    _ends(
        (axes, accuracies, f"{accuracies[-1]:.2f} %", BLUE), (right, losses, f"{losses[-1]:.3f}", VERMILION)
    )
    _legend(axes, right)
    return figure


def sparsity_figure(history: History, title: str) -> Figure:
    """Both sparsities over the epochs; in a panel below, the mean bit-width and the penalty's coefficient."""
    figure, axes, lower = _over_epochs(history, title, panels=2)
    records, epochs = history.epochs, [r.epoch for r in history.epochs]
    unstructured = [100 * r.unstructured_sparsity for r in records]
    structured = [100 * r.structured_sparsity for r in records]
    axes.plot(epochs, unstructured, "o-", color=BLUE, label="unstructured: weights that are zero")
    axes.plot(epochs, structured, "o-", color=VERMILION, label="structured: filters that are all zero")
    axes.set(ylabel="sparsity of the quantized layers (%)", ylim=(0, 100))
    _ends(
        (axes, unstructured, f"{unstructured[-1]:.1f} %", BLUE),
        (axes, structured, f"{structured[-1]:.1f} %", VERMILION),
    )
    bits = [r.learned_bits for r in records]
    lower.plot(epochs, bits, "s--", color=GREEN, label="mean learned bits")
    lower.set(ylabel="bits a weight (before rounding)")
    lower.set_ylim(0, max(8, *bits) + 0.5)
    _ends((lower, bits, f"{bits[-1]:.2f} bits", GREEN))
    right = lower.twinx()
    coefficients = [r.coefficient for r in records]
    right.plot(epochs, coefficients, "^:", color=PURPLE, label="the penalty's coefficient")
    right.set(ylabel="the penalty's coefficient")
    right.set_ylim(0, 1.1 * max(coefficients) or 1)
    _legend(axes, lower, right)
    return figure


def trade_off_figure(
    series: Mapping[str, Mapping[float, Sequence[Mapping[str, float]]]],
    full: Mapping[str, Sequence[Mapping[str, float]]],
    title: str,
) -> Figure:
    """Test accuracy over BOPs compression, structured on the left and unstructured on the right.

    A series of a sweep is a line: its runs by the weight of the penalty, which stands at the mean over the
    seeds; bars are the range. `full` are the runs in full precision, by what they are called. A run is its
    accuracy and its ratios, by their names in history.json. A point with an infinite ratio, of a network
    with nothing left, is not drawn.
    """
    figure = Figure(figsize=(12, 6), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    largest, seeds = 12.0, 0
    for axes, key, name in (
        (panels[0], "structured_bops_ratio", "structured: the smaller network's"),
        (panels[1], "unstructured_bops_ratio", "unstructured: zero weights cost nothing"),
    ):
        colours = itertools.cycle((BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY, BLACK))
        for (label, points), colour in zip(series.items(), colours, strict=False):
            by_weight = {w: r for w, r in sorted(points.items()) if all(math.isfinite(x[key]) for x in r)}
            x, x_range = _means_and_ranges([[r[key] for r in runs] for runs in by_weight.values()])
            y, y_range = _means_and_ranges(
                [[100 * r["accuracy"] for r in runs] for runs in by_weight.values()]
            )
            axes.errorbar(
                x, y, y_range, x_range, "o-", color=colour, capsize=3, label=label or "the penalty's weight"
            )
            for weight, *at in zip(by_weight, x, y, strict=True):
                axes.annotate(f"{weight:g}", at, (4, 4), textcoords="offset points", fontsize=7, color=colour)
            seeds = max([seeds, *map(len, points.values())])
        for label, runs in full.items():
            mean, spread = _means_and_ranges([[100 * r["accuracy"] for r in runs]])
            axes.errorbar([1], mean, spread, None, "*", color="grey", capsize=3, label=f"{label}, 1x")
            axes.axhline(mean[0], color="grey", linestyle="--")
            seeds = max(seeds, len(runs))
        axes.set_title(name, fontsize=9)
        axes.set(xlabel="BOPs compression (times less than the dense network)")
        axes.set_xscale("log")
        largest = max(largest, 1.2 * axes.get_xlim()[1])
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3, which="both")
    for axes in panels:
        axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 200, 500])
        axes.xaxis.set_major_formatter("{x:g}x")
        axes.set_xlim(0.9, largest)
    panels[0].set(ylabel="test accuracy (%)")
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(fontsize=8)
    lines = [textwrap.fill(line, 130, break_on_hyphens=False) for line in title.splitlines()]
    figure.suptitle(
        "\n".join([*lines, f"mean and range of up to {seeds} seeds" if seeds > 1 else "one seed"]),
        fontsize=10,
        parse_math=False,
    )
    return figure


def _means_and_ranges(values: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """The mean of each list, and its distances to the least and the largest, as `errorbar` takes them."""
    means = [sum(v) / len(v) for v in values]
    below = [mean - min(v) for mean, v in zip(means, values, strict=True)]
    return means, [below, [max(v) - mean for mean, v in zip(means, values, strict=True)]]


def _ends(*curves: tuple[Axes, Sequence[float], str, str]) -> None:
    """Write the last number of each curve of a panel, of one or two, at its end, in the curve's colour.

    It stands on the side that the curve does not come from; near the top and the bottom of the axes, and
    where two curves end close together, on the side that has room.
    """
    finite = [curve for curve in curves if math.isfinite(curve[1][-1])]
    finite.sort(key=lambda curve: _height(*curve[:2]))
    heights = [_height(axes, values) for axes, values, *_ in finite]
    offsets = [
        BELOW if height > 0.93 or (values[-1] < values[max(len(values) - 2, 0)] and height > 0.07) else ABOVE
        for height, (_, values, *_) in zip(heights, finite, strict=True)
    ]
    if len(finite) == 2 and heights[1] - heights[0] < 0.15:
        if heights[1] > 0.93:
            offsets = [BELOW - LINE, BELOW]
        elif heights[0] < 0.07:
            offsets = [ABOVE, ABOVE + LINE]
        else:
            offsets = [BELOW, ABOVE]
    for (axes, values, text, colour), offset in zip(finite, offsets, strict=True):
        axes.annotate(
            text, (len(values), values[-1]), (-2, offset), textcoords="offset points",
            ha="right", fontsize=8, color=colour,
        )  # fmt: skip


def _height(axes: Axes, values: Sequence[float]) -> float:
    """Where a curve ends, as a share of the axes' height."""
    bottom, top = axes.get_ylim()
    return (values[-1] - bottom) / (top - bottom)


def _over_epochs(history: History, title: str, panels: int = 1) -> Any:
    """Make a figure with the epochs as its x axis, where the epochs of the penalty's warm-up are shaded.

    Returns: the figure and the axes of its panels, from the top down.
    """
    figure = Figure(figsize=(8, 5 if panels == 1 else 7.5), layout="constrained")
    rows = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    last = history.epochs[-1].epoch
    delay, ramp = history.settings["sparsity_delay"], history.settings["sparsity_ramp"]
    begins, ends = delay + 1, min(delay + 1 + ramp, last)  # settings count epochs from 0, the axis from 1
    for row in rows:
        if begins < last and history.settings["sparsity_weight"]:
            label = "the penalty's warm-up" if row is rows[0] else None
            row.axvspan(begins, ends, color=SHADE, zorder=0, label=label)
        row.set(xlim=(0.5, last + 0.5))
        row.xaxis.set_major_locator(MaxNLocator(integer=True))
        row.grid(alpha=0.3)
    _set_title(rows[0], title)
    rows[-1].set(xlabel="epoch")
    return figure, *rows


def _legend(*axes: Axes) -> None:
    """Draw one legend below the axes, for all of them."""
    entries = [entry for a in axes for entry in zip(*a.get_legend_handles_labels(), strict=True)]
    handles, labels = zip(*entries, strict=True)
    figure: Any = axes[0].figure
    figure.legend(handles, labels, loc="outside lower center", fontsize=8, ncols=2)


def channel_liveness_figure(count: NetworkCount, title: str = "Channels of each convolution") -> Figure:
    """The state of every output channel: a row a convolution, a cell a channel, coloured by STATE_COLOURS."""
    layers = [layer for layer in count.layers if layer.is_convolution]
    figure = Figure(figsize=(11, 1.5 + 0.27 * max(len(layers), 4)), layout="constrained")
    axes = figure.subplots()
    if not layers:
        return _without_convolutions(figure, axes, title)
    width = max(layer.filters for layer in layers)
    cells = [[*layer.states] + [PADDING] * (width - layer.filters) for layer in layers]
    stages = [layer.name.partition(".")[0] for layer in layers]
    for row, (stage, before) in enumerate(zip(stages[1:], stages, strict=False), 1):
        if stage != before:  # a stage of the network begins here
            axes.axhline(row - 0.5, color=VERMILION, linewidth=2)
    colours = ListedColormap([STATE_COLOURS[state] for state in sorted(STATE_COLOURS)])
    axes.imshow(cells, cmap=colours, vmin=0, vmax=PADDING, aspect="auto", interpolation="nearest")
    axes.set_xticks([x - 0.5 for x in range(width + 1)], minor=True)
    axes.set_yticks([y - 0.5 for y in range(len(layers) + 1)], minor=True)
    axes.grid(which="minor", color="#999999", linewidth=0.4)
    axes.tick_params(which="minor", length=0)
    names = [f"{x.name} ({x.alive_channels}/{x.filters})" for x in layers]
    axes.set_yticks(range(len(layers)), names, fontsize=8)
    axes.set(xlabel="output channel", ylabel="convolution (alive/all)")
    _set_title(axes, title)
    figure.legend(handles=_state_patches(), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _without_convolutions(figure: Figure, axes: Axes, title: str) -> Figure:
    axes.text(0.5, 0.5, "the network has no convolution", ha="center", transform=axes.transAxes)
    _set_title(axes, title)
    return figure


def _state_patches() -> list[Patch]:
    return [
        Patch(facecolor=STATE_COLOURS[state], edgecolor="grey", label=name)
        for state, name in STATE_NAMES.items()
    ]


def channels_over_time_figure(history: History, title: str) -> Figure:
    """The share of output channels alive over the epochs: a row a quantized convolution."""
    layers, epochs = list(history.epochs[-1].layers), [r.epoch for r in history.epochs]
    figure = Figure(figsize=(9, max(4.5, 1.8 + 0.27 * len(layers))), layout="constrained")
    axes = figure.subplots()
    _set_title(axes, title)
    axes.set(xlabel="epoch", ylabel="convolution (channels alive at the end)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not layers:
        axes.text(0.5, 0.5, "no layer is quantized", ha="center", transform=axes.transAxes)
        return figure
    records = [[r.layers[name] for r in history.epochs] for name in layers]
    alive = [[100 * r.alive_channels / r.filters for r in row] for row in records]
    edges = (epochs[0] - 0.5, epochs[-1] + 0.5, len(layers) - 0.5, -0.5)
    image = axes.imshow(
        alive, cmap="cividis", vmin=0, vmax=100, aspect="auto", interpolation="nearest", extent=edges
    )
    names = [
        f"{n} ({row[-1].alive_channels}/{row[-1].filters})" for n, row in zip(layers, records, strict=True)
    ]
    axes.set_yticks(range(len(layers)), names, fontsize=8)
    begins = next((r.epoch for r in history.epochs if r.coefficient > 0), epochs[0])
    if begins > epochs[0]:
        axes.axvline(begins - 0.5, color=VERMILION, label="the penalty sets in")
        figure.legend(loc="outside lower center", fontsize=8)
    figure.colorbar(image, label="output channels alive (%)")
    return figure


def per_layer_figure(count: NetworkCount, title: str) -> Figure:
    """The channels of each convolution: a bar a layer, split by channel state, the bits in use on top."""
    layers = [layer for layer in count.layers if layer.is_convolution]
    figure = Figure(figsize=(max(11, 1 + 0.42 * len(layers)), 5.5), layout="constrained")
    axes = figure.subplots()
    if not layers:
        return _without_convolutions(figure, axes, title)
    places, bottom = range(len(layers)), [0] * len(layers)
    for state in (ChannelState.ALIVE, ChannelState.CONSTANT, ChannelState.NULL):
        heights = [layer.states.count(state) for layer in layers]
        axes.bar(places, heights, bottom=bottom, color=STATE_COLOURS[state], edgecolor="grey")
        bottom = [b + h for b, h in zip(bottom, heights, strict=True)]
    for place, layer in enumerate(layers):
        text = f"{layer.alive_channels}/{layer.filters}\n{layer.bits} bits"
        axes.text(place, layer.filters + 0.5, text, ha="center", va="bottom", fontsize=7)
    axes.set_xticks(places, [layer.name for layer in layers], rotation=60, ha="right", fontsize=8)
    axes.set(ylabel="output channels", ylim=(0, 1.18 * max(bottom)))
    _set_title(axes, title)
    figure.legend(handles=_state_patches()[:3], loc="outside lower center", ncols=3, fontsize=8)
    return figure
