"""Folds and ablations in the report: every number of their files, in its place."""

import json
import re

import pytest

from report_runs import ablation_section, folds_section
from test_page import Reader
from test_report import table_rows


def a_fold(fold: int, **changes) -> dict:
    """One fold's row of folds.json."""
    score = 0.5 + fold / 100
    return {"fold": fold, "score": score, "interval": [score - 0.1, score + 0.1], "unseen": score - 0.05,
            "chance": 0.25, "paper": 0.55 + fold / 1000, "baseline": 0.39 if fold == 0 else None,
            "outputs": {}, "validation_videos": 3, "seen_videos": 0, **changes}


def folds_json(**changes) -> dict:
    rows = [a_fold(fold) for fold in range(5)]
    task = {"metric": "mean F1", "folds": rows, "mean": 0.52, "deviation": 0.0158, "paper_mean": 0.554,
            "paper_deviation": 0.031}
    return {"run": "demo", "encoder": "one per fold", "data": "<Aff-Wild2>", "comparable": True,
            "tasks": {"au": task}, **changes}


def test_folds_stand_beside_the_papers_with_mean_and_deviation(tmp_path):
    (tmp_path / "folds.json").write_text(json.dumps(folds_json()))
    markup = folds_section(tmp_path)
    header, *rows = table_rows(markup)
    assert header == ["fold", "mean F1", "95 % interval", "chance", "paper", "baseline"]
    assert rows[0] == ["0", "0.500", "0.400 to 0.600", "0.250", "0.550", "0.390"]
    assert rows[4] == ["4", "0.540", "0.440 to 0.640", "0.250", "0.554", "–"]
    assert rows[5:] == [["mean", "0.520 ± 0.016", "", "", "0.554 ± 0.031", ""]]
    assert "An encoder for each fold" in markup and "Data: <Aff-Wild2>." in " ".join(Reader(markup).texts)
    assert re.findall(r">(fold \d)<", markup) == [f"fold {k}" for k in range(5)]


def test_folds_of_va_have_both_dimensions(tmp_path):
    found = folds_json(comparable=False)
    found["tasks"] = {"va": found["tasks"]["au"]}
    for row in found["tasks"]["va"]["folds"]:
        row["outputs"] = {"valence": 0.1, "arousal": 0.2}
    (tmp_path / "folds.json").write_text(json.dumps(found))
    header, row, *_ = table_rows(folds_section(tmp_path))
    assert header == ["fold", "mean F1", "95 % interval", "valence", "arousal", "chance"]
    assert row == ["0", "0.500", "0.400 to 0.600", "0.100", "0.200", "0.250"]


def test_scores_on_seen_scenes_have_those_of_the_others_beside_them(tmp_path):
    found = folds_json(encoder="shared", comparable=False)
    found["tasks"]["au"]["folds"][2] = a_fold(2, seen_videos=2, interval=None)
    found["tasks"]["au"]["folds"][3] = a_fold(3, seen_videos=3, unseen=None)
    (tmp_path / "folds_shared.json").write_text(json.dumps(found))
    markup = folds_section(tmp_path)
    header, *rows = table_rows(markup)
    assert header == ["fold", "mean F1", "95 % interval", "unseen", "chance"]
    assert rows[2] == ["2", "0.520", "–", "0.470", "0.250"]
    assert rows[3] == ["3", "0.530", "0.430 to 0.630", "–", "0.250"]
    assert rows[5] == ["mean", "0.520 ± 0.016", "", "", ""] and "their scores are too high" in markup


ABLATION = {"run": "demo", "seeds": [0, 1], "rows": [
    {"title": "nothing", "tasks": {"va": {"mean": 0.7, "deviation": 0.01, "difference": None,
                                          "interval": None}}},
    {"title": "<b>TCN", "tasks": {"va": {"mean": 0.55, "deviation": 0.02, "difference": -0.15,
                                         "interval": [-0.2, 0.01]}}}]}


def test_an_ablation_is_shown_with_its_differences(tmp_path):
    (tmp_path / "ablation.json").write_text(json.dumps(ABLATION))
    markup = ablation_section(tmp_path, "demo")
    assert ["nothing", "0.700 ± 0.010"] in table_rows(markup)
    assert ["<b>TCN", "0.550 ± 0.020"] in table_rows(markup)
    assert ["<b>TCN", "-0.150", "-0.200 to 0.010"] in table_rows(markup)
    assert "b" not in [tag for tag, _ in Reader(markup).tags] and "seeds 0, 1" in markup
    assert ablation_section(tmp_path, "another run") == ""


@pytest.mark.parametrize("content", ["{}", "[1]", "no json", '{"run": "demo", "tasks": 3}'])
def test_a_damaged_file_is_named(tmp_path, content):
    for name in ("folds.json", "ablation.json"):
        (tmp_path / name).write_text(content)
    assert f"{tmp_path}/folds.json: not what folds.py writes" in folds_section(tmp_path)
    assert f"{tmp_path}/ablation.json: not what ablation.py writes" in ablation_section(tmp_path, "demo")


def test_without_files_there_are_no_sections(tmp_path):
    assert folds_section(tmp_path) == ablation_section(tmp_path, "demo") == ""
