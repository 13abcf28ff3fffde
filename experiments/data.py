"""The images of a run: a CIFAR or the built-in stand-in, and batches of them, augmented on the device.

Images are (N, 3, 32, 32) uint8 in a `Dataset`, and normalised float32 in a batch.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from experiments.cifar import CIFARS, SIDE, DataError, NoCifarError, how_to_bring_it, load_cifar
from experiments.distributed import ALONE, Processes

# Mean and standard deviation of each colour channel, as in github.com/kuangliu/pytorch-cifar, a recipe
# that many others copy. STD is the mean over CIFAR-10's training images of the deviation within each image;
# the deviation over all pixels is (0.2470, 0.2435, 0.2616). All data sets are normalised with these numbers.
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2023, 0.1994, 0.2010)
CROP_PADDING = 4  # pixels of zeros on each side before a crop, as in He et al. 2015 (arXiv 1512.03385)


@dataclass(frozen=True)
class Dataset:
    """The images and labels that a run trains and tests on; on the CPU, in a fixed order."""

    name: str  # "CIFAR-10", "CIFAR-100" or "synthetic stand-in"
    source: str  # the path that it was read from, or why the stand-in is used
    synthetic: bool  # whether this is the stand-in
    classes: int
    train_images: Tensor  # (N, 3, 32, 32) uint8
    train_labels: Tensor  # (N,) int64
    test_images: Tensor  # (M, 3, 32, 32) uint8
    test_labels: Tensor  # (M,) int64


def load_dataset(
    data: str,
    data_dir: Path,
    limit_train: int | None,
    limit_test: int | None,
    say: Callable[[str], None],
    progress: Callable[[str], None] | None = None,
) -> Dataset:
    """Load the data set that `data` names, cut to its first `limit_train` and `limit_test` images.

    "cifar10" and "cifar100" are the data sets of these names, "synthetic" is the stand-in, and "auto" is
    CIFAR-10 where it is on disk or can be downloaded, and else the stand-in. A damaged file in `data_dir` is
    an error under "auto" too: the stand-in replaces data that is absent, never data that the user meant to
    train on.

    `say` is called with whole lines for the log; `progress` with the text of one line that is overwritten,
    and with "" once the download is over.
    Raises: DataError if there is no such data set or it is smaller than a limit, if a file of it is damaged,
        and under "cifar10" and "cifar100" if it is neither on disk nor at any of its sources.
    """
    if data == "synthetic":
        dataset = synthetic_dataset("built in, as --data synthetic asks")
    elif data == "auto" or data in CIFARS:
        files = CIFARS["cifar10" if data == "auto" else data]
        try:
            source, *tensors = load_cifar(files, data_dir, say, progress)
            dataset = Dataset(files.name, source, False, files.classes, *tensors)
        except NoCifarError as reason:
            by_hand = how_to_bring_it(files, data_dir)
            if data != "auto":
                raise DataError(f"{files.name} could not be had: {reason}. {by_hand}") from reason
            say(f"NO {files.name}: {reason}. Going on with the synthetic stand-in. {by_hand}")
            dataset = synthetic_dataset(f"no {files.name} here: {reason}")
    else:
        raise DataError(f"--data is {data!r}; choose auto, cifar10, cifar100 or synthetic")
    return _limited(dataset, limit_train, limit_test)


def class_count(data: str) -> int:
    """The number of classes of the data set that `data` names; known before any file is read."""
    return CIFARS[data].classes if data in CIFARS else STAND_IN_CLASSES


def data_of(name: str) -> str:
    """What --data calls the data set of this name; "auto" for a name that is none."""
    names = {files.name: data for data, files in CIFARS.items()} | {STAND_IN: "synthetic"}
    return names.get(name, "auto")


def _limited(dataset: Dataset, limit_train: int | None, limit_test: int | None) -> Dataset:
    train = _limit("--limit-train", limit_train, len(dataset.train_labels), f"{dataset.name}'s training set")
    test = _limit("--limit-test", limit_test, len(dataset.test_labels), f"{dataset.name}'s test set")
    return replace(
        dataset,
        train_images=dataset.train_images[:train],
        train_labels=dataset.train_labels[:train],
        test_images=dataset.test_images[:test],
        test_labels=dataset.test_labels[:test],
    )


def _limit(flag: str, limit: int | None, size: int, what: str) -> int:
    if limit is None:
        return size
    if not 1 <= limit <= size:
        raise DataError(f"{flag} is {limit}, but {what} has {size} images: give 1 to {size}, or leave it out")
    return limit


# The stand-in.

STAND_IN = "synthetic stand-in"
STAND_IN_CLASSES = 10  # as CIFAR-10 has
SYNTHETIC_TRAIN = 20_000
SYNTHETIC_TEST = 4_000
_SYNTHETIC_SEED = 20_251
_SYNTHETIC_CHUNK = 1_000  # images made at a time; all at once would take about 1 GB of float32
_WINDOW_POSITIONS = 21  # along each axis of its pattern


def synthetic_dataset(source: str) -> Dataset:
    """Make the stand-in for CIFAR-10: windows of ten coloured patterns, tinted, overlaid, with noise.

    The images do not depend on the run's seed. A class is a smooth random pattern, larger than an image; an
    image shows a random window of its class's pattern under two fainter windows of other classes' patterns.
    Where one of those happens to be the stronger, the class of the image is ambiguous. Image i is of class
    i mod 10. `source` is stored in the data set, and says why the stand-in is used.
    """
    labels = torch.arange(SYNTHETIC_TRAIN + SYNTHETIC_TEST) % STAND_IN_CLASSES
    images = torch.cat(list(synthetic_chunks()))
    train, test = images.split((SYNTHETIC_TRAIN, SYNTHETIC_TEST))
    train_labels, test_labels = labels.split((SYNTHETIC_TRAIN, SYNTHETIC_TEST))
    return Dataset(STAND_IN, source, True, STAND_IN_CLASSES, train, train_labels, test, test_labels)


def synthetic_chunks(share: int = 1) -> Iterator[Tensor]:
    """Make the stand-in's images, those for training first, a thousand at a time: (1000, 3, 32, 32) uint8.

    With `share` it is a stand-in of one in so many images, in as many parts.
    """
    generator = torch.Generator().manual_seed(_SYNTHETIC_SEED)
    windows = _pattern_windows(generator)
    labels = torch.arange((SYNTHETIC_TRAIN + SYNTHETIC_TEST) // share) % STAND_IN_CLASSES
    for chunk in labels.split(_SYNTHETIC_CHUNK // share):
        yield _overlaid(windows, chunk, generator)


def _pattern_windows(generator: torch.Generator) -> Tensor:
    """Draw a pattern of variance 1 for each class, and view all its 32x32 windows.

    Shapes: -> (10, 3, 21, 21, 32, 32), the axes being class, colour, position of the window, pixel.
    """
    coarse = torch.randn(STAND_IN_CLASSES, 3, 9, 9, generator=generator)
    side = SIDE + _WINDOW_POSITIONS - 1
    patterns = F.interpolate(coarse, size=(side, side), mode="bicubic", align_corners=True)
    patterns /= patterns.std(dim=(1, 2, 3), keepdim=True)
    return patterns.unfold(2, SIDE, 1).unfold(3, SIDE, 1)


def _overlaid(windows: Tensor, labels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw an image for each label. Shapes: (B,) -> (B, 3, 32, 32) uint8."""
    count = len(labels)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    def shown(classes: Tensor) -> Tensor:
        down, right = torch.randint(_WINDOW_POSITIONS, (2, count), generator=generator)
        return windows[classes, :, down, right]  # (B, 3, 32, 32)

    images = uniform(0.4, 1.0, 1, 1, 1) * shown(labels)
    for _ in range(2):
        others = (
            labels + torch.randint(1, STAND_IN_CLASSES, (count,), generator=generator)
        ) % STAND_IN_CLASSES
        images += uniform(0.0, 0.6, 1, 1, 1) * shown(others)
    images += 0.5 * torch.randn(images.shape, generator=generator)
    # Contrast and brightness differ between the colour channels, which tints the image.
    images = images * uniform(0.6, 1.2, 3, 1, 1) + uniform(-0.5, 0.5, 3, 1, 1)
    return (images * 48 + 127.5).clamp(0, 255).to(torch.uint8)


# Batches.


class TrainBatches:
    """The training set in random order; each image is zero-padded, cropped, and flipped with probability 1/2.

    The images stay on the device as padded uint8, the three channels of a pixel adjacent, so that a batch is
    one gather of pixels. An epoch's draws depend on the seed and the epoch's number alone, not on the device
    or on earlier epochs: a resumed run sees the batches that it would have seen without the break. With
    several processes, each gets its shard of every batch.
    """

    def __init__(
        self,
        dataset: Dataset,
        batch_size: int,
        seed: int,
        device: torch.device | str,
        processes: Processes = ALONE,
        crop_padding: int = CROP_PADDING,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        self.seed = seed
        self.crop_padding = crop_padding  # pixels
        self.processes = processes
        count = len(dataset.train_labels)
        self.sizes = [min(batch_size, count - first) for first in range(0, count, batch_size)]
        self.device = torch.device(device)
        self.labels = dataset.train_labels.to(self.device)
        self.padded_side = SIDE + 2 * crop_padding  # pixels
        self.pixels = _padded_pixels(dataset.train_images, crop_padding, self.device)
        self.windows = _window_indices(self.padded_side).to(self.device)
        self.normalise = _Normalise(self.device)

    def __len__(self) -> int:
        """Batches in an epoch; `sizes` lists their images, over all ranks. The last one may be smaller."""
        return len(self.sizes)

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Iterate over an epoch's batches: images (B, 3, 32, 32) float32, labels (B,) int64, on the device.

        The epoch's draws are copied to the device by this call, so that the iteration never waits for it.
        """
        order, down, right, flips = draws(len(self.labels), self.seed, epoch, self.crop_padding)
        corners = (order * self.padded_side + down) * self.padded_side + right
        return self._walk(order.to(self.device), corners.to(self.device), flips.to(self.device))

    def _walk(self, order: Tensor, corners: Tensor, flips: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, len(order), self.batch_size):
            shard = self.processes.shard(start, min(start + self.batch_size, len(order)))
            chosen = corners[shard, None, None] + self.windows[flips[shard]]  # (B, 32, 32)
            # index_select copies a pixel's three channels at once. Indexing takes twice as long on the CPU.
            images = self.pixels.index_select(0, chosen.view(-1)).view(-1, SIDE, SIDE, 3)
            yield self.normalise(images), self.labels[order[shard]]


class TestBatches:
    """The test set in its own order, without augmentation; with several processes, each gets its shard."""

    __test__ = False  # pytest would take a class of this name for a test case

    def __init__(
        self,
        dataset: Dataset,
        device: torch.device | str,
        batch_size: int = 1000,
        processes: Processes = ALONE,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        self.batch_size = batch_size
        shard = processes.shard(0, len(dataset.test_labels))
        self.labels = dataset.test_labels[shard].to(device)
        self.images = dataset.test_images[shard].to(device).permute(0, 2, 3, 1).contiguous()  # (M, 32, 32, 3)
        self.normalise = _Normalise(torch.device(device))

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        ):
            yield self.normalise(images), labels


def draws(
    count: int, seed: int, epoch: int, crop_padding: int = CROP_PADDING
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Draw the order, crops and flips of one epoch of `count` images, on the CPU for every device.

    Shapes: -> order (N,), a permutation of the images; then, in that order, each crop's offset from the top
    and from the left (N,), 0 to 2 crop_padding pixels, and flip (N,), 0 or 1; all int64.
    """
    mixed = hashlib.sha256(f"seed {seed}, epoch {epoch}".encode()).digest()[:8]
    generator = torch.Generator().manual_seed(int.from_bytes(mixed))
    order = torch.randperm(count, generator=generator)
    down, right = torch.randint(2 * crop_padding + 1, (2, count), generator=generator)
    flips = torch.randint(2, (count,), generator=generator)
    return order, down, right, flips


def _padded_pixels(images: Tensor, padding: int, device: torch.device) -> Tensor:
    """Pad the images with zeros and line up all their pixels.

    Shapes: (N, 3, 32, 32) -> (N * side * side, 3), where side is 32 + 2 padding.
    """
    side = SIDE + 2 * padding
    padded = torch.zeros(len(images), side, side, 3, dtype=torch.uint8, device=device)
    inner = slice(padding, padding + SIDE)
    padded[:, inner, inner] = images.to(device).permute(0, 2, 3, 1)
    return padded.view(-1, 3)


def _window_indices(padded_side: int) -> Tensor:
    """Indices of a crop's pixels in `_padded_pixels`, relative to its corner; as it is, and mirrored.

    Shapes: -> (2, 32, 32).
    """
    columns = torch.arange(SIDE)
    rows = padded_side * torch.arange(SIDE)[:, None]
    return torch.stack([rows + columns, rows + columns.flip(0)])


class _Normalise:
    """Compute (x / 255 - mean) / std of each channel x as scale x + bias."""

    def __init__(self, device: torch.device) -> None:
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        # Scale and bias are expanded to all pixels here, because broadcasting them takes twice as long.
        self.scale = (1 / (255 * std)).expand(SIDE, SIDE, 3).contiguous().to(device)
        self.bias = (-mean / std).expand(SIDE, SIDE, 3).contiguous().to(device)
        self.channels_last = device.type != "mps"  # on MPS, channels_last gave wrong batch-norm gradients

    def __call__(self, pixels: Tensor) -> Tensor:
        """Shapes: (B, 32, 32, 3) uint8 -> (B, 3, 32, 32) float32, in channels_last memory but on MPS."""
        images = pixels.float().mul_(self.scale).add_(self.bias).permute(0, 3, 1, 2)
        return images if self.channels_last else images.contiguous()
