"""Makes a release out of a built app: archives in parts that every host takes, a list of their
SHA-256, signatures. The steps of the workflow; all but the signing run anywhere.

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
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

from make import version

ROOT = Path(__file__).resolve().parent.parent
OUT = ROOT / "dist" / "release"
SUMS = "SHA256SUMS"
# Release pages take files below 2 GiB.
PART = 1900 * 2**20                     # bytes
BLOCK = 2**20
SYSTEMS = {"win32": "windows", "darwin": "macos"}
WINDOWS_SIGNING = ("WINDOWS_CERTIFICATE", "WINDOWS_CERTIFICATE_PASSWORD")
MACOS_SIGNING = ("MACOS_IDENTITY",)
MACOS_NOTARY = ("APPLE_ID", "APPLE_TEAM_ID", "APPLE_PASSWORD")
TIMESTAMPS = "http://timestamp.digicert.com"


# Archives


class Parts(io.RawIOBase):
    """Writes a file in parts of limited size: name.001, name.002. A single part gets the name
    itself."""

    def __init__(self, path: Path, part_size: int) -> None:
        self.path, self.part_size, self.files = path, part_size, [_part(path, 1)]
        self._room, self._file = part_size, open(self.files[0], "wb")     # noqa: SIM115

    def writable(self) -> bool:
        return True

    def write(self, data: object) -> int:
        view = memoryview(data).cast("B")           # type: ignore[arg-type]
        written = 0
        while written < len(view):
            if not self._room:
                self._file.close()
                self.files.append(_part(self.path, len(self.files) + 1))
                self._room = self.part_size
                self._file = open(self.files[-1], "wb")         # noqa: SIM115
            piece = view[written:written + self._room]
            self._file.write(piece)
            self._room -= len(piece)
            written += len(piece)
        return written

    def close(self) -> None:
        if not self.closed:
            self._file.close()
            if len(self.files) == 1:
                self.files = [self.files[0].replace(self.path)]
        super().close()


def _part(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number:03d}")


def pack(bundle: Path, out: Path, name: str, part_size: int = PART) -> list[Path]:
    """Packs the folder: zip for Windows, else tar.gz, which keeps links and permissions. The same
    folder gives the same bytes: names in order, one time, no user."""
    out.mkdir(parents=True, exist_ok=True)
    zipped = "windows" in name
    path = out / f"{name}{'.zip' if zipped else '.tar.gz'}"
    for old in (path, *out.glob(f"{path.name}.[0-9][0-9][0-9]")):
        old.unlink(missing_ok=True)
    # The time of the last commit for all files. The first year of zip is 1980.
    seconds = os.environ.get("SOURCE_DATE_EPOCH") or subprocess.run(
        ["git", "log", "-1", "--format=%ct"], cwd=ROOT, capture_output=True, text=True).stdout
    moment = max(int(seconds or 0), 315619200)

    def anonymous(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.mtime, info.uid, info.gid, info.uname, info.gname = moment, 0, 0, "", ""
        return info

    with Parts(path, part_size) as parts:
        if zipped:
            with zipfile.ZipFile(parts, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as archive:
                for file in sorted(file for file in bundle.rglob("*") if file.is_file()):
                    info = zipfile.ZipInfo(_inside(bundle, file), time.gmtime(moment)[:6])
                    # ZipInfo's own default is no compression.
                    info.compress_type, info.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
                    with open(file, "rb") as source, archive.open(
                            info, "w", force_zip64=True) as copy:
                        shutil.copyfileobj(source, copy, BLOCK)
        else:
            with (gzip.GzipFile("", "wb", 6, parts, moment) as packed,
                  tarfile.open(fileobj=packed, mode="w|", format=tarfile.PAX_FORMAT) as tar):
                for file in (bundle, *sorted(bundle.rglob("*"))):
                    tar.add(file, _inside(bundle, file), recursive=False, filter=anonymous)
    return parts.files


def _inside(bundle: Path, path: Path) -> str:
    return Path(bundle.name, path.relative_to(bundle)).as_posix()


class _Joined(io.RawIOBase):
    """Reads parts as one file, with seek."""

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
    """All parts of an archive; `first`: the first part, or an archive that has only one. Raises
    SystemExit if a part is missing."""
    if first.suffix != ".001":
        return [first]
    parts = sorted(first.parent.glob(f"{first.stem}.[0-9][0-9][0-9]"))
    if [int(path.suffix[1:]) for path in parts] != list(range(1, len(parts) + 1)):
        raise SystemExit(f"{first.stem}: a part is missing among {len(parts)}")
    return parts


def unpack(first: Path, folder: Path) -> None:
    """Checks the archive's own sums; writes nothing outside of `folder`."""
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
    """The problems of the files of a release, a line each."""
    lines = (folder / SUMS).read_text("utf-8").splitlines()
    listed = {name: sha256 for sha256, _, name in (line.partition("  ") for line in lines)}
    here = {path.name for path in folder.iterdir() if path.is_file()} - {SUMS}
    wrong = [f"{name}: not listed" for name in sorted(here - listed.keys())]
    for name, sha256 in listed.items():
        if name not in here:
            wrong.append(f"{name}: missing")
        elif digest(folder / name) != sha256:
            wrong.append(f"{name}: other bytes than when it was packed")
        elif (folder / name).stat().st_size >= 2**31:
            wrong.append(f"{name}: 2 GiB or more")
    return wrong


# Signatures: only where the keys are set, which are never in this repository


def lacking(names: Sequence[str]) -> list[str]:
    return [name for name in names if not os.environ.get(name)]


def sign(bundle: Path) -> str:
    """Signs the programs of an app; returns what was done, or why nothing was."""
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
        # signtool reads certificates only from files.
        certificate.write_bytes(base64.b64decode(os.environ["WINDOWS_CERTIFICATE"]))
        programs = sorted(str(path) for path in bundle.glob("*.exe"))
        subprocess.run(["signtool", "sign", "/fd", "SHA256", "/td", "SHA256", "/tr", TIMESTAMPS,
                        "/f", str(certificate), "/p", os.environ["WINDOWS_CERTIFICATE_PASSWORD"],
                        *programs], check=True)
    return f"Signed: {len(programs)} programs."


def _sign_macos(bundle: Path) -> str:
    """Signs from the inside out, as Apple demands; then notarises, if those keys are set too."""
    common = ["codesign", "--force", "--timestamp", "--options", "runtime", "--sign",
              os.environ["MACOS_IDENTITY"]]
    # A signature of the bundle covers its libraries, so these are signed first.
    inner = [path for path in sorted(bundle.rglob("*")) if not path.is_symlink()
             and path.suffix in (".so", ".dylib")]
    # A command line has a limited length.
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


def name(flavour: str) -> str:
    """LoRA-Darkroom-0.1.0-linux-x86_64-cpu"""
    machine = {"AMD64": "x86_64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    return "-".join(("LoRA-Darkroom", version(), SYSTEMS.get(sys.platform, "linux"), machine,
                     flavour))


def notes(version: str) -> str:
    """The part of the changelog about a version."""
    text = (ROOT / "CHANGELOG.md").read_text("utf-8")
    for part in text.split("\n## ")[1:]:
        title, _, body = part.partition("\n")
        if title.split()[0] == version.removeprefix("v"):
            return body.strip() + "\n"
    raise SystemExit(f"CHANGELOG.md has no part about {version}")


# The commands


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("pack", help="a built app as an archive in parts")
    command.add_argument("bundle", type=Path)
    command.add_argument("--flavour", default="cpu", help="cpu, cu130, ...: a part of the name")
    command.add_argument("--out", type=Path, default=OUT)
    command.add_argument("--part-mb", type=int, default=PART // 2**20, help="largest part, MiB")
    for title, help_ in (("sums", "write SHA256SUMS"), ("verify", "check SHA256SUMS")):
        command = commands.add_parser(title, help=help_)
        command.add_argument("folder", type=Path, nargs="?", default=OUT)
    command = commands.add_parser("unpack", help="an archive, by its first part")
    command.add_argument("first", type=Path)
    command.add_argument("folder", type=Path)
    command = commands.add_parser("sign", help="sign an app, where this system's keys are set")
    command.add_argument("bundle", type=Path)
    command = commands.add_parser("notes", help="the changelog's part about a version")
    command.add_argument("version", nargs="?", default="")
    options = parser.parse_args(argv)
    if options.command == "pack":
        for path in pack(options.bundle, options.out, name(options.flavour),
                         options.part_mb * 2**20):
            print(f"{path} ({path.stat().st_size / 2**20:.0f} MiB)")
    elif options.command == "sums":
        print(sums(options.folder))
    elif options.command == "unpack":
        unpack(options.first, options.folder)
        print(options.folder)
    elif options.command == "sign":
        print(sign(options.bundle))
    elif options.command == "notes":
        print(notes(options.version or version()))
    elif problems := verify(options.folder):
        raise SystemExit("\n".join(problems))
    else:
        print(f"{options.folder}: all as listed in {SUMS}")


if __name__ == "__main__":
    main()
