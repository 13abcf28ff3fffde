"""The compression results of a network against its dense baseline, and the picture of its channels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from torch import nn

from metrics import NetworkCount, count_ceiling, count_network, ratio

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Compression:
    """What a network costs, and how many times less than the dense baseline (>= 1, infinite for nothing)."""

    count: NetworkCount  # the counts behind the ratios, a layer and in total
    dense_macs: int
    dense_bops: int
    count_ceiling: Callable[[], NetworkCount]  # the counts if the model's quantized layers cost nothing

    @property
    def structured_bops_ratio(self) -> float:
        return ratio(self.dense_bops, self.count.total("structured_bops"))

    @property
    def unstructured_bops_ratio(self) -> float:
        return ratio(self.dense_bops, self.count.total("unstructured_bops"))

    @property
    def structured_mac_ratio(self) -> float:
        return ratio(self.dense_macs, self.count.total("structured_macs"))

    @property
    def unstructured_mac_ratio(self) -> float:
        return ratio(self.dense_macs, self.count.total("unstructured_macs"))

    @cached_property
    def ceiling(self) -> NetworkCount:
        """The counts if the quantized layers cost nothing, made when they are first asked for."""
        return self.count_ceiling()

    @property
    def structured_ceiling(self) -> float:
        """The largest structured ratio that the layers left in full precision allow (MACs and BOPs alike)."""
        return ratio(self.dense_macs, self.ceiling.total("structured_macs"))

    @property
    def unstructured_ceiling(self) -> float:
        """The largest unstructured ratio that the layers left in full precision allow."""
        return ratio(self.dense_macs, self.ceiling.total("unstructured_macs"))


class Evaluator:
    """Remembers the dense network's counts at construction, and measures later networks against them.

    The baseline is every weight of every layer at 32 bits, whatever is zero or quantized at that moment.
    """

    def __init__(self, model: nn.Module, input_size: tuple[int, int, int] = (3, 32, 32)) -> None:
        self.input_size = input_size
        self.dense = count_network(model, input_size)

    def evaluate(self, model: nn.Module) -> Compression:
        """The model's counts as it stands, against the baseline.

        Raises: ValueError if the model's layers are not those of the baseline.
        """
        count = count_network(model, self.input_size)
        shapes = [(layer.name, layer.weights) for layer in count.layers]
        if shapes != [(layer.name, layer.weights) for layer in self.dense.layers]:
            raise ValueError(
                "the model to evaluate has other layers than the one the Evaluator was made with"
            )
        return Compression(
            count=count,
            dense_macs=self.dense.total("dense_macs"),
            dense_bops=self.dense.total("dense_bops"),
            count_ceiling=lambda: count_ceiling(model, self.input_size),
        )

    def plot_channel_liveness(self, model: nn.Module) -> Figure:
        """A row a convolution, a cell an output channel: blue alive, orange constant, black null."""
        from experiments.plots import channel_liveness_figure  # matplotlib takes half a second to import

        return channel_liveness_figure(count_network(model, self.input_size))
