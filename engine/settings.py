"""All settings, each beside its meaning and its source in the paper. The defaults are the paper's.

The sections from Stills to Cotex are of the second paper. "silent" marks what the paper does not say, and
then where our value comes from. `config.py` fills them from a file and the command line.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal


def list_of(*items):
    """A list as the default of a field; each configuration gets its own."""
    return field(default_factory=lambda: list(items))


@dataclass
class Data:
    """Where the data lies (§3.1 names the face sets, §4.1.2 Aff-Wild2). "" = not used."""
    synthetic: bool = False           # draw all data; a stage makes a missing input itself
    frames: list[str] = list_of()     # folders that hold a folder of face crops per video; merged
    labels: str = ""                  # Aff-Wild2's annotations: holds VA_Estimation_Challenge, ...
    affectnet_2017: str = ""          # AffectNet, first release: holds Manually_Annotated_Images, ...
    affectnet_crop: bool = False      # of the 2017 release: cut each face out by the box in its list
    affectnet_2021: str = ""          # AffectNet, second release: holds train_set and val_set
    raf_db: str = ""                  # RAF-DB: holds basic
    fer2013: str = ""                 # FER2013: holds fer2013.csv, or train/angry, ..., test/angry, ...
    ferplus: str = ""                 # FER+: holds fer2013new.csv, new labels for FER2013's images
    folders: list[str] = list_of()    # any other folders of face images for pre-training
    s_aff_wild2: str = ""             # EMMA: holds training_set_annotations.txt, validation_set_...
    drawn_faces: str = ""             # CoTEX trains on these: holds ANGRER, DISGUST, ..., drawn by a network
    real_faces: str = ""              # CoTEX is scored on these: the same class folders, of photographs


@dataclass
class Synthetic:
    """How much synthetic data is drawn, and where. Only with data.synthetic; the paper has none."""
    root: str = "data/demo"           # folder that the data sets are written to
    seed: int = 0                     # another seed draws other people
    train_videos: int = 160           # training videos
    val_videos: int = 48              # validation videos, of other people
    frames: int = 84                  # typical length of a video, in frames
    faces: int = 4000                 # still faces over all static sets


@dataclass
class Vit:
    """The face model, a Vision Transformer (ViT)."""
    image_size: int = 224             # side of the square input, in pixels. silent: ViT-B/16's usual size
    patch: int = 16                   # side of a patch, in pixels (§3.1)
    dim: int = 768                    # width of a token: ViT-Base (§3.1)
    depth: int = 12                   # blocks: ViT-Base (§3.1)
    heads: int = 12                   # attention heads: ViT-Base (§3.1)
    mean: list[float] = list_of(0.485, 0.456, 0.406)     # of the images that it learned from, RGB in [0, 1].
    std: list[float] = list_of(0.229, 0.224, 0.225)      # silent: ImageNet's. Public weights: docs/weights.md


@dataclass
class Training:
    """What all trainings on images have. The values here are the ones that most of them share."""
    epochs: int = 10                  # passes over the images
    batch: int = 256                  # images per optimiser step, over all processes
    lr: float = 1e-4                  # peak learning rate, absolute
    betas: list[float] = list_of(0.9, 0.999)    # AdamW's; these are PyTorch's
    weight_decay: float = 0.05        # AdamW's, on matrices only
    warmup_epochs: float = 1.0        # epochs of linear warm-up, then cosine to 0
    smallest_crop: float = 0.6        # a random crop's smallest share of the image's area
    clip: float = 0.0                 # a gradient longer than this is shortened to it; 0 = never


@dataclass
class Pretrain(Training):
    """MAE pre-training (§3.1, §4.1.1). "MAE's" is the value of the original MAE's authors."""
    start: str = ""                   # "" = random; or a whole MAE, ours or a public one, to go on with
    decoder_dim: int = 512            # width of a token in the decoder. silent: MAE's
    decoder_depth: int = 8            # blocks of the decoder. silent: MAE's
    decoder_heads: int = 16           # attention heads of the decoder. silent: MAE's
    mask_ratio: float = 0.75          # share of the patches that are hidden (§3.1)
    norm_pix_loss: bool = False       # normalise the target within each patch; §3.1 compares plain pixels
    epochs: int = 500                 # §4.1.1
    batch: int = 1024                 # §4.1.1
    lr: float = 5e-4                  # §4.1.1
    betas: list[float] = list_of(0.9, 0.95)     # silent: MAE's, as are the next three
    weight_decay: float = 0.05
    warmup_epochs: float = 40.0
    smallest_crop: float = 0.2


@dataclass
class FineTuning(Training):
    """What a training that starts from a ViT has besides."""
    start: str = ""                   # "" = pretrain/last.pt, "none" = random, or a checkpoint, ours or MAE's
    layer_decay: float = 1.0          # a layer's learning rate, as a share of that of the layer above it
    drop_path: float = 0.0            # share of the samples that skip a branch of the last block (vit.py)


@dataclass
class Finetune(FineTuning):
    """Training the ViT on the expression labels of single frames of Aff-Wild2 (§3.1, §4.1.1). Batch and
    learning rate: §4.1.1; for the rest the paper is silent."""
    fold: int = 0                     # trained on this fold's training videos, as task.fold
    token: Literal["mean", "cls"] = "mean"      # a face's feature: mean of the patch tokens, or the cls token
    hidden: int = 512                 # width of the layer between feature and classes
    dropout: float = 0.1              # share that is dropped before the last layer
    every: int = 5                    # an epoch takes one frame in 5: neighbours look alike; 1 = all
    held_out: float = 0.0             # share of training scenes not used, to learn with few labels


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
class Stills(Training):
    """Training EMMA's CNN on AffectNet's expressions. Values of DAN's authors, but for the schedule (theirs:
    times 0.6 per epoch) and the augmentation (theirs: rotation, erasing)."""
    network: Literal["dan", "resnet18"] = "dan"      # dan: a ResNet-18 with attention behind it (cnn.py)
    start: str = ""                   # "" or "none" = random; or a ResNet-18, for the trunk of either
    width: int = 64                   # channels of the CNN's first stage; ResNet-18 has 64
    weight_decay: float = 0.0


@dataclass
class Emma(FineTuning):
    """EMMA, several tasks at once (emma.py). Its authors' values, but for what says "ours"."""
    cnn: str = ""                     # "" = stills/best.pt, "none" = no CNN, or a checkpoint, ours or DAN's
    weights: list[float] = list_of(1.0, 1.0, 1.0)    # of the losses of VA, Expr, AU; 0 = not trained
    epochs: int = 30
    batch: int = 400
    lr: float = 7.8e-4                # of the ViT and its head: 5e-4 times 400 / 256
    va_lr: float = 1e-4               # learning rate of the VA head, without schedule and weight decay
    warmup_epochs: float = 5.0
    layer_decay: float = 0.65
    drop_path: float = 0.1
    clip: float = 0.05
    smallest_crop: float = 0.9        # 224 of 232 pixels. ours


@dataclass
class Cotex(FineTuning):
    """Masked CoTEX, two views that learn from each other (cotex.py). Its authors' values, as in Emma."""
    views: int = 2                    # V: ViTs with weights of their own; 1 = a plain classifier
    mask_ratio: float = 0.75          # r: share of the patches that each view drops in training. ours
    js_weight: float = 16.7           # λ of the divergence between the views: 100 / 6
    epochs: int = 6
    batch: int = 1024
    lr: float = 5e-4
    warmup_epochs: float = 5.0
    layer_decay: float = 0.65
    drop_path: float = 0.1
    clip: float = 0.05
    smallest_crop: float = 0.965      # 224 of 228 pixels


@dataclass
class Run:
    """The run itself, of which the paper says nothing."""
    name: str = ""                    # results go to <out>/<name>/<stage>; "" = the configuration file's name
    out: str = "runs"                 # folder of all runs; with several machines, one they share
    seed: int = 0                     # all randomness follows from it
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"    # auto = CUDA where there is a GPU, else the CPU
    largest_piece: int = 128          # most images in a forward pass of a training; fits 24 GB with ViT-B
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
    stills: Stills = field(default_factory=Stills)
    emma: Emma = field(default_factory=Emma)
    cotex: Cotex = field(default_factory=Cotex)
    run: Run = field(default_factory=Run)

    # No settings: what --set has changed in the file, {"task.lr": 1e-4}, and what to type after --config.
    changed = {}
    words = ""


SECTIONS = {section.name: section.type for section in dataclasses.fields(Config)}
SETTINGS = {f"{name}.{setting.name}": setting
            for name, section in SECTIONS.items() for setting in dataclasses.fields(section)}
