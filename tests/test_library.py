"""The example of docs/library.md runs."""

import re
from pathlib import Path

import torch

from metrics import count_by_torch, count_network

PAGE = Path(__file__).parents[1] / "docs" / "library.md"


def test_the_example_runs_and_its_smaller_network_is_the_networks_own(capsys):
    (example,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    names: dict = {}
    exec(compile(example, str(PAGE), "exec"), names)
    barriers, ratio = capsys.readouterr().out.split()
    assert barriers == "()" and float(ratio.removesuffix("x")) >= 1
    model, small, x = names["model"].eval(), names["small"], torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = model(x)
        assert (small(x) - expected).abs().max() <= 1e-4 * expected.abs().max()
        assert torch.equal(names["again"](x), expected)
    assert count_by_torch(small)[""] == count_network(model).total("structured_macs")
    assert len([line for line in example.splitlines() if line]) <= 25
