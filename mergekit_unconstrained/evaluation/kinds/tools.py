"""Mathematics with a tool: the model writes Python, sees what it prints, and goes on.

As in ToRA (Gou et al. 2023, arXiv 2309.17452): a ```python block is run and its output put behind
it as ```output. What the model wrote behind the block without knowing its output is dropped.
With a chat template the output is the user's next message; without one it continues the text.
Departures: definitions of earlier blocks stay, as in a notebook, and so does the value of a last
line that is an expression; where the last words hold no number, the last output is the answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import Field

from mergekit_unconstrained.errors import DataError
from mergekit_unconstrained.evaluation.kinds.answers import answer_number, normal, same_number
from mergekit_unconstrained.evaluation.programs import (
    Program,
    ProgramSettings,
    ProgramTask,
    first_block,
    run_programs,
    stopped,
    without_blocks,
)
from mergekit_unconstrained.evaluation.prompts import between, is_templated
from mergekit_unconstrained.evaluation.records import Example, Message, Scored
from mergekit_unconstrained.evaluation.sandbox import Ran
from mergekit_unconstrained.evaluation.subject import Continuation, Subject
from mergekit_unconstrained.evaluation.task import Advance

OUTPUT_FENCE = "```output"
_SHOWN = 2000
"""Characters of a program's output that the model is shown."""

# Runs the blocks in one namespace; earlier ones silently, for their definitions.
_NOTEBOOK = """\
import ast, contextlib, io, sys

def cell(number):
    path = f"block{number}.py"
    with open(path, encoding="utf-8", errors="surrogatepass") as file:
        body = ast.parse(file.read(), path).body
    last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), path, "exec", dont_inherit=True), names)
    if last is not None:
        value = eval(compile(ast.Expression(last.value), path, "eval"), names)
        if value is not None:
            print(value)

sys.modules["__main__"] = type(sys)("__main__")
names = sys.modules["__main__"].__dict__
for number in range(NUMBER):
    with contextlib.redirect_stdout(io.StringIO()):
        cell(number)
cell(NUMBER)
"""


class ToolsSettings(ProgramSettings):
    """Of `kind: tools`."""

    answer: Literal["numeric", "exact"] = "numeric"
    """How the last words are compared with the target."""
    tolerance: float = Field(default=1e-6, ge=0, allow_inf_nan=False)
    """numeric: how far off a number may be, as in `kind: numeric`."""
    rounds: int = Field(default=3, ge=1)
    """Programs that are run for an example at most."""
    packages: tuple[str, ...] = ("sympy", "mpmath", "numpy")
    """Installed packages that a program may import besides the standard library."""


@dataclass
class _Conversation:
    """One example while it is worked on. said: all words and outputs so far."""

    messages: list[Message]
    said: str = ""
    last: str = ""
    output: str = ""
    failure: str = ""
    kept: list[str] = field(default_factory=list)
    runs: int = 0

    def separate(self, separator: str) -> None:
        """Put behind the prompt what stands before the answer."""
        last = self.messages[-1]
        prompt = last.content + between(last.content, separator)
        self.messages[-1] = Message(last.role, prompt)


class ToolsTask(ProgramTask[ToolsSettings]):
    """Right when the answer that the model gives in the end is the target."""

    settings_class = ToolsSettings
    unit = "solved with tools"

    def example(self, id: str, row: Mapping[str, Any], where: str) -> Example:
        """As in FileTask."""
        found = super().example(id, row, where)
        if self.settings.answer == "numeric" and answer_number(found.target) is None:
            raise DataError(
                f"{where}: {self.settings.target!r} holds no number: {found.target[:60]!r}"
            )
        return found

    def score(
        self, subject: Subject, examples: Sequence[Example], advance: Advance = lambda _: None
    ) -> list[Scored]:
        """As in Task. All examples still in conversation speak together, then run together."""
        templated = is_templated(subject.tokenizer, self.chat)
        talks = [_Conversation(list(example.messages)) for example in examples]
        if not templated:
            for talk in talks:
                talk.separate(self.separator)
        going = talks
        while going:
            spoken = subject.continuations(
                [tuple(talk.messages) for talk in going],
                max_new_tokens=self.settings.max_new_tokens,
                stop=(*self.settings.stop, OUTPUT_FENCE),
                chat=self.chat,
                separator="",  # it stands in the text already, once
            )
            waiting = [
                (talk, code)
                for talk, one in zip(going, spoken, strict=True)
                if (code := self._heard(talk, one)) is not None
            ]
            advance(len(going) - len(waiting))
            ran = run_programs([notebook(talk.kept, code) for talk, code in waiting], self.settings)
            for (talk, code), result in zip(waiting, ran, strict=True):
                self._shown(talk, code, result, templated)
            going = [talk for talk, _ in waiting]
        return [
            Scored(example.id, self.judge(example, talk.last, talk.output), talk.said, talk.failure)
            for example, talk in zip(examples, talks, strict=True)
        ]

    def judge(self, example: Example, last: str, output: str) -> float:
        """The value of the last words, or of the last output where the words give no answer."""
        words = without_blocks(last)
        if self.settings.answer == "exact":
            return float(normal(words.strip() or output) == normal(example.target))
        got = answer_number(words)
        if got is None:
            got = answer_number(output)
        return float(same_number(got, answer_number(example.target), self.settings.tolerance))

    def _heard(self, talk: _Conversation, one: Continuation) -> str | None:
        """Note what was said; the program to run, or None when the conversation is over."""
        block = first_block(one.text)
        over = block is None or talk.runs == self.settings.rounds
        if block is None or over or (one.failure and not block.closed):
            talk.said += one.text
            talk.last = one.text
            talk.failure = one.failure
            return None
        talk.last = one.text[: block.end] + ("" if block.closed else "\n```")
        return block.code

    def _shown(self, talk: _Conversation, code: str, ran: Ran, templated: bool) -> None:
        """Put what a program printed into the conversation."""
        talk.runs += 1
        talk.output = printed(ran, self.settings)
        if ran.status == "ok":
            talk.kept.append(code)
        told = f"{OUTPUT_FENCE}\n{talk.output}\n```\n"
        talk.said += f"{talk.last}\n{told}"
        if templated:
            talk.messages += [Message("assistant", talk.last), Message("user", told)]
        else:
            asked = talk.messages[-1]
            text = f"{asked.content}{talk.last}\n{told}"
            talk.messages[-1] = Message(asked.role, text)


def notebook(earlier: Sequence[str], code: str) -> Program:
    """A block behind those that ran before it."""
    cells = [*earlier, code]
    files = {f"block{number}.py": text for number, text in enumerate(cells)}
    return Program(_NOTEBOOK.replace("NUMBER", str(len(earlier))), files)


def printed(ran: Ran, settings: ProgramSettings) -> str:
    """What the model is shown: the output, cut, and the last line of an error."""
    out = ran.stdout.strip()
    shown = f"{out[:_SHOWN]}..." if len(out) > _SHOWN else out
    error = stopped(ran, settings)
    if ran.status == "error":
        lines = ran.stderr.strip().splitlines()
        error = lines[-1][:_SHOWN] if lines else "the program ended with an error"
    return "\n".join(part for part in (shown, error) if part) or "(nothing was printed)"
