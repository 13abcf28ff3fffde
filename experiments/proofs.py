"""The compressed network made real, and checked: a smaller network, a small file, and what both give.

Ratios are claims; here each is held against something that exists: the smaller network's own multiplications,
the file's own bytes, and the logits of both on the whole test set.
"""

import copy
import io
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.flop_counter import FlopCounterMode

from experiments.data import TestBatches
from experiments.files import write_whole
from metrics import NetworkCount, format_ratio, ratio
from resnet import resnet20
from src.packing import pack_network, unpack_network
from src.slim import slim_network, without_quantizers

PACKED, SLIM = "compressed.codeq", "slim.pt2"
LATENCY_BATCHES = (1, 128)
LATENCY_RUNS = 9


@dataclass(frozen=True)
class Proof:
    """What was found of the compressed network; differences are of logits, over the whole test set."""

    images: int
    dense_parameters: int
    slim_parameters: int
    dense_macs: int
    slim_macs: int  # counted by torch on the smaller network
    structured_macs: int  # what the metrics print
    largest_logit: float
    largest_difference: float  # between the smaller network and the quantized one
    agreement: float  # share of equal predictions
    quantized_accuracy: float
    slim_accuracy: float
    packed_accuracy: float
    packed_differs: int  # logits of the reloaded file that differ in any bit
    packed_bytes: int
    float32_bytes: int  # the same network's state_dict, saved by torch
    slim_bytes: int
    latency_seconds: dict[str, dict[str, float]]  # median, least and most a forward pass

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def prove(
    model: nn.Module, count: NetworkCount, batches: TestBatches, folder: Path, settings: dict[str, Any]
) -> Proof:
    """Make both, write them into `folder`, read the packed one back, and run all three on the test set.

    In float32 on the model's device, whatever precision it was trained in. Nothing of the model changes but
    that it is in evaluation mode. Raises: OutputError if a file cannot be written.
    """
    model.eval()
    device = next(model.parameters()).device
    content = pack_network(model, settings, {"structured_macs": count.total("structured_macs")})
    write_whole(folder / PACKED, content)
    slim = slim_network(model)
    write_whole(folder / SLIM, exported(slim))
    packed = unpack_network((folder / PACKED).read_bytes()).to(device)
    with torch.inference_mode(), parametrize.cached():
        logits = _logits({"quantized": model, "slim": slim, "packed": packed}, batches)
    labels = torch.cat([labels for _, labels in batches])
    accuracy = {k: (v.argmax(1) == labels).double().mean().item() for k, v in logits.items()}
    dense = resnet20().to(device)
    networks = {"dense": dense, "fake-quantized": model, "smaller": slim}
    return Proof(
        images=len(labels),
        dense_parameters=_parameters(dense),
        slim_parameters=_parameters(slim),
        dense_macs=count.total("dense_macs"),
        slim_macs=counted_macs(slim),
        structured_macs=count.total("structured_macs"),
        largest_logit=logits["quantized"].abs().max().item(),
        largest_difference=(logits["quantized"] - logits["slim"]).abs().max().item(),
        agreement=(logits["quantized"].argmax(1) == logits["slim"].argmax(1)).double().mean().item(),
        quantized_accuracy=accuracy["quantized"],
        slim_accuracy=accuracy["slim"],
        packed_accuracy=accuracy["packed"],
        packed_differs=int((logits["quantized"] != logits["packed"]).sum()),
        packed_bytes=(folder / PACKED).stat().st_size,
        float32_bytes=_saved_bytes(without_quantizers(model)),
        slim_bytes=(folder / SLIM).stat().st_size,
        latency_seconds=measure_latency(networks, next(iter(batches))[0]),
    )


def _logits(networks: dict[str, nn.Module], batches: TestBatches) -> dict[str, Tensor]:
    """Shapes: -> (M, classes) each, M the test images."""
    found: dict[str, list[Tensor]] = {name: [] for name in networks}
    for images, _ in batches:
        for name, network in networks.items():
            found[name].append(network(images))
    return {name: torch.cat(parts) for name, parts in found.items()}


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _saved_bytes(network: nn.Module) -> int:
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    return len(content.getvalue())


@torch.no_grad()
def counted_macs(network: Callable[[Tensor], Tensor], device: torch.device | str | None = None) -> int:
    """Multiply-accumulates for one image by torch's counter, which counts 2 operations for each."""
    if device is None and isinstance(network, nn.Module):
        device = next(network.parameters()).device
    with FlopCounterMode(display=False) as counter:
        network(torch.zeros(1, 3, 32, 32, device=device))
    return counter.get_total_flops() // 2


def exported(network: nn.Module) -> bytes:
    """The network as torch.export saves it, for any batch size, on the CPU."""
    on_cpu = copy.deepcopy(network).cpu().eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(on_cpu, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=(batch,))
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


@torch.inference_mode()
def measure_latency(networks: dict[str, nn.Module], images: Tensor) -> dict[str, dict[str, float]]:
    """Seconds a forward pass, the networks in turn, at batch 1 and 128."""
    found = {}
    for size in LATENCY_BATCHES:
        batch = images[:size]
        seconds: dict[str, list[float]] = {name: [] for name in networks}
        for _ in range(LATENCY_RUNS + 1):
            for name, network in networks.items():
                seconds[name].append(_forward_seconds(network, batch))
        for name, times in seconds.items():
            kept = times[1:]  # the first one sets up
            found[f"{name}, batch {len(batch)}"] = {
                "median": statistics.median(kept),
                "least": min(kept),
                "most": max(kept),
            }
    return found


def _forward_seconds(network: nn.Module, batch: Tensor) -> float:
    start = time.perf_counter()
    network(batch)[0, 0].item()  # waits for an accelerator
    return time.perf_counter() - start


def proof_lines(proof: Proof) -> str:
    """The proof for a person."""
    smaller = format_ratio(ratio(proof.dense_macs, proof.slim_macs))
    rows = [
        f"  {name:<26} {1e3 * t['median']:8.2f} ms ({1e3 * t['least']:.2f} to {1e3 * t['most']:.2f})"
        for name, t in proof.latency_seconds.items()
    ]
    return "\n".join([
        "",
        "--- The Compressed Network ---",
        f"Smaller network: {proof.slim_parameters:,} of {proof.dense_parameters:,} parameters, "
        f"{proof.slim_macs:,} of {proof.dense_macs:,} MACs ({smaller}), counted on the network itself",
        f"  against the quantized network on {proof.images:,} test images: largest difference "
        f"{proof.largest_difference:.2g} of logits up to {proof.largest_logit:.3g}, "
        f"{100 * proof.agreement:.2f} % equal predictions",
        f"  accuracy {100 * proof.slim_accuracy:.2f} % against {100 * proof.quantized_accuracy:.2f} %",
        f"Packed file: {proof.packed_bytes:,} bytes, {proof.float32_bytes / proof.packed_bytes:.1f} times "
        f"smaller than the float32 state_dict's {proof.float32_bytes:,}",
        f"  read back: {proof.packed_differs} logits differ, accuracy {100 * proof.packed_accuracy:.2f} %",
        "Latency, median (spread):",
        *rows,
        "  Zero weights and low bits give no speed-up in this runtime; only channels that are gone do.",
    ])  # fmt: skip
