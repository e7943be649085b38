"""The folder of a run: used by one run, not mixed with other settings or data, resumed from what is whole."""

import errno
import json
import os
import signal
import stat

import pytest
import torch

import run_folder
from checkpoints import checksum, read_checkpoint
from config import load
from distributed import Team
from made_of import settings_of
from processes import ALONE, CPU, in_child, in_team
from run_folder import RunFolder
from settings import Config


def opened(folder, settings=None, config=None, team=ALONE):
    """The run folder `folder`/run."""
    config = config or Config()
    config.run.out = str(folder)
    return RunFolder("run", config, team, settings or {"task.lr": 3e-5})


def begun(folder, settings=None, data=None):
    """The same, when something has been made there."""
    run = opened(folder, settings)
    run.remember(data or {}, None)
    run.write("last.pt", {"epoch": 0, "made_of": run.record})
    run.lock.close()
    return run


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_run_folder_keeps_its_configuration_and_opens_again(tmp_path):
    config = Config()
    config.run.seed = 17
    settings = settings_of(config, "temporal", "run.seed")
    run = opened(tmp_path, settings, config)
    run.remember({"videos": 3}, None)
    assert run.folder == tmp_path / "run"
    assert not run.finished and load(run.folder / "config.yaml").run.seed == 17
    run.finish({"score": 0.5})
    run.lock.close()
    assert opened(tmp_path, settings, config).finished
    assert json.loads((run.folder / "metrics.json").read_text()) == {"score": 0.5}
    assert json.loads((run.folder / "made_of.json").read_text()) == {
        "stage": "run", "settings": settings, "input": None, "base": "", "data": {"videos": 3},
        "from": None}


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
    begun(tmp_path, {"task.lr": 1e-4, "task.batch": 32, "task.fold": 1})
    before = files(tmp_path / "run")
    with pytest.raises(ValueError) as refusal:
        opened(tmp_path)
    first, *rest, ways_on = str(refusal.value).splitlines()
    assert first.endswith("run was made with other settings:")
    assert rest == ["  task.lr: was 0.0001, now 3e-05 (of stage run)",
                    "  task.fold: was 1, now 0 (of stage run)"]
    assert ways_on.startswith("two ways on: the earlier values, or a run of its own, --set run.name=NEW")
    assert files(tmp_path / "run") == before


def test_a_first_attempt_that_made_nothing_locks_nothing(tmp_path):
    run = opened(tmp_path, {"task.lr": 1e-4})
    run.remember({}, None)                               # and then, say, memory runs out
    run.lock.close()
    assert not opened(tmp_path).finished


def test_a_result_whose_record_is_gone_or_damaged_is_refused(tmp_path):
    run = begun(tmp_path)
    for damage, message in (((lambda path: path.write_text('{"stage": ')), "made_of.json: not the JSON"),
                            ((lambda path: path.unlink()), "run: made_of.json is missing, so nobody knows")):
        damage(run.folder / "made_of.json")
        with pytest.raises(ValueError, match=message):
            opened(tmp_path)


def test_a_finished_folder_is_left_as_it_is(tmp_path):
    run = begun(tmp_path)
    run.finish({"score": 0.5})
    before = files(run.folder)
    config = Config()
    config.run.workers = 3
    assert opened(tmp_path, config=config).finished
    assert files(run.folder) == before


def test_a_finished_record_has_the_checksum_of_the_weights_that_later_stages_read(tmp_path):
    for name in ("last.pt", "best.pt"):                  # the best ones, where there are any
        run = begun(tmp_path / name)
        run.write(name, {"epoch": 1})
        run.finish({})
        record = json.loads((run.folder / "made_of.json").read_text())
        assert record["checkpoint"] == name and record["checksum"] == checksum(run.folder / name)


def test_the_half_written_files_of_a_killed_run_are_removed(tmp_path):
    begun(tmp_path)
    for name in (".0.123.tmp", ".1.99.tmp", "kept.tmp"):
        (tmp_path / "run" / name).write_text("half")
    opened(tmp_path)
    assert set(files(tmp_path / "run")) == {".lock", "config.yaml", "made_of.json", "last.pt", "kept.tmp"}


def test_all_processes_are_refused_what_the_first_is_and_told_what_it_found(tmp_path):
    """The others neither look at the folder nor open it: it may be seen late on another machine."""
    def refused(team):
        config = Config()
        config.task.lr = team.rank + 2.0
        try:
            opened(tmp_path, config=config, team=team)
        except ValueError as refusal:
            return str(refusal)

    def found(team):
        return opened(tmp_path if team.rank == 0 else tmp_path / "elsewhere", team=team).finished

    begun(tmp_path, {"task.lr": 1.0})
    codes, (first, second) = in_team(2, refused)
    assert codes == [0, 0] and first == second and "task.lr: was 1.0, now 2.0" in first
    begun(tmp_path / "other").finish({})
    (tmp_path / "run").rename(tmp_path / "away"), (tmp_path / "other/run").rename(tmp_path / "run")
    assert in_team(2, found) == ([0, 0], [True, True])
    assert not (tmp_path / "elsewhere").exists()


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
                                         "or begin a run of its own"):
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

    run = begun(tmp_path)
    for epoch in (1, 2):
        run.write("last.pt", {"epoch": epoch})
    assert in_team(2, work) == ([0, 0], [{"epoch": 1}, {"epoch": 1}])
    assert "last.pt: not every process can read it" in capfd.readouterr().out


def test_other_data_than_a_run_began_with_or_than_the_first_machine_has_is_refused(tmp_path):
    began = {"training": "5 frames", "videos": ["a", "b"]}
    run = begun(tmp_path, data=began)
    assert run.resume(began)["epoch"] == 0
    with pytest.raises(ValueError) as refusal:
        run.resume({"training": "4 frames", "videos": ["a", "c", "d"]})
    assert str(refusal.value).split("\n") == [
        f"{run.folder} was made from other data:", "  training: was 5 frames, now 4 frames",
        "  videos: 1 fewer ['b'], 2 more ['c', 'd']",
        "two ways on: bring back what it began with, or begin a run of its own, --set run.name=NEW --set "
        "run.base=, which takes over the stages before it that stay the same"]
    run.team = type("Elsewhere", (), {"agree": staticmethod(lambda value: began)})
    with pytest.raises(ValueError, match="this machine has other data than the first one:\n"
                                         "  training: there 5 frames, here 4 frames"):
        run.resume({"training": "4 frames", "videos": ["a", "b"]})


def test_a_finished_result_is_compared_with_the_data_that_its_record_tells_of(tmp_path):
    run = begun(tmp_path, data={"training": "5 frames"})
    run.finish({})
    run.refuse_other_data({"training": "5 frames"})
    with pytest.raises(ValueError, match="training: was 5 frames, now 6 frames"):
        run.refuse_other_data({"training": "6 frames"})


def test_a_write_that_fails_leaves_a_checkpoint_to_resume_from(tmp_path):
    run = opened(tmp_path)
    run.write("last.pt", {"epoch": 1})
    for _ in range(3):
        with pytest.raises(Exception, match="pickle|local object"):
            run.write("last.pt", {"epoch": 2, "bad": lambda: 0})
        assert run.resume({}) == {"epoch": 1}
    assert not list(run.folder.glob("*.tmp"))


def test_a_write_that_fails_after_a_damaged_checkpoint_keeps_the_good_one(tmp_path):
    run = opened(tmp_path)
    for epoch in (1, 2):
        run.write("last.pt", {"epoch": epoch})
    damage(run.folder / "last.pt")
    assert run.resume({}) == {"epoch": 1}
    with pytest.raises(Exception, match="pickle|local object"):
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
