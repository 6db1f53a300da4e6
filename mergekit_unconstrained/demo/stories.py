"""Make the homogeneous zoo: a base, two experts of one verb each, and the tasks that need both.

    python -m mergekit_unconstrained.demo.stories stories --seed 0

writes stories/base, expert_a, expert_b (models of transformers), data/ and tasks.yml, and prints
what each model makes of the questions of one split. Interrupted, it goes on where it was.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from rich.table import Table

from mergekit_unconstrained.demo.stories_data import FAMILIES, Stories
from mergekit_unconstrained.demo.stories_models import LEARNT, LEARNT_FROM, RECIPES, make
from mergekit_unconstrained.demo.stories_tasks import scores_of, write_tasks
from mergekit_unconstrained.demo.zoo_models import BATCH
from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.present import console
from mergekit_unconstrained.present.bars import progress
from mergekit_unconstrained.present.fusion import without_other_bars

SEED = "seed.txt"  # whose zoo the folder holds


def claim(folder: Path, seed: int) -> None:
    """Note the seed in a new folder; DataError where the folder holds another seed's zoo."""
    note = folder / SEED
    if not note.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(f"{seed}\n", encoding="utf-8")
    elif (found := note.read_text(encoding="utf-8").strip()) != str(seed):
        raise DataError(f"{str(folder)!r} holds the zoo of seed {found}; name another folder")


def make_all(stories: Stories, folder: Path) -> dict[str, dict[str, float]]:
    """Models and tasks, as far as they are not there; model -> family -> share of right answers."""
    write_tasks(stories, folder)
    found = {}
    with without_other_bars():
        for recipe in RECIPES:
            with progress(f"train {recipe.name}", recipe.rounds * recipe.steps * BATCH) as advance:
                make(recipe, stories, folder, advance)
        asked = len(FAMILIES) * dict(stories.sizes)[LEARNT_FROM]
        for recipe in RECIPES:
            with progress(f"ask {recipe.name}", asked) as advance:
                found[recipe.name] = scores_of(folder / recipe.name, stories, LEARNT_FROM, advance)
    return found


def table_of(scores: dict[str, dict[str, float]], questions: int) -> Table:
    """Models x families, shares of right answers."""
    table = Table(title=f"share of right answers, {questions} questions each")
    table.add_column("model")
    for family in FAMILIES:
        table.add_column(family, justify="right")
    for name, row in scores.items():
        table.add_row(name, *(f"{row[family]:.3f}" for family in FAMILIES))
    return table


@click.command(help="Make models and tasks in FOLDER (minutes on one core).")
@click.argument("folder", type=click.Path(path_type=Path, file_okay=False))
@click.option("--seed", default=0, show_default=True, help="Of the stories and the weights.")
def main(folder: Path, seed: int) -> None:
    torch.set_num_threads(1)  # two are several times slower at this size
    claim(folder, seed)
    stories = Stories(seed)
    scores = make_all(stories, folder)
    console.print(table_of(scores, dict(stories.sizes)[LEARNT_FROM]))
    for recipe in RECIPES:
        if (share := scores[recipe.name][recipe.families[0]]) < LEARNT:
            console.print(
                f"{recipe.name} has not learnt its own stories in {recipe.rounds} times "
                f"{recipe.steps} steps: {share:.3f} of them are right, {LEARNT} were meant"
            )


if __name__ == "__main__":
    main()
