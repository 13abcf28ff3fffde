"""A data set of random images, as small as a test likes."""

import torch

from experiments.data import Dataset


def random_dataset(
    train: int, test: int = 8, name: str = "random", source: str = "made here", synthetic: bool = True
) -> Dataset:
    """Return the same images and labels whenever the two numbers are the same."""
    generator = torch.Generator().manual_seed(train)
    images = torch.randint(256, (train + test, 3, 32, 32), generator=generator, dtype=torch.uint8)
    labels = torch.randint(10, (train + test,), generator=generator)
    return Dataset(
        name, source, synthetic, 10, images[:train], labels[:train], images[train:], labels[train:]
    )
