#!/usr/bin/env python3
"""What .ci/manifests asks of the YAML in k8s/ that no schema knows. Needs PyYAML. Each prints what is wrong, and exits 1.

    manifests.py numbers RENDERED...         sums of the timeline, hooks, ports, probes, selectors, versions
    manifests.py comments SOURCE...          every field of a Pod's spec has its reason beside or above it
    manifests.py alike SIDECAR PLAIN         both containers are the same, but for what makes them what they are
    manifests.py monitoring RENDERED DIR     rules, their tests and the dashboard in DIR ask for what there is; PodMonitor finds the
                                             Pods in RENDERED. For promtool it writes rules.plain.yaml and, from what the dashboard asks,
                                             dashboard.plain.yaml into DIR
    manifests.py versions                    the Dockerfile has the version of Cargo.toml
    manifests.py proxy-toml RENDERED FILE    writes the ConfigMap's proxy.toml to FILE
    manifests.py metrics BINARY FILE         writes what /metrics of a running BINARY says to FILE, in the older format that promtool reads
"""

import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.request

import yaml

try:
    import tomllib
except ModuleNotFoundError:  # before Python 3.11; pip brings a copy
    from pip._vendor import tomli as tomllib

LABEL = "tidegate.dev/inject"
# What is left for the kubelet's own steps, in seconds; src/config/checks.rs has the same.
KUBELET = 5

with open("proxy.toml", "rb") as file:
    DEFAULTS = tomllib.load(file)
with open("Cargo.toml", "rb") as file:
    VERSION = tomllib.load(file)["package"]["version"]


def load(path):
    with open(path) as file:
        return [document for document in yaml.safe_load_all(file) if document]


def is_injected(document):
    return document["metadata"].get("labels", {}).get(LABEL) == "true"


def proxy_toml(documents, pod):
    volume = next(volume for volume in pod["volumes"] if volume["name"] == "tidegate-config")
    name = volume["configMap"]["name"]
    maps = (d for d in documents if d["kind"] == "ConfigMap" and d["metadata"]["name"] == name)
    return next(maps)["data"]["proxy.toml"]


class Settings:
    """What is written, over the defaults."""

    def __init__(self, text):
        self.written = tomllib.loads(text)

    def __getitem__(self, name):
        section, key = name.split(".")
        return self.written.get(section, {}).get(key, DEFAULTS[section][key])

    def seconds(self, name):
        number, unit = re.fullmatch(r"(\d+)(ms|s|m|h)", self[name]).groups()
        return int(number) * {"ms": 0.001, "s": 1, "m": 60, "h": 3600}[unit]

    def port(self, name):
        """The port of an address that other hosts must reach, or None."""
        host, port = self[name].rsplit(":", 1)
        return int(port) if host == "0.0.0.0" else None

    def unknown(self):
        return [f"{s}.{k}" for s, keys in self.written.items() for k in keys if k not in DEFAULTS.get(s, {})]


def waits(handler, admin):
    """Whether a preStop handler lasts as long as there are clients."""
    if "httpGet" in handler:
        get = handler["httpGet"]
        return get == {"path": "/drain/wait", "port": admin}
    return f":{admin}/drain/wait" in " ".join(handler.get("exec", {}).get("command", []))


def numbers(path):
    documents = load(path)
    wrong = []

    def expect(true, text):
        if not true:
            wrong.append(f"{path}: {text}")

    deployments = [d for d in documents if d["kind"] == "Deployment"]
    injected = [d for d in deployments if is_injected(d)]
    expect(injected, f"no Deployment has the label {LABEL}")
    for deployment in deployments:
        name = deployment["metadata"]["name"]
        pod = deployment["spec"]["template"]["spec"]
        inits, mains = pod.get("initContainers", []), pod["containers"]
        for container in inits + mains:
            for hook, handler in container.get("lifecycle", {}).items():
                text = f"{name}: the {hook} hook of {container['name']} has more than one handler: {', '.join(handler)}"
                expect(len(handler) == 1, text)
        found = [c for c in inits + mains if c["name"] == "tidegate"]
        expect(bool(found) == is_injected(deployment), f"{name}: tidegate and the label do not go together")
        if not found:
            continue
        (tidegate,) = found
        others = [c for c in mains if c is not tidegate]
        settings = Settings(proxy_toml(documents, pod))
        for key in settings.unknown():
            expect(False, f"{name}: proxy.toml has no {key}")

        listen, admin = settings.port("listen.address"), settings.port("admin.address")
        ports = {p["name"]: p["containerPort"] for p in tidegate["ports"]}
        expected = {"tidegate": listen, "tidegate-admin": admin}
        expect(ports == expected, f"{name}: the container has {ports}, proxy.toml {expected}")
        for probe, where in (("startup", "/livez"), ("readiness", "/readyz"), ("liveness", "/livez")):
            get = tidegate[f"{probe}Probe"]["httpGet"]
            expect(get == {"path": where, "port": "tidegate-admin"}, f"{name}: the {probe} probe asks {get}")
        for container in others:
            for port in container.get("ports", []):
                text = f"{name}: {container['name']} has the port {port['containerPort']}, and so has tidegate"
                expect(port["containerPort"] not in ports.values(), text)
            expect(container.get("name") != "tidegate", f"{name}: two containers are called tidegate")

        hooks = [c.get("lifecycle", {}).get("preStop", {}) for c in others]
        expect(any(waits(h, admin) for h in hooks), f"{name}: no main container waits for the end of the drain")
        for container, hook in zip(others, hooks):
            text = f"{name}: the hook of {container['name']} asks {hook.get('httpGet')}"
            expect("httpGet" not in hook or waits(hook, admin), text)
        if tidegate in inits:
            expect(tidegate.get("restartPolicy") == "Always", f"{name}: tidegate is an init container, not a sidecar")
            begin = tidegate.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command")
            text = f"{name}: the sidecar's SIGTERM comes last, and its hook does not begin the drain"
            expect(begin == ["/tidegate", "drain", "--no-wait"], text)
        else:
            expect("lifecycle" not in tidegate, f"{name}: a hook would delay the SIGTERM that begins the drain")

        drain = sum(settings.seconds(f"drain.{key}") for key in ("delay", "window", "timeout"))
        grace, stop = pod["terminationGracePeriodSeconds"], settings.seconds("drain.backend_stop")
        text = f"the drain may take {drain} s, the containers {stop} s to stop, and {KUBELET} s are the kubelet's"
        expect(grace >= drain + stop + KUBELET, f"{name}: the grace period is {grace} s, but {text}")
        said = settings["drain.grace_period"]
        expect(said == f"{grace}s", f"{name}: the grace period is {grace} s, and drain.grace_period {said}")

        image, tag = tidegate["image"].rsplit(":", 1)
        expect(tag == VERSION, f"{name}: the image is {tidegate['image']}, the version {VERSION}")
        expect(image.endswith("tidegate"), f"{name}: the image is {tidegate['image']}")

        labels = deployment["spec"]["template"]["metadata"]["labels"]
        expect(labels.get("tidegate.dev/sidecar") == "true", f"{name}: the Pods have no label tidegate.dev/sidecar")
        expect(deployment["spec"]["selector"]["matchLabels"].items() <= labels.items(), f"{name}: does not select its Pods")
        for other in documents:
            spec, kind = other.get("spec", {}), other["kind"]
            if kind == "Service" and spec["selector"].items() <= labels.items():
                targets = [p.get("targetPort", p["port"]) for p in spec["ports"]]
                expect(targets[0] == listen, f"Service {other['metadata']['name']}: leads to {targets[0]}, not to {listen}")
                expect(admin not in targets, f"Service {other['metadata']['name']}: carries the admin listener")
            if kind == "HorizontalPodAutoscaler":
                expect(spec["scaleTargetRef"]["name"] == name, f"the autoscaler is for {spec['scaleTargetRef']['name']}")
            if kind == "NetworkPolicy":
                open_ports = {p["port"] for rule in spec["ingress"] for p in rule["ports"]}
                expect(open_ports == {listen, admin}, f"the NetworkPolicy admits {open_ports}")
            selector = spec.get("selector", {}) if kind == "PodDisruptionBudget" else spec.get("podSelector", {})
            if kind in ("PodDisruptionBudget", "NetworkPolicy"):
                expect(selector["matchLabels"].items() <= labels.items(), f"the {kind} does not select the Pods of {name}")
    return wrong


def comments(path):
    with open(path) as file:
        text = file.read()
    lines = text.splitlines()
    wrong = []

    def is_said(line):
        return bool(re.search(r"(^|\s)# \S", lines[line])) or lines[line - 1].lstrip().startswith("# ")

    def look(node, trail):
        if isinstance(node, yaml.SequenceNode):
            for item in node.value:
                if isinstance(item, yaml.MappingNode) and not item.flow_style:
                    look(item, trail)
                elif not is_said(item.start_mark.line):
                    wrong.append(f"{path}:{item.start_mark.line + 1}: no reason is given for an item of {trail}")
            return
        for index, (key, value) in enumerate(node.value):
            name = f"{trail}.{key.value}" if trail else key.value
            if not isinstance(value, yaml.ScalarNode) and not value.flow_style:
                look(value, name)
            elif key.value == "name" and index == 0:
                continue  # what it is called needs no reason
            elif not is_said(key.start_mark.line):
                wrong.append(f"{path}:{key.start_mark.line + 1}: no reason is given for {name}")

    def child(node, name):
        return next((v for k, v in node.value if k.value == name), None) if node else None

    for document in yaml.compose_all(text):
        node = document
        for name in ("spec", "template", "spec"):
            node = child(node, name)
        if child(document, "kind").value == "LifecycleHandler":
            node = child(document, "httpGet")
        if node is not None:
            look(node, "")
    return wrong


def alike(sidecar, plain):
    def container(path, where):
        (document,) = load(path)
        (container,) = document["spec"]["template"]["spec"][where]
        return container

    one, other = container(sidecar, "initContainers"), container(plain, "containers")
    for key in ("restartPolicy", "lifecycle"):
        del one[key]
    return [
        f"{key} is {one.get(key)} in {sidecar}, {other.get(key)} in {plain}"
        for key in sorted({*one, *other})
        if one.get(key) != other.get(key)
    ]


def monitoring(rendered, folder):
    folder = pathlib.Path(folder)
    (rules,) = load(folder / "rules.yaml")
    (tests,) = load(folder / "rules.test.yaml")
    (monitor,) = load(folder / "podmonitor.yaml")
    dashboard = json.loads((folder / "dashboard.json").read_text())
    (folder / "rules.plain.yaml").write_text(yaml.safe_dump(rules["spec"], sort_keys=False))
    wrong = []

    # Every metric and every value of a label is a string of the source.
    known = "".join(path.read_text() for path in [pathlib.Path("src/metrics.rs"), *pathlib.Path("src/metrics").glob("*.rs")])
    source = "".join(path.read_text() for path in pathlib.Path("src").rglob("*.rs"))
    texts = {"rules.yaml": yaml.safe_dump(rules), "rules.test.yaml": yaml.safe_dump(tests), "dashboard.json": json.dumps(dashboard)}
    for file, text in texts.items():
        for metric in sorted(set(re.findall(r"\btidegate_(\w+)", text))):
            base = re.sub(r"_(total|bucket|count|sum)$", "", metric)
            if not any(f'"{name}"' in known for name in (metric, base, base.removesuffix("_seconds"))):
                wrong.append(f"{file}: there is no metric tidegate_{metric}")
        for label, values in re.findall(r'(\w+)!?=~?\\*"([\w|]+)\\*"', text):
            if label in ("namespace", "pod", "worker", "le"):
                continue
            for value in values.split("|"):
                if f'"{value}"' not in source:
                    wrong.append(f"{file}: there is no {label} {value}")

    alerts = {rule.get("alert", rule.get("record")) for group in rules["spec"]["groups"] for rule in group["rules"]}
    tested = {case["alertname"] for test in tests["tests"] for case in test["alert_rule_test"] if case.get("exp_alerts")}
    tested |= {case["expr"] for test in tests["tests"] for case in test.get("promql_expr_test", [])}
    wrong += [f"rules.test.yaml: {name} is never seen to fire" for name in sorted(alerts - tested)]

    asked = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    asked = [expr.replace("$__rate_interval", "5m") for expr in asked]
    as_rules = [{"record": f"panel:{number}", "expr": expr} for number, expr in enumerate(asked)]
    plain = {"groups": [{"name": "dashboard", "rules": as_rules}]}
    (folder / "dashboard.plain.yaml").write_text(yaml.safe_dump(plain))

    ids = [panel["id"] for panel in dashboard["panels"]]
    if len(set(ids)) != len(ids):
        wrong.append("dashboard.json: two panels have the same id")
    sources = {text for text in re.findall(r'"uid": "([^"]*)"', json.dumps([dashboard["panels"], dashboard["templating"]]))}
    if sources != {"${datasource}"}:
        wrong.append(f"dashboard.json: it names data sources: {sources}")

    # The schema of the CRD is not at hand, and what is not in it would be dropped by the API server without a word.
    fields = {"spec": {"namespaceSelector", "selector", "podMetricsEndpoints"}, "endpoint": {"port", "path", "interval", "scrapeTimeout"}}
    wrong += [f"podmonitor.yaml: unknown: {key}" for key in monitor["spec"].keys() - fields["spec"]]
    pods = [d["spec"]["template"] for d in load(rendered) if d["kind"] == "Deployment"]
    for endpoint in monitor["spec"]["podMetricsEndpoints"]:
        wrong += [f"podmonitor.yaml: unknown: {key}" for key in endpoint.keys() - fields["endpoint"]]
        for pod in pods:
            containers = pod["spec"].get("initContainers", []) + pod["spec"]["containers"]
            if endpoint["port"] not in [port["name"] for c in containers for port in c.get("ports", [])]:
                wrong.append(f"podmonitor.yaml: the Pods have no port {endpoint['port']}")
            if not monitor["spec"]["selector"]["matchLabels"].items() <= pod["metadata"]["labels"].items():
                wrong.append("podmonitor.yaml: it does not select the Pods")
    return wrong


def metrics(binary, file):
    env = {**os.environ, "TIDEGATE_ADMIN__ADDRESS": "127.0.0.1:0", "TIDEGATE_LOG__FORMAT": "json", "TIDEGATE_DRAIN__DELAY": "0s"}
    command = [binary, "run", "--listen", "127.0.0.1:0", "--upstream", "127.0.0.1:9"]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        try:
            lines = map(json.loads, process.stdout)
            address = next(line["address"] for line in lines if line.get("message") == "admin listening")
            with urllib.request.urlopen(f"http://{address}/metrics", timeout=10) as response:
                text = response.read().decode()
        finally:
            process.terminate()
            process.communicate()
    # There a counter's family has the name of its samples, and there is no info and no unit.
    kinds = dict(re.findall(r"^# TYPE (\S+) (counter|info)$", text, re.MULTILINE))
    suffix = {"counter": "_total", "info": "_info"}
    out = []
    for line in text.splitlines():
        if described := re.match(r"# (HELP|TYPE) (\S+)(.*)", line):
            word, name, rest = described.groups()
            line = f"# {word} {name}{suffix.get(kinds.get(name), '')}{rest.replace(' info', ' gauge') if word == 'TYPE' else rest}"
        if not line.startswith("# UNIT") and line != "# EOF":
            out.append(line)
    pathlib.Path(file).write_text("\n".join(out) + "\n")
    return []


def main(command, *paths):
    if command == "metrics":
        return metrics(*paths)
    if command == "alike":
        return alike(*paths)
    if command == "proxy-toml":
        rendered, file = paths
        documents = load(rendered)
        pod = next(d for d in documents if is_injected(d) and d["kind"] == "Deployment")["spec"]["template"]["spec"]
        with open(file, "w") as out:
            out.write(proxy_toml(documents, pod))
        return []
    if command == "monitoring":
        return monitoring(*paths)
    if command == "versions":
        with open("Dockerfile") as file:
            found = re.findall(r"^ARG VERSION=(.*)$", file.read(), re.MULTILINE)
        return [] if found and set(found) == {VERSION} else [f"the Dockerfile's VERSIONs are {found}, Cargo.toml's is {VERSION}"]
    return [text for path in paths for text in {"numbers": numbers, "comments": comments}[command](path)]


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    for text in found:
        print(text)
    sys.exit(bool(found))
