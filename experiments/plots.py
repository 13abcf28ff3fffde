"""The pictures of a run, made with matplotlib from the run's history alone, and the picture of a sweep."""

import io
import math
import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # no window is opened, whatever else the user has set
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator, NullFormatter

from experiments.files import write_whole
from experiments.history import History
from experiments.report import PICTURES
from metrics import NetworkCount
from src.channels import ChannelState

PADDING = 3  # a cell beyond the last channel of its layer; the other cells are a ChannelState, 0 to 2
STATE_COLOURS = {
    ChannelState.NULL: "black",
    ChannelState.CONSTANT: "#d95f02",
    ChannelState.ALIVE: "white",
    PADDING: "#bbbbbb",
}
STATE_NAMES = {
    ChannelState.ALIVE: "alive",
    ChannelState.CONSTANT: "dead, leaves a constant",
    ChannelState.NULL: "dead, leaves nothing",
    PADDING: "padding (no such channel)",
}


def draw(history: History, title: str, folder: Path) -> list[Path]:
    """Draw the pictures of a run with at least one finished epoch, and write them into `folder`.

    Returns: the paths of the pictures.
    Raises: OutputError naming a file that cannot be written.
    """
    drawn = figures(history, title)
    for picture, figure in drawn.items():
        save_figure(figure, folder / picture)
    return [folder / picture for picture in drawn]


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


def save_figure(figure: Figure, path: Path) -> None:
    """Write the figure as a PNG file, atomically.

    Raises: OutputError naming the file if it cannot be written.
    """
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_whole(path, content.getvalue())


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
    axes.plot(epochs, [100 * r.accuracy for r in records], "o-", color="tab:blue", label="test accuracy")
    axes.axhline(10, color="grey", linestyle=":", label="chance")
    axes.set(ylabel="test accuracy (%)", ylim=(0, 100))
    right = axes.twinx()
    right.plot(
        epochs, [r.cross_entropy for r in records], "s--", color="tab:red", label="training cross-entropy"
    )
    right.set(ylabel="training cross-entropy (nats)")
    right.set_ylim(bottom=0)
    _legend(axes, right)
    return figure


def sparsity_figure(history: History, title: str) -> Figure:
    """Both sparsities, the mean bit-width and the penalty's coefficient over the epochs."""
    figure, axes = _over_epochs(history, title)
    records, epochs = history.epochs, [r.epoch for r in history.epochs]
    unstructured = [100 * r.unstructured_sparsity for r in records]
    structured = [100 * r.structured_sparsity for r in records]
    axes.plot(epochs, unstructured, "o-", color="tab:blue", label="unstructured: weights that are zero")
    axes.plot(epochs, structured, "o-", color="tab:orange", label="structured: filters that are all zero")
    axes.set(ylabel="sparsity of the quantized layers (%)", ylim=(0, 100))
    right = axes.twinx()
    bits = [r.learned_bits for r in records]
    right.plot(epochs, bits, "s--", color="tab:green", label="mean learned bits")
    right.set(ylabel="bits a weight (before rounding)")
    right.set_ylim(0, max(8, *bits) + 0.5)
    further = axes.twinx()
    further.spines.right.set_position(("axes", 1.12))
    coefficients = [r.coefficient for r in records]
    further.plot(epochs, coefficients, "^:", color="tab:purple", label="the penalty's coefficient")
    further.set(ylabel="the penalty's coefficient")
    further.set_ylim(0, 1.1 * max(coefficients) or 1)
    _legend(axes, right, further)
    return figure


def trade_off_figure(
    points: Mapping[str, Sequence[Mapping[str, float]]], full: Sequence[Mapping[str, float]], title: str
) -> Figure:
    """Test accuracy over BOPs compression: the mean and range over the seeds of each point of a sweep.

    `points` are the runs by the name of their point, `full` the runs in full precision. A run is its accuracy
    and its ratios, by their names in history.json. A point with an infinite ratio, of a network with nothing
    left, is not drawn.
    """
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots()
    for key, label, marker in (
        ("structured_bops_ratio", "structured (the smaller network's)", "o"),
        ("unstructured_bops_ratio", "unstructured (zero weights cost nothing)", "s"),
    ):
        runs = [run for run in points.values() if all(math.isfinite(r[key]) for r in run)]
        x, x_range = _means_and_ranges([[r[key] for r in run] for run in runs])
        y, y_range = _means_and_ranges([[100 * r["accuracy"] for r in run] for run in runs])
        axes.errorbar(x, y, y_range, x_range, marker, capsize=3, label=label)
    if full:
        mean, spread = _means_and_ranges([[100 * r["accuracy"] for r in full]])
        axes.errorbar([1], mean, spread, None, "*", color="grey", capsize=3, label="full precision, 1x")
        axes.axhline(mean[0], color="grey", linestyle="--")
    seeds = max((len(runs) for runs in [*points.values(), full]), default=0)
    axes.set(xlabel="BOPs compression (times less than the dense network)", ylabel="test accuracy (%)")
    axes.set_xscale("log")
    largest = max(12, 1.2 * axes.get_xlim()[1])
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100, 200, 500])
    axes.set_xlim(0.9, largest)
    axes.xaxis.set_major_formatter("{x:g}x")
    axes.xaxis.set_minor_formatter(NullFormatter())
    _set_title(axes, f"{title}\nmean and range of up to {seeds} seeds")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    return figure


def _means_and_ranges(values: Sequence[Sequence[float]]) -> tuple[list[float], list[list[float]]]:
    """The mean of each list, and its distances to the least and the largest, as `errorbar` takes them."""
    means = [sum(v) / len(v) for v in values]
    below = [mean - min(v) for mean, v in zip(means, values, strict=True)]
    return means, [below, [max(v) - mean for mean, v in zip(means, values, strict=True)]]


def _over_epochs(history: History, title: str) -> tuple[Figure, Axes]:
    """Make a figure with the epochs as its x axis, where the epochs of the penalty's warm-up are shaded."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    last = history.epochs[-1].epoch
    delay, ramp = history.settings["sparsity_delay"], history.settings["sparsity_ramp"]
    begins, ends = delay + 1, min(delay + 1 + ramp, last)  # settings count epochs from 0, the axis from 1
    if begins < last:
        axes.axvspan(begins, ends, color="tab:orange", alpha=0.12, label="the penalty's warm-up")
    _set_title(axes, title)
    axes.set(xlabel="epoch", xlim=(0.5, last + 0.5))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    return figure, axes


def _legend(*axes: Axes) -> None:
    """Draw one legend below the figure, for all of these axes."""
    entries = [entry for a in axes for entry in zip(*a.get_legend_handles_labels(), strict=True)]
    handles, labels = zip(*entries, strict=True)
    axes[0].legend(handles, labels, loc="upper center", fontsize=8, bbox_to_anchor=(0.5, -0.12), ncols=2)


def channel_liveness_figure(count: NetworkCount, title: str = "Channels of each convolution") -> Figure:
    """The state of every output channel: a row a convolution, a cell a channel, coloured by STATE_COLOURS."""
    layers = [layer for layer in count.layers if layer.is_convolution]
    width = max(layer.filters for layer in layers)
    cells = [[*layer.states] + [PADDING] * (width - layer.filters) for layer in layers]
    figure = Figure(figsize=(11, 1.5 + 0.27 * len(layers)), layout="constrained")
    axes = figure.subplots()
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
        alive, cmap="viridis", vmin=0, vmax=100, aspect="auto", interpolation="nearest", extent=edges
    )
    names = [
        f"{n} ({row[-1].alive_channels}/{row[-1].filters})" for n, row in zip(layers, records, strict=True)
    ]
    axes.set_yticks(range(len(layers)), names, fontsize=8)
    begins = next((r.epoch for r in history.epochs if r.coefficient > 0), epochs[0])
    if begins > epochs[0]:
        axes.axvline(begins - 0.5, color="tab:orange", label="the penalty sets in")
        figure.legend(loc="outside lower center", fontsize=8)
    figure.colorbar(image, label="output channels alive (%)")
    return figure


def per_layer_figure(count: NetworkCount, title: str) -> Figure:
    """The channels of each convolution: a bar a layer, split by channel state, the bits in use on top."""
    layers = [layer for layer in count.layers if layer.is_convolution]
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots()
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
