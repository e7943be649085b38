"""A run's configuration: the settings of settings.py, filled from a YAML file and the command line.

`--set section.field=value` overrides the file. All mistakes are reported at once, a wrong name with the
nearest valid ones.

    python -m engine.config --config configs/paper.yaml          # the settings that result
    python -m engine.config --set task.lr=1e-4 --set temporal.tcn=false
"""

import argparse
import copy
import dataclasses
import difflib
import math
import os
import shlex
import sys
import typing
from contextlib import suppress
from pathlib import Path

import yaml

from engine.settings import SETTINGS, Config

MAY_BE_ZERO = ("seed", "workers", "fold", "mean", "weight_decay", "warmup_epochs", "dropout", "drop_path",
               "clip", "held_out", "synthetic.faces", "task.epochs", "emma.weights", "cotex.mask_ratio",
               "js_weight")
HIGHEST = {"smallest_crop": 1, "layer_decay": 1, "fold": 4, "mean": 1, "std": 1}
LENGTHS = {"betas": 2, "mean": 3, "std": 3, "weights": 3}
BELOW_ONE = ("mask_ratio", "dropout", "drop_path", "held_out", "betas")
KINDS = {bool: "true or false", int: "a whole number", float: "a finite number",
         str: "text; put numbers in quotes"}
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)     # ValueError: not UTF-8, or a date like 2024-13-45


def nearest(name, names) -> str:
    """The end of a message about a wrong name."""
    close = difflib.get_close_matches(name, names, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""


def typed(value, kind, name):
    """`value` as `kind`. YAML reads 5e-4 as text, so text is tried as a number. Raises ValueError."""
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{name}: got {value!r}, expected a list like [1, 2]")
        return [typed(item, typing.get_args(kind)[0], name) for item in value]
    choices = typing.get_args(kind)                                # of a Literal
    if kind is float and type(value) in (int, float, str):
        with suppress(ValueError, OverflowError):                  # refused below
            value = float(value)
    value = "" if kind is str and value is None else value
    fits = value in choices if choices else type(value) is kind
    if not fits or kind is float and not math.isfinite(value):
        expected = KINDS.get(kind) or f"one of {', '.join(choices)}"
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return os.path.expanduser(value) if kind is str else value     # most of them are paths


def fill(config, name, value, problems):
    """Set the setting `name` = section.field; what is wrong with it is appended to `problems`."""
    if name not in SETTINGS:
        problems.append(f"{name}: no such setting" + nearest(name, SETTINGS))
        return
    section, key = name.split(".")
    try:
        setattr(getattr(config, section), key, typed(value, SETTINGS[name].type, name))
    except ValueError as problem:
        problems.append(str(problem))


def value_of(config: Config, name: str):
    """The setting "section.field"; None if there is none of this name."""
    section, key = name.split(".")
    return getattr(getattr(config, section, None), key, None)


def rules(config):
    """Yield (setting, value, what is expected, does it fit): of single numbers, then of several settings."""
    for name in SETTINGS:
        key, value = name.split(".")[1], value_of(config, name)
        zero = key in MAY_BE_ZERO or name in MAY_BE_ZERO
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float):
                yield name, number, "0 or more" if zero else "more than 0", number > 0 or zero and number == 0
                yield name, number, "a number below 1", number < 1 or key not in BELOW_ONE
                yield name, number, f"at most {HIGHEST.get(key)}", number <= HIGHEST.get(key, number)
        yield name, value, f"{LENGTHS.get(key)} numbers", key not in LENGTHS or len(value) == LENGTHS[key]
    s, v, p, t = config.segments, config.vit, config.pretrain, config.temporal
    yield ("segments.stride", s.stride, f"at most segments.window={s.window}, so that all frames are covered",
           s.stride <= s.window)
    yield ("vit.image_size", v.image_size, f"a multiple of vit.patch={v.patch}",
           v.patch < 1 or v.image_size % v.patch == 0)
    for name, dim, heads, of in (("vit.dim", v.dim, v.heads, 4), ("temporal.width", t.width, t.heads, 1),
                                 ("pretrain.decoder_dim", p.decoder_dim, p.decoder_heads, 4)):
        yield (name, dim, f"a multiple of its {heads} heads" + " and of 4" * (of == 4),
               heads > 0 and dim % heads == 0 and dim % of == 0)
    yield ("temporal.channels", t.channels, "one entry per level, as in kernels and dilations",
           len(t.channels) == len(t.kernels) == len(t.dilations) > 0)
    yield ("temporal.kernels", t.kernels, "odd sizes with causal=false",
           t.causal or all(kernel % 2 for kernel in t.kernels))
    yield "stills.width", config.stills.width, "2 or more", config.stills.width > 1
    yield "emma.weights", config.emma.weights, "one that is not 0", any(config.emma.weights)


def read(path) -> dict:
    """The sections of a YAML file. Raises ValueError if it cannot be read as such."""
    try:
        content = yaml.safe_load(Path(path).read_bytes()) or {}         # UTF-8, or UTF-16 as it says itself
    except OSError as error:
        found = ", ".join(sorted(str(p) for p in Path("configs").glob("*.yaml"))) or "none"
        raise ValueError(f"{path}: cannot be read ({error.strerror}); configurations here: {found}") from None
    except NOT_YAML as error:
        raise ValueError(f"{path}: not plain YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected sections like 'task: {{lr: 3e-5}}', got {type(content).__name__}")
    return content


def load(path, overrides=()) -> Config:
    """The configuration of a YAML file with `section.field=value` overrides on top.

    Raises ValueError with every problem: unknown names, wrong types, values out of range.
    """
    config, problems = Config(), []
    for section, settings in read(path).items():
        if not isinstance(settings, dict):
            problems.append(f"{section}: expected settings below it, got {settings!r}")
            continue
        for key, value in settings.items():
            fill(config, f"{section}.{key}", value, problems)
    of_file = copy.deepcopy(config)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            problems.append(f"--set {override}: expected section.field=value")
            continue
        try:
            fill(config, name, yaml.safe_load(text), problems)
        except NOT_YAML:
            problems.append(f"--set {override[:80]}: the value is not plain YAML")
    problems += [f"{name}: got {got}, expected {expected}" for name, got, expected, fits in rules(config)
                 if not fits]
    if problems:
        raise ValueError(f"{path}: {len(problems)} problem(s) in the settings\n  " + "\n  ".join(problems))
    config.changed = {name: value_of(config, name) for name in SETTINGS
                      if value_of(config, name) != value_of(of_file, name)}
    config.run.name = config.run.name or Path(path).stem
    config.words = shlex.join([str(path), *(word for override in overrides for word in ("--set", override))])
    return config


def options_of(description, **arguments) -> argparse.Namespace:
    """What was typed: --config, --set and the script's own `arguments` (name -> add_argument's keywords)."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    ours = {"config": {"default": "configs/demo.yaml", "metavar": "FILE",
                       "help": "settings (default: %(default)s)"},
            "set": {"action": "append", "default": [], "metavar": "SECTION.FIELD=VALUE",
                    "help": "override one setting; repeatable"}}
    for name, keywords in (ours | arguments).items():
        parser.add_argument(f"--{name}", **keywords)
    return parser.parse_args()


def from_command_line(description, **arguments) -> tuple[Config, argparse.Namespace]:
    """The configuration of --config and --set, and the options. Ends with exit code 2 on bad settings."""
    options = options_of(description, **arguments)
    try:
        return load(options.config, options.set), options
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def print_all(lines):
    """Print what a generator yields. If it raises ValueError or OSError, print the error; exit code 2."""
    try:
        for line in lines:
            print(line)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def as_yaml(config: Config) -> str:
    """The resolved settings as YAML: what each run folder keeps, and what `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


if __name__ == "__main__":
    print(as_yaml(from_command_line(__doc__)[0]), end="")         # in one piece, for `| head`
