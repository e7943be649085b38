"""The order of the stages: what each one reads, which stage makes that, and how long it takes in the demo.

    synthetic -> train_pretrain -> train_finetune -> extract_features -> train_task -> evaluate

The second paper's systems branch off; the main line neither needs nor runs what is theirs:

    synthetic -> train_stills, and train_pretrain, synthetic_abaw4 -> train_emma
                 train_pretrain, synthetic_abaw4 -> train_cotex

No other file knows this order, and no stage imports another. With `data.synthetic`, a script makes what is
missing first; with real data, a stage whose input is missing refuses and names the command that makes it.

    python pipeline.py --config my.yaml      # which stages are finished
"""

import time
from pathlib import Path

import evaluate
import extract_features
import made_of
import synthetic
import synthetic_abaw4
import train_cotex
import train_emma
import train_finetune
import train_pretrain
import train_stills
import train_task
from config import from_command_line
from distributed import launch
from labels import TASKS
from made_of import place
from scoring import stage_of

MAIN = {"synthetic": synthetic.make,
        "train_pretrain": train_pretrain.main,
        "train_finetune": train_finetune.main,
        "extract_features": extract_features.main,
        "train_task": train_task.main,
        "evaluate": evaluate.main,
        "synthetic_abaw4": synthetic_abaw4.make,
        "train_stills": train_stills.main,
        "train_emma": train_emma.main,
        "train_cotex": train_cotex.main}
DEMO_SECONDS = {"synthetic": 13, "train_pretrain": 139, "train_finetune": 66, "extract_features": 6,
                "train_task": 21,                                   # measured by benchmark.py on two cores
                "synthetic_abaw4": 4, "train_stills": 65, "train_emma": 77, "train_cotex": 50}

DRAWN = ("synthetic", "synthetic_abaw4")
LENT = ("train_pretrain", "train_finetune", "extract_features", "train_stills")     # run.base lends these
FOLDERS = {"train_pretrain": ("pretrain", "last.pt"), "train_finetune": ("finetune", "best.pt"),
           "extract_features": ("features", "metrics.json"), "train_stills": ("stills", "best.pt"),
           "train_emma": ("emma", "best.pt"), "train_cotex": ("cotex", "best.pt")}


def needs(stage: str, config, checkpoint: str = "") -> list[str]:
    """The stages whose results `stage` reads, in order. A path in the settings takes the place of a stage."""
    features = [] if config.task.features else ["extract_features"]
    cnn = [] if config.emma.cnn else ["train_stills"]
    abaw4 = ["synthetic", "synthetic_abaw4"]
    return {"synthetic": [],
            "synthetic_abaw4": ["synthetic"],
            "train_stills": ["synthetic"],
            "train_emma": abaw4 + ([] if config.emma.start else ["train_pretrain"]) + cnn,
            "train_cotex": abaw4 + ([] if config.cotex.start else ["train_pretrain"]),
            "train_pretrain": ["synthetic"],
            "train_finetune": ["synthetic"] + ([] if config.finetune.start else ["train_pretrain"]),
            "extract_features": ["synthetic"] + ([] if config.features.checkpoint else ["train_finetune"]),
            "train_task": ["synthetic"] + features,
            "evaluate": ["synthetic"] + features + ([] if checkpoint else ["train_task"])}[stage]


def result(stage: str, config, task=None) -> Path:
    """The file that the next stage reads."""
    if stage == "synthetic":
        return Path(config.synthetic.root) / "complete.json"
    if stage == "synthetic_abaw4":
        return Path(config.synthetic.root) / "ABAW4/complete.json"
    if stage == "train_task":
        return config.folder(stage_of(config, task) if task else "task") / "best.pt"
    folder, file = FOLDERS[stage]
    return (place(config, folder) if stage in LENT else config.folder(folder)) / file


def finished(stage: str, config, task=None) -> bool:
    """Has the stage ended? A training's weights are there before its end, so metrics.json tells."""
    if stage == "evaluate":
        return False
    if stage == "synthetic":
        return synthetic.is_complete(config.synthetic.root, config.synthetic)
    if stage == "synthetic_abaw4":
        return synthetic_abaw4.is_complete(config.synthetic.root, config.synthetic)
    return made_of.finished(result(stage, config, task).parent)


def state(stage: str, config, task=None) -> str:
    """ "finished", "to be made", or "stale": finished, but with other settings or from another input."""
    if not finished(stage, config, task):
        return "to be made"
    folder = result(stage, config, task).parent
    return "stale" if stage not in DRAWN and made_of.stale(folder, config) else "finished"


def unfinished(stage: str, config) -> list[str]:
    """The stages that have to run before `stage`, in order. The data of real faces is nobody's to make."""
    found = []
    for need in needs(stage, config):
        if not finished(need, config) and (need not in DRAWN or config.data.synthetic):
            found += [*unfinished(need, config), need]
    return list(dict.fromkeys(found))


def make_inputs(stage: str, config, team, task=None, checkpoint: str = ""):
    """Run the stages whose results `stage` needs and that are not finished, the earliest first."""
    for need in needs(stage, config, checkpoint):
        if team.agree(finished(need, config, task)):
            continue
        make_inputs(need, config, team, task)
        arguments = [task] if need == "train_task" else []
        script = f"{need}.py" + (f" --task {task.name}" if arguments else "")
        path = result(need, config, task)
        why = made_of.not_taken(config, path.parent.name) if need in LENT else ""
        team.say(f"\n{path} is missing, so it is made first. The demo takes about {DEMO_SECONDS[need]} s "
                 f"for that on two cores. Only this step: {made_of.command(script, config)}{why}")
        began = time.time()
        MAIN[need](config, team, *arguments)
        team.say(f"made in {time.time() - began:.0f} s\n")


def run(stage: str, config, *arguments):
    """What a script does: join the processes, make missing inputs (synthetic data only), run the stage."""
    launch(_run, config, stage, *arguments)


def _run(config, team, stage, *arguments):
    if config.data.synthetic:
        synthetic.check_paths(config)
        if not team.agree(finished(stage, config, *arguments[:1])):
            make_inputs(stage, config, team, *arguments[:2])             # the task, and a checkpoint
    MAIN[stage](config, team, *arguments)


if __name__ == "__main__":
    config = from_command_line(__doc__)[0]
    rows = [(stage, None) for stage in ("synthetic", "train_pretrain", "train_finetune", "extract_features")]
    rows += [("train_task", task) for task in TASKS.values()]
    rows += [("train_stills", None), ("train_emma", None)] if config.data.s_aff_wild2 else []
    rows += [("train_cotex", None)] if config.data.drawn_faces else []
    for stage, task in rows:
        title = stage + (f" {task.name}" if task else "")
        print(f"{title:18s}{state(stage, config, task):12s}{result(stage, config, task)}")
