"""A server as chainer-caption's was, for `scripts.benchmark` to compare with: one photo at a time, in one process, as the
model was trained: fp32, and the plain search. Prints a line when it answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import torch

from handler.beam_search import Search, beam_search
from handler.captioner import Captioner
from handler.checkpoint import load_checkpoint


class _Quiet(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


def main() -> None:
    checkpoint = load_checkpoint(Path(sys.argv[1]))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    captioner, decoder = Captioner(checkpoint, device=device), checkpoint.decoder.to(device)
    vocabulary, settings = checkpoint.vocabulary, checkpoint.config.search
    start = vocabulary.index[checkpoint.config.languages[0].start_token]
    search = Search(start, 5, settings.max_length, settings.length_penalty)
    forbidden = [*vocabulary.never_generated, vocabulary.unknown_index]

    def application(environ: dict[str, Any], respond: Callable[..., Any]) -> Iterable[bytes]:
        data = environ["wsgi.input"].read(int(environ["CONTENT_LENGTH"]))
        features = torch.from_numpy(captioner.encode([captioner.prepare(data).pixels])).to(device)
        with torch.inference_mode():
            (found,) = beam_search(decoder, features, [search], end_token=vocabulary.end_index, forbidden=forbidden)
        captions = [{"sentence": vocabulary.decode(h.tokens), "log_likelihood": sum(h.log_likelihoods)} for h in found]
        body = json.dumps({"captions": captions}).encode()
        respond("200 OK", [("Content-Type", "application/json"), ("Content-Length", str(len(body)))])
        return [body]

    with make_server("127.0.0.1", int(sys.argv[2]), application, handler_class=_Quiet) as server:
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
