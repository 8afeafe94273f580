"""Write the OpenAPI 3.1 document of the HTTP interface: `python -m scripts.openapi`.

scripts/openapi.yaml says what the interface is; what the code defines is put in from the code, so that nothing is defined
twice. The result, web/openapi.json, is committed: the edge serves it, and a test says when it is old.
"""

from __future__ import annotations

import argparse
import copy
import json
import tomllib
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from handler.config import DecoderConfig, ModelConfig, ServingConfig
from handler.errors import CaptionError, RequestError
from handler.image import FORMATS
from handler.parameters import describe

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "scripts/openapi.yaml"
DOCUMENT = ROOT / "web/openapi.json"
FROM_CODE = "x-from-code"
MODELS_OWN = ("max_length", "length_penalty", "language")
"""Parameters whose default, and whose languages, are those of the model that is served."""
EDGE_ERRORS = {
    404: "NotFound",
    405: "MethodNotAllowed",
    408: "RequestTimeout",
    414: "InvalidRequest",
    429: "TooManyRequests",
    502: "ServiceUnavailable",
    503: "ServiceUnavailable",
    504: "Timeout",
}
"""What the edge answers without the handler; deploy/nginx/caption.conf.template."""
HEADERS = {405: "Allow", 429: "Retry-After", 502: "Retry-After", 503: "Retry-After", 504: "Retry-After"}


def document() -> dict[str, Any]:
    """The whole document, as JSON values."""
    content = yaml.safe_load(SOURCE.read_text())
    serving = ServingConfig()
    limits = serving.limits
    content["info"]["version"] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    content["components"]["requestBodies"]["Photo"]["description"] = (
        f"{', '.join(FORMATS)}; at most {limits.max_bytes:,} bytes, {limits.max_pixels:,} pixels "
        f"and {limits.max_side:,} pixels a side."
    )
    schemas = content["components"]["schemas"]
    schemas["V1Request"]["properties"]["instances"]["maxItems"] = serving.max_instances
    schemas["V2Request"]["properties"]["inputs"]["items"]["properties"]["data"]["maxItems"] = serving.max_instances
    content["components"]["responses"] |= {
        _response_name(status): _error_response(status, codes) for status, codes in error_codes().items()
    }
    filled: dict[str, Any] = _filled(content)
    return filled


def error_codes() -> dict[int, set[str]]:
    """The codes of each HTTP status: those of the handler and those of the edge."""
    codes: dict[int, set[str]] = defaultdict(set)
    errors: list[type[CaptionError]] = [CaptionError, *_descendants(RequestError)]
    for error in errors:
        codes[error.status].add(error.code)
    for status, code in EDGE_ERRORS.items():
        codes[status].add(code)
    return dict(sorted(codes.items()))


def parameter_schemas() -> dict[str, dict[str, Any]]:
    """A JSON schema for each request parameter."""
    schemas = copy.deepcopy(describe(ModelConfig(decoder=DecoderConfig(vocabulary_size=3))))
    for name in MODELS_OWN:
        schemas[name].pop("default")
        schemas[name]["description"] += "; the default is the model's"
    schemas["language"].pop("enum")
    schemas["num_captions"].pop("default")
    return schemas


def _descendants(root: type[CaptionError]) -> Iterator[type[CaptionError]]:
    yield root
    for child in root.__subclasses__():
        yield from _descendants(child)


def _filled(node: Any) -> Any:
    """The node with each `x-from-code` replaced by what it stands for."""
    if isinstance(node, list):
        items = [_filled(item) for item in node]
        return [one for item in items for one in (item if isinstance(item, list) else [item])]
    if not isinstance(node, dict):
        return node
    rest = {name: _filled(value) for name, value in node.items() if name != FROM_CODE}
    match node.get(FROM_CODE):
        case "parameters":
            return rest | parameter_schemas()
        case "query":
            schemas = parameter_schemas()
            meanings = {name: schema.pop("description") for name, schema in schemas.items()}
            return [{"name": n, "in": "query", "description": meanings[n], "schema": schema} for n, schema in schemas.items()]
        case "errors":
            return rest | {str(s): {"$ref": f"#/components/responses/{_response_name(s)}"} for s in error_codes()}
        case "formats":
            return {"type": "string", "enum": list(FORMATS)}
        case None:
            return rest
        case unknown:
            raise ValueError(f"{FROM_CODE}: {unknown} stands for nothing")


def _response_name(status: int) -> str:
    return f"Error{status}"


def _error_response(status: int, codes: set[str]) -> dict[str, Any]:
    names = ["X-Request-Id", *([HEADERS[status]] if status in HEADERS else [])]
    code = {"properties": {"error": {"properties": {"code": {"enum": sorted(codes)}}}}}
    schema = {"allOf": [{"$ref": "#/components/schemas/Error"}, code]}
    return {
        "description": " or ".join(sorted(codes)),
        "headers": {name: {"$ref": f"#/components/headers/{name}"} for name in names},
        "content": {"application/json": {"schema": schema}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    arguments = parser.parse_args()
    arguments.output.write_text(json.dumps(document(), ensure_ascii=False, indent=1) + "\n")


if __name__ == "__main__":
    main()
