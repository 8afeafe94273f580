"""The training of a captioner: cross-entropy on captions, self-critical training on CIDEr, sequence-level interpolation.

Nothing here depends on what was computed before a step but the state that is saved: each step's chance is seeded by its
number. A run that was killed therefore goes on to the very numbers that it would have reached.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel
from tqdm import tqdm

from handler.beam_search import Hypothesis, Search, search
from handler.checkpoint import save_checkpoint, write_atomically
from handler.config import Config, LanguageConfig, ModelConfig, SearchConfig
from handler.decoder import Decoder
from handler.encoder import Encoder
from handler.expansion import fold
from handler.networks import weights_of
from handler.torch_expansion import TorchExpander
from handler.vocabulary import Vocabulary, tokenize
from scripts.datasets import Example
from scripts.features import FeatureCache, Photos, encode
from scripts.metrics import CiderReward, plain_tokens, scores

Stage = Literal["captions", "cider", "interpolation"]
STAGES: tuple[Stage, ...] = ("captions", "cider", "interpolation")
LENGTH_PENALTIES = (0.0, 0.25, 0.5, 0.75, 1.0, 1.25, 1.5)
CHANCE = 0.01
"""By less than this share of it CIDEr on some thousand photos differs by chance."""
SEARCH_BATCH = 100


class TrainConfig(Config):
    """How a model is trained. Saved in the run directory."""

    seed: int = 0
    epochs: int = Field(default=20, ge=0, description="of cross-entropy at most")
    batch: int = Field(default=128, ge=1, description="captions in a step of cross-entropy")
    learning_rate: float = Field(default=2e-3, gt=0, description="of the decoder, at its height")
    encoder_learning_rate: float = Field(default=0.0, ge=0, description="above 0 the encoder is trained too, end to end")
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    weight_decay: float = Field(default=0.01, ge=0)
    warm_up: float = Field(default=0.05, ge=0, lt=1, description="share of a stage's steps; then half a cosine down to 0")
    gradient_clip: float = Field(default=1.0, gt=0, description="norm of the gradient at most")
    average: float = Field(default=0.998, ge=0, lt=1, description="decay of the averaged weights, which are what is kept")
    views: int = Field(default=2, ge=1, description="1: the photos; 2: and mirrored; more: and random crops")
    patience: int = Field(default=4, ge=1, description="epochs without a better CIDEr on dev before a stage ends")
    cider_epochs: int = Field(default=0, ge=0, description="of self-critical training at most, after cross-entropy")
    cider_batch: int = Field(default=64, ge=1, description="photos in a step of self-critical training")
    cider_learning_rate: float = Field(default=1e-4, gt=0)
    cider_samples: int = Field(default=5, ge=2, description="captions drawn for each photo")
    interpolation_epochs: int = Field(
        default=0, ge=0, description="on the best of the model's own captions, or its teacher's, at most, in the end"
    )
    interpolation_learning_rate: float = Field(default=1e-3, gt=0)
    interpolation_beam_size: int = Field(default=5, ge=1, le=10, description="of the search for those captions")
    interpolation_share: float = Field(
        default=0.5, gt=0, le=1, description="of that caption; the rest is what was likely before"
    )
    interpolation_noise: float = Field(
        default=2.0, ge=0, description="times what saving a photo once more does to its features"
    )
    beam_size: int = Field(default=3, ge=1, le=10, description="of the search on dev")
    precision: Literal["fp32", "bf16"] = Field(default="bf16", description="of the decoder; the encoder always takes bf16")


@dataclass(frozen=True)
class Split:
    """The photos of a split with what is needed to train on them or to judge on them."""

    examples: Sequence[Example]
    views: Sequence[FeatureCache]
    """Features of each view of the photos; view 0 is the photos as they are served."""
    resaved: FeatureCache | None = None
    """Features of the first of the photos, each saved once more as a JPEG."""


class Forced(NamedTuple):
    """What the decoder says to B captions of T tokens at most, each token given those before it."""

    features: Tensor
    """(B, 2048), standardised"""
    inputs: Tensor
    """(B, T)"""
    targets: Tensor
    """(B * T,): the next tokens, -100 behind the end"""
    logits: Tensor
    """(B * T, V)"""


class Net(nn.Module):
    """What is trained: the decoder, and the encoder unless it is left as it is."""

    def __init__(self, decoder: Decoder, encoder: Encoder | None) -> None:
        super().__init__()
        self.decoder, self.encoder = decoder, encoder


class Trainer:
    """Trains `decoder`, and `encoder` if it has a learning rate, and keeps all that happens in `run`."""

    def __init__(
        self,
        run: Path,
        config: TrainConfig,
        model: ModelConfig,
        vocabulary: Vocabulary,
        *,
        train: Split,
        dev: Split,
        encoder: Encoder,
        encoder_path: Path,
        start_from: Decoder | None = None,
        teacher: Decoder | None = None,
        workers: int = 2,
    ) -> None:
        """encoder_path: its weight file, which the checkpoint refers to unless the encoder is trained.

        start_from: a trained decoder for plain features of this encoder, whose tokens are the first of `vocabulary`.
        teacher: one of any size, with the tokens of `vocabulary`, which the interpolation learns from instead of the model.
        """
        self.run, self.config, self.model, self.vocabulary = run, config, model, vocabulary
        self.train_split, self.dev_split, self.encoder_path = train, dev, encoder_path
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.language: LanguageConfig = model.languages[0]
        self.start = vocabulary.index[self.language.start_token]
        self.forbidden = [*vocabulary.never_generated, vocabulary.unknown_index]
        self.fine_tuned = config.encoder_learning_rate > 0
        self.pool = ThreadPoolExecutor(workers)

        self.tokens = [[tokenize(text, self.language.tokenization) for text in e.captions] for e in train.examples]
        self.captions = [(photo, vocabulary.encode(t)) for photo, texts in enumerate(self.tokens) for t in texts]
        sample = train.views[0][torch.arange(0, len(train.examples), max(1, len(train.examples) // 5000))]
        resaved = train.resaved[torch.arange(len(train.resaved))] if train.resaved else torch.empty(0, sample.shape[1])
        self.noise = resaved - train.views[0][torch.arange(len(resaved))]  # (N, 2048)
        self.mean, self.std = sample.mean(0).to(self.device), (sample.std(0) + 0.1 * sample.std()).to(self.device)

        torch.manual_seed(config.seed)
        decoder = Decoder(model.decoder)
        if start_from is not None:
            grow(decoder, self._for_standardized(start_from))
        self.teacher = self._for_standardized(teacher).to(self.device) if teacher else None
        self.net = Net(decoder, encoder if self.fine_tuned else None).to(self.device)
        self.average = AveragedModel(self.net, avg_fn=self._averaged)
        self.averaged = cast(Net, self.average.module)
        self.log: list[dict[str, Any]] = []
        self.best: dict[str, Any] = {"CIDEr": -1.0}
        self.stage_index, self.epoch, self.step, self.total = 0, 0, 0, 0.0
        self._begin_stage()
        if (run / "state.pt").exists():
            self._resume()
        elif start_from is not None:  # which the training has to beat
            self.best = {**self._judge(), "weights": copy.deepcopy(self.averaged.state_dict())}
            print(f"before any training: CIDEr {self.best['CIDEr']:.3f} on dev")

    # --- the loop

    def run_to_end(self, *, save_every_seconds: float = 300) -> None:
        """Train through all stages; what was reached before counts. The best weights are in `run/best` at the end."""
        while self.stage_index < len(STAGES):
            stage = STAGES[self.stage_index]
            while self.epoch < self._epochs(stage) and self._patient(stage):
                self._train_epoch(stage, save_every_seconds)
            self._next_stage()

    def _next_stage(self) -> None:
        self.stage_index, self.epoch = self.stage_index + 1, 0
        if self.stage_index < len(STAGES):
            self._begin_stage()
        self._save()

    def _train_epoch(self, stage: Stage, save_every_seconds: float) -> None:
        batches = self._batches(stage)
        saved = began = time.monotonic()
        self.net.train()
        if self.net.encoder is not None:
            self.net.encoder.eval()  # the statistics of batch normalisation stay those of the distillation
        with tqdm(total=len(batches), initial=self.step, desc=f"{stage} {self.epoch + 1}", unit="step") as bar:
            for step in range(self.step, len(batches)):
                torch.manual_seed(hash((self.config.seed, self.stage_index, self.epoch, step)) % 2**63)
                self._set_learning_rate(stage, (self.epoch + step / len(batches)) / self._epochs(stage))
                loss = self._loss(stage, batches[step])
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(self.net.parameters(), self.config.gradient_clip)
                self.optimizer.step()
                self.average.update_parameters(self.net)
                self.step, self.total = step + 1, self.total + loss.item()
                bar.update()
                if time.monotonic() - saved > save_every_seconds:
                    self._save()
                    saved = time.monotonic()
        row = {"stage": stage, "epoch": self.epoch + 1, "loss": self.total / len(batches), **self._judge()}
        row["seconds"] = round(time.monotonic() - began, 1)
        tqdm.write(json.dumps({name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}))
        self.log.append(row)
        if row["CIDEr"] > self.best["CIDEr"]:
            self.best = {**row, "weights": copy.deepcopy(self.averaged.state_dict())}
        self.epoch, self.step, self.total = self.epoch + 1, 0, 0.0
        self._save()

    def _for_standardized(self, decoder: Decoder) -> Decoder:
        """The decoder of standardised features that does what this one does of plain ones."""
        return standardized(decoder, -self.mean.cpu() / self.std.cpu(), 1 / self.std.cpu())

    def _averaged(self, average: Tensor, new: Tensor, steps: Tensor | int) -> Tensor:
        """An exponential moving average that forgets faster in the beginning."""
        return average.lerp(new, 1 - min(self.config.average, (1 + int(steps)) / (10 + int(steps))))

    def _epochs(self, stage: Stage) -> int:
        config = self.config
        return {"captions": config.epochs, "cider": config.cider_epochs, "interpolation": config.interpolation_epochs}[stage]

    def _patient(self, stage: Stage) -> bool:
        """Has one of the stage's last epochs been its best?"""
        reached = [row["CIDEr"] for row in self.log if row["stage"] == stage]
        return len(reached) - 1 - max(range(len(reached)), key=reached.__getitem__, default=0) < self.config.patience

    def _begin_stage(self, begun: Mapping[str, Tensor] | None = None) -> None:
        """Every stage starts from the best weights so far, with a new optimizer.

        begun: what it started from, where it goes on.
        """
        self.begun = begun or self.best.get("weights")
        if self.begun:
            self.net.load_state_dict(self.begun)
            self.averaged.load_state_dict(self.begun)
        self.average.n_averaged.zero_()
        stage, config = STAGES[self.stage_index], self.config
        rate = {
            "captions": config.learning_rate,
            "cider": config.cider_learning_rate,
            "interpolation": config.interpolation_learning_rate,
        }[stage]
        encoder_rate = self.config.encoder_learning_rate * (rate / self.config.learning_rate)
        groups = []
        for module, base in ((self.net.decoder, rate), (self.net.encoder, encoder_rate)):
            if module is not None:
                parameters = list(module.parameters())
                for chosen, decay in (
                    ([p for p in parameters if p.ndim > 1], self.config.weight_decay),
                    ([p for p in parameters if p.ndim <= 1], 0.0),
                ):
                    groups.append({"params": chosen, "base": base, "weight_decay": decay})
        self.optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.99))
        if stage != "captions" and self._epochs(stage):
            # The end counts as a word, or captions learn to stop in the middle: "a man in a".
            end = self.vocabulary.end
            self.reward = CiderReward([[[*tokens, end] for tokens in texts] for texts in self.tokens])
        if stage == "interpolation" and self._epochs(stage):
            self.before = self.teacher or copy.deepcopy(self.averaged.decoder).eval()
            self.targets = self._best_of_beam(self.before)

    def _set_learning_rate(self, stage: Stage, progress: float) -> None:
        """progress: 0 at the first step of the stage, 1 after its last."""
        warm = self.config.warm_up
        share = progress / warm if progress < warm else 0.5 * (1 + math.cos(math.pi * (progress - warm) / (1 - warm)))
        for group in self.optimizer.param_groups:
            group["lr"] = group["base"] * max(share, 1e-3)

    # --- batches

    def _batches(self, stage: Stage) -> list[Tensor]:
        """Numbers of captions (cross-entropy) or of photos (self-critical) for each step of this epoch."""
        chance = torch.Generator().manual_seed(self.config.seed * 1000 + self.epoch)
        if stage == "interpolation":  # each photo as often as it has views
            photos = torch.randperm(len(self.tokens) * self.config.views, generator=chance) % len(self.tokens)
            return list(photos.split(self.config.batch))
        if stage == "cider":
            return list(torch.randperm(len(self.tokens), generator=chance).split(self.config.cider_batch))
        if self.fine_tuned:  # all captions of a photo together, so that it passes the encoder once
            photos = torch.tensor([photo for photo, _ in self.captions])
            key = torch.randperm(len(self.tokens), generator=chance)[photos].double()
        else:  # captions of one length together
            key = torch.tensor([float(len(tokens)) for _, tokens in self.captions], dtype=torch.double)
        key += torch.rand(len(key), generator=chance, dtype=torch.double)
        batches = key.argsort().split(self.config.batch)
        return [batches[n] for n in torch.randperm(len(batches), generator=chance)]

    def _features(self, photos: Tensor, noise: float = 0.0) -> Tensor:
        """Rows of the training split (B,) to standardised features (B, 2048) of a random view of each.

        noise: how many times what saving a photo once more did to another one's features is added to each, at most.
        """
        unique, place = photos.unique(return_inverse=True)
        view = torch.randint(self.config.views, (len(unique),))
        if self.net.encoder is not None:
            size = self.model.preprocessing
            load = [Photos([self.train_split.examples[p].path], size, int(v)) for p, v in zip(unique, view, strict=True)]
            images = torch.stack(list(self.pool.map(lambda one: one[0], load))).to(self.device)
            features = encode(self.net.encoder, images, size)
        else:
            features = torch.empty(len(unique), self.model.decoder.feature_size)
            for number in view.unique().tolist():
                features[view == number] = self.train_split.views[number][unique[view == number]]
        if noise and len(self.noise):
            times = torch.empty(len(unique), 1).uniform_(-noise, noise)
            added = times * self.noise[torch.randint(len(self.noise), (len(unique),))]
            features = (features + added.to(features.device)).clamp(min=0)  # they are means of what a ReLU lets pass
        return ((features.to(self.device) - self.mean) / self.std)[place.to(self.device)]

    # --- the losses

    def _loss(self, stage: Stage, batch: Tensor) -> Tensor:
        if stage == "cider":
            return self._self_critical(batch)
        if stage == "interpolation":
            return self._interpolation(batch)
        forced = self._forced([self.captions[number] for number in batch.tolist()])
        return F.cross_entropy(forced.logits, forced.targets, label_smoothing=self.config.label_smoothing)

    def _forced(self, rows: Sequence[tuple[int, list[int]]], noise: float = 0.0) -> Forced:
        """rows: photos and their captions' tokens, without the end token."""
        end = self.vocabulary.end_index
        length = max(len(tokens) for _, tokens in rows) + 1
        targets = torch.tensor([[*tokens, end, *[-100] * (length - 1 - len(tokens))] for _, tokens in rows])  # (B, T)
        inputs = torch.cat([torch.full((len(rows), 1), self.start), targets[:, :-1].clamp(min=0)], 1).to(self.device)
        features = self._features(torch.tensor([photo for photo, _ in rows]), noise)
        with self._autocast():
            logits = self.net.decoder(features, inputs)
        return Forced(features, inputs, targets.to(self.device).flatten(), logits.flatten(0, 1).float())

    def _interpolation(self, photos: Tensor) -> Tensor:
        """Kim and Rush 2016, "Sequence-Level Knowledge Distillation", section 3.3, of the teacher or the model by itself.

        For each photo one caption is learned, the best that the teacher found, where people have five and cross-entropy lets
        close calls stand. Learned alone it would make the model sure of everything, so a part of what is learned is how
        likely the teacher found each word (Hinton et al. 2015, "Distilling the Knowledge in a Neural Network").
        """
        rows = [(photo, self.targets[photo]) for photo in photos.tolist()]
        forced, share = self._forced(rows, self.config.interpolation_noise), self.config.interpolation_share
        with torch.no_grad(), self._autocast():
            before = self.before(forced.features, forced.inputs).flatten(0, 1).float().softmax(1)
        live = forced.targets >= 0
        return share * F.cross_entropy(forced.logits, forced.targets) + (1 - share) * F.cross_entropy(
            forced.logits[live], before[live]
        )

    def _self_critical(self, photos: Tensor) -> Tensor:
        """Rennie et al. 2017, "Self-critical Sequence Training for Image Captioning".

        The baseline of a sampled caption is the mean reward of the photo's other samples (Luo 2020, "A Better Variant of
        Self-Critical Sequence Training").
        """
        count = self.config.cider_samples
        features = self._features(photos).repeat_interleave(count, 0)  # (B * count, 2048)
        decoder = self.net.decoder
        sampled = self._sample(decoder.eval(), features.detach())  # (B * count, T)
        rewards = torch.tensor(
            [
                self.reward(photo, self._words(tokens))
                for photo, tokens in zip(photos.repeat_interleave(count).tolist(), sampled.tolist(), strict=True)
            ]
        ).view(-1, count)
        baseline = (rewards.sum(1, keepdim=True) - rewards) / (count - 1)
        advantage = (rewards - baseline).view(-1, 1).to(self.device)
        starts = torch.full_like(sampled[:, :1], self.start)
        # Learned with dropout though drawn without: the photos of the training are known by heart so much the later.
        decoder.train()
        with self._autocast():
            logits = decoder(features, torch.cat([starts, sampled[:, :-1]], 1)).float()
        logits = logits.index_fill(2, torch.tensor(self.forbidden, device=self.device), -torch.inf)
        gains = logits.log_softmax(2).gather(2, sampled[:, :, None])[:, :, 0]
        ends = (sampled == self.vocabulary.end_index).int()
        live = (ends.cumsum(1) - ends == 0).float()  # tokens up to the first end, that one included
        return -(advantage * gains * live).sum() / live.sum()

    @torch.no_grad()
    def _sample(self, decoder: Decoder, features: Tensor) -> Tensor:
        """Features (R, 2048) to captions drawn at random (R, T); what follows an end token is end tokens."""
        state, end = decoder.start(features), self.vocabulary.end_index
        tokens = [torch.full((len(features),), self.start, device=self.device)]
        ended = torch.zeros_like(tokens[0], dtype=torch.bool)
        for _ in range(self.model.search.max_length):
            logits, state = decoder.step(tokens[-1], state)
            logits[:, self.forbidden] = -torch.inf
            drawn = torch.multinomial(logits.float().softmax(1), 1)[:, 0]
            tokens.append(drawn.masked_fill(ended, end))
            ended = ended | (drawn == end)
            if ended.all():
                break
        return torch.stack(tokens[1:], 1)

    def _words(self, tokens: Sequence[int]) -> list[str]:
        """A sampled caption's tokens up to the end token, that one included."""
        end = self.vocabulary.end_index
        cut = tokens[: tokens.index(end) + 1] if end in tokens else tokens
        return self.vocabulary.decode(cut)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.config.precision == "bf16")

    def _best_of_beam(self, decoder: Decoder) -> list[list[int]]:
        """The tokens of each training photo's caption of highest CIDEr, of those that the decoder finds for it."""
        penalty, _ = self._best_length_penalty(decoder)
        targets = []
        with tqdm(total=len(self.tokens), desc="captions to learn from", unit="photo") as bar:
            search = self._search(self.train_split, self.config.interpolation_beam_size, penalty, decoder)
            for photo, found in enumerate(search):
                tokens = max((list(one.tokens) for one in found), key=lambda t: self.reward(photo, self._words(t)))
                targets.append([token for token in tokens if token != self.vocabulary.end_index])
                bar.update()
        return targets

    # --- dev

    def _judge(self, length_penalty: float = 0.0, decoder: Decoder | None = None) -> dict[str, float]:
        """BLEU-4 and CIDEr on dev of a decoder, by default the averaged one, with this package's tokenization (no Java)."""
        references = plain_tokens([e.captions for e in self.dev_split.examples], self.language)
        found = scores(references, {n: [" ".join(c)] for n, c in enumerate(self.caption_dev(length_penalty, decoder))})
        return {name: found.metrics[name] for name in ("BLEU-4", "CIDEr")}

    def _best_length_penalty(self, decoder: Decoder | None = None) -> tuple[float, dict[str, float]]:
        """The smallest, with which a search ends the soonest, that suits dev as well as any; and the scores with it."""
        tried = {penalty: self._judge(penalty, decoder) for penalty in LENGTH_PENALTIES}
        enough = (1 - CHANCE) * max(found["CIDEr"] for found in tried.values())
        return next((penalty, found) for penalty, found in tried.items() if found["CIDEr"] >= enough)

    def caption_dev(self, length_penalty: float = 0.0, decoder: Decoder | None = None) -> list[list[str]]:
        """The best caption, as tokens, for each photo of dev."""
        captions = []
        for found in self._search(self.dev_split, self.config.beam_size, length_penalty, decoder):
            tokens = self.vocabulary.decode(found[0].tokens)
            captions.append(tokens[:-1] if tokens[-1] == self.vocabulary.end else tokens)
        return captions

    def _search(
        self, split: Split, beam_size: int, length_penalty: float, decoder: Decoder | None = None
    ) -> Iterator[list[Hypothesis]]:
        """What a decoder for standardised features, by default the averaged one, finds for each photo, best first."""
        decoder = standardized(decoder or self.averaged.decoder, self.mean, self.std)
        expander = TorchExpander(fold(weights_of(decoder), self.forbidden), self.device)
        wanted = Search(self.start, beam_size, self.model.search.max_length, length_penalty)
        for features in self._served_features(split):
            yield from search(expander, features.numpy(), [wanted] * len(features), end_token=self.vocabulary.end_index)

    @torch.inference_mode()
    def _served_features(self, split: Split) -> Iterator[Tensor]:
        """Batches of the features (B, 2048) of a split's photos as they are served."""
        rows = torch.arange(len(split.examples)).split(SEARCH_BATCH)
        if self.averaged.encoder is None:
            yield from (split.views[0][part] for part in rows)
            return
        encoder = self.averaged.encoder.eval()
        photos = Photos([e.path for e in split.examples], self.model.preprocessing)
        for part in rows:
            images = torch.stack(list(self.pool.map(photos.__getitem__, part.tolist()))).to(self.device)
            yield encode(encoder, images, self.model.preprocessing).cpu()

    # --- what is kept

    def _save(self) -> None:
        """Everything that going on needs, and the log, which repeats what the state says."""
        state = {
            "stage_index": self.stage_index,
            "epoch": self.epoch,
            "step": self.step,
            "total": self.total,
            "net": self.net.state_dict(),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "log": self.log,
            "best": self.best,
            "begun": self.begun,
        }
        write_atomically(self.run / "state.pt", lambda part: torch.save(state, part))
        lines = "".join(json.dumps(row) + "\n" for row in self.log)
        write_atomically(self.run / "log.jsonl", lambda part: part.write_text(lines))

    def _resume(self) -> None:
        state: Mapping[str, Any] = torch.load(self.run / "state.pt", map_location=self.device, weights_only=True)
        self.stage_index, self.epoch, self.step, self.total = (state[k] for k in ("stage_index", "epoch", "step", "total"))
        self.log, self.best = state["log"], state["best"]
        if self.stage_index < len(STAGES):
            self._begin_stage(state["begun"])
            self.optimizer.load_state_dict(state["optimizer"])
        self.net.load_state_dict(state["net"])
        self.average.load_state_dict(state["average"])
        print(f"continuing after {len(self.log)} epochs" + f" and {self.step} steps" * (self.step > 0))

    def export(self, directory: Path) -> tuple[str, dict[str, float]]:
        """Write the best weights as a checkpoint, with the length penalty that suits dev. Its digest, and dev's scores."""
        self.averaged.load_state_dict(self.best["weights"])
        penalty, reached = self._best_length_penalty()
        decoder = standardized(self.averaged.decoder, self.mean, self.std)
        model = self.model.model_copy(
            update={"search": SearchConfig(**{**self.model.search.model_dump(), "length_penalty": penalty})}
        )
        encoder = self.averaged.encoder or self.encoder_path
        digest = save_checkpoint(directory, config=model, vocabulary=self.vocabulary, decoder=decoder, encoder=encoder)
        return digest, {"length_penalty": penalty, **reached}


def grow(decoder: Decoder, smaller: Decoder) -> None:
    """Give `decoder` the weights of one that knows only its first tokens. The new ones are as unlikely as its unlikeliest."""
    known = smaller.config.vocabulary_size
    with torch.no_grad():
        decoder.output.weight.zero_()
        decoder.output.bias.fill_(smaller.output.bias.min())
        for name, weight in smaller.state_dict().items():
            target = decoder.state_dict()[name]
            (target[:known] if target.shape != weight.shape else target).copy_(weight)


def restricted(decoder: Decoder, tokens: Sequence[int]) -> Decoder:
    """The decoder that knows these of its tokens, in this order, and no other. They share the probability of the others."""
    fewer = Decoder(decoder.config.model_copy(update={"vocabulary_size": len(tokens)}))
    number = torch.tensor(tokens)
    with torch.no_grad():
        for name, weight in decoder.state_dict().items():
            target = fewer.state_dict()[name]
            target.copy_(weight if target.shape == weight.shape else weight[number])
    return fewer.eval()


def standardized(decoder: Decoder, mean: Tensor, std: Tensor) -> Decoder:
    """The decoder for plain features that does what `decoder` does for `(features - mean) / std`."""
    folded = Decoder(decoder.config)
    folded.load_state_dict(decoder.state_dict())
    with torch.no_grad():
        weight = decoder.embed_image.weight / std
        folded.embed_image.weight.copy_(weight)
        folded.embed_image.bias.copy_(decoder.embed_image.bias - weight @ mean)
    return folded.eval()
