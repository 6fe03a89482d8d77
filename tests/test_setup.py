"""The set-up scripts for real: bash, venv and pip in copies of their files, against a package index on the loopback.

Stand-ins, by PATH, are only what cannot be had here: `df` (so that a nearly full disk does not fail the other tests),
`apt-get`, and a Python of another version. Missing libraries, missing rights and a full disk are real ones.
"""

import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
NOBODY = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
SHARED_PYTHON = Path("/usr/bin/python3.11")  # other users can run it, which holds for few that a user has installed
MAIN = "import os, sys, tiny\nprint('kdutils', tiny.VERSION, sys.argv[1:], os.getcwd())\n"


def can_unshare():
    return os.geteuid() == 0 and subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0


def has_venv(python):
    return python.exists() and subprocess.run([python, "-c", "import ensurepip"], capture_output=True).returncode == 0


PYTHON = SHARED_PYTHON if has_venv(SHARED_PYTHON) else Path(sys.executable)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes root to become another user")
needs_mounts = pytest.mark.skipif(not can_unshare(), reason="takes root and mount namespaces (unshare -m)")


def wheel(name, version, ballast=0):
    """A pure-Python wheel of one module, with ``ballast`` bytes more to unpack."""
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}.py": f"VERSION = '{version}'\n",
        f"{name}_ballast.txt": " " * ballast,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in files)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for path, content in files.items():
            zipped.writestr(path, content)
    return buffer.getvalue()


class Index(ThreadingHTTPServer):
    """A package index (PEP 503) that notes what it is asked for and can hold back its files."""

    daemon_threads = True
    files = {
        "tiny-1.0-py3-none-any.whl": wheel("tiny", "1.0"),
        "tiny-2.0-py3-none-any.whl": wheel("tiny", "2.0"),
        "bulky-1.0-py3-none-any.whl": wheel("bulky", "1.0", ballast=90_000_000),
    }

    def __init__(self):
        super().__init__(("127.0.0.1", 0), IndexHandler)
        self.url = f"http://127.0.0.1:{self.server_port}/simple"
        self.requests, self.asked, self.open = [], threading.Event(), threading.Event()
        self.open.set()


class IndexHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests.append(self.path)
        name = self.path.rstrip("/").split("/")[-1]
        content, kind = self.server.files.get(name), "application/zip"
        if content is None:
            links = (f'<a href="/files/{file}">{file}</a>' for file in self.server.files if file.startswith(f"{name}-"))
            content, kind = "".join(links).encode(), "text/html"
        else:
            self.server.asked.set()
            self.server.open.wait(30)
        try:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
        except OSError:
            pass  # the client was interrupted

    def log_message(self, *_):
        pass


@pytest.fixture
def index():
    with Index() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.open.set()
        server.shutdown()


class Checkout:
    """The scripts, a small requirements.txt and a stand-in for kdutils in a folder of their own."""

    def __init__(self, folder, index):
        self.root, self.index, self.shims = folder / "check out", index, folder / "shims"
        self.shim("df", 'echo header; echo "disk 99999 0 ${DF_FREE:-50000} 0% /"')
        if not self.root.exists():
            for name in ("notebooks/run", "tests/run", ".ci/run"):
                (self.root / name).parent.mkdir(parents=True)
                shutil.copy(REPOSITORY / name, self.root / name)
            (self.root / "kdutils").mkdir()
            (self.root / "kdutils" / "__main__.py").write_text(MAIN)
            self.require("tiny==1.0")

    def require(self, *lines):
        (self.root / "requirements.txt").write_text("\n".join(lines) + "\n")

    def shim(self, name, code):
        self.shims.mkdir(exist_ok=True)
        (self.shims / name).write_text(f"#!/bin/sh\n{code}\n")
        (self.shims / name).chmod(0o755)
        return self.shims / name

    def start(self, *arguments, script="notebooks/run", before=(), cwd="/", **variables):
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON", "VIRTUAL_ENV"))
        }
        environment |= {
            "PATH": f"{self.shims}:{environment['PATH']}", "PYTHON": str(PYTHON),
            "PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": self.index.url, "PIP_NO_CACHE_DIR": "1", "PIP_RETRIES": "0",
        } | variables  # fmt: skip
        environment = {name: value for name, value in environment.items() if value is not None}
        return subprocess.Popen(
            [*before, self.root / script, *arguments], cwd=cwd, env=environment, text=True, start_new_session=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
        )  # fmt: skip

    def run(self, *arguments, **options):
        return finish(self.start(*arguments, **options))

    def refused(self, *arguments, **options):
        """The one line that a failing call leaves on stderr."""
        result = self.run(*arguments, **options)
        assert result.returncode not in (0, 126, 127), result
        assert re.fullmatch(r"\[set-up\] [^\n]+\n", result.stderr), result
        assert not (self.root / ".venv" / "setup.stamp").exists() and not (self.root / ".venv" / "tmp").exists()
        return result.stderr


def finish(process):
    output, errors = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


@pytest.fixture
def fresh(tmp_path, index):
    return Checkout(tmp_path, index)


@pytest.fixture(scope="module")
def first_call(tmp_path_factory):
    """A set-up from nothing: called by a link, from elsewhere, with arguments."""
    folder = tmp_path_factory.mktemp("ready")
    link = folder / "link"
    link.symlink_to(folder / "check out" / "notebooks" / "run")
    with Index() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        result = Checkout(folder, server).run("two words", "--flag", script=link, cwd=folder)
        server.shutdown()
    return folder, result


@pytest.fixture
def ready(first_call, tmp_path, index):
    """A copy of what the first call has set up (.venv finds itself by its place)."""
    shutil.copytree(first_call[0], tmp_path / "copy", symlinks=True)
    return Checkout(tmp_path / "copy", index)


@pytest.fixture
def of_nobody(ready):
    """The same checkout as another user's, in a folder that is not closed to others as pytest's own are."""
    with tempfile.TemporaryDirectory(prefix="kdutils-setup-") as folder:
        shutil.copytree(ready.root.parent, folder, symlinks=True, dirs_exist_ok=True)
        for path in (Path(folder), *Path(folder).rglob("*")):
            os.chown(path, 65534, 65534, follow_symlinks=False)
        yield Checkout(Path(folder), ready.index)


def test_first_call_sets_up_and_passes_arguments_on_from_any_folder(first_call):
    folder, result = first_call
    assert result.returncode == 0 and not result.stderr, result
    *steps, last = result.stdout.splitlines()
    assert last == f"kdutils 1.0 ['two words', '--flag'] {folder}"
    assert steps[0].startswith(f"[set-up] making .venv with {PYTHON} (CPython 3.11.")
    assert all(line.startswith("[set-up] ") for line in steps) and 3 <= len(steps) <= 6 and steps[-1].endswith("done")
    assert "tiny-1.0" in (folder / "check out" / ".venv" / "setup.log").read_text()


def test_second_call_skips_the_set_up(ready):
    before = (ready.root / ".venv" / "setup.log").stat().st_mtime_ns
    times = []
    for _ in range(3):
        began = time.perf_counter()
        result = ready.run("go")
        times.append(time.perf_counter() - began)
        assert (result.returncode, result.stdout, result.stderr) == (0, "kdutils 1.0 ['go'] /\n", "")
    assert min(times) < 1, times
    assert not ready.index.requests and (ready.root / ".venv" / "setup.log").stat().st_mtime_ns == before


def test_changed_requirements_are_installed(ready):
    ready.require("tiny==2.0")
    assert ready.run().stdout.endswith("kdutils 2.0 [] /\n")
    count = len(ready.index.requests)
    assert ready.run().stdout == "kdutils 2.0 [] /\n" and len(ready.index.requests) == count > 0


def test_ctrl_c_ends_cleanly_and_the_next_call_goes_on(ready):
    ready.require("tiny==2.0")
    ready.index.open.clear()
    process = ready.start()
    assert ready.index.asked.wait(60)  # pip is in the middle of its download
    os.killpg(process.pid, signal.SIGINT)
    result = finish(process)
    assert result.returncode == 130 and result.stderr == "[set-up] interrupted: the next call goes on from here.\n"
    assert not (ready.root / ".venv" / "setup.stamp").exists() and not (ready.root / ".venv" / "tmp").exists()
    ready.index.open.set()
    result = ready.run()
    assert result.returncode == 0 and result.stdout.endswith("kdutils 2.0 [] /\n") and "making" not in result.stdout


def test_package_cut_off_half_way_is_installed_again(ready):
    """What a killed pip leaves behind: some of the files, and a dist-info that lacks what is written last."""
    (packages,) = (ready.root / ".venv").glob("lib/python*/site-packages")
    (packages / "tiny.py").unlink()
    (packages / "tiny-1.0.dist-info" / "INSTALLER").unlink()
    (ready.root / ".venv" / "setup.stamp").unlink()
    assert ready.run().stdout.endswith("kdutils 1.0 [] /\n")


def test_venv_without_its_python_is_made_again(ready):
    (ready.root / ".venv" / "bin" / "python").unlink()
    result = ready.run()
    assert "making .venv" in result.stdout and result.stdout.endswith("kdutils 1.0 [] /\n"), result


def test_two_at_once_do_the_work_once(ready):
    ready.require("tiny==2.0")
    results = [finish(process) for process in (ready.start("a"), ready.start("b"))]
    assert [result.returncode for result in results] == [0, 0], results
    assert sum("waiting" in result.stdout for result in results) == 1, results
    assert sum(path.startswith("/files/") for path in ready.index.requests) == 1


def test_wrong_python_is_named(fresh):
    python = fresh.shim("python-other", "echo CPython 3.12.1")
    assert f"CPython 3.11 is needed, but {python} is CPython 3.12.1" in fresh.refused(PYTHON=str(python))
    assert "/no/python is not there" in fresh.refused(PYTHON="/no/python")
    for name in ("python3.11", "python3", "python"):
        fresh.shim(name, "echo PyPy 3.11.4")
    line = fresh.refused(PYTHON="")
    assert "but python3.11 is PyPy 3.11.4, python3 is PyPy 3.11.4, python is PyPy 3.11.4: install it" in line


def test_unreachable_index(ready):
    """The stamp of what was there before is gone, too: pip may have got half-way."""
    ready.require("tiny==2.0")
    for retries in ("0", "1"):
        line = ready.refused(PIP_INDEX_URL="http://127.0.0.1:9/simple", PIP_RETRIES=retries)
        assert "pip gets nothing from its package index" in line


def test_package_that_the_index_lacks_is_named(ready):
    ready.require("tiny==3.0")
    assert "No matching distribution found for tiny==3.0" in ready.refused()


def test_too_little_free_disk(fresh):
    assert re.search(r"needs \d{4,5} MB of free disk, but has 500 MB", fresh.refused(DF_FREE="500"))
    assert not fresh.index.requests


@needs_mounts
def test_disk_that_fills_up_meanwhile(ready, tmp_path):
    ready.require("bulky==1.0")
    (ready.root / ".venv" / "setup.stamp").unlink()
    (tmp_path / "aside").mkdir()
    command = (
        'mount --bind "$0" "$1" && mount -t tmpfs -o size=80m none "$0" && cp -a "$1/." "$0" && shift && exec "$@"'
    )
    line = ready.refused(before=["unshare", "-m", "sh", "-c", command, ready.root / ".venv", tmp_path / "aside"])
    assert "is full: make space and call again" in line


@needs_root
def test_folder_without_write_permission(of_nobody):
    shutil.rmtree(of_nobody.root / ".venv")
    os.chown(of_nobody.root, 0, 0)
    assert "cannot write to" in of_nobody.refused(before=NOBODY)


LIBRARY = next((str(path) for path in Path("/usr/lib").glob("*/libusb-1.0.so.0")), None)
HIDE = ["unshare", "-m", "sh", "-c", 'mount --bind /dev/null "$0" && exec "$@"', LIBRARY]
needs_library = pytest.mark.skipif(LIBRARY is None, reason="libusb-1.0.so.0 lies at no place known here")


@needs_mounts
@needs_library
@pytest.mark.skipif(PYTHON != SHARED_PYTHON, reason=f"no {SHARED_PYTHON} with venv, for all users")
def test_missing_library_without_rights(of_nobody):
    (of_nobody.root / ".venv" / "setup.stamp").unlink()
    of_nobody.shim("sudo", "exit 1")  # it asks for a password
    line = of_nobody.refused(before=[*HIDE, *NOBODY])
    assert "neither root nor sudo without a password" in line and "apt-get install libusb-1.0-0," in line


@needs_mounts
@needs_library
def test_missing_library_is_installed(ready):
    """Also where .venv was complete before; here "installing" is taking away what hides the library."""
    ready.shim("apt-get", f'case "$*" in *" update") exit;; *"libusb-1.0-0") umount {LIBRARY};; *) exit 1;; esac')
    result = ready.run(before=HIDE)
    assert "needs: libusb-1.0-0\n" in result.stdout and result.stdout.endswith("kdutils 1.0 [] /\n"), result


def test_tests_run_checks_style_and_passes_arguments_to_pytest(ready):
    """From the package index as it is configured here."""
    required = (REPOSITORY / "requirements.txt").read_text()
    pins = re.findall(r"^(?:pytest|pytest-timeout|pytest-xdist|ruff)==.*", required, re.M)
    ready.require(*pins)
    (ready.root / "kdutils" / "__main__.py").write_text("")
    (ready.root / "tests" / "test_one.py").write_text("def test_a():\n    pass\n\n\ndef test_b():\n    pass\n")
    (ready.root / "tests" / "bench_one.py").write_text("def test_slow():\n    pass\n")
    # All commands but the browsers and sudo, and an apt-get that has nothing.
    for folder in reversed(os.environ["PATH"].split(":")):
        for command in Path(folder).glob("*"):
            if command.name not in ("df", "apt-get", "sudo", "chromium", "chromium-browser", "google-chrome"):
                (ready.shims / command.name).unlink(missing_ok=True)
                (ready.shims / command.name).symlink_to(command)
    ready.shim("apt-get", "exit 100")
    options = {name: os.environ.get(name) for name in ("PIP_CONFIG_FILE", "PIP_INDEX_URL", "PIP_NO_CACHE_DIR")}
    options |= {name: value for name, value in os.environ.items() if name.startswith("PIP_")}
    options |= {"PATH": str(ready.shims)}
    result = ready.run(script=".ci/run", **options)
    if "pip gets nothing from its package index" in result.stderr:
        pytest.skip(f"no package index to be had {', '.join(pins)} from")
    assert result.returncode == 0 and "2 passed" in result.stdout, result
    assert "\n[set-up] no chromium (" in result.stdout and "All checks passed!" in result.stdout
    result = ready.run("-k", "test_b", script="tests/run", **options)
    assert result.returncode == 0 and "1 passed" in result.stdout, result
    (ready.root / "tests" / "test_one.py").write_text("import os\n")
    result = ready.run(script="tests/run", **options)
    assert result.returncode == 1 and "F401" in result.stdout, result
