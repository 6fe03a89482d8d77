"""Training one student on one scene's labels: everything on the device, within a budget of steps or of seconds.

Batches and augmentation are a function of seed and step alone, so a run that was killed goes on exactly where it was.
Started by torchrun, several processes share each batch (Hugging Face Accelerate joins them).
"""

import copy
import math
import os
import time
import zlib
from dataclasses import asdict, dataclass

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from kdutils import artefacts, losses, optimisers, students
from kdutils.augmentation import DRAWS
from kdutils.settings import Augmentation, Recipe, recipe_of

RANK, RANKS = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))  # torchrun's
STRETCHES = 4  # of a training sequence, at most, that are held out


class TrainingError(RuntimeError):
    """Training cannot go on; the message names the run, the cause and a remedy."""


def split_validation(sequence, share):
    """Training and validation frames: each training sequence is cut evenly, and the end of each piece held out.

    Stretches, because the neighbours of a video's frame are nearly that frame; several, because a single one shows one
    corner of the scene and picks the checkpoint that is best there.

    Args:
        sequence: ``(N,)`` sequence number of each frame; 0 is the test sequence.
        share: of each training sequence, to hold out.

    Returns:
        Two index arrays; a sequence of one frame is learned from.
    """
    train, validation = [np.zeros(0, int)], [np.zeros(0, int)]
    for name in np.unique(sequence[sequence > 0]):
        members = np.flatnonzero(sequence == name)
        if len(members) == 1:
            train.append(members)
            continue
        held_out = max(1, round(len(members) * share))
        pieces = min(STRETCHES, held_out)
        for piece, few in zip(np.array_split(members, pieces), np.array_split(range(held_out), pieces)):
            train.append(piece[: -len(few)])
            validation.append(piece[-len(few) :])
    return np.concatenate(train), np.concatenate(validation)


@dataclass(frozen=True)
class Plan:
    """How one student learns, and how long: to the end of its ``steps`` or ``seconds``, whichever comes first."""

    recipe: Recipe
    steps: int
    seconds: float | None
    batch: int
    validations: int
    seed: int
    augmentation: Augmentation | None = None
    reduction: int = 1
    bfloat16: tuple[str, ...] = ("cuda",)
    compile: bool = False
    deterministic: bool = False


def arm_seed(study_seed, arm):
    """Each arm has its own seed, so that no two arms are the same run by construction."""
    return zlib.crc32(f"{study_seed} {arm}".encode())


def plan_for(study, arm):
    """The preset's plan for one arm (``settings.Arm``)."""
    preset, recipe = study.preset, recipe_of(arm)
    seconds = preset.seconds and preset.seconds * arm.budget
    return Plan(recipe, max(1, round(preset.steps * arm.budget)), seconds, preset.batch, preset.validations,
                arm_seed(study.seed, arm.name), preset.augmentation if recipe.augmented else None,
                preset.reduction, preset.bfloat16, preset.compile, preset.deterministic)  # fmt: skip


def run_arm(study, arm, examples, train_index, validation_index, inputs, weights="auto", progress=None, plan=None):
    """Train one arm, or find it trained, or go on where it was killed.

    Args:
        study, arm: ``settings.Study`` and ``settings.Arm``.
        examples: ``augmentation.Examples``, all of the scene's, for the study's device.
        train_index, validation_index: frames to learn from and to pick the checkpoint by.
        inputs: digest of the labels; a run on other labels, or on other frames, is made anew.
        weights: see ``students.find_weights``.
        progress: callable(done, total, text), in steps, or in seconds where those are the budget.
        plan: by default the preset's.

    Returns:
        The trained student (its best checkpoint) and the run's manifest.

    Raises:
        TrainingError: the loss is no longer finite, or a batch does not fit into the device's memory.
    """
    folder, plan = study.run_folder(arm.name), plan or plan_for(study, arm)
    torch.manual_seed(plan.seed)
    uncertainty = losses.needs_uncertainty(plan.recipe.loss)
    student, origin = students.build(arm, examples.size, weights, study.preset.vit_blocks, uncertainty)
    settings = {"arm": asdict(arm), "plan": asdict(plan), "inputs": inputs, "size": list(examples.size),
                "vit_blocks": study.preset.vit_blocks, "weights": origin.note, "device": study.device.type,
                "split": artefacts.digest([np.asarray(part).tolist() for part in (train_index, validation_index)]),
                "weights_digest": origin.path and artefacts.file_digest(origin.path)}  # fmt: skip
    student.to(study.device, memory_format=torch.channels_last)  # also when found: other layouts round otherwise
    kept = folder / "student.safetensors"
    if artefacts.manifest_matches(folder / "student.json", settings) and artefacts.is_whole(kept):
        student.load_state_dict(load_file(kept, device=str(study.device)))
        return student.eval(), artefacts.read_json(folder / "student.json")
    if arm.start != "scratch":
        print(f"{arm.name}: starts from {origin.note}")
    student.place(examples.labelled_points(train_index))
    run = _Run(folder, settings, student, plan, progress)
    try:
        run.fit(examples, torch.as_tensor(train_index), torch.as_tensor(validation_index))
    except torch.OutOfMemoryError as error:
        height, width = examples.size
        raise TrainingError(
            f"{arm.name}: batches of {plan.batch} images of {width}x{height} do not fit into the memory of "
            f"{study.device}. In kdutils/settings.py lower the preset's batch, or leave this arm out of its "
            "first_scene_arms; students that are finished are kept."
        ) from error
    manifest = {"settings": settings, "best_step": run.best["step"], "best_validation_mse": run.best["mse"],
                "history": run.history, "seconds": run.seconds, "steps": run.step,
                "images_per_second": run.step * min(plan.batch, len(train_index)) / run.learning_seconds,
                "weights_origin": origin.origin}  # fmt: skip
    if RANK == 0:
        for stale in ("metrics.json", "student.json", "student.onnx", "student-8bit.onnx"):
            artefacts.discard(folder / stale)
        save_student(student, kept)
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
        self.student, self.plan = student, plan
        self.digest = artefacts.digest({**settings, "format": 4})  # of the state on disk: others are not gone on with
        self.progress = progress or (lambda *_: None)
        self.loss, self.device = losses.choose(plan.recipe.loss), next(student.parameters()).device
        self.state_path = folder / "training.pt"
        folder.mkdir(parents=True, exist_ok=True)
        self.step, self.history, self.seconds, self.learning_seconds = 0, [], 0.0, 0.0
        self.best = {"mse": math.inf, "step": 0, "student": None, "coarse": False}
        self.coarse = plan.recipe.coarse if plan.reduction > 1 else 0
        self.optimisers = optimisers.choose(student, plan.recipe)
        # Not torch's AveragedModel, which makes the device wait for its counter in every step.
        self.mean, self.averaged = copy.deepcopy(student) if plan.recipe.averaged else None, 0
        self._resume()

    def fit(self, examples, train_index, validation_index):
        """Learn to the budget's end, at first from smaller images where the recipe says so."""
        coarse = examples.reduced(self.plan.reduction) if self.coarse else None
        torch.backends.cudnn.benchmark = not self.plan.deterministic
        torch.backends.cudnn.benchmark_limit = 3  # ten by default: each search takes time from a budget in seconds
        torch.use_deterministic_algorithms(self.plan.deterministic, warn_only=True)
        self.learner = _joined(torch.compile(self.student) if self.plan.compile else self.student, self.device)
        self.started, self.before = time.perf_counter(), self.seconds
        done = self._done()
        due, summed, count, shown = self._next_validation(done), 0.0, 0, 0.0
        while done < 1:
            seen = coarse if done < self.coarse else examples
            summed, count = summed + self._learn(seen, train_index, done), count + 1
            self.step += 1
            if time.perf_counter() - shown > 1:  # asking for the loss makes the device's queue run dry
                shown = time.perf_counter()
                self._report(done, f"loss {float(summed) / count:.4f}")
            done = self._done()
            if done >= due:
                loss = float(summed) / count  # waits for the device, so that its seconds are counted
                self.learning_seconds += time.perf_counter() - self.started - (self.seconds - self.before)
                began = time.perf_counter()
                self._validate(coarse if done < self.coarse else examples, validation_index, loss, done)
                due, summed, count = self._next_validation(done, time.perf_counter() - began), 0.0, 0
        self.student.load_state_dict(self.best["student"])

    def _done(self):
        """The share of the budget that is used up, the same in every process: all have to ask equally often."""
        by_steps = self.step / self.plan.steps
        if not self.plan.seconds:
            return by_steps
        spent = self.before + time.perf_counter() - self.started
        return max(by_steps, _agreed(spent / self.plan.seconds, self.device))

    def _next_validation(self, done, last=0.0):
        """The share of the budget at which the next validation is due; the last one took so many seconds."""
        due = (math.floor(done * self.plan.validations + 1e-9) + 1) / self.plan.validations
        if self.plan.seconds and len(self.history) > 1:  # validations take a tenth at most; the first one warms up
            due = max(due, done + _agreed(10 * last / self.plan.seconds, self.device))
        return min(1, due)

    def _learn(self, examples, train_index, done):
        generator = torch.Generator().manual_seed(hash((self.plan.seed, self.step)) % 2**63)
        mine = slice(RANK, None, RANKS)
        chosen = train_index[_batch(len(train_index), self.plan, self.step)]
        batch = examples[chosen[mine]]
        if self.plan.augmentation:
            draws = 2 * torch.rand(len(chosen), DRAWS, generator=generator) - 1
            batch = batch.augmented(draws[mine], **asdict(self.plan.augmentation))
        else:
            batch = batch.batch()
        self.student.train()
        with half_precision(self.device, self.plan.bfloat16):
            prediction = self.learner(batch.images.contiguous(memory_format=torch.channels_last))
        loss = self.loss(prediction, batch)
        self.student.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(self.plan.recipe, done)
            optimiser.step()
        if self.mean is not None and done >= max(0.5, self.coarse):
            self._average()
        return loss.detach()

    def _average(self):
        """Move the mean towards the latest weights: over about the last tenth of the steps, however many there are."""
        share = 10 / (self.averaged + 10)  # polynomial-decay averaging (Shamir and Zhang, arXiv 1212.1824, section 4)
        both = list(zip(self.mean.state_dict().values(), self.student.state_dict().values()))
        means, weights = zip(*(pair for pair in both if pair[0].is_floating_point()))
        torch._foreach_lerp_(means, weights, share)
        for counted, count in both:
            if not counted.is_floating_point():
                counted.copy_(count)
        self.averaged += 1

    def _validate(self, examples, validation_index, train_loss, done):
        student = self.mean if self.averaged else self.student
        train_loss = _agreed(train_loss, self.device)
        mse = _agreed(validation_mse(student, examples, validation_index), self.device)
        if not math.isfinite(train_loss + mse):
            raise TrainingError(
                f"{self.state_path.parent.name}: the loss is no longer finite at step {self.step}. "
                "Check the labels or lower the learning rate; the state of the last validation is kept."
            )
        self.history.append({"step": self.step, "train_loss": train_loss, "validation_mse": mse})
        coarse = done < self.coarse
        if mse < self.best["mse"] or self.best["coarse"] and not coarse:  # other images' errors are no match
            state = {name: tensor.clone() for name, tensor in student.state_dict().items()}
            self.best = {"mse": mse, "step": self.step, "student": state, "coarse": coarse}
        self.seconds = self.before + time.perf_counter() - self.started
        self._report(done, f"loss {train_loss:.4f}, validation {mse:.4f} m²")
        if RANK == 0:
            self._save()

    def _report(self, done, text):
        rate = self.plan.batch * self.step / max(self.before + time.perf_counter() - self.started, 1e-9)
        total = self.plan.seconds or self.plan.steps
        if RANK == 0:
            self.progress(min(total, round(done * total)), total, f"{text}, {rate:.0f} images/s")

    def _save(self):
        state = {"settings": self.digest, "step": self.step, "seconds": self.seconds,
                 "learning_seconds": self.learning_seconds, "history": self.history, "best": self.best,
                 "student": self.student.state_dict(), "optimisers": [one.state_dict() for one in self.optimisers],
                 "mean": self.mean and self.mean.state_dict(), "averaged": self.averaged}  # fmt: skip
        artefacts.write_aside(self.state_path, lambda aside: torch.save(state, aside))

    def _resume(self):
        if not self.state_path.exists():
            return
        state = torch.load(self.state_path, map_location=self.device, weights_only=True)
        if state["settings"] != self.digest:
            return
        self.student.load_state_dict(state["student"])
        for optimiser, kept in zip(self.optimisers, state["optimisers"]):
            optimiser.load_state_dict(kept)
        if self.mean:
            self.mean.load_state_dict(state["mean"])
            self.averaged = state["averaged"]
        self.step, self.history, self.best = state["step"], state["history"], state["best"]
        self.seconds, self.learning_seconds = state["seconds"], state["learning_seconds"]


def learning_rate(recipe, done):
    """Constant, or a linear warm-up over a twentieth of the budget and then half a cosine to zero.

    Args:
        done: share of the budget that is used up, in [0, 1].
    """
    warm_up = 0.05
    if recipe.schedule == "constant":
        return recipe.learning_rate
    if done < warm_up:
        return recipe.learning_rate * (0.02 + done) / (0.02 + warm_up)
    return recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * (done - warm_up) / (1 - warm_up)))


def _agreed(number, device):
    """The first process's number, in every process, so that all draw the same conclusion."""
    if RANKS == 1:
        return number
    number = torch.tensor(number, device=device)
    torch.distributed.broadcast(number, 0)
    return float(number)


def _joined(student, device):
    """The student as it is, or joined with its copies in the other processes that torchrun started."""
    if RANKS == 1:
        return student
    from accelerate import Accelerator  # not everywhere, and needed only here

    return Accelerator(cpu=device.type == "cpu").prepare_model(student)


def half_precision(device, kinds=("cuda",)):
    """bfloat16 on these kinds of device; weights, heads' ends and losses stay in single precision."""
    return torch.autocast(device.type, torch.bfloat16, enabled=gains_from_half(device, kinds))


def gains_from_half(device, kinds):
    """Whether a device is of one of these kinds, and made for bfloat16.

    A CPU that has no instructions for it trains in it some 2.5 times as slowly as in single precision; a GPU from
    before Ampere only imitates them.
    """
    if device.type not in kinds:
        return False
    if device.type == "cpu":
        return any(there for name, there in torch.cpu.get_capabilities().items() if "bf16" in name)
    return device.type != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False)


def _batch(count, plan, step):
    """Indices of the step's examples: shuffled epochs, one after the other."""
    batch = min(plan.batch, count)
    per_epoch = count // batch
    epoch, place = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(plan.seed + epoch))
    return order[place * batch : (place + 1) * batch]


@torch.no_grad()
def validation_mse(student, examples, index):
    """Mean squared error per coordinate in m² over the frames ``index``, as they were taken."""
    student.eval()
    squared = count = 0
    for part in torch.as_tensor(index).split(_frames_at_once(examples.size)):
        frames = examples[part].batch()
        with half_precision(examples.device):
            points = student(frames.images).points
        squared += float(torch.where(frames.mask, (points - frames.points) ** 2, 0).sum())
        count += 3 * int(frames.mask.sum())
    return squared / max(count, 1)


@torch.no_grad()
def predict(student, images):
    """A ``students.Prediction`` on the CPU for images ``(N, H, W, 3)`` uint8."""
    student.eval()
    device, parts = student.centre.device, []
    for part in images.split(_frames_at_once(images.shape[1:3])):
        with half_precision(device):
            prediction = student(part.to(device).permute(0, 3, 1, 2).float() / 255)
        parts.append([None if tensor is None else tensor.cpu() for tensor in prediction])
    points, log_scales = zip(*parts)
    return students.Prediction(torch.cat(points), None if log_scales[0] is None else torch.cat(log_scales))


def _frames_at_once(size):
    """As many as a full-resolution network's activations leave room for."""
    return min(32, max(1, 2_000_000 // (size[0] * size[1])))
