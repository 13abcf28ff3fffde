"""The images: what a batch holds, what the stand-in is like, and which data set a choice gives."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision.transforms.functional as vision
from hypothesis import given, settings
from hypothesis import strategies as st
from random_images import random_dataset
from torch import Tensor

from experiments import data
from experiments.cifar import CIFARS, CifarImages, NoCifarError, how_to_bring_it
from experiments.data import (
    DataError,
    Dataset,
    TestBatches,
    TrainBatches,
    draws,
    load_dataset,
    synthetic_dataset,
)
from experiments.distributed import Processes

# Batches.


def augmented_alone(image: Tensor, down: int, right: int, flip: int, padding: int = 4) -> Tensor:
    """One image through torchvision's transforms, as the plan's loader does it."""
    image = vision.crop(vision.pad(image, padding), down, right, 32, 32)
    image = vision.hflip(image) if flip else image
    return vision.normalize(vision.convert_image_dtype(image, torch.float32), data.MEAN, data.STD)


@settings(max_examples=20, deadline=None)
@given(
    count=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    seed=st.integers(-(2**63), 2**64),
    epoch=st.integers(0, 10**6),
    padding=st.integers(0, 8),
)
def test_a_batch_is_what_torchvision_makes_of_each_image_alone(
    count: int, batch_size: int, seed: int, epoch: int, padding: int
) -> None:
    dataset = random_dataset(count)
    order, down, right, flips = (drawn.tolist() for drawn in draws(count, seed, epoch, padding))
    expected = [
        augmented_alone(dataset.train_images[order[i]], down[i], right[i], flips[i], padding)
        for i in range(count)
    ]
    batches = list(TrainBatches(dataset, batch_size, seed, "cpu", crop_padding=padding).epoch(epoch))
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), torch.stack(expected))
    assert torch.cat([labels for _, labels in batches]).tolist() == dataset.train_labels[order].tolist()


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(1, 50))
def test_every_image_comes_once_an_epoch_and_the_last_partial_batch_is_kept(
    count: int, batch_size: int
) -> None:
    dataset = random_dataset(count)
    batches = TrainBatches(replace(dataset, train_labels=torch.arange(count)), batch_size, 0, "cpu")
    labels = [labels for _, labels in batches.epoch(0)]
    assert sorted(torch.cat(labels).tolist()) == list(range(count))
    assert len(labels) == len(batches)
    assert [len(batch) for batch in labels[:-1]] == [batch_size] * (len(batches) - 1)
    assert [len(batch) for batch in labels] == batches.sizes


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 40), batch_size=st.integers(3, 50), processes=st.integers(2, 3))
def test_the_shards_of_all_ranks_together_are_the_batches_of_one_process(
    count: int, batch_size: int, processes: int
) -> None:
    dataset = random_dataset(count, test=count)

    def together(make: Callable[[Processes], Iterable[tuple[Tensor, Tensor]]]) -> list[tuple[Tensor, Tensor]]:
        shards = zip(*(make(Processes(rank, processes)) for rank in range(processes)), strict=True)
        return [tuple(map(torch.cat, zip(*parts, strict=True))) for parts in shards]

    def train(which: Processes) -> Iterable[tuple[Tensor, Tensor]]:
        return TrainBatches(dataset, batch_size, 0, "cpu", which).epoch(0)

    for (images, labels), (sharded_images, sharded_labels) in zip(
        train(Processes()), together(train), strict=True
    ):
        assert torch.equal(images, sharded_images) and torch.equal(labels, sharded_labels)
    shards = [TestBatches(dataset, "cpu", processes=Processes(r, processes)) for r in range(processes)]
    assert torch.equal(torch.cat([shard.labels for shard in shards]), dataset.test_labels)
    assert max(len(s.labels) for s in shards) - min(len(s.labels) for s in shards) <= 1


def test_images_are_float32_in_channels_last_memory_and_labels_int64() -> None:
    dataset = random_dataset(5, test=5)
    for batches in (TrainBatches(dataset, 4, 0, "cpu").epoch(0), TestBatches(dataset, "cpu", 4)):
        for images, labels in batches:
            assert images.dtype == torch.float32 and labels.dtype == torch.int64
            assert images.shape == (len(labels), 3, 32, 32)
            assert images.is_contiguous(memory_format=torch.channels_last)


def test_an_epoch_can_be_made_again_without_the_epochs_before_it() -> None:
    dataset = random_dataset(20)
    used = TrainBatches(dataset, 8, 3, "cpu")
    for epoch in range(3):
        next(used.epoch(epoch))
    again = TrainBatches(dataset, 8, 3, "cpu").epoch(3)
    for (images, labels), (images_again, labels_again) in zip(used.epoch(3), again, strict=True):
        assert torch.equal(images, images_again) and torch.equal(labels, labels_again)


def test_draws_differ_between_epochs_and_seeds_and_between_a_seed_and_an_epoch() -> None:
    orders = [tuple(draws(50, seed, epoch)[0].tolist()) for seed in range(4) for epoch in range(4)]
    assert len(set(orders)) == 16


def test_draws_neither_read_nor_move_torchs_own_generator() -> None:
    torch.manual_seed(1)
    first, state = draws(10, 0, 0), torch.get_rng_state()
    torch.manual_seed(2)
    second = draws(10, 0, 0)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("padding", [0, 2, 4])
def test_draws_are_made_on_the_cpu_and_cover_every_offset_and_both_flips_evenly(padding: int) -> None:
    offsets = 2 * padding + 1
    _, down, right, flips = drawn = draws(1000 * offsets**2, 0, 0, padding)
    assert all(values.device.type == "cpu" for values in drawn)
    windows = torch.bincount((down * offsets + right) * 2 + flips)
    assert len(windows) == 2 * offsets**2
    assert windows.min() > 400 and windows.max() < 600  # 500 expected, deviation 22


def test_test_batches_are_the_images_as_they_are_in_order() -> None:
    dataset = random_dataset(1, test=7)
    batches = TestBatches(dataset, "cpu", batch_size=3)
    expected = torch.stack([augmented_alone(image, 4, 4, 0) for image in dataset.test_images])
    assert [len(labels) for _, labels in batches] == [3, 3, 1] and len(batches) == 3
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), expected)
    assert torch.equal(torch.cat([labels for _, labels in batches]), dataset.test_labels)


def test_a_batch_size_below_one_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="batch_size is 0"):
        TrainBatches(random_dataset(1), 0, 0, "cpu")
    with pytest.raises(ValueError, match="batch_size is -1"):
        TestBatches(random_dataset(1), "cpu", -1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_gets_the_same_batches_and_walking_them_never_waits_for_it() -> None:
    dataset = random_dataset(50)
    on_gpu = TrainBatches(dataset, 16, 0, "cuda").epoch(0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        from_gpu = list(on_gpu)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for (images, labels), (gpu_images, gpu_labels) in zip(
        TrainBatches(dataset, 16, 0, "cpu").epoch(0), from_gpu, strict=True
    ):
        torch.testing.assert_close(gpu_images.cpu(), images)
        assert torch.equal(gpu_labels.cpu(), labels)


# The stand-in.


@pytest.fixture(scope="module")
def stand_in() -> Dataset:
    return synthetic_dataset("for the tests")


def test_the_stand_in_has_its_shape_and_the_ten_classes_in_equal_parts(stand_in: Dataset) -> None:
    assert stand_in.train_images.shape == (20_000, 3, 32, 32) and stand_in.train_images.dtype == torch.uint8
    assert stand_in.test_images.shape == (4_000, 3, 32, 32) and stand_in.test_labels.dtype == torch.int64
    assert torch.bincount(stand_in.train_labels).tolist() == [2_000] * 10
    assert torch.bincount(stand_in.test_labels).tolist() == [400] * 10
    assert torch.bincount(stand_in.train_labels[:100]).tolist() == [10] * 10


def test_the_stand_in_is_the_same_whatever_the_seed_of_the_run(stand_in: Dataset) -> None:
    torch.manual_seed(12345)
    again = synthetic_dataset("once more")
    assert torch.equal(again.train_images, stand_in.train_images)
    assert torch.equal(again.test_images, stand_in.test_images)


def test_the_stand_in_fills_the_range_of_pixels_and_has_no_image_twice(stand_in: Dataset) -> None:
    pixels = stand_in.test_images.float()
    assert 100 < pixels.mean() < 155 and 40 < pixels.std() < 75
    assert len(torch.unique(stand_in.train_images.flatten(1)[:, ::97], dim=0)) == 20_000


def test_the_stand_in_cannot_be_told_by_colour_or_by_a_mean_image_alone(stand_in: Dataset) -> None:
    """The nearest class mean, the easiest rule there is, must stay far from solving it."""
    train, test = stand_in.train_images.float().flatten(1), stand_in.test_images.float().flatten(1)
    means = torch.stack([train[stand_in.train_labels == label].mean(0) for label in range(10)])
    accuracy = (torch.cdist(test, means).argmin(1) == stand_in.test_labels).float().mean()
    assert 0.1 < accuracy < 0.5


# Choices and limits.


DATA_DIR = Path("the folder of the data")


@pytest.fixture(autouse=True)
def a_small_stand_in(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "stand_in" not in request.fixturenames:
        monkeypatch.setattr(data, "SYNTHETIC_TRAIN", 60)
        monkeypatch.setattr(data, "SYNTHETIC_TEST", 20)


def have_cifar10(monkeypatch: pytest.MonkeyPatch, outcome: CifarImages | Exception) -> list[tuple[Any, ...]]:
    """Replace the loading of CIFAR-10 by its outcome; returns a list of the arguments it is called with."""
    calls = []

    def load(*arguments: Any) -> CifarImages:
        calls.append(arguments)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    monkeypatch.setattr(data, "load_cifar", load)
    return calls


def tiny_cifar10() -> CifarImages:
    random = random_dataset(30, test=6)
    return CifarImages(
        "a folder", random.train_images, random.train_labels, random.test_images, random.test_labels
    )


def loaded(choice: str, said: list[str] | None = None) -> Dataset:
    return load_dataset(choice, DATA_DIR, None, None, say=(said if said is not None else []).append)


def test_an_unknown_choice_is_refused_by_name() -> None:
    with pytest.raises(DataError, match="--data is 'mnist'; choose auto, cifar10, cifar100 or synthetic"):
        loaded("mnist")


def test_synthetic_never_looks_for_cifar10(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = have_cifar10(monkeypatch, tiny_cifar10())
    dataset = loaded("synthetic")
    assert dataset.synthetic and dataset.name == "synthetic stand-in" and "--data synthetic" in dataset.source
    assert calls == []


@pytest.mark.parametrize("choice", ["auto", "cifar10"])
def test_cifar10_is_taken_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch, choice: str) -> None:
    cifar10 = tiny_cifar10()
    calls = have_cifar10(monkeypatch, cifar10)
    dataset = load_dataset(choice, DATA_DIR, None, None, say := [].append, progress := [].append)
    assert calls == [(CIFARS["cifar10"], DATA_DIR, say, progress)]
    assert (dataset.name, dataset.source, dataset.synthetic) == ("CIFAR-10", "a folder", False)
    assert torch.equal(dataset.train_images, cifar10.train_images)
    assert torch.equal(dataset.train_labels, cifar10.train_labels)
    assert torch.equal(dataset.test_images, cifar10.test_images)
    assert torch.equal(dataset.test_labels, cifar10.test_labels)


def test_without_cifar10_auto_goes_on_with_the_stand_in_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    have_cifar10(monkeypatch, NoCifarError("the server is down"))
    said: list[str] = []
    dataset = loaded("auto", said)
    assert dataset.synthetic and dataset.name == "synthetic stand-in"
    assert dataset.source == "no CIFAR-10 here: the server is down"
    (sentence,) = said
    assert sentence.startswith("NO CIFAR-10: the server is down. Going on with the synthetic stand-in.")
    assert sentence.endswith(how_to_bring_it(CIFARS["cifar10"], DATA_DIR))


def test_without_cifar10_the_choice_cifar10_says_why_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    have_cifar10(monkeypatch, NoCifarError("the server is down"))
    with pytest.raises(DataError) as error:
        loaded("cifar10")
    reason = "CIFAR-10 could not be had: the server is down. "
    assert str(error.value) == reason + how_to_bring_it(CIFARS["cifar10"], DATA_DIR)


@pytest.mark.parametrize("choice", ["auto", "cifar10"])
def test_a_damaged_cifar10_is_never_replaced_by_the_stand_in(
    monkeypatch: pytest.MonkeyPatch, choice: str
) -> None:
    have_cifar10(monkeypatch, DataError("data_batch_1 is truncated"))
    with pytest.raises(DataError, match="data_batch_1 is truncated"):
        loaded(choice)


def test_limits_keep_the_first_images(monkeypatch: pytest.MonkeyPatch) -> None:
    have_cifar10(monkeypatch, tiny_cifar10())
    whole = loaded("cifar10")
    part = load_dataset("cifar10", DATA_DIR, 7, 2, say=print)
    assert torch.equal(part.train_images, whole.train_images[:7])
    assert torch.equal(part.train_labels, whole.train_labels[:7])
    assert torch.equal(part.test_images, whole.test_images[:2])
    assert torch.equal(part.test_labels, whole.test_labels[:2])
    assert len(load_dataset("cifar10", DATA_DIR, 30, 6, say=print).train_labels) == 30


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        ((31, None), "--limit-train is 31, but CIFAR-10's training set has 30 images: give 1 to 30"),
        ((None, 7), "--limit-test is 7, but CIFAR-10's test set has 6 images: give 1 to 6"),
        ((0, None), "--limit-train is 0, "),
    ],
)
def test_a_limit_outside_the_set_is_refused_by_its_flag(
    monkeypatch: pytest.MonkeyPatch, limits: tuple[int | None, int | None], says: str
) -> None:
    have_cifar10(monkeypatch, tiny_cifar10())
    with pytest.raises(DataError, match=says):
        load_dataset("auto", DATA_DIR, *limits, say=print)
