"""The verdict: each line on a history made by hand, good and bad, with its numbers and its cause."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import EPOCHS, LAYERS, LOGITS, WEIGHTS, changed, good_run, in_every_epoch, in_layer

from experiments import verdict
from experiments.history import FAIL, PASS, SKIP, Check, History, LayerStart
from experiments.settings import PRECISIONS
from experiments.verdict import (
    compressed_agrees,
    counts_add_up,
    early_warnings,
    new_warnings,
    pictures_exist,
)
from metrics import NetworkCount, count_network
from resnet import ResNet, resnet20
from src.encoding import PackingError
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import (
    attach_weight_quantizers,
    quantized_layers,
    toggle_quantization,
    weight_quantization,
)


def check(line: Check, status: str, *numbers: str, cause: str = "") -> None:
    assert line.status == status, line
    for number in numbers:
        assert number in line.message, f"{number!r} is not in {line.message!r}"
    said = line.message.partition("Likely cause: ")[2]
    assert bool(said) == (status == FAIL), line
    assert cause in said
    assert str(line) == f"{status}  {line.name}: {line.message}"
    assert "\n" not in str(line)


def quantized_network() -> ResNet:
    torch.manual_seed(0)
    model = resnet20()
    attach_weight_quantizers(
        model, ["^conv1$", "^linear$"], DeadZoneLDZCompander, {"init_deadzone_logit": 0.5}
    )
    with torch.no_grad():
        model.layer2[1].conv1.parametrizations.weight.original[3] = 0  # a filter
    return model


@pytest.fixture(scope="module")
def model() -> ResNet:
    return quantized_network()


@pytest.fixture(scope="module")
def count(model) -> NetworkCount:
    return count_network(model)


@pytest.fixture
def pictures(tmp_path) -> list[Path]:
    paths = [tmp_path / name for name in ("a.png", "b.png", "c.png", "d.png")]
    for path in paths:
        path.write_bytes(b"\x89PNG" + path.name.encode())
    return paths


# All of it


def lines_of(history: History, count: NetworkCount, model: ResNet, pictures: list[Path]) -> list[Check]:
    return verdict.verdict(history, count, model, pictures, history.compressed)


def test_a_run_that_goes_as_expected_passes_every_line(model, count, pictures):
    history = runs.finished(good_run(), count)
    for r in history.epochs:
        r.ledger.append(Check(PASS, "images", "each once"))
    lines = lines_of(history, count, model, pictures)
    assert [line for line in lines if line.status != PASS] == []
    assert len({line.name for line in lines}) == len(lines)


def test_the_lines_come_in_the_order_of_the_report(model, count, pictures):
    names = [line.name for line in lines_of(good_run(), count, model, pictures)]
    expected = [
        "loss is finite",
        "accuracy climbs",
        "bit parameters learn",
        "dead-zone parameters learn",
        "unstructured sparsity grows",
        "structured sparsity follows the warm-up",
        "penalty falls once it acts",
        "bits fall",
        "counts add up",
        "smaller network gives the same logits",
        "pictures exist",
    ]
    assert [name for name in names if name in expected] == expected


def test_an_epoch_that_is_missing_is_named_by_the_numbers():
    check(verdict.every_epoch_ran(good_run()), PASS, "20 of 20")
    short = replace(good_run(), epochs=good_run().epochs[:-1])
    check(verdict.every_epoch_ran(short), FAIL, "19 of 20", cause="loop over the epochs")
    twice = changed(good_run(), {20: {"epoch": 19}})
    check(verdict.every_epoch_ran(twice), FAIL, "number 20 is epoch 19", cause="loop over the epochs")
    stopped = replace(short, stopped="stopped by Ctrl-C in epoch 20")
    check(verdict.every_epoch_ran(stopped), SKIP, "19 of 20", "Ctrl-C")


@pytest.mark.parametrize("key", ["unstructured_sparsity", "structured_sparsity", "learned_bits", "bits"])
def test_final_metrics_of_another_epoch_fail_with_both_numbers(key):
    history = runs.finished(good_run())
    check(verdict.final_is_the_last_epochs(history), PASS, "epoch 20")
    other = replace(history, final=replace(history.final, **{key: 0.125}))
    check(verdict.final_is_the_last_epochs(other), FAIL, key, "0.125", cause="another epoch")


def test_what_the_packed_file_says_of_its_run_is_the_runs(count):
    history = runs.finished(good_run(), count)
    check(verdict.file_is_recounted(history, count), PASS)
    claims = history.compressed.packed_metrics
    for changes, words, name in (
        ({"packed_settings": history.settings | {"weights_lr": 0.01}}, ("lr 0.01", "0.012"), "weights_lr"),
        ({"packed_metrics": claims | {"structured_macs": 7}}, ("claims 7", "20275520"), "structured_macs"),
        ({"packed_metrics": claims | {"data": "another"}}, ("'another' for data", "CIFAR-10"), "data"),
        ({"packed_metrics": claims | {"test_images": 7}}, ("claims 7", "10000"), "test_images"),
        ({"packed_metrics": claims | {"zero_weights": 1}}, ("claims 1 for zero_weights",), "zero_weights"),
        ({"packed_metrics": claims | {"mean_bits": 7.0}}, ("claims 7.0 for mean_bits",), "mean_bits"),
        ({"packed_metrics": claims | {"structured_bops_ratio": 7.0}}, ("7.0",), "structured_bops_ratio"),
        ({"packed_metrics": {}}, ("claims None",), "data, test_images, accuracy"),
    ):
        told = json.loads(json.dumps(changes))
        other = replace(history, compressed=replace(history.compressed, **told))
        cause = f"header has settings or claims that are not the run's: {name}"
        check(verdict.file_is_recounted(other, count), FAIL, *words, cause=cause)


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_short_run_fails_no_line_for_its_shortness(epochs, model, count, pictures):
    flat = in_every_epoch(good_run(epochs), accuracy=0.1, unstructured_sparsity=0.03, learned_bits=8.0)
    for history in (good_run(epochs), flat):
        lines = lines_of(runs.finished(history, count), count, model, pictures)
        assert [line for line in lines if line.status == FAIL] == []


def test_a_stopped_run_fails_no_line_for_what_was_not_made(model, count, pictures):
    history = replace(good_run(), stopped="stopped by Ctrl-C in epoch 21")
    lines = lines_of(history, count, model, pictures)
    assert [line for line in lines if line.status == FAIL] == []


def test_a_long_run_without_a_quantized_layer_fails_no_line_about_quantizers(model, pictures):
    plain = resnet20()
    history = runs.without_quantized_layers(good_run())
    lines = verdict.verdict(history, count_network(plain), plain, pictures)
    passed = [line.name for line in lines if line.status == PASS]
    assert passed == [
        "every epoch ran",
        "loss is finite",
        "accuracy climbs",
        "counts add up",
        "pictures exist",
    ]
    assert [line for line in lines if line.status == FAIL] == []


# Loss and accuracy


def test_a_finite_loss_passes_with_its_way():
    check(verdict.loss_is_finite(good_run()), PASS, "2.000 -> 3.250")  # 1 + 1 / 20 + 0.01 * 220
    check(verdict.loss_is_finite(changed(good_run(), {20: {"loss": 0.125}})), PASS, "2.000 -> 0.125")


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails_with_its_epochs(number):
    history = changed(good_run(), {3: {"loss": number}, 7: {"loss": number}})
    check(verdict.loss_is_finite(history), FAIL, "[3, 7]", cause="learning rate")


def test_a_run_that_a_loss_stopped_fails_though_every_finished_epochs_is_finite():
    why = "stopped in epoch 21: the loss is not finite at step 3"
    history = replace(good_run(), stopped=why, not_finite=True)
    check(verdict.loss_is_finite(history), FAIL, "epoch 21", "step 3", cause="learning rate")


def test_a_run_that_a_signal_stopped_has_a_finite_loss():
    history = replace(good_run(), stopped="stopped by Ctrl-C in epoch 21")
    check(verdict.loss_is_finite(history), PASS, "2.000 -> 3.250")


def test_accuracy_that_climbs_passes_with_first_last_and_chance():
    check(verdict.accuracy_climbs(good_run()), PASS, "32.0 % -> 70.0 %", "best 70.0 %", "chance 10 %")


BAD_ACCURACIES = pytest.mark.parametrize(
    ("accuracies", "numbers"),
    [
        ({1: 0.5, 4: 0.8, -1: 0.45}, "50.0 % -> 45.0 % (best 80.0 %"),  # fell
        ({1: 0.10, -1: 0.29}, "10.0 % -> 29.0 %"),  # climbed, and not well above chance
        ({1: 0.4, -1: 0.4}, "40.0 % -> 40.0 %"),
    ],
)


def with_accuracies(history: History, accuracies: dict[int, float]) -> History:
    """The history with other accuracies; epoch -1 is its last."""
    last = len(history.epochs)
    return changed(history, {last if e < 0 else e: {"accuracy": a} for e, a in accuracies.items()})


@BAD_ACCURACIES
def test_accuracy_that_falls_stays_or_stays_near_chance_fails(accuracies, numbers):
    history = with_accuracies(good_run(), accuracies)
    check(verdict.accuracy_climbs(history), FAIL, numbers, cause="--weights-lr")


@pytest.mark.parametrize(("limit", "steps"), [(5120, 200), (7168, 280)])
@BAD_ACCURACIES
def test_a_few_steps_tell_nothing_about_accuracy(accuracies, numbers, limit, steps):
    history = with_accuracies(good_run(), accuracies)
    history = replace(history, data=replace(history.data, train_images=limit))
    check(verdict.accuracy_climbs(history), SKIP, numbers, f"{steps} steps")


def test_a_network_that_may_have_begun_trained_need_not_climb():
    history = with_accuracies(good_run(), {1: 0.8, -1: 0.78})
    history.settings["model"] = "mine:pretrained"
    check(verdict.accuracy_climbs(history), SKIP, "80.0 % -> 78.0 %", "trained weights")
    check(verdict.accuracy_climbs(with_accuracies(history, {1: 0.8, -1: 0.1})), FAIL, "80.0 % -> 10.0 %")


def test_accuracy_of_a_network_that_is_mostly_gone_fails_with_that_cause():
    history = changed(with_accuracies(good_run(), {-1: 0.1}), {20: {"structured_sparsity": 0.875}})
    check(verdict.accuracy_climbs(history), FAIL, "10.0 %", cause="88 % of the filters are zero")


def test_accuracy_under_a_penalty_that_swamps_the_cross_entropy_fails_with_that_cause():
    history = with_accuracies(changed(good_run(), {9: {"loss": 50.0, "cross_entropy": 2.0}}), {-1: 0.1})
    check(verdict.accuracy_climbs(history), FAIL, "10.0 %", cause="outweighs the cross-entropy 24 times")


def test_an_accuracy_that_no_such_network_reaches_fails_and_the_stand_in_may_reach_it():
    history = with_accuracies(good_run(), {-1: 0.97})
    check(verdict.accuracy_climbs(history), FAIL, "97.0 %", cause="test images among the training images")
    stand_in = replace(history, data=replace(history.data, name="synthetic stand-in", synthetic=True))
    assert verdict.accuracy_climbs(stand_in).status == PASS


@pytest.mark.parametrize(
    ("last", "status", "numbers"),
    [
        (0.029, FAIL, "chance 1 %"),
        (0.031, PASS, "chance 1 %"),
        (0.81, FAIL, "no ResNet-20 is known above 80 %"),
    ],
)
def test_of_a_hundred_classes_three_in_a_hundred_are_well_above_chance(last, status, numbers):
    history = with_accuracies(good_run(), {1: 0.01, -1: last})
    history = replace(history, data=replace(history.data, name="CIFAR-100", classes=100))
    check(verdict.accuracy_climbs(history), status, numbers)


@pytest.mark.parametrize(("hits", "status"), [(0, FAIL), (1, PASS)])
def test_a_class_of_a_hundred_is_missing_where_none_of_its_hundred_images_is_known(hits, status):
    of_classes = {"class_images": [100] * 100, "class_predictions": [100] * 100}
    again = ended(class_right=[60] * 99 + [hits], right=5940 + hits, **of_classes).retest
    check(verdict.every_class_is_predicted(again), status, "class 99")


@pytest.mark.parametrize(("accuracy", "warns"), [(0.012, 1), (0.02, 0)])
def test_a_hundred_classes_are_warned_of_at_their_own_chance(accuracy, warns):
    history = in_every_epoch(good_run(2), accuracy=accuracy)
    history = replace(history, data=replace(history.data, classes=100))
    assert sum("at chance" in sentence for sentence in warnings_of(history)) == warns


@pytest.mark.parametrize(("model", "status"), [("theirs:Net", SKIP), ("resnet20", FAIL)])
def test_a_penalty_of_nothing_is_no_fault_of_a_network_without_groups(model, status):
    history = in_every_epoch(good_run(model=model), penalty=0.0, structured_sparsity=0.0)
    check(verdict.penalty_falls(history), status, "")
    check(verdict.structured_follows_warmup(history), status, "")


# The ledger


def with_ledger(history: History, *found: tuple[int, Check]) -> History:
    """Return the history with two checks that hold in every epoch, and these in some."""
    history = copy.deepcopy(history)
    for r in history.epochs:
        r.ledger.extend([Check(PASS, "images", "each once"), Check(PASS, "rates", "0.008")])
    for epoch, check_found in found:
        ledger = history.epochs[epoch - 1].ledger
        ledger[:] = [c for c in ledger if c.name != check_found.name] + [check_found]
    return history


def test_a_ledger_that_holds_is_one_line():
    (line,) = verdict.ledger_holds(with_ledger(good_run()).epochs)
    check(line, PASS, "2 equalities hold in each of 20 epochs")


def test_what_failed_in_the_ledger_has_a_line_of_its_own_and_is_warned_of_once():
    wrong = Check(FAIL, "rates", "0.5, expected 0.008. Likely cause: a schedule")
    history = with_ledger(good_run(), (4, wrong), (5, wrong))
    failed, held = verdict.ledger_holds(history.epochs)
    check(failed, FAIL, "epoch 4 and 1 more: 0.5, expected 0.008", cause="a schedule")
    check(held, PASS, "1 equalities")
    warned = set()
    assert new_warnings(history, 4, warned) == ["rates: 0.5, expected 0.008. Likely cause: a schedule"]
    assert new_warnings(history, 5, warned) == []


def test_what_the_ledger_never_could_tell_is_a_skip_and_an_epoch_that_it_could_is_none():
    skip = Check(SKIP, "images", "someone's own batches")
    one = with_ledger(good_run(), (1, skip))
    (line,) = verdict.ledger_holds(one.epochs)
    check(line, PASS, "2 equalities hold in each of 20 epochs; 'images' in the 19 looked at")
    never = with_ledger(good_run(), *((e, skip) for e in range(1, EPOCHS + 1)))
    _, skipped = verdict.ledger_holds(never.epochs)
    check(skipped, SKIP, "someone's own batches")


# The second test of the final network


def ended(count: NetworkCount | None = None, **changes: object) -> History:
    history = runs.finished(good_run(), *([count] if count else []))
    assert history.retest
    return replace(history, retest=replace(history.retest, **changes))


def test_the_rows_accuracy_that_all_networks_have_passes_with_all_of_them():
    check(verdict.accuracy_is_the_files(ended()), PASS, "row 70.00 %", "packed 70.00 %", "10,000 images")


def test_a_row_of_another_network_fails_and_ties_are_forgiven():
    check(
        verdict.accuracy_is_the_files(ended(right=6990)),
        FAIL,
        "row 70.00 %",
        "69.90 %",
        cause="the row is of",
    )
    assert verdict.accuracy_is_the_files(ended(right=6990, ties=10)).status == PASS
    assert verdict.accuracy_is_the_files(ended(right=6990, ties=9)).status == FAIL


@pytest.mark.parametrize("field", ["quantized_accuracy", "packed_accuracy", "slim_accuracy"])
def test_a_compressed_network_with_another_accuracy_fails(field):
    history = ended()
    assert history.compressed
    history = replace(history, compressed=replace(history.compressed, **{field: 0.69}))
    assert verdict.accuracy_is_the_files(history).status == FAIL


def test_bf16_may_round_the_float32_networks_predictions_otherwise():
    history = replace(ended(right=6980, ties=20), precision=PRECISIONS["bf16"])
    assert verdict.accuracy_is_the_files(history).status == PASS


def test_a_class_that_is_never_predicted_fails_at_a_good_accuracy_alone():
    missing = {"class_right": [780] * 9 + [0], "class_predictions": [1111] * 9 + [0], "right": 7020}
    check(
        verdict.every_class_is_predicted(ended(**missing).retest), FAIL, "class 9", "0 times", cause="class 9"
    )
    weak = missing | {"class_right": [500] * 9 + [0], "right": 4500}
    check(verdict.every_class_is_predicted(ended(**weak).retest), SKIP, "45.0 %")
    check(verdict.every_class_is_predicted(ended().retest), PASS, "recall 70.0 %")
    few = ended(images=100, class_images=[10] * 10, class_right=[7] * 10, right=70)
    check(verdict.every_class_is_predicted(few.retest), SKIP, "too few")


@pytest.mark.parametrize(
    ("train", "test", "images", "status"),
    [
        (0.73, 0.70, 50_000, PASS),
        (0.70, 0.70, 50_000, PASS),
        (0.60, 0.70, 50_000, FAIL),  # training labels that are wrong
        (0.90, 0.50, 50_000, FAIL),  # so many images cannot be learned by heart so soon
        (1.00, 0.50, 2_000, PASS),  # so few can
        (0.90, 0.10, 2_000, FAIL),
        (0.90, 0.10, 256, PASS),
    ],
)
def test_training_images_against_test_images(train, test, images, status):
    history = ended(train_right=round(10_000 * train), right=round(10_000 * test))
    history = replace(history, data=replace(history.data, train_images=images))
    check(
        verdict.training_images_are_known(history), status, f"{100 * train:.1f} %", f"test {100 * test:.1f} %"
    )


def test_a_hundred_classes_may_be_known_by_heart():
    history = ended(train_right=9990, right=6860)
    history = replace(history, data=replace(history.data, classes=100))
    check(verdict.training_images_are_known(history), PASS, "99.9 %", "68.6 %")
    history.data = replace(history.data, classes=10)
    check(verdict.training_images_are_known(history), FAIL, "99.9 %", "68.6 %")


# Layers that no longer count


def with_signals(history: History, signals: dict[str, float | None]) -> History:
    history = copy.deepcopy(history)
    for r in history.epochs[10:]:
        for name in LAYERS:
            r.layers[name] = replace(r.layers[name], signal=signals.get(name, 0.9999))
    return history


def test_a_layer_whose_output_is_lost_behind_its_batch_norm_fails_and_is_warned_of():
    history = with_signals(good_run(), {LAYERS[1]: 1e-7, LAYERS[2]: 0.05})
    line = verdict.every_layer_counts(history.epochs[-1])
    check(line, FAIL, "2 of signal", LAYERS[1], LAYERS[2], cause="--sparsity-weight")
    warned = set()
    (sentence,) = new_warnings(history, 11, warned)
    assert LAYERS[1] in sentence and LAYERS[2] in sentence and "Likely cause: " in sentence
    assert new_warnings(history, 12, warned) == []


def test_layers_with_a_signal_pass_and_layers_without_a_batch_norm_are_not_judged():
    check(
        verdict.every_layer_counts(with_signals(good_run(), {LAYERS[1]: 0.5}).epochs[-1]),
        PASS,
        "signal 0.5 to 1",
    )
    without = with_signals(good_run(), dict.fromkeys(LAYERS))
    check(verdict.every_layer_counts(without.epochs[-1]), SKIP, "no quantized layer")


# The packed file, counted again


@pytest.mark.parametrize(
    "field",
    ["weights", "zero_weights", "filters", "zero_filters", "structured_macs", "unstructured_macs", "bits"],
)
def test_a_count_that_is_not_the_files_fails_and_its_layer_is_named(count, field):
    history, layer = ended(count), "layer2.0.conv1"
    assert history.compressed
    check(verdict.file_is_recounted(history, count), PASS, "BOPs counted from its bytes")
    found = history.compressed.file[layer]
    history.compressed.file[layer] = replace(found, **{field: getattr(found, field) + 1})
    check(verdict.file_is_recounted(history, count), FAIL, layer, cause="packing.py")


def test_more_levels_than_the_bits_allow_fail(count):
    history, layer = ended(count), "layer2.0.conv1"
    assert history.compressed
    bits = history.compressed.file[layer].bits
    history.compressed.file[layer] = replace(history.compressed.file[layer], levels=2**bits)
    check(verdict.file_is_recounted(history, count), FAIL, f"{bits} bits give {2**bits - 1} at most")


def test_bops_that_are_not_the_files_fail(count):
    history = ended(count)
    assert history.final
    totals = history.final.totals | {"structured_bops": history.final.totals["structured_bops"] + 32}
    history = replace(history, final=replace(history.final, totals=totals))
    check(verdict.file_is_recounted(history, count), FAIL, "structured BOPs")


def test_what_was_packed_as_float32_is_said(count):
    history, layer = ended(count), "layer2.0.conv1"
    assert history.compressed
    history.compressed.file[layer] = replace(history.compressed.file[layer], coded=False, bits=32)
    check(verdict.file_is_recounted(history, count), PASS, f"float32 though quantized: {layer}")


# Logits

KINDS = pytest.mark.parametrize("kind", ["bit", "deadzone"])


@KINDS
def test_logits_that_learn_pass_with_how_far_they_moved(kind):
    far = {"bit": "2", "deadzone": "2.4"}[kind]
    history = in_layer(good_run(), LAYERS[2], [EPOCHS], parameters={LOGITS[kind]: 3.5})
    check(verdict.parameters_live(history, LOGITS[kind]), PASS, f"4 parameters moved by 0.5 to {far}")


@KINDS
@pytest.mark.parametrize("gradient", [None, 0.0, math.nan, math.inf])
def test_a_logit_without_a_finite_gradient_that_is_not_zero_fails_and_is_named_even_if_only_once(
    kind, gradient
):
    history = in_layer(good_run(), LAYERS[1], [9], gradients={LOGITS[kind]: gradient})
    said = "gradient 0" if gradient == 0 else f"gradient {gradient}"
    check(
        verdict.parameters_live(history, LOGITS[kind]), FAIL, f"{LAYERS[1]} ({said})", cause="layer of zeros"
    )


@KINDS
def test_a_logit_that_ends_where_it_began_fails_and_is_named(kind):
    history = in_layer(good_run(), LAYERS[3], [EPOCHS], parameters={LOGITS[kind]: 3.0})
    check(
        verdict.parameters_live(history, LOGITS[kind]),
        FAIL,
        "moved by 0 to",
        f"not moved: {LAYERS[3]}",
        cause="rate of 0",
    )


@KINDS
def test_one_kinds_fault_is_not_the_others(kind):
    other = {"bit": "deadzone", "deadzone": "bit"}[kind]
    history = in_layer(good_run(), LAYERS[0], [EPOCHS], {LOGITS[kind]: 3.0}, {LOGITS[kind]: 0.0})
    assert verdict.parameters_live(history, LOGITS[kind]).status == FAIL
    assert verdict.parameters_live(history, LOGITS[other]).status == PASS


@KINDS
def test_a_layer_of_zeros_may_have_a_gradient_of_zero(kind):
    history = in_layer(good_run(), LAYERS[0], [19, 20], gradients={LOGITS[kind]: 0.0}, zero_weights=WEIGHTS)
    assert verdict.parameters_live(history, LOGITS[kind]).status == PASS


@KINDS
def test_quantizers_without_such_a_logit_to_learn_are_neither_judged_nor_warned_of(kind):
    logit, history = LOGITS[kind], good_run()
    for layers in (history.start, *(r.layers for r in history.epochs)):
        for layer in layers.values():
            layer.parameters.pop(logit)
            getattr(layer, "gradients", layer.parameters).pop(logit, None)
    check(verdict.parameters_live(history, LOGITS[kind]), SKIP, "trained")
    (other,) = set(LOGITS) - {kind}
    assert verdict.parameters_live(history, LOGITS[other]).status == PASS
    assert warnings_of(history) == []


def with_quantizers_that_train(names: dict[str, str], history: History) -> History:
    """Return the run of quantizers with parameters of these names, in these groups, that learn."""
    layers = {name: LayerStart(dict.fromkeys(names, 1.0), 4.0) for name in LAYERS}
    history = replace(in_every_epoch(history, learned_bits=4.0), start=layers, parameter_groups=names)
    for r in history.epochs:
        for name in LAYERS:
            moved = dict.fromkeys(names, 1.0 + 0.1 * r.epoch)
            r.layers[name] = replace(r.layers[name], parameters=moved, gradients=dict.fromkeys(names, 0.5))
    return history


def test_the_parameters_of_someones_own_quantizer_are_judged_by_their_names():
    history = with_quantizers_that_train({"step_size": "weights"}, good_run())
    assert verdict.trained_names(history.start) == ["logit_bit", "logit_dz", "step_size"]
    check(verdict.parameters_live(history, "step_size"), PASS, "4 parameters moved by 2 to 2")
    assert verdict.parameters_live(history, "step_size").name == "step_size parameters learn"
    still = in_layer(history, LAYERS[2], [EPOCHS], parameters={"step_size": 1.0})
    check(verdict.parameters_live(still, "step_size"), FAIL, LAYERS[2], cause="step_size does not act in")
    silent = in_layer(history, LAYERS[2], [EPOCHS], gradients={"step_size": None})
    (sentence,) = warnings_of(silent)
    assert "step_size parameters without a gradient" in sentence and LAYERS[2] in sentence


def test_bits_that_no_quantizer_trains_need_not_fall():
    for names in ({}, {"step_size": "weights"}, {"logit_dz": "deadzone"}):
        check(verdict.bits_fall(with_quantizers_that_train(names, good_run())), SKIP, "train no bit-width")
    history = with_quantizers_that_train({"width": "bit"}, good_run())
    check(verdict.bits_fall(history), FAIL, "4.00 -> 4.00", cause="--bit-lr")
    # Bits that fell, whatever trained them, are judged.
    history = changed(
        with_quantizers_that_train({"width": "weights"}, good_run()), {20: {"learned_bits": 3.0}}
    )
    check(verdict.bits_fall(history), PASS, "4.00 -> 3.00")


def test_many_names_are_cut_short_and_counted():
    history = good_run()
    for name in LAYERS:
        history = in_layer(history, name, [20], parameters={"logit_bit": 3.0})
    check(verdict.parameters_live(history, "logit_bit"), FAIL, f"{', '.join(LAYERS[:3])} and 1 more")


# Sparsity


def test_unstructured_sparsity_that_grows_passes():
    check(verdict.unstructured_grows(good_run()), PASS, "3.0 % -> 60.0 %")


@pytest.mark.parametrize("last", [0.03, 0.01])
def test_unstructured_sparsity_that_does_not_grow_fails(last):
    history = changed(good_run(), {20: {"unstructured_sparsity": last}})
    check(
        verdict.unstructured_grows(history),
        FAIL,
        f"3.0 % -> {100 * last:.1f} %",
        cause="--deadzone-decay",
    )


def test_fewer_zeros_of_quantizers_without_a_dead_zone_are_no_fault():
    history = changed(good_run(), {20: {"unstructured_sparsity": 0.02}})
    history.parameter_groups = {"step": "weights"}
    check(verdict.unstructured_grows(history), SKIP, "3.0 % -> 2.0 %", "no dead zone")


def test_one_epoch_shows_no_growth():
    check(verdict.unstructured_grows(good_run(1)), SKIP, "3.0 %")


def with_filters(first: int | None, epochs: int = EPOCHS, **chosen: float | str) -> History:
    """A run whose filters die in epoch `first`, or never."""
    dead = {e: {"structured_sparsity": 0.061 if first and e >= first else 0.0} for e in range(1, epochs + 1)}
    return changed(good_run(epochs, **chosen), dead)


def test_filters_that_die_after_the_warmup_began_pass_with_their_share_and_epoch():
    line = verdict.structured_follows_warmup(with_filters(18))
    check(line, PASS, "6.1 %", "epoch 18")


@pytest.mark.parametrize("first", [1, 5, 6])
def test_filters_that_die_while_the_coefficient_is_still_zero_fail(first):
    """With a delay of 5 epochs the coefficient is 0 in the first six epochs, and leaves 0 in the seventh."""
    history = with_filters(first)
    assert history.epochs[5].coefficient == 0 < history.epochs[6].coefficient
    line = verdict.structured_follows_warmup(history)
    check(line, FAIL, f"epoch {first}", cause="--deadzone-decay")


@pytest.mark.parametrize(("early", "status"), [(0.0005, PASS), (0.0012, PASS), (0.0013, FAIL), (0.03, FAIL)])
def test_up_to_a_fiftieth_of_the_dead_filters_may_die_before_the_penalty_acts(early, status):
    line = verdict.structured_follows_warmup(
        changed(with_filters(8), {e: {"structured_sparsity": early} for e in (5, 6)})
    )
    cause = "" if status == PASS else "--deadzone-decay"
    check(line, status, "6.1 %", "the first in epoch 5", f"{100 * early:.1f} % before it", cause=cause)


@pytest.mark.parametrize("own", [{"model": "a:b"}, {"quantizer": "a:B"}])
def test_filters_that_are_dead_from_the_start_of_ones_own_network_are_told_and_not_judged(own):
    check(verdict.structured_follows_warmup(with_filters(1, **own)), SKIP, "epoch 1", "one's own")


def test_filters_that_die_in_the_first_epoch_with_a_penalty_pass():
    assert verdict.structured_follows_warmup(with_filters(7)).status == PASS


def test_a_warmup_without_delay_lets_filters_die_from_the_start():
    history = in_every_epoch(with_filters(1, sparsity_delay=0.0, sparsity_ramp=0.0), coefficient=0.01)
    assert verdict.structured_follows_warmup(history).status == PASS


def test_no_dead_filter_at_the_end_of_a_long_run_fails():
    line = verdict.structured_follows_warmup(with_filters(None))
    check(line, FAIL, "0.0 %", cause="--sparsity-weight")


def test_filters_that_die_and_come_back_fail():
    history = changed(with_filters(8), {20: {"structured_sparsity": 0.0}})
    check(verdict.structured_follows_warmup(history), FAIL, "0.0 %", cause="--sparsity-weight")


@pytest.mark.parametrize(("epochs", "chosen"), [(9, {}), (20, {"sparsity_weight": 0.0})])
def test_a_run_without_a_whole_warmup_is_skipped(epochs, chosen):
    check(verdict.structured_follows_warmup(with_filters(None, epochs, **chosen)), SKIP, "0.0 %")


def test_filters_that_die_in_a_run_without_a_penalty_are_told_and_not_judged():
    line = verdict.structured_follows_warmup(with_filters(2, 4))
    check(line, SKIP, "6.1 %", "the first in epoch 2", "none of these 4 epochs")


def test_no_dead_filter_after_a_few_steps_with_a_penalty_is_not_judged():
    check(verdict.structured_follows_warmup(with_filters(None, 9)), SKIP, "0.0 %", "294 steps with a penalty")


def test_no_dead_filter_under_a_penalty_that_swamps_the_cross_entropy_has_that_cause():
    history = changed(with_filters(None), {9: {"loss": 50.0, "cross_entropy": 2.0}})
    check(verdict.structured_follows_warmup(history), FAIL, "0.0 %", cause="too strong")


def test_a_penalty_that_falls_passes_from_the_last_epoch_before_the_warmup():
    check(verdict.penalty_falls(good_run()), PASS, "506.0", "220.0")


@pytest.mark.parametrize("last", [506.0, 900.0, math.inf, math.nan])
def test_a_penalty_that_does_not_fall_fails(last):
    history = changed(in_every_epoch(good_run(), structured_sparsity=0.0), {20: {"penalty": last}})
    check(verdict.penalty_falls(history), FAIL, "506.0", f"{last:.1f}", cause="--sparsity-weight")


def test_a_penalty_that_does_not_fall_while_filters_die_is_no_fault_of_a_long_run():
    history = changed(good_run(), {20: {"penalty": 900.0}})
    check(verdict.penalty_falls(history), SKIP, "506.0", "900.0", "9.0 % of the filters have died")
    for last in (math.inf, math.nan):
        assert verdict.penalty_falls(changed(good_run(), {20: {"penalty": last}})).status == FAIL


@pytest.mark.parametrize("kind", ["no warm-up yet", "no epoch before it", "no penalty"])
def test_a_penalty_without_epochs_on_both_sides_is_skipped(kind):
    history = {
        "no warm-up yet": good_run(6),
        "no epoch before it": in_every_epoch(good_run(), coefficient=0.01),
        "no penalty": in_every_epoch(good_run(sparsity_weight=0.0), coefficient=0.0),
    }[kind]
    check(verdict.penalty_falls(history), SKIP, f"{history.epochs[-1].penalty:.1f}")


def test_bits_that_fall_pass():
    check(verdict.bits_fall(good_run()), PASS, "8.00 -> 4.00")


@pytest.mark.parametrize("last", [8.0, 8.3, 7.99])
def test_bits_that_stay_fail(last):
    history = changed(good_run(), {20: {"learned_bits": last}})
    check(verdict.bits_fall(history), FAIL, f"8.00 -> {last:.2f}", cause="--bit-lr")


def test_bits_that_stay_for_a_few_steps_are_skipped_with_their_numbers():
    check(verdict.bits_fall(in_every_epoch(good_run(3), learned_bits=8.0)), SKIP, "8.00 -> 8.00", "294 steps")
    check(verdict.bits_fall(good_run(3)), PASS, "8.00 -> 7.40")


# Counts


def test_counts_that_add_up_pass_with_both_totals(count, model):
    check(counts_add_up(count, model), PASS, "40,551,040 MACs in 20 layers", "81,102,080")


FALSIFIED = [
    ("dense_macs", 1),
    ("dense_macs", -9),
    ("unstructured_macs", 1),
    ("unstructured_macs", -1024),
    ("zero_weights", 1),
    ("zero_weights", -1),
    ("weights", 9),
    ("filters", 1),
    ("structured_macs", 10**9),
    ("zero_filters", 64),
]


@pytest.mark.parametrize(("field", "by"), FALSIFIED)
@pytest.mark.parametrize("position", [0, 7, 19])
def test_a_single_falsified_count_turns_the_line_red_and_its_layer_is_named(
    count, model, field, by, position
):
    layers = list(count.layers)
    layers[position] = replace(layers[position], **{field: getattr(layers[position], field) + by})
    line = counts_add_up(NetworkCount(tuple(layers)), model)
    check(line, FAIL, layers[position].name, cause="metrics.py")


def test_two_errors_that_cancel_in_the_total_are_found(count, model):
    layers = list(count.layers)
    layers[2] = replace(layers[2], dense_macs=layers[2].dense_macs + 9)
    layers[3] = replace(layers[3], dense_macs=layers[3].dense_macs - 9)
    check(counts_add_up(NetworkCount(tuple(layers)), model), FAIL, layers[2].name, layers[3].name)


@pytest.mark.parametrize(
    "change", ["a layer is missing", "a layer is counted twice", "a layer has another name"]
)
def test_layers_missing_doubled_or_renamed_are_found(count, model, change):
    layers = {
        "a layer is missing": count.layers[:5] + count.layers[6:],
        "a layer is counted twice": count.layers + count.layers[5:6],
        "a layer has another name": (replace(count.layers[0], name="stem"), *count.layers[1:]),
    }[change]
    assert counts_add_up(NetworkCount(layers), model).status == FAIL


def test_too_few_states_are_found(count, model):
    layers = list(count.layers)
    layers[4] = replace(layers[4], states=layers[4].states[:-1])
    check(counts_add_up(NetworkCount(tuple(layers)), model), FAIL, layers[4].name)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_counting_changes_nothing_of_the_model(training, enabled):
    model = quantized_network()
    count = count_network(model)
    model.train(training)
    toggle_quantization(model, enabled)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    counts_add_up(count, model)
    assert all(m.training == training for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert {weight_quantization(m).enabled for m in quantized_layers(model).values()} == {enabled}


def test_weights_that_are_not_finite_can_still_be_counted():
    """They are what stopped the run, and its verdict is still to be given."""
    model = quantized_network()
    count = count_network(model)
    with torch.no_grad():
        model.layer2[1].conv1.parametrizations.weight.original[3] = math.nan
    assert counts_add_up(count, model).status == PASS


# The compressed network


def test_a_compressed_network_that_agrees_passes_with_its_numbers():
    logits, macs, exported, packed = compressed_agrees(runs.compressed())
    check(logits, PASS, "8.0e-07 of the largest logit on 10,000 images", "100.00 % equal predictions")
    check(macs, PASS, "torch counts 20,275,520, printed 20,275,520")
    check(exported, PASS, "101,234 parameters in the file, 101,234 in the network")
    check(packed, PASS, "0 logits differ, 54,321 bytes")


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        (0, {"largest_difference": 2e-3}),
        (0, {"largest_difference": math.nan}),
        (0, {"agreement": 0.99}),
        (1, {"slim_macs": 2}),
        (2, {"read_back_parameters": 269_722}),
        (2, {"read_back_difference": 1e-3}),
        (2, {"read_back_parameters": 0, "read_back_difference": math.nan}),
        (3, {"packed_differs": 1}),
    ],
)
def test_a_disagreement_fails_its_own_line_with_its_likely_cause(line, changes):
    lines = compressed_agrees(runs.compressed(**changes))
    assert [i for i, each in enumerate(lines) if each.status == FAIL] == [line]
    check(lines[line], FAIL, cause="slim.pt2" if line == 2 else "defect in src/")


def test_logits_that_are_all_zero_and_equal_agree():
    lines = compressed_agrees(runs.compressed(largest_logit=0.0, largest_difference=0.0))
    assert [line.status for line in lines] == [PASS] * 4


def test_a_stopped_run_has_no_compressed_network_to_judge():
    for line in compressed_agrees(None):
        check(line, SKIP, "the run was stopped")


def test_a_network_that_cannot_be_packed_fails_all_three_lines_with_the_reason():
    for line in compressed_agrees(PackingError("a batch norm holds nan")):
        check(line, FAIL, "a batch norm holds nan", cause="overflowed")


# Pictures


def test_four_pictures_pass(pictures):
    check(pictures_exist(pictures), PASS, "4 files")


@pytest.mark.parametrize("how", ["gone", "empty", "a folder"])
def test_a_picture_that_is_not_there_is_named(pictures, how):
    pictures[2].unlink()
    if how == "empty":
        pictures[2].touch()
    elif how == "a folder":
        pictures[2].mkdir()
    check(pictures_exist(pictures), FAIL, "c.png", cause="folder")


def test_a_picture_that_is_written_twice_is_named(pictures):
    pictures[2].write_bytes(pictures[0].read_bytes())
    check(pictures_exist(pictures), FAIL, "the same picture", cause="another's name")


@pytest.mark.parametrize("name", ["c.pdf", "c.png"])
def test_a_picture_of_another_kind_than_its_name_says_is_named(pictures, name):
    other = pictures[2].with_name(name)
    other.write_bytes({"c.pdf": b"\x89PNG c", "c.png": b"%PDF c"}[name])
    check(pictures_exist([*pictures[:2], other]), FAIL, f"their names say: {name}", cause="--figure-format")


# Early warnings


def warnings_of(history: History) -> list[str]:
    return [sentence for _, sentence in early_warnings(history, len(history.epochs))]


def test_a_run_that_goes_as_expected_gives_no_warning_in_any_epoch():
    assert [warnings_of(good_run(epoch)) for epoch in range(1, EPOCHS + 1)] == [[]] * EPOCHS


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"gradients": {"logit_bit": None}}, ["bit parameters", "gradient None"]),
        ({"gradients": {"logit_bit": math.nan}}, ["bit parameters", "gradient nan"]),
        ({"gradients": {"logit_dz": 0.0}}, ["dead-zone parameters", "gradient 0"]),
        ({"gradients": {"logit_dz": math.inf}}, ["dead-zone parameters", "gradient inf"]),
        ({"parameters": {"logit_bit": 3.0}}, ["bit parameters", "not moved"]),
        ({"parameters": {"logit_dz": 3.0}}, ["dead-zone parameters", "not moved"]),
        ({"signal": 0.05}, ["nothing is left", "--sparsity-weight"]),
    ],
)
def test_a_layers_fault_is_said_in_one_sentence_that_names_it(numbers, words):
    history = in_layer(good_run(2), LAYERS[1], [2], **numbers)
    (sentence,) = warnings_of(history)
    assert all(word in sentence for word in [*words, LAYERS[1]]), sentence
    assert "\n" not in sentence


def test_a_dead_layer_without_a_gradient_is_said_to_be_gone_and_no_more():
    silent = {"logit_bit": 0.0, "logit_dz": 0.0}
    history = in_layer(good_run(1), LAYERS[1], [1], gradients=silent, zero_weights=WEIGHTS, signal=0.0)
    (sentence,) = warnings_of(history)
    assert "nothing is left of the output of layer1.0.conv2" in sentence


@pytest.mark.parametrize(
    ("accuracies", "warns"),
    [((0.10, 0.11), True), ((0.3, 0.10), False), ((0.10, 0.3), False), ((0.1,), False)],
)
def test_chance_is_warned_of_after_two_epochs_running(accuracies, warns):
    history = changed(good_run(len(accuracies)), {e: {"accuracy": a} for e, a in enumerate(accuracies, 1)})
    sentences = warnings_of(history)
    assert [("chance" in s and f"{100 * accuracies[-1]:.1f} %" in s) for s in sentences] == [True] * warns


@pytest.mark.parametrize(("loss", "warns"), [(10.9, False), (11.1, True), (31.0, True), (math.inf, True)])
def test_a_penalty_over_ten_times_the_cross_entropy_is_warned_of(loss, warns):
    history = changed(good_run(8), {8: {"loss": loss, "cross_entropy": 1.0}})
    sentences = warnings_of(history)
    assert ["outweighs" in s and "--sparsity-weight" in s for s in sentences] == [True] * warns
    assert loss != 31.0 or "30" in sentences[0]


def test_a_cross_entropy_of_zero_is_no_division_by_zero():
    history = changed(good_run(8), {8: {"loss": 1.0, "cross_entropy": 0.0}})
    (sentence,) = warnings_of(history)
    assert "outweighs" in sentence


def test_each_warning_has_a_name_of_its_own_so_that_it_is_said_once():
    history = in_every_epoch(good_run(2), accuracy=0.1, loss=100.0)
    for name in LAYERS:
        history = in_layer(history, name, [2], {"logit_bit": 3.0}, {"logit_bit": None}, signal=0.0)
    about = [name for name, _ in early_warnings(history, len(history.epochs))]
    # Two about bit logits, one about the layers that are gone, two about the run.
    assert len(about) == len(set(about)) == 2 + 1 + 2


def test_a_warning_is_given_with_the_epoch_that_brought_it_and_never_again():
    history = in_layer(good_run(6), LAYERS[1], [2, 3, 5], gradients={"logit_bit": 0.0})
    history = in_layer(history, LAYERS[2], [5, 6], signal=0.0)
    warned = set()
    given = [new_warnings(history, end, warned) for end in range(1, 7)]
    assert [len(sentences) for sentences in given] == [0, 1, 0, 0, 1, 0]
    assert "gradient" in given[1][0] and LAYERS[2] in given[4][0]


# Any numbers


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.fixed_dictionaries(
            {key: st.floats() for key in ("loss", "cross_entropy", "penalty")}
            | {key: st.floats(0, 1) for key in ("accuracy", "unstructured_sparsity", "structured_sparsity")}
            | {"learned_bits": st.floats(2, 8), "coefficient": st.sampled_from([0.0, 1e-3, 1.0])}
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_the_numbers_each_line_and_warning_is_one_line_and_a_failure_has_a_cause(numbers):
    history = changed(good_run(len(numbers)), dict(enumerate(numbers, 1)))
    lines = [
        verdict.loss_is_finite(history),
        verdict.accuracy_climbs(history),
        verdict.unstructured_grows(history),
        verdict.structured_follows_warmup(history),
        verdict.penalty_falls(history),
        verdict.bits_fall(history),
    ]
    for line in lines:
        check(line, line.status)
    assert all("\n" not in sentence for sentence in warnings_of(history))
