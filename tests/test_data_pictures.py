"""CelebA and ImageNet from folders of small pictures, whole and broken."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from datamix.errors import ConfigError
from edge.data import load_dataset

NAMES = ("Bald", "Smiling", "Young")


def write_picture(
    path: Path, colour: tuple[int, int, int], width: int = 40, height: int = 60
) -> None:
    """A grey picture with a square of ``colour`` in the middle, as wide as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", (width, height), (128, 128, 128))
    side = min(width, height)
    picture.paste(
        colour,
        ((width - side) // 2, (height - side) // 2, (width + side) // 2, (height + side) // 2),
    )
    picture.save(path, quality=95)


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    for number in range(4):
        write_picture(tmp_path / f"img_align_celeba/00{number}.jpg", (60 * number, 0, 0))
    (tmp_path / "list_attr_celeba.txt").write_text(
        "4\nBald Smiling Young \n"
        "000.jpg  1 -1  1\n001.jpg -1 -1 -1\n002.jpg  1  1  1\n003.jpg -1  1 -1\n"
    )
    (tmp_path / "list_eval_partition.txt").write_text(
        "000.jpg 0\n001.jpg 0\n002.jpg 1\n003.jpg 2\n"
    )
    return tmp_path


def test_celeba(celeba: Path) -> None:
    data = load_dataset("celeba", "train", celeba)
    assert data.multilabel and data.class_names == NAMES
    assert data.labels.tolist() == [[1, 0, 1], [0, 0, 0]]
    assert data.labels.dtype == np.float32
    images = data.inputs[:]
    assert images.shape == (2, 3, 64, 64) and images.dtype == np.uint8
    # The central square; of the grey above and below it nothing but what JPEG smears.
    for image, red in zip(images[..., 2:-2, :].astype(int), (0, 60), strict=True):
        assert np.abs(image[0] - red).max() < 12 and image[1:].max() < 12
    np.testing.assert_array_equal(data.inputs[np.array([1, 0])], images[::-1])
    assert load_dataset("celeba", "val", celeba).labels.tolist() == [[1, 1, 1]]
    assert load_dataset("celeba", "test", celeba).labels.tolist() == [[0, 1, 0]]


@pytest.mark.parametrize(
    ("file", "old", "new", "sentence"),
    [
        ("list_eval_partition.txt", "000.jpg", "009.jpg", "000.jpg is in only one of"),
        ("list_eval_partition.txt", "001.jpg 0", "001.jpg 3", "a line '001.jpg 3', expected NAME"),
        ("list_eval_partition.txt", "001.jpg 0", "001.jpg", "a line '001.jpg', expected NAME"),
        ("list_attr_celeba.txt", "4\n", "5\n", "does not begin with the number of its pictures"),
        ("list_attr_celeba.txt", "4\n", "", "does not begin with the number of its pictures"),
        ("list_attr_celeba.txt", "000.jpg  1 -1", "000.jpg  1", "000.jpg needs 3 values"),
        ("list_attr_celeba.txt", "000.jpg  1", "000.jpg  0", "000.jpg needs 3 values, each 1 or"),
        ("list_attr_celeba.txt", "Bald", "B\xff", "celeba.txt cannot be read"),
    ],
)
def test_lists_that_do_not_fit(celeba: Path, file: str, old: str, new: str, sentence: str) -> None:
    text = (celeba / file).read_text()
    assert old in text
    (celeba / file).write_text(text.replace(old, new, 1), encoding="latin1")
    with pytest.raises(ConfigError, match=sentence):
        load_dataset("celeba", "train", celeba)


@pytest.mark.parametrize("name", ["009.jpg", "../../secret.jpg", "/etc/passwd"])
def test_a_list_names_a_picture_that_is_not_there(celeba: Path, name: str) -> None:
    for file in ("list_attr_celeba.txt", "list_eval_partition.txt"):
        text = (celeba / file).read_text()
        (celeba / file).write_text(text.replace("000.jpg", name))
    (celeba.parent / "secret.jpg").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"no {name} in .*; expected img_align_celeba/"):
        load_dataset("celeba", "train", celeba)


def test_what_is_missing_from_celeba(celeba: Path) -> None:
    (celeba / "list_attr_celeba.txt").unlink()
    with pytest.raises(ConfigError, match="no list_attr_celeba.txt in .*; expected img_align_cel"):
        load_dataset("celeba", "train", celeba)


def test_a_broken_picture_is_named_when_it_is_read(celeba: Path) -> None:
    path = celeba / "img_align_celeba/001.jpg"
    whole = path.read_bytes()
    data = load_dataset("celeba", "train", celeba)
    for body in (b"", b"no picture", whole[: len(whole) // 2]):
        path.write_bytes(body)
        assert len(data.inputs[:1]) == 1
        with pytest.raises(ConfigError, match="001.jpg is no picture that can be read"):
            data.inputs[:]
    path.unlink()
    with pytest.raises(ConfigError, match="001.jpg is not there"):
        data.inputs[np.array([1])]


@pytest.fixture
def imagenet(tmp_path: Path) -> Path:
    for part, times in (("train", 2), ("val", 1)):
        for number, wnid in enumerate(("n01440764", "n01443537")):
            for i in range(times):
                path = tmp_path / part / wnid / f"{wnid}_{i}.JPEG"
                write_picture(path, (0, 0, 100 + 100 * number), 300, 240)
    (tmp_path / "train/n01440764/README.txt").write_text("no picture, and not taken for one")
    (tmp_path / "train/n01440764/._a.JPEG").write_bytes(b"what some systems leave beside a file")
    (tmp_path / "train/.trash").mkdir()
    return tmp_path


def test_imagenet(imagenet: Path) -> None:
    data = load_dataset("imagenet", "train", imagenet)
    assert data.class_names == ("n01440764", "n01443537")
    assert data.labels.tolist() == [0, 0, 1, 1] and not data.multilabel
    images = data.inputs[np.array([0, 3])].astype(int)
    assert images.shape == (2, 3, 224, 224)
    for image, blue in zip(images, (100, 200), strict=True):
        assert np.abs(image[2] - blue).max() < 12 and image[:2].max() < 12
    assert load_dataset("imagenet", "test", imagenet).labels.tolist() == [0, 1]


def test_imagenets_classes_are_the_same_in_both_folders(imagenet: Path) -> None:
    (imagenet / "val/n01443537").rename(imagenet / "val/n01443538")
    with pytest.raises(ConfigError, match="class n01443537 is in only one of train and val"):
        load_dataset("imagenet", "test", imagenet)
    (imagenet / "val").rename(imagenet / "elsewhere")
    assert len(load_dataset("imagenet", "train", imagenet)) == 4
    with pytest.raises(ConfigError, match="no val/CLASS in .*; expected train/CLASS/.*--data DIR"):
        load_dataset("imagenet", "test", imagenet)
    with pytest.raises(ConfigError, match="split of imagenet is 'val', expected one of train, t"):
        load_dataset("imagenet", "val", imagenet)
