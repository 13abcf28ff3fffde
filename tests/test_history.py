"""The history: made from a model as it is, and read back from strict JSON exactly or not at all."""

import copy
import json
import math
import os
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_images import random_dataset
from torch import Tensor, nn

from experiments import history
from experiments.distributed import Processes
from experiments.evaluator import Evaluator
from experiments.files import write_json
from experiments.history import (
    Check,
    FinalCounts,
    History,
    LayerStart,
    Resumption,
    commit_of_program,
    epoch_record,
    final_counts,
    layer_records,
    new_history,
)
from experiments.settings import Settings
from metrics import TOTALS, count_network
from resnet import ResNet
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers, quantizers

NAN, INF = math.nan, math.inf
STEM_AND_CLASSIFIER = ["^conv1$", "^linear$"]
quick = settings(max_examples=150, deadline=None, derandomize=True)


def whole_run(epochs: int = 3) -> History:
    """A run that was resumed, finished and judged: every field of the schema holds something."""
    history = runs.good_run(epochs)
    history.resumed = [Resumption(2, ["torch 2.8.0 before, 2.9.0 now"]), Resumption(2, [])]
    history.stopped = "stopped by Ctrl-C in epoch 4"
    history.final, history.compressed, history.retest = runs.final(), runs.compressed(), runs.retest()
    history.verdict = [Check("PASS", "loss is finite", "2.000 -> 1.333"), Check("SKIP", "bits fall", "8")]
    history.preflight = [Check("PASS", "gradients", "as the reference's")]
    for r in history.epochs:
        r.ledger.append(Check("PASS", "images", "each once"))
    return history


def through_file(history: History, path: Path) -> History:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not strict JSON")

    write_json(path, history.to_json())
    return History.from_json(json.loads(path.read_text(), parse_constant=refuse))


def same(a: History, b: History) -> bool:
    """Equal in every digit and type, where NaN is NaN; settings are whatever JSON makes of them."""
    return repr(replace(a, settings={})) == repr(replace(b, settings={}))


# Written and read


def test_a_history_written_as_strict_json_and_read_again_is_the_same_and_so_is_its_file(tmp_path):
    history = whole_run()
    read = through_file(history, tmp_path / "a.json")
    assert same(read, history)
    assert read.settings == json.loads(json.dumps(history.settings))
    through_file(read, tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_a_history_as_a_checkpoint_holds_it_is_the_same_settings_and_all():
    history = whole_run()
    read = History.from_json(history.to_json())
    assert read == history and same(read, history)


def test_what_is_made_from_a_history_is_a_copy_that_later_epochs_do_not_change():
    history = runs.good_run(2)
    before = History.from_json(history.to_json())
    history.epochs.append(runs.epoch_record(3))
    history.epochs[0].layers.clear()
    assert len(before.epochs) == 2 and before.epochs[0].layers


@pytest.mark.parametrize("number", [NAN, INF, -INF, -0.0, 5e-324, 1.7976931348623157e308, 0.1])
def test_every_number_is_read_as_it_was_finite_or_not(number, tmp_path):
    history = runs.in_every_epoch(whole_run(), loss=number, penalty=number)
    history = runs.in_layer(history, runs.LAYERS[0], [2], {"logit_bit": number}, {"logit_dz": number})
    assert same(through_file(history, tmp_path / "a.json"), history)


def test_a_logit_without_a_gradient_stays_one_without():
    name = runs.LAYERS[0]
    history = runs.in_layer(runs.good_run(2), name, [1], gradients={"logit_bit": None})
    read = History.from_json(history.to_json())
    assert [r.layers[name].gradients["logit_bit"] for r in read.epochs] == [None, 1e-4]


# Any values of the right types. Settings are as in a real run: they are checked where they are made.
histories = st.builds(History, settings=st.just(runs.good_run(1).settings))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(histories)
def test_any_history_is_read_as_it_was_written(tmp_path_factory, history):
    path = tmp_path_factory.getbasetemp() / f"history-{os.getpid()}.json"
    assert same(through_file(history, path), history)
    assert same(History.from_json(history.to_json()), history)


# What is not a history


def as_json() -> dict[str, Any]:
    """The whole run as JSON has it, but for settings and metrics, which may be anything."""
    history = json.loads(json.dumps(whole_run(1).to_json() | {"settings": {}}))
    history["compressed"] |= {"packed_settings": {}, "packed_metrics": {}}
    return history


Place = tuple[str | int, ...]


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Every place in the JSON, from the whole to each number and word."""
    yield here
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(item, (*here, key))


def at(value: Any, place: Place) -> Any:
    for key in place:
        value = value[key]
    return value


def put(value: Any, place: Place, item: Any) -> Any:
    """The JSON with another item at a place."""
    if not place:
        return item
    value = copy.copy(value)
    value[place[0]] = put(value[place[0]], place[1:], item)
    return value


def in_words(place: Place) -> str:
    """A place as an error names it; items count from 1."""
    return ", ".join(["the history", *(f"item {key + 1}" if type(key) is int else key for key in place)])


PLACES = list(places(as_json()))
# What is a dict and no record may have any names.
NAMED_FREELY = ("settings", "start", "layers", "parameters", "gradients", "versions", "totals", "file",
                "packed_settings", "packed_metrics",
                "latency_seconds", "parameter_groups", *runs.compressed().latency_seconds)  # fmt: skip
RECORDS = [p for p in PLACES if isinstance(at(as_json(), p), dict) and (not p or p[-1] not in NAMED_FREELY)]


def odd_values(value: Any) -> list[Any]:
    """What cannot stand where `value` stands."""
    if isinstance(value, dict):
        return [[], "text", 3, True]
    if isinstance(value, list):
        return [None, {}, "text", 3, True]
    if isinstance(value, str):
        return [[], {}, 3, 0.5, True]
    if isinstance(value, bool):
        return [None, [], {}, 0, 1.0, "true"]
    if isinstance(value, int):
        return [None, [], {}, 0.5, 3.0, "3", True]
    return [[], {}, "0.5", "", "NaN", "infinity", True, 2**60]


def refusal(value: Any) -> str:
    with pytest.raises(ValueError) as error:
        History.from_json(value)
    return str(error.value)


def test_a_value_of_another_type_is_refused_with_its_place():
    good = as_json()
    assert len(PLACES) > 200
    for place in PLACES:
        for odd in odd_values(at(good, place)):
            if odd is None and "file" in place and place[-1] in ("structured_macs", "unstructured_macs"):
                continue  # a file does not tell the wiring of every network
            sentence = refusal(put(good, place, odd))
            assert sentence.startswith(f"{in_words(place)} is {str(odd)!r}; expected "), sentence


def test_a_record_with_a_field_too_many_or_too_few_is_refused_with_its_place_and_the_fields_name():
    good = as_json()
    assert len(RECORDS) > 20
    for place in RECORDS:
        record = at(good, place)
        fault = f"{in_words(place)} has too many or too few fields"
        for name in record:
            fewer = {key: value for key, value in record.items() if key != name}
            assert refusal(put(good, place, fewer)) == f"{fault} ({name})"
        assert refusal(put(good, place, record | {"unheard_of": 1})) == f"{fault} (unheard_of)"


def test_much_that_is_odd_is_cut_short():
    assert len(refusal({f"field {i}": i for i in range(100)})) < 120
    assert len(refusal(as_json() | {"threads": "x" * 10_000})) < 120


@pytest.mark.parametrize("value", [None, [], "text", 3, 0.5, True])
def test_what_is_no_mapping_is_no_history(value):
    assert refusal(value) == f"the history is {str(value)!r}; expected History"


def test_names_that_are_not_text_are_refused():
    """A checkpoint's dicts may have any keys, where JSON's have text alone."""
    assert refusal(as_json() | {"versions": {1: "2.9.0"}}).startswith("the history, versions is ")


any_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@quick
@given(st.sampled_from(PLACES), any_json)
def test_whatever_stands_anywhere_it_is_read_or_refused_in_one_sentence(place, value):
    try:
        assert isinstance(History.from_json(put(as_json(), place, value)), History)
    except ValueError as error:
        assert str(error).startswith("the history")


# Made from a run


class Fixed(nn.Module):
    """A quantizer that trains nothing."""

    def forward(self, w: Tensor) -> Tensor:
        return w

    def get_bitwidth(self) -> Tensor:
        return torch.tensor([5.0])


class Scaled(Fixed):
    """A quantizer with three trained numbers in one parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = nn.Parameter(torch.tensor([1.0, 2.0, 6.0]))
        self.not_trained = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, w: Tensor) -> Tensor:
        return w * (self.scales.sum() / 9)


def network(kind: type[nn.Module] = DeadZoneLDZCompander, **kwargs: Any) -> tuple[ResNet, list[str]]:
    torch.manual_seed(0)
    model = ResNet(1)
    return model, attach_weight_quantizers(model, STEM_AND_CLASSIFIER, kind, kwargs)


def begun(
    model: ResNet, quantized: list[str], processes: Processes | None = None, precision: str = "bf16"
) -> History:
    chosen = Settings(epochs=2, precision=precision, output_dir=Path("somewhere"))
    cpu = torch.device("cpu")
    dense = count_network(model)
    return new_history(chosen, random_dataset(12, test=5), cpu, processes or Processes(), model, dense)


@pytest.mark.parametrize("emulated", [True, False])
def test_a_new_history_says_whether_the_precision_asked_for_is_emulated(monkeypatch, emulated):
    monkeypatch.setattr(history, "emulates_bf16", lambda device: emulated)
    assert begun(*network()).emulates_bf16 == emulated
    assert not begun(*network(), precision="float32").emulates_bf16


def test_a_new_history_says_what_runs_on_what_with_which_data():
    history = begun(*network())
    assert history.settings == Settings(epochs=2, precision="bf16", output_dir=Path("somewhere")).to_json()
    assert list(history.versions) == ["python", "torch", "numpy", "matplotlib"]
    assert torch.__version__.startswith(history.versions["torch"])
    assert (history.threads, history.processes) == (torch.get_num_threads(), 1)
    assert history.device.startswith("cpu") and "processes" not in history.device
    assert history.precision.startswith("bf16 in the layers")
    data = history.data
    assert (data.name, data.source, data.synthetic) == ("random", "made here", True)
    assert (data.train_images, data.test_images) == (12, 5)
    assert history.epochs == history.resumed == history.verdict == []
    assert history.stopped is history.final is history.compressed is None and not history.not_finite


def test_the_commit_is_this_programs_whatever_repository_the_environment_names(tmp_path, monkeypatch):
    here = commit_of_program()
    for folder in (tmp_path / "program", tmp_path / "other"):
        subprocess.run(["git", "init", "-q", folder], check=True)
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        message = ["commit", "-q", "--allow-empty", "-m", folder.name]
        subprocess.run(["git", "-C", folder, *who, *message], check=True)
    monkeypatch.setattr(history, "ROOT", tmp_path / "program")
    own = commit_of_program()
    # As git exports them to its hooks.
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other" / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path / "other"))
    head = tmp_path / "program" / ".git" / (tmp_path / "program" / ".git" / "HEAD").read_text()[5:].strip()
    assert own == commit_of_program() == head.read_text().strip() != here


def test_several_processes_are_said_beside_the_device():
    history = begun(*network(), Processes(rank=1, count=3))
    assert history.processes == 3 and history.device.endswith(", 3 processes")


def test_each_layer_is_either_quantized_or_in_full_precision():
    model, quantized = network()
    history = begun(model, quantized)
    assert history.full_precision == ["conv1", "linear"]
    assert history.quantized == list(history.start) == quantized
    assert len(quantized) == 6  # two convolutions in each of three blocks


def test_the_start_values_are_those_before_training_and_stay():
    model, quantized = network(init_bit_logit=0.5, init_deadzone_logit=-1.25, max_bits=10)
    history = begun(model, quantized)
    with torch.no_grad():
        for quantizer in quantizers(model).values():
            quantizer.logit_bit.fill_(9.0)
    learned = 2 + 8 * math.tanh(0.5)
    for start in history.start.values():
        assert start.parameters == {"logit_bit": 0.5, "logit_dz": -1.25}
        assert start.learned_bits == pytest.approx(learned, rel=1e-6)
    assert history.parameter_groups == {"logit_bit": "bit", "logit_dz": "deadzone"}


def test_a_quantizer_that_trains_nothing_has_start_values_without_parameters():
    model, quantized = network(Fixed)
    history = begun(model, quantized)
    assert list(history.start.values()) == [LayerStart({}, 5.0)] * len(quantized)
    assert history.parameter_groups == {}
    for layer in layer_records(model, Evaluator(model).evaluate(model).count).values():
        assert layer.parameters == layer.gradients == {} and (layer.bits, layer.learned_bits) == (5, 5.0)
    assert same(History.from_json(history.to_json()), history)


def test_what_a_quantizer_does_not_train_is_in_no_record():
    model, quantized = network(learnable_bit=False)
    history = begun(model, quantized)
    for start in history.start.values():
        assert start.parameters == {"logit_dz": 3.0}


def test_a_parameter_of_several_numbers_is_recorded_as_their_mean_and_its_gradients_norm():
    model, quantized = network(Scaled)
    history = begun(model, quantized)
    assert history.start[quantized[0]] == LayerStart({"scales": 3.0}, 5.0)
    count = Evaluator(model).evaluate(model).count
    assert layer_records(model, count)[quantized[0]].gradients == {"scales": None}
    quantizers(model)[quantized[0]].scales.grad = torch.tensor([2.0, -3.0, 6.0])
    assert layer_records(model, count)[quantized[0]].gradients == {"scales": 7.0}


def test_an_epochs_record_holds_the_numbers_given_and_the_counts_of_the_network():
    model, quantized = network(init_bit_logit=0.4, init_deadzone_logit=0.5)
    with torch.no_grad():
        model.layer2[0].conv1.parametrizations.weight.original[:3] = 0
    for i, quantizer in enumerate(quantizers(model).values()):
        quantizer.logit_bit.grad = torch.tensor([0.5 + i])
    compression = Evaluator(model).evaluate(model)
    given = {"loss": 2.5, "cross_entropy": 2.0, "penalty": 50.0, "coefficient": 0.01, "accuracy": 0.25}
    record = epoch_record(4, model, compression, seconds=1.5, **given)
    assert record.epoch == 4 and record.seconds == 1.5
    assert {name: getattr(record, name) for name in given} == given
    count = compression.count
    assert record.unstructured_sparsity == count.unstructured_sparsity > 0
    assert record.structured_sparsity == count.structured_sparsity > 0
    assert (record.learned_bits, record.bits) == (count.mean_learned_bits, count.mean_bits)
    assert list(record.layers) == quantized
    by_name = {layer.name: layer for layer in count.layers}
    for i, (name, layer) in enumerate(record.layers.items()):
        counted = by_name[name]
        for number in ("bits", "learned_bits", "weights", "zero_weights", "filters", "zero_filters",
                       "alive_channels", "constant_channels", "null_channels"):  # fmt: skip
            assert getattr(layer, number) == getattr(counted, number), (name, number)
        assert layer.gradients == {"logit_bit": 0.5 + i, "logit_dz": None}
    assert record.layers["layer2.0.conv1"].zero_filters == 3


def test_the_final_counts_are_those_of_the_compression_to_the_last_field():
    model, _ = network(init_deadzone_logit=0.5)
    compression = Evaluator(model).evaluate(model)
    final = final_counts(compression)
    assert isinstance(final, FinalCounts)
    for name in ("structured_bops_ratio", "unstructured_bops_ratio", "structured_mac_ratio",
                 "unstructured_mac_ratio", "structured_ceiling", "unstructured_ceiling"):  # fmt: skip
        assert getattr(final, name) == getattr(compression, name) >= 1, name
    assert final.totals == {name: compression.count.total(name) for name in TOTALS}
    assert final.count == compression.count
    assert final.unstructured_sparsity == compression.count.unstructured_sparsity > 0
