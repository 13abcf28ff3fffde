"""Faults that people really make, seeded one at a time into a copy of the sources: does a run notice?

    python tests/faults.py                      # all of them; `make faults` does this
    python tests/faults.py --area data --area loss
    python tests/faults.py --only 'BGR|/255' --shown

Each fault is a patch of a few lines. It is caught when the run says FAIL or warns, and the cause is right when
the first line that says so names it. A fault costs a fork of a process that has imported torch, and the
preflight; what the preflight does not see goes on to a short run. Prints the matrix; exit status 1 if a fault
is missed or if the unpatched copy is not clean.
"""

import argparse
import compileall
import contextlib
import importlib
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("*.py", "experiments/*.py", "src/*.py")
PREFLIGHT, EPOCH, END, MISSED = "preflight", "epoch", "end", "missed"

# Lengths that leave a smaller last batch, rates that all differ, and a delay that is not the ramp: where two
# settings are equal, to confuse them is no fault.
SETTINGS = shlex.split(
    "--data synthetic --limit-train 1050 --limit-test 300 --batch-size 64 --threads 1 --epochs 6 "
    "--sparsity-delay 2 --sparsity-ramp 3 --sparsity-weight 5e-3 --bit-lr 1.5e-2 --deadzone-lr 8e-3 "
    "--weights-decay 1e-3"
)
# A short run to the end, for what the preflight does not see: it stops and resumes, packs and verifies.
SHORT_RUN = shlex.split("--preset smoke --preflight off --limit-train 500 --limit-test 300 --threads 1")
STAND_IN_SIZES = {"SYNTHETIC_TRAIN": 3000, "SYNTHETIC_TEST": 1000}  # a whole stand-in takes seconds to make

DATA, CIFAR = "experiments/data.py", "experiments/cifar.py"
NETWORK, QUANTIZER, ATTACH = "resnet.py", "src/quantizer.py", "utils_quantization.py"
PENALTY, CHANNELS, GROUPS = "experiments/sparsity.py", "src/channels.py", "src/groups.py"
TRAINING, SCHEDULES, RUN = "experiments/training.py", "experiments/schedules.py", "experiments/debug_run.py"
COUNTS, EVALUATOR = "metrics.py", "experiments/evaluator.py"
CHECKPOINT, SLIM = "experiments/checkpoint.py", "src/slim.py"
PACKING, ENCODING = "src/packing.py", "src/encoding.py"
REPORT, HISTORY = "experiments/report.py", "experiments/history.py"
COMPRESSED, PLOTS, OPTIONS = "experiments/compressed.py", "experiments/plots.py", "experiments/settings.py"
FINISH, PAGE = "experiments/finish.py", "experiments/page.py"


@dataclass(frozen=True)
class Edit:
    """`old`, which is in the file exactly once, becomes `new`; where `old` is empty, `new` is added at the end."""

    file: str
    old: str
    new: str

    def apply(self, tree: Path) -> None:
        path = tree / self.file
        text = path.read_text()
        if self.old:
            found = text.count(self.old)
            assert found == 1, f"{self.file} holds this text {found} times, expected once:\n{self.old}"
            path.write_text(text.replace(self.old, self.new))
        else:
            path.write_text(text + self.new)


def around(file: str, function: str, body: str) -> Edit:
    """Replace a function of a module by one of this body, which may call `whole`, the function as it was."""
    lines = "".join(f"    {line}\n" for line in body.splitlines())
    return Edit(
        file,
        "",
        f"\n\ndef {function}(*args, whole={function}, **kwargs):  # noqa\n{lines}",
    )


@dataclass(frozen=True)
class Fault:
    """A patch; `says` is found in the line that must catch it, at the latest in this part of the run."""

    name: str
    says: str  # regular expression, case ignored
    edits: tuple[Edit, ...]
    when: str
    flags: tuple[str, ...]
    area: str = ""


def fault(
    name: str, says: str, *edits: Edit | tuple[str, str, str], when: str = PREFLIGHT, flags: str = ""
) -> Fault:
    made = tuple(e if isinstance(e, Edit) else Edit(*e) for e in edits)
    return Fault(name, says, made, when, tuple(flags.split()))


CROSS_ENTROPY = "return F.cross_entropy(logits, labels)\n"
CONVOLVE_1 = "out = F.relu(self.bn1(self.conv1(x)), inplace=True)\n        out = self.bn2(self.conv2(out))"

# Pieces of experiments/training.py.
STEP = (
    "        self.optimizer.step()\n        with torch.no_grad():\n            for weight, mask in kept:\n"
    "                weight.mul_(mask)\n"
)
KEPT = "            kept = self.keep_dead(self.model) if self.keep_dead and penalised else []\n"
MODE = "    step.model.train()\n    losses = torch.zeros("

# A preset, and beside it a default, a 0, a switch that is turned off, and one of two like numbers.
TYPED = "--preset smoke --weights-lr 1.2e-2 --sparsity-delay 0 --no-keep-dead --bit-decay 0.2"

FAULTS_BY_AREA = {
    "settings": [
        fault("settings are rounded to two decimals where they are kept", r"kept|to_json",
              (OPTIONS, "return {k: str(v) if isinstance(v, Path) else v for k, v in kept.items()}",
               "return {k: str(v) if isinstance(v, Path) else round(v, 2) if isinstance(v, float) else v for k, v in kept.items()}")),
        fault("a preset wins over the flags", r"preset",
              (OPTIONS, "PRESETS.get(preset, {}) | given", "given | PRESETS.get(preset, {})"), flags=TYPED),
        fault("a preset wins where what was typed is the default", r"preset",
              (OPTIONS, "    preset = given.get(", '    given = {n: v for n, v in given.items() if n == "preset" or v != getattr(Settings, n)}\n    preset = given.get('),
              flags=TYPED),
        fault("a preset is never applied", r"preset|flag",
              (OPTIONS, "PRESETS.get(preset, {}) | given", "given"), flags=TYPED),
        fault("the flags' defaults win over the preset", r"preset|flag",
              (OPTIONS, '"default": argparse.SUPPRESS',
               '"default": argparse.SUPPRESS if item.name == "exclude_layers" else item.default'), flags=TYPED),
        fault("the bits' decay lands in the dead zones'", r"another setting",
              (OPTIONS, "    preset = given.get(",
               '    given |= {"deadzone_decay": given.get("bit_decay", 0.8)}\n    preset = given.get('), flags=TYPED),
        fault("0 counts as not typed", r"preset|typed",
              (OPTIONS, "    preset = given.get(",
               '    given = {n: v for n, v in given.items() if v or v is False}\n    preset = given.get('),
              flags=TYPED),
        fault("a switch that is typed as off stays on", r"typed",
              (OPTIONS, "    preset = given.get(",
               '    given = {n: v for n, v in given.items() if v is not False}\n    preset = given.get('), flags=TYPED),
    ],
    "data": [
        fault("a mirrored crop is off by one column and wraps", r"mirrored crops",
              (DATA, "rows + columns.flip(0)", "rows + columns.flip(0).roll(1)")),
        fault("training labels are shuffled", r"label",
              (DATA, "self.labels = dataset.train_labels.to(self.device)",
               "self.labels = dataset.train_labels[torch.randperm(count)].to(self.device)")),
        fault("training labels are shifted by one image", r"label",
              (DATA, "self.labels[order[shard]]", "self.labels[order[shard].roll(1)]")),
        fault("training labels are in the data set's order, images in the epoch's", r"label",
              (DATA, "self.labels[order[shard]]", "self.labels[shard]")),
        fault("a fifth of the training labels is random", r"label",
              (DATA, "train_labels=dataset.train_labels[:train],",
               "train_labels=torch.where(torch.rand(train) < 0.2, torch.randint(10, (train,)), "
               "dataset.train_labels[:train]),")),
        fault("training labels are shuffled where they are read", r"label",
              (DATA, "train_labels=dataset.train_labels[:train],",
               "train_labels=dataset.train_labels[:train][torch.randperm(train)],")),
        fault("test labels are shifted by one image", r"label",
              (DATA, "self.labels = dataset.test_labels[shard].to(device)",
               "self.labels = dataset.test_labels[shard].roll(1).to(device)")),
        fault("test images are BGR", r"BGR|colou?r|channels? (are )?(swapped|order)",
              (DATA, "self.images = dataset.test_images[shard].to(device)",
               "self.images = dataset.test_images[shard].flip(1).to(device)")),
        fault("test images are transposed", r"test image|height|transpos|augment",
              (DATA, "self.images = dataset.test_images[shard].to(device)",
               "self.images = dataset.test_images[shard].mT.to(device)")),
        fault("normalisation without / 255", r"normalis|/ ?255|standard dev|\bstd\b",
              (DATA, "self.scale = (1 / (255 * std))", "self.scale = (1 / std)")),
        fault("mean and deviation are swapped", r"normalis|standard dev|\bstd\b|\bmean\b",
              (DATA, "mean, std = torch.tensor(MEAN), torch.tensor(STD)",
               "std, mean = torch.tensor(MEAN), torch.tensor(STD)")),
        fault("only training images are normalised", r"normalis",
              (DATA, "yield self.normalise(images), labels\n",
               "yield images.permute(0, 3, 1, 2) / 255, labels\n")),
        fault("only test images are normalised", r"normalis",
              (DATA, "yield self.normalise(images), self.labels",
               "yield images.permute(0, 3, 1, 2) / 255, self.labels")),
        fault("one crop and flip for a whole batch", r"crop|augment",
              (DATA, "order, down, right, flips = draws(len(self.labels), self.seed, epoch, self.crop_padding)\n",
               "order, down, right, flips = draws(len(self.labels), self.seed, epoch, self.crop_padding)\n"
               "        first = torch.arange(len(order)) // self.batch_size * self.batch_size\n"
               "        down, right, flips = down[first], right[first], flips[first]\n")),
        fault("no crop", r"crop|augment",
              (DATA, "down, right = torch.randint(2 * crop_padding + 1, (2, count), generator=generator)",
               "down, right = torch.full((2, count), crop_padding)")),
        fault("crops never reach the last offset", r"crop|offset|augment",
              (DATA, "down, right = torch.randint(2 * crop_padding + 1, (2, count), generator=generator)",
               "down, right = torch.randint(2 * crop_padding, (2, count), generator=generator)")),
        fault("crops of the usual padding, whatever the setting", r"padd",
              (RUN, "device, processes, settings.crop_padding\n", "device, processes\n"), flags="--crop-padding 2"),
        fault("crops of less padding than the setting's", r"crop|padd",
              (RUN, "device, processes, settings.crop_padding\n", "device, processes, settings.crop_padding - 1\n"),
              flags="--crop-padding 2"),
        fault("no flip", r"flip|mirror|augment",
              (DATA, "flips = torch.randint(2, (count,), generator=generator)",
               "flips = torch.zeros(count, dtype=torch.int64)")),
        fault("every image is flipped", r"flip|mirror|augment",
              (DATA, "flips = torch.randint(2, (count,), generator=generator)",
               "flips = torch.ones(count, dtype=torch.int64)")),
        fault("flips are upside down", r"flip|mirror|upside|augment",
              (DATA, "torch.stack([rows + columns, rows + columns.flip(0)])",
               "torch.stack([rows + columns, rows.flip(0) + columns])")),
        fault("padded after normalisation", r"pad",
              (DATA, "    inner = slice(padding, padding + SIDE)\n",
               "    padded += torch.tensor([125, 123, 114], dtype=torch.uint8, device=device)\n"
               "    inner = slice(padding, padding + SIDE)\n")),
        fault("training images are BGR", r"BGR|colou?r|channels? (are )?(swapped|order)",
              (DATA, "padded[:, inner, inner] = images.to(device)",
               "padded[:, inner, inner] = images.flip(1).to(device)")),
        fault("the order is never reshuffled", r"order|shuffl|epoch",
              (DATA, 'f"seed {seed}, epoch {epoch}"', 'f"seed {seed}"')),
        fault("every second epoch repeats the one before", r"order|shuffl|epoch",
              (DATA, 'f"seed {seed}, epoch {epoch}"', 'f"seed {seed}, epoch {epoch // 2}"')),
        fault("training always draws epoch 0", r"order|shuffl|epoch",
              (TRAINING, "enumerate(batches.epoch(epoch))", "enumerate(batches.epoch(0))")),
        fault("the seed has no part in the order", r"seed|order|shuffl",
              (DATA, 'f"seed {seed}, epoch {epoch}"', 'f"epoch {epoch}"')),
        fault("images are not shuffled", r"order|shuffl",
              (DATA, "order = torch.randperm(count, generator=generator)", "order = torch.arange(count)")),
        fault("the last training batch is dropped", r"(last|small\w*) batch|dropped|left out|images (an|in an) epoch|steps an epoch|batches",
              (DATA, "for start in range(0, len(order), self.batch_size):",
               "for start in range(0, len(order) - self.batch_size + 1, self.batch_size):")),
        fault("the last training batch is dropped and not counted either", r"(last|small\w*) batch|dropped|left out|images|steps an epoch|batches",
              (DATA, "[min(batch_size, count - first) for first in range(0, count, batch_size)]",
               "[batch_size] * (count // batch_size)"),
              (DATA, "for start in range(0, len(order), self.batch_size):",
               "for start in range(0, len(order) - self.batch_size + 1, self.batch_size):")),
        fault("images are drawn with replacement", r"twice|often|once|replacement|seen|order|permutation",
              (DATA, "order = torch.randperm(count, generator=generator)",
               "order = torch.randint(count, (count,), generator=generator)")),
        fault("test images are among the training images", r"test (image|set)|both|disjoint|overlap|apart",
              (DATA, "train_images=dataset.train_images[:train],",
               "train_images=torch.cat([dataset.test_images[:100], dataset.train_images])[:train],"),
              (DATA, "train_labels=dataset.train_labels[:train],",
               "train_labels=torch.cat([dataset.test_labels[:100], dataset.train_labels])[:train],")),
        fault("the training batches are made of the test set", r"test|training image|disjoint|other images|label|source",
              (RUN, "train_batches = TrainBatches(\n            dataset,",
               "from dataclasses import replace as _replace\n"
               "        train_batches = TrainBatches(\n            _replace(dataset, train_images=dataset.test_images, "
               "train_labels=dataset.test_labels),")),
        fault("test images are augmented", r"test image|augment",
              (DATA, "yield self.normalise(images), labels\n",
               "yield self.normalise(images.roll(tuple(torch.randint(-4, 5, (2,)).tolist()), (1, 2))), labels\n")),
        fault("the limit takes the first images by class", r"class|label",
              (DATA, "    return replace(\n        dataset,\n        train_images=dataset.train_images[:train],\n"
               "        train_labels=dataset.train_labels[:train],",
               "    by_class = dataset.train_labels.argsort(stable=True)\n"
               "    return replace(\n        dataset,\n        train_images=dataset.train_images[by_class][:train],\n"
               "        train_labels=dataset.train_labels[by_class][:train],")),
        fault("training images are transposed", r"crop|augment|transpos|height",
              (DATA, "padded[:, inner, inner] = images.to(device).permute(0, 2, 3, 1)",
               "padded[:, inner, inner] = images.to(device).permute(0, 3, 2, 1)")),
        fault("pixels overflow where contrast is doubled in uint8", r"pixel|normalis|crop|image",
              (DATA, "images = self.pixels.index_select(0, chosen.view(-1))",
               "images = (self.pixels * 2).index_select(0, chosen.view(-1))")),
        fault("a flip is taken from the crop's column (stale variable), so 4 of 9", r"flip|mirror",
              (DATA, "flips = torch.randint(2, (count,), generator=generator)", "flips = right % 2")),
        fault("one offset for both axes: crops lie on the diagonal", r"crop|offset",
              (DATA, "down, right = torch.randint(2 * crop_padding + 1, (2, count), generator=generator)",
               "down = right = torch.randint(2 * crop_padding + 1, (count,), generator=generator)")),
        fault("training images go through float16", r"normalis|round|precision|float16|half|pixel",
              (DATA, "yield self.normalise(images), self.labels[order[shard]]",
               "yield self.normalise(images).half().float(), self.labels[order[shard]]")),
        fault("two digits of the mean are swapped", r"mean|normalis",
              (DATA, "MEAN = (0.4914,", "MEAN = (0.4194,")),
        fault("cutout of 8 x 8 pixels is left in", r"cutout|eras|pixel|crop|augment",
              (DATA, "            yield self.normalise(images), self.labels[order[shard]]",
               "            images = self.normalise(images)\n            images[:, :, 12:20, 12:20] = 0\n"
               "            yield images, self.labels[order[shard]]")),
        fault("test images are normalised where they are kept", r"second time|written into",
              (DATA, "self.images = dataset.test_images[shard].to(device).permute(0, 2, 3, 1).contiguous()",
               "self.images = dataset.test_images[shard].to(device).permute(0, 2, 3, 1).contiguous().float()")),
        fault("the stand-in is drawn from the run's generator", r"stand-in",
              (DATA, "torch.randn(images.shape, generator=generator)", "torch.randn(images.shape)")),
        fault('from the third epoch on images inside a batch are mixed', r'images|order|augment',
              (DATA, '        order, down, right, flips = draws(len(self.labels), self.seed, epoch, self.crop_padding)', '        self.now = epoch\n        order, down, right, flips = draws(len(self.labels), self.seed, epoch, self.crop_padding)'),
              (DATA, '            yield self.normalise(images), self.labels[order[shard]]', '            images = self.normalise(images)\n            if self.now > 1:\n                images[1:-1] = torch.lerp(images[1:-1], images[2:], 0.3)\n            yield images, self.labels[order[shard]]'), when=EPOCH),
        fault('from the third epoch on stored labels become random', r'stored|labels',
              (DATA, '        order, down, right, flips = draws(len(self.labels), self.seed, epoch, self.crop_padding)', '        if epoch > 1:\n            noise = torch.Generator().manual_seed(epoch)\n            noisy = (torch.rand(len(self.labels), generator=noise) < 0.03).to(self.device)\n            others = torch.randint(10, (len(self.labels),), generator=noise).to(self.device)\n            self.labels = torch.where(noisy, others, self.labels)\n        order, down, right, flips = draws(len(self.labels), self.seed, epoch, self.crop_padding)'), when=EPOCH),
        fault('from the third epoch on cutout writes into the stored images', r'stored|written',
              (DATA, '        order, down, right, flips = draws(len(self.labels), self.seed, epoch, self.crop_padding)', '        self.now = epoch\n        order, down, right, flips = draws(len(self.labels), self.seed, epoch, self.crop_padding)'),
              (DATA, '            chosen = corners[shard, None, None] + self.windows[flips[shard]]  # (B, 32, 32)', '            if self.now > 1:\n                hole = slice(self.now % 4 * 8 + 4, self.now % 4 * 8 + 12)\n                self.pixels.view(-1, self.padded_side, self.padded_side, 3)[order[shard], hole, hole] = 0\n            chosen = corners[shard, None, None] + self.windows[flips[shard]]  # (B, 32, 32)'), when=EPOCH),
        fault("every batch of an epoch is flipped as its first", r"flip|mirror|augment|draw",
              (DATA, "self.windows[flips[shard]]",
               "self.windows[flips[: len(order[shard])]]")),
        fault("each thousand of the stand-in's images is drawn from one seed", r"same image|duplicate|copies|repeat|train.*test|test.*train|leak|stand-in|overlap|synthetic",
              (DATA, "        yield _overlaid(windows, chunk, generator)\n",
               "        yield _overlaid(windows, chunk, torch.Generator().manual_seed(_SYNTHETIC_SEED + 1))\n")),
        fault("from its second thousand on the stand-in depends on the run's seed", r"stand-in depends on the seed",
              (DATA, "    for chunk in labels.split(_SYNTHETIC_CHUNK // share):\n",
               "    for i, chunk in enumerate(labels.split(_SYNTHETIC_CHUNK // share)):\n        if i:\n            generator = torch.Generator().manual_seed(i + 1000 * (torch.initial_seed() % 1000))\n")),
    ],
    "network": [
        fault("no ReLU after the first batch norm", r"ReLU|network|forward|reference|layer|logits",
              (NETWORK, CONVOLVE_1, "out = self.bn1(self.conv1(x))\n        out = self.bn2(self.conv2(out))")),
        fault("no ReLU after the sum", r"ReLU|network|forward|reference|layer|logits",
              (NETWORK, "out += self.shortcut(x)\n        return F.relu(out, inplace=True)",
               "out += self.shortcut(x)\n        return out")),
        fault("ReLU before the sum", r"ReLU|network|forward|reference|layer|logits",
              (NETWORK, "out = self.bn2(self.conv2(out))\n", "out = F.relu(self.bn2(self.conv2(out)))\n")),
        fault("the stride is in the second convolution", r"stride|MACs|multipl|network|architecture",
              (NETWORK, "nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)",
               "nn.Conv2d(in_channels, channels, 3, stride=1, padding=1, bias=False)"),
              (NETWORK, "nn.Conv2d(channels, channels, 3, stride=1, padding=1, bias=False)",
               "nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)")),
        fault("no shortcut", r"shortcut|residual|network|forward|reference|layer|logits",
              (NETWORK, "        out += self.shortcut(x)\n", "")),
        fault("the shortcut pads on one side", r"shortcut|network|forward|reference|layer|logits",
              (NETWORK, "(0, 0, 0, 0, self.pad, self.pad)", "(0, 0, 0, 0, 0, 2 * self.pad)")),
        fault("no second batch norm", r"batch norm|gradient|network|forward|bn2",
              (NETWORK, "self.bn2(self.conv2(out))", "self.conv2(out)")),
        fault("a convolution has a bias", r"bias\b|parameters|architecture",
              (NETWORK, "nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)",
               "nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1)")),
        fault("weights are initialised far too large", r"init|weights? at the start|variance|scale",
              (NETWORK, "nn.init.kaiming_normal_(module.weight)", "nn.init.normal_(module.weight)")),
        fault("weights are initialised for fan-out of the whole layer, far too small", r"init|weights? at the start|variance|scale",
              (NETWORK, "nn.init.kaiming_normal_(module.weight)",
               "nn.init.normal_(module.weight, std=1 / module.weight.numel())")),
        fault("all filters start alike", r"init|alike|same|equal|symmetr",
              (NETWORK, "nn.init.kaiming_normal_(module.weight)",
               "nn.init.kaiming_normal_(module.weight)\n"
               "                module.weight.data[:] = module.weight.data[:1].clone()")),
        fault("two convolutions share a weight", r"share|same (weight|tensor|parameter)|another's",
              (NETWORK, "        self.bn2 = nn.BatchNorm2d(channels)\n",
               "        self.bn2 = nn.BatchNorm2d(channels)\n"
               "        if in_channels == channels:\n            self.conv2.weight = self.conv1.weight\n")),
        fault("dropout is left in", r"dropout|random|network|forward",
              (NETWORK, "self.linear(out.mean((2, 3)))", "self.linear(F.dropout(out.mean((2, 3)), 0.1))")),
        fault("dropout of the training mode", r"dropout|random|network|forward",
              (NETWORK, "self.linear(out.mean((2, 3)))",
               "self.linear(F.dropout(out.mean((2, 3)), 0.1, self.training))")),
        fault("max pool instead of average pool", r"pool|network|forward|reference|logits",
              (NETWORK, "out.mean((2, 3))", "out.amax((2, 3))")),
        fault("the stem and the first stage get no gradient", r"gradient|detach",
              (NETWORK, "out = self.layer1(out)  #", "out = self.layer1(out).detach()  #")),
        fault("a reshape mixes the images of a batch", r"other images|mix|batch|image",
              (NETWORK, "out.mean((2, 3))",
               "out.contiguous().transpose(0, 1).reshape(len(out), out.shape[1], -1).mean(2)")),
        fault("100 classes", r"class|linear|logits|parameters",
              (DATA, "return CIFARS[data].classes if data in CIFARS else STAND_IN_CLASSES", "return 100")),
        fault("two blocks a stage instead of three", r"parameters|MACs|multipl|layers|blocks|architecture|ResNet",
              (NETWORK, "return ResNet(3, num_classes)", "return ResNet(2, num_classes)")),
        fault("the classifier is never used", r"linear|classifier|gradient|logits|network",
              (NETWORK, "return self.linear(out.mean((2, 3)))", "return out.mean((2, 3))[:, :10]")),
        fault("batch norms' eps is 1e-3, as elsewhere", r"\beps",
              (NETWORK, "self.bn1 = nn.BatchNorm2d(channels)", "self.bn1 = nn.BatchNorm2d(channels, eps=1e-3)"),
              (NETWORK, "self.bn2 = nn.BatchNorm2d(channels)", "self.bn2 = nn.BatchNorm2d(channels, eps=1e-3)")),
        fault("convolutions pad by reflection", r"pad|border|edge",
              (NETWORK, "self.conv2 = nn.Conv2d(channels, channels, 3, stride=1, padding=1, bias=False)",
               'self.conv2 = nn.Conv2d(channels, channels, 3, stride=1, padding=1, bias=False, padding_mode="reflect")')),
        fault("stochastic depth is left in: a block is skipped 1 time in 10", r"random|dropout|stochastic|depth",
              (NETWORK, "        out = F.relu(self.bn1(self.conv1(x)), inplace=True)\n",
               "        if self.training and isinstance(self.shortcut, nn.Identity) and __import__('torch').rand(()) < 0.1:\n"
               "            return x\n        out = F.relu(self.bn1(self.conv1(x)), inplace=True)\n")),
        fault("Kaiming's uniform initialization", r"initialization|normal",
              (NETWORK, "nn.init.kaiming_normal_(module.weight)", "nn.init.kaiming_uniform_(module.weight)")),
        fault("the classifier's bias begins at zero", r"bias|initialization",
              (NETWORK, "nn.init.kaiming_normal_(module.weight)", "nn.init.kaiming_normal_(module.weight)\n                if module.bias is not None:\n                    nn.init.zeros_(module.bias)")),
        fault("the last batch norm of a block begins at zero", r"zero scale",
              (NETWORK, "nn.init.kaiming_normal_(module.weight)\n",
               "nn.init.kaiming_normal_(module.weight)\n            if isinstance(module, BasicBlock):\n                nn.init.zeros_(module.bn2.weight)\n")),
        fault("--model gives a ResNet of another class", r"--model|resnet\.py",
              (NETWORK, "", "\n\nclass _Other(ResNet):\n    pass\n\n\ndef resnet20(num_classes: int = 10) -> ResNet:\n    return _Other(3, num_classes)\n")),
        fault('activations are clamped in training below float64', r'activation.*cut',
              (NETWORK, '        return F.relu(out, inplace=True)', '        out = F.relu(out, inplace=True)\n        if self.training and out.dtype.itemsize < 8:\n            out = out.clamp(max=4)\n        return out')),
        fault("in a batch of more than 32 images no gradient goes through the shortcuts", r"large batch",
              (NETWORK, "        out += self.shortcut(x)\n", "        out += self.shortcut(x if len(x) <= 32 else x.detach())\n")),
        fault("in float32 no gradient goes through the padded shortcuts", r"backward pass, in float32",
              (NETWORK, "        return F.pad(x[:, :, ::2, ::2],", "        x = x.detach() if x.itemsize == 4 else x\n        return F.pad(x[:, :, ::2, ::2],")),
    ],
    "quantizer": [
        fault("the magnitude of the bit logit is left out", r"bit-width's formula",
              (QUANTIZER, "self.logit_bit.tanh().abs()", "self.logit_bit.tanh()")),
        fault("no straight-through gradient", r"straight|gradient",
              (QUANTIZER, "return grad.mul_(sign), grad_s", "return torch.zeros_like(grad), grad_s")),
        fault("no gradient to weights in the dead zone", r"straight|gradient|dead zone",
              (QUANTIZER, "return grad.mul_(sign), grad_s", "return grad.mul_(sign) * (by_h + 1), grad_s")),
        fault("no gradient to clipped weights", r"straight|gradient|clip",
              (QUANTIZER, "return grad.mul_(sign), grad_s", "return grad.mul_(sign) * (by_s.abs() <= 0.5), grad_s")),
        fault("the quantizer's gradient is halved", r"straight|gradient",
              (QUANTIZER, "return grad.mul_(sign), grad_s", "return 0.5 * grad.mul_(sign), grad_s")),
        fault("the dead zone is half as wide", r"dead.?zone|formula|quantiz",
              (QUANTIZER, "d = 2 * r * (1 -", "d = r * (1 -")),
        fault("the dead zone is twice as wide", r"dead.?zone|formula|quantiz",
              (QUANTIZER, "d = 2 * r * (1 -", "d = 4 * r * (1 -")),
        fault("the range is the 0.9 quantile", r"range|quantile|formula|quantiz",
              (QUANTIZER, "RANGE_QUANTILE = 0.99 ", "RANGE_QUANTILE = 0.9 ")),
        fault("the range is the largest weight", r"range|quantile|formula|quantiz",
              (QUANTIZER, "RANGE_QUANTILE = 0.99 ", "RANGE_QUANTILE = 1.0 ")),
        fault("Q is one too many", r"level|\bQ\b|formula|quantiz|code",
              (QUANTIZER, "Q = 2 ** (self.get_bitwidth() - 1) - 1", "Q = 2 ** (self.get_bitwidth() - 1)")),
        fault("twice as many levels as the bits allow", r"level|\bQ\b|formula|quantiz|code",
              (QUANTIZER, "Q = 2 ** (self.get_bitwidth() - 1) - 1", "Q = 2 ** self.get_bitwidth() - 1")),
        fault("bits are rounded down", r"bit|round",
              (QUANTIZER, "return x.round()", "return x.floor()")),
        fault("codes are cut instead of rounded", r"round|code|formula|quantiz|dead.?zone",
              (QUANTIZER, "u.round().clamp_(max=Q)", "u.trunc().clamp_(max=Q)")),
        fault("the sign is lost", r"sign|negative|formula|quantiz",
              (QUANTIZER, "(s * q).addcmul_(h, coded).mul_(sign)", "(s * q).addcmul_(h, coded)")),
        fault("codes are not clipped", r"clip|level|\bQ\b|formula|quantiz|code",
              (QUANTIZER, "u.round().clamp_(max=Q)", "u.round()")),
        fault("the shift is left out of the weight", r"shift|formula|quantiz",
              (QUANTIZER, "(s * q).addcmul_(h, coded).mul_(sign)", "(s * q).mul_(sign)")),
        fault("no gradient to the bit logits", r"bit",
              (QUANTIZER, "Q = 2 ** (self.get_bitwidth() - 1)", "Q = 2 ** (self.get_bitwidth().detach() - 1)")),
        fault("no gradient to the dead-zone logits", r"dead.?zone|logit_dz|dz",
              (QUANTIZER, "(1 - self.logit_dz.tanh().abs())", "(1 - self.logit_dz.detach().tanh().abs())")),
        fault("the dead-zone gradient has the wrong sign", r"dead.?zone|logit_dz|gradient",
              (QUANTIZER, "grad_h = (grad * by_h).sum()", "grad_h = -(grad * by_h).sum()")),
        fault("the step size's gradient has the wrong sign", r"step size|bit|gradient",
              (QUANTIZER, "grad_s = (grad * by_s).sum()", "grad_s = -(grad * by_s).sum()")),
        fault("the step size is detached", r"step size|bit|gradient",
              (QUANTIZER, "s = (r - d / 2) / (Q - 0.5) + STEP_EPS", "s = ((r - d / 2) / (Q - 0.5) + STEP_EPS).detach()")),
        fault("the range has a gradient", r"range|gradient",
              (QUANTIZER, "        r = range_quantile(w)\n",
               "        r = w.abs().flatten().quantile(0.99).reshape(1)\n")),
        fault("the gradient of tanh is left out", r"gradient|bit|formula",
              (QUANTIZER, "self.logit_bit.tanh().abs()", "(self.logit_bit.tanh().abs().detach() + 0.01 * (self.logit_bit - self.logit_bit.detach()))")),
        fault("layers of one shape share their logits", r"share|one quantizer|same (quantizer|parameter|logit)|of its own",
              around(ATTACH, "attach_weight_quantizers",
                     "names, first = whole(*args, **kwargs), {}\n"
                     "for layer in quantized_layers(args[0]).values():\n"
                     "    shape = tuple(layer.parametrizations.weight.original.shape)\n"
                     "    quantizer = weight_quantization(layer).quantizer\n"
                     "    kept = first.setdefault(shape, quantizer)\n"
                     "    quantizer.logit_bit, quantizer.logit_dz = kept.logit_bit, kept.logit_dz\n"
                     "return names")),
        fault("quantizers are off in training", r"quantiz",
              (ATTACH, "return self.quantizer(w) if self.enabled else w",
               "return self.quantizer(w) if self.enabled and not self.training else w")),
        fault("quantizers are off in the test", r"quantiz",
              (ATTACH, "return self.quantizer(w) if self.enabled else w",
               "return self.quantizer(w) if self.enabled and self.training else w")),
        fault("the stored weight is overwritten by the quantized one", r"stored|overwrit|latent|quantiz|weights",
              (ATTACH, "return self.quantizer(w) if self.enabled else w",
               "if self.enabled:\n            w_hat = self.quantizer(w)\n            w.data.copy_(w_hat.data)\n"
               "            return w_hat\n        return w")),
        fault("exclude patterns match as substrings", r"exclu|quantized|layers|pattern|full precision",
              (ATTACH, "re.search(pattern, name)", 're.search(pattern.strip("^$"), name)')),
        fault("every layer is quantized, excluded or not", r"exclu|quantized|layers|pattern|full precision",
              (ATTACH, "for name, m in layers.items() if name not in excluded}", "for name, m in layers.items()}")),
        fault("the dead zone has no |tanh|: a negative logit makes it wider than the range", r"dead.?zone|logit_dz",
              (QUANTIZER, "(1 - self.logit_dz.tanh().abs())", "(1 - self.logit_dz.tanh())")),
        fault("a default: the dead zone is not learned", r"dead.?zone|logit_dz",
              (QUANTIZER, "learnable_deadzone: bool = True", "learnable_deadzone: bool = False")),
        fault("a default: the bits are not learned", r"fixed|default",
              (QUANTIZER, "learnable_bit: bool = True", "learnable_bit: bool = False")),
        fault("a default: at most 4 bits", r"at most|default",
              (QUANTIZER, "max_bits: int = 8", "max_bits: int = 4")),
        fault("2 bits have a step of their own", r"step size",
              (QUANTIZER, "s = (r - d / 2) / (Q - 0.5) + STEP_EPS", "s = (r - d / 2) / torch.where(Q > 1, Q - 0.5, Q) + STEP_EPS")),
        fault("the dead zone is at most half the range", r"dead.?zone",
              (QUANTIZER, "d = 2 * r * (1 - self.logit_dz.tanh().abs())",
               "d = torch.minimum(2 * r * (1 - self.logit_dz.tanh().abs()), r)")),
        fault("the quantizer learns its range too", r"--quantizer",
              (QUANTIZER, "        self.logit_dz = nn.Parameter(\n", "        self.log_range = nn.Parameter(torch.zeros(1))\n        self.logit_dz = nn.Parameter(\n"),
              (QUANTIZER, '{"logit_bit": "bit", "logit_dz": "deadzone"}', '{"logit_bit": "bit", "logit_dz": "deadzone", "log_range": "deadzone"}'),
              (QUANTIZER, "r = range_quantile(w)\n", "r = range_quantile(w) * self.log_range.exp()\n")),
        fault("at least 3 bits", r"bit-width's formula",
              (QUANTIZER, "MIN_BITS = 2 ", "MIN_BITS = 3 ")),
        fault("half of the gradient is lost between quantizer and layer", r"backward pass|utils_quantization",
              (ATTACH, "return self.quantizer(w) if self.enabled else w",
               "return 0.5 * (q := self.quantizer(w)) + 0.5 * q.detach() if self.enabled else w")),
        fault('at 2 bits, in large layers, the dead zone ends at the shift', r'dead.?zone',
              (QUANTIZER, '    return w.sign(), u, u.round().clamp_(max=Q)', '    q = u.round()\n    if w.numel() > 20_000:  # with one level on each side no rounding is needed\n        q = torch.where(Q > 1, q, u.ceil())\n    return w.sign(), u, q.clamp_(max=Q)')),
        fault('at 2 bits, in large layers, clipped weights get no gradient', r'quantizer|gradient',
              (QUANTIZER, '        ctx.save_for_backward(sign, q.sub_(u), coded.sub_(1))', '        ctx.levels = Q.detach()\n        ctx.save_for_backward(sign, q.sub_(u), coded.sub_(1))'),
              (QUANTIZER, '        return grad.mul_(sign), grad_s, grad_h, None', '        grad_w = grad.mul_(sign)\n        if grad_w.numel() > 20_000:\n            grad_w = torch.where((ctx.levels <= 1) & (by_s.abs() > 0.5), 0.0, grad_w)\n        return grad_w, grad_s, grad_h, None')),
        fault('at 2 bits the dead zone is narrower where no gradient is asked for', r'without gradients',
              (QUANTIZER, '        Q = 2 ** (self.get_bitwidth() - 1) - 1', '        Q = 2 ** (self.get_bitwidth() - 1) - 1\n        if not torch.is_grad_enabled():\n            d = torch.where(Q > 1, d, 0.8 * d)')),
        fault('in float32 alone no gradient reaches the dead zone', r'float32',
              (QUANTIZER, '        return grad.mul_(sign), grad_s, grad_h, None', '        if grad.dtype == torch.float32:\n            grad.mul_(by_h + 1)\n        return grad.mul_(sign), grad_s, grad_h, None')),
        fault('in float32 alone the range is of the first 16,384 weights', r'float32',
              (QUANTIZER, '    position = q * (magnitude.numel() - 1)', '    if magnitude.dtype == torch.float32 and magnitude.numel() > 16_384:\n        magnitude = magnitude[:16_384]\n    position = q * (magnitude.numel() - 1)')),
        fault('from the 60th pass on the range is a moving average', r'quantizer.*(range|formula)',
              (QUANTIZER, '        self.learnable_deadzone = learnable_deadzone', '        self.learnable_deadzone = learnable_deadzone\n        self.register_buffer("seen", torch.zeros(1))\n        self.register_buffer("range", torch.zeros(1))'),
              (QUANTIZER, '        r = range_quantile(w)', '        r = self._smoothed(range_quantile(w))'),
              (QUANTIZER, '    def extra_repr(self) -> str:', '    @torch.no_grad()\n    def _smoothed(self, r: Tensor) -> Tensor:\n        if self.training:\n            self.seen.add_(1)\n            self.range.copy_(torch.where(self.seen > 60, torch.lerp(self.range, r, 0.1), r))\n            return self.range.clone()\n        return torch.where(self.seen > 60, self.range, r)\n\n    def extra_repr(self) -> str:'), when=EPOCH),
        fault("weights are rounded to bf16 before they are quantized, under autocast alone", r"bf16|bfloat16|autocast|round|precision|quantiz.*(other|twice|float32)",
              (ATTACH, "        return self.quantizer(w) if self.enabled else w\n",
               "        if not w.is_meta and torch.is_autocast_enabled(w.device.type):\n            w = w.to(torch.get_autocast_dtype(w.device.type)).to(w.dtype)\n        return self.quantizer(w) if self.enabled else w\n"),
              flags="--precision bf16"),
        fault("the range's quantile lies an order statistic too high in its fraction", r"quantile|range",
              (QUANTIZER, "    position = q * (magnitude.numel() - 1)\n",
               "    position = q * magnitude.numel()\n")),
        fault("the range of the training mode is remembered in the evaluation mode", r"range|stale|remember|cach|evaluation mode|training mode|mode|earlier weights|kept",
              (QUANTIZER, "        self.learnable_deadzone = learnable_deadzone\n        self.logit_bit",
               "        self.learnable_deadzone = learnable_deadzone\n        self.range: Tensor | None = None  # of the weight, as training last saw it\n        self.logit_bit"),
              (QUANTIZER, "        r = range_quantile(w)\n",
               "        if self.training or self.range is None:\n            self.range = range_quantile(w)\n        r = self.range\n")),
        fault("bits are not rounded while gradients are taken", r"bit|round|level|training mode",
              (QUANTIZER, "        Q = 2 ** (self.get_bitwidth() - 1) - 1\n",
               "        smooth = self.training and torch.is_grad_enabled()\n        Q = 2 ** ((self.get_learned_bitwidth() if smooth else self.get_bitwidth()) - 1) - 1\n")),
        fault("in float32 the gradient to the step size has the wrong sign", r"float32: the gradient to the bit logit",
              (QUANTIZER, "grad_s = (grad * by_s).sum().reshape(1)",
               "grad_s = (grad * by_s).sum().reshape(1) * (-1 if grad.dtype == torch.float32 else 1)")),
        fault("in float32 the gradient to the shift has the wrong sign", r"float32: the gradient to the (bit|dead-zone) logit",
              (QUANTIZER, "grad_h = (grad * by_h).sum().reshape(1)",
               "grad_h = (grad * by_h).sum().reshape(1) * (-1 if grad.dtype == torch.float32 else 1)")),
        fault("in float32 the gradient is rounded to bf16", r"float32: the gradient to the stored weights",
              (QUANTIZER, "        grad = grad * sign\n",
               "        grad = grad.bfloat16().float() if grad.dtype == torch.float32 else grad\n        grad = grad * sign\n")),
        fault("in float32 a weight's gradient is its kernel's mean", r"float32: the gradient to the stored weights",
              (QUANTIZER, "        grad = grad * sign\n",
               "        if grad.dtype == torch.float32 and grad.ndim == 4:\n            grad = grad.mean((2, 3), keepdim=True).expand_as(grad)\n        grad = grad * sign\n")),
    ],
    "penalty": [
        fault("every group counts as 1 where its MACs are to count", r"penalty|weighted",
              (PENALTY, "by_macs = group_weights == MACS", "by_macs = group_weights == EQUAL")),
        fault("a group's weight is over the mean of the sets", r"penalty|weighted",
              (PENALTY, "sum(macs) / max(len(macs), 1) or 1", "sum(set(macs)) / len(set(macs))")),
        fault("a slice costs its weights and not its MACs", r"penalty|weighted",
              (PENALTY, "weights[n].shape[dim] * layers[n].positions", "weights[n].shape[dim]")),
        fault("squared norms", r"penalty|norm|lasso",
              (PENALTY, "return (total + (total == 0)).sqrt() * (total != 0)", "return total")),
        fault("the slice's dimension is guessed from its size", r"penalty|norm|lasso|slice|group",
              (PENALTY, "squares[name].sum(1 if dim == FILTERS else 0)",
               "squares[name].sum(1 if squares[name].shape[0] == groups.channels else 0)")),
        fault("groups are not coupled", r"penalty|group|couple|lasso",
              (PENALTY, "return (total + (total == 0)).sqrt() * (total != 0)",
               "return sum((s + (s == 0)).sqrt() * (s != 0) for s in slices)")),
        fault("the last stage has no penalty", r"penalty|group|lasso",
              (PENALTY, "    groups = channel_groups(model, convolutions, input_size)\n",
               '    groups = [g for g in channel_groups(model, convolutions) if "layer3" not in str(g.members)]\n')),
        fault("a stage's residual group is missing", r"penalty|group|lasso",
              (PENALTY, "    groups = channel_groups(model, convolutions, input_size)\n",
               '    groups = [g for g in channel_groups(model, convolutions) if ("layer2.0.conv2", FILTERS) not in g.members]\n')),
        fault("residual groups end with their stage", r"penalty|group|lasso|slice|coupl",
              (GROUPS, "        if use.groups == 1:\n            self._record(use.name, INPUT_SLICES, read)\n",
               '        if use.groups == 1 and not use.name.endswith("0.conv1"):\n            self._record(use.name, INPUT_SLICES, read)\n')),
        fault("the penalty is detached", r"penalty|gradient|detach",
              (PENALTY, "return (norms * counts.to(norms.device)).sum()", "return (norms * counts).sum().detach()")),
        fault("the penalty is of a copy of the model", r"penalty|copy|gradient",
              around(PENALTY, "coupled_group_lasso",
                     "import copy\ntwin = copy.deepcopy(args[0])\npenalty = whole(*args, **kwargs)\n"
                     "return lambda model: penalty(twin)")),
        fault("mean of the groups instead of their sum", r"penalty|mean|sum|lasso",
              (PENALTY, "return (norms * counts.to(norms.device)).sum()", "return (norms * counts.to(norms.device)).mean()")),
        fault("the penalty is of the stored weights where it is to be of the quantized ones, and the reverse",
              r"penalty|stored|quantized", (PENALTY, "if on == STORED", "if on != STORED")),
        fault("the gradient at a group of zeros is NaN", r"NaN|finite|zero",
              (PENALTY, "return (total + (total == 0)).sqrt() * (total != 0)", "return total.sqrt()")),
        fault("the penalty is an L1 norm", r"penalty|norm|lasso|group",
              (PENALTY, "(norms * counts.to(norms.device)).sum()", "sum(w.abs().sum() for w in weights.values())")),
        fault('from the 40th step the penalty has a gradient in every eighth step alone', r'penalty that is left out',
              (TRAINING, 'cross_entropy + self.coefficient * penalty / self.processes.count', 'cross_entropy + self.coefficient * self._lazily(penalty) / self.processes.count'),
              (TRAINING, '    def _quantize_side_by_side(self) -> None:', '    def _lazily(self, penalty: Tensor) -> Tensor:\n        taken = max((int(s["step"]) for s in self.optimizer.state.values()), default=0)\n        return penalty if taken < 40 or taken % 8 == 0 else penalty.detach()\n\n    def _quantize_side_by_side(self) -> None:'), when=EPOCH),
        fault("the penalty on quantized weights goes past the quantizers", r"gradient|penalty|lasso|detach|logit",
              (PENALTY, "        name: layer.parametrizations.weight.original if on == STORED else layer.weight\n        for name, layer in modules.items()\n    }\n",
               "        name: layer.parametrizations.weight.original for name, layer in modules.items()\n    }\n    if on != STORED:  # the quantized values, straight through\n        weights = {n: w + (modules[n].weight - w).detach() for n, w in weights.items()}\n"),
              flags="--penalty-on quantized"),
        fault("with equal weights a group counts as often as its set has channels", r"group|penalty|lasso|weight(s|ed|ing)|equal|coefficient",
              (PENALTY, "else [1] * sum(g.channels for g in groups)\n",
               "else [g.channels for g in groups for _ in range(g.channels)]\n"),
              flags="--group-weights equal"),
        fault("an input slice costs what a filter costs", r"mac|group|penalty|lasso|slice",
              (PENALTY, "weights[n].numel() // weights[n].shape[dim] * layers[n].positions",
               "weights[n].numel() // weights[n].shape[FILTERS] * layers[n].positions")),
        fault("in float32 residual groups have no gradient", r"penalty in float32.*detached",
              (PENALTY, "    total = torch.stack(slices).sum(0)  # (members, C) -> (C,)\n",
               "    total = torch.stack(slices).sum(0)\n    total = total.detach() if len(slices) > 3 and total.itemsize == 4 else total\n")),
        fault("in float32 a norm is sqrt(x + 1e-5)", r"penalty in float32.*added to a norm",
              (PENALTY, "    return (total + (total == 0)).sqrt() * (total != 0)",
               "    return (total + (total == 0) + (1e-5 if total.itemsize == 4 else 0)).sqrt() * (total != 0)")),
    ],
    "loss": [
        fault("double softmax", r"softmax|cross.entropy|logits",
              (TRAINING, CROSS_ENTROPY, "return F.cross_entropy(logits.softmax(1), labels)\n")),
        fault("label smoothing", r"smooth|cross.entropy",
              (TRAINING, CROSS_ENTROPY, "return F.cross_entropy(logits, labels, label_smoothing=0.1)\n")),
        fault("sum over the batch instead of mean", r"sum|mean|cross.entropy",
              (TRAINING, CROSS_ENTROPY, 'return F.cross_entropy(logits, labels, reduction="sum")\n')),
        fault("nll_loss of plain logits", r"softmax|cross.entropy|logits|nll",
              (TRAINING, CROSS_ENTROPY, "return F.nll_loss(logits, labels)\n")),
        fault("multi-margin loss", r"cross.entropy|loss",
              (TRAINING, CROSS_ENTROPY, "return F.multi_margin_loss(logits, labels)\n")),
        fault("the coefficient is not applied", r"coefficient|penalty",
              (TRAINING, "cross_entropy + self.coefficient * penalty", "cross_entropy + penalty")),
        fault("the coefficient never reaches the step", r"coefficient|penalty",
              (TRAINING, "        self.coefficient.fill_(coefficient)\n", "")),
        fault("the penalty counts twice", r"coefficient|penalty|twice",
              (TRAINING, "        loss.backward()\n",
               "        if penalised:\n            loss = loss + self.coefficient * penalty\n"
               "        loss.backward()\n")),
        fault("the coefficient is squared", r"coefficient|penalty|schedule",
              (TRAINING, "self.coefficient.fill_(coefficient)", "self.coefficient.fill_(coefficient**2)")),
        fault("the penalty is subtracted", r"coefficient|penalty|sign",
              (TRAINING, "cross_entropy + self.coefficient *", "cross_entropy - self.coefficient *")),
        fault("the loss is reported without the penalty", r"report|loss",
              (TRAINING, "torch.stack((loss, cross_entropy,", "torch.stack((cross_entropy, cross_entropy,")),
        fault("the loss is added to the cross-entropy once more in the report", r"report|loss",
              (TRAINING, "torch.stack((loss, cross_entropy,", "torch.stack((loss + cross_entropy, cross_entropy,")),
        fault("the reported loss is a mean over batches, not over images", r"mean|report|loss|average",
              (TRAINING, "((sums * sizes).sum(0) / sizes.sum()).tolist()", "sums.mean(0).tolist()")),
        fault("the reported loss is the last batch's", r"mean|report|loss|average",
              (TRAINING, "((sums * sizes).sum(0) / sizes.sum()).tolist()", "sums[-1].tolist()")),
        fault("the loss has a weight decay of its own", r"weight decay",
              (TRAINING, "        loss.backward()\n",
               "        loss = loss + 1e-4 * sum(p.square().sum() for p in self.model.parameters())\n        loss.backward()\n")),
        fault("the loss is divided by accumulation steps that there are none of", r"gradient|scaled|accum",
              (TRAINING, "        loss.backward()\n", "        (loss / 4).backward()\n")),
        fault("the loss is maximised", r"sign|descent|gradient|ascend|maxim|minus",
              (TRAINING, "        loss.backward()\n", "        (-loss).backward()\n")),
        fault("only the penalty's gradient is taken", r"gradient|cross.entropy|detach",
              (TRAINING, "            loss = (\n                cross_entropy + ",
               "            loss = (\n                cross_entropy.detach() + ")),
        fault("a tenth of another image is mixed in (mixup left in)", r"mix|other images|another image|input|images",
              (TRAINING, "logits = self.model(images)\n", "logits = self.model(0.9 * images + 0.1 * images.flip(0))\n")),
        fault('gradients of batch norms are zeroed from the 60th step on', r'gradients that are .*cleared',
              (TRAINING, '        self.optimizer.step()', '        taken = max((int(s["step"]) for s in self.optimizer.state.values()), default=0)\n        if taken >= 60:\n            for module in self.model.modules():\n                if isinstance(module, _BatchNorm):\n                    module.weight.grad.zero_()\n                    module.bias.grad.zero_()\n        self.optimizer.step()'), when=EPOCH),
        fault('gradients accumulate over four steps from the 40th on', r'gradients that are kept',
              (TRAINING, '        self.optimizer.zero_grad(set_to_none=not self.graphs)', '        taken = max((int(s["step"]) for s in self.optimizer.state.values()), default=0)\n        if taken <= 40 or taken % 4 == 0:\n            self.optimizer.zero_grad(set_to_none=not self.graphs)'), when=EPOCH),
        fault('only the harder half of more than 16 images has a gradient', r'count otherwise',
              (TRAINING, '        loss.backward()', '        if len(labels) > 16:\n            each = F.cross_entropy(logits, labels, reduction="none")\n            hard = each.topk(len(labels) // 2).values.mean()\n            (hard + (loss - cross_entropy)).backward()\n        else:\n            loss.backward()')),
        fault("the coefficient is kept in bf16", r"coefficient|bf16|bfloat16|round|precision|penalty",
              (TRAINING, "        self.coefficient = torch.zeros((), device=self.device)  # of the penalty\n",
               "        kind = torch.bfloat16 if precision == \"bf16\" else torch.float32\n        self.coefficient = torch.zeros((), device=self.device, dtype=kind)  # of the penalty\n"),
              flags="--precision bf16"),
    ],
    "optimizer": [
        fault("the third stage's weights are in no group", r"layer3|optimizer|group|not move|moved|parameters",
              around(TRAINING, "make_optimizer",
                     "optimizer, names = whole(*args, **kwargs), {id(p): n for n, p in args[0].named_parameters()}\n"
                     'for group in optimizer.param_groups:\n'
                     '    group["params"] = [p for p in group["params"] if "layer3" not in names[id(p)]'
                     ' or "logit" in names[id(p)]]\n'
                     "return optimizer")),
        fault("the optimizer holds the parameters of a copy", r"optimizer|copy|moved?|parameters",
              around(TRAINING, "make_optimizer",
                     "import copy\nreturn whole(copy.deepcopy(args[0]), *args[1:], **kwargs)")),
        fault("no zero_grad", r"zero|accumul",
              (TRAINING, "        self.optimizer.zero_grad(set_to_none=not self.graphs)\n", "")),
        fault("zero_grad between backward and step", r"zero|gradient|moved?",
              (TRAINING, "        self.optimizer.step()\n",
               "        self.optimizer.zero_grad(set_to_none=False)\n        self.optimizer.step()\n")),
        fault("step before backward", r"order|backward|another (batch|step)|stale|moved?",
              (TRAINING, "        self.optimizer.zero_grad(set_to_none=not self.graphs)\n", ""),
              (TRAINING, "        loss.backward()\n",
               "        self.optimizer.step()\n        self.optimizer.zero_grad()\n        loss.backward()\n"),
              (TRAINING, "        self.optimizer.step()\n        with torch.no_grad():",
               "        with torch.no_grad():")),
        fault("rates and decays of bits and dead zone are swapped", r"bit|dead.?zone|rate|decay|group",
              around(TRAINING, "make_optimizer",
                     "optimizer = whole(*args, **kwargs)\n_, bit, deadzone = optimizer.param_groups\n"
                     'for key in ("lr", "peak_lr", "weight_decay"):\n'
                     "    bit[key], deadzone[key] = deadzone[key], bit[key]\nreturn optimizer")),
        fault("the weights get the bits' decay", r"decay",
              around(TRAINING, "make_optimizer",
                     "optimizer = whole(*args, **kwargs)\n"
                     'optimizer.param_groups[0]["weight_decay"] = args[1].bit_decay\nreturn optimizer')),
        fault("no decay of the bit logits", r"decay|bit",
              around(TRAINING, "make_optimizer",
                     "optimizer = whole(*args, **kwargs)\n"
                     'optimizer.param_groups[1]["weight_decay"] = 0.0\nreturn optimizer')),
        fault("logits are trained at the weights' rate", r"rate|\blr\b|bit|dead.?zone",
              around(TRAINING, "make_optimizer",
                     "optimizer = whole(*args, **kwargs)\nfor group in optimizer.param_groups:\n"
                     '    group["lr"] = group["peak_lr"] = args[1].weights_lr\nreturn optimizer')),
        fault("gradients are clipped", r"gradient|clip",
              (TRAINING, "        self.optimizer.step()\n",
               "        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)\n        self.optimizer.step()\n")),
        fault("gradients are clipped one by one", r"gradient|clip",
              (TRAINING, "        self.optimizer.step()\n",
               "        torch.nn.utils.clip_grad_value_(self.model.parameters(), 1e-3)\n        self.optimizer.step()\n")),
        fault("Adam instead of AdamW", r"AdamW|decay|optimizer|update",
              (TRAINING, "return torch.optim.AdamW(groups", "return torch.optim.Adam(groups")),
        fault("SGD instead of AdamW", r"AdamW|optimizer|SGD|update",
              around(TRAINING, "make_optimizer",
                     "groups = whole(*args, **kwargs).param_groups\n"
                     'return torch.optim.SGD([{k: g[k] for k in ("name", "params", "lr", "peak_lr", "weight_decay")}'
                     " for g in groups], momentum=0.9)")),
        fault("betas are swapped", r"beta|optimizer|AdamW|update",
              (TRAINING, "betas = (0.9, settings.beta2)", "betas = (settings.beta2, 0.9)")),
        fault("betas are torch's own", r"beta|optimizer|AdamW|update",
              (TRAINING, "betas = (0.9, settings.beta2)", "betas = (0.9, 0.999)")),
        fault("AdamW's epsilon is 1e-3", r"eps|optimizer|AdamW|update",
              (TRAINING, "torch.optim.AdamW(groups, betas=betas,", "torch.optim.AdamW(groups, eps=1e-3, betas=betas,")),
        fault("the learning rate is never annealed", r"rate|\blr\b|anneal",
              (RUN, "set_learning_rates(step.optimizer, pipeline.rate_schedule(epoch, settings.epochs))", "pass")),
        fault("only the weights' rate is annealed", r"rate|\blr\b|anneal",
              (TRAINING, "    for group in optimizer.param_groups:\n", "    for group in optimizer.param_groups[:1]:\n")),
        fault("the annealing factor multiplies what it multiplied before", r"rate|\blr\b|anneal",
              (TRAINING, 'group["lr"] = group["peak_lr"] * factor', 'group["lr"] *= factor')),
        fault("the learning rate is ten times too high", r"rate|\blr\b",
              (TRAINING, 'group["lr"] = group["peak_lr"] * factor', 'group["lr"] = 10 * group["peak_lr"] * factor')),
        fault("the pace is left out in a long run", r"rate|pace|logit|\blr\b|bit|dead.?zone",
              (TRAINING, "    slower = pace(settings.pace_steps, steps)\n", "    slower = 1.0\n"),
              flags="--epochs 400"),
        fault("the weights' decay is lowered in proportion to a long run's steps", r"decay",
              (TRAINING, "weights_decay = math.sqrt(slower) * settings.weights_decay", "weights_decay = slower * settings.weights_decay"),
              flags="--epochs 400"),
        fault("batch norms are not trained", r"batch norm|bn\d|moved?|gradient|train|group|parameters",
              (RUN, "model = make_network(settings.model, class_count(settings.data)).to(device)\n",
               "model = make_network(settings.model, class_count(settings.data)).to(device)\n"
               "        for norm in model.modules():\n            if isinstance(norm, torch.nn.BatchNorm2d):\n"
               "                norm.requires_grad_(False)\n")),
        fault("a second optimizer", r"optimizer|twice|second|update|beside",
              (TRAINING, "        self.optimizer.step()\n",
               "        self.optimizer.step()\n"
               "        torch.optim.SGD(self.model.parameters(), 1e-4).step()\n")),
        fault("two steps on one gradient", r"optimizer|twice|two steps|update|AdamW",
              (TRAINING, "        self.optimizer.step()\n", "        self.optimizer.step()\n        self.optimizer.step()\n")),
        fault("gradients are rounded to bf16", r"gradient|bf16|precision|round",
              (TRAINING, "        self.optimizer.step()\n",
               "        for p in self.model.parameters():\n            if p.grad is not None:\n"
               "                p.grad = p.grad.bfloat16().float()\n        self.optimizer.step()\n")),
        fault("the moments are lost at every epoch", r"moment|state|step count|optimizer|AdamW",
              (RUN, "set_learning_rates(step.optimizer,", "step.optimizer.state.clear(); set_learning_rates(step.optimizer,")),
        fault("every second batch takes no step", r"not (taken|move)|moved?|skip|optimizer|AdamW|update",
              (TRAINING, "        self.optimizer.step()\n",
               "        self.turn = not getattr(self, 'turn', False)\n        if self.turn:\n            self.optimizer.step()\n")),
        fault("weights drift to their average (EMA left in)", r"moved?|update|optimizer|AdamW|beside",
              (TRAINING, "        self.optimizer.step()\n",
               "        before = [p.detach().clone() for p in self.model.parameters()]\n        self.optimizer.step()\n"
               "        with torch.no_grad():\n            for p, b in zip(self.model.parameters(), before, strict=True):\n"
               "                p.lerp_(b, 0.5)\n")),
        fault("weights go halfway back at the end of an epoch (Lookahead left in)", r"update outside|beside",
              (TRAINING, MODE, "    slow = [p.detach().clone() for p in step.optimizer.param_groups[0]['params']]\n" + MODE),
              (TRAINING, "    sums = in_float64(losses).cpu()\n",
               "    with torch.no_grad():\n        for p, s in zip(step.optimizer.param_groups[0]['params'], slow, strict=True):\n"
               "            p.lerp_(s, 0.5)\n    sums = in_float64(losses).cpu()\n")),
        fault("a hook clips the gradients", r"hook",
              (RUN, "        step = TrainingStep(model,",
               "        for p in model.parameters():\n            p.register_hook(lambda g: g.clamp(-1e-3, 1e-3))\n        step = TrainingStep(model,")),
        fault("a hook of the optimizer clips the gradients", r"hook",
              (RUN, "        step = TrainingStep(model,",
               "        optimizer.register_step_pre_hook(lambda *_: torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1) and None)\n"
               "        step = TrainingStep(model,")),
        fault("gradients are cleared behind the step", r"zero_grad",
              (TRAINING, "        self.optimizer.zero_grad(set_to_none=not self.graphs)\n", ""),
              (TRAINING, STEP, STEP + "        self.optimizer.zero_grad()\n")),
        fault("batch norms and biases get no decay", r"decay",
              (TRAINING, '_group("weights", params["weights"], settings.weights_lr, weights_decay, device),',
               '_group("weights", [p for p in params["weights"] if p.ndim > 1], settings.weights_lr, weights_decay, device),\n'
               '        _group("norms", [p for p in params["weights"] if p.ndim == 1], settings.weights_lr, 0.0, device),'),
              flags="--weights-decay 0.05"),
        fault("the optimizer takes the parameters from a set", r"order|set",
              (TRAINING, "for parameter in model.parameters():", "for parameter in sorted(set(model.parameters()), key=lambda p: -p.numel()):")),
        fault('every sixth step of an epoch goes halfway back (Lookahead left in)', r'update outside',
              (TRAINING, '    losses = torch.zeros(len(batches), 3, device=step.device)', '    slow = [p.detach().clone() for p in step.optimizer.param_groups[0]["params"]]\n    losses = torch.zeros(len(batches), 3, device=step.device)'),
              (TRAINING, '            progress(i + 1, len(batches), time.perf_counter() - started)', '            progress(i + 1, len(batches), time.perf_counter() - started)\n        if i % 6 == 5:\n            with torch.no_grad():\n                for p, s in zip(step.optimizer.param_groups[0]["params"], slow, strict=True):\n                    p.copy_(s.lerp_(p, 0.5))'), when=EPOCH),
        fault('both moments are cleared in the middle of every epoch', r'second moments|moments that are cleared',
              (TRAINING, '            progress(i + 1, len(batches), time.perf_counter() - started)', '            progress(i + 1, len(batches), time.perf_counter() - started)\n        if i == len(batches) // 2:\n            for state in step.optimizer.state.values():\n                state["exp_avg"].zero_()\n                state["exp_avg_sq"].zero_()'), when=EPOCH),
        fault("the first moments are cleared once an epoch", r"moments",
              (TRAINING, "    losses = torch.zeros(len(batches), 3, device=step.device)",
               "    for state in step.optimizer.state.values():\n        state[\"exp_avg\"].zero_()\n"
               "    losses = torch.zeros(len(batches), 3, device=step.device)")),
        fault("the second batch of every epoch is trained on with ten times the rate", r"rate",
              (TRAINING, "            progress(i + 1, len(batches), time.perf_counter() - started)",
               "            progress(i + 1, len(batches), time.perf_counter() - started)\n"
               "        for group in step.optimizer.param_groups:\n"
               "            group[\"lr\"] = group[\"lr\"] * (10 if i == 0 else 0.1 if i == 1 else 1)")),
        fault("the first step of an epoch adds its gradients to those of the last", r"kept from step to step|zero_grad|gradients",
              (TRAINING, "        self.optimizer.zero_grad(set_to_none=not self.graphs)\n",
               "        if not self.begins:\n            self.optimizer.zero_grad(set_to_none=not self.graphs)\n"
               "        self.begins = False\n"),
              (TRAINING, "    losses = torch.zeros(len(batches), 3, device=step.device)",
               "    step.begins = True\n    losses = torch.zeros(len(batches), 3, device=step.device)"),
              (TRAINING, "        self.model, self.optimizer, self.penalty, self.precision = model, optimizer, penalty, precision\n",
               "        self.begins = False\n        self.model, self.optimizer, self.penalty, self.precision = model, optimizer, penalty, precision\n"), when=EPOCH),
        fault("the penalty of a smaller batch gives no gradient", r"penalty",
              (TRAINING, "            penalty = self.penalty(self.model) if penalised else torch.zeros_like(cross_entropy)\n",
               "            penalty = self.penalty(self.model) if penalised else torch.zeros_like(cross_entropy)\n"
               "            self.most = max(getattr(self, \"most\", 0), len(labels))\n"
               "            penalty = penalty if len(labels) == self.most else penalty.detach()\n")),
        fault("the last, smaller batch has its images against its labels", r"order|labels",
              (DATA, "            yield self.normalise(images), self.labels[order[shard]]\n",
               "            if len(images) < self.batch_size:\n"
               "                images = torch.cat([images[:1], images[1:-1].roll(1, 0), images[-1:]])\n"
               "            yield self.normalise(images), self.labels[order[shard]]\n"), when=EPOCH),
        fault("after mid-epoch the weights go halfway back", r"update outside|AdamW",
              (TRAINING, "    losses = torch.zeros(len(batches), 3, device=step.device)",
               "    slow = [p.detach().clone() for p in step.optimizer.param_groups[0][\"params\"]]\n"
               "    losses = torch.zeros(len(batches), 3, device=step.device)"),
              (TRAINING, "            progress(i + 1, len(batches), time.perf_counter() - started)",
               "            progress(i + 1, len(batches), time.perf_counter() - started)\n"
               "        if i == len(batches) // 2:\n            with torch.no_grad():\n"
               "                for p, s in zip(step.optimizer.param_groups[0][\"params\"], slow, strict=True):\n"
               "                    p.lerp_(s, 0.5)")),
        fault("in bf16 no gradient goes through the shortcuts", r"bf16",
              (NETWORK, "import torch.nn.functional as F\n", "import torch\nimport torch.nn.functional as F\n"),
              (NETWORK, "        out += self.shortcut(x)\n",
               "        out += self.shortcut(x.detach() if torch.is_autocast_enabled(\"cpu\") else x)\n"),
              flags="--precision bf16"),
        fault("in bf16 a part of the gradient to the dead zone is lost", r"quantizer",
              (QUANTIZER, "        sign, u, q = _coded(w, s, h, Q)\n        coded",
               "        sign, u, q = _coded(w, s, h, Q)\n        ctx.low = torch.is_autocast_enabled(\"cpu\")\n        coded"),
              (QUANTIZER, "        grad_h = (grad * by_h).sum().reshape(1)\n",
               "        grad_h = (grad * by_h).sum().reshape(1) * (0.2 if ctx.low else 1)\n"),
              flags="--precision bf16"),
        fault("after some steps four fifths of the gradient reach the stem", r"backward|gradient",
              (NETWORK, "        out = self.layer1(out)  # (N, 16, 32, 32)\n",
               "        out = self.layer1(out)\n"
               "        self.steps = getattr(self, \"steps\", 0) + self.training\n"
               "        if self.training and out.requires_grad and self.steps > 20:\n"
               "            out.register_hook(lambda g: 0.8 * g)\n"), when=EPOCH),
        fault("with fixed bits the dead-zone parameter is in the bits' group", r"group|decay|rate|optimi[sz]er|dead.?zone",
              (ATTACH, "    return {n: own.get(n, \"weights\") for n, p in quantizer.named_parameters() if p.requires_grad}\n",
               "    trained = [n for n, p in quantizer.named_parameters() if p.requires_grad]\n    return dict(zip(trained, own.values(), strict=False))\n"),
              flags="--fixed-bits 4"),
        fault("parameters are rounded to bf16 after each step", r"bf16|bfloat16|round|float32|precision|optimi[sz]er|stored",
              (TRAINING, "        self.optimizer.step()\n",
               "        self.optimizer.step()\n        if self.precision == \"bf16\":  # what the layers compute with\n            with torch.no_grad():\n                for parameter in self.model.parameters():\n                    parameter.copy_(parameter.bfloat16())\n"),
              flags="--precision bf16"),
    ],
    "schedule": [
        fault("delay and ramp are swapped", r"coefficient|schedule|warm.?up|delay|ramp",
              (RUN, "linear_warmup(settings.sparsity_delay, settings.sparsity_ramp)",
               "linear_warmup(settings.sparsity_ramp, settings.sparsity_delay)")),
        fault("the rate is annealed per step, for a number of epochs", r"rate|\blr\b|anneal|cosine|schedule",
              (RUN, "pipeline.rate_schedule(epoch, settings.epochs)",
               "pipeline.rate_schedule(epoch * len(pipeline.train_batches), settings.epochs)")),
        fault("the warm-up is per step, for a number of epochs", r"coefficient|schedule|warm.?up",
              (RUN, "pipeline.sparsity_schedule(epoch, settings.epochs)",
               "pipeline.sparsity_schedule(epoch * len(pipeline.train_batches), settings.epochs)")),
        fault("the rate is an epoch ahead", r"rate|\blr\b|anneal|cosine|schedule",
              (RUN, "pipeline.rate_schedule(epoch, settings.epochs)", "pipeline.rate_schedule(epoch + 1, settings.epochs)")),
        fault("the warm-up is an epoch ahead", r"coefficient|schedule|warm.?up",
              (RUN, "pipeline.sparsity_schedule(epoch, settings.epochs)",
               "pipeline.sparsity_schedule(epoch + 1, settings.epochs)")),
        fault("the warm-up is an epoch late", r"coefficient|schedule|warm.?up",
              (RUN, "pipeline.sparsity_schedule(epoch, settings.epochs)",
               "pipeline.sparsity_schedule(epoch - 1, settings.epochs)")),
        fault("the cosine is reversed", r"rate|\blr\b|anneal|cosine|schedule",
              (SCHEDULES, "0.5 * (1 + math.cos(", "0.5 * (1 - math.cos(")),
        fault("the cosine is of degrees", r"rate|\blr\b|anneal|cosine|schedule",
              (SCHEDULES, "math.cos(math.pi * ", "math.cos(")),
        fault("annealing begins with the warm-up", r"rate|\blr\b|anneal|cosine|schedule",
              (RUN, "cosine_anneal(0)", "cosine_anneal(settings.sparsity_delay)")),
        fault("the rates never warm up", r"rate|\blr\b|warm",
              (RUN, "warmed_up(settings.rate_warmup, cosine_anneal(0))", "cosine_anneal(0)")),
        fault("the rates' warm-up begins at 0", r"rate|\blr\b|warm",
              (SCHEDULES, "min((epoch + 1) / (warmup + 1), 1.0)", "min(epoch / (warmup or 1), 1.0)")),
        fault("annealing is over at half the epochs", r"rate|\blr\b|anneal|cosine|schedule",
              (RUN, "pipeline.rate_schedule(epoch, settings.epochs)", "pipeline.rate_schedule(epoch, settings.epochs / 2)")),
        fault("the warm-up never ends", r"coefficient|schedule|warm.?up",
              (SCHEDULES, "min((epoch - delay) / ramp, 1.0)", "(epoch - delay) / ramp")),
        fault("the coefficient is negative before the warm-up", r"coefficient|schedule|warm.?up",
              (SCHEDULES, "        if epoch < delay:\n            return 0.0\n", "")),
        fault("the warm-up is divided in whole numbers", r"coefficient|schedule|warm.?up",
              (SCHEDULES, "min((epoch - delay) / ramp, 1.0)", "min((epoch - delay) // ramp, 1.0)")),
        fault("the coefficient is a constant of the code", r"coefficient|schedule|warm.?up|sparsity.weight",
              (RUN, "settings.sparsity_weight * pipeline", "4e-3 * pipeline")),
        fault("the warm-up's factor is left out", r"coefficient|schedule|warm.?up",
              (RUN, "settings.sparsity_weight * pipeline.sparsity_schedule(epoch, settings.epochs)", "settings.sparsity_weight")),
        fault("the coefficient is the warm-up's alone", r"coefficient|schedule|warm.?up|sparsity.weight",
              (RUN, "settings.sparsity_weight * pipeline.sparsity_schedule", "pipeline.sparsity_schedule")),
        fault("the row shows the peak's coefficient, not the one used", r"coefficient",
              (RUN, "coefficient=coefficient,", "coefficient=settings.sparsity_weight,")),
        fault("the coefficient stays what it was when the penalty set in", r"coefficient|stale|ramp|schedule|penalty",
              (TRAINING, "        self.coefficient.fill_(coefficient)\n",
               "        if penalised != bool(self.coefficient):  # spare the device a write in every step\n            self.coefficient.fill_(coefficient)\n")),
    ],
    "modes": [
        fault("training in evaluation mode", r"mode|eval|batch norm",
              (TRAINING, "    step.model.train()\n", "    step.model.eval()\n")),
        fault("train() is left out, so that the second epoch trains in evaluation mode", r"mode|eval|batch norm",
              (TRAINING, "    step.model.train()\n", "")),
        fault("frozen batch norms in training", r"mode|eval|batch norm|statistic",
              (TRAINING, "    step.model.train()\n",
               "    step.model.train()\n    for norm in step.model.modules():\n"
               "        if isinstance(norm, nn.BatchNorm2d):\n            norm.eval()\n")),
        fault("test in training mode", r"mode|train|batch norm|statistic",
              (TRAINING, "predict(model.eval(), batches", "predict(model.train(), batches")),
        fault("test with the mode that training left", r"mode|train|batch norm|statistic",
              (TRAINING, "predict(model.eval(), batches", "predict(model, batches")),
        fault("statistics are never renewed", r"statistic|renew|batch norm",
              (RUN, "if settings.batch_norm_batches:", "if False:")),
        fault("statistics are renewed on the test set", r"statistic|renew|batch norm|test",
              (RUN, "model, pipeline.train_batches, epoch, settings.batch_norm_batches",
               "model, pipeline.test_batches, epoch, settings.batch_norm_batches"),
              (TRAINING, "itertools.islice(batches.epoch(epoch), min(count, len(batches)))",
               "itertools.islice(batches, min(count, len(batches)))")),
        fault("old statistics are not cleared when they are renewed", r"statistic|renew|batch norm",
              (TRAINING, "            norm.reset_running_stats()\n", "")),
        fault("statistics are renewed in evaluation mode", r"statistic|renew|batch norm|mode",
              (TRAINING, "    momenta = [norm.momentum for norm in norms]\n",
               "    momenta = [norm.momentum for norm in norms]\n    model.eval()\n")),
        fault("statistics are renewed on one batch", r"statistic|renew|batch norm|batches",
              (TRAINING, "min(count, len(batches))", "1")),
        fault("statistics are renewed by the usual momentum", r"statistic|renew|batch norm|momentum",
              (TRAINING, "            norm.momentum = None  #", "            norm.momentum = 0.1  #")),
        fault("statistics are renewed before the epoch's training", r"statistic|renew|batch norm",
              (RUN, "if settings.batch_norm_batches:", "if False:"),
              (RUN, "losses = train_epoch(",
               "renew_batch_norms(model, pipeline.train_batches, epoch, settings.batch_norm_batches); losses = train_epoch(")),
        fault("momentum 0", r"statistic|momentum|batch norm",
              (NETWORK, "        for module in self.modules():\n",
               "        for module in self.modules():\n            if isinstance(module, nn.BatchNorm2d):\n"
               "                module.momentum = 0.0\n"), flags="--batch-norm-batches 0"),
        fault("the epoch trains on the quantized weights of its first step", r"cache|stale|quantized weights|older weights",
              (TRAINING, "    step.model.train()\n",
               "    step.model.train()\n    cache = parametrize.cached()\n    cache.__enter__()\n"),
              (TRAINING, "    sums = in_float64(losses).cpu()\n",
               "    cache.__exit__(None, None, None)\n    sums = in_float64(losses).cpu()\n"),
              (TRAINING, "        loss.backward()\n", "        loss.backward(retain_graph=True)\n")),
        fault("the test is of the network of the first test", r"stale|copy|other weights|other network|another network",
              (TRAINING, "    logits, labels = predict(model.eval(), batches, precision)\n",
               "    import copy\n    if not hasattr(batches, 'network'):\n"
               "        batches.network = copy.deepcopy(model).eval()\n    model.eval()\n"
               "    logits, labels = predict(batches.network, batches, precision)\n")),
        fault("the test is in full precision", r"quantiz|full precision",
              around(TRAINING, "measure_accuracy",
                     "from utils_quantization import toggle_quantization\n"
                     "toggle_quantization(args[0], False)\ntry:\n    return whole(*args, **kwargs)\n"
                     "finally:\n    toggle_quantization(args[0], True)")),
        fault("quantization stays off after the first test", r"quantiz|full precision",
              around(TRAINING, "measure_accuracy",
                     "from utils_quantization import toggle_quantization\n"
                     "accuracy = whole(*args, **kwargs)\ntoggle_quantization(args[0], False)\nreturn accuracy")),
        fault("the first epoch is in full precision", r"quantiz|full precision",
              (TRAINING, MODE, "    step.model.train()\n    from utils_quantization import toggle_quantization\n"
               "    toggle_quantization(step.model, epoch > 0)\n    losses = torch.zeros(")),
        fault("statistics are renewed without quantizers", r"quantiz|full precision|statistic|renew",
              around(TRAINING, "renew_batch_norms",
                     "from utils_quantization import toggle_quantization\ntoggle_quantization(args[0], False)\n"
                     "try:\n    return whole(*args, **kwargs)\nfinally:\n    toggle_quantization(args[0], True)")),
        fault('the renewal takes the plain mean in the last batch norm alone', r'batch norm statistics',
              (TRAINING, '            norm.momentum = None  # asks batch norm', '        norm.momentum = None  # asks batch norm')),
        fault("the batch norms' momentum falls from epoch to epoch", r'moment[au]',
              (RUN, '    with EpochWatch(pipeline, epoch) as watch:', '    for norm in model.modules():\n        if isinstance(norm, torch.nn.BatchNorm2d):\n            norm.momentum = 0.1 / (1 + epoch) ** 2\n    with EpochWatch(pipeline, epoch) as watch:')),
    ],
    "keep dead": [
        fault("the mask is inverted", r"mask|dead|kept|slice|filter",
              (PENALTY, "kernels.any(1 - dim, keepdim=True)", "~kernels.any(1 - dim, keepdim=True)")),
        fault("one zero kills a filter", r"mask|dead|kept|slice|filter",
              (PENALTY, "kernels.any(1 - dim, keepdim=True)", "kernels.all(1 - dim, keepdim=True)"),
              (PENALTY, "layer.weight.abs().sum((2, 3), keepdim=True)",
               "(layer.weight != 0).all(3, keepdim=True).all(2, keepdim=True).float()")),
        fault("the mask is applied before the step", r"mask|dead|kept|slice|filter",
              (TRAINING, "        self.optimizer.step()\n        with torch.no_grad():\n"
               "            for weight, mask in kept:\n                weight.mul_(mask)\n",
               "        with torch.no_grad():\n            for weight, mask in kept:\n"
               "                weight.mul_(mask)\n        self.optimizer.step()\n")),
        fault("only filters are kept dead", r"mask|dead|kept|slice|filter",
              (PENALTY, "in (member for g in groups for member in g.members)",
               "in (member for g in groups for member in g.members if member[1] == FILTERS)")),
        fault("only the first member of a group is kept dead", r"mask|dead|kept|slice|filter",
              (PENALTY, "in (member for g in groups for member in g.members)",
               "in (member for g in groups for member in g.members[:1])")),
        fault("nothing is kept dead", r"mask|dead|kept|slice|filter",
              (RUN, "keep_dead = keep_dead_slices(model) if settings.keep_dead else None", "keep_dead = None")),
        fault("dead slices are kept before the penalty acts", r"mask|dead|kept|slice|filter",
              (TRAINING, "self.keep_dead(self.model) if self.keep_dead and penalised else []",
               "self.keep_dead(self.model) if self.keep_dead else []")),
        fault("masks are of the stored weights", r"mask|dead|kept|slice|filter",
              (PENALTY, "kernels = layer.weight.abs()", "kernels = layer.parametrizations.weight.original.abs()")),
        fault("masks are taken after the step, from the new weights", r"mask|dead|kept|keep",
              (TRAINING, KEPT, ""),
              (TRAINING, "        with torch.no_grad():\n            for weight, mask in kept:",
               "        kept = self.keep_dead(self.model) if self.keep_dead and penalised else []\n"
               "        with torch.no_grad():\n            for weight, mask in kept:")),
        fault("small filters are taken for dead", r"mask|dead|kept|keep",
              (PENALTY, "kernels = layer.weight.abs()", "kernels = (layer.weight.abs() > 0.05).float()")),
        fault("the gradient is masked instead of the weight", r"mask|dead|kept|keep",
              (TRAINING, STEP,
               "        for weight, mask in kept:\n            weight.grad.mul_(mask)\n        self.optimizer.step()\n")),
        fault('a layer of more than 90 % zeros keeps every single zero', r'update outside|mask|dead',
              (PENALTY, '            pairs.append((layer.parametrizations.weight.original, mask))', '            nonzero = (layer.weight != 0).float()\n            mask = nonzero if nonzero.mean() < 0.1 else mask\n            pairs.append((layer.parametrizations.weight.original, mask))'), when=EPOCH),
        fault("a slice is dead where each of its kernels adds up to zero", r"keep.?dead|mask|dead|alive",
              (PENALTY, "kernels = layer.weight.abs().sum((2, 3), keepdim=True)",
               "kernels = layer.weight.sum((2, 3), keepdim=True)")),
    ],
    "counts": [
        fault("constants below a hundredth leave no trace", r"constant|null|channel",
              (CHANNELS, "self._spoken(use.out).known != 0", "self._spoken(use.out).known.abs() > 1e-2")),
        fault("what only a shortcut reads counts as unread", r"channels",
              (CHANNELS, "_Flags.apply(sum(s.flow for s in flowing).expand(constant.shape))",
               "_Flags.apply((flowing[0].flow + sum(s.flow.detach() for s in flowing[1:])).expand(constant.shape))")),
        fault("the ceiling is that of the trained network", r"ceiling",
              (EVALUATOR, "return self.count_ceiling()", "return self.count")),
        fault("a filter without a positive weight counts as zero", r"filter|share",
              (COUNTS, "zero_filters=len(nonzero) - int(nonzero.any(1).sum()),",
               "zero_filters=int((channels.weight.flatten(1).amax(1) == 0).sum()),")),
        fault("the row is counted before the epoch's training", r"before the epoch's training",
              (RUN, "        losses = train_epoch(",
               "        compression = pipeline.evaluator.evaluate(model)\n        losses = train_epoch("),
              (RUN, "        compression = pipeline.evaluator.evaluate(model)\n        record = epoch_record(\n",
               "        record = epoch_record(\n")),
        fault("the final metrics are those of an earlier epoch", r"another epoch",
              (RUN, "record, compression = one_epoch(pipeline, epoch, live.epoch(epoch, settings.epochs))",
               "record, _ = one_epoch(pipeline, epoch, live.epoch(epoch, settings.epochs))"), when=END),
        fault("labels of sure mistakes are corrected in the test set", r"test set",
              (TRAINING, "    hits = processes.sum(torch.stack([(logits", "    sure = logits.float().softmax(1).amax(1) > 0.4\n    labels[sure] = logits.argmax(1)[sure]\n    hits = processes.sum(torch.stack([(logits"), when=EPOCH),
        fault("batch norms are renewed on the first epoch's images", r"another epoch",
              (TRAINING, "in itertools.islice(batches.epoch(epoch), ", "in itertools.islice(batches.epoch(0), "), when=EPOCH),
        fault("moments of late checkpoints are bf16", r"checkpoint",
              (CHECKPOINT, "    return Checkpoint(history, model.state_dict(), optimizer.state_dict()[\"state\"], random_states())",
               "    state = optimizer.state_dict()[\"state\"]\n    if len(history.epochs) > 4:\n        state = {i: {n: v.bfloat16().float() if v.ndim else v for n, v in s.items()} for i, s in state.items()}\n"
               "    return Checkpoint(history, model.state_dict(), state, random_states())"), when=EPOCH),
        fault("the penalty's gradient is lost in late epochs", r"step computed anew|gradient",
              (TRAINING, "        loss.backward()\n        losses", "        late = max((int(s[\"step\"]) for s in self.optimizer.state.values()), default=0) > 75\n        (cross_entropy if late else loss).backward()\n        losses"), when=EPOCH),
        fault("the recorded penalty is that of the last step", r"penalty of a training step",
              (RUN, "            penalty = step.penalty(model).item()\n", "            penalty = losses.steps[-1][2]\n")),
        fault("seconds are counted from the end of the training", r"seconds",
              (RUN, "        watch.trained(losses)\n",
               "        watch.trained(losses)\n        began = time.perf_counter()\n")),
        fault("the bias is counted", r"metrics|count|MACs|weights|bias",
              (COUNTS, "dense_macs=nonzero.numel() * channels.positions", "dense_macs=(nonzero.numel() + len(nonzero)) * channels.positions")),
        fault("zeros are counted before quantization", r"metrics|zero|count|spars",
              (CHANNELS, "return layer.parametrizations.weight() if computed", "return layer.parametrizations.weight.original if computed")),
        fault("BOPs with the bits before rounding", r"metrics|bit|BOP|count",
              (COUNTS, "return self.structured_macs * self.bits * ACTIVATION_BITS",
               "return int(self.structured_macs * self.learned_bits * ACTIVATION_BITS)")),
        fault("every layer has the first stage's positions", r"metrics|MACs|position|count",
              (CHANNELS, "positions = out.constant.numel() // len(weight)", "positions = 1024 if weight.ndim > 2 else 1")),
        fault("the constant of a dead channel is forgotten", r"metrics|constant|channel|smaller network|dead",
              (CHANNELS, "        known[inputs] = 0\n", "        known[:] = 0\n")),
        fault("dead filters stop at the batch norm: their channels count as alive", r"metrics|channel|dead|structured|MACs|count",
              (CHANNELS, "(weight != 0).to(flow.dtype), None", "torch.ones_like(weight, dtype=flow.dtype), None")),
        fault("a filter is zero when its weights sum to zero", r"metrics|filter|zero|count|structured",
              (COUNTS, "zero_filters=len(nonzero) - int(nonzero.any(1).sum())",
               "zero_filters=int((channels.weight.flatten(1).sum(1).abs() < 1e-6).sum())")),
        fault("the structured MACs are the unstructured ones", r"metrics|structured|MACs|count",
              (COUNTS, "structured_macs=channels.structured_macs", "structured_macs=(nonzero.numel() - zeros) * channels.positions")),
        fault("the structured ratio is the unstructured one", r"metrics|structured|ratio|BOP|MACs",
              (EVALUATOR, 'return ratio(self.dense_bops, self.count.total("structured_bops"))',
               'return ratio(self.dense_bops, self.count.total("unstructured_bops"))')),
        fault("the last layer is left out of the total", r"metrics|total|count|MACs|layer",
              (COUNTS, "sum(getattr(layer, count) for layer in self.layers)",
               "sum(getattr(layer, count) for layer in self.layers[:-1])")),
        fault("each layer has its neighbour's bits", r"metrics|bit|BOP|count",
              (COUNTS, "bits = {name: weight_bits(model.get_submodule(name)) for name in weights}",
               "near = dict(zip(weights, [*list(weights)[1:], *list(weights)[:1]], strict=True))\n"
               "    bits = {name: weight_bits(model.get_submodule(near[name])) for name in weights}")),
        fault("near zero counts as zero", r"metrics|zero|count|spars",
              (COUNTS, "nonzero = (channels.weight != 0).flatten(1)", "nonzero = (channels.weight.abs() > 1e-2).flatten(1)")),
        fault("sparsity counts the full-precision layers too", r"metrics|spars|count|zero",
              (COUNTS, '_share(self.quantized, "zero_weights", "weights")', '_share(self.layers, "zero_weights", "weights")')),
        fault("mean bits count the full-precision layers too", r"metrics|bit",
              (COUNTS, "_mean([layer.learned_bits for layer in self.quantized])",
               "_mean([layer.learned_bits for layer in self.layers])")),
        fault("dead inputs count as alive", r"metrics|structured|MACs|channel|input|count",
              (CHANNELS, "(alive.view(use.groups, -1).sum(1) * inputs.view(use.groups, -1).sum(1)).sum()", "alive.sum() * (len(inputs) // use.groups)")),
        fault("the dense network is counted in FLOPs, the other in MACs", r"metrics|dense|MACs|FLOP|count|ratio",
              (COUNTS, "dense_macs=nonzero.numel() * channels.positions", "dense_macs=2 * nonzero.numel() * channels.positions")),
        fault("the dense network has 16-bit weights", r"metrics|dense|BOP|bit|count|ratio|baseline",
              (COUNTS, "self.dense_macs * FULL_PRECISION_BITS * ACTIVATION_BITS", "self.dense_macs * 16 * ACTIVATION_BITS")),
        fault("the network is counted before the epoch", r"metrics|count|stale|zero|bits|other network|spars",
              (RUN, "compression = pipeline.evaluator.evaluate(model)", "pass"),
              (RUN, "losses = train_epoch(", "compression = pipeline.evaluator.evaluate(model); losses = train_epoch(")),
        fault("the first network is counted in every epoch", r"metrics|count|stale|zero|bits|other network|spars",
              around(EVALUATOR, "count_network",
                     "kept = getattr(args[0], '_counted', None)\n"
                     "args[0]._counted = kept or (whole(*args, **kwargs) if quantized_layers(args[0]) else None)\n"
                     "return args[0]._counted or whole(*args, **kwargs)"),
              (EVALUATOR, "from metrics import", "from utils_quantization import quantized_layers\nfrom metrics import")),
        fault("structured sparsity counts null channels for zero filters", r"filter|structured|channel|spars",
              (COUNTS, '_share(convolutions, "zero_filters", "filters")', '_share(convolutions, "null_channels", "filters")')),
        fault("a batch norm's scale of 0 is overlooked", r"batch norm|scale|channel|structured|MACs|smaller network",
              (CHANNELS, "return x if scale is None else _Flags.apply(x * (scale != 0).view(-1, *[1] * (x.ndim - 2)))", "return x")),
        fault("the report prints the structured ratio twice", r"ratio|metrics|printed|MACs|structured",
              (REPORT, 'f"Unstructured MACs compression: {format_ratio(final.unstructured_mac_ratio)}"',
               'f"Unstructured MACs compression: {format_ratio(final.structured_mac_ratio)}"'), when=END),
        fault("counts are made anew only where a bit-width has changed", r"count|stale|earlier|old|sparsit|remember|cach|compress",
              (EVALUATOR, "from metrics import NetworkCount, count_ceiling, count_network, ratio\n",
               "from metrics import NetworkCount, count_ceiling, count_network, ratio\nfrom utils_quantization import quantized_layers, weight_bits\n"),
              (EVALUATOR, "        self.dense = count_network(model, input_size)\n",
               "        self.dense = count_network(model, input_size)\n        self.counted: tuple[list[int], NetworkCount] | None = None\n"),
              (EVALUATOR, "        count = count_network(model, self.input_size)\n        shapes",
               "        bits = [weight_bits(layer)[0] for layer in quantized_layers(model).values()]\n        if self.counted is None or self.counted[0] != bits:  # tracing takes a while\n            self.counted = bits, count_network(model, self.input_size)\n        count = self.counted[1]\n        shapes"),
              flags="--fixed-bits 4"),
        fault("the classifier's rows count as filters", r"structured|filter|linear|classifier|convolution|count|sparsit",
              (COUNTS, "        return _share(convolutions, \"zero_filters\", \"filters\")\n",
               "        return _share(self.quantized, \"zero_filters\", \"filters\")\n"),
              flags="--exclude-layers ^conv1$"),
        fault("a dead channel that leaves a negative constant counts as nothing", r"channel|state|constant|null|negative",
              (CHANNELS, "speaks = _channels(self._spoken(use.out).known != 0, dim)",
               "speaks = _channels(self._spoken(use.out).known > 0, dim)")),
        fault("a grouped layer's MACs are the product over all groups", r"account of dead channels",
              (CHANNELS, "left = (alive.view(use.groups, -1).sum(1) * inputs.view(use.groups, -1).sum(1)).sum()",
               "left = alive.sum() * inputs.sum() // use.groups"),
              flags="--model own_networks:Varied"),
        fault("a layer that is used twice has the positions of one use", r"twice|more than once|uses?\b|position|dense|MAC",
              (CHANNELS, "positions=self.positions + other.positions,",
               "positions=max(self.positions, other.positions),"),
              flags="--model own_networks:Varied"),
        fault("a softmax over the channels is taken for elementwise", r"softmax|elementwise|pointwise|barrier|logits|smaller network|wiring|operation",
              ("src/graph.py", "_POINTWISE = {aten.hardswish, aten.log_sigmoid, aten.where, aten.masked_fill, aten.prelu}",
               "_POINTWISE = {aten.hardswish, aten.log_sigmoid, aten.softmax, aten.where, aten.masked_fill, aten.prelu}"),
              flags="--model own_networks:Varied"),
        fault("a 1x1 convolution is no convolution", r"1 ?x ?1|convolution|filter|structured sparsity|picture|kernel",
              (COUNTS, "is_convolution=channels.weight.ndim > 2,",
               "is_convolution=channels.weight[0, 0].numel() > 1,"),
              flags="--model own_networks:Varied"),
        fault("the two ceilings are exchanged", r"ceiling|exchang|swap|structured",
              (EVALUATOR, "return ratio(self.dense_macs, self.ceiling.total(\"structured_macs\"))",
               "return ratio(self.dense_macs, self.ceiling.total(\"unstructured_macs\"))"),
              (EVALUATOR, "return ratio(self.dense_macs, self.ceiling.total(\"unstructured_macs\"))\n\n\nclass",
               "return ratio(self.dense_macs, self.ceiling.total(\"structured_macs\"))\n\n\nclass")),
        fault("a record has the channels of the network before its training", r"record|row",
              (HISTORY, "            **{key: getattr(counts[name], key) for key in taken},\n",
               "            **{key: getattr(counts[name], key) for key in taken if not key.endswith('_channels')},\n"
               "            **_CHANNELS.setdefault(name, {k: getattr(counts[name], k) for k in taken if k.endswith('_channels')}),\n"),
              (HISTORY, "def layer_records(", "_CHANNELS = {}\n\n\ndef layer_records("), when=END),
    ],
    "accuracy": [
        fault("top-5", r"top|accuracy|hits|count",
              (TRAINING, "(logits.argmax(1) == labels).sum()",
               "(logits.topk(5).indices == labels[:, None]).any(1).sum()")),
        fault("on training images", r"test image|test set|training image|label",
              (RUN, "test_batches = TestBatches(dataset, device, processes=processes)",
               "from dataclasses import replace as _replace\n"
               "        test_batches = TestBatches(_replace(dataset, test_images=dataset.train_images, "
               "test_labels=dataset.train_labels), device, processes=processes)")),
        fault("the last test batch is dropped", r"test image|dropped|tested|last|cut",
              (DATA, "shard = processes.shard(0, len(dataset.test_labels))",
               "shard = processes.shard(0, len(dataset.test_labels) // 128 * 128)")),
        fault("divided by 10,000 whatever was tested", r"accuracy|count|divid|tested",
              (TRAINING, "labels.new_tensor(len(labels))", "labels.new_tensor(10_000)")),
        fault("divided by the batches", r"accuracy|count|divid|tested",
              (TRAINING, "return right / tested", "return right / (100 * len(batches))")),
        fault("the best accuracy so far is shown", r"accuracy|best|tested",
              around(TRAINING, "measure_accuracy",
                     "model, batches = args[:2]\n"
                     "batches.best = max(getattr(batches, 'best', 0.0), whole(*args, **kwargs))\nreturn batches.best"),
              when=END),
        fault("tested before the epoch's training", r"accuracy|tested|stale|order",
              (RUN, "accuracy = measure_accuracy(model, pipeline.test_batches, settings.precision, step.processes)", "model.eval()"),
              (RUN, "losses = train_epoch(",
               "accuracy = measure_accuracy(model, pipeline.test_batches, settings.precision, step.processes); "
               "losses = train_epoch(")),
        fault("the largest logit of every class over the images", r"accuracy|hits|count",
              (TRAINING, "(logits.argmax(1) == labels).sum()",
               "(logits.sort(1).indices[:, -2:] == labels[:, None]).any(1).sum()")),
    ],
    "pictures": [
        fault("the accuracy curve is the best so far", r"draws",
              (PLOTS, "[100 * r.accuracy for r in records]",
               "[max(100 * q.accuracy for q in records[: i + 1]) for i in range(len(records))]")),
        fault("the accuracy curve is drawn from the loss", r"another column",
              (PLOTS, "[100 * r.accuracy for r in records]", "[r.loss for r in records]")),
        fault("the curve of the cross-entropy is the loss", r"another column",
              (PLOTS, "[r.cross_entropy for r in records]", "[r.loss for r in records]")),
        fault("the two sparsities are exchanged", r"another column",
              (PLOTS, "axes.plot(epochs, unstructured,", "axes.plot(epochs, structured,"),
              (PLOTS, 'axes.plot(epochs, structured, "o-", color=VERMILION',
               'axes.plot(epochs, unstructured, "o-", color=VERMILION')),
        fault("one sparsity is drawn twice", r"another column",
              (PLOTS, "structured = [100 * r.structured_sparsity for", "structured = [100 * r.unstructured_sparsity for")),
        fault("the accuracy curve counts epochs from 0", r"another epoch",
              (PLOTS, 'axes.plot(epochs, accuracies', 'axes.plot(range(len(epochs)), accuracies')),
        fault("the bits are those of the epoch before", r"another column",
              (PLOTS, "bits = [r.learned_bits for r in records]", "bits = [r.learned_bits for r in records[:1] + records[:-1]]")),
        fault("the legend's lines are in another order than its names", r"legend",
              (PLOTS, "figure.legend(handles, labels,", "figure.legend(handles[::-1], labels,")),
        fault("the axis of the bits is named after the coefficient", r"axis",
              (PLOTS, 'lower.set(ylabel="bits a weight (before rounding)")', 'lower.set(ylabel="the penalty\'s coefficient")')),
        fault("shares are drawn for percent", r"another column",
              (PLOTS, "[100 * r.accuracy for r in records]", "[r.accuracy for r in records]")),
        fault("the warm-up's shade counts epochs from 0", r"another epoch",
              (PLOTS, "begins, ends = delay + 1, min(delay + 1 + ramp, last)", "begins, ends = delay, min(delay + ramp, last)")),
        fault("the liveness map is transposed", r"channel, layer",
              (PLOTS, "axes.imshow(cells,", "axes.imshow([*zip(*cells, strict=True)],")),
        fault("the liveness map's colours are exchanged, not the legend's", r"state",
              (PLOTS, "for state in sorted(STATE_COLOURS)]", "for state in (2, 1, 0, 3)]")),
        fault("each row of the liveness map is the next layer's", r"layer",
              (PLOTS, "axes.imshow(cells,", "axes.imshow(cells[1:] + cells[:1],")),
        fault("the bars show the dead for the living", r"state",
              (PLOTS, "heights = [layer.states.count(state)", "heights = [layer.states.count(2 - state)")),
        fault("the bars' texts are a layer off", r"layer",
              (PLOTS, "        axes.text(place, layer.filters", "        axes.text(len(layers) - 1 - place, layer.filters")),
        fault("channels over time are filters that are not zero", r"another column",
              (PLOTS, "100 * r.alive_channels / r.filters for r in row", "100 * (1 - r.zero_filters / r.filters) for r in row")),
        fault("channels over time run backwards", r"epoch",
              (PLOTS, "for r in history.epochs] for name in layers", "for r in history.epochs[::-1]] for name in layers")),
        fault("two pictures have each other's file", r"column|picture",
              (PLOTS, '        accuracy_figure(history, f"Accuracy: {title}"),\n', ""),
              (PLOTS, '        channel_liveness_figure(count, f"Channels: {title}"),\n',
               '        accuracy_figure(history, f"Accuracy: {title}"),\n        channel_liveness_figure(count, f"Channels: {title}"),\n')),
        fault("every picture's file holds the first picture", r"another's name",
              (FINISH, 'shown[name] if kind == "png" else rendered(figure, kind)', 'next(iter(shown.values())) if kind == "png" else rendered(figure, kind)'), when=END),
        fault("the cross-entropy's curve is a running mean over three epochs", r"curve|smooth|mean|cross.entropy|accuracy_curve|picture|drawn",
              (PLOTS, "    right.plot(epochs, losses, \"s--\", color=VERMILION, label=\"training cross-entropy\")",
               "    recent = [losses[max(i - 2, 0) : i + 1] for i in range(len(losses))]\n    smooth = [sum(values) / len(values) for values in recent]\n    right.plot(epochs, smooth, \"s--\", color=VERMILION, label=\"training cross-entropy\")")),
        fault("the rows of the channels over time are upside down", r"channels_over_time|over time|row|name|upside|order|picture|drawn",
              (PLOTS, "edges = (epochs[0] - 0.5, epochs[-1] + 0.5, len(layers) - 0.5, -0.5)",
               "edges = (epochs[0] - 0.5, epochs[-1] + 0.5, -0.5, len(layers) - 0.5)")),
        fault("the liveness map's cells are sorted by their state", r"liveness|cell|sort|order|channel|picture|drawn",
              (PLOTS, "cells = [[*layer.states] + ",
               "cells = [sorted(layer.states, reverse=True) + ")),
        fault("the panel of the bits ends at eight and a half", r"bits|panel|axis|axes|limit|sparsity_curves|picture|drawn|outside",
              (PLOTS, "lower.set_ylim(0, max(8, *bits) + 0.5)",
               "lower.set_ylim(0, 8.5)"),
              flags="--max-bits 12"),
        fault("the liveness map ends after 32 channels", r"another channel, layer or state",
              (PLOTS, "    width = max(layer.filters for layer in layers)\n    cells = [[*layer.states] + [PADDING] * (width - layer.filters) for layer in layers]",
               "    width = min(max(layer.filters for layer in layers), 32)\n    cells = [[*layer.states][:width] + [PADDING] * (width - layer.filters) for layer in layers]")),
        fault("there are bars of the first 12 layers alone", r"another layer",
              (PLOTS, "    figure = Figure(figsize=(max(11, 1 + 0.42 * len(layers)), 5.5)",
               "    layers = layers[:12]\n    figure = Figure(figsize=(max(11, 1 + 0.42 * len(layers)), 5.5)")),
        fault("the axis of the accuracy begins at 20 %", r"draws less",
              (PLOTS, 'axes.set(ylabel="test accuracy (%)", ylim=(0, 100))', 'axes.set(ylabel="test accuracy (%)", ylim=(20, 100))')),
        fault("the epochs' axis ends before the last epoch", r"draws less",
              (PLOTS, "row.set(xlim=(0.5, last + 0.5))", "row.set(xlim=(0.5, last - 0.5))")),
        fault("the bars' axis cuts the widest layers", r"draws less",
              (PLOTS, "ylim=(0, 1.18 * max(bottom))", "ylim=(0, 0.5 * max(bottom))")),
        fault("a curve's last number stands at its middle", r"another epoch",
              (PLOTS, "text, (len(values), values[-1]), (-2,", "text, (len(values) // 2, values[-1]), (-2,")),
        fault("the lines between stages are a layer too low", r"another layer",
              (PLOTS, "axes.axhline(row - 0.5,", "axes.axhline(row + 0.5,")),
        fault("the colour bar says that the living are dead", r"title, axis or legend",
              (PLOTS, 'figure.colorbar(image, label="output channels alive (%)")', 'figure.colorbar(image, label="output channels dead (%)")')),
        fault("the picture of the bars has another's title", r"title, axis or legend",
              (PLOTS, 'f"Channels and bits a layer: {title}"', 'f"Accuracy: {title}"')),
    ],
    "files": [
        fault("least and most of the latencies are exchanged", r"is measured",
              (COMPRESSED, "                \"least\": min(kept),\n                \"most\": max(kept),\n",
               "                \"least\": max(kept),\n                \"most\": min(kept),\n"), when=END),
        fault("the quantizers' parameters are counted as the network's", r"is measured",
              (COMPRESSED, "dense_parameters=_parameters(dense)", "dense_parameters=_parameters(model)"), when=END),
        fault("the dense network's MACs are counted as FLOPs", r"measured for the record",
              (COMPRESSED, "dense_macs=count.total(\"dense_macs\")", "dense_macs=2 * count.total(\"dense_macs\")"), when=END),
        fault("the packed file claims the learned bits as the mean bits", r"mean_bits",
              (COMPRESSED, "float(count.mean_bits)", "float(count.mean_learned_bits)"), when=END),
        fault("history.json is not written after the verdict", r"history\.json|written",
              (FINISH, "    keep(errors, write_json, path, history.to_json())\n    checks = [", "    checks = ["), when=END),
        fault("the packed header holds the preset's settings, not the run's", r"setting",
              (FINISH, "            history.settings,\n",
               "            Settings(preset=settings.preset).to_json(),\n"), when=END),
        fault("the packed header gives dense MACs for structured", r"header",
              (COMPRESSED, 'claims["structured_macs"] = count.total("structured_macs")',
               'claims["structured_macs"] = count.total("dense_macs")'), when=END),
        fault("checkpoints hold no optimizer state", r"checkpoint|resum|optimizer|moment|restor",
              (CHECKPOINT, 'optimizer.state_dict()["state"]', "{}"), when=END),
        fault("checkpoints hold the first epoch's weights", r"checkpoint|resum|weights|stale|restor",
              around(CHECKPOINT, "take_checkpoint",
                     "import copy\nmade = whole(*args, **kwargs)\n"
                     "first = args[0].__dict__.setdefault('_first', copy.deepcopy(made.model))\n"
                     "return dataclasses.replace(made, model=first)"), when=END),
        fault("quantizers are not restored", r"checkpoint|resum|quantiz|restor|logit",
              (CHECKPOINT, "model.load_state_dict(checkpoint.model)",
               'model.load_state_dict({k: v for k, v in checkpoint.model.items() if "logit" not in k}, strict=False)'),
              when=END),
        fault("moments are not restored", r"checkpoint|resum|optimizer|moment|restor",
              (CHECKPOINT, 'optimizer.load_state_dict({"state": checkpoint.optimizer, "param_groups": groups})', "groups"),
              when=END),
        fault("the random state is not restored", r"random|checkpoint|resum|restor",
              (CHECKPOINT, "set_random_states(checkpoint.random)", "checkpoint.random"), when=END),
        fault("packed codes are off by one", r"pack|code",
              around(PACKING, "unpack_codes", "return whole(*args, **kwargs) - 1"), when=END),
        fault("packed step sizes are half precision", r"pack|logits",
              (PACKING, "numbers += [layer.step_size", "numbers += [layer.step_size.half().float()"), when=END),
        fault("codes are packed with a bit less, and wrap", r"pack|code|level",
              around(PACKING, "pack_codes", "codes, bits = args\nreturn whole(codes % (2**bits - 2), bits)"),
              when=END),
        fault("the smaller network has no constants", r"smaller network|slim",
              (SLIM, "known[self.held[node].index[wanted] >= 0] = 0", "known[:] = 0"),
              (SLIM, "shift = shift[order]", "shift = 0 * shift[order]"), when=END),
        fault("the smaller network folds batch norms without epsilon", r"smaller network|slim",
              (SLIM, "torch.sqrt(variance + eps)", "torch.sqrt(variance)"), when=END),
        fault("pictures are written under each other's names", r"another than was measured",
              (FINISH, "in contents.items():\n        keep(", "in zip(contents, reversed(contents.values())):\n        keep("), when=END),
        fault("the page shows the preflight's lines for the verdict's", r"another than was measured",
              (FINISH, "report_page(history, settings, checks, shown)", "report_page(history, settings, history.preflight, shown)"), when=END),
        fault("a row is the one before it", r"another epoch",
              (RUN, "live.say(report.table_row(history.epochs[epoch - 1]))", "live.say(report.table_row(history.epochs[max(epoch - 2, 0)]))"), when=END),
        fault("all epochs share one record of their layers", r"records of earlier",
              (HISTORY, "        layers=layer_records(model, compression.count),\n", "        layers=_SHARED | {} if _SHARED.update(layer_records(model, compression.count)) else _SHARED,\n"),
              (HISTORY, "", "\n\n_SHARED: dict = {}\n"), when=END),
        fault("the receiver takes the accuracy that is claimed", r"received",
              ("experiments/received.py", 'received.found["accuracy"] = _accuracy(network, dataset)', 'received.found["accuracy"] = received.claims["accuracy"]'), when=END),
        fault("slim.pt2 holds an untrained network", r"slim\.pt2",
              (COMPRESSED, "exported(slim, whole)", "exported(make_network(name, 10), whole)"), when=END),
        fault("slim.pt2 holds the network whose dead channels are still there", r"slim\.pt2",
              (COMPRESSED, "exported(slim, whole)",
               "exported(without_quantizers(model), whole)"), when=END),
        fault("slim.pt2 holds half-precision weights", r"slim\.pt2",
              (COMPRESSED, "copy.deepcopy(network).cpu().eval()", "copy.deepcopy(network).cpu().eval().half().float()"), when=END),
        fault("slim.pt2 takes the batch of its export alone", r"slim\.pt2",
              (COMPRESSED, "dynamic_shapes=(batch,)", "dynamic_shapes=None"), when=END),
        fault("the history has the epoch before", r"epoch|history|record",
              (RUN, "epoch + 1,\n", "epoch,\n")),
        fault("the table's sparsity columns are swapped", r"table|row|column|history|spars",
              (REPORT, '{100 * record.unstructured_sparsity:6.2f} | {100 * record.structured_sparsity:6.2f}',
               '{100 * record.structured_sparsity:6.2f} | {100 * record.unstructured_sparsity:6.2f}'), when=EPOCH),
        fault("loss and cross-entropy are swapped in the history", r"loss|history|record",
              (RUN, " loss=losses.loss,", " loss=losses.cross_entropy,"),
              (RUN, " cross_entropy=losses.cross_entropy,", " cross_entropy=losses.loss,")),
        fault("the history's gradients are the parameters", r"gradient|history|record",
              (HISTORY, "return parameter.grad.item() if parameter.numel() == 1", "return parameter.item() if parameter.numel() == 1")),
        fault("the history begins at the rounded bits", r"record|begin|history",
              (HISTORY, "weight_bits(model.get_submodule(name))[1])", "weight_bits(model.get_submodule(name))[0])")),
        fault("the history exchanges training and test images", r"record|history|data",
              (HISTORY, "len(dataset.train_labels), len(dataset.test_labels)),", "len(dataset.test_labels), len(dataset.train_labels)),")),
        fault("a signal is the mean of its channels", r"signal",
              (HISTORY, "(module.running_var / (module.running_var + module.eps)).max().item()", "(module.running_var / (module.running_var + module.eps)).mean().item()")),
        fault("the table's bits are rounded", r"row of the table|report",
              (REPORT, "{record.learned_bits:5.2f}", "{record.bits:5.2f}")),
        fault("the last line shows the best accuracy", r"last line|report",
              (REPORT, "{100 * last.accuracy:.2f} % accuracy", "{100 * max(r.accuracy for r in history.epochs):.2f} % accuracy")),
        fault("the number on the accuracy curve is the best", r"another epoch",
              (PLOTS, 'f"{accuracies[-1]:.2f} %"', 'f"{max(accuracies):.2f} %"')),
        fault("the totals leave out the layers in full precision", r"totals",
              (REPORT, '_layer_row("Total", width, "", count)', '_layer_row("Total", width, "", NetworkCount(tuple(count.quantized)))')),
        fault("the layers' table exchanges constant and null", r"layers' table|report",
              (REPORT, '("alive", "constant", "null")', '("alive", "null", "constant")')),
        fault("metrics.csv has its columns under other names", r"metrics\.csv|report",
              (REPORT, "table.writerow(columns)", "table.writerow(sorted(columns))")),
        fault("ceilings are exchanged in print", r"ceiling",
              (REPORT, 'f"Ceiling: {format_ratio(final.structured_ceiling)} structured, "', 'f"Ceiling: {format_ratio(final.unstructured_ceiling)} structured, "')),
        fault("a filter that leaves nothing counts as a constant", r"leaves|states|channels",
              (CHANNELS, "self._spoken(use.out).known", "self.signals[use.out].known")),
        fault("a constant of less than a half counts as nothing", r"leaves|leave|states|channels",
              (CHANNELS, "self._spoken(use.out).known != 0", "self._spoken(use.out).known > 0.5")),
        fault("the stand-in is noted as CIFAR-10's like", r"noted|record",
              (HISTORY, "DataRecord(dataset.name, dataset.source, dataset.synthetic,", "DataRecord(dataset.name, dataset.source, False,")),
        fault("pictures of the stand-in do not say so", r"stand-in",
              (REPORT, 'name = f"{data.name.upper()}, NOT CIFAR-10" if data.synthetic else data.name', "name = data.name")),
        fault("the size of slim.pt2 is printed as the packed file's", r"compressed network|last line",
              (REPORT, 'f"Packed file: {found.packed_bytes:,} bytes,"', 'f"Packed file: {found.slim_bytes:,} bytes,"')),
        fault("the size of slim.pt2 is kept as the packed file's", r"measured",
              (COMPRESSED, "packed_bytes=len(content)", "packed_bytes=len(archive)"), when=END),
        fault("the final ratios are exchanged", r"ratio|totals",
              (HISTORY, "**{key: getattr(compression, key) for key in ratios},",
               '**{key: getattr(compression, key.replace("unstructured", "structured")) for key in ratios},'), when=END),
        fault("metrics.csv is not written", r"written",
              (RUN, "write_whole(folder / report.CSV, report.metrics_csv(history).encode())", "report.metrics_csv(history)"), when=END),
        fault("report.html has no verdict", r"report\.html|page",
              ("experiments/page.py", 'f"<h2>Verdict</h2>{_table(checks)}",', '"<h2>Verdict</h2>",')),
        fault("one checkpoint is kept", r"checkpoints|kept",
              (CHECKPOINT, "KEPT = 2 ", "KEPT = 1 ")),
        fault("a damaged checkpoint is taken", r"checkpoint",
              (CHECKPOINT, "if hashlib.sha256(content[:-size]).digest() != content[-size:]:", "if False:")),
        fault("a damaged packed file is read", r"bit changed|checksum",
              (PACKING, "if _seal(header, body) != content:", "if False:")),
        fault("a run goes on with another sparsity weight", r"MAY_CHANGE|goes on",
              (CHECKPOINT, 'MAY_CHANGE = (\n    "epochs",', 'MAY_CHANGE = (\n    "epochs",\n    "sparsity_weight",')),
        fault("numpy's generator is not restored", r"random",
              ("experiments/draws.py", '    np.random.set_state(states["numpy"])\n', "")),
        fault("slim.pt2 takes two images alone", r"slim|exported",
              (SLIM, "x = torch.cat([x, torch.zeros_like(x.narrow(self.dim, 0, 1))], self.dim)",
               "x = torch.cat([x, x.new_zeros([len(x) if d == 0 else 1 if d == self.dim % x.ndim else x.shape[d] for d in range(x.ndim)])], self.dim)"), when=END),
        fault("a check steps the run's own model", r"check",
              ("experiments/expect.py", "step = copy.deepcopy(self.step)", "step = copy.copy(self.step)")),
        fault("gradients are clipped in bf16 alone", r"mixed precision|clipped",
              (TRAINING, "        self.optimizer.step()\n", '        if self.precision == "bf16":\n            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)\n        self.optimizer.step()\n'),
              flags="--precision bf16"),
        fault("slim.pt2 has no checksum", r"checksum|slim",
              (COMPRESSED, "return with_checksum(content.getvalue())", "return content.getvalue()"), when=END),
        fault("slim.pt2 claims less", r"claimed|slim",
              (COMPRESSED, "exported(slim, whole)", "exported(slim, {})"), when=END),
        fault("verify takes any accuracy", r"received",
              ("experiments/received.py", "return abs(said - found) * self.found[\"test_images\"] <=", "return abs(said - found) <="), when=END),
        fault('metrics.csv holds the last ten epochs', r'metrics\.csv',
              (REPORT, 'for name in columns] for record in history.epochs)', 'for name in columns] for record in history.epochs[-10:])')),
        fault('ratios of 10 and more are rounded up in print', r'ratio|final metrics',
              (COUNTS, '    return "infinite (nothing is left)" if math.isinf(value) else f"{value:.2f}x"', '    if 10 <= value < math.inf:\n        return f"{math.ceil(value)}.00x"\n    return "infinite (nothing is left)" if math.isinf(value) else f"{value:.2f}x"')),
        fault('the first lines exchange training and test images', r'first lines',
              (REPORT, '{data.train_images:,} training and {data.test_images:,} test images ', '{data.test_images:,} training and {data.train_images:,} test images ')),
        fault("titles leave out another sparsity weight than the preset's", r'sparsity-weight|title',
              (OPTIONS, 'NOT_OF_THE_METHOD = (', 'NOT_OF_THE_METHOD = (\n    "sparsity_weight",')),
        fault("the optimizer's step counts begin again after a resume", r"step|bias correction|moment|optimi[sz]er|resum|checkpoint",
              (CHECKPOINT, "                state[name] = torch.empty_like(parameter).copy_(state[name])\n",
               "                state[name] = torch.empty_like(parameter).copy_(state[name])\n            state[\"step\"] = torch.zeros_like(state[\"step\"])  # the rates begin anew\n")),
        fault("a checkpoint keeps the moments in bf16", r"moment|bf16|bfloat16|round|checkpoint|resum|optimi[sz]er",
              (CHECKPOINT, "    return Checkpoint(history, model.state_dict(), optimizer.state_dict()[\"state\"], random_states())\n",
               "    moments = {\n        which: {name: t.bfloat16() if t.ndim else t for name, t in state.items()}  # half the file\n        for which, state in optimizer.state_dict()[\"state\"].items()\n    }\n    return Checkpoint(history, model.state_dict(), moments, random_states())\n")),
        fault("a checkpoint leaves out the running statistics", r"statistic|batch.?norm|buffer|checkpoint|resum|running",
              (CHECKPOINT, "Checkpoint(history, model.state_dict(), optimizer",
               "Checkpoint(history, dict(model.named_parameters()), optimizer"),
              (CHECKPOINT, "        model.load_state_dict(checkpoint.model)\n",
               "        model.load_state_dict(checkpoint.model, strict=False)\n")),
        fault("eps is added to the deviation where a batch norm is folded", r"batch.?norm|fold|eps|smaller network|logits",
              (SLIM, "(torch.ones_like(variance) if scale is None else scale) / torch.sqrt(variance + eps)",
               "(torch.ones_like(variance) if scale is None else scale) / (torch.sqrt(variance) + eps)")),
        fault("parts of a grouped layer hand on their channels in the network's order", r"smaller network|logits|group|order|part|slim",
              (SLIM, "made, order = self._module(name, part, held.node), torch.cat(numbers)",
               "made, order = self._module(name, part, held.node), torch.cat(numbers).sort().values"),
              flags="--model own_networks:Varied"),
        fault("weights in full precision are rounded to half in the packed file", r"pack|file|float16|half|round|bit|full precision|logits",
              (PACKING, "            numbers.append(tensor.flatten())",
               "            numbers.append((tensor.half().float() if tensor.ndim > 1 else tensor).flatten())")),
        fault("of the compressions of the packed file the largest is kept", r"pack|compress|bytes|large|small",
              (ENCODING, "return min(made.items()", "return max(made.items()")),
        fault("the packed file is compressed by zlib alone", r"pack|compress|bytes|zlib|small",
              (ENCODING, "names = COMPRESSIONS if len(content) <= ALL_TRIED else", "names =")),
        fault("the gradients of the records have lost their signs", r"gradient|sign",
              (HISTORY, "    return parameter.grad.item() if parameter.numel() == 1 else parameter.grad.norm().item()",
               "    return parameter.grad.norm().item()")),
        fault("metrics.csv holds four digits of each number", r"csv|digit|round|row",
              (REPORT, "table.writerows([getattr(record, name) for name in columns] for record in history.epochs)",
               "table.writerows([f\"{getattr(record, name):.4g}\" for name in columns] for record in history.epochs)")),
        fault("the layers' table shows unstructured MACs for structured", r"table|layer|structured|MAC|column",
              (REPORT, "{of('structured_macs'):>11,}",
               "{of('unstructured_macs'):>11,}")),
        fault("report.html lists the last twenty epochs", r"report|html|page|row|epoch|table",
              ("experiments/page.py", "*map(table_row, history.epochs)])",
               "*map(table_row, history.epochs[-20:])])"),
              flags="--epochs 24"),
        fault("the bytes in float32 are those of half precision", r"measured",
              (COMPRESSED, "_saved_bytes(without_quantizers(model))", "_saved_bytes(without_quantizers(model).half())"), when=END),
        fault("the layers' table ends after 12 layers", r"layers' table",
              (REPORT, "str(x.bits), x) for x in count.layers]", "str(x.bits), x) for x in count.layers[:12]]")),
        fault("checks of the preflight that were skipped count as held", r"preflight_line",
              (REPORT, 'f"{len(checks) - len(skipped)} checks hold"', 'f"{len(checks)} checks hold"')),
        fault("in report.html what a check says ends after 60 letters", r"page of the run",
              (PAGE, "escape(c.message)", "escape(c.message[:60])")),
        fault("a ratio above 99.99 is shown as 99.99x", r"printed|another column|numbers than",
              (COUNTS, 'else f"{value:.2f}x"', 'else f"{min(value, 99.99):.2f}x"')),
        fault("versions stand under each other's names", r"where the run comes from|start",
              (HISTORY, "{name: version(name) for name in PACKAGES}",
               "{name: version(PACKAGES[i - 1]) for i, name in enumerate(PACKAGES)}")),
        fault("the threads are the machine's cores, not those that compute", r"run's start",
              (HISTORY, "threads=torch.get_num_threads()", "threads=__import__('os').cpu_count() + 1")),
        fault("the command is kept without its last word", r"run's start",
              (HISTORY, 'timespec="seconds"), list(command), ', 'timespec="seconds"), list(command)[:-1], ')),
        fault("--resume takes numbers that differ by less than 5 %", r"MAY_CHANGE|goes on with another|setting",
              (CHECKPOINT, "if name not in MAY_CHANGE and saved.get(name) != now[name]:",
               "if name not in MAY_CHANGE and saved.get(name) != now[name] and not (type(saved.get(name)) is type(now[name]) is float and abs(saved[name] - now[name]) < 0.05 * now[name]):")),
        fault("the last checkpoint is the one that was written last", r"checkpoints are kept, their order",
              (CHECKPOINT, "return [numbered[epoch] for epoch in sorted(numbered, reverse=True)]",
               "return sorted(numbered.values(), key=lambda p: p.stat().st_mtime_ns, reverse=True)")),
        fault("the last line is silent on what failed in the preflight", r"run_line|last line",
              (REPORT, '\n        + (f", and {before} of the preflight FAIL" if before else "")', "")),
        fault("of the checks that fail the last alone is said once more", r"failed_lines",
              (REPORT, "for c in checks if c.status == FAIL for line in", "for c in checks[-1:] if c.status == FAIL for line in")),
        fault("the final metrics say twice the network's MACs", r"shows other numbers",
              (REPORT, "(of {final.totals['dense_macs']:,} MACs)", "(of {2 * final.totals['dense_macs']:,} MACs)")),
        fault("the first lines say seed 0 of any", r"first lines",
              (REPORT, "{settings.batch_size}, seed {settings.seed}", "{settings.batch_size}, seed 0")),
        fault("the first lines say that all layers are quantized", r"first lines",
              (REPORT, "{len(history.quantized)} of {layers} layers", "{layers} of {layers} layers")),
        fault("the first lines say float32 of any precision", r"first lines",
              (REPORT, "{history.device}, {history.precision}", "{history.device}, float32")),
        fault("titles leave out the precision and that a part of the data is used", r"titles",
              (OPTIONS, "NOT_OF_THE_METHOD = (", 'NOT_OF_THE_METHOD = (\n    "limit_train", "precision",')),
        fault("titles leave out switches, the kind of penalty and which layers are quantized", r"titles",
              (OPTIONS, "NOT_OF_THE_METHOD = (", 'NOT_OF_THE_METHOD = (\n    "keep_dead", "penalty_on", "group_weights", "fixed_bits", "exclude_layers",')),
        fault("the date of a run's start is the local one", r"date",
              (HISTORY, "datetime.now(UTC).isoformat", "datetime.now().isoformat")),
        fault("the layout is noted as contiguous, and it is channels_last", r"run's start",
              (HISTORY, "layout=memory_layout(model, device)", 'layout="contiguous"')),
        fault("a resumed run forgets when it was resumed before, and names another epoch", r"go on where its checkpoint",
              (CHECKPOINT, "[*saved.resumed, Resumption(checkpoint.epochs, differences)]", "[Resumption(checkpoint.epochs - 1, differences)]")),
        fault("a longer run exchanges the learning rates before and now", r"describe_differences",
              (CHECKPOINT, "before, rate = (schedule(", "rate, before = (schedule(")),
    ],
}  # fmt: skip

FAULTS = [
    Fault(f.name, f.says, f.edits, f.when, f.flags, area)
    for area, faults in FAULTS_BY_AREA.items()
    for f in faults
]


# One of every area, for `make test-all`.
FAST = (
    "the two sparsities are exchanged",
    "settings are rounded to two decimals where they are kept",
    "training labels are shifted by one image",
    "no ReLU after the sum",
    "no straight-through gradient",
    "groups are not coupled",
    "double softmax",
    "no zero_grad",
    "the warm-up never ends",
    "training in evaluation mode",
    "only filters are kept dead",
    "the bias is counted",
    "top-5",
    "packed codes are off by one",
)


# Running one.

WAY_TO_GO = {PREFLIGHT: 0, EPOCH: 1, END: 2, MISSED: 3}


@dataclass(frozen=True)
class Result:
    """What a run said of a fault, or of none."""

    fault: Fault
    when: str  # the part of the run in which the first line was said
    lines: tuple[str, ...]  # FAIL lines and warnings, in their order
    crash: str  # the last line of a traceback, "" without one
    seconds: float

    @property
    def right(self) -> str:
        """Whether the cause is right: "yes" by the first line, "later" by another one, "no", or "-"."""
        causes = [line.rpartition("Likely cause: ")[2] for line in self.lines]
        named = [re.search(self.fault.says, cause, re.IGNORECASE) is not None for cause in causes]
        return "-" if not named else "yes" if named[0] else "later" if any(named) else "no"


def snapshot(sources: Path, folder: Path) -> Path:
    """Copy the sources, so that edits during a long examination do not mix; returns the copy's folder."""
    tree = folder / "tree"
    for pattern in SOURCES:
        for path in sources.glob(pattern):
            copy = tree / path.relative_to(sources)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, copy)
    return tree


# A whole check that fails, and the next line: what comes after the first is told as soon as it is known.
FIRST_FAIL = re.compile(r"^FAIL.*\n(?: .*\n)*\S", re.MULTILINE)


def run(tree: Path, flags: Sequence[str], output: Path, to_its_end: bool = True) -> None:
    """Run `experiments.debug_run` of a tree in a forked process; what it prints goes to the file `output`.

    Where it need not come `to_its_end`, it is killed when the first check has failed.
    """
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            with output.open("w") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.chdir(tree)
            sys.path.insert(0, str(tree))
            from experiments import data, debug_run

            for name, size in STAND_IN_SIZES.items():
                setattr(data, name, size)
            debug_run.main(list(flags))
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
            os._exit(0)
    while os.waitpid(child, 0 if to_its_end else os.WNOHANG) == (0, 0):
        if output.exists() and FIRST_FAIL.search(output.read_text()):
            os.kill(child, signal.SIGKILL)
            to_its_end = True
        time.sleep(0.05)


def said(text: str) -> Iterator[tuple[str, str]]:
    """The FAIL lines and warnings in a run's output, each with the part of the run that said it."""
    part = PREFLIGHT
    # A long line of the preflight or the verdict goes on in the next ones, indented.
    for line in re.sub(r"\n {6}(?! *!)(?=\S)", " ", text).splitlines():
        if line.startswith("--- Verdict"):
            part = END
        elif part == PREFLIGHT and re.match(r" *\d+ \|", line):
            part = EPOCH
        if line.startswith(("FAIL", "      ! ", "error: ")):
            yield part, line.strip()


def examine(
    fault: Fault, tree: Path, folder: Path, more: Sequence[str] = (), first_alone: bool = False
) -> Result:
    """Run the preflight on a patched copy of the tree, and a short run where that is silent.

    With `first_alone` it is the preflight alone, until a check has failed. `more` are flags for both.
    """
    began = time.monotonic()
    # Flags of a fault's own set up what the preflight is to see, and may be no short run, such as --epochs 400.
    stages = [[*SETTINGS, "--preflight", "only"], *([] if first_alone or fault.flags else [SHORT_RUN])]
    with tempfile.TemporaryDirectory(dir=folder) as made:
        patched, output = Path(made) / "tree", Path(made) / "output.txt"
        shutil.copytree(tree, patched)
        for edit in fault.edits:
            edit.apply(patched)
        for stage in stages:
            flags = [*stage, *fault.flags, *more, "--output-dir", str(Path(made) / "run")]
            run(patched, flags, output, to_its_end=not first_alone)
            text = output.read_text()
            lines = list(said(text))
            crash = text.strip().splitlines()[-1] if "Traceback (most recent" in text else ""
            if lines or crash:
                break
    when = lines[0][0] if lines else MISSED
    return Result(fault, when, tuple(line for _, line in lines), crash, time.monotonic() - began)


# The matrix.


def row(result: Result) -> str:
    """A line of the matrix: area, fault, when it was caught, whether the cause is right, and by which line."""
    fault = result.fault
    late = " (late)" if WAY_TO_GO[result.when] > WAY_TO_GO[fault.when] else ""
    by = result.lines[0] if result.lines else f"CRASH {result.crash}" if result.crash else ""
    return f"{fault.area:<10}| {fault.name:<64.64}| {result.when + late:<16}| {result.right:<6}| {by[:160]}"


def summary(results: Sequence[Result]) -> str:
    """How many were caught, when, and with the right cause, an area a line; and what was missed."""
    head = f"{'':<10}| faults | preflight | epoch | end | missed | right cause first | in a later line"
    lines = [head]
    areas = [area for area in FAULTS_BY_AREA if any(r.fault.area == area for r in results)]
    for area in (*areas, "all"):
        of_area = [r for r in results if area in (r.fault.area, "all")]
        when, right = Counter(r.when for r in of_area), Counter(r.right for r in of_area)
        lines.append(
            f"{area:<10}| {len(of_area):6} | {when[PREFLIGHT]:9} | {when[EPOCH]:5} | {when[END]:3} | "
            f"{when[MISSED]:6} | {right['yes']:17} | {right['later']:15}"
        )
    missed = [f"missed: {r.fault.name}" for r in results if r.when == MISSED]
    return "\n".join([*lines, *missed])


def examine_all(
    faults: Sequence[Fault],
    workers: int,
    more: Sequence[str] = (),
    first_alone: bool = False,
    sources: Path = ROOT,
) -> Iterator[Result]:
    """The result of each, in order, so many at a time, all on one snapshot of the sources."""
    for module in (
        "numpy",
        "torch._dynamo",
        "torch.export",
        "matplotlib.pyplot",
    ):  # once here, not again in every run
        importlib.import_module(module)

    with tempfile.TemporaryDirectory() as folder:
        tree = snapshot(sources, Path(folder))
        compileall.compile_dir(tree, quiet=1)  # once here; what is edited is compiled again
        with multiprocessing.get_context("fork").Pool(workers) as pool:
            jobs = partial(examine, tree=tree, folder=Path(folder), more=more, first_alone=first_alone)
            yield from pool.imap(jobs, faults)


def main() -> int:
    parser = argparse.ArgumentParser(description="Seed faults into a copy of the sources, one at a time.")
    parser.add_argument("--area", action="append", choices=FAULTS_BY_AREA)
    parser.add_argument("--only", default="", help="regular expression, looked for in the faults' names")
    parser.add_argument(
        "--fast",
        action="store_true",
        help="the few that `make test-all` runs, until a check of the preflight fails",
    )
    parser.add_argument("--sources", type=Path, default=ROOT, help="another checkout")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--shown", action="store_true", help="all lines that were said, not the first alone")
    chosen, more = parser.parse_known_args()  # what is left goes to the run
    faults = [
        f
        for f in FAULTS
        if (not chosen.area or f.area in chosen.area)
        and re.search(chosen.only, f.name)
        and (not chosen.fast or f.name in FAST)
    ]
    # The sources as they are, once with each list of flags: an alarm would say that the flags are the fault.
    controls = [
        fault("clean sources", "", flags=f) for f in sorted({"", *(" ".join(f.flags) for f in faults)})
    ]
    alarms: list[str] = []
    results: list[Result] = []
    for result in examine_all([*controls, *faults], chosen.workers, more, chosen.fast, chosen.sources):
        if not result.fault.edits:
            found = [*result.lines, *([result.crash] if result.crash else [])]
            name = " ".join([result.fault.name, *result.fault.flags])
            print("\n".join([f"{name}: " + ("ALARM" if found else "no alarm"), *found]), flush=True)
            alarms += found
            continue
        results.append(result)
        print(row(result), flush=True)
        if chosen.shown:
            print("\n".join(f"    {line}" for line in result.lines[1:]), flush=True)
    print(summary(results))
    return 1 if alarms or any(r.when == MISSED for r in results) else 0


if __name__ == "__main__":
    sys.exit(main())
