"""Whole videos: overlapping segments averaged, and each labelled frame scored once, by one process; which
checkpoints may be scored."""

import contextlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

import losses
import scoring
from distributed import Team
from labels import AU, EXPR, TASKS, VA, targets
from made_of import settings_of
from metrics import binary_f1, ccc, class_f1
from scoring import (check_features, check_scenes, check_task, count_as_authors, find_features, load, merged,
                     predict, read_sums, score, shared_out, stage_of, triangle, write_sums)
from segments import SegmentData, Video, pad, read_features, segments
from settings import Config
from temporal import SegmentModel

ALONE = Team(0, 1, torch.device("cpu"))
SMALL = dict(channels=(8, 8), kernels=(3, 3), dilations=(1, 2), width=16, layers=1, heads=2, hidden=16,
             head=8)
of_each_task = pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)


def counting(frames, dim=1):
    """Features of a video: frame t's is t. float16 holds whole numbers to 2,048."""
    return np.tile(np.arange(frames, dtype=np.float16)[:, None], (1, dim))


def video(folder, name, labels):
    """A labelled video. Its features go on for five frames more than its labels, which must not matter."""
    np.save(folder / f"{name}.npy", counting(len(labels) + 5))
    return Video(name, folder / f"{name}.npy", labels)


def drawn(task, frames, seed=0):
    """Outputs and labels of `frames` frames, a fifth of the labels invalid."""
    rng = np.random.default_rng(seed)
    outputs, shape = rng.normal(size=(frames, len(task.outputs))), (frames, len(task.outputs))
    labels = {"va": rng.uniform(-1, 1, shape), "expr": rng.integers(0, 7, frames),
              "au": rng.random(shape) < 0.3}[task.name].astype(task.dtype)
    labels[rng.random(labels.shape) < 0.2] = task.invalid
    return outputs, labels


def alone(task, outputs, labels):
    """What the metric's own function gives."""
    if task is VA:
        return [ccc(outputs[labels[:, d] != -5, d], labels[labels[:, d] != -5, d]) for d in range(2)]
    if task is EXPR:
        return class_f1(outputs[labels >= 0].argmax(1), labels[labels >= 0])
    return binary_f1(outputs > 0, labels)


# ---- Prediction

class Telltale:
    """Output of a frame: its own number, and the number of its segment's first frame. Both are garbage in the
    padding."""

    def __init__(self):
        self.seen, self.batches = [], []

    def __call__(self, x, valid):
        assert not x[~valid].any() and (valid.int().diff(dim=1) <= 0).all()     # padding: zeros, at the end
        self.seen += [row[real].int().tolist() for row, real in zip(x[..., 0], valid)]
        self.batches.append(len(x))
        y = torch.stack([x[..., 0], x[:, :1, 0].expand(x.shape[:2])], dim=2)
        return y.masked_fill(~valid[..., None], 1e9)

    def eval(self):
        pass

    train = eval


@pytest.mark.parametrize("frames", [1, 73, 300, 301, 400, 600, 1001])
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_each_frame_gets_the_mean_of_the_segments_that_cover_it(frames, batch):
    model = Telltale()
    y = predict(model, counting(frames), 300, 200, batch, ALONE)
    parts = segments(frames, 300, 200)
    assert y.shape == (frames, 2) and y.dtype == np.float32
    assert np.array_equal(y[:, 0], np.arange(frames))
    starts = [np.mean([start for start, end in parts if start <= t < end]) for t in range(frames)]
    assert y[:, 1] == pytest.approx(starts)
    assert model.seen == [list(range(start, end)) for start, end in parts]
    assert max(model.batches) <= batch and len(model.batches) == -(-len(parts) // batch)


def test_the_tail_segment_counts_as_much_as_a_whole_one():
    y = predict(Telltale(), counting(301), 300, 200, 2, ALONE)[:, 1]
    assert y[[0, 199, 200, 299, 300]].tolist() == [0, 0, 100, 100, 200]      # frames 200-299 lie in both


def test_an_unlabelled_video_is_predicted_from_its_features_alone(tmp_path):
    torch.manual_seed(0)
    model = SegmentModel(3, 12, **SMALL).eval()
    array = np.random.default_rng(0).normal(size=(27, 3)).astype(np.float16)
    np.save(tmp_path / "test.npy", array)                                   # there is no label file anywhere
    y = predict(model, read_features(tmp_path / "test.npy"), 10, 7, 2, ALONE)

    def unpadded(start, end):
        return model(torch.from_numpy(array[start:end]).float()[None])[0].detach().numpy()

    expected, cover = np.zeros((27, 12)), np.zeros((27, 1))
    for start, end in [(0, 10), (7, 17), (14, 24), (21, 27)]:
        expected[start:end] += unpadded(start, end)
        cover[start:end] += 1
    assert y == pytest.approx(expected / cover, abs=1e-5)
    shorter = predict(model, array[:5], 10, 7, 2, ALONE)                    # than the window
    assert shorter == pytest.approx(unpadded(0, 5), abs=1e-5)


def test_a_prediction_keeps_no_gradients():
    seen = []

    def model(x, valid):
        seen.append(torch.is_grad_enabled())
        return x
    predict(model, counting(3), 3, 3, 1, ALONE)
    assert seen == [False]


class Littered(torch.nn.Module):
    """A segment model with rubbish in the padded frames."""

    def __init__(self, model, rubbish):
        super().__init__()
        self.model, self.rubbish = model, rubbish

    def forward(self, x, valid):
        return self.model(x.masked_fill(~valid[..., None], self.rubbish), valid)


@pytest.mark.parametrize("rubbish", [1e4, float("nan"), float("inf")])
def test_predictions_are_the_same_whatever_the_padding_holds(rubbish):
    torch.manual_seed(0)
    model = SegmentModel(3, 2, **SMALL).eval()
    clean, littered = (predict(each, counting(27, 3), 10, 7, 2, ALONE)
                       for each in (model, Littered(model, rubbish)))
    assert np.isfinite(clean).all() and np.array_equal(clean, littered)


def test_merging_gives_each_frame_the_weighted_mean_of_its_segments_outputs():
    cut = [(0, 4), (3, 7), (6, 8)]
    y = np.arange(24, dtype=np.float32).reshape(3, 4, 2) ** 2                # (S, w, K), the last one padded
    mean, triangular = merged(cut, y, 8), merged(cut, y, 8, "triangular")
    for t in range(8):
        covering = [(i, t - a, min(t - a + 1, b - t)) for i, (a, b) in enumerate(cut) if a <= t < b]
        rows, weights = [y[i, at] for i, at, _ in covering], [weight for _, _, weight in covering]
        assert mean[t] == pytest.approx(np.mean(rows, axis=0))
        assert triangular[t] == pytest.approx(np.average(rows, axis=0, weights=weights))
    assert triangle(5).tolist() == [1, 2, 3, 2, 1] and triangle(4).tolist() == [1, 2, 2, 1]
    assert triangle(1).tolist() == [1]


def test_without_merging_a_video_is_cut_into_segments_that_follow_each_other():
    model = Telltale()
    y = predict(model, counting(23), 10, 7, 2, ALONE, "none")
    assert model.seen == [list(range(a, b)) for a, b in ((0, 10), (10, 20), (20, 23))]
    assert y[:, 0].tolist() == list(range(23)) and y[[9, 10, 22], 1].tolist() == [0, 10, 20]


# ---- Scoring

@of_each_task
@pytest.mark.parametrize("frames", [3, 10, 24, 27])
def test_the_authors_protocol_counts_full_segments_each_by_itself(task, frames):
    y, labels = drawn(task, frames)
    target, valid = targets(labels, task)
    cut = segments(frames, 10, 7)
    outputs = np.stack([pad(y[a:b] + i, 10) for i, (a, b) in enumerate(cut)])        # (S, 10, K)
    expected = task.metric.count(y[:0], target[:0], valid[:0])
    for i, (a, b) in enumerate(cut):
        if b - a == 10:
            expected = expected + task.metric.count(y[a:b] + i, target[a:b], valid[a:b])
    assert count_as_authors(task, cut, outputs, target, valid) == pytest.approx(expected)
    assert frames >= 10 or not expected.any()                               # a short video is lost


def test_the_sums_of_a_finished_task_come_back_as_they_were(tmp_path):
    videos = [Video(name, Path(name), np.zeros(3)) for name in ("b", "<a>")]
    sums = np.random.default_rng(0).normal(size=(2, 12, 4))
    write_sums(tmp_path, videos, sums, Team(1, 2, ALONE.device))
    with pytest.raises(ValueError, match="video_sums.json not found; train_task.py writes it"):
        read_sums(tmp_path)
    write_sums(tmp_path, videos, sums, ALONE)
    with pytest.raises(ValueError, match="video_sums.json not found"):         # the training has not ended
        read_sums(tmp_path)
    (tmp_path / "metrics.json").touch()
    names, found = read_sums(tmp_path)
    assert names == ["b", "<a>"] and np.array_equal(found, sums)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_frame_of_every_video_is_scored_once_by_one_process(tmp_path, world):
    videos = [video(tmp_path, f"v{n}", np.tile(np.linspace(-1, 1, n, dtype=np.float32)[:, None], 2))
              for n in (5, 40, 12, 33)]
    total = 0
    for rank in range(world):
        mine = shared_out(videos, Team(rank, world, torch.device("cpu")))
        total = total + score(Telltale(), mine, videos, VA, 10, 7, 2, ALONE)
    assert total[:, 0, 0].tolist() == [5, 40, 12, 33]                       # frames of each video
    total = total.sum(axis=0)
    assert np.array_equal(total[:, 0], [90, 90])
    frames, truth = [np.arange(n) for n in (5, 40, 12, 33)], [each.labels[:, 0] for each in videos]
    expected = ccc(np.concatenate(frames), np.concatenate(truth))
    assert VA.metric.score(total)[0] == pytest.approx(expected, abs=1e-9)


def test_videos_are_shared_out_longest_first_and_in_one_order_on_all_processes():
    def labelled(name, n):
        return Video(name, Path(name), np.zeros(n))
    videos = [labelled("b", 3), labelled("a", 3), labelled("long", 9), labelled("short", 1), labelled("c", 3)]
    for order in (videos, videos[::-1]):
        shares = [[each.name for each in shared_out(order, Team(rank, 2, None))] for rank in (0, 1)]
        assert shares == [["long", "b", "short"], ["a", "c"]]


@of_each_task
def test_the_score_is_the_metric_of_the_labelled_frames_of_all_videos(tmp_path, task):
    outputs, labels = drawn(task, 90)
    videos, parts = [], np.split(np.arange(90), [20, 55])
    for k, part in enumerate(parts):
        np.save(tmp_path / f"{k}.npy", outputs[part].astype(np.float16))
        videos.append(Video(f"{k}", tmp_path / f"{k}.npy", labels[part]))
    sums = score(Identity(), iter(videos), videos, task, 20, 15, 2, ALONE)  # videos may come one at a time
    expected = alone(task, outputs.astype(np.float16), labels)
    assert task.metric.score(sums.sum(axis=0)) == pytest.approx(expected, abs=1e-6)
    for video, part, one in zip(videos, parts, sums):
        expected = alone(task, outputs[part].astype(np.float16), video.labels)
        assert task.metric.score(one) == pytest.approx(expected, abs=1e-6)


class Identity(torch.nn.Module):
    """The features are the outputs."""

    def forward(self, x, valid):
        return x


@of_each_task
def test_the_sums_of_all_processes_are_added_and_a_process_without_videos_adds_nothing(task, monkeypatch):
    videos = [Video(name, Path(name), np.zeros(3)) for name in "ab"]
    empty = score(Identity(), [], videos, task, 10, 7, 2, ALONE)
    shape = {"va": (2, 2, 6), "expr": (2, 8, 8), "au": (2, 12, 4)}[task.name]
    assert empty.shape == shape and empty.dtype == np.float64 and not empty.any()
    monkeypatch.setattr(scoring, "all_sum", lambda sums: sums + 3)                  # another process has 3
    assert np.array_equal(score(Identity(), [], videos, task, 10, 7, 2, ALONE), np.full(shape, 3))


def test_scoring_turns_dropout_off_and_on_again(tmp_path):
    model = SegmentModel(1, 2, **SMALL, dropout=0.9)
    clip = video(tmp_path, "v", np.zeros((30, 2), np.float32))
    a, b = (score(model, [clip], [clip], VA, 10, 7, 2, ALONE) for _ in range(2))
    assert np.array_equal(a, b) and model.training


@of_each_task
def test_outputs_that_are_not_finite_are_not_scored(tmp_path, task):
    outputs, labels = drawn(task, 20)
    np.save(tmp_path / "v.npy", outputs)

    def model(x, valid):
        return x.masked_fill(x == x.max(), float("nan"))
    model.eval = model.train = lambda: None
    with pytest.raises(ValueError, match="outputs are not finite"):
        clip = Video("v", tmp_path / "v.npy", labels)
        score(model, [clip], [clip], task, 10, 7, 2, ALONE)


@of_each_task
def test_a_small_model_learns_a_handful_of_videos_and_the_score_shows_it(tmp_path, task):
    rng, videos = np.random.default_rng(0), []
    for k in range(3):
        x = rng.normal(size=(45, 8)).astype(np.float16)
        path = (x[:, :2].astype(np.float32) / 3).clip(-1, 1)
        units = (x[:, [*range(8), *range(4)]] > 0).astype(np.int8)
        labels = {"va": path, "expr": x.argmax(1).astype(np.int8), "au": units}[task.name]
        labels[:5] = task.invalid
        np.save(tmp_path / f"{k}.npy", x)
        videos.append(Video(str(k), tmp_path / f"{k}.npy", labels))
    torch.manual_seed(0)
    model = SegmentModel(8, len(task.outputs), **SMALL, dropout=0.0)
    clips = SegmentData(videos, task, 20, 15)
    before = task.metric.score(score(model, videos, videos, task, 20, 15, 2, ALONE).sum(axis=0)).mean()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x, target, valid, frames = clips.collate([clips[i] for i in range(len(clips))])
    for _ in range(60):
        optimizer.zero_grad()
        getattr(losses, task.loss)(model(x.float(), frames), target, valid).backward()
        optimizer.step()
    after = task.metric.score(score(model, videos, videos, task, 20, 15, 2, ALONE).sum(axis=0)).mean()
    assert before < 0.6 and after > 0.9


# ---- Folders and checkpoints

def test_a_task_has_a_run_folder_for_each_fold_and_reads_the_runs_features_or_given_ones(tmp_path):
    config, made = Config(), tmp_path / "mine/features"
    config.run.out, config.run.name, config.run.source = str(tmp_path), "mine", "my.yaml"
    made.mkdir(parents=True)
    with pytest.raises(ValueError, match="features/metrics.json not found; make it with: "
                                         "python .*extract_features.py --config my.yaml"):
        find_features(config, ALONE)
    record = {"stage": "features", "settings": {}, "input": None, "data": {}, "from": None}
    (made / "made_of.json").write_text(json.dumps(record))
    (made / "metrics.json").touch()
    assert stage_of(config, AU) == "task_au" and find_features(config, ALONE) == (made, record)
    (tmp_path / "elsewhere").mkdir()
    config.task.fold, config.task.features = 3, str(tmp_path / "elsewhere")
    assert stage_of(config, VA) == "task_va_fold3"
    assert find_features(config, ALONE) == (tmp_path / "elsewhere", {"file": str(tmp_path / "elsewhere")})


def small_config():
    config = Config()
    for name, value in SMALL.items():
        setattr(config.temporal, name, value)
    return config


@pytest.mark.parametrize("wrap", [lambda weights: {"model": weights}, lambda weights: weights],
                         ids=["our checkpoint", "weights alone"])
def test_the_weights_of_a_checkpoint_are_loaded_and_those_of_other_sizes_are_refused(tmp_path, wrap):
    model = SegmentModel(5, 12, **SMALL)
    path, config = tmp_path / "best.pt", small_config()
    torch.save(wrap(model.state_dict()), path)
    loaded = load(path, config, AU, ALONE)
    pairs = zip(model.state_dict().values(), loaded.model.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs) and loaded.model.dim == 5 and not loaded.model.training
    assert (loaded.task, loaded.record, loaded.changed) == (AU, None, {})
    with pytest.raises(ValueError, match=r"(?s)best.pt: a checkpoint of another archi.*model \(2, 8\)"):
        load(path, config, VA, ALONE)
    config.temporal.channels = [8, 9]
    with pytest.raises(ValueError, match=r"(?s)another architecture.*file \(8, 8, 3\), model \(9, 8, 3\)"):
        load(path, config, AU, ALONE)
    with pytest.raises(ValueError, match="best.pt: does not tell what it was made of; give its config"):
        load(path)


@pytest.mark.parametrize("parts", [dict(), dict(tcn=False), dict(transformer=False, causal=False),
                                   dict(tcn=False, transformer=False)], ids=["all", "no TCN", "TCN", "head"])
def test_a_checkpoint_alone_is_enough_to_predict_from_features_as_they_lie_on_disk(tmp_path, parts):
    torch.manual_seed(0)
    model, config = SegmentModel(5, 8, **SMALL, **parts).eval(), small_config()
    for name, value in parts.items():
        setattr(config.temporal, name, value)
    config.segments.window, config.segments.stride = 10, 7
    record = {"stage": "task_expr_fold2", "settings": settings_of(config, "temporal", "segments"),
              "input": None, "data": {}, "from": None}
    torch.save({"model": model.state_dict(), "made_of": record}, tmp_path / "best.pt")
    features = np.random.default_rng(0).normal(size=(27, 5)).astype(np.float16)
    trained = load(tmp_path / "best.pt")
    assert trained.task is EXPR and trained.record == record
    assert np.array_equal(trained.predict(features), predict(model, features, 10, 7, 2, ALONE))
    for wrong in (features[:, :4], features[0], features[:0]):
        with pytest.raises(ValueError, match=r"expected the features of a video, \(T, 5\), got \("):
            trained.predict(wrong)
    features[3, 2] = np.nan
    with pytest.raises(ValueError, match="NaN or infinity"):
        trained.predict(features)


def test_a_checkpoint_of_no_task_is_no_segment_model(tmp_path):
    torch.save({"model": {}, "made_of": {"stage": "finetune", "settings": {}, "from": None}},
               tmp_path / "best.pt")
    with pytest.raises(ValueError, match="best.pt: of stage finetune, not of a task"):
        load(tmp_path / "best.pt")


def test_a_checkpoint_of_another_task_is_refused_and_one_that_does_not_tell_is_not():
    for stage in ("task_au", "task_au_fold2"):
        record = {"stage": stage}
        check_task("best.pt", record, AU)
        with pytest.raises(ValueError, match=f"best.pt: trained for {stage}, not for --task va"):
            check_task("best.pt", record, VA)
    check_task("best.pt", None, VA)


def trained(on, fold=0, vit=7):
    """The record of a checkpoint that was trained on these videos, with features of a ViT of this
    checksum."""
    return {"stage": "task_au", "settings": {"task.fold": fold}, "from": features_of(vit),
            "data": {"training videos": on}}


def features_of(vit):
    return {"stage": "features", "settings": {}, "from": {"stage": "finetune", "checksum": vit}}


@pytest.mark.parametrize("given, fits", [(features_of(7), True), (features_of(8), False),
                                         ({"file": "x"}, False)], ids=["same", "other", "unknown"])
def test_a_model_takes_features_of_the_vit_it_was_trained_on_and_no_others(given, fits):
    refused = pytest.raises(ValueError, match=r"of another ViT, features from finetune \(checksum 7\), not "
                                              r"(features from finetune \(checksum 8\)|x), .*--set task.feat")
    with contextlib.nullcontext() if fits else refused:
        check_features("best.pt", trained(["a"]), given)


def test_features_of_the_same_vit_with_another_setting_are_named_by_it():
    other = {**features_of(7), "settings": {"finetune.token": "cls"}}
    record = trained(["a"])
    record["from"] = {**features_of(7), "settings": {"finetune.token": "mean"}}
    with pytest.raises(ValueError, match=r"\n  finetune.token: was 'mean', now 'cls' \(of stage features\)"):
        check_features("best.pt", record, other)


def test_a_model_is_not_scored_on_scenes_that_it_was_trained_on():
    def on(*names):
        return [Video(name, Path(name), np.zeros(3)) for name in names]
    check_scenes("best.pt", trained(["a", "b_left"]), on("c", "d"))
    with pytest.raises(ValueError, match=r"best.pt: trained on 2 of the 3 videos that would be scored "
                                         r"\(a, b_right\); give the labels that it was trained"):
        check_scenes("best.pt", trained(["a", "b_left"], 1), on("a", "b_right", "c"))
    check_features("best.pt", None, features_of(7))
    held = trained(["a"])
    held["data"]["held-out videos"] = ["d_right"]                            # chose its epoch
    with pytest.raises(ValueError, match=r"trained on 1 of the 2 videos .*\(d\)"):
        check_scenes("best.pt", held, on("c", "d"))
    check_scenes("best.pt", None, on("a"))                                     # nothing is known of it
