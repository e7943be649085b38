"""A run's configuration: the settings of settings.py, filled from a YAML file and the command line.

`--set section.field=value` overrides the file. All mistakes are reported at once, a wrong name with the
nearest valid ones.

    python config.py --config configs/paper.yaml          # the settings that result
    python config.py --set task.lr=1e-4 --set temporal.tcn=false
"""

import argparse
import dataclasses
import difflib
import math
import os
import shlex
import sys
import typing
from pathlib import Path
from typing import Literal

import yaml

from settings import SETTINGS, Config

MAY_BE_ZERO = ("seed", "workers", "largest_piece", "fold", "weight_decay", "warmup_epochs", "dropout",
               "drop_path", "clip", "held_out", "synthetic.faces", "task.epochs", "emma.weights",
               "cotex.mask_ratio", "js_weight")
BELOW_ONE = ("mask_ratio", "dropout", "drop_path", "held_out")
AT_MOST_ONE = ("smallest_crop", "layer_decay")
KINDS = {bool: "true or false", int: "a whole number", float: "a finite number",
         str: "text; put numbers in quotes"}
# Where `~` becomes the home folder: in these settings and in all that begin with "data.".
PATHS = ("data.", "synthetic.root", "run.out", "finetune.start", "features.checkpoint", "task.features",
         "stills.start", "emma.start", "emma.cnn", "cotex.start")
NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)     # ValueError: not UTF-8, or a date like 2024-13-45


def _typed(value, kind, name):
    """`value` as `kind`, or ValueError. YAML reads 5e-4 as text, so text is tried as a number."""
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{name}: got {value!r}, expected a list like [1, 2]")
        return [_typed(item, typing.get_args(kind)[0], name) for item in value]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}"
                             + _nearest(str(value), choices))
        return value
    if kind is float and type(value) in (int, float, str):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            pass                                                   # refused below
    value = "" if kind is str and value is None else value
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise ValueError(f"{name}: got {value!r}, expected {KINDS[kind]}")
    return os.path.expanduser(value) if kind is str and name.startswith(PATHS) else value


def _nearest(name, names):
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""


def _fill(config, name, value, problems):
    """Set the setting `name` = section.field; what is wrong with it is appended to `problems`."""
    if name not in SETTINGS:
        problems.append(f"{name}: no such setting" + _nearest(name, SETTINGS))
        return
    section, key = name.split(".")
    try:
        setattr(getattr(config, section), key, _typed(value, SETTINGS[name].type, name))
    except ValueError as problem:
        problems.append(str(problem))


def _range_problems(config):
    """What is wrong with single numbers, then with settings that do not fit together."""
    for name in SETTINGS:
        section, key = name.split(".")
        value = getattr(getattr(config, section), key)
        may_be_zero = key in MAY_BE_ZERO or name in MAY_BE_ZERO
        for number in value if isinstance(value, list) else [value]:
            if type(number) in (int, float) and (number < 0 or number == 0 and not may_be_zero):
                yield f"{name}: got {number}, expected {'0 or more' if may_be_zero else 'more than 0'}"
            if key in BELOW_ONE and number >= 1:
                yield f"{name}: got {number}, expected a share below 1"
            if key in AT_MOST_ONE and number > 1:
                yield f"{name}: got {number}, expected a share of at most 1"
            if key == "fold" and type(number) is int and number > 4:
                yield f"{name}: got {number}, expected 0 (official split) or 1 to 4"
    s, v, p, t = config.segments, config.vit, config.pretrain, config.temporal
    if s.stride > s.window:
        yield (f"segments.stride: got {s.stride} > segments.window={s.window}, "
               "which would leave frames uncovered")
    if v.patch > 0 and v.image_size % v.patch:
        yield f"vit.image_size: got {v.image_size}, expected a multiple of vit.patch={v.patch}"
    for name, dim, heads in (("vit.dim", v.dim, v.heads),
                             ("pretrain.decoder_dim", p.decoder_dim, p.decoder_heads)):
        if heads < 1 or dim % heads or dim % 4:
            yield f"{name}: got {dim}, expected a multiple of its {heads} heads and of 4"
    if t.heads < 1 or t.width % t.heads:
        yield f"temporal.width: got {t.width}, expected a multiple of its {t.heads} heads"
    if not len(t.channels) == len(t.kernels) == len(t.dilations) > 0:
        yield "temporal.channels, kernels and dilations: expected lists of one length, one entry per level"
    if not t.causal and any(kernel % 2 == 0 for kernel in t.kernels):
        yield f"temporal.kernels: got {t.kernels}, expected odd sizes with causal=false"
    for section in ("pretrain", "finetune", "stills", "emma", "cotex"):
        betas = getattr(config, section).betas
        if len(betas) != 2 or max(betas) >= 1:
            yield f"{section}.betas: got {betas}, expected two numbers below 1"
    if len(config.emma.weights) != 3 or not any(config.emma.weights):
        yield (f"emma.weights: got {config.emma.weights}, expected three numbers, of VA, Expr and AU, "
               "not all 0")


def _read(path) -> dict:
    """The sections of a YAML file. Raises ValueError if it cannot be read as such."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
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
    sections = [section.name for section in dataclasses.fields(Config)]
    for section, settings in _read(path).items():
        if section not in sections:
            problems.append(f"{section}: no such section" + _nearest(str(section), sections))
        elif not isinstance(settings, dict):
            problems.append(f"{section}: expected settings below it, got {settings!r}")
        else:
            for key, value in settings.items():
                _fill(config, f"{section}.{key}", value, problems)
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or "." not in name:
            problems.append(f"--set {override}: expected section.field=value")
            continue
        try:
            _fill(config, name, yaml.safe_load(text) if text else "", problems)
        except NOT_YAML:
            problems.append(f"--set {override[:80]}: the value is not plain YAML")
    problems += _range_problems(config)
    if problems:
        raise ValueError(f"{path}: {len(problems)} problem(s) in the settings\n  " + "\n  ".join(problems))
    config.run.name = config.run.name or Path(path).stem
    typed = [word for override in overrides for word in ("--set", override)]
    config.run.source = shlex.join([str(path), *typed])
    return config


def from_command_line(description, **arguments) -> tuple[Config, argparse.Namespace]:
    """The configuration of --config and --set, and the options with the script's own `arguments` (name ->
    add_argument's keywords). Ends with exit code 2 on bad settings."""
    parser = argparse.ArgumentParser(description=description,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml", metavar="FILE",
                        help="settings (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE",
                        help="override one setting; repeatable")
    for name, keywords in arguments.items():
        parser.add_argument(f"--{name}", **keywords)
    options = parser.parse_args()
    try:
        return load(options.config, options.set), options
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def print_all(lines):
    """Print what a generator yields, in one piece, for `| head`. If it raises ValueError or OSError, the
    lines before that are printed, then the error, and the exit code is 2."""
    come, problem = [], ""
    try:
        for line in lines:
            come.append(f"{line}\n")
    except (ValueError, OSError) as error:
        problem = f"error: {error}"
    print("".join(come), end="")
    if problem:
        print(problem, file=sys.stderr)
        sys.exit(2)


def typed(config: Config) -> set[str]:
    """The settings that were given with --set."""
    words = shlex.split(config.run.source)
    return {after.partition("=")[0] for word, after in zip(words, words[1:]) if word == "--set"}


def as_yaml(config: Config) -> str:
    """The resolved settings as YAML: what each run folder keeps, and what `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


if __name__ == "__main__":
    print(as_yaml(from_command_line(__doc__)[0]), end="")         # in one piece, for `| head`
