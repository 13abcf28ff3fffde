"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import experiments
import src

MODULES = ["resnet", "metrics", "utils_quantization"] + [
    f"{package.__name__}.{module.name}"
    for package in (src, experiments)
    for module in pkgutil.iter_modules(package.__path__)
]


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_give_what_they_say(name):
    report = []
    finder, runner = doctest.DocTestFinder(), doctest.DocTestRunner(verbose=False)
    for example in finder.find(importlib.import_module(name), name):
        runner.run(example, out=report.append)
    assert runner.summarize(verbose=False).failed == 0, "".join(report)


def test_there_are_examples_to_run_and_every_module_is_looked_at():
    examples = [
        example
        for name in MODULES
        for found in doctest.DocTestFinder().find(importlib.import_module(name), name)
        for example in found.examples
    ]
    assert len(examples) >= 5
    assert {"src.quantizer", "src.channels", "experiments.schedules", "experiments.sparsity"} <= set(MODULES)
