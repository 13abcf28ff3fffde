"""Someone's own network: how it is named, what a run does with it, what its packed file holds and needs."""

import hashlib
import json
import random
import struct
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import own_networks
import pytest
import torch
from own_networks import Pointwise, Small, WithBuffers, WithTable
from torch import Tensor, nn
from torch.nn import functional as F

from experiments import checkpoint, debug_run, verify
from experiments.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from experiments.debug_run import main
from experiments.distributed import Processes, use_global_batch_norms
from experiments.draws import seed_draws
from experiments.history import History
from experiments.network import HostUse, excluded_layers, make_network, memory_layout, use_of_the_host
from experiments.recount import recount
from experiments.settings import PRESETS, Settings
from metrics import count_by_torch, count_network, in_layers
from resnet import ResNet, resnet20
from src.encoding import PackingError
from src.packing import MAX_FILE_BYTES, pack_network, read_header, unpack_network
from src.quantizer import DeadZoneLDZCompander
from src.slim import slim_network
from utils_quantization import attach_weight_quantizers

pytestmark = pytest.mark.slow

HERE = "own_networks"  # pytest puts this folder on the path
STAND_IN = ["--data", "synthetic", "--device", "cpu", "--threads", "1"]
SHORT = [*STAND_IN, *("--limit-train", "128", "--limit-test", "64", "--batch-size", "64", "--epochs", "2")]


def quantized(network: nn.Module) -> nn.Module:
    attach_weight_quantizers(network, ["stem", "head"], DeadZoneLDZCompander, {"init_deadzone_logit": 0.5})
    return network.eval()


# How it is named.


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet56", 9), ("resnet110", 18)])
def test_a_network_of_resnet_py_is_named_by_its_depth(name, blocks):
    network = make_network(name, 10)
    assert type(network) is ResNet and len(network.layer1) == blocks


@pytest.mark.parametrize("what", ["Small", "without_arguments", "OfAnyArguments"])
def test_a_callable_is_given_the_classes_where_it_takes_them_and_its_draws_are_its_own(what):
    torch.manual_seed(3)
    network = make_network(f"{HERE}:{what}", 10)
    after = torch.rand(1)
    torch.manual_seed(3)
    by_hand = Small()
    assert after == torch.rand(1)
    for name, tensor in by_hand.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert network.training


def test_a_layer_that_training_leaves_out_at_random_is_trained_and_norms_share_no_weight():
    network = make_network(f"{HERE}:LeavingOut", 10)
    assert all(p.requires_grad for p in network.parameters())
    ends = excluded_layers(Settings(), network, count_network(network))
    assert ends == ["^left$", "^right$", "^stem$", "^head$"]


def test_what_no_pattern_names_leaves_the_first_and_the_last_layer_in_full_precision():
    for network, ends in ((resnet20(), ["^conv1$", "^linear$"]), (Small(), ["^stem$", "^head$"])):
        dense = count_network(network)
        assert excluded_layers(Settings(), network, dense) == ends
        assert excluded_layers(Settings(exclude_layers=("a",)), network, dense) == ["a"]
        assert excluded_layers(Settings(exclude_layers=()), network, dense) == []
    unused = Small()
    unused.spare = nn.Linear(3, 3)
    assert excluded_layers(Settings(), unused, count_network(unused)) == ["^spare$", "^stem$", "^head$"]
    assert PRESETS["plan"]["exclude_layers"] == ("conv1", "bn", "linear")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("resnet21", ["resnet20, 32", "module:callable"]),
        ("vgg11", ["module:callable"]),
        ("no_such_module:net", ["ModuleNotFoundError"]),
        (f"{HERE}:no_such_name", ["no such name"]),
        (f"{HERE}:not_callable", ["something else", "callable"]),
        (f"{HERE}:needs_more", ["TypeError", "num_classes alone"]),
        (f"{HERE}:raises", ["KeyError", "weights.pth"]),
        (f"{HERE}:no_network", ["'a network'", "nn.Module"]),
        (f"{HERE}:five_classes", ["(2, 5)", "(2, 10)"]),
        (f"{HERE}:OfLargeImages", ["training mode", "RuntimeError", "3x32x32"]),
        (f"{HERE}:TwoAnswersInTraining", ["training mode", "tuple"]),
        (f"{HERE}:LooksAtNumbers", ["torch.export cannot trace LooksAtNumbers"]),
        (f"{HERE}:Sharing", ["left and again share one weight"]),
        (f"{HERE}:WritingIntoAWeight", ["in training mode it raises RuntimeError", "in-place"]),
        (f"{HERE}:Detached", ["no gradient to any parameter"]),
        (f"{HERE}:WithoutBackward", ["backward pass raises RuntimeError", "inplace"]),
        (f"{HERE}:Ending", ["calling it raises SystemExit"]),
        ("ends_when_imported:net", ["importing ends_when_imported raises SystemExit"]),
        (f"{HERE}:Uncopied", ["copying it raises TypeError (there is only one)"]),
        (f"{HERE}:OldSpectral", ["copying it raises RuntimeError", " ...); expected"]),
        (f"{HERE}:Bits", ["reads the bytes of numbers as another type"]),
        (f"{HERE}:Double", ["deep.weight is of torch.float64", "expected torch.float32"]),
        (f"{HERE}:WithoutLayers", ["no image passes a convolution or linear layer"]),
        (f"{HERE}:WithoutStatistics", ["WithoutStatistics", "depend on the other images of its batch"]),
        (f"{HERE}:Averaging", ["packed file", "mean is torch.float64", "does not hold its numbers exactly"]),
        (f"{HERE}:Unset", ["packed file", "empty holds NaN"]),
        (f"{HERE}:Spectrum", ["packed file", "filter is torch.complex64"]),
        (f"{HERE}:WithMore", ["packed file", "_extra_state is a dict"]),
    ],
)
def test_what_cannot_be_a_network_is_refused_in_one_sentence_before_the_data(
    tmp_path, capsys, monkeypatch, name, words
):
    monkeypatch.setattr("experiments.debug_run.load", lambda *_: pytest.fail("the data was loaded"))
    (tmp_path / "ends_when_imported.py").write_text("import sys\n\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        status = main([*SHORT, "--output-dir", str(tmp_path / "run"), "--model", name])
    except SystemExit as end:
        status = end.code
    assert status == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert all(word in sentence for word in words), sentence


# Its packed file.


def test_it_is_packed_and_comes_back_with_equal_logits():
    network = quantized(Small())
    content = pack_network(network, {"preset": "debug"}, {"structured_macs": 7}, "theirs:Small")
    header = read_header(content)
    assert (header.network, header.blocks_per_stage) == ("theirs:Small", 0)
    assert header.tensors["deep.weight"] == [8, 2, 3, 3] and set(header.bits) == {"left", "right", "deep"}
    x = torch.randn(5, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(unpack_network(content, Small)(x), network(x))
    counted = {layer.name: layer for layer in count_network(network).layers}
    for name, layer in recount(content).items():
        ours = counted[name]
        assert (layer.zero_weights, layer.zero_filters) == (ours.zero_weights, ours.zero_filters), name
        assert layer.structured_macs is None and layer.bits == ours.bits
    assert sum(layer.zero_weights for layer in recount(content).values()) > 0


def test_it_is_not_packed_without_a_name_nor_with_whole_numbers_that_float32_does_not_hold():
    with pytest.raises(PackingError, match="no name"):
        pack_network(quantized(Small()), {})
    network = quantized(WithTable())
    network.order[0] = 2**24 + 1
    with pytest.raises(PackingError, match=r"order is torch\.int64"):
        pack_network(network, {}, name="theirs")


def test_whole_numbers_that_its_logits_depend_on_come_back_with_it():
    network = quantized(WithTable())
    unpacked = unpack_network(pack_network(network, {}, name="theirs"), WithTable)
    assert torch.equal(unpacked.order, network.order) and unpacked.order.dtype == torch.int64
    x = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(unpacked(x), network(x))


def test_a_stride_that_is_free_is_that_of_a_quantizers_result():
    """By it torch chooses between convolutions whose last bits differ."""
    network = quantized(Pointwise()).to(memory_format=torch.channels_last)
    unpacked = unpack_network(pack_network(network, {}, name="theirs"), Pointwise)
    for name in ("depthwise", "point"):
        ours, theirs = (net.get_submodule(name).weight for net in (network, unpacked))
        assert theirs.stride() == ours.stride(), name


def test_nothing_builds_it_but_what_the_receiver_brings():
    content = pack_network(quantized(Small()), {}, name="os:abort")
    with pytest.raises(PackingError, match="'os:abort', and nothing builds that"):
        unpack_network(content)
    with pytest.raises(PackingError, match=r"\(10, 16\) for 'head.weight'.*\(5, 16\)"):
        unpack_network(content, own_networks.five_classes)
    with pytest.raises(PackingError, match=r"None for 'conv1.weight'|for 'stem.weight'"):
        unpack_network(content, resnet20)


def with_header(content: bytes, **changes: object) -> bytes:
    """The file with other fields in its header, and a checksum that is right."""
    _, version, header_bytes, _ = struct.unpack_from("<8sIII", content)
    header = json.loads(content[52 : 52 + header_bytes]) | changes
    text, body = json.dumps(header).encode(), content[52 + header_bytes :]
    prefix = struct.pack("<8sIII", content[:8], version, len(text), len(body))
    return prefix + hashlib.sha256(prefix + text + body).digest() + text + body


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network": ""}, "no name of a network"),
        ({"tensors": {}}, "for 'stem.weight'|which is no layer"),
        ({"tensors": {"stem.weight": [MAX_FILE_BYTES, 4]}}, "more than"),
        ({"tensors": {"stem.weight": [2.5]}}, "list of whole numbers"),
        ({"tensors": {"stem.weight": [-1]}}, "list of whole numbers"),
        ({"tensors": {"stem.weight": "8"}}, "list of whole numbers"),
        ({"tensors": {"stem.weight": [1] * 9}}, "list of whole numbers"),
        ({"tensors": {"stem.weight": [0, 10**30]}}, "more than"),
        ({"tensors": []}, "each of its type"),
        ({"network": 3}, "each of its type"),
        ({"bits": {"norm": 3}, "network": "x"}, "no layer of the network"),
        ({"bits": {"nowhere": 3}}, "no layer of the network"),
    ],
)
def test_a_header_that_lies_is_refused(changes, message):
    content = pack_network(quantized(Small()), {}, name="theirs")
    assert with_header(content)[8:12] == content[8:12]
    unpack_network(with_header(content), Small)
    with pytest.raises(PackingError, match=message):
        unpack_network(with_header(content, **changes), Small)


def test_the_file_of_a_network_of_resnet_py_says_nothing_new():
    content = pack_network(ResNet(1), {})
    header = json.loads(content[52 : 52 + struct.unpack_from("<8sIII", content)[2]])
    fields = [
        "blocks_per_stage",
        "num_classes",
        "channels_last",
        "bits",
        "settings",
        "metrics",
        "compression",
    ]
    assert list(header) == fields
    assert read_header(pack_network(ResNet(1), {}, name="unused")).network == ""


# Runs.


@pytest.fixture
def run(small_stand_in, quick_end, tmp_path, capsys):
    def go(name: str, *arguments: str) -> tuple[History, int, str]:
        """Run two epochs with a network; the history, the exit status, and what was printed."""
        status = main([*SHORT, "--output-dir", str(tmp_path), "--model", name, *arguments])
        history = History.from_json(json.loads((tmp_path / "history.json").read_text()))
        return history, status, capsys.readouterr().out

    return go


def test_a_run_with_it_goes_through_preflight_ledger_counts_pictures_and_both_networks(run, tmp_path, capsys):
    history, status, out = run(f"{HERE}:Small")
    assert f"Network:   {HERE}:Small" in out and "not: stem, head" in out and "Barriers" not in out
    assert history.settings["model"] == f"{HERE}:Small"
    failed = [check for check in (*history.preflight, *history.verdict) if check.status == "FAIL"]
    assert (failed, status) == ([], 0)
    assert history.compressed.packed_differs == 0 and history.compressed.slim_macs > 0
    held = {check.name for check in history.verdict if check.status == "PASS"}
    assert {"packed file gives the same logits", "packed file holds what was counted"} <= held
    assert {"smaller network has the MACs printed", "pictures exist"} <= held

    stand_in = [str(tmp_path / "compressed.codeq"), "--data", "synthetic", "--limit-test", "64"]
    assert verify.main([*stand_in, "--model", f"{HERE}:Small"]) == 0
    assert "Network:  'own_networks:Small'" in capsys.readouterr().out
    for arguments, words in (
        ([], ["--model module:callable", "own_networks:Small"]),
        (["--model", f"{HERE}:five_classes"], ["five_classes", "(2, 10)"]),
        (["--model", f"{HERE}:WithSort"], ["expected the network"]),
    ):
        assert verify.main([*stand_in, *arguments]) == 2
        (sentence,) = capsys.readouterr().err.strip().splitlines()
        assert all(word in sentence for word in words), sentence


def test_a_network_that_is_random_in_training_raises_no_alarm(run):
    history, status, _ = run(f"{HERE}:WithDropout")
    failed = [check for check in (*history.preflight, *history.verdict) if check.status == "FAIL"]
    assert (failed, status) == ([], 0)


ALL = (
    *("Tutorial", "Perceptron", "Kitchen", "Casting", "Attending", "Transforming", "OddNorms"),
    *("Recomputing", "Fourier", "BegunAtZero", "Adapted"),
)


@pytest.mark.parametrize("name", [*ALL, pytest.param("Recurrent", marks=pytest.mark.slow)])
def test_what_people_write_raises_no_alarm(run, tmp_path, capsys, name):
    history, status, _ = run(f"{HERE}:{name}", "--epochs", "1")
    failed = [check for check in (*history.preflight, *history.verdict) if check.status == "FAIL"]
    assert (failed, status) == ([], 0)
    received = [str(tmp_path / "compressed.codeq"), "--data", "synthetic", "--limit-test", "64"]
    assert verify.main([*received, "--model", f"{HERE}:{name}"]) == 0


def test_a_run_that_skips_layers_by_draws_resumes_exactly_and_says_that_it_may(run):
    """The state of Python's and of numpy's draws is in the checkpoint, and all have the seed."""
    often = ["--epochs", "3", "--batch-size", "16"]
    random.seed(1), np.random.seed(1)
    first, status, out = run(f"{HERE}:Skipping", *often, "--rehearse")
    failed = [check for check in (*first.preflight, *first.verdict) if check.status == "FAIL"]
    assert (failed, status) == ([], 0) and "Branches:  the network may leave layers out" in out
    random.seed(2), np.random.seed(2)
    again, _, _ = run(f"{HERE}:Skipping", *often, "--preflight", "off")
    assert [r.loss for r in again.epochs] == [r.loss for r in first.epochs] and again.may_skip


def test_buffers_of_other_types_are_packed_and_come_back_in_theirs():
    network = make_network(f"{HERE}:WithBuffers", 10).eval()
    x = torch.randn(5, 3, 32, 32)
    expected = network(x)
    again = unpack_network(pack_network(network, {}, name="theirs:WithBuffers"), WithBuffers)
    assert torch.equal(again(x), expected)
    for name, buffer in network.named_buffers():
        assert again.get_buffer(name).dtype == buffer.dtype, name


def test_the_noise_of_dropout_does_not_pass_for_a_network_that_cannot_learn(run):
    status = main([*SHORT, "--model", f"{HERE}:WithMuchDropout", "--preflight", "only"])
    assert status == 0


def test_logits_in_float32_of_a_run_in_bfloat16_raise_no_alarm(run):
    history, status, _ = run(f"{HERE}:Casting", "--epochs", "1", "--precision", "bf16")
    failed = [check for check in (*history.preflight, *history.verdict) if check.status == "FAIL"]
    assert (failed, status) == ([], 0)


def test_what_is_otherwise_is_said_in_the_first_lines_and_in_the_history(run):
    history, _, out = run(f"{HERE}:Kitchen", "--epochs", "1", "--preflight", "off")
    assert (
        history.frozen == ["frozen", "unused.weight", "unused.bias"] and "3 parameters are not trained" in out
    )
    assert {"unused", "standardized"} <= set(history.full_precision)
    history, _, out = run(f"{HERE}:Tutorial", "--epochs", "1", "--preflight", "off")
    assert history.layout == "contiguous" and "Layout:    contiguous, because" in out
    history, _, out = run(f"{HERE}:Small", "--epochs", "1", "--preflight", "off")
    assert history.layout == "channels_last" and "Layout:" not in out and "Frozen:" not in out


class Shifting(Small):
    """Its images are shifted by what `shifted` makes of them and of the network."""

    def __init__(self, shifted: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.shifted, self.mean = shifted, torch.zeros(3, 1, 1)
        self.register_buffer("buffer", torch.zeros(3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.shifted(self, x))


def rebinding(net: nn.Module, x: Tensor) -> Tensor:
    net.buffer = 0.9 * net.buffer + 0.1 * x.mean((0, 2, 3)).detach().view(3, 1, 1)
    return x - net.buffer


def counting(net: nn.Module, x: Tensor) -> Tensor:
    net.steps = getattr(net, "steps", 0) + 1
    return x * net.steps


def counting_in_a_dict(net: nn.Module, x: Tensor) -> Tensor:
    counts = vars(net).setdefault("counts", {"steps": [0]})
    counts["steps"][0] += 1
    return x * counts["steps"][0]


def alternating(net: nn.Module, x: Tensor) -> Tensor:
    net.mode = "odd" if getattr(net, "mode", None) == "even" else "even"
    return x * (net.mode == "odd")


def filling_a_cache(net: nn.Module, x: Tensor) -> Tensor:
    """The first pass fills it, and the others only read it."""
    if not hasattr(net, "cache"):
        net.cache, net.size = {"ramp": torch.arange(32, device=x.device)}, tuple(x.shape)
    return (x * net.cache["ramp"]).view(net.size)


def writing_columns(columns: object) -> Callable[[nn.Module, Tensor], Tensor]:
    def shifted(net: nn.Module, x: Tensor) -> Tensor:
        y = x.clone()
        y[:, :, columns] = 0
        return y

    return shifted


NOTHING, COPIES, DECIDES = HostUse(), HostUse(copies=True), HostUse(decides=True)
REMEMBERS = HostUse(remembers=True)


@pytest.mark.parametrize(
    ("needed", "shifted"),
    [
        (NOTHING, lambda net, x: x - net.buffer),
        (NOTHING, lambda net, x: x * torch.tensor(0.5)),
        (NOTHING, lambda net, x: x + torch.zeros(3, 1, 1, device=x.device)),
        (NOTHING, lambda net, x: F.dropout(x[:, :, torch.arange(16, device=x.device)], 0.5, net.training)),
        (COPIES, lambda net, x: x - net.mean.to(x.device)),
        (COPIES, lambda net, x: x - torch.tensor([1.0, 2.0, 3.0], device=x.device).view(3, 1, 1)),
        (COPIES, lambda net, x: x[:, :, torch.arange(16)]),
        (COPIES, lambda net, x: x[:, :, [0, 1, 2]]),
        (COPIES, lambda net, x: x[:, :, np.array([0, 2])]),
        (COPIES, lambda net, x: x[:, :, range(3)]),
        (COPIES, lambda net, x: x * torch.tensor(0.5).to(x.device)),
        (COPIES, lambda net, x: x - x.new_tensor([1.0, 2.0, 3.0]).view(3, 1, 1)),
        (COPIES, writing_columns([0, 2])),
        (COPIES, writing_columns((0, 2))),
        (COPIES, writing_columns(torch.tensor([0, 2]))),
        (NOTHING, writing_columns(slice(0, 2))),
        (NOTHING, writing_columns(2)),
        (NOTHING, writing_columns(torch.arange(2, device="meta"))),
        (DECIDES, lambda net, x: x * float(x.amax())),
        (DECIDES, lambda net, x: x * torch.rand(())),
        (DECIDES, lambda net, x: x * random.random()),
        (DECIDES, lambda net, x: x * np.random.rand()),
        (HostUse(copies=True, decides=True), lambda net, x: x * torch.rand(3, 1, 1).to(x.device)),
        (REMEMBERS, rebinding),
        (REMEMBERS, counting),
        (REMEMBERS, counting_in_a_dict),
        (REMEMBERS, alternating),
        (NOTHING, filling_a_cache),
    ],
)
def test_what_no_graph_of_a_step_can_hold_is_known_without_a_gpu(needed, shifted):
    model = quantized(Shifting(shifted))
    seed_draws(0)
    assert use_of_the_host(model) == needed
    drawn = torch.rand(1).item(), random.random(), np.random.rand()
    seed_draws(0)
    assert drawn == (torch.rand(1).item(), random.random(), np.random.rand()) and not model.training


def test_a_quantizer_that_counts_its_passes_is_noticed():
    class Counting(DeadZoneLDZCompander):
        passes = 0

        def forward(self, w: Tensor) -> Tensor:
            self.passes += 1
            return super().forward(w) * min(1, self.passes / 100)

    network = Small()
    attach_weight_quantizers(network, ["stem", "head"], Counting, {})
    assert use_of_the_host(network) == REMEMBERS


@pytest.mark.parametrize("generator", [np.random.default_rng(0), random.Random(0), torch.Generator()])
def test_a_generator_of_its_own_draws_on_the_host(generator):
    network = Small()
    network.options = {"noise": generator}
    assert use_of_the_host(network) == DECIDES


def test_the_debug_runs_own_step_needs_no_host():
    model = resnet20()
    attach_weight_quantizers(model, ["^conv1$", "^linear$"], DeadZoneLDZCompander, {})
    use_global_batch_norms(model, Processes(0, 2))  # of which it asks for nothing
    assert use_of_the_host(model) == NOTHING


def test_a_layer_that_no_image_enters_is_a_constant_and_is_named():
    model = quantized(own_networks.Prompted())
    count = count_network(model)
    assert count.barriers == ("aten.linear in prompt",)
    assert "prompt" not in [layer.name for layer in count.layers]
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(slim_network(model)(images), model(images), rtol=1e-4, atol=1e-4)


def test_the_smaller_network_makes_its_tensors_where_its_images_are():
    small = slim_network(quantized(own_networks.Recurrent())).to("meta")
    assert small(torch.zeros(3, 3, 32, 32, device="meta")).shape == (3, 10)


def test_a_resnet_that_a_callable_returns_may_be_trained_already(run):
    assert main([*SHORT, "--model", f"{HERE}:trained", "--preflight", "only"]) == 0


def test_a_network_that_is_cut_in_two_is_caught(run, capsys):
    status = main([*SHORT, "--model", f"{HERE}:Cut", "--preflight", "only"])
    assert status == 1 and "detached or dead" in " ".join(capsys.readouterr().out.split())


def test_barriers_are_named_in_the_first_lines_and_in_the_history(run):
    history, status, out = run(f"{HERE}:WithSort", "--preflight", "off")
    (barrier,) = history.barriers
    assert "sort" in barrier and f"Barriers:  no channel is followed through {barrier}" in out
    assert status == 0


def test_it_is_resumed_and_only_with_the_same_network(run, tmp_path, capsys):
    run(f"{HERE}:Small", "--epochs", "1", "--preflight", "off")
    history, _, out = run(f"{HERE}:Small", "--resume", "--preflight", "off")
    assert len(history.epochs) == 2 and "Resumed" in out
    resume = [*SHORT, "--output-dir", str(tmp_path), "--resume", "--preflight", "off"]
    assert main(resume) == 2
    assert f"--model is resnet20, and the run to go on with has {HERE}:Small" in capsys.readouterr().err
    # The code behind the name may be another since.
    saved = load_checkpoint(tmp_path / "checkpoint_0002.pt")
    del saved.model[next(iter(saved.model))]
    save_checkpoint(tmp_path, saved)
    assert main([*resume, "--model", f"{HERE}:Small"]) == 2
    error = capsys.readouterr().err
    assert "the checkpoint of epoch 2 is not of this network" in error and "Traceback" not in error


def test_a_resumed_run_that_begins_with_another_state_than_its_file_holds_is_named(run, monkeypatch):
    run(f"{HERE}:Small", "--epochs", "1", "--preflight", "off")
    restore = checkpoint.restore

    def forget(saved: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        restore(saved, model, optimizer)
        for state in optimizer.state.values():
            state["exp_avg"].zero_()

    monkeypatch.setattr(checkpoint, "restore", forget)
    history, status, out = run(f"{HERE}:Small", "--resume", "--preflight", "off")
    assert status == 1 and "! begins where the last epoch ended: " in out
    (failed,) = [check for check in history.verdict if check.status == "FAIL"]
    assert "of the optimizer's moments are others than those left" in failed.message


def test_a_checkpoint_that_holds_another_state_than_the_epoch_left_is_named_below_its_row(run, monkeypatch):
    taken = debug_run.take_checkpoint

    def rounded(*state: Any) -> Checkpoint:
        made = taken(*state)
        halved = {
            i: s | {"exp_avg_sq": s["exp_avg_sq"].bfloat16().float()} for i, s in made.optimizer.items()
        }
        return replace(made, optimizer=halved)

    monkeypatch.setattr(debug_run, "take_checkpoint", rounded)
    _, status, out = run(f"{HERE}:Small", "--preflight", "off")
    assert (
        status == 1 and out.count("! checkpoint: checkpoint_0001.pt holds other the optimizer's moments") == 1
    )
    assert "FAIL  ledger, checkpoint" in out


def test_a_network_that_asserts_its_layout_gets_it():
    made = make_network(f"{HERE}:InOneLayout", 10)
    assert memory_layout(made, torch.device("cpu")) == "contiguous"


def test_a_last_batch_of_one_image_is_refused_before_the_training(tmp_path, capsys):
    command = [*SHORT, "--output-dir", str(tmp_path / "run"), "--model", f"{HERE}:OfSeveralImages"]
    assert main([*command, "--limit-train", "33", "--batch-size", "32"]) == 2
    (sentence,) = capsys.readouterr().err.strip().splitlines()
    assert "last batch has one image" in sentence and "--limit-train" in sentence


def test_a_module_that_seeds_torch_does_not_choose_the_weights(tmp_path, monkeypatch):
    (tmp_path / "seeds.py").write_text("import torch\nfrom resnet import resnet20\n\ntorch.manual_seed(7)\n")
    monkeypatch.syspath_prepend(tmp_path)
    weights = []
    for seed in (0, 1):
        monkeypatch.delitem(sys.modules, "seeds", raising=False)
        torch.manual_seed(seed)
        weights.append(make_network("seeds:resnet20", 10).linear.weight)
    assert not torch.equal(*weights)


def test_bits_of_what_is_no_parameter_are_refused():
    class Masked(Small):
        def __init__(self) -> None:
            super().__init__()
            self.mask = nn.Module()
            self.mask.register_buffer("weight", torch.ones(8, 8, 1, 1))

    content = pack_network(Masked().eval(), {}, name="theirs")
    for name in ("mask", "norm"):  # of a batch norm no weight is counted, and its bits would be a mere claim
        with pytest.raises(PackingError, match=f"'{name}', which is no layer"):
            unpack_network(with_header(content, bits={name: 2}), Masked)


def test_a_layer_with_another_inside_is_counted_without_it():
    class Outer(nn.Conv2d):
        def __init__(self) -> None:
            super().__init__(3, 8, 3)
            self.inner = nn.Conv2d(8, 8, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(super().forward(x))

    network = nn.Sequential(Outer(), nn.Flatten(), nn.Linear(8 * 30 * 30, 10))
    count = count_network(network)
    by_torch = count_by_torch(network)
    assert by_torch["0"] > by_torch["0.inner"]
    assert in_layers(by_torch, count) == {layer.name: layer.dense_macs for layer in count.layers}
