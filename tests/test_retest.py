"""The final network tested once more: what is counted of each class and of untouched training images."""

import pytest
import torch
from torch import Tensor, nn

from experiments.data import Dataset
from experiments.retest import TRAIN_IMAGES, retest

CLASSES = 10


def plain_images(train: int, test: int) -> Dataset:
    """Images of one grey, which says their class: class c has pixels of 25 c."""
    labels = torch.arange(train + test) % CLASSES
    images = (25 * labels).to(torch.uint8)[:, None, None, None].expand(-1, 3, 32, 32).contiguous()
    return Dataset(
        "grey", "here", True, CLASSES, images[:train], labels[:train], images[train:], labels[train:]
    )


class Reader(nn.Module):
    """Predicts the class that the grey says, but that it takes every image of `mistaken` for class 0."""

    def __init__(self, mistaken: int | None = None) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.norm = nn.BatchNorm2d(3)
        self.mistaken = mistaken

    def forward(self, x: Tensor) -> Tensor:
        grey = ((x[:, 0, 0, 0] * 0.2023 + 0.4914) * 255 / 25).round().long()
        self.norm(x)  # in training mode it would learn
        if self.mistaken is not None:
            grey = torch.where(grey == self.mistaken, 0, grey)
        return self.scale * nn.functional.one_hot(grey, CLASSES).float()


def test_every_image_and_class_is_counted():
    found = retest(Reader(), plain_images(40, 60), "float32")
    assert (found.images, found.right, found.train_images, found.train_right) == (60, 60, 40, 40)
    assert found.class_images == found.class_predictions == found.class_right == [6] * CLASSES
    assert found.ties == 0


def test_a_class_that_is_never_predicted_shows_in_its_own_counts():
    found = retest(Reader(mistaken=3), plain_images(40, 60), "float32")
    assert (found.right, found.train_right) == (54, 36)
    assert found.class_predictions == [12, 6, 6, 0, 6, 6, 6, 6, 6, 6]
    assert found.class_right[3] == 0 and found.class_images[3] == 6


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_it_computes_in_the_precision_of_the_run(precision):
    model, seen = Reader(), set[bool]()
    model.register_forward_pre_hook(lambda *_: seen.add(torch.is_autocast_enabled("cpu")))
    retest(model, plain_images(10, 10), precision)
    assert seen == {precision == "bf16"}


def test_two_logits_alike_are_a_tie():
    model = Reader()
    with torch.no_grad():
        model.scale.zero_()
    assert retest(model, plain_images(40, 60), "float32").ties == 60


@pytest.mark.parametrize("images", [1, TRAIN_IMAGES + 1000])
def test_so_many_training_images_are_taken_from_the_whole_training_set(images):
    dataset = plain_images(images, 10)
    dataset.train_labels[-1] = (dataset.train_labels[-1] + 1) % CLASSES
    found = retest(Reader(), dataset, "float32")
    assert found.train_images == min(images, TRAIN_IMAGES) == found.train_right + 1


def test_nothing_of_the_network_changes():
    model = Reader().train()
    model.norm, model.other = nn.Sequential(model.norm, nn.BatchNorm2d(3)), nn.Identity()
    model.other.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    retest(model, plain_images(10, 10), "bf16")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and model.norm[1].training and not model.other.training
