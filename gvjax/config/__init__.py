"""What a run is told: YAML files with `a.b=c` overrides, read strictly into frozen sections.

Unknown keys, wrong types and impossible values are refused before any device is touched, with the value, the rule and
a way out (`ConfigError`, exit code 64). Each section below documents what to expect when a field is changed.
"""

import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from gvjax.config.base import (
    FILE,
    IMPORTED,
    RESOLVED,
    ConfigError,
    FileName,
    Imported,
    Section,
    known,
    marked,
    refusing,
)
from gvjax.config.gap import (
    ControlSection,
    GapConfig,
    GoldJudgeSection,
    HumanJudgeSection,
    LlmJudgeSection,
    MarginsSection,
    PilotSection,
    RewardModelJudgeSection,
    SamplesSection,
    ScorersSection,
    SquareSection,
    Trainable,
    gap_tasks,
    has_pilot,
    study_of,
)
from gvjax.config.reading import (
    dataclass_from,
    import_object,
    override,
    read,
    validate,
)
from gvjax.config.recipes import (
    RECIPES_OF_ROAD,
    AnyRecipe,
    BestOfNSection,
    DpoSection,
    HypoSection,
    OnlineDpoSection,
    PolicyGradientSection,
    PpoSection,
    RebelSection,
    Recipe,
    RejectionSection,
    RewardSection,
    RewardSources,
    SftSection,
    Trained,
    VerifierSection,
)
from gvjax.config.run import RunConfig
from gvjax.config.sections import (
    AnyTask,
    CheckpointSection,
    DatasetSection,
    EvaluationSection,
    LoggingSection,
    LoraSection,
    MeshSection,
    OptimizerSection,
    PairsSection,
    RowsSection,
    TaskSection,
    TimeoutsSection,
    ValidationSection,
    with_tokenizer,
)
from gvjax.config.study import (
    BEST_OFFLINE,
    ArmSection,
    AugmentationSection,
    ContrastSection,
    StudyConfig,
    TwinSection,
    arm_settings,
    needs_ranked_samples,
)

__all__ = [
    "BEST_OFFLINE",
    "FILE",
    "IMPORTED",
    "RECIPES_OF_ROAD",
    "AnyRecipe",
    "AnyTask",
    "ArmSection",
    "AugmentationSection",
    "BestOfNSection",
    "CheckpointSection",
    "ConfigError",
    "ContrastSection",
    "ControlSection",
    "DatasetSection",
    "DpoSection",
    "EvaluationSection",
    "FileName",
    "GapConfig",
    "GoldJudgeSection",
    "HumanJudgeSection",
    "HypoSection",
    "Imported",
    "LlmJudgeSection",
    "LoggingSection",
    "LoraSection",
    "MarginsSection",
    "MeshSection",
    "OnlineDpoSection",
    "OptimizerSection",
    "PairsSection",
    "PilotSection",
    "PolicyGradientSection",
    "PpoSection",
    "RebelSection",
    "Recipe",
    "RejectionSection",
    "RewardModelJudgeSection",
    "RewardSection",
    "RewardSources",
    "RowsSection",
    "RunConfig",
    "SamplesSection",
    "ScorersSection",
    "Section",
    "SftSection",
    "SquareSection",
    "StudyConfig",
    "TaskSection",
    "TimeoutsSection",
    "Trainable",
    "Trained",
    "TwinSection",
    "ValidationSection",
    "VerifierSection",
    "arm_settings",
    "config_hash",
    "dataclass_from",
    "gap_tasks",
    "has_pilot",
    "import_object",
    "known",
    "load",
    "marked",
    "needs_ranked_samples",
    "options",
    "reread",
    "resolved",
    "study_of",
]


def load(
    path: pathlib.Path | str, overrides: Sequence[str] = ()
) -> RunConfig | StudyConfig | GapConfig:
    """Reads a config file and applies `a.b=c` overrides.

    Args:
      path: YAML, see `reading.read`; one with a `study` key is a StudyConfig, one with a `gap` key a GapConfig, else a RunConfig.
      overrides: each `dotted.key=value`, the value read as YAML.

    Raises:
      ConfigError: the file cannot be read, or something in it is refused.
    """
    path = pathlib.Path(path)
    data = read(path)
    for each in overrides:
        override(data, each)
    data = with_tokenizer(data)
    kinds: dict[str, type[Section]] = {"study": StudyConfig, "gap": GapConfig}
    kind = next((kind for key, kind in kinds.items() if key in data), RunConfig)
    with refusing():
        return validate(kind, data, str(path))  # type: ignore[return-value]


def options(assignments: Sequence[str]) -> dict[str, Any]:
    """The values of `key=value` words, read as YAML.

    Raises:
      ConfigError: one is not of that form.
    """
    found: dict[str, Any] = {}
    for each in assignments:
        override(found, each)
    return found


def reread(text: str) -> RunConfig:
    """A RunConfig that was written out with every field: unused ones are not held against it.

    Raises:
      ConfigError: it is no config of this version.
    """
    return validate(RunConfig, json.loads(text), "the kept config", RESOLVED)


def resolved(config: Section) -> dict[str, Any]:
    """Every field with its value, as plain JSON data."""
    return config.model_dump(mode="json")


def config_hash(config: Section | Mapping[str, Any]) -> str:
    """16 hex digits that change when any value does."""
    data = resolved(config) if isinstance(config, Section) else config
    text = json.dumps(data, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
