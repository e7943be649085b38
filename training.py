"""What every training script shares: processes, randomness, learning rate, checkpoints, run folder, log, and how a run ends.

No Trainer: each script keeps its loop in full view and calls these. Three rules make a run exact and restartable:

* **Processes.** A batch is split over processes, losses and metrics are functions of sums over all of them (losses.py,
  evaluate.py), so two processes train and score as one would. Rank 0 alone writes; one run folder, shared by all machines.
* **Randomness.** Nothing random is ever saved, because everything random is a function of numbers that are known anyway:
  the order of an epoch of (seed, epoch); the crop, the flip and the MAE mask of a sample of (seed, epoch, sample index);
  dropout of (seed, epoch, step, rank). Step 700 is the same whether a run reached it in one go or after three crashes.
* **Checkpoints.** Written under a temporary name, flushed to disk, renamed; the one before is kept. A file is a zip archive
  with a checksum for each entry, so a truncated or damaged one is found before it is used.
"""

import argparse
import contextlib
import dataclasses
import errno
import fcntl
import gc
import json
import math
import multiprocessing
import os
import signal
import sys
import time
import uuid
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.distributed as dist

from config import as_yaml

STOP = (signal.SIGTERM, signal.SIGINT)       # what tells a run to save and end


# ---------------------------------------------------------------------------------------------------------- processes

@dataclasses.dataclass(frozen=True)
class Team:
    """The processes of this run: one under `python`, several under `torchrun`. Collectives here run on the CPU (gloo)."""
    rank: int
    world: int
    device: torch.device

    def say(self, text=""):
        """Print once, not once per process."""
        if self.rank == 0:
            print(text, flush=True)

    def sum(self, values) -> np.ndarray:
        """The sum over processes of an array, in float64. Every process gets the same."""
        total = torch.as_tensor(np.asarray(values, dtype=np.float64)).clone()
        if self.world > 1:
            dist.all_reduce(total)
        return total.numpy()

    def agree(self, value):
        """Rank 0's value on every process: for decisions that depend on what lies on disk."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def wait(self):
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def autocast(self):
        """bf16 on a GPU, float32 on the CPU. bf16 has float32's range, so no loss scaling is needed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")

    def parallel(self, model):
        """The model under DDP, which averages gradients over processes; the model itself in a single process."""
        model = model.to(self.device)
        if self.world == 1:
            return model
        ddp = torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)
        if self.world > 2 and self.device.type == "cpu":
            ddp.register_comm_hook(self.world, _one_by_one)
        return ddp


def _one_by_one(world: int, bucket):
    """For DDP: average each gradient of a bucket by itself.

    gloo adds up three or more processes in an order that depends on the place in what is sent together, and DDP rearranges that
    after its first step: a run that starts again would differ from an undisturbed one in the last bits.
    """
    sums = [dist.all_reduce(gradient.div_(world), async_op=True).get_future() for gradient in bucket.gradients()]
    return torch.futures.collect_all(sums).then(lambda done: bucket.buffer())


def start() -> Team:
    """Join the processes that torchrun started, or be the only one. gloo on the CPU; NCCL for what lies on GPUs."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", store=_fresh_store(), rank=rank, world_size=world)
    return Team(rank, world, device)


def _fresh_store():
    """The store by which processes find each other, without what processes before a restart have left there.

    torchrun keeps one store over all restarts, and PyTorch puts the same keys into it each time: a restarted process reads the
    address of a dead one, fails or waits for ever. So rank 0 draws a new prefix and hands it to each process that asks under a
    name of its own. A question of a dead process may be answered too; rank 0 goes on until the living one has thanked for it.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    if rank == 0:
        prefix = uuid.uuid4().hex
        for other in range(1, world):
            while not store.check([f"{prefix}/thanks/{other}"]):
                store.set("answer/" + store.get(f"question/{other}").decode(), prefix)
                time.sleep(0.01)
    else:
        name = uuid.uuid4().hex
        store.set(f"question/{rank}", name)
        prefix = store.get(f"answer/{name}").decode()
        store.set(f"{prefix}/thanks/{rank}", "")
    return dist.PrefixStore(prefix, store)


def launch(stage, config, *arguments):
    """Run `stage(config, team, *arguments)`. Exit code 2 and one line for a refusal, 1 and one line when another process has died."""
    team = start()
    try:
        stage(config, team, *arguments)
    except (ValueError, OSError) as error:
        if team.rank:
            time.sleep(2)      # the same refusal on every process is printed once: torchrun ends the others before they wake
        full = isinstance(error, OSError) and error.errno == errno.ENOSPC
        print(f"error: {error}" + ("; free some space and start the same command again, the last checkpoint is intact" if full else ""),
              file=sys.stderr, flush=True)
        sys.exit(2)
    except RuntimeError as error:
        if "by peer" not in str(error):                      # gloo: "Connection closed by peer"
            raise
        sys.exit("error: another process of this run has ended; see its message or exit code")
    finally:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)        # else a DataLoader raises in whatever runs when its worker dies
        for worker in multiprocessing.active_children():     # after an error; they are deaf to the SIGTERM that Python would send
            worker.kill()
        if dist.is_initialized():
            # A DDP model that outlives its process group now and then aborts the process at exit ("terminate called without an
            # active exception"): models and loops refer to each other, so collect them first.
            gc.collect()
            dist.destroy_process_group()


def provide(config, team, missing, make, command, seconds):
    """An input of a stage: there already, made now by the stage before it (with drawn data), or an error that says how.

    `missing` names the file looked for, or is "" if it is there; `make(config, team)` makes it, `command` does only that;
    `seconds` is how long the demo takes for it on two cores.
    """
    missing = team.agree(str(missing))
    if not missing:
        return
    command = f"{command} --config {config.run.source}"
    if not config.data.drawn:
        raise ValueError(f"{missing} not found; make it with: {command}")
    team.say(f"\n{missing} is missing, so it is made first. The demo takes about {seconds} s for that on two cores. "
             f"Only this step: {command}")
    began = time.time()
    make(config, team)
    team.say(f"made in {time.time() - began:.0f} s\n")


# --------------------------------------------------------------------------------------------- randomness and batches

def generator(*numbers) -> np.random.Generator:
    """Random numbers that depend on nothing but `numbers`, in practice (seed, epoch, sample index)."""
    return np.random.default_rng([len(numbers), *numbers])       # the length too: NumPy takes (3, 4) and (3, 4, 0) for the same


def seed_dropout(seed, epoch, step, rank):
    """Dropout draws from PyTorch's global generators: set them anew at each step."""
    torch.manual_seed(int(np.random.SeedSequence([seed, epoch, step, rank]).generate_state(1, np.uint64)[0] >> 1))


class Batches(torch.utils.data.Sampler):
    """This process's share of each batch of an epoch, from step `first` on: for DataLoader's `batch_sampler`.

    Every sample once per epoch, for any number of processes; the last batch may be short, and a share may be empty.
    PyTorch's DistributedSampler repeats or drops samples to make the shares even, which changes the loss and the result.
    """

    def __init__(self, samples: int, batch: int, seed: int, epoch: int, team: Team, first: int = 0):
        self.samples, self.batch, self.team, self.epoch, self.first = samples, batch, team, epoch, first
        self.order = generator(seed, epoch).permutation(samples)

    def __len__(self):
        return math.ceil(self.samples / self.batch) - self.first

    def share(self, step: int) -> list[int]:
        return self.order[step * self.batch:(step + 1) * self.batch][self.team.rank::self.team.world].tolist()

    def describe(self, step: int, lr: float, where) -> str:
        """For the report of a failed step: where the run was, and the names `where(i)` of the samples."""
        share = self.share(step)
        return (f"epoch {self.epoch + 1}, step {step + 1}, learning rate {lr:.2e}; this process's batch: "
                f"{', '.join(where(i) for i in share[:8])}" + (f" and {len(share) - 8} more" if len(share) > 8 else ""))

    def __iter__(self):
        return (self.share(step) for step in range(self.first, self.first + len(self)))


def loader(dataset, batches, config, team: Team):
    """PyTorch's DataLoader, started: it goes over `batches` (lists of indices), each put together by `dataset.collate`."""
    ready = torch.utils.data.DataLoader(dataset, batch_sampler=batches, num_workers=config.run.workers, collate_fn=dataset.collate,
                                        pin_memory=team.device.type == "cuda")
    # A scheduler sends SIGTERM, and a terminal Ctrl-C, to the workers too, and the training still needs them for its last step.
    # What is blocked here stays blocked in them; this process gets it after `finally`.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOP)
    try:
        return iter(ready)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP)


def pieces(share: int, bytes_each: float, parameters: int, device) -> int:
    """Into how many pieces a process cuts its share of a batch so that it fits: gradient accumulation, derived not set.

    `bytes_each`: activations of one sample at 32 bits (half of that under bf16). Held besides: weights, gradients and AdamW's
    two moments, 16 bytes a parameter. On the CPU half a gigabyte is used, so that a demo fits beside other programs.
    """
    if device.type == "cuda":
        room, bytes_each = 0.8 * torch.cuda.get_device_properties(device).total_memory - 16 * parameters, bytes_each / 2
    else:
        room = 0.5e9
    return math.ceil(share / max(1, min(share, int(room / bytes_each))))


def vit_bytes(tokens: int, dim: int, depth: int) -> float:
    """Activations that a ViT keeps for the backward pass of one image, in bytes at 32 bits.

    Per token and block about 17 numbers of width D: two norms in and out, q, k, v, attention out, projection, the MLP's
    hidden layer before and after GELU (4 D each), and the two residual sums.
    """
    return 4 * 17 * tokens * dim * depth


def learning_rate(progress: float, warmup: float, peak: float) -> float:
    """Linear warm-up to `peak`, then half a cosine to 0. `progress` and `warmup` are shares of the whole run in [0, 1].

    A function of the step alone, so a resumed run has nothing to restore.
    """
    if progress < warmup:
        return peak * progress / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (progress - warmup) / max(1 - warmup, 1e-12)))


def plain(sums: dict) -> dict:
    """Tensors as Python numbers: for a checkpoint or the log. Waits for the device."""
    return {name: value.item() if torch.is_tensor(value) else value for name, value in sums.items()}


def set_learning_rate(optimizer, step: int, steps: int, warmup_steps: float, peak: float) -> float:
    """Set and return the learning rate of step `step` of `steps`, counted from 0."""
    lr = learning_rate((step + 1) / (steps + 1), min(warmup_steps, steps) / (steps + 1), peak)
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def adamw(model, lr, betas, weight_decay):
    """AdamW with weight decay on matrices only: biases, norms and tokens (one-dimensional in effect) are left alone."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.squeeze().ndim > 1]
    rest = [p for p in trained if p.squeeze().ndim <= 1]
    return torch.optim.AdamW([{"params": matrices, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}],
                             lr=lr, betas=tuple(betas))


# -------------------------------------------------------------------------------------------------------- checkpoints

def write_file(path, write):
    """Whole or not at all: `write(file)` fills a temporary file, which is flushed to disk and renamed to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Short, because `path` may already have the longest name allowed; with the rank, because two machines may share a pid.
    temporary = path.parent / f".{os.environ.get('RANK', 0)}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except RuntimeError as error:        # torch.save hides the system's error, such as a full disk, behind one of its own
        hidden = error
        while hidden is not None and not isinstance(hidden, OSError):
            hidden = hidden.__context__
        raise (hidden or error) from None
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path, text: str):
    """Text as UTF-8, whole or not at all."""
    write_file(path, lambda file: file.write(text.encode()))


def write_array(path, array: np.ndarray):
    """A .npy file, whole or not at all."""
    # Given the file itself, NumPy hides the system's error, such as a full disk, behind one of its own.
    write_file(path, lambda file: np.save(SimpleNamespace(write=file.write), array))


def checksum(path) -> int:
    """CRC-32 of a file, read in pieces. Raises ValueError if it cannot be read."""
    crc = 0
    try:
        with open(path, "rb") as file:
            while piece := file.read(1 << 22):
                crc = zlib.crc32(piece, crc)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    return crc


def read_checkpoint(path) -> dict:
    """A checkpoint as written by `torch.save`, tensors on the CPU.

    Raises ValueError naming the file if it is missing, truncated, damaged (each entry's checksum is compared), or holds
    anything but tensors and plain values: a pickle can run any program when it is loaded, so `weights_only=True` refuses it.
    """
    damaged = None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                # Also two flags that no checksum covers and that PyTorch would obey: "compressed" and "a folder".
                flagged = (entry.filename for entry in archive.infolist() if entry.compress_type or entry.external_attr & 16)
                damaged = archive.testzip() or next(flagged, None)
        if not damaged:
            with torch.serialization.safe_globals([argparse.Namespace]):     # the reference MAE saves its arguments as one
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such checkpoint") from None
    except Exception as error:            # a foreign file is unpickled as far as it goes, and that can raise anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path}: not a whole, plain checkpoint ({reason})") from None
    if damaged:
        raise ValueError(f"{path}: damaged (wrong checksum in {damaged}); use another copy")
    if not isinstance(checkpoint, dict):
        raise ValueError(f"{path}: expected a dictionary of tensors, found {type(checkpoint).__name__}")
    return checkpoint


def load_weights(model, weights: dict, source, may_miss=(), may_ignore=()):
    """Load by name. `may_miss` / `may_ignore`: prefixes of names that may be absent from, or unused in, `weights`.

    Returns (missing, ignored) names. Raises ValueError listing every other missing or unexpected name and every shape that differs.
    """
    if not isinstance(weights, dict) or not all(isinstance(k, str) and torch.is_tensor(v) for k, v in weights.items()):
        raise ValueError(f"{source}: holds no weights; expected a dictionary of names and tensors")
    own = model.state_dict()
    wrong = [f"{k}: file {tuple(weights[k].shape)}, model {tuple(own[k].shape)}" for k in own
             if k in weights and weights[k].shape != own[k].shape]
    missing, ignored = [k for k in own if k not in weights], [k for k in weights if k not in own]
    wrong += [f"{k}: missing in the file" for k in missing if not k.startswith(tuple(may_miss))]
    wrong += [f"{k}: not in the model" for k in ignored if not k.startswith(tuple(may_ignore))]
    if wrong:
        more = f"\n  ... and {len(wrong) - 12} more" if len(wrong) > 12 else ""
        raise ValueError(f"{source}: a checkpoint of another architecture, {len(wrong)} of {len(own)} entries differ; "
                         "use the configuration it was made with\n  " + "\n  ".join(wrong[:12]) + more)
    model.load_state_dict({k: v for k, v in weights.items() if k in own}, strict=False)
    return missing, ignored


# --------------------------------------------------------------------------------------------------------- run folder

class RunFolder:
    """runs/<config name>/<stage>: config.yaml, log.csv, last.pt and previous.pt, best.pt, metrics.json.

    `settings`: what the stage's result depends on. A folder made with other settings is refused and the differing fields are
    named; a folder in use by another run is refused; a finished one is left as it is (`finished`).
    """

    def __init__(self, folder, config, settings: dict, team: Team):
        self.folder, self.team, self.damaged = Path(folder), team, False
        problem = ""
        if team.rank == 0:
            try:
                self._open(config, settings)
            except (ValueError, OSError) as error:
                problem = str(error)
        if problem := team.agree(problem):
            raise ValueError(problem)
        self.finished = team.agree((self.folder / "metrics.json").exists())

    def _open(self, config, settings):
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = open(self.folder / ".lock", "w")
        except OSError as error:
            raise ValueError(f"{self.folder}: cannot be written ({error.strerror}); choose another place with --set run.out=...") from None
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)   # the system lets go of it however the process ends
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise ValueError(f"{self.folder}: cannot be locked ({error.strerror}), so a second run could write here too; "
                                 "choose another place with --set run.out=...") from None
            raise ValueError(f"{self.folder}: another run is writing here; wait for it, or choose another --set run.name=...") from None
        for leftover in self.folder.glob(".*.tmp*"):
            leftover.unlink()                                # half-written files of a killed run
        settings = {name: json.loads(json.dumps(value)) for name, value in settings.items()}
        known = self.folder / "settings.json"
        if known.exists():
            before = json.loads(known.read_text())
            changed = [f"{k}: was {before.get(k)!r}, now {settings.get(k)!r}" for k in sorted(before.keys() | settings.keys())
                       if before.get(k) != settings.get(k)]
            if changed:
                raise ValueError(f"{self.folder} was made with other settings; choose another --set run.name=..., or delete it\n  "
                                 + "\n  ".join(changed))
        if not (self.folder / "metrics.json").exists():      # a finished run is left as it is
            write_text(known, json.dumps(settings, indent=1))
            write_text(self.folder / "config.yaml", as_yaml(config))

    def log(self, row: dict):
        """Add one row to log.csv, whole or not at all. The first row fixes the columns."""
        if self.team.rank == 0:
            path = self.folder / "log.csv"
            text = path.read_text() if path.exists() else ",".join(row) + "\n"
            write_text(path, text + ",".join(f"{v:.6g}" if isinstance(v, float) else str(v) for v in row.values()) + "\n")

    def cut_log(self, epoch: int):
        """Drop the rows from `epoch` on (counted from 1): a resumed run writes them again."""
        path = self.folder / "log.csv"
        if self.team.rank == 0 and path.exists():
            header, *rows = path.read_text().splitlines()
            write_text(path, "".join(f"{r}\n" for r in [header, *(r for r in rows if int(r.split(",")[0]) < epoch)]))

    def save(self, name: str, state: dict):
        """Write `name`, whole or not at all; for last.pt the one before is kept as previous.pt. Rank 0 only."""
        if self.team.rank == 0:
            path = self.folder / name
            write_file(self.folder / "new.pt", lambda file: torch.save(state, file))
            if name == "last.pt" and path.exists() and not self.damaged:
                os.replace(path, self.folder / "previous.pt")
            os.replace(self.folder / "new.pt", path)
            self.damaged = self.damaged and name != "last.pt"

    def resume(self, data: dict) -> dict | None:
        """The last whole checkpoint; None before the first. A damaged one is named and the one before it used.

        `data`: what there is to train on, in numbers; a checkpoint holds the same under the key `data`.
        Raises ValueError if all checkpoints are damaged (someone should know before weeks of work begin again), and if `data`
        has changed since or is not what rank 0 found, as when a disk is not mounted: the run would go on with what is left.
        """
        if (first := self.team.agree(data)) != data:
            raise ValueError(f"this machine has other data than the first one: {data}, there {first}")
        for path in (self.folder / "last.pt", self.folder / "previous.pt"):
            if self.team.agree(path.exists()):
                checkpoint, problem = None, ""
                try:
                    checkpoint = read_checkpoint(path)
                except ValueError as error:
                    problem = str(error)
                if not self.team.sum([problem != ""])[0]:            # every process could read it
                    if checkpoint.get("data", {}) != data:
                        raise ValueError(f"{self.folder}: began with {checkpoint.get('data', {})}, found now {data}; "
                                         "bring back what it began with, or choose another --set run.name=..., or delete the folder")
                    return checkpoint
                self.team.say(f"warning: {problem or f'{path}: not every process can read it'}; trying the one before")
                self.damaged = True                      # not worth keeping as previous.pt
        if self.damaged:
            raise ValueError(f"{self.folder}: no checkpoint here is whole; put a copy in its place, or delete the folder to start from the beginning")
        return None

    def finish(self, metrics: dict):
        """Write metrics.json, which marks the run as finished, before any process goes on to the next stage."""
        if self.team.rank == 0:
            write_text(self.folder / "metrics.json", json.dumps(metrics, indent=1))
        self.team.wait()


def settings_of(config, *sections, without=()) -> dict:
    """{"task.lr": 3e-5, ...} of whole sections or single "section.field" names: what a stage's result depends on."""
    flat = {f"{s}.{k}": v for s, fields in dataclasses.asdict(config).items() for k, v in fields.items()}
    return {k: v for k, v in flat.items() if (k.split(".")[0] in sections or k in sections) and k not in without}


# ------------------------------------------------------------------------------------------------------------- a run

def clock(seconds: float) -> str:
    """h:mm:ss"""
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"


class Watch:
    """What surrounds the steps of a run: progress line, checkpoints, signals, and a halt when the loss is no longer finite.

    Call `step` after every optimiser step. `state()` must return what a checkpoint holds at that moment.
    """

    def __init__(self, run: RunFolder, config, steps: int, state, unit: str):
        self.run, self.team, self.steps, self.state, self.unit = run, run.team, steps, state, unit
        self.every = 60 * config.run.checkpoint_minutes
        self.began = self.saved = self.printed = time.time()
        self.done = self.count = self.signal = self.cost = 0
        self.resting = False                             # between two steps, while no process waits for another
        self.before = None                               # (loss and gradient norm, when they arrive, description) of the step before
        self.pending = None                              # signal flags on their way between the processes
        for number in STOP:
            signal.signal(number, self._signalled)

    def _signalled(self, number, frame):
        # A scheduler signals every process and torchrun passes it on: within a second it is the same signal. That second is waited
        # for here, because in a long step Python would hear of the copy much later.
        if self.signal:
            if time.time() - self.signalled > 1:
                os._exit(128 + number)
            return
        self.signal, self.signalled = number, time.time()
        time.sleep(1)
        if self.resting and self.team.rank == 0:
            self._leave()

    def step(self, loss, norm, describe, step, count):
        """After optimiser step `step`, counted from 1 over the run. `count` samples were in it; `describe()` tells which."""
        self.check()
        values, arrived = torch.stack([loss.detach(), norm.detach()]).to("cpu", non_blocking=True), None
        if loss.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self.before = (values, arrived, describe)
        self.done, self.count = self.done + 1, self.count + count
        now = time.time()
        if stop := self._agreed():
            self._stop(stop, f"after step {step:,}")
        if now - self.saved > self.every:
            self.save()
        if now - self.printed > 5:
            self.printed, left = now, (now - self.began) / self.done * (self.steps - step)
            self.team.say(f"  step {step:,} of {self.steps:,}  loss {loss.item():.4f}  "
                          f"{self.count / (now - self.began):,.0f} {self.unit}/s  {clock(left)} left")

    def _stop(self, number: int, where: str):
        """On all processes together: save and end with the exit code of a process that signal `number` has ended."""
        self._save_and_say(number, where)
        self.team.wait()
        sys.exit(128 + number)

    def _leave(self):
        """The same on the process that saves alone: the others notice that it has gone."""
        self._save_and_say(self.signal, "between two epochs")
        os._exit(128 + self.signal)

    def _save_and_say(self, number: int, where: str):
        self.save()
        self.team.say(f"stopped by {signal.Signals(number).name} {where}; saved, start the same command again to go on")

    def save(self):
        """Write last.pt, unless the loss has just become infinite. Rank 0 alone, so processes need not agree on when."""
        self.check()
        began = time.time()
        self.run.save("last.pt", self.state())
        self.saved = time.time()
        self.cost = self.saved - began                   # seconds

    def epoch(self):
        """After each epoch: save, unless that would make saving take more than 2 % of the time."""
        if time.time() - self.saved > 50 * self.cost:
            self.save()

    @contextlib.contextmanager
    def rest(self):
        """Around the validation after an epoch, in which the model does not change: a signal is obeyed at once and not after the next
        step, because a scheduler gives a process half a minute or so to end."""
        self.check()
        self.resting = True
        if self.signal and self.team.rank == 0:          # it came since the last step
            self._leave()
        try:
            yield
        except RuntimeError:
            if self.signal:                              # the one that saves has left
                os._exit(128 + self.signal)
            raise
        self.resting = False

    def _agreed(self) -> int:
        """The signal that some process has received, or 0: the same answer on all processes at the same step.

        The flag travels while the next step is computed and is read one step late, so no process waits for another here.
        """
        mine = torch.tensor([self.signal])
        if self.team.world == 1:
            return mine.item()
        flag, work = self.pending or (torch.zeros(1), None)
        if work:
            work.wait()
        self.pending = (mine, dist.all_reduce(mine, dist.ReduceOp.MAX, async_op=True))
        return int(flag.item())

    def check(self):
        """Stop if the last step's loss or gradient was not finite. Read one step late, so that the GPU is not waited for."""
        if self.before is None:
            return
        values, arrived, describe = self.before
        if arrived:
            arrived.synchronize()                        # the copy of that step's two numbers, not what was queued since
        if not values.isfinite().all():
            raise ValueError(f"the loss is {values[0]}, the gradient norm {values[1]} at {describe()}\n"
                             f"  the last checkpoint in {self.run.folder} is from before and is kept. Two things to try: a lower "
                             "learning rate or a longer warm-up (as a run of another --set run.name=...), and a look at the files named above")
        self.before = None

    def end(self):
        """After the last epoch: save, obey a signal that came too late for a step, and give the signals back."""
        self.save()
        if self.pending:
            self.pending[1].wait()
        received = torch.tensor([self.signal])
        if self.team.world > 1:
            dist.all_reduce(received, dist.ReduceOp.MAX)
        for number in STOP:
            signal.signal(number, signal.SIG_DFL)
        if received.item():
            self._stop(int(received.item()), "after the last step")
