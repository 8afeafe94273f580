"""Draw a small data set of shapes with captions, to try training on: `python -m scripts.toy_dataset FOLDER`."""

from __future__ import annotations

import argparse
import csv
import random
from pathlib import Path

from PIL import Image, ImageDraw

COLOURS = {"red": (200, 40, 40), "green": (40, 160, 60), "blue": (40, 70, 200), "yellow": (230, 200, 40)}
SHAPES = ("circle", "square", "triangle")
BACKGROUNDS = {"white": (245, 245, 245), "black": (15, 15, 15), "grey": (128, 128, 128)}
SIZE = 160
CHINESE = {
    **{"red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "white": "白色", "black": "黑色", "grey": "灰色"},
    **{"circle": "圆形", "square": "方形", "triangle": "三角形"},
}


def draw(shape: str, colour: str, background: str, chance: random.Random) -> Image.Image:
    """One shape somewhere on the background."""
    image = Image.new("RGB", (SIZE, SIZE), BACKGROUNDS[background])
    side = chance.randint(SIZE // 3, 2 * SIZE // 3)
    left, top = chance.randint(0, SIZE - side), chance.randint(0, SIZE - side)
    box, pen = (left, top, left + side, top + side), ImageDraw.Draw(image)
    if shape == "circle":
        pen.ellipse(box, COLOURS[colour])
    elif shape == "square":
        pen.rectangle(box, COLOURS[colour])
    else:
        pen.polygon([(left, top + side), (left + side, top + side), (left + side / 2, top)], COLOURS[colour])
    return image


def captions(shape: str, colour: str, background: str, language: str) -> list[str]:
    if language == "zh":
        ground, tint, form = (CHINESE[word] for word in (background, colour, shape))
        return [f"{ground}背景上的一个{tint}{form}。", f"一个{tint}的{form}。"]
    return [f"A {colour} {shape} on a {background} background.", f"There is a {colour} {shape}."]


def make(folder: Path, *, photos: int = 200, seed: int = 0, language: str = "en") -> Path:
    """Write `folder/photos/*.png` and `folder/captions.csv` with the columns image, caption, split. Gives the CSV."""
    chance = random.Random(seed)
    (folder / "photos").mkdir(parents=True, exist_ok=True)
    table = folder / "captions.csv"
    with open(table, "w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "caption", "split"])
        for number in range(photos):
            what = chance.choice(SHAPES), chance.choice(list(COLOURS)), chance.choice(list(BACKGROUNDS))
            name = f"{number:04d}.png"
            draw(*what, chance).save(folder / "photos" / name)
            for text in captions(*what, language):
                rows.writerow([name, text, "dev" if number % 5 == 0 else "train"])
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--photos", type=int, default=200)
    parser.add_argument("--language", choices=("en", "zh"), default="en")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    table = make(arguments.folder, photos=arguments.photos, seed=arguments.seed, language=arguments.language)
    print(f"{arguments.photos} photos in {arguments.folder / 'photos'}, captions in {table}")


if __name__ == "__main__":
    main()
