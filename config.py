"""All settings, each beside its meaning and its source in the paper. The defaults are the paper's.

A YAML file fills them, `--set section.field=value` overrides them. An unknown key or a bad value is refused, all problems at
once, with the nearest valid name. "silent" marks what the paper does not say, with where our value comes from.

    python config.py --config configs/paper.yaml          # the resolved settings
    python config.py --set task.lr=1e-4 --set temporal.tcn=false
"""

import argparse
import dataclasses
import difflib
import math
import shlex
import sys
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml


@dataclass
class Data:
    """Where the data lies. "" = not used."""
    drawn: bool = False
    """Draw the data (synthetic.py) and let each stage make a missing input itself. For the demo; real runs name what is missing."""
    frames: list[str] = field(default_factory=list)
    """Folders that hold one folder of face crops per video (cropped_aligned); several are merged."""
    labels: str = ""
    """Aff-Wild2 annotations: the folder that holds VA_Estimation_Challenge, EXPR_Classification_Challenge, ..."""
    affectnet_2017: str = ""
    """AffectNet, first release: the folder that holds Manually_Annotated_Images and training.csv."""
    affectnet_2021: str = ""
    """AffectNet, second release: the folder that holds train_set and val_set."""
    raf_db: str = ""
    """RAF-DB: the folder that holds basic."""
    fer2013: str = ""
    """FER2013: the folder that holds fer2013.csv."""
    ferplus: str = ""
    """FER+: the folder that holds fer2013new.csv. New labels for FER2013's images, which are counted once."""
    folders: list[str] = field(default_factory=list)
    """Any other folders of face images for pre-training."""


@dataclass
class Drawn:
    """How much synthetic.py draws, and where (only with data.drawn)."""
    root: str = "data/demo"
    """Folder that the data sets are drawn into."""
    seed: int = 0
    """Another seed draws other people."""
    train_videos: int = 72
    """Training videos."""
    val_videos: int = 24
    """Validation videos, of other people."""
    frames: int = 180
    """Typical video length in frames."""
    faces: int = 4000
    """Still faces over all static sets."""


@dataclass
class Encoder:
    """The ViT (§3.1)."""
    image_size: int = 224
    """Side of the square input in pixels. silent: ViT-B/16's usual 224."""
    patch: int = 16
    """Side of a patch in pixels (§3.1)."""
    dim: int = 768
    """Token width: ViT-Base (§3.1)."""
    depth: int = 12
    """Blocks: ViT-Base (§3.1)."""
    heads: int = 12
    """Attention heads: ViT-Base (§3.1)."""


@dataclass
class Pretrain:
    """MAE pre-training (§3.1, §4.1.1)."""
    decoder_dim: int = 512
    """Decoder width. silent: the original MAE's."""
    decoder_depth: int = 8
    """Decoder blocks. silent: the original MAE's."""
    decoder_heads: int = 16
    """Decoder attention heads. silent: the original MAE's."""
    mask_ratio: float = 0.75
    """Share of the patches that are hidden (§3.1)."""
    norm_pix_loss: bool = False
    """Compare pixels normalised per patch. The paper's loss is on plain pixels (§3.1)."""
    epochs: int = 500
    """Passes over the face images (§4.1.1)."""
    batch: int = 1024
    """Images per optimiser step, over all processes (§4.1.1)."""
    lr: float = 5e-4
    """Peak learning rate, absolute (§4.1.1)."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's. silent: the original MAE's."""
    weight_decay: float = 0.05
    """On matrices only. silent: the original MAE's."""
    warmup_epochs: float = 40.0
    """Linear warm-up, then cosine to 0. silent: the original MAE's."""
    smallest_crop: float = 0.2
    """Random resized crop covers this share of the image or more. silent: the original MAE's."""


@dataclass
class Finetune:
    """Frame-level training of the encoder on Aff-Wild2 expressions (§3.1, §4.1.1)."""
    start: str = ""
    """Start from: "" = this run's pretrain/last.pt, "none" = random weights, or a checkpoint file (ours or the reference MAE's)."""
    token: Literal["mean", "cls"] = "mean"
    """What the head and the later stages take as the face's feature: mean of the patch tokens, or cls. silent: ours."""
    hidden: int = 512
    """Width of the fully connected layer between feature and classes. silent: ours."""
    dropout: float = 0.1
    """Before the last layer. silent: ours."""
    epochs: int = 10
    """Passes over the frames. silent: ours; a pass takes every `every`-th frame, another offset each time."""
    every: int = 5
    """Neighbouring frames are all but equal: take each 5th frame in an epoch. silent: ours. 1 = all."""
    batch: int = 256
    """Frames per optimiser step, over all processes (§4.1.1)."""
    lr: float = 1e-4
    """Peak learning rate (§4.1.1)."""
    weight_decay: float = 0.05
    """On matrices only. silent: the original MAE's fine-tuning."""
    warmup_epochs: float = 1.0
    """Linear warm-up, then cosine to 0. silent: ours."""
    smallest_crop: float = 0.6
    """Random resized crop covers this share of the frame or more. silent: ours."""


@dataclass
class Features:
    """Per-frame feature extraction (§3.2)."""
    encoder: str = ""
    """Checkpoint to extract with: "" = this run's finetune/best.pt."""
    batch: int = 256
    """Frames per forward pass."""


@dataclass
class Segments:
    """Cutting videos into overlapping segments (§3.2, §4.1.2)."""
    window: int = 300
    """Frames per segment, w (§4.1.2)."""
    stride: int = 200
    """Frames from one segment's start to the next, s (§4.1.2)."""


@dataclass
class Temporal:
    """TCN -> Transformer encoder -> MLP (§3.2, §3.3). Sizes: silent, from the authors' published code."""
    tcn: bool = True
    """Without it the encoder sees the features themselves (ablation)."""
    channels: list[int] = field(default_factory=lambda: [768, 256, 128])
    """Width of each TCN level."""
    kernels: list[int] = field(default_factory=lambda: [5, 5, 5])
    """Kernel size of each level, in frames."""
    dilations: list[int] = field(default_factory=lambda: [1, 2, 4])
    """Dilation of each level, in frames."""
    causal: bool = True
    """Frames see only the past in the TCN. false: the window is centred."""
    encoder: bool = True
    """Without it the head sees the TCN's output (ablation)."""
    width: int = 512
    """Encoder width."""
    layers: int = 8
    """Encoder layers."""
    heads: int = 4
    """Encoder attention heads."""
    hidden: int = 512
    """Width of the encoder's feed-forward layer."""
    head: int = 256
    """Width of the MLP's hidden layer."""
    dropout: float = 0.3
    """In TCN and encoder (§4.1.2)."""


@dataclass
class Task:
    """Training the segment model on one task (§4.1.2)."""
    features: str = ""
    """Folder of features: "" = this run's features."""
    fold: int = 0
    """0 = the official training and validation sets; 1 to 4 = that part of a 4-fold split of both (Table 1)."""
    epochs_va: int = 40
    """silent: the authors' code."""
    epochs_expr: int = 10
    """silent: the authors' code."""
    epochs_au: int = 30
    """silent: the authors' code."""
    batch: int = 32
    """Segments per optimiser step, over all processes (§4.1.2)."""
    lr: float = 3e-5
    """Peak learning rate (§4.1.2)."""
    weight_decay: float = 1e-5
    """AdamW's, on all parameters (§4.1.2)."""
    warmup_epochs: float = 1.0
    """Linear warm-up in the first epoch, then cosine to 0 (§4.1.2)."""


@dataclass
class Run:
    """The run itself."""
    name: str = ""
    """Results go to <out>/<name>/<stage>; "" = the name of the configuration file."""
    source: str = ""
    """The configuration file and every --set, filled in when they are read: for the commands that messages suggest."""
    out: str = "runs"
    """Folder of all runs; with several machines, one they share."""
    seed: int = 0
    """All randomness follows from it."""
    workers: int = 8
    """Processes that decode images, per training process. 0 = decode in the training process."""
    checkpoint_minutes: float = 10.0
    """Save at least this often; also after an epoch, as long as saving takes less than 2 % of the time."""


@dataclass
class Config:
    """Everything. `config.task.lr` is `--set task.lr=...` is `task: {lr: ...}` in YAML."""
    data: Data = field(default_factory=Data)
    drawn: Drawn = field(default_factory=Drawn)
    encoder: Encoder = field(default_factory=Encoder)
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


MAY_BE_ZERO = {"seed", "workers", "fold", "weight_decay", "warmup_epochs", "dropout", "faces"}
BELOW_ONE = {"mask_ratio", "dropout"}
AT_MOST_ONE = {"smallest_crop"}


def _typed(value, kind, name):
    """`value` as `kind`, or ValueError. YAML reads 5e-4 as text, so text is tried as a number where one is expected."""
    if typing.get_origin(kind) is list:
        if not isinstance(value, list):
            raise ValueError(f"{name}: got {value!r}, expected a list like [1, 2]")
        return [_typed(v, typing.get_args(kind)[0], name) for v in value]
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ValueError(f"{name}: got {value!r}, expected one of {', '.join(choices)}" + _nearest(str(value), choices))
        return value
    if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except (ValueError, OverflowError):
            pass
    if kind is str and value is None:
        value = ""
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        expected = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text; put numbers in quotes"}[kind]
        raise ValueError(f"{name}: got {value!r}, expected {expected}")
    return value


def _nearest(name, names):
    close = difflib.get_close_matches(name, list(names), n=3, cutoff=0.4)
    return f"; nearest: {', '.join(close)}" if close else ""


def _fill(config, section, key, value, problems):
    names = {f"{s.name}.{f.name}": f for s in dataclasses.fields(config) for f in dataclasses.fields(s.type)}
    name = f"{section}.{key}"
    if name not in names:
        problems.append(f"{name}: no such setting" + _nearest(name, names))
        return
    try:
        setattr(getattr(config, section), key, _typed(value, names[name].type, name))
    except ValueError as problem:
        problems.append(str(problem))


def _range_problems(config):
    for section in dataclasses.fields(config):
        for item in dataclasses.fields(section.type):
            value = getattr(getattr(config, section.name), item.name)
            for v in value if isinstance(value, list) else [value]:
                if not isinstance(v, (int, float)) or isinstance(v, bool):
                    continue
                if v < 0 or (v == 0 and item.name not in MAY_BE_ZERO):
                    yield f"{section.name}.{item.name}: got {v}, expected {'0 or more' if item.name in MAY_BE_ZERO else 'more than 0'}"
                if (item.name in BELOW_ONE and v >= 1) or (item.name in AT_MOST_ONE and v > 1):
                    yield f"{section.name}.{item.name}: got {v}, expected a share {'below' if item.name in BELOW_ONE else 'of at most'} 1"
    s, e, p, t = config.segments, config.encoder, config.pretrain, config.temporal
    if s.stride > s.window:
        yield f"segments.stride: got {s.stride} > segments.window={s.window}, which would leave frames uncovered"
    if e.patch > 0 and e.image_size % e.patch:
        yield f"encoder.image_size: got {e.image_size}, expected a multiple of encoder.patch={e.patch}"
    for where, dim, heads, multiple in (("encoder.dim", e.dim, e.heads, 4), ("pretrain.decoder_dim", p.decoder_dim, p.decoder_heads, 4),
                                        ("temporal.width", t.width, t.heads, 1)):
        if heads < 1 or dim % heads or dim % multiple:
            yield f"{where}: got {dim}, expected a multiple of its {heads} heads" + (" and of 4" if multiple > 1 else "")
    if not len(t.channels) == len(t.kernels) == len(t.dilations) > 0:
        yield "temporal.channels, kernels and dilations: expected lists of one length, one entry per level"
    if not t.causal and any(k % 2 == 0 for k in t.kernels):
        yield f"temporal.kernels: got {t.kernels}, expected odd sizes with causal=false"
    if len(p.betas) != 2 or max(p.betas) >= 1:
        yield f"pretrain.betas: got {p.betas}, expected two numbers below 1"
    if not 0 <= config.task.fold <= 4:
        yield f"task.fold: got {config.task.fold}, expected 0 (official split) or 1 to 4"


def load(path, overrides=()) -> Config:
    """The configuration of a YAML file with `section.field=value` overrides on top.

    Raises ValueError with every problem found: unknown keys (and the nearest valid ones), wrong types, values out of range.
    """
    config, problems = Config(), []
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8")) or {}
    except OSError as error:
        found = sorted(str(p) for p in Path("configs").glob("*.yaml"))
        raise ValueError(f"{path}: cannot be read ({error.strerror}); configurations here: {', '.join(found) or 'none'}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:       # ValueError: not UTF-8, or a date like 2024-13-45
        raise ValueError(f"{path}: not plain YAML: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected sections like 'task: {{lr: 3e-5}}', got {type(content).__name__}")
    sections = [f.name for f in dataclasses.fields(Config)]
    for section, fields in content.items():
        if section not in sections:
            problems.append(f"{section}: no such section" + _nearest(str(section), sections))
        elif not isinstance(fields, dict):
            problems.append(f"{section}: expected settings below it, got {fields!r}")
        else:
            for key, value in fields.items():
                _fill(config, section, key, value, problems)
    for override in overrides:
        name, equals, text = override.partition("=")
        section, dot, key = name.partition(".")
        if not (equals and dot):
            problems.append(f"--set {override}: expected section.field=value")
            continue
        try:
            _fill(config, section, key, yaml.safe_load(text) if text else "", problems)
        except (yaml.YAMLError, ValueError, RecursionError):
            problems.append(f"--set {override[:80]}: the value is not plain YAML")
    problems += _range_problems(config)
    if problems:
        raise ValueError(f"{path}: {len(problems)} problem(s) in the settings\n  " + "\n  ".join(problems))
    config.run.name = config.run.name or Path(path).stem
    config.run.source = shlex.join([str(path), *(word for override in overrides for word in ("--set", override))])
    return config


def from_command_line(description, **arguments) -> tuple[Config, argparse.Namespace]:
    """--config, --set and the script's own arguments (name -> add_argument's keywords); ends with code 2 on bad settings."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/demo.yaml", metavar="FILE", help="settings (default: %(default)s)")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE", help="override one setting; repeatable")
    for name, keywords in arguments.items():
        parser.add_argument(f"--{name}", **keywords)
    options = parser.parse_args()
    try:
        return load(options.config, options.set), options
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def as_yaml(config: Config) -> str:
    """The resolved settings as YAML: what each run folder keeps, and what `--config` reads back."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


if __name__ == "__main__":
    print(as_yaml(from_command_line(__doc__)[0]), end="")
