"""Metrics against plain formulas and counts by hand, exact over any split of the frames; whole videos from overlapping segments."""

import contextlib

import numpy as np
import pytest
import torch

import training
from config import Config
from data import SegmentData, Video, segments
from evaluate import BASELINE, METRIC, NAMES, PAPER, Tally, au_f1, ccc, chance, expr_f1, load_model, predict, score, scores, table
from losses import TASK_LOSS
from temporal import OUTPUTS, SegmentModel

ALONE = training.Team(0, 1, torch.device("cpu"))
WIDTH = {"va": 2, "expr": 8, "au": 12}


def draw(task, frames, seed=0):
    """Outputs and labels of `frames` frames, a fifth of the labels invalid and some whole frames too."""
    rng = np.random.default_rng(seed)
    outputs, shape = rng.normal(size=(frames, WIDTH[task])), {"va": (frames, 2), "expr": (frames,), "au": (frames, 12)}[task]
    labels = {"va": rng.uniform(-1, 1, shape).astype(np.float32), "expr": rng.choice(8, shape, p=[.3, .2, .2, .1, .1, .05, .05, 0]).astype(np.int8),
              "au": (rng.random(shape) < .3).astype(np.int8)}[task]
    labels[rng.random(shape) < 0.2] = -5 if task == "va" else -1
    labels[::17] = -5 if task == "va" else -1
    return outputs, labels


# --- metrics ----------------------------------------------------------------------------------------------------------

def plain_ccc(x, y):
    """2 rho sigma_x sigma_y / (sigma_x^2 + sigma_y^2 + (mu_x - mu_y)^2), the form of Lin (1989)."""
    x, y = np.asarray(x, float), np.asarray(y, float)
    rho = np.corrcoef(x, y)[0, 1]
    return 2 * rho * x.std() * y.std() / (x.var() + y.var() + (x.mean() - y.mean()) ** 2)


def counted_f1(pred, target):
    """F1 of two lists of booleans, one frame at a time."""
    tp = fp = fn = 0
    for p, t in zip(pred, target):
        tp, fp, fn = tp + (p and t), fp + (p and not t), fn + (t and not p)
    precision, recall = tp / (tp + fp) if tp + fp else 0, tp / (tp + fn) if tp + fn else 0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


@pytest.mark.parametrize("pred, target, value", [
    ([1, 2, 3], [1, 2, 3], 1), ([1, 2, 3], [3, 2, 1], -1), ([-1, 0, 1], [0, 1, 2], 4 / 7), ([-2, 0, 2], [-1, 0, 1], 4 / 5),
    ([0, 0, 0], [-1, 0, 1], 0), ([.5, .5], [.5, .5], 0), ([.5, .5], [-.5, -.5], 0), ([1, 0, -1, 0], [0, 1, 0, -1], 0), ([.3], [.3], 0)])
def test_ccc_of_known_cases(pred, target, value):
    assert ccc(pred, target) == pytest.approx(value, abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_ccc_is_lins_formula_and_symmetric(seed):
    rng = np.random.default_rng(seed)
    y = rng.uniform(-1, 1, 500)
    x = rng.uniform(-2, 2) * y + rng.normal(rng.uniform(-1, 1), rng.uniform(0, 1), 500)
    assert ccc(x, y) == pytest.approx(plain_ccc(x, y), abs=1e-12) == ccc(y, x)


def test_ccc_uses_population_statistics():
    x, y = np.arange(4), np.arange(4) + 1
    assert ccc(x, y) == pytest.approx(2 * 1.25 / (1.25 + 1.25 + 1), abs=1e-12)
    assert 2 * np.cov(x, y)[0, 1] / (x.var(ddof=1) + y.var(ddof=1) + 1) == pytest.approx(10 / 13)     # not this one


def test_expr_f1_of_a_confusion_counted_by_hand():
    #                        TP Anger  FN Anger    FP Anger   Fear never occurs and is never predicted
    target = np.array([1, 1, 1,        1, 1,       0, 0,      7])
    pred = np.array([1, 1, 1,          0, 7,       1, 0,      7])
    assert expr_f1(pred, target) == pytest.approx([2 / 4, 6 / 9, 0, 0, 0, 0, 0, 2 / 3])


def test_au_f1_of_a_confusion_counted_by_hand():
    target, pred = np.zeros((6, 12), int), np.zeros((6, 12), int)
    target[:, 0], pred[:, 0] = [1, 1, 1, 0, 0, -1], [1, 1, 0, 1, 0, 1]       # TP 2, FN 1, FP 1, and one that does not count
    target[:, 1], pred[:, 1] = [1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1]        # TP 1, FP 5
    target[:, 2] = -1                                                       # nothing is labelled
    target[:, 3] = 1                                                        # always there, never predicted
    pred[:, 4] = 1                                                          # never there, always predicted
    target[:, 11], pred[:, 11] = 1, 1
    assert au_f1(pred, target) == pytest.approx([4 / 6, 2 / 7] + [0] * 9 + [1])


@pytest.mark.parametrize("seed", range(3))
def test_f1_equals_a_count_frame_by_frame(seed):
    outputs, labels = draw("expr", 400, seed)
    pred, target = outputs[labels >= 0].argmax(1), labels[labels >= 0]
    assert expr_f1(pred, target) == pytest.approx([counted_f1(pred == k, target == k) for k in range(8)], abs=1e-12)
    assert expr_f1(pred, target)[7] == 0                                    # class 7 never occurs
    outputs, labels = draw("au", 400, seed)
    expected = [counted_f1(outputs[labels[:, k] >= 0, k] > 0, labels[labels[:, k] >= 0, k] == 1) for k in range(12)]
    assert au_f1((outputs > 0).astype(int), labels) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_f1_does_not_depend_on_the_kind_of_integer(dtype):
    pred, target = np.array([0, 1, 7, 7], dtype), np.array([0, 1, 7, 1], dtype)
    assert expr_f1(pred, target) == pytest.approx(expr_f1(pred.tolist(), target.tolist()))
    pred, target = np.eye(12, dtype=dtype), np.ones((12, 12), dtype)
    assert au_f1(pred, target) == pytest.approx([2 / 13] * 12)


def test_the_threshold_of_an_action_unit_is_a_logit_above_0_exactly():
    tally = Tally("au")
    tally.add(np.tile([[-1e-9], [0.0], [1e-9]], 12), np.array([[0] * 12] * 3))
    assert tally.sums[:, :2].tolist() == [[2, 1]] * 12


@pytest.mark.parametrize("metric, pred, target, message", [
    (ccc, [1, 2], [1, 2, 3], r"two sequences of one length, got \(2,\) and \(3,\)"),
    (ccc, [[1, 2]], [[1, 2]], r"two sequences of one length, got \(1, 2\)"),
    (expr_f1, [0, 1], [0, -1], "classes 0 to 7 of one length.*leave out frames labelled -1"),
    (expr_f1, [0, 8], [0, 1], "classes 0 to 7"), (expr_f1, [0], [0, 1], r"got \(1,\) and \(2,\)"),
    (expr_f1, np.zeros((3, 8), int), np.zeros((3, 8), int), r"classes 0 to 7.*got \(3, 8\)"),
    (au_f1, np.full((1, 12), .7), np.ones((1, 12)), "apply the threshold first"),
    (au_f1, np.ones((1, 12)), np.full((1, 12), -5), r"two arrays \(T, 12\) of 0 and 1"),
    (au_f1, np.ones((2, 11)), np.ones((2, 11)), r"got \(2, 11\)"), (au_f1, np.ones(12), np.ones(12), r"got \(12,\)"),
    (au_f1, np.ones((3, 12)), np.ones((2, 12)), r"got \(3, 12\) and \(2, 12\)")])
def test_a_metric_refuses_what_it_would_score_wrongly(metric, pred, target, message):
    with pytest.raises(ValueError, match=message):
        metric(pred, target)


@pytest.mark.parametrize("pred, target", [([.1, .2, .3], [.1, -5, .3]), ([np.nan, .2], [.1, .2])], ids=["code -5", "NaN"])
def test_ccc_refuses_the_invalid_code_and_nan(pred, target):
    with pytest.raises(ValueError, match="-5|NaN|finite"):
        ccc(pred, target)


@pytest.mark.parametrize("pred", [[0.0, 1.0], [False, True]], ids=["float", "bool"])
def test_expr_f1_takes_or_refuses_whole_numbers_of_another_type(pred):
    try:
        assert expr_f1(pred, [0, 1]) == pytest.approx([1, 1, 0, 0, 0, 0, 0, 0])
    except ValueError as refusal:
        assert "classes 0 to 7" in str(refusal)


# --- sums -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", WIDTH)
def test_a_tally_gives_what_the_metric_gives_on_the_valid_frames_alone(task):
    outputs, labels = draw(task, 500)
    tally = Tally(task)
    tally.add(outputs, labels)
    if task == "va":
        expected = [ccc(outputs[labels[:, d] != -5, d], labels[labels[:, d] != -5, d]) for d in range(2)]
    else:
        expected = expr_f1(outputs[labels >= 0].argmax(1), labels[labels >= 0]) if task == "expr" else au_f1(outputs > 0, labels)
    assert scores(task, tally.sums) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("task", WIDTH)
def test_any_split_over_any_number_of_tallies_gives_the_same_scores(task):
    outputs, labels = draw(task, 999)
    whole = Tally(task)
    whole.add(outputs, labels)
    rng = np.random.default_rng(1)
    for tallies in (1, 2, 3, 8):
        parts, owner = [Tally(task) for _ in range(tallies)], rng.integers(tallies, size=999)
        for t, part in enumerate(parts):
            mine = rng.permutation(np.flatnonzero(owner == t))
            for batch in np.split(mine, np.sort(rng.integers(len(mine), size=3))):       # some of these are empty
                part.add(outputs[batch], labels[batch])
        assert scores(task, sum(part.sums for part in parts)) == pytest.approx(scores(task, whole.sums), abs=1e-12)
        if task != "va":
            assert np.array_equal(sum(part.sums for part in parts), whole.sums)


@pytest.mark.parametrize("task", WIDTH)
def test_what_is_predicted_for_an_invalid_label_is_never_counted(task):
    outputs, labels = draw(task, 300)
    invalid = labels == (-5 if task == "va" else -1)
    a, b = Tally(task), Tally(task)
    a.add(outputs, labels)
    other = outputs.copy()
    other[invalid] = 1e6
    b.add(other, labels)
    assert np.array_equal(a.sums, b.sums)
    counted = {"va": a.sums[:, 0], "expr": a.sums.sum(), "au": a.sums.sum(axis=1)}[task]
    assert np.array_equal(counted, (~invalid).sum(axis=0))


@pytest.mark.parametrize("task", WIDTH)
def test_nothing_valid_scores_0_without_a_warning(task):
    tally = Tally(task)
    tally.add(np.ones((4, WIDTH[task])), np.full({"va": (4, 2), "expr": 4, "au": (4, 12)}[task], -5 if task == "va" else -1))
    tally.add(np.ones((0, WIDTH[task])), np.zeros({"va": (0, 2), "expr": 0, "au": (0, 12)}[task], np.int8))
    with np.errstate(all="raise"):
        assert not tally.sums.any() and not scores(task, tally.sums).any() and not chance(task, tally.sums).any()


@pytest.mark.parametrize("task", WIDTH)
def test_chance_is_the_best_constant_prediction(task):
    outputs, labels = draw(task, 500)
    constants = {"va": [[0, 0], [.3, -.7]], "expr": np.eye(8), "au": [[1] * 12, [-1] * 12]}[task]
    each = []
    for constant in constants:
        tally = Tally(task)
        tally.add(np.tile(constant, (500, 1)), labels)
        each.append(scores(task, tally.sums))
    best = np.max(each, axis=0) if task == "au" else max(each, key=np.mean)
    tally = Tally(task)
    tally.add(outputs, labels)
    assert chance(task, tally.sums) == pytest.approx(best, abs=1e-12) and (task == "va") == (best.sum() < 1e-12)


# --- prediction -------------------------------------------------------------------------------------------------------

def settings(window=300, stride=200, batch=2):
    config = Config()
    config.segments.window, config.segments.stride, config.task.batch = window, stride, batch
    return config


def video(folder, frames, name="v", dim=1, labels=None):
    """Frame t's feature is t: float16 holds whole numbers to 2,048. Five frames more than labels must not matter."""
    np.save(folder / f"{name}.npy", np.tile(np.arange(frames + 5, dtype=np.float16)[:, None], (1, dim)))
    return Video(name, folder / f"{name}.npy", np.zeros((frames, 2), np.float32) if labels is None else labels)


class Telltale:
    """Output of a frame: its own number, and the number of its segment's first frame. Both are garbage in the padding."""
    dim = 1

    def __init__(self):
        self.seen = []

    def __call__(self, x, valid):
        assert not x[~valid].any() and (valid.int().diff(dim=1) <= 0).all()         # padding is zeros, at the end
        self.seen += [row[ok].int().tolist() for row, ok in zip(x[..., 0], valid)]
        y = torch.stack([x[..., 0], x[:, :1, 0].expand(x.shape[:2])], dim=2)
        return y.masked_fill(~valid[..., None], 1e9)

    def eval(self):
        pass

    train = eval


@pytest.mark.parametrize("frames", [1, 73, 300, 301, 400, 600, 1001])
@pytest.mark.parametrize("batch", [1, 2, 32])
def test_each_frame_gets_the_mean_of_the_segments_that_cover_it(tmp_path, frames, batch):
    model = Telltale()
    y = predict(model, video(tmp_path, frames), settings(batch=batch), ALONE)
    parts = segments(frames, 300, 200)
    assert y.shape == (frames, 2) and y.dtype == np.float32
    assert np.array_equal(y[:, 0], np.arange(frames))
    assert y[:, 1] == pytest.approx([np.mean([start for start, end in parts if start <= t < end]) for t in range(frames)])
    assert model.seen == [list(range(start, end)) for start, end in parts]


def test_the_tail_segment_counts_as_much_as_a_whole_one(tmp_path):
    y = predict(Telltale(), video(tmp_path, 301), settings(), ALONE)[:, 1]
    assert y[[0, 199, 200, 299, 300]].tolist() == [0, 0, 100, 100, 200]      # frames 200-299 lie in both segments


class Littered(torch.nn.Module):
    """A segment model with rubbish in the padded frames."""

    def __init__(self, model, rubbish):
        super().__init__()
        self.model, self.dim, self.rubbish = model, model.dim, rubbish

    def forward(self, x, valid):
        return self.model(x.masked_fill(~valid[..., None], self.rubbish), valid)


SMALL = dict(channels=(8, 8), kernels=(3, 3), dilations=(1, 2), width=16, layers=1, heads=2, hidden=16, head=8)


@pytest.mark.parametrize("rubbish", [1e4, float("nan"), float("inf")])
def test_predictions_are_the_same_whatever_the_padding_holds(tmp_path, rubbish):
    torch.manual_seed(0)
    model, clip = SegmentModel(3, 2, **SMALL).eval(), video(tmp_path, 27, dim=3)
    clean, littered = (predict(m, clip, settings(10, 7), ALONE) for m in (model, Littered(model, rubbish)))
    assert np.isfinite(clean).all() and np.array_equal(clean, littered)


class Share(training.Team):
    """One of several processes, without the others: its own part of a sum."""

    def sum(self, values):
        return np.asarray(values)


@pytest.mark.parametrize("world", [1, 2, 3, 5])
def test_every_frame_of_every_video_is_scored_once_by_one_process(tmp_path, world):
    videos = [video(tmp_path, n, f"v{n}", labels=np.tile(np.linspace(-1, 1, n, dtype=np.float32)[:, None], 2)) for n in (5, 40, 12, 33)]
    shares = [score(Telltale(), videos, "va", settings(10, 7), Share(rank, world, torch.device("cpu"))) for rank in range(world)]
    assert np.array_equal(sum(shares)[:, 0], [90, 90])
    expected = ccc(np.concatenate([np.arange(n) for n in (5, 40, 12, 33)]), np.concatenate([v.labels[:, 0] for v in videos]))
    assert scores("va", sum(shares))[0] == pytest.approx(expected, abs=1e-9)


def test_scoring_turns_dropout_off_and_on_again(tmp_path):
    model = SegmentModel(1, 2, **SMALL, dropout=0.9)
    a, b = (score(model, [video(tmp_path, 30)], "va", settings(10, 7), ALONE) for _ in range(2))
    assert np.array_equal(a, b) and model.training


# --- reports and checkpoints ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("task", WIDTH)
def test_the_table_has_a_line_per_class_and_the_means_beside_the_papers(task):
    outputs, labels = draw(task, 300)
    tally = Tally(task)
    tally.add(outputs, labels)
    lines = table(task, tally.sums, "a title").splitlines()
    assert lines[0] == "a title" and [line.split()[0] for line in lines[2:]] == [*NAMES[task], "mean"]
    assert lines[-1].split()[1:] == [f"{v:.3f}" for v in (scores(task, tally.sums).mean(), chance(task, tally.sums).mean(),
                                                         PAPER[task]["mean"], BASELINE[task]["mean"])]
    assert len(NAMES[task]) == OUTPUTS[task] == WIDTH[task] and task in METRIC


def test_a_checkpoint_of_another_task_or_size_is_refused(tmp_path):
    config = Config()
    for name, value in SMALL.items():
        setattr(config.temporal, name, value)
    model = SegmentModel(5, 12, **SMALL)
    training.write_file(tmp_path / "best.pt", lambda file: torch.save({"task": "au", "model": model.state_dict()}, file))
    loaded = load_model(tmp_path / "best.pt", config, "au", 5, None, ALONE)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), loaded.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match="best.pt: trained for --task au, not va"):
        load_model(tmp_path / "best.pt", config, "va", 5, None, ALONE)
    with pytest.raises(ValueError, match=r"(?s)best.pt: a checkpoint of another architecture.*file \(8, 5, 3\), model \(8, 6, 3\)"):
        load_model(tmp_path / "best.pt", config, "au", 6, None, ALONE)


@pytest.mark.parametrize("trained_on, given, fits", [(7, 7, True), (7, 8, False), (7, None, True), (None, 8, True)])
def test_a_model_takes_features_of_the_encoder_it_was_trained_on_or_of_an_unknown_one(tmp_path, trained_on, given, fits):
    """Unknown: features that were copied elsewhere, or that another program made."""
    config = Config()
    for name, value in SMALL.items():
        setattr(config.temporal, name, value)
    state = {"task": "au", "encoder checksum": trained_on, "model": SegmentModel(5, 12, **SMALL).state_dict()}
    training.write_file(tmp_path / "best.pt", lambda file: torch.save(state, file))
    with contextlib.nullcontext() if fits else pytest.raises(ValueError, match="another encoder .checksum 7, not 8.*--set task.features="):
        load_model(tmp_path / "best.pt", config, "au", 5, given, ALONE)


@pytest.mark.parametrize("task", WIDTH)
def test_outputs_that_are_not_finite_are_not_scored(task):
    outputs, labels = draw(task, 20, 0)
    outputs[3, 1] = np.nan
    with pytest.raises(ValueError, match="outputs are not finite"):
        Tally(task).add(outputs, labels)


@pytest.mark.parametrize("task", WIDTH)
def test_a_small_model_learns_a_handful_of_videos_and_the_score_shows_it(tmp_path, task):
    rng, videos = np.random.default_rng(0), []
    for k in range(3):
        x = rng.normal(size=(45, 8)).astype(np.float16)
        path = (x[:, :2].astype(np.float32) / 3).clip(-1, 1)
        labels = {"va": path, "expr": x.argmax(1).astype(np.int8), "au": (x[:, [*range(8), *range(4)]] > 0).astype(np.int8)}[task]
        labels[:5] = -5 if task == "va" else -1
        np.save(tmp_path / f"{k}.npy", x)
        videos.append(Video(str(k), tmp_path / f"{k}.npy", labels))
    torch.manual_seed(0)
    model, clips = SegmentModel(8, OUTPUTS[task], **SMALL, dropout=0.0), SegmentData(videos, task, 20, 15)
    before = scores(task, score(model, videos, task, settings(20, 15), ALONE)).mean()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    x, target, valid, frames = clips.collate([clips[i] for i in range(len(clips))])
    for _ in range(150):
        optimizer.zero_grad()
        TASK_LOSS[task](model(x.float(), frames), target, valid).backward()
        optimizer.step()
    after = scores(task, score(model, videos, task, settings(20, 15), ALONE)).mean()
    assert before < 0.6 and after > 0.9
