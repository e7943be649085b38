"""The finished runs that several test files share. Each is made once, by the first test that asks for it;
tests compare with it or change a copy of it. And the texts of a picture."""

from types import SimpleNamespace

import pytest
import torch
from PIL import ImageDraw

import tiny
from tiny import ROOT, TINY, TRAIN_AU, done, ready

torch.set_num_threads(1)


# ---- Without dropout and drop path, whose masks differ with the number of processes

@pytest.fixture(scope="session")
def made_by_command(tmp_path_factory):
    """Everything made from nothing by one command, as README gives it.

    -> {processes: (folder, what the command said)}
    """
    folders = {world: tiny.write(tmp_path_factory.mktemp(f"by{world}")) for world in (1, 2)}
    script = [ROOT / TRAIN_AU[0], *TRAIN_AU[1:]]
    jobs = {1: tiny.command(folders[1], *script),
            2: tiny.command(folders[2], *tiny.torchrun("--nproc_per_node=2"), *script)}
    ended = {world: tiny.end(job) for world, job in jobs.items()}
    for code, said in ended.values():
        assert code == 0, said
    return {world: (folders[world], said) for world, (_, said) in ended.items()}


@pytest.fixture(scope="session")
def finished(made_by_command):
    """All stages and all tasks, in one process. -> the folder"""
    folder, _ = made_by_command[1]
    for task in ("va", "expr"):
        done(folder, "train_task.py", "--task", task, *TINY)
    return folder


@pytest.fixture(scope="session")
def finished_by_two(made_by_command):
    """The same in two processes. -> the folder"""
    folder, _ = made_by_command[2]
    for task in ("va", "expr"):
        done(folder, "train_task.py", "--task", task, *TINY, world=2)
    return folder


# ---- With dropout and drop path, whose masks must come back after a restart

@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """All stages in one process, without an interruption. -> the folder"""
    folder = tiny.write(tmp_path_factory.mktemp("undisturbed"), **tiny.DROPOUT)
    done(folder, *TRAIN_AU)
    return folder


@pytest.fixture(scope="session")
def undisturbed_by_two(undisturbed, tmp_path_factory):
    """The task in two processes, without an interruption. -> the folder of that stage"""
    folder, stage = ready(undisturbed, tmp_path_factory.mktemp("undisturbed_by_two"), "task_au")
    done(folder, *TRAIN_AU, world=2)
    return stage


# ---- Pictures

@pytest.fixture
def texts(monkeypatch):
    """All texts drawn from here on, in order: the string and the box that it fills."""
    drawn, draw_text = [], ImageDraw.ImageDraw.text

    def record(pen, xy, string, fill=None, font=None, anchor=None):
        left, top, right, bottom = pen.textbbox(xy, string, font, anchor)
        drawn.append(SimpleNamespace(string=string, left=left, top=top, right=right, bottom=bottom,
                                     x=(left + right) / 2, y=(top + bottom) / 2))
        draw_text(pen, xy, string, fill, font, anchor=anchor)
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", record)
    return drawn
