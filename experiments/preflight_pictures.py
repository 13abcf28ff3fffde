"""Preflight check of the pictures: what is drawn of a small history is what that history says."""

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate, groupby, zip_longest
from typing import Any

import numpy as np

from experiments.expect import Subject, expect, shows
from experiments.history import CompressedRecord, EpochRecord, FinalCounts, History, LayerRecord
from metrics import LayerCount, NetworkCount
from src.channels import ChannelState

EPOCHS = 15, 1000  # at least and at most
DELAY, RAMP = 1, 2
COEFFICIENTS = (0.0, 0.0, 0.0005, 0.001, 0.001)  # what the delay and the ramp give, and then the last
NULL, CONSTANT, ALIVE = ChannelState.NULL, ChannelState.CONSTANT, ChannelState.ALIVE
STATES = NULL, CONSTANT, ALIVE
ROUNDING = 1e-9  # of places, as shares of their axes
FEWEST_LAYERS = 3  # of a made-up history: fewer could not be mistaken for each other
# Ratios small and large, of which no two are alike.
RATIOS = 1.01, 1234.56, 7.89, 98765.43, 100.02, 2.5
# A word of what the legends call a channel: by its state, and by None where there is no such channel.
WORDS = {ALIVE: "alive", CONSTANT: "constant", NULL: "nothing", None: "padding"}

# What each curve shows of an epoch, by its label, and the label of its axis.
CURVES: dict[str, dict[str, tuple[Callable[[EpochRecord], float], str]]] = {
    "accuracy_curve.png": {
        "test accuracy": (lambda r: 100 * r.accuracy, "test accuracy (%)"),
        "training cross-entropy": (lambda r: r.cross_entropy, "training cross-entropy (nats)"),
    },
    "sparsity_curves.png": {
        "unstructured: weights that are zero": (
            lambda r: 100 * r.unstructured_sparsity,
            "sparsity of the quantized layers (%)",
        ),
        "structured: filters that are all zero": (
            lambda r: 100 * r.structured_sparsity,
            "sparsity of the quantized layers (%)",
        ),
        "mean learned bits": (lambda r: r.learned_bits, "bits a weight (before rounding)"),
        "the penalty's coefficient": (lambda r: r.coefficient, "the penalty's coefficient"),
    },
}

# Each picture's titles, the names of its axes, and those in its legends.
STATES_NAMED = ("alive", "dead, leaves a constant", "dead, leaves nothing")
AROUND: dict[str, tuple[str, ...]] = {
    "accuracy_curve.png": (
        "Accuracy: a small history", "epoch", "test accuracy (%)", "training cross-entropy (nats)",
        "the penalty's warm-up", "test accuracy", "chance", "training cross-entropy",
    ),
    "sparsity_curves.png": (
        "Sparsity and bits: a small history", "sparsity of the quantized layers (%)",
        "epoch", "bits a weight (before rounding)", "the penalty's coefficient",
        "the penalty's warm-up", "unstructured: weights that are zero",
        "structured: filters that are all zero", "mean learned bits", "the penalty's coefficient",
    ),
    "channel_liveness.png": (
        "Channels: a small history", "output channel", "convolution (alive/all)",
        *STATES_NAMED, "padding (no such channel)",
    ),
    "per_layer_channels.png": (
        "Channels and bits a layer: a small history", "output channels", *STATES_NAMED,
    ),
    "channels_over_time.png": (
        "Channels alive: a small history", "epoch", "convolution (channels alive at the end)",
        "output channels alive (%)", "the penalty sets in",
    ),
}  # fmt: skip


def pictures_show_the_history(subject: Subject) -> str:
    """Curves, bars, cells and legends, read off the figures before they are written, against the history."""
    from experiments.plots import figures  # not before it is needed: matplotlib takes half a second

    history = small_history(subject.history, subject.pipeline.evaluator.dense)
    drawn = figures(history, "a small history")
    for picture, curves in CURVES.items():
        _compare_curves(picture, drawn[picture], history, curves)
    layers = [layer for layer in history.final.layers if layer.is_convolution] if history.final else []
    _compare_cells(drawn["channel_liveness.png"], layers)
    _compare_bars(drawn["per_layer_channels.png"], layers)
    _compare_times(drawn["channels_over_time.png"], history.epochs)
    for picture, figure in drawn.items():
        _compare_words(picture, figure)
        _compare_limits(picture, figure)
    return f"{len(drawn)} pictures of {len(history.epochs)} epochs"


def small_history(history: History, dense: NetworkCount) -> History:
    """The run's history with made-up numbers, in which no two curves or rows are alike.

    It has as many epochs as the run is to have, within `EPOCHS`, and its network's convolutions with their
    channels: from some number on a curve may be smoothed, or a table or picture cut.
    """
    epochs = min(max(EPOCHS[0], history.settings["epochs"]), EPOCHS[1])
    widths = {layer.name: layer.filters for layer in dense.layers if layer.is_convolution}
    widths |= {f"made.up.{i}": 6 + i for i in range(FEWEST_LAYERS - len(widths))}
    counts = [
        LayerCount(
            name, True, bits=3 + i % 13, learned_bits=3.25 + i % 13, weights=90_000,
            zero_weights=1100 + 710 * (i % 120), filters=width, zero_filters=(1 + i) % (width + 1),
            states=_states(i, width), dense_macs=9000 + 10 * i, structured_macs=5000 + i,
            unstructured_macs=3000 + i,
        )
        for i, (name, width) in enumerate(widths.items())
    ]  # fmt: skip
    linear = LayerCount("linear", False, 32, 32.0, 90, 0, 9, 0, (int(ALIVE),) * 9, 90, 80, 70, False)
    numbers: dict[str, Any] = {f.name: 1.37 + 7.11 * i for i, f in enumerate(dataclasses.fields(FinalCounts))}
    ratios = dict(zip(ratio_names(), RATIOS, strict=True))
    layers = [_layers(epoch, widths) for epoch in range(1, len(COEFFICIENTS) + 1)]
    return dataclasses.replace(
        history,
        settings=history.settings
        | {"sparsity_delay": float(DELAY), "sparsity_ramp": float(RAMP), "sparsity_weight": 1e-3},
        epochs=[_record(epoch, layers[(epoch - 1) % len(layers)]) for epoch in range(1, epochs + 1)],
        final=FinalCounts(
            **(numbers | ratios | {"totals": {"dense_macs": 27_120}, "layers": [*counts, linear]})
        ),
        compressed=_compressed(),
    )


def ratio_names() -> list[str]:
    """The ratios among the final counts, and the ceilings of ratios."""
    return [f.name for f in dataclasses.fields(FinalCounts) if f.name.endswith(("_ratio", "_ceiling"))]


def _states(number: int, width: int) -> tuple[int, ...]:
    """The states of a layer's channels, in an order and with shares of its own."""
    dice = random.Random(number)
    living = 1 + number % 5  # as likely as both others together, or up to five times
    return tuple(int(dice.choices(STATES, (1, 1, living))[0]) for _ in range(width))


def _compressed() -> CompressedRecord:
    """Numbers of which no two are alike."""
    numbers: dict[str, Any] = {}
    for i, item in enumerate(dataclasses.fields(CompressedRecord)):
        if item.type in (int, float):
            numbers[item.name] = 1000 + 211 * i if item.type is int else 0.11 + 0.03 * i
    seconds = {"median": 0.0123, "least": 0.0112, "most": 0.0145}
    latency = {"dense, batch 1": seconds, "smaller, batch 1": {n: s / 2 for n, s in seconds.items()}}
    return CompressedRecord(**numbers, packed_settings={}, packed_metrics={}, latency_seconds=latency)


def _layers(epoch: int, widths: Mapping[str, int]) -> dict[str, LayerRecord]:
    """A record a layer; in each another share of the channels is alive, and in another epoch as well."""
    layers = {}
    for i, (name, width) in enumerate(widths.items()):
        alive = 1 + (width - 1 - (epoch + i) // 2) % width
        layers[name] = LayerRecord(
            parameters={}, gradients={}, learned_bits=7.5 - epoch - i / 4, bits=7 - epoch, weights=90_000,
            zero_weights=10 * epoch + i, filters=width, zero_filters=epoch // 3,
            alive_channels=alive, constant_channels=0, null_channels=width - alive,
        )  # fmt: skip
    return layers


def _record(number: int, layers: dict[str, LayerRecord]) -> EpochRecord:
    """The record of this epoch, from 1; the numbers of a long run come again and again, but for a swing."""
    epoch = (number - 1) % len(COEFFICIENTS) + 1
    swing = 0.06 * (-1) ** number  # no series only rises or only falls
    return EpochRecord(
        epoch=number,
        loss=3.1 - 0.17 * epoch + 4 * swing,
        cross_entropy=2.2 - 0.13 * epoch + 3 * swing,
        penalty=43.0 - epoch,
        coefficient=COEFFICIENTS[min(number, len(COEFFICIENTS)) - 1],
        # From a few percent to nearly 100: axes that cut what is low or high are seen.
        accuracy=0.21 * epoch - 0.13 + swing,
        unstructured_sparsity=0.21 * epoch - 0.12 - swing,
        structured_sparsity=0.18 * epoch - 0.14 + swing / 2,
        learned_bits=15.6 - 0.4 * epoch + 5 * swing,  # more than the published quantizer's 8
        bits=7.0 - 0.5 * epoch,
        layers=layers,
        seconds=10.0 + epoch,
    )


def _compare_curves(
    picture: str,
    figure: Any,
    history: History,
    curves: dict[str, tuple[Callable[[EpochRecord], float], str]],
) -> None:
    records, chance = history.epochs, 100 / history.data.classes
    drawn = [line for axes in figure.axes for line in axes.get_lines()]
    lines = {line.get_label(): line for line in drawn}
    expect(len(lines) == len(drawn), f"{picture}: two curves have one name", _cause("another column"))
    if "chance" in lines:
        _expect_equal(
            lines["chance"].get_ydata(), [chance, chance], f"{picture}: the line of chance", "another share"
        )
    for label, (value, axis) in curves.items():
        expect(label in lines, f"{picture}: no curve is called {label!r}", _cause("another column"))
        line = lines[label]
        _expect_equal(
            line.get_xdata(), [r.epoch for r in records], f"{picture}: epochs of {label!r}", "another epoch"
        )
        _expect_equal(
            line.get_ydata(), [value(r) for r in records], f"{picture}: {label!r}", "another column"
        )
        expect(
            line.axes.get_ylabel() == axis,
            f"{picture}: {label!r} stands on the axis {line.axes.get_ylabel()!r}",
            _cause("another axis"),
        )
    _compare_ends(picture, figure)
    legend = _legend(figure)
    for label, line in lines.items():
        shown = _style(legend[label]) if label in legend else "nothing"
        expect(
            shown == _style(line),
            f"{picture}: {label!r} is {_style(line)}, in the legend {shown}",
            "the legend of experiments/plots.py gives a curve another's name or colour",
        )
    expect(
        len({line.get_color() for line in drawn}) == len(drawn),
        f"{picture}: two curves have one colour",
        "the colours of experiments/plots.py",
    )
    (shade,) = figure.axes[0].patches
    _expect_equal(
        shade.get_extents().transformed(figure.axes[0].transData.inverted()).intervalx,
        [DELAY + 1, DELAY + 1 + RAMP],
        f"{picture}: the shade of the penalty's warm-up",
        "another epoch",
    )


def _compare_ends(picture: str, figure: Any) -> None:
    """The number at the end of a curve, in its colour, is its last, and stands there."""
    lines = {line.get_color(): line.get_xydata() for axes in figure.axes for line in axes.get_lines()}
    for text in (text for axes in figure.axes for text in axes.texts):
        last = lines[text.get_color()][-1]
        expect(
            shows(text.get_text().split()[0], last[1]),
            f"{picture}: {text.get_text()!r} stands at the end of a curve that ends at {last[1]:g}",
            _cause("another epoch"),
        )
        _expect_equal(text.xy, last, f"{picture}: the place of {text.get_text()!r}", "another epoch")


def _compare_words(picture: str, figure: Any) -> None:
    """Titles, and the names of axes and of what the legends list, are those that this picture has."""
    around = [(axes.get_title(), axes.get_xlabel(), axes.get_ylabel()) for axes in figure.axes]
    words = [" ".join(word.split()) for words in around for word in words if word] + [*_legend(figure)]
    for found, wanted in zip_longest(words, AROUND[picture], fillvalue="nothing"):
        expect(
            found == wanted,
            f"{picture}: {found!r} stands around its axes where {wanted!r} belongs",
            "a title, axis or legend of experiments/plots.py names something else than is drawn",
        )


def _compare_limits(picture: str, figure: Any) -> None:
    """All lines, bars and images lie within their axes, which begin at the left."""

    def named(artist: Any) -> str:
        label = str(artist.get_label())
        return f"a {type(artist).__name__.lower()}" if label.startswith("_") else repr(label)

    for axes in figure.axes:
        placed = [(line, line.get_transform().transform(line.get_xydata())) for line in axes.lines]
        placed += [(patch, patch.get_extents().get_points()) for patch in axes.patches]
        placed += [(image, image.get_window_extent().get_points()) for image in axes.images]
        for artist, places in placed:
            shares = axes.transAxes.inverted().transform(places)
            (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
            expect(
                bool(((shares > -ROUNDING) & (shares < 1 + ROUNDING)).all()),
                f"{picture}: {named(artist)} is cut by axes that run from {left:g} to {right:g} and from "
                f"{bottom:g} to {top:g}",
                _cause("less"),
            )
            expect(
                left < right and (bottom < top or bool(axes.images)),
                f"{picture}: axes run from {left:g} to {right:g} and from {bottom:g} to {top:g}",
                _cause("another direction"),
            )


def _compare_cells(figure: Any, layers: Sequence[LayerCount]) -> None:
    picture, (axes, *_) = "channel_liveness.png", figure.axes
    (image,) = axes.get_images()
    width = max(layer.filters for layer in layers)
    states = [[*map(ChannelState, layer.states)] + [None] * (width - layer.filters) for layer in layers]
    cells = image.to_rgba(image.get_array())
    _expect_equal(
        cells, _colours(figure, states), f"{picture}: the cells' colours", "another channel, layer or state"
    )
    extent = [-0.5, width - 0.5, len(layers) - 0.5, -0.5]
    _expect_equal(image.get_extent(), extent, f"{picture}: the cells' places", "another channel or layer")
    names = [f"{x.name} ({x.states.count(ALIVE)}/{len(x.states)})" for x in layers]
    _expect_names(picture, axes.yaxis, names)
    # A stage ends below as many layers as its name and those before it have.
    lengths = [len([*stage]) for _, stage in groupby(layers, lambda layer: layer.name.split(".")[0])]
    _expect_equal(
        [line.get_ydata() for line in axes.get_lines()],
        [[ends - 0.5] * 2 for ends in accumulate(lengths[:-1])],
        f"{picture}: the lines between stages",
        "another layer",
    )


def _compare_bars(figure: Any, layers: Sequence[LayerCount]) -> None:
    picture, (axes, *_) = "per_layer_channels.png", figure.axes
    nothing = (0, 0, 0, 0)
    bars = [(b.get_x(), b.get_x() + b.get_width(), b.get_y(), b.get_height(), b.get_facecolor())
            for b in axes.patches]  # fmt: skip
    for place, layer in enumerate(layers):
        column: list[Any] = [nothing] * (layer.filters + 1)
        for left, right, bottom, height, colour in bars:
            if left < place < right:
                for cell in range(len(column)):
                    if bottom < cell + 0.5 < bottom + height:
                        column[cell] = colour
        states = sorted(map(ChannelState, layer.states), reverse=True)  # the living at the bottom
        wanted = [*_colours(figure, [states])[0], nothing]
        _expect_equal(column, wanted, f"{picture}: the bar of {layer.name}", "another layer or state")
    _expect_names(picture, axes.xaxis, [layer.name for layer in layers])
    texts = {text.get_position()[0]: text.get_text() for text in axes.texts}
    wanted_texts = {
        i: f"{x.states.count(ALIVE)}/{len(x.states)}\n{x.bits} bits" for i, x in enumerate(layers)
    }
    expect(
        texts == wanted_texts,
        f"{picture}: {texts} stands on the bars, the counts are {wanted_texts}",
        _cause("another layer"),
    )
    tops = [text.get_position()[1] - layer.filters for text, layer in zip(axes.texts, layers, strict=True)]
    measured = f"{picture}: texts stand {min(tops):g} to {max(tops):g} channels above their bars"
    expect(min(tops) >= 0 and max(tops) <= 1, measured, _cause("another layer"))


def _compare_times(figure: Any, records: Sequence[EpochRecord]) -> None:
    picture, (axes, *_) = "channels_over_time.png", figure.axes
    (image,) = axes.get_images()
    last = records[-1].layers
    shares = [
        [100 * r.layers[name].alive_channels / r.layers[name].filters for r in records] for name in last
    ]
    _expect_equal(image.get_array(), shares, f"{picture}: the cells", "another column, layer or epoch")
    extent = [records[0].epoch - 0.5, records[-1].epoch + 0.5, len(last) - 0.5, -0.5]
    _expect_equal(image.get_extent(), extent, f"{picture}: the cells' places", "another epoch or layer")
    _expect_equal(image.get_clim(), [0, 100], f"{picture}: the range of colours", "another unit")
    names = [f"{n} ({layer.alive_channels}/{layer.filters})" for n, layer in last.items()]
    _expect_names(picture, axes.yaxis, names)
    began = next(r.epoch for r in records if r.coefficient) - 0.5
    _expect_equal(
        [line.get_xdata() for line in axes.get_lines()],
        [[began, began]],
        f"{picture}: the line where the penalty sets in",
        "another epoch",
    )


def _colours(figure: Any, states: Sequence[Sequence[ChannelState | None]]) -> list[list[Any]]:
    """The colour that the legend gives to each state."""
    legend = _legend(figure)
    by_state = {
        state: next((patch.get_facecolor() for name, patch in legend.items() if word in name), (0, 0, 0, 0))
        for state, word in WORDS.items()
    }
    return [[by_state[state] for state in row] for row in states]


def _style(line: Any) -> tuple[str, str, str]:
    return line.get_color(), line.get_linestyle(), line.get_marker()


def _legend(figure: Any) -> dict[str, Any]:
    """The line or patch that stands in a figure's legends beside each name."""
    legends = [*figure.legends, *(axes.get_legend() for axes in figure.axes if axes.get_legend())]
    return {
        text.get_text(): handle
        for legend in legends
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }


def _expect_names(picture: str, axis: Any, wanted: list[str]) -> None:
    """The names along an axis, the first of them at 0."""
    found = dict(zip(axis.get_ticklocs(), [t.get_text() for t in axis.get_ticklabels()], strict=True))
    expect(
        found == dict(enumerate(wanted)),
        f"{picture}: {found} stands along an axis, {wanted} is what the cells or bars are of",
        _cause("another layer"),
    )


def _expect_equal(found: Any, wanted: Any, what: str, shown: str) -> None:
    found, wanted = np.asarray(found, float), np.asarray(wanted, float)
    same = found.shape == wanted.shape and np.allclose(found, wanted)
    sizes = f"of shape {found.shape}, expected {wanted.shape}"
    if found.shape == wanted.shape and not same:
        place = tuple(np.argwhere(~np.isclose(found, wanted))[0])
        sizes = f"{found[place]:g} where the history has {wanted[place]:g}"
    expect(same, f"{what}: {sizes}", _cause(shown))


def _cause(shown: str) -> str:
    return f"experiments/plots.py draws {shown} than the picture says"
