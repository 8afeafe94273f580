"""Begin a ResNet50 encoder with what a MobileNetV2 knows: `python -m scripts.transplant --help`.

Both networks are made of bottlenecks (1x1, 3x3, 1x1 convolutions around a residual stream) with the same strides, so a
ResNet50 can compute what a MobileNetV2 computes, except that it has fewer hidden channels. Block by block, the hidden
channels of the teacher that matter most are copied, a depthwise 3x3 kernel becoming the diagonal of a dense one, and the
block's last convolution is solved by least squares, so that the student's stream comes as near to the teacher's as it can,
the errors of the blocks before it included (He, Zhang and Sun 2017, "Channel Pruning for Accelerating Very Deep Neural
Networks"; network morphism: Wei et al. 2016). The stem and the first stage, which differ, are trained to give the
teacher's stream first.

The result, RUN/encoder.safetensors, is an encoder that knows ImageNet although it has never seen it, for
`scripts.distill --init`. An interrupted run goes on with the stage that it was at: give the same command again. On the CPU.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import trange

from handler.checkpoint import write_atomically, write_safetensors
from handler.config import EncoderConfig
from handler.encoder import Encoder
from handler.errors import CaptionError
from handler.torchvision_models import models
from scripts.datasets import add_dataset_arguments, dataset_from
from scripts.distill import STAGES, augment, cache_photos, prepare, read_photos
from scripts.teachers import FEATURES, STREAMS, MobileNetV2Teacher

FIRST, *_, LAST = STREAMS
"""The teacher's block whose stream the student's stem and first stage give, and its last convolution, which has no hidden
channels of its own: it is linear in those of the block before it."""
PLAN = {
    "layer2": (((4,), 0), ((5,), 0), ((6,), 0), ((5, 6), 0)),
    "layer3": (((7,), 0), ((8,), 0), ((9, 10), 0), ((11,), 64), ((12,), 64), ((13,), 64)),
    "layer4": (((14,), FEATURES), ((15, 16), FEATURES), ((17, 18), 0)),
}
"""For each of the student's blocks: whose hidden channels it chooses from, and the first of its channels that then hold
the stream of the last of them. At the end, channels 0 to 1279 are the teacher's features."""
UNUSED = 0.01
"""Standard deviation, relative to He initialisation, of the weights that have nothing to do yet, so that they can learn."""
POSITIONS = 40_000
"""Places of the calibration photos that each least-squares problem is solved on."""
RIDGE = 1e-3


@dataclass(frozen=True)
class Hidden:
    """The hidden channels of some of the teacher's blocks with the same input: relu(depthwise(relu(expand(stream))))."""

    expand: Tensor
    """(C, d), from the teacher's stream"""
    expand_bias: Tensor
    depthwise: Tensor
    """(C, 3, 3)"""
    depthwise_bias: Tensor

    @classmethod
    def of(cls, blocks: Sequence[nn.Module]) -> Hidden:
        parts = [[_fused(layer) for layer in list(block.get_submodule("conv"))[:2]] for block in blocks]  # type: ignore[call-overload]
        return cls(
            torch.cat([expand.weight.flatten(1) for expand, _ in parts]),
            torch.cat([cast(Tensor, expand.bias) for expand, _ in parts]),
            torch.cat([depthwise.weight[:, 0] for _, depthwise in parts]),
            torch.cat([cast(Tensor, depthwise.bias) for _, depthwise in parts]),
        )

    def __call__(self, stream: Tensor, stride: int) -> Tensor:
        """The teacher's stream (B, d, h, w) to (B, C, h / stride, w / stride)."""
        hidden = F.conv2d(stream, self.expand[..., None, None], self.expand_bias).relu()
        groups = len(self.expand)
        return F.conv2d(hidden, self.depthwise[:, None], self.depthwise_bias, stride, 1, groups=groups).relu()


@dataclass(frozen=True)
class Reader:
    """Where the teacher's stream is in the student's: `weight` (d, channels) times it, plus `bias` (d)."""

    weight: Tensor
    bias: Tensor

    def __call__(self, stream: Tensor) -> Tensor:
        return F.conv2d(stream, self.weight[..., None, None], self.bias)


def _fused(layer: nn.Module) -> nn.Conv2d:
    """A convolution and the batch normalisation after it as one convolution."""
    convolution, norm = cast(nn.Sequential, layer)[0], cast(nn.Sequential, layer)[1]
    return fuse_conv_bn_eval(cast(nn.Conv2d, convolution), cast(nn.BatchNorm2d, norm))


class Transplantation:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.run: Path = arguments.run
        examples = [e for e in dataset_from(arguments) if e.split not in ("dev", "test")]
        self.teacher = MobileNetV2Teacher(arguments.teacher).net.features
        self.photos = cache_photos(examples, 224, self.run / "photos-224.npy")
        torch.manual_seed(arguments.seed)
        self.student = Encoder(EncoderConfig())
        self.done: list[str] = []
        """Stages of the student."""
        self.reader: Reader | None = None
        """Where the teacher's stream is after the last of them."""
        if (self.run / "state.pt").exists():
            state = torch.load(self.run / "state.pt", weights_only=True)
            self.student.load_state_dict(state["student"])
            self.student.eval().requires_grad_(False)
            self.done, self.reader = state["done"], Reader(*state["reader"])
            torch.set_rng_state(state["rng"])
            print(f"continuing after {self.done[-1]}")

    def run_to_end(self) -> None:
        if not self.done:
            self._finish("layer1", self.train_stage("layer1", FIRST, None, learning_rate=2e-3))
        if len(self.done) < len(STAGES):
            self.copy_blocks()
        write_safetensors(self.run / "encoder.safetensors", self.student.state_dict(), half=True)

    def _finish(self, stage: str, reader: Reader) -> None:
        self.done, self.reader = [*self.done, stage], reader
        state = {
            "student": self.student.state_dict(),
            "done": self.done,
            "reader": (reader.weight, reader.bias),
            "rng": torch.get_rng_state(),
        }
        write_atomically(self.run / "state.pt", lambda path: torch.save(state, path))

    def crops(self, count: int, pixels: int) -> Tensor:
        """Random crops (count, 3, pixels, pixels) in 0..1."""
        return augment(read_photos(self.photos, torch.randint(0, len(self.photos), (count,))), pixels)

    def streams(self, crops: Tensor) -> list[Tensor]:
        """What the teacher's blocks give for crops in 0..1; its last convolution without its activation."""
        stream = crops * 2 - 1
        streams = []
        for block in self.teacher[:-1]:
            stream = block(stream)
            streams.append(stream)
        streams.append(_fused(self.teacher[-1])(stream))
        return streams

    def train_stage(self, last: str, number: int, reader: Reader | None, *, learning_rate: float) -> Reader:
        """Train the student's stage `last` (with the stem, if it is the first) to give the stream of the teacher's block.

        reader: of what the stage gives already; None: it begins from nothing. Returns how to read it afterwards.
        """
        arguments = self.arguments
        stages = list(self.student.named_children())
        end = [name for name, _ in stages].index(last) + 1
        begin = 0 if last == "layer1" else end - 1
        before = nn.Sequential(*(stage for _, stage in stages[:begin])).eval().requires_grad_(False)
        stage = nn.Sequential(*(stage for _, stage in stages[begin:end])).train().requires_grad_(True)
        with torch.no_grad():
            seen = self.teacher[: number + 1](self.crops(256, arguments.stage_pixels) * 2 - 1)
        mean, std = seen.mean((0, 2, 3))[:, None, None], seen.std((0, 2, 3))[:, None, None] + 1e-3
        read = nn.Conv2d(STAGES[last], len(mean), 1)
        if reader is not None:
            with torch.no_grad():
                read.weight.copy_((reader.weight / std[:, 0])[..., None, None])
                cast(Tensor, read.bias).copy_((reader.bias - mean.flatten()) / std.flatten())
        for module in (before, stage, read, self.teacher):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        steps = arguments.stage_steps * (3 if reader is None else 1)
        optimizer = torch.optim.AdamW([*stage.parameters(), *read.parameters()], learning_rate, betas=(0.9, 0.99))
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps, pct_start=0.1)
        error = None
        with trange(steps, desc=last, unit="step", mininterval=2) as bar:
            for _ in bar:
                crops = self.crops(arguments.stage_batch, arguments.stage_pixels)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    with torch.no_grad():
                        wanted = self.teacher[: number + 1]((crops * 2 - 1).contiguous(memory_format=torch.channels_last))
                        inputs = before(prepare(crops))
                    found = read(stage(inputs))
                loss = F.mse_loss(found.float(), (wanted.float() - mean) / std)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                error = loss.item() if error is None else error + 0.03 * (loss.item() - error)
                bar.set_postfix(unexplained=f"{error:.3f}", refresh=False)
        print(f"{last}: trained to {1 - (error or 0.0):.1%} of the stream's variance", flush=True)
        self.student.eval().requires_grad_(False)
        weight, bias = read.weight.detach().flatten(1), cast(Tensor, read.bias).detach()
        return Reader(weight * std[:, 0], bias * std.flatten() + mean.flatten())

    @torch.no_grad()
    def copy_blocks(self) -> None:
        """Give the student the teacher's other blocks, stage by stage, each trained a little after it is filled."""
        count = self.arguments.crops
        stem = nn.Sequential(*list(self.student.children())[:5])
        kept: dict[int, list[Tensor]] = {sources[-1]: [] for plan in PLAN.values() for sources, _ in plan}
        inputs = []
        for start in trange(0, count, 64, desc="calibration", unit="batch"):
            crops = self.crops(min(64, count - start), self.arguments.pixels)
            for number, stream in enumerate(self.streams(crops)):
                if number in kept:
                    kept[number].append(stream)
            inputs.append(stem(prepare(crops)))
        stream, targets = torch.cat(inputs), {number: torch.cat(parts) for number, parts in kept.items()}
        before = None
        for name, plan in PLAN.items():
            stage = cast(nn.Sequential, self.student.get_submodule(name))
            if name in self.done:
                stream, before = torch.cat([stage(part) for part in stream.split(64)]), plan[-1][1]
                continue
            stage_input, reader = stream, cast(Reader, self.reader)
            for block, (sources, first) in zip(stage, plan, strict=True):
                target = targets[sources[-1]]
                same = [t.amin((0, 2, 3)) for t in targets.values() if t.shape[1] == target.shape[1]]
                # The stream passes through a ReLU: lifted this much, nothing of what it is to be is cut off.
                lift = torch.zeros(len(target[0])) if LAST in sources else -1.1 * torch.stack(same).amin(0)
                explained = _fill(
                    cast(models.resnet.Bottleneck, block),
                    Hidden.of([self.teacher[n] for n in sources if n != LAST]),
                    reader,
                    stream,
                    target,
                    first=first,
                    lift=None if first == before and block.downsample is None else lift,
                )
                print(f"{name}: blocks {sources} -> {explained:.1%} of the stream's variance", flush=True)
                stream = torch.cat([block(part) for part in stream.split(64)])
                reader = _reader_of(stream, target.clamp(min=0) if LAST in sources else target, first)
                before = first
            calibrate(stage, stage_input.split(64)[:8])
            with torch.enable_grad():
                reader = self.train_stage(name, plan[-1][0][-1], reader, learning_rate=self.arguments.stage_learning_rate)
            self._finish(name, reader)
            stream = torch.cat([stage(part) for part in stage_input.split(64)])


def _fill(
    block: models.resnet.Bottleneck,
    hidden: Hidden,
    reader: Reader,
    stream: Tensor,
    target: Tensor,
    *,
    first: int,
    lift: Tensor | None,
) -> float:
    """Choose hidden channels for a bottleneck of the student, write its weights; the share of the target's variance it gets.

    stream: (N, channels, h, w), the student's before this block.
    target: (N, d, h', w'), to be in its channels from `first` on after it.
    lift: (d), what is added to the target there; None if the stream that is there goes on.
    """
    width, stride = block.conv1.out_channels, block.conv2.stride[0]
    rows = slice(first, first + target.shape[1])
    outputs = _by_place(target)
    chosen = torch.randperm(len(outputs))[:POSITIONS]
    outputs = outputs[chosen]
    inputs = torch.cat([_by_place(hidden(reader(part), stride)) for part in stream.split(64)])[chosen]
    wanted = outputs - _by_place(reader(stream))[chosen] if lift is None else outputs
    mean_in, mean_out = inputs.mean(0), wanted.mean(0)
    inputs, wanted = inputs - mean_in, wanted - mean_out
    keep = _choose(inputs, wanted, width)
    weight = _ridge(inputs[:, keep].T @ inputs[:, keep], inputs[:, keep].T @ wanted)
    for convolution in (block.conv1, block.conv2):
        nn.init.kaiming_normal_(convolution.weight)
        convolution.weight.mul_(UNUSED)
    for norm in (block.bn1, block.bn2, block.bn3):
        _make_identity(norm)
    n = len(keep)
    block.conv1.weight[:n] = (hidden.expand[keep] @ reader.weight)[..., None, None]
    block.bn1.bias[:n] = hidden.expand[keep] @ reader.bias + hidden.expand_bias[keep]
    block.conv2.weight[:n] = 0
    block.conv2.weight[torch.arange(n), torch.arange(n)] = hidden.depthwise[keep]
    block.bn2.bias[:n] = hidden.depthwise_bias[keep]
    block.conv3.weight.zero_()  # channels that hold nothing begin to learn through the small weights that read them
    block.conv3.weight[rows, :n] = weight.T[..., None, None]
    block.bn3.bias[rows] = mean_out - mean_in[keep] @ weight + (0 if lift is None else lift)
    if block.downsample is not None:
        block.downsample[0].weight.zero_()
        _make_identity(block.downsample[1])
    error = wanted - inputs[:, keep] @ weight
    return 1 - (error.square().sum() / (outputs - outputs.mean(0)).square().sum()).item()


def _by_place(grid: Tensor) -> Tensor:
    """(N, d, h, w) to (N * h * w, d)."""
    return grid.permute(0, 2, 3, 1).flatten(0, 2)


def _choose(inputs: Tensor, outputs: Tensor, count: int) -> Tensor:
    """The `count` columns of inputs (n, C) that explain the outputs (n, d) best, by backward elimination."""
    gram, cross = inputs.T @ inputs, inputs.T @ outputs
    spread = gram.diagonal().sqrt()
    keep = torch.arange(len(gram))
    while len(keep) > count:
        worth = _ridge(gram[keep][:, keep], cross[keep]).norm(dim=1) * spread[keep]
        drop = min(len(keep) - count, math.ceil(0.05 * len(keep)))
        keep = keep[worth.argsort(descending=True)[: len(keep) - drop].sort().values]
    return keep


def _ridge(gram: Tensor, cross: Tensor) -> Tensor:
    """Ridge regression: inputs.T @ inputs (C, C) and inputs.T @ outputs (C, d) to the weights (C, d)."""
    return torch.linalg.solve(gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram)), cross)


def _reader_of(stream: Tensor, target: Tensor, first: int) -> Reader:
    """The teacher's stream is in the channels from `first` on, lifted."""
    weight = torch.zeros(target.shape[1], stream.shape[1])
    weight[:, first : first + target.shape[1]] = torch.eye(target.shape[1])
    return Reader(weight, target.mean((0, 2, 3)) - weight @ stream.mean((0, 2, 3)))


def _make_identity(norm: nn.BatchNorm2d) -> None:
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.zero_()
    norm.running_var.fill_(1 - norm.eps)


@torch.no_grad()
def calibrate(stage: nn.Module, batches: Sequence[Tensor]) -> None:
    """Give each batch normalisation the statistics of its input, and have it do what it did.

    Training normalises with a batch's own statistics. With others before it, it would begin from another network.
    """
    sums = {
        module: torch.zeros(2, module.num_features, dtype=torch.float64)
        for module in stage.modules()
        if isinstance(module, nn.BatchNorm2d)
    }

    def add(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        values = inputs[0].transpose(0, 1).flatten(1).double()
        sums[cast(nn.BatchNorm2d, module)] += torch.stack([values.mean(1), values.square().mean(1)])

    hooks = [module.register_forward_hook(add) for module in sums]
    for batch in batches:
        stage(batch)
    for hook in hooks:
        hook.remove()
    for norm, moments in sums.items():
        assert norm.running_mean is not None
        assert norm.running_var is not None
        mean, squares = moments / len(batches)
        variance = (squares - mean.square()).clamp(min=0)
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        norm.bias.add_(slope * (mean - norm.running_mean))
        norm.weight.copy_(slope * (variance + norm.eps).sqrt())
        norm.running_mean.copy_(mean)
        norm.running_var.copy_(variance)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("run", type=Path, help="run directory; made, or continued")
    add_dataset_arguments(parser)
    parser.add_argument("--teacher", type=Path, required=True, help="MobileNetV2 weights")
    parser.add_argument("--pixels", type=int, default=160, help="side of the crops that blocks are calibrated on")
    parser.add_argument("--crops", type=int, default=1536, help="number of them")
    parser.add_argument("--stage-pixels", type=int, default=128, help="side of the crops that a stage is trained on")
    parser.add_argument(
        "--stage-steps", type=int, default=500, help="of each stage; the first, from nothing, takes thrice as many"
    )
    parser.add_argument("--stage-batch", type=int, default=48)
    parser.add_argument("--stage-learning-rate", type=float, default=3e-4, help="of the stages after the first")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.run.mkdir(parents=True, exist_ok=True)
    try:
        work = Transplantation(arguments)
    except (CaptionError, OSError, SafetensorError, ValueError) as error:
        parser.error(str(error))
    steps = arguments.stage_steps
    print(
        f"{len(work.photos)} photos; the stem and layer1 are trained for {3 * steps} steps, "
        f"{', '.join(PLAN)} filled and trained for {steps} steps each"
    )
    work.run_to_end()
    print(f"encoder: {arguments.run / 'encoder.safetensors'}")


if __name__ == "__main__":
    main()
