"""Many runs, one after the other: each stage as a command of its own, and what is finished left out.

folds.py, ablation.py and experiments.py are lists of such commands. A command that was stopped or has failed
is started again by starting the list again: what is finished is not run twice, and a training goes on where
it was.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

import made_of
import pipeline
from checkpoints import write_text
from config import load
from labels import TASKS, Task, has_labels
from settings import Config

HERE = Path(__file__).parent
OPTIONS = {"dry-run": {"action": "store_true", "help": "only say what would run, and how long it takes"},
           "processes": {"type": int, "metavar": "N",
                         "help": "processes of each stage; default: one per GPU, without a GPU 2"}}


class Job(NamedTuple):
    """A stage of a run: `torchrun ... <stage>.py --task <task> --config ... --set ...`."""
    stage: str
    config: Config
    task: Task | None = None
    options: tuple[str, ...] = ()               # more words of the command

    @property
    def title(self) -> str:
        """ "train_task au", "train_finetune"."""
        return self.stage + (f" {self.task.name}" if self.task else "")

    @property
    def state(self) -> str:
        """finished, stale, or to be made."""
        return pipeline.state(self.stage, self.config, self.task)

    @property
    def folder(self) -> Path:
        """Where its result lies; perhaps in the run that this one is based on."""
        return pipeline.result(self.stage, self.config, self.task).parent

    def words(self, processes: int) -> list[str]:
        """The command, as one types it."""
        script = os.path.relpath(HERE / f"{self.stage}.py")
        launcher = ["python"] if processes == 1 else ["torchrun", f"--nproc_per_node={processes}"]
        task = ["--task", self.task.name] if self.task else []
        return [*launcher, script, *task, *self.options, "--config", *shlex.split(self.config.run.source)]


# ---- Runs

def other(config: Config, *settings) -> Config:
    """The same configuration with other settings, as if they had been given with --set."""
    path, *given = shlex.split(config.run.source)
    names = {setting.partition("=")[0] for setting in settings}
    kept = [setting for setting in given[1::2] if setting.partition("=")[0] not in names]
    return load(path, [*kept, *settings])


def labelled_tasks(config: Config) -> list[Task]:
    """The tasks whose labels are there; all of them where the data is not drawn yet."""
    return [task for task in TASKS.values() if has_labels(config.data.labels, task)] or list(TASKS.values())


def inputs(stage: str, config: Config) -> list[Job]:
    """What has to run before a stage. Synthetic data only: with real data the stage itself refuses, and names
    the command that makes its input."""
    return [Job(need, config) for need in pipeline.unfinished(stage, config) if config.data.synthetic]


def own_stages(config: Config, *stages) -> list[Job]:
    """Those of `stages` that train_task.py needs: a path in the settings takes the place of a stage."""
    needed, left = set(), ["train_task"]
    while left:
        needs = pipeline.needs(left.pop(), config)
        needed.update(needs)
        left += needs
    return [Job(stage, config) for stage in stages if stage in needed]


def processes_for(config: Config, wanted: int | None) -> int:
    """How many processes run a stage. Raises ValueError for less than one."""
    if wanted is not None:
        if wanted < 1:
            raise ValueError(f"--processes: got {wanted}, expected 1 or more")
        return wanted
    if config.run.device == "mps":                           # one GPU, for one process
        return 1
    gpus = 0 if config.run.device == "cpu" else torch.cuda.device_count()
    return gpus or 2


# ---- Running them

def run(job: Job, processes: int) -> float:
    """Run a stage, whose output goes to the terminal. -> seconds

    A signal is passed on, and this process ends when the stage has saved. Raises ValueError with the command
    if it fails.
    """
    words, asked = job.words(processes), []
    print("$", shlex.join(words), flush=True)
    torchrun = [] if processes == 1 else ["-m", "torch.distributed.run"]
    began = time.time()
    process = subprocess.Popen([sys.executable, *torchrun, *words[1:]])

    def pass_on(number, frame):
        asked.append(number)
        if number == signal.SIGTERM:               # Ctrl-C goes to all processes of a terminal anyway
            process.terminate()
    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if asked:
        print("stopped; start the same command again to go on", file=sys.stderr)
        sys.exit(128 + asked[0])
    if code:
        raise ValueError(f"this command ended with code {code}, its message is above; what was finished "
                         f"before is kept:\n  {shlex.join(words)}")
    return time.time() - began


def run_all(jobs: list[Job], processes: int):
    """Run those that are not finished, in order, and leave their seconds in seconds.txt. Raises ValueError at
    the first that fails."""
    for i, job in enumerate(jobs, 1):
        if job.state == "finished":
            continue
        print(f"\n---- {i} of {len(jobs)}", flush=True)
        anew = not made_of.begun(job.folder)
        seconds = run(job, processes)
        print(f"---- done in {in_words(seconds)}", flush=True)
        if anew and made_of.finished(job.folder):             # not if this was the rest of a stopped one
            write_text(job.folder / "seconds.txt", f"{seconds:.1f}\n")


# ---- How long it takes

def seconds_of(folder: Path) -> float | None:
    """How long a finished stage took: its command, from seconds.txt; or else its epochs, from log.csv. None
    if neither tells."""
    if not made_of.finished(folder):
        return None
    if (folder / "seconds.txt").exists():
        return float((folder / "seconds.txt").read_text())
    if not (folder / "log.csv").exists():
        return None
    header, *rows = [line.split(",") for line in (folder / "log.csv").read_text().splitlines()]
    return sum(float(row[header.index("seconds")]) for row in rows) if "seconds" in header else None


def known_seconds(jobs: list[Job]) -> dict:
    """{title: seconds} of the trainings that are finished in one of these runs."""
    lent = [Job(stage, jobs[0].config) for stage in pipeline.LENT] if jobs else []
    found = {}
    for job in [*lent, *jobs]:
        took = seconds_of(job.folder)
        if took is not None:
            found.setdefault(job.title, took)
    return found


def estimate(job: Job, known: dict) -> float | None:
    """Seconds that a job will take: those of the same stage elsewhere, or the demo's; None if unknown."""
    path = Path(shlex.split(job.config.run.source)[0])
    is_demo = path.read_bytes() == (HERE / "configs/demo.yaml").read_bytes()
    return known.get(job.title, pipeline.DEMO_SECONDS[job.stage] if is_demo else None)


def in_words(seconds: float) -> str:
    """180 -> "3.0 min"."""
    for unit, size in (("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s"


def plan(jobs: list[Job], processes: int) -> str:
    """What would run, in order, what is finished, and how long the rest takes."""
    states, known, lines = [job.state for job in jobs], known_seconds(jobs), []
    left = [estimate(job, known) for job, state in zip(jobs, states) if state != "finished"]
    for job, state in zip(jobs, states):
        if state == "finished":
            lines.append(f"{state:12s}{'':10s}  {job.folder}")
            continue
        seconds = estimate(job, known)
        about = "unknown" if seconds is None else in_words(seconds)
        lines.append(f"{state:12s}{about:>10s}  {shlex.join(job.words(processes))}")
    known = [seconds for seconds in left if seconds is not None]
    more = [f"about {in_words(sum(known))} for {len(known)} more"] if known else []
    if None in left:
        more.append(f"{left.count(None)} more of unknown length: none of this kind is finished here")
    if "stale" in states:
        more.append("a stale one will be refused, with its reason")
    lines.append("; ".join([f"{len(jobs)} commands, {len(jobs) - len(left)} of them finished", *more]))
    return "\n".join(lines)


def start(main, *arguments):
    """What a script does: `main(*arguments)`; a refusal ends with one line and code 2."""
    try:
        main(*arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
