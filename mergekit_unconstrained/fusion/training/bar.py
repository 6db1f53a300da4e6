"""How training goes, on one line: loss, bits per byte, tokens per second, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINES = 10
"""Lines that are written where there is no terminal to draw on."""


class TrainingBar(transformers.TrainerCallback):
    """A bar on a terminal, else a line now and then; says nothing when quiet.

    Also asks for an evaluation after the last step, whatever `eval_steps` says.
    """

    def __init__(self, name: str, quiet: bool = False) -> None:
        self._name = name
        self._quiet = quiet
        self._console = Console(file=sys.stdout)
        self._bar: Progress | None = None
        self._figures: dict[str, float] = {}
        self._measured = 0  # the step after which the held-out figure was taken
        self._began, self._first = time.monotonic(), 0

    def on_train_begin(self, _: Any, state: Any, *__: Any, **___: Any) -> None:
        """Draw the bar where the run begins or is resumed."""
        self._began, self._first = time.monotonic(), state.global_step
        shown = state.is_world_process_zero and not self._quiet and self._console.is_terminal
        if not shown:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._bar.add_task(
            f"training {self._name}",
            total=state.max_steps,
            completed=state.global_step,
            figures="",
        )
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Ask for the last evaluation."""
        if state.global_step >= state.max_steps and args.eval_strategy != "no":
            control.should_evaluate = True

    def on_log(self, _: Any, state: Any, *__: Any, logs: dict[str, Any], **___: Any) -> None:
        """Show the newest figures."""
        self._figures.update({k: v for k, v in logs.items() if isinstance(v, int | float)})
        step, total = state.global_step, state.max_steps
        if "eval_bits_per_byte" in logs:
            self._measured = step
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, figures=self.figures)
        elif "loss" in logs and state.is_world_process_zero and not self._quiet:
            self._line(step, total)

    def _line(self, step: int, total: int) -> None:
        if step == total or step % max(1, total // LINES) == 0:
            spent = timedelta(seconds=time.monotonic() - self._began)
            left = spent / max(1, step - self._first) * (total - step)
            text = f"training {self._name}: step {step} of {total}, {self.figures}"
            text += f", {str(left).split('.')[0]} left" if step < total else ""
            self._console.print(text, soft_wrap=True, highlight=False)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Leave the last state of the bar on the screen."""
        self.close()

    def close(self) -> None:
        """Stop drawing, also after an error."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    @property
    def figures(self) -> str:
        """`loss 1.93 (gold 1.80, fusion 3.10), 120 tokens/s, held out 0.9 bits per byte (step 5)`.

        The held-out figure is the last one that was measured, and says when that was.
        """
        f = self._figures
        parts = []
        if "loss" in f:
            halves = [
                f"{name} {f[f'{name}_loss']:.3f}"
                for name in ("gold", "fusion")
                if f"{name}_loss" in f and "fusion_loss" in f
            ]
            parts.append(f"loss {f['loss']:.3f}" + (f" ({', '.join(halves)})" if halves else ""))
        if "tokens_per_second" in f:
            parts.append(f"{f['tokens_per_second']:,.0f} tokens/s")
        if "eval_bits_per_byte" in f:
            bits = f"{f['eval_bits_per_byte']:.4f} bits per byte"
            parts.append(f"held out {bits} (step {self._measured})")
        return ", ".join(parts)


@contextmanager
def only_bar() -> Iterator[None]:
    """Keep transformers' own bars and its small talk off the screen, errors apart."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
