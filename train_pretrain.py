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

import numpy as np
import torch

import pictures
from data import Images
from datasets.faces import joined, load_faces
from engine.checkpoints import load_vit
from engine.config import from_command_line
from engine.distributed import all_sum
from engine.training import adamw, clip_gradient, generator
from images import normalise
from mae import MaskedAutoencoder
from pipeline import find_input, open_run, start


def build(config) -> MaskedAutoencoder:
    """The MAE of a configuration, with random weights."""
    p = config.pretrain
    return MaskedAutoencoder(**dataclasses.asdict(config.vit), decoder_dim=p.decoder_dim,
                             decoder_depth=p.decoder_depth, decoder_heads=p.decoder_heads,
                             mask_ratio=p.mask_ratio, norm_pix_loss=p.norm_pix_loss)


def main(config, team):
    """Pre-train, or go on with it, until runs/<config>/pretrain is finished."""
    p, seed = config.pretrain, config.run.seed
    run = open_run("pretrain", config, team)

    # data
    sets = load_faces(config.data)
    found = {face_set.setting: face_set.fingerprint() for face_set in sets}
    if run.still_finished(found):
        return
    for face_set in sets:
        left_out = "".join(f", {count:,} left out: {why}" for why, count in face_set.skipped.items() if count)
        team.say(f"  {face_set.name:24s}{len(face_set):9,d} images{left_out}")

    # model and optimiser
    path, origin = find_input(config, team, "pretrain.start")
    torch.manual_seed(seed)
    model = build(config)
    said = load_vit(model, path) if p.start else "random weights"
    N = model.pos_embed.shape[1] - 1                         # patches, of which the noise chooses the visible
    faces = Images(joined(sets), config.vit.image_size, seed=seed, smallest=p.smallest_crop, noise=(N,))
    grey = model.own(sample(faces, 32)).square().mean().item()          # the loss of a picture in mean colour
    ddp = team.parallel(model)
    optimizer = adamw(model, p)
    run.begin(model, optimizer, faces, p, found, origin, cut=True)
    team.say(f"MAE of {sum(weights.numel() for weights in model.parameters()):,} parameters from {said}, on "
             f"{len(faces):,} faces, {p.epochs} epochs; {run.effective_batch()}")

    # loop
    for epoch in run.epochs():
        for images, noise in run.batches():
            optimizer.zero_grad(set_to_none=True)
            loss = torch.zeros((), device=team.device)
            for x, u in run.pieces(ddp, images, noise):
                with team.autocast():
                    mean, _, _ = ddp(normalise(x), u)
                part = all_sum(mean * len(x) / run.count)            # its share of the mean over the batch
                part.backward()
                loss += part.detach()
            norm = clip_gradient(model, p.clip)
            optimizer.step()
            run.end_step(loss, norm)
        if run.shown and team.rank == 0:
            draw_reconstruction(model, faces, run.folder / "reconstruction.png")
        run.end_epoch(f"(a plain grey picture: {grey:.4f})")
    run.end()

    # finish
    logged = pictures.read_log(run.folder / "log.csv")
    loss, unreadable = float(logged["loss"][-1]), int(logged["unreadable"][-1])
    if team.rank == 0:
        pictures.curves(run.folder, {"loss": grey})
    run.finish({"images": len(faces), "epochs": p.epochs, "loss": loss, "unreadable": unreadable})
    team.say(f"pre-training is finished: loss {loss:.4f}, {unreadable} unreadable images in the last epoch; "
             f"see {run.folder}/reconstruction.png")


def sample(faces: Images, count: int) -> torch.Tensor:
    """At most `count` readable faces, spread over all sets, whole and normalised: (B, 3, H, W)."""
    whole = Images(faces.files, faces.size[0])
    whole.epoch = 1                                                     # unreadable ones are named in epoch 0
    rows = np.linspace(0, len(whole) - 1, min(count, len(whole))).astype(int)
    return normalise(whole.collate([whole[i] for i in rows])[0])        # (B, H, W, 3) -> (B, 3, H, W)


@torch.no_grad()
def draw_reconstruction(model, faces: Images, path):
    """original | masked | reconstruction of up to 8 faces."""
    images = sample(faces, 8).to(model.pos_embed.device)
    if len(images):
        noise = torch.from_numpy(generator(0).random((len(images), *faces.noise), dtype=np.float32))
        model.eval()
        _, pred, mask = model(images, noise.to(images.device))
        model.train()
        pictures.reconstruction(images, model, pred.float(), mask, path)


if __name__ == "__main__":
    start("pretrain", main, from_command_line(__doc__)[0])
