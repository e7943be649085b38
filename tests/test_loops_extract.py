"""Feature extraction against the ViT's features of one frame after another, and the order of the stages."""

import json
import zlib
from dataclasses import asdict

import numpy as np
import pytest
import torch

import extract_features
import pipeline
import run
import stages
import synthetic
import tiny
from images import normalise, read_image, resize
from labels import TASKS
from stages import FILMS, SETTINGS, STEP_SECONDS, checkpoint, metrics, settings
from vit import VisionTransformer

LENGTHS = {"1": 43, "2_left": 23, "2_right": 20, "3": 8, "4": 33, "5": 16, "6": 45, "7": 19, "9": 7, "96": 3}
WITH_FACES = [name for name in LENGTHS if name not in ("3", "96")]
OWN_FILES = {"config.yaml", "made_of.json", "videos.json", "metrics.json"}


def readable(name: str) -> list[int]:
    """Rows of the frames whose image can be read."""
    return [number - 1 for number in FILMS[name].images if number not in FILMS[name].broken]


# ---- Extraction

class Extracted:
    """All videos, extracted once, each in STEP_SECONDS on the tests' clock."""

    def __init__(self, folder):
        self.folder, self.out = folder, folder / "runs/tiny/features"
        stages.clean(self.out)
        extract = extract_features.extract

        def slowly(*arguments):
            run.time.tick()                                        # the clock of `stages.start`
            return extract(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(extract_features, "extract", slowly)
            self.said = stages.start(folder, "extract_features.py").splitlines()


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    return Extracted(stages.write(tmp_path_factory.mktemp("extract")))


def vit_of(folder, file: str) -> VisionTransformer:
    """The ViT of a fine-tuned checkpoint."""
    weights = checkpoint(folder / "runs/tiny/finetune", file)["model"]
    vit = VisionTransformer(**asdict(settings(folder).vit)).eval()
    vit.load_state_dict({name[4:]: value for name, value in weights.items() if name.startswith("vit.")})
    return vit


@torch.no_grad()
def feature_of(vit, folder, name: str, row: int) -> np.ndarray:
    """The cls token of one frame. Shape: (8,)"""
    pixels = resize(read_image(folder / f"frames/{name}/{row + 1:05d}.jpg"), (16, 16))
    return vit(normalise(torch.tensor(pixels)[None]))[0, 0].numpy()      # (1, 1 + N, D) -> (D,)


@pytest.mark.parametrize("name", WITH_FACES)
def test_each_frame_has_the_feature_of_its_face_or_of_the_last_face_before_it(extracted, name):
    features, noface = (np.load(extracted.out / f"{name}{end}") for end in (".npy", ".noface.npy"))
    rows, vit = readable(name), vit_of(extracted.folder, "best.pt")
    assert features.dtype == np.float16 and features.shape == (LENGTHS[name], 8)
    assert noface.dtype == bool and np.flatnonzero(~noface).tolist() == rows and len(noface) == LENGTHS[name]
    for row in range(LENGTHS[name]):
        before = [known for known in rows if known <= row]
        source = before[-1] if before else rows[0]
        assert (features[row] == features[source]).all()
        if source == row:
            alone = feature_of(vit, extracted.folder, name, row)
            assert features[row].astype(np.float32) == pytest.approx(alone, abs=2e-3)


def test_every_video_with_a_face_is_extracted_and_the_others_are_counted(extracted):
    arrays = {f"{name}{end}" for name in WITH_FACES for end in (".npy", ".noface.npy")}
    assert stages.files(extracted.out) == OWN_FILES | arrays
    frames, faces = sum(LENGTHS.values()), sum(len(readable(name)) for name in LENGTHS)
    assert metrics(extracted.out) == {"videos": 8, "frames": frames, "frames_without_face": frames - faces,
                                      "videos_without_any_face": 2}
    table = json.loads((extracted.out / "videos.json").read_text())
    assert {name: (row["frames"], row["images"], row["faces"]) for name, row in table.items()} == {
        name: (LENGTHS[name], len(FILMS[name].images), len(readable(name))) for name in LENGTHS}
    best = (extracted.folder / "runs/tiny/finetune/best.pt").read_bytes()
    record = json.loads((extracted.out / "made_of.json").read_text())
    assert record["from"]["checksum"] == zlib.crc32(best) and record["settings"]["finetune.token"] == "cls"
    assert record["from"]["from"]["stage"] == "pretrain" and record["from"]["from"]["from"] is None


def test_an_extraction_says_what_it_reads_what_it_leaves_out_and_how_long_it_takes(extracted):
    order = sorted(LENGTHS, key=lambda name: (-LENGTHS[name], name))              # the longest first
    total, done, lines = sum(LENGTHS.values()), 0, []
    for count, name in enumerate(order, 1):
        first_batch = min(SETTINGS["features"]["batch"], len(FILMS[name].images)) or LENGTHS[name]
        seconds, known = STEP_SECONDS * count, done + first_batch
        minutes, left = divmod(int((total - known) * seconds / known), 60)
        lines.append(f"  {known} of {total} frames  {known / seconds:.1f} frames/s  "
                     f"0:{minutes:02d}:{left:02d} left")
        if FILMS[name].broken:
            first, *others = FILMS[name].broken
            more = f" and {len(others)} more of this video" if others else ""
            lines.append(f"  left out: frames/{name}/{first:05d}.jpg{more}")
        done += LENGTHS[name]
    faces = sum(len(readable(name)) for name in LENGTHS)
    said = []
    for line in extracted.said:
        start, found, reason = line.partition(": not a readable image (")
        said.append(start + reason.partition(")")[2] if found else line)
    assert said == [
        f"extracting 8 numbers per frame from 10 of 10 videos, {total} frames, on cpu; "
        "at most 0 MB of images wait in each process",
        "  ViT from runs/tiny/finetune/best.pt; missing keys: none; unexpected keys, left out: none",
        *lines,
        f"features are finished: {total} frames, {total - faces} of them without a face image, "
        "in runs/tiny/features"]


def test_a_stopped_extraction_goes_on_with_the_videos_that_are_left(extracted, tmp_path):
    folder = tiny.copied(extracted.folder, tmp_path)
    out = folder / "runs/tiny/features"
    arrays = {path.name: path.read_bytes() for path in out.glob("*.npy")}
    for name in ("metrics.json", "6.npy", "2_left.npy", "2_left.noface.npy"):     # 6: stopped between its two
        (out / name).unlink()
    written = {path.name: path.stat().st_mtime_ns for path in out.glob("*.npy") if path.name[0] not in "26"}
    said = stages.start(folder, "extract_features.py").splitlines()
    assert said[0].startswith(f"extracting 8 numbers per frame from 2 of 10 videos, {45 + 23} frames")
    assert {path.name: path.read_bytes() for path in out.glob("*.npy")} == arrays
    assert all((out / name).stat().st_mtime_ns == time for name, time in written.items())
    assert metrics(out) == metrics(extracted.out) and said[-1] == extracted.said[-1]
    assert stages.start(folder, "extract_features.py") == "runs/tiny/features is finished; nothing to do\n"


def test_features_may_come_from_any_checkpoint_and_any_token(extracted):
    folder = extracted.folder
    options = ["run.name=other", "features.checkpoint=runs/tiny/finetune/last.pt", "finetune.token=mean"]
    stages.start(folder, "extract_features.py", *stages.overriding(options))
    pixels = resize(read_image(folder / "frames/4/00033.jpg"), (16, 16))
    tokens = vit_of(folder, "last.pt")(normalise(torch.tensor(pixels)[None]))
    mean = tokens[0, 1:].mean(dim=0).detach().numpy()                             # (1, 1 + N, D) -> (D,)
    given, own = (np.load(folder / f"runs/{name}/features/4.npy")[32] for name in ("other", "tiny"))
    given, own = given.astype(float), own.astype(float)
    assert given == pytest.approx(mean, abs=2e-3) and abs(given - own).max() > 0.1


# ---- The order of the stages

SCRIPTS = {"train_pretrain": [], "train_finetune": [], "extract_features": [], "train_task": ["--task", "au"],
           "evaluate": ["--task", "au"]}
ALL = ["synthetic", *SCRIPTS]
FOLDERS = {"train_pretrain": "pretrain", "train_finetune": "finetune", "extract_features": "features",
           "train_task": "task_au"}
RESULTS = {"synthetic": "data/complete.json", "train_pretrain": "runs/tiny/pretrain/last.pt",
           "train_finetune": "runs/tiny/finetune/best.pt",
           "extract_features": "runs/tiny/features/metrics.json", "train_task": "runs/tiny/task_au/best.pt"}


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The names of the stages that ran, in tmp_path: stand-ins, which only leave a metrics.json."""
    names = []

    def stand_in(stage):
        def main(config, team, *arguments):
            names.append(stage)
            if stage in FOLDERS:
                config.folder(FOLDERS[stage]).mkdir(parents=True, exist_ok=True)
                (config.folder(FOLDERS[stage]) / "metrics.json").write_text("{}")
        return main

    for stage in ALL:
        monkeypatch.setitem(pipeline.MAIN, stage, stand_in(stage))
    monkeypatch.setattr(synthetic, "is_complete", lambda root, sizes: "synthetic" in names)
    tiny.write(tmp_path)
    return names


def start(folder, stage: str, *options: str) -> str:
    return stages.start(folder, f"{stage}.py", *SCRIPTS[stage], *stages.overriding(options))


@pytest.mark.parametrize("stage", SCRIPTS)
def test_with_synthetic_data_a_stage_makes_all_that_is_missing_in_order_and_once(tmp_path, ran, stage):
    said = start(tmp_path, stage)
    before = ALL[:ALL.index(stage)]
    assert ran == [*before, stage]
    commands = {name: f"python {tiny.ROOT / name}.py" + (" --task au" if name == "train_task" else "")
                for name in before}
    assert [line for line in said.splitlines() if "missing" in line] == [
        f"{RESULTS[name]} is missing, so it is made first. The demo takes about "
        f"{pipeline.DEMO_SECONDS[name]} s for that on two cores. Only this step: {commands[name]} "
        "--config tiny.yaml" for name in before]
    assert said.count("made in 0 s\n") == len(before)
    ran_before = len(ran)
    start(tmp_path, stage)
    assert ran[ran_before:] == [stage]


@pytest.mark.parametrize("stage, option, needed", [
    ("train_finetune", "finetune.start=none", ["synthetic"]),
    ("extract_features", "features.checkpoint=vit.pt", ["synthetic"]),
    ("extract_features", "finetune.start=none", ["synthetic", "train_finetune"]),
    ("train_task", "task.features=features", ["synthetic"]),
    ("evaluate", "task.features=features", ["synthetic", "train_task"])])
def test_a_path_in_the_settings_takes_the_place_of_a_stage(tmp_path, ran, stage, option, needed):
    start(tmp_path, stage, option)
    assert ran == [*needed, stage]


def test_the_evaluation_of_a_given_checkpoint_needs_features_and_no_training(tmp_path, ran):
    stages.start(tmp_path, "evaluate.py", "--task", "au", "--checkpoint", "best.pt")
    assert ran == [*ALL[:4], "evaluate"]


def test_a_finished_stage_asks_for_no_input(tmp_path, ran):
    start(tmp_path, "train_task")
    for stage in ("train_pretrain", "train_finetune", "extract_features"):
        (tmp_path / "runs/tiny" / FOLDERS[stage] / "metrics.json").unlink()
    ran.clear()                                                   # the data is gone, too
    start(tmp_path, "train_task")
    assert ran == ["train_task"]


def test_each_fold_is_a_training_of_its_own(tmp_path, ran):
    start(tmp_path, "train_task")
    start(tmp_path, "evaluate", "task.fold=1")
    assert ran[-2:] == ["train_task", "evaluate"]


def test_a_training_that_has_weights_but_has_not_ended_is_not_finished(tmp_path, ran):
    (tmp_path / "runs/tiny/finetune").mkdir(parents=True)
    (tmp_path / "runs/tiny/finetune/best.pt").write_bytes(b"weights")
    start(tmp_path, "extract_features")
    assert "train_finetune" in ran


@pytest.mark.parametrize("stage", SCRIPTS)
def test_with_real_data_nothing_is_made(tmp_path, ran, stage):
    start(tmp_path, stage, "data.synthetic=false")
    assert ran == [stage]


def test_the_pipeline_tells_which_stages_are_finished(tmp_path, ran):
    start(tmp_path, "extract_features")
    rows = stages.start(tmp_path, "pipeline.py").splitlines()
    assert [row.split() for row in rows] == [
        ["synthetic", "finished", "data/complete.json"],
        ["train_pretrain", "stale", "runs/tiny/pretrain/last.pt"],             # it left no record
        ["train_finetune", "stale", "runs/tiny/finetune/best.pt"],
        ["extract_features", "stale", "runs/tiny/features/metrics.json"],
        *(["train_task", task, "to", "be", "made", f"runs/tiny/task_{task}/best.pt"] for task in TASKS),
        *([f"train_{name}", "to", "be", "made", f"runs/tiny/{name}/best.pt"]
          for name in ("stills", "emma", "cotex"))]


def test_the_pipeline_tells_what_is_stale(extracted):
    def states(*options):
        rows = stages.start(extracted.folder, "pipeline.py", *stages.overriding(options)).splitlines()
        return [row.split()[1] for row in rows[1:4]]
    assert states() == ["finished"] * 3
    assert states("finetune.lr=1") == ["finished", "stale", "stale"]


@pytest.mark.parametrize("stage, missing, maker", [
    ("train_finetune", "pretrain/last.pt", "train_pretrain.py"),
    ("extract_features", "finetune/best.pt", "train_finetune.py"),
    ("train_task", "features/metrics.json", "extract_features.py"),
    ("evaluate", "task_au/best.pt", "train_task.py --task au")])
def test_a_stage_without_its_input_refuses_with_the_command_that_makes_it(extracted, tmp_path, capsys, stage,
                                                                         missing, maker):
    folder = tiny.copied(extracted.folder, tmp_path)
    for finished in ((folder / "runs/tiny" / missing).parent, folder / "runs/tiny" / FOLDERS.get(stage, "")):
        (finished / "metrics.json").unlink(missing_ok=True)
    with pytest.raises(SystemExit) as end:
        start(folder, stage)
    assert end.value.code == 2
    assert capsys.readouterr().err == (f"error: runs/tiny/{missing} not found; make it with: python "
                                       f"{tiny.ROOT / maker} --config tiny.yaml\n")
