"""The OpenAPI document says what the service does: no more, no less, and not something else."""

from __future__ import annotations

import base64
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
from jsonschema import Draft202012Validator

from handler.parameters import Parameters
from scripts.edge import Edge
from scripts.openapi import DOCUMENT, document, error_codes, parameter_schemas
from tests.conftest import ROOT

CAT = (ROOT / "samples/cat.jpg").read_bytes()
B64 = base64.b64encode(CAT).decode()
CONTENT = document()


def test_the_committed_document_is_the_codes() -> None:
    assert json.loads(DOCUMENT.read_text()) == CONTENT, "run: python -m scripts.openapi"


def test_every_schema_is_valid_and_every_reference_leads_somewhere() -> None:
    for schema in CONTENT["components"]["schemas"].values():
        Draft202012Validator.check_schema(schema)
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(CONTENT)):
        place = CONTENT
        for name in reference.split("/"):
            place = place[name]
    assert "x-from-code" not in json.dumps(CONTENT)


def test_the_parameters_are_the_codes() -> None:
    schemas = parameter_schemas()
    assert set(schemas) == set(Parameters.model_fields)
    query = {p["name"]: p["schema"] for p in CONTENT["paths"]["/predict"]["post"]["parameters"]}
    assert set(query) == set(schemas)
    assert (query["beam_size"]["minimum"], query["beam_size"]["maximum"], query["beam_size"]["default"]) == (1, 10, 5)
    form = CONTENT["components"]["requestBodies"]["Photo"]["content"]["multipart/form-data"]["schema"]["properties"]
    assert set(form) == {"image", *schemas}


def test_every_error_of_the_edge_is_documented() -> None:
    template = (ROOT / "deploy/nginx/caption.conf.template").read_text()
    made = re.findall(r"""^ +(\d{3}|default) '\{"error":\{"code":"(\w+)",""", template, re.MULTILINE)
    assert len(made) >= 12
    codes = error_codes()
    for status, code in made:
        if status in ("431", "501"):  # nothing that a client of this interface can meet
            continue
        assert code in codes[500 if status == "default" else int(status)], (status, code)


# ---- against real answers ----


def strict(node: Any) -> Any:
    """The schema without room for keys that it does not name."""
    if isinstance(node, list):
        return [strict(item) for item in node]
    if not isinstance(node, dict):
        return node
    content = {name: strict(value) for name, value in node.items()}
    if "properties" in node and "required" in node:
        content["additionalProperties"] = False
    return content


def check(response: requests.Response, path: str) -> Any:
    """The answer's JSON, which must be what the document says for this path and status, to the last key."""
    operation = CONTENT["paths"][path]["post"]
    answer = operation["responses"][str(response.status_code)]
    if "$ref" in answer:
        answer = CONTENT["components"]["responses"][answer["$ref"].rpartition("/")[2]]
    for header in answer["headers"]:
        assert header in response.headers
    components = copy.deepcopy(CONTENT["components"])
    components["schemas"] = strict(components["schemas"])
    schema = {**answer["content"]["application/json"]["schema"], "components": components}
    Draft202012Validator(schema).validate(response.json())
    return response.json()


FORMS: list[tuple[str, str, dict[str, Any]]] = [
    ("/predict", "/predict", {"files": {"image": CAT}, "data": {"num_captions": "2"}}),
    ("/predict", "/predict?beam_size=2", {"data": CAT, "headers": {"Content-Type": "image/jpeg"}}),
    ("/predict", "/predict", {"json": {"image": B64, "parameters": {"min_confidence": 1}}}),
    ("/predictions/{model}", "/predictions/caption", {"files": {"image": CAT}}),
    ("/predictions/{model}/{version}", "/predictions/caption/1.0", {"files": {"image": CAT}}),
    ("/v1/models/{model}:predict", "/v1/models/caption:predict", {"json": {"instances": [B64, {"b64": B64}, "QUJD"]}}),
    (
        "/v2/models/{model}/infer",
        "/v2/models/caption/infer",
        {"json": {"id": "7", "inputs": [{"name": "image", "shape": [2], "datatype": "BYTES", "data": [B64, B64]}]}},
    ),
]


@pytest.mark.server
@pytest.mark.parametrize(("path", "address", "options"), FORMS, ids=[f"{i} {form[0]}" for i, form in enumerate(FORMS)])
def test_real_answers_are_as_documented(edge: Edge, path: str, address: str, options: dict[str, Any]) -> None:
    response = requests.post(edge.url + address, timeout=60, **options)
    assert response.status_code == 200
    check(response, path)
    if "json" in options:
        schema = CONTENT["paths"][path]["post"]["requestBody"]
        if "$ref" in schema:
            schema = CONTENT["components"]["requestBodies"]["Photo"]
        wanted = {**schema["content"]["application/json"]["schema"], "components": CONTENT["components"]}
        Draft202012Validator(wanted).validate(options["json"])


@pytest.mark.server
def test_real_errors_are_as_documented(edge: Edge) -> None:
    def code(path: str = "/predict", address: str = "", **options: Any) -> str:
        return str(check(requests.post(edge.url + (address or path), timeout=60, **options), path)["error"]["code"])

    assert code(data=b"") == "MissingImage"
    assert code(data=b"hello") == "InvalidImage"
    assert code(files={"image": CAT}, data={"beam_size": "11"}) == "InvalidParameter"
    assert code(json={"image": "!"}) == "InvalidRequest"
    assert code(data=b"\xff\xd8" + bytes(21 * 2**20)) == "ImageTooLarge"
    assert code(data=b"<svg/>", headers={"Content-Type": "image/svg+xml"}) == "UnsupportedFormat"
    assert code("/predictions/{model}", "/predictions/unknown", data=CAT) == "NotFound"


@pytest.mark.server
@pytest.mark.slow
def test_generated_requests_get_documented_answers(edge: Edge, tmp_path: Path) -> None:
    """schemathesis makes requests from the document, right and wrong ones, and compares the answers with it."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{edge.url}/openapi.json", "--url", edge.url),
        *("--checks", "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"),
        *("--phases", "examples,coverage,fuzzing", "--max-examples", "12", "--max-time", "30", "--workers", "1"),
        *("--seed", "1", "--generation-database", "none", "--suppress-health-check", "all", "--no-color"),
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) generated", done.stdout)
    assert int(passed) > 200
