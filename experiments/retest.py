"""The final network tested once more, by another loop: accuracy, each class, and untouched training images.

The table's accuracy is held against this, and what a curve does not show is looked for: a class that is never
predicted, and training images that are known worse than test images.
"""

import dataclasses

import torch
from torch import Tensor, nn

from experiments.data import Dataset, TestBatches
from experiments.history import Retest

TRAIN_IMAGES = 2_000  # untouched, from the training set; a standard deviation is then at most 1.1 points
TIE = 1e-4  # of the largest logit: two logits as close may change places from one batch size to another
TIE_BF16 = 2e-2


@torch.inference_mode()
def retest(model: nn.Module, dataset: Dataset, precision: str) -> Retest:
    """Test the network, in evaluation mode and in the precision of the run; on one process, the whole set.

    Nothing of the network changes.
    """
    modes = {module: module.training for module in model.modules()}
    model.eval()
    device = next(model.parameters()).device
    count = min(TRAIN_IMAGES, len(dataset.train_labels))
    chosen = torch.linspace(0, len(dataset.train_labels) - 1, count).round().long()
    untouched = dataclasses.replace(
        dataset, test_images=dataset.train_images[chosen], test_labels=dataset.train_labels[chosen]
    )
    test, train = TestBatches(dataset, device), TestBatches(untouched, device)
    logits, known = _logits(model, test, precision), _logits(model, train, precision)
    predicted = logits.argmax(1)
    classes = logits.shape[1]
    found = Retest(
        images=len(logits),
        right=int((predicted == test.labels).sum()),
        ties=_ties(logits, TIE_BF16 if precision == "bf16" else TIE),
        class_images=torch.bincount(test.labels, minlength=classes).tolist(),
        class_predictions=torch.bincount(predicted, minlength=classes).tolist(),
        class_right=torch.bincount(test.labels[predicted == test.labels], minlength=classes).tolist(),
        train_images=count,
        train_right=int((known.argmax(1) == train.labels).sum()),
    )
    for module, mode in modes.items():
        module.training = mode
    return found


def _logits(model: nn.Module, batches: TestBatches, precision: str) -> Tensor:
    """Shapes: -> (M, classes) float32."""
    with torch.autocast(batches.labels.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return torch.cat([model(images).float() for images, _ in batches])


def _ties(logits: Tensor, share: float) -> int:
    """Images whose two largest logits are closer than rounding can tell."""
    two = logits.topk(2).values
    return int((two[:, 0] - two[:, 1] <= share * logits.abs().max()).sum())
