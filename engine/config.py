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
from typing import Literal

import yaml

from engine.settings import SECTIONS, SETTINGS, Config

MAY_BE_ZERO = ("seed", "workers", "fold", "mean", "weight_decay", "warmup_epochs", "dropout", "drop_path",
               "clip", "held_out", "synthetic.faces", "task.epochs", "emma.weights", "cotex.mask_ratio",
               "js_weight")
HIGHEST = {"smallest_crop": 1, "layer_decay": 1, "fold": 4, "mean": 1, "std": 1}
BELOW_ONE = ("mask_ratio", "dropout", "drop_path", "held_out", "betas")
KINDS = {bool: "true or false", int: "a whole number", float: "a finite number",
         str: "text; put numbers in quotes"}
# Where `~` becomes the home folder: in these settings and in all that begin with "data.".
PATHS = ("pretrain.start", "finetune.start", "features.checkpoint", "task.features", "stills.start",
         "emma.start", "emma.cnn", "cotex.start", "synthetic.root", "run.out")
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)     # ValueError: not UTF-8, or a date like 2024-13-45


def nearest(name, names) -> str:
    """The end of a message about a wrong name."""
    close = difflib.get_close_matches(str(name), names, n=3, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""


def typed(value, kind, name):
    """`value` as `kind`. YAML reads 5e-4 as text, so text is tried as a number. Raises ValueError."""
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{name}: got {value!r}, expected a list like [1, 2]")
        return [typed(item, typing.get_args(kind)[0], name) for item in value]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}")
        return value
    if kind is float and type(value) in (int, float, str):
        with suppress(ValueError, OverflowError):                  # refused below
            value = float(value)
    value = "" if kind is str and value is None else value
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name}: got {value!r}, expected {KINDS[kind]}")
    return os.path.expanduser(value) if name in PATHS or name.startswith("data.") and kind is str else value


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


def problems_of(config):
    """Yield what is wrong with single numbers, then with settings that do not fit together."""
    for name in SETTINGS:
        key, value = name.split(".")[1], value_of(config, name)
        may_be_zero = key in MAY_BE_ZERO or name in MAY_BE_ZERO
        for number in value if isinstance(value, list) else [value]:
            if type(number) not in (int, float):
                continue
            if number < 0 or number == 0 and not may_be_zero:
                yield f"{name}: got {number}, expected {'0 or more' if may_be_zero else 'more than 0'}"
            if key in BELOW_ONE and number >= 1:
                yield f"{name}: got {number}, expected a number below 1"
            if number > HIGHEST.get(key, math.inf):
                yield f"{name}: got {number}, expected at most {HIGHEST[key]}"
        wanted = {"betas": 2, "mean": 3, "std": 3, "weights": 3}.get(key)
        if wanted and len(value) != wanted:
            yield f"{name}: got {value}, expected {wanted} numbers"
    s, v, p, t = config.segments, config.vit, config.pretrain, config.temporal
    if s.stride > s.window:
        yield (f"segments.stride: got {s.stride} > segments.window={s.window}, "
               "which would leave frames uncovered")
    if v.patch > 0 and v.image_size % v.patch:
        yield f"vit.image_size: got {v.image_size}, expected a multiple of vit.patch={v.patch}"
    for name, dim, heads, of in (("vit.dim", v.dim, v.heads, 4), ("temporal.width", t.width, t.heads, 1),
                                 ("pretrain.decoder_dim", p.decoder_dim, p.decoder_heads, 4)):
        if heads < 1 or dim % heads or dim % of:
            yield f"{name}: got {dim}, expected a multiple of its {heads} heads" + " and of 4" * (of == 4)
    if not len(t.channels) == len(t.kernels) == len(t.dilations) > 0:
        yield "temporal.channels, kernels and dilations: expected lists of one length, one entry per level"
    if not t.causal and any(kernel % 2 == 0 for kernel in t.kernels):
        yield f"temporal.kernels: got {t.kernels}, expected odd sizes with causal=false"
    if not any(config.emma.weights):
        yield f"emma.weights: got {config.emma.weights}, of VA, Expr and AU; expected one that is not 0"


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
        if section not in SECTIONS:
            problems.append(f"{section}: no such section" + nearest(section, SECTIONS))
        elif not isinstance(settings, dict):
            problems.append(f"{section}: expected settings below it, got {settings!r}")
        else:
            for key, value in settings.items():
                fill(config, f"{section}.{key}", value, problems)
    of_file = copy.deepcopy(config)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or "." not in name:
            problems.append(f"--set {override}: expected section.field=value")
            continue
        try:
            fill(config, name, yaml.safe_load(text), problems)
        except NOT_YAML:
            problems.append(f"--set {override[:80]}: the value is not plain YAML")
    problems += problems_of(config)
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
    parser.add_argument("--config", default="configs/demo.yaml", metavar="FILE",
                        help="settings (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE",
                        help="override one setting; repeatable")
    for name, keywords in arguments.items():
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
