"""The training step written a second time, slowly and plainly, for the tests to hold the real one against.

Nothing of the project is imported: the network is a list of function calls, the quantizer is plain autograd
around `torch.quantile`, the lasso is a loop over channels; nothing is cached, fused or laid out specially.
Weights are (O, I, kh, kw), images (N, 3, 32, 32).
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTHS = (16, 32, 64)
BLOCKS = 3  # a stage: ResNet-20
MAX_BITS = 8


def straight_through(exact: Tensor, smooth: Tensor) -> Tensor:
    """The value of `exact` with the gradient of `smooth`."""
    return smooth + (exact - smooth).detach()


def quantize(w: Tensor, logit_bit: Tensor, logit_dz: Tensor) -> Tensor:
    """Return the quantized weights by the formulas of CoDeQ (arXiv 2512.12981), one a line."""
    # In float32, torch.quantile would round the place of the quantile to a thousandth.
    r = torch.quantile(w.detach().double().abs().flatten(), 0.99).to(w.dtype)
    b = 2 + (MAX_BITS - 2) * logit_bit.tanh().abs()
    b = straight_through(b.round(), b)
    d = 2 * r * (1 - logit_dz.tanh().abs())
    Q = 2 ** (b - 1) - 1
    s = (r - d / 2) / (Q - 0.5) + 1e-8
    h = (d - s) / 2
    m = straight_through((w.abs() - h).clamp_min(0), w.abs() - h)
    u = w.sign() * m / s
    q = straight_through(u.round(), u)
    q = straight_through(torch.clamp(q.detach(), -Q.detach(), Q.detach()), q)
    return s * q + h * q.sign()


class Reference:
    """A ResNet-20 with quantizers and its optimizer, from a copy of a model's state."""

    def __init__(self, state: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
        """`rates`: each group's learning rate and weight decay (weights_lr, bit_decay ...), and beta2."""
        self.values = {
            name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()
        }
        self.trained = {n: v for n, v in self.values.items() if v.is_floating_point() and "running" not in n}
        groups: dict[str, list[Tensor]] = {"weights": [], "bit": [], "deadzone": []}
        for name, value in self.trained.items():
            value.requires_grad_()
            kind = {"logit_bit": "bit", "logit_dz": "deadzone"}.get(name.rpartition(".")[2], "weights")
            groups[kind].append(value)
        self.optimizer = torch.optim.AdamW(
            [
                {"params": p, "lr": rates[f"{kind}_lr"], "weight_decay": rates[f"{kind}_decay"]}
                for kind, p in groups.items()
            ],
            betas=(0.9, rates["beta2"]),
            foreach=False,
            fused=False,
        )
        self.quantized = [n.partition(".parametrizations")[0] for n in self.values if n.endswith("logit_bit")]

    def weight(self, layer: str) -> Tensor:
        if layer not in self.quantized:
            return self.values[f"{layer}.weight"]
        inside = f"{layer}.parametrizations.weight"
        quantizer = f"{inside}.0.quantizer"
        w = self.values[f"{inside}.original"]
        return quantize(w, self.values[f"{quantizer}.logit_bit"], self.values[f"{quantizer}.logit_dz"])

    def normalise(self, name: str, x: Tensor) -> Tensor:
        """Batch norm in training mode, its running statistics kept up as well."""
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        places = x.numel() // x.shape[1]
        with torch.no_grad():
            self.values[f"{name}.running_mean"].lerp_(mean, 0.1)
            self.values[f"{name}.running_var"].lerp_(var * places / (places - 1), 0.1)
            self.values[f"{name}.num_batches_tracked"] += 1
        x = (x - mean[:, None, None]) / (var + 1e-5).sqrt()[:, None, None]
        return x * self.values[f"{name}.weight"][:, None, None] + self.values[f"{name}.bias"][:, None, None]

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.normalise("bn1", F.conv2d(images.contiguous(), self.weight("conv1"), padding=1)))
        for stage, width in enumerate(WIDTHS, 1):
            for i in range(BLOCKS):
                block = f"layer{stage}.{i}"
                stride = 2 if stage > 1 and i == 0 else 1
                y = F.conv2d(x, self.weight(f"{block}.conv1"), stride=stride, padding=1)
                y = F.relu(self.normalise(f"{block}.bn1", y))
                y = self.normalise(f"{block}.bn2", F.conv2d(y, self.weight(f"{block}.conv2"), padding=1))
                if stride == 2:  # option A
                    x = x[:, :, ::2, ::2]
                    nothing = x.new_zeros(len(x), width // 4, *x.shape[2:])
                    x = torch.cat([nothing, x, nothing], 1)
                x = F.relu(y + x)
        return x.mean((2, 3)) @ self.weight("linear").T + self.values["linear.bias"]

    def penalty(self) -> Tensor:
        """Sum over channels the norm of all weights that must vanish for the channel to go."""
        weights = {layer: self.weight(layer) for layer in self.quantized}
        total = torch.zeros(())
        for group in channel_groups():
            slices = [weights[n][i] if side == "filter" else weights[n][:, i]
                      for n, side, i in group if n in weights]  # fmt: skip
            squares = sum(((x**2).sum() for x in slices), torch.zeros(()))
            if squares > 0:  # the square root has no gradient at 0, and the norm's is to be 0 there
                total = total + squares.sqrt()
        return total

    def step(
        self, images: Tensor, labels: Tensor, sparsity_weight: float, keep_dead: bool = False
    ) -> tuple[float, float]:
        """One training step; the loss, and its cross-entropy part."""
        self.optimizer.zero_grad()
        cross_entropy = F.cross_entropy(self.forward(images).float(), labels)  # of float64 logits too
        loss = cross_entropy + sparsity_weight * self.penalty()
        loss.backward()
        dead = self.dead_slices() if keep_dead and sparsity_weight else []
        self.optimizer.step()
        with torch.no_grad():
            for stored in dead:
                stored.zero_()
        return loss.item(), cross_entropy.item()

    @torch.no_grad()
    def dead_slices(self) -> list[Tensor]:
        """The stored weights of each group member whose quantized weights are all zero."""
        found = []
        weights = {layer: self.weight(layer) for layer in self.quantized}
        for layer, side, i in (member for group in channel_groups() for member in group):
            if layer in weights:
                used, stored = weights[layer], self.values[f"{layer}.parametrizations.weight.original"]
                if side == "filter" and not used[i].any():
                    found.append(stored[i])
                elif side == "input" and not used[:, i].any():
                    found.append(stored[:, i])
        return found

    @torch.no_grad()
    def zeros(self) -> dict[str, tuple[int, int]]:
        """(weights that are zero, filters that are all zero) of each quantized layer."""
        weights = {layer: self.weight(layer) for layer in self.quantized}
        return {n: (int((w == 0).sum()), sum(not f.any() for f in w)) for n, w in weights.items()}


def channel_groups() -> list[list[tuple[str, str, int]]]:
    """Every channel's weight slices, as (layer, "filter" or "input", number)."""
    groups = []
    for stage, width in enumerate(WIDTHS, 1):
        for block in range(BLOCKS):  # inner channels
            for i in range(width):
                groups.append([(f"layer{stage}.{block}.conv1", "filter", i),
                               (f"layer{stage}.{block}.conv2", "input", i)])  # fmt: skip
        for c in range(width):  # residual channels
            group = [(f"layer{stage}.{block}.conv2", "filter", c) for block in range(BLOCKS)]
            group += [(f"layer{stage}.{block}.conv1", "input", c) for block in range(1, BLOCKS)]
            if stage < len(WIDTHS):
                group.append((f"layer{stage + 1}.0.conv1", "input", c))
            groups.append(group)
    return groups
