"""The settings of a run: one frozen dataclass, its presets, and the command line made from it."""

import argparse
import re
import shlex
import sys
from collections.abc import Collection
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NoReturn

from experiments.live import ClosedOutputError, LiveLine, refuse

DEVICES = ("auto", "cpu", "cuda", "mps")
PRECISIONS = {
    "float32": "float32",
    "tf32": "TF32 convolutions (all else float32)",
    "bf16": "bf16 in the layers and between them (weights, quantizers and loss in float32)",
}
DATA = ("auto", "cifar10", "cifar100", "synthetic")
FORMATS = ("png", "pdf")  # of the pictures
STORED, QUANTIZED = "stored", "quantized"  # the weights that the penalty is on
EQUAL, MACS = "equal", "macs"  # what a group counts in the penalty


def _setting(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Settings:
    """What a run depends on. The defaults are preset `debug`.

    Raises: ValueError naming the flag, its value, what was expected.
    """

    preset: str = _setting("debug", "where the other settings start from", ("debug", "smoke", "plan"))
    epochs: int = _setting(20, "passes over the training set")
    batch_size: int = _setting(512, "images a training step")
    seed: int = _setting(0, "of weights, order and augmentation of the images, and a network's own draws")
    device: str = _setting("auto", "auto: CUDA, else MPS, else the CPU", DEVICES)
    threads: int | None = _setting(None, "CPU threads; without it, one a core that this process may use")
    precision: str = _setting(
        "float32", "faster convolutions give other digits; tf32 is CUDA's alone", tuple(PRECISIONS)
    )
    data: str = _setting("auto", "auto: CIFAR-10 if it can be had, else the built-in stand-in", DATA)
    data_dir: Path = _setting(
        Path("data"), "folder that holds, or will hold, cifar-10-batches-py or cifar-100-python"
    )
    output_dir: Path = _setting(Path("debug_output"), "folder for the pictures, history.json, checkpoints")
    figure_format: str = _setting("png", "of the pictures; pdf is for papers", FORMATS)
    preflight: str = _setting(
        "stop",
        "check the pipeline before the first epoch; a check that fails stops the run, or only warns; "
        "'only' ends after the checks",
        ("stop", "warn", "off", "only"),
    )
    resume: bool = _setting(False, "go on from the last checkpoint in --output-dir, if there is one")
    rehearse: bool = _setting(
        False, "stop and resume once in mid-run, as a long run may have to, and verify the packed file"
    )
    limit_train: int | None = _setting(None, "use only the first so many training images")
    limit_test: int | None = _setting(None, "use only the first so many test images")
    crop_padding: int = _setting(2, "pixels of zeros around a training image before a random crop of it")
    model: str = _setting(
        "resnet20",
        "resnet20, 32, 44, 56 or 110, or someone's own: module:callable, such as torchvision.models:vgg11_bn",
    )
    exclude_layers: tuple[str, ...] | None = _setting(
        None,
        "layers left in full precision: regular expressions looked for in their names; without it, the "
        "layer that the image enters and the one that gives the logits",
    )
    quantizer: str = _setting(
        "src.quantizer:DeadZoneLDZCompander", "module:Class; utils_quantization.Quantizer says what it needs"
    )
    max_bits: int | None = _setting(None, "upper bound of the learned bits; without it, the class's own")
    fixed_bits: int | None = _setting(None, "bits of every quantized weight, which are then not learned")
    sparsity_weight: float = _setting(1.8e-3, "peak of the group lasso's coefficient")
    penalty_on: str = _setting(
        STORED,
        "weights that the group lasso is on: the stored ones feel it inside the dead zone too",
        (STORED, QUANTIZED),
    )
    group_weights: str = _setting(
        MACS,
        "what a channel's norm counts in the group lasso: 1, or in proportion to its MACs",
        (EQUAL, MACS),
    )
    sparsity_delay: float = _setting(5.0, "the penalty's coefficient is 0 up to this epoch, counted from 0")
    sparsity_ramp: float = _setting(5.0, "epochs over which it then climbs to its peak")
    keep_dead: bool = _setting(
        True, "while the penalty acts, filters and input slices quantized to zero stay zero"
    )
    batch_norm_batches: int = _setting(
        10, "training batches over which batch-norm statistics are taken afresh before each test; 0: none"
    )
    rate_warmup: float = _setting(2.0, "first epochs, in which the learning rates climb to their schedule")
    weights_lr: float = _setting(1.2e-2, "AdamW's learning rate for weights, biases and batch norms")
    bit_lr: float = _setting(1e-2, "AdamW's learning rate for the bit parameters")
    deadzone_lr: float = _setting(1e-2, "AdamW's learning rate for the dead-zone parameters")
    weights_decay: float = _setting(0.3, "AdamW's weight decay for weights, biases and batch norms")
    bit_decay: float = _setting(1.0, "AdamW's weight decay for the bit parameters")
    deadzone_decay: float = _setting(1.25, "AdamW's weight decay for the dead-zone parameters")
    beta2: float = _setting(
        0.99, "AdamW's beta2: it remembers squared gradients for about 1 / (1 - beta2) steps"
    )
    pace_steps: int = _setting(
        1960,
        "optimizer steps that the quantizers' rates and the weights' decay are meant for: a longer run "
        "lowers the rates in proportion, the decay with its square root; 0: never",
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            _check(item, getattr(self, item.name))
        if self.rehearse and self.epochs < 2:
            raise ValueError(
                "--epochs is 1, and --rehearse stops in between; expected 2 or more, or --no-rehearse"
            )
        if self.max_bits is not None and self.fixed_bits is not None:
            raise ValueError(
                f"--max-bits is {self.max_bits} and --fixed-bits is {self.fixed_bits}; expected one of them, "
                f"since fixed bits have no upper bound to learn under"
            )

    def to_json(self) -> dict[str, Any]:
        """All that the run depends on, as JSON has it: `resume` says how it was started, not what it is."""
        kept = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items() if k != "resume"}
        return {k: str(v) if isinstance(v, Path) else v for k, v in kept.items()}

    def described(self, but: Collection[str] = ()) -> str:
        """The preset, and the flags by which these settings differ from it, as one would type them.

        Settings named in `but`, and those that say where a run computes or writes, are left out.

        >>> Settings(sparsity_weight=1.0, weights_lr=1e-3, output_dir=Path("a")).described()
        'debug, with --sparsity-weight 1 --weights-lr 0.001'
        """
        preset = PRESETS[self.preset]
        flags = [
            _as_typed(item.name, getattr(self, item.name))
            for item in fields(self)
            if item.name not in (*NOT_OF_THE_METHOD, *but)
            and getattr(self, item.name) != preset.get(item.name, item.default)
        ]
        return f"{self.preset}, with {' '.join(flags)}" if flags else self.preset


# What a preset changes in the defaults above. `plan` is the plan to the letter: its pattern "conv1" also hits
# the first convolution of all nine blocks.
PRESETS: dict[str, dict[str, Any]] = {
    "debug": {},
    "plan": {
        "crop_padding": 4,
        "exclude_layers": ("conv1", "bn", "linear"),
        "sparsity_weight": 1.0,
        "penalty_on": QUANTIZED,
        "group_weights": EQUAL,
        "keep_dead": False,
        "batch_norm_batches": 0,
        "rate_warmup": 0.0,
        "weights_lr": 1e-3,
        "bit_lr": 1e-3,
        "deadzone_lr": 1e-3,
        "weights_decay": 0.0,
        "bit_decay": 0.01,
        "deadzone_decay": 0.01,
        "beta2": 0.999,
        "pace_steps": 0,
    },
    "smoke": {
        "epochs": 8,
        "batch_size": 32,
        "data": "synthetic",
        "output_dir": Path("smoke_output"),
        "rehearse": True,
        "limit_train": 1600,
        "limit_test": 500,
        "sparsity_weight": 8e-3,
        "sparsity_delay": 1.0,
        "sparsity_ramp": 2.0,
        "weights_lr": 1.6e-2,
        "bit_lr": 4e-2,
        "deadzone_lr": 3e-2,
    },
}

# What `Settings.described` leaves out: said elsewhere, or without a part in the numbers.
NOT_OF_THE_METHOD = (
    "preset",
    "epochs",
    "seed",
    "device",
    "threads",
    "data",
    "data_dir",
    "output_dir",
    "figure_format",
    "preflight",
    "resume",
    "rehearse",
)

FOLDERS = ("data_dir", "output_dir")  # what a file that goes to others leaves out
NOT_NEGATIVE = ("batch_norm_batches", "pace_steps")
MAX_EPOCHS = 1_000_000
MAX_BITS = 32
AT_LEAST_ONE = ("epochs", "batch_size", "threads", "limit_train", "limit_test")
MAX_SEED = 2**63 - 1
MAX_THREADS = 4096
MAX_CROP_PADDING = 8  # a quarter of an image's side: with more, the zeros shift the inputs' statistics
MAX_FLOAT32 = 3.4028234663852886e38


def flag(name: str) -> str:
    """
    >>> flag("batch_size")
    '--batch-size'
    """
    return "--" + name.replace("_", "-")


def _as_typed(name: str, value: Any) -> str:
    """
    >>> _as_typed("keep_dead", False), _as_typed("exclude_layers", ("^conv1$", "."))
    ('--no-keep-dead', "--exclude-layers '^conv1$' .")
    """
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    values = value if isinstance(value, tuple) else (value,)
    return " ".join([flag(name), *(shlex.quote(_shown(v)) for v in values)])


def check_model(name: str) -> None:
    """Raises: ValueError for what is no name of a network, as --model takes it."""
    if not re.fullmatch(r"resnet(20|32|44|56|110)|\w+(\.\w+)*:\w+", name):
        raise ValueError(
            f"--model is {name!r}; expected resnet20, 32, 44, 56 or 110, or module:callable, such as "
            f"torchvision.models:vgg11_bn"
        )


def _check(item: Field[Any], value: Any) -> None:
    name = flag(item.name)
    choices = item.metadata["choices"]
    for text in value if isinstance(value, tuple) else (value,):
        # Titles, logs and files hold these texts, and not all of them take a byte that is no UTF-8.
        if isinstance(text, str) and not text.isprintable():
            raise ValueError(f"{name} is {text!r}; expected UTF-8 without control characters")
    if choices and value not in choices:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(choices)}")
    if item.name in AT_LEAST_ONE and value is not None and value < 1:
        raise ValueError(f"{name} is {value}; expected a whole number, 1 or more")
    if item.name in NOT_NEGATIVE and value < 0:
        raise ValueError(f"{name} is {value}; expected a whole number, 0 or more")
    if item.name in ("max_bits", "fixed_bits") and value is not None and not 1 <= value <= MAX_BITS:
        raise ValueError(f"{name} is {value}; expected a whole number from 1 to {MAX_BITS}")
    if item.name == "quantizer" and not re.fullmatch(r"\w+(\.\w+)*:\w+", value):
        raise ValueError(f"{name} is {value!r}; expected module:Class, such as {Settings.quantizer}")
    if item.name == "model":
        check_model(value)
    if item.name == "epochs" and value > MAX_EPOCHS:
        raise ValueError(f"{name} is {value}; expected a whole number from 1 to {MAX_EPOCHS}")
    if item.name == "seed" and not 0 <= value <= MAX_SEED:
        raise ValueError(f"{name} is {value}; expected a whole number from 0 to {MAX_SEED}")
    if item.name == "beta2" and not 0 <= value < 1:
        raise ValueError(f"{name} is {value}; expected a number from 0 to less than 1")
    largest = MAX_FLOAT32 if item.name == "sparsity_weight" else sys.float_info.max
    if item.type is float and not 0 <= value <= largest:
        raise ValueError(f"{name} is {value}; expected a finite number, 0 or more")
    if item.name == "crop_padding" and not 0 <= value <= MAX_CROP_PADDING:
        raise ValueError(f"{name} is {value}; expected a whole number from 0 to {MAX_CROP_PADDING}")
    if item.name == "threads" and value is not None and value > MAX_THREADS:
        raise ValueError(f"{name} is {value}; expected a whole number from 1 to {MAX_THREADS}")


class Parser(argparse.ArgumentParser):
    """One sentence for a mistake, not the whole usage."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, others = super().parse_known_args(args, namespace)
        for action in self._actions:
            # argparse makes a list of --flag=--
            if action.nargs is None and isinstance(getattr(found, action.dest, None), list):
                self.error(f"argument {'/'.join(action.option_strings)}: expected one argument")
        return found, others

    def print_help(self, file: Any = None) -> None:
        live = LiveLine()
        try:
            live.say(self.format_help().rstrip())
        except ClosedOutputError as error:  # which argparse passes over in silence
            live.close()
            raise SystemExit(refuse(str(error))) from None

    def error(self, message: str) -> NoReturn:
        raise SystemExit(refuse(f"{message}; --help lists the settings"))


def parse_settings(arguments: list[str] | None = None) -> Settings:
    """Settings from the command line: the preset's, then what the flags say. Exits with 2 for a bad one."""
    parser = Parser(
        prog="python -m experiments.debug_run",
        description="Train a network on CIFAR with CoDeQ quantizers and watch the whole pipeline work.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        allow_abbrev=False,
    )
    # argparse would take -1e-3 and -inf for flags.
    parser._negative_number_matcher = re.compile(r"-(\d|\.|inf|nan)")
    for item in fields(Settings):
        _add_flag(parser, item)
    given = vars(parser.parse_args(arguments))  # only what was typed
    if "exclude_layers" in given:
        given["exclude_layers"] = tuple(given["exclude_layers"])
    preset = given.get("preset", "debug")
    try:
        return Settings(**(PRESETS.get(preset, {}) | given))
    except ValueError as error:
        parser.error(str(error))


def _add_flag(parser: argparse.ArgumentParser, item: Field[Any]) -> None:
    others = [f"; preset {name}: {_shown(p[item.name])}" for name, p in PRESETS.items() if item.name in p]
    default = _shown(item.default) + "".join(others)
    kwargs: dict[str, Any] = {
        "help": f"{item.metadata['help']} (default: {default})",
        "default": argparse.SUPPRESS,
    }
    if item.metadata["choices"]:
        kwargs["metavar"] = "{" + ",".join(item.metadata["choices"]) + "}"
    elif item.type is bool:
        kwargs["action"] = "store_true" if item.name == "resume" else argparse.BooleanOptionalAction
    elif item.name == "exclude_layers":
        kwargs |= {"nargs": "*", "metavar": "PATTERN"}
    else:
        kwargs["type"], kwargs["metavar"] = _CONVERTERS[item.type]
    parser.add_argument(flag(item.name), **kwargs)


def _shown(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value)
    if isinstance(value, float):
        return f"{value:g}" if float(f"{value:g}") == value else repr(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "none" if value is None else str(value)


def folder_path(text: str) -> Path:
    """A folder's path as a flag gives it. Raises: argparse.ArgumentTypeError for an empty one."""
    if not text:
        raise argparse.ArgumentTypeError("'' is no folder's name; '.' is the current one")
    return Path(text)


def whole_number(text: str) -> int:
    """A whole number as a flag gives it. Raises: argparse.ArgumentTypeError for another text."""
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None


_CONVERTERS: dict[Any, tuple[Any, str]] = {
    int: (whole_number, "N"),
    int | None: (lambda text: None if text == "none" else whole_number(text), "N"),
    str: (str, "NAME"),
    float: (_number, "X"),
    Path: (folder_path, "FOLDER"),
}
