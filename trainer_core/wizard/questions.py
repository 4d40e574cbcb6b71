"""Questions at the terminal. Each is also an option of the command line, and has a default."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from ..console import print_text
from ..errors import Cancelled, Problem, UserError, encodable, nearest, printable


class InputEnded(Cancelled):
    """The input ended at a question. str() says which option answers it."""


@dataclass(frozen=True)
class Question:
    """A question about one value.

    Args:
        option: the option that answers it, such as "--learn".
        text: the question.
        default: the answer of an empty line, as it would be typed.
        read: converts an answer, or raises a UserError with the reason why it is wrong.
        choices: (answer, its explanation), numbered from 1 where is_numbered.
        is_numbered: whether a choice may be answered by its number.
        is_asked: False where the default is a fact, so that there is nothing to ask.
    """

    option: str
    text: str
    default: str
    read: Callable[[str], Any]
    choices: tuple[tuple[str, str], ...] = ()
    is_numbered: bool = False
    is_asked: bool = True

    def answer(self, typed: str) -> Any:
        """Return the value of an answer: a number chooses among the choices, an empty line is the default.

        Raises:
            UserError: the answer is wrong.
        """
        text = typed.strip() or self.default
        number = int(text) if self.is_numbered and text.isascii() and text.isdigit() and len(text) < 5 else 0
        return self.read(self.choices[number - 1][0] if 0 < number <= len(self.choices) else text)

    def lines(self) -> list[str]:
        """Return the question as it is shown, above the prompt."""
        width = max((len(name) for name, _ in self.choices), default=0)
        numbers = (f"{i}) " if self.is_numbered else "" for i in range(1, len(self.choices) + 1))
        shown = [f"  {n}{name:{width}}  {text}" for n, (name, text) in zip(numbers, self.choices, strict=True)]
        return ["", self.text, *shown]


def one_of(option: str, names: tuple[str, ...]) -> Callable[[str], str]:
    """Return a reader of a choice by name; the start of a name is enough if no other begins like it."""

    def read(text: str) -> str:
        matches = [name for name in names if name.startswith(text.lower())]
        if len(matches) != 1 and text.lower() not in names:
            hint = nearest(text, names)
            raise UserError.at(option, f"{text[:40]!r} is not one of {', '.join(names)}{hint}")
        return text.lower() if text.lower() in names else matches[0]

    return read


@dataclass(frozen=True)
class Terminal:
    """Asks questions: on a terminal, or of lines that come from a pipe or a file.

    Args:
        takes_defaults: answer every question with its default (--yes).
    """

    takes_defaults: bool = False

    def ask(self, question: Question) -> Any:
        """Return the value of the user's answer. A wrong answer is asked again, with the reason.

        Raises:
            InputEnded: there are no more lines.
            UserError: a line is not text.
        """
        if self.takes_defaults:
            value = question.answer("")
            self.say(f"{question.option[2:]}: {question.default or 'none'}")
            return value
        for line in question.lines():
            self.say(line)
        while True:
            line = self._read_line(question)
            try:
                return question.answer(line)
            except UserError as error:
                for problem in error.problems:
                    self.say(f"  {problem.message}")

    def say(self, text: str) -> None:
        """Print a text, with its control characters escaped."""
        print_text(text, flush=True)

    def _read_line(self, question: Question) -> str:
        prompt = encodable(printable(f"{question.option[2:]} [{question.default or 'none'}]: "), sys.stdout)
        try:
            line = input(prompt)
        except (EOFError, RuntimeError) as error:  # RuntimeError: stdin is closed
            print()
            hint = f"the input ended; answer with {question.option}, or take all defaults with --yes"
            raise InputEnded(str(Problem(question.option, hint))) from error
        except UnicodeDecodeError as error:
            raise UserError.at("stdin", f"is not text in {error.encoding}; answer with {question.option}") from error
        if not (sys.stdin and sys.stdin.isatty()):
            self.say(line)  # a terminal shows what is typed, a pipe does not
        return line
