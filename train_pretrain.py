"""Stage 1: MAE pre-training on still faces (paper §3.1, §4.1.1).

    python train_pretrain.py                                          # the demo: synthetic faces, a small ViT
    torchrun --nproc_per_node=2 train_pretrain.py --config my.yaml    # your face sets, ViT-B/16

Reads the sets named in the `data` section, any mix of them. Writes to runs/<config>/pretrain: last.pt
(encoder and decoder under the key `model`, with the reference MAE's names, and the optimiser's state),
log.csv, curves.png, reconstruction.png (original | masked | reconstruction), metrics.json. Stop it and
start it again at will; it goes on where it was.

log.csv, one row per epoch: `loss` mean squared error of the masked patches in normalised pixels;
`gradient_norm` mean over the steps; `unreadable` images that could not be decoded and were left out; `lr`
of the last step; `seconds`.
"""

import dataclasses
import math

import numpy as np
import torch

import pictures
from config import from_command_line
from distributed import all_sum
from faces import load_faces
from images import FaceImages, normalise, random_crop, resize
from mae import MaskedAutoencoder
from made_of import settings_of
from run import Run
from training import (adamw, effective_batch, generator, gradient_norm, in_pieces, pieces, set_learning_rate,
                      vit_bytes)


SETS = ("data.affectnet_2017", "data.affectnet_2021", "data.raf_db", "data.fer2013", "data.ferplus",
        "data.folders", "data.affectnet_crop")


class Faces(FaceImages):
    """All face sets as one. Item: uint8 image (size, size, 3), randomly cropped, and its mask noise (N,)."""

    def __init__(self, sets, size: int, tokens: int, seed: int, smallest_crop: float):
        super().__init__(size, torch.zeros(0, tokens))
        self.sets, self.tokens, self.epoch = sets, tokens, 0
        self.seed, self.smallest_crop = seed, smallest_crop
        self.ends = np.cumsum([len(face_set) for face_set in sets])    # where each set ends in one long list

    def __len__(self):
        return int(self.ends[-1])

    def find(self, i):
        """Sample i as (its set, its number in the set)."""
        which = int(np.searchsorted(self.ends, i, side="right"))
        return self.sets[which], int(i - self.ends[which] + len(self.sets[which]))

    def where(self, i) -> str:
        face_set, number = self.find(i)
        return face_set.where(number)

    def item(self, i):
        face_set, number = self.find(i)
        rng = generator(self.seed, self.epoch, i)
        image = random_crop(face_set.read(number), self.size, rng, self.smallest_crop)
        return image, rng.random(self.tokens, dtype=np.float32)


def build(config) -> MaskedAutoencoder:
    """The MAE of a configuration, with random weights."""
    p = config.pretrain
    return MaskedAutoencoder(**dataclasses.asdict(config.vit), decoder_dim=p.decoder_dim,
                             decoder_depth=p.decoder_depth, decoder_heads=p.decoder_heads,
                             mask_ratio=p.mask_ratio, norm_pix_loss=p.norm_pix_loss)


def main(config, team):
    """Pre-train, or go on with it, until runs/<config>/pretrain is finished."""
    # configuration
    p, seed = config.pretrain, config.run.seed
    settings = settings_of(config, *SETS, "synthetic", "vit", "pretrain", "run.seed")
    run = Run("pretrain", config, team, settings)

    # data
    sets = load_faces(config.data)
    found = {s.setting: s.fingerprint() for s in sets}
    if run.still_finished(found):
        return
    for s in sets:
        left_out = "".join(f", {count:,} left out: {reason}" for reason, count in s.skipped.items() if count)
        team.say(f"  {s.name:24s}{len(s):9,d} images{left_out}")

    # model and optimiser
    torch.manual_seed(seed)
    model = build(config)
    tokens = math.prod(model.patch_embed.grid)
    faces = Faces(sets, config.vit.image_size, tokens, seed, p.smallest_crop)
    grey = sample(faces, 32).square().mean().item()      # the loss of a picture in ImageNet's mean colour
    parameters = sum(parameter.numel() for parameter in model.parameters())
    encoder_bytes = vit_bytes(model.visible + 1, config.vit.dim, config.vit.depth)      # sees visible patches
    decoder_bytes = vit_bytes(tokens + 1, p.decoder_dim, p.decoder_depth)               # sees all patches
    share = math.ceil(p.batch / team.world)
    count = pieces(share, encoder_bytes + decoder_bytes, parameters, team.device, config.run.largest_piece)
    team.say(f"MAE of {parameters:,} parameters on {len(faces):,} faces, {p.epochs} epochs; "
             f"{effective_batch(p.batch, count, team)}")
    ddp = team.parallel(model, config.run.compile)
    optimizer = adamw(model, p.lr, p.betas, p.weight_decay)
    run.begin(model, optimizer, faces, p.batch, p.epochs, found, origin=None)

    # loop
    for epoch in range(run.epoch, p.epochs):
        faces.epoch = epoch
        for step, (images, noise, problems) in run.batches():
            set_learning_rate(optimizer, step, run.steps * p.epochs, p.warmup_epochs * run.steps, p.lr)
            readable, unreadable = run.count_readable(images, problems)
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=team.device)
            for x, u in in_pieces(ddp, count, images, noise):
                x, u = x.to(team.device, non_blocking=True), u.to(team.device, non_blocking=True)
                with team.autocast():
                    mean, _, _ = ddp(normalise(x), u)
                part = mean * len(x) / max(readable, 1)          # its share of the mean over the whole batch
                part.backward()
                loss += part.detach()
            loss = all_sum(loss)
            norm = gradient_norm(model)
            optimizer.step()
            run.end_step(loss, norm, unreadable=unreadable)
        if run.shown:
            draw_reconstruction(model, faces, team, run.folder / "reconstruction.png")
        run.end_epoch(f"(a plain grey picture: {grey:.4f})")
    run.end()

    # finish
    loss, unreadable = run.last_row("loss"), int(run.last_row("unreadable"))
    run.finish({"images": len(faces), "epochs": p.epochs, "loss": loss, "unreadable": unreadable},
               chance={"loss": grey})
    team.say(f"pre-training is finished: loss {loss:.4f}, {unreadable} unreadable images in the last epoch; "
             f"see {run.folder}/reconstruction.png")


def sample(faces, count: int) -> torch.Tensor:
    """At most `count` readable faces, spread over all sets, whole and normalised: (B, 3, H, W)."""
    shown = []
    for i in np.linspace(0, len(faces) - 1, 4 * count).astype(int):     # more, as some may be unreadable
        face_set, number = faces.find(i)
        try:
            shown.append(resize(face_set.read(number), faces.size))
        except ValueError:
            continue
    chosen = np.linspace(0, len(shown) - 1, min(count, len(shown))).astype(int)
    images = np.stack([shown[i] for i in chosen]) if shown else np.zeros((0, *faces.size, 3), np.uint8)
    return normalise(torch.from_numpy(images))                          # (B, H, W, 3) -> (B, 3, H, W)


@torch.no_grad()
def draw_reconstruction(model, faces, team, path, count: int = 8):
    """original | masked | reconstruction of a few faces. Rank 0 only."""
    images = sample(faces, count) if team.rank == 0 else []
    if not len(images):
        return
    noise = torch.from_numpy(generator(0).random((len(images), faces.tokens), dtype=np.float32))
    images, noise = images.to(team.device), noise.to(team.device)
    model.eval()
    _, pred, mask = model(images, noise)
    model.train()
    pictures.reconstruction(images, model, pred.float(), mask, path)


if __name__ == "__main__":
    import pipeline
    pipeline.run("train_pretrain", from_command_line(__doc__)[0])
