"""Fetching the 12Scenes archives: ``python -m kdutils.download apt1 office2 --folder data/scenes``.

A download that breaks off is resumed, and a scene appears under its name only once it is whole.
"""

import argparse
import errno
import os
import re
import shutil
import stat
import struct
import sys
import time
import zipfile
import zlib
from datetime import date
from http.client import HTTPException
from pathlib import Path, PureWindowsPath
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm.auto import tqdm

from . import artefacts
from .scenes import BUILDINGS, find_scenes
from .settings import data_folder

BASE_URL = "http://graphics.stanford.edu/projects/reloc/data"
LICENCE = "12Scenes is for research only; its terms are at http://graphics.stanford.edu/projects/reloc/."
ATTEMPTS = 5  # in a row without getting any further
BACK_OFF_S = 1.0  # doubled after each of them
TIMEOUT_S = 60
SPARE_BYTES = 64 << 20  # left free on the disk
_PASSING = (408, 429, 500, 502, 503, 504)
_CORRUPT = (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError, struct.error)


class DownloadError(Exception):
    """A download that cannot be finished; the message names the file or URL, the cause and a remedy."""

    def __init__(self, where, cause, remedy):
        super().__init__(f"{where}: {cause}; {remedy}")


def download(name, folder, accept_licence=None, base_url=BASE_URL, ask=input):
    """Fetch and unpack one building of 12Scenes; nothing is done if it is there already.

    Args:
        name: one of apt1, apt2, office1, office2.
        folder: where the building's folder of scenes goes.
        accept_licence: True agrees to the licence, False refuses, None asks unless agreed before in this folder.
        base_url: http(s) address of the folder with the zip files.
        ask: asks a question and returns the answer, like `input`.

    Returns:
        The building's folder, ``folder / name``.

    Raises:
        DownloadError: the licence is refused, the network or the disk fails, or the archive is bad.
    """
    if name not in BUILDINGS:
        raise DownloadError(name, "no part of 12Scenes", f"choose from {', '.join(BUILDINGS)}")
    url = f"{base_url.rstrip('/')}/{name}.zip"
    if not url.startswith(("http://", "https://")):
        raise DownloadError(url, "no http(s) address", "give another --base-url")
    folder = Path(folder)
    target, part = folder / name, folder / f"{name}.zip.part"
    if find_scenes(target):
        return target
    if target.exists():
        raise DownloadError(target, "in the way, and holds no scene", "move it away and try again")
    folder.mkdir(parents=True, exist_ok=True)
    _agree(folder, accept_licence, ask)
    with artefacts.alone(target):
        return target if find_scenes(target) else _fetched(url, part, target)


def _fetched(url, part, target):
    fetch(url, part)
    try:
        unpack(part, target)
    except _CORRUPT as error:
        _remove(part)
        raise DownloadError(part, f"bad zip file ({error}), now removed", "download it again") from error
    except OSError as error:
        raise DownloadError(target, f"cannot be unpacked ({error})", "see to the disk and try again") from error
    _remove(part)
    return target


def fetch(url, part):
    """Download ``url`` into the file ``part``, going on from what an earlier call left there.

    Raises:
        DownloadError: the server refuses, breaks off again and again, or the disk is full.
    """
    furthest, failures = _size(part), 0
    while True:
        try:
            return _fetch_once(url, part)
        except HTTPError as error:
            cause = f"the server answers {error.code} {error.reason}"
            if error.code not in _PASSING:
                raise DownloadError(url, cause, "check --base-url, or download the file by hand") from error
        except (OSError, HTTPException) as error:
            cause = f"{type(error).__name__}: {error}"
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
                raise DownloadError(part, cause, "make room or choose another --folder") from error
        failures = failures + 1 if _size(part) <= furthest else 1
        furthest = max(furthest, _size(part))
        if failures >= ATTEMPTS:
            raise DownloadError(url, cause, f"try again later to go on from the {_size(part)} bytes that are here")
        time.sleep(BACK_OFF_S * 2 ** (failures - 1))


def unpack(archive, target):
    """Unpack a zip file so that ``target`` appears at once and whole.

    An archive whose top level is one folder of the target's name is unpacked without doubling that name.

    Raises:
        zipfile.BadZipFile (or what `zipfile` raises): the archive is corrupt or not safe to unpack.
        DownloadError: the disk is too small.
    """
    aside = target.with_name(f".{target.name}.unpacking")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        with zipfile.ZipFile(archive) as zipped:
            members = zipped.infolist()
            for member in members:
                _check_member(member)
            _require_space(target.parent, sum(member.file_size for member in members))
            for member in tqdm(members, desc=f"unpack {target.name}", unit="file"):
                zipped.extract(member, aside)  # compares the CRC on its way
        source = aside / target.name if find_scenes(aside / target.name) else aside
        if not find_scenes(source):
            raise zipfile.BadZipFile("holds no scene")
        if hasattr(os, "sync"):
            os.sync()  # the new name must not reach the disk before the files do
        os.replace(source, target)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def main(argv=None):
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kdutils.download", description="Download 12Scenes. " + LICENCE)
    parser.add_argument("names", nargs="+", choices=BUILDINGS, metavar="NAME", help=", ".join(BUILDINGS))
    parser.add_argument("--folder", default=data_folder() / "scenes", help="where the scenes go (default: %(default)s)")
    parser.add_argument("--i-accept-the-licence", action="store_true", help="do not ask; " + LICENCE)
    parser.add_argument("--base-url", default=BASE_URL, help="address of the zip files (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        for name in options.names:
            print(download(name, options.folder, options.i_accept_the_licence or None, options.base_url))
    except DownloadError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _agree(folder, accept, ask):
    remembered = folder / ".12scenes-licence-accepted"
    if accept is None and remembered.exists():
        return
    if accept is None:
        try:
            accept = ask(f"{LICENCE}\nDo you accept them? [yes/no] ").strip().lower() in ("y", "yes")
        except EOFError:  # nobody is there to answer
            accept = False
    if not accept:
        raise DownloadError(folder, "the licence of 12Scenes is not accepted", "read it; --i-accept-the-licence agrees")
    artefacts.write_text(remembered, f"{LICENCE}\nAccepted on {date.today()}.\n")


def _fetch_once(url, part):
    note = _note(part)
    known = _read_note(note, url) if part.exists() else {}
    have = _size(part) if known else 0  # bytes of unknown origin cannot be continued
    if have and have == known["size"]:
        return
    validator = known.get("etag") or known.get("last_modified")
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and validator and not validator.startswith("W/"):  # a weak ETag must not be used with If-Range
        headers["If-Range"] = validator
    try:
        response = urlopen(Request(url, headers=headers), timeout=TIMEOUT_S)
    except HTTPError as error:
        if error.code != 416:
            raise
        _remove(part)
        raise ConnectionError("the file on the server is now shorter than our part of it") from error
    with response:
        start, size = _extent(response)
        fresh = {"url": url, "size": size, "etag": response.headers.get("ETag"),
                 "last_modified": response.headers.get("Last-Modified")}  # fmt: skip
        if response.status == 206 and (start != have or fresh != known):
            _remove(part)
            raise ConnectionError("the file changed on the server, starting over")
        if response.status != 206:
            _remove(part)
            have = 0
            artefacts.write_json(note, fresh)
        _require_space(part.parent, (size or 0) - have)
        _copy(response, part, have, size)
    if size is not None and _size(part) != size:
        raise ConnectionError(f"the connection ended after {_size(part)} of {size} bytes")


def _copy(response, part, have, size):
    bar = tqdm(desc=part.name.removesuffix(".part"), total=size, initial=have, unit="B", unit_scale=True)
    with bar, part.open("ab") as file:
        while chunk := response.read(1 << 16):
            file.write(chunk)
            bar.update(len(chunk))


def _extent(response):
    """First byte and whole size (None if not told) of the file that a response carries."""
    if response.status == 206:
        match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if not match:
            return None, None
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


def _check_member(member):
    name, kind = member.orig_filename, stat.S_IFMT(member.external_attr >> 16)
    path = PureWindowsPath(name)  # knows drives and both kinds of slashes
    if path.drive or path.root or ".." in path.parts or "\0" in name:
        raise zipfile.BadZipFile(f"member {name!r} would leave the folder")
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        raise zipfile.BadZipFile(f"member {name!r} is a link or a device")


def _require_space(folder, needed):
    free = shutil.disk_usage(folder).free - SPARE_BYTES
    if needed > free:
        raise DownloadError(folder, f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free", "make room there")


def _read_note(note, url):
    try:
        known = artefacts.read_json(note)
        return known if known["url"] == url and "size" in known else {}
    except (artefacts.ArtefactError, KeyError, TypeError):
        return {}


def _note(part):
    return part.with_name(part.name + ".json")


def _remove(part):
    part.unlink(missing_ok=True)
    _note(part).unlink(missing_ok=True)


def _size(path):
    return path.stat().st_size if path.exists() else 0


if __name__ == "__main__":
    sys.exit(main())
