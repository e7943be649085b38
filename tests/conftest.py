"""The finished runs that several test files share. Each is made once, by the first test that asks for it;
tests compare with it or change a copy of it."""

import os

import pytest
import torch

import tiny
from tiny import TINY, TRAIN_AU, done, ready

os.environ.setdefault("OMP_NUM_THREADS", "1")              # of the processes that tests start
torch.set_num_threads(1)


def made(folder, world, *tasks):
    """All stages of the first paper, and these tasks, made from nothing by one command each. -> the folder"""
    for task in tasks:
        done(folder, "train_task", "--task", task, *TINY, world=world)
    return folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """All stages and all tasks, in one process, without dropout."""
    return made(tiny.write(tmp_path_factory.mktemp("finished")), 1, "au", "va", "expr")


@pytest.fixture(scope="session")
def finished_by_two(tmp_path_factory):
    """The same in two processes."""
    return made(tiny.write(tmp_path_factory.mktemp("finished_by_two")), 2, "au", "va", "expr")


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """All stages in one process, with dropout, whose masks must come back after a restart."""
    return made(tiny.write(tmp_path_factory.mktemp("undisturbed"), **tiny.DROPOUT), 1, "au")


@pytest.fixture(scope="session")
def undisturbed_by_two(undisturbed, tmp_path_factory):
    """The task in two processes, with dropout. -> the folder of that stage"""
    folder, stage = ready(undisturbed, tmp_path_factory.mktemp("undisturbed_by_two"), "task_au")
    done(folder, *TRAIN_AU, world=2)
    return stage
