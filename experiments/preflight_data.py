"""Preflight checks of the images: the right ones, with their labels, as the run is given them."""

import hashlib
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from experiments import data, reference
from experiments.data import TrainBatches
from experiments.draws import kept_draws
from experiments.expect import BrokenError, NotApplicableError, Subject, expect
from experiments.history import some

LOOKED_AT = 192  # images that are compared with all their crops
GREY = 2e-3  # of 255 grey levels: float32 stays a hundred times closer, half precision does not
WALKED = 2048  # images of the second epoch that are looked at; the first is walked wholly
FEW = 16  # images that are looked at for the cause
WIDER = 4  # pixels of padding beside the setting's that are tried for the cause
ENOUGH_TO_AVERAGE = 16  # images whose mean and standard deviation are those of the set, to a factor of two
PROBED_TRAIN, PROBED_TEST = 100, 20  # images of each class below which the linear probe tells nothing
CIFAR_IMAGES = (50_000, 10_000)  # for training and for the test; as many of each class
STAND_IN = "synthetic stand-in"
# What --data may give.
NAMES = {
    "auto": ("CIFAR-10", STAND_IN),
    "cifar10": ("CIFAR-10",),
    "cifar100": ("CIFAR-100",),
    "synthetic": (STAND_IN,),
}
# Of each data set: the folder, its files for training and for the test, and the key of their labels.
FILES = {
    "CIFAR-10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], ["test_batch"], b"labels"),
    "CIFAR-100": ("cifar-100-python", ["train"], ["test"], b"fine_labels"),
}
# The share of the test images that may be training images too. Barz & Denzler 2020 (arXiv 1902.00423) count
# 10 % of CIFAR-100's as duplicates or near ones; how many of them are equal in every pixel they do not say.
MAY_BE_SHARED = {"CIFAR-100": 0.02}


def files_are_read_right(subject: Subject) -> str:
    """Images and labels against the files themselves, read by a second piece of code."""
    dataset, asked = subject.dataset, subject.pipeline.settings.data
    expect(
        dataset.name in NAMES[asked] and dataset.synthetic == (dataset.name == STAND_IN),
        f"the data set is {dataset.name}, and --data is {asked}",
        "--data does not reach the reading, or falls back without being asked to",
    )
    _sizes_are_the_settings(subject)
    if dataset.synthetic:
        for what, labels, first in (
            ("training", dataset.train_labels, 0),
            ("test", dataset.test_labels, data.SYNTHETIC_TRAIN),
        ):
            wrong = int((labels != (first + torch.arange(len(labels))) % dataset.classes).sum())
            expect(
                wrong == 0,
                f"{wrong} labels of the stand-in's {what} set are not image number mod 10",
                "the stand-in's labels were changed after it was made (experiments/data.py)",
            )
        return f"{len(dataset.train_labels):,} and {len(dataset.test_labels):,} labels of the stand-in"
    folder = Path(dataset.source)
    name, train_files, test_files, key = FILES[dataset.name]
    folder = folder if folder.is_dir() else folder.with_name(name)
    if not all((folder / name).is_file() for name in [*train_files, *test_files]):
        raise NotApplicableError(f"{folder} does not hold the unpacked files")
    for what, names, images, labels in (
        ("training", train_files, dataset.train_images, dataset.train_labels),
        ("test", test_files, dataset.test_images, dataset.test_labels),
    ):
        raw_images, raw_labels = _read_raw(folder, names, key, len(labels))
        differs = (images.numpy() != raw_images).any((1, 2, 3))
        if differs.any():
            there = {_digest(image) for image in raw_images}
            cause = f"pixels are altered in the reading of the {what} images"
            if not (images.numpy()[:, ::-1] != raw_images).any():
                cause = (
                    f"the colour channels are in the wrong order (BGR) in the reading of the {what} images"
                )
            elif all(_digest(image) in there for image in images[torch.from_numpy(differs)][:FEW].numpy()):
                cause = (
                    f"{what} images are in other places than in the files (a file read twice, another order)"
                )
            raise BrokenError(
                f"{int(differs.sum()):,} of {len(labels):,} {what} images are not the files'", cause
            )
        wrong = int((labels.numpy() != raw_labels).sum())
        expect(
            wrong == 0,
            f"{wrong:,} of {len(labels):,} {what} labels are not the files'",
            f"{what} labels are shuffled, shifted or altered after reading",
        )
    return (
        f"{len(dataset.train_labels):,} training and {len(dataset.test_labels):,} test images as in {folder}"
    )


def _sizes_are_the_settings(subject: Subject) -> None:
    """As many images as the data set has, or as the limits leave of it."""
    dataset, settings = subject.dataset, subject.pipeline.settings
    whole = (data.SYNTHETIC_TRAIN, data.SYNTHETIC_TEST) if dataset.synthetic else CIFAR_IMAGES
    for what, labels, limit, count in (
        ("train", dataset.train_labels, settings.limit_train, whole[0]),
        ("test", dataset.test_labels, settings.limit_test, whole[1]),
    ):
        due = min(limit or count, count)
        expect(
            len(labels) == due,
            f"{len(labels):,} {what} images, expected {due:,} of {count:,} (--limit-{what} is {limit})",
            f"images are left out in the reading, or --limit-{what} does not reach it",
        )
        counts = torch.bincount(labels)
        expect(
            dataset.synthetic or len(labels) < count or bool((counts == count // dataset.classes).all()),
            f"images a class in the whole {what} set: {counts.min()} to {counts.max()}, expected "
            f"{count // dataset.classes}",
            "these are not the official files, or their MD5 sums are not compared",
        )


def _read_raw(folder: Path, names: list[str], key: bytes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `count` images (N, 3, 32, 32) and labels of some batch files, read plainly."""
    images: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for name in names:
        if sum(len(part) for part in labels) < count:
            batch = pickle.loads((folder / name).read_bytes(), encoding="bytes")
            images.append(batch[b"data"].reshape(-1, 3, reference.SIDE, reference.SIDE))
            labels.append(np.array(batch[key]))
    return np.concatenate(images)[:count], np.concatenate(labels)[:count]


def sets_are_disjoint(subject: Subject) -> str:
    """No test image, nor its mirror image, is among the training images; every class is in both sets."""
    dataset, classes = subject.dataset, subject.dataset.classes
    train = {_digest(image) for image in dataset.train_images.numpy()}
    test = dataset.test_images.numpy()
    shared = sum(_digest(image) in train or _digest(image[:, :, ::-1]) in train for image in test)
    expect(
        shared <= MAY_BE_SHARED.get(dataset.name, 0) * len(test),
        f"{shared:,} of {len(test):,} test images are also training images",
        "training and test set are not kept apart",
    )
    for what, labels in (("training", dataset.train_labels), ("test", dataset.test_labels)):
        counts = torch.bincount(labels, minlength=classes).tolist()
        expect(
            len(counts) == classes,
            f"{what} labels up to {len(counts) - 1}, expected 0 to {classes - 1}",
            f"the {what} labels are not those of {classes} classes",
        )
        if len(labels) >= 100 * classes:
            expect(
                min(counts) > 0.5 * len(labels) / classes and max(counts) < 2 * len(labels) / classes,
                f"images a class in the {what} set: {counts}",
                f"the {what} set is sorted by class before it is cut, or its labels are wrong",
            )
    if dataset.synthetic:
        _stand_in_is_the_same_for_every_seed(subject)
    return f"{shared or 'none'} of {len(test):,} test images among {len(train):,} training images"


def _stand_in_is_the_same_for_every_seed(subject: Subject) -> None:
    seed = subject.pipeline.settings.seed
    with kept_draws():
        torch.manual_seed(1 + seed)
        again = next(data.synthetic_chunks())[: len(subject.dataset.train_images)]
        # All of it takes more than a second, so the later parts are made of a hundredth of their images.
        made = []
        for other in (seed, 1 + seed):
            torch.manual_seed(other)
            made.append(torch.cat(list(data.synthetic_chunks(share=100))))
    off = (again.int() - subject.dataset.train_images[: len(again)].int()).abs().max().item()
    expect(
        off <= 1,  # rounding may differ with the number of threads
        f"the stand-in made again has other images, by up to {off} of 255 grey levels",
        "the stand-in depends on the seed, or its images were changed after it was made",
    )
    others = (made[0] != made[1]).flatten(1).any(1)
    expect(
        not others.any(),
        f"with another seed {int(others.sum())} of {len(others)} images of a small stand-in are others, the "
        f"first of them number {int(others.int().argmax()) + 1}",
        "the stand-in depends on the seed",
    )


def _digest(image: np.ndarray) -> bytes:
    return hashlib.blake2b(image.tobytes(), digest_size=8).digest()


def labels_fit_the_images(subject: Subject) -> str:
    """A linear classifier on 8x8 thumbnails of the training images does well above chance on the test images.

    Labels that have nothing to do with their images, or test images of another kind, cannot be learned.
    """
    dataset = subject.dataset
    classes = dataset.classes
    count, tested = min(20_000, len(dataset.train_labels)), len(dataset.test_labels)
    if count < PROBED_TRAIN * classes or tested < PROBED_TEST * classes:
        raise NotApplicableError(f"{count} training and {tested} test images are too few")
    train, test = (_thumbnails(images) for images in (dataset.train_images[:count], dataset.test_images))
    targets = F.one_hot(dataset.train_labels[:count], classes).float() - 1 / classes
    gram = train.T @ train + 0.02 * len(train) * torch.eye(train.shape[1])
    solution = torch.linalg.solve(gram, train.T @ targets)
    accuracy, own = (
        ((x @ solution).argmax(1) == labels).float().mean().item()
        for x, labels in ((test, dataset.test_labels), (train, dataset.train_labels[:count]))
    )
    least = 2 / classes
    measured = f"a linear probe has {100 * accuracy:.1f} % on the test images ({100 * own:.1f} % on its own)"
    if accuracy < least:
        raise BrokenError(
            f"{measured}, expected at least {100 * least:.0f} %",
            "test images are of another kind or labels than the training images"
            if own > 1.5 * least
            else "labels do not belong to their images (shuffled, shifted)",
        )
    return measured


def _thumbnails(images: Tensor) -> Tensor:
    """Shapes: (N, 3, 32, 32) uint8 -> (N, 193) float, the last one 1."""
    small = F.avg_pool2d(images.float() / 255 - 0.5, 4).flatten(1)
    return torch.cat([small, torch.ones(len(small), 1)], 1)


def order_is_the_seeds(subject: Subject) -> str:
    """A whole epoch's batches and the first of a second: which images they show, by their labels."""
    dataset, batches = subject.dataset, subject.pipeline.train_batches
    if type(batches) is not TrainBatches:
        raise NotApplicableError("the training batches are not this project's, so their order is not known")
    count, padding = len(dataset.train_labels), subject.pipeline.settings.crop_padding
    missing = count - sum(batches.sizes)
    expect(
        missing == 0,
        f"an epoch has {sum(batches.sizes):,} of {count:,} training images",
        "the last batch is dropped"
        if 0 < missing < subject.pipeline.settings.batch_size
        else "the batches are made of other images than the training set's (the test set's, or a part)",
    )
    expect(
        len(batches) == len(batches.sizes) == -(-count // subject.pipeline.settings.batch_size),
        f"{len(batches)} steps an epoch for {count:,} images in batches of "
        f"{subject.pipeline.settings.batch_size}",
        "the batch size is not the setting's",
    )
    for epoch in (0, 1):
        order = _draws(subject, epoch)[0]
        seen = 0
        for (images, labels), size in zip(batches.epoch(epoch), batches.sizes, strict=False):
            shard = batches.processes.shard(seen, seen + size)
            expected = dataset.train_labels[order[shard]]
            expect(
                len(images) == len(labels) == len(expected),
                f"a batch of {len(images)} images and {len(labels)} labels where {len(expected)} are due",
                "batches are of the wrong size",
            )
            right = labels.cpu() == expected
            if not right.all():
                due = order[shard][:LOOKED_AT]
                cause = (
                    "the order of the images is not the one of this seed and epoch (not shuffled anew each "
                    "epoch, or with another seed)"
                )
                if Window(dataset.train_images, padding).holds(images[:LOOKED_AT], due):
                    cause = "labels do not follow their images into the batch"
                elif Window(dataset.test_images, padding).holds(
                    images[:LOOKED_AT], due % len(dataset.test_images)
                ):
                    cause = "the training batches are made of test images"
                raise BrokenError(
                    f"{int((~right).sum())} of {len(labels)} labels in a batch of epoch {epoch + 1} are not "
                    f"those of the images that are due",
                    cause,
                )
            seen += size
            if epoch and seen >= WALKED:
                break
        expect(
            seen == count or (epoch > 0 and seen >= WALKED),
            f"epoch {epoch + 1} ended after {seen:,} of {count:,} images",
            "the last batch is dropped, or the epoch ends too soon",
        )
    return f"{count:,} images once an epoch in {len(batches)} batches, shuffled anew"


# What pixels may have gone through by mistake, undone.
UNDONE: dict[str, Callable[[Tensor], Tensor]] = {
    "the colour channels are in another order": lambda pixels: pixels.flip(1),
    "images are transposed, height for width": lambda pixels: pixels.mT,
    "images are turned upside down": lambda pixels: pixels.flip(2),
}


def _pixels(images: Tensor) -> Tensor:
    """Back from normalised images to 0 to 255, (B, 3, 32, 32) float."""
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (reference.MEAN, reference.STD))
    return (images.cpu().float() * std + mean) * 255


def _draws(subject: Subject, epoch: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `reference.draws` gives for the settings."""
    settings = subject.pipeline.settings
    return reference.draws(len(subject.dataset.train_labels), settings.seed, epoch, settings.crop_padding)


class Window:
    """Finds an image of a batch among the crops and mirror images of its source in a set, (N, 3, 32, 32)."""

    def __init__(self, images: Tensor, padding: int) -> None:
        self.images = images
        self.padding = padding  # pixels
        self.offsets = 2 * padding + 1  # K, positions of a crop along each axis

    def crops(self, index: Tensor) -> Tensor:
        """Every crop of some images: (B,) -> (B, K * K, 3, 32, 32)."""
        return _crops(self.images[index].float(), self.padding)

    def find(self, pixels: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """For each image, the number of its crop (from K * K on mirrored), and the distance to it."""
        numbers, distances = [], []
        for image, number in zip(pixels, index, strict=True):
            crops = self.crops(number[None])[0]  # (K * K, 3, 32, 32)
            both = torch.cat(
                [(crops - image).abs().amax((1, 2, 3)), (crops - image.flip(-1)).abs().amax((1, 2, 3))]
            )
            numbers.append(both.argmin())
            distances.append(both.min())
        return torch.stack(numbers), torch.stack(distances)

    def holds(self, images: Tensor, index: Tensor) -> bool:
        """Whether most of these normalised images are crops of those at `index`."""
        return bool((self.find(_pixels(images), index)[1] < GREY).float().mean() > 0.5)

    def changed_part(self, pixels: Tensor, index: Tensor) -> str:
        """What is changed where most of an image is as in one of its crops; "" where no crop is near."""
        inside = _crops(torch.ones(1, 1, reference.SIDE, reference.SIDE), self.padding)[0].bool()
        inside = torch.cat([inside, inside])  # (2 * K * K, 1, 32, 32)
        found: Counter[str] = Counter()
        for image, number in zip(pixels[:FEW], index[:FEW], strict=True):
            crops = self.crops(number[None])[0]
            same = torch.cat([(crops - image).abs() < GREY, (crops - image.flip(-1)).abs() < GREY])
            # Of the channel with the least in common: another normalisation may leave some channels right.
            share = ((same & inside).sum((2, 3)) / inside.sum((2, 3))).amin(1)
            nearest = share.max().item()
            padded = nearest == 1 and not same[share.argmax()].all()
            found["padding" if padded else "part" if nearest > 0.4 else ""] += 1
        return found.most_common(1)[0][0]


def _crops(images: Tensor, padding: int) -> Tensor:
    """Every crop of zero-padded images: (B, C, 32, 32) -> (B, K * K, C, 32, 32), where K is 2 padding + 1."""
    padded = F.pad(images, (padding,) * 4)
    found = padded.unfold(2, reference.SIDE, 1).unfold(3, reference.SIDE, 1)  # (B, C, K, K, 32, 32)
    return found.permute(0, 2, 3, 1, 4, 5).flatten(1, 2)


def _normalised_otherwise(pixels: Tensor) -> bool:
    """Whether these are no whole grey levels from 0 to 255."""
    whole = (pixels - pixels.round()).abs().max().item()
    return whole > GREY or pixels.min().item() < -GREY or pixels.max().item() > 255 + GREY


def augmentation_is_crops_and_flips(subject: Subject) -> str:
    """Each image of a batch is one crop, mirrored or not, of its own source; every image draws anew."""
    if type(subject.pipeline.train_batches) is not TrainBatches:
        raise NotApplicableError("the training batches are not this project's, so their crops are not known")
    images, index = _first_images(subject)
    window = Window(subject.dataset.train_images, subject.pipeline.settings.crop_padding)
    pixels = _pixels(images)
    numbers, distances = window.find(pixels, index)
    off = distances > GREY
    if off.any():
        cause = "augmentation does more than crop after zero padding and mirror, or shows other images"
        if _normalised_otherwise(pixels):
            cause = "training images are not normalised as (x / 255 - mean) / std (or padded after that)"
        changed = window.changed_part(pixels[off], index[off])
        if changed:
            cause = {
                "padding": "images are padded with other than zeros, or after they are normalised",
                "part": "a part of each image is erased, overlaid or mixed (cutout, mixup)",
            }[changed]
        wider = Window(window.images, window.padding + WIDER)
        if (wider.find(pixels[off][:FEW], index[off][:FEW])[1] < GREY).float().mean() > 0.5:
            cause = "images are padded by more than --crop-padding before they are cropped"
        flips = _draws(subject, 0)[2]
        if torch.equal(off, flips[: len(off)] == 1):
            cause = (
                "the mirrored crops: those that are not mirrored are right (the indices of a mirror image)"
            )
        for what, undo in UNDONE.items():
            # Of transposed images those that were mirrored before are no crops either.
            if (window.find(undo(pixels[off]), index[off])[1] < GREY).float().mean() > 0.3:
                cause = f"{what} (training images)"
        raise BrokenError(
            f"{int(off.sum())} of {len(off)} training images are no crop of their source image (off by "
            f"{distances.max():.3g} of 255 grey levels)",
            cause,
        )
    expect(
        torch.equal(_first_images(subject)[0], images),
        "the same epoch drawn twice gives other images",
        "augmentation or order depends on more than seed and epoch, so no run can be resumed",
    )
    order, offsets, flips = _draws(subject, 0)
    places = order.argsort()[index]
    _crops_are_the_drawn_ones(window, pixels, index, numbers, offsets[:, places], flips[places])
    return f"{len(numbers)} images each a crop of its source, {int(flips[places].sum())} mirrored"


def _crops_are_the_drawn_ones(
    window: Window, pixels: Tensor, index: Tensor, found: Tensor, offsets: Tensor, flips: Tensor
) -> None:
    """Each image is the very crop, mirrored or not, that seed and epoch draw for its place in the order.

    Shapes: pixels (B, 3, 32, 32); index, the images' numbers in the set, found, the numbers of their crops as
    `Window.find` gives them, and flips (B,); offsets (2, B).
    """
    padded, side = F.pad(window.images[index], (window.padding,) * 4), reference.SIDE

    def differ(offsets: Tensor, flips: Tensor) -> Tensor:
        """Which images are another crop than this one, (B,)."""
        due = torch.stack(
            [image[:, d : d + side, r : r + side] for image, d, r in zip(padded, *offsets, strict=True)]
        )
        due = torch.where(flips[:, None, None, None] == 1, due.flip(-1), due)
        return ((pixels - due).abs() > GREY).flatten(1).any(1)

    other = differ(offsets, flips)
    if not other.any():
        return
    measured = f"{int(other.sum())} of {len(index)} images are another crop than their draw gives"
    cause = "the crop's offsets are not those that were drawn for the image"
    if not (other & differ(offsets, 1 - flips)).any():
        cause = "an image is mirrored by another draw than its own (of another image, of the crop)"
    elif not differ(offsets.flip(0), flips).any():
        cause = "the crop's two offsets are swapped"
    mirrored = found >= window.offsets**2
    share = mirrored.float().mean().item()
    drawn_once = "crop or flip is drawn once for the whole batch, or not at all"
    if len(found) >= 32 and not 0.2 < share < 0.8:
        measured, cause = f"{100 * share:.0f} % of {len(found)} images are mirrored", drawn_once
    where = torch.stack([found // window.offsets % window.offsets, found % window.offsets])
    for what, seen, due in zip(("downwards", "to the right"), where, offsets, strict=True):
        different, wanted = len(seen.unique()), len(due.unique())
        if len(found) >= 32 and different < wanted:
            measured = f"{different} of {wanted} crop offsets {what} occur in {len(found)} images"
            stays = (seen[1:] == seen[:-1]).float().mean() > 0.8  # from one image to the next
            cause = drawn_once if stays else "the range of the crop's offsets"
            break
    raise BrokenError(measured, cause)


def _first_images(subject: Subject) -> tuple[Tensor, Tensor]:
    """The first images of epoch 0 that this rank is given, and the numbers of those that are due."""
    batches = subject.pipeline.train_batches
    order, _, _ = _draws(subject, 0)
    images: list[Tensor] = []
    index: list[Tensor] = []
    seen = 0
    for (batch, _), size in zip(batches.epoch(0), batches.sizes, strict=False):
        images.append(batch)
        index.append(order[batches.processes.shard(seen, seen + size)])
        seen += size
        if sum(map(len, index)) >= LOOKED_AT:
            break
    return torch.cat(images)[:LOOKED_AT], torch.cat(index)[:LOOKED_AT]


def test_images_are_untouched(subject: Subject) -> str:
    """The test batches are the whole test set in its order, normalised as the training images are."""
    dataset, batches = subject.dataset, subject.pipeline.test_batches
    shard = subject.step.processes.shard(0, len(dataset.test_labels))
    wanted, labels = dataset.test_images[shard], dataset.test_labels[shard]
    expect(
        torch.equal(batches.labels.cpu(), labels),
        "the test batches' labels are not the test set's",
        "test labels are shuffled, shifted or cut, or the test batches hold other images",
    )
    first, again = next(iter(batches))[0].clone(), next(iter(batches))[0]
    expect(
        torch.equal(first, again),
        "the first test batch has other images when it is taken a second time",
        "the test images are written into where they are kept (normalised in place), or drawn anew",
    )
    seen = 0
    for images, batch_labels in batches:
        expect(
            torch.equal(batch_labels.cpu(), labels[seen : seen + len(images)]),
            "labels in a test batch are not those of the test set",
            "labels are shifted against the test images",
        )
        pixels = _pixels(images)
        off = (pixels - wanted[seen : seen + len(images)]).abs().amax((1, 2, 3))
        if (off > GREY).any():
            source = wanted[seen : seen + len(images)].float()
            cause = "the test images are augmented, or are not the test set's"
            if _normalised_otherwise(pixels):
                cause = "test images are not normalised as the training images are"
            for what, undo in UNDONE.items():
                if (undo(pixels) - source).abs().max() < GREY:
                    cause = f"{what} (test images)"
            raise BrokenError(
                f"{int((off > GREY).sum())} of {len(off)} test images are not the test set's "
                f"(off by {off.max():.1f} of 255 grey levels)",
                cause,
            )
        seen += len(images)
    expect(
        seen == len(labels),
        f"{seen:,} of {len(labels):,} test images are tested",
        "the last test batch is dropped or one is tested twice",
    )
    images = subject.first_batch[0].float()
    if len(images) < ENOUGH_TO_AVERAGE:
        return f"{seen:,} images as they are; too few in a batch for their standard deviations"
    mean, std = images.mean((0, 2, 3)), images.std((0, 2, 3))
    shown = ", ".join(f"{x:.2f}" for x in std.tolist())
    expect(
        bool((mean.abs() < 1).all() and (std > 0.5).all() and (std < 2).all()),
        f"the channels' means are {some([f'{x:.2f}' for x in mean.tolist()])}, standard deviations {shown}",
        "normalisation constants that do not fit the images, or a missing division by 255",
    )
    return f"{seen:,} images as they are; inputs have standard deviations {shown}"
