"""Configuration: frozen dataclasses, one per component, validated when they are made."""

from poa.config.augment import AugmentConfig, MaskConfig
from poa.config.data import DataConfig
from poa.config.files import from_dict, load_recipe, load_yaml, recipe_names, to_dict, to_yaml
from poa.config.model import HeadsConfig, ViTConfig
from poa.config.objective import ObjectiveConfig
from poa.config.optim import OptimConfig
from poa.config.pretrain import MonitorConfig, PretrainConfig, RuntimeConfig, TrainConfig

__all__ = [
    "AugmentConfig",
    "DataConfig",
    "HeadsConfig",
    "MaskConfig",
    "MonitorConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PretrainConfig",
    "RuntimeConfig",
    "TrainConfig",
    "ViTConfig",
    "from_dict",
    "load_recipe",
    "load_yaml",
    "recipe_names",
    "to_dict",
    "to_yaml",
]
