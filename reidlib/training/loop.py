"""The training loop: one run in one folder, stopped and resumed without a trace.

    folder = train(make_recipe("demo"))

`prepare` finds out all that is known before the first step, `State` (in `checkpoint`) is all that a step
changes, `Journal` writes down what happens. What is left is the loop, on one screen: `_steps`.
"""

import math
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from reidlib import runs
from reidlib.data.augment import Augmentation
from reidlib.data.pixels import load_images, load_training_images
from reidlib.data.sampler import PKSampler
from reidlib.data.tables import Dataset, fingerprint, hold_out, load
from reidlib.model.device import autocast, fast_at_bfloat16, pick_device, resolve_precision
from reidlib.model.weights import build_model, save_weights
from reidlib.paths import outputs_dir
from reidlib.progress import progress
from reidlib.recipes import Recipe
from reidlib.training.checkpoint import State, load_checkpoint
from reidlib.training.journal import Journal
from reidlib.training.losses import LOSSES

Resume = Literal["auto", "previous", "never", "restart"]


@dataclass(frozen=True, eq=False)
class Plan:
    """All that is known of a training before its first step; nothing is written yet.

    Attributes:
        recipe: the settings, their precision resolved.
        tag: appended to the run's name.
        device: where the network is.
        folder: of the run.
        table: the training images, N rows.
        pixels: (N, H, W, 3) uint8.
        data: the fingerprint of the table.
        held_out: pixels and table of the queries and of the gallery held out; () if nobody is.
        steps: how many the whole training has.
        epoch: how many steps an epoch has.
    """

    recipe: Recipe
    tag: str
    device: torch.device
    folder: Path
    table: pd.DataFrame
    pixels: np.ndarray
    data: str
    held_out: tuple[tuple[np.ndarray, pd.DataFrame], ...]
    steps: int
    epoch: int

    def sampler(self) -> PKSampler:
        """Return the sampler as it is before the first batch."""
        recipe = self.recipe
        return PKSampler(self.table["pid"], recipe.p, recipe.k, recipe.epoch, recipe.seed)

    def augmentation(self) -> Augmentation:
        """Return the augmentation as it is before the first batch."""
        r = self.recipe
        size = (r.height, r.width)
        return Augmentation(size, r.enlarge, r.flip, r.erasing, r.normalise, r.seed)


def prepare(
    recipe: Recipe,
    tag: str = "",
    *,
    device: str = "auto",
    dataset: Dataset | None = None,
    show_progress: bool = True,
) -> Plan:
    """Load the data, take the held-out people out of it, and find out how long training will be.

    Args:
        recipe: all settings.
        tag: appended to the run's name, so that runs of the same variant stand side by side.
        device: `"auto"`, `"cpu"`, `"cuda"`, …
        dataset: an already loaded data set; by default the recipe's is loaded.
        show_progress: draw a bar while images are decoded.

    Raises:
        ValueError: data that does not suit the recipe.
    """
    target = pick_device(device)
    recipe = resolve_precision(recipe, target)
    if recipe.precision == "bfloat16" and fast_at_bfloat16(target) is False:
        print(
            "This processor has no instructions for bfloat16 and emulates it, many times "
            'slower than float32: precision = "float32" or "auto" avoids that.',
            file=sys.stderr,
            flush=True,
        )
    dataset = dataset or load(recipe.dataset)
    folder = outputs_dir() / runs.run_name(dataset.name, recipe, tag)
    table, held_out = dataset.train, ()
    if recipe.hold_out:
        # The same identities whatever the run's seed, so that runs can be compared on them.
        table, *others = hold_out(table, recipe.hold_out, seed=0)
        held_out = tuple(load_images(one, recipe, show_progress) for one in others)
    pixels, table = load_training_images(table, recipe, show_progress)
    epoch = len(PKSampler(table["pid"], recipe.p, recipe.k, recipe.epoch))
    steps = recipe.steps or recipe.epochs * epoch
    data = fingerprint(table)
    return Plan(recipe, tag, target, folder, table, pixels, data, held_out, steps, epoch)


def train(
    recipe: Recipe | Plan,
    tag: str = "",
    resume: Resume = "auto",
    device: str = "auto",
    dataset: Dataset | None = None,
    show_progress: bool = True,
) -> Path:
    """Train one run to its last step, and return its folder.

    Ctrl-C and SIGTERM end the step under way, write a checkpoint, and leave by KeyboardInterrupt or
    SystemExit; a kill loses what came after the last checkpoint.

    Args:
        recipe: all settings; or what `prepare` returned, and then tag, device and dataset are its.
        tag, device, dataset: as in `prepare`.
        resume: `"auto"` goes on with a run of this name if there is one, from its last checkpoint;
            `"previous"` from the checkpoint before that; `"never"` refuses to touch an existing run;
            `"restart"` deletes it and starts again.
        show_progress: draw progress bars.

    Raises:
        ValueError: data that does not suit the recipe; a run of this name with other settings
            (names what differs); a broken checkpoint (names the one before).
        FileExistsError: the run exists and `resume` is `"never"`.
        TrainingFailed: NaN or infinite loss or weights; the last checkpoint is from before.
        RuntimeError: another process is writing this run.

    >>> from reidlib.recipes import make_recipe
    >>> recipe = make_recipe("demo", hold_out=0, height=32, width=16, p=4, k=2, steps=1)
    >>> run = train(recipe, tag="one_step", show_progress=False)
    >>> (run / "weights.safetensors").exists()
    True
    """
    if resume not in ("auto", "previous", "never", "restart"):
        raise ValueError(f"resume = {resume!r}: choose auto, previous, never or restart.")
    plan = recipe
    if isinstance(recipe, Recipe):
        options = {"device": device, "dataset": dataset, "show_progress": show_progress}
        plan = prepare(recipe, tag, **options)
    with runs.lock(plan.folder):
        checkpoint = _existing(plan, resume)
        # A released run has its weights and no checkpoint.
        whole = checkpoint is None or checkpoint["step"] >= plan.steps
        if whole and _finished(plan.folder):
            print(
                f"{plan.folder.name} was trained before, with these settings and data, and is left as "
                'it is. To train it again, give another tag, or resume = "restart" to replace it.'
            )
            return plan.folder
        state = _start(plan, checkpoint)
        reproduce = reproduce_command(plan.recipe, plan.tag)
        with stop_signals() as stop, Journal(plan, state, reproduce) as journal:
            journal.begin()
            _steps(plan, state, journal, stop, show_progress)
            save_weights(plan.folder / "weights.safetensors", state.model, plan.recipe)
            journal.finish()
    return plan.folder


def _existing(plan: Plan, resume: Resume) -> dict | None:
    """Return the checkpoint to go on from, after comparing the settings; None for a new run."""
    known = (plan.folder / "manifest.json").exists()
    left = [*plan.folder.glob("*.safetensors"), *plan.folder.glob("checkpoint*.pt")]
    if not known and not left:
        return None  # the manifest is written before the first step, so nothing was trained
    if resume == "restart":
        # Also without a manifest: a checkpoint that stayed would be taken for one of the new run.
        _clear(plan.folder)
        return None
    if not known:
        raise ValueError(
            f"{plan.folder} holds {left[0].name} and no manifest.json, so nobody can say how it was "
            "trained. Give another tag, or move that folder away."
        )
    if resume == "never":
        raise FileExistsError(f"The run {plan.folder} exists. Give another tag.")
    before, now = runs.read_recipe(plan.folder).model_dump(), plan.recipe.model_dump()
    before["data fingerprint"] = runs.read_json(plan.folder / "manifest.json")["train_data"]
    now["data fingerprint"] = plan.data
    differ = [f"{k}: {before[k]!r} there, {now[k]!r} now" for k in now if before[k] != now[k]]
    if differ:
        raise ValueError(
            f"The run {plan.folder.name} was made with other settings ({'; '.join(differ)}). "
            f'Give another tag, or resume="restart" to delete it and train again.'
        )
    last, previous = (plan.folder / f"checkpoint{which}.pt" for which in ("", "_previous"))
    if resume == "previous":
        return load_checkpoint(previous)
    # No checkpoint yet: killed before the first one. An absent one with an older one left is not that.
    return load_checkpoint(last) if last.exists() or previous.exists() else None


def _clear(folder: Path) -> None:
    """Delete the files of a run; the lock that is held stays."""
    for path in folder.iterdir():
        if path.is_file() and path.name != ".lock":
            path.unlink()


def _finished(folder: Path) -> bool:
    manifest, weights = folder / "manifest.json", folder / "weights.safetensors"
    there = manifest.is_file() and weights.is_file()
    return there and runs.read_json(manifest)["status"] == "finished"


def _start(plan: Plan, checkpoint: dict | None) -> State:
    """Make all that a step changes, fresh or as the checkpoint says."""
    torch.manual_seed(plan.recipe.seed)
    model = build_model(plan.recipe, pretrained=checkpoint is None)
    model.to(plan.device, memory_format=torch.channels_last).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=plan.recipe.lr, fused=True)
    state = State(model, optimiser, plan.sampler(), plan.augmentation())
    if checkpoint:
        state.load_state_dict(checkpoint)
    return state


def _steps(plan: Plan, state: State, journal: Journal, stop: "Stop", show_progress: bool) -> None:
    """Train from the state's step to the last one."""
    recipe = plan.recipe
    pids = torch.tensor(plan.table["pid"].to_numpy(), device=plan.device)
    pixels = _where_they_fit(plan)
    words = {"desc": plan.folder.name, "unit": "step", "show": show_progress}
    bar = progress(total=plan.steps, initial=state.step, **words)
    started = time.monotonic() - state.seconds
    for rows in _batches(state.sampler, plan.steps - state.step):
        # (P·K, H, W, 3) uint8 -> (P·K, 3, h, w)
        batch = state.augmentation(pixels[rows.to(pixels.device)].to(plan.device))
        lr = recipe.learning_rate(state.step, plan.steps)
        for group in state.optimiser.param_groups:
            group["lr"] = lr
        # (P·K, 3, h, w) -> (P·K, D)
        with autocast(plan.device, recipe.precision):
            emb = state.model(batch.contiguous(memory_format=torch.channels_last))
        result = _loss(recipe, emb, pids[rows.to(pids.device)])
        state.step += 1
        if not math.isfinite(result.loss.item()):
            journal.fail("the loss")
        state.optimiser.zero_grad(set_to_none=True)
        (result.total if recipe.reduction == "sum" else result.loss).backward()
        state.optimiser.step()
        bar.update()

        state.seconds = time.monotonic() - started
        stopping = stop.signal is not None  # asked once: a signal may come at any line
        journal.after_step(result, lr, stopping)
        bar.set_postfix_str(journal.in_short, refresh=False)
        if stopping and state.step < plan.steps:
            bar.close()
            journal.write_manifest("stopped")
            stop.leave(f"Stopped after step {state.step} of {plan.steps}; run it again to go on.")
    bar.close()


def _batches(sampler: PKSampler, steps: int) -> Iterator[Tensor]:
    """Yield row numbers (P·K,) of so many batches, epoch after epoch."""
    while steps > 0:
        for rows in sampler:
            yield torch.from_numpy(rows)
            steps -= 1
            if steps == 0:
                return


def _loss(recipe: Recipe, emb: Tensor, pids: Tensor):
    options = {"mean": recipe.mean} if recipe.loss == "batch_all" else {}
    return LOSSES[recipe.loss](emb, pids, recipe.margin, squared=recipe.squared, **options)


def _where_they_fit(plan: Plan) -> Tensor:
    """Return the pixels, on the device where they fit beside the network: no transfer in a step."""
    if plan.device.type == "cpu":
        return torch.from_numpy(plan.pixels)
    pixels = torch.from_numpy(np.ascontiguousarray(plan.pixels))
    return pixels.to(plan.device) if pixels.nbytes < 4e9 else pixels


def reproduce_command(recipe: Recipe, tag: str = "") -> str:
    """Return the command that makes the run again: the settings that are not the defaults."""
    default = Recipe()
    words = ["python -m reidlib train"]
    for key, value in recipe.model_dump().items():
        if value != getattr(default, key) and value is not None:
            words.append(f"--{key.replace('_', '-')} {shlex.quote(str(value))}")
    return " ".join(words + ([f"--tag {tag}"] if tag else []))


class Stop:
    """The first signal that asked to stop."""

    signal: int | None = None

    def leave(self, message: str) -> None:
        """Leave as the signal would have it: KeyboardInterrupt, or exit status 143."""
        print(message, flush=True)
        if self.signal == signal.SIGINT:
            raise KeyboardInterrupt(message)
        raise SystemExit(128 + self.signal)


@contextmanager
def stop_signals():
    """Make the first Ctrl-C or SIGTERM a request to stop after the step; the next acts at once."""
    stop = Stop()
    before = {}

    def ask(number, _frame):
        stop.signal = number
        signal.signal(number, before[number])

    try:
        for number in (signal.SIGINT, signal.SIGTERM):
            before[number] = signal.getsignal(number)
            signal.signal(number, ask)
    except ValueError:
        pass  # not the main thread, where Python takes no handlers
    try:
        yield stop
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is ask:
                signal.signal(number, handler)
