"""A teacher's most likely tokens at every token of the reference solutions, as Parquet files.

FOLDER/
  teacher.json         of which model, data and prompts they are: see `CacheKey`
  part-00000.parquet   those of PART_PROBLEMS training problems, in the order of the problems

A row is a problem, in a row group of its own, so that it can be read alone:

  problem     its id
  prompt      token ids that the teacher read before the solution, int32
  completion  token ids of the solution, int32
  ids         the k most likely tokens at each of those, one after the other, int32
  logprob     their log-probabilities, largest first, float32

A file is written under another name and renamed: what has its name is whole.
"""

from __future__ import annotations

import importlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, cast

import numpy as np

from opsd_train.config.errors import UserError
from opsd_train.config.method_schema import TeacherConfig
from opsd_train.config.schema import Config
from opsd_train.data.batches import Sample
from opsd_train.data.files import shorten, shorten_path
from opsd_train.data.fingerprint import Fingerprint, difference
from opsd_train.data.problems import Problem

FORMAT = 1
PART_PROBLEMS = 256
WRITE = "python -m opsd_train cache-teacher RECIPE"
# Names of the key's values that are read again.
PROMPT, TOP_K, WEIGHTS = "distill.prompt", "loss.top_k", "the digest of the teacher's weights"
TEACHER_VOCAB, SHARED_VOCAB = "the teacher's vocabulary", "the shared vocabulary"


@dataclass(frozen=True)
class CacheKey:
    """What a cache is of. Two caches with the same key hold the same numbers."""

    values: dict[str, Any]  # by the recipe's key, where there is one; JSON
    data: Fingerprint

    @classmethod
    def of(
        cls,
        config: Config,
        teacher: TeacherConfig,
        tokenizer: Any,
        data: Fingerprint,
        *,
        problems: int,
        teacher_vocab: int,
        student_vocab: int,
        weights: str | None,
    ) -> CacheKey:
        """The key of this recipe.

        data                          of all problems of the recipe
        problems                      to train on, those that are not too long
        teacher_vocab, student_vocab  entries of the models' vocabularies, padding included
        weights                       digest of the teacher's; None: they are not on this machine
        """
        side, prompts = teacher.prompt, config.prompts
        shared = min(teacher_vocab, student_vocab)
        values = {
            "format": FORMAT,
            "distill.teacher": teacher.teacher,
            "distill.dtype": teacher.dtype,
            WEIGHTS: weights,
            "loss.temperature": config.loss.temperature,
            TOP_K: min(config.loss.top_k, shared),
            TEACHER_VOCAB: teacher_vocab,
            SHARED_VOCAB: shared,
            PROMPT: side,
            f"prompts.{side}": getattr(prompts, side),
            "prompts.system": prompts.system,
            f"prompts.{side}_chat_template": getattr(prompts, f"{side}_chat_template"),
            f"prompts.{side}_thinking": getattr(prompts, f"{side}_thinking"),
            "the number of problems that are not too long": problems,
            "the digest of the tokenizer": _tokenizer_digest(tokenizer),
        }
        return cls(values, data)

    @property
    def top_k(self) -> int:
        """How many of the most likely tokens."""
        return self.values[TOP_K]

    def refuse(self, other: CacheKey, folder: Path, free: Sequence[str] = ()) -> None:
        """Raise UserError if a recipe with the key `other` is not the one of this cache.

        Values named in `free` may differ.
        """
        changed = [
            f"{name} was {shorten(self.values.get(name), 70)} and is "
            f"{shorten(other.values.get(name), 70)}"
            for name in {**self.values, **other.values}
            if self.values.get(name) != other.values.get(name) and name not in free
        ]
        reason = difference(self.data, other.data, folder) or next(iter(changed), None)
        if reason is not None:
            raise UserError(
                f"the teacher cache {shorten_path(folder)} is not of this recipe: {reason}; set it "
                f"back, or write another: distill.cache=FOLDER and {WRITE}"
            )


class TeacherCache:
    """The cache in a folder, of these problems; the folder need not exist yet."""

    def __init__(self, folder: Path, problems: Sequence[Problem]) -> None:
        self.folder = folder
        self._positions = {problem.id: number for number, problem in enumerate(problems)}
        self._problems = problems
        self._footers: dict[int, Any] = {}  # of parts

    @property
    def exists(self) -> bool:
        """Whether anything has been written."""
        return self._key_file.exists()

    @cached_property
    def key(self) -> CacheKey:
        """What the cache is of. Raises UserError if there is none, or if it cannot be read."""
        try:
            saved = json.loads(self._key_file.read_text(encoding="utf-8"))
            key = CacheKey(saved["values"], saved["data"])
            if key.values["format"] != FORMAT:
                raise ValueError(f"it has format {key.values['format']}, not {FORMAT}")
            return key
        except FileNotFoundError:
            raise UserError(
                f"there is no teacher cache in {shorten_path(self.folder)}; write it: {WRITE}"
            ) from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"cannot read {self._key_file}: {error}; delete the cache") from None

    def parts(self) -> list[list[Problem]]:
        """The problems of each part."""
        starts = range(0, len(self._problems), PART_PROBLEMS)
        return [list(self._problems[first : first + PART_PROBLEMS]) for first in starts]

    def missing(self) -> list[int]:
        """Numbers of the parts that are not there, or damaged."""
        sizes = map(len, self.parts())
        return [n for n, size in enumerate(sizes) if self._fault(n, size) is not None]

    def check(self) -> None:
        """Raise UserError if a part is not there, or damaged."""
        for number, problems in enumerate(self.parts()):
            fault = self._fault(number, len(problems))
            if fault is not None:
                raise UserError(
                    f"the teacher cache {shorten_path(self.folder)} is not whole: "
                    f"{self._part(number).name} {fault}; finish it: {WRITE}"
                )

    def begin(self, key: CacheKey) -> None:
        """Write what the cache is of."""
        if any(self.folder.glob("part-*.parquet")):
            raise UserError(
                f"{shorten_path(self.folder)} has parts of a cache but no teacher.json that says "
                "what they are of; choose another distill.cache"
            )
        text = json.dumps({"values": key.values, "data": key.data}, indent=2)
        _write_whole(self._key_file, lambda file: file.write(text.encode()))

    def write(
        self, number: int, samples: Sequence[Sample], top: Sequence[tuple[np.ndarray, np.ndarray]]
    ) -> None:
        """Write a part: `top` has ids and log-probabilities (T, k) of each sample's completion."""
        pyarrow, parquet = _parquet()
        flat = [(ids.reshape(-1), logprob.reshape(-1)) for ids, logprob in top]
        side = self.key.values[PROMPT]
        columns = {
            "problem": ([s.problem.id for s in samples], pyarrow.string()),
            "prompt": ([getattr(s, f"{side}_prompt") for s in samples], pyarrow.int32()),
            "completion": ([s.completion for s in samples], pyarrow.int32()),
            "ids": ([ids for ids, _ in flat], pyarrow.int32()),
            "logprob": ([logprob for _, logprob in flat], pyarrow.float32()),
        }
        table = pyarrow.table(
            {
                name: pyarrow.array(rows, kind if name == "problem" else pyarrow.list_(kind))
                for name, (rows, kind) in columns.items()
            }
        )
        options = {"compression": "zstd", "write_page_checksum": True, "row_group_size": 1}
        _write_whole(self._part(number), lambda file: parquet.write_table(table, file, **options))

    def read(self, sample: Sample) -> tuple[np.ndarray, np.ndarray]:
        """Ids (T, k) int32 and log-probabilities (T, k) float32 at the sample's completion, which
        is the problem's solution or the beginning of it.

        Raises UserError if the part is damaged, or of another prompt or solution.
        """
        number, row = divmod(self._positions[sample.problem.id], PART_PROBLEMS)
        path, tokens = self._part(number), len(sample.completion)
        pyarrow, parquet = _parquet()
        try:
            with (
                open(path, "rb") as opened,
                parquet.ParquetFile(
                    opened, metadata=self._metadata(number), page_checksum_verification=True
                ) as file,
            ):
                group = file.read_row_group(row)
            name, prompt, completion, ids, logprob = (
                group.column(column)[0] for column in group.column_names
            )
        except (OSError, pyarrow.ArrowException) as error:
            raise UserError(
                f"{path} is damaged ({_reason(error)}); delete it, and finish the cache: {WRITE}"
            ) from None
        side = self.key.values[PROMPT]
        own = (sample.problem.id, getattr(sample, f"{side}_prompt"), sample.completion)
        if own != (name.as_py(), prompt.as_py(), completion.as_py()[:tokens]):
            raise UserError(
                f"the teacher cache {shorten_path(self.folder)} is of another prompt or solution "
                f"of problem {sample.problem.id}; delete it, and write it again: {WRITE}"
            )
        flat = (column.values.to_numpy(zero_copy_only=False) for column in (ids, logprob))
        shape = (len(completion), -1)
        first, second = (values.reshape(shape)[:tokens] for values in flat)
        return first, second

    @property
    def _key_file(self) -> Path:
        return self.folder / "teacher.json"

    def _part(self, number: int) -> Path:
        return self.folder / f"part-{number:05d}.parquet"

    def _metadata(self, number: int) -> Any:
        """A part's footer, read once."""
        if number not in self._footers:
            self._footers[number] = _parquet()[1].read_metadata(self._part(number))
        return self._footers[number]

    def _fault(self, number: int, size: int) -> str | None:
        """What is wrong with a part of so many problems; None if nothing."""
        pyarrow, _ = _parquet()
        try:
            rows = self._metadata(number).num_rows
        except FileNotFoundError:
            return "is missing"
        except (OSError, pyarrow.ArrowException) as error:
            return f"is damaged ({_reason(error)})"
        return None if rows == size else f"has {rows} problems, not {size}"


def _tokenizer_digest(tokenizer: Any) -> str:
    """Digest of the tokens with their ids, and of the chat template."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.chat_template]
    return sha256(json.dumps(content).encode()).hexdigest()


def _parquet() -> tuple[Any, Any]:
    """pyarrow and pyarrow.parquet, which take long to import."""
    return importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")


def _write_whole(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Write a file under another name, bring it to disk, and rename it."""
    partial = path.with_name(f"{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(partial, "wb") as file:
            write(cast(BinaryIO, file))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        raise UserError(
            f"cannot write {shorten_path(path)}: {error.strerror}; once it can be written, the "
            "same command goes on with the rest"
        ) from None


def _reason(error: Exception) -> str:
    return shorten(" ".join(str(error).split()), 80, quoted=False)
