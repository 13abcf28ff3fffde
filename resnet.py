"""CIFAR ResNets with parameter-free (option A) shortcuts.

Source: He et al. 2015, "Deep Residual Learning for Image Recognition" (arXiv 1512.03385), section 4.2.

| model     | layers | parameters | multiply-accumulates, 32x32 image |
|-----------|-------:|-----------:|----------------------------------:|
| resnet20  |     20 |    269,722 |                        40,551,040 |
| resnet32  |     32 |    464,154 |                        68,862,592 |
| resnet44  |     44 |    658,586 |                        97,174,144 |
| resnet56  |     56 |    853,018 |                       125,485,696 |
| resnet110 |    110 |  1,727,962 |                       252,887,680 |

Images are (N, 3, 32, 32), weights (O, I, kh, kw). The multiply-accumulates are those of the convolutions and
the classifier. A test counts every number of this table in the networks themselves.
"""

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BasicBlock", "PadShortcut", "ResNet", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]

STAGE_WIDTHS = (16, 32, 64)  # channels


class PadShortcut(nn.Module):
    """The option A shortcut: takes every second pixel, and pads with channels of zeros on both sides.

    Channel i of the input becomes channel i + pad of the output, where pad is (out - in) / 2 channels: a
    quarter of the output's, between two stages.

    Shapes: (N, in, H, W) -> (N, out, H / 2, W / 2).
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.pad = (out_channels - in_channels) // 2

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.pad, self.pad))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with batch norms, plus a shortcut; ReLU after the first norm and after the sum.

    Shapes: (N, in, H, W) -> (N, channels, H / stride, W / stride).
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=1, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        same = stride == 1 and in_channels == channels
        self.shortcut = nn.Identity() if same else PadShortcut(in_channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.relu(out, inplace=True)


class ResNet(nn.Module):
    """Stem, three stages of `blocks_per_stage` blocks (16, 32, 64 channels), average pool, classifier.

    Weights of convolutions and the classifier are drawn by `kaiming_normal_` from torch's global generator.
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10) -> None:
        super().__init__()
        w1, w2, w3 = STAGE_WIDTHS
        self.conv1 = nn.Conv2d(3, w1, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(w1)
        self.layer1 = self._stage(w1, w1, blocks_per_stage, stride=1)
        self.layer2 = self._stage(w1, w2, blocks_per_stage, stride=2)
        self.layer3 = self._stage(w2, w3, blocks_per_stage, stride=2)
        self.linear = nn.Linear(w3, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)

    @staticmethod
    def _stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
        first = BasicBlock(in_channels, channels, stride)
        return nn.Sequential(first, *(BasicBlock(channels, channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)  # (N, 16, 32, 32)
        out = self.layer1(out)  # (N, 16, 32, 32)
        out = self.layer2(out)  # (N, 32, 16, 16)
        out = self.layer3(out)  # (N, 64, 8, 8)
        return self.linear(out.mean((2, 3)))  # (N, 64) -> (N, num_classes)


def resnet20(num_classes: int = 10) -> ResNet:
    return ResNet(3, num_classes)


def resnet32(num_classes: int = 10) -> ResNet:
    return ResNet(5, num_classes)


def resnet44(num_classes: int = 10) -> ResNet:
    return ResNet(7, num_classes)


def resnet56(num_classes: int = 10) -> ResNet:
    return ResNet(9, num_classes)


def resnet110(num_classes: int = 10) -> ResNet:
    return ResNet(18, num_classes)
