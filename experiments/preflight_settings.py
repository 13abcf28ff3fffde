"""Preflight check of the settings: what was typed is what runs."""

from dataclasses import fields
from pathlib import Path
from typing import Any

from experiments.expect import Subject, expect
from experiments.settings import PRESETS, Settings, flag


def settings_are_what_was_typed(subject: Subject) -> str:
    """Each flag of the command line against its setting, the other settings against preset and defaults."""
    settings = subject.pipeline.settings
    typed = read_flags(subject.arguments)
    preset = PRESETS[typed.get("preset", Settings.preset)]
    for item in fields(Settings):
        name, is_typed = item.name, item.name in typed
        wanted = typed[name] if is_typed else preset.get(name, item.default)
        found = getattr(settings, name)
        origin = "typed" if is_typed else "the preset's" if name in preset else "the default"
        expect(
            found == wanted,
            f"{flag(name)} is {found!r}, and {wanted!r} is {origin}",
            "a preset wins over what was typed, or a flag lands in another setting (experiments/settings.py)",
        )
    kept = subject.history.settings
    odd = [n for n, v in kept.items() if v != _plain(getattr(settings, n))]
    odd += [item.name for item in fields(Settings) if item.name not in (*kept, "resume")]
    expect(
        not odd,
        f"{', '.join(f'{flag(n)} is kept as {kept.get(n)!r}' for n in odd)}",
        "history.json and the packed file keep other settings than those of the run (Settings.to_json)",
    )
    return f"{len(typed)} flags typed, {len(fields(Settings)) - len(typed)} settings of the preset"


def read_flags(arguments: list[str]) -> dict[str, Any]:
    """The settings that a command line names, read without the parser, which has found no mistake in it.

    >>> read_flags(["--preset=plan", "--no-keep-dead", "--exclude-layers", "a", "b", "--max-bits", "none"])
    {'preset': 'plan', 'keep_dead': False, 'exclude_layers': ('a', 'b'), 'max_bits': None}
    """
    items = {flag(item.name): item for item in fields(Settings)}
    negated = {flag(f"no_{item.name}"): item for item in items.values() if item.type is bool}
    words: dict[str, list[str]] = {}
    name = ""
    for argument in arguments:
        before, equals, after = argument.partition("=")
        if before in items or before in negated:  # all else is a value, whatever it begins with
            name = before
            words.pop(name, None)  # The last of several wins.
            words[name] = [after] if equals else []
        else:
            words[name].append(argument)
    return {
        (items | negated)[name].name: _value(items[name].type, values) if name in items else False
        for name, values in words.items()
    }


def _plain(value: Any) -> Any:
    """As JSON has it: folders as text, tuples as lists."""
    return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value


def _value(kind: Any, words: list[str]) -> Any:
    if kind is bool:
        return True
    if kind == tuple[str, ...] | None:
        return tuple(words)
    (word,) = words
    if kind == int | None:
        return None if word == "none" else int(word)
    return kind(word)
