"""Makes the lock: the version of every package that the launcher installs, for all systems.

    python build/lock.py renew [NAME==VERSION ...]    the newest that pyproject.toml allows
    python build/lock.py test lowest|newest [...]     the tests in an environment of such versions

`uv.lock` holds one resolution for all extras, Pythons and systems; build/lock/*.txt are its parts
with hashes, which any pip or uv can read. They hold no addresses, so mirrors can be used. torch and
its CUDA have a file of their own, since the launcher may take torch from another index.
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
# torch, and the packages of CUDA, which only PyPI's build of torch needs.
TORCH = re.compile(r"torch==|torchvision==|triton==|cuda-|nvidia-(?!ml-py==)")
HEADER = """\
# Made from uv.lock by build/lock.py; not to be edited. For the requirements with the digest
# {digest}.
# Installed by the launcher, or by hand:
# pip install --require-hashes --no-deps -r build/lock/build.txt -r build/lock/base.txt
# pip install --require-hashes --no-deps -r build/lock/torch.txt
"""


def renew(pins: list[str]) -> int:
    """Resolves again; uv prints what changed. `pins`: exact versions, for example of torch."""
    _uv("lock", "--upgrade", *(word for pin in pins for word in ("--upgrade-package", pin)))
    FOLDER.mkdir(exist_ok=True)
    for name, text in parts().items():
        (FOLDER / f"{name}.txt").write_text(text, "utf-8", newline="\n")
    return 0


def parts() -> dict[str, str]:
    """The texts of build/lock/*.txt, exported from uv.lock. Needs no network."""
    base, test, app = _blocks(), _blocks("--extra", "test"), _blocks("--extra", "app")
    files = {"base": [block for block in base if not TORCH.match(block)],
             "torch": [block for block in base if TORCH.match(block)],
             "test": [block for block in test if not TORCH.match(block)],
             "app": [block for block in app if not TORCH.match(block)],
             "build": _blocks("--only-group", "build")}
    header = HEADER.format(digest=asked_for(ROOT))
    return {name: header + "".join(blocks) for name, blocks in files.items()}


def _blocks(*selection: str) -> list[str]:
    """The requirements of uv.lock: 'name==1.0 ; marker' and the lines of its hashes each."""
    requirements = _uv("export", "--quiet", "--frozen", "--no-emit-project", "--no-header",
                       "--no-annotate", "--format", "requirements-txt", *selection)
    return re.findall(r"^\S.*\n(?:[ ].*\n)*", requirements, re.MULTILINE)


def test(which: str, pytest_arguments: list[str]) -> int:
    """Runs the tests with the lowest or newest versions that pyproject.toml allows."""
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
    """Requirements of pyproject.toml whose version in `listed` (name==version lines) is higher."""
    installed = {plain(name): version for name, _, version in
                 (line.partition("==") for line in listed.split())}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    return [line for line in lines for name, limits in [parsed(line)]
            if ">=" not in dict(limits)
            or numbers(installed[plain(name)]) != dict(limits)[">="]]


def _uv(*arguments: str) -> str:
    # The uv of this environment, or of .venv, before one of the system.
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
