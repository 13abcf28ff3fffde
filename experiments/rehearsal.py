"""A rehearsal of what a long run may go through: stopped and resumed in mid-run, its file checked by others.

Both are done within the run, as other processes would do them, and give lines of the verdict.
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from experiments.checkpoint import last_checkpoint, restore
from experiments.compressed import PACKED
from experiments.data import Dataset
from experiments.evaluator import Compression
from experiments.files import OutputError
from experiments.history import SKIP, Check, EpochRecord, History, judge, some
from experiments.received import VERIFIED as HOLDS
from experiments.received import Received, Say, check_file
from experiments.training import Pipeline
from experiments.user_code import first_line
from src.packing import with_claims

RESUMED, VERIFIED = "resumed run is the undisturbed one", "packed file passes experiments.verify"
OneEpoch = Callable[[Pipeline, int], tuple[EpochRecord, Compression]]


def rehearse_resuming(
    undisturbed: Pipeline, spare: Pipeline, record: EpochRecord, one_epoch: OneEpoch, say: Say
) -> tuple[Check, EpochRecord, Compression]:
    """Take the epoch that `record` is of again, from the checkpoint before it, and compare the two.

    `spare` is a copy of the pipeline from before the first epoch: as in a new process, nothing is in it but
    what the checkpoint brings. It is left after that epoch, for the run to go on with. Every rank takes part.

    Returns: what was found, and what the second time gave.
    """
    epoch, processes = record.epoch - 1, spare.step.processes
    try:
        found = last_checkpoint(spare.settings.output_dir, say) if processes.first else None
    except (OutputError, OSError):  # none can be read
        found = None
    checkpoint = processes.broadcast(found)
    if checkpoint is None or checkpoint.epochs != epoch:
        raise OutputError(
            f"--rehearse: {spare.settings.output_dir} has no checkpoint of epoch {epoch} to resume from; "
            f"if it could not be written or read, a line above says why; leave --rehearse out to go without"
        )
    restore(checkpoint, spare.model, spare.step.optimizer)
    again, compression = one_epoch(spare, epoch)
    measured = f"stopped after epoch {epoch}, resumed, and epoch {record.epoch} again: "
    wrong = [
        field.name
        for field in dataclasses.fields(EpochRecord)
        if field.name != "seconds" and getattr(record, field.name) != getattr(again, field.name)
    ]
    tensors, others = _tensors(undisturbed), _tensors(spare)
    wrong += [name for name, tensor in tensors.items() if not _same(tensor, others.get(name))]
    measured += f"{len(tensors)} tensors and the row are equal" if not wrong else f"{some(wrong)} differ"
    say(f"      {measured}")
    if wrong and spare.step.device.type != "cpu":
        return (
            Check(SKIP, RESUMED, f"{measured}; only the CPU repeats itself to the digit"),
            again,
            compression,
        )
    cause = "a state that the checkpoint leaves out, such as a plain attribute of a quantizer"
    return judge(not wrong, RESUMED, measured, cause), again, compression


def rehearse_verifying(history: History, dataset: Dataset, folder: Path, say: Say) -> Check:
    """Check the run's packed file as its receiver would."""
    made, again, name = history.compressed, history.retest, history.settings["model"]
    model = name if ":" in name else ""  # a ResNet's file tells how it is built
    if made is None or again is None:
        return Check(SKIP, VERIFIED, "there is no packed file")
    cause = "a defect in src/packing.py, in what the file says of itself, or in experiments/received.py"
    try:
        received = check_file(folder / PACKED, lambda _: dataset, say, model)
        overlooked = _overlooked(folder, received, dataset, model)
    except Exception as error:  # the verdict names what is broken, and the report is still written
        return judge(False, VERIFIED, first_line(error), cause)
    accuracy = received.found.get("accuracy", math.nan)
    measured = (
        f"{received.result}; accuracy {100 * accuracy:.2f} %, the run's is "
        f"{100 * made.packed_accuracy:.2f} %; "
        f"{received.macs:,} MACs, the run's are {made.dense_macs:,}"
    )
    # Another device may round otherwise, and two logits that are equal to rounding change places.
    close = abs(accuracy - made.packed_accuracy) * made.images <= again.ties + 0.5
    # In a barrier torch counts what is not counted here, so that the two differ by right.
    macs = received.macs == made.dense_macs or bool(history.barriers)
    if overlooked:
        measured += f"; another {some(overlooked)} would be verified too"
    holds = received.result == HOLDS and close and not overlooked
    if holds and not macs:
        cause = "how the dense network's MACs are measured for the record (experiments/compressed.py)"
    return judge(holds and macs, VERIFIED, measured, cause)


def _overlooked(folder: Path, received: Received, dataset: Dataset, model: str) -> list[str]:
    """The claims of the packed file of which others would be verified too.

    A file that claims more of everything that is measured is checked, and each claim has to be found false.
    The data set and its size say what is measured, so that of these the comparison alone is tried.
    """
    least = 1 / max(received.claims.get("test_images", 1), 1)  # one image more
    more = {
        name: value + (1 if isinstance(value, int) else max(least, 0.01 * (1 + abs(value))))
        for name, value in received.claims.items()
        if name != "test_images" and not isinstance(value, str)
    }
    others = received.claims | {"data": "?", "test_images": -1}
    false = dataclasses.replace(received, claims=others).false
    with tempfile.TemporaryDirectory() as place:
        lying = Path(place) / PACKED
        lying.write_bytes(with_claims((folder / PACKED).read_bytes(), received.claims | more))
        false += check_file(lying, lambda _: dataset, lambda _: None, model).false
    return [name for name in received.claims if not any(f.startswith(f"{name} ") for f in false)]


def _tensors(pipeline: Pipeline) -> dict[str, Any]:
    """All that a checkpoint is to restore, by name."""
    state = pipeline.step.optimizer.state_dict()["state"]
    moments = {f"{key} of parameter {i}": value for i, of in state.items() for key, value in of.items()}
    return {**pipeline.model.state_dict(), **moments}


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
