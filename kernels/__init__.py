"""Fused losses for self-supervised learning, and has it collapsed? Triton on GPUs, plain torch elsewhere.

A name is imported when it is first asked for, so that what needs no torch can be had before torch is loaded.
"""
from importlib import import_module

__version__ = "2.7.0"

NAMES = {
    "bank": "bank_cross_entropy bank_logsumexp bank_reference bank_repulsion bank_topk unit_rows",
    "collapse": "CollapseWatch collapse_panel few_label_accuracy knn_accuracy verdict",
    "covariance": "variance_covariance variance_covariance_reference",
    "dictionary": "dictionary_loss dictionary_reference dictionary_signs",
}
HOME = {name: module for module, names in NAMES.items() for name in names.split()}
__all__ = list(HOME)


def __getattr__(name):
    if name not in HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{HOME[name]}", __name__), name)
