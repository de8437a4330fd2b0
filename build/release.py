"""From a built app to what is put on a release page, and back: archives in parts that every host
takes, their SHA-256 list, signatures. The workflow's steps; all but the signing run anywhere.

    python build/release.py pack dist/darkroom --flavour cpu
    python build/release.py sums dist/release
    python build/release.py verify dist/release
    python build/release.py unpack dist/release/LoRA-Darkroom-0.1.0-linux-x86_64-cpu.tar.gz.001 x
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import gzip
import hashlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "dist" / "release"
SUMS = "SHA256SUMS"
PART = 1900 * 2**20                     # bytes; release pages take files below 2 GiB
BLOCK = 2**20
SYSTEMS = {"win32": "windows", "darwin": "macos"}
WINDOWS_SIGNING = ("WINDOWS_CERTIFICATE", "WINDOWS_CERTIFICATE_PASSWORD")
MACOS_SIGNING = ("MACOS_IDENTITY",)
MACOS_NOTARY = ("APPLE_ID", "APPLE_TEAM_ID", "APPLE_PASSWORD")
TIMESTAMPS = "http://timestamp.digicert.com"


# Archives


class Parts(io.RawIOBase):
    """A file that goes on in the next one where it gets too large: name.001, name.002. One that
    stays small keeps its own name."""

    def __init__(self, path: Path, largest: int) -> None:
        self.path, self.largest, self.files = path, largest, [_part(path, 1)]
        self._room, self._file = largest, open(self.files[0], "wb")     # noqa: SIM115

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")           # type: ignore[arg-type]
        done = 0
        while done < len(view):
            if not self._room:
                self._file.close()
                self.files.append(_part(self.path, len(self.files) + 1))
                self._room = self.largest
                self._file = open(self.files[-1], "wb")         # noqa: SIM115
            piece = view[done:done + self._room]
            self._file.write(piece)
            self._room -= len(piece)
            done += len(piece)
        return done

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            if len(self.files) == 1:
                self.files = [self.files[0].replace(self.path)]
        super().close()


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number:03d}")


def pack(bundle: Path, out: Path, name: str, largest: int = PART) -> list[Path]:
    """The folder as one archive: zip for Windows, else tar.gz, which keeps links and rights. The
    same folder gives the same bytes: names in order, one time, no user."""
    out.mkdir(parents=True, exist_ok=True)
    zipped = "windows" in name
    path = out / f"{name}{'.zip' if zipped else '.tar.gz'}"
    for old in (path, *out.glob(f"{path.name}.[0-9][0-9][0-9]")):
        old.unlink(missing_ok=True)
    with Parts(path, largest) as parts:
        (_zip if zipped else _tar)(bundle, parts)
    return parts.files


def _tar(bundle: Path, target: IO[bytes] | Parts) -> None:
    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime, info.uid, info.gid, info.uname, info.gname = _moment(), 0, 0, "", ""
        return info
    with (gzip.GzipFile("", "wb", 6, target, _moment()) as packed,
          tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar):
        for path in (bundle, *sorted(bundle.rglob("*"))):
            tar.add(path, _inside(bundle, path), recursive=False, filter=plain)


def _zip(bundle: Path, target: IO[bytes] | Parts) -> None:
    moment = time.gmtime(_moment())[:6]
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as packed:
        for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
            info = zipfile.ZipInfo(_inside(bundle, path), moment)
            info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            with open(path, "rb") as source, packed.open(info, "w", force_zip64=True) as copy:
                shutil.copyfileobj(source, copy, BLOCK)


def _inside(bundle: Path, path: Path) -> str:
    return Path(bundle.name, path.relative_to(bundle)).as_posix()


def _moment() -> int:
    """Unix time of the last commit, or what SOURCE_DATE_EPOCH says."""
    asked = os.environ.get("SOURCE_DATE_EPOCH") or subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True).stdout
    return max(int(asked or 0), 315619200)          # zip's first year is 1980


class _Joined(io.RawIOBase):
    """Parts, read as one file that can be searched."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._files = [open(path, "rb") for path in files]  # noqa: SIM115
        self._sizes = [path.stat().st_size for path in files]
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = offset + (0, self._at, sum(self._sizes))[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: object) -> int:
        view = memoryview(buffer).cast("B")         # type: ignore[arg-type]
        start = 0
        for file, size in zip(self._files, self._sizes, strict=True):
            if self._at < start + size:
                file.seek(self._at - start)
                read = file.readinto(view[:start + size - self._at])
                self._at += read
                return read
            start += size
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


def parts_of(first: Path) -> list[Path]:
    """All parts of an archive, by its first one or its whole name; SystemExit where one lacks."""
    if first.suffix != ".001":
        return [first]
    found = sorted(first.parent.glob(f"{first.stem}.[0-9][0-9][0-9]"))
    if [int(path.suffix[1:]) for path in found] != list(range(1, len(found) + 1)):
        raise SystemExit(f"{first.stem}: a part is missing among {len(found)}")
    return found


def unpack(first: Path, folder: Path) -> None:
    """Checks every byte on the way; nothing is written outside `folder`."""
    with contextlib.closing(io.BufferedReader(_Joined(parts_of(first)), BLOCK)) as source:
        if ".zip" in first.name:
            with zipfile.ZipFile(source) as packed:
                packed.extractall(folder)
        else:
            with tarfile.open(fileobj=source, mode="r:gz") as tar:
                tar.extractall(folder, filter="data")


# Sums


def digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sums(folder: Path) -> Path:
    """SHA256SUMS of all files, in the format of `sha256sum -c`."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != SUMS)
    lines = "".join(f"{digest(path)}  {path.name}\n" for path in files)
    (folder / SUMS).write_bytes(lines.encode())
    return folder / SUMS


def verify(folder: Path) -> list[str]:
    """What is wrong with the files of a release; []: nothing."""
    lines = (folder / SUMS).read_text("utf-8").splitlines()
    listed = {name: wanted for wanted, _, name in (line.partition("  ") for line in lines)}
    here = {path.name for path in folder.iterdir() if path.is_file()} - {SUMS}
    wrong = [f"{name}: not listed" for name in sorted(here - listed.keys())]
    for name, wanted in listed.items():
        if name not in here:
            wrong.append(f"{name}: missing")
        elif digest(folder / name) != wanted:
            wrong.append(f"{name}: other bytes than when it was packed")
        elif (folder / name).stat().st_size >= 2**31:
            wrong.append(f"{name}: 2 GiB or more")
    return wrong


# Signatures: only where the keys are, which are never in this repository


def lacking(names: Sequence[str]) -> list[str]:
    return [name for name in names if not os.environ.get(name)]


def sign(bundle: Path) -> str:
    """Signs the programs of an app, or says in a sentence why not."""
    if sys.platform == "win32":
        return _skipped(WINDOWS_SIGNING) or _sign_windows(bundle)
    if sys.platform == "darwin":
        return _skipped(MACOS_SIGNING) or _sign_macos(bundle)
    return "Linux programs carry no signature; the list of sums vouches for them."


def _skipped(names: Sequence[str]) -> str:
    absent = lacking(names)
    return f"Not signed: {', '.join(absent)} not set (see docs/releasing.md)." if absent else ""


def _sign_windows(bundle: Path) -> str:
    with tempfile.TemporaryDirectory() as holder:
        certificate = Path(holder) / "certificate.pfx"
        certificate.write_bytes(base64.b64decode(os.environ["WINDOWS_CERTIFICATE"]))
        programs = sorted(str(path) for path in bundle.glob("*.exe"))
        subprocess.run(["signtool", "sign", "/fd", "SHA256", "/td", "SHA256", "/tr", TIMESTAMPS,
                        "/f", str(certificate), "/p", os.environ["WINDOWS_CERTIFICATE_PASSWORD"],
                        *programs], check=True)
    return f"Signed: {len(programs)} programs."


def _sign_macos(bundle: Path) -> str:
    """Inside out, as Apple wants it; then the notary's stamp, if its keys are here too."""
    common = ["codesign", "--force", "--timestamp", "--options", "runtime", "--sign",
              os.environ["MACOS_IDENTITY"]]
    inner = [path for path in sorted(bundle.rglob("*")) if not path.is_symlink()
             and path.suffix in (".so", ".dylib")]
    for start in range(0, len(inner), 200):
        subprocess.run([*common, *map(str, inner[start:start + 200])], check=True)
    subprocess.run([*common, str(bundle)], check=True)
    if absent := lacking(MACOS_NOTARY):
        return f"Signed, not notarised: {', '.join(absent)} not set (see docs/releasing.md)."
    with tempfile.TemporaryDirectory() as holder:
        archive = str(Path(holder) / "app.zip")
        subprocess.run(["ditto", "-c", "-k", "--keepParent", str(bundle), archive], check=True)
        subprocess.run(["xcrun", "notarytool", "submit", archive, "--wait", "--apple-id",
                        os.environ["APPLE_ID"], "--team-id", os.environ["APPLE_TEAM_ID"],
                        "--password", os.environ["APPLE_PASSWORD"]], check=True)
    subprocess.run(["xcrun", "stapler", "staple", str(bundle)], check=True)
    return "Signed and notarised."


# Names and words


def version() -> str:
    found = re.search(r'__version__ = "([^"]+)"', (ROOT / "core" / "__init__.py").read_text())
    assert found
    return found[1]


def name(flavour: str) -> str:
    """LoRA-Darkroom-0.1.0-linux-x86_64-cpu"""
    machine = {"AMD64": "x86_64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    return "-".join(("LoRA-Darkroom", version(), SYSTEMS.get(sys.platform, "linux"), machine,
                     flavour))


def notes(wanted: str) -> str:
    """The changelog's part about a version."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    for part in text.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        if title.split()[0] == wanted.removeprefix("v"):
            return body.strip() + "\n"
    raise SystemExit(f"CHANGELOG.md has no part about {wanted}")


# The commands


def _commands() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("pack", help="a built app as an archive in parts")
    one.add_argument("bundle", type=Path)
    one.add_argument("--flavour", default="cpu", help="cpu, cu130, ...: a part of the name")
    one.add_argument("--out", type=Path, default=OUT)
    one.add_argument("--part-mb", type=int, default=PART // 2**20, help="largest part, MiB")
    for command, words in (("sums", "write SHA256SUMS"), ("verify", "check SHA256SUMS")):
        one = commands.add_parser(command, help=words)
        one.add_argument("folder", type=Path, nargs="?", default=OUT)
    one = commands.add_parser("unpack", help="an archive, by its first part")
    one.add_argument("first", type=Path)
    one.add_argument("folder", type=Path)
    one = commands.add_parser("sign", help="sign an app, where this system's keys are set")
    one.add_argument("bundle", type=Path)
    one = commands.add_parser("notes", help="the changelog's part about a version")
    one.add_argument("version", nargs="?", default="")
    return parser


def _run(options: argparse.Namespace) -> Iterator[str]:
    if options.command == "pack":
        files = pack(options.bundle, options.out, name(options.flavour), options.part_mb * 2**20)
        yield from (f"{path} ({path.stat().st_size / 2**20:.0f} MiB)" for path in files)
    elif options.command == "sums":
        yield str(sums(options.folder))
    elif options.command == "unpack":
        unpack(options.first, options.folder)
        yield str(options.folder)
    elif options.command == "sign":
        yield sign(options.bundle)
    elif options.command == "notes":
        yield notes(options.version or version())
    elif wrong := verify(options.folder):
        raise SystemExit("\n".join(wrong))
    else:
        yield f"{options.folder}: all as listed in {SUMS}"


def main(argv: Sequence[str] | None = None) -> None:
    for line in _run(_commands().parse_args(argv)):
        print(line)


if __name__ == "__main__":
    main()
