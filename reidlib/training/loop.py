"""The training loop: one run in one folder, stopped and resumed without a trace."""

import math
import shlex
import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch

from reidlib import runs
from reidlib.data.augment import Augmentation
from reidlib.data.pixels import load_training_images
from reidlib.data.sampler import PKSampler
from reidlib.data.tables import Dataset, fingerprint, hold_out, load
from reidlib.evaluation.retrieval import Retrieval
from reidlib.look import board
from reidlib.model.device import (
    autocast,
    device_name,
    fast_at_bfloat16,
    pick_device,
    resolve_precision,
)
from reidlib.model.embed import embed
from reidlib.model.weights import build_model, save_weights
from reidlib.paths import outputs_dir
from reidlib.progress import progress
from reidlib.recipes import Recipe
from reidlib.training import health
from reidlib.training.checkpoint import load_checkpoint, save_checkpoint
from reidlib.training.losses import LOSSES, diagnostics


class TrainingFailed(RuntimeError):
    """Training cannot go on: the loss or a weight is not finite."""


class Trainer:
    """One run: what it is made of, and `fit`, which runs it to its end or to where it is stopped.

    Args:
        recipe: all settings.
        tag: appended to the run's name, so that runs of the same variant stand side by side.
        resume: `"auto"` goes on with a run of this name if there is one, from its last checkpoint;
            `"previous"` from the checkpoint before that; `"never"` refuses to touch an existing run;
            `"restart"` deletes it and starts again.
        device: `"auto"`, `"cpu"`, `"cuda"`, …
        dataset: an already loaded data set; by default the recipe's is loaded.
        show_progress: draw progress bars.

    Raises:
        ValueError: data that does not suit the recipe; a run of this name with other settings
            (names what differs); a broken checkpoint (names the one before).
        FileExistsError: the run exists and `resume` is `"never"`.
    """

    def __init__(
        self,
        recipe: Recipe,
        tag: str = "",
        resume: Literal["auto", "previous", "never", "restart"] = "auto",
        device: str = "auto",
        dataset: Dataset | None = None,
        show_progress: bool = True,
    ):
        if resume not in ("auto", "previous", "never", "restart"):
            raise ValueError(f"resume = {resume!r}: choose auto, previous, never or restart.")
        self.device = pick_device(device)
        self.recipe = recipe = resolve_precision(recipe, self.device)
        if recipe.precision == "bfloat16" and fast_at_bfloat16(self.device) is False:
            print(
                "This processor has no instructions for bfloat16 and emulates it, many times "
                'slower than float32: precision = "float32" or "auto" avoids that.',
                file=sys.stderr,
                flush=True,
            )
        self.tag, self.resume, self.show_progress = tag, resume, show_progress
        dataset = dataset or load(recipe.dataset)
        self.folder = outputs_dir() / runs.run_name(dataset.name, recipe, tag)
        table, self.held_out = dataset.train, None
        if recipe.hold_out:
            # The same identities whatever the run's seed, so that runs can be compared on them.
            table, *held_out = hold_out(table, recipe.hold_out, seed=0)
            self.held_out = [load_training_images(t, recipe, show_progress) for t in held_out]
        self.pixels, self.table = load_training_images(table, recipe, show_progress)
        self.fingerprint = fingerprint(self.table)
        self.sampler = PKSampler(self.table["pid"], recipe.p, recipe.k, recipe.epoch, recipe.seed)
        self.steps = recipe.steps or recipe.epochs * len(self.sampler)

    def fit(self) -> Path:
        """Train to the last step and return the run's folder.

        Ctrl-C and SIGTERM end the step under way, write a checkpoint, and leave by
        KeyboardInterrupt or SystemExit; a kill loses what came after the last checkpoint.

        Raises:
            TrainingFailed: NaN or infinite loss or weights; the last checkpoint is from before.
            RuntimeError: another process is writing this run.
        """
        with runs.lock(self.folder):
            checkpoint = self._existing_checkpoint()
            # A released run has its weights and no checkpoint.
            whole = checkpoint is None or checkpoint["step"] >= self.steps
            if whole and self._finished():
                print(
                    f"{self.folder.name} was trained before, with these settings and data, and is left as "
                    'it is. To train it again, give another tag, or resume = "restart" to replace it.'
                )
                return self.folder
            self._start(checkpoint)
            with (
                stop_signals() as stop,
                board.Board(self.folder, self.recipe, self.steps, self.step) as self.board,
            ):
                self._loop(stop)
                self._finish()
        return self.folder

    # --- before the first step

    def _existing_checkpoint(self) -> dict | None:
        """Return the checkpoint to go on from, after comparing the settings; None for a new run."""
        # The manifest is written last: without it the run was killed before its first step.
        if not (self.folder / "manifest.json").exists():
            return None
        if self.resume == "never":
            raise FileExistsError(f"The run {self.folder} exists. Give another tag.")
        if self.resume == "restart":
            for path in self.folder.iterdir():
                if path.is_file() and path.name != ".lock":
                    path.unlink()
            return None
        before, now = runs.read_recipe(self.folder).model_dump(), self.recipe.model_dump()
        manifest = runs.read_json(self.folder / "manifest.json")
        before["data fingerprint"], now["data fingerprint"] = (
            manifest["train_data"],
            self.fingerprint,
        )
        differ = [
            f"{key}: {before[key]!r} there, {now[key]!r} now"
            for key in now
            if before[key] != now[key]
        ]
        if differ:
            raise ValueError(
                f"The run {self.folder.name} was made with other settings ({'; '.join(differ)}). "
                f'Give another tag, or resume="restart" to delete it and train again.'
            )
        last = self.folder / "checkpoint.pt"
        previous = self.folder / "checkpoint_previous.pt"
        if self.resume == "previous":
            return load_checkpoint(previous)
        # No checkpoint yet: killed before the first one. An absent one with an older one left is not that.
        return load_checkpoint(last) if last.exists() or previous.exists() else None

    def _finished(self) -> bool:
        manifest, weights = self.folder / "manifest.json", self.folder / "weights.safetensors"
        there = manifest.is_file() and weights.is_file()
        return there and runs.read_json(manifest)["status"] == "finished"

    def _start(self, checkpoint: dict | None) -> None:
        """Make the model and all that has a state, fresh or as the checkpoint says."""
        recipe = self.recipe
        torch.manual_seed(recipe.seed)
        self.model = build_model(recipe, pretrained=checkpoint is None)
        self.model.to(self.device, memory_format=torch.channels_last).train()
        self.optimiser = torch.optim.Adam(self.model.parameters(), lr=recipe.lr, fused=True)
        size = (recipe.height, recipe.width)
        options = (recipe.enlarge, recipe.flip, recipe.erasing, recipe.normalise, recipe.seed)
        self.augmentation = Augmentation(size, *options)
        self.step, self.best, self.seconds, self.history = 0, None, 0.0, []
        # What the health report needs besides the history. `facts` cannot be seen later.
        images = self.table["pid"].value_counts()
        self.counts = {"identities": len(images), "short": int((images < recipe.k).sum())}
        self.facts, self.said = {}, set()
        if checkpoint:
            self.model.load_state_dict(checkpoint["model"])
            self.optimiser.load_state_dict(checkpoint["optimiser"])
            self.sampler.load_state_dict(checkpoint["sampler"])
            self.augmentation.generator.set_state(checkpoint["augmentation"])
            torch.set_rng_state(checkpoint["torch_random"])
            self.step, self.best = checkpoint["step"], checkpoint["best"]
            self.seconds, self.history = checkpoint["seconds"], checkpoint["history"]
            self.facts = checkpoint.get("facts", {})
            self.said = {finding.name for finding in self._findings(health.AT_ONCE)}
        else:
            # A run without a checkpoint left event files of steps that will come again.
            board.erase(self.folder)
            runs.write_json(self.folder / "config.json", recipe.model_dump())
            if recipe.weights != "none":
                self.facts["fresh"] = health.fresh_layers(self.model.backbone)
            if self.held_out:
                self.facts["before"] = self._held_out_retrieval().evaluate().scores["mAP"]
        self._write_manifest("running")

    # --- the loop

    def _loop(self, stop: "Stop") -> None:
        recipe, first = self.recipe, self.step
        loss_function = LOSSES[recipe.loss]
        options = {"squared": recipe.squared}
        if recipe.loss == "batch_all":
            options["mean"] = recipe.mean
        all_pids = torch.tensor(self.table["pid"].to_numpy())
        # Where the pixels fit beside the network they live on the device: no transfer in a step.
        pixels = torch.from_numpy(self.pixels) if self.device.type == "cpu" else self._on_device()
        started, saved_seconds = time.monotonic(), self.seconds
        since, since_step = started, self.step
        bar = progress(
            total=self.steps,
            initial=first,
            desc=self.folder.name,
            unit="step",
            show=self.show_progress,
        )
        while self.step < self.steps:
            for rows in self.sampler:
                rows = torch.from_numpy(rows)
                batch = self.augmentation(pixels[rows.to(pixels.device)].to(self.device))
                batch = batch.contiguous(memory_format=torch.channels_last)
                lr = recipe.learning_rate(self.step, self.steps)
                for group in self.optimiser.param_groups:
                    group["lr"] = lr
                with autocast(self.device, recipe.precision):
                    emb = self.model(batch)
                result = loss_function(
                    emb, all_pids[rows].to(self.device), recipe.margin, **options
                )
                self.step += 1
                if not math.isfinite(result.loss.item()):
                    self._fail("the loss")
                self.optimiser.zero_grad(set_to_none=True)
                (result.total if recipe.reduction == "sum" else result.loss).backward()
                self.optimiser.step()
                bar.update()

                self.seconds = saved_seconds + time.monotonic() - started
                last = self.step == self.steps
                if self.step % recipe.log_every == 0 or last or self.step == 1:
                    now = time.monotonic()
                    speed = (self.step - since_step) * len(rows) / (now - since)
                    since, since_step = now, self.step
                    self._log(result, lr, speed)
                    bar.set_postfix_str(f"loss {self.history[-1]['loss']:.3f}")
                if self.held_out and (self.step % recipe.evaluate_every == 0 or last):
                    self._score_held_out()
                    since = time.monotonic()
                if self.step % recipe.checkpoint_every == 0 or last or stop.signal:
                    self._checkpoint()
                if stop.signal and not last:
                    bar.close()
                    self._write_manifest("stopped")
                    stop.leave(
                        f"Stopped after step {self.step} of {self.steps}; run it again to go on."
                    )
                if last:
                    break
        bar.close()

    def _on_device(self) -> torch.Tensor:
        pixels = torch.from_numpy(np.ascontiguousarray(self.pixels))
        return pixels.to(self.device) if pixels.nbytes < 4e9 else pixels

    def _log(self, result, lr: float, speed: float) -> None:
        """Add a row to the history and to TensorBoard, and say in plain words what looks wrong."""
        row = {"step": self.step, "epoch": self.step / len(self.sampler), "lr": lr}
        row |= diagnostics(result) | {"images_per_s": speed, "seconds": self.seconds}
        self.history.append(row)
        groups = {"positive_p": "distance/", "negative_p": "distance/", "hardest_": "distance/"}
        for key, value in row.items():
            if key not in ("step", "seconds", "triplets") and math.isfinite(value):
                prefix = next((g for start, g in groups.items() if key.startswith(start)), "")
                self.board.add_scalar(prefix + key, value, self.step)
        if self.step % (10 * self.recipe.log_every) == 0 or self.step == self.steps:
            per_anchor = result.per_anchor[result.per_anchor.isfinite()]
            for name, values in (
                ("distance/positive", result.positives),
                ("distance/negative", result.negatives),
                ("loss_per_anchor", per_anchor),
            ):
                if len(values):
                    self.board.add_histogram(name, values.float().cpu(), self.step)
        for finding in self._findings(health.AT_ONCE):
            if finding.name not in self.said:
                self.said.add(finding.name)
                text = f"Step {self.step}, {finding.name}: {finding.says} ({finding.evidence}.)"
                print(f"{text} Try first: {finding.try_first}", file=sys.stderr, flush=True)

    def _findings(self, checks=health.CHECKS, failed: str = "") -> list[health.Finding]:
        return health.report(
            self.history, self.recipe, checks, failed=failed, **self.counts, **self.facts
        )

    def _held_out_retrieval(self) -> Retrieval:
        options = {"precision": self.recipe.precision, "show_progress": False}
        embedded = []
        for pixels, table in self.held_out:
            embedded += [embed(self.model, pixels, self.recipe, **options), table]
        return Retrieval(*embedded)

    def _score_held_out(self) -> None:
        """Score retrieval among the held-out identities; remember the best."""
        retrieval = self._held_out_retrieval()
        evaluation = retrieval.evaluate()
        scores = evaluation.scores
        # Without paths, which are this machine's: `query` is the row in what `hold_out` returns.
        table = evaluation.per_query.drop(columns="path")
        runs.write_text(self.folder / "per_query_held_out.csv", table.to_csv(index=False))
        for key in ("mAP", "top1"):
            self.history[-1][f"held_out_{key}"] = scores[key]
            self.board.add_scalar(f"held_out/{key}", scores[key], self.step)
        try:
            self.board.add_ranked_lists("held_out", retrieval, evaluation, self.step)
        except (OSError, ValueError) as error:  # images moved away meanwhile: no reason to stop
            text = f"Step {self.step}: no ranked lists for TensorBoard. {error}"
            print(text, file=sys.stderr, flush=True)
        if self.best is None or scores["mAP"] > self.best["mAP"]:
            self.best = {"step": self.step, "mAP": scores["mAP"], "top1": scores["top1"]}
            save_checkpoint(self.folder / "checkpoint_best.pt", self._state(), keep_previous=False)

    def _state(self) -> dict:
        return {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimiser": self.optimiser.state_dict(),
            "sampler": self.sampler.state_dict(),
            "augmentation": self.augmentation.generator.get_state(),
            "torch_random": torch.get_rng_state(),
            "best": self.best,
            "seconds": self.seconds,
            "history": self.history,
            "facts": self.facts,
        }

    def _checkpoint(self) -> None:
        if not all(value.isfinite().all() for value in self.model.state_dict().values()):
            self._fail("a weight")
        self.board.flush()
        save_checkpoint(self.folder / "checkpoint.pt", self._state())
        table = pd.DataFrame(self.history)
        runs.write_text(self.folder / "history.csv", table.to_csv(index=False))

    def _fail(self, what: str) -> None:
        where = f"At step {self.step} {what}"
        self._write_manifest("failed", where)
        found = self._findings(health.AT_ONCE, where)
        print(health.as_text(found), file=sys.stderr, flush=True)
        kept = (self.folder / "checkpoint.pt").exists()
        raise TrainingFailed(
            f"At step {self.step} {what} became NaN or infinite, so training stopped"
            + (" (checkpoint.pt is from before). " if kept else ". ")
            + f"Try a lower learning rate (now lr = {self.recipe.lr:g})"
            + (', precision = "float32"' if self.recipe.precision != "float32" else "")
            + (", squared = False" if self.recipe.squared else "")
            + ", or normalise = 'imagenet' if pixels come unscaled."
        )

    # --- after the last step

    def _finish(self) -> None:
        save_weights(self.folder / "weights.safetensors", self.model, self.recipe)
        if self.best:
            last = {k: v for k, v in self.history[-1].items() if k.startswith("held_out_")}
            scores = {"before_mAP": self.facts.get("before"), "best": self.best, "last": last}
            runs.update_json(self.folder / "metrics.json", held_out=scores)
        self._write_manifest("finished")

    def _write_manifest(self, status: str, failed: str = "") -> None:
        # How a run ended can be judged when it has.
        checks = health.CHECKS if status == "finished" else health.AT_ONCE
        runs.update_json(
            self.folder / "manifest.json",
            status=status,
            step=self.step,
            steps=self.steps,
            images_seen=self.step * self.recipe.p * self.recipe.k,
            train_images=len(self.table),
            train_identities=int(self.table["pid"].nunique()),
            train_data=self.fingerprint,
            seed=self.recipe.seed,
            wall_seconds=round(self.seconds, 1),
            health=[finding._asdict() for finding in self._findings(checks, failed)],
            reproduce=reproduce_command(self.recipe, self.tag),
            device=device_name(self.device),
            threads=torch.get_num_threads(),
            **runs.environment(),
        )


def train(recipe: Recipe, tag: str = "", **options) -> Path:
    """Train one run and return its folder: `Trainer(recipe, tag, **options).fit()`."""
    return Trainer(recipe, tag, **options).fit()


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
