"""The interactive cloud in a real browser: are the points and the cameras on the canvas?"""

import numpy as np
import pytest
from browser import needs_browser, screenshot, share_near
from conftest import box_world
from matplotlib.colors import to_rgb

from kdutils import figures

GREEN = (0, 153, 51)  # a colour that the palette has
RED = tuple(round(255 * c) for c in to_rgb(figures.TEST))
pytestmark = needs_browser


@pytest.mark.parametrize("count, cameras", [(4000, 3), (0, 0)])
def test_points_and_cameras_are_seen_and_nothing_else(tmp_path, count, cameras):
    world = box_world(4, (40, 50), step=1.0)
    points = world.points.reshape(-1, 3)[:count]
    colours = np.broadcast_to(np.array(GREEN, np.uint8), points.shape)
    view = (world.poses[:cameras], world.intrinsics, (40, 50)) if cameras else ()
    figures.cloud(points, colours, *view).write_html(tmp_path / "cloud.html", include_plotlyjs=True)
    picture = screenshot(tmp_path / "cloud.html", tmp_path / "cloud.png")
    assert picture.shape == (600, 900, 3)
    assert (share_near(picture, GREEN) > 0.002) == (count > 0), share_near(picture, GREEN)
    assert (share_near(picture, RED) > 0.0001) == (cameras > 0), share_near(picture, RED)
    assert share_near(picture, (255, 255, 255)) > 0.5
