"""DUSt3R as a teacher for whole scenes: each image is encoded once, and memory grows neither with images nor pairs."""

import tempfile
from collections import OrderedDict

import numpy as np
import torch

from kdutils import artefacts, dust3r
from kdutils.teachers import PairPointmaps
from kdutils.training import gains_from_half

# Set by measurement on two CPU cores: larger batches gain nothing there, and cost memory.
CPU_TOKENS = 1536  # of the images that are decoded together: two of 512 x 384
CPU_BYTES = 160 * 2**20  # for each of the two kinds of results that are remembered
CUDA_SHARE = 0.15  # the same, of the device's memory
CUDA_BYTES_PER_PIXEL = 4096  # of one pair in the DPT head, generously
MOST_BATCH = 32  # more should gain little
CUDA_ENCODED = 8  # images that are encoded together: one alone keeps a GPU waiting for its kernels' launches
LARGEST_HALF = 65504


class DUSt3RTeacher:
    """DUSt3R as a teacher, see ``kdutils.teachers``.

    The answer about a pair does not depend on what was asked before: images are encoded one by one, or on CUDA always
    with the same neighbours, and a call's pairs are always cut into the same batches. So a run that was killed and goes
    on ends with the same files.

    Args:
        frames: ``frames.image`` is ``(N, H, W, 3)`` uint8 RGB, or a list of N such images of various sizes; all sides
            are multiples of 16.
        model: a ``dust3r.DUSt3R``; the teacher works on its device, with bfloat16 before the heads on CUDA.
        batch: pairs that are decoded together; by default as many as suit the device. Halved when its memory runs out.
        folder: where a nameless file keeps the encoded images that memory has no room for.
        name: what its labels are called; ``compact`` is another DUSt3R than the published one.

    Raises:
        ValueError: an image's size is no multiple of 16.
    """

    def __init__(self, frames, model, batch=None, folder=None, name="dust3r"):
        self.images, self.model, self.name = frames.image, model, name
        self.device = model.enc_norm.weight.device
        self.is_half = gains_from_half(self.device, ("cuda",))
        sizes = {image.shape[:2] for image in self.images}
        for size in sizes:
            dust3r.check_size(size)
        on_cuda = self.device.type == "cuda"
        self.encoded = CUDA_ENCODED if on_cuda and len(sizes) == 1 else 1  # images that are encoded together
        self.largest_batch = MOST_BATCH if on_cuda else 1  # pairs, for the labels' files: whatever memory there is
        largest = max((image.shape[:2] for image in self.images), key=np.prod, default=(1, 1))
        self.batch = batch or fitting_batch(self.device, largest)
        memory = CPU_BYTES
        if on_cuda:
            memory = int(CUDA_SHARE * torch.cuda.get_device_properties(self.device).total_memory)
        self._tokens = Remembered(self._encode, memory, folder)
        self._finest = Remembered(self._finest_of, memory)

    def settings(self):
        """What the predictions depend on; ``sha256`` is the start of the checkpoint file's digest."""
        return {"teacher": self.name, "checkpoint": self.model.checkpoint, "sha256": self.model.digest,
                "precision": "bfloat16" if self.is_half else "float32"}  # fmt: skip

    def scratch_bytes(self, images):
        """Disk space, in bytes, that the encoded images may take while the teacher is at work."""
        groups = {image // self.encoded for image in images}
        kept = (image for k in groups for image in self.images[k * self.encoded : (k + 1) * self.encoded])
        tokens = sum(np.prod(image.shape[:2]) // dust3r.PATCH**2 for image in kept)
        return int(tokens) * self.model.enc_norm.weight.numel() * (2 if self.is_half else 4)

    def __call__(self, pairs):
        """``PairPointmaps`` of pairs ``(P, 2)`` in half precision; scale is arbitrary, points are in view i's frame.

        Raises:
            ValueError: the images are not of one size; `predictions` is for those.
        """
        pairs = np.asarray(pairs).reshape(-1, 2)
        sizes = {self.images[image].shape[:2] for image in np.unique(pairs)}
        if len(sizes) > 1:
            raise ValueError(f"images of several sizes, {sorted(sizes)}: crop them alike, or use predictions()")
        size = next(iter(sizes), (0, 0))
        points_i, points_j = (np.empty((len(pairs), *size, 3), np.float16) for _ in range(2))
        confidence_i, confidence_j = (np.empty((len(pairs), *size), np.float16) for _ in range(2))
        for which, halves in self._one_behind(pairs):
            points_i[which], confidence_i[which] = halves["pts3d_1"], halves["conf_1"]
            points_j[which], confidence_j[which] = halves["pts3d_2_in_view1"], halves["conf_2"]
        return PairPointmaps(pairs, points_i, points_j, confidence_i, confidence_j)

    def _one_behind(self, pairs):
        """``predictions`` in half precision on the host; a GPU has the next batch to work on while one is taken."""
        waiting = None
        for which, answer in self.predictions(pairs):
            halves = {name: value.clamp(-LARGEST_HALF, LARGEST_HALF).half().to("cpu", non_blocking=True)
                      for name, value in answer.items()}  # fmt: skip
            copied = torch.cuda.Event() if self.device.type == "cuda" else None
            if copied:
                copied.record(torch.cuda.current_stream(self.device))  # the model's need not be the current device
            if waiting:
                yield _arrived(*waiting)
            waiting = which, halves, copied
        if waiting:
            yield _arrived(*waiting)

    def predictions(self, pairs):
        """Decode pairs ``(P, 2)`` batch by batch; pairs of a batch are alike in both images' sizes.

        Yields:
            Positions in ``pairs`` ``(B,)`` and what ``DUSt3R.decode`` returns for them, on the model's device.
        """
        batches = self._batches(np.asarray(pairs))
        while batches:
            which = batches.pop(0)
            try:
                answer = self._decode(np.asarray(pairs)[which])
            except torch.OutOfMemoryError:
                if len(which) == 1:
                    raise
                torch.cuda.empty_cache()
                self.batch = len(which) // 2
                batches = [which[: self.batch], which[self.batch :], *batches]
            else:
                yield which, answer

    def _batches(self, pairs):
        sizes = [tuple(self.images[image].shape[:2] for image in pair) for pair in pairs]
        alike = [[k for k, size in enumerate(sizes) if size == wanted] for wanted in sorted(set(sizes))]
        return [np.array(group[k : k + self.batch]) for group in alike for k in range(0, len(group), self.batch)]

    @torch.inference_mode()
    def _decode(self, pairs):
        sizes = [self.images[image].shape[:2] for image in pairs[0]]
        tokens = [torch.stack([self._tokens_of(image) for image in view]).float() for view in pairs.T.tolist()]
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_half):
            layers = self.model.decoder_layers(*tokens, *sizes)
        # The head's maps are far larger than the decoder's tokens, and on a CPU gain nothing from a batch.
        step = len(pairs) if self.is_half else 1
        parts = [self._pointmaps(layers, pairs, slice(k, k + step), sizes) for k in range(0, len(pairs), step)]
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    def _pointmaps(self, layers, pairs, part, sizes):
        finest = [self._stacked_finest(view, images) for view, images in enumerate(pairs[part].T.tolist(), 1)]
        return self.model.pointmaps(*([layer[part] for layer in view] for view in layers), *sizes, finest)

    def _stacked_finest(self, view, images):
        known = [self._finest[image, view] for image in images]
        return None if known[0] is None else torch.cat(known)

    def _tokens_of(self, image):
        group, place = divmod(image, self.encoded)
        return self._tokens[group][place]

    def _encode(self, group):
        images = self.images[group * self.encoded : (group + 1) * self.encoded]
        pixels = torch.from_numpy(np.stack(images)).to(self.device).permute(0, 3, 1, 2)
        artefacts.release(self.images)  # no image is read twice
        try:
            return self._encoded(pixels)
        except torch.OutOfMemoryError:
            if len(pixels) == 1:
                raise
        torch.cuda.empty_cache()
        return torch.cat([self._encoded(one) for one in pixels.split(1)])

    def _encoded(self, pixels):
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.is_half):
            tokens = self.model.encode(pixels / 127.5 - 1)
        return tokens.half() if self.is_half else tokens

    def _finest_of(self, image_and_view):
        image, view = image_and_view
        return self.model.finest(self._tokens_of(image)[None], self.images[image].shape[:2], view)


def _arrived(which, halves, copied):
    if copied:
        copied.synchronize()
    return which, halves


def fitting_batch(device, size):
    """Pairs of images of ``size`` (height, width) to decode together; always the same on one machine."""
    if device.type != "cuda":
        return max(1, CPU_TOKENS * dust3r.PATCH**2 // (size[0] * size[1]))
    memory = torch.cuda.get_device_properties(device).total_memory
    fits = memory * (1 - 2 * CUDA_SHARE) / 2 / (size[0] * size[1] * CUDA_BYTES_PER_PIXEL)
    return int(np.clip(fits, 1, MOST_BATCH))


class Remembered:
    """Tensors by key: made at first use, the last used ones kept in memory, the others in a nameless file.

    Args:
        make: gives the tensor (or ``None``) of a key.
        most_bytes: of the tensors in memory.
        folder: of the file; without it, tensors that memory has no room for are made again.
    """

    def __init__(self, make, most_bytes, folder=None):
        self.make, self.most_bytes, self.folder = make, most_bytes, folder
        self._kept, self._bytes = OrderedDict(), 0
        self._file, self._places = None, {}

    def __getitem__(self, key):
        if key not in self._kept:
            self._keep(key, self._read(key) if key in self._places else self.make(key))
        self._kept.move_to_end(key)
        return self._kept[key]

    def _keep(self, key, tensor):
        self._kept[key] = tensor
        self._bytes += tensor.nbytes if tensor is not None else 0
        while self._bytes > self.most_bytes and len(self._kept) > 1:
            oldest, dropped = self._kept.popitem(last=False)
            self._bytes -= dropped.nbytes
            if self.folder is not None and oldest not in self._places:
                self._write(oldest, dropped)

    def _write(self, key, tensor):
        self._file = self._file or tempfile.TemporaryFile(dir=self.folder)
        self._places[key] = self._file.seek(0, 2), tensor.shape, tensor.dtype, tensor.device
        self._file.write(tensor.cpu().numpy())

    def _read(self, key):
        place, shape, dtype, device = self._places[key]
        tensor = torch.empty(shape, dtype=dtype)
        self._file.seek(place)
        self._file.readinto(tensor.numpy())
        return tensor.to(device)
