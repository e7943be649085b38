"""A run that is killed at any moment and started again, by hand or by torchrun, ends with the weights of an
undisturbed one."""

import io
import signal

import pytest

import tiny
from tiny import (EACH_STEP, QUICK_OR_SLOW, ROOT, STAGES, TINY, TRAIN_AU, Job, apart, assert_same, done,
                  log_numbers, ready, run, stop, weights)


# ---- Killed

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


@pytest.mark.parametrize("stage", QUICK_OR_SLOW)
def test_killed_at_any_moment_and_started_again_a_run_ends_with_the_same_bits(undisturbed, tmp_path, stage):
    """One folder for each moment, all at work at the same time."""
    places = {moment: ready(undisturbed, tmp_path / moment.replace(" ", "_"), stage) for moment in MOMENTS}
    command = [*STAGES[stage], *TINY, *EACH_STEP]
    jobs = {moment: Job(places[moment][0], *command, hook=hook) for moment, hook in MOMENTS.items()}
    assert {moment: job.end().codes for moment, job in jobs.items()} == {moment: [-9] for moment in MOMENTS}
    jobs = {moment: Job(places[moment][0], *command) for moment in MOMENTS}
    ended = {moment: job.end() for moment, job in jobs.items()}
    assert {moment: e.said for moment, e in ended.items() if e.codes != [0]} == {}
    for moment, (_, place) in places.items():
        goes_on = "going on from epoch" in ended[moment].said
        assert goes_on == (moment != "before the first checkpoint"), moment
        assert_same(place, undisturbed / "runs/tiny" / stage)


def test_the_whole_pipeline_killed_in_every_stage_ends_with_the_same_bits(undisturbed, tmp_path):
    """From nothing, by the one command: killed while drawing, in each training and in the extraction."""
    folder = tiny.write(tmp_path, **tiny.DROPOUT)
    for hook in (stop("synthetic.draw_video", 3),
                 stop("train_pretrain.draw_reconstruction", 1),
                 stop("train_finetune.count_classes", 1),
                 stop("vit.VisionTransformer.features", 12),
                 stop("train_task.score", 1)):
        assert run(folder, *TRAIN_AU, *EACH_STEP, hook=hook).codes == [-9]
    done(folder, *TRAIN_AU, *EACH_STEP)
    for stage in STAGES:
        assert_same(folder / "runs/tiny" / stage, undisturbed / "runs/tiny" / stage)
    for path in (undisturbed / "runs/tiny/features").glob("*.npy"):
        assert (folder / "runs/tiny/features" / path.name).read_bytes() == path.read_bytes()


# ---- Another number of processes or workers

@pytest.mark.parametrize("stage", QUICK_OR_SLOW)
def test_a_run_may_go_on_with_another_number_of_processes(finished, tmp_path, stage):
    folder, place = ready(finished, tmp_path, stage)
    command = [*STAGES[stage], *TINY, *EACH_STEP]
    for world, steps in ((2, 2), (1, 3), (2, None)):
        codes, said = run(folder, *command, world=world, hook=steps and stop("run.Run.end_step", steps))
        assert codes == [-9 if steps else 0] * world, said
    expected = finished / "runs/tiny" / stage
    assert apart(weights(place), weights(expected)) < 1e-5
    assert log_numbers(place) == pytest.approx(log_numbers(expected), rel=2e-5, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_three_processes_killed_and_started_again_end_with_the_same_bits(undisturbed, tmp_path, stage):
    """A sum of three depends on its order, so it must be the same in the first step after a restart as in
    any other."""
    command = [*STAGES[stage], *TINY]
    never_killed, expected = ready(undisturbed, tmp_path / "never_killed", stage)
    done(never_killed, *command, world=3)
    folder, place = ready(undisturbed, tmp_path / "killed", stage)
    codes, _ = run(folder, *command, *EACH_STEP, world=3, hook=stop("run.Run.end_step", 2))
    assert codes == [-9] * 3
    assert "going on from epoch 1, step " in done(folder, *command, world=3)
    assert_same(place, expected)


def test_workers_that_read_ahead_change_nothing(undisturbed, tmp_path):
    """Another run.workers is no other setting: a run may go on with it, to the same bits."""
    folder, place = ready(undisturbed, tmp_path, "finetune")
    command = [*STAGES["finetune"], *TINY]
    assert run(folder, *command, *EACH_STEP, hook=stop("run.Run.end_step", 3)).codes == [-9]
    done(folder, *command, "--set", "run.workers=2")
    assert_same(place, undisturbed / "runs/tiny/finetune")


# ---- Under torchrun

@pytest.mark.slow
def test_under_torchrun_a_run_stopped_then_killed_then_losing_a_worker_ends_with_the_same_bits(
        undisturbed_by_two, undisturbed, tmp_path):
    """torchrun passes SIGTERM on and ends; it dies with all workers at once; a worker dies and it starts
    the group again."""
    folder, place = ready(undisturbed, tmp_path, "task_au")

    def launched(hook, *options):
        torchrun = tiny.torchrun("--nproc_per_node=2", *options)
        return tiny.end(tiny.command(folder, *torchrun, ROOT / "tests/tiny.py", hook, *TRAIN_AU, *EACH_STEP))

    code, said = launched("told_to_stop")
    assert code not in (0, 2) and said.count("stopped by SIGTERM after step ") == 1
    assert (place / "last.pt").exists()
    code, said = launched("all_killed")
    assert code == -9 and "going on from epoch 1, step " in said
    code, said = launched("killed_once", "--max_restarts=3")
    assert code == 0 and said.count("going on from epoch") == 2, said
    assert_same(place, undisturbed_by_two)


@pytest.mark.slow
@pytest.mark.parametrize("hook", [None, "killed_once"])
def test_two_agents_of_one_process_each_train_as_one_agent_of_two(
        undisturbed_by_two, undisturbed, tmp_path, hook):
    """As on two machines; also when a worker of one is killed, and both agents start theirs again."""
    folder, place = ready(undisturbed, tmp_path, "task_au")
    meeting = tiny.torchrun("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", "--rdzv_id=tiny",
                            f"--rdzv_endpoint=localhost:{tiny.free_port()}", "--max_restarts=3")
    script = [ROOT / "tests/tiny.py", hook, "train_task.py"] if hook else [ROOT / "train_task.py"]
    agents = [tiny.command(folder, *meeting, *script, "--task", "au", *TINY, *EACH_STEP) for _ in range(2)]
    ended = [tiny.end(agent) for agent in agents]
    assert [code for code, _ in ended] == [0, 0], ended
    said = ended[0][1] + ended[1][1]                                        # only one process speaks
    assert said.count("x 2 processes") == 1 + bool(hook)
    assert said.count("going on from epoch 1, step ") == bool(hook)
    assert_same(place, undisturbed_by_two)
