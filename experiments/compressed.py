"""Make the smaller network and the packed file of a trained network, write both, and measure them.

The compression ratios of `metrics.py` are computed from counts. Here they are checked against real things:
the multiplications of the smaller network, the bytes of the file, the logits of both on the whole test set.
"""

import copy
import io
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.data import TestBatches
from experiments.files import write_whole
from experiments.history import CompressedRecord
from experiments.recount import read_claims, recount
from experiments.training import predict
from metrics import NetworkCount, count_by_torch
from resnet import resnet20
from src.packing import pack_network, unpack_network
from src.slim import slim_network
from utils_quantization import without_quantizers

PACKED, SLIM = "compressed.codeq", "slim.pt2"
LATENCY_BATCHES = (1, 128)  # images a forward pass
LATENCY_RUNS = 9  # forward passes that are timed
READ_BACK_IMAGES = 128  # enough to tell two networks apart, and quick on a CPU


def make_compressed(
    model: nn.Module, count: NetworkCount, batches: TestBatches, folder: Path, settings: dict[str, Any]
) -> CompressedRecord:
    """Make the smaller network and the packed file, write them into `folder`, and measure them.

    The model itself, the smaller network and the network read back from the packed file predict the whole
    test set, in float32 on the model's device, whatever precision the model was trained in. The model is in
    evaluation mode afterwards and otherwise unchanged. `settings` go into the header of the packed file.

    Raises: PackingError if the network cannot be packed, OutputError if a file cannot be written.
    """
    model.eval()
    device = next(model.parameters()).device
    content = pack_network(model, settings, {"structured_macs": count.total("structured_macs")})
    write_whole(folder / PACKED, content)
    slim = slim_network(model)
    write_whole(folder / SLIM, exported(slim))
    read_back_parameters, read_back_difference = read_back(folder / SLIM, slim, next(iter(batches))[0])
    packed = unpack_network((folder / PACKED).read_bytes()).to(device)
    packed_settings, packed_metrics = read_claims((folder / PACKED).read_bytes())
    networks = {"quantized": model, "slim": slim, "packed": packed}
    logits = {name: predict(network, batches)[0] for name, network in networks.items()}
    hits = {name: of_network.argmax(1) == batches.labels for name, of_network in logits.items()}
    accuracy = {name: right.double().mean().item() for name, right in hits.items()}
    dense = resnet20().to(device)
    return CompressedRecord(
        images=len(batches.labels),
        dense_parameters=_parameters(dense),
        slim_parameters=_parameters(slim),
        dense_macs=count.total("dense_macs"),
        slim_macs=count_by_torch(slim, device=device)[""],
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
        read_back_parameters=read_back_parameters,
        read_back_difference=read_back_difference,
        latency_seconds=measure_latency(
            {"dense": dense, "fake-quantized": model, "smaller": slim}, next(iter(batches))[0]
        ),
        packed_settings=packed_settings,
        packed_metrics=packed_metrics,
        file=recount((folder / PACKED).read_bytes()),
    )


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _saved_bytes(network: nn.Module) -> int:
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    return len(content.getvalue())


def exported(network: nn.Module) -> bytes:
    """Export the network for any batch size, on the CPU. Returns: the bytes of torch.export's .pt2 file."""
    on_cpu = copy.deepcopy(network).cpu().eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(on_cpu, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=(batch,))
    content = io.BytesIO()
    torch.export.save(program, content)
    return content.getvalue()


@torch.inference_mode()
def read_back(path: Path, network: nn.Module, images: Tensor) -> tuple[int, float]:
    """Read an exported file as its receiver would, and hold it against the network that it should be.

    Both predict the first images on the CPU, where the exported network runs.

    Shapes: images (N, 3, 32, 32).
    Returns: the parameters of the file's network, and the largest difference between the two networks'
    logits; 0 and NaN for a file that cannot be read or run.
    """
    images = images[:READ_BACK_IMAGES].cpu()
    expected = copy.deepcopy(network).cpu()(images)
    try:
        found = torch.export.load(path).module()
        return _parameters(found), (found(images) - expected).abs().max().item()
    except Exception:  # torch raises all kinds for a file or a shape that does not fit
        return 0, math.nan


@torch.inference_mode()
def measure_latency(networks: dict[str, nn.Module], images: Tensor) -> dict[str, dict[str, float]]:
    """Time a forward pass of each network, in turn, so that a busy machine slows all of them alike.

    Shapes: images (N, 3, 32, 32), of which a batch is the first 1 or 128; with fewer images, all of them.
    Returns: the median, least and most seconds, by "network, batch size".
    """
    found = {}
    for size in LATENCY_BATCHES:
        batch = images[:size]
        seconds: dict[str, list[float]] = {name: [] for name in networks}
        for _ in range(LATENCY_RUNS + 1):
            for name, network in networks.items():
                seconds[name].append(_forward_seconds(network, batch))
        for name, times in seconds.items():
            kept = times[1:]  # the first pass takes longer: it allocates memory and chooses algorithms
            found[f"{name}, batch {len(batch)}"] = {
                "median": statistics.median(kept),
                "least": min(kept),
                "most": max(kept),
            }
    return found


def _forward_seconds(network: nn.Module, batch: Tensor) -> float:
    start = time.perf_counter()
    network(batch)[0, 0].item()  # reading a number waits until a GPU has computed it
    return time.perf_counter() - start
