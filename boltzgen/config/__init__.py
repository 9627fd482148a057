"""Validated configuration objects, read from and written to YAML; units are strings and are checked on loading."""

from boltzgen.config.campaign import CampaignConfig, EngineConfig
from boltzgen.config.cartesian import CartesianConfig
from boltzgen.config.collective_variables import (
    AngleConfig,
    CollectiveVariableConfig,
    CombinationConfig,
    CoordinationConfig,
    DihedralConfig,
    DistanceConfig,
    EndToEndConfig,
    ForceConfig,
    RadiusOfGyrationConfig,
    RMSDConfig,
    TermConfig,
    VariableConfig,
)
from boltzgen.config.continuous import FieldConfig, MatchingConfig
from boltzgen.config.generator import AnnealingConfig, FlowConfig, GeneratorConfig, TrainingConfig
from boltzgen.config.jumps import JumpsConfig
from boltzgen.config.molecule import LADDER_RATIO, LADDER_RUNGS, DataConfig, MoleculeConfig, SystemConfig
from boltzgen.config.particles import ParticlesConfig, ParticleSystemConfig, WalkersConfig
from boltzgen.config.paths import PathsConfig
from boltzgen.config.reading import (
    Config,
    JobConfig,
    answered_by,
    config_text,
    default_config_text,
    dump_config,
    load_config,
    load_job,
    make_config,
    production_cycles,
    trained_by,
)
from boltzgen.config.sections import EvaluationConfig, PlatformConfig
from boltzgen.config.tfep import (
    EndStateConfig,
    EnsembleMatchingConfig,
    Joining,
    MapConfig,
    MapTrainingConfig,
    TfepConfig,
    WorkEvaluationConfig,
)

__all__ = [
    "LADDER_RATIO",
    "LADDER_RUNGS",
    "AngleConfig",
    "AnnealingConfig",
    "CampaignConfig",
    "CartesianConfig",
    "CollectiveVariableConfig",
    "CombinationConfig",
    "Config",
    "CoordinationConfig",
    "DataConfig",
    "DihedralConfig",
    "DistanceConfig",
    "EndStateConfig",
    "EndToEndConfig",
    "EngineConfig",
    "EnsembleMatchingConfig",
    "EvaluationConfig",
    "FieldConfig",
    "FlowConfig",
    "ForceConfig",
    "GeneratorConfig",
    "JobConfig",
    "Joining",
    "JumpsConfig",
    "MapConfig",
    "MapTrainingConfig",
    "MatchingConfig",
    "MoleculeConfig",
    "ParticleSystemConfig",
    "ParticlesConfig",
    "PathsConfig",
    "PlatformConfig",
    "RMSDConfig",
    "RadiusOfGyrationConfig",
    "SystemConfig",
    "TermConfig",
    "TfepConfig",
    "TrainingConfig",
    "VariableConfig",
    "WalkersConfig",
    "WorkEvaluationConfig",
    "answered_by",
    "config_text",
    "default_config_text",
    "dump_config",
    "load_config",
    "load_job",
    "make_config",
    "production_cycles",
    "trained_by",
]
