"""The downloader against a real HTTP server on the loopback that misbehaves in every way met in the wild."""

import io
import re
import stat
import threading
import zipfile
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from kdutils import artefacts, download, scenes
from kdutils.download import DownloadError


def zip_bytes(files, seed=0):
    """A zip of ``files`` (name or ZipInfo to bytes), bulky with incompressible noise so that it can break off."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in files.items():
            zipped.writestr(name, content)
        zipped.writestr("apt1/README.txt", np.random.default_rng(seed).bytes(300_000))
    return buffer.getvalue()


SCENE = {"apt1/kitchen/info.txt": b"m_depthShift = 1000", "apt1/kitchen/split.txt": b"", "apt1/kitchen/data/x": b"1"}
GOOD = zip_bytes(SCENE)


class Server(ThreadingHTTPServer):
    """Serves ``content``; the attributes below are the ways in which it misbehaves."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.requests = GOOD, []
        self.etag = True  # else there is no validator at all
        self.last_modified = None
        self.ranges = True
        self.honours_if_range = True
        self.break_after = []  # bytes sent in the first, second, ... answer, before the connection is cut
        self.statuses = []  # answered first, instead of the file
        self.extra_length = 0  # the lie in Content-Length
        self.no_length = False
        self.after_break = lambda: None

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        server, content = self.server, self.server.content
        etag = f'"{zlib.crc32(content):x}"'
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted and server.ranges else 0
        server.requests.append((self.path, start, self.headers.get("If-Range")))
        if server.statuses or self.path != "/apt1.zip":
            return self.send_error(server.statuses.pop(0) if server.statuses else 404)
        if self.headers.get("If-Range") not in (None, etag, server.last_modified) and server.honours_if_range:
            start = 0
        if start and start >= len(content):
            return self.send_error(416)
        body = content[start:]
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if not server.no_length:
            self.send_header("Content-Length", str(len(body) + server.extra_length))
        if server.etag:
            self.send_header("ETag", etag)
        if server.last_modified:
            self.send_header("Last-Modified", server.last_modified)
        self.end_headers()
        breaks = bool(server.break_after)
        self.wfile.write(body[: server.break_after.pop(0)] if breaks else body)
        self.close_connection = True
        if breaks:
            server.after_break()


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(download, "BACK_OFF_S", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def fetch(server, folder, **kwargs):
    return download.download("apt1", folder, **{"accept_licence": True, "base_url": server.url} | kwargs)


def names(folder):
    kept = {".12scenes-licence-accepted", ".apt1.lock"}  # a lock's file stays, the lock does not
    return sorted(entry.name for entry in folder.iterdir() if entry.name not in kept)


def assert_whole(folder, content=GOOD):
    assert names(folder) == ["apt1"]
    assert [str(scene.relative_to(folder)) for scene in scenes.find_scenes(folder)] == ["apt1/kitchen"]
    with zipfile.ZipFile(io.BytesIO(content)) as zipped:
        for member in zipped.namelist():
            assert (folder / member).read_bytes() == zipped.read(member)


# The plain way


def test_download_and_once_only(server, tmp_path):
    assert fetch(server, tmp_path) == tmp_path / "apt1"
    assert_whole(tmp_path)
    fetch(server, tmp_path, accept_licence=None, ask=pytest.fail)
    assert len(server.requests) == 1


def test_archive_without_the_top_folder(server, tmp_path):
    server.content = zip_bytes({name.removeprefix("apt1/"): text for name, text in SCENE.items()})
    fetch(server, tmp_path / "new")
    assert scenes.find_scenes(tmp_path / "new") == [tmp_path / "new" / "apt1" / "kitchen"]


def test_without_content_length(server, tmp_path):
    server.no_length = True
    fetch(server, tmp_path)
    assert_whole(tmp_path)


# Breaks and lies


@pytest.mark.parametrize("validator", ["etag", "last_modified", "none"])
def test_break_is_resumed(server, tmp_path, validator):
    server.etag = validator == "etag"
    server.last_modified = "Wed, 21 Oct 2015 07:28:00 GMT" if validator == "last_modified" else None
    server.break_after = [100_000, 50_000, 0, 7]
    fetch(server, tmp_path)
    assert_whole(tmp_path)
    assert [start for _, start, _ in server.requests] == [0, 100_000, 150_000, 150_000, 150_007]
    assert all((if_range is None) == (validator == "none") for _, _, if_range in server.requests[1:])


def test_resumed_by_a_later_call(server, tmp_path):
    server.break_after, server.statuses = [100_000], []
    server.after_break = lambda: server.statuses.extend([503] * download.ATTEMPTS)
    with pytest.raises(DownloadError, match="apt1.zip: the server answers 503 .* from the 100000 bytes"):
        fetch(server, tmp_path)
    assert names(tmp_path) == ["apt1.zip.part", "apt1.zip.part.json"]
    server.statuses.clear()
    fetch(server, tmp_path)
    assert_whole(tmp_path)
    assert server.requests[-1][1] == 100_000


def test_complete_part_is_not_fetched_again(server, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr(download, "unpack", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(server, tmp_path)
    fetch(server, tmp_path)
    assert_whole(tmp_path)
    assert len(server.requests) == 1


def test_part_of_unknown_origin_is_not_continued(server, tmp_path):
    (tmp_path / "apt1.zip.part").write_bytes(GOOD[:1000])
    fetch(server, tmp_path)
    assert_whole(tmp_path)
    assert server.requests[0][1] == 0


def test_part_from_another_address_is_not_continued(server, tmp_path):
    (tmp_path / "apt1.zip.part").write_bytes(b"x" * 1000)
    artefacts.write_json(tmp_path / "apt1.zip.part.json", {"url": "http://other/apt1.zip", "size": 5000})
    fetch(server, tmp_path)
    assert_whole(tmp_path)


def test_server_that_ignores_range(server, tmp_path):
    server.ranges, server.break_after = False, [200_000]
    fetch(server, tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize("honours_if_range", [True, False])
@pytest.mark.parametrize("shorter", [True, False])
def test_file_changes_in_between(server, tmp_path, honours_if_range, shorter):
    other = zip_bytes(SCENE | {"apt1/kitchen/new": b"" if shorter else b"x" * 1000}, seed=1)
    server.honours_if_range, server.break_after = honours_if_range, [200_000]
    server.after_break = lambda: setattr(server, "content", other)
    fetch(server, tmp_path)
    assert_whole(tmp_path, other)


def test_file_shrinks_below_the_part(server, tmp_path):
    server.etag, server.break_after = False, [250_000]
    small = io.BytesIO()
    with zipfile.ZipFile(small, "w") as zipped:
        for name, text in SCENE.items():
            zipped.writestr(name, text)
    server.after_break = lambda: setattr(server, "content", small.getvalue())
    fetch(server, tmp_path)
    assert_whole(tmp_path, small.getvalue())


@pytest.mark.parametrize("ranges", [True, False])
def test_too_long_content_length(server, tmp_path, ranges):
    server.extra_length, server.ranges = 1000, ranges
    with pytest.raises(DownloadError, match=rf"the connection ended after {len(GOOD)} of|try again later"):
        fetch(server, tmp_path)
    assert "apt1" not in names(tmp_path)
    assert len(server.requests) <= 2 * download.ATTEMPTS


def test_too_short_content_length(server, tmp_path):
    server.extra_length = -1000
    with pytest.raises(DownloadError, match="apt1.zip.part: bad zip file .* now removed; download it again"):
        fetch(server, tmp_path)
    assert names(tmp_path) == []


def test_passing_trouble_is_retried(server, tmp_path):
    server.statuses = [503, 429, 500]
    fetch(server, tmp_path)
    assert_whole(tmp_path)


@pytest.mark.parametrize("status", [404, 403])
def test_refusal_is_not_retried(server, tmp_path, status):
    server.statuses = [status] * 2
    with pytest.raises(DownloadError, match=f"apt1.zip: the server answers {status} .*; check --base-url"):
        fetch(server, tmp_path)
    assert len(server.requests) == 1 and names(tmp_path) == []


def test_nobody_answers(server, tmp_path):
    with pytest.raises(DownloadError, match="http://127.0.0.1:9/apt1.zip: URLError.*; try again later"):
        fetch(server, tmp_path, base_url="http://127.0.0.1:9")


# Bad archives


def corrupted():
    content = bytearray(GOOD)
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def member(name, mode):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return info


BAD_ZIPS = {
    "flipped byte": (corrupted, "bad zip file"),
    "web page": (lambda: b"<html>log in first</html>", "not a zip file"),
    "cut": (lambda: GOOD[:-500], "not a zip file"),
    "empty": (lambda: b"", "not a zip file"),
    "no scene": (lambda: zip_bytes({"apt1/notes.txt": b"x"}), "holds no scene"),
    "parent": (lambda: zip_bytes(SCENE | {"../evil": b"x"}), "would leave the folder"),
    "inner parent": (lambda: zip_bytes(SCENE | {"apt1/../../evil": b"x"}), "would leave the folder"),
    "absolute": (lambda: zip_bytes(SCENE | {"/tmp/evil": b"x"}), "would leave the folder"),
    "drive": (lambda: zip_bytes(SCENE | {"C:\\evil": b"x"}), "would leave the folder"),
    "relative drive": (lambda: zip_bytes(SCENE | {"C:evil": b"x"}), "would leave the folder"),
    "backslashes": (lambda: zip_bytes(SCENE | {"..\\evil": b"x"}), "would leave the folder"),
    "symlink": (lambda: zip_bytes(SCENE | {member("apt1/l", stat.S_IFLNK | 0o777): b"/etc"}), "link or a device"),
    "device": (lambda: zip_bytes(SCENE | {member("apt1/d", stat.S_IFCHR | 0o777): b""}), "link or a device"),
}


@pytest.mark.parametrize("defect", BAD_ZIPS)
def test_bad_archive_is_removed_and_nothing_unpacked(server, tmp_path, defect):
    make, message = BAD_ZIPS[defect]
    server.content = make()
    folder = tmp_path / "a" / "scenes"
    with pytest.raises(DownloadError, match=message) as caught:
        fetch(server, folder)
    assert "apt1.zip.part: " in str(caught.value)
    assert names(folder) == [] and names(tmp_path) == ["a"] and names(tmp_path / "a") == ["scenes"]
    server.content = GOOD
    fetch(server, folder)
    assert_whole(folder)


def test_absurd_unpacked_size(server, tmp_path):
    content = bytearray(GOOD)
    entry = content.index(b"PK\x01\x02")  # the first record of the directory, its unpacked size at byte 24
    content[entry + 24 : entry + 28] = (0xFFFFFFFE).to_bytes(4, "little")
    server.content = bytes(content)
    usage = download.shutil.disk_usage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda path: usage(path)._replace(free=3 << 30))
        with pytest.raises(DownloadError, match="needs 4.3 GB, 3.2 GB are free; make room"):
            fetch(server, tmp_path)
    assert names(tmp_path) == ["apt1.zip.part", "apt1.zip.part.json"]


def test_full_disk_is_noticed_before_the_download(server, tmp_path, monkeypatch):
    usage = download.shutil.disk_usage
    monkeypatch.setattr(download.shutil, "disk_usage", lambda path: usage(path)._replace(free=download.SPARE_BYTES))
    with pytest.raises(DownloadError, match="needs 0.0 GB, 0.0 GB are free"):
        fetch(server, tmp_path)
    assert "apt1.zip.part" not in names(tmp_path)


def test_leftovers_of_a_broken_unpacking(server, tmp_path):
    (tmp_path / ".apt1.unpacking" / "apt1" / "old" / "data").mkdir(parents=True)
    assert scenes.find_scenes(tmp_path) == []
    fetch(server, tmp_path)
    assert_whole(tmp_path)


def test_something_else_in_the_way(server, tmp_path):
    (tmp_path / "apt1").mkdir()
    with pytest.raises(DownloadError, match="apt1: in the way, and holds no scene; move it away"):
        fetch(server, tmp_path)
    assert not server.requests


# Licence, names and the command line


def test_licence_is_asked_once(server, tmp_path):
    questions = []
    answers = iter(["no", "", "Yes"])

    def ask(question):
        questions.append(question)
        return next(answers)

    for _ in range(2):
        with pytest.raises(DownloadError, match="licence of 12Scenes is not accepted"):
            fetch(server, tmp_path, accept_licence=None, ask=ask)
    with pytest.raises(DownloadError, match="not accepted"):
        fetch(server, tmp_path, accept_licence=False)
    assert not server.requests
    server.statuses = [404]
    with pytest.raises(DownloadError, match="404"):
        fetch(server, tmp_path, accept_licence=None, ask=ask)
    fetch(server, tmp_path, accept_licence=None, ask=pytest.fail)
    assert len(questions) == 3 and all("research only" in question for question in questions)


def test_nobody_to_ask(server, tmp_path):
    def ask(question):
        raise EOFError

    with pytest.raises(DownloadError, match="--i-accept-the-licence"):
        fetch(server, tmp_path, accept_licence=None, ask=ask)


@pytest.mark.parametrize("arguments", [{"name": "apt3"}, {"name": "../x"}, {"base_url": "file:///etc"}])
def test_wrong_arguments(tmp_path, arguments):
    with pytest.raises(DownloadError, match="choose from apt1|no http"):
        download.download(**{"name": "apt1", "folder": tmp_path, "accept_licence": True} | arguments)
    assert names(tmp_path) == []


def test_command_line(server, tmp_path, capsys):
    options = ["--folder", str(tmp_path), "--i-accept-the-licence", "--base-url", server.url]
    assert download.main(["apt1", *options]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "apt1")
    assert_whole(tmp_path)
    assert download.main(["apt2", *options]) == 1
    assert "error: " in (error := capsys.readouterr().err) and "404" in error and "Traceback" not in error
