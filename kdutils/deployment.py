"""Students where there is no torch: files for ONNX Runtime, which runs on phones and single-board computers too.

A file takes one image ``(1, 3, H, W)`` in [0, 1], of the size that the student learned from, and gives world points
``(1, 3, H, W)`` in metres; where the student says how unsure it is, the logarithm of that as well, ``(1, 1, H, W)``.
"""

import shutil
import tempfile
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import torch
from onnxruntime import InferenceSession, SessionOptions
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import nn

from kdutils import artefacts, evaluation, students

INPUT, OUTPUTS = "image", ("points", "log_scale")
QUANTISED = ("Conv", "MatMul")  # where the work and the weights are; the rest stays at 32 bits
SCOPES = "pkg.torch.onnx.name_scopes"  # under which torch notes the modules that an operation comes from


class _Said(nn.Module):
    """A student that answers with what it says alone: a file has no None."""

    def __init__(self, student):
        super().__init__()
        self.student = student

    def forward(self, image):
        return tuple(part for part in self.student(image) if part is not None)


def export(student, path):
    """Write a trained student, which is on the CPU, as a file; its batch norms become part of the convolutions."""
    said, image = _Said(students.deployed(student)), torch.zeros(1, 3, *student.size)
    names = OUTPUTS[: len(said(image))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's exporter, about its own parts
        program = torch.onnx.export(said, (image,), input_names=[INPUT], output_names=names, verbose=False)
    artefacts.write_aside(path, program.save)


def quantise(path, to, images):
    """Write a student's file once more, with weights and activations of eight bits: ONNX Runtime's static quantisation.

    Its first convolution and its head stay at 32 bits: eight divide a room of five metres into steps of two
    centimetres. Each channel's weights have a scale of their own. They use seven of their eight bits, as a processor
    without VNNI adds products of full ones in 16 bits, which overflow.

    Args:
        path, to: files. images: ``(N, H, W, 3)`` uint8 that show how large each activation becomes (calibration).
    """
    with tempfile.TemporaryDirectory() as folder:
        ready, small = Path(folder) / "ready.onnx", Path(folder) / "small.onnx"
        quant_pre_process(path, ready, skip_symbolic_shape=True, skip_optimization=True)  # by torch's exporter already
        quantize_static(ready, small, _Calibration(images), op_types_to_quantize=QUANTISED, per_channel=True,
                        reduce_range=True, activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
                        nodes_to_exclude=_precise(onnx.load(ready).graph.node))  # fmt: skip
        artefacts.write_aside(to, partial(shutil.copyfile, small))


def _precise(nodes):
    """Names of the operations that stay at 32 bits: those of the head, and the first convolution."""
    scopes = {node.name: {entry.key: entry.value for entry in node.metadata_props}.get(SCOPES, "") for node in nodes}
    first = next(node.name for node in nodes if node.op_type == "Conv")
    return [first, *(name for name, scope in scopes.items() if "'student.head'" in scope)]


class _Calibration(CalibrationDataReader):
    def __init__(self, images):
        self.images = iter(images)

    def get_next(self):
        image = next(self.images, None)
        return None if image is None else _as_input(image)


class Runner:
    """A student's file, run on the CPU.

    Args:
        path: of the file. threads: that it may take.

    Raises:
        ArtefactError: there is no such file, or it is damaged.
        ValueError: images of another size than the student's.
    """

    def __init__(self, path, threads=1):
        options = SessionOptions()
        options.intra_op_num_threads = threads
        try:
            self.session = InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise artefacts.ArtefactError(f"{path}: no student for ONNX Runtime ({error}). Export it anew.") from error
        self.size = tuple(self.session.get_inputs()[0].shape[2:])

    def __call__(self, images):
        """World points ``(N, H, W, 3)`` for images ``(N, H, W, 3)`` uint8, and log-scales ``(N, H, W)`` or None."""
        if images.shape[1:3] != self.size:
            raise ValueError(f"images of {images.shape[2]}x{images.shape[1]} pixels, where the file takes "
                             f"{self.size[1]}x{self.size[0]}: resize them first")  # fmt: skip
        said = [self.session.run(None, _as_input(image)) for image in images]
        points, *scales = (np.concatenate(part) for part in zip(*said))
        return points.transpose(0, 2, 3, 1), scales[0][:, 0] if scales else None

    def latency(self, image, repeats=30):
        """Fewest milliseconds for one image ``(H, W, 3)`` uint8, see ``evaluation.latency``."""
        return evaluation.fewest_milliseconds(partial(self.session.run, None, _as_input(image)), repeats)


def _as_input(image):
    return {INPUT: np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32) / 255}
