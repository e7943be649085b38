"""The folder of a run: used by one run, not mixed with other settings or data, resumed from what is whole."""

import errno
import json
import os
import signal
import stat

import pytest
import torch

import run_folder
from checkpoints import read_checkpoint
from config import Config, load
from distributed import Team
from processes import ALONE, CPU, in_child, in_team
from run_folder import RunFolder, missing, settings_of


def opened(folder, settings=None, config=None, team=ALONE):
    """The run folder `folder`/run."""
    config = config or Config()
    config.run.out = str(folder)
    return RunFolder("run", config, team, settings or {"task.lr": 3e-5})


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_folder_keeps_its_configuration_and_opens_again(tmp_path):
    config = Config()
    config.run.seed = 17
    run = opened(tmp_path, {"task.lr": 3e-5, "temporal.channels": (8, 8)}, config)
    assert run.folder == tmp_path / "run"
    assert not run.finished and load(run.folder / "config.yaml").run.seed == 17
    run.finish({"score": 0.5})
    run.lock.close()
    assert opened(tmp_path, {"task.lr": 3e-5, "temporal.channels": [8, 8]}).finished
    assert json.loads((run.folder / "metrics.json").read_text()) == {"score": 0.5}


def test_a_folder_in_use_is_refused_to_another_process_and_free_after_its_run_is_killed(tmp_path, capfd):
    def another():
        try:
            opened(tmp_path)
        except ValueError as refusal:
            print(refusal, flush=True)
            raise SystemExit(2)

    def killed_while_it_holds_the_folder():
        held = opened(tmp_path)
        os.kill(os.getpid(), signal.SIGKILL)
        held.lock.close()

    run = opened(tmp_path)
    assert in_child(another) == 2
    assert ("run: another run is writing here; wait for it, or choose another --set run.name=..."
            in capfd.readouterr().out)
    run.lock.close()
    assert in_child(killed_while_it_holds_the_folder) == -signal.SIGKILL
    assert in_child(another) == 0


def test_a_disk_without_locks_is_not_taken_for_another_run(tmp_path, monkeypatch):
    def refuse(*arguments):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    monkeypatch.setattr("fcntl.lockf", refuse)
    with pytest.raises(ValueError, match="run: cannot be locked .No locks available.*"
                                         "choose another place with --set run.out="):
        opened(tmp_path)


def test_other_settings_in_the_same_folder_are_refused_and_each_is_named(tmp_path):
    opened(tmp_path, {"task.lr": 3e-5, "task.batch": 32, "run.seed": 0}).lock.close()
    before = files(tmp_path / "run")
    with pytest.raises(ValueError) as refusal:
        opened(tmp_path, {"task.lr": 1e-4, "task.batch": 32, "task.fold": 1})
    first, *rest = str(refusal.value).splitlines()
    assert first.endswith("run was made with other settings; choose another --set run.name=..., or delete it")
    assert rest == ["  run.seed: was 0, now None", "  task.fold: was None, now 1",
                    "  task.lr: was 3e-05, now 0.0001"]
    assert files(tmp_path / "run") == before


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    run = opened(tmp_path)
    run.finish({"score": 0.5})
    run.lock.close()
    before = files(run.folder)
    config = Config()
    config.run.workers = 3
    assert opened(tmp_path, config=config).finished
    assert files(run.folder) == before


def test_the_half_written_files_of_a_killed_run_are_removed(tmp_path):
    opened(tmp_path).lock.close()
    for name in (".0.123.tmp", ".1.99.tmp", "kept.tmp"):
        (tmp_path / "run" / name).write_text("half")
    opened(tmp_path)
    assert set(files(tmp_path / "run")) == {".lock", "config.yaml", "settings.json", "kept.tmp"}


def test_all_processes_are_refused_what_the_first_is_and_told_what_it_found(tmp_path):
    """The others neither look at the folder nor open it: it may be seen late on another machine."""
    def refused(team):
        try:
            opened(tmp_path, {"task.lr": team.rank + 2.0}, team=team)
        except ValueError as refusal:
            return str(refusal)

    def found(team):
        return opened(tmp_path if team.rank == 0 else tmp_path / "elsewhere", team=team).finished

    opened(tmp_path, {"task.lr": 1.0}).lock.close()
    codes, (first, second) = in_team(2, refused)
    assert codes == [0, 0] and first == second and "task.lr: was 1.0, now 2.0" in first
    (tmp_path / "run/settings.json").unlink()
    (tmp_path / "run/metrics.json").write_text("{}")
    assert in_team(2, found) == ([0, 0], [True, True])
    assert not (tmp_path / "elsewhere").exists()


def test_settings_are_chosen_by_section_and_by_name():
    assert settings_of(Config(), "segments", "run.seed") == {"segments.window": 300, "segments.stride": 200,
                                                             "run.seed": 0}
    assert settings_of(Config(), "task").keys() == {f"task.{name}" for name in vars(Config().task)}


def test_a_missing_input_is_named_with_the_command_that_makes_it():
    config = Config()
    config.run.source = "configs/mine.yaml"
    refusal = missing("runs/x/last.pt", "python x.py", config)
    assert isinstance(refusal, ValueError)
    assert str(refusal) == "runs/x/last.pt not found; make it with: python x.py --config configs/mine.yaml"


# ---- Checkpoints

def damage(path):
    content = path.read_bytes()
    path.write_bytes(content[:len(content) // 2])


def test_the_last_whole_checkpoint_is_resumed_and_a_damaged_one_is_named(tmp_path, capsys):
    run = opened(tmp_path)
    assert run.resume({}) is None
    for epoch in (1, 2, 3):
        run.write("last.pt", {"epoch": epoch})
        run.write("best.pt", {"epoch": -epoch})
        assert run.resume({}) == {"epoch": epoch}
    assert read_checkpoint(run.folder / "previous.pt") == {"epoch": 2}
    assert read_checkpoint(run.folder / "best.pt") == {"epoch": -3}
    assert capsys.readouterr().out == ""
    damage(run.folder / "last.pt")
    assert run.resume({}) == {"epoch": 2}
    said = capsys.readouterr().out
    assert "last.pt: not a whole, plain checkpoint" in said and "trying the one before" in said
    damage(run.folder / "previous.pt")
    with pytest.raises(ValueError, match="run: no checkpoint here is whole; put a copy in its place, "
                                         "or delete the folder"):
        run.resume({})
    said = capsys.readouterr().out
    assert "last.pt" in said and "previous.pt" in said


def test_a_run_killed_between_the_two_renames_goes_on_from_the_checkpoint_before(tmp_path):
    run = opened(tmp_path)
    run.write("last.pt", {"epoch": 1})
    (run.folder / "last.pt").rename(run.folder / "previous.pt")
    assert run.resume({}) == {"epoch": 1}


def test_a_checkpoint_that_another_process_cannot_read_is_used_by_none(tmp_path, capfd):
    """Else the processes would go on from different steps."""
    def work(team):
        run = opened(tmp_path, team=team)
        if team.rank == 1:
            def read(path):
                if path.name == "last.pt":
                    raise ValueError("a broken cable")
                return read_checkpoint(path)
            run_folder.read_checkpoint = read
        return run.resume({})

    run = opened(tmp_path)
    for epoch in (1, 2):
        run.write("last.pt", {"epoch": epoch})
    run.lock.close()
    assert in_team(2, work) == ([0, 0], [{"epoch": 1}, {"epoch": 1}])
    assert "last.pt: not every process can read it" in capfd.readouterr().out


def test_other_data_than_a_run_began_with_or_than_the_first_machine_has_is_refused(tmp_path):
    run = opened(tmp_path)
    run.write("last.pt", {"data": {"frames": 5}})
    assert run.resume({"frames": 5}) == {"data": {"frames": 5}}
    with pytest.raises(ValueError, match=r"run: began with {'frames': 5}, found now {'frames': 4}; "
                                         "bring back what it began with"):
        run.resume({"frames": 4})
    run.team = type("Elsewhere", (), {"agree": staticmethod(lambda value: {"frames": 5})})
    with pytest.raises(ValueError, match="this machine has other data than the first one: "
                                         "{'frames': 4}, there {'frames': 5}"):
        run.resume({"frames": 4})


def test_a_write_that_fails_leaves_a_checkpoint_to_resume_from(tmp_path):
    run = opened(tmp_path)
    run.write("last.pt", {"epoch": 1})
    for _ in range(3):
        with pytest.raises(Exception, match="pickle"):
            run.write("last.pt", {"epoch": 2, "bad": lambda: 0})
        assert run.resume({}) == {"epoch": 1}
    assert not list(run.folder.glob("*.tmp"))


def test_a_write_that_fails_after_a_damaged_checkpoint_keeps_the_good_one(tmp_path):
    run = opened(tmp_path)
    for epoch in (1, 2):
        run.write("last.pt", {"epoch": epoch})
    damage(run.folder / "last.pt")
    assert run.resume({}) == {"epoch": 1}
    with pytest.raises(Exception, match="pickle"):
        run.write("last.pt", {"epoch": 2, "bad": lambda: 0})
    assert run.resume({}) == {"epoch": 1}


def test_a_damaged_checkpoint_is_not_kept_as_the_one_before_and_a_whole_one_is_again(tmp_path):
    run = opened(tmp_path)
    for epoch in (1, 2):
        run.write("last.pt", {"epoch": epoch})
    damage(run.folder / "last.pt")
    assert run.resume({}) == {"epoch": 1}
    run.write("best.pt", {"epoch": 1})                                       # says nothing about last.pt
    run.write("last.pt", {"epoch": 3})
    assert read_checkpoint(run.folder / "previous.pt") == {"epoch": 1}
    run.write("last.pt", {"epoch": 4})
    assert read_checkpoint(run.folder / "previous.pt") == {"epoch": 3}


# ---- The log, and a folder that cannot be written

def test_a_resumed_run_writes_the_rows_after_its_checkpoint_again(tmp_path):
    run = opened(tmp_path)
    run.cut_log(1)                                                           # there is no log yet
    for epoch in range(1, 13):
        run.log({"epoch": epoch, "loss": 1 / 3, "score": 1e-9})
    run.cut_log(11)
    run.log({"epoch": 11, "loss": 2.0, "score": 0.0})
    header, *rows = (run.folder / "log.csv").read_text().splitlines()
    assert header == "epoch,loss,score" and [int(row.split(",")[0]) for row in rows] == list(range(1, 12))
    assert rows[0] == "1,0.333333,1e-09" and rows[-1] == "11,2,0"
    assert [run.last_row(name) for name in ("epoch", "loss", "score")] == [11, 2, 0]
    run.cut_log(1)
    assert (run.folder / "log.csv").read_text() == "epoch,loss,score\n"


@pytest.mark.parametrize("kind", ["below a file", "a file itself", "no permission"])
def test_an_output_folder_that_cannot_be_written_is_refused(tmp_path, kind):
    place = tmp_path / "place"
    if kind == "no permission":
        place.mkdir()
        place.chmod(stat.S_IRUSR | stat.S_IXUSR)
        if os.access(place, os.W_OK):
            pytest.skip("this user may write everywhere")
    else:
        (place if kind == "below a file" else tmp_path / "run").write_text("a file")
    with pytest.raises(ValueError, match="run: cannot be written .*; "
                                         "choose another place with --set run.out="):
        opened(place if kind != "a file itself" else tmp_path)


def test_other_ranks_write_nothing(tmp_path):
    run = RunFolder.__new__(RunFolder)
    run.folder, run.team = tmp_path, Team(1, 1, CPU)
    (tmp_path / "log.csv").write_text("epoch\n1\n")
    run.log({"epoch": 2})
    run.cut_log(1)
    run.write("last.pt", {"weights": torch.ones(1)})
    run.finish({"score": 0.5})
    assert files(tmp_path) == {"log.csv": b"epoch\n1\n"}
