"""What the tests of pictures share: pixels read back, and where texts are (the fixture of conftest.py)."""

import numpy as np
from PIL import Image


def found(texts, string: str) -> list:
    return [text for text in texts if text.string == string]


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)         # (height, width, 3)


def read(path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB")).astype(int)         # (height, width, 3)


def is_colour(pixels, colour) -> np.ndarray:
    return (np.abs(pixels - np.array(colour)) <= 2).all(-1)                # (..., 3) -> (...)


def assert_texts_are_apart(texts, pixels):
    height, width, _ = pixels.shape
    texts = [text for text in texts if text.string]
    for i, a in enumerate(texts):
        assert 0 <= a.left and a.right <= width and 0 <= a.top and a.bottom <= height, f"{a} is cut off"
        for b in texts[:i]:
            beside = a.right <= b.left or b.right <= a.left or a.bottom <= b.top or b.bottom <= a.top
            assert beside, f"{a} and {b} overlap"
