"""Training: configuration, optimizer, loss, the step as a pure function, and whole runs that can stop and go on."""

from glm45_jax.train.checkpoint import Checkpoints
from glm45_jax.train.config import TokenizerConfig, TrainConfig, load_train_config
from glm45_jax.train.digest import params_digest
from glm45_jax.train.distributed import DistributedConfig
from glm45_jax.train.loop import TrainResult, evaluate, export_newest, train
from glm45_jax.train.loss import loss_fn
from glm45_jax.train.optimizer import OptimizerConfig, make_optimizer, make_schedule, parameter_groups
from glm45_jax.train.report import read_metrics
from glm45_jax.train.stages import Stage, load_recipe, run_recipe
from glm45_jax.train.step import TrainState, init_state, train_step

__all__ = [
    "Checkpoints",
    "DistributedConfig",
    "OptimizerConfig",
    "Stage",
    "TokenizerConfig",
    "TrainConfig",
    "TrainResult",
    "TrainState",
    "evaluate",
    "export_newest",
    "init_state",
    "load_recipe",
    "load_train_config",
    "loss_fn",
    "make_optimizer",
    "make_schedule",
    "parameter_groups",
    "params_digest",
    "read_metrics",
    "run_recipe",
    "train",
    "train_step",
]
