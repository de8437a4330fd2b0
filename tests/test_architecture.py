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

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("core", "captioner", "gui", "launcher")            # each may import those before it
HEAVY = {"torch", "torchvision", "diffusers", "transformers", "peft", "accelerate", "open_clip"}
LIGHT = ("advisor", "base_loras", "captions", "caption_checks", "checks", "children", "choices",
         "commands", "config", "logs",
         "console", "control", "copies", "crops", "dataset", "dataset_commands", "distilled",
         "doctor", "draw_config", "intake", "plan_service", "project", "thumbnails",
         "download", "duplicates", "events", "families", "faults", "findings", "focus", "gpu",
         "hub", "hub_commands", "hub_index", "jobs", "journal", "ladder", "looks", "lora_file",
         "lora_metadata", "lora_commands", "lora_export", "lora_formats", "lora_layers",
         "lora_names", "naming", "foreign", "config_commands", "machine", "measures", "paths",
         "model_search", "diagnostics", "records", "alert", "logs",
         "picture_checks", "picture_settings", "plan", "samplers", "trash",
         "plan_commands", "pool", "prepare", "presets", "remedies", "runs",
         "scaled_weights",
         "safetensors_header", "settings", "sheet", "terminal", "watch", "weigh", "words", "worker")
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


def light_modules() -> list[str]:
    return [f"core.{name}" for name in LIGHT
            if (ROOT / f"core/{name}.py").exists() or (ROOT / f"core/{name}/__init__.py").exists()]


@pytest.mark.parametrize("module",
                         ["core.config.schema, core.system.gpu, core.jobs.manager",
                          *light_modules()])
def test_light_modules_take_no_torch(module: str) -> None:
    code = (f"import sys, {module}; "
            f"print(sorted({{name.split('.')[0] for name in sys.modules}} & {HEAVY!r}))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


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
    """(place, key) of each Fault("code"), Note(key="..."), words.say("...") with a literal."""
    for path in sources():
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.Call):
                for key in _literals(node):
                    yield f"{path.relative_to(ROOT)}:{node.lineno}", key


def _literals(call: ast.Call) -> Iterator[str]:
    name = getattr(call.func, "id", getattr(call.func, "attr", ""))
    owner = getattr(getattr(call.func, "value", None), "id", "")
    if name == "Fault" or (name == "say" and owner == "words"):
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
            if (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Fault"
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
