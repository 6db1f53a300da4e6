"""Stories of the homogeneous zoo: a number, and what is done to it in one step or two.

    instruction  ann has 52, adds 7, doubles
    response     ;52+7=23;23*2=46#46

Numbers have two digits, the last one first, which makes carries easy, and begin again after 99. The
response works the story out step by step and repeats the result behind `#`.

Everybody knows the verbs of `PLAIN`. Expert A knows an operation more, "doubles". Expert B reads a
notation more: the digits of an instruction may be the signs of `SIGNS` ("ann has &$, adds )");
responses are always in digits. A story in signs that doubles is in nobody's data.

Two stories are the same fact when only the name or the notation differs. The facts of the task
files are drawn first (`Stories.held_out`), and no model is trained on any of them.
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, pairwise

NAMES = ("ann", "bob", "eva", "ian", "kim", "leo", "mia", "tom")
NUMBERS = 100  # from 0; operands have one digit
PLAIN = ("adds", "loses")
SIGNS = "!@$%^&()_|"  # for 0 to 9


@dataclass(frozen=True)
class Family:
    """verbs: what each story has beside PLAIN. signs: whether its instruction has no digits."""

    verbs: tuple[str, ...] = ()
    signs: bool = False


FAMILIES: dict[str, Family] = {
    "base_skill": Family(),
    "verb": Family(("doubles",)),
    "notation": Family(signs=True),
    "composed": Family(("doubles",), signs=True),
}
STEP = ";"  # before every step, the first one too: what is learned of one serves the other
MARK = "#"  # what follows it is the answer


def digits(number: int) -> str:
    """Two, last digit first."""
    return f"{number:02}"[::-1]


@dataclass(frozen=True)
class Step:
    """verb: one of PLAIN, with an operand, or "doubles", without (0)."""

    verb: str
    operand: int = 0

    def after(self, number: int) -> int | None:
        """What becomes of a number; None where it stays, which needs no knowledge of the verb."""
        outcomes = {
            "adds": (number + self.operand) % NUMBERS,
            "loses": (number - self.operand) % NUMBERS,
            "doubles": 2 * number % NUMBERS,
        }
        found = outcomes[self.verb]
        return found if found != number else None

    @property
    def told(self) -> str:
        return f"{self.verb} {self.operand}" if self.operand else self.verb

    @property
    def sign(self) -> str:
        """As the response writes it behind the number."""
        signs = {"adds": f"+{self.operand}", "loses": f"-{self.operand}", "doubles": "*2"}
        return signs[self.verb]


@dataclass(frozen=True)
class Story:
    """start: the first number. name: of whom. signs: whether it is told in SIGNS.

    Name and notation are left out of comparisons.
    """

    start: int
    steps: tuple[Step, ...]
    name: str = field(default=NAMES[0], compare=False)
    signs: bool = field(default=False, compare=False)

    @property
    def values(self) -> tuple[int, ...] | None:
        """The start and what it is after every step; None where a step changes nothing."""
        values = [self.start]
        for step in self.steps:
            value = step.after(values[-1])
            if value is None:
                return None
            values.append(value)
        return tuple(values)

    @property
    def instruction(self) -> str:
        told = ", ".join((f"{self.name} has {digits(self.start)}", *(s.told for s in self.steps)))
        return told.translate(str.maketrans(string.digits, SIGNS)) if self.signs else told

    @property
    def prompt(self) -> str:
        """The instruction as models read it (zoo_models.text_of)."""
        return self.instruction + "\n"

    @property
    def response(self) -> str:
        values = self.values or ()
        worked = [
            f"{STEP}{digits(before)}{step.sign}={digits(value)}"
            for step, (before, value) in zip(self.steps, pairwise(values), strict=True)
        ]
        return "".join(worked) + MARK + self.answer

    @property
    def answer(self) -> str:
        return digits(values[-1]) if (values := self.values) else ""


@dataclass(frozen=True)
class Stories:
    """seed: of all draws. sizes: questions of every family in each split."""

    seed: int = 0
    sizes: tuple[tuple[str, int], ...] = (("search", 100), ("development", 60), ("test", 200))

    @cached_property
    def held_out(self) -> dict[str, dict[str, list[Story]]]:
        """Family -> split -> its questions: no fact twice anywhere.

        The new verb comes with a second step here: alone it is too few facts.
        """
        found = {}
        facts: dict[Story, None] = {}
        for family in FAMILIES:
            draw = random.Random(f"held out {family} {self.seed}")
            before = len(facts)
            while len(facts) < before + sum(size for _, size in self.sizes):
                facts.setdefault(told(family, draw, 2 if FAMILIES[family].verbs else 1))
            left = islice(facts, before, None)
            found[family] = {split: list(islice(left, size)) for split, size in self.sizes}
        return found

    @cached_property
    def kept(self) -> frozenset[Story]:
        """All facts that no model may be trained on."""
        return frozenset(
            story
            for splits in self.held_out.values()
            for stories in splits.values()
            for story in stories
        )

    def corpus(
        self, families: Sequence[str], shares: Sequence[float], stream: str
    ) -> Iterator[Story]:
        """Endless stories of these families, in these shares, without a fact that is held out."""
        draw = random.Random(f"{stream} {self.seed}")
        while True:
            (family,) = draw.choices(families, shares)
            story = told(family, draw)
            if story not in self.kept:
                yield story


def told(family: str, draw: random.Random, shortest: int = 1) -> Story:
    """A story of a family, of two steps or, a third of the time where that may be, of one."""
    verbs, signs = FAMILIES[family].verbs, FAMILIES[family].signs
    while True:
        length = max(shortest, len(verbs), 1 if draw.random() < 1 / 3 else 2)
        plain = [Step(draw.choice(PLAIN), draw.randint(1, 9)) for _ in range(length - len(verbs))]
        steps = [*map(Step, verbs), *plain]
        draw.shuffle(steps)
        story = Story(draw.randrange(NUMBERS), tuple(steps), draw.choice(NAMES), signs)
        if story.values is not None:
            return story
