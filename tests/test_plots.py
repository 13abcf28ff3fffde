"""The pictures: what is drawn, in which units, and that every word of it lies inside the picture."""

import io
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import runs
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from runs import ALIVE, CONSTANT, COUNT, LAYERS, NULL, changed, good_run, in_every_epoch, in_layer

from experiments.plots import (
    PADDING,
    STATE_COLOURS,
    accuracy_figure,
    channel_liveness_figure,
    channels_over_time_figure,
    figures,
    per_layer_figure,
    rendered,
    sparsity_figure,
    trade_off_figure,
)
from experiments.report import PICTURES
from metrics import NetworkCount

SKY, BLACK = to_rgb("#56B4E9"), (0.0, 0.0, 0.0)
# As long as titles become.
WHAT = (
    "ResNet-20 on SYNTHETIC STAND-IN, NOT CIFAR-10, preset debug, with --batch-size 64 --precision bf16 "
    "--limit-train 5000 --exclude-layers '^conv1$' '^linear$' layer3 --sparsity-weight 0.01 "
    "--sparsity-delay 2.5 --sparsity-ramp 1.5 --no-keep-dead --weights-lr 0.001 --bit-lr 0.001 "
    "--deadzone-lr 0.001 --bit-decay 0.01 --deadzone-decay 0.01 --beta2 0.999 --pace-steps 0, epoch 20"
)


FIGURES = {
    "accuracy": lambda: accuracy_figure(good_run(), f"Accuracy: {WHAT}"),
    "sparsity": lambda: sparsity_figure(good_run(), f"Sparsity and bits: {WHAT}"),
    "liveness": lambda: channel_liveness_figure(COUNT, f"Channels: {WHAT}"),
    "per layer": lambda: per_layer_figure(COUNT, f"Channels and bits a layer: {WHAT}"),
    "over time": lambda: channels_over_time_figure(good_run(), f"Channels alive: {WHAT}"),
}
every_figure = pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES.keys())
over_epochs = pytest.mark.parametrize("make", [accuracy_figure, sparsity_figure])


def curves(figure: Figure) -> dict[str, tuple[list[float], list[float]]]:
    lines = [line for axes in figure.axes for line in axes.get_lines()]
    return {str(line.get_label()): (list(line.get_xdata()), list(line.get_ydata())) for line in lines}


# Over the epochs


def test_the_accuracy_curve_shows_percent_and_the_cross_entropy_beside_chance():
    drawn = curves(accuracy_figure(good_run(), "t"))
    epochs = list(range(1, 21))
    assert drawn["test accuracy"] == (epochs, pytest.approx([30 + 2 * e for e in epochs]))
    assert drawn["training cross-entropy"] == (epochs, pytest.approx([1 + 1 / e for e in epochs]))
    assert set(drawn["chance"][1]) == {10}


def test_the_sparsity_curves_show_both_sparsities_in_percent_the_learned_bits_and_the_coefficient():
    drawn = curves(sparsity_figure(good_run(), "t"))
    by_word = {label.split(":")[0]: values for label, values in drawn.items()}
    epochs = list(range(1, 21))
    assert by_word["unstructured"] == (epochs, pytest.approx([3 * e for e in epochs]))
    assert by_word["structured"] == (epochs, pytest.approx([max(e - 11, 0) for e in epochs]))
    assert by_word["mean learned bits"] == (epochs, pytest.approx([8 - 0.2 * e for e in epochs]))
    climb = [0] * 6 + [0.002, 0.004, 0.006, 0.008] + [0.01] * 10
    assert by_word["the penalty's coefficient"] == (epochs, pytest.approx(climb))


@over_epochs
def test_percent_runs_from_0_to_100_and_whole_epochs_from_the_first_to_the_last(make):
    left, *others = make(good_run(), "t").axes
    assert left.get_ylim() == (0, 100)
    assert left.get_xlim() == (0.5, 20.5)
    assert all(tick == int(tick) for tick in left.get_xticks())
    assert others and all(axes.get_ylim()[0] == 0 for axes in others)


def test_the_bits_axis_holds_every_width_that_is_drawn():
    wide = in_every_epoch(good_run(3), learned_bits=16.0)
    assert sparsity_figure(wide, "t").axes[1].get_ylim()[1] > 16
    assert sparsity_figure(good_run(3), "t").axes[1].get_ylim()[1] > 8


@pytest.mark.parametrize("coefficient", [0.0, 1e-9, 4e-3, 1e30])
def test_the_coefficients_axis_holds_it_whatever_its_size(coefficient):
    drawn = sparsity_figure(in_every_epoch(good_run(3), coefficient=coefficient), "t")
    low, high = drawn.axes[2].get_ylim()
    assert low == 0 and coefficient < high <= max(1, 2 * coefficient)


@pytest.mark.parametrize(
    ("make", "labels"),
    [
        (accuracy_figure, ["epoch", "test accuracy (%)", "training cross-entropy (nats)"]),
        (
            sparsity_figure,
            [
                "epoch",
                "sparsity of the quantized layers (%)",
                "bits a weight (before rounding)",
                "the penalty's coefficient",
            ],
        ),
    ],
)
def test_the_axes_say_what_they_measure_and_in_which_unit(make, labels):
    axes = make(good_run(), "t").axes
    lowest = axes[-2]  # the last is its right-hand side
    assert [lowest.get_xlabel(), *(a.get_ylabel() for a in axes)] == labels


def shaded(figure: Figure) -> list[tuple[float, float]]:
    boxes = [patch.get_extents() for patch in figure.axes[0].patches]
    back = figure.axes[0].transData.inverted()
    return [tuple(round(float(x), 6) for x in back.transform(box)[:, 0]) for box in boxes]


@over_epochs
@pytest.mark.parametrize(
    ("epochs", "warmup", "span"),
    [
        # Epoch 1 of the table is epoch 0 of the schedule: the coefficient leaves 0 behind epoch 6.
        (20, (5.0, 5.0), [(6, 11)]),
        (8, (5.0, 5.0), [(6, 8)]),  # cut off at the run's end
        (6, (5.0, 5.0), []),  # not reached
        (20, (100.0, 5.0), []),
        (20, (0.0, 2.5), [(1, 3.5)]),
    ],
)
def test_the_warmup_is_shaded_where_the_coefficient_climbs(make, epochs, warmup, span):
    delay, ramp = warmup
    assert shaded(make(good_run(epochs, sparsity_delay=delay, sparsity_ramp=ramp), "t")) == span


@over_epochs
@pytest.mark.parametrize("last", [0.0, 0.03, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("other", [None, 0.5])  # where the second curve ends: with the first one, or halfway
@pytest.mark.parametrize("before", [0.0, 1.0])
def test_the_last_numbers_are_written_within_the_axes(make, last, other, before):
    names = ("accuracy", "unstructured_sparsity", "structured_sparsity", "cross_entropy")
    *records, end = good_run().epochs
    epochs = [replace(record, **dict.fromkeys(names, before)) for record in records]
    ends = dict.fromkeys(names[:2], last) | dict.fromkeys(names[2:], last if other is None else other)
    figure = make(replace(good_run(), epochs=[*epochs, replace(end, **ends)]), "t")
    figure.draw_without_rendering()
    written = [(text, axes) for axes in figure.axes for text in axes.texts]
    assert len(written) == 2 + (make is sparsity_figure)
    for text, axes in written:
        box, inside = text.get_window_extent(), axes.get_window_extent()
        assert inside.y0 < box.y0 and box.y1 < inside.y1, text.get_text()


def test_a_curve_whose_last_number_is_not_finite_has_none_written():
    *records, end = good_run().epochs
    history = replace(good_run(), epochs=[*records, replace(end, cross_entropy=math.nan)])
    (written,) = [text.get_text() for axes in accuracy_figure(history, "t").axes for text in axes.texts]
    assert written == f"{100 * end.accuracy:.2f} %"


@over_epochs
@pytest.mark.parametrize("last", [0.0, 0.03, 0.5, 0.97, 1.0])
@pytest.mark.parametrize("apart", [0.0, 0.02, 0.04, 0.06, 0.1, 0.15])
@pytest.mark.parametrize("before", [0.0, 1.0])
def test_the_last_numbers_of_curves_that_meet_do_not_cover_each_other(make, last, apart, before):
    names = ("accuracy", "unstructured_sparsity", "structured_sparsity")
    other = "structured_sparsity" if make is sparsity_figure else "cross_entropy"
    first, middle, end = good_run(3).epochs
    first = replace(first, cross_entropy=1 / 1.05)  # so that the axis of the cross-entropy, too, ends at 1
    middle = replace(middle, **dict.fromkeys((*names, "cross_entropy"), before))
    end = replace(end, **dict.fromkeys(names, last) | {other: abs(last - apart)})
    figure = make(replace(good_run(3), epochs=[first, middle, end]), "t")
    figure.draw_without_rendering()
    one, two = [text for axes in figure.axes for text in axes.texts if "bits" not in text.get_text()]
    assert not one.get_window_extent().overlaps(two.get_window_extent())


@over_epochs
def test_the_legend_names_every_curve_and_the_shade(make):
    figure = make(good_run(), "t")
    (drawn,) = figure.legends
    assert not any(axes.get_legend() for axes in figure.axes)
    legend = [text.get_text() for text in drawn.get_texts()]
    assert sorted(legend) == sorted([*curves(figure), "the penalty's warm-up"])


@over_epochs
def test_one_epoch_can_be_drawn_and_its_points_are_seen(make):
    figure = make(good_run(1), "t")
    lines = [line for axes in figure.axes for line in axes.get_lines() if line.get_label() != "chance"]
    assert all(line.get_marker() not in ("", "None", None) for line in lines)
    save_figure_to_memory(figure)


# Channels


def cells(figure: Figure) -> np.ndarray:
    """The colour of each cell of a picture made of cells. Shapes: -> (rows, columns, 3)."""
    (shown,) = figure.axes[0].images
    return shown.cmap(shown.norm(shown.get_array()))[..., :3]


def test_a_row_a_convolution_and_a_cell_a_channel_in_the_states_colours_with_grey_behind_the_last():
    drawn = cells(channel_liveness_figure(COUNT))
    orange, grey = to_rgb(STATE_COLOURS[CONSTANT]), to_rgb(STATE_COLOURS[PADDING])
    expected = [
        [SKY, SKY, grey, grey],
        [SKY, BLACK, orange, BLACK],
        [BLACK, BLACK, BLACK, grey],
    ]
    np.testing.assert_allclose(drawn, expected, atol=0.01)
    assert grey[0] == grey[1] == grey[2] and 0.3 < grey[0] < 0.9, "padding is grey"
    assert len({SKY, BLACK, orange, grey}) == 4


def test_the_rows_name_their_convolution_with_its_alive_channels_of_all():
    axes = channel_liveness_figure(COUNT).axes[0]
    labels = [text.get_text() for text in axes.get_yticklabels()]
    assert labels == ["conv1 (2/2)", "layer1.0.conv1 (1/4)", "layer1.0.conv2 (0/3)"]
    assert list(axes.get_yticks()) == [0, 1, 2]
    assert axes.get_xlabel() == "output channel"
    assert axes.get_ylabel() == "convolution (alive/all)"


@pytest.mark.parametrize("make", [channel_liveness_figure, per_layer_figure])
def test_the_legend_explains_the_colours(make):
    (legend,) = make(COUNT, "t").legends
    told = {text.get_text(): patch.get_facecolor()[:3]
            for text, patch in zip(legend.get_texts(), legend.get_patches(), strict=True)}  # fmt: skip
    by_word = {name.split(",")[0] if "constant" not in name else "constant": c for name, c in told.items()}
    assert by_word["alive"] == SKY
    assert by_word["dead"] == BLACK
    assert by_word["constant"] == pytest.approx(to_rgb(STATE_COLOURS[CONSTANT]))


def test_the_bars_are_split_into_the_three_states_and_add_up_to_the_filters():
    figure = per_layer_figure(COUNT, "t")
    bars = [bar for group in figure.axes[0].containers for bar in group]
    by_state = {
        state: [
            b.get_height()
            for b in bars
            if b.get_facecolor()[:3] == pytest.approx(to_rgb(STATE_COLOURS[state]))
        ]
        for state in (ALIVE, CONSTANT, NULL)
    }
    assert by_state == {ALIVE: [2, 1, 0], CONSTANT: [0, 1, 0], NULL: [0, 2, 3]}
    for place, filters in enumerate((2, 4, 3)):
        here = sorted(
            (b.get_y(), b.get_height()) for b in bars if round(b.get_x() + b.get_width() / 2) == place
        )
        assert max(y + height for y, height in here) == filters == sum(height for _, height in here)


def test_each_bar_tells_its_layer_its_alive_channels_and_its_bits():
    axes = per_layer_figure(COUNT, "t").axes[0]
    assert [t.get_text() for t in axes.get_xticklabels()] == ["conv1", "layer1.0.conv1", "layer1.0.conv2"]
    assert [" ".join(t.get_text().split()) for t in axes.texts] == [
        "2/2 32 bits", "1/4 5 bits", "0/3 2 bits"]  # fmt: skip
    assert axes.get_ylabel() == "output channels"
    assert axes.get_ylim()[1] > 4


def test_every_convolution_of_a_deep_network_gets_its_row_and_its_bar():
    names = [f"layer{stage}.{i}.conv{j}" for stage in (1, 2, 3) for i in range(18) for j in (1, 2)]
    count = NetworkCount(tuple(runs.layer_count(name, [ALIVE] * 64) for name in names))
    assert cells(channel_liveness_figure(count)).shape == (108, 64, 3)
    assert len(per_layer_figure(count, "t").axes[0].get_xticks()) == 108


# Channels over the epochs


def shares(figure: Figure) -> np.ndarray:
    """What each cell of the picture over the epochs stands for, in percent. Shapes: -> (layers, epochs)."""
    (shown,) = figure.axes[0].images
    return np.asarray(shown.get_array())


def test_over_time_there_is_a_row_a_layer_and_a_cell_an_epoch_with_the_share_that_is_alive():
    history = in_layer(good_run(), LAYERS[2], [20], alive_channels=4)
    expected = np.array([[100 * (16 - max(e - 11, 0)) / 16 for e in range(1, 21)]] * 4)
    expected[2, 19] = 25
    figure = channels_over_time_figure(history, "t")
    np.testing.assert_allclose(shares(figure), expected)
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == [
        f"{name} ({4 if name == LAYERS[2] else 7}/16)" for name in LAYERS
    ]


def test_over_time_the_colours_run_from_0_to_100_percent_whatever_is_alive():
    (shown,) = channels_over_time_figure(good_run(3), "t").axes[0].images
    assert (shown.norm.vmin, shown.norm.vmax) == (0, 100)
    figure = channels_over_time_figure(good_run(), "t")
    assert figure.axes[1].get_ylabel() == "output channels alive (%)"
    assert figure.axes[0].get_xlabel() == "epoch"


@pytest.mark.parametrize("epochs", [1, 2, 20])
def test_over_time_each_cell_lies_over_its_epoch_and_beside_its_layer(epochs):
    figure = channels_over_time_figure(good_run(epochs), "t")
    (shown,) = figure.axes[0].images
    left, right, bottom, top = shown.get_extent()
    assert (left, right) == (0.5, epochs + 0.5)
    assert (top, bottom) == (-0.5, 3.5) and list(figure.axes[0].get_yticks()) == [0, 1, 2, 3]
    save_figure_to_memory(figure)


@pytest.mark.parametrize(("first", "marks"), [(7, [6.5]), (20, [19.5]), (2, [1.5]), (1, []), (21, [])])
def test_over_time_a_line_stands_before_the_first_epoch_with_a_penalty(first, marks):
    coefficients = {e: {"coefficient": 0.01 if e >= first else 0.0} for e in range(1, 21)}
    figure = channels_over_time_figure(changed(good_run(), coefficients), "t")
    assert [line.get_xdata()[0] for line in figure.axes[0].get_lines()] == marks
    assert len(figure.legends) == len(marks)


def test_over_time_a_network_without_quantizers_is_told_in_words():
    figure = channels_over_time_figure(runs.without_quantized_layers(good_run()), "t")
    assert [text.get_text() for text in figure.axes[0].texts] == ["no layer is quantized"]
    save_figure_to_memory(figure)


# All of them


@every_figure
def test_the_title_is_the_one_given(make):
    titles = [axes.get_title() for axes in make().axes] + [make().get_suptitle()]
    assert " ".join(" ".join(titles).split()).endswith(f": {WHAT}")


def assert_every_word_lies_inside(figure: Figure) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    box = figure.get_tightbbox(canvas.get_renderer())  # around all that is drawn, inches
    width, height = figure.get_size_inches()
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, box


@every_figure
def test_every_word_lies_inside_the_picture_however_long_the_title(make):
    assert_every_word_lies_inside(make())


@pytest.mark.parametrize("layers", [0, 1, 2, 18])
def test_every_word_lies_inside_the_picture_over_time_however_many_layers_it_shows(layers):
    """--exclude-layers leaves any number of them quantized."""
    history = good_run()
    rows = {f"layer{i // 6 + 1}.{i // 2 % 3}.conv{i % 2 + 1}": history.epochs[-1].layers[LAYERS[0]]
            for i in range(layers)}  # fmt: skip
    assert_every_word_lies_inside(channels_over_time_figure(in_every_epoch(history, layers=rows), WHAT))


@pytest.mark.parametrize("title", ["'^conv1$' 'layer1\\.0$'", "$", "$$", "${$}"])
def test_a_title_with_dollar_signs_is_drawn_as_it_is_and_not_as_a_formula(title):
    drawn = [
        accuracy_figure(good_run(), title),
        channel_liveness_figure(COUNT, title),
        per_layer_figure(COUNT, title),
        channels_over_time_figure(good_run(), title),
    ]
    rendered(drawn[0])
    for figure in drawn:
        assert figure.axes[0].get_title().splitlines()[0] == title
        assert not figure.axes[0].title.get_parse_math()
    sweep = trade_off_figure({}, {}, title)
    assert sweep.get_suptitle().splitlines()[0] == title and not sweep._suptitle.get_parse_math()


@every_figure
def test_no_flag_in_a_title_is_broken_in_two(make):
    titles = "\n".join([axes.get_title() for axes in make().axes])
    assert all(flag in titles for flag in ("--batch-size", "--no-keep-dead", "--deadzone-decay"))


def save_figure_to_memory(figure: Figure) -> np.ndarray:
    content = io.BytesIO()
    figure.savefig(content, format="png")
    content.seek(0)
    return image.imread(content)


@every_figure
def test_it_is_a_png_that_is_not_blank(make):
    content = rendered(make())
    assert content.startswith(b"\x89PNG\r\n")
    pixels = image.imread(io.BytesIO(content))
    assert pixels.shape[0] > 200 and pixels.shape[1] > 600
    assert pixels[..., :3].std() > 0.02


@every_figure
def test_the_same_records_give_the_same_picture_byte_for_byte(make):
    assert rendered(make()) == rendered(make())


@every_figure
def test_for_papers_it_is_a_pdf_that_is_the_same_each_time(make):
    content = rendered(make(), "pdf")
    assert content.startswith(b"%PDF") and b"CreationDate" not in content
    assert content == rendered(make(), "pdf")


def test_every_picture_is_drawn_under_its_name_with_what_it_shows_in_front_of_the_title():
    drawn = figures(replace(good_run(), final=runs.final()), "ResNet-20")
    assert list(drawn) == list(PICTURES)
    titles = [figure.axes[0].get_title() for figure in drawn.values()]
    assert all(title.endswith(": ResNet-20") for title in titles) and len(set(titles)) == len(PICTURES)


def test_numbers_that_are_not_finite_are_drawn_as_gaps():
    """A run whose loss overflowed still gets its pictures."""
    bad = {e: {"cross_entropy": float("nan"), "penalty": float("inf")} for e in (2, 3)}
    drawn = figures(replace(changed(good_run(3), bad), final=runs.final()), "t")
    assert all(len(rendered(figure)) > 1000 for figure in drawn.values())


def test_drawing_needs_no_screen_and_leaves_no_figure_open():
    from matplotlib import pyplot

    for make in FIGURES.values():
        make()
    assert pyplot.get_fignums() == []


@pytest.mark.slow
def test_a_date_of_builds_that_is_none_ends_no_run():
    code = "from experiments import plots; print(plots.rendered(plots.Figure(), 'pdf')[:4])"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[1],
        env=os.environ | {"SOURCE_DATE_EPOCH": "abc"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == "b'%PDF'\n"
