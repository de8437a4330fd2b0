"""Builds what users download: `python build/make.py app`, the standalone app in dist/darkroom.

build/darkroom.spec imports from here what it needs to know of the environment. Only `helpers`
writes outside of dist/, which git ignores.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SPEC = ROOT / "build" / "darkroom.spec"
DIST = ROOT / "dist"
WORK = DIST / "work"
APP = DIST / "darkroom"
CONTENTS = "app"                        # in the app's folder; short, for Windows' 260 characters
SIZES = (16, 24, 32, 48, 64, 128, 256)  # px of the icon on Windows
Entry = tuple[str, str, str]            # PyInstaller's: place in the app, file, kind

# Run in a process of its own: its sys.modules shows what the program imports.
USED = """
import json, shutil, sys
from pathlib import Path
import captioner, diffusers
from captioner import job
from captioner.config import CaptionConfig
from core import families, paths
from core.demo import run as demo
from core.families import schedulers
from core.lora_files import merge
from core.memory import meta_tensors, service, traces
from core.jobs.control import Control
home = Path(sys.argv[1])
for name in families.SPECS: families.get(name)
for name in captioner.REGISTRY: captioner.get(name)
for name in (*(row[1] for row in schedulers.SAMPLERS.values()), *schedulers.FLOW.values()):
    getattr(diffusers, name)
config = demo.demo_config(home).with_changes(max_train_steps=1, lr_warmup_steps=0, batch_size=1)
demo.train(config, lambda event: None, Control())
service.answer({"config": config.model_dump(mode="json"), "purpose": "style"})
shutil.copy(next((paths.DEMO / "pictures").glob("*.png")), home)
job.caption(CaptionConfig(folder=str(home)), lambda event: None, Control())
print(json.dumps(sorted(name for name, module in sys.modules.items()
                        if name.split(".")[0] in sys.argv[2:] and getattr(module, "__file__", 0))))
"""


# For the spec


def used_modules(packages: Sequence[str]) -> list[str]:
    """The modules of `packages` that the demo, its captions and all families import, also by
    computed names. Takes a minute."""
    with tempfile.TemporaryDirectory() as home:
        done = subprocess.run(
            [sys.executable, "-P", "-W", "ignore", "-c", USED, home, *packages], cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "DARKROOM_HOME": home}, check=True,
            stdout=subprocess.PIPE, stdin=subprocess.DEVNULL)
    return list(json.loads(done.stdout.decode().splitlines()[-1]))


def all_modules(packages: Iterable[str]) -> Iterator[str]:
    """All modules of packages that are written in Python, by their files."""
    for package in packages:
        spec = importlib.util.find_spec(package)
        for folder in (spec.submodule_search_locations or []) if spec else []:
            for path in Path(folder).rglob("*.py"):
                parts = path.relative_to(Path(folder).parent).with_suffix("").parts
                yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def installed(packages: Iterable[str]) -> list[str]:
    return [name for name in packages if importlib.util.find_spec(name)]


def standard_library(excluded: Iterable[str]) -> list[str]:
    """All of it, as code of the user's own may import any module."""
    public = {name for name in sys.stdlib_module_names if not name.startswith("_")}
    return installed(sorted(public - set(excluded) - {"this", "antigravity"}))


def data_of_rooms(rooms: Iterable[str]) -> list[tuple[str, str]]:
    """The files of our packages that are no code."""
    return [(str(path), str(path.parent.relative_to(ROOT)))
            for room in rooms for path in sorted((ROOT / room).rglob("*"))
            if path.is_file() and path.suffix not in (".py", ".pyc", ".pyo")]


def requirements(names: Iterable[str], seen: set[str] | None = None) -> set[str]:
    """The installed packages that these need, directly or through others."""
    from packaging.requirements import Requirement
    seen = set() if seen is None else seen
    for requirement in map(Requirement, names):
        if requirement.name in seen or (requirement.marker
                                        and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            needs = distribution(requirement.name).requires or []
        except PackageNotFoundError:
            continue
        seen.add(requirement.name)
        requirements(needs, seen)
    return seen


def project() -> dict[str, object]:
    import tomllib
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"])


def metadata() -> list[tuple[str, str]]:
    """Package metadata: the versions, which libraries look up, and the licences."""
    from PyInstaller.utils.hooks import copy_metadata
    dependencies = project()["dependencies"]
    assert isinstance(dependencies, list)
    return [pair for name in sorted(requirements(dependencies)) for pair in copy_metadata(name)]


def cuda_libraries() -> list[tuple[str, str]]:
    """NVIDIA's libraries on Linux. torch opens them by name, so PyInstaller doesn't see them."""
    spec = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (spec.submodule_search_locations or [])] if spec else []
    return [(str(file), str(file.parent.relative_to(folder.parent)))
            for folder in folders for file in sorted(folder.glob("*/lib/*.so*"))]


def without(entries: Iterable[Entry], patterns: Sequence[str]) -> list[Entry]:
    """`entries` without those whose place in the app matches a pattern."""
    return [entry for entry in entries if not any(
        fnmatch.fnmatch(entry[0].replace("\\", "/"), pattern) for pattern in patterns)]


def version() -> str:
    namespace: dict[str, str] = {}
    exec((ROOT / "core" / "__init__.py").read_text("utf-8"), namespace)
    return namespace["__version__"]


def version_resource(work: Path, name: str) -> str:
    """The properties that Windows shows; virus scanners distrust programs without them."""
    numbers = (*(int(part) for part in version().split(".")[:3]), 0)
    properties = {"FileDescription": "LoRA Darkroom", "ProductName": "LoRA Darkroom",
                  "CompanyName": "LoRA Darkroom", "LegalCopyright": "Apache-2.0",
                  "FileVersion": version(), "ProductVersion": version(), "InternalName": name,
                  "OriginalFilename": f"{name}.exe"}
    rows = ", ".join(f"StringStruct({key!r}, {value!r})" for key, value in properties.items())
    path = work / f"{name}-version.txt"
    path.write_text(
        f"VSVersionInfo(ffi=FixedFileInfo(filevers={numbers}, prodvers={numbers}), kids=["
        f"StringFileInfo([StringTable('040904B0', [{rows}])]), "
        "VarFileInfo([VarStruct('Translation', [1033, 1200])])])", "utf-8")
    return str(path)


# The icon: gui/assets/icon.svg, drawn without a library for SVG


def icon(work: Path) -> str:
    """Returns the icon in the format of this system: .ico, .icns or .png."""
    from PIL import Image, ImageDraw
    unit = 32                           # px for each of the 64 units of the drawing
    image = Image.new("RGBA", (64 * unit, 64 * unit))
    pen = ImageDraw.Draw(image)
    pen.rounded_rectangle((0, 0, 64 * unit, 64 * unit), 14 * unit, "#1d1b26")
    pen.polygon([(x * unit, y * unit) for x, y in ((32, 10), (54, 32), (32, 54), (10, 32))],
                "#e2573b")
    pen.ellipse([side * unit for side in (23, 23, 41, 41)], "#ffd9a8")
    image = image.resize((1024, 1024), Image.Resampling.LANCZOS)
    work.mkdir(parents=True, exist_ok=True)
    image.save(work / "darkroom.png")
    image.save(work / "darkroom.ico", sizes=[(side, side) for side in SIZES])
    image.save(work / "darkroom.icns")
    suffix = {"win32": "ico", "darwin": "icns"}.get(sys.platform, "png")
    return str(work / f"darkroom.{suffix}")


# The commands


def make_app(_: argparse.Namespace) -> None:
    """Builds the app, with the torch of this environment (CPU or CUDA). Needs the extra `app`."""
    if not importlib.util.find_spec("PyInstaller"):
        raise SystemExit('PyInstaller is missing here: python3 launcher.py setup --app')
    began = time.monotonic()
    subprocess.run([sys.executable, "-m", "PyInstaller", "--noconfirm", "--log-level", "WARN",
                    "--distpath", str(DIST), "--workpath", str(WORK), str(SPEC)],
                   cwd=ROOT, check=True)
    minutes = (time.monotonic() - began) / 60
    print(f"{APP}: {total(APP) / 1e6:.0f} MB in {minutes:.1f} minutes")


def show_sizes(options: argparse.Namespace) -> None:
    """Prints the sizes of the app's packages, largest first, as a Markdown table."""
    sizes = by_package(options.app)
    print("| part | MB |\n|---|---|")
    large = [(name, size) for name, size in sizes.most_common() if size >= 5e6]
    for name, size in large:
        print(f"| {name} | {size / 1e6:.0f} |")
    print(f"| {len(sizes) - len(large)} smaller ones | "
          f"{(sum(sizes.values()) - sum(size for _, size in large)) / 1e6:.0f} |")
    print(f"| whole | {sum(sizes.values()) / 1e6:.0f} |")


def by_package(app: Path) -> Counter[str]:
    """Bytes by package: by top folder, or by file where it is in none."""
    sizes: Counter[str] = Counter()
    for path in files(app):
        parts = path.relative_to(app).parts
        parts = parts[1:] if len(parts) > 1 else parts          # without CONTENTS
        # nvidia's packages share a folder, but are large, so each gets a row.
        name = "/".join(parts[:2]) if parts[0] == "nvidia" else parts[0]
        sizes[name.removesuffix(".libs").split("-")[0] if ".dist-info" not in name
              else "metadata"] += path.stat().st_size
    return sizes


def total(folder: Path) -> int:
    return sum(path.stat().st_size for path in files(folder))


def files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def make_helpers(_: argparse.Namespace) -> None:
    import desktop_files
    for system in desktop_files.SUFFIXES:
        print(*desktop_files.write(system=system), sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("app", help="build dist/darkroom").set_defaults(run=make_app)
    sizes = commands.add_parser("sizes", help="its parts by size")
    sizes.add_argument("app", type=Path, nargs="?", default=APP)
    sizes.set_defaults(run=show_sizes)
    commands.add_parser("helpers", help="what starts this checkout by a double click"
                        ).set_defaults(run=make_helpers)
    options = parser.parse_args()
    options.run(options)


if __name__ == "__main__":
    main()
