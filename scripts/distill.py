"""Distil a ResNet50 encoder from teacher networks: `python -m scripts.distill --help`.

Teacher and student see the same random crop, flip and colour change of a photo, and with some probability the same
mixture of two (Beyer et al. 2022, "Knowledge distillation: A good teacher is patient and consistent"). The student
learns the teachers' streams at the end of each stage (Romero et al. 2015, "FitNets: Hints for Thin Deep Nets"), their
features, pooled and at each place of the grid, their class probabilities, and the words of the photo's captions.

The run directory holds all that a continuation needs: run the same command again and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from tqdm import tqdm

from handler.checkpoint import write_atomically, write_safetensors
from handler.config import EncoderConfig, PreprocessingConfig
from handler.encoder import FEATURE_SIZE, Encoder
from handler.errors import CaptionError
from handler.image import normalize
from handler.machine import available_cpus
from scripts.datasets import Example, add_dataset_arguments, dataset_from
from scripts.teachers import FEATURES, STREAMS, MobileNetV2Teacher

STOP_WORDS = frozenset(
    "a an the in on of and with is are to at his her its their it as by from for that this he she they one other while".split()
)
ModuleT = TypeVar("ModuleT", bound=nn.Module)
LEARNING_RATE = 1e-3
LEARNING_RATE_WITH_INIT = 3e-5
WARM_UP_STEPS = 200
SAVE_EVERY_SECONDS = 300
LONGEST_STEP_SECONDS = 60.0
"""A step that seems to take longer was suspended with its machine, which is not training time."""
STAGES = {"layer1": 256, "layer2": 512, "layer3": 1024, "layer4": FEATURE_SIZE}
"""The encoder's stages and their channels; each is on the grid of one of the teachers' streams."""


class Student(nn.Module):
    """The encoder and the linear heads that exist only while it is distilled."""

    def __init__(self, teachers: int, words: int) -> None:
        super().__init__()
        self.encoder = Encoder(EncoderConfig())
        sizes = zip(STAGES.values(), STREAMS.values(), strict=True)
        self.heads = nn.Sequential(*(nn.Linear(channels, stream * teachers) for channels, stream in sizes))
        self.words = nn.Linear(FEATURE_SIZE, words)
        nn.init.zeros_(self.words.weight)  # or it would disturb, at first, an encoder that knows something already

    def stages(self, images: Tensor) -> list[Tensor]:
        """Images to what each stage gives, (B, h, w, channels)."""
        found = []
        for name, stage in self.encoder.named_children():
            images = stage(images)
            if name in STAGES:
                found.append(images.permute(0, 2, 3, 1))
        return found

    def forward(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images to the teachers' standardised streams, (B, h, w, channels) of each stage, and word logits (B, words)."""
        found = self.stages(images)
        streams = [head(grid).float() for head, grid in zip(self.heads, found, strict=True)]
        return streams, self.words(found[-1].float().mean((1, 2)))


def concept_words(examples: list[Example], *, min_photos: int = 12) -> tuple[list[str], Tensor]:
    """The frequent content words of the captions, and a target (N, words) in 0..1 for each photo.

    A word named by one of the captions counts 0.5, by two or more 1.
    """
    named = [Counter(word for text in e.captions for word in set(re.findall(r"[a-z]+", text.lower()))) for e in examples]
    photos = Counter(word for counts in named for word in counts)
    words = [w for w, n in photos.most_common() if n >= min_photos and w not in STOP_WORDS]
    targets = torch.tensor([[counts[w] for w in words] for counts in named], dtype=torch.float32)
    return words, (targets / 2).clamp(max=1)


def cache_photos(examples: list[Example], size: int, path: Path) -> np.ndarray:
    """All photos as one memory-mapped array (N, size, size, 3) uint8; made once."""
    shape = (len(examples), size, size, 3)
    if not path.exists():
        part = path.with_suffix(".part.npy")
        photos = np.lib.format.open_memmap(part, mode="w+", dtype=np.uint8, shape=shape)

        def read(row: int) -> None:
            with Image.open(examples[row].path) as image:
                photos[row] = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.LANCZOS))

        with ThreadPoolExecutor(available_cpus()) as pool:
            for _ in tqdm(pool.map(read, range(len(examples))), total=len(examples), desc="photos", unit="photo"):
                pass
        photos.flush()
        part.rename(path)
    photos = np.load(path, mmap_mode="r")
    if photos.shape != shape:
        raise ValueError(f"{path} holds {photos.shape}, these photos need {shape}: use a new run directory")
    return photos


def read_photos(photos: np.ndarray | Tensor, rows: Tensor) -> Tensor:
    """Rows (B,), in ascending order, of cached photos to images (B, 3, S, S) in 0..1, on the photos' device."""
    rows = rows.sort().values
    read = photos[rows.to(photos.device)] if isinstance(photos, Tensor) else torch.from_numpy(photos[rows.numpy()])
    return read.permute(0, 3, 1, 2).float() / 255


def prepare(images: Tensor) -> Tensor:
    """Images (B, 3, H, W) in 0..1 to what the student takes."""
    return normalize(images * 255, PreprocessingConfig()).contiguous(memory_format=torch.channels_last)


def augment(photos: Tensor, pixels: int) -> Tensor:
    """Photos (B, 3, S, S) in 0..1 to random crops (B, 3, pixels, pixels), a quarter to all of each, flipped, recoloured."""
    n, device = len(photos), photos.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, device=device) * (high - low) + low

    area, ratio = uniform(0.25, 1), torch.exp(uniform(-1, 1) * math.log(4 / 3))
    width, height = (area * ratio).sqrt().clamp(max=1), (area / ratio).sqrt().clamp(max=1)
    theta = torch.zeros(n, 2, 3, device=device)
    theta[:, 0, 0] = width * uniform(-1, 1).sign()
    theta[:, 1, 1] = height
    theta[:, 0, 2] = uniform(-1, 1) * (1 - width)
    theta[:, 1, 2] = uniform(-1, 1) * (1 - height)
    grid = F.affine_grid(theta, [n, 3, pixels, pixels], align_corners=False)
    crops = F.grid_sample(photos, grid, align_corners=False)
    return (crops * uniform(0.75, 1.25, 1, 1, 1) + uniform(-0.08, 0.08, 3, 1, 1)).clamp(0, 1)


def resized(images: Tensor, pixels: int) -> Tensor:
    if images.shape[-2:] == (pixels, pixels):
        return images
    return F.interpolate(images, (pixels, pixels), mode="bilinear", antialias=True, align_corners=False)


def feature_loss(found: Tensor, wanted: Tensor) -> Tensor:
    """Distance and direction of standardised features; the last dimension is the features'."""
    return F.smooth_l1_loss(found, wanted) + (1 - F.cosine_similarity(found, wanted, dim=-1)).mean()


class Distillation:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.run: Path = arguments.run
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        if self.device == "cuda":
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        examples = dataset_from(arguments)
        held_out = [e for e in examples if e.split == "dev"]
        examples = [e for e in examples if e.split not in ("dev", "test")] + held_out
        self.held_out, self.train = len(held_out), len(examples) - len(held_out)
        self.words, self.targets = concept_words(examples)
        self.photos: np.ndarray | Tensor = cache_photos(
            examples, arguments.photo_size, self.run / f"photos-{arguments.photo_size}.npy"
        )
        if self.device == "cuda" and self.photos.nbytes < torch.cuda.mem_get_info()[0] // 2:
            self.photos = torch.from_numpy(np.array(self.photos)).to(self.device)
        self.teachers = [_on(self.device, MobileNetV2Teacher(path)) for path in arguments.teacher]
        torch.manual_seed(arguments.seed)
        student = Student(len(self.teachers), len(self.words))
        with torch.no_grad():
            student.words.bias.copy_(self.targets[: self.train].mean(0).clamp(1e-4, 1 - 1e-4).logit())
        if arguments.init:
            weights = {name: value.float() for name, value in load_file(arguments.init).items()}
            student.encoder.load_state_dict(weights, strict=False)
        self.student = _on(self.device, student)
        names = [name for name, _ in student.encoder.named_children()]
        self.frozen = [student.encoder.get_submodule(name) for name in names[: names.index(arguments.train_from)]]
        for stage in self.frozen:
            stage.requires_grad_(False)
        trained = [p for p in student.parameters() if p.requires_grad]
        matrices = [p for p in trained if p.ndim > 1]
        vectors = [p for p in trained if p.ndim <= 1]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": 0.03}, {"params": vectors, "weight_decay": 0.0}],
            lr=arguments.learning_rate,
            betas=(0.9, 0.99),
            fused=self.device == "cuda",
        )
        self.steps, self.seconds = 0, 0.0
        state_path = self.run / "state.pt"
        if state_path.exists():
            state = torch.load(state_path, map_location=self.device, weights_only=True)
            self.student.load_state_dict(state["student"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.steps, self.seconds = state["steps"], state["seconds"]
            self.mean, self.std, self.pooled_std = state["mean"], state["std"], state["pooled_std"]
            torch.set_rng_state(state["rng"].cpu())
            print(f"continuing after {self.steps} steps, {self.seconds / 60:.0f} minutes")
        else:
            pixels = arguments.teacher_pixels
            seen = [self.teach(augment(self.load(torch.randint(0, self.train, (64,))), pixels))[0] for _ in range(8)]
            streams = [torch.cat(parts) for parts in zip(*seen, strict=True)]
            self.mean = [stream.mean((0, 1, 2)) for stream in streams]
            self.std = [stream.std((0, 1, 2)) + 1e-3 for stream in streams]
            self.pooled_std = streams[-1].mean((1, 2)).std(0) + 1e-3
            if arguments.init:
                self.fit_heads()

    def load(self, index: Tensor) -> Tensor:
        """Row numbers (B,) to photos (B, 3, S, S) in 0..1 on the device."""
        return read_photos(self.photos, index).to(self.device)

    @torch.no_grad()
    def teach(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Images to all teachers' streams (B, h, w, channels) and class log-probabilities (B, teachers, classes)."""
        images = resized(images, self.arguments.teacher_pixels)
        with torch.autocast(self.device, dtype=torch.bfloat16):
            streams, classes = zip(*(teacher(images) for teacher in self.teachers), strict=True)
        return [torch.cat(parts, 1).permute(0, 2, 3, 1) for parts in zip(*streams, strict=True)], torch.stack(classes, 1)

    def wanted(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """The same with the streams standardised, and on the student's grids."""
        streams, classes = self.teach(images)
        if self.arguments.teacher_pixels != self.arguments.pixels:
            sides = [self.arguments.pixels // 4 // 2**stage for stage in range(len(STAGES))]
            streams = [resized(s.permute(0, 3, 1, 2), side).permute(0, 2, 3, 1) for s, side in zip(streams, sides, strict=True)]
        return [(s - mean) / std for s, mean, std in zip(streams, self.mean, self.std, strict=True)], classes

    @torch.no_grad()
    def fit_heads(self, batches: int = 24, ridge: float = 0.01) -> None:
        """Solve the heads of the streams by least squares, for an encoder that knows something already."""
        self.student.eval()
        grams = [torch.zeros(n + 1, n + 1, device=self.device) for n in STAGES.values()]
        crosses = [
            torch.zeros(n + 1, len(mean), device=self.device) for n, mean in zip(STAGES.values(), self.mean, strict=True)
        ]
        for _ in range(batches):
            images = augment(self.load(torch.randint(0, self.train, (self.arguments.batch,))), self.arguments.pixels)
            with torch.autocast(self.device, dtype=torch.bfloat16):
                found = self.student.stages(prepare(images))
            for gram, cross, grid, wanted in zip(grams, crosses, found, self.wanted(images)[0], strict=True):
                grid, wanted = grid.flatten(0, 2), wanted.flatten(0, 2)
                some = torch.randperm(len(grid))[:4096]
                inputs = F.pad(grid[some].float(), (0, 1), value=1.0)
                gram += inputs.T @ inputs
                cross += inputs.T @ wanted[some]
        for head, gram, cross in zip(self.student.heads, grams, crosses, strict=True):
            gram.diagonal()[:-1].add_(ridge * gram.diagonal()[:-1].mean())
            solved = torch.linalg.solve(gram, cross)
            head.weight.copy_(solved[:-1].T)  # type: ignore[operator]
            head.bias.copy_(solved[-1])  # type: ignore[operator]
        self.to_training()

    def to_training(self) -> None:
        self.student.train()
        for stage in self.frozen:
            stage.eval()

    def learn(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        with torch.autocast(self.device, dtype=torch.bfloat16):
            return self.student(prepare(images))

    @torch.no_grad()
    def look(self, limit: int = 256) -> dict[str, float]:
        """Held-out photos: cosine to the teachers' features, share of the five first words that a caption has."""
        self.student.eval()
        cosine, hits = [], []
        for start in range(self.train, min(self.train + limit, self.train + self.held_out), 64):
            index = torch.arange(start, min(start + 64, self.train + self.held_out))
            images = resized(self.load(index), self.arguments.pixels)
            streams, words = self.learn(images)
            wanted = (self.teach(images)[0][-1].mean((1, 2)) - self.mean[-1]) / self.pooled_std
            found = streams[-1].mean((1, 2)) * (self.std[-1] / self.pooled_std)
            cosine.append(F.cosine_similarity(found, wanted).mean().item())
            named = self.targets[index].to(self.device).gather(1, words.topk(5).indices) > 0
            hits.append(named.float().mean().item())
        self.to_training()
        return {"cosine": round(float(np.mean(cosine)), 4), "words@5": round(float(np.mean(hits)), 4)}

    def loss(self) -> dict[str, Tensor]:
        index = torch.randint(0, self.train, (self.arguments.batch,)).sort().values
        images = augment(self.load(index), self.arguments.pixels)
        words = self.targets[index].to(self.device)
        if torch.rand(()) < self.arguments.mixup:
            share = torch.rand(len(images), device=self.device)
            other = torch.randperm(len(images), device=self.device)
            images = images * share.view(-1, 1, 1, 1) + images[other] * (1 - share.view(-1, 1, 1, 1))
            words = words * share[:, None] + words[other] * (1 - share[:, None])
        wanted, wanted_classes = self.wanted(images)
        found, word_logits = self.learn(images)
        to_pooled = self.std[-1] / self.pooled_std
        pooled = found[-1].mean((1, 2))
        log_classes = torch.stack(
            [
                teacher.classify(part)
                for teacher, part in zip(self.teachers, (pooled * self.std[-1] + self.mean[-1]).split(FEATURES, 1), strict=True)
            ],
            1,
        )
        losses = {
            "features": feature_loss(pooled * to_pooled, wanted[-1].mean((1, 2)) * to_pooled),
            **{stage: F.mse_loss(f, w) for stage, f, w in zip(STAGES, found, wanted, strict=True)},
            "classes": F.kl_div(log_classes, wanted_classes, log_target=True, reduction="batchmean"),
            "words": F.binary_cross_entropy_with_logits(word_logits, words),
        }
        weights = {"features": 1.0, "classes": self.arguments.classes, "words": self.arguments.words}
        losses["total"] = torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()
        return losses

    def save(self) -> None:
        state = {
            "student": self.student.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "steps": self.steps,
            "seconds": self.seconds,
            "mean": self.mean,
            "std": self.std,
            "pooled_std": self.pooled_std,
            "rng": torch.get_rng_state(),
        }
        write_atomically(self.run / "state.pt", lambda path: torch.save(state, path))
        write_safetensors(self.run / "encoder.safetensors", self.student.encoder.state_dict(), half=True)

    def run_to_end(self) -> None:
        """Train until the time is over; Ctrl-C or SIGTERM ends it after the step in hand, with everything saved."""
        minutes = self.arguments.minutes
        stopped = threading.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stopped.set())
        self.to_training()
        saved = time.monotonic()
        with (
            open(self.run / "log.jsonl", "a") as log,
            tqdm(total=round(minutes, 1), initial=round(self.seconds / 60, 1), unit="min", desc="distil") as bar,
        ):
            while self.seconds < minutes * 60 and not stopped.is_set():
                began = time.monotonic()
                fraction = min(1.0, self.seconds / (minutes * 60))
                warm = min(1.0, (self.steps + 1) / WARM_UP_STEPS)
                for group in self.optimizer.param_groups:
                    group["lr"] = self.arguments.learning_rate * warm * (0.5 * (1 + math.cos(math.pi * fraction)) + 0.005)
                losses = self.loss()
                self.optimizer.zero_grad(set_to_none=True)
                losses["total"].backward()
                nn.utils.clip_grad_norm_(self.student.parameters(), 2.0)
                self.optimizer.step()
                self.steps += 1
                spent = min(time.monotonic() - began, LONGEST_STEP_SECONDS)
                self.seconds += spent
                bar.update(spent / 60)
                if self.steps % 100 == 0:
                    row = {
                        "step": self.steps,
                        "minutes": round(self.seconds / 60, 1),
                        **{name: round(value.item(), 4) for name, value in losses.items()},
                        **self.look(),
                    }
                    log.write(json.dumps(row) + "\n")
                    log.flush()
                    tqdm.write(json.dumps(row))
                if time.monotonic() - saved > SAVE_EVERY_SECONDS:
                    self.save()
                    saved = time.monotonic()
        self.save()


def _on(device: str, module: ModuleT) -> ModuleT:
    return module.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory; made, or continued")
    add_dataset_arguments(parser)
    parser.add_argument("--teacher", type=Path, action="append", required=True, help="MobileNetV2 weights; may be given twice")
    parser.add_argument("--init", type=Path, help="encoder weights to begin with")
    parser.add_argument("--minutes", type=float, default=90, help="training time in all; the learning rate ends with it")
    parser.add_argument("--pixels", type=int, default=128, help="side of the student's crops")
    parser.add_argument("--teacher-pixels", type=int, help="what the teachers see the same crop as; default: as the student")
    parser.add_argument("--photo-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument(
        "--learning-rate",
        type=float,
        help=f"default: {LEARNING_RATE}; with --init {LEARNING_RATE_WITH_INIT}, which more would destroy first",
    )
    parser.add_argument("--train-from", choices=("conv1", *STAGES), default="conv1", help="stages before this stay as they are")
    parser.add_argument("--classes", type=float, default=0.1, help="weight of the teachers' class probabilities")
    parser.add_argument("--words", type=float, default=10.0, help="weight of the captions' words")
    parser.add_argument("--mixup", type=float, default=0.0, help="probability that a batch is mixed")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.teacher_pixels = arguments.teacher_pixels or arguments.pixels
    arguments.learning_rate = arguments.learning_rate or (LEARNING_RATE_WITH_INIT if arguments.init else LEARNING_RATE)
    arguments.run.mkdir(parents=True, exist_ok=True)
    try:
        distillation = Distillation(arguments)
    except (CaptionError, OSError, SafetensorError, ValueError) as error:
        parser.error(str(error))
    print(
        f"{distillation.device}: {distillation.train} photos, {distillation.held_out} held out, "
        f"{len(distillation.words)} words, "
        f"{len(distillation.teachers)} teachers, {arguments.minutes:.0f} minutes in all"
    )
    distillation.run_to_end()
    print(f"held out: {distillation.look(limit=1000)}\nencoder: {arguments.run / 'encoder.safetensors'}")


if __name__ == "__main__":
    main()
