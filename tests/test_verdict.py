"""The verdict: each line on records made by hand, good and bad, with its numbers and its cause."""

import copy
import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments import checks
from experiments.checks import (
    FAIL,
    PASS,
    SKIP,
    Check,
    counts_add_up,
    early_warnings,
    pictures_exist,
    proofs_hold,
    verdict,
)
from experiments.proofs import Proof
from experiments.settings import Settings
from metrics import NetworkCount, count_network
from resnet import ResNet, resnet20
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import (
    attach_weight_quantizers,
    quantized_layers,
    toggle_quantization,
    weight_quantization,
)

Record = dict[str, Any]
EPOCHS = 20
LAYERS = ("layer1.0.conv1", "layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2")


def layer(epoch: int) -> Record:
    """One quantized layer whose two logits learn."""
    return {
        "bit_logit": 3.0 - 0.1 * epoch,
        "bit_logit_start": 3.0,
        "bit_gradient": 1e-4,
        "deadzone_logit": 3.0 - 0.12 * epoch,
        "deadzone_logit_start": 3.0,
        "deadzone_gradient": -1e-5,
        "learned_bits": 8.0 - 0.2 * epoch,
        "learned_bits_start": 8.0,
        "weights": 2304,
        "zero_weights": 50 * epoch,
    }


def record(epoch: int) -> Record:
    """An epoch (from 1) of a run that goes as expected: delay 5, ramp 5, filters die from epoch 12 on."""
    weight = 0.01 * min(max(epoch - 6, 0) / 5, 1)
    penalty = 500.0 - (20 * (epoch - 6) if epoch > 6 else -epoch)
    return {
        "epoch": epoch,
        "loss": 1 + 1 / epoch + weight * penalty,
        "cross_entropy": 1 + 1 / epoch,
        "penalty": penalty,
        "sparsity_weight": weight,
        "accuracy": 0.30 + 0.02 * epoch,
        "unstructured_sparsity": 0.03 * epoch,
        "structured_sparsity": max(epoch - 11, 0) * 0.01,
        "learned_bits": 8.0 - 0.2 * epoch,
        "layers": {name: layer(epoch) for name in LAYERS},
    }


def good_run(epochs: int = EPOCHS) -> list[Record]:
    return [record(epoch) for epoch in range(1, epochs + 1)]


def changed(records: list[Record], values: dict[int, Record]) -> list[Record]:
    """The records with other numbers in some epochs."""
    return [r | values.get(r["epoch"], {}) for r in records]


def in_layer(records: list[Record], name: str, epochs: list[int], **numbers: object) -> list[Record]:
    records = copy.deepcopy(records)
    for r in records:
        if r["epoch"] in epochs:
            r["layers"][name] |= numbers
    return records


def check(check: Check, status: str, *numbers: str, cause: str = "") -> None:
    assert check.status == status, check
    for number in numbers:
        assert number in check.message, f"{number!r} is not in {check.message!r}"
    said = check.message.partition("Likely cause: ")[2]
    assert bool(said) == (status == FAIL), check
    assert cause in said
    assert str(check) == f"{status}  {check.name}: {check.message}"
    assert "\n" not in str(check)


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
        path.write_bytes(b"not empty")
    return paths


def good_proof(**changes: object) -> Proof:
    values = {field.name: 1 for field in fields(Proof)} | {"largest_difference": 1e-6, "packed_differs": 0}
    return Proof(**(values | changes))


# All of it


def test_a_run_that_goes_as_expected_passes_every_line(model, count, pictures):
    lines = verdict(good_run(), Settings(), count, model, pictures, proof=good_proof())
    assert [line.status for line in lines] == [PASS] * 13
    assert len({line.name for line in lines}) == 13


def test_the_lines_are_those_of_the_issue_in_its_order(model, count, pictures):
    names = " | ".join(line.name for line in verdict(good_run(), Settings(), count, model, pictures))
    words = ["loss", "accuracy", "bit logits", "deadzone logits", "unstructured", "structured sparsity f"]
    words += ["penalty", "bits fall", "counts", "pictures"]
    assert [names.find(word) for word in words] == sorted(names.find(word) for word in words)
    assert all(word in names for word in words)


def test_a_run_of_one_epoch_fails_no_line_for_its_shortness(model, count, pictures):
    lines = verdict(good_run(1), Settings(epochs=1), count, model, pictures)
    assert FAIL not in [line.status for line in lines]
    skipped = [line.name for line in lines if line.status == SKIP]
    assert len(skipped) == 8, skipped  # accuracy, both sparsities, the penalty, bits, and the proofs


def test_a_long_run_without_a_quantized_layer_fails_no_line_about_quantizers(model, pictures):
    plain = resnet20()
    nothing = {"layers": {}, "learned_bits": 32.0, "penalty": 0.0}
    nothing |= {"unstructured_sparsity": 0.0, "structured_sparsity": 0.0}
    lines = verdict([r | nothing for r in good_run()], Settings(), count_network(plain), plain, pictures)
    passed = [line.name for line in lines if line.status == PASS]
    assert passed == ["loss is finite", "accuracy climbs", "counts add up", "pictures exist"]
    assert [line for line in lines if line.status == FAIL] == []


# Loss and accuracy


def test_a_finite_loss_passes_with_its_way():
    check(checks.loss_is_finite(good_run()), PASS, "2.000 -> 3.250")  # 1 + 1 / 20 + 0.01 * 220
    check(checks.loss_is_finite(changed(good_run(), {20: {"loss": 0.125}})), PASS, "2.000 -> 0.125")


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_fails_with_its_epochs(number):
    records = changed(good_run(), {3: {"loss": number}, 7: {"loss": number}})
    check(checks.loss_is_finite(records), FAIL, "[3, 7]", cause="learning rate")


def test_a_run_that_a_loss_stopped_fails_though_every_finished_epochs_is_finite():
    line = checks.loss_is_finite(good_run(), "stopped in epoch 21: the loss is not finite at step 3")
    check(line, FAIL, "epoch 21", "step 3", cause="learning rate")


def test_accuracy_that_climbs_passes_with_first_last_and_chance():
    check(checks.accuracy_climbs(good_run()), PASS, "32.0 % -> 70.0 %", "best 70.0 %", "chance 10 %")


@pytest.mark.parametrize(
    ("accuracies", "numbers"),
    [
        ({1: 0.5, 10: 0.8, 20: 0.45}, "50.0 % -> 45.0 % (best 80.0 %"),  # fell
        ({1: 0.10, 20: 0.29}, "10.0 % -> 29.0 %"),  # climbed, and not well above chance
        ({1: 0.4, 20: 0.4}, "40.0 % -> 40.0 %"),
    ],
)
def test_accuracy_that_falls_stays_or_stays_near_chance_fails(accuracies, numbers):
    records = changed(good_run(), {epoch: {"accuracy": a} for epoch, a in accuracies.items()})
    check(checks.accuracy_climbs(records), FAIL, numbers, cause="penalty")


@pytest.mark.parametrize("epochs", [1, 4])
def test_a_few_epochs_tell_nothing_about_accuracy(epochs):
    check(checks.accuracy_climbs(good_run(epochs)), SKIP, f"{32 + 2 * (epochs - 1)}.0 %")


def test_five_epochs_do():
    assert checks.accuracy_climbs(good_run(5)).status == PASS


# Logits

KINDS = pytest.mark.parametrize("kind", ["bit", "deadzone"])


@KINDS
def test_logits_that_learn_pass_with_how_far_they_moved(kind):
    far = {"bit": "2", "deadzone": "2.4"}[kind]
    records = in_layer(good_run(), LAYERS[2], [EPOCHS], **{f"{kind}_logit": 3.5})
    check(checks.logits_live(records, kind), PASS, f"4 logits moved by 0.5 to {far}")


@KINDS
@pytest.mark.parametrize("gradient", [None, 0.0, math.nan, math.inf])
def test_a_logit_without_a_finite_gradient_that_is_not_zero_fails_and_is_named_even_if_only_once(
    kind, gradient
):
    records = in_layer(good_run(), LAYERS[1], [9], **{f"{kind}_gradient": gradient})
    said = "gradient 0" if gradient == 0 else f"gradient {gradient}"
    check(checks.logits_live(records, kind), FAIL, f"{LAYERS[1]} ({said})", cause="layer of zeros")


@KINDS
def test_a_logit_that_ends_where_it_began_fails_and_is_named(kind):
    records = in_layer(good_run(), LAYERS[3], [EPOCHS], **{f"{kind}_logit": 3.0})
    check(
        checks.logits_live(records, kind), FAIL, "moved by 0 to", f"not moved: {LAYERS[3]}", cause="rate of 0"
    )


@KINDS
def test_one_kinds_fault_is_not_the_others(kind):
    other = {"bit": "deadzone", "deadzone": "bit"}[kind]
    records = in_layer(good_run(), LAYERS[0], [EPOCHS], **{f"{kind}_gradient": 0.0, f"{kind}_logit": 3.0})
    assert checks.logits_live(records, kind).status == FAIL
    assert checks.logits_live(records, other).status == PASS


@KINDS
def test_a_layer_of_zeros_may_have_a_gradient_of_zero(kind):
    records = in_layer(good_run(), LAYERS[0], [19, 20], zero_weights=2304, **{f"{kind}_gradient": 0.0})
    assert checks.logits_live(records, kind).status == PASS


def test_many_names_are_cut_short_and_counted():
    records = good_run()
    for name in LAYERS:
        records = in_layer(records, name, [20], bit_logit=3.0)
    check(checks.logits_live(records, "bit"), FAIL, f"{', '.join(LAYERS[:3])} and 1 more")


# Sparsity


def test_unstructured_sparsity_that_grows_passes():
    check(checks.unstructured_grows(good_run()), PASS, "3.0 % -> 60.0 %")


@pytest.mark.parametrize("last", [0.03, 0.01])
def test_unstructured_sparsity_that_does_not_grow_fails(last):
    records = changed(good_run(), {20: {"unstructured_sparsity": last}})
    check(checks.unstructured_grows(records), FAIL, f"3.0 % -> {100 * last:.1f} %", cause="--deadzone-decay")


def test_one_epoch_shows_no_growth():
    check(checks.unstructured_grows(good_run(1)), SKIP, "3.0 %")


def with_filters(first: int | None, epochs: int = EPOCHS) -> list[Record]:
    dead = {e: {"structured_sparsity": 0.061 if first and e >= first else 0.0} for e in range(1, epochs + 1)}
    return changed(good_run(epochs), dead)


def test_filters_that_die_after_the_warmup_began_pass_with_their_share_and_epoch():
    line = checks.structured_follows_warmup(with_filters(18), Settings())
    check(line, PASS, "6.1 %", "epoch 18")


@pytest.mark.parametrize("first", [1, 5, 6])
def test_filters_that_die_while_the_coefficient_is_still_zero_fail(first):
    """With a delay of 5 epochs it is 0 in the first six, which end the warm-up's first moment."""
    assert with_filters(first)[5]["sparsity_weight"] == 0 < with_filters(first)[6]["sparsity_weight"]
    line = checks.structured_follows_warmup(with_filters(first), Settings())
    check(line, FAIL, f"epoch {first}", cause="--deadzone-decay")


def test_filters_that_die_in_the_first_epoch_with_a_penalty_pass():
    assert checks.structured_follows_warmup(with_filters(7), Settings()).status == PASS


def test_a_warmup_without_delay_lets_filters_die_from_the_start():
    records = [r | {"sparsity_weight": 0.01} for r in with_filters(1)]
    chosen = Settings(sparsity_delay=0.0, sparsity_ramp=0.0)
    assert checks.structured_follows_warmup(records, chosen).status == PASS


def test_no_dead_filter_at_the_end_of_a_long_run_fails():
    line = checks.structured_follows_warmup(with_filters(None), Settings())
    check(line, FAIL, "0.0 %", cause="--sparsity-weight")


def test_filters_that_die_and_come_back_fail():
    records = changed(with_filters(8), {20: {"structured_sparsity": 0.0}})
    check(checks.structured_follows_warmup(records, Settings()), FAIL, "0.0 %", cause="--sparsity-weight")


@pytest.mark.parametrize(("epochs", "chosen"), [(9, Settings()), (20, Settings(sparsity_weight=0.0))])
def test_a_run_without_a_whole_warmup_is_skipped(epochs, chosen):
    check(checks.structured_follows_warmup(with_filters(None, epochs), chosen), SKIP, "0.0 %")


def test_an_early_death_fails_a_short_run_too():
    assert checks.structured_follows_warmup(with_filters(2, 4), Settings()).status == FAIL


def test_a_penalty_that_falls_passes_from_the_last_epoch_before_the_warmup():
    check(checks.penalty_falls(good_run(), Settings()), PASS, "506.0", "220.0")


@pytest.mark.parametrize("last", [506.0, 900.0, math.inf, math.nan])
def test_a_penalty_that_does_not_fall_fails(last):
    records = changed(good_run(), {20: {"penalty": last}})
    check(checks.penalty_falls(records, Settings()), FAIL, "506.0", f"{last:.1f}", cause="--sparsity-weight")


@pytest.mark.parametrize("kind", ["no warm-up yet", "no epoch before it", "no penalty"])
def test_a_penalty_without_epochs_on_both_sides_is_skipped(kind):
    records, chosen = good_run(), Settings()
    if kind == "no warm-up yet":
        records = good_run(6)
    elif kind == "no epoch before it":
        records = [r | {"sparsity_weight": 0.01} for r in records]
    else:
        records, chosen = [r | {"sparsity_weight": 0.0} for r in records], Settings(sparsity_weight=0.0)
    check(checks.penalty_falls(records, chosen), SKIP, f"{records[-1]['penalty']:.1f}")


def test_bits_that_fall_pass():
    check(checks.bits_fall(good_run()), PASS, "8.00 -> 4.00")


@pytest.mark.parametrize("last", [8.0, 8.3, 7.99])
def test_bits_that_stay_fail(last):
    records = changed(good_run(), {20: {"learned_bits": last}})
    check(checks.bits_fall(records), FAIL, f"8.00 -> {last:.2f}", cause="--bit-lr")


def test_bits_of_a_few_epochs_are_skipped_with_their_numbers():
    check(checks.bits_fall(good_run(4)), SKIP, "8.00 -> 7.20")


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


# Pictures


# The proofs


def test_proofs_that_hold_pass():
    assert [line.status for line in proofs_hold(good_proof())] == [PASS] * 3


@pytest.mark.parametrize(
    ("line", "changes"),
    [
        (0, {"largest_difference": 2e-4}),
        (0, {"largest_difference": math.nan}),
        (0, {"agreement": 0.99}),
        (1, {"slim_macs": 2}),
        (2, {"packed_differs": 1}),
    ],
)
def test_a_proof_that_does_not_hold_fails_its_own_line_with_its_likely_cause(line, changes):
    lines = proofs_hold(good_proof(**changes))
    assert [i for i, check in enumerate(lines) if check.status == FAIL] == [line]
    assert "defect in src/" in lines[line].message


def test_a_stopped_run_has_no_proofs_to_judge():
    assert [line.status for line in proofs_hold(None)] == [SKIP] * 3


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


# Early warnings


def warnings_of(records: list[Record]) -> list[str]:
    return [sentence for _, sentence in early_warnings(records)]


def test_a_run_that_goes_as_expected_gives_no_warning_in_any_epoch():
    assert [warnings_of(good_run(epoch)) for epoch in range(1, EPOCHS + 1)] == [[]] * EPOCHS


@pytest.mark.parametrize(
    ("numbers", "words"),
    [
        ({"bit_gradient": None}, ["bit logits", "gradient None"]),
        ({"bit_gradient": math.nan}, ["bit logits", "gradient nan"]),
        ({"deadzone_gradient": 0.0}, ["deadzone logits", "gradient 0"]),
        ({"deadzone_gradient": math.inf}, ["deadzone logits", "gradient inf"]),
        ({"bit_logit": 3.0}, ["bit logits", "not moved"]),
        ({"deadzone_logit": 3.0}, ["deadzone logits", "not moved"]),
        ({"zero_weights": 2304}, ["every weight", "zero"]),
    ],
)
def test_a_layers_fault_is_said_in_one_sentence_that_names_it(numbers, words):
    records = in_layer(good_run(2), LAYERS[1], [2], **numbers)
    (sentence,) = warnings_of(records)
    assert all(word in sentence for word in [*words, LAYERS[1]]), sentence
    assert "\n" not in sentence


def test_a_dead_layer_without_a_gradient_is_said_to_be_dead_and_no_more():
    records = in_layer(
        good_run(1), LAYERS[1], [1], zero_weights=2304, bit_gradient=0.0, deadzone_gradient=0.0
    )
    (sentence,) = warnings_of(records)
    assert "every weight of layer1.0.conv2 is zero" in sentence


@pytest.mark.parametrize(
    ("accuracies", "warns"),
    [((0.10, 0.11), True), ((0.3, 0.10), False), ((0.10, 0.3), False), ((0.1,), False)],
)
def test_chance_is_warned_of_after_two_epochs_running(accuracies, warns):
    records = [r | {"accuracy": a} for r, a in zip(good_run(2), accuracies, strict=False)]
    sentences = warnings_of(records)
    assert [("chance" in s and f"{100 * accuracies[-1]:.1f} %" in s) for s in sentences] == [True] * warns


@pytest.mark.parametrize(("loss", "warns"), [(10.9, False), (11.1, True), (31.0, True), (math.inf, True)])
def test_a_penalty_over_ten_times_the_cross_entropy_is_warned_of(loss, warns):
    records = changed(good_run(8), {8: {"loss": loss, "cross_entropy": 1.0}})
    sentences = warnings_of(records)
    assert ["outweighs" in s and "--sparsity-weight" in s for s in sentences] == [True] * warns
    assert loss != 31.0 or "30" in sentences[0]


def test_a_cross_entropy_of_zero_is_no_division_by_zero():
    records = changed(good_run(8), {8: {"loss": 1.0, "cross_entropy": 0.0}})
    (sentence,) = warnings_of(records)
    assert "outweighs" in sentence


def test_each_warning_has_a_name_of_its_own_so_that_it_is_said_once():
    records = good_run(2)
    for name in LAYERS:
        records = in_layer(records, name, [2], bit_gradient=None, bit_logit=3.0, zero_weights=2304)
    records = [r | {"accuracy": 0.1, "loss": 100.0} for r in records]
    about = [name for name, _ in early_warnings(records)]
    assert (
        len(about) == len(set(about)) == 4 + 2 + 2
    )  # four dead layers, two about bit logits, two of the run


# Any numbers


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(
        st.fixed_dictionaries(
            {key: st.floats() for key in ("loss", "cross_entropy", "penalty")}
            | {key: st.floats(0, 1) for key in ("accuracy", "unstructured_sparsity", "structured_sparsity")}
            | {"learned_bits": st.floats(2, 8), "sparsity_weight": st.sampled_from([0.0, 1e-3, 1.0])}
        ),
        min_size=1,
        max_size=8,
    )
)
def test_whatever_the_numbers_each_line_and_warning_is_one_line_and_a_failure_has_a_cause(numbers):
    records = [record(i) | values for i, values in enumerate(numbers, 1)]
    lines = [
        checks.loss_is_finite(records),
        checks.accuracy_climbs(records),
        checks.unstructured_grows(records),
        checks.structured_follows_warmup(records, Settings()),
        checks.penalty_falls(records, Settings()),
        checks.bits_fall(records),
    ]
    for line in lines:
        check(line, line.status)
    assert all("\n" not in sentence for sentence in warnings_of(records))
