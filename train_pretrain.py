"""Stage 1: MAE pre-training on still faces (paper §3.1, §4.1.1).

    python train_pretrain.py                                                   # the demo: drawn faces, a small ViT
    torchrun --nproc_per_node=2 train_pretrain.py --config configs/paper.yaml  # your face sets, ViT-B/16

Reads the sets named in the `data` section, any mix of them. Writes to runs/<config>/pretrain: last.pt (encoder and decoder
under the key `model`, with the reference MAE's names, and the optimiser's state), log.csv, reconstruction.png (original |
masked | reconstruction), metrics.json. Stop it and start it again at will; it goes on where it was.

log.csv, one row per epoch: `loss` mean squared error of the masked patches in normalised pixels; `gradient_norm` mean over
the steps; `lr` of the last step; `unreadable` images that could not be decoded and were left out; `seconds`.
"""

import contextlib
import dataclasses
import math
import time
from functools import partial

import numpy as np
import torch
from torch.utils.data import Dataset

import pictures
import synthetic
import training
from config import from_command_line
from faces import load_faces
from images import normalise, random_crop, resize
from losses import all_sum
from mae import MaskedAutoencoder

DEMO_SECONDS = 140     # measured by benchmark.py on two cores


class Faces(Dataset):
    """All face sets as one. Item: (uint8 image (size, size, 3), mask noise (N,)), or None if the image cannot be read."""

    def __init__(self, sets, size: int, tokens: int, seed: int, smallest_crop: float):
        self.sets, self.size, self.tokens, self.epoch = sets, (size, size), tokens, 0
        self.seed, self.smallest_crop = seed, smallest_crop
        self.ends = np.cumsum([len(s) for s in sets])

    def __len__(self):
        return int(self.ends[-1])

    def find(self, i):
        k = int(np.searchsorted(self.ends, i, side="right"))
        return self.sets[k], int(i - (self.ends[k - 1] if k else 0))

    def where(self, i) -> str:
        face_set, number = self.find(i)
        return face_set.where(number)

    def __getitem__(self, i):
        face_set, number = self.find(i)
        try:
            image = face_set.read(number)
        except ValueError as error:
            if self.epoch == 0:                              # once, not once per epoch
                print(f"  left out: {error}", flush=True)
            return None
        rng = training.generator(self.seed, self.epoch, i)
        return random_crop(image, self.size, rng, self.smallest_crop), rng.random(self.tokens, dtype=np.float32)

    def collate(self, items):
        """-> images (B, size, size, 3) uint8, noise (B, N), number of unreadable images; B may be 0."""
        good = [item for item in items if item is not None]
        images = np.stack([g[0] for g in good]) if good else np.zeros((0, *self.size, 3), np.uint8)
        noise = np.stack([g[1] for g in good]) if good else np.zeros((0, self.tokens), np.float32)
        return torch.from_numpy(images), torch.from_numpy(noise), len(items) - len(good)


def build(config) -> MaskedAutoencoder:
    """The MAE of a configuration, with random weights."""
    p = config.pretrain
    return MaskedAutoencoder(**dataclasses.asdict(config.encoder), decoder_dim=p.decoder_dim, decoder_depth=p.decoder_depth,
                             decoder_heads=p.decoder_heads, mask_ratio=p.mask_ratio, norm_pix_loss=p.norm_pix_loss)


def main(config, team):
    """Pre-train, or go on with it, until runs/<config>/pretrain is finished."""
    # configuration
    p, seed = config.pretrain, config.run.seed
    settings = training.settings_of(config, "data", "drawn", "encoder", "pretrain", "run.seed")
    run = training.RunFolder(config.folder("pretrain"), config, settings, team)
    if run.finished:
        return team.say(f"{run.folder} is finished; nothing to do")

    # data
    synthetic.provide(config, team)
    sets = load_faces(config.data)
    for s in sets:
        team.say(f"  {s.name:16s}{len(s):9,d} images" + "".join(f", {n:,} left out: {why}" for why, n in s.skipped.items()))
    torch.manual_seed(seed)
    model = build(config)
    tokens = math.prod(model.patch_embed.grid)
    faces = Faces(sets, config.encoder.image_size, tokens, seed, p.smallest_crop)

    # model and optimiser
    share, parameters = math.ceil(p.batch / team.world), sum(x.numel() for x in model.parameters())
    bytes_each = (training.vit_bytes(model.visible + 1, config.encoder.dim, config.encoder.depth)
                  + training.vit_bytes(tokens + 1, p.decoder_dim, p.decoder_depth))
    pieces = training.pieces(share, bytes_each, parameters, team.device)
    team.say(f"MAE of {parameters:,} parameters on {len(faces):,} faces, {p.epochs} epochs; "
             f"effective batch {p.batch} = {math.ceil(share / pieces)} x {pieces} accumulation x {team.world} processes, on {team.device}")
    ddp = team.parallel(model)
    optimizer = training.adamw(model, p.lr, p.betas, p.weight_decay)

    # resume
    at, last = {"epoch": 0, "step": 0, "loss": 0.0, "norm": 0.0, "unreadable": 0}, {}      # where the run is, and its sums over this epoch
    found = {s.name: len(s) for s in sets}
    if (saved := run.resume(found)) is not None:
        training.load_weights(model, saved["model"], run.folder)
        optimizer.load_state_dict(saved["optimizer"])
        at, last = saved["at"], saved["last"]
        team.say(f"going on from epoch {at['epoch'] + 1}, step {at['step']}")
    run.cut_log(at["epoch"] + 1)
    steps = math.ceil(len(faces) / p.batch)

    def state():
        return {"kind": "pretrain", "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                "last": last, "at": training.plain(at), "data": found}

    watch = training.Watch(run, config, steps * p.epochs, state, "images")

    # loop
    for epoch in range(at["epoch"], p.epochs):
        began = time.time()
        faces.epoch = epoch
        batches = training.Batches(len(faces), p.batch, seed, epoch, team, first=at["step"])
        for step, (images, noise, bad) in enumerate(training.loader(faces, batches, config, team), start=at["step"]):
            now = epoch * steps + step
            lr = training.set_learning_rate(optimizer, now, steps * p.epochs, p.warmup_epochs * steps, p.lr)
            counts = all_sum(torch.tensor([len(images), bad], dtype=torch.float32).to(team.device, non_blocking=True))
            optimizer.zero_grad(set_to_none=True)
            loss = 0.0
            for i, (x, u) in enumerate(zip(images.tensor_split(pieces), noise.tensor_split(pieces))):
                quiet = team.world > 1 and i < pieces - 1            # gradients cross the network once, with the last piece
                with ddp.no_sync() if quiet else contextlib.nullcontext():
                    x = normalise(x.to(team.device, non_blocking=True))
                    with team.autocast():
                        part, _, _ = ddp(x, u.to(team.device, non_blocking=True))
                    part = part * len(x) / counts[0].clamp(min=1)        # its share of the mean over the images of all processes
                    (part * team.world).backward()                       # DDP averages the gradients over the processes: make it a sum
                loss = loss + part.detach()
            loss = all_sum(loss)
            norm = torch.nn.utils.get_total_norm([q.grad for q in model.parameters() if q.grad is not None])
            optimizer.step()
            at = {"epoch": epoch, "step": step + 1, "loss": at["loss"] + loss, "norm": at["norm"] + norm.detach(),
                  "unreadable": at["unreadable"] + counts[1]}
            watch.step(loss, norm, partial(batches.describe, step, lr, faces.where), now + 1, p.batch)
        at = training.plain(at)
        run.log({"epoch": epoch + 1, "lr": optimizer.param_groups[0]["lr"], "loss": at["loss"] / steps,
                 "gradient_norm": at["norm"] / steps, "unreadable": int(at["unreadable"]), "seconds": round(time.time() - began, 2)})
        last = {"loss": at["loss"] / steps, "unreadable": int(at["unreadable"])}
        at = {"epoch": epoch + 1, "step": 0, "loss": 0.0, "norm": 0.0, "unreadable": 0}
        if (epoch + 1) % max(1, p.epochs // 10) == 0 or epoch + 1 == p.epochs:
            team.say(f"  epoch {epoch + 1}/{p.epochs}  loss {last['loss']:.4f}  (a grey image would score about 1)")
            if team.rank == 0:
                draw_reconstruction(model, faces, run.folder / "reconstruction.png")
        watch.epoch()
    watch.end()

    # finish
    run.finish({"images": len(faces), "epochs": p.epochs, **last})
    team.say(f"pre-training is finished: loss {last['loss']:.4f}, {last['unreadable']} unreadable images in the last epoch; "
             f"see {run.folder}/reconstruction.png")


@torch.no_grad()
def draw_reconstruction(model, faces, path, count: int = 8):
    """original | masked | reconstruction of a few faces, spread over all sets; the hidden patches are the model's."""
    chosen, shown = np.linspace(0, len(faces) - 1, 4 * count).astype(int), []
    for i in chosen:
        face_set, number = faces.find(i)
        try:
            shown.append(resize(face_set.read(number), faces.size))
        except ValueError:
            continue
    if not shown:
        return
    chosen = np.linspace(0, len(shown) - 1, min(count, len(shown))).astype(int)
    images = normalise(torch.from_numpy(np.stack([shown[i] for i in chosen]))).to(next(model.parameters()).device)
    noise = torch.from_numpy(training.generator(0).random((len(images), faces.tokens), dtype=np.float32)).to(images.device)
    model.eval()
    _, pred, mask = model(images, noise)
    model.train()
    pictures.reconstruction(images, model, pred.float(), mask, path)


if __name__ == "__main__":
    training.launch(main, from_command_line(__doc__)[0])
