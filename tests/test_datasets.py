"""Every form of caption file gives the same examples, and what is wrong with a data set is said before it is used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from scripts.datasets import DatasetError, Example, check, load_dataset, of_split, summary


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (8, 8)).save(folder / name)
    return folder


def write(path: Path, content: object) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def expected(photos: Path) -> list[Example]:
    return [Example(photos / "a.jpg", ("A dog .", "Dogs"), "train"), Example(photos / "b.jpg", ("A cat",), "dev")]


def test_flickr_token_file_with_split_files(photos: Path, tmp_path: Path) -> None:
    captions = write(tmp_path / "c.txt", "a.jpg#0\tA dog .\na.jpg#1\tDogs\nb.jpg#0\tA cat\nleft_out.jpg#0\tA bird\n")
    splits = {"train": write(tmp_path / "train.txt", "a.jpg\n"), "dev": write(tmp_path / "dev.txt", "b.jpg\n")}
    assert load_dataset(photos, {"": captions}, splits=splits) == expected(photos)


def test_coco_with_a_file_for_each_split(photos: Path, tmp_path: Path) -> None:
    train = {
        "images": [{"id": 7, "file_name": "a.jpg"}],
        "annotations": [{"image_id": 7, "caption": "A dog ."}, {"image_id": 7, "caption": "Dogs"}],
    }
    dev = {"images": [{"id": 7, "file_name": "b.jpg"}], "annotations": [{"image_id": 7, "caption": "A cat"}]}
    files = {"train": write(tmp_path / "t.json", train), "dev": write(tmp_path / "d.json", dev)}
    assert load_dataset(photos, files) == expected(photos)


def test_karpathy_splits_by_their_names(photos: Path, tmp_path: Path) -> None:
    images = [
        {"filename": "a.jpg", "split": "restval", "sentences": [{"raw": "A dog ."}, {"raw": "Dogs"}]},
        {"filename": "b.jpg", "split": "val", "sentences": [{"raw": "A cat"}]},
    ]
    assert load_dataset(photos, {"": write(tmp_path / "k.json", {"images": images})}) == expected(photos)


def test_csv_with_quoted_captions(photos: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "c.csv", 'image,caption,split\na.jpg,A dog .,train\na.jpg,"Dogs",train\nb.jpg,A cat,dev\n')
    assert load_dataset(photos, {"": table}) == expected(photos)


def test_without_splits_a_photo_keeps_its_side(photos: Path, tmp_path: Path) -> None:
    table = write(tmp_path / "c.csv", "image,caption\n" + "".join(f"{n}.jpg,A dog\n" for n in range(500)))
    split_of = {e.path.name: e.split for e in load_dataset(photos, {"": table}, dev_share=0.2)}
    assert 60 < list(split_of.values()).count("dev") < 140
    fewer = write(tmp_path / "d.csv", "image,caption\n" + "".join(f"{n}.jpg,A dog\n" for n in range(100)))
    assert all(split_of[e.path.name] == e.split for e in load_dataset(photos, {"": fewer}, dev_share=0.2))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.json", "{"),
        ("c.json", {"what": 1}),
        ("c.csv", "photo,text\n"),
        ("c.txt", "a.jpg A dog without a tab"),
        ("c.csv", "image,caption\n"),
    ],
)
def test_a_file_of_no_known_form_is_refused(photos: Path, tmp_path: Path, name: str, content: object) -> None:
    with pytest.raises(DatasetError, match=r"c\.(json|csv|txt)"):
        load_dataset(photos, {"": write(tmp_path / name, content)})


def test_missing_files_are_refused(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="cannot be read"):
        load_dataset(photos, {"": tmp_path / "none.csv"})
    with pytest.raises(DatasetError, match="not a folder"):
        load_dataset(tmp_path / "none", {"": tmp_path / "none.csv"})


def test_problems_are_listed_and_left_out(photos: Path) -> None:
    (photos / "torn.jpg").write_bytes((photos / "a.jpg").read_bytes()[:300])
    examples = [
        Example(photos / "a.jpg", ("A dog", " ")),
        Example(photos / "b.jpg", ("",)),
        Example(photos / "gone.jpg", ("A cat",)),
        Example(photos / "torn.jpg", ("A cat",)),
    ]
    usable, problems = check(examples)
    assert usable == [Example(photos / "a.jpg", ("A dog",))]
    assert [p.reason.split(":")[0] for p in problems] == ["an empty caption", "no caption", "missing", "unreadable"]
    assert "gone.jpg" in summary(problems)
    assert "and 3 more" in summary(problems, shown=1)


def test_an_empty_split_names_the_others(photos: Path) -> None:
    with pytest.raises(DatasetError, match="train"):
        of_split(expected(photos), "test")
