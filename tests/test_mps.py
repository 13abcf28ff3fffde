"""A run on MPS, which the tests' machines lack: it has no float64, and no tensor of it meets one of the host.

Host and device are told apart on the CPU: each tensor is marked that the host would hold.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import src.channels
import src.quantizer
from experiments import device, expect, ledger
from experiments.debug_run import main

HOST = torch.device("cpu")  # this object; the run's own device is an equal one
# What takes an index, or fills a tensor, from the other side; and `equal`, which a run asks of tensors
# without a mark, because a file or an initializer made them. A deep copy is given what was copied before it.
BETWEEN = {"__getitem__", "__setitem__", "copy_", "equal", "__deepcopy__"}
FUNCTIONS = (src.channels._Flags, src.quantizer._DeadZoneRound, src.quantizer._RoundStraightThrough)


def on_host(tensor: Tensor) -> bool:
    return getattr(tensor, "on_host", False)


def mark(tensor: Tensor, host: bool) -> Tensor:
    tensor.on_host = host  # type: ignore[attr-defined]
    return tensor


def tensors(value: Any) -> list[Tensor]:
    """Those in nested lists; torch's own `tree_leaves` takes most of the test's time."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for each in inner for tensor in tensors(each)]


class HostAndDevice(TorchFunctionMode):
    """Marks what the host holds; counts what MPS would refuse, by the place in the program."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: Counter[str] = Counter()

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made, name, given = function(*args, **(kwargs or {})), function.__name__, tensors([args, kwargs])
        if isinstance(made, torch.device):
            return HOST if given and on_host(given[0]) else made
        targets = [a for a in (*args, *(kwargs or {}).values()) if isinstance(a, torch.device)]
        if name == "cpu" or (name == "to" and (targets or len(given) > 1)):
            host = name == "cpu" or (targets[0] is HOST if targets else on_host(given[1]))
            # What is there already is returned as it is; its mark is its own.
            made = made.view_as(made) if any(made is t for t in given) else made
        elif name in BETWEEN:
            host = on_host(given[0])
        elif given:
            host = all(map(on_host, given))
            if not host and any(on_host(t) and t.ndim for t in given):
                self._refuse(f"{name} of tensors of both sides")
        else:
            host = not targets or targets[0] is HOST
        for tensor in tensors(made):
            mark(tensor, host)
        if any(t.dtype == torch.float64 and not on_host(t) for t in tensors(made)):
            self._refuse(f"{name} gives float64")
        return made

    def _refuse(self, what: str) -> None:
        frame: Any = sys._getframe(2)
        while "site-packages" in frame.f_code.co_filename or "/torch/" in frame.f_code.co_filename:
            frame = frame.f_back
        self.refused[f"{what} in {frame.f_code.co_filename.rpartition('/')[2]}, line {frame.f_lineno}"] += 1


def unwatched(function: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return function(*args, **kwargs)

    return run


@pytest.fixture
def host_and_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[HostAndDevice]:
    """The mode, entered; what torch does to modules and in functions of our own keeps the marks."""

    def to(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        sides = [on_host(tensor) for tensor in (*module.parameters(), *module.buffers())]
        moved = unwatched(torch_to)(module, *args, **kwargs)
        if args and isinstance(args[0], torch.device):
            sides = [args[0] is HOST] * len(sides)
        for tensor, host in zip((*module.parameters(), *module.buffers()), sides, strict=True):
            mark(tensor, host)
        return moved

    def cpu(module: nn.Module) -> nn.Module:
        return module.to(HOST)

    def copied(parameter: nn.Parameter, memo: Any) -> Any:
        return mark(torch_copied(parameter, memo), on_host(parameter))

    monkeypatch.setattr(torch.export, "export", unwatched(torch.export.export))
    torch_to, torch_copied = nn.Module.to, nn.Parameter.__deepcopy__
    monkeypatch.setattr(nn.Module, "to", to)
    monkeypatch.setattr(nn.Module, "cpu", cpu)
    monkeypatch.setattr(nn.Parameter, "__deepcopy__", copied)
    for function in FUNCTIONS:

        def apply(*args: Any, torch_apply: Any = function.apply) -> Any:
            made = torch_apply(*args)
            return mark(made, all(map(on_host, tensors(args))))

        monkeypatch.setattr(function, "apply", apply)
    for module in (device, expect, ledger):
        monkeypatch.setattr(module, "float64_device", lambda _: HOST)
    with HostAndDevice() as mode:
        yield mode


def test_the_emulation_notices_both(host_and_device):
    there, here = torch.ones(2, device=torch.device("cpu")), torch.ones(2)
    assert (here * here).double().dtype == there.cpu().double().dtype == torch.float64
    assert on_host(there.cpu()) and not on_host(there) and not on_host(here.to(there.device))
    assert host_and_device.refused == {}
    there * here, there.double()
    assert [what.partition(" in ")[0] for what in host_and_device.refused] == [
        "mul of tensors of both sides",
        "double gives float64",
    ]


@pytest.mark.slow
@pytest.mark.usefixtures("small_stand_in", "quick_end")
def test_a_run_asks_nothing_of_mps_that_it_cannot_do(host_and_device, tmp_path):
    short = "--data synthetic --limit-train 64 --limit-test 32 --batch-size 32 --epochs 1 --sparsity-delay 0"
    main([*short.split(), "--device", "cpu", "--threads", "1", "--output-dir", str(tmp_path)])
    assert (tmp_path / "compressed.codeq").exists()
    assert host_and_device.refused == {}
