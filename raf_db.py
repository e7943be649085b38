"""RAF-DB's basic set (paper §4.1.1): one list of files, and their faces, aligned.

`raf_db` opens a copy as a `face_set.FaceSet`. Layout: docs/data.md.
"""

import os
from pathlib import Path

from face_set import Entry, FaceSet, code, from_lists, need

RAF_DB = (6, 3, 2, 4, 5, 1, 0)       # from 1: Surprise Fear Disgust Happiness Sadness Anger Neutral


def raf_db(root) -> FaceSet:
    """RAF-DB's basic set. `train_1.jpg 5` in its list is Image/aligned/train_1_aligned.jpg.

    A list that says train_1_aligned.jpg is read alike. Where there is no Image/aligned/, the whole
    photographs, Image/original/train_1.jpg, are read, and the set's name says so.
    """
    root = Path(root) / "basic" if (Path(root) / "basic").is_dir() else Path(root)
    hint = "give the folder that holds basic/, or basic/ itself with EmoLabel/ and Image/aligned/ in it"
    path = need(root / "EmoLabel" / "list_patition_label.txt", hint)   # (sic)
    original = (root / "Image" / "original").is_dir() and not (root / "Image" / "aligned").is_dir()
    images, ending = ("original", "") if original else ("aligned", "_aligned")

    def entries():
        with open(path, encoding="utf-8-sig", errors="surrogateescape") as file:
            try:
                lines = file.readlines()
            except OSError as error:
                raise OSError(error.errno, error.strerror, str(path)) from None
        for number, line in enumerate(lines, start=1):
            where, fields = f"{path} line {number}", line.split()
            if not fields:
                continue
            if len(fields) != 2 or not fields[0].startswith(("train_", "test_")):
                raise ValueError(f"{where}: got {line.strip()[:80]!r}, expected a line like "
                                 "'train_00001.jpg 5'; the name begins with train_ or test_")
            stem, extension = os.path.splitext(fields[0])
            label = RAF_DB[code(fields[1], 1, 7, where) - 1]
            file_name = f"{stem.removesuffix('_aligned')}{ending}{extension}"
            yield Entry(where, file_name, label, stem.startswith("train_"))

    name = "RAF-DB, whole photographs (no Image/aligned)" if original else "RAF-DB"
    return from_lists(name, need(root / "Image" / images, hint), {path: entries()})
