"""The four ratios against numbers worked out by hand, and the picture's cells against the planted states."""

import math

import numpy as np
import pytest
import torch
from matplotlib import pyplot
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from planted import CONVOLUTIONS, SMALL, Deaths, GivenBits, dense_network, random_network, snapshot
from torch import nn

from experiments.evaluator import Evaluator
from metrics import NetworkCount, count_ceiling, count_network
from resnet import ResNet, resnet20, resnet32
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, quantizers, toggle_quantization

STEM_AND_CLASSIFIER = ["^conv1$", "^linear$"]
DENSE_MACS, DENSE_BOPS = 40_551_040, 41_524_264_960
FULL_PRECISION_MACS = 443_008  # stem and classifier
RATIOS = (
    "structured_bops_ratio",
    "unstructured_bops_ratio",
    "structured_mac_ratio",
    "unstructured_mac_ratio",
)


def ratios(evaluator: Evaluator, model: nn.Module) -> list[float]:
    compression = evaluator.evaluate(model)
    return [getattr(compression, name) for name in RATIOS]


@torch.no_grad()
def compress(model: ResNet) -> None:
    """Inner channels 0 to 7 of layer1.0 lose their filters, and 100 weights more are zero in layer2.2."""
    model.layer1[0].conv1.weight[:8] = 0
    model.layer2[2].conv2.weight[0].flatten()[:100] = 0


def test_a_dense_network_is_its_own_baseline():
    model = dense_network()
    assert ratios(Evaluator(model), model) == [1, 1, 1, 1]


def test_bits_alone_shrink_the_bops_and_not_the_macs():
    model = dense_network()
    evaluator = Evaluator(model)
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, GivenBits, {})
    bops = (DENSE_MACS - FULL_PRECISION_MACS) * 4 * 32 + FULL_PRECISION_MACS * 32 * 32
    assert ratios(evaluator, model) == pytest.approx([DENSE_BOPS / bops] * 2 + [1, 1], rel=1e-12)
    assert DENSE_BOPS / bops == pytest.approx(7.4317, abs=1e-4)
    toggle_quantization(model, enabled=False)
    assert ratios(evaluator, model) == [1, 1, 1, 1]


def test_the_ratios_of_a_planted_network_are_those_by_hand():
    model = dense_network()
    evaluator = Evaluator(model)
    compress(model)
    filters = 8 * 16 * 9 * 1024  # of layer1.0.conv1; structured takes as much again out of conv2
    single = 100 * 8 * 8 * 4  # layer2.2 works at 16 x 16 places
    structured, unstructured = DENSE_MACS - 2 * filters, DENSE_MACS - filters - single
    macs = [DENSE_MACS / structured, DENSE_MACS / unstructured]
    assert ratios(evaluator, model) == pytest.approx(macs + macs, rel=1e-12)
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, GivenBits, {})
    bops = [DENSE_BOPS / (m * 4 * 32 + FULL_PRECISION_MACS * 28 * 32) for m in (structured, unstructured)]
    assert ratios(evaluator, model) == pytest.approx(bops + macs, rel=1e-12)


def test_the_account_behind_the_ratios_comes_with_them():
    model = dense_network()
    compression = Evaluator(model).evaluate(model)
    assert compression.count == count_network(model)
    assert compression.dense_macs == DENSE_MACS
    assert compression.dense_bops == DENSE_BOPS


def test_the_ceilings_are_those_of_the_layers_left_in_full_precision():
    model = dense_network()
    evaluator = Evaluator(model)
    unquantized = evaluator.evaluate(model)
    assert (unquantized.structured_ceiling, unquantized.unstructured_ceiling) == (1, 1)
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, GivenBits, {})
    compression = evaluator.evaluate(model)
    assert round(compression.unstructured_ceiling, 2) == 91.54
    assert compression.structured_ceiling == DENSE_MACS / (442_368 + 160)  # 16 channels reach the classifier
    with torch.no_grad():
        for name in quantizers(model):
            model.get_submodule(name).parametrizations.weight.original.zero_()
    reached = evaluator.evaluate(model)
    structured, unstructured = compression.structured_ceiling, compression.unstructured_ceiling
    assert [getattr(reached, name) for name in RATIOS] == [structured, unstructured] * 2


def test_the_ceiling_is_counted_when_it_is_first_asked_for_and_once(monkeypatch):
    counted = []

    def counting(*arguments: object) -> NetworkCount:
        counted.append(1)
        return count_ceiling(*arguments)

    monkeypatch.setattr("experiments.evaluator.count_ceiling", counting)
    model = dense_network()
    compression = Evaluator(model).evaluate(model)
    assert compression.structured_bops_ratio == 1 and counted == []
    assert (compression.structured_ceiling, compression.unstructured_ceiling) == (1, 1)
    assert compression.ceiling == count_ceiling(model) and len(counted) == 1


def test_a_network_with_nothing_left_has_infinite_structured_ratios():
    model = dense_network()
    evaluator = Evaluator(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert ratios(evaluator, model) == [math.inf] * 4


def test_the_baseline_stays_what_it_was_when_the_model_is_compressed_afterwards():
    model = dense_network()
    evaluator = Evaluator(model)
    before = evaluator.evaluate(model)
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, DeadZoneLDZCompander, {"init_deadzone_logit": 0.5})
    with torch.no_grad():
        model.layer1[0].conv1.parametrizations.weight.original.zero_()
    after = evaluator.evaluate(model)
    assert after.dense_macs == before.dense_macs == DENSE_MACS
    assert after.dense_bops == before.dense_bops == DENSE_BOPS
    assert min(getattr(after, name) for name in RATIOS) > 1
    assert [getattr(before, name) for name in RATIOS] == [1, 1, 1, 1]  # a record, not a view of the model


def test_the_baseline_is_dense_whatever_is_quantized_or_dead_when_it_is_taken():
    early, model = dense_network(), dense_network()
    compress(model)
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, GivenBits, {})
    assert ratios(Evaluator(model), model) == ratios(Evaluator(early), model)


def test_another_model_of_the_same_architecture_can_be_evaluated():
    model = dense_network()
    compress(model)
    assert ratios(Evaluator(resnet20()), model) == ratios(Evaluator(model), model)


@pytest.mark.parametrize("other", [resnet32, lambda: ResNet(3, num_classes=100), lambda: ResNet(1)])
def test_another_architecture_is_refused(other):
    evaluator = Evaluator(resnet20())
    with pytest.raises(ValueError, match="other layers"):
        evaluator.evaluate(other())


def test_the_images_size_is_the_evaluators():
    model = dense_network()
    compression = Evaluator(model, (3, 64, 64)).evaluate(model)
    assert compression.dense_macs == 4 * (DENSE_MACS - 640) + 640
    assert compression.structured_mac_ratio == 1


@pytest.mark.parametrize("training", [True, False])
def test_evaluating_and_plotting_change_nothing_of_the_model(training):
    model = dense_network()
    attach_weight_quantizers(model, STEM_AND_CLASSIFIER, DeadZoneLDZCompander, {})
    model.train(training)
    before = snapshot(model)
    evaluator = Evaluator(model)
    evaluator.evaluate(model)
    evaluator.plot_channel_liveness(model)
    assert snapshot(model) == before


# The picture


def colours(figure: Figure) -> np.ndarray:
    """The colour of each cell as it is drawn: (rows, columns, 4)."""
    image = figure.axes[0].images[0]
    return image.to_rgba(image.get_array())


SKY, BLACK = to_rgba("#56B4E9"), to_rgba("black")


def planted_picture() -> Figure:
    model = random_network(Deaths(0))
    with torch.no_grad():
        model.layer1[0].conv1.weight[3] = 0
        model.layer1[0].bn1.running_mean[3] = 0
        model.layer1[0].bn1.bias[3] = 0.5  # constant
        model.layer2[0].conv2.weight[:, 6] = 0  # inner channel 6 is unread: null
    return Evaluator(model, SMALL).plot_channel_liveness(model)


def test_the_picture_has_a_row_a_convolution_in_order_and_the_widest_sets_the_columns():
    figure = planted_picture()
    assert isinstance(figure, Figure)
    assert colours(figure).shape == (len(CONVOLUTIONS), 64, 4)
    names = [label.get_text().split()[0] for label in figure.axes[0].get_yticklabels()]
    assert names == CONVOLUTIONS


def test_the_picture_shows_alive_blue_null_black_constant_in_a_colour_and_padding_grey():
    figure = planted_picture()
    cells = colours(figure)
    padding = tuple(cells[0, 63])
    assert padding[0] == padding[1] == padding[2]
    assert 0.2 < padding[0] < 0.9
    constant = tuple(cells[CONVOLUTIONS.index("layer1.0.conv1"), 3])
    assert constant == to_rgba("#E69F00")  # orange
    widths = {"conv1": 16, "layer1": 16, "layer2": 32, "layer3": 64}
    for row, name in enumerate(CONVOLUTIONS):
        width = widths[name.split(".")[0]]
        for column in range(64):
            expected = SKY if column < width else padding
            if (name, column) == ("layer1.0.conv1", 3):
                expected = constant
            if (name, column) == ("layer2.0.conv1", 6):
                expected = BLACK
            assert tuple(cells[row, column]) == expected, (name, column)


def test_the_picture_of_a_network_with_nothing_left_has_no_blue():
    model = random_network(Deaths(0, whole=("conv1",)))
    cells = colours(Evaluator(model, SMALL).plot_channel_liveness(model))
    assert not (cells == SKY).all(2).any()


def test_the_colours_do_not_depend_on_which_states_there_are():
    figure = planted_picture()
    whole = random_network(Deaths(0))
    alone = colours(Evaluator(whole, SMALL).plot_channel_liveness(whole))
    assert tuple(alone[0, 0]) == SKY
    np.testing.assert_array_equal(alone[0], colours(figure)[0])


def test_the_picture_can_be_written_and_leaves_no_figure_open(tmp_path):
    open_before = pyplot.get_fignums()
    figure = planted_picture()
    figure.savefig(tmp_path / "channel_liveness.png")
    assert (tmp_path / "channel_liveness.png").stat().st_size > 1000
    assert pyplot.get_fignums() == open_before


def test_the_pictures_legend_explains_every_colour_in_it():
    figure = planted_picture()
    (legend,) = figure.legends
    shown = {tuple(patch.get_facecolor()) for patch in legend.get_patches()}
    assert {tuple(c) for c in colours(figure).reshape(-1, 4)} <= shown
    assert len({text.get_text() for text in legend.get_texts()}) == 4
