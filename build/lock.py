"""The lock: which version of every package the launcher installs, for every system and Python.

    python build/lock.py renew [NAME==VERSION ...]    the newest that pyproject.toml allows
    python build/lock.py test lowest|newest [...]     the tests in an environment of such versions

`uv.lock` holds one resolution for all extras, Pythons and systems; build/lock/*.txt are its parts
with hashes, which any pip or uv can read. They hold no addresses, so that mirrors serve as well.
torch and what only torch needs stand apart, since the launcher may take torch from another index.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from environment import numbers, parsed, plain, python_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "lock"
TORCH = ("torch", "torchvision")
HEADER = """\
# Made from uv.lock by build/lock.py; not to be edited. Installed by the launcher, or by hand:
# pip install --require-hashes --no-deps -r build/lock/base.txt -r build/lock/torch.txt
"""


def renew(held: list[str]) -> int:
    """Resolves anew; uv says what changed. `held`: exact versions, for example of a torch."""
    _uv("lock", "--upgrade", *(word for one in held for word in ("--upgrade-package", one)))
    FOLDER.mkdir(exist_ok=True)
    for name, text in parts().items():
        (FOLDER / f"{name}.txt").write_text(text, "utf-8", newline="\n")
    return 0


def parts() -> dict[str, str]:
    """The texts of build/lock/*.txt, exported from uv.lock as it is; no network is needed."""
    rest = [word for name in TORCH for word in ("--prune", name)]
    base = _export(*rest)
    all_ = {block.split("==")[0]: block for block in _blocks(_export())}
    for block in _blocks(base):
        all_.pop(block.split("==")[0])
    return {"base": HEADER + base, "torch": HEADER + "".join(all_.values()),
            "build": HEADER + _export("--only-group", "build"),
            **{extra: HEADER + _export("--extra", extra, *rest) for extra in ("test", "app")}}


def _export(*more: str) -> str:
    return _uv("export", "--quiet", "--frozen", "--no-emit-project", "--no-header",
               "--no-annotate", "--format", "requirements-txt", *more)


def _blocks(requirements: str) -> list[str]:
    """'name==1.0 ; marker', followed by its hashes, each; versions of one name together."""
    found: list[str] = []
    for line in requirements.splitlines(keepends=True):
        same = found and line.split("==")[0] == found[-1].split("==")[0]
        if line.startswith(" ") or same:
            found[-1] += line
        else:
            found.append(line)
    return found


def test(which: str, pytest_arguments: list[str]) -> int:
    """The tests with the lowest, or newest, versions that pyproject.toml allows."""
    venv = ROOT / f".venv-{which}"
    _uv("venv", "--quiet", "--clear", "--python", sys.executable, str(venv))
    resolution = "lowest-direct" if which == "lowest" else "highest"
    python = str(python_of(venv))
    _uv("pip", "install", "--quiet", "--python", python, "--resolution", resolution,
        "--upgrade", "-e", ".[test]")
    listed = _uv("pip", "list", "--quiet", "--python", python, "--format", "freeze")
    print(listed, flush=True)
    for line in bounds_out_of_reach(listed) if which == "lowest" else ():
        print(f"{line} in pyproject.toml: its lower bound can't be had beside the others")
        return 1
    return subprocess.run([python, "-m", "pytest", *pytest_arguments], cwd=ROOT).returncode


def bounds_out_of_reach(listed: str) -> list[str]:
    """Requirements of pyproject.toml that stand higher in `listed` (name==version lines)."""
    installed = {plain(name): version for name, _, version in
                 (line.partition("==") for line in listed.split())}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return [line for line in lines for name, limits in [parsed(line)]
            if ">=" not in dict(limits)
            or numbers(installed[plain(name)]) != dict(limits)[">="]]


def _uv(*arguments: str) -> str:
    beside = shutil.which("uv", path=os.path.dirname(sys.executable)) or shutil.which("uv")
    if not beside:
        raise SystemExit("uv is missing here: python3 launcher.py setup --test")
    done = subprocess.run([beside, *arguments], cwd=ROOT, stdout=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.returncode)
    return done.stdout.decode()


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    renewing = commands.add_parser("renew")
    renewing.add_argument("held", nargs="*", metavar="NAME==VERSION")
    testing = commands.add_parser("test")
    testing.add_argument("which", choices=("lowest", "newest"))
    options, rest = parser.parse_known_args(argv)
    if options.command == "test":
        return test(options.which, rest)
    if rest:
        parser.error(f"unknown: {' '.join(rest)}")
    return renew(options.held)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
