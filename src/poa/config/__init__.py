"""Configuration: frozen dataclasses, one per component, validated when they are made."""

from poa.config.augment import AugmentConfig, MaskConfig
from poa.config.convnext import ConvNeXtConfig
from poa.config.data import DataConfig
from poa.config.detect import DETECT_FIT, DetectConfig
from poa.config.files import from_dict, load_recipe, load_yaml, recipe_names, to_dict, to_yaml
from poa.config.finetune import ElasticConfig, FinetuneConfig
from poa.config.fit import FitConfig
from poa.config.heads import HeadsConfig
from poa.config.init import InitConfig
from poa.config.model import MODEL_CONFIGS, ModelConfig
from poa.config.objective import ObjectiveConfig
from poa.config.optim import OptimConfig
from poa.config.parallel import ParallelConfig
from poa.config.pretrain import MonitorConfig, PretrainConfig, RuntimeConfig, TrainConfig
from poa.config.resnet import ResNetConfig
from poa.config.segment import SegmentConfig
from poa.config.swin import SwinConfig
from poa.config.vit import ViTConfig

__all__ = [
    "DETECT_FIT",
    "MODEL_CONFIGS",
    "AugmentConfig",
    "ConvNeXtConfig",
    "DataConfig",
    "DetectConfig",
    "ElasticConfig",
    "FinetuneConfig",
    "FitConfig",
    "HeadsConfig",
    "InitConfig",
    "MaskConfig",
    "ModelConfig",
    "MonitorConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "ParallelConfig",
    "PretrainConfig",
    "ResNetConfig",
    "RuntimeConfig",
    "SegmentConfig",
    "SwinConfig",
    "TrainConfig",
    "ViTConfig",
    "from_dict",
    "load_recipe",
    "load_yaml",
    "recipe_names",
    "to_dict",
    "to_yaml",
]
