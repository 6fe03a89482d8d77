"""What a camera sees of a scene: surfaces, their colour and light, images."""

import torch

from kdutils.rooms.light import look_up_light
from kdutils.rooms.solids import FACES, face_sizes, locate, matmul3, pixel_rays, trace
from kdutils.rooms.textures import albedo


def surface_points(scene, pose, rays, depth, primitive):
    """Where the rays of one view end on their primitives.

    Args:
        pose: ``(4, 4)``.
        rays: ``(3, H, W)``, camera frame, z = 1.
        depth, primitive: ``(H, W)``.

    Returns:
        Face ``(N,)`` as row of a (P * 6) table and coordinates in [-1, 1] along the face ``(2, N)``, N = H * W.
    """
    camera = (rays * depth).reshape(3, -1)
    primitive = primitive.reshape(-1)
    matrix, offset = scene.unit_map()
    matrix, offset = matmul3(matrix, pose[:3, :3]), (matrix * pose[:3, 3]).sum(-1) + offset
    table = torch.cat([matrix, offset[..., None]], 2).reshape(-1, 12).T.contiguous()
    rows = table.index_select(1, primitive).reshape(3, 4, -1)
    unit = rows[:, 0] * camera[0] + rows[:, 1] * camera[1] + rows[:, 2] * camera[2] + rows[:, 3]
    face, uv = locate(scene.shape.index_select(0, primitive), unit)
    return primitive * FACES + face, uv


def shade(scene, pose, rays, depth, primitive):
    """Linear RGB ``(3, H, W)`` of one view; arguments as in `surface_points`."""
    face, uv = surface_points(scene, pose, rays, depth, primitive)
    half = face_sizes(scene).reshape(-1, 2).T.contiguous().index_select(1, face)
    material = scene.material.reshape(-1).index_select(0, face)
    light, glow = look_up_light(scene, face, uv), scene.glow.index_select(0, material)
    return (albedo(scene, face, uv, half, material) * (light + (1 - light) * glow)).reshape(3, *depth.shape)


def picture(scene, poses, intrinsics, size):
    """Images ``(F, H, W, 3)`` uint8, each pixel the mean of two rays."""
    height, width = size
    images = []
    rays = pixel_rays(intrinsics, 2 * height, width, True)
    for pose, depth, primitive in zip(poses, *trace(scene, poses, intrinsics, (2 * height, width), True)):
        linear = shade(scene, pose, rays, depth, primitive).reshape(3, height, 2, width).mean(2).permute(1, 2, 0)
        # A soft shoulder keeps lamps and windows from clipping flat.
        images.append((255 * (1 - (-1.55 * linear.clamp_min(0)).exp()) ** (1 / 2.2) + 0.5).clamp(0, 255).byte())
    return torch.stack(images)
