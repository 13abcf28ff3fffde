"""A whole run on a data set of a hundred classes, made in CIFAR-100's format: the real one is not needed."""

import hashlib
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from experiments import cifar, verify
from experiments.cifar import CIFARS
from experiments.debug_run import main
from experiments.preflight import CHECKS

TRAIN, TEST = 1000, 300  # images; the labels run through the hundred classes


def write_cifar100(folder: Path) -> dict[str, str]:
    """Write files whose classes are smooth patterns under noise; their MD5 sums by name."""
    generator = torch.Generator().manual_seed(0)
    patterns = F.interpolate(torch.randn(100, 3, 4, 4, generator=generator), size=(32, 32), mode="bilinear")
    sums = {}
    (folder / "cifar-100-python").mkdir(parents=True)
    for name, count in (("train", TRAIN), ("test", TEST)):
        labels = torch.arange(count) % 100
        noise = 0.5 * torch.randn(count, 3, 32, 32, generator=generator)
        images = (50 * (patterns[labels] + noise) + 127.5).clamp(0, 255).to(torch.uint8).flatten(1).numpy()
        fine = labels.tolist()
        content = pickle.dumps(
            {b"data": images, b"fine_labels": fine, b"coarse_labels": [label // 5 for label in fine]}
        )
        (folder / "cifar-100-python" / name).write_bytes(content)
        sums[name] = hashlib.md5(content).hexdigest()
    return sums


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two epochs, its data checked; they are in data/, and its files in out/."""
    folder = tmp_path_factory.mktemp("cifar100")
    sums = write_cifar100(folder / "data")
    made = replace(
        CIFARS["cifar100"],
        train_files={"train": sums["train"]},
        test_files={"test": sums["test"]},
        sources=(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("experiments.device.keep_freed_memory", lambda keep=True: True)
        patch.setattr("experiments.compressed.LATENCY_RUNS", 1)
        of_data = tuple(check for check in CHECKS if check[0].startswith(("data", "model")))
        patch.setattr("experiments.preflight.CHECKS", of_data)
        patch.setattr("experiments.plots.rendered", lambda *_: b"a picture")
        patch.setitem(cifar.CIFARS, "cifar100", made)
        flags = (
            f"--preset smoke --data cifar100 --limit-train {TRAIN} --limit-test {TEST} --epochs 2 "
            f"--batch-size 200 --threads 1"
        )
        folders = ["--data-dir", str(folder / "data"), "--output-dir", str(folder / "out")]
        main([*flags.split(), "--no-rehearse", *folders])
        yield folder


def test_the_run_has_a_hundred_classes_from_its_first_lines_to_its_files(run: Path) -> None:
    history = json.loads((run / "out" / "history.json").read_text())
    assert history["data"] | {"source": ""} == {
        "name": "CIFAR-100", "source": "", "synthetic": False, "classes": 100,
        "train_images": TRAIN, "test_images": TEST,
    }  # fmt: skip
    assert [c for c in history["preflight"] if c["status"] == "FAIL"] == []
    assert "chance 1 %" in next(c for c in history["verdict"] if c["name"] == "accuracy climbs")["message"]
    assert history["final"]["layers"][-1]["filters"] == 100
    assert history["retest"]["class_images"] == [TEST // 100] * 100


@pytest.mark.parametrize("file", ["compressed.codeq", "slim.pt2"])
def test_its_files_are_verified_on_their_own_data_set_alone(
    run: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    def verified(*data: str) -> tuple[int, str]:
        status = verify.main([str(run / "out" / file), "--data-dir", str(run / "data"), *data])
        return status, capsys.readouterr().out.splitlines()[-1]

    assert verified("--data", "cifar100") == (0, "VERIFIED: what the file says of itself was found")
    status, line = verified("--data", "synthetic")
    assert status == 3 and line.startswith("NOT CHECKED: the accuracy is of CIFAR-100, which is not here")


def test_labels_of_the_twenty_coarse_classes_are_caught_by_name(run: Path, capsys, monkeypatch) -> None:
    files = tuple(check for check in CHECKS if check[0] == "data: files")
    monkeypatch.setattr("experiments.preflight.CHECKS", files)
    monkeypatch.setitem(cifar.CIFARS, "cifar100", replace(cifar.CIFARS["cifar100"], labels=b"coarse_labels"))
    arguments = [
        "--data",
        "cifar100",
        "--limit-train",
        str(TRAIN),
        "--limit-test",
        str(TEST),
        "--threads",
        "1",
    ]
    folders = ["--data-dir", str(run / "data"), "--output-dir", str(run / "coarse")]
    assert main([*arguments, *folders, "--preflight", "only"]) == 1
    assert "training labels are not the files'" in " ".join(capsys.readouterr().out.split())
