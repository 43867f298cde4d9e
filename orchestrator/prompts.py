"""From problems to prompts: template, special tokens, lengths, and the stream that a run draws from.

The tokenizer is handed in; this module loads neither transformers nor torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from jinja2 import TemplateError

from orchestrator.errors import ConfigError, DataError
from orchestrator.types import Prompt

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from conf.schema import TaskConfig
    from orchestrator.tasks.base import Problem, Task


class PromptTokenizer(Protocol):
    """What rendering needs of a Hugging Face tokenizer."""

    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    pad_token_id: int | None
    unk_token_id: int | None
    chat_template: str | dict[str, str] | None
    added_tokens_decoder: Mapping[int, Any]
    """Ids and `AddedToken`s of what is read as one token wherever it stands, tokens of control among them."""

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool = False) -> str:
        """Text of token ids."""

    def __len__(self) -> int:
        """Tokens of the vocabulary, those that were added included."""

    def apply_chat_template(self, conversation: list[dict[str, str]], **kwargs: Any) -> Any:
        """The text of a chat (`tokenize=False`)."""


class Renderer:
    """Turns problems into prompts with the model's own template and special tokens.

    Args:
        tokenizer: The model's.
        config: `template` and `system_prompt` are read.

    Raises:
        ConfigError: `template=chat` and the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PromptTokenizer, config: TaskConfig) -> None:
        has_template = tokenizer.chat_template is not None
        if config.template == "chat" and not has_template:
            raise ConfigError(
                "task.template=chat, but the model's tokenizer has no chat template. Set task.template=text, or take a "
                "model that was trained on chats."
            )
        self.as_chat = has_template if config.template == "auto" else config.template == "chat"
        if config.system_prompt is not None and not self.as_chat:
            raise ConfigError("task.system_prompt needs a chat template; prompts are given as texts here. Unset it.")
        self.system_prompt = config.system_prompt
        self.tokenizer = tokenizer

    def __call__(self, problem: Problem) -> Prompt:
        """The prompt of one problem. Raises DataError when the template or the tokenizer refuses it."""
        text = self._chat_text(problem) if self.as_chat else self._plain_text(problem)
        token_ids = self._encode_chat(text) if self.as_chat else self._encode_text(text)
        if not token_ids:
            raise DataError(f"{problem.source}: the prompt has no tokens.")
        unknown = self.tokenizer.unk_token_id
        used_otherwise = (self.tokenizer.bos_token_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id)
        if unknown is not None and unknown not in used_otherwise and unknown in token_ids:
            raise DataError(
                f"{problem.source}: the prompt has characters that the model's tokenizer does not know: "
                f"{text[:80]!r}. Mend the prompt or take a model whose vocabulary covers it."
            )
        return Prompt(id=problem.id, text=text, token_ids=tuple(token_ids), answer=problem.answer)

    def _plain_text(self, problem: Problem) -> str:
        if not isinstance(problem.content, str):
            reason = (
                "task.template=text" if self.tokenizer.chat_template else "the model's tokenizer has no chat template"
            )
            raise DataError(f"{problem.source}: the prompt is a chat, but {reason}. Give texts, or a model for chats.")
        return problem.content

    def _chat_text(self, problem: Problem) -> str:
        content = problem.content
        if isinstance(content, str):
            turns = [{"role": "user", "content": content}]
        else:
            turns = [{"role": turn.role, "content": turn.content} for turn in content]
        if self.system_prompt is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system_prompt})
        try:
            text = self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            roles = ", ".join(turn["role"] for turn in turns)
            raise DataError(
                f"{problem.source}: the model's chat template refuses the roles {roles}: {error}."
            ) from error
        return str(text)

    def _encode_chat(self, text: str) -> list[int]:
        """The template has written every special token that belongs there."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of a text as it stands, special tokens as those of a text prompt."""
        return tuple(self._encode_text(text))

    def _encode_text(self, text: str) -> list[int]:
        """With the BOS that the tokenizer puts before a text, once, and without an EOS behind, which would end it."""
        ids = self.tokenizer.encode(text, add_special_tokens=True)
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos]:
            ids = ids[1:]
        if eos is not None and ids[-1:] == [eos] and not text.endswith(self.tokenizer.eos_token or ""):
            ids = ids[:-1]
        return ids


@dataclass(frozen=True, kw_only=True, slots=True)
class LengthReport:
    """How many prompts leave no room for a completion.

    Example: ``LengthReport(num_prompts=900, num_too_long=1, worst=Prompt(...), room=1024)``
    """

    num_prompts: int
    num_too_long: int
    worst: Prompt | None
    """The longest of those that are too long."""
    room: int
    """Tokens that a prompt may have."""


def check_lengths(prompts: Sequence[Prompt], *, max_length: int, max_tokens: int) -> LengthReport:
    """Counts prompts that, with `max_tokens` new tokens, do not fit into `max_length`."""
    room = max_length - max_tokens
    too_long = [prompt for prompt in prompts if len(prompt.token_ids) > room]
    worst = max(too_long, key=lambda prompt: len(prompt.token_ids), default=None)
    return LengthReport(num_prompts=len(prompts), num_too_long=len(too_long), worst=worst, room=room)


def fitting(
    prompts: Sequence[Prompt],
    *,
    max_length: int,
    max_tokens: int,
    on_too_long: str,
    locate: Callable[[str], str],
) -> list[Prompt]:
    """The prompts that leave room for a completion.

    Args:
        prompts: Prompts to check; order is kept.
        max_length: Context in tokens.
        max_tokens: Longest completion.
        on_too_long: `error` refuses prompts that do not fit, `drop` leaves them out.
        locate: Says where a prompt id comes from (`Task.locate`).

    Raises:
        DataError: A prompt does not fit (`error`), or none does.
    """
    report = check_lengths(prompts, max_length=max_length, max_tokens=max_tokens)
    worst = report.worst
    if worst is not None and (on_too_long == "error" or report.num_too_long == report.num_prompts):
        mend = " or task.on_too_long=drop" if report.num_too_long < report.num_prompts else ""
        raise DataError(
            f"{report.num_too_long} of {report.num_prompts} prompts leave no room for generator.max_tokens="
            f"{max_tokens} in model.max_length={max_length}: they may have {report.room} tokens, and the longest has "
            f"{len(worst.token_ids)} ({locate(worst.id)}). Raise model.max_length, lower generator.max_tokens, shorten "
            f"the prompts{mend}."
        )
    return [prompt for prompt in prompts if len(prompt.token_ids) <= report.room]


class PromptStream:
    """The training prompts of a run, in the order of its seed, from a cursor that can be saved.

    Args:
        task: Gives problems.
        render: Makes prompts of them.
        max_length: Context in tokens.
        max_tokens: Longest completion.
        on_too_long: `error` or `drop`; see `fitting`.
        cursor: Problems of the task's stream that are behind, dropped ones included.
    """

    def __init__(
        self,
        task: Task,
        render: Callable[[Problem], Prompt],
        *,
        max_length: int,
        max_tokens: int,
        on_too_long: str = "error",
        cursor: int = 0,
    ) -> None:
        self.task = task
        self.render = render
        self.max_length = max_length
        self.max_tokens = max_tokens
        self.on_too_long = on_too_long
        self.cursor = cursor
        self.skip: frozenset[str] = frozenset()
        """Ids of prompts that are left out."""

    def take(self, n: int) -> list[Prompt]:
        """The next n prompts, no two of them the same.

        Where an epoch ends within the n, the next one goes on without those that are among them already: they wait for
        the epoch after it.

        Raises:
            DataError: a prompt does not fit, or fewer than n do; the cursor stays where it was.
        """
        taken: dict[str, Prompt] = {}
        barren = 0  # problems in a row that gave no new prompt
        cursor = self.cursor
        problems = self.task.train(cursor)
        while len(taken) < n:
            problem = next(problems)
            cursor += 1
            prompt = self.render(problem)
            fits = prompt.id not in self.skip and len(prompt.token_ids) + self.max_tokens <= self.max_length
            barren = 0 if fits and prompt.id not in taken else barren + 1
            if fits:
                taken.setdefault(prompt.id, prompt)
            elif self.on_too_long == "error" and prompt.id not in self.skip:
                self._fitting([prompt])
            if barren > self.task.num_train:
                raise DataError(
                    f"{self.task.name} has {len(taken)} prompts that leave room for a completion, and {n} are wanted:"
                    " lower pipeline.prompts_per_iteration or generator.max_tokens, or raise model.max_length."
                )
        self.cursor = cursor
        return list(taken.values())

    def held_out(self, n: int) -> list[Prompt]:
        """Up to n test prompts that fit. Raises DataError as `take` does."""
        return self._fitting([self.render(problem) for problem in self.task.test(n)])

    def _fitting(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        return fitting(
            prompts,
            max_length=self.max_length,
            max_tokens=self.max_tokens,
            on_too_long=self.on_too_long,
            locate=self.task.locate,
        )
