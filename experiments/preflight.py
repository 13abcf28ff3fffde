"""The preflight: the run's own pipeline is checked, in seconds, before the first epoch.

Checks are equalities wherever there is one: what a step does against a slow reference in float64, what an
epoch reports against what was seen of it from outside, what is counted against the smaller network and the
packed file. They look at the run's own objects through copies, so that model, optimizer and random state
stay as they are. A check that needs what another found broken is skipped, so that the first FAIL is the
cause.
"""

import copy
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from experiments.draws import kept_draws
from experiments.expect import BrokenError, NotApplicableError, Subject
from experiments.history import FAIL, PASS, SKIP, Check, judge
from experiments.preflight_data import (
    augmentation_is_crops_and_flips,
    files_are_read_right,
    labels_fit_the_images,
    order_is_the_seeds,
    sets_are_disjoint,
    test_images_are_untouched,
)
from experiments.preflight_epoch import an_epoch_reports_what_it_did, schedules_are_the_settings
from experiments.preflight_files import (
    checkpoints_restore_everything,
    counts_are_the_networks,
    ranks_agree,
)
from experiments.preflight_network import (
    images_are_independent,
    layers_are_quantized,
    network_is_the_reference,
    optimizer_has_every_parameter,
    penalty_is_the_group_lasso,
    quantizers_follow_the_formula,
    quantizers_keep_their_word,
    start_is_fresh,
)
from experiments.preflight_pictures import pictures_show_the_history
from experiments.preflight_report import lines_show_the_history
from experiments.preflight_settings import settings_are_what_was_typed
from experiments.preflight_step import (
    gradients_are_the_losss,
    it_can_learn,
    loss_is_what_it_says,
    optimizer_has_the_settings,
    updates_are_adamws,
)

# Name, check, and the checks without which it would only repeat what they found.
CHECKS: tuple[tuple[str, Callable[[Subject], str], tuple[str, ...]], ...] = (
    ("settings", settings_are_what_was_typed, ()),
    ("data: files", files_are_read_right, ()),
    ("data: sets apart", sets_are_disjoint, ()),
    ("data: labels fit", labels_fit_the_images, ("data: files",)),
    ("data: order", order_is_the_seeds, ()),
    ("data: augmentation", augmentation_is_crops_and_flips, ("data: order",)),
    ("data: test images", test_images_are_untouched, ()),
    ("model: quantizers", layers_are_quantized, ()),
    ("model: start", start_is_fresh, ()),
    ("model: optimizer's parameters", optimizer_has_every_parameter, ()),
    ("quantizer: properties", quantizers_keep_their_word, ("model: quantizers",)),
    ("quantizer: formula", quantizers_follow_the_formula, ("quantizer: properties",)),
    ("network: images apart", images_are_independent, ("quantizer: properties",)),
    ("network: reference", network_is_the_reference, ("network: images apart",)),
    ("penalty", penalty_is_the_group_lasso, ("quantizer: properties", "quantizer: formula")),
    ("optimizer: settings", optimizer_has_the_settings, ()),
    ("step: loss", loss_is_what_it_says, ("network: reference", "penalty")),
    (
        "step: gradients",
        gradients_are_the_losss,
        ("step: loss", "model: optimizer's parameters", "optimizer: settings"),
    ),
    ("optimizer: updates", updates_are_adamws, ("step: gradients", "optimizer: settings")),
    ("schedules", schedules_are_the_settings, ()),
    ("epoch: report", an_epoch_reports_what_it_did, ("step: loss", "schedules")),
    ("counts", counts_are_the_networks, ("quantizer: properties",)),
    ("report", lines_show_the_history, ()),
    ("pictures", pictures_show_the_history, ()),
    ("files: checkpoint", checkpoints_restore_everything, ("step: loss",)),
    ("ranks", ranks_agree, ("step: loss",)),
    ("learning", it_can_learn, ("step: gradients", "optimizer: updates")),
)


LARGE = 5_000_000  # parameters of a network


def preflight(
    subject: Subject, progress: Callable[[str], None], tell: Callable[[Check], None]
) -> list[Check]:
    """Every check of the run, in an order in which the first that fails is nearest to the cause.

    `progress` gets the name of each check before it is made, and `tell` what it found as soon as that is
    known: the checks of a large network take minutes. Model, optimizer and random states are left as they
    were. Every rank takes part, and they all find the same.
    """
    found = dict[str, Check]()
    # On small tensors several threads gain little, and on a busy machine they wait for each other many times
    # longer than they compute.
    threads = torch.get_num_threads()
    if not _is_large(subject.pipeline.model):
        torch.set_num_threads(1)
    before = copy.deepcopy(_state(subject))
    with kept_draws():
        for name, check, needs in CHECKS:
            progress(f"preflight: {name}")
            broken = [need for need in needs if found[need].status != PASS and not _harmless(found[need])]
            waits = Check(SKIP, name, f"waits for '{broken[0]}'") if broken else None
            found[name] = waits or _outcome(name, check, subject)
            if found[name].status != FAIL and (changed := _changed(before, _state(subject))):
                cause = "a defect of the check, which should work on a copy"
                found[name] = judge(False, name, f"it changes the run's {changed}", cause)
                before = copy.deepcopy(_state(subject))
            found[name] = _of_all_ranks(found[name], subject)
            tell(found[name])
    torch.set_num_threads(threads)
    return list(found.values())


def _is_large(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) >= LARGE


def _state(subject: Subject) -> dict[str, Any]:
    """What the preflight must leave as it was, by name. Of a large network, which takes long, no numbers."""
    model, found = subject.pipeline.model, dict[str, Any]()
    modules = list(model.modules())
    if not _is_large(model):
        found |= {n: t for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
        for number, moments in subject.step.optimizer.state_dict()["state"].items():
            found |= {f"{name} of parameter {number}": value for name, value in moments.items()}
    found["mode"] = [module.training for module in modules]
    found["hooks"] = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in modules]
    return found


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """The first name under which two states differ; "" where they are the same."""

    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
            return type(a) is type(b) and a == b
        return (a.shape, a.dtype) == (b.shape, b.dtype) and torch.allclose(a, b, 0, 0, equal_nan=True)

    return next((name for name in before | now if not same(before.get(name), now.get(name))), "")


def _of_all_ranks(check: Check, subject: Subject) -> Check:
    """What fails in one rank fails in all of them, so that none goes on alone."""
    failed = torch.tensor(int(check.status == FAIL), device=subject.step.device)
    if subject.step.processes.sum(failed).item() and check.status != FAIL:
        return judge(False, check.name, "it fails on another rank", "ranks that differ")
    return check


def _harmless(check: Check) -> bool:
    """Whether a check was skipped because it says nothing of this run, not because another failed."""
    return check.status == SKIP and not check.message.startswith("waits for")


def _outcome(name: str, check: Callable[[Subject], str], subject: Subject) -> Check:
    try:
        return Check(PASS, name, check(subject))
    except NotApplicableError as reason:
        return Check(SKIP, name, str(reason))
    except BrokenError as broken:
        return judge(False, name, broken.measured, broken.cause)
    except Exception as error:  # the run's own code raises within the check: that is what is broken
        words = " ".join(str(error).split())[:200]
        place = _place(error)
        cause = f"an error in {place}"
        if "inplace operation" in words or "in-place operation" in words:
            cause = f"something is edited in place (images, weights or layer outputs) in {place}"
        elif re.search(r"dtype|\bDouble\b", words):  # the checks compute in float64
            cause = f"a cast to a precision of its own (of weights, gradients or losses) in {place}"
        return judge(False, name, f"{type(error).__name__}: {words}", cause)


def _place(error: BaseException) -> str:
    """The last function of the program that an error came through."""
    trace, place = error.__traceback__, "the program"
    while trace:
        code = trace.tb_frame.f_code
        if "site-packages" not in code.co_filename and "/lib/python" not in code.co_filename:
            place = f"{code.co_name} (line {trace.tb_lineno} of {code.co_filename.rpartition('/')[2]})"
        trace = trace.tb_next
    return place
