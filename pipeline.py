"""Which stage needs what, and what a result was made of, so that nothing stale is used without a word.

    drawn data -> train_pretrain -> train_finetune -> extract_features -> train_task -> evaluate
                  train_pretrain, second_paper.train_cnn -> second_paper.train_emma
                  train_pretrain -> second_paper.train_cotex

No other file knows this order, and no stage imports another: this file knows them by their names. With
`data.synthetic`, a script makes what is missing first; with real data, a stage whose input is missing refuses
and names the command that makes it.

A result lies in runs/<config>/<stage>. Settings that --set has changed, and that count for the stage or for
anything before it, are part of the folder's name: runs/demo/task_au+temporal.kernels=5-5-5. So an experiment
shares the stages that stay the same. Beside the result lies its record (made_of.json, and in checkpoints):

    stage      "finetune"
    settings   {"vit.dim": 768, "finetune.lr": 1e-4, ...}: those that the result depends on
    data       what it has read, in names, numbers and checksums
    from       the record of its input; so a record holds the whole chain, down to the data
    checkpoint, checksum   of the weights that later stages read, since it is finished

A result is used if its record agrees with today's settings and with its input's record of today; otherwise
it is refused, and what differs is named. Paths are not compared, only what they lead to.

    python pipeline.py --config my.yaml      # every result of a configuration: finished or not, its score
"""

import copy
import importlib
import re
import time
import zlib
from pathlib import Path
from typing import NamedTuple

from engine.checkpoints import checksum, read_checkpoint, read_json
from engine.config import from_command_line, print_all, value_of
from engine.distributed import launch
from engine.run import OTHER_RUN, Run, there
from engine.settings import SETTINGS, Config

LONGEST_NAME = 100                # letters of a folder's name; beyond it the settings are hashed
RANDOM = {"file": "random weights", "checksum": 0}           # what finetune.start=none begins with


class Stage(NamedTuple):
    """A stage: what runs it, where its input comes from, what its result depends on, what it leaves."""
    script: str                    # the module, whose main(config, team) makes the result
    inputs: dict[str, str]         # {a setting that may name the input: the stage that makes it otherwise}
    settings: tuple                # sections and single settings
    file: str = "best.pt"          # what the next stage reads


STAGES = {
    "pretrain": Stage("train_pretrain", {"pretrain.start": ""},
                      ("vit", "pretrain", "run.seed", "data.affectnet_crop"), "last.pt"),
    "finetune": Stage("train_finetune", {"finetune.start": "pretrain"}, ("vit", "finetune", "run.seed")),
    "features": Stage("extract_features", {"features.checkpoint": "finetune"}, ("vit", "finetune.token"),
                      "videos.json"),
    "task": Stage("train_task", {"task.features": "features"}, ("segments", "temporal", "task", "run.seed")),
    "stills": Stage("second_paper.train_cnn", {"stills.start": ""},
                    ("stills", "run.seed", "vit.image_size", "data.affectnet_crop")),
    "emma": Stage("second_paper.train_emma", {"emma.start": "pretrain", "emma.cnn": "stills"},
                  ("vit", "emma", "run.seed")),
    "cotex": Stage("second_paper.train_cotex", {"cotex.start": "pretrain"}, ("vit", "cotex", "run.seed")),
}
INPUTS = {setting: before for stage in STAGES.values() for setting, before in stage.inputs.items()}


# ---- Settings and folders

def settings_of(stage: str, config: Config) -> dict:
    """The settings that the result of a stage depends on, less the paths of its inputs. With drawn data, also
    how much of it there is."""
    names = (*STAGES[stage].settings, "data.synthetic", *["synthetic"] * config.data.synthetic)
    return {name: value_of(config, name) for name in SETTINGS
            if (name in names or name.split(".")[0] in names) and name not in INPUTS
            and name != "synthetic.root"}


def changed(stage: str, config: Config) -> dict:
    """The settings that --set has changed and that count for a stage, or for one before it."""
    counts = {*settings_of(stage, config), *STAGES[stage].inputs}
    found = {name: value for name, value in config.changed.items()
             if name in counts and not name.startswith("data.")}
    for setting, before in STAGES[stage].inputs.items():
        if before and not value_of(config, setting):
            found |= changed(before, config)
    return {name: found[name] for name in SETTINGS if name in found}


def spelled(name: str, value) -> str:
    """ "+temporal.kernels=5-5-5": a changed setting, as a shell takes it without quotes."""
    text = "/".join(Path(value).parts[-2:]) if name in INPUTS else re.sub(r"\.0\b", "", str(value).lower())
    return f"+{name}=" + re.sub(r"[^\w.]+", "-", text).strip("-")


def folder(stage: str, config: Config, task=None) -> Path:
    """runs/<config>/<stage>, of a labels.Task runs/<config>/task_<task>, and what --set has changed."""
    name = f"{stage}_{task.name}" if task else stage
    differs = "".join(spelled(*item) for item in changed(stage, config).items())
    if len(name + differs) > LONGEST_NAME:
        differs = f"+{zlib.crc32(differs.encode()):08x}"
    return Path(config.run.out) / config.run.name / f"{name}{differs}"


# ---- Records

def finished(folder) -> bool:
    """A stage writes metrics.json last."""
    return (Path(folder) / "metrics.json").exists()


def begun(folder) -> bool:
    """Has the stage made anything here? A first attempt that failed earlier than that does not count."""
    made = ("last.pt", "previous.pt", "best.pt", "metrics.json", "*.npy")
    return any(True for name in made for _ in Path(folder).glob(name))


def read_record(folder) -> dict | None:
    """The record in a run folder; None if there is none. Raises ValueError if it is damaged."""
    path = Path(folder) / "made_of.json"
    record = read_json(path)
    if record is not None and "settings" not in record:
        raise ValueError(f"{path}: not the record that a stage has written; put a copy back")
    return record


def given_record(path) -> dict:
    """The record of a checkpoint, or of a folder of features, that a setting names."""
    if path == "none":
        return RANDOM
    if Path(path).is_dir():
        return {**(read_record(path) or {}), "file": str(path)}
    return {**read_checkpoint(path).get("made_of", {}), "file": str(path), "checksum": checksum(path)}


def chain(record: dict | None) -> list[dict]:
    """A record, that of its input, and so on to the first stage."""
    return [record, *chain(record.get("from"))] if record else []


def tuned_on(record: dict | None) -> list[str]:
    """The videos on which the ViT behind a result was fine-tuned; none for an MAE's or a foreign ViT."""
    return [video for link in chain(record) if link.get("stage") == "finetune"
            for video in link["data"]["training videos"]]


def identity(record: dict | None):
    """What tells two results apart: the checksum of the weights. Features have none; they are told by their
    settings and by the weights that they come from."""
    if record and "checksum" not in record:
        return record.get("settings"), identity(record.get("from"))
    return record and record["checksum"]


def named(record: dict) -> str:
    """A record in a few words: "finetune (checksum 123)", "features from finetune (checksum 123)"."""
    what = record.get("file") or record.get("stage") or "something without made_of.json"
    if "checksum" in record:
        return f"{what} (checksum {record['checksum']})"
    return what + (f" from {named(record['from'])}" if record.get("from") else "")


def main_input(record: dict) -> tuple[str, str]:
    """The setting and the stage of the input whose record is kept, by a record's stage, "task_au" or "task".
    An unknown stage has none."""
    stage = STAGES.get(record.get("stage", "").split("_")[0])
    return next(iter(stage.inputs.items())) if stage else ("", "")


def other_settings(record: dict, config: Config) -> dict[str, tuple]:
    """{setting: (stage, was, now)} of a record and of all that it was made from, the earliest stage first.
    What lies before a path that a setting names is that path's affair."""
    (setting, _), before, found = main_input(record), record.get("from"), {}
    if before and "file" not in before and setting and not value_of(config, setting):
        found = other_settings(before, config)
    for name, was in record.get("settings", {}).items():
        now = value_of(config, name)
        if now != was and name in SETTINGS:                  # not one that only an older version had
            found.setdefault(name, (record["stage"], was, now))
    return found


def lines_of(settings: dict) -> str:
    """{setting: (stage, was, now)} as lines for a message."""
    return "".join(f"\n  {name}: was {was!r}, now {now!r} (of stage {stage})"
                   for name, (stage, was, now) in settings.items())


def differs(made: Path, record: dict, config: Config) -> str:
    """What in a record is not what `config` leads to now, down the chain, in words; "" if all is: settings,
    or the input. An earlier stage that is gone is no longer needed; then its record, kept here, tells."""
    settings = other_settings(record, config)
    if settings:
        return f"{made} was made with other settings:{lines_of(settings)}"
    (setting, stage), before = main_input(record), record.get("from")
    if before is None:
        return ""
    given = value_of(config, setting)
    where = Path(given or stage and folder(stage, config) or "none")
    now = before                                             # if there is nothing to compare it with
    if str(where) == "none" or given and where.exists():
        now = given_record(str(where))
    elif not given and finished(where):
        now = read_record(where) or {}
    elif not given and "file" in before:
        now = {"file": "not given"}
    if identity(before) != identity(now):
        return f"{made} was made from {named(before)}, but {where} is now {named(now)}"
    return "" if given or not stage else differs(where, now, config)


def stale(folder: Path, config: Config) -> str:
    """Why what lies in a run folder is not what `config` would make, with the ways on; "" if it is."""
    record = read_record(folder)
    found = f"{folder}: made_of.json is missing, so nobody knows what this was made of"
    if record is not None:
        found = differs(folder, record, config)
    return found and f"{found}\ntwo ways on: what it was made with, put back, or {OTHER_RUN}"


# ---- For the stages

def command(script: str, config: Config) -> str:
    """What to type to run another script ("train_task --task au") as this one."""
    module, _, options = script.partition(" ")
    words = f"python -m {module}" if "." in module else f"python {module}.py"
    return " ".join(filter(None, [words, options, "--config", config.words]))


def open_run(stage: str, config: Config, team, task=None) -> Run:
    """The run folder of a stage, locked. Raises ValueError if it was made otherwise, or is in use."""
    place = folder(stage, config, task)
    record = {"stage": place.name.partition("+")[0], "settings": settings_of(stage, config)}
    run = Run(place, record, config, team, lambda: stale(place, config) if begun(place) else "")
    new = changed(stage, config)
    if new and not team.agree(begun(place)):
        team.say(f"{place}: new, differs from the configuration in {', '.join(new)}")
    return run


def find_input(config: Config, team, setting: str) -> tuple[Path, dict]:
    """An input of a stage, and its record: the path that `setting` gives, or the stage before's file (of
    features the folder).
    Raises ValueError if it is missing (with the command that makes it), gone, stale, or another file."""
    given, stage = value_of(config, setting), INPUTS[setting]
    if given or not stage:
        return Path(given or "none"), given_record(given or "none")
    place = folder(stage, config)
    path = place / STAGES[stage].file
    if not finished(place):
        raise missing(path, STAGES[stage].script, config)
    problem = stale(place, config)
    if problem:
        raise ValueError(problem)
    there(path)
    record = read_record(place)
    now = team.agree(checksum(path) if team.rank == 0 and "checksum" in record else None)
    if now != record.get("checksum"):
        raise ValueError(f"{path}: not the file that the stage has written; put that back, or name this one "
                         f"with --set {setting}={path}")
    return (place if stage == "features" else path), record


def missing(path, script: str, config: Config) -> ValueError:
    """The refusal of a stage whose input is not there, or not finished: names the command that makes it."""
    state = "is of a stage that has not ended; go on" if begun(path.parent) else "not found; make it"
    return ValueError(f"{path} {state} with: {command(script, config)}")


def like(record: dict | None, config: Config, source) -> tuple[Config, dict]:
    """`config` with the settings that a checkpoint was made with, its features' and its ViT's too, and
    {setting: (stage, was, now)} of those that differed. A checkpoint without a record changes nothing.
    Raises ValueError if one of them was given with --set: it contradicts the checkpoint `source`."""
    found = other_settings(record or {}, config)
    contradicting = {name: row for name, row in found.items() if name in config.changed}
    if contradicting:
        raise ValueError(f"{source} was made with other settings:{lines_of(contradicting)}\n"
                         "leave them out, and the checkpoint's own are used")
    found.pop("data.synthetic", None)                        # says what lies here now, not what was there
    config = copy.deepcopy(config)
    for name, (_, was, _) in found.items():
        section, key = name.split(".")
        setattr(getattr(config, section), key, was)
    return config, found


# ---- Making what is missing

def make(stage: str, config: Config, team, task=None):
    """With drawn data: make the result of a stage, and what it needs, unless it is finished."""
    if make_inputs(stage, config, team, task):
        script, arguments = STAGES[stage].script, [task] if task else []
        run_first(f"{folder(stage, config, task)} is missing",
                  script + (f" --task {task.name}" if task else ""), config, team,
                  importlib.import_module(script).main, *arguments)


def make_inputs(stage: str, config: Config, team, task=None) -> bool:
    """With drawn data, unless the stage is finished: draw the data, and make the results that it reads. -> is
    it still to be made?"""
    if not config.data.synthetic or team.agree(finished(folder(stage, config, task))):
        return False
    drawn = importlib.import_module("datasets.synthetic")
    drawn.check_paths(config)
    if not team.agree(drawn.is_complete(config)):
        run_first(f"{config.synthetic.root} lacks drawn data", "datasets.synthetic", config, team, drawn.make)
    for setting, before in STAGES[stage].inputs.items():
        if before and not value_of(config, setting):
            make(before, config, team)
    return True


def run_first(why: str, script: str, config: Config, team, main, *arguments):
    """Run what comes before, and say so."""
    team.say(f"\n{why}, so it is made first. Only this step: {command(script, config)}")
    began = time.time()
    main(config, team, *arguments)
    team.say(f"made in {time.time() - began:.0f} s\n")


def start(stage: str, main, config: Config, task=None):
    """What the script of a stage does: join the processes, make missing inputs (drawn data only), run it."""
    launch(_start, config, stage, main, task)


def _start(config, team, stage, main, task):
    make_inputs(stage, config, team, task)
    main(config, team, *[task] if task else [])


# ---- What there is

def results(config: Config):
    """Yield a line for every result of a configuration, with or without --set: its score or state, the
    folder, what differs from the configuration; and the commands for what is not made yet."""
    run = Path(config.run.out) / config.run.name
    for place in sorted(path.parent for path in run.glob("*/made_of.json")):
        metrics = read_json(place / "metrics.json")
        scores = [metrics[key] for key in ("score", "loss") if key in (metrics or {})]
        state = f"{scores[0]:.3f}" if scores else "begun" if metrics is None else "finished"
        other = "" if "+" in place.name else lines_of(other_settings(read_record(place), config))
        yield f"{state:10s}{place}{other}"
    for stage in STAGES:
        place = folder(stage, config)
        if stage != "task" and not begun(place):
            yield f"{'to make':10s}{place}: {command(STAGES[stage].script, config)}"


if __name__ == "__main__":
    print_all(results(from_command_line(__doc__)[0]))
