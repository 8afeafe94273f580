"""chainer-caption's models to a checkpoint: `python -m scripts.convert_chainer --help`.

Reads what `chainer.serializers.save_hdf5` wrote: one dataset for each parameter, its path the names of the links.
Datasets of numbers are all that is read, so a foreign file never runs code. Everything is checked before anything is
written. That the converted model gives Chainer's own features, probabilities and captions is what
tests/test_convert_chainer.py is about.
"""

from __future__ import annotations

import argparse
import json
import unicodedata
import zipfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args

import h5py
import numpy as np
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from handler.beam_search import Search, beam_search
from handler.checkpoint import MANIFEST, save_checkpoint, write_atomically
from handler.config import (
    DecoderConfig,
    EncoderConfig,
    LanguageConfig,
    ModelConfig,
    PreprocessingConfig,
    SearchConfig,
    Tokenization,
)
from handler.decoder import Decoder
from handler.encoder import FEATURE_SIZE, Encoder
from handler.errors import CaptionError
from handler.vocabulary import Vocabulary

START, END, UNKNOWN = "<sos>", "<eos>", "<ukn>"
COUNTRY_CODES = {"jp": "ja", "cn": "zh"}
"""Where chainer-caption's names for languages are not BCP 47."""
LARGEST_SIZE = 4096
"""Of a decoder's layers. chainer-caption's have 512 or 1024; a file that claims far more is not read into memory."""

PREPROCESSING = PreprocessingConfig(
    size=224,
    fit="crop",
    interpolation="nearest",  # what Pillow's `resize` did by default in 2017
    channel_order="BGR",
    scale=1.0,
    mean=(103.939, 116.779, 123.68),
    std=(1.0, 1.0, 1.0),
)
SEARCH = SearchConfig(length_penalty=0.0, max_length=49, suppress_unknown=False)
"""chainer-caption's default depth of 50 counts the start token."""

ENCODER_STAGES = {"layer1": ("res2", 3), "layer2": ("res3", 4), "layer3": ("res4", 6), "layer4": ("res5", 3)}
"""Our name of a stage, Chainer's, and its blocks."""
BATCH_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "avg_mean", "running_var": "avg_var"}

Table = Mapping[str, Sequence[str]]
"""Our parameter to Chainer's datasets, which are concatenated on the first axis. None is transposed: in both libraries
a matrix is (outputs, inputs) and a convolution (outputs, inputs, height, width)."""

DECODER_TABLE: Table = {
    "embed_image.weight": ["embed_image/W"],
    "embed_image.bias": ["embed_image/b"],
    "embed_token.weight": ["embed_word/W"],
    # Gates i, f, g, o in both. The documentation of Chainer's n_step_lstm has the last two the other way round.
    "lstm.weight_ih_l0": [f"lstm/0/w{gate}" for gate in range(0, 4)],
    "lstm.weight_hh_l0": [f"lstm/0/w{gate}" for gate in range(4, 8)],
    "lstm.bias_ih_l0": [f"lstm/0/b{gate}" for gate in range(0, 4)],
    "lstm.bias_hh_l0": [f"lstm/0/b{gate}" for gate in range(4, 8)],
    "output.weight": ["decode_word/W"],
    "output.bias": ["decode_word/b"],
}


def _encoder_table() -> Table:
    table: dict[str, Sequence[str]] = {}

    def convolution_and_batch_norm(ours: tuple[str, str], chainers: tuple[str, str]) -> None:
        table[f"{ours[0]}.weight"] = [f"{chainers[0]}/W"]
        table.update({f"{ours[1]}.{name}": [f"{chainers[1]}/{theirs}"] for name, theirs in BATCH_NORM.items()})

    convolution_and_batch_norm(("conv1", "bn1"), ("conv1", "bn1"))
    for ours, (theirs, blocks) in ENCODER_STAGES.items():
        for block in range(blocks):
            link = f"{theirs}/b{block}" if block else f"{theirs}/a"
            for n in (1, 2, 3):
                convolution_and_batch_norm(
                    (f"{ours}.{block}.conv{n}", f"{ours}.{block}.bn{n}"), (f"{link}/conv{n}", f"{link}/bn{n}")
                )
        convolution_and_batch_norm(
            (f"{ours}.0.downsample.0", f"{ours}.0.downsample.1"), (f"{theirs}/a/conv4", f"{theirs}/a/bn4")
        )
    return table


ENCODER_TABLE = _encoder_table()
ENCODER_UNUSED = {"fc/W", "fc/b"} | {
    source.removesuffix("gamma") + "N" for sources in ENCODER_TABLE.values() for source in sources if source.endswith("gamma")
}
"""The classifier, and how many batches each batch norm has averaged over. A file may lack them."""


class ChainerFileError(CaptionError):
    """A file of chainer-caption's is damaged, of another kind, or does not fit the others."""

    code = "InvalidChainerFile"


def convert(
    cnn_model: Path,
    rnn_model: Path,
    vocab: Path,
    output: Path,
    *,
    language: Sequence[str] = (),
    tokenization: Tokenization | None = None,
    version: str = "1.0",
    half: bool = False,
) -> tuple[ModelConfig, str]:
    """Write the checkpoint `output`; give its configuration and its digest. Raises ChainerFileError before it writes.

    language, tokenization: see `languages_of`.
    half: weights as fp16, which are no longer Chainer's to the last digit.
    """
    vocabulary = read_vocabulary(vocab)
    languages = languages_of(vocabulary, language, tokenization)
    decoder = read_decoder(rnn_model, vocabulary)
    encoder = read_encoder(cnn_model)
    config = ModelConfig(
        version=version,
        languages=languages,
        preprocessing=PREPROCESSING,
        encoder=encoder.config,
        engine="torch-fp32",  # bf16 is faster, but no longer gives Chainer's own numbers
        decoder=decoder.config,
        search=SEARCH,
    )
    return config, save_checkpoint(output, config=config, vocabulary=vocabulary, decoder=decoder, encoder=encoder, half=half)


def read_encoder(path: Path) -> Encoder:
    """`ResNet50.model` as the network that gives the same features. Raises ChainerFileError."""
    with torch.device("meta"):
        encoder = Encoder(EncoderConfig(architecture="resnet50-caffe"))
    with _datasets(path, ENCODER_TABLE, unused=ENCODER_UNUSED) as datasets:
        _fill(encoder, datasets, ENCODER_TABLE, path)
    return encoder.eval()


def read_decoder(path: Path, vocabulary: Vocabulary) -> Decoder:
    """`caption_….model`; its sizes are those of its arrays. Raises ChainerFileError."""
    with _datasets(path, DECODER_TABLE) as datasets:
        shapes = datasets["embed_word/W"].shape, datasets["decode_word/W"].shape
        if any(len(shape) != 2 for shape in shapes):
            raise ChainerFileError(f"{path}: embed_word/W and decode_word/W must be matrices, not {shapes[0]} and {shapes[1]}")
        (words, embedding_size), (_, hidden_size) = shapes
        if words != len(vocabulary):
            raise ChainerFileError(
                f"the vocabulary has {len(vocabulary)} words, the decoder {path} has {words}: "
                "they are not of the same model, perhaps not of the same language"
            )
        if not (1 <= embedding_size <= LARGEST_SIZE and 1 <= hidden_size <= LARGEST_SIZE):
            raise ChainerFileError(f"{path}: sizes {embedding_size} and {hidden_size} are not from 1 to {LARGEST_SIZE}")
        with torch.device("meta"):
            decoder = Decoder(DecoderConfig(vocabulary_size=words, embedding_size=embedding_size, hidden_size=hidden_size))
        _fill(decoder, datasets, DECODER_TABLE, path)
    return decoder.eval()


def read_vocabulary(path: Path) -> Vocabulary:
    """Either form: `{"word": index, …}` or `{"words": [{"word": …, "idx": …}, …]}`. Raises ChainerFileError.

    Its start tokens are those of languages, such as `<en>` and `<jp>`, and `<sos>`.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ChainerFileError(f"{path} is not a vocabulary, which is a JSON file: {error}") from error
    try:
        # "words" is also an English word, with a number
        if isinstance(content, dict) and isinstance(content.get("words"), list):
            pairs = [(entry["word"], entry["idx"]) for entry in content["words"]]
        else:
            pairs = list(content.items())
        tokens = {index: word for word, index in pairs if type(index) is int and isinstance(word, str)}
    except (AttributeError, KeyError, TypeError):
        tokens, pairs = {}, []
    if not pairs or sorted(tokens) != list(range(len(pairs))):
        raise ChainerFileError(
            f'{path} is not a vocabulary: it must be {{"word": index, …}} or {{"words": [{{"word": …, "idx": …}}, …]}} '
            "with each index from 0 on once"
        )
    words = tuple(tokens[index] for index in range(len(tokens)))
    missing = [token for token in (END, UNKNOWN) if token not in words]
    start = (*sorted(word for word in words if _language_of(word)), *[START] * (START in words))
    if missing or not start:
        raise ChainerFileError(f"{path} lacks {' and '.join(missing or [START])}, so it is not a vocabulary of chainer-caption")
    try:
        return Vocabulary(tokens=words, start=start, end=END, unknown=UNKNOWN, pad=None, suppress_start=False)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ChainerFileError(f"{path} is not a vocabulary: {reason}") from error


def languages_of(
    vocabulary: Vocabulary, given: Sequence[str] = (), tokenization: Tokenization | None = None
) -> tuple[LanguageConfig, ...]:
    """The languages that a model writes, the default first.

    given: `CODE`, or `CODE=TOKEN` with the start token of that language. Without any, a start token such as `<jp>` says
    it, and `<sos>` leaves it to the script of the words: kana is Japanese, other Han Chinese, anything else English.
    tokenization: of all; without it, character if every word is a single one.

    Raises ChainerFileError.
    """
    if tokenization is None:
        special = {*vocabulary.start, START, END, UNKNOWN}
        tokenization = "character" if all(len(word) == 1 for word in vocabulary.tokens if word not in special) else "word"
    own = {token: code for token in vocabulary.start if (code := _language_of(token))}
    if not given:
        given = [f"{code}={token}" for token, code in own.items()]
        given = given or [f"{_language_by_script(vocabulary.tokens)}={token}" for token in vocabulary.start]
    languages = []
    for choice in given:
        code, _, token = choice.partition("=")
        code = COUNTRY_CODES.get(code, code)
        only = vocabulary.start[0] if len(vocabulary.start) == 1 else ""
        token = token or next((token for token, its_code in own.items() if its_code == code), only)
        if not code or token not in vocabulary.start:
            raise ChainerFileError(
                f"language {choice}: must be CODE or CODE=TOKEN with a start token of the vocabulary, which are "
                f"{', '.join(vocabulary.start)}"
            )
        languages.append(LanguageConfig(code=code, start_token=token, tokenization=tokenization))
    if len({language.code for language in languages}) < len(languages):
        raise ChainerFileError(f"languages {', '.join(given)}: each language once")
    return tuple(languages)


def read_features(folder: Path) -> tuple[list[str], Tensor]:
    """Names and features (N, 2048) of the `.npz` files that ResNet_feature_extractor.py wrote. Raises ChainerFileError."""
    paths = sorted(folder.glob("*.npz"))
    if not paths:
        raise ChainerFileError(f"{folder} holds no .npz files of features")
    rows = []
    for path in paths:
        try:
            with open(path, "rb") as opened, np.load(opened, allow_pickle=False) as file:
                row = np.asarray(file["arr_0"], np.float32).reshape(FEATURE_SIZE)
        except (OSError, ValueError, KeyError, TypeError, EOFError, AttributeError, MemoryError, zipfile.BadZipFile) as error:
            raise ChainerFileError(
                f"{path} is not a feature file, one array arr_0 of {FEATURE_SIZE} numbers: {error}"
            ) from error
        if not np.isfinite(row).all():
            raise ChainerFileError(f"{path} holds numbers that are not finite")
        rows.append(row)
    return [path.name for path in paths], torch.from_numpy(np.stack(rows))


def caption_features(
    decoder: Decoder, vocabulary: Vocabulary, features: Tensor, *, start_token: str, beam: int, depth: int
) -> list[list[dict[str, Any]]]:
    """For features (N, 2048) what chainer-caption's `generate` gives: every caption that its search finds, best first.

    depth: tokens of a caption at most, the start token included.
    """
    search = Search(start_token=vocabulary.index[start_token], beam_size=beam, max_length=depth - 1)
    answers = []
    for batch in features.split(64):
        found = beam_search(
            decoder, batch, [search] * len(batch), end_token=vocabulary.end_index, forbidden=vocabulary.never_generated
        )
        answers += [
            [
                {"sentence": [start_token, *vocabulary.decode(h.tokens)], "log_likelihood": sum(h.log_likelihoods)}
                for h in hypotheses
            ]
            for hypotheses in found
        ]
    return answers


@contextmanager
def _datasets(path: Path, table: Table, *, unused: Collection[str] = ()) -> Iterator[dict[str, h5py.Dataset]]:
    """The datasets that `table` names, unread: what they claim to hold may be larger than memory.

    Raises ChainerFileError, also for what fails while they are read.
    """
    if not path.is_file():
        raise ChainerFileError(f"{path} does not exist or is not a file")
    if not h5py.is_hdf5(path):
        raise ChainerFileError(f"{path} is {_kind(path)}, not an HDF5 file as chainer.serializers.save_hdf5 writes it")
    expected = {source for sources in table.values() for source in sources}
    try:
        with h5py.File(path, "r") as file:
            link = file.visititems_links(lambda name, link: None if isinstance(link, h5py.HardLink) else name)
            if link is not None:
                raise ChainerFileError(f"{path}: {link} is a link to elsewhere, which is not followed")
            found: dict[str, h5py.Dataset] = {}
            file.visititems(lambda name, item: found.update({name: item}) if isinstance(item, h5py.Dataset) else None)
            _check_names(path, expected, found.keys(), unused)
            for name in sorted(expected):
                _check_kind(path, name, found[name])
            yield {name: found[name] for name in expected}
    except (OSError, RuntimeError, KeyError, ValueError, TypeError) as error:
        raise ChainerFileError(f"{path} is damaged or cut off, copy it again: {error}") from error


def _check_names(path: Path, expected: Collection[str], found: Collection[str], unused: Collection[str]) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected) - set(unused))
    if not missing and not unknown:
        return
    kinds = {"a decoder: give it as --rnn-model": DECODER_TABLE, "a CNN: give it as --cnn-model": ENCODER_TABLE}
    for kind, table in kinds.items():
        if {source for sources in table.values() for source in sources} <= set(found):
            if expected <= set(found):  # type: ignore[operator]
                break  # of this kind, with too much in it
            raise ChainerFileError(f"{path} is {kind}")
    raise ChainerFileError(f"{path} is not chainer-caption's: it lacks {_some(missing)}; unknown in it are {_some(unknown)}")


def _check_kind(path: Path, name: str, dataset: h5py.Dataset) -> None:
    if dataset.dtype.kind != "f" or dataset.shape is None:
        raise ChainerFileError(f"{path}: {name} must hold floating-point numbers, not {dataset.dtype}")
    if dataset.is_virtual or dataset.external:
        raise ChainerFileError(f"{path}: {name} is kept in another file, which is not read")


def _fill(module: nn.Module, datasets: Mapping[str, h5py.Dataset], table: Table, path: Path) -> None:
    """Give every parameter of `module`, which is on the meta device, its values. Every shape must fit."""
    state = module.state_dict()
    for name, sources in table.items():
        shape = (state[name].shape[0] // len(sources), *state[name].shape[1:])
        for source in sources:
            if datasets[source].shape != shape:
                raise ChainerFileError(f"{path}: {source} is {datasets[source].shape}, it must be {shape}")
    for name, sources in table.items():
        array = np.concatenate([datasets[source][()].astype(np.float32) for source in sources])
        if not np.isfinite(array).all():
            raise ChainerFileError(f"{path}: {' or '.join(sources)} holds numbers that are not finite")
        state[name] = torch.from_numpy(array)
    counters = {name: torch.zeros((), dtype=torch.long) for name in state if name.endswith("num_batches_tracked")}
    module.load_state_dict(state | counters, assign=True)


def _language_of(token: str) -> str | None:
    """`<jp>` to `ja`; None for a token that is not two letters in angle brackets."""
    code = token[1:-1]
    if (token[:1], token[-1:]) != ("<", ">") or len(code) != 2 or not (code.isascii() and code.islower()):
        return None
    return COUNTRY_CODES.get(code, code)


def _language_by_script(words: Collection[str]) -> str:
    scripts = [unicodedata.name(word[0], "").partition(" ")[0] for word in words if word]
    if scripts.count("HIRAGANA") + scripts.count("KATAKANA") > len(scripts) / 100:
        return "ja"
    return "zh" if scripts.count("CJK") > len(scripts) / 2 else "en"


def _kind(path: Path) -> str:
    """What a file that is not HDF5 is, for a message."""
    with open(path, "rb") as file:
        head = file.read(8)
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a Python pickle, which is not opened because that can run any code"
    kinds = {b"PK": "a zip archive such as NumPy's .npz", b"\x93NUMPY": "a NumPy array", b"{": "JSON", b"": "empty"}
    return next((kind for start, kind in kinds.items() if head.startswith(start) and (start or not head)), "of another format")


def _some(names: Sequence[str]) -> str:
    if not names:
        return "none"
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Convert chainer-caption's models to a checkpoint, or caption its cached features with its decoder."
    )
    image_side = parser.add_mutually_exclusive_group(required=True)
    image_side.add_argument("--cnn-model", type=Path, help="ResNet50.model: write a checkpoint")
    image_side.add_argument(
        "--features",
        type=Path,
        metavar="DIR",
        help="folder of cached .npz features: write no checkpoint but the captions of these features, as JSON in the "
        "form of generate_caption.py, to compare with what chainer-caption gave for them",
    )
    parser.add_argument("--rnn-model", type=Path, required=True, help="the decoder, such as caption_en_model40.model")
    parser.add_argument("--vocab", type=Path, required=True, help="its vocabulary, ..._dic.json")
    parser.add_argument(
        "-o", "--output", type=Path, help="directory of the checkpoint; with --features a JSON file, default standard output"
    )
    parser.add_argument(
        "--language",
        action="append",
        default=[],
        metavar="CODE[=TOKEN]",
        help="language of the model, such as zh; of a multilingual one each with its start token, such as 'ja=<jp>', the "
        "default first (default: from the vocabulary)",
    )
    parser.add_argument("--tokenization", choices=get_args(Tokenization), help="default: from the vocabulary")
    parser.add_argument("--version", default="1.0", help="version of the model (default: 1.0)")
    parser.add_argument("--half", action="store_true", help="weights as fp16: half the size, no longer Chainer's exact numbers")
    parser.add_argument("--force", action="store_true", help="overwrite the output")
    parser.add_argument("--beam", type=int, default=3, help="with --features: beam size (default: 3)")
    parser.add_argument("--depth", type=int, default=50, help="with --features: tokens at most, <sos> included (default: 50)")
    arguments = parser.parse_args()
    try:
        print(_caption_cache(arguments) if arguments.features else _convert(arguments))
    except CaptionError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"cannot write {arguments.output}: {error}")


def _convert(arguments: argparse.Namespace) -> str:
    output: Path | None = arguments.output
    if output is None:
        raise ChainerFileError("-o must name the directory of the checkpoint")
    if (output / MANIFEST).exists() and not arguments.force:
        raise ChainerFileError(f"{output} holds a checkpoint already: name another directory, or give --force")
    config, digest = convert(
        arguments.cnn_model,
        arguments.rnn_model,
        arguments.vocab,
        output,
        language=arguments.language,
        tokenization=arguments.tokenization,
        version=arguments.version,
        half=arguments.half,
    )
    shown = ", ".join(f"{language.code} ({language.start_token}, {language.tokenization}s)" for language in config.languages)
    decoder = config.decoder
    return f"{output}: {decoder.vocabulary_size} tokens, hidden size {decoder.hidden_size}, {shown}, {digest}"


def _caption_cache(arguments: argparse.Namespace) -> str:
    if arguments.beam < 1 or arguments.depth < 2:
        raise ChainerFileError("--beam must be at least 1 and --depth at least 2")
    output: Path | None = arguments.output
    if output is not None and output.exists() and not arguments.force:
        raise ChainerFileError(f"{output} exists already: name another file, or give --force")
    vocabulary = read_vocabulary(arguments.vocab)
    language = languages_of(vocabulary, arguments.language, arguments.tokenization)[0]
    decoder = read_decoder(arguments.rnn_model, vocabulary)
    names, features = read_features(arguments.features)
    found = caption_features(
        decoder, vocabulary, features, start_token=language.start_token, beam=arguments.beam, depth=arguments.depth
    )
    text = json.dumps(dict(zip(names, found, strict=True)), ensure_ascii=False, indent=2)
    if output is None:
        return text
    write_atomically(output, lambda part: part.write_text(text + "\n", encoding="utf-8"))
    return f"{output}: captions of {len(names)} feature files"


if __name__ == "__main__":
    main()
