"""What the sections of a configuration are made of: the decorator, and numbers in a range."""

from typing import Annotated, TypeVar, cast, dataclass_transform

from pydantic import ConfigDict, Field
from pydantic.dataclasses import dataclass

Positive = Annotated[int, Field(gt=0)]
Count = Annotated[int, Field(ge=0)]
PositiveReal = Annotated[float, Field(gt=0)]
NonNegativeReal = Annotated[float, Field(ge=0)]
UnitInterval = Annotated[float, Field(ge=0, le=1)]

Section = TypeVar("Section")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(Field,))
def section(cls: type[Section]) -> type[Section]:
    """Make a frozen pydantic dataclass; the string below each field becomes its description."""
    settings = ConfigDict(extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)
    return cast(type[Section], dataclass(frozen=True, kw_only=True, config=settings)(cls))
