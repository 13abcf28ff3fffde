"""The settings: what each preset holds, what the command line makes of them, and what each bad value says."""

import contextlib
import io
import json
import math
import re
import shlex
import sys
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.settings import NOT_OF_THE_METHOD, PRESETS, Settings, flag, parse_settings

quick = settings(max_examples=150, deadline=None, derandomize=True)

# What the default run uses (docs/results.md says why), and the plan to the letter where it differs.
DEBUG = {
    "--preset": "debug",
    "--epochs": 20,
    "--batch-size": 512,
    "--seed": 0,
    "--device": "auto",
    "--threads": None,
    "--precision": "float32",
    "--data": "auto",
    "--data-dir": Path("data"),
    "--output-dir": Path("debug_output"),
    "--figure-format": "png",
    "--preflight": "stop",
    "--resume": False,
    "--rehearse": False,
    "--limit-train": None,
    "--limit-test": None,
    "--crop-padding": 2,
    "--model": "resnet20",
    "--exclude-layers": None,
    "--quantizer": "src.quantizer:DeadZoneLDZCompander",
    "--max-bits": None,
    "--fixed-bits": None,
    "--sparsity-weight": 1.8e-3,
    "--penalty-on": "stored",
    "--group-weights": "macs",
    "--sparsity-delay": 5.0,
    "--sparsity-ramp": 5.0,
    "--keep-dead": True,
    "--batch-norm-batches": 10,
    "--rate-warmup": 2.0,
    "--weights-lr": 1.2e-2,
    "--bit-lr": 1e-2,
    "--deadzone-lr": 1e-2,
    "--weights-decay": 0.3,
    "--bit-decay": 1.0,
    "--deadzone-decay": 1.25,
    "--beta2": 0.99,
    "--pace-steps": 1960,
}
PLAN = DEBUG | {
    "--preset": "plan",
    "--crop-padding": 4,
    "--exclude-layers": ("conv1", "bn", "linear"),
    "--sparsity-weight": 1.0,
    "--penalty-on": "quantized",
    "--group-weights": "equal",
    "--sparsity-delay": 5.0,
    "--sparsity-ramp": 5.0,
    "--weights-decay": 0.0,
    "--keep-dead": False,
    "--batch-norm-batches": 0,
    "--rate-warmup": 0.0,
    "--weights-lr": 1e-3,
    "--pace-steps": 0,
    "--bit-lr": 1e-3,
    "--deadzone-lr": 1e-3,
    "--bit-decay": 0.01,
    "--deadzone-decay": 0.01,
    "--beta2": 0.999,
}
# A minute's run through everything.
SMOKE = DEBUG | {
    "--preset": "smoke",
    "--epochs": 8,
    "--batch-size": 32,
    "--data": "synthetic",
    "--output-dir": Path("smoke_output"),
    "--rehearse": True,
    "--limit-train": 1600,
    "--limit-test": 500,
    "--sparsity-weight": 8e-3,
    "--sparsity-delay": 1.0,
    "--sparsity-ramp": 2.0,
    "--weights-lr": 1.6e-2,
    "--bit-lr": 4e-2,
    "--deadzone-lr": 3e-2,
}
COUNTS = ["--epochs", "--batch-size", "--threads", "--limit-train", "--limit-test"]
NUMBERS = [name for name, value in DEBUG.items() if isinstance(value, float)]
SWITCHES = [name for name, value in DEBUG.items() if isinstance(value, bool)]
WORDS = {
    "--preset": ["debug", "smoke", "plan"],
    "--device": ["auto", "cpu", "cuda", "mps"],
    "--precision": ["float32", "tf32", "bf16"],
    "--data": ["auto", "cifar10", "cifar100", "synthetic"],
    "--preflight": ["stop", "warn", "off", "only"],
    "--penalty-on": ["stored", "quantized"],
    "--group-weights": ["equal", "macs"],
    "--figure-format": ["png", "pdf"],
}


def by_flag(chosen: Settings) -> dict[str, object]:
    values = {flag(item.name): getattr(chosen, item.name) for item in fields(chosen)}
    return {n: tuple(v) if isinstance(v, list) else v for n, v in values.items()}


def attribute(name: str) -> str:
    return name[2:].replace("-", "_")


def refused_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr with which `arguments` are refused."""
    with pytest.raises(SystemExit) as stopped:
        parse_settings(arguments)
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert err.endswith("\n") and err.count("\n") == 1, err
    return err.rstrip()


# What they are


def test_without_a_flag_the_settings_are_the_debug_presets():
    assert by_flag(parse_settings([])) == DEBUG
    assert parse_settings([]) == Settings() == parse_settings(["--preset", "debug"])


def test_the_plan_preset_is_the_plan_to_the_letter():
    assert by_flag(parse_settings(["--preset", "plan"])) == PLAN


def test_the_smoke_preset_is_a_minutes_run():
    assert by_flag(parse_settings(["--preset", "smoke"])) == SMOKE


def test_the_settings_cannot_be_changed_after_the_start():
    with pytest.raises(FrozenInstanceError):
        Settings().epochs = 3  # type: ignore[misc]


# A value for each flag that is neither preset's.
OTHER = (
    dict.fromkeys((*COUNTS, "--seed", "--crop-padding", "--batch-norm-batches", "--pace-steps", *NUMBERS), 7)
    | {name: words[-1] for name, words in WORDS.items()}
    | {"--exclude-layers": ("layer1", ".*2$"), "--data-dir": Path("/a b"), "--output-dir": Path("c")}
    | {"--beta2": 0.5, "--quantizer": "a.module:Class", "--max-bits": 6, "--fixed-bits": 4}
    | {"--model": "a.b:net"}
)


@pytest.mark.parametrize("name", [name for name in DEBUG if name not in SWITCHES])
def test_every_setting_has_a_flag_that_sets_it_and_nothing_else(name):
    value = OTHER[name]
    got = by_flag(parse_settings([name, *(value if isinstance(value, tuple) else [str(value)])]))
    assert got == (PLAN if name == "--preset" else DEBUG | {name: value})


@pytest.mark.parametrize("preset", [[], ["--preset", "plan"]])
@pytest.mark.parametrize(
    ("typed", "name", "value"),
    [
        ("--resume", "--resume", True),
        ("--keep-dead", "--keep-dead", True),
        ("--no-keep-dead", "--keep-dead", False),
        ("--rehearse", "--rehearse", True),
        ("--no-rehearse", "--rehearse", False),
    ],
)
def test_a_switch_is_set_by_its_flag_alone(preset, typed, name, value, capsys):
    assert by_flag(parse_settings([*preset, typed])) == by_flag(parse_settings(preset)) | {name: value}
    assert "yes" in refused_line([typed, "yes"], capsys)


def test_the_flags_are_the_fields_and_no_more():
    assert sorted(DEBUG) == sorted(flag(item.name) for item in fields(Settings))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--preset", "plan", "--bit-lr", "0.5", "--exclude-layers", "linear"],
        ["--bit-lr", "0.5", "--exclude-layers", "linear", "--preset", "plan"],
        ["--exclude-layers", "linear", "--preset=plan", "--bit-lr=0.5"],
    ],
)
def test_a_flag_overrides_the_preset_wherever_it_stands(arguments):
    assert by_flag(parse_settings(arguments)) == PLAN | {"--bit-lr": 0.5, "--exclude-layers": ("linear",)}


def test_a_flag_that_says_the_other_presets_number_is_kept():
    chosen = parse_settings(["--sparsity-weight", "0.01", "--preset", "plan"])
    assert chosen.sparsity_weight == 0.01
    assert parse_settings(["--preset", "plan", "--weights-decay", "0"]).weights_decay == 0


def test_patterns_without_a_word_mean_that_nothing_is_excluded():
    assert tuple(parse_settings(["--exclude-layers"]).exclude_layers) == ()


# --help


@pytest.fixture(scope="module")
def helped() -> str:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), pytest.raises(SystemExit) as end:
        parse_settings(["--help"])
    assert end.value.code == 0
    return " ".join(said.getvalue().split())


def entry(helped: str, name: str) -> str:
    """The words about one flag, from the list of options."""
    options = helped.partition("options:")[2]
    starts = sorted(re.search(f" {other}[, ]", options).start() for other in DEBUG)
    start = re.search(f" {name}[, ]", options).start()
    return options[start : min((other for other in starts if other > start), default=len(options))]


@pytest.mark.parametrize("name", DEBUG)
def test_help_shows_every_flag_with_its_default_and_the_other_presets_values_where_they_differ(helped, name):
    def shown(value: object) -> str:
        if isinstance(value, tuple):
            return " ".join(value)
        if isinstance(value, bool):
            return "yes" if value else "no"
        return "none" if value is None else f"{value:g}" if isinstance(value, float) else str(value)

    text = entry(helped, name)
    others = [
        f"; preset {preset}: {shown(values[name])}"
        for preset, values in (("plan", PLAN), ("smoke", SMOKE))
        if name != "--preset" and values[name] != DEBUG[name]
    ]
    assert text.rstrip().endswith(f"(default: {shown(DEBUG[name])}{''.join(others)})")
    assert len(text.split("(default")[0].split()) > 4, "a flag without an explanation"


@pytest.mark.parametrize("name", WORDS)
def test_help_shows_the_words_that_a_flag_takes(helped, name):
    assert f"{name} {{{','.join(WORDS[name])}}}" in helped


# What is refused

BAD = [
    *[(name, text) for name in COUNTS for text in ("0", "-1", "-20")],
    *[(name, text) for name in (*COUNTS, "--seed") for text in ("1.5", "1e3", "many", "", "nan")],
    ("--seed", "-1"),
    *[(name, text) for name in ("--batch-norm-batches", "--pace-steps") for text in ("-1", "2.5", "")],
    ("--seed", str(2**63)),
    *[("--crop-padding", text) for text in ("-1", "9", "2.5", "")],
    *[(name, text) for name in NUMBERS for text in ("-1", "-0.5", "nan", "inf", "1e999", "much", "")],
    *[("--beta2", text) for text in ("1", "1.0", "1.5")],
    *[(name, text) for name in WORDS for text in ("nothing", "AUTO", "")],
]


@pytest.mark.parametrize(("name", "text"), BAD)
def test_a_bad_value_gets_one_sentence_with_its_flag_and_its_value_and_exit_status_2(name, text, capsys):
    line = refused_line([name, text], capsys)
    assert line.startswith("error: ")
    assert name in line
    assert (text if text != "1e999" else "inf") in line
    assert text != "" or "''" in line
    assert "expected" in line or "is not a" in line


@pytest.mark.parametrize(
    ("name", "text"), [("--sparsity-weight", "-1e-3"), ("--bit-lr", "-inf"), ("--sparsity-delay", "-5e0")]
)
@pytest.mark.parametrize("joined", [False, True])
def test_a_negative_number_with_an_exponent_is_not_taken_for_a_flag(name, text, joined, capsys):
    line = refused_line([f"{name}={text}"] if joined else [name, text], capsys)
    assert f"{name} is {float(text)}" in line


def test_a_coefficient_beyond_float32_is_refused(capsys):
    assert "--sparsity-weight is 1e+39" in refused_line(["--sparsity-weight", "1e39"], capsys)


@pytest.mark.parametrize("name", WORDS)
def test_a_word_that_is_not_known_is_answered_with_those_that_are(name, capsys):
    line = refused_line([name, "nothing"], capsys)
    assert all(word in line for word in WORDS[name])


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--no-such-flag", "3"], "--no-such-flag"),
        (["--epoch", "3"], "--epoch"),  # no abbreviations: a later flag would change their meaning
        (["stray"], "stray"),
        (["--epochs"], "--epochs"),
        (["--epochs", "--seed", "1"], "--epochs"),
    ],
)
def test_a_mistake_in_the_flags_themselves_is_one_sentence_too(arguments, named, capsys):
    assert named in refused_line(arguments, capsys)


def test_a_refusal_says_how_to_see_the_settings(capsys):
    assert "--help" in refused_line(["--epochs", "0"], capsys)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"epochs": 0}, "--epochs is 0; expected a whole number, 1 or more"),
        ({"batch_size": -3}, "--batch-size is -3"),
        ({"seed": 2**63}, f"--seed is {2**63}; expected a whole number from 0 to {2**63 - 1}"),
        ({"sparsity_ramp": -1.0}, "--sparsity-ramp is -1.0; expected a finite number, 0 or more"),
        ({"bit_decay": float("nan")}, "--bit-decay is nan"),
        ({"beta2": 1.0}, "--beta2 is 1.0; expected a number from 0 to less than 1"),
        ({"crop_padding": 9}, "--crop-padding is 9; expected a whole number from 0 to 8"),
        ({"data": "mnist"}, "--data is 'mnist'; expected one of auto, cifar10, cifar100, synthetic"),
    ],
)
def test_made_in_python_a_bad_value_raises_value_error_with_the_flag_the_value_and_the_range(change, named):
    with pytest.raises(ValueError) as error:
        replace(Settings(), **change)
    assert named in str(error.value)


# Any value


@quick
@given(st.sampled_from([*COUNTS, "--seed"]), st.integers(-(10**19), 10**19))
def test_a_whole_number_is_taken_as_it_is_or_refused(name, value):
    largest = {"--threads": 4096, "--epochs": 10**6}.get(name, value)
    good = 0 <= value < 2**63 if name == "--seed" else 1 <= value <= largest
    if good:
        assert getattr(parse_settings([f"{name}={value}"]), attribute(name)) == value
    else:
        with pytest.raises(ValueError, match=f"{name} is {value};"):
            Settings(**{attribute(name): value})


LARGEST = {"--sparsity-weight": torch.finfo(torch.float32).max, "--beta2": math.nextafter(1, 0)}


@quick
@given(st.sampled_from(NUMBERS), st.floats())
def test_a_number_is_taken_to_its_last_digit_or_refused(name, value):
    largest = LARGEST.get(name, sys.float_info.max)
    if 0 <= value <= largest:
        chosen = parse_settings([f"{name}={value!r}", "--preset", "plan"])
        assert getattr(chosen, attribute(name)) == value
    else:
        with pytest.raises(SystemExit) as stopped:
            parse_settings([f"{name}={value!r}"])
        assert stopped.value.code == 2


printable = st.text(min_size=1).filter(str.isprintable)
choices = st.fixed_dictionaries(
    {},
    optional={
        **{attribute(name): st.integers(1, 4096) for name in COUNTS},
        **{attribute(name): st.floats(0, 3e38) for name in NUMBERS},
        **{attribute(name): st.sampled_from(words) for name, words in WORDS.items()},
        "epochs": st.integers(2, 4096),  # a rehearsal needs two
        "seed": st.integers(0, 2**63 - 1),
        "beta2": st.floats(0, 1, exclude_max=True),
        "exclude_layers": st.lists(printable).map(tuple),
        "output_dir": st.text(min_size=1).map(Path),
        **{attribute(name): st.booleans() for name in SWITCHES},
    },
)


@quick
@given(choices)
def test_to_json_is_plain_json_and_tells_every_setting_but_how_the_run_was_started(chosen):
    made = Settings(**chosen)
    told = json.loads(json.dumps(made.to_json(), allow_nan=False))
    assert told == made.to_json()
    kept = {name: value for name, value in by_flag(made).items() if name != "--resume"}
    for name, value in kept.items():
        as_json = (
            str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
        )
        assert told[attribute(name)] == as_json
    assert len(told) == len(kept)


# In words

SAID_ELSEWHERE = {
    "preset": "plan",
    "epochs": 3,
    "seed": 7,
    "device": "cpu",
    "threads": 2,
    "data": "synthetic",
    "data_dir": Path("a"),
    "output_dir": Path("b"),
    "figure_format": "pdf",
    "preflight": "off",
    "resume": True,
    "rehearse": True,
}


def test_settings_are_described_by_their_preset_and_the_flags_that_differ_from_it():
    assert Settings().described() == "debug"
    assert parse_settings(["--preset", "plan"]).described() == "plan"
    chosen = ["--sparsity-weight", "1", "--weights-lr", "1e-3"]
    assert parse_settings(chosen).described() == "debug, with --sparsity-weight 1 --weights-lr 0.001"
    # Plan's number under preset debug differs from debug, and not from plan.
    assert parse_settings(["--bit-lr", "1e-3"]).described() == "debug, with --bit-lr 0.001"
    assert parse_settings(["--bit-lr", "1e-3", "--preset", "plan"]).described() == "plan"
    assert parse_settings(["--no-keep-dead"]).described() == "debug, with --no-keep-dead"
    assert parse_settings(["--keep-dead", "--preset", "plan"]).described() == "plan, with --keep-dead"


def test_what_has_no_part_in_the_numbers_or_is_said_elsewhere_is_not_described():
    assert sorted(NOT_OF_THE_METHOD) == sorted(SAID_ELSEWHERE)
    assert replace(Settings(**PRESETS["plan"]), **SAID_ELSEWHERE).described() == "plan"


def test_settings_that_are_the_same_by_design_can_be_left_out_of_the_description():
    chosen = Settings(weights_lr=1e-3, bit_lr=1e-3)
    assert chosen.described(but=("weights_lr",)) == "debug, with --bit-lr 0.001"
    assert chosen.described(but=("weights_lr", "bit_lr")) == "debug"


# A pattern that begins with a hyphen would be taken for a flag; no module of a network has such a name.
typable = st.lists(printable.filter(lambda text: not text.startswith("-"))).map(tuple)


@quick
@given(choices, typable)
def test_the_flags_described_typed_in_again_give_the_same_method(chosen, patterns):
    made = Settings(**({"preset": "debug"} | chosen | {"exclude_layers": patterns}))
    preset, _, flags = made.described().partition(", with ")
    again = parse_settings(["--preset", preset, *shlex.split(flags)])
    said_elsewhere = {name: getattr(made, name) for name in NOT_OF_THE_METHOD}
    assert replace(again, **said_elsewhere) == made
