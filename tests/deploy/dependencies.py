"""Licences, duplicates and sources of the dependencies, by the lists of .ci/deny.toml, from `cargo metadata` alone.

It does not know the advisories of RustSec: their database is a repository of its own, which `cargo deny check advisories`
fetches. The last line is `N passed, N failed, N skipped`.
"""

import collections
import json
import pathlib
import re
import subprocess
import sys
import tomllib

root = pathlib.Path(__file__).resolve().parents[2]


def permits(expression, allowed):
    """Whether a licence expression of SPDX (or its older form with slashes) leaves a choice that is allowed."""
    words = re.findall(r"\(|\)|[^\s()/]+|/", expression)

    def term():
        word = words.pop(0)
        if word == "(":
            inside = either()
            assert words.pop(0) == ")", expression
            return inside
        if words[:1] == ["WITH"]:
            word = f"{word} {words.pop(0)} {words.pop(0)}"
        return word in allowed

    def both():
        result = term()
        while words[:1] == ["AND"]:
            words.pop(0)
            result &= term()
        return result

    def either():
        result = both()
        while words[:1] in (["OR"], ["/"]):
            words.pop(0)
            result |= both()
        return result

    result = either()
    assert not words, f"{expression} cannot be read"
    return result


def shipped(target):
    """Packages that a build for `target` uses, by name and version."""
    command = ["cargo", "metadata", "--locked", "--format-version", "1", "--filter-platform", target]
    data = json.loads(subprocess.run(command, cwd=root, capture_output=True, check=True, text=True).stdout)
    nodes = {node["id"]: node for node in data["resolve"]["nodes"]}
    packages = {package["id"]: package for package in data["packages"]}
    found, todo = set(), [data["resolve"]["root"]]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            todo += [to["pkg"] for to in nodes[name]["deps"]]
    return {(packages[name]["name"], packages[name]["version"]): packages[name] for name in found}


def main():
    lists = tomllib.loads((root / ".ci/deny.toml").read_text())
    allowed = set(lists["licenses"]["allow"])
    assert permits("(MIT OR X) AND Apache-2.0", {"MIT", "Apache-2.0"}) and not permits("MIT AND X", {"MIT"}), "itself"
    assert permits("X/MIT", {"MIT"}) and not permits("GPL-3.0 OR X WITH Y", {"MIT", "X"}), "itself"
    packages = {}
    for target in lists["graph"]["targets"]:
        packages |= shipped(target)
    versions, wrong = collections.defaultdict(set), {"licences": [], "duplicates": [], "sources": []}
    for (name, version), package in sorted(packages.items()):
        versions[name].add(version)
        if not package["license"] or not permits(package["license"], allowed):
            wrong["licences"].append(f"{name} {version}: {package['license']}")
        if package["source"] not in (None, "registry+https://github.com/rust-lang/crates.io-index"):
            wrong["sources"].append(f"{name} {version}: {package['source']}")
    known = {skip["name"] for skip in lists["bans"]["skip"]}
    wrong["duplicates"] += [f"{name}: {', '.join(sorted(found))}" for name, found in versions.items() if len(found) > 1 and name not in known]
    for kind, found in wrong.items():
        print(f"{'FAILED' if found else 'ok':7} {kind} of {len(packages)} packages", *found, sep="\n        ")
    failed = sum(bool(found) for found in wrong.values())
    print(f"{3 - failed} passed, {failed} failed, 0 skipped")
    return failed > 0


if __name__ == "__main__":
    sys.exit(main())
