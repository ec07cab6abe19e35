"""The files of deploy/ -> what of them can be checked here: names that exist, and rules of their formats."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from nnserver.config import Config, read_config
from nnserver.metrics.definitions import METRICS

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
DASHBOARD = json.loads((DEPLOY / "grafana" / "nnserve.json").read_text(encoding="utf-8"))
ALERTS = yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text(encoding="utf-8"))
RULES = [rule for group in ALERTS["groups"] for rule in group["rules"]]
UNIT = (DEPLOY / "systemd" / "nnserver.service").read_text(encoding="utf-8")
CONTAINERFILE = (DEPLOY / "Containerfile").read_text(encoding="utf-8")
PANELS = DASHBOARD["panels"]
EXPRESSIONS = [
    *(target["expr"] for panel in PANELS for target in panel["targets"]),
    *(rule["expr"] for rule in RULES),
]
# What Prometheus and the scrape configuration add to ours.
FOREIGN_LABELS = {"job", "instance", "le"}


def manifest(path: str) -> Any:
    return yaml.safe_load((DEPLOY / path).read_text(encoding="utf-8"))


DEPLOYMENT = manifest("kubernetes/deployment.yaml")
RUNTIME = manifest("kserve/serving-runtime.yaml")


def exported() -> dict[str, set[str]]:
    """The labels of each series that Prometheus has of us, by its name."""
    series = {}
    for name, metric in METRICS.items():
        suffixes = ("_bucket", "_sum", "_count") if metric.type == "histogram" else ("",)
        for suffix in suffixes:
            series[name + suffix] = set(metric.labels)
    return series


# Dashboard and alerts


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_query_asks_for_what_is_exported(expression: str) -> None:
    """Every name in it is a metric of ours, and every label one that the metric has."""
    series = exported()
    names = set(re.findall(r"\b(?:nnserve|process)_\w+", expression))
    assert names or expression.startswith("up{")
    assert names <= set(series)
    selected = set(re.findall(r"(\w+)(?:=~|!~|!=|=)\"", expression))
    grouped = {
        label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(",")
    }
    known = set.union(*(series[name] for name in names)) if names else set()
    assert (selected | grouped) - FOREIGN_LABELS <= known


def test_the_queries_cover_every_stage() -> None:
    """Else the test above could pass for want of panels."""
    used = " ".join(EXPRESSIONS)
    for name in ("requests_total", "queue_seconds", "compute_seconds", "decode_seconds", "encode_seconds"):
        assert f"nnserve_{name}" in used
    assert len(PANELS) >= 12
    assert len(RULES) >= 6


def test_a_legend_names_labels_that_its_query_keeps() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            labels = set(re.findall(r"{{(\w+)}}", target["legendFormat"]))
            assert labels <= set(re.findall(r"\w+", target["expr"]))


def test_panels_have_their_own_places() -> None:
    """Ids differ, and no two panels lie on each other."""
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)
    cells = [
        (x, y)
        for panel in PANELS
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells)
    assert max(x for x, _ in cells) < 24


def test_alerts_are_complete() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("warning", "critical")
        assert rule["annotations"]["summary"]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed")
def test_promtool_takes_the_alerts() -> None:
    command = ("promtool", "check", "rules", str(DEPLOY / "prometheus" / "alerts.yml"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


# Kubernetes


def container(document: Any) -> Any:
    template = document["spec"].get("template", document)
    (only,) = template["spec"]["containers"]
    return only


@pytest.mark.parametrize("document", [DEPLOYMENT, RUNTIME], ids=["deployment", "runtime"])
def test_a_container_is_started_with_settings_that_exist(document: Any) -> None:
    """Its ports are those it listens on and is probed at, it may do nothing else, its memory is bounded."""
    it = container(document)
    config = read_config(it["args"], {})
    ports = {port["containerPort"] for port in it["ports"]}
    port = int(config.listen.rpartition(":")[2])
    assert port in ports
    for probe in ("startupProbe", "readinessProbe"):
        if probe in it:
            assert it[probe]["grpc"]["port"] == port
    assert it["securityContext"]["allowPrivilegeEscalation"] is False
    assert it["securityContext"]["readOnlyRootFilesystem"] is True
    assert it["securityContext"]["capabilities"]["drop"] == ["ALL"]
    assert it["resources"]["requests"] == it["resources"]["limits"]


def test_a_pod_is_given_the_time_to_drain() -> None:
    pod = DEPLOYMENT["spec"]["template"]["spec"]
    config = read_config(container(DEPLOYMENT)["args"], {})
    pause = int(container(DEPLOYMENT)["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["terminationGracePeriodSeconds"] > pause + config.grace_s
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False


def test_service_and_budget_select_the_deployments_pods() -> None:
    labels = DEPLOYMENT["spec"]["template"]["metadata"]["labels"]
    service, budget = manifest("kubernetes/service.yaml"), manifest("kubernetes/disruption-budget.yaml")
    assert DEPLOYMENT["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["selector"] == labels
    assert budget["spec"]["selector"]["matchLabels"] == labels
    assert service["spec"]["clusterIP"] == "None"
    named = {port["name"] for port in container(DEPLOYMENT)["ports"]}
    assert {port["targetPort"] for port in service["spec"]["ports"]} == named
    scraped = DEPLOYMENT["spec"]["template"]["metadata"]["annotations"]["prometheus.io/port"]
    assert read_config(container(DEPLOYMENT)["args"], {}).metrics_listen.endswith(f":{scraped}")
    assert DEPLOYMENT["spec"]["replicas"] > budget["spec"]["maxUnavailable"]


def test_the_runtime_is_kserves() -> None:
    assert (RUNTIME["apiVersion"], RUNTIME["kind"]) == ("serving.kserve.io/v1alpha1", "ServingRuntime")
    assert RUNTIME["spec"]["protocolVersions"] == ["grpc-v2"]
    assert container(RUNTIME)["name"] == "kserve-container"
    assert {model["name"] for model in RUNTIME["spec"]["supportedModelFormats"]} == {"nnserve", "onnx"}


# Container and unit


def test_the_container_file_keeps_to_basic_rules() -> None:
    """Pinned bases, not root, no cache of pip in a layer, started without a shell."""
    instructions = re.sub(r"\\\n", "", re.sub(r"(?m)^#.*\n", "", CONTAINERFILE)).splitlines()
    bases = [line.split()[1] for line in instructions if line.startswith("FROM ")]
    assert bases
    for base in bases:
        assert re.fullmatch(r"\S+:\d[\w.\-]*", base)
    users = [line.split()[1] for line in instructions if line.startswith("USER ")]
    assert users
    assert not users[-1].startswith(("0", "root"))
    assert all("--no-cache-dir" in line for line in instructions if "pip install" in line)
    (entry,) = (line for line in instructions if line.startswith("ENTRYPOINT "))
    assert json.loads(entry.removeprefix("ENTRYPOINT ")) == ["nnserver"]
    (command,) = (line for line in instructions if line.startswith("CMD "))
    config = read_config(json.loads(command.removeprefix("CMD ")), {})
    (exposed,) = (line.split()[1:] for line in instructions if line.startswith("EXPOSE "))
    assert exposed == [address.rpartition(":")[2] for address in (config.listen, config.metrics_listen)]
    extras = re.search(r"'\.\[([\w,]+)\]'", CONTAINERFILE)
    known = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert extras is not None
    assert set(extras[1].split(",")) <= set(known)


@pytest.mark.skipif(shutil.which("hadolint") is None, reason="hadolint is not installed")
def test_hadolint_takes_the_container_file() -> None:
    done = subprocess.run(("hadolint", str(DEPLOY / "Containerfile")), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_unit_stops_a_server_after_its_grace() -> None:
    found = re.search(r"TimeoutStopSec=(\d+)", UNIT)
    assert found is not None
    assert int(found[1]) > Config().grace_s
    for line in ("NoNewPrivileges=yes", "ProtectSystem=strict", "DynamicUser=yes", "CapabilityBoundingSet="):
        assert line in UNIT.splitlines()


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit() -> None:
    """But for the program, which is not installed where tests run."""
    command = ("systemd-analyze", "verify", str(DEPLOY / "systemd" / "nnserver.service"))
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "nnserver.service" in line]
    assert [line for line in lines if "is not executable" not in line] == []
