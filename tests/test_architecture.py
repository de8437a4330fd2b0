"""The house's rules, read from the source: who imports whom, what stays free of torch, that every
sentence exists in both languages, and that no file knows the machine that it was written on."""

from __future__ import annotations

import ast
import os
import re
import string
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from importlinter.cli import lint_imports

from core import families

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("core", "captioner", "gui", "launcher")            # each may import those before it
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "open_clip"}
# Packages of which no module takes torch when it is imported, and modules of mixed packages.
LIGHT = ("captioner.captions", "core.base_models", "core.cli", "core.config", "core.dataset.checks",
         "core.importers", "core.jobs", "core.system", "core.workspace")
LIGHT_MODULES = (
    "core.adapters.base_loras", "core.dataset.buckets", "core.dataset.captions",
    "core.dataset.crops", "core.dataset.curation", "core.dataset.image_folder",
    "core.dataset.images", "core.dataset.import_files", "core.dataset.masks",
    "core.dataset.prepare", "core.dataset.render_copy", "core.dataset.sampler",
    "core.dataset.thumbnails", "core.families", "core.families.detection",
    "core.families.distilled", "core.families.layer_names", "core.families.schedulers",
    "core.inference.grid", "core.inference.png_info", "core.inference.trash",
    "core.lora_files.export", "core.lora_files.files", "core.lora_files.formats",
    "core.lora_files.layers", "core.lora_files.library", "core.lora_files.metadata",
    "core.memory.advisor", "core.memory.course", "core.memory.history", "core.memory.monitor",
    "core.memory.plan", "core.memory.plan_inputs", "core.memory.relief", "core.memory.service",
    "core.memory.troubleshooting", "core.training.callbacks", "core.weights.scaled_weights")
LANGUAGES = ("en", "zh-CN")
STRINGS = ROOT / "core" / "strings"


def sources() -> list[Path]:
    files = [path for room in ROOMS[:3] for path in sorted((ROOT / room).rglob("*.py"))]
    return [ROOT / "launcher.py", *files]


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """Every module that a file names, also inside functions and by importlib."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
        elif (isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "import_module"
              and node.args and isinstance(node.args[0], ast.Constant)):
            yield node.lineno, str(node.args[0].value)


def test_there_is_something_to_check() -> None:
    assert len(sources()) > 20
    assert {room_of(path) for path in sources()} >= {"launcher", "core"}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_downwards_only(path: Path) -> None:
    above = ROOMS[ROOMS.index(room_of(path)) + 1:]
    found = [f"line {line}: {module}" for line, module in imports(path)
             if module.split(".")[0] in above or module.split(".")[0] in ("tests", "build")]
    assert not found


def test_imports_are_seen_wherever_they_hide(tmp_path: Path) -> None:
    path = tmp_path / "x.py"
    path.write_text("def f():\n    from gui.app import x\n"
                    "    importlib.import_module('captioner.b')")
    assert list(imports(path)) == [(2, "gui.app"), (3, "captioner.b")]


def test_packages_import_lower_floors_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """The contracts of pyproject.toml: floors, and no circle of modules."""
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    assert lint_imports(no_cache=True) == 0


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOT)))
def test_a_family_stands_in_its_folder_only(path: Path) -> None:
    """Its folder and its line of the registry are all that a family's id is written in."""
    if path == ROOT / "core/families/registry.py" or path.parent.name in families.IDS:
        return
    found = [f"line {node.lineno}: {node.value}" for node in ast.walk(tree(path))
             if isinstance(node, ast.Constant) and node.value in families.IDS]
    assert not found


def modules_of(package: str) -> list[str]:
    """Itself and all below it; of `core` and `captioner` only their own files."""
    folder = ROOT.joinpath(*package.split("."))
    files = folder.rglob("*.py") if "." in package or package == "gui" else folder.glob("*.py")
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in files]
    return sorted(name.removesuffix(".__init__") for name in names)


@pytest.mark.parametrize("package", ["core", "captioner", *LIGHT, "gui", "mixed packages"])
def test_light_modules_take_no_torch(package: str) -> None:
    """Each module is named that brings torch, or one of the libraries upon it, with it."""
    modules = LIGHT_MODULES if package == "mixed packages" else modules_of(package)
    assert modules
    code = ("import importlib, sys\n"
            f"for name in {[*modules]!r}:\n"
            "    importlib.import_module(name)\n"
            f"    if found := {{one.split('.')[0] for one in sys.modules}} & {HEAVY!r}:\n"
            "        sys.exit(f'{name} takes {sorted(found)}')\n")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.strip()) == (0, "")


def test_window_takes_no_torch() -> None:
    for path in (path for path in sources() if room_of(path) == "gui"):
        assert not [m for _, m in imports(path) if m.split(".")[0] in HEAVY]


# --- sentences ---

def catalogue(language: str) -> dict[str, str]:
    return {f"{path.stem}.{key}": text for path in sorted((STRINGS / language).glob("*.yaml"))
            for key, text in (yaml.safe_load(path.read_text("utf-8")) or {}).items()}


def placeholders(text: str) -> set[str]:
    return {name.split(".")[0].split("[")[0]
            for _, name, _, _ in string.Formatter().parse(text) if name is not None}


def string_files() -> list[str]:
    return sorted({path.name for language in LANGUAGES for path in (STRINGS / language).iterdir()})


@pytest.mark.parametrize("name", string_files())
def test_both_languages_say_the_same_things(name: str) -> None:
    english, chinese = (yaml.safe_load((STRINGS / lang / name).read_text("utf-8"))
                        for lang in LANGUAGES)
    assert english.keys() == chinese.keys()
    for key, text in english.items():
        assert isinstance(text, str)
        assert text.strip()
        assert placeholders(text) == placeholders(chinese[key]), key


@pytest.mark.parametrize("name", string_files())
def test_no_key_stands_twice(name: str) -> None:
    for language in LANGUAGES:
        node = yaml.compose((STRINGS / language / name).read_text("utf-8"))
        keys = [key.value for key, _ in node.value]
        assert sorted(keys) == sorted(set(keys))


def keys_in_source() -> Iterator[tuple[str, str]]:
    """(place, key) of each UserError("code"), Note(key="..."), words.tr("...") with a literal."""
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                for key in _literals(node):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", key


def _literals(call: ast.Call) -> Iterator[str]:
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if name == "UserError" or (name == "tr" and owner == "i18n"):
        yield from _texts(call.args[0]) if call.args else ()
    elif name == "Note":
        for keyword in call.keywords:
            if keyword.arg == "key":
                yield from _texts(keyword.value)


def _texts(node: ast.expr) -> Iterator[str]:
    """'a' and both ends of 'a' if x else 'b'; f-strings and variables can't be known."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.IfExp):
        yield from _texts(node.body)
        yield from _texts(node.orelse)


def test_every_sentence_that_is_named_exists() -> None:
    known, found = catalogue("en"), list(keys_in_source())
    assert len(found) > 10
    assert not [f"{place}: {key}" for place, key in found if key not in known]


def test_faults_give_what_their_sentence_asks_for() -> None:
    """A placeholder without its parameter would be shown as {name}."""
    known, wrong = catalogue("en"), []
    for path in sources():
        for node in ast.walk(tree(path)):
            if (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError"
                    and node.args and all(keyword.arg for keyword in node.keywords)):
                given = {str(keyword.arg) for keyword in node.keywords}
                wrong += [f"{path.relative_to(ROOT)}:{node.lineno}: {key} lacks {lacking}"
                          for key in _texts(node.args[0])
                          if (lacking := placeholders(known.get(key, "")) - given)]
    assert not wrong


# --- tracked files ---

def project_files() -> list[Path]:
    """Tracked files and those that would be; all that lie here where there is no git."""
    done = subprocess.run(["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT,
                          capture_output=True, check=False)
    listed = done.stdout.decode("utf-8", "surrogateescape").split("\0")
    files = [ROOT / name for name in listed if name] or [
        path for path in ROOT.rglob("*") if ".venv" not in path.parts]
    return [path for path in files if path.is_file() and path.stat().st_size < 2_000_000
            and path != Path(__file__)]


SECRETS = {
    "a home folder": r"(?<![\w.])/(?:root/(?!secret\b)|(?:home|Users)/(?!(?:you|me|user)\b)\w+/)",
    "an index of packages": r"(?:--(?:extra-)?index-url|--find-links|index_url\s*=)\s*['\"]?"
                            r"(?:https?|file):(?!//download\.pytorch\.org/)",
    "an address of one network": r"https?://(?:10|192\.168|172\.(?:1[6-9]|2\d|3[01]))\.\d+\.\d",
}


def places_here() -> list[str]:
    """Where this checkout lies, and where this machine's pip takes packages from."""
    places = [str(ROOT)] if len(ROOT.parts) > 2 else []
    settings = subprocess.run([sys.executable, "-m", "pip", "config", "list"], text=True,
                              capture_output=True, check=False).stdout
    values = " ".join(line.partition("=")[2].strip().strip("'") for line in settings.splitlines())
    for value in re.findall(r"(?:(?:https?|file)://|(?<![\w.])/)[^\s'\"\\]{4,}", values):
        host = re.sub(r"^\w+://([^/@]*@)?", "", value)
        places += [] if host.startswith("pypi.org") else [host.rstrip("/")]
    return places


def test_no_file_knows_this_machine() -> None:
    patterns = SECRETS | {place: re.escape(place) + r"(?!\w)" for place in places_here()}
    found = []
    for path in project_files():
        text = path.read_bytes().decode("utf-8", "ignore")
        found += [f"{path.relative_to(ROOT)}: {what}: {match.group()}"
                  for what, pattern in patterns.items() if (match := re.search(pattern, text))]
    assert not found


def test_files_stay_readable() -> None:
    long = [f"{path.relative_to(ROOT)}: {count} lines" for path in sources()
            if (count := path.read_text("utf-8").count("\n")) > 420]
    assert not long


@pytest.mark.skipif(os.name == "nt", reason="Windows has no execute bit")
def test_ci_script_can_run() -> None:
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    subprocess.run(["bash", "-n", str(ROOT / ".ci" / "run")], check=True)


def test_the_tree_of_architecture_md_is_the_real_one() -> None:
    """Its packages of core are those on disk, and every file that it names is there."""
    text = (ROOT / "ARCHITECTURE.md").read_text("utf-8")
    drawn = set(re.findall(r"^  (\w+)/ ", text, re.MULTILINE))
    assert drawn == {path.name for path in (ROOT / "core").iterdir()
                     if path.is_dir() and path.name != "__pycache__"}
    named = {one.replace("<id>", "sdxl").replace("<name>", "run")
             for one in re.findall(r"`((?:[\w<>]+/)+\w+\.py)`", text)}
    assert len(named) > 20
    assert not [one for one in named if not any(
        (ROOT / start / one).is_file() for start in ("", "core"))]


def test_no_folder_is_too_full_to_be_seen_at_once() -> None:
    for path in {path.parent for path in sources()}:
        assert len([*path.glob("*.py")]) <= 18, path
