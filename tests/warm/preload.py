"""What processes of tests need, imported once by the one that forks them (tests/forks.py). Nothing here may start a
thread or compute: a fork takes neither along. Without torch._dynamo and matplotlib among them they would be two
thirds of what a rank of a tiny model costs.
"""
# ruff: noqa: F401

import gc
import logging.config

import hydra._internal.core_plugins.bash_completion
import hydra._internal.core_plugins.basic_launcher
import hydra._internal.core_plugins.basic_sweeper
import hydra._internal.core_plugins.file_config_source
import hydra._internal.core_plugins.importlib_resources_config_source
import hydra._internal.core_plugins.structured_config_source
import hydra._internal.instantiate._instantiate2
import hydra.core.override_parser.overrides_parser
import hydra.main
import matplotlib.backends.backend_agg
import matplotlib.figure
import matplotlib.ticker
import pytest
import torch._dynamo
import torch.distributed.tensor
import torch.profiler

import src.cluster.rank
import src.cluster.replicas.worker
import src.launch.start
import src.models.deepseek_v3.model
import src.models.llama3.model
import src.models.qwen3.model
import src.tasks.pretrain.rank
import tests.fault_tolerance.life

# What is here stays: forks neither search it for garbage (0.4 s each time) nor copy its pages for that.
gc.collect()
gc.freeze()
