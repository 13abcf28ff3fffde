"""What a run tells a person: each text against the history that it is made from, and in its columns."""

import base64
import csv
import html.parser
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from runs import ALIVE, CONSTANT, NULL, good_run, layer_count

import resnet
from experiments.history import Check, DataRecord, History, Origin, Resumption
from experiments.page import report_page
from experiments.report import (
    check_lines,
    compressed_lines,
    failed_lines,
    file_lines,
    first_lines,
    layer_table,
    metrics_csv,
    metrics_lines,
    picture_title,
    preflight_line,
    run_line,
    table_header,
    table_row,
    verdict_lines,
)
from experiments.settings import PRESETS, Settings
from metrics import NetworkCount, count_network

quick = settings(max_examples=150, deadline=None, derandomize=True)
STAND_IN = DataRecord("synthetic stand-in", "CIFAR-10 could not be had: no network", True, 10, 5000, 1000)
OVERRIDDEN = Settings(sparsity_weight=1.0, weights_lr=1e-3)
DENSE = count_network(resnet.resnet20())


def by_label(text: str) -> dict[str, str]:
    """The first lines by their label, such as "Device"."""
    whole = re.sub(r"\n {11}", " ", text)
    return {line.partition(":")[0]: line.partition(":")[2].strip() for line in whole.splitlines()}


def on_stand_in(history: History) -> History:
    return replace(history, data=STAND_IN)


# The first lines


def test_the_first_lines_say_what_runs_on_what_with_which_data():
    lines = by_label(first_lines(good_run(), Settings(seed=3, device="cpu"), DENSE))
    assert lines == {
        "Versions": "python 3.11.7, torch 2.9.0",
        "Device": "cpu (2 threads), float32",
        "Preset": "debug",
        "Training": "20 epochs of batches of 512, seed 3",
        "Data": "CIFAR-10: 50,000 training and 10,000 test images (data/cifar-10-batches-py)",
        "Quantized": "4 of 6 layers; not: conv1, linear",
    }


@pytest.mark.parametrize(
    ("chosen", "described"),
    [
        (Settings(), "debug"),
        (Settings(**PRESETS["plan"], preset="plan"), "plan"),
        (OVERRIDDEN, "debug, with --sparsity-weight 1 --weights-lr 0.001"),
    ],
)
def test_a_preset_that_flags_override_is_said_with_them_in_lines_and_titles(chosen, described):
    assert by_label(first_lines(good_run(), chosen, DENSE))["Preset"] == described
    assert picture_title(good_run(7), chosen) == f"ResNet-20 on CIFAR-10, preset {described}, epoch 7"


@pytest.mark.parametrize(
    ("asked", "device", "said"),
    [
        ("auto", "cpu, 2 threads", True),
        ("cpu", "cpu, 2 threads", False),
        ("auto", "cuda, NVIDIA H100", False),
        ("auto", "cpu, 1 threads, 2 processes", True),
    ],
)
def test_a_cpu_that_nobody_asked_for_is_explained(asked, device, said):
    lines = by_label(first_lines(replace(good_run(), device=device), Settings(device=asked), DENSE))
    assert lines["Device"] == f"{device}, float32" + (" (auto: no CUDA or MPS here)" if said else "")


def test_a_network_that_is_quantized_throughout_has_no_layer_named_as_not():
    lines = by_label(first_lines(replace(good_run(), full_precision=[]), Settings(), DENSE))
    assert lines["Quantized"] == "4 of 4 layers; not: none"


def test_the_stand_in_is_told_loudly_in_the_first_line_and_its_reason_beside_the_data():
    history = on_stand_in(good_run())
    first, *others = re.sub(r"\n {11}", " ", first_lines(history, Settings(), DENSE)).splitlines()
    assert first.startswith("*** NOT CIFAR-10") and STAND_IN.name in first
    assert [line for line in others if line.startswith("***")] == []
    (data,) = (line for line in others if line.startswith("Data:"))
    assert STAND_IN.source in data
    assert f"[{STAND_IN.name}]" in table_header(STAND_IN)
    assert "SYNTHETIC STAND-IN, NOT CIFAR-10" in picture_title(history, Settings())


def test_cifar10_bears_no_mark_of_the_stand_in():
    history = good_run()
    for text in (first_lines(history, Settings(), DENSE), table_header(history.data)):
        assert "***" not in text and "[" not in text
    assert "NOT" not in picture_title(history, Settings())


def test_a_step_that_no_graph_holds_is_said():
    history = good_run()
    assert "Graphs" not in by_label(first_lines(history, Settings(), DENSE))
    history.needs_host = True
    assert by_label(first_lines(history, Settings(), DENSE))["Graphs"].startswith("none, because")
    assert "Branches" not in by_label(first_lines(history, Settings(), DENSE))
    history.may_skip = True
    assert "may leave layers out" in by_label(first_lines(history, Settings(), DENSE))["Branches"]


def test_bf16_that_the_device_has_no_instructions_for_is_said():
    history = good_run()
    assert "bf16" not in first_lines(history, Settings(), DENSE)
    history.emulates_bf16 = True
    assert "no instructions for bf16" in by_label(first_lines(history, Settings(), DENSE))["Warning"]


def test_each_time_that_a_run_was_resumed_is_said_with_what_was_otherwise():
    history = replace(good_run(), resumed=[Resumption(3, []), Resumption(5, ["torch 2.9.0 before", "a b"])])
    *_, third, fifth = first_lines(history, Settings(), DENSE).splitlines()
    assert third == "Resumed:   after epoch 3"
    assert fifth == "Resumed:   after epoch 5; torch 2.9.0 before; a b"


def test_every_first_line_has_its_words_in_the_same_column():
    lines = first_lines(good_run(), OVERRIDDEN, DENSE).splitlines()
    assert all(len(line) <= 80 for line in lines)
    for line in re.sub(r"\n {11}", " ", "\n".join(lines)).splitlines():
        assert re.fullmatch(r"[A-Z][a-z]+: +", line[:11]) and line[11] != " ", line


# The table


def bars(line: str) -> list[int]:
    """Where the columns of a line end."""
    return [i for i, c in enumerate(line) if c in "|+"]


def test_a_row_shows_shares_in_percent_and_each_number_in_its_column():
    record = replace(
        runs.epoch_record(7), loss=1.23456, accuracy=0.70706, unstructured_sparsity=0.7661,
        structured_sparsity=0.0612, learned_bits=4.0349, seconds=49.96)  # fmt: skip
    assert table_row(record) == "    7 |   1.2346 |  70.71 |  76.61 |   6.12 |  4.03 |   50.0"


@pytest.mark.parametrize("data", [good_run(1).data, STAND_IN], ids=["CIFAR-10", "stand-in"])
def test_the_header_names_each_column_and_its_unit_above_it(data):
    blank, *_, names, units, rule = table_header(data).split("\n")
    assert blank == "" and set(rule) == {"-", "+"}
    columns = zip(*(map(str.strip, line.split("  [")[0].split("|")) for line in (names, units)), strict=True)
    assert list(columns) == [
        ("Epoch", ""), ("Loss", "CE + pen"), ("Acc", "%"), ("Unstr", "%"), ("Struct", "%"),
        ("Bits", "mean"), ("Time", "s")]  # fmt: skip
    # The "+" in "CE + pen" is no end of a column.
    assert bars(names) == bars(units.replace("+", " ")) == bars(rule)


shares = st.floats(0, 1)


@quick
@given(
    st.fixed_dictionaries(
        {
            "epoch": st.integers(1, 99_999),
            "loss": st.floats(0, 999.9999) | st.sampled_from([float("nan"), float("inf")]),
            "accuracy": shares,
            "unstructured_sparsity": shares,
            "structured_sparsity": shares,
            "learned_bits": st.floats(1, 32),
            "seconds": st.floats(0, 9999.9),
        }
    )
)
def test_whatever_the_numbers_a_row_keeps_its_columns(numbers):
    row = table_row(replace(runs.epoch_record(1), **numbers))
    rule = table_header(STAND_IN).splitlines()[-1]
    assert bars(row.replace("e+", "e ")) == bars(rule) and len(row) == len(rule)


# The final metrics


def test_the_final_metrics_are_the_four_ratios_and_the_ceiling():
    names = (
        "structured_bops_ratio",
        "unstructured_bops_ratio",
        "structured_mac_ratio",
        "unstructured_mac_ratio",
    )
    ratios = dict(zip(names, (7.125, 20.5, 1.5, 4.25), strict=True))
    lines = metrics_lines(runs.final(**ratios)).splitlines()
    assert lines[8:] == ["", *layer_table(runs.final().count).splitlines()]
    assert lines[:8] == [
        "",
        "--- Final Compression Metrics ---",
        "Structured BOPs compression:   7.12x",
        "Unstructured BOPs compression: 20.50x",
        "Structured MACs compression:   1.50x",
        "Unstructured MACs compression: 4.25x",
        "Ceiling: 91.62x structured, 91.50x unstructured, if the 2 quantized layers cost",
        f"         nothing (of {18 + 36 + 27 + 90} MACs)",
    ]


def test_a_network_with_nothing_left_is_told_in_words_and_no_ratio_is_written_as_inf():
    infinite = {name: float("inf") for name in ("structured_bops_ratio", "structured_mac_ratio")}
    texts = metrics_lines(runs.final(**infinite)), compressed_lines(runs.compressed(slim_macs=0))
    for text, times in zip(texts, (2, 1), strict=True):
        assert text.count("infinite (nothing is left)") == times and "infx" not in text


# The compressed network


def test_the_compressed_network_is_told_with_all_its_numbers():
    text = compressed_lines(runs.compressed(slim_accuracy=0.8124, agreement=0.99985, packed_differs=3))
    lines = text.splitlines()
    assert lines[1] == "--- The Compressed Network ---"
    assert all(len(line) <= 80 for line in lines)
    whole = " ".join(text.split())
    for words in (
        "Smaller network: 101,234 of 269,722 parameters, 20,275,520 of 40,551,040 MACs (2.00x), "
        "counted on the network itself",
        "10,000 test images: largest difference 1e-05 of logits up to 12.5, 99.98 % equal",
        "accuracy 81.24 % against 81.25 %",
        "Packed file: 54,321 bytes, 20.0 times smaller than the float32 state_dict's 1,086,420",
        "read back: 3 logits differ, accuracy 81.25 %",
        "no speed-up in this runtime",
    ):
        assert words in whole


def test_each_latency_is_told_in_milliseconds_with_its_spread():
    seconds = {"median": 0.0123, "least": 0.0119, "most": 0.25}
    found = runs.compressed(latency_seconds={"dense, batch 1": seconds, "fake-quantized, batch 128": seconds})
    rows = [line for line in compressed_lines(found).splitlines() if " ms " in line]
    assert [row.split(" ms ")[0].split() for row in rows] == [
        ["dense,", "batch", "1", "12.30"], ["fake-quantized,", "batch", "128", "12.30"]]  # fmt: skip
    assert all(row.endswith("(11.90 to 250.00)") for row in rows)
    assert len({row.index(" ms ") for row in rows}) == 1


# Checks


def test_the_cause_of_a_failed_check_stands_on_a_line_of_its_own():
    passed = Check("PASS", "loss", "2.0 -> 1.0")
    failed = Check("FAIL", "loss", "1.0 -> 2.0. Likely cause: a high rate")
    assert check_lines(passed) == ["PASS  loss: 2.0 -> 1.0"]
    assert check_lines(failed) == ["FAIL  loss: 1.0 -> 2.0", "      Likely cause: a high rate"]


words = st.lists(st.text("abc-_.%/", min_size=1, max_size=30), min_size=1, max_size=40).map(" ".join)


@quick
@given(st.sampled_from(["PASS", "FAIL", "SKIP"]), words, words)
def test_the_verdicts_lines_are_80_columns_at_most_and_no_word_of_a_failure_is_lost_or_broken(
    status, said, why
):
    message = f"{said}. Likely cause: {why}" if status == "FAIL" else said
    lines = check_lines(Check(status, "name", message))
    assert all(len(line) <= 80 for line in lines)
    if status == "PASS":
        assert len(lines) == 1
        kept = lines[0].removeprefix("PASS  name:").removesuffix(" ...").split()
        assert kept == said.split()[: len(kept)]
        assert lines[0].endswith(" ...") or kept == said.split()
    else:
        text = f"{status} name: {message}".replace(". Likely", " Likely")
        assert " ".join(lines).split() == text.split()


def test_a_status_is_coloured_only_where_it_is_asked_for():
    checks = [Check("PASS", "a", "1"), Check("FAIL", "b", "2. Likely cause: c"), Check("SKIP", "d", "3")]
    coloured = verdict_lines(checks, colour=True)
    assert coloured.count("\x1b[0m") == 3 and "\x1b[1;31mFAIL\x1b[0m  b: 2" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == verdict_lines(checks)
    assert "\x1b" not in verdict_lines(checks)


def test_much_that_is_left_in_full_precision_is_warned_of_once_with_its_share():
    def warned(*layers: str) -> str | None:
        history = replace(good_run(), full_precision=list(layers))
        return by_label(first_lines(history, Settings(), DENSE)).get("Warning")

    line = warned(*(x.name for x in DENSE.layers if re.search("conv1|linear", x.name)))
    assert line and "47.6 %" in line and "11 layers" in line and "2.10x" in line
    assert warned("conv1", "linear") is None  # 1.1 %
    assert warned(*(x.name for x in DENSE.layers)) is None  # the baseline, on purpose


def test_a_line_says_how_many_checks_of_a_preflight_hold_or_fail():
    checks = [Check("PASS", "a", "1"), Check("SKIP", "b", "no GPU"), Check("FAIL", "c", "2. Likely cause: d")]
    assert preflight_line(checks[:2], 1.6) == "Preflight: 1 checks hold, 2 s (skipped: b)"
    assert preflight_line(checks, 1.6) == "Preflight: 1 of 3 checks FAIL, 2 s (skipped: b)"


# The table of layers


def test_the_table_of_layers_has_a_row_a_layer_and_the_totals():
    layers = (
        layer_count("conv1", [ALIVE] * 3, bits=32, quantized=False, dense_macs=1_234_567),
        layer_count("layer1.0.conv1", [ALIVE, NULL, CONSTANT, NULL], bits=5, zero_weights=20, zero_filters=2,
                    dense_macs=3000, structured_macs=1000, unstructured_macs=1500),
        layer_count("linear", [ALIVE] * 10, bits=32, quantized=False))  # fmt: skip
    header, _, *rows, total = [line.split() for line in layer_table(NetworkCount(layers)).splitlines()]
    assert header[0] == "Layer"
    assert rows == [
        ["conv1", "32", "0.00", "0/3", "3/0/0", "27", "1,234,567"],
        ["layer1.0.conv1", "5", "55.56", "2/4", "1/1/2", "1,000", "3,000"],
        ["linear", "32", "0.00", "0/10", "10/0/0", "90", "90"],
    ]
    assert total == ["Total", "13.07", "2/17", "14/1/2", "1,117", "1,237,657"]


@pytest.mark.parametrize("depth", [20, 110])
def test_the_columns_of_the_table_of_layers_line_up(depth):
    lines = layer_table(count_network(getattr(resnet, f"resnet{depth}")())).splitlines()
    assert len(lines) == depth + 3
    assert len({len(line) for line in lines[2:]}) == 1 and all(len(line) <= 80 for line in lines)


def test_a_long_name_of_a_layer_keeps_its_end_and_the_table_its_width():
    name = "features.denseblock4.denselayer16.conv2"
    table = layer_table(NetworkCount((layer_count(name, [ALIVE] * 3), layer_count("x", [NULL]))))
    assert ".." + name[-18:] in table
    assert all(len(line) <= 80 for line in table.splitlines())


# What stands at the end


def finished(**changes: object) -> History:
    history = runs.good_run(3)
    history.final = runs.final(structured_bops_ratio=30.25, unstructured_bops_ratio=66.5)
    history.compressed = runs.compressed()
    return replace(history, **changes)


def test_a_run_is_said_in_one_line_to_be_pasted():
    checks = [Check("PASS", "a", ""), Check("SKIP", "b", ""), Check("FAIL", "c", "1. Likely cause: d")]
    assert run_line(finished(), Settings(), checks) == (
        "ResNet-20 on CIFAR-10, preset debug, epoch 3, seed 0, 0123456: 36.00 % accuracy, 9.0 % zeros, "
        "0.0 % zero filters, 7.40 learned bits, "
        "BOPs 30.25x / 66.50x, 54,321 bytes, 1 of 2 checks"
    )
    dirty = finished(origin=Origin(commit="0123456789-dirty"), compressed=None)
    assert "0123456+: " in run_line(dirty, Settings(), checks) and "not packed" in run_line(
        dirty, Settings(), checks
    )
    assert "no commit: " in run_line(finished(origin=Origin()), Settings(), checks)
    warned = finished(preflight=[checks[2], checks[0]])
    assert run_line(warned, Settings(), checks).endswith("1 of 2 checks, and 1 of the preflight FAIL")
    assert failed_lines(checks) == ["FAIL  c: 1", "      Likely cause: d"]


def test_the_table_as_a_file_has_every_epoch_and_reads_back():
    rows = list(csv.DictReader(io.StringIO(metrics_csv(finished()))))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row, record in zip(rows, finished().epochs, strict=True):
        assert float(row["accuracy"]) == record.accuracy and float(row["loss"]) == record.loss
        assert float(row["learned_bits"]) == record.learned_bits
    assert "layers" not in rows[0] and "cross_entropy" in rows[0]


def test_the_files_are_listed_below_their_folder_in_lines_of_80_columns():
    paths = [Path("a/b") / f"picture_{i}.png" for i in range(12)]
    lines = file_lines(paths).splitlines()
    assert lines[:2] == ["", "Files in a/b:"] and file_lines([]) == ""
    assert all(len(line) <= 80 for line in lines)
    assert [p.name for p in paths] == " ".join(lines[2:]).replace(",", "").split()


def test_the_page_holds_verdict_tables_and_pictures_and_needs_nothing_outside_it():
    checks = [Check("PASS", "loss", "2.0 -> 1.0"), Check("FAIL", "bits <fall>", "8 & 8. Likely cause: x")]
    history = finished(
        preflight=[Check("FAIL", "labels", "shifted <by one>")],
        resumed=[Resumption(2, [])],
        origin=Origin("2026-01-02", ["--seed", "0", "--output-dir", "a b"], "0123456789"),
    )
    page = report_page(history, OVERRIDDEN, checks, {"a.png": b"\x89PNG"})
    reader = html.parser.HTMLParser()
    found: dict[str, list] = {"img": [], "td": []}
    reader.handle_starttag = lambda tag, attrs: found.setdefault(tag, []).append(dict(attrs))  # type: ignore[method-assign]
    reader.feed(page)
    (image,) = found["img"]
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == b"\x89PNG"
    assert {attrs.get("class") for attrs in found["td"]} >= {"PASS", "FAIL"}
    assert "bits &lt;fall&gt;" in page and "8 &amp; 8" in page
    assert html.escape(run_line(history, OVERRIDDEN, checks)) in page
    text = html.unescape(page)
    for said in (
        "Preset:    debug, with --sparsity-weight 1 --weights-lr 0.001",
        "Resumed:   after epoch 2",
        "Started:   2026-01-02, commit 0123456789",
        "python -m experiments.debug_run --seed 0 --output-dir 'a b'",
        "shifted <by one>",
    ):
        assert said in text
    assert "<p>off</p>" in report_page(finished(), OVERRIDDEN, checks, {})
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "<script" not in page
