"""Training one student on one scene's labels: masked mean squared error, AdamW, cosine schedule.

Batches and augmentation are a function of seed and step alone, so a run that was killed goes on exactly where it was.
"""

import math
import time
import zlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from kdutils import artefacts, students


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the run, the cause and a remedy."""


@dataclass
class Examples:
    """Images with their labels, resident on one device.

    ``images (N, 3, H, W)`` uint8; ``points (N, 3, H, W)`` world points in metres; ``mask (N, 1, H, W)`` bool, True
    where there is a label.
    """

    images: torch.Tensor
    points: torch.Tensor
    mask: torch.Tensor

    @classmethod
    def of(cls, images, points, mask, device="cpu"):
        """From arrays ``images (N, H, W, 3)`` uint8, ``points (N, H, W, 3)`` and ``mask (N, H, W)``."""
        first = (torch.from_numpy(np.array(array)).to(device).permute(0, 3, 1, 2) for array in (images, points))
        return cls(*(array.contiguous() for array in first), torch.from_numpy(np.array(mask)).to(device)[:, None])

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return Examples(self.images[index], self.points[index], self.mask[index])

    def labelled_points(self):
        """All labelled points ``(M, 3)``."""
        return self.points.permute(0, 2, 3, 1)[self.mask[:, 0]]


def split_validation(sequence, share):
    """Training and validation frames: the end of each training sequence is held out.

    Whole stretches, because the neighbours of a video's frame are nearly that frame.

    Args:
        sequence: ``(N,)`` sequence number of each frame; 0 is the test sequence.
        share: of each training sequence, to hold out.

    Returns:
        Two index arrays.
    """
    train, validation = [], []
    for name in np.unique(sequence[sequence > 0]):
        members = np.flatnonzero(sequence == name)
        held_out = max(1, round(len(members) * share))
        train.append(members[:-held_out])
        validation.append(members[-held_out:])
    return np.concatenate(train), np.concatenate(validation)


def masked_mse(predicted, points, mask):
    """Mean squared error per coordinate in m², over labelled pixels (the paper's loss and figure).

    Args:
        predicted, points: ``(B, 3, H, W)`` in metres.
        mask: ``(B, 1, H, W)`` bool.
    """
    squared = torch.where(mask, (predicted - points) ** 2, 0)  # not a product: what is masked may be NaN
    return squared.sum() / (3 * mask.sum().clamp(min=1))


def augment(examples, generator, rotation=4.0, zoom=0.1, shift=0.06, colour=0.15):
    """Another view of the same pixels: image, points and mask turn, zoom, shift together; the points keep their values.

    There is no mirroring: it would show a room that does not exist.

    Args:
        examples: a batch.
        generator: on the CPU, so that every device draws the same.
        rotation: in the image plane, degrees. zoom: largest, as a share. shift: share of the image. colour: gain.

    Returns:
        images ``(B, 3, H, W)`` in [0, 1], points, mask.
    """
    count, device = len(examples), examples.images.device

    def draw(*shape):
        return (2 * torch.rand(count, *shape, generator=generator) - 1).to(device)

    height, width = examples.images.shape[-2:]
    angle, size = torch.deg2rad(rotation * draw()), torch.exp(zoom * draw())
    cosine, sine, aspect = size * angle.cos(), size * angle.sin(), width / height
    motion = shift * draw(2)
    theta = torch.stack(
        [
            torch.stack([cosine, -sine / aspect, motion[:, 0]], -1),
            torch.stack([sine * aspect, cosine, motion[:, 1]], -1),
        ],
        dim=1,
    )
    grid = F.affine_grid(theta, (count, 1, height, width), align_corners=False)
    images = F.grid_sample(examples.images.float() / 255, grid, padding_mode="border", align_corners=False)
    # Nearest: a mean of two points across an edge would lie on neither surface.
    labels = torch.cat([examples.points, examples.mask.float()], dim=1)
    labels = F.grid_sample(labels, grid, mode="nearest", align_corners=False)
    gain = 1 + colour * (draw(1, 1, 1) + 0.4 * draw(3, 1, 1))
    images = (images * gain + 0.3 * colour * draw(1, 1, 1)).clamp(0, 1)
    return images, labels[:, :3], labels[:, 3:] > 0.5


@dataclass(frozen=True)
class Plan:
    """How long and how fast one student learns."""

    steps: int
    batch: int
    learning_rate: float
    weight_decay: float
    validate_every: int
    seed: int


def arm_seed(study_seed, arm):
    """Each arm has its own seed, so that no two arms are the same run by construction."""
    return zlib.crc32(f"{study_seed} {arm}".encode())


def plan_for(study, arm):
    """The preset's plan for one arm (``settings.Arm``)."""
    preset = study.preset
    rate = preset.learning_rates["frozen" if arm.start == "frozen" else arm.backbone]
    return Plan(preset.steps, preset.batch, rate, preset.weight_decay, preset.validate_every,
                arm_seed(study.seed, arm.name))  # fmt: skip


def run_arm(study, arm, examples, train_index, validation_index, inputs, weights="auto", progress=None):
    """Train one arm, or find it trained, or go on where it was killed.

    Args:
        study, arm: ``settings.Study`` and ``settings.Arm``.
        examples: all of the scene's, on the study's device.
        train_index, validation_index: frames to learn from and to pick the checkpoint by.
        inputs: digest of the labels; a run on other labels is made anew.
        weights: see ``students.find_weights``.
        progress: callable(step, steps, text).

    Returns:
        The trained student (its best checkpoint) and the run's manifest.
    """
    folder, plan = study.run_folder(arm.name), plan_for(study, arm)
    torch.manual_seed(plan.seed)
    student, origin = students.build(arm, study.preset.size, weights, study.preset.vit_blocks)
    settings = {"arm": asdict(arm), "plan": asdict(plan), "inputs": inputs, "size": list(study.preset.size),
                "vit_blocks": study.preset.vit_blocks, "weights": origin.note, "device": study.device.type}  # fmt: skip
    student.to(study.device)
    if artefacts.manifest_matches(folder / "student.json", settings):
        student.load_state_dict(load_file(folder / "student.safetensors", device=str(study.device)))
        return student.eval(), artefacts.read_json(folder / "student.json")
    if arm.start != "scratch":
        print(f"{arm.name}: starts from {origin.note}")
    student.place(examples[train_index].labelled_points())
    run = _Run(folder, settings, student, plan, progress)
    seconds = run.fit(examples, torch.as_tensor(train_index), torch.as_tensor(validation_index))
    save_student(student, folder / "student.safetensors")
    manifest = {"settings": settings, "best_step": run.best["step"], "best_validation_mse": run.best["mse"],
                "history": run.history, "seconds": seconds, "weights_origin": origin.origin}  # fmt: skip
    artefacts.write_json(folder / "student.json", manifest)
    run.state_path.unlink(missing_ok=True)
    return student.eval(), manifest


def save_student(student, path):
    """Weights as safetensors, whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in student.state_dict().items()}
    artefacts.write_aside(path, lambda aside: save_file(tensors, aside))


class _Run:
    """The state of one training, kept on disk at every validation."""

    def __init__(self, folder, settings, student, plan, progress):
        self.student, self.plan, self.settings = student, plan, settings
        self.progress = progress or (lambda *_: None)
        self.state_path = folder / "training.pt"
        folder.mkdir(parents=True, exist_ok=True)
        self.step, self.history, self.seconds = 0, [], 0.0
        self.best = {"mse": math.inf, "step": 0, "student": None}
        learning = [p for p in student.parameters() if p.requires_grad]
        self.optimiser = torch.optim.AdamW(learning, lr=plan.learning_rate, weight_decay=plan.weight_decay, fused=True)
        self._resume()

    def fit(self, examples, train_index, validation_index):
        device = examples.images.device
        if device.type == "cuda":
            torch.backends.cudnn.deterministic = True
        self.student.to(memory_format=torch.channels_last)
        validation = examples[validation_index.to(device)]
        started, before, losses = time.perf_counter(), self.seconds, []
        while self.step < self.plan.steps:
            losses.append(self._learn(examples, train_index))
            self.step += 1
            if self.step % self.plan.validate_every == 0 or self.step == self.plan.steps:
                self._validate(validation, float(torch.stack(losses).mean()))
                losses = []
                self.seconds = before + time.perf_counter() - started
                self._save()
        self.student.load_state_dict(self.best["student"])
        return self.seconds

    def _learn(self, examples, train_index):
        generator = torch.Generator().manual_seed(hash((self.plan.seed, self.step)) % 2**63)
        chosen = train_index[_batch(len(train_index), self.plan, self.step)].to(examples.images.device)
        images, points, mask = augment(examples[chosen], generator)
        self.student.train()
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.plan, self.step)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
            predicted = self.student(images.contiguous(memory_format=torch.channels_last))
        loss = masked_mse(predicted, points, mask)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        self.optimiser.step()
        return loss.detach()

    def _validate(self, validation, train_mse):
        if not math.isfinite(train_mse):
            raise TrainingError(
                f"{self.state_path.parent.name}: the loss is no longer finite at step {self.step}. "
                "Check the labels or lower the learning rate; the state of the last validation is kept."
            )
        predicted = predict(self.student, validation.images)
        mse = float(masked_mse(predicted, validation.points, validation.mask))
        self.history.append({"step": self.step, "train_mse": train_mse, "validation_mse": mse})
        if mse < self.best["mse"]:
            state = {name: tensor.clone() for name, tensor in self.student.state_dict().items()}
            self.best = {"mse": mse, "step": self.step, "student": state}
        self.progress(self.step, self.plan.steps, f"validation {mse:.4f} m²")

    def _save(self):
        state = {"settings": artefacts.digest(self.settings), "step": self.step, "seconds": self.seconds,
                 "history": self.history, "best": self.best, "student": self.student.state_dict(),
                 "optimiser": self.optimiser.state_dict()}  # fmt: skip
        artefacts.write_aside(self.state_path, lambda aside: torch.save(state, aside))

    def _resume(self):
        if not self.state_path.exists():
            return
        device = next(self.student.parameters()).device
        state = torch.load(self.state_path, map_location=device, weights_only=True)
        if state["settings"] != artefacts.digest(self.settings):
            return
        self.student.load_state_dict(state["student"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.history, self.seconds = state["step"], state["history"], state["seconds"]
        self.best = state["best"]


def learning_rate(plan, step):
    """Linear warm-up over a twentieth of the steps, then half a cosine to zero."""
    warm_up = max(1, plan.steps // 20)
    if step < warm_up:
        return plan.learning_rate * (step + 1) / warm_up
    return plan.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, plan.steps - warm_up)))


def _batch(count, plan, step):
    """Indices of the step's examples: shuffled epochs, one after the other."""
    batch = min(plan.batch, count)
    per_epoch = count // batch
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(plan.seed + epoch))
    return order[place * batch : (place + 1) * batch]


@torch.no_grad()
def predict(student, images, batch=32):
    """World points ``(N, 3, H, W)`` in metres for images ``(N, 3, H, W)`` uint8."""
    student.eval()
    parts = images.split(batch)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
        return torch.cat([student(part.float() / 255) for part in parts])
