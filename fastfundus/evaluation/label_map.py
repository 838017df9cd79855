"""Mapping of another set's labels to a run's outputs: `abnormal=dr_grade>=1|drusen`, `dr=!normal`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import polars as pl
from numpy.typing import NDArray

from fastfundus.errors import ConfigError, DataError, close_matches
from fastfundus.training.tasks.targets import Targets, label_columns

__all__ = ["LabelMap"]

_COMPARE: dict[str, Callable[[Any, Any], Any]] = {
    ">=": operator.ge, "<=": operator.le, "==": operator.eq, "!=": operator.ne, ">": operator.gt, "<": operator.lt,
}  # fmt: skip
_TERM = re.compile(r"(?P<no>!?)\s*(?P<column>[^<>=!|]+?)\s*(?:(?P<sign>>=|<=|==|!=|>|<)\s*(?P<value>.+?))?\s*")


@dataclass(frozen=True, slots=True)
class _Term:
    column: str
    no: bool
    sign: str | None
    value: str

    def truth(self, manifest: pl.DataFrame) -> NDArray[np.float64]:
        """Return [N] 1, 0, or NaN where the column is empty."""
        if self.column not in manifest.columns:
            close = close_matches(self.column, label_columns(manifest))
            raise ConfigError(f"--map: the manifest has no column {self.column!r}{close}")
        values = manifest[self.column]
        if self.sign is None:
            wrong = values.drop_nulls().unique()
            wrong = wrong if wrong.dtype == pl.String else wrong.filter(~wrong.cast(pl.Float64).is_in([0.0, 1.0]))
            if len(wrong):
                raise DataError(
                    f"--map: column {self.column!r} holds {wrong[0]!r}, but without a comparison it may hold "
                    f"only 0 and 1; add a comparison, such as {self.column}=={wrong[0]}"
                )
            said = values.cast(pl.Float64)
        else:
            limit = self.value if values.dtype == pl.String else self._number()
            said = _COMPARE[self.sign](values, limit).cast(pl.Float64)
        known = said.to_numpy().astype(np.float64)
        return 1 - known if self.no else known

    def _number(self) -> float:
        try:
            return float(self.value)
        except ValueError:
            raise ConfigError(
                f"--map: {self.column!r} is a numeric column and cannot be compared with {self.value!r}"
            ) from None


@dataclass(frozen=True, slots=True)
class LabelMap:
    """Rules by output that derive its ground truth from the columns of a manifest."""

    rules: dict[str, tuple[_Term, ...]]
    said: dict[str, str]
    """Text of each rule as given, for the record."""

    @classmethod
    def parse(cls, texts: Sequence[str], outputs: Sequence[str]) -> LabelMap:
        """Parse rules of the form OUTPUT=TERM|TERM...

        A term is a column of 0 and 1, or a column followed by >=, <=, ==, !=, > or < and a value. A leading !
        negates it.

        Args:
            texts: one rule per output.
            outputs: outputs of the run.

        Raises:
            ConfigError: a rule cannot be parsed, names an unknown output, or names an output twice.
        """
        rules, said = {}, {}
        for text in texts:
            name, equals, rule = text.partition("=")
            name = name.strip()
            if not equals or not rule.strip():
                raise ConfigError(f"--map {text!r} must have the form OUTPUT=COLUMN, such as abnormal=dr_grade>=1")
            if name not in outputs:
                raise ConfigError(f"--map {text!r}: the run has no output {name!r}{close_matches(name, outputs)}")
            if name in rules:
                raise ConfigError(f"--map: {name!r} is mapped twice; combine the columns with |, which means or")
            rules[name], said[name] = tuple(map(_term, rule.split("|"))), rule.strip()
        return cls(rules, said)

    def targets(self, manifest: pl.DataFrame, outputs: tuple[str, ...]) -> Targets:
        """Return the targets of every photo: 1 where any term is true, 0 where all are false, and otherwise NaN.

        An output without a rule takes the column of the same name if there is one, and is otherwise unknown. Rules for
        outputs that are not in `outputs` are ignored.
        """
        truth = np.full((len(manifest), len(outputs)), np.nan)
        for number, name in enumerate(outputs):
            terms = self.rules.get(name) or ((_Term(name, False, None, ""),) if name in manifest.columns else ())
            if terms:
                each = np.stack([term.truth(manifest) for term in terms])
                truth[:, number] = np.where((each == 1).any(0), 1, np.where((each == 0).all(0), 0, np.nan))
        return Targets(truth, outputs, ", ".join(f"{name}={rule}" for name, rule in self.said.items()))


def _term(text: str) -> _Term:
    found = _TERM.fullmatch(text.strip())
    if not found:
        raise ConfigError(f"--map: {text!r} is not a valid term; give a column, such as dr_grade>=1 or !normal")
    return _Term(found["column"], bool(found["no"]), found["sign"], found["value"] or "")
