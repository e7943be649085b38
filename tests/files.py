"""Texts that several tests write, and scripts where some packages are not installed."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WITHOUT = """
import runpy, sys
packages, sys.argv = sys.argv[1].split(), sys.argv[2:]
sys.modules |= dict.fromkeys(packages)
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def write(path, *lines, end="\n", bom="") -> Path:
    """A text, each line with this end. -> the path, whose folder is made"""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((bom + "".join(f"{line}{end}" for line in lines)).encode())
    return path


def run_without(packages: str, folder, module: str, *arguments) -> tuple[int, str, str]:
    """`python -m MODULE ARGUMENTS` in a folder. -> exit code, stdout, stderr"""
    command = [sys.executable, "-c", WITHOUT, packages, module, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env={"PYTHONPATH": f"{ROOT}"})
    return done.returncode, done.stdout, done.stderr


def label_file(root, task, split: str, video: str, rows) -> Path:
    """The label file of a video, below a folder like Aff-Wild2's. -> its path"""
    return write(Path(root) / task.folders[0] / split / f"{video}.txt", ",".join(task.outputs), *rows)
