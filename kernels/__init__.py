"""Fused losses for self-supervised learning: Triton on GPUs, plain torch everywhere else."""
from .collapse import collapse_panel, few_label_accuracy, knn_accuracy, verdict
from .covariance import variance_covariance, variance_covariance_reference
from .dictionary import dictionary_loss, dictionary_reference, dictionary_signs
from .bank import bank_cross_entropy, bank_logsumexp, bank_reference, bank_repulsion, bank_topk

__all__ = ["bank_cross_entropy", "bank_logsumexp", "bank_reference", "bank_repulsion", "bank_topk",
           "collapse_panel", "few_label_accuracy", "knn_accuracy", "verdict",
           "dictionary_loss", "dictionary_reference", "dictionary_signs",
           "variance_covariance", "variance_covariance_reference"]
