"""All settings, each beside its meaning and its source in the paper. The defaults are the paper's.

A YAML file fills them; `--set section.field=value` overrides them. All mistakes in them are reported at
once, a wrong name with the nearest valid ones. "silent" marks what the paper does not say, and then where
our value comes from.

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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml


def list_of(*items):
    """A list as the default of a field; each configuration gets its own."""
    return field(default_factory=lambda: list(items))


@dataclass
class Data:
    """Where the data lies (§4.1.1 and §4.1.2 name the data sets). "" = not used."""
    synthetic: bool = False           # draw all data (synthetic.py); a stage makes a missing input itself
    frames: list[str] = list_of()     # folders that hold a folder of face crops per video; merged
    labels: str = ""                  # Aff-Wild2's annotations: holds VA_Estimation_Challenge, ...
    affectnet_2017: str = ""          # AffectNet, first release: holds Manually_Annotated_Images, ...
    affectnet_crop: bool = False      # of the 2017 release: cut each face out by the box in its list
    affectnet_2021: str = ""          # AffectNet, second release: holds train_set and val_set
    raf_db: str = ""                  # RAF-DB: holds basic
    fer2013: str = ""                 # FER2013: holds fer2013.csv, or train/angry, ..., test/angry, ...
    ferplus: str = ""                 # FER+: holds fer2013new.csv, new labels for FER2013's images
    folders: list[str] = list_of()    # any other folders of face images for pre-training


@dataclass
class Synthetic:
    """How much synthetic data is drawn, and where. Only with data.synthetic; the paper has none."""
    root: str = "data/demo"           # folder that the data sets are written to
    seed: int = 0                     # another seed draws other people
    train_videos: int = 72            # training videos
    val_videos: int = 24              # validation videos, of other people
    frames: int = 180                 # typical length of a video, in frames
    faces: int = 4000                 # still faces over all static sets


@dataclass
class Vit:
    """The face model, a Vision Transformer (ViT)."""
    image_size: int = 224             # side of the square input, in pixels. silent: ViT-B/16's usual size
    patch: int = 16                   # side of a patch, in pixels (§3.1)
    dim: int = 768                    # width of a token: ViT-Base (§3.1)
    depth: int = 12                   # blocks: ViT-Base (§3.1)
    heads: int = 12                   # attention heads: ViT-Base (§3.1)


@dataclass
class Pretrain:
    """MAE pre-training (§3.1, §4.1.1). "MAE's" is the value of the original MAE's authors."""
    decoder_dim: int = 512            # width of a token in the decoder. silent: MAE's
    decoder_depth: int = 8            # blocks of the decoder. silent: MAE's
    decoder_heads: int = 16           # attention heads of the decoder. silent: MAE's
    mask_ratio: float = 0.75          # share of the patches that are hidden (§3.1)
    norm_pix_loss: bool = False       # normalise the target within each patch; the paper: plain pixels (§3.1)
    epochs: int = 500                 # passes over the face images (§4.1.1)
    batch: int = 1024                 # images per optimiser step, over all processes (§4.1.1)
    lr: float = 5e-4                  # peak learning rate, absolute (§4.1.1)
    betas: list[float] = list_of(0.9, 0.95)     # AdamW's. silent: MAE's
    weight_decay: float = 0.05        # AdamW's, on matrices only. silent: MAE's
    warmup_epochs: float = 40.0       # epochs of linear warm-up, then cosine to 0. silent: MAE's
    smallest_crop: float = 0.2        # a crop's smallest share of the image's area. silent: MAE's


@dataclass
class Finetune:
    """Training the ViT on the expression labels of single frames of Aff-Wild2 (§3.1, §4.1.1).

    The paper does not mention layer decay and drop path, which are common here; neither is used.
    """
    start: str = ""                   # "" = pretrain/last.pt, "none" = random, or a checkpoint, ours or MAE's
    token: Literal["mean", "cls"] = "mean"      # a face's feature, in later stages too: mean of the patch
                                      # tokens, or the cls token. silent: ours
    hidden: int = 512                 # width of the layer between feature and classes. silent: ours
    dropout: float = 0.1              # share that is dropped before the last layer. silent: ours
    epochs: int = 10                  # passes, each over other frames, one in `every`. silent: ours
    every: int = 5                    # take one frame in 5: neighbours look alike; 1 = all. silent: ours
    batch: int = 256                  # frames per optimiser step, over all processes (§4.1.1)
    lr: float = 1e-4                  # peak learning rate (§4.1.1)
    betas: list[float] = list_of(0.9, 0.999)    # AdamW's. silent: AdamW's defaults
    weight_decay: float = 0.05        # AdamW's, on matrices only. silent: MAE's fine-tuning
    warmup_epochs: float = 1.0        # epochs of linear warm-up, then cosine to 0. silent: ours
    smallest_crop: float = 0.6        # a crop's smallest share of the frame's area. silent: ours


@dataclass
class Features:
    """One feature per frame (§3.2)."""
    checkpoint: str = ""              # extracts the features: "" = this run's finetune/best.pt
    batch: int = 256                  # frames per forward pass. silent: ours


@dataclass
class Segments:
    """Cutting videos into overlapping segments (§3.2, §4.1.2)."""
    window: int = 300                 # w: frames per segment (§4.1.2)
    stride: int = 200                 # s: frames from one segment's start to the next (§4.1.2)


@dataclass
class Temporal:
    """TCN -> Transformer encoder -> MLP (§3.2, §3.3). Sizes: silent, from the authors' published code."""
    tcn: bool = True                  # false: the transformer sees the features themselves (ablation)
    channels: list[int] = list_of(768, 256, 128)     # width of each TCN level
    kernels: list[int] = list_of(5, 5, 5)            # kernel size of each level, in frames
    dilations: list[int] = list_of(1, 2, 4)          # dilation of each level, in frames
    causal: bool = True               # in the TCN a frame sees only the past. silent: the authors' code
    transformer: bool = True          # false: the head sees the TCN's output (ablation)
    width: int = 512                  # width of the transformer
    layers: int = 8                   # layers of the transformer
    heads: int = 4                    # attention heads of the transformer
    hidden: int = 512                 # width of the transformer's feed-forward layers
    head: int = 256                   # width of the MLP's hidden layer
    dropout: float = 0.3              # share that is dropped in TCN and transformer (§4.1.2)


@dataclass
class Task:
    """Training the segment model on one task (§4.1.2)."""
    features: str = ""                # folder of features: "" = this run's features
    fold: int = 0                     # 0 = the official sets; 1 to 4 = a part of a 4-fold split (Table 1)
    held_out: float = 0.0             # share of training scenes kept back, to choose the epoch on. silent: 0
    epochs: int = 0                   # passes over the segments. 0: VA 40, Expr 10, AU 30 (labels.py)
    batch: int = 32                   # segments per optimiser step, over all processes (§4.1.2)
    lr: float = 3e-5                  # peak learning rate (§4.1.2)
    weight_decay: float = 1e-5        # AdamW's, on all parameters (§4.1.2)
    warmup_epochs: float = 1.0        # epochs of linear warm-up, then cosine to 0 (§4.1.2)


@dataclass
class Run:
    """The run itself, of which the paper says nothing."""
    name: str = ""                    # results go to <out>/<name>/<stage>; "" = the configuration file's name
    source: str = ""                  # filled in by `load`: the file and every --set, for suggested commands
    out: str = "runs"                 # folder of all runs; with several machines, one they share
    base: str = ""                    # another run, whose stages are taken if made with these settings
    seed: int = 0                     # all randomness follows from it
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"    # auto = CUDA where there is a GPU, else the CPU
    largest_piece: int = 0            # most samples in a forward pass; 0 = what the memory seems to hold
    workers: int = 8                  # image decoders per training process; 0 = it decodes them itself
    checkpoint_minutes: float = 10.0  # save at least this often; after an epoch too, if under 2 % of the time


@dataclass
class Config:
    """Everything. `config.task.lr` is `--set task.lr=...` is `task: {lr: ...}` in YAML."""
    data: Data = field(default_factory=Data)
    synthetic: Synthetic = field(default_factory=Synthetic)
    vit: Vit = field(default_factory=Vit)
    pretrain: Pretrain = field(default_factory=Pretrain)
    finetune: Finetune = field(default_factory=Finetune)
    features: Features = field(default_factory=Features)
    segments: Segments = field(default_factory=Segments)
    temporal: Temporal = field(default_factory=Temporal)
    task: Task = field(default_factory=Task)
    run: Run = field(default_factory=Run)

    def folder(self, stage: str) -> Path:
        """runs/<config name>/<stage>"""
        return Path(self.run.out) / self.run.name / stage


SETTINGS = {f"{section.name}.{setting.name}": setting
            for section in dataclasses.fields(Config) for setting in dataclasses.fields(section.type)}
MAY_BE_ZERO = ("seed", "workers", "largest_piece", "fold", "weight_decay", "warmup_epochs", "dropout",
               "held_out", "synthetic.faces", "task.epochs")
BELOW_ONE = ("mask_ratio", "dropout", "held_out")
AT_MOST_ONE = ("smallest_crop",)
KINDS = {bool: "true or false", int: "a whole number", float: "a finite number",
         str: "text; put numbers in quotes"}
# Where `~` becomes the home folder: in these settings and in all that begin with "data.".
PATHS = ("data.", "synthetic.root", "run.out", "finetune.start", "features.checkpoint", "task.features")
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
    if kind is str and value is None:
        value = ""
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
    for name, betas in (("pretrain.betas", p.betas), ("finetune.betas", config.finetune.betas)):
        if len(betas) != 2 or max(betas) >= 1:
            yield f"{name}: got {betas}, expected two numbers below 1"
    if config.task.fold > 4:
        yield f"task.fold: got {config.task.fold}, expected 0 (official split) or 1 to 4"


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


def typed(config: Config) -> set[str]:
    """The settings that were given with --set."""
    words = shlex.split(config.run.source)
    return {after.partition("=")[0] for word, after in zip(words, words[1:]) if word == "--set"}


def as_yaml(config: Config) -> str:
    """The resolved settings as YAML: what each run folder keeps, and what `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


if __name__ == "__main__":
    print(as_yaml(from_command_line(__doc__)[0]), end="")         # in one piece, for `| head`
