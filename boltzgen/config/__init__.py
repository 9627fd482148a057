"""Validated configuration objects, read from and written to YAML; units are strings and are checked on loading."""

from boltzgen.config.generator import (
    LADDER_RATIO,
    LADDER_RUNGS,
    AnnealingConfig,
    CollectiveVariableConfig,
    DataConfig,
    FlowConfig,
    GeneratorConfig,
    TrainingConfig,
)
from boltzgen.config.particles import FieldConfig, MatchingConfig, ParticlesConfig, ParticleSystemConfig, WalkersConfig
from boltzgen.config.reading import Config, config_text, default_config_text, dump_config, load_config, make_config
from boltzgen.config.sections import EvaluationConfig, PlatformConfig

__all__ = [
    "LADDER_RATIO",
    "LADDER_RUNGS",
    "AnnealingConfig",
    "CollectiveVariableConfig",
    "Config",
    "DataConfig",
    "EvaluationConfig",
    "FieldConfig",
    "FlowConfig",
    "GeneratorConfig",
    "MatchingConfig",
    "ParticleSystemConfig",
    "ParticlesConfig",
    "PlatformConfig",
    "TrainingConfig",
    "WalkersConfig",
    "config_text",
    "default_config_text",
    "dump_config",
    "load_config",
    "make_config",
]
