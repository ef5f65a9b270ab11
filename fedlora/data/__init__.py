"""Per-client data sets: examples, batches, splits, partitions and the registry."""

from fedlora.data.client import ClientData, FederatedData
from fedlora.data.examples import IGNORED, Batch, Examples, collate, draw_batches, eval_batches
from fedlora.data.partition import dirichlet_partition, group_partition, iid_partition
from fedlora.data.registry import DataInfo, list_data, load_data

__all__ = [
    "IGNORED",
    "Batch",
    "ClientData",
    "DataInfo",
    "Examples",
    "FederatedData",
    "collate",
    "dirichlet_partition",
    "draw_batches",
    "eval_batches",
    "group_partition",
    "iid_partition",
    "list_data",
    "load_data",
]
