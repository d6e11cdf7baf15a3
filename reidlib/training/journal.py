"""What a training writes down while it runs: history, TensorBoard, findings, checkpoints, manifest."""

import math
import sys
import time
from typing import Any

import pandas as pd
import torch

from reidlib import runs
from reidlib.evaluation.retrieval import Retrieval
from reidlib.evaluation.scoring import PER_QUERY
from reidlib.look import board
from reidlib.model.device import device_name
from reidlib.model.embed import embed
from reidlib.training import health
from reidlib.training.checkpoint import State, save_checkpoint
from reidlib.training.checks import Finding
from reidlib.training.losses import TripletLoss, diagnostics
from reidlib.training.watched import fresh_layers


class TrainingFailed(RuntimeError):
    """Training cannot go on: the loss or a weight is not finite."""


class Journal:
    """The record of one training, in the run's folder; a context that closes TensorBoard's file.

    Args:
        plan: what is trained, see `loop.Plan`.
        state: what the steps change; the history is written into it.
        reproduce: the command that makes the run again.
    """

    def __init__(self, plan: Any, state: State, reproduce: str):
        self.plan, self.state, self.reproduce = plan, state, reproduce
        self.folder, self.recipe = plan.folder, plan.recipe
        images = plan.table["pid"].value_counts()
        self._counts = {"identities": len(images), "short": int((images < plan.recipe.k).sum())}
        self._said: set[str] = set()
        self._since, self._since_step = time.monotonic(), state.step

    def __enter__(self) -> "Journal":
        if self.state.step == 0:
            # A run without a checkpoint left event files of steps that will come again.
            board.erase(self.folder)
        else:
            self._said = {finding.name for finding in self._findings(health.AT_ONCE)}
        self.board = board.Board(self.folder, self.recipe, self.plan.steps, self.state.step)
        return self

    def __exit__(self, *_: Any) -> None:
        self.board.close()

    @property
    def in_short(self) -> str:
        """A few words beside a progress bar."""
        return f"loss {self.state.history[-1]['loss']:.3f}" if self.state.history else ""

    def begin(self) -> None:
        """Write what is known before the first step of a new run, and the manifest last."""
        if self.state.step == 0:
            runs.write_json(self.folder / "config.json", self.recipe.model_dump())
            if self.recipe.weights != "none":
                self.state.facts["fresh"] = fresh_layers(self.state.model.backbone)
            if self.plan.held_out:
                scores = self._held_out_retrieval().evaluate().scores
                self.state.facts["before"] = scores["mAP"]
        self.write_manifest("running")
        self._since = time.monotonic()

    def after_step(self, result: TripletLoss, lr: float, stopping: bool) -> None:
        """Log, score and save what is due after the state's step."""
        step, recipe = self.state.step, self.recipe
        last = step == self.plan.steps
        if step % recipe.log_every == 0 or last or step == 1:
            self._log(result, lr)
        if self.plan.held_out and (step % recipe.evaluate_every == 0 or last):
            self._score_held_out()
            self._since = time.monotonic()
        if step % recipe.checkpoint_every == 0 or last or stopping:
            self._checkpoint()

    def _log(self, result: TripletLoss, lr: float) -> None:
        """Add a row to the history and to TensorBoard, and say in plain words what looks wrong."""
        step, now = self.state.step, time.monotonic()
        speed = (step - self._since_step) * len(result.pids) / (now - self._since)
        self._since, self._since_step = now, step
        row = {"step": step, "epoch": step / self.plan.epoch, "lr": lr} | diagnostics(result)
        row |= {"images_per_s": speed, "seconds": self.state.seconds}
        self.state.history.append(row)
        for key, value in row.items():
            if key not in ("step", "seconds", "triplets") and math.isfinite(value):
                is_distance = key.startswith(("positive_p", "negative_p", "hardest_"))
                self.board.add_scalar("distance/" * is_distance + key, value, step)
        if step % (10 * self.recipe.log_every) == 0 or step == self.plan.steps:
            self._log_histograms(result)
        for finding in self._findings(health.AT_ONCE):
            if finding.name not in self._said:
                self._said.add(finding.name)
                text = f"Step {step}, {finding.name}: {finding.says} ({finding.evidence}.)"
                print(f"{text} Try first: {finding.try_first}", file=sys.stderr, flush=True)

    def _log_histograms(self, result: TripletLoss) -> None:
        per_anchor = result.per_anchor[result.per_anchor.isfinite()]
        for name, values in (
            ("distance/positive", result.positives),
            ("distance/negative", result.negatives),
            ("loss_per_anchor", per_anchor),
        ):
            if len(values):
                self.board.add_histogram(name, values.float().cpu(), self.state.step)

    def _findings(self, checks=health.CHECKS, failed: str = "") -> list[Finding]:
        facts = self._counts | self.state.facts
        return health.report(self.state.history, self.recipe, checks, failed=failed, **facts)

    def _held_out_retrieval(self) -> Retrieval:
        options = {"precision": self.recipe.precision, "show_progress": False}
        sides = []
        for pixels, table in self.plan.held_out:
            sides += [embed(self.state.model, pixels, self.recipe, **options), table]
        return Retrieval(*sides)

    def _score_held_out(self) -> None:
        """Score retrieval among the held-out identities; keep the best in a checkpoint of its own."""
        state = self.state
        retrieval = self._held_out_retrieval()
        evaluation = retrieval.evaluate()
        scores = {key: evaluation.scores[key] for key in ("mAP", "top1")}
        # Without paths, which are this machine's: `query` is the row in what `hold_out` returns.
        table = evaluation.per_query.drop(columns="path")
        runs.write_text(self.folder / PER_QUERY["held_out"], table.to_csv(index=False))
        for key, score in scores.items():
            state.history[-1][f"held_out_{key}"] = score
            self.board.add_scalar(f"held_out/{key}", score, state.step)
        try:
            self.board.add_ranked_lists("held_out", retrieval, evaluation, state.step)
        except (OSError, ValueError) as error:  # images moved away meanwhile: no reason to stop
            text = f"Step {state.step}: no ranked lists for TensorBoard. {error}"
            print(text, file=sys.stderr, flush=True)
        if state.best is None or scores["mAP"] > state.best["mAP"]:
            state.best = {"step": state.step} | scores
            file = self.folder / "checkpoint_best.pt"
            save_checkpoint(file, state.state_dict(), keep_previous=False)

    def _checkpoint(self) -> None:
        if not all(value.isfinite().all() for value in self.state.model.state_dict().values()):
            self.fail("a weight")
        self.board.flush()
        save_checkpoint(self.folder / "checkpoint.pt", self.state.state_dict())
        table = pd.DataFrame(self.state.history)
        runs.write_text(self.folder / "history.csv", table.to_csv(index=False))

    def fail(self, what: str) -> None:
        """Write down that the loss or a weight is not finite, and raise TrainingFailed."""
        recipe, where = self.recipe, f"At step {self.state.step} {what}"
        self.write_manifest("failed", where)
        found = self._findings(health.AT_ONCE, where)
        print(health.as_text(found), file=sys.stderr, flush=True)
        kept = (self.folder / "checkpoint.pt").exists()
        raise TrainingFailed(
            f"{where} became NaN or infinite, so training stopped"
            + (" (checkpoint.pt is from before). " if kept else ". ")
            + f"Try a lower learning rate (now lr = {recipe.lr:g})"
            + (', precision = "float32"' if recipe.precision != "float32" else "")
            + (", squared = False" if recipe.squared else "")
            + ", or normalise = 'imagenet' if pixels come unscaled."
        )

    def finish(self) -> None:
        """Write the held-out scores and the manifest of a run that has come to its end."""
        if self.state.best:
            ends = self.state.history[-1]
            last = {key: ends[key] for key in ends if key.startswith("held_out_")}
            before = self.state.facts.get("before")
            scores = {"before_mAP": before, "best": self.state.best, "last": last}
            runs.update_json(self.folder / "metrics.json", held_out=scores)
        self.write_manifest("finished")

    def write_manifest(self, status: str, failed: str = "") -> None:
        """Write manifest.json: what was run, where, how far it came, and what is wrong with it."""
        # Some checks only make sense after the last step.
        checks = health.CHECKS if status == "finished" else health.AT_ONCE
        plan, recipe = self.plan, self.recipe
        runs.update_json(
            self.folder / "manifest.json",
            status=status,
            step=self.state.step,
            steps=plan.steps,
            images_seen=self.state.step * recipe.p * recipe.k,
            train_images=len(plan.table),
            train_identities=int(plan.table["pid"].nunique()),
            train_data=plan.data,
            seed=recipe.seed,
            wall_seconds=round(self.state.seconds, 1),
            health=[finding._asdict() for finding in self._findings(checks, failed)],
            reproduce=self.reproduce,
            device=device_name(plan.device),
            threads=torch.get_num_threads(),
            **runs.environment(),
        )
