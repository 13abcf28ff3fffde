"""Make the smaller network and the packed file of a trained network, write both, and measure them.

The compression ratios of `metrics.py` are computed from counts. Here they are checked against real things:
the multiplications of the smaller network, the bytes of the file, the logits of both on the whole test set.
"""

import copy
import io
import json
import math
import statistics
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from experiments.data import TestBatches
from experiments.device import without
from experiments.files import OutputError, with_checksum, write_whole
from experiments.history import CompressedRecord
from experiments.network import make_network
from experiments.received import CLAIMS_FILE, open_exported
from experiments.recount import read_claims, recount
from experiments.settings import FOLDERS
from experiments.training import predict
from metrics import NetworkCount, count_by_torch, count_slim_by_torch, ratio
from src.packing import pack_network, unpack_network
from src.slim import slim_network
from utils_quantization import has_codes, quantizers, without_quantizers

PACKED, SLIM = "compressed.codeq", "slim.pt2"
LATENCY_BATCHES = (1, 128)  # images a forward pass
LATENCY_RUNS = 9  # forward passes that are timed
READ_BACK_IMAGES = 128  # enough to tell two networks apart, and quick on a CPU


@without("allow_tf32")
def make_compressed(
    model: nn.Module,
    count: NetworkCount,
    batches: TestBatches,
    folder: Path,
    settings: dict[str, Any],
    data: str,
    errors: list[OutputError],
) -> CompressedRecord:
    """Make the smaller network and the packed file, write them into `folder`, and measure them.

    The model itself, the smaller network and the network read back from the packed file predict the whole
    test set, in float32 on the model's device, whatever precision the model was trained in. The model is in
    evaluation mode afterwards and otherwise unchanged. `settings` go into the header of the packed file, but
    the names of folders, and so do `data`, the name of the data set, and what is claimed of the network.

    A file that cannot be written is added to `errors`, and what it would have held is measured.

    Raises: PackingError if the network cannot be packed.
    """
    model.eval()
    device = next(model.parameters()).device
    name = settings.get("model", "")
    said = {k: v for k, v in settings.items() if k not in FOLDERS}
    logits = {"quantized": predict(model, batches)[0]}
    right = _share(logits["quantized"].argmax(1) == batches.labels)
    claims = {"data": data, "test_images": len(batches.labels), "accuracy": right}
    claims["structured_macs"] = count.total("structured_macs")
    # The packed file first: it is the smallest, and the trained weights are in it.
    content = _written(
        folder / PACKED, pack_network(model, said, claims | _coded(model, count), name), errors
    )
    slim = slim_network(model)
    # Whoever receives the exported network can only count it as a whole.
    whole = claims | {"structured_macs": count_by_torch(slim)[""]}
    try:
        archive = _written(folder / SLIM, exported(slim, whole), errors)
    except Exception:  # torch raises all kinds; an empty archive cannot be read back, and the verdict says so
        archive = b""
    images = next(iter(batches))[0]
    read_back_parameters, read_back_difference = read_back(archive, slim, images, whole)
    packed = unpack_network(content, partial(make_network, name, logits["quantized"].shape[1])).to(device)
    packed_settings, packed_metrics = read_claims(content)
    logits |= {n: predict(network, batches)[0] for n, network in {"slim": slim, "packed": packed}.items()}
    accuracy = {n: _share(of_network.argmax(1) == batches.labels) for n, of_network in logits.items()}
    dense = without_quantizers(model, stored=True)
    return CompressedRecord(
        images=len(batches.labels),
        dense_parameters=_parameters(dense),
        slim_parameters=_parameters(slim),
        dense_macs=count.total("dense_macs"),
        slim_macs=count_slim_by_torch(slim, count),
        structured_macs=count.total("structured_macs"),
        largest_logit=logits["quantized"].abs().max().item(),
        largest_difference=(logits["quantized"] - logits["slim"]).abs().max().item(),
        agreement=_share(logits["quantized"].argmax(1) == logits["slim"].argmax(1)),
        quantized_accuracy=accuracy["quantized"],
        slim_accuracy=accuracy["slim"],
        packed_accuracy=accuracy["packed"],
        packed_differs=int((logits["quantized"] != logits["packed"]).sum()),
        packed_bytes=len(content),
        float32_bytes=_saved_bytes(without_quantizers(model)),
        slim_bytes=len(archive),
        read_back_parameters=read_back_parameters,
        read_back_difference=read_back_difference,
        latency_seconds=measure_latency({"dense": dense, "fake-quantized": model, "smaller": slim}, images),
        packed_settings=packed_settings,
        packed_metrics=packed_metrics,
        file=recount(content),
    )


def _written(path: Path, content: bytes, errors: list[OutputError]) -> bytes:
    """Write a file; its bytes as they are read back, or as they would have been written."""
    try:
        write_whole(path, content)
    except OutputError as error:
        errors.append(error)
        return content
    return path.read_bytes()


def _coded(model: nn.Module, count: NetworkCount) -> dict[str, Any]:
    """What is claimed of zeros and bits, where a packed file holds every quantized layer in its bits."""
    claims: dict[str, Any] = {"zero_weights": count.total("zero_weights")}
    if all(has_codes(quantizer) for quantizer in quantizers(model).values()):
        claims["mean_bits"] = float(count.mean_bits)
        for kind in ("structured", "unstructured"):
            claims[f"{kind}_bops_ratio"] = ratio(count.total("dense_bops"), count.total(f"{kind}_bops"))
    return {
        name: claim for name, claim in claims.items() if math.isfinite(claim)
    }  # infinite: nothing is left


def _parameters(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def _share(flags: Tensor) -> float:
    return int(flags.sum()) / len(flags)


def _saved_bytes(network: nn.Module) -> int:
    content = io.BytesIO()
    torch.save(network.state_dict(), content)
    return len(content.getvalue())


def exported(network: nn.Module, claims: dict[str, Any] | None = None) -> bytes:
    """Export the network for any batch size, on the CPU, with what is claimed of it.

    Returns: the bytes of torch.export's .pt2 file, with a checksum.
    """
    on_cpu = copy.deepcopy(network).cpu().eval()
    batch = {0: torch.export.Dim("batch")}
    program = torch.export.export(on_cpu, (torch.zeros(2, 3, 32, 32),), dynamic_shapes=(batch,))
    for node in (n for m in program.graph_module.modules() for n in getattr(m, "graph", fx.Graph()).nodes):
        node.meta.pop("stack_trace", None)  # the file goes to others, and this names its maker's folders
    content = io.BytesIO()
    torch.export.save(program, content, extra_files={CLAIMS_FILE: json.dumps(claims or {})})
    return with_checksum(content.getvalue())


@torch.inference_mode()
def read_back(
    content: bytes, network: nn.Module, images: Tensor, claims: dict[str, Any] | None = None
) -> tuple[int, float]:
    """Load an exported file as its receiver would, and hold it against the network that it should be.

    Both predict the first images on the CPU, where the exported network runs.

    Shapes: images (N, 3, 32, 32).
    Returns: the parameters of the file's network, and the largest difference between the two networks'
    logits; 0 and NaN for a file that cannot be read or run, has no checksum or says other things of itself.
    """
    images = images[:READ_BACK_IMAGES].cpu()
    expected = copy.deepcopy(network).cpu()(images)
    try:
        found, received = open_exported(SLIM, content)
        if received.left_out or received.claims != (claims or {}):
            return 0, math.nan
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
