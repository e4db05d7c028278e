"""The JSON files of a journey, typed where they are read: what a disk or a hand damaged is named, never used."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, TypeAdapter, model_validator

from sptnet.data.format.fields import Count
from sptnet.discover.children import StageError
from sptnet.discover.plan import Cost, Plan
from sptnet.run.records import DamagedError, read_json

T = TypeVar("T", bound=BaseModel)


class Estimated(BaseModel):
    """What is used of estimate_k.json."""

    median: Count
    low: Count
    high: Count
    num_old: Count
    num_new: Count


class Measured(BaseModel):
    """measured.json: the costs by image size in pixels; bytes that are available to a rank."""

    costs: dict[Annotated[int, BeforeValidator(int), Field(gt=0)], Cost]
    available: float
    device: str
    precision: str


def plan_of(told: dict[str, Any]) -> Plan:
    """A plan from `_asdict` of it, also where that went through JSON; raises ValidationError."""
    return TypeAdapter(Plan).validate_python(told)


def _checked(told: dict[str, Any]) -> dict[str, Any]:
    plan = plan_of(told)
    if plan.image_size <= 0 or not all(0 <= seconds < math.inf for seconds in (*plan.seconds, plan.whole)):
        raise ValueError("a plan of no size, or of no number of seconds")
    return told


class Choices(BaseModel):
    """plan.json: what is chosen at the first start, and, once it is planned, the plan."""

    model_config = ConfigDict(extra="allow")

    precision: Literal["no", "bf16", "fp16"]
    resize: Annotated[int, Field(gt=0)] | None
    left_out: str | None = None
    image_size: Annotated[int, Field(gt=0)] | None = None
    hours: Annotated[float, Field(gt=0)] | None = None
    plan: Annotated[dict[str, Any], AfterValidator(_checked)] | None = None
    recipe: tuple[Count, Count] | None = None
    batch: Count | None = None
    device: str | None = None
    dealt: tuple[Annotated[int, Field(gt=0)], Annotated[int, Field(gt=0)], Count] | None = None

    @model_validator(mode="after")
    def _of_a_piece(self) -> "Choices":
        beside = ("plan", "image_size", "hours", "recipe", "batch", "device")
        if "plan" in self.model_fields_set and (lacking := [key for key in beside if getattr(self, key) is None]):
            raise ValueError(f"it has a plan, and no {lacking[0]}")
        return self


def read_kept(path: Path, kind: type[T]) -> T:
    """Raises StageError, with the way out; FileNotFoundError."""
    try:
        return read_json(path, kind)
    except FileNotFoundError:
        raise
    except OSError as error:
        reason = error.strerror or str(error)
    except DamagedError as error:
        reason = str(error)
    raise StageError(
        f"{path} cannot be used ({reason}): remove it, and run the same command to make it again"
    ) from None


def is_kept(path: Path, kind: type[Any]) -> bool:
    """Whether it is there and whole."""
    try:
        read_json(path, kind)
    except (OSError, DamagedError):
        return False
    return True
