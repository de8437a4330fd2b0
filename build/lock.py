"""The lock: which version of every package the launcher installs, for every system and Python.

    python build/lock.py renew [NAME==VERSION ...]    the newest that pyproject.toml allows
    python build/lock.py test lowest|newest [...]     the tests in an environment of such versions

`uv.lock` holds one resolution for all extras, Pythons and systems; build/lock/*.txt are its parts
with hashes, which any pip or uv can read. They hold no addresses, so that mirrors serve as well.
torch and its CUDA stand apart, since the launcher may take torch from another index.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from environment import asked_for, numbers, parsed, plain, python_of

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "build" / "lock"
# torch, and the parts of CUDA that only PyPI's build comes with
TORCH = re.compile(r"torch==|torchvision==|triton==|cuda-|nvidia-(?!ml-py==)")
HEADER = """\
# Made from uv.lock by build/lock.py; not to be edited. For the requirements with the digest
# {digest}.
# Installed by the launcher, or by hand:
# pip install --require-hashes --no-deps -r build/lock/build.txt -r build/lock/base.txt
# pip install --require-hashes --no-deps -r build/lock/torch.txt
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
    base, test, app = (_blocks(_export(*more)) for more in
                       ((), ("--extra", "test"), ("--extra", "app")))
    found = {"base": [one for one in base if not TORCH.match(one)],
             "torch": [one for one in base if TORCH.match(one)],
             "test": [one for one in test if not TORCH.match(one)],
             "app": [one for one in app if not TORCH.match(one)],
             "build": _blocks(_export("--only-group", "build"))}
    header = HEADER.format(digest=asked_for(ROOT))
    return {name: header + "".join(blocks) for name, blocks in found.items()}


def _export(*more: str) -> str:
    return _uv("export", "--quiet", "--frozen", "--no-emit-project", "--no-header",
               "--no-annotate", "--format", "requirements-txt", *more)


def _blocks(requirements: str) -> list[str]:
    """'name==1.0 ; marker', followed by its hashes, each."""
    return re.findall(r"^\S.*\n(?:[ ].*\n)*", requirements, re.MULTILINE)


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
    folders = [os.path.dirname(sys.executable), str(python_of(ROOT / ".venv").parent)]
    beside = shutil.which("uv", path=os.pathsep.join(folders)) or shutil.which("uv")
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
