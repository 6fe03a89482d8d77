"""A real browser without a screen, to see whether what is drawn by WebGL is really there."""

import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

NAMES = ("chromium", "chromium-browser", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
needs_browser = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")
FLAGS = (
    "--headless", "--no-sandbox", "--use-angle=swiftshader", "--enable-unsafe-swiftshader", "--hide-scrollbars",
    "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update",
    "--disable-sync", "--disable-dev-shm-usage", "--force-device-scale-factor=1",
)  # fmt: skip


def screenshot(html_path, png_path, size=(900, 600), milliseconds=8000):
    """Open a page, let its scripts run for so long (of the page's own time), and take its picture.

    Args:
        html_path: the page's file. png_path: where the picture goes. size: (width, height) of the window.

    Returns:
        The picture ``(H, W, 3)`` uint8.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = [BROWSER, *FLAGS, f"--user-data-dir={profile}", f"--window-size={size[0]},{size[1]}",
                   f"--virtual-time-budget={milliseconds}", f"--screenshot={png_path}",
                   Path(html_path).resolve().as_uri()]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert Path(png_path).exists(), done.stderr
    return np.asarray(Image.open(png_path).convert("RGB"))


def share_near(picture, colour, tolerance=40):
    """Share of the picture's pixels within ``tolerance`` of a colour ``(3,)``, in every channel."""
    return float((np.abs(picture.astype(int) - colour) <= tolerance).all(-1).mean())
