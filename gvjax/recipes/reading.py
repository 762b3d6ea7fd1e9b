"""From a dataset's section to the task: files, tokenizer, template and gold reward, read and put together."""

import dataclasses
import functools
import hashlib
import json
import logging
import pathlib
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any, NamedTuple, get_args

import jax
import numpy as np

from gvjax import config
from gvjax.data import (
    answers,
    overlap,
    puzzles,
    schema,
    sources,
    templates,
    tokenizer,
)
from gvjax.data.examples import Examples, LengthPolicy, encode_rows
from gvjax.models import heads, hf
from gvjax.recipes.dataset import Dataset, Judge, RowPrompts, Table
from gvjax.recipes.rows import sequences
from gvjax.tasks.task import Completions, Prompts, Split

logger = logging.getLogger(__name__)

TEMPLATES = {"chatml": templates.CHATML_TEMPLATE, "hh": templates.HH_TEMPLATE}
"""Templates that a config may name."""


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How text becomes ids.

    Attributes:
      tokenizer: text to ids.
      template: for conversations; None where the tokenizer brings none.
      lengths: what is cut.
    """

    tokenizer: tokenizer.Tokenizer
    template: templates.ChatTemplate | None
    lengths: LengthPolicy


def dataset_of(section: config.DatasetSection) -> Dataset:
    """The task that a dataset's section describes; the same section is read once in a process.

    Raises:
      ConfigError: files, tokenizer, template or gold reward are not what the section says.
    """
    return _dataset(section.model_dump_json())


@functools.lru_cache(maxsize=4)
def _dataset(text: str) -> Dataset:
    section = config.DatasetSection.model_validate_json(text)
    with config.refusing("task"):
        return _read(section)


def encoding_of(section: config.DatasetSection) -> Encoding:
    """The tokenizer, template and lengths of a dataset."""
    if section.tokenizer is None:
        raise config.ConfigError("task.tokenizer is not given; name a directory")
    with hf.tokenizer_files(section.tokenizer) as directory:
        found = tokenizer.Tokenizer(directory)
        template = templates.ChatTemplate.from_directory(
            directory, found.special_tokens
        )
    if section.template is not None:
        source = TEMPLATES.get(section.template)
        if source is None:
            file = pathlib.Path(section.template)
            if not file.is_file():
                raise ValueError(
                    f"template {section.template!r} is neither {' nor '.join(TEMPLATES)} nor a file"
                )
            source = file.read_text("utf-8")
        elif found.add_bos:
            # A model's own template writes its BOS itself.
            source = "{{ bos_token }}" + source
        template = templates.ChatTemplate(source, found.special_tokens)
    longest = section.max_prompt + section.max_completion
    lengths = LengthPolicy(
        (longest,),
        max_prompt=section.max_prompt,
        max_completion=section.max_completion,
        prompt_truncation=section.prompt_truncation,
    )
    return Encoding(found, template, lengths)


def rows_of(
    section: config.DatasetSection, part: config.RowsSection, split: Split
) -> sources.Rows:
    """The rows of one split, seen as the section says."""
    rows = sources.load(
        part.source,
        getattr(part, split),
        path=part.path,
        data_dir=section.prepared,
        drop=part.drop,
        max_bad_share=part.max_bad_share,
    )
    if section.chat:
        rows = rows.map(schema.as_conversation)
    if section.system is not None:
        rows = rows.map(functools.partial(schema.with_system, system=section.system))
    return rows


def examples_of(
    rows: sources.Rows, part: config.RowsSection, encoding: Encoding
) -> Examples:
    """Rows, tokenised and cut."""
    return encode_rows(
        rows,
        encoding.tokenizer,
        encoding.lengths,
        template=encoding.template,
        drop=part.drop,
        max_bad_share=part.max_bad_share,
    )


def _read(section: config.DatasetSection) -> Dataset:
    encoding = encoding_of(section)
    judge, reward_range = _judge(section, encoding)
    read: dict[str, tuple[sources.Rows, Examples]] = {}
    for split in get_args(Split):
        rows = rows_of(section, section.rows, split)
        _report(section.name, split, rows.report)
        read[split] = rows, examples_of(rows, section.rows, encoding)
    kinds = {examples.kind for _, examples in read.values()}
    if len(kinds) > 1 or schema.UnpairedRow in kinds:
        raise ValueError(
            f"the splits of {section.rows.source} hold {', '.join(sorted(kind.__name__ for kind in kinds))}; preference"
            " pairs, demonstrations or prompts are needed, one kind in all splits"
        )
    tables = {split: _table(*each, section) for split, each in read.items()}
    table, splits = _joined(tables)
    prompts = [prompt for each in read.values() for prompt in _told_apart(*each)]
    splits = _without_leaks(section.name, prompts, splits)
    if section.gold is not None and section.gold in _ANSWERS:
        used = np.concatenate(list(splits.values()))
        found = [table.answers[row] for row in used]
        missing = sum(answer is None for answer in found)
        if missing:
            raise ValueError(
                f"gold is {section.gold}, but {missing} of {len(used)} rows of {section.rows.source} have no answer to compare"
                " with"
            )
        is_answer = _ANSWERS[section.gold].is_answer
        if other := [each for each in found if not is_answer(str(each))]:
            raise ValueError(
                f"gold is {section.gold}, but the answers of {len(other)} of {len(used)} rows of {section.rows.source} are"
                f" no {section.gold}, e.g. {other[0][:80]!r}: no completion could be right there; leave these rows out, or"
                " take another gold"
            )
    if section.gold in _REFERENCES and not table.completions:
        raise ValueError(
            f"gold is {section.gold}, but rows of {section.rows.source} are prompts alone; it takes rows with a completion to"
            " be near to"
        )
    shown: list[Any] = [
        section.model_dump(exclude={"prepared", "name", "reference_logps"})
    ]
    shown += [examples.fingerprint for _, examples in read.values()]
    demonstrated = tables["train"]
    if section.demonstrations is not None:
        rows = rows_of(section, section.demonstrations, "train")
        _report(section.name, "demonstrations", rows.report)
        rows = rows.map(schema.as_demonstration)
        examples = examples_of(rows, section.demonstrations, encoding)
        heldout = set[str | bytes]().union(
            *(prompts[row] for split in ("validation", "test") for row in splits[split])
        )
        fresh = _fresh(
            *(section.name, "demonstrations", _told_apart(rows, examples)),
            *(heldout, "a split held out"),
        )
        if not fresh.any():
            raise ValueError(
                f"every prompt of the demonstrations is in a split held out; give task.demonstrations other rows than"
                f" {section.demonstrations.train}"
            )
        demonstrated = _table(rows, examples, section).take(np.flatnonzero(fresh))
        shown.append(examples.fingerprint)
    return Dataset(
        name=section.name,
        tokenizer=encoding.tokenizer,
        table=table,
        splits=splits,
        demonstrated=demonstrated,
        max_prompt_length=section.max_prompt,
        max_completion_length=section.max_completion,
        judge=judge,
        reward_range=reward_range,
        fingerprint=hashlib.sha256(json.dumps(shown).encode()).hexdigest(),
        reference_logps=section.reference_logps,
    )


def _report(name: str, split: str, report: schema.FaultReport) -> None:
    if report.counts:
        logger.warning("dataset %s, %s: %s", name, split, report)


def _table(
    rows: sources.Rows, examples: Examples, section: config.DatasetSection
) -> Table:
    return Table(
        prompts=Prompts(*_padded(examples.prompts, section.max_prompt)),
        completions=tuple(
            Completions(*_padded(each, section.max_completion))
            for each in examples.completions
        ),
        answers=tuple(getattr(rows[int(i)], "answer", None) for i in examples.rows),
    )


def _padded(ragged: Any, width: int) -> tuple[np.ndarray, np.ndarray]:
    """(int32[n, width] with zeros behind each list, int32[n])."""
    lengths = ragged.lengths.astype(np.int32)
    tokens = np.zeros((len(lengths), width), np.int32)
    tokens[np.arange(width) < lengths[:, None]] = ragged.flat
    return tokens, lengths


def _joined(tables: Mapping[str, Table]) -> tuple[Table, dict[str, np.ndarray]]:
    """One table, and which of its rows each split has."""

    def stacked(kind, rows):
        return kind(
            np.concatenate([each.tokens for each in rows]),
            np.concatenate([each.lengths for each in rows]),
        )

    parts = list(tables.values())
    ends = np.cumsum([len(part) for part in parts])
    table = Table(
        prompts=stacked(Prompts, [part.prompts for part in parts]),
        completions=tuple(
            stacked(Completions, each)
            for each in zip(*(part.completions for part in parts))
        ),
        answers=tuple(answer for part in parts for answer in part.answers),
    )
    splits = {
        split: np.arange(end - len(part), end)
        for split, part, end in zip(tables, parts, ends)
    }
    return table, splits


def _told_apart(rows: sources.Rows, examples: Examples) -> list[tuple[str, bytes]]:
    """Of each row that was kept, what no other prompt has: its words, and its tokens as they are cut."""
    return [
        (schema.gist(rows[int(i)].prompt), examples.prompts[number].tobytes())
        for number, i in enumerate(examples.rows)
    ]


def _fresh(
    name: str,
    what: str,
    prompts: Sequence[tuple[str, bytes]],
    seen: Set[str | bytes],
    where: str,
) -> np.ndarray:
    """bool[n], the prompts of which nothing has been seen; that there are others is said."""
    fresh = np.array([seen.isdisjoint(prompt) for prompt in prompts], bool)
    if not fresh.all():
        logger.warning(
            "dataset %s: %d of %d %s have a prompt of %s and are left out",
            *(name, int((~fresh).sum()), len(fresh), what, where),
        )
    return fresh


def _without_leaks(
    name: str, prompts: Sequence[tuple[str, bytes]], splits: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The splits, those held out without the rows whose prompt is in a split before them.

    Raises:
      ValueError: nothing is left of one.
    """
    kept: dict[str, np.ndarray] = {}
    seen: set[str | bytes] = set()
    for split, rows in splits.items():
        told_apart = [prompts[row] for row in rows]
        before = set[str | bytes]() if split == "train" else seen
        fresh = _fresh(name, f"{split} rows", told_apart, before, "an earlier split")
        seen.update(*told_apart)
        kept[split] = rows[fresh]
        if not fresh.any():
            raise ValueError(
                f"no prompt of the {split} split is new: all are in the splits before it; give another split"
            )
    return kept


# Gold rewards.


class _Checked(NamedTuple):
    """How completions are checked.

    Attributes:
      is_right: `(completion, the row's answer) -> right or not`.
      is_answer: whether a row's answer is one that completions can be checked by.
    """

    is_right: Callable[[str, str], bool]
    is_answer: Callable[[str], bool]


_ANSWERS: Mapping[str, _Checked] = {
    "number": _Checked(answers.is_right, answers.is_answer),
    "puzzle": _Checked(puzzles.is_right, puzzles.is_answer),
}
"""By the name that a config gives."""


_REFERENCES: Mapping[str, Callable[[str, str], float]] = {"rouge_l": overlap.rouge_l}
"""`(completion, the row's own completion) -> closeness in [0, 1]`, by the name that a config gives."""


def _judge(
    section: config.DatasetSection, encoding: Encoding
) -> tuple[Judge | None, tuple[float, float] | None]:
    if section.gold is None:
        return None, None
    if section.gold in _ANSWERS:
        return functools.partial(_checked, _ANSWERS[section.gold].is_right), (0.0, 1.0)
    if section.gold in _REFERENCES:
        overlap.check()
        return functools.partial(_near, _REFERENCES[section.gold]), (0.0, 1.0)
    directory = pathlib.Path(section.gold)
    if not (directory / "config.json").exists():
        raise ValueError(
            f"gold is {section.gold!r}, which is neither {' nor '.join((*_ANSWERS, *_REFERENCES))} nor a directory with a reward model of transformers"
        )
    theirs = tokenizer.Tokenizer(directory)
    words = "The gold reward reads the same ids: 2024, naïve, 東京."
    if theirs.encode(words) != encoding.tokenizer.encode(words):
        raise ValueError(
            f"the reward model in {directory} has another tokenizer than the policy, so it would read other words; train"
            " one with the policy's"
        )
    return _RewardModelJudge(directory), (-np.inf, np.inf)


def _checked(
    is_right: Callable[[str, str], bool],
    prompts: RowPrompts,
    completions: Completions,
    dataset: Dataset,
) -> np.ndarray:
    """1 where a completion is right by the row's answer, else 0."""
    right = []
    for row, tokens, length in zip(
        prompts.rows, completions.tokens, completions.lengths
    ):
        answer = dataset.table.answers[row]
        text = dataset.decode(tokens[:length])
        right.append(answer is not None and is_right(text, answer))
    return np.array(right, np.float32)


def _near(
    closeness: Callable[[str, str], float],
    prompts: RowPrompts,
    completions: Completions,
    dataset: Dataset,
) -> np.ndarray:
    """How near a completion is to the row's own one, of a pair the chosen one."""
    references = dataset.table.completions[0]
    found = []
    for row, tokens, length in zip(
        prompts.rows, completions.tokens, completions.lengths
    ):
        reference = references.tokens[row][: references.lengths[row]]
        text = dataset.decode(tokens[:length])
        found.append(closeness(text, dataset.decode(reference)))
    return np.array(found, np.float32)


class _RewardModelJudge:
    """A sequence classifier of transformers, read when it is first needed."""

    def __init__(self, directory: pathlib.Path):
        self._directory = directory

    @functools.cached_property
    def _scorer(self):
        model, params = hf.load_reward_model(self._directory)
        return jax.jit(heads.reward_fn(model, pooling="last")), params

    def __call__(
        self, prompts: RowPrompts, completions: Completions, dataset: Dataset
    ) -> np.ndarray:
        score, params = self._scorer
        batch = sequences(prompts, completions, dataset.pad_id)
        part, made = 16, []
        for first in range(0, len(prompts), part):
            rows = np.minimum(np.arange(first, first + part), len(prompts) - 1)
            scores = score(params, batch.tokens[rows], batch.completion_mask[rows])
            made.append(np.asarray(scores))
        return np.concatenate(made)[: len(prompts)].astype(np.float32)
