"""The processes of a run: one under `python`, several under `torchrun`, on one machine or many.

A batch is split over the processes. Losses and metrics are functions of sums over all of them, so two
processes train and score as one would. There is one way to sum, `all_sum`, and one rule: a loss is summed
over the processes before `backward`. DDP then does the rest (see `all_sum`).
"""

import dataclasses
import datetime
import gc
import multiprocessing
import os
import signal
import sys
import time
import uuid
import warnings

import torch
import torch.distributed as dist

# What a user can do about an error, by its words; the first that it has count. A worker without shared memory
# may die of a bus error.
SHARED_MEMORY = ("a worker that reads data ran out of shared memory; start the container with a larger "
                 "--shm-size, or read without workers: --set run.workers=0")
WAYS_ON = {"unable to allocate shared memory": SHARED_MEMORY, "Bus error": SHARED_MEMORY,
           "out of memory": "the GPU's memory is full; try a smaller --set run.largest_piece=N, or a smaller "
           "batch where it is not cut: task.batch, emma.batch, stills.batch, features.batch",
           "by peer": "another process of this run has ended; see its message or exit code",     # gloo
           "No space left": "free some space and start the same command again, the last checkpoint is intact"}
# What adds up over processes: on GPUs NCCL, and gloo what lies on the CPU, since NCCL cannot.
BACKENDS = {"cpu": "gloo", "cuda": "cpu:gloo,cuda:nccl"}
STOP = (signal.SIGTERM, signal.SIGINT)       # what tells a run to save and end
TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")    # what it tells each process
# Rank 0 says what was refused. torchrun ends the others within these seconds, before they repeat it.
SECONDS_FOR_RANK_0 = 2.0
# How long a process may wait for the others, as for the last long video. PyTorch's 10 or 30 minutes would end
# a run that is well; a process that has died is noticed at once, by its closed connection or by torchrun.
LONGEST = datetime.timedelta(days=1)


@dataclasses.dataclass(frozen=True)
class Team:
    """The processes of this run: this one is number `rank` of `world`. Rank 0 writes files and prints."""
    rank: int
    world: int
    device: torch.device

    def say(self, text=""):
        """Print once, not once per process."""
        if self.rank == 0:
            print(text, flush=True)

    def agree(self, value):
        """Rank 0's value on every process: for decisions that depend on what lies on disk."""
        box = [value]
        if self.world > 1:
            dist.broadcast_object_list(box)
        return box[0]

    def gather(self, value) -> list:
        """Every process's value, on every process, in the order of the ranks."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def wait(self):
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()

    def autocast(self):
        """bf16 where the GPU has it, else float32; NVIDIA's GPUs before 2020 only imitate it, more slowly.
        bf16 has float32's range, so no loss scaling is needed."""
        bf16 = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.autocast(self.device.type, torch.bfloat16, enabled=bf16)

    def parallel(self, model):
        """The model under DDP, which averages gradients over processes; in a single process, the model."""
        model = model.to(self.device)
        if self.world == 1:
            return model
        # The gradient of a 1 x 1 convolution has other strides than its weight, though the same memory.
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        # gloo adds up three or more processes in an order that depends on the place in what is sent
        # together, and DDP rearranges that after its first step, unless it looks for unused parameters: a run
        # that starts again would differ in the last bits.
        fixed = self.world > 2 and self.device.type == "cpu"
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True,
                                                         find_unused_parameters=fixed)


class _AllSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return _AllSum.apply(gradient)


def several() -> bool:
    """Does this run have more than one process?"""
    return dist.is_initialized() and dist.get_world_size() > 1


def all_sum(x: torch.Tensor) -> torch.Tensor:
    """S = Σ_r x_r over the W processes; x itself in a single process. Any shape, the same on each process.

    Backward: each process has the same loss L(S), so the sum of their gradients of S is W · L'(S). With it,
    process r finds W · L'(S) · ∂x_r/∂θ, and DDP's average over the processes is the whole gradient,
    Σ_r L'(S) · ∂x_r/∂θ. The same holds inside a network, as in BatchNorm.
    Every process must call it. What lies on the CPU is summed on the CPU, without waiting for a GPU.
    """
    return _AllSum.apply(x) if several() else x


def choose_device(wanted: str = "auto") -> torch.device:
    """run.device as a device: "auto" is CUDA where there is a GPU, else the CPU. A GPU per process.

    Raises ValueError if it is not there, or if this machine has fewer GPUs than processes.
    """
    local, processes = int(os.environ.get("LOCAL_RANK") or 0), int(os.environ.get("LOCAL_WORLD_SIZE") or 1)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "auto":
        wanted = "cuda" if gpus else "cpu"
    there = {"cpu": True, "cuda": gpus, "mps": processes == 1 and torch.backends.mps.is_available()}
    if not there[wanted]:
        raise ValueError(f"run.device: got {wanted}, but PyTorch sees no such GPU here (mps: or there are "
                         "several processes); try --set run.device=cpu")
    if wanted != "cuda":
        return torch.device(wanted)
    if processes > gpus:
        raise ValueError(f"{processes} processes, but this machine has {gpus} GPU(s); start with "
                         f"torchrun --nproc_per_node={gpus}, or --set run.device=cpu")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


def join(device: str = "auto") -> Team:
    """Join the processes that torchrun started, or be the only one. gloo sums on CPUs, NCCL on GPUs.
    Raises ValueError if the environment tells of others, but not all that torchrun would tell."""
    told = {name: os.environ.get(name) for name in TORCHRUN}
    rank, local, world = (int(told[name] or alone) for name, alone in zip(TORCHRUN, (0, 0, 1)))
    if (rank, local, world) != (0, 0, 1) and not (all(told.values()) and rank < world):
        found = ", ".join(f"{name}={value}" if value else f"no {name}" for name, value in told.items())
        raise ValueError(f"the environment has {found}; start with torchrun, which sets all of them, or "
                         "unset RANK, LOCAL_RANK and WORLD_SIZE for a single process")
    chosen = choose_device(device)
    if world > 1 and not dist.is_initialized():
        dist.init_process_group(BACKENDS[chosen.type], store=_fresh_store(), rank=rank, world_size=world,
                                timeout=LONGEST)
    return Team(rank, world, chosen)


def _fresh_store():
    """The store by which processes find each other, without what processes before a restart have left there.

    torchrun keeps one store over all restarts, and PyTorch puts the same keys into it each time. A
    restarted process would read the address of a dead one. So rank 0 draws a new prefix and answers each
    process that asks for it, under a name that the process has just drawn. The question may be one of a
    process that has died since; rank 0 therefore repeats its answer until the new process confirms it.
    """
    store, rank, world = next(dist.rendezvous("env://"))
    if rank == 0:
        prefix = uuid.uuid4().hex
        for other in range(1, world):
            while not store.check([f"{prefix}/confirmed/{other}"]):
                store.set("answer/" + store.get(f"question/{other}").decode(), prefix)
                time.sleep(0.01)
    else:
        name = uuid.uuid4().hex
        store.set(f"question/{rank}", name)
        prefix = store.get(f"answer/{name}").decode()
        store.set(f"{prefix}/confirmed/{rank}", "")
    return dist.PrefixStore(prefix, store)


def on_stop(acts: dict) -> dict:
    """How SIGTERM and Ctrl-C act from now on, {signal: act} -> how they acted before."""
    return {number: signal.signal(number, act) for number, act in acts.items()}


def _end(number, frame):
    """SIGTERM and Ctrl-C, but in a training (`run.Run`): a line, and the exit code of an ended process.
    A copy, as torchrun sends, ends at once."""
    if (os.environ.get("RANK") or "0") == "0":
        print(f"stopped by {signal.Signals(number).name}; what is finished is kept, start the same command "
              "again to go on", file=sys.stderr, flush=True)
    on_stop(dict.fromkeys(STOP, lambda *ignored: os._exit(128 + number)))
    sys.exit(128 + number)


def launch(main, config, *arguments):
    """Run `main(config, team, *arguments)` with all processes of this run.

    Exit code 2 and one line for a refusal (ValueError, OSError); 1 and one line when another process has
    died, a GPU's memory is full, or a worker has run out of shared memory; 130 or 143 and one line for
    Ctrl-C or SIGTERM.
    """
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):               # file names may hold bytes of no encoding
            stream.reconfigure(errors="backslashreplace")
    before = on_stop(dict.fromkeys(STOP, _end))
    try:
        main(config, join(config.run.device), *arguments)
    except (ValueError, OSError, RuntimeError) as error:
        said = f"{error} {error.__cause__}"                  # "exited unexpectedly", from "Bus error"
        ways_on = [way_on for words, way_on in WAYS_ON.items() if words in said]
        if isinstance(error, RuntimeError):
            if not ways_on:
                raise
            sys.exit(f"error: {ways_on[0]}")
        if os.environ.get("RANK", "0") != "0":
            time.sleep(SECONDS_FOR_RANK_0)
        print("; ".join([f"error: {error}", *ways_on[:1]]), file=sys.stderr, flush=True)
        sys.exit(2)
    finally:
        # After an error, workers may still be there. They ignore SIGTERM (`training.loader`), so they are
        # killed; and a DataLoader's handler of SIGCHLD would raise an error of its own about that.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in multiprocessing.active_children():
            worker.kill()
        if dist.is_initialized():
            # A DDP model that outlives its process group now and then aborts the process at exit
            # ("terminate called without an active exception"). Models and loops refer to each other, so
            # collect them first.
            gc.collect()
            dist.destroy_process_group()
        on_stop(before)
