"""What one sample costs, and how long a whole recipe takes at measured rates. For benchmark_device.py.

Costs are the matrix products of a model in floating-point operations, a multiplication and an addition being
two. What attention computes a second time for the backward pass does not count, so a kernel that does so
gains no share of the card's rate by it. tests/test_benchmark.py compares them with PyTorch's counter.

Letters: n tokens, D width, T frames, N patches, P patch side.
"""

import math
from dataclasses import dataclass

from labels import TASKS

# ---- Floating-point operations of one sample


def transformer(n: int, D: int, hidden: int, layers: int) -> int:
    """The blocks of a Transformer on n tokens. Per block four matrices D x D (q, k, v, projection), two
    D x hidden (MLP), and q kᵀ and weights · v of n x n."""
    return layers * (n * (8 * D * D + 4 * D * hidden) + 4 * n * n * D)


def patches(vit) -> tuple[int, int]:
    """N, and the cost of the patch embedding."""
    N = (vit.image_size // vit.patch) ** 2
    return N, 2 * N * 3 * vit.patch ** 2 * vit.dim


def vit_forward(vit) -> int:
    """One image through the whole ViT: the cost of its feature."""
    N, embedding = patches(vit)
    return embedding + transformer(N + 1, vit.dim, 4 * vit.dim, vit.depth)


def mae_step(config) -> int:
    """One image in a step of pre-training. ViT-B/16 at 224 and 75 % hidden: 58.5 GFLOP.

    A backward pass costs two forward passes, one for the weights and one for the layer's input; the patch
    embedding's input is the image, which needs no gradient.
    """
    vit, p = config.vit, config.pretrain
    N, embedding = patches(vit)
    visible = int(N * (1 - p.mask_ratio))
    encoder = transformer(visible + 1, vit.dim, 4 * vit.dim, vit.depth)
    between = 2 * (visible + 1) * vit.dim * p.decoder_dim
    decoder = transformer(N + 1, p.decoder_dim, 4 * p.decoder_dim, p.decoder_depth)
    pixels = 2 * (N + 1) * p.decoder_dim * 3 * vit.patch ** 2
    return 3 * (encoder + between + decoder + pixels) + 2 * embedding


def finetune_step(config) -> int:
    """One image in a step of fine-tuning."""
    vit, hidden = config.vit, config.finetune.hidden
    head = 2 * hidden * (vit.dim + len(TASKS["expr"].outputs))
    return 3 * (vit_forward(vit) + head) - patches(vit)[1]


def cotex_step(config, classes: int) -> int:
    """One image in a step of masked CoTEX: each view sees its share of the patches."""
    vit, c = config.vit, config.cotex
    N, embedding = patches(vit)
    kept = int(N * (1 - c.mask_ratio))
    view = transformer(kept + 1, vit.dim, 4 * vit.dim, vit.depth) + 2 * vit.dim * classes
    return c.views * (3 * view + 2 * embedding)


def segment_forward(config, outputs: int) -> tuple[int, int]:
    """One segment through the segment model, and how much of that is what its first layers do to the
    features."""
    t, T, dim = config.temporal, config.segments.window, config.vit.dim
    total, first = 0, 0
    if t.tcn:
        widths = [dim, *t.channels]
        for level, kernel in enumerate(t.kernels):
            a, b = widths[level], widths[level + 1]
            shortcut = 2 * T * a * b if a != b else 0
            total += 2 * T * kernel * (a * b + b * b) + shortcut
            if level == 0:
                first = 2 * T * kernel * a * b + shortcut
        dim = t.channels[-1]
    if t.transformer:
        project = 2 * T * dim * t.width
        total += project + transformer(T, t.width, t.hidden, t.layers)
        first, dim = first or project, t.width
    head = 2 * T * t.head * (dim + outputs)
    return total + head, first or 2 * T * t.head * dim


def segment_step(config, outputs: int) -> int:
    """One segment in a step of a task's training. Features need no gradient."""
    forward, first = segment_forward(config, outputs)
    return 3 * forward - first


# ---- A whole recipe

@dataclass(frozen=True)
class Counts:
    """How much there is of everything. `tasks`: training segments, validation frames of each task."""
    faces: int                      # still faces, for pre-training
    expr_frames: int                # training frames with an expression and a face
    expr_val_frames: int
    frames: int                     # of all videos, to be extracted
    tasks: dict[str, tuple[int, int]]


# docs/data.md's. Faces: AffectNet's two lists, at most, as the No-Face rows are in it; FER2013. RAF-DB, whose
# count docs/data.md does not give, is left out. Frames: the VA task's videos with those of its test set.
# Segments: at least, as a video's last one is seldom full.
PAPER = Counts(faces=420_000 + 35_887, expr_frames=585_317, expr_val_frames=280_532,
               frames=1_653_900 + 376_330 + 927_210,
               tasks={"va": (1_653_900 // 200, 376_330), "expr": (585_317 // 200, 280_532),
                      "au": (1_356_694 // 200, 445_836)})
# What the stages of the demo print.
DEMO = Counts(faces=3_942, expr_frames=10_444, expr_val_frames=3_392, frames=19_817,
              tasks={"va": (191, 3_844), "expr": (194, 3_766), "au": (220, 4_061)})


@dataclass(frozen=True)
class Rates:
    """What was measured, a second. `stills`, `crops`: decoded and cropped by all cores. None: not measured,
    or out of memory."""
    pretrain: float | None          # images
    finetune: float | None          # images
    extract: float | None           # frames, read and computed
    segments: float | None          # segments
    videos: float | None            # frames of whole videos
    stills: float | None            # still faces, read
    crops: float | None             # crops of video frames, read


@dataclass(frozen=True)
class Part:
    """A row of the recipe: `samples` at `rate` a second, which is what `bound_by` can do."""
    stage: str
    unit: str
    samples: int
    rate: float | None
    bound_by: str

    @property
    def seconds(self) -> float | None:
        return None if self.rate is None else self.samples / self.rate


def slower(computing, reading) -> tuple[float | None, str]:
    """Reading runs beside computing, so a stage goes as fast as the slower of the two."""
    if computing is None or reading is None:
        return None, "not measured"
    return (computing, "computing") if computing <= reading else (reading, "reading images")


def recipe(config, counts: Counts, rates: Rates) -> list[Part]:
    """Every stage of a configuration, on one device. Left out: writing checkpoints, and the start of each
    stage and epoch."""
    p, f = config.pretrain, config.finetune
    validation = f.epochs * math.ceil(counts.expr_val_frames / f.every) + counts.expr_val_frames
    parts = [Part(f"pre-training, {p.epochs} epochs", "images", p.epochs * counts.faces,
                  *slower(rates.pretrain, rates.stills)),
             Part(f"fine-tuning, {f.epochs} epochs, one frame in {f.every}", "images",
                  f.epochs * math.ceil(counts.expr_frames / f.every), *slower(rates.finetune, rates.crops)),
             Part("fine-tuning's validation", "images", validation, rates.extract, "reading and computing"),
             Part("extraction", "frames", counts.frames, rates.extract, "reading and computing")]
    for name, (segments, val_frames) in counts.tasks.items():
        epochs = config.task.epochs or TASKS[name].epochs
        parts += [Part(f"{name}, {epochs} epochs", "segments", epochs * segments, rates.segments,
                       "computing"),
                  Part(f"{name}'s validation", "frames", (epochs + 1) * val_frames, rates.videos,
                       "computing")]
    return parts
