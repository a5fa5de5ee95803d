"""The image, run: what it holds, that it needs nothing, its limits, its end, its place behind a load balancer.

Needs a Docker engine and the image (see container.sh). Clients speak to 127.0.0.1 only.
The last line is `N passed, N failed, N skipped`.
"""

import argparse
import collections
import hashlib
import http.client
import http.server
import json
import os
import pathlib
import shutil
import socket
import ssl
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import traceback
import zlib

root = pathlib.Path(__file__).resolve().parents[2]
checks = []
image = None
LOCKED = ["--read-only", "--cap-drop", "ALL", "--security-opt", "no-new-privileges"]


class Skip(Exception):
    """A check that cannot run here, and why."""


def check(function):
    checks.append(function)
    return function


def docker(*arguments, fails=False, **options):
    result = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=180, **options)
    assert fails == (result.returncode != 0), f"docker {' '.join(arguments)}: {result.returncode} {result.stdout} {result.stderr}"
    return (result.stderr if fails else result.stdout).strip()


def inspect(name, template):
    return json.loads(docker("inspect", "--format", "{{json " + template + "}}", name))


class Container:
    """`docker run -d`, removed at the end."""

    def __init__(self, *options, of=None, command=(), name=None):
        if name:
            subprocess.run(["docker", "rm", "-f", name], capture_output=True)
        self.id = docker("run", "-d", *(["--name", name] if name else []), *options, of or image, *command)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        subprocess.run(["docker", "rm", "-f", "-v", self.id], capture_output=True)

    def port(self, inside=3000):
        return int(docker("port", self.id, str(inside)).split("\n")[0].rsplit(":", 1)[1])

    def logs(self):
        result = subprocess.run(["docker", "logs", self.id], capture_output=True, text=True)
        return result.stdout + result.stderr

    def healthy(self, seconds=30):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            state = inspect(self.id, ".State")
            if state["Health"]["Status"] == "healthy":
                return self
            assert state["Running"], f"ended with {state['ExitCode']}:\n{self.logs()}"
            time.sleep(0.2)
        raise AssertionError(f"not healthy within {seconds} s:\n{self.logs()}")


def ask(port, method, path, body=None, timeout=40, pause=0):
    """`pause` is the time between the head and the body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=timeout)
    try:
        data = json.dumps(body).encode() if body else b""
        connection.request(method, path, headers={"content-type": "application/json", "content-length": str(len(data))})
        time.sleep(pause)
        connection.send(data)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def metrics(port):
    lines = [line for line in ask(port, "GET", "/metrics")[1].decode().splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


class Load:
    """Clients that send one request after another, each on a connection of its own, until stopped. The first half of them
    sends the body `pause` after the head."""

    def __init__(self, port, n_clients, body=None, pause=0):
        self.port, self.body = port, body or {"inputs": "a garden tree stays small because somebody prunes it"}
        self.outcomes, self.lock, self.stopped = collections.Counter(), threading.Lock(), threading.Event()
        pauses = [pause if index < n_clients / 2 else 0 for index in range(n_clients)]
        self.threads = [threading.Thread(target=self.run, args=(pause,)) for pause in pauses]

    def run(self, pause):
        while not self.stopped.is_set():
            try:
                status, data = ask(self.port, "POST", "/embed", self.body, pause=pause)
                outcome = status if status != 200 or data.startswith(b"[[") else "200 without rows"
            except OSError as error:  # refused, reset
                outcome = type(error).__name__
                time.sleep(0.02)
            except http.client.HTTPException as error:  # ended in the middle
                outcome = type(error).__name__
            with self.lock:
                self.outcomes[outcome] += 1

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.stopped.set()
        for thread in self.threads:
            thread.join()

    def wait(self, n_more):
        """Until that many more requests have been answered."""
        goal, end = self.outcomes[200] + n_more, time.monotonic() + 60
        while self.outcomes[200] < goal:
            assert time.monotonic() < end, f"no progress: {self.outcomes}"
            time.sleep(0.02)


# ------------------------------------------------------------------------------------------------------------- image


@check
def the_image_is_small_and_says_what_it_is():
    config = inspect(image, ".Config")
    size = inspect(image, ".Size")
    # A registry keeps and sends layers compressed. Of what is unpacked, the model is 21 MB as it is mapped into memory.
    saving, packer = subprocess.Popen(["docker", "save", image], stdout=subprocess.PIPE), zlib.compressobj(6)
    packed = sum(len(packer.compress(chunk)) for chunk in iter(lambda: saving.stdout.read(1 << 20), b"")) + len(packer.flush())
    assert saving.wait() == 0 and packed < 40e6, f"{packed / 1e6:.1f} MB compressed"
    assert size < 60e6, f"{size / 1e6:.1f} MB"
    assert config["User"] == "65532:65532" and config["StopSignal"] == "SIGTERM"
    assert config["Healthcheck"]["Test"] == ["CMD", "/niwaki", "health"]
    assert config["Entrypoint"] == ["/niwaki"] and config["Cmd"] == ["serve"]
    for label in ["title", "description", "licenses", "version", "revision", "created"]:
        assert config["Labels"][f"org.opencontainers.image.{label}"], label
    print(f"        {packed / 1e6:.1f} MB compressed, {size / 1e6:.1f} MB unpacked")


@check
def nothing_but_niwaki_is_in_it():
    container = docker("create", image)
    try:
        with tempfile.TemporaryFile() as file:
            subprocess.run(["docker", "export", container], stdout=file, check=True)
            file.seek(0)
            members = {member.name.rstrip("/"): member for member in tarfile.open(fileobj=file)}
    finally:
        docker("rm", container)
    # The engine itself adds some of these to every container.
    added = {".dockerenv", "dev", "dev/console", "dev/pts", "dev/shm", "etc/hostname", "etc/hosts", "etc/mtab", "etc/resolv.conf", "proc", "sys"}
    expected = {"niwaki", "LICENSE", "data", "etc", "etc/ssl", "etc/ssl/certs", "etc/ssl/certs/ca-certificates.crt"}
    assert set(members) - added == expected, set(members) - added
    assert (members["data"].uid, members["data"].gid) == (65532, 65532), "a volume takes its owner from here"
    assert members["niwaki"].uid == 0 and members["niwaki"].mode & 0o022 == 0
    message = docker("run", "--rm", "--entrypoint", "/bin/sh", image, "-c", "true", fails=True)
    assert "no such file" in message, message


@check
def it_serves_locked_down_and_within_its_limits():
    """Read-only, no capabilities, 120 MB, one CPU of however many there are."""
    limits = ["--memory", "120m", "--memory-swap", "120m", "--cpus", "1"]
    with Container(*LOCKED, *limits, "-p", "127.0.0.1::3000") as container:
        container.healthy(20)
        port = container.port()
        status, body = ask(port, "POST", "/embed", {"inputs": "A niwaki is a garden tree shaped by pruning."})
        assert status == 200 and len(json.loads(body)[0]) == 384
        now = metrics(port)
        assert now["niwaki_threads"] == 1, "computing threads follow the quota"
        assert now["niwaki_cgroup_memory_limit_bytes"] == 120 * 2**20
        users = docker("top", container.id, "-eo", "pid,uid").split("\n")[1:]
        assert {user.split()[1] for user in users} == {"65532"}, users
        docker("exec", container.id, "/niwaki", "health")
        # Texts of the greatest length, more of them than the queue takes: refused by bytes and tokens, not by the kernel.
        with Load(port, 16, {"inputs": ["pruning a tree " * 400] * 32}) as load:
            time.sleep(15)
        state = inspect(container.id, ".State")
        assert state["Running"] and not state["OOMKilled"] and inspect(container.id, ".RestartCount") == 0
        assert set(load.outcomes) <= {200, 429, 504} and load.outcomes[200], load.outcomes
        assert ask(port, "GET", "/health/ready")[0] == 200
        print(f"        under a flood of longest texts {dict(load.outcomes)}, resident {metrics(port)['process_resident_memory_bytes'] / 1e6:.1f} MB")


@check
def sigterm_ends_it_cleanly_under_load():
    """What was accepted is answered; what comes later gets 503 or finds the port closed; the exit code is 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # The host's network: a proxy in between would answer for a port that is closed.
    options = ["--network", "host", "-e", f"PORT={port}", "-e", "NIWAKI_HOSTNAME=127.0.0.1", *LOCKED]
    with Container(*options) as container:
        container.healthy()
        with Load(port, 12) as load:
            load.wait(50)
            began = time.monotonic()
            docker("stop", "-t", "40", container.id)
            took = time.monotonic() - began
        state = inspect(container.id, ".State")
        assert state["ExitCode"] == 0 and not state["OOMKilled"], f"{state}\n{container.logs()}"
        assert set(load.outcomes) <= {200, 503, "ConnectionRefusedError"}, load.outcomes
        assert took < 10, f"{took:.1f} s"
        print(f"        {dict(load.outcomes)}, stopped in {took:.2f} s")


@check
def a_wrong_flag_or_file_is_one_clear_line():
    for arguments in [["serve", "--model", "/nowhere"], ["serve", "--port", "seventy"]]:
        result = subprocess.run(["docker", "run", "--rm", *LOCKED, image, *arguments], capture_output=True, text=True, timeout=60)
        assert result.returncode == 2, result
        assert arguments[1] in result.stderr or arguments[2] in result.stderr, result.stderr
        assert "panicked" not in result.stderr


# ------------------------------------------------------------------------------------------------------ the network


class Network:
    def __init__(self, name):
        self.name = name
        subprocess.run(["docker", "network", "rm", name], capture_output=True)
        docker("network", "create", name)
        self.gateway = inspect(name, ".IPAM")["Config"][0]["Gateway"]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        subprocess.run(["docker", "network", "rm", self.name], capture_output=True)


def haproxy(network, config, *options):
    if subprocess.run(["docker", "image", "inspect", "niwaki-test/haproxy"], capture_output=True).returncode:
        raise Skip("no image of haproxy (base_images.sh haproxy)")
    return Container("--network", network.name, "-v", f"{config}:/haproxy.cfg:ro", *options, of="niwaki-test/haproxy", command=["-f", "/haproxy.cfg"])


@check
def a_rolling_restart_behind_a_load_balancer_loses_nothing():
    """Two replicas, each replaced twice under load."""
    with Network("niwaki-test-rolling") as network:

        def replica(letter):
            name = f"niwaki-{letter}"
            options = ["--network", network.name, *LOCKED, "--memory", "120m", "--cpus", "1", "--health-interval", "1s", "-p", "127.0.0.1::3000"]
            return Container(*options, name=name).healthy()

        replicas = {letter: replica(letter) for letter in "ab"}
        config = root / "deploy/haproxy/haproxy.cfg"
        try:
            with haproxy(network, config, "-p", "127.0.0.1::8080") as balancer:
                port = balancer.port(8080)
                wait_until_ready(port, balancer)
                with Load(port, 8, pause=0.003) as load:
                    load.wait(100)
                    for letter in "abab":
                        docker("stop", "-t", "40", replicas[letter].id)
                        assert inspect(replicas[letter].id, ".State")["ExitCode"] == 0, replicas[letter].logs()
                        load.wait(50)
                        replicas[letter] = replica(letter)
                        # The balancer has to have found it before the other one goes.
                        before = served(replicas[letter])
                        end = time.monotonic() + 30
                        while served(replicas[letter]) <= before + 5:
                            assert time.monotonic() < end, f"{letter} gets no requests\n{balancer.logs()}"
                            time.sleep(0.2)
                        load.wait(50)
                assert set(load.outcomes) == {200}, f"{load.outcomes}\n{balancer.logs()}"
                print(f"        {load.outcomes[200]} requests, four replacements, none lost or refused")
        finally:
            for container in replicas.values():
                container.__exit__()


def served(container):
    """Requests that a replica has answered."""
    series = [value for name, value in metrics(container.port()).items() if name == 'niwaki_requests_total{code="200",route="/embed"}']
    return series[0]


def wait_until_ready(port, container):
    end = time.monotonic() + 30
    while time.monotonic() < end:
        try:
            if ask(port, "GET", "/health/ready")[0] == 200:
                return
        except (OSError, http.client.HTTPException):
            pass
        time.sleep(0.2)
    raise AssertionError(container.logs())


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def hub(directory):
    """The parts of the Hugging Face hub's API that a download needs, for the model `org/tiny` in `directory`."""
    files = {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}

    class Handler(http.server.BaseHTTPRequestHandler):
        def answer(self, with_body):
            headers, content = {}, None
            if self.path == "/api/models/org/tiny/revision/main":
                content = json.dumps({"sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}).encode()
            else:
                content = files.get(self.path.removeprefix(f"/org/tiny/resolve/{COMMIT}/"))
                if content is not None:
                    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                    headers = {"ETag": f'"{blob}"', "X-Repo-Commit": COMMIT}
            self.send_response(404 if content is None else 200)
            for key, value in {**headers, "Content-Length": len(content or b"")}.items():
                self.send_header(key, str(value))
            self.end_headers()
            if with_body:
                self.wfile.write(content or b"")

        def do_GET(self):
            self.answer(True)

        def do_HEAD(self):
            self.answer(False)

        def log_message(self, *_):
            pass

    return Handler


@check
def a_model_is_downloaded_over_tls_by_name():
    """A static binary on an empty base still resolves names through the network's DNS and checks certificates."""
    if not shutil.which("openssl"):
        raise Skip("no program `openssl`")
    with tempfile.TemporaryDirectory() as directory, Network("niwaki-test-hub") as network:
        path = pathlib.Path(directory)
        path.chmod(0o755)
        subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2",
                        "-subj", "/CN=hub.test", "-addext", "subjectAltName=DNS:hub.test",
                        "-addext", "basicConstraints=critical,CA:FALSE", "-keyout", path / "key.pem", "-out", path / "cert.pem"],
                       check=True, capture_output=True)
        server = http.server.ThreadingHTTPServer((network.gateway, 0), hub(root / "tests/golden/bert"))
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(path / "cert.pem", path / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # `hub.test` is a container's name, so Docker's DNS server knows it; bytes go on to the server above.
        (path / "haproxy.cfg").write_text(
            "defaults\n mode tcp\n timeout connect 5s\n timeout client 30s\n timeout server 30s\n"
            f"listen hub\n bind :443\n server hub {network.gateway}:{server.server_address[1]}\n"
        )
        try:
            with haproxy(network, path / "haproxy.cfg", "--network-alias", "hub.test", "--sysctl", "net.ipv4.ip_unprivileged_port_start=0"):
                options = ["--network", network.name, *LOCKED, "-e", "HF_ENDPOINT=https://hub.test", "-p", "127.0.0.1::3000"]
                trusted = ["-v", f"{path}/cert.pem:/etc/ssl/certs/ca-certificates.crt:ro"]
                command = ["serve", "--model-id", "org/tiny"]
                with Container(*options, *trusted, "-v", "/data", command=command) as container:
                    port = container.healthy().port()
                    status, body = ask(port, "POST", "/embed", {"inputs": [[2, 5, 6, 3]]})
                    assert status == 200 and json.loads(body)[0], body
                    assert json.loads(ask(port, "GET", "/info")[1])["model_id"] == "org/tiny"
                # The authorities that the image has do not vouch for it.
                with Container(*options, "-v", "/data", command=command) as container:
                    assert docker("wait", container.id) == "2"
                    assert "certificate" in container.logs().lower(), container.logs()
                # A root file system that is read-only, and no volume.
                with Container(*options, *trusted, command=command) as container:
                    assert docker("wait", container.id) == "2"
                    assert "/data" in container.logs(), container.logs()
        finally:
            server.shutdown()


@check
def compose_starts_niwaki_and_prometheus():
    """The unmodified file; every query of the dashboard and every rule is asked of the Prometheus in its container."""
    compose = ["docker-compose"] if shutil.which("docker-compose") else ["docker", "compose"]
    if subprocess.run([*compose, "version"], capture_output=True).returncode:
        raise Skip("no docker-compose")
    # Provisioning and mounts name the same places.
    file = root / "deploy/docker-compose.yml"
    text = file.read_text()
    assert "path: /var/lib/grafana/dashboards" in (root / "deploy/grafana/provisioning/dashboards/niwaki.yml").read_text()
    assert "dashboard.json:/var/lib/grafana/dashboards/" in text and "provisioning:/etc/grafana/provisioning" in text
    prometheus = next(line.split()[1] for line in text.splitlines() if "image: " in line and "prometheus" in line)
    if subprocess.run(["docker", "image", "inspect", prometheus], capture_output=True).returncode:
        raise Skip(f"no image {prometheus} (base_images.sh prometheus)")
    command = [*compose, "-f", file, "-p", "niwaki-test"]
    try:
        result = subprocess.run([*command, "up", "-d", "--no-build", "niwaki", "prometheus"], capture_output=True, text=True, timeout=120)
        assert result.returncode == 0, result.stderr
        arguments = ["--url", "http://127.0.0.1:3000", "--prometheus-url", "http://127.0.0.1:9090"]
        result = subprocess.run([sys.executable, root / "tests/deploy/monitoring.py", *arguments], capture_output=True, text=True, timeout=240)
        assert result.returncode == 0, result.stdout + result.stderr
        print("        " + result.stdout.strip().split("\n")[-1])
    finally:
        subprocess.run([*command, "down", "-v", "-t", "40"], capture_output=True, timeout=120)


def main():
    global image
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--image", required=True)
    parser.add_argument("--only", help="part of a check's name")
    arguments = parser.parse_args()
    image = arguments.image
    os.environ.pop("DOCKER_DEFAULT_PLATFORM", None)
    count = collections.Counter()
    for function in checks:
        if arguments.only and arguments.only not in function.__name__:
            continue
        began = time.monotonic()
        try:
            function()
            outcome = "ok"
        except Skip as reason:
            outcome = "skipped"
            print(f"        {reason}")
        except Exception:
            outcome = "FAILED"
            print(traceback.format_exc())
        count[outcome] += 1
        print(f"{outcome:7} {function.__name__} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{count['ok']} passed, {count['FAILED']} failed, {count['skipped']} skipped")
    return count["FAILED"] > 0


if __name__ == "__main__":
    sys.exit(main())
