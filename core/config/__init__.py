"""The config of a run as users write it: flat YAML, checked once, frozen after."""

from core.config.schema import (
    COMPANIONS,
    FOREIGN,
    OPTIMIZERS,
    PRODUCTS,
    AdapterKind,
    GenerateConfig,
    TrainConfig,
    dump_yaml,
    load_train_config,
    parse_train_config,
    resolve,
    size_of,
)

__all__ = ["COMPANIONS", "FOREIGN", "OPTIMIZERS", "PRODUCTS", "AdapterKind", "GenerateConfig",
           "TrainConfig", "dump_yaml", "load_train_config", "parse_train_config", "resolve",
           "size_of"]
