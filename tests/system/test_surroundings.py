"""What other programs leave in the environment: none of it changes ours, and all starts agree."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from core.errors import UserError
from core.system import processes, surroundings

ROOT = Path(__file__).resolve().parents[2]
SOCKS = ("socks5://127.0.0.1:9", "socks5h://127.0.0.1:9", "socks4://127.0.0.1:9",
         "socks://127.0.0.1:9")
TELL = """
import json, os, sys
import launcher
from core.system import surroundings
surroundings.settle({root!r})
surroundings.own_modules()
import yaml
print(json.dumps([yaml.__file__, sys.path, dict(os.environ)]))
"""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is settled here, is put back."""
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.setattr(sys, "path", list(sys.path))
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("name", [
    "GRADIO_SERVER_PORT", "GRADIO_SERVER_NAME", "GRADIO_ROOT_PATH", "GRADIO_TEMP_DIR",
    "GRADIO_SHARE", "GRADIO_ALLOWED_PATHS", "GRADIO_ANYTHING_NEW", "UVICORN_PORT", "MPLBACKEND",
    "WEB_CONCURRENCY", "FORWARDED_ALLOW_IPS", "PYTHONHOME", "PYTHONSTARTUP", "PYTHONINSPECT",
    "PYTHONOPTIMIZE", "PYTHONWARNINGS", "PYTHONSAFEPATH", "SSLKEYLOGFILE"])
def test_settings_of_other_programs_go(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    surroundings.settle(str(ROOT))
    assert name not in os.environ
    assert name not in processes.environment()


@pytest.mark.parametrize("name", ["LD_PRELOAD", "CUDA_VISIBLE_DEVICES", "HF_HOME", "PIP_INDEX_URL",
                                  "UV_INDEX_URL", "PYTHONUNBUFFERED", "HTTPS_PROXY", "LANG"])
def test_the_users_own_choices_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "1")
    surroundings.settle(str(ROOT))
    assert os.environ[name] == "1"


@pytest.mark.parametrize("name", ["SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE",
                                  "CURL_CA_BUNDLE", "PIP_CERT"])
def test_certificates_that_are_gone_go(name: str, tmp_path: Path,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, str(tmp_path / "gone.pem"))
    surroundings.settle(str(ROOT))
    assert name not in os.environ
    (tmp_path / "empty.pem").write_text("no certificate")
    (tmp_path / "own.pem").write_text("mine\n-----BEGIN CERTIFICATE-----\n")
    for kept in (tmp_path, tmp_path / "own.pem"):
        monkeypatch.setenv(name, str(kept))
        surroundings.settle(str(ROOT))
        assert os.environ[name] == str(kept)
    monkeypatch.setenv(name, str(tmp_path / "empty.pem"))
    surroundings.settle(str(ROOT))
    assert name not in os.environ


def test_times_that_are_no_numbers_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub can't be imported with them."""
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "30s")
    monkeypatch.setenv("HF_HUB_DOWNLOAD_TIMEOUT", "30")
    surroundings.settle(str(ROOT))
    assert "HF_HUB_ETAG_TIMEOUT" not in os.environ
    assert os.environ["HF_HUB_DOWNLOAD_TIMEOUT"] == "30"


def told(code: str, **env: str) -> tuple[str, list[str], dict[str, str]]:
    import json
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          cwd=ROOT, env={**os.environ, **env})
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout))  # type: ignore[return-value]


def test_modules_on_pythonpath_come_behind_ours(tmp_path: Path) -> None:
    """Another Python's packages must not hide ours; extensions of the user's are found."""
    for module in ("yaml", "core", "launcher"):
        (tmp_path / f"{module}.py").write_text("raise ImportError('of another Python')")
    (tmp_path / "my_own.py").write_text("")
    path = os.pathsep.join([str(ROOT), str(tmp_path), str(tmp_path / "gone")])
    file, where, env = told(TELL.format(root=str(ROOT)), PYTHONPATH=path)
    assert "site-packages" in file
    assert where[0] == str(ROOT)
    assert where[-2:] == [str(tmp_path), str(tmp_path / "gone")]
    # A child of it agrees.
    file, where, env = told(TELL.format(root=str(ROOT)), **{
        name: value for name, value in env.items() if name != "PYTHONPATH"})
    assert "site-packages" in file
    assert where[-2:] == [str(tmp_path), str(tmp_path / "gone")]
    assert "PYTHONPATH" not in env


@pytest.mark.parametrize("named", [".", "", ".{}gone", "{}gone"])
def test_the_working_folder_on_pythonpath_comes_behind_ours(named: str, tmp_path: Path) -> None:
    """`PYTHONPATH=$PYTHONPATH:more` names it, too, where there was none before."""
    (tmp_path / "yaml.py").write_text("raise ImportError('of the working folder')")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launcher.py"), "--version"], cwd=tmp_path, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": named.format(os.pathsep),
                                  "DARKROOM_RESTARTED": sys.prefix})
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(os.name == "nt", reason="a working folder can't be removed there")
def test_a_working_folder_that_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    before = Path.cwd()
    os.chdir(tmp_path / "gone")
    try:
        (tmp_path / "gone").rmdir()
        surroundings.settle(str(ROOT))
        assert Path.cwd() == ROOT
    finally:
        os.chdir(before)


@pytest.mark.parametrize("proxy", ["127.0.0.1:x", "http://proxy:80a/", "C:\\proxy"])
def test_a_proxy_without_a_port_cant_be_used(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", proxy)
    assert surroundings.unusable_proxy().startswith(f"https_proxy={proxy}")


@pytest.mark.parametrize("proxy", SOCKS)
@pytest.mark.parametrize("name", ["ALL_PROXY", "all_proxy"])
def test_a_socks_proxy_beside_usable_ones_goes(name: str, proxy: str,
                                               monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, proxy)
    surroundings.settle(str(ROOT))
    assert os.environ[name] == proxy                    # alone it is the user's way out
    assert surroundings.unusable_proxy() == f"{name}={proxy}"
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTPS_PROXY", "127.0.0.1:9")
    surroundings.settle(str(ROOT))
    assert name not in os.environ
    assert surroundings.unusable_proxy() == ""


def test_a_proxys_password_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("https_proxy", "socks5://me:secret@proxy.example:1080")
    assert surroundings.unusable_proxy() == "https_proxy=socks5://proxy.example:1080"


@pytest.mark.parametrize("proxy", [*SOCKS, "nonsense://x"])
def test_what_needs_no_network_is_imported_behind_any(proxy: str, tmp_path: Path,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """httpx makes a connection to each proxy that is named, as Gradio's import does."""
    import httpx
    for name in ("ALL_PROXY", "http_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy)
    monkeypatch.setenv("NO_PROXY", "::1,[::1],10.0.0.0/8")
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "gone"))
    before = dict(os.environ)
    with surroundings.no_network():
        httpx.Client().close()
    assert dict(os.environ) == before


def test_a_download_behind_socks_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    from core.base_models import catalog
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:9")
    with pytest.raises(UserError) as caught:
        catalog.describe("some/repo")
    assert caught.value.code == "hub.socks"
    assert "all_proxy=socks5://127.0.0.1:9" in str(caught.value)
