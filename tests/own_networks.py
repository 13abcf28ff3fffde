"""Networks as someone's own module would hold them, and what looks like one and is none."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Small(nn.Module):
    """Two ways that are added and one that is put beside them, for images of any size."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.left = nn.Conv2d(8, 8, 3, padding=1)
        self.right = nn.Conv2d(8, 8, 1)
        self.deep = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.head = nn.Linear(16, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x)))
        x = F.relu(self.left(x) + self.right(x))
        x = torch.cat([x, F.leaky_relu(self.deep(x))], 1)
        return self.head(x.mean((2, 3)))


def without_arguments() -> nn.Module:
    return Small()


class OfAnyArguments(Small):
    def __init__(self, **kwargs: int) -> None:
        super().__init__(**kwargs)


def five_classes() -> nn.Module:
    return Small(5)


def needs_more(width: int) -> nn.Module:
    raise AssertionError("called")


def no_network() -> str:
    return "a network"


def raises() -> nn.Module:
    raise KeyError("weights.pth")


class OfLargeImages(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Conv2d(3, 4, 64), nn.Flatten(), nn.Linear(4, 10))


class TwoAnswersInTraining(Small):
    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        logits = super().forward(x)
        return (logits, logits) if self.training else logits


class WithDropout(Small):
    """Random in training mode alone."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Sequential(nn.Dropout(0.5), self.head)  # type: ignore[assignment]


class LooksAtNumbers(Small):
    """Its way depends on the image, which no graph can hold."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if x.mean().item() > 0 else -x)


class WithTable(Small):
    """The logits depend on whole numbers, which no packed file holds."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("order", torch.randperm(10))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)[:, self.order]


class WithSort(Small):
    """No channel is followed through a sort."""

    def __init__(self) -> None:
        super().__init__()
        del self.deep

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.stem(x))).sort(1).values
        return self.head(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


not_callable = 3
