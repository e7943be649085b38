"""Smoothing and thresholds: chosen where they are best, on videos that are neither trained on nor scored; the
score of another run beside."""

import numpy as np
import pytest

from labels import AU, EXPR, TASKS, VA, targets
from made_of import read_record
from postprocessing import Postprocessing, apply
from scoring import HELD_OUT, count_frames, read_sums
from splits import hold_out, scene
from tiny import TINY, TRAIN_AU, copied, done, metrics, run
from tuning import SMOOTH, THRESHOLDS, best_way, count_ways

of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def a_video(task, frames=120, noise=1.0, offset=0.0, seed=0):
    """Segments, outputs (S, w, K), target and valid: outputs that tell the label, with noise that a mean over
    some frames takes out."""
    rng, K = np.random.default_rng(seed), len(task.outputs)
    slow = np.sin(np.arange(frames)[:, None] / 25 + rng.uniform(0, 6, K))                # (T, K)
    labels = {"va": slow.clip(-1, 1), "expr": slow.argmax(axis=1), "au": slow > 0}[task.name]
    outputs = (slow + rng.normal(0, noise, slow.shape) + offset).astype(np.float32)
    return [(0, frames)], outputs[None], *targets(labels.astype(task.dtype), task)


@of_each_task
def test_the_sums_of_a_way_are_those_of_its_postprocessing(task):
    video = a_video(task)
    sums = count_ways(task, *video)
    for s, k in enumerate(SMOOTH):
        for t, threshold in enumerate(THRESHOLDS if task is AU else [0.5]):
            how = Postprocessing(k, (threshold,) * 12 if task is AU else ())
            assert sums[s, t] == pytest.approx(count_frames(task, *video, how=how), rel=1e-6), (k, threshold)
    assert sums.shape[:2] == (len(SMOOTH), 19 if task is AU else 1)


@of_each_task
def test_noise_is_smoothed_and_clean_outputs_are_left_alone(task):
    assert best_way(task, count_ways(task, *a_video(task, noise=2.0))).smooth >= 5
    assert best_way(task, count_ways(task, *a_video(task, noise=0.0))) .smooth == 0


def test_each_action_unit_gets_the_threshold_that_is_best_for_it_and_a_half_if_all_are_alike():
    offset = np.where(np.arange(12) % 2, 2.0, 0.0)          # each second one's outputs are too high
    how = best_way(AU, count_ways(AU, *a_video(AU, noise=0.1, offset=offset)))
    assert all(0.4 <= t <= 0.6 for t in how.thresholds[::2]) and all(t >= 0.8 for t in how.thresholds[1::2])
    nothing = np.zeros((len(SMOOTH), 19, 12, 4))
    assert best_way(AU, nothing) == Postprocessing(0, (0.5,) * 12)
    assert best_way(VA, np.zeros((len(SMOOTH), 1, 2, 6))) == Postprocessing()


def test_a_chosen_way_is_at_least_as_good_where_it_was_chosen():
    for seed in range(5):
        video = a_video(AU, noise=1.5, seed=seed)
        how = best_way(AU, count_ways(AU, *video))
        chosen, plain = (AU.metric.score(count_frames(AU, *video, how=each)).mean()
                         for each in (how, Postprocessing()))
        assert chosen >= plain


def test_without_postprocessing_the_outputs_stay_as_they_are():
    outputs = np.random.default_rng(0).normal(size=(9, 8)).astype(np.float32)
    assert apply(outputs, EXPR, Postprocessing()) is outputs


# ---- Held-out scenes

def files(folder, sizes: dict):
    for name, size in sizes.items():
        (folder / name).write_text("valence,arousal\n" + "0,0\n" * size)
    return {name: folder / name for name in sizes}


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5, 0.9])
def test_a_share_of_the_scenes_is_held_out_whole_large_and_small_ones_alike(tmp_path, share):
    sizes = {f"{i}{side}": 10 + i ** 2 for i in range(20) for side in ("_left", "_right")}
    kept, held = hold_out(files(tmp_path, sizes), share)
    assert kept.keys() | held.keys() == sizes.keys() and not kept.keys() & held.keys()
    assert not {scene(name) for name in kept} & {scene(name) for name in held}
    assert len(held) == 2 * int(20 * share + 0.5)
    mean = [np.mean([sizes[name] for name in part]) for part in (kept, held)]
    assert abs(mean[0] - mean[1]) < 0.25 * max(mean)
    assert list(kept) == [name for name in sizes if name in kept]            # in the order of before


def test_no_share_holds_nothing_out_and_one_that_leaves_nothing_is_refused(tmp_path):
    few = files(tmp_path, {"a": 1, "b_left": 2, "b_right": 3})
    assert hold_out(few, 0) == (few, {})
    assert hold_out(few, 0.5)[1].keys() == {"b_left", "b_right"}
    for share in (0.1, 0.2):
        with pytest.raises(ValueError, match=rf"task.held_out={share} takes 0 of 2 training scenes"):
            hold_out(few, share)


# ---- As a user does it

def test_a_run_that_holds_videos_back_chooses_on_them_and_is_compared_with_another(finished, tmp_path):
    folder = copied(finished, tmp_path)
    evaluate = ["evaluate.py", "--task", "au", *TINY]
    codes, said = run(folder, *evaluate, "--tune")
    assert codes == [2] and "none to choose on; train one that holds some back: python" in said
    own = ["--set", "task.held_out=0.4", "--set", "run.name=held", "--set", "run.base=tiny"]
    assert " ".join(["--set", "task.held_out=0.15", "--set", "run.name=tiny_held"]) in said
    said = done(folder, *TRAIN_AU, *own)
    assert "held-out mean F1" in said and "validation mean F1" not in said
    record = read_record(folder / "runs/held/task_au")
    trained, held = record["data"]["training videos"], record["data"][HELD_OUT]
    assert held and not {scene(name) for name in trained} & {scene(name) for name in held}

    text = done(folder, *evaluate, *own, "--tune", "--against", "tiny")
    assert f"chosen on {len(held)} held-out training videos: " in text
    assert "of them, so they are easier" in text
    names, theirs = read_sums(folder / "runs/tiny/task_au")
    assert f"against tiny ({AU.metric.score(theirs.sum(axis=0)).mean():.3f}, as its training" in text
    assert f"95 % interval over {len(names)} videos" in text
    same = done(folder, *evaluate, "--against", "tiny")
    assert "+0.000 [+0.000, +0.000] against tiny" in same and "do not tell which is better" in same
    assert f"{metrics(folder / 'runs/tiny/task_au')['score']:.3f}" in same
    codes, said = run(folder, *evaluate, "--against", "nobody")
    assert codes == [2] and "runs/nobody/task_au/video_sums.json not found" in said
