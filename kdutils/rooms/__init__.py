"""Sample rooms: furnished kitchens and offices, endless by seed, written in the 12Scenes layout.

A room is a list of solids that furniture functions put together; everything random about it comes from its kind and
seed. World frame: z up, floor at z = 0, origin at the centre of the floor, metres. A small ray caster shows it, with
procedural textures and light that is computed once a room: on a GPU as on a CPU.
"""

from kdutils.rooms.building import KINDS, Room, build_room, furnish
from kdutils.rooms.files import VERSION, write_room
from kdutils.rooms.pictures import picture
from kdutils.rooms.solids import trace
from kdutils.rooms.views import camera_path, intrinsics_for, render, sensed_depth

__all__ = ["KINDS", "VERSION", "Room", "build_room", "camera_path", "furnish", "intrinsics_for", "picture",
           "render", "sensed_depth", "trace", "write_room"]  # fmt: skip
