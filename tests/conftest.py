"""For every test: the signals that programs started by it hear, and fixtures that shorten a run."""

import signal

import pytest

# The workers of pytest-xdist ignore SIGTERM, and so would the programs that tests start.
signal.signal(signal.SIGTERM, signal.SIG_DFL)

# A job in the background ignores Ctrl-C, one of nohup SIGHUP, and so would what the tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP"):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def small_stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The synthetic stand-in has fewer images in this process: all of them take a second to make."""
    monkeypatch.setattr("experiments.data.SYNTHETIC_TRAIN", 500)
    monkeypatch.setattr("experiments.data.SYNTHETIC_TEST", 250)


@pytest.fixture
def quick_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs in this process end in no time: nothing is exported, timed or drawn as a picture."""
    monkeypatch.setattr("experiments.compressed.exported", lambda network, claims: b"an exported network")
    monkeypatch.setattr(
        "experiments.compressed.read_back",
        lambda content, network, *_: (sum(p.numel() for p in network.parameters()), 0.0),
    )
    monkeypatch.setattr("experiments.compressed.measure_latency", lambda networks, images: {})
    monkeypatch.setattr("experiments.plots.rendered", lambda figure, kind="png": b"\x89PNG%d" % id(figure))


# Files whose tests run programs take longest: begun first, they leave no process idle at the end.
LONG = (
    "test_faults",
    "test_resume",
    "test_torchrun",
    "test_distributed",
    "test_bad_input",
    "test_debug_run",
    "test_any_network",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.stem) if item.path.stem in LONG else len(LONG))
