"""Fused losses for self-supervised learning: Triton on GPUs, plain torch everywhere else."""
from .covariance import variance_covariance, variance_covariance_reference

__all__ = ["variance_covariance", "variance_covariance_reference"]
