"""What a training writes down while it runs: history, TensorBoard, findings, checkpoints, manifest."""

import math
import shlex
import shutil
import signal
import sys
import time
from typing import Any, NoReturn

import pandas as pd
import torch

from reidlib import runs
from reidlib.evaluation.retrieval import Retrieval
from reidlib.evaluation.scoring import PER_QUERY
from reidlib.look.board import Board
from reidlib.look.live import Live
from reidlib.model.device import device_name
from reidlib.model.embed import embed
from reidlib.progress import in_notebook
from reidlib.recipes import Recipe
from reidlib.training import distributed, health
from reidlib.training.checkpoint import State, save_checkpoint
from reidlib.training.checks import AT_ONCE, CHECKS, diverging
from reidlib.training.losses import TripletLoss, diagnostics
from reidlib.training.watched import fresh_layers


class TrainingFailed(RuntimeError):
    """Training cannot go on: the loss or a weight is not finite."""


class Stopped(KeyboardInterrupt):
    """Training was asked to stop, and has; a notebook shows its sentence without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


def tell(text: str) -> None:
    """Print to standard error at once; of several processes, the first alone."""
    if not distributed.rank():
        print(text, file=sys.stderr, flush=True)


class Onlooker:
    """In place of a `Journal` in the processes beside the first: nothing is written twice."""

    def after_step(self, *_) -> None:
        """Do nothing."""

    def stop(self, number: int) -> NoReturn:
        """Leave as the signal would have it; the first process says so."""
        raise SystemExit(128 + number)

    def fail(self, _what: str) -> None:
        """End, when the first process has said why."""
        distributed.leave()


class Journal:
    """The record of one training, in the run's folder; before the first step, what is known then.

    Args:
        plan: what is trained, see `loop.Plan`.
        state: what the steps change; the history is written into it.
        board: the run's TensorBoard.
        live: what a notebook shows while it runs.
    """

    def __init__(self, plan: Any, state: State, board: Board, live: Live):
        self.plan, self.state, self.board, self.live = plan, state, board, live
        self.folder, self.recipe = plan.folder, plan.recipe
        images = plan.table["pid"].value_counts()
        self._counts = {"identities": len(images), "short": int((images < plan.recipe.k).sum())}
        self._said = {finding.name for finding in self._findings(AT_ONCE)} if state.step else set()
        file = self.folder / "manifest.json"
        before = runs.read_json(file, {})
        if state.step and before.get("steps", plan.steps) != plan.steps:
            # Said first: 40 steps after 20 are not 40 at once, whose rate decays later.
            went_on = dict.fromkeys([*before.get("went_on_after", []), before["steps"]])
            runs.update_json(file, went_on_after=[*went_on])
        # Also of a run that goes on: it may be watched otherwise, or be longer now.
        runs.write_json(self.folder / "config.json", self.recipe.model_dump())
        if state.step == 0:
            if self.recipe.weights != "none":
                state.facts["fresh"] = fresh_layers(state.model.backbone)
            if plan.held_out:
                state.facts["before"] = self._held_out().evaluate().scores["mAP"]
        self.write_manifest("running")
        self._since, self._since_step = time.monotonic(), state.step

    def after_step(self, result: TripletLoss, lr: float, stopping: bool) -> None:
        """Log, score and save what is due after the state's step."""
        step, recipe = self.state.step, self.recipe
        last = step == self.plan.steps
        logged = step % recipe.log_every == 0 or last or step == 1
        scored = self.plan.held_out and (step % recipe.evaluate_every == 0 or last)
        if logged:
            self._log(result, lr)
        if scored:
            self._score_held_out()
        if logged or scored or stopping:
            self.live.draw(self.state.history, ended=last or stopping)
            self._since = time.monotonic()  # the next speed is that of steps alone
        if step % recipe.checkpoint_every == 0 or last or stopping:
            self._checkpoint()
            if not stopping:  # whoever stops at once may not have meant to replace a run
                for replaced in runs.asides(self.folder):
                    shutil.rmtree(replaced, ignore_errors=True)

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
            for name, values in (
                ("distance/positive", result.positives),
                ("distance/negative", result.negatives),
                ("loss_per_anchor", result.per_anchor[result.per_anchor.isfinite()]),
            ):
                if len(values):
                    self.board.add_histogram(name, values.float().cpu(), step)
        for name, says, evidence, try_first in self._findings(AT_ONCE):
            if name not in self._said:
                self._said.add(name)
                tell(f"Step {step}, {name}: {says} ({evidence}.) Try first: {try_first}")

    def _findings(self, checks: tuple, failed: str = "") -> list[health.Finding]:
        facts = self._counts | self.state.facts
        return health.report(self.state.history, self.recipe, checks, failed=failed, **facts)

    def _held_out(self) -> Retrieval:
        # In float32, as runs are scored: bfloat16 has hidden two points of mAP.
        sides = []
        for pixels, table in self.plan.held_out:
            sides += [embed(self.state.model, pixels, self.recipe, show_progress=False), table]
        return Retrieval(*sides)

    def _score_held_out(self) -> None:
        """Score retrieval among the held-out identities; keep the best in a checkpoint of its own."""
        state, step = self.state, self.state.step
        retrieval = self._held_out()
        evaluation = retrieval.evaluate()
        scores = {key: evaluation.scores[key] for key in ("mAP", "top1")}
        # Without paths, which are this machine's: `query` is the row in what `hold_out` returns.
        table = evaluation.per_query.drop(columns="path")
        runs.write_text(self.folder / PER_QUERY["held_out"], table.to_csv(index=False))
        for key, score in scores.items():
            state.history[-1][f"held_out_{key}"] = score
            self.board.add_scalar(f"held_out/{key}", score, step)
        try:
            self.board.add_ranked_lists("held_out", retrieval, evaluation, step)
        except (OSError, ValueError) as error:  # images moved away meanwhile: no reason to stop
            tell(f"Step {step}: no ranked lists for TensorBoard. {error}")
        if state.best is None or scores["mAP"] > state.best["mAP"]:
            state.best = {"step": step} | scores
            best = self.folder / "checkpoint_best.pt"
            save_checkpoint(best, state.state_dict(), keep_previous=False)

    def _checkpoint(self) -> None:
        if not all(value.isfinite().all() for value in self.state.model.state_dict().values()):
            self.fail("a weight")
        self.board.flush()
        save_checkpoint(self.folder / "checkpoint.pt", self.state.state_dict())
        table = pd.DataFrame(self.state.history)
        runs.write_text(self.folder / "history.csv", table.to_csv(index=False))

    def stop(self, number: int) -> NoReturn:
        """Write down that a signal has stopped it, and leave as the signal would have it."""
        self.write_manifest("stopped")
        said = f"Stopped after step {self.state.step} of {self.plan.steps}; run it again to go on."
        if not in_notebook():
            tell(said)
        raise Stopped(said) if number == signal.SIGINT else SystemExit(128 + number)

    def fail(self, what: str) -> None:
        """Write down that the loss or a weight is not finite, and raise TrainingFailed."""
        where = f"At step {self.state.step} {what}"
        self.write_manifest("failed", where)
        (why,) = self._findings((diverging,), where)
        tell(health.as_text([why]))
        raise TrainingFailed(f"{why.says} Try first: {why.try_first}")

    def write_manifest(self, status: str, failed: str = "") -> None:
        """Write what was run, where, how far it came, and what is wrong with it; at last its scores."""
        plan, recipe, state = self.plan, self.recipe, self.state
        if status == "finished" and state.best:
            ends = state.history[-1]
            last = {key: ends[key] for key in ends if key.startswith("held_out_")}
            scores = {"before_mAP": state.facts.get("before"), "best": state.best, "last": last}
            if (table := self.folder / PER_QUERY["held_out"]).is_file():
                scores["per_query_sha256"] = runs.text_sha256(table.read_text(encoding="utf-8"))
            runs.update_json(self.folder / "metrics.json", held_out=scores)
        # Some checks only make sense after the last step.
        findings = self._findings(CHECKS if status == "finished" else AT_ONCE, failed)
        file = self.folder / "manifest.json"
        stages = runs.read_json(file, {}).get("went_on_after", [])
        stages = [recipe.model_copy(update={"steps": n, "epochs": None}) for n in stages]
        weights = self.folder / "weights.safetensors"
        ended = {"weights_sha256": runs.sha256(weights)} if status == "finished" else {}
        runs.update_json(
            file,
            status=status,
            step=state.step,
            steps=plan.steps,
            images_seen=state.step * recipe.p * recipe.k,
            train_images=len(plan.table),
            train_identities=int(plan.table["pid"].nunique()),
            train_data=plan.data,
            seed=recipe.seed,
            wall_seconds=round(state.seconds, 1),
            health=[finding._asdict() for finding in findings],
            reproduce=" && ".join(reproduce_command(one, plan.tag) for one in [*stages, recipe]),
            device=device_name(plan.device),
            processes=distributed.size(),
            threads=torch.get_num_threads(),
            **(ended | runs.environment()),
        )


def reproduce_command(recipe: Recipe, tag: str = "") -> str:
    """Return the command that makes the run again: the settings that are not the defaults."""
    changed = recipe.model_dump(exclude_defaults=True, exclude_none=True)
    changed |= {"tag": tag} if tag else {}
    options = [f"--{key.replace('_', '-')} {shlex.quote(str(changed[key]))}" for key in changed]
    start = "python -m reidlib train"
    if (several := distributed.size()) > 1:  # after "--", torchrun takes no option for its own
        start = f"torchrun --nproc-per-node {several} -m reidlib -- train"
    return " ".join([start, *options])
