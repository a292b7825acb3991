"""Half of a symmetric product is the whole one, on a GPU that makes it so."""

import pytest
import torch

from src.optim.newton_schulz import COEFFICIENTS, orthogonalise, symmetric_product_of


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3072, 4104), (4096, 1536), (40, 1400, 2048), (3000, 9000)])
def test_half_a_product_is_the_whole(shape: tuple[int, ...]) -> None:
    """Rows that end inside of a tile, too. Both round a float32 sum once to bfloat16, whose step is 2^-8."""
    from src.optim.kernels.symmetric import is_faster, symmetric_product

    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda").div_(shape[-1] ** 0.5).bfloat16()
    assert is_faster(x)
    exact = x.float() @ x.float().mT
    gram = symmetric_product(x)
    assert torch.equal(gram, gram.mT)
    torch.testing.assert_close(gram.float(), exact, rtol=2**-7, atol=2**-9)
    _, b, c = COEFFICIENTS
    wide = gram.float()
    factor = symmetric_product(gram, gram, alpha=c, beta=b)
    torch.testing.assert_close(factor.float(), b * wide + c * (wide @ wide.mT), rtol=2**-7, atol=2**-7)


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(3072, 4096), (8192, 3072)])
def test_a_matrix_is_made_orthogonal_by_halves_as_by_wholes(
    shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside float32's: no farther than the library's products in bfloat16 are, twice."""
    torch.manual_seed(0)
    x = torch.randn(shape, device="cuda")
    assert symmetric_product_of(x.bfloat16().mT if shape[0] > shape[1] else x.bfloat16()) is not None
    exact = orthogonalise(x, 5)
    halves = orthogonalise(x.bfloat16(), 5).float()
    monkeypatch.setattr("src.optim.newton_schulz.symmetric_product_of", lambda _: None)
    wholes = orthogonalise(x.bfloat16(), 5).float()
    assert (halves - exact).norm() < 2 * (wholes - exact).norm()


def test_a_cpu_has_the_whole_product_only() -> None:
    assert symmetric_product_of(torch.zeros(4096, 4096, dtype=torch.bfloat16)) is None
