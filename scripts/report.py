"""Curves and an HTML report of a training run."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from PIL import Image

from handler.checkpoint import write_atomically
from scripts.metrics import plain_tokens, scores
from scripts.training import Trainer

matplotlib.use("Agg")  # no display is needed
import matplotlib.pyplot as plt

SHOWN = 12
THUMBNAIL = 224

TEMPLATE = jinja2.Template(
    """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem; text-align: right; border-bottom: 1px solid #ddd; }
.photos { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; } img { max-width: 100%; } .reference { color: #666; font-size: .85rem; } code { white-space: pre-wrap; }
</style>
<h1>{{ title }}</h1>
<p>{% for name, value in reached.items() %}{{ name }} <strong>{{ "%.3f"|format(value) }}</strong> {% endfor %}on dev.</p>
<img src="data:image/png;base64,{{ curves }}" alt="loss and scores by epoch">
{% for heading, photos in groups %}
<h2>{{ heading }}</h2>
<div class="photos">{% for photo in photos %}
<figure><img src="data:image/jpeg;base64,{{ photo.image }}" alt="">
<figcaption><strong>{{ photo.caption }}</strong> ({{ "%.2f"|format(photo.cider) }})
{% for text in photo.references %}<div class="reference">{{ text }}</div>{% endfor %}</figcaption></figure>
{% endfor %}</div>
{% endfor %}
<h2>Epochs</h2>
<table><tr>{% for name in log[0] %}<th>{{ name }}</th>{% endfor %}</tr>
{% for row in log %}<tr>{% for value in row.values() %}<td>{{ "%.4f"|format(value) if value is float else value }}</td>
{% endfor %}</tr>{% endfor %}</table>
<h2>Settings</h2>
<code>{{ settings }}</code>
</html>
""",
    autoescape=True,
)


def draw_curves(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Loss, CIDEr and BLEU-4 by epoch as a PNG; the stages one after the other."""
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    for axis, name in zip(axes, ("loss", "CIDEr", "BLEU-4"), strict=True):
        for stage in dict.fromkeys(row["stage"] for row in log):
            if name == "loss" and stage == "cider":
                continue  # of a self-critical stage it is a gradient's vehicle and says nothing
            at = [n for n, row in enumerate(log, 1) if row["stage"] == stage]
            axis.plot(at, [log[n - 1][name] for n in at], marker=".", label=stage)
        axis.set(title=name if name == "loss" else f"{name} on dev", xlabel="epoch")
    axes[1].legend()
    write_atomically(path, lambda part: figure.savefig(part, format="png", dpi=120))
    plt.close(figure)


def write_report(run: Path, trainer: Trainer, reached: Mapping[str, float]) -> None:
    """`RUN/report.html`, one file with all its pictures: curves, the best and worst captions of dev, settings."""
    examples = trainer.dev_split.examples
    captions = trainer.caption_dev(reached["length_penalty"])
    references = plain_tokens([e.captions for e in examples], trainer.language)
    cider = scores(references, {n: [" ".join(tokens)] for n, tokens in enumerate(captions)}).cider
    order = sorted(range(len(examples)), key=lambda n: -cider[n])

    def shown(numbers: Sequence[int]) -> list[dict[str, Any]]:
        return [
            {
                "image": thumbnail(examples[n].path),
                "caption": trainer.language.separator.join(captions[n]),
                "cider": cider[n],
                "references": examples[n].captions,
            }
            for n in numbers
        ]

    every = range(0, len(examples), max(1, len(examples) // SHOWN))
    groups = [
        ("Best by CIDEr", shown(order[:SHOWN])),
        ("Worst by CIDEr", shown(order[-SHOWN:])),
        ("Any", shown(list(every)[:SHOWN])),
    ]
    page = TEMPLATE.render(
        title=f"Training run {run.name}",
        reached=reached,
        curves=base64.b64encode((run / "curves.png").read_bytes()).decode(),
        groups=groups,
        log=trainer.log,
        settings=json.dumps(trainer.config.model_dump(), indent=1),
    )
    write_atomically(run / "report.html", lambda part: part.write_text(page, encoding="utf-8"))


def thumbnail(path: Path) -> str:
    """A photo as a small JPEG in base64."""
    buffer = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        image.convert("RGB").save(buffer, "JPEG", quality=80)
    return base64.b64encode(buffer.getvalue()).decode()
