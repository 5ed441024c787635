"""encoder.py."""
import pytest
import torch

from kernels.harness.encoder import Encoder


@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 28, 28), (1, 16, 16, 16), (2, 9, 7)])
def test_encoder_shapes_and_no_sample_sees_another(shape):
    torch.manual_seed(0)
    encoder = Encoder(shape[0], len(shape) - 1, width=4, depth=2)
    x = torch.randn(5, *shape)
    h = encoder(x)
    assert h.shape == (5, 32)
    assert encoder.features == 32
    torch.testing.assert_close(encoder(x[2:3])[0], h[2])
