"""What a result was made of, so that nothing stale is used without a word.

Every stage keeps a record beside its result (made_of.json), and in its checkpoints under the key made_of:

    stage      "finetune"
    settings   {"vit.dim": 768, "finetune.lr": 1e-4, ...}: those that the result depends on
    data       what it has read, in names, numbers and checksums
    input      {"setting": "finetune.start", "stage": "pretrain"}: where its input is looked for
    from       the record of that input; so a record holds the whole chain, down to the data
    base       run.base: where earlier stages may have been taken from
    checkpoint, checksum   of the weights that later stages read, since it is finished

A result is used if its record agrees with today's settings and with its input's record of today; otherwise it
is stale, and refused. A run with another name may take the earlier stages of run.base, if they are not stale
(`place`). Paths are not compared, only what they lead to. docs/made_of.md shows the chain.

    python made_of.py RUN_FOLDER     # the chain behind a result; a checkpoint file will do as well
"""

import copy
import dataclasses
import json
import sys
import textwrap
from pathlib import Path

from checkpoints import checksum, read_checkpoint, read_json
from config import typed
from settings import Config

LEFT_OUT = ("synthetic.root", "finetune.start", "features.checkpoint", "task.features", "stills.start",
            "emma.start", "emma.cnn", "cotex.start")                                                # paths
WAYS_ON = "\ntwo ways on: "
RANDOM = {"file": "random weights", "checksum": 0}           # what finetune.start=none begins with
# Settings that were added later, with what was done before: for records that lack them.
BEFORE = {"task": {"task.held_out": 0.0}, "finetune": {
    "finetune.fold": 0, "finetune.layer_decay": 1.0, "finetune.drop_path": 0.0, "finetune.clip": 0.0}}
MADE = ("last.pt", "previous.pt", "best.pt", "metrics.json", "*.npy")            # files of work that was done


# ---- Settings

def value(config: Config, name: str):
    """The setting "section.field", as JSON gives it back; None if there is none of this name.

    Of a path to data only whether it is given, of a list of them how many: what lies there is compared.
    """
    section, field = name.split(".")
    found = getattr(getattr(config, section, None), field, None)
    if section == "data" and isinstance(found, (str, list)):
        return len(found) if isinstance(found, list) else "given" if found else "not given"
    return json.loads(json.dumps(found))


def settings_of(config: Config, *names) -> dict:
    """{"task.lr": 3e-5, ...} of sections or single "section.field"s, less the paths.

    `synthetic` is whether the data is, and if so, the section of that name.
    """
    if "synthetic" in names:
        names = (*names, "data.synthetic")
    chosen = {}
    for section, fields in dataclasses.asdict(config).items():
        for field in fields:
            name = f"{section}.{field}"
            unused = name in LEFT_OUT or section == "synthetic" and not config.data.synthetic
            if (section in names or name in names) and not unused:
                chosen[name] = value(config, name)
    return chosen


# ---- Records

def finished(folder) -> bool:
    """A stage writes metrics.json last."""
    return (Path(folder) / "metrics.json").exists()


def begun(folder) -> bool:
    """Has the stage made anything here? A first attempt that failed earlier than that does not count."""
    return any(True for name in MADE for _ in Path(folder).glob(name))


def read_record(folder) -> dict | None:
    """The record in a run folder; None if there is none. Raises ValueError if it is damaged."""
    path = Path(folder) / "made_of.json"
    record = read_json(path)
    if record is not None and not (isinstance(record, dict) and "settings" in record):
        raise ValueError(f"{path}: not the record that a stage has written; put a copy back")
    return record


def given_record(path) -> dict:
    """The record of a checkpoint, or of a folder of features, that a setting names."""
    if path == "none":
        return RANDOM
    if not Path(path).exists():
        raise ValueError(f"{path}: no such checkpoint or folder")
    if Path(path).is_dir():
        return {**(read_record(path) or {}), "file": str(path)}
    known = read_checkpoint(path).get("made_of", {})
    return {**known, "file": str(path), "checksum": checksum(path)}


def same(a: dict, b: dict) -> bool:
    """Are these records of one input? The checksum of a checkpoint tells. Features have none: they are the
    same if they come from the same checkpoint with the same settings, or if nothing is known of either."""
    if "checksum" in a or "checksum" in b:
        return a.get("checksum") == b.get("checksum")
    if "settings" in a and "settings" in b:
        return a["settings"] == b["settings"] and same(a["from"], b["from"])
    return "settings" not in a and "settings" not in b


def chain(record: dict | None) -> list[dict]:
    """A record, that of its input, and so on to the first stage."""
    return [record, *chain(record.get("from"))] if record else []


def tuned_on(record: dict | None) -> list[str]:
    """The videos on which the ViT behind a result was fine-tuned; none for an MAE's or a foreign ViT."""
    tunings = [link for link in chain(record) if link.get("stage") == "finetune"]
    return [video for link in tunings for video in link["data"]["training videos"]]


# ---- Comparing

def all_settings(record: dict) -> dict:
    """A record's settings, with those that came later than the record; {} for a file without a record."""
    kind = record.get("stage", "").split("_")[0]                        # task_va -> task
    return {**BEFORE.get(kind, {}), **record["settings"]} if "settings" in record else {}


def differences(record: dict, config: Config) -> dict[str, tuple]:
    """{setting: (stage, was, now)} of a record and of all that it was made from, the earliest stage first.

    What lies before a path that a setting names is that path's affair: `stale` compares its checksum.
    """
    changed, before = {}, record.get("from")
    if before and "file" not in before and not value(config, record["input"]["setting"]):
        changed = differences(before, config)
    for name, was in all_settings(record).items():
        now = value(config, name)
        if now != was:
            changed.setdefault(name, (record["stage"], was, now))
    return changed


def lines_of(changed: dict) -> str:
    """{setting: (stage, was, now)} as lines for a message."""
    return "".join(f"\n  {name}: was {was!r}, now {now!r} (of stage {stage})"
                   for name, (stage, was, now) in changed.items())


def unlike(before: dict, now: dict) -> str:
    """Lines with the settings in which the records of two results of one stage differ."""
    old, new = all_settings(before), all_settings(now)
    return lines_of({name: (now.get("stage"), old[name], new.get(name))
                   for name in old if old[name] != new.get(name)})


def other_run(config: Config) -> str:
    """The way on that loses nothing, for messages."""
    return (f"a run of its own, --set run.name=NEW --set run.base={config.run.name}, which takes over the "
            "stages before it that stay the same")


def bases(config: Config):
    """Yield the folder of run.base, that of the run which this one was based on, and so on."""
    name, seen = config.run.base, [config.run.name]
    while name and name not in seen:
        folder = Path(config.run.out) / name
        yield folder
        seen.append(name)
        records = [read_record(path.parent) for path in sorted(folder.glob("*/made_of.json"))]
        name = next((record["base"] for record in records if record.get("base")), "")


def place(config: Config, stage: str) -> Path:
    """The folder of an earlier stage: this run's; or that of a base, if this run has made nothing there."""
    own = config.folder(stage)
    if not begun(own):
        for base in bases(config):
            if not why_not(base / stage, config):
                return base / stage
    return own


def why_not(folder: Path, config: Config) -> str:
    """Why an earlier stage of another run is not taken over; "" if it is."""
    if not finished(folder):
        return f"{folder} is not finished" if folder.exists() else f"there is no {folder}"
    weights = (read_record(folder) or {}).get("checkpoint", "")
    return stale(folder, config) or ("" if (folder / weights).exists() else f"{folder / weights} is gone")


def not_taken(config: Config, stage: str) -> str:
    """Why the base's result of a stage is not used, in lines for messages; "" without a base."""
    base = next(bases(config), None)
    return f"\n  run.base: {why_not(base / stage, config).partition(WAYS_ON)[0]}" if base else ""


def check(folder: Path, config: Config):
    """Raises ValueError if a result is stale."""
    reason = stale(folder, config)
    if reason:
        raise ValueError(reason)


def stale(folder: Path, config: Config) -> str:
    """Why what lies in a run folder is not what `config` would make, with the ways on; "" if it is.

    It was made with other settings, or from another input than the settings lead to now; and so on down the
    chain. An earlier stage that is gone is no longer needed; then its record, which is kept here, tells.
    """
    record = read_record(folder)
    if record is None:
        return (f"{folder}: made_of.json is missing, so nobody knows what this was made of; put it back, or "
                f"begin {other_run(config)}")
    changed = differences(record, config)
    if changed:
        return (f"{folder} was made with other settings:{lines_of(changed)}"
                f"{WAYS_ON}the earlier values, or {other_run(config)}")
    made = str(folder)
    while record.get("input"):
        setting, stage, before = record["input"]["setting"], record["input"]["stage"], record["from"]
        given = value(config, setting) or ("" if stage else "none")      # an input that no stage makes
        where = Path(given) if given else place(config, stage)
        now = before                                         # if there is nothing to compare it with
        if given and (given == "none" or where.exists()):
            now = given_record(given)
        elif finished(where):
            now = read_record(where) or {}
        elif not given and "file" in before:
            return (f"{made} was made from {named(before)}, but {setting} is now not given"
                    f"{WAYS_ON}give it, or {other_run(config)}")
        if not same(before, now):
            return (f"{made} was made from {named(before)}, but {where} is now {named(now)}"
                    f"{unlike(before, now)}{WAYS_ON}bring back what it was made from, or {other_run(config)}")
        if given:
            break                                            # what lies before it is its own affair
        record, made = now, str(where)
    return ""


def named(record: dict) -> str:
    """A record in a few words: "finetune (checksum 123)", "features from finetune (checksum 123)"."""
    what = record.get("file") or record.get("stage") or "something without made_of.json"
    before = record.get("from")
    if "checksum" in record:
        return f"{what} (checksum {record['checksum']})"
    return what + (f" from {named(before)}" if before else "")


# ---- Finding

def command(script: str, config: Config) -> str:
    """What to type, in the folder where the user is, to run another script ("x.py --task au") as this one."""
    return f"python {Path(sys.argv[0]).parent / script} --config {config.run.source}"


def missing(path, script: str, config: Config) -> ValueError:
    """The refusal of a stage whose input is not there: names it, and the command that makes it."""
    return ValueError(f"{path} not found; make it with: {command(script, config)}")


def find_input(config: Config, team, setting: str, stage: str, file: str, script: str) -> tuple[Path, dict]:
    """The input of a stage, and its record: the path that `setting` gives, or `file` of an earlier stage.

    Raises ValueError if it is missing (`script` makes it), gone, stale, or not the file that its stage
    has written.
    """
    given = value(config, setting)
    if given:
        return Path(given), given_record(given)
    folder = place(config, stage)
    path = folder / file
    if not finished(folder):
        raise ValueError(f"{missing(path, script, config)}{not_taken(config, stage)}")
    check(folder, config)
    there(path, config)
    record = read_record(folder)
    now = team.agree(checksum(path) if team.rank == 0 and "checksum" in record else None)
    if now != record.get("checksum"):
        raise ValueError(f"{path}: not the file that the stage has written; put that back, or name this one "
                         f"with --set {setting}={path}")
    if folder != config.folder(stage):
        team.say(f"  {stage}: taken from {folder} (run.base), made with the same settings")
    return path, record


def input_there(config: Config, setting: str, stage: str) -> bool:
    """Is there something that `find_input` would find, or refuse?"""
    return bool(value(config, setting)) or finished(place(config, stage))


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
        raise ValueError(f"{source} was made with other settings:{lines_of(contradicting)}\n"
                         "leave them out, and the checkpoint's own are used")
    changed.pop("data.synthetic", None)                      # says what lies here now, not what was there
    config = copy.deepcopy(config)
    for name, (_, was, _) in changed.items():
        section, field = name.split(".")
        if section == "data" and type(was) is not bool:      # paths to data of pre-training, of which `value`
            was = [""] * was if type(was) is int else was.replace("not given", "")        # told only so much
        setattr(getattr(config, section), field, was)
    return config, changed


def described(record: dict):
    """Lines that tell of a record and of all that it was made from; a setting with its first stage only."""
    for link in chain(record):
        yield named({**link, "from": None})
        earlier = {name for before in chain(link.get("from")) for name in before.get("settings", {})}
        settings = {name: entry for name, entry in link.get("settings", {}).items() if name not in earlier}
        data = {name: f"{len(entry)}" if isinstance(entry, list) else entry
                for name, entry in link.get("data", {}).items()}
        for title, entries in (("data", data), ("settings", settings)):
            if entries:
                text = ", ".join(f"{name} {entry}" for name, entry in entries.items())
                yield textwrap.fill(text, 100, initial_indent=f"  {title:10s}", subsequent_indent=" " * 12)


if __name__ == "__main__":
    if len(sys.argv) == 1:
        sys.exit("give a run folder or a checkpoint: python made_of.py RUN_FOLDER")
    for path in sys.argv[1:]:
        try:
            record = read_record(path) if Path(path).is_dir() else read_checkpoint(path).get("made_of")
            print("\n".join(described(record)) if record else f"{path}: tells nothing of what it was made of")
        except (ValueError, OSError) as refusal:
            print(f"refused: {refusal}", file=sys.stderr)
            sys.exit(2)
