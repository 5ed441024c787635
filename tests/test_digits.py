"""digits.py: the data of the first run."""
import torch

from kernels.harness.digits import posed_digits


def test_posed_digits_are_the_same_for_every_seed():
    torch.manual_seed(0)
    a = posed_digits(2)
    torch.manual_seed(1)
    b = posed_digits(2)
    assert torch.equal(a.images, b.images) and torch.equal(a.test_images, b.test_images)
    assert a.images.shape == (1437, 1, 20, 20) and a.test_images.shape == (1440, 1, 20, 20)
    assert torch.equal(a.test_labels[:360], a.test_labels[360:720])
    assert not torch.equal(a.test_images[:360], a.test_images[360:720])
    assert posed_digits(3).images.shape == (1437, 1, 16, 16, 16)
