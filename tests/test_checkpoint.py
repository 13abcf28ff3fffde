"""Checkpoints: what comes back, what is refused by its name, and which one is used where some are damaged."""

import hashlib
import io
import json
import math
import pickle
import random
import stat
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import runs
import torch
from folders import names, silent
from same import assert_same
from torch import nn

from experiments import checkpoint
from experiments.checkpoint import (
    Checkpoint,
    check_settings,
    checkpoint_path,
    describe_differences,
    find_checkpoint,
    last_checkpoint,
    load_checkpoint,
    restore,
    resume,
    save_checkpoint,
)
from experiments.distributed import ALONE
from experiments.draws import random_states
from experiments.files import OutputError
from experiments.finish import checkpoint_is_the_runs
from experiments.history import Origin, Resumption
from experiments.settings import Settings, flag
from src.quantizer import DeadZoneLDZCompander
from utils_quantization import attach_weight_quantizers


def small_model(seed: int = 0) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer and a batch norm, and AdamW with two groups, after three steps."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "lr": 0.5}]
    optimizer = torch.optim.AdamW(groups)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).square().sum().backward()
        optimizer.step()
    return model, optimizer


def made(epochs: int, settings: Settings | None = None) -> Checkpoint:
    model, optimizer = small_model()
    history = runs.good_run(epochs)
    history.settings = (settings or Settings()).to_json()
    history.resumed = [Resumption(1, ["a", "b"])]
    return Checkpoint(history, model.state_dict(), optimizer.state_dict()["state"], random_states())


def with_digest(content: bytes) -> bytes:
    return content + hashlib.sha256(content).digest()


def written(state: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return with_digest(buffer.getvalue())


# There and back


def test_what_is_loaded_is_what_was_saved_to_the_last_bit(tmp_path):
    saved = made(2)
    save_checkpoint(tmp_path, saved)
    loaded = load_checkpoint(checkpoint_path(tmp_path, 2))
    for field in fields(Checkpoint):
        # torch gives a state_dict back as the OrderedDict that it is, without its version marks.
        assert_same(getattr(loaded, field.name), getattr(saved, field.name))
    assert loaded.epochs == 2 and names(tmp_path) == ["checkpoint_0002.pt"]


def test_torch_reads_the_file_by_itself_as_tensors_and_plain_values_although_a_digest_follows(tmp_path):
    saved = made(1)
    save_checkpoint(tmp_path, saved)
    path = checkpoint_path(tmp_path, 1)
    state = torch.load(path, weights_only=True)
    assert_same(state["model"], saved.model)
    assert set(state) == {"version", *(field.name for field in fields(Checkpoint))}
    content = path.read_bytes()
    assert hashlib.sha256(content[:-32]).digest() == content[-32:]


def test_model_optimizer_and_random_numbers_go_on_from_it_as_if_nothing_had_been(tmp_path):
    model, optimizer = small_model()

    def go_on(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(4, 3)).square().sum().backward()
            optimizer.step()
        return [value.clone() for value in model.state_dict().values()]

    save_checkpoint(tmp_path, made(1))  # the same model, and torch's generator as it is now
    expected = go_on(model, optimizer)
    other, its_optimizer = small_model(seed=1)
    rates = [group["lr"] for group in its_optimizer.param_groups]
    restore(load_checkpoint(checkpoint_path(tmp_path, 1)), other, its_optimizer)
    assert [group["lr"] for group in its_optimizer.param_groups] == rates
    assert_same(go_on(other, its_optimizer), expected)


def test_a_run_that_is_resumed_again_keeps_its_earlier_resumptions():
    checkpoint, now = made(2), runs.good_run(20)
    now.settings = checkpoint.history.settings
    resume(checkpoint, now, *small_model())
    assert now.resumed == [Resumption(1, ["a", "b"]), Resumption(2, [])]
    assert now.epochs == checkpoint.history.epochs


def test_only_the_last_two_are_kept_and_nothing_else_is_touched(tmp_path):
    (tmp_path / "history.json").write_text("other")
    for epochs in range(1, 5):
        save_checkpoint(tmp_path, made(epochs))
        last = [f"checkpoint_{i:04d}.pt" for i in range(max(1, epochs - 1), epochs + 1)]
        assert names(tmp_path) == [*last, "history.json"]


def test_later_ones_that_could_not_be_read_are_dropped_once_their_epoch_is_done_again(tmp_path):
    for epochs in (3, 4):
        save_checkpoint(tmp_path, made(epochs))
    checkpoint_path(tmp_path, 4).write_bytes(b"damaged")
    checkpoint_path(tmp_path, 5).write_bytes(b"damaged")
    save_checkpoint(tmp_path, made(4))
    assert names(tmp_path) == ["checkpoint_0003.pt", "checkpoint_0004.pt"]
    assert last_checkpoint(tmp_path, silent).epochs == 4


def test_one_that_cannot_be_written_leaves_those_before_it(tmp_path, monkeypatch):
    for epochs in (1, 2):
        save_checkpoint(tmp_path, made(epochs))
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OutputError, match=r"checkpoint_0003\.pt: No space left"):
            save_checkpoint(tmp_path, made(3))
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


# Damage


@pytest.fixture(scope="module")
def intact(tmp_path_factory) -> bytes:
    folder = tmp_path_factory.mktemp("intact")
    save_checkpoint(folder, made(1))
    return checkpoint_path(folder, 1).read_bytes()


def assert_refused(content: bytes) -> None:
    class InMemory:  # thousands of files on a disk take a minute
        @staticmethod
        def read_bytes() -> bytes:
            return content

        @staticmethod
        def stat() -> SimpleNamespace:
            return SimpleNamespace(st_mode=stat.S_IFREG, st_size=len(content))

    with pytest.raises(ValueError, match="truncated or altered"):
        load_checkpoint(cast(Path, InMemory()))


def test_truncated_at_any_length_it_is_refused(intact):
    for length in range(len(intact)):
        assert_refused(intact[:length])


def test_with_any_byte_altered_it_is_refused(intact):
    changes = random.Random(0)
    for place in range(len(intact)):
        altered = bytearray(intact)
        altered[place] ^= changes.randrange(1, 256)
        assert_refused(bytes(altered))


def test_with_bytes_behind_its_end_it_is_refused(intact, tmp_path):
    (tmp_path / "a.pt").write_bytes(intact + b"\0")
    with pytest.raises(ValueError, match="truncated or altered"):
        load_checkpoint(tmp_path / "a.pt")


class Foreign:
    """What torch's reader does not let in."""


FOREIGN = {
    "nothing": with_digest(b""),
    "no file of torch's": with_digest(b"text" * 100),
    "a pickle": with_digest(pickle.dumps([1, 2])),
    "not a dictionary": written([1, 2]),
    "without a version": written({"model": {}}),
    "with a part missing": written({"version": checkpoint.VERSION, "model": {}}),
    "with a part too many": written({"version": checkpoint.VERSION, "more": 1} | vars(made(1))),
    "with an object of a foreign class": written({"version": checkpoint.VERSION + 1, "model": Foreign()}),
}


@pytest.mark.parametrize("kind", FOREIGN)
@pytest.mark.filterwarnings("error")
def test_a_whole_file_of_something_else_is_refused_with_a_few_words(kind, tmp_path):
    (tmp_path / "a.pt").write_bytes(FOREIGN[kind])
    with pytest.raises(ValueError) as error:
        load_checkpoint(tmp_path / "a.pt")
    assert "no checkpoint of this program" in str(error.value) and "\n" not in str(error.value)


def test_a_version_that_is_a_text_is_quoted_and_cut(tmp_path):
    for version, shown in (("5", "version '5', and"), ("x\n" * 300, "version 'x")):
        (tmp_path / "a.pt").write_bytes(written({"version": version}))
        with pytest.raises(ValueError, match=shown) as error:
            load_checkpoint(tmp_path / "a.pt")
        assert "\n" not in str(error.value) and len(str(error.value)) < 150


def test_a_version_from_the_future_is_refused_by_its_number(tmp_path):
    (tmp_path / "a.pt").write_bytes(written({"version": checkpoint.VERSION + 1, "what": "may come"}))
    with pytest.raises(
        ValueError, match=f"version {checkpoint.VERSION + 1}.*reads version {checkpoint.VERSION}"
    ):
        load_checkpoint(tmp_path / "a.pt")


# Which one is used


def test_the_last_one_is_used_without_a_word(tmp_path):
    for epochs in (9, 10):
        save_checkpoint(tmp_path, made(epochs))
    assert last_checkpoint(tmp_path, silent).epochs == 10


def test_where_there_is_none_that_is_no_error(tmp_path):
    assert last_checkpoint(tmp_path, silent) is None


DAMAGE = {
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1000]),
    "empty": lambda path: path.write_bytes(b""),
    "from the future": lambda path: path.write_bytes(written({"version": checkpoint.VERSION + 1})),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a link that leads nowhere": lambda path: (path.unlink(), path.symlink_to("nowhere")),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_where_the_last_is_damaged_the_one_before_it_is_used_and_that_is_said(kind, tmp_path):
    for epochs in (6, 7):
        save_checkpoint(tmp_path, made(epochs))
    DAMAGE[kind](checkpoint_path(tmp_path, 7))
    said: list[str] = []
    assert last_checkpoint(tmp_path, said.append).epochs == 6
    (sentence,) = said
    assert str(checkpoint_path(tmp_path, 7)) in sentence and "the one before" in sentence
    assert "\n" not in sentence


def test_where_all_are_damaged_one_sentence_says_what_can_be_done(tmp_path):
    for epochs in (6, 7):
        checkpoint_path(tmp_path, epochs).write_bytes(b"damaged")
    said: list[str] = []
    with pytest.raises(OutputError) as error:
        last_checkpoint(tmp_path, said.append)
    assert str(tmp_path) in str(error.value) and "leave --resume out" in str(error.value)
    assert "\n" not in str(error.value) and len(said) == 2


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        OSError(24, "Too many open files"),
        OSError(5, "Input/output error"),
        PermissionError(13, "Permission denied"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_pass_is_no_damage(error, tmp_path, monkeypatch):
    def lacking(*_: object, **__: object) -> None:
        raise error

    for epochs in (6, 7):
        save_checkpoint(tmp_path, made(epochs))
    if isinstance(error, OSError):
        monkeypatch.setattr(Path, "read_bytes", lacking)
    else:
        monkeypatch.setattr(torch, "load", lacking)
    with pytest.raises(OutputError if isinstance(error, OSError) else type(error)):
        last_checkpoint(tmp_path, silent)


def test_a_file_whose_number_has_other_zeros_is_the_users(tmp_path):
    for epochs in (1, 2):
        save_checkpoint(tmp_path, made(epochs))
        (tmp_path / f"checkpoint_0000{epochs}.pt").write_text("mine")
    (tmp_path / "checkpoint_00007.pt").write_text("mine")
    assert last_checkpoint(tmp_path, silent).epochs == 2
    save_checkpoint(tmp_path, made(3))
    assert [n for n in names(tmp_path) if "_0000" in n] == [f"checkpoint_0000{n}.pt" for n in (1, 2, 7)]


# Which run may go on from it

OTHER = {
    "preset": "plan", "batch_size": 7, "seed": 7, "device": "cpu", "threads": 7, "precision": "bf16",
    "data": "synthetic", "limit_train": 7, "limit_test": 7, "exclude_layers": ("linear",),
    "sparsity_weight": 7.0, "penalty_on": "quantized", "group_weights": "equal",
    "sparsity_delay": 7.0, "sparsity_ramp": 7.0, "keep_dead": False,
    "quantizer": "own_quantizers:LSQ", "max_bits": 7, "fixed_bits": 7,
    "batch_norm_batches": 7, "rate_warmup": 7.0, "weights_lr": 7.0, "bit_lr": 7.0, "deadzone_lr": 7.0,
    "weights_decay": 7.0, "bit_decay": 7.0, "deadzone_decay": 7.0, "beta2": 0.7, "pace_steps": 7,
    "model": "resnet32", "crop_padding": 7,
}  # fmt: skip
FREE = {"epochs": 21, "data_dir": Path("a b"), "output_dir": Path("c"), "resume": True, "preflight": "off",
        "figure_format": "pdf", "rehearse": True}  # fmt: skip


def saved_settings(tmp_path: Path) -> dict[str, Any]:
    """Those of the defaults, as they come back from a file."""
    save_checkpoint(tmp_path, made(1))
    return load_checkpoint(checkpoint_path(tmp_path, 1)).history.settings


def test_every_setting_is_here():
    assert {*OTHER, *FREE} == {field.name for field in fields(Settings)}


@pytest.mark.parametrize("name", OTHER)
@pytest.mark.parametrize("to_other", [True, False])
def test_a_setting_that_differs_is_refused_by_its_flag_with_both_values(name, to_other, tmp_path):
    defaults, other = Settings(), replace(Settings(), **{name: OTHER[name]})
    saved, now = (defaults, other) if to_other else (other, defaults)
    save_checkpoint(tmp_path, made(1, saved))
    with pytest.raises(ValueError) as error:
        check_settings(load_checkpoint(checkpoint_path(tmp_path, 1)).history.settings, now)
    sentence = str(error.value)
    assert sentence.startswith(f"--resume: {flag(name)} is ") and "\n" not in sentence
    for value, none in ((getattr(saved, name), "began without it"), (getattr(now, name), "not given")):
        shown = " ".join(value) if isinstance(value, tuple) else value
        assert (none if shown is None else str(shown)) in sentence


@pytest.mark.parametrize("name", FREE)
def test_the_free_settings_may_differ(name, tmp_path):
    check_settings(saved_settings(tmp_path), replace(Settings(), **{name: FREE[name]}))


def test_the_same_settings_are_taken(tmp_path):
    check_settings(saved_settings(tmp_path), Settings())


def test_fewer_epochs_are_refused_with_both_numbers(tmp_path):
    with pytest.raises(ValueError, match="--epochs is 19, and the run to go on with has 20"):
        check_settings(saved_settings(tmp_path), Settings(epochs=19))


def test_a_setting_that_an_older_program_did_not_have_is_refused_as_not_given(tmp_path):
    saved = {k: v for k, v in saved_settings(tmp_path).items() if k != "keep_dead"}
    with pytest.raises(ValueError, match="--keep-dead is True, and the run to go on with began without it"):
        check_settings(saved, Settings())


# What is said of what has changed


def differences(done: int, settings: Settings | None = None, **changes: Any) -> list[str]:
    """What is said of a run that is resumed after `done` of 20 epochs with these settings and changes."""
    saved, now = runs.good_run(20), runs.good_run(20)
    saved.epochs = saved.epochs[:done]
    now.settings = (settings or Settings()).to_json()
    now.data = replace(now.data, source="somewhere else", **changes.pop("data", {}))
    return describe_differences(saved, replace(now, **changes))


def test_where_nothing_has_changed_nothing_is_said():
    assert differences(1) == []


@pytest.mark.parametrize(
    "change", [{"name": "synthetic stand-in", "synthetic": True}, {"train_images": 7}, {"test_images": 7}]
)
def test_another_data_set_is_refused_by_both_names(change):
    with pytest.raises(ValueError) as error:
        differences(1, data=change)
    sentence = str(error.value)
    assert sentence.startswith("--resume: ") and "CIFAR-10" in sentence and "\n" not in sentence
    assert change.get("name", "CIFAR-10") in sentence and "give the same data" in sentence


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"versions": {"torch": "3.0.0"}}, ["torch", "2.9.0", "3.0.0"]),
        ({"device": "cpu (7 threads)"}, ["device", "2 threads", "7 threads"]),
        ({"origin": Origin(commit="abc")}, ["commit", "abc now"]),
    ],
)
def test_another_version_or_device_is_said_with_what_follows_from_it(change, words):
    (sentence,) = differences(1, **change)
    assert [word for word in [*words, "last digits may differ"] if word not in sentence] == []


def test_more_epochs_are_said_with_the_rates_that_follow():
    (sentence,) = differences(10, Settings(epochs=40))
    assert "--epochs was 20, is 40" in sentence
    # (1 + cos(pi t)) / 2 at a quarter and at a half of the way
    assert "0.8536 of their peak instead of 0.5000" in sentence
    # 98 steps an epoch: 20 epochs are the 1,960 that the pace is meant for, 40 twice as many
    assert "the quantizers' peak being 0.5000 and the weights' decay 0.7071 of what they were" in sentence
    (sentence,) = differences(10, Settings(epochs=40, pace_steps=0))
    assert "peak and" not in sentence


# What a run says of its last one


def test_the_last_checkpoint_of_a_run_is_held_against_its_records_and_its_network(tmp_path):
    saved, (model, _) = made(2), small_model()
    save_checkpoint(tmp_path, saved)
    assert checkpoint_is_the_runs(tmp_path, saved.history, model).status == "PASS"

    another, _ = small_model(seed=1)
    assert "0.weight" in checkpoint_is_the_runs(tmp_path, saved.history, another).message
    later = replace(
        saved.history, epochs=[*saved.history.epochs[:-1], replace(saved.history.epochs[-1], loss=9.0)]
    )
    assert "records" in checkpoint_is_the_runs(tmp_path, later, model).message
    checkpoint_path(tmp_path, 2).write_bytes(b"")
    assert "truncated" in checkpoint_is_the_runs(tmp_path, saved.history, model).message
    checkpoint_path(tmp_path, 2).unlink()
    missing = checkpoint_is_the_runs(tmp_path, saved.history, model)
    assert missing.status == "FAIL" and "checkpoint_0002.pt cannot be read" in missing.message


# Contents that are odd under a checksum that is right


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("optimizer", lambda state: state | {0: state[0] | {"step": "3"}}),
        ("optimizer", lambda state: state | {0: state[0] | {"exp_avg": [0.0]}}),
        ("optimizer", lambda state: state | {0: state[0] | {"exp_avg_sq": torch.zeros(7)}}),
        ("optimizer", lambda state: state | {0: {}}),
        ("optimizer", lambda state: {}),
        ("optimizer", lambda state: {0: "moments"}),
        ("optimizer", lambda state: {"first": state[0]}),
        ("model", lambda state: state | {"0.weight": "numbers"}),
        ("model", lambda state: {}),
        ("random", lambda state: state | {"cpu": "seed"}),
        ("random", lambda state: {}),
    ],
)
def test_what_is_no_state_is_refused_in_one_sentence(part, change, tmp_path):
    good = made(1)
    save_checkpoint(tmp_path, replace(good, **{part: change(getattr(good, part))}))
    model, optimizer = small_model(1)
    with pytest.raises(ValueError, match="the checkpoint of epoch 1 is not of this network") as error:
        restore(load_checkpoint(checkpoint_path(tmp_path, 1)), model, optimizer)
    assert "\n" not in str(error.value)


ODD_NUMBERS: dict[str, Any] = {
    "int8": {"model": {"0.weight": torch.ones(2, 3, dtype=torch.int8)}},
    "float64": {"model": {"0.weight": torch.ones(2, 3, dtype=torch.float64)}},
    "NaN": {"model": {"0.weight": torch.full((2, 3), torch.nan)}},
    "variance": {"model": {"1.running_var": torch.full((2,), -1.0)}},
    "counter": {"model": {"1.num_batches_tracked": torch.tensor(-99)}},
    "moment": {"exp_avg": torch.full((2, 3), torch.nan)},
    "square": {"exp_avg_sq": torch.full((2, 3), -1.0)},
    "NaN square": {"exp_avg_sq": torch.full((2, 3), torch.nan)},
    "step": {"step": torch.tensor(-5.0)},
}


@pytest.mark.parametrize("kind", ODD_NUMBERS)
def test_numbers_that_no_training_leaves_are_refused(kind):
    good, odd = made(1), ODD_NUMBERS[kind]
    moments = {k: v for k, v in odd.items() if k != "model"}
    optimizer = good.optimizer | {0: good.optimizer[0] | moments}
    bad = replace(good, model=good.model | odd.get("model", {}), optimizer=optimizer)
    with pytest.raises(ValueError, match="the checkpoint of epoch 1 is not of this network"):
        restore(bad, *small_model(1))


def test_a_quantized_weight_without_moments_is_refused():
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    attach_weight_quantizers(model, [], DeadZoneLDZCompander, {})
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    state = {0: optimizer.state_dict()["state"][0]}
    with pytest.raises(ValueError, match="holds no moments of 0"):
        restore(Checkpoint(runs.good_run(1), model.state_dict(), state, random_states()), model, optimizer)


def test_infinite_masks_frozen_parameters_and_large_gradients_go_on():
    def masked() -> tuple[nn.Module, torch.optim.Optimizer]:
        model, _ = small_model()
        model.register_buffer("mask", torch.full((2,), -torch.inf))
        model[1].bias.requires_grad_(False)
        return model, torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)

    model, optimizer = masked()
    (1e30 * model(torch.randn(4, 3)).square().sum()).backward()
    optimizer.step()
    state = optimizer.state_dict()["state"]
    state[0]["exp_avg_sq"].fill_(torch.inf)
    restore(Checkpoint(runs.good_run(1), model.state_dict(), state, random_states()), *masked())


@pytest.mark.parametrize(
    "change",
    [
        lambda history: runs.changed(history, {2: {"epoch": 7}}),
        lambda history: replace(history, epochs=history.epochs[:1] * 2),
        lambda history: replace(history, epochs=history.epochs[:1]),
        lambda history: replace(history, epochs=history.epochs * 4),
        lambda history: runs.changed(history, {2: {"accuracy": 5.0}}),
        lambda history: runs.changed(history, {2: {"accuracy": math.nan}}),
        lambda history: runs.changed(history, {1: {"layers": {}}}),
        lambda history: replace(history, start={}),
    ],
    ids=["7", "twice", "too few", "too many", "accuracy", "NaN", "layers", "start"],
)
def test_records_that_no_run_writes_are_taken_for_damage(change, tmp_path):
    good, path = made(2), checkpoint_path(tmp_path, 2)
    state = vars(replace(good, history=change(good.history))) | {"version": checkpoint.VERSION}
    path.write_bytes(written(state | {"history": json.dumps(state["history"], default=vars)}))
    with pytest.raises(ValueError, match="is no checkpoint of this program") as error:
        load_checkpoint(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("planned", [0, 1])
def test_more_epochs_than_the_run_had_are_refused(planned, tmp_path):
    good = made(2)
    good.history.settings |= {"epochs": planned}
    save_checkpoint(tmp_path, good)
    with pytest.raises(ValueError, match=f"the checkpoint has 2 epochs of a run of {planned}"):
        find_checkpoint(Settings(output_dir=tmp_path), ALONE, silent)


def test_other_quantized_layers_are_refused():
    history = runs.good_run(20)
    history.quantized = []
    with pytest.raises(ValueError, match="other layers are quantized"):
        resume(made(1), history, *small_model())


@pytest.mark.parametrize("epochs", ["twenty", None, 20.5, [20]])
def test_epochs_that_are_no_number_are_refused_in_one_sentence(epochs, tmp_path):
    good = made(1)
    good.history.settings |= {"epochs": epochs}
    save_checkpoint(tmp_path, good)
    found = load_checkpoint(checkpoint_path(tmp_path, 1))
    with pytest.raises(ValueError, match="for --epochs; expected a number"):
        check_settings(found.history.settings, Settings())


def test_a_checkpoint_of_many_gigabytes_is_not_read(tmp_path):
    path = checkpoint_path(tmp_path, 1)
    with path.open("wb") as file:
        file.truncate(30 << 30)
    with pytest.raises(ValueError, match=r"has 32,212,254,720 bytes; expected"):
        load_checkpoint(path)
