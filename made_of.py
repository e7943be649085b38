"""What a result was made of, so that nothing stale is used without a word.

Every stage keeps a record beside its result (made_of.json), and in its checkpoints under the key made_of:

    stage      "finetune"
    settings   {"vit.dim": 768, "finetune.lr": 1e-4, ...}: those that the result depends on
    data       what it has read, in names, numbers and checksums
    input      {"setting": "finetune.start", "stage": "pretrain"}: where its input is looked for
    from       the record of that input; so a record holds the whole chain, down to the data
    checkpoint, checksum   of the weights that later stages read, since it is finished

A result is used if its record agrees with today's settings and with the input that lies there now; otherwise
it is refused (`check`). A run with another name may take the earlier stages of run.base, if they agree
(`place`). Paths are not compared, only what they lead to. docs/made_of.md shows the chain.
"""

import copy
import dataclasses
import json
from pathlib import Path

from checkpoints import checksum, read_checkpoint, read_json
from config import Config, typed

PATHS = ("synthetic.root", "finetune.start", "features.checkpoint", "task.features")
RANDOM = {"file": "random weights", "checksum": 0}           # what finetune.start=none begins with
MADE = ("last.pt", "previous.pt", "best.pt", "metrics.json", "videos.json")      # files of work that was done


# ---- Settings

def value(config: Config, name: str):
    """The setting "section.field", as JSON gives it back; None if there is none of this name."""
    section, field = name.split(".")
    return json.loads(json.dumps(getattr(getattr(config, section, None), field, None)))


def settings_of(config: Config, *names) -> dict:
    """{"task.lr": 3e-5, ...} of sections or single "section.field"s, less the paths.

    The section `synthetic` counts with synthetic data only.
    """
    chosen = {}
    for section, fields in dataclasses.asdict(config).items():
        for field in fields:
            name = f"{section}.{field}"
            unused = name in PATHS or section == "synthetic" and not config.data.synthetic
            if (section in names or name in names) and not unused:
                chosen[name] = value(config, name)
    return chosen


# ---- Records

def finished(folder) -> bool:
    """A stage writes metrics.json last."""
    return (Path(folder) / "metrics.json").exists()


def begun(folder) -> bool:
    """Has the stage made anything here? A first attempt that failed earlier than that does not count."""
    return any((Path(folder) / name).exists() for name in MADE)


def read_record(folder) -> dict | None:
    """The record in a run folder; None if there is none. Raises ValueError if it is damaged."""
    return read_json(Path(folder) / "made_of.json")


def given_record(path) -> dict:
    """The record of a checkpoint, or of a folder of features, that a setting names."""
    if path == "none":
        return RANDOM
    if Path(path).is_dir():
        return {**(read_record(path) or {}), "file": str(path)}
    known = read_checkpoint(path).get("made_of", {})
    return {**known, "file": str(path), "checksum": checksum(path)}


def same(a: dict, b: dict) -> bool:
    """Are these records of one input? The checksum of a checkpoint tells. Features have none: they are the
    same if they come from the same checkpoint with the same settings."""
    if "checksum" in a or "checksum" in b:
        return a.get("checksum") == b.get("checksum")
    both_known = "settings" in a and "settings" in b
    return not both_known or a["settings"] == b["settings"] and same(a["from"], b["from"])


def chain(record: dict | None) -> list[dict]:
    """A record, that of its input, and so on to the first stage."""
    return [record, *chain(record.get("from"))] if record else []


def tuned_on(record: dict | None) -> list[str]:
    """The videos on which the ViT behind a result was fine-tuned; none for an MAE's or a foreign ViT."""
    for link in chain(record):
        if link.get("stage") == "finetune":
            return link["data"]["training videos"]
    return []


# ---- Comparing

def differences(record: dict, config: Config) -> dict[str, tuple]:
    """{setting: (stage, was, now)} of a record and of all that it was made from, the earliest stage first.

    What lies before a path that a setting names is that path's affair: `check` compares its checksum.
    """
    changed, before = {}, record.get("from")
    if before and "file" not in before and not value(config, record["input"]["setting"]):
        changed = differences(before, config)
    for name, was in record["settings"].items():
        now = value(config, name)
        if now != was:
            changed.setdefault(name, (record["stage"], was, now))
    return changed


def listed(changed: dict) -> str:
    return "".join(f"\n  {name}: was {was!r}, now {now!r} (of stage {stage})"
                   for name, (stage, was, now) in changed.items())


def other_run(config: Config) -> str:
    """The way on that loses nothing, for messages."""
    base = "" if config.run.base else f" --set run.base={config.run.name}"
    return (f"a run of its own, --set run.name=NEW{base}, which takes over the stages before it that stay "
            "the same")


def place(config: Config, stage: str) -> Path:
    """The folder of an earlier stage: this run's; or run.base's, if this run has made nothing there and
    that of the base is finished and agrees with the settings."""
    own, base = config.folder(stage), Path(config.run.out) / config.run.base / stage
    if not config.run.base or begun(own) or not finished(base):
        return own
    record = read_record(base)
    agrees = record is not None and not differences(record, config)
    return base if agrees and (base / record.get("checkpoint", "")).exists() else own


def check(folder: Path, config: Config):
    """Raises ValueError if what lies in a run folder was made with other settings than `config`'s, or from
    another input than lies there now; and so on down the chain."""
    record = read_record(folder)
    if record is None:
        raise ValueError(f"{folder}: made_of.json is missing, so nobody knows what this was made of; put it "
                         f"back, or begin {other_run(config)}")
    changed = differences(record, config)
    if changed:
        raise ValueError(f"{folder} was made with other settings:{listed(changed)}\n"
                         f"two ways on: the earlier values, or {other_run(config)}")
    if not record.get("input"):
        return
    setting, stage = record["input"]["setting"], record["input"]["stage"]
    given = value(config, setting)
    where = Path(given) if given else place(config, stage)
    if given:
        now = given_record(given) if given == "none" or where.exists() else None
    else:
        now = read_record(where) if finished(where) else None
    if now is None:                                          # the input is gone, and no longer needed
        return
    before = record["from"]
    if not same(before, now):
        old, new = before.get("settings", {}), now.get("settings", {})
        changed = {name: (stage, old[name], new.get(name)) for name in old if old[name] != new.get(name)}
        raise ValueError(f"{folder} was made from {named(before)}, but {where} is now {named(now)}"
                         f"{listed(changed)}\ntwo ways on: bring back what it was made from, or "
                         f"{other_run(config)}")
    if not given:
        check(where, config)


def named(record: dict) -> str:
    """A record in a few words: "finetune (checksum 123)", "features from finetune (checksum 123)"."""
    if "checksum" in record:
        return f"{record.get('file') or record['stage']} (checksum {record['checksum']})"
    before = record.get("from")
    return (record.get("file") or record["stage"]) + (f" from {named(before)}" if before else "")


# ---- Finding

def missing(path, command: str, config: Config) -> ValueError:
    """The refusal of a stage whose input is not there: names it, and the command that makes it."""
    return ValueError(f"{path} not found; make it with: {command} --config {config.run.source}")


def find_input(config: Config, team, setting: str, stage: str, file: str, command: str) -> tuple[Path, dict]:
    """The input of a stage, and its record: the path that `setting` gives, or `file` of an earlier stage.

    Raises ValueError if it is missing (make it with `command`), gone, stale (`check`), or not the file that
    its stage has written.
    """
    given = value(config, setting)
    if given:
        return Path(given), given_record(given)
    folder = place(config, stage)
    path = folder / file
    if not finished(folder):
        raise missing(path, command, config)
    check(folder, config)
    there(path, config)
    record = read_record(folder)
    if "checksum" in record and checksum(path) != record["checksum"]:
        raise ValueError(f"{path}: not the file that the stage has written; put that back, or name this one "
                         f"with --set {setting}={path}")
    if folder != config.folder(stage):
        team.say(f"  {stage}: taken from {folder} (run.base), made with the same settings")
    return path, record


def there(path: Path, config: Config):
    """Raises ValueError if `path`, which a finished stage has written, is gone."""
    if not path.exists():
        raise ValueError(f"{path} is gone, though its stage is finished; put a copy back, or begin "
                         f"{other_run(config)}")


def like(record: dict | None, config: Config, source) -> tuple[Config, dict]:
    """`config` with the settings that a checkpoint was made with, its features' and its ViT's too, and
    {setting: (stage, was, now)} of those that differed. A checkpoint without a record changes nothing.

    Raises ValueError if one of them was given with --set: it contradicts the checkpoint `source`.
    """
    if record is None:
        return config, {}
    changed = differences(record, config)
    contradicting = {name: row for name, row in changed.items() if name in typed(config)}
    if contradicting:
        raise ValueError(f"{source} was made with other settings:{listed(contradicting)}\n"
                         "leave them out, and the checkpoint's own are used")
    config = copy.deepcopy(config)
    for name, (_, was, _) in changed.items():
        section, field = name.split(".")
        setattr(getattr(config, section), field, was)
    return config, changed
