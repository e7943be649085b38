"""Killed, stopped, restarted, refused: however a run is interrupted, the same command ends with the weights
of an undisturbed one."""

import errno
import io
import math
import os
import re
import shutil
import signal
import time
from functools import partial

import pytest
import torch

import tiny
from tiny import ROOT, STAGES, TINY, Job, apart, content, copied, done, log, run, same, stop, weights

EACH_STEP = ["--set", "run.checkpoint_minutes=1e-9"]       # a checkpoint after every step


def ready(source, folder, stage):
    """A copy of a finished pipeline in which this stage has not begun. -> the copy, the stage's folder in
    it"""
    copied(source, folder, [stage])
    return folder, folder / "runs/tiny" / stage


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All stages undisturbed in one process, with dropout. Shared: work on a copy."""
    folder = tiny.write(
        tmp_path_factory.mktemp("whole"), finetune={"dropout": 0.2}, temporal={"dropout": 0.2}
    )
    done(folder, *STAGES["task_au"], *TINY)
    return folder


@pytest.fixture(scope="module")
def exact(whole, tmp_path_factory):
    """The same without dropout, whose masks differ with the number of processes."""
    folder = tiny.write(tmp_path_factory.mktemp("exact"))
    shutil.copytree(whole / "data", folder / "data")
    done(folder, *STAGES["task_au"], *TINY)
    return folder


@pytest.fixture(scope="module")
def pair(whole, tmp_path_factory):
    """The task undisturbed in two processes, with dropout. -> its folder"""
    folder, stage = ready(whole, tmp_path_factory.mktemp("pair"), "task_au")
    done(folder, *STAGES["task_au"], *TINY, world=2)
    return stage


def assert_same(folder, expected):
    """Weights and log of two run folders, bit for bit."""
    assert same(weights(folder), weights(expected)) and log(folder) == log(expected)
    assert (folder / "metrics.json").read_bytes() == (expected / "metrics.json").read_bytes()
    if (expected / "best.pt").exists():
        assert same(weights(folder, "best.pt"), weights(expected, "best.pt"))


# --- killed ----------------------------------------------------------------------------------------------

def between_the_renames():
    """Killed when the checkpoint before has been put aside and the new one has not taken its place."""
    calls = 0

    def counting(replace):
        def function(source, target):
            nonlocal calls
            calls += str(target).endswith("last.pt")
            if calls == 3 and str(target).endswith("last.pt"):
                tiny.send(signal.SIGKILL)
            return replace(source, target)
        return function
    tiny.instead("os.replace", counting)


def half_written():
    """Killed with half of a checkpoint in the file."""
    calls = 0

    def counting(save):
        def function(state, file):
            nonlocal calls
            calls += 1
            if calls < 4:
                return save(state, file)
            whole = io.BytesIO()
            save(state, whole)
            file.write(whole.getvalue()[:len(whole.getvalue()) // 2])
            file.flush()
            tiny.send(signal.SIGKILL)
        return function
    tiny.instead("torch.save", counting)


MOMENTS = {"before the first checkpoint": stop("run.Run.end_step", 1, after=False),
           "in the first epoch": stop("run.Run.end_step", 2),
           "in the second epoch": stop("run.Run.end_step", 7),
           "after the last step of an epoch": stop("run_folder.RunFolder.log", 1, after=False),
           "after the row of an epoch": stop("run_folder.RunFolder.log", 1),
           "while a checkpoint is written": half_written,
           "between the two renames": between_the_renames,
           "after the last step": stop("run.Run.end", 1, after=False),
           "before the metrics": stop("run_folder.RunFolder.finish", 1, after=False)}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_at_any_moment_and_started_again_a_run_ends_with_the_same_bits(whole, tmp_path, stage):
    """One folder for each moment, all at work at the same time."""
    places = {moment: ready(whole, tmp_path / moment.replace(" ", "_"), stage) for moment in MOMENTS}
    command = [*STAGES[stage], *TINY, *EACH_STEP]
    jobs = {moment: Job(places[moment][0], *command, hook=hook) for moment, hook in MOMENTS.items()}
    assert {moment: job.end().codes for moment, job in jobs.items()} == {moment: [-9] for moment in MOMENTS}
    jobs = {moment: Job(places[moment][0], *command) for moment in MOMENTS}
    ended = {moment: job.end() for moment, job in jobs.items()}
    assert {moment: e.said for moment, e in ended.items() if e.codes != [0]} == {}
    for moment, (folder, place) in places.items():
        assert ("going on from epoch" in ended[moment].said) == (moment != "before the first checkpoint"), (
            moment
        )
        assert_same(place, whole / "runs/tiny" / stage)


def test_the_whole_pipeline_killed_in_every_stage_ends_with_the_same_bits(whole, tmp_path):
    """From nothing, by the one command: killed while drawing, in each training and in the extraction."""
    folder = tiny.write(tmp_path, finetune={"dropout": 0.2}, temporal={"dropout": 0.2})
    command = [*STAGES["task_au"], *TINY, *EACH_STEP]
    for hook in (
        stop("synthetic.draw_video", 3),
        stop("train_pretrain.draw_reconstruction", 1),
        stop("train_finetune.validate", 1),
        stop("vit.VisionTransformer.features", 12),
        stop("train_task.score", 1),
    ):
        assert run(folder, *command, hook=hook).codes == [-9]
    done(folder, *command)
    for stage in STAGES:
        assert_same(folder / "runs/tiny" / stage, whole / "runs/tiny" / stage)
    for path in (whole / "runs/tiny/features").glob("*.npy"):
        assert (folder / "runs/tiny/features" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_may_go_on_with_another_number_of_processes(exact, tmp_path, stage):
    folder, place = ready(exact, tmp_path, stage)
    command = [*STAGES[stage], *TINY, *EACH_STEP]
    for world, steps in ((2, 2), (1, 3), (2, None)):
        codes, said = run(folder, *command, world=world, hook=steps and stop("run.Run.end_step", steps))
        assert codes == [-9 if steps else 0] * world, said
    assert apart(weights(place), weights(exact / "runs/tiny" / stage)) < 1e-5
    for mine, theirs in zip(log(place), log(exact / "runs/tiny" / stage), strict=True):
        assert [float(v) for v in mine.values()] == pytest.approx(
            [float(v) for v in theirs.values()], rel=2e-5, abs=1e-6
        )


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_three_processes_killed_and_started_again_end_with_the_same_bits(whole, tmp_path, stage):
    """A sum of three depends on its order, so it must be the same in the first step after a restart as in
    any other."""
    undisturbed, expected = ready(whole, tmp_path / "undisturbed", stage)
    done(undisturbed, *STAGES[stage], *TINY, world=3)
    folder, place = ready(whole, tmp_path / "killed", stage)
    assert (
        run(folder, *STAGES[stage], *TINY, *EACH_STEP, world=3, hook=stop("run.Run.end_step", 2)).codes
        == [-9] * 3
    )
    assert "going on from epoch 1, step " in done(folder, *STAGES[stage], *TINY, world=3)
    assert_same(place, expected)


def test_workers_that_read_ahead_change_nothing(whole, tmp_path):
    """Another run.workers is no other setting: a run may go on with it, to the same bits."""
    folder, place = ready(whole, tmp_path, "finetune")
    command = [*STAGES["finetune"], *TINY]
    assert run(folder, *command, *EACH_STEP, hook=stop("run.Run.end_step", 3)).codes == [-9]
    done(folder, *command, "--set", "run.workers=2")
    assert_same(place, whole / "runs/tiny/finetune")


# --- stopped ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("stage", STAGES)
def test_a_stopped_run_saves_says_so_and_goes_on_to_the_same_bits(whole, tmp_path, stage):
    """SIGTERM and SIGINT, in a step, in the last step of an epoch, and between two epochs; without
    checkpoints of its own."""
    folder, place = ready(whole, tmp_path, stage)
    command = [*STAGES[stage], *TINY]
    for number, code, place_and_count in (
        (signal.SIGTERM, 143, ("run.Run.end_step", 2)),
        (signal.SIGINT, 130, ("run.Run.end_step", 1)),
        (signal.SIGTERM, 143, ("run_folder.RunFolder.log", 1)),
    ):
        codes, said = run(folder, *command, hook=stop(*place_and_count, number))
        assert codes == [code] and "Traceback" not in said
        assert re.search(
            rf"stopped by {number.name} after step \d+; saved, start the same command again to go on", said
        )
        assert (place / "last.pt").exists() and not (place / "metrics.json").exists()
    assert "going on from epoch" in done(folder, *command)
    assert_same(place, whole / "runs/tiny" / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_stopped_in_the_last_step_of_an_epoch_a_run_goes_on_to_the_same_bits(whole, tmp_path, stage):
    folder, place = ready(whole, tmp_path, stage)
    command = [*STAGES[stage], *TINY]
    steps = (
        int(
            re.search(
                r"after step (\d+)",
                run(folder, *command, hook=stop("run_folder.RunFolder.log", 1, signal.SIGTERM)).said,
            )[1]
        )
        - 1
    )
    shutil.rmtree(place)
    codes, said = run(folder, *command, hook=stop("run.Run.end_step", steps, signal.SIGTERM, after=False))
    assert codes == [143] and f"stopped by SIGTERM after step {steps};" in said
    done(folder, *command)
    assert_same(place, whole / "runs/tiny" / stage)


@pytest.mark.parametrize("stage, validated, before", [("finetune", "vit.VisionTransformer.features", 5),
                                                      ("task_au", "scoring.predict", 0)])
@pytest.mark.parametrize("world, calls", [(1, 2), (2, 1), (1, 0)], ids=["one process", "two", "just before"])
def test_stopped_in_a_validation_a_run_does_not_wait_for_its_end(
    exact, tmp_path, stage, validated, before, world, calls
):
    """torchrun and schedulers kill what is still there after half a minute, and a validation may take longer.

    `before`: how often the function is called in the five steps of the first epoch.
    """
    folder, place = ready(exact, tmp_path, stage)
    command = [*STAGES[stage], *TINY]
    hook = stop(validated, before + calls, signal.SIGTERM)
    if not calls:
        hook = stop("run.Run.unless_stopped", 1, signal.SIGTERM, after=False)
    codes, said = run(folder, *command, world=world, hook=hook)
    assert codes == [143] * world and "stopped by SIGTERM after step 5; saved" in said
    assert not (place / "log.csv").exists() and not (place / "best.pt").exists()
    said = done(folder, *command)
    assert "going on from epoch 1, step " in said
    assert apart(weights(place), weights(exact / "runs/tiny" / stage)) < 1e-5


def test_one_process_of_two_that_is_told_to_stop_in_a_validation_stops_both(pair, whole, tmp_path):
    """The one that does not save must not leave before the other has."""
    folder, place = ready(whole, tmp_path, "task_au")
    codes, said = run(
        folder,
        *STAGES["task_au"],
        *TINY,
        world=2,
        hook=partial(only, 1, stop("scoring.predict", 1, signal.SIGTERM)),
    )
    assert codes == [143, 143] and said.count("; saved, start the same command again") == 1
    done(folder, *STAGES["task_au"], *TINY, world=2)
    assert_same(place, pair)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_after_the_last_step_of_a_stage_is_not_forgotten(whole, tmp_path, number, code):
    """The next stage must not begin: a scheduler would kill it."""
    folder = copied(whole, tmp_path, ["finetune", "features", "task_au"])
    codes, said = run(folder, *STAGES["task_au"], *TINY, hook=stop("run_folder.RunFolder.log", 2, number))
    assert codes == [code] and f"stopped by {number.name}" in said and "extracting" not in said
    done(folder, *STAGES["task_au"], *TINY)
    assert_same(folder / "runs/tiny/task_au", whole / "runs/tiny/task_au")


def test_one_process_of_two_that_is_told_to_stop_stops_both(pair, whole, tmp_path):
    folder, place = ready(whole, tmp_path, "task_au")
    command = [*STAGES["task_au"], *TINY]
    codes, said = run(
        folder,
        *command,
        world=2,
        hook=partial(only, 1, stop("run.Run.end_step", 4, signal.SIGTERM, after=False)),
    )
    assert codes == [143, 143] and said.count("stopped by SIGTERM after step 4; saved") == 1
    done(folder, *command, world=2)
    assert_same(place, pair)


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_workers_that_are_told_to_stop_too_go_on_until_the_run_has_saved(pair, whole, tmp_path, number, code):
    """A scheduler, torchrun and a terminal all send their signal to the whole process group."""
    folder, place = ready(whole, tmp_path, "task_au")
    command, reading = [*STAGES["task_au"], *TINY], ["--set", "run.workers=2"]
    codes, said = run(folder, *command, *reading, world=2, hook=partial(group_told, number))
    assert (
        codes == [code] * 2
        and said.count(f"stopped by {number.name} after step 4; saved") == 1
        and "worker" not in said
    )
    done(folder, *command, world=2)
    assert_same(place, pair)


def group_told(number):
    os.setsid()
    tiny.at("run.Run.end_step", 4, lambda *ignored: os.killpg(0, number), after=False)


@pytest.mark.parametrize("world", [1, 2])
def test_a_worker_that_fails_ends_the_run(whole, tmp_path, world):
    """The other workers are not waited for, and the other process says so in one line."""
    folder, _ = ready(whole, tmp_path, "task_au")
    hook = partial(tiny.at, "segments.SegmentData.__getitem__", 2, disk_error)
    codes, said = run(folder, *STAGES["task_au"], *TINY, "--set", "run.workers=2", world=world, hook=hook)
    assert set(codes) <= {1, 2} and 2 in codes and "OSError: the disk is gone" in said
    assert (
        codes.count(1)
        == said.count("error: another process of this run has ended; see its message or exit code")
        and "RuntimeError" not in said
    )


def disk_error(*ignored):
    raise OSError("the disk is gone")


def only(rank, hook):
    if os.environ["RANK"] == str(rank):
        hook()


# --- under torchrun --------------------------------------------------------------------------------------

def test_under_torchrun_a_run_stopped_then_killed_then_losing_a_worker_ends_with_the_same_bits(
    pair, whole, tmp_path
):
    """torchrun passes SIGTERM on and ends; it dies with all workers at once; a worker dies and it starts
    the group again."""
    folder, place = ready(whole, tmp_path, "task_au")
    script = [*STAGES["task_au"], *TINY, *EACH_STEP]

    def launched(hook, *options):
        return tiny.end(
            tiny.command(
                folder, *tiny.torchrun("--nproc_per_node=2", *options), ROOT / "tests/tiny.py", hook, *script
            )
        )

    code, said = launched("told_to_stop")
    assert (
        code not in (0, 2)
        and said.count("stopped by SIGTERM after step ") == 1
        and (place / "last.pt").exists()
    )
    code, said = launched("all_killed")
    assert code == -9 and "going on from epoch 1, step " in said
    code, said = launched("killed_once", "--max_restarts=3")
    assert code == 0 and said.count("going on from epoch") == 2, said
    assert_same(place, pair)


@pytest.mark.parametrize("hook", [None, "killed_once"])
def test_two_agents_of_one_process_each_train_as_one_agent_of_two(pair, whole, tmp_path, hook):
    """As on two machines; also when a worker of one is killed, and both agents start theirs again."""
    folder, place = ready(whole, tmp_path, "task_au")
    meeting = tiny.torchrun(
        "--nnodes=2",
        "--nproc_per_node=1",
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=localhost:{tiny.free_port()}",
        "--rdzv_id=tiny",
        "--max_restarts=3",
    )
    script = [ROOT / "tests/tiny.py", hook, "train_task.py"] if hook else [ROOT / "train_task.py"]
    agents = [tiny.command(folder, *meeting, *script, "--task", "au", *TINY, *EACH_STEP) for _ in range(2)]
    ended = [tiny.end(agent) for agent in agents]
    assert [code for code, _ in ended] == [0, 0], ended
    said = ended[0][1] + ended[1][1]
    assert said.count("x 2 processes") == 1 + bool(hook) and said.count(
        "going on from epoch 1, step "
    ) == bool(hook)  # one process speaks
    assert_same(place, pair)


# --- refused ---------------------------------------------------------------------------------------------

def held(folder):
    """At the third step, wait until there is a file named go."""
    (folder / "waiting").touch()
    limit = time.monotonic() + 60
    while not (folder / "go").exists() and time.monotonic() < limit:
        time.sleep(0.01)


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(whole, tmp_path):
    folder, place = ready(whole, tmp_path, "task_au")
    command = [*STAGES["task_au"], *TINY]
    first = Job(folder, *command, hook=partial(tiny.at, "run.Run.end_step", 3, partial(call, held, folder)))
    try:
        limit = time.monotonic() + 60
        while not (folder / "waiting").exists():
            assert time.monotonic() < limit, first.said()
            time.sleep(0.01)
        before = content(place)
        for world in (1, 2):
            codes, said = run(folder, *command, world=world)
            assert (
                codes == [2] * world
                and "error: runs/tiny/task_au: another run is writing here; wait for it, or choose another"
                in said
            )
        assert content(place) == before
    finally:
        (folder / "go").touch()
        assert first.end().codes == [0]
    assert_same(place, whole / "runs/tiny/task_au")


def call(function, argument, *ignored):
    function(argument)


@pytest.mark.parametrize("stage, field, old, new", [("pretrain", "pretrain.lr", 0.003, 0.001), ("pretrain", "run.seed", 0, 1),
                                                    ("finetune", "finetune.dropout", 0.2, 0.1), ("task_au", "task.batch", 3, 4)])
def test_a_changed_setting_is_refused_and_named(whole, tmp_path, stage, field, old, new):
    folder, place = ready(whole, tmp_path, stage)
    command = [*STAGES[stage], *TINY, *EACH_STEP]
    assert run(folder, *command, hook=stop("run.Run.end_step", 2)).codes == [-9]
    before = content(place)
    codes, said = run(folder, *command, "--set", f"{field}={new}")
    assert codes == [2] and said == (
        f"error: runs/tiny/{stage} was made with other settings; choose another --set run.name=..., or delete it\n"
        f"  {field}: was {old}, now {new}\n"
    )
    assert content(place) == before


def test_a_run_does_not_go_on_with_less_data_than_it_began_with(whole, tmp_path):
    """As when a disk is not mounted after a restart."""
    for stage, gone, before in (
        ("pretrain", "data/RAF-DB", "AffectNet 2017"),
        ("finetune", "data/Aff-Wild2/cropped_aligned", "training frames"),
        ("task_au", "runs/tiny/features", "segments"),
    ):
        folder, place = ready(whole, tmp_path / stage, stage)
        command = [*STAGES[stage], *TINY, *EACH_STEP]
        assert run(folder, *command, hook=stop("run.Run.end_step", 2)).codes == [-9]
        kept = {name: file for name, (file, _) in content(place).items()}
        victim = next(
            p
            for p in sorted((folder / gone).rglob("*"))
            if p.suffix in (".jpg", ".npy") and "noface" not in p.name
        )
        victim.rename(folder / "elsewhere")
        codes, said = run(folder, *command)
        assert (
            codes == [2]
            and f"runs/tiny/{stage}: began with {{'{before}'" in said
            and "bring back what it began with" in said
        ), said
        assert {name: file for name, (file, _) in content(place).items()} == kept
        (folder / "elsewhere").rename(victim)
        done(folder, *command)
        assert_same(place, whole / "runs/tiny" / stage)


def test_a_setting_of_another_stage_is_no_reason_to_refuse(whole, tmp_path):
    folder, place = ready(whole, tmp_path, "task_au")
    done(
        folder,
        *STAGES["task_au"],
        *TINY,
        "--set",
        "task.features=",
        "--set",
        "run.checkpoint_minutes=3",
        "--set",
        "pretrain.lr=1",
    )
    assert_same(place, whole / "runs/tiny/task_au")


# --- a full disk, a loss that is not finite --------------------------------------------------------------

class Full(io.FileIO):
    """A file on a disk with 1000 bytes left."""
    room = 1000

    def write(self, block):
        Full.room -= len(block)
        if Full.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(block)


def full_disk(buffered, fits=4):
    """After `fits` files that write_file has written, the disk is full. torch.save sees it in two ways."""
    import checkpoints
    count = 0

    def opened(path, mode="r", **keywords):
        nonlocal count
        count += mode == "wb"
        if mode != "wb" or count <= fits:
            return open(path, mode, **keywords)
        return io.BufferedWriter(Full(path, "w")) if buffered else Full(path, "w")
    checkpoints.open = opened


@pytest.mark.parametrize("buffered", [True, False], ids=["buffered", "not buffered"])
@pytest.mark.parametrize("stage", STAGES)
def test_a_full_disk_stops_the_run_with_a_message_and_the_last_checkpoint_goes_on(
    whole, tmp_path, stage, buffered
):
    folder, place = ready(whole, tmp_path, stage)
    command = [*STAGES[stage], *TINY, *EACH_STEP]
    codes, said = run(folder, *command, hook=partial(full_disk, buffered))
    assert codes == [2] and "Traceback" not in said, said
    assert (
        "No space left on device; free some space and start the same command again, the last checkpoint is intact"
        in said
    )
    steps = torch.load(place / "last.pt", weights_only=True)["step"]
    assert steps == 2 and not list(place.glob("*.tmp")) and not list(place.glob(".*.tmp"))
    assert "going on from epoch 1, step 2" in done(folder, *command)
    assert_same(place, whole / "runs/tiny" / stage)


def test_a_full_disk_stops_an_extraction_with_a_message_and_the_videos_that_are_done_stay(whole, tmp_path):
    folder, place = ready(whole, tmp_path, "features")
    codes, said = run(folder, "extract_features.py", *TINY, hook=partial(full_disk, True, 6))
    assert (
        codes == [2]
        and "No space left on device; free some space and start the same command again" in said
        and "Traceback" not in said
    )
    assert 2 <= len(list(place.glob("*.npy"))) < 2 * 7 and not list(
        place.glob(".*.tmp")
    )  # an array and a mask per video
    done(folder, "extract_features.py", *TINY)
    for path in (whole / "runs/tiny/features").glob("*.npy"):
        assert (place / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    "stage, section", [("pretrain", "pretrain"), ("finetune", "finetune"), ("task_au", "task")]
)
@pytest.mark.parametrize("world", [1, 2])
def test_a_loss_that_is_not_finite_stops_the_run_with_a_report_and_the_last_finite_checkpoint(
    whole, tmp_path, stage, section, world
):
    folder, place = ready(whole, tmp_path, stage)
    for _ in range(2):  # and again from the checkpoint, which is finite but hopeless
        codes, said = run(
            folder, *STAGES[stage], *TINY, *EACH_STEP, "--set", f"{section}.lr=1e30", world=world
        )
        assert codes == [2] * world and "Traceback" not in said
        report = re.search(r"error: the loss is \S+, the gradient norm \S+ at epoch 1, step \d+, learning rate \S+; "
                           r"the (\d+) samples of this step are listed in (\S+)\n", said)
        assert report and "Two things to try: a lower learning rate" in said, said
        samples = (folder / report[2]).read_text().splitlines()
        assert len(samples) == int(report[1]) == tiny.SETTINGS[section]["batch"]
        assert all(re.search(r"\.jpg$|line \d+$|frames \d+ to \d+$", sample) for sample in samples)
        saved = torch.load(place / "last.pt", weights_only=True)
        assert all(value.isfinite().all() for value in saved["model"].values())
        assert math.isfinite(saved["sums"]["loss"])
        assert not (place / "metrics.json").exists()
