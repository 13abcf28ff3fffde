"""Networks of all kinds of operations, with planted deaths, and a probe that runs their operations."""

from typing import Any

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, fx, nn

from src.channels import ChannelAccount, read_weights
from src.graph import trace_network

TORCHVISION = (
    *("resnet18", "resnet50", "vgg11_bn", "mobilenet_v2", "densenet121", "squeezenet1_1"),
    *("shufflenet_v2_x0_5", "regnet_y_400mf", "efficientnet_b0", "googlenet", "convnext_tiny"),
)


def of_torchvision(name: str) -> nn.Module:
    more = {"init_weights": False} if name == "googlenet" else {}
    network = getattr(torchvision.models, name)(num_classes=10, **more).eval()
    if name == "vgg11_bn":  # whose linear layers have 120 million weights, which would take most of a minute
        network.avgpool = nn.AdaptiveAvgPool2d(2)
        network.classifier[0], network.classifier[3] = nn.Linear(512 * 4, 256), nn.Linear(256, 256)
        network.classifier[6] = nn.Linear(256, 10)
    return network


class Mixed(nn.Module):
    """Depthwise, grouped and dilated convolutions, a shuffle, a gate, sums, pools, a flattened map.

    Images are 3x12x12.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(8)
        self.point = nn.Conv2d(8, 6, 1)
        self.grouped = nn.Conv2d(8, 6, 3, padding=1, groups=2, bias=False)
        self.grouped_norm = nn.BatchNorm2d(6)
        self.dilated = nn.Conv2d(12, 8, 3, padding=2, dilation=2, padding_mode="circular")
        self.squeeze = nn.Conv2d(8, 4, 1)
        self.excite = nn.Conv2d(4, 8, 1)
        self.before = nn.BatchNorm2d(8)
        self.twice = nn.Conv2d(8, 8, 1)
        self.hidden = nn.Linear(8 * 9, 12)
        self.head = nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.norm(self.stem(x))), 2)  # (N, 8, 6, 6)
        a = self.point(F.relu6(self.depthwise_norm(self.depthwise(x))))
        b = F.leaky_relu(self.grouped_norm(self.grouped(x)), 0.1)
        y = torch.cat([a, b], 1).view(-1, 2, 6, 6, 6).transpose(1, 2).reshape(-1, 12, 6, 6)
        y = F.silu(self.dilated(y))
        y = y * F.hardsigmoid(self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))))
        x = x + y
        y = self.twice(F.relu(self.before(x)))
        x = F.avg_pool2d(x + self.twice(F.relu(y)), 2)  # (N, 8, 3, 3)
        return self.head(F.relu(self.hidden(x.flatten(1))))


@torch.no_grad()
def plant(model: nn.Module, seed: int, rate: float) -> nn.Module:
    """Random weights and statistics in float64; a share of filters, slices, scales and biases is dead."""
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=generator, dtype=torch.float64)

    def chosen(count: int) -> Tensor:
        return torch.rand(count, generator=generator) < rate

    model.double().eval()
    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            w = module.weight
            w.copy_(normal(w) * (2 / w[0].numel()) ** 0.5)
            w[chosen(len(w))] = 0
            if w.shape[1] > 3:
                w[:, chosen(w.shape[1])] = 0
            if module.bias is not None:
                module.bias.copy_(normal(module.bias) * ~chosen(len(w)))
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.copy_(0.1 * normal(module.running_mean))
            module.running_var.copy_(0.5 + normal(module.running_var).square())
            module.weight.copy_(normal(module.weight) * ~chosen(len(module.weight)))
            silent = chosen(len(module.weight))
            module.bias.copy_(normal(module.bias) * ~silent)
            module.running_mean[silent] = 0
    return model


class Probe(fx.Interpreter):
    """Runs the graph of an account, notes the value of every node, and puts others in the place of some."""

    def __init__(self, model: nn.Module, account: ChannelAccount, size: tuple[int, int, int]) -> None:
        super().__init__(fx.GraphModule({}, account.graph))
        self.values = trace_network(model, size).values(model, read_weights(model))
        self.notes: dict[str, Any] = {}
        self.put: dict[str, Any] = {}  # by the name of a node: what is made of its value

    def logits(self, x: Tensor) -> Tensor:
        nodes = [n.name for n in self.module.graph.nodes if n.op == "placeholder"]
        (logits,) = self.run(*(self.values.get(name, x) for name in nodes))
        return logits

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.name in self.put:
            value = self.put[n.name](value)
        self.notes[n.name] = value
        return value


@torch.no_grad()
def main() -> None:
    """Print a table: what planting kills in torchvision's networks, and how near the smaller network is."""
    from metrics import count_by_torch, count_network
    from src.slim import slim_network

    heads = ("network", "channels gone", "MACs", "structured", "torch", "off by", "barriers")
    print("{:<19} {:>14} {:>12} {:>11} {:>11} {:>8}  {}".format(*heads))
    for name in TORCHVISION:
        model = plant(of_torchvision(name), 0, 0.1)
        count, small = count_network(model), slim_network(model)
        x = torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        expected = model(x)
        off = ((small(x) - expected).abs().max() / expected.abs().max()).item()
        gone = sum(layer.filters - layer.alive_channels for layer in count.layers)
        print(
            f"{name:<19} {gone:>6,}/{count.total('filters'):<7,} {count.total('dense_macs'):>12,} "
            f"{count.total('structured_macs'):>11,} {count_by_torch(small.float())['']:>11,} {off:8.0e}  "
            f"{len(count.barriers)}",
            flush=True,
        )


if __name__ == "__main__":
    main()
