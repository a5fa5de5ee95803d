"""Dashboard, recording rules, alert rules and autoscaler metrics against a loaded niwaki, through the real Prometheus.

Starts niwaki and Prometheus (the program `prometheus` on the path), puts load on the first, and asks the second's HTTP
API. With --url and --prometheus-url both run already (see container.sh). Needs PyYAML.
The last line is `N passed, N failed, N skipped`.
"""

import argparse
import collections
import http.client
import json
import math
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request

import yaml

root = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(root / "tests/clients"))
from harness import Server  # noqa: E402

WORDS = "a garden tree stays small and beautiful because somebody prunes it every year with patience".split()


class Setup:
    """Both servers, and what the client saw."""

    def __init__(self, arguments):
        self.scrape = 5 if arguments.prometheus_url else 1
        self.server = self.prometheus = None
        if arguments.url:
            self.url, self.prometheus_url = arguments.url, arguments.prometheus_url
        else:
            # A small queue, so that some requests are refused.
            self.server = Server(arguments.binary, "--max-concurrent-requests", "24")
            self.url = self.server.url
            self.start_prometheus(urllib.parse.urlsplit(self.url).netloc)
        self.codes = collections.Counter()
        self.seconds = []

    def start_prometheus(self, target):
        """The configuration of deploy/, with other places and a second instead of five."""
        self.directory = tempfile.TemporaryDirectory()
        directory = pathlib.Path(self.directory.name)
        text = (root / "deploy/prometheus/prometheus.yml").read_text()
        for old, new in [("5s", "1s"), ("niwaki:3000", target), ("/etc/prometheus/rules.yaml", str(root / "deploy/helm/niwaki/files/rules.yaml"))]:
            assert old in text, old
            text = text.replace(old, new)
        (directory / "prometheus.yml").write_text(text)
        with http_server_port() as port:
            pass
        self.prometheus_url = f"http://127.0.0.1:{port}"
        self.log = open(directory / "log", "w+")
        self.prometheus = subprocess.Popen(
            ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data", f"--web.listen-address=127.0.0.1:{port}"],
            stdout=self.log, stderr=subprocess.STDOUT,
        )

    def stop(self):
        if self.prometheus:
            self.prometheus.terminate()
            self.prometheus.wait(timeout=30)
            self.directory.cleanup()
        if self.server and self.server.process.poll() is None:
            self.server.stop()

    def query(self, expression):
        address = f"{self.prometheus_url}/api/v1/query?" + urllib.parse.urlencode({"query": expression})
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                return json.load(answer)["data"]["result"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{expression}\n{error.read().decode()}") from None

    def value(self, expression):
        result = self.query(expression)
        assert len(result) == 1, f"{expression}: {result}"
        return float(result[0]["value"][1])

    def load(self, seconds, n_clients=6):
        """Clients that send one request after another, most of them proper."""
        end = time.monotonic() + seconds
        codes, taken, lock = self.codes, self.seconds, threading.Lock()

        def client(number):
            connection = http.client.HTTPConnection(urllib.parse.urlsplit(self.url).netloc, timeout=30)
            turn = number
            while time.monotonic() < end:
                turn += 1
                body = {"inputs": " ".join(WORDS[i % len(WORDS)] for i in range(turn % 60 + 1))}
                path = "/embed"
                if turn % 20 == 0:
                    body = {"inputs": ""}
                elif turn % 23 == 0:
                    body = {"inputs": [body["inputs"]] * 20}  # six of these are more than 24 inputs
                elif turn % 29 == 0:
                    path, body = "/v1/embeddings", {"input": body["inputs"]}
                began = time.monotonic()
                connection.request("POST", path, json.dumps(body), {"content-type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                with lock:
                    codes[path, answer.status] += 1
                    if path == "/embed":
                        taken.append(time.monotonic() - began)
            connection.close()

        threads = [threading.Thread(target=client, args=(number,)) for number in range(n_clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()


class http_server_port:
    """A port that is free now."""

    def __enter__(self):
        import socket

        self.socket = socket.socket()
        self.socket.bind(("127.0.0.1", 0))
        return self.socket.getsockname()[1]

    def __exit__(self, *_):
        self.socket.close()


def wait_for(what, condition, seconds=60):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if condition():
                return
        except (OSError, AssertionError, ValueError):
            pass
        time.sleep(0.3)
    raise AssertionError(f"{what} did not come within {seconds} s")


def dashboard():
    return json.loads((root / "deploy/helm/niwaki/files/dashboard.json").read_text())


def dashboard_queries():
    """(panel, expression) with Grafana's variables filled in."""
    for panel in dashboard()["panels"]:
        for target in panel.get("targets", []):
            yield panel["title"], target["expr"]
    for annotation in dashboard()["annotations"]["list"]:
        yield "annotation " + annotation["name"], annotation["expr"]


def filled(expression, setup):
    values = {"$__rate_interval": f"{4 * setup.scrape}s", "$namespace": ".*", "$job": ".*", "$instance": ".*"}
    for name, value in values.items():
        expression = expression.replace(name, value)
    assert "$" not in expression, expression
    return expression


def families(setup):
    with urllib.request.urlopen(f"{setup.url}/metrics", timeout=10) as answer:
        return dict(re.findall(r"^# TYPE (\S+) (\S+)$", answer.read().decode(), re.M))


def names_in(text):
    return set(re.findall(r"\b(?:niwaki|process)_[a-z0-9_]+\b", text))


def base(name, types):
    for suffix in ["_bucket", "_sum", "_count"]:
        if name.endswith(suffix) and types.get(name.removesuffix(suffix)) == "histogram":
            return name.removesuffix(suffix)
    return name


# ------------------------------------------------------------------------------------------------------------ checks


def every_panel_shows_something(setup):
    without_limit = setup.value("niwaki_cgroup_memory_limit_bytes") == math.inf
    empty, n_queries = [], 0
    for panel, expression in dashboard_queries():
        n_queries += 1
        result = setup.query(filled(expression, setup))
        may_be_empty = panel.startswith("annotation") or (without_limit and "< +Inf" in expression)
        if not result and not may_be_empty:
            empty.append(f"{panel}: {expression}")
        for series in result:
            value = float(series["value"][1])
            # A ratio over nothing, or a quantile of nothing, is NaN; under load nothing is.
            if math.isnan(value) and "selfcheck" not in expression:
                empty.append(f"{panel}: NaN: {expression} {series['metric']}")
    assert not empty, "\n".join(empty)
    print(f"        {n_queries} queries")


def the_variables_of_the_dashboard_have_values(setup):
    for variable in dashboard()["templating"]["list"][1:]:
        metric, label = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"]).groups()
        result = setup.query(filled(metric, setup))
        assert result and (label == "namespace" or all(label in series["metric"] for series in result)), variable["name"]


def panels_and_metrics_are_complete(setup):
    """Panels, rules and the text on monitoring name only what exists, and leave out nothing."""
    types = families(setup)
    shown = {base(name, types) for _, expression in dashboard_queries() for name in names_in(expression)}
    text = (root / "deploy/MONITORING.md").read_text()
    rules = (root / "deploy/helm/niwaki/files/rules.yaml").read_text() + (root / "deploy/prometheus/adapter-values.yaml").read_text()
    ours = {"niwaki_queue_utilization", "niwaki_queue_p95_seconds"}  # made by the adapter
    used = {base(name, types) for name in names_in(rules)} - ours
    told = {base(name, types) for name in names_in(text)} - ours
    for where, names in [("the dashboard", shown), ("the rules", used), ("MONITORING.md", told)]:
        assert names <= set(types), f"{where} names what does not exist: {names - set(types)}"
    assert set(types) <= told, f"not explained in MONITORING.md: {set(types) - told}"
    aside = {"process_virtual_memory_bytes", "process_threads", "niwaki_input_tokens_total"}
    assert set(types) - aside <= shown, f"not on the dashboard: {set(types) - aside - shown}"


def every_rule_evaluates(setup):
    def evaluated():
        with urllib.request.urlopen(f"{setup.prometheus_url}/api/v1/rules", timeout=10) as answer:
            setup.rules = [rule for group in json.load(answer)["data"]["groups"] for rule in group["rules"]]
        return all(rule["health"] != "unknown" for rule in setup.rules)

    wait_for("the first evaluation", evaluated)
    source = yaml.safe_load((root / "deploy/helm/niwaki/files/rules.yaml").read_text())
    assert len(setup.rules) == sum(len(group["rules"]) for group in source["groups"])
    bad = [(rule["name"], rule.get("lastError")) for rule in setup.rules if rule["health"] != "ok"]
    assert not bad, bad
    empty = [rule["name"] for rule in setup.rules if rule["type"] == "recording" and not setup.query(rule["name"])]
    assert not empty, f"recorded nothing: {empty}"


def a_service_under_load_is_no_alarm(setup):
    firing = {alert["metric"]["alertname"] for alert in setup.query('ALERTS{alertname=~"Niwaki.*", alertstate="firing"}')}
    assert not firing, firing


def every_alert_is_tested_and_explained(setup):
    source = yaml.safe_load((root / "deploy/helm/niwaki/files/rules.yaml").read_text())
    alerts = {rule["alert"] for group in source["groups"] for rule in group["rules"] if "alert" in rule}
    tests = yaml.safe_load((root / "tests/deploy/rules_test.yaml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test.get("alert_rule_test", []) if case["exp_alerts"]}
    headings = set(re.findall(r"^### (Niwaki\w+)$", (root / "deploy/MONITORING.md").read_text(), re.M))
    assert fired == alerts, fired ^ alerts
    assert headings == alerts, headings ^ alerts


def requests_are_counted_as_the_client_counted_them(setup):
    """Exactly, by route and code."""
    for (path, code), count in setup.codes.items():
        counted = setup.value(f'sum(niwaki_requests_total{{route="{path}",code="{code}"}})')
        assert counted == count, f"{path} {code}: {counted}, the client saw {count}"
    total = setup.value('sum(niwaki_requests_total{route=~"/embed|/v1/embeddings"})')
    assert total == sum(setup.codes.values())
    refused = sum(count for (_, code), count in setup.codes.items() if code == 429)
    assert setup.value('sum(niwaki_rejected_total{reason=~"overload|memory"})') == refused
    empty = sum(count for (_, code), count in setup.codes.items() if code == 400)
    assert empty and setup.value('sum(niwaki_rejected_total{reason="validation"})') == empty
    print(f"        {dict(setup.codes)}")


def latency_is_what_the_client_saw(setup):
    count = setup.value('sum(niwaki_request_duration_seconds_count{route="/embed"})')
    assert count == len(setup.seconds)
    mean = setup.value('sum(niwaki_request_duration_seconds_sum{route="/embed"}) / sum(niwaki_request_duration_seconds_count{route="/embed"})')
    seen = statistics.fmean(setup.seconds)
    # The client's time holds the server's, and little more: a connection, and this program's turns at its interpreter.
    assert 0.3 * seen < mean <= seen, f"mean {mean:.6f} s, the client's {seen:.6f} s"
    for quantile in [0.5, 0.9]:
        server = setup.value(f'histogram_quantile({quantile}, sum by (le) (niwaki_request_duration_seconds_bucket{{route="/embed"}}))')
        client = statistics.quantiles(setup.seconds, n=100)[int(quantile * 100) - 1]
        # Buckets double, and the client's threads take turns.
        assert (client - 0.01) / 8 < server < client * 2, f"quantile {quantile}: {server:.6f} s, the client's {client:.6f} s"
    for stage in ["tokenize", "queue", "infer", "serialize"]:
        assert setup.value(f'sum(niwaki_stage_duration_seconds_sum{{stage="{stage}"}})') > 0, stage
    stages = setup.value("sum(niwaki_stage_duration_seconds_sum)")
    requests = setup.value('sum(niwaki_request_duration_seconds_sum{route=~"/embed|/v1/embeddings"})')
    assert 0.5 * requests < stages <= requests * 1.01, f"stages {stages:.3f} s of {requests:.3f} s"


def tokens_and_batches_add_up(setup):
    batches = setup.value("sum(niwaki_batch_size_count)")
    sequences, inputs = setup.value("sum(niwaki_batch_size_sum)"), setup.value("sum(niwaki_input_tokens_count)")
    assert 0 < batches <= sequences == inputs, (batches, sequences, inputs)
    assert setup.value("sum(niwaki_batch_tokens_sum)") == setup.value("sum(niwaki_input_tokens_total)")
    assert setup.value("sum(niwaki_batch_padding_tokens_total)") == 0


def memory_is_what_the_kernel_says(setup):
    resident = setup.value("process_resident_memory_bytes")
    assert setup.value('niwaki_memory_bytes{kind="rss"}') / resident - 1 < 0.05
    if setup.server:
        status = pathlib.Path(f"/proc/{setup.server.process.pid}/status").read_text()
        kernel = int(re.search(r"VmRSS:\s+(\d+) kB", status)[1]) * 1024
        assert abs(resident / kernel - 1) < 0.05, f"{resident} by the metric, {kernel} by the kernel"
    kinds = {series["metric"]["kind"]: float(series["value"][1]) for series in setup.query("niwaki_memory_bytes")}
    assert all(value > 0 for value in kinds.values()), kinds
    assert kinds["weights"] + kinds["workspace"] + kinds["tokenizer"] <= kinds["allocator_allocated"] + kinds["model_file"]
    assert kinds["workspace_peak"] <= kinds["workspace"] and kinds["allocator_allocated"] <= kinds["allocator_resident"]
    print("        " + ", ".join(f"{kind} {value / 1e6:.1f} MB" for kind, value in kinds.items()))


def the_autoscaler_gets_its_metrics(setup):
    for rule in yaml.safe_load((root / "deploy/prometheus/adapter-values.yaml").read_text())["rules"]["custom"]:
        series = re.match(r"\w+", rule["seriesQuery"])[0]
        expression = rule["metricsQuery"]
        for name, value in [("<<.Series>>", series), ("<<.LabelMatchers>>", 'job=~".+"'), ("<<.GroupBy>>", "instance")]:
            expression = expression.replace(name, value)
        value = setup.value(expression.replace("[2m]", f"[{4 * setup.scrape}s]"))
        assert 0 <= value < 10, f"{rule['name']}: {value}"


def a_target_that_goes_is_noticed(setup):
    """Last: it ends the server."""
    assert setup.server.stop() == 0
    wait_for("up == 0", lambda: setup.value('up{job="niwaki"}') == 0)
    wait_for("the alert", lambda: setup.query('ALERTS{alertname="NiwakiTargetDown"}'))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--binary", default="target/release/niwaki")
    parser.add_argument("--url", help="a running niwaki that nobody else uses")
    parser.add_argument("--prometheus-url", help="a running Prometheus that scrapes it")
    arguments = parser.parse_args()
    if not arguments.url and not shutil.which("prometheus"):
        print("no program `prometheus`\n0 passed, 0 failed, 1 skipped")
        return 0
    checks = [every_rule_evaluates, every_panel_shows_something, the_variables_of_the_dashboard_have_values,
              a_service_under_load_is_no_alarm, requests_are_counted_as_the_client_counted_them,
              latency_is_what_the_client_saw, tokens_and_batches_add_up, memory_is_what_the_kernel_says,
              the_autoscaler_gets_its_metrics, panels_and_metrics_are_complete, every_alert_is_tested_and_explained]
    setup = Setup(arguments)
    failed = 0
    try:
        if setup.server:
            checks.append(a_target_that_goes_is_noticed)
        wait_for("the first scrape", lambda: setup.value('up{job="niwaki"}') == 1)
        # Panels are asked while the load lasts; sums when the last scrape has seen all of it.
        during = threading.Thread(target=setup.load, args=(8 * setup.scrape,))
        during.start()
        time.sleep(7 * setup.scrape)
        for function in checks:
            if function is requests_are_counted_as_the_client_counted_them:
                during.join()
                time.sleep(2.5 * setup.scrape)
            try:
                function(setup)
                print(f"ok      {function.__name__}")
            except Exception:
                failed += 1
                print(f"FAILED  {function.__name__}\n{traceback.format_exc()}")
    finally:
        setup.stop()
    print(f"{len(checks) - failed} passed, {failed} failed, 0 skipped")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
