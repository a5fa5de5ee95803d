"""The Helm chart and the plain manifests, through Helm's own engine and the Kubernetes schemas.

Needs the PyPI packages helm-python-sdk (Helm 4 as a library), kubernetes-validate and PyYAML.

    chart.py            checks; the last line is `N passed, N failed, N skipped`
    chart.py --write    writes deploy/kubernetes/ anew from the chart
"""

import copy
import pathlib
import re
import subprocess
import sys
import tempfile
import traceback

import helm_python
import kubernetes_validate
import yaml
from helm_python.chart import Chart, lint

root = pathlib.Path(__file__).resolve().parents[2]
path = root / "deploy/helm/niwaki"
plain = root / "deploy/kubernetes"
# The oldest version that the chart takes, and the newest that the validator knows.
versions = ["1.30", kubernetes_validate.latest_version().removeprefix("v")]
checks = []


def check(function):
    checks.append(function)
    return function


def render(values=None, name="niwaki"):
    with Chart.load(path) as chart:
        return chart.render(values or {}, name=name, namespace="default")


def documents(values=None, name="niwaki"):
    """Rendered objects by kind."""
    found = {}
    for template, text in render(values, name).items():
        for document in yaml.safe_load_all(text if template.endswith(".yaml") else ""):
            if document:
                assert document["kind"] not in found, f"two of kind {document['kind']}"
                found[document["kind"]] = document
    return found


def merge(*layers):
    merged = {}
    for layer in layers:
        for key, value in layer.items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = merge(merged[key], value) if both else copy.deepcopy(value)
    return merged


monitoring = {"metrics": {part: {"enabled": True} for part in ["serviceMonitor", "prometheusRule"]}}
everything = merge(monitoring, {
    "autoscaling": {"enabled": True},
    "metrics": {"dashboard": {"enabled": True}},
    "ingress": {"enabled": True, "className": "nginx", "hosts": [{"host": "e.example", "paths": [{"path": "/", "pathType": "Prefix"}]}],
                "tls": [{"hosts": ["e.example"], "secretName": "tls"}]},
    "auth": {"existingSecret": "keys", "file": True},
    "model": {"id": "sentence-transformers/all-MiniLM-L6-v2", "tokenSecret": "hub", "cacheClaim": "models"},
    "tls": {"existingSecret": "certificate"},
    "server": {"grpcPort": 8081, "adminPort": 9100, "maxQueueTokens": 1000000, "maxConcurrentRequests": 64, "defaultTimeoutMs": 0, "extraArgs": ["--cors-allow-origin=https://a.example"],
               "extraEnv": [{"name": "HF_ENDPOINT", "value": "https://hub.example"}]},
    "image": {"repository": "registry.example/niwaki", "digest": "sha256:" + "0" * 64},
    "imagePullSecrets": [{"name": "pull"}],
    "nodeSelector": {"kubernetes.io/arch": "arm64"},
    "tolerations": [{"key": "cpu", "operator": "Exists", "effect": "NoSchedule"}],
    "affinity": {"nodeAffinity": {}},
    "priorityClassName": "high",
    "podAnnotations": {"a.example/b": "c"},
    "podLabels": {"team": "search"},
    "networkPolicy": {"from": [{"namespaceSelector": {"matchLabels": {"team": "search"}}}], "egress": [{"ports": [{"port": 4317, "protocol": "TCP"}]}]},
    "service": {"type": "LoadBalancer", "annotations": {"a.example/lb": "x"}},
    "serviceAccount": {"annotations": {"a.example/role": "x"}},
})
cases = {
    "defaults": {},
    "everything": everything,
    "artefact": {"model": {"artefactClaim": "artefacts", "artefactPath": "my-encoder"}},
    "bare": {
        "networkPolicy": {"enabled": False},
        "podDisruptionBudget": {"enabled": False},
        "serviceAccount": {"create": False},
        "topologySpread": {"enabled": False},
    },
}


@check
def helm_lints_it():
    for name, values in cases.items():
        report = lint(path, values, strict=True, kube_version="v1.30.0")
        worst = [message for message in report["messages"] if message["severity"] > 1]
        assert not report["errors"] and not worst, f"{name}: {report}"


@check
def what_is_rendered_meets_the_schemas():
    ours = {"ServiceMonitor", "PrometheusRule"}
    seen = set()
    for name, values in cases.items():
        for kind, document in documents(values).items():
            seen.add(kind)
            if kind not in ours:
                for version in versions:
                    kubernetes_validate.validate(document, version, strict=True)
    expected = {"Deployment", "Service", "ServiceAccount", "PodDisruptionBudget", "NetworkPolicy", "Ingress",
                "HorizontalPodAutoscaler", "ConfigMap"} | ours
    assert seen == expected, seen ^ expected


@check
def the_validator_finds_a_wrong_field():
    document = documents()["Deployment"]
    document["spec"]["template"]["spec"]["containers"][0]["readynessProbe"] = {}
    try:
        kubernetes_validate.validate(document, versions[0], strict=True)
    except kubernetes_validate.ValidationError:
        return
    raise AssertionError("a misspelt field passed")


@check
def wrong_values_are_refused():
    wrong = [
        {"replicas": 3},
        {"replicaCount": -1},
        {"replicaCount": "two"},
        {"image": {"tag": "a b"}},
        {"image": {"digest": "sha256:short"}},
        {"image": {"pullPolicy": "Sometimes"}},
        {"model": {"id": "no-organisation"}},
        {"model": {"artefactPath": "../secrets"}},
        {"model": {"artefactPath": "/absolute"}},
        {"model": {"id": "a/b", "artefactClaim": "c"}},
        {"server": {"port": 70000}},
        {"server": {"grpcPort": 0}},
        {"server": {"grpcPort": 3000}},
        {"server": {"adminPort": 3000}},
        {"server": {"adminPort": 8081, "grpcPort": 8081}},
        {"auth": {"file": True}},
        {"tls": {"secret": "x"}},
        {"server": {"shutdownGraceSeconds": 0}},
        {"server": {"maxQueueTokens": 0}},
        {"server": {"extraArgs": ["serve"]}},
        {"resources": {"limits": {"memory": "lots"}}},
        {"service": {"type": "Headless"}},
        {"ingress": {"enabled": True}},
        {"ingress": {"enabled": True, "hosts": [{"host": "a", "paths": []}]}},
        {"podDisruptionBudget": {"maxUnavailable": 0}},
        {"autoscaling": {"minReplicas": 0}},
        {"autoscaling": {"targetQueueUtilization": "80%"}},
        {"metrics": {"prometheusRule": {"latencyObjective": "0.5"}}},
        {"metrics": {"serviceMonitor": {"interval": "15"}}},
        {"podLabels": {"a": "not valid!"}},
    ]
    passed = []
    for values in wrong:
        try:
            render(values)
            passed.append(values)
        except helm_python.HelmError:
            pass
    assert not passed, passed


@check
def the_grace_period_covers_pause_and_drain():
    for pause, drain in [(5, 30), (20, 300)]:
        spec = documents({"server": {"preStopSeconds": pause, "shutdownGraceSeconds": drain}})["Deployment"]["spec"]["template"]["spec"]
        container = spec["containers"][0]
        assert spec["terminationGracePeriodSeconds"] > pause + drain
        assert container["lifecycle"]["preStop"]["sleep"]["seconds"] == pause
        assert f"--shutdown-grace={drain}" in container["args"]
        # A pod that drains has left the Service before it refuses work.
        ready = container["readinessProbe"]
        assert ready["httpGet"] == {"path": "/health/ready", "port": "http", "scheme": "HTTP"}
        assert container["livenessProbe"]["httpGet"]["path"] == container["startupProbe"]["httpGet"]["path"] == "/health/live"


@check
def pods_can_do_nothing_but_serve():
    spec = documents()["Deployment"]["spec"]["template"]["spec"]
    container = spec["containers"][0]
    assert spec["automountServiceAccountToken"] is False
    assert spec["securityContext"]["runAsNonRoot"] and spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    assert {"cpu", "memory"} <= set(container["resources"]["limits"])
    assert documents()["NetworkPolicy"]["spec"]["egress"] == [], "the model inside the image needs nobody"
    ports = [rule["ports"] for rule in documents({"model": {"id": "a/b"}})["NetworkPolicy"]["spec"]["egress"]]
    assert [[port["port"] for port in rule] for rule in ports] == [[53, 53, 443]]


@check
def who_may_ask_is_whom_the_values_let_in():
    def sources(values):
        rule = documents(values)["NetworkPolicy"]["spec"]["ingress"][0]
        return [source.get("ipBlock", {}).get("cidr", "pods") for source in rule["from"]]

    ingress = {"ingress": {"enabled": True, "hosts": [{"host": "e.example", "paths": [{"path": "/", "pathType": "Prefix"}]}]}}
    outside = [{"service": {"type": "LoadBalancer"}}, {"service": {"type": "NodePort"}}, ingress]
    assert sources({}) == ["pods"]
    for values in outside:
        assert sources(values) == ["pods", "0.0.0.0/0", "::/0"], values
        assert sources(merge(values, {"networkPolicy": {"from": [{"podSelector": {}}]}})) == ["pods"], values


@check
def grpc_has_its_port_everywhere_or_nowhere():
    assert "grpc" not in yaml.safe_dump(documents()).lower()
    found = documents({"server": {"grpcPort": 8081}, "service": {"grpcPort": 9000}})
    container = found["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert "--grpc-port=8081" in container["args"]
    assert {"name": "grpc", "containerPort": 8081, "protocol": "TCP"} in container["ports"]
    ports = {port["name"]: port for port in found["Service"]["spec"]["ports"]}
    assert (ports["grpc"]["port"], ports["grpc"]["targetPort"]) == (9000, "grpc")
    assert {port["port"] for port in found["NetworkPolicy"]["spec"]["ingress"][0]["ports"]} == {"http", "grpc"}


@check
def metrics_and_administration_can_have_a_port_of_their_own():
    assert "admin" not in yaml.safe_dump(documents()).lower()
    scraper = [{"namespaceSelector": {"matchLabels": {"name": "monitoring"}}}]
    found = documents(merge(monitoring, {"server": {"adminPort": 9100}, "service": {"adminPort": 9999}, "networkPolicy": {"adminFrom": scraper}}))
    container = found["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert "--prometheus-port=9100" in container["args"]
    assert {"name": "admin", "containerPort": 9100, "protocol": "TCP"} in container["ports"]
    ports = {port["name"]: port for port in found["Service"]["spec"]["ports"]}
    assert (ports["admin"]["port"], ports["admin"]["targetPort"]) == (9999, "admin")
    rules = {rule["ports"][0]["port"]: rule for rule in found["NetworkPolicy"]["spec"]["ingress"]}
    assert rules["admin"]["from"] == scraper and rules["http"]["from"] != scraper
    assert found["ServiceMonitor"]["spec"]["endpoints"][0]["port"] == "admin"


@check
def keys_and_certificates_come_from_secrets():
    by_variable = documents({"auth": {"existingSecret": "keys"}})["Deployment"]["spec"]["template"]["spec"]
    assert "volumes" not in by_variable and any(variable["name"] == "API_KEY" for variable in by_variable["containers"][0]["env"])
    found = documents(everything)
    spec = found["Deployment"]["spec"]["template"]["spec"]
    container = spec["containers"][0]
    mounts = {mount["name"]: mount for mount in container["volumeMounts"]}
    secrets = {volume["name"]: volume["secret"]["secretName"] for volume in spec["volumes"] if "secret" in volume}
    assert secrets == {"keys": "keys", "tls": "certificate"}
    assert all(mounts[name]["readOnly"] for name in secrets)
    assert not any(variable["name"] == "API_KEY" for variable in container["env"])
    for flag in ["--api-key-file=/keys/api-key", "--tls-cert=/tls/tls.crt", "--tls-key=/tls/tls.key"]:
        assert flag in container["args"], flag
        assert flag.split("=")[1].rsplit("/", 1)[0] in {mount["mountPath"] for mount in mounts.values()}
    for probe in ["startupProbe", "livenessProbe", "readinessProbe"]:
        assert container[probe]["httpGet"]["scheme"] == "HTTPS"
    assert found["ServiceMonitor"]["spec"]["endpoints"][0]["scheme"] == "https"
    assert {port["appProtocol"] for port in found["Service"]["spec"]["ports"] if port["name"] != "admin"} == {"https"}


@check
def labels_select_what_they_should():
    for name in ["niwaki", "prod", "x" * 50]:
        found = documents(everything, name)
        labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
        selectors = [
            found["Deployment"]["spec"]["selector"]["matchLabels"],
            found["Service"]["spec"]["selector"],
            found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
            found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
            *[spread["labelSelector"]["matchLabels"] for spread in found["Deployment"]["spec"]["template"]["spec"]["topologySpreadConstraints"]],
        ]
        assert all(selector and selector.items() <= labels for selector in selectors)
        monitor = found["ServiceMonitor"]["spec"]["selector"]["matchLabels"].items()
        assert monitor <= found["Service"]["metadata"]["labels"].items()
        ports = {port["name"] for port in found["Service"]["spec"]["ports"]}
        assert found["ServiceMonitor"]["spec"]["endpoints"][0]["port"] in ports
        assert found["HorizontalPodAutoscaler"]["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
        assert "replicas" not in found["Deployment"]["spec"], "an autoscaler and a fixed number would fight"
        assert found["Ingress"]["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]["name"] == found["Service"]["metadata"]["name"]


@check
def the_program_knows_every_flag():
    source = (root / "src/cli/args.rs").read_text()
    known = set(re.findall(r"^    pub\(super\) (\w+):", source, re.M))
    for values in cases.values():
        for argument in documents(values)["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"][1:]:
            flag = argument.removeprefix("--").split("=")[0].replace("-", "_")
            assert flag in known, argument
    # A large number is not written as 1e+06.
    assert "--max-queue-tokens=1000000" in documents(everything)["Deployment"]["spec"]["template"]["spec"]["containers"][0]["args"]


@check
def the_autoscaler_asks_for_metrics_that_the_adapter_serves():
    rules = yaml.safe_load((root / "deploy/prometheus/adapter-values.yaml").read_text())["rules"]["custom"]
    served = {rule["name"]["as"] for rule in rules}
    metrics = documents(everything)["HorizontalPodAutoscaler"]["spec"]["metrics"]
    asked = {metric["pods"]["metric"]["name"] for metric in metrics if metric["type"] == "Pods"}
    assert asked == served, asked ^ served


@check
def the_rules_reach_prometheus_as_they_are():
    """And with another objective they still are rules."""
    source = yaml.safe_load((path / "files/rules.yaml").read_text())
    assert documents(monitoring)["PrometheusRule"]["spec"] == source
    other = documents(merge(monitoring, {"metrics": {"prometheusRule": {"latencyObjective": "0.1024"}}}))["PrometheusRule"]["spec"]
    text = yaml.safe_dump(other)
    assert "0.8192" not in text and text.count("0.1024") == (path / "files/rules.yaml").read_text().count("0.8192") - 1  # one in a comment
    try:
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(text)
            file.flush()
            subprocess.run(["promtool", "check", "rules", file.name], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        print("skipped the objective's rules: no promtool")


def plain_manifests():
    """The rendered chart without Helm's own labels."""

    def text(values, kinds):
        parts = []
        for template, manifest in sorted(render(values).items()):
            if template.endswith(".yaml") and any(f"\nkind: {kind}\n" in f"\n{manifest}" for kind in kinds):
                lines = [line for line in manifest.strip("\n").split("\n") if "managed-by: Helm" not in line and "helm.sh/chart" not in line]
                parts.append("\n".join(lines))
        return "# Rendered from deploy/helm/niwaki by tests/deploy/chart.py --write.\n---\n" + "\n---\n".join(parts) + "\n"

    return {
        "niwaki.yaml": text({}, ["ServiceAccount", "Service", "Deployment", "PodDisruptionBudget", "NetworkPolicy"]),
        "autoscaling.yaml": text({"autoscaling": {"enabled": True}}, ["HorizontalPodAutoscaler"]),
        "monitoring.yaml": text(monitoring, ["ServiceMonitor", "PrometheusRule"]),
    }


@check
def the_plain_manifests_are_the_rendered_chart():
    for name, text in plain_manifests().items():
        assert (plain / name).read_text() == text, f"{name}: run tests/deploy/chart.py --write"
        for document in yaml.safe_load_all(text):
            if not document["apiVersion"].startswith("monitoring."):
                kubernetes_validate.validate(document, versions[0], strict=True)


@check
def kserve_gets_valid_pods():
    """KServe's own fields are few; what lies below `containers` are Kubernetes' pods."""
    known = {"minReplicas", "maxReplicas", "scaleMetric", "scaleTarget", "terminationGracePeriodSeconds", "containers", "model"}
    runtimes, used = set(), set()
    for document in yaml.safe_load_all((plain / "kserve.yaml").read_text()):
        spec = document["spec"]
        if document["kind"] == "InferenceService":
            spec = spec["predictor"]
            assert set(spec) <= known, set(spec) - known
            used |= {spec["model"]["runtime"]} if "model" in spec else set()
        else:
            assert document["kind"] == "ServingRuntime"
            runtimes.add(document["metadata"]["name"])
        for container in spec.get("containers", []):
            pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": {"containers": [container]}}
            kubernetes_validate.validate(pod, versions[0], strict=True)
            assert container["name"] == "kserve-container"
    assert used == runtimes


def main():
    if "--write" in sys.argv:
        plain.mkdir(exist_ok=True)
        for name, text in plain_manifests().items():
            (plain / name).write_text(text)
        return 0
    failed = 0
    for function in checks:
        try:
            function()
            print(f"ok      {function.__name__}")
        except Exception:
            failed += 1
            print(f"FAILED  {function.__name__}\n{traceback.format_exc()}")
    print(f"{len(checks) - failed} passed, {failed} failed, 0 skipped")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
