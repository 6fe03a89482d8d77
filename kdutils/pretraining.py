"""What the two pretraining recipes share (``compact``, ``backbones``): the loop, its state on disk, and the end of it.

A step is a function of seed and step number alone, so a run that was killed goes on exactly where it was. One that has
ended goes on as well, where it is given a larger budget: a second stage, whose schedule begins anew (a warm restart:
Loshchilov and Hutter, ICLR 2017). Its settings name all stages and where their schedules began.
"""

import math
import time
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from kdutils import artefacts, evaluation, shipped
from kdutils.settings import REPOSITORY, pick_device
from kdutils.training import TrainingError, learning_rate

OF_A_STAGE = ("steps", "seconds", "validations", "distillation")  # of a plan: may differ where an ended run goes on


class Run:
    """One pretraining, whose state is kept on disk at every validation.

    Args:
        folder: of the state, ``training.pt``.
        settings: what the run depends on besides the plan; a state of others is not gone on with.
        model: what learns. plan: ``settings.Pretraining``.
        progress: callable(done, total, text), in steps, or in seconds where those are the budget.
    """

    def __init__(self, folder, settings, model, plan, progress=None):
        lasting = {name: value for name, value in asdict(plan).items() if name not in OF_A_STAGE}
        self.state_path = Path(folder) / "training.pt"
        self.digest = artefacts.digest({**settings, "plan": lasting, "format": 3})
        self.depends_on, self.model, self.plan = settings, model, plan
        self.progress = progress or (lambda *_: None)
        learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimiser = torch.optim.AdamW(learning, lr=plan.learning_rate, betas=(0.9, 0.95),
                                           weight_decay=plan.weight_decay, fused=True)  # fmt: skip
        self.step, self.seconds, self.history, self.plans = 0, 0.0, [], []
        self._resume()
        last = self.plans[-1] if self.plans else {}
        here = {"step": self.step, "seconds": self.seconds}
        self.stage = last if last == {**last, **asdict(plan)} else {**asdict(plan), "began_at": here}

    @property
    def settings(self):
        """What made the model: the ``plan`` that it last learned by, and ``earlier_plans`` where there were any."""
        *earlier, last = self.plans
        return {**self.depends_on, "plan": last, **({"earlier_plans": earlier} if earlier else {})}

    def fit(self, loss_of, validate):
        """Learn to the end of the budget.

        Args:
            loss_of: callable(step, generator) that gives a step's loss; the generator is the step's own.
            validate: callable() that gives a dict of figures for the log.

        Returns:
            The log: a list of dicts with ``step``, ``seconds``, ``loss`` (mean since the entry before) and the figures.

        Raises:
            TrainingError: the loss is no longer finite.
        """
        started, before = time.perf_counter(), self.seconds
        summed, count, shown, done = 0.0, 0, 0.0, self._done()
        due = self._next_validation(done)
        while done < 1:
            generator = torch.Generator().manual_seed(hash((self.plan.seed, self.step)) % 2**63)
            loss = loss_of(self.step, generator)
            self._learn(loss, done)
            self.step, summed, count = self.step + 1, summed + loss.detach(), count + 1
            self.seconds = before + time.perf_counter() - started
            if time.perf_counter() - shown > 1:  # asking for the loss makes the device's queue run dry
                shown = time.perf_counter()
                self._report(done, f"loss {float(summed) / count:.4f}")
            done = self._done()
            if done >= due:
                self._note(float(summed) / count, validate, done)
                due, summed, count = self._next_validation(done), 0.0, 0
        return self.history

    def _learn(self, loss, done):
        for group in self.optimiser.param_groups:
            group["lr"] = learning_rate(self.plan, done)
        self.optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()

    def _done(self):
        """Share of the stage's budget that is used up."""
        began = self.stage["began_at"]
        by_steps = _share(began["step"], self.step, self.plan.steps)
        by_time = _share(began["seconds"], self.seconds, self.plan.seconds) if self.plan.seconds else 0
        return max(by_steps, by_time)

    def _next_validation(self, done):
        return min(1, (math.floor(done * self.plan.validations + 1e-9) + 1) / self.plan.validations)

    def _note(self, loss, validate, done):
        if not math.isfinite(loss):
            raise TrainingError(f"{self.state_path.parent.name}: the loss is no longer finite at step {self.step}. "
                                "Lower the learning rate; the state of the last validation is kept.")  # fmt: skip
        self.model.eval()
        with torch.inference_mode():
            figures = validate()
        self.model.train()
        entry = {"step": self.step, "seconds": round(self.seconds, 1), "loss": loss, **figures}
        self.history.append(entry)
        if self.plans[-1:] != [self.stage]:
            self.plans.append(self.stage)
        self._report(done, ", ".join(f"{name} {value:.4g}" for name, value in entry.items()))
        state = {"settings": self.digest, "plans": self.plans, "step": self.step, "seconds": self.seconds,
                 "history": self.history, "model": self.model.state_dict(),
                 "optimiser": self.optimiser.state_dict()}  # fmt: skip
        artefacts.write_aside(self.state_path, lambda aside: torch.save(state, aside))

    def _report(self, done, text):
        plan, began = self.plan, self.stage["began_at"]
        total = plan.seconds - began["seconds"] if plan.seconds else plan.steps - began["step"]
        rate = plan.batch * self.step / max(self.seconds, 1e-9)
        self.progress(min(total, round(done * total)), total, f"{text}, {rate:.0f}/s")

    def _resume(self):
        if not self.state_path.exists():
            return
        device = next(self.model.parameters()).device
        state = torch.load(self.state_path, map_location=device, weights_only=True)
        if state["settings"] != self.digest:
            return
        self.model.load_state_dict(state["model"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.step, self.seconds, self.history, self.plans = (state[k] for k in ("step", "seconds", "history", "plans"))


def _share(begin, now, end):
    return 1 if now >= end else (now - begin) / (end - begin)


@contextmanager
def precision(device, bfloat16):
    """A forward pass in bfloat16 if so wished, and with the attention kernels that are fast then."""
    # In bfloat16 the fused attention of torch's CPU code is slower than the plain one.
    kernels = [SDPBackend.MATH] if device.type == "cpu" else [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]
    with torch.autocast(device.type, torch.bfloat16, enabled=bfloat16), sdpa_kernel(kernels):
        yield


@torch.no_grad()
def whiten(embedding, images):
    """Start a patch embedding as principal components of the patches of images ``(B, 3, H, W)`` in [0, 1].

    The network is to take images in [-1, 1]. Components come out with like spread, the last ones, mostly noise, less.
    """
    patch = embedding.kernel_size
    patches = F.unfold(2 * images - 1, patch, stride=patch).transpose(1, 2).flatten(0, 1)
    mean = patches.mean(0)
    _, spread, components = torch.linalg.svd(patches - mean, full_matrices=False)
    count = min(len(embedding.weight), len(spread))
    spread = spread[:count] / len(patches) ** 0.5
    weight = components[:count] / (spread + 0.3 * spread[count // 10])[:, None]
    embedding.weight[:count] = weight.view(count, *embedding.weight.shape[1:])
    embedding.bias[:count] = -weight @ mean


class Log:
    """Progress as lines, every half minute and at the end."""

    def __init__(self, every=30):
        self.every, self.shown = every, 0.0

    def __call__(self, done, total, text=""):
        if time.perf_counter() - self.shown > self.every or text.startswith("step"):
            self.shown = time.perf_counter()
            print(f"{done}/{total}  {text}", flush=True)


def options(parser, plans, argv):
    """The recipes' common options; ``plan`` becomes the ``settings.Pretraining`` that was asked for."""
    parser.add_argument("--plan", choices=plans, help="by default the device's: cuda, else cpu")
    parser.add_argument("--steps", type=int, help="in the place of the plan's")
    parser.add_argument("--seconds", type=float, help="in the place of the plan's; 0 for no limit")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=REPOSITORY / "data" / "pretraining", help="of state and weights")
    parser.add_argument("--rooms", type=Path, help="a folder that keeps rendered rooms; by default one in the run's")
    parser.add_argument("--ship", action="store_true", help="put the weights into data/weights, where the study looks")
    chosen = parser.parse_args(argv)
    if chosen.steps is not None and chosen.steps < 1:
        parser.error("--steps: at least one")
    chosen.device = pick_device(chosen.device)
    name = chosen.plan or ("cuda" if chosen.device.type == "cuda" else "cpu")
    given = {key: getattr(chosen, key) for key in ("steps", "seconds") if getattr(chosen, key) is not None}
    chosen.plan = replace(plans[name], seed=chosen.seed, **given)
    chosen.rooms = chosen.rooms or chosen.folder / "rooms"
    return chosen


def folder_of(name, options):
    """Where a run keeps its state: each seed has a folder of its own."""
    return options.folder / f"{name}-seed{options.seed}"


def finish(name, model, log, settings, options, trained_on, config=None):
    """Write the weights with their card: beside the run's state, or where the study finds them."""
    home = shipped.WEIGHTS if options.ship else folder_of(name, options)
    card = {"trained_on": trained_on, "settings": settings, "seconds": log[-1]["seconds"],
            "machine": evaluation.machine(options.device), "validation": log[-1], "log": log}  # fmt: skip
    shipped.write(home / name, model, card, config)
    print(f"{home / name}: " + ", ".join(f"{key} {value:.4g}" for key, value in log[-1].items()))
