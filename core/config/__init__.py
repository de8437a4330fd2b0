"""The config of a run as users write it: flat YAML, checked once, frozen after."""

from core.config.flat_yaml import dump_yaml, parse_train_config, read_train_config, resolve
from core.config.schema import (
    COMPANIONS,
    INPUTS,
    OPTIMIZERS,
    PRODUCTS,
    AdapterKind,
    GenerateConfig,
    TrainConfig,
    size_of,
)

__all__ = ["COMPANIONS", "INPUTS", "OPTIMIZERS", "PRODUCTS", "AdapterKind", "GenerateConfig",
           "TrainConfig", "dump_yaml", "parse_train_config", "read_train_config", "resolve",
           "size_of"]
