"""Frames with their labels on the training device, and other views of them: all of it there, without a data loader.

Besides the usual changes there are *novel views*: a frame's depth says how its image would look to a camera that moved.
Where a moved camera looks, the frame is looked up by fixed-point iteration (u = x - flow(u)); what the frame does not
show has no label. Each label remains the world point of the frame's pixel.
"""

import mmap
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

DRAWS = 17  # random numbers that one augmented view takes
NEAREST = 0.1  # metres before a camera
FIXED_POINT_STEPS = 6
MOST_MISSED = 0.7  # pixels
EDGE = 0.05  # share of the depth by which pixels of one surface differ at most
RESIDENT_SHARE = 0.6  # of the device's free memory that examples may take


class Batch(NamedTuple):
    """What a step learns from.

    ``images (B, 3, H, W)`` in [0, 1]; ``points (B, 3, H, W)`` world points in metres; ``mask (B, 1, H, W)`` bool, True
    where there is a label; ``confidence (B, 1, H, W)`` the teacher's; ``pixels (B, 2, H, W)`` where in the frame as it
    was taken each pixel lies, for the frame's ``intrinsics (B, 3, 3)`` and ``poses (B, 4, 4)``, camera-to-world.
    """

    images: torch.Tensor
    points: torch.Tensor
    mask: torch.Tensor
    confidence: torch.Tensor
    pixels: torch.Tensor
    intrinsics: torch.Tensor
    poses: torch.Tensor


@dataclass
class Examples:
    """All frames of a scene with their labels, on the device or, where that is too small, mapped from the disk.

    ``images (N, H, W, 3)`` uint8; ``depth (N, H, W)`` the labels' depth along z in metres; ``mask (N, H, W)`` bool;
    ``confidence (N, H, W)``; ``intrinsics (N, 3, 3)``; ``poses (N, 4, 4)`` camera-to-world.
    """

    images: torch.Tensor
    depth: torch.Tensor
    mask: torch.Tensor
    confidence: torch.Tensor
    intrinsics: torch.Tensor
    poses: torch.Tensor
    device: torch.device = torch.device("cpu")

    @classmethod
    def of(cls, images, depth, mask, confidence, intrinsics, poses, device="cpu"):
        """From arrays, which stay where they are, memory maps included, unless the device has room for them."""
        device = torch.device(device)
        arrays = (images, depth, mask, confidence, np.broadcast_to(intrinsics, (len(images), 3, 3)), poses)
        tensors = [_shared(array) for array in arrays]
        if device.type != "cpu" and sum(tensor.nbytes for tensor in tensors) < RESIDENT_SHARE * free_memory(device):
            tensors = [tensor.to(device) for tensor in tensors]
        return cls(*tensors, device)

    def __len__(self):
        return len(self.images)

    @property
    def size(self):
        """(height, width) in pixels."""
        return tuple(self.images.shape[1:3])

    def __getitem__(self, index):
        """The frames ``index`` (tensor or array), on the device."""
        index = torch.as_tensor(index).to(self.images.device, non_blocking=True)
        chosen = (getattr(self, field.name)[index] for field in fields(self)[:-1])
        return Examples(*(tensor.to(self.device, non_blocking=True) for tensor in chosen), self.device)

    def reduced(self, factor):
        """The same frames with ``factor`` x ``factor`` pixels made one.

        A label's depth is their mean, where all have one and none lies behind an edge: a mean of both sides would be a
        point in the air.
        """
        depth = _blocks(torch.where(self.mask, self.depth.float(), 0), factor)
        nearest, mean = depth.amin(-1), depth.mean(-1)
        mask = (nearest > 0) & (depth.amax(-1) - nearest < EDGE * mean)
        images = F.avg_pool2d(self.images.permute(0, 3, 1, 2).float(), factor).round().byte().permute(0, 2, 3, 1)
        confidence = _blocks(self.confidence, factor).amin(-1)
        shrink = self.intrinsics.new_tensor([1 / factor, 1 / factor, 1])[:, None]
        return Examples(images.contiguous(), torch.where(mask, mean, 0), mask, confidence,
                        shrink * self.intrinsics, self.poses, self.device)  # fmt: skip

    def batch(self):
        """These frames as they were taken."""
        height, width = self.size
        as_taken = torch.eye(2, 3, device=self.device).expand(len(self), 2, 3)
        grid = F.affine_grid(as_taken, (len(self), 1, height, width), align_corners=False)
        return self._seen_through(grid, self._pictures())

    def augmented(self, draws, rotation=4.0, zoom=0.1, shift=0.06, colour=0.15, blur=0.0, travel=0.0, look=0.0):
        """Another view of the same pixels: image and labels turn, zoom, shift together; the world points stay.

        There is no mirroring: it would show a room that does not exist.

        Args:
            draws: ``(B, DRAWS)`` numbers in [-1, 1].
            rotation: largest turn in the image plane, degrees. zoom: largest, as the logarithm of a scale. shift:
                largest, as a share of half the image. colour: of brightness, contrast, channels. blur: largest share
                that is blurred, or sharpened.
            travel, look: the camera itself moves by up to so many metres along each axis and turns by so many degrees
                to the sides (novel views); a quarter of the frames stays where it is.
        """
        height, width = self.size
        draws = draws.to(self.device, non_blocking=True)
        angle, scale, shifts = torch.deg2rad(rotation * draws[:, 0]), (zoom * draws[:, 1]).exp(), shift * draws[:, 2:4]
        cosine, sine, aspect = scale * angle.cos(), scale * angle.sin(), width / height
        rows = [torch.stack([cosine, -sine / aspect, shifts[:, 0]], -1),
                torch.stack([sine * aspect, cosine, shifts[:, 1]], -1)]  # fmt: skip
        grid = F.affine_grid(torch.stack(rows, 1), (len(self), 1, height, width), align_corners=False)
        seen = None
        if travel or look:
            moving = (draws[:, 11:12] > -0.5).float()
            grid, seen = self._moved(grid, travel * moving * draws[:, 12:15], look * moving * draws[:, 15:17])
        turned = F.grid_sample(self._pictures(), grid, padding_mode="border", align_corners=False)
        batch = self._seen_through(grid, recoloured(turned, draws[:, 4:11], colour, blur))
        return batch if seen is None else batch._replace(mask=batch.mask & seen)

    def labelled_points(self, index=None, most=200_000):
        """Labelled world points ``(M, 3)`` of the frames ``index``, or of all, thinned evenly to about ``most``."""
        numbers = range(len(self)) if index is None else torch.as_tensor(index).tolist()
        every = max(1, sum(int(self.mask[number].sum()) for number in numbers) // most)
        # Copies, for a slice would keep all of its frame's points in memory.
        return torch.cat([self._points_of(number)[::every].clone() for number in numbers])

    def _points_of(self, number):
        batch = self[[number]].batch()
        return batch.points.permute(0, 2, 3, 1)[batch.mask[:, 0]]

    def _pictures(self):
        return self.images.permute(0, 3, 1, 2).float() / 255

    def _moved(self, grid, travel, look):
        """Where in the frames a camera that moved sees what it sees at ``grid``, and whether the frame shows it."""
        depth = filled(self.depth.float()[:, None], self.mask[:, None].float())
        flow = view_flow(depth, self.intrinsics.float(), travel, turn(look))
        there = grid.permute(0, 3, 1, 2)
        target = there
        for _ in range(FIXED_POINT_STEPS):
            there = target - _sampled(flow, there)
        missed = _scaled(there + _sampled(flow, there) - target, *self.size) / 2
        # Not norm(dim=1), which takes a CPU a tenth of a training step.
        return there.permute(0, 2, 3, 1), torch.hypot(*missed.split(1, 1)) < MOST_MISSED

    def _seen_through(self, grid, images):
        # Nearest: a mean of two depths across an edge would lie on neither surface.
        labels = torch.stack([self.depth.float(), self.mask.float(), self.confidence.float()], 1)
        depth, mask, confidence = F.grid_sample(labels, grid, mode="nearest", align_corners=False).split(1, 1)
        pixels = _scaled((grid.permute(0, 3, 1, 2) + 1) / 2, *self.size)
        points = world_points(pixels, depth, self.intrinsics.float(), self.poses.float())
        return Batch(images, points, mask > 0.5, confidence, pixels, self.intrinsics.float(), self.poses.float())


def recoloured(images, draws, colour, blur):
    """Images ``(B, 3, H, W)`` in another light; ``draws (B, 7)`` in [-1, 1]."""
    gain, contrast, channels, brightness, sharpness = draws[:, :, None, None].split((1, 1, 3, 1, 1), 1)
    mean = images.mean((2, 3), keepdim=True)
    images = (images - mean) * (1 + colour * contrast) + mean
    images = images * (1 + colour * (gain + 0.4 * channels)) + 0.3 * colour * brightness
    if blur:
        images = images + blur * sharpness * (F.avg_pool2d(images, 3, 1, 1, count_include_pad=False) - images)
    return images.clamp(0, 1)


def view_flow(depth, intrinsics, travel, rotation):
    """How far each pixel moves in the image, in units of ``grid_sample``, when the camera moves and then turns.

    Args:
        depth: ``(B, 1, H, W)``, positive. intrinsics: ``(B, 3, 3)``. travel: ``(B, 3)`` metres in the camera's
            axes. rotation: ``(B, 3, 3)``, from the old to the new axes.

    Returns:
        ``(B, 2, H, W)``.
    """
    count, _, height, width = depth.shape
    whole = F.affine_grid(torch.eye(2, 3, device=depth.device).expand(count, 2, 3), depth.shape, align_corners=False)
    place = whole.permute(0, 3, 1, 2)
    still = torch.eye(4, device=depth.device).expand(count, 4, 4)
    points = world_points(_scaled((place + 1) / 2, height, width), depth, intrinsics, still) - travel[:, :, None, None]
    image = torch.einsum("bij,bjhw->bihw", intrinsics @ rotation, points)
    return _scaled(image[:, :2] / image[:, 2:].clamp(min=NEAREST), 1 / height, 1 / width) * 2 - 1 - place


def turn(look):
    """Rotations ``(B, 3, 3)`` by ``look (B, 2)`` degrees about the image's vertical and horizontal axes."""
    radians = torch.deg2rad(look)
    about_y, about_x = radians.unbind(-1)
    zero, angle = torch.zeros_like(about_x), radians.norm(dim=-1)[:, None, None]
    generator = torch.stack([zero, zero, about_y, zero, zero, -about_x, -about_y, about_x, zero], -1)
    generator = generator.unflatten(-1, (3, 3))
    # Rodrigues' formula: torch's matrix_exp would wait for the device.
    first, second = torch.sinc(angle / torch.pi), torch.sinc(angle / (2 * torch.pi)) ** 2 / 2
    return torch.eye(3, device=look.device) + first * generator + second * generator @ generator


def filled(depth, known, levels=6):
    """Depth ``(B, 1, H, W)`` whose holes take the mean of what is known around them, at ever coarser levels."""
    pyramid, depth = [], torch.where(known > 0, depth, 0)
    for _ in range(levels):
        pyramid.append((depth, known))
        weight = F.avg_pool2d(known, 2, ceil_mode=True)
        depth = F.avg_pool2d(depth * known, 2, ceil_mode=True) / weight.clamp(min=1e-6)
        known = (weight > 0).float()
    typical = (depth * known).sum((2, 3), keepdim=True) / known.sum((2, 3), keepdim=True).clamp(min=1)
    depth = torch.where(known > 0, depth, typical.clamp(min=NEAREST))
    for fine, known in reversed(pyramid):
        coarse = F.interpolate(depth, fine.shape[-2:], mode="bilinear", align_corners=False)
        depth = torch.where(known > 0, fine, coarse)
    return depth


def _scaled(places, height, width):
    """Places ``(B, 2, H, W)``, x before y, with each axis multiplied by a number of its own."""
    return torch.stack([places[:, 0] * width, places[:, 1] * height], 1)


def _sampled(flow, there):
    return F.grid_sample(flow, there.permute(0, 2, 3, 1), padding_mode="border", align_corners=False)


def world_points(pixels, depth, intrinsics, poses):
    """World points ``(B, 3, H, W)`` of ``pixels (B, 2, H, W)`` at ``depth (B, 1, H, W)`` along z."""
    rays = F.pad(pixels, (0, 0, 0, 0, 0, 1), value=1.0)
    to_world = poses[:, :3, :3] @ torch.linalg.inv_ex(intrinsics)[0]  # _ex: does not wait for the device
    return torch.einsum("bij,bjhw->bihw", to_world, rays * depth) + poses[:, :3, 3, None, None]


def free_memory(device):
    """Free bytes of a device; Apple's GPUs share the host's memory."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else float("inf")


def _blocks(maps, factor):
    """Maps ``(N, H, W)`` as ``(N, H / factor, W / factor, factor²)``."""
    rows = maps.unflatten(1, (-1, factor)).unflatten(3, (-1, factor))
    return rows.permute(0, 1, 3, 2, 4).flatten(3)


def _shared(array):
    if isinstance(array, torch.Tensor):
        return array
    array = np.asanyarray(array)
    if array.dtype == np.float64:
        array = array.astype(np.float32)
    # A read-only map cannot become a tensor, so it is mapped again, copy on write: nothing of it is ever written.
    if isinstance(getattr(array, "base", None), mmap.mmap):
        array = np.memmap(array.filename, array.dtype, "c", array.offset, array.shape)
    return torch.from_numpy(array if array.flags.writeable else array.copy())
