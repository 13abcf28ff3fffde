"""The catalogue of seeded faults: each still fits the sources, and a run notices one of every area."""

import subprocess
import sys
from pathlib import Path

import pytest
from faults import EPOCH, FAST, FAULTS, FAULTS_BY_AREA, PREFLIGHT, ROOT, Edit, Fault, Result, said
from programs import DEADLINE, environment


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_fits_the_sources_and_leaves_python(fault: Fault, tmp_path: Path) -> None:
    for file in {edit.file for edit in fault.edits}:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text((ROOT / file).read_text())
    for edit in fault.edits:
        edit.apply(tmp_path)
    for file in {edit.file for edit in fault.edits}:
        compile((tmp_path / file).read_text(), file, "exec")


def test_names_are_unique_and_the_fast_ones_cover_every_area() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(names) == len(set(names)) >= 80
    assert {fault.area for fault in FAULTS if fault.name in FAST} == set(FAULTS_BY_AREA)
    assert set(FAST) <= set(names)


def test_a_text_that_has_moved_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    for old in ("y = 1", "x = 1"):
        with pytest.raises(AssertionError, match="expected once"):
            Edit("a.py", old, "x = 2").apply(tmp_path)


def test_a_line_belongs_to_the_part_of_the_run_that_said_it() -> None:
    text = """FAIL  data: files: 3 labels differ
      Likely cause: labels are shuffled
Epoch |     Loss
    1 |   2.7878 |  18.00 |
      ! accuracy at chance
PASS  loss is finite
"""
    assert list(said(text)) == [
        (PREFLIGHT, "FAIL  data: files: 3 labels differ Likely cause: labels are shuffled"),
        (EPOCH, "! accuracy at chance"),
    ]


def test_the_cause_is_right_by_the_line_that_names_it() -> None:
    fault = Fault("labels are shuffled", "label", (), PREFLIGHT, ())
    right, wrong = "FAIL  data: Labels differ", "FAIL  step: the loss is off"
    rights = [
        Result(fault, PREFLIGHT, lines, "", 0.0).right
        for lines in ((right, wrong), (wrong, right), (wrong,), ())
    ]
    assert rights == ["yes", "later", "no", "-"]


@pytest.mark.slow
def test_one_fault_of_every_area_is_noticed_and_the_sources_raise_no_alarm() -> None:
    ended = subprocess.run(
        [sys.executable, ROOT / "tests" / "faults.py", "--fast", "--workers", "1"],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        env=environment(),
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "clean sources: no alarm" in ended.stdout
